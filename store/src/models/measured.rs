//! What models were found to need of a device: kept by the worker that measured it, read by whoever plans.
//!
//! One JSON file for each device in a folder of the cache. A figure holds for a device (its name and memory), a model file
//! (its name, length and, where known, checksum) and a version of this program, which has the engine inside. Of anything
//! else the catalog's published figures are used.
//!
//! A file is replaced whole or not at all; writers wait for each other on a lock beside it. A file, or an entry in it, that
//! cannot be read is told and passed over: it costs figures, never a start. All of it blocks.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, ErrorKind, Write as _},
    path::{Path, PathBuf},
};

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use super::{catalog::Model, files};

/// The version that figures of this build are kept under.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
/// The newest of so many entries are kept for each device: every model of the catalog, in a few versions.
const MOST_ENTRIES: usize = 256;
/// More than so many bytes were not written here.
const MOST_BYTES: u64 = 1 << 20;
/// A described card (`T4:15GB`) is a measured one when its memory differs by no more: drivers and ECC take some.
const ALIKE_PERCENT: u64 = 7;

#[derive(Debug, thiserror::Error)]
#[error("{what} {}", path.display())]
pub struct MeasuredError {
    what: &'static str,
    path: PathBuf,
    #[source]
    source: io::Error,
}

fn io(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> MeasuredError {
    let path = path.to_owned();
    move |source| MeasuredError { what, path, source }
}

/// As NVML or `/proc` name it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceKey {
    pub name: String,
    pub total_mb: u64,
}

impl DeviceKey {
    /// `NVIDIA A100-SXM4-80GB` with 81,920 MB lies in `nvidia-a100-sxm4-80gb-81920.json`.
    fn file(&self) -> String {
        let plain = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' };
        let name: String = self.name.chars().take(100).map(plain).collect();
        format!("{name}-{}.json", self.total_mb)
    }

    /// Whether somebody who describes a card as `name` with `total_mb` means this one.
    fn is_like(&self, name: &str, total_mb: u64) -> bool {
        let words = |text: &str| -> Vec<String> {
            text.split(|c: char| !c.is_ascii_alphanumeric())
                .filter(|w| !w.is_empty())
                .map(str::to_ascii_lowercase)
                .collect()
        };
        let (own, described) = (words(&self.name), words(name));
        let near = self.total_mb.abs_diff(total_mb).saturating_mul(100) <= total_mb.saturating_mul(ALIKE_PERCENT);
        near && !described.is_empty() && described.iter().all(|word| own.contains(word))
    }
}

/// Which file of a model, run by which version.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelKey {
    pub model: String,
    pub bytes: u64,
    /// In hex; None where nobody knows it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
    pub version: String,
}

impl ModelKey {
    /// Of a file that is here; its checksum is the one that stands beside it. None where there is no file.
    pub fn of_file(model: &str, path: &Path) -> Option<Self> {
        let bytes = fs::metadata(path).ok().filter(|m| m.is_file())?.len();
        // One that cannot be read is as good as none.
        let sha256 = files::read_sum(path).ok().flatten();
        Some(Self { model: model.to_owned(), bytes, sha256, version: VERSION.to_owned() })
    }

    /// Of a file as the catalog has it. None where it does not say how long it is.
    pub fn of_catalog(model: &Model) -> Option<Self> {
        let [file] = &model.files[..] else { return None };
        let (bytes, sha256) = (file.bytes?, file.sha256.clone());
        Some(Self { model: model.name.clone(), bytes, sha256, version: VERSION.to_owned() })
    }

    fn is(&self, other: &Self) -> bool {
        let sums = self.sha256.as_ref().zip(other.sha256.as_ref()).is_none_or(|(a, b)| a == b);
        self.model == other.model && self.bytes == other.bytes && self.version == other.version && sums
    }
}

/// In MB of 2^20 bytes of the device. What was not measured stays absent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Figures {
    /// What the runtime takes before any model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub context_mb: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weights_mb: Option<u64>,
    /// Of one decode state.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub state_mb: Option<u64>,
    /// Seconds of live audio that the whole pool gets through in a second, partials included; with the threads and states of
    /// the worker that measured it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub realtime_factor: Option<f64>,
    /// When the newest of them was measured, unix time in ms.
    pub at_ms: u64,
}

