//! Models that are loaded before anybody needs them: each at most once at a time, however often that is asked for.
//!
//! A model may have to be fetched first, which can take hours: whatever spoke for the load or against it is looked at again
//! when its file is here.

use std::{
    collections::HashSet,
    sync::{Arc, Mutex},
};

use super::relief::Relief;
use crate::{capacity::locked, lifecycle::Engine, stock::Stock};

/// Those on their way. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(super) struct Ahead(Arc<Mutex<HashSet<String>>>);

/// One of them; dropped, it may be asked for again.
#[derive(Debug)]
pub(super) struct Coming {
    model: String,
    all: Ahead,
}

impl Ahead {
    /// None: it is on its way already.
    pub(super) fn begin(&self, model: &str) -> Option<Coming> {
        let new = locked(&self.0).insert(model.to_owned());
        new.then(|| Coming { model: model.to_owned(), all: self.clone() })
    }
}

impl Coming {
    /// Waits for its file, then loads it, unless others need the device by then.
    pub(super) async fn load(self, engine: &Engine, stock: &Stock, relief: &Relief) {
        let model = &self.model;
        stock.here(model).await;
        if let Some(failure) = relief.refusal() {
            tracing::info!(model, %failure, "model not loaded ahead");
            return;
        }
        if let Err(error) = engine.load(model.clone()).await {
            tracing::warn!(model, %error, "model not loaded ahead");
        }
    }
}

impl Drop for Coming {
    fn drop(&mut self) {
        locked(&self.all.0).remove(&self.model);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    #[test]
    fn a_model_is_on_its_way_once() {
        let ahead = Ahead::default();
        let first = ahead.begin("small").expect("the first");
        assert!(ahead.begin("small").is_none() && ahead.begin("base").is_some());
        drop(first);
        assert!(ahead.begin("small").is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn what_others_need_by_the_time_its_file_is_here_is_left_to_them() {
        let (engine, _figures) = crate::lifecycle::tests::engine(&["small"], true);
        let (stock, relief) = (Stock::new(Arc::default()), Relief::default());
        let load = |relief| {
            let coming = Ahead::default().begin("small").expect("the first");
            timeout(Duration::from_secs(60), coming.load(&engine, &stock, relief))
        };
        stock.fetching("small");
        let fetched = async {
            tokio::time::sleep(Duration::from_secs(1)).await;
            relief.press();
            stock.arrived("small");
        };
        let (loaded, ()) = tokio::join!(load(&relief), fetched);
        assert!(loaded.is_ok(), "it asks for no engine");
        assert!(load(&Relief::default()).await.is_err(), "where nobody presses, it waits for one");
    }
}
