//! A session's log becomes windows to decode, partials and finals.
//!
//! Invariants, each with a test in the conformance suite:
//! - The boundaries of finals depend on the log alone: not on how it was cut into chunks, not on load, not on when a
//!   decode came back.
//! - After each final everything starts again from its `resume`, exactly as another worker would start.
//! - Entries are used in log order; what is not used is noted.
//!
//! The stream does no IO and decodes nothing: [`SessionStream::step`] says what to decode, [`SessionStream::complete`]
//! takes the answer. The engine loop owns it.

mod agreement;
mod digest;
mod endpoint;
mod segment;
mod words;

use std::{collections::VecDeque, ops::Range};

use voxfleet_schema::{
    audio::{RawEntry, preroll_start},
    failure::Failure,
    session::SessionOptions,
    transcript::{AudioRange, Checkpoint, Lost, Resume, Timings, VadKind},
};

use self::{
    agreement::Agreement,
    digest::{Barrier, Digest, Piece},
    endpoint::Cut,
    segment::Segment,
};
use crate::{
    engine::{Cancel, EngineError, Hypothesis, Purpose, RecognizerInfo, Vad, Window},
    ipc::{FinalDraft, PartialDraft, StartPoint, StreamNote},
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
    /// Decode this, then call [`SessionStream::complete`].
    Final(Window),
    /// A final without speech; nothing to decode.
    Draft(Box<FinalDraft>),
    /// The session's audio has ended and its end final is out.
    Ended,
}

/// A final that waits for its text.
struct Pending {
    to: u64,
    audio: AudioRange,
    speech_final: bool,
    end: bool,
    /// What was given to the recognizer; empty without speech.
    window: Range<u64>,
}

/// One session (or job) in the engine.
pub struct SessionStream {
    options: SessionOptions,
    vad: Box<dyn Vad>,
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
    /// End of the audio the last partial covered, and of the one being decoded.
    partial_to: u64,
    partial_pending: Option<u64>,
    /// Taken over, and nothing has been heard of it here yet.
    unheard: bool,
    cancel: Cancel,
    notes: Vec<StreamNote>,
    consumed_bytes: u64,
}

impl SessionStream {
    pub fn new(options: &SessionOptions, start: StartPoint, mut vad: Box<dyn Vad>) -> Self {
        vad.reset();
        let after = start.after.as_deref();
        let from = after.map_or(0, |a| a.to_sample);
        Self {
            options: options.clone(),
            vad,
            digest: after.map_or_else(Digest::beginning, |a| Digest::after(a, start.expired)),
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
            checkpoint: start.checkpoint,
            agreement: Agreement::default(),
            partial_to: from,
            partial_pending: None,
            unheard: start.taken_over,
            cancel: Cancel::default(),
            notes: Vec::new(),
            consumed_bytes: 0,
        }
    }

    /// Another detector from here on.
    pub fn hear_with(&mut self, vad: Box<dyn Vad>) {
        self.vad = vad;
    }

