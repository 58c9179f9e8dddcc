//! What models there are, what their files must be, and where they come from.

use std::{
    collections::BTreeSet,
    fmt,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

/// The catalog that every binary carries.
const BUILT_IN: &str = include_str!("../../models.toml");
/// Stands for the name of the file in a source or mirror.
const FILE: &str = "{file}";
/// The weights in a model folder. A worker takes a folder that has it for a model, so it comes last and goes first.
pub(super) const WEIGHTS: &str = "model.bin";
const MAX_NAME: usize = 128;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ModelKind {
    /// Speech to text, in whisper.cpp's format.
    Whisper,
    /// Speech to text, as a folder in CTranslate2's format.
    WhisperCt2,
    /// Where somebody speaks.
    Vad,
    /// Who of a few local speakers speaks when.
    Segmentation,
    /// What a voice is like.
    Embedding,
}

impl ModelKind {
    pub fn as_str(self) -> &'static str {
        match self {
            ModelKind::Whisper => "whisper",
            ModelKind::WhisperCt2 => "whisper_ct2",
            ModelKind::Vad => "vad",
            ModelKind::Segmentation => "segmentation",
            ModelKind::Embedding => "embedding",
        }
    }
}

impl fmt::Display for ModelKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelFile {
    /// Its name in the folder of models, or in the model's own there.
    pub file: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes: Option<u64>,
    /// In hex. None = trusted on first use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Model {
    pub name: String,
    pub kind: ModelKind,
    pub licence: String,
    pub multilingual: bool,
    /// Device memory of the weights and one decode state, in MB: published, until measured.
    pub expected_mb: u64,
    /// Device memory of one decode state, in MB; 0 where there are none.
    #[serde(default)]
    pub state_mb: u64,
    pub files: Vec<ModelFile>,
    /// URLs, best first; a path without scheme is taken from the folder of the catalog.
    pub sources: Vec<String>,
}

impl Model {
    /// Device memory of the weights, in MB.
    pub fn weights_mb(&self) -> u64 {
        self.expected_mb.saturating_sub(self.state_mb)
    }

    /// Of all its files; None when the catalog does not say.
    pub fn bytes(&self) -> Option<u64> {
        self.files.iter().map(|f| f.bytes).sum()
    }

    /// Its own folder in the folder of models; none where its files lie there beside those of others.
    pub fn folder(&self) -> Option<&str> {
        (self.kind == ModelKind::WhisperCt2).then_some(self.name.as_str())
    }

    /// Where one of its files lies in the folder of models: `small.bin`, `small-ct2/config.json`.
    pub fn place(&self, file: &ModelFile) -> String {
        match self.folder() {
            Some(folder) => format!("{folder}/{}", file.file),
            None => file.file.clone(),
        }
    }

    /// Where one of its files may come from, best first: an operator's mirrors, which hold files as the folder of models
    /// does, then the catalog's sources.
    pub fn urls(&self, file: &ModelFile, mirrors: &[String]) -> Vec<String> {
        let place = self.place(file);
        let mirror = |mirror: &String| match mirror.contains(FILE) {
            true => mirror.replace(FILE, &place),
            false => format!("{}/{place}", mirror.trim_end_matches('/')),
        };
        let source = |source: &String| source.replace(FILE, &file.file);
        mirrors.iter().map(mirror).chain(self.sources.iter().map(source)).collect()
    }

    fn problems(&self) -> Vec<String> {
        let mut found = Vec::new();
        let mut check = |good: bool, what: String| {
            if !good {
                found.push(format!("model {:?}: {what}", self.name));
            }
        };
        check(good_name(&self.name), "not a name for a model".to_owned());
        check(!self.files.is_empty(), "no files".to_owned());
        check(!self.sources.is_empty(), "no sources".to_owned());
        check(self.state_mb <= self.expected_mb, "state_mb is part of expected_mb and can not be more".to_owned());
        for source in &self.sources {
            let one = self.files.len() <= 1 || source.contains(FILE);
            check(one, format!("source {source:?} has to say where {FILE} stands, for there are several"));
        }
        for file in &self.files {
            check(good_name(&file.file), format!("{:?} is not a name for a file", file.file));
            if let Some(sum) = &file.sha256 {
                let hex = sum.len() == 64 && sum.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
                check(hex, format!("sha256 {sum:?} is not 64 hexadecimal digits in lower case"));
            }
        }
        if let (ModelKind::Whisper, [file]) = (self.kind, &self.files[..]) {
            // Workers know a Whisper model by the stem of its file.
            check(file.file == format!("{}.bin", self.name), format!("its file has to be {}.bin", self.name));
        }
        if self.kind == ModelKind::WhisperCt2 {
            let last = self.files.last().is_some_and(|file| file.file == WEIGHTS);
            check(
                last,
                format!("the last of its files has to be {WEIGHTS}: a folder that has it is taken for a model"),
            );
        }
        found
    }
}

