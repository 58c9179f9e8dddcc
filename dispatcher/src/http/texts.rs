//! The end of what each live session has said, for lists: read while somebody looks at one, and only then.

use std::{
    collections::HashMap,
    sync::{Arc, RwLock},
    time::{Duration, Instant},
};

use tokio_util::sync::CancellationToken;
use voxfleet_nats::{
    Nats, ServerError,
    retry::Backoff,
    transcript::{self, Filter, Start},
};
use voxfleet_schema::{
    id::{Kind, StreamId},
    transcript::{Final, Partial, join_text},
};

use super::interest::{self, Interest};

/// Characters shown of a session.
const SHOWN: usize = 160;
/// Sessions kept; ended ones go with their end, others when room is needed.
const MOST: usize = 100_000;
/// As long as the longest that a session may idle.
const SILENT: Duration = Duration::from_secs(1_800);

#[derive(Debug, Default)]
struct Said {
    heard: Option<Instant>,
    /// The end of its finals.
    finals: String,
    after_index: Option<u64>,
    epoch: u64,
    /// Of the partial behind them.
    tail: String,
    words: usize,
}

/// What sessions have said last. Pure.
#[derive(Debug, Default)]
pub(crate) struct Texts {
    said: HashMap<StreamId, Said>,
}

impl Texts {
    pub(crate) fn end_of(&self, id: &StreamId) -> String {
        let Some(said) = self.said.get(id) else { return String::new() };
        ending(&format!("{} {}", said.finals, said.tail))
    }

    pub(crate) fn words_of(&self, id: &StreamId) -> usize {
        self.said.get(id).map_or(0, |said| said.words)
    }

    /// Of a session that is there or finds room. One that says nothing for long makes room where there is none: a partial that
    /// is read behind its end would else stay for ever.
    fn of(&mut self, id: &StreamId, now: Instant) -> Option<&mut Said> {
        if self.said.len() >= MOST && !self.said.contains_key(id) {
            self.said.retain(|_, said| said.heard.is_some_and(|at| now.duration_since(at) < SILENT));
            if self.said.len() >= MOST {
                return None;
            }
        }
        let said = self.said.entry(id.clone()).or_default();
        said.heard = Some(now);
        Some(said)
    }

    fn on_final(&mut self, value: &Final) {
        if value.end {
            self.said.remove(&value.id);
            return;
        }
        let Some(said) = self.of(&value.id, Instant::now()) else { return };
        if said.after_index.is_some_and(|index| index >= value.index) && said.epoch >= value.epoch {
            return;
        }
        let text: Vec<&str> = value.segments.iter().map(|segment| segment.text.trim()).collect();
        let text = text.join(" ");
        said.words += text.split_whitespace().count();
        said.finals = ending(&format!("{} {text}", said.finals));
        (said.after_index, said.epoch) = (Some(value.index), value.epoch);
        said.tail.clear();
    }

    fn on_partial(&mut self, value: &Partial) {
        let Some(said) = self.of(&value.id, Instant::now()) else { return };
        if value.epoch < said.epoch || value.after_index < said.after_index {
            return;
        }
        said.tail = ending(&join_text([value.committed.as_str(), value.tentative.as_str()].into_iter()));
    }
}

/// The last characters, from the beginning of a word where there is one.
fn ending(text: &str) -> String {
    let text = text.trim();
    let Some((at, _)) = text.char_indices().rev().nth(SHOWN) else { return text.to_owned() };
    let cut = &text[at..];
    cut.find(char::is_whitespace).map_or(cut, |blank| cut[blank..].trim_start()).to_owned()
}

/// The texts, and whether anybody wants them. Clones share them.
#[derive(Debug, Clone)]
pub(crate) struct Reading {
    texts: Arc<RwLock<Texts>>,
    interest: Interest,
}

impl Reading {
    /// The texts, and the work of reading them.
    pub(crate) fn new(nats: Nats, stop: CancellationToken) -> (Self, impl Future<Output = ()>) {
        let reading = Self { texts: Arc::default(), interest: Interest::default() };
        let mine = reading.clone();
        (reading, async move {
            stop.run_until_cancelled(mine.read(nats)).await;
        })
    }

    /// Somebody looks at a list now.
    pub(crate) fn want(&self) {
        self.interest.want();
    }

    pub(crate) fn with<T>(&self, look: impl FnOnce(&Texts) -> T) -> T {
        match self.texts.read() {
            Ok(texts) => look(&texts),
            Err(_) => look(&Texts::default()),
        }
    }

    async fn read(self, nats: Nats) {
        loop {
            self.interest.begins().await;
            let read = tokio::select! {
                read = self.read_on(&nats) => read,
                () = self.interest.ends() => Ok(()),
            };
            if read.is_err() {
                return;
            }
            if let Ok(mut texts) = self.texts.write() {
                *texts = Texts::default();
            }
        }
    }

    /// An error: the connection is closed.
    async fn read_on(&self, nats: &Nats) -> Result<(), ServerError> {
        let filter = Filter::Kind(Kind::Session);
        let mut finals = transcript::finals(nats, &filter, Start::LastPerSubject);
        let mut partials = transcript::partials(nats, &filter, Start::LastPerSubject);
        let mut backoff = Backoff::default();
        loop {
            let read = tokio::select! {
                read = finals.next() => read.map(|read| self.change(|texts| texts.on_final(&read.value))),
                read = partials.next() => read.map(|read| self.change(|texts| texts.on_partial(&read.value))),
            };
            interest::after("transcripts", read, &mut backoff).await?;
        }
    }

    fn change(&self, change: impl FnOnce(&mut Texts)) {
        if let Ok(mut texts) = self.texts.write() {
            change(&mut texts);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_long_been_silent_makes_room() {
        let id = |n: usize| StreamId::new(format!("s{n}")).expect("id");
        let (mut texts, begin) = (Texts::default(), Instant::now());
        for n in 0..MOST {
            assert!(texts.of(&id(n), begin).is_some());
        }
        assert!(texts.of(&id(MOST), begin + SILENT / 2).is_none(), "all of them have just spoken");
        assert!(texts.of(&id(7), begin + SILENT / 2).is_some());
        assert!(texts.of(&id(MOST), begin + SILENT).is_some());
        assert_eq!(texts.said.len(), 2, "the one that spoke since, and the new one");
    }

    #[test]
    fn the_end_of_a_text_begins_with_a_word() {
        assert_eq!(ending("  a b "), "a b");
        let long = "wörter ".repeat(60);
        let end = ending(&long);
        assert!(end.chars().count() <= SHOWN && end.starts_with("wörter"), "{end}");
        assert_eq!(ending(&"x".repeat(500)).chars().count(), SHOWN + 1);
    }
}
