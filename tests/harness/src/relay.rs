//! A TCP relay in front of one or more servers: passes bytes on until told to hold, swallow, delay or cut them, each
//! direction by itself.

use std::{
    collections::VecDeque,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, tcp},
    sync::watch,
    task::JoinSet,
    time::Instant,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    Error, Result,
    dice::Dice,
    wire::{Frames, Tamper},
};

/// Most a delayed direction holds back, in pieces of up to 64 KiB.
const HELD: usize = 1_024;

/// What happens to bytes and connections now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    Pass,
    /// Nothing moves, nothing is lost: both directions wait.
    Pause,
    /// Everything is read and thrown away, as by a router that drops; open connections are useless afterwards.
    Blackhole,
    /// Connections are cut and new ones are closed at once.
    Refuse,
}

/// What happens to the bytes of one direction.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Way {
    Pass,
    Pause,
    Blackhole,
    /// Each piece leaves this much later, in order.
    Delay(Duration),
    /// This share of the pieces stands still for so long, and all behind it.
    Stall {
        share: f64,
        lasting: Duration,
    },
}

/// The ways, and how often connections were cut: a watch may skip a state that lasted a moment, a count it can not.
#[derive(Debug, Clone, Copy)]
struct State {
    to_server: Way,
    to_client: Way,
    refuse: bool,
    cuts: u64,
}

impl State {
    const OPEN: State = State { to_server: Way::Pass, to_client: Way::Pass, refuse: false, cuts: 0 };
}

/// Listens on 127.0.0.1 and relays to a server until dropped.
pub struct Relay {
    address: SocketAddr,
    state: Arc<watch::Sender<State>>,
    bytes: Arc<AtomicU64>,
    stalls: Arc<AtomicU64>,
    stop: CancellationToken,
}

/// What every connection of a relay shares.
struct Shared {
    targets: Vec<String>,
    tamper: Option<Arc<dyn Tamper>>,
    state: watch::Receiver<State>,
    bytes: Arc<AtomicU64>,
    stalls: Arc<AtomicU64>,
}

impl Relay {
    /// `target` as `127.0.0.1:4222`, with or without `nats://`.
    pub async fn start(target: &str) -> Result<Self> {
        Self::start_with(&[target.to_owned()], None).await
    }

    /// Each connection goes to the first of `targets` that takes it, beginning with another one each time. With `tamper`
    /// every publish of a client passes through its hands.
    pub async fn start_with(targets: &[String], tamper: Option<Arc<dyn Tamper>>) -> Result<Self> {
        let targets = targets.iter().map(|t| t.trim_start_matches("nats://").to_owned()).collect();
        let listener = TcpListener::bind(("127.0.0.1", crate::ports::free_port()?)).await;
        let listener = listener.map_err(Error::io("relay listener"))?;
        let address = listener.local_addr().map_err(Error::io("relay address"))?;
        let state = Arc::new(watch::Sender::new(State::OPEN));
        let (bytes, stalls) = (Arc::<AtomicU64>::default(), Arc::<AtomicU64>::default());
        let stop = CancellationToken::new();
        let (state_seen, counted) = (state.subscribe(), (Arc::clone(&bytes), Arc::clone(&stalls)));
        let shared = Shared { targets, tamper, state: state_seen, bytes: counted.0, stalls: counted.1 };
        // Dropping the relay ends this task, and with it the connections in its set.
        TaskTracker::new().spawn(accept(listener, Arc::new(shared), stop.clone()));
        Ok(Self { address, state, bytes, stalls, stop })
    }

    pub fn url(&self) -> String {
        format!("nats://{}", self.address)
    }

    pub fn set(&self, mode: Mode) {
        let way = match mode {
            Mode::Pass | Mode::Refuse => Way::Pass,
            Mode::Pause => Way::Pause,
            Mode::Blackhole => Way::Blackhole,
        };
        self.state.send_modify(|s| {
            (s.to_server, s.to_client, s.refuse) = (way, way, mode == Mode::Refuse);
            s.cuts += u64::from(mode == Mode::Refuse);
        });
    }

    /// Each direction by itself. Bytes that a black hole has swallowed are missing in the middle: [`Self::reset`] ends such
    /// connections.
    pub fn set_ways(&self, to_server: Way, to_client: Way) {
        self.state.send_modify(|s| (s.to_server, s.to_client, s.refuse) = (to_server, to_client, false));
    }

