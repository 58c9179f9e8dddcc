//! The chain of finals on one server and on three: one author wins each link, none is lost or doubled.

use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use async_nats::jetstream::{
    self,
    consumer::{self, DeliverPolicy},
};
use futures_util::TryStreamExt as _;
use tokio::time::timeout;
use voxfleet_harness::{
    server::{Cluster, NatsServer},
    wait::eventually,
};
use voxfleet_nats::{
    Nats, ServerError,
    topology::names,
    transcript::{self, Chain, ChainError, Filter, Outcome, ReadError, Reader, Start},
};
use voxfleet_schema::{
    audio::AudioFormat,
    id::{GpuId, Kind, StreamId},
    source::SourceState,
    transcript::{AudioRange, Checkpoint, Final, MAX_FINAL_BYTES, Resume, Segment, Timings, VadKind, Word},
};

use super::nats_topology::ready;

const SOON: Duration = Duration::from_secs(10);
const AFTER_FAILOVER: Duration = Duration::from_secs(60);

pub(super) fn a_final(id: &str, index: u64, epoch: u64) -> Result<Final> {
    Ok(Final {
        kind: Kind::Session,
        id: StreamId::new(id)?,
        index,
        final_id: uuid::Uuid::new_v4().simple().to_string(),
        epoch,
        gpu_id: GpuId::new("gpu-1")?,
        model: "none".into(),
        device: "cpu".into(),
        engine: "simulated".into(),
        vad: VadKind::Energy,
        from_sample: index * 16_000,
        to_sample: (index + 1) * 16_000,
        audio: AudioRange { from_seq: index + 1, to_seq: index + 1 },
        resume: Resume {
            seq: index + 1,
            at_sample: 0,
            at_frame: 0,
            format: AudioFormat::default(),
            format_sample: 0,
            producers: SourceState::default(),
            language: None,
        },
        checkpoint_seq: None,
        checkpoint_missing: false,
        segments: Vec::new(),
        turns: Vec::new(),
        speakers: None,
        words_omitted: false,
        speech_final: true,
        end: false,
        lost: None,
        error: None,
        result: None,
        guards: Vec::new(),
        timings: Timings::default(),
    })
}

async fn stored(chain: &Chain, value: &Final, predecessor: Option<u64>) -> Result<u64> {
    match timeout(AFTER_FAILOVER, chain.store(value, predecessor)).await?? {
        Outcome::Stored { seq, chain_lost: false } => Ok(seq),
        other => bail!("{other:?}"),
    }
}

async fn read_all<T: serde::de::DeserializeOwned>(mut reader: Reader<T>, count: usize) -> Result<Vec<T>> {
    let mut values = Vec::new();
    while values.len() < count {
        values.push(timeout(SOON, reader.next()).await.context("the reader is silent")??.value);
    }
    Ok(values)
}

async fn rules(nats: &Nats) -> Result<()> {
    let chain = Chain::new(nats);
    let id = StreamId::new("call")?;
    ensure!(chain.last(Kind::Session, &id).await?.is_none());
    let first = a_final("call", 0, 1)?;
    let seq0 = stored(&chain, &first, None).await?;
    // An answer that was lost: the same bytes again are the same final.
    ensure!(stored(&chain, &first, None).await? == seq0);
    let last = chain.last(Kind::Session, &id).await?.context("no final")?;
    ensure!(last.seq == seq0 && last.value == first);

    let second = a_final("call", 1, 1)?;
    let seq1 = stored(&chain, &second, Some(seq0)).await?;
    ensure!(stored(&chain, &second, Some(seq0)).await? == seq1);

    // Another computation of the same link, by the same owner: what stands there counts.
    match chain.store(&a_final("call", 1, 1)?, Some(seq0)).await? {
        Outcome::Rebuild(found) => ensure!(found.seq == seq1 && found.value == second),
        other => bail!("{other:?}"),
    }
    // A slower old owner, after a new one has written.
    let third = a_final("call", 2, 2)?;
    let seq2 = stored(&chain, &third, Some(seq1)).await?;
    match chain.store(&a_final("call", 2, 1)?, Some(seq1)).await? {
        Outcome::LetGo(found) => ensure!(found.seq == seq2 && found.value.epoch == 2),
        other => bail!("{other:?}"),
    }
    // A new owner that has read an old predecessor.
    match chain.store(&a_final("call", 2, 3)?, Some(seq1)).await? {
        Outcome::Rebuild(found) => ensure!(found.seq == seq2),
        other => bail!("{other:?}"),
    }
    let conflict = chain.publish(&a_final("call", 3, 3)?, Some(seq1)).await;
    ensure!(matches!(conflict, Err(ChainError::Conflict)), "{conflict:?}");

    let indexes: Vec<_> = read_all(transcript::finals(nats, &Filter::One(Kind::Session, id), Start::First), 3)
        .await?
        .iter()
        .map(|f| f.index)
        .collect();
    ensure!(indexes == [0, 1, 2], "{indexes:?}");
    Ok(())
}

