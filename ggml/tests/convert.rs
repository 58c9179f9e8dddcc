//! The micro model becomes a CTranslate2 folder, and damaged files become errors.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use proptest::prelude::*;
use voxfleet_ggml::{
    Error,
    blocks::{Kind, numbers},
    folder::{Precision, convert},
    layout::{self, Layout, MAGIC},
    plan::plan,
    vocabulary,
};

fn micro() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/models/micro.en-q8_0.bin")
}

/// A variable of `model.bin`: sizes, type, bytes.
type Variable = (Vec<u32>, u8, Vec<u8>);

struct Model {
    variables: BTreeMap<String, Variable>,
    aliases: Vec<(String, String)>,
}

/// Reads `model.bin` as CTranslate2 documents it.
fn read_model(path: &Path) -> Model {
    struct Bytes(std::vec::IntoIter<u8>);
    impl Bytes {
        fn take(&mut self, count: usize) -> Vec<u8> {
            let taken: Vec<u8> = self.0.by_ref().take(count).collect();
            assert_eq!(taken.len(), count, "cut off");
            taken
        }
        fn u16(&mut self) -> u16 {
            u16::from_le_bytes(self.take(2).try_into().expect("two"))
        }
        fn u32(&mut self) -> u32 {
            u32::from_le_bytes(self.take(4).try_into().expect("four"))
        }
        fn text(&mut self) -> String {
            let len = usize::from(self.u16());
            let mut bytes = self.take(len);
            assert_eq!(bytes.pop(), Some(0));
            String::from_utf8(bytes).expect("text")
        }
    }
    let mut bytes = Bytes(fs::read(path).expect("model.bin").into_iter());
    assert_eq!((bytes.u32(), bytes.text().as_str(), bytes.u32()), (6, "WhisperSpec", 3));
    let mut variables = BTreeMap::new();
    for _ in 0..bytes.u32() {
        let name = bytes.text();
        let rank = bytes.take(1)[0];
        let shape: Vec<u32> = (0..rank).map(|_| bytes.u32()).collect();
        let kind = bytes.take(1)[0];
        let len = bytes.u32() as usize;
        let size = [4, 1, 2, 4, 2][usize::from(kind)];
        assert_eq!(len, shape.iter().product::<u32>() as usize * size, "{name}");
        let held = bytes.take(len);
        assert!(variables.insert(name, (shape, kind, held)).is_none(), "twice");
    }
    let aliases = (0..bytes.u32()).map(|_| (bytes.text(), bytes.text())).collect();
    assert_eq!(bytes.0.next(), None, "something stands behind");
    Model { variables, aliases }
}

fn tensor(layout: &Layout, file: &[u8], name: &str) -> Vec<f32> {
    let tensor = layout.tensors.iter().find(|t| t.name == name).expect("tensor");
    let (from, len) = (tensor.offset as usize, tensor.bytes as usize);
    let mut out = Vec::new();
    numbers(tensor.kind, &file[from..from + len], &mut out);
    out
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().expect("four"))).collect()
}

fn go_on(_: u64, _: u64) -> bool {
    true
}

