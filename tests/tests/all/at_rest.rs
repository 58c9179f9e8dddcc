//! Encryption at rest: with JetStream's own, the disk holds no word, no sound and no name of a session; the key brings all of
//! it back, and another key is refused before it can do harm.

use std::{
    path::Path,
    process::{Command, Output},
};

use anyhow::{Context as _, Result, ensure};
use async_nats::jetstream;
use voxfleet_harness::{
    audio, find,
    ports::free_port,
    server::{NatsServer, ServerOptions},
};
use voxfleet_nats::{
    Nats, NatsConfig,
    topology::{self, TopologyConfig},
};

const WORDS: &str = "the merger is announced on thursday";
const SESSION: &str = "patient-4711-call";
const KEY: &str = "0f4c1de2b7a9835660718293a4b5c6d7e8f90a1b2c3d4e5f";
const OTHER: &str = "ffffffffffffffffffffffffffffffffffffffffffffffff";

/// A server whose store is encrypted with the file we deploy, or a plain one.
async fn start(encrypted: bool) -> Result<(NatsServer, u16)> {
    let conf = std::fs::read_to_string(find::root().join("deploy/nats/encryption.conf"))?;
    ensure!(conf.contains("\nkey: $VOXFLEET_NATS_JS_KEY\n"), "{conf}");
    let included = if encrypted {
        conf.replace("\nkey: $VOXFLEET_NATS_JS_KEY\n", &format!("\nkey: {KEY:?}\n"))
    } else {
        String::new()
    };
    let port = free_port()?;
    let extra = format!("http: \"127.0.0.1:{port}\"\njetstream {{\n  sync_interval: \"1s\"\n{included}\n}}");
    Ok((NatsServer::start_with(ServerOptions { extra, ..ServerOptions::default() }).await?, port))
}

/// What must not be read on a disk.
fn secrets() -> Vec<Vec<u8>> {
    let sound = audio::bursts(5, 1.0).bytes();
    vec![WORDS.as_bytes().to_vec(), SESSION.as_bytes().to_vec(), sound[8_000..8_064].to_vec()]
}

async fn fill(server: &NatsServer) -> Result<()> {
    let config = NatsConfig { urls: vec![server.url()], ..NatsConfig::default() };
    let nats = Nats::connect(&config, "at-rest-test").await?;
    topology::ensure(&nats, &TopologyConfig::default()).await?;
    let js = server.jetstream().await?;
    let sound = audio::bursts(5, 1.0).bytes();
    for subject in [
        format!("asr.v1.transcript.session.{SESSION}.final"),
        format!("asr.v1.checkpoint.session.{SESSION}"),
        format!("asr.v1.event.session.{SESSION}.ended"),
        format!("asr.v1.dead.session.{SESSION}"),
        format!("$KV.asr_sessions.{SESSION}"),
    ] {
        js.publish(subject, WORDS.into()).await?.await?;
    }
    js.publish(format!("asr.v1.audio.{SESSION}"), sound.clone().into()).await?.await?;
    js.get_object_store("asr_media").await?.put(SESSION, &mut sound.as_slice()).await?;
    // What a server keeps in memory before it writes is on the disk when it has ended in order.
    Ok(())
}

/// Files below a folder in which one of these stands.
fn holding(dir: &Path, needles: &[Vec<u8>]) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        // A file's name may tell as much as what is in it.
        let name = path.file_name().map(|name| name.as_encoded_bytes().to_vec()).unwrap_or_default();
        if path.is_dir() {
            found.extend(holding(&path, needles)?);
        }
        let bytes = if path.is_file() { std::fs::read(&path)? } else { Vec::new() };
        let has = |text: &[u8], needle: &[u8]| text.windows(needle.len()).any(|window| window == needle);
        if needles.iter().any(|needle| has(&bytes, needle) || has(&name, needle)) {
            found.push(path.display().to_string());
        }
    }
    Ok(found)
}

async fn everything_reads(js: &jetstream::Context) -> Result<()> {
    let stream = js.get_stream("ASR_TRANSCRIPT").await?;
    let subject = format!("asr.v1.transcript.session.{SESSION}.final");
    ensure!(stream.get_last_raw_message_by_subject(&subject).await?.payload.as_ref() == WORDS.as_bytes());
    let sound = audio::bursts(5, 1.0).bytes();
    let stream = js.get_stream("ASR_AUDIO").await?;
    let chunk = stream.get_last_raw_message_by_subject(&format!("asr.v1.audio.{SESSION}")).await?;
    ensure!(chunk.payload.as_ref() == sound.as_slice());
    let mut object = js.get_object_store("asr_media").await?.get(SESSION).await?;
    let mut read = Vec::new();
    tokio::io::AsyncReadExt::read_to_end(&mut object, &mut read).await?;
    ensure!(read == sound, "the object differs");
    let key = js.get_key_value("asr_sessions").await?.get(SESSION).await?.context("the key")?;
    ensure!(key.as_ref() == WORDS.as_bytes());
    Ok(())
}

