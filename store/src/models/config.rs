//! Settings of the local store.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use voxfleet_schema::job::AudioUrl;

use super::catalog::Catalog;

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ModelsConfig {
    /// Where models are kept; `models` in the cache folder when there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dir: Option<PathBuf>,
    /// What all models together may take, in GB. 0 = no limit: whoever pulls a model wants it, and only the operator
    /// knows whether the disk is shared.
    pub quota_gb: f64,
    /// Nothing from the network: only what is here, or in a `file://` source.
    pub offline: bool,
    /// Asked before a model's own sources, in this order. `{file}` stands for the name of the file; without it the name is
    /// added at the end.
    pub mirrors: Vec<String>,
    /// Further models, or others in place of the built-in ones.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub catalog: Option<PathBuf>,
    /// Certificates to trust beside the well-known ones, for a mirror of one's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca_file: Option<PathBuf>,
}

impl ModelsConfig {
    /// Every mistake, named by its field.
    pub fn problems(&self) -> Vec<String> {
        let mut found = Vec::new();
        if !(self.quota_gb.is_finite() && self.quota_gb >= 0.0) {
            found.push(format!("models.quota_gb: {} is not a size", self.quota_gb));
        }
        for mirror in &self.mirrors {
            let shown = AudioUrl::harmless(mirror);
            match AudioUrl::parse(&mirror.replace("{file}", "x")) {
                Ok(AudioUrl::Object { .. }) => {
                    found.push(format!("models.mirrors: {shown}: the object store of NATS holds no models"));
                }
                // A bucket alone is a good mirror: the name of the file is what is missing.
                Err(_) if AudioUrl::parse(&format!("{mirror}/x")).is_ok() => {}
                Ok(_) => {}
                Err(_) => found.push(format!("models.mirrors: {shown}: use https://, s3:// or file:///")),
            }
        }
        if let Some(path) = &self.ca_file
            && !path.is_file()
        {
            found.push(format!("models.ca_file: {} is not a file", path.display()));
        }
        if let Err(error) = Catalog::load(self.catalog.as_deref()) {
            found.push(format!("models.catalog: {error}"));
        }
        found
    }

    /// The folder, given the cache folder of this user.
    pub fn folder(&self, cache: Option<&Path>) -> Option<PathBuf> {
        self.dir.clone().or_else(|| Some(cache?.join("models")))
    }

    /// 0 = no limit.
    pub fn quota_bytes(&self) -> u64 {
        // Decimal, as disks are sold; saturates at what a u64 holds.
        (self.quota_gb.max(0.0) * 1e9) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_has_no_problem_and_every_mistake_is_named() {
        assert_eq!(ModelsConfig::default().problems(), Vec::<String>::new());
        let good =
            ["https://m/models", "s3://bucket", "s3://bucket/{file}", "file:///mnt/models", "http://10.0.0.1:8000"];
        let config = ModelsConfig { mirrors: good.map(str::to_owned).to_vec(), ..ModelsConfig::default() };
        assert_eq!(config.problems(), Vec::<String>::new());
        let secret = ["ftp://u:hunter2@m", "object://asr_media/x?hunter2"].map(str::to_owned).to_vec();
        let problems = ModelsConfig { mirrors: secret, ..ModelsConfig::default() }.problems();
        assert!(problems.len() == 2 && !problems.concat().contains("hunter2"), "{problems:?}");
        let bad = ModelsConfig {
            quota_gb: f64::NAN,
            mirrors: vec!["ftp://m".to_owned(), "models".to_owned(), "object://asr_media/x".to_owned()],
            catalog: Some("/nowhere/models.toml".into()),
            ca_file: Some("/nowhere/ca.pem".into()),
            ..ModelsConfig::default()
        };
        let problems = bad.problems();
        for field in
            ["models.quota_gb:", "ftp://m", "mirrors: models:", "object store", "models.catalog:", "models.ca_file:"]
        {
            assert!(problems.iter().any(|p| p.contains(field)), "{field} not in {problems:?}");
        }
    }

    #[test]
    fn the_folder_is_in_the_cache_unless_named() {
        let config = ModelsConfig::default();
        assert_eq!(config.folder(Some(Path::new("/c"))), Some("/c/models".into()));
        assert_eq!(config.folder(None), None);
        let named = ModelsConfig { dir: Some("/m".into()), quota_gb: 1.5, ..config };
        assert_eq!((named.folder(None), named.quota_bytes()), (Some("/m".into()), 1_500_000_000));
    }
}
