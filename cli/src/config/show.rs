//! Every setting with its value and where it came from; secrets stay hidden.

use serde::Serialize;
use serde_json::Value;
use voxfleet_schema::job::AudioUrl;

use super::{Loaded, Origin};

#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Row {
    pub(crate) key: String,
    pub(crate) value: Value,
    pub(crate) origin: String,
}

impl Loaded {
    pub(crate) fn rows(&self) -> Vec<Row> {
        let tree = serde_json::to_value(&self.settings).unwrap_or_default();
        let mut rows = Vec::new();
        self.collect(&mut Vec::new(), &tree, &mut rows);
        rows
    }

    fn collect(&self, path: &mut Vec<String>, value: &Value, rows: &mut Vec<Row>) {
        match value {
            Value::Object(map) if !map.is_empty() => {
                for (name, value) in map {
                    path.push(name.clone());
                    self.collect(path, value, rows);
                    path.pop();
                }
            }
            leaf => {
                let origin = self.origin(path).to_string();
                rows.push(Row { key: path.join("."), value: without_passwords(leaf), origin });
            }
        }
    }

    /// A setting may stand for a whole branch (a list, a table): the longest one above `path` counts.
    fn origin(&self, path: &[String]) -> &Origin {
        self.set
            .iter()
            .filter(|s| path.starts_with(&s.path) || s.path.starts_with(path))
            .max_by_key(|s| s.path.len())
            .map_or(&Origin::Default, |s| &s.origin)
    }
}

/// Secrets hide themselves; a password or a signature inside a URL does not.
fn without_passwords(value: &Value) -> Value {
    match value {
        Value::String(text) if text.contains("://") => Value::String(AudioUrl::harmless(text)),
        Value::Array(items) => Value::Array(items.iter().map(without_passwords).collect()),
        other => other.clone(),
    }
}

/// Aligned for a terminal, still TOML-like: `nats.urls = [...]   # env:...`.
pub(crate) fn table(rows: &[Row]) -> String {
    let lines: Vec<(String, &str)> =
        rows.iter().map(|r| (format!("{} = {}", r.key, r.value), r.origin.as_str())).collect();
    let width = lines.iter().map(|(l, _)| l.chars().count()).filter(|w| *w <= 60).max().unwrap_or(0);
    lines.iter().map(|(line, origin)| format!("{line:<width$}  # {origin}\n")).collect()
}
