//! Payload rule: JSON for what a person may look at, MessagePack with named fields for what only machines exchange.

use serde::{Serialize, de::DeserializeOwned};

pub const CONTENT_TYPE: &str = "Content-Type";
pub const JSON: &str = "application/json";
pub const MSGPACK: &str = "application/msgpack";

/// Largest request body that is parsed at all, in bytes. Requests are a few hundred bytes; prompts and hotwords are capped
/// far below this.
pub const MAX_REQUEST_BYTES: usize = 64 * 1024;

/// Deepest nesting accepted in a stranger's document. Ours need four.
pub const MAX_DEPTH: usize = 32;

#[derive(Debug, thiserror::Error)]
pub enum CodecError {
    #[error("body of {len} bytes is over the limit of {limit}")]
    TooLarge { len: usize, limit: usize },
    #[error("invalid JSON")]
    Json(#[from] serde_json::Error),
    #[error("invalid MessagePack")]
    MsgpackDecode(#[from] rmp_serde::decode::Error),
    #[error("cannot encode as MessagePack")]
    MsgpackEncode(#[from] rmp_serde::encode::Error),
    #[error("a request is a map of named fields, not a list")]
    List,
    #[error("content type {0:?} is neither JSON nor MessagePack")]
    ContentType(String),
}

pub fn to_json<T: Serialize>(value: &T) -> Result<Vec<u8>, CodecError> {
    Ok(serde_json::to_vec(value)?)
}

pub fn from_json<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, CodecError> {
    Ok(serde_json::from_slice(bytes)?)
}

/// Named fields, so that fields can be added.
pub fn to_msgpack<T: Serialize>(value: &T) -> Result<Vec<u8>, CodecError> {
    Ok(rmp_serde::to_vec_named(value)?)
}

pub fn from_msgpack<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, CodecError> {
    let mut decoder = rmp_serde::Deserializer::new(bytes);
    decoder.set_max_depth(MAX_DEPTH);
    Ok(T::deserialize(&mut decoder)?)
}

/// Decodes a request from a stranger: bounded, JSON unless `content_type` says MessagePack.
pub fn from_request<T: DeserializeOwned>(bytes: &[u8], content_type: Option<&str>) -> Result<T, CodecError> {
    from_request_of(bytes, content_type, MAX_REQUEST_BYTES)
}

/// The same for requests that may be longer.
pub fn from_request_of<T: DeserializeOwned>(
    bytes: &[u8],
    content_type: Option<&str>,
    limit: usize,
) -> Result<T, CodecError> {
    if bytes.len() > limit {
        return Err(CodecError::TooLarge { len: bytes.len(), limit });
    }
    match content_type.map(|t| t.split(';').next().unwrap_or("").trim()) {
        // Lists would be taken as fields in their order, which is nowhere promised.
        None | Some("" | JSON) if bytes.trim_ascii_start().first() == Some(&b'[') => Err(CodecError::List),
        None | Some("" | JSON) => from_json(bytes),
        Some(MSGPACK | "application/x-msgpack" | "application/vnd.msgpack") => {
            if bytes.first().is_some_and(|b| matches!(b, 0x90..=0x9f | 0xdc | 0xdd)) {
                return Err(CodecError::List);
            }
            from_msgpack(bytes)
        }
        Some(other) => Err(CodecError::ContentType(other.chars().take(64).collect())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;

    #[derive(Debug, Serialize, Deserialize, PartialEq)]
    struct Old {
        a: u32,
    }
    #[derive(Debug, Serialize, Deserialize)]
    struct New {
        a: u32,
        b: String,
    }

    #[test]
    fn lists_are_no_requests() {
        assert!(matches!(from_request::<Old>(b" [7]", None), Err(CodecError::List)));
        assert!(matches!(from_request::<Old>(&[0x91, 7], Some(MSGPACK)), Err(CodecError::List)));
        assert_eq!(from_request::<Old>(b" {\"a\":7}", None).expect("a map"), Old { a: 7 });
    }

    #[test]
    fn unknown_fields_are_tolerated_in_both_codecs() {
        let new = New { a: 7, b: "x".into() };
        assert_eq!(from_json::<Old>(&to_json(&new).expect("json")).expect("old reads new"), Old { a: 7 });
        assert_eq!(from_msgpack::<Old>(&to_msgpack(&new).expect("msgpack")).expect("old reads new"), Old { a: 7 });
    }

    #[test]
    fn strangers_documents_are_bounded() {
        let deep = "[".repeat(100_000);
        assert!(from_request::<serde_json::Value>(&deep.as_bytes()[..1000], None).is_err());
        assert!(matches!(from_request::<serde_json::Value>(deep.as_bytes(), None), Err(CodecError::TooLarge { .. })));
        let deep_msgpack = vec![0x91u8; 1000];
        assert!(from_request::<serde_json::Value>(&deep_msgpack, Some(MSGPACK)).is_err());
        assert!(matches!(from_request::<Old>(b"a: 1", Some("text/yaml")), Err(CodecError::ContentType(_))));
    }
}
