//! Least privilege on a real server with what `voxfleet auth init` wrote: each role does its whole part with its own key,
//! and is refused everything else.

mod refusals;

use std::{path::Path, process::Output, time::Duration};

use anyhow::{Context as _, Result, ensure};
use async_nats::jetstream;
use serde_json::Value;
use voxfleet_harness::{
    audio, checker,
    child::Child,
    fleet::{self, Engine, Fleet, Servers},
    login::Keys,
    process::{Settings, voxfleet},
    producer::{Pace, Producer},
    server::{NatsServer, ServerOptions},
    verdict,
    wait::eventually,
};
use voxfleet_http::probe::Probe;
use voxfleet_schema::fleet::ControlRequest;

use crate::{dead_letters::said, direct};

const SOON: Duration = Duration::from_secs(60);
const ACCOUNT: &str = "clinic";

/// A server with accounts.
pub(crate) async fn server(keys: &Keys) -> Result<NatsServer> {
    Ok(NatsServer::start_with(ServerOptions { extra: keys.include(), ..ServerOptions::default() }).await?)
}

/// Somebody with the key of one role in front of a shell.
pub(crate) struct Person<'a> {
    pub(crate) keys: &'a Keys,
    pub(crate) account: &'a str,
    pub(crate) role: &'a str,
    pub(crate) url: String,
    pub(crate) dir: &'a Path,
}

