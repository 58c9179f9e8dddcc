//! Model files of Whisper's shapes with random weights, for measurements and tests: the tensors, bytes and work of the real
//! ones, without their text.
//!
//! How much they say is fixed all the same, since the length of a text decides what a decode costs. Two numbers of every
//! vector are kept for that. The first is the same after the last normalisation, and the embeddings make it speak for words
//! and against everything else: no timestamps, no early end. The second is set by the position embedding, negative for as
//! many positions as words are wanted and positive from then on, and speaks for the end of the text. Position embeddings are
//! large beside the rest, so that one word differs from the next, and logits are far apart, so that the guards take the text
//! for certain. Words are made of syllables. A prompt takes positions too, and so as many words.

use std::{
    fs::{self, File},
    io::{self, BufWriter, Write},
    path::Path,
    str::FromStr,
};

/// `ggml`, little endian.
const MAGIC: u32 = 0x6767_6d6c;
const AUDIO_CTX: u32 = 1_500;
const TEXT_CTX: u32 = 448;
const FFT_BINS: u32 = 201;
/// Of a multilingual vocabulary: text tokens, and the end of the text behind them.
const END_OF_TEXT: u32 = 50_257;
const BLANK: u32 = 220;
/// By it CTranslate2 knows a vocabulary of many languages.
const EMPTY: u32 = END_OF_TEXT - 1;
/// Start of transcript, language and task stand before the first word.
const OPENING: u32 = 3;

/// A model's shape, by its usual name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    Tiny,
    Base,
    Small,
    Medium,
    LargeV3Turbo,
}

struct Sizes {
    vocab: u32,
    width: u32,
    heads: u32,
    audio_layers: u32,
    text_layers: u32,
    mels: u32,
}

impl Shape {
    pub const ALL: [Shape; 5] = [Shape::Tiny, Shape::Base, Shape::Small, Shape::Medium, Shape::LargeV3Turbo];

    pub fn as_str(self) -> &'static str {
        match self {
            Shape::Tiny => "tiny",
            Shape::Base => "base",
            Shape::Small => "small",
            Shape::Medium => "medium",
            Shape::LargeV3Turbo => "large-v3-turbo",
        }
    }

    fn sizes(self) -> Sizes {
        let (width, audio_layers, text_layers) = match self {
            Shape::Tiny => (384, 4, 4),
            Shape::Base => (512, 6, 6),
            Shape::Small => (768, 12, 12),
            Shape::Medium => (1_024, 24, 24),
            Shape::LargeV3Turbo => (1_280, 32, 4),
        };
        let (vocab, mels) = if self == Shape::LargeV3Turbo { (51_866, 128) } else { (51_865, 80) };
        Sizes { vocab, width, heads: width / 64, audio_layers, text_layers, mels }
    }
}

impl FromStr for Shape {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        Shape::ALL
            .into_iter()
            .find(|shape| shape.as_str() == text)
            .ok_or_else(|| format!("known shapes are {}", Shape::ALL.map(Shape::as_str).join(", ")))
    }
}

/// How matrices are stored; everything else is as in the official files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    F16,
    /// Blocks of 32 bytes and a scale.
    Q8,
}

impl Format {
    pub fn as_str(self) -> &'static str {
        match self {
            Format::F16 => "f16",
            Format::Q8 => "q8_0",
        }
    }

    /// File type and tensor type, as whisper.cpp counts them; a quantised file's type carries a version in thousands.
    fn numbers(self) -> (u32, u32) {
        match self {
            Format::F16 => (1, 1),
            Format::Q8 => (2_007, 8),
        }
    }
}

impl FromStr for Format {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let found = [Format::F16, Format::Q8].into_iter().find(|format| format.as_str() == text);
        found.ok_or_else(|| "known formats are f16 and q8_0".to_owned())
    }
}

/// Writes a model that says `words` words in each window. It appears under its name when it is whole.
pub fn write(path: &Path, shape: Shape, format: Format, words: u32) -> io::Result<()> {
    let part = path.with_extension("part");
    let mut model = Model {
        out: BufWriter::with_capacity(1 << 20, File::create(&part)?),
        sizes: shape.sizes(),
        format,
        dice: Dice(0x5eed_0001),
    };
    model.front()?;
    model.encoder()?;
    model.decoder(words)?;
    model.out.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()?;
    fs::rename(&part, path)
}

struct Model<W> {
    out: W,
    sizes: Sizes,
    format: Format,
    dice: Dice,
}

