//! How an engine process that cannot go on says why: its exit code is the reason, and its last line the words.
//!
//! ggml ends the process where CUDA fails: it logs what CUDA said and aborts. [`listen`] takes its log, and puts itself in
//! the way of the abort, so that the supervisor is told of memory or of a lost device instead of a mere signal.

use std::{
    collections::VecDeque,
    ffi::{CStr, c_char, c_void},
    io::Write as _,
    sync::{Mutex, Once, PoisonError},
    time::{Duration, Instant},
};

use voxfleet_schema::failure::FailureClass;
use whisper_rs::whisper_rs_sys as sys;

/// Exit codes of an engine that had to end. Others are crashes without a word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LastWords {
    OutOfMemory = 81,
    DeviceLost = 82,
    DriverMismatch = 83,
    /// The library found itself in a state that it does not know.
    Assertion = 84,
    MissingLibrary = 85,
    /// The lock file that is shared with a neighbour cannot be taken.
    NoLock = 86,
}

/// What CUDA, ggml and the dynamic loader say, in lower case, and what it means. The first one that fits counts: what is
/// said of memory comes before what follows from the want of it.
const SAYINGS: [(&str, LastWords); 18] = [
    ("out of memory", LastWords::OutOfMemory),
    ("cudamalloc", LastWords::OutOfMemory),
    ("failed to allocate", LastWords::OutOfMemory),
    ("insufficient memory", LastWords::OutOfMemory),
    ("cublas_status_alloc_failed", LastWords::OutOfMemory),
    ("driver version is insufficient", LastWords::DriverMismatch),
    ("no kernel image", LastWords::DriverMismatch),
    ("unsupported toolchain", LastWords::DriverMismatch),
    ("system has unsupported display driver", LastWords::DriverMismatch),
    ("device lost", LastWords::DeviceLost),
    ("gpu is lost", LastWords::DeviceLost),
    ("unspecified launch failure", LastWords::DeviceLost),
    ("no cuda-capable device", LastWords::DeviceLost),
    ("device is unavailable", LastWords::DeviceLost),
    ("uncorrectable ecc", LastWords::DeviceLost),
    ("hardware stack error", LastWords::DeviceLost),
    ("cannot open shared object file", LastWords::MissingLibrary),
    ("has no cuda", LastWords::MissingLibrary),
];

/// What Rust's runtime says of an allocation that failed, right before it aborts.
const WANT_OF_MEMORY: &str = "memory allocation of ";

/// An abort says what it is about in its last lines; those before are of other things.
const DYING_LINES: usize = 4;

impl LastWords {
    const ALL: [Self; 6] = [
        Self::OutOfMemory,
        Self::DeviceLost,
        Self::DriverMismatch,
        Self::Assertion,
        Self::MissingLibrary,
        Self::NoLock,
    ];

    /// Of an exit code.
    pub fn of_code(code: i32) -> Option<Self> {
        Self::ALL.into_iter().find(|words| *words as i32 == code)
    }

    /// What a library's text says, where it says anything known.
    pub fn in_text(text: &str) -> Option<Self> {
        let text = text.to_lowercase();
        SAYINGS.iter().find(|(saying, _)| text.contains(saying)).map(|(_, words)| *words)
    }

    /// What the last lines say of a process that was aborted without a code of its own.
    pub fn in_lines(lines: &[String]) -> Option<Self> {
        let mut newest = lines.iter().rev().take(DYING_LINES);
        newest.any(|line| line.contains(WANT_OF_MEMORY)).then_some(Self::OutOfMemory)
    }

    pub fn class(self) -> FailureClass {
        match self {
            Self::OutOfMemory => FailureClass::OutOfMemory,
            Self::DeviceLost => FailureClass::DeviceLost,
            Self::DriverMismatch => FailureClass::DriverMismatch,
            Self::Assertion | Self::NoLock => FailureClass::EngineCrash,
            Self::MissingLibrary => FailureClass::MissingLibrary,
        }
    }
}

unsafe extern "C" {
    /// Ends the process at once.
    safe fn _exit(code: i32) -> !;
    /// `std::set_new_handler`: who is called before C++ throws for want of memory.
    #[link_name = "_ZSt15set_new_handlerPFvvE"]
    safe fn set_new_handler(handler: Option<extern "C" fn()>) -> Option<extern "C" fn()>;
}

/// Ends the process. No destructors: a library whose device has gone may wait in them for ever.
pub fn leave(words: LastWords, text: &str) -> ! {
    // Where nobody reads it the exit code says enough.
    let _ = writeln!(std::io::stderr(), "{text}");
    _exit(words as i32)
}

/// Lines of the libraries' log that are kept for the moment of an abort.
const KEPT_LINES: usize = 8;

/// An abort has to do with a line so soon before it. An older one is of something that went on: a load that was refused.
const FRESH: Duration = Duration::from_secs(2);

/// The libraries' last lines.
#[derive(Debug)]
struct Heard(VecDeque<(Instant, String)>);

impl Heard {
    fn line(&mut self, now: Instant, text: &str) {
        if self.0.len() == KEPT_LINES {
            self.0.pop_front();
        }
        self.0.push_back((now, text.to_owned()));
    }

    /// What those of that time say: the newest of them that says something known, and the text of all.
    fn within(&self, time: Duration, now: Instant) -> (Option<LastWords>, String) {
        let of_it = || self.0.iter().filter(|(at, _)| now.saturating_duration_since(*at) < time).map(|(_, line)| line);
        let words = of_it().rev().find_map(|line| LastWords::in_text(line));
        (words, of_it().map(String::as_str).collect::<Vec<_>>().join("; "))
    }
}

