//! `object://`: the object store of the fleet's own NATS account; and bodies that are read instead of streamed.

use std::io;

use futures_util::{StreamExt, TryStreamExt};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncSeekExt};
use tokio_util::io::ReaderStream;
use voxfleet_nats::media::{Media, MediaError};

use super::{
    FetchError, Opened,
    body::{Limits, watched},
    error::shown,
};

/// One chunk of the object store.
const READ_BYTES: usize = 128 * 1024;

pub(super) async fn open(media: Option<&Media>, key: &str, from: u64, limits: Limits) -> Result<Opened, FetchError> {
    let at = shown(&voxfleet_schema::job::AudioUrl::object(key));
    let Some(media) = media else {
        return Err(FetchError::Forbidden { at, why: "there is no object store here".to_owned() });
    };
    let unavailable = |why: String| FetchError::Unavailable {
        at: shown(&voxfleet_schema::job::AudioUrl::object(key)),
        why,
        retry_after: None,
    };
    let found = match tokio::time::timeout(limits.stall, media.get(key)).await {
        Ok(Err(MediaError::BadKey)) => {
            return Err(FetchError::BadUrl { at, why: MediaError::BadKey.to_string() });
        }
        Ok(found) => found.map_err(|error| unavailable(error.to_string()))?,
        Err(_) => return Err(FetchError::Timeout { at, why: format!("no answer within {:?}", limits.stall) }),
    };
    let Some(mut object) = found else { return Err(FetchError::NotFound { at }) };
    let total = object.info.bytes;
    limits.admit(&at, Some(total))?;
    // The store reads from the beginning only, and an object does not change: what is known is read past.
    let from = from.min(total);
    tokio::io::copy(&mut (&mut object).take(from), &mut tokio::io::sink())
        .await
        .map_err(|error| unavailable(error.to_string()))?;
    Ok(read(object, at, from, total, limits))
}

/// A file as a body.
pub(super) async fn read_file(
    file: std::fs::File,
    path: &str,
    from: u64,
    total: u64,
    limits: Limits,
) -> Result<Opened, FetchError> {
    let at = shown(&format!("file://{path}"));
    let from = from.min(total);
    let mut file = tokio::fs::File::from_std(file);
    file.seek(io::SeekFrom::Start(from))
        .await
        .map_err(|error| FetchError::Internal { at: at.clone(), why: error.to_string() })?;
    Ok(read(file, at, from, total, limits))
}

fn read(reader: impl AsyncRead + Send + 'static, at: String, from: u64, total: u64, limits: Limits) -> Opened {
    let place = at.clone();
    let body = ReaderStream::with_capacity(Box::pin(reader), READ_BYTES).map_err(move |error| {
        FetchError::Unavailable { at: place.clone(), why: format!("it broke off: {error}"), retry_after: None }
    });
    Opened { body: watched(body.boxed(), at, limits, from, Some(total)), from, total: Some(total), validator: None }
}
