//! Inputs to begin with: fixtures of the whole project, and what was found.

use std::path::{Path, PathBuf};

use crate::Target;

fn root() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
}

/// What is kept for a target: its fixtures, cut to the longest it takes, and its corpus.
pub(crate) fn of(target: &Target) -> Vec<Vec<u8>> {
    let corpus = format!("tests/parsers/corpus/{}", target.name);
    let mut paths: Vec<PathBuf> = target.seeds.iter().flat_map(|seed| files(&root().join(seed))).collect();
    paths.extend(files(&root().join(corpus)));
    let read = |path: PathBuf| {
        let mut bytes = std::fs::read(path).ok()?;
        bytes.truncate(target.max_len);
        Some(bytes)
    };
    paths.into_iter().filter_map(read).collect()
}

/// A file, or the files of a folder in the order of their names.
fn files(path: &Path) -> Vec<PathBuf> {
    if path.is_file() {
        return vec![path.to_owned()];
    }
    let listed = std::fs::read_dir(path).into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path()));
    let mut found: Vec<PathBuf> = listed.filter(|path| path.is_file()).collect();
    found.sort();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_target_has_something_to_begin_with_and_no_seed_is_missing() {
        for target in crate::TARGETS {
            for seed in target.seeds {
                assert!(!files(&root().join(seed)).is_empty(), "{}: {seed} is not there", target.name);
            }
            assert!(!of(target).is_empty(), "{} has no input to begin with", target.name);
        }
    }

    #[test]
    fn the_corpus_is_small_and_belongs_to_targets() {
        let mut bytes = 0;
        for entry in std::fs::read_dir(root().join("tests/parsers/corpus")).expect("the corpus").flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            assert!(crate::TARGETS.iter().any(|target| target.name == name), "{name} is no target");
            bytes += files(&entry.path()).iter().filter_map(|path| path.metadata().ok()).map(|m| m.len()).sum::<u64>();
        }
        assert!(bytes < 1 << 20, "{bytes} bytes");
    }
}
