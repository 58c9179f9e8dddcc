//! Logs go to standard error, so that standard output holds answers only. [`volume`] bounds them.

mod volume;

use std::sync::OnceLock;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::{
    EnvFilter, Layer as _, filter::FilterExt as _, fmt, layer::SubscriberExt as _, util::SubscriberInitExt as _,
};

use volume::{EVERY, Limits, Volume};

/// Of this process.
static VOLUME: OnceLock<Volume> = OnceLock::new();

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
pub(crate) enum LogFormat {
    #[default]
    Text,
    Json,
}

impl LogFormat {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            LogFormat::Text => "text",
            LogFormat::Json => "json",
        }
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct LogConfig {
    /// `text` for people, `json` for collectors.
    pub(crate) format: LogFormat,
    /// Directives as tracing knows them: `info,voxfleet_dispatcher=debug`. Empty: `info` for services, `warn` for
    /// commands, whose output is the point.
    pub(crate) filter: String,
    /// Lines from one place in the code within ten seconds; the rest is counted. 0 = no bound.
    pub(crate) max_lines: u32,
    /// All lines together within ten seconds, in kB. 0 = no bound.
    pub(crate) max_kb: u32,
}

impl Default for LogConfig {
    fn default() -> Self {
        Self {
            format: LogFormat::Text,
            filter: String::new(),
            // Every session of a fleet that comes back at once is named, nearly; a fault in a loop is not.
            max_lines: 500,
            // 200 kB a second: some hundred lines, and what a disk and whoever collects them carry for ever.
            max_kb: 2_000,
        }
    }
}

impl LogConfig {
    pub(crate) fn problems(&self) -> Vec<String> {
        match EnvFilter::builder().parse(&self.filter) {
            Ok(_) => Vec::new(),
            Err(e) => vec![format!("log.filter: {e}")],
        }
    }
}

/// Installs the subscriber of this process. `quiet` is the filter where none is configured.
pub(crate) fn install(config: &LogConfig, fallback: &str) {
    use std::io::IsTerminal as _;
    let directives = if config.filter.is_empty() { fallback } else { &config.filter };
    let volume = Volume::new(Limits {
        lines: Some(config.max_lines).filter(|lines| *lines > 0),
        bytes: Some(config.max_kb as usize * 1_000).filter(|bytes| *bytes > 0),
    });
    let filter = EnvFilter::builder().parse_lossy(directives).and(volume.clone());
    let layer = fmt::layer()
        .with_writer(volume.clone())
        // It would be told on standard error too, and panic there: a service goes on without anybody reading its logs.
        .log_internal_errors(false);
    let registry = tracing_subscriber::registry();
    let installed = match config.format {
        LogFormat::Text => {
            registry.with(layer.with_ansi(std::io::stderr().is_terminal()).with_filter(filter)).try_init()
        }
        LogFormat::Json => registry.with(layer.json().flatten_event(true).with_filter(filter)).try_init(),
    };
    // The only error is a subscriber that is installed already, by a test harness; logs go there then.
    if installed.is_ok() {
        VOLUME.get_or_init(|| volume);
    }
}

/// Says what was left out, while the process runs and at its end.
pub(crate) async fn say_what_is_left_out(done: CancellationToken) {
    while done.run_until_cancelled(tokio::time::sleep(EVERY)).await.is_some() {
        if let Some(volume) = VOLUME.get() {
            volume.say(false);
        }
    }
    if let Some(volume) = VOLUME.get() {
        volume.say(true);
    }
}