/// Two that believe they own the session write every link at the same time.
async fn races(nats: &Nats) -> Result<()> {
    let chain = Chain::new(nats);
    let id = StreamId::new("race")?;
    let mut predecessor = None;
    let mut winners = Vec::new();
    for index in 0..30 {
        let (old, new) = (a_final("race", index, 1)?, a_final("race", index, 2)?);
        let (a, b) = tokio::join!(chain.store(&old, predecessor), chain.store(&new, predecessor));
        let (seq, winner) = match (a?, b?) {
            (Outcome::Stored { seq, .. }, Outcome::Rebuild(found)) => {
                ensure!(found.value == old);
                (seq, old)
            }
            (Outcome::LetGo(found), Outcome::Stored { seq, .. }) => {
                ensure!(found.value == new);
                (seq, new)
            }
            other => bail!("link {index}: {other:?}"),
        };
        predecessor = Some(seq);
        winners.push(winner);
    }
    let chain = read_all(transcript::finals(nats, &Filter::One(Kind::Session, id), Start::First), 30).await?;
    ensure!(chain == winners, "the chain is not what its authors were told");
    Ok(())
}

/// The whole session disappears under its owner.
async fn purges(nats: &Nats, js: &jetstream::Context) -> Result<()> {
    let chain = Chain::new(nats);
    let seq = stored(&chain, &a_final("purged", 0, 1)?, None).await?;
    js.get_stream(names::TRANSCRIPT).await?.purge().filter("asr.v1.transcript.session.purged.final").await?;
    match timeout(SOON, chain.store(&a_final("purged", 1, 1)?, Some(seq))).await?? {
        Outcome::Stored { seq: again, chain_lost: true } => ensure!(again > seq),
        other => bail!("{other:?}"),
    }
    Ok(())
}

