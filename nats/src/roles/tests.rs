use voxfleet_schema::{
    event::Scope,
    id::{GpuId, Incarnation, Kind, StreamId, WorkerName},
    session::Priority,
};

use super::*;
use crate::subjects::Subject;

/// As the server matches a subject against a permission: `*` stands for one token, `>` for all that follow.
fn matches(pattern: &str, subject: &str) -> bool {
    let (mut wanted, mut tokens) = (pattern.split('.'), subject.split('.'));
    loop {
        match (wanted.next(), tokens.next()) {
            (Some(">"), Some(_)) => return true,
            (Some("*"), Some(_)) => {}
            (Some(want), Some(token)) if want == token => {}
            (None, None) => return true,
            _ => return false,
        }
    }
}

fn may_publish(role: Role, prefix: &str, subject: &str) -> bool {
    grants(role, prefix).publish.iter().any(|pattern| matches(pattern, subject))
}

fn may_hear(role: Role, prefix: &str, subject: &str) -> bool {
    grants(role, prefix).subscribe.iter().any(|pattern| matches(pattern, subject))
}

fn id(text: &str) -> StreamId {
    StreamId::new(text).expect("id")
}

fn gpu() -> WorkerName {
    WorkerName { gpu_id: GpuId::new("g1").expect("id"), incarnation: Incarnation::new("i1").expect("id") }
}

/// One of every kind of subject.
fn every_subject() -> Vec<Subject> {
    let worker = gpu();
    let mut all = vec![
        Subject::Audio(id("s")),
        Subject::Live { worker: worker.clone(), id: id("s") },
        Subject::WorkItem { worker: worker.clone(), job: id("j") },
        Subject::Job { priority: Priority::High, id: id("j") },
        Subject::Heartbeat(worker.gpu_id.clone()),
        Subject::Control(worker),
        Subject::Event { scope: Scope::Fleet.as_str().into(), id: "g1".into(), what: "joined".into() },
    ];
    for kind in [Kind::Session, Kind::Job] {
        all.push(Subject::Final { kind, id: id("x") });
        all.push(Subject::Revision { kind, id: id("x") });
        all.push(Subject::Partial { kind, id: id("x") });
        all.push(Subject::Checkpoint { kind, id: id("x") });
        all.push(Subject::Dead { kind, id: id("x") });
    }
    all.extend(Endpoint::ALL.map(Subject::Api));
    all
}

/// Who publishes there. No wildcard: a new kind of subject needs its line here.
fn publishers(subject: &Subject) -> &'static [Role] {
    use Role::*;
    match subject {
        Subject::Audio(_) => &[Dispatcher, Producer],
        Subject::Live { .. } | Subject::WorkItem { .. } => &[Dispatcher],
        Subject::Job { .. } => &[Worker, Producer, Operator],
        Subject::Final { .. } | Subject::Revision { .. } => &[Dispatcher, Worker],
        Subject::Partial { .. } | Subject::Checkpoint { .. } | Subject::Heartbeat(_) => &[Worker],
        Subject::Event { .. } | Subject::Dead { .. } => &[Dispatcher, Worker],
        Subject::Control(_) => &[Dispatcher, Operator],
        Subject::Api(Endpoint::SessionStatus | Endpoint::SessionList | Endpoint::FleetStatus) => {
            &[Dispatcher, Producer, Viewer, Operator]
        }
        Subject::Api(Endpoint::FleetDrain) => &[Dispatcher, Operator],
        Subject::Api(_) => &[Dispatcher, Producer, Operator],
    }
}

/// Who subscribes to it, or to many like it.
fn listeners(subject: &Subject) -> &'static [Role] {
    use Role::*;
    match subject {
        Subject::Heartbeat(_) => &[Dispatcher, Worker, Viewer, Operator],
        Subject::Control(_) => &[Worker, Operator],
        Subject::Api(_) => &[Dispatcher, Operator],
        Subject::Final { .. } | Subject::Revision { .. } | Subject::Partial { .. } | Subject::Event { .. } => {
            &[Producer, Viewer, Operator]
        }
        _ => &[Operator],
    }
}

