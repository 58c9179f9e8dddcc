//! Streams, buckets and consumers on a real server: made, verified, and told apart from other people's.

use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use async_nats::jetstream::stream::{Config, RetentionPolicy};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use voxfleet_harness::server::{Cluster, NatsServer, ServerOptions};
use voxfleet_nats::{
    ConnectError, Nats, NatsConfig, Secret,
    topology::{self, TopologyConfig, TopologyError, WorkerConsumers, names},
};
use voxfleet_schema::id::{GpuId, Incarnation, WorkerName};

/// A connection with the product's own client.
pub(crate) async fn connected(urls: Vec<String>) -> Result<Nats> {
    let config = NatsConfig { urls, ..NatsConfig::default() };
    Ok(Nats::connect(&config, "test").await?)
}

/// A connection to a server that has everything.
pub(crate) async fn ready(urls: Vec<String>, replicas: usize) -> Result<Nats> {
    let nats = connected(urls).await?;
    topology::ensure(&nats, &TopologyConfig { replicas, ..TopologyConfig::default() }).await?;
    Ok(nats)
}

pub(crate) fn worker(gpu: &str, incarnation: &str) -> Result<WorkerName> {
    Ok(WorkerName { gpu_id: GpuId::new(gpu)?, incarnation: Incarnation::new(incarnation)? })
}

#[tokio::test]
async fn what_is_missing_is_made_and_what_is_there_is_verified() -> Result<()> {
    let server = NatsServer::start().await?;
    let nats = connected(vec![server.url()]).await?;
    let config = TopologyConfig::default();
    let missing = topology::verify(&nats, &config).await;
    ensure!(missing.len() == 14 && missing.iter().all(|e| matches!(e, TopologyError::Missing { .. })), "{missing:?}");

    let first = topology::ensure(&nats, &config).await?;
    ensure!(first.created.len() == 14 && first.verified.is_empty(), "{first:?}");
    let second = topology::ensure(&nats, &config).await?;
    ensure!(second.verified == first.created && second.created.is_empty(), "{second:?}");
    let problems = topology::verify(&nats, &config).await;
    ensure!(problems.is_empty(), "{problems:?}");

    let js = server.jetstream().await?;
    let audio = js.get_stream(names::AUDIO).await?.get_info().await?.config;
    ensure!(audio.allow_direct && audio.max_message_size == 4 * 1024 * 1024 - 16 * 1024, "{audio:?}");
    js.get_key_value("asr_sessions").await?.put("k", "v".into()).await.context("a bucket for other clients")?;
    js.get_object_store("asr_media")
        .await?
        .put("k", &mut &b"audio"[..])
        .await
        .context("an object store for other clients")?;
    let usage = topology::usage(&nats).await?;
    ensure!(usage.len() == 14 && usage.iter().all(|u| u.max_bytes > 0 && u.share() < 0.01), "{usage:?}");
    ensure!(nats.close(Duration::from_secs(5)).await);
    Ok(())
}

#[tokio::test]
async fn three_replicas_on_a_cluster_and_none_without_one() -> Result<()> {
    let config = TopologyConfig { replicas: 3, ..TopologyConfig::default() };
    let cluster = Cluster::start(3).await?;
    let nats = connected(cluster.urls()).await?;
    ensure!(topology::ensure(&nats, &config).await?.created.len() == 14);
    ensure!(topology::ensure(&nats, &config).await?.verified.len() == 14);
    // More than configured stay.
    let raised = topology::ensure(&nats, &TopologyConfig::default()).await?.raised;
    ensure!(raised.len() == 14 && raised.iter().all(|r| r.field == "num_replicas" && r.found == "3"), "{raised:?}");

    let single = NatsServer::start().await?;
    let nats = connected(vec![single.url()]).await?;
    match topology::ensure(&nats, &config).await {
        Err(TopologyError::Replicas { replicas: 3, .. }) => Ok(()),
        other => bail!("{other:?}"),
    }
}

