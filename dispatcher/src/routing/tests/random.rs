//! Whatever is asked of whatever fleet.

use proptest::prelude::*;
use voxfleet_schema::fleet::ModelState;

use super::*;

/// A worker as it would be: what it was given loads some time later, and its heartbeats show it.
struct Simulated {
    beat: Heartbeat,
    sessions: Vec<String>,
}

proptest! {
    #[test]
    fn no_slot_is_given_twice_and_none_is_refused_while_one_is_free(
        slots in prop::collection::vec(0u32..6, 0..8),
        requests in 0usize..60,
        order in any::<prop::sample::Index>(),
    ) {
        let mut fleet = gpus(slots.len() as u32);
        for (gpu, total) in fleet.iter_mut().zip(&slots) {
            gpu.beat.slots.total = *total;
        }
        if !fleet.is_empty() {
            let by = order.index(fleet.len());
            fleet.rotate_left(by);
        }
        let room: u32 = slots.iter().sum();
        for n in 0..requests {
            match pick(&fleet, &SessionOptions::default()) {
                Ok(at) => {
                    prop_assert!(fleet[at].used < fleet[at].beat.slots.total);
                    let before = |g: &Gpu| f64::from(g.used) / f64::from(g.beat.slots.total);
                    let best = fleet.iter().filter(|g| g.used < g.beat.slots.total).map(before).fold(1.0, f64::min);
                    prop_assert!(before(&fleet[at]) <= best);
                    fleet[at].used += 1;
                }
                Err(_) => prop_assert!(n as u32 >= room),
            }
        }
        let placed: u32 = fleet.iter().map(|g| g.used).sum();
        prop_assert_eq!(placed, room.min(requests as u32));
    }

    #[test]
    fn the_order_of_candidates_does_not_matter(used in prop::collection::vec(0u32..5, 1..9), turn in 0usize..9) {
        let mut fleet = gpus(used.len() as u32);
        for (gpu, used) in fleet.iter_mut().zip(&used) {
            gpu.used = *used;
        }
        let name = |fleet: &[Gpu]| pick(fleet, &SessionOptions::default()).ok().map(|at| fleet[at].name.clone());
        let first = name(&fleet);
        let len = fleet.len();
        fleet.rotate_left(turn % len);
        prop_assert_eq!(name(&fleet), first);
    }

    /// Whatever loads when, memory that is loaded or promised never exceeds what may be planned, nor slots their number;
    /// two incarnations of each GPU share both.
    #[test]
    fn memory_and_slots_are_never_given_twice(
        sizes in prop::collection::vec(1_000u64..9_000, 4),
        steps in prop::collection::vec((0u8..4, 0usize..6, 0usize..4), 1..120),
    ) {
        const TOTAL: u64 = 24_000;
        let names = ["a", "b", "c", "d"];
        let mut workers: Vec<Simulated> = (0..6).map(|n| {
            let mut beat = beat(&format!("g{}", n / 2), ["old", "new"][n % 2]);
            beat.device.total_mb = TOTAL;
            beat.device.free_mb = TOTAL;
            beat.models = names.iter().zip(&sizes).map(|(name, mb)| model(name, Residency::Available, *mb)).collect();
            Simulated { beat, sessions: Vec::new() }
        }).collect();
        let loaded = |w: &Simulated| -> u64 {
            w.beat.models.iter().filter(|m| m.state == Residency::Loaded).map(|m| m.expected_mb).sum()
        };
        let config = DispatcherConfig::default();
        let mut all = Roster::default();
        let put = |all: &mut Roster, worker: &Simulated| {
            let promised: Vec<Option<&str>> = worker.sessions.iter().map(|m| Some(m.as_str())).collect();
            all.put(Seen {
                name: &worker.beat.worker(),
                heartbeat: &worker.beat,
                health: WorkerHealth::Alive,
                suspect_at: Duration::MAX,
                superseded: worker.beat.incarnation.as_str() == "old",
                sessions: worker.sessions.len() as u32,
                jobs: 0,
                promised: &promised,
                duty: Duty::Anyone,
                reserve_percent: 10,
            }, &config);
        };
        for worker in &workers {
            put(&mut all, worker);
        }
        // What is loaded really, of which heartbeats only tell.
        let mut real: Vec<Vec<Residency>> = vec![vec![Residency::Available; 4]; 6];
        for (step, at, which) in steps {
            match step {
                // Somebody is placed.
                0 | 1 => {
                    let options = wants(names[which], Policy::ExactModel);
                    if let Ok(slot) = route(&all, &Request::new(&options, true)) {
                        let name = all.name(slot).clone();
                        let worker = workers.iter_mut().find(|w| w.beat.worker() == name).expect("known");
                        worker.sessions.push(names[which].to_owned());
                        put(&mut all, worker);
                    }
                }
                // A worker loads what it was given.
                2 => {
                    if workers[at].sessions.iter().any(|m| m == names[which]) {
                        real[at][which] = Residency::Loaded;
                    }
                }
                // It is heard: memory as it is on the GPU, its own models.
                _ => {
                    let on_gpu = [at / 2 * 2, at / 2 * 2 + 1];
                    let used: u64 = on_gpu.iter().flat_map(|w| real[*w].iter().zip(&sizes))
                        .filter(|(state, _)| **state == Residency::Loaded).map(|(_, mb)| *mb).sum();
                    let worker = &mut workers[at];
                    worker.beat.device.free_mb = TOTAL - used;
                    for (model, state) in worker.beat.models.iter_mut().zip(&real[at]) {
                        model.state = *state;
                    }
                    put(&mut all, worker);
                }
            }
            for gpu in workers.chunks(2) {
                let needed: u64 = gpu.iter().map(|w| {
                    let given = |m: &&ModelState| w.sessions.contains(&m.name) || m.state == Residency::Loaded;
                    w.beat.models.iter().filter(given).map(|m| m.expected_mb).sum::<u64>().max(loaded(w))
                }).sum();
                prop_assert!(needed <= TOTAL - TOTAL / 10, "{needed} MB");
                let slots: usize = gpu.iter().map(|w| w.sessions.len()).sum();
                prop_assert!(slots <= 4, "{slots} sessions");
            }
        }
    }

    /// The short ways change nothing: the pick is the best of all that could take it, and the refusal that of all together.
    #[test]
    fn the_pick_is_the_best_of_all(
        kinds in prop::collection::vec((0u32..5, 0u32..5, 0u8..6, any::<bool>()), 0..12),
        wanted in prop::sample::select(vec![None, Some("medium"), Some("small"), Some("tiny"), Some("none")]),
        policy in prop::sample::select(vec![Policy::ExactModel, Policy::AllowSmaller, Policy::AllowCpu, Policy::ForceCpu]),
        live in any::<bool>(),
    ) {
        let mut fleet = gpus(kinds.len() as u32);
        for (gpu, (used, slots, kind, cpu)) in fleet.iter_mut().zip(&kinds) {
            (gpu.used, gpu.beat.slots.total, gpu.beat.job_slots.total) = (*used, *slots, *slots / 2);
            gpu.beat.models = vec![model("medium", Residency::Available, 2_100), model("small", Residency::Available, 852)];
            match kind {
                0 => gpu.beat.device.temperature_c = Some(99),
                1 => gpu.beat.device.total_mb = 2_000,
                2 => gpu.beat.device.free_mb = 3_400,
                3 => drop(gpu.beat.models.remove(0)),
                4 => gpu.beat.models[1].state = Residency::Loaded,
                _ => {}
            }
            if *cpu {
                gpu.beat.device.index = None;
            }
        }
        let all = roster(&fleet);
        let options = SessionOptions { model: wanted.map(str::to_owned), policy, ..SessionOptions::default() };
        let request = Request::new(&options, live);
        let terms = all.terms(&request, Duration::ZERO);
        let judged: Vec<_> = all.rows.iter().enumerate().map(|(slot, row)| (slot, all.judge(&terms, slot, row))).collect();
        let could = judged.iter().filter_map(|(slot, reason)| reason.ok().map(|score| (*slot, score)));
        let best = could.min_by(|(_, a), (_, b)| a.compare(b)).map(|(slot, _)| slot);
        match (route(&all, &request), best) {
            (Ok(pick), best) => prop_assert_eq!(Some(pick), best),
            (Err(failure), best) => {
                prop_assert_eq!(best, None);
                let mut met = Refusals::default();
                judged.iter().filter_map(|(_, reason)| reason.err()).for_each(|refusal| met.add(refusal));
                prop_assert_eq!(failure, all.refuse(&terms, met, &DispatcherConfig::default()));
            }
        }
    }
}
