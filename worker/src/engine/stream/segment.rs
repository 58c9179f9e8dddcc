//! One stretch of audio: from half a second before the last final's end until its own cut. Everything in here with a
//! memory (resampler, VAD, endpointer) is made anew for each stretch, in every run, so a resumed session cannot tell
//! that it was resumed.

use std::ops::Range;

use voxfleet_schema::audio::preroll_start;

use super::{
    digest::Piece,
    endpoint::{Cut, Endpointer, Limits},
};
use crate::engine::{EngineError, VAD_FRAME, Vad, resample::To16k};

/// A resampler at work since `start_sample`.
struct Run {
    resampler: To16k,
    format_sample: u64,
    start_sample: u64,
}

pub(super) struct Segment {
    /// First sample the next final covers.
    pub(super) from: u64,
    /// Frames whose sample lies below this are skipped, not fed.
    first_sample: u64,
    /// Session sample of `audio[0]`; known with the first frame.
    base: Option<u64>,
    audio: Vec<f32>,
    run: Option<Run>,
    endpointer: Option<Endpointer>,
    /// Samples of `audio` that the VAD has heard.
    heard: usize,
    /// Where somebody spoke, as far as the VAD has heard, in session samples.
    spoken: Vec<Range<u64>>,
    rate_hz: u32,
}

impl Segment {
    pub(super) fn new(from: u64) -> Self {
        Self {
            from,
            first_sample: preroll_start(from),
            base: None,
            audio: Vec::new(),
            run: None,
            endpointer: None,
            heard: 0,
            spoken: Vec::new(),
            rate_hz: 16_000,
        }
    }

    /// Offset of the first frame of `piece` that is fed.
    pub(super) fn first_frame(&self, piece: &Piece) -> usize {
        let wanted = self.first_sample.saturating_sub(piece.format_sample);
        let frame = piece.format.first_frame_at(wanted).saturating_sub(piece.at_frame);
        usize::try_from(frame).unwrap_or(usize::MAX).min(piece.mono.len())
    }

    /// Feeds frames of `piece`; they follow those fed before.
    pub(super) fn feed(&mut self, piece: &Piece, frames: Range<usize>) -> Result<(), EngineError> {
        if frames.is_empty() {
            return Ok(());
        }
        let at = piece.sample_of(piece.at_frame + frames.start as u64);
        if self.run.as_ref().is_some_and(|run| run.format_sample != piece.format_sample) {
            self.flush_to(piece.format_sample);
            self.run = None;
        }
        let base = *self.base.get_or_insert(at);
        self.endpointer.get_or_insert_with(|| Endpointer::new(self.from, base));
        self.rate_hz = piece.format.rate_hz;
        let run = match &mut self.run {
            Some(run) => run,
            None => self.run.insert(Run {
                resampler: To16k::new(piece.format.rate_hz)?,
                format_sample: piece.format_sample,
                start_sample: at,
            }),
        };
        run.resampler.push(&piece.mono[frames], &mut self.audio);
        Ok(())
    }

    /// Makes the audio reach exactly to session sample `place`: nothing that was fed stays inside the resampler.
    pub(super) fn flush_to(&mut self, place: u64) {
        if let Some(run) = &mut self.run {
            run.resampler.flush(place.saturating_sub(run.start_sample), &mut self.audio);
        }
    }

    /// Runs the VAD over whole frames until a cut or the end of the audio.
    pub(super) fn listen(&mut self, vad: &mut dyn Vad, endpoint_ms: u32) -> Result<Option<Cut>, EngineError> {
        let Some(endpointer) = &mut self.endpointer else {
            return Ok(None);
        };
        let limits = Limits::new(endpoint_ms, self.rate_hz);
        while let Some(frame) = self.audio.get(self.heard..).and_then(|rest| rest.first_chunk::<VAD_FRAME>()) {
            self.heard += VAD_FRAME;
            let cut = endpointer.push(vad.speech_probability(frame)?, limits);
            note_speech(&mut self.spoken, endpointer);
            if cut.is_some() {
                return Ok(cut);
            }
        }
        Ok(None)
    }

    /// Lets the VAD hear what is left of the audio, padded with silence: a flush or end stands behind it.
    pub(super) fn listen_to_rest(&mut self, vad: &mut dyn Vad, endpoint_ms: u32) -> Result<(), EngineError> {
        let rest = self.audio.get(self.heard..).unwrap_or_default();
        let Some(endpointer) = self.endpointer.as_mut().filter(|_| !rest.is_empty()) else {
            return Ok(());
        };
        let mut frame = [0.0; VAD_FRAME];
        frame[..rest.len()].copy_from_slice(rest);
        self.heard = self.audio.len();
        // A cut that falls into the padding is the flush itself.
        let _ = endpointer.push(vad.speech_probability(&frame)?, Limits::new(endpoint_ms, self.rate_hz));
        note_speech(&mut self.spoken, endpointer);
        Ok(())
    }

    /// Where somebody spoke, in order.
    pub(super) fn spoken(&self) -> &[Range<u64>] {
        &self.spoken
    }

    /// Speech heard so far, up to `limit`.
    pub(super) fn speech(&self, limit: u64) -> Option<Range<u64>> {
        self.endpointer.as_ref()?.speech(limit.min(self.end()))
    }

    /// Session sample behind the last one there is.
    pub(super) fn end(&self) -> u64 {
        self.base.map_or(self.from, |base| base + self.audio.len() as u64)
    }

    /// Samples of a range of session positions.
    pub(super) fn samples(&self, range: &Range<u64>) -> Vec<f32> {
        let base = self.base.unwrap_or(self.from);
        let index =
            |sample: u64| usize::try_from(sample.saturating_sub(base)).unwrap_or(usize::MAX).min(self.audio.len());
        self.audio[index(range.start)..index(range.end)].to_vec()
    }
}

/// Adds the frame that was pushed last, if it is speech.
fn note_speech(spoken: &mut Vec<Range<u64>>, endpointer: &Endpointer) {
    let Some(frame) = endpointer.speaks() else { return };
    match spoken.last_mut().filter(|last| last.end == frame.start) {
        Some(last) => last.end = frame.end,
        None => spoken.push(frame),
    }
}
