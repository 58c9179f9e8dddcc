//! Binary messages of one socket on their way to its [`uplink`](super::uplink): samples as they are, recordings of a
//! browser's recorder through a decoder in a process of its own, since they are bytes of strangers.

use std::{fs::File, sync::Arc, time::Duration};

use bytes::{BufMut as _, Bytes, BytesMut};
use tokio::{
    io::AsyncWriteExt as _,
    net::UnixStream,
    sync::{OwnedSemaphorePermit, mpsc, watch},
    time::{Instant, sleep, sleep_until, timeout},
};
use tokio_util::{
    sync::{CancellationToken, DropGuard},
    task::TaskTracker,
};
use voxfleet_audio::{
    Chunk, Limits,
    process::DecoderProcess,
    spawner::{SpawnError, is_all_read, socketpair},
};
use voxfleet_schema::{
    audio::{AudioFormat, Encoding},
    failure::{Failure, FailureClass},
};

use super::{
    super::limits::SocketLimits,
    Places,
    frames::{Content, Frames, Head, Pace},
    pieces::Inlet,
    uplink::Audio,
};

/// Longest live recording; a recorder that runs on for longer starts a new one.
const MAX_RECORDING_S: u64 = 12 * 3_600;
/// Of a decoder's process. It holds a cluster or two.
const DECODER_MEMORY_MB: u64 = 256;
/// A decoder that leaves what there is unread for so long and says nothing, while it is listened to, hangs.
const HANGS: Duration = Duration::from_secs(30);
/// How often that is looked at.
const LOOK: Duration = Duration::from_secs(1);
/// For what its client had sent when he left.
const LAST_AUDIO: Duration = Duration::from_secs(2);
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
    Recording(Recorder),
    /// There is nowhere for it to go.
    Closed,
}

/// A recording's decoder, seen from its input. Decoding ends soon after this is gone.
struct Recorder {
    input: UnixStream,
    /// Since when somebody waits for what it says; none while what it said is being taken.
    listening: watch::Receiver<Option<Instant>>,
    /// Since when there has been something to read.
    unread: Option<Instant>,
    /// The input's end has been said, which is something to read too.
    over: bool,
    look_at: Instant,
    _gone: DropGuard,
}

impl Recorder {
    /// Waits until it does; for ever while it does its work.
    async fn hangs(&mut self) -> Failure {
        loop {
            sleep_until(self.look_at).await;
            let now = Instant::now();
            self.look_at = now + LOOK;
            // A socket that cannot be asked is broken, which its writer learns.
            let all_read = !self.over && is_all_read(&self.input).unwrap_or(true);
            self.unread = if all_read { None } else { self.unread.or(Some(now)) };
            if hangs(*self.listening.borrow(), self.unread, now) {
                return hung();
            }
        }
    }

    /// Gives it more; waits while what it says is being taken.
    async fn write(&mut self, bytes: &[u8]) -> Result<(), Broken> {
        let Self { input, listening, unread, .. } = self;
        let written = input.write_all(bytes);
        tokio::pin!(written);
        loop {
            tokio::select! {
                written = &mut written => return written.map_err(|_| Broken::Ended),
                () = sleep(LOOK) => {
                    let now = Instant::now();
                    let since = *unread.get_or_insert(now);
                    if hangs(*listening.borrow(), Some(since), now) {
                        return Err(Broken::Hung(hung()));
                    }
                }
            }
        }
    }
}

/// Why a decoder takes nothing more.
enum Broken {
    Ended,
    Hung(Failure),
}

/// Pure: only time in which it could have read, and somebody would have heard it, counts.
fn hangs(listening: Option<Instant>, unread: Option<Instant>, now: Instant) -> bool {
    listening.zip(unread).is_some_and(|(listening, unread)| now >= listening.max(unread) + HANGS)
}

fn hung() -> Failure {
    let message = format!("the recording's decoder did nothing for {} s and was ended", HANGS.as_secs());
    Failure::new(FailureClass::Timeout, message)
}

pub(crate) struct Intake {
    way: Way,
    format: AudioFormat,
    pace: Pace,
    /// Given away to the decoder where there is one.
    audio: Option<Inlet>,
    failed: mpsc::Sender<Failure>,
    failures: mpsc::Receiver<Failure>,
    places: Places,
    tasks: TaskTracker,
}

