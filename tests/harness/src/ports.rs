//! Ports on 127.0.0.1 that nobody else who asks here gets: not another test, not another process, not while a server that
//! was killed on purpose is down.
//!
//! They lie below the kernel's range for outgoing connections: a client that keeps dialling a dead server's port could
//! otherwise connect to itself and hold the port when the server comes back.
//!
//! Looking whether a port is free is not enough: between the look and the server's own bind, or between a server's death
//! and its restart, another process finds the same port free. So ports are given out from blocks, and a block is this
//! process's as long as it holds the lock of the block's file; the kernel lets go of it when the process ends, however
//! it ends.
//!
//! Whether a stranger listens there is asked by connecting, not by binding: a listener that is open for a moment while another
//! thread starts a child is inherited by it, and stays open until that child has come to its `exec`.

use std::{
    fs::{File, TryLockError},
    io::ErrorKind,
    net::TcpStream,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use crate::{Error, Result};

const FIRST: u16 = 20_000;
const BLOCK: u16 = 40;
const BLOCKS: u16 = 300;

/// Ports of this process.
static OWN: Mutex<Ports> = Mutex::new(Ports::new(FIRST));

#[derive(Debug)]
struct Ports {
    first: u16,
    /// Held until the process ends.
    locks: Vec<File>,
    left: Vec<u16>,
}

impl Ports {
    const fn new(first: u16) -> Self {
        Self { first, locks: Vec::new(), left: Vec::new() }
    }

    fn take(&mut self, folder: &Path) -> Result<u16> {
        loop {
            while let Some(port) = self.left.pop() {
                // A stranger, or a child that outlived its test.
                match TcpStream::connect(("127.0.0.1", port)) {
                    Err(error) if error.kind() == ErrorKind::ConnectionRefused => return Ok(port),
                    Ok(_) => {}
                    Err(error) => return Err(Error::io(format!("a look at port {port}"))(error)),
                }
            }
            self.next_block(folder)?;
        }
    }

    fn next_block(&mut self, folder: &Path) -> Result<()> {
        std::fs::create_dir_all(folder).map_err(Error::io(format!("{}", folder.display())))?;
        for block in 0..BLOCKS {
            let path = folder.join(block.to_string());
            let file = File::options().create(true).write(true).truncate(false).open(&path);
            let file = file.map_err(Error::io(format!("{}", path.display())))?;
            match file.try_lock() {
                Ok(()) => {
                    let first = self.first + block * BLOCK;
                    self.locks.push(file);
                    self.left.extend((first..first + BLOCK).rev());
                    return Ok(());
                }
                Err(TryLockError::WouldBlock) => {}
                Err(TryLockError::Error(error)) => return Err(Error::io(format!("lock of {}", path.display()))(error)),
            }
        }
        Err(Error::Wrong(format!("all {BLOCKS} files in {} are locked", folder.display())))
    }
}

impl Drop for Ports {
    fn drop(&mut self) {
        for lock in &self.locks {
            // Closing them would not do while a child that is being started has them too. Nothing can be done about an error.
            let _ = lock.unlock();
        }
    }
}

/// The same for all processes of a user.
fn folder() -> PathBuf {
    std::env::temp_dir().join(format!("voxfleet-ports-{}", rustix::process::getuid().as_raw()))
}

/// A port nobody listens on, given out once; it stays this process's until that ends.
pub fn free_port() -> Result<u16> {
    OWN.lock().unwrap_or_else(PoisonError::into_inner).take(&folder())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Apart from those that are given out.
    const ASIDE: u16 = FIRST + BLOCK * BLOCKS;

    #[test]
    fn of_two_that_ask_each_gets_its_own() -> Result<()> {
        let folder = tempfile::tempdir().map_err(Error::io("folder"))?;
        let mut one = Ports::new(ASIDE);
        let mut other = Ports::new(ASIDE);
        let mut given = std::collections::BTreeSet::new();
        // More than a block each.
        for _ in 0..=BLOCK {
            assert!(given.insert(one.take(folder.path())?), "{given:?}");
            assert!(given.insert(other.take(folder.path())?), "{given:?}");
        }
        Ok(())
    }

    #[test]
    fn a_port_that_is_taken_is_passed_over_and_who_ends_gives_back() -> Result<()> {
        let folder = tempfile::tempdir().map_err(Error::io("folder"))?;
        let mut one = Ports::new(ASIDE + 5 * BLOCK);
        let listener = std::net::TcpListener::bind("127.0.0.1:0").map_err(Error::io("listener"))?;
        let taken = listener.local_addr().map_err(Error::io("address"))?.port();
        one.left.push(taken);
        let first = one.take(folder.path())?;
        assert_ne!(first, taken);
        drop(one);
        let mut other = Ports::new(ASIDE + 5 * BLOCK);
        assert_eq!(other.take(folder.path())?, first);
        Ok(())
    }
}
