//! Keeping the folder within its quota: what is removed, the least recently used first.

use std::{path::PathBuf, time::SystemTime};

use super::{
    ModelStore,
    catalog::ModelKind,
    error::ModelError,
    files::{self, Lock},
};

/// One thing that takes room.
#[derive(Debug, Clone, PartialEq)]
struct Held {
    name: String,
    paths: Vec<PathBuf>,
    bytes: u64,
    last_used: Option<SystemTime>,
    standing: Standing,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Standing {
    /// Half a model that nobody is pulling.
    Abandoned,
    /// Ours to remove, and to pull again.
    Unused,
    /// In use, being pulled, or put here by somebody else.
    Stays,
}

/// Something that was removed to make room.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Removed {
    pub name: String,
    pub bytes: u64,
}

/// What has to go so that `needed` fits: indices into `held`. None where even all that may go is not enough.
fn to_remove(held: &[Held], needed: u64, quota: u64) -> Option<Vec<usize>> {
    let mut taken: u64 = held.iter().map(|h| h.bytes).sum();
    let mut order: Vec<usize> = (0..held.len()).filter(|at| held[*at].standing != Standing::Stays).collect();
    order.sort_by_key(|at| (held[*at].standing, held[*at].last_used, held[*at].name.clone()));
    let mut gone = Vec::new();
    for at in order {
        if taken.saturating_add(needed) <= quota {
            break;
        }
        taken -= held[at].bytes;
        gone.push(at);
    }
    (taken.saturating_add(needed) <= quota).then_some(gone)
}

impl ModelStore {
    /// Makes room for `needed` bytes of `name`, which is being pulled, and notes that they are spoken for. Blocks.
    pub(super) fn make_room(&self, name: &str, needed: u64, lock: &mut Lock) -> Result<Vec<Removed>, ModelError> {
        let _alone = Lock::store(&self.dir)?;
        let removed = self.within_quota(Some(name), needed)?;
        lock.reserve(needed).map_err(files::io("writing a lock in", &self.dir))?;
        Ok(removed)
    }

    /// Removes half models that nobody is pulling, and then the least recently used ones above the quota. Blocks.
    pub fn gc(&self) -> Result<Vec<Removed>, ModelError> {
        let _alone = Lock::store(&self.dir)?;
        let abandoned: Vec<Held> = self.held(None).into_iter().filter(|h| h.standing == Standing::Abandoned).collect();
        let mut removed = abandoned.iter().map(remove).collect::<Result<Vec<_>, _>>()?;
        removed.extend(self.within_quota(None, 0)?);
        Ok(removed)
    }

    fn within_quota(&self, name: Option<&str>, needed: u64) -> Result<Vec<Removed>, ModelError> {
        if self.quota_bytes == 0 {
            return Ok(Vec::new());
        }
        let held = self.held(name);
        let Some(gone) = to_remove(&held, needed, self.quota_bytes) else {
            // Without a name there is nothing to refuse: what stays, stays.
            let Some(name) = name else { return Ok(Vec::new()) };
            let stays = held.iter().filter(|h| h.standing == Standing::Stays).map(|h| h.bytes).sum();
            return Err(ModelError::Quota { name: name.to_owned(), needed, quota: self.quota_bytes, held: stays });
        };
        gone.into_iter().map(|at| remove(&held[at])).collect()
    }

    /// Everything that takes room, without what belongs to `but`.
    fn held(&self, but: Option<&str>) -> Vec<Held> {
        let mut held = Vec::new();
        for model in self.catalog.models().iter().filter(|m| Some(m.name.as_str()) != but) {
            let name = model.name.clone();
            let mut paths = self.paths(model);
            let mut parts: Vec<PathBuf> = paths.iter().map(|p| files::part_path(p)).collect();
            // What a broken pull left of a folder is half a model, whole files among it.
            if model.folder().is_some() && !paths.last().is_some_and(|p| p.is_file()) {
                parts.extend(paths.drain(..).filter(|p| files::sum_path(p).is_file()));
            }
            let bytes: u64 = paths.iter().map(|p| files::len(p)).sum();
            let part_bytes: u64 = parts.iter().map(|p| files::len(p)).sum();
            if let Some(reserved) = files::reserved(&self.dir, &name) {
                let bytes = reserved.max(part_bytes).max(bytes);
                held.push(Held { name, paths: parts, bytes, last_used: None, standing: Standing::Stays });
                continue;
            }
            if part_bytes > 0 {
                let last_used = parts.iter().filter_map(|p| files::last_used(p)).max();
                let standing = Standing::Abandoned;
                held.push(Held { name: name.clone(), paths: parts, bytes: part_bytes, last_used, standing });
            }
            if bytes > 0 {
                let last_used = paths.iter().filter_map(|p| files::last_used(p)).max();
                // A checksum beside it says that it came through us. The VAD is small, and every session needs it.
                let ours = paths.iter().all(|p| files::sum_path(p).is_file()) && model.kind != ModelKind::Vad;
                let free = ours && !paths.iter().any(|p| files::in_use(p));
                let standing = if free { Standing::Unused } else { Standing::Stays };
                held.push(Held { name, paths, bytes, last_used, standing });
            }
        }
        for (name, path) in self.foreign() {
            let (bytes, last_used) = (files::len(&path), files::last_used(&path));
            held.push(Held { name, paths: vec![path], bytes, last_used, standing: Standing::Stays });
        }
        held
    }
}

fn remove(held: &Held) -> Result<Removed, ModelError> {
    let mut bytes = 0;
    // The weights of a folder first. A part has no checksum beside it.
    for path in held.paths.iter().rev() {
        bytes += files::remove(path)?;
        files::remove(&files::sum_path(path))?;
    }
    files::remove_empty(&held.paths);
    Ok(Removed { name: held.name.clone(), bytes })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn the_least_recently_used_goes_first_and_only_what_has_to() {
        let held = |name: &str, bytes, day: u64, standing| Held {
            name: name.to_owned(),
            paths: Vec::new(),
            bytes,
            last_used: Some(SystemTime::UNIX_EPOCH + Duration::from_secs(day * 86_400)),
            standing,
        };
        let shelf = [
            held("new", 40, 9, Standing::Unused),
            held("old", 30, 1, Standing::Unused),
            held("busy", 20, 0, Standing::Stays),
            held("half", 5, 8, Standing::Abandoned),
        ];
        for (needed, quota, wanted) in [
            (5, 100, Some(vec![])),
            (6, 100, Some(vec![3])),
            (11, 100, Some(vec![3, 1])),
            (41, 100, Some(vec![3, 1, 0])),
            (80, 100, Some(vec![3, 1, 0])),
            (81, 100, None),
            (u64::MAX, 100, None),
            (0, 60, Some(vec![3, 1])),
            (0, 10, None),
        ] {
            assert_eq!(to_remove(&shelf, needed, quota), wanted, "{needed} into {quota}");
        }
    }
}
