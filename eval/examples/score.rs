//! Scores what it is told on standard input, one JSON object a line, and answers with one object a line:
//!
//! - `{"what": "words", "normalise": "none", "pairs": [[said, heard], ...]}`
//! - `{"what": "speakers", "collar_s": 0.25, "skip_overlap": false, "regions": null or [[start, end], ...],
//!   "reference": [[start, end, speaker], ...], "heard": [...]}`
//! - `{"what": "speaker_words", "reference": [[word, speaker], ...], "heard": [[word, speaker or null], ...]}`
//!
//! `eval/tests/cross_check.py` compares the answers with those of other tools.

use std::io::BufRead as _;

use serde_json::{Value, json};

#[path = "../tests/asked/mod.rs"]
mod asked;

fn main() {
    for line in std::io::stdin().lock().lines() {
        let line = line.expect("standard input is text");
        let question: Value = serde_json::from_str(&line).expect("a line is a JSON object");
        println!("{}", asked::answer(&question).unwrap_or_else(|| json!({"error": "not understood"})));
    }
}
