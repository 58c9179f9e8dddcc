//! The audio log on one server and on three: fences, readers, restarts, hostile entries.

use std::{sync::Arc, time::Duration};

use anyhow::{Context as _, Result, bail, ensure};
use bytes::Bytes;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    time::timeout,
};
use voxfleet_harness::{
    server::{Cluster, NatsServer},
    wait::eventually,
};
use voxfleet_nats::{
    Nats,
    log::{AudioLog, LogError, LogItem, LogTail},
    topology::{self, TopologyConfig, names},
};
use voxfleet_schema::{
    audio::{BadChunk, ChunkHeaders},
    id::StreamId,
};

use super::nats_topology::{connected, ready};

const SOON: Duration = Duration::from_secs(10);
/// A leader that was killed stalls its stream for 5 to 12 s.
const AFTER_FAILOVER: Duration = Duration::from_secs(40);

fn chunk(n: u64) -> Bytes {
    Bytes::from(n.to_le_bytes().to_vec())
}

/// The next entry, over any number of failed attempts.
async fn read(tail: &mut LogTail, patience: Duration) -> Result<LogItem> {
    let item = async {
        loop {
            if let Ok(item) = tail.next().await {
                return item;
            }
        }
    };
    timeout(patience, item).await.context("the tail is silent")
}

/// Writes until it is stored, as a producer that sends again would, without ever storing twice.
async fn append_surely(log: &AudioLog, id: &StreamId, n: u64, last: u64) -> Result<u64> {
    timeout(AFTER_FAILOVER, async {
        loop {
            match log.append(id, &[], chunk(n), Some(last)).await {
                Ok(seq) => return Ok(seq),
                // Stored by an attempt whose answer was lost.
                Err(LogError::Conflict) => {
                    if let Ok(Some(entry)) = log.last(id).await {
                        ensure!(entry.payload == chunk(n), "somebody else wrote");
                        return Ok(entry.seq);
                    }
                }
                Err(LogError::Server(error)) => ensure!(!matches!(error, voxfleet_nats::ServerError::Closed), "closed"),
                Err(error) => return Err(error.into()),
            }
        }
    })
    .await
    .context("nothing is stored any more")?
}

async fn fences_and_reads(nats: &Nats) -> Result<()> {
    let log = AudioLog::new(nats);
    let (a, b) = (StreamId::new("call-a")?, StreamId::new("call-b")?);
    ensure!(log.last(&a).await?.is_none() && log.next(&a, 0).await?.is_none());

    let first = log.append(&a, &[("Asr-Seq", "0")], chunk(0), Some(0)).await?;
    ensure!(matches!(log.append(&a, &[], chunk(1), Some(0)).await, Err(LogError::Conflict)));
    log.append(&b, &[], chunk(9), Some(0)).await?;
    // A fence without audio, as the dispatcher writes it.
    let flush = log.append(&a, &[("Asr-Flush", "1"), ("Asr-Cause", "pause")], Bytes::new(), Some(first)).await?;
    ensure!(matches!(log.append(&a, &[], chunk(1), Some(first)).await, Err(LogError::Conflict)));

    let last = log.last(&a).await?.context("no last entry")?;
    ensure!(last.seq == flush && ChunkHeaders::of(&last)?.flush);
    // From any replica: "not yet" is an answer.
    let next = |from| {
        let (log, a) = (log.clone(), a.clone());
        async move { eventually("direct get", SOON, || async { log.next(&a, from).await.ok().flatten() }).await }
    };
    let entry = next(0).await?;
    ensure!(
        entry.seq == first && entry.headers == [("Asr-Seq".to_owned(), "0".to_owned())] && entry.payload == chunk(0)
    );
    ensure!(next(first + 1).await?.seq == flush, "another session's entry is passed over");
    ensure!(log.next(&a, flush + 1).await?.is_none());

    // Pipelined, with ids: the second of a kind is known.
    let mut answers = Vec::new();
    for n in 0..500u64 {
        answers.push(log.publish(&a, &[], chunk(n), Some(&format!("call-a:s:{n}"))).await?);
    }
    let mut seqs = Vec::new();
    for answer in answers {
        let answer = answer.stored().await?;
        ensure!(!answer.duplicate);
        seqs.push(answer.seq);
    }
    ensure!(seqs.windows(2).all(|w| w[1] > w[0]), "order of publishing is order of the log");
    let again = log.publish(&a, &[], chunk(499), Some("call-a:s:499")).await?.stored().await?;
    ensure!(again.duplicate && again.seq == seqs[499], "{again:?}");
    let bounds = log.bounds().await?;
    ensure!(bounds.first_seq == 1 && bounds.last_seq == seqs[499], "{bounds:?}");

    let mut tail = log.tail(flush);
    let item = read(&mut tail, SOON).await?;
    ensure!(
        item.entry.seq == flush && item.id.as_ref().ok() == Some(&a) && item.stored_ms > 1_600_000_000_000,
        "{item:?}"
    );
    for want in seqs {
        ensure!(read(&mut tail, SOON).await?.entry.seq == want);
    }
    Ok(())
}

