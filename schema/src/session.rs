//! Live sessions: options, API requests and answers, and the record kept in the `asr_sessions` bucket.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{
    audio::MAX_CHANNELS,
    device::Instead,
    failure::{Failure, FailureClass},
    id::{Kind, StreamId, WorkerName},
    nought,
    trace::TraceContext,
};

/// Which models and devices may stand in for the ones asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Policy {
    ExactModel,
    AllowSmaller,
    /// Includes smaller models.
    #[default]
    AllowCpu,
    ForceCpu,
    /// A stored value of a newer version; no request may ask for it. The others like it below.
    #[serde(other)]
    Unknown,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Task {
    #[default]
    Transcribe,
    /// Into English; the model must be multilingual.
    Translate,
    #[serde(other)]
    Unknown,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Priority {
    High,
    #[default]
    Normal,
    Low,
    #[serde(other)]
    Unknown,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Channels {
    #[default]
    Mix,
    /// Each channel transcribed by itself.
    Split,
    #[serde(other)]
    Unknown,
}

/// Whether a session asks for who spoke. `true`, `false` or `"auto"` in JSON.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Diarize {
    #[default]
    Off,
    /// Wherever it goes, it is diarized.
    On,
    /// Diarized while there is memory for it; then by channel, or not at all, and each final says which.
    Auto,
    Unknown,
}

impl Serialize for Diarize {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Diarize::Off => serializer.serialize_bool(false),
            Diarize::On => serializer.serialize_bool(true),
            Diarize::Auto => serializer.serialize_str("auto"),
            Diarize::Unknown => serializer.serialize_str("unknown"),
        }
    }
}

impl<'de> Deserialize<'de> for Diarize {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Said {
            Bool(bool),
            Word(String),
        }
        Ok(match Said::deserialize(deserializer) {
            Ok(Said::Bool(false)) => Diarize::Off,
            Ok(Said::Bool(true)) => Diarize::On,
            Ok(Said::Word(word)) => match word.as_str() {
                "auto" => Diarize::Auto,
                "on" => Diarize::On,
                "off" => Diarize::Off,
                _ => Diarize::Unknown,
            },
            Err(_) => return Err(serde::de::Error::custom(format_args!("diarize is {DIARIZES}"))),
        })
    }
}

/// What a session asks for. Requests are strict (an unknown option or value is an error to its sender); stored records
/// are read with [`SessionOptions`]' defaults for what an older writer did not know.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SessionOptions {
    /// Catalog name or file stem; none = the fleet's default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// ISO 639-1 code; none = detected on the first speech and locked by a final.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub language: Option<String>,
    pub task: Task,
    /// Text the model is told came before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt: Option<String>,
    /// Feed the tail of each final's text to the next window.
    pub carry_prompt: bool,
    /// Words to expect; they go in front of the prompt.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub hotwords: Vec<String>,
    pub diarize: Diarize,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_speakers: Option<u16>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_speakers: Option<u16>,
    pub channels: Channels,
    /// Who is on each channel, from the first on; those without a name are `ch0`, `ch1`, ... Needs `channels=split`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub channel_names: Vec<String>,
    /// Publish partials.
    pub interim: bool,
    /// Silence that ends an utterance, in ms. 100 to 5000; 500 keeps sentences whole and adds half a second to a final.
    pub endpoint_ms: u32,
    pub policy: Policy,
    pub priority: Priority,
    /// Silence on the wire after which the session is ended, in s. At most 1800, half of the audio's retention.
    pub idle_timeout_s: u32,
}

