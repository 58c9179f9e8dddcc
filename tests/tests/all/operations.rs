//! A fleet is saved, restored, grown and moved by the blocks of `docs/runbook.md`, with real servers, while sessions go on:
//! each acknowledged sample is transcribed once, whatever was under way.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use tokio::task::JoinSet;
use voxfleet_harness::{
    audio::{self, Pcm},
    chaos::{
        schedule::STREAMS,
        talk::{self, Said, Talk},
    },
    checker,
    fleet::{self, Fleet, Servers},
    producer::{Pace, Producer},
    server::{Cluster, NatsServer},
    verdict,
    wait::eventually,
    words,
};
use voxfleet_schema::job::JobState;

use crate::{
    jobs_fleet::{aggregate, chain, connect, ended, request, submit},
    pages::Shell,
    runbook, units,
};

const SOON: Duration = Duration::from_secs(60);

/// Sessions that speak for so long, at the pace of speech, and send again what was not acknowledged.
pub(crate) fn speak(fleet: &Fleet, name: &str, count: u64, seconds: f64) -> JoinSet<Said> {
    let mut speaking = JoinSet::new();
    for n in 0..count {
        let talk = Talk {
            id: format!("{name}-{n}"),
            poison: None,
            seed: 900 + n,
            seconds,
            // Not all in step.
            speed: 1.0 + n as f64 * 0.1,
            chunk_ms: 200,
        };
        speaking.spawn(talk::talk(talk::impatient(fleet.client()), talk));
    }
    speaking
}

/// Waits for all of them and judges each.
pub(crate) async fn judge(fleet: &Fleet, mut speaking: JoinSet<Said>) -> Result<u64> {
    let mut moved = 0;
    while let Some(said) = speaking.join_next().await {
        let said = said?;
        ensure!(said.gave_up.is_none(), "{}: {:?}", said.id, said.gave_up);
        fleet.wait_end(&said.id, SOON).await.with_context(|| fleet.logs())?;
        let verdict = verdict::session(&fleet.js(), &said.id, &said.samples).await?.clean(&said.id)?;
        ensure!(verdict.ended && verdict.finals > 0, "{}: {verdict:?}", said.id);
        moved += u64::from(verdict.epoch > 1);
    }
    Ok(moved)
}

/// Says a whole session and waits for its end; its text.
async fn spoken(fleet: &Fleet, session: &str, seed: u64) -> Result<String> {
    let mut producer = Producer::named(fleet.js(), session, "s1");
    producer.stream(&audio::blasts(seed, 4.0), 200, Pace::AsFastAsPossible).await?;
    producer.end().await?;
    fleet.wait_end(session, SOON).await.with_context(|| fleet.logs())
}

/// In front of a block that restores onto several servers: the first restore of the log is taken by a server and gets no pieces,
/// as where it and the one that `nats` is connected to do not know of each other yet.
const FAILS_ONCE: &str = r#"
nats() {
    if [ "${*:1:3}" = "stream restore backup/ASR_AUDIO" ] && [ ! -e failed ]; then
        sed 's/"num_replicas": 1/"num_replicas": 3/' backup/ASR_AUDIO/backup.json > failed
        command nats req '$JS.API.STREAM.RESTORE.ASR_AUDIO' "$(cat failed)" | grep deliver_subject
        return 1
    fi
    command nats "$@"
}
"#;