    pub fn vad_kind(&self) -> VadKind {
        self.vad.kind()
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
            if let Some(cut) = self.segment.listen(self.vad.as_mut(), self.options.endpoint_ms)? {
                return Ok(self.cut(cut));
            }
            let Some(piece) = self.pieces.get(self.piece) else {
                return Ok(Step::Starved);
            };
            self.frame = self.frame.max(self.segment.first_frame(piece));
            if self.frame < piece.mono.len() {
                // 100 ms at a time: what lies behind a cut is not resampled twice.
                let block = (piece.format.rate_hz / 10) as usize;
                let frames = self.frame..(self.frame + block).min(piece.mono.len());
                self.frame = frames.end;
                self.segment.feed(piece, frames)?;
                continue;
            }
            if let Some(barrier) = piece.barrier
                && !self.is_done(piece, barrier)
            {
                let (seq, place) = (piece.seq, piece.end_sample());
                self.segment.flush_to(place);
                if let Some(cut) = self.segment.listen(self.vad.as_mut(), self.options.endpoint_ms)? {
                    return Ok(self.cut(cut));
                }
                self.segment.listen_to_rest(self.vad.as_mut(), self.options.endpoint_ms)?;
                return Ok(self.finish(place, Some((seq, barrier)), true));
            }
            self.frame = 0;
            // Done once is done for good, so it would only be passed over again. The first piece is the resume point.
            if self.piece > 0 && piece.mono.is_empty() {
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
        let window = self.segment.speech(to);
        let end = cause.is_some_and(|(_, barrier)| barrier == Barrier::End);
        let audio = AudioRange { from_seq, to_seq };
        match window {
            Some(range) => {
                let window = self.window(range.clone(), Purpose::Final);
                self.pending = Some(Pending { to, audio, speech_final, end, window: range });
                Step::Final(window)
            }
            None => {
                let pending = Pending { to, audio, speech_final, end, window: to..to };
                let nobody = RecognizerInfo::none();
                Step::Draft(self.draft(pending, Vec::new(), Vec::new(), None, &nobody, Timings::default()))
            }
        }
    }

    fn window(&self, range: Range<u64>, purpose: Purpose) -> Window {
        let tail =
            if self.options.carry_prompt && !self.checkpoint.guard_hit { &self.checkpoint.prompt_tail } else { "" };
        Window {
            samples: self.segment.samples(&range),
            from_sample: range.start,
            purpose,
            prompt: words::prompt(&self.options.hotwords, self.options.prompt.as_deref().unwrap_or(""), tail),
            language: self.language.clone(),
            task: self.options.task,
            cancel: self.cancel.clone(),
        }
    }

    /// Takes what the recognizer heard in the last [`Step::Final`], after the guards. A failed decode becomes a final
    /// without segments that says so.
    pub fn complete(
        &mut self,
        heard: Result<Hypothesis, EngineError>,
        guards: Vec<String>,
        info: &RecognizerInfo,
        mut timings: Timings,
    ) -> Option<Box<FinalDraft>> {
        let pending = self.pending.take()?;
        let window = pending.window.clone();
        self.unheard = false;
        timings.audio_ms = (window.end - window.start) / 16;
        let (segments, error) = match heard {
            Ok(hypothesis) => {
                let segments = words::place(&hypothesis, &window, self.segment.from..pending.to);
                timings.word_timing = hypothesis.word_timing;
                if !segments.is_empty() && self.language.is_none() {
                    self.language = hypothesis.language;
                }
                (segments, None)
            }
            Err(error) => (Vec::new(), Some(Failure::new(error.class(), error.to_string()))),
        };
        Some(self.draft(pending, segments, guards, error, info, timings))
    }

    /// Sets the last [`Step::Final`] aside undecoded: a final without segments that says why, with the same boundaries.
    pub fn set_aside(&mut self, why: Failure) -> Option<Box<FinalDraft>> {
        let pending = self.pending.take()?;
        let nobody = RecognizerInfo::none();
        let mut draft = self.draft(pending, Vec::new(), Vec::new(), Some(why), &nobody, Timings::default());
        draft.parked = true;
        Some(draft)
    }

    /// Answers the last [`Step::Final`] undecoded, for whoever asks for the boundaries alone.
    pub fn pass_over(&mut self) -> Option<Box<FinalDraft>> {
        self.complete(Ok(Hypothesis::default()), Vec::new(), &RecognizerInfo::none(), Timings::default())
    }

    /// First sample of the present stretch: the end of the last final.
    pub fn from_sample(&self) -> u64 {
        self.segment.from
    }

    /// Makes the pending final and starts the next stretch from its resume point.
    fn draft(
        &mut self,
        pending: Pending,
        segments: Vec<voxfleet_schema::transcript::Segment>,
        guards: Vec<String>,
        error: Option<Failure>,
        info: &RecognizerInfo,
        timings: Timings,
    ) -> Box<FinalDraft> {
        let from = self.segment.from;
        let resume = self.restart(pending.to);
        self.last = Some((pending.audio.to_seq, pending.end));
        self.ended = pending.end;
        let checkpoint = self.next_checkpoint(&segments, !guards.is_empty());
        self.index += 1;
        Box::new(FinalDraft {
            from_sample: from,
            to_sample: pending.to,
            audio: pending.audio,
            resume,
            segments,
            turns: Vec::new(),
            speakers: None,
            speech_final: pending.speech_final,
            end: pending.end,
            lost: self.lost.take(),
            error,
            parked: false,
            guards,
            checkpoint_missing: std::mem::take(&mut self.checkpoint_missing),
            checkpoint,
            model: info.model.clone(),
            device: info.device.clone(),
            engine: info.engine.clone(),
            vad: self.vad.kind(),
            timings,
        })
    }

    fn next_checkpoint(
        &mut self,
        segments: &[voxfleet_schema::transcript::Segment],
        guard_hit: bool,
    ) -> Option<Checkpoint> {
        if !self.options.carry_prompt {
            return None;
        }
        let pieces =
            std::iter::once(self.checkpoint.prompt_tail.as_str()).chain(segments.iter().map(|s| s.text.as_str()));
        let prompt_tail = words::tail(&voxfleet_schema::transcript::join_text(pieces), PROMPT_TAIL_CHARS).to_owned();
        self.checkpoint = Checkpoint { index: self.index, prompt_tail, guard_hit, voices: None };
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
        self.vad.reset();
        self.agreement = Agreement::default();
        self.partial_to = to;
        self.partial_pending = None;
        let (seq, at_sample, at_frame, format, format_sample, producers) = match self.pieces.front() {
            Some(p) => (p.seq, p.at_sample, p.at_frame, p.format, p.format_sample, p.producers_before.state()),
            None => self.digest.resume_here(),
        };
        Resume { seq, at_sample, at_frame, format, format_sample, producers, language: self.language.clone() }
    }

    /// Whether a pass over the growing window is worth making; the engine makes it when it has nothing better to do.
    pub fn partial_due(&self) -> bool {
        self.options.interim
            && !self.ended
            && self.pending.is_none()
            && self.partial_pending.is_none()
            && self.segment.speech(u64::MAX).is_some_and(|speech| {
                self.segment.end().saturating_sub(self.partial_to.max(speech.start)) >= PARTIAL_STEP
            })
    }

    /// The growing window, from where speech began to all there is.
    pub fn partial_window(&mut self) -> Option<Window> {
        if !self.partial_due() {
            return None;
        }
        let range = self.segment.speech(u64::MAX)?.start..self.segment.end();
        self.partial_to = range.end;
        self.partial_pending = Some(range.end);
        Some(self.window(range, Purpose::Partial))
    }

    /// Whether [`Self::first_words`] has a window.
    pub fn has_first_words(&self) -> bool {
        let quick = |p: &Pending| p.window.end - p.window.start <= FIRST_WORDS_MAX;
        self.unheard && self.options.interim && self.pending.as_ref().is_some_and(quick)
    }

    /// The window of the first final this stream asked for, as a partial's. Whoever takes a session over from a worker that
    /// died finds a stretch that ended long ago: a partial pass says its words several times sooner than the final can. Any
    /// other session has had its partials.
    pub fn first_words(&mut self) -> Option<Window> {
        if !self.has_first_words() {
            return None;
        }
        let range = self.pending.as_ref()?.window.clone();
        self.unheard = false;
        self.partial_to = range.end;
        self.partial_pending = Some(range.end);
        Some(self.window(range, Purpose::Partial))
    }

    /// Takes what was heard in the partial window that ended at `to_sample`; none when a final has overtaken it.
    pub fn partial_heard(&mut self, heard: &Hypothesis, to_sample: u64) -> Option<PartialDraft> {
        self.partial_pending.take_if(|pending| *pending == to_sample)?;
        self.unheard = false;
        let text = voxfleet_schema::transcript::join_text(heard.segments.iter().map(|s| s.text.as_str()));
        let (committed, tentative) = self.agreement.hear(&text);
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
