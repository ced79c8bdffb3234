//! The writer: one thread that takes jobs from a bounded queue, in order.
//!
//! It appends slices to the current region and then commits their rows, so a
//! row never names bytes that were not written. When a region is full it goes
//! to the next: one never used, else the oldest. That one is started over, and
//! those of its entries that were hit, or are in memory, slide to its front, up
//! to half of it; the rest are gone. Progress is certain, and what is asked for
//! stays.
//!
//! When the disk or the database fails, jobs are dropped and counted, and it
//! tries again with growing pauses until writing works; readers never wait.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use pingora_slice_cluster::SliceId;
use tokio::sync::oneshot;
use tracing::{info, warn};

use super::index::{IndexWriter, WriteError};
use super::region::{self, Head, Place};
use super::row::{INLINE_BYTES_MAX, SliceRow};
use super::store::{PROBE_FILE, REGIONS_MIN, Shared};
use crate::slice::SliceParts;

/// First and longest pause between attempts to write again.
const RETRY_MIN: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(30);
/// Pause between two steps of housekeeping when there are no jobs.
const TEND_PAUSE: Duration = Duration::from_millis(5);
/// Of a region that is started over, at most one part in this many is written again.
const KEPT_DIVISOR: u64 = 2;
/// Of the disk, what is left to others: a fiftieth, within these. A disk of 500 GB
/// keeps 8 GiB free, for a day of logs and for a Raft log.
const RESERVE_DIVISOR: u64 = 50;
const RESERVE_BYTES_MIN: u64 = 1 << 30;
const RESERVE_BYTES_MAX: u64 = 8 << 30;
/// But no more than this part of a small disk.
const RESERVE_SMALL_DIVISOR: u64 = 8;

/// Bytes that the store leaves free of a disk of `disk_bytes`.
fn reserve_bytes(disk_bytes: u64) -> u64 {
    (disk_bytes / RESERVE_DIVISOR)
        .clamp(RESERVE_BYTES_MIN, RESERVE_BYTES_MAX)
        .min(disk_bytes / RESERVE_SMALL_DIVISOR)
}

/// What the writer is asked to do.
pub enum Job {
    /// Keep a slice.
    Slice(SliceId, SliceParts),
    /// Keep or forget a manifest; the number tells it from later ones under the same key.
    Manifest(u128, Option<Bytes>, u64),
    /// The entry was found damaged.
    Forget(SliceId, Place),
    /// A small slice in an old part of the index was asked for.
    RenewSlice(SliceId),
    /// A manifest in an old part of the index was asked for.
    RenewManifest(u128),
    /// Tell when everything before is done.
    Settle(oneshot::Sender<()>),
    /// Stop, and tell when the directory is free for others.
    Stop(oneshot::Sender<()>),
}

/// Why a job could not be done.
enum Trouble {
    /// Drop it, and go on.
    NoRoom,
    /// The region files cannot be written.
    Disk(io::Error),
    /// The index cannot be written.
    Index(fjall::Error),
}

impl From<WriteError> for Trouble {
    fn from(error: WriteError) -> Self {
        match error {
            WriteError::NoRoom => Trouble::NoRoom,
            WriteError::Broken(error) => Trouble::Index(error),
        }
    }
}

impl From<io::Error> for Trouble {
    fn from(error: io::Error) -> Self {
        Trouble::Disk(error)
    }
}

/// The writer's state. Dropped, also by a panic, it closes the store.
pub struct Writer {
    shared: Arc<Shared>,
    index: IndexWriter,
    head: Option<Head>,
    /// While writing does not work: when to try again, and the pause after that.
    retry: Option<(Instant, Duration)>,
    /// Whether the index, and not a region file, was what failed.
    is_index_broken: bool,
    /// Whether it has been said that the disk is smaller than the bound.
    is_short: bool,
    /// Whether space was given up since writing failed.
    has_given: bool,
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.shared.is_writable.store(false, Ordering::Relaxed);
        self.index.close();
        self.shared.unlock();
    }
}

impl Writer {
    /// A writer that has not started. `is_index_broken`: there is no index to write to yet.
    pub fn new(shared: Arc<Shared>, index: IndexWriter, is_index_broken: bool) -> Writer {
        let mut writer = Writer {
            shared,
            index,
            head: None,
            retry: None,
            is_index_broken,
            is_short: false,
            has_given: false,
        };
        if is_index_broken {
            writer.fail(&"the index cannot be made");
        }
        writer
    }