#[tokio::test]
async fn fences_and_reads_on_one_server() -> Result<()> {
    let server = NatsServer::start().await?;
    fences_and_reads(&ready(vec![server.url()], 1).await?).await
}

#[tokio::test(flavor = "multi_thread")]
async fn fences_and_reads_on_three_servers() -> Result<()> {
    let cluster = Cluster::start(3).await?;
    fences_and_reads(&ready(cluster.urls(), 3).await?).await
}

#[tokio::test]
async fn sizes_are_refused_with_their_own_errors() -> Result<()> {
    let server = NatsServer::start().await?;
    let nats = connected(vec![server.url()]).await?;
    let config = TopologyConfig { audio_max_bytes: 8 * 1024 * 1024, ..TopologyConfig::default() };
    topology::ensure(&nats, &config).await?;
    let log = AudioLog::new(&nats);
    let id = StreamId::new("call")?;
    let most = 4 * 1024 * 1024 - 16 * 1024;
    let headers = "NATS/1.0\r\n\r\n".len();
    log.append(&id, &[], Bytes::from(vec![0; most - headers]), None).await.context("the largest chunk")?;
    for len in [most + 1, 4 * 1024 * 1024, 64 * 1024 * 1024] {
        let refused = log.append(&id, &[], Bytes::from(vec![0; len]), None).await;
        ensure!(matches!(refused, Err(LogError::TooLarge)), "{len}: {refused:?}");
    }
    let refused = loop {
        match log.append(&id, &[], Bytes::from(vec![0; 1024 * 1024]), None).await {
            Ok(_) => {}
            Err(error) => break error,
        }
    };
    ensure!(matches!(refused, LogError::Full), "{refused:?}");
    ensure!(topology::usage(&nats).await?.iter().any(|u| u.stream == names::AUDIO && u.share() > 0.8));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tail_reads_each_entry_once_across_a_killed_server() -> Result<()> {
    let mut server = NatsServer::start().await?;
    let nats = ready(vec![server.url()], 1).await?;
    let log = AudioLog::new(&nats);
    let id = StreamId::new("call")?;
    let mut tail = log.tail(0);
    let mut last = 0;
    for n in 0..20 {
        last = log.append(&id, &[], chunk(n), Some(last)).await?;
        ensure!(read(&mut tail, SOON).await?.entry.payload == chunk(n));
    }
    server.restart().await?;
    for n in 20..40 {
        last = append_surely(&log, &id, n, last).await?;
        ensure!(read(&mut tail, SOON).await?.entry.payload == chunk(n), "entry {n}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tail_reads_each_entry_once_across_a_killed_leader() -> Result<()> {
    let mut cluster = Cluster::start(3).await?;
    let nats = ready(cluster.urls(), 3).await?;
    let log = AudioLog::new(&nats);
    let id = StreamId::new("call")?;
    let mut tail = log.tail(0);
    let leader = cluster.leader_of(names::AUDIO).await?.context("no leader")?;
    let mut last = 0;
    for n in 0..60 {
        match n {
            20 => cluster.server(leader).kill9()?,
            40 => cluster.server(leader).start_again().await?,
            _ => {}
        }
        last = append_surely(&log, &id, n, last).await?;
        let item = read(&mut tail, AFTER_FAILOVER).await?;
        ensure!(item.entry.payload == chunk(n) && item.entry.seq == last, "entry {n}: {item:?}");
    }
    Ok(())
}

#[tokio::test]
async fn a_cursor_beyond_the_stream_starts_at_its_first_entry() -> Result<()> {
    let server = NatsServer::start().await?;
    let nats = ready(vec![server.url()], 1).await?;
    let log = AudioLog::new(&nats);
    let id = StreamId::new("call")?;
    for n in 0..5 {
        log.append(&id, &[], chunk(n), None).await?;
    }
    // Behind the last entry is where everybody waits for the next one.
    let mut at_end = log.tail(6);
    ensure!(timeout(Duration::from_millis(300), at_end.next()).await.is_err(), "nothing is there yet");
    log.append(&id, &[], chunk(5), None).await?;
    ensure!(read(&mut at_end, SOON).await?.entry.seq == 6);

    ensure!(read(&mut log.tail(1_000), SOON).await?.entry.seq == 1);

    // The stream was lost and made again while somebody was reading.
    server.jetstream().await?.delete_stream(names::AUDIO).await?;
    topology::ensure(&nats, &TopologyConfig::default()).await?;
    log.append(&id, &[], chunk(100), None).await?;
    let item = read(&mut at_end, SOON).await?;
    ensure!(item.entry.seq == 1 && item.entry.payload == chunk(100), "{item:?}");
    Ok(())
}

/// Header bytes that no client library would send, straight from a socket.
#[tokio::test(flavor = "multi_thread")]
async fn an_entry_with_unreadable_headers_costs_only_itself() -> Result<()> {
    let server = NatsServer::start().await?;
    let nats = ready(vec![server.url()], 1).await?;
    let log = AudioLog::new(&nats);
    let (good, evil) = (StreamId::new("good")?, StreamId::new("evil")?);
    log.append(&good, &[], chunk(0), None).await?;

    let mut socket = tokio::net::TcpStream::connect(("127.0.0.1", server.port())).await?;
    let headers = b"NATS/1.0\r\nAsr-Seq: \xff\xfe\r\n\r\n";
    let mut command = b"CONNECT {\"verbose\":false,\"headers\":true}\r\n".to_vec();
    command.extend(format!("HPUB asr.v1.audio.evil {} {}\r\n", headers.len(), headers.len() + 2).bytes());
    command.extend(headers);
    command.extend(b"ab\r\nPING\r\n");
    socket.write_all(&command).await?;
    let mut answer = vec![0; 4_096];
    let mut heard = String::new();
    while !heard.contains("PONG") {
        let read = timeout(SOON, socket.read(&mut answer)).await??;
        ensure!(read > 0, "the server hung up: {heard}");
        heard.push_str(&String::from_utf8_lossy(&answer[..read]));
    }
    eventually("the evil entry is stored", SOON, || async { (log.bounds().await.ok()?.last_seq == 2).then_some(()) })
        .await?;
    log.append(&good, &[], chunk(1), None).await?;

    let mut tail = log.tail(0);
    for want in ["good", "evil", "good"] {
        let item = read(&mut tail, SOON).await?;
        ensure!(item.id.as_ref().map(StreamId::as_str) == Ok(want), "{item:?}");
        let bad = matches!(ChunkHeaders::of(&item.entry), Err(BadChunk::Header { .. }));
        ensure!(bad == (want == "evil"), "{item:?}");
    }
    let entry = timeout(SOON, log.next(&evil, 0)).await??.context("the log has it")?;
    ensure!(ChunkHeaders::of(&entry).is_err() && entry.payload == "ab", "{entry:?}");
    let last = log.last(&evil).await?.context("the log has it")?;
    ensure!(ChunkHeaders::of(&last).is_err());
    Ok(())
}

#[tokio::test]
async fn entries_of_no_session_are_told_as_such() -> Result<()> {
    let server = NatsServer::start().await?;
    let nats = ready(vec![server.url()], 1).await?;
    let js = server.jetstream().await?;
    for id in ["é", "a$b", ">", &"x".repeat(1_000)] {
        js.publish(format!("asr.v1.audio.{id}"), "ab".into()).await?.await?;
    }
    js.publish("asr.v1.audio.ok", "ab".into()).await?.await?;
    let mut tail = AudioLog::new(&nats).tail(0);
    for _ in 0..4 {
        ensure!(read(&mut tail, SOON).await?.id.is_err());
    }
    ensure!(read(&mut tail, SOON).await?.id.is_ok());
    Ok(())
}

/// Many readers at once on one connection, none of which hears another's answer.
#[tokio::test(flavor = "multi_thread")]
async fn sessions_read_their_own_entries_side_by_side() -> Result<()> {
    let server = NatsServer::start().await?;
    let nats = ready(vec![server.url()], 1).await?;
    let log = Arc::new(AudioLog::new(&nats));
    let mut tasks = tokio::task::JoinSet::new();
    for session in 0..50u64 {
        let log = log.clone();
        tasks.spawn(async move {
            let id = StreamId::new(format!("call-{session}"))?;
            for n in 0..20 {
                log.append(&id, &[], chunk(session * 1_000 + n), None).await?;
            }
            let mut from = 0;
            for n in 0..20 {
                let Some(entry) = log.next(&id, from).await? else { bail!("entry {n} is missing") };
                ensure!(entry.payload == chunk(session * 1_000 + n));
                from = entry.seq + 1;
            }
            Ok(())
        });
    }
    while let Some(done) = tasks.join_next().await {
        done??;
    }
    Ok(())
}
