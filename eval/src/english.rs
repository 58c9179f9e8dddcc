//! English made comparable: what two people would write differently who heard the same. Used through
//! [`crate::text::Normalise::English`]. The rules, in their order:
//!
//! 1. remarks in brackets (`[laughs]`, `<unk>`) are dropped; `$5` is `5 dollars`, `5%` is `5 percent`, `&` is `and`;
//! 2. hyphens, slashes and the colon of a clock are spaces; a comma inside a number goes, its point stays;
//! 3. lower case, no other punctuation;
//! 4. hesitations (`uh`, `um`, `hmm`, ...) are dropped; short forms are written out (`won't`, `we're`, `it's`, `gonna`);
//! 5. spoken numbers become figures (`one hundred and five` is `105`, `twenty first` is `21st`), and neighbouring
//!    figures one (`six seven eight` is `678`, as a number read out digit by digit).

use crate::text::bare;

const HESITATIONS: [&str; 10] = ["uh", "uhh", "um", "umm", "hm", "hmm", "mm", "mmm", "mhm", "erm"];

/// Whole words that are written out.
const FORMS: [(&str, &str); 18] = [
    ("won't", "will not"),
    ("can't", "can not"),
    ("cannot", "can not"),
    ("shan't", "shall not"),
    ("ain't", "is not"),
    ("let's", "let us"),
    ("gonna", "going to"),
    ("wanna", "want to"),
    ("gotta", "got to"),
    ("gimme", "give me"),
    ("lemme", "let me"),
    ("okay", "ok"),
    ("mr", "mister"),
    ("mrs", "missus"),
    ("dr", "doctor"),
    ("prof", "professor"),
    ("vs", "versus"),
    ("etc", "et cetera"),
];

/// Endings that are written out.
const ENDINGS: [(&str, &str); 6] =
    [("n't", "not"), ("'re", "are"), ("'ve", "have"), ("'ll", "will"), ("'m", "am"), ("'d", "would")];

/// Before which `'s` is `is`; behind other words it may be a genitive and stays.
const IS: [&str; 13] =
    ["it", "that", "what", "there", "he", "she", "here", "who", "where", "how", "when", "this", "everything"];

pub(crate) fn words(text: &str) -> Vec<String> {
    let plain = signs(&without_brackets(text));
    let mut words = Vec::new();
    for token in plain.split_whitespace() {
        let word = if is_figure(token) { token.trim_end_matches('.').to_owned() } else { bare(token) };
        if !word.is_empty() && !HESITATIONS.contains(&word.as_str()) {
            written_out(&word, &mut words);
        }
    }
    joined(figures(&words))
}

/// An opening bracket without its end is a sign like any other.
fn without_brackets(text: &str) -> String {
    let mut rest = text;
    let mut kept = String::new();
    while let Some(from) = rest.find(['[', '<', '(']) {
        let end = match rest.as_bytes()[from] {
            b'[' => ']',
            b'<' => '>',
            _ => ')',
        };
        kept.push_str(&rest[..from]);
        kept.push(' ');
        rest = match rest[from..].find(end) {
            Some(length) => &rest[from + length + 1..],
            None => &rest[from + 1..],
        };
    }
    kept + rest
}

/// Signs that stand for words or for spaces.
fn signs(text: &str) -> String {
    let all: Vec<char> = text.chars().collect();
    let digit = |at: Option<usize>| at.and_then(|at| all.get(at)).is_some_and(char::is_ascii_digit);
    let mut plain = String::new();
    // A sign of money is spoken behind its number.
    let mut money: Option<&str> = None;
    for (at, c) in all.iter().enumerate() {
        let (before, after) = (digit(at.checked_sub(1)), digit(Some(at + 1)));
        let inside = c.is_ascii_digit() || (matches!(c, ',' | '.') && after);
        if before
            && !inside
            && let Some(name) = money.take()
        {
            plain.push_str(&format!(" {name} "));
        }
        match c {
            '$' if after => money = Some("dollars"),
            '€' if after => money = Some("euros"),
            '£' if after => money = Some("pounds"),
            '%' => plain.push_str(" percent "),
            '&' => plain.push_str(" and "),
            ',' if before && after => {}
            ',' | '-' | '\u{2010}'..='\u{2015}' | '/' | ':' | ';' | '_' => plain.push(' '),
            _ => plain.push(*c),
        }
    }
    match money {
        Some(name) => format!("{plain} {name}"),
        None => plain,
    }
}

