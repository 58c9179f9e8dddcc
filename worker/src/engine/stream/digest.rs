//! Log entries -> pieces of audio on the session's clock. Each entry is judged once, in log order.

use std::sync::Arc;

use bytes::Bytes;
use voxfleet_schema::{
    audio::{AudioFormat, BadChunk, ChunkHeaders, RawEntry, sniff_container},
    event::What,
    failure::{Failure, FailureClass},
    source::{Note, SourceState, Verdict},
};

use super::pcm::Audio;
use crate::ipc::{AfterFinal, ENTRY_COST, StreamNote};

/// What ends a stretch of audio because the log says so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Barrier {
    Flush,
    End,
}

/// The producers' state before an entry. Names are shared between entries: they are long, and change seldom.
#[derive(Debug)]
pub(super) struct Producers {
    named: Arc<SourceState>,
    asr_seq: Option<u64>,
    asr_seen: u64,
}

impl Producers {
    pub(super) fn state(&self) -> SourceState {
        SourceState { asr_seq: self.asr_seq, asr_seen: self.asr_seen, ..SourceState::clone(&self.named) }
    }
}

/// One used log entry.
#[derive(Debug)]
pub(super) struct Piece {
    pub(super) seq: u64,
    /// Session sample of its first frame.
    pub(super) at_sample: u64,
    /// Its first frame, counted since its format began at `format_sample`.
    pub(super) at_frame: u64,
    pub(super) format: AudioFormat,
    pub(super) format_sample: u64,
    pub(super) producers_before: Producers,
    pub(super) audio: Audio,
    /// Stands behind the audio.
    pub(super) barrier: Option<Barrier>,
    /// Bytes whose permits go free when this piece is dropped.
    pub(super) permit_bytes: u64,
}

impl Piece {
    pub(super) fn sample_of(&self, frame: u64) -> u64 {
        self.format_sample + self.format.sample_of_frame(frame)
    }

    /// Session sample behind its last frame.
    pub(super) fn end_sample(&self) -> u64 {
        self.sample_of(self.at_frame + self.audio.frames() as u64)
    }

    /// Whether it holds `sample` or a later one. Over 16 kHz several frames share a sample, and a chunk may end between
    /// them: then its last frame counts, not where the next chunk starts.
    pub(super) fn reaches(&self, sample: u64) -> bool {
        let frames = self.audio.frames() as u64;
        self.end_sample() > sample || (frames > 0 && self.sample_of(self.at_frame + frames - 1) >= sample)
    }
}

/// What became of an entry.
#[derive(Debug, Default)]
pub(super) struct Digested {
    pub(super) piece: Option<Piece>,
    pub(super) notes: Vec<StreamNote>,
    /// Permits that are free at once.
    pub(super) freed_bytes: u64,
}

/// The clock and the producers' state, before the next entry.
#[derive(Debug)]
pub(super) struct Digest {
    producers: SourceState,
    /// Its sources and `container`; the numbers in it are those of some earlier entry.
    named: Arc<SourceState>,
    format: AudioFormat,
    format_sample: u64,
    frame: u64,
    /// Entries up to here were reported on by whoever published the last final.
    noted_seq: u64,
    /// Channels are kept apart.
    split: bool,
}

impl Digest {
    pub(super) fn beginning(split: bool) -> Self {
        Self {
            producers: SourceState::default(),
            named: Arc::default(),
            format: AudioFormat::default(),
            format_sample: 0,
            frame: 0,
            noted_seq: 0,
            split,
        }
    }

    /// Where log entries are gone (`expired`), the producers' state is that before `resume.seq`, although entries up to
    /// `to_seq` were judged: numbers taken in between are noted as a gap, and a repetition of one of them would be used.
    pub(super) fn after(after: &AfterFinal, expired: bool, split: bool) -> Self {
        let resume = &after.resume;
        let (format_sample, frame) =
            if expired { (after.to_sample, 0) } else { (resume.format_sample, resume.at_frame) };
        Self {
            producers: resume.producers.clone(),
            named: Arc::new(resume.producers.clone()),
            format: resume.format,
            format_sample,
            frame,
            noted_seq: after.to_seq,
            split,
        }
    }

    /// Session sample at which the next entry's audio begins.
    pub(super) fn position(&self) -> u64 {
        self.format_sample + self.format.sample_of_frame(self.frame)
    }

    /// A resume point at the next entry.
    pub(super) fn resume_here(&self) -> (u64, u64, u64, AudioFormat, u64, SourceState) {
        (self.noted_seq + 1, self.position(), self.frame, self.format, self.format_sample, self.producers.clone())
    }

