//! Transcripts as lines of text, with or without colour. Pure.

use voxfleet_schema::{
    event::Event,
    transcript::{Final, Partial, Revision, Segment, Word},
};

use crate::plain::plain;

/// Colours where they are wanted: on a terminal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Paint {
    pub(crate) colour: bool,
}

impl Paint {
    fn with(self, code: &str, text: &str) -> String {
        if self.colour && !text.is_empty() { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }

    pub(crate) fn dim(self, text: &str) -> String {
        self.with("2", text)
    }

    pub(crate) fn bold(self, text: &str) -> String {
        self.with("1", text)
    }

    pub(crate) fn green(self, text: &str) -> String {
        self.with("32", text)
    }

    pub(crate) fn yellow(self, text: &str) -> String {
        self.with("33", text)
    }

    pub(crate) fn red(self, text: &str) -> String {
        self.with("31", text)
    }

    pub(crate) fn cyan(self, text: &str) -> String {
        self.with("36", text)
    }
}

/// `00:03.8`, with hours from one hour on.
pub(crate) fn clock(ms: u64) -> String {
    let (tenths, seconds, minutes, hours) = (ms / 100 % 10, ms / 1000 % 60, ms / 60_000 % 60, ms / 3_600_000);
    if hours > 0 {
        format!("{hours}:{minutes:02}:{seconds:02}.{tenths}")
    } else {
        format!("{minutes:02}:{seconds:02}.{tenths}")
    }
}

/// The text, with the name of whoever speaks where it changes.
fn spoken(segments: &[Segment], paint: Paint) -> String {
    let mut text = String::new();
    let mut before: Option<&str> = None;
    for segment in segments.iter().filter(|segment| !segment.text.trim().is_empty()) {
        let speaker = segment.speaker.as_deref();
        if !text.is_empty() {
            text.push_str(if speaker == before { " " } else { "  " });
        }
        if let Some(name) = speaker.filter(|_| speaker != before) {
            text.push_str(&paint.green(&format!("{}: ", plain(name))));
        }
        text.push_str(&paint.bold(plain(&segment.text).trim()));
        before = speaker;
    }
    text
}

fn samples_ms(samples: u64) -> u64 {
    samples * 1000 / u64::from(voxfleet_schema::SAMPLE_RATE_HZ)
}

/// Segments of several channels overlap.
fn range(segments: &[Segment]) -> Option<(u64, u64)> {
    Some((segments.first()?.start_ms, segments.iter().map(|s| s.end_ms).max()?))
}

/// The line of an earlier final as it reads now, or why it is not known who speaks in it.
pub(crate) fn of_revision(r: &Revision, paint: Paint) -> Option<String> {
    let (from, to) = range(&r.segments)?;
    let mut line = format!("{}  {}", paint.dim(&format!("{}-{}", clock(from), clock(to))), spoken(&r.segments, paint));
    let nobody = r.segments.iter().all(|segment| segment.speaker.is_none());
    if let Some(why) = r.speakers.as_ref().and_then(|speakers| speakers.why.as_deref()).filter(|_| nobody) {
        line.push_str(&paint.yellow(&format!("  [no speakers: {}]", plain(why))));
    }
    Some(line)
}

/// A final without text (silence, lost audio) has a line only when it says something.
pub(crate) fn of_final(f: &Final, paint: Paint, lag_ms: Option<u64>) -> Option<String> {
    let text = spoken(&f.segments, paint);
    let mut notes = Vec::new();
    if let Some(lost) = &f.lost {
        notes.push(format!("audio {} to {} was gone before anyone could transcribe it", lost.from_seq, lost.to_seq));
    }
    if let Some(error) = &f.error {
        notes.push(plain(&error.to_string()));
    }
    if f.end {
        notes.push("end".to_owned());
    }
    if text.is_empty() && notes.is_empty() {
        return None;
    }
    let range = range(&f.segments).unwrap_or_else(|| (samples_ms(f.from_sample), samples_ms(f.to_sample)));
    let mut line = format!(
        "{} {}  {}",
        paint.dim(&format!("{}-{}", clock(range.0), clock(range.1))),
        paint.cyan(f.gpu_id.as_str()),
        text
    );
    if let Some(lag) = lag_ms {
        line.push_str(&paint.dim(&format!("  +{:.1} s", lag as f64 / 1000.0)));
    }
    if !notes.is_empty() {
        line.push_str(&paint.yellow(&format!("  [{}]", notes.join("; "))));
    }
    Some(line)
}

pub(crate) fn of_partial(p: &Partial, paint: Paint) -> String {
    let gap = if p.committed.is_empty() || p.tentative.is_empty() { "" } else { " " };
    format!(
        "{} {}  {}{gap}{}{}",
        paint.dim(&format!("{}-{}", clock(samples_ms(p.from_sample)), clock(samples_ms(p.to_sample)))),
        paint.cyan(p.gpu_id.as_str()),
        plain(&p.committed).trim(),
        paint.dim(plain(&p.tentative).trim()),
        paint.dim(&format!("  lag {:.1} s", p.lag_ms as f64 / 1000.0))
    )
}

/// Each word with its start in seconds: `good 0.53 morning 0.68`.
pub(crate) fn of_words(segments: &[Segment], paint: Paint) -> Option<String> {
    let one =
        |w: &Word| format!("{} {}", plain(&w.text).trim(), paint.dim(&format!("{:.2}", w.start_ms as f64 / 1000.0)));
    let words: Vec<String> = segments.iter().flat_map(|s| &s.words).map(one).collect();
    (!words.is_empty()).then(|| words.join("  "))
}

pub(crate) fn of_event(e: &Event, paint: Paint) -> String {
    let mut text = format!("{} {}", e.what.as_str(), e.id);
    for (name, value) in
        [("gpu", e.gpu_id.clone()), ("epoch", e.epoch.map(|n| n.to_string())), ("seq", e.seq.map(|n| n.to_string()))]
    {
        if let Some(value) = value {
            text.push_str(&format!(" {name}={value}"));
        }
    }
    if let Some(error) = &e.error {
        text.push_str(&plain(&format!(" {error}")));
    } else if let Some(detail) = e.detail.as_str() {
        text.push_str(&plain(&format!(" {detail}")));
    }
    paint.yellow(&text)
}

#[cfg(test)]
mod tests {
    use super::super::view::tests::{a_final, a_partial, a_revision};
    use super::*;

