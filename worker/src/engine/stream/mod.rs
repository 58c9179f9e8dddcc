//! A session's log becomes windows to decode, partials and finals.
//!
//! Invariants, each with a test in the conformance suite:
//! - The boundaries of finals depend on the log alone: not on how it was cut into chunks, not on load, not on when a
//!   decode came back.
//! - After each final everything starts again from its `resume`, exactly as another worker would start.
//! - Entries are used in log order; what is not used is noted.
//!
//! The stream does no IO and decodes nothing: [`SessionStream::step`] says what to decode, [`SessionStream::complete`]
//! takes the answers. The engine loop owns it.
//!
//! Channels are mixed, or heard one by one (`channels=split`): [`endpoint`] says where a final of all of them ends, and
//! each utterance of each channel in it is a window of its own.

mod agreement;
mod digest;
mod endpoint;
mod parts;
mod pcm;
mod segment;
mod speakers;
mod words;

pub(crate) use self::speakers::{Tellers, limits_of};

use std::{collections::VecDeque, ops::Range};

use voxfleet_schema::{
    audio::{RawEntry, preroll_start},
    failure::Failure,
    session::{Channels, SessionOptions},
    transcript::{AudioRange, Checkpoint, Lost, Resume, Timings, ToldLate, VadKind},
};

use self::{
    agreement::Agreement,
    digest::{Barrier, Digest, Piece},
    endpoint::Cut,
    parts::{Answer, Joined, Part, Pending},
    segment::{Detectors, Segment},
};
use crate::{
    engine::{
        Cancel, EngineError, Hypothesis, Purpose, RecognizerInfo, Vad, Window,
        diarize::{Heard, Hearing, Listened},
    },
    ipc::{FinalDraft, HeardOf, PartialDraft, RevisionDraft, StartPoint, StreamNote, Told},
};

/// Audio between two partials, in samples (1 s).
const PARTIAL_STEP: u64 = 16_000;
/// Longest window of a quick pass, in samples (10 s): with a longer one it would not be quick, and finals wait for it.
const FIRST_WORDS_MAX: u64 = 160_000;
/// Text carried to the next window, in characters: about the 200 tokens Whisper would look at.
const PROMPT_TAIL_CHARS: usize = 600;

/// What to do next.
#[derive(Debug)]
pub enum Step {
    /// All input is used up.
    Starved,
    /// Decode these, in any order or at once, and call [`SessionStream::complete`] for each. There is one at least.
    Final(Vec<Window>),
    /// A final without speech; nothing to decode.
    Draft(Box<FinalDraft>),
    /// The session's audio has ended and its end final is out.
    Ended,
}

/// One session (or job) in the engine.
pub struct SessionStream {
    options: SessionOptions,
    vads: Detectors,
    digest: Digest,
    /// Entries from the last final's resume point on.
    pieces: VecDeque<Piece>,
    /// Next piece and frame to feed.
    piece: usize,
    frame: usize,
    segment: Segment,
    pending: Option<Pending>,
    /// `to_seq` and `end` of the last final: which ends are done.
    last: Option<(u64, bool)>,
    ended: bool,
    index: u64,
    language: Option<String>,
    checkpoint: Checkpoint,
    checkpoint_missing: bool,
    lost: Option<Lost>,
    agreement: Agreement,
    /// End of the audio the last partial of each channel covered, and the window of the one being decoded.
    partial_to: Vec<u64>,
    partial_pending: Option<(usize, Range<u64>)>,
    /// Where speakers are asked for.
    tellers: Option<Tellers>,
    /// Why nobody listens although speakers are asked for: channels are told apart instead.
    unheard_because: Option<String>,
    /// A file job: nobody waits for its next words.
    recording: bool,
    /// Taken over, and nothing has been heard of it here yet.
    unheard: bool,
    cancel: Cancel,
    notes: Vec<StreamNote>,
    consumed_bytes: u64,
}

