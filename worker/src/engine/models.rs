//! A model file is looked through before whisper.cpp sees it.
//!
//! whisper.cpp trusts its files: a wrong count makes it read past arrays or ask for terabytes. Here header, vocabulary
//! and the list of tensors are walked (seeking over the weights), so that a cut-off, foreign or damaged file becomes
//! [`EngineError::Model`] with a reason. Damage inside the weights themselves is found by
//! their [`checksum`](super::checksum), not here.

use std::{
    collections::HashSet,
    fs::File,
    io::{BufReader, Read, Seek, SeekFrom},
    path::Path,
};

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

/// `ggml`, little endian.
const MAGIC: u32 = 0x6767_6d6c;
/// First vocabulary size with language tokens.
const MULTILINGUAL_VOCAB: u32 = 51_865;
/// Positions in 30 s of audio, which is what whisper.cpp's front end makes.
const AUDIO_CTX: u32 = 1_500;
const FFT_BINS: u32 = 201;
/// Quantised files carry a version number in thousands.
const FTYPE_VERSION: u32 = 1_000;
const MAX_TOKEN_BYTES: u32 = 1_024;
const MAX_NAME_BYTES: u32 = 256;

/// Elements and bytes of one block of a tensor type, by its number in the file; None = unknown to whisper.cpp.
fn block_of(tensor_type: u32) -> Option<(u64, u64)> {
    Some(match tensor_type {
        0 => (1, 4),      // f32
        1 | 30 => (1, 2), // f16, bf16
        2 => (32, 18),    // q4_0
        3 => (32, 20),    // q4_1
        6 => (32, 22),    // q5_0
        7 => (32, 24),    // q5_1
        8 => (32, 34),    // q8_0
        10 => (256, 84),  // q2_k
        11 => (256, 110), // q3_k
        12 => (256, 144), // q4_k
        13 => (256, 176), // q5_k
        14 => (256, 210), // q6_k
        _ => return None,
    })
}

/// Whether whisper.cpp knows a file type (f32, f16, q4 to q8, the k-quants).
fn known_file_type(ftype: u32) -> bool {
    matches!(ftype % FTYPE_VERSION, 0..=4 | 7..=14)
}

/// Looks the file through. `name` is for the error.
pub fn check(name: &str, path: &Path) -> Result<ModelFacts, EngineError> {
    walk(path).map_err(|why| EngineError::Model { name: name.to_owned(), why: format!("{}: {why}", path.display()) })
}

struct Header {
    vocab: u32,
    audio_ctx: u32,
    width: u32,
    audio_layers: u32,
    text_ctx: u32,
    text_layers: u32,
}

fn walk(path: &Path) -> Result<ModelFacts, String> {
    let file = File::open(path).map_err(|e| e.to_string())?;
    let metadata = file.metadata().map_err(|e| e.to_string())?;
    if !metadata.is_file() {
        return Err("not a file".to_owned());
    }
    let mut reader = Reader { inner: BufReader::with_capacity(1 << 16, file), left: metadata.len() };
    let header = read_header(&mut reader)?;
    read_vocabulary(&mut reader, &header)?;
    let weight_bytes = read_tensors(&mut reader, &header)?;
    let state_mb = state_mb(&header);
    Ok(ModelFacts {
        multilingual: header.vocab >= MULTILINGUAL_VOCAB,
        weight_bytes,
        audio_ctx: header.audio_ctx,
        expected_mb: (weight_bytes >> 20) + 1 + state_mb,
        state_mb,
    })
}

fn read_header(reader: &mut Reader) -> Result<Header, String> {
    if reader.u32("magic number")? != MAGIC {
        return Err("not a whisper.cpp model (wrong magic number)".to_owned());
    }
    let mut fields = [0u32; 11];
    for field in &mut fields {
        *field = reader.u32("header")?;
    }
    let [
        vocab,
        audio_ctx,
        width,
        audio_heads,
        audio_layers,
        text_ctx,
        text_width,
        text_heads,
        text_layers,
        mels,
        ftype,
    ] = fields;
    let plausible = [
        ("n_vocab", vocab, (51_864..=52_000).contains(&vocab)),
        ("n_audio_ctx", audio_ctx, audio_ctx == AUDIO_CTX),
        ("n_audio_state", width, (64..=4_096).contains(&width) && width.is_multiple_of(2)),
        ("n_audio_head", audio_heads, audio_heads > 0 && width.is_multiple_of(audio_heads)),
        ("n_audio_layer", audio_layers, (1..=64).contains(&audio_layers)),
        ("n_text_ctx", text_ctx, (64..=4_096).contains(&text_ctx)),
        ("n_text_state", text_width, text_width == width),
        ("n_text_head", text_heads, text_heads > 0 && width.is_multiple_of(text_heads)),
        ("n_text_layer", text_layers, (1..=64).contains(&text_layers)),
        ("n_mels", mels, mels == 80 || mels == 128),
        ("ftype", ftype, known_file_type(ftype)),
    ];
    if let Some((field, value, _)) = plausible.iter().find(|(_, _, fine)| !fine) {
        return Err(format!("header says {field} = {value}, which no Whisper model has"));
    }
    let (filter_mels, bins) = (reader.u32("mel filters")?, reader.u32("mel filters")?);
    if filter_mels != mels || bins != FFT_BINS {
        return Err(format!("mel filters of {filter_mels} x {bins}, expected {mels} x {FFT_BINS}"));
    }
    reader.skip(u64::from(mels) * u64::from(FFT_BINS) * 4, "mel filters")?;
    Ok(Header { vocab, audio_ctx, width, audio_layers, text_ctx, text_layers })
}