fn is_figure(token: &str) -> bool {
    let token = token.trim_end_matches('.');
    !token.is_empty() && token.split('.').all(|part| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit()))
}

fn written_out(word: &str, words: &mut Vec<String>) {
    if let Some((_, long)) = FORMS.iter().find(|(short, _)| *short == word) {
        return words.extend(long.split(' ').map(str::to_owned));
    }
    for (ending, long) in ENDINGS {
        if let Some(stem) = word.strip_suffix(ending).filter(|stem| !stem.is_empty()) {
            return words.extend([stem.to_owned(), long.to_owned()]);
        }
    }
    match word.strip_suffix("'s") {
        Some(stem) if IS.contains(&stem) => words.extend([stem.to_owned(), "is".to_owned()]),
        _ => words.push(word.to_owned()),
    }
}

/// A figure, or any other word.
enum Part {
    Figure(String),
    Word(String),
}

fn figures(words: &[String]) -> Vec<Part> {
    let mut parts = Vec::new();
    let mut rest = words;
    while let Some(first) = rest.first() {
        let used = match number(rest) {
            Some(spoken) => {
                let part = match spoken.ordinal {
                    true => Part::Word(format!("{}{}", spoken.value, ending(spoken.value))),
                    false => Part::Figure(spoken.value.to_string()),
                };
                parts.push(part);
                spoken.words
            }
            None => {
                parts.push(if is_figure(first) { Part::Figure(first.clone()) } else { Part::Word(first.clone()) });
                1
            }
        };
        rest = &rest[used..];
    }
    parts
}

/// Neighbouring whole figures become one.
fn joined(parts: Vec<Part>) -> Vec<String> {
    let mut words: Vec<String> = Vec::new();
    let mut open = false;
    for part in parts {
        match part {
            Part::Figure(figure) => {
                let whole = !figure.contains('.');
                match words.last_mut().filter(|_| open && whole) {
                    Some(last) => last.push_str(&figure),
                    None => words.push(figure),
                }
                open = whole;
            }
            Part::Word(word) => {
                words.push(word);
                open = false;
            }
        }
    }
    words
}

struct Spoken {
    value: u64,
    /// How many words it took.
    words: usize,
    ordinal: bool,
}

const UNITS: [&str; 20] = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
];
const UNIT_ORDINALS: [&str; 20] = [
    "zeroth",
    "first",
    "second",
    "third",
    "fourth",
    "fifth",
    "sixth",
    "seventh",
    "eighth",
    "ninth",
    "tenth",
    "eleventh",
    "twelfth",
    "thirteenth",
    "fourteenth",
    "fifteenth",
    "sixteenth",
    "seventeenth",
    "eighteenth",
    "nineteenth",
];
const TENS: [&str; 8] = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"];
const SCALES: [(&str, u64); 3] = [("billion", 1_000_000_000), ("million", 1_000_000), ("thousand", 1_000)];

fn ending(value: u64) -> &'static str {
    match (value % 10, value % 100 / 10) {
        (1, tens) if tens != 1 => "st",
        (2, tens) if tens != 1 => "nd",
        (3, tens) if tens != 1 => "rd",
        _ => "th",
    }
}

/// The spoken number that these words begin with: groups below a thousand, each but the last with a scale that is smaller
/// than the one before.
fn number(words: &[String]) -> Option<Spoken> {
    let mut whole: Option<Spoken> = None;
    let mut limit = u64::MAX;
    loop {
        let used = whole.as_ref().map_or(0, |w| w.words);
        let and = usize::from(used > 0 && words.get(used).is_some_and(|word| word == "and"));
        let Some(group) = words.get(used + and..).and_then(hundreds).filter(|g| used == 0 || g.value > 0) else {
            return whole;
        };
        let before = whole.as_ref().map_or(0, |w| w.value);
        let used = used + and + group.words;
        let scale = words.get(used).and_then(|word| SCALES.iter().find(|(name, _)| name == word));
        match scale.filter(|(_, scale)| !group.ordinal && group.value > 0 && *scale < limit) {
            Some((_, scale)) => {
                whole = Some(Spoken { value: before + group.value * scale, words: used + 1, ordinal: false });
                limit = *scale;
            }
            None => return Some(Spoken { value: before + group.value, words: used, ordinal: group.ordinal }),
        }
    }
}

