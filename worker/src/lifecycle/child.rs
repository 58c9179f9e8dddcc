//! One child from fork to reaping: started, spoken to, asked for signs of life, ended, and its death laid at the right door.

use std::{
    process::ExitStatus,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use tokio::{
    process::Child,
    sync::mpsc,
    task::{JoinError, JoinSet},
    time::{Instant, MissedTickBehavior, interval, sleep, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;
use voxfleet_schema::fleet::{EngineRunState, Residency};

use super::{
    Decoding, Engine, FRAMES, LifeEnd, Link,
    cause::{self, Seen},
    idle::Rest,
    link, spawn,
    suspects::{self, Doing},
};
use crate::{
    capacity::locked,
    ipc::{EngineConfig, ToEngine, transport::TransportError},
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

/// An engine that is to run elsewhere waits so long for sessions to come to the end of a final.
const TURN_GRACE: Duration = Duration::from_secs(2);

/// Why a child's life ends.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Ending {
    Asked,
    /// Nobody needs it.
    Idle,
    /// The next one is to run elsewhere, or with other models.
    Turned,
    /// It died, or cannot be spoken to; with what it said that is no message.
    Lost(Option<String>),
    /// It stands still, or does not become ready.
    Stuck,
}

impl Engine {
    /// One child from fork to reaping.
    pub(super) async fn live(&self, stop: &CancellationToken) -> LifeEnd {
        if self.status().state == EngineRunState::Down {
            self.set_state(EngineRunState::Starting, false);
        }
        let on_cpu = self.wants_cpu();
        self.0.on_cpu.store(on_cpu, Ordering::Relaxed);
        self.0.release.store(false, Ordering::Relaxed);
        locked(&self.0.asked).clear();
        self.0.anew.store(false, Ordering::Relaxed);
        locked(&self.0.idle).begins();
        let share = match spawn::share(&self.0.program, on_cpu).await {
            Ok(share) => share,
            Err(error) => {
                tracing::error!(%error, "cores not shared out, no engine is started");
                return LifeEnd::NotReady;
            }
        };
        let spawned = match spawn::spawn(&self.0.program, on_cpu).await {
            Ok(spawned) => spawned,
            Err(error) => {
                self.not_started(&cause::not_spawned(&error));
                return LifeEnd::NotReady;
            }
        };
        let mut child = spawned.child;
        self.0.pid.store(child.id().unwrap_or(0), Ordering::Relaxed);
        tracing::info!(pid = child.id(), on_cpu, "engine started");

        let (read, write) = spawned.socket.into_split();
        let (frames, queue) = mpsc::channel(FRAMES + self.0.terms.slots);
        let mut stderr = JoinSet::new();
        let last_lines = link::LastLines::default();
        if let Some(pipe) = spawned.stderr {
            stderr.spawn(link::forward_stderr(pipe, last_lines.clone(), Arc::clone(&self.0.program.gpu)));
        }
        let (mut writing, mut reading) = (JoinSet::new(), JoinSet::new());
        let mut config = EngineConfig {
            use_gpu: !on_cpu,
            decode_states: share.states,
            decode_threads: share.threads,
            ..self.0.config.clone()
        };
        if on_cpu && self.0.config.use_gpu {
            // The card that is shared by turns is not used.
            config.turns = None;
        }
        writing.spawn(link::write_frames(write, config, queue));
        let (ready, mut is_ready) = mpsc::channel(1);
        reading.spawn(link::read_frames(read, self.clone(), ready));

        let begun = Instant::now();
        // The last two looks: of all that the kernel has killed on this host, only what dies with the child can be it.
        let mut memory_kills = [cause::memory_kills(); 2];
        let mut ready_at = None;
        let mut way = None;
        let mut turning: Option<Instant> = None;
        let mut asked = 0;
        let mut looked_at = begun;
        let mut looks = interval(ASK_EVERY);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let ending = loop {
            let mut wake = None;
            if ready_at.is_some() {
                let turns = !self.is_on_side(on_cpu) || self.0.anew.load(Ordering::Relaxed);
                turning = turns.then(|| turning.unwrap_or_else(Instant::now));
                // Whoever opens now waits for the next child.
                self.0.link.send_if_modified(|link| {
                    let wanted = way.clone().filter(|_| turning.is_none());
                    let changes = link.is_some() != wanted.is_some();
                    if changes {
                        *link = wanted;
                    }
                    changes
                });
                wake = match turning {
                    Some(since) if locked(&self.0.outboxes).is_empty() || since.elapsed() >= TURN_GRACE => {
                        break Ending::Turned;
                    }
                    Some(since) => Some(since + TURN_GRACE),
                    None => match self.rest(&frames) {
                        Rest::Over => break Ending::Idle,
                        Rest::Until(at) => at,
                        Rest::Half(at) => Some(at),
                        Rest::None => None,
                    },
                };
            }
            tokio::select! {
                () = stop.cancelled() => break Ending::Asked,
                Some(vad) = is_ready.recv() => {
                    ready_at = Some(Instant::now());
                    self.set_state(EngineRunState::Ready, false);
                    way = Some(Link { frames: frames.clone(), vad, on_cpu });
                }
                Some(ended) = reading.join_next() => break wire_ended(ended),
                Some(ended) = writing.join_next() => break wire_ended(ended),
                _ = child.wait() => break Ending::Lost(None),
                _ = looks.tick(), if ready_at.is_some() => {
                    asked += 1;
                    if self.is_stuck(looked_at) {
                        break Ending::Stuck;
                    }
                    looked_at = Instant::now();
                    memory_kills = [memory_kills[1], cause::memory_kills()];
                    if !on_cpu {
                        self.leave_what_fell_off();
                    }
                    self.restore(Some(&frames));
                    for model in self.to_unload() {
                        let _ = frames.try_send(ToEngine::Unload { model });
                    }
                    // Where there is no room, the frames before it are answered first or never.
                    let _ = frames.try_send(ToEngine::Ping { n: asked });
                }
                () = self.0.activity.notified() => {}
                () = sleep_until(wake.unwrap_or(begun)), if wake.is_some() => {}
                () = sleep(START_TIMEOUT.saturating_sub(begun.elapsed())), if ready_at.is_none() => {
                    tracing::error!(timeout_ms = START_TIMEOUT.as_millis() as u64, "engine did not become ready");
                    break Ending::Stuck;
                }
            }
        };
        self.0.link.send_replace(None);
        drop((frames, way));
        let stopped = matches!(ending, Ending::Asked | Ending::Idle | Ending::Turned);
        let held_mb = self.held_mb();
        if ending == Ending::Turned {
            tracing::info!(from_cpu = on_cpu, "engine gives way to one with another device or other models");
        }
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
        let (status, killed) = self.reap(child, stopped).await;
        if !stopped {
            if timeout(LAST_WORDS, reading.join_next()).await.is_err() {
                tracing::warn!("something still holds the engine's socket");
            }
            reading.shutdown().await;
        }
        // The pipe ends with the child; its last words are worth a moment.
        if timeout(LAST_WORDS, stderr.join_next()).await.is_err() {
            tracing::warn!("something still holds the engine's stderr");
        }
        if !stopped {
            let stuck = ending == Ending::Stuck;
            let wire = match ending {
                Ending::Lost(None) if killed => Some("it closed its socket and did not go".to_owned()),
                Ending::Lost(ref wire) => wire.clone(),
                _ => None,
            };
            let memory_kill = cause::memory_kills() > memory_kills[0];
            let lines = last_lines.take();
            let cause = cause::cause(Seen { status, stuck, wire: wire.as_deref(), memory_kill, lines: &lines });
            self.learn(&cause, on_cpu);
            if let Some(death) = cause.death.filter(|_| ready_at.is_some()) {
                self.blame(death);
            }
            self.abandon();
        }
        match (ending, ready_at) {
            (Ending::Asked, _) => LifeEnd::Stopped,
            (Ending::Idle, _) => {
                tracing::info!(freed_mb = held_mb, "memory freed");
                LifeEnd::Released
            }
            (Ending::Turned, _) => LifeEnd::Released,
            (_, None) => LifeEnd::NotReady,
            (_, Some(at)) => LifeEnd::Died { lived: at.elapsed() },
        }
    }

    /// What nobody's work means for the child now.
    fn rest(&self, frames: &mpsc::Sender<ToEngine>) -> Rest {
        let now = Instant::now();
        let status = self.status();
        let loading = status.models.iter().any(|model| model.state == Residency::Loading);
        let busy = loading || locked(&self.0.progress).is_working();
        let open = self.open_now();
        let mut idle = locked(&self.0.idle);
        let mut rest = idle.look(now, open, busy);
        if self.0.release.swap(false, Ordering::Relaxed) {
            if open.is_empty() && !busy {
                rest = Rest::Over;
            } else {
                let used: Vec<String> = locked(&self.0.outboxes).values().map(|outbox| outbox.model.clone()).collect();
                let loaded = status.models.into_iter().filter(|model| model.state == Residency::Loaded);
                for model in loaded.map(|model| model.name).filter(|name| !used.contains(name)) {
                    let _ = frames.try_send(ToEngine::Unload { model });
                }
            }
        }
        let idle_ms = idle.for_how_long(now).unwrap_or_default().as_millis() as u64;
        match rest {
            Rest::Half(at) => {
                let left_ms = at.saturating_duration_since(now).as_millis() as u64;
                tracing::info!(idle_ms, left_ms, "engine idle");
            }
            Rest::Over => tracing::info!(idle_ms, resident_mb = self.held_mb(), "engine released"),
            Rest::None | Rest::Until(_) => {}
        }
        rest
    }

    /// What its models take.
    fn held_mb(&self) -> u64 {
        self.0.status.borrow().models.iter().map(|model| model.resident_mb).sum()
    }

    /// Says whether the child gives no sign of life, or does not move, for too long. `looked_at`: the last time this was asked.
    fn is_stuck(&self, looked_at: Instant) -> bool {
        let now = Instant::now();
        let mut progress = locked(&self.0.progress);
        let stuck_after = self.0.terms.stuck_after;
        if now.saturating_duration_since(looked_at) > late(stuck_after) {
            progress.forgive(now);
        }
        progress.asked(now);
        let silent_ms = progress.reading(now).ms_since_progress;
        let stuck = u128::from(silent_ms) >= stuck_after.as_millis();
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

    /// Its status, and whether it had to be killed.
    async fn reap(&self, mut child: Child, asked: bool) -> (Option<ExitStatus>, bool) {
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
                (Some(status), killed)
            }
            Ok(status) => {
                tracing::error!(pid, %status, killed, "engine died");
                (Some(status), killed)
            }
            Err(error) => {
                tracing::error!(pid, %error, "engine could not be reaped");
                (None, killed)
            }
        }
    }
}

fn late(stuck_after: Duration) -> Duration {
    LATE.min((stuck_after / 2).max(ASK_EVERY * 3 / 2))
}

fn wire_ended(ended: Result<TransportError, JoinError>) -> Ending {
    Ending::Lost(match ended {
        Ok(TransportError::Closed) => {
            tracing::debug!("engine closed its socket");
            None
        }
        Ok(error) => {
            tracing::error!(error = &error as &dyn std::error::Error, "engine socket failed");
            // What breaks off in the middle is what a death looks like.
            matches!(error, TransportError::Decode(_) | TransportError::TooLarge { .. }).then(|| error.to_string())
        }
        Err(error) => {
            tracing::error!(%error, "engine wire task failed");
            None
        }
    })
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
