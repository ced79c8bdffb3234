//! The directory that makes a node the same node after a restart: held by one
//! process at a time, and marked with a random number on first use.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

use crate::handle::StartError;
use crate::raft::store::{read_file, replace_file};

/// A data directory that this process holds until the value is dropped.
#[derive(Debug)]
pub(crate) struct DataDir {
    path: PathBuf,
    _lock: File,
}

impl DataDir {
    /// Creates the directory where it is missing, and takes it.
    ///
    /// # Errors
    /// [`StartError::Locked`] when another process holds it.
    pub(crate) fn take(path: &Path) -> Result<DataDir, StartError> {
        fs::create_dir_all(path).map_err(|e| storage(path, &e))?;
        let name = path.join("lock");
        let mut lock = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&name)
            .map_err(|e| storage(&name, &e))?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                return Err(StartError::Locked { path: path.into() });
            }
            Err(e) => return Err(storage(&name, &e.into())),
        }
        // For people who wonder who holds it.
        let _ = lock
            .set_len(0)
            .and_then(|()| writeln!(lock, "{}", std::process::id()));
        Ok(DataDir {
            path: path.into(),
            _lock: lock,
        })
    }

    /// The directory.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Counts the starts of this node, from 1; this one is on disk when it returns.
    ///
    /// # Errors
    /// [`StartError::Storage`].
    pub(crate) fn count_start(&self) -> Result<u64, StartError> {
        let name = self.path.join("starts");
        let before = match self.read(&name)? {
            Some(bytes) => u64::from_be_bytes(bytes),
            None => 0,
        };
        self.write(&name, &(before + 1).to_be_bytes())?;
        Ok(before + 1)
    }

    /// The number of the machine that this directory belongs to; `fresh` if it is new.
    ///
    /// # Errors
    /// [`StartError::Storage`].
    pub(crate) fn machine(&self, fresh: u128) -> Result<u128, StartError> {
        let name = self.path.join("machine");
        if let Some(bytes) = self.read(&name)? {
            return Ok(u128::from_be_bytes(bytes));
        }
        self.write(&name, &fresh.to_be_bytes())?;
        Ok(fresh)
    }

    fn read<const N: usize>(&self, name: &Path) -> Result<Option<[u8; N]>, StartError> {
        let Some(bytes) = read_file(name).map_err(|e| storage(name, &e))? else {
            return Ok(None);
        };
        let reason = format!("{} bytes, expected {N}", bytes.len());
        let damaged = |_| StartError::Storage {
            path: name.into(),
            reason,
        };
        bytes.try_into().map(Some).map_err(damaged)
    }

    fn write(&self, name: &Path, bytes: &[u8]) -> Result<(), StartError> {
        replace_file(name, bytes).map_err(|e| storage(name, &e))
    }
}

fn storage(path: &Path, error: &std::io::Error) -> StartError {
    StartError::Storage {
        path: path.into(),
        reason: error.to_string(),
    }
}
