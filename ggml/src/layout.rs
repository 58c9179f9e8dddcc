//! A ggml Whisper file walked from end to end: what it says of itself and where each tensor lies.
//!
//! whisper.cpp trusts its files: a wrong count makes it read past arrays or ask for terabytes. Here header, filters,
//! vocabulary and the list of tensors are read, seeking over the weights, and every size is compared with what Whisper
//! models have. Damage inside the weights themselves is a checksum's business.

use std::{
    collections::HashSet,
    fs::File,
    io::{BufReader, Read, Seek, SeekFrom},
    path::Path,
};

use crate::{Error, blocks::Kind};

/// `ggml`, little endian.
pub const MAGIC: u32 = 0x6767_6d6c;
/// Positions in 30 s of audio, which is what whisper.cpp's front end makes.
const AUDIO_CTX: u32 = 1_500;
/// Of the Fourier transform of 400 samples.
pub const FFT_BINS: u32 = 201;
/// First vocabulary size with language tokens.
const MULTILINGUAL_VOCAB: u32 = 51_865;
/// Quantised files carry a version number in thousands.
const FTYPE_VERSION: u32 = 1_000;
const MAX_TOKEN_BYTES: u32 = 1_024;
/// Of all tokens together; Whisper's have a third of a megabyte.
const MAX_VOCABULARY_BYTES: usize = 4 << 20;
const MAX_NAME_BYTES: u32 = 256;

/// Shape of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    pub vocab: u32,
    /// Encoder positions: 1500 = 30 s.
    pub audio_ctx: u32,
    pub width: u32,
    pub audio_heads: u32,
    pub audio_layers: u32,
    pub text_ctx: u32,
    pub text_heads: u32,
    pub text_layers: u32,
    pub mels: u32,
}

impl Header {
    pub fn is_multilingual(&self) -> bool {
        self.vocab >= MULTILINGUAL_VOCAB
    }
}

/// Where a tensor's numbers lie.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tensor {
    pub name: String,
    pub kind: Kind,
    /// Outermost first, as everybody but ggml writes them; the file has them the other way round.
    pub shape: Vec<u64>,
    /// In the file.
    pub offset: u64,
    pub bytes: u64,
}

/// What a file holds.
#[derive(Debug, Clone, PartialEq)]
pub struct Layout {
    pub header: Header,
    /// `mels` rows of [`FFT_BINS`].
    pub filters: Vec<f32>,
    /// Bytes of each token; special tokens may be missing at the end.
    pub vocabulary: Vec<Vec<u8>>,
    pub tensors: Vec<Tensor>,
}

impl Layout {
    /// Bytes of all tensors.
    pub fn weight_bytes(&self) -> u64 {
        self.tensors.iter().map(|t| t.bytes).sum()
    }
}

/// Walks the file.
pub fn read(path: &Path) -> Result<Layout, Error> {
    walk(path).map_err(|why| Error::Damaged { path: path.to_owned(), why })
}

/// Whether whisper.cpp knows a file type (f32, f16, q4 to q8, the k-quants).
fn known_file_type(ftype: u32) -> bool {
    matches!(ftype % FTYPE_VERSION, 0..=4 | 7..=14)
}

fn walk(path: &Path) -> Result<Layout, String> {
    let file = File::open(path).map_err(|e| e.to_string())?;
    let metadata = file.metadata().map_err(|e| e.to_string())?;
    if !metadata.is_file() {
        return Err("not a file".to_owned());
    }
    let mut reader =
        Reader { inner: BufReader::with_capacity(1 << 16, file), left: metadata.len(), len: metadata.len() };
    let header = read_header(&mut reader)?;
    let filters = read_filters(&mut reader, &header)?;
    let vocabulary = read_vocabulary(&mut reader, &header)?;
    let tensors = read_tensors(&mut reader, &header)?;
    Ok(Layout { header, filters, vocabulary, tensors })
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
    Ok(Header { vocab, audio_ctx, width, audio_heads, audio_layers, text_ctx, text_heads, text_layers, mels })
}