impl SessionStream {
    pub fn new(options: &SessionOptions, start: StartPoint, vad: Box<dyn Vad>) -> Self {
        let split = options.channels == Channels::Split;
        let after = start.after.as_deref();
        let from = after.map_or(0, |a| a.to_sample);
        Self {
            options: options.clone(),
            vads: Detectors::new(vad),
            digest: after.map_or_else(|| Digest::beginning(split), |a| Digest::after(a, start.expired, split)),
            pieces: VecDeque::new(),
            piece: 0,
            frame: 0,
            segment: Segment::new(from),
            pending: None,
            last: after.map(|a| (a.to_seq, a.end)),
            ended: false,
            index: after.map_or(0, |a| a.index + 1),
            language: options.language.clone().or_else(|| after.and_then(|a| a.resume.language.clone())),
            checkpoint_missing: start.checkpoint_missing,
            lost: start.lost,
            agreement: Agreement::default(),
            partial_to: Vec::new(),
            partial_pending: None,
            tellers: Tellers::new(options, &start),
            unheard_because: None,
            recording: false,
            unheard: start.taken_over,
            cancel: Cancel::default(),
            notes: Vec::new(),
            consumed_bytes: 0,
            checkpoint: start.checkpoint,
        }
    }

    /// The same where speakers were asked for if they can be had, and cannot: each channel is somebody then.
    pub fn by_channels(options: &SessionOptions, start: StartPoint, vad: Box<dyn Vad>, why: String) -> Self {
        // They remember the labels that were shown.
        let tellers = Tellers::new(options, &start);
        let split = SessionOptions { channels: Channels::Split, ..options.clone() };
        Self { tellers, unheard_because: Some(why), ..Self::new(&split, start, vad) }
    }

    /// Its words wait for their speakers.
    pub fn of_recording(mut self) -> Self {
        self.recording = true;
        self
    }

    /// Another detector from here on.
    pub fn hear_with(&mut self, vad: Box<dyn Vad>) {
        self.vads = Detectors::new(vad);
    }

    pub fn vad_kind(&self) -> VadKind {
        self.vads.kind()
    }

    /// Takes the next log entry.
    pub fn push(&mut self, entry: RawEntry) {
        let digested = self.digest.take(entry);
        self.notes.extend(digested.notes);
        self.consumed_bytes += digested.freed_bytes;
        self.pieces.extend(digested.piece);
    }

    /// Works until something must be decoded or the input is used up. Not to be called between [`Step::Final`] and
    /// [`Self::complete`]; it says `Starved` then.
    pub fn step(&mut self) -> Result<Step, EngineError> {
        if self.ended {
            return Ok(Step::Ended);
        }
        if self.pending.is_some() {
            return Ok(Step::Starved);
        }
        loop {
            if let Some(cut) = self.segment.listen(&mut self.vads, self.options.endpoint_ms)? {
                return Ok(self.cut(cut));
            }
            let Some(piece) = self.pieces.get(self.piece) else {
                return Ok(Step::Starved);
            };
            self.frame = self.frame.max(self.segment.first_frame(piece));
            if self.frame < piece.audio.frames() {
                // 100 ms at a time: what lies behind a cut is not resampled twice.
                let block = (piece.format.rate_hz / 10) as usize;
                let frames = self.frame..(self.frame + block).min(piece.audio.frames());
                self.frame = frames.end;
                self.segment.feed(piece, frames)?;
                continue;
            }
            if let Some(barrier) = piece.barrier
                && !self.is_done(piece, barrier)
            {
                if barrier == Barrier::End && self.owes_speakers() {
                    // No final comes behind it that could bring them.
                    return Ok(Step::Starved);
                }
                let (seq, place) = (piece.seq, piece.end_sample());
                self.segment.flush_to(place);
                if let Some(cut) = self.segment.listen(&mut self.vads, self.options.endpoint_ms)? {
                    return Ok(self.cut(cut));
                }
                self.segment.listen_to_rest(&mut self.vads, self.options.endpoint_ms)?;
                return Ok(self.finish(place, Some((seq, barrier)), true));
            }
            self.frame = 0;
            // Done once is done for good, so it would only be passed over again. The first piece is the resume point.
            if self.piece > 0 && piece.audio.frames() == 0 {
                let dropped = self.pieces.remove(self.piece);
                self.consumed_bytes += dropped.map_or(0, |p| p.permit_bytes);
            } else {
                self.piece += 1;
            }
        }
    }

    /// Flushes and ends that an earlier final has answered are passed over when read again.
    fn is_done(&self, piece: &Piece, barrier: Barrier) -> bool {
        match (barrier, self.last) {
            (Barrier::Flush, _) => self.segment.from >= piece.end_sample(),
            (Barrier::End, None) => false,
            (Barrier::End, Some((to_seq, end))) => piece.seq < to_seq || (piece.seq == to_seq && end),
        }
    }

    fn cut(&mut self, cut: Cut) -> Step {
        match cut {
            Cut::Endpoint(to) => self.finish(to, None, true),
            Cut::Full(to) | Cut::Quiet(to) => self.finish(to, None, false),
        }
    }

