//! Speaker turns as files: RTTM (NIST, Rich Transcription 2009, appendix A), and UEM, the regions that are scored.
//!
//! A line of RTTM: `SPEAKER <file> <channel> <start> <duration> <NA> <NA> <speaker> <NA> <NA>`, times in seconds. Other kinds
//! of lines, empty ones and remarks (`;;`, `#`) are passed over; fields behind the speaker may be missing.

use crate::Turn;

#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    pub file: String,
    pub channel: String,
    pub turn: Turn,
}

/// A part of a recording that is scored.
#[derive(Debug, Clone, PartialEq)]
pub struct Region {
    pub file: String,
    pub start_s: f64,
    pub end_s: f64,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {problem}")]
pub struct ParseError {
    /// From 1.
    pub line: usize,
    pub problem: Problem,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    #[error("{found} fields where {needed} are needed")]
    Fields { found: usize, needed: usize },
    #[error("the {field} is no number of seconds: {text:?}")]
    Number { field: &'static str, text: String },
    #[error("the end is before the start")]
    Backwards,
}

/// All turns of a file, in its order.
pub fn parse(text: &str) -> Result<Vec<Entry>, ParseError> {
    let mut entries = Vec::new();
    for (line, fields) in lines(text) {
        if !fields[0].eq_ignore_ascii_case("SPEAKER") {
            continue;
        }
        let told = |problem| ParseError { line, problem };
        let [_, file, channel, start, duration, _, _, speaker, ..] = fields[..] else {
            return Err(told(Problem::Fields { found: fields.len(), needed: 8 }));
        };
        let start_s = number("start", start).map_err(told)?;
        let duration_s = number("duration", duration).map_err(told)?;
        if duration_s < 0.0 {
            return Err(told(Problem::Backwards));
        }
        let turn = Turn { start_s, end_s: start_s + duration_s, speaker: speaker.to_owned() };
        entries.push(Entry { file: file.to_owned(), channel: channel.to_owned(), turn });
    }
    Ok(entries)
}

/// `<file> <channel> <start> <end>` a line.
pub fn parse_uem(text: &str) -> Result<Vec<Region>, ParseError> {
    let mut regions = Vec::new();
    for (line, fields) in lines(text) {
        let told = |problem| ParseError { line, problem };
        let [file, _, start, end, ..] = fields[..] else {
            return Err(told(Problem::Fields { found: fields.len(), needed: 4 }));
        };
        let start_s = number("start", start).map_err(told)?;
        let end_s = number("end", end).map_err(told)?;
        if end_s < start_s {
            return Err(told(Problem::Backwards));
        }
        regions.push(Region { file: file.to_owned(), start_s, end_s });
    }
    Ok(regions)
}

/// Lines that say something, with their numbers and fields.
fn lines(text: &str) -> impl Iterator<Item = (usize, Vec<&str>)> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    (1..).zip(text.lines()).filter_map(|(number, line)| {
        let line = line.trim();
        let remark = line.starts_with(";;") || line.starts_with('#');
        (!line.is_empty() && !remark).then(|| (number, line.split_whitespace().collect()))
    })
}

/// Thirty years: beyond it no recording lies, and to the millisecond no sum of two numbers leaves the range.
const LONGEST_S: f64 = 1e9;

fn number(field: &'static str, text: &str) -> Result<f64, Problem> {
    let number = text.parse::<f64>().ok().filter(|n| n.abs() <= LONGEST_S);
    number.ok_or_else(|| Problem::Number { field, text: text.to_owned() })
}

/// The lines of a file, to the millisecond. Names that would break a line have their white space replaced; a turn that
/// takes no time is left out, since readers refuse or drop it.
pub fn write(entries: &[Entry]) -> String {
    let mut text = String::new();
    for Entry { file, channel, turn } in entries {
        let ms = |seconds: f64| (seconds * 1000.0).round() as i64;
        let (start, length) = (ms(turn.start_s), ms(turn.end_s) - ms(turn.start_s));
        if length > 0 {
            let clock = |ms: i64| format!("{}.{:03}", ms / 1000, ms % 1000);
            let (file, channel, speaker) = (name(file), name(channel), name(&turn.speaker));
            let (start, length) = (clock(start.max(0)), clock(length));
            text.push_str(&format!("SPEAKER {file} {channel} {start} {length} <NA> <NA> {speaker} <NA> <NA>\n"));
        }
    }
    text
}

fn name(text: &str) -> String {
    let name = text.split_whitespace().collect::<Vec<_>>().join("_");
    if name.is_empty() { "<NA>".to_owned() } else { name }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn entry(file: &str, start_s: f64, end_s: f64, speaker: &str) -> Entry {
        let turn = Turn { start_s, end_s, speaker: speaker.to_owned() };
        Entry { file: file.to_owned(), channel: "1".to_owned(), turn }
    }

    #[test]
    fn lines_are_read_as_they_come() {
        let text = "\u{feff};; a remark\nSPEAKER call 1 0.5 2.25 <NA> <NA> agent <NA> <NA>\r\n\n\
            LEXEME call 1 0.5 0.1 hello lex agent 0.9\n  speaker\tcall 1  3 .5 <NA> <NA> S1\n# end";
        let found = parse(text).expect("RTTM");
        assert_eq!(found, [entry("call", 0.5, 2.75, "agent"), entry("call", 3.0, 3.5, "S1")]);
        assert_eq!(parse(""), Ok(vec![]));
    }

    #[test]
    fn mistakes_are_named_with_their_line() {
        let cases = [
            ("SPEAKER a 1 0 1 x x", "line 1: 7 fields where 8 are needed"),
            ("\nSPEAKER a 1 zero 1 x x S", "line 2: the start is no number of seconds: \"zero\""),
            ("SPEAKER a 1 0 nan x x S", "line 1: the duration is no number of seconds: \"nan\""),
            ("SPEAKER a 1 -1e300 2e300 x x S", "line 1: the start is no number of seconds: \"-1e300\""),
            ("SPEAKER a 1 0 inf x x S", "line 1: the duration is no number of seconds: \"inf\""),
            ("SPEAKER a 1 0 -1 x x S", "line 1: the end is before the start"),
        ];
        for (text, expected) in cases {
            assert_eq!(parse(text).expect_err("refused").to_string(), expected);
        }
        assert_eq!(parse_uem("a 1 5 4").expect_err("refused").problem, Problem::Backwards);
        assert_eq!(parse_uem("a 1 5").expect_err("refused").problem, Problem::Fields { found: 3, needed: 4 });
    }

    #[test]
    fn scored_regions() {
        let region = Region { file: "a".to_owned(), start_s: 1.0, end_s: 60.5 };
        assert_eq!(parse_uem(";; x\na 1 1.0 60.5\n"), Ok(vec![region]));
    }

    #[test]
    fn what_is_written_has_its_form() {
        let entries = [entry("a call", 0.5, 2.7504, "the agent"), entry("a", 3.0, 3.0, "S1"), entry("", 3.0, 4.0, "")];
        let expected = "SPEAKER a_call 1 0.500 2.250 <NA> <NA> the_agent <NA> <NA>\n\
            SPEAKER <NA> 1 3.000 1.000 <NA> <NA> <NA> <NA> <NA>\n";
        assert_eq!(write(&entries), expected);
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_again(turns in prop::collection::vec((0u32..10_000_000, 1u32..100_000, 0u8..5), 0..20)) {
            let entries: Vec<Entry> = turns
                .iter()
                .map(|(start, length, who)| {
                    let seconds = |ms: u32| f64::from(ms) / 1000.0;
                    entry("f", seconds(*start), seconds(start + length), &format!("S{who}"))
                })
                .collect();
            let again = parse(&write(&entries)).expect("our own");
            prop_assert_eq!(again.len(), entries.len());
            for (a, b) in again.iter().zip(&entries) {
                prop_assert!(a.turn.speaker == b.turn.speaker && (a.turn.start_s - b.turn.start_s).abs() < 1e-9);
                prop_assert!((a.turn.end_s - b.turn.end_s).abs() < 1e-9);
            }
        }
    }
}
