//! LocalAgreement-2: what two passes over a growing window agree on is committed and never taken back before the final.
//!
//! After D. Macháček, R. Dabre, O. Bojar, "Turning Whisper into Real-Time Transcription System" (2023), and the policy's
//! first description by Liu, Niehues and Spanakis (2020).

/// The growing hypothesis of one window.
#[derive(Debug, Default)]
pub(super) struct Agreement {
    committed: Vec<String>,
    last: Vec<String>,
}

impl Agreement {
    /// Takes the next pass; returns committed and tentative text.
    pub(super) fn hear(&mut self, text: &str) -> (String, String) {
        let words: Vec<String> = text.split_whitespace().map(str::to_owned).collect();
        if words.starts_with(&self.committed) {
            let agreed = words.iter().zip(&self.last).take_while(|(a, b)| a == b).count();
            if agreed > self.committed.len() {
                self.committed = words[..agreed].to_vec();
            }
        }
        let tentative = words.get(self.committed.len()..).unwrap_or_default().join(" ");
        self.last = words;
        (self.committed.join(" "), tentative)
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
            assert_eq!(agreement.hear(text), (committed.to_owned(), tentative.to_owned()), "after {text:?}");
        }
    }
}
