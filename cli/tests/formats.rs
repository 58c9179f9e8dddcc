//! Every form of a transcript opens in a parser that others wrote, where Python has them. That the files are those that
//! this program writes is tested where the forms are made (`formats` in the binary).

use std::{path::Path, process::Command};

/// What the script answers where a package is missing.
const SKIPPED: i32 = 77;

#[test]
fn every_form_opens_in_a_public_parser() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    let mut command = Command::new("python3");
    command.arg(here.join("public_parsers.py")).arg(here.join("data/formats")).env("PYTHONDONTWRITEBYTECODE", "1");
    let Ok(output) = command.output() else {
        println!("skipped: Python 3 is not here");
        return;
    };
    let (read, told) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    if output.status.code() == Some(SKIPPED) {
        println!("{} (pip install srt==3.5.3 webvtt-py==0.6.0 pyannote.database==6.1.1)", told.trim());
        return;
    }
    assert!(output.status.success(), "{read}{told}");
    assert_eq!(read.lines().count(), 5, "{read}");
    print!("{read}");
}
