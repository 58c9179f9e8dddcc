//! Turns of a stretch, each with what its speaker sounds like; whose they are is not said here.
//!
//! With a segmentation network, local speakers are followed through the stretch and their turns may overlap; an
//! embedding is made of what a speaker says alone. Without one, voice activity gives the regions and [`changes`] cuts
//! them where the voice changes; turns then never overlap. Either way long turns come in pieces of some seconds with an
//! embedding each, so that a piece which is given to the wrong person can be mended alone.
//!
//! Pure but for the networks: a [`Listener`] remembers nothing from stretch to stretch.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::{
    RATE_HZ, changes,
    changes::Changes,
    fbank::{Extractor, FRAME, Features, FrontEnd, SHIFT},
    models::{Embedder, ModelError, Segmenter},
    powerset::{self, Hysteresis},
    windows::{Stitcher, Track, windows},
};

/// How a stretch is heard.
#[derive(Debug, Clone, PartialEq)]
pub struct Hearing {
    /// Frames of segmentation from window to window.
    pub hop: usize,
    /// Shorter stretches are filled up with silence to this, in samples. The network was trained on ten seconds, but a
    /// short word with eight seconds of nothing behind it gets more false turns than one with two.
    pub least_window: usize,
    pub hysteresis: Hysteresis,
    /// Segmentation begins turns early and ends them late; what is further than this from voice activity is cut off.
    pub around_speech_ms: u32,
    /// Who is only ever heard under somebody else must be heard for this long in all.
    pub least_hidden_ms: u32,
    /// Turns are cut into pieces of at most this.
    pub piece_ms: u32,
    /// An embedding of less is made better by what the same local speaker says nearby.
    pub enough_ms: u32,
    /// Where there is no segmentation.
    pub changes: Changes,
}

impl Default for Hearing {
    fn default() -> Self {
        Self {
            hop: 296,
            least_window: 32_000,
            hysteresis: Hysteresis { onset: 0.5, offset: 0.5, min_on: 4, min_off: 4 },
            around_speech_ms: 50,
            least_hidden_ms: 750,
            piece_ms: 4_000,
            enough_ms: 500,
            changes: Changes::default(),
        }
    }
}

/// Encoders want at least this many frames: fewer are repeated.
const LEAST_FRAMES: usize = 50;

/// What is listened to.
#[derive(Debug, Clone, Copy)]
pub struct Stretch<'a> {
    /// At 16 kHz, in -1..1.
    pub samples: &'a [f32],
    /// Place of the first sample in its stream.
    pub from_sample: u64,
    /// Where voice activity is, in samples of the stream, in order.
    pub speech: &'a [Range<u64>],
}

/// A piece of a turn.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Voiced {
    /// In samples of the stream, half-open.
    pub from_sample: u64,
    pub to_sample: u64,
    /// The local speaker in this stretch: pieces of one track are one person as far as segmentation can say, pieces of
    /// two tracks at one time are two people.
    pub track: u32,
    /// Somebody else speaks during most of it.
    pub overlapped: bool,
    /// Of length 1; none where there was too little to hear.
    pub embedding: Option<Vec<f32>>,
    /// How much audio of this speaker alone is in the embedding.
    pub reliable_ms: u32,
}

impl Voiced {
    pub fn duration_ms(&self) -> u32 {
        milliseconds((self.to_sample - self.from_sample) as usize)
    }
}

pub(crate) fn milliseconds(samples: usize) -> u32 {
    (samples as u64 * 1_000 / u64::from(RATE_HZ)) as u32
}

pub(crate) fn samples_of(ms: u32) -> usize {
    ms as usize * RATE_HZ as usize / 1_000
}

/// Hears stretches for one encoder.
pub struct Listener {
    extractor: Extractor,
    hearing: Hearing,
}

impl Listener {
    pub fn new(front_end: FrontEnd, hearing: Hearing) -> Self {
        Self { extractor: Extractor::new(front_end), hearing }
    }

