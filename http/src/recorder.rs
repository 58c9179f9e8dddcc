//! The recorder behind the macros of the crate `metrics`: one for the process, installed once, by the binary.

use std::sync::OnceLock;

use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};

static HANDLE: OnceLock<Option<PrometheusHandle>> = OnceLock::new();

/// Counters are kept from now on; before, and where this is never called, they cost nothing. Safe to repeat.
pub fn install() {
    HANDLE.get_or_init(|| match PrometheusBuilder::new().install_recorder() {
        Ok(handle) => Some(handle),
        // A test harness has one of its own.
        Err(error) => {
            tracing::debug!(%error, "figures go elsewhere");
            None
        }
    });
}

/// Everything that was counted, as text. Also does the recorder's housekeeping.
pub fn render() -> String {
    let Some(handle) = HANDLE.get().and_then(Option::as_ref) else {
        return String::new();
    };
    handle.run_upkeep();
    handle.render()
}
