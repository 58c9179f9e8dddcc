//! Spans as OTLP writes them. Pure.

use opentelemetry_proto::tonic::{
    collector::trace::v1::ExportTraceServiceRequest,
    common::v1::{AnyValue, InstrumentationScope, KeyValue, any_value},
    resource::v1::Resource,
    trace::v1::{ResourceSpans, ScopeSpans, Span as WireSpan, Status, span::SpanKind, status::StatusCode},
};
use prost::Message as _;

use crate::span::{Span, Value};

const SCOPE: &str = "voxfleet";
/// W3C's flag: sampled. Only such spans are written.
const SAMPLED: u32 = 1;

/// Who tells them.
pub(crate) fn resource(attributes: &[(&'static str, String)]) -> Resource {
    let attributes = attributes.iter().map(|(name, text)| key_value(name, &Value::Text(text.clone()))).collect();
    Resource { attributes, ..Resource::default() }
}

/// The body of one request.
pub(crate) fn encode(resource: &Resource, spans: &[Span]) -> Vec<u8> {
    let scope = InstrumentationScope {
        name: SCOPE.to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        ..InstrumentationScope::default()
    };
    let spans =
        ScopeSpans { scope: Some(scope), spans: spans.iter().map(wire_span).collect(), ..ScopeSpans::default() };
    let all = ResourceSpans { resource: Some(resource.clone()), scope_spans: vec![spans], ..ResourceSpans::default() };
    ExportTraceServiceRequest { resource_spans: vec![all] }.encode_to_vec()
}

fn wire_span(span: &Span) -> WireSpan {
    let status = span.error.map(|class| Status { message: class.as_str().to_owned(), code: StatusCode::Error.into() });
    WireSpan {
        trace_id: span.context.trace_id().to_be_bytes().to_vec(),
        span_id: span.context.span_id().to_be_bytes().to_vec(),
        parent_span_id: span.parent.map(|id| id.to_be_bytes().to_vec()).unwrap_or_default(),
        name: span.name.to_owned(),
        kind: SpanKind::Internal.into(),
        flags: SAMPLED,
        start_time_unix_nano: span.start_ns,
        end_time_unix_nano: span.end_ns,
        attributes: span.attributes.iter().map(|(name, value)| key_value(name, value)).collect(),
        status,
        ..WireSpan::default()
    }
}

fn key_value(name: &str, value: &Value) -> KeyValue {
    let value = match value {
        Value::Text(text) => any_value::Value::StringValue(text.clone()),
        Value::Number(number) => any_value::Value::IntValue(i64::try_from(*number).unwrap_or(i64::MAX)),
        Value::Flag(flag) => any_value::Value::BoolValue(*flag),
    };
    KeyValue { key: name.to_owned(), value: Some(AnyValue { value: Some(value) }), ..KeyValue::default() }
}

#[cfg(test)]
mod tests {
    use voxfleet_schema::{failure::FailureClass, trace::TraceContext};

    use super::*;

    #[test]
    fn a_span_is_written_whole() {
        let parent = TraceContext::new(0xabc, 0xde, true).expect("a context");
        let span = Span::below(&parent, parent.with_span(0xf0), "final", 1_000)
            .until(3_000)
            .with("session", "call-7")
            .with("epoch", 2)
            .with("end", true)
            .with_some("model", None::<&str>)
            .failed(Some(FailureClass::OutOfMemory));
        let early = Span::below(&parent, parent, "first", 9_000).until(8_000);
        let body = encode(&resource(&[("service.name", "x".to_owned())]), &[span, early]);
        let read = ExportTraceServiceRequest::decode(body.as_slice()).expect("reads");
        let all = &read.resource_spans[0];
        assert_eq!(all.resource.as_ref().map(|r| r.attributes[0].key.as_str()), Some("service.name"));
        let [span, early] = &all.scope_spans[0].spans[..] else { panic!("two spans") };
        assert_eq!((span.trace_id.len(), span.trace_id[15], span.trace_id[14]), (16, 0xbc, 0x0a));
        assert_eq!(
            (span.span_id.as_slice(), span.parent_span_id.as_slice()),
            (&[0, 0, 0, 0, 0, 0, 0, 0xf0][..], &[0, 0, 0, 0, 0, 0, 0, 0xde][..])
        );
        assert_eq!((span.start_time_unix_nano, span.end_time_unix_nano, span.flags), (1_000, 3_000, 1));
        let names: Vec<&str> = span.attributes.iter().map(|a| a.key.as_str()).collect();
        assert_eq!(names, ["session", "epoch", "end"]);
        assert_eq!(span.status.as_ref().map(|s| (s.message.as_str(), s.code)), Some(("out_of_memory", 2)));
        assert!(early.parent_span_id.is_empty(), "nothing is its own parent");
        assert_eq!(early.end_time_unix_nano, 9_000, "no span ends before it begins");
    }
}
