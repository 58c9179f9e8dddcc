//! The call as a producer sends it, and its transcript as a viewer sees it.

use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use voxfleet_nats::{Nats, transcript::Filter};
use voxfleet_schema::{
    id::{Kind, StreamId},
    transcript::{Final, join_text},
};

use super::call::Call;
use crate::{
    producer::{Producer, ago, due},
    transcript::{
        follow::{Follow, Followed, Seen, follow_all},
        screen::Screen,
    },
};

/// After the last chunk: the largest window on a busy machine, and then some.
pub(crate) const LAST_WORDS: Duration = Duration::from_secs(60);

/// What a live run gave.
pub(crate) struct Live {
    pub(crate) finals: Vec<Final>,
    /// From the end of a final's speech until it was here, in ms.
    pub(crate) lags_ms: Vec<u64>,
    pub(crate) wall: Duration,
}

impl Live {
    pub(crate) fn text(&self) -> String {
        let texts: Vec<String> = self.finals.iter().map(Final::text).collect();
        join_text(texts.iter().map(String::as_str))
    }
}

/// Streams the call and follows its transcript to the end final; `seen` is told whatever comes.
pub(crate) async fn transcribe(
    nats: &Nats,
    call: &Call,
    id: &StreamId,
    speed: f64,
    options: &[(String, String)],
    screen: &mut Screen,
    seen: &mut (dyn FnMut(Seen<'_>) + Send),
) -> anyhow::Result<Live> {
    let what = Follow { filter: Filter::One(Kind::Session, id.clone()), from_start: false, until_end: true };
    let (mut finals, mut lags_ms) = (Vec::new(), Vec::new());
    let begun = Instant::now();
    let lag = move |ms: u64| Some(ago(begun, ms, speed));
    let mut seen = |news: Seen<'_>| {
        if let Seen::Final(new) = news {
            lags_ms.extend(new.segments.last().map(|last| ago(begun, last.end_ms, speed)));
            finals.push(new.clone());
        }
        seen(news);
    };
    let stop = CancellationToken::new();
    let following = follow_all(nats, &what, screen, &lag, &mut seen, &stop);
    let sending = async {
        send(nats, call, id, speed, begun, options).await?;
        // From here on only the last words are awaited; without a bound a broken fleet would hang the demo.
        tokio::time::sleep(LAST_WORDS).await;
        Err::<(), _>(anyhow::anyhow!("no end final within {} s of the end of the call", LAST_WORDS.as_secs()))
    };
    let followed = tokio::select! {
        followed = following => followed?,
        failed = sending => return Err(failed.err().unwrap_or_else(|| anyhow::anyhow!("sending ended"))),
    };
    if let Followed::Ended(end) = &followed
        && let Some(error) = &end.error
    {
        anyhow::bail!("the session ended with {error}");
    }
    Ok(Live { finals, lags_ms, wall: begun.elapsed() })
}

async fn send(
    nats: &Nats,
    call: &Call,
    id: &StreamId,
    speed: f64,
    begun: Instant,
    options: &[(String, String)],
) -> anyhow::Result<()> {
    let mut producer = Producer::new(nats, id.clone(), call.format, Duration::from_secs(30))?.with_options(options);
    let never = CancellationToken::new();
    let mut sent = 0;
    while sent < call.pcm.len() {
        let end = (sent + call.chunk_bytes()).min(call.pcm.len());
        tokio::time::sleep_until(due(begun, call.ms_of(end), speed)).await;
        producer.send(call.pcm.slice(sent..end), false, &never).await?;
        sent = end;
    }
    producer.send(bytes::Bytes::new(), true, &never).await?;
    Ok(())
}
