//! The store over `file://` sources; servers that break off are in the end-to-end tests.

use std::time::Duration;

use tokio_util::sync::CancellationToken;
use voxfleet_schema::failure::FailureClass;

use super::*;

/// A folder of models, and one of sources beside it.
struct Bench {
    root: tempfile::TempDir,
    entries: String,
    quota: u64,
    offline: bool,
    mirrors: Vec<String>,
}

impl Bench {
    fn new() -> Self {
        let root = tempfile::tempdir().expect("folder");
        for folder in ["from", "models"] {
            fs::create_dir(root.path().join(folder)).expect("folder");
        }
        Self { root, entries: String::new(), quota: 0, offline: false, mirrors: Vec::new() }
    }

    fn at(&self, path: &str) -> PathBuf {
        self.root.path().join(path)
    }

    /// A model whose source holds `bytes`.
    fn model(&mut self, name: &str, bytes: &[u8], rest: &str) {
        fs::write(self.at(&format!("from/{name}.bin")), bytes).expect("source");
        self.entry(name, rest, "\"from/{file}\"");
    }

    fn entry(&mut self, name: &str, rest: &str, sources: &str) {
        self.entries += &format!(
            "[[model]]\nname = \"{name}\"\nkind = \"whisper\"\nlicence = \"MIT\"\nmultilingual = true\nexpected_mb = 1\n\
             files = [{{ file = \"{name}.bin\"{rest} }}]\nsources = [{sources}]\n"
        );
    }

    /// A model folder, whose source holds [`FOLDER`].
    fn folder(&mut self, name: &str) {
        fs::create_dir(self.at(&format!("from/{name}"))).expect("source");
        let file = |(file, bytes): (&str, &[u8])| {
            fs::write(self.at(&format!("from/{name}/{file}")), bytes).expect("source");
            format!("{{ file = \"{file}\"{} }}", known(bytes))
        };
        let files = FOLDER.map(file).join(", ");
        self.entries += &format!(
            "[[model]]\nname = \"{name}\"\nkind = \"whisper_ct2\"\nlicence = \"MIT\"\nmultilingual = true\n\
             expected_mb = 1\nfiles = [{files}]\nsources = [\"from/{name}/{{file}}\"]\n"
        );
    }

    fn store(&self) -> ModelStore {
        let path = self.at("more.toml");
        fs::write(&path, &self.entries).expect("catalog");
        let catalog = Catalog::load(Some(&path)).expect("valid");
        let fetcher = Fetcher::trusted(None).expect("fetcher");
        ModelStore::open(self.at("models"), self.quota, catalog, fetcher, self.offline).with_mirrors(&self.mirrors)
    }

    fn read(&self, path: &str) -> Option<Vec<u8>> {
        fs::read(self.at(path)).ok()
    }
}

/// In the order in which they come.
const FOLDER: [(&str, &[u8]); 3] = [("config.json", b"{}"), ("vocabulary.txt", b"a\nb\n"), ("model.bin", &[7; 50_000])];

fn sum(bytes: &[u8]) -> String {
    use sha2::{Digest as _, Sha256};
    files::hex(Sha256::new_with_prefix(bytes))
}

fn known(bytes: &[u8]) -> String {
    format!(", bytes = {}, sha256 = \"{}\"", bytes.len(), sum(bytes))
}

/// Pulls and notes what happened.
async fn pull(store: &ModelStore, name: &str) -> (Result<Vec<Pulled>, ModelError>, Vec<String>) {
    let mut steps = Vec::new();
    let mut watch = |step: Step<'_>| {
        steps.push(match step {
            Step::Begun { from, .. } => format!("begun {from}"),
            Step::Failed { failure, .. } => format!("failed {}", failure.class),
            Step::Broken { failure, .. } => format!("broken {}", failure.class),
            Step::Evicted(removed) => format!("evicted {}", removed.name),
            Step::Damaged { .. } => "damaged".to_owned(),
            Step::Checking { .. } => "checking".to_owned(),
            Step::Waiting => "waiting".to_owned(),
            Step::Got { .. } => return,
        });
    };
    let result = store.pull(name, &mut watch, &CancellationToken::new()).await;
    (result, steps)
}