/// Logs print requests: what somebody wrote, words and names, is told by its amount.
impl fmt::Debug for SessionOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            model,
            language,
            task,
            prompt,
            carry_prompt,
            hotwords,
            diarize,
            min_speakers,
            max_speakers,
            channels,
            channel_names,
            interim,
            endpoint_ms,
            policy,
            priority,
            idle_timeout_s,
        } = self;
        f.debug_struct("SessionOptions")
            .field("model", model)
            .field("language", language)
            .field("task", task)
            .field("prompt_chars", &prompt.as_ref().map(|prompt| prompt.chars().count()))
            .field("carry_prompt", carry_prompt)
            .field("hotwords", &hotwords.len())
            .field("diarize", diarize)
            .field("min_speakers", min_speakers)
            .field("max_speakers", max_speakers)
            .field("channels", channels)
            .field("channel_names", &channel_names.len())
            .field("interim", interim)
            .field("endpoint_ms", endpoint_ms)
            .field("policy", policy)
            .field("priority", priority)
            .field("idle_timeout_s", idle_timeout_s)
            .finish()
    }
}

impl Default for SessionOptions {
    fn default() -> Self {
        Self {
            model: None,
            language: None,
            task: Task::Transcribe,
            prompt: None,
            carry_prompt: false,
            hotwords: Vec::new(),
            diarize: Diarize::Off,
            min_speakers: None,
            max_speakers: None,
            channels: Channels::Mix,
            channel_names: Vec::new(),
            interim: true,
            endpoint_ms: 500,
            policy: Policy::AllowCpu,
            priority: Priority::Normal,
            idle_timeout_s: 60,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OptionError {
    #[error("unknown option {0:?}")]
    UnknownName(String),
    #[error("{name}: {value:?} is not {expected}")]
    BadValue { name: &'static str, value: String, expected: &'static str },
    #[error("{0}")]
    Contradiction(&'static str),
    #[error("{0} is not available in this version")]
    NotAvailable(&'static str),
}

/// Longest prompt, in bytes: Whisper looks at its last 224 tokens only.
pub const MAX_PROMPT_BYTES: usize = 4_096;
pub const MAX_HOTWORDS: usize = 100;
/// Longest name of a channel, in bytes: it stands beside every word.
pub const MAX_CHANNEL_NAME_BYTES: usize = 32;
const MAX_WORD_BYTES: usize = 64;
const DIARIZES: &str = "true, false or auto";
const TASKS: &str = "transcribe or translate";
const CHANNELS: &str = "mix or split";
const POLICIES: &str = "exact_model, allow_smaller, allow_cpu or force_cpu";
const PRIORITIES: &str = "high, normal or low";

impl SessionOptions {
    /// Names of all options, as in JSON and (with `Asr-Opt-` and dashes) in headers.
    pub const NAMES: [&'static str; 16] = [
        "model",
        "language",
        "task",
        "prompt",
        "carry_prompt",
        "hotwords",
        "diarize",
        "min_speakers",
        "max_speakers",
        "channels",
        "channel_names",
        "interim",
        "endpoint_ms",
        "policy",
        "priority",
        "idle_timeout_s",
    ];

    /// Sets one option from text, as a header carries it. Hotwords and names of channels are separated by commas.
    pub fn set(&mut self, name: &str, value: &str) -> Result<(), OptionError> {
        let Some(name) = Self::NAMES.iter().find(|n| **n == name) else {
            return Err(OptionError::UnknownName(short(name)));
        };
        let name: &'static str = name;
        match name {
            "model" => self.model = Some(value.to_owned()),
            "language" => self.language = (value != "auto").then(|| value.to_owned()),
            "task" => self.task = word(name, value, Task::Unknown, TASKS)?,
            "prompt" => self.prompt = Some(value.to_owned()),
            "carry_prompt" => self.carry_prompt = boolean(name, value)?,
            "hotwords" => {
                self.hotwords = value.split(',').map(|w| w.trim().to_owned()).filter(|w| !w.is_empty()).collect();
            }
            "diarize" => self.diarize = diarize(name, value)?,
            "min_speakers" => self.min_speakers = Some(number(name, value)?),
            "max_speakers" => self.max_speakers = Some(number(name, value)?),
            "channels" => self.channels = word(name, value, Channels::Unknown, CHANNELS)?,
            "channel_names" => self.channel_names = value.split(',').map(|n| n.trim().to_owned()).collect(),
            "interim" => self.interim = boolean(name, value)?,
            "endpoint_ms" => self.endpoint_ms = number(name, value)?,
            "policy" => self.policy = word(name, value, Policy::Unknown, POLICIES)?,
            "priority" => self.priority = word(name, value, Priority::Unknown, PRIORITIES)?,
            "idle_timeout_s" => self.idle_timeout_s = number(name, value)?,
            _ => return Err(OptionError::UnknownName(short(name))),
        }
        Ok(())
    }

    /// Checks ranges and contradictions.
    pub fn validate(&self) -> Result<(), OptionError> {
        let bad = |name, value: &dyn std::fmt::Display, expected| {
            Err(OptionError::BadValue { name, value: short(&value.to_string()), expected })
        };
        if let Some(model) = &self.model
            && !is_model_name(model)
        {
            return bad("model", model, "the name of a model");
        }
        if let Some(language) = &self.language
            && !((2..=3).contains(&language.len()) && language.bytes().all(|b| b.is_ascii_lowercase()))
        {
            return bad("language", language, "a language code such as en");
        }
        if self.prompt.as_ref().is_some_and(|p| p.len() > MAX_PROMPT_BYTES || p.contains('\0')) {
            return bad("prompt", &"...", "at most 4096 bytes of text");
        }
        if self.hotwords.len() > MAX_HOTWORDS
            || self.hotwords.iter().any(|w| w.is_empty() || w.len() > MAX_WORD_BYTES || w.contains('\0'))
        {
            return bad("hotwords", &self.hotwords.len(), "at most 100 words of 1 to 64 bytes");
        }
        if let Some((name, expected)) = self.unknown_word() {
            return bad(name, &"unknown", expected);
        }
        if !(100..=5_000).contains(&self.endpoint_ms) {
            return bad("endpoint_ms", &self.endpoint_ms, "100 to 5000");
        }
        if !(1..=1_800).contains(&self.idle_timeout_s) {
            return bad("idle_timeout_s", &self.idle_timeout_s, "1 to 1800");
        }
        if self.diarize == Diarize::Off && (self.min_speakers.is_some() || self.max_speakers.is_some()) {
            return Err(OptionError::Contradiction("min_speakers and max_speakers need diarize"));
        }
        if self.min_speakers == Some(0) || self.max_speakers == Some(0) {
            return Err(OptionError::Contradiction("a session has at least one speaker"));
        }
        if let (Some(min), Some(max)) = (self.min_speakers, self.max_speakers)
            && min > max
        {
            return Err(OptionError::Contradiction("min_speakers is above max_speakers"));
        }
        if !self.channel_names.is_empty() && self.channels != Channels::Split {
            return Err(OptionError::Contradiction("channel_names need channels=split"));
        }
        if self.channel_names.len() > usize::from(MAX_CHANNELS) {
            return bad("channel_names", &self.channel_names.len(), "at most 64 names");
        }
        for (channel, name) in self.channel_names.iter().enumerate() {
            if !is_channel_name(channel, name) {
                return bad(
                    "channel_names",
                    name,
                    "1 to 32 bytes without white space or commas, ch0 for channel 0 only",
                );
            }
            if self.channel_names[..channel].contains(name) {
                return bad("channel_names", name, "the name of one channel");
            }
        }
        if self.diarize == Diarize::On && self.channels == Channels::Split {
            return Err(OptionError::Contradiction("channels=split names who speaks already, diarize contradicts it"));
        }
        Ok(())
    }
}

impl SessionOptions {
    /// Who speaks on a channel, counted from 0; nobody is named where channels are mixed.
    pub fn speaker_of(&self, channel: usize) -> Option<String> {
        let name = || self.channel_names.get(channel).cloned().unwrap_or_else(|| format!("ch{channel}"));
        (self.channels == Channels::Split).then(name)
    }

    /// The first option whose word this version does not know, and what it may be.
    fn unknown_word(&self) -> Option<(&'static str, &'static str)> {
        [
            ("task", self.task == Task::Unknown, TASKS),
            ("diarize", self.diarize == Diarize::Unknown, DIARIZES),
            ("channels", self.channels == Channels::Unknown, CHANNELS),
            ("policy", self.policy == Policy::Unknown, POLICIES),
            ("priority", self.priority == Priority::Unknown, PRIORITIES),
        ]
        .into_iter()
        .find_map(|(name, unknown, expected)| unknown.then_some((name, expected)))
    }
}

/// A label that can stand in a header and in front of a line, and is not what another channel is called by itself.
fn is_channel_name(channel: usize, name: &str) -> bool {
    let fits = (1..=MAX_CHANNEL_NAME_BYTES).contains(&name.len());
    let of_another = name.strip_prefix("ch").and_then(|n| n.parse::<usize>().ok()).is_some_and(|n| n != channel);
    fits && !of_another && !name.contains(|c: char| c == ',' || c.is_whitespace() || c.is_control())
}

fn short(text: &str) -> String {
    text.chars().take(64).collect()
}

fn number<T: std::str::FromStr>(name: &'static str, value: &str) -> Result<T, OptionError> {
    value.parse().map_err(|_| OptionError::BadValue { name, value: short(value), expected: "a whole number" })
}

fn boolean(name: &'static str, value: &str) -> Result<bool, OptionError> {
    match value {
        "1" | "true" | "on" => Ok(true),
        "0" | "false" | "off" => Ok(false),
        _ => Err(OptionError::BadValue { name, value: short(value), expected: "true or false" }),
    }
}

fn diarize(name: &'static str, value: &str) -> Result<Diarize, OptionError> {
    match value {
        "auto" => Ok(Diarize::Auto),
        _ => match boolean(name, value) {
            Ok(on) => Ok(if on { Diarize::On } else { Diarize::Off }),
            Err(_) => Err(OptionError::BadValue { name, value: short(value), expected: DIARIZES }),
        },
    }
}

fn word<T: serde::de::DeserializeOwned + PartialEq>(
    name: &'static str,
    value: &str,
    unknown: T,
    expected: &'static str,
) -> Result<T, OptionError> {
    match serde_json::from_value(serde_json::Value::String(value.to_owned())) {
        Ok(known) if known != unknown => Ok(known),
        Ok(_) | Err(_) => Err(OptionError::BadValue { name, value: short(value), expected }),
    }
}

/// `session.open`. Idempotent by id.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct OpenRequest {
    pub session: StreamId,
    #[serde(default, deserialize_with = "strict_options")]
    pub options: SessionOptions,
}

/// In a request an unknown option or value is the sender's mistake and he is told, unlike in records of a newer version.
pub(crate) fn strict_options<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<SessionOptions, D::Error> {
    let value = serde_json::Value::deserialize(deserializer)?;
    if let serde_json::Value::Object(map) = &value
        && let Some(name) = map.keys().find(|k| !SessionOptions::NAMES.contains(&k.as_str()))
    {
        return Err(serde::de::Error::custom(OptionError::UnknownName(short(name))));
    }
    let options = SessionOptions::deserialize(&value).map_err(serde::de::Error::custom)?;
    if let Some((name, expected)) = options.unknown_word() {
        let value = short(value[name].as_str().unwrap_or_default());
        return Err(serde::de::Error::custom(OptionError::BadValue { name, value, expected }));
    }
    Ok(options)
}

/// `session.status` and `session.close` name a session only.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionRequest {
    pub session: StreamId,
}

/// Subjects a client of this session needs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionSubjects {
    pub audio: String,
    pub finals: String,
    pub partials: String,
    pub events: String,
}

/// Answer to every API request: either what was asked for or a typed failure. `{"ok":{...}}` or `{"error":{...}}`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply<T> {
    Ok(T),
    Error(Failure),
}

impl<T> Reply<T> {
    pub fn refuse(class: FailureClass, message: impl Into<String>) -> Self {
        Reply::Error(Failure::new(class, message))
    }

