//! Bringing a model here: whole and checked, or not at all.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, ErrorKind, Seek as _, Write as _},
    path::{Path, PathBuf},
    time::Duration,
};

use bytes::Bytes;
use futures_util::StreamExt as _;
use sha2::{Digest as _, Sha256};
use tokio::{sync::mpsc, task::JoinHandle};
use tokio_util::sync::CancellationToken;
use voxfleet_schema::{
    failure::{Failure, FailureClass},
    job::AudioUrl,
};

use super::{
    ModelError, ModelStore, Removed, SourceFailure,
    catalog::{Model, ModelFile},
    files::{self, Lock},
};
use crate::fetch::{FetchError, Incoming};

/// Breaks in a row without a new byte before the next source is asked: soon where nothing ever came, after about half a
/// minute where a transfer was going on.
const FIRST_TRIES: u32 = 3;
const TRIES: u32 = 8;
/// How often a lock that somebody else has is looked at.
const LOOK_AGAIN: Duration = Duration::from_millis(100);
/// Blocks between network and disk: one is written while the next ones come.
const IN_FLIGHT: usize = 16;

/// What a pull is doing, for whoever watches.
#[derive(Debug)]
pub enum Step<'a> {
    /// Another process is pulling this model.
    Waiting,
    /// What is here already is read and compared.
    Checking {
        file: &'a str,
        bytes: u64,
    },
    /// What is here is not what it must be, and is fetched again.
    Damaged {
        file: &'a str,
    },
    Begun {
        file: &'a str,
        url: &'a str,
        from: u64,
        total: Option<u64>,
    },
    Got {
        bytes: u64,
        total: Option<u64>,
    },
    /// The source broke off and is asked again.
    Broken {
        url: &'a str,
        failure: &'a Failure,
    },
    /// The next source is asked, if there is one.
    Failed {
        url: &'a str,
        failure: &'a Failure,
    },
    /// A model that nobody has used for the longest time went to make room.
    Evicted(&'a Removed),
}

/// A file of a model that is here now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pulled {
    pub path: PathBuf,
    pub bytes: u64,
    pub sha256: String,
    /// Where it came from; None = it was here already.
    pub url: Option<String>,
    /// Nobody published a checksum: this one is kept, and holds from now on.
    pub first_use: bool,
}

/// Why a source is given up.
enum Trouble {
    /// The next one may do better.
    Source(Failure),
    /// No source can help.
    Here(ModelError),
}

impl From<ModelError> for Trouble {
    fn from(error: ModelError) -> Self {
        Trouble::Here(error)
    }
}

