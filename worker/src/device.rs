//! The device a worker is pinned to, and its figures: NVML where there is a GPU, `/proc` where there is none.
//!
//! A machine without NVIDIA's library is a machine without a GPU, not an error; a GPU that was asked for by name and is
//! not there is one. Calls may block (a driver reset takes seconds), so sampling happens on a blocking thread.

use std::{collections::HashSet, fs, path::Path};

use nvml_wrapper::{Nvml, enum_wrappers::device::TemperatureSensor, enums::device::UsedGpuMemory, error::NvmlError};
use voxfleet_schema::{
    fleet::Device,
    id::{GpuId, IdError, MAX_ID_LEN},
};

use crate::config::{GpuChoice, WorkerConfig};

#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    #[error("gpu {wanted} was asked for, and NVML is not there")]
    NoNvml {
        wanted: String,
        #[source]
        source: NvmlError,
    },
    #[error("gpu {wanted} was asked for, and NVML does not know it")]
    NotFound {
        wanted: String,
        #[source]
        source: NvmlError,
    },
    #[error("the configured gpu_id is no id")]
    GpuId(#[source] IdError),
}

const MB: u64 = 1 << 20;

/// A pinned GPU.
struct Gpu {
    nvml: Nvml,
    index: u32,
    uuid: String,
    name: String,
    /// Memory in use on the device while our engine was not running: what belongs to others, where the driver does not
    /// tell processes apart (as in containers with a process namespace of their own).
    used_without_engine_mb: Option<u64>,
}

enum Kind {
    Gpu(Box<Gpu>),
    Cpu { name: String },
}

/// Finds the device once and samples it again and again.
pub(crate) struct Probe {
    kind: Kind,
    pub(crate) gpu_id: GpuId,
    pub(crate) host: String,
}

impl Probe {
    /// Blocks; call it on a blocking thread.
    pub(crate) fn open(config: &WorkerConfig) -> Result<Self, DeviceError> {
        let host = host_name();
        let gpu = find_gpu(&config.gpu)?;
        let gpu_id = match (&config.gpu_id, &gpu) {
            (Some(id), _) => GpuId::new(id).map_err(DeviceError::GpuId)?,
            (None, Some(gpu)) => gpu_id_of_uuid(&gpu.uuid)?,
            (None, None) => cpu_id(&host, config.index)?,
        };
        let kind = match gpu {
            Some(gpu) => Kind::Gpu(Box::new(gpu)),
            None => {
                let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
                Kind::Cpu { name: cpu_name(&info).unwrap_or("cpu").to_owned() }
            }
        };
        Ok(Self { kind, gpu_id, host })
    }

    /// What `CUDA_VISIBLE_DEVICES` of the engine child must say: its one device, or none.
    pub(crate) fn visible_device(&self) -> &str {
        match &self.kind {
            Kind::Gpu(gpu) => &gpu.uuid,
            Kind::Cpu { .. } => "",
        }
    }