/// Saves a fleet while one session speaks, loses everything, and restores it by this block of the page onto `servers`.
async fn saved_and_restored(servers: Servers, block: &str, replicas: usize) -> Result<()> {
    let mut before = Fleet::builder().workers(2).slots(8).start().await?;
    let shell = Shell::new(&before.url())?;
    let done = spoken(&before, "done", 31).await?;
    let (recording, waiting) = (audio::blasts(34, 6.0), audio::blasts(35, 6.0));
    let nats = connect(&before).await?;
    submit(&nats, &request("rec-done", recording.wav())?).await?;
    ensure!(ended(&nats, &before, "rec-done").await?.record.state == JobState::Done, "{}", before.logs());
    let result = aggregate(&before, &chain(&before, "rec-done").await?).await?;
    // Nobody has room for recordings from now on, so the second one waits.
    before.set_later("worker.job_slots", 0);
    for i in 0..before.workers.len() {
        before.workers[i].terminate(SOON).await?;
        before.restart_worker(i)?;
    }
    before.wait_ready().await?;
    submit(&nats, &request("rec-waits", waiting.wav())?).await?;
    nats.close(Duration::from_secs(1)).await;
    let open = audio::blasts(32, 30.0);
    let js = talk::impatient(before.client());
    let half = Pcm::mono_16k(open.samples[..15 * 16_000].to_vec());
    let speaking = async {
        let mut producer = Producer::named(js.clone(), "open", "s1");
        producer.stream(&half, 200, Pace::Speed(2.0)).await
    };
    let saving = async {
        // In the middle of a sentence: there are finals, and there is audio beyond them.
        eventually("a final of the open session", SOON, || async {
            checker::finals(&before.js(), "open").await.ok().filter(|finals| !finals.is_empty()).map(drop)
        })
        .await?;
        // What is saved first and what last lies apart, as with streams of gigabytes: their order is what this holds to.
        let mut block = runbook::block("Backup")?;
        block.commands = format!("nats() {{ command nats \"$@\"; sleep 0.25; }}\n{}", block.commands);
        shell.run(&block).await
    };
    let (spoken_for, saved) = tokio::join!(speaking, saving);
    spoken_for?;
    saved.with_context(|| before.logs())?;
    drop(before);

    let url = servers.urls().remove(0);
    let mut shell = shell;
    shell.at(&url);
    let mut block = runbook::block(block)?;
    if replicas > 1 {
        block.commands = format!("{FAILS_ONCE}{}", block.commands);
    }
    let restored = shell.run(&block).await?;
    ensure!((replicas > 1) == restored.contains("deliver_subject"), "{restored}");
    let builder = Fleet::builder().on(servers).workers(2).slots(8).set("dispatcher.topology.replicas", replicas);
    let after = builder.start().await?;
    let js = after.js();
    let kept: Vec<String> =
        checker::finals(&js, "done").await?.iter().map(|f| f.text()).filter(|text| !text.is_empty()).collect();
    ensure!(kept.join(" ") == done, "{kept:?} in place of {done:?}");
    for stream in ["ASR_AUDIO", "ASR_TRANSCRIPT", "KV_asr_sessions", "OBJ_asr_media", "ASR_LIVE"] {
        let found = js.get_stream(stream).await?.cached_info().config.num_replicas;
        ensure!(found == replicas, "{stream} has {found} copies");
    }

    // What was done is still there to be read, and what waited is done now.
    let nats = connect(&after).await?;
    let kept = aggregate(&after, &chain(&after, "rec-done").await?).await?;
    ensure!(kept == result, "{kept}\nin place of\n{result}");
    let record = ended(&nats, &after, "rec-done").await?.record;
    ensure!(record.state == JobState::Done, "{record:?}");
    let record = ended(&nats, &after, "rec-waits").await?.record;
    ensure!(record.state == JobState::Done, "{record:?}\n{}", after.logs());
    let (heard, end) = verdict::job(&js, "rec-waits", &waiting.samples).await?;
    ensure!(matches!(end, verdict::JobEnd::Done) && heard.clean("rec-waits")?.finals > 0, "{end:?}");
    nats.close(Duration::from_secs(1)).await;

    // The open session goes on from its last final, with what the log had at the backup and what comes now.
    let logged = words::samples_of(&checker::read(&js, "ASR_AUDIO", "asr.v1.audio.open").await?);
    ensure!(!logged.is_empty() && logged[..] == open.samples[..logged.len()], "{} samples are kept", logged.len());
    let rest = Pcm::mono_16k(open.samples[logged.len()..].to_vec());
    let mut producer = Producer::named(js.clone(), "open", "s2");
    // In other pieces than before: what was saved out of order would be found out by its numbers.
    producer.stream(&rest, 70, Pace::Speed(4.0)).await?;
    producer.end().await?;
    after.wait_end("open", SOON).await.with_context(|| after.logs())?;
    verdict::session(&js, "open", &open.samples).await?.clean("open").with_context(|| after.logs())?;
    spoken(&after, "new", 33).await.map(drop)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_taken_while_sessions_speak_restores_to_a_fleet_that_goes_on() -> Result<()> {
    let _place = fleet::place().await;
    saved_and_restored(Servers::One(Box::new(NatsServer::start().await?)), "Restore", 1).await
}

#[tokio::test(flavor = "multi_thread")]
async fn one_server_grows_into_three_by_its_backup() -> Result<()> {
    let _turn = fleet::turn().await;
    saved_and_restored(Servers::Many(Cluster::start(3).await?), "Growing one server into three", 3).await
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_get_their_replicas_while_sessions_speak_and_a_server_may_then_die() -> Result<()> {
    let _turn = fleet::turn().await;
    let cluster = Cluster::start(3).await?;
    let builder = Fleet::builder().on(Servers::Many(cluster)).workers(2).slots(8).dispatchers(2);
    let mut fleet = builder.start().await?;
    ensure!(fleet.js().get_stream("ASR_AUDIO").await?.cached_info().config.num_replicas == 1);
    let speaking = speak(&fleet, "grown", 4, 30.0);
    let mut shell = Shell::new(&fleet.url())?;
    units::install(&mut shell)?;
    shell.set("DISPATCHERS", "d1 d2");
    let block = runbook::block("From one replica to three")?;
    let shown = units::run(&shell, &mut fleet, &block).await.with_context(|| fleet.logs())?;
    ensure!(shown.contains("ASR_AUDIO"), "{shown}");
    for stream in STREAMS {
        let found = fleet.js().get_stream(stream).await?.cached_info().config.num_replicas;
        ensure!(found == 3, "{stream} has {found} copies");
    }
    // Now any one of them may die.
    let leader = fleet.leader_of("ASR_AUDIO").await?;
    fleet.server_at(leader)?.kill9()?;
    judge(&fleet, speaking).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_moves_to_another_disk_while_sessions_speak() -> Result<()> {
    let _place = fleet::place().await;
    let mut fleet = Fleet::builder().workers(2).slots(8).start().await?;
    let done = spoken(&fleet, "done", 41).await?;
    let speaking = speak(&fleet, "carried", 3, 20.0);
    eventually("they speak", SOON, || async {
        let finals = checker::finals(&fleet.js(), "carried-0").await.ok()?;
        (!finals.is_empty()).then_some(())
    })
    .await?;
    let mut shell = Shell::new(&fleet.url())?;
    units::install(&mut shell)?;
    let new = tempfile::tempdir()?;
    let store = fleet.server()?.store();
    for (name, value) in [
        ("OLD", "n1".to_owned()),
        ("NEW", "n1".to_owned()),
        ("STORE", store.display().to_string()),
        ("NEW_STORE", new.path().display().to_string()),
    ] {
        shell.set(name, &value);
    }
    fleet.server()?.store_at(new.path());
    units::run(&shell, &mut fleet, &runbook::block("Moving a server")?).await.with_context(|| fleet.logs())?;
    // What is left behind is not what answers.
    std::fs::remove_dir_all(&store)?;
    judge(&fleet, speaking).await?;
    let kept: Vec<String> =
        checker::finals(&fleet.js(), "done").await?.iter().map(|f| f.text()).filter(|text| !text.is_empty()).collect();
    ensure!(kept.join(" ") == done, "{kept:?} in place of {done:?}");
    Ok(())
}
