//! What a worker can hold: slots for sessions, and bytes of audio.
//!
//! Each byte handed to the engine stays counted until the engine has consumed it or its session is closed; each byte of a
//! hint waiting for its session is counted against a pool of its own. So memory is bounded by
//!
//! `slots x (share + one entry) + surplus + overdraft + hints`
//!
//! and no set of sessions can wait for each other for ever: a session below its share may always take one more entry,
//! and of those above it that find the surplus used up, one at a time may go on. It does so until the engine has cut its
//! window, falls below its share, and makes room for the next.

use std::sync::{
    Arc, Mutex, MutexGuard, PoisonError,
    atomic::{AtomicI64, Ordering},
};

use tokio::sync::Notify;

/// Locks a mutex that is never held over an await or a panic-prone call. A poisoned one still holds consistent counts:
/// every critical section here is a few assignments.
pub(crate) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the one session over the surplus may hold above its share. The engine keeps 16 MiB of audio for the longest window
/// there is; the rest is for what counts beside the audio. Only a window of more than 100,000 entries does not fit, and
/// such a session waits.
const OVERDRAFT: u64 = 32 << 20;

/// The counts, without any waiting.
#[derive(Debug)]
struct Counts {
    share: u64,
    surplus: u64,
    overdraft: u64,
    /// Bytes held above their shares by all accounts.
    surplus_used: u64,
    /// Whoever may exceed the surplus now.
    overdrawn: Option<u64>,
    next_account: u64,
}

impl Counts {
    fn above_share(&self, used: u64) -> u64 {
        used.saturating_sub(self.share)
    }

    /// Whether `account`, which holds `used`, may take an entry of at most `len` bytes.
    fn may_take(&self, account: u64, used: u64, len: u64) -> bool {
        used < self.share
            || self.surplus_used + len <= self.surplus
            || (self.overdrawn.is_none_or(|holder| holder == account) && self.above_share(used) < self.overdraft)
    }

    fn change(&mut self, account: u64, before: u64, after: u64) {
        self.surplus_used = self.surplus_used - self.above_share(before) + self.above_share(after);
        if after < self.share {
            if self.overdrawn == Some(account) {
                self.overdrawn = None;
            }
        } else if after > before && self.surplus_used > self.surplus && self.overdrawn.is_none() {
            self.overdrawn = Some(account);
        }
    }
}

/// Bytes of audio of all sessions.
#[derive(Debug, Clone)]
pub(crate) struct Budget {
    counts: Arc<Mutex<Counts>>,
    room: Arc<Notify>,
}

impl Budget {
    pub(crate) fn new(share: u64, surplus: u64) -> Self {
        Self::with_overdraft(share, surplus, OVERDRAFT)
    }

    fn with_overdraft(share: u64, surplus: u64, overdraft: u64) -> Self {
        Self {
            counts: Arc::new(Mutex::new(Counts {
                share: share.max(1),
                surplus,
                overdraft,
                surplus_used: 0,
                overdrawn: None,
                next_account: 0,
            })),
            room: Arc::new(Notify::new()),
        }
    }

    pub(crate) fn account(&self) -> Account {
        let mut counts = locked(&self.counts);
        let number = counts.next_account;
        counts.next_account += 1;
        Account { budget: self.clone(), number, apart: None, used: Mutex::new(Some(0)) }
    }

    /// An account of its own size that neither gives to the others nor takes from them.
    pub(crate) fn apart(&self, bytes: u64) -> Account {
        let mut account = self.account();
        account.apart = Some(bytes);
        account
    }

    /// Wakes when some session gave bytes back. Enable it before asking [`Account::has_room`].
    pub(crate) fn room(&self) -> tokio::sync::futures::Notified<'_> {
        self.room.notified()
    }
}

/// Bytes of one engine session. Given back as the engine consumes them, and all of them on close or drop.
#[derive(Debug)]
pub(crate) struct Account {
    budget: Budget,
    number: u64,
    /// Its own limit, apart from the shares.
    apart: Option<u64>,
    /// None once closed: what comes later changes nothing.
    used: Mutex<Option<u64>>,
}

impl Account {
    /// Whether an entry of at most `len` bytes may be taken now.
    pub(crate) fn has_room(&self, len: u64) -> bool {
        let used = locked(&self.used);
        used.is_some_and(|used| match self.apart {
            Some(limit) => used + len <= limit,
            None => locked(&self.budget.counts).may_take(self.number, used, len),
        })
    }

    /// Counts an entry that was let in.
    pub(crate) fn take(&self, len: u64) {
        self.update(|used| used.saturating_add(len));
    }

