//! A span that is over.

use std::time::{SystemTime, UNIX_EPOCH};

use voxfleet_schema::{failure::FailureClass, trace::TraceContext};

/// What an attribute says. Text is for ids and for words of ours, never for what somebody said or wrote.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Value {
    Text(String),
    Number(u64),
    Flag(bool),
}

impl From<u64> for Value {
    fn from(number: u64) -> Self {
        Value::Number(number)
    }
}

impl From<bool> for Value {
    fn from(flag: bool) -> Self {
        Value::Flag(flag)
    }
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Value::Text(text.to_owned())
    }
}

/// Something that was done, from when to when.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    pub name: &'static str,
    /// Its own: what is below it names this span.
    pub context: TraceContext,
    /// The span that it is a part of; none: it is the first of its trace.
    pub parent: Option<u64>,
    /// Unix times in ns.
    pub start_ns: u64,
    pub end_ns: u64,
    pub attributes: Vec<(&'static str, Value)>,
    /// Why it did not come to what it was meant for.
    pub error: Option<FailureClass>,
}

impl Span {
    /// A part of `parent`, which ends where it begins.
    pub fn below(parent: &TraceContext, context: TraceContext, name: &'static str, start_ns: u64) -> Self {
        let parent = Some(parent.span_id()).filter(|id| *id != context.span_id());
        Self { name, context, parent, start_ns, end_ns: start_ns, attributes: Vec::new(), error: None }
    }

    /// Clocks that were set meanwhile make it short, never negative.
    pub fn until(mut self, end_ns: u64) -> Self {
        self.end_ns = end_ns.max(self.start_ns);
        self
    }

    pub fn with(mut self, name: &'static str, value: impl Into<Value>) -> Self {
        self.attributes.push((name, value.into()));
        self
    }

    pub fn with_some(self, name: &'static str, value: Option<impl Into<Value>>) -> Self {
        match value {
            Some(value) => self.with(name, value),
            None => self,
        }
    }

    pub fn failed(mut self, class: Option<FailureClass>) -> Self {
        self.error = class;
        self
    }
}

/// Now. A clock set before 1970 reads as 1970.
pub fn unix_ns() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as u64)
}