#[tokio::test]
async fn a_model_comes_whole_with_its_checksum_beside_it() {
    let mut bench = Bench::new();
    let bytes = vec![7; 300_000];
    bench.model("m", &bytes, &known(&bytes));
    let store = bench.store();
    assert_eq!(store.locate("m"), None);
    let (pulled, steps) = pull(&store, "m").await;
    let pulled = pulled.expect("pulled").remove(0);
    assert_eq!(steps, ["begun 0"]);
    assert_eq!((pulled.bytes, pulled.first_use), (300_000, false));
    assert!(pulled.url.is_some_and(|u| u.starts_with("file:///")));
    assert_eq!(bench.read("models/m.bin"), Some(bytes.clone()));
    assert_eq!(files::read_sum(&bench.at("models/m.bin")).expect("sum"), Some(sum(&bytes)));
    assert_eq!(store.locate("m"), Some(bench.at("models/m.bin")));
    let (again, steps) = pull(&store, "m").await;
    assert_eq!((again.expect("there").remove(0).url, steps), (None, vec!["checking".to_owned()]));
}

#[tokio::test]
async fn without_a_published_checksum_the_first_one_holds() {
    let mut bench = Bench::new();
    bench.model("m", b"first", "");
    let store = bench.store();
    let (pulled, _) = pull(&store, "m").await;
    assert!(pulled.expect("pulled")[0].first_use);
    assert_eq!(store.verify(Some("m")).expect("read")[0].verdict, Verdict::AsAtFirst);
    // The file is damaged here, and another one stands at the source by now.
    fs::write(bench.at("models/m.bin"), b"fXrst").expect("damage");
    fs::write(bench.at("from/m.bin"), b"other").expect("source");
    let (refused, steps) = pull(&store, "m").await;
    assert!(refused.expect_err("refused").to_string().contains("wrong checksum"));
    assert_eq!(steps, ["checking", "damaged", "begun 0", "failed model_missing"]);
    fs::write(bench.at("from/m.bin"), b"first").expect("source");
    assert!(pull(&store, "m").await.0.is_ok());
    assert_eq!(bench.read("models/m.bin").as_deref(), Some(&b"first"[..]));
}

#[tokio::test]
async fn a_wrong_checksum_never_becomes_a_model_and_the_next_source_is_asked() {
    let mut bench = Bench::new();
    let right = vec![1; 50_000];
    let mut wrong = right.clone();
    wrong[40_000] ^= 1;
    fs::create_dir(bench.at("bad")).expect("folder");
    fs::write(bench.at("bad/m.bin"), &wrong).expect("source");
    bench.entry("only", &known(&right), "\"bad/m.bin\"");
    bench.model("m", &right, &known(&right));
    bench.mirrors = vec![format!("file://{}", bench.at("bad").display())];
    let store = bench.store();
    let (pulled, steps) = pull(&store, "m").await;
    assert!(pulled.is_ok());
    assert_eq!(steps, ["begun 0", "failed model_missing", "begun 0"]);
    assert_eq!(bench.read("models/m.bin"), Some(right));
    let (refused, _) = pull(&store, "only").await;
    let refused = refused.expect_err("refused");
    assert_eq!(refused.class(), FailureClass::Unavailable, "one source has another file, one has none: {refused}");
    let ModelError::Sources { failures, .. } = &refused else { panic!("{refused}") };
    assert!(failures[1].failure.message.contains("wrong checksum"), "{refused}");
    for left in ["models/only.bin", "models/only.bin.part", "models/only.bin.sha256"] {
        assert_eq!(bench.read(left), None, "{left}");
    }
}

#[tokio::test]
async fn another_size_is_refused_before_it_comes() {
    let mut bench = Bench::new();
    let right = vec![1; 100];
    bench.model("m", &[1; 101], &known(&right));
    let (refused, steps) = pull(&bench.store(), "m").await;
    assert!(refused.expect_err("refused").to_string().contains("it has 101 bytes, the catalog says 100"));
    assert_eq!(steps, ["failed model_missing"]);
}

#[tokio::test]
async fn a_part_is_gone_on_with_unless_it_is_another_files() {
    let mut bench = Bench::new();
    let bytes: Vec<u8> = (0..200_000u32).map(|n| n as u8).collect();
    bench.model("m", &bytes, &known(&bytes));
    let store = bench.store();
    for (part, wanted) in [
        (bytes[..70_000].to_vec(), &["begun 70000"][..]),
        (bytes.clone(), &[]),
        (vec![0; 70_000], &["begun 70000", "broken model_missing", "begun 0"]),
        (vec![0; 200_000], &["broken model_missing", "begun 0"]),
        (vec![0; 200_001], &["begun 0"]),
    ] {
        fs::write(bench.at("models/m.bin.part"), part).expect("part");
        let (pulled, steps) = pull(&store, "m").await;
        assert_eq!(pulled.expect("pulled")[0].sha256, sum(&bytes));
        assert_eq!(steps, wanted);
        assert_eq!(bench.read("models/m.bin"), Some(bytes.clone()));
        assert_eq!(store.rm("m").expect("removed"), 200_000);
    }
}

