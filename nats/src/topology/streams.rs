//! What each stream and bucket looks like, and how far a found one is from that.

use std::{collections::BTreeSet, time::Duration};

use async_nats::jetstream::stream::{Config, DiscardPolicy, RetentionPolicy, StorageType};
use serde::{Deserialize, Serialize};
use voxfleet_schema::transcript::MAX_FINAL_BYTES;

use super::names;
use crate::{
    kv::Bucket,
    subjects::{Filter, Subjects},
};

/// Sizes and replicas.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TopologyConfig {
    /// 1, or 3 on a cluster.
    pub replicas: usize,
    pub audio_max_bytes: u64,
    pub audio_max_age_s: u64,
    pub live_max_bytes: u64,
    pub live_max_age_s: u64,
    pub jobs_max_bytes: u64,
    /// 0: until a dispatcher takes it. `ASR_WORK` has no such setting: an item is made again from its job's key.
    pub jobs_max_age_s: u64,
    pub work_max_bytes: u64,
    pub transcript_max_bytes: u64,
    pub transcript_max_age_s: u64,
    pub checkpoint_max_bytes: u64,
    pub checkpoint_max_age_s: u64,
    pub partial_max_bytes: u64,
    pub partial_max_age_s: u64,
    pub event_max_bytes: u64,
    pub event_max_age_s: u64,
    pub dead_max_bytes: u64,
    /// 0: until somebody puts the letter away.
    pub dead_max_age_s: u64,
    pub media_max_bytes: u64,
    /// 0: recordings and results go with their jobs (`result_ttl_s`), what was uploaded by hand stays.
    pub media_max_age_s: u64,
    /// Each of the four buckets.
    pub bucket_max_bytes: u64,
    /// Of each stream; `ASR_LIVE` and `ASR_WORK` have one consumer for each worker incarnation.
    pub max_consumers: i32,
}

const MIB: u64 = 1024 * 1024;

impl Default for TopologyConfig {
    fn default() -> Self {
        Self {
            // One server is where everybody starts; a cluster says 3.
            replicas: 1,
            // 37 hours of 16 kHz PCM: 37 sessions that speak for the whole hour of retention.
            audio_max_bytes: 4_096 * MIB,
            // Twice the longest idle timeout: what a session may be silent for is always still there.
            audio_max_age_s: 3_600,
            // A minute of hints for 130 sessions; older ones are dropped, the log has them.
            live_max_bytes: 256 * MIB,
            // A hint older than that is behind what its worker has read from the log.
            live_max_age_s: 60,
            jobs_max_bytes: 64 * MIB,
            // A request waits for as long as no dispatcher runs.
            jobs_max_age_s: 0,
            work_max_bytes: 64 * MIB,
            // About a million finals of 1 kB.
            transcript_max_bytes: 1_024 * MIB,
            // A day to read what was said.
            transcript_max_age_s: 86_400,
            checkpoint_max_bytes: 256 * MIB,
            // As long as the finals that name them.
            checkpoint_max_age_s: 86_400,
            // One partial a session.
            partial_max_bytes: 64 * MIB,
            // Whoever comes later than that reads the final.
            partial_max_age_s: 300,
            event_max_bytes: 256 * MIB,
            event_max_age_s: 86_400,
            dead_max_bytes: 256 * MIB,
            // A letter waits for a person.
            dead_max_age_s: 0,
            media_max_bytes: 2_048 * MIB,
            media_max_age_s: 0,
            // 20,000 jobs with presigned URLs of 2 kB, or 100,000 sessions of 600 bytes.
            bucket_max_bytes: 64 * MIB,
            // The server's own default of 1,000 would stop the fleet at a thousand incarnations.
            max_consumers: 10_000,
        }
    }
}