    /// The engine no longer keeps these bytes.
    pub(crate) fn consumed(&self, len: u64) {
        self.update(|used| used.saturating_sub(len));
        self.budget.room.notify_waiters();
    }

    pub(crate) fn used(&self) -> u64 {
        locked(&self.used).unwrap_or(0)
    }

    pub(crate) fn close(&self) {
        let mut used = locked(&self.used);
        if let Some(before) = used.take() {
            if self.apart.is_none() {
                locked(&self.budget.counts).change(self.number, before, 0);
            }
            self.budget.room.notify_waiters();
        }
    }

    fn update(&self, change: impl FnOnce(u64) -> u64) {
        let mut used = locked(&self.used);
        if let Some(before) = *used {
            let after = change(before);
            *used = Some(after);
            if self.apart.is_none() {
                locked(&self.budget.counts).change(self.number, before, after);
            }
        }
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        self.close();
    }
}

/// Bytes of hints between the pull and their sessions.
#[derive(Debug, Clone)]
pub(crate) struct HintPool {
    /// Below zero while messages larger than expected are here; nothing is taken then.
    free: Arc<AtomicI64>,
    room: Arc<Notify>,
    /// Nothing is taken while less than this is free: one message of the largest size.
    reserve: i64,
}

/// Keeps the bytes of one hint counted.
#[derive(Debug)]
pub(crate) struct HintPermit {
    pool: HintPool,
    len: i64,
}

fn signed(len: u64) -> i64 {
    i64::try_from(len).unwrap_or(i64::MAX)
}

impl HintPool {
    pub(crate) fn new(bytes: u64, reserve: u64) -> Self {
        let (bytes, reserve) = (signed(bytes), signed(reserve).min(signed(bytes)));
        Self { free: Arc::new(AtomicI64::new(bytes)), room: Arc::new(Notify::new()), reserve }
    }

    /// Bytes for one message, taken before it is asked for.
    pub(crate) fn try_take(&self, len: u64) -> Option<HintPermit> {
        let len = signed(len);
        self.free
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |free| {
                (free >= len.max(self.reserve)).then(|| free - len)
            })
            .ok()
            .map(|_| HintPermit { pool: self.clone(), len })
    }

    /// Waits until `len` bytes are free, and takes them.
    pub(crate) async fn take(&self, len: u64) -> HintPermit {
        loop {
            let room = self.room.notified();
            tokio::pin!(room);
            room.as_mut().enable();
            if let Some(permit) = self.try_take(len) {
                return permit;
            }
            room.await;
        }
    }
}

impl HintPermit {
    /// Counts what the message really has.
    pub(crate) fn resize(&mut self, len: u64) {
        let back = self.len - signed(len);
        self.len -= back;
        self.pool.free.fetch_add(back, Ordering::AcqRel);
        self.pool.room.notify_waiters();
    }
}

impl Drop for HintPermit {
    fn drop(&mut self) {
        self.pool.free.fetch_add(self.len, Ordering::AcqRel);
        self.pool.room.notify_waiters();
    }
}

/// What to pay for a message before its size is known: the largest until sizes are known, then four times the largest of
/// late. A slow link needs many messages on their way; at 4 MiB each there would be eight.
#[derive(Debug)]
pub(crate) struct HintPrice {
    most: u64,
    seen: u32,
    largest: u64,
}

impl HintPrice {
    const LEARN: u32 = 32;
    const LEAST: u64 = 64 * 1024;

    pub(crate) fn new(most: u64) -> Self {
        Self { most, seen: 0, largest: 0 }
    }

    pub(crate) fn observe(&mut self, len: u64) {
        self.seen = self.seen.saturating_add(1);
        // A large one is forgotten after a few hundred small ones.
        self.largest = len.max(self.largest - self.largest / 64);
    }