#[tokio::test]
async fn without_a_checksum_nothing_is_gone_on_with() {
    let mut bench = Bench::new();
    bench.model("m", b"whole file", ", bytes = 10");
    let store = bench.store();
    fs::write(bench.at("models/m.bin.part"), b"other").expect("part");
    assert_eq!(pull(&store, "m").await.1, ["begun 0"]);
    assert_eq!(bench.read("models/m.bin").as_deref(), Some(&b"whole file"[..]));
}

#[tokio::test]
async fn a_damaged_model_is_found_and_mended() {
    let mut bench = Bench::new();
    let bytes = vec![3; 10_000];
    bench.model("m", &bytes, &known(&bytes));
    let store = bench.store();
    assert_eq!(store.verify(Some("m")).expect("read")[0].verdict, Verdict::Missing);
    pull(&store, "m").await.0.expect("pulled");
    assert_eq!(store.verify(None).expect("read")[0].verdict, Verdict::Good);
    let mut flipped = bytes.clone();
    flipped[5_000] ^= 4;
    fs::write(bench.at("models/m.bin"), &flipped).expect("damage");
    let verdict = store.verify(None).expect("read").remove(0).verdict;
    assert_eq!(verdict, Verdict::Damaged { expected: sum(&bytes), found: sum(&flipped) });
    assert_eq!(pull(&store, "m").await.1, ["checking", "damaged", "begun 0"]);
    assert_eq!(store.verify(Some("m")).expect("read")[0].verdict, Verdict::Good);
    // What the engine goes by is mended too.
    files::write_sum(&bench.at("models/m.bin"), &sum(b"x")).expect("sum");
    assert!(matches!(store.verify(Some("m")).expect("read")[0].verdict, Verdict::Damaged { .. }));
    assert_eq!(pull(&store, "m").await.1, ["checking"]);
    assert_eq!(store.verify(Some("m")).expect("read")[0].verdict, Verdict::Good);
}

#[tokio::test]
async fn offline_says_what_to_bring_and_still_takes_files() {
    let mut bench = Bench::new();
    bench.entry("far", &known(b"x"), "\"https://nowhere.invalid/{file}\"");
    bench.model("near", b"x", &known(b"x"));
    bench.offline = true;
    let store = bench.store();
    let (refused, steps) = pull(&store, "far").await;
    let told = refused.expect_err("refused").to_string();
    for wanted in ["voxfleet models pull far", "far.bin", "models.mirrors", &bench.at("models").display().to_string()] {
        assert!(told.contains(wanted), "{wanted} is missing in {told}");
    }
    assert!(steps.is_empty());
    assert!(pull(&store, "near").await.0.is_ok());
    bench.mirrors = vec![format!("file://{}", bench.at("from").display())];
    assert!(matches!(pull(&bench.store(), "far").await.0, Err(ModelError::Offline { .. })), "it is not there either");
    fs::write(bench.at("from/far.bin"), b"x").expect("brought");
    assert!(pull(&bench.store(), "far").await.0.is_ok());
}

/// `when` days after the beginning of time.
fn used(path: &Path, when: u64) {
    let file = fs::File::options().append(true).open(path).expect("model");
    file.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(when * 86_400)).expect("time");
}

