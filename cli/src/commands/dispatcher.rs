//! `voxfleet dispatcher`.

use voxfleet_trace::Service;

use super::SERVICE_LOG;
use crate::{
    Context,
    config::Role,
    exit::{Exit, OrExit as _},
};

pub(crate) async fn run(context: &Context) -> anyhow::Result<Exit> {
    let loaded = context.configure(&[Role::Dispatcher], SERVICE_LOG)?;
    tracing::info!(version = env!("CARGO_PKG_VERSION"), file = ?loaded.file, "dispatcher starts");
    let settings = loaded.settings;
    if !settings.dispatcher.http.is_off() {
        voxfleet_http::recorder::install();
    }
    let Some(nats) = super::connect_service(&settings, "voxfleet-dispatcher", &context.shutdown).await? else {
        tracing::info!("dispatcher stopped before there was a server");
        return Ok(Exit::Ok);
    };
    let (tracer, exporter) = super::tell_traces(&settings.tracing, Service::Dispatcher)?;
    let result = voxfleet_dispatcher::run(nats.clone(), settings.dispatcher, tracer, context.shutdown.clone()).await;
    exporter.finish().await;
    super::close(nats).await;
    result.or_exit(Exit::Failure)?;
    tracing::info!("dispatcher stopped");
    Ok(Exit::Ok)
}
