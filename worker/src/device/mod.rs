//! The device a worker is pinned to, and its figures: NVML where there is a GPU, `/proc` where there is none.
//!
//! A machine without NVIDIA's library is a machine without a GPU, not an error; a GPU that was asked for by name and is not
//! there is one. A GPU that stops answering while work is on it is neither: its figures carry a typed trouble until it is
//! back. Calls may block, so sampling happens on a blocking thread.
//!
//! | module | holds |
//! |---|---|
//! | [`card`] | the trait behind which devices are alike, and what to do about each trouble |
//! | [`nvml`] | GPUs and the instances of split ones |
//! | [`xid`] | errors that the driver reports of a GPU |
//! | [`cpu`] | the CPU |
//! | [`presence`] | which other workers of ours are on this machine, and on this device |
//! | [`threads`] | how the cores are shared out |

mod card;
mod cpu;
mod nvml;
mod presence;
#[cfg(test)]
mod tests;
mod threads;
mod xid;

use std::{collections::HashSet, path::Path, sync::Arc, time::Duration};

use nvml_wrapper::{Nvml, error::NvmlError};
use voxfleet_schema::{
    device::DeviceTrouble,
    failure::FailureClass,
    fleet::Device,
    id::{GpuId, IdError, MAX_ID_LEN},
    remedy::{Side, remedy},
};

pub(crate) use self::{
    card::Ours,
    threads::{Cores, Share},
};
use self::{
    card::{Card, trouble},
    cpu::Cpu,
    nvml::{Gpu, Slot, class_of},
    presence::Presence,
};
pub use self::{
    nvml::{Listed, Versions},
    presence::Neighbour,
};
use crate::{
    config::{GpuChoice, WorkerConfig},
    ipc::EngineKind,
};

/// A GPU that was asked for by name and cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    #[error("gpu {wanted} was asked for, and NVML cannot be used; {}", remedy(Side::Driver, class_of(.source, false)))]
    NoNvml {
        wanted: String,
        #[source]
        source: NvmlError,
    },
    #[error("gpu {wanted} was asked for, and NVML does not know it; `nvidia-smi -L` lists those it knows")]
    NotFound {
        wanted: String,
        #[source]
        source: NvmlError,
    },
    #[error("gpu {wanted} was asked for, and it does not answer; {}", remedy(Side::Driver, FailureClass::DeviceLost))]
    Lost {
        wanted: String,
        #[source]
        source: NvmlError,
    },
    #[error("gpu {wanted} was asked for, and it is split; {}", name_one(.instances))]
    Split { wanted: String, instances: Vec<String> },
    #[error("gpu {wanted} was asked for, and this build has no CUDA; take a build with it, or --gpu none")]
    NoCuda { wanted: String },
    #[error("the configured gpu_id is no id")]
    GpuId(#[source] IdError),
}

fn name_one(instances: &[String]) -> String {
    match instances {
        [] => "it has no instances yet (nvidia-smi mig -cgi makes them)".to_owned(),
        names => format!("name one of its instances: {}", names.join(", ")),
    }
}

/// Finds the device once and samples it again and again.
pub(crate) struct Probe {
    card: Box<dyn Card>,
    uuid: Option<String>,
    /// Why there is no GPU here, where there should be one.
    lacks: Option<DeviceTrouble>,
    /// Told already.
    told: Option<DeviceTrouble>,
    presence: Option<Arc<Presence>>,
    shared_with: Vec<String>,
    pub(crate) gpu_id: GpuId,
    pub(crate) host: String,
}

impl Probe {
    /// Blocks; call it on a blocking thread.
    pub(crate) fn open(config: &WorkerConfig) -> Result<Self, DeviceError> {
        let host = host_name();
        let (gpu, lacks) = match find_gpu(config)? {
            Found::Gpu(gpu) => (Some(gpu), None),
            Found::Cpu(lacks) => (None, lacks),
        };
        let gpu_id = match (&config.gpu_id, &gpu) {
            (Some(id), _) => GpuId::new(id).map_err(DeviceError::GpuId)?,
            (None, Some(gpu)) => gpu_id_of_uuid(gpu.uuid())?,
            (None, None) => cpu_id(&host, config.index)?,
        };
        let uuid = gpu.as_ref().map(|gpu| gpu.uuid().to_owned());
        let card: Box<dyn Card> = match gpu {
            Some(gpu) => gpu,
            None => Box::new(Cpu::open()),
        };
        Ok(Self { card, uuid, lacks, told: None, presence: None, shared_with: Vec::new(), gpu_id, host })
    }

    #[cfg(test)]
    pub(crate) fn that_panics() -> Self {
        struct Panics;
        impl Card for Panics {
            fn sample(&mut self, _: Option<Ours>) -> Result<Device, DeviceTrouble> {
                panic!("thrown by a driver's binding")
            }
            fn engines_mb(&self) -> Option<u64> {
                None
            }
            fn identity(&self) -> Device {
                Device::default()
            }
        }
        let config = WorkerConfig { gpu: GpuChoice::None, ..WorkerConfig::default() };
        Self { card: Box::new(Panics), ..Self::open(&config).expect("the CPU") }
    }

