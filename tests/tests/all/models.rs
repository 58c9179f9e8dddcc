//! `voxfleet models` and `voxfleet plan` as people run them: real processes, a real web server, and everything that can
//! break on the way.

use std::{
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use voxfleet_harness::{
    find,
    https::{Answer, Server},
    process::{Settings, voxfleet},
    wait::eventually,
};
use voxfleet_store::models::{
    Catalog, InUse,
    measured::{DeviceKey, Figures, Measured, ModelKey},
};

const SIZE: usize = 1_000_000;
const SOON: Duration = Duration::from_secs(20);

/// A folder of models, a catalog, and a server that holds what the catalog names.
struct Shelf {
    dir: tempfile::TempDir,
    server: Server,
    catalog: String,
    settings: Vec<(String, String)>,
}

/// Bytes that repeat nowhere near.
fn weights(seed: u8) -> Vec<u8> {
    (0..SIZE as u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8 ^ seed).collect()
}

fn sum(bytes: &[u8]) -> Result<String> {
    let file = tempfile::NamedTempFile::new()?;
    std::fs::write(file.path(), bytes)?;
    let output = Command::new("sha256sum").arg(file.path()).output()?;
    let text = String::from_utf8(output.stdout)?;
    Ok(text.split_whitespace().next().context("a sum")?.to_owned())
}

impl Shelf {
    async fn new() -> Result<Self> {
        let (dir, server) = (tempfile::tempdir()?, Server::start().await?);
        Ok(Self { dir, server, catalog: String::new(), settings: Vec::new() })
    }

    fn models(&self) -> PathBuf {
        self.dir.path().join("models")
    }

    fn file(&self, name: &str) -> PathBuf {
        self.models().join(name)
    }

    fn set(&mut self, key: &str, value: &str) {
        self.settings.push((key.to_owned(), value.to_owned()));
    }

    /// A model with these bytes and answers; `known` says whether the catalog names its checksum.
    fn model(
        &mut self,
        name: &str,
        bytes: &[u8],
        known: bool,
        answers: impl IntoIterator<Item = Answer>,
    ) -> Result<()> {
        let path = format!("/{name}.bin");
        self.server.route(&path, answers);
        let sum =
            if known { format!(", bytes = {}, sha256 = \"{}\"", bytes.len(), sum(bytes)?) } else { String::new() };
        self.catalog += &format!(
            "[[model]]\nname = \"{name}\"\nkind = \"whisper\"\nlicence = \"MIT\"\nmultilingual = true\nexpected_mb = 1\n\
             files = [{{ file = \"{name}.bin\"{sum} }}]\nsources = [\"{}\"]\n",
            self.server.url(&path),
        );
        Ok(())
    }

    fn command(&self, arguments: &[&str]) -> Result<Command> {
        let catalog = self.dir.path().join("catalog.toml");
        std::fs::write(&catalog, &self.catalog)?;
        let mut settings = Settings::new()
            .with("models.dir", self.models().display().to_string())
            .with("models.catalog", catalog.display().to_string())
            .with("models.ca_file", self.server.ca_file().display().to_string());
        for (key, value) in &self.settings {
            settings = settings.with(key, value);
        }
        let mut command = voxfleet(&settings, self.dir.path())?;
        command.args(arguments).stdin(Stdio::null());
        Ok(command)
    }

    /// Runs to its end, with its code and everything it said.
    async fn run(&self, arguments: &[&str]) -> Result<(i32, String)> {
        let mut command = self.command(arguments)?;
        let output = tokio::task::spawn_blocking(move || command.output()).await??;
        Ok(told(&output))
    }

    async fn object(&self, arguments: &[&str]) -> Result<Value> {
        let mut command = self.command(arguments)?;
        let output = tokio::task::spawn_blocking(move || command.output()).await??;
        serde_json::from_slice(&output.stdout).with_context(|| told(&output).1)
    }

    fn ranges(&self, name: &str) -> Vec<Option<String>> {
        let requests = self.server.requests(&format!("/{name}.bin"));
        requests.iter().map(|r| r.header("range").map(str::to_owned)).collect()
    }

    /// What a pull left, of all the files it may leave.
    fn left(&self, name: &str) -> Vec<String> {
        let all = ["bin", "bin.part", "bin.sha256"].map(|end| format!("{name}.{end}"));
        all.into_iter().filter(|file| self.file(file).exists()).collect()
    }
}

fn told(output: &Output) -> (i32, String) {
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    (output.status.code().unwrap_or(-1), text)
}

fn len(path: &Path) -> u64 {
    std::fs::metadata(path).map_or(0, |m| m.len())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_goes_on_where_the_server_broke_off() -> Result<()> {
    let (mut shelf, bytes) = (Shelf::new().await?, weights(1));
    let broken = Answer::file(bytes.clone()).cut_after(300_000);
    shelf.model("m", &bytes, true, [broken, Answer::file(bytes.clone())])?;
    let (code, said) = shelf.run(&["models", "pull", "m"]).await?;
    ensure!(code == 0, "{said}");
    ensure!(std::fs::read(shelf.file("m.bin"))? == bytes, "other bytes");
    ensure!(shelf.left("m") == ["m.bin", "m.bin.sha256"], "{:?}", shelf.left("m"));
    let ranges = shelf.ranges("m");
    ensure!(ranges == [None, Some("bytes=300000-".to_owned())], "{ranges:?}");
    for words in ["100 %", "going on at 0.3 MB"] {
        ensure!(said.contains(words), "{words} in {said}");
    }
    let (code, said) = shelf.run(&["models", "verify", "m"]).await?;
    ensure!(code == 0 && said.contains("good     m"), "{said}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_or_stopped_pull_is_gone_on_with() -> Result<()> {
    for (signal, code) in [("-KILL", None), ("-INT", Some(130))] {
        let (mut shelf, bytes) = (Shelf::new().await?, weights(2));
        let hung = Answer::file(bytes.clone()).silent_after(400_000);
        shelf.model("m", &bytes, true, [hung, Answer::file(bytes.clone())])?;
        let mut child = shelf.command(&["models", "pull", "m"])?.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        let part = shelf.file("m.bin.part");
        eventually("half a model", SOON, || std::future::ready((len(&part) == 400_000).then_some(()))).await?;
        let killed = Command::new("kill").args([signal, &child.id().to_string()]).status()?;
        ensure!(killed.success(), "kill");
        let ended = tokio::task::spawn_blocking(move || child.wait()).await??;
        ensure!(ended.code() == code, "{signal}: {ended}");
        ensure!(shelf.left("m") == ["m.bin.part"], "{signal}: {:?}", shelf.left("m"));
        let listed = shelf.object(&["models", "list", "--here", "--json"]).await?;
        ensure!(listed["models"][0]["state"] == "partial" && listed["models"][0]["bytes"] == 400_000, "{listed}");
        let (code, said) = shelf.run(&["models", "pull", "m"]).await?;
        ensure!(code == 0, "{signal}: {said}");
        let ranges = shelf.ranges("m");
        ensure!(ranges == [None, Some("bytes=400000-".to_owned())], "{signal}: {ranges:?}");
        ensure!(std::fs::read(shelf.file("m.bin"))? == bytes, "{signal}: other bytes");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_checksum_never_becomes_a_model() -> Result<()> {
    let (mut shelf, right) = (Shelf::new().await?, weights(3));
    let mut wrong = right.clone();
    wrong[700_000] ^= 0x10;
    shelf.model("m", &right, true, [Answer::file(wrong)])?;
    let (code, said) = shelf.run(&["models", "pull", "m"]).await?;
    ensure!(code == 1 && said.contains("wrong checksum"), "{code} {said}");
    ensure!(shelf.left("m").is_empty(), "{:?}", shelf.left("m"));
    // A mirror that has the right one is asked first from now on.
    shelf.server.route("/mirror/m.bin", [Answer::file(right.clone())]);
    shelf.set("models.mirrors", &shelf.server.url("/mirror"));
    let (code, said) = shelf.run(&["models", "pull", "m"]).await?;
    ensure!(code == 0 && std::fs::read(shelf.file("m.bin"))? == right, "{said}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn refusals_of_every_source_are_told() -> Result<()> {
    let (mut shelf, bytes) = (Shelf::new().await?, weights(4));
    shelf.model("gone", &bytes, true, [Answer::status(404)])?;
    shelf.model("ours", &bytes, true, [Answer::status(403)])?;
    shelf.model("long", &bytes, true, [Answer::file([&bytes[..], b"x"].concat())])?;
    shelf.model("none", &bytes, false, [Answer::file(bytes.clone())])?;
    for (name, code, words) in [("gone", 66, "no such file"), ("ours", 66, "403"), ("long", 1, "has 1000001 bytes")] {
        let (found, said) = shelf.run(&["models", "pull", name]).await?;
        ensure!(
            found == code && said.contains(words) && said.contains(&shelf.server.url("/")),
            "{name}: {found} {said}"
        );
        ensure!(shelf.left(name).is_empty(), "{:?}", shelf.left(name));
    }
    let (code, said) = shelf.run(&["models", "pull", "none"]).await?;
    ensure!(code == 0 && said.contains("nobody published a checksum") && said.contains(&sum(&bytes)?), "{said}");
    for (arguments, code) in [
        (&["models", "pull", "small.em"][..], 66),
        (&["models", "rm", "gone"], 66),
        (&["models", "rm", "nothing-like-it"], 66),
        (&["models", "verify", "gone"], 1),
        (&["models", "pull"], 2),
        (&["models", "list", "--set", "models.quota_gb=-1"], 64),
        (&["models", "list", "--set", "models.catalog=/nowhere.toml"], 64),
    ] {
        let (found, said) = shelf.run(arguments).await?;
        ensure!(found == code, "{arguments:?}: {found} {said}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flipped_bit_is_found_and_mended() -> Result<()> {
    let (mut shelf, bytes) = (Shelf::new().await?, weights(5));
    shelf.model("m", &bytes, true, [Answer::file(bytes.clone())])?;
    ensure!(shelf.run(&["models", "pull", "m"]).await?.0 == 0, "pull");
    let mut flipped = bytes.clone();
    flipped[123_456] ^= 1;
    std::fs::write(shelf.file("m.bin"), &flipped)?;
    let (code, said) = shelf.run(&["models", "verify"]).await?;
    ensure!(code == 1 && said.contains("DAMAGED  m") && said.contains("voxfleet models pull m"), "{said}");
    let report = shelf.object(&["models", "verify", "--json"]).await?;
    ensure!(report["ok"] == false && report["models"][0]["verdict"] == "damaged", "{report}");
    ensure!(shelf.run(&["models", "pull", "m"]).await?.0 == 0, "pull");
    ensure!(std::fs::read(shelf.file("m.bin"))? == bytes, "not mended");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_pullers_one_fetches_and_both_have_it() -> Result<()> {
    let (mut shelf, bytes) = (Shelf::new().await?, weights(6));
    // Four seconds: the other one has begun by then.
    let slow = Answer::file(bytes.clone()).paced(100_000, Duration::from_millis(400));
    shelf.model("m", &bytes, true, [slow])?;
    let mut children = Vec::new();
    for _ in 0..2 {
        children.push(shelf.command(&["models", "pull", "m"])?.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?);
    }
    let mut said = Vec::new();
    for child in children {
        let output = tokio::task::spawn_blocking(move || child.wait_with_output()).await??;
        said.push(told(&output));
    }
    ensure!(said.iter().all(|(code, _)| *code == 0), "{said:?}");
    let of = |words: &str| said.iter().filter(|(_, text)| text.contains(words)).count();
    ensure!(of("another process is pulling it") == 1 && of("m pulled:") == 1 && of("m here already:") == 1, "{said:?}");
    ensure!(shelf.server.requests("/m.bin").len() == 1, "{:?}", shelf.ranges("m"));
    ensure!(std::fs::read(shelf.file("m.bin"))? == bytes, "other bytes");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_quota_spares_what_is_used() -> Result<()> {
    let mut shelf = Shelf::new().await?;
    for (seed, name) in (10..).zip(["a", "b", "c"]) {
        shelf.model(name, &weights(seed), true, [Answer::file(weights(seed))])?;
    }
    shelf.set("models.quota_gb", "0.0025");
    for name in ["a", "b"] {
        ensure!(shelf.run(&["models", "pull", name]).await?.0 == 0, "{name}");
        let file = std::fs::File::options().append(true).open(shelf.file(&format!("{name}.bin")))?;
        let days = if name == "a" { 1 } else { 2 };
        file.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(days * 86_400))?;
    }
    let held = [InUse::hold(&shelf.file("a.bin")), InUse::hold(&shelf.file("b.bin"))];
    let (code, said) = shelf.run(&["models", "pull", "c"]).await?;
    ensure!(code == 1 && said.contains("the quota is 2500000 bytes"), "{code} {said}");
    let (code, said) = shelf.run(&["models", "rm", "a"]).await?;
    ensure!(code == 75 && said.contains("in use"), "{code} {said}");
    let [a, b] = held;
    drop(b);
    let (code, said) = shelf.run(&["models", "pull", "c"]).await?;
    ensure!(code == 0 && said.contains("b was not used for the longest time"), "{code} {said}");
    ensure!(shelf.left("b").is_empty() && shelf.left("a").len() == 2, "{:?}", shelf.left("a"));
    drop(a);
    let (code, said) = shelf.run(&["models", "rm", "a"]).await?;
    ensure!(code == 0 && shelf.left("a").is_empty(), "{said}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn offline_says_how_to_bring_it() -> Result<()> {
    let (mut shelf, bytes) = (Shelf::new().await?, weights(7));
    shelf.model("m", &bytes, true, [Answer::file(bytes.clone())])?;
    let (code, said) = shelf.run(&["models", "pull", "m", "--offline"]).await?;
    let folder = shelf.models().display().to_string();
    ensure!(code == 69 && said.contains("m.bin") && said.contains(&folder) && said.contains("models pull m"), "{said}");
    ensure!(shelf.server.requests("/m.bin").is_empty(), "it went to the network");
    shelf.set("models.offline", "true");
    ensure!(shelf.run(&["models", "pull", "m"]).await?.0 == 69, "the setting is heard");
    // Brought by hand, it is a model like any other.
    std::fs::write(shelf.file("m.bin"), &bytes)?;
    let (code, said) = shelf.run(&["models", "pull", "m"]).await?;
    ensure!(code == 0 && shelf.left("m") == ["m.bin", "m.bin.sha256"], "{said}");
    Ok(())
}

/// A file system of half a model's size, gone with the value.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn mount(at: &Path, bytes: usize) -> Result<Option<Self>> {
        std::fs::create_dir_all(at)?;
        let size = format!("size={bytes}");
        let output = Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(at).output();
        Ok(output.is_ok_and(|o| o.status.success()).then(|| Self(at.to_owned())))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // A mount that stays is seen by whoever removes the folder.
        let _still_mounted = Command::new("umount").arg(&self.0).status();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_names_the_folder_and_what_is_needed() -> Result<()> {
    let (mut shelf, bytes) = (Shelf::new().await?, weights(8));
    shelf.model("known", &bytes, true, [Answer::file(bytes.clone())])?;
    // Nobody says how long it is, so that only the disk can.
    shelf.model("unknown", &bytes, false, [Answer::file(bytes.clone()).chunked()])?;
    let Some(disk) = SmallDisk::mount(&shelf.models(), SIZE / 2)? else {
        eprintln!("skipped: only root can mount the small file system that this needs");
        return Ok(());
    };
    let folder = shelf.models().display().to_string();
    for (name, words) in [("known", "1000000 bytes are needed"), ("unknown", "no room for unknown.bin")] {
        let (code, said) = shelf.run(&["models", "pull", name]).await?;
        ensure!(code == 1 && said.contains(words) && said.contains(&folder), "{name}: {code} {said}");
        ensure!(!shelf.file(&format!("{name}.bin")).exists(), "{name} became a model");
    }
    drop(disk);
    Ok(())
}

fn option<'a>(planned: &'a Value, name: &str) -> &'a Value {
    let options = planned["options"].as_array().map(Vec::as_slice).unwrap_or_default();
    options.iter().find(|o| o["model"] == name).unwrap_or(&Value::Null)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plan_says_what_fits() -> Result<()> {
    let shelf = Shelf::new().await?;
    let card = ["plan", "--gpu", "A2000:8GB", "--tenant", "other=1GB", "--sessions", "16", "--states", "2", "--json"];
    let planned = shelf.object(&card).await?;
    // 530 + 466 + 2 x 386
    let small = option(&planned, "small");
    ensure!(small["sessions"] == 16 && small["used_mb"] == 1_768 && small["risk"] == "safe", "{planned:#}");
    let utilization = small["utilization"].as_f64().context("a fraction")?;
    ensure!((utilization - (1_024.0 + 1_768.0) / 8_192.0).abs() < 1e-3, "{utilization}");
    ensure!(planned["options"][0]["model"] == "large-v3" && planned["options"][0]["stance"] == "recommended");
    let tight = shelf.object(&["plan", "--gpu", "a:4GB", "--json"]).await?;
    let large = option(&tight, "large-v3");
    ensure!(large["sessions"] == 0 && large["risk"] == "refuse" && large["stance"].is_null(), "{tight:#}");
    let (code, said) = shelf.run(&["plan"]).await?;
    ensure!(
        code == 0 && said.contains("UTIL.") && said.contains("in use now") && said.contains("tiny"),
        "{code} {said}"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plan_of_a_t4_recommends_medium() -> Result<()> {
    let shelf = Shelf::new().await?;
    let (code, said) = shelf.run(&["plan", "--gpu", "T4:15GB", "--tenant", "voxtral=9.6GB"]).await?;
    ensure!(code == 0, "{code} {said}");
    let rows = ["medium    4         2       3267     85 %", "large-v3  4         1       4430     93 %"];
    ensure!(rows.iter().all(|row| said.contains(row)), "{said}");
    for (name, stance) in [("medium", "recommended"), ("large-v3", "aggressive"), ("base", "conservative")] {
        let row = said.lines().find(|l| l.starts_with(name)).context("a row")?;
        ensure!(row.ends_with(stance), "{row}");
    }
    ensure!(said.contains("large-v3-turbo 83 %"), "{said}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plan_uses_what_was_measured_on_such_a_card() -> Result<()> {
    let mut shelf = Shelf::new().await?;
    let cache = shelf.dir.path().join("cache");
    shelf.set("worker.cache_dir", &cache.display().to_string());
    let catalog = Catalog::built_in()?;
    let key = ModelKey::of_catalog(catalog.get("small").context("small")?).context("a key")?;
    let device = DeviceKey { name: "Tesla T4".to_owned(), total_mb: 15_109 };
    let figures = Figures { weights_mb: Some(460), state_mb: Some(300), at_ms: 1, ..Figures::default() };
    Measured::in_cache(&cache).record(&device, &key, figures)?;
    let planned = shelf.object(&["plan", "--gpu", "T4:15GB", "--json"]).await?;
    let small = option(&planned, "small");
    ensure!(small["used_mb"] == 530 + 460 + 2 * 300, "{small:#}");
    ensure!(small["figures"]["weights"]["from"] == "measured" && small["figures"]["context"]["from"] == "catalog");
    let elsewhere = shelf.object(&["plan", "--gpu", "L4:24GB", "--json"]).await?;
    ensure!(option(&elsewhere, "small")["used_mb"] == 1_768, "{elsewhere:#}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plan_of_a_fleet_says_what_becomes_of_it() -> Result<()> {
    let shelf = Shelf::new().await?;
    let file = find::root().join("examples/fleet-eight-cards.toml").display().to_string();
    let planned = shelf.object(&["plan", "--fleet", &file, "--json"]).await?;
    ensure!(planned["cards"].as_array().is_some_and(|c| c.len() == 8) && planned["lost"] == serde_json::json!([]));
    let failures = planned["failures"].as_array().context("failures")?;
    ensure!(failures.len() == 8 + 28 && failures.iter().all(|f| f["risk"] == "safe"), "{planned:#}");
    let four = ["plan", "--fleet", &file, "--fail", "gpu-0", "--fail", "gpu-0,gpu-1,gpu-2,gpu-3"];
    let (code, said) = shelf.run(&four).await?;
    ensure!(code == 0 && said.contains("when gpu-0 fails: safe"), "{code} {said}");
    ensure!(said.contains("whisper: gpu-0 -> gpu-5") && said.contains("lost: embedding of gpu-1"), "{said}");
    ensure!(said.lines().filter(|l| l.contains('|')).all(|l| l.chars().count() == 80), "{said}");
    let broken = shelf.dir.path().join("broken.toml");
    std::fs::write(&broken, "[[card]]\nid = \"a\"\ngpu = \"T4:15GB\"\n[[service]]\nname = \"s\"\ngpus = [\"b\"]\n")?;
    let broken = broken.display().to_string();
    for (arguments, wanted, words) in [
        (&["--gpu", "T4"][..], 2, "say its name and its memory, as in T4:15GB"),
        (&["--gpu", "T4:15"], 2, "say 15GB or 15360MB"),
        (&["--gpu", "T4:15GB", "--tenant", "voxtral"], 2, "as in voxtral=9.6GB"),
        (&["--gpu", "T4:15GB", "--model", "smal"], 66, "small"),
        (&["--gpu", "T4:15GB", "--fleet", &file], 2, "cannot be used with"),
        (&["--fail", "gpu-0"], 2, "--fleet"),
        (&["--fleet", &file, "--fail", "gpu-9"], 2, "no card \"gpu-9\""),
        (&["--fleet", "/nowhere.toml"], 65, "/nowhere.toml"),
        (&["--fleet", &broken], 64, "\"b\" is no card"),
    ] {
        let (code, said) = shelf.run(&[&["plan"], arguments].concat()).await?;
        ensure!(code == wanted && said.contains(words), "{arguments:?}: {code} {said}");
    }
    Ok(())
}