const F32: u32 = 0;
const F16: u32 = 1;
/// Elements of a block of q8_0.
const BLOCK: usize = 32;

impl<W: Write> Model<W> {
    fn u32(&mut self, number: u32) -> io::Result<()> {
        self.out.write_all(&number.to_le_bytes())
    }

    fn front(&mut self) -> io::Result<()> {
        let Sizes { vocab, width, heads, audio_layers, text_layers, mels } = self.sizes;
        let (ftype, _) = self.format.numbers();
        let header =
            [MAGIC, vocab, AUDIO_CTX, width, heads, audio_layers, TEXT_CTX, width, heads, text_layers, mels, ftype];
        header.into_iter().chain([mels, FFT_BINS]).try_for_each(|number| self.u32(number))?;
        // Bands of equal width: nothing is learned from them.
        for band in 0..mels {
            for bin in 0..FFT_BINS {
                let inside = bin * mels / FFT_BINS == band;
                self.out.write_all(&(if inside { 0.02f32 } else { 0.0 }).to_le_bytes())?;
            }
        }
        self.u32(END_OF_TEXT)?;
        for token in 0..END_OF_TEXT {
            let text = match token {
                BLANK => " ".to_owned(),
                EMPTY => String::new(),
                token => word(token),
            };
            self.u32(text.len() as u32)?;
            self.out.write_all(text.as_bytes())?;
        }
        Ok(())
    }

    fn encoder(&mut self) -> io::Result<()> {
        let Sizes { width, mels, audio_layers, .. } = self.sizes;
        self.positions("encoder.positional_embedding", AUDIO_CTX, |position, n, width| {
            let turns = f64::from(n % (width / 2)) / f64::from(width / 2);
            let angle = f64::from(position) / 10_000f64.powf(turns);
            (if n < width / 2 { angle.sin() } else { angle.cos() }) as f32
        })?;
        self.halves("encoder.conv1.weight", &[3, mels, width])?;
        self.even("encoder.conv1.bias", &[1, width], 0.0)?;
        self.halves("encoder.conv2.weight", &[3, width, width])?;
        self.even("encoder.conv2.bias", &[1, width], 0.0)?;
        (0..audio_layers).try_for_each(|layer| self.layer(&format!("encoder.blocks.{layer}"), &["attn"]))?;
        self.even("encoder.ln_post.weight", &[width], 1.0)?;
        self.even("encoder.ln_post.bias", &[width], 0.0)
    }

    fn decoder(&mut self, words: u32) -> io::Result<()> {
        let Sizes { width, text_layers, .. } = self.sizes;
        let mut dice = Dice(0x5eed_0002);
        self.positions("decoder.positional_embedding", TEXT_CTX, |position, n, _| match n {
            0 => 0.0,
            1 if position + 1 < OPENING + words => -40.0,
            1 => 40.0,
            _ => dice.between(-7.0, 7.0),
        })?;
        self.token_embedding()?;
        (0..text_layers)
            .try_for_each(|layer| self.layer(&format!("decoder.blocks.{layer}"), &["attn", "cross_attn"]))?;
        // Embeddings are about 0.024 each: this makes logits of 12, and words certain.
        let scale = 12.0 / (0.024 * f64::from(width).sqrt()) as f32;
        self.first_two("decoder.ln.weight", [0.0, 40.0], scale)?;
        self.first_two("decoder.ln.bias", [120.0, 0.0], 0.0)
    }

    /// One transformer block; `attentions` are those on itself and on what was heard.
    fn layer(&mut self, layer: &str, attentions: &[&str]) -> io::Result<()> {
        let width = self.sizes.width;
        for attention in attentions {
            for part in ["query", "key", "value", "out"] {
                self.matrix(&format!("{layer}.{attention}.{part}.weight"), width, width)?;
                if part != "key" {
                    self.even(&format!("{layer}.{attention}.{part}.bias"), &[width], 0.0)?;
                }
            }
            self.even(&format!("{layer}.{attention}_ln.weight"), &[width], 1.0)?;
            self.even(&format!("{layer}.{attention}_ln.bias"), &[width], 0.0)?;
        }
        self.matrix(&format!("{layer}.mlp.0.weight"), width, 4 * width)?;
        self.even(&format!("{layer}.mlp.0.bias"), &[4 * width], 0.0)?;
        self.matrix(&format!("{layer}.mlp.2.weight"), 4 * width, width)?;
        self.even(&format!("{layer}.mlp.2.bias"), &[width], 0.0)?;
        self.even(&format!("{layer}.mlp_ln.weight"), &[width], 1.0)?;
        self.even(&format!("{layer}.mlp_ln.bias"), &[width], 0.0)
    }

