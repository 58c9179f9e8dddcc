//! Everything that can happen to sessions, in any order: it settles all the same.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::{servers::Site, *};

/// What may happen next.
#[derive(Debug, Clone)]
enum Move {
    /// One effect is carried out; or is lost on its way there, or its answer on the way back.
    Serve(usize),
    Lose(usize, bool),
    Audio(u8),
    End(u8),
    Open(u8),
    Close(u8),
    /// The tail catches up.
    Read,
    Second,
    Publish(u8),
    Die(u8),
    Drain(u8),
    Refuse(u8, bool),
    /// It falls silent and works on, or is heard again.
    Mute(u8, bool),
    /// The dispatcher's link breaks.
    Deaf,
    /// The dispatcher is killed and another takes over; what it had sent may still arrive.
    Succeed,
    Stale(usize),
}

fn any_move() -> impl Strategy<Value = Move> {
    prop_oneof![
        10 => (0usize..8).prop_map(Move::Serve),
        2 => ((0usize..8), any::<bool>()).prop_map(|(at, done)| Move::Lose(at, done)),
        4 => (0u8..3).prop_map(Move::Audio),
        1 => (0u8..3).prop_map(Move::End),
        1 => (0u8..3).prop_map(Move::Open),
        1 => (0u8..3).prop_map(Move::Close),
        3 => Just(Move::Read),
        5 => Just(Move::Second),
        4 => (0u8..3).prop_map(Move::Publish),
        1 => (0u8..3).prop_map(Move::Die),
        1 => (0u8..3).prop_map(Move::Drain),
        1 => ((0u8..3), any::<bool>()).prop_map(|(n, on)| Move::Refuse(n, on)),
        1 => ((0u8..3), any::<bool>()).prop_map(|(n, on)| Move::Mute(n, on)),
        1 => Just(Move::Deaf),
        1 => Just(Move::Succeed),
        1 => (0usize..8).prop_map(Move::Stale),
    ]
}

/// What must hold at every moment.
#[derive(Default)]
struct Watch {
    epochs: BTreeMap<StreamId, u64>,
    ended: BTreeMap<StreamId, u64>,
}

impl Watch {
    fn look(&mut self, site: &mut Site) {
        let mut owners: BTreeMap<(&StreamId, u64), Vec<usize>> = BTreeMap::new();
        for (n, worker) in site.workers.iter().enumerate() {
            for (session, epoch) in &worker.held {
                owners.entry((session, *epoch)).or_default().push(n);
            }
        }
        for (what, who) in owners {
            assert!(who.len() == 1, "{what:?} is held by {who:?}");
        }
        for (id, chain) in &site.stored.chains {
            assert!(chain.windows(2).all(|w| w[0].epoch <= w[1].epoch), "{id}: epochs fall");
            let key = site.stored.keys.get(id).map(|(record, _)| record.epoch);
            assert!(chain.iter().all(|f| Some(f.epoch) <= key), "{id}: a final above its key");
        }
        for (id, (record, revision)) in &site.stored.keys {
            let before = self.epochs.insert(id.clone(), record.epoch).unwrap_or(0);
            assert!(record.epoch >= before, "{id}: its epoch fell from {before}");
            // Just written as ended: an end stands there, or nobody ever had it.
            if record.state == SessionState::Ended && self.ended.insert(id.clone(), *revision) != Some(*revision) {
                let end = site
                    .stored
                    .chains
                    .get(id)
                    .into_iter()
                    .flatten()
                    .any(|f| f.end && Some(f.audio.to_seq) == record.ended_seq);
                assert!(end || record.ended_seq.is_none(), "{id} ended at {:?}", record.ended_seq);
            }
        }
        for (id, entry) in site.stored.log.iter().take_while(|(_, entry)| entry.seq <= site.stored.cursor) {
            let known = entry.payload.is_empty() || site.stored.keys.contains_key(id);
            assert!(known, "the cursor has passed entry {} of {id}, which has no key", entry.seq);
        }
    }
}

fn play(site: &mut Site, next: &Move) {
    let session = |n: &u8| id(&format!("s{n}"));
    let (open, stale) = (site.open.len(), site.stale.len());
    match next {
        Move::Serve(at) if open > 0 => site.serve(at % open),
        Move::Lose(at, done) if open > 0 => {
            let effect = site.open.remove(at % open);
            site.carry_out(effect, *done, false);
        }
        Move::Audio(n) => {
            site.stored.append(&session(n), &[], b"ab");
        }
        Move::End(n) => {
            // An end alone opens nothing.
            if site.stored.entries(&session(n)).next().is_some() {
                site.stored.append(&session(n), &[("Asr-End", "1")], b"");
            }
        }
        Move::Open(n) => {
            site.core.ask_about(&session(n), CallId(1), crate::sessions::Asked::Open(Box::default(), None), site.now);
            site.gather();
        }
        Move::Close(n) => {
            site.core.ask_about(&session(n), CallId(2), crate::sessions::Asked::Close, site.now);
            site.gather();
        }
        Move::Read => site.read(),
        Move::Second => site.second(),
        Move::Publish(n) => site.publish(usize::from(*n)),
        Move::Die(n) => site.die(usize::from(*n)),
        Move::Drain(n) => site.workers[usize::from(*n)].draining = true,
        Move::Refuse(n, on) => site.workers[usize::from(*n)].refuses = *on,
        Move::Mute(n, on) => site.workers[usize::from(*n)].mute = *on,
        Move::Deaf => {
            testing::probe(&mut site.core, false, false, site.now);
            site.gather();
        }
        Move::Succeed => site.succeed(),
        Move::Stale(at) if stale > 0 => site.carry_out_stale(at % stale),
        Move::Serve(_) | Move::Lose(..) | Move::Stale(_) => {}
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: ProptestConfig::default().cases.max(300), ..ProptestConfig::default() })]

    /// Whatever happens in whatever order: every session ends, all its audio stands in its chain, and nobody keeps a slot.
    #[test]
    fn any_order_of_events_settles(moves in prop::collection::vec(any_move(), 0..90)) {
        let mut site = Site::new(3);
        let mut watch = Watch::default();
        for next in &moves {
            play(&mut site, next);
            watch.look(&mut site);
        }
        site.finish(|site| watch.look(site));
    }
}