impl Intake {
    pub(crate) fn new(format: AudioFormat, audio: Inlet, places: Places, tasks: TaskTracker) -> Self {
        let (failed, failures) = mpsc::channel(1);
        let pace = Pace::new(format, &places.limits, Instant::now());
        Self { way: Way::Unknown(Head::default()), format, pace, audio: Some(audio), failed, failures, places, tasks }
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
                    (Some(sender), false) => sender.send(audio).await.map_err(|()| Trouble::Log),
                    (None, false) => Err(Trouble::Log),
                }
            }
            Way::Recording(recorder) => match recorder.write(&bytes).await {
                Ok(()) => Ok(()),
                // Why, it says itself.
                Err(Broken::Ended) => Err(self.why().await),
                Err(Broken::Hung(failure)) => Err(Trouble::Input(failure)),
            },
            Way::Unknown(_) | Way::Closed => Err(Trouble::Log),
        }
    }

    /// Why the decoder takes nothing more. Waits for it; in itself for ever.
    pub(crate) async fn failure(&mut self) -> Failure {
        let recorder = match &mut self.way {
            Way::Recording(recorder) => Some(recorder),
            _ => None,
        };
        failure_of(&mut self.failures, recorder).await
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
        let mut recorder = None;
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
                let _ = decoder.input.shutdown().await;
                decoder.over = true;
                recorder = Some(decoder);
            }
            Way::Samples(_) | Way::Closed => {}
        }
        let Self { failures, .. } = self;
        Last { failures, recorder }
    }

    async fn way_of(&mut self, content: Content) -> Result<Way, Trouble> {
        match content {
            Content::Samples => Ok(Way::Samples(Frames::new(self.format))),
            Content::Container(name) => {
                tracing::debug!(container = name, "a recorder sends");
                let permit = self.places.recorders.clone().try_acquire_owned().map_err(|_| Trouble::Busy)?;
                let audio = self.audio.take().ok_or(Trouble::Log)?;
                let (input, theirs) = socketpair().map_err(|error| Trouble::Input(not_started(&error)))?;
                let now = Instant::now();
                let (told, listening) = watch::channel(Some(now));
                let gone = CancellationToken::new();
                let work = Work {
                    from: File::from(theirs),
                    audio,
                    listening: told,
                    limits: self.places.limits.clone(),
                    _permit: permit,
                };
                self.tasks.spawn(decode(work, self.failed.clone(), gone.clone()));
                let (_gone, look_at) = (gone.drop_guard(), now + LOOK);
                Ok(Way::Recording(Recorder { input, listening, unread: None, over: false, look_at, _gone }))
            }
        }
    }
}

/// What a decoder still has to say after its input's end.
pub(crate) struct Last {
    failures: mpsc::Receiver<Failure>,
    recorder: Option<Recorder>,
}

impl Last {
    /// A failure; for ever where it ends well, or there is none.
    pub(crate) async fn failure(&mut self) -> Failure {
        failure_of(&mut self.failures, self.recorder.as_mut()).await
    }
}

/// What a decoder says went wrong, or that it says nothing where it should; for ever where neither is so.
async fn failure_of(failures: &mut mpsc::Receiver<Failure>, recorder: Option<&mut Recorder>) -> Failure {
    let said = async {
        match failures.recv().await {
            Some(failure) => failure,
            None => std::future::pending().await,
        }
    };
    match recorder {
        None => said.await,
        Some(recorder) => tokio::select! {
            biased;
            failure = said => failure,
            failure = recorder.hangs() => failure,
        },
    }
}

fn not_started(error: &SpawnError) -> Failure {
    Failure::new(FailureClass::Internal, format!("the decoder cannot be started: {error}"))
}

/// What a decoder needs; its place is free with it.
struct Work {
    from: File,
    audio: Inlet,
    listening: watch::Sender<Option<Instant>>,
    limits: Arc<SocketLimits>,
    _permit: OwnedSemaphorePermit,
}

/// Decodes until the recording's end, as fast as its audio is taken, and no longer than a moment for nobody.
async fn decode(work: Work, failed: mpsc::Sender<Failure>, gone: CancellationToken) {
    let left = async {
        gone.cancelled().await;
        sleep(LAST_AUDIO).await;
    };
    tokio::select! {
        decoded = decoded(work) => if let Err(failure) = decoded {
            // One is enough.
            let _ = failed.try_send(failure);
        },
        () = left => tracing::debug!("a recording was not decoded to its end: its client has left"),
    }
}