impl TopologyConfig {
    /// Every mistake, each with the name of its field.
    pub fn problems(&self) -> Vec<String> {
        let mut found = Vec::new();
        if !matches!(self.replicas, 1 | 3 | 5) {
            found.push(format!("topology.replicas: {} is neither 1, 3 nor 5", self.replicas));
        }
        for (name, bytes) in self.sizes() {
            if !(MIB..=1 << 50).contains(&bytes) {
                found.push(format!("topology.{name}: {bytes} is outside 1 MiB to 1 PiB"));
            }
        }
        for (name, seconds, may_stay) in self.ages() {
            let keeps_all = may_stay && seconds == 0;
            if !keeps_all && !(10..=31_536_000).contains(&seconds) {
                let or = if may_stay { ", or 0 for no limit" } else { "" };
                found.push(format!("topology.{name}: {seconds} is outside 10 s to one year{or}"));
            }
        }
        if self.transcript_max_age_s < self.audio_max_age_s {
            found.push(
                "topology.transcript_max_age_s: below audio_max_age_s, finals would be gone before their audio".into(),
            );
        }
        if self.checkpoint_max_age_s < self.transcript_max_age_s {
            found.push(
                "topology.checkpoint_max_age_s: below transcript_max_age_s, finals would name checkpoints that are gone"
                    .into(),
            );
        }
        if self.media_max_age_s != 0 && self.media_max_age_s < DAY.as_secs() {
            // While a job reads its recording, or its reader the result, the beginning must not go.
            found.push(format!("topology.media_max_age_s: {} is below a day (86400)", self.media_max_age_s));
        }
        if !(16..=1_000_000).contains(&self.max_consumers) {
            found.push(format!("topology.max_consumers: {} is outside 16 to 1000000", self.max_consumers));
        }
        found
    }

    /// What one copy of every stream may take, in bytes: memory, file. An account must have room for it, times `replicas`,
    /// before the streams are made.
    pub fn reserved(&self) -> (u64, u64) {
        let memory = self.live_max_bytes + self.partial_max_bytes;
        let all: u64 = self.sizes().iter().map(|(_, bytes)| bytes).sum();
        // The last size is that of each bucket.
        let other_buckets = self.bucket_max_bytes * (Bucket::ALL.len() as u64 - 1);
        (memory, all - memory + other_buckets)
    }

    /// Of the streams that have a session's or job's name in their subjects, for the test that all of them are purged.
    #[cfg(test)]
    pub(crate) fn stream_names() -> Vec<String> {
        let streams = wanted(&Subjects::new("x"), &TopologyConfig::default(), 1 << 22);
        streams.into_iter().map(|stream| stream.name).filter(|name| name.starts_with("ASR_")).collect()
    }