    pub fn into_result(self) -> Result<T, Failure> {
        match self {
            Reply::Ok(value) => Ok(value),
            Reply::Error(failure) => Err(failure),
        }
    }
}

/// Answer to `session.open`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Opened {
    pub session: StreamId,
    pub worker: WorkerName,
    pub epoch: u64,
    pub subjects: SessionSubjects,
}

/// Answer to `session.close`: where the end entry stands in the log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Closed {
    pub session: StreamId,
    pub end_seq: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SessionState {
    /// Admitted, nobody has it yet.
    Waiting,
    Assigned,
    /// Its end final stands in the chain and nothing above it has been read.
    Ended,
    #[serde(other)]
    Unknown,
}

/// Value of key `<session>` in `asr_sessions`; written by compare-and-set only.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SessionRecord {
    pub kind: Kind,
    pub id: StreamId,
    pub state: SessionState,
    pub options: SessionOptions,
    /// Grows with each assignment, never below the epoch of the last final.
    pub epoch: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub worker: Option<WorkerName>,
    /// Opened by request, or by audio alone.
    #[serde(default)]
    pub implicit: bool,
    /// Unix time in ms.
    pub opened_ms: u64,
    /// Unix time in ms of the last change of this record.
    pub changed_ms: u64,
    /// `audio.to_seq` of the end final, once ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended_seq: Option<u64>,
    /// It crashed an engine: whoever takes it decodes it alone until it has passed.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub suspect: bool,
    /// How often it did so while alone, on its present window.
    #[serde(default, skip_serializing_if = "nought")]
    pub crashes: u32,
    /// First sample of that window.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub suspect_from: Option<u64>,
    /// Whom it was taken from, until somebody else has it: a dispatcher that takes over still tells `moved`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub displaced_from: Option<WorkerName>,
    /// What its worker was given to run in place of what was asked for; told once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instead: Option<Instead>,
    /// The engine that its finals have named last, under a policy by which it keeps that: its last final may name none. To write
    /// that down is no change that `changed_ms` tells.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub engine: Option<String>,
    /// The trace it is part of.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "crate::trace::lenient")]
    pub traceparent: Option<TraceContext>,
}

