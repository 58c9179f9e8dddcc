//! What was found stays mended, and a short campaign of fixed seed finds nothing.

use voxfleet_parsers::{Budget, Counting, Finding, TARGETS, campaign, replay};

#[global_allocator]
static COUNTING: Counting = Counting;

/// For each of them; with all targets a few seconds.
const CASES: u64 = 1_500;
/// A decoder takes milliseconds.
const RECORDINGS: u64 = 60;

fn told(finding: Finding) -> String {
    let Finding { target, why, input } = finding;
    format!("{target}: {why}\ninput of {} bytes: {}", input.len(), input.escape_ascii())
}

#[test]
fn everything_kept_holds() {
    for target in TARGETS {
        let report = replay(target).unwrap_or_else(|finding| panic!("{}", told(finding)));
        assert!(report.cases > 0 && report.accepted > 0, "{}: {report:?}", target.name);
    }
}

#[test]
fn a_short_campaign_finds_nothing() {
    for (n, target) in TARGETS.iter().enumerate() {
        let cases = if target.name == "recordings" { RECORDINGS } else { CASES };
        let report =
            campaign(target, Budget::Cases(cases), n as u64).unwrap_or_else(|finding| panic!("{}", told(finding)));
        // Changes that are all refused at the door would test the door alone.
        assert!(report.accepted * 50 > report.cases, "{}: {report:?}", target.name);
    }
}