#[test]
fn float32_keeps_every_number() {
    let folder = tempfile::tempdir().expect("folder");
    let dir = folder.path().join("micro");
    let mut heard = Vec::new();
    let converted = convert(&micro(), &dir, Precision::Float32, &mut |done, all| {
        heard.push((done, all));
        true
    })
    .expect("converted");
    assert!(!converted.multilingual);
    let on_disk: u64 =
        fs::read_dir(&dir).expect("dir").map(|e| e.expect("entry").metadata().expect("file").len()).sum();
    assert_eq!(converted.bytes, on_disk);
    let (layout, file) = (layout::read(&micro()).expect("layout"), fs::read(micro()).expect("file"));
    assert!(heard.is_sorted() && heard.last() == Some(&(layout.weight_bytes(), layout.weight_bytes())), "{heard:?}");

    let Model { variables, aliases } = read_model(&dir.join("model.bin"));
    assert_eq!(aliases, [("decoder/projection/weight".to_owned(), "decoder/embeddings/weight".to_owned())]);
    let held = |name: &str| floats(&variables[name].2);
    let given = |name: &str| tensor(&layout, &file, name);
    assert_eq!(held("decoder/embeddings/weight"), given("decoder.token_embedding.weight"));
    assert_eq!(held("encoder/conv1/weight"), given("encoder.conv1.weight"));
    assert_eq!(variables["encoder/conv1/weight"].0, [192, 80, 3]);
    let own = ["query", "key", "value"].map(|n| given(&format!("encoder.blocks.2.attn.{n}.weight"))).concat();
    assert_eq!(held("encoder/layer_2/self_attention/linear_0/weight"), own);
    let cross = ["key", "value"].map(|n| given(&format!("decoder.blocks.1.cross_attn.{n}.weight"))).concat();
    assert_eq!(held("decoder/layer_1/attention/linear_1/weight"), cross);
    // Keys have no bias.
    let bias = [vec![0.0; 192], given("decoder.blocks.1.cross_attn.value.bias")].concat();
    assert_eq!(held("decoder/layer_1/attention/linear_1/bias"), bias);
    assert_eq!(held("decoder/layer_norm/beta"), given("decoder.ln.bias"));
    assert_eq!(variables["encoder/num_heads"], (vec![], 2, vec![3, 0]));
    // Every tensor is somewhere: 106 zeros of keys' biases more than the file has, no number less.
    let all: usize = variables.values().filter(|(shape, ..)| !shape.is_empty()).map(|(_, _, b)| b.len() / 4).sum();
    let in_file: u64 = layout.tensors.iter().map(|t| t.shape.iter().product::<u64>()).sum();
    let keys = 4 + 3 + 3;
    assert_eq!(all as u64, in_file + keys * 192);
}

#[test]
fn halves_and_bytes_stay_near_what_they_stand_for() {
    let folder = tempfile::tempdir().expect("folder");
    let (layout, file) = (layout::read(&micro()).expect("layout"), fs::read(micro()).expect("file"));
    let given = tensor(&layout, &file, "decoder.token_embedding.weight");
    for precision in Precision::ALL {
        let dir = folder.path().join(precision.as_str());
        convert(&micro(), &dir, precision, &mut go_on).expect("converted");
        let Model { variables, .. } = read_model(&dir.join("model.bin"));
        let (_, kind, bytes) = &variables["decoder/embeddings/weight"];
        let (_, norm_kind, _) = &variables["decoder/layer_norm/gamma"];
        let held: Vec<f32> = match precision {
            Precision::Float32 => floats(bytes),
            Precision::Float16 => {
                let mut out = Vec::new();
                numbers(Kind::F16, bytes, &mut out);
                out
            }
            Precision::Int8Float32 | Precision::Int8Float16 => {
                let scales = floats(&variables["decoder/embeddings/weight_scale"].2);
                bytes.iter().enumerate().map(|(n, b)| f32::from(b.cast_signed()) / scales[n / 192]).collect()
            }
        };
        let expected = match precision {
            Precision::Float32 => (0, 0, 0.0),
            Precision::Float16 => (4, 4, 0.001),
            Precision::Int8Float32 => (1, 0, 0.004),
            Precision::Int8Float16 => (1, 4, 0.004),
        };
        assert_eq!((*kind, *norm_kind), (expected.0, expected.1), "{precision:?}");
        for (row, (held, given)) in held.chunks(192).zip(given.chunks(192)).enumerate() {
            let largest = given.iter().fold(0.0f32, |most, v| most.max(v.abs()));
            let apart = held.iter().zip(given).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(apart <= expected.2 * largest, "{precision:?} row {row}: {apart} of {largest}");
        }
    }
}

