//! Models by name: a catalog of what there is, and a folder of what is here.
//!
//! A file stands under its own name only once it is whole and its checksum is right; until then it is `<file>.part`, from
//! which the next pull goes on, also after a crash. Beside each model that came through here lies `<file>.sha256`, which
//! the engine compares at each load. Where nobody published a checksum the first one seen is kept and holds from then on.
//! Any number of processes may use one folder at once.
//!
//! A model that is a folder ([`ModelKind::WhisperCt2`]) has its files in a sub-folder of its name, the weights last: a folder
//! without them is no model. One under a catalog's name that did not come through here (`voxfleet models convert` makes
//! such) is its owner's: listed and removed as it is, compared with nothing, and replaced only by a pull of that name. Checksums
//! of the other files of a folder are compared by pulls and by [`ModelStore::verify`], not at each load.
//!
//! | module | holds |
//! |---|---|
//! | [`catalog`] | `models.toml`: names, files, checksums, memory, sources |
//! | [`config`] | settings of the folder |
//! | `pull` | bringing a model here |
//! | `room` | the quota, and who has to go for it |
//! | `files` | locks, checksums beside files, free space |
//! | [`measured`] | what models were found to need of a device |
//! | [`plan`] | which models and how many sessions a device, or a fleet of them, can hold; pure |

pub mod catalog;
pub mod config;
mod error;
mod files;
pub mod measured;
pub mod plan;
mod pull;
mod room;

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::SystemTime,
};

use self::catalog::WEIGHTS;
pub use self::{
    catalog::{Catalog, CatalogError, Model, ModelFile, ModelKind},
    config::ModelsConfig,
    error::{ModelError, SourceFailure},
    files::InUse,
    measured::{DeviceKey, Figures, Measured, ModelKey},
    pull::{Pulled, Step},
    room::Removed,
};
use crate::fetch::Fetcher;

/// The folder of models. Cheap to clone.
#[derive(Clone)]
pub struct ModelStore {
    dir: Arc<Path>,
    /// 0 = no limit.
    quota_bytes: u64,
    catalog: Arc<Catalog>,
    fetcher: Fetcher,
    mirrors: Arc<[String]>,
    offline: bool,
}

/// What is here of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Presence {
    Present,
    /// A pull broke off, or goes on.
    Partial,
    Missing,
}

impl Presence {
    pub fn as_str(self) -> &'static str {
        match self {
            Presence::Present => "present",
            Presence::Partial => "partial",
            Presence::Missing => "missing",
        }
    }
}

/// A model as it is listed.
#[derive(Debug, Clone)]
pub struct Listed {
    pub name: String,
    /// None for a file in the folder that no catalog knows.
    pub model: Option<Model>,
    pub presence: Presence,
    /// On the disk now.
    pub bytes: u64,
    pub last_used: Option<SystemTime>,
    /// Some worker holds it.
    pub in_use: bool,
    /// A checksum stands beside it.
    pub has_checksum: bool,
}

/// What a checksum says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// As the catalog says.
    Good,
    /// As it was when it came here; nobody published a checksum.
    AsAtFirst,
    /// There is nothing to compare with.
    NoChecksum,
    Damaged {
        expected: String,
        found: String,
    },
    Missing,
}

