//! Models that are to be here before somebody asks for them: fetched beside the work, one after the other, without delaying
//! the start.
//!
//! A model on its way, or one that cannot be had, is a state that heartbeats tell and assignments are refused by; it never
//! ends the worker. What failed is tried again, after longer and longer pauses, until it is here or the worker stops.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use tokio::{
    sync::{Notify, watch},
    time::sleep,
};
use tokio_util::sync::CancellationToken;
use voxfleet_schema::{
    failure::{Failure, FailureClass},
    fleet::{ModelState, Residency},
};
use voxfleet_store::models::{ModelStore, Step};

use crate::ipc::ModelFile;

/// After the first failure; each further one doubles it.
const FIRST_PAUSE: Duration = Duration::from_secs(5);
const LONGEST_PAUSE: Duration = Duration::from_secs(600);
/// Progress is logged each time so many percent more are here.
const TELL_PERCENT: u64 = 25;

/// Why a model cannot be used yet.
#[derive(Debug, Clone, PartialEq)]
enum Absence {
    Fetching { percent: u64 },
    Missing(Failure),
}

/// What is known of the models that are not here yet. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Stock {
    absent: Arc<watch::Sender<BTreeMap<String, Absence>>>,
    news: Arc<Notify>,
}

impl Stock {
    /// `news` is told when something came or failed.
    pub(crate) fn new(news: Arc<Notify>) -> Self {
        Self { absent: Arc::new(watch::Sender::new(BTreeMap::new())), news }
    }

    /// Why a session for this model has to be refused; none when its file is here.
    pub(crate) fn refusal(&self, model: &str) -> Option<Failure> {
        self.absent.borrow().get(model).map(|absence| absence.failure(model))
    }

    /// Waits until the model's file is here.
    pub(crate) async fn here(&self, model: &str) {
        // The sender lives as long as this.
        let _ = self.absent.subscribe().wait_for(|absent| !absent.contains_key(model)).await;
    }

    /// Puts what is known here over what the engine says of files that it does not see.
    pub(crate) fn overlay(&self, models: &mut [ModelState]) {
        let absent = self.absent.borrow();
        for model in models {
            if let Some(absence) = absent.get(&model.name) {
                model.state = absence.state();
                model.failure = Some(absence.failure(&model.name));
            }
        }
    }

    fn set(&self, model: &str, absence: Option<Absence>) {
        self.absent.send_modify(|absent| {
            match absence {
                Some(absence) => absent.insert(model.to_owned(), absence),
                None => absent.remove(model),
            };
        });
        self.news.notify_one();
    }

    #[cfg(test)]
    pub(crate) fn fetching(&self, model: &str) {
        self.set(model, Some(Absence::Fetching { percent: 0 }));
    }

    #[cfg(test)]
    pub(crate) fn arrived(&self, model: &str) {
        self.set(model, None);
    }

