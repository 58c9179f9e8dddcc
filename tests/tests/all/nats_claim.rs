//! Hints from dispatcher to worker: in order, no more than there is room for, across lost connections and servers.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use tokio::time::timeout;
use voxfleet_harness::{
    relay::{Mode, Relay},
    server::{Cluster, NatsServer},
    wait::eventually,
};
use voxfleet_nats::{
    Nats,
    claim::{Hint, LivePull},
    log::AudioLog,
    publish::{HintSent, Publisher},
    topology::{self, TopologyConfig, names},
};
use voxfleet_schema::{
    audio::RawEntry,
    id::{StreamId, WorkerName},
};

use super::nats_topology::{connected, ready, worker};

const SOON: Duration = Duration::from_secs(10);

fn entry(seq: u64) -> RawEntry {
    RawEntry { seq, headers: vec![("Asr-Source".into(), "s".into())], payload: Bytes::from(seq.to_le_bytes().to_vec()) }
}

async fn take(pull: &mut LivePull, free: usize) -> Result<Hint> {
    Ok(timeout(SOON, pull.next(free)).await.context("no hint comes")??)
}

async fn hints_arrive(nats: &Nats) -> Result<()> {
    let (w, other) = (worker("gpu-1", "a")?, worker("gpu-1", "b")?);
    for w in [&w, &other] {
        topology::ensure_worker(nats, w, 1).await?;
    }
    let (publisher, id) = (Publisher::new(nats), StreamId::new("call")?);
    let mut pull = LivePull::new(nats, &w);
    for seq in 1..=500u64 {
        let prev = (seq > 1).then(|| seq - 1);
        ensure!(publisher.hint(&w, &id, &entry(seq), prev).await == HintSent::Sent);
        ensure!(publisher.hint(&other, &id, &entry(seq), prev).await == HintSent::Sent);
    }
    for seq in 1..=500u64 {
        let hint = take(&mut pull, 64).await?;
        ensure!(hint.id == id && hint.entry == entry(seq) && hint.prev == (seq > 1).then(|| seq - 1), "{hint:?}");
    }
    ensure!(timeout(Duration::from_millis(200), pull.next(64)).await.is_err(), "another worker's hints came");
    ensure!(publisher.hints_failed() == 0);
    Ok(())
}

