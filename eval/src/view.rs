//! An alignment for people: what was said, what was heard, and a letter under each difference.
//!
//! ```text
//! REF:  my lamp is quite wrong ***
//! HYP:  my lamb ** quite wrong now
//! EVAL:    S    D              I
//! ```

use crate::align::Op;

/// Blocks of three lines, each no wider than `width` characters where words allow it.
pub fn lines<T: AsRef<str>>(reference: &[T], heard: &[T], ops: &[Op], width: usize) -> String {
    let mut columns = Vec::new();
    let (mut i, mut j) = (0, 0);
    for op in ops {
        let said = (*op != Op::Insert).then(|| reference.get(i).map_or("", AsRef::as_ref));
        let found = (*op != Op::Delete).then(|| heard.get(j).map_or("", AsRef::as_ref));
        i += usize::from(said.is_some());
        j += usize::from(found.is_some());
        columns.push(column(said, found, *op));
    }
    let mut blocks = Vec::new();
    let mut rest = &columns[..];
    while !rest.is_empty() {
        let mut taken = NAME.chars().count();
        let mut fits = |[said, ..]: &[String; 3]| {
            taken += said.chars().count() + 1;
            taken <= width + 1
        };
        let here = rest.iter().map_while(|c| Some(fits(c)).filter(|f| *f)).count().max(1);
        let (block, tail) = rest.split_at(here);
        let line = |name: &str, n: usize| {
            let words: Vec<&str> = block.iter().map(|c| c[n].as_str()).collect();
            format!("{name:<6}{}", words.join(" ")).trim_end().to_owned() + "\n"
        };
        blocks.push(line("REF:", 0) + &line("HYP:", 1) + &line("EVAL:", 2));
        rest = tail;
    }
    blocks.join("\n")
}

const NAME: &str = "EVAL: ";

/// The three cells of a pair, of one width; stars stand where a side has no word.
fn column(said: Option<&str>, heard: Option<&str>, op: Op) -> [String; 3] {
    let length = |word: Option<&str>| word.map_or(0, |w| w.chars().count());
    let width = length(said).max(length(heard)).max(1);
    let letter = match op {
        Op::Equal => "",
        Op::Substitute => "S",
        Op::Delete => "D",
        Op::Insert => "I",
    };
    let cell = |word: Option<&str>| word.map_or_else(|| "*".repeat(width), |w| format!("{w:<width$}"));
    [cell(said), cell(heard), format!("{letter:<width$}")]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::align::align;

    fn shown(reference: &str, heard: &str, width: usize) -> String {
        let list = |text: &str| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        let (reference, heard) = (list(reference), list(heard));
        lines(&reference, &heard, &align(&reference, &heard), width)
    }

    #[test]
    fn differences_stand_under_their_words() {
        let expected =
            "REF:  my lamp is quite wrong ***\nHYP:  my lamb ** quite wrong now\nEVAL:    S    D              I\n";
        assert_eq!(shown("my lamp is quite wrong", "my lamb quite wrong now", 80), expected);
        assert_eq!(shown("é", "éé", 80), "REF:  é\nHYP:  éé\nEVAL: S\n");
        assert_eq!(shown("", "", 80), "");
    }

    #[test]
    fn long_ones_are_broken_between_words() {
        let text = shown("one two three four five", "one two tree four five", 16);
        assert_eq!(text.lines().filter(|l| l.starts_with("REF:")).count(), 3, "{text}");
        assert!(text.lines().all(|l| l.chars().count() <= 16), "{text}");
        assert_eq!(
            (shown("one two", "one two", 12).lines().count(), shown("one two", "one two", 13).lines().count()),
            (7, 3)
        );
        assert_eq!(shown("incomprehensibilities", "x", 5).lines().count(), 3, "a word wider than all");
    }
}
