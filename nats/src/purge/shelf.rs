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
