//! A whole recording in a file without a name.

use std::{fs::File, io, path::PathBuf, time::Duration};

use futures_util::StreamExt;
use tokio::io::{AsyncSeekExt, AsyncWriteExt};
use voxfleet_schema::job::AudioUrl;

use super::{FetchError, Fetcher, Validator, error::shown, file::percent_decoded};

/// A recording that is here.
#[derive(Debug)]
pub struct Spooled {
    /// At position 0. It has no name, or is the file that a file URL means; either way it is only read.
    pub file: File,
    pub bytes: u64,
    /// Its name at its source, a hint at the container.
    pub name: Option<String>,
}

/// Tries for one recording. What fails oftener than this is better tried on another worker.
const TRIES: u32 = 4;
const FIRST_DELAY: Duration = Duration::from_millis(250);
/// A server that asks for more patience than this gets it from the queue, where the recording holds no slot.
const LONGEST_DELAY: Duration = Duration::from_secs(5);

impl Fetcher {
    /// Brings all of it here. A file URL is opened where it lies.
    pub async fn spool(&self, url: &AudioUrl) -> Result<Spooled, FetchError> {
        let total = self.parts.total;
        tokio::time::timeout(total, self.spool_it(url)).await.unwrap_or_else(|_| {
            let why = format!("it has not come within {} s (worker.fetch.total_timeout_s)", total.as_secs());
            Err(FetchError::Timeout { at: shown_url(url), why })
        })
    }

    async fn spool_it(&self, url: &AudioUrl) -> Result<Spooled, FetchError> {
        let name = name_of(url);
        if let AudioUrl::File { path } = url {
            let (file, bytes) = self.open_file(path).await?;
            return Ok(Spooled { file, bytes, name });
        }
        let dir = self.parts.spool_dir.clone();
        let spool_error = {
            let dir = dir.clone();
            move |source| FetchError::Spool { dir: dir.clone(), source }
        };
        let file = unnamed(dir).await.map_err(&spool_error)?;
        let mut spool = Spool { file: tokio::fs::File::from_std(file), have: 0, validator: None };
        let mut tries = 1;
        while let Err(error) = self.fill(&mut spool, url, &spool_error).await {
            let Some(delay) = delay(&error, tries) else { return Err(error) };
            tracing::debug!(%error, tries, have = spool.have, "a fetch is tried again");
            tokio::time::sleep(delay).await;
            tries += 1;
        }
        spool.file.rewind().await.map_err(&spool_error)?;
        Ok(Spooled { file: spool.file.into_std().await, bytes: spool.have, name })
    }

    /// From where the spool ends to the end, or from the beginning when the source has something else now.
    async fn fill(
        &self,
        spool: &mut Spool,
        url: &AudioUrl,
        spool_error: &impl Fn(io::Error) -> FetchError,
    ) -> Result<(), FetchError> {
        // Without a proof that it is still the same file, the rest could be another one's.
        let from = if spool.validator.is_some() { spool.have } else { 0 };
        let mut opened = self.begin(url, from, spool.validator.as_ref()).await?;
        if opened.from != spool.have {
            spool.restart(opened.from).await.map_err(spool_error)?;
        }
        spool.validator = opened.validator;
        while let Some(chunk) = opened.body.next().await {
            let chunk = chunk?;
            spool.file.write_all(&chunk).await.map_err(spool_error)?;
            spool.have += chunk.len() as u64;
        }
        // Writes are finished in the background; the last one's error shows here.
        spool.file.flush().await.map_err(spool_error)
    }
}

struct Spool {
    file: tokio::fs::File,
    have: u64,
    validator: Option<Validator>,
}

impl Spool {
    async fn restart(&mut self, from: u64) -> io::Result<()> {
        self.file.flush().await?;
        self.file.set_len(from).await?;
        self.file.seek(io::SeekFrom::Start(from)).await?;
        self.have = from;
        Ok(())
    }
}

/// A file that is gone with its last handle.
async fn unnamed(dir: PathBuf) -> io::Result<File> {
    tokio::task::spawn_blocking(move || tempfile::tempfile_in(dir)).await.map_err(io::Error::other)?
}

/// How long to wait before the next try; none when there is none.
fn delay(error: &FetchError, tries: u32) -> Option<Duration> {
    if !error.is_passing() || tries >= TRIES {
        return None;
    }
    let ours = FIRST_DELAY * 2u32.pow(tries.saturating_sub(1).min(8));
    let asked = match error {
        FetchError::Unavailable { retry_after: Some(wait), .. } => *wait,
        _ => Duration::ZERO,
    };
    (asked <= LONGEST_DELAY).then_some(ours.max(asked).min(LONGEST_DELAY))
}

fn shown_url(url: &AudioUrl) -> String {
    match url {
        AudioUrl::Http { url, .. } => shown(url),
        AudioUrl::S3 { bucket, key } => shown(&format!("s3://{bucket}/{key}")),
        AudioUrl::Object { key } => shown(&AudioUrl::object(key)),
        AudioUrl::File { path } => shown(&format!("file://{path}")),
    }
}

fn name_of(url: &AudioUrl) -> Option<String> {
    let name = url.file_name()?;
    let plain = match url {
        AudioUrl::Object { .. } => None,
        _ => percent_decoded(name).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()),
    };
    Some(plain.unwrap_or_else(|| name.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unavailable(retry_after: Option<u64>) -> FetchError {
        FetchError::Unavailable {
            at: "https://h/a".to_owned(),
            why: "the server answers 503".to_owned(),
            retry_after: retry_after.map(Duration::from_secs),
        }
    }

    #[test]
    fn tries_end() {
        let delays: Vec<_> = (1..=5).map(|tries| delay(&unavailable(None), tries)).collect();
        let ms = |n| Some(Duration::from_millis(n));
        assert_eq!(delays, [ms(250), ms(500), ms(1_000), None, None]);
    }

    #[test]
    fn a_servers_wish_is_granted_within_bounds() {
        assert_eq!(delay(&unavailable(Some(3)), 1), Some(Duration::from_secs(3)));
        assert_eq!(delay(&unavailable(Some(0)), 1), Some(FIRST_DELAY));
        assert_eq!(delay(&unavailable(Some(3_600)), 1), None);
    }

    #[test]
    fn what_stays_wrong_is_not_tried_again() {
        assert_eq!(delay(&FetchError::NotFound { at: "https://h/a".to_owned() }, 1), None);
        let slow = FetchError::TooSlow { at: "https://h/a".to_owned(), min_bytes_per_s: 1, window_s: 60 };
        assert_eq!(delay(&slow, 1), None);
    }

    #[test]
    fn a_name_is_readable() {
        let name = |url: &str| name_of(&AudioUrl::parse(url).expect(url));
        assert_eq!(name("https://h/calls/a%20b.mp3?x=/y.wav").as_deref(), Some("a b.mp3"));
        assert_eq!(name("s3://bucket/a.flac").as_deref(), Some("a.flac"));
        assert_eq!(name("object://asr_media/audio/100%").as_deref(), Some("100%"));
        assert_eq!(name("https://h"), None);
    }
}