#[tokio::test]
async fn hints_arrive_in_order_on_one_server() -> Result<()> {
    let server = NatsServer::start().await?;
    let nats = ready(vec![server.url()], 1).await?;
    hints_arrive(&nats).await?;
    // All are acked; only the other worker's are left.
    let js = server.jetstream().await?;
    eventually("acks arrive", SOON, || async {
        let messages = js.get_stream(names::LIVE).await.ok()?.get_info().await.ok()?.state.messages;
        (messages == 500).then_some(())
    })
    .await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn hints_arrive_in_order_on_three_servers() -> Result<()> {
    let cluster = Cluster::start(3).await?;
    hints_arrive(&ready(cluster.urls(), 3).await?).await
}

#[tokio::test]
async fn no_more_is_taken_than_there_is_room_for() -> Result<()> {
    let server = NatsServer::start().await?;
    let nats = ready(vec![server.url()], 1).await?;
    let w = worker("gpu-1", "a")?;
    topology::ensure_worker(&nats, &w, 1).await?;
    let (publisher, id) = (Publisher::new(&nats), StreamId::new("call")?);
    for seq in 1..=20 {
        publisher.hint(&w, &id, &entry(seq), None).await;
    }
    let js = server.jetstream().await?;
    eventually("all hints are stored", SOON, || async {
        let stored = js.get_stream(names::LIVE).await.ok()?.get_info().await.ok()?.state.last_sequence;
        (stored == 20).then_some(())
    })
    .await?;
    let mut pull = LivePull::new(&nats, &w);
    take(&mut pull, 1).await?;
    let live = js.get_stream(names::LIVE).await?;
    let info = live.consumer_info("gpu-1=a").await?;
    ensure!(info.delivered.consumer_sequence == 1 && info.num_pending == 19, "{info:?}");
    take(&mut pull, 3).await?;
    let info = live.consumer_info("gpu-1=a").await?;
    ensure!(info.delivered.consumer_sequence <= 4, "{info:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_waits_for_its_consumer_and_survives_everything() -> Result<()> {
    let mut server = NatsServer::start().await?;
    let relay = Relay::start(&server.url()).await?;
    // The worker's connection goes through the relay, the dispatcher's does not.
    let (nats, far) = (ready(vec![server.url()], 1).await?, connected(vec![relay.url()]).await?);
    let (publisher, id) = (Publisher::new(&nats), StreamId::new("call")?);
    let w = worker("gpu-1", "a")?;
    let mut pull = LivePull::new(&far, &w);
    ensure!(timeout(Duration::from_millis(500), pull.next(8)).await.is_err(), "there is no consumer yet");
    topology::ensure_worker(&nats, &w, 1).await?;
    let mut flow = Flow { publisher, w: w.clone(), id, seq: 0 };
    flow.until_taken(&mut pull).await?;

    relay.reset();
    let begun = Instant::now();
    flow.until_taken(&mut pull).await?;
    ensure!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());

    // A network that swallows everything, then heals.
    relay.set(Mode::Blackhole);
    let silence = async { while pull.next(8).await.is_ok() {} };
    ensure!(timeout(Duration::from_millis(500), silence).await.is_err(), "the connection was given up");
    relay.set(Mode::Pass);
    relay.reset();
    flow.until_taken(&mut pull).await?;

    server.restart().await?;
    topology::ensure(&nats, &TopologyConfig::default()).await?;
    topology::ensure_worker(&nats, &w, 1).await?;
    flow.until_taken(&mut pull).await
}

/// Hints that keep coming, as those of a session do.
struct Flow {
    publisher: Publisher,
    w: WorkerName,
    id: StreamId,
    seq: u64,
}

impl Flow {
    /// Sends until one that was sent since this call is taken. What was on the way to a connection that was cut is not
    /// acked and comes again only after a while; the log has it.
    async fn until_taken(&mut self, pull: &mut LivePull) -> Result<()> {
        let first = self.seq + 1;
        let taken = async {
            loop {
                self.seq += 1;
                self.publisher.hint(&self.w, &self.id, &entry(self.seq), None).await;
                if let Ok(hint) = timeout(Duration::from_millis(100), pull.next(8)).await
                    && hint?.entry.seq >= first
                {
                    return Ok(());
                }
            }
        };
        timeout(SOON, taken).await.context("no hint comes")?
    }
}

/// The dispatcher's hot path: log tail, hint, pull. The bar is 5,000 chunks a second beside everything else.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_hot_path_carries_its_load() -> Result<()> {
    const CHUNKS: u64 = 20_000;
    let server = NatsServer::start().await?;
    let nats = ready(vec![server.url()], 1).await?;
    let far = connected(vec![server.url()]).await?;
    let w = worker("gpu-1", "a")?;
    topology::ensure_worker(&nats, &w, 1).await?;
    let (log, publisher) = (AudioLog::new(&nats), Publisher::new(&nats));
    let ids = (0..100).map(|n| StreamId::new(format!("call-{n}"))).collect::<Result<Vec<_>, _>>()?;
    let mut answers = Vec::new();
    for n in 0..CHUNKS {
        answers.push(log.publish(&ids[n as usize % 100], &[], Bytes::from(vec![0; 6_400]), None).await?);
        if answers.len() == 1_000 {
            for answer in answers.drain(..) {
                answer.stored().await?;
            }
        }
    }
    let mut tasks = tokio::task::JoinSet::new();
    tasks.spawn(async move {
        let mut pull = LivePull::new(&far, &w);
        for _ in 0..CHUNKS {
            take(&mut pull, 256).await?;
        }
        Ok::<_, anyhow::Error>(())
    });
    let begun = Instant::now();
    let mut tail = log.tail(0);
    let w = worker("gpu-1", "a")?;
    let mut dropped = 0;
    for _ in 0..CHUNKS {
        let item = timeout(SOON, tail.next()).await??;
        dropped += u64::from(publisher.hint(&w, &item.id?, &item.entry, None).await == HintSent::Dropped);
    }
    let read = begun.elapsed();
    ensure!(dropped == 0, "{dropped} hints dropped");
    tasks.join_next().await.context("no task")???;
    let taken = begun.elapsed();
    println!(
        "{:.0} chunks/s from log to hint, {:.0}/s to the worker",
        CHUNKS as f64 / read.as_secs_f64(),
        CHUNKS as f64 / taken.as_secs_f64()
    );
    // A fifth of the bar, so that a machine that is busy with other tests does not fail it.
    ensure!(taken < Duration::from_secs(20), "{taken:?}");
    Ok(())
}