#[test]
fn each_subject_is_for_those_who_need_it_and_for_nobody_else() {
    for prefix in ["asr.v1", "tenant-7.asr.v1", "x"] {
        let subjects = Subjects::new(prefix);
        for subject in every_subject() {
            let text = subjects.build(&subject);
            for role in Role::ALL {
                let (publishes, hears) = (publishers(&subject).contains(&role), listeners(&subject).contains(&role));
                assert_eq!(may_publish(role, prefix, &text), publishes, "{role} publishes to {text}");
                assert_eq!(may_hear(role, prefix, &text), hears, "{role} hears {text}");
                // Another prefix is another fleet's.
                let other = format!("other.{text}");
                assert!(!may_publish(role, prefix, &other) && !may_hear(role, prefix, &other), "{role}: {other}");
            }
        }
    }
}

#[test]
fn requests_of_jetstream_are_for_those_who_need_them() {
    use Role::*;
    let readers: &[Role] = &[Dispatcher, Producer, Viewer, Operator];
    let rows: &[(&str, &[Role])] = &[
        ("INFO", &[Dispatcher, Operator]),
        ("STREAM.LIST", &[Operator]),
        ("STREAM.CREATE.ASR_AUDIO", &[Dispatcher, Operator]),
        ("STREAM.CREATE.OTHER", &[Operator]),
        ("STREAM.UPDATE.ASR_AUDIO", &[Dispatcher, Operator]),
        ("STREAM.DELETE.ASR_AUDIO", &[Operator]),
        ("STREAM.DELETE.KV_asr_jobs", &[Operator]),
        ("STREAM.PURGE.ASR_AUDIO", &[Operator]),
        ("STREAM.PURGE.ASR_TRANSCRIPT", &[Operator]),
        ("STREAM.PURGE.ASR_WORK", &[Dispatcher, Operator]),
        ("STREAM.PURGE.OBJ_asr_media", &[Dispatcher, Operator]),
        ("STREAM.MSG.DELETE.ASR_TRANSCRIPT", &[Operator]),
        ("STREAM.MSG.DELETE.ASR_DEAD", &[Dispatcher, Operator]),
        ("STREAM.INFO.ASR_AUDIO", &[Dispatcher, Worker, Operator]),
        ("STREAM.MSG.GET.ASR_AUDIO", &[Dispatcher, Worker, Operator]),
        ("DIRECT.GET.ASR_AUDIO", &[Dispatcher, Worker, Operator]),
        ("DIRECT.GET.ASR_AUDIO.asr.v1.audio.s", &[Operator]),
        // Voice prints.
        ("STREAM.MSG.GET.ASR_CHECKPOINT", &[Worker, Operator]),
        ("CONSUMER.CREATE.ASR_CHECKPOINT.c.asr.v1.checkpoint.>", &[Operator]),
        ("STREAM.MSG.GET.ASR_TRANSCRIPT", &[Dispatcher, Worker, Producer, Viewer, Operator]),
        ("STREAM.MSG.GET.ASR_EVENT", readers),
        ("STREAM.MSG.GET.ASR_DEAD", &[Dispatcher, Operator]),
        ("STREAM.MSG.GET.KV_asr_jobs", &[Dispatcher, Operator]),
        ("STREAM.MSG.GET.OBJ_asr_media", &[Dispatcher, Worker, Producer, Operator]),
        ("CONSUMER.CREATE.ASR_AUDIO.c.asr.v1.audio.>", &[Dispatcher, Operator]),
        ("CONSUMER.CREATE.ASR_EVENT.c.asr.v1.event.session.s.*", readers),
        ("CONSUMER.CREATE.ASR_PARTIAL.c.asr.v1.transcript.*.*.partial", readers),
        ("CONSUMER.CREATE.ASR_TRANSCRIPT.c.asr.v1.transcript.*.*.*", readers),
        // Without its filter in the subject the server could not hold anybody to it.
        ("CONSUMER.CREATE.ASR_TRANSCRIPT.c", &[Operator]),
        ("CONSUMER.DURABLE.CREATE.ASR_TRANSCRIPT.c", &[Operator]),
        ("CONSUMER.CREATE.ASR_WORK.c.asr.v1.gpu.g.i.job.*", &[Dispatcher, Operator]),
        ("CONSUMER.DELETE.ASR_WORK.c", &[Dispatcher, Operator]),
        ("CONSUMER.DELETE.ASR_TRANSCRIPT.c", &[Operator]),
        ("CONSUMER.MSG.NEXT.ASR_WORK.c", &[Worker, Operator]),
        ("CONSUMER.MSG.NEXT.ASR_JOBS.dispatcher", &[Dispatcher, Operator]),
        ("CONSUMER.LEADER.STEPDOWN.ASR_AUDIO.c", &[Operator]),
        ("META.LEADER.STEPDOWN", &[Operator]),
        ("ACCOUNT.PURGE.A", &[Operator]),
    ];
    for (request, who) in rows {
        for role in Role::ALL {
            let may = may_publish(role, "asr.v1", &format!("$JS.API.{request}"));
            assert_eq!(may, who.contains(&role), "{role}: {request}");
        }
    }
}