#[tokio::test]
async fn the_chain_on_one_server() -> Result<()> {
    let server = NatsServer::start().await?;
    let nats = ready(vec![server.url()], 1).await?;
    rules(&nats).await?;
    races(&nats).await?;
    purges(&nats, &server.jetstream().await?).await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_chain_on_three_servers() -> Result<()> {
    let cluster = Cluster::start(3).await?;
    let nats = ready(cluster.urls(), 3).await?;
    rules(&nats).await?;
    races(&nats).await?;
    purges(&nats, &cluster.jetstream().await?).await
}

async fn chain_of_40(nats: Nats) -> Result<Vec<String>> {
    let chain = Chain::new(&nats);
    let mut predecessor = None;
    let mut ids = Vec::new();
    for index in 0..40 {
        let value = a_final("long", index, 1)?;
        ids.push(value.final_id.clone());
        predecessor = Some(stored(&chain, &value, predecessor).await?);
    }
    Ok(ids)
}

/// Everything in order, once, whatever was killed while it was written and read.
async fn undamaged(reader: Reader<Final>, ids: &[String]) -> Result<()> {
    let read: Vec<_> = read_surely(reader, ids.len()).await?.into_iter().map(|f| f.final_id).collect();
    ensure!(read == ids, "{} finals written, {} read", ids.len(), read.len());
    Ok(())
}

async fn read_surely(mut reader: Reader<Final>, count: usize) -> Result<Vec<Final>> {
    let mut values = Vec::new();
    while values.len() < count {
        match timeout(AFTER_FAILOVER, reader.next()).await.context("the reader is silent")? {
            Ok(read) => values.push(read.value),
            Err(ReadError::Server(ServerError::Closed)) => bail!("closed"),
            Err(_) => {}
        }
    }
    Ok(values)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chain_is_whole_across_a_killed_server() -> Result<()> {
    let mut server = NatsServer::start().await?;
    let nats = ready(vec![server.url()], 1).await?;
    let reader = transcript::finals(&nats, &Filter::All, Start::First);
    let mut tasks = tokio::task::JoinSet::new();
    tasks.spawn(chain_of_40(nats.clone()));
    let mut early = transcript::finals(&nats, &Filter::All, Start::First);
    timeout(SOON, early.next()).await??;
    server.restart().await?;
    let ids = tasks.join_next().await.context("no task")???;
    undamaged(reader, &ids).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chain_is_whole_across_a_killed_leader() -> Result<()> {
    let mut cluster = Cluster::start(3).await?;
    let nats = ready(cluster.urls(), 3).await?;
    let reader = transcript::finals(&nats, &Filter::All, Start::First);
    let mut tasks = tokio::task::JoinSet::new();
    tasks.spawn(chain_of_40(nats.clone()));
    let mut early = transcript::finals(&nats, &Filter::All, Start::First);
    for _ in 0..5 {
        timeout(SOON, early.next()).await??;
    }
    let leader = cluster.leader_of(names::TRANSCRIPT).await?.context("no leader")?;
    cluster.server(leader).kill9()?;
    let ids = tasks.join_next().await.context("no task")???;
    undamaged(reader, &ids).await
}

#[tokio::test]
async fn long_finals_leave_out_words_and_longer_ones_are_refused() -> Result<()> {
    let server = NatsServer::start().await?;
    let nats = ready(vec![server.url()], 1).await?;
    let chain = Chain::new(&nats);
    let word =
        Word { text: "word".into(), start_ms: 0, end_ms: 1, confidence: 0.5, speaker: None, overlapped_by: None };
    let segment = |text: String, words: usize| Segment {
        id: 0,
        start_ms: 0,
        end_ms: 1,
        text,
        speaker: None,
        channel: None,
        language: None,
        confidence: 0.5,
        words: vec![word.clone(); words],
    };
    let mut long = a_final("long", 0, 1)?;
    long.segments = vec![segment("text".into(), 10_000)];
    let seq = stored(&chain, &long, None).await?;
    let last = chain.last(Kind::Session, &long.id).await?.context("no final")?;
    ensure!(last.value.words_omitted && last.value.text() == "text" && last.value.segments[0].words.is_empty());

    let mut longer = a_final("long", 1, 1)?;
    longer.segments = vec![segment("x".repeat(MAX_FINAL_BYTES), 0)];
    let refused = chain.store(&longer, Some(seq)).await;
    ensure!(matches!(refused, Err(ChainError::TooLarge { .. })), "{refused:?}");
    Ok(())
}

#[tokio::test]
async fn checkpoints_belong_to_their_session() -> Result<()> {
    let server = NatsServer::start().await?;
    let nats = ready(vec![server.url()], 1).await?;
    let chain = Chain::new(&nats);
    let (a, b) = (StreamId::new("a")?, StreamId::new("b")?);
    let checkpoint = Checkpoint { index: 7, prompt_tail: "so far".into(), guard_hit: true, ..Checkpoint::default() };
    let seq = chain.checkpoint_put(Kind::Session, &a, &checkpoint).await?;
    ensure!(chain.checkpoint_get(Kind::Session, &a, seq).await? == Some(checkpoint));
    ensure!(chain.checkpoint_get(Kind::Session, &b, seq).await?.is_none());
    ensure!(chain.checkpoint_get(Kind::Job, &a, seq).await?.is_none());
    ensure!(chain.checkpoint_get(Kind::Session, &a, seq + 1).await?.is_none());
    Ok(())
}

#[tokio::test]
async fn readers_begin_where_they_are_told_and_pass_over_rubbish() -> Result<()> {
    let server = NatsServer::start().await?;
    let nats = ready(vec![server.url()], 1).await?;
    let chain = Chain::new(&nats);
    let mut predecessor = None;
    for index in 0..3 {
        predecessor = Some(stored(&chain, &a_final("a", index, 1)?, predecessor).await?);
    }
    let seq = predecessor.context("no final")?;
    let last = read_all(transcript::finals(&nats, &Filter::All, Start::LastPerSubject), 1).await?;
    ensure!(last[0].index == 2);
    let from = read_all(transcript::finals(&nats, &Filter::Kind(Kind::Session), Start::Seq(seq)), 1).await?;
    ensure!(from[0].index == 2);

    let mut new = transcript::finals(&nats, &Filter::All, Start::New);
    let js = server.jetstream().await?;
    let stream = js.get_stream(names::TRANSCRIPT).await?;
    {
        // New is what comes after its consumer was made.
        let mut first = std::pin::pin!(new.next());
        let made = eventually("its consumer", SOON, || async {
            let all: Vec<consumer::Info> = stream.consumers().try_collect().await.ok()?;
            all.iter().any(|found| found.config.deliver_policy == DeliverPolicy::New).then_some(())
        });
        tokio::select! {
            made = made => made?,
            read = &mut first => bail!("nothing is new: {read:?}"),
        }
        js.publish("asr.v1.transcript.session.b.final", "rubbish".into()).await?.await?;
        stored(&chain, &a_final("a", 3, 1)?, predecessor).await?;
        ensure!(matches!(timeout(SOON, first).await?, Err(ReadError::Malformed { .. })));
    }
    ensure!(timeout(SOON, new.next()).await??.value.index == 3);
    let foreign = chain.store(&a_final("b", 0, 1)?, None).await;
    ensure!(matches!(foreign, Err(ChainError::Foreign { .. })), "{foreign:?}");
    Ok(())
}
