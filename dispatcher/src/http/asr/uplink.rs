//! A socket's audio on its way into the log: one entry at a time, each acknowledged before the next, a failed one sent again
//! under the same message id. What comes meanwhile goes into the next entry, so a slow server makes entries longer and then
//! the socket wait; it never makes them fewer, and never changes their order.
//!
//! It outlives its socket: what was taken is logged, and then the end, whoever is gone by then.

use std::{sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use tokio::{sync::watch, time::Instant};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;
use voxfleet_nats::{
    Nats,
    log::{AudioLog, LogError},
    retry::Backoff,
};
use voxfleet_schema::{
    audio::{ASR_END, ASR_FORMAT, ASR_SEQ, ASR_SOURCE, AudioFormat, ChunkHeaders, RawEntry},
    failure::{Failure, FailureClass},
    id::{IdError, SourceId, StreamId},
    trace::{TRACEPARENT, TraceContext},
};

use super::pieces::Outlet;

/// Longest entry: two seconds of what most send, a third of one of the widest common format.
pub(crate) const ENTRY_BYTES: usize = 64 * 1024;
const TAKEN_OVER: &str =
    "somebody else speaks in this session now: another connection, or another producer, under the same id";
/// How long an entry is tried. A full log empties as its audio expires; nobody speaks on for longer than this unheard.
const GIVE_UP: Duration = Duration::from_secs(30);
/// The same while this process stops.
const LAST_TRY: Duration = Duration::from_secs(1);

/// Whole frames.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Audio {
    pub(crate) format: AudioFormat,
    pub(crate) bytes: Bytes,
}

/// What the log has of it, and what is known of its input.
#[derive(Debug, Clone, Default)]
pub(crate) struct Logged {
    /// Sequence of the last entry with audio.
    pub(crate) last_audio: Option<u64>,
    /// Sequence of the end.
    pub(crate) end: Option<u64>,
    /// Why the log takes no more of it.
    pub(crate) failed: Option<Failure>,
    /// The client sends nothing more, and why, where it did not say so itself.
    pub(crate) input_over: Option<&'static str>,
}

pub(crate) struct Uplink {
    log: AudioLog,
    id: StreamId,
    source: SourceId,
    /// Its client's, as it is written.
    trace: Option<String>,
    next: u64,
    /// The session's last entry that was ours, or nobody's; none before our first, which takes the session over.
    behind: Option<u64>,
    stop: CancellationToken,
}

impl Uplink {
    pub(crate) fn new(
        nats: &Nats,
        id: StreamId,
        trace: Option<TraceContext>,
        stop: CancellationToken,
    ) -> Result<Self, IdError> {
        // New for each socket, so that somebody who comes back is not taken for a repetition of himself.
        let source = SourceId::new(Uuid::new_v4().simple().to_string())?;
        Ok(Self {
            log: AudioLog::new(nats),
            id,
            source,
            trace: trace.map(|trace| trace.to_string()),
            next: 0,
            behind: None,
            stop,
        })
    }

    /// Logs what comes until nobody sends any more, then the end.
    pub(crate) async fn run(mut self, mut audio: Outlet, logged: Arc<watch::Sender<Logged>>) {
        let mut gathering = Gathering::default();
        let mut format = AudioFormat::default();
        while let Some(entry) = gathering.next(&mut audio).await {
            format = entry.format;
            match self.append(entry.format, entry.bytes, false).await {
                Ok(seq) => {
                    logged.send_modify(|logged| logged.last_audio = Some(seq));
                }
                Err(failure) => {
                    tracing::warn!(session = %self.id, %failure, "audio of a socket was not logged");
                    logged.send_modify(|logged| logged.failed = Some(failure));
                    // Whoever sends more learns it at once.
                    audio.close();
                    break;
                }
            }
        }
        match self.append(format, Bytes::new(), true).await {
            Ok(seq) => {
                logged.send_modify(|logged| logged.end = Some(seq));
            }
            // Then it ends as one that says nothing any more.
            Err(failure) => {
                tracing::warn!(session = %self.id, %failure, "the end of a socket's session was not logged");
                logged.send_modify(|logged| {
                    logged.failed.get_or_insert(failure);
                });
            }
        }
    }