    /// And whether 0 may say that nothing goes by its age.
    fn ages(&self) -> [(&'static str, u64, bool); 9] {
        [
            ("audio_max_age_s", self.audio_max_age_s, false),
            ("live_max_age_s", self.live_max_age_s, false),
            ("jobs_max_age_s", self.jobs_max_age_s, true),
            ("transcript_max_age_s", self.transcript_max_age_s, false),
            ("checkpoint_max_age_s", self.checkpoint_max_age_s, false),
            ("partial_max_age_s", self.partial_max_age_s, false),
            ("event_max_age_s", self.event_max_age_s, false),
            ("dead_max_age_s", self.dead_max_age_s, true),
            ("media_max_age_s", self.media_max_age_s, true),
        ]
    }

    fn sizes(&self) -> [(&'static str, u64); 11] {
        [
            ("audio_max_bytes", self.audio_max_bytes),
            ("live_max_bytes", self.live_max_bytes),
            ("jobs_max_bytes", self.jobs_max_bytes),
            ("work_max_bytes", self.work_max_bytes),
            ("transcript_max_bytes", self.transcript_max_bytes),
            ("checkpoint_max_bytes", self.checkpoint_max_bytes),
            ("partial_max_bytes", self.partial_max_bytes),
            ("event_max_bytes", self.event_max_bytes),
            ("dead_max_bytes", self.dead_max_bytes),
            ("media_max_bytes", self.media_max_bytes),
            ("bucket_max_bytes", self.bucket_max_bytes),
        ]
    }
}

/// What a hint adds to the chunk it copies must fit between the log's largest entry and the server's `max_payload`.
const HINT_ROOM: usize = 16 * 1024;
const DAY: Duration = Duration::from_secs(86_400);
const DEDUPLICATION: Duration = Duration::from_secs(120);

/// Every stream, buckets and the object store included. `max_payload` is the server's.
pub(super) fn wanted(subjects: &Subjects, config: &TopologyConfig, max_payload: usize) -> Vec<Config> {
    let base = |name: &str, wanted: Vec<String>, max_bytes: u64| Config {
        name: name.to_owned(),
        subjects: wanted,
        max_bytes: max_bytes as i64,
        max_messages: -1,
        max_messages_per_subject: -1,
        max_message_size: -1,
        max_consumers: config.max_consumers,
        num_replicas: config.replicas,
        duplicate_window: DEDUPLICATION,
        retention: RetentionPolicy::Limits,
        storage: StorageType::File,
        discard: DiscardPolicy::New,
        ..Config::default()
    };
    let work_queue = |config: Config| Config { retention: RetentionPolicy::WorkQueue, ..config };
    let aged = |max_age_s: u64, config: Config| {
        let max_age = Duration::from_secs(max_age_s);
        // The server wants it no longer than messages live.
        let duplicate_window = if max_age.is_zero() { DEDUPLICATION } else { DEDUPLICATION.min(max_age) };
        Config { max_age, duplicate_window, ..config }
    };
    let memory = |max_age_s: u64, config: Config| {
        aged(max_age_s, Config { storage: StorageType::Memory, discard: DiscardPolicy::Old, ..config })
    };
    let all = Filter::All;
    let transcript = vec![subjects.finals_of(&all), subjects.revisions_of(&all)];
    let mut streams = vec![
        aged(
            config.audio_max_age_s,
            Config {
                max_message_size: message_size(max_payload.saturating_sub(HINT_ROOM)),
                allow_direct: true,
                ..base(names::AUDIO, vec![subjects.audio_all()], config.audio_max_bytes)
            },
        ),
        memory(config.live_max_age_s, work_queue(base(names::LIVE, vec![subjects.live_all()], config.live_max_bytes))),
        aged(config.jobs_max_age_s, work_queue(base(names::JOBS, vec![subjects.jobs_all()], config.jobs_max_bytes))),
        work_queue(base(names::WORK, vec![subjects.work_all()], config.work_max_bytes)),
        aged(
            config.transcript_max_age_s,
            Config {
                max_message_size: message_size(MAX_FINAL_BYTES + HINT_ROOM),
                ..base(names::TRANSCRIPT, transcript, config.transcript_max_bytes)
            },
        ),
        aged(
            config.checkpoint_max_age_s,
            Config {
                max_messages_per_subject: 16,
                ..base(names::CHECKPOINT, vec![subjects.checkpoints_all()], config.checkpoint_max_bytes)
            },
        ),
        memory(
            config.partial_max_age_s,
            Config {
                max_messages_per_subject: 1,
                ..base(names::PARTIAL, vec![subjects.partials_of(&all)], config.partial_max_bytes)
            },
        ),
        aged(
            config.event_max_age_s,
            Config {
                discard: DiscardPolicy::Old,
                ..base(names::EVENT, vec![subjects.events_all()], config.event_max_bytes)
            },
        ),
        aged(config.dead_max_age_s, base(names::DEAD, vec![subjects.dead_all()], config.dead_max_bytes)),
        aged(
            config.media_max_age_s,
            Config {
                allow_rollup: true,
                allow_direct: true,
                ..base(
                    names::MEDIA,
                    vec!["$O.asr_media.C.>".to_owned(), "$O.asr_media.M.>".to_owned()],
                    config.media_max_bytes,
                )
            },
        ),
    ];
    streams.extend(Bucket::ALL.map(|bucket| Config {
        // What clients of buckets expect of one: the newest value of each key, deletable by marker only.
        max_messages_per_subject: 1,
        allow_rollup: true,
        allow_direct: true,
        deny_delete: true,
        ..base(bucket.stream(), vec![format!("$KV.{}.>", bucket.as_str())], config.bucket_max_bytes)
    }));
    streams
}

fn message_size(bytes: usize) -> i32 {
    i32::try_from(bytes).unwrap_or(i32::MAX)
}

/// One field that is not as it should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Difference {
    pub(super) field: &'static str,
    pub(super) wanted: String,
    pub(super) found: String,
    pub(super) mend: String,
}

/// A limit of a found stream that is higher than configured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Raised {
    pub stream: String,
    pub field: &'static str,
    pub configured: String,
    pub found: String,
}

