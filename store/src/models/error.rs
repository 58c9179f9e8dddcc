//! What can go wrong with models, in words that say what to do.

use std::path::PathBuf;

use voxfleet_schema::failure::{Failure, FailureClass};

use super::catalog::CatalogError;

/// What came of one source.
#[derive(Debug, Clone, PartialEq)]
pub struct SourceFailure {
    /// Without its query.
    pub url: String,
    pub failure: Failure,
}

#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    #[error("no model is called {name:?}{}; `voxfleet models list` shows them all", similar(like))]
    Unknown { name: String, like: Vec<String> },
    #[error(
        "model {name} is not here and nothing is fetched offline; run `voxfleet models pull {name}` on a machine with a \
         network and copy {} into {}, or name a folder that has it in models.mirrors (file:///...)",
        files.join(", "), dir.display()
    )]
    Offline { name: String, files: Vec<String>, dir: PathBuf },
    #[error("model {name} cannot be had:{}", told(failures))]
    Sources { name: String, failures: Vec<SourceFailure> },
    #[error(
        "no room for {file} in {}: {needed} bytes are needed, {} are free; free some, or choose another folder (models.dir)",
        dir.display(), free.map_or_else(|| "too few".to_owned(), |f| f.to_string())
    )]
    DiskFull { file: String, dir: PathBuf, needed: u64, free: Option<u64> },
    #[error(
        "model {name} needs {needed} bytes; the quota is {quota} bytes (models.quota_gb), and {held} of it belong to models \
         that are in use, being pulled, or not ours to remove"
    )]
    Quota { name: String, needed: u64, quota: u64, held: u64 },
    #[error("model {name} is in use or being pulled by another process")]
    InUse { name: String },
    #[error("model {name} is not here")]
    NotHere { name: String },
    #[error("stopped before {file} was whole{}", kept_text(*kept))]
    Cancelled { file: String, kept: u64 },
    #[error("{what} {}", path.display())]
    Io {
        what: &'static str,
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("the thread that writes the model ended early")]
    Writer,
    #[error(transparent)]
    Catalog(#[from] CatalogError),
}

fn similar(like: &[String]) -> String {
    match like.is_empty() {
        true => String::new(),
        false => format!(" (there is {})", like.join(", ")),
    }
}

fn kept_text(kept: u64) -> String {
    match kept {
        0 => String::new(),
        kept => format!("; {kept} bytes are kept, and the next pull goes on from there"),
    }
}

fn told(failures: &[SourceFailure]) -> String {
    let line = |f: &SourceFailure| match f.failure.message.starts_with(&f.url) {
        true => format!("\n  {}", f.failure.message),
        false => format!("\n  {}: {}", f.url, f.failure.message),
    };
    failures.iter().map(line).collect()
}

impl ModelError {
    pub fn class(&self) -> FailureClass {
        match self {
            ModelError::Unknown { .. } | ModelError::Offline { .. } | ModelError::NotHere { .. } => {
                FailureClass::ModelMissing
            }
            // One class for all of them, else the one that trying again may mend.
            ModelError::Sources { failures, .. } => match failures.split_first() {
                Some((first, rest)) if rest.iter().all(|f| f.failure.class == first.failure.class) => {
                    first.failure.class
                }
                _ => FailureClass::Unavailable,
            },
            ModelError::Quota { .. } => FailureClass::TooLarge,
            ModelError::InUse { .. } => FailureClass::BadRequest,
            ModelError::Cancelled { .. } => FailureClass::Cancelled,
            ModelError::DiskFull { .. } | ModelError::Io { .. } | ModelError::Writer | ModelError::Catalog(_) => {
                FailureClass::Internal
            }
        }
    }

    pub fn failure(&self) -> Failure {
        Failure::new(self.class(), self.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_that_fail_alike_keep_their_class() {
        let failed = |classes: &[FailureClass]| ModelError::Sources {
            name: "m".to_owned(),
            failures: classes
                .iter()
                .map(|c| SourceFailure { url: "https://h/m".to_owned(), failure: Failure::new(*c, "why") })
                .collect(),
        };
        assert_eq!(failed(&[FailureClass::NotFound, FailureClass::NotFound]).class(), FailureClass::NotFound);
        assert_eq!(failed(&[FailureClass::NotFound, FailureClass::Timeout]).class(), FailureClass::Unavailable);
        assert_eq!(failed(&[FailureClass::Forbidden]).to_string(), "model m cannot be had:\n  https://h/m: why");
    }
}
