//! What is done to two texts before they are compared. A figure says little without the name of its normalisation.

use std::{fmt, str::FromStr};

use crate::{
    align::{Edits, edits},
    english,
};

/// Named ways to make texts comparable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Normalise {
    /// Split at white space, nothing else: what jiwer does when it is told nothing.
    None,
    /// Lower case; everything but letters, digits and the apostrophe inside a word is dropped.
    #[default]
    Basic,
    /// As `basic`, with hyphens as spaces; besides, spoken numbers become figures, short forms are written out, hesitations
    /// and remarks in brackets are dropped. In the spirit of the normaliser that Whisper is scored with, not equal to it.
    English,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("no normalisation is called {0:?}; there are none, basic, english")]
pub struct UnknownName(pub String);

impl Normalise {
    pub const ALL: [Self; 3] = [Self::None, Self::Basic, Self::English];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Basic => "basic",
            Self::English => "english",
        }
    }

    pub fn words(self, text: &str) -> Vec<String> {
        match self {
            Self::None => text.split_whitespace().map(str::to_owned).collect(),
            Self::Basic => text.split_whitespace().map(bare).filter(|word| !word.is_empty()).collect(),
            Self::English => english::words(text),
        }
    }

    /// The same words letter by letter, with one space between them: the space counts, as it does in jiwer.
    pub fn characters(self, text: &str) -> Vec<char> {
        self.words(text).join(" ").chars().collect()
    }
}

impl fmt::Display for Normalise {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Normalise {
    type Err = UnknownName;

    fn from_str(name: &str) -> Result<Self, UnknownName> {
        Self::ALL.into_iter().find(|one| one.as_str() == name).ok_or_else(|| UnknownName(name.to_owned()))
    }
}

/// Word errors with [`Normalise::Basic`]: what the demo, the benches and `voxfleet eval wer` say unless told otherwise.
pub fn compare(reference: &str, heard: &str) -> Edits {
    edits(&Normalise::Basic.words(reference), &Normalise::Basic.words(heard))
}

/// Lower case, letters and digits only; an apostrophe inside stays: "don't" is one word.
pub(crate) fn bare(word: &str) -> String {
    let kept: String = word
        .chars()
        .map(|c| if c == '\u{2019}' { '\'' } else { c })
        .filter(|c| c.is_alphanumeric() || *c == '\'')
        .flat_map(char::to_lowercase)
        .collect();
    kept.trim_matches('\'').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn case_and_punctuation_do_not_count() {
        let basic = |text| Normalise::Basic.words(text).join(" ");
        assert_eq!(basic("Good morning, this is  Lucy."), "good morning this is lucy");
        assert_eq!(basic("Don't -- 'stop' 3.5! isn\u{2019}t ÄRGER"), "don't stop 35 isn't ärger");
        assert_eq!(compare("Good morning, Lucy.", "good  morning lucie").substituted, 1);
        assert_eq!(Normalise::None.words(" Good\tmorning, "), ["Good", "morning,"]);
    }

    #[test]
    fn spaces_are_characters() {
        assert_eq!(Normalise::Basic.characters("A  b.").iter().collect::<String>(), "a b");
    }

    #[test]
    fn names_go_both_ways() {
        for one in Normalise::ALL {
            assert_eq!(one.to_string().parse(), Ok(one));
        }
        assert_eq!("Whisper".parse::<Normalise>(), Err(UnknownName("Whisper".to_owned())));
    }
}
