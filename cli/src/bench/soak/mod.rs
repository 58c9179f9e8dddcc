//! A fleet at work for long, with kills all the while and everything restarted once: does anything grow that should not?
//!
//! Every process and stream is looked at again and again; over the second half of the time a line is laid through what was
//! seen ([`slope`]), and each figure has its bound. Streams are given ages that this run can outlast, so that they can be seen
//! to stop growing. What is kept for a day whatever a run does is held against the work that was done instead: one key
//! for each session, each job, each start of a worker.

mod slope;

use std::{collections::BTreeMap, time::Duration};

use anyhow::Result;
use serde_json::{Value, json};
use voxfleet_harness::{
    fleet::{Engine, Fleet},
    soak::{self, Look, Plan, Report, StreamLook},
};

use self::slope::{Line, line};
use super::{processes::Memory, progress, rounded, usage};

#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "Examples:
  voxfleet bench soak --minutes 20
  voxfleet bench soak --minutes 120 --sessions 20 --json

The exit code is 1 when a figure grows beyond its bound, or when a sample was lost or repeated or something has no end.")]
pub(crate) struct SoakArgs {
    /// How long; slopes are of the second half
    #[arg(long, default_value_t = 20.0, value_name = "N")]
    minutes: f64,
    /// The same seed gives the same kills and the same audio
    #[arg(long, default_value_t = 1, value_name = "S")]
    seed: u64,
    /// Workers, with the simulated engine; the first is not killed in the second half
    #[arg(long, default_value_t = 3, value_name = "N")]
    workers: usize,
    /// Sessions at once, at one to four times real time
    #[arg(long, default_value_t = 6, value_name = "N")]
    sessions: usize,
    /// Jobs of 10 to 60 s at once
    #[arg(long, default_value_t = 2, value_name = "N")]
    jobs: usize,
    /// From one kill to the next
    #[arg(long, default_value_t = 15, value_name = "S")]
    kill_every_s: u64,
}

const SPEED: f64 = 30.0;
const DISPATCHERS: usize = 2;
const SLOTS: u32 = 16;
/// Longer than a session and its moves take, and over long before the second half.
const AUDIO_AGE_S: u64 = 90;
const TRANSCRIPT_AGE_S: u64 = 120;
/// Events are kept for a day; this much of them is there within the first minutes.
const EVENT_BYTES: u64 = 1 << 20;
/// Ended sessions are forgotten after this long, in place of five minutes: they are as many as ever before the second half.
const KEEP_ENDED_S: u64 = 60;

/// Growth over the window that nobody can tell from noise on a busy machine: of memory, and of a stream.
const NOISE_MB: f64 = 4.0;
const NOISE_SHARE: f64 = 0.10;
/// Files, sockets and threads come and go with requests; a leak of one a minute shows beyond this in ten.
const NOISE_COUNT: f64 = 6.0;

pub(super) async fn run(args: SoakArgs) -> Result<Value> {
    usage((1.0..=6_000.0).contains(&args.minutes), "--minutes: 1 to 6000")?;
    usage((2..=32).contains(&args.workers), "--workers: 2 to 32, one of them lives on")?;
    usage(args.sessions >= 1 && args.kill_every_s >= 1, "at least one session, and a second between kills")?;
    let builder = Fleet::builder().workers(args.workers).dispatchers(DISPATCHERS).slots(SLOTS);
    let builder = builder.engine(Engine::Simulated { speed: SPEED });
    let builder = builder.set("dispatcher.topology.audio_max_age_s", AUDIO_AGE_S);
    let builder = builder.set("dispatcher.topology.transcript_max_age_s", TRANSCRIPT_AGE_S);
    let builder = builder.set("dispatcher.topology.event_max_bytes", EVENT_BYTES);
    let builder = builder.set("dispatcher.keep_ended_s", KEEP_ENDED_S);
    // They tell how many tasks they have.
    let builder = builder.set("dispatcher.http.listen", "127.0.0.1:0").set("worker.http.listen", "127.0.0.1:0");
    let fleet = builder.start().await?;
    let plan = Plan {
        seed: args.seed,
        lasting: Duration::from_secs_f64(args.minutes * 60.0),
        sessions: args.sessions,
        jobs: args.jobs,
        kill_every: Duration::from_secs(args.kill_every_s),
    };
    let report = soak::run(fleet, &plan, &mut |what| progress(what)).await?;
    Ok(shown(&report, &plan))
}

