//! Who may be connected at once. Nobody is kept waiting: somebody who comes is let in, takes the place of one who asks for
//! nothing, or is turned away.
//!
//! Three bounds, each against another way to keep everybody else out. Whoever has not asked for anything yet makes room, the
//! longest of them first: silence holds no place, from wherever it comes. A peer has a share, so that one who asks a great deal
//! leaves room for others; loopback has none, since a proxy or a tunnel there stands for everybody behind it. A few places are
//! loopback's alone, for the health check of this machine.
//!
//! [`server`](crate::server) lets in; the [`guard`](crate::guard) and handlers that stay say through their [`Seat`] what a
//! connection is doing.

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio_util::sync::CancellationToken;

use crate::guard::Open;

/// Places beyond all others, for peers on loopback: a health check, a scrape, somebody who looks what is wrong.
const SPARE: usize = 16;

/// Who counts as one: an address, or with IPv6 the network that one customer gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Peer {
    V4([u8; 4]),
    V6([u8; 8]),
}

/// None: loopback.
fn peer_of(address: IpAddr) -> Option<Peer> {
    let address = address.to_canonical();
    if address.is_loopback() {
        return None;
    }
    Some(match address {
        IpAddr::V4(v4) => Peer::V4(v4.octets()),
        IpAddr::V6(v6) => {
            let [a, b, c, d, e, f, g, h, ..] = v6.octets();
            Peer::V6([a, b, c, d, e, f, g, h])
        }
    })
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Doing {
    /// Nothing yet, or nothing more; since this turn.
    Waiting(u64),
    Asking,
    /// It stays until it ends, whatever was answered: its connection belongs to somebody else now.
    Staying,
}

#[derive(Debug)]
struct Entry {
    peer: Option<Peer>,
    doing: Doing,
    leave: CancellationToken,
}

#[derive(Debug, Default)]
struct Taken {
    entries: HashMap<u64, Entry>,
    peers: HashMap<Peer, usize>,
    /// Who waits, the longest first.
    waiting: BTreeMap<u64, u64>,
    turn: u64,
}

impl Taken {
    fn next_turn(&mut self) -> u64 {
        self.turn += 1;
        self.turn
    }

    fn remove(&mut self, id: u64) -> Option<Entry> {
        let entry = self.entries.remove(&id)?;
        if let Doing::Waiting(since) = entry.doing {
            self.waiting.remove(&since);
        }
        if let Some(peer) = entry.peer
            && let Some(count) = self.peers.get_mut(&peer)
        {
            *count -= 1;
            if *count == 0 {
                self.peers.remove(&peer);
            }
        }
        Some(entry)
    }

    /// Sends away whoever has waited longest, of one peer or of all. False: nobody waits.
    fn make_room(&mut self, of: Option<Peer>) -> bool {
        let is_of = |id: &u64| of.is_none() || self.entries.get(id).is_some_and(|entry| entry.peer == of);
        let Some(id) = self.waiting.values().copied().find(is_of) else { return false };
        if let Some(entry) = self.remove(id) {
            entry.leave.cancel();
        }
        true
    }

    fn set(&mut self, id: u64, doing: Doing) {
        let Some(entry) = self.entries.get_mut(&id).filter(|entry| entry.doing != Doing::Staying) else { return };
        if let Doing::Waiting(since) = std::mem::replace(&mut entry.doing, doing) {
            self.waiting.remove(&since);
        }
        if let Doing::Waiting(since) = doing {
            self.waiting.insert(since, id);
        }
    }
}

/// The places of one server.
#[derive(Debug)]
pub(crate) struct Room {
    most: usize,
    per_peer: usize,
    taken: Mutex<Taken>,
}

impl Room {
    /// `per_peer`: 0 = a quarter of all.
    pub(crate) fn new(most: usize, per_peer: usize) -> Arc<Self> {
        let per_peer = if per_peer == 0 { most.div_ceil(4) } else { per_peer };
        Arc::new(Self { most, per_peer, taken: Mutex::default() })
    }

    /// None: turned away.
    pub(crate) fn enter(self: &Arc<Self>, address: IpAddr) -> Option<Seat> {
        let peer = peer_of(address);
        let mut taken = self.taken();
        let shares = |taken: &Taken| peer.and_then(|peer| taken.peers.get(&peer)).copied().unwrap_or_default();
        if shares(&taken) >= self.per_peer && !taken.make_room(peer) {
            return None;
        }
        if taken.entries.len() >= self.most && !taken.make_room(None) {
            let spare = if peer.is_none() { SPARE } else { 0 };
            if taken.entries.len() >= self.most + spare {
                return None;
            }
        }
        let (id, since) = (taken.next_turn(), taken.next_turn());
        let leave = CancellationToken::new();
        taken.entries.insert(id, Entry { peer, doing: Doing::Waiting(since), leave: leave.clone() });
        taken.waiting.insert(since, id);
        if let Some(peer) = peer {
            *taken.peers.entry(peer).or_default() += 1;
        }
        drop(taken);
        Some(Seat(Arc::new(Place { room: self.clone(), id, leave, _open: Open::new("all") })))
    }

    fn taken(&self) -> MutexGuard<'_, Taken> {
        // Nothing in here can panic halfway.
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[cfg(test)]
    pub(crate) fn open(&self) -> usize {
        self.taken().entries.len()
    }
}

/// A connection's place, for as long as anybody holds a part of it. Requests carry theirs as an extension.
#[derive(Debug, Clone)]
pub struct Seat(Arc<Place>);

#[derive(Debug)]
struct Place {
    room: Arc<Room>,
    id: u64,
    leave: CancellationToken,
    _open: Open,
}

impl Seat {
    /// A whole request is here, or one whose body is worth waiting for: until its answer has been written nobody takes the
    /// place.
    pub fn asks(&self) {
        self.set(Doing::Asking);
    }

    /// Keeps the place until the last part of it is dropped: for what becomes of a connection beyond its request.
    pub fn stays(&self) {
        self.set(Doing::Staying);
    }

    /// It has its answer.
    pub(crate) fn waits(&self) {
        let mut taken = self.0.room.taken();
        let since = taken.next_turn();
        taken.set(self.0.id, Doing::Waiting(since));
    }

    /// Until its place is somebody else's.
    pub(crate) async fn left(&self) {
        self.0.leave.cancelled().await;
    }

    fn set(&self, doing: Doing) {
        self.0.room.taken().set(self.0.id, doing);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.room.taken().remove(self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HERE: &str = "127.0.0.1";
    const FAR: &str = "203.0.113.7";

    fn enter(room: &Arc<Room>, address: &str) -> Option<Seat> {
        room.enter(address.parse().expect("an address"))
    }

    fn asking(room: &Arc<Room>, address: &str) -> Seat {
        let seat = enter(room, address).expect("a place");
        seat.asks();
        seat
    }

    fn is_out(seat: &Seat) -> bool {
        seat.0.leave.is_cancelled()
    }

    #[test]
    fn silence_makes_room_the_longest_first() {
        let room = Room::new(3, 3);
        let (first, second, third) = (enter(&room, HERE), asking(&room, HERE), enter(&room, FAR));
        let (first, third) = (first.expect("a place"), third.expect("a place"));
        let fourth = asking(&room, "198.51.100.1");
        assert!(is_out(&first) && !is_out(&second) && !is_out(&third));
        drop(first);
        assert_eq!(room.open(), 3, "a place that was taken over is not given back twice");
        // Who has been answered waits again, behind those who did before.
        second.waits();
        let fifth = asking(&room, "198.51.100.2");
        assert!(is_out(&third) && !is_out(&second));
        let sixth = asking(&room, "198.51.100.3");
        assert!(is_out(&second) && !is_out(&fourth));
        assert!(enter(&room, "198.51.100.4").is_none(), "everybody is being served");
        drop((fourth, fifth, sixth));
        assert_eq!(room.open(), 0);
    }

    #[test]
    fn one_peer_has_a_share_and_loopback_is_no_peer() {
        let room = Room::new(8, 0);
        let mut seats = vec![asking(&room, FAR), asking(&room, FAR)];
        assert!(enter(&room, FAR).is_none() && enter(&room, "::ffff:203.0.113.7").is_none(), "a quarter of eight");
        seats.push(asking(&room, "2001:db8:1:2::1"));
        seats.push(asking(&room, "2001:db8:1:2:ffff::1"));
        assert!(enter(&room, "2001:db8:1:2::3").is_none(), "a customer has a network");
        seats.push(asking(&room, "2001:db8:1:3::1"));
        seats.extend((0..3).map(|_| asking(&room, HERE)));
        assert!(enter(&room, "198.51.100.1").is_none(), "all are taken");
        seats.extend((0..SPARE).map(|_| asking(&room, HERE)));
        assert!(enter(&room, HERE).is_none(), "loopback's own places too");
        seats.remove(0);
        assert!(enter(&room, "198.51.100.1").is_none(), "what is free is loopback's");
        assert_eq!(room.open(), 8 + SPARE - 1);
    }

    #[test]
    fn a_peer_that_is_silent_loses_its_own_places_first() {
        let room = Room::new(4, 2);
        let (others, first, second) = (enter(&room, HERE), enter(&room, FAR), enter(&room, FAR));
        let third = enter(&room, FAR).expect("in the place of its first");
        assert!(is_out(&first.expect("a place")) && !is_out(&second.expect("a place")) && !is_out(&third));
        assert!(!is_out(&others.expect("a place")));
    }

    #[test]
    fn what_stays_stays_until_its_last_part_is_gone() {
        let room = Room::new(1, 1);
        let seat = enter(&room, FAR).expect("a place");
        let part = seat.clone();
        seat.stays();
        seat.waits();
        drop(seat);
        assert!(enter(&room, FAR).is_none() && !is_out(&part) && room.open() == 1);
        drop(part);
        assert!(enter(&room, FAR).is_some());
    }
}
