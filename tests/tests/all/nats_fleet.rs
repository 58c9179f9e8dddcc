//! Heartbeats, control, records, the lease and the API on a real server.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use tokio::time::timeout;
use voxfleet_harness::{
    server::{Cluster, NatsServer},
    wait::eventually,
};
use voxfleet_nats::{
    Nats, ServerError,
    api::{self, ApiError, ApiServer, Endpoint},
    fleet::{self, FleetError},
    kv::{Bucket, KvError, Records, Watch},
    lease::{Lease, Standing},
    publish::Publisher,
    topology::names,
    transcript::{self, Filter, Start},
};
use voxfleet_schema::{
    event::{Event, Scope, What},
    failure::FailureClass,
    fleet::{ControlReply, ControlRequest, Device, EngineRunState, EngineState, Heartbeat, Provider, Slots},
    id::{Kind, StreamId},
    session::{Reply, SessionRequest},
    transcript::{Partial, SpeakersBy, VadKind},
};

use super::nats_topology::{connected, ready, worker};

const SOON: Duration = Duration::from_secs(10);

fn heartbeat(gpu: &str) -> Result<Heartbeat> {
    let w = worker(gpu, "a")?;
    Ok(Heartbeat {
        gpu_id: w.gpu_id,
        incarnation: w.incarnation,
        seq: 0,
        sent_ms: 0,
        started_ms: 0,
        beat_ms: 0,
        host: "h".into(),
        pid: 1,
        provider: Provider::Local,
        device: Device {
            index: None,
            name: "cpu".into(),
            uuid: None,
            total_mb: 1,
            free_mb: 1,
            used_mb: 0,
            used_by_others_mb: 0,
            temperature_c: None,
            power_w: None,
            utilization: None,
            ..Device::default()
        },
        slots: Slots { total: 1, used: 0 },
        job_slots: Slots { total: 0, used: 0 },
        held: Vec::new(),
        given_up: Vec::new(),
        models: Vec::new(),
        default_model: None,
        engine: EngineState {
            state: EngineRunState::Ready,
            kind: "simulated".into(),
            effective_device: "cpu".into(),
            vad: VadKind::Energy,
            speakers: SpeakersBy::None,
            ms_since_progress: 0,
            restarts: 0,
            crashes: 0,
            decode_rate: None,
            decode_rate_age_ms: None,
            delivery_rate: None,
            neighbour_ms: 0,
            ..EngineState::default()
        },
        draining: false,
        drain: None,
        price_per_hour: None,
        version: "0".into(),
    })
}

#[tokio::test]
async fn heartbeats_are_heard_and_forged_ones_told() -> Result<()> {
    let server = NatsServer::start().await?;
    let nats = connected(vec![server.url()]).await?;
    let mut heard = fleet::heartbeats(&nats).await?;
    let sent = heartbeat("gpu-1")?;
    fleet::heartbeat_publish(&nats, &sent).await?;
    ensure!(timeout(SOON, heard.next()).await?? == sent);

    let client = server.client().await?;
    client.publish("asr.v1.heartbeat.gpu-1", "rubbish".into()).await?;
    client.publish("asr.v1.heartbeat.gpu-2", serde_json::to_vec(&sent)?.into()).await?;
    client.flush().await?;
    ensure!(matches!(timeout(SOON, heard.next()).await?, Err(FleetError::Malformed { .. })));
    ensure!(matches!(timeout(SOON, heard.next()).await?, Err(FleetError::WrongSubject { .. })));
    fleet::heartbeat_publish(&nats, &sent).await?;
    ensure!(timeout(SOON, heard.next()).await?? == sent);
    Ok(())
}