    pub(crate) fn price(&self) -> u64 {
        if self.seen < Self::LEARN { self.most } else { (self.largest * 4).max(Self::LEAST).min(self.most) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_session_below_its_share_always_goes_on() {
        let budget = Budget::new(10, 20);
        let (a, b, c) = (budget.account(), budget.account(), budget.account());
        for _ in 0..8 {
            assert!(a.has_room(5));
            a.take(5);
        }
        assert_eq!(a.used(), 40);
        assert!(a.has_room(5), "the first over the surplus may overdraw");
        assert!(b.has_room(100), "below its share, whatever others hold");
        b.take(9);
        assert!(b.has_room(100));
        b.take(9);
        assert!(!b.has_room(1), "above its share, the surplus is used up, and another overdraws");
        assert!(c.has_room(1));
        a.consumed(25);
        assert!(b.has_room(1), "the surplus has room again");
        a.consumed(15);
        assert!(b.has_room(5));
    }

    #[test]
    fn an_account_apart_neither_gives_nor_takes() {
        let budget = Budget::new(10, 20);
        let (live, apart) = (budget.account(), budget.apart(100));
        while apart.has_room(30) {
            apart.take(30);
        }
        assert_eq!(apart.used(), 90, "never above its limit");
        live.take(10);
        assert!(live.has_room(20), "all the surplus is there");
        live.take(20);
        assert!(!apart.has_room(11) && apart.has_room(10));
        apart.consumed(90);
        apart.take(100);
        drop(apart);
        assert!(live.has_room(1), "what it held was never theirs");
        live.take(25);
        assert!(budget.account().has_room(1));
    }

    #[test]
    fn the_overdraft_has_an_end() {
        let budget = Budget::with_overdraft(10, 20, 30);
        let a = budget.account();
        while a.has_room(8) {
            a.take(8);
            assert!(a.used() < 10 + 30 + 8);
        }
        assert!((40..48).contains(&a.used()), "{}", a.used());
        a.consumed(9);
        assert!(a.has_room(8));
    }

    #[test]
    fn closing_gives_everything_back_and_late_news_changes_nothing() {
        let budget = Budget::new(1, 10);
        let (a, b) = (budget.account(), budget.account());
        a.take(12);
        b.take(2);
        assert!(!b.has_room(10));
        a.close();
        a.consumed(5);
        a.take(100);
        assert!(!a.has_room(1));
        assert!(b.has_room(9));
        drop(b);
        assert_eq!(locked(&budget.counts).surplus_used, 0);
        assert_eq!(locked(&budget.counts).overdrawn, None);
    }

    #[tokio::test]
    async fn hints_wait_for_bytes() {
        let pool = HintPool::new(10, 3);
        let mut first = pool.take(8).await;
        assert!(pool.try_take(1).is_none(), "one of the largest would not fit any more");
        let waiting = pool.take(8);
        tokio::pin!(waiting);
        assert!(futures_util::poll!(&mut waiting).is_pending());
        first.resize(2);
        let second = waiting.await;
        first.resize(30);
        drop(second);
        assert!(pool.try_take(1).is_none(), "a message larger than paid for is counted too");
        drop(first);
        assert!(pool.try_take(10).is_some());
    }

    #[test]
    fn the_price_of_a_hint_follows_what_comes() {
        let mut price = HintPrice::new(4_000_000);
        (0..HintPrice::LEARN - 1).for_each(|_| price.observe(6_400));
        assert_eq!(price.price(), 4_000_000);
        price.observe(6_400);
        assert_eq!(price.price(), HintPrice::LEAST);
        price.observe(100_000);
        assert_eq!(price.price(), 400_000);
        price.observe(3_000_000);
        assert_eq!(price.price(), 4_000_000);
        (0..400).for_each(|_| price.observe(6_400));
        assert_eq!(price.price(), HintPrice::LEAST);
    }

    proptest! {
        /// Whatever sessions do, the bytes held stay below the bound, and somebody can always go on.
        #[test]
        fn bounded_and_never_stuck(steps in proptest::collection::vec((0usize..4, 1u64..8, any::<bool>()), 1..200)) {
            const SHARE: u64 = 10;
            const SURPLUS: u64 = 20;
            const OVERDRAFT: u64 = 15;
            let budget = Budget::with_overdraft(SHARE, SURPLUS, OVERDRAFT);
            let accounts: Vec<Account> = (0..4).map(|_| budget.account()).collect();
            for (who, len, feed) in steps {
                let account = &accounts[who];
                if !feed {
                    account.consumed(len);
                } else if account.has_room(len) {
                    account.take(len);
                }
                let total: u64 = accounts.iter().map(Account::used).sum();
                prop_assert!(total <= 4 * (SHARE + 8) + SURPLUS + OVERDRAFT);
                prop_assert!(accounts.iter().all(|a| a.used() < SHARE + SURPLUS + OVERDRAFT + 8));
                // Who has all it may have is waited for by nobody but those above their shares.
                let full = |a: &Account| a.used() >= SHARE + OVERDRAFT;
                prop_assert!(accounts.iter().any(|a| a.has_room(1) || full(a)));
                let above: u64 = accounts.iter().map(|a| a.used().saturating_sub(SHARE)).sum();
                prop_assert_eq!(above, locked(&budget.counts).surplus_used);
            }
        }
    }
}