    pub(crate) fn is_gpu(&self) -> bool {
        matches!(self.kind, Kind::Gpu(_))
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

    /// Blocks; call it on a blocking thread.
    pub(crate) fn sample(&mut self, engine_pid: Option<u32>) -> Device {
        match &mut self.kind {
            Kind::Gpu(gpu) => gpu.sample(engine_pid),
            Kind::Cpu { name } => {
                let info = fs::read_to_string("/proc/meminfo").unwrap_or_default();
                let resident = |pid: u32| resident_kb(Path::new(&format!("/proc/{pid}/status")));
                let used_kb = resident(std::process::id()) + engine_pid.map_or(0, resident);
                cpu_figures(name, &info, used_kb)
            }
        }
    }
}

/// The device a worker with this configuration would use, and its figures now. Blocks.
pub fn look(config: &WorkerConfig) -> Result<Device, DeviceError> {
    Probe::open(config).map(|mut probe| probe.sample(None))
}

fn find_gpu(choice: &GpuChoice) -> Result<Option<Gpu>, DeviceError> {
    // An engine without CUDA would leave a GPU idle under the name of one.
    if *choice == GpuChoice::None || (*choice == GpuChoice::Auto && !cfg!(feature = "cuda")) {
        return Ok(None);
    }
    let wanted = String::from(choice.clone());
    let nvml = match Nvml::init() {
        Ok(nvml) => nvml,
        Err(error) if *choice == GpuChoice::Auto => {
            tracing::info!(%error, "no nvml, using the cpu");
            return Ok(None);
        }
        Err(source) => return Err(DeviceError::NoNvml { wanted, source }),
    };
    let described = match choice {
        GpuChoice::Uuid(uuid) => nvml.device_by_uuid(uuid.as_str()),
        GpuChoice::Index(index) => nvml.device_by_index(*index),
        GpuChoice::Auto | GpuChoice::None => nvml.device_by_index(0),
    }
    .and_then(|device| Ok((device.index()?, device.uuid()?, device.name()?)));
    match described {
        Ok((index, uuid, name)) => Ok(Some(Gpu { nvml, index, uuid, name, used_without_engine_mb: None })),
        Err(error) if *choice == GpuChoice::Auto => {
            tracing::info!(%error, "nvml shows no gpu, using the cpu");
            Ok(None)
        }
        Err(source) => Err(DeviceError::NotFound { wanted, source }),
    }
}

impl Gpu {
    fn sample(&mut self, engine_pid: Option<u32>) -> Device {
        let mut figures = Device {
            index: Some(self.index),
            name: self.name.clone(),
            uuid: Some(self.uuid.clone()),
            total_mb: 0,
            free_mb: 0,
            used_mb: 0,
            used_by_others_mb: 0,
            temperature_c: None,
            power_w: None,
            utilization: None,
            ..Device::default()
        };
        let device = match self.nvml.device_by_uuid(self.uuid.as_str()) {
            Ok(device) => device,
            Err(error) => {
                tracing::warn!(%error, uuid = self.uuid, "gpu does not answer");
                return figures;
            }
        };
        let used_by_all_mb = match device.memory_info() {
            Ok(memory) => {
                (figures.total_mb, figures.free_mb) = (memory.total / MB, memory.free / MB);
                memory.used / MB
            }
            Err(error) => {
                tracing::warn!(%error, uuid = self.uuid, "gpu memory cannot be read");
                0
            }
        };
        let listed_mb = engine_pid.and_then(|pid| {
            // A list that is refused tells us as little as one without our process.
            let processes = device.running_compute_processes().unwrap_or_default();
            processes.iter().find(|p| p.pid == pid).and_then(|p| match p.used_gpu_memory {
                UsedGpuMemory::Used(bytes) => Some(bytes / MB),
                UsedGpuMemory::Unavailable => None,
            })
        });
        if engine_pid.is_none() {
            self.used_without_engine_mb = Some(used_by_all_mb);
        }
        figures.used_mb = own_memory_mb(engine_pid.is_some(), listed_mb, used_by_all_mb, self.used_without_engine_mb);
        figures.used_by_others_mb = used_by_all_mb.saturating_sub(figures.used_mb);
        // Figures that a device does not have (power in a virtual machine) stay absent.
        figures.temperature_c = device.temperature(TemperatureSensor::Gpu).ok();
        figures.power_w = device.power_usage().ok().map(|milliwatts| milliwatts as f32 / 1000.0);
        figures.utilization = device.utilization_rates().ok().map(|rates| rates.gpu as f32 / 100.0);
        figures
    }
}

/// Device memory of our engine: as the driver lists it, else what came on top since the engine started.
fn own_memory_mb(running: bool, listed: Option<u64>, used_by_all: u64, without_engine: Option<u64>) -> u64 {
    match (running, listed) {
        (false, _) => 0,
        (true, Some(listed)) => listed,
        (true, None) => used_by_all.saturating_sub(without_engine.unwrap_or(used_by_all)),
    }
}

fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

/// `GPU-1b2c...` is an id as it is; a MIG device's name has slashes.
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

fn cpu_name(cpuinfo: &str) -> Option<&str> {
    // ARM kernels give no model name.
    let (_, name) = cpuinfo.lines().find(|l| l.starts_with("model name"))?.split_once(':')?;
    Some(name.trim()).filter(|n| !n.is_empty())
}

/// Value of a `Name:   123 kB` line.
fn kb_field(text: &str, name: &str) -> Option<u64> {
    let rest = text.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(':'))?;
    rest.split_whitespace().next()?.parse().ok()
}

/// Resident memory of a process in kB; 0 when it is gone.
fn resident_kb(status: &Path) -> u64 {
    fs::read_to_string(status).ok().and_then(|text| kb_field(&text, "VmRSS")).unwrap_or(0)
}