impl Person<'_> {
    fn settings(&self) -> Settings {
        self.keys.login(self.account, self.role).settings().with("nats.urls", &self.url)
    }

    pub(crate) fn command(&self, words: &[&str]) -> Result<std::process::Command> {
        let mut command = voxfleet(&self.settings(), self.dir)?;
        command.args(words);
        Ok(command)
    }

    pub(crate) async fn types(&self, words: &[&str]) -> Result<Output> {
        let mut command = self.command(words)?;
        Ok(tokio::task::spawn_blocking(move || command.output()).await??)
    }

    /// What must go well.
    pub(crate) async fn does(&self, words: &[&str]) -> Result<String> {
        let output = self.types(words).await?;
        ensure!(output.status.success(), "{} {words:?}: {}", self.role, said(&output));
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

/// Lines of a server's log that say somebody was refused.
pub(crate) fn violations(log: &str) -> Vec<&str> {
    log.lines().filter(|line| line.contains("Violation")).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn each_role_does_its_part_and_nothing_else() -> Result<()> {
    let _turn = fleet::turn().await;
    let keys = Keys::make(&[ACCOUNT], &[])?;
    let server = server(&keys).await?;
    let builder = Fleet::builder().workers(2).engine(Engine::Simulated { speed: 40.0 }).of_account(&keys, ACCOUNT);
    // Its producer pauses while others are asked: a flush would cut what it says in another place than without a death.
    let builder = builder.set("dispatcher.http.listen", "127.0.0.1:0").set("dispatcher.flush_after_ms", 60_000);
    let mut fleet = builder.on(Servers::Elsewhere(vec![server.url()])).start().await.with_context(|| server.log())?;
    let parts = parts(&mut fleet, &keys).await;
    parts.with_context(|| format!("{}\n{}", fleet.logs(), violations(&server.log()).join("\n")))?;
    let log = server.log();
    // Nobody needed more than the role has.
    ensure!(violations(&log).is_empty(), "{}", violations(&log).join("\n"));

    refusals::everything_else(&fleet, &keys, ACCOUNT).await.with_context(|| fleet.logs())?;
    Ok(())
}

async fn parts(fleet: &mut Fleet, keys: &Keys) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let url = fleet.url();
    let person = |role: &'static str| Person { keys, account: ACCOUNT, role, url: url.clone(), dir: folder.path() };
    let (producer, viewer, operator) = (person("producer"), person("viewer"), person("operator"));

    // A session through a death, watched by a viewer.
    let words = ["watch", "talk", "--json", "--until-end"];
    let mut watching = Child::start("viewer", viewer.command(&words)?, &folder.path().join("viewer.log"))?;
    let readers = || async {
        let names = checker::consumer_names(&fleet.js(), "ASR_TRANSCRIPT").await.ok()?;
        names.iter().any(|name| name.starts_with("feed-")).then_some(())
    };
    eventually("the viewer reads", SOON, readers).await?;
    let (client, refusals) = keys.login(ACCOUNT, "producer").connect(fleet.urls()).await?;
    let pcm = audio::bursts(91, 24.0);
    let (first, second) = pcm.samples.split_at(12 * 16_000);
    let mut sending = Producer::named(jetstream::new(client.clone()), "talk", "s");
    sending.stream(&audio::Pcm::mono_16k(first.to_vec()), 100, Pace::Speed(8.0)).await?;
    let why = || async {
        let told = operator.does(&["status", "--why", "talk", "--json"]).await.ok()?;
        let told: Value = serde_json::from_str(&told).ok()?;
        told["record"]["worker"]["gpu_id"].as_str().map(str::to_owned)
    };
    let owner = eventually("somebody has it", SOON, why).await?;
    fleet.workers.iter_mut().find(|w| w.gpu_id() == owner).context("its worker")?.kill9()?;
    sending.stream(&audio::Pcm::mono_16k(second.to_vec()), 100, Pace::Speed(8.0)).await?;
    sending.end().await?;
    ensure!(watching.wait(SOON).await?.success(), "{}", watching.log_tail());
    let text = fleet.wait_end("talk", SOON).await?;
    assert_eq!(text, direct::simulated_text(&pcm)?, "with and without a death");
    verdict::session(&fleet.js(), "talk", &pcm.samples).await?.clean("talk")?;
    let spoken = |text: &str| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    for reader in [&viewer, &producer] {
        assert_eq!(spoken(&reader.does(&["export", "talk", "-f", "text"]).await?), spoken(&text), "{}", reader.role);
    }

    // The producer's own commands: a recording from its disk, one that is none, a stream.
    let recording = audio::bursts(92, 8.0);
    std::fs::write(folder.path().join("a.wav"), recording.wav())?;
    let heard = producer.does(&["transcribe", "a.wav", "--id", "rec"]).await?;
    assert_eq!(spoken(&heard), spoken(&direct::simulated_text(&recording)?));
    producer.does(&["stream", "a.wav", "--session", "live", "--speed", "8", "--wait"]).await?;
    for words in
        [&["jobs", "list"][..], &["jobs", "show", "rec"], &["jobs", "result", "rec"], &["plan"], &["export", "rec"]]
    {
        producer.does(words).await?;
    }
    std::fs::write(folder.path().join("noise.wav"), b"no audio at all")?;
    ensure!(!producer.types(&["transcribe", "noise.wav", "--id", "noise"]).await?.status.success());
    ensure!(refusals.all().is_empty(), "{:?}", refusals.all());

    // The dispatcher's own pages ask with its own login.
    let page = fleet.dispatchers[0].http_url().await?;
    for path in
        ["/api/fleet", "/api/sessions", "/api/sessions/talk", "/api/jobs", "/api/jobs/rec", "/api/dead", "/api/events"]
    {
        let seen = Probe::default().get(&format!("{page}{path}"), SOON).await?;
        ensure!(seen.status == 200, "{path}: {} {}", seen.status, String::from_utf8_lossy(&seen.body));
    }

    // The operator finds the dead letter, sends it again and puts it away, and empties a card.
    let letter = || async {
        let list = operator.does(&["jobs", "dead", "list", "--json"]).await.ok()?;
        let list: Value = serde_json::from_str(&list).ok()?;
        list["letters"].as_array()?.iter().any(|l| l["id"] == "noise").then_some(())
    };
    eventually("a letter of the noise", SOON, letter).await?;
    operator.does(&["jobs", "dead", "show", "noise"]).await?;
    let again = operator.does(&["jobs", "dead", "retry", "noise", "--json"]).await?;
    ensure!(again.contains("noise-r1"), "{again}");
    eventually("its letter", SOON, || async {
        let list = operator.does(&["jobs", "dead", "list", "--json"]).await.ok()?;
        list.contains("noise-r1").then_some(())
    })
    .await?;
    operator.does(&["jobs", "dead", "drop", "noise-r1"]).await?;
    operator.does(&["status", "--all"]).await?;
    let checked = operator.does(&["doctor"]).await?;
    ensure!(checked.contains("all there, as wanted"), "{checked}");
    let left = fleet.workers.iter().map(|w| w.gpu_id().to_owned()).find(|gpu| *gpu != owner).context("a worker")?;
    operator.does(&["drain", &left, "--deadline", "20s", "--wait"]).await?;

    // And removes all that is kept of a call.
    let removed = operator.does(&["purge", "session", "talk"]).await?;
    ensure!(removed.contains("ASR_TRANSCRIPT") && removed.contains("ASR_AUDIO"), "{removed}");
    for subject in ["asr.v1.transcript.session.talk.final", "asr.v1.audio.talk"] {
        let stream = if subject.contains("audio") { "ASR_AUDIO" } else { "ASR_TRANSCRIPT" };
        ensure!(checker::read(&fleet.js(), stream, subject).await?.is_empty(), "{subject} is still there");
    }
    Ok(())
}

/// The two files of a role are copied to other machines, which keep them where they like.
#[tokio::test(flavor = "multi_thread")]
async fn the_files_of_a_role_work_wherever_they_lie() -> Result<()> {
    let keys = Keys::make(&[ACCOUNT], &[])?;
    let server = server(&keys).await?;
    let there = tempfile::tempdir()?;
    let folder = there.path().join("of the operator");
    std::fs::create_dir(&folder)?;
    for name in ["operator.toml", "operator.nk"] {
        std::fs::copy(keys.dir().join(ACCOUNT).join(name), folder.join(name))?;
    }
    let url = server.url();
    // The place where they were made is gone, as it is on that machine.
    drop(keys);
    for (config, from) in [("of the operator/operator.toml", there.path()), ("operator.toml", folder.as_path())] {
        let mut command = voxfleet(&Settings::new(), there.path())?;
        command.current_dir(from).args(["--config", config, "--url", &url, "doctor"]);
        let output = tokio::task::spawn_blocking(move || command.output()).await??;
        let told = said(&output);
        ensure!(told.lines().any(|line| line.starts_with("ok") && line.contains("round trip")), "{config}: {told}");
    }
    Ok(())
}

/// A role that lacks something hears so, at once and in words, and not after a wait in silence.
#[tokio::test(flavor = "multi_thread")]
async fn who_lacks_a_permission_is_told_so() -> Result<()> {
    let _place = fleet::place().await;
    let keys = Keys::make(&[ACCOUNT], &[])?;
    let server = server(&keys).await?;
    let builder = Fleet::builder().workers(1).of_account(&keys, ACCOUNT);
    let fleet = builder.on(Servers::Elsewhere(vec![server.url()])).start().await?;
    let folder = tempfile::tempdir()?;
    let person =
        |role: &'static str| Person { keys: &keys, account: ACCOUNT, role, url: fleet.url(), dir: folder.path() };
    std::fs::write(folder.path().join("a.wav"), audio::bursts(94, 2.0).wav())?;
    let rows: &[(&str, &[&str], &str)] = &[
        ("viewer", &["stream", "a.wav", "--session", "x"], "asr.v1.audio.x"),
        ("viewer", &["transcribe", "a.wav"], "$O.asr_media.C."),
        ("viewer", &["jobs", "list"], "asr.v1.api.job.list"),
        ("viewer", &["jobs", "dead", "list"], "$JS.API.STREAM.INFO.ASR_DEAD"),
        ("viewer", &["drain", "gpu-1"], "asr.v1.api.fleet.drain"),
        ("producer", &["drain", "gpu-1"], "asr.v1.api.fleet.drain"),
        ("producer", &["jobs", "dead", "list"], "$JS.API.STREAM.INFO.ASR_DEAD"),
        ("worker", &["status"], "asr.v1.api.fleet.status"),
        ("viewer", &["status", "--why", "x"], "$JS.API.STREAM.MSG.GET.KV_asr_"),
        ("viewer", &["purge", "session", "x"], "$JS.API."),
        ("producer", &["purge", "session", "x"], "$JS.API."),
        ("worker", &["purge", "session", "x"], "$JS.API."),
        ("dispatcher", &["purge", "session", "x"], "$JS.API."),
    ];
    for (role, words, subject) in rows {
        let begun = std::time::Instant::now();
        let output = person(role).types(words).await?;
        ensure!(!output.status.success(), "{role} {words:?} went well");
        ensure!(
            said(&output).contains("this login may not") && said(&output).contains(subject),
            "{role} {words:?}: {}",
            said(&output)
        );
        ensure!(begun.elapsed() < Duration::from_secs(20), "{role} {words:?} took {:?}", begun.elapsed());
    }
    let table = person("viewer").does(&["status"]).await?;
    ensure!(table.contains("gpu-1") && table.contains("alive"), "{table}");
    ensure!(table.contains("sessions are not shown: this login may not"), "{table}");
    let checked = said(&person("viewer").types(&["doctor"]).await?);
    ensure!(checked.contains("not looked at: this login may not"), "{checked}");
    ensure!(!checked.contains("start nats-server with -js") && !checked.contains("FAIL"), "{checked}");

    // The right key with another role's inboxes: the server refuses where answers would come.
    let mut stranger = person("viewer").command(&["export", "talk"])?;
    stranger.env("VOXFLEET__NATS__INBOX_PREFIX", "_INBOX");
    let output = tokio::task::spawn_blocking(move || stranger.output()).await??;
    ensure!(said(&output).contains("set nats.inbox_prefix"), "{}", said(&output));
    // A dispatcher that was given a viewer's key says what it lacks.
    let mut wrong = person("viewer").command(&["dispatcher"])?;
    let output = tokio::task::spawn_blocking(move || wrong.output()).await??;
    ensure!(!output.status.success() && said(&output).contains("this login may not"), "{}", said(&output));

    // No key, and one that nobody knows.
    let plain = Settings::new().with("nats.urls", fleet.url());
    let strange = Keys::make(&[ACCOUNT], &[])?;
    for settings in [plain.clone(), plain.and(&strange.login(ACCOUNT, "operator").settings())] {
        let mut command = voxfleet(&settings, folder.path())?;
        command.arg("status");
        let output = tokio::task::spawn_blocking(move || command.output()).await??;
        ensure!(
            output.status.code() == Some(69) && said(&output).contains("refused these credentials"),
            "{}",
            said(&output)
        );
    }
    let seed = std::fs::read_to_string(&keys.login(ACCOUNT, "worker").seed_file)?;
    for log in [fleet.logs(), server.log()] {
        ensure!(!log.contains(seed.trim()), "a seed is in a log");
    }
    Ok(())
}

/// What NATS does not hold back, so that docs/security.md stays true: the server sends an answer wherever its asker says, be
/// it a subject on which the asker may not publish. Within one account a key is a key to noise.
#[tokio::test(flavor = "multi_thread")]
async fn answers_go_where_their_asker_says() -> Result<()> {
    let _place = fleet::place().await;
    let keys = Keys::make(&[ACCOUNT, "other"], &[])?;
    let server = server(&keys).await?;
    let builder = Fleet::builder().workers(1).of_account(&keys, ACCOUNT);
    let fleet = builder.on(Servers::Elsewhere(vec![server.url()])).start().await?;
    let (viewer, refusals) = keys.login(ACCOUNT, "viewer").connect(fleet.urls()).await?;
    let count = |stream: &'static str| {
        let js = fleet.js();
        async move { Some(js.get_stream(stream).await.ok()?.cached_info().state.messages) }
    };
    let info = "$JS.API.STREAM.INFO.ASR_TRANSCRIPT";
    let made = || async { count("ASR_TRANSCRIPT").await.and(count("ASR_AUDIO").await) };
    eventually("streams", SOON, made).await?;
    viewer.publish_with_reply(info, "asr.v1.audio.victim", "".into()).await?;
    eventually("noise in another's audio", SOON, || async { count("ASR_AUDIO").await.filter(|n| *n > 0) }).await?;
    // It reaches no request of JetStream that way, and no other account.
    let before = count("ASR_AUDIO").await;
    viewer.publish_with_reply(info, "$JS.API.STREAM.PURGE.ASR_AUDIO", "".into()).await?;
    viewer.publish_with_reply(info, "$JS.API.STREAM.DELETE.ASR_AUDIO", "".into()).await?;
    let own = viewer.new_inbox();
    let mut answer = viewer.subscribe(own.clone()).await?;
    viewer.publish_with_reply(info, own, "".into()).await?;
    tokio::time::timeout(SOON, futures_util::StreamExt::next(&mut answer)).await?.context("an answer")?;
    // The dispatcher may have written behind it.
    ensure!(before.is_some() && count("ASR_AUDIO").await >= before, "a purge by reply");
    ensure!(refusals.all().is_empty(), "{:?}", refusals.all());

    // Bytes of one's own, by a stream that was told where to send them: a worker takes them for no order of its dispatcher,
    // and a dispatcher for no request.
    let (producer, _) = keys.login(ACCOUNT, "producer").connect(fleet.urls()).await?;
    let mut beats = fleet.client().subscribe("asr.v1.heartbeat.gpu-1").await?;
    let beat = tokio::time::timeout(SOON, futures_util::StreamExt::next(&mut beats)).await?.context("a heartbeat")?;
    let beat: Value = serde_json::from_slice(&beat.payload)?;
    let incarnation = beat["incarnation"].as_str().context("its incarnation")?.to_owned();
    let drain = serde_json::to_string(&ControlRequest::Drain { deadline_ms: 1_000 })?;
    let drain_by_api = serde_json::json!({"gpu_id": "gpu-1"}).to_string();
    for (name, body, to) in [
        ("control", drain, format!("asr.v1.control.gpu-1.{incarnation}")),
        ("api", drain_by_api, "asr.v1.api.fleet.drain".to_owned()),
    ] {
        let stored = format!("$O.asr_media.C.{name}");
        jetstream::new(producer.clone()).publish(stored.clone(), body.into()).await?.await?;
        let consumer = serde_json::json!({"stream_name": "OBJ_asr_media", "config": {
            "name": name, "deliver_subject": to, "filter_subject": stored, "ack_policy": "none", "deliver_policy": "all"}});
        let create = format!("$JS.API.CONSUMER.CREATE.OBJ_asr_media.{name}.{stored}");
        let made = producer.request(create, consumer.to_string().into()).await?;
        ensure!(!String::from_utf8_lossy(&made.payload).contains("error"), "{made:?}");
    }
    // Both were sent one after the other: what the worker has heard of, the dispatcher would have acted upon by now. Whether the
    // server gives a stream's messages to the queue group in which a dispatcher listens is its own business.
    let told = || {
        let worker = fleet.workers.first().is_some_and(|w| w.log().contains("is no control request"));
        std::future::ready(worker.then_some(()))
    };
    eventually("the worker passes it over", SOON, told).await.with_context(|| fleet.logs())?;
    ensure!(!fleet.logs().contains("draining"), "{}", fleet.logs());
    Ok(())
}
