use std::collections::BTreeMap;

use super::*;

fn env(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect()
}

fn file(text: &str) -> tempfile::NamedTempFile {
    let file = tempfile::Builder::new().suffix(".toml").tempfile().expect("temporary file");
    std::fs::write(file.path(), text).expect("write");
    file
}

fn set(pairs: &[(&str, &str)]) -> Overrides {
    let flags = pairs.iter().map(|(k, v)| ("--set".to_owned(), (*k).to_owned(), (*v).to_owned())).collect();
    Overrides { config: None, flags }
}

fn origin(loaded: &Loaded, key: &str) -> String {
    loaded.rows().into_iter().find(|r| r.key == key).map(|r| r.origin).unwrap_or_default()
}

#[test]
fn defaults_are_valid() {
    let loaded = load(&Overrides::default(), &env(&[]), &[], &[]).expect("defaults");
    assert!(loaded.rows().iter().all(|r| r.origin == "default"), "{:?}", loaded.rows());
}

#[test]
fn each_layer_wins_over_the_one_below() {
    let file = file("[nats]\nrequest_timeout_ms = 1111\nping_interval_ms = 1112\nconnect_timeout_ms = 1113\n");
    let env = env(&[("VOXFLEET__NATS__PING_INTERVAL_MS", "2222"), ("VOXFLEET__NATS__CONNECT_TIMEOUT_MS", "2223")]);
    let overrides = set(&[("nats.connect_timeout_ms", "3333")]);
    let loaded = load(&overrides, &env, &[Path::new("/nonexistent"), file.path()], &[]).expect("valid");
    let nats = &loaded.settings.nats;
    assert_eq!((nats.request_timeout_ms, nats.ping_interval_ms, nats.connect_timeout_ms), (1111, 2222, 3333));
    assert_eq!(origin(&loaded, "nats.request_timeout_ms"), format!("file:{}", file.path().display()));
    assert_eq!(origin(&loaded, "nats.ping_interval_ms"), "env:VOXFLEET__NATS__PING_INTERVAL_MS");
    assert_eq!(origin(&loaded, "nats.connect_timeout_ms"), "flag:--set");
    assert_eq!(origin(&loaded, "nats.prefix"), "default");
}

#[test]
fn files_of_keys_are_looked_for_beside_the_file_that_names_them() {
    let file = file(
        "[nats]\nnkey_seed_file = \"worker.nk\"\ntls_ca = \"/etc/ca.pem\"\n[dispatcher.http]\ntls_key = \"tls/k.pem\"\n",
    );
    let folder = file.path().parent().expect("a folder").to_owned();
    let named = Overrides { config: Some(file.path().to_owned()), ..Overrides::default() };
    let loaded = load(&named, &env(&[]), &[], &[]).expect("valid");
    let nats = &loaded.settings.nats;
    assert_eq!(nats.nkey_seed_file, Some(folder.join("worker.nk")));
    assert_eq!(nats.tls_ca.as_deref(), Some(Path::new("/etc/ca.pem")));
    #[cfg(feature = "dispatcher")]
    assert_eq!(loaded.settings.dispatcher.http.tls_key, Some(folder.join("tls/k.pem")));
    // What somebody types is meant from where he is.
    let typed = load(&set(&[("nats.nkey_seed_file", "worker.nk")]), &env(&[]), &[], &[]).expect("valid");
    assert_eq!(typed.settings.nats.nkey_seed_file.as_deref(), Some(Path::new("worker.nk")));
}

#[test]
fn a_list_can_come_as_text() {
    let loaded = load(&set(&[("nats.urls", "nats://a:1, nats://b:2")]), &env(&[]), &[], &[]).expect("valid");
    assert_eq!(loaded.settings.nats.urls, ["nats://a:1", "nats://b:2"]);
    assert_eq!(origin(&loaded, "nats.urls"), "flag:--set");
}

#[test]
fn every_mistake_is_named_at_once() {
    let file =
        file("[nats]\nrequest_timeout_ms = \"soon\"\nno_such_key = 1\nping_interval_ms = \"5\"\n[nowhere]\nx = 1\n");
    let overrides = Overrides { config: Some(file.path().to_owned()), ..set(&[("nats.connect_timeout_ms", "never")]) };
    let env = env(&[("VOXFLEET__NATS__COLOUR", "red"), ("VOXFLEET__LOG__FORMAT", "verse")]);
    let problems = load(&overrides, &env, &[], &[]).expect_err("bad").problems.join("\n");
    for wanted in [
        "nats.request_timeout_ms",
        "no_such_key",
        "nats.ping_interval_ms: expected a number",
        "nowhere",
        "flag:--set: nats.connect_timeout_ms",
        "env:VOXFLEET__NATS__COLOUR",
        "env:VOXFLEET__LOG__FORMAT",
    ] {
        assert!(problems.contains(wanted), "{wanted} is missing in\n{problems}");
    }
    assert_eq!(problems.lines().count(), 7, "{problems}");
}

#[test]
fn what_a_section_finds_wrong_is_told_with_its_name() {
    let problems =
        load(&set(&[("log.filter", "a=b=c"), ("nats.urls", "")]), &env(&[]), &[], &[]).expect_err("bad").problems;
    assert!(problems.iter().any(|p| p.starts_with("log.filter")), "{problems:?}");
}