    /// Works until told to stop, or until nobody is left who could.
    pub fn run(mut self, jobs: Receiver<Job>) {
        self.resume();
        let stopped = self.work_until_stopped(&jobs);
        drop(self);
        if let Some(stopped) = stopped {
            let _ = stopped.send(());
        }
    }

    fn work_until_stopped(&mut self, jobs: &Receiver<Job>) -> Option<oneshot::Sender<()>> {
        let mut is_busy = true;
        loop {
            let wait = match self.retry {
                Some((at, _)) => at.saturating_duration_since(Instant::now()),
                None if is_busy => TEND_PAUSE,
                None => Duration::MAX,
            };
            let job = match jobs.recv_timeout(wait) {
                Ok(Job::Stop(stopped)) => return Some(stopped),
                Ok(job) => Some(job),
                Err(RecvTimeoutError::Timeout) => None,
                Err(RecvTimeoutError::Disconnected) => return None,
            };
            if self.retry.is_some_and(|(at, _)| Instant::now() >= at) {
                self.revive();
            }
            if let Some(job) = job {
                self.work(job);
            }
            if self.retry.is_none() {
                let tended = self.index.tend(&self.shared.regions).map_err(Trouble::from);
                is_busy = matches!(tended, Ok(true));
                self.note(tended.map(drop));
            }
        }
    }

    fn work(&mut self, job: Job) {
        let may_write = self.retry.is_none() && !self.shared.is_abandoned.load(Ordering::Relaxed);
        let done = match job {
            Job::Slice(id, slice) => {
                self.shared
                    .queued_bytes
                    .fetch_sub(slice.len() as u64, Ordering::Relaxed);
                let done = if may_write {
                    self.keep(id, &slice)
                } else {
                    Err(Trouble::NoRoom)
                };
                let counter = if done.is_ok() {
                    &self.shared.writes
                } else {
                    &self.shared.dropped
                };
                counter.fetch_add(1, Ordering::Relaxed);
                self.shared
                    .is_keeping
                    .store(done.is_ok() && !self.is_short, Ordering::Relaxed);
                self.shared.pending().slices.remove(&id);
                done
            }
            Job::Manifest(key, manifest, number) => {
                let done = if may_write {
                    self.index
                        .put_manifest(key, manifest.as_deref())
                        .map_err(Trouble::from)
                } else {
                    Err(Trouble::NoRoom)
                };
                self.shared
                    .queued_bytes
                    .fetch_sub(manifest.map_or(0, |m| m.len() as u64), Ordering::Relaxed);
                self.shared.manifest_done(key, number);
                done
            }
            Job::Settle(done) => {
                let _ = done.send(());
                Ok(())
            }
            _ if !may_write => Ok(()),
            Job::Forget(id, place) => self.forget(id, place),
            Job::RenewSlice(id) => {
                let renewed = self.index.renew_slice(id).map_err(Trouble::from);
                // Its row may have been away for a moment.
                self.shared.places().keep(&id);
                renewed
            }
            Job::RenewManifest(key) => self.index.renew_manifest(key).map_err(Trouble::from),
            Job::Stop(_) => Ok(()),
        };
        if may_write {
            self.note(done);
        }
    }

    fn keep(&mut self, id: SliceId, slice: &SliceParts) -> Result<(), Trouble> {
        if self.is_kept(id) {
            return Ok(());
        }
        if slice.len() <= INLINE_BYTES_MAX {
            return Ok(self
                .index
                .put_slice(id, &SliceRow::Inline(slice.gather()))?);
        }
        while !self
            .head
            .as_ref()
            .is_some_and(|head| head.fits(slice.len() as u32))
        {
            self.next_region(slice.len() as u32)?;
        }
        self.append(id, slice)
    }

    fn append(&mut self, id: SliceId, slice: &SliceParts) -> Result<(), Trouble> {
        let Some(head) = &mut self.head else {
            return Err(Trouble::NoRoom);
        };
        let place = head.append(id, slice)?;
        Ok(self
            .index
            .put_slice(id, &SliceRow::InRegion(place, slice.disk_sums().collect()))?)
    }