/// Limits that somebody has raised by hand: nothing is lost by more room, and taking it away again would lose what is in it.
/// Audio is not kept longer than `finals_for`: it would outlive its finals and be decoded again.
pub(super) fn raised(wanted: &Config, found: &Config, finals_for: Duration) -> Vec<Raised> {
    let more = |wanted: i64, found: i64| wanted > 0 && (found <= 0 || found > wanted);
    let longer = !wanted.max_age.is_zero() && (found.max_age.is_zero() || found.max_age > wanted.max_age);
    let too_long = wanted.name == names::AUDIO && (found.max_age.is_zero() || found.max_age > finals_for);
    let fields = [
        ("max_age", longer && !too_long, seconds(wanted.max_age), seconds(found.max_age)),
        ("max_bytes", more(wanted.max_bytes, found.max_bytes), unlimited(wanted.max_bytes), unlimited(found.max_bytes)),
        (
            "max_consumers",
            more(wanted.max_consumers.into(), found.max_consumers.into()),
            unlimited(wanted.max_consumers.into()),
            unlimited(found.max_consumers.into()),
        ),
        (
            "num_replicas",
            found.num_replicas > wanted.num_replicas,
            wanted.num_replicas.to_string(),
            found.num_replicas.to_string(),
        ),
    ];
    let raised = |(field, is, configured, found): (&'static str, bool, String, String)| {
        is.then(|| Raised { stream: wanted.name.clone(), field, configured, found })
    };
    fields.into_iter().filter_map(raised).collect()
}

/// The found stream with the replicas that are wanted, where it has fewer and differs in nothing else.
pub(super) fn grown(wanted: &Config, found: &Config, finals_for: Duration) -> Option<Config> {
    let grown = Config { num_replicas: wanted.num_replicas, ..found.clone() };
    (found.num_replicas < wanted.num_replicas && difference(wanted, &grown, finals_for).is_none()).then_some(grown)
}

fn unlimited(n: i64) -> String {
    if n <= 0 { "unlimited".to_owned() } else { n.to_string() }
}

fn seconds(time: Duration) -> String {
    if time.is_zero() { "unlimited".to_owned() } else { format!("{}s", time.as_secs()) }
}