type Watch<'w> = &'w mut (dyn FnMut(Step<'_>) + Send);

/// One file on its way.
struct Order<'a> {
    name: &'a str,
    file: &'a ModelFile,
    target: PathBuf,
    part: PathBuf,
    /// What it must be, where that is known.
    sha256: Option<String>,
    cancel: &'a CancellationToken,
}

/// How one answer of a source ended.
struct Answer {
    /// Bytes in the part now.
    have: u64,
    /// New ones among them.
    new: u64,
    hash: Sha256,
    end: End,
}

enum End {
    Whole,
    Cancelled,
    Overlong(u64),
    Broken(FetchError),
}

impl ModelStore {
    /// Brings a model here, or finds that it is here. What a cancelled or failed pull got stays for the next one.
    pub async fn pull(
        &self,
        name: &str,
        watch: Watch<'_>,
        cancel: &CancellationToken,
    ) -> Result<Vec<Pulled>, ModelError> {
        let model = self.catalog.get(name).ok_or_else(|| self.unknown(name))?;
        fs::create_dir_all(&self.dir).map_err(files::io("making", &self.dir))?;
        let mut lock = self.alone(model, watch, cancel).await?;
        if let Some(folder) = model.folder().map(|folder| self.dir.join(folder)) {
            fs::create_dir_all(&folder).map_err(files::io("making", &folder))?;
            sync(&self.dir)?;
        }
        let mut pulled = Vec::new();
        for file in &model.files {
            pulled.push(self.bring(model, file, &mut lock, watch, cancel).await?);
        }
        Ok(pulled)
    }

    async fn alone(&self, model: &Model, watch: Watch<'_>, cancel: &CancellationToken) -> Result<Lock, ModelError> {
        let mut told = false;
        loop {
            if let Some(lock) = Lock::model(&self.dir, &model.name)? {
                return Ok(lock);
            }
            if !std::mem::replace(&mut told, true) {
                watch(Step::Waiting);
            }
            tokio::select! {
                () = cancel.cancelled() => {
                    let file = model.files.first().map(|f| f.file.clone()).unwrap_or_default();
                    return Err(ModelError::Cancelled { file, kept: 0 });
                }
                () = tokio::time::sleep(LOOK_AGAIN) => {}
            }
        }
    }

    async fn bring(
        &self,
        model: &Model,
        file: &ModelFile,
        lock: &mut Lock,
        watch: Watch<'_>,
        cancel: &CancellationToken,
    ) -> Result<Pulled, ModelError> {
        let target = self.dir.join(model.place(file));
        let sha256 = match &file.sha256 {
            Some(sum) => Some(sum.clone()),
            None => files::read_sum(&target)?,
        };
        if target.is_file() {
            watch(Step::Checking { file: &file.file, bytes: files::len(&target) });
            let path = target.clone();
            let found = blocking(move || files::sha256(&path)).await?;
            if sha256.as_ref().is_none_or(|sum| *sum == found) {
                if files::read_sum(&target)?.as_ref() != Some(&found) {
                    files::write_sum(&target, &found)?;
                }
                files::touch_path(&target);
                let (bytes, first_use) = (files::len(&target), file.sha256.is_none());
                return Ok(Pulled { path: target, bytes, sha256: found, url: None, first_use });
            }
            watch(Step::Damaged { file: &file.file });
        }
        let part = files::part_path(&target);
        // Without a checksum nothing could tell that two halves of two files were put together.
        if sha256.is_none() || file.bytes.is_some_and(|bytes| files::len(&part) > bytes) {
            files::remove(&part)?;
        }
        let order = Order { name: &model.name, file, target, part, sha256, cancel };
        let mut failures = Vec::new();
        for url in model.urls(file, &self.mirrors) {
            let shown = AudioUrl::redacted(&url).to_owned();
            let parsed = AudioUrl::parse(&url).map_err(|e| Failure::new(FailureClass::BadRequest, e.to_string()));
            if self.offline && !matches!(parsed, Ok(AudioUrl::File { .. })) {
                continue;
            }
            let outcome = match parsed {
                Ok(parsed) => self.ask(&order, &parsed, &shown, lock, watch).await,
                Err(failure) => Err(Trouble::Source(failure)),
            };
            match outcome {
                Ok(pulled) => return Ok(pulled),
                Err(Trouble::Here(error)) => return Err(error),
                Err(Trouble::Source(failure)) => {
                    watch(Step::Failed { url: &shown, failure: &failure });
                    failures.push(SourceFailure { url: shown, failure });
                }
            }
        }
        let name = model.name.clone();
        if self.offline && failures.iter().all(|f| f.failure.class == FailureClass::NotFound) {
            let files = model.files.iter().map(|f| model.place(f)).collect();
            return Err(ModelError::Offline { name, files, dir: self.dir.to_path_buf() });
        }
        Err(ModelError::Sources { name, failures })
    }

    /// Asks one source until the file is whole or the source is given up.
    async fn ask(
        &self,
        order: &Order<'_>,
        url: &AudioUrl,
        shown: &str,
        lock: &mut Lock,
        watch: Watch<'_>,
    ) -> Result<Pulled, Trouble> {
        let (mut tries, mut most) = (0, FIRST_TRIES);
        // Whether bytes in the part come from two answers, of which one may be about another file; and whether it was begun
        // again for that, which helps once.
        let (mut mixed, mut again) = (false, false);
        loop {
            let asked = files::len(&order.part);
            mixed |= asked > 0;
            let (broken, new) = match self.answer(order, url, shown, asked, lock, watch).await {
                Ok(answer) => match answer.end {
                    End::Whole => {
                        let found = files::hex(answer.hash);
                        match order.sha256.as_ref().is_none_or(|sum| *sum == found) {
                            true => return Ok(order.keep(found, answer.have, shown)?),
                            false => {
                                files::remove(&order.part)?;
                                let failure = wrong_sum(order, &found);
                                if !std::mem::replace(&mut mixed, false) || std::mem::replace(&mut again, true) {
                                    return Err(Trouble::Source(failure));
                                }
                                watch(Step::Broken { url: shown, failure: &failure });
                                continue;
                            }
                        }
                    }
                    End::Cancelled => return Err(order.cancelled().into()),
                    End::Overlong(expected) => {
                        files::remove(&order.part)?;
                        let why = format!("more comes than the {expected} bytes it must have");
                        return Err(Trouble::Source(Failure::new(FailureClass::ModelMissing, why)));
                    }
                    End::Broken(error) => (error, answer.new),
                },
                Err(Asked::Refused(error)) => (error, 0),
                Err(Asked::Cancelled) => return Err(order.cancelled().into()),
                Err(Asked::Wrong(failure)) => return Err(Trouble::Source(failure)),
                Err(Asked::Here(error)) => return Err(error.into()),
            };
            let failure = broken.failure();
            // Without a checksum there is no telling that a second answer continues the first.
            if order.sha256.is_none() {
                files::remove(&order.part)?;
            }
            if new > 0 {
                (tries, most) = (0, TRIES);
            }
            tries += 1;
            if !broken.is_passing() || tries >= most {
                return Err(Trouble::Source(failure));
            }
            watch(Step::Broken { url: shown, failure: &failure });
            tokio::select! {
                () = order.cancel.cancelled() => return Err(order.cancelled().into()),
                () = tokio::time::sleep(pause(tries)) => {}
            }
        }
    }

    /// One request and what comes of it.
    async fn answer(
        &self,
        order: &Order<'_>,
        url: &AudioUrl,
        shown: &str,
        asked: u64,
        lock: &mut Lock,
        watch: Watch<'_>,
    ) -> Result<Answer, Asked> {
        if order.file.bytes == Some(asked) {
            // All of it came before the last pull ended.
            let part = order.part.clone();
            let hash = blocking(move || {
                let mut hash = Sha256::new();
                files::hash_into(&mut hash, &part, |_| ()).map(|_| hash)
            });
            return Ok(Answer { have: asked, new: 0, hash: hash.await?, end: End::Whole });
        }
        let incoming = tokio::select! {
            () = order.cancel.cancelled() => return Err(Asked::Cancelled),
            opened = self.fetcher.open(url, asked) => opened.map_err(Asked::Refused)?,
        };
        let Incoming { body, from, total } = incoming;
        if let (Some(wanted), Some(found)) = (order.file.bytes, total)
            && wanted != found
        {
            let why = format!("it has {found} bytes, the catalog says {wanted}");
            return Err(Asked::Wrong(Failure::new(FailureClass::ModelMissing, why)));
        }
        let total = order.file.bytes.or(total);
        self.room(order, from, total, lock, watch).await?;
        watch(Step::Begun { file: &order.file.file, url: shown, from, total });

        let (tx, writer) = write(order.part.clone(), from);
        let (mut have, mut body) = (from, body);
        let end = loop {
            let next = tokio::select! {
                () = order.cancel.cancelled() => break End::Cancelled,
                next = body.next() => next,
            };
            match next {
                None if total.is_some_and(|total| have < total) => break End::Broken(cut_off(shown, have, total)),
                None => break End::Whole,
                Some(Err(error)) => break End::Broken(error),
                Some(Ok(bytes)) => {
                    have += bytes.len() as u64;
                    match total {
                        Some(total) if have > total => break End::Overlong(total),
                        // The writer says itself why it stopped.
                        _ if tx.send(bytes).await.is_err() => break End::Whole,
                        _ => watch(Step::Got { bytes: have, total }),
                    }
                }
            }
        };
        drop(tx);
        match writer.await.map_err(|_| ModelError::Writer)? {
            Ok(hash) => Ok(Answer { have, new: have - from, hash, end }),
            Err(source) if matches!(source.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded) => {
                let needed = total.map_or(1, |total| total.saturating_sub(files::len(&order.part)));
                Err(Asked::Here(self.disk_full(order, needed)))
            }
            Err(source) => Err(Asked::Here(files::io("writing", &order.part)(source))),
        }
    }

    /// Makes room within the quota, and looks whether the disk has it.
    async fn room(
        &self,
        order: &Order<'_>,
        from: u64,
        total: Option<u64>,
        lock: &mut Lock,
        watch: Watch<'_>,
    ) -> Result<(), ModelError> {
        let Some(total) = total else { return Ok(()) };
        for removed in self.make_room(order.name, total, lock)? {
            watch(Step::Evicted(&removed));
        }
        // What lies in the part behind `from` is written over.
        let needed = total.saturating_sub(from.max(files::len(&order.part)));
        match files::free_bytes(&self.dir) {
            Some(free) if free < needed => Err(self.disk_full(order, needed)),
            _ => Ok(()),
        }
    }

    fn disk_full(&self, order: &Order<'_>, needed: u64) -> ModelError {
        let (file, dir) = (order.file.file.clone(), self.dir.to_path_buf());
        ModelError::DiskFull { file, needed, free: files::free_bytes(&dir), dir }
    }
}

/// Why there is no answer.
enum Asked {
    Refused(FetchError),
    /// It is another file than the catalog's.
    Wrong(Failure),
    Cancelled,
    Here(ModelError),
}

impl From<ModelError> for Asked {
    fn from(error: ModelError) -> Self {
        Asked::Here(error)
    }
}

impl Order<'_> {
    /// The part becomes the model. Its checksum stands there first: a model is never without.
    fn keep(&self, sha256: String, bytes: u64, url: &str) -> Result<Pulled, ModelError> {
        files::write_sum(&self.target, &sha256)?;
        fs::rename(&self.part, &self.target).map_err(files::io("renaming to", &self.target))?;
        if let Some(dir) = self.target.parent() {
            sync(dir)?;
        }
        let (path, first_use) = (self.target.clone(), self.file.sha256.is_none());
        Ok(Pulled { path, bytes, sha256, url: Some(url.to_owned()), first_use })
    }

    fn cancelled(&self) -> ModelError {
        let kept = if self.sha256.is_some() { files::len(&self.part) } else { 0 };
        ModelError::Cancelled { file: self.file.file.clone(), kept }
    }
}

