//! The CPU as a device: its memory is the host's, its figures are those of `/proc`.

use std::{fs, path::Path};

use voxfleet_schema::device::{Device, DeviceTrouble};

use super::card::{Card, Ours, runs_an_engine};

pub(super) struct Cpu {
    name: String,
}

impl Cpu {
    pub(super) fn open() -> Self {
        let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        Self { name: cpu_name(&info).unwrap_or("cpu").to_owned() }
    }
}

impl Card for Cpu {
    fn sample(&mut self, ours: Option<Ours>) -> Result<Device, DeviceTrouble> {
        let info = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let resident = |pid: u32| resident_kb(Path::new(&format!("/proc/{pid}/status")));
        let used_kb = resident(std::process::id()) + ours.map_or(0, |ours| resident(ours.pid));
        Ok(figures(self.identity(), &info, used_kb))
    }

    fn engines_mb(&self) -> Option<u64> {
        let entries = fs::read_dir("/proc").ok()?.flatten();
        let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
        let engines = pids.filter(|pid| runs_an_engine(*pid));
        Some(engines.map(|pid| resident_kb(Path::new(&format!("/proc/{pid}/status")))).sum::<u64>() / 1024)
    }

    fn identity(&self) -> Device {
        Device { name: self.name.clone(), ..Device::default() }
    }
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

fn figures(identity: Device, meminfo: &str, used_kb: u64) -> Device {
    let mb = |field| kb_field(meminfo, field).unwrap_or(0) / 1024;
    let (total_mb, free_mb, used_mb) = (mb("MemTotal"), mb("MemAvailable"), used_kb / 1024);
    let used_by_others_mb = total_mb.saturating_sub(free_mb).saturating_sub(used_mb);
    Device { total_mb, free_mb, used_mb, used_by_others_mb, ..identity }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_come_from_proc() {
        let meminfo = "MemTotal:       16384000 kB\nMemFree:         1000 kB\nMemAvailable:    8192000 kB\n";
        let figures = figures(Device { name: "Test CPU".to_owned(), ..Device::default() }, meminfo, 2_048_000);
        assert_eq!((figures.total_mb, figures.free_mb, figures.used_mb), (16_000, 8_000, 2_000));
        assert_eq!(figures.used_by_others_mb, 6_000);
        assert_eq!(cpu_name("processor : 0\nmodel name\t: Test CPU\n"), Some("Test CPU"));
        assert_eq!(cpu_name("processor : 0\n"), None);
        assert!(resident_kb(Path::new("/proc/self/status")) > 100);
        assert_eq!(resident_kb(Path::new("/proc/none/status")), 0);
    }
}
