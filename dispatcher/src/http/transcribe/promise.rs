//! Room in the object store that recordings on their way in have been promised: what is free is shared by all of them, and the
//! part that is kept for results stays theirs, however many come at once.
//!
//! The server says what is free; it does not know what is still to come. So each upload asks for bytes before it stores them,
//! and gives them back once the server counts them itself.

use std::{
    future::Future,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use tokio::sync::Mutex;

use super::body::Cut;

/// Asked for at a time where nobody said how long a recording is.
pub(super) const STEP: u64 = 8 << 20;
/// Stored bytes that the server may not count yet: what is on the way to it.
const ON_THE_WAY: u64 = 1 << 20;

/// What has been promised by one process.
#[derive(Debug, Clone, Default)]
pub(super) struct Book(Arc<Promised>);

#[derive(Debug, Default)]
struct Promised {
    bytes: AtomicU64,
    /// One asks at a time: what is free is given once.
    turn: Mutex<()>,
}

impl Book {
    pub(super) fn promise(&self) -> Promise {
        Promise { book: self.clone(), to_come: 0, on_the_way: 0 }
    }
}

/// One upload's part. Gone with it.
#[derive(Debug)]
pub(super) struct Promise {
    book: Book,
    to_come: u64,
    on_the_way: u64,
}

impl Promise {
    /// Makes sure of `need` more bytes, up to `want` where there is room. `free`: what the server has; None, no bound.
    pub(super) async fn reach<E: From<Cut>>(
        &mut self,
        need: u64,
        want: u64,
        free: impl Future<Output = Result<Option<u64>, E>>,
    ) -> Result<(), E> {
        let Some(need) = need.checked_sub(self.to_come).filter(|need| *need > 0) else { return Ok(()) };
        let promised = self.book.0.clone();
        let _turn = promised.turn.lock().await;
        let given = grant(free.await?, promised.bytes.load(Ordering::Relaxed), need, want.max(need))?;
        promised.bytes.fetch_add(given, Ordering::Relaxed);
        self.to_come += given;
        Ok(())
    }

    /// `bytes` of them have come, and go to the server now.
    pub(super) fn came(&mut self, bytes: u64) {
        let bytes = bytes.min(self.to_come);
        self.to_come -= bytes;
        self.on_the_way += bytes;
        let counted = self.on_the_way.saturating_sub(ON_THE_WAY);
        self.on_the_way -= counted;
        self.book.0.bytes.fetch_sub(counted, Ordering::Relaxed);
    }
}

impl Drop for Promise {
    fn drop(&mut self) {
        self.book.0.bytes.fetch_sub(self.to_come + self.on_the_way, Ordering::Relaxed);
    }
}

fn grant(free: Option<u64>, promised: u64, need: u64, want: u64) -> Result<u64, Cut> {
    let Some(free) = free else { return Ok(want) };
    match free.saturating_sub(promised) {
        _ if need > free => Err(Cut::NoRoom(free)),
        left if need > left => Err(Cut::Crowded),
        left => Ok(want.min(left)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MB: u64 = 1 << 20;

    async fn reach(promise: &mut Promise, need: u64, free: u64) -> Result<(), Cut> {
        promise.reach(need, need, async { Ok(Some(free)) }).await
    }

    #[test]
    fn what_is_free_is_given_once() {
        assert_eq!(grant(Some(10), 0, 4, 8), Ok(8));
        assert_eq!(grant(Some(10), 4, 4, 8), Ok(6));
        assert_eq!(grant(Some(10), 7, 4, 8), Err(Cut::Crowded));
        assert_eq!(grant(Some(10), 20, 4, 8), Err(Cut::Crowded));
        assert_eq!(grant(Some(10), 7, 11, 11), Err(Cut::NoRoom(10)));
        assert_eq!(grant(None, 7, 11, 12), Ok(12));
    }

    #[tokio::test]
    async fn uploads_share_what_is_free_and_give_back_what_the_server_counts() {
        let book = Book::default();
        let (mut first, mut second) = (book.promise(), book.promise());
        let both = tokio::join!(reach(&mut first, 6 * MB, 10 * MB), reach(&mut second, 6 * MB, 10 * MB));
        assert_eq!(both, (Ok(()), Err(Cut::Crowded)));
        // Four have been stored, and the server says so; one of them may still be on the way.
        first.came(4 * MB);
        assert_eq!(reach(&mut second, 4 * MB, 6 * MB).await, Err(Cut::Crowded));
        assert_eq!(reach(&mut second, 3 * MB, 6 * MB).await, Ok(()));
        assert_eq!(reach(&mut second, 2 * MB, 0).await, Ok(()), "it has been promised already");
        drop(first);
        drop(second);
        assert_eq!(book.0.bytes.load(Ordering::Relaxed), 0);
    }
}
