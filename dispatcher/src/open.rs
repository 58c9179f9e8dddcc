//! What opens a session: only audio, only good audio, and after an end only audio that is not that source's own.
//!
//! A first chunk is judged by itself. After an end final the log behind it is walked, with the producers' state of that
//! final, because a source that ended itself is known from the log alone.

use voxfleet_schema::{
    audio::{AudioFormat, BadChunk, ChunkHeaders, Encoding, RawEntry, sniff_container},
    event::What,
    failure::{Failure, FailureClass},
    id::SourceId,
    session::SessionOptions,
    source::{SourceState, Verdict},
    trace::TraceContext,
    transcript::Final,
};

/// The chunk that opens a session.
#[derive(Debug, Clone, PartialEq)]
pub struct Opener {
    pub seq: u64,
    /// From its headers, when any stand there.
    pub options: Option<Box<SessionOptions>>,
    pub source: Option<SourceId>,
    /// The trace that its producer wants it to be part of.
    pub trace: Option<TraceContext>,
}

/// An entry that opens nothing, for its event.
#[derive(Debug, Clone, PartialEq)]
pub struct Rejected {
    pub seq: u64,
    pub what: What,
    pub failure: Failure,
}

impl Rejected {
    pub fn bad(seq: u64, bad: &BadChunk) -> Self {
        Self { seq, what: What::Rejected, failure: bad.failure() }
    }
}

/// What an entry of an unknown session is.
#[derive(Debug, Clone, PartialEq)]
pub enum First {
    Opens(Opener),
    /// A flush or end without audio.
    Mark,
    Bad(Rejected),
}

/// Judges the first entry of a session that has no chain.
pub fn first(entry: &RawEntry) -> First {
    let headers = match ChunkHeaders::of(entry) {
        Ok(headers) => headers,
        Err(bad) => return First::Bad(Rejected::bad(entry.seq, &bad)),
    };
    if entry.payload.is_empty() {
        return First::Mark;
    }
    match check_audio(&entry.payload, headers.format.unwrap_or_default()) {
        Ok(()) => First::Opens(opener(entry.seq, headers)),
        Err(bad) => First::Bad(Rejected::bad(entry.seq, &bad)),
    }
}

fn opener(seq: u64, headers: ChunkHeaders) -> Opener {
    Opener { seq, options: headers.options, source: headers.source, trace: headers.trace }
}

fn check_audio(payload: &[u8], format: AudioFormat) -> Result<(), BadChunk> {
    if let Some(name) = sniff_container(payload) {
        return Err(BadChunk::Container(name));
    }
    let frame_bytes = format.frame_bytes();
    if !payload.len().is_multiple_of(frame_bytes) {
        return Err(BadChunk::PartialFrame { len: payload.len(), frame_bytes });
    }
    if format.encoding == Encoding::PcmF32Le
        && let Some(at) =
            payload.chunks_exact(4).position(|s| !f32::from_le_bytes([s[0], s[1], s[2], s[3]]).is_finite())
    {
        return Err(BadChunk::NotFinite { at });
    }
    Ok(())
}

/// A slice of a container opened nothing; what follows it from the same producer looks like noise and opens nothing either.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContainerSeen {
    source: Option<SourceId>,
}

impl ContainerSeen {
    /// Remembers the entry if it begins a container.
    pub fn of(entry: &RawEntry) -> Option<Self> {
        sniff_container(&entry.payload)?;
        let source = ChunkHeaders::of(entry).ok()?.source;
        Some(Self { source })
    }

    /// Whether the entry goes on with it: no format of its own, no other source.
    pub fn continues(&self, entry: &RawEntry) -> bool {
        ChunkHeaders::of(entry).is_ok_and(|h| {
            !entry.payload.is_empty() && h.format.is_none() && (h.source.is_none() || h.source == self.source)
        })
    }

    pub fn rejects(seq: u64) -> Rejected {
        Rejected::bad(seq, &BadChunk::Container("a slice of a container"))
    }
}