    /// Ends the stretch at `to`; `cause` is the flush or end that asked for it.
    fn finish(&mut self, to: u64, cause: Option<(u64, Barrier)>, speech_final: bool) -> Step {
        let holder = |sample: u64| self.pieces.iter().find(|p| p.reaches(sample)).map(|p| p.seq);
        let from = self.segment.from;
        let to_seq = cause.map(|(seq, _)| seq).or_else(|| holder(to.saturating_sub(1)));
        let to_seq = to_seq.or_else(|| self.pieces.back().map(|p| p.seq)).unwrap_or_default();
        let from_seq = if from < to { holder(from).unwrap_or(to_seq) } else { to_seq };
        let speech = self.segment.speech(to);
        let end = cause.is_some_and(|(_, barrier)| barrier == Barrier::End);
        let audio = AudioRange { from_seq, to_seq };
        let pending = Pending { to, audio, speech_final, end, parts: Pending::parts_of(speech) };
        if pending.parts.is_empty() {
            return Step::Draft(self.draft(pending, Joined::nothing(None)));
        }
        let window_of = |part: &Part| {
            let hearing = self.hearing(&part.window, to, end);
            Window { hearing, ..self.window(part.channel, &part.window, Purpose::Final) }
        };
        let windows = pending.parts.iter().map(window_of).collect();
        self.pending = Some(pending);
        Step::Final(windows)
    }

    fn window(&self, channel: usize, range: &Range<u64>, purpose: Purpose) -> Window {
        let tail =
            if self.options.carry_prompt && !self.checkpoint.guard_hit { &self.checkpoint.prompt_tail } else { "" };
        Window {
            samples: self.segment.samples(channel, range),
            from_sample: range.start,
            purpose,
            prompt: words::prompt(&self.options.hotwords, self.options.prompt.as_deref().unwrap_or(""), tail),
            language: self.language.clone(),
            task: self.options.task,
            hearing: None,
            background: false,
            cancel: self.cancel.clone(),
        }
    }

    /// What is to be heard of the speakers of a window that ends a stretch at `to`. Only where channels are mixed.
    fn hearing(&self, window: &Range<u64>, to: u64, end: bool) -> Option<Box<Hearing>> {
        self.tellers.as_ref().filter(|_| self.unheard_because.is_none())?;
        Some(Box::new(Hearing {
            index: self.index,
            samples: self.segment.samples(0, window),
            from_sample: window.start,
            speech: speakers::inside(self.segment.spoken(), window),
            patient: self.recording || end,
            waited_ms: to.saturating_sub(window.end) / 16,
        }))
    }

    /// Takes what was heard of the speakers of an earlier final.
    pub fn heard_late(&mut self, index: u64, heard: Result<Heard, String>) {
        self.tellers.iter_mut().for_each(|tellers| tellers.heard(index, heard.clone()));
    }

    /// Takes what was heard again of a final that was late when this stream began.
    pub fn heard_again(&mut self, heard: HeardOf) {
        if let Some(tellers) = &mut self.tellers {
            tellers.heard_again(heard);
        }
    }

    /// Whether an earlier final still waits for its speakers.
    pub fn owes_speakers(&self) -> bool {
        self.tellers.as_ref().is_some_and(Tellers::owes)
    }

    /// Speakers of earlier finals, to be said behind the final that was just drafted.
    pub fn take_revisions(&mut self) -> Vec<RevisionDraft> {
        self.tellers.as_mut().map(Tellers::take_revisions).unwrap_or_default()
    }

    /// Takes what the recognizer heard in one window of the last [`Step::Final`], counted from 0, after the guards. With the
    /// last of them it gives the final. What could not be decoded is missing in it, and it says so.
    pub fn complete(
        &mut self,
        part: usize,
        heard: Result<Hypothesis, EngineError>,
        guards: Vec<String>,
        listened: Listened,
        info: &RecognizerInfo,
        timings: Timings,
    ) -> Option<Box<FinalDraft>> {
        let answer = Answer { heard, guards, listened, info: info.clone(), timings };
        let mut pending = self.pending.take_if(|pending| pending.take(part, answer))?;
        self.unheard = false;
        let joined = pending.join(self.segment.from, &self.options);
        if self.language.is_none() {
            self.language = joined.segments.first().and_then(|segment| segment.language.clone());
        }
        Some(self.draft(pending, joined))
    }

