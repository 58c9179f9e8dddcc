//! What the engine loop keeps: sessions, models, the pool, and the way out.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    os::unix::net::UnixStream,
    sync::Arc,
    time::{Duration, Instant},
};

use voxfleet_schema::{
    audio::RawEntry,
    event::What,
    failure::{Failure, FailureClass},
    session::{Channels, Diarize, SessionOptions},
    transcript::Timings,
};

use super::{
    again::{Hears, ToHear},
    neighbour::{LockError, Neighbour, Turn},
    pace::{Pace, Role, Spent, Stretch, busy_ms},
    shelf::{Shelved, shelve},
    signs::{Sign, Signs},
    unseen::{Blind, guarded},
};
use crate::{
    engine::{
        Cancel, EngineError, Purpose, Window,
        diarize::{HeardLate, Listened, lacking},
        pool::{Done, Pool, ends_session},
        stream::{SessionStream, Step},
        vad::VadFactory,
    },
    ipc::{
        EngineConfig, EntryFor, FinalDraft, FromEngine, StartPoint, StreamNote, Suspect, ToEngine,
        transport::{BlockingWriter, TransportError},
    },
};

pub(super) type Said = Result<(), TransportError>;

/// In long stretches of work something is said this often.
const SIGN_OF_LIFE: Duration = Duration::from_secs(1);

pub(super) struct Session {
    pub(super) stream: SessionStream,
    pub(super) model: String,
    /// Windows of a final that wait for a thread, with their numbers.
    pub(super) ready: VecDeque<(usize, Window)>,
    /// Since when there are any.
    pub(super) ready_at: Instant,
    /// Windows of a final that are being decoded.
    pub(super) decoding: BTreeMap<usize, Cancel>,
    /// A partial is being decoded.
    pub(super) partial: Option<Cancel>,
    /// Finals whose speakers are still being listened to.
    pub(super) listening: Vec<(u64, Cancel)>,
    pub(super) last_partial: Instant,
    /// A file job: live sessions come first.
    pub(super) background: bool,
    /// There is input that has not been stepped over.
    pub(super) dirty: bool,
    /// Nothing more is fed; only a final that has begun is still said.
    pub(super) finishing: bool,
    /// Until it has shown that it is harmless.
    pub(super) suspect: Option<Suspect>,
    /// A suspect's input waits until nothing is decoded, since then.
    pub(super) held_since: Option<Instant>,
    /// Why what is not looked at is set aside.
    unseen: Option<Failure>,
    spent: Spent,
    /// It looks for boundaries alone; what it has not looked at.
    pub(super) scout: Option<VecDeque<RawEntry>>,
    /// Somebody listens to what it finds.
    pub(super) hears: Option<Hears>,
    /// It waits for somebody who listens.
    pub(super) to_hear: Option<ToHear>,
}

/// What a stream is for, beside being decoded.
struct Look {
    scout: bool,
    hears: bool,
}

#[derive(Default, Clone, Copy, PartialEq, Eq)]
struct Totals {
    decodes: u64,
    audio_ms: u64,
    busy_ms: u64,
}

pub(super) struct Desk {
    pub(super) config: EngineConfig,
    pub(super) pool: Pool,
    vads: Arc<dyn VadFactory>,
    out: BlockingWriter<UnixStream>,
    said_at: Instant,
    pub(super) sessions: HashMap<u64, Session>,
    pub(super) models: BTreeMap<String, Shelved>,
    /// A suspect's window is being decoded: nothing else is begun.
    pub(super) alone: Option<u64>,
    /// Streams are being stepped: no suspect is begun beside them.
    pub(super) stepping: bool,
    /// Whom the device is shared with by turns.
    neighbour: Option<Neighbour>,
    pub(super) pace: Pace,
    signs: Signs,
    totals: Totals,
    /// Looks of scouts: they decode nothing, and move all the same.
    pub(super) scouted: u64,
    /// What was last told: totals, signs of life, working.
    told: (Totals, u64, bool),
}