/// One figure of one process or stream.
struct Figure {
    of: String,
    what: &'static str,
    line: Line,
    /// Most it may grow by over the window.
    bound: f64,
}

impl Figure {
    fn grew(&self) -> f64 {
        self.line.per_s * self.line.seconds
    }

    fn is_flat(&self) -> bool {
        self.grew() <= self.bound
    }

    fn json(&self) -> Value {
        json!({
            "of": self.of, "what": self.what, "flat": self.is_flat(), "first": rounded(self.line.first),
            "last": rounded(self.line.last), "most": rounded(self.line.most),
            "slope_per_hour": rounded(self.line.per_s * 3_600.0), "slope_error_per_hour": rounded(self.line.error_per_s * 3_600.0),
            "grew": rounded(self.grew()), "bound": rounded(self.bound), "looks": self.line.count,
        })
    }
}

/// Memory, files and threads of each process that lived through the whole window.
fn of_processes(looks: &[&Look]) -> Vec<Figure> {
    /// When, and memory, files, threads then.
    type Line = Vec<(f64, [f64; 3])>;
    let mut lives: BTreeMap<(String, u32), Line> = BTreeMap::new();
    for look in looks {
        for p in &look.processes {
            let values = [Memory::mb(p.resident_bytes), p.descriptors as f64, p.threads as f64];
            lives.entry((p.name.clone(), p.pid)).or_default().push((look.at_s, values));
        }
    }
    let whole = lives.into_iter().filter(|(_, seen)| seen.len() == looks.len());
    let figures = whole.flat_map(|((name, _), seen)| {
        [("resident_mb", 0), ("descriptors", 1), ("threads", 2)].map(|(what, n)| {
            let points: Vec<(f64, f64)> = seen.iter().map(|(at, values)| (*at, values[n])).collect();
            let line = line(&points);
            let bound = if n == 0 { NOISE_MB.max(line.first * NOISE_SHARE) } else { NOISE_COUNT };
            Figure { of: name.clone(), what, line, bound }
        })
    });
    figures.collect()
}

/// Tasks of each process that was the same in every look.
fn of_tasks(looks: &[&Look]) -> Vec<Figure> {
    let mut lives: BTreeMap<(&str, u32), Vec<(f64, f64)>> = BTreeMap::new();
    for look in looks {
        for seen in &look.tasks {
            lives.entry((&seen.name, seen.pid)).or_default().push((look.at_s, seen.tasks as f64));
        }
    }
    let whole = lives.into_iter().filter(|(_, points)| points.len() == looks.len());
    let figures = whole.map(|((name, _), points)| {
        let line = line(&points);
        // What comes and goes with sessions is as often high as low.
        let bound = NOISE_COUNT.max(2.0 * NOISE_SHARE * line.most);
        Figure { of: name.to_owned(), what: "tasks", line, bound }
    });
    figures.collect()
}

/// Streams whose ages and sizes this run outlasts.
const SETTLED: [&str; 9] = [
    "ASR_AUDIO",
    "ASR_TRANSCRIPT",
    "ASR_LIVE",
    "ASR_WORK",
    "ASR_JOBS",
    "ASR_PARTIAL",
    "ASR_EVENT",
    "ASR_DEAD",
    "KV_asr_control",
];

fn of_streams(looks: &[&Look]) -> Vec<Figure> {
    let mut seen: BTreeMap<&str, Vec<(f64, StreamLook)>> = BTreeMap::new();
    for look in looks {
        for stream in &look.streams {
            seen.entry(stream.name).or_default().push((look.at_s, stream.clone()));
        }
    }
    let mut figures = Vec::new();
    for (name, seen) in seen {
        let mut add = |what: &'static str, value: fn(&StreamLook) -> f64, noise: f64| {
            let points: Vec<(f64, f64)> = seen.iter().map(|(at, stream)| (*at, value(stream))).collect();
            let line = line(&points);
            // What comes and goes with sessions is as often high as low.
            let bound = noise.max(2.0 * NOISE_SHARE * line.most);
            figures.push(Figure { of: name.to_owned(), what, line, bound });
        };
        add("consumers", |s| s.consumers as f64, 2.0);
        if SETTLED.contains(&name) {
            add("megabytes", |s| Memory::mb(s.bytes), 0.5);
        }
    }
    figures
}

