//! Layers of settings, flattened to single values, so that each can be checked alone and traced to where it was set.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    path::{Path, PathBuf},
};

use config::{ConfigError, FileFormat, Source as _, Value, ValueKind};
use serde::{Serialize, de::DeserializeOwned};

use crate::env::{Env, PREFIX};

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Origin {
    Default,
    Env(String),
    File(PathBuf),
    Flag(String),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::Default => f.write_str("default"),
            Origin::Env(name) => write!(f, "env:{name}"),
            Origin::File(path) => write!(f, "file:{}", path.display()),
            Origin::Flag(flag) => write!(f, "flag:{flag}"),
        }
    }
}

/// One value that somebody set.
#[derive(Debug, Clone)]
pub(crate) struct Setting {
    pub(crate) path: Vec<String>,
    pub(crate) origin: Origin,
    /// The value as it may be meant, best first: text from the environment does not say whether it is a list.
    readings: Vec<ValueKind>,
}

impl Setting {
    pub(crate) fn key(&self) -> String {
        self.path.join(".")
    }

    /// Whether its value may hold a secret, so that no message may repeat it: addresses carry passwords too.
    fn is_private(&self) -> bool {
        self.path.first().is_some_and(|section| section == "nats")
    }
}

/// All layers, lowest first.
pub(crate) struct Layers {
    defaults: serde_json::Value,
    settings: Vec<Setting>,
    /// First names of whatever somebody set here, right or wrong.
    sections: BTreeSet<String>,
    problems: Vec<String>,
}

impl Layers {
    pub(crate) fn new(defaults: &impl Serialize) -> Self {
        // Without a tree of defaults only the kind check of file values is weaker; the values themselves come from serde.
        let defaults = serde_json::to_value(defaults).unwrap_or_default();
        Self { defaults, settings: Vec::new(), sections: BTreeSet::new(), problems: Vec::new() }
    }

    pub(crate) fn file(&mut self, path: &Path) {
        let source = config::File::from(path).format(FileFormat::Toml).required(true);
        match source.collect() {
            Ok(table) => {
                let mut leaves = Vec::new();
                for (key, value) in table {
                    flatten(vec![key], value, &mut leaves);
                }
                leaves.sort_by(|a, b| a.0.cmp(&b.0));
                for (path_in_file, kind) in leaves {
                    self.sections.extend(path_in_file.first().cloned());
                    if let Some(expected) = self.wrong_kind(&path_in_file, &kind) {
                        let key = path_in_file.join(".");
                        self.problems.push(format!("file:{}: {key}: expected {expected}", path.display()));
                        continue;
                    }
                    let readings = match kind {
                        ValueKind::String(text) if is_named_beside(&path_in_file, &text) => {
                            vec![ValueKind::String(beside(path, &text))]
                        }
                        ValueKind::String(text) if self.is_list(&path_in_file) => readings(&text),
                        kind => vec![kind],
                    };
                    self.push(path_in_file, Origin::File(path.to_owned()), readings);
                }
            }
            Err(e) => self.problems.push(format!("file:{}: {}", path.display(), without_source(&e))),
        }
    }

    pub(crate) fn env(&mut self, env: &impl Env) {
        let prefix = format!("{PREFIX}__");
        let variables = env.starting_with(&prefix);
        let source = config::Environment::with_prefix(PREFIX)
            .prefix_separator("__")
            .separator("__")
            .source(Some(variables.clone().into_iter().collect()));
        match source.collect() {
            Ok(values) => {
                let names: BTreeMap<String, &String> = variables
                    .keys()
                    .filter_map(|name| Some((name.strip_prefix(&prefix)?.to_lowercase().replace("__", "."), name)))
                    .collect();
                let mut values: Vec<_> = values.into_iter().collect();
                values.sort_by(|a, b| a.0.cmp(&b.0));
                for (key, value) in values {
                    let name = names.get(&key).map_or_else(|| format!("{prefix}..."), |n| (*n).clone());
                    if let ValueKind::String(text) = value.kind {
                        self.sections.extend(split(&key).into_iter().next());
                        self.push(split(&key), Origin::Env(name), readings(&text));
                    }
                }
            }
            Err(e) => self.problems.push(format!("env: {e}")),
        }
    }