    async fn append(&mut self, format: AudioFormat, payload: Bytes, end: bool) -> Result<u64, Failure> {
        let number = self.next;
        let (seq, msg_id) = (number.to_string(), format!("{}:{}:{number}", self.id, self.source));
        let format = format.to_string();
        let mut headers =
            vec![(ASR_SEQ, seq.as_str()), (ASR_SOURCE, self.source.as_str()), (ASR_FORMAT, format.as_str())];
        headers.extend(self.trace.as_deref().map(|trace| (TRACEPARENT, trace)));
        if end {
            headers.push((ASR_END, "1"));
        }
        let begun = Instant::now();
        let mut backoff = Backoff::default();
        loop {
            let attempted = match self.attempt(&headers, &payload, &msg_id).await {
                Err(LogError::Conflict) => self.after_conflict(number).await,
                attempted => attempted.map(Found::Stored),
            };
            let error = match attempted {
                Ok(Found::Stored(seq)) => {
                    self.next += 1;
                    self.behind = Some(seq);
                    return Ok(seq);
                }
                Ok(Found::TakenOver) => return Err(Failure::new(FailureClass::StaleSource, TAKEN_OVER)),
                Ok(Found::MovedOn { behind }) => {
                    self.behind = behind;
                    LogError::Conflict
                }
                Err(error) => error,
            };
            let patience = if self.stop.is_cancelled() { LAST_TRY } else { GIVE_UP };
            if !may_pass(&error) || begun.elapsed() >= patience {
                return Err(failure_of(&error));
            }
            tracing::debug!(session = %self.id, number, %error, "chunk not acknowledged, sending it again");
            tokio::select! {
                () = backoff.wait() => {}
                () = self.stop.cancelled(), if begun.elapsed() >= LAST_TRY => {}
            }
        }
    }

    async fn attempt(&self, headers: &[(&str, &str)], payload: &Bytes, msg_id: &str) -> Result<u64, LogError> {
        let pending = self.log.offer(&self.id, headers, payload.clone(), Some(msg_id), self.behind).await?;
        Ok(pending.stored().await?.seq)
    }

    /// Something stands behind our last entry that we did not know of. Ours: where it stands. Nobody's, such as a dispatcher's
    /// flush: we go on behind it. Another source's: the session is its now, and what we would add would be dropped.
    async fn after_conflict(&self, number: u64) -> Result<Found, LogError> {
        let mut from = self.behind.map_or(1, |seq| seq + 1);
        let mut behind = None;
        while let Some(entry) = self.log.next(&self.id, from).await? {
            match between(&entry, &self.source, number) {
                Between::Ours => return Ok(Found::Stored(entry.seq)),
                Between::Somebodys => return Ok(Found::TakenOver),
                Between::Nobodys => behind = Some(entry.seq),
            }
            from = entry.seq + 1;
        }
        if behind.is_none() && self.log.last(&self.id).await?.is_none() {
            // All of it has expired, or was purged.
            behind = Some(0);
        }
        Ok(Found::MovedOn { behind: behind.or(self.behind) })
    }
}

/// What an attempt came to.
#[derive(Debug, PartialEq, Eq)]
enum Found {
    Stored(u64),
    /// There is another last entry, behind which the same goes again; as before where a replica does not know of it yet.
    MovedOn {
        behind: Option<u64>,
    },
    TakenOver,
}

/// Whose an entry is that stands behind our last one.
#[derive(Debug, PartialEq, Eq)]
enum Between {
    /// The one that we are writing: it had been stored.
    Ours,
    Nobodys,
    Somebodys,
}

fn between(entry: &RawEntry, own: &SourceId, number: u64) -> Between {
    match ChunkHeaders::of(entry) {
        Ok(ChunkHeaders { source: Some(source), seq, .. }) if source == *own => match seq == Some(number) {
            true => Between::Ours,
            // An earlier one, whose answer was lost.
            false => Between::Nobodys,
        },
        Ok(ChunkHeaders { source: Some(_), .. }) => Between::Somebodys,
        // What breaks its syntax changes nothing.
        Ok(_) | Err(_) => Between::Nobodys,
    }
}

/// Whether the same entry may be taken later.
fn may_pass(error: &LogError) -> bool {
    match error {
        // The fence has been moved.
        LogError::Full | LogError::Conflict => true,
        LogError::Server(error) => error.is_transient(),
        LogError::TooLarge | LogError::BadHeader { .. } => false,
    }
}

fn failure_of(error: &LogError) -> Failure {
    let class = match error {
        LogError::TooLarge => FailureClass::TooLarge,
        LogError::Full | LogError::Server(_) => FailureClass::Unavailable,
        LogError::Conflict | LogError::BadHeader { .. } => FailureClass::Internal,
    };
    Failure::new(class, error.to_string())
}

/// Makes entries of pieces: as much as has come, of one format, up to [`ENTRY_BYTES`].
#[derive(Debug, Default)]
struct Gathering {
    held: Option<Audio>,
}

