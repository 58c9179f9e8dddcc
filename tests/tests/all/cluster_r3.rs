//! The same live session on three servers with three replicas of everything.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use futures_util::future::try_join_all;
use voxfleet_harness::{
    audio, checker,
    fleet::{self, Fleet, Servers},
    producer::{Pace, Producer},
    server::Cluster,
};

use crate::direct;

#[tokio::test(flavor = "multi_thread")]
async fn live_sessions_on_three_replicas_end_with_the_right_text() -> Result<()> {
    let _turn = fleet::turn().await;
    let cluster = Cluster::start(3).await?;
    let fleet =
        Fleet::builder().on(Servers::Many(cluster)).set("dispatcher.topology.replicas", 3).workers(2).start().await?;
    let js = fleet.js();
    let sessions = (0..6).map(|n| {
        let js = js.clone();
        async move {
            let pcm = audio::bursts(300 + n, 8.0);
            let session = format!("r3-{n}");
            let mut producer = Producer::named(js.clone(), &session, "s1");
            producer.stream(&pcm, 200, Pace::Speed(4.0)).await?;
            producer.end().await?;
            let text = fleet::wait_end(&js, &session, Duration::from_secs(60)).await?;
            checker::check(&js, &session).await?.clean()?;
            ensure!(text == direct::simulated_text(&pcm)?, "{session}: {text}");
            Ok::<_, anyhow::Error>(())
        }
    });
    let outcome = try_join_all(sessions).await;
    outcome.with_context(|| fleet.logs())?;
    for stream in ["ASR_AUDIO", "ASR_TRANSCRIPT", "ASR_CHECKPOINT", "KV_asr_sessions"] {
        let info = js.get_stream(stream).await?;
        assert_eq!(info.cached_info().config.num_replicas, 3, "{stream}");
    }
    Ok(())
}