#[test]
fn buckets_objects_and_acks_are_for_those_who_need_them() {
    use Role::*;
    let rows: &[(&str, &[Role])] = &[
        ("$KV.asr_sessions.s", &[Dispatcher, Operator]),
        ("$KV.asr_control.lease", &[Dispatcher, Operator]),
        ("$KV.other.k", &[]),
        ("$O.asr_media.C.n", &[Dispatcher, Worker, Producer, Operator]),
        ("$O.asr_media.M.a2V5", &[Dispatcher, Worker, Producer, Operator]),
        ("$O.other.M.a2V5", &[]),
        ("$JS.ACK.ASR_LIVE.g=i.1.2.3.4.5", &[Worker]),
        ("$JS.ACK.hub.HASH.ASR_WORK.g=i.1.2.3.4.5.t", &[Worker]),
        ("$JS.ACK.ASR_JOBS.dispatcher.1.2.3.4.5", &[Dispatcher]),
        ("$JS.ACK.ASR_JOBS.other.1.2.3.4.5", &[]),
        ("$SRV.PING", &[Operator]),
        ("$SYS.REQ.SERVER.PING", &[]),
        ("_INBOX.x", &[]),
    ];
    for (subject, who) in rows {
        for role in Role::ALL {
            assert_eq!(may_publish(role, "asr.v1", subject), who.contains(&role), "{role}: {subject}");
        }
    }
}

#[test]
fn nobody_hears_anothers_inbox_and_wide_patterns_are_the_operators_alone() {
    for role in Role::ALL {
        let publish = grants(role, "asr.v1").publish;
        let different: std::collections::HashSet<&String> = publish.iter().collect();
        assert_eq!(different.len(), publish.len(), "{role}: something stands twice in {publish:?}");
        let own = format!("{}.n.1", role.inbox_prefix());
        for other in Role::ALL {
            let hears = may_hear(other, "asr.v1", &own);
            assert_eq!(hears, other == role, "{other} hears {own}");
        }
        let lists = grants(role, "asr.v1");
        for pattern in lists.publish.iter().chain(&lists.subscribe) {
            assert!(
                !matches!(pattern.as_str(), ">" | "*" | "$JS.>" | "$KV.>" | "$O.>" | "$SYS.>"),
                "{role}: {pattern}"
            );
            assert!(role == Role::Operator || pattern != "$JS.API.>", "{role}: {pattern}");
        }
        assert_eq!(lists.answers, matches!(role, Role::Dispatcher | Role::Worker), "{role}");
    }
}

#[test]
fn a_pattern_matches_as_the_server_does() {
    for (pattern, subject, want) in [
        ("a.*.c", "a.b.c", true),
        ("a.*.c", "a.b.c.d", false),
        ("a.>", "a", false),
        ("a.>", "a.b.c", true),
        ("a.*", "a.>", true),
        ("a", "a.b", false),
    ] {
        assert_eq!(matches(pattern, subject), want, "{pattern} {subject}");
    }
}