/// Recordings of this bench: 16 kHz, 16 bits.
const WAV_BYTES_PER_S: f64 = 32_000.0;
/// What a minute's words take with their times, and what the store adds to both objects.
const RESULT_BYTES: f64 = 64.0 * 1_024.0;

/// What is kept for each session, job and start, against how many there were.
fn accounted(report: &Report) -> Vec<Value> {
    let last = report.looks.iter().rev().find(|look| !look.streams.is_empty());
    let stream = |name: &str| last.and_then(|look| look.streams.iter().find(|s| s.name == name));
    let rows = [
        ("KV_asr_sessions", "sessions", report.sessions),
        ("KV_asr_jobs", "jobs", report.jobs),
        ("KV_asr_fleet", "incarnations", report.incarnations),
    ];
    let rows = rows.map(|(name, of, begun)| {
        let keys = stream(name).map(|s| s.subjects);
        json!({ "of": name, "keys": keys, "for_each_of": of, "count": begun, "explained": keys.is_some_and(|k| k <= begun) })
    });
    let media = stream("OBJ_asr_media").map(|s| s.bytes as f64);
    // Each job's recording as it was sent, and its result.
    let most = report.job_seconds * WAV_BYTES_PER_S * (1.0 + NOISE_SHARE) + report.jobs as f64 * RESULT_BYTES;
    let rest = json!({ "of": "OBJ_asr_media", "for_each_of": "jobs", "count": report.jobs,
        "kb_a_job": media.map(|bytes| rounded(bytes / 1_024.0 / report.jobs.max(1) as f64)),
        "kb_a_job_at_most": rounded(most / 1_024.0 / report.jobs.max(1) as f64),
        "explained": media.is_some_and(|bytes| bytes <= most) });
    rows.into_iter().chain([rest]).collect()
}

fn shown(report: &Report, plan: &Plan) -> Value {
    let half = report.seconds / 2.0;
    let window: Vec<&Look> = report.looks.iter().filter(|look| look.at_s >= half).collect();
    let with_streams: Vec<&Look> = window.iter().copied().filter(|look| !look.streams.is_empty()).collect();
    let mut figures = of_processes(&window);
    figures.extend(of_streams(&with_streams));
    figures.extend(of_tasks(&with_streams));
    let explained = accounted(report);
    let mut problems = report.problems.clone();
    // Whoever is watched must have been there, or a flat line says nothing.
    for name in ["nats-server", "dispatcher-1", "dispatcher-2", "gpu-1", "gpu-1 engine"] {
        if !figures.iter().any(|f| f.of == name && f.what == "resident_mb") {
            problems.push(format!("{name} did not live through the second half"));
        }
    }
    if !figures.iter().any(|f| f.what == "tasks" && f.of.starts_with("dispatcher")) {
        problems.push("no dispatcher told how many tasks it has".to_owned());
    }
    if report.restarted_at_s == 0.0 || report.kills == 0 || report.sessions == 0 {
        problems.push("this run shows nothing: no restart, no kill or no session".to_owned());
    }
    let grown: Vec<Value> =
        figures.iter().filter(|f| !f.is_flat()).map(|f| json!({ "of": f.of, "what": f.what })).collect();
    let lost = report.samples_lost + report.samples_repeated + report.finals_repeated;
    let clean =
        grown.is_empty() && problems.is_empty() && lost == 0 && explained.iter().all(|row| row["explained"] == true);
    json!({
        "clean": clean,
        "minutes": rounded(report.seconds / 60.0),
        "window_s": rounded(report.seconds - half),
        "seed": plan.seed,
        "kills": report.kills,
        "everything_restarted_at_s": rounded(report.restarted_at_s),
        "sessions": report.sessions,
        "jobs": report.jobs,
        "audio_s": rounded(report.audio_seconds),
        "samples_lost": report.samples_lost,
        "samples_repeated": report.samples_repeated,
        "finals_repeated": report.finals_repeated,
        "figures": figures.iter().map(Figure::json).collect::<Vec<_>>(),
        "kept_for_a_day": explained,
        "grown": grown,
        "problems": problems.iter().map(|p| json!({ "what": p })).collect::<Vec<_>>(),
    })
}

#[cfg(test)]
mod tests {
    use voxfleet_harness::soak::{ProcessLook, TaskLook};

    use super::*;

    const MB: u64 = 1 << 20;

    fn plan() -> Plan {
        let (lasting, kill_every) = (Duration::from_secs(1_200), Duration::from_secs(15));
        Plan { seed: 1, lasting, sessions: 1, jobs: 1, kill_every }
    }

