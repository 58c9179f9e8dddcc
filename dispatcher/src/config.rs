//! Settings of a dispatcher. Read once, checked as a whole, passed as a value.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use voxfleet_http::HttpConfig;
use voxfleet_nats::topology::TopologyConfig;
use voxfleet_schema::id::GpuId;

pub use crate::http::limits::{SocketLimits, UploadLimits};

/// One service of the fleet map: which GPUs it has, and how it uses them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ServiceConfig {
    /// Its GPUs, by `gpu_id`. No GPU serves two services.
    pub gpus: Vec<String>,
    /// GPUs that take its work when one of its own cannot; services may share them.
    pub reserves: Vec<String>,
    /// Share of each GPU's memory that it may fill, in percent: what is left is for fragmentation and other tenants.
    pub memory_limit_percent: u8,
    /// Models its workers load before anybody asks.
    pub preload: Vec<String>,
    /// Whoever asks for one of these models belongs to this service; whoever asks for none, or for one that no service
    /// lists, to the only service, to the one called `asr`, or to the first without a list.
    pub models: Vec<String>,
    /// CPU workers that no service names take its work when no GPU has room, where the session's policy allows that: a slow
    /// transcript is better than none, unless its owner says otherwise.
    pub cpu: bool,
}

impl Default for ServiceConfig {
    fn default() -> Self {
        Self {
            gpus: Vec::new(),
            reserves: Vec::new(),
            memory_limit_percent: 90,
            preload: Vec::new(),
            models: Vec::new(),
            cpu: true,
        }
    }
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DispatcherConfig {
    /// Name in status, logs and the API's queue group; empty = made up at start, so that two on one host differ.
    pub name: String,
    /// Health, figures and the dashboard. An address that is taken is waited for.
    pub http: HttpConfig,
    /// Recordings of `POST /api/transcribe`.
    pub uploads: UploadLimits,
    /// Sockets of `/asr`.
    pub sockets: SocketLimits,
    /// Streams and buckets to create and check.
    pub topology: TopologyConfig,
    /// Without a heartbeat for this long a worker gets no new work: one heartbeat late and a half. For a worker that beats more
    /// slowly (`worker.heartbeat_ms`) it is one and a half of its own.
    pub suspect_after_ms: u64,
    /// Without a heartbeat for this long a worker is dead: three heartbeats in a row do not get lost by chance. Three of its own
    /// for a worker that beats more slowly.
    pub dead_after_ms: u64,
    /// An engine with work that has not moved for this long is stuck for good: its worker takes nothing new after half of
    /// `worker.engine_stuck_ms` (15 s) and ends it after all of it, so this is longer.
    pub stuck_after_ms: u64,
    /// How long verdicts wait when many workers fall silent at once: a broken link heals or shows itself in that time.
    pub mass_silence_hold_ms: u64,
    /// A session without audio for this long gets a flush: producers that pause expect their last words soon.
    pub flush_after_ms: u64,
    /// Pace of reconciliation: that of heartbeats, more often would see nothing new.
    pub tick_ms: u64,
    /// A lease not renewed for this long is free: a standby takes over within seconds, a slow renewal loses nothing.
    pub lease_ms: u64,
    /// How long a worker may take to answer a control request; it only looks at its permits.
    pub control_timeout_ms: u64,
    /// What a refused client is told to wait: about what a slot takes to come free on a fleet that turns over.
    pub retry_after_ms: u64,
    /// Whoever runs on a smaller model or a CPU for want of room is moved back when there has been room for what he asked for
    /// this long: a move costs a second of latency, and a neighbour's memory comes and goes.
    pub restore_after_ms: u64,
    /// Share of a device's memory that is never planned, in percent: fragmentation and other tenants.
    pub reserve_percent: u8,
    /// Devices at or above this throttle, in degrees Celsius.
    pub max_temperature_c: u32,
    /// Slowest sustained decoding that still gets work, in seconds of audio per second: below 1 it falls behind one speaker.
    pub min_decode_rate: f32,
    /// Writes and requests under way at once: enough to hide their round trips, few enough to keep order in the queue.
    pub io_in_flight: usize,
    /// Sessions in memory at once: a few kB each, and far above what a fleet has slots for. Whoever opens more by audio
    /// waits in the log, so that strangers with ever new names cost no memory.
    pub max_sessions: usize,
    /// Tries after which a job that gets no further has failed: two may be bad luck, three are the recording.
    pub max_attempts: u32,
    /// Jobs that wait or run at once; more wait at the door or are refused. With presigned URLs a record is about 2.5 kB:
    /// this many take three quarters of a bucket of 64 MiB, which takes no new ones when four fifths are full.
    pub jobs_max_queued: usize,
    /// Somebody of a lower priority, live session or job, is overtaken for at most this long by those of the next higher one,
    /// in s: a batch is done within the hour, however much of higher priority comes.
    pub jobs_age_s: u64,
    /// The fleet map, by name of service; empty: every worker serves everything.
    pub services: BTreeMap<String, ServiceConfig>,
    /// Ended sessions kept in memory for late audio and questions, in s; older ones are read from their key.
    pub keep_ended_s: u64,
}

impl Default for DispatcherConfig {
    fn default() -> Self {
        Self {
            name: String::new(),
            // Nobody else on the machine has a reason for this port, and nobody from elsewhere gets to loopback.
            http: HttpConfig::on("127.0.0.1:9480"),
            uploads: UploadLimits::default(),
            sockets: SocketLimits::default(),
            topology: TopologyConfig::default(),
            suspect_after_ms: 1_500,
            dead_after_ms: 3_000,
            stuck_after_ms: 20_000,
            mass_silence_hold_ms: 10_000,
            flush_after_ms: 2_000,
            tick_ms: 1_000,
            lease_ms: 5_000,
            control_timeout_ms: 2_000,
            retry_after_ms: 1_000,
            restore_after_ms: 30_000,
            reserve_percent: 10,
            max_temperature_c: 83,
            min_decode_rate: 1.0,
            io_in_flight: 256,
            max_sessions: 20_000,
            max_attempts: 3,
            jobs_max_queued: 20_000,
            jobs_age_s: 600,
            services: BTreeMap::new(),
            keep_ended_s: 300,
        }
    }
}

impl DispatcherConfig {
    /// Every mistake, not only the first.
    pub fn problems(&self) -> Vec<String> {
        let mut problems: Vec<String> =
            self.topology.problems().into_iter().map(|p| format!("dispatcher.topology: {p}")).collect();
        problems.extend(self.http.problems("dispatcher.http"));
        problems.extend(self.uploads.problems("dispatcher.uploads"));
        problems.extend(self.sockets.problems("dispatcher.sockets"));
        let mut need = |good: bool, text: String| {
            if !good {
                problems.push(text);
            }
        };
        need(
            self.name.is_empty() || voxfleet_schema::id::check(&self.name).is_ok(),
            format!("dispatcher.name: {:?} is not made of letters, digits, '_' and '-', at most 64", self.name),
        );
        for (name, value, range) in [
            ("suspect_after_ms", self.suspect_after_ms, 100..=60_000),
            ("dead_after_ms", self.dead_after_ms, 200..=600_000),
            ("stuck_after_ms", self.stuck_after_ms, 1_000..=3_600_000),
            ("mass_silence_hold_ms", self.mass_silence_hold_ms, 0..=600_000),
            ("flush_after_ms", self.flush_after_ms, 200..=600_000),
            ("tick_ms", self.tick_ms, 50..=10_000),
            ("lease_ms", self.lease_ms, 1_000..=60_000),
            ("control_timeout_ms", self.control_timeout_ms, 100..=60_000),
            ("retry_after_ms", self.retry_after_ms, 1..=3_600_000),
            ("restore_after_ms", self.restore_after_ms, 0..=86_400_000),
            ("io_in_flight", self.io_in_flight as u64, 1..=4_096),
            ("max_sessions", self.max_sessions as u64, 1..=10_000_000),
            ("max_attempts", u64::from(self.max_attempts), 1..=100),
            ("jobs_max_queued", self.jobs_max_queued as u64, 1..=10_000_000),
            ("jobs_age_s", self.jobs_age_s, 1..=86_400),
            ("keep_ended_s", self.keep_ended_s, 1..=86_400),
        ] {
            need(range.contains(&value), {
                format!("dispatcher.{name}: {value} is outside {} to {}", range.start(), range.end())
            });
        }
        need(
            self.suspect_after_ms < self.dead_after_ms,
            format!(
                "dispatcher.suspect_after_ms: {} is not below dead_after_ms ({})",
                self.suspect_after_ms, self.dead_after_ms
            ),
        );
        need(
            self.reserve_percent < 100,
            format!("dispatcher.reserve_percent: {} is not below 100", self.reserve_percent),
        );
        need(
            self.min_decode_rate.is_finite() && self.min_decode_rate >= 0.0,
            format!("dispatcher.min_decode_rate: {} is not a number from 0", self.min_decode_rate),
        );
        problems.extend(service_problems(&self.services));
        problems
    }
}

fn service_problems(services: &BTreeMap<String, ServiceConfig>) -> Vec<String> {
    let mut problems = Vec::new();
    let mut taken: BTreeMap<&str, &str> = BTreeMap::new();
    let mut models: BTreeMap<&str, &str> = BTreeMap::new();
    for (name, service) in services {
        if let Err(error) = voxfleet_schema::id::check(name) {
            problems.push(format!("dispatcher.services.{name}: the name of a service: {error}"));
        }
        if !(1..=100).contains(&service.memory_limit_percent) {
            let percent = service.memory_limit_percent;
            problems.push(format!("dispatcher.services.{name}.memory_limit_percent: {percent} is outside 1 to 100"));
        }
        for gpu in service.gpus.iter().chain(&service.reserves) {
            if let Err(error) = GpuId::new(gpu.as_str()) {
                problems.push(format!("dispatcher.services.{name}: gpu_id {gpu:?}: {error}"));
            }
        }
        for gpu in &service.gpus {
            if let Some(other) = taken.insert(gpu, name) {
                problems.push(format!("dispatcher.services.{name}.gpus: {gpu} serves {other} already"));
            }
        }
        for model in &service.models {
            if let Some(other) = models.insert(model, name) {
                problems.push(format!("dispatcher.services.{name}.models: {model} belongs to {other} already"));
            }
        }
    }
    for (name, service) in services {
        let seen: BTreeSet<&String> = service.reserves.iter().collect();
        if seen.len() < service.reserves.len() {
            problems.push(format!("dispatcher.services.{name}.reserves: a GPU is named twice"));
        }
        for gpu in seen {
            if let Some(other) = taken.get(gpu.as_str()) {
                problems.push(format!("dispatcher.services.{name}.reserves: {gpu} serves {other}"));
            }
        }
    }
    problems
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_map_that_contradicts_itself_is_refused() {
        let service = |gpus: &[&str], reserves: &[&str], models: &[&str]| {
            let own = |list: &[&str]| list.iter().map(|s| (*s).to_owned()).collect();
            ServiceConfig { gpus: own(gpus), reserves: own(reserves), models: own(models), ..ServiceConfig::default() }
        };
        let of = |list: &[(&str, ServiceConfig)]| {
            service_problems(&list.iter().map(|(n, s)| ((*n).to_owned(), s.clone())).collect())
        };
        assert_eq!(of(&[("asr", service(&["a"], &["r"], &["m"])), ("bulk", service(&["b"], &["r"], &["n"]))]), [""; 0]);
        let limit = ServiceConfig { memory_limit_percent: 0, ..ServiceConfig::default() };
        for (why, services) in [
            ("name of a service", vec![("a b", service(&[], &[], &[]))]),
            ("outside 1 to 100", vec![("asr", limit)]),
            ("gpu_id", vec![("asr", service(&["a.b"], &[], &[]))]),
            ("serves asr already", vec![("asr", service(&["a"], &[], &[])), ("bulk", service(&["a"], &[], &[]))]),
            ("belongs to asr already", vec![("asr", service(&[], &[], &["m"])), ("bulk", service(&[], &[], &["m"]))]),
            ("named twice", vec![("asr", service(&[], &["r", "r"], &[]))]),
            ("r serves bulk", vec![("asr", service(&[], &["r"], &[])), ("bulk", service(&["r"], &[], &[]))]),
        ] {
            let problems = of(&services);
            assert!(problems.len() == 1 && problems[0].contains(why), "{why}: {problems:?}");
        }
    }

    #[test]
    fn defaults_are_good_and_every_mistake_is_named() {
        assert_eq!(DispatcherConfig::default().problems(), Vec::<String>::new());
        let bad = DispatcherConfig {
            name: "a b".into(),
            suspect_after_ms: 4_000,
            tick_ms: 0,
            reserve_percent: 100,
            min_decode_rate: f32::NAN,
            ..DispatcherConfig::default()
        };
        let problems = bad.problems().join("\n");
        for name in ["name", "suspect_after_ms", "tick_ms", "reserve_percent", "min_decode_rate"] {
            assert!(problems.contains(&format!("dispatcher.{name}:")), "{name} in {problems}");
        }
    }
}