fn read_vocabulary(reader: &mut Reader, header: &Header) -> Result<(), String> {
    let tokens = reader.u32("vocabulary")?;
    if tokens == 0 || tokens > header.vocab {
        return Err(format!("vocabulary of {tokens} tokens, the header says {}", header.vocab));
    }
    let mut has_blank = false;
    for token in 0..tokens {
        let len = reader.u32("vocabulary")?;
        if len > MAX_TOKEN_BYTES {
            return Err(format!("token {token} of {len} bytes"));
        }
        if len == 1 {
            has_blank |= reader.byte("vocabulary")? == b' ';
        } else {
            reader.skip(u64::from(len), "vocabulary")?;
        }
    }
    // whisper.cpp looks it up at the first token of each window, and throws through C where it is missing.
    if !has_blank {
        Err("its vocabulary has no token for a blank, without which whisper.cpp aborts".to_owned())
    } else {
        Ok(())
    }
}

/// Walks all tensors to the end of the file; gives their bytes.
fn read_tensors(reader: &mut Reader, header: &Header) -> Result<u64, String> {
    // Per layer 15 in the encoder and 24 in the decoder; 11 around them.
    let expected = 11 + 15 * header.audio_layers as usize + 24 * header.text_layers as usize;
    let mut names = HashSet::new();
    let mut bytes = 0;
    while reader.left > 0 {
        let number = names.len();
        let where_ = format!("tensor {number} of {expected}");
        let (dims, name_len, tensor_type) = (reader.u32(&where_)?, reader.u32(&where_)?, reader.u32(&where_)?);
        if !(1..=4).contains(&dims) || name_len == 0 || name_len > MAX_NAME_BYTES {
            return Err(format!("{where_} has {dims} dimensions and a name of {name_len} bytes"));
        }
        let (block, block_bytes) = block_of(tensor_type).ok_or_else(|| format!("{where_} is of type {tensor_type}"))?;
        let mut elements: u64 = 1;
        let mut row = 0;
        for dim in 0..dims {
            let size = u64::from(reader.u32(&where_)?);
            if dim == 0 {
                row = size;
            }
            elements = elements
                .checked_mul(size)
                .filter(|e| (1..=u64::from(u32::MAX >> 1)).contains(e))
                .ok_or_else(|| format!("{where_} has an impossible size"))?;
        }
        if !row.is_multiple_of(block) {
            return Err(format!("{where_} has rows of {row}, not whole blocks of {block}"));
        }
        let name = reader.name(name_len, &where_)?;
        let size = elements / block * block_bytes;
        reader.skip(size, &format!("{where_} ({name})"))?;
        bytes += size;
        if !names.insert(name.clone()) {
            return Err(format!("tensor {name} comes twice"));
        }
    }
    if names.len() != expected {
        return Err(format!("{} of {expected} tensors", names.len()));
    }
    Ok(bytes)
}

/// Keys and values kept per state in f16, and working memory fitted to published figures (base 388 MB to large 3.9 GB in
/// all, a turbo-sized state 406 MB).
fn state_mb(header: &Header) -> u64 {
    let (width, layers) = (u64::from(header.width), u64::from(header.text_layers));
    let cached = width * layers * (u64::from(header.text_ctx) + u64::from(header.audio_ctx)) * 2 * 2;
    let working = u64::from(header.audio_ctx) * width * 4 * 48;
    (cached + working) / (1 << 20) + 32
}

/// Reads numbers and never past the end.
struct Reader {
    inner: BufReader<File>,
    left: u64,
}

impl Reader {
    fn take(&mut self, bytes: u64, what: &str) -> Result<(), String> {
        self.left = self.left.checked_sub(bytes).ok_or_else(|| format!("the file is cut off in {what}"))?;
        Ok(())
    }

    fn u32(&mut self, what: &str) -> Result<u32, String> {
        let mut bytes = [0u8; 4];
        self.take(4, what)?;
        self.inner.read_exact(&mut bytes).map_err(|e| format!("reading {what}: {e}"))?;
        Ok(u32::from_le_bytes(bytes))
    }

    fn byte(&mut self, what: &str) -> Result<u8, String> {
        let mut byte = [0u8];
        self.take(1, what)?;
        self.inner.read_exact(&mut byte).map_err(|e| format!("reading {what}: {e}"))?;
        Ok(byte[0])
    }

    fn name(&mut self, len: u32, what: &str) -> Result<String, String> {
        let mut bytes = vec![0u8; len as usize];
        self.take(u64::from(len), what)?;
        self.inner.read_exact(&mut bytes).map_err(|e| format!("reading {what}: {e}"))?;
        let text = String::from_utf8(bytes).ok().filter(|n| n.bytes().all(|b| b.is_ascii_graphic()));
        text.ok_or_else(|| format!("{what} has no readable name"))
    }

    fn skip(&mut self, bytes: u64, what: &str) -> Result<(), String> {
        self.take(bytes, what)?;
        let bytes = i64::try_from(bytes).map_err(|e| e.to_string())?;
        // Within what is buffered it only moves an index.
        if bytes.unsigned_abs() <= self.inner.buffer().len() as u64 {
            self.inner.seek_relative(bytes).map_err(|e| format!("reading {what}: {e}"))
        } else {
            self.inner.seek(SeekFrom::Current(bytes)).map(drop).map_err(|e| format!("reading {what}: {e}"))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use proptest::prelude::*;

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
            let (block, block_bytes) = block_of(kind).expect("known");
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
