//! Trace context as the W3C writes it (`traceparent`, version 00), so that what a fleet does for a producer hangs together with
//! what the producer does himself.
//!
//! A context names a trace and the span that whatever comes next is a part of. It is carried from a producer's header through
//! keys, assignments and work items to the header of finals. It changes nothing but what is told: one that cannot be read is
//! as good as none, and never a mistake of the message that carries it.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::IgnoredAny};

/// Name of the header, of messages and of HTTP requests.
pub const TRACEPARENT: &str = "traceparent";

/// Length of version 00, in bytes. Later versions begin like it.
const LENGTH: usize = 55;
const SAMPLED: u8 = 1;

/// Which trace, and which span of it.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct TraceContext {
    trace_id: u128,
    span_id: u64,
    sampled: bool,
}

impl TraceContext {
    /// None: an id is nought, which stands for none.
    pub fn new(trace_id: u128, span_id: u64, sampled: bool) -> Option<Self> {
        (trace_id != 0 && span_id != 0).then_some(Self { trace_id, span_id, sampled })
    }

    /// Reads a header. None: it is none that can be gone on with.
    pub fn parse(text: &str) -> Option<Self> {
        let text = text.trim_matches([' ', '\t']);
        let (known, rest) = (text.get(..LENGTH)?, text.get(LENGTH..)?);
        let mut fields = known.split('-');
        let mut hex = |digits: usize| -> Option<u128> {
            let field = fields.next().filter(|field| field.len() == digits)?;
            let plain = field.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
            plain.then(|| u128::from_str_radix(field, 16).ok()).flatten()
        };
        let (version, trace_id, span_id, flags) = (hex(2)?, hex(32)?, hex(16)?, hex(2)?);
        let may_go_on = if version == 0 { rest.is_empty() } else { rest.is_empty() || rest.starts_with('-') };
        if version == 0xff || !may_go_on {
            return None;
        }
        Self::new(trace_id, span_id as u64, flags as u8 & SAMPLED != 0)
    }

    pub fn trace_id(&self) -> u128 {
        self.trace_id
    }

    /// The trace's id as logs and collectors show it.
    pub fn trace_text(&self) -> String {
        format!("{:032x}", self.trace_id)
    }

    pub fn span_id(&self) -> u64 {
        self.span_id
    }

    /// Whoever began the trace wants it kept.
    pub fn is_sampled(&self) -> bool {
        self.sampled
    }

    /// Another span of the same trace.
    pub fn with_span(&self, span_id: u64) -> Self {
        Self { span_id: span_id.max(1), ..*self }
    }

    /// The span of this name and number below this one. Whoever knows the context finds the same id, so nobody needs to be
    /// told it: neither a dispatcher that takes over nor a worker that is asked twice.
    pub fn below(&self, name: &str, number: u64) -> Self {
        // FNV-1a, and splitmix64's last step, which spreads what differs in a bit only.
        let parts =
            [&self.trace_id.to_be_bytes()[..], &self.span_id.to_be_bytes(), &number.to_be_bytes(), name.as_bytes()];
        let mut hash = parts
            .into_iter()
            .flatten()
            .fold(0xcbf2_9ce4_8422_2325_u64, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x100_0000_01b3));
        hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        self.with_span(hash ^ (hash >> 31))
    }
}

impl fmt::Display for TraceContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "00-{:032x}-{:016x}-{:02x}", self.trace_id, self.span_id, u8::from(self.sampled))
    }
}

