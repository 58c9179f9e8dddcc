//! Faults under speech: sessions and a recording on two workers and two dispatchers, something breaks, and every sample is
//! transcribed exactly once all the same. The bodies here run on one server ([`crate::faults_r1`]) and, where a cluster can
//! make a difference, on three ([`crate::faults_r3`]); what breaks at random over minutes, on either ground, is `voxfleet
//! bench chaos`. They ask what happens and not how fast, so they take places beside each other.
//!
//! The simulated text is made from the samples, so the judge needs nothing that the program says of itself.

pub(crate) mod limits;

use std::{collections::BTreeSet, time::Duration};

use anyhow::{Context as _, Result, ensure};
use futures_util::{StreamExt as _, TryStreamExt as _};
use serde_json::Value;
use tokio::{task::JoinSet, time::Instant};
use voxfleet_harness::{
    audio::{self, Pcm},
    chaos::{
        self,
        hands::Hands,
        schedule::{Fault, Process, STREAMS},
        talk::{self, Said, Talk},
    },
    find,
    fleet::{self, Engine, Fleet, FleetBuilder, Servers},
    probe_api,
    server::{Cluster, ServerOptions},
    verdict::{self, JobEnd, Verdict},
    wait::eventually,
};
use voxfleet_schema::session::SessionRecord;

/// What the fleet stands on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ground {
    OneServer,
    ThreeServers,
}

/// Everything ends within this once nothing breaks any more.
const PATIENCE: Duration = Duration::from_secs(60);
const LOOK: Duration = Duration::from_millis(50);

impl Ground {
    pub(crate) fn builder() -> FleetBuilder {
        let builder = Fleet::builder().workers(2).dispatchers(2).slots(8).through_relays();
        builder.engine(Engine::Simulated { speed: 30.0 })
    }

    pub(crate) async fn start(self, builder: FleetBuilder) -> Result<Fleet> {
        if self == Ground::OneServer {
            return Ok(builder.start().await?);
        }
        // Clients would learn the servers' own addresses and go round their relays.
        let options = ServerOptions { extra: "cluster { no_advertise: true }".to_owned(), ..ServerOptions::default() };
        let cluster = Cluster::start_with(3, options).await?;
        Ok(builder.on(Servers::Many(cluster)).set("dispatcher.topology.replicas", 3).start().await?)
    }
}

/// What is said while something breaks.
pub(crate) struct Load {
    pub(crate) seed: u64,
    talks: JoinSet<Said>,
    said: Vec<Said>,
    job: Option<(String, Pcm)>,
    submission: JoinSet<voxfleet_harness::Result<()>>,
}

impl Load {
    /// Four sessions of so many seconds at twice the pace of speech, and a recording of half a minute.
    pub(crate) fn begin(fleet: &Fleet, seed: u64, seconds: f64) -> Self {
        Self::crowd(fleet, seed, seconds, 2.0, 4)
    }

    pub(crate) fn crowd(fleet: &Fleet, seed: u64, seconds: f64, speed: f64, sessions: u64) -> Self {
        let js = talk::impatient(fleet.client());
        let mut talks = JoinSet::new();
        for n in 0..sessions {
            talks.spawn(talk::talk(js.clone(), nth(seed, n, seconds, speed)));
        }
        let (id, pcm) = (format!("fault-{seed}-job"), audio::blasts(seed * 100 + 99, 30.0));
        let mut submission = JoinSet::new();
        let (job, recording) = (id.clone(), pcm.clone());
        submission.spawn(async move { talk::submit(js, job, &recording, "normal").await });
        Self { seed, talks, said: Vec::new(), job: Some((id, pcm)), submission }
    }

    /// Takes what was said to its end, and tells whether anybody still speaks.
    fn speaks(&mut self) -> Result<bool> {
        while let Some(said) = self.talks.try_join_next() {
            self.said.push(said?);
        }
        Ok(!self.talks.is_empty())
    }

