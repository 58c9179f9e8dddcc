//! Makes any payload of ours readable: `nats ... --translate "voxfleet decode"`.
//!
//! JSON is printed with indentation, MessagePack as JSON, audio as a summary, anything else as its first bytes. It never
//! fails: a tool that people look through must not turn a strange message into a second problem.

use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, SeqAccess, Visitor},
};
use serde_json::{Map, Value, json};
use voxfleet_schema::audio::{AudioFormat, Encoding, sniff_container};

/// Bytes of unknown content that are shown.
const SHOWN_BYTES: usize = 32;
/// Nesting beyond this is not shown; ours needs four.
const MAX_DEPTH: usize = 64;

pub(crate) fn readable(payload: &[u8], format: AudioFormat) -> String {
    if payload.is_empty() {
        return "(empty)".to_owned();
    }
    let value = json_of(payload).or_else(|| msgpack_of(payload)).unwrap_or_else(|| summary(payload, format));
    serde_json::to_string_pretty(&value).unwrap_or_else(|e| format!("(not printable: {e})"))
}

/// Documents only: a chunk of audio may happen to be a number.
fn json_of(payload: &[u8]) -> Option<Value> {
    let first = payload.iter().find(|b| !b.is_ascii_whitespace())?;
    matches!(first, b'{' | b'[' | b'"').then(|| serde_json::from_slice(payload).ok()).flatten()
}

/// A map or a list that uses up every byte; anything else is audio that looks like it.
fn msgpack_of(payload: &[u8]) -> Option<Value> {
    let first = *payload.first()?;
    if !matches!(first, 0x80..=0x9f | 0xdc..=0xdf) {
        return None;
    }
    let mut cursor = std::io::Cursor::new(payload);
    let mut decoder = rmp_serde::Deserializer::new(&mut cursor);
    decoder.set_max_depth(MAX_DEPTH);
    let Readable(value) = Readable::deserialize(&mut decoder).ok()?;
    let whole = usize::try_from(cursor.position()).ok()? == payload.len();
    (whole && value.as_object().is_none_or(|map| !map.is_empty())).then_some(value)
}

fn summary(payload: &[u8], format: AudioFormat) -> Value {
    if let Some(container) = sniff_container(payload) {
        return json!({ "container": container, "bytes": payload.len() });
    }
    if !payload.len().is_multiple_of(format.frame_bytes()) {
        return json!({
            "bytes": payload.len(),
            "note": format!("not a whole number of {format} frames"),
            "begins": hex(payload),
        });
    }
    let frames = (payload.len() / format.frame_bytes()) as u64;
    let peak = peak(payload, format.encoding);
    let dbfs = (peak > 0.0).then(|| (200.0 * peak.log10()).round() / 10.0);
    json!({
        "audio": format.to_string(),
        "bytes": payload.len(),
        "ms": frames * 1000 / u64::from(format.rate_hz),
        // No peak: digital silence.
        "peak_dbfs": dbfs,
    })
}