    pub(crate) fn flag(&mut self, flag: &str, key: &str, value: &str) {
        self.sections.extend(split(key).into_iter().next());
        self.push(split(key), Origin::Flag(flag.to_owned()), readings(value));
    }

    pub(crate) fn inherited(&mut self, variable: &str, key: &str, value: &str) {
        self.push(split(key), Origin::Env(variable.to_owned()), vec![ValueKind::String(value.to_owned())]);
    }

    /// Whether somebody set something in this section, beyond what is inherited from other programs' variables.
    pub(crate) fn mentions(&self, section: &str) -> bool {
        self.sections.contains(section)
    }

    fn push(&mut self, path: Vec<String>, origin: Origin, readings: Vec<ValueKind>) {
        self.settings.push(Setting { path, origin, readings });
    }

    fn default_of(&self, path: &[String]) -> Option<&serde_json::Value> {
        path.iter().try_fold(&self.defaults, |at, name| at.get(name))
    }

    fn is_list(&self, path: &[String]) -> bool {
        self.default_of(path).is_some_and(serde_json::Value::is_array)
    }

    /// The `config` crate reads "5" as a number where one is wanted. Right for the environment, which has only text; in a
    /// file it is a mistake.
    fn wrong_kind(&self, path: &[String], found: &ValueKind) -> Option<&'static str> {
        use serde_json::Value as Json;
        let default = self.default_of(path)?;
        match (default, found) {
            (Json::Number(_), ValueKind::String(_) | ValueKind::Boolean(_)) => Some("a number"),
            (Json::Number(n), ValueKind::Float(_)) if !n.is_f64() => Some("a whole number"),
            (Json::Bool(_), kind) if !matches!(kind, ValueKind::Boolean(_)) => Some("true or false"),
            (Json::String(_), ValueKind::Boolean(_)) => Some("text in quotes"),
            _ => None,
        }
    }

    /// Each setting alone against `T`: unknown names and wrong types, every one. Returns those that stand, the highest
    /// layer of each key only, and what is wrong.
    pub(crate) fn checked<T: DeserializeOwned>(self) -> (Vec<Setting>, Vec<String>) {
        let mut problems = self.problems;
        let mut standing: BTreeMap<Vec<String>, Setting> = BTreeMap::new();
        for mut setting in self.settings {
            let mut first_error = None;
            let good = setting.readings.iter().position(|reading| {
                let tree = nest(&setting.path, reading.clone());
                match tree.try_deserialize::<T>() {
                    Ok(_) => true,
                    Err(e) => {
                        first_error.get_or_insert(e);
                        false
                    }
                }
            });
            match (good, first_error) {
                (Some(at), _) => {
                    setting.readings = vec![setting.readings.swap_remove(at)];
                    standing.insert(setting.path.clone(), setting);
                }
                (None, error) => {
                    let why = match (error, setting.readings.first()) {
                        (Some(error), Some(found)) if setting.is_private() => describe_kind(&error, found),
                        (Some(error), _) => describe(&error),
                        (None, _) => "no value".to_owned(),
                    };
                    problems.push(format!("{}: {}: {why}", setting.origin, setting.key()));
                }
            }
        }
        (standing.into_values().collect(), problems)
    }
}

/// Puts settings over the defaults of `T`.
pub(crate) fn assemble<T: DeserializeOwned>(set: &[Setting]) -> Result<T, String> {
    let mut root = Value::new(None, ValueKind::Table(config::Map::new()));
    for setting in set {
        if let Some(kind) = setting.readings.first() {
            insert(&mut root, &setting.path, kind.clone());
        }
    }
    // Which value it is about is not known here, so none is repeated.
    root.try_deserialize().map_err(|e| format!("settings do not go together: {}", wanted(&e)))
}

/// Keys, tokens and certificates travel with the file that names them, so a relative name is one beside it.
fn is_named_beside(setting: &[String], value: &str) -> bool {
    const FILES: [&str; 9] = [
        "ca_file",
        "credentials_file",
        "nkey_seed_file",
        "operator_token_file",
        "producer_token_file",
        "tls_ca",
        "tls_cert",
        "tls_key",
        "viewer_token_file",
    ];
    setting.last().is_some_and(|name| FILES.contains(&name.as_str())) && !value.is_empty()
}

