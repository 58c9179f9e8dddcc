//! `voxfleet health`: for containers and units, which have no curl.

use std::time::Duration;

use serde_json::Value;
use voxfleet_http::probe::Probe;

use crate::{
    args::HealthArgs,
    exit::{Exit, OrExit as _},
    plain::plain,
    transcript::screen::out,
};

pub(crate) async fn run(args: &HealthArgs) -> anyhow::Result<Exit> {
    let probe = Probe { ca: args.ca.clone(), token: None };
    let url = format!("{}/{}", args.at.trim_end_matches('/'), if args.ready { "ready" } else { "health" });
    let answer = probe.get(&url, Duration::from_secs(args.timeout)).await.or_exit(Exit::Failure)?;
    // Whoever answers there may be a stranger.
    out(plain(String::from_utf8_lossy(&answer.body).trim_end()).as_str())?;
    Ok(if is_well(answer.status, &answer.body, args.ready) { Exit::Ok } else { Exit::Failure })
}

/// Somebody else may listen there: only an answer of ours counts.
fn is_well(status: u16, body: &[u8], ready: bool) -> bool {
    let body: Value = serde_json::from_slice(body).unwrap_or_default();
    status == 200 && if ready { body["ready"] == true } else { body["status"] == "ok" }
}

#[cfg(test)]
mod tests {
    use super::is_well;

    #[test]
    fn only_our_own_yes_is_a_yes() {
        assert!(is_well(200, br#"{"status":"ok"}"#, false) && is_well(200, br#"{"ready":true}"#, true));
        assert!(!is_well(200, br#"{"status":"ok"}"#, true), "alive is not ready");
        assert!(!is_well(503, br#"{"ready":true}"#, true) && !is_well(200, b"<html>ok</html>", false));
    }
}
