//! The two durable pull consumers of each worker incarnation.

use std::{collections::BTreeMap, time::Duration};

use async_nats::jetstream::{
    ErrorCode,
    consumer::{self, AckPolicy, DeliverPolicy, IntoConsumerConfig, pull},
};
use serde::{Deserialize, Serialize};
use voxfleet_schema::id::{GpuId, Incarnation, WorkerName};

use super::{
    TopologyError,
    names::{LIVE, WORK},
};
use crate::{Nats, ServerError, raw};

/// Between the two names of a worker. Ids may hold dashes and underscores, so neither could be told from a part of one.
const SEPARATOR: char = '=';

/// One name for both consumers of an incarnation; one token, as permissions need it.
pub(crate) fn consumer_name(worker: &WorkerName) -> String {
    format!("{}{SEPARATOR}{}", worker.gpu_id, worker.incarnation)
}

fn parse_consumer_name(name: &str) -> Option<WorkerName> {
    let (gpu, incarnation) = name.split_once(SEPARATOR)?;
    Some(WorkerName { gpu_id: GpuId::new(gpu).ok()?, incarnation: Incarnation::new(incarnation).ok()? })
}

/// Which consumers exist under one incarnation's name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkerConsumers {
    pub worker: WorkerName,
    pub live: bool,
    pub work: bool,
}

/// A hint taken and not acked within this comes again; by then the log has served its session.
const LIVE_ACK_WAIT: Duration = Duration::from_secs(30);
/// Hints are acked when taken, so this bounds only what is on the way.
const LIVE_ACK_PENDING: i64 = 4_096;
/// A job's slot says it is alive with progress acks more often than this.
const WORK_ACK_WAIT: Duration = Duration::from_secs(30);

/// Makes the consumers of this incarnation on `ASR_LIVE` and `ASR_WORK`. Idempotent; other `job_slots` change the cap.
pub async fn ensure_worker(nats: &Nats, worker: &WorkerName, job_slots: u32) -> Result<(), TopologyError> {
    let subjects = nats.subjects();
    let live = pull::Config {
        filter_subject: subjects.live_of(worker),
        ack_wait: LIVE_ACK_WAIT,
        max_ack_pending: LIVE_ACK_PENDING,
        ..worker_config(worker)
    };
    create(nats, LIVE, live).await?;
    let work = pull::Config {
        filter_subject: subjects.work_of(worker),
        ack_wait: WORK_ACK_WAIT,
        // 0 would mean the server's default of 1,000; a worker without slots does not pull.
        max_ack_pending: i64::from(job_slots.max(1)),
        ..worker_config(worker)
    };
    create(nats, WORK, work).await
}

fn worker_config(worker: &WorkerName) -> pull::Config {
    pull::Config {
        durable_name: Some(consumer_name(worker)),
        deliver_policy: DeliverPolicy::All,
        ack_policy: AckPolicy::Explicit,
        ..pull::Config::default()
    }
}

async fn create(nats: &Nats, stream: &'static str, config: pull::Config) -> Result<(), TopologyError> {
    #[derive(Serialize)]
    struct Request {
        stream_name: &'static str,
        config: consumer::Config,
    }
    let name = config.durable_name.clone().unwrap_or_default();
    let subject = format!("CONSUMER.CREATE.{stream}.{name}.{}", config.filter_subject);
    let request = Request { stream_name: stream, config: config.into_consumer_config() };
    let made: Result<consumer::Info, _> = raw::api(nats, subject, &request).await;
    made.map(|_| ()).map_err(|source| failed(stream, name, source))
}

fn failed(stream: &str, consumer: String, source: ServerError) -> TopologyError {
    if source.is_code(ErrorCode::STREAM_NOT_FOUND) {
        return TopologyError::Missing { stream: stream.to_owned() };
    }
    TopologyError::Consumer { stream: stream.to_owned(), consumer, source }
}

/// Deletes them (which fences this incarnation's acks: its name is never used again) and purges its subjects.
pub async fn remove_worker(nats: &Nats, worker: &WorkerName) -> Result<(), TopologyError> {
    #[derive(Deserialize)]
    struct Done {}
    let name = consumer_name(worker);
    let subjects = nats.subjects();
    for (stream, filter) in [(LIVE, subjects.live_of(worker)), (WORK, subjects.work_of(worker))] {
        let deleted: Result<Done, _> = raw::api(nats, format!("CONSUMER.DELETE.{stream}.{name}"), &raw::Empty {}).await;
        let purged = raw::purge(nats, stream, &filter, None).await;
        for result in [deleted.map(|Done {}| ()), purged] {
            match result {
                Ok(()) => {}
                // Gone already: what was asked for.
                Err(error)
                    if error.is_code(ErrorCode::CONSUMER_NOT_FOUND) || error.is_code(ErrorCode::STREAM_NOT_FOUND) => {}
                Err(source) => return Err(failed(stream, name, source)),
            }
        }
    }
    Ok(())
}

/// Every incarnation that has a consumer. A stream that is missing has none.
pub async fn list_worker_consumers(nats: &Nats) -> Result<Vec<WorkerConsumers>, TopologyError> {
    let mut found: BTreeMap<WorkerName, (bool, bool)> = BTreeMap::new();
    for worker in workers_of(nats, LIVE).await? {
        found.entry(worker).or_default().0 = true;
    }
    for worker in workers_of(nats, WORK).await? {
        found.entry(worker).or_default().1 = true;
    }
    Ok(found.into_iter().map(|(worker, (live, work))| WorkerConsumers { worker, live, work }).collect())
}

async fn workers_of(nats: &Nats, stream: &'static str) -> Result<Vec<WorkerName>, TopologyError> {
    #[derive(Serialize)]
    struct Page {
        offset: usize,
    }
    #[derive(Deserialize)]
    struct Names {
        #[serde(default)]
        total: usize,
        #[serde(default)]
        consumers: Option<Vec<String>>,
    }
    let mut workers = Vec::new();
    let mut offset = 0;
    loop {
        let page: Names = match raw::api(nats, format!("CONSUMER.NAMES.{stream}"), &Page { offset }).await {
            Ok(page) => page,
            Err(error) if error.is_code(ErrorCode::STREAM_NOT_FOUND) => return Ok(workers),
            Err(source) => return Err(TopologyError::Stream { stream: stream.to_owned(), source }),
        };
        let names = page.consumers.unwrap_or_default();
        offset += names.len();
        let last = names.is_empty() || offset >= page.total;
        // Others may read these streams too; only ours have such names.
        workers.extend(names.iter().filter_map(|name| parse_consumer_name(name)));
        if last {
            return Ok(workers);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn worker(gpu: &str, incarnation: &str) -> WorkerName {
        WorkerName { gpu_id: GpuId::new(gpu).expect("id"), incarnation: Incarnation::new(incarnation).expect("id") }
    }

    #[test]
    fn names_of_different_workers_differ_and_read_back() {
        let (a, b) = (worker("a-b", "c"), worker("a", "b-c"));
        assert_ne!(consumer_name(&a), consumer_name(&b));
        for worker in [a, b, worker("_", "-")] {
            assert_eq!(parse_consumer_name(&consumer_name(&worker)), Some(worker));
        }
        assert_eq!(parse_consumer_name("somebody-elses"), None);
        assert_eq!(parse_consumer_name("a=b=c"), None);
    }
}
