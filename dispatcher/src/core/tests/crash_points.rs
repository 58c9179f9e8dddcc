//! Each state in which a dispatcher that was killed may leave a session: its successor brings it to its end.

use super::{
    servers::{Played, Site},
    *,
};

/// What the dead one left: the key, which workers hold it at which epoch, and the finals.
struct Left {
    name: &'static str,
    state: SessionState,
    epoch: u64,
    /// Index of its worker.
    owner: Option<usize>,
    held: &'static [(usize, u64)],
    /// The worker that drains.
    drains: Option<usize>,
    /// Of these epochs; the last may be an end.
    finals: &'static [(u64, bool)],
}

const FRESH: Left =
    Left { name: "", state: SessionState::Assigned, epoch: 1, owner: Some(0), held: &[], drains: None, finals: &[] };

fn table() -> Vec<Left> {
    use SessionState::Waiting;
    vec![
        Left { name: "open: audio in the log, no key", epoch: 0, ..FRESH },
        Left { name: "open: key written, worker not asked", ..FRESH },
        Left { name: "open: waiting, nobody had room", state: Waiting, owner: None, epoch: 0, ..FRESH },
        Left { name: "assign: asked, answer not heard", held: &[(0, 1)], ..FRESH },
        Left { name: "assign: refused, key not changed", state: Waiting, owner: None, ..FRESH },
        Left { name: "move: key written, old still holds", epoch: 2, owner: Some(1), held: &[(0, 1)], ..FRESH },
        Left { name: "move: both hold", epoch: 2, owner: Some(1), held: &[(0, 1), (1, 2)], ..FRESH },
        Left {
            name: "move: old one stored a final behind the key",
            epoch: 2,
            owner: Some(1),
            held: &[(0, 1)],
            finals: &[(1, false)],
            ..FRESH
        },
        Left { name: "move: found nobody", state: Waiting, epoch: 2, owner: None, held: &[(0, 1)], ..FRESH },
        Left { name: "drain: owner drains and holds", held: &[(0, 1)], drains: Some(0), ..FRESH },
        Left { name: "drain: owner drains and has let go", drains: Some(0), ..FRESH },
        Left {
            name: "drain: old one finishes, new one has it",
            epoch: 2,
            owner: Some(1),
            held: &[(0, 1), (1, 2)],
            drains: Some(0),
            ..FRESH
        },
        Left { name: "drain: found nobody", state: Waiting, owner: None, held: &[(0, 1)], drains: Some(0), ..FRESH },
        Left { name: "end: final stored, key not", held: &[(0, 1)], finals: &[(1, true)], ..FRESH },
        Left {
            name: "end: key written, not released",
            state: SessionState::Ended,
            held: &[(0, 1)],
            finals: &[(1, true)],
            ..FRESH
        },
        Left {
            name: "end: final of the old owner after a move",
            epoch: 2,
            owner: Some(1),
            held: &[(0, 1), (1, 2)],
            finals: &[(1, true)],
            ..FRESH
        },
        Left { name: "raise: the worker has a later epoch", held: &[(0, 4)], ..FRESH },
    ]
}

#[test]
fn every_state_a_killed_dispatcher_leaves_comes_to_its_end() {
    for left in table() {
        for dies in [None, Some(0), Some(1)] {
            for more_audio in [false, true] {
                let mut site = Site::new(3);
                let session = id("s");
                site.stored.append(&session, &[], b"ab");
                for (n, (epoch, end)) in left.finals.iter().enumerate() {
                    let to_seq = site.stored.append(&session, if *end { &[("Asr-End", "1")] } else { &[] }, b"");
                    let mut link = end_final("s", n as u64, *epoch, to_seq);
                    (link.end, link.resume.seq) = (*end, to_seq);
                    site.stored.chains.entry(session.clone()).or_default().push(link);
                }
                let ended = left.state == SessionState::Ended;
                if left.epoch > 0 || left.owner.is_none() {
                    let record = SessionRecord {
                        state: left.state,
                        epoch: left.epoch,
                        worker: left.owner.map(|n| site.name(n)),
                        ended_seq: ended.then_some(site.stored.log.len() as u64),
                        ..world_record("s")
                    };
                    site.stored.keys.insert(session.clone(), (record, 1));
                }
                for (n, epoch) in left.held {
                    site.workers[*n].held.insert(session.clone(), *epoch);
                }
                if let Some(n) = left.drains {
                    site.workers[n] = Played { draining: true, ..site.workers[n].clone() };
                }
                if more_audio {
                    site.stored.append(&session, &[], b"ab");
                }
                if let Some(n) = dies {
                    site.die(n);
                }
                site.succeed();
                let what = std::panic::AssertUnwindSafe(|| site.finish(|_| ()));
                let settled = std::panic::catch_unwind(what);
                assert!(settled.is_ok(), "{}, worker {dies:?} died, more audio: {more_audio}", left.name);
            }
        }
    }
}
