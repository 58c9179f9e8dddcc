//! Damage inside a model's weights, which its structure cannot show and which a listener would hear as nonsense or silence.
//!
//! A file `<model>.sha256` beside the model (as `sha256sum` writes it: the checksum in hex, then anything) is what it must be.
//! Models without one are taken as they are.

use std::{
    fs::File,
    io::{self, ErrorKind, Read as _},
    path::{Path, PathBuf},
};

use sha2::{Digest as _, Sha256};

use super::EngineError;

/// Where the checksum of a model stands.
pub fn file_of(model: &Path) -> PathBuf {
    let mut path = model.as_os_str().to_owned();
    path.push(".sha256");
    PathBuf::from(path)
}

/// Reads the whole model if there is a checksum to compare with. Says whether there was one.
pub fn verify(name: &str, model: &Path) -> Result<bool, EngineError> {
    let beside = file_of(model);
    let failed = |why: String| EngineError::Model { name: name.to_owned(), why };
    let wanted = match std::fs::read_to_string(&beside) {
        Ok(text) => text.split_whitespace().next().unwrap_or_default().to_ascii_lowercase(),
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(failed(format!("{}: {error}", beside.display()))),
    };
    let found = sha256(model).map_err(|error| failed(format!("{}: {error}", model.display())))?;
    if found != wanted {
        let why = format!("{}: sha256 is {found}, {} says {wanted}", model.display(), beside.display());
        return Err(failed(why));
    }
    Ok(true)
}

fn sha256(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let mut hash = Sha256::new();
    let mut block = vec![0; 1 << 20];
    loop {
        match file.read(&mut block)? {
            0 => return Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()),
            read => hash.update(&block[..read]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_flipped_bit_is_found_where_a_checksum_stands_beside_the_model() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let model = folder.path().join("m.bin");
        std::fs::write(&model, b"abc").expect("write");
        assert_eq!(verify("m", &model), Ok(false));
        // FIPS 180-2, appendix B.1
        let known = "BA7816BF8F01CFEA414140DE5DAE2223B00361A396177A9CB410FF61F20015AD  m.bin\n";
        std::fs::write(file_of(&model), known).expect("write");
        assert_eq!(verify("m", &model), Ok(true));
        std::fs::write(&model, b"abb").expect("write");
        assert!(matches!(verify("m", &model), Err(EngineError::Model { .. })));
    }

    #[test]
    fn the_test_model_is_what_its_checksum_says() {
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/models/micro.en-q8_0.bin");
        assert_eq!(verify("micro", &model), Ok(true));
    }
}