    fn is_kept(&self, id: SliceId) -> bool {
        match self.shared.index.slice(id) {
            Ok(Some(found)) => match found.row {
                SliceRow::InRegion(place, _) => self.shared.regions.is_live(&place),
                SliceRow::Inline(_) => !found.is_old,
            },
            _ => false,
        }
    }

    fn forget(&mut self, id: SliceId, damaged: Place) -> Result<(), Trouble> {
        match self.shared.index.slice(id) {
            Ok(Some(found)) => match found.row {
                // Unless it has been written again since.
                SliceRow::InRegion(place, _) if place == damaged => {
                    Ok(self.index.forget_slice(id)?)
                }
                _ => Ok(()),
            },
            _ => Ok(()),
        }
    }

    /// Goes on where the writer before this one stopped: behind the last entry of the newest region.
    fn resume(&mut self) {
        let regions = &self.shared.regions;
        let Some(region) = regions.newest() else {
            return;
        };
        let Ok(file) = regions.file(region) else {
            return;
        };
        let generation = regions.generation(region);
        let mut entries = regions.entries(&file, region, generation);
        entries.by_ref().for_each(drop);
        let at = entries.at();
        self.head = Some(Head {
            region,
            generation,
            file,
            at,
            region_bytes: regions.region_bytes(),
        });
    }

    /// Takes the next region, with room for an entry of `len` bytes: one never used
    /// while the disk has room, else the oldest.
    fn next_region(&mut self, len: u32) -> Result<(), Trouble> {
        self.head = None;
        let shared = self.shared.clone();
        let regions = &shared.regions;
        let oldest = regions.oldest(|generation| generation > 0);
        let unused = regions.oldest(|generation| generation == 0);
        let (region, file) = match (unused.map(|region| (region, self.grow(region))), oldest) {
            (Some((region, Ok(file))), _) => {
                self.is_short = false;
                (region, file)
            }
            (None, Some(oldest)) => (oldest, regions.file(oldest)?),
            (Some((_, Err(error))), Some(oldest)) => {
                if !std::mem::replace(&mut self.is_short, true) {
                    warn!(dir = %shared.dir.display(), %error, "the disk is smaller than the disk store's bound; it makes do");
                }
                (oldest, regions.file(oldest)?)
            }
            (Some((_, Err(error))), None) => return Err(error.into()),
            (None, None) => return Err(Trouble::NoRoom),
        };
        let before = regions.generation(region);
        let generation = shared.next_generation();
        let own = file.try_clone()?;
        // From the commit on the old rows are dead after a crash.
        self.index.put_region(region, generation)?;
        regions.start_over(region, generation);
        self.head = Some(Head {
            region,
            generation,
            file: own,
            at: 0,
            region_bytes: regions.region_bytes(),
        });
        let kept = if before > 0 {
            self.keep_hit(&file, region, before, len)
        } else {
            Ok(())
        };
        regions.end_start_over(region);
        kept
    }

    /// The file of a region never used, unless the index could not grow then, or
    /// others on the disk would be left without room: a log, the purges.
    fn grow(&self, region: u32) -> io::Result<File> {
        let regions = &self.shared.regions;
        let region_bytes = u64::from(regions.region_bytes());
        // One that was made in vain has its space.
        let wanted = region_bytes.saturating_sub(regions.held_bytes(region));
        let disk = rustix::fs::statvfs(&self.shared.dir)?;
        let spare = reserve_bytes(disk.f_blocks * disk.f_frsize)
            .max(region_bytes.min(self.index.free_bytes()));
        if disk.f_bavail * disk.f_frsize < wanted + spare {
            return Err(io::ErrorKind::StorageFull.into());
        }
        regions.file(region)
    }

