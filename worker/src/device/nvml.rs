//! GPUs as NVIDIA's management library tells of them. An instance of a split card (MIG) is a device of its own.
//!
//! A library that failed is unloaded and loaded again: after an update of the driver only a new copy fits.

use std::path::{Path, PathBuf};

use nvml_wrapper::{
    Device as Handle, Nvml,
    bitmasks::device::ThrottleReasons,
    enum_wrappers::device::{EccCounter, MemoryError, TemperatureSensor},
    enums::device::UsedGpuMemory,
    error::NvmlError,
};
use voxfleet_schema::{
    device::{Device, DeviceTrouble, Xids},
    failure::FailureClass,
};

use super::{
    card::{
        Card, Listing, Ours, Patience, own_memory_mb, pids_are_the_hosts, runs_an_engine, trouble, without_engine_mb,
    },
    xid::{self, Library},
};
use crate::session::unix_ms;

const MB: u64 = 1 << 20;

/// A device to pin a worker to: a whole GPU, or an instance of a split one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// Of the card, which several instances share.
    pub index: u32,
    pub uuid: String,
    pub name: String,
    pub total_mb: u64,
    pub is_instance: bool,
}

/// Versions of what is installed, for people.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Versions {
    pub driver: Option<String>,
    pub library: Option<String>,
    /// The newest CUDA that the driver knows: `13.0`.
    pub cuda: Option<String>,
}

/// The library at `path`, or the one that the loader finds.
pub(super) fn load(path: Option<&Path>) -> Result<Nvml, NvmlError> {
    let mut builder = Nvml::builder();
    if let Some(path) = path {
        builder.lib_path(path.as_os_str());
    }
    builder.init()
}

pub(super) fn versions(nvml: &Nvml) -> Versions {
    let cuda = nvml.sys_cuda_driver_version().ok();
    Versions {
        driver: nvml.sys_driver_version().ok(),
        library: nvml.sys_nvml_version().ok(),
        cuda: cuda.map(|v| format!("{}.{}", v / 1000, v % 1000 / 10)),
    }
}

/// What is behind one index.
pub(super) enum Slot {
    Whole(Listed),
    /// Split; work can only run on these.
    Instances(Vec<Listed>),
}

pub(super) fn slot(nvml: &Nvml, index: u32) -> Result<Slot, NvmlError> {
    let card = nvml.device_by_index(index)?;
    if !is_split(&card) {
        return Ok(Slot::Whole(listed(&card, index, false)?));
    }
    let places = card.mig_device_count()?;
    // Places may be empty, with others behind them.
    let instances = (0..places).filter_map(|place| card.mig_device_by_index(place).ok());
    Ok(Slot::Instances(instances.map(|instance| listed(&instance, index, true)).collect::<Result<_, _>>()?))
}

/// Every device of the machine that answers, in order, and why others do not.
pub(super) fn all(nvml: &Nvml) -> Result<(Vec<Listed>, Vec<DeviceTrouble>), NvmlError> {
    let (mut devices, mut troubles) = (Vec::new(), Vec::new());
    for index in 0..nvml.device_count()? {
        match slot(nvml, index) {
            Ok(Slot::Whole(card)) => devices.push(card),
            Ok(Slot::Instances(instances)) => devices.extend(instances),
            Err(error) => troubles.push(trouble(class_of(&error, true), format_args!("gpu {index}: {error}"))),
        }
    }
    Ok((devices, troubles))
}

/// By the name of a card or of an instance.
pub(super) fn named(nvml: &Nvml, uuid: &str) -> Result<Slot, NvmlError> {
    let device = nvml.device_by_uuid(uuid)?;
    if let Ok(card) = parent(&device) {
        return Ok(Slot::Whole(listed(&device, card.index()?, true)?));
    }
    slot(nvml, device.index()?)
}

fn listed(device: &Handle<'_>, index: u32, is_instance: bool) -> Result<Listed, NvmlError> {
    let total_mb = device.memory_info()?.total / MB;
    Ok(Listed { index, uuid: device.uuid()?, name: device.name()?, total_mb, is_instance })
}

fn is_split(card: &Handle<'_>) -> bool {
    // Most cards cannot be split, and say that they do not support the question.
    card.mig_mode().is_ok_and(|mode| mode.current == 1)
}

/// The card that an instance is part of; an error for whole cards.
fn parent<'nvml>(device: &Handle<'nvml>) -> Result<Handle<'nvml>, NvmlError> {
    match device.mig_is_mig_device_handle()? {
        true => device.mig_parent_device(),
        false => Err(NvmlError::NotFound),
    }
}

/// Its errors are those of its card, where it is an instance.
fn watched(nvml: Nvml, uuid: &str) -> Library {
    Library::new(nvml).watch(|nvml| {
        let device = nvml.device_by_uuid(uuid).ok()?;
        Some(parent(&device).unwrap_or(device))
    })
}