/// Answer to `session.status`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SessionStatus {
    pub record: SessionRecord,
    /// Index of the last final known to the dispatcher.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_final: Option<u64>,
    /// Sequence of the last log entry known to the dispatcher.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_audio_seq: Option<u64>,
    /// Why it waits, per GPU or as a whole.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub why: Vec<String>,
    /// Each GPU with its score or why it was refused, were it placed now; as in the `assigned` event.
    #[serde(default, skip_serializing_if = "serde_json::Value::is_null")]
    pub candidates: serde_json::Value,
}

/// `session.list`: sessions that are open, in order of their ids.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SessionListRequest {
    /// Only those in this state; ended ones are in no list.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub state: Option<SessionState>,
    /// Only ids above this one: where the list before this ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub after: Option<StreamId>,
    /// 100 unless told, at most 5,000.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limit: Option<u32>,
}

/// One line of `session.list`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SessionSummary {
    pub session: StreamId,
    pub state: SessionState,
    pub epoch: u64,
    /// Who has it; none while it waits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub worker: Option<WorkerName>,
    /// The model it runs on; none where the worker's own default is meant.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub language: Option<String>,
    /// Unix time in ms.
    pub opened_ms: u64,
    /// Index of the last final.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_final: Option<u64>,
    /// Logged minus decoded as its worker told last, in ms.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lag_ms: Option<u64>,
    /// Why it waits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<Failure>,
}

