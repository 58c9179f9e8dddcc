//! A quantised ggml file as one of half floats, so that whisper.cpp can be timed on the numbers it is fastest or most exact
//! with. What the quantisation has lost stays lost.

use std::{fs, path::Path};

use anyhow::{Context as _, Result, ensure};
use half::f16;
use voxfleet_ggml::{blocks, layout};

/// Where a ggml file says what its matrices are, and what it says of half floats.
const FILE_TYPE_AT: usize = 11 * 4;
const HALVES: u32 = 1;

/// Writes `to`: every tensor of `from` as it is, those in blocks as half floats.
pub(super) fn write(from: &Path, to: &Path) -> Result<()> {
    let layout = layout::read(from)?;
    let file = fs::read(from).with_context(|| from.display().to_string())?;
    let first = layout.tensors.iter().min_by_key(|tensor| tensor.offset).context("no tensors")?;
    let front = first.offset as usize - head(first, 0).len();
    let mut out = file[..front].to_vec();
    out[FILE_TYPE_AT..FILE_TYPE_AT + 4].copy_from_slice(&HALVES.to_le_bytes());
    for tensor in &layout.tensors {
        let bytes = &file[tensor.offset as usize..(tensor.offset + tensor.bytes) as usize];
        let number = match tensor.kind {
            blocks::Kind::F32 => 0,
            _ => HALVES,
        };
        out.extend(head(tensor, number));
        if matches!(tensor.kind, blocks::Kind::F32 | blocks::Kind::F16) {
            out.extend_from_slice(bytes);
            continue;
        }
        ensure!(tensor.kind.is_readable(), "{}: tensor {} cannot be read", from.display(), tensor.name);
        let mut numbers = Vec::new();
        blocks::numbers(tensor.kind, bytes, &mut numbers);
        out.extend(numbers.into_iter().flat_map(|number| f16::from_f32(number).to_le_bytes()));
    }
    fs::write(to, out).with_context(|| to.display().to_string())
}

/// What stands before a tensor's numbers.
fn head(tensor: &layout::Tensor, kind: u32) -> Vec<u8> {
    let dims = tensor.shape.iter().rev().map(|size| *size as u32);
    let words = [tensor.shape.len() as u32, tensor.name.len() as u32, kind].into_iter().chain(dims);
    words.flat_map(u32::to_le_bytes).chain(tensor.name.bytes()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::models::micro_file;

    #[test]
    fn a_file_of_halves_holds_the_same_numbers() {
        let dir = tempfile::tempdir().expect("folder");
        let (from, to) = (micro_file().path, dir.path().join("micro.en-f16.bin"));
        write(&from, &to).expect("written");
        let (was, is) = (layout::read(&from).expect("whole"), layout::read(&to).expect("whole"));
        assert_eq!((was.header, &was.vocabulary), (is.header, &is.vocabulary));
        let (before, after) = (fs::read(&from).expect("read"), fs::read(&to).expect("read"));
        let mut quantised = 0;
        for (was, is) in was.tensors.iter().zip(&is.tensors) {
            assert_eq!((&was.name, &was.shape), (&is.name, &is.shape));
            let numbers = |tensor: &layout::Tensor, file: &[u8]| {
                let mut numbers = Vec::new();
                let place = tensor.offset as usize..(tensor.offset + tensor.bytes) as usize;
                blocks::numbers(tensor.kind, &file[place], &mut numbers);
                numbers
            };
            quantised += usize::from(was.kind == blocks::Kind::Q8_0);
            assert!(matches!(is.kind, blocks::Kind::F16 | blocks::Kind::F32), "{}: {:?}", is.name, is.kind);
            let pairs = numbers(was, &before).into_iter().zip(numbers(is, &after));
            let apart = pairs.map(|(a, b)| (a - b).abs() / a.abs().max(1e-3)).fold(0.0, f32::max);
            assert!(apart < 1e-3, "{}: {apart}", was.name);
        }
        assert!(quantised > 10 && was.tensors.len() == is.tensors.len(), "{quantised}");
    }
}
