//! What is read once for many purges: every job's key, every object, and the recordings that are named where no key is: in
//! requests that wait for a dispatcher, and in dead letters, whose jobs may be sent again.

use std::collections::{HashMap, HashSet};

use voxfleet_schema::{
    codec::CONTENT_TYPE,
    id::StreamId,
    job::{AudioUrl, JobRecord, JobRequest, job_of_media},
};

use super::{PurgeError, or_missing};
use crate::{
    Nats, ServerError, again,
    dead::DeadLetters,
    kv::{Bucket, Records},
    media::{Media, ObjectInfo},
    raw::{self, Get},
    topology::names::{DEAD, JOBS},
};

#[derive(Debug)]
pub struct Shelf {
    pub(super) jobs: HashMap<StreamId, JobRecord>,
    pub(super) objects: Vec<ObjectInfo>,
    /// Keys of objects, with the jobs whose requests or letters name them.
    promised: HashMap<String, HashSet<StreamId>>,
}

impl Shelf {
    pub(super) async fn read(nats: &Nats) -> Result<Self, PurgeError> {
        // Objects first: whatever names one that is listed here was written before it is looked for.
        let objects = Media::new(nats).list().await?;
        let records = Records::<JobRecord>::new(nats, Bucket::Jobs);
        let mut promised: HashMap<String, HashSet<StreamId>> = HashMap::new();
        let mut promise = |id: StreamId, audio: &str| {
            if let Some(key) = object_of(audio) {
                promised.entry(key).or_default().insert(id);
            }
        };
        for (id, request) in waiting(nats).await.map_err(|source| PurgeError::Read { place: JOBS, source })? {
            request.audio.iter().for_each(|audio| promise(id.clone(), audio));
        }
        let letters = or_missing(DeadLetters::new(nats).list(usize::MAX).await);
        let (letters, _) = letters.map_err(|source| PurgeError::Read { place: DEAD, source })?;
        for stored in letters {
            let Ok(letter) = stored.letter else { continue };
            let request = letter.request.as_ref().and_then(|request| again::refused_request(request).ok());
            let named = letter.record.map(|record| record.audio).into_iter().chain(request.and_then(|r| r.audio));
            named.for_each(|audio| promise(stored.id.clone(), &audio));
        }
        // Last: a request becomes a key before it leaves its queue, so that it is seen in one of them.
        let jobs = records.all().await?.into_iter().map(|(_, v)| (v.value.id.clone(), v.value)).collect();
        Ok(Self { jobs, objects, promised })
    }

    /// Jobs that say that they are a part of this one.
    pub(super) fn parts_of<'a>(&'a self, id: &'a StreamId) -> impl Iterator<Item = &'a StreamId> {
        self.jobs.values().filter(move |job| job.parent() == Some(id)).map(|job| &job.id)
    }

    /// Objects of a job: those that it or its worker wrote, and the recording it names, unless another job names it too.
    pub(super) fn objects_of(&self, id: &StreamId) -> Vec<ObjectInfo> {
        let named = self.jobs.get(id).and_then(|job| object_of(&job.audio));
        let family = |job: &JobRecord| job.id == *id || job.parent() == Some(id);
        let shared = |key: &str| {
            let by_key =
                |job: &JobRecord| !family(job) && !job.expired && object_of(&job.audio).as_deref() == Some(key);
            let promised = self.promised.get(key).is_some_and(|ids| ids.iter().any(|other| other != id));
            promised || self.jobs.values().any(by_key)
        };
        let is_its = |object: &&ObjectInfo| match job_of_media(&object.key) {
            Some(owner) => owner == *id,
            None => named.as_deref() == Some(object.key.as_str()) && !shared(&object.key),
        };
        self.objects.iter().filter(is_its).cloned().collect()
    }

    /// Objects that belong to no job and that nothing names: uploads that were never used, or whose jobs are gone.
    pub fn nobodys(&self) -> Vec<ObjectInfo> {
        let by_key = |key: &str| self.jobs.values().any(|job| object_of(&job.audio).as_deref() == Some(key));
        let named = |key: &str| self.promised.contains_key(key) || by_key(key);
        let is = |object: &&ObjectInfo| job_of_media(&object.key).is_none() && !named(&object.key);
        self.objects.iter().filter(is).cloned().collect()
    }
}