    pub(super) fn take(&mut self, entry: RawEntry) -> Digested {
        let (seq, raw_bytes) = (entry.seq, entry.payload.len() as u64);
        let mut digested = Digested { freed_bytes: raw_bytes + ENTRY_COST, ..Digested::default() };
        let headers = match ChunkHeaders::of(&entry) {
            Ok(headers) => headers,
            Err(bad) => {
                self.note_bad(seq, &bad, &mut digested.notes);
                return digested;
            }
        };
        let producers_before = self.producers();
        match self.producers.judge(&headers, !entry.payload.is_empty()) {
            Verdict::Use(note) => self.note_used(seq, note, &mut digested.notes),
            Verdict::DropDuplicate => {
                self.note(seq, What::Duplicate, None, "number was taken before", &mut digested.notes);
                return digested;
            }
            Verdict::DropStaleSource => {
                let failure = Failure::new(FailureClass::StaleSource, "a newer source has replaced this one");
                self.note(seq, What::StaleSource, Some(failure), "", &mut digested.notes);
                return digested;
            }
            Verdict::DropAfterEnd => {
                let failure = Failure::new(FailureClass::AudioAfterEnd, "this source has ended its audio");
                self.note(seq, What::AudioAfterEnd, Some(failure), "", &mut digested.notes);
                return digested;
            }
        }
        if let Some(format) = headers.format {
            // Naming a format is how a producer says that what follows is no longer a slice of a container.
            self.producers.container = false;
            if format != self.format {
                self.format_sample = self.position();
                self.frame = 0;
                self.format = format;
            }
        }
        let audio = match self.decode(entry.payload) {
            Ok(audio) => audio,
            Err(bad) => {
                self.note_bad(seq, &bad, &mut digested.notes);
                Audio::none()
            }
        };
        let barrier = match (headers.end, headers.flush) {
            (true, _) => Some(Barrier::End),
            (false, true) => Some(Barrier::Flush),
            (false, false) => None,
        };
        if audio.frames() == 0 && barrier.is_none() {
            return digested;
        }
        let audio_bytes = raw_bytes.min(audio.bytes());
        digested.freed_bytes = raw_bytes - audio_bytes;
        let piece = Piece {
            seq,
            at_sample: self.position(),
            at_frame: self.frame,
            format: self.format,
            format_sample: self.format_sample,
            producers_before,
            audio,
            barrier,
            permit_bytes: audio_bytes + ENTRY_COST,
        };
        self.frame += piece.audio.frames() as u64;
        digested.piece = Some(piece);
        digested
    }

    fn producers(&mut self) -> Producers {
        let now = &self.producers;
        if self.named.sources != now.sources || self.named.container != now.container {
            self.named = Arc::new(now.clone());
        }
        Producers { named: Arc::clone(&self.named), asr_seq: now.asr_seq, asr_seen: now.asr_seen }
    }

    fn decode(&mut self, payload: Bytes) -> Result<Audio, BadChunk> {
        if let Some(name) = sniff_container(&payload) {
            self.producers.container = true;
            return Err(BadChunk::Container(name));
        }
        if self.producers.container && !payload.is_empty() {
            return Err(BadChunk::Container("a slice of a container"));
        }
        if self.split { Audio::split(payload, self.format) } else { Audio::mixed(&payload, self.format) }
    }

    fn note_bad(&self, seq: u64, bad: &BadChunk, notes: &mut Vec<StreamNote>) {
        self.note(seq, What::Rejected, Some(bad.failure()), "", notes);
    }

    fn note_used(&self, seq: u64, note: Note, notes: &mut Vec<StreamNote>) {
        match note {
            Note::Plain => {}
            Note::Gap { from, to } => {
                let detail = format!("numbers {from} to {} are missing", to - 1);
                self.note(seq, What::Gap, None, &detail, notes);
            }
            Note::Reordered { seq: number } => {
                self.note(seq, What::Reordered, None, &format!("number {number} came late"), notes);
            }
        }
    }