    /// Somebody else begins for each of the four that has ended.
    fn keep_speaking(&mut self, fleet: &Fleet, seconds: f64) -> Result<()> {
        self.speaks()?;
        while self.talks.len() < 4 {
            let n = (self.said.len() + self.talks.len()) as u64;
            self.talks.spawn(talk::talk(talk::impatient(fleet.client()), nth(self.seed, n, seconds, 2.0)));
        }
        Ok(())
    }

    /// Waits until every chain has an end, mending what is due meanwhile; gives what the checker says of each session.
    pub(crate) async fn judged(mut self, hands: &mut Hands) -> Result<Vec<Verdict>> {
        let outcome = self.judge(hands).await;
        outcome.with_context(|| hands.fleet.logs())
    }

    async fn judge(&mut self, hands: &mut Hands) -> Result<Vec<Verdict>> {
        let until = Instant::now() + PATIENCE;
        while !self.talks.is_empty() || !self.submission.is_empty() {
            ensure!(Instant::now() < until, "producers are still waiting");
            hands.mend().await?;
            while let Some(said) = self.talks.try_join_next() {
                self.said.push(said?);
            }
            if let Some(submitted) = self.submission.try_join_next() {
                submitted??;
            }
            tokio::time::sleep(LOOK).await;
        }
        let js = hands.fleet.js();
        let mut verdicts = Vec::new();
        for said in &self.said {
            ensure!(said.gave_up.is_none(), "{}: {:?}", said.id, said.gave_up);
            while !ended(&js, "session", &said.id).await {
                ensure!(
                    Instant::now() < until,
                    "{} has no end: {:#?}",
                    said.id,
                    verdict::session(&js, &said.id, &said.samples).await?
                );
                hands.mend().await?;
                tokio::time::sleep(LOOK).await;
            }
            verdicts.push(verdict::session(&js, &said.id, &said.samples).await?);
        }
        if let Some((id, pcm)) = &self.job {
            while !ended(&js, "job", id).await {
                ensure!(Instant::now() < until, "{id} has no end");
                hands.mend().await?;
                tokio::time::sleep(LOOK).await;
            }
            let (judged, end) = verdict::job(&js, id, &pcm.samples).await?;
            ensure!(end == JobEnd::Done, "{id}: {end:?}");
            judged.clean(id)?;
        }
        Ok(verdicts)
    }

    pub(crate) async fn clean(self, hands: &mut Hands) -> Result<Vec<Verdict>> {
        let seed = self.seed;
        let verdicts = self.judged(hands).await?;
        for (n, verdict) in verdicts.iter().enumerate() {
            verdict.clone().clean(&format!("session {n} of {seed}")).with_context(|| hands.fleet.logs())?;
            ensure!(verdict.finals >= 3, "hardly anything was said: {verdict:?}");
        }
        ensure!(hands.unexpected.is_empty(), "processes ended by themselves: {:#?}", hands.unexpected);
        Ok(verdicts)
    }
}

/// What the n-th session of a load says.
fn nth(seed: u64, n: u64, seconds: f64, speed: f64) -> Talk {
    let chunk_ms = [100, 200, 40, 400][(n % 4) as usize];
    Talk { id: session(seed, n), poison: None, seed: seed * 100 + n, seconds, speed, chunk_ms }
}

pub(crate) fn session(seed: u64, n: u64) -> String {
    format!("fault-{seed}-{n}")
}

async fn ended(js: &async_nats::jetstream::Context, kind: &str, id: &str) -> bool {
    let subject = format!("asr.v1.transcript.{kind}.{id}.final");
    let last = async {
        js.get_stream_no_info("ASR_TRANSCRIPT").await.ok()?.get_last_raw_message_by_subject(&subject).await.ok()
    };
    let last = tokio::time::timeout(Duration::from_secs(2), last).await.ok().flatten();
    let json: Option<Value> = last.and_then(|m| serde_json::from_slice(&m.payload).ok());
    json.is_some_and(|j| j["end"] == true)
}

/// Looks until the moment has come, mending what is due.
pub(crate) async fn until(hands: &mut Hands, moment: Instant) -> Result<()> {
    while Instant::now() < moment {
        hands.mend().await?;
        tokio::time::sleep_until(moment.min(Instant::now() + LOOK)).await;
    }
    Ok(())
}

