//! The object store on a real server: whole objects or an error, nothing left behind, full and damaged stores.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use async_nats::jetstream;
use bytes::Bytes;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, ReadBuf},
    time::timeout,
};
use voxfleet_harness::{
    relay::Relay,
    server::{Cluster, NatsServer},
    wait::eventually,
};
use voxfleet_nats::{
    Nats, ServerError,
    media::{Media, MediaError, Object, ObjectInfo},
    topology::{self, TopologyConfig, names},
};

use super::nats_topology::{connected, ready};

const SOON: Duration = Duration::from_secs(10);
const CHUNK: usize = 128 * 1024;
const MB: usize = 1_000_000;

/// Bytes that no chunk repeats.
fn bytes(len: usize) -> Bytes {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let next = |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    (0..len).map(next).collect::<Vec<_>>().into()
}

async fn whole(mut object: Object) -> Result<Bytes, MediaError> {
    let mut read = Vec::new();
    match timeout(SOON, object.read_to_end(&mut read)).await {
        Ok(Ok(_)) => Ok(read.into()),
        Ok(Err(error)) => Err(MediaError::of(error)),
        Err(_) => Err(ServerError::Timeout.into()),
    }
}

async fn get(media: &Media, key: &str) -> Result<Bytes> {
    let object = media.get(key).await?.with_context(|| format!("there is no {key}"))?;
    Ok(whole(object).await?)
}

async fn damaged(media: &Media, key: &str) -> Result<&'static str> {
    match whole(media.get(key).await?.context("its record is there")?).await {
        Err(MediaError::Damaged { what, .. }) => Ok(what),
        other => bail!("{key}: {:?}", other.map(|bytes| bytes.len())),
    }
}

async fn stored(js: &jetstream::Context) -> Result<u64> {
    Ok(js.get_stream(names::MEDIA).await?.get_info().await?.state.messages)
}

async fn chunks_gone(js: &jetstream::Context, left: u64) -> Result<()> {
    eventually("chunks are purged", SOON, || async { (stored(js).await.ok()? == left).then_some(()) }).await?;
    Ok(())
}

/// Gives `left` bytes in pieces of odd lengths, then fails or waits for ever.
struct Reader {
    bytes: Bytes,
    at: usize,
    end: End,
}

#[derive(Clone, Copy)]
enum End {
    Eof,
    Fails,
    Hangs,
}

impl AsyncRead for Reader {
    fn poll_read(mut self: Pin<&mut Self>, _cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let n = 7_001.min(buf.remaining()).min(self.bytes.len() - self.at);
        if n == 0 {
            return match self.end {
                End::Eof => Poll::Ready(Ok(())),
                End::Fails => Poll::Ready(Err(io::Error::from(io::ErrorKind::BrokenPipe))),
                End::Hangs => Poll::Pending,
            };
        }
        let at = self.at;
        buf.put_slice(&self.bytes[at..at + n]);
        self.at += n;
        Poll::Ready(Ok(()))
    }
}