impl Verdict {
    pub fn is_good(&self) -> bool {
        matches!(self, Verdict::Good | Verdict::AsAtFirst | Verdict::NoChecksum)
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verified {
    pub name: String,
    pub path: PathBuf,
    pub verdict: Verdict,
}

impl ModelStore {
    /// Touches nothing yet: the folder is made by the first pull.
    pub fn open(dir: PathBuf, quota_bytes: u64, catalog: Catalog, fetcher: Fetcher, offline: bool) -> Self {
        Self { dir: dir.into(), quota_bytes, catalog: Arc::new(catalog), fetcher, mirrors: Arc::new([]), offline }
    }

    /// Asked before the catalog's own sources.
    #[must_use]
    pub fn with_mirrors(self, mirrors: &[String]) -> Self {
        Self { mirrors: mirrors.into(), ..self }
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    pub fn catalog(&self) -> &Catalog {
        &self.catalog
    }

    /// The catalog's models in its order, then what else lies in the folder. Blocks.
    pub fn list(&self) -> Vec<Listed> {
        let of = |name: &str, model: Option<&Model>, paths: &[PathBuf]| {
            let present = !paths.is_empty() && paths.iter().all(|p| p.is_file());
            let here: u64 = paths.iter().map(|p| files::len(p).max(files::len(&files::part_path(p)))).sum();
            let presence = match (present, here) {
                (true, _) => Presence::Present,
                (false, 0) if files::reserved(&self.dir, name).is_none() => Presence::Missing,
                (false, _) => Presence::Partial,
            };
            Listed {
                name: name.to_owned(),
                model: model.cloned(),
                presence,
                bytes: if present { paths.iter().map(|p| files::len(p)).sum() } else { here },
                last_used: paths.iter().filter_map(|p| files::last_used(p)).max(),
                in_use: paths.iter().any(|p| files::in_use(p)),
                has_checksum: present && paths.iter().all(|p| files::sum_path(p).is_file()),
            }
        };
        let known = self.catalog.models().iter().map(|m| of(&m.name, Some(m), &self.paths(m)));
        let foreign = self.foreign().into_iter().map(|(name, path)| of(&name, None, &[path]));
        known.chain(foreign).collect()
    }

    /// The model's file or folder, if it is here whole; notes that it is used. Blocks.
    pub fn locate(&self, name: &str) -> Option<PathBuf> {
        let model = self.catalog.get(name);
        let folder = model.and_then(Model::folder).map(|folder| self.dir.join(folder));
        let file = match (&folder, model) {
            (Some(folder), _) => folder.join(WEIGHTS),
            (None, Some(model)) => self.dir.join(&model.files.first()?.file),
            (None, None) => self.foreign().into_iter().find(|(stem, _)| stem == name)?.1,
        };
        file.is_file().then(|| {
            files::touch_path(&file);
            folder.unwrap_or(file)
        })
    }

    /// Reads a model, or all that are here, and compares checksums. Blocks for as long as reading takes.
    pub fn verify(&self, name: Option<&str>) -> Result<Vec<Verified>, ModelError> {
        let mut verified = Vec::new();
        let wanted = |other: &str| name.is_none_or(|name| name == other);
        for model in self.catalog.models().iter().filter(|m| wanted(&m.name)) {
            let at = |file: &ModelFile| self.dir.join(model.place(file));
            // Without the last of its files it is not here yet.
            if name.is_none() && !model.files.last().is_some_and(|file| at(file).is_file()) {
                continue;
            }
            let own = self.own_folder(model).is_some();
            for file in &model.files {
                let path = at(file);
                let verdict = match judge(&path, file.sha256.as_deref())? {
                    Verdict::Missing if own => continue,
                    // It need not be the catalog's.
                    Verdict::Damaged { .. } if own => Verdict::NoChecksum,
                    verdict => verdict,
                };
                verified.push(Verified { name: model.name.clone(), path, verdict });
            }
        }
        for (stem, path) in self.foreign().into_iter().filter(|(stem, _)| wanted(stem)) {
            let verdict = judge(&path, None)?;
            verified.push(Verified { name: stem, path, verdict });
        }
        match (name, verified.is_empty()) {
            (Some(name), true) => Err(self.unknown(name)),
            _ => Ok(verified),
        }
    }

    /// Removes a model, or what a broken pull left of it. Gives the bytes that are free again. Blocks.
    pub fn rm(&self, name: &str) -> Result<u64, ModelError> {
        let paths = match self.catalog.get(name) {
            Some(model) => self.paths(model),
            None => self.foreign().into_iter().filter(|(stem, _)| stem == name).map(|(_, path)| path).collect(),
        };
        if paths.is_empty() {
            return Err(self.unknown(name));
        }
        if !paths.iter().any(|p| p.is_file() || files::part_path(p).is_file()) {
            return Err(ModelError::NotHere { name: name.to_owned() });
        }
        let in_use = || ModelError::InUse { name: name.to_owned() };
        let _alone = files::Lock::model(&self.dir, name)?.ok_or_else(in_use)?;
        if paths.iter().any(|p| files::in_use(p)) {
            return Err(in_use());
        }
        let mut bytes = 0;
        for path in paths.iter().rev() {
            bytes += files::remove(path)? + files::remove(&files::part_path(path))?;
            files::remove(&files::sum_path(path))?;
        }
        files::remove_empty(&paths);
        Ok(bytes)
    }

    /// Its files in the order in which they come, whether they are here or not; of somebody's own folder those that are.
    fn paths(&self, model: &Model) -> Vec<PathBuf> {
        let Some(folder) = self.own_folder(model) else {
            return model.files.iter().map(|f| self.dir.join(model.place(f))).collect();
        };
        let entries = fs::read_dir(folder).into_iter().flatten().flatten();
        let mut paths: Vec<PathBuf> = entries.map(|entry| entry.path()).filter(|path| path.is_file()).collect();
        paths.sort_by_key(|path| path.ends_with(WEIGHTS));
        paths
    }

    /// A whole folder under this model's name that did not come through here: what does has a checksum beside it.
    fn own_folder(&self, model: &Model) -> Option<PathBuf> {
        let folder = self.dir.join(model.folder()?);
        let weights = folder.join(WEIGHTS);
        (weights.is_file() && !files::sum_path(&weights).is_file()).then_some(folder)
    }

    fn unknown(&self, name: &str) -> ModelError {
        let like = self.catalog.like(name).into_iter().map(str::to_owned).collect();
        ModelError::Unknown { name: name.to_owned(), like }
    }

    /// Whisper models in the folder that no catalog knows, by their stems.
    fn foreign(&self) -> Vec<(String, PathBuf)> {
        let known = |file: &str| self.catalog.models().iter().any(|m| m.files.iter().any(|f| m.place(f) == file));
        // No folder, no models.
        let entries = fs::read_dir(&self.dir).into_iter().flatten().flatten();
        let mut found: Vec<(String, PathBuf)> = entries
            .filter_map(|entry| {
                let name = entry.file_name().into_string().ok()?;
                let stem = name.strip_suffix(".bin").filter(|s| !s.is_empty() && !s.starts_with('.'))?;
                (!known(&name) && entry.path().is_file()).then(|| (stem.to_owned(), entry.path()))
            })
            .collect();
        found.sort();
        found
    }
}

/// Compares a file with the catalog's checksum and with the one beside it, which the engine goes by.
fn judge(path: &Path, published: Option<&str>) -> Result<Verdict, ModelError> {
    if !path.is_file() {
        return Ok(Verdict::Missing);
    }
    let beside = files::read_sum(path)?;
    if published.is_none() && beside.is_none() {
        return Ok(Verdict::NoChecksum);
    }
    let found = files::sha256(path)?;
    match [published, beside.as_deref()].into_iter().flatten().find(|sum| *sum != found) {
        Some(expected) => Ok(Verdict::Damaged { expected: expected.to_owned(), found }),
        None if published.is_some() => Ok(Verdict::Good),
        None => Ok(Verdict::AsAtFirst),
    }
}

#[cfg(test)]
mod tests;
