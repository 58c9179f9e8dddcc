//! The chain: finals, and what goes with them. A final is also the checkpoint of its session.
//!
//! Positions are samples at 16 kHz since the session began, half-open ranges; times in segments and words are
//! milliseconds on the same clock. Stream sequences are those of `ASR_AUDIO` unless a field says otherwise.

use serde::{Deserialize, Serialize};

use crate::{
    audio::AudioFormat,
    failure::Failure,
    id::{GpuId, Kind, StreamId},
    job::JobProgress,
    nought,
    source::SourceState,
};

/// Largest final on the wire, in bytes; a longer one leaves out `words` and says so.
pub const MAX_FINAL_BYTES: usize = 256 * 1024;

/// Which voice activity detector decided the boundaries. A session keeps one kind for life.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VadKind {
    #[default]
    Silero,
    /// Our own, by energy: where the Silero file cannot be had.
    Energy,
    #[serde(other)]
    Unknown,
}

impl VadKind {
    pub fn as_str(self) -> &'static str {
        match self {
            VadKind::Silero => "silero",
            VadKind::Energy => "energy",
            VadKind::Unknown => "unknown",
        }
    }
}

/// How word times were found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WordTiming {
    /// Dynamic time warping over cross attention.
    Dtw,
    /// whisper.cpp's estimate from timestamp probabilities and energy.
    TokenEstimate,
    /// The simulated engine knows them exactly.
    Exact,
    #[serde(other)]
    Unknown,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Word {
    pub text: String,
    pub start_ms: u64,
    pub end_ms: u64,
    /// 0 to 1: mean probability of its tokens.
    pub confidence: f32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub speaker: Option<String>,
    /// Who spoke over it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub overlapped_by: Option<String>,
}

/// How the speakers of a final were told apart.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SpeakersBy {
    /// A segmentation network and voices.
    Segmentation,
    /// Voice activity, voices, and where they change: no overlap is seen.
    Changes,
    /// Each channel is somebody.
    Channels,
    /// Not at all, though it was asked for.
    #[default]
    None,
    #[serde(other)]
    Unknown,
}

/// What a final says about its speakers, where they were asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Speakers {
    pub by: SpeakersBy,
    /// Labels shown in this chain so far: the next new one is `S` and this plus one.
    #[serde(default, skip_serializing_if = "nought")]
    pub labels: u32,
    /// The words did not wait for them; a revision follows.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub late: bool,
    /// The voices of earlier finals are not known here: whoever had a label before has a new one from here on.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub afresh: bool,
    /// Why not better.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
}

/// Somebody spoke, words or not. Turns of two people may overlap.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Turn {
    pub start_ms: u64,
    pub end_ms: u64,
    pub speaker: String,
    /// Number of the voice in this chain: one person may have several until it is known that they are one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub voice: Option<u32>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Segment {
    /// Counts within its final, from 0.
    pub id: u32,
    pub start_ms: u64,
    pub end_ms: u64,
    pub text: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub speaker: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub channel: Option<u16>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub language: Option<String>,
    /// 0 to 1: mean probability of its tokens.
    pub confidence: f32,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub words: Vec<Word>,
}

/// Log entries a final covers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct AudioRange {
    /// The chunk that holds its first sample.
    pub from_seq: u64,
    /// The chunk that holds its last sample, or the flush or end that caused it.
    pub to_seq: u64,
}

/// Where and how to go on after a final: everything a new owner needs besides the log and the checkpoint.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Resume {
    /// The chunk that holds sample `to_sample - 8000` (or the first chunk).
    pub seq: u64,
    /// Sample at which that chunk starts.
    pub at_sample: u64,
    /// Input frame at which it starts, counted since the format began.
    pub at_frame: u64,
    /// The format of that chunk's audio.
    pub format: AudioFormat,
    /// Sample at which that format began.
    pub format_sample: u64,
    /// The producers' state before that chunk: `sources`, `asr_seq`, `asr_seen`.
    #[serde(flatten)]
    pub producers: SourceState,
    /// The locked language.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub language: Option<String>,
}

/// Log entries that were gone before anyone could transcribe them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lost {
    pub from_seq: u64,
    pub to_seq: u64,
}

/// Where the time of a final went, in ms.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Timings {
    /// Window ready -> decode begins.
    pub queued_ms: u64,
    pub decode_ms: u64,
    /// Audio decoded, in ms.
    pub audio_ms: u64,
    /// Listening to who speaks, beside the decode.
    #[serde(skip_serializing_if = "nought")]
    pub diarize_ms: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub word_timing: Option<WordTiming>,
}