fn beside(file: &Path, name: &str) -> String {
    // An absolute name stays as it is.
    let path = file.parent().map_or_else(|| PathBuf::from(name), |folder| folder.join(name));
    path.to_string_lossy().into_owned()
}

fn split(key: &str) -> Vec<String> {
    key.split('.').map(str::to_owned).collect()
}

/// Text as it may be meant: text, or a list separated by commas.
fn readings(text: &str) -> Vec<ValueKind> {
    let items = text.split(',').map(str::trim).filter(|i| !i.is_empty());
    let list = items.map(|i| Value::new(None, ValueKind::String(i.to_owned()))).collect();
    vec![ValueKind::String(text.to_owned()), ValueKind::Array(list)]
}

fn flatten(path: Vec<String>, value: Value, leaves: &mut Vec<(Vec<String>, ValueKind)>) {
    match value.kind {
        ValueKind::Table(table) if !table.is_empty() => {
            for (key, value) in table {
                let mut deeper = path.clone();
                deeper.push(key);
                flatten(deeper, value, leaves);
            }
        }
        kind => leaves.push((path, kind)),
    }
}

fn nest(path: &[String], kind: ValueKind) -> Value {
    let mut root = Value::new(None, ValueKind::Table(config::Map::new()));
    insert(&mut root, path, kind);
    root
}

fn insert(root: &mut Value, path: &[String], kind: ValueKind) {
    let Some((name, rest)) = path.split_first() else {
        root.kind = kind;
        return;
    };
    if !matches!(root.kind, ValueKind::Table(_)) {
        root.kind = ValueKind::Table(config::Map::new());
    }
    if let ValueKind::Table(table) = &mut root.kind {
        insert(table.entry(name.clone()).or_insert_with(|| Value::new(None, ValueKind::Nil)), rest, kind);
    }
}

/// The error without its own idea of key and origin: ours are better.
fn describe(error: &ConfigError) -> String {
    match error {
        ConfigError::Type { unexpected, expected, .. } => format!("found {unexpected}, expected {expected}"),
        ConfigError::At { error, .. } => describe(error),
        other => other.to_string(),
    }
}

/// As [`describe`], with the kind of the value in place of the value.
fn describe_kind(error: &ConfigError, found: &ValueKind) -> String {
    match wanted(error) {
        unknown if unknown.starts_with("unknown field") => unknown,
        wanted => format!("found {}, {wanted}", kind(found)),
    }
}

/// What was expected, without what was found.
fn wanted(error: &ConfigError) -> String {
    match error {
        ConfigError::Type { expected, .. } => format!("expected {expected}"),
        ConfigError::At { error, .. } => wanted(error),
        // Names of fields only.
        ConfigError::Message(text) if text.starts_with("unknown field") => text.clone(),
        ConfigError::Message(text) => match text.rsplit_once(", expected ") {
            Some((_, expected)) => format!("expected {expected}"),
            None => "which is not its kind of value".to_owned(),
        },
        _ => "which is not its kind of value".to_owned(),
    }
}

fn kind(value: &ValueKind) -> &'static str {
    match value {
        ValueKind::Nil => "nothing",
        ValueKind::Boolean(_) => "true or false",
        ValueKind::I64(_) | ValueKind::I128(_) | ValueKind::U64(_) | ValueKind::U128(_) => "a whole number",
        ValueKind::Float(_) => "a number",
        ValueKind::String(_) => "text",
        ValueKind::Table(_) => "a table",
        ValueKind::Array(_) => "a list",
    }
}

/// A parser shows the line that it cannot read, and the line may hold a password: place and complaint are kept.
fn without_source(error: &ConfigError) -> String {
    let text = match error {
        ConfigError::FileParse { cause, .. } => cause.to_string(),
        other => other.to_string(),
    };
    let mut lines = text.lines().map(str::trim_end).filter(|l| !l.is_empty());
    match (lines.next(), lines.next_back()) {
        (Some(place), Some(complaint)) => format!("{place}: {complaint}"),
        (Some(all), None) => all.to_owned(),
        (None, _) => "cannot be read".to_owned(),
    }
}