async fn round_trip(nats: &Nats) -> Result<()> {
    let media = Media::new(nats);
    let body = bytes(5 * MB);
    ensure!(media.get("a/b c.wav").await?.is_none() && media.info("a/b c.wav").await?.is_none());
    ensure!(media.get_bytes("a/b c.wav", 1).await?.is_none() && !media.delete("a/b c.wav").await?);

    let info = media.put("a/b c.wav", Reader { bytes: body.clone(), at: 0, end: End::Eof }).await?;
    ensure!(info.key == "a/b c.wav" && info.bytes == body.len() as u64 && info.modified_ms > 0, "{info:?}");
    ensure!(media.info("a/b c.wav").await? == Some(info.clone()));
    ensure!(get(&media, "a/b c.wav").await? == body);
    ensure!(media.get_bytes("a/b c.wav", body.len()).await?.context("bytes")? == body);
    match media.get_bytes("a/b c.wav", body.len() - 1).await {
        Err(MediaError::TooLarge { bytes, .. }) if bytes == body.len() as u64 => {}
        other => bail!("{other:?}"),
    }

    let empty = media.put_bytes("empty", Bytes::new()).await?;
    ensure!(empty.bytes == 0 && get(&media, "empty").await?.is_empty());
    let one_chunk = bytes(CHUNK);
    media.put_bytes("chunk", one_chunk.clone()).await?;
    ensure!(get(&media, "chunk").await? == one_chunk);
    let keys = |infos: Vec<ObjectInfo>| infos.into_iter().map(|info| info.key).collect::<Vec<_>>();
    ensure!(keys(media.list().await?) == ["a/b c.wav", "empty", "chunk"]);
    ensure!(media.delete("empty").await? && !media.delete("empty").await?);
    ensure!(media.get("empty").await?.is_none() && keys(media.list().await?) == ["a/b c.wav", "chunk"]);

    for bad in [String::new(), "x".repeat(1_025)] {
        ensure!(matches!(media.put_bytes(&bad, Bytes::new()).await, Err(MediaError::BadKey)));
        ensure!(matches!(media.get(&bad).await, Err(MediaError::BadKey)));
    }
    let long = "é".repeat(512);
    media.put_bytes(&long, one_chunk.clone()).await?;
    ensure!(get(&media, &long).await? == one_chunk);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn objects_come_back_as_they_were_put_on_one_server() -> Result<()> {
    let server = NatsServer::start().await?;
    round_trip(&ready(vec![server.url()], 1).await?).await
}

#[tokio::test(flavor = "multi_thread")]
async fn objects_come_back_as_they_were_put_on_three_servers() -> Result<()> {
    let cluster = Cluster::start(3).await?;
    round_trip(&ready(cluster.urls(), 3).await?).await
}

#[tokio::test]
async fn other_clients_read_ours_and_we_read_theirs() -> Result<()> {
    let server = NatsServer::start().await?;
    let nats = ready(vec![server.url()], 1).await?;
    let (media, js) = (Media::new(&nats), server.jetstream().await?);
    let bucket = js.get_object_store("asr_media").await?;
    let body = bytes(MB);

    media.put_bytes("ours", body.clone()).await?;
    let mut read = Vec::new();
    bucket.get("ours").await?.read_to_end(&mut read).await?;
    ensure!(read == body, "{} bytes", read.len());

    bucket.put("theirs", &mut &body[..]).await?;
    ensure!(get(&media, "theirs").await? == body);
    // Replaced by us, then deleted by them.
    media.put_bytes("theirs", bytes(10)).await?;
    bucket.delete("theirs").await?;
    ensure!(media.get("theirs").await?.is_none() && media.list().await?.len() == 1);
    media.put_bytes("theirs", body.clone()).await?;
    ensure!(get(&media, "theirs").await? == body);
    // Somebody else's pointer elsewhere is not followed.
    bucket.add_link("link", &bucket.info("ours").await?).await?;
    ensure!(media.get("link").await?.is_none() && media.list().await?.len() == 2);
    Ok(())
}

#[tokio::test]
async fn what_is_replaced_or_deleted_leaves_nothing_behind() -> Result<()> {
    let server = NatsServer::start().await?;
    let nats = ready(vec![server.url()], 1).await?;
    let (media, js) = (Media::new(&nats), server.jetstream().await?);
    media.put_bytes("k", bytes(MB)).await?;
    media.put_bytes("k", bytes(10)).await?;
    ensure!(stored(&js).await? == 2 && get(&media, "k").await? == bytes(10));
    ensure!(media.delete("k").await? && stored(&js).await? == 0);

    // Of many at once one wins, and takes the others' chunks along.
    let mut puts = tokio::task::JoinSet::new();
    for n in 0..4 {
        let media = media.clone();
        puts.spawn(async move { media.put_bytes("k", bytes(n * CHUNK + 5)).await });
    }
    let mut lengths = Vec::new();
    while let Some(put) = puts.join_next().await {
        lengths.push(put??.bytes);
    }
    ensure!(lengths.len() == 4);
    let left = get(&media, "k").await?;
    ensure!(stored(&js).await? == 1 + left.len().div_ceil(CHUNK) as u64);
    Ok(())
}

#[tokio::test]
async fn a_put_that_fails_takes_its_chunks_away() -> Result<()> {
    let server = NatsServer::start().await?;
    let nats = ready(vec![server.url()], 1).await?;
    let (media, js) = (Media::new(&nats), server.jetstream().await?);
    media.put_bytes("k", bytes(10)).await?;

    let failing = Reader { bytes: bytes(3 * MB), at: 0, end: End::Fails };
    match media.put("k", failing).await {
        Err(MediaError::Read(error)) if error.kind() == io::ErrorKind::BrokenPipe => {}
        other => bail!("{other:?}"),
    }
    chunks_gone(&js, 2).await?;

    let hanging = media.put("k", Reader { bytes: bytes(3 * MB), at: 0, end: End::Hangs });
    let has_begun = eventually("chunks are stored", SOON, || async { (stored(&js).await.ok()? > 10).then_some(()) });
    tokio::select! {
        put = hanging => bail!("{put:?}"),
        begun = has_begun => begun?,
    }
    chunks_gone(&js, 2).await?;
    ensure!(get(&media, "k").await? == bytes(10), "the object before it is untouched");

    // A process that died took nothing away.
    for _ in 0..3 {
        js.publish("$O.asr_media.C.orphan", bytes(CHUNK)).await?.await?;
    }
    let swept = media.sweep(Duration::from_secs(3_600)).await?;
    ensure!(swept.objects == 0 && stored(&js).await? == 5, "{swept:?}");
    let swept = media.sweep(Duration::ZERO).await?;
    ensure!(swept.objects == 1 && swept.chunks == 3 && stored(&js).await? == 2, "{swept:?}");
    ensure!(get(&media, "k").await? == bytes(10));
    Ok(())
}

#[tokio::test]
async fn a_damaged_object_is_an_error_and_never_a_short_one() -> Result<()> {
    let server = NatsServer::start().await?;
    let nats = ready(vec![server.url()], 1).await?;
    let (media, js) = (Media::new(&nats), server.jetstream().await?);
    let stream = js.get_stream(names::MEDIA).await?;
    let body = bytes(10 * CHUNK);
    let (mut first, mut cases) = (1, Vec::new());
    for key in ["first", "middle", "last", "all", "digest", "size", "replaced"] {
        media.put_bytes(key, body.clone()).await?;
        // Ten chunks and a record.
        cases.push((key, first));
        first += 11;
    }
    let seq = |key: &str| cases.iter().find(|(k, _)| *k == key).map(|(_, seq)| *seq).context("key");
    stream.delete_message(seq("first")?).await?;
    stream.delete_message(seq("middle")? + 5).await?;
    stream.delete_message(seq("last")? + 9).await?;
    for n in 0..10 {
        stream.delete_message(seq("all")? + n).await?;
    }
    for key in ["first", "middle", "last", "all"] {
        ensure!(damaged(&media, key).await? == "chunks are missing", "{key}");
    }
    // Records that say something else than what is stored.
    for (key, field, value) in [("digest", "digest", "SHA-256=AAAA".into()), ("size", "size", (10 * CHUNK - 1).into())]
    {
        let record = stream.get_raw_message(seq(key)? + 10).await?;
        let mut json: serde_json::Value = serde_json::from_slice(&record.payload)?;
        json[field] = value;
        js.publish(record.subject.to_string(), serde_json::to_vec(&json)?.into()).await?.await?;
    }
    ensure!(damaged(&media, "digest").await? == "its digest is not that of its record");
    ensure!(damaged(&media, "size").await? == "its length is not that of its record");

    // Replaced while it is read: what was begun cannot be finished.
    let large = bytes(24 * MB);
    media.put_bytes("replaced", large.clone()).await?;
    let mut object = media.get("replaced").await?.context("object")?;
    let mut begin = vec![0; CHUNK];
    object.read_exact(&mut begin).await?;
    ensure!(begin == large[..CHUNK]);
    media.put_bytes("replaced", body.clone()).await?;
    match whole(object).await {
        Err(MediaError::Damaged { .. }) => {}
        other => bail!("{:?}", other.map(|bytes| bytes.len())),
    }
    ensure!(get(&media, "replaced").await? == body);
    Ok(())
}

#[tokio::test]
async fn a_full_store_says_so_and_can_be_emptied() -> Result<()> {
    let server = NatsServer::start().await?;
    let nats = connected(vec![server.url()]).await?;
    let config = TopologyConfig { media_max_bytes: 1024 * 1024, ..TopologyConfig::default() };
    topology::ensure(&nats, &config).await?;
    let (media, js) = (Media::new(&nats), server.jetstream().await?);
    media.put_bytes("a", bytes(4 * CHUNK)).await?;
    ensure!(matches!(media.put_bytes("b", bytes(2 * MB)).await, Err(MediaError::Full)));
    chunks_gone(&js, 5).await?;
    ensure!(media.get("b").await?.is_none() && get(&media, "a").await?.len() == 4 * CHUNK);
    // To the brim, where not even a marker fits.
    for (n, size) in
        [CHUNK, CHUNK, 50_000, 10_000, 1_000, 1_000, 100, 100, 1, 1].into_iter().cycle().take(60).enumerate()
    {
        match media.put_bytes(&format!("fill-{n}"), bytes(size)).await {
            Ok(_) | Err(MediaError::Full) => {}
            Err(error) => return Err(error.into()),
        }
    }
    let tight = eventually("the store is tight", SOON, || async {
        let full = media.put_bytes("more", Bytes::from_static(b"x")).await;
        matches!(full, Err(MediaError::Full)).then_some(())
    });
    tight.await?;
    ensure!(media.delete("a").await? && media.get("a").await?.is_none());
    media.put_bytes("b", bytes(3 * CHUNK)).await?;
    ensure!(get(&media, "b").await?.len() == 3 * CHUNK);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_read_goes_on_over_lost_connections_and_restarts() -> Result<()> {
    let mut server = NatsServer::start().await?;
    let relay = Relay::start(&server.url()).await?;
    let (near, far) = (ready(vec![server.url()], 1).await?, connected(vec![relay.url()]).await?);
    // More than is ever asked for at once.
    let body = bytes(24 * MB);
    Media::new(&near).put_bytes("k", body.clone()).await?;
    let mut object = Media::new(&far).get("k").await?.context("object")?;
    let mut read = vec![0; 5 * MB];
    object.read_exact(&mut read).await?;
    relay.reset();
    let mut more = vec![0; 6 * MB];
    timeout(SOON, object.read_exact(&mut more)).await??;
    read.extend(more);
    server.restart().await?;
    timeout(2 * SOON, object.read_to_end(&mut read)).await??;
    ensure!(read.len() == body.len() && read == body, "{} bytes", read.len());
    Ok(())
}
