//! `voxfleet models list|pull|verify|rm|convert`: the models of this machine. Needs no NATS.

mod convert;
mod progress;

use std::{
    path::Path,
    time::{Duration, SystemTime},
};

use serde_json::{Value, json};
use voxfleet_schema::{failure::FailureClass, job::AudioUrl};
use voxfleet_store::{
    fetch::{FetchConfig, Fetcher},
    models::{Catalog, Listed, ModelError, ModelStore, Presence, Pulled, Verdict, Verified},
};

use self::progress::{Progress, megabytes};
use super::status::table;
use crate::{
    Context,
    args::{ListModelsArgs, ModelsArgs, ModelsCommand, PullArgs, VerifyArgs},
    config::{Role, Settings},
    exit::{Exit, OrExit as _, coded},
    transcript::screen::{object, out},
};

pub(crate) async fn run(args: &ModelsArgs, context: &Context) -> anyhow::Result<Exit> {
    let settings = context.configure(&[Role::Models], "error")?.settings;
    match &args.what {
        ModelsCommand::List(args) => list(args, &open(&settings, false)?),
        ModelsCommand::Pull(args) => pull(args, &open(&settings, args.offline)?, context).await,
        ModelsCommand::Verify(args) => verify(args, open(&settings, false)?, context).await,
        ModelsCommand::Rm(args) => {
            let bytes = open(&settings, false)?.rm(&args.name).map_err(failed)?;
            out(&format!("{} removed, {} free again", args.name, megabytes(bytes)))?;
            Ok(Exit::Ok)
        }
        ModelsCommand::Convert(args) => convert::run(args, context).await,
    }
}

pub(super) fn open(settings: &Settings, offline: bool) -> anyhow::Result<ModelStore> {
    let config = &settings.models;
    let Some(dir) = config.dir.clone() else {
        let error =
            anyhow::anyhow!("no folder for models: set models.dir, or one of VOXFLEET_CACHE, XDG_CACHE_HOME and HOME");
        return Err(coded(Exit::Config, error));
    };
    let catalog = Catalog::load(config.catalog.as_deref()).or_exit(Exit::Config)?;
    let fetcher = Fetcher::trusted_with(fetch(settings)).or_exit(Exit::Config)?;
    let offline = offline || config.offline;
    Ok(ModelStore::open(dir, config.quota_bytes(), catalog, fetcher, offline).with_mirrors(&config.mirrors))
}

/// The S3 service and the certificates that recordings use serve models too; how large a model may be says the catalog.
fn fetch(settings: &Settings) -> FetchConfig {
    #[cfg(feature = "worker")]
    let base = settings.worker.fetch.clone();
    #[cfg(not(feature = "worker"))]
    let base = FetchConfig::default();
    FetchConfig { ca_file: settings.models.ca_file.clone().or(base.ca_file.clone()), max_bytes: u64::MAX, ..base }
}

/// A model's error with the exit code it means here.
fn failed(error: ModelError) -> anyhow::Error {
    let exit = match &error {
        ModelError::Unknown { .. } | ModelError::NotHere { .. } => Exit::NotFound,
        ModelError::Offline { .. } => Exit::Unavailable,
        ModelError::Cancelled { .. } => Exit::Interrupted,
        ModelError::InUse { .. } => Exit::Refused,
        ModelError::Catalog(_) => Exit::Config,
        ModelError::Sources { .. } => match error.class() {
            FailureClass::Timeout => Exit::Unavailable,
            class => Exit::of_class(class),
        },
        ModelError::Quota { .. } | ModelError::DiskFull { .. } | ModelError::Io { .. } | ModelError::Writer => {
            Exit::Failure
        }
    };
    coded(exit, error.into())
}

fn list(args: &ListModelsArgs, store: &ModelStore) -> anyhow::Result<Exit> {
    let mut listed = store.list();
    listed.retain(|model| !args.here || model.presence != Presence::Missing);
    if args.output.json {
        let models: Vec<Value> = listed.iter().map(as_json).collect();
        object(&json!({"dir": store.dir(), "models": models}))?;
        return Ok(Exit::Ok);
    }
    let now = SystemTime::now();
    let heads = ["MODEL", "KIND", "STATE", "SIZE", "MEMORY MB", "LANGUAGES", "LICENCE", "LAST USED"];
    let mut rows = vec![heads.map(str::to_owned).to_vec()];
    rows.extend(listed.iter().map(|model| row(model, now)));
    out(&format!("{}\nin {}", table(&rows), store.dir().display()))?;
    Ok(Exit::Ok)
}

fn row(listed: &Listed, now: SystemTime) -> Vec<String> {
    let model = listed.model.as_ref();
    let whole = model.and_then(|m| m.bytes());
    let size = match listed.presence {
        Presence::Present => megabytes(listed.bytes),
        Presence::Partial => {
            format!("{} of {}", megabytes(listed.bytes), whole.map_or_else(|| "?".to_owned(), megabytes))
        }
        Presence::Missing => whole.map_or_else(|| "?".to_owned(), megabytes),
    };
    let known = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
    let used = match (listed.in_use, listed.last_used, listed.presence) {
        (true, ..) => "in use".to_owned(),
        (_, Some(at), Presence::Present) => ago(now.duration_since(at).unwrap_or_default()),
        _ => "-".to_owned(),
    };
    vec![
        listed.name.clone(),
        known(model.map(|m| m.kind.to_string())),
        listed.presence.as_str().to_owned(),
        size,
        known(model.map(|m| m.expected_mb.to_string())),
        known(model.map(|m| if m.multilingual { "many" } else { "en" }.to_owned())),
        known(model.map(|m| m.licence.clone())),
        used,
    ]
}

