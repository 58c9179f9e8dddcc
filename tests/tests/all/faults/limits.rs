//! A server that runs out of room: whoever is not acknowledged is told why, whoever was is transcribed.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use async_nats::jetstream;
use voxfleet_harness::{
    audio,
    chaos::hands::Hands,
    fleet::{self, Fleet, FleetBuilder},
    producer::Producer,
    server::{NatsServer, ServerOptions},
    wait::eventually,
};

use super::{Ground, Load};

const MIB: u64 = 1 << 20;

/// Streams that fit a small store; what they reserve is 40 MiB.
fn small(builder: FleetBuilder) -> FleetBuilder {
    let sizes = [("audio", 16), ("transcript", 4), ("jobs", 1), ("work", 1), ("checkpoint", 1), ("event", 4)];
    let sizes = sizes.iter().chain(&[("dead", 1), ("media", 8), ("bucket", 1)]);
    sizes.fold(builder, |b, (name, mib)| b.set(&format!("dispatcher.topology.{name}_max_bytes"), mib * MIB))
}

/// Speaks until a chunk is refused; what the refusal says.
async fn refused(js: jetstream::Context, session: &str) -> Result<(Vec<i16>, String)> {
    let pcm = audio::blasts(1, 120.0);
    let mut producer = Producer::named(js, session, "s1");
    let mut acknowledged = Vec::new();
    for chunk in pcm.samples.chunks(16_000) {
        let payload: Vec<u8> = chunk.iter().flat_map(|s| s.to_le_bytes()).collect();
        match producer.send(payload, &[]).await {
            Ok(_) => acknowledged.extend_from_slice(chunk),
            Err(e) => return Ok((acknowledged, e.to_string())),
        }
    }
    Ok((acknowledged, String::new()))
}

pub(crate) async fn a_full_store_refuses_clearly_and_loses_nothing() -> Result<()> {
    let _place = fleet::place().await;
    let limit = "jetstream { max_file_store: 64MB, max_memory_store: 1GB }".to_owned();
    let options = ServerOptions { extra: limit, ..ServerOptions::default() };
    let fleet = Ground::OneServer.start(small(Ground::builder()).server_options(options)).await?;
    let mut hands = Hands::new(fleet);
    let load = Load::begin(&hands.fleet, 31, 16.0);
    // A stranger's stream without a limit takes what nobody has reserved, and then everything.
    let js = hands.fleet.js();
    let stranger = jetstream::stream::Config {
        name: "STRANGER".to_owned(),
        subjects: vec!["stranger".to_owned()],
        ..jetstream::stream::Config::default()
    };
    js.create_stream(stranger).await?;
    let bytes = bytes::Bytes::from(vec![7; MIB as usize]);
    let mut stored = 0;
    while let Ok(ack) = js.publish("stranger", bytes.clone()).await?.await {
        stored = ack.sequence;
        ensure!(stored < 100, "the store has no limit");
    }
    let (acknowledged, why) = refused(js.clone(), "fault-31-full").await?;
    ensure!(acknowledged.is_empty(), "{} samples went into a full store of {stored} MiB", acknowledged.len());
    ensure!(why.contains("insufficient") || why.contains("resource") || why.contains("exceeded"), "{why}");
    js.delete_stream("STRANGER").await?;
    eventually("the store takes audio again", Duration::from_secs(10), || {
        let js = js.clone();
        async move { Producer::bare(js, "fault-31-again").send(vec![0u8; 320], &[]).await.ok() }
    })
    .await?;
    load.clean(&mut hands).await.map(drop)
}

pub(crate) async fn a_file_size_limit_refuses_clearly_and_loses_nothing() -> Result<()> {
    let _place = fleet::place().await;
    let options = ServerOptions { file_limit: Some(3 * MIB), ..ServerOptions::default() };
    let fleet = Ground::OneServer.start(Ground::builder().server_options(options)).await?;
    let mut hands = Hands::new(fleet);
    let load = Load::begin(&hands.fleet, 32, 16.0);
    let outcome = tokio::time::timeout(Duration::from_secs(40), refused(hands.fleet.js(), "fault-32-full")).await;
    let (acknowledged, why) = outcome.context("neither taken nor refused")??;
    ensure!(!acknowledged.is_empty() && !why.is_empty(), "{} samples, then {why:?}", acknowledged.len());
    restart_without_limit(&mut hands.fleet).await?;
    // What was acknowledged before is there, to the sample.
    let read = || async {
        voxfleet_harness::checker::read(&hands.fleet.js(), "ASR_AUDIO", "asr.v1.audio.fault-32-full").await.ok()
    };
    let log = eventually("the log can be read", Duration::from_secs(15), read).await?;
    let stored = voxfleet_harness::words::samples_of(&log);
    ensure!(stored.starts_with(&acknowledged), "{} of {} samples are there", stored.len(), acknowledged.len());
    load.clean(&mut hands).await.map(drop)
}

async fn restart_without_limit(fleet: &mut Fleet) -> Result<()> {
    let server: &mut NatsServer = fleet.server()?;
    server.lift_file_limit();
    Ok(server.restart().await?)
}