#[test]
fn a_file_that_is_named_must_be_there_and_be_toml() {
    let missing = Overrides { config: Some("/nonexistent/v.toml".into()), flags: Vec::new() };
    assert!(load(&missing, &env(&[]), &[], &[]).is_err());
    let broken = file("[nats\n");
    let named = Overrides { config: Some(broken.path().to_owned()), flags: Vec::new() };
    assert!(load(&named, &env(&[]), &[], &[]).is_err());
}

#[test]
fn secrets_are_never_shown() {
    let shown = |pairs: &[(&str, &str)]| match load(&set(pairs), &env(&[]), &[], &[]) {
        Ok(loaded) => show::table(&loaded.rows()),
        Err(problems) => problems.to_string(),
    };
    let valid =
        shown(&[("nats.user", "me"), ("nats.password", "hunter2"), ("nats.urls", "nats://me:hunter2@host:4222")]);
    assert!(valid.contains("nats.password = \"***\"") && valid.contains("nats://***@host:4222"), "{valid}");
    let contradiction =
        shown(&[("nats.user", "me"), ("nats.token", "hunter2"), ("nats.urls", "nats://me:hunter2@bad host")]);
    assert!(contradiction.contains("choose one way"), "{contradiction}");
    assert!(!valid.contains("hunter2") && !contradiction.contains("hunter2"), "{valid}{contradiction}");
}

#[test]
fn mistakes_are_told_without_the_secret() {
    let in_file = |text: &str| {
        let file = file(text);
        let named = Overrides { config: Some(file.path().to_owned()), flags: Vec::new() };
        load(&named, &env(&[]), &[], &[]).expect_err(text).to_string()
    };
    let by_flag = |key: &str, value: &str| load(&set(&[(key, value)]), &env(&[]), &[], &[]).expect_err(key).to_string();
    for (told, wanted) in [
        (in_file("[nats]\nuser = \"me\"\npassword = \"SECRETB\n"), "line 3, column"),
        (in_file("[nats]\npassword = SECRETB\n"), "line 2, column"),
        (in_file("nats = \"nats://u:SECRETB@h:4222\"\n"), "nats: found text"),
        (in_file("[nats]\nurls = { a = \"nats://u:SECRETB@h:4222\" }\n"), "nats.urls.a: found text"),
        (in_file("[nats]\nurl = \"nats://u:SECRETB@h:4222\"\n"), "unknown field `url`"),
        (in_file("[nats]\npassword = [\"SECRETB\"]\n"), "nats.password: found a list"),
        (by_flag("nats.ping_interval_ms", "SECRETB"), "nats.ping_interval_ms: found text"),
        (by_flag("nats", "nats://u:SECRETB@h:4222"), "nats: found text"),
        (by_flag("nats.tls_required", "SECRETB"), "nats.tls_required: found text"),
    ] {
        assert!(!told.contains("SECRETB"), "{told}");
        assert!(told.contains(wanted), "{wanted} is missing in\n{told}");
    }
}

#[test]
fn a_list_can_come_as_text_in_a_file_too() {
    let file = file("[nats]\nurls = \"nats://a:1, nats://b:2\"\n");
    let loaded = load(&Overrides::default(), &env(&[]), &[file.path()], &[]).expect("valid");
    assert_eq!(loaded.settings.nats.urls, ["nats://a:1", "nats://b:2"]);
}

#[cfg(feature = "worker")]
#[test]
fn well_known_variables_are_followed_and_overruled() {
    let inherited = [("VOXFLEET_CACHE", "/c"), ("ORT_DYLIB_PATH", "/lib/ort.so")];
    let loaded = load(&Overrides::default(), &env(&inherited), &[], &[]).expect("valid");
    assert_eq!(origin(&loaded, "worker.cache_dir"), "env:VOXFLEET_CACHE");
    assert_eq!(origin(&loaded, "worker.onnxruntime"), "env:ORT_DYLIB_PATH");
    let loaded = load(&set(&[("worker.cache_dir", "/other")]), &env(&inherited), &[], &[]).expect("valid");
    assert_eq!(origin(&loaded, "worker.cache_dir"), "flag:--set");
}

#[cfg(feature = "worker")]
#[test]
fn the_provider_is_found_and_overruled() {
    let rented = env(&[("RUNPOD_POD_ID", "ab12"), ("CONTAINER_ID", "7")]);
    let loaded = load(&Overrides::default(), &rented, &[], &[]).expect("valid");
    assert_eq!(loaded.settings.worker.provider, ProviderChoice::RunPod);
    assert_eq!(origin(&loaded, "worker.provider"), "env:RUNPOD_POD_ID");
    for (asked, found) in [("lambda", ProviderChoice::Lambda), ("auto", ProviderChoice::RunPod)] {
        let loaded = load(&set(&[("worker.provider", asked)]), &rented, &[], &[]).expect("valid");
        assert_eq!(loaded.settings.worker.provider, found, "{asked}");
    }
    let vast = env(&[("VAST_CONTAINERLABEL", "C.38250"), ("RUNPOD_POD_ID", "")]);
    let loaded = load(&Overrides::default(), &vast, &[], &[]).expect("valid");
    assert_eq!(loaded.settings.worker.provider, ProviderChoice::VastAi);
    let nowhere = load(&Overrides::default(), &env(&[]), &[], &[]).expect("valid");
    assert_eq!(nowhere.settings.worker.provider, ProviderChoice::Auto);
    assert!(load(&set(&[("worker.provider", "moon")]), &env(&[]), &[], &[]).is_err());
}