    /// Sets the last [`Step::Final`] aside undecoded: a final without segments that says why, with the same boundaries.
    pub fn set_aside(&mut self, why: Failure) -> Option<Box<FinalDraft>> {
        let pending = self.pending.take()?;
        let mut draft = self.draft(pending, Joined::nothing(Some(why)));
        draft.parked = true;
        Some(draft)
    }

    /// Index of the next final.
    pub fn index(&self) -> u64 {
        self.index
    }

    /// Answers the last [`Step::Final`] undecoded, for whoever asks for the boundaries alone and the voices between them.
    pub fn pass_over(&mut self, heard: Option<Result<Heard, String>>) -> Option<Box<FinalDraft>> {
        let pending = self.pending.take()?;
        let mut draft = self.draft(pending, Joined::nothing(None));
        draft.heard = heard;
        Some(draft)
    }

    /// First sample of the present stretch: the end of the last final.
    pub fn from_sample(&self) -> u64 {
        self.segment.from
    }

    /// Makes the pending final and starts the next stretch from its resume point.
    fn draft(&mut self, pending: Pending, joined: Joined) -> Box<FinalDraft> {
        let Joined { segments, turns, listened, guards, error, info, timings } = joined;
        let from = self.segment.from;
        let said = voxfleet_schema::transcript::join_text(segments.iter().map(|segment| segment.text.as_str()));
        let mono = self.pieces.iter().all(|piece| piece.format.channels == 1);
        let Told { segments, turns, speakers } = match &mut self.tellers {
            Some(tellers) => match &self.unheard_because {
                Some(why) => tellers.by_channels(segments, turns, mono, why),
                None => tellers.tell(self.index, segments, listened),
            },
            None => Told { segments, turns, speakers: speakers::by_channels(&self.options) },
        };
        let resume = self.restart(pending.to);
        self.last = Some((pending.audio.to_seq, pending.end));
        self.ended = pending.end;
        let checkpoint = self.next_checkpoint(&said, !guards.is_empty(), pending.end);
        self.index += 1;
        Box::new(FinalDraft {
            from_sample: from,
            to_sample: pending.to,
            audio: pending.audio,
            resume,
            segments,
            turns,
            speakers,
            speech_final: pending.speech_final,
            end: pending.end,
            lost: self.lost.take(),
            error,
            parked: false,
            heard: None,
            guards,
            checkpoint_missing: std::mem::take(&mut self.checkpoint_missing),
            checkpoint,
            model: info.model,
            device: info.device,
            engine: info.engine,
            vad: self.vads.kind(),
            timings,
        })
    }

    /// `said`: as the engine said it, however it is cut for its speakers.
    fn next_checkpoint(&mut self, said: &str, guard_hit: bool, end: bool) -> Option<Checkpoint> {
        let tellers = self.tellers.as_ref();
        let voices = tellers.and_then(Tellers::voices);
        let late: Vec<u64> = tellers.map(Tellers::late).unwrap_or_default();
        // Before an end they are published first.
        let told: Vec<ToldLate> = tellers.filter(|_| !end).map(Tellers::told).unwrap_or_default();
        if !self.options.carry_prompt {
            let goes_beyond = voices.is_some() || !late.is_empty() || !told.is_empty();
            self.checkpoint = Checkpoint { index: self.index, voices, late, told, ..Checkpoint::default() };
            return goes_beyond.then(|| self.checkpoint.clone());
        }
        let pieces = [self.checkpoint.prompt_tail.as_str(), said].into_iter();
        let prompt_tail = words::tail(&voxfleet_schema::transcript::join_text(pieces), PROMPT_TAIL_CHARS).to_owned();
        self.checkpoint = Checkpoint { index: self.index, prompt_tail, guard_hit, voices, late, told };
        Some(self.checkpoint.clone())
    }

    /// Drops what lies before the resume point of a final that ends at `to`, and starts the next stretch there.
    fn restart(&mut self, to: u64) -> Resume {
        let preroll = preroll_start(to);
        // The last piece stays in any case: it is the resume point of a session without audio.
        while self.pieces.len() > 1 && self.pieces.front().is_some_and(|p| !p.reaches(preroll)) {
            let dropped = self.pieces.pop_front();
            self.consumed_bytes += dropped.map_or(0, |p| p.permit_bytes);
        }
        self.piece = 0;
        self.frame = 0;
        self.segment = Segment::new(to);
        self.vads.reset();
        self.agreement = Agreement::default();
        self.partial_to.clear();
        self.partial_pending = None;
        let (seq, at_sample, at_frame, format, format_sample, producers) = match self.pieces.front() {
            Some(p) => (p.seq, p.at_sample, p.at_frame, p.format, p.format_sample, p.producers_before.state()),
            None => self.digest.resume_here(),
        };
        Resume { seq, at_sample, at_frame, format, format_sample, producers, language: self.language.clone() }
    }

