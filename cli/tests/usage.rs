//! The real binary without a server: what is typed wrong, configured wrong, or needs no NATS at all.

use std::{
    io::Write as _,
    path::Path,
    process::{Command, Output, Stdio},
};

/// A command in an empty folder, with no settings of the developer's.
fn voxfleet(dir: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_voxfleet"));
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("VOXFLEET") {
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
    let cases: [(&[&str], i32); 12] = [
        (&["--version"], 0),
        (&["config", "check"], 0),
        (&[], 2),
        (&["no-such-command"], 2),
        (&["watch", "not an id"], 2),
        (&["stream", "-", "--chunk-ms", "0"], 2),
        (&["stream", "-", "-o", "colour=red"], 2),
        (&["stream", "-", "--format", "mp3"], 2),
        (&["config", "check", "--set", "nats.no_such=1"], 64),
        (&["watch", "--config", "/no/such/file.toml"], 64),
        (&["stream", "/no/such/file.wav"], 65),
        (&["watch", "--url", "nats://127.0.0.1:1"], 69),
    ];
    for (arguments, code) in cases {
        let output = run(arguments);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {}", text(&output.stderr));
        assert!(help.contains(&format!("{code:>3}  ")), "{code} is not in --help");
    }
}

#[test]
fn every_command_helps_with_examples() {
    for command in ["dispatcher", "worker", "stream", "watch", "status", "doctor", "decode", "demo"] {
        let output = run(&[command, "--help"]);
        assert!(text(&output.stdout).contains("Examples:\n  "), "{command}");
    }
    assert!(!text(&run(&["--help"]).stdout).contains("engine  "), "the engine child is nobody's command");
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