/// Breaks it as soon as there is something to break.
pub(crate) async fn break_it(hands: &mut Hands, fault: Fault) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(20);
    while hands.apply(fault).await?.is_none() {
        ensure!(Instant::now() < deadline, "nothing to break for {fault:?}");
        hands.mend().await?;
        tokio::time::sleep(LOOK).await;
    }
    Ok(())
}

/// What is left to look at when all was clean.
struct Played {
    verdicts: Vec<Verdict>,
    hands: Hands,
}

/// The script: what breaks how many seconds after speech began.
async fn play(ground: Ground, seed: u64, builder: FleetBuilder, script: &[(f64, Fault)]) -> Result<Played> {
    let _place = fleet::place().await;
    act(Hands::new(ground.start(builder).await?), seed, script).await
}

async fn act(mut hands: Hands, seed: u64, script: &[(f64, Fault)]) -> Result<Played> {
    let seconds = 10.0 + 2.0 * script.last().map_or(0.0, |(at, _)| *at);
    let load = Load::begin(&hands.fleet, seed, seconds);
    let begun = Instant::now();
    for (at, fault) in script {
        until(&mut hands, begun + Duration::from_secs_f64(*at)).await?;
        break_it(&mut hands, *fault).await?;
    }
    let verdicts = load.clean(&mut hands).await?;
    Ok(Played { verdicts, hands })
}

async fn one(ground: Ground, seed: u64, script: &[(f64, Fault)]) -> Result<()> {
    play(ground, seed, Ground::builder(), script).await.map(drop)
}

