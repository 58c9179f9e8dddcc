//! `voxfleet health`: for containers and units, which have no curl.

use std::time::Duration;

use serde_json::Value;
use voxfleet_http::probe::{Probe, ProbeError};

use crate::{
    args::HealthArgs,
    exit::{Exit, OrExit as _},
    plain::plain,
    transcript::screen::out,
};

pub(crate) async fn run(args: &HealthArgs) -> anyhow::Result<Exit> {
    let probe = Probe { ca: args.ca.clone(), token: None };
    let asked = probe.get(&url(&args.at, args.ready), Duration::from_secs(args.timeout)).await;
    let answer = match asked {
        // The one trouble that a restart mends: whoever starts processes again tells it by the code.
        late @ Err(ProbeError::Silent(_)) => late.or_exit(Exit::Refused)?,
        other => other.or_exit(Exit::Failure)?,
    };
    // Whoever answers there may be a stranger.
    out(plain(String::from_utf8_lossy(&answer.body).trim_end()).as_str())?;
    Ok(if is_well(answer.status, &answer.body, args.ready) { Exit::Ok } else { Exit::Failure })
}

/// An address alone is one of ours; one with a path is asked as it stands, as nats-server's `/healthz`.
fn url(at: &str, ready: bool) -> String {
    let after_host = at.split_once("://").map_or(at, |(_, rest)| rest);
    match after_host.trim_end_matches('/').contains(['/', '?']) {
        true => at.to_owned(),
        false => format!("{}/{}", at.trim_end_matches('/'), if ready { "ready" } else { "health" }),
    }
}

/// Somebody else may listen there: only an answer of ours counts.
fn is_well(status: u16, body: &[u8], ready: bool) -> bool {
    let body: Value = serde_json::from_slice(body).unwrap_or_default();
    status == 200 && if ready { body["ready"] == true } else { body["status"] == "ok" }
}

#[cfg(test)]
mod tests {
    use super::{is_well, url};

    #[test]
    fn an_address_is_asked_by_our_paths_and_a_path_as_it_stands() {
        for (at, ready, asked) in [
            ("http://h:9480", false, "http://h:9480/health"),
            ("https://h:9480/", true, "https://h:9480/ready"),
            ("http://h:8222/healthz?js-enabled-only=true", false, "http://h:8222/healthz?js-enabled-only=true"),
        ] {
            assert_eq!(url(at, ready), asked);
        }
    }

    #[test]
    fn only_our_own_yes_is_a_yes() {
        assert!(is_well(200, br#"{"status":"ok"}"#, false) && is_well(200, br#"{"ready":true}"#, true));
        assert!(!is_well(200, br#"{"status":"ok"}"#, true), "alive is not ready");
        assert!(!is_well(503, br#"{"ready":true}"#, true) && !is_well(200, b"<html>ok</html>", false));
    }
}
