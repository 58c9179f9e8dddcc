//! A transcript as people keep it: plain text, SubRip, WebVTT, one JSON object. Pure.
//!
//! | module | holds |
//! |---|---|
//! | [`piece`] | what is written down: text with its times, from a chain of finals or from a job's aggregate |
//! | [`cue`] | subtitles: two short lines each, cut at word times, never one over another |
//! | [`subtitles`] | the syntax of SubRip and WebVTT |

mod cue;
mod piece;
mod subtitles;

use clap::ValueEnum;

pub(crate) use piece::{Chain, Piece, of_result};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub(crate) enum Format {
    /// One line for each segment
    #[default]
    Text,
    /// One object with segments, words and times
    Json,
    /// SubRip subtitles
    Srt,
    /// WebVTT subtitles
    Vtt,
}

/// The whole file, with its last line ended. `json` is what stands for the transcript there: it is not made of pieces.
pub(crate) fn render(format: Format, pieces: &[Piece], json: &str) -> String {
    match format {
        Format::Text => text(pieces),
        Format::Json => format!("{}\n", json.trim_end()),
        Format::Srt => subtitles::srt(&cue::cues(pieces)),
        Format::Vtt => subtitles::vtt(&cue::cues(pieces)),
    }
}

fn text(pieces: &[Piece]) -> String {
    let line = |piece: &Piece| {
        let words = piece.text.split_whitespace().collect::<Vec<_>>().join(" ");
        match piece.speaker.as_deref() {
            _ if words.is_empty() => None,
            Some(speaker) => Some(format!("{speaker}: {words}\n")),
            None => Some(format!("{words}\n")),
        }
    };
    pieces.iter().filter_map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_one_line_a_segment() {
        let piece = |text: &str, speaker: Option<&str>| Piece {
            start_ms: 0,
            end_ms: 1,
            text: text.to_owned(),
            speaker: speaker.map(str::to_owned),
            words: Vec::new(),
        };
        let pieces = [piece(" good\nmorning ", None), piece("  ", Some("A")), piece("yes", Some("B"))];
        assert_eq!(render(Format::Text, &pieces, "{}"), "good morning\nB: yes\n");
        assert_eq!(render(Format::Text, &[], "{}"), "");
        assert_eq!(render(Format::Json, &pieces, "{\"a\":1}\n"), "{\"a\":1}\n");
    }
}
