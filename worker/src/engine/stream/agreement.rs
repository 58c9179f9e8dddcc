//! LocalAgreement-2: what two passes over a growing window agree on is committed and never taken back before the final.
//!
//! After D. Macháček, R. Dabre, O. Bojar, "Turning Whisper into Real-Time Transcription System" (2023), and the policy's
//! first description by Liu, Niehues and Spanakis (2020).
//!
//! Where channels are split, passes over each utterance agree among themselves. Words are committed in the order in which
//! they are agreed on, whoever said them, so that what is committed only ever grows; what is tentative stands in the order
//! in which its utterances began.

use std::collections::BTreeMap;

/// The growing hypothesis of one stretch.
#[derive(Debug, Default)]
pub(super) struct Agreement {
    committed: Vec<String>,
    /// By where they begin and their channel.
    utterances: BTreeMap<(u64, usize), Hypothesis>,
}

#[derive(Debug, Default)]
struct Hypothesis {
    committed: Vec<String>,
    last: Vec<String>,
}

impl Hypothesis {
    /// Takes the next pass; returns what it commits.
    fn hear(&mut self, words: Vec<String>) -> Vec<String> {
        let before = self.committed.len();
        if words.starts_with(&self.committed) {
            let agreed = words.iter().zip(&self.last).take_while(|(a, b)| a == b).count();
            if agreed > before {
                self.committed = words[..agreed].to_vec();
            }
        }
        self.last = words;
        self.committed[before..].to_vec()
    }

    fn tentative(&self) -> &[String] {
        self.last.get(self.committed.len()..).unwrap_or_default()
    }
}

impl Agreement {
    /// Takes the next pass over the utterance of `channel` that begins at `start`; returns committed and tentative text.
    pub(super) fn hear(&mut self, start: u64, channel: usize, text: &str) -> (String, String) {
        let words: Vec<String> = text.split_whitespace().map(str::to_owned).collect();
        let agreed = self.utterances.entry((start, channel)).or_default().hear(words);
        self.committed.extend(agreed);
        let tentative: Vec<&str> = self.utterances.values().flat_map(|u| u.tentative()).map(String::as_str).collect();
        (self.committed.join(" "), tentative.join(" "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_passes_commit_and_nothing_takes_it_back() {
        let mut agreement = Agreement::default();
        let cases = [
            ("hello", "", "hello"),
            ("hello my name", "hello", "my name"),
            ("hello my game is", "hello my", "game is"),
            ("hollow my game is anna", "hello my", "game is anna"),
            ("hello my game is anna", "hello my", "game is anna"),
            ("hello my game is anna", "hello my game is anna", ""),
            ("hello", "hello my game is anna", ""),
            ("", "hello my game is anna", ""),
        ];
        for (text, committed, tentative) in cases {
            assert_eq!(agreement.hear(0, 0, text), (committed.to_owned(), tentative.to_owned()), "after {text:?}");
        }
    }

    #[test]
    fn channels_agree_by_themselves_and_what_is_committed_only_grows() {
        let mut agreement = Agreement::default();
        let cases = [
            (100, 1, "good morning", "", "good morning"),
            (900, 0, "yes", "", "good morning yes"),
            (100, 1, "good morning this", "good morning", "this yes"),
            (900, 0, "yes my name", "good morning yes", "this my name"),
            (100, 1, "good morning this is lucy", "good morning yes this", "is lucy my name"),
            (2_000, 0, "and", "good morning yes this", "is lucy my name and"),
        ];
        for (start, channel, text, committed, tentative) in cases {
            let heard = agreement.hear(start, channel, text);
            assert_eq!(heard, (committed.to_owned(), tentative.to_owned()), "after {text:?} of channel {channel}");
        }
    }
}