#[test]
fn the_texts_beside_it_name_every_token() {
    let folder = tempfile::tempdir().expect("folder");
    let dir = folder.path().join("micro");
    convert(&micro(), &dir, Precision::Float16, &mut go_on).expect("converted");
    let json = |name: &str| -> serde_json::Value {
        serde_json::from_slice(&fs::read(dir.join(name)).expect(name)).expect("json")
    };
    let tokens = json("vocabulary.json");
    let tokens: Vec<&str> = tokens.as_array().expect("list").iter().filter_map(|t| t.as_str()).collect();
    assert_eq!(tokens.len(), 51_864);
    assert_eq!((tokens[922], tokens[50_362], tokens[51_863]), ("\u{120}good", "<|notimestamps|>", "<|30.00|>"));
    let layout = layout::read(&micro()).expect("layout");
    for (number, bytes) in layout.vocabulary.iter().enumerate().take(50_256) {
        assert_eq!(vocabulary::bytes_of(tokens[number]).as_ref(), Some(bytes), "token {number}");
    }
    let config = json("config.json");
    let ids = |key: &str| config[key].as_array().expect("list").iter().filter_map(|v| v.as_u64()).collect::<Vec<_>>();
    // As the published configuration of tiny.en begins and ends.
    assert_eq!(ids("suppress_ids")[..12], [1, 2, 7, 8, 9, 10, 14, 25, 26, 27, 28, 29]);
    assert!(ids("suppress_ids").ends_with(&[50_257, 50_357, 50_358, 50_359, 50_360, 50_361]));
    assert_eq!(ids("suppress_ids_begin"), [220, 50_256]);
    assert_eq!(ids("lang_ids").len(), 99);
    assert_eq!(config["alignment_heads"].as_array().expect("list").len(), 2 * 3, "the upper two of three layers");
    assert_eq!(json("preprocessor_config.json")["feature_size"], 80);
}

#[test]
fn nothing_is_left_of_what_was_not_finished() {
    let folder = tempfile::tempdir().expect("folder");
    let dir = folder.path().join("micro");
    let mut left = 5;
    let stopped = convert(&micro(), &dir, Precision::Float32, &mut |_, _| {
        left -= 1;
        left > 0
    });
    assert!(matches!(stopped, Err(Error::Stopped)), "{stopped:?}");
    assert_eq!(fs::read_dir(folder.path()).expect("dir").count(), 0);
    fs::create_dir(&dir).expect("dir");
    let there = convert(&micro(), &dir, Precision::Float32, &mut go_on);
    assert!(matches!(&there, Err(Error::Exists(path)) if *path == dir), "{there:?}");
    let nowhere = convert(&micro(), Path::new("/dev/null/x"), Precision::Float32, &mut go_on);
    assert!(matches!(nowhere, Err(Error::Io { .. })), "{nowhere:?}");
}

