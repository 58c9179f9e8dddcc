//! Where the binaries are. A missing one is an error that names the command which brings it; nothing is skipped.

use std::path::{Path, PathBuf};

#[derive(Debug, Clone, thiserror::Error)]
#[error("{name} is not here (looked at {looked}); get it with: {command}")]
pub struct Missing {
    pub name: &'static str,
    pub looked: String,
    pub command: &'static str,
}

const BOOTSTRAP: &str = "sh deploy/bootstrap.sh deps";

pub fn nats_server() -> Result<PathBuf, Missing> {
    tool("nats-server")
}

/// The unmodified `nats` command.
pub fn nats_cli() -> Result<PathBuf, Missing> {
    tool("nats")
}

/// The user cache that `deploy/bootstrap.sh` fills.
pub fn cache() -> PathBuf {
    let var = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    var("VOXFLEET_CACHE")
        .or_else(|| var("XDG_CACHE_HOME").filter(|p| p.is_absolute()).map(|p| p.join("voxfleet")))
        .or_else(|| var("HOME").map(|h| h.join(".cache/voxfleet")))
        .unwrap_or_else(|| PathBuf::from(".cache/voxfleet"))
}

fn tool(name: &'static str) -> Result<PathBuf, Missing> {
    // The pinned build comes first: what is on PATH may be older than what we ask for.
    let cached = cache().join("bin").join(name);
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::iter::once(cached.clone())
        .chain(std::env::split_paths(&path).map(|dir| dir.join(name)))
        .find(|p| is_executable(p))
        .ok_or_else(|| Missing { name, looked: format!("{} and PATH", cached.display()), command: BOOTSTRAP })
}

/// The product's binary: `VOXFLEET_BIN`, or the one that was built beside the running executable.
pub fn voxfleet() -> Result<PathBuf, Missing> {
    const NAME: &str = "voxfleet";
    const BUILD: &str = "cargo build -p voxfleet";
    if let Some(path) = std::env::var_os("VOXFLEET_BIN").map(PathBuf::from) {
        return if is_executable(&path) {
            Ok(path)
        } else {
            Err(Missing { name: NAME, looked: format!("VOXFLEET_BIN={}", path.display()), command: BUILD })
        };
    }
    let me = std::env::current_exe().unwrap_or_default();
    if me.file_name().is_some_and(|n| n == NAME) {
        return Ok(me);
    }
    // A test executable lies in target/<profile>/deps, the binary one folder above.
    me.ancestors().skip(1).take(3).map(|dir| dir.join(NAME)).find(|p| is_executable(p)).ok_or_else(|| Missing {
        name: NAME,
        looked: format!("folders above {}", me.display()),
        command: BUILD,
    })
}

fn is_executable(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    path.metadata().is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
}

/// The library that makes a process's clocks lie, where it is: a package of the system, or what `deploy/bootstrap.sh` has
/// put into the cache.
pub fn faketime() -> Result<PathBuf, Missing> {
    let system = ["/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64", "/usr/lib"];
    let cached = cache().join("lib/libfaketime.so.1");
    let system = system.iter().map(|dir| Path::new(dir).join("faketime/libfaketime.so.1"));
    system.chain([cached.clone()]).find(|path| path.is_file()).ok_or_else(|| Missing {
        name: "libfaketime",
        looked: format!("{} and the system's libraries", cached.display()),
        command: BOOTSTRAP,
    })
}

/// The project's root, for test data: `VOXFLEET_ROOT`, or where this was built.
pub fn root() -> PathBuf {
    if let Some(root) = std::env::var_os("VOXFLEET_ROOT").filter(|v| !v.is_empty()) {
        return PathBuf::from(root);
    }
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.ancestors().nth(2).unwrap_or(here).to_owned()
}