    /// Whether a pass over the growing window is worth making; the engine makes it when it has nothing better to do.
    pub fn partial_due(&self) -> bool {
        self.growing().is_some()
    }

    /// The channel whose latest words have waited longest, and the window to hear them in: from where its utterance began to
    /// all there is.
    fn growing(&self) -> Option<(usize, Range<u64>)> {
        if !self.options.interim || self.ended || self.pending.is_some() || self.partial_pending.is_some() {
            return None;
        }
        let end = self.segment.end();
        let waiting = self.segment.speech(u64::MAX).into_iter().filter_map(|speech| {
            let heard =
                self.partial_to.get(speech.channel).copied().unwrap_or(self.segment.from).max(speech.range.start);
            // One that is over while others speak is heard to its end, once.
            let (due, to) = if speech.over {
                (speech.range.end > heard, speech.range.end)
            } else {
                (end >= heard + PARTIAL_STEP, end)
            };
            due.then_some((heard, speech.channel, speech.range.start..to))
        });
        waiting.min_by_key(|(heard, channel, _)| (*heard, *channel)).map(|(_, channel, window)| (channel, window))
    }

    /// The growing window.
    pub fn partial_window(&mut self) -> Option<Window> {
        let (channel, window) = self.growing()?;
        Some(self.partial_of(channel, window))
    }

    fn partial_of(&mut self, channel: usize, window: Range<u64>) -> Window {
        if self.partial_to.len() <= channel {
            self.partial_to.resize(channel + 1, self.segment.from);
        }
        self.partial_to[channel] = window.end;
        let partial = self.window(channel, &window, Purpose::Partial);
        self.partial_pending = Some((channel, window));
        partial
    }

    /// Whether [`Self::first_words`] has a window.
    pub fn has_first_words(&self) -> bool {
        let first = self.pending.as_ref().and_then(|pending| pending.parts.first());
        let quick = first.is_some_and(|part| part.window.end - part.window.start <= FIRST_WORDS_MAX);
        self.unheard && self.options.interim && quick
    }

    /// The first window of the first final this stream asked for, as a partial's. Whoever takes a session over from a worker
    /// that died finds a stretch that ended long ago: a partial pass says its words several times sooner than the final can.
    /// Any other session has had its partials.
    pub fn first_words(&mut self) -> Option<Window> {
        if !self.has_first_words() {
            return None;
        }
        let part = self.pending.as_ref()?.parts.first()?;
        let (channel, window) = (part.channel, part.window.clone());
        self.unheard = false;
        Some(self.partial_of(channel, window))
    }

    /// Takes what was heard in the partial window that ended at `to_sample`; none when a final has overtaken it.
    pub fn partial_heard(&mut self, heard: &Hypothesis, to_sample: u64) -> Option<PartialDraft> {
        let (channel, window) = self.partial_pending.take_if(|(_, window)| window.end == to_sample)?;
        self.unheard = false;
        let text = voxfleet_schema::transcript::join_text(heard.segments.iter().map(|s| s.text.as_str()));
        let (committed, tentative) = self.agreement.hear(window.start, channel, &text);
        Some(PartialDraft {
            from_sample: self.segment.from,
            to_sample,
            committed,
            tentative,
            lag_ms: self.digest.position().saturating_sub(to_sample) / 16,
        })
    }

    /// A partial pass failed or was dropped; the next one may go.
    pub fn partial_failed(&mut self) {
        self.partial_pending = None;
    }

    pub fn take_notes(&mut self) -> Vec<StreamNote> {
        std::mem::take(&mut self.notes)
    }

    /// Bytes of entries no longer kept since the last call.
    pub fn take_consumed(&mut self) -> u64 {
        std::mem::take(&mut self.consumed_bytes)
    }

    /// Audio handed over and not yet covered by a final, in ms.
    pub fn behind_ms(&self) -> u64 {
        self.digest.position().saturating_sub(self.segment.from) / 16
    }

    pub fn options(&self) -> &SessionOptions {
        &self.options
    }

    /// Stops decodes of this session that are under way.
    pub fn cancel(&self) {
        self.cancel.cancel();
    }
}

#[cfg(test)]
mod tests;
