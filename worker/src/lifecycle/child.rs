//! One child from fork to reaping: started, spoken to, asked for signs of life, ended, and its death laid at the right door.

use std::{process::ExitStatus, sync::atomic::Ordering, time::Duration};

use tokio::{
    process::Child,
    sync::mpsc,
    task::{JoinError, JoinSet},
    time::{Instant, MissedTickBehavior, interval, sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use voxfleet_schema::fleet::{EngineRunState, Residency};

use super::{
    Decoding, Engine, FRAMES, LifeEnd, Link, death, link,
    spawn::{self, SpawnError},
    suspects::{self, Doing},
};
use crate::{
    capacity::locked,
    ipc::{ToEngine, transport::TransportError},
};

/// The child only parses its configuration before it says `Ready`.
const START_TIMEOUT: Duration = Duration::from_secs(30);
/// Between closing the socket and SIGKILL: a decode step ends long before.
const STOP_GRACE: Duration = Duration::from_millis(1_000);
/// How often the child is asked whether it is there.
const ASK_EVERY: Duration = Duration::from_secs(1);
/// A look that comes so late, or half of what the child is given, says that this process stood still: what the child said
/// meanwhile has not been read yet.
const LATE: Duration = Duration::from_secs(3);
/// For what a dead child had written.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// Why a child's life ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ending {
    Asked,
    /// It died, or cannot be spoken to.
    Lost,
    /// It stands still.
    Stuck,
}

impl Engine {
    /// One child from fork to reaping.
    pub(super) async fn live(&self, stop: &CancellationToken) -> LifeEnd {
        if self.status().state == EngineRunState::Down {
            self.set_state(EngineRunState::Starting, false);
        }
        let spawned = match spawn::spawn(&self.0.program).await {
            Ok(spawned) => spawned,
            Err(error) => {
                self.log_spawn_error(&error);
                return LifeEnd::NotReady;
            }
        };
        let mut child = spawned.child;
        self.0.pid.store(child.id().unwrap_or(0), Ordering::Relaxed);
        tracing::info!(pid = child.id(), "engine started");

        let (read, write) = spawned.socket.into_split();
        let (frames, queue) = mpsc::channel(FRAMES + self.0.slots);
        let mut stderr = JoinSet::new();
        if let Some(pipe) = spawned.stderr {
            stderr.spawn(link::forward_stderr(pipe));
        }
        let (mut writing, mut reading) = (JoinSet::new(), JoinSet::new());
        writing.spawn(link::write_frames(write, self.0.config.clone(), queue));
        let (ready, mut is_ready) = mpsc::channel(1);
        reading.spawn(link::read_frames(read, self.clone(), ready));

        let begun = Instant::now();
        // The last two looks: of all that the kernel has killed on this host, only what dies with the child can be it.
        let mut memory_kills = [death::memory_kills(); 2];
        let mut ready_at = None;
        let mut asked = 0;
        let mut looked_at = begun;
        let mut looks = interval(ASK_EVERY);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let ending = loop {
            tokio::select! {
                () = stop.cancelled() => break Ending::Asked,
                Some(vad) = is_ready.recv() => {
                    ready_at = Some(Instant::now());
                    self.set_state(EngineRunState::Ready, false);
                    self.0.link.send_replace(Some(Link { frames: frames.clone(), vad }));
                }
                Some(ended) = reading.join_next() => break wire_ended(ended),
                Some(ended) = writing.join_next() => break wire_ended(ended),
                _ = child.wait() => break Ending::Lost,
                _ = looks.tick(), if ready_at.is_some() => {
                    asked += 1;
                    if self.is_stuck(looked_at) {
                        break Ending::Stuck;
                    }
                    looked_at = Instant::now();
                    memory_kills = [memory_kills[1], death::memory_kills()];
                    // Where there is no room, the frames before it are answered first or never.
                    let _ = frames.try_send(ToEngine::Ping { n: asked });
                }
                () = sleep(START_TIMEOUT.saturating_sub(begun.elapsed())), if ready_at.is_none() => {
                    tracing::error!(timeout_ms = START_TIMEOUT.as_millis() as u64, "engine did not become ready");
                    break Ending::Lost;
                }
            }
        };
        self.0.link.send_replace(None);
        drop(frames);
        let stopped = ending == Ending::Asked;
        // The child's sign to stop, if it still sees signs.
        writing.shutdown().await;
        if stopped {
            reading.shutdown().await;
            self.abandon();
        } else if ending == Ending::Stuck
            && let Err(error) = child.start_kill()
        {
            tracing::error!(%error, "engine that stands still cannot be killed");
        }
        let status = self.reap(child, stopped).await;
        if !stopped {
            if timeout(LAST_WORDS, reading.join_next()).await.is_err() {
                tracing::warn!("something still holds the engine's socket");
            }
            reading.shutdown().await;
            if ready_at.is_some() {
                let out_of_memory = death::memory_kills() > memory_kills[0];
                self.blame(death::death(status, ending == Ending::Stuck, out_of_memory));
            }
            self.abandon();
        }
        // The pipe ends with the child; its last words are worth a moment.
        if timeout(STOP_GRACE, stderr.join_next()).await.is_err() {
            tracing::warn!("something still holds the engine's stderr");
        }
        match (stopped, ready_at) {
            (true, _) => LifeEnd::Stopped,
            (false, None) => LifeEnd::NotReady,
            (false, Some(at)) => LifeEnd::Died { lived: at.elapsed() },
        }
    }

    /// Says whether the child gives no sign of life, or does not move, for too long. `looked_at`: the last time this was asked.
    fn is_stuck(&self, looked_at: Instant) -> bool {
        let now = Instant::now();
        let mut progress = locked(&self.0.progress);
        if now.saturating_duration_since(looked_at) > late(self.0.stuck_after) {
            progress.forgive(now);
        }
        progress.asked(now);
        let silent_ms = progress.reading(now).ms_since_progress;
        let stuck = u128::from(silent_ms) >= self.0.stuck_after.as_millis();
        if stuck {
            tracing::error!(silent_ms, "engine stands still, ending it");
        }
        stuck
    }

    /// After the child's death, before its sessions hear of it.
    fn blame(&self, death: suspects::Death) {
        let decoding = |d: &Decoding| Doing { name: d.name.clone(), at: d.at, stepping: false };
        let mut doing: Vec<Doing> = locked(&self.0.decoding).values().map(decoding).collect();
        doing.extend(locked(&self.0.stepping).take());
        // A loader that dies takes whoever is decoded with it.
        let loading = self.status().models.iter().any(|model| model.state == Residency::Loading);
        let inputs: Vec<String> =
            doing.iter().map(|doing| doing.name.as_ref().map_or("?".to_owned(), |(_, id)| id.to_string())).collect();
        tracing::warn!(?death, loading, at = inputs.join(","), "engine died while it was at these");
        locked(&self.0.suspects).died(Instant::now(), death, &doing, loading);
    }

    /// Nothing comes from this child any more.
    fn abandon(&self) {
        locked(&self.0.decoding).clear();
        *locked(&self.0.stepping) = None;
        locked(&self.0.progress).reset();
        for (_, outbox) in locked(&self.0.outboxes).drain() {
            outbox.gone();
        }
    }

    fn log_spawn_error(&self, error: &SpawnError) {
        tracing::error!(error = error as &dyn std::error::Error, "engine not started");
    }

    async fn reap(&self, mut child: Child, asked: bool) -> Option<ExitStatus> {
        let pid = child.id();
        let mut killed = false;
        let status = match timeout(STOP_GRACE, child.wait()).await {
            Ok(status) => status,
            Err(_) => {
                killed = true;
                child.kill().await.err().map_or_else(|| child.try_wait().map(Option::unwrap_or_default), Err)
            }
        };
        self.0.pid.store(0, Ordering::Relaxed);
        match status {
            Ok(status) if asked => {
                tracing::info!(pid, %status, killed, "engine stopped");
                Some(status)
            }
            Ok(status) => {
                tracing::error!(pid, %status, killed, "engine died");
                Some(status)
            }
            Err(error) => {
                tracing::error!(pid, %error, "engine could not be reaped");
                None
            }
        }
    }
}

fn late(stuck_after: Duration) -> Duration {
    LATE.min((stuck_after / 2).max(ASK_EVERY * 3 / 2))
}

fn wire_ended(ended: Result<TransportError, JoinError>) -> Ending {
    match ended {
        Ok(TransportError::Closed) => tracing::debug!("engine closed its socket"),
        Ok(error) => tracing::error!(error = &error as &dyn std::error::Error, "engine socket failed"),
        Err(error) => tracing::error!(%error, "engine wire task failed"),
    }
    Ending::Lost
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_supervisor_that_was_late_forgives_before_it_blames() {
        for (stuck_ms, late_ms) in [(2_000, 1_500), (3_000, 1_500), (5_000, 2_500), (15_000, 3_000)] {
            let stuck = Duration::from_millis(stuck_ms);
            assert_eq!(late(stuck), Duration::from_millis(late_ms));
            assert!(late(stuck) < stuck);
        }
    }
}
