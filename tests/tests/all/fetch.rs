//! Recordings are brought from where a stranger says: whole or refused, over breaks, within bounds, and from nowhere that
//! the configuration does not allow.

mod body;
mod hosts;
mod patience;
mod stores;

use std::{
    io::Read as _,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use bytes::Bytes;
use futures_util::StreamExt as _;
use tokio::task::JoinSet;
use voxfleet_harness::{
    https::{Answer, Server},
    server::NatsServer,
    wait::eventually,
};
use voxfleet_nats::media::Media;
use voxfleet_schema::{
    failure::{Failure, FailureClass as Class},
    job::AudioUrl,
};
use voxfleet_store::fetch::{FetchConfig, Fetcher, Incoming, Spooled};

use super::nats_topology::ready;

const SOON: Duration = Duration::from_secs(10);
/// In a URL's query; it must come up nowhere.
const SIGNATURE: &str = "X-Signature=0a1b2c3d4e5f";

/// Bytes that tell their place.
fn recording(len: usize) -> Bytes {
    (0..len).map(|n| (n % 251) as u8 ^ (n / 251) as u8).collect::<Vec<_>>().into()
}

/// A fleet's object store, a folder for spooling, and a web server.
struct Rig {
    _nats: NatsServer,
    media: Media,
    web: Server,
    spool: tempfile::TempDir,
}

impl Rig {
    async fn start() -> Result<Self> {
        let server = NatsServer::start().await?;
        let nats = ready(vec![server.url()], 1).await?;
        let (web, spool) = (Server::start().await?, tempfile::tempdir()?);
        Ok(Self { _nats: server, media: Media::new(&nats), web, spool })
    }

    /// What allows the web server, with short patience.
    fn config(&self) -> FetchConfig {
        FetchConfig {
            https_hosts: vec![self.web.host()],
            ca_file: Some(self.web.ca_file()),
            connect_timeout_ms: 2_000,
            stall_timeout_ms: 2_000,
            spool_dir: Some(self.spool.path().to_owned()),
            ..FetchConfig::default()
        }
    }

    fn fetcher(&self, config: FetchConfig) -> Result<Fetcher> {
        ensure!(config.problems().is_empty(), "{:?}", config.problems());
        Ok(Fetcher::new(config, self.media.clone())?)
    }

    fn nothing_is_left(&self) -> Result<()> {
        ensure!(std::fs::read_dir(self.spool.path())?.next().is_none(), "the spool folder holds something");
        Ok(())
    }
}

fn parsed(url: &str) -> Result<AudioUrl> {
    AudioUrl::parse(url).with_context(|| url.to_owned())
}

async fn spooled(fetcher: &Fetcher, url: &str) -> Result<Bytes> {
    let Spooled { mut file, bytes, .. } = fetcher.spool(&parsed(url)?).await?;
    let mut read = Vec::new();
    file.read_to_end(&mut read)?;
    ensure!(read.len() as u64 == bytes, "{bytes} bytes are told, {} are there", read.len());
    Ok(read.into())
}

async fn refused(fetcher: &Fetcher, url: &str) -> Result<Failure> {
    match fetcher.spool(&parsed(url)?).await {
        Ok(spooled) => bail!("{url} gave {} bytes", spooled.bytes),
        Err(error) => Ok(error.failure()),
    }
}

async fn refused_as(fetcher: &Fetcher, url: &str, class: Class) -> Result<Failure> {
    let failure = refused(fetcher, url).await?;
    ensure!(failure.class == class, "{url}: {failure}, expected {class}");
    Ok(failure)
}

async fn read(incoming: Incoming) -> Result<Bytes> {
    let mut read = Vec::new();
    let mut body = incoming.body;
    while let Some(chunk) = body.next().await {
        read.extend_from_slice(&chunk?);
    }
    Ok(read.into())
}
