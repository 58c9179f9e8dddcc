//! Who may do what: the five roles of an account, and the permission lists that a server holds each to.
//!
//! A list names exactly the subjects that the code of its role uses, built from [`Subjects`], so that a renamed subject
//! changes both. What NATS cannot tell apart by subject is not in its reach: an answer goes to whatever reply subject its
//! asker names, a message of an object store can be rolled up by whoever may write there, and names that change with each
//! incarnation are wildcards. Roles guard against mistakes and against a key in the wrong hands; the border between people
//! who do not trust each other is the account.
//!
//! [`conf`] writes server files from these lists, [`keys`] makes the keys.

pub mod conf;
pub mod keys;

use std::fmt;

use crate::{
    kv::Bucket,
    subjects::{Endpoint, Filter, Subjects},
    topology::names::{AUDIO, CHECKPOINT, DEAD, EVENT, JOBS, LIVE, MEDIA, PARTIAL, TRANSCRIPT, WORK},
};

/// One kind of user of an account.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    Dispatcher,
    Worker,
    Producer,
    Viewer,
    Operator,
}

impl Role {
    pub const ALL: [Role; 5] = [Role::Dispatcher, Role::Worker, Role::Producer, Role::Viewer, Role::Operator];

    pub fn as_str(self) -> &'static str {
        match self {
            Role::Dispatcher => "dispatcher",
            Role::Worker => "worker",
            Role::Producer => "producer",
            Role::Viewer => "viewer",
            Role::Operator => "operator",
        }
    }

    /// For people who read a server's configuration.
    pub fn purpose(self) -> &'static str {
        match self {
            Role::Dispatcher => "makes streams and consumers, routes, answers the API",
            Role::Worker => "takes what is given to it, reads audio, writes transcripts",
            Role::Producer => "sends audio and recordings, reads transcripts and results",
            Role::Viewer => "reads transcripts, events and the fleet's status",
            Role::Operator => "drains, looks into everything, changes and empties streams, sends dead letters again",
        }
    }

    /// What `nats.inbox_prefix` must be for this role.
    pub fn inbox_prefix(self) -> String {
        format!("_INBOX_{}", self.as_str())
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What a server lets a user do; subjects may hold wildcards.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grants {
    pub publish: Vec<String>,
    pub subscribe: Vec<String>,
    /// May answer what it is asked, once each time.
    pub answers: bool,
}

/// What `role` may do where subjects begin with `prefix` (`nats.prefix`).
pub fn grants(role: Role, prefix: &str) -> Grants {
    let subjects = Subjects::new(prefix);
    let inbox = format!("{}.>", role.inbox_prefix());
    let (mut publish, mut subscribe, answers) = match role {
        Role::Dispatcher => dispatcher(&subjects),
        Role::Worker => worker(&subjects),
        Role::Producer => producer(&subjects),
        Role::Viewer => viewer(&subjects),
        Role::Operator => operator(&subjects),
    };
    // A round trip to the server is a request to oneself.
    publish.push(inbox.clone());
    subscribe.push(inbox);
    Grants { publish, subscribe, answers }
}

type Lists = (Vec<String>, Vec<String>, bool);

fn dispatcher(subjects: &Subjects) -> Lists {
    let p = subjects.prefix();
    let mut publish = vec![api("INFO"), api("STREAM.NAMES")];
    for stream in ALL_STREAMS {
        publish.push(api(&format!("STREAM.CREATE.{stream}")));
        // To more replicas, when the configuration says so.
        publish.push(api(&format!("STREAM.UPDATE.{stream}")));
        if ![TRANSCRIPT, PARTIAL, EVENT].contains(&stream) {
            publish.push(api(&format!("STREAM.INFO.{stream}")));
        }
    }
    let buckets = Bucket::ALL.map(Bucket::stream);
    for stream in [AUDIO, JOBS, WORK, DEAD, MEDIA].into_iter().chain(buckets) {
        publish.push(leader_get(stream));
    }
    for stream in [LIVE, WORK, MEDIA].into_iter().chain(buckets) {
        publish.push(api(&format!("STREAM.PURGE.{stream}")));
    }
    // By its number: a submitted job that no connection survives, a letter whose job was sent again.
    publish.extend([JOBS, DEAD].map(|stream| api(&format!("STREAM.MSG.DELETE.{stream}"))));
    // Its pages show what a viewer sees, and ask whichever dispatcher is active.
    publish.extend(reads_of_transcripts(subjects));
    publish.extend(Endpoint::ALL.map(|endpoint| subjects.api(endpoint)));
    publish.push(direct_get(AUDIO));
    publish.extend(feed(AUDIO, &subjects.audio_log()));
    publish.extend(media_feeds());
    for bucket in Bucket::ALL {
        publish.extend(feed(bucket.stream(), &bucket_subjects(bucket)));
        publish.push(bucket_subjects(bucket));
    }
    for (stream, filter) in [(LIVE, subjects.live_all()), (WORK, subjects.work_all())] {
        publish.push(api(&format!("CONSUMER.CREATE.{stream}.*.{filter}")));
        publish.push(api(&format!("CONSUMER.DELETE.{stream}.*")));
        publish.push(api(&format!("CONSUMER.NAMES.{stream}")));
    }
    let intake = crate::jobs::INTAKE;
    publish.push(api(&format!("CONSUMER.CREATE.{JOBS}.{intake}")));
    publish.push(api(&format!("CONSUMER.MSG.NEXT.{JOBS}.{intake}")));
    publish.extend(acks(JOBS, intake));
    publish.extend(media_writes());
    publish.extend([
        subjects.audio_all(),
        subjects.live_all(),
        subjects.work_all(),
        // The end of what no worker can end.
        subjects.finals_of(&Filter::All),
        subjects.revisions_of(&Filter::All),
        subjects.events_all(),
        subjects.dead_all(),
        controls(p),
    ]);
    let mut subscribe = vec![subjects.heartbeats_all()];
    subscribe.extend(Endpoint::ALL.map(|endpoint| subjects.api(endpoint)));
    let service = crate::api::SERVICE;
    subscribe.extend(["$SRV.*".to_owned(), format!("$SRV.*.{service}"), format!("$SRV.*.{service}.*")]);
    (publish, subscribe, true)
}

fn worker(subjects: &Subjects) -> Lists {
    let p = subjects.prefix();
    let mut publish = Vec::new();
    for stream in [LIVE, WORK] {
        publish.push(api(&format!("CONSUMER.MSG.NEXT.{stream}.*")));
        publish.extend(acks(stream, "*"));
    }
    publish.push(direct_get(AUDIO));
    // The second to see whether JetStream answers at all.
    publish.extend([AUDIO, TRANSCRIPT].map(|stream| api(&format!("STREAM.INFO.{stream}"))));
    for stream in [AUDIO, TRANSCRIPT, CHECKPOINT, MEDIA] {
        publish.push(leader_get(stream));
    }
    publish.extend(media_feeds());
    publish.extend(media_writes());
    publish.extend([
        subjects.finals_of(&Filter::All),
        subjects.revisions_of(&Filter::All),
        subjects.partials_of(&Filter::All),
        subjects.checkpoints_all(),
        subjects.events_all(),
        subjects.dead_all(),
        // The parts of a long recording are jobs of their own.
        subjects.jobs_all(),
        subjects.heartbeats_all(),
    ]);
    (publish, vec![subjects.heartbeats_all(), controls(p)], true)
}

fn producer(subjects: &Subjects) -> Lists {
    let mut publish = vec![subjects.audio_all(), subjects.jobs_all()];
    publish.extend(Endpoint::ALL.into_iter().filter(|e| *e != Endpoint::FleetDrain).map(|e| subjects.api(e)));
    publish.extend(media_writes());
    publish.push(leader_get(MEDIA));
    publish.push(api(&format!("STREAM.INFO.{MEDIA}")));
    publish.extend(media_feeds());
    publish.extend(reads_of_transcripts(subjects));
    (publish, heard_transcripts(subjects), false)
}

fn viewer(subjects: &Subjects) -> Lists {
    // Not `job.status`: it shows where a recording lies, and such an address may be its own key.
    let mut publish =
        [Endpoint::SessionStatus, Endpoint::SessionList, Endpoint::FleetStatus].map(|e| subjects.api(e)).to_vec();
    publish.extend(reads_of_transcripts(subjects));
    let mut subscribe = heard_transcripts(subjects);
    subscribe.push(subjects.heartbeats_all());
    (publish, subscribe, false)
}

fn operator(subjects: &Subjects) -> Lists {
    let p = subjects.prefix();
    let mut publish = vec![
        api(">"),
        // Backup and restore of streams.
        "$JS.SNAPSHOT.>".to_owned(),
        // Who serves the API.
        "$SRV.>".to_owned(),
        format!("{p}.api.>"),
        controls(p),
        subjects.jobs_all(),
    ];
    publish.extend(media_writes());
    publish.extend(Bucket::ALL.map(bucket_subjects));
    (publish, vec![format!("{p}.>"), "$JS.EVENT.>".to_owned()], false)
}

/// Every stream, those of buckets and the object store included.
const ALL_STREAMS: [&str; 14] = [
    AUDIO,
    LIVE,
    JOBS,
    WORK,
    TRANSCRIPT,
    CHECKPOINT,
    PARTIAL,
    EVENT,
    DEAD,
    MEDIA,
    Bucket::Sessions.stream(),
    Bucket::Jobs.stream(),
    Bucket::Fleet.stream(),
    Bucket::Control.stream(),
];

fn api(request: &str) -> String {
    format!("$JS.API.{request}")
}

fn leader_get(stream: &str) -> String {
    api(&format!("STREAM.MSG.GET.{stream}"))
}

fn direct_get(stream: &str) -> String {
    api(&format!("DIRECT.GET.{stream}"))
}

/// What a [`crate::feed::Feed`] asks: the subject of its request names its filter, and the server holds it to that.
fn feed(stream: &str, filter: &str) -> [String; 2] {
    [api(&format!("CONSUMER.CREATE.{stream}.*.{filter}")), api(&format!("CONSUMER.MSG.NEXT.{stream}.*"))]
}

/// Both forms that a reply subject may have.
fn acks(stream: &str, consumer: &str) -> [String; 2] {
    [format!("$JS.ACK.{stream}.{consumer}.>"), format!("$JS.ACK.*.*.{stream}.{consumer}.>")]
}

fn media_feeds() -> [String; 2] {
    feed(MEDIA, "$O.asr_media.>")
}

fn media_writes() -> [String; 2] {
    ["$O.asr_media.C.*".to_owned(), "$O.asr_media.M.*".to_owned()]
}

fn bucket_subjects(bucket: Bucket) -> String {
    format!("$KV.{}.>", bucket.as_str())
}

fn controls(prefix: &str) -> String {
    format!("{prefix}.control.*.*")
}

/// Finals, revisions, partials and events, with where their streams end.
fn reads_of_transcripts(subjects: &Subjects) -> Vec<String> {
    let p = subjects.prefix();
    let mut requests = Vec::new();
    for (stream, filter) in [(TRANSCRIPT, "transcript"), (PARTIAL, "transcript"), (EVENT, "event")] {
        requests.extend(feed(stream, &format!("{p}.{filter}.>")));
        requests.push(api(&format!("STREAM.INFO.{stream}")));
        requests.push(leader_get(stream));
    }
    requests
}

fn heard_transcripts(subjects: &Subjects) -> Vec<String> {
    ["transcript", "event"].map(|what| format!("{}.{what}.>", subjects.prefix())).to_vec()
}

#[cfg(test)]
mod tests;
