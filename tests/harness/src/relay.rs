//! A TCP relay in front of a server: passes bytes on until told to hold, swallow or cut them.

use std::{net::SocketAddr, sync::Arc};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, tcp},
    sync::watch,
    task::JoinSet,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{Error, Result};

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

/// The mode, and how often connections were cut: a watch may skip a state that lasted a moment, a count it can not.
#[derive(Debug, Clone, Copy)]
struct State {
    mode: Mode,
    cuts: u64,
}

/// Listens on 127.0.0.1 and relays to one server until dropped.
pub struct Relay {
    address: SocketAddr,
    state: Arc<watch::Sender<State>>,
    stop: CancellationToken,
}

impl Relay {
    /// `target` as `127.0.0.1:4222`, with or without `nats://`.
    pub async fn start(target: &str) -> Result<Self> {
        let target: Arc<str> = target.trim_start_matches("nats://").into();
        let listener = TcpListener::bind(("127.0.0.1", crate::server::free_port()?)).await;
        let listener = listener.map_err(Error::io("relay listener"))?;
        let address = listener.local_addr().map_err(Error::io("relay address"))?;
        let state = Arc::new(watch::Sender::new(State { mode: Mode::Pass, cuts: 0 }));
        let stop = CancellationToken::new();
        // Dropping the relay ends this task, and with it the connections in its set.
        TaskTracker::new().spawn(accept(listener, target, Arc::clone(&state), stop.clone()));
        Ok(Self { address, state, stop })
    }

    pub fn url(&self) -> String {
        format!("nats://{}", self.address)
    }

    pub fn set(&self, mode: Mode) {
        self.state.send_modify(|s| {
            s.mode = mode;
            s.cuts += u64::from(mode == Mode::Refuse);
        });
    }

    /// Cuts what is connected; new connections pass.
    pub fn reset(&self) {
        self.state.send_modify(|s| *s = State { mode: Mode::Pass, cuts: s.cuts + 1 });
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

async fn accept(listener: TcpListener, target: Arc<str>, state: Arc<watch::Sender<State>>, stop: CancellationToken) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            Some(_) = connections.join_next(), if !connections.is_empty() => {}
            accepted = listener.accept() => match accepted {
                Ok((client, _)) if state.borrow().mode != Mode::Refuse => {
                    connections.spawn(connection(client, Arc::clone(&target), state.subscribe()));
                }
                // Refused, or the client was gone before we looked: either way there is nothing to relay.
                Ok(_) | Err(_) => {}
            },
        }
    }
}

async fn connection(client: TcpStream, target: Arc<str>, state: watch::Receiver<State>) {
    let born = state.borrow().cuts;
    let Ok(server) = TcpStream::connect(&*target).await else { return };
    // Without this a relayed request would wait for the peer's delayed acknowledgement.
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let (client_read, client_write) = client.into_split();
    let (server_read, server_write) = server.into_split();
    tokio::select! {
        () = cut(state.clone(), born) => {}
        () = pump(client_read, server_write, state.clone()) => {}
        () = pump(server_read, client_write, state) => {}
    }
}

async fn cut(mut state: watch::Receiver<State>, born: u64) {
    // An error means that the relay is gone.
    let _ = state.wait_for(|s| s.cuts != born).await;
}

async fn pump(mut from: tcp::OwnedReadHalf, mut to: tcp::OwnedWriteHalf, mut state: watch::Receiver<State>) {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let Ok(n @ 1..) = from.read(&mut buffer).await else { return };
        let mode = match state.wait_for(|s| s.mode != Mode::Pause).await {
            Ok(state) => state.mode,
            Err(_) => return,
        };
        if mode == Mode::Pass && to.write_all(&buffer[..n]).await.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{server::NatsServer, wait::eventually};
    use std::time::Duration;

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
        Ok(())
    }

    async fn round_trip(client: &async_nats::Client) -> Option<()> {
        use futures_util::StreamExt;
        let inbox = client.new_inbox();
        let mut sub = client.subscribe(inbox.clone()).await.ok()?;
        client.publish(inbox, "x".into()).await.ok()?;
        sub.next().await.map(drop)
    }
}