/// Neither a path nor something hidden: it becomes the name of a file in one folder.
fn good_name(name: &str) -> bool {
    let fine = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-' | b'+');
    !name.is_empty() && name.len() <= MAX_NAME && !name.starts_with('.') && name.bytes().all(fine)
}

#[derive(Debug, thiserror::Error)]
pub enum CatalogError {
    #[error("catalog {} cannot be read", path.display())]
    Unreadable {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("catalog {path}: {why}")]
    Syntax { path: String, why: String },
    #[error("catalog {path}: {}", problems.join("; "))]
    Content { path: String, problems: Vec<String> },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Toml {
    #[serde(default)]
    model: Vec<Model>,
}

/// Models in the order in which they are shown.
#[derive(Debug, Clone, PartialEq)]
pub struct Catalog {
    models: Vec<Model>,
}

/// The source tree that this binary or its user is in, where our own model is: looked for at run time, because a binary may
/// be copied anywhere. Without one, where the user is: what is named there is then said to be missing.
fn tree() -> PathBuf {
    let here = std::env::current_dir().unwrap_or_else(|_| "/".into());
    let exe = std::env::current_exe().ok();
    let above = exe.iter().flat_map(|exe| exe.ancestors()).chain(here.ancestors());
    above.into_iter().find(|dir| dir.join(OF_THE_TREE).is_file()).map_or_else(|| here.clone(), Path::to_owned)
}

/// By this file it is known.
const OF_THE_TREE: &str = "store/models.toml";

impl Catalog {
    /// The one inside the binary.
    pub fn built_in() -> Result<Self, CatalogError> {
        Ok(Self { models: parse(BUILT_IN, "models.toml", &tree())? })
    }

    /// The built-in one with an operator's file over it.
    pub fn load(path: Option<&Path>) -> Result<Self, CatalogError> {
        let mut catalog = Self::built_in()?;
        if let Some(path) = path {
            let unreadable = |source| CatalogError::Unreadable { path: path.to_owned(), source };
            let text = std::fs::read_to_string(path).map_err(unreadable)?;
            let folder = path.canonicalize().map_err(unreadable)?;
            let folder = folder.parent().unwrap_or(Path::new("/"));
            for model in parse(&text, &path.display().to_string(), folder)? {
                match catalog.models.iter_mut().find(|m| m.name == model.name) {
                    Some(known) => *known = model,
                    None => catalog.models.push(model),
                }
            }
            let problems = shared_files(&catalog.models);
            if !problems.is_empty() {
                return Err(CatalogError::Content { path: path.display().to_string(), problems });
            }
        }
        Ok(catalog)
    }

    pub fn get(&self, name: &str) -> Option<&Model> {
        self.models.iter().find(|m| m.name == name)
    }

    pub fn models(&self) -> &[Model] {
        &self.models
    }