    const PLAIN: Paint = Paint { colour: false };

    #[test]
    fn lines_say_when_who_and_what() {
        let f = a_final(3, 1, "cpu-h-0", "good morning");
        assert_eq!(of_final(&f, PLAIN, Some(640)).as_deref(), Some("00:03.0-00:03.9 cpu-h-0  good morning  +0.6 s"));
        assert_eq!(of_partial(&a_partial(None, 1, "g", 24_000), PLAIN), "00:00.0-00:01.5 g  good morning  lag 0.4 s");
        assert_eq!(of_words(&f.segments, PLAIN).as_deref(), Some("good morning 3.00"));
    }

    #[test]
    fn what_was_heard_does_not_steer_the_terminal() {
        let mut f = a_final(3, 1, "g", "good\u{1b}]0;pwn\u{7} mor\r\nning");
        f.segments[0].speaker = Some("S\u{1b}[31m1".to_owned());
        f.segments[0].words[0].text = "go\u{202e}od".to_owned();
        let p = Partial { tentative: "x\u{9b}2J".to_owned(), ..a_partial(None, 1, "g", 24_000) };
        let lines = [of_final(&f, PLAIN, None), Some(of_partial(&p, PLAIN)), of_words(&f.segments, PLAIN)];
        for line in lines.into_iter().flatten() {
            assert_eq!(line, crate::plain::plain(&line), "{line:?}");
        }
    }

    #[test]
    fn speakers_are_named_where_they_change() {
        let mut f = a_final(0, 1, "g", "good");
        let said = |text: &str, speaker: Option<&str>| Segment {
            text: text.to_owned(),
            speaker: speaker.map(str::to_owned),
            ..f.segments[0].clone()
        };
        f.segments = vec![said("good", Some("S1")), said("morning", Some("S1")), said("hello", Some("S2"))];
        assert_eq!(of_final(&f, PLAIN, None).as_deref(), Some("00:00.0-00:00.9 g  S1: good morning  S2: hello"));
        f.segments[2].speaker = None;
        assert_eq!(of_final(&f, PLAIN, None).as_deref(), Some("00:00.0-00:00.9 g  S1: good morning  hello"));
    }

    #[test]
    fn a_revision_is_its_final_as_it_reads_now() {
        let mut r = a_revision(3, 1, "good morning", "S2");
        assert_eq!(of_revision(&r, PLAIN).as_deref(), Some("00:03.0-00:03.9  S2: good morning"));
        r.segments[0].speaker = None;
        let why = serde_json::json!({"by": "none", "why": "its audio has expired"});
        r.speakers = Some(serde_json::from_value(why).expect("speakers"));
        let told = "00:03.0-00:03.9  good morning  [no speakers: its audio has expired]";
        assert_eq!(of_revision(&r, PLAIN).as_deref(), Some(told));
        r.segments.clear();
        assert_eq!(of_revision(&r, PLAIN), None);
    }

    #[test]
    fn silence_has_no_line_and_an_end_has_one() {
        let mut f = a_final(0, 1, "g", "x");
        f.segments.clear();
        assert_eq!(of_final(&f, PLAIN, None), None);
        f.end = true;
        assert_eq!(of_final(&f, PLAIN, None).as_deref(), Some("00:00.0-00:01.0 g    [end]"));
    }

    #[test]
    fn colours_only_where_wanted() {
        let f = a_final(0, 1, "g", "x");
        assert!(of_final(&f, Paint { colour: true }, None).is_some_and(|l| l.contains('\x1b')));
        assert!(of_final(&f, PLAIN, None).is_some_and(|l| !l.contains('\x1b')));
        assert_eq!(clock(3_723_456), "1:02:03.4");
    }
}
