//! Everything that is kept of one session or job, found in every stream, bucket and object, and removed for good.
//!
//! Privacy rests on [`places`]: whatever can hold words, voices or names is listed there. Invariants: what is removed was
//! counted before; of what comes meanwhile nothing goes unseen (each place is purged up to where it ended when it was
//! counted); the key goes last, so that an interrupted purge is found and done again; ids are compared whole, never by how
//! they begin. What is open is for the caller to refuse: [`Kept::open`] says so.

mod places;
mod shelf;

use std::collections::{BTreeMap, HashMap, HashSet};

use async_nats::jetstream::ErrorCode;
use futures_util::{StreamExt, TryStreamExt, stream};
use serde::de::DeserializeOwned;
use voxfleet_schema::{
    codec,
    id::{Kind, StreamId},
    job::{JobPart, JobRecord, job_of_media},
    session::{SessionRecord, SessionState},
};

use self::places::{Place, id_of, places};
pub use self::shelf::Shelf;
use crate::{
    Nats, ServerError,
    feed::{Feed, Start},
    kv::{Bucket, KvError, Records},
    log::{AudioLog, LogError},
    media::{Media, MediaError, ObjectInfo},
    raw::{self, Get},
    topology::names::{AUDIO, JOBS, MEDIA},
    transcript::{Chain, ChainError, Filter},
};