impl Desk {
    pub(super) fn new(
        config: EngineConfig,
        pool: Pool,
        vads: Arc<dyn VadFactory>,
        out: BlockingWriter<UnixStream>,
        neighbour: Option<Neighbour>,
    ) -> Self {
        let models = config.models.iter().map(|file| (file.name.clone(), shelve(&config, file))).collect();
        let pace = Pace::new(config.decode_states, Instant::now());
        Self {
            config,
            pool,
            vads,
            out,
            said_at: Instant::now(),
            sessions: HashMap::new(),
            models,
            alone: None,
            stepping: false,
            neighbour,
            pace,
            signs: Signs::default(),
            totals: Totals::default(),
            scouted: 0,
            told: (Totals::default(), 0, false),
        }
    }

    pub(super) fn say(&mut self, message: &FromEngine) -> Said {
        self.said_at = Instant::now();
        self.out.send(message)
    }

    /// Whether something is being decoded or loaded, or waits for it.
    pub(super) fn working(&self) -> bool {
        !self.pool.all_idle() || self.sessions.values().any(|s| !s.ready.is_empty() || s.dirty) || self.loading()
    }

    /// Told while there is work and all of it moves, and once when it begins or ends: a hung decode is silent.
    pub(super) fn progress(&mut self, now: Instant) -> Said {
        let working = self.working();
        let running = self.sessions.iter().flat_map(|(handle, session)| {
            let of_final = session.decoding.iter().map(|(part, flag)| (Sign::Final(*handle, *part), flag));
            let of_partial = session.partial.iter().map(|flag| (Sign::Partial(*handle), flag));
            // What waits for its turn cannot move.
            let listening = session.listening.iter().filter(|(_, flag)| flag.looks() > 0);
            let of_speakers = listening.map(|(index, flag)| (Sign::Speakers(*handle, *index), flag));
            of_final.chain(of_partial).chain(of_speakers)
        });
        let running: Vec<_> = running.map(|(sign, flag)| (sign, flag.looks())).collect();
        let looks = running.iter().fold(self.scouted, |sum: u64, (_, looks)| sum.wrapping_add(*looks));
        if !self.signs.all_move(now, running.into_iter()) {
            return Ok(());
        }
        let waits = self.loads(now) || self.neighbour.as_ref().is_some_and(Neighbour::waits);
        let signs = (self.totals, looks, working);
        if signs == self.told && !(working && waits) {
            return Ok(());
        }
        self.told = signs;
        let Totals { decodes, audio_ms, busy_ms } = self.totals;
        let neighbour_ms = self.neighbour.as_ref().map_or(0, |neighbour| neighbour.waited(now).as_millis() as u64);
        self.say(&FromEngine::Progress { decodes, audio_ms, busy_ms, working, neighbour_ms })
    }

    pub(super) fn frame(&mut self, frame: ToEngine) -> Said {
        match frame {
            ToEngine::Configure(_) => tracing::warn!("configured twice, the first one stays"),
            ToEngine::Load { model } => {
                if let Err(why) = self.want(&model) {
                    tracing::warn!(%model, %why, "cannot load ahead");
                }
                return self.say_models();
            }
            ToEngine::Unload { model } => return self.unload(&model),
            ToEngine::Open { handle, options, start, background, suspect, scout, hears } => {
                let look = Look { scout, hears };
                return self.open(handle, &options, *start, background, suspect, look);
            }
            ToEngine::Ping { n } => return self.say(&FromEngine::Pong { n }),
            // Audio of a session that failed or was closed a moment ago.
            ToEngine::Entry(for_session) => {
                let EntryFor { handle, entry } = for_session;
                if let Some(session) = self.sessions.get_mut(&handle).filter(|s| !s.finishing) {
                    session.dirty = true;
                    if let Some(ahead) = &mut session.scout {
                        ahead.push_back(entry);
                    } else if let Err(error) = guarded(|| session.stream.push(entry)) {
                        return self.fail(handle, &error);
                    }
                }
            }
            ToEngine::Heard { handle, heard } => {
                if let Some(session) = self.sessions.get_mut(&handle) {
                    session.stream.heard_again(*heard);
                    // Its end may have waited for it.
                    session.dirty = !session.finishing;
                }
            }
            ToEngine::Finish { handle } => return self.finish(handle),
            ToEngine::Close { handle } => self.forget(handle),
        }
        Ok(())
    }