#[tokio::test]
async fn other_peoples_streams_are_told_apart_and_left_alone() -> Result<()> {
    let server = NatsServer::start().await?;
    let nats = connected(vec![server.url()]).await?;
    let js = server.jetstream().await?;
    let config = TopologyConfig::default();

    let foreign = Config { name: names::AUDIO.into(), subjects: vec!["music.>".into()], ..Config::default() };
    js.create_stream(foreign).await?;
    match topology::ensure(&nats, &config).await {
        Err(TopologyError::Differs { stream, field: "subjects", wanted, found, mend }) => {
            ensure!(
                stream == names::AUDIO && wanted == "asr.v1.audio.*" && found == "music.>",
                "{stream} {wanted} {found}"
            );
            ensure!(mend.contains("nats stream edit ASR_AUDIO --subjects=asr.v1.audio.*"), "{mend}");
        }
        other => bail!("{other:?}"),
    }
    ensure!(js.get_stream(names::AUDIO).await?.get_info().await?.config.subjects == ["music.>"], "it was changed");
    js.delete_stream(names::AUDIO).await?;

    let foreign = Config { name: "MINE".into(), subjects: vec!["asr.v1.audio.mine".into()], ..Config::default() };
    js.create_stream(foreign).await?;
    match topology::ensure(&nats, &config).await {
        Err(TopologyError::SubjectsTaken { stream, other }) => {
            ensure!(stream == names::AUDIO && other == "MINE", "{other}")
        }
        other => bail!("{other:?}"),
    }
    js.delete_stream("MINE").await?;

    let mut live = js.get_stream(names::WORK).await?.get_info().await?.config;
    js.delete_stream(names::WORK).await?;
    live.retention = RetentionPolicy::Limits;
    js.create_stream(live).await?;
    match topology::ensure(&nats, &config).await {
        Err(TopologyError::Differs { field: "retention", mend, .. }) => ensure!(mend.contains("stream rm"), "{mend}"),
        other => bail!("{other:?}"),
    }
    // The mend mends.
    js.delete_stream(names::WORK).await?;
    topology::ensure(&nats, &config).await?;
    Ok(())
}

#[tokio::test]
async fn servers_that_cannot_serve_say_why() -> Result<()> {
    let config = TopologyConfig::default();

    let server = NatsServer::start_with(ServerOptions { jetstream: false, ..ServerOptions::default() }).await?;
    let off = topology::ensure(&connected(vec![server.url()]).await?, &config).await;
    ensure!(matches!(off, Err(TopologyError::NoJetStream)), "{off:?}");

    let options = ServerOptions { max_payload: Some(64 * 1024), ..ServerOptions::default() };
    let server = NatsServer::start_with(options).await?;
    let small = topology::ensure(&connected(vec![server.url()]).await?, &config).await;
    ensure!(matches!(small, Err(TopologyError::MaxPayload { found: 65_536, .. })), "{small:?}");

    let options = ServerOptions {
        extra: "jetstream { max_file_store: 1GB, max_memory_store: 1GB }".into(),
        ..ServerOptions::default()
    };
    let server = NatsServer::start_with(options).await?;
    let full = topology::ensure(&connected(vec![server.url()]).await?, &config).await;
    ensure!(matches!(full, Err(TopologyError::NoRoom { .. })), "{full:?}");

    let bad = TopologyConfig { replicas: 2, max_consumers: 0, ..TopologyConfig::default() };
    match topology::ensure(&connected(vec![server.url()]).await?, &bad).await {
        Err(TopologyError::Config(problems)) => ensure!(problems.len() == 2, "{problems:?}"),
        other => bail!("{other:?}"),
    }
    Ok(())
}

/// A server of another age, as far as its greeting.
#[tokio::test]
async fn an_old_server_is_refused_by_its_version() -> Result<()> {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let url = format!("nats://{}", listener.local_addr()?);
    let mut tasks = tokio::task::JoinSet::new();
    tasks.spawn(async move {
        let (mut stream, _) = listener.accept().await?;
        let info =
            r#"{"server_id":"x","version":"2.9.25","max_payload":4194304,"headers":true,"jetstream":true,"proto":1}"#;
        stream.write_all(format!("INFO {info}\r\n").as_bytes()).await?;
        let mut buffer = vec![0; 4_096];
        loop {
            let read = stream.read(&mut buffer).await?;
            if read == 0 {
                return std::io::Result::Ok(());
            }
            if String::from_utf8_lossy(&buffer[..read]).contains("PING") {
                stream.write_all(b"PONG\r\n").await?;
            }
        }
    });
    let nats = connected(vec![url]).await?;
    match topology::ensure(&nats, &TopologyConfig::default()).await {
        Err(TopologyError::ServerTooOld { found, .. }) => ensure!(found == "2.9.25"),
        other => bail!("{other:?}"),
    }
    Ok(())
}

