//! The second act: kill -9 of the worker that has the call, in the middle of it.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use uuid::Uuid;
use voxfleet_harness::fleet::Fleet;
use voxfleet_nats::{
    Nats,
    retry::Backoff,
    transcript::{self, Filter, Start},
};
use voxfleet_schema::{
    event::What,
    id::{GpuId, StreamId},
};

use super::{
    call::Call,
    live,
    speakers::{self, Told},
};
use crate::transcript::{
    follow::{FollowError, Seen, good},
    line::Paint,
    screen::{Detail, Screen, Style, Voice},
};

/// How much of the call has been sent when its worker dies.
const MIDDLE: f64 = 0.5;
const PATIENCE: Duration = Duration::from_secs(30);

/// What the kill cost.
pub(crate) struct Failover {
    pub(crate) id: StreamId,
    killed: Killed,
    moments: Moments,
    /// The same words as the engine called directly gives.
    same_text: bool,
    words: usize,
    /// Each word has the label that it has without the kill.
    same_speakers: bool,
    names: usize,
}

struct Killed {
    gpu_id: GpuId,
    epoch: u64,
    at: Instant,
}

/// When what was first seen after the kill.
#[derive(Default)]
struct Moments {
    /// The fleet's verdict.
    dead: Option<Instant>,
    moved_to: Option<GpuId>,
    /// Of a higher epoch, partial or final.
    word: Option<Instant>,
    first_final: Option<Instant>,
}

#[derive(Default)]
struct Watched {
    /// Who spoke last, and in which epoch.
    owner: Option<(GpuId, u64)>,
    killed: Option<Killed>,
    moments: Moments,
}

/// What the undisturbed run said.
pub(crate) struct Before<'a> {
    pub(crate) text: &'a str,
    pub(crate) told: &'a Told,
}

/// Plays the call again and kills its worker.
pub(crate) async fn act(
    nats: &Nats,
    fleet: &mut Fleet,
    call: &Call,
    speed: f64,
    options: &[(String, String)],
    style: Style,
    before: &Before<'_>,
) -> anyhow::Result<Failover> {
    let id = StreamId::new(format!("{}-{}", call.name, &Uuid::new_v4().simple().to_string()[..6]))?;
    let mut screen = Screen::new(style, Detail { names: false, words: false, partials: true });
    let (voice, paint) = (screen.voice(), screen.paint());
    voice.line("")?;
    voice.line(&paint.bold("second act: the same call, and kill -9 of its worker in the middle"))?;
    let watched = Mutex::new(Watched::default());
    let mut seen = |news: Seen<'_>| note(&watched, news);
    let live = {
        let playing = live::transcribe(nats, call, &id, speed, options, &mut screen, &mut seen);
        let watching = watch_fleet(nats, &watched, &voice, paint);
        let killing = kill(fleet, call, speed, &watched, &voice, paint);
        tokio::pin!(playing, watching, killing);
        let mut waiting = true;
        loop {
            tokio::select! {
                live = &mut playing => break live?,
                failed = &mut watching => anyhow::bail!("the fleet's events: {failed}"),
                killed = &mut killing, if waiting => { killed?; waiting = false }
            }
        }
    };
    let text = live.text();
    let Watched { killed, moments, .. } = watched.into_inner().unwrap_or_else(PoisonError::into_inner);
    let killed = killed.ok_or_else(|| anyhow::anyhow!("the call ended before its worker could be killed"))?;
    let told = Told::of_finals(&speakers::revised(nats, &id, &live.finals).await?);
    let found = Failover {
        id,
        killed,
        moments,
        same_text: text == before.text,
        words: text.split_whitespace().count(),
        same_speakers: told == *before.told,
        names: told.names().len(),
    };
    for line in found.lines() {
        voice.line(&if found.same_text { paint.green(&line) } else { paint.red(&line) })?;
    }
    Ok(found)
}

fn locked(watched: &Mutex<Watched>) -> MutexGuard<'_, Watched> {
    watched.lock().unwrap_or_else(PoisonError::into_inner)
}