impl fmt::Debug for TraceContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for TraceContext {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// For fields of records: whatever cannot be read is none.
pub(crate) fn lenient<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<TraceContext>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Said {
        Text(String),
        Other(IgnoredAny),
    }
    Ok(match Said::deserialize(deserializer)? {
        Said::Text(text) => TraceContext::parse(&text),
        Said::Other(_) => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec;

    const GOOD: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    fn good() -> TraceContext {
        TraceContext::parse(GOOD).expect("reads")
    }

    #[test]
    fn a_header_reads_and_is_written_the_same() {
        let context = good();
        assert_eq!(context.trace_id(), 0x0af7_6519_16cd_43dd_8448_eb21_1c80_319c);
        assert_eq!((context.span_id(), context.is_sampled()), (0xb7ad_6b71_6920_3331, true));
        assert_eq!((context.to_string().as_str(), context.trace_text().as_str()), (GOOD, &GOOD[3..35]));
        let unsampled = GOOD.replace("-01", "-00");
        assert_eq!(TraceContext::parse(&unsampled).map(|c| (c.is_sampled(), c.to_string())), Some((false, unsampled)));
    }

    #[test]
    fn what_is_none_is_none() {
        let parses = |text: &str| TraceContext::parse(text).is_some();
        // Flags of tomorrow, versions of tomorrow with more behind, blanks around it.
        for text in [
            GOOD.to_owned(),
            format!(" {GOOD}\t"),
            GOOD.replace("-01", "-ff"),
            GOOD.replacen("00", "cc", 1),
            format!("{}-more", GOOD.replacen("00", "cc", 1)),
        ] {
            assert!(parses(&text), "{text:?}");
        }
        for text in [
            String::new(),
            "00".to_owned(),
            "-".repeat(LENGTH),
            GOOD[..LENGTH - 1].to_owned(),
            format!("{GOOD}0"),
            format!("{GOOD}-more"),
            format!("{}more", GOOD.replacen("00", "cc", 1)),
            GOOD.replacen("00", "ff", 1),
            GOOD.to_uppercase(),
            GOOD.replace("0af7651916cd43dd8448eb211c80319c", &"0".repeat(32)),
            GOOD.replace("b7ad6b7169203331", &"0".repeat(16)),
            GOOD.replace("b7ad", "+7ad"),
            GOOD.replace("-b7", "b7-"),
            GOOD.replace("b7ad", "é7a"),
            GOOD.replace('-', "_"),
            "\0".repeat(55),
            "9".repeat(100_000),
        ] {
            assert!(!parses(&text), "{text:?}");
        }
    }

    #[test]
    fn a_record_with_a_bad_one_still_reads() {
        #[derive(Debug, PartialEq, Serialize, Deserialize)]
        struct Record {
            n: u32,
            #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "lenient")]
            traceparent: Option<TraceContext>,
        }
        let read = |json: &str| codec::from_json::<Record>(json.as_bytes()).expect("reads").traceparent;
        assert_eq!(read(&format!(r#"{{"n":1,"traceparent":"{GOOD}"}}"#)), Some(good()));
        for other in [r#""nonsense""#, "null", "7", "[1,{}]", r#"{"a":[1]}"#, "true"] {
            assert_eq!(read(&format!(r#"{{"n":1,"traceparent":{other}}}"#)), None, "{other}");
        }
        let record = Record { n: 3, traceparent: Some(good()) };
        let bytes = codec::to_msgpack(&record).expect("encodes");
        assert_eq!(codec::from_msgpack::<Record>(&bytes).expect("decodes"), record);
        #[derive(Serialize)]
        struct Odd {
            n: u32,
            traceparent: Vec<u8>,
        }
        let odd = codec::to_msgpack(&Odd { n: 3, traceparent: vec![1, 2] }).expect("encodes");
        assert_eq!(codec::from_msgpack::<Record>(&odd).expect("decodes").traceparent, None);
    }

    #[test]
    fn spans_below_one_are_the_same_for_everybody_and_differ_from_each_other() {
        let context = good();
        assert_eq!(context.below("assign", 1), good().below("assign", 1));
        let mut spans = std::collections::BTreeSet::from([context.span_id()]);
        for name in ["assign", "job"] {
            for number in 0..500 {
                let below = context.below(name, number);
                assert_eq!((below.trace_id(), below.is_sampled()), (context.trace_id(), true));
                assert!(spans.insert(below.span_id()), "{name} {number}");
            }
        }
        assert!(spans.insert(context.with_span(9).below("assign", 1).span_id()));
        assert_eq!(context.with_span(0).span_id(), 1, "never none");
    }
}
