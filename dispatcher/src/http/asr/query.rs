//! What the URL of `/asr` asks for. Pure.

use uuid::Uuid;
use voxfleet_schema::{
    audio::{AudioFormat, FormatError},
    id::{IdError, StreamId},
    session::{OptionError, SessionOptions},
};

/// A session as it is wished for.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Wish {
    pub(crate) session: StreamId,
    pub(crate) options: SessionOptions,
    /// Of raw samples; what a recorder sends says its own.
    pub(crate) format: AudioFormat,
    /// The page is to send what its recorder makes instead of samples.
    pub(crate) recorder: bool,
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum WishError {
    #[error("{0} is given twice")]
    Twice(String),
    #[error("{name}: {value:?} is not a whole number")]
    Number { name: &'static str, value: String },
    #[error("mode: {0:?} is not served, every update is the full state (mode=full)")]
    Mode(String),
    #[error("session: {0}")]
    Session(#[from] IdError),
    #[error(transparent)]
    Format(#[from] FormatError),
    #[error(transparent)]
    Option(#[from] OptionError),
}

/// Reads the query, decoded. Unknown names are the sender's mistake, and he is told.
pub(crate) fn read(pairs: &[(String, String)]) -> Result<Wish, WishError> {
    let mut options = SessionOptions::default();
    let (mut session, mut name, mut recorder) = (None, "pcm_s16le".to_owned(), false);
    let (mut rate_hz, mut channels) = (u64::from(AudioFormat::default().rate_hz), 1u64);
    for (at, (key, value)) in pairs.iter().enumerate() {
        if pairs[..at].iter().any(|(before, _)| before == key) {
            return Err(WishError::Twice(short(key)));
        }
        match key.as_str() {
            // Read where roles are.
            "token" => {}
            "session" => session = Some(StreamId::new(value.as_str())?),
            "rate" => rate_hz = number("rate", value)?,
            "audio_channels" => channels = number("audio_channels", value)?,
            "format" if matches!(value.as_str(), "webm" | "ogg") => recorder = true,
            "format" => name.clone_from(value),
            "mode" if value == "full" => {}
            "mode" => return Err(WishError::Mode(short(value))),
            option => options.set(option, value)?,
        }
    }
    options.validate()?;
    // The name comes from a stranger, and a format has parts of its own behind it.
    let name = name.split(';').next().unwrap_or_default();
    let format = format!("{name};rate={rate_hz};channels={channels}").parse()?;
    let session = match session {
        Some(id) => id,
        None => StreamId::new(format!("web-{}", &Uuid::new_v4().simple().to_string()[..16]))?,
    };
    Ok(Wish { session, options, format, recorder })
}

fn number(name: &'static str, value: &str) -> Result<u64, WishError> {
    value.parse().map_err(|_| WishError::Number { name, value: short(value) })
}

fn short(text: &str) -> String {
    text.chars().take(64).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use voxfleet_schema::{
        audio::Encoding,
        session::{Channels, Diarize, Policy},
    };

    fn wish(query: &[(&str, &str)]) -> Result<Wish, WishError> {
        let pairs: Vec<(String, String)> = query.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect();
        read(&pairs)
    }

    #[test]
    fn without_a_query_it_is_speech_as_every_page_sends_it() {
        let wish = wish(&[]).expect("a wish");
        assert_eq!((wish.options, wish.format), (SessionOptions::default(), AudioFormat::default()));
        assert!(wish.session.as_str().starts_with("web-") && !wish.recorder);
    }

    #[test]
    fn every_option_is_taken_from_the_url() {
        let query = [
            ("session", "call-7"),
            ("token", "anything"),
            ("mode", "full"),
            ("rate", "48000"),
            ("audio_channels", "2"),
            ("format", "pcm_f32le"),
            ("language", "auto"),
            ("model", "small"),
            ("diarize", "true"),
            ("channels", "mix"),
            ("endpoint_ms", "300"),
            ("policy", "exact_model"),
        ];
        let wish = wish(&query).expect("a wish");
        assert_eq!(wish.session.as_str(), "call-7");
        assert_eq!(wish.format, AudioFormat { encoding: Encoding::PcmF32Le, rate_hz: 48_000, channels: 2 });
        let o = &wish.options;
        assert_eq!((o.language.as_deref(), o.model.as_deref(), o.diarize), (None, Some("small"), Diarize::On));
        assert_eq!((o.channels, o.endpoint_ms, o.policy), (Channels::Mix, 300, Policy::ExactModel));
        assert!(super::read(&[("format".to_owned(), "webm".to_owned())]).expect("a wish").recorder);
    }

    #[test]
    fn hostile_queries_are_refused_by_name() {
        let long = "x".repeat(5_000);
        for (query, part) in [
            (vec![("colour", "red")], "unknown option \"colour\""),
            (vec![("session", "../../etc")], "session"),
            (vec![("session", "a"), ("session", "b")], "twice"),
            (vec![("session", long.as_str())], "session"),
            (vec![("rate", "16000;channels=9")], "whole number"),
            (vec![("rate", "7")], "rate 7 Hz"),
            (vec![("rate", "99999999999999999999")], "whole number"),
            (vec![("audio_channels", "0")], "0 channels"),
            (vec![("format", "mp3")], "unsupported encoding"),
            (vec![("mode", "diff")], "mode"),
            (vec![("endpoint_ms", "1")], "endpoint_ms"),
            (vec![("prompt", long.as_str())], "prompt"),
            (vec![("channels", "split"), ("diarize", "true")], "contradicts"),
        ] {
            let told = wish(&query).expect_err(part).to_string();
            assert!(told.contains(part) && told.len() < 300, "{query:?}: {told}");
        }
        // What stands behind a format's name cannot change what was said beside it.
        let trick = wish(&[("format", "pcm_s16le;rate=8000"), ("rate", "16000")]).expect("a wish");
        assert_eq!(trick.format.rate_hz, 16_000);
    }
}