#[derive(Debug, thiserror::Error)]
pub enum PurgeError {
    #[error("reading {place}")]
    Read { place: &'static str, source: ServerError },
    #[error("purging {place}")]
    Purge { place: &'static str, source: ServerError },
    #[error("reading the audio log")]
    Log(#[from] LogError),
    #[error("reading the keys")]
    Keys(#[from] KvError),
    #[error("the object store")]
    Media(#[from] MediaError),
}

/// How much one place holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Amount {
    /// Messages of a stream, the key of a bucket, objects.
    pub messages: u64,
    /// Of payloads; headers and what the server adds are not counted.
    pub bytes: u64,
}

/// By stream, bucket (`KV_...`) and object store.
pub type Amounts = BTreeMap<&'static str, Amount>;

/// What is kept of one session or job, of its parts too.
#[derive(Debug, Clone)]
pub struct Kept {
    pub kind: Kind,
    pub id: StreamId,
    /// Jobs that are stretches of this one's recording.
    pub parts: Vec<StreamId>,
    /// Why it has not ended.
    pub open: Option<&'static str>,
    /// Unix time in ms of the newest of it; 0 where there is nothing.
    pub newest_ms: u64,
    /// Only where there is something.
    pub amounts: Amounts,
    spots: Vec<Spot>,
    keys: Vec<(Bucket, StreamId, u64)>,
    objects: Vec<ObjectInfo>,
}

/// One place of one id.
#[derive(Debug, Clone)]
struct Spot {
    stream: &'static str,
    filter: String,
    last_seq: u64,
}

impl Kept {
    pub fn is_empty(&self) -> bool {
        self.amounts.is_empty()
    }

    fn add(&mut self, place: &'static str, amount: Amount, newest_ms: u64) {
        if amount.messages == 0 {
            return;
        }
        let sum = self.amounts.entry(place).or_default();
        sum.messages += amount.messages;
        sum.bytes += amount.bytes;
        self.newest_ms = self.newest_ms.max(newest_ms);
    }
}

/// Streams read at once.
const AT_ONCE: usize = 4;

/// Finds and removes. It needs the rights of an operator.
#[derive(Debug, Clone)]
pub struct Purge {
    nats: Nats,
}

impl Purge {
    pub fn new(nats: &Nats) -> Self {
        Self { nats: nats.clone() }
    }

    pub async fn shelf(&self) -> Result<Shelf, PurgeError> {
        Shelf::read(&self.nats).await
    }

    /// Every session and job of which anything is kept, with the Unix time in ms of its newest. A part of a job counts as
    /// that job, where its key says whose it is.
    pub async fn all(&self, kind: Option<Kind>, shelf: &Shelf) -> Result<Vec<(Kind, StreamId, u64)>, PurgeError> {
        let filter = kind.map_or(Filter::All, Filter::Kind);
        let mut found: HashMap<(Kind, StreamId), u64> = HashMap::new();
        let mut saw = |kind: Kind, id: StreamId, at_ms: u64| {
            let whole = shelf.jobs.get(&id).filter(|_| kind == Kind::Job).and_then(JobRecord::parent).cloned();
            let newest = found.entry((kind, whole.unwrap_or(id))).or_default();
            *newest = (*newest).max(at_ms);
        };
        let reads = places(self.nats.subjects(), &filter).into_iter().map(|place| self.ages(place));
        let read: Vec<_> = stream::iter(reads).buffer_unordered(AT_ONCE).try_collect().await?;
        for (subject, at_ms) in read.into_iter().flatten() {
            if let Some((kind, id)) = id_of(self.nats.subjects(), &subject) {
                saw(kind, id, at_ms);
            }
        }
        if kind != Some(Kind::Job) {
            let records = Records::<SessionRecord>::new(&self.nats, Bucket::Sessions).all().await?;
            records.into_iter().for_each(|(_, v)| saw(Kind::Session, v.value.id, v.value.changed_ms));
        }
        if kind != Some(Kind::Session) {
            shelf.jobs.values().for_each(|job| saw(Kind::Job, job.id.clone(), job.changed_ms));
            for object in &shelf.objects {
                job_of_media(&object.key).into_iter().for_each(|id| saw(Kind::Job, id, object.modified_ms));
            }
        }
        Ok(found.into_iter().map(|((kind, id), at_ms)| (kind, id, at_ms)).collect())
    }

    /// What is kept of one.
    pub async fn find(&self, kind: Kind, id: &StreamId, shelf: &Shelf) -> Result<Kept, PurgeError> {
        let mut kept = Kept {
            kind,
            id: id.clone(),
            parts: Vec::new(),
            open: None,
            newest_ms: 0,
            amounts: BTreeMap::new(),
            spots: Vec::new(),
            keys: Vec::new(),
            objects: Vec::new(),
        };
        if kind == Kind::Job {
            kept.parts = self.parts(id, shelf).await?;
        }
        let all: Vec<StreamId> = std::iter::once(id.clone()).chain(kept.parts.iter().cloned()).collect();
        for one in &all {
            self.measure(&mut kept, one, shelf).await?;
        }
        kept.open = match kind {
            Kind::Session => self.open_session(&kept).await?,
            Kind::Job => self.open_job(&kept).await?,
            Kind::Unknown => None,
        };
        Ok(kept)
    }

    /// Removes what was found and adds it to `removed` as it goes, so that an error hides nothing that is gone. What has come
    /// since it was found stays. `all`: that too, for what was open and is given up.
    pub async fn remove(&self, kept: &Kept, all: bool, removed: &mut Amounts) -> Result<(), PurgeError> {
        let mut gone = |place: &'static str, messages: u64, bytes: u64| {
            if messages > 0 {
                let sum = removed.entry(place).or_default();
                sum.messages += messages;
                sum.bytes += bytes;
            }
        };
        let mut counted = HashSet::new();
        // Bytes are told as they were found: a server says only how many messages went.
        let mut bytes_of =
            |place| if counted.insert(place) { kept.amounts.get(place).map_or(0, |found| found.bytes) } else { 0 };
        for spot in &kept.spots {
            let below = (!all).then_some(spot.last_seq + 1);
            let messages = raw::purge_counted(&self.nats, spot.stream, &spot.filter, below)
                .await
                .map_err(|source| PurgeError::Purge { place: spot.stream, source })?;
            gone(spot.stream, messages, if messages > 0 { bytes_of(spot.stream) } else { 0 });
        }
        let media = Media::new(&self.nats);
        for object in self.still_its(kept).await? {
            if media.delete(&object.key).await? {
                gone(MEDIA, 1, object.bytes);
            }
        }
        for (bucket, id, revision) in &kept.keys {
            self.remove_key(*bucket, id, *revision, all).await?;
            gone(bucket.stream(), 1, bytes_of(bucket.stream()));
        }
        Ok(())
    }

    /// Its objects, without a recording that somebody else names by now: others may have come for it since it was found.
    async fn still_its(&self, kept: &Kept) -> Result<Vec<ObjectInfo>, PurgeError> {
        if kept.objects.iter().all(|object| job_of_media(&object.key).is_some()) {
            return Ok(kept.objects.clone());
        }
        let shelf = self.shelf().await?;
        let family = std::iter::once(&kept.id).chain(&kept.parts);
        let its: HashSet<String> = family.flat_map(|id| shelf.objects_of(id)).map(|object| object.key).collect();
        Ok(kept.objects.iter().filter(|object| its.contains(&object.key)).cloned().collect())
    }

    /// Removes an object by its key; false: it was not there.
    pub async fn remove_object(&self, key: &str) -> Result<bool, PurgeError> {
        Ok(Media::new(&self.nats).delete(key).await?)
    }

    async fn remove_key(&self, bucket: Bucket, id: &StreamId, revision: u64, open: bool) -> Result<(), PurgeError> {
        let records = Records::<serde_json::Value>::new(&self.nats, bucket);
        if open {
            // Who watches the bucket is told by a marker, which holds the id alone; it goes with the next purge.
            return Ok(records.delete(id.as_str(), None).await?);
        }
        Ok(records.purge(id.as_str(), revision).await?)
    }

    /// Parts of a job: by their keys, and where a key is gone by their names.
    async fn parts(&self, id: &StreamId, shelf: &Shelf) -> Result<Vec<StreamId>, PurgeError> {
        let mut parts: Vec<StreamId> = shelf.parts_of(id).cloned().collect();
        let stray = |other: &StreamId| JobPart::names_part_of(id, other) && !shelf.jobs.contains_key(other);
        for place in places(self.nats.subjects(), &Filter::Kind(Kind::Job)) {
            let read = |source| PurgeError::Read { place: place.stream, source };
            let counts = raw::subject_counts(&self.nats, place.stream, &place.filter).await;
            let subjects = or_missing(counts).map_err(read)?;
            let ids = subjects.keys().filter_map(|subject| id_of(self.nats.subjects(), subject));
            parts.extend(ids.map(|(_, other)| other).filter(stray));
        }
        parts.sort_unstable();
        parts.dedup();
        Ok(parts)
    }

    async fn measure(&self, kept: &mut Kept, id: &StreamId, shelf: &Shelf) -> Result<(), PurgeError> {
        let filter = Filter::One(kept.kind, id.clone());
        for place in places(self.nats.subjects(), &filter) {
            let read = |source| PurgeError::Read { place: place.stream, source };
            let (amount, last_seq, newest_ms) = or_missing(self.amount(&place).await).map_err(read)?;
            if amount.messages > 0 {
                kept.spots.push(Spot { stream: place.stream, filter: place.filter, last_seq });
            }
            kept.add(place.stream, amount, newest_ms);
        }
        let bucket = match kept.kind {
            Kind::Session => Bucket::Sessions,
            Kind::Job => Bucket::Jobs,
            // Of a newer version, which has its own purge.
            Kind::Unknown => return Ok(()),
        };
        if let Some((revision, bytes, stored_ms)) = self.key(bucket, id).await? {
            kept.keys.push((bucket, id.clone(), revision));
            kept.add(bucket.stream(), Amount { messages: 1, bytes }, stored_ms);
        }
        if kept.kind == Kind::Job {
            for object in shelf.objects_of(id) {
                // What a part and its whole both name counts once.
                if kept.objects.iter().any(|other| other.key == object.key) {
                    continue;
                }
                kept.add(MEDIA, Amount { messages: 1, bytes: object.bytes }, object.modified_ms);
                kept.objects.push(object);
            }
        }
        Ok(())
    }

    /// How much stands at a place, its last sequence and when that was stored.
    async fn amount(&self, place: &Place) -> Result<(Amount, u64, u64), ServerError> {
        let (mut amount, mut last_seq, mut newest_ms) = (Amount::default(), 0, 0);
        let mut add = |bytes: u64, seq: u64, stored_ms: u64| {
            amount.messages += 1;
            amount.bytes += bytes;
            last_seq = last_seq.max(seq);
            newest_ms = newest_ms.max(stored_ms);
        };
        if place.is_queue {
            // A queue allows no second reader; what stands there of one id is little.
            let mut next = 1;
            loop {
                let which = Get { seq: Some(next), next_by_subj: Some(&place.filter), ..Get::default() };
                let Some(stored) = raw::leader_get(&self.nats, place.stream, &which).await? else { break };
                next = stored.seq + 1;
                add(stored.payload.len() as u64, stored.seq, stored.stored_ms);
            }
        } else {
            let feed = Feed::new(&self.nats, place.stream, place.filter.clone(), Start::First).headers_only();
            for message in feed.read_all().await? {
                add(message.bytes(), message.seq, message.stored_ms);
            }
        }
        Ok((amount, last_seq, newest_ms))
    }

    /// When the newest message of each subject was stored.
    async fn ages(&self, place: Place) -> Result<Vec<(String, u64)>, PurgeError> {
        let read = |source| PurgeError::Read { place: place.stream, source };
        if place.is_queue {
            let counts = raw::subject_counts(&self.nats, place.stream, &place.filter).await;
            let subjects = or_missing(counts).map_err(read)?;
            let mut ages = Vec::with_capacity(subjects.len());
            for subject in subjects.into_keys() {
                let which = Get { last_by_subj: Some(&subject), ..Get::default() };
                let stored = raw::leader_get(&self.nats, place.stream, &which).await.map_err(read)?;
                ages.extend(stored.map(|stored| (subject, stored.stored_ms)));
            }
            return Ok(ages);
        }
        let feed = Feed::new(&self.nats, place.stream, place.filter.clone(), Start::LastPerSubject).headers_only();
        let newest = or_missing(feed.read_all().await).map_err(read)?;
        Ok(newest.into_iter().map(|message| (message.subject.to_string(), message.stored_ms)).collect())
    }

    /// Revision, length and time of what stands under a key, a deletion's marker included.
    async fn key(&self, bucket: Bucket, id: &StreamId) -> Result<Option<(u64, u64, u64)>, PurgeError> {
        let stored = self.stored_key(bucket, id).await?;
        Ok(stored.map(|stored| (stored.seq, stored.payload.len() as u64, stored.stored_ms)))
    }

    async fn stored_key(&self, bucket: Bucket, id: &StreamId) -> Result<Option<raw::Stored>, PurgeError> {
        let subject = format!("$KV.{}.{id}", bucket.as_str());
        let which = Get { last_by_subj: Some(&subject), ..Get::default() };
        let read = raw::leader_get(&self.nats, bucket.stream(), &which).await;
        read.map_err(|source| PurgeError::Read { place: bucket.stream(), source })
    }

    /// The value of a key; the error of one that cannot be read is that nobody knows how it stands.
    async fn record<T: DeserializeOwned>(
        &self,
        bucket: Bucket,
        id: &StreamId,
    ) -> Result<Option<Option<T>>, PurgeError> {
        let stored = self.stored_key(bucket, id).await?.filter(|stored| !stored.payload.is_empty());
        Ok(stored.map(|stored| codec::from_json(&stored.payload).ok()))
    }

    async fn open_session(&self, kept: &Kept) -> Result<Option<&'static str>, PurgeError> {
        let record = self.record::<SessionRecord>(Bucket::Sessions, &kept.id).await?;
        let last_audio = match kept.amounts.contains_key(AUDIO) {
            true => AudioLog::new(&self.nats).last(&kept.id).await?.map(|entry| entry.seq),
            false => None,
        };
        let ended_at = match Chain::new(&self.nats).last(Kind::Session, &kept.id).await {
            Ok(last) => last.filter(|last| last.value.end).map(|last| last.value.audio.to_seq),
            // Somebody else has written there: no end of ours.
            Err(ChainError::Foreign { .. }) => None,
            Err(ChainError::Server(source)) => return Err(PurgeError::Read { place: "ASR_TRANSCRIPT", source }),
            Err(_) => None,
        };
        let state = record.map(|record| record.map(|record| (record.state, record.ended_seq)));
        Ok(why_open(state, last_audio, ended_at))
    }

    async fn open_job(&self, kept: &Kept) -> Result<Option<&'static str>, PurgeError> {
        if kept.amounts.contains_key(JOBS) {
            return Ok(Some("its request waits for a dispatcher"));
        }
        for id in std::iter::once(&kept.id).chain(&kept.parts) {
            match self.record::<JobRecord>(Bucket::Jobs, id).await? {
                Some(None) => return Ok(Some("its key cannot be read")),
                Some(Some(record)) if !record.state.has_ended() => return Ok(Some("it has not ended")),
                Some(Some(_)) | None => {}
            }
        }
        Ok(None)
    }
}

/// A stream that is not there holds nothing: memory streams go with their server.
fn or_missing<T: Default>(read: Result<T, ServerError>) -> Result<T, ServerError> {
    match read {
        Err(error) if error.is_code(ErrorCode::STREAM_NOT_FOUND) => Ok(T::default()),
        read => read,
    }
}

/// Why a session has not ended. `record`: its key, `Some(None)` where that cannot be read; `ended_at`: the last log entry that
/// the end final of its chain covers. Without a key, audio that no end covers will open it.
fn why_open(
    record: Option<Option<(SessionState, Option<u64>)>>,
    last_audio: Option<u64>,
    ended_at: Option<u64>,
) -> Option<&'static str> {
    let unheard = |end: Option<u64>| last_audio.is_some_and(|last| end.is_none_or(|end| last > end));
    match record {
        Some(None) => Some("its key cannot be read"),
        Some(Some((SessionState::Ended, end))) if !unheard(end.max(ended_at)) => None,
        Some(Some((SessionState::Ended, _))) => Some("audio has come behind its end"),
        Some(Some(_)) => Some("it has not ended"),
        None if unheard(ended_at) => Some("its audio has not been transcribed to an end"),
        None => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_not_ended_is_open_and_says_why() {
        use SessionState::{Assigned, Ended, Waiting};
        let key = |state, end| Some(Some((state, end)));
        for (record, last_audio, ended_at, open) in [
            (None, None, None, false),
            (None, Some(9), None, true),
            (None, Some(9), Some(9), false),
            (None, Some(9), Some(8), true),
            (None, None, Some(9), false),
            (key(Ended, Some(9)), Some(9), Some(9), false),
            (key(Ended, Some(9)), None, None, false),
            (key(Ended, Some(9)), Some(12), Some(9), true),
            // The key is a moment behind the chain.
            (key(Ended, Some(9)), Some(12), Some(12), false),
            (key(Ended, None), Some(1), None, true),
            (key(Waiting, None), None, None, true),
            (key(Assigned, None), Some(9), Some(9), true),
            (Some(None), None, None, true),
        ] {
            assert_eq!(
                why_open(record, last_audio, ended_at).is_some(),
                open,
                "{record:?} {last_audio:?} {ended_at:?}"
            );
        }
    }
}