    /// What has begun is still said; the rest is for whoever goes on with the session.
    fn finish(&mut self, handle: u64) -> Said {
        let Some(session) = self.sessions.get_mut(&handle) else {
            // It failed, and said so.
            return Ok(());
        };
        session.finishing = true;
        session.dirty = false;
        session.partial.iter().for_each(Cancel::cancel);
        if session.has_begun() {
            return Ok(());
        }
        self.say(&FromEngine::Finished { handle })
    }

    fn open(
        &mut self,
        handle: u64,
        options: &SessionOptions,
        start: StartPoint,
        background: bool,
        suspect: Option<Suspect>,
        Look { scout, hears }: Look,
    ) -> Said {
        let model = options.model.clone().unwrap_or_else(|| self.config.default_model.clone());
        let was = self.models.get(&model).map(|m| m.state);
        if !scout && let Err(error) = self.want(&model) {
            return self.fail(handle, &error);
        }
        let lacking = Some(self.config.diarize.needs_mb).filter(|_| options.diarize == Diarize::Auto).and_then(lacking);
        if let Some(why) = lacking.clone().filter(|_| hears) {
            let heard = Box::new(Hears::default().answer(Err(why)));
            return self.say(&FromEngine::Heard { handle, heard });
        }
        let mut because = None;
        let stream = match lacking.filter(|_| options.channels != Channels::Split) {
            Some(why) => {
                let seq = start.first_seq();
                because = Some(StreamNote { what: What::Degraded, seq, failure: None, detail: why.clone() });
                SessionStream::by_channels(options, start, self.vads.create(), why)
            }
            None => SessionStream::new(options, start, self.vads.create()),
        };
        let stream = if background { stream.of_recording() } else { stream };
        let unseen = suspect.as_ref().filter(|suspect| suspect.blind).and_then(|suspect| suspect.park.clone());
        let session = Session {
            stream,
            model: model.clone(),
            ready: VecDeque::new(),
            ready_at: Instant::now(),
            decoding: BTreeMap::new(),
            partial: None,
            listening: Vec::new(),
            last_partial: Instant::now(),
            background,
            dirty: true,
            finishing: false,
            suspect,
            held_since: None,
            unseen,
            spent: Spent::default(),
            scout: scout.then(VecDeque::new),
            hears: hears.then(Hears::default),
            to_hear: None,
        };
        self.sessions.insert(handle, session);
        if let Some(note) = because {
            self.say(&FromEngine::Note { handle, note })?;
        }
        if was == self.models.get(&model).map(|m| m.state) { Ok(()) } else { self.say_models() }
    }

    /// Steps every session that has input, and keeps the threads busy meanwhile.
    pub(super) fn work(&mut self) -> Said {
        let worked = self.work_on_all();
        if self.neighbour.is_some() {
            let (wanted, busy) = (self.wants_to_decode(), !self.pool.all_idle());
            self.neighbour.iter_mut().for_each(|n| n.settle(Instant::now(), wanted, busy));
        }
        worked
    }

    /// Whether a decode may begin as far as a neighbour is concerned; asks for the device where there is something to decode.
    pub(super) fn may_decode(&mut self) -> bool {
        if self.neighbour.is_none() {
            return true;
        }
        let wanted = self.wants_to_decode();
        self.neighbour.as_mut().is_some_and(|n| n.may_decode(Instant::now(), wanted))
    }

    pub(super) fn turn_begins(&mut self, turn: Turn) -> Result<(), LockError> {
        self.neighbour.as_mut().map_or(Ok(()), |n| n.begins(turn))
    }

