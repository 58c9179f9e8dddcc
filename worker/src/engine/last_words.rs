//! How an engine process that cannot go on says why: the reason is its exit code, and its last line the words.

use std::io::Write as _;

/// Exit codes of an engine that had to end. Others are crashes without a word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LastWords {
    OutOfMemory = 81,
    DeviceLost = 82,
    DriverMismatch = 83,
    /// The library found itself in a state that it does not know.
    Assertion = 84,
    MissingLibrary = 85,
}

/// Ends the process.
pub fn leave(words: LastWords, text: &str) -> ! {
    let _ = writeln!(std::io::stderr(), "{text}");
    std::process::exit(words as i32)
}
