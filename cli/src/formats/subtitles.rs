//! The syntax of subtitle files.

use super::cue::Cue;

/// SubRip: a number, a time range with commas, the lines, an empty line.
pub(super) fn srt(cues: &[Cue]) -> String {
    let cue = |(number, cue): (usize, &Cue)| {
        let name = cue.speaker.as_ref().map(|s| format!("{s}: ")).unwrap_or_default();
        // The format knows no escapes; an arrow inside a text would be read as another time range.
        let text = format!("{name}{}", cue.lines.join("\n")).replace("-->", "->");
        format!("{number}\n{} --> {}\n{text}\n\n", clock(cue.start_ms, ','), clock(cue.end_ms, ','))
    };
    (1..).zip(cues).map(cue).collect()
}

/// WebVTT: a header, then the same with points, escapes, and the speaker as the voice of the text.
pub(super) fn vtt(cues: &[Cue]) -> String {
    let cue = |(number, cue): (usize, &Cue)| {
        let voice = cue.speaker.as_ref().map(|s| format!("<v {}>", escaped(s))).unwrap_or_default();
        let lines: Vec<String> = cue.lines.iter().map(|line| escaped(line)).collect();
        let (start, end) = (clock(cue.start_ms, '.'), clock(cue.end_ms, '.'));
        format!("\n{number}\n{start} --> {end}\n{voice}{}\n", lines.join("\n"))
    };
    let mut text = String::from("WEBVTT\n");
    text.extend((1..).zip(cues).map(cue));
    text
}

/// `-->` has no meaning any more either: its last sign is written as an entity.
fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

fn clock(ms: u64, point: char) -> String {
    let (hours, minutes, seconds) = (ms / 3_600_000, ms / 60_000 % 60, ms / 1000 % 60);
    format!("{hours:02}:{minutes:02}:{seconds:02}{point}{:03}", ms % 1000)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cue(start_ms: u64, end_ms: u64, speaker: Option<&str>, lines: &[&str]) -> Cue {
        let lines = lines.iter().map(|l| (*l).to_owned()).collect();
        Cue { start_ms, end_ms, speaker: speaker.map(str::to_owned), lines }
    }

    #[test]
    fn subrip_has_its_form() {
        let cues = [
            cue(535, 2_835, None, &["good morning", "this is lucy"]),
            cue(3_600_000, 86_400_007, Some("B"), &["a --> b"]),
        ];
        let expected = "1\n00:00:00,535 --> 00:00:02,835\ngood morning\nthis is lucy\n\n\
            2\n01:00:00,000 --> 24:00:00,007\nB: a -> b\n\n";
        assert_eq!(srt(&cues), expected);
        assert_eq!(srt(&[]), "");
    }

    #[test]
    fn webvtt_has_its_form() {
        let cues = [cue(535, 2_835, None, &["salt & <pepper>"]), cue(3_000, 4_000, Some("R&D <1>"), &["a --> b", "c"])];
        let expected = "WEBVTT\n\n1\n00:00:00.535 --> 00:00:02.835\nsalt &amp; &lt;pepper&gt;\n\n\
            2\n00:00:03.000 --> 00:00:04.000\n<v R&amp;D &lt;1&gt;>a --&gt; b\nc\n";
        assert_eq!(vtt(&cues), expected);
        assert_eq!(vtt(&[]), "WEBVTT\n");
    }
}
