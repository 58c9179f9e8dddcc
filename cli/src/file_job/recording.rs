//! Where the recording is. One that is here goes into the object store of the account, whatever its size: one way.

use std::{
    io::{ErrorKind, IsTerminal as _},
    os::{fd::AsFd as _, unix::fs::FileTypeExt as _},
    path::{Path, PathBuf},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use anyhow::Context as _;
use indicatif::{ProgressBar, ProgressStyle};
use tokio::{
    fs::File,
    io::{AsyncRead, ReadBuf},
};
use voxfleet_nats::media::{Media, MediaError, digest_of};
use voxfleet_schema::{
    id::StreamId,
    job::{AudioUrl, UrlError, audio_key},
};

use crate::exit::{Exit, OrExit as _, coded};

/// How often a pipe is told how much has been sent.
const TELL: Duration = Duration::from_secs(5);

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Recording {
    Url(String),
    File(PathBuf),
    Stdin,
}

impl Recording {
    pub(crate) fn of(text: &str) -> Result<Self, UrlError> {
        if text == "-" {
            return Ok(Self::Stdin);
        }
        if text.contains("://") {
            AudioUrl::parse(text)?;
            return Ok(Self::Url(text.to_owned()));
        }
        Ok(Self::File(text.into()))
    }

    /// The file name; what cannot be shown in it is replaced.
    pub(crate) fn name(&self) -> Option<String> {
        let Recording::File(path) = self else { return None };
        let name = path.file_name()?.to_string_lossy();
        Some(name.chars().map(|c| if c.is_control() { '_' } else { c }).take(64).collect())
    }

    /// A file that cannot be read is told before anybody is asked for anything.
    pub(crate) fn check(&self) -> anyhow::Result<()> {
        let Recording::File(path) = self else { return Ok(()) };
        let facts = std::fs::metadata(path)
            .and_then(|facts| if facts.is_dir() { Err(std::io::ErrorKind::IsADirectory.into()) } else { Ok(facts) });
        let named = |error| coded(Exit::Input, anyhow::Error::new(error).context(path.display().to_string()));
        match facts.map_err(named)? {
            // It would never end; what ends comes through standard input or a pipe with a name.
            facts if facts.file_type().is_char_device() => {
                Err(anyhow::anyhow!("{}: a device is no recording", path.display())).or_exit(Exit::Input)
            }
            facts if facts.is_file() && facts.len() == 0 => {
                Err(anyhow::anyhow!("{}: the file is empty", path.display())).or_exit(Exit::Input)
            }
            _ => Ok(()),
        }
    }

    /// None for what workers fetch themselves.
    pub(crate) async fn open(&self) -> anyhow::Result<Option<Upload>> {
        match self {
            Recording::Url(_) => Ok(None),
            Recording::File(path) => Upload::file(path)
                .await
                .map(Some)
                .map_err(|error| coded(Exit::Input, anyhow::Error::new(error).context(path.display().to_string()))),
            Recording::Stdin => {
                let handle = std::io::stdin().as_fd().try_clone_to_owned().or_exit(Exit::Input)?;
                Ok(Some(Upload { from: File::from_std(handle.into()), bytes: None, what: "standard input".to_owned() }))
            }
        }
    }
}

/// A recording about to be sent.
pub(crate) struct Upload {
    from: File,
    /// Known for a file.
    bytes: Option<u64>,
    what: String,
}

impl Upload {
    async fn file(path: &Path) -> std::io::Result<Self> {
        let from = File::open(path).await?;
        let facts = from.metadata().await?;
        // A pipe with a name has no length.
        let bytes = facts.is_file().then_some(facts.len());
        Ok(Self { from, bytes, what: path.display().to_string() })
    }

    /// Reads all of it.
    pub(crate) async fn digest(self) -> anyhow::Result<String> {
        digest_of(self.from).await.or_exit(Exit::Input).with_context(|| self.what.clone())
    }

    pub(crate) async fn put(self, media: &Media, job: &StreamId, quiet: bool) -> anyhow::Result<()> {
        let key = audio_key(job);
        let sent = Arc::new(AtomicU64::new(0));
        let room = media.room().await.unwrap_or_else(|error| {
            // Whoever may not ask is told when it is full.
            tracing::debug!(%error, "room of the object store unknown");
            None
        });
        if let Some((room, bytes)) = room.zip(self.bytes).filter(|(room, bytes)| bytes > room) {
            return Err(coded(Exit::Refused, no_room(&self.what, bytes, room)));
        }
        let counted = Counted { from: self.from, sent: sent.clone(), room: room.unwrap_or(u64::MAX) };
        let show = Show::new(self.bytes, quiet);
        let putting = media.put(&key, counted);
        tokio::pin!(putting);
        let stored = loop {
            tokio::select! {
                stored = &mut putting => break stored,
                () = tokio::time::sleep(show.every()) => show.at(sent.load(Ordering::Relaxed)),
            }
        };
        show.done();
        let stored = stored.map_err(|error| {
            let exit = match &error {
                MediaError::Full => Exit::Refused,
                MediaError::Read(error) if error.kind() == ErrorKind::StorageFull => Exit::Refused,
                MediaError::Read(_) => Exit::Input,
                _ => Exit::Unavailable,
            };
            coded(exit, anyhow::Error::new(error).context(format!("storing {}", self.what)))
        })?;
        if stored.bytes == 0 {
            media.delete(&key).await.or_exit(Exit::Unavailable)?;
            return Err(anyhow::anyhow!("{}: no bytes came", self.what)).or_exit(Exit::Input);
        }
        Ok(())
    }
}

const FULL: &str = "the object store has no room for all of it; jobs that end make some, or give a URL instead";

fn no_room(what: &str, bytes: u64, room: u64) -> anyhow::Error {
    let mb = |bytes: u64| bytes as f64 / 1e6;
    anyhow::anyhow!("{what}: it has {:.1} MB, and the object store has room for {:.1} MB: {FULL}", mb(bytes), mb(room))
}

/// Counts what is read.
struct Counted {
    from: File,
    sent: Arc<AtomicU64>,
    /// More than this would leave others none.
    room: u64,
}

impl AsyncRead for Counted {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<std::io::Result<()>> {
        let before = into.filled().len();
        let polled = Pin::new(&mut self.from).poll_read(cx, into);
        let read = (into.filled().len() - before) as u64;
        if self.sent.fetch_add(read, Ordering::Relaxed) + read > self.room {
            return Poll::Ready(Err(std::io::Error::new(ErrorKind::StorageFull, FULL)));
        }
        polled
    }
}

/// A bar on a terminal, a line now and then in a pipe.
struct Show {
    bar: Option<ProgressBar>,
    total: Option<u64>,
    quiet: bool,
}

impl Show {
    fn new(total: Option<u64>, quiet: bool) -> Self {
        let bar = (!quiet && std::io::stderr().is_terminal()).then(|| {
            let template = match total {
                Some(_) => "uploading {wide_bar:.cyan/dim} {bytes}/{total_bytes} {bytes_per_sec}",
                None => "{spinner} uploading {bytes} {bytes_per_sec}",
            };
            let bar = total.map_or_else(ProgressBar::new_spinner, ProgressBar::new);
            bar.with_style(ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()))
        });
        Self { bar, total, quiet }
    }

    fn every(&self) -> Duration {
        if self.bar.is_some() { Duration::from_millis(100) } else { TELL }
    }

    fn at(&self, sent: u64) {
        match &self.bar {
            Some(bar) => bar.set_position(sent),
            None if self.quiet => {}
            None => eprintln!("{}", line(sent, self.total)),
        }
    }

    fn done(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

fn line(sent: u64, total: Option<u64>) -> String {
    let mb = |bytes: u64| bytes as f64 / 1e6;
    match total.filter(|total| *total > 0) {
        Some(total) => format!("uploading {} % ({:.1} of {:.1} MB)", sent * 100 / total, mb(sent), mb(total)),
        None => format!("uploading {:.1} MB", mb(sent)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_urls_and_standard_input_are_told_apart() {
        assert_eq!(Recording::of("-"), Ok(Recording::Stdin));
        assert_eq!(Recording::of("a/b.wav"), Ok(Recording::File("a/b.wav".into())));
        assert_eq!(Recording::of("s3://b/k.wav"), Ok(Recording::Url("s3://b/k.wav".to_owned())));
        assert!(Recording::of("ftp://host/a").is_err() && Recording::of("https://").is_err());
    }

    #[test]
    fn names_are_fit_to_be_shown() {
        assert_eq!(Recording::of("a/b c.wav").map(|r| r.name()), Ok(Some("b c.wav".to_owned())));
        assert_eq!(Recording::of("a/b\u{7}c.wav").map(|r| r.name()), Ok(Some("b_c.wav".to_owned())));
        assert_eq!((Recording::Stdin.name(), Recording::Url("https://h/a.wav".to_owned()).name()), (None, None));
    }

    #[test]
    fn a_pipe_is_told_how_much_has_gone() {
        assert_eq!(line(1_500_000, Some(6_000_000)), "uploading 25 % (1.5 of 6.0 MB)");
        assert_eq!(line(1_500_000, None), "uploading 1.5 MB");
    }
}
