//! Small disks, to be filled: a file system in memory, mounted where a node
//! keeps its files. Needs the right to mount; tests say so when they go without.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// What is written at a time to fill a disk; the last piece is cut to fit.
const PIECE_BYTES: usize = 1024 * 1024;

/// A file system of its own. Unmounted when dropped.
#[derive(Debug)]
pub struct SmallDisk {
    dir: PathBuf,
}

impl SmallDisk {
    /// Mounts one of `bytes` at `dir`, which must be there.
    ///
    /// # Errors
    /// What `mount` says: without privileges it cannot be had.
    pub fn mount(dir: &Path, bytes: u64) -> Result<SmallDisk, String> {
        let mount = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={bytes}"), "tmpfs"])
            .arg(dir)
            .stdin(Stdio::null())
            .output()
            .map_err(|error| format!("mount: {error}"))?;
        if !mount.status.success() {
            return Err(String::from_utf8_lossy(&mount.stderr).trim().to_owned());
        }
        Ok(SmallDisk {
            dir: dir.to_owned(),
        })
    }

    /// Takes all the room that is left.
    pub fn fill(&self) {
        let mut file = File::create(self.ballast()).expect("a file");
        let mut piece = &[1; PIECE_BYTES][..];
        while !piece.is_empty() {
            match file.write(piece) {
                Ok(0) | Err(_) => piece = &piece[..piece.len() / 2],
                Ok(_) => {}
            }
        }
    }

    /// Gives it back.
    pub fn relieve(&self) {
        let _ = fs::remove_file(self.ballast());
    }

    fn ballast(&self) -> PathBuf {
        self.dir.join("ballast")
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily: a process that was just killed may hold it for a moment.
        let _ = Command::new("umount").arg("-l").arg(&self.dir).status();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_takes_nothing_until_it_is_relieved() {
        let dir = tempfile::tempdir().unwrap();
        let disk = match SmallDisk::mount(dir.path(), 4 * 1024 * 1024) {
            Ok(disk) => disk,
            Err(reason) => return eprintln!("NOT TESTED, no disk can be mounted: {reason}"),
        };
        let file = dir.path().join("file");
        fs::write(&file, [0; 100_000]).unwrap();
        disk.fill();
        assert!(fs::write(dir.path().join("more"), [0; 10_000]).is_err());
        disk.relieve();
        fs::write(dir.path().join("more"), [0; 10_000]).unwrap();
        assert_eq!(fs::read(&file).unwrap().len(), 100_000);
    }
}