    /// Cuts what is connected; new connections pass.
    pub fn reset(&self) {
        self.state.send_modify(|s| *s = State { cuts: s.cuts + 1, ..State::OPEN });
    }

    /// Bytes passed on so far, both ways.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Pieces that have stood still so far ([`Way::Stall`]).
    pub fn stalls(&self) -> u64 {
        self.stalls.load(Ordering::Relaxed)
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>, stop: CancellationToken) {
    let mut connections = JoinSet::new();
    let mut count = 0;
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            Some(_) = connections.join_next(), if !connections.is_empty() => {}
            accepted = listener.accept() => match accepted {
                Ok((client, _)) if !shared.state.borrow().refuse => {
                    count += 1;
                    connections.spawn(connection(client, Arc::clone(&shared), count));
                }
                // Refused, or the client was gone before we looked: either way there is nothing to relay.
                Ok(_) | Err(_) => {}
            },
        }
    }
}

async fn connection(client: TcpStream, shared: Arc<Shared>, count: usize) {
    let state = shared.state.clone();
    let born = state.borrow().cuts;
    let mut server = None;
    for n in 0..shared.targets.len() {
        let target = &shared.targets[(count + n) % shared.targets.len()];
        if let Ok(open) = TcpStream::connect(target).await {
            server = Some(open);
            break;
        }
    }
    let Some(server) = server else { return };
    // Without this a relayed request would wait for the peer's delayed acknowledgement.
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let (client_read, client_write) = client.into_split();
    let (server_read, server_write) = server.into_split();
    let up = Pump {
        way: |s| s.to_server,
        state: state.clone(),
        frames: shared.tamper.clone().map(Frames::new),
        dice: Dice::new(count as u64),
        bytes: Arc::clone(&shared.bytes),
        stalls: Arc::clone(&shared.stalls),
    };
    let down = Pump {
        way: |s| s.to_client,
        state: state.clone(),
        frames: None,
        dice: Dice::new(count as u64 + 1_000),
        bytes: Arc::clone(&shared.bytes),
        stalls: Arc::clone(&shared.stalls),
    };
    tokio::select! {
        () = cut(state, born) => {}
        () = up.run(client_read, server_write) => {}
        () = down.run(server_read, client_write) => {}
    }
}

async fn cut(mut state: watch::Receiver<State>, born: u64) {
    // An error means that the relay is gone.
    let _ = state.wait_for(|s| s.cuts != born).await;
}

/// One direction of one connection.
struct Pump {
    way: fn(&State) -> Way,
    state: watch::Receiver<State>,
    frames: Option<Frames>,
    dice: Dice,
    bytes: Arc<AtomicU64>,
    stalls: Arc<AtomicU64>,
}

impl Pump {
    async fn run(mut self, mut from: tcp::OwnedReadHalf, mut to: tcp::OwnedWriteHalf) {
        let mut buffer = vec![0; 64 * 1024];
        let mut held: VecDeque<(Instant, Bytes)> = VecDeque::new();
        loop {
            let due = held.front().map(|(due, _)| *due);
            // A publish that was told to come later leaves without anything behind it.
            let late = self.frames.as_ref().and_then(Frames::next_late);
            tokio::select! {
                read = from.read(&mut buffer), if held.len() < HELD => {
                    let Ok(n @ 1..) = read else { return };
                    let Some(due) = self.due(held.back().map(|(due, _)| *due)).await else { return };
                    let Some(due) = due else { continue };
                    let pieces = match &mut self.frames {
                        None => vec![Bytes::copy_from_slice(&buffer[..n])],
                        Some(frames) => frames.take(&buffer[..n]),
                    };
                    held.extend(pieces.into_iter().map(|piece| (due, piece)));
                }
                () = tokio::time::sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {
                    if !self.pass(&mut to, held.pop_front()).await {
                        return;
                    }
                }
                () = tokio::time::sleep_until(late.unwrap_or_else(Instant::now)), if late.is_some() => {
                    if let Some(frames) = &mut self.frames {
                        held.extend(frames.take_late().into_iter().map(|piece| (Instant::now(), piece)));
                    }
                }
            }
        }
    }