    /// The pieces of all turns, by their beginning.
    pub fn voices(
        &mut self,
        stretch: Stretch<'_>,
        segmenter: Option<&mut dyn Segmenter>,
        embedder: &mut dyn Embedder,
    ) -> Result<Vec<Voiced>, ModelError> {
        let mut heard = Heard { features: self.extractor.features(stretch.samples), embedder };
        let speech = within(stretch);
        let turns = match segmenter {
            Some(segmenter) => self.local_turns(stretch.samples, &speech, segmenter)?,
            None => changes::turns(&speech, &self.hearing.changes, &mut heard)?
                .into_iter()
                .enumerate()
                .map(|(track, span)| Turn { track, span })
                .collect(),
        };
        let alone = alone(&turns);
        let mut pieces = Vec::new();
        for (turn, clean) in turns.iter().zip(&alone) {
            for span in cut(turn.span.clone(), samples_of(self.hearing.piece_ms)) {
                let own = clip(clean, &span);
                let mut used = own.clone();
                let lacking = samples_of(self.hearing.enough_ms).saturating_sub(length(&own));
                if lacking > 0 {
                    let others = turns.iter().zip(&alone).filter(|(other, _)| other.track == turn.track);
                    used.extend(nearby(others.flat_map(|(_, clean)| clean), &span, lacking));
                    used.sort_by_key(|r| r.start);
                }
                let reliable_ms = milliseconds(length(&used));
                if frames_of(&used).iter().map(Range::len).sum::<usize>() < LEAST_FRAMES {
                    // Better the voice among others than none.
                    used = vec![span.clone()];
                }
                pieces.push(Voiced {
                    from_sample: stretch.from_sample + span.start as u64,
                    to_sample: stretch.from_sample + span.end as u64,
                    track: turn.track as u32,
                    overlapped: 2 * length(&own) < span.len(),
                    embedding: heard.embedding(&used)?,
                    reliable_ms,
                });
            }
        }
        pieces.sort_by_key(|piece| (piece.from_sample, piece.track));
        Ok(pieces)
    }

    fn local_turns(
        &self,
        samples: &[f32],
        speech: &[Range<usize>],
        segmenter: &mut dyn Segmenter,
    ) -> Result<Vec<Turn>, ModelError> {
        let mut stitcher = Stitcher::default();
        for window in windows(samples.len(), self.hearing.hop) {
            let first = window.start / powerset::STEP;
            let expected = powerset::frames(window.len().max(self.hearing.least_window));
            let logits = if window.len() < self.hearing.least_window {
                let mut filled = samples[window.clone()].to_vec();
                filled.resize(self.hearing.least_window, 0.0);
                segmenter.logits(&filled)?
            } else {
                segmenter.logits(&samples[window.clone()])?
            };
            if logits.len() != expected {
                return Err(ModelError::Segmentation(format!("{} frames instead of {expected}", logits.len())));
            }
            let within = powerset::frames(window.len()).max(1);
            stitcher.add(first, logits.iter().take(within).map(powerset::activity).collect());
        }
        Ok(local_turns(&stitcher.finish(), samples.len(), speech, &self.hearing))
    }
}

/// A turn of one local speaker, in samples of the stretch.
#[derive(Debug, Clone, PartialEq)]
struct Turn {
    track: usize,
    span: Range<usize>,
}

/// Turns of all tracks, where there is voice activity.
fn local_turns(tracks: &[Track], samples: usize, speech: &[Range<usize>], hearing: &Hearing) -> Vec<Turn> {
    let last = tracks.iter().map(|t| t.first + t.activity.len()).max().unwrap_or(0);
    let sample = |frame: usize| if frame >= last { samples } else { powerset::boundary(frame).min(samples) };
    let speech = widened(speech, samples_of(hearing.around_speech_ms), samples);
    let mut turns = Vec::new();
    for (track, found) in tracks.iter().enumerate() {
        for frames in hearing.hysteresis.turns(&found.activity) {
            let span = sample(found.first + frames.start)..sample(found.first + frames.end);
            turns.extend(clip(&speech, &span).into_iter().map(|span| Turn { track, span }));
        }
    }
    let heard_alone = alone(&turns);
    let of_track = |ranges: &[Vec<Range<usize>>], track: usize| -> usize {
        turns.iter().zip(ranges).filter(|(turn, _)| turn.track == track).map(|(_, own)| length(own)).sum()
    };
    let whole: Vec<Vec<Range<usize>>> = turns.iter().map(|turn| vec![turn.span.clone()]).collect();
    let hidden = |track: usize| {
        of_track(&heard_alone, track) == 0 && of_track(&whole, track) < samples_of(hearing.least_hidden_ms)
    };
    turns.iter().filter(|turn| !hidden(turn.track)).cloned().collect()
}

/// Ranges made longer at both ends; those that touch become one.
fn widened(ranges: &[Range<usize>], by: usize, samples: usize) -> Vec<Range<usize>> {
    let mut wide: Vec<Range<usize>> = Vec::new();
    for range in ranges {
        let next = range.start.saturating_sub(by)..(range.end + by).min(samples);
        match wide.last_mut() {
            Some(last) if last.end >= next.start => last.end = last.end.max(next.end),
            _ => wide.push(next),
        }
    }
    wide
}