/// The first field in which a found stream differs, those first that tell a stranger's stream from ours; not one that is
/// only [`raised`].
pub(super) fn difference(wanted: &Config, found: &Config, finals_for: Duration) -> Option<Difference> {
    let raised = raised(wanted, found, finals_for);
    let set = |subjects: &[String]| subjects.iter().cloned().collect::<BTreeSet<_>>();
    let list = |subjects: &[String]| set(subjects).into_iter().collect::<Vec<_>>().join(",");
    let lower = |text: String| text.to_lowercase();
    // Name, wanted, found, and the flag of `nats stream edit` that mends it; the server cannot change those without one.
    let fields = [
        ("subjects", list(&wanted.subjects), list(&found.subjects), Some("--subjects")),
        ("retention", lower(format!("{:?}", wanted.retention)), lower(format!("{:?}", found.retention)), None),
        ("storage", lower(format!("{:?}", wanted.storage)), lower(format!("{:?}", found.storage)), None),
        ("discard", lower(format!("{:?}", wanted.discard)), lower(format!("{:?}", found.discard)), Some("--discard")),
        ("max_age", seconds(wanted.max_age), seconds(found.max_age), Some("--max-age")),
        ("max_bytes", unlimited(wanted.max_bytes), unlimited(found.max_bytes), Some("--max-bytes")),
        ("max_msgs", unlimited(wanted.max_messages), unlimited(found.max_messages), Some("--max-msgs")),
        (
            "max_msgs_per_subject",
            unlimited(wanted.max_messages_per_subject),
            unlimited(found.max_messages_per_subject),
            Some("--max-msgs-per-subject"),
        ),
        (
            "max_msg_size",
            unlimited(wanted.max_message_size.into()),
            unlimited(found.max_message_size.into()),
            Some("--max-msg-size"),
        ),
        ("max_consumers", unlimited(wanted.max_consumers.into()), unlimited(found.max_consumers.into()), None),
        ("num_replicas", wanted.num_replicas.to_string(), found.num_replicas.to_string(), Some("--replicas")),
        ("duplicate_window", seconds(wanted.duplicate_window), seconds(found.duplicate_window), Some("--dupe-window")),
        ("allow_direct", wanted.allow_direct.to_string(), found.allow_direct.to_string(), Some("--allow-direct")),
        ("allow_rollup_hdrs", wanted.allow_rollup.to_string(), found.allow_rollup.to_string(), None),
        ("deny_delete", wanted.deny_delete.to_string(), found.deny_delete.to_string(), None),
        ("deny_purge", wanted.deny_purge.to_string(), found.deny_purge.to_string(), None),
        ("sealed", wanted.sealed.to_string(), found.sealed.to_string(), None),
        ("no_ack", wanted.no_ack.to_string(), found.no_ack.to_string(), None),
        ("mirror", wanted.mirror.is_some().to_string(), found.mirror.is_some().to_string(), None),
        (
            "subject_transform",
            wanted.subject_transform.is_some().to_string(),
            found.subject_transform.is_some().to_string(),
            None,
        ),
    ];
    // Direct get that nobody asked for hurts nobody, and servers switch it on by themselves.
    let differs = |(name, wanted, found, _): &&(&str, String, String, Option<&str>)| {
        let fine = (*name == "allow_direct" && wanted == "false") || raised.iter().any(|r| r.field == *name);
        wanted != found && !fine
    };
    fields.iter().find(differs).map(|(field, want, is, flag)| Difference {
        field,
        wanted: want.clone(),
        found: is.clone(),
        mend: match flag {
            Some(flag) => {
                let value = if want == "unlimited" { "-1" } else { want };
                format!("if the stream is voxfleet's, run: nats stream edit {} {flag}={value}", wanted.name)
            }
            None => format!(
                "the server cannot change that: move what it holds away, then run: nats stream rm {} (its messages are lost) and start again",
                wanted.name
            ),
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn streams() -> Vec<Config> {
        wanted(&Subjects::new("asr.v1"), &TopologyConfig::default(), 4 * 1024 * 1024)
    }

    #[test]
    fn what_is_reserved_is_what_the_streams_ask_for() {
        let sum = |storage: StorageType| -> u64 {
            streams().iter().filter(|s| s.storage == storage).map(|s| s.max_bytes as u64).sum()
        };
        let reserved = TopologyConfig::default().reserved();
        assert_eq!(reserved, (sum(StorageType::Memory), sum(StorageType::File)));
    }

    #[test]
    fn the_default_has_no_problems_and_mistakes_are_named_together() {
        assert_eq!(TopologyConfig::default().problems(), Vec::<String>::new());
        let config = TopologyConfig {
            replicas: 2,
            audio_max_bytes: 0,
            transcript_max_age_s: 60,
            max_consumers: 0,
            ..TopologyConfig::default()
        };
        let problems = config.problems();
        for name in ["replicas", "audio_max_bytes", "transcript_max_age_s", "max_consumers"] {
            assert!(problems.iter().any(|p| p.contains(name)), "{name} is missing in {problems:?}");
        }
        assert_eq!(problems.len(), 4);
    }

    #[test]
    fn how_long_things_are_kept_is_checked_together() {
        type Change = fn(&mut TopologyConfig);
        let cases: [(Change, Option<&str>); 11] = [
            (|c| c.checkpoint_max_age_s = 86_399, Some("checkpoint_max_age_s: below transcript_max_age_s")),
            (|c| (c.transcript_max_age_s, c.checkpoint_max_age_s) = (604_800, 604_800), None),
            (|c| (c.audio_max_age_s, c.transcript_max_age_s, c.checkpoint_max_age_s) = (10, 10, 10), None),
            (|c| c.audio_max_age_s = 0, Some("audio_max_age_s: 0 is outside 10 s to one year")),
            (|c| c.live_max_age_s = 5, Some("live_max_age_s")),
            (|c| c.partial_max_age_s = 0, Some("partial_max_age_s")),
            (|c| c.event_max_age_s = 31_536_001, Some("event_max_age_s")),
            (|c| (c.jobs_max_age_s, c.dead_max_age_s, c.media_max_age_s) = (3_600, 604_800, 86_400), None),
            (|c| c.dead_max_age_s = 9, Some("dead_max_age_s: 9 is outside 10 s to one year, or 0 for no limit")),
            (|c| c.jobs_max_age_s = 1, Some("jobs_max_age_s")),
            (|c| c.media_max_age_s = 3_600, Some("media_max_age_s: 3600 is below a day")),
        ];
        for (change, problem) in cases {
            let mut config = TopologyConfig::default();
            change(&mut config);
            let problems = config.problems();
            match problem {
                None => assert_eq!(problems, Vec::<String>::new()),
                Some(want) => assert!(problems.len() == 1 && problems[0].contains(want), "{want}: {problems:?}"),
            }
        }
    }

    #[test]
    fn every_age_reaches_its_stream() {
        let config = TopologyConfig {
            audio_max_age_s: 11,
            live_max_age_s: 12,
            jobs_max_age_s: 13,
            transcript_max_age_s: 14,
            checkpoint_max_age_s: 15,
            partial_max_age_s: 16,
            event_max_age_s: 17,
            dead_max_age_s: 18,
            media_max_age_s: 100_000,
            ..TopologyConfig::default()
        };
        let found = wanted(&Subjects::new("asr.v1"), &config, 4 * 1024 * 1024);
        let ages = |name: &str| found.iter().find(|s| s.name == name).map(|s| s.max_age.as_secs());
        for (name, age) in [
            (names::AUDIO, 11),
            (names::LIVE, 12),
            (names::JOBS, 13),
            (names::WORK, 0),
            (names::TRANSCRIPT, 14),
            (names::CHECKPOINT, 15),
            (names::PARTIAL, 16),
            (names::EVENT, 17),
            (names::DEAD, 18),
            (names::MEDIA, 100_000),
            ("KV_asr_sessions", 0),
        ] {
            assert_eq!(ages(name), Some(age), "{name}");
        }
        assert!(found.iter().all(|s| s.max_age.is_zero() || s.duplicate_window <= s.max_age));
    }

    #[test]
    fn every_stream_is_bounded_and_every_file_stream_but_events_refuses_when_full() {
        let streams = streams();
        assert_eq!(streams.len(), 9 + 1 + 4);
        for stream in &streams {
            assert!(stream.max_bytes > 0 && stream.max_consumers > 0, "{}", stream.name);
            let old = stream.storage == StorageType::Memory || stream.name == names::EVENT;
            assert_eq!(stream.discard == DiscardPolicy::Old, old, "{}", stream.name);
            assert!(stream.max_age.is_zero() || stream.duplicate_window <= stream.max_age, "{}", stream.name);
        }
    }

    #[test]
    fn a_logged_chunk_can_always_be_passed_on() {
        let audio = &streams()[0];
        assert_eq!(audio.max_message_size, 4 * 1024 * 1024 - 16 * 1024);
        assert!(audio.allow_direct);
    }

    #[test]
    fn differences_name_field_and_mend() {
        let audio = streams().remove(0);
        assert_eq!(difference(&audio, &audio, DAY), None);
        // What the server writes for "no limit".
        assert_eq!(difference(&audio, &Config { max_messages: 0, ..audio.clone() }, DAY), None);
        let cases: [(Config, &str, &str); 5] = [
            (Config { subjects: vec!["x.>".into()], ..audio.clone() }, "subjects", "--subjects=asr.v1.audio.*"),
            (Config { retention: RetentionPolicy::WorkQueue, ..audio.clone() }, "retention", "stream rm"),
            (Config { max_bytes: 1, ..audio.clone() }, "max_bytes", "--max-bytes=4294967296"),
            (Config { allow_direct: false, ..audio.clone() }, "allow_direct", "--allow-direct=true"),
            (Config { max_age: Duration::ZERO, ..audio.clone() }, "max_age", "--max-age=3600s"),
        ];
        for (found, field, mend) in cases {
            let difference = difference(&audio, &found, DAY).expect(field);
            assert_eq!(difference.field, field);
            assert!(difference.mend.contains(mend), "{}", difference.mend);
        }
    }

    #[test]
    fn direct_get_that_nobody_asked_for_is_no_difference() {
        let dead = streams().into_iter().find(|s| s.name == names::DEAD).expect("stream");
        assert_eq!(difference(&dead, &Config { allow_direct: true, ..dead.clone() }, DAY), None);
    }

    #[test]
    fn replicas_grow_where_nothing_else_differs_and_more_of_them_stay() {
        let one = streams().remove(0);
        let three = Config { num_replicas: 3, ..one.clone() };
        assert_eq!(grown(&three, &one, DAY).expect("ours"), three);
        assert_eq!((grown(&three, &three, DAY), grown(&one, &three, DAY)), (None, None));
        // A limit raised by hand stays as it is, and a stranger's stream is left alone.
        let wide = Config { max_bytes: one.max_bytes + 1, ..one.clone() };
        let wide_three = Config { num_replicas: 3, ..wide.clone() };
        assert_eq!(grown(&three, &wide, DAY), Some(wide_three));
        assert_eq!(grown(&three, &Config { deny_purge: true, ..one.clone() }, DAY), None);
        assert_eq!(difference(&three, &one, DAY).expect("too few").field, "num_replicas");
        assert_eq!(difference(&one, &three, DAY), None);
        let kept = raised(&one, &three, DAY).remove(0);
        assert_eq!((kept.field, kept.configured.as_str(), kept.found.as_str()), ("num_replicas", "1", "3"));
    }

    #[test]
    fn more_room_given_by_hand_is_no_difference() {
        let audio = streams().remove(0);
        let fields = |found: &Config| raised(&audio, found, DAY).into_iter().map(|r| r.field).collect::<Vec<_>>();
        let wide = Config { max_bytes: audio.max_bytes + 1, max_age: DAY, ..audio.clone() };
        assert_eq!((difference(&audio, &wide, DAY), fields(&wide)), (None, vec!["max_age", "max_bytes"]));
        let unbounded = Config { max_bytes: -1, max_consumers: -1, ..audio.clone() };
        assert_eq!(difference(&audio, &unbounded, DAY), None);
        assert_eq!(raised(&audio, &unbounded, DAY)[0].found, "unlimited");
        let outlives = Config { max_age: DAY + Duration::from_secs(1), ..audio.clone() };
        assert_eq!(difference(&audio, &outlives, DAY).expect("finals would be gone").field, "max_age");
        let both = Config { retention: RetentionPolicy::WorkQueue, ..wide };
        assert_eq!(difference(&audio, &both, DAY).expect("not ours").field, "retention");
        assert_eq!(fields(&Config { max_bytes: 1, ..audio.clone() }), [""; 0]);
        let finals = streams().into_iter().find(|s| s.name == names::TRANSCRIPT).expect("stream");
        assert_eq!(difference(&finals, &Config { max_age: Duration::ZERO, ..finals.clone() }, DAY), None);
    }
}