/// Answer to `session.list`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SessionList {
    pub sessions: Vec<SessionSummary>,
    /// How many there are in all in that state, beyond `limit` too.
    pub total: u64,
}

/// The stem of a file's name, and fit to be shown.
pub fn is_model_name(name: &str) -> bool {
    const MAX_BYTES: usize = 128;
    let fits = !name.is_empty() && name.len() <= MAX_BYTES && !name.starts_with('.');
    fits && !name.contains(|c: char| matches!(c, '/' | '\\') || c.is_control())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_models_are_stems_that_can_be_shown() {
        for name in ["small.en-q5_0", "ggml large", "modèle"] {
            assert!(is_model_name(name), "{name:?}");
        }
        for name in ["", ".hidden", "a/b", "a\\b", "a\u{1b}[31m", "a\n", "a\0", &"m".repeat(129)] {
            assert!(!is_model_name(name), "{name:?}");
        }
        let options = SessionOptions { model: Some("a\u{1b}[31m".to_owned()), ..SessionOptions::default() };
        assert!(matches!(options.validate(), Err(OptionError::BadValue { name: "model", .. })));
    }

    #[test]
    fn what_somebody_wrote_is_not_printed() {
        let options = SessionOptions {
            prompt: Some("quokka".into()),
            hotwords: vec!["wombat".into()],
            channel_names: vec!["dingo".into()],
            ..SessionOptions::default()
        };
        let printed = format!("{options:?}");
        assert!(printed.contains("prompt_chars: Some(6)") && printed.contains("hotwords: 1"), "{printed}");
        assert!(!["quokka", "wombat", "dingo"].iter().any(|word| printed.contains(word)), "{printed}");
    }

    #[test]
    fn requests_are_strict_and_records_are_not() {
        let open = |json: &str| serde_json::from_str::<OpenRequest>(json);
        assert_eq!(open(r#"{"session":"a"}"#).expect("defaults").options, SessionOptions::default());
        assert!(open(r#"{"session":"a","options":{"endpoint_mss":300}}"#).is_err());
        assert!(open(r#"{"session":"a","options":{"policy":"never"}}"#).is_err());
        assert!(open(r#"{"session":"a b"}"#).is_err());
        assert!(open(r#"{"options":{}}"#).is_err());
        let stored: SessionOptions = serde_json::from_str(r#"{"endpoint_ms":300,"from_tomorrow":1}"#).expect("record");
        assert_eq!(stored.endpoint_ms, 300);
    }

    #[test]
    fn words_of_tomorrow_are_stored_but_never_asked_for() {
        for name in ["task", "channels", "policy", "priority"] {
            for word in ["from_tomorrow", "unknown"] {
                let json = format!(r#"{{"{name}":"{word}"}}"#);
                let stored: SessionOptions = serde_json::from_str(&json).expect("a record of a newer version reads");
                let named = |error: OptionError| matches!(error, OptionError::BadValue { name: n, .. } if n == name);
                assert!(stored.validate().is_err_and(named), "{name}");
                assert!(SessionOptions::default().set(name, word).is_err_and(named), "{name} by header");
                let request = format!(r#"{{"session":"a","options":{json}}}"#);
                let error = serde_json::from_str::<OpenRequest>(&request).expect_err("strict").to_string();
                assert!(error.contains(name) && error.contains(word), "{error}");
            }
        }
        let record = r#"{"kind":"from_tomorrow","id":"a","state":"waiting","options":{"policy":"from_tomorrow"},
            "epoch":1,"opened_ms":0,"changed_ms":0}"#;
        let record: SessionRecord = serde_json::from_str(record).expect("a record of a newer version reads");
        assert_eq!((record.kind, record.options.policy), (Kind::Unknown, Policy::Unknown));
    }

    #[test]
    fn diarization_is_asked_for_in_three_ways() {
        for (json, header, meant) in
            [("true", "1", Diarize::On), ("false", "off", Diarize::Off), ("\"auto\"", "auto", Diarize::Auto)]
        {
            let request = format!(r#"{{"session":"a","options":{{"diarize":{json}}}}}"#);
            let read: OpenRequest = serde_json::from_str(&request).expect("reads");
            assert_eq!(read.options.diarize, meant);
            assert_eq!(serde_json::to_string(&meant).expect("JSON"), json);
            let mut options = SessionOptions::default();
            options.set("diarize", header).expect("a header's value");
            assert_eq!(options.diarize, meant);
        }
        for wrong in ["3", "\"perhaps\"", "null"] {
            let request = format!(r#"{{"session":"a","options":{{"diarize":{wrong}}}}}"#);
            let error = serde_json::from_str::<OpenRequest>(&request).expect_err("refused").to_string();
            assert!(error.contains("diarize") && error.contains("true, false or auto"), "{error}");
        }
    }

    #[test]
    fn every_option_can_be_set_by_header() {
        let values = [
            "micro.en",
            "en",
            "translate",
            "hello",
            "true",
            "oslo,paris",
            "false",
            "1",
            "2",
            "mix",
            "agent,customer",
            "false",
            "300",
            "exact_model",
            "high",
            "30",
        ];
        let mut options = SessionOptions::default();
        for (name, value) in SessionOptions::NAMES.iter().zip(values) {
            options.set(name, value).expect(name);
        }
        assert_eq!(options.hotwords, ["oslo", "paris"]);
        assert_eq!(options.channel_names, ["agent", "customer"]);
        assert_eq!((options.policy, options.priority), (Policy::ExactModel, Priority::High));
        let json = serde_json::to_value(&options).expect("json");
        for name in SessionOptions::NAMES {
            assert!(json.get(name).is_some(), "{name} is missing in JSON");
        }
    }

    #[test]
    fn channels_have_names_of_their_own_or_numbers() {
        let split = |names: &[&str]| SessionOptions {
            channels: Channels::Split,
            channel_names: names.iter().map(|n| (*n).to_owned()).collect(),
            ..SessionOptions::default()
        };
        for names in [&[][..], &["agent"], &["agent", "kunde-7", "日本"], &["ch0", "ch1"], &["chris"], &["x"; 1]] {
            assert_eq!(split(names).validate(), Ok(()), "{names:?}");
        }
        let long = "x".repeat(33);
        let many: Vec<String> = (0..65).map(|n| format!("s{n}")).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        for names in [
            &["agent", "agent"][..],
            &[""],
            &["the agent"],
            &["a\n"],
            &["a,b"],
            &["ch1"],
            &["a", "ch0"],
            &[&long],
            &many,
        ] {
            let refused = split(names).validate();
            assert!(
                matches!(refused, Err(OptionError::BadValue { name: "channel_names", .. })),
                "{names:?}: {refused:?}"
            );
        }
        let mixed = SessionOptions { channels: Channels::Mix, ..split(&["agent"]) };
        assert!(matches!(mixed.validate(), Err(OptionError::Contradiction(_))));
        assert_eq!(mixed.speaker_of(0), None);
        let of = |channel| split(&["agent"]).speaker_of(channel);
        assert_eq!((of(0).as_deref(), of(1).as_deref()), (Some("agent"), Some("ch1")));
    }

    #[test]
    fn contradictions_are_refused() {
        let with = |change: fn(&mut SessionOptions)| {
            let mut options = SessionOptions::default();
            change(&mut options);
            options.validate()
        };
        assert_eq!(with(|_| ()), Ok(()));
        assert!(matches!(with(|o| o.min_speakers = Some(2)), Err(OptionError::Contradiction(_))));
        assert!(matches!(
            with(|o| (o.diarize, o.min_speakers, o.max_speakers) = (Diarize::On, Some(3), Some(2))),
            Err(OptionError::Contradiction(_))
        ));
        assert_eq!(with(|o| (o.diarize, o.max_speakers) = (Diarize::Auto, Some(3))), Ok(()));
        let both = |o: &mut SessionOptions| (o.diarize, o.channels) = (Diarize::On, Channels::Split);
        assert!(matches!(with(both), Err(OptionError::Contradiction(_))));
        for change in [
            (|o: &mut SessionOptions| o.endpoint_ms = 0) as fn(&mut SessionOptions),
            |o| o.idle_timeout_s = 1_801,
            |o| o.model = Some("../../etc/passwd".into()),
            |o| o.language = Some("English".into()),
            |o| o.prompt = Some("x".repeat(10_000)),
            |o| o.hotwords = vec!["x".into(); 101],
        ] {
            assert!(matches!(with(change), Err(OptionError::BadValue { .. })));
        }
    }
}
