//! Which dispatcher is active: one key in `asr_control`, renewed by its holder, taken over when it stands still.
//!
//! A reader never compares clocks with the holder: it looks whether the key's revision has changed for a whole ttl of its
//! own monotonic clock. Correctness never rests on the lease; two active dispatchers only waste work.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{
    Nats,
    kv::{Bucket, KvError, Records, Versioned},
};

const KEY: &str = "lease";
/// No lease lasts longer.
const LONGEST: Duration = Duration::from_secs(60);

/// Value of the key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    /// The dispatcher's name, for people.
    holder: String,
    /// This start of it.
    token: String,
    ttl_ms: u64,
    /// Grows with each renewal.
    #[serde(default)]
    renewals: u64,
    /// Given up: anybody may take it at once.
    #[serde(default)]
    released: bool,
}

/// Who holds the lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Standing {
    /// This one, until a `ttl` after the call that said so began.
    Leader,
    /// Another, or (None) nobody was seen yet.
    Follower { holder: Option<String> },
}

/// The last state of the key that this reader saw, and since when.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Seen {
    revision: u64,
    since: Instant,
}

#[derive(Debug, PartialEq, Eq)]
enum Step {
    Create,
    /// Write over this revision.
    Take(u64),
    Wait,
}

/// What to do about a key as it was found. `seen` is updated with it.
fn step(seen: &mut Option<Seen>, mine: &str, found: Option<&Versioned<Record>>, now: Instant) -> Step {
    let Some(found) = found else {
        *seen = None;
        return Step::Create;
    };
    let since = match *seen {
        Some(before) if before.revision == found.revision => before.since,
        _ => now,
    };
    *seen = Some(Seen { revision: found.revision, since });
    // As long as a configuration may say: a record that claims more must not stop everybody.
    let ttl = Duration::from_millis(found.value.ttl_ms).min(LONGEST);
    if found.value.token == mine || found.value.released || now.duration_since(since) >= ttl {
        Step::Take(found.revision)
    } else {
        Step::Wait
    }
}

pub struct Lease {
    records: Records<Record>,
    holder: String,
    token: String,
    ttl: Duration,
    renewals: u64,
    seen: Option<Seen>,
    /// Leader until then.
    until: Option<Instant>,
    /// Revision of my last renewal.
    revision: Option<u64>,
}

impl Lease {
    /// `holder` is this dispatcher's name; `ttl` how long the lease lives without renewal (at least 1 s).
    pub fn new(nats: &Nats, holder: &str, ttl: Duration) -> Self {
        Self {
            records: Records::new(nats, Bucket::Control),
            holder: holder.to_owned(),
            token: Uuid::new_v4().simple().to_string(),
            ttl: ttl.max(Duration::from_secs(1)),
            renewals: 0,
            seen: None,
            until: None,
            revision: None,
        }
    }

    /// Renews the lease, takes it when it is free or has stood still for its ttl by this machine's monotonic clock, or
    /// learns who holds it. Call it about three times a ttl. After an error the standing is as [`Self::is_leader`] says.
    pub async fn renew(&mut self) -> Result<Standing, KvError> {
        // Counted from before the request: the others count from when they see its effect.
        let begun = Instant::now();
        let found = match self.records.get(KEY).await {
            // Somebody's junk is taken over like a holder that stands still.
            Err(KvError::Malformed { revision, .. }) => {
                let value = Record {
                    holder: "unreadable".to_owned(),
                    token: String::new(),
                    ttl_ms: self.ttl.as_millis() as u64,
                    renewals: 0,
                    released: false,
                };
                Some(Versioned { value, revision })
            }
            found => found?,
        };
        let next = Record {
            holder: self.holder.clone(),
            token: self.token.clone(),
            ttl_ms: self.ttl.as_millis() as u64,
            renewals: self.renewals + 1,
            released: false,
        };
        let written = match step(&mut self.seen, &self.token, found.as_ref(), begun) {
            Step::Create => self.records.create(KEY, &next).await,
            Step::Take(revision) => self.records.update(KEY, &next, revision).await,
            Step::Wait => {
                self.until = None;
                return Ok(Standing::Follower { holder: found.map(|found| found.value.holder) });
            }
        };
        match written {
            Ok(revision) => {
                self.renewals += 1;
                self.revision = Some(revision);
                self.until = Some(begun + self.ttl);
                Ok(Standing::Leader)
            }
            // Somebody was faster.
            Err(KvError::Conflict { .. }) => {
                self.until = None;
                Ok(Standing::Follower { holder: None })
            }
            Err(error) => Err(error),
        }
    }

    /// Whether this one may act as leader at `now`, without asking the server.
    pub fn is_leader(&self, now: Instant) -> bool {
        self.until.is_some_and(|until| now < until)
    }

    /// Gives the lease up, so that a standby need not wait.
    pub async fn release(&mut self) -> Result<(), KvError> {
        self.until = None;
        let Some(revision) = self.revision.take() else { return Ok(()) };
        let record = Record {
            holder: self.holder.clone(),
            token: self.token.clone(),
            ttl_ms: self.ttl.as_millis() as u64,
            renewals: self.renewals,
            released: true,
        };
        match self.records.update(KEY, &record, revision).await {
            // Taken over meanwhile: what was wanted.
            Ok(_) | Err(KvError::Conflict { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(revision: u64, token: &str, released: bool) -> Versioned<Record> {
        let record = Record { holder: "d".into(), token: token.into(), ttl_ms: 3_000, renewals: 0, released };
        Versioned { value: record, revision }
    }

    #[test]
    fn a_lease_is_taken_only_after_it_stood_still_for_its_ttl() {
        let begin = Instant::now();
        let at = |ms| begin + Duration::from_millis(ms);
        let mut seen = None;
        assert_eq!(step(&mut seen, "me", None, at(0)), Step::Create);
        assert_eq!(step(&mut seen, "me", Some(&found(1, "other", false)), at(0)), Step::Wait);
        assert_eq!(step(&mut seen, "me", Some(&found(1, "other", false)), at(2_999)), Step::Wait);
        assert_eq!(step(&mut seen, "me", Some(&found(2, "other", false)), at(3_001)), Step::Wait, "it was renewed");
        assert_eq!(step(&mut seen, "me", Some(&found(2, "other", false)), at(6_000)), Step::Wait);
        assert_eq!(step(&mut seen, "me", Some(&found(2, "other", false)), at(6_001)), Step::Take(2));
    }

    #[test]
    fn a_record_that_claims_too_much_is_taken_all_the_same() {
        let begin = Instant::now();
        let mut endless = found(1, "other", false);
        endless.value.ttl_ms = u64::MAX;
        let mut seen = None;
        assert_eq!(step(&mut seen, "me", Some(&endless), begin), Step::Wait);
        assert_eq!(step(&mut seen, "me", Some(&endless), begin + LONGEST), Step::Take(1));
    }

    #[test]
    fn mine_and_released_ones_are_taken_at_once() {
        let now = Instant::now();
        assert_eq!(step(&mut None, "me", Some(&found(7, "me", false)), now), Step::Take(7));
        assert_eq!(step(&mut None, "me", Some(&found(8, "other", true)), now), Step::Take(8));
    }
}
