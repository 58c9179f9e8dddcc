//! `s3://bucket/key`, with the operator's credentials and endpoint.

use std::{
    future::Future,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures_util::{StreamExt, TryStreamExt};
use object_store::{
    ClientOptions, GetOptions, GetRange, ObjectStore, RetryConfig,
    aws::{AmazonS3Builder, AmazonS3ConfigKey},
    client::{HttpClient, HttpConnector, HttpError, HttpRequest, HttpResponse, HttpService},
    path::Path,
};
use reqwest::{Client, StatusCode, header::HeaderMap};

use super::{
    FetchConfig, FetchError, Opened, Validator,
    body::{Limits, watched},
    error::shown,
    http::{Web, refusal},
    tls::NO_ROOTS,
};

/// A name that AWS takes for a bucket. Others could change the path or the host that is asked.
pub(super) fn is_bucket(name: &str) -> bool {
    let edge = |b: Option<&u8>| b.is_some_and(u8::is_ascii_alphanumeric);
    let bytes = name.as_bytes();
    (3..=63).contains(&bytes.len())
        && bytes.iter().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'.' | b'_'))
        && edge(bytes.first())
        && edge(bytes.last())
        && !name.contains("..")
}

#[derive(Debug)]
pub(super) enum Buckets {
    Any,
    Listed(Vec<String>),
}

pub(super) struct S3 {
    buckets: Buckets,
    config: FetchConfig,
    client: Client,
    has_roots: bool,
    answer_timeout: Duration,
    limits: Limits,
}

impl S3 {
    pub(super) fn new(config: &FetchConfig, buckets: Buckets, web: &Web, limits: Limits) -> Self {
        let answer_timeout = config.connect_timeout() + config.stall_timeout();
        let (client, has_roots) = (web.unlimited_client(), web.has_roots());
        Self { buckets, config: config.clone(), client, has_roots, answer_timeout, limits }
    }

    pub(super) async fn open(
        &self,
        bucket: &str,
        key: &str,
        from: u64,
        validator: Option<&Validator>,
    ) -> Result<Opened, FetchError> {
        let at = shown(&format!("s3://{bucket}/{key}"));
        if !is_bucket(bucket) {
            return Err(FetchError::BadUrl { at, why: "that is not the name of a bucket".to_owned() });
        }
        if let Buckets::Listed(listed) = &self.buckets
            && !listed.iter().any(|name| name == bucket)
        {
            let why = "its bucket is not among worker.fetch.s3_buckets".to_owned();
            return Err(FetchError::Forbidden { at, why });
        }
        let Some(path) = super::file::percent_decoded(key)
            .and_then(|bytes| String::from_utf8(bytes).ok())
            .and_then(|key| Path::parse(key).ok())
        else {
            return Err(FetchError::BadUrl { at, why: "that is not a key that can be asked for".to_owned() });
        };
        let last = Arc::new(LastAnswer::default());
        let store = self.store(bucket, &last)?;
        let mut options = GetOptions::default();
        if from > 0 {
            options.range = Some(GetRange::Offset(from));
            options.if_match = validator.and_then(|v| v.etag.clone());
        }
        let answer = match tokio::time::timeout(self.answer_timeout, store.get_opts(&path, options)).await {
            Ok(Ok(answer)) => answer,
            // It has changed since; all of it is wanted then.
            Ok(Err(object_store::Error::Precondition { .. })) if from > 0 => {
                return Box::pin(self.open(bucket, key, 0, None)).await;
            }
            Ok(Err(error)) => return Err(last.explain(at, &error)),
            Err(_) => {
                let why = format!("no answer within {:?}", self.answer_timeout);
                return Err(FetchError::Timeout { at, why });
            }
        };
        let (total, from) = (answer.meta.size, answer.range.start);
        self.limits.admit(&at, Some(total))?;
        let validator = answer.meta.e_tag.clone().map(|etag| Validator { etag: Some(etag), last_modified: None });
        let place = at.clone();
        let body = answer.into_stream().map_err(move |_| FetchError::Unavailable {
            at: place.clone(),
            why: "the connection broke off".to_owned(),
            retry_after: None,
        });
        let body = watched(body.boxed(), at, self.limits, from, Some(total));
        Ok(Opened { body, from, total: Some(total), validator })
    }