fn read_filters(reader: &mut Reader, header: &Header) -> Result<Vec<f32>, String> {
    let (mels, bins) = (reader.u32("mel filters")?, reader.u32("mel filters")?);
    if mels != header.mels || bins != FFT_BINS {
        return Err(format!("mel filters of {mels} x {bins}, expected {} x {FFT_BINS}", header.mels));
    }
    let bytes = reader.bytes(mels * bins * 4, "mel filters")?;
    Ok(bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
}

fn read_vocabulary(reader: &mut Reader, header: &Header) -> Result<Vec<Vec<u8>>, String> {
    let tokens = reader.u32("vocabulary")?;
    if tokens == 0 || tokens > header.vocab {
        return Err(format!("vocabulary of {tokens} tokens, the header says {}", header.vocab));
    }
    let mut vocabulary = Vec::new();
    let mut bytes = 0;
    for token in 0..tokens {
        let len = reader.u32("vocabulary")?;
        bytes += len as usize;
        if len > MAX_TOKEN_BYTES || bytes > MAX_VOCABULARY_BYTES {
            return Err(format!("token {token} of {len} bytes"));
        }
        vocabulary.push(reader.bytes(len, "vocabulary")?);
    }
    // whisper.cpp looks it up at the first token of each window, and throws through C where it is missing.
    if vocabulary.iter().any(|token| token == b" ") {
        Ok(vocabulary)
    } else {
        Err("its vocabulary has no token for a blank, without which whisper.cpp aborts".to_owned())
    }
}

/// Walks all tensors to the end of the file.
fn read_tensors(reader: &mut Reader, header: &Header) -> Result<Vec<Tensor>, String> {
    // Per layer 15 in the encoder and 24 in the decoder; 11 around them.
    let expected = 11 + 15 * header.audio_layers as usize + 24 * header.text_layers as usize;
    let mut names = HashSet::new();
    let mut tensors = Vec::new();
    while reader.left > 0 {
        let where_ = format!("tensor {} of {expected}", tensors.len());
        if tensors.len() == expected {
            return Err(format!("{} bytes stand behind the last of {expected} tensors", reader.left));
        }
        let (dims, name_len, tensor_type) = (reader.u32(&where_)?, reader.u32(&where_)?, reader.u32(&where_)?);
        if !(1..=4).contains(&dims) || name_len == 0 || name_len > MAX_NAME_BYTES {
            return Err(format!("{where_} has {dims} dimensions and a name of {name_len} bytes"));
        }
        let kind = Kind::of(tensor_type).ok_or_else(|| format!("{where_} is of type {tensor_type}"))?;
        let mut elements: u64 = 1;
        let mut shape = Vec::new();
        for _ in 0..dims {
            let size = u64::from(reader.u32(&where_)?);
            shape.insert(0, size);
            elements = elements
                .checked_mul(size)
                .filter(|e| (1..=u64::from(u32::MAX >> 1)).contains(e))
                .ok_or_else(|| format!("{where_} has an impossible size"))?;
        }
        let (block, block_bytes) = kind.block();
        let row = shape.last().copied().unwrap_or(1);
        if !row.is_multiple_of(block) {
            return Err(format!("{where_} has rows of {row}, not whole blocks of {block}"));
        }
        let name = reader.name(name_len, &where_)?;
        let (offset, bytes) = (reader.len - reader.left, elements / block * block_bytes);
        reader.skip(bytes, &format!("{where_} ({name})"))?;
        if !names.insert(name.clone()) {
            return Err(format!("tensor {name} comes twice"));
        }
        tensors.push(Tensor { name, kind, shape, offset, bytes });
    }
    if tensors.len() != expected {
        return Err(format!("{} of {expected} tensors", tensors.len()));
    }
    Ok(tensors)
}

/// Reads numbers and never past the end.
struct Reader {
    inner: BufReader<File>,
    left: u64,
    len: u64,
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

    /// So many bytes, once it is known that the file has them.
    fn bytes(&mut self, len: u32, what: &str) -> Result<Vec<u8>, String> {
        self.take(u64::from(len), what)?;
        let mut bytes = vec![0u8; len as usize];
        self.inner.read_exact(&mut bytes).map_err(|e| format!("reading {what}: {e}"))?;
        Ok(bytes)
    }

    fn name(&mut self, len: u32, what: &str) -> Result<String, String> {
        let text = String::from_utf8(self.bytes(len, what)?).ok();
        text.filter(|n| n.bytes().all(|b| b.is_ascii_graphic())).ok_or_else(|| format!("{what} has no readable name"))
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
