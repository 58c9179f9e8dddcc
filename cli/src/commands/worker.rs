//! `voxfleet worker`.

use super::SERVICE_LOG;
use crate::{
    Context,
    config::Role,
    exit::{Exit, OrExit as _},
};

pub(crate) async fn run(context: &Context) -> anyhow::Result<Exit> {
    let loaded = context.configure(&[Role::Worker], SERVICE_LOG)?;
    tracing::info!(version = env!("CARGO_PKG_VERSION"), file = ?loaded.file, "worker starts");
    let settings = loaded.settings;
    let nats = super::connect(&settings, "voxfleet-worker").await?;
    let result = voxfleet_worker::run(nats.clone(), settings.worker, context.shutdown.clone()).await;
    super::close(nats).await;
    result.or_exit(Exit::Failure)?;
    tracing::info!("worker stopped");
    Ok(Exit::Ok)
}