    /// When there is something to do although nothing happens.
    pub(super) fn wakes_at(&self) -> Option<Instant> {
        let neighbour = self.neighbour.as_ref().and_then(Neighbour::wakes_at);
        self.scouts_wait().then(Instant::now).or(neighbour)
    }

    fn work_on_all(&mut self) -> Said {
        self.dispatch()?;
        self.listen_again()?;
        if self.alone.is_some() {
            // Looked at beside a suspect, somebody harmless would be blamed together with it.
            return Ok(());
        }
        let mut dirty: Vec<(bool, u64)> =
            self.sessions.iter().filter(|(_, s)| s.dirty).map(|(handle, s)| (s.background, *handle)).collect();
        dirty.sort_unstable();
        let is_suspect = |desk: &Self, handle| desk.sessions.get(&handle).is_some_and(|s| s.suspect.is_some());
        let (suspects, others): (Vec<_>, Vec<_>) = dirty.into_iter().partition(|(_, handle)| is_suspect(self, *handle));
        for (_, handle) in &others {
            self.step(*handle)?;
            self.dispatch()?;
            if self.said_at.elapsed() >= SIGN_OF_LIFE {
                self.say(&FromEngine::Pong { n: 0 })?;
            }
        }
        self.stepped()?;
        for (_, handle) in suspects {
            self.dispatch()?;
            if self.loading() {
                // Its death would be the loader's as well. The others go on: a load may take minutes.
                continue;
            }
            if !self.pool.all_idle() || self.listens() {
                // After this or the next decode; see `dispatch`.
                if let Some(session) = self.sessions.get_mut(&handle) {
                    session.held_since.get_or_insert_with(Instant::now);
                }
                continue;
            }
            self.step(handle)?;
            self.stepped()?;
        }
        self.dispatch()
    }

    /// Nobody is looked at any more.
    fn stepped(&mut self) -> Said {
        if std::mem::take(&mut self.stepping) { self.say(&FromEngine::Stepped) } else { Ok(()) }
    }

    fn step(&mut self, handle: u64) -> Said {
        let Some(session) = self.sessions.get_mut(&handle) else {
            return Ok(());
        };
        if session.scout.is_some() {
            return self.scout(handle);
        }
        session.held_since = None;
        let mut told = None;
        loop {
            let Some(at) = self.sessions.get(&handle).map(|session| session.stream.from_sample()) else {
                return Ok(());
            };
            if told.replace(at) != Some(at) {
                // First, so that whoever finds this process dead knows what it was doing.
                self.stepping = true;
                self.say(&FromEngine::Stepping { handle, at })?;
            }
            let Some(session) = self.sessions.get_mut(&handle) else {
                return Ok(());
            };
            session.dirty = false;
            if session.unseen.is_some() && session.parked().is_some() {
                session.stream.hear_with(Box::new(Blind(session.stream.vad_kind())));
            }
            match guarded(|| session.stream.step()).and_then(|step| step) {
                Ok(Step::Starved | Step::Ended) => break,
                Ok(Step::Draft(mut draft)) => {
                    session.went_beyond(draft.to_sample);
                    if let Some(why) = session.unseen.take_if(|_| session.suspect.is_none()) {
                        // The supervisor opens it anew, with its eyes open.
                        (draft.error, draft.parked, session.finishing) = (Some(why), true, true);
                    }
                    let over = session.finishing;
                    self.say_final(handle, draft)?;
                    if over {
                        break;
                    }
                }
                Ok(Step::Final(windows)) => {
                    // What it would say has just been overtaken.
                    session.partial.iter().for_each(Cancel::cancel);
                    let Some(why) = session.parked() else {
                        session.ready = windows.into_iter().enumerate().collect();
                        session.ready_at = Instant::now();
                        break;
                    };
                    if let Some(draft) = session.stream.set_aside(why) {
                        session.went_beyond(draft.to_sample);
                        session.finishing |= session.unseen.take().is_some();
                        let over = session.finishing;
                        self.say_final(handle, draft)?;
                        if over {
                            break;
                        }
                    }
                }
                Err(error) => return self.fail(handle, &error),
            }
        }
        self.say_what_it_left(handle)
    }

