//! Events that are told while their stream does not answer.

use std::time::Duration;

use anyhow::{Result, ensure};
use tokio::{task::JoinSet, time::timeout};
use voxfleet_harness::server::NatsServer;
use voxfleet_nats::{
    events::Events,
    publish::Publisher,
    transcript::{self, Filter, Start},
};
use voxfleet_schema::event::{Event, Scope, What};

use crate::nats_topology::ready;

const SOON: Duration = Duration::from_secs(20);
/// More than the connection's time for a request.
const UNANSWERED: Duration = Duration::from_millis(6_000);

#[tokio::test]
async fn events_told_while_the_server_is_away_or_stopped_are_stored_once_and_in_order() -> Result<()> {
    let mut server = NatsServer::start().await?;
    let nats = ready(vec![server.url()], 1).await?;
    let (events, queue) = Events::new();
    let mut tasks = JoinSet::new();
    tasks.spawn({
        let (nats, publisher) = (nats.clone(), Publisher::new(&nats));
        async move { queue.run(&nats, &publisher).await }
    });
    let tell = |n: u64| events.tell(Event::new(Scope::Session, "call", What::Moved, n), None);
    (0..3).for_each(tell);
    server.stop()?;
    (3..6).for_each(tell);
    // For longer than a publish waits for its answer: what was sent first arrives twice.
    ensure!(nats.rtt(UNANSWERED).await.is_err(), "it is stopped");
    server.cont()?;
    nats.rtt(SOON).await?;
    server.kill9()?;
    (6..9).for_each(tell);
    server.start_again().await?;
    (9..12).for_each(tell);
    drop(events);
    let ended = timeout(SOON, tasks.join_next()).await?;
    ensure!(matches!(ended, Some(Ok(()))), "the queue ends when it is empty: {ended:?}");
    let mut all = transcript::events(&nats, &Filter::All, Start::First);
    for n in 0..12 {
        let read = timeout(SOON, all.next()).await??;
        ensure!(read.value.at_ms == n, "{} in the place of {n}", read.value.at_ms);
    }
    ensure!(timeout(Duration::from_millis(300), all.next()).await.is_err(), "and no more");
    Ok(())
}