    /// Twenty minutes of five processes, one of which gets so much more of each in an hour.
    fn report(mb: f64, files: f64, keys: u64) -> Report {
        let names = ["nats-server", "dispatcher-1", "dispatcher-2", "gpu-1", "gpu-1 engine"];
        let look = |n: u32| {
            let at_s = f64::from(n) * 2.0;
            let process = |(i, name): (usize, &&str)| {
                let more = if i == 1 { at_s / 3_600.0 } else { 0.0 };
                ProcessLook {
                    name: (*name).to_owned(),
                    pid: i as u32 + 1,
                    resident_bytes: 30 * MB + (more * mb * MB as f64) as u64,
                    descriptors: 20 + (more * files) as u64,
                    threads: 9,
                }
            };
            let task = |i: usize| TaskLook { name: names[i].to_owned(), pid: i as u32 + 1, tasks: 40 };
            let stream = |name| StreamLook { name, bytes: MB, messages: 5, consumers: 3, subjects: keys };
            let streams = if n.is_multiple_of(5) { soak_streams().map(stream).to_vec() } else { Vec::new() };
            let tasks = if streams.is_empty() { Vec::new() } else { (1..4).map(task).collect() };
            Look { at_s, processes: names.iter().enumerate().map(process).collect(), streams, tasks }
        };
        Report {
            looks: (0..600).map(look).collect(),
            seconds: 1_200.0,
            restarted_at_s: 480.0,
            kills: 80,
            sessions: 100,
            jobs: 100,
            job_seconds: 3_500.0,
            incarnations: 100,
            ..Report::default()
        }
    }

    fn soak_streams() -> [&'static str; 5] {
        ["ASR_AUDIO", "KV_asr_sessions", "KV_asr_jobs", "KV_asr_fleet", "OBJ_asr_media"]
    }

    #[test]
    fn what_stays_is_clean_and_what_grows_is_named() {
        assert_eq!(shown(&report(0.0, 0.0, 90), &plan())["clean"], true);
        for (mb, files, keys, what) in [(60.0, 0.0, 90, "resident_mb"), (0.0, 60.0, 90, "descriptors")] {
            let shown = shown(&report(mb, files, keys), &plan());
            assert_eq!(shown["clean"], false);
            assert_eq!(shown["grown"], json!([{ "of": "dispatcher-1", "what": what }]), "{what}");
        }
        let unexplained = shown(&report(0.0, 0.0, 101), &plan());
        assert_eq!((&unexplained["clean"], &unexplained["grown"]), (&json!(false), &json!([])));
    }

    #[test]
    fn a_run_that_watched_nobody_or_lost_something_is_not_clean() {
        let lost = Report { samples_lost: 1, ..report(0.0, 0.0, 90) };
        assert_eq!(shown(&lost, &plan())["clean"], false);
        let mut gone = report(0.0, 0.0, 90);
        // Another process has its name from here on.
        gone.looks[400..].iter_mut().for_each(|look| look.processes[3].pid = 99);
        let shown_gone = shown(&gone, &plan());
        assert_eq!(shown_gone["clean"], false);
        assert_eq!(shown_gone["problems"][0]["what"], "gpu-1 did not live through the second half");
        // Recordings that nobody sent.
        let strange = Report { job_seconds: 0.0, jobs: 1, ..report(0.0, 0.0, 1) };
        let told = shown(&strange, &plan());
        assert_eq!((&told["clean"], &told["kept_for_a_day"][3]["explained"]), (&json!(false), &json!(false)));
        let mut silent = report(0.0, 0.0, 90);
        silent.looks.iter_mut().for_each(|look| look.tasks.clear());
        assert_eq!(shown(&silent, &plan())["problems"][0]["what"], "no dispatcher told how many tasks it has");
        let mut busy = report(0.0, 0.0, 90);
        for look in &mut busy.looks {
            let more = (look.at_s / 10.0) as u64;
            look.tasks.iter_mut().filter(|seen| seen.name == "dispatcher-1").for_each(|seen| seen.tasks += more);
        }
        assert_eq!(shown(&busy, &plan())["grown"], json!([{ "of": "dispatcher-1", "what": "tasks" }]));
        let idle = Report { kills: 0, ..report(0.0, 0.0, 90) };
        assert_eq!(shown(&idle, &plan())["clean"], false);
    }
}