#[tokio::test]
async fn a_connection_that_cannot_be_made_says_why() -> Result<()> {
    let nobody = format!("nats://127.0.0.1:{}", voxfleet_harness::ports::free_port()?);
    let refused = connected(vec![nobody.clone()]).await;
    match refused {
        Err(error) => match error.downcast_ref() {
            Some(ConnectError::Unreachable { urls, .. }) => ensure!(*urls == nobody, "{urls}"),
            _ => bail!("{error:?}"),
        },
        Ok(_) => bail!("somebody answered"),
    }

    let extra = r#"authorization { user: "worker", password: "right" }"#;
    let server =
        NatsServer::start_with(ServerOptions { jetstream: false, extra: extra.to_owned(), ..ServerOptions::default() });
    // The harness knows no password and must not need one to see the server listen.
    let server = server.await?;
    let mut config = NatsConfig {
        urls: vec![server.url()],
        user: "worker".into(),
        password: Secret::new("wrong"),
        ..NatsConfig::default()
    };
    match Nats::connect(&config, "test").await {
        Err(ConnectError::Credentials { .. }) => {}
        other => bail!("{other:?}"),
    }
    config.password = Secret::new("right");
    let nats = Nats::connect(&config, "test").await?;
    nats.rtt(Duration::from_secs(1)).await?;
    Ok(())
}

#[tokio::test]
async fn worker_consumers_come_and_go() -> Result<()> {
    let server = NatsServer::start().await?;
    let nats = ready(vec![server.url()], 1).await?;
    let (a, b) = (worker("gpu-1", "x")?, worker("gpu", "1-x")?);
    topology::ensure_worker(&nats, &a, 0).await?;
    topology::ensure_worker(&nats, &a, 2).await?;
    topology::ensure_worker(&nats, &b, 1).await?;
    let both = |worker: &WorkerName| WorkerConsumers { worker: worker.clone(), live: true, work: true };
    let mut want = [both(&a), both(&b)];
    want.sort_by(|x, y| x.worker.cmp(&y.worker));
    let listed = topology::list_worker_consumers(&nats).await?;
    ensure!(listed == want, "{listed:?}");

    let js = server.jetstream().await?;
    let work = js.get_stream(names::WORK).await?;
    let info = work.consumer_info("gpu-1=x").await?;
    ensure!(info.config.max_ack_pending == 2, "{info:?}");
    js.publish("asr.v1.gpu.gpu-1.x.job.j", "item".into()).await?.await?;
    js.publish("asr.v1.gpu.gpu.1-x.job.j", "item".into()).await?.await?;

    topology::remove_worker(&nats, &a).await?;
    topology::remove_worker(&nats, &a).await.context("twice is once")?;
    let listed = topology::list_worker_consumers(&nats).await?;
    ensure!(listed == [both(&b)], "{listed:?}");
    ensure!(work.get_info().await?.state.messages == 1, "only its own subjects are purged");
    Ok(())
}

#[tokio::test]
async fn memory_streams_that_vanished_with_their_server_are_made_again() -> Result<()> {
    let mut server = NatsServer::start().await?;
    let nats = ready(vec![server.url()], 1).await?;
    let w = worker("gpu-1", "x")?;
    topology::ensure_worker(&nats, &w, 1).await?;
    server.restart().await?;
    let report = topology::ensure(&nats, &TopologyConfig::default()).await?;
    ensure!(report.created == [names::LIVE, names::PARTIAL], "{report:?}");
    let listed = topology::list_worker_consumers(&nats).await?;
    ensure!(listed == [WorkerConsumers { worker: w.clone(), live: false, work: true }], "{listed:?}");
    topology::ensure_worker(&nats, &w, 1).await?;
    ensure!(topology::list_worker_consumers(&nats).await?.iter().all(|c| c.live));
    Ok(())
}
