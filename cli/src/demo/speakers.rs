//! Who said which word of a call: what is known, and what was shown.

use std::{fs, path::Path};

use anyhow::Context as _;
use serde_json::{Value, json};
use voxfleet_eval::wder::{Spoken, score};
use voxfleet_nats::{Nats, transcript::Chain};
use voxfleet_schema::{
    id::{Kind, StreamId},
    job::{JobResult, ResultSegment},
    transcript::Final,
};

/// The words of a call of ours with who says them, turn after turn; `path` is the description beside its audio.
pub(crate) fn reference(path: &Path) -> anyhow::Result<Vec<Spoken>> {
    let text = fs::read(path).with_context(|| path.display().to_string())?;
    let described: Value = serde_json::from_slice(&text).with_context(|| path.display().to_string())?;
    let mut spoken = Vec::new();
    for turn in described["turns"].as_array().context("a call has turns")? {
        let speaker = turn["speaker"].as_str().map(str::to_owned);
        for word in turn["words"].as_array().context("a turn has words")? {
            let word = word["word"].as_str().context("a word has letters")?.to_owned();
            spoken.push(Spoken { word, speaker: speaker.clone() });
        }
    }
    Ok(spoken)
}

/// Words under their speakers, of a live session or of a recording.
#[derive(Debug, PartialEq)]
pub(crate) struct Told {
    words: Vec<Spoken>,
}

impl Told {
    pub(crate) fn of_finals(finals: &[Final]) -> Self {
        let words = finals.iter().flat_map(|f| &f.segments).flat_map(|s| &s.words);
        Self { words: words.map(|w| Spoken { word: w.text.clone(), speaker: w.speaker.clone() }).collect() }
    }

    pub(crate) fn of_result(result: &JobResult) -> Self {
        let words = result.aligned_segments.iter().flat_map(|s| &s.words);
        Self { words: words.map(|w| Spoken { word: w.word.clone(), speaker: w.speaker.clone() }).collect() }
    }

    /// Names in the order in which they speak.
    pub(crate) fn names(&self) -> Vec<&str> {
        let mut names: Vec<&str> = Vec::new();
        for name in self.words.iter().filter_map(|word| word.speaker.as_deref()) {
            if !names.contains(&name) {
                names.push(name);
            }
        }
        names
    }

    /// Words under the wrong name, and words that could be compared.
    fn wrong(&self, reference: &[Spoken]) -> (usize, usize) {
        let score = score(reference, &self.words);
        (score.wrong, score.pairs)
    }

    pub(crate) fn object(&self, reference: &[Spoken]) -> Value {
        let (wrong, words) = self.wrong(reference);
        json!({ "wder": wrong as f64 / words.max(1) as f64, "wrong": wrong, "words": words, "names": self.names() })
    }

    pub(crate) fn line(&self, reference: &[Spoken]) -> String {
        let (wrong, words) = self.wrong(reference);
        let names = self.names();
        match names.is_empty() {
            true => "nobody could be told apart".to_owned(),
            false => format!("{}: {wrong} of {words} words under the wrong name", names.join(", ")),
        }
    }
}

/// The finals of a session with their highest revisions in their places.
pub(crate) async fn revised(nats: &Nats, id: &StreamId, finals: &[Final]) -> anyhow::Result<Vec<Final>> {
    let (chain, mut from) = (Chain::new(nats), 0);
    let mut finals = finals.to_vec();
    while let Some((seq, revision)) = chain.next_revision(Kind::Session, id, from).await? {
        from = seq + 1;
        if let Some(revised) = finals.iter_mut().find(|f| f.index == revision.index) {
            (revised.segments, revised.turns) = (revision.segments, revision.turns);
        }
    }
    Ok(finals)
}

/// A turn a line: `agent: good morning ...`.
pub(crate) fn lines(segments: &[ResultSegment]) -> Vec<String> {
    let mut lines: Vec<(String, String)> = Vec::new();
    for segment in segments.iter().filter(|segment| !segment.text.trim().is_empty()) {
        let name = segment.speaker.clone().unwrap_or_default();
        match lines.last_mut().filter(|(last, _)| *last == name) {
            Some((_, text)) => *text = format!("{text} {}", segment.text.trim()),
            None => lines.push((name, segment.text.trim().to_owned())),
        }
    }
    lines.into_iter().map(|(name, text)| format!("{name}: {text}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spoken(words: &[(&str, Option<&str>)]) -> Vec<Spoken> {
        let one =
            |(word, name): &(&str, Option<&str>)| Spoken { word: (*word).to_owned(), speaker: name.map(str::to_owned) };
        words.iter().map(one).collect()
    }

    #[test]
    fn labels_are_compared_by_whoever_is_meant() {
        let reference = spoken(&[("good", Some("agent")), ("morning", Some("agent")), ("hello", Some("customer"))]);
        let told = Told { words: spoken(&[("good", Some("S1")), ("morning", Some("S2")), ("hello", Some("S2"))]) };
        assert_eq!(told.names(), ["S1", "S2"]);
        assert_eq!(told.line(&reference), "S1, S2: 1 of 3 words under the wrong name");
        let nobody = Told { words: spoken(&[("good", None)]) };
        assert_eq!(nobody.line(&reference), "nobody could be told apart");
        assert_eq!(nobody.object(&reference)["wder"], 1.0);
    }
}