/// The names in a folder outlive a power cut, as the bytes of its files do.
fn sync(dir: &Path) -> Result<(), ModelError> {
    File::open(dir).and_then(|d| d.sync_all()).map_err(files::io("writing", dir))
}

/// A quarter of a second, doubling to eight.
fn pause(tries: u32) -> Duration {
    Duration::from_millis(125 << tries.min(6))
}

fn wrong_sum(order: &Order<'_>, found: &str) -> Failure {
    let expected = order.sha256.as_deref().unwrap_or("unknown");
    Failure::new(FailureClass::ModelMissing, format!("wrong checksum: sha256 is {found}, it must be {expected}"))
}

fn cut_off(url: &str, have: u64, total: Option<u64>) -> FetchError {
    let why = format!("it ended after {have} of {} bytes", total.unwrap_or(have));
    FetchError::Unavailable { at: url.to_owned(), why, retry_after: None }
}

/// Writes what comes behind the first `from` bytes of the part, and hashes all of it. Ends when the sender does.
fn write(part: PathBuf, from: u64) -> (mpsc::Sender<Bytes>, JoinHandle<io::Result<Sha256>>) {
    let (tx, mut rx) = mpsc::channel::<Bytes>(IN_FLIGHT);
    let writer = tokio::task::spawn_blocking(move || {
        let mut hash = Sha256::new();
        let mut file = open_part(&part, from, &mut hash)?;
        while let Some(bytes) = rx.blocking_recv() {
            file.write_all(&bytes)?;
            hash.update(&bytes);
        }
        file.sync_all()?;
        Ok(hash)
    });
    (tx, writer)
}

fn open_part(part: &Path, from: u64, hash: &mut Sha256) -> io::Result<File> {
    let mut file = OpenOptions::new().create(true).truncate(false).read(true).write(true).open(part)?;
    file.set_len(from)?;
    if from > 0 {
        files::hash_into(hash, part, |_| ()).map_err(io::Error::other)?;
    }
    file.seek(io::SeekFrom::Start(from))?;
    Ok(file)
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ModelError> + Send + 'static,
) -> Result<T, ModelError> {
    tokio::task::spawn_blocking(work).await.map_err(|_| ModelError::Writer)?
}
