//! A model file is looked through before whisper.cpp sees it.
//!
//! whisper.cpp trusts its files: a wrong count makes it read past arrays or ask for terabytes. [`voxfleet_ggml::layout`]
//! walks header, vocabulary and the list of tensors, so that a cut-off, foreign or damaged file becomes
//! [`EngineError::Model`] with a reason. Damage inside the weights themselves is found by
//! their [`checksum`](super::checksum), not here.

use std::path::Path;

use voxfleet_ggml::layout::{self, Header, Layout};

use super::EngineError;

/// What a file says about its model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelFacts {
    pub multilingual: bool,
    /// Bytes of all tensors.
    pub weight_bytes: u64,
    /// Encoder positions: 1500 = 30 s.
    pub audio_ctx: u32,
    /// What weights and one decode state will take, in MB; an estimate until measured.
    pub expected_mb: u64,
    /// Of one decode state alone.
    pub state_mb: u64,
}

/// Looks the file through. `name` is for the error.
pub fn check(name: &str, path: &Path) -> Result<ModelFacts, EngineError> {
    match layout::read(path) {
        Ok(layout) => Ok(facts(&layout)),
        Err(error) => Err(EngineError::Model { name: name.to_owned(), why: error.to_string() }),
    }
}

fn facts(layout: &Layout) -> ModelFacts {
    let weight_bytes = layout.weight_bytes();
    let state_mb = state_mb(&layout.header);
    ModelFacts {
        multilingual: layout.header.is_multilingual(),
        weight_bytes,
        audio_ctx: layout.header.audio_ctx,
        expected_mb: (weight_bytes >> 20) + 1 + state_mb,
        state_mb,
    }
}