    /// The names that look most like one that is not there, for an error that helps.
    pub fn like(&self, name: &str) -> Vec<&str> {
        let wanted = name.to_ascii_lowercase();
        // `ggml-small.en.bin` and `whisper-small` are what the files are called elsewhere.
        let bare = wanted.trim_start_matches("ggml-").trim_start_matches("whisper-").trim_end_matches(".bin");
        let shared = |other: &str| other.bytes().zip(bare.bytes()).take_while(|(a, b)| a == b).count();
        let mut names: Vec<&str> = self.models.iter().map(|m| m.name.as_str()).filter(|n| shared(n) >= 3).collect();
        names.sort_by_key(|n| (std::cmp::Reverse(shared(n)), n.len()));
        names.truncate(3);
        names
    }
}

fn parse(text: &str, path: &str, folder: &Path) -> Result<Vec<Model>, CatalogError> {
    let read: Toml = toml::from_str(text)
        .map_err(|e| CatalogError::Syntax { path: path.to_owned(), why: e.to_string().trim().to_owned() })?;
    let mut models = read.model;
    for source in models.iter_mut().flat_map(|m| &mut m.sources) {
        if !source.contains("://") {
            *source = file_url(&folder.join(&*source));
        }
    }
    let mut problems: Vec<String> = models.iter().flat_map(Model::problems).collect();
    let mut names = BTreeSet::new();
    problems
        .extend(models.iter().filter(|m| !names.insert(&m.name)).map(|m| format!("model {:?} comes twice", m.name)));
    problems.extend(shared_files(&models));
    match problems.is_empty() {
        true => Ok(models),
        false => Err(CatalogError::Content { path: path.to_owned(), problems }),
    }
}

/// The URL of an absolute path. Braces stay, for they mark the place of the file's name.
fn file_url(path: &Path) -> String {
    use std::os::unix::ffi::OsStrExt as _;
    let mut url = "file://".to_owned();
    for byte in path.as_os_str().as_bytes() {
        match byte {
            b if b.is_ascii_alphanumeric() || b"/._-+{}".contains(b) => url.push(char::from(*b)),
            b => url.push_str(&format!("%{b:02X}")),
        }
    }
    url
}

/// Two models with one file would remove and replace each other's.
fn shared_files(models: &[Model]) -> Vec<String> {
    let mut files = BTreeSet::new();
    let all = models.iter().flat_map(|m| m.files.iter().map(move |f| (m, m.place(f))));
    all.filter(|(_, place)| !files.insert(place.clone()))
        .map(|(m, place)| format!("model {:?}: {place} is another's file", m.name))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(text: &str) -> Result<Catalog, CatalogError> {
        let dir = tempfile::tempdir().expect("folder");
        let path = dir.path().join("more.toml");
        std::fs::write(&path, text).expect("file");
        Catalog::load(Some(&path))
    }

    fn entry(name: &str, rest: &str) -> String {
        format!(
            "[[model]]\nname = \"{name}\"\nkind = \"whisper\"\nlicence = \"MIT\"\nmultilingual = true\nexpected_mb = 1\n{rest}\n"
        )
    }

    #[test]
    fn the_built_in_catalog_is_whole() {
        let catalog = Catalog::built_in().expect("valid");
        for size in ["tiny", "tiny.en", "base", "base.en", "small", "small.en"] {
            for quant in ["", "-q5_1", "-q8_0"] {
                assert!(catalog.get(&format!("{size}{quant}")).is_some(), "{size}{quant}");
            }
        }
        for size in ["medium", "medium.en", "large-v2", "large-v3", "large-v3-turbo"] {
            for quant in ["", "-q5_0"] {
                assert!(catalog.get(&format!("{size}{quant}")).is_some(), "{size}{quant}");
            }
        }
        for size in ["tiny", "base", "small", "medium"].map(|s| [s.to_owned(), format!("{s}.en")]).concat() {
            let model = catalog.get(&format!("{size}-ct2")).expect(&size);
            assert_eq!((model.folder(), model.multilingual), (Some(model.name.as_str()), !size.ends_with(".en")));
        }
        for model in ["large-v3-ct2", "large-v3-turbo-ct2"].map(|name| catalog.get(name).expect(name)) {
            assert_eq!(
                model.files.iter().map(|f| f.file.as_str()).collect::<Vec<_>>(),
                ["config.json", "vocabulary.json", WEIGHTS]
            );
        }
        let weights = |m: &Model| m.files.last().and_then(|f| f.sha256.clone()).expect("known");
        let sums: BTreeSet<_> = catalog.models().iter().map(weights).collect();
        assert_eq!(sums.len(), catalog.models().len(), "each file has a sum of its own");
        let tiny = catalog.get("tiny.en-q5_1").expect("there");
        assert_eq!(tiny.bytes(), Some(32_166_155));
        assert!(!tiny.multilingual && catalog.get("tiny").expect("there").multilingual);
        assert_eq!(
            tiny.urls(&tiny.files[0], &[]),
            ["https://huggingface.co/ggerganov/whisper.cpp/resolve/main/ggml-tiny.en-q5_1.bin"]
        );
    }

    #[test]
    fn memory_is_weights_and_states() {
        let catalog = Catalog::built_in().expect("valid");
        for model in catalog.models().iter().filter(|m| m.kind == ModelKind::Whisper) {
            let file_mb = model.bytes().expect("known").div_ceil(1 << 20);
            assert_eq!(model.weights_mb(), file_mb, "{}", model.name);
        }
        for folder in catalog.models().iter().filter(|m| m.kind == ModelKind::WhisperCt2) {
            // 1.2 bytes for each number, which takes two in the file.
            let int8_mb = (folder.bytes().expect("known") >> 20) * 6 / 10;
            assert!(folder.state_mb == 0 && folder.expected_mb > int8_mb + 32, "{}", folder.name);
        }
        // Published, in MB.
        for (name, total) in [("tiny", 273), ("base", 388), ("small", 852), ("medium", 2_100), ("large-v3", 3_900)] {
            assert_eq!(catalog.get(name).expect(name).expected_mb.abs_diff(total), 0, "{name}");
        }
    }

    #[test]
    fn the_micro_model_of_the_source_tree_is_what_the_catalog_says() {
        let catalog = Catalog::built_in().expect("valid");
        let micro = catalog.get("micro.en-q8_0").expect("there");
        let beside = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/models/micro.en-q8_0.bin");
        let sum = std::fs::read_to_string(format!("{beside}.sha256")).expect("sum");
        assert_eq!(sum.split_whitespace().next(), micro.files[0].sha256.as_deref());
        let url = micro.urls(&micro.files[0], &[]).remove(0);
        assert!(Path::new(url.strip_prefix("file://").expect("a file")).is_file(), "{url}");
    }

    #[test]
    fn mirrors_come_first_and_may_place_the_name() {
        let catalog = Catalog::built_in().expect("valid");
        let tiny = catalog.get("tiny").expect("there");
        let mirrors = ["s3://bucket/models/".to_owned(), "https://mirror/ggml-{file}?v=1".to_owned()];
        let urls = tiny.urls(&tiny.files[0], &mirrors);
        assert_eq!(urls[..2], ["s3://bucket/models/tiny.bin", "https://mirror/ggml-tiny.bin?v=1"]);
        assert!(urls[2].starts_with("https://huggingface.co/"));
        let folder = catalog.get("tiny-ct2").expect("there");
        let urls = folder.urls(&folder.files[0], &mirrors);
        assert_eq!(
            urls[..2],
            ["s3://bucket/models/tiny-ct2/config.json", "https://mirror/ggml-tiny-ct2/config.json?v=1"]
        );
        assert_eq!(urls[2], "https://huggingface.co/Systran/faster-whisper-tiny/resolve/main/config.json");
    }

    #[test]
    fn an_operators_file_adds_and_replaces() {
        let text = entry("tiny", "files = [{ file = \"tiny.bin\" }]\nsources = [\"tiny.bin\"]")
            + &entry("own", "files = [{ file = \"own.bin\", bytes = 7 }]\nsources = [\"https://here/{file}\"]");
        let catalog = load(&text).expect("valid");
        assert_eq!(catalog.get("tiny").expect("replaced").files[0].sha256, None);
        assert!(catalog.get("tiny").expect("replaced").sources[0].starts_with("file:///"));
        assert_eq!(catalog.get("own").and_then(Model::bytes), Some(7));
        assert!(catalog.get("base").is_some());
    }

    #[test]
    fn mistakes_are_named() {
        let told = |text: &str| load(text).expect_err(text).to_string();
        assert!(told("[[model]]\nname = 1").contains("catalog"));
        let fine = "files = [{ file = \"m.bin\" }]\nsources = [\"https://h/{file}\"]";
        for (name, rest, wanted) in [
            ("../m", fine, "not a name for a model"),
            ("m", "files = []\nsources = [\"https://h/\"]", "no files"),
            ("m", "files = [{ file = \"m.bin\" }]\nsources = []", "no sources"),
            ("m", "files = [{ file = \"/etc/m.bin\" }]\nsources = [\"https://h/\"]", "not a name for a file"),
            ("m", "files = [{ file = \"n.bin\" }]\nsources = [\"https://h/\"]", "m.bin"),
            ("m", "files = [{ file = \"m.bin\", sha256 = \"AB\" }]\nsources = [\"https://h/\"]", "hexadecimal"),
            ("m", "files = [{ file = \"a\" }, { file = \"b\" }]\nsources = [\"https://h/\"]", "several"),
            ("m", &format!("{fine}\nstate_mb = 2"), "state_mb"),
        ] {
            assert!(told(&entry(name, rest)).contains(wanted), "{wanted}: {}", told(&entry(name, rest)));
        }
        let folder = |files: &str, source: &str| {
            let rest = format!("files = [{files}]\nsources = [\"{source}\"]");
            load(&entry("m-ct2", &rest).replace("\"whisper\"", "\"whisper_ct2\""))
        };
        let (config, weights) = ("{ file = \"config.json\" }", "{ file = \"model.bin\" }");
        for (files, source, wanted) in [
            (format!("{config}, {weights}"), "https://h/m", "has to say where {file} stands"),
            (format!("{weights}, {config}"), "https://h/{file}", "the last of its files has to be model.bin"),
            (config.to_owned(), "https://h/{file}", "the last of its files has to be model.bin"),
        ] {
            let told = folder(&files, source).expect_err(&files).to_string();
            assert!(told.contains(wanted), "{wanted}: {told}");
        }
        // Files of one name in folders of their own are no one's but theirs.
        assert!(folder(&format!("{config}, {weights}"), "https://h/{file}").is_ok());
        assert!(told(&(entry("m", fine) + &entry("m", fine))).contains("twice"));
        let other = entry("n", fine).replace("whisper", "vad");
        assert!(told(&(entry("m", fine) + &other)).contains("another's file"));
        assert!(matches!(Catalog::load(Some(Path::new("/nowhere.toml"))), Err(CatalogError::Unreadable { .. })));
    }

    #[test]
    fn an_unknown_name_is_answered_with_those_like_it() {
        let catalog = Catalog::built_in().expect("valid");
        assert_eq!(catalog.like("ggml-small.en.bin")[0], "small.en");
        assert!(catalog.like("large").contains(&"large-v3"));
        assert!(catalog.like("zzz").is_empty());
    }
}
