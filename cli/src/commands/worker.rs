//! `voxfleet worker`.

use voxfleet_nats::topology::TopologyError;
use voxfleet_store::models::InUse;
use voxfleet_trace::Service;
use voxfleet_worker::{WorkerConfig, every_gpu};

use super::SERVICE_LOG;
use crate::{
    Context,
    args::WorkerArgs,
    config::Role,
    exit::{Exit, OrExit as _},
};

/// As it is typed.
const ALL_GPUS: &str = "--all-gpus";

pub(crate) async fn run(args: &WorkerArgs, context: &Context) -> anyhow::Result<Exit> {
    let loaded = context.configure(&[Role::Worker], SERVICE_LOG)?;
    tracing::info!(version = env!("CARGO_PKG_VERSION"), file = ?loaded.file, "worker starts");
    let settings = loaded.settings;
    if args.all_gpus {
        return all_gpus(&settings.worker, context).await;
    }
    if !settings.worker.http.is_off() {
        voxfleet_http::recorder::install();
    }
    let Some(nats) = super::connect_service(&settings, "voxfleet-worker", &context.shutdown).await? else {
        tracing::info!("worker stopped before there was a server");
        return Ok(Exit::Ok);
    };
    if super::lacks_jetstream(&nats).await {
        // The server may be given it while we run; a worker makes no stream, so it can only wait.
        tracing::warn!(error = %TopologyError::NoJetStream, "nothing can be done until the server has jetstream");
    }
    // Whoever makes room for another model leaves these alone for as long as this process lives.
    let held: Vec<InUse> = settings.worker.model_files().iter().filter_map(|m| InUse::hold(&m.path)).collect();
    tracing::debug!(models = held.len(), "model files held");
    let store = match settings.worker.prefetch.is_empty() {
        true => None,
        false => Some(super::models::open(&settings, false)?),
    };
    let (tracer, exporter) = super::tell_traces(&settings.tracing, Service::Worker)?;
    let result = voxfleet_worker::run(nats.clone(), settings.worker, store, tracer, context.shutdown.clone()).await;
    exporter.finish().await;
    super::close(nats).await;
    drop(held);
    result.or_exit(Exit::Failure)?;
    tracing::info!("worker stopped");
    Ok(Exit::Ok)
}

/// Each worker is told what this process was, but for the device.
async fn all_gpus(config: &WorkerConfig, context: &Context) -> anyhow::Result<Exit> {
    let args = std::env::args_os().skip(1).filter(|arg| arg != ALL_GPUS).collect();
    match every_gpu::run(config, args, Exit::Config.code(), context.shutdown.clone()).await {
        Ok(()) => {
            tracing::info!("all workers stopped");
            Ok(Exit::Ok)
        }
        // Scripts that keep a worker running give up on a bad configuration, and try again on anything else.
        Err(error) if error.is_of_settings() => Err(error).or_exit(Exit::Config),
        Err(error) => Err(error).or_exit(Exit::Failure),
    }
}