/// Requests that no dispatcher has taken, as far as they can be read: what cannot names no recording that a job will read.
async fn waiting(nats: &Nats) -> Result<Vec<(StreamId, JobRequest)>, ServerError> {
    let (filter, mut next, mut found) = (nats.subjects().jobs_all(), 1, Vec::new());
    loop {
        let which = Get { seq: Some(next), next_by_subj: Some(&filter), ..Get::default() };
        let Some(stored) = or_missing(raw::leader_get(nats, JOBS, &which).await)? else { return Ok(found) };
        next = stored.seq + 1;
        let headers = stored.headers.as_ref();
        let content_type = headers.and_then(|headers| Some(headers.get(CONTENT_TYPE)?.as_str()));
        let request = JobRequest::decode(&stored.payload, content_type);
        if let (Ok(request), (_, Ok(id))) = (request, nats.subjects().parse_job(&stored.subject)) {
            found.push((id, request));
        }
    }
}

fn object_of(audio: &str) -> Option<String> {
    match AudioUrl::parse(audio) {
        Ok(AudioUrl::Object { key }) => Some(key),
        Ok(_) | Err(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(text: &str) -> StreamId {
        StreamId::new(text).expect("id")
    }

    fn job(name: &str, audio: &str, parent: Option<&str>) -> JobRecord {
        let part = parent
            .map(|parent| serde_json::json!({"parent": parent, "number": 0, "vad": "energy", "recording_bytes": 1}));
        serde_json::from_value(serde_json::json!({
            "id": name, "state": "done", "audio": audio, "options": {}, "result_ttl_s": 60, "epoch": 1, "attempts": 1,
            "submitted_ms": 1, "changed_ms": 1, "part": part,
        }))
        .expect("a record")
    }

    fn shelf(jobs: Vec<JobRecord>, keys: &[&str]) -> Shelf {
        let object = |key: &&str| ObjectInfo { key: (*key).to_owned(), bytes: 1, modified_ms: 1, digest: None };
        let jobs = jobs.into_iter().map(|job| (job.id.clone(), job)).collect();
        Shelf { jobs, objects: keys.iter().map(object).collect(), promised: HashMap::new() }
    }

    fn keys_of(shelf: &Shelf, name: &str) -> Vec<String> {
        shelf.objects_of(&id(name)).into_iter().map(|object| object.key).collect()
    }

    #[test]
    fn objects_go_with_their_job_and_not_with_a_neighbour() {
        let part = "call-0001-0123456789abcdef01234567";
        let mut shelf = shelf(
            vec![
                job("call", "object://asr_media/talk.mp3", None),
                job(part, "object://asr_media/talk.mp3", Some("call")),
                job("call-2", "object://asr_media/shared.wav", None),
                job("other", "object://asr_media/shared.wav", None),
                job("web", "https://h/talk.mp3", None),
            ],
            &[
                "audio/call",
                "audio/call-2",
                "result/call/f.json",
                "result/call-2/f.json",
                "talk.mp3",
                "shared.wav",
                "lost.wav",
            ],
        );
        assert_eq!(keys_of(&shelf, "call"), ["audio/call", "result/call/f.json", "talk.mp3"]);
        assert_eq!(
            keys_of(&shelf, "call-2"),
            ["audio/call-2", "result/call-2/f.json"],
            "another job needs the recording"
        );
        assert_eq!(keys_of(&shelf, "web"), [""; 0]);
        assert_eq!(keys_of(&shelf, "cal"), [""; 0]);
        let nobodys: Vec<String> = shelf.nobodys().into_iter().map(|object| object.key).collect();
        assert_eq!(nobodys, ["lost.wav"]);
        assert_eq!(shelf.parts_of(&id("call")).map(StreamId::as_str).collect::<Vec<_>>(), [part]);
        assert_eq!(shelf.parts_of(&id("call-2")).count(), 0);
        // A request that waits, or a letter, names what somebody else's key names, or nobody's.
        shelf.promised.insert("talk.mp3".to_owned(), HashSet::from([id("later")]));
        shelf.promised.insert("lost.wav".to_owned(), HashSet::from([id("later")]));
        assert_eq!(keys_of(&shelf, "call"), ["audio/call", "result/call/f.json"]);
        assert!(shelf.nobodys().is_empty());
        shelf.promised.insert("talk.mp3".to_owned(), HashSet::from([id("call")]));
        assert_eq!(keys_of(&shelf, "call").len(), 3, "its own letter keeps nothing from it");
    }
}
