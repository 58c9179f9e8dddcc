//! One stretch of audio: from half a second before the last final's end until its own cut. Everything in here with a
//! memory (resamplers, VADs, endpointer) is made anew for each stretch, in every run, so a resumed session cannot tell
//! that it was resumed.
//!
//! It has as many channels as the formats in it have at most; one that a format lacks is silent there. All channels have
//! the same frames, so a stretch is looked at frame by frame with all of them side by side.

use std::ops::Range;

use voxfleet_schema::{
    audio::{AudioFormat, preroll_start},
    transcript::VadKind,
};

use super::{
    digest::Piece,
    endpoint::{Cut, Endpointer, Limits, Speech, can_be_split},
};
use crate::engine::{EngineError, VAD_FRAME, Vad, resample::To16k};

/// A detector for each channel, made as channels appear.
pub(super) struct Detectors {
    first: Box<dyn Vad>,
    others: Vec<Box<dyn Vad>>,
}

impl Detectors {
    pub(super) fn new(first: Box<dyn Vad>) -> Self {
        let mut detectors = Self { first, others: Vec::new() };
        detectors.reset();
        detectors
    }

    pub(super) fn kind(&self) -> VadKind {
        self.first.kind()
    }

    pub(super) fn reset(&mut self) {
        self.first.reset();
        self.others.iter_mut().for_each(|vad| vad.reset());
    }

    fn of(&mut self, channel: usize) -> &mut dyn Vad {
        let Some(other) = channel.checked_sub(1) else {
            return self.first.as_mut();
        };
        while self.others.len() <= other {
            self.others.push(self.first.another());
        }
        self.others[other].as_mut()
    }

    /// Where there are several channels, one of which nothing comes at all costs nothing: its detector is not asked.
    fn listen(&mut self, frames: &[&[f32; VAD_FRAME]]) -> Result<Vec<f32>, EngineError> {
        let several = frames.len() > 1;
        let probability = |(channel, frame): (usize, &&[f32; VAD_FRAME])| {
            if several && frame.iter().all(|sample| *sample == 0.0) {
                return Ok(0.0);
            }
            self.of(channel).speech_probability(frame)
        };
        frames.iter().enumerate().map(probability).collect()
    }
}

/// Resamplers at work since `start_sample`, one for each channel of the format.
struct Run {
    resamplers: Vec<To16k>,
    format_sample: u64,
    start_sample: u64,
}

pub(super) struct Segment {
    /// First sample the next final covers.
    pub(super) from: u64,
    /// Frames whose sample lies below this are skipped, not fed.
    first_sample: u64,
    /// Session sample of the first of each track; known with the first frame.
    base: Option<u64>,
    /// 16 kHz, one for each channel, all of one length.
    tracks: Vec<Vec<f32>>,
    run: Option<Run>,
    endpointer: Option<Endpointer>,
    /// Samples of the tracks that the VADs have heard.
    heard: usize,
    /// Where somebody spoke, as far as the VADs have heard, in session samples.
    spoken: Vec<Range<u64>>,
    format: AudioFormat,
}

impl Segment {
    pub(super) fn new(from: u64) -> Self {
        Self {
            from,
            first_sample: preroll_start(from),
            base: None,
            tracks: Vec::new(),
            run: None,
            endpointer: None,
            heard: 0,
            spoken: Vec::new(),
            format: AudioFormat::default(),
        }
    }

    /// Offset of the first frame of `piece` that is fed.
    pub(super) fn first_frame(&self, piece: &Piece) -> usize {
        let wanted = self.first_sample.saturating_sub(piece.format_sample);
        let frame = piece.format.first_frame_at(wanted).saturating_sub(piece.at_frame);
        usize::try_from(frame).unwrap_or(usize::MAX).min(piece.audio.frames())
    }

    /// Feeds frames of `piece`; they follow those fed before.
    pub(super) fn feed(&mut self, piece: &Piece, frames: Range<usize>) -> Result<(), EngineError> {
        if frames.is_empty() {
            return Ok(());
        }
        let (at, channels) = (piece.sample_of(piece.at_frame + frames.start as u64), piece.audio.channels());
        if channels > 1 && !can_be_split(piece.format) {
            let why = format!("{} is more than can be split, channels=mix takes it", piece.format);
            return Err(EngineError::Unsupported(why));
        }
        if self.run.as_ref().is_some_and(|run| run.format_sample != piece.format_sample) {
            self.flush_to(piece.format_sample);
            self.run = None;
        }
        let base = *self.base.get_or_insert(at);
        self.endpointer.get_or_insert_with(|| Endpointer::new(self.from, base));
        self.format = piece.format;
        let run = match &mut self.run {
            Some(run) => run,
            None => {
                let resamplers = (0..channels).map(|_| To16k::new(piece.format.rate_hz)).collect::<Result<_, _>>()?;
                self.run.insert(Run { resamplers, format_sample: piece.format_sample, start_sample: at })
            }
        };
        let len = self.tracks.first().map_or(0, Vec::len);
        if self.tracks.len() < channels {
            self.tracks.resize_with(channels, || vec![0.0; len]);
        }
        for (channel, (resampler, track)) in run.resamplers.iter_mut().zip(&mut self.tracks).enumerate() {
            resampler.push(&piece.audio.channel(channel, frames.clone()), track);
        }
        self.silence_the_others();
        Ok(())
    }