/// Keys and values kept per state in f16, and working memory fitted to published figures (base 388 MB to large 3.9 GB in
/// all, a turbo-sized state 406 MB).
fn state_mb(header: &Header) -> u64 {
    let (width, layers) = (u64::from(header.width), u64::from(header.text_layers));
    let cached = width * layers * (u64::from(header.text_ctx) + u64::from(header.audio_ctx)) * 2 * 2;
    let working = u64::from(header.audio_ctx) * width * 4 * 48;
    (cached + working) / (1 << 20) + 32
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use proptest::prelude::*;
    use voxfleet_ggml::{blocks::Kind, layout::MAGIC};

    use super::*;

    fn micro() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/models/micro.en-q8_0.bin")
    }

    /// Where the tensors of the micro model begin: behind header, filters and vocabulary.
    fn front(bytes: &[u8]) -> usize {
        let number = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes")) as usize;
        let mut at = 4 + 11 * 4 + 8 + 80 * 201 * 4;
        let tokens = number(at);
        at += 4;
        for _ in 0..tokens {
            at += 4 + number(at);
        }
        at
    }

    fn why(bytes: &[u8]) -> String {
        let file = tempfile::NamedTempFile::new().expect("file");
        std::fs::write(file.path(), bytes).expect("write");
        match check("m", file.path()) {
            Err(EngineError::Model { name, why }) if name == "m" => why,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_micro_model_is_whole() {
        let facts = check("micro.en", &micro()).expect("whole");
        assert!(!facts.multilingual);
        assert_eq!(facts.audio_ctx, 1_500);
        let file_mb = std::fs::metadata(micro()).expect("file").len() >> 20;
        assert!((facts.weight_bytes >> 20) <= file_mb && facts.expected_mb >= file_mb, "{facts:?}");
    }

    #[test]
    fn files_that_are_no_models_are_typed() {
        assert!(matches!(check("m", Path::new("/nonexistent")), Err(EngineError::Model { .. })));
        assert!(matches!(check("m", Path::new("/")), Err(EngineError::Model { .. })));
        assert!(why(b"").contains("cut off"));
        assert!(why(b"<html>not found</html>").contains("magic"));
        assert!(why(b"GGUF\x03\0\0\0").contains("magic"));
        assert!(why(&MAGIC.to_le_bytes()).contains("cut off"));
        assert!(why(&[&MAGIC.to_le_bytes()[..], &[0xff; 64]].concat()).contains("n_vocab"));
    }

    #[test]
    fn cut_off_files_are_typed_wherever_they_end() {
        let whole = std::fs::read(micro()).expect("model");
        let tensors = front(&whole);
        for end in [47, 60, 70_000, tensors - 1, tensors + 5, tensors + 100_000, whole.len() / 2, whole.len() - 1] {
            assert!(why(&whole[..end]).contains("cut off"), "cut at {end}");
        }
        assert!(why(&whole[..tensors]).starts_with(|_: char| true) && why(&whole[..tensors]).contains("0 of"));
        assert!(!why(&[&whole[..], &[0; 12]].concat()).is_empty(), "something stands behind the last tensor");
    }

    #[test]
    fn quantised_and_large_shapes_pass() {
        // type of matrices, bytes of a block of 32
        for (tensor_type, ftype) in [(1u32, 1u32), (7, 2_009), (8, 2_007), (2, 2), (3, 2_003), (6, 2_008)] {
            let file = tempfile::NamedTempFile::new().expect("file");
            write_model(file.path(), b' ', tensor_type, ftype);
            let facts = check("made", file.path()).expect("made as whisper.cpp's own tools make it");
            assert!(facts.multilingual);
        }
    }

    #[test]
    fn a_vocabulary_without_a_blank_is_typed() {
        let file = tempfile::NamedTempFile::new().expect("file");
        write_model(file.path(), b'a', 1, 1);
        match check("m", file.path()) {
            Err(EngineError::Model { why, .. }) => assert!(why.contains("blank"), "{why}"),
            other => panic!("{other:?}"),
        }
    }

    /// A file with the shape of a multilingual model: one layer each, all weights 0, and a vocabulary of nothing and `token`.
    fn write_model(path: &Path, token: u8, tensor_type: u32, ftype: u32) {
        let (vocab, mels) = (51_866, 128);
        let mut bytes: Vec<u8> = Vec::new();
        let mut put = |n: u32| bytes.extend_from_slice(&n.to_le_bytes());
        [MAGIC, vocab, 1_500, 64, 1, 1, 448, 64, 1, 1, mels, ftype, mels, 201].into_iter().for_each(&mut put);
        (0..mels * 201).for_each(|_| put(0));
        put(0x2);
        put(0);
        put(1);
        bytes.push(token);
        for number in 0..11 + 15 + 24u32 {
            let name = format!("tensor.{number}");
            let (kind, dims) = if number % 2 == 0 { (0, vec![64]) } else { (tensor_type, vec![64, 4]) };
            let (block, block_bytes) = Kind::of(kind).expect("known").block();
            for n in [dims.len() as u32, name.len() as u32, kind].into_iter().chain(dims.iter().copied()) {
                bytes.extend_from_slice(&n.to_le_bytes());
            }
            bytes.extend_from_slice(name.as_bytes());
            let elements: u32 = dims.iter().product();
            bytes.resize(bytes.len() + (u64::from(elements) / block * block_bytes) as usize, 0);
        }
        std::fs::write(path, bytes).expect("write");
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]
        #[test]
        fn damage_is_typed_and_never_a_crash(at in 0usize..70_000, value in any::<u8>()) {
            let mut bytes = std::fs::read(micro()).expect("model");
            let tensors = front(&bytes);
            // Half the blows hit the header, the others the description of a tensor.
            let at = if at < 48 { at } else { tensors + at % 20 };
            bytes[at] = value;
            let file = tempfile::NamedTempFile::new().expect("file");
            std::fs::write(file.path(), &bytes).expect("write");
            let checked = check("m", file.path());
            let typed = matches!(checked, Ok(_) | Err(EngineError::Model { .. }));
            prop_assert!(typed, "byte {} = {}", at, value);
        }
    }
}
