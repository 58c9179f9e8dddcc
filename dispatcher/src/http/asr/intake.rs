//! Binary messages of one socket on their way to its [`uplink`](super::uplink): samples as they are, recordings of a
//! browser's recorder through a decoder in a process of its own, since they are bytes of strangers.

use std::{fs::File, sync::Arc, time::Duration};

use bytes::{BufMut as _, Bytes, BytesMut};
use tokio::{
    io::AsyncWriteExt as _,
    net::UnixStream,
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    time::{Instant, sleep, timeout},
};
use tokio_util::task::TaskTracker;
use voxfleet_audio::{
    Chunk, Limits,
    process::DecoderProcess,
    spawner::{SpawnError, socketpair},
};
use voxfleet_schema::{
    audio::{AudioFormat, Encoding},
    failure::{Failure, FailureClass},
};

use super::{
    frames::{Content, Frames, Head, Pace},
    uplink::Audio,
};

/// Longest live recording; a recorder that runs on for longer starts a new one.
const MAX_RECORDING_S: u64 = 12 * 3_600;
/// Of a decoder's process. It holds a cluster or two.
const DECODER_MEMORY_MB: u64 = 256;
/// A decoder that takes no bytes for so long, while its audio is taken, hangs.
const FEED: Duration = Duration::from_secs(60);
/// Between a decoder's end and what it says of it.
const LAST_WORD: Duration = Duration::from_secs(1);

/// Why nothing more is taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Trouble {
    /// The log takes nothing more; it says why itself.
    Log,
    /// What came is no audio that can be used here.
    Input(Failure),
    /// As many recorders as this process decodes for.
    Busy,
    /// The recording has an end of its own, and more came behind it.
    Ended,
}

enum Way {
    Unknown(Head),
    Samples(Frames),
    Recording(UnixStream),
    /// There is nowhere for it to go.
    Closed,
}

pub(crate) struct Intake {
    way: Way,
    format: AudioFormat,
    pace: Pace,
    /// Given away to the decoder where there is one.
    audio: Option<mpsc::Sender<Audio>>,
    failed: mpsc::Sender<Failure>,
    failures: mpsc::Receiver<Failure>,
    recorders: Arc<Semaphore>,
    tasks: TaskTracker,
}

impl Intake {
    pub(crate) fn new(
        format: AudioFormat,
        audio: mpsc::Sender<Audio>,
        recorders: Arc<Semaphore>,
        tasks: TaskTracker,
    ) -> Self {
        let (failed, failures) = mpsc::channel(1);
        let pace = Pace::new(format, Instant::now());
        Self {
            way: Way::Unknown(Head::default()),
            format,
            pace,
            audio: Some(audio),
            failed,
            failures,
            recorders,
            tasks,
        }
    }

    /// Takes one message; waits while the log does, or while the sender is too fast.
    pub(crate) async fn take(&mut self, bytes: Bytes) -> Result<(), Trouble> {
        let bytes = match &mut self.way {
            Way::Unknown(head) => {
                let Some((content, all)) = head.push(bytes) else { return Ok(()) };
                self.way = self.way_of(content).await?;
                all
            }
            _ => bytes,
        };
        match &mut self.way {
            Way::Samples(frames) => {
                let whole = frames.push(bytes);
                let wait = self.pace.spend(whole.len(), Instant::now());
                sleep(wait).await;
                let audio = Audio { format: self.format, bytes: whole };
                match (&self.audio, audio.bytes.is_empty()) {
                    (_, true) => Ok(()),
                    (Some(sender), false) => sender.send(audio).await.map_err(|_| Trouble::Log),
                    (None, false) => Err(Trouble::Log),
                }
            }
            Way::Recording(decoder) => match timeout(FEED, decoder.write_all(&bytes)).await {
                Ok(Ok(())) => Ok(()),
                // It ended; why, it says itself.
                Ok(Err(_)) => Err(self.why().await),
                Err(_) => Err(Trouble::Input(Failure::new(FailureClass::Timeout, "the recording's decoder hangs"))),
            },
            Way::Unknown(_) | Way::Closed => Err(Trouble::Log),
        }
    }

    /// Why the decoder takes nothing more. Waits for it; in itself for ever.
    pub(crate) async fn failure(&mut self) -> Failure {
        match self.failures.recv().await {
            Some(failure) => failure,
            // Never: a sender is kept here.
            None => std::future::pending().await,
        }
    }

    async fn why(&mut self) -> Trouble {
        match timeout(LAST_WORD, self.failures.recv()).await {
            Ok(Some(failure)) => Trouble::Input(failure),
            // It ended well, or its audio was not taken, which the log says itself.
            Ok(None) | Err(_) => Trouble::Ended,
        }
    }

    /// Nothing more comes: what is left is handed on. Answers with what waits for a decoder's last word.
    pub(crate) async fn finish(mut self) -> Last {
        match std::mem::replace(&mut self.way, Way::Closed) {
            Way::Unknown(head) => {
                let whole = Frames::new(self.format).push(head.finish());
                if let Some(sender) = self.audio.take().filter(|_| !whole.is_empty()) {
                    // A log that takes no more says so itself.
                    let _ = sender.send(Audio { format: self.format, bytes: whole }).await;
                }
            }
            Way::Recording(mut decoder) => {
                // It reads to the end of what it has.
                let _ = decoder.shutdown().await;
            }
            Way::Samples(_) | Way::Closed => {}
        }
        let Self { failures, .. } = self;
        Last { failures }
    }