/// Walks the log behind an end final.
#[derive(Debug, Clone, PartialEq)]
pub struct Walker {
    producers: SourceState,
    format: AudioFormat,
    /// Entries up to here belong to the final.
    to_seq: u64,
    /// The next entry to read.
    next_seq: u64,
}

#[derive(Debug, Clone, PartialEq)]
pub enum Step {
    Passed,
    Opens(Opener),
    Rejected(Rejected),
}

impl Walker {
    pub fn after(last: &Final) -> Self {
        let resume = &last.resume;
        Self {
            producers: resume.producers.clone(),
            format: resume.format,
            to_seq: last.audio.to_seq,
            next_seq: resume.seq,
        }
    }

    /// Of a session that has no final: everything is behind its end.
    pub fn beginning() -> Self {
        Self { producers: SourceState::default(), format: AudioFormat::default(), to_seq: 0, next_seq: 1 }
    }

    pub fn to_seq(&self) -> u64 {
        self.to_seq
    }

    pub fn next_seq(&self) -> u64 {
        self.next_seq
    }

    /// Takes the next entry, in log order.
    pub fn step(&mut self, entry: &RawEntry) -> Step {
        self.next_seq = entry.seq + 1;
        let above = entry.seq > self.to_seq;
        let reject = |what, class, message: &str| {
            Step::Rejected(Rejected { seq: entry.seq, what, failure: Failure::new(class, message) })
        };
        let headers = match ChunkHeaders::of(entry) {
            Ok(headers) => headers,
            Err(bad) if above => return Step::Rejected(Rejected::bad(entry.seq, &bad)),
            Err(_) => return Step::Passed,
        };
        let has_audio = !entry.payload.is_empty();
        let may_reopen = self.producers.may_reopen(&headers);
        let ended =
            headers.source.as_ref().is_some_and(|id| self.producers.sources.iter().any(|s| s.id == *id && s.ended));
        let verdict = self.producers.judge(&headers, has_audio);
        if let Some(format) = headers.format {
            self.producers.container = false;
            self.format = format;
        }
        if !above || !has_audio {
            if sniff_container(&entry.payload).is_some() {
                self.producers.container = true;
            }
            return Step::Passed;
        }
        if !may_reopen {
            return if ended {
                reject(What::AudioAfterEnd, FailureClass::AudioAfterEnd, "this source has ended its audio")
            } else {
                reject(What::StaleSource, FailureClass::StaleSource, "a newer source has replaced this one")
            };
        }
        if verdict == Verdict::DropDuplicate {
            return reject(What::Duplicate, FailureClass::BadRequest, "number was taken before");
        }
        if sniff_container(&entry.payload).is_some() {
            self.producers.container = true;
        }
        if self.producers.container {
            return Step::Rejected(ContainerSeen::rejects(entry.seq));
        }
        match check_audio(&entry.payload, self.format) {
            Ok(()) => Step::Opens(opener(entry.seq, headers)),
            Err(bad) => Step::Rejected(Rejected::bad(entry.seq, &bad)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    fn entry(seq: u64, headers: &[(&str, &str)], payload: &'static [u8]) -> RawEntry {
        let headers = headers.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect();
        RawEntry { seq, headers, payload: payload.into() }
    }

    #[test]
    fn only_good_audio_opens() {
        let class = |headers: &[(&str, &str)], payload| match first(&entry(1, headers, payload)) {
            First::Bad(rejected) => rejected.failure.class,
            other => panic!("{other:?}"),
        };
        assert_eq!(class(&[], b""), FailureClass::BadRequest);
        assert_eq!(class(&[], b"odd"), FailureClass::BadAudio);
        assert_eq!(class(&[("Asr-Format", "pcm_s16le;rate=10000000")], b"ab"), FailureClass::BadAudio);
        assert_eq!(class(&[("Asr-Format", "opus")], b"ab"), FailureClass::UnsupportedFormat);
        assert_eq!(class(&[], b"OggS"), FailureClass::UnsupportedFormat);
        assert_eq!(class(&[("Asr-Format", "pcm_f32le")], &[0, 0, 0xc0, 0x7f]), FailureClass::BadAudio);
        assert_eq!(class(&[("Asr-Opt-Colour", "red")], b"ab"), FailureClass::BadRequest);
        assert_eq!(class(&[("Asr-Opt-Diarize", "perhaps")], b"ab"), FailureClass::BadRequest);
        assert_eq!(first(&entry(1, &[("Asr-End", "1")], b"")), First::Mark);
        assert_eq!(first(&entry(1, &[("Asr-Flush", "1")], b"")), First::Mark);
        let First::Opens(opener) = first(&entry(7, &[("Asr-Opt-Endpoint-Ms", "300"), ("Asr-End", "1")], b"ab")) else {
            panic!("good audio with an end opens")
        };
        assert_eq!((opener.seq, opener.options.map(|o| o.endpoint_ms)), (7, Some(300)));
    }

    #[test]
    fn slices_of_a_container_go_on_being_refused() {
        let ogg = ContainerSeen::of(&entry(1, &[], b"OggS")).expect("a container");
        assert!(ogg.continues(&entry(2, &[], b"ab")));
        assert!(!ogg.continues(&entry(2, &[("Asr-Format", "pcm_s16le")], b"ab")));
        assert!(!ogg.continues(&entry(2, &[("Asr-Source", "b")], b"ab")));
        assert_eq!(ContainerSeen::of(&entry(1, &[], b"abcd")), None);
    }

    /// A session of source `a`: audio at 3, its own end at 4 (an idle end if not `own`), the end final at 4.
    fn ended(own: bool) -> Walker {
        let mut last = testing::end_final("s", 0, 1, 4);
        last.resume.seq = 3;
        let mut walker = Walker::after(&last);
        assert_eq!(walker.step(&entry(3, &[("Asr-Source", "a"), ("Asr-Seq", "0")], b"ab")), Step::Passed);
        let end: &[(&str, &str)] = if own {
            &[("Asr-Source", "a"), ("Asr-Seq", "1"), ("Asr-End", "1")]
        } else {
            &[("Asr-End", "1"), ("Asr-Cause", "idle")]
        };
        assert_eq!(walker.step(&entry(4, end, b"")), Step::Passed);
        walker
    }

    fn what(step: Step) -> Option<What> {
        match step {
            Step::Rejected(rejected) => Some(rejected.what),
            _ => None,
        }
    }

    #[test]
    fn after_its_own_end_a_named_source_is_refused() {
        let mut walker = ended(true);
        let same = [("Asr-Source", "a"), ("Asr-Seq", "2")];
        assert_eq!(what(walker.step(&entry(5, &same, b"ab"))), Some(What::AudioAfterEnd));
        assert_eq!(walker.step(&entry(6, &[("Asr-End", "1")], b"")), Step::Passed);
        assert!(matches!(walker.clone().step(&entry(7, &[], b"ab")), Step::Opens(Opener { seq: 7, .. })));
        assert!(matches!(walker.step(&entry(7, &[("Asr-Source", "b")], b"ab")), Step::Opens(_)));
        assert_eq!(what(walker.step(&entry(8, &same, b"ab"))), Some(What::AudioAfterEnd));
    }

    #[test]
    fn after_a_foreign_end_it_goes_on_unless_it_repeats_itself() {
        let mut walker = ended(false);
        let again = [("Asr-Source", "a"), ("Asr-Seq", "0")];
        assert_eq!(what(walker.step(&entry(5, &again, b"ab"))), Some(What::Duplicate));
        assert_eq!(
            what(walker.step(&entry(6, &[("Asr-Source", "a"), ("Asr-Seq", "1")], b"odd"))),
            Some(What::Rejected)
        );
        let next = [("Asr-Source", "a"), ("Asr-Seq", "2")];
        assert!(matches!(walker.step(&entry(7, &next, b"ab")), Step::Opens(_)));
    }

    #[test]
    fn a_replaced_source_stays_replaced() {
        let mut walker = ended(false);
        assert!(matches!(walker.step(&entry(5, &[("Asr-Source", "b")], b"ab")), Step::Opens(_)));
        assert_eq!(what(walker.step(&entry(6, &[("Asr-Source", "a")], b"ab"))), Some(What::StaleSource));
    }
}
