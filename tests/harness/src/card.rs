//! Cards that are not there: a management library of NVIDIA's interface, built by the machine's own C compiler, that shows
//! whatever its folder says. The product loads it as it would load the real one (`worker.nvml_library`).

use std::{
    fs, io,
    path::{Path, PathBuf},
    process::Command,
};

use tempfile::TempDir;

use crate::{Error, Result};

const SOURCE: &str = include_str!("../fake_nvml.c");

/// What `error` and `init_error` may say, by NVML's numbers.
pub mod code {
    pub const NO_PERMISSION: u32 = 4;
    pub const DRIVER_NOT_LOADED: u32 = 9;
    pub const GPU_IS_LOST: u32 = 15;
    pub const DRIVER_MISMATCH: u32 = 18;
    pub const UNKNOWN: u32 = 999;
}

/// A machine's cards, numbered from 0. Gone when dropped; whoever has loaded the library keeps it.
pub struct FakeNvml {
    dir: TempDir,
}

impl FakeNvml {
    /// So many cards of 16 GB, idle at 40 degrees.
    pub fn new(cards: u32) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("voxfleet-nvml-").tempdir().map_err(Error::io("temporary folder"))?;
        let fake = Self { dir };
        fake.set_machine("driver_version", "580.65.06")?;
        fake.set_machine("library_version", "13.580.65.06")?;
        fake.set_machine("cuda_version", "13000")?;
        for card in 0..cards {
            fs::create_dir(fake.folder(card)).map_err(Error::io("folder of a card"))?;
            let figures = [
                ("name", "Fake T4".to_owned()),
                ("uuid", fake.uuid(card)),
                ("total_mb", "16000".to_owned()),
                ("used_mb", "0".to_owned()),
                ("temperature", "40".to_owned()),
                ("power_mw", "31500".to_owned()),
                ("utilization", "0".to_owned()),
                ("throttle", "1".to_owned()),
                ("ecc", "0".to_owned()),
            ];
            for (key, value) in figures {
                fake.set(card, key, value)?;
            }
        }
        fake.build()?;
        Ok(fake)
    }

    fn build(&self) -> Result<()> {
        let source = self.dir.path().join("nvml.c");
        fs::write(&source, SOURCE).map_err(Error::io("source of the fake library"))?;
        let root = format!("-DROOT=\"{}\"", self.dir.path().display());
        let mut compiler = Command::new("cc");
        compiler.args(["-shared", "-fPIC", "-O1", &root, "-o"]).arg(self.library()).arg(&source);
        let output = compiler.output().map_err(Error::io("cc, which builds the fake library (apt-get install gcc)"))?;
        if output.status.success() {
            return Ok(());
        }
        Err(Error::Wrong(format!("the fake library does not build:\n{}", String::from_utf8_lossy(&output.stderr))))
    }

    /// For `worker.nvml_library`.
    pub fn library(&self) -> PathBuf {
        self.dir.path().join("libnvidia-ml.so.1")
    }

    /// Name of a card, the same in every run.
    pub fn uuid(&self, card: u32) -> String {
        format!("GPU-{card:08x}-0000-4000-8000-00000000fa4e")
    }

    /// Name of an instance of a card, as [`Self::split`] makes them.
    pub fn instance_uuid(&self, card: u32, instance: u32) -> String {
        format!("MIG-{card:08x}-{instance:04x}-4000-8000-00000000fa4e")
    }

    /// Where a card's figures lie.
    pub fn folder(&self, card: u32) -> PathBuf {
        self.dir.path().join(format!("card{card}"))
    }

    /// Changes what a card says from now on; `fake_nvml.c` lists the keys.
    pub fn set(&self, card: u32, key: &str, value: impl ToString) -> Result<()> {
        put(&self.folder(card), key, &value.to_string())
    }

    /// The card says nothing about it any more.
    pub fn unset(&self, card: u32, key: &str) -> Result<()> {
        remove(&self.folder(card), key)
    }

    /// The same for what is said of the whole machine.
    pub fn set_machine(&self, key: &str, value: impl ToString) -> Result<()> {
        put(self.dir.path(), key, &value.to_string())
    }

    pub fn unset_machine(&self, key: &str) -> Result<()> {
        remove(self.dir.path(), key)
    }

    /// Splits a card into instances of so many MB each.
    pub fn split(&self, card: u32, instances: &[u64]) -> Result<()> {
        self.set(card, "mig", 1)?;
        for (index, total_mb) in (0..).zip(instances) {
            let folder = self.folder(card).join(format!("mig{index}"));
            fs::create_dir(&folder).map_err(Error::io("folder of an instance"))?;
            put(&folder, "name", "Fake A100 MIG 1g")?;
            put(&folder, "uuid", &self.instance_uuid(card, index))?;
            put(&folder, "total_mb", &total_mb.to_string())?;
        }
        Ok(())
    }
}

/// Whole or not at all: the library may be reading.
fn put(folder: &Path, key: &str, value: &str) -> Result<()> {
    let being_written = folder.join(format!(".{key}"));
    fs::write(&being_written, value)
        .and_then(|()| fs::rename(&being_written, folder.join(key)))
        .map_err(Error::io(format!("{key} of a card")))
}

fn remove(folder: &Path, key: &str) -> Result<()> {
    match fs::remove_file(folder.join(key)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        done => done.map_err(Error::io(format!("{key} of a card"))),
    }
}
