//! Ids, subjects, URLs, and the texts that `eval` reads.

use voxfleet_eval::{rttm, text};
use voxfleet_nats::Subjects;
use voxfleet_schema::{
    id::{GpuId, Incarnation, StreamId},
    job::{AudioUrl, JobPart, job_of_media},
};

/// Every line is one.
pub(super) fn ids(input: &[u8]) -> bool {
    let text = String::from_utf8_lossy(input);
    let mut taken = false;
    for line in text.split('\n') {
        let plain = (1..=64).contains(&line.len())
            && line.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'));
        let read = StreamId::new(line);
        assert_eq!(read.is_ok(), plain, "{line:?}");
        assert_eq!((GpuId::new(line).is_ok(), Incarnation::new(line).is_ok()), (plain, plain), "{line:?}");
        taken |= plain;
        if let (Ok(id), Ok(whole)) = (read, StreamId::new("call")) {
            assert_eq!(id.as_str(), line);
            assert!(!JobPart::names_part_of(&whole, &id) || line.starts_with("call-"), "{line}");
        }
        if let Some(job) = job_of_media(line) {
            assert!(line.contains(job.as_str()), "{line}");
        }
    }
    taken
}

/// What is read as a subject of ours is written as the same.
pub(super) fn subjects(input: &[u8]) -> bool {
    let text = String::from_utf8_lossy(input);
    let subjects = Subjects::new("asr.v1");
    let mut taken = false;
    for line in text.split('\n') {
        if let Some(subject) = subjects.parse(line) {
            assert_eq!(subjects.build(&subject), line);
            taken = true;
        }
    }
    taken
}

/// What may be shown of a URL has neither its query nor who it logs in as, whatever it is.
pub(super) fn urls(input: &[u8]) -> bool {
    let text = String::from_utf8_lossy(input);
    let shown = AudioUrl::harmless(&text);
    assert!(!shown.contains(['?', '#']), "{shown}");
    assert_eq!(AudioUrl::harmless(&shown), shown, "it changes when it is shown again");
    if let Some((_, rest)) = shown.split_once("://") {
        assert!(rest.rsplit_once('@').is_none_or(|(who, _)| who == "***"), "{shown}");
    }
    match AudioUrl::parse(&text) {
        Err(error) => {
            assert!(error.to_string().len() < 300, "an answer as long as what was asked");
            false
        }
        Ok(url) => {
            assert!(text.len() <= voxfleet_schema::job::MAX_URL_BYTES && !text.contains(char::is_control));
            match &url {
                AudioUrl::Http { host, .. } => {
                    assert!(!host.is_empty() && !host.contains(['/', '@', '?', '#', ' ']), "{host:?}");
                }
                AudioUrl::Object { key } => assert_eq!(AudioUrl::object(key), format!("object://asr_media/{key}")),
                AudioUrl::S3 { bucket, key } => assert!(!bucket.is_empty() && !key.is_empty()),
                AudioUrl::File { path } => assert!(path.starts_with('/')),
            }
            assert!(url.file_name().is_none_or(|name| !name.contains('/')));
            true
        }
    }
}

/// Turns that are written are read as the same, to the millisecond.
pub(super) fn rttm(input: &[u8]) -> bool {
    let Ok(entries) = rttm::parse(&String::from_utf8_lossy(input)) else { return false };
    let written = rttm::write(&entries);
    let again = rttm::parse(&written).expect("what was written can be read");
    assert!(again.len() <= entries.len());
    assert_eq!(rttm::write(&again), written, "turns change when they are written again");
    !entries.is_empty()
}

pub(super) fn uem(input: &[u8]) -> bool {
    let Ok(regions) = rttm::parse_uem(&String::from_utf8_lossy(input)) else { return false };
    assert!(regions.iter().all(|region| region.start_s <= region.end_s && region.end_s.is_finite()));
    !regions.is_empty()
}

/// Words of two texts, one half each: a text has no errors against itself, and none are more than there are words.
pub(super) fn words(input: &[u8]) -> bool {
    let text = String::from_utf8_lossy(input);
    let (reference, heard) = text.split_once('\n').unwrap_or((&text, ""));
    for (reference, heard) in [(reference, heard), (heard, reference), (reference, reference)] {
        let edits = text::compare(reference, heard);
        let errors = edits.substituted + edits.deleted + edits.inserted;
        assert!(reference != heard || errors == 0, "{reference:?} differs from itself");
    }
    !text.trim().is_empty()
}