    /// Made anew for each object: nothing but the client, which is shared, is worth keeping.
    fn store(&self, bucket: &str, last: &Arc<LastAnswer>) -> Result<impl ObjectStore + use<>, FetchError> {
        let config = &self.config;
        let mut builder = if config.s3_access_key_id.is_empty() {
            AmazonS3Builder::from_env()
        } else {
            AmazonS3Builder::new()
                .with_access_key_id(config.s3_access_key_id.reveal())
                .with_secret_access_key(config.s3_secret_access_key.reveal())
        };
        builder = builder.with_bucket_name(bucket);
        if let Some(endpoint) = &config.s3_endpoint {
            builder = builder.with_endpoint(endpoint);
        }
        if let Some(region) = &config.s3_region {
            builder = builder.with_region(region);
        }
        let endpoint = builder.get_config_value(&AmazonS3ConfigKey::Endpoint);
        let plain = endpoint.is_some_and(|e| e.to_ascii_lowercase().starts_with("http:"));
        if plain && !config.s3_allow_http {
            let why = "the S3 endpoint is plain http, which needs worker.fetch.s3_allow_http";
            return Err(FetchError::Config(why.to_owned()));
        }
        if !plain && !self.has_roots {
            return Err(FetchError::Config(format!("the S3 endpoint: {NO_ROOTS}")));
        }
        builder
            .with_http_connector(Connector { client: self.client.clone(), last: Arc::clone(last) })
            // Who asks for the object decides about trying again.
            .with_retry(RetryConfig { max_retries: 0, ..RetryConfig::default() })
            .build()
            .map_err(|error| FetchError::Config(format!("S3 can not be used: {error}")))
    }
}

/// Status and headers of the last answer: `object_store`'s errors keep them in text only, beside a body that may name the
/// operator's key.
#[derive(Debug, Default)]
struct LastAnswer(Mutex<Option<(StatusCode, HeaderMap)>>);

impl LastAnswer {
    fn note(&self, answer: Option<(StatusCode, HeaderMap)>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = answer;
    }

    fn explain(&self, at: String, error: &object_store::Error) -> FetchError {
        let last = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        match (last, error) {
            (_, object_store::Error::NotFound { .. }) => FetchError::NotFound { at },
            (Some((status, headers)), _) if !status.is_success() => refusal(at, status, &headers),
            (Some(_), _) => {
                let why = "the server's answer is not that of an S3 service".to_owned();
                FetchError::Unavailable { at, why, retry_after: None }
            }
            (None, _) => {
                let why = "the S3 service, or what gives credentials for it, can not be reached".to_owned();
                FetchError::Unavailable { at, why, retry_after: None }
            }
        }
    }
}

/// Gives `object_store` our client, with our certificates and without the environment's proxies.
#[derive(Debug, Clone)]
struct Connector {
    client: Client,
    last: Arc<LastAnswer>,
}

impl HttpConnector for Connector {
    fn connect(&self, _: &ClientOptions) -> object_store::Result<HttpClient> {
        Ok(HttpClient::new(self.clone()))
    }
}

type Answering<'a> = Pin<Box<dyn Future<Output = Result<HttpResponse, HttpError>> + Send + 'a>>;

impl HttpService for Connector {
    fn call<'a, 'f>(&'a self, request: HttpRequest) -> Answering<'f>
    where
        'a: 'f,
        Self: 'f,
    {
        Box::pin(async move {
            self.last.note(None);
            let answer = HttpService::call(&self.client, request).await?;
            self.last.note(Some((answer.status(), answer.headers().clone())));
            Ok(answer)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bucket_names() {
        for name in ["abc", "my-bucket", "my.bucket.1", "0ab"] {
            assert!(is_bucket(name), "{name}");
        }
        for name in ["", "ab", "a..b", "../x", "a/b", "A-b", "-ab", "ab-", "a b", "a%2fb", &"a".repeat(64)] {
            assert!(!is_bucket(name), "{name}");
        }
    }
}
