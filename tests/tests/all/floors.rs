//! Who may depend on whom (no arrow goes up), and which libraries are named only in one place.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use voxfleet_harness::find;

/// Crates of ours that each crate may name; dispatcher and worker never meet.
const EDGES: [(&str, &[&str]); 15] = [
    ("voxfleet-schema", &[]),
    // What measures the product knows nothing of it.
    ("voxfleet-eval", &[]),
    ("voxfleet-audio", &["voxfleet-schema"]),
    // Who spoke when is signal and decision code that knows neither wire nor models.
    ("voxfleet-diarize", &[]),
    // Files of models in, files of models out.
    ("voxfleet-ggml", &[]),
    ("voxfleet-nats", &["voxfleet-schema"]),
    // It serves what others bring and knows neither NATS nor our types.
    ("voxfleet-http", &[]),
    ("voxfleet-trace", &["voxfleet-schema", "voxfleet-nats"]),
    ("voxfleet-store", &["voxfleet-schema", "voxfleet-nats"]),
    ("voxfleet-dispatcher", &["voxfleet-schema", "voxfleet-audio", "voxfleet-nats", "voxfleet-http", "voxfleet-trace"]),
    (
        "voxfleet-worker",
        &[
            "voxfleet-schema",
            "voxfleet-audio",
            "voxfleet-diarize",
            "voxfleet-ggml",
            "voxfleet-nats",
            "voxfleet-http",
            "voxfleet-trace",
            "voxfleet-store",
        ],
    ),
    // What checks the product does not share its code.
    ("voxfleet-harness", &[]),
    // Feeds every parser there is.
    (
        "voxfleet-parsers",
        &[
            "voxfleet-schema",
            "voxfleet-audio",
            "voxfleet-nats",
            "voxfleet-http",
            "voxfleet-store",
            "voxfleet-dispatcher",
            "voxfleet-worker",
            "voxfleet-eval",
        ],
    ),
    (
        "voxfleet",
        &[
            "voxfleet-schema",
            "voxfleet-audio",
            "voxfleet-diarize",
            "voxfleet-ggml",
            "voxfleet-nats",
            "voxfleet-http",
            "voxfleet-trace",
            "voxfleet-store",
            "voxfleet-dispatcher",
            "voxfleet-worker",
            "voxfleet-eval",
            "voxfleet-harness",
        ],
    ),
    (
        "voxfleet-tests",
        &[
            "voxfleet-schema",
            "voxfleet-audio",
            "voxfleet-nats",
            "voxfleet-http",
            "voxfleet-trace",
            "voxfleet-store",
            "voxfleet-dispatcher",
            "voxfleet-worker",
            "voxfleet-harness",
            "voxfleet",
        ],
    ),
];

/// Libraries that only these crates may name.
const CONFINED: [(&str, &[&str]); 11] = [
    ("async-nats", &["voxfleet-nats", "voxfleet-harness", "voxfleet-tests"]),
    ("nkeys", &["voxfleet-nats"]),
    ("whisper-rs", &["voxfleet-worker"]),
    ("ct2rs", &["voxfleet-worker"]),
    ("ort", &["voxfleet-worker"]),
    ("nvml-wrapper", &["voxfleet-worker"]),
    ("symphonia-adapter-libopus", &["voxfleet-audio"]),
    ("object_store", &["voxfleet-store"]),
    ("reqwest", &["voxfleet-store", "voxfleet-trace"]),
    // The harness is the collector of tests.
    ("opentelemetry-proto", &["voxfleet-trace", "voxfleet-harness"]),
    // Unmaintained; `backon` stands for it.
    ("backoff", &[]),
];

/// A crate's own tests may start real servers with it: it needs nothing of ours, so no circle can come of that.
const FOR_TESTS: &str = "voxfleet-harness";

/// Each crate's direct dependencies as cargo knows them.
fn dependencies() -> Result<BTreeMap<String, BTreeSet<String>>> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args(["metadata", "--no-deps", "--offline", "--format-version", "1"])
        .current_dir(find::root())
        .output()?;
    ensure!(output.status.success(), "cargo metadata: {}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout)?;
    let name = |v: &Value| v["name"].as_str().map(str::to_owned).context("a name");
    let packages = metadata["packages"].as_array().context("packages")?;
    packages
        .iter()
        .map(|package| {
            let named = package["dependencies"].as_array().context("dependencies")?;
            let counts = |d: &&Value| !(d["kind"] == "dev" && d["name"] == FOR_TESTS);
            Ok((name(package)?, named.iter().filter(counts).map(name).collect::<Result<_>>()?))
        })
        .collect()
}

fn violations(dependencies: &BTreeMap<String, BTreeSet<String>>) -> Vec<String> {
    let mut found = Vec::new();
    for (name, named) in dependencies {
        let Some((_, allowed)) = EDGES.iter().find(|(n, _)| n == name) else {
            found.push(format!("{name} is on no floor"));
            continue;
        };
        for ours in named.iter().filter(|d| d.starts_with("voxfleet")) {
            if !allowed.contains(&ours.as_str()) {
                found.push(format!("{name} -> {ours}"));
            }
        }
        for (library, homes) in CONFINED {
            if named.contains(library) && !homes.contains(&name.as_str()) {
                found.push(format!("{name} names {library}"));
            }
        }
    }
    found
}

#[test]
fn no_arrow_goes_up() -> Result<()> {
    let dependencies = dependencies()?;
    assert_eq!(dependencies.len(), EDGES.len(), "{:?}", dependencies.keys());
    assert_eq!(violations(&dependencies), Vec::<String>::new());
    Ok(())
}

#[test]
fn a_wrong_arrow_is_seen() -> Result<()> {
    let wrong =
        [("voxfleet-dispatcher", "voxfleet-worker"), ("voxfleet-nats", "voxfleet-harness"), ("voxfleet", "async-nats")];
    for (name, extra) in wrong {
        let mut dependencies = dependencies()?;
        dependencies.get_mut(name).context("a crate")?.insert(extra.to_owned());
        assert_eq!(violations(&dependencies).len(), 1, "{name} -> {extra}");
    }
    Ok(())
}

#[test]
fn nothing_is_called_common_or_utils() -> Result<()> {
    let mut found = Vec::new();
    walk(&find::root(), &mut found)?;
    assert_eq!(found, Vec::<String>::new());
    Ok(())
}

fn walk(dir: &Path, found: &mut Vec<String>) -> Result<()> {
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        if matches!(name, "target" | ".git") {
            continue;
        }
        let stem = name.split('.').next().unwrap_or_default();
        if matches!(stem, "common" | "utils" | "util" | "helpers" | "misc") {
            found.push(path.display().to_string());
        }
        if path.is_dir() && !path.is_symlink() {
            walk(&path, found)?;
        }
    }
    Ok(())
}