fn note(watched: &Mutex<Watched>, news: Seen<'_>) {
    let (gpu_id, epoch, is_final) = match news {
        Seen::Final(new) => (&new.gpu_id, new.epoch, true),
        Seen::Partial(new) => (&new.gpu_id, new.epoch, false),
        Seen::Revision(_) | Seen::Event(_) => return,
    };
    let mut watched = locked(watched);
    watched.owner = Some((gpu_id.clone(), epoch));
    if watched.killed.as_ref().is_none_or(|killed| epoch <= killed.epoch) {
        return;
    }
    let moments = &mut watched.moments;
    moments.moved_to.get_or_insert_with(|| gpu_id.clone());
    moments.word.get_or_insert_with(Instant::now);
    if is_final {
        moments.first_final.get_or_insert_with(Instant::now);
    }
}

/// Waits for the middle of the call, and for somebody to speak; then kills him.
async fn kill(
    fleet: &mut Fleet,
    call: &Call,
    speed: f64,
    watched: &Mutex<Watched>,
    voice: &Voice,
    paint: Paint,
) -> anyhow::Result<()> {
    tokio::time::sleep(Duration::from_secs_f64(call.seconds() * MIDDLE / speed)).await;
    let begun = Instant::now();
    let (gpu_id, epoch) = loop {
        if let Some(owner) = locked(watched).owner.clone() {
            break owner;
        }
        anyhow::ensure!(begun.elapsed() < PATIENCE, "nobody transcribes the call");
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    let worker = fleet.workers.iter_mut().find(|worker| worker.gpu_id() == gpu_id.as_str());
    let worker = worker.ok_or_else(|| anyhow::anyhow!("{gpu_id} is not one of the demo's workers"))?;
    let pid = worker.pid();
    worker.kill9()?;
    voice.line(&paint.red(&format!("kill -9 {pid}: {gpu_id}, which has the call, is gone")))?;
    locked(watched).killed = Some(Killed { gpu_id, epoch, at: Instant::now() });
    Ok(())
}

/// Waits for the verdict over the killed worker. Ends only with an error.
async fn watch_fleet(nats: &Nats, watched: &Mutex<Watched>, voice: &Voice, paint: Paint) -> FollowError {
    let mut events = transcript::events(nats, &Filter::All, Start::New);
    let mut backoff = Backoff::default();
    loop {
        let event = match good(events.next().await, nats, &mut backoff).await {
            Ok(Some(read)) => read.value,
            Ok(None) => continue,
            Err(error) => return error,
        };
        let said = {
            let mut watched = locked(watched);
            let dead = event.what == What::Dead;
            let killed = watched.killed.as_ref().filter(|killed| dead && killed.gpu_id.as_str() == event.id);
            let after = killed.map(|killed| killed.at.elapsed());
            if after.is_some() {
                watched.moments.dead = Some(Instant::now());
            }
            after.map(|after| format!("{} declared dead {} ms after the kill", event.id, after.as_millis()))
        };
        if let Some(said) = said
            && let Err(error) = voice.line(&paint.yellow(&said))
        {
            return error.into();
        }
    }
}

impl Failover {
    fn ms(&self, moment: Option<Instant>) -> Option<u64> {
        moment.map(|moment| moment.duration_since(self.killed.at).as_millis() as u64)
    }

    /// Somebody else went on, and the text is that of the undisturbed run.
    pub(crate) fn is_good(&self) -> bool {
        self.same_text && self.moments.first_final.is_some()
    }

    fn lines(&self) -> Vec<String> {
        let ms = |moment| self.ms(moment).map_or("-".to_owned(), |ms| format!("{ms} ms"));
        let Moments { dead, moved_to, word, first_final } = &self.moments;
        vec![
            format!(
                "after the kill: declared dead {}, first word from {} {}, first final {}",
                ms(*dead),
                moved_to.as_ref().map_or("nobody", GpuId::as_str),
                ms(*word),
                ms(*first_final),
            ),
            match self.same_text {
                true => format!("no word lost, none twice: {} words, as without the kill", self.words),
                false => "the text is another than without the kill".to_owned(),
            },
            match (self.names, self.same_speakers) {
                (0, _) => "nobody was told apart".to_owned(),
                (names, true) => format!("{names} speakers, each word under the same label as without the kill"),
                (_, false) => "some words have another label than without the kill".to_owned(),
            },
        ]
    }

    pub(crate) fn object(&self) -> Value {
        let Moments { dead, moved_to, word, first_final } = &self.moments;
        json!({
            "session": self.id,
            "killed": self.killed.gpu_id,
            "moved_to": moved_to,
            "detection_ms": self.ms(*dead),
            "gap_ms": self.ms(*word),
            "first_final_ms": self.ms(*first_final),
            "same_text": self.same_text,
            "same_speakers": self.same_speakers,
        })
    }
}