impl Figures {
    /// `newer` where it says something, else what was known.
    #[must_use]
    pub fn with(self, newer: Figures) -> Self {
        Self {
            context_mb: newer.context_mb.or(self.context_mb),
            weights_mb: newer.weights_mb.or(self.weights_mb),
            state_mb: newer.state_mb.or(self.state_mb),
            realtime_factor: newer.realtime_factor.or(self.realtime_factor),
            at_ms: newer.at_ms.max(self.at_ms),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Entry {
    #[serde(flatten)]
    key: ModelKey,
    #[serde(flatten)]
    figures: Figures,
}

#[derive(Serialize, Deserialize)]
struct Kept<E> {
    device: DeviceKey,
    measured: Vec<E>,
}

/// The folder of measured figures.
#[derive(Debug, Clone)]
pub struct Measured {
    dir: PathBuf,
}

impl Measured {
    /// Touches nothing yet: the folder is made by the first record.
    pub fn open(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into() }
    }

    /// The one in a user's cache folder.
    pub fn in_cache(cache: &Path) -> Self {
        Self::open(cache.join("measured"))
    }

    pub fn lookup(&self, device: &DeviceKey, model: &ModelKey) -> Option<Figures> {
        let entries = self.read(&self.dir.join(device.file()), Some(device));
        entries.1.into_iter().find(|entry| entry.key.is(model)).map(|entry| entry.figures)
    }

    /// The measured device that somebody means who describes it as `T4` with 15 GB; of several, the one nearest in memory.
    pub fn described(&self, name: &str, total_mb: u64) -> Option<DeviceKey> {
        let paths = fs::read_dir(&self.dir).ok()?.flatten().map(|entry| entry.path());
        let devices =
            paths.filter(|p| p.extension().is_some_and(|e| e == "json")).filter_map(|p| self.read(&p, None).0);
        devices.filter(|d| d.is_like(name, total_mb)).min_by_key(|d| (d.total_mb.abs_diff(total_mb), d.name.clone()))
    }

    /// Keeps what was measured, beside what was measured before.
    pub fn record(&self, device: &DeviceKey, model: &ModelKey, figures: Figures) -> Result<(), MeasuredError> {
        fs::create_dir_all(&self.dir).map_err(io("making", &self.dir))?;
        let path = self.dir.join(device.file());
        let _lock = lock(&path.with_extension("lock"))?;
        let mut entries = self.read(&path, Some(device)).1;
        let known = entries.iter().find(|entry| entry.key.is(model)).map(|entry| entry.figures).unwrap_or_default();
        entries.retain(|entry| !entry.key.is(model));
        entries.insert(0, Entry { key: model.clone(), figures: known.with(figures) });
        entries.truncate(MOST_ENTRIES);
        self.write(&path, &Kept { device: device.clone(), measured: entries })
    }

    fn write(&self, path: &Path, kept: &Kept<Entry>) -> Result<(), MeasuredError> {
        let text = serde_json::to_vec_pretty(kept).map_err(|e| io("writing", path)(e.into()))?;
        let mut staged = tempfile::NamedTempFile::new_in(&self.dir).map_err(io("writing in", &self.dir))?;
        staged.write_all(&text).map_err(io("writing", path))?;
        staged.persist(path).map_err(|e| io("writing", path)(e.error))?;
        Ok(())
    }

    /// Another device may have the same file name; its figures are not `wanted`'s.
    fn read(&self, path: &Path, wanted: Option<&DeviceKey>) -> (Option<DeviceKey>, Vec<Entry>) {
        let none = (None, Vec::new());
        let text = match read_text(path) {
            Ok(text) => text,
            Err(error) if error.kind() == ErrorKind::NotFound => return none,
            Err(error) => {
                tracing::warn!(%error, path = %path.display(), "measured figures cannot be read, using published ones");
                return none;
            }
        };
        let kept: Kept<serde_json::Value> = match serde_json::from_str(&text) {
            Ok(kept) => kept,
            Err(error) => {
                tracing::warn!(%error, path = %path.display(), "measured figures are damaged, using published ones");
                return none;
            }
        };
        if wanted.is_some_and(|device| *device != kept.device) {
            return none;
        }
        let whole = |value| match serde_json::from_value::<Entry>(value) {
            Ok(entry) => Some(entry),
            Err(error) => {
                tracing::warn!(%error, path = %path.display(), "one of the measured figures is damaged, passed over");
                None
            }
        };
        (Some(kept.device), kept.measured.into_iter().filter_map(whole).collect())
    }
}

fn read_text(path: &Path) -> io::Result<String> {
    match fs::metadata(path)?.len() {
        ..=MOST_BYTES => fs::read_to_string(path),
        bytes => Err(io::Error::other(format!("{bytes} bytes, the most is {MOST_BYTES}"))),
    }
}

/// Waits for other writers; given back when the file is dropped.
fn lock(path: &Path) -> Result<File, MeasuredError> {
    // Never removed: two processes that lock two files of one name would both be alone.
    let opened = OpenOptions::new().create(true).truncate(false).write(true).open(path);
    let file = opened.map_err(io("opening", path))?;
    flock(&file, FlockOperation::LockExclusive).map_err(|e| io("locking", path)(e.into()))?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn t4() -> DeviceKey {
        DeviceKey { name: "Tesla T4".to_owned(), total_mb: 15_360 }
    }

    fn key(model: &str) -> ModelKey {
        ModelKey { model: model.to_owned(), bytes: 7, sha256: Some("ab".to_owned()), version: "1".to_owned() }
    }

    fn weights(mb: u64) -> Figures {
        Figures { weights_mb: Some(mb), at_ms: 5, ..Figures::default() }
    }

    fn store() -> (tempfile::TempDir, Measured) {
        let dir = tempfile::tempdir().expect("folder");
        let measured = Measured::in_cache(dir.path());
        (dir, measured)
    }

    #[test]
    fn what_was_measured_is_found_again_for_the_same_file_and_version_alone() {
        let (_dir, measured) = store();
        assert_eq!(measured.lookup(&t4(), &key("base")), None);
        measured.record(&t4(), &key("base"), weights(150)).expect("recorded");
        assert_eq!(measured.lookup(&t4(), &key("base")), Some(weights(150)));
        let unsummed = ModelKey { sha256: None, ..key("base") };
        assert_eq!(measured.lookup(&t4(), &unsummed), Some(weights(150)));
        for other in [
            key("small"),
            ModelKey { bytes: 8, ..key("base") },
            ModelKey { sha256: Some("cd".to_owned()), ..key("base") },
            ModelKey { version: "2".to_owned(), ..key("base") },
        ] {
            assert_eq!(measured.lookup(&t4(), &other), None, "{other:?}");
        }
        let larger = DeviceKey { total_mb: 16_384, ..t4() };
        assert_eq!(measured.lookup(&larger, &key("base")), None);
        // The same name of a file, and yet another device.
        let dashed = DeviceKey { name: "Tesla/T4".to_owned(), ..t4() };
        assert_eq!(measured.lookup(&dashed, &key("base")), None);
    }

    #[test]
    fn later_figures_join_and_replace_earlier_ones() {
        let (_dir, measured) = store();
        let state = Figures { state_mb: Some(20), at_ms: 9, ..Figures::default() };
        for figures in [weights(150), state, weights(151)] {
            measured.record(&t4(), &key("base"), figures).expect("recorded");
        }
        let wanted = Figures { state_mb: Some(20), at_ms: 9, ..weights(151) };
        assert_eq!(measured.lookup(&t4(), &key("base")), Some(wanted));
        for n in 0..300 {
            measured.record(&t4(), &key(&format!("m{n}")), weights(n)).expect("recorded");
        }
        assert_eq!(measured.lookup(&t4(), &key("m299")), Some(weights(299)));
        assert_eq!((measured.lookup(&t4(), &key("base")), measured.lookup(&t4(), &key("m0"))), (None, None));
    }

    #[test]
    fn a_damaged_file_costs_its_figures_and_nothing_else() {
        let (_dir, measured) = store();
        measured.record(&t4(), &key("base"), weights(150)).expect("recorded");
        let path = measured.dir.join("tesla-t4-15360.json");
        let whole = fs::read_to_string(&path).expect("file");
        for damaged in ["", "{", "[]", "{\"device\": 1}", &whole[..whole.len() / 2], &" ".repeat(2 << 20)] {
            fs::write(&path, damaged).expect("written");
            assert_eq!(measured.lookup(&t4(), &key("base")), None);
            assert_eq!(measured.described("T4", 15_360), None);
        }
        fs::write(&path, [0xff, 0xfe]).expect("written");
        measured.record(&t4(), &key("small"), weights(500)).expect("written anew");
        assert_eq!(measured.lookup(&t4(), &key("small")), Some(weights(500)));
        // One entry that is none is passed over, the others stay.
        let one =
            fs::read_to_string(&path).expect("file").replacen("\"measured\": [", "\"measured\": [{\"model\": 7},", 1);
        fs::write(&path, one).expect("written");
        assert_eq!(measured.lookup(&t4(), &key("small")), Some(weights(500)));
    }

    #[test]
    fn writers_wait_for_each_other_and_lose_nothing() {
        let (_dir, measured) = store();
        std::thread::scope(|scope| {
            for writer in 0..4 {
                let measured = measured.clone();
                scope.spawn(move || {
                    for n in 0..20 {
                        measured.record(&t4(), &key(&format!("m{writer}-{n}")), weights(n)).expect("recorded");
                    }
                });
            }
        });
        for (writer, n) in (0..4).flat_map(|writer| (0..20).map(move |n| (writer, n))) {
            assert_eq!(measured.lookup(&t4(), &key(&format!("m{writer}-{n}"))), Some(weights(n)), "{writer} {n}");
        }
        let left: Vec<_> = fs::read_dir(&measured.dir).expect("folder").flatten().map(|e| e.file_name()).collect();
        assert_eq!(left.len(), 2, "the file and its lock: {left:?}");
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_told() {
        let dir = tempfile::tempdir().expect("folder");
        fs::write(dir.path().join("measured"), "a file").expect("file");
        let error = Measured::in_cache(dir.path()).record(&t4(), &key("base"), weights(1)).expect_err("no folder");
        assert!(error.to_string().starts_with("making /"), "{error}");
    }

    #[test]
    fn a_described_card_is_the_measured_one_of_its_name_and_size() {
        let (_dir, measured) = store();
        for (name, total_mb) in
            [("Tesla T4", 15_109), ("NVIDIA A100-SXM4-80GB", 81_920), ("NVIDIA A100-PCIE-40GB", 40_960)]
        {
            measured
                .record(&DeviceKey { name: name.to_owned(), total_mb }, &key("base"), weights(1))
                .expect("recorded");
        }
        for (name, total_mb, wanted) in [
            ("T4", 15_360, Some(15_109)),
            ("tesla t4", 15_360, Some(15_109)),
            ("T4", 16_384, None),
            ("A100", 81_920, Some(81_920)),
            ("A100", 40_960, Some(40_960)),
            ("A100", 61_440, None),
            ("A10", 81_920, None),
            ("", 15_360, None),
        ] {
            assert_eq!(measured.described(name, total_mb).map(|d| d.total_mb), wanted, "{name} {total_mb}");
        }
    }

    #[test]
    fn files_and_the_catalog_name_a_model_alike() {
        let dir = tempfile::tempdir().expect("folder");
        let path = dir.path().join("m.bin");
        assert_eq!(ModelKey::of_file("m", &path), None);
        fs::write(&path, "1234567").expect("file");
        assert_eq!(ModelKey::of_file("m", &path).map(|k| (k.bytes, k.sha256)), Some((7, None)));
        files::write_sum(&path, "ab").expect("sum");
        let here = ModelKey::of_file("m", &path).expect("a key");
        assert_eq!(here, ModelKey { model: "m".to_owned(), version: VERSION.to_owned(), ..key("m") });
        let catalog = super::super::Catalog::built_in().expect("valid");
        let tiny = ModelKey::of_catalog(catalog.get("tiny").expect("there")).expect("a key");
        assert_eq!((tiny.bytes, tiny.sha256.is_some()), (77_691_713, true));
    }
}