const fn s(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

const WORKER: Process = Process::Worker(0);
const OTHER: Process = Process::Worker(1);
const ACTIVE: Process = Process::Dispatcher { active: true };
const STANDBY: Process = Process::Dispatcher { active: false };

/// No time of its own: who goes on before the verdict has lost nothing, however long that takes.
const UNTIL_IT_MOVED: Duration = s(3_600_000);

/// Breaks the first worker once it has a session, which has to move then.
async fn with_a_session(ground: Ground, seed: u64, fault: Fault) -> Result<()> {
    let _place = fleet::place().await;
    let mut hands = Hands::new(ground.start(Ground::builder()).await?);
    let load = Load::begin(&hands.fleet, seed, 13.0);
    let begun = Instant::now();
    let sessions = hands.fleet.js().get_key_value("asr_sessions").await?;
    let gpu = hands.fleet.workers[0].gpu_id().to_owned();
    let there = eventually("a session on the first worker", Duration::from_secs(20), || async {
        for n in 0..4 {
            let key = sessions.get(session(seed, n)).await.ok().flatten();
            let record = key.and_then(|key| serde_json::from_slice::<SessionRecord>(&key).ok());
            if record.and_then(|record| record.worker).is_some_and(|worker| worker.gpu_id.as_str() == gpu) {
                return Some(session(seed, n));
            }
        }
        None
    });
    let id = there.await.with_context(|| hands.fleet.logs())?;
    until(&mut hands, begun + s(1_500)).await?;
    break_it(&mut hands, fault).await?;
    if fault == Fault::Stop(WORKER, UNTIL_IT_MOVED) {
        let moved = eventually("another worker has its session", PATIENCE, || async {
            owner(&hands.fleet, &id).await.filter(|at| *at != 0)
        });
        moved.await.with_context(|| hands.fleet.logs())?;
        hands.mend_all().await?;
    }
    let verdicts = load.clean(&mut hands).await?;
    ensure!(verdicts.iter().any(|v| v.epoch > 1), "nobody moved: {verdicts:?}\n{}", hands.fleet.logs());
    Ok(())
}

pub(crate) async fn a_worker_is_killed(ground: Ground) -> Result<()> {
    with_a_session(ground, 1, Fault::Kill(WORKER, s(1_000))).await
}

pub(crate) async fn a_worker_stands_still_and_goes_on(ground: Ground) -> Result<()> {
    with_a_session(ground, 2, Fault::Stop(WORKER, UNTIL_IT_MOVED)).await
}

pub(crate) async fn an_engine_is_killed_and_another_stands_still(ground: Ground) -> Result<()> {
    one(ground, 3, &[(1.2, Fault::KillEngine(0)), (2.0, Fault::StopEngine(1, s(2_000)))]).await
}

pub(crate) async fn the_active_dispatcher_is_killed_then_the_other(ground: Ground) -> Result<()> {
    one(ground, 4, &[(1.0, Fault::Kill(ACTIVE, s(2_000))), (1.5, Fault::Kill(STANDBY, s(1_000)))]).await
}

pub(crate) async fn the_active_dispatcher_stands_still_longer_than_its_lease(ground: Ground) -> Result<()> {
    one(ground, 5, &[(0.5, Fault::Stop(STANDBY, s(2_000))), (1.0, Fault::Stop(ACTIVE, s(7_500)))]).await
}

/// Asked to end as by an update, first one and then the other; nobody's work goes elsewhere for that.
pub(crate) async fn the_dispatchers_are_asked_to_end_one_after_the_other(ground: Ground) -> Result<()> {
    let script = [(1.0, Fault::Terminate(ACTIVE)), (4.0, Fault::Terminate(ACTIVE))];
    let played = play(ground, 20, Ground::builder(), &script).await?;
    ensure!(played.verdicts.iter().all(|v| v.epoch == 1), "somebody moved: {:?}", played.verdicts);
    Ok(())
}

/// Which of these streams the server leads that leads the first of them.
async fn led_with_the_first(fleet: &Fleet, streams: &BTreeSet<&'static str>) -> Result<BTreeSet<&'static str>> {
    let first = fleet.leader_of(streams.first().context("no stream is left")?).await?;
    let mut led = BTreeSet::new();
    for stream in streams {
        if fleet.leader_of(stream).await? == first {
            led.insert(*stream);
        }
    }
    Ok(led)
}

/// Servers are killed one after the other until each stream has lost its leader once.
pub(crate) async fn every_stream_loses_its_leader(ground: Ground) -> Result<()> {
    let _place = fleet::place().await;
    let mut hands = Hands::new(ground.start(Ground::builder()).await?);
    let names: Vec<String> = hands.fleet.js().stream_names().try_collect().await?;
    let names: BTreeSet<&str> = names.iter().map(String::as_str).collect();
    let mut left = BTreeSet::from(STREAMS);
    ensure!(names == left, "the fleet's streams are {names:?}");
    let mut load = Load::begin(&hands.fleet, 6, 36.0);
    until(&mut hands, Instant::now() + s(1_000)).await?;
    let mut kills: Vec<BTreeSet<&str>> = Vec::new();
    // One server leads everything: it is killed more than once all the same.
    while !left.is_empty() || kills.len() < 3 {
        ensure!(kills.len() < 20, "{left:?} never lost their leader: {kills:?}");
        let wanted = if left.is_empty() { BTreeSet::from(STREAMS) } else { left.clone() };
        let led = eventually("a leader of each stream", s(20_000), || async {
            led_with_the_first(&hands.fleet, &wanted).await.ok()
        })
        .await?;
        let first = *led.first().context("nothing is led")?;
        // However long this takes: a leader that nobody speaks to is no loss.
        load.keep_speaking(&hands.fleet, 16.0)?;
        ensure!(load.speaks()?, "nobody speaks any more: {kills:?}");
        break_it(&mut hands, Fault::KillServer(first, s(300))).await?;
        left.retain(|stream| !led.contains(stream));
        kills.push(led);
        while hands.next_mend().is_some() {
            hands.mend().await?;
            tokio::time::sleep(LOOK).await;
        }
    }
    load.clean(&mut hands).await.with_context(|| format!("leaders of these were killed: {kills:#?}"))?;
    eprintln!("leaders killed on {ground:?}, and what they led: {kills:#?}");
    Ok(())
}

pub(crate) async fn a_server_in_lame_duck_mode_leaves(ground: Ground) -> Result<()> {
    one(ground, 8, &[(1.5, Fault::LameDuck(0, s(2_000)))]).await
}

/// Cut, held up, and swallowed in one direction.
pub(crate) async fn workers_and_servers_lose_sight_of_each_other(ground: Ground) -> Result<()> {
    let script = [
        (0.8, Fault::Pause(WORKER, s(2_000))),
        (1.5, Fault::Reset(OTHER)),
        (4.0, Fault::OneWay(WORKER, true, s(3_000))),
        (5.0, Fault::OneWay(OTHER, false, s(2_500))),
    ];
    one(ground, 9, &script).await
}

pub(crate) async fn lines_are_late_and_stall(ground: Ground) -> Result<()> {
    let script = [
        (0.5, Fault::Delay(ACTIVE, s(5_000))),
        (0.6, Fault::Stall(WORKER, s(5_000))),
        (0.7, Fault::Delay(OTHER, s(5_000))),
    ];
    let played = play(ground, 11, Ground::builder(), &script).await?;
    ensure!(played.hands.stalls() > 0, "nothing stood still");
    Ok(())
}

pub(crate) async fn hints_are_purged_and_consumers_deleted_by_hand(ground: Ground) -> Result<()> {
    // Who stands still leaves his hints where they are.
    let script = [
        (1.0, Fault::Stop(WORKER, s(1_000))),
        (1.4, Fault::PurgeLive),
        (2.5, Fault::DeleteConsumers(0)),
        (4.0, Fault::DeleteConsumers(1)),
    ];
    let played = play(ground, 12, Ground::builder(), &script).await?;
    ensure!(played.hands.hints_purged > 0, "there was nothing to purge");
    Ok(())
}

pub(crate) async fn hints_are_dropped_doubled_late_and_out_of_order(ground: Ground) -> Result<()> {
    let (tamper, fates) = chaos::hint_faults(13, 0.6);
    play(ground, 13, Ground::builder().tamper_dispatchers(tamper), &[]).await?;
    let all = fates.all();
    ensure!(fates.faults() > 50 && all.values().all(|n| *n > 5), "{all:?}");
    Ok(())
}

pub(crate) async fn two_faults_at_once(ground: Ground) -> Result<()> {
    let script = [
        (1.5, Fault::Kill(WORKER, s(1_000))),
        (1.5, Fault::Kill(ACTIVE, s(1_500))),
        (5.0, Fault::KillEngine(1)),
        (5.0, Fault::KillServer("ASR_TRANSCRIPT", s(500))),
    ];
    one(ground, 14, &script).await
}

pub(crate) async fn the_heir_is_killed_while_a_worker_drains(ground: Ground) -> Result<()> {
    // Who drains is out of reach of the second fault, which so meets the other worker.
    one(ground, 15, &[(1.5, Fault::Terminate(WORKER)), (1.7, Fault::Kill(WORKER, s(700)))]).await
}

pub(crate) async fn the_server_dies_while_a_worker_drains(ground: Ground) -> Result<()> {
    one(ground, 16, &[(1.5, Fault::Terminate(WORKER)), (1.5, Fault::KillServer("ASR_TRANSCRIPT", s(700)))]).await
}

/// Which worker the record of this session names.
pub(crate) async fn owner(fleet: &Fleet, session: &str) -> Option<usize> {
    let stream = fleet.js().get_stream_no_info("KV_asr_sessions").await.ok()?;
    let record = stream.get_last_raw_message_by_subject(&format!("$KV.asr_sessions.{session}")).await.ok()?;
    let record: Value = serde_json::from_slice(&record.payload).ok()?;
    let gpu = record["worker"]["gpu_id"].as_str()?.to_owned();
    fleet.workers.iter().position(|w| w.gpu_id() == gpu)
}

pub(crate) async fn the_next_owner_of_the_same_session_is_killed_too(ground: Ground) -> Result<()> {
    let _place = fleet::place().await;
    let mut hands = Hands::new(ground.start(Ground::builder().workers(3)).await?);
    let load = Load::begin(&hands.fleet, 17, 20.0);
    let id = session(17, 0);
    let mut killed = Vec::new();
    until(&mut hands, Instant::now() + s(1_500)).await?;
    let deadline = Instant::now() + Duration::from_secs(30);
    while killed.len() < 2 {
        ensure!(Instant::now() < deadline, "{id} was owned by {killed:?} only\n{}", hands.fleet.logs());
        match owner(&hands.fleet, &id).await {
            // In the middle of its move: the record names it, it may not have begun.
            Some(i) if killed.last() != Some(&i) => {
                break_it(&mut hands, Fault::Kill(Process::Worker(i), s(6_000))).await?;
                killed.push(i);
            }
            _ => tokio::time::sleep(s(5)).await,
        }
    }
    let verdicts = load.clean(&mut hands).await?;
    ensure!(verdicts.iter().any(|v| v.epoch > 1), "{verdicts:?}");
    Ok(())
}

/// Nothing answers, connections stay open: buckets watched by anybody say nothing either.
pub(crate) async fn a_server_stands_still(ground: Ground) -> Result<()> {
    one(ground, 18, &[(1.5, Fault::StopServer("KV_asr_sessions", s(5_000)))]).await
}

pub(crate) async fn fifty_workers_start_at_one_instant(ground: Ground) -> Result<()> {
    let _turn = fleet::turn().await;
    let builder = Fleet::builder().workers(50).dispatchers(1).slots(1).engine(Engine::Simulated { speed: 0.0 });
    let mut hands = Hands::new(ground.start(builder).await?);
    let load = Load::crowd(&hands.fleet, 19, 8.0, 4.0, 12);
    load.clean(&mut hands).await.map(drop)
}

/// Workers whose wall clocks are a day behind, and workers whose wall clocks run too fast. (Monotonic time is left alone: the
/// kernel's own waits would go by another clock than the process that asks for them, which no machine does.)
pub(crate) async fn clocks_are_wrong(ground: Ground) -> Result<()> {
    tokio::try_join!(lying(ground, 21, "-26h"), lying(ground, 22, "+3h x1.3")).map(drop)
}

async fn lying(ground: Ground, seed: u64, lie: &str) -> Result<()> {
    let builder = Ground::builder().worker_env("LD_PRELOAD", &find::faketime()?.display().to_string());
    let builder = builder.worker_env("FAKETIME", lie).worker_env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
    let _place = fleet::place().await;
    let hands = Hands::new(ground.start(builder).await?);
    // The dynamic linker only warns of a library that it cannot load.
    let mut beats = probe_api::heartbeats(&hands.fleet.client(), hands.fleet.workers[0].gpu_id()).await?;
    let beat = tokio::time::timeout(s(10_000), beats.next()).await?.context("heartbeats")?;
    let beat: Value = serde_json::from_slice(&beat.payload)?;
    let told = beat["sent_ms"].as_u64().context("sent_ms")?;
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_millis() as u64;
    ensure!(told.abs_diff(now) > 2 * 3_600_000, "its clock is right: {told} at {now}");
    act(hands, seed, &[(1.5, Fault::Kill(WORKER, s(500)))]).await.map(drop)
}

/// Each body as a test on this ground.
macro_rules! tests_on {
    ($ground:expr) => {
        $crate::faults::tests_on! {
            $ground;
            a_worker_is_killed,
            a_worker_stands_still_and_goes_on,
            an_engine_is_killed_and_another_stands_still,
            the_active_dispatcher_is_killed_then_the_other,
            the_active_dispatcher_stands_still_longer_than_its_lease,
            the_dispatchers_are_asked_to_end_one_after_the_other,
            every_stream_loses_its_leader,
            a_server_in_lame_duck_mode_leaves,
            a_server_stands_still,
            workers_and_servers_lose_sight_of_each_other,
            lines_are_late_and_stall,
            hints_are_purged_and_consumers_deleted_by_hand,
            hints_are_dropped_doubled_late_and_out_of_order,
            two_faults_at_once,
            the_heir_is_killed_while_a_worker_drains,
            the_server_dies_while_a_worker_drains,
            the_next_owner_of_the_same_session_is_killed_too,
            fifty_workers_start_at_one_instant,
            clocks_are_wrong,
        }
    };
    ($ground:expr; $($name:ident),* $(,)?) => {
        $(
            #[tokio::test(flavor = "multi_thread")]
            async fn $name() -> anyhow::Result<()> {
                crate::faults::$name($ground).await
            }
        )*
    };
}

pub(crate) use tests_on;