fn cpu_figures(name: &str, meminfo: &str, used_kb: u64) -> Device {
    let mb = |field| kb_field(meminfo, field).unwrap_or(0) / 1024;
    let (total_mb, free_mb, used_mb) = (mb("MemTotal"), mb("MemAvailable"), used_kb / 1024);
    Device {
        index: None,
        name: name.to_owned(),
        uuid: None,
        total_mb,
        free_mb,
        used_mb,
        used_by_others_mb: total_mb.saturating_sub(free_mb).saturating_sub(used_mb),
        temperature_c: None,
        power_w: None,
        utilization: None,
        ..Device::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_become_ids() {
        assert_eq!(cpu_id("node.example.org", 2).expect("id").as_str(), "cpu-node-example-org-2");
        assert_eq!(cpu_id("", 0).expect("id").as_str(), "cpu-host-0");
        assert_eq!(cpu_id(&"x".repeat(300), u32::MAX).expect("id").as_str().len(), MAX_ID_LEN);
        assert_eq!(cpu_id("höst", 1).expect("id").as_str(), "cpu-h-st-1");
        let uuid = "GPU-9a3e4d6b-0d2f-8f1c-1c57-0f6a7d6f1a11";
        assert_eq!(gpu_id_of_uuid(uuid).expect("id").as_str(), uuid);
        assert_eq!(gpu_id_of_uuid("MIG-GPU-1/7/0").expect("id").as_str(), "MIG-GPU-1-7-0");
    }

    #[test]
    fn figures_come_from_proc() {
        let meminfo = "MemTotal:       16384000 kB\nMemFree:         1000 kB\nMemAvailable:    8192000 kB\n";
        let figures = cpu_figures("Test CPU", meminfo, 2_048_000);
        assert_eq!((figures.total_mb, figures.free_mb, figures.used_mb), (16_000, 8_000, 2_000));
        assert_eq!(figures.used_by_others_mb, 6_000);
        assert_eq!(cpu_name("processor : 0\nmodel name\t: Test CPU\n"), Some("Test CPU"));
        assert_eq!(cpu_name("processor : 0\n"), None);
        assert!(resident_kb(Path::new("/proc/self/status")) > 100);
        assert_eq!(resident_kb(Path::new("/proc/none/status")), 0);
    }

    #[test]
    fn memory_of_the_engine_is_listed_or_what_came_on_top() {
        for (running, listed, by_all, without, own) in [
            (false, None, 5_000, Some(5_000), 0),
            (true, Some(700), 5_700, Some(5_000), 700),
            (true, None, 5_700, Some(5_000), 700),
            (true, None, 4_000, Some(5_000), 0),
            (true, None, 5_700, None, 0),
        ] {
            assert_eq!(own_memory_mb(running, listed, by_all, without), own);
        }
    }

    /// On a machine with a GPU its figures, on one without the typed error.
    #[test]
    fn a_gpu_that_was_asked_for_is_there_or_an_error() {
        let config = WorkerConfig { gpu: GpuChoice::Index(0), ..WorkerConfig::default() };
        match Probe::open(&config) {
            Ok(mut probe) => {
                let figures = probe.sample(None);
                assert!(probe.is_gpu() && probe.visible_device().starts_with("GPU-"), "{figures:?}");
                assert_eq!(probe.gpu_id.as_str(), probe.visible_device());
                assert!(figures.total_mb > 1_000 && figures.free_mb <= figures.total_mb, "{figures:?}");
                assert_eq!((figures.index, figures.used_mb), (Some(0), 0), "nothing of ours runs there");
                assert!(figures.temperature_c.is_some_and(|c| (10..120).contains(&c)), "{figures:?}");
                let by_uuid = GpuChoice::Uuid(probe.visible_device().to_owned());
                let again = Probe::open(&WorkerConfig { gpu: by_uuid, ..config }).expect("by its uuid");
                assert_eq!(again.gpu_id, probe.gpu_id);
            }
            Err(error) => {
                assert!(matches!(error, DeviceError::NoNvml { .. } | DeviceError::NotFound { .. }), "{error}")
            }
        }
        let nobody = WorkerConfig { gpu: GpuChoice::Uuid("GPU-none".to_owned()), ..WorkerConfig::default() };
        assert!(matches!(Probe::open(&nobody).err(), Some(DeviceError::NoNvml { .. } | DeviceError::NotFound { .. })));
    }

    #[test]
    fn a_machine_without_a_gpu_has_a_cpu() {
        let config = WorkerConfig { gpu: GpuChoice::None, index: 7, ..WorkerConfig::default() };
        let mut probe = Probe::open(&config).expect("cpu");
        assert!(probe.gpu_id.as_str().starts_with("cpu-") && probe.gpu_id.as_str().ends_with("-7"));
        let name = probe.gpu_id.clone();
        probe.rename_cpu(7, &HashSet::new()).expect("free");
        assert_eq!(probe.gpu_id, name);
        probe.rename_cpu(7, &HashSet::from([name, cpu_id(&probe.host, 8).expect("id")])).expect("two are taken");
        assert!(probe.gpu_id.as_str().ends_with("-9"));
        let figures = probe.sample(Some(std::process::id()));
        assert!(figures.total_mb > 0 && figures.used_mb > 0 && figures.index.is_none());
        assert_eq!(probe.visible_device(), "");
        let named = WorkerConfig { gpu_id: Some("gpu-a".to_owned()), ..config };
        assert_eq!(Probe::open(&named).expect("named").gpu_id.as_str(), "gpu-a");
    }
}