impl Gathering {
    /// None: nobody sends any more, and everything has been given.
    async fn next(&mut self, audio: &mut Outlet) -> Option<Audio> {
        let first = match self.held.take() {
            Some(held) => held,
            None => audio.recv().await?,
        };
        let most = ENTRY_BYTES - ENTRY_BYTES % first.format.frame_bytes().max(1);
        let Audio { format, mut bytes } = first;
        if bytes.len() > most {
            self.held = Some(Audio { format, bytes: bytes.split_off(most) });
            return Some(Audio { format, bytes });
        }
        let mut more: Option<BytesMut> = None;
        while let Some(next) = audio.try_recv() {
            let len = more.as_ref().map_or(bytes.len(), BytesMut::len);
            if next.format != format || len + next.bytes.len() > most {
                self.held = Some(next);
                break;
            }
            more.get_or_insert_with(|| BytesMut::from(bytes.as_ref())).extend_from_slice(&next.bytes);
        }
        Some(Audio { format, bytes: more.map_or(bytes, BytesMut::freeze) })
    }
}

#[cfg(test)]
mod tests {
    use super::{super::pieces::channel, *};

    fn piece(rate_hz: u32, len: usize, byte: u8) -> Audio {
        Audio { format: AudioFormat { rate_hz, ..AudioFormat::default() }, bytes: Bytes::from(vec![byte; len]) }
    }

    #[tokio::test]
    async fn what_waits_becomes_one_entry_and_nothing_changes_its_place() {
        let (send, mut audio) = channel();
        let pieces = [
            piece(16_000, 640, 1),
            piece(16_000, 640, 2),
            piece(8_000, 320, 3),
            piece(8_000, 3 * ENTRY_BYTES + 2, 4),
            piece(8_000, 2, 5),
        ];
        for piece in pieces.clone() {
            send.send(piece).await.expect("room");
        }
        drop(send);
        let (mut gathering, mut entries) = (Gathering::default(), Vec::new());
        while let Some(entry) = gathering.next(&mut audio).await {
            entries.push(entry);
        }
        let lengths: Vec<usize> = entries.iter().map(|entry| entry.bytes.len()).collect();
        assert_eq!(lengths, [1_280, 320, ENTRY_BYTES, ENTRY_BYTES, ENTRY_BYTES, 4]);
        let rates: Vec<u32> = entries.iter().map(|entry| entry.format.rate_hz).collect();
        assert_eq!(rates, [16_000, 8_000, 8_000, 8_000, 8_000, 8_000]);
        let all = |pieces: &[Audio]| pieces.iter().flat_map(|piece| piece.bytes.to_vec()).collect::<Vec<u8>>();
        assert_eq!(all(&entries), all(&pieces));
    }

    #[tokio::test]
    async fn entries_of_odd_frames_are_cut_at_whole_ones() {
        let (send, mut audio) = channel();
        let format = AudioFormat { channels: 3, ..AudioFormat::default() };
        send.send(Audio { format, bytes: Bytes::from(vec![0; 6 * ENTRY_BYTES]) }).await.expect("room");
        drop(send);
        let mut gathering = Gathering::default();
        while let Some(entry) = gathering.next(&mut audio).await {
            assert_eq!(entry.bytes.len() % 6, 0);
        }
    }

    #[test]
    fn only_another_source_takes_a_session_over() {
        let own = SourceId::new("own").expect("id");
        let entry = |headers: &[(&str, &str)], payload: &'static [u8]| RawEntry {
            seq: 9,
            headers: headers.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect(),
            payload: Bytes::from_static(payload),
        };
        for (headers, payload, expected) in [
            (&[(ASR_SOURCE, "own"), (ASR_SEQ, "7")][..], &[0u8, 0][..], Between::Ours),
            (&[(ASR_SOURCE, "own"), (ASR_SEQ, "6")], &[0, 0], Between::Nobodys),
            (&[(ASR_SOURCE, "other"), (ASR_SEQ, "0")], &[0, 0], Between::Somebodys),
            (&[(ASR_SOURCE, "other"), (ASR_SEQ, "1"), (ASR_END, "1")], &[], Between::Somebodys),
            (&[(ASR_END, "1")], &[], Between::Nobodys),
            (&[("Asr-Flush", "1")], &[], Between::Nobodys),
            (&[], &[0, 0], Between::Nobodys),
            (&[], &[], Between::Nobodys),
        ] {
            assert_eq!(between(&entry(headers, payload), &own, 7), expected, "{headers:?}");
        }
    }

    #[test]
    fn only_what_may_pass_is_tried_again() {
        use voxfleet_nats::ServerError;
        assert!(may_pass(&LogError::Full) && may_pass(&LogError::Server(ServerError::Timeout)));
        assert!(!may_pass(&LogError::TooLarge) && !may_pass(&LogError::Server(ServerError::Closed)));
    }
}