    /// Name, type and dimensions, the one that runs fastest first.
    fn tensor(&mut self, name: &str, tensor_type: u32, dims: &[u32]) -> io::Result<()> {
        let head = [dims.len() as u32, name.len() as u32, tensor_type];
        head.into_iter().chain(dims.iter().copied()).try_for_each(|number| self.u32(number))?;
        self.out.write_all(name.as_bytes())
    }

    fn even(&mut self, name: &str, dims: &[u32], value: f32) -> io::Result<()> {
        self.tensor(name, F32, dims)?;
        (0..dims.iter().product()).try_for_each(|_: u32| self.out.write_all(&value.to_le_bytes()))
    }

    fn first_two(&mut self, name: &str, first: [f32; 2], others: f32) -> io::Result<()> {
        self.tensor(name, F32, &[self.sizes.width])?;
        let values = first.into_iter().chain(std::iter::repeat(others)).take(self.sizes.width as usize);
        values.into_iter().try_for_each(|value| self.out.write_all(&value.to_le_bytes()))
    }

    fn positions(&mut self, name: &str, count: u32, mut value: impl FnMut(u32, u32, u32) -> f32) -> io::Result<()> {
        let width = self.sizes.width;
        self.tensor(name, F32, &[width, count])?;
        for position in 0..count {
            for n in 0..width {
                self.out.write_all(&value(position, n, width).to_le_bytes())?;
            }
        }
        Ok(())
    }

    fn halves(&mut self, name: &str, dims: &[u32]) -> io::Result<()> {
        self.tensor(name, F16, dims)?;
        let mut row = vec![0; dims[0] as usize * 2];
        for _ in 0..dims[1..].iter().product() {
            self.dice.halves(&mut row);
            self.out.write_all(&row)?;
        }
        Ok(())
    }

    fn matrix(&mut self, name: &str, columns: u32, rows: u32) -> io::Result<()> {
        if self.format == Format::F16 {
            return self.halves(name, &[columns, rows]);
        }
        let (_, tensor_type) = self.format.numbers();
        self.tensor(name, tensor_type, &[columns, rows])?;
        let mut row = vec![0; columns as usize / BLOCK * (BLOCK + 2)];
        for _ in 0..rows {
            self.dice.blocks(&mut row);
            self.out.write_all(&row)?;
        }
        Ok(())
    }

    /// The first number of a token's row speaks for words, the second for the end of the text.
    fn token_embedding(&mut self) -> io::Result<()> {
        let Sizes { vocab, width, .. } = self.sizes;
        let (_, tensor_type) = self.format.numbers();
        self.tensor("decoder.token_embedding.weight", tensor_type, &[width, vocab])?;
        let columns = width as usize;
        let size = if self.format == Format::F16 { columns * 2 } else { columns / BLOCK * (BLOCK + 2) };
        let mut row = vec![0; size];
        for token in 0..vocab {
            let (speaks, ends) = match token {
                END_OF_TEXT => (Sign::Neither, true),
                word if word < END_OF_TEXT => (Sign::For, false),
                _ => (Sign::Against, false),
            };
            match self.format {
                Format::F16 => {
                    self.dice.halves(&mut row);
                    row[..2].copy_from_slice(&speaks.half().to_le_bytes());
                    row[2..4].copy_from_slice(&(if ends { ONE } else { 0u16 }).to_le_bytes());
                }
                Format::Q8 => {
                    self.dice.blocks(&mut row);
                    // In steps of 1/128, so that both marks and the small numbers beside them can be said.
                    row[..2].copy_from_slice(&STEP_128TH.to_le_bytes());
                    row[2..2 + BLOCK].iter_mut().for_each(|number| *number = ((*number as i8) / 32) as u8);
                    row[2] = speaks.steps() as u8;
                    row[3] = if ends { 127 } else { 0 };
                }
            }
            self.out.write_all(&row)?;
        }
        Ok(())
    }
}

/// 1, 1/2, 1/128 and about 1/3125 in half precision: sign, five bits of exponent around 15, ten bits of fraction.
const ONE: u16 = 15 << 10;
const HALF: u16 = 14 << 10;
const STEP_128TH: u16 = 8 << 10;
const STEP_SMALL: u16 = (3 << 10) | 0x140;
const SIGN: u16 = 1 << 15;

#[derive(Clone, Copy)]
enum Sign {
    For,
    Neither,
    Against,
}

