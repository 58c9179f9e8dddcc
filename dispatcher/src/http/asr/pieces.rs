//! What waits between a socket and the log, bounded by its bytes: a page that sends a hundred little messages while one entry
//! is on its way must not wait for ninety-six of them.

use std::sync::Arc;

use tokio::sync::{Semaphore, mpsc};

use super::uplink::Audio;

/// Bytes that wait before the socket does: some entries of the longest.
const ROOM: u32 = 512 * 1024;
/// And messages, however small: each takes some room of its own.
const MOST: usize = 4_096;

pub(crate) fn channel() -> (Inlet, Outlet) {
    let (sender, receiver) = mpsc::channel(MOST);
    let room = Arc::new(Semaphore::new(ROOM as usize));
    (Inlet { pieces: sender, room: room.clone() }, Outlet { pieces: receiver, room })
}

/// Of one piece; one that is larger than all there is waits for all there is.
fn places(audio: &Audio) -> u32 {
    u32::try_from(audio.bytes.len()).unwrap_or(ROOM).min(ROOM)
}

pub(crate) struct Inlet {
    pieces: mpsc::Sender<Audio>,
    room: Arc<Semaphore>,
}

impl Inlet {
    /// Waits for room. An error: nobody takes it any more.
    pub(crate) async fn send(&self, audio: Audio) -> Result<(), ()> {
        let room = tokio::select! {
            room = self.room.acquire_many(places(&audio)) => room.map_err(drop)?,
            () = self.pieces.closed() => return Err(()),
        };
        self.pieces.send(audio).await.map_err(drop)?;
        // Given back when the piece is taken.
        room.forget();
        Ok(())
    }
}

pub(crate) struct Outlet {
    pieces: mpsc::Receiver<Audio>,
    room: Arc<Semaphore>,
}

impl Outlet {
    /// None: nobody sends any more, and everything has been taken.
    pub(crate) async fn recv(&mut self) -> Option<Audio> {
        let audio = self.pieces.recv().await?;
        Some(self.taken(audio))
    }

    /// What is there now.
    pub(crate) fn try_recv(&mut self) -> Option<Audio> {
        let audio = self.pieces.try_recv().ok()?;
        Some(self.taken(audio))
    }

    /// Whoever sends more learns at once that it is not taken.
    pub(crate) fn close(&mut self) {
        self.pieces.close();
    }

    fn taken(&self, audio: Audio) -> Audio {
        self.room.add_permits(places(&audio) as usize);
        audio
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use bytes::Bytes;
    use tokio::time::timeout;
    use voxfleet_schema::audio::AudioFormat;

    use super::*;

    const SOON: Duration = Duration::from_millis(50);

    fn piece(len: usize) -> Audio {
        Audio { format: AudioFormat::default(), bytes: Bytes::from(vec![0; len]) }
    }

    #[tokio::test]
    async fn a_thousand_little_messages_do_not_wait_and_a_large_one_does() {
        let (inlet, mut outlet) = channel();
        for _ in 0..1_000 {
            timeout(SOON, inlet.send(piece(256))).await.expect("room").expect("taken");
        }
        assert!(timeout(SOON, inlet.send(piece(ROOM as usize))).await.is_err(), "there is no room for it");
        for _ in 0..1_000 {
            assert_eq!(outlet.try_recv().map(|piece| piece.bytes.len()), Some(256));
        }
        // Larger than all there is.
        timeout(SOON, inlet.send(piece(2 * ROOM as usize))).await.expect("room").expect("taken");
        assert!(timeout(SOON, inlet.send(piece(1))).await.is_err());
        assert!(outlet.recv().await.is_some());
        timeout(SOON, inlet.send(piece(1))).await.expect("room").expect("taken");
    }

    #[tokio::test]
    async fn whoever_waits_for_room_learns_that_nobody_takes_it() {
        let (inlet, mut outlet) = channel();
        inlet.send(piece(ROOM as usize)).await.expect("taken");
        let (waited, ()) = tokio::join!(inlet.send(piece(1)), async { outlet.close() });
        assert!(waited.is_err());
        drop(outlet);
        assert!(inlet.send(piece(1)).await.is_err());
    }
}
