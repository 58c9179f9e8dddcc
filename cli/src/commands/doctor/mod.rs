//! `voxfleet doctor`: what can be wrong, what is, and the mend. Changes nothing.

mod fleet;
mod machine;
mod running;
mod server;

use std::path::Path;

use serde::Serialize;
use serde_json::json;

use crate::{
    Context,
    args::DoctorArgs,
    config::{SEARCH, Settings, load},
    env::ProcessEnv,
    exit::Exit,
    logging,
    transcript::{
        line::Paint,
        screen::{object, out},
    },
};

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
enum Verdict {
    Ok,
    /// Works, but worse than it could, or not everything is there yet.
    Warn,
    Fail,
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Serialize)]
struct Check {
    name: &'static str,
    verdict: Verdict,
    found: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    mend: Option<String>,
}

impl Check {
    fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Self { name, verdict: Verdict::Ok, found: found.into(), mend: None }
    }

    fn warn(name: &'static str, found: impl Into<String>, mend: impl Into<String>) -> Self {
        Self { name, verdict: Verdict::Warn, found: found.into(), mend: Some(mend.into()) }
    }

    fn fail(name: &'static str, found: impl Into<String>, mend: impl Into<String>) -> Self {
        Self { name, verdict: Verdict::Fail, found: found.into(), mend: Some(mend.into()) }
    }

    fn line(&self, paint: Paint) -> String {
        let mark = match self.verdict {
            Verdict::Ok => paint.green("ok  "),
            Verdict::Warn => paint.yellow("warn"),
            Verdict::Fail => paint.red("FAIL"),
        };
        let mend = self.mend.as_ref().map(|m| format!("; {m}")).unwrap_or_default();
        format!("{mark}  {:<14} {}{mend}", self.name, self.found)
    }
}

pub(crate) async fn run(args: &DoctorArgs, context: &Context) -> anyhow::Result<Exit> {
    let mut checks = Vec::new();
    let search: Vec<&Path> = SEARCH.iter().map(Path::new).collect();
    let settings = match load(&context.overrides, &ProcessEnv, &search, &[]) {
        Ok(loaded) => {
            let file = loaded.file.as_ref().map_or_else(|| "no file, defaults".to_owned(), |f| f.display().to_string());
            checks.push(Check::ok("configuration", file));
            Some(loaded.settings)
        }
        Err(found) => {
            let mend = "`voxfleet config check` names each";
            checks.extend(found.problems.into_iter().map(|p| Check::fail("configuration", p, mend)));
            None
        }
    };
    let whole = settings.is_some();
    // The machine can be looked at whatever the file says; the server only where the file says it is.
    let settings: Settings = settings.unwrap_or_default();
    logging::install(&settings.log, "off");
    if whole {
        checks.extend(server::look(&settings).await);
    }
    checks.extend(machine::look(&settings).await);
    let worst = checks.iter().map(|c| c.verdict).max().unwrap_or(Verdict::Ok);
    if args.json {
        object(&json!({"ok": worst != Verdict::Fail, "checks": checks}))?;
    } else {
        use std::io::IsTerminal as _;
        let paint = Paint { colour: std::io::stdout().is_terminal() };
        for check in &checks {
            out(&check.line(paint))?;
        }
    }
    Ok(if worst == Verdict::Fail { Exit::Failure } else { Exit::Ok })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_names_verdict_finding_and_mend() {
        let plain = Paint { colour: false };
        assert_eq!(Check::ok("nats", "0.2 ms").line(plain), "ok    nats           0.2 ms");
        let check = Check::fail("jetstream", "off", "start nats-server with -js");
        assert_eq!(check.line(plain), "FAIL  jetstream      off; start nats-server with -js");
        assert!(Verdict::Fail > Verdict::Warn && Verdict::Warn > Verdict::Ok);
    }
}
