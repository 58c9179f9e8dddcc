//! `file:///path`: opened itself, not copied. What is opened is judged by where it really lies, after the kernel has
//! followed every link, so nothing can be exchanged between the check and the use.

use std::{
    ffi::OsString,
    fs::File,
    io,
    os::{fd::AsRawFd, unix::ffi::OsStringExt},
    path::{Component, Path, PathBuf},
};

use rustix::{
    fs::{FileType, Mode, OFlags},
    io::Errno,
};

use super::{FetchError, error::shown};

#[derive(Debug)]
pub(super) enum Roots {
    /// The operator chose the path.
    Anywhere,
    Listed(Vec<PathBuf>),
}

/// A regular file below one of the roots, at position 0, and its length. Blocking.
pub(super) fn open(roots: &Roots, path: &str) -> Result<(File, u64), FetchError> {
    let at = shown(&format!("file://{path}"));
    let bad = |why: &str| FetchError::BadUrl { at: at.clone(), why: why.to_owned() };
    let path = percent_decoded(path).ok_or_else(|| bad("a % is not followed by two hex digits"))?;
    if path.contains(&0) {
        return Err(bad("a file's name has no zero byte"));
    }
    let path = PathBuf::from(OsString::from_vec(path));
    let forbidden = |why: &str| FetchError::Forbidden { at: at.clone(), why: why.to_owned() };
    let outside = || forbidden("it is not below one of worker.fetch.file_roots");
    // Before anything is opened: whether a file outside exists is nobody's business.
    if !roots.name(&path) {
        return Err(outside());
    }
    let trouble = |error: io::Error| match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => FetchError::NotFound { at: at.clone() },
        io::ErrorKind::PermissionDenied => forbidden("this worker's user may not read it"),
        io::ErrorKind::InvalidFilename => bad("its name is too long"),
        _ if error.raw_os_error() == Some(Errno::LOOP.raw_os_error()) => bad("its links lead in a circle"),
        _ => FetchError::Internal { at: at.clone(), why: error.to_string() },
    };
    // First only a handle of the place: opening a pipe or a device for reading does something, or waits.
    let place =
        rustix::fs::open(&path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).map_err(|e| trouble(e.into()))?;
    let own = PathBuf::from(format!("/proc/self/fd/{}", place.as_raw_fd()));
    let real = std::fs::read_link(&own).map_err(trouble)?;
    if !roots.hold(&real) {
        return Err(outside());
    }
    let stat = rustix::fs::fstat(&place).map_err(|e| trouble(e.into()))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(bad("it is not a regular file"));
    }
    let file = File::options().read(true).open(&own).map_err(trouble)?;
    let bytes = file.metadata().map_err(trouble)?.len();
    Ok((file, bytes))
}

impl Roots {
    /// Whether the path, as written, lies below a root.
    fn name(&self, path: &Path) -> bool {
        match self {
            Roots::Anywhere => true,
            Roots::Listed(roots) => {
                let plain = !path.components().any(|part| part == Component::ParentDir);
                plain && roots.iter().any(|root| below(path, root) || real(root).is_some_and(|root| below(path, &root)))
            }
        }
    }

    /// Whether a place without links lies below a root.
    fn hold(&self, place: &Path) -> bool {
        match self {
            Roots::Anywhere => true,
            Roots::Listed(roots) => roots.iter().any(|root| real(root).is_some_and(|root| below(place, &root))),
        }
    }
}

fn below(path: &Path, root: &Path) -> bool {
    path.starts_with(root) && path != root
}

/// Asked each time: a root may be mounted while the worker runs. One that is not there holds nothing.
fn real(root: &Path) -> Option<PathBuf> {
    std::fs::canonicalize(root).ok()
}

/// `%20` and the like; none when a `%` stands alone.
pub(super) fn percent_decoded(text: &str) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        if *first == b'%' {
            let [high, low, tail @ ..] = tail else { return None };
            let digit = |b: &u8| char::from(*b).to_digit(16).and_then(|d| u8::try_from(d).ok());
            out.push(digit(high)? << 4 | digit(low)?);
            rest = tail;
        } else {
            out.push(*first);
            rest = tail;
        }
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use voxfleet_schema::failure::FailureClass;

    use super::*;

    fn class(roots: &Roots, path: &Path) -> Result<u64, FailureClass> {
        open(roots, path.to_str().expect("text")).map(|(_, bytes)| bytes).map_err(|e| e.failure().class)
    }

    #[test]
    fn percent_decoding() {
        assert_eq!(percent_decoded("a%20b%2Fc").as_deref(), Some(&b"a b/c"[..]));
        assert_eq!(percent_decoded("%ff").as_deref(), Some(&b"\xff"[..]));
        for text in ["%", "%4", "%4g", "a%+1"] {
            assert_eq!(percent_decoded(text), None, "{text}");
        }
    }

    #[test]
    fn only_regular_files_below_a_root() {
        let dir = tempfile::tempdir().expect("dir");
        let (root, other) = (dir.path().join("root"), dir.path().join("root-other"));
        std::fs::create_dir_all(root.join("sub")).expect("root");
        std::fs::create_dir(&other).expect("other");
        std::fs::write(root.join("sub/a b.wav"), b"12345").expect("file");
        std::fs::write(other.join("secret"), b"secret").expect("file");
        symlink(other.join("secret"), root.join("out")).expect("link");
        symlink(&other, root.join("outdir")).expect("link");
        symlink("sub/a b.wav", root.join("inside")).expect("link");
        symlink("/dev/zero", root.join("zero")).expect("link");
        symlink("loop", root.join("loop")).expect("link");
        rustix::fs::mknodat(rustix::fs::CWD, root.join("pipe"), FileType::Fifo, Mode::RUSR, 0).expect("fifo");
        symlink(&root, dir.path().join("alias")).expect("link");

        let roots = Roots::Listed(vec![root.clone()]);
        assert_eq!(class(&roots, &root.join("sub/a%20b.wav")), Ok(5));
        assert_eq!(class(&roots, &root.join("inside")), Ok(5));
        for path in
            ["out", "outdir/secret", "sub/../../root-other/secret", "sub/%2e%2e/%2e%2e/root-other/secret", "zero"]
        {
            assert_eq!(class(&roots, &root.join(path)), Err(FailureClass::Forbidden), "{path}");
        }
        assert_eq!(class(&roots, &other.join("secret")), Err(FailureClass::Forbidden));
        assert_eq!(class(&roots, &root), Err(FailureClass::Forbidden));
        assert_eq!(class(&roots, Path::new("/etc/passwd")), Err(FailureClass::Forbidden));
        assert_eq!(class(&roots, &root.join("none")), Err(FailureClass::NotFound));
        for path in ["pipe", "sub", "loop", "a%00b", "a%zz"] {
            assert_eq!(class(&roots, &root.join(path)), Err(FailureClass::BadRequest), "{path}");
        }
        // A root that is itself a link, and one that is not there.
        let roots = Roots::Listed(vec![dir.path().join("alias"), dir.path().join("nowhere")]);
        assert_eq!(class(&roots, &dir.path().join("alias/inside")), Ok(5));
        assert_eq!(class(&roots, &root.join("inside")), Ok(5));
        assert_eq!(class(&roots, &dir.path().join("alias/out")), Err(FailureClass::Forbidden));
        assert_eq!(class(&Roots::Listed(Vec::new()), &root.join("inside")), Err(FailureClass::Forbidden));
        assert_eq!(class(&Roots::Anywhere, &other.join("secret")), Ok(6));
    }
}