/// Largest magnitude, full scale is 1.
fn peak(payload: &[u8], encoding: Encoding) -> f64 {
    let loudest =
        |values: &mut dyn Iterator<Item = f64>| values.map(f64::abs).filter(|v| v.is_finite()).fold(0.0, f64::max);
    match encoding {
        Encoding::PcmS16Le => {
            let (samples, _) = payload.as_chunks::<2>();
            loudest(&mut samples.iter().map(|b| f64::from(i16::from_le_bytes(*b)) / 32_768.0))
        }
        Encoding::PcmF32Le => {
            let (samples, _) = payload.as_chunks::<4>();
            loudest(&mut samples.iter().map(|b| f64::from(f32::from_le_bytes(*b))))
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    let mut text: String = bytes.iter().take(SHOWN_BYTES).map(|b| format!("{b:02x}")).collect();
    if bytes.len() > SHOWN_BYTES {
        text.push_str("...");
    }
    text
}

/// Any self-describing value as JSON; byte strings, which JSON lacks, as their length and beginning.
struct Readable(Value);

impl<'de> Deserialize<'de> for Readable {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(AnyValue).map(Readable)
    }
}

struct AnyValue;

impl<'de> Visitor<'de> for AnyValue {
    type Value = Value;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("any value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, v: bool) -> Result<Value, E> {
        Ok(v.into())
    }

    fn visit_i64<E>(self, v: i64) -> Result<Value, E> {
        Ok(v.into())
    }

    fn visit_u64<E>(self, v: u64) -> Result<Value, E> {
        Ok(v.into())
    }

    fn visit_f64<E>(self, v: f64) -> Result<Value, E> {
        Ok(v.into())
    }

    fn visit_str<E>(self, v: &str) -> Result<Value, E> {
        Ok(v.into())
    }

    fn visit_bytes<E>(self, v: &[u8]) -> Result<Value, E> {
        Ok(json!({ "bytes": v.len(), "begins": hex(v) }))
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(AnyValue)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut items = Vec::new();
        while let Some(Readable(item)) = seq.next_element()? {
            items.push(item);
        }
        Ok(Value::Array(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut entries = Map::new();
        while let Some((Readable(key), Readable(value))) = map.next_entry()? {
            let key = match key {
                Value::String(text) => text,
                other => other.to_string(),
            };
            entries.insert(key, value);
        }
        Ok(Value::Object(entries))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decoded(payload: &[u8]) -> Value {
        serde_json::from_str(&readable(payload, AudioFormat::default())).expect("JSON")
    }

    #[test]
    fn json_passes_through_indented() {
        let text = readable(br#" {"a":[1,2]}"#, AudioFormat::default());
        assert!(text.contains("\n  \"a\": ["), "{text}");
    }

    #[test]
    fn msgpack_becomes_json() {
        #[derive(serde::Serialize)]
        struct Item {
            id: &'static str,
            n: i32,
            audio: bytes::Bytes,
        }
        let item = Item { id: "x", n: -3, audio: bytes::Bytes::from_static(&[0xff, 1, 2]) };
        let packed = voxfleet_schema::codec::to_msgpack(&item).expect("msgpack");
        assert_eq!(decoded(&packed), json!({"id": "x", "n": -3, "audio": {"bytes": 3, "begins": "ff0102"}}));
    }

    #[test]
    fn audio_is_summarised() {
        let half: Vec<u8> = std::iter::repeat_n(16_384i16.to_le_bytes(), 16_000).flatten().collect();
        assert_eq!(
            decoded(&half),
            json!({"audio": "pcm_s16le;rate=16000;channels=1", "bytes": 32_000, "ms": 1000, "peak_dbfs": -6.0})
        );
        assert_eq!(decoded(&[0; 320])["peak_dbfs"], Value::Null);
        let floats = AudioFormat { encoding: Encoding::PcmF32Le, rate_hz: 8_000, channels: 1 };
        let text = readable(&f32::NAN.to_le_bytes().repeat(8_000), floats);
        assert_eq!(serde_json::from_str::<Value>(&text).expect("JSON")["ms"], 1000);
    }

    #[test]
    fn nothing_makes_it_fail() {
        assert_eq!(readable(b"", AudioFormat::default()), "(empty)");
        assert_eq!(decoded(b"OggS\0\0")["container"], "ogg");
        assert!(decoded(&[1, 2, 3])["note"].is_string());
        // Begins as MessagePack and goes on: audio.
        assert_eq!(decoded(&[0x81, 0xa1, b'n', 7, 0, 0])["bytes"], 6);
        // Looks like MessagePack, is not: falls back to audio.
        assert_eq!(decoded(&[0x91, 0x91, 0x91, 0x91])["ms"], 0);
        assert!(readable(&[0x91; 100_000], AudioFormat::default()).contains("bytes"));
        assert!(readable("[".repeat(100_000).as_bytes(), AudioFormat::default()).contains("bytes"));
        assert!(decoded(b"{\"broken\": ")["bytes"].is_number());
    }
}
