//! Tokens, special tokens and languages of a Whisper vocabulary; pure.
//!
//! A ggml file keeps the bytes of the text tokens and leaves the special ones out; CTranslate2 wants a string for each,
//! with the bytes of text tokens written as GPT-2 does: printable bytes stand for themselves, the others for characters
//! from U+0100 on.

/// Whisper's languages, in the order of their tokens.
pub const LANGUAGES: [&str; 100] = [
    "en", "zh", "de", "es", "ru", "ko", "fr", "ja", "pt", "tr", "pl", "ca", "nl", "ar", "sv", "it", "id", "hi", "fi",
    "vi", "he", "uk", "el", "ms", "cs", "ro", "da", "hu", "ta", "no", "th", "ur", "hr", "bg", "lt", "la", "mi", "ml",
    "cy", "sk", "te", "fa", "lv", "bn", "sr", "az", "sl", "kn", "et", "mk", "br", "eu", "is", "hy", "ne", "mn", "bs",
    "kk", "sq", "sw", "gl", "mr", "pa", "si", "km", "sn", "yo", "so", "af", "oc", "ka", "be", "tg", "sd", "gu", "am",
    "yi", "lo", "uz", "fo", "ht", "ps", "tk", "nn", "mt", "sa", "lb", "my", "bo", "tl", "mg", "as", "tt", "haw", "ln",
    "ha", "ba", "jw", "su", "yue",
];

/// Timestamps are this many hundredths of a second apart.
pub const HUNDREDTHS_PER_TIMESTAMP: u32 = 2;

/// What Whisper never says by itself: punctuation of captions and notes of music (OpenAI's list, as whisper.cpp has it).
const NON_SPEECH: [&str; 48] = [
    "\"",
    "#",
    "(",
    ")",
    "*",
    "+",
    "/",
    ":",
    ";",
    "<",
    "=",
    ">",
    "@",
    "[",
    "\\",
    "]",
    "^",
    "_",
    "`",
    "{",
    "|",
    "}",
    "~",
    "「",
    "」",
    "『",
    "』",
    "<<",
    ">>",
    "<<<",
    ">>>",
    "--",
    "---",
    "-(",
    "-[",
    "('",
    "(\"",
    "((",
    "))",
    "(((",
    ")))",
    "[[",
    "]]",
    "{{",
    "}}",
    "♪♪",
    "♪♪♪",
    " -",
];
/// Of these already the first token is held back.
const NOTES: [&str; 7] = ["♩", "♪", "♫", "♬", "♭", "♮", "♯"];

/// Numbers of the special tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Specials {
    pub end_of_text: u32,
    pub start: u32,
    pub first_language: u32,
    pub languages: u32,
    pub translate: u32,
    pub transcribe: u32,
    pub start_of_lm: u32,
    pub previous: u32,
    pub no_speech: u32,
    pub no_timestamps: u32,
    pub first_timestamp: u32,
    /// Of the whole vocabulary.
    pub size: u32,
}

impl Specials {
    /// Of a vocabulary of this size; None where Whisper has no such.
    pub fn of(size: u32) -> Option<Self> {
        let (end_of_text, languages) = match size {
            51_864 => (50_256, 99),
            51_865 | 51_866 => (50_257, size - 51_766),
            _ => return None,
        };
        let start = end_of_text + 1;
        let translate = start + 1 + languages;
        Some(Self {
            end_of_text,
            start,
            first_language: start + 1,
            languages,
            translate,
            transcribe: translate + 1,
            start_of_lm: translate + 2,
            previous: translate + 3,
            no_speech: translate + 4,
            no_timestamps: translate + 5,
            first_timestamp: translate + 6,
            size,
        })
    }

    /// The token of a language this vocabulary has.
    pub fn language(&self, code: &str) -> Option<u32> {
        let place = LANGUAGES.iter().take(self.languages as usize).position(|l| *l == code)?;
        Some(self.first_language + u32::try_from(place).ok()?)
    }