static HEARD: Mutex<Heard> = Mutex::new(Heard(VecDeque::new()));

/// From now on errors of whisper.cpp and ggml are kept, and an abort says why. Replaces whatever took their logs before.
///
/// So does the want of memory: an exception of C++ that reaches Rust is an abort that says nothing of what it was.
pub fn listen() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: the callbacks are functions of this program, live as long as it, and use no user data.
        unsafe {
            sys::whisper_log_set(Some(hear), std::ptr::null_mut());
            sys::ggml_log_set(Some(hear), std::ptr::null_mut());
            sys::ggml_set_abort_callback(Some(aborted));
        }
        set_new_handler(Some(starved));
    });
}

/// What the libraries' last errors say of a device that did not come up, and their text.
pub fn heard() -> (Option<LastWords>, String) {
    heard_within(Duration::MAX)
}

fn heard_within(time: Duration) -> (Option<LastWords>, String) {
    HEARD.lock().unwrap_or_else(PoisonError::into_inner).within(time, Instant::now())
}

unsafe extern "C" fn hear(level: sys::ggml_log_level, text: *const c_char, _: *mut c_void) {
    if text.is_null() || level < sys::ggml_log_level_GGML_LOG_LEVEL_WARN {
        return;
    }
    // SAFETY: a C string that lives during this call.
    let text = unsafe { CStr::from_ptr(text) }.to_string_lossy();
    let text = text.trim();
    if text.is_empty() {
        return;
    }
    HEARD.lock().unwrap_or_else(PoisonError::into_inner).line(Instant::now(), text);
    // The worker's log has it too.
    let _ = writeln!(std::io::stderr(), "{text}");
}

extern "C" fn starved() {
    leave(LastWords::OutOfMemory, "out of memory: the host has none for what is computed with")
}

unsafe extern "C" fn aborted(message: *const c_char) {
    let message = if message.is_null() {
        "aborted".into()
    } else {
        // SAFETY: a C string that lives during this call.
        unsafe { CStr::from_ptr(message) }.to_string_lossy()
    };
    let (before, lines) = heard_within(FRESH);
    let words = LastWords::in_text(&message).or(before).unwrap_or(LastWords::Assertion);
    let text = if lines.is_empty() { message.into_owned() } else { format!("{lines}; {message}") };
    leave(words, &text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_library_s_words_name_the_cause() {
        use LastWords::*;
        for (text, expected) in [
            ("CUDA error: out of memory", Some(OutOfMemory)),
            (
                "ggml_backend_cuda_buffer_type_alloc_buffer: allocating 147.37 MiB on device 0: cudaMalloc failed",
                Some(OutOfMemory),
            ),
            ("CUDA error: the resource allocation failed (CUBLAS_STATUS_ALLOC_FAILED)", Some(OutOfMemory)),
            ("CUDA error: unspecified launch failure", Some(DeviceLost)),
            ("NVML: GPU is lost", Some(DeviceLost)),
            ("ggml_cuda_init: failed to initialize CUDA: no CUDA-capable device is detected", Some(DeviceLost)),
            (
                "ggml_cuda_init: failed to initialize CUDA: CUDA driver version is insufficient for CUDA runtime version",
                Some(DriverMismatch),
            ),
            ("CUDA error: no kernel image is available for execution on the device", Some(DriverMismatch)),
            ("libcublas.so.13: cannot open shared object file: No such file or directory", Some(MissingLibrary)),
            ("ggml.c:4312: GGML_ASSERT(ggml_can_mul_mat(a, b)) failed", None),
            ("", None),
        ] {
            assert_eq!(LastWords::in_text(text), expected, "{text}");
        }
    }

    #[test]
    fn what_was_said_long_before_explains_no_abort() {
        let begun = Instant::now();
        let at = |ms| begun + Duration::from_millis(ms);
        let mut heard = Heard(VecDeque::new());
        heard.line(at(0), "cudaMalloc failed: out of memory");
        assert_eq!(heard.within(FRESH, at(1_999)).0, Some(LastWords::OutOfMemory));
        assert_eq!(heard.within(FRESH, at(2_000)), (None, String::new()), "the load was refused, and all went on");
        heard.line(at(9_000), "CUDA error: unspecified launch failure");
        heard.line(at(9_001), "current device: 0");
        let (words, text) = heard.within(FRESH, at(9_010));
        assert_eq!(words, Some(LastWords::DeviceLost));
        assert_eq!(text, "CUDA error: unspecified launch failure; current device: 0");
        (0..20).for_each(|n| heard.line(at(9_020), &format!("line {n}")));
        assert_eq!(heard.0.len(), KEPT_LINES);
    }

    #[test]
    fn an_abort_for_want_of_memory_is_told_by_its_last_lines() {
        let lines = |more: usize| -> Vec<String> {
            let before = ["loading", "memory allocation of 1920000 bytes failed"].map(str::to_owned);
            before.into_iter().chain((0..more).map(|n| format!("frame {n}"))).collect()
        };
        assert_eq!(LastWords::in_lines(&lines(3)), Some(LastWords::OutOfMemory));
        assert_eq!(LastWords::in_lines(&lines(4)), None);
        assert_eq!(LastWords::in_lines(&["CUDA error: out of memory".to_owned()]), None, "a load that was refused");
        assert_eq!(LastWords::in_lines(&[]), None);
    }

    #[test]
    fn codes_are_told_apart_from_others() {
        for words in LastWords::ALL {
            assert_eq!(LastWords::of_code(words as i32), Some(words));
        }
        for code in [0, 1, 80, 87, 101, 134] {
            assert_eq!(LastWords::of_code(code), None);
        }
        assert_eq!(LastWords::Assertion.class(), FailureClass::EngineCrash);
    }
}
