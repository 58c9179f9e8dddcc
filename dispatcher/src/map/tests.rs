use proptest::prelude::*;

use super::*;

const S: Duration = Duration::from_secs(1);

fn gpu(name: &str) -> GpuId {
    GpuId::new(name).expect("test id")
}

fn service(gpus: &[&str], reserves: &[&str]) -> ServiceConfig {
    let names = |list: &[&str]| list.iter().map(|s| (*s).to_owned()).collect();
    ServiceConfig { gpus: names(gpus), reserves: names(reserves), ..ServiceConfig::default() }
}

fn map(services: &[(&str, ServiceConfig)]) -> Map {
    Map::of(&services.iter().map(|(name, config)| ((*name).to_owned(), config.clone())).collect())
}

/// A fleet over time: what is heard, and what follows from it.
struct World {
    map: Map,
    gpus: HashMap<GpuId, Gpu>,
    roles: Roles,
    now: Duration,
}

impl World {
    fn new(map: Map, alive: &[&str]) -> Self {
        let mut world = Self { map, gpus: HashMap::new(), roles: Roles::default(), now: Duration::ZERO };
        for name in alive {
            world.set(name, Some(WorkerHealth::Alive), false);
        }
        world.look(10);
        world
    }

    fn set(&mut self, name: &str, health: Option<WorkerHealth>, holds: bool) {
        match health {
            None => drop(self.gpus.remove(&gpu(name))),
            Some(health) => {
                let mut works_for = self.gpus.get(&gpu(name)).map(|g| g.works_for.clone()).unwrap_or_default();
                match self.duty(name) {
                    _ if !holds => works_for.clear(),
                    Duty::Serves(service) => drop(works_for.insert(service)),
                    _ => {}
                }
                let cpu = name.starts_with("cpu");
                self.gpus.insert(gpu(name), Gpu { gpu_id: gpu(name), health, works_for, cpu });
            }
        }
    }

    fn look(&mut self, seconds: u64) -> Vec<Change> {
        let mut all = Vec::new();
        for _ in 0..seconds {
            self.now += S;
            let (roles, changes) = self.map.roles(&self.gpus, &self.roles, self.now, self.now);
            self.roles = roles;
            all.extend(changes);
        }
        all
    }

    fn duty(&self, name: &str) -> Duty {
        self.map.duty(&self.roles, &gpu(name), name.starts_with("cpu"))
    }
}

fn failed(name: &str, reserve: Option<&str>) -> Change {
    Change::Failed { gpu: gpu(name), service: 0, reserve: reserve.map(gpu) }
}

#[test]
fn without_a_map_everybody_serves_everything() {
    let world = World::new(Map::default(), &["a"]);
    assert_eq!(world.duty("a"), Duty::Anyone);
    assert!(world.map.status(&world.roles, &world.gpus).is_empty());
}

#[test]
fn reserves_stand_in_one_after_another_until_none_is_left() {
    let mut world =
        World::new(map(&[("asr", service(&["a", "b", "c"], &["r", "s"]))]), &["a", "b", "c", "r", "s", "cpu-1"]);
    assert_eq!((world.duty("a"), world.duty("r"), world.duty("other")), (Duty::Serves(0), Duty::Reserve, Duty::Nobody));
    assert_eq!(world.duty("cpu-1"), Duty::Cpu);
    world.set("a", None, false);
    assert_eq!(world.look(1), [failed("a", Some("r"))]);
    assert_eq!((world.duty("r"), world.duty("s")), (Duty::Serves(0), Duty::Reserve));
    assert_eq!(world.look(60), [], "told once");
    world.set("b", Some(WorkerHealth::Unhealthy), true);
    assert_eq!(world.look(1), [failed("b", Some("s"))]);
    world.set("c", Some(WorkerHealth::Draining), true);
    assert_eq!(world.look(1), [failed("c", None)]);
    world.set("r", None, false);
    assert_eq!(world.look(1), [], "nobody is left for a");
    world.set("r", Some(WorkerHealth::Alive), false);
    assert_eq!(
        world.look(1),
        [Change::StandsIn { gpu: gpu("a"), service: 0, reserve: gpu("r") }],
        "the first that needs one"
    );
    let status = &world.map.status(&world.roles, &world.gpus)[0];
    let rows: Vec<_> = status
        .gpus
        .iter()
        .map(|g| (g.gpu_id.as_str(), g.role, g.health, g.standing_in_for.as_ref().map(GpuId::as_str)))
        .collect();
    assert_eq!(
        rows,
        [
            ("a", Role::Serves, None, None),
            ("b", Role::Serves, Some(WorkerHealth::Unhealthy), None),
            ("c", Role::Serves, Some(WorkerHealth::Draining), None),
            ("r", Role::StandingIn, Some(WorkerHealth::Alive), Some("a")),
            ("s", Role::StandingIn, Some(WorkerHealth::Alive), Some("b")),
            ("cpu-1", Role::Cpu, Some(WorkerHealth::Alive), None),
        ]
    );
}