    /// How a special token is written; None for text tokens and numbers beyond the vocabulary.
    pub fn name(&self, token: u32) -> Option<String> {
        let language = |n: u32| LANGUAGES.get(n as usize).map(|code| format!("<|{code}|>"));
        let word = match token {
            t if t < self.end_of_text || t >= self.size => return None,
            t if t == self.end_of_text => "endoftext",
            t if t == self.start => "startoftranscript",
            t if t < self.translate => return language(t - self.first_language),
            t if t == self.translate => "translate",
            t if t == self.transcribe => "transcribe",
            t if t == self.start_of_lm => "startoflm",
            t if t == self.previous => "startofprev",
            // Its name changed with large-v3.
            t if t == self.no_speech && self.languages == 100 => "nospeech",
            t if t == self.no_speech => "nocaptions",
            t if t == self.no_timestamps => "notimestamps",
            t => {
                let hundredths = (t - self.first_timestamp) * HUNDREDTHS_PER_TIMESTAMP;
                return Some(format!("<|{}.{:02}|>", hundredths / 100, hundredths % 100));
            }
        };
        Some(format!("<|{word}|>"))
    }

    /// All language tokens.
    pub fn language_tokens(&self) -> std::ops::Range<u32> {
        self.first_language..self.first_language + self.languages
    }

    /// Special tokens that no decode may give: all but languages, the end and timestamps.
    pub fn never_said(&self) -> [u32; 6] {
        [self.start, self.translate, self.transcribe, self.start_of_lm, self.previous, self.no_speech]
    }
}

/// Every token as CTranslate2 wants it. The error says what a file's vocabulary lacks.
pub fn tokens(vocabulary: &[Vec<u8>], specials: &Specials) -> Result<Vec<String>, String> {
    let text = vocabulary
        .get(..specials.end_of_text as usize)
        .ok_or_else(|| format!("its vocabulary has {} of {} text tokens", vocabulary.len(), specials.end_of_text))?;
    let named = (specials.end_of_text..specials.size).filter_map(|token| specials.name(token));
    Ok(text.iter().map(|bytes| written(bytes)).chain(named).collect())
}

/// Tokens to be held back wherever they come, in order.
pub fn suppressed(vocabulary: &[Vec<u8>], specials: &Specials) -> Vec<u32> {
    let number_of = |text: &[u8]| vocabulary.iter().position(|token| token == text);
    let first_of = |text: &[u8]| (1..=text.len()).rev().find_map(|len| number_of(&text[..len]));
    let both = |symbol: &str| [symbol.to_owned(), format!(" {symbol}")];
    let whole = NON_SPEECH.iter().flat_map(|s| both(s)).filter_map(|s| number_of(s.as_bytes()));
    let notes = NOTES.iter().flat_map(|s| both(s)).filter_map(|s| first_of(s.as_bytes()));
    let apostrophe = number_of(b" '");
    let mut held: Vec<u32> = whole.chain(notes).chain(apostrophe).filter_map(|n| u32::try_from(n).ok()).collect();
    held.extend(specials.never_said());
    held.sort_unstable();
    held.dedup();
    held
}

/// Tokens to be held back at the beginning: a blank, and the end.
pub fn suppressed_at_first(vocabulary: &[Vec<u8>], specials: &Specials) -> Vec<u32> {
    let blank = vocabulary.iter().position(|token| token == b" ").and_then(|n| u32::try_from(n).ok());
    blank.into_iter().chain([specials.end_of_text]).collect()
}

/// Whether a byte stands for itself.
fn is_printable(byte: u8) -> bool {
    matches!(byte, 33..=126 | 161..=172 | 174..=255)
}

/// The character of a byte.
fn character(byte: u8) -> char {
    if is_printable(byte) {
        return char::from(byte);
    }
    let place = (0..byte).filter(|b| !is_printable(*b)).count();
    // At most 68 bytes are not printable, and U+0100 to U+0143 are characters.
    u32::try_from(place).ok().and_then(|n| char::from_u32(0x100 + n)).unwrap_or(char::REPLACEMENT_CHARACTER)
}

