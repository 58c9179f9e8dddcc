//! What others have written, made fit for a terminal and for text files.

/// Fit for a line of a terminal: nothing moves the cursor, colours, or turns the direction round.
pub(crate) fn plain(text: &str) -> String {
    let turns = |c: char| matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    text.chars().map(|c| if c.is_control() || turns(c) { ' ' } else { c }).collect()
}

/// Fit for a text file, which somebody will print: marks of direction stay, some languages need them.
pub(crate) fn without_controls(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_steers_a_terminal() {
        let hostile = "a\u{1b}[31mb\u{7}\r\nc\u{0}\u{9b}2J\u{202e}d\u{200f}é";
        assert_eq!(plain(hostile), "a [31mb   c  2J d é");
        assert_eq!(without_controls(hostile), "a [31mb   c  2J\u{202e}d\u{200f}é");
        assert_eq!(plain("good morning"), "good morning");
    }
}