    /// What `CUDA_VISIBLE_DEVICES` of the engine child must say: its one device, or none.
    pub(crate) fn visible_device(&self) -> &str {
        self.uuid.as_deref().unwrap_or_default()
    }

    pub(crate) fn is_gpu(&self) -> bool {
        self.uuid.is_some()
    }

    /// Takes the name of the first CPU from `index` on that no other worker of this host has.
    pub(crate) fn rename_cpu(&mut self, index: u32, taken: &HashSet<GpuId>) -> Result<(), DeviceError> {
        for index in index..=u32::MAX {
            let id = cpu_id(&self.host, index)?;
            if !taken.contains(&id) {
                if id != self.gpu_id {
                    tracing::info!(was = %self.gpu_id, now = %id, "another worker of this host has this name");
                }
                self.gpu_id = id;
                break;
            }
        }
        Ok(())
    }

    /// Lets other workers of this machine see this one, and this one them. Blocks.
    pub(crate) fn announce(&mut self, cache_dir: &Path) {
        let me = Neighbour { gpu_id: self.gpu_id.to_string(), uuid: self.uuid.clone() };
        match Presence::announce(cache_dir, &self.host, &me) {
            Ok(presence) => self.presence = Some(Arc::new(presence)),
            Err(error) => tracing::info!(%error, "other workers of this host cannot see this one"),
        }
    }

    /// The way to a share of this host's cores.
    pub(crate) fn cores(&self, config: &WorkerConfig) -> Cores {
        Cores::new(config, self.presence.clone())
    }

    /// Names of other workers on the same device, told when they change. The CPU is everybody's.
    fn look_around(&mut self) {
        let Some((presence, uuid)) = self.presence.as_ref().zip(self.uuid.as_ref()) else { return };
        let others = presence.others().into_iter().filter(|other| other.uuid.as_ref() == Some(uuid));
        let shared_with: Vec<String> = others.map(|other| other.gpu_id).collect();
        if shared_with != self.shared_with {
            if shared_with.is_empty() {
                tracing::info!(gpu = %self.gpu_id, uuid, "no other worker is on this device any more");
            } else {
                let others = shared_with.join(", ");
                tracing::warn!(gpu = %self.gpu_id, uuid, others, "other workers are on this device: all of them share its memory");
            }
            self.shared_with = shared_with;
        }
    }

    /// Blocks; call it on a blocking thread.
    pub(crate) fn sample(&mut self, ours: Option<Ours>) -> Device {
        self.look_around();
        Device { shared_with: self.shared_with.clone(), ..self.figures(ours) }
    }

    fn figures(&mut self, ours: Option<Ours>) -> Device {
        match self.card.sample(ours) {
            Ok(figures) => {
                if let Some(was) = self.told.take() {
                    tracing::info!(uuid = self.uuid, was = %was.class, "device answers again");
                }
                Device { trouble: self.lacks.clone(), ..figures }
            }
            Err(trouble) => {
                if self.told.as_ref() != Some(&trouble) {
                    tracing::error!(uuid = self.uuid, class = %trouble.class, trouble.message, "device does not answer");
                    self.told = Some(trouble.clone());
                }
                Device { trouble: Some(trouble), ..self.card.identity() }
            }
        }
    }
}

/// The device a worker with this configuration would use, and its figures now. Blocks.
pub fn look(config: &WorkerConfig) -> Result<Device, DeviceError> {
    Probe::open(config).map(|mut probe| probe.sample(None))
}

/// The same, for whoever plans what else fits; and of the memory in use, what engines of workers have, if the driver tells.
/// Blocks.
pub fn look_apart(config: &WorkerConfig) -> Result<(Device, Option<u64>), DeviceError> {
    Probe::open(config).map(|mut probe| (probe.sample(None), probe.card.engines_mb()))
}

/// The workers of this host that use this cache folder. Blocks.
pub fn workers(cache_dir: &Path) -> Vec<Neighbour> {
    presence::workers(cache_dir, &host_name())
}

/// Whether a worker with this configuration can use a GPU at all: an engine without CUDA would leave one idle under the name
/// of one. The simulated engine needs none.
pub fn takes_gpus(config: &WorkerConfig) -> bool {
    cfg!(feature = "cuda") || config.engine == EngineKind::Simulated
}

/// The trouble of a call that does not come back. What is known from before stays known.
pub(crate) fn hangs(since: Duration) -> DeviceTrouble {
    trouble(FailureClass::Unavailable, format_args!("the driver has not answered for {} s", since.as_secs()))
}

/// Every device of this machine to which a worker can be pinned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Survey {
    pub versions: Versions,
    pub devices: Vec<Listed>,
    /// Of cards that do not answer.
    pub troubles: Vec<DeviceTrouble>,
}