    /// Notes about entries, and bytes that are no longer kept.
    pub(super) fn say_what_it_left(&mut self, handle: u64) -> Said {
        let Some(session) = self.sessions.get_mut(&handle) else {
            return Ok(());
        };
        let (notes, bytes) = (session.stream.take_notes(), session.stream.take_consumed());
        for note in notes {
            self.say(&FromEngine::Note { handle, note })?;
        }
        if bytes > 0 { self.say(&FromEngine::Consumed { handle, bytes }) } else { Ok(()) }
    }

    pub(super) fn done(&mut self, done: Done) -> Said {
        self.pool.freed(done.thread);
        self.alone.take_if(|handle| *handle == done.handle);
        self.totals.decodes += 1;
        let of_final = (done.window.purpose == Purpose::Final).then_some(done.part);
        let pool_ms = self.pace.over((done.handle, of_final), Instant::now(), done.took, done.runs);
        // Both or neither: time of a decode that was cancelled or failed would read as a slow device.
        if done.heard.is_ok() {
            self.totals.busy_ms += busy_ms(done.runs, done.took, pool_ms);
            self.totals.audio_ms += done.window.samples.len() as u64 / 16;
        }
        if done.state_mb > 0
            && let Some(shelved) = self.models.get_mut(&done.info.model)
        {
            shelved.resident_mb += done.state_mb;
            self.say_models()?;
        }
        self.say_what_it_cost(&done, pool_ms)?;
        let handle = done.handle;
        let late = matches!(done.listened, Listened::Late(_));
        match done.window.purpose {
            Purpose::Final => self.final_done(done)?,
            Purpose::Partial => self.partial_done(&done)?,
        }
        if late {
            // It is still at work on this one.
            return Ok(());
        }
        // After what came of it: a death in between finds it blamed rather than forgotten.
        self.say(&FromEngine::Over { handle })
    }

    /// Of live sessions alone: recordings have no partials.
    fn say_what_it_cost(&mut self, done: &Done, pool_ms: f64) -> Said {
        let audio_ms = done.window.samples.len() as u64 / 16;
        let Some(session) = self.sessions.get_mut(&done.handle).filter(|session| !session.background) else {
            return Ok(());
        };
        let role = match done.window.purpose {
            Purpose::Partial => Role::Partial,
            Purpose::Final if session.ready.is_empty() && session.decoding.len() <= 1 => Role::Last,
            Purpose::Final => Role::Part,
        };
        match session.spent.add(role, done.heard.is_ok(), audio_ms, pool_ms) {
            Some(Stretch { audio_ms, pool_ms }) => {
                self.say(&FromEngine::Lived { model: done.info.model.clone(), audio_ms, pool_ms })
            }
            None => Ok(()),
        }
    }

    fn final_done(&mut self, done: Done) -> Said {
        let handle = done.handle;
        // Closed meanwhile: its text is nobody's.
        let Some(session) = self.sessions.get_mut(&handle) else {
            return Ok(());
        };
        session.decoding.remove(&done.part);
        // What it would say has just been said.
        session.partial.iter().for_each(Cancel::cancel);
        let (heard, guards) = match done.heard {
            Ok(judged) => (Ok(judged.hypothesis), judged.guards.into_iter().map(str::to_owned).collect()),
            Err(error) if ends_session(&error) => return self.fail(handle, &error),
            Err(error) => {
                tracing::error!(handle, %error, "window could not be decoded");
                (Err(error), Vec::new())
            }
        };
        let timings = Timings {
            queued_ms: done.queued.as_millis() as u64,
            decode_ms: done.took.as_millis() as u64,
            ..Timings::default()
        };
        if let Listened::Late(late) = &done.listened {
            session.listening.push((session.stream.index(), late.flag().clone()));
        }
        let completed = session.stream.complete(done.part, heard, guards, done.listened, &done.info, timings);
        let Some(draft) = completed else {
            // Other windows of it are not decoded yet.
            return Ok(());
        };
        let finishing = session.finishing;
        session.dirty = !finishing;
        session.went_beyond(draft.to_sample);
        self.say_final(handle, draft)?;
        if finishing {
            self.say(&FromEngine::Finished { handle })?;
        }
        self.say_what_it_left(handle)
    }

