//! What can be wrong with a recording.

use voxfleet_schema::{
    audio::{MAX_CHANNELS, RATES_HZ},
    failure::{Failure, FailureClass},
};

/// What is taken, for sentences.
const TAKEN: &str = "wav, flac, mp3, ogg (vorbis, opus), m4a/aac and webm are";

#[derive(Debug, thiserror::Error)]
pub enum AudioError {
    #[error("the recording cannot be read")]
    Read(#[from] std::io::Error),
    #[error("the file is empty: no byte of audio arrived")]
    Empty,
    #[error("this is {what}, which cannot be transcribed; {TAKEN} taken")]
    Foreign { what: &'static str },
    #[error("the file is not a recording that can be recognised: its bytes begin no known format; {TAKEN} taken")]
    Unrecognised,
    #[error("the {container} file has {held} but no audio track")]
    NoAudioTrack { container: &'static str, held: &'static str },
    #[error("the audio in this {container} file is coded as {codec}, which cannot be decoded; {TAKEN} taken")]
    Codec { container: &'static str, codec: String },
    #[error(
        "{rate_hz} Hz with {channels} channels cannot be transcribed; allowed are {} to {} Hz and 1 to {MAX_CHANNELS} channels",
        RATES_HZ.start(), RATES_HZ.end()
    )]
    OutOfRange { rate_hz: u32, channels: usize },
    #[error(
        "the mp4/m4a file has no index (moov): it was cut off, or its recording never finished; repair or record it again"
    )]
    NoIndex,
    #[error("the head of the {container} file is damaged: {why}")]
    Head { container: &'static str, why: String },
    #[error("the file has a head but no audio in it")]
    NoAudio,
    #[error("most of the file cannot be decoded: {bad} damaged parts, {good} good ones")]
    MostlyDamaged { bad: u64, good: u64 },
    #[error("only {percent} % of the file is {container} audio: it is something else, or badly damaged")]
    MostlyForeign { container: &'static str, percent: u64 },
    #[error("the format changes more than {limit} times inside the file")]
    FormatChanges { limit: u32 },
    #[error("the recording says it is {} s long, allowed are {limit_s} s; split it", claimed_ms / 1000)]
    ClaimsTooLong { claimed_ms: u64, limit_s: u64 },
    #[error("the recording is longer than the {limit_s} s allowed; split it")]
    TooLong { limit_s: u64 },
}

impl AudioError {
    pub fn class(&self) -> FailureClass {
        use AudioError::*;
        match self {
            Read(_) => FailureClass::Internal,
            Foreign { .. } | NoAudioTrack { .. } | Codec { .. } | OutOfRange { .. } => FailureClass::UnsupportedFormat,
            ClaimsTooLong { .. } | TooLong { .. } => FailureClass::TooLarge,
            Empty
            | Unrecognised
            | NoIndex
            | Head { .. }
            | NoAudio
            | MostlyDamaged { .. }
            | MostlyForeign { .. }
            | FormatChanges { .. } => FailureClass::BadAudio,
        }
    }

    pub fn failure(&self) -> Failure {
        let message = match self {
            AudioError::Read(source) => format!("{self}: {source}"),
            _ => self.to_string(),
        };
        Failure::new(self.class(), message)
    }
}