#[tokio::test]
async fn the_quota_removes_what_was_not_used_for_the_longest_time() {
    let mut bench = Bench::new();
    for name in ["a", "b", "c", "d"] {
        let bytes = name.repeat(1_000);
        bench.model(name, bytes.as_bytes(), &known(bytes.as_bytes()));
    }
    bench.model("huge", &[0; 4_000], &known(&[0; 4_000]));
    fs::write(bench.at("models/own.bin"), [0; 500]).expect("an operator's file");
    bench.quota = 3_600;
    let store = bench.store();
    for (day, name) in [(3, "a"), (1, "b"), (2, "c")] {
        assert!(pull(&store, name).await.0.is_ok());
        used(&bench.at(&format!("models/{name}.bin")), day);
    }
    let held = InUse::hold(&bench.at("models/b.bin"));
    used(&bench.at("models/b.bin"), 1);
    let (pulled, steps) = pull(&store, "d").await;
    assert!(pulled.is_ok());
    assert_eq!(steps, ["evicted c", "begun 0"], "b is older and in use");
    assert_eq!(bench.read("models/c.bin.sha256"), None);
    drop(held);
    assert!(store.locate("b").is_some(), "a use counts");
    assert_eq!(pull(&store, "c").await.1, ["evicted a", "begun 0"]);
    let (refused, steps) = pull(&store, "huge").await;
    assert!(matches!(refused, Err(ModelError::Quota { needed: 4_000, quota: 3_600, held: 500, .. })), "{refused:?}");
    assert!(steps.is_empty(), "nothing is removed for what can not fit");
    assert!(bench.read("models/own.bin").is_some());
    // All were used just now, and a file system's clock is coarse.
    for (day, name) in [(1, "d"), (2, "b"), (3, "c")] {
        used(&bench.at(&format!("models/{name}.bin")), day);
    }
    fs::write(bench.at("models/a.bin.part"), [0; 10]).expect("half a model");
    bench.quota = 1_700;
    let gone: Vec<String> = bench.store().gc().expect("tidied").into_iter().map(|r| r.name).collect();
    assert_eq!(gone, ["a", "d", "b"]);
}

#[tokio::test]
async fn removing_says_what_was_not_here() {
    let mut bench = Bench::new();
    bench.model("m", b"x", &known(b"x"));
    let store = bench.store();
    assert!(matches!(store.rm("m"), Err(ModelError::NotHere { .. })));
    let Err(ModelError::Unknown { like, .. }) = store.rm("ggml-small") else { panic!("known?") };
    assert!(like.contains(&"small".to_owned()));
    pull(&store, "m").await.0.expect("pulled");
    let held = InUse::hold(&bench.at("models/m.bin"));
    assert!(matches!(store.rm("m"), Err(ModelError::InUse { .. })));
    drop(held);
    assert_eq!(store.rm("m").expect("removed"), 1);
    assert_eq!(fs::read_dir(bench.at("models")).expect("folder").count(), 1, "only the locks are left");
}

#[tokio::test]
async fn listing_shows_whole_half_and_missing_models() {
    let mut bench = Bench::new();
    bench.model("whole", b"xyz", &known(b"xyz"));
    bench.model("half", b"xyz", &known(b"xyz"));
    let store = bench.store();
    pull(&store, "whole").await.0.expect("pulled");
    fs::write(bench.at("models/half.bin.part"), b"xy").expect("part");
    fs::write(bench.at("models/own.bin"), b"four").expect("own");
    let listed = store.list();
    let of = |name: &str| listed.iter().find(|l| l.name == name).expect(name);
    let short = |name: &str| (of(name).presence, of(name).bytes, of(name).has_checksum);
    assert_eq!(short("whole"), (Presence::Present, 3, true));
    assert_eq!(short("half"), (Presence::Partial, 2, false));
    assert_eq!(short("tiny"), (Presence::Missing, 0, false));
    assert_eq!(short("own"), (Presence::Present, 4, false));
    assert!(of("own").model.is_none() && of("tiny").last_used.is_none());
}

#[tokio::test]
async fn a_pull_that_is_stopped_leaves_no_model() {
    let mut bench = Bench::new();
    bench.model("m", b"x", &known(b"x"));
    let (store, cancel) = (bench.store(), CancellationToken::new());
    cancel.cancel();
    let stopped = store.pull("m", &mut |_| (), &cancel).await;
    assert!(matches!(stopped, Err(ModelError::Cancelled { .. })), "{stopped:?}");
    assert_eq!(bench.read("models/m.bin"), None);
}

fn listed(store: &ModelStore, name: &str) -> (Presence, u64, bool) {
    let all = store.list();
    let listed = all.iter().find(|l| l.name == name).expect(name);
    (listed.presence, listed.bytes, listed.has_checksum)
}