    /// When what was just read may leave: none = never; outer none = the relay is gone.
    async fn due(&mut self, before: Option<Instant>) -> Option<Option<Instant>> {
        let way = self.way;
        let now_is = way(&*self.state.wait_for(|s| way(s) != Way::Pause).await.ok()?);
        let later = match now_is {
            Way::Pass | Way::Pause => Duration::ZERO,
            Way::Blackhole => return Some(None),
            Way::Delay(by) => by,
            Way::Stall { share, lasting } => {
                if self.dice.chance(share) {
                    self.stalls.fetch_add(1, Ordering::Relaxed);
                    lasting
                } else {
                    Duration::ZERO
                }
            }
        };
        let due = Instant::now() + later;
        Some(Some(before.map_or(due, |b| b.max(due))))
    }

    /// False when the other end is gone. What was read before a pause began is held as well.
    async fn pass(&mut self, to: &mut tcp::OwnedWriteHalf, piece: Option<(Instant, Bytes)>) -> bool {
        let Some((_, piece)) = piece else { return true };
        let way = self.way;
        let now_is = match self.state.wait_for(|s| way(s) != Way::Pause).await {
            Ok(state) => way(&state),
            Err(_) => return false,
        };
        if now_is == Way::Blackhole {
            return true;
        }
        self.bytes.fetch_add(piece.len() as u64, Ordering::Relaxed);
        to.write_all(&piece).await.is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{server::NatsServer, wait::eventually};
    use futures_util::StreamExt;

    #[tokio::test]
    async fn faults_come_and_go() -> std::result::Result<(), Box<dyn std::error::Error>> {
        let server = NatsServer::start().await?;
        let relay = Relay::start(&server.url()).await?;
        let options = async_nats::ConnectOptions::new().ping_interval(Duration::from_millis(200));
        let client = options.connect(relay.url()).await?;
        let alive = || async { tokio::time::timeout(Duration::from_millis(300), client.flush()).await.is_ok() };
        assert!(alive().await);
        relay.set(Mode::Pause);
        let rtt = || async { tokio::time::timeout(Duration::from_millis(300), round_trip(&client)).await.is_ok() };
        assert!(!rtt().await);
        relay.set(Mode::Pass);
        eventually("answers after the pause", Duration::from_secs(5), || async { rtt().await.then_some(()) }).await?;
        relay.reset();
        eventually("answers after a reset", Duration::from_secs(10), || async { rtt().await.then_some(()) }).await?;
        relay.set(Mode::Blackhole);
        assert!(!rtt().await);
        relay.set(Mode::Pass);
        relay.reset();
        eventually("answers after a black hole", Duration::from_secs(10), || async { rtt().await.then_some(()) })
            .await?;
        assert!(relay.bytes() > 100);
        Ok(())
    }

    #[tokio::test]
    async fn each_direction_has_its_own_faults() -> std::result::Result<(), Box<dyn std::error::Error>> {
        let server = NatsServer::start().await?;
        let relay = Relay::start(&server.url()).await?;
        let client = async_nats::connect(relay.url()).await?;
        let direct = server.client().await?;
        let mut sub = direct.subscribe("x").await?;
        direct.flush().await?;
        // Towards the server all is well: what is published arrives, no answer comes back.
        relay.set_ways(Way::Pass, Way::Blackhole);
        client.publish("x", "1".into()).await?;
        assert!(tokio::time::timeout(Duration::from_secs(5), sub.next()).await?.is_some());
        assert!(tokio::time::timeout(Duration::from_millis(300), round_trip(&client)).await.is_err());
        relay.reset();
        eventually("answers again", Duration::from_secs(10), || async {
            tokio::time::timeout(Duration::from_secs(1), round_trip(&client)).await.ok().flatten()
        })
        .await?;
        relay.set_ways(Way::Delay(Duration::from_millis(200)), Way::Pass);
        let begun = Instant::now();
        round_trip(&client).await.ok_or("no answer")?;
        assert!(begun.elapsed() >= Duration::from_millis(200), "{:?}", begun.elapsed());
        relay.set_ways(Way::Pass, Way::Stall { share: 1.0, lasting: Duration::from_millis(300) });
        let begun = Instant::now();
        round_trip(&client).await.ok_or("no answer")?;
        assert!(begun.elapsed() >= Duration::from_millis(300), "{:?}", begun.elapsed());
        assert!(relay.stalls() > 0);
        Ok(())
    }

    async fn round_trip(client: &async_nats::Client) -> Option<()> {
        let inbox = client.new_inbox();
        let mut sub = client.subscribe(inbox.clone()).await.ok()?;
        client.publish(inbox, "x".into()).await.ok()?;
        sub.next().await.map(drop)
    }
}
