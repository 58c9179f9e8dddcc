//! Where a finished transcript goes: standard output, or a file that is there whole or not at all.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write as _},
    path::{Path, PathBuf},
};

use crate::{
    args::FileArgs,
    exit::{Exit, OrExit as _},
    formats::Document,
};

/// Says before any work is done that the result could not be written.
pub(crate) fn check(args: &FileArgs) -> anyhow::Result<()> {
    if args.no_speakers && !args.format.can_hide_speakers() {
        return Err(anyhow::anyhow!("--no-speakers is for text and subtitles")).or_exit(Exit::Usage);
    }
    let Some(path) = &args.output else { return Ok(()) };
    let named = |error: io::Error| anyhow::Error::new(error).context(format!("-o {}", path.display()));
    match std::fs::metadata(path) {
        Ok(facts) if facts.is_dir() => Err(named(io::ErrorKind::IsADirectory.into())),
        Ok(_) => Ok(()),
        Err(_) if path.is_symlink() => Err(named(io::Error::new(io::ErrorKind::NotFound, "the link leads nowhere"))),
        Err(_) => folder(path).metadata().map(|_| ()).map_err(named),
    }
    .or_exit(Exit::Usage)
}

pub(crate) fn deliver(args: &FileArgs, document: &Document) -> anyhow::Result<()> {
    for note in document.notes(args.format) {
        eprintln!("{note}");
    }
    put(args, &document.render(args.format, !args.no_speakers))
}

fn put(args: &FileArgs, text: &str) -> anyhow::Result<()> {
    match &args.output {
        None => {
            let mut stdout = io::stdout().lock();
            stdout.write_all(text.as_bytes())?;
            stdout.flush()?;
            Ok(())
        }
        Some(path) => write(path, text.as_bytes())
            .map_err(|error| anyhow::Error::new(error).context(format!("writing {}", path.display()))),
    }
}

fn folder(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    // A link stays a link. Where it leads may have no name, as a pipe behind /dev/stdout: then it is opened as it was given,
    // like every device and pipe.
    let real = std::fs::canonicalize(path);
    let path: PathBuf = match (std::fs::metadata(path), real) {
        (Ok(facts), Ok(real)) if facts.is_file() => real,
        (Ok(_), _) => return OpenOptions::new().write(true).open(path)?.write_all(bytes),
        (Err(error), _) if path.is_symlink() => return Err(error),
        (Err(_), _) => path.to_owned(),
    };
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let beside = folder(&path).join(format!(".{name}.{}.part", std::process::id()));
    let written = (|| {
        let mut file = File::create_new(&beside)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        std::fs::rename(&beside, &path)
    })();
    if written.is_err() {
        // What went wrong is told; that its remains cannot be removed either would only hide it.
        let _ = std::fs::remove_file(&beside);
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::Format;

    fn args(path: PathBuf) -> FileArgs {
        FileArgs { format: Format::Text, no_speakers: false, output: Some(path) }
    }

    #[test]
    fn a_file_is_replaced_whole_and_nothing_stays_beside_it() {
        let dir = tempfile::tempdir().expect("folder");
        let path = dir.path().join("a.srt");
        for text in ["first, and longer", "second"] {
            check(&args(path.clone())).expect("can be written");
            put(&args(path.clone()), text).expect("written");
            assert_eq!(std::fs::read_to_string(&path).expect("text"), text);
        }
        assert_eq!(std::fs::read_dir(dir.path()).expect("folder").count(), 1);
    }

    #[test]
    fn only_text_can_hide_who_speaks() {
        for (format, good) in [(Format::Srt, true), (Format::Text, true), (Format::Json, false), (Format::Rttm, false)]
        {
            assert_eq!(check(&FileArgs { format, no_speakers: true, output: None }).is_ok(), good, "{format:?}");
        }
    }

    #[test]
    fn a_link_stays_one() {
        let dir = tempfile::tempdir().expect("folder");
        let (real, link) = (dir.path().join("real"), dir.path().join("link"));
        std::fs::write(&real, "old").expect("file");
        std::os::unix::fs::symlink(&real, &link).expect("link");
        put(&args(link.clone()), "new").expect("written");
        assert!(link.is_symlink() && std::fs::read_to_string(&real).expect("text") == "new");
    }

    #[test]
    fn a_link_to_what_has_no_name_is_written_through() {
        use std::{io::Read as _, os::fd::AsRawFd as _};
        let dir = tempfile::tempdir().expect("folder");
        let (mut read, write) = io::pipe().expect("pipe");
        let link = dir.path().join("out");
        std::os::unix::fs::symlink(format!("/proc/self/fd/{}", write.as_raw_fd()), &link).expect("link");
        check(&args(link.clone())).expect("can be written");
        put(&args(link.clone()), "new").expect("written");
        drop(write);
        let mut text = String::new();
        read.read_to_string(&mut text).expect("text");
        assert!(link.is_symlink() && text == "new", "{text:?}");
        let nowhere = dir.path().join("nowhere");
        std::os::unix::fs::symlink("no/such/file", &nowhere).expect("link");
        assert_eq!(crate::exit::exit_of(&check(&args(nowhere.clone())).expect_err("told")), Exit::Usage);
        assert!(put(&args(nowhere.clone()), "x").is_err() && nowhere.is_symlink());
    }

    #[test]
    fn what_cannot_be_written_is_told_beforehand() {
        let dir = tempfile::tempdir().expect("folder");
        for path in [dir.path().to_owned(), dir.path().join("no/such/folder/a.srt")] {
            let error = check(&args(path)).expect_err("no");
            assert_eq!(crate::exit::exit_of(&error), Exit::Usage);
        }
        put(&args("/dev/null".into()), "x").expect("a device is written to");
        assert!(Path::new("/dev/null").exists());
    }
}
