//! Jobs on their way: from a publish to the dispatcher, from the dispatcher to a worker; nothing lost, nothing acked early.

use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use async_nats::jetstream::{self, consumer::pull};
use bytes::Bytes;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    time::timeout,
};
use voxfleet_harness::{
    relay::Relay,
    server::{Cluster, NatsServer},
    wait::eventually,
};
use voxfleet_nats::{
    Nats, ServerError,
    jobs::{self, BadPriority, JobIntake, JobMessage, Work, WorkError, WorkPull},
    topology::{self, TopologyConfig, names},
    transcript::{Chain, Outcome},
};
use voxfleet_schema::{
    codec,
    id::{Kind, StreamId, WorkerName},
    job::{JobRequest, WorkItem},
    session::{Priority, SessionOptions},
    transcript::Final,
};

use super::{
    nats_chain::a_final,
    nats_topology::{connected, ready, worker},
};

const SOON: Duration = Duration::from_secs(10);
const SHORT: Duration = Duration::from_millis(300);

fn job(text: &str) -> Result<StreamId> {
    Ok(StreamId::new(text)?)
}

fn item(id: &str, epoch: u64) -> Result<WorkItem> {
    Ok(WorkItem {
        job: job(id)?,
        epoch,
        attempt: 1,
        audio: "object://asr_media/audio/x".into(),
        name: None,
        options: SessionOptions::default(),
        model_asked: None,
        submitted_ms: 1,
        assigned_ms: 2,
        suspect: false,
        part: None,
        traceparent: None,
    })
}

async fn left(js: &jetstream::Context, stream: &str) -> Result<u64> {
    Ok(js.get_stream(stream).await?.get_info().await?.state.messages)
}

async fn empty(js: &jetstream::Context, stream: &str) -> Result<()> {
    eventually("the queue is empty", SOON, || async { (left(js, stream).await.ok()? == 0).then_some(()) }).await?;
    Ok(())
}

async fn submit(nats: &Nats, priority: Priority, id: &str, body: &'static [u8]) -> Result<u64> {
    Ok(jobs::publish_job(nats, priority, &job(id)?, codec::JSON, Bytes::from_static(body), None).await?)
}

async fn next(intake: &mut JobIntake) -> Result<JobMessage> {
    Ok(timeout(SOON, intake.next()).await.context("no job comes")??)
}

async fn nothing(intake: &mut JobIntake) -> Result<()> {
    match timeout(SHORT, intake.next()).await {
        Err(_) => Ok(()),
        Ok(job) => bail!("{:?}", job?),
    }
}

/// Shortens the time after which what is not acked comes again.
async fn ack_wait(js: &jetstream::Context, stream: &str, consumer: &str, wait: Duration) -> Result<()> {
    let found = js.get_stream(stream).await?.consumer_info(consumer).await?.config;
    let config = pull::Config {
        durable_name: Some(consumer.to_owned()),
        ack_wait: wait,
        ack_policy: found.ack_policy,
        filter_subject: found.filter_subject,
        max_ack_pending: found.max_ack_pending,
        ..pull::Config::default()
    };
    js.get_stream(stream).await?.create_consumer(config).await?;
    Ok(())
}

