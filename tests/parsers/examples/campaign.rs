//! A long campaign: `cargo run -p voxfleet-parsers --release --example campaign -- SECONDS [SEED]`. The time is shared evenly among
//! all targets; each finding is written to `target/findings/<target>-<n>` and its target is left. Exit code 1 if there was
//! any.

use std::{
    io::Write as _,
    path::Path,
    process::ExitCode,
    time::{Duration, Instant},
};

use voxfleet_parsers::{Budget, Counting, TARGETS, campaign};

#[global_allocator]
static COUNTING: Counting = Counting;

fn main() -> ExitCode {
    let numbers: Vec<u64> = std::env::args().skip(1).filter_map(|word| word.parse().ok()).collect();
    let (seconds, seed) = match numbers[..] {
        [seconds] => (seconds, 1),
        [seconds, seed] => (seconds, seed),
        _ => return ExitCode::from(2),
    };
    // Findings tell their panics themselves.
    std::panic::set_hook(Box::new(|_| ()));
    let each = Duration::from_secs(seconds) / TARGETS.len() as u32;
    let mut out = std::io::stdout().lock();
    let mut say = |text: String| writeln!(out, "{text}").and_then(|()| out.flush());
    let mut findings = 0;
    for (n, target) in TARGETS.iter().enumerate() {
        let begun = Instant::now();
        let said = match campaign(target, Budget::Time(each), seed.wrapping_mul(1_000) + n as u64) {
            Ok(report) => {
                let took = begun.elapsed().as_secs_f64();
                say(format!(
                    "{:16} {:>10} cases {:>10} accepted {took:>7.1} s",
                    target.name, report.cases, report.accepted
                ))
            }
            Err(finding) => {
                findings += 1;
                let path = Path::new("target/findings").join(format!("{}-{seed}", finding.target));
                let kept =
                    std::fs::create_dir_all("target/findings").and_then(|()| std::fs::write(&path, &finding.input));
                say(format!("{:16} FOUND {} ({}, {kept:?})", target.name, finding.why, path.display()))
            }
        };
        if said.is_err() {
            return ExitCode::from(1);
        }
    }
    ExitCode::from(u8::from(findings > 0))
}