/// What stands in front of a server.
fn key_check(store: &Path, key: Option<&str>, old: Option<&str>) -> Result<Output> {
    let mut command = Command::new("sh");
    command.arg(find::root().join("deploy/nats/key-check.sh")).arg(store);
    for (name, value) in [("VOXFLEET_NATS_JS_KEY", key), ("VOXFLEET_NATS_JS_KEY_OLD", old)] {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    Ok(command.output()?)
}

async fn healthz(port: u16) -> Result<String> {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", port)).await?;
    stream.write_all(b"GET /healthz HTTP/1.0\r\n\r\n").await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    Ok(answer)
}

#[tokio::test]
async fn the_disk_tells_nothing_and_the_key_brings_it_back() -> Result<()> {
    // First the same without encryption: else this test could not fail.
    let (mut plain, _) = start(false).await?;
    fill(&plain).await?;
    plain.shut_down().await?;
    for secret in secrets() {
        ensure!(
            !holding(&plain.dir().join("store"), std::slice::from_ref(&secret))?.is_empty(),
            "{}",
            secret.escape_ascii()
        );
    }

    let (mut server, health) = start(true).await?;
    let store = server.dir().join("store");
    fill(&server).await?;
    // With streams in it: an empty store has nothing that a key was used for.
    ensure!(key_check(&store, Some(KEY), None)?.status.code() == Some(78), "a store that does not say its key");
    everything_reads(&server.jetstream().await?).await?;
    server.shut_down().await?;
    let found = holding(&store, &secrets())?;
    ensure!(found.is_empty(), "{found:?}");
    server.start_again().await?;
    everything_reads(&server.jetstream().await?).await?;
    ensure!(healthz(health).await?.contains("\"ok\""), "a healthy server");
    server.shut_down().await?;

    // Another key: the server starts and has lost everything, which its health tells; with the right one all is there again,
    // as long as nobody has made streams meanwhile.
    let conf = server.dir().join("server.conf");
    let right = std::fs::read_to_string(&conf)?;
    std::fs::write(&conf, right.replace(KEY, OTHER))?;
    server.start_again().await?;
    let sick = healthz(health).await?;
    ensure!(sick.contains("503") && sick.contains("could not be recovered"), "{sick}");
    ensure!(server.jetstream().await?.get_stream("ASR_TRANSCRIPT").await.is_err(), "readable with any key");
    server.shut_down().await?;
    std::fs::write(&conf, right)?;
    server.start_again().await?;
    everything_reads(&server.jetstream().await?).await
}

#[tokio::test]
async fn a_new_key_takes_over_what_the_old_one_wrote() -> Result<()> {
    let (mut server, health) = start(true).await?;
    fill(&server).await?;
    server.shut_down().await?;
    let conf = server.dir().join("server.conf");
    let old = std::fs::read_to_string(&conf)?;
    let new = old.replace(KEY, OTHER);
    ensure!(new.contains("\n# prev_key: $VOXFLEET_NATS_JS_KEY_OLD"), "{new}");
    // One start with both, as docs/privacy.md has it, then with the new one alone.
    let both = new.replace("\n# prev_key: $VOXFLEET_NATS_JS_KEY_OLD", &format!("\nprev_key: {KEY:?}"));
    for with in [&both, &new] {
        std::fs::write(&conf, with)?;
        server.start_again().await?;
        ensure!(healthz(health).await?.contains("\"ok\""), "a healthy server");
        everything_reads(&server.jetstream().await?).await?;
        server.shut_down().await?;
    }
    // And the old one opens nothing any more.
    std::fs::write(&conf, old)?;
    server.start_again().await?;
    ensure!(
        server.jetstream().await?.get_stream("ASR_TRANSCRIPT").await.is_err(),
        "readable with the key that was taken away"
    );
    Ok(())
}

#[test]
fn a_store_is_opened_with_its_own_key_only() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let store = dir.path().join("store");
    let run = |key, old, code: i32, says: &str| -> Result<()> {
        let output = key_check(&store, key, old)?;
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(
            output.status.code() == Some(code) && text.contains(says),
            "{key:?} {old:?}: {:?} {text}",
            output.status
        );
        ensure!(!text.contains(KEY) && !text.contains(OTHER), "the key is told: {text}");
        Ok(())
    };
    // Nothing is encrypted yet; a key that could be guessed; the first one.
    run(None, None, 0, "")?;
    run(Some("hunter2"), None, 78, "shorter than 32")?;
    run(Some(KEY), None, 0, "")?;
    ensure!(!std::fs::read_to_string(store.join("voxfleet-key.sha256"))?.contains(KEY), "the key itself is kept");
    run(Some(KEY), None, 0, "")?;
    run(Some(OTHER), None, 78, "is not the key")?;
    run(None, None, 78, "is not set")?;
    // A change of the key names both, once.
    run(Some(OTHER), Some(OTHER), 78, "is not the key")?;
    run(Some(OTHER), Some(KEY), 0, "")?;
    run(Some(OTHER), None, 0, "")?;
    run(Some(KEY), None, 78, "is not the key")
}
