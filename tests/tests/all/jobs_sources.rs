//! `voxfleet transcribe` on recordings that lie elsewhere: behind HTTPS, in S3, in a folder of the worker's machine.

use std::{process::Output, time::Duration};

use anyhow::{Context as _, Result, ensure};
use voxfleet_harness::{
    audio, find,
    fleet::{self, Engine, Fleet},
    https::{self, Answer},
    process::{Settings, voxfleet},
    s3,
};

/// Runs `voxfleet transcribe URL -f FORMAT`.
async fn transcribe(fleet: &Fleet, url: &str, format: &str) -> Result<Output> {
    let mut command = voxfleet(&Settings::new().with("nats.urls", fleet.url()), fleet.dir())?;
    command.args(["transcribe", url, "-f", format]).stdin(std::process::Stdio::null());
    let running = tokio::task::spawn_blocking(move || command.output());
    Ok(tokio::time::timeout(Duration::from_secs(120), running).await???)
}

/// The words of an SRT file, without numbers and times.
fn words(srt: &str) -> String {
    let text = srt.lines().filter(|line| !line.contains("-->") && line.parse::<u32>().is_err());
    text.collect::<Vec<_>>().join(" ").split_whitespace().collect::<Vec<_>>().join(" ")
}

async fn gives_subtitles(fleet: &Fleet, url: &str) -> Result<()> {
    let output = transcribe(fleet, url, "srt").await?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let why = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "{url}: {}\n{why}\n{}", output.status, fleet.logs());
    ensure!(said.starts_with("1\n00:00:"), "{url}: not subtitles\n{said}");
    let rate = audio::word_error_rate(&audio::call_text(2)?, &words(&said));
    ensure!(rate <= 0.02, "{url}: word error rate {rate:.3}\n{said}");
    Ok(())
}

async fn refused(fleet: &Fleet, url: &str, code: i32, word: &str) -> Result<()> {
    let output = transcribe(fleet, url, "text").await?;
    let why = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.code() == Some(code), "{url}: {} instead of {code}\n{why}", output.status);
    ensure!(why.contains(word), "{url}: no word of {word:?}\n{why}");
    ensure!(output.stdout.is_empty(), "{url}: a result of nothing");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn recordings_come_from_https_and_folders() -> Result<()> {
    let _turn = fleet::turn().await;
    let flac = find::root().join("tests/audio/call-02.flac");
    let server = https::Server::start().await?;
    server.route("/call.flac", [Answer::file(std::fs::read(&flac)?)]);
    server.route("/secret.flac", [Answer::status(403)]);
    server.route("/elsewhere.flac", [Answer::redirect("http://127.0.0.1:9/x.flac")]);
    server.route("/page.flac", [Answer::file(&b"<html><body>please log in</body></html>"[..])]);
    let fleet = Fleet::builder()
        .workers(1)
        .slots(1)
        .engine(Engine::Micro)
        .set("worker.fetch.https_hosts", server.host())
        .set("worker.fetch.ca_file", server.ca_file().display())
        .set("worker.fetch.file_roots", flac.parent().context("folder")?.display())
        .start()
        .await?;
    gives_subtitles(&fleet, &server.url("/call.flac")).await?;
    gives_subtitles(&fleet, &format!("file://{}", flac.display())).await?;
    refused(&fleet, &server.url("/secret.flac"), 66, "403").await?;
    refused(&fleet, &server.url("/missing.flac"), 66, "not_found").await?;
    refused(&fleet, &server.url("/elsewhere.flac"), 66, "http_hosts").await?;
    refused(&fleet, &server.url("/page.flac"), 65, "web page").await?;
    refused(&fleet, "file:///etc/hostname", 66, "file_roots").await?;
    refused(&fleet, "https://127.0.0.1:1/call.flac", 66, "127.0.0.1").await?;
    refused(&fleet, "s3://bucket/call.flac", 66, "bucket").await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn recordings_come_from_s3() -> Result<()> {
    let folder = match s3::installed() {
        Ok(folder) => folder,
        Err(why) => {
            println!("skipped: {why}");
            return Ok(());
        }
    };
    let _turn = fleet::turn().await;
    let server = s3::Server::start(&folder).await?;
    server.make_bucket("calls").await?;
    let flac = std::fs::read(find::root().join("tests/audio/call-02.flac"))?;
    server.put_object("calls", "2026/call%2002.flac", &flac).await?;
    server.put_object("calls", "call.flac", &flac).await?;
    let fleet = Fleet::builder()
        .workers(1)
        .slots(1)
        .engine(Engine::Micro)
        .set("worker.fetch.s3_buckets", "calls")
        .set("worker.fetch.s3_endpoint", server.endpoint())
        .set("worker.fetch.s3_allow_http", true)
        .set("worker.fetch.s3_access_key_id", "test")
        .set("worker.fetch.s3_secret_access_key", "test-secret-that-nobody-may-see")
        .start()
        .await?;
    gives_subtitles(&fleet, "s3://calls/call.flac").await?;
    gives_subtitles(&fleet, "s3://calls/2026/call%2002.flac").await?;
    refused(&fleet, "s3://calls/missing.flac", 66, "missing.flac").await?;
    refused(&fleet, "s3://others/call.flac", 66, "others").await?;
    ensure!(!fleet.logs().contains("test-secret-that-nobody-may-see"), "a secret in a log");
    Ok(())
}