#[test]
fn a_gpu_that_comes_back_is_believed_after_a_while_and_its_reserve_finishes_what_it_has() {
    let mut world = World::new(map(&[("asr", service(&["a"], &["r"]))]), &["a", "r"]);
    world.set("a", Some(WorkerHealth::Suspect), false);
    assert_eq!(world.look(5), [], "silent is not gone");
    world.set("a", None, false);
    world.look(1);
    world.set("r", Some(WorkerHealth::Alive), true);
    for _ in 0..3 {
        world.set("a", Some(WorkerHealth::Alive), false);
        assert_eq!(world.look(9), [], "it may go again");
        world.set("a", Some(WorkerHealth::Suspect), false);
        assert_eq!(world.look(1), []);
    }
    assert_eq!(world.duty("r"), Duty::Serves(0));
    world.set("a", Some(WorkerHealth::Alive), false);
    assert_eq!(world.look(11), [Change::Back { gpu: gpu("a"), service: 0 }]);
    assert_eq!(world.duty("r"), Duty::Reserve, "nothing new");
    assert_eq!(world.map.status(&world.roles, &world.gpus)[0].gpus[1].role, Role::StandingIn, "it still works");
    world.set("a", None, false);
    assert_eq!(world.look(1), [failed("a", None)], "the same one goes on");
    assert_eq!(world.duty("r"), Duty::Serves(0));
    world.set("a", Some(WorkerHealth::Alive), false);
    world.look(11);
    world.set("r", Some(WorkerHealth::Alive), false);
    world.look(1);
    assert_eq!(world.map.status(&world.roles, &world.gpus)[0].gpus[1].role, Role::Reserve);
}

#[test]
fn a_reserve_that_finishes_stands_in_for_the_next_that_fails() {
    let mut world = World::new(map(&[("asr", service(&["a", "b"], &["r", "s"]))]), &["a", "b", "r"]);
    world.set("a", None, false);
    world.look(1);
    world.set("r", Some(WorkerHealth::Alive), true);
    world.set("a", Some(WorkerHealth::Alive), false);
    world.look(11);
    assert_eq!(world.duty("r"), Duty::Reserve, "long calls");
    world.set("b", None, false);
    assert_eq!(world.look(1), [failed("b", Some("r"))]);
    assert_eq!(world.duty("r"), Duty::Serves(0));
    let row = &world.map.status(&world.roles, &world.gpus)[0].gpus[2];
    assert_eq!((row.role, row.standing_in_for.as_ref()), (Role::StandingIn, Some(&gpu("b"))));

    world.set("b", Some(WorkerHealth::Alive), false);
    world.look(11);
    world.set("s", Some(WorkerHealth::Alive), false);
    world.set("a", None, false);
    assert_eq!(world.look(1), [failed("a", Some("s"))], "rather one with nothing to do");
}

#[test]
fn nobody_has_failed_who_could_not_be_heard_yet() {
    let mut world = World::new(map(&[("asr", service(&["a"], &["r"]))]), &[]);
    world.now = Duration::ZERO;
    world.roles = Roles::default();
    world.set("r", Some(WorkerHealth::Alive), false);
    assert_eq!(world.look(4), []);
    assert_eq!(world.look(1), [failed("a", Some("r"))]);
}

#[test]
fn a_reserve_that_works_for_a_service_since_before_a_takeover_stands_in_for_that_one_only() {
    let two = [("asr", service(&["a"], &["r"])), ("bulk", service(&["b"], &["r"]))];
    let mut world = World::new(map(&two), &["r"]);
    (world.now, world.roles) = (Duration::ZERO, Roles::default());
    world.gpus.get_mut(&gpu("r")).expect("there").works_for.insert(1);
    world.look(10);
    assert_eq!(world.duty("r"), Duty::Serves(1), "asr comes first, but it is taken");
}

#[test]
fn services_share_reserves_and_the_first_that_needs_one_gets_it() {
    let two = [("asr", service(&["a"], &["r"])), ("bulk", service(&["b"], &["r"]))];
    let mut world = World::new(map(&two), &["a", "b", "r"]);
    world.set("b", None, false);
    world.look(1);
    assert_eq!(world.duty("r"), Duty::Serves(1));
    world.set("a", None, false);
    assert_eq!(world.look(1), [failed("a", None)], "it is not taken away from the other");
    assert_eq!(world.duty("r"), Duty::Serves(1));
}

