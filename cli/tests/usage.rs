//! The real binary without a fleet: what is typed wrong, configured wrong, needs no NATS, or finds one that lacks something.

use std::{
    io::{BufRead as _, Write as _},
    path::Path,
    process::{Command, Output, Stdio},
};

use voxfleet_harness::server::{NatsServer, ServerOptions};

/// A command in an empty folder, with no settings of the developer's.
fn voxfleet(dir: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_voxfleet"));
    for (name, _) in std::env::vars_os() {
        if ["VOXFLEET", "OTEL_"].iter().any(|start| name.to_string_lossy().starts_with(start)) {
            command.env_remove(name);
        }
    }
    command.args(arguments).current_dir(dir).env("HOME", dir).env_remove("XDG_CACHE_HOME").env_remove("ORT_DYLIB_PATH");
    command
}

fn run(arguments: &[&str]) -> Output {
    let dir = tempfile::tempdir().expect("temporary folder");
    voxfleet(dir.path(), arguments).output().expect("voxfleet runs")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn decode(payload: &[u8], arguments: &[&str]) -> String {
    let dir = tempfile::tempdir().expect("temporary folder");
    let mut command = voxfleet(dir.path(), &[&["decode"], arguments].concat());
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("voxfleet runs");
    child.stdin.take().expect("stdin").write_all(payload).expect("payload");
    let output = child.wait_with_output().expect("output");
    assert_eq!(output.status.code(), Some(0));
    text(&output.stdout)
}

#[test]
fn exit_codes_are_the_documented_ones() {
    let help = text(&run(&["--help"]).stdout);
    let cases: &[(&[&str], i32)] = &[
        (&["--version"], 0),
        (&["config", "check"], 0),
        (&[], 2),
        (&["no-such-command"], 2),
        (&["watch", "not an id"], 2),
        (&["demo", "--url", "nats://127.0.0.1:1"], 2),
        (&["bench", "route", "--set", "nats.urls=nats://127.0.0.1:1"], 2),
        (&["bench"], 0),
        (&["bench", "chaos", "--minutes", "nan"], 2),
        (&["bench", "chaos", "--replicas", "2"], 2),
        (&["bench", "failover", "--workers", "1"], 2),
        (&["bench", "failover", "--keep", "/proc/nope"], 2),
        (&["bench", "detection", "--heartbeats", "0"], 2),
        (&["bench", "engine", "--engines", "ears"], 2),
        (&["bench", "engine", "--batches", "1,0"], 2),
        (&["bench", "engine", "--compute-types", "int7"], 2),
        (&["bench", "density", "--engines", "ears"], 2),
        (&["bench", "density", "--seconds", "4"], 2),
        (&["bench", "density", "--most", "0"], 2),
        (&["bench", "density", "--first", "9", "--most", "8"], 2),
        (&["bench", "density", "--compute-type", "auto"], 2),
        (&["stream", "-", "--chunk-ms", "0"], 2),
        (&["stream", "-", "-o", "colour=red"], 2),
        (&["stream", "-", "--format", "mp3"], 2),
        (&["transcribe"], 2),
        (&["transcribe", "ftp://host/a.wav"], 2),
        (&["transcribe", "https://host/a.wav", "--ttl", "1w"], 2),
        (&["transcribe", "https://host/a.wav", "--speed", "2"], 2),
        (&["transcribe", "https://host/a.wav", "--endpoint-ms", "7"], 2),
        (&["transcribe", "https://host/a.wav", "-o", "/no/such/folder/a.srt"], 2),
        (&["transcribe", "--live", "https://host/a.wav"], 2),
        (&["transcribe", "/no/such/file.wav"], 65),
        (&["transcribe", "/dev"], 65),
        (&["transcribe", "https://host/a.wav", "--url", "nats://127.0.0.1:1"], 69),
        (&["jobs"], 2),
        (&["jobs", "list", "--state", "gone"], 2),
        (&["jobs", "show", "a", "--url", "nats://127.0.0.1:1"], 69),
        (&["export", "not an id"], 2),
        (&["export", "a", "--job", "--session"], 2),
        (&["eval", "wer", "-", "-"], 2),
        (&["eval", "wer", "/no/such/file.txt", "-"], 65),
        (&["eval", "wer", "/dev/null", "/dev/null"], 65),
        (&["eval", "wer", "a", "b", "--normalise", "french"], 2),
        (&["eval", "der", "a", "b", "--collar", "-1"], 2),
        (&["eval", "wder", "/dev/null", "/dev/null"], 65),
        (&["eval", "latency", "/dev/null", "/dev/null"], 65),
        (&["export", "a", "-f", "rttm", "--no-speakers"], 2),
        (&["config", "check", "--set", "nats.no_such=1"], 64),
        (&["watch", "--config", "/no/such/file.toml"], 64),
        (&["stream", "/no/such/file.wav"], 65),
        (&["watch", "--url", "nats://127.0.0.1:1"], 69),
    ];
    for (arguments, code) in cases {
        let output = run(arguments);
        assert_eq!(output.status.code(), Some(*code), "{arguments:?}: {}", text(&output.stderr));
        assert!(help.contains(&format!("{code:>3}  ")), "{code} is not in --help");
    }
}

/// The commands that a `--help` names, hidden ones left out.
fn commands_of(help: &str) -> Vec<String> {
    let section = help.split_once("Commands:\n").map(|(_, after)| after).unwrap_or_default();
    let lines = section.lines().take_while(|line| !line.is_empty());
    let names = lines.filter_map(|line| Some(line.strip_prefix("  ")?.split(' ').next()?.to_owned()));
    names.filter(|name| !name.is_empty() && name != "help").collect()
}

/// That each example can be typed is tested where the arguments are.
#[test]
fn every_command_helps_with_examples() {
    let mut open: Vec<Vec<String>> = vec![Vec::new()];
    let mut seen = Vec::new();
    while let Some(words) = open.pop() {
        let arguments: Vec<&str> = words.iter().map(String::as_str).chain(["--help"]).collect();
        let help = text(&run(&arguments).stdout);
        let below = commands_of(&help);
        // The list of benches stands for all of them.
        if below.is_empty() && words[0] != "bench" {
            assert!(help.contains("Examples:\n  ") && help.contains("  voxfleet "), "{words:?}: {help}");
        }
        open.extend(below.into_iter().map(|name| [&words[..], &[name]].concat()));
        seen.push(words.join(" "));
    }
    for command in
        ["demo", "stream", "transcribe", "jobs submit", "jobs result", "export", "eval wer", "eval der", "config check"]
    {
        assert!(seen.iter().any(|s| s == command), "{command} is not among {seen:?}");
    }
    for child in ["engine", "audio-decoder"] {
        assert!(!seen.iter().any(|s| s == child), "{child} is nobody's command");
    }
}

#[test]
fn word_errors_are_counted_without_a_fleet() {
    let dir = tempfile::tempdir().expect("temporary folder");
    std::fs::write(dir.path().join("said.txt"), "Good morning,\nmy name is Anna.\n").expect("file");
    let mut command = voxfleet(dir.path(), &["eval", "wer", "said.txt", "-", "--json"]);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("voxfleet runs");
    child.stdin.take().expect("stdin").write_all(b"good morning my name was").expect("text");
    let output = child.wait_with_output().expect("output");
    let object: serde_json::Value = serde_json::from_slice(&output.stdout).expect("one object");
    let fields = ["wer", "substitutions", "deletions", "insertions", "words"].map(|name| object[name].as_f64());
    assert_eq!(fields, [Some(2.0 / 6.0), Some(1.0), Some(1.0), Some(0.0), Some(6.0)], "{object}");
}

/// Test calls against themselves with something changed, as somebody would type it.
#[test]
fn calls_are_measured_without_a_fleet() {
    let (dir, calls) = (tempfile::tempdir().expect("folder"), concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/audio"));
    let of = |arguments: &[&str]| -> serde_json::Value {
        let output = voxfleet(dir.path(), arguments).output().expect("voxfleet runs");
        assert!(output.status.success(), "{arguments:?}: {}", text(&output.stderr));
        serde_json::from_slice(&output.stdout).expect("one object")
    };
    let call = |name: &str| format!("{calls}/{name}");
    let own = of(&["eval", "wer", calls, calls, "--json", "--bootstrap", "50"]);
    assert_eq!((own["wer"].as_f64(), own["rows"].as_array().map(Vec::len)), (Some(0.0), Some(5)), "{own}");
    let other = of(&["eval", "cer", &call("call-01.txt"), &call("call-02.json"), "--json", "--normalise", "none"]);
    assert!(other["cer"].as_f64().is_some_and(|cer| cer > 0.3 && cer < 1.0), "{other}");

    // The last turn of the call is gone, and 8 s into it the other one speaks.
    let turns = std::fs::read_to_string(call("call-01.rttm")).expect("turns");
    let kept = turns.trim_end().rsplit_once('\n').map(|(kept, _)| kept.replace("customer", "X")).expect("two lines");
    std::fs::write(dir.path().join("heard.rttm"), &kept).expect("file");
    let der = of(&["eval", "der", &call("call-01.rttm"), "heard.rttm", "--json"]);
    let (missed, total) = (der["missed_detection"].as_f64().unwrap_or(0.0), der["total"].as_f64().unwrap_or(1.0));
    assert!(missed > 0.5 && der["der"].as_f64() == Some(missed / total) && der["false_alarm"] == 0.0, "{der}");
    let forgiven = of(&["eval", "der", &call("call-01.rttm"), "heard.rttm", "--json", "--collar", "0.5"]);
    assert!(forgiven["total"].as_f64().is_some_and(|less| less < total), "{forgiven}");

    let changed = std::fs::read_to_string(call("call-03.json")).expect("call").replacen("\"customer\"", "\"agent\"", 1);
    std::fs::write(dir.path().join("heard.json"), changed).expect("file");
    let wder = of(&["eval", "wder", &call("call-03.json"), "heard.json", "--json"]);
    assert_eq!((wder["wrong"].as_u64(), wder["wer"].as_f64()), (Some(10), Some(0.0)), "{wder}");

    let aligned = voxfleet(dir.path(), &["eval", "wer", &call("call-01.txt"), "heard.json", "--align"]).output();
    let shown = text(&aligned.expect("voxfleet runs").stdout);
    assert!(shown.starts_with("REF:  ") && shown.contains("\nHYP:  ") && shown.contains("word error rate"), "{shown}");
}

#[test]
fn bench_lists_what_it_can_measure() {
    let listed = text(&run(&["bench"]).stdout);
    for bench in ["accuracy", "pipeline", "route", "startup"] {
        assert!(listed.lines().any(|l| l.starts_with(&format!("voxfleet bench {bench} "))), "{bench}: {listed}");
    }
    assert!(!listed.contains("probe"), "{listed}");
    let object: serde_json::Value = serde_json::from_slice(&run(&["bench", "--json"]).stdout).expect("one object");
    assert!(object["benches"]["route"].is_string(), "{object}");
}

#[test]
fn configuration_is_checked_whole_and_shown_with_its_origins() {
    let dir = tempfile::tempdir().expect("temporary folder");
    std::fs::write(dir.path().join("voxfleet.toml"), "[nats]\nuser = \"me\"\npassword = \"hunter2\"\n").expect("file");
    let show = voxfleet(dir.path(), &["config", "show", "--json"])
        .env("VOXFLEET__NATS__URLS", "nats://a:4222,nats://b:4222")
        .output()
        .expect("show");
    let shown: serde_json::Value = serde_json::from_slice(&show.stdout).expect("one object");
    let setting = |key: &str| {
        let rows = shown["settings"].as_array().expect("rows");
        rows.iter().find(|r| r["key"] == key).map(|r| (r["value"].clone(), r["origin"].clone())).expect(key)
    };
    assert_eq!(setting("nats.user"), ("me".into(), "file:voxfleet.toml".into()));
    assert_eq!(setting("nats.password"), ("***".into(), "file:voxfleet.toml".into()));
    let urls = serde_json::json!(["nats://a:4222", "nats://b:4222"]);
    assert_eq!(setting("nats.urls"), (urls, "env:VOXFLEET__NATS__URLS".into()));
    assert_eq!(setting("nats.prefix").1, "default");
    assert!(!text(&show.stdout).contains("hunter2"));

    std::fs::write(
        dir.path().join("voxfleet.toml"),
        "[nats]\nurls = 7\nuzer = \"me\"\n[dispatcher]\ntick_ms = \"fast\"\n",
    )
    .expect("file");
    let check = voxfleet(dir.path(), &["config", "check"]).output().expect("check");
    assert_eq!(check.status.code(), Some(64));
    for name in ["nats.urls", "uzer", "dispatcher.tick_ms", "file:voxfleet.toml"] {
        assert!(text(&check.stderr).contains(name), "{name} in {}", text(&check.stderr));
    }
    let check = voxfleet(dir.path(), &["config", "check", "--json"]).output().expect("check");
    let object: serde_json::Value = serde_json::from_slice(&check.stdout).expect("one object");
    assert_eq!((check.status.code(), object["problems"].as_array().map(Vec::len)), (Some(64), Some(3)));
}

#[test]
fn mistakes_of_every_kind_are_named_together() {
    let mistakes =
        ["worker.slots=x", "dispatcher.dead_after_ms=1", "dispatcher.suspect_after_ms=5", "worker.decode_states=0"];
    let set: Vec<&str> = mistakes.iter().flat_map(|m| ["--set", m]).collect();
    let check = run(&[&["config", "check"], &set[..]].concat());
    assert_eq!(check.status.code(), Some(64));
    for name in ["worker.slots", "dispatcher.dead_after_ms", "dispatcher.suspect_after_ms", "worker.decode_states"] {
        let line = format!("{name}: ");
        assert!(text(&check.stderr).contains(&line), "{name} in {}", text(&check.stderr));
    }
}

#[test]
fn a_service_waits_for_its_server_and_can_be_stopped_meanwhile() {
    for somebody_reads_its_logs in [true, false] {
        let dir = tempfile::tempdir().expect("temporary folder");
        let mut service = voxfleet(dir.path(), &["dispatcher", "--url", "nats://127.0.0.1:1"])
            .stderr(Stdio::piped())
            .spawn()
            .expect("voxfleet runs");
        let mut lines = std::io::BufReader::new(service.stderr.take().expect("stderr")).lines();
        let told = lines.by_ref().map_while(Result::ok).find(|l| l.contains("trying again to connect to nats"));
        assert!(told.is_some(), "it says that it waits");
        let lines = somebody_reads_its_logs.then_some(lines);
        let stopped = Command::new("kill").args(["-INT", &service.id().to_string()]).status().expect("kill runs");
        assert!(stopped.success());
        let begun = std::time::Instant::now();
        let code = loop {
            if let Some(status) = service.try_wait().expect("its end") {
                break status.code();
            }
            if begun.elapsed() > std::time::Duration::from_secs(20) {
                service.kill().expect("kill");
                break None;
            }
            std::thread::yield_now();
        };
        assert_eq!(code, Some(0), "logs are read: {somebody_reads_its_logs}");
        drop(lines);
    }
}

async fn with_server(server: &NatsServer, arguments: &[&str]) -> Output {
    let dir = tempfile::tempdir().expect("temporary folder");
    let url = server.url();
    let mut command = voxfleet(dir.path(), &[arguments, &["--url", &url]].concat());
    command.stdin(Stdio::null());
    tokio::task::spawn_blocking(move || command.output()).await.expect("thread").expect("voxfleet runs")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_without_jetstream_is_told() {
    let options = ServerOptions { jetstream: false, ..ServerOptions::default() };
    let server = NatsServer::start_with(options).await.expect("nats-server");
    for arguments in [&["watch"][..], &["stream", "-", "--wait"], &["stream", "-"]] {
        let output = with_server(&server, arguments).await;
        assert_eq!(output.status.code(), Some(69), "{arguments:?}: {}", text(&output.stderr));
        assert!(text(&output.stderr).contains("-js"), "{arguments:?}: {}", text(&output.stderr));
    }
    let begun = std::time::Instant::now();
    let doctor = with_server(&server, &["doctor"]).await;
    assert_eq!(doctor.status.code(), Some(1), "{}", text(&doctor.stdout));
    assert!(begun.elapsed() < std::time::Duration::from_secs(15), "{:?}", begun.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn no_audio_is_told_and_not_waited_for() {
    let server = NatsServer::start().await.expect("nats-server");
    for arguments in [&["stream", "-", "--wait"][..], &["stream", "-"]] {
        let output = with_server(&server, arguments).await;
        assert_eq!(output.status.code(), Some(65), "{arguments:?}: {}", text(&output.stderr));
        assert!(text(&output.stderr).contains("no audio"), "{arguments:?}: {}", text(&output.stderr));
    }
}

#[test]
fn the_example_configuration_is_valid() {
    let example = concat!(env!("CARGO_MANIFEST_DIR"), "/../voxfleet.example.toml");
    let output = run(&["config", "check", "dispatcher", "--config", example]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
}

#[test]
fn payloads_become_readable() {
    assert_eq!(decode(br#"{"a":1}"#, &[]), "{\n  \"a\": 1\n}\n");
    assert!(decode(&[0x81, 0xa1, b'n', 7], &[]).contains("\"n\": 7"));
    assert!(decode(&[0; 1600], &["--format", "pcm_s16le;rate=8000"]).contains("\"ms\": 100"));
    assert_eq!(decode(b"", &[]), "(empty)\n");
}

#[test]
fn a_ggml_file_becomes_a_folder_once() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let micro = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/models/micro.en-q8_0.bin");
    let micro = micro.to_str().expect("path");
    let convert = |arguments: &[&str]| {
        let all = [&["models", "convert"], arguments].concat();
        let output = voxfleet(dir.path(), &all).output().expect("voxfleet runs");
        (output.status.code(), text(&output.stdout), text(&output.stderr))
    };
    let (code, said, errors) = convert(&[micro, "--out", "micro", "--precision", "int8_float32", "--json"]);
    assert_eq!(code, Some(0), "{errors}");
    let said: serde_json::Value = serde_json::from_str(&said).expect("one object");
    assert_eq!((said["path"].as_str(), said["precision"].as_str()), (Some("micro"), Some("int8_float32")));
    assert_eq!(said["multilingual"], false);
    for file in ["model.bin", "config.json", "vocabulary.json", "preprocessor_config.json"] {
        assert!(dir.path().join("micro").join(file).is_file(), "{file}");
    }
    let (code, _, errors) = convert(&[micro, "--out", "micro"]);
    assert!(code == Some(1) && errors.contains("exists already"), "{errors}");

    std::fs::write(dir.path().join("broken.bin"), "lmgg and no more").expect("write");
    let (code, _, errors) = convert(&["broken.bin"]);
    assert!(code == Some(65) && errors.contains("cut off"), "{errors}");
    assert!(!dir.path().join("broken-ct2").exists());
    assert_eq!(convert(&["absent.bin"]).0, Some(65));
    assert_eq!(convert(&[micro, "--precision", "int3"]).0, Some(2));
}