    /// Writes entries of the region's last generation again that were hit, here or
    /// in memory: what is asked for most is read there alone. Each
    /// is read before its place is written over, as entries only move forward.
    /// Room is left for an entry of `len` bytes.
    fn keep_hit(&mut self, file: &File, region: u32, before: u64, len: u32) -> Result<(), Trouble> {
        let shared = self.shared.clone();
        let regions = &shared.regions;
        let region_bytes = u64::from(regions.region_bytes());
        let kept_max = (region_bytes / KEPT_DIVISOR)
            .min(region_bytes.saturating_sub(region::entry_bytes(len)));
        for (id, place, sums) in regions.entries(file, region, before) {
            let is_wanted = regions.was_hit(&place) || shared.in_memory.has(&id);
            if !is_wanted || !self.points_to(id, &place) {
                continue;
            }
            let at = self.head.as_ref().map_or(0, |head| head.at);
            let end = u64::from(at) + region::entry_bytes(place.len);
            if end > kept_max {
                continue;
            }
            let Ok(slice) = region::read_entry(file, &place, &sums) else {
                continue;
            };
            let slice = SliceParts::from(slice);
            // Read from here until its new row is in, as its old place may be written over.
            shared.pending().slices.insert(id, slice.clone());
            regions.write_over(region, end as u32);
            let appended = self.append(id, &slice);
            // Its row may have been away for a moment.
            shared.places().keep(&id);
            shared.pending().slices.remove(&id);
            appended?;
            shared.rewritten.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }

    fn points_to(&self, id: SliceId, place: &Place) -> bool {
        match self.shared.index.slice(id) {
            Ok(Some(found)) => matches!(found.row, SliceRow::InRegion(row, _) if row == *place),
            _ => false,
        }
    }

    fn note(&mut self, done: Result<(), Trouble>) {
        match done {
            Ok(()) | Err(Trouble::NoRoom) => {}
            Err(Trouble::Disk(error)) => self.fail(&error),
            Err(Trouble::Index(error)) => {
                self.is_index_broken = true;
                self.fail(&error);
            }
        }
    }

    fn fail(&mut self, error: &dyn std::fmt::Display) {
        let pause = self
            .retry
            .map_or(RETRY_MIN, |(_, pause)| (pause * 2).min(RETRY_MAX));
        self.retry = Some((Instant::now() + pause, pause));
        self.head = None;
        if self.shared.is_writable.swap(false, Ordering::Relaxed) {
            warn!(dir = %self.shared.dir.display(), %error, "the disk store cannot be written; reading goes on, writing is tried again");
        }
    }

    fn revive(&mut self) {
        let probed = match self.probe() {
            Err(error) if error.kind() == io::ErrorKind::StorageFull && self.give_way() => {
                self.probe()
            }
            probed => probed,
        };
        match probed
            .map_err(Trouble::from)
            .and_then(|()| self.repair_index())
        {
            Ok(()) => {
                self.retry = None;
                self.is_index_broken = false;
                self.has_given = false;
                self.resume();
                self.shared.is_writable.store(true, Ordering::Relaxed);
                info!(dir = %self.shared.dir.display(), "the disk store can be written again");
            }
            Err(trouble) => self.note(Err(trouble)),
        }
    }

    fn repair_index(&mut self) -> Result<(), Trouble> {
        if self.is_index_broken {
            let repaired = self.index.repair(&self.shared.regions);
            self.shared.places().keep_any();
            repaired.map_err(Trouble::Index)?;
        }
        Ok(())
    }

    /// Frees space for the index on a full disk: the oldest region, or else
    /// the oldest epoch; once for each failure, as the space may go to others.
    fn give_way(&mut self) -> bool {
        !std::mem::replace(&mut self.has_given, true)
            && (self.shared.regions.release_oldest(REGIONS_MIN as usize) || self.index.evict())
    }

    /// Whether the disk takes a file again, as large as what is written next.
    fn probe(&self) -> io::Result<()> {
        let path = self.shared.dir.join(PROBE_FILE);
        std::fs::create_dir_all(&self.shared.dir)?;
        let probed =
            File::create(&path).and_then(|file| region::allocate(&file, self.index.step_bytes()));
        let _ = std::fs::remove_file(&path);
        probed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn others_on_the_disk_have_room_and_a_small_disk_is_used() {
        const GIB: u64 = 1 << 30;
        let cases = [
            (256 << 20, 32 << 20),
            (8 * GIB, GIB),
            (50 * GIB, GIB),
            (200 * GIB, 4 * GIB),
            (4000 * GIB, 8 * GIB),
        ];
        for (disk, reserve) in cases {
            assert_eq!(reserve_bytes(disk), reserve, "{disk}");
        }
    }
}