async fn decoded(work: Work) -> Result<(), Failure> {
    let limits = Limits {
        max_seconds: MAX_RECORDING_S,
        memory_mb: DECODER_MEMORY_MB,
        // It waits for somebody who speaks: its silence counts only while it leaves something unread, which is seen from there.
        stall: Duration::from_secs(MAX_RECORDING_S),
    };
    let mut decoder = DecoderProcess::start(None, work.from, None, limits).await?;
    let mut format = decoder.format();
    let mut pace = Pace::new(narrow(format), &work.limits, Instant::now());
    loop {
        work.listening.send_replace(Some(Instant::now()));
        let Some(Chunk { format: changed, pcm }) = decoder.next().await? else { break };
        work.listening.send_replace(None);
        format = changed.unwrap_or(format);
        let bytes = narrowed(format, pcm);
        sleep(pace.spend(bytes.len(), Instant::now())).await;
        if work.audio.send(Audio { format: narrow(format), bytes }).await.is_err() {
            break;
        }
    }
    work.listening.send_replace(None);
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
    use super::{
        super::pieces::{Outlet, channel},
        *,
    };

    fn intake(format: AudioFormat) -> (Intake, Outlet) {
        let (send, audio) = channel();
        let places = Places::new(SocketLimits { max_recorders: 0, ..SocketLimits::default() });
        (Intake::new(format, send, places, TaskTracker::new()), audio)
    }

    #[tokio::test]
    async fn odd_messages_lose_nothing_but_half_a_frame_at_the_end() {
        let bytes: Vec<u8> = (0..1_001u32).map(|n| (n % 251) as u8).collect();
        for size in [1, 7, 333, 1_001] {
            let (mut intake, mut audio) = intake(AudioFormat::default());
            let mut said = Vec::new();
            for part in bytes.chunks(size) {
                intake.take(Bytes::copy_from_slice(part)).await.expect("taken");
                while let Some(piece) = audio.try_recv() {
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

    /// A decoder of which only the input is there, and what listens to it.
    fn recorder() -> (Recorder, std::os::unix::net::UnixStream, watch::Sender<Option<Instant>>, CancellationToken) {
        let (input, theirs) = socketpair().expect("a pair");
        let (told, listening) = watch::channel(Some(Instant::now()));
        let gone = CancellationToken::new();
        let (_gone, look_at) = (gone.clone().drop_guard(), Instant::now());
        let recorder = Recorder { input, listening, unread: None, over: false, look_at, _gone };
        (recorder, theirs.into(), told, gone)
    }

    #[test]
    fn only_time_in_which_it_could_have_read_and_been_heard_counts() {
        let begun = Instant::now();
        let at = |s: u64| begun + Duration::from_secs(s);
        for (listening, unread, now, expected) in [
            (Some(at(0)), None, at(9_999), false),
            (None, Some(at(0)), at(9_999), false),
            (Some(at(0)), Some(at(0)), at(29), false),
            (Some(at(0)), Some(at(0)), at(30), true),
            (Some(at(0)), Some(at(600)), at(629), false),
            (Some(at(600)), Some(at(0)), at(630), true),
        ] {
            assert_eq!(hangs(listening, unread, now), expected, "{listening:?} {unread:?} {now:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_decoder_that_reads_nothing_is_found_out_while_it_is_fed_and_after() {
        use std::io::Read as _;
        let quiet = Duration::from_secs(3_600);
        let (mut idle, _theirs, ..) = recorder();
        assert!(timeout(quiet, idle.hangs()).await.is_err(), "there is nothing to read");

        let (mut recorder, mut theirs, told, gone) = recorder();
        recorder.write(b"some").await.unwrap_or_else(|_| panic!("room"));
        let begun = Instant::now();
        assert_eq!(recorder.hangs().await.class, FailureClass::Timeout);
        assert!((30..33).contains(&begun.elapsed().as_secs()), "{:?}", begun.elapsed());
        theirs.read_exact(&mut [0; 4]).expect("there");
        assert!(timeout(quiet, recorder.hangs()).await.is_err(), "it has read all there is");

        // More than a socket holds, while what was decoded is not taken: then it may wait.
        let much = vec![0; 8 << 20];
        told.send_replace(None);
        assert!(timeout(quiet, recorder.write(&much)).await.is_err());
        told.send_replace(Some(Instant::now()));
        assert!(matches!(recorder.write(&much).await, Err(Broken::Hung(_))));

        drop(theirs);
        assert!(matches!(recorder.write(b"more").await, Err(Broken::Ended)));
        assert!(!gone.is_cancelled());
        drop(recorder);
        assert!(gone.is_cancelled(), "nobody decodes on for somebody who has left");
    }

    #[tokio::test(start_paused = true)]
    async fn an_end_that_is_not_read_is_a_hang_too() {
        let (mut recorder, _theirs, ..) = recorder();
        recorder.over = true;
        let (_send, failures) = mpsc::channel(1);
        let mut last = Last { failures, recorder: Some(recorder) };
        assert_eq!(last.failure().await.class, FailureClass::Timeout);
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