    /// Makes the audio reach exactly to session sample `place`: nothing that was fed stays inside the resamplers.
    pub(super) fn flush_to(&mut self, place: u64) {
        if let Some(run) = &mut self.run {
            let total = place.saturating_sub(run.start_sample);
            for (resampler, track) in run.resamplers.iter_mut().zip(&mut self.tracks) {
                resampler.flush(total, track);
            }
            self.silence_the_others();
        }
    }

    /// Channels that the present format lacks.
    fn silence_the_others(&mut self) {
        let len = self.tracks.first().map_or(0, Vec::len);
        let present = self.run.as_ref().map_or(0, |run| run.resamplers.len());
        self.tracks.iter_mut().skip(present).for_each(|track| track.resize(len, 0.0));
    }

    fn limits(&self, endpoint_ms: u32) -> Limits {
        Limits::new(endpoint_ms, self.format, self.tracks.len())
    }

    /// Runs the VADs over whole frames until a cut or the end of the audio.
    pub(super) fn listen(&mut self, vads: &mut Detectors, endpoint_ms: u32) -> Result<Option<Cut>, EngineError> {
        let limits = self.limits(endpoint_ms);
        let Some(endpointer) = self.endpointer.as_mut().filter(|_| !self.tracks.is_empty()) else {
            return Ok(None);
        };
        loop {
            let next = self.tracks.iter().map(|track| track.get(self.heard..)?.first_chunk::<VAD_FRAME>());
            let Some(frames) = next.collect::<Option<Vec<_>>>() else {
                return Ok(None);
            };
            self.heard += VAD_FRAME;
            let cut = endpointer.push(&vads.listen(&frames)?, limits);
            note_speech(&mut self.spoken, endpointer);
            if cut.is_some() {
                return Ok(cut);
            }
        }
    }

    /// Lets the VADs hear what is left of the audio, padded with silence: a flush or end stands behind it.
    pub(super) fn listen_to_rest(&mut self, vads: &mut Detectors, endpoint_ms: u32) -> Result<(), EngineError> {
        let limits = self.limits(endpoint_ms);
        let len = self.tracks.first().map_or(0, Vec::len);
        let Some(endpointer) = self.endpointer.as_mut().filter(|_| self.heard < len) else {
            return Ok(());
        };
        let padded = self.tracks.iter().map(|track| {
            let mut frame = [0.0; VAD_FRAME];
            frame[..len - self.heard].copy_from_slice(&track[self.heard..]);
            frame
        });
        let padded: Vec<[f32; VAD_FRAME]> = padded.collect();
        self.heard = len;
        // A cut that falls into the padding is the flush itself.
        let _ = endpointer.push(&vads.listen(&padded.iter().collect::<Vec<_>>())?, limits);
        note_speech(&mut self.spoken, endpointer);
        Ok(())
    }

    /// Where somebody spoke, in order.
    pub(super) fn spoken(&self) -> &[Range<u64>] {
        &self.spoken
    }

    /// Speech heard so far, up to `limit`, in order of where it begins.
    pub(super) fn speech(&self, limit: u64) -> Vec<Speech> {
        self.endpointer.as_ref().map(|heard| heard.speech(limit.min(self.end()))).unwrap_or_default()
    }

    /// Session sample behind the last one there is.
    pub(super) fn end(&self) -> u64 {
        let len = self.tracks.first().map_or(0, Vec::len);
        self.base.map_or(self.from, |base| base + len as u64)
    }

    /// Samples of a channel in a range of session positions.
    pub(super) fn samples(&self, channel: usize, range: &Range<u64>) -> Vec<f32> {
        let Some(track) = self.tracks.get(channel) else {
            return Vec::new();
        };
        let base = self.base.unwrap_or(self.from);
        let index = |sample: u64| usize::try_from(sample.saturating_sub(base)).unwrap_or(usize::MAX).min(track.len());
        track[index(range.start)..index(range.end)].to_vec()
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