/// Up to 999, with its hundreds.
fn hundreds(words: &[String]) -> Option<Spoken> {
    let first = tens(words)?;
    let rest = &words[first.words..];
    if first.ordinal || !(1..100).contains(&first.value) || rest.first().is_none_or(|word| word != "hundred") {
        return Some(first);
    }
    let (value, used) = (first.value * 100, first.words + 1);
    let rest = &words[used..];
    let and = usize::from(rest.first().is_some_and(|word| word == "and"));
    match tens(&rest[and..]) {
        Some(more) if more.value > 0 => {
            Some(Spoken { value: value + more.value, words: used + and + more.words, ordinal: more.ordinal })
        }
        _ => Some(Spoken { value, words: used, ordinal: false }),
    }
}

/// Up to 99.
fn tens(words: &[String]) -> Option<Spoken> {
    let place = |list: &[&str], word: &str| list.iter().position(|w| *w == word).map(|at| at as u64);
    let first = words.first()?;
    if let Some(value) = place(&UNITS, first) {
        return Some(Spoken { value, words: 1, ordinal: false });
    }
    if let Some(value) = place(&UNIT_ORDINALS, first) {
        return Some(Spoken { value, words: 1, ordinal: true });
    }
    if let Some(ten) = first.strip_suffix("ieth").and_then(|stem| place(&TENS, &format!("{stem}y"))) {
        return Some(Spoken { value: (ten + 2) * 10, words: 1, ordinal: true });
    }
    let value = (place(&TENS, first)? + 2) * 10;
    let unit = |list: &[&str]| words.get(1).and_then(|word| place(&list[..10], word)).filter(|unit| *unit > 0);
    Some(match (unit(&UNITS), unit(&UNIT_ORDINALS)) {
        (Some(unit), _) => Spoken { value: value + unit, words: 2, ordinal: false },
        (_, Some(unit)) => Spoken { value: value + unit, words: 2, ordinal: true },
        _ => Spoken { value, words: 1, ordinal: false },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_two_people_write_is_the_same() {
        let table = [
            ("Um, I won't — uh — do it.", "i will not do it"),
            ("I'm gonna say it's Maria's", "i am going to say it is maria's"),
            ("we\u{2019}ve [laughs] seen (what?) <unk> them", "we have seen them"),
            ("(never closed", "never closed"),
            ("half-past nine/ten", "half past 910"),
            ("a well-known R&D", "a well known r and d"),
            ("It costs $1,250.50 or 3%, £5", "it costs 1250.50 dollars or 3 percent 5 pounds"),
            ("$5. €6", "5 dollars 6 euros"),
            ("at 9:30.", "at 930"),
            ("version 2.0, not 3", "version 2.0 not 3"),
            ("1.5 2.5", "1.5 2.5"),
        ];
        for (text, expected) in table {
            assert_eq!(words(text).join(" "), expected, "{text}");
        }
    }

    #[test]
    fn numbers_become_figures() {
        let table = [
            ("six seven eight nine", "6789"),
            ("6789", "6789"),
            ("twenty three", "23"),
            ("twenty-first", "21st"),
            ("the third of the eleventh", "the 3rd of the 11th"),
            ("twentieth and 20th", "20th and 20th"),
            ("twenty and one", "20 and 1"),
            ("one hundred and five", "105"),
            ("one hundred and you", "100 and you"),
            ("nineteen hundred", "1900"),
            ("nineteen eighty four", "1984"),
            ("two thousand and twelve", "2012"),
            ("three million two hundred thousand and six", "3200006"),
            ("five thousand six hundred seventy eight", "5678"),
            ("one thousand million", "1000 million"),
            ("zero hundred", "0 hundred"),
            ("a hundred", "a hundred"),
            ("two hundredth", "2 hundredth"),
            ("oh one of them", "oh 1 of them"),
        ];
        for (text, expected) in table {
            assert_eq!(words(text).join(" "), expected, "{text}");
        }
    }

    #[test]
    fn doing_it_twice_changes_nothing() {
        for text in ["Um, I won't pay $1,250.50 (no).", "one hundred and five on the twenty-first", "it's six seven"] {
            let once = words(text).join(" ");
            assert_eq!(words(&once).join(" "), once);
        }
    }
}
