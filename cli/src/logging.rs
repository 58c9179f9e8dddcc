//! Logs go to standard error, so that standard output holds answers only.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use tracing_subscriber::EnvFilter;

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
}

impl Default for LogConfig {
    fn default() -> Self {
        Self { format: LogFormat::Text, filter: String::new() }
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
    let filter = EnvFilter::builder().parse_lossy(directives);
    let builder = tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        // It would be told on standard error too, and panic there: a service goes on without anybody reading its logs.
        .log_internal_errors(false)
        .with_env_filter(filter);
    // The only error is a subscriber that is installed already, by a test harness; logs go there then.
    let _installed = match config.format {
        LogFormat::Text => builder.with_ansi(std::io::stderr().is_terminal()).try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    };
}
