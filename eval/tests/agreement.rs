//! What jiwer and pyannote.metrics say of the same cases: those kept in `data/agreement.json`, and, where Python has the
//! two, random ones and all the real turns there are. `cross_check.py` makes both.

mod asked;

use std::{collections::BTreeMap, path::PathBuf, process::Command};

use serde_json::Value;

const NEAR: f64 = 1e-6;
/// What the script answers where a package is missing.
const SKIPPED: i32 = 77;

/// How many cases of each kind there were.
fn agree(cases: impl Iterator<Item = Value>) -> BTreeMap<String, usize> {
    let mut kinds = BTreeMap::new();
    for case in cases {
        let question = &case["question"];
        *kinds.entry(question["what"].as_str().expect("a kind").to_owned()).or_insert(0) += 1;
        let found = asked::answer(question).expect("a question");
        for (name, expected) in case["expected"].as_object().expect("figures") {
            let (found, expected) = (found[name].as_f64().expect("a number"), expected.as_f64().expect("a number"));
            assert!((found - expected).abs() <= NEAR, "{name}: {found}, they say {expected}: {question}");
        }
    }
    kinds
}

#[test]
fn the_tools_of_the_field_said_the_same() {
    let cases: Vec<Value> = serde_json::from_str(include_str!("data/agreement.json")).expect("JSON");
    let kinds = agree(cases.into_iter());
    assert!(kinds.len() == 3 && kinds.values().all(|n| *n >= 10), "{kinds:?}");
}

#[test]
fn the_tools_of_the_field_say_the_same_of_new_cases() {
    let here = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let data = std::env::var_os("VOXFLEET_TEST_DATA").map_or_else(|| here.join("../../shared/data"), PathBuf::from);
    let mut command = Command::new("python3");
    command.arg(here.join("tests/cross_check.py")).args(["--print", "--cases", "150", "--seed", "5"]);
    for file in ["ami30/reference.rttm", "vbx/ES2005a.rttm", "pyannote/sample.rttm"] {
        let path = data.join("diarization").join(file);
        if path.is_file() {
            command.arg("--rttm").arg(path);
        }
    }
    let Ok(output) = command.env("PYTHONDONTWRITEBYTECODE", "1").output() else {
        println!("skipped: Python 3 is not here");
        return;
    };
    let told = String::from_utf8_lossy(&output.stderr);
    if output.status.code() == Some(SKIPPED) {
        println!("{} (pip install jiwer==4.0.0 pyannote.metrics==4.2.0)", told.trim());
        return;
    }
    assert!(output.status.success(), "{told}");
    let lines = String::from_utf8(output.stdout).expect("text");
    let kinds = agree(lines.lines().map(|line| serde_json::from_str(line).expect("JSON")));
    assert!(kinds.len() == 3 && kinds.values().all(|n| *n >= 150), "{kinds:?}");
    println!("they agree on {kinds:?}");
}

#[test]
fn what_is_no_question_has_no_answer() {
    for question in [Value::Null, serde_json::json!({"what": "x"}), serde_json::json!({"what": "words"})] {
        assert_eq!(asked::answer(&question), None);
    }
}
