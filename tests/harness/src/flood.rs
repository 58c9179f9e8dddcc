//! One tenant that sends whatever the server takes, and what somebody else notices of it.

use std::time::{Duration, Instant};

use async_nats::{Client, HeaderMap, jetstream};
use bytes::Bytes;
use futures_util::StreamExt as _;
use serde_json::Value;
use tokio_util::sync::CancellationToken;

use crate::{Error, Result, audio::Pcm, load::Pipeline, producer::Producer};

/// What a flood came to.
#[derive(Debug, Clone, Copy, Default)]
pub struct Flooded {
    pub messages: u64,
    pub refused: u64,
    pub seconds: f64,
}

/// Sends `bytes` to the audio of `sessions` sessions in turn until told to stop: `per_s` of them in a second, or as many as
/// JetStream acknowledges.
pub async fn flood(
    client: Client,
    sessions: usize,
    bytes: usize,
    per_s: Option<f64>,
    stop: &CancellationToken,
) -> Result<Flooded> {
    let payload = Bytes::from(vec![0; bytes]);
    let mut pipeline = Pipeline::new(client);
    let (begin, mut messages) = (Instant::now(), 0u64);
    while !stop.is_cancelled() {
        if let Some(per_s) = per_s {
            let due = Duration::from_secs_f64(messages as f64 / per_s);
            tokio::time::sleep_until((begin + due).into()).await;
        }
        let subject = format!("asr.v1.audio.flood-{}", messages % sessions.max(1) as u64);
        pipeline.publish(subject, HeaderMap::new(), payload.clone()).await?;
        messages += 1;
    }
    let seconds = begin.elapsed().as_secs_f64();
    Ok(Flooded { messages, refused: pipeline.finish().await, seconds })
}

/// Somebody who says one thing after the other and waits for each to come back.
pub struct Talker {
    producer: Producer,
    finals: async_nats::Subscriber,
    piece: Pcm,
    samples: u64,
}

/// Longest wait for one final.
const PATIENCE: Duration = Duration::from_secs(30);

impl Talker {
    /// `piece` is what is said each time.
    pub async fn begin(client: Client, session: &str, piece: Pcm) -> Result<Self> {
        let finals = client.subscribe(format!("asr.v1.transcript.session.{session}.final")).await;
        let finals = finals.map_err(Error::nats("finals"))?;
        client.flush().await.map_err(Error::nats("finals"))?;
        Ok(Self { producer: Producer::named(jetstream::new(client), session, "talker"), finals, piece, samples: 0 })
    }

    /// Says it once; milliseconds from the publish of the flush behind it to the final that covers it.
    pub async fn say(&mut self) -> Result<f64> {
        let piece = self.piece.clone();
        self.producer.stream(&piece, 200, crate::producer::Pace::AsFastAsPossible).await?;
        self.samples += piece.samples.len() as u64;
        let begin = Instant::now();
        self.producer.flush().await?;
        let covered = async {
            while let Some(message) = self.finals.next().await {
                let said: Value = serde_json::from_slice(&message.payload).unwrap_or_default();
                if said["to_sample"].as_u64().is_some_and(|to| to >= self.samples) {
                    return Ok(begin.elapsed().as_secs_f64() * 1e3);
                }
            }
            Err(Error::Wrong("the server is gone".to_owned()))
        };
        let waited = tokio::time::timeout(PATIENCE, covered).await;
        waited.unwrap_or_else(|_| Err(Error::Wrong(format!("no final within {PATIENCE:?}"))))
    }

    pub async fn end(mut self) -> Result<()> {
        self.producer.end().await.map(drop)
    }
}