#[tokio::test]
async fn a_folder_comes_whole_and_goes_whole() {
    let mut bench = Bench::new();
    bench.folder("m-ct2");
    bench.model("other", &[1; 20_000], &known(&[1; 20_000]));
    bench.quota = 60_000;
    let store = bench.store();
    let (pulled, steps) = pull(&store, "m-ct2").await;
    assert_eq!(pulled.expect("pulled")[2].path, bench.at("models/m-ct2/model.bin"));
    assert_eq!(steps, ["begun 0"; 3]);
    for (file, bytes) in FOLDER {
        assert_eq!(bench.read(&format!("models/m-ct2/{file}")).as_deref(), Some(bytes));
    }
    assert_eq!(listed(&store, "m-ct2"), (Presence::Present, 50_006, true));
    assert_eq!(store.locate("m-ct2"), Some(bench.at("models/m-ct2")));
    let verified = store.verify(None).expect("read");
    assert!(verified.len() == 3 && verified.iter().all(|v| v.verdict == Verdict::Good), "{verified:?}");
    let held = InUse::hold(&bench.at("models/m-ct2"));
    assert!(matches!(store.rm("m-ct2"), Err(ModelError::InUse { .. })));
    assert!(matches!(pull(&store, "other").await.0, Err(ModelError::Quota { held: 50_006, .. })));
    drop(held);
    assert_eq!(pull(&store, "other").await.1, ["evicted m-ct2", "begun 0"]);
    assert!(!bench.at("models/m-ct2").exists());
}

#[tokio::test]
async fn a_folder_without_its_weights_is_no_model() {
    let mut bench = Bench::new();
    bench.folder("m-ct2");
    fs::write(bench.at("from/m-ct2/model.bin"), [8; 50_000]).expect("other weights");
    let store = bench.store();
    for steps in [["begun 0", "begun 0"], ["checking", "checking"]] {
        let (refused, found) = pull(&store, "m-ct2").await;
        assert!(refused.expect_err("refused").to_string().contains("wrong checksum"));
        assert_eq!(found, [steps, ["begun 0", "failed model_missing"]].concat());
        assert!(bench.at("models/m-ct2/config.json").is_file() && !bench.at("models/m-ct2/model.bin").exists());
        assert_eq!(listed(&store, "m-ct2"), (Presence::Partial, 6, false));
        assert_eq!((store.locate("m-ct2"), store.verify(None).expect("read")), (None, vec![]));
    }
    // A pull that broke off is gone on with, or tidied with all that it brought.
    fs::write(bench.at("from/m-ct2/model.bin"), [7; 50_000]).expect("the weights");
    let broken = || fs::write(bench.at("models/m-ct2/model.bin.part"), [7; 20_000]).expect("part");
    broken();
    assert_eq!(pull(&store, "m-ct2").await.1, ["checking", "checking", "begun 20000"]);
    for file in ["model.bin", "model.bin.sha256"] {
        fs::remove_file(bench.at(&format!("models/m-ct2/{file}"))).expect("removed");
    }
    broken();
    assert_eq!(store.gc().expect("tidied"), [Removed { name: "m-ct2".to_owned(), bytes: 20_006 }]);
    assert!(!bench.at("models/m-ct2").exists());
}

#[tokio::test]
async fn a_folder_of_somebodys_own_is_theirs_until_it_is_pulled() {
    let mut bench = Bench::new();
    bench.folder("m-ct2");
    fs::create_dir_all(bench.at("models/m-ct2")).expect("folder");
    for (file, bytes) in [("config.json", "{ }"), ("vocabulary.json", "[]"), ("model.bin", "own")] {
        fs::write(bench.at(&format!("models/m-ct2/{file}")), bytes).expect("own");
    }
    bench.quota = 1;
    assert!(bench.store().gc().expect("nothing to tidy").is_empty());
    bench.quota = 0;
    let store = bench.store();
    assert_eq!(listed(&store, "m-ct2"), (Presence::Present, 8, false));
    let verified = store.verify(None).expect("read");
    assert!(verified.len() == 2 && verified.iter().all(|v| v.verdict == Verdict::NoChecksum), "{verified:?}");
    let (pulled, steps) = pull(&store, "m-ct2").await;
    assert!(pulled.is_ok());
    assert_eq!(steps, ["checking", "damaged", "begun 0", "begun 0", "checking", "damaged", "begun 0"]);
    assert!(store.verify(Some("m-ct2")).expect("read").iter().all(|v| v.verdict == Verdict::Good));
    // Without the checksum it is theirs again, and all of it goes.
    fs::remove_file(files::sum_path(&bench.at("models/m-ct2/model.bin"))).expect("removed");
    assert!(store.rm("m-ct2").is_ok() && !bench.at("models/m-ct2").exists());
}
