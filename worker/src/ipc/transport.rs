//! Frames over the socketpair: a `u32` length (little endian) and that many bytes of MessagePack with named fields.
//!
//! The supervisor's side is async, the child's blocking: the child's loop owns a device and needs no runtime. Both
//! sides check the length, in both directions, before they allocate or write: after a broken frame the stream can not be
//! found again, so every error but [`TransportError::TooLarge`] on writing ends the connection.

use std::io::{Read, Write};

use serde::{Serialize, de::DeserializeOwned};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Largest frame in bytes. An entry carries at most one NATS payload (4 MiB in our server files, 8 MiB is the most that
/// NATS advises), a final stays under 1 MiB.
pub const MAX_FRAME_BYTES: usize = 24 * 1024 * 1024;

const LENGTH_BYTES: usize = 4;

/// Buffers above this are given back after a frame, so that one large frame does not stay resident.
const KEEP_BUFFER_BYTES: usize = 256 * 1024;

#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// The other side closed between two frames: an orderly end.
    #[error("connection closed")]
    Closed,
    #[error("connection closed inside a frame")]
    Truncated,
    #[error("frame of {len} bytes is over the limit of {MAX_FRAME_BYTES}")]
    TooLarge { len: usize },
    #[error("invalid frame")]
    Decode(#[from] rmp_serde::decode::Error),
    #[error("cannot encode a frame")]
    Encode(#[from] rmp_serde::encode::Error),
    #[error("connection failed")]
    Io(#[source] std::io::Error),
}

impl TransportError {
    fn reading(error: std::io::Error) -> Self {
        match error.kind() {
            std::io::ErrorKind::UnexpectedEof => TransportError::Truncated,
            // A killed peer with unread data in its buffer resets the pair.
            std::io::ErrorKind::ConnectionReset => TransportError::Closed,
            _ => TransportError::Io(error),
        }
    }

    fn writing(error: std::io::Error) -> Self {
        match error.kind() {
            std::io::ErrorKind::BrokenPipe | std::io::ErrorKind::ConnectionReset => TransportError::Closed,
            _ => TransportError::Io(error),
        }
    }
}

/// Length and body of one frame, in `buffer`.
fn encode<T: Serialize>(value: &T, buffer: &mut Vec<u8>) -> Result<(), TransportError> {
    buffer.clear();
    buffer.extend_from_slice(&[0; LENGTH_BYTES]);
    rmp_serde::encode::write_named(buffer, value)?;
    let len = buffer.len() - LENGTH_BYTES;
    if len > MAX_FRAME_BYTES {
        buffer.clear();
        buffer.shrink_to(KEEP_BUFFER_BYTES);
        return Err(TransportError::TooLarge { len });
    }
    // The limit is far below u32::MAX.
    buffer[..LENGTH_BYTES].copy_from_slice(&(len as u32).to_le_bytes());
    Ok(())
}

fn checked_len(header: [u8; LENGTH_BYTES]) -> Result<usize, TransportError> {
    let len = u32::from_le_bytes(header) as usize;
    if len > MAX_FRAME_BYTES { Err(TransportError::TooLarge { len }) } else { Ok(len) }
}

/// Reads frames in async land.
#[derive(Debug)]
pub struct AsyncReader<R> {
    inner: R,
}

impl<R: AsyncRead + Unpin> AsyncReader<R> {
    pub fn new(inner: R) -> Self {
        Self { inner }
    }

    /// The next frame. Not safe to drop half way: give it a task of its own.
    pub async fn next<T: DeserializeOwned>(&mut self) -> Result<T, TransportError> {
        let mut header = [0u8; LENGTH_BYTES];
        let mut filled = 0;
        while filled < LENGTH_BYTES {
            match self.inner.read(&mut header[filled..]).await.map_err(TransportError::reading)? {
                0 if filled == 0 => return Err(TransportError::Closed),
                0 => return Err(TransportError::Truncated),
                n => filled += n,
            }
        }
        let mut body = vec![0u8; checked_len(header)?];
        self.inner.read_exact(&mut body).await.map_err(TransportError::reading)?;
        Ok(rmp_serde::from_slice(&body)?)
    }
}

/// Writes frames in async land. Not safe to drop half way: one task owns it and takes frames from a bounded channel.
#[derive(Debug)]
pub struct AsyncWriter<W> {
    inner: W,
    buffer: Vec<u8>,
}

impl<W: AsyncWrite + Unpin> AsyncWriter<W> {
    pub fn new(inner: W) -> Self {
        Self { inner, buffer: Vec::new() }
    }

    pub async fn send<T: Serialize>(&mut self, value: &T) -> Result<(), TransportError> {
        encode(value, &mut self.buffer)?;
        self.inner.write_all(&self.buffer).await.map_err(TransportError::writing)?;
        if self.buffer.capacity() > KEEP_BUFFER_BYTES {
            self.buffer = Vec::new();
        }
        Ok(())
    }
}

/// Reads frames and blocks meanwhile: the child's side.
#[derive(Debug)]
pub struct BlockingReader<R> {
    inner: R,
}

impl<R: Read> BlockingReader<R> {
    pub fn new(inner: R) -> Self {
        Self { inner }
    }

    /// The next frame.
    #[expect(clippy::should_implement_trait, reason = "each call names the type it reads; an iterator has only one")]
    pub fn next<T: DeserializeOwned>(&mut self) -> Result<T, TransportError> {
        let mut header = [0u8; LENGTH_BYTES];
        let mut filled = 0;
        while filled < LENGTH_BYTES {
            match self.inner.read(&mut header[filled..]) {
                Ok(0) if filled == 0 => return Err(TransportError::Closed),
                Ok(0) => return Err(TransportError::Truncated),
                Ok(n) => filled += n,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(TransportError::reading(error)),
            }
        }
        let mut body = vec![0u8; checked_len(header)?];
        self.inner.read_exact(&mut body).map_err(TransportError::reading)?;
        Ok(rmp_serde::from_slice(&body)?)
    }
}

/// Writes frames and blocks meanwhile: the child's side.
#[derive(Debug)]
pub struct BlockingWriter<W> {
    inner: W,
    buffer: Vec<u8>,
}

impl<W: Write> BlockingWriter<W> {
    pub fn new(inner: W) -> Self {
        Self { inner, buffer: Vec::new() }
    }

    pub fn send<T: Serialize>(&mut self, value: &T) -> Result<(), TransportError> {
        encode(value, &mut self.buffer)?;
        self.inner.write_all(&self.buffer).map_err(TransportError::writing)?;
        if self.buffer.capacity() > KEEP_BUFFER_BYTES {
            self.buffer = Vec::new();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream as StdStream;

    use bytes::Bytes;
    use voxfleet_schema::audio::RawEntry;

    use super::*;
    use crate::ipc::{EntryFor, FromEngine, ToEngine};

    fn entry(len: usize) -> ToEngine {
        ToEngine::Entry(EntryFor {
            handle: 3,
            entry: RawEntry {
                seq: 9,
                headers: vec![("Asr-Seq".to_owned(), "0".to_owned())],
                payload: Bytes::from(vec![7u8; len]),
            },
        })
    }

    #[tokio::test]
    async fn frames_cross_between_async_and_blocking() {
        let (ours, theirs) = tokio::net::UnixStream::pair().expect("pair");
        let child = std::thread::spawn(move || {
            let theirs = theirs.into_std().expect("std");
            theirs.set_nonblocking(false).expect("blocking");
            let mut reader = BlockingReader::new(theirs.try_clone().expect("clone"));
            let mut writer = BlockingWriter::new(theirs);
            let got: ToEngine = reader.next().expect("frame");
            writer.send(&FromEngine::Consumed { handle: 3, bytes: 4_000_000 }).expect("answer");
            assert!(matches!(reader.next::<ToEngine>(), Err(TransportError::Closed)));
            got
        });
        let (read, write) = ours.into_split();
        let (mut reader, mut writer) = (AsyncReader::new(read), AsyncWriter::new(write));
        writer.send(&entry(4_000_000)).await.expect("send");
        let answer: FromEngine = reader.next().await.expect("answer");
        assert_eq!(answer, FromEngine::Consumed { handle: 3, bytes: 4_000_000 });
        drop((reader, writer));
        assert_eq!(child.join().expect("child"), entry(4_000_000));
    }

    #[test]
    fn audio_is_not_encoded_number_by_number() {
        let mut buffer = Vec::new();
        encode(&entry(100_000), &mut buffer).expect("encode");
        assert!(buffer.len() < 100_200, "{} bytes", buffer.len());
    }

    #[tokio::test]
    async fn frames_over_the_limit_are_refused_on_both_sides() {
        let mut sink = Vec::new();
        let oversize = entry(MAX_FRAME_BYTES);
        assert!(matches!(BlockingWriter::new(&mut sink).send(&oversize), Err(TransportError::TooLarge { .. })));
        assert!(sink.is_empty(), "nothing of it was written");
        assert!(matches!(
            AsyncWriter::new(tokio::io::sink()).send(&oversize).await,
            Err(TransportError::TooLarge { .. })
        ));

        let mut claimed = (u32::MAX).to_le_bytes().to_vec();
        claimed.extend_from_slice(b"x");
        let read = BlockingReader::new(claimed.as_slice()).next::<ToEngine>();
        assert!(matches!(read, Err(TransportError::TooLarge { len }) if len == u32::MAX as usize));
        assert!(matches!(
            AsyncReader::new(claimed.as_slice()).next::<ToEngine>().await,
            Err(TransportError::TooLarge { .. })
        ));
    }

    #[tokio::test]
    async fn truncated_and_garbage_frames_are_typed() {
        let mut whole = Vec::new();
        encode(&entry(10), &mut whole).expect("encode");
        for cut in [1, 3, 4, whole.len() - 1] {
            let part = &whole[..cut];
            assert!(matches!(BlockingReader::new(part).next::<ToEngine>(), Err(TransportError::Truncated)), "{cut}");
            assert!(matches!(AsyncReader::new(part).next::<ToEngine>().await, Err(TransportError::Truncated)), "{cut}");
        }
        let garbage = [5, 0, 0, 0, 0xc1, 0xff, 0x00, 0x13, 0x37];
        assert!(matches!(BlockingReader::new(garbage.as_slice()).next::<ToEngine>(), Err(TransportError::Decode(_))));
        assert!(matches!(
            AsyncReader::new(garbage.as_slice()).next::<ToEngine>().await,
            Err(TransportError::Decode(_))
        ));
        assert!(matches!(BlockingReader::new([].as_slice()).next::<ToEngine>(), Err(TransportError::Closed)));
    }

    #[test]
    fn writing_to_a_dead_peer_says_closed() {
        let (ours, theirs) = StdStream::pair().expect("pair");
        drop(theirs);
        let mut writer = BlockingWriter::new(ours);
        assert!(matches!(writer.send(&entry(10)), Err(TransportError::Closed)));
    }
}
