//! Disks of a test's own, mounted where a node keeps its files: small ones, to be
//! filled, and one whose writes can be held up. They need the right to mount; tests
//! say so when they go without.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use tempfile::NamedTempFile;

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
        let size = format!("size={bytes}");
        let mount = ["-t", "tmpfs", "-o", &size, "tmpfs"];
        run(Command::new("mount").args(mount).arg(dir))?;
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
        unmount(&self.dir);
    }
}

/// A file system whose writes can be made to wait, while reads go on. Unmounted when
/// dropped.
#[derive(Debug)]
pub struct SlowDisk {
    dir: PathBuf,
    _image: NamedTempFile,
}

impl SlowDisk {
    /// Mounts one of `bytes` at `dir`, which must be there.
    ///
    /// # Errors
    /// What `mkfs.ext4` or `mount` says.
    pub fn mount(dir: &Path, bytes: u64) -> Result<SlowDisk, String> {
        let image = NamedTempFile::new().map_err(|error| error.to_string())?;
        image
            .as_file()
            .set_len(bytes)
            .map_err(|error| error.to_string())?;
        run(Command::new("mkfs.ext4").arg("-q").arg(image.path()))?;
        run(Command::new("mount")
            .args(["-o", "loop"])
            .arg(image.path())
            .arg(dir))?;
        let disk = SlowDisk {
            dir: dir.to_owned(),
            _image: image,
        };
        drop(WritesHeldUp::of(&disk)?);
        Ok(disk)
    }

    /// Whoever writes to it waits until what is returned is dropped.
    pub fn hold_up_writes(&self) -> WritesHeldUp<'_> {
        WritesHeldUp::of(self).expect("as when it was mounted")
    }
}

impl Drop for SlowDisk {
    fn drop(&mut self) {
        unmount(&self.dir);
    }
}

/// See [`SlowDisk::hold_up_writes`].
pub struct WritesHeldUp<'a> {
    /// Ends them once its input ends: also where this process is killed, whose
    /// writing children nobody else could end.
    thaw: Child,
    _disk: &'a SlowDisk,
}

impl WritesHeldUp<'_> {
    fn of(disk: &SlowDisk) -> Result<WritesHeldUp<'_>, String> {
        let thaw = Command::new("sh")
            .args(["-c", r#"cat; fsfreeze --unfreeze "$1""#, "sh"])
            .arg(&disk.dir)
            .stdin(Stdio::piped())
            // Ctrl-C is not for it.
            .process_group(0)
            .spawn();
        let thaw = thaw.map_err(|error| format!("sh: {error}"))?;
        let held_up = WritesHeldUp { thaw, _disk: disk };
        run(Command::new("fsfreeze").arg("--freeze").arg(&disk.dir))?;
        Ok(held_up)
    }
}

impl Drop for WritesHeldUp<'_> {
    fn drop(&mut self) {
        drop(self.thaw.stdin.take());
        let _ = self.thaw.wait();
    }
}

fn run(command: &mut Command) -> Result<(), String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let done = command.stdin(Stdio::null()).output();
    let done = done.map_err(|error| format!("{name}: {error}"))?;
    match done.status.success() {
        true => Ok(()),
        false => Err(String::from_utf8_lossy(&done.stderr).trim().to_owned()),
    }
}

/// Lazily: a process that was just killed may hold it for a moment.
fn unmount(dir: &Path) {
    let _ = Command::new("umount").arg("-l").arg(dir).status();
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