#[tokio::test]
async fn control_requests_reach_one_incarnation() -> Result<()> {
    let server = NatsServer::start().await?;
    let (nats, far) = (connected(vec![server.url()]).await?, connected(vec![server.url()]).await?);
    let w = worker("gpu-1", "a")?;
    let nobody = fleet::control(&nats, &w, &ControlRequest::Renew, SOON).await;
    ensure!(matches!(nobody, Err(FleetError::Server(ServerError::NoResponders(_)))), "{nobody:?}");

    let mut server_side = fleet::serve_control(&far, &w).await?;
    let mut tasks = tokio::task::JoinSet::new();
    tasks.spawn(async move {
        while let Some((request, responder)) = server_side.next().await {
            if request == ControlRequest::Renew {
                responder.reply(&ControlReply::Done).await?;
            }
        }
        Ok::<_, FleetError>(())
    });
    ensure!(fleet::control(&nats, &w, &ControlRequest::Renew, SOON).await? == ControlReply::Done);
    let silent = fleet::control(&nats, &w, &ControlRequest::Unknown, Duration::from_millis(200)).await;
    ensure!(matches!(silent, Err(FleetError::Server(ServerError::Timeout))), "{silent:?}");
    let answer = server.client().await?.request("asr.v1.control.gpu-1.a", "rubbish".into()).await?;
    let reply: ControlReply = serde_json::from_slice(&answer.payload)?;
    ensure!(matches!(reply, ControlReply::Refused(f) if f.class == FailureClass::BadRequest));
    Ok(())
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Record {
    n: u64,
}

async fn change(watch: &mut Watch<Record>) -> Result<(String, Option<u64>)> {
    let change = timeout(SOON, async {
        loop {
            if let Ok(change) = watch.next().await {
                return change;
            }
        }
    });
    let change = change.await.context("the watch is silent")?;
    Ok((change.key, change.value.map(|r| r.n)))
}

async fn records(nats: &Nats) -> Result<()> {
    let records = Records::<Record>::new(nats, Bucket::Sessions);
    ensure!(records.all().await?.is_empty() && records.get("a").await?.is_none());
    let first = records.create("a", &Record { n: 1 }).await?;
    ensure!(matches!(records.create("a", &Record { n: 2 }).await, Err(KvError::Conflict { .. })));
    let second = records.update("a", &Record { n: 2 }, first).await?;
    ensure!(matches!(records.update("a", &Record { n: 3 }, first).await, Err(KvError::Conflict { .. })));
    let found = records.get("a").await?.context("no record")?;
    ensure!(found.value.n == 2 && found.revision == second);
    // Two at once: one wins.
    let (x, y) = (Record { n: 10 }, Record { n: 11 });
    let (x, y) = tokio::join!(records.update("a", &x, second), records.update("a", &y, second));
    ensure!(x.is_ok() != y.is_ok(), "{x:?} {y:?}");

    records.put("b.c", &Record { n: 7 }).await?;
    records.delete("a", None).await?;
    ensure!(records.get("a").await?.is_none());
    ensure!(records.all().await?.iter().map(|(key, r)| (key.as_str(), r.value.n)).eq([("b.c", 7)]));
    records.create("a", &Record { n: 4 }).await.context("a deleted key can be made again")?;
    ensure!(matches!(records.get("a b").await, Err(KvError::BadKey)));

    let mut watch = records.watch();
    ensure!(change(&mut watch).await? == ("b.c".into(), Some(7)));
    // It may stand on a server that has not stored the last change yet: there `a` is deleted first.
    let last = loop {
        match change(&mut watch).await? {
            (key, None) if key == "a" => {}
            last => break last,
        }
    };
    ensure!(last == ("a".into(), Some(4)), "{last:?}");
    records.delete("b.c", None).await?;
    ensure!(change(&mut watch).await? == ("b.c".into(), None));
    Ok(())
}

#[tokio::test]
async fn records_compare_and_set_on_one_server() -> Result<()> {
    let server = NatsServer::start().await?;
    let nats = ready(vec![server.url()], 1).await?;
    records(&nats).await?;
    // One unreadable value hides nothing else.
    server.jetstream().await?.get_key_value("asr_sessions").await?.put("bad", "rubbish".into()).await?;
    let records = Records::<Record>::new(&nats, Bucket::Sessions);
    ensure!(records.all().await?.len() == 1);
    ensure!(matches!(records.get("bad").await, Err(KvError::Malformed { .. })));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn records_compare_and_set_on_three_servers() -> Result<()> {
    let cluster = Cluster::start(3).await?;
    records(&ready(cluster.urls(), 3).await?).await
}

/// A reader's consumer may stand on a server that has not stored what the leader has confirmed.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_confirmed_is_read_wherever_the_reader_stands() -> Result<()> {
    let cluster = Cluster::start(3).await?;
    let nats = ready(cluster.urls(), 3).await?;
    let records = Records::<Record>::new(&nats, Bucket::Sessions);
    for n in 0..300 {
        records.put("a", &Record { n }).await?;
        let all = records.all().await?;
        ensure!(all.len() == 1 && all[0].1.value.n == n, "{n} was confirmed, and read was {all:?}");
    }
    Ok(())
}

/// Where two are read at once, each message of one ends the wait for the other's: its consumer must not be made anew each time.
#[tokio::test]
async fn who_waits_in_many_short_moments_has_one_consumer() -> Result<()> {
    let server = NatsServer::start().await?;
    let nats = ready(vec![server.url()], 1).await?;
    let records = Records::<Record>::new(&nats, Bucket::Sessions);
    records.put("a", &Record { n: 1 }).await?;
    let mut watch = records.watch();
    let until = Instant::now() + Duration::from_secs(10);
    let found = loop {
        ensure!(Instant::now() < until, "nothing comes");
        tokio::select! {
            biased;
            change = watch.next() => break change?,
            () = tokio::task::yield_now() => {}
        }
    };
    ensure!(found.key == "a" && found.value.is_some_and(|record| record.n == 1));
    let consumers = server.jetstream().await?.get_stream("KV_asr_sessions").await?.cached_info().state.consumer_count;
    ensure!(consumers == 1, "{consumers} consumers");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_misses_nothing_across_a_killed_server() -> Result<()> {
    let mut server = NatsServer::start().await?;
    let nats = ready(vec![server.url()], 1).await?;
    let records = Records::<Record>::new(&nats, Bucket::Fleet);
    let mut watch = records.watch();
    records.put("a", &Record { n: 1 }).await?;
    ensure!(change(&mut watch).await? == ("a".into(), Some(1)));
    server.restart().await?;
    let other = ready(vec![server.url()], 1).await?;
    Records::new(&other, Bucket::Fleet).put("b", &Record { n: 2 }).await?;
    ensure!(change(&mut watch).await? == ("b".into(), Some(2)));
    Ok(())
}

#[tokio::test]
async fn the_lease_has_one_holder_and_moves_on() -> Result<()> {
    let server = NatsServer::start().await?;
    let nats = ready(vec![server.url()], 1).await?;
    let ttl = Duration::from_secs(3);
    let (mut one, mut two) = (Lease::new(&nats, "d1", ttl), Lease::new(&nats, "d2", ttl));
    ensure!(one.renew().await? == Standing::Leader && one.is_leader(Instant::now()));
    let follower = Standing::Follower { holder: Some("d1".into()) };
    ensure!(two.renew().await? == follower && !two.is_leader(Instant::now()));
    // Before it looks for the last time: its clock runs from that look on.
    let begun = Instant::now();
    ensure!(one.renew().await? == Standing::Leader && two.renew().await? == follower);
    ensure!(!one.is_leader(Instant::now() + ttl), "a holder that does not renew is none");

    // The holder stops; the other takes over when its own clock says so, not before.
    while two.renew().await? != Standing::Leader {
        ensure!(begun.elapsed() < SOON, "the lease is never free");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    ensure!(begun.elapsed() >= ttl, "{:?}", begun.elapsed());
    ensure!(one.renew().await? == Standing::Follower { holder: Some("d2".into()) } && !one.is_leader(Instant::now()));
    two.release().await?;
    ensure!(!two.is_leader(Instant::now()) && one.renew().await? == Standing::Leader);
    Ok(())
}

#[tokio::test]
async fn a_lease_that_cannot_be_read_is_taken_over_like_one_that_stands_still() -> Result<()> {
    let server = NatsServer::start().await?;
    let nats = ready(vec![server.url()], 1).await?;
    server.jetstream().await?.publish("$KV.asr_control.lease", "junk".into()).await?.await?;
    let ttl = Duration::from_secs(1);
    let mut one = Lease::new(&nats, "d1", ttl);
    // Before its first look: its clock runs from that one on.
    let begun = Instant::now();
    ensure!(one.renew().await? == Standing::Follower { holder: Some("unreadable".into()) }, "not before its time");
    while one.renew().await? != Standing::Leader {
        ensure!(begun.elapsed() < SOON, "the lease is never free");
        tokio::task::yield_now().await;
    }
    ensure!(begun.elapsed() >= ttl, "{:?}", begun.elapsed());
    Ok(())
}

async fn ask(nats: &Nats, deadline: Duration) -> Result<SessionRequest, ApiError> {
    let request = SessionRequest { session: StreamId::new("call").map_err(|_| ApiError::Timeout)? };
    api::request(nats, Endpoint::SessionStatus, &request, deadline).await
}

#[tokio::test]
async fn the_api_is_answered_by_whoever_is_active() -> Result<()> {
    let server = NatsServer::start().await?;
    let nats = connected(vec![server.url()]).await?;
    // A server that is slow to say that nobody listens has said nothing yet.
    let nobody = eventually("the server says that nobody listens", SOON, || async {
        let nobody = ask(&nats, Duration::from_millis(300)).await;
        (!matches!(nobody, Err(ApiError::Timeout))).then_some(nobody)
    })
    .await?;
    ensure!(matches!(nobody, Err(ApiError::NoDispatcher)), "{nobody:?}");

    let (far, other) = (connected(vec![server.url()]).await?, connected(vec![server.url()]).await?);
    let mut standby = ApiServer::start(&far, "d1").await?;
    let mut tasks = tokio::task::JoinSet::new();
    tasks.spawn(async move { while standby.next().await.is_some() {} });
    let silent = ask(&nats, Duration::from_millis(300)).await;
    ensure!(matches!(silent, Err(ApiError::Timeout)), "{silent:?}");

    let mut active = ApiServer::start(&other, "d2").await?;
    tasks.spawn(async move {
        let mut calls = 0;
        while let Some((call, responder)) = active.next().await {
            calls += 1;
            let reply = match call.decode::<SessionRequest>() {
                // The first one is lost, as by a process that stops in between.
                Ok(_) if calls == 1 => continue,
                Ok(request) if call.endpoint == Endpoint::SessionStatus => Reply::Ok(request),
                Ok(_) => Reply::refuse(FailureClass::NotFound, "no such call"),
                Err(error) => Reply::refuse(FailureClass::BadRequest, error.to_string()),
            };
            if responder.reply(&reply).await.is_err() {
                return;
            }
        }
    });
    let begun = Instant::now();
    ensure!(ask(&nats, SOON).await?.session.as_str() == "call");
    ensure!(begun.elapsed() >= Duration::from_secs(1), "it was asked again");
    let refused: Result<SessionRequest, _> =
        api::request(&nats, Endpoint::SessionClose, &SessionRequest { session: StreamId::new("x")? }, SOON).await;
    match refused {
        Err(ApiError::Refused(failure)) => ensure!(failure.class == FailureClass::NotFound),
        other => bail!("{other:?}"),
    }
    let answer = server.client().await?.request("asr.v1.api.session.open", "[[".into()).await?;
    ensure!(String::from_utf8_lossy(&answer.payload).contains("bad_request"));
    Ok(())
}

/// One that does not answer must not take requests away from another of the same name.
#[tokio::test]
async fn dispatchers_of_one_name_hear_every_request() -> Result<()> {
    let server = NatsServer::start().await?;
    let nats = connected(vec![server.url()]).await?;
    let (far, other) = (connected(vec![server.url()]).await?, connected(vec![server.url()]).await?);
    let (mut standby, mut active) = (ApiServer::start(&far, "d").await?, ApiServer::start(&other, "d").await?);
    let mut tasks = tokio::task::JoinSet::new();
    let heard = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&heard);
    tasks.spawn(async move {
        while standby.next().await.is_some() {
            count.fetch_add(1, Ordering::Relaxed);
        }
    });
    tasks.spawn(async move {
        while let Some((call, responder)) = active.next().await {
            let Ok(request) = call.decode::<SessionRequest>() else { continue };
            if responder.reply(&Reply::Ok(request)).await.is_err() {
                return;
            }
        }
    });
    for _ in 0..20 {
        ask(&nats, SOON).await?;
    }
    // Answered by one, and heard by both.
    eventually("the standby has heard them", SOON, || async { (heard.load(Ordering::Relaxed) >= 20).then_some(()) })
        .await?;
    Ok(())
}

#[tokio::test]
async fn events_and_partials_are_read_by_whoever_comes_late() -> Result<()> {
    let server = NatsServer::start().await?;
    let nats = ready(vec![server.url()], 1).await?;
    let publisher = Publisher::new(&nats);
    let id = StreamId::new("call")?;
    let event = Event::new(Scope::Session, "call", What::Assigned, 1);
    publisher.event(&event).await?;
    publisher.event_once(&event, "once").await?;
    publisher.event_once(&event, "once").await?;
    publisher.event(&Event::new(Scope::Session, "a b", What::Rejected, 2)).await?;
    publisher.event(&Event::new(Scope::Fleet, "gpu-1", What::Joined, 3)).await?;
    let mut all = transcript::events(&nats, &Filter::All, Start::First);
    for what in [What::Assigned, What::Assigned, What::Rejected, What::Joined] {
        ensure!(timeout(SOON, all.next()).await??.value.what == what);
    }
    let mut partial = Partial {
        kind: Kind::Session,
        id: id.clone(),
        epoch: 1,
        gpu_id: worker("gpu-1", "a")?.gpu_id,
        after_index: None,
        from_sample: 0,
        to_sample: 1,
        committed: "one".into(),
        tentative: String::new(),
        lag_ms: 0,
        progress: None,
    };
    publisher.partial(&partial).await?;
    partial.committed = "one two".into();
    publisher.partial(&partial).await?;
    let mut live = transcript::partials(&nats, &Filter::One(Kind::Session, id.clone()), Start::First);
    let read = timeout(SOON, live.next()).await??;
    if read.value.committed == "one" {
        ensure!(timeout(SOON, live.next()).await??.value == partial);
    }
    let stream = server.jetstream().await?.get_stream(names::PARTIAL).await?;
    ensure!(stream.get_info().await?.state.messages == 1, "only the current one is kept");
    publisher.dead(Kind::Session, &id, &serde_json::json!({"why": "test"})).await?;
    Ok(())
}