/// What an error means. `was_there`: of a device that had answered before.
pub(super) fn class_of(error: &NvmlError, was_there: bool) -> FailureClass {
    /// A card that was unplugged, to drivers newer than the binding.
    const GPU_NOT_FOUND: u32 = 28;
    /// The library does not know the layout that it was asked for.
    const ARGUMENT_VERSION_MISMATCH: u32 = 25;
    match error {
        NvmlError::LibloadingError(_) | NvmlError::LibraryNotFound => FailureClass::MissingLibrary,
        NvmlError::LibRmVersionMismatch
        | NvmlError::FailedToLoadSymbol(_)
        | NvmlError::FunctionNotFound
        | NvmlError::UnexpectedVariant(ARGUMENT_VERSION_MISMATCH) => FailureClass::DriverMismatch,
        NvmlError::GpuLost | NvmlError::ResetRequired | NvmlError::UnexpectedVariant(GPU_NOT_FOUND) => {
            FailureClass::DeviceLost
        }
        NvmlError::NotFound | NvmlError::InvalidArg | NvmlError::DriverNotLoaded if was_there => {
            FailureClass::DeviceLost
        }
        _ => FailureClass::Unavailable,
    }
}

/// A pinned GPU, or an instance of one.
pub(super) struct Gpu {
    path: Option<PathBuf>,
    /// None while it has to be loaded again.
    library: Option<Library>,
    listed: Listed,
    xids: Option<Xids>,
    gpus: u32,
    /// What belongs to others, where the driver does not tell processes apart (as in containers with a process namespace
    /// of their own).
    used_without_engine_mb: Option<u64>,
    pids_are_the_hosts: bool,
    patience: Patience,
    last: Option<DeviceTrouble>,
}

impl Gpu {
    pub(super) fn new(path: Option<&Path>, nvml: Nvml, listed: Listed) -> Self {
        let gpus = count(&nvml);
        Self {
            path: path.map(Path::to_owned),
            library: Some(watched(nvml, &listed.uuid)),
            listed,
            xids: None,
            gpus,
            used_without_engine_mb: None,
            pids_are_the_hosts: pids_are_the_hosts(),
            patience: Patience::default(),
            last: None,
        }
    }

    pub(super) fn uuid(&self) -> &str {
        &self.listed.uuid
    }

    fn ask(&mut self, ours: Option<Ours>) -> Result<Device, DeviceTrouble> {
        let driver_says = |error: NvmlError| trouble(class_of(&error, true), error);
        let mut library = match self.library.take() {
            Some(library) => library,
            None => watched(load(self.path.as_deref()).map_err(driver_says)?, &self.listed.uuid),
        };
        if xid::heard(&mut self.xids, &library.take(), unix_ms(), &self.listed.uuid) {
            // The driver may go on telling figures of what is no longer there.
            self.patience.gone();
            return Err(trouble(FailureClass::DeviceLost, "XID 79: the card has fallen off the bus"));
        }
        let figures = self.read(&library.nvml, ours).map_err(driver_says)?;
        self.library = Some(library);
        Ok(figures)
    }

    fn read(&mut self, nvml: &Nvml, ours: Option<Ours>) -> Result<Device, NvmlError> {
        let device = nvml.device_by_uuid(self.listed.uuid.as_str())?;
        let memory = device.memory_info()?;
        let used_by_all_mb = memory.used / MB;
        let listing = ours.map_or(Listing::Unknown, |ours| self.listing(&device, ours.pid));
        self.used_without_engine_mb = without_engine_mb(self.used_without_engine_mb, ours, used_by_all_mb);
        let used_mb = own_memory_mb(ours, listing, used_by_all_mb, self.used_without_engine_mb);
        // An instance has no sensors: heat and clocks are its card's.
        let card = parent(&device);
        let card = card.as_ref().unwrap_or(&device);
        // Figures that a device does not have (power in a virtual machine) stay absent.
        Ok(Device {
            total_mb: memory.total / MB,
            free_mb: memory.free / MB,
            used_mb,
            used_by_others_mb: used_by_all_mb.saturating_sub(used_mb),
            temperature_c: card.temperature(TemperatureSensor::Gpu).ok(),
            power_w: card.power_usage().ok().map(|milliwatts| milliwatts as f32 / 1000.0),
            utilization: device.utilization_rates().ok().map(|rates| rates.gpu as f32 / 100.0),
            throttled: card.current_throttle_reasons().map(throttled).unwrap_or_default(),
            ecc_errors: card.total_ecc_errors(MemoryError::Uncorrected, EccCounter::Volatile).ok(),
            ..self.identity()
        })
    }

