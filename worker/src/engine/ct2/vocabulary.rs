//! The tokens of a CTranslate2 Whisper folder, and how a prompt becomes tokens.
//!
//! Prompts are cut as whisper.cpp cuts them: into words, and those into the longest tokens there are. A model's own tokenizer
//! would cut a rare word otherwise now and then; both engines then see the same prompt.

use std::{collections::HashMap, fs, path::Path};

use voxfleet_ggml::vocabulary::{Specials, bytes_of};

use crate::engine::EngineError;

/// Of vocabulary files; Whisper's have one.
const MOST_BYTES: u64 = 16 << 20;

/// Tokens by number and by their bytes.
pub struct Vocabulary {
    pub specials: Specials,
    /// As CTranslate2 writes them.
    written: Vec<String>,
    bytes: Vec<Vec<u8>>,
    numbers: HashMap<Vec<u8>, u32>,
    longest: usize,
}

impl Vocabulary {
    /// `vocabulary.json`, or `vocabulary.txt` as older converters wrote it.
    pub fn read(name: &str, dir: &Path) -> Result<Self, EngineError> {
        let failed = |why: String| EngineError::Model { name: name.to_owned(), why };
        let json = dir.join("vocabulary.json");
        let file = if json.is_file() { json } else { dir.join("vocabulary.txt") };
        let says = |why: &dyn std::fmt::Display| failed(format!("{}: {why}", file.display()));
        let size = fs::metadata(&file).map_err(|e| says(&e))?.len();
        if size > MOST_BYTES {
            return Err(says(&format!("{size} bytes are more than a vocabulary has")));
        }
        let text = fs::read_to_string(&file).map_err(|e| says(&e))?;
        let written = match file.extension() {
            Some(extension) if extension == "txt" => text.lines().map(str::to_owned).collect(),
            _ => serde_json::from_str(&text).map_err(|e| says(&e))?,
        };
        Self::of(written).map_err(|why| says(&why))
    }

    fn of(written: Vec<String>) -> Result<Self, String> {
        let size = u32::try_from(written.len()).unwrap_or(u32::MAX);
        let specials = Specials::of(size).ok_or_else(|| format!("{size} tokens are none of Whisper's vocabularies"))?;
        if written[specials.end_of_text as usize] != "<|endoftext|>" {
            return Err(format!("token {} is not the end of text", specials.end_of_text));
        }
        let bytes: Vec<Vec<u8>> = written.iter().map(|token| bytes_of(token).unwrap_or_default()).collect();
        let mut numbers = HashMap::new();
        for (number, bytes) in (0u32..specials.end_of_text).zip(&bytes).filter(|(_, bytes)| !bytes.is_empty()) {
            // CTranslate2 takes the first of equal ones.
            numbers.entry(bytes.clone()).or_insert(number);
        }
        let longest = numbers.keys().map(Vec::len).max().unwrap_or(0);
        Ok(Self { specials, written, bytes, numbers, longest })
    }

    pub fn is_multilingual(&self) -> bool {
        self.specials.end_of_text == 50_257
    }

    /// A token as CTranslate2 writes it; nothing for numbers it does not have.
    pub fn written(&self, token: u32) -> &str {
        self.written.get(token as usize).map_or("", String::as_str)
    }

    /// The bytes of a text token; none for special ones.
    pub fn bytes(&self, token: u32) -> &[u8] {
        if token < self.specials.end_of_text { self.bytes.get(token as usize).map_or(&[], Vec::as_slice) } else { &[] }
    }

    /// The tokens of a text, the longest first.
    pub fn tokens(&self, text: &str) -> Vec<u32> {
        words(text).into_iter().flat_map(|word| self.word(word.as_bytes())).collect()
    }

    fn word(&self, mut left: &[u8]) -> Vec<u32> {
        let mut tokens = Vec::new();
        while !left.is_empty() {
            let found = (1..=left.len().min(self.longest))
                .rev()
                .find_map(|len| self.numbers.get(&left[..len]).map(|token| (*token, len)));
            let taken = found.map_or(1, |(token, len)| {
                tokens.push(token);
                len
            });
            left = &left[taken..];
        }
        tokens
    }
}

