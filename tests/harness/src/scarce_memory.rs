//! Memory that runs out in an engine process in the middle of its work: a library that is loaded before all others
//! (`LD_PRELOAD`), built by the machine's own C compiler, refuses one large allocation when it is told to.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use tempfile::TempDir;

use crate::{Error, Result};

const SOURCE: &str = include_str!("../scarce_memory.c");

/// For the workers of one test; processes that are no engine are left alone.
pub struct ScarceMemory {
    dir: TempDir,
}

impl ScarceMemory {
    pub fn new() -> Result<Self> {
        let dir =
            tempfile::Builder::new().prefix("voxfleet-scarce-").tempdir().map_err(Error::io("temporary folder"))?;
        let scarce = Self { dir };
        let source = scarce.dir.path().join("scarce.c");
        fs::write(&source, SOURCE).map_err(Error::io("source of the allocator"))?;
        let sign = format!("-DSIGN=\"{}\"", scarce.sign().display());
        let mut compiler = Command::new("cc");
        compiler.args(["-shared", "-fPIC", "-O1", &sign, "-o"]).arg(scarce.library()).arg(&source);
        let output = compiler.output().map_err(Error::io("cc, which builds the allocator (apt-get install gcc)"))?;
        if output.status.success() {
            return Ok(scarce);
        }
        Err(Error::Wrong(format!("the allocator does not build:\n{}", String::from_utf8_lossy(&output.stderr))))
    }

    /// For `LD_PRELOAD`.
    pub fn library(&self) -> PathBuf {
        self.dir.path().join("libscarce.so")
    }

    fn sign(&self) -> PathBuf {
        self.dir.path().join("now")
    }

    /// The next large allocation of an engine fails.
    pub fn strike(&self) -> Result<()> {
        fs::write(self.sign(), "").map_err(Error::io("sign for the allocator"))
    }

    /// Whether it is still to fail.
    pub fn is_due(&self) -> bool {
        Path::exists(&self.sign())
    }
}
