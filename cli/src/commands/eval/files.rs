//! Which file of one side belongs to which of the other.

use std::{
    collections::BTreeMap,
    io::Read as _,
    path::{Path, PathBuf},
};

use super::content::Content;
use crate::{
    args::Sides,
    exit::{Exit, OrExit as _, coded},
};

/// Two files of one recording.
#[derive(Debug)]
pub(super) struct Pair {
    /// That of the reference's file, without what follows the first point.
    pub(super) name: String,
    pub(super) reference: File,
    pub(super) heard: File,
}

#[derive(Debug)]
pub(super) struct File {
    /// As people know it.
    pub(super) path: String,
    pub(super) content: Content,
}

impl File {
    /// A file that has not what is needed.
    pub(super) fn refused(&self, error: impl Into<anyhow::Error>) -> anyhow::Error {
        coded(Exit::Input, error.into().context(self.path.clone()))
    }
}

/// `endings` in the order in which they are looked for in folders, for the reference and for what was heard.
pub(super) fn pairs(sides: &Sides, endings: [&[&str]; 2]) -> anyhow::Result<Vec<Pair>> {
    let (reference, heard) = (sides.reference.as_str(), sides.heard.as_str());
    if reference == "-" && heard == "-" {
        return Err(anyhow::anyhow!("only one of the two can come from standard input")).or_exit(Exit::Usage);
    }
    match (Path::new(reference).is_dir(), Path::new(heard).is_dir()) {
        (false, false) => {
            let name = if reference == "-" { heard } else { reference };
            Ok(vec![Pair { name: stem(Path::new(name)), reference: read(reference)?, heard: read(heard)? }])
        }
        (true, true) => {
            let (said, found) = (listed(reference, endings[0])?, listed(heard, endings[1])?);
            if said.is_empty() {
                let wanted = endings[0].join(", ");
                return Err(anyhow::anyhow!("{reference}: no file that ends in {wanted}")).or_exit(Exit::Input);
            }
            let missing: Vec<&str> = said.keys().filter(|n| !found.contains_key(*n)).map(String::as_str).collect();
            if !missing.is_empty() {
                return Err(anyhow::anyhow!("{heard}: nothing for {}", missing.join(", "))).or_exit(Exit::Input);
            }
            let pair = |(name, path): (&String, &PathBuf)| {
                let heard = read(&found[name].display().to_string())?;
                Ok(Pair { name: name.clone(), reference: read(&path.display().to_string())?, heard })
            };
            said.iter().map(pair).collect()
        }
        _ => Err(anyhow::anyhow!("REF and HYP are two files or two folders, not one of each")).or_exit(Exit::Usage),
    }
}

/// Up to the first point: `call-01.heard.json` belongs to `call-01.txt`.
fn stem(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    name.split('.').next().unwrap_or_default().to_owned()
}

/// Files of a folder by name; of two of one name the one whose ending stands first.
fn listed(folder: &str, endings: &[&str]) -> anyhow::Result<BTreeMap<String, PathBuf>> {
    let named = |error: std::io::Error| coded(Exit::Input, anyhow::Error::new(error).context(folder.to_owned()));
    let mut found: BTreeMap<String, (usize, PathBuf)> = BTreeMap::new();
    for entry in std::fs::read_dir(folder).map_err(named)? {
        let path = entry.map_err(named)?.path();
        let ending = path.extension().unwrap_or_default().to_string_lossy().to_lowercase();
        let Some(rank) = endings.iter().position(|e| *e == ending).filter(|_| path.is_file()) else { continue };
        let name = stem(&path);
        if name.is_empty() || found.get(&name).is_some_and(|(known, _)| *known <= rank) {
            continue;
        }
        found.insert(name, (rank, path));
    }
    Ok(found.into_iter().map(|(name, (_, path))| (name, path)).collect())
}

pub(super) fn read(path: &str) -> anyhow::Result<File> {
    let mut text = String::new();
    let read = if path == "-" {
        std::io::stdin().read_to_string(&mut text).map(|_| text)
    } else {
        std::fs::read_to_string(path)
    };
    let path = if path == "-" { "standard input" } else { path }.to_owned();
    let named = |error: anyhow::Error| coded(Exit::Input, error.context(path.clone()));
    let content = Content::of(&read.map_err(|error| named(error.into()))?).map_err(|error| named(error.into()))?;
    Ok(File { path, content })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_are_paired_by_name() {
        let dir = tempfile::tempdir().expect("folder");
        let (said, heard) = (dir.path().join("said"), dir.path().join("heard"));
        for folder in [&said, &heard] {
            std::fs::create_dir(folder).expect("folder");
        }
        for name in ["b.txt", "a.json", "a.txt", "README.md", "c.flac"] {
            std::fs::write(said.join(name), "one two").expect("file");
        }
        std::fs::write(heard.join("a.heard.txt"), "one").expect("file");
        let sides = |reference: &Path, heard: &Path| Sides {
            reference: reference.display().to_string(),
            heard: heard.display().to_string(),
        };
        let endings: [&[&str]; 2] = [&["txt", "json"], &["txt", "json"]];
        let told = pairs(&sides(&said, &heard), endings).expect_err("one is missing");
        assert!(told.to_string().ends_with("nothing for b"), "{told}");
        std::fs::write(heard.join("b.txt"), "two").expect("file");
        let found = pairs(&sides(&said, &heard), endings).expect("pairs");
        let names: Vec<_> = found.iter().map(|p| (p.name.as_str(), p.reference.path.ends_with("a.txt"))).collect();
        assert_eq!(names, [("a", true), ("b", false)]);
        let one = pairs(&sides(&said.join("a.txt"), &heard.join("b.txt")), endings).expect("two files");
        assert_eq!((one.len(), one[0].name.as_str()), (1, "a"));
        let code = |sides: &Sides| crate::exit::exit_of(&pairs(sides, endings).expect_err("refused"));
        assert_eq!(code(&sides(&said, &heard.join("b.txt"))), Exit::Usage);
        assert_eq!(code(&sides(Path::new("-"), Path::new("-"))), Exit::Usage);
        assert_eq!(code(&sides(&said.join("none.txt"), &heard.join("b.txt"))), Exit::Input);
        assert_eq!(code(&sides(&heard.join("a.heard.txt"), &said.join("a.txt").join("x"))), Exit::Input);
    }
}
