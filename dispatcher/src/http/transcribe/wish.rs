//! What a recording's sender wants of it: from the URL, and from the fields of a form. Pure.

use uuid::Uuid;
use voxfleet_schema::{
    id::{IdError, StreamId},
    job::{JobRequest, MAX_NAME_BYTES, RequestError},
    session::{OptionError, SessionOptions},
};

/// How the answer is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Format {
    /// The aggregate as it is stored.
    #[default]
    Json,
    /// Its text alone.
    Text,
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum WishError {
    #[error("{0} is given twice")]
    Twice(String),
    #[error("{name}: {value:?} is not {expected}")]
    Value { name: &'static str, value: String, expected: &'static str },
    #[error("job stands behind the recording; put it before, or into the URL")]
    LateId,
    #[error("job: {0}")]
    Id(#[from] IdError),
    #[error(transparent)]
    Option(#[from] OptionError),
    #[error(transparent)]
    Request(#[from] RequestError),
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Wish {
    id: Option<StreamId>,
    name: Option<String>,
    options: SessionOptions,
    result_ttl_s: Option<u32>,
    pub(crate) format: Format,
    /// Answer when it has ended, not when it has been taken.
    pub(crate) wait: bool,
    pub(crate) cancel_on_disconnect: bool,
    seen: Vec<String>,
}

impl Wish {
    pub(crate) fn of_query(pairs: &[(String, String)]) -> Result<Self, WishError> {
        let mut wish = Self {
            id: None,
            name: None,
            options: SessionOptions::default(),
            result_ttl_s: None,
            format: Format::Json,
            wait: true,
            cancel_on_disconnect: false,
            seen: Vec::new(),
        };
        pairs.iter().try_for_each(|(name, value)| wish.set(name, value, false))?;
        Ok(wish)
    }

    /// One more of its settings. `begun`: the recording has been read, under its id.
    pub(crate) fn set(&mut self, name: &str, value: &str, begun: bool) -> Result<(), WishError> {
        if self.seen.iter().any(|seen| seen == name) {
            return Err(WishError::Twice(short(name)));
        }
        match name {
            "job" if begun => return Err(WishError::LateId),
            "job" => self.id = Some(StreamId::new(value)?),
            "name" => self.called(value),
            "format" => {
                self.format = match value {
                    "json" => Format::Json,
                    "text" => Format::Text,
                    _ => return Err(bad("format", value, "json or text (voxfleet export writes srt and vtt)")),
                };
            }
            "wait" => self.wait = yes_or_no("wait", value)?,
            "cancel_on_disconnect" => self.cancel_on_disconnect = yes_or_no("cancel_on_disconnect", value)?,
            "result_ttl_s" => {
                let ttl = value.parse().map_err(|_| bad("result_ttl_s", value, "a whole number"))?;
                self.result_ttl_s = Some(ttl);
            }
            option => self.options.set(option, value)?,
        }
        self.seen.push(name.to_owned());
        Ok(())
    }

    /// The file's name, for people; what cannot be shown in it is replaced.
    pub(crate) fn called(&mut self, name: &str) {
        let name: String = name.chars().map(|c| if c.is_control() { '_' } else { c }).collect();
        let mut end = name.len().min(MAX_NAME_BYTES);
        while !name.is_char_boundary(end) {
            end -= 1;
        }
        self.name = (end > 0).then(|| name[..end].to_owned());
    }

    /// Whether the sender chose the id, so that there may be such a job.
    pub(crate) fn is_named(&self) -> bool {
        self.id.is_some()
    }

    /// Under which it goes from now on.
    pub(crate) fn id(&self) -> Result<StreamId, WishError> {
        if let Some(id) = &self.id {
            return Ok(id.clone());
        }
        Ok(StreamId::new(format!("job-{}", &Uuid::new_v4().simple().to_string()[..12]))?)
    }

    /// The job, whose recording lies at `audio`.
    pub(crate) fn request(&self, id: &StreamId, audio: &str) -> Result<JobRequest, WishError> {
        let request = JobRequest {
            job: Some(id.clone()),
            audio: Some(audio.to_owned()),
            data: None,
            name: self.name.clone(),
            options: self.options.clone(),
            result_ttl_s: self.result_ttl_s,
            part: None,
        };
        request.validate()?;
        Ok(request)
    }
}

fn yes_or_no(name: &'static str, value: &str) -> Result<bool, WishError> {
    match value {
        "true" | "1" => Ok(true),
        "false" | "0" => Ok(false),
        _ => Err(bad(name, value, "true or false")),
    }
}

fn bad(name: &'static str, value: &str, expected: &'static str) -> WishError {
    WishError::Value { name, value: short(value), expected }
}

fn short(text: &str) -> String {
    text.chars().take(64).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const AUDIO: &str = "object://asr_media/audio/call-1/0f";

    fn wish(query: &[(&str, &str)]) -> Result<Wish, WishError> {
        let pairs: Vec<(String, String)> = query.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect();
        Wish::of_query(&pairs)
    }

    #[test]
    fn a_form_says_what_the_url_left_out() {
        let mut wish = wish(&[("job", "call-1"), ("language", "en"), ("wait", "false")]).expect("a wish");
        wish.set("model", "small", true).expect("an option");
        wish.called("a\u{7}b.wav");
        let id = wish.id().expect("an id");
        let request = wish.request(&id, AUDIO).expect("a request");
        assert_eq!((id.as_str(), wish.wait, wish.is_named()), ("call-1", false, true));
        assert_eq!(request.audio.as_deref(), Some(AUDIO));
        assert_eq!(
            (request.options.language.as_deref(), request.options.model.as_deref()),
            (Some("en"), Some("small"))
        );
        assert_eq!(request.name.as_deref(), Some("a_b.wav"));
        assert_eq!(wish.set("language", "de", true), Err(WishError::Twice("language".to_owned())));
    }

    #[test]
    fn names_fit_whatever_they_are() {
        let mut wish = wish(&[]).expect("a wish");
        wish.called(&"日".repeat(500));
        let id = wish.id().expect("an id");
        assert!(wish.request(&id, AUDIO).is_ok() && id.as_str().starts_with("job-"));
        wish.called("");
        assert_eq!(wish.request(&id, AUDIO).expect("a request").name, None);
    }

    #[test]
    fn mistakes_are_named() {
        for (query, part) in [
            (vec![("colour", "red")], "unknown option"),
            (vec![("format", "srt")], "json or text"),
            (vec![("wait", "maybe")], "true or false"),
            (vec![("job", "a b")], "job"),
            (vec![("result_ttl_s", "soon")], "whole number"),
            (vec![("wait", "0"), ("wait", "0")], "twice"),
        ] {
            let told = wish(&query).expect_err(part).to_string();
            assert!(told.contains(part), "{query:?}: {told}");
        }
        let mut late = wish(&[]).expect("a wish");
        assert_eq!(late.set("job", "x", true), Err(WishError::LateId));
        let short = wish(&[("result_ttl_s", "1")]).expect("a wish");
        let id = StreamId::new("j").expect("an id");
        assert!(
            matches!(short.request(&id, AUDIO), Err(WishError::Request(_))),
            "checked as a whole before it is sent"
        );
    }
}