    /// Fetches what is not here, until all of it is or `stop`. What is here as a model folder is here.
    pub(crate) async fn fetch(&self, store: ModelStore, wanted: Vec<ModelFile>, stop: CancellationToken) {
        let mut missing: Vec<ModelFile> = wanted.into_iter().filter(|file| !file.path.exists()).collect();
        for file in &missing {
            self.set(&file.name, Some(Absence::Fetching { percent: 0 }));
        }
        let mut pause = FIRST_PAUSE;
        while !missing.is_empty() && !stop.is_cancelled() {
            let mut left = Vec::new();
            for file in missing {
                if !self.bring(&store, &file, &stop).await {
                    left.push(file);
                }
            }
            missing = left;
            if missing.is_empty() {
                return;
            }
            tokio::select! {
                () = stop.cancelled() => return,
                () = sleep(pause) => {}
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// Says whether it is here now.
    async fn bring(&self, store: &ModelStore, file: &ModelFile, stop: &CancellationToken) -> bool {
        let name = &file.name;
        tracing::info!(model = %name, "fetching a model");
        let mut told = 0;
        let mut watch = |step: Step<'_>| {
            if let Some(percent) = percent(&step)
                && percent >= told + TELL_PERCENT
            {
                told = percent;
                tracing::info!(model = %name, percent, "model is being fetched");
                self.set(name, Some(Absence::Fetching { percent }));
            }
        };
        let failure = match store.pull(name, &mut watch, stop).await {
            Ok(pulled) if file.path.is_file() => {
                let bytes: u64 = pulled.iter().map(|p| p.bytes).sum();
                tracing::info!(model = %name, bytes, "model fetched");
                self.set(name, None);
                return true;
            }
            Ok(_) => Failure::new(
                FailureClass::ModelMissing,
                format!("it was fetched, and is not at {}: models.dir names another folder", file.path.display()),
            ),
            // The worker stops.
            Err(_) if stop.is_cancelled() => return false,
            Err(error) => error.failure(),
        };
        tracing::error!(model = %name, %failure, "model cannot be fetched, trying again later");
        self.set(name, Some(Absence::Missing(failure)));
        false
    }
}

impl Absence {
    fn state(&self) -> Residency {
        match self {
            Absence::Fetching { .. } => Residency::Fetching,
            Absence::Missing(_) => Residency::Missing,
        }
    }

    fn failure(&self, model: &str) -> Failure {
        match self {
            Absence::Fetching { percent } => Failure {
                retry_after_ms: Some(FIRST_PAUSE.as_millis() as u64),
                ..Failure::new(
                    FailureClass::NoCapacity,
                    format!("model {model} is being fetched, {percent} % are here"),
                )
            },
            Absence::Missing(failure) => Failure::new(
                FailureClass::ModelMissing,
                format!("model {model} cannot be fetched: {}", failure.message),
            ),
        }
    }
}

/// How much of its file is here, where its length is known.
fn percent(step: &Step<'_>) -> Option<u64> {
    match step {
        Step::Got { bytes, total: Some(total) } if *total > 0 => Some(bytes * 100 / total),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use voxfleet_store::{
        fetch::{FetchConfig, Fetcher},
        models::Catalog,
    };

    use super::*;

    const SUM: &str = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824";

    /// A store in `dir` whose one model, `m`, is the file `hello` of `source`.
    fn store(dir: &Path, source: &Path) -> ModelStore {
        let text = format!(
            "[[model]]\nname = \"m\"\nkind = \"whisper\"\nlicence = \"MIT\"\nmultilingual = false\nexpected_mb = 1\n\
             state_mb = 1\nsources = [\"file://{}/{{file}}\"]\n[[model.files]]\nfile = \"m.bin\"\nbytes = 5\nsha256 = \"{SUM}\"\n",
            source.display()
        );
        let path = dir.join("models.toml");
        std::fs::write(&path, text).expect("catalog");
        let catalog = Catalog::load(Some(&path)).expect("catalog");
        let fetcher = Fetcher::trusted_with(FetchConfig::default()).expect("fetcher");
        ModelStore::open(dir.to_owned(), 0, catalog, fetcher, false)
    }

    #[tokio::test]
    async fn a_model_folder_is_here() {
        let dir = tempfile::tempdir().expect("dir");
        let wanted = vec![ModelFile { name: "m".to_owned(), path: dir.path().join("m-ct2") }];
        std::fs::create_dir(&wanted[0].path).expect("folder");
        let stock = Stock::new(Arc::default());
        stock.fetch(store(dir.path(), dir.path()), wanted, CancellationToken::new()).await;
        assert_eq!(stock.refusal("m"), None);
    }

    #[tokio::test(start_paused = true)]
    async fn what_cannot_be_had_is_said_and_tried_until_it_is_here() {
        let (dir, source) = (tempfile::tempdir().expect("dir"), tempfile::tempdir().expect("dir"));
        let stock = Stock::new(Arc::default());
        let wanted = vec![ModelFile { name: "m".to_owned(), path: dir.path().join("m.bin") }];
        let stop = CancellationToken::new();
        assert_eq!(stock.refusal("m"), None, "nothing is known against it");
        let fetching = stock.fetch(store(dir.path(), source.path()), wanted, stop.clone());
        tokio::pin!(fetching);
        let missing = async {
            loop {
                match stock.refusal("m") {
                    Some(failure) if failure.class == FailureClass::ModelMissing => break failure,
                    _ => tokio::task::yield_now().await,
                }
            }
        };
        let failure = tokio::select! {
            () = &mut fetching => panic!("it is not here"),
            failure = missing => failure,
        };
        assert!(failure.message.contains("m cannot be fetched"), "{failure}");
        let mut models = [ModelState { name: "m".to_owned(), ..ModelState::default() }];
        stock.overlay(&mut models);
        assert_eq!(models[0].state, Residency::Missing);
        assert_eq!(models[0].failure.as_ref().map(|f| f.class), Some(FailureClass::ModelMissing));

        std::fs::write(source.path().join("m.bin"), "hello").expect("source");
        let here = stock.here("m");
        tokio::pin!(here);
        tokio::select! {
            () = &mut fetching => {}
            () = &mut here => fetching.await,
        }
        assert_eq!(stock.refusal("m"), None);
        assert_eq!(std::fs::read(dir.path().join("m.bin")).expect("model"), b"hello");
        let mut models = [ModelState { name: "m".to_owned(), ..ModelState::default() }];
        stock.overlay(&mut models);
        assert_eq!(models[0].state, Residency::Available);
    }
}