fn ago(age: Duration) -> String {
    let seconds = age.as_secs();
    let (count, unit) = match seconds {
        0..60 => return "now".to_owned(),
        60..3_600 => (seconds / 60, "min"),
        3_600..86_400 => (seconds / 3_600, "h"),
        _ => (seconds / 86_400, "d"),
    };
    format!("{count} {unit} ago")
}

fn as_json(listed: &Listed) -> Value {
    let model = listed.model.as_ref();
    let last_used_ms = listed
        .last_used
        .and_then(|at| at.duration_since(SystemTime::UNIX_EPOCH).ok())
        .and_then(|since| u64::try_from(since.as_millis()).ok());
    json!({
        "name": listed.name,
        "state": listed.presence.as_str(),
        "bytes": listed.bytes,
        "in_use": listed.in_use,
        "has_checksum": listed.has_checksum,
        "last_used_ms": last_used_ms,
        "kind": model.map(|m| m.kind),
        "whole_bytes": model.and_then(|m| m.bytes()),
        "expected_mb": model.map(|m| m.expected_mb),
        "licence": model.map(|m| &m.licence),
        "multilingual": model.map(|m| m.multilingual),
        "sources": model.map(|m| m.sources.iter().map(|url| AudioUrl::harmless(url)).collect::<Vec<_>>()),
    })
}

async fn pull(args: &PullArgs, store: &ModelStore, context: &Context) -> anyhow::Result<Exit> {
    for name in &args.names {
        let mut progress = Progress::new(name);
        let result = store.pull(name, &mut |step| progress.step(&step), &context.shutdown).await;
        progress.done();
        for pulled in result.map_err(failed)? {
            told(name, &pulled, args.output.json)?;
        }
    }
    Ok(Exit::Ok)
}

fn told(name: &str, pulled: &Pulled, json: bool) -> anyhow::Result<()> {
    if json {
        object(&json!({
            "model": name, "path": pulled.path, "bytes": pulled.bytes, "sha256": pulled.sha256, "url": pulled.url,
            "trusted_on_first_use": pulled.first_use,
        }))?;
        return Ok(());
    }
    let how = if pulled.url.is_some() { "pulled" } else { "here already" };
    out(&format!("{name} {how}: {} ({})", pulled.path.display(), megabytes(pulled.bytes)))?;
    if pulled.first_use {
        let sum = &pulled.sha256;
        out(&format!("{name}: nobody published a checksum; this one holds from now on: {sum}"))?;
    }
    Ok(())
}

async fn verify(args: &VerifyArgs, store: ModelStore, context: &Context) -> anyhow::Result<Exit> {
    let name = args.name.clone();
    let reading = tokio::task::spawn_blocking(move || store.verify(name.as_deref()));
    let verified = tokio::select! {
        read = reading => read.or_exit(Exit::Internal)?.map_err(failed)?,
        () = context.shutdown.cancelled() => return Ok(Exit::Interrupted),
    };
    let good = verified.iter().all(|v| v.verdict.is_good());
    if args.output.json {
        let models: Vec<Value> = verified
            .iter()
            .map(|v| {
                let (verdict, expected, found) = words(&v.verdict);
                json!({"model": v.name, "path": v.path, "verdict": verdict, "expected": expected, "found": found})
            })
            .collect();
        object(&json!({"ok": good, "models": models}))?;
    } else {
        verified.iter().try_for_each(|v| out(&line(v)))?;
        if verified.is_empty() {
            out("no model is here")?;
        }
    }
    Ok(if good { Exit::Ok } else { Exit::Failure })
}

fn words(verdict: &Verdict) -> (&'static str, Option<&str>, Option<&str>) {
    match verdict {
        Verdict::Good => ("good", None, None),
        Verdict::AsAtFirst => ("as_at_first", None, None),
        Verdict::NoChecksum => ("no_checksum", None, None),
        Verdict::Damaged { expected, found } => ("damaged", Some(expected), Some(found)),
        Verdict::Missing => ("missing", None, None),
    }
}

fn line(verified: &Verified) -> String {
    let Verified { name, path, verdict } = verified;
    let name = &part(name, path);
    let model = &verified.name;
    let path = path.display();
    match verdict {
        Verdict::Good => format!("good     {name}"),
        Verdict::AsAtFirst => format!("good     {name} (as it was when it came; nobody published a checksum)"),
        Verdict::NoChecksum => format!("unknown  {name} (there is no checksum to compare {path} with)"),
        Verdict::Damaged { expected, found } => {
            format!(
                "DAMAGED  {name}: {path} has sha256 {found}, it must be {expected}; `voxfleet models pull {model}` brings it again"
            )
        }
        Verdict::Missing => format!("MISSING  {name}: `voxfleet models pull {model}` brings it"),
    }
}

/// The model, and of one that is a folder which file of it.
fn part(model: &str, path: &Path) -> String {
    match (path.parent().and_then(Path::file_name), path.file_name()) {
        (Some(folder), Some(file)) if folder == model => format!("{model}/{}", file.display()),
        _ => model.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_of_a_folder_is_named_with_its_model() {
        for (path, wanted) in [("/models/m.bin", "m"), ("/models/m/config.json", "m/config.json"), ("m.bin", "m")] {
            assert_eq!(part("m", Path::new(path)), wanted);
        }
    }

    #[test]
    fn ages_are_told_in_their_largest_unit() {
        for (seconds, wanted) in [(0, "now"), (59, "now"), (60, "1 min ago"), (7_199, "1 h ago"), (259_200, "3 d ago")]
        {
            assert_eq!(ago(Duration::from_secs(seconds)), wanted);
        }
    }
}