#[test]
fn whoever_asks_for_a_model_belongs_to_the_service_that_lists_it() {
    let of = |models: &[&str]| ServiceConfig {
        models: models.iter().map(|m| (*m).to_owned()).collect(),
        ..service(&[], &[])
    };
    let number = |map: &Map, model| map.service_of(model).map(|s| s.number);
    let usual = map(&[("asr", of(&["small"])), ("big", of(&["medium"]))]);
    assert_eq!((number(&usual, Some("medium")), number(&usual, Some("small"))), (Some(1), Some(0)));
    assert_eq!((number(&usual, None), number(&usual, Some("other"))), (Some(0), Some(0)));
    let open = map(&[("big", of(&["medium"])), ("rest", of(&[]))]);
    assert_eq!((number(&open, None), number(&open, Some("medium"))), (Some(1), Some(0)));
    let closed = map(&[("big", of(&["medium"])), ("small", of(&["small"]))]);
    assert_eq!(number(&closed, Some("tiny")), None);
    assert_eq!(number(&map(&[("x", of(&["small"]))]), Some("tiny")), Some(0), "the only one");
}

#[test]
fn limits_and_preloads_are_those_of_the_service_served() {
    let mut bulk = service(&["b"], &["r"]);
    (bulk.memory_limit_percent, bulk.preload) = (60, vec!["medium".to_owned()]);
    let mut world = World::new(map(&[("asr", service(&["a"], &[])), ("bulk", bulk)]), &["a", "b", "r"]);
    let of = |world: &World, name| {
        let preload = world.map.preload(&world.roles, &gpu(name)).to_vec();
        (world.map.reserve_percent(&world.roles, &gpu(name)), preload)
    };
    assert_eq!(of(&world, "a"), (Some(10), vec![]));
    assert_eq!(of(&world, "b"), (Some(40), vec!["medium".to_owned()]));
    assert_eq!(of(&world, "r"), (None, vec![]));
    world.set("b", None, false);
    world.look(1);
    assert_eq!(of(&world, "r"), (Some(40), vec!["medium".to_owned()]));
}

proptest! {
    /// Whatever comes and goes: no reserve stands in for two, none for a GPU that is not out, a GPU that can serve is never a
    /// reserve's charge for new work, and each duty is that of one service.
    #[test]
    fn a_gpu_never_serves_two_services(steps in prop::collection::vec((0usize..7, 0u8..6, any::<bool>()), 1..150)) {
        let names = ["a", "b", "c", "d", "r", "s", "t"];
        let services = [("one", service(&["a", "b"], &["r", "s"])), ("two", service(&["c", "d"], &["s", "t", "r"]))];
        let mut world = World::new(map(&services), &names);
        let of = |name: &str| if ["a", "b"].contains(&name) { Duty::Serves(0) } else { Duty::Serves(1) };
        for (at, health, holds) in steps {
            use WorkerHealth::{Alive, Draining, Joining, Suspect, Unhealthy};
            let health = [None, Some(Alive), Some(Joining), Some(Suspect), Some(Draining), Some(Unhealthy)][usize::from(health)];
            world.set(names[at], health, holds);
            world.look(1);
            for name in ["a", "b", "c", "d"] {
                prop_assert_eq!(world.duty(name), of(name));
            }
            let mut charges: Vec<&GpuId> = world.roles.standing_in.values().map(|s| &s.instead_of).collect();
            charges.sort();
            let all = charges.len();
            charges.dedup();
            prop_assert_eq!(all, charges.len(), "two stand in for one");
            // No GPU is out while a reserve could take its place.
            for (number, entry) in (0..).zip(&world.map.services) {
                let alone = |gpu: &GpuId| !world.roles.standing_in.values().any(|s| s.instead_of == *gpu);
                let out = entry.gpus.iter().filter(|gpu| world.roles.out.contains_key(*gpu));
                let could = |reserve: &GpuId| {
                    let stands = world.roles.standing_in.get(reserve);
                    let able = world.gpus.get(reserve).is_some_and(|g| {
                        g.health == Alive && g.works_for.iter().all(|s| *s == number)
                    });
                    able && stands.is_none_or(|s| s.leaving && s.service == number)
                };
                for gpu in out.filter(|gpu| alone(gpu)) {
                    let idle: Vec<_> = entry.reserves.iter().filter(|r| could(r)).collect();
                    prop_assert!(idle.is_empty(), "{gpu} is out, {idle:?} could stand in");
                }
            }
            for name in ["r", "s", "t"] {
                let duty = world.duty(name);
                if let Some(stands) = world.roles.standing_in.get(&gpu(name)) {
                    let leaving = !world.roles.out.contains_key(&stands.instead_of);
                    prop_assert_eq!(leaving, duty == Duty::Reserve);
                    prop_assert_eq!(of(stands.instead_of.as_str()), Duty::Serves(stands.service));
                } else {
                    prop_assert_eq!(duty, Duty::Reserve);
                }
                if let (Duty::Serves(service), Some(gpu)) = (duty, world.gpus.get(&gpu(name))) {
                    prop_assert!(gpu.works_for.iter().all(|s| *s == service), "{name}: {gpu:?}, {duty:?}");
                }
            }
        }
    }
}