/// Letters, digits and signs apart, each with the blank before it; English endings like `'ll` by themselves. As whisper.cpp
/// has it, letters are those of ASCII: bytes beyond count as signs.
fn words(text: &str) -> Vec<&str> {
    const ENDINGS: [&str; 7] = ["'s", "'t", "'re", "'ve", "'m", "'ll", "'d"];
    #[derive(PartialEq, Clone, Copy)]
    enum Kind {
        Letter,
        Digit,
        Sign,
        Blank,
    }
    let kind = |c: char| match c {
        c if c.is_ascii_alphabetic() => Kind::Letter,
        c if c.is_ascii_digit() => Kind::Digit,
        c if c.is_ascii_whitespace() || c == '\x0b' => Kind::Blank,
        _ => Kind::Sign,
    };
    let run = |text: &str, of: Kind| text.find(|c| kind(c) != of).unwrap_or(text.len());
    let mut words = Vec::new();
    let mut left = text;
    while let Some(first) = left.chars().next() {
        let ending = ENDINGS.iter().find(|ending| left.starts_with(**ending)).map(|ending| ending.len());
        let after_blank = left.strip_prefix(' ').and_then(|rest| rest.chars().next()).map(kind);
        let len = match (ending, kind(first), after_blank) {
            (Some(len), ..) => len,
            (None, Kind::Blank, Some(of)) if of != Kind::Blank => 1 + run(&left[1..], of),
            (None, Kind::Blank, _) => {
                let blanks = run(left, Kind::Blank);
                // The last of several blanks belongs to the word behind them.
                if blanks > 1 && blanks < left.len() { blanks - 1 } else { blanks }
            }
            (None, of, _) => run(left, of),
        };
        words.push(&left[..len]);
        left = &left[len..];
    }
    words
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use voxfleet_ggml::folder::{Precision, convert};
    use whisper_rs::{WhisperContext, WhisperContextParameters};

    use super::*;

    fn micro() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/models/micro.en-q8_0.bin")
    }

    #[test]
    fn prompts_become_the_tokens_that_whisper_cpp_makes_of_them() {
        let folder = tempfile::tempdir().expect("folder");
        let dir = folder.path().join("micro");
        convert(&micro(), &dir, Precision::Int8Float16, &mut |_, _| true).expect("converted");
        let ours = Vocabulary::read("micro.en", &dir).expect("vocabulary");
        assert!(!ours.is_multilingual());
        let theirs = WhisperContext::new_with_params(micro(), WhisperContextParameters::default()).expect("model");
        for text in [
            "",
            " hello this is anna calling about my order",
            " Voxfleet GmbH, order no. 4711-B (urgent!)  I'll call at 9:30.",
            " we're  they've it's   ",
            " tab\tand\nline",
            " 100% sure, don't panic... [music] <<quoted>>",
        ] {
            let expected = theirs.tokenize(text, text.len() + 2).expect("tokens");
            let tokens = ours.tokens(text);
            assert_eq!(tokens.iter().map(|t| *t as i32).collect::<Vec<_>>(), expected, "{text:?}");
            let back: Vec<u8> = tokens.iter().flat_map(|t| ours.bytes(*t).to_vec()).collect();
            assert_eq!(String::from_utf8_lossy(&back), text);
        }
        assert!(ours.bytes(50_363).is_empty() && ours.bytes(99_999).is_empty());
        assert_eq!((ours.written(50_257), ours.written(99_999)), ("<|startoftranscript|>", ""));
    }

    #[test]
    fn a_vocabulary_of_lines_is_the_same() {
        let folder = tempfile::tempdir().expect("folder");
        let dir = folder.path().join("micro");
        convert(&micro(), &dir, Precision::Int8Float16, &mut |_, _| true).expect("converted");
        let listed = Vocabulary::read("micro.en", &dir).expect("vocabulary");
        fs::write(dir.join("vocabulary.txt"), listed.written.join("\n") + "\n").expect("written");
        fs::remove_file(dir.join("vocabulary.json")).expect("removed");
        assert_eq!(Vocabulary::read("micro.en", &dir).expect("vocabulary").written, listed.written);
    }

    #[test]
    fn folders_without_a_vocabulary_are_typed() {
        let folder = tempfile::tempdir().expect("folder");
        let why = |text: &str| {
            fs::write(folder.path().join("vocabulary.json"), text).expect("write");
            match Vocabulary::read("m", folder.path()) {
                Err(EngineError::Model { name, why }) if name == "m" => why,
                Err(other) => panic!("{other:?}"),
                Ok(_) => panic!("taken"),
            }
        };
        assert!(why("[\"a\"]").contains("1 tokens"));
        assert!(why("{}").contains("vocabulary.json"));
        assert!(why(&serde_json::to_string(&vec!["a"; 51_864]).expect("json")).contains("end of text"));
        fs::remove_file(folder.path().join("vocabulary.json")).expect("remove");
        assert!(matches!(Vocabulary::read("m", folder.path()), Err(EngineError::Model { .. })));
        fs::write(folder.path().join("vocabulary.txt"), "a\nb").expect("write");
        assert!(matches!(Vocabulary::read("m", folder.path()), Err(EngineError::Model { .. })));
    }
}
