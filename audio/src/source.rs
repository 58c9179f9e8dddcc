//! The bytes of a recording as the demuxers read them.

use std::{
    fs::File,
    io::{self, Read, Seek, SeekFrom},
    os::unix::fs::FileExt as _,
};

use symphonia::core::io::MediaSource;

/// Four bytes that are read in place of what the file has there.
pub(crate) type Patch = (u64, [u8; 4]);

/// A file, read by position: whoever holds a descriptor of the same open file does not disturb it.
pub(crate) struct Source {
    file: File,
    /// As it was when it was opened.
    len: u64,
    pos: u64,
    patches: Vec<Patch>,
}

impl Source {
    pub(crate) fn new(file: File, len: u64, patches: Vec<Patch>) -> Self {
        Self { file, len, pos: 0, patches }
    }
}

impl Read for Source {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let wanted = buf.len().min(usize::try_from(self.len.saturating_sub(self.pos)).unwrap_or(usize::MAX));
        let read = self.file.read_at(&mut buf[..wanted], self.pos)?;
        for (at, bytes) in &self.patches {
            for (offset, byte) in (*at..).zip(bytes) {
                if let Some(place) = offset.checked_sub(self.pos).and_then(|i| buf[..read].get_mut(i as usize)) {
                    *place = *byte;
                }
            }
        }
        self.pos += read as u64;
        Ok(read)
    }
}

impl Seek for Source {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let target = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::End(offset) => self.len.checked_add_signed(offset),
            SeekFrom::Current(offset) => self.pos.checked_add_signed(offset),
        };
        self.pos = target.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.pos)
    }
}

impl MediaSource for Source {
    fn is_seekable(&self) -> bool {
        true
    }

    fn byte_len(&self) -> Option<u64> {
        Some(self.len)
    }
}

/// Reads up to `buf.len()` bytes at `at`; fewer at the end of the file.
pub(crate) fn read_up_to(file: &File, buf: &mut [u8], at: u64) -> io::Result<usize> {
    let mut read = 0;
    while read < buf.len() {
        match file.read_at(&mut buf[read..], at + read as u64) {
            Ok(0) => break,
            Ok(n) => read += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(read)
}

/// Whether an MP4 file has neither a `moov` nor a `moof` box: nothing in it can be found then.
pub(crate) fn lacks_index(file: &File, len: u64) -> io::Result<bool> {
    // Real files have a handful of boxes at the top, fragmented ones their `moov` among the first.
    const MOST_BOXES: usize = 1024;
    let mut at = 0u64;
    for _ in 0..MOST_BOXES {
        let mut head = [0u8; 16];
        if read_up_to(file, &mut head, at)? < 8 {
            return Ok(true);
        }
        let [size, name, wide] = [&head[..4], &head[4..8], &head[8..]];
        if name == b"moov" || name == b"moof" {
            return Ok(false);
        }
        let be = |bytes: &[u8]| bytes.iter().fold(0u64, |sum, &b| sum << 8 | u64::from(b));
        let step = match be(size) {
            0 => return Ok(true),
            1 => be(wide),
            size => size,
        };
        if step < 8 {
            return Ok(true);
        }
        at = match at.checked_add(step) {
            Some(next) if next < len => next,
            _ => return Ok(true),
        };
    }
    Ok(false)
}
