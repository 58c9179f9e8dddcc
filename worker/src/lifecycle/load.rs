//! How far the load of a model has come: what its child has read of the file, as the kernel tells it.
//!
//! Neither the library that loads nor the child's loop, which is busy elsewhere, tells of it. The kernel shows a process's
//! parent each file that it has open and the place up to which it has read. A file with a checksum beside it is read twice, by
//! us and then by the library, and each half counts for one half. Our own files are closed on exec, the library's are not:
//! by this the two are told apart. Nothing here touches the file itself, which may lie on a disk that hangs.

use std::{
    fs,
    path::{Path, PathBuf},
};

use rustix::fs::OFlags;
use tokio::time::Instant;

use crate::engine::checksum;

/// One model's load.
#[derive(Debug, Clone)]
pub(super) enum Load {
    Since { at: Instant, from: Option<Source> },
    Took { ms: u64 },
}

/// The file that a model is loaded from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Source {
    /// As the kernel names it.
    path: PathBuf,
    bytes: u64,
    /// It is compared with its checksum first.
    compared: bool,
}

/// One open file, as `/proc/<pid>/fdinfo/<fd>` describes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Open {
    read_to: u64,
    closed_on_exec: bool,
}

impl Source {
    /// None where there is nothing to read.
    pub(super) fn of(path: &Path) -> Option<Self> {
        let bytes = fs::metadata(path).ok()?.len();
        let compared = checksum::file_of(path).exists();
        (bytes > 0).then_some(Self { path: fs::canonicalize(path).ok()?, bytes, compared })
    }

    /// Percent of all that is to be read; none while the process reads nothing of it: before the first byte, and after the last.
    pub(super) fn percent(&self, pid: u32) -> Option<u8> {
        let process = PathBuf::from(format!("/proc/{pid}"));
        let files = fs::read_dir(process.join("fd")).ok()?.flatten();
        let of_it = files.filter(|file| fs::read_link(file.path()).is_ok_and(|target| target == self.path));
        // One that is closed meanwhile is passed over.
        let open =
            of_it.filter_map(|file| open(&fs::read_to_string(process.join("fdinfo").join(file.file_name())).ok()?));
        open.map(|open| self.share(open)).max()
    }

    fn share(&self, open: Open) -> u8 {
        let read = open.read_to.min(self.bytes);
        let (done, all) = match (self.compared, open.closed_on_exec) {
            (true, true) => (read, 2 * self.bytes),
            (true, false) => (self.bytes + read, 2 * self.bytes),
            // Its header is looked at.
            (false, true) => (0, self.bytes),
            (false, false) => (read, self.bytes),
        };
        u8::try_from(u128::from(done) * 100 / u128::from(all)).unwrap_or(100)
    }
}

/// `pos:` in decimal and `flags:` in octal digits.
fn open(fdinfo: &str) -> Option<Open> {
    let field = |name: &str| fdinfo.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
    let flags = u32::from_str_radix(field("flags:")?, 8).ok()?;
    Some(Open { read_to: field("pos:")?.parse().ok()?, closed_on_exec: flags & OFlags::CLOEXEC.bits() != 0 })
}

#[cfg(test)]
mod tests {
    use std::{
        io::{BufRead as _, BufReader},
        process::{Command, Stdio},
    };

    use super::*;

    #[test]
    fn what_the_kernel_says_of_an_open_file_is_read() {
        let ours = "pos:\t1048576\nflags:\t02100000\nmnt_id:\t29\nino:\t7\n";
        assert_eq!(open(ours), Some(Open { read_to: 1 << 20, closed_on_exec: true }));
        let library_s = "pos:\t0\nflags:\t0100000\nmnt_id:\t29\n";
        assert_eq!(open(library_s), Some(Open { read_to: 0, closed_on_exec: false }));
        for broken in ["", "pos:\t5\n", "flags:\t02\n", "pos:\t-1\nflags:\t02\n", "pos:\tx\nflags:\t9\n"] {
            assert_eq!(open(broken), None, "{broken:?}");
        }
    }

    #[test]
    fn a_file_that_is_compared_first_is_read_twice() {
        for (compared, closed_on_exec, read_to, percent) in [
            (false, false, 0, 0),
            (false, false, 50, 25),
            (false, false, 199, 99),
            (false, false, 200, 100),
            (false, true, 200, 0),
            (true, true, 100, 25),
            (true, true, 200, 50),
            (true, false, 0, 50),
            (true, false, 100, 75),
            // It grew meanwhile.
            (true, false, 300, 100),
        ] {
            let source = Source { path: PathBuf::new(), bytes: 200, compared };
            let found = source.share(Open { read_to, closed_on_exec });
            assert_eq!(found, percent, "{compared} {closed_on_exec} {read_to}");
        }
        let huge = Source { path: PathBuf::new(), bytes: u64::MAX / 2, compared: true };
        assert_eq!(huge.share(Open { read_to: u64::MAX, closed_on_exec: false }), 100);
    }

    #[test]
    fn another_process_is_seen_reading_whatever_name_the_file_was_given() {
        let dir = tempfile::tempdir().expect("folder");
        let (file, link) = (dir.path().join("m.bin"), dir.path().join("link.bin"));
        fs::write(&file, vec![7u8; 400_000]).expect("a file");
        std::os::unix::fs::symlink(&file, &link).expect("a link");
        let source = Source::of(&link).expect("a file");
        assert_eq!(Source::of(&dir.path().join("none")), None);
        let script = "exec 3<\"$1\"; head -c 100000 <&3 >/dev/null; echo read; read next; \
                      head -c 200000 <&3 >/dev/null; echo read; read next; exec 3<&-; echo closed; read next";
        let mut reader = Command::new("sh");
        reader.args(["-c", script, "sh"]).arg(&file).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut reader = reader.spawn().expect("a shell");
        let mut says = BufReader::new(reader.stdout.take().expect("a pipe")).lines();
        let mut stdin = reader.stdin.take().expect("a pipe");
        for (word, percent) in [("read", Some(25)), ("read", Some(75)), ("closed", None)] {
            assert_eq!(says.next().expect("a word").expect("read"), word);
            assert_eq!(source.percent(reader.id()), percent, "{word}");
            std::io::Write::write_all(&mut stdin, b"next\n").expect("told");
        }
        assert!(reader.wait().expect("its end").success());
        assert_eq!(source.percent(reader.id()), None, "and it is gone");
    }
}