async fn jobs_arrive(nats: &Nats, js: &jetstream::Context) -> Result<()> {
    let mut intake = JobIntake::new(nats);
    let seq = submit(nats, Priority::High, "j-1", br#"{"audio":"https://h/a.wav"}"#).await?;
    let first = next(&mut intake).await?;
    ensure!(first.priority == Ok(Priority::High) && first.id == Ok(job("j-1")?) && first.seq == seq, "{first:?}");
    ensure!(first.content_type.as_deref() == Some(codec::JSON) && first.delivered == 1);
    let request = JobRequest::decode(&first.payload, first.content_type.as_deref())?;
    ensure!(request.audio.as_deref() == Some("https://h/a.wav"));
    ensure!(left(js, names::JOBS).await? == 1, "it is the queue's until it is acked");
    first.ack.done().await?;
    empty(js, names::JOBS).await?;

    // Later is later, and the same again.
    submit(nats, Priority::Low, "j-2", b"x").await?;
    next(&mut intake).await?.ack.later(Duration::from_secs(3)).await?;
    nothing(&mut intake).await?;
    let again = next(&mut intake).await?;
    ensure!(again.id == Ok(job("j-2")?) && again.delivered == 2 && again.priority == Ok(Priority::Low), "{again:?}");

    // Dropped without a word, it comes again when its ack is due.
    ack_wait(js, names::JOBS, "dispatcher", Duration::from_secs(1)).await?;
    drop(again);
    let again = next(&mut intake).await?;
    ensure!(again.delivered == 3, "{again:?}");
    again.ack.done().await?;
    empty(js, names::JOBS).await?;
    Ok(())
}

#[tokio::test]
async fn a_job_is_the_queues_until_it_is_acked_on_one_server() -> Result<()> {
    let server = NatsServer::start().await?;
    let nats = ready(vec![server.url()], 1).await?;
    jobs_arrive(&nats, &server.jetstream().await?).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_is_the_queues_until_it_is_acked_on_three_servers() -> Result<()> {
    let cluster = Cluster::start(3).await?;
    let nats = ready(cluster.urls(), 3).await?;
    jobs_arrive(&nats, &cluster.jetstream().await?).await
}

#[tokio::test]
async fn subjects_of_strangers_are_told_as_such_or_taken_by_no_stream() -> Result<()> {
    let server = NatsServer::start().await?;
    let nats = ready(vec![server.url()], 1).await?;
    let js = server.jetstream().await?;
    for refused in ["asr.v1.jobs", "asr.v1.jobs.normal", "asr.v1.jobs.normal.a.b", "asr.v1.jobs.high.a.b.c"] {
        let answer = js.publish(refused.to_owned(), "{}".into()).await?.await;
        ensure!(answer.is_err(), "{refused} was taken: {answer:?}");
    }
    let mut intake = JobIntake::new(&nats);
    for (subject, priority, id) in [
        ("asr.v1.jobs.urgent.j", Err("urgent"), true),
        ("asr.v1.jobs.High.j", Err("High"), true),
        ("asr.v1.jobs.unknown.j", Err("unknown"), true),
        ("asr.v1.jobs.low.é", Ok(Priority::Low), false),
        ("asr.v1.jobs.normal.>", Ok(Priority::Normal), false),
        ("asr.v1.jobs.normal.*", Ok(Priority::Normal), false),
    ] {
        js.publish(subject.to_owned(), "{}".into()).await?.await?;
        let job = next(&mut intake).await?;
        ensure!(job.priority == priority.map_err(|text| BadPriority(text.to_owned())), "{subject}: {job:?}");
        ensure!(job.id.is_ok() == id, "{subject}: {job:?}");
        job.ack.done().await?;
    }
    empty(&js, names::JOBS).await?;
    // The intake is nobody's worker.
    ensure!(topology::list_worker_consumers(&nats).await?.is_empty());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_intake_survives_everything() -> Result<()> {
    let mut server = NatsServer::start().await?;
    let relay = Relay::start(&server.url()).await?;
    let (near, far) = (ready(vec![server.url()], 1).await?, connected(vec![relay.url()]).await?);
    let js = server.jetstream().await?;
    let mut intake = JobIntake::new(&far);
    // What was sent to a connection that was cut comes again after this, not after half a minute. The intake makes its
    // consumer while somebody waits for a job.
    let shortened = async {
        eventually("the intake has its consumer", SOON, || async {
            ack_wait(&js, names::JOBS, "dispatcher", Duration::from_secs(1)).await.ok()
        })
        .await?;
        submit(&near, Priority::Normal, "before", b"{}").await
    };
    let (shortened, before) = tokio::join!(shortened, next(&mut intake));
    shortened?;
    before?.ack.done().await?;

    relay.reset();
    submit(&near, Priority::Normal, "reset", b"{}").await?;
    let job = next(&mut intake).await.context("reset")?;
    ensure!(job.id?.as_str() == "reset");
    job.ack.done().await?;

    js.get_stream(names::JOBS).await?.delete_consumer("dispatcher").await?;
    submit(&near, Priority::Normal, "deleted", b"{}").await?;
    let job = next(&mut intake).await.context("deleted")?;
    ensure!(job.id?.as_str() == "deleted");
    job.ack.done().await?;

    // What is in the queue stays in it, whoever is killed.
    ack_wait(&js, names::JOBS, "dispatcher", Duration::from_secs(1)).await?;
    submit(&near, Priority::Normal, "restart", b"{}").await?;
    let waiting = next(&mut intake).await?;
    server.restart().await?;
    let kept = eventually("the server answers", SOON, || async { left(&js, names::JOBS).await.ok() }).await?;
    ensure!(kept == 1, "{kept} left");
    ensure!(waiting.id?.as_str() == "restart");
    // The killed server may have forgotten that it gave it out: then its ack is not taken, and it comes again.
    if waiting.ack.done().await.is_err() {
        let again = next(&mut intake).await.context("again")?;
        ensure!(again.id?.as_str() == "restart");
        again.ack.done().await?;
    }
    empty(&js, names::JOBS).await?;
    submit(&near, Priority::Normal, "after", b"{}").await?;
    let job = next(&mut intake).await.context("after")?;
    ensure!(job.id?.as_str() == "after");
    job.ack.done().await?;

    // The whole stream, as after a lost disk.
    js.delete_stream(names::JOBS).await?;
    nothing(&mut intake).await?;
    topology::ensure(&near, &TopologyConfig::default()).await?;
    submit(&near, Priority::Normal, "anew", b"{}").await?;
    let job = next(&mut intake).await?;
    ensure!(job.id?.as_str() == "anew");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dispatcher_that_went_takes_nothing_with_it() -> Result<()> {
    let server = NatsServer::start().await?;
    let (first, second) = (ready(vec![server.url()], 1).await?, connected(vec![server.url()]).await?);
    let js = server.jetstream().await?;
    let mut intake = JobIntake::new(&first);
    let stream = js.get_stream(names::JOBS).await?;
    let pulling = eventually("it pulls", SOON, || async {
        (stream.consumer_info("dispatcher").await.ok()?.num_waiting > 0).then_some(())
    });
    tokio::select! {
        pulling = pulling => pulling?,
        job = intake.next() => bail!("{:?}", job?),
    }
    drop(intake);
    eventually("its pull has ended", SOON, || async {
        (stream.consumer_info("dispatcher").await.ok()?.num_waiting == 0).then_some(())
    })
    .await?;
    for n in 0..20 {
        submit(&second, Priority::Normal, &format!("j-{n}"), b"{}").await?;
    }
    let mut intake = JobIntake::new(&second);
    for n in 0..20 {
        let job = next(&mut intake).await?;
        ensure!(job.id?.as_str() == format!("j-{n}") && job.delivered == 1);
        job.ack.done().await?;
    }
    empty(&js, names::JOBS).await
}

/// Header bytes that no client library would send, straight from a socket.
#[tokio::test(flavor = "multi_thread")]
async fn a_job_with_unreadable_headers_costs_only_itself() -> Result<()> {
    let server = NatsServer::start().await?;
    let nats = ready(vec![server.url()], 1).await?;
    let mut socket = tokio::net::TcpStream::connect(("127.0.0.1", server.port())).await?;
    let headers = b"NATS/1.0\r\nContent-Type: \xff\xfe\r\n\r\n";
    let mut command = b"CONNECT {\"verbose\":false,\"headers\":true}\r\n".to_vec();
    command.extend(format!("HPUB asr.v1.jobs.low.evil {} {}\r\n", headers.len(), headers.len() + 2).bytes());
    command.extend(headers);
    command.extend(b"ab\r\nPING\r\n");
    socket.write_all(&command).await?;
    let (mut answer, mut heard) = (vec![0; 4_096], String::new());
    while !heard.contains("PONG") {
        let read = timeout(SOON, socket.read(&mut answer)).await??;
        ensure!(read > 0, "the server hung up: {heard}");
        heard.push_str(&String::from_utf8_lossy(&answer[..read]));
    }
    let js = server.jetstream().await?;
    eventually("the evil job is stored", SOON, || async { (left(&js, names::JOBS).await.ok()? == 1).then_some(()) })
        .await?;
    submit(&nats, Priority::Normal, "good", b"{}").await?;
    let mut intake = JobIntake::new(&nats);
    // Sent once, unread, the evil one is due again only after a while; a deployment's half minute is a second here.
    let shortened = eventually("the intake has its consumer", SOON, || async {
        ack_wait(&js, names::JOBS, "dispatcher", Duration::from_secs(1)).await.ok()
    });
    let mut found = Vec::new();
    let intaking = async {
        while found.len() < 2 {
            let job = intake.next().await?;
            let id = job.id.clone()?.as_str().to_owned();
            if job.ack.done().await.is_ok() && !found.contains(&id) {
                found.push(id);
            }
        }
        Ok::<_, anyhow::Error>(())
    };
    let (shortened, taken) = tokio::join!(shortened, timeout(3 * SOON, intaking));
    shortened?;
    taken.context("not both come")??;
    found.sort();
    ensure!(found == ["evil", "good"], "{found:?}");
    empty(&js, names::JOBS).await?;
    submit(&nats, Priority::Normal, "next", b"{}").await?;
    ensure!(next(&mut intake).await?.id?.as_str() == "next");
    Ok(())
}

async fn take(pull: &mut WorkPull) -> Result<Work> {
    Ok(timeout(SOON, pull.next(1)).await.context("no work comes")??)
}

async fn no_work(pull: &mut WorkPull) -> Result<()> {
    match timeout(SHORT, pull.next(1)).await {
        Err(_) => Ok(()),
        Ok(work) => bail!("{:?}", work?),
    }
}

fn consumer(worker: &WorkerName) -> String {
    format!("{}={}", worker.gpu_id, worker.incarnation)
}

async fn work_arrives(nats: &Nats, js: &jetstream::Context) -> Result<()> {
    let (w, other) = (worker("gpu-1", "a")?, worker("gpu-1", "b")?);
    let mut pull = WorkPull::new(nats, &w);
    no_work(&mut pull).await.context("there is no consumer yet")?;
    topology::ensure_worker(nats, &w, 1).await?;
    ensure!(jobs::queued_work(nats, &w, &job("j")?).await?.is_none());
    let given = item("j", 3)?;
    let seq = jobs::publish_work(nats, &w, &given).await?;
    ensure!(jobs::publish_work(nats, &w, &given).await? == seq, "the same again is the same");
    ensure!(jobs::queued_work(nats, &w, &job("j")?).await?.as_ref() == Some(&given));
    ensure!(jobs::queued_work(nats, &other, &job("j")?).await?.is_none());

    let work = take(&mut pull).await?;
    ensure!(work.id == given.job && work.item? == given && work.seq == seq && work.delivered == 1);
    ensure!(jobs::queued_work(nats, &w, &job("j")?).await?.is_some(), "taken is not done");
    // One slot, one claim.
    jobs::publish_work(nats, &w, &item("k", 1)?).await?;
    no_work(&mut pull).await?;
    work.ack.done().await?;
    // On a cluster the queue follows its consumer a moment later.
    let id = job("j")?;
    eventually("what is done leaves the queue", SOON, || async {
        jobs::queued_work(nats, &w, &id).await.ok()?.is_none().then_some(())
    })
    .await?;
    let work = take(&mut pull).await?;
    ensure!(work.id.as_str() == "k");
    work.ack.term("nobody\nwants it").await?;
    empty(js, names::WORK).await?;

    // An item that was acked can be given again at once.
    jobs::publish_work(nats, &w, &given).await?;
    take(&mut pull).await?.ack.done().await?;
    empty(js, names::WORK).await?;

    // A newer epoch replaces an older one, never the other way round.
    jobs::publish_work(nats, &w, &given).await?;
    let newer = item("j", 4)?;
    jobs::publish_work(nats, &w, &newer).await?;
    match jobs::publish_work(nats, &w, &given).await {
        Err(WorkError::Newer { epoch: 4 }) => {}
        other => bail!("{other:?}"),
    }
    ensure!(left(js, names::WORK).await? == 1);
    let work = take(&mut pull).await?;
    ensure!(work.item? == newer);
    jobs::purge_work(nats, &w, &job("j")?).await?;
    ensure!(jobs::queued_work(nats, &w, &job("j")?).await?.is_none());
    work.ack.done().await?;
    Ok(())
}

#[tokio::test]
async fn work_is_queued_until_it_is_done_on_one_server() -> Result<()> {
    let server = NatsServer::start().await?;
    let nats = ready(vec![server.url()], 1).await?;
    work_arrives(&nats, &server.jetstream().await?).await
}

#[tokio::test(flavor = "multi_thread")]
async fn work_is_queued_until_it_is_done_on_three_servers() -> Result<()> {
    let cluster = Cluster::start(3).await?;
    let nats = ready(cluster.urls(), 3).await?;
    work_arrives(&nats, &cluster.jetstream().await?).await
}

#[tokio::test(flavor = "multi_thread")]
async fn progress_keeps_a_claim_and_silence_loses_it() -> Result<()> {
    const WAIT: Duration = Duration::from_secs(3);
    let server = NatsServer::start().await?;
    let nats = ready(vec![server.url()], 1).await?;
    let js = server.jetstream().await?;
    let w = worker("gpu-1", "a")?;
    topology::ensure_worker(&nats, &w, 2).await?;
    ack_wait(&js, names::WORK, &consumer(&w), WAIT).await?;
    jobs::publish_work(&nats, &w, &item("j", 1)?).await?;
    let mut pull = WorkPull::new(&nats, &w);
    let work = take(&mut pull).await?;
    let mut ticks = tokio::time::interval(WAIT / 4);
    let end = tokio::time::Instant::now() + 2 * WAIT;
    while tokio::time::Instant::now() < end {
        tokio::select! {
            _ = ticks.tick() => work.ack.progress().await?,
            again = pull.next(1) => bail!("it came again: {:?}", again?),
        }
    }
    // The worker falls silent.
    let again = take(&mut pull).await?;
    ensure!(again.seq == work.seq && again.delivered == 2, "{again:?}");
    again.ack.clone().later(Duration::from_millis(1)).await?;
    let again = take(&mut pull).await?;
    ensure!(again.delivered == 3, "{again:?}");

    // A dead incarnation's ack is told that it came too late.
    topology::remove_worker(&nats, &w).await?;
    match again.ack.done().await {
        Err(ServerError::NoResponders(_) | ServerError::Timeout) => {}
        other => bail!("{other:?}"),
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_of_work_survives_lost_connections_and_restarts() -> Result<()> {
    let mut server = NatsServer::start().await?;
    let relay = Relay::start(&server.url()).await?;
    let (near, far) = (ready(vec![server.url()], 1).await?, connected(vec![relay.url()]).await?);
    let (js, w) = (server.jetstream().await?, worker("gpu-1", "a")?);
    topology::ensure_worker(&near, &w, 1).await?;
    ack_wait(&js, names::WORK, &consumer(&w), Duration::from_secs(4)).await?;
    let mut pull = WorkPull::new(&far, &w);
    no_work(&mut pull).await?;
    relay.reset();
    jobs::publish_work(&near, &w, &item("a", 1)?).await?;
    take(&mut pull).await?.ack.done().await?;
    jobs::publish_work(&near, &w, &item("b", 1)?).await?;
    let work = take(&mut pull).await?;
    server.restart().await?;
    eventually("the server answers", SOON, || async { left(&js, names::WORK).await.ok() }).await?;
    // The killed server may have forgotten that it gave it out: then its ack is not taken, and it comes again.
    if work.ack.done().await.is_err() {
        let again = take(&mut pull).await.context("again")?;
        ensure!(again.id.as_str() == "b");
        again.ack.done().await?;
    }
    ensure!(jobs::queued_work(&near, &w, &job("b")?).await?.is_none());
    jobs::publish_work(&near, &w, &item("c", 1)?).await?;
    let work = take(&mut pull).await?;
    ensure!(work.id.as_str() == "c");
    Ok(())
}

#[tokio::test]
async fn what_is_no_work_item_is_for_its_receiver_to_end() -> Result<()> {
    let server = NatsServer::start().await?;
    let nats = ready(vec![server.url()], 1).await?;
    let js = server.jetstream().await?;
    let w = worker("gpu-1", "a")?;
    topology::ensure_worker(&nats, &w, 1).await?;
    js.publish("asr.v1.gpu.gpu-1.a.job.j", "not a map".into()).await?.await?;
    ensure!(matches!(jobs::queued_work(&nats, &w, &job("j")?).await, Err(WorkError::Malformed { .. })));
    let mut pull = WorkPull::new(&nats, &w);
    let work = take(&mut pull).await?;
    ensure!(work.id.as_str() == "j" && work.item.is_err(), "{work:?}");
    work.ack.term("unreadable").await?;
    empty(&js, names::WORK).await?;
    // One that names no job is ended here.
    js.publish("asr.v1.gpu.gpu-1.a.job.é", "x".into()).await?.await?;
    jobs::publish_work(&nats, &w, &item("ok", 1)?).await?;
    ensure!(take(&mut pull).await?.id.as_str() == "ok");
    ensure!(left(&js, names::WORK).await? == 1);
    // What stands in the way of a real item gives way to it.
    js.publish("asr.v1.gpu.gpu-1.a.job.k", "not a map".into()).await?.await?;
    jobs::publish_work(&nats, &w, &item("k", 1)?).await?;
    ensure!(jobs::queued_work(&nats, &w, &job("k")?).await? == Some(item("k", 1)?));
    Ok(())
}

#[tokio::test]
async fn a_chain_is_read_link_by_link() -> Result<()> {
    let server = NatsServer::start().await?;
    let nats = ready(vec![server.url()], 1).await?;
    let (chain, id, other) = (Chain::new(&nats), job("j")?, job("other")?);
    ensure!(chain.next_final(Kind::Job, &id, 0).await?.is_none());
    let (mut mine, mut others) = (None, None);
    for index in 0..5 {
        for (id, before) in [(&id, &mut mine), (&other, &mut others)] {
            let link = Final { kind: Kind::Job, ..a_final(id.as_str(), index, 1)? };
            match chain.store(&link, *before).await? {
                Outcome::Stored { seq, .. } => *before = Some(seq),
                other => bail!("{other:?}"),
            }
        }
    }
    let (mut from, mut found) = (0, Vec::new());
    while let Some(stored) = chain.next_final(Kind::Job, &id, from).await? {
        ensure!(stored.value.id == id && stored.seq >= from.max(1));
        found.push(stored.value.index);
        from = stored.seq + 1;
    }
    ensure!(found == [0, 1, 2, 3, 4], "{found:?}");
    ensure!(chain.next_final(Kind::Session, &id, 0).await?.is_none(), "a session of that name is another one");
    Ok(())
}