    fn note(&self, seq: u64, what: What, failure: Option<Failure>, detail: &str, notes: &mut Vec<StreamNote>) {
        if seq > self.noted_seq {
            notes.push(StreamNote { what, seq, failure, detail: detail.to_owned() });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(seq: u64, headers: &[(&str, &str)], payload: &[u8]) -> RawEntry {
        RawEntry {
            seq,
            headers: headers.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect(),
            payload: payload.to_vec().into(),
        }
    }

    #[test]
    fn bad_chunks_are_told_and_take_no_time() {
        let mut digest = Digest::beginning(false);
        let nan = f32::NAN.to_le_bytes();
        type Case<'a> = (&'a [(&'a str, &'a str)], &'a [u8], FailureClass);
        let cases: [Case<'_>; 8] = [
            (&[], &[], FailureClass::BadRequest),
            (&[], &[1, 2, 3], FailureClass::BadAudio),
            (&[("Asr-Seq", "x")], &[0, 0], FailureClass::BadRequest),
            (&[("Asr-Format", "pcm_s16le;rate=1")], &[0, 0], FailureClass::BadAudio),
            (&[("Asr-Format", "opus")], &[0, 0], FailureClass::UnsupportedFormat),
            (&[], b"OggS\0\0", FailureClass::UnsupportedFormat),
            (&[], &[9, 9], FailureClass::UnsupportedFormat),
            (&[("Asr-Format", "pcm_f32le")], &nan, FailureClass::BadAudio),
        ];
        for (seq, (headers, payload, class)) in cases.into_iter().enumerate() {
            let digested = digest.take(entry(seq as u64 + 1, headers, payload));
            assert!(digested.piece.is_none(), "{headers:?}");
            assert_eq!(digested.freed_bytes, payload.len() as u64 + ENTRY_COST);
            let [note] = digested.notes.as_slice() else { panic!("one note for {headers:?}") };
            assert_eq!(note.failure.as_ref().map(|f| f.class), Some(class), "{headers:?} {payload:?}");
        }
        assert_eq!(digest.position(), 0);
        let good = digest.take(entry(9, &[("Asr-Format", "pcm_s16le")], &[0; 640]));
        assert!(good.piece.is_some_and(|p| p.audio.frames() == 320) && good.notes.is_empty());
    }

    #[test]
    fn channels_are_averaged_and_the_clock_follows_the_format() {
        let mut digest = Digest::beginning(false);
        let stereo: Vec<u8> = [16_384i16, -16_384, 32_767, 32_767].iter().flat_map(|s| s.to_le_bytes()).collect();
        let format = [("Asr-Format", "pcm_s16le;rate=8000;channels=2")];
        let piece = digest.take(entry(1, &format, &stereo)).piece.expect("piece");
        assert_eq!(*piece.audio.channel(0, 0..2), [0.0, 32_767.0 / 32_768.0]);
        assert_eq!((piece.at_sample, piece.end_sample()), (0, 4));
        let piece = digest.take(entry(2, &[("Asr-Format", "pcm_s16le;rate=48000")], &[0; 12])).piece.expect("piece");
        assert_eq!((piece.at_sample, piece.at_frame, piece.format_sample, piece.end_sample()), (4, 0, 4, 6));
        let loud: Vec<u8> = [1e30f32, -1e30].iter().flat_map(|s| s.to_le_bytes()).collect();
        let piece = digest.take(entry(3, &[("Asr-Format", "pcm_f32le")], &loud)).piece.expect("piece");
        assert_eq!(*piece.audio.channel(0, 0..2), [1.0, -1.0]);
    }

    #[test]
    fn entries_share_the_names_of_their_producers() {
        let mut digest = Digest::beginning(false);
        let mut expected = SourceState::default();
        let mut pieces = Vec::new();
        for (seq, (source, number)) in [("a", "0"), ("a", "1"), ("a", "2"), ("b", "0"), ("b", "1")].iter().enumerate() {
            let entry = entry(seq as u64 + 1, &[("Asr-Source", source), ("Asr-Seq", number)], &[0; 4]);
            let headers = ChunkHeaders::of(&entry).expect("headers");
            let piece = digest.take(entry).piece.expect("piece");
            assert_eq!(piece.producers_before.state(), expected, "before entry {seq}");
            assert_eq!(piece.permit_bytes, 4 + ENTRY_COST);
            assert!(matches!(expected.judge(&headers, true), Verdict::Use(_)));
            pieces.push(piece);
        }
        let shares =
            |a: usize, b: usize| Arc::ptr_eq(&pieces[a].producers_before.named, &pieces[b].producers_before.named);
        assert!(shares(1, 2) && shares(2, 3) && !shares(3, 4));
    }

    #[test]
    fn an_end_with_bad_audio_is_still_an_end() {
        let mut digest = Digest::beginning(false);
        let digested = digest.take(entry(1, &[("Asr-End", "1")], &[1, 2, 3]));
        assert_eq!(digested.notes.len(), 1);
        assert_eq!(digested.piece.and_then(|p| p.barrier), Some(Barrier::End));
    }
}
