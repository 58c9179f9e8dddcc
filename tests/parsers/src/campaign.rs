//! Runs a target: what is kept first, then changes of it.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    time::{Duration, Instant},
};

use rustix::time::{ClockId, clock_gettime};

use crate::{
    Target,
    memory::peak,
    mutate::{Dice, mutant},
    seeds,
};

/// Processor time of one case: a thousand times what the slowest takes.
const MOST_TIME: Duration = Duration::from_secs(5);
/// Memory of one case: buffers of a decoder, and so many bytes for each byte of the input.
const MOST_MEMORY: u64 = 64 << 20;
const MEMORY_PER_BYTE: u64 = 256;
/// Inputs kept to be changed further.
const POOL: usize = 2_000;

/// When a campaign ends.
#[derive(Debug, Clone, Copy)]
pub enum Budget {
    Cases(u64),
    Time(Duration),
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Report {
    pub cases: u64,
    /// That the parser took: changes that reach inside.
    pub accepted: u64,
}

/// An input that breaks a promise.
#[derive(Debug)]
pub struct Finding {
    pub target: &'static str,
    pub why: String,
    pub input: Vec<u8>,
}

/// Everything that is kept for a target, as it is.
pub fn replay(target: &Target) -> Result<Report, Finding> {
    let mut report = Report::default();
    for input in seeds::of(target) {
        report.count(case(target, &input)?);
    }
    Ok(report)
}

/// Changes what is kept until the budget is spent.
pub fn campaign(target: &Target, budget: Budget, seed: u64) -> Result<Report, Finding> {
    let (begun, mut dice) = (Instant::now(), Dice::new(seed));
    let mut pool = seeds::of(target);
    pool.push(Vec::new());
    let kept = pool.len();
    let mut report = Report::default();
    loop {
        let goes_on = match budget {
            Budget::Cases(cases) => report.cases < cases,
            Budget::Time(time) => begun.elapsed() < time,
        };
        if !goes_on {
            return Ok(report);
        }
        let input = mutant(&pool, &mut dice, target.max_len);
        let accepted = case(target, &input)?;
        report.count(accepted);
        if accepted && pool.len() < POOL {
            pool.push(input);
        } else if accepted && kept < pool.len() {
            let place = kept + dice.below(pool.len() - kept);
            pool[place] = input;
        }
    }
}

impl Report {
    fn count(&mut self, accepted: bool) {
        self.cases += 1;
        self.accepted += u64::from(accepted);
    }
}

fn case(target: &Target, input: &[u8]) -> Result<bool, Finding> {
    let found = |why: String| Finding { target: target.name, why, input: input.to_vec() };
    let begun = cpu();
    // A target keeps nothing between two cases.
    let (done, bytes) = peak(|| catch_unwind(AssertUnwindSafe(|| (target.run)(input))));
    let took = cpu().saturating_sub(begun);
    let accepted = done.map_err(|panic| {
        let said = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
        found(format!("panicked: {}", said.unwrap_or("no reason given")))
    })?;
    if took > MOST_TIME {
        return Err(found(format!("took {took:?} of processor time")));
    }
    if bytes > MOST_MEMORY + MEMORY_PER_BYTE * input.len() as u64 {
        return Err(found(format!("took {bytes} bytes for {}", input.len())));
    }
    Ok(accepted)
}

/// Of this thread: a busy machine makes no findings.
fn cpu() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(run: fn(&[u8]) -> bool) -> Target {
        Target { name: "test", max_len: 64, seeds: &["schema/tests/golden/final.json"], run }
    }

    #[test]
    fn what_breaks_is_found_with_its_input() {
        let finding =
            campaign(&target(|input| if input.len() > 40 { panic!("long") } else { true }), Budget::Cases(500), 1);
        let finding = finding.expect_err("found");
        assert!(finding.input.len() > 40 && finding.why == "panicked: long", "{finding:?}");
        let report = campaign(&target(|input| input.len() % 2 == 0), Budget::Cases(100), 1).expect("nothing");
        assert_eq!(report.cases, 100);
        assert!((1..100).contains(&report.accepted), "{report:?}");
        assert_eq!(replay(&target(|_| true)).expect("kept"), Report { cases: 1, accepted: 1 });
    }
}
