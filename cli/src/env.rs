//! The process environment, read here and nowhere else. Everything above takes an [`Env`], so tests pass a map.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use voxfleet_schema::trace::TraceContext;

/// Prefix of settings: `VOXFLEET__NATS__URLS`. Two underscores, so that `VOXFLEET_CACHE` is none of them.
pub(crate) const PREFIX: &str = "VOXFLEET";

pub(crate) trait Env {
    fn var(&self, name: &str) -> Option<String>;

    /// All variables whose name begins with `prefix`.
    fn starting_with(&self, prefix: &str) -> BTreeMap<String, String>;
}

/// The real environment. A value that is not UTF-8 counts as absent.
pub(crate) struct ProcessEnv;

impl Env for ProcessEnv {
    fn var(&self, name: &str) -> Option<String> {
        std::env::var(name).ok()
    }

    fn starting_with(&self, prefix: &str) -> BTreeMap<String, String> {
        std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
            .filter(|(name, _)| name.starts_with(prefix))
            .collect()
    }
}

impl Env for BTreeMap<String, String> {
    fn var(&self, name: &str) -> Option<String> {
        self.get(name).cloned()
    }

    fn starting_with(&self, prefix: &str) -> BTreeMap<String, String> {
        self.iter().filter(|(name, _)| name.starts_with(prefix)).map(|(n, v)| (n.clone(), v.clone())).collect()
    }
}

/// Where fetched files are kept: `VOXFLEET_CACHE`, else `voxfleet` in the user's cache folder. The names of the
/// variables that decided it come back too, for `config show`.
pub(crate) fn cache_dir(env: &impl Env) -> Option<(PathBuf, &'static str)> {
    let set = |name: &str| env.var(name).filter(|v| !v.is_empty());
    if let Some(dir) = set("VOXFLEET_CACHE") {
        return Some((dir.into(), "VOXFLEET_CACHE"));
    }
    // A relative XDG_CACHE_HOME is to be ignored, says its specification.
    if let Some(dir) = set("XDG_CACHE_HOME").filter(|d| Path::new(d).is_absolute()) {
        return Some((Path::new(&dir).join("voxfleet"), "XDG_CACHE_HOME"));
    }
    set("HOME").map(|home| (Path::new(&home).join(".cache/voxfleet"), "HOME"))
}

/// The trace that whoever started this command wants it to be part of, as OpenTelemetry has it for processes.
pub(crate) fn trace(env: &impl Env) -> Option<TraceContext> {
    TraceContext::parse(&env.var("TRACEPARENT")?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn env(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect()
    }

    #[test]
    fn a_command_is_part_of_its_callers_trace() {
        let text = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        assert_eq!(trace(&env(&[("TRACEPARENT", text)])).map(|trace| trace.to_string()).as_deref(), Some(text));
        assert_eq!(trace(&env(&[("TRACEPARENT", "x")])), None);
        assert_eq!(trace(&env(&[])), None);
    }

    #[test]
    fn the_cache_is_found_in_order() {
        let all = [("VOXFLEET_CACHE", "/v"), ("XDG_CACHE_HOME", "/x"), ("HOME", "/h")];
        assert_eq!(cache_dir(&env(&all)), Some(("/v".into(), "VOXFLEET_CACHE")));
        assert_eq!(cache_dir(&env(&all[1..])), Some(("/x/voxfleet".into(), "XDG_CACHE_HOME")));
        assert_eq!(cache_dir(&env(&all[2..])), Some(("/h/.cache/voxfleet".into(), "HOME")));
        assert_eq!(cache_dir(&env(&[("XDG_CACHE_HOME", "rel"), ("HOME", "/h")])).map(|c| c.1), Some("HOME"));
        assert_eq!(cache_dir(&env(&[])), None);
    }
}
