//! A recording as the entries of a log: numbered from 1, format on the first and wherever it changes, an end behind the last.

use bytes::Bytes;
use voxfleet_schema::audio::{ASR_END, ASR_FORMAT, RawEntry};

use crate::Chunk;

/// Pure: the same chunks make the same entries.
#[derive(Debug, Default)]
pub struct EntryMaker {
    /// Entries made.
    made: u64,
}

impl EntryMaker {
    pub fn chunk(&mut self, chunk: Chunk) -> RawEntry {
        let headers = chunk.format.map(|format| (ASR_FORMAT.to_owned(), format.to_string()));
        self.entry(headers.into_iter().collect(), chunk.pcm)
    }

    /// The empty entry that ends the log.
    pub fn end(&mut self) -> RawEntry {
        self.entry(vec![(ASR_END.to_owned(), "1".to_owned())], Bytes::new())
    }

    fn entry(&mut self, headers: Vec<(String, String)>, payload: Bytes) -> RawEntry {
        self.made += 1;
        RawEntry { seq: self.made, headers, payload }
    }
}

#[cfg(test)]
mod tests {
    use voxfleet_schema::audio::{AudioFormat, ChunkHeaders};

    use super::*;

    #[test]
    fn entries_are_numbered_and_say_the_format_where_it_changes() {
        let (first, second) = (AudioFormat::default(), AudioFormat { rate_hz: 48_000, ..AudioFormat::default() });
        let chunk = |format| Chunk { format, pcm: Bytes::from_static(&[1, 2]) };
        let mut maker = EntryMaker::default();
        let entries: Vec<RawEntry> = [Some(first), None, Some(second), None]
            .map(|f| maker.chunk(chunk(f)))
            .into_iter()
            .chain([maker.end()])
            .collect();
        assert_eq!(entries.iter().map(|e| e.seq).collect::<Vec<_>>(), [1, 2, 3, 4, 5]);
        let read: Vec<ChunkHeaders> = entries.iter().map(|e| ChunkHeaders::of(e).expect("good entry")).collect();
        assert_eq!(read.iter().map(|h| h.format).collect::<Vec<_>>(), [Some(first), None, Some(second), None, None]);
        assert_eq!(read.iter().map(|h| h.end).collect::<Vec<_>>(), [false, false, false, false, true]);
        assert!(entries[4].payload.is_empty());
    }
}
