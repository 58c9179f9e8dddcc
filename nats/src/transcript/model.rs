//! Every order in which authors, their networks and a server can meet, walked through with the very machine that the program
//! runs ([`Storing`]). No time passes here: whatever can happen next happens in some walk.
//!
//! The server holds one session's chain. It checks fence and id in the order of one server (R1) or of three (R3), may forget
//! ids at any time, may answer a fenced publish with a conflict while another is on its way (R3), may lose its answer, and may
//! be purged once. A publish may wait in its author's queue while the author gives up waiting and goes on: it comes later, as
//! a zombie's does. An author may stop at any point, which is every walk in which nothing of it happens any more.

use std::{
    collections::{HashMap, hash_map::Entry},
    hash::{Hash, Hasher},
};

use super::storing::{Act, End, Heard, Link, Storing};

/// What tells one computation from every other.
type Id = u16;

/// A final, as far as the chain goes: which computation it is and which one it goes on from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Content {
    author: u8,
    serial: u8,
    epoch: u64,
    /// Place in the chain: its range begins where that of the one before ends.
    index: u16,
    after: Option<(u8, u8)>,
}

impl Content {
    fn name(&self) -> (u8, u8) {
        (self.author, self.serial)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Stored {
    seq: u64,
    content: Content,
    id: Id,
}

/// A publish on its way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Sent {
    content: Content,
    id: Id,
    expected: Option<u64>,
    attempt: u8,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Phase {
    /// It has not read the chain yet.
    Outside,
    /// It has a final to store; waits for the answer to an attempt.
    At {
        content: Content,
        storing: Storing<Id>,
        waits_for: Option<u8>,
    },
    LetGo,
    /// Everything it wanted to say is stored.
    Done,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Author {
    phase: Phase,
    serials: u8,
    stored: u8,
    /// Answers it may still give up waiting for.
    patience: u8,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct World {
    next_seq: u64,
    chain: Vec<Stored>,
    /// What a purge took away.
    gone: Vec<Stored>,
    ids: Vec<(Id, u64)>,
    net: Vec<Sent>,
    authors: Vec<Author>,
    purges_left: u8,
    /// What a replica that lags holds.
    replica: Vec<Stored>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mistake {
    None,
    /// Finals are published without a fence.
    NoFence,
    /// The id follows from the place in the chain.
    DerivedId,
    /// The last final is read from any replica.
    Replica,
}

#[derive(Debug, Clone)]
struct Setup {
    /// The epoch of each author.
    epochs: &'static [u64],
    /// Finals each of them has to say.
    links: u8,
    patience: u8,
    purges: u8,
    /// Three servers: ids before the fence.
    replicated: bool,
    mistake: Mistake,
}

#[derive(Debug, Clone, Copy)]
enum Step {
    Begin(u8),
    Publish(u8),
    Read(u8),
    GivesUp(u8),
    /// The connection says that it failed, whatever became of the publish.
    Fails(u8),
    Serve {
        author: u8,
        attempt: u8,
        answer: Answer,
    },
    Forget,
    Purge,
    CatchUp,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Answer {
    Told,
    Lost,
    /// Refused because another one is on its way.
    InFlight,
}

type Broken = &'static str;

/// A walk that leads to more worlds than this has something in it that only grows.
const MOST: usize = 3_000_000;

impl Setup {
    fn start(&self) -> World {
        let author = Author { phase: Phase::Outside, serials: 0, stored: 0, patience: self.patience };
        World {
            next_seq: 1,
            chain: Vec::new(),
            gone: Vec::new(),
            ids: Vec::new(),
            net: Vec::new(),
            authors: vec![author; self.epochs.len()],
            purges_left: self.purges,
            replica: Vec::new(),
        }
    }

    fn id(&self, content: &Content) -> Id {
        match self.mistake {
            Mistake::DerivedId => content.index,
            _ => Id::from(content.author) * 64 + Id::from(content.serial),
        }
    }

    /// What may happen next.
    fn steps(&self, world: &World) -> Vec<Step> {
        let mut steps = Vec::new();
        for (n, author) in (0u8..).zip(&world.authors) {
            match &author.phase {
                Phase::Outside => steps.push(Step::Begin(n)),
                Phase::At { waits_for: Some(_), .. } if author.patience > 0 => {
                    steps.push(Step::GivesUp(n));
                    steps.push(Step::Fails(n));
                }
                Phase::At { waits_for: Some(_), .. } | Phase::LetGo | Phase::Done => {}
                Phase::At { storing, waits_for: None, .. } => steps.push(match storing.next() {
                    Act::Publish { .. } => Step::Publish(n),
                    Act::Read | Act::Done(_) => Step::Read(n),
                }),
            }
        }
        for sent in &world.net {
            let serve = |answer| Step::Serve { author: sent.content.author, attempt: sent.attempt, answer };
            steps.push(serve(Answer::Told));
            let author = &world.authors[usize::from(sent.content.author)];
            let waits = matches!(author.phase, Phase::At { waits_for, .. } if waits_for == Some(sent.attempt));
            if waits && author.patience > 0 {
                steps.push(serve(Answer::Lost));
            }
            if self.replicated && waits && world.net.len() > 1 {
                steps.push(serve(Answer::InFlight));
            }
        }
        if !world.ids.is_empty() {
            steps.push(Step::Forget);
        }
        if world.purges_left > 0 && !world.chain.is_empty() {
            steps.push(Step::Purge);
        }
        if self.mistake == Mistake::Replica && world.replica != world.chain {
            steps.push(Step::CatchUp);
        }
        steps
    }

    fn take(&self, world: &World, step: Step) -> Result<World, Broken> {
        let mut next = world.clone();
        match step {
            Step::Begin(n) => {
                let last = self.read(&next);
                let epoch = self.epochs[usize::from(n)];
                match last {
                    Some(last) if last.content.epoch > epoch => next.authors[usize::from(n)].phase = Phase::LetGo,
                    last => self.compute(&mut next, n, last),
                }
            }
            Step::Publish(n) => {
                // The lowest number that none of its own on the way has: numbers that only grow would never meet a world again.
                let own = |attempt: u8| next.net.iter().any(|s| s.content.author == n && s.attempt == attempt);
                let attempt = (0..u8::MAX).find(|attempt| !own(*attempt)).unwrap_or(u8::MAX);
                let author = &mut next.authors[usize::from(n)];
                if let Phase::At { content, storing, waits_for } = &mut author.phase
                    && let Act::Publish { expected } = storing.next()
                {
                    *waits_for = Some(attempt);
                    let content = *content;
                    next.net.push(Sent { content, id: self.id(&content), expected, attempt });
                    next.net.sort_unstable();
                }
            }
            Step::Read(n) => {
                let last = self.read(&next);
                let link = last.map(|s| Link { seq: s.seq, final_id: s.id, epoch: s.content.epoch });
                self.tell(&mut next, n, Heard::Found(link), last)?;
            }
            Step::GivesUp(n) | Step::Fails(n) => {
                next.authors[usize::from(n)].patience -= 1;
                let heard = if matches!(step, Step::Fails(_)) { Heard::NotNow } else { Heard::Unclear };
                self.tell(&mut next, n, heard, None)?;
            }
            Step::Serve { author, attempt, answer } => self.serve(&mut next, author, attempt, answer)?,
            Step::Forget => next.ids.clear(),
            Step::Purge => {
                next.purges_left -= 1;
                let purged = std::mem::take(&mut next.chain);
                next.gone.extend(purged);
            }
            Step::CatchUp => next.replica = next.chain.clone(),
        }
        check(&next)?;
        Ok(next)
    }

    fn read(&self, world: &World) -> Option<Stored> {
        let held = if self.mistake == Mistake::Replica { &world.replica } else { &world.chain };
        held.last().copied()
    }

    /// The author begins a new final, which goes on from `last`.
    fn compute(&self, world: &mut World, n: u8, last: Option<Stored>) {
        let author = &mut world.authors[usize::from(n)];
        author.serials += 1;
        let content = Content {
            author: n,
            serial: author.serials,
            epoch: self.epochs[usize::from(n)],
            index: last.map_or(0, |s| s.content.index + 1),
            after: last.map(|s| s.content.name()),
        };
        let storing = Storing::new(self.id(&content), content.epoch, last.map(|s| s.seq));
        author.phase = Phase::At { content, storing, waits_for: None };
    }

    fn serve(&self, world: &mut World, n: u8, attempt: u8, answer: Answer) -> Result<(), Broken> {
        let at =
            world.net.iter().position(|s| s.content.author == n && s.attempt == attempt).ok_or("no such publish")?;
        let sent = world.net.remove(at);
        let heard = if answer == Answer::InFlight { Heard::Unclear } else { self.answer(world, &sent) };
        let waits =
            matches!(world.authors[usize::from(n)].phase, Phase::At { waits_for, .. } if waits_for == Some(attempt));
        if waits && answer != Answer::Lost {
            self.tell(world, n, heard, None)?;
        }
        Ok(())
    }

    fn answer(&self, world: &mut World, sent: &Sent) -> Heard<Id> {
        let last = world.chain.last().map_or(0, |s| s.seq);
        let fence_holds = self.mistake == Mistake::NoFence || sent.expected.unwrap_or(0) == last;
        let known = world.ids.iter().find(|(id, _)| *id == sent.id).map(|(_, seq)| *seq);
        match (known, fence_holds) {
            // One server looks at the fence first, three at the id.
            (_, false) if !self.replicated => Heard::Unclear,
            (Some(seq), _) => Heard::Ack { seq, duplicate: true },
            (None, false) => Heard::Unclear,
            (None, true) => {
                let seq = world.next_seq;
                world.next_seq += 1;
                world.chain.push(Stored { seq, content: sent.content, id: sent.id });
                world.ids.push((sent.id, seq));
                world.ids.sort_unstable();
                Heard::Ack { seq, duplicate: false }
            }
        }
    }

    /// The author hears something, and goes on as far as it can by itself.
    fn tell(&self, world: &mut World, n: u8, heard: Heard<Id>, found: Option<Stored>) -> Result<(), Broken> {
        let author = &mut world.authors[usize::from(n)];
        let Phase::At { content, storing, waits_for } = &mut author.phase else { return Ok(()) };
        *waits_for = None;
        storing.heard(heard);
        let (content, Act::Done(end)) = (*content, storing.next()) else { return Ok(()) };
        match end {
            End::Stored { seq, chain_lost } => {
                author.stored += 1;
                let enough = author.stored == self.links;
                let mine = Stored { seq, content, id: self.id(&content) };
                // At this very moment: an answer comes with what it tells, a read sees what is there.
                if !world.chain.contains(&mine) {
                    return Err("an author believes that its final stands where it does not");
                }
                if chain_lost && world.gone.is_empty() {
                    return Err("a chain is said to be lost that was not");
                }
                if enough {
                    world.authors[usize::from(n)].phase = Phase::Done;
                } else {
                    self.compute(world, n, Some(mine));
                }
            }
            End::LetGo => {
                if found.is_none_or(|s| s.content.epoch <= content.epoch) {
                    return Err("an author lets go although no higher epoch has written");
                }
                author.phase = Phase::LetGo;
            }
            End::Rebuild => self.compute(world, n, found),
        }
        Ok(())
    }

    /// Walks everywhere. Returns how many worlds there are.
    fn explore(&self) -> Result<usize, String> {
        let mut seen: HashMap<u128, u32> = HashMap::new();
        // How each world was come by, for the story of one that is broken.
        let mut come_by: Vec<(u32, Option<Step>)> = Vec::new();
        let mut before: Vec<Vec<u32>> = Vec::new();
        let mut ends = Vec::new();
        let mut frontier = vec![(0u32, self.start())];
        seen.insert(fingerprint(&frontier[0].1), 0);
        come_by.push((0, None));
        before.push(Vec::new());
        while !frontier.is_empty() {
            let mut further = Vec::new();
            for (at, world) in frontier {
                if world.authors.iter().all(|a| matches!(a.phase, Phase::LetGo | Phase::Done)) {
                    ends.push(at);
                }
                for step in self.steps(&world) {
                    let next = self.take(&world, step).map_err(|broken| {
                        let mut story = vec![format!("{step:?}")];
                        let mut back = at;
                        while let (from, Some(step)) = come_by[back as usize] {
                            story.push(format!("{step:?}"));
                            back = from;
                        }
                        story.reverse();
                        format!("{broken}: {}", story.join(", "))
                    })?;
                    let new = u32::try_from(come_by.len()).map_err(|e| e.to_string())?;
                    match seen.entry(fingerprint(&next)) {
                        Entry::Occupied(known) => before[*known.get() as usize].push(at),
                        Entry::Vacant(place) => {
                            if come_by.len() >= MOST {
                                return Err(format!("more than {MOST} worlds"));
                            }
                            place.insert(new);
                            come_by.push((at, Some(step)));
                            before.push(vec![at]);
                            further.push((new, next));
                        }
                    }
                }
            }
            frontier = further;
        }
        // Nothing is ever stuck: from everywhere some walk ends with everybody content.
        let mut reaches = vec![false; come_by.len()];
        while let Some(at) = ends.pop() {
            if !std::mem::replace(&mut reaches[at as usize], true) {
                ends.extend(&before[at as usize]);
            }
        }
        match reaches.iter().position(|reaches| !reaches) {
            Some(stuck) => Err(format!("world {stuck} of {} never ends", come_by.len())),
            None => Ok(come_by.len()),
        }
    }
}

/// What must hold in every world.
fn check(world: &World) -> Result<(), Broken> {
    for (n, link) in world.chain.iter().enumerate() {
        let before = n.checked_sub(1).map(|n| world.chain[n].content);
        match before {
            Some(before) => {
                if link.content.after != Some(before.name()) {
                    return Err("a final stands behind one that it does not go on from");
                }
                if link.content.index != before.index + 1 {
                    return Err("ranges do not meet");
                }
            }
            None if link.content.after.is_some() && world.gone.is_empty() => {
                return Err("the first final goes on from one that is not there");
            }
            None => {}
        }
        if world.chain[..n].iter().any(|s| s.content.name() == link.content.name()) {
            return Err("a final stands twice");
        }
    }
    Ok(())
}

/// Wide enough that two of a few million worlds are not taken for one.
struct Fingerprint(u128);

impl Hasher for Fingerprint {
    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.write_u64(u64::from(*byte)));
    }

    fn write_u8(&mut self, n: u8) {
        self.write_u64(n.into());
    }

    fn write_u64(&mut self, n: u64) {
        // FNV-1a's multiplier for 128 bits, its upper half folded back so that every bit reaches every other.
        self.0 = (self.0 ^ u128::from(n)).wrapping_mul(0x0000_0000_0100_0000_0000_0000_0000_013b);
        self.0 ^= self.0 >> 59;
    }

    fn write_usize(&mut self, n: usize) {
        self.write_u64(n as u64);
    }

    fn finish(&self) -> u64 {
        self.0 as u64
    }
}

fn fingerprint(world: &World) -> u128 {
    let mut hasher = Fingerprint(0x6c62_272e_07bb_0142_62b8_2175_6295_c58d);
    world.hash(&mut hasher);
    hasher.0
}

fn setups(mistake: Mistake) -> Vec<Setup> {
    let mut setups = Vec::new();
    for replicated in [false, true] {
        let setup = |epochs, links, patience, purges| Setup { epochs, links, patience, purges, replicated, mistake };
        setups.extend([
            // One author and its own late publishes.
            setup(&[1], 3, 3, 1),
            // An owner and its successor; two that believe in the same epoch.
            setup(&[1, 2], 2, 1, 1),
            setup(&[1, 1], 2, 1, 0),
            setup(&[1, 1], 1, 1, 1),
            // Two owners and a successor.
            setup(&[1, 1, 2], 1, 1, 0),
        ]);
    }
    setups
}

#[test]
fn no_order_of_events_breaks_the_chain() {
    for setup in setups(Mistake::None) {
        match setup.explore() {
            Ok(worlds) => {
                println!("{worlds} worlds: {setup:?}");
                assert!(worlds > 500, "{setup:?} is hardly a model: {worlds}");
            }
            Err(broken) => panic!("{setup:?}: {broken}"),
        }
    }
}

#[test]
fn what_the_chain_rests_on_is_needed() {
    for (mistake, seen) in [
        (Mistake::NoFence, "a final stands behind one that it does not go on from"),
        (Mistake::DerivedId, "an author believes that its final stands where it does not"),
        (Mistake::Replica, "an author believes that its final stands where it does not"),
    ] {
        let found = setups(mistake).iter().find_map(|setup| setup.explore().err());
        let found = found.unwrap_or_else(|| panic!("the model does not see {mistake:?}"));
        assert!(found.starts_with(seen), "{mistake:?}: {found}");
    }
}