/// A text token's bytes as CTranslate2 writes them.
pub fn written(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| character(*byte)).collect()
}

/// The bytes of a text token; None where a character stands for none, as in special tokens it may.
pub fn bytes_of(token: &str) -> Option<Vec<u8>> {
    let others = || (0..=u8::MAX).filter(|b| !is_printable(*b));
    token
        .chars()
        .map(|c| match u32::from(c) {
            n @ 0..=0xff => u8::try_from(n).ok().filter(|b| is_printable(*b)),
            n => others().nth(n.checked_sub(0x100)? as usize),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn special_tokens_stand_where_whisper_has_them() {
        let english = Specials::of(51_864).expect("english");
        assert_eq!((english.end_of_text, english.translate, english.no_timestamps), (50_256, 50_357, 50_362));
        let many = Specials::of(51_865).expect("multilingual");
        assert_eq!(
            (many.start, many.transcribe, many.no_speech, many.first_timestamp),
            (50_258, 50_359, 50_362, 50_364)
        );
        let third = Specials::of(51_866).expect("large-v3");
        assert_eq!((third.languages, third.language("yue"), third.first_timestamp), (100, Some(50_358), 50_365));
        assert_eq!((many.language("yue"), many.language("de"), many.language("xx")), (None, Some(50_261), None));
        assert_eq!(Specials::of(51_900), None);
        for specials in [english, many, third] {
            // 1501 timestamps close each vocabulary.
            assert_eq!(specials.size - specials.first_timestamp, 1_501);
            let name = |token| specials.name(token).expect("special");
            assert_eq!(name(specials.first_timestamp + 1_500), "<|30.00|>");
            assert_eq!(name(specials.first_timestamp + 7), "<|0.14|>");
            assert_eq!(name(specials.first_language), "<|en|>");
            assert_eq!((specials.name(0), specials.name(specials.size)), (None, None));
        }
        assert_eq!(third.name(third.no_speech).as_deref(), Some("<|nospeech|>"));
        assert_eq!(many.name(many.no_speech).as_deref(), Some("<|nocaptions|>"));
    }

    #[test]
    fn bytes_are_written_as_gpt_2_writes_them() {
        assert_eq!(written(b" good"), "\u{120}good");
        assert_eq!(written(b"\n\t"), "\u{10a}\u{109}");
        assert_eq!(written("é".as_bytes()), "Ã©");
        assert_eq!(bytes_of("\u{120}good").as_deref(), Some(&b" good"[..]));
        assert_eq!((bytes_of("東"), bytes_of(" "), bytes_of("")), (None, None, Some(Vec::new())));
    }

    #[test]
    fn a_short_vocabulary_is_refused() {
        let specials = Specials::of(51_864).expect("english");
        let why = tokens(&vec![b"a".to_vec(); 50_255], &specials).expect_err("one is missing");
        assert!(why.contains("50255 of 50256"), "{why}");
        let all = tokens(&vec![b"a".to_vec(); 50_256], &specials).expect("all");
        assert_eq!((all.len(), all[50_256].as_str()), (51_864, "<|endoftext|>"));
    }

    #[test]
    fn captions_are_held_back() {
        let words: [&[u8]; 9] =
            [b"a", b"(", b" (", b" '", b"'", b" -", b"-", b" ", "\u{266a}".as_bytes().split_at(2).0];
        let vocabulary: Vec<Vec<u8>> = words.iter().map(|w| w.to_vec()).collect();
        let specials = Specials::of(51_864).expect("english");
        let held = suppressed(&vocabulary, &specials);
        assert_eq!(held, [1, 2, 3, 5, 7, 8, 50_257, 50_357, 50_358, 50_359, 50_360, 50_361]);
        assert_eq!(suppressed_at_first(&vocabulary, &specials), [7, 50_256]);
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back(bytes in proptest::collection::vec(any::<u8>(), 0..40)) {
            prop_assert_eq!(bytes_of(&written(&bytes)), Some(bytes));
        }
    }
}