    fn listing(&self, device: &Handle<'_>, pid: u32) -> Listing {
        let Ok(processes) = device.running_compute_processes() else { return Listing::Unknown };
        match processes.iter().find(|process| process.pid == pid).map(|process| &process.used_gpu_memory) {
            Some(UsedGpuMemory::Used(bytes)) => Listing::Listed(bytes / MB),
            None if self.pids_are_the_hosts => Listing::NotListed,
            Some(UsedGpuMemory::Unavailable) | None => Listing::Unknown,
        }
    }
}

impl Card for Gpu {
    fn sample(&mut self, ours: Option<Ours>) -> Result<Device, DeviceTrouble> {
        if let Some(last) = &self.last
            && !self.patience.is_over()
        {
            return Err(last.clone());
        }
        match self.ask(ours) {
            Ok(figures) => {
                self.patience.reset();
                self.last = None;
                Ok(figures)
            }
            Err(trouble) => {
                self.patience.failed();
                self.last = Some(trouble.clone());
                Err(trouble)
            }
        }
    }

    fn engines_mb(&self) -> Option<u64> {
        let device = self.library.as_ref()?.nvml.device_by_uuid(self.listed.uuid.as_str()).ok()?;
        let processes = device.running_compute_processes().ok()?;
        let engines = processes.iter().filter(|process| runs_an_engine(process.pid));
        let listed = engines.map(|engine| match engine.used_gpu_memory {
            UsedGpuMemory::Used(bytes) => Some(bytes / MB),
            UsedGpuMemory::Unavailable => None,
        });
        let engines: Vec<u64> = listed.collect::<Option<_>>()?;
        // Where the driver counts processes otherwise than we do, none that we know is not none.
        (!engines.is_empty() || self.pids_are_the_hosts).then(|| engines.iter().sum())
    }

    fn identity(&self) -> Device {
        Device {
            index: Some(self.listed.index),
            name: self.listed.name.clone(),
            uuid: Some(self.listed.uuid.clone()),
            total_mb: self.listed.total_mb,
            gpus: Some(self.gpus),
            xids: self.xids,
            ..Device::default()
        }
    }
}

/// Devices of the machine; a pinned one is at least one.
fn count(nvml: &Nvml) -> u32 {
    let listed = all(nvml).map_or(0, |(devices, troubles)| devices.len() + troubles.len());
    u32::try_from(listed).unwrap_or(u32::MAX).max(1)
}

/// Why clocks are held down below what they could be; idling and settings of the owner are no reasons.
fn throttled(reasons: ThrottleReasons) -> Vec<String> {
    let thermal = ThrottleReasons::SW_THERMAL_SLOWDOWN | ThrottleReasons::HW_THERMAL_SLOWDOWN;
    let named = [
        ("thermal", thermal),
        ("power", ThrottleReasons::SW_POWER_CAP),
        ("power_brake", ThrottleReasons::HW_POWER_BRAKE_SLOWDOWN),
        ("hardware", ThrottleReasons::HW_SLOWDOWN),
        ("sync_boost", ThrottleReasons::SYNC_BOOST),
    ];
    named.into_iter().filter(|(_, bits)| reasons.intersects(*bits)).map(|(name, _)| name.to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_have_classes() {
        for (error, at_start, later) in [
            (NvmlError::LibRmVersionMismatch, FailureClass::DriverMismatch, FailureClass::DriverMismatch),
            (NvmlError::FunctionNotFound, FailureClass::DriverMismatch, FailureClass::DriverMismatch),
            (NvmlError::LibraryNotFound, FailureClass::MissingLibrary, FailureClass::MissingLibrary),
            (NvmlError::GpuLost, FailureClass::DeviceLost, FailureClass::DeviceLost),
            (NvmlError::ResetRequired, FailureClass::DeviceLost, FailureClass::DeviceLost),
            (NvmlError::UnexpectedVariant(28), FailureClass::DeviceLost, FailureClass::DeviceLost),
            (NvmlError::NotFound, FailureClass::Unavailable, FailureClass::DeviceLost),
            (NvmlError::DriverNotLoaded, FailureClass::Unavailable, FailureClass::DeviceLost),
            (NvmlError::NoPermission, FailureClass::Unavailable, FailureClass::Unavailable),
            (NvmlError::Unknown, FailureClass::Unavailable, FailureClass::Unavailable),
        ] {
            assert_eq!((class_of(&error, false), class_of(&error, true)), (at_start, later), "{error}");
        }
    }

    #[test]
    fn only_what_holds_clocks_down_is_told() {
        for (bits, told) in [
            (0, vec![]),
            (1 | 2 | 256, vec![]),
            (32, vec!["thermal"]),
            (64 | 8, vec!["thermal", "hardware"]),
            (4 | 128 | 16, vec!["power", "power_brake", "sync_boost"]),
        ] {
            assert_eq!(throttled(ThrottleReasons::from_bits_truncate(bits)), told, "{bits}");
        }
    }
}
