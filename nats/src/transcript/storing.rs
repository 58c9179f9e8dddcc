//! What an author does to have its final stored: a machine without IO. [`super::Chain::store`] drives it against the server,
//! and the model beside it against everything a server and its network may do.

/// What the leader's last final means to the author of one that may or may not have been stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It is mine.
    Stored { seq: u64 },
    /// My predecessor: mine was not stored, so the same bytes again.
    RetrySame,
    /// Of a higher epoch: somebody owns the session now.
    LetGo,
    /// Another author's, or another computation of mine.
    Rebuild,
    /// Nothing, although I hold a predecessor: purged or expired. The same bytes, expecting nothing.
    ChainLost,
}

/// The few fields of a final the decision needs. `Id` is whatever tells one computation from every other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Link<Id> {
    pub seq: u64,
    pub final_id: Id,
    pub epoch: u64,
}

/// Decides from what the leader holds as last final (`found`). `predecessor` is the sequence this attempt expected.
pub fn after_conflict<Id: PartialEq<Other>, Other>(
    my_id: Id,
    my_epoch: u64,
    predecessor: Option<u64>,
    found: Option<Link<Other>>,
) -> Verdict {
    match (found, predecessor) {
        (None, Some(_)) => Verdict::ChainLost,
        (None, None) => Verdict::RetrySame,
        (Some(link), _) if my_id == link.final_id => Verdict::Stored { seq: link.seq },
        (Some(link), Some(seq)) if link.seq == seq => Verdict::RetrySame,
        (Some(link), _) if link.epoch > my_epoch => Verdict::LetGo,
        (Some(_), _) => Verdict::Rebuild,
    }
}

/// What the author does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Act {
    /// Publish the final, fenced. One attempt at a time.
    Publish { expected: Option<u64> },
    /// Read the last final from the stream's leader.
    Read,
    /// Nothing more: this is what became of it.
    Done(End),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum End {
    Stored {
        seq: u64,
        chain_lost: bool,
    },
    /// To whoever wrote what was found last.
    LetGo,
    /// From what was found last.
    Rebuild,
}

/// What came of an [`Act`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Heard<Id> {
    /// The server's answer to a publish.
    Ack { seq: u64, duplicate: bool },
    /// The fence did not hold, or nobody knows whether the publish was stored.
    Unclear,
    /// The server did not do as it was asked, for now.
    NotNow,
    /// The leader's last final.
    Found(Option<Link<Id>>),
}

/// One final on its way into the chain.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Storing<Id> {
    id: Id,
    epoch: u64,
    expected: Option<u64>,
    chain_lost: bool,
    act: Act,
    pause: bool,
}

impl<Id: Copy> Storing<Id> {
    /// `predecessor` is the sequence of the final before it; none: it is the first.
    pub(super) fn new(id: Id, epoch: u64, predecessor: Option<u64>) -> Self {
        let act = Act::Publish { expected: predecessor };
        Self { id, epoch, expected: predecessor, chain_lost: false, act, pause: false }
    }

    pub(super) fn next(&self) -> Act {
        self.act
    }

    /// Whether a moment should pass before the next act: it is one that was done before.
    pub(super) fn pauses(&self) -> bool {
        self.pause
    }

    pub(super) fn heard<Other>(&mut self, heard: Heard<Other>)
    where
        Id: PartialEq<Other>,
    {
        let again = Act::Publish { expected: self.expected };
        (self.act, self.pause) = match heard {
            Heard::Ack { seq, duplicate: false } => (self.stored(seq), false),
            // The fence, the id and the clock each say only that somebody may have been there.
            Heard::Ack { duplicate: true, .. } | Heard::Unclear => (Act::Read, false),
            Heard::NotNow => (self.act, true),
            Heard::Found(found) => match after_conflict(self.id, self.epoch, self.expected, found) {
                Verdict::Stored { seq } => (self.stored(seq), false),
                Verdict::LetGo => (Act::Done(End::LetGo), false),
                Verdict::Rebuild => (Act::Done(End::Rebuild), false),
                Verdict::RetrySame => (again, true),
                Verdict::ChainLost => {
                    (self.expected, self.chain_lost) = (None, true);
                    (Act::Publish { expected: None }, false)
                }
            },
        };
    }

    fn stored(&self, seq: u64) -> Act {
        Act::Done(End::Stored { seq, chain_lost: self.chain_lost })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_leaders_last_final_decides() {
        let link = |seq, final_id, epoch| Some(Link { seq, final_id, epoch });
        // Mine is "m" of epoch 5; the predecessor stood at 10.
        let cases = [
            ("mine was stored", Some(10), link(11, "m", 5), Verdict::Stored { seq: 11 }),
            ("mine was stored as the first", None, link(1, "m", 5), Verdict::Stored { seq: 1 }),
            ("mine, although the epoch reads higher", Some(10), link(11, "m", 6), Verdict::Stored { seq: 11 }),
            ("my predecessor: not stored", Some(10), link(10, "p", 5), Verdict::RetrySame),
            ("my predecessor, written by a lower epoch", Some(10), link(10, "p", 4), Verdict::RetrySame),
            ("my predecessor, written by a higher epoch", Some(10), link(10, "p", 6), Verdict::RetrySame),
            ("a higher epoch", Some(10), link(11, "o", 6), Verdict::LetGo),
            ("a higher epoch, where I wanted to be first", None, link(1, "o", 6), Verdict::LetGo),
            ("my own epoch, another computation", Some(10), link(11, "o", 5), Verdict::Rebuild),
            ("a lower epoch that was faster", Some(10), link(11, "o", 4), Verdict::Rebuild),
            ("somebody else was first", None, link(1, "o", 5), Verdict::Rebuild),
            ("another predecessor than I hold", Some(10), link(9, "p", 5), Verdict::Rebuild),
            ("purged under me", Some(10), None, Verdict::ChainLost),
            ("nothing there, nothing expected", None, None, Verdict::RetrySame),
        ];
        for (what, predecessor, found, want) in cases {
            assert_eq!(after_conflict("m", 5, predecessor, found), want, "{what}");
        }
    }
}