    /// A final, and behind it, where its checkpoint stands, what is known by now of the speakers of those before it. Readers
    /// go when they have seen the end: there it comes first.
    fn say_final(&mut self, handle: u64, draft: Box<FinalDraft>) -> Said {
        let revisions = self.sessions.get_mut(&handle).map(|session| session.stream.take_revisions());
        let revisions = revisions.into_iter().flatten().map(Box::new);
        let revisions = revisions.map(|revision| FromEngine::Revision { handle, revision });
        let (end, said) = (draft.end, FromEngine::Final { handle, draft });
        let messages: Vec<_> = match end {
            true => revisions.chain([said]).collect(),
            false => std::iter::once(said).chain(revisions).collect(),
        };
        messages.iter().try_for_each(|message| self.say(message))
    }

    pub(super) fn heard_late(&mut self, late: HeardLate) -> Said {
        let HeardLate { handle, index, heard } = late;
        if let Some(session) = self.sessions.get_mut(&handle) {
            session.listening.retain(|(listening, _)| *listening != index);
            if session.scout.is_some() {
                self.overheard(handle, heard)?;
                return self.say(&FromEngine::Over { handle });
            }
            session.stream.heard_late(index, heard);
            // Its end may have waited for it.
            session.dirty = !session.finishing;
        }
        self.say(&FromEngine::Over { handle })
    }

    fn partial_done(&mut self, done: &Done) -> Said {
        let handle = done.handle;
        let Some(session) = self.sessions.get_mut(&handle) else {
            return Ok(());
        };
        session.partial = None;
        match &done.heard {
            Ok(judged) => {
                let to_sample = done.window.from_sample + done.window.samples.len() as u64;
                match session.stream.partial_heard(&judged.hypothesis, to_sample) {
                    Some(partial) => self.say(&FromEngine::Partial { handle, partial: Box::new(partial) }),
                    None => Ok(()),
                }
            }
            Err(error) => {
                session.stream.partial_failed();
                match error {
                    // What the model cannot do is told once for each final.
                    EngineError::Cancelled | EngineError::Unsupported(_) => Ok(()),
                    error if ends_session(error) => self.fail(handle, error),
                    error => {
                        tracing::warn!(handle, %error, "partial pass failed");
                        Ok(())
                    }
                }
            }
        }
    }

    /// Ends a session here and tells why; its bytes are free with that.
    pub(super) fn fail(&mut self, handle: u64, error: &EngineError) -> Said {
        tracing::warn!(handle, %error, "session cannot go on here");
        self.forget(handle);
        let class: FailureClass = error.class();
        self.say(&FromEngine::Failed { handle, failure: Failure::new(class, error.to_string()) })
    }

    fn forget(&mut self, handle: u64) {
        if let Some(session) = self.sessions.remove(&handle) {
            session.cancel();
        }
    }

    pub(super) fn cancel_all(self) -> Pool {
        self.sessions.values().for_each(Session::cancel);
        self.pool
    }
}

impl Session {
    /// A final waits for its text.
    fn has_begun(&self) -> bool {
        !self.ready.is_empty() || !self.decoding.is_empty()
    }

    /// A final has ended there.
    fn went_beyond(&mut self, to_sample: u64) {
        self.suspect.take_if(|suspect| suspect.beyond < to_sample);
    }

    /// Why the present stretch is not to be decoded.
    fn parked(&self) -> Option<Failure> {
        let suspect = self.suspect.as_ref()?;
        suspect.park.clone().filter(|_| self.stream.from_sample() >= suspect.beyond)
    }

    fn cancel(&self) {
        self.stream.cancel();
        self.decoding.values().chain(&self.partial).for_each(Cancel::cancel);
        self.listening.iter().for_each(|(_, flag)| flag.cancel());
    }
}