/// Voice activity in samples of the stretch.
fn within(stretch: Stretch<'_>) -> Vec<Range<usize>> {
    let place = |sample: u64| sample.saturating_sub(stretch.from_sample).min(stretch.samples.len() as u64) as usize;
    stretch.speech.iter().map(|r| place(r.start)..place(r.end)).filter(|r| !r.is_empty()).collect()
}

/// For each turn what of it is spoken alone.
fn alone(turns: &[Turn]) -> Vec<Vec<Range<usize>>> {
    turns
        .iter()
        .map(|turn| {
            let mut left = vec![turn.span.clone()];
            for other in turns.iter().filter(|other| other.track != turn.track) {
                left = left
                    .into_iter()
                    .flat_map(|r| [r.start..other.span.start.min(r.end), other.span.end.max(r.start)..r.end])
                    .filter(|r| !r.is_empty())
                    .collect();
            }
            left
        })
        .collect()
}

/// Equal pieces of at most so many samples.
fn cut(span: Range<usize>, most: usize) -> impl Iterator<Item = Range<usize>> {
    let pieces = span.len().div_ceil(most.max(1)).max(1);
    let at = move |piece: usize| span.start + span.len() * piece / pieces;
    (0..pieces).map(move |piece| at(piece)..at(piece + 1))
}

fn clip(ranges: &[Range<usize>], to: &Range<usize>) -> Vec<Range<usize>> {
    ranges.iter().map(|r| r.start.max(to.start)..r.end.min(to.end)).filter(|r| !r.is_empty()).collect()
}

fn length(ranges: &[Range<usize>]) -> usize {
    ranges.iter().map(Range::len).sum()
}

/// At most `lacking` samples of the ranges, the nearest to `span` first, none from within.
fn nearby<'a>(
    ranges: impl Iterator<Item = &'a Range<usize>>,
    span: &Range<usize>,
    lacking: usize,
) -> Vec<Range<usize>> {
    let mut outside: Vec<Range<usize>> = ranges
        .flat_map(|r| [r.start..r.end.min(span.start), r.start.max(span.end)..r.end])
        .filter(|r| !r.is_empty())
        .collect();
    let before = |r: &Range<usize>| r.end <= span.start;
    outside.sort_by_key(|r| if before(r) { span.start - r.end } else { r.start - span.end });
    let mut left = lacking;
    let mut chosen = Vec::new();
    for range in outside {
        let take = range.len().min(left);
        if take == 0 {
            break;
        }
        chosen.push(if before(&range) { range.end - take..range.end } else { range.start..range.start + take });
        left -= take;
    }
    chosen
}

/// The frames of features that lie wholly in the ranges.
fn frames_of(ranges: &[Range<usize>]) -> Vec<Range<usize>> {
    ranges
        .iter()
        .map(|r| r.start.div_ceil(SHIFT)..(r.end + SHIFT).saturating_sub(FRAME) / SHIFT)
        .filter(|r| !r.is_empty())
        .collect()
}

/// A stretch's features and the encoder.
pub(crate) struct Heard<'a> {
    features: Features,
    embedder: &'a mut dyn Embedder,
}

impl Heard<'_> {
    /// The voice in these samples, as a vector of length 1; none where not one frame of features is in them.
    pub(crate) fn embedding(&mut self, ranges: &[Range<usize>]) -> Result<Option<Vec<f32>>, ModelError> {
        let mut chosen = self.features.select(&frames_of(ranges));
        if chosen.frames() == 0 {
            return Ok(None);
        }
        chosen = chosen.tiled(LEAST_FRAMES);
        self.embedder.front_end().normalise(&mut chosen);
        let mut embedding = self.embedder.embed(&chosen)?;
        if embedding.len() != self.embedder.dims() {
            let (found, expected) = (embedding.len(), self.embedder.dims());
            return Err(ModelError::Encoder(format!("{found} numbers instead of {expected}")));
        }
        let length = embedding.iter().map(|x| x * x).sum::<f32>().sqrt();
        if !length.is_finite() || length <= 0.0 {
            return Ok(None);
        }
        embedding.iter_mut().for_each(|x| *x /= length);
        Ok(Some(embedding))
    }
}

#[cfg(test)]
#[expect(clippy::single_range_in_vec_init, reason = "lists of ranges are what is heard")]
#[path = "hear_tests.rs"]
mod tests;
