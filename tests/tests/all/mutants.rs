//! Does the checker see what it is there for? Two defects are made on the wire, between worker and server, without touching
//! the program: finals without their fence, and finals that say where to go on a little wrongly. Each time the checker
//! must speak up, and without the defect the same disturbance must leave nothing to say (of a plain kill, [`crate::faults`]
//! sees to that).

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use tokio::time::Instant;
use voxfleet_harness::{
    chaos::{
        hands::Hands,
        schedule::{Fault, Process},
    },
    fleet::{self, Fleet, FleetBuilder},
    verdict::Verdict,
    wait::eventually,
    wire::{Fate, Publish},
};
use voxfleet_worker::engine::simulated::text_of;

use crate::faults::{Ground, Load, break_it, owner, session, until};

const FENCE: &str = "Nats-Expected-Last-Subject-Sequence";
const SESSIONS: u64 = 6;

fn is_final(publish: &Publish) -> bool {
    publish.subject.starts_with("asr.v1.transcript.session.") && publish.subject.ends_with(".final")
}

async fn start(builder: FleetBuilder, seed: u64) -> Result<(Hands, Load)> {
    let hands = Hands::new(Ground::OneServer.start(builder.dispatchers(1)).await?);
    let load = Load::crowd(&hands.fleet, seed, 24.0, 1.5, SESSIONS);
    Ok((hands, load))
}

/// When the first worker has a session whose chain has begun: before that nobody would miss it.
async fn writes(fleet: &Fleet, seed: u64) -> Result<Instant> {
    let transcript = fleet.js().get_stream_no_info("ASR_TRANSCRIPT").await?;
    let begun = eventually("a final of a session on the first worker", Duration::from_secs(20), || async {
        for n in 0..SESSIONS {
            let id = session(seed, n);
            let subject = format!("asr.v1.transcript.session.{id}.final");
            if owner(fleet, &id).await == Some(0) && transcript.get_last_raw_message_by_subject(&subject).await.is_ok()
            {
                return Some(Instant::now());
            }
        }
        None
    });
    begun.await.with_context(|| fleet.logs())
}

/// Once one worker has written, nobody hears its heartbeats any more, for eight seconds: its sessions go to the other one
/// while it goes on with them.
async fn two_owners(without_fence: bool) -> Result<Vec<Verdict>> {
    let _place = fleet::place().await;
    let silent = Arc::<AtomicBool>::default();
    let unheard = Arc::clone(&silent);
    let tamper = move |publish: &mut Publish| {
        if publish.subject == "asr.v1.heartbeat.gpu-1" && unheard.load(Ordering::Relaxed) {
            return Fate::Drop;
        }
        if without_fence && is_final(publish) {
            publish.strip(FENCE);
        }
        Fate::Pass
    };
    let (mut hands, load) = start(Ground::builder().tamper_workers(tamper), 41).await?;
    let begun = writes(&hands.fleet, 41).await?;
    silent.store(true, Ordering::Relaxed);
    until(&mut hands, begun + Duration::from_secs(8)).await?;
    silent.store(false, Ordering::Relaxed);
    load.judged(&mut hands).await
}

#[tokio::test(flavor = "multi_thread")]
async fn finals_without_their_fence_are_seen() -> Result<()> {
    let (broken, whole) = tokio::try_join!(two_owners(true), two_owners(false))?;
    let repeated: u64 = broken.iter().map(|v| v.finals_repeated).sum();
    ensure!(repeated > 0, "two workers wrote one chain and nothing was said twice: {broken:#?}");
    ensure!(whole.iter().all(Verdict::is_clean) && whole.iter().any(|v| v.epoch > 1), "{whole:#?}");
    Ok(())
}

/// A worker is killed, and its sessions go on elsewhere, so many samples off since finals lie.
async fn moved(off: u64) -> Result<Vec<Verdict>> {
    let _place = fleet::place().await;
    let tamper = move |publish: &mut Publish| {
        if is_final(publish) {
            publish.rewrite_number("at_frame", |frame| frame + off);
        }
        Fate::Pass
    };
    let (mut hands, load) = start(Ground::builder().tamper_workers(tamper), 42).await?;
    // A little later most of its sessions have written.
    let begun = writes(&hands.fleet, 42).await?;
    until(&mut hands, begun + Duration::from_secs(3)).await?;
    break_it(&mut hands, Fault::Kill(Process::Worker(0), Duration::from_millis(500))).await?;
    load.judged(&mut hands).await
}

#[tokio::test(flavor = "multi_thread")]
async fn finals_that_say_wrongly_where_to_go_on_are_seen() -> Result<()> {
    // A hundredth of a second, and nearly as much as a detector may take for a click.
    let (little, more) = tokio::try_join!(moved(160), moved(2_000))?;
    for broken in [little, more] {
        let lost: u64 = broken.iter().map(|v| v.samples_lost).sum();
        ensure!(lost > 0, "sessions went on at the wrong sample and nobody saw it: {broken:#?}");
        ensure!(broken.iter().any(|v| v.epoch > 1), "nobody moved: {broken:#?}");
    }
    Ok(())
}

/// The checker's own spelling against the program's.
#[test]
fn the_checker_spells_as_the_engine_does() -> Result<()> {
    let pcm = voxfleet_harness::audio::blasts(43, 6.0);
    let recording = voxfleet_harness::words::Recording::new(pcm.samples.clone());
    for range in [0..16_000_u64, 777..31_234, 4_000..8_000, 50_000..96_000] {
        let piece = &pcm.samples[range.start as usize..range.end as usize];
        let samples: Vec<f32> = piece.iter().map(|s| f32::from(*s) / 32_768.0).collect();
        let text = text_of(&samples, range.start);
        let words: Vec<&str> = text.split(' ').collect();
        let found = recording.find(&words, &range);
        ensure!(found == Some(range.clone()), "{range:?} was found at {found:?}: {text}");
    }
    Ok(())
}