/// A final: one link of the chain on `asr.v1.transcript.<kind>.<id>.final`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Final {
    pub kind: Kind,
    pub id: StreamId,
    /// Counts from 0 along the chain.
    pub index: u64,
    /// Random for this computation; also the `Nats-Msg-Id`.
    pub final_id: String,
    pub epoch: u64,
    pub gpu_id: GpuId,
    /// The model that really produced the text.
    pub model: String,
    /// The device it really ran on: `cuda:<name>` or `cpu`.
    pub device: String,
    /// `whisper_cpp`, `ct2` or `simulated`; `none` where nothing was heard.
    pub engine: String,
    pub vad: VadKind,
    pub from_sample: u64,
    pub to_sample: u64,
    pub audio: AudioRange,
    pub resume: Resume,
    /// Sequence in `ASR_CHECKPOINT`, when the session has state beyond this final.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkpoint_seq: Option<u64>,
    /// The checkpoint named by the predecessor could not be found; the text may differ.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub checkpoint_missing: bool,
    pub segments: Vec<Segment>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub turns: Vec<Turn>,
    /// None where speakers were not asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub speakers: Option<Speakers>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub words_omitted: bool,
    /// Speech ended here by itself: an endpoint, a flush or an end, not a full window.
    pub speech_final: bool,
    /// The session's audio ends here.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub end: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lost: Option<Lost>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<Failure>,
    /// A job's end final names its aggregate: `object://asr_media/<key>`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result: Option<String>,
    /// Why text was held back (`no_speech`, `repetition`, `compression`, `log_probability`), if it was.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub guards: Vec<String>,
    pub timings: Timings,
}

impl Final {
    /// The segments' text, joined by single spaces.
    pub fn text(&self) -> String {
        join_text(self.segments.iter().map(|s| s.text.as_str()))
    }

    /// Drops words if the final would be too long for the wire.
    pub fn fit(&mut self, encoded_len: usize) {
        if encoded_len > MAX_FINAL_BYTES {
            self.segments.iter_mut().for_each(|s| s.words.clear());
            self.words_omitted = true;
        }
    }
}

/// Joins pieces of text by single spaces, leaving out empty ones.
pub fn join_text<'a>(pieces: impl Iterator<Item = &'a str>) -> String {
    let mut text = String::new();
    for piece in pieces.map(str::trim).filter(|p| !p.is_empty()) {
        if !text.is_empty() {
            text.push(' ');
        }
        text.push_str(piece);
    }
    text
}

/// The current hypothesis. Readers drop one of a lower epoch or index than they have seen.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Partial {
    pub kind: Kind,
    pub id: StreamId,
    pub epoch: u64,
    pub gpu_id: GpuId,
    /// Index of the last final before it; none while there is no final yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after_index: Option<u64>,
    pub from_sample: u64,
    pub to_sample: u64,
    /// Two passes agree on it; stable within one epoch until the final.
    pub committed: String,
    pub tentative: String,
    /// Logged minus decoded audio.
    pub lag_ms: u64,
    /// Of a job: how far it is. Its `committed` is the text of its last final.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progress: Option<JobProgress>,
}

/// Replaces the segments, turns and speakers of a final.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Revision {
    pub kind: Kind,
    pub id: StreamId,
    pub index: u64,
    pub revision: u64,
    pub epoch: u64,
    pub segments: Vec<Segment>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub turns: Vec<Turn>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub speakers: Option<Speakers>,
    /// It would have been too long with them.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub words_omitted: bool,
}

impl Revision {
    /// What answers for a final whose speakers nobody will know: its segments as they stand, and why.
    pub fn nobody(stands: &Final, epoch: u64, why: String) -> Self {
        let labels = stands.speakers.as_ref().map_or(0, |speakers| speakers.labels);
        let speakers = Speakers { by: SpeakersBy::None, labels, late: false, afresh: false, why: Some(why) };
        Self {
            kind: stands.kind,
            id: stands.id.clone(),
            index: stands.index,
            revision: 0,
            epoch,
            segments: stands.segments.clone(),
            turns: Vec::new(),
            speakers: Some(speakers),
            words_omitted: stands.words_omitted,
        }
    }

    /// Drops words if it would be too long for the wire.
    pub fn fit(&mut self, encoded_len: usize) {
        if encoded_len > MAX_FINAL_BYTES {
            self.segments.iter_mut().for_each(|segment| segment.words.clear());
            self.words_omitted = true;
        }
    }
}

/// What a session knows beyond its last final. MessagePack; viewers cannot read it.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Checkpoint {
    /// Index of the final it belongs to.
    pub index: u64,
    /// Tail of the text so far, when `carry_prompt` is on.
    pub prompt_tail: String,
    /// A guard struck in the last final: the prompt is not carried over it.
    pub guard_hit: bool,
    /// The voices heard so far, as the diarizer keeps them; none without diarization.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub voices: Option<bytes::Bytes>,
    /// Finals up to this one whose speakers are still being listened to, in order: `voices` knows nothing of them. Whoever
    /// takes over hears them again.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub late: Vec<u64>,
    /// What was found out with this final about earlier ones. Their revisions come behind it, from whoever has the session.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub told: Vec<ToldLate>,
}

/// The speakers of a final that was late: with the segments that stand in it, this is its revision.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ToldLate {
    /// Of the final.
    pub index: u64,
    pub turns: Vec<Turn>,
    pub speakers: Option<Speakers>,
}
