//! Files that an operator writes: settings and the catalog of models.

use std::{fmt::Debug, io::Write as _};

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use voxfleet_dispatcher::DispatcherConfig;
use voxfleet_nats::NatsConfig;
use voxfleet_store::models::{Catalog, ModelsConfig};
use voxfleet_worker::WorkerConfig;

/// A whole file of settings; unknown sections are other parts'.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct File {
    nats: Section<NatsConfig>,
    dispatcher: Section<DispatcherConfig>,
    worker: Section<WorkerConfig>,
    models: Section<ModelsConfig>,
}

/// A section that is wrong leaves the others to be read.
#[derive(Debug)]
struct Section<T>(Option<T>);

impl<T> Default for Section<T> {
    fn default() -> Self {
        Self(None)
    }
}

impl<'de, T: DeserializeOwned> Deserialize<'de> for Section<T> {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = toml::Value::deserialize(deserializer)?;
        Ok(Self(T::deserialize(value).ok()))
    }
}

/// Settings that are read can be checked, however wrong they are, and shown.
pub(super) fn config(input: &[u8]) -> bool {
    let Ok(file) = toml::from_str::<File>(&String::from_utf8_lossy(input)) else { return false };
    let taken = [
        file.nats.0.map(|c| checked(&c, c.problems())),
        file.dispatcher.0.map(|c| checked(&c, c.problems())),
        file.worker.0.map(|c| checked(&c, c.problems())),
        file.models.0.map(|c| checked(&c, c.problems())),
    ];
    taken.iter().any(Option::is_some)
}

fn checked<T: Serialize + Debug>(config: &T, problems: Vec<String>) {
    assert!(problems.iter().all(|problem| !problem.trim().is_empty()), "a mistake without a word");
    serde_json::to_value(config).expect("what was read can be shown");
}

/// Models that are taken have names of their own and files that stay in their folder.
pub(super) fn catalog(input: &[u8]) -> bool {
    let mut file = tempfile::NamedTempFile::new().expect("a temporary file");
    file.write_all(input).expect("room for it");
    let Ok(catalog) = Catalog::load(Some(file.path())) else { return false };
    for model in catalog.models() {
        assert!(voxfleet_schema::session::is_model_name(&model.name), "{:?}", model.name);
        for file in &model.files {
            let path = std::path::Path::new(&file.file);
            assert!(path.components().count() == 1 && path.file_name().is_some(), "{:?} leads elsewhere", file.file);
            assert!(model.urls(file, &[]).iter().all(|url| url.contains("://")), "{model:?}");
        }
    }
    input.windows(9).any(|part| part == b"[[model]]")
}