/// CTranslate2's own loader, in Python: `pip install ctranslate2 numpy`.
#[test]
fn ctranslate2_takes_the_folder() {
    let python =
        |script: &str, dir: &Path| std::process::Command::new("python3").args(["-c", script]).arg(dir).output();
    match python("import ctranslate2, numpy", Path::new("/")) {
        Ok(output) if output.status.success() => {}
        Ok(_) => return println!("skipped: the Python packages ctranslate2 and numpy are not here"),
        Err(error) => return println!("skipped: python3: {error}"),
    }
    let script = "import sys, numpy, ctranslate2 as c
m = c.models.Whisper(sys.argv[1], device='cpu', compute_type='default')
sound = c.StorageView.from_array(numpy.zeros((2, 80, 1024), dtype=numpy.float32))
said = m.generate(m.encode(sound), [['<|startoftranscript|>']] * 2, beam_size=1)
print(m.n_mels, m.is_multilingual, [r.sequences[0][0] for r in said])";
    let folder = tempfile::tempdir().expect("folder");
    for precision in Precision::ALL {
        let dir = folder.path().join(precision.as_str());
        convert(&micro(), &dir, precision, &mut go_on).expect("converted");
        let output = python(script, &dir).expect("python3");
        let (said, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(said.starts_with("80 False ['<|0."), "{precision:?}: {said} {errors}");
    }
}

/// What a damaged copy of the micro model says.
fn why(bytes: &[u8]) -> String {
    let folder = tempfile::tempdir().expect("folder");
    let (file, dir) = (folder.path().join("m.bin"), folder.path().join("m"));
    fs::write(&file, bytes).expect("write");
    let error = convert(&file, &dir, Precision::Float16, &mut go_on).expect_err("damaged");
    assert!(matches!(error, Error::Damaged { .. } | Error::Unsupported { .. }), "{error:?}");
    assert_eq!(fs::read_dir(folder.path()).expect("dir").count(), 1, "only the file is there");
    error.to_string()
}

#[test]
fn damaged_files_are_typed() {
    let whole = fs::read(micro()).expect("model");
    let layout = layout::read(&micro()).expect("layout");
    assert!(why(b"").contains("cut off"));
    assert!(why(b"GGUF\x03\0\0\0").contains("magic"));
    assert!(why(&[&MAGIC.to_le_bytes()[..], &[0xff; 64]].concat()).contains("n_vocab"));
    assert!(why(&whole[..whole.len() - 1]).contains("cut off"));
    let place = |name: &str| layout.tensors.iter().find(|t| t.name == name).expect("tensor").offset as usize;
    let with = |at: usize, bytes: &[u8]| {
        let mut damaged = whole.clone();
        damaged[at..at + bytes.len()].copy_from_slice(bytes);
        damaged
    };
    let (weight, bias) = (place("decoder.blocks.0.attn.query.weight"), place("decoder.ln.bias"));
    // The scale of a block is no number; a number is too large for a half.
    assert!(why(&with(weight, &[0x00, 0x7e])).contains("no numbers"));
    assert!(why(&with(bias, &1e6f32.to_le_bytes())).contains("too large"));
    // A tensor of another name, of another shape, of a type that is not read.
    assert!(why(&with(weight - 1, b"T")).contains("decoder.blocks.0.attn.query.weight is missing"));
    let norm = place("decoder.ln.bias") - "decoder.ln.bias".len() - 4;
    assert!(why(&with(norm, &96u32.to_le_bytes())).len() > 20);
    // The vocabulary is short.
    assert!(why(&with(4, &51_999u32.to_le_bytes())).contains("none of Whisper's"));
}

/// Shapes only: what large models have, without their numbers.
#[test]
fn a_plan_uses_every_tensor_once_and_says_what_is_wrong() {
    let layout = layout::read(&micro()).expect("layout");
    let whole = plan(&layout).expect("plan");
    assert!(whole.variables.is_sorted_by(|a, b| a.name < b.name));
    let mut lacks = layout.clone();
    lacks.tensors.retain(|t| t.name != "encoder.ln_post.weight");
    assert_eq!(plan(&lacks), Err("tensor encoder.ln_post.weight is missing".to_owned()));
    let mut more = layout.clone();
    more.tensors[0].name = "encoder.blocks.9.mlp.0.weight".to_owned();
    more.tensors.push(layout.tensors[0].clone());
    assert_eq!(plan(&more), Err("tensor encoder.blocks.9.mlp.0.weight is of no Whisper model".to_owned()));
    let mut misshapen = layout.clone();
    misshapen.tensors[0].shape = vec![1_500, 191];
    assert!(plan(&misshapen).expect_err("misshapen").contains("expected 288000"));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn damage_is_typed_and_never_a_crash(at in 0usize..600_000, value in any::<u8>(), front in any::<bool>()) {
        let mut bytes = fs::read(micro()).expect("model");
        let at = if front { at % 48 } else { at };
        bytes[at] = value;
        let folder = tempfile::tempdir().expect("folder");
        let (file, dir) = (folder.path().join("m.bin"), folder.path().join("m"));
        fs::write(&file, &bytes).expect("write");
        let converted = convert(&file, &dir, Precision::Int8Float32, &mut go_on);
        let typed = matches!(converted, Ok(_) | Err(Error::Damaged { .. } | Error::Unsupported { .. }));
        prop_assert!(typed, "byte {} = {}: {:?}", at, value, converted);
    }
}