/// Asks NVML at `library`, or where the loader finds it. Blocks.
pub fn survey(library: Option<&Path>) -> Result<Survey, DeviceTrouble> {
    let nvml = nvml::load(library).map_err(|error| trouble(class_of(&error, false), error))?;
    let (devices, troubles) = nvml::all(&nvml).map_err(|error| trouble(class_of(&error, false), error))?;
    Ok(Survey { versions: nvml::versions(&nvml), devices, troubles })
}

enum Found {
    Gpu(Box<Gpu>),
    /// With the reason, where a GPU could have been expected.
    Cpu(Option<DeviceTrouble>),
}

fn find_gpu(config: &WorkerConfig) -> Result<Found, DeviceError> {
    let choice = &config.gpu;
    let able = takes_gpus(config);
    match choice {
        GpuChoice::None => return Ok(Found::Cpu(None)),
        GpuChoice::Auto if !able => return Ok(Found::Cpu(None)),
        GpuChoice::Index(_) | GpuChoice::Uuid(_) if !able => return Err(DeviceError::NoCuda { wanted: text(choice) }),
        _ => {}
    }
    let library = config.nvml_library.as_deref();
    let nvml = match nvml::load(library) {
        Ok(nvml) => nvml,
        Err(error) if *choice == GpuChoice::Auto => {
            let class = class_of(&error, false);
            // Most machines without the library, or with an idle one, have no GPU either.
            let none_expected = matches!(error, NvmlError::LibloadingError(_) | NvmlError::DriverNotLoaded);
            let expected = !none_expected || library.is_some() || Path::new("/dev/nvidiactl").exists();
            match expected {
                true => tracing::warn!(%error, "nvml cannot be used, using the cpu"),
                false => tracing::info!(%error, "no nvml, using the cpu"),
            }
            return Ok(Found::Cpu(expected.then(|| trouble(class, error))));
        }
        Err(source) => return Err(DeviceError::NoNvml { wanted: text(choice), source }),
    };
    match pick(&nvml, choice) {
        Ok(Some(Slot::Whole(listed))) => Ok(Found::Gpu(Box::new(Gpu::new(library, nvml, listed)))),
        Ok(Some(Slot::Instances(instances))) => {
            let instances = instances.into_iter().map(|instance| instance.uuid).collect();
            Err(DeviceError::Split { wanted: text(choice), instances })
        }
        Ok(None) => {
            tracing::info!("nvml shows no gpu, using the cpu");
            Ok(Found::Cpu(None))
        }
        Err(error) if *choice == GpuChoice::Auto => {
            tracing::warn!(%error, "the gpu does not answer, using the cpu");
            Ok(Found::Cpu(Some(trouble(class_of(&error, true), error))))
        }
        Err(source) if class_of(&source, false) == FailureClass::DeviceLost => {
            Err(DeviceError::Lost { wanted: text(choice), source })
        }
        Err(source) => Err(DeviceError::NotFound { wanted: text(choice), source }),
    }
}

/// None: there is no GPU, and none was asked for by name.
fn pick(nvml: &Nvml, choice: &GpuChoice) -> Result<Option<Slot>, NvmlError> {
    match choice {
        GpuChoice::Uuid(uuid) => nvml::named(nvml, uuid).map(Some),
        GpuChoice::Index(index) => nvml::slot(nvml, *index).map(Some),
        GpuChoice::None => Ok(None),
        GpuChoice::Auto => {
            let (devices, troubles) = nvml::all(nvml)?;
            match (devices.into_iter().next(), troubles.is_empty()) {
                (Some(first), _) => Ok(Some(Slot::Whole(first))),
                (None, true) => Ok(None),
                // Asked once more, for its own words.
                (None, false) => nvml::slot(nvml, 0).map(Some),
            }
        }
    }
}

fn text(choice: &GpuChoice) -> String {
    String::from(choice.clone())
}

impl DeviceError {
    /// None where the setting is at fault, not the device.
    pub fn class(&self) -> Option<FailureClass> {
        match self {
            DeviceError::NoNvml { source, .. }
            | DeviceError::NotFound { source, .. }
            | DeviceError::Lost { source, .. } => Some(class_of(source, false)),
            DeviceError::Split { .. } | DeviceError::NoCuda { .. } | DeviceError::GpuId(_) => None,
        }
    }
}

fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

/// `GPU-1b2c...` is an id as it is; an old driver's name of an instance has slashes.
fn gpu_id_of_uuid(uuid: &str) -> Result<GpuId, DeviceError> {
    GpuId::new(sanitised(uuid, MAX_ID_LEN)).map_err(DeviceError::GpuId)
}

fn cpu_id(host: &str, index: u32) -> Result<GpuId, DeviceError> {
    let number = index.to_string();
    let room = MAX_ID_LEN - "cpu--".len() - number.len();
    GpuId::new(format!("cpu-{}-{number}", sanitised(host, room))).map_err(DeviceError::GpuId)
}

/// `text` in the alphabet of ids, cut to `room` bytes.
fn sanitised(text: &str, room: usize) -> String {
    let kept: String = text
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() || c == '_' || c == '-' { c } else { '-' })
        .take(room)
        .collect();
    if kept.is_empty() { "host".to_owned() } else { kept }
}