    async fn way_of(&mut self, content: Content) -> Result<Way, Trouble> {
        match content {
            Content::Samples => Ok(Way::Samples(Frames::new(self.format))),
            Content::Container(name) => {
                tracing::debug!(container = name, "a recorder sends");
                let permit = self.recorders.clone().try_acquire_owned().map_err(|_| Trouble::Busy)?;
                let audio = self.audio.take().ok_or(Trouble::Log)?;
                let (ours, theirs) = socketpair().map_err(|error| Trouble::Input(not_started(&error)))?;
                self.tasks.spawn(decode(File::from(theirs), audio, self.failed.clone(), permit));
                Ok(Way::Recording(ours))
            }
        }
    }
}

/// What a decoder still has to say after its input's end.
pub(crate) struct Last {
    failures: mpsc::Receiver<Failure>,
}

impl Last {
    /// A failure; for ever where it ends well, or there is none.
    pub(crate) async fn failure(&mut self) -> Failure {
        match self.failures.recv().await {
            Some(failure) => failure,
            None => std::future::pending().await,
        }
    }
}

fn not_started(error: &SpawnError) -> Failure {
    Failure::new(FailureClass::Internal, format!("the decoder cannot be started: {error}"))
}

/// Decodes until the recording's end, as fast as its audio is taken.
async fn decode(from: File, audio: mpsc::Sender<Audio>, failed: mpsc::Sender<Failure>, permit: OwnedSemaphorePermit) {
    if let Err(failure) = decoded(from, audio).await {
        // One is enough.
        let _ = failed.try_send(failure);
    }
    drop(permit);
}

async fn decoded(from: File, audio: mpsc::Sender<Audio>) -> Result<(), Failure> {
    let limits = Limits {
        max_seconds: MAX_RECORDING_S,
        memory_mb: DECODER_MEMORY_MB,
        // It waits for somebody who speaks: silence of the decoder is none of its own.
        stall: Duration::from_secs(MAX_RECORDING_S),
    };
    let mut decoder = DecoderProcess::start(None, from, None, limits).await?;
    let mut format = decoder.format();
    let mut pace = Pace::new(narrow(format), Instant::now());
    while let Some(Chunk { format: changed, pcm }) = decoder.next().await? {
        format = changed.unwrap_or(format);
        let bytes = narrowed(format, pcm);
        sleep(pace.spend(bytes.len(), Instant::now())).await;
        if audio.send(Audio { format: narrow(format), bytes }).await.is_err() {
            break;
        }
    }
    decoder.stop().await;
    Ok(())
}

fn narrow(format: AudioFormat) -> AudioFormat {
    AudioFormat { encoding: Encoding::PcmS16Le, ..format }
}

/// Sixteen bits: more than a recorder's codec keeps, and half the room in the log.
fn narrowed(format: AudioFormat, pcm: Bytes) -> Bytes {
    match format.encoding {
        Encoding::PcmS16Le => pcm,
        Encoding::PcmF32Le => {
            let mut narrow = BytesMut::with_capacity(pcm.len() / 2);
            for sample in pcm.chunks_exact(4) {
                let sample = f32::from_le_bytes([sample[0], sample[1], sample[2], sample[3]]);
                // Saturates, and what is no number is silence.
                narrow.put_i16_le((sample * 32_768.0).round() as i16);
            }
            narrow.freeze()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn intake(format: AudioFormat) -> (Intake, mpsc::Receiver<Audio>) {
        let (send, audio) = mpsc::channel(64);
        (Intake::new(format, send, Arc::new(Semaphore::new(0)), TaskTracker::new()), audio)
    }

    #[tokio::test]
    async fn odd_messages_lose_nothing_but_half_a_frame_at_the_end() {
        let bytes: Vec<u8> = (0..1_001u32).map(|n| (n % 251) as u8).collect();
        for size in [1, 7, 333, 1_001] {
            let (mut intake, mut audio) = intake(AudioFormat::default());
            let mut said = Vec::new();
            for part in bytes.chunks(size) {
                intake.take(Bytes::copy_from_slice(part)).await.expect("taken");
                while let Ok(piece) = audio.try_recv() {
                    said.extend_from_slice(&piece.bytes);
                }
            }
            intake.finish().await;
            while let Some(piece) = audio.recv().await {
                said.extend_from_slice(&piece.bytes);
            }
            assert_eq!(said, bytes[..1_000], "{size}");
        }
    }

    #[tokio::test]
    async fn a_few_bytes_in_all_are_still_samples() {
        let (mut intake, mut audio) = intake(AudioFormat::default());
        intake.take(Bytes::from_static(&[1, 2, 3])).await.expect("taken");
        intake.finish().await;
        assert_eq!(audio.recv().await.map(|piece| piece.bytes), Some(Bytes::from_static(&[1, 2])));
    }

    #[tokio::test]
    async fn a_recorder_without_a_place_is_told() {
        let (mut intake, _audio) = intake(AudioFormat::default());
        let webm = Bytes::from_static(&[0x1a, 0x45, 0xdf, 0xa3, 0, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(intake.take(webm).await, Err(Trouble::Busy));
    }

    #[test]
    fn wide_samples_become_narrow_ones() {
        let format = AudioFormat { encoding: Encoding::PcmF32Le, ..AudioFormat::default() };
        let wide: Vec<u8> = [0.0f32, 1.0, -1.0, 0.5, 7.0, f32::NAN].iter().flat_map(|s| s.to_le_bytes()).collect();
        let narrow: Vec<i16> =
            narrowed(format, wide.into()).chunks(2).map(|pair| i16::from_le_bytes([pair[0], pair[1]])).collect();
        assert_eq!(narrow, [0, i16::MAX, i16::MIN, 16_384, i16::MAX, 0]);
        assert_eq!(narrowed(AudioFormat::default(), Bytes::from_static(b"ab")), Bytes::from_static(b"ab"));
    }
}