impl Sign {
    fn half(self) -> u16 {
        match self {
            Sign::For => HALF,
            Sign::Neither => 0,
            Sign::Against => HALF | SIGN,
        }
    }

    fn steps(self) -> i8 {
        match self {
            Sign::For => 64,
            Sign::Neither => 0,
            Sign::Against => -64,
        }
    }
}

/// Three syllables that are this token's alone.
fn word(token: u32) -> String {
    const FIRST: &[u8; 17] = b"bcdfghjklmnprstvz";
    const SECOND: &[u8; 5] = b"aeiou";
    let mut text = String::from(" ");
    let mut rest = token as usize;
    for _ in 0..3 {
        text.push(char::from(FIRST[rest % 17]));
        text.push(char::from(SECOND[rest / 17 % 5]));
        rest /= 85;
    }
    text
}

/// xorshift64*, the same on every machine.
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn between(&mut self, low: f32, high: f32) -> f32 {
        low + (high - low) * (self.next() >> 40) as f32 / (1u32 << 24) as f32
    }

    /// Half-precision numbers of 1/64 to 1/32 with either sign: made from their bits, without arithmetic.
    fn halves(&mut self, bytes: &mut [u8]) {
        for four in bytes.chunks_mut(8) {
            let numbers = (self.next() & 0x83ff_83ff_83ff_83ff) | 0x2400_2400_2400_2400;
            let length = four.len();
            four.copy_from_slice(&numbers.to_le_bytes()[..length]);
        }
    }

    /// Blocks of q8_0 of about the same size.
    fn blocks(&mut self, bytes: &mut [u8]) {
        for block in bytes.chunks_mut(BLOCK + 2) {
            block[..2].copy_from_slice(&STEP_SMALL.to_le_bytes());
            for eight in block[2..].chunks_mut(8) {
                eight.copy_from_slice(&self.next().to_le_bytes());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use voxfleet_schema::session::Task;

    use super::*;
    use crate::engine::{Cancel, Purpose, Recognizer as _, Window, guards, models, whisper::WhisperModel};

    #[test]
    fn shapes_and_formats_are_known_by_their_names() {
        for shape in Shape::ALL {
            assert_eq!(shape.as_str().parse(), Ok(shape));
        }
        assert!("huge".parse::<Shape>().is_err());
        assert_eq!(("q8_0".parse(), "f16".parse()), (Ok(Format::Q8), Ok(Format::F16)));
        assert!("q9".parse::<Format>().is_err());
    }

    #[test]
    fn words_differ() {
        let words: std::collections::HashSet<String> = (0..END_OF_TEXT).map(word).collect();
        assert_eq!(words.len(), END_OF_TEXT as usize);
    }

    #[test]
    fn official_sizes_come_out() {
        // Bytes of the official f16 files, in MB of 2^20, without their fronts.
        let dir = tempfile::tempdir().expect("folder");
        let path = dir.path().join("base.bin");
        write(&path, Shape::Base, Format::F16, 1).expect("written");
        let facts = models::check("base", &path).expect("whole");
        assert!((139..=141).contains(&(facts.weight_bytes >> 20)), "{facts:?}");
    }

    #[test]
    fn a_made_model_says_as_many_words_as_it_was_told_to() {
        let dir = tempfile::tempdir().expect("folder");
        for (format, words) in [(Format::F16, 5), (Format::Q8, 12)] {
            let path = dir.path().join(format!("tiny-{}.bin", format.as_str()));
            write(&path, Shape::Tiny, format, words).expect("written");
            assert!(models::check("tiny", &path).expect("whole").multilingual);
            let mut state = WhisperModel::load("tiny", &path, false, 2).expect("loaded").state().expect("state");
            for seconds in [2, 6] {
                let window = Window {
                    samples: (0..seconds * 16_000).map(|n| (n as f32 * 0.05).sin() * 0.3).collect(),
                    from_sample: 0,
                    purpose: Purpose::Partial,
                    prompt: String::new(),
                    language: Some("en".to_owned()),
                    task: Task::Transcribe,
                    hearing: None,
                    background: false,
                    cancel: Cancel::default(),
                };
                let heard = state.decode(&[window]).remove(0).expect("decoded");
                let judged = guards::judge(&heard);
                assert!(judged.guards.is_empty(), "{judged:?}");
                let texts: Vec<&str> = heard.segments.iter().map(|s| s.text.as_str()).collect();
                let said = texts.join(" ").split_whitespace().count();
                assert_eq!(said, words as usize, "{} {texts:?}", format.as_str());
            }
        }
    }
}
