//! The same code on models of the official shapes: header, mel filters and vocabulary of whisper.cpp's own test files, with
//! random tensors behind them. Right size, right memory, right compute; meaningless text.

use std::{
    fs::File,
    io::{BufWriter, Write as _},
    path::{Path, PathBuf},
};

use voxfleet_schema::session::Task;
use voxfleet_worker::engine::{Cancel, Purpose, Recognizer as _, Window, models, whisper::WhisperModel};

use crate::support::root;

/// ggml's type numbers.
const F32: i32 = 0;
const F16: i32 = 1;

/// Appends the tensors that the header of a `for-tests-ggml-*.bin` announces.
struct Tensors {
    out: BufWriter<File>,
    state: u64,
}

impl Tensors {
    /// Small values of either sign, as f16 bits: sign, an exponent around 2^-6, random mantissa.
    fn noise(&mut self) -> u16 {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        let bits = (self.state >> 40) as u16;
        (bits & 0x8000) | (9 << 10) | (bits & 0x03ff)
    }

    /// `shape` as ggml stores it: fastest dimension first. `fill`: noise for none.
    fn add(&mut self, name: &str, shape: &[i32], kind: i32, fill: Option<f32>) -> std::io::Result<()> {
        for value in [shape.len() as i32, name.len() as i32, kind].iter().chain(shape) {
            self.out.write_all(&value.to_le_bytes())?;
        }
        self.out.write_all(name.as_bytes())?;
        for _ in 0..shape.iter().map(|n| *n as usize).product() {
            match (kind, fill) {
                (F16, _) => {
                    let bits = self.noise();
                    self.out.write_all(&bits.to_le_bytes())?;
                }
                (_, Some(value)) => self.out.write_all(&value.to_le_bytes())?,
                (_, None) => {
                    let value = (f32::from(self.noise()) - 32_768.0) / 3_276_800.0;
                    self.out.write_all(&value.to_le_bytes())?;
                }
            }
        }
        Ok(())
    }

    fn layer_norm(&mut self, name: &str, width: i32) -> std::io::Result<()> {
        self.add(&format!("{name}.weight"), &[width], F32, Some(1.0))?;
        self.add(&format!("{name}.bias"), &[width], F32, Some(0.0))
    }

    fn linear(&mut self, name: &str, from: i32, to: i32, bias: bool) -> std::io::Result<()> {
        self.add(&format!("{name}.weight"), &[from, to], F16, None)?;
        if bias { self.add(&format!("{name}.bias"), &[to], F32, Some(0.0)) } else { Ok(()) }
    }

    fn block(&mut self, name: &str, width: i32, decoder: bool) -> std::io::Result<()> {
        for attention in ["attn", "cross_attn"].into_iter().take(1 + usize::from(decoder)) {
            for (part, bias) in [("query", true), ("key", false), ("value", true), ("out", true)] {
                self.linear(&format!("{name}.{attention}.{part}"), width, width, bias)?;
            }
            self.layer_norm(&format!("{name}.{attention}_ln"), width)?;
        }
        self.linear(&format!("{name}.mlp.0"), width, 4 * width, true)?;
        self.linear(&format!("{name}.mlp.2"), 4 * width, width, true)?;
        self.layer_norm(&format!("{name}.mlp_ln"), width)
    }
}

fn random_model(stub: &Path, out: &Path) -> std::io::Result<()> {
    let head = std::fs::read(stub)?;
    let field = |n: usize| i32::from_le_bytes([head[4 + 4 * n], head[5 + 4 * n], head[6 + 4 * n], head[7 + 4 * n]]);
    let (vocabulary, audio_context, audio_width, audio_layers) = (field(0), field(1), field(2), field(4));
    let (text_context, text_width, text_layers, mels) = (field(5), field(6), field(8), field(9));
    let mut tensors = Tensors { out: BufWriter::new(File::create(out)?), state: 0x9e37_79b9_7f4a_7c15 };
    tensors.out.write_all(&head)?;
    tensors.add("encoder.positional_embedding", &[audio_width, audio_context], F32, None)?;
    tensors.add("encoder.conv1.weight", &[3, mels, audio_width], F16, None)?;
    tensors.add("encoder.conv1.bias", &[1, audio_width], F32, Some(0.0))?;
    tensors.add("encoder.conv2.weight", &[3, audio_width, audio_width], F16, None)?;
    tensors.add("encoder.conv2.bias", &[1, audio_width], F32, Some(0.0))?;
    for layer in 0..audio_layers {
        tensors.block(&format!("encoder.blocks.{layer}"), audio_width, false)?;
    }
    tensors.layer_norm("encoder.ln_post", audio_width)?;
    tensors.add("decoder.positional_embedding", &[text_width, text_context], F32, None)?;
    tensors.add("decoder.token_embedding.weight", &[text_width, vocabulary], F16, None)?;
    for layer in 0..text_layers {
        tensors.block(&format!("decoder.blocks.{layer}"), text_width, true)?;
    }
    tensors.layer_norm("decoder.ln", text_width)?;
    tensors.out.flush()
}

#[test]
fn models_of_the_official_shapes_load_and_decode() {
    let data = std::env::var_os("VOXFLEET_TEST_DATA").map_or_else(|| root().join("../shared/data"), PathBuf::from);
    let stub = data.join("models/for-tests-ggml-tiny.en.bin");
    if !stub.is_file() {
        println!("skipped: {} is not here (set VOXFLEET_TEST_DATA)", stub.display());
        return;
    }
    let folder = tempfile::tempdir().expect("temporary folder");
    let path = folder.path().join("tiny.en.bin");
    random_model(&stub, &path).expect("write the model");
    let facts = models::check("tiny.en", &path).expect("a well-formed model");
    assert!(std::fs::metadata(&path).is_ok_and(|m| m.len() > 70_000_000), "the size of the official file");

    let model = WhisperModel::load("tiny.en", &path, false, 1).expect("load");
    assert!(!model.info().multilingual, "{facts:?}");
    let mut state = model.state().expect("state");
    let noise: Vec<f32> =
        (0..32_000u32).map(|n| ((n.wrapping_mul(2_654_435_761) >> 16) as f32 / 65_536.0) - 0.5).collect();
    let window = Window {
        samples: noise,
        from_sample: 0,
        purpose: Purpose::Partial,
        prompt: String::new(),
        language: None,
        task: Task::Transcribe,
        hearing: None,
        background: false,
        cancel: Cancel::default(),
    };
    let heard = state.decode(std::slice::from_ref(&window));
    assert!(matches!(heard.as_slice(), [Ok(_)]), "{heard:?}");

    // One byte short, as a broken download leaves it.
    let bytes = std::fs::read(&path).expect("read");
    std::fs::write(&path, &bytes[..bytes.len() - 1]).expect("write");
    assert!(models::check("tiny.en", &path).is_err());
}
