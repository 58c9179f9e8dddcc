//! Whether there is memory to listen. Diarization runs on the host: what counts is the host's memory, or that of the
//! container.

use std::{fs, path::Path};

/// Why there is not; none where there is.
pub(crate) fn lacking(needs_mb: u64) -> Option<String> {
    let free_mb = free_mb()?;
    (free_mb < needs_mb).then(|| format!("{free_mb} MB of memory are left, listening to voices takes {needs_mb} MB"))
}

/// What this process may still take, in MB; none where nobody says.
pub(crate) fn free_mb() -> Option<u64> {
    available_mb(Path::new("/proc/meminfo"), Path::new("/sys/fs/cgroup"))
}

fn available_mb(meminfo: &Path, cgroup: &Path) -> Option<u64> {
    let host = fs::read_to_string(meminfo).ok().and_then(|text| {
        let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
        line.split_whitespace().next()?.parse::<u64>().ok()
    });
    let number = |name: &str| fs::read_to_string(cgroup.join(name)).ok()?.trim().parse::<u64>().ok();
    // No limit is the word `max`.
    let container = number("memory.max").zip(number("memory.current")).map(|(most, now)| most.saturating_sub(now));
    host.map(|kb| kb / 1024).into_iter().chain(container.map(|bytes| bytes >> 20)).min()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tighter_of_host_and_container_counts() {
        let dir = tempfile::tempdir().expect("folder");
        let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).expect("written");
        let left = || available_mb(&dir.path().join("meminfo"), dir.path());
        assert_eq!(left(), None);
        write("meminfo", "MemTotal: 9999999 kB\nMemAvailable:  2048000 kB\n");
        assert_eq!(left(), Some(2_000));
        write("memory.max", "max\n");
        write("memory.current", "1048576\n");
        assert_eq!(left(), Some(2_000));
        write("memory.max", "105906176\n");
        assert_eq!(left(), Some(100));
        assert!(lacking(0).is_none() && lacking(u64::MAX).is_some_and(|why| why.contains("MB of memory are left")));
    }
}
