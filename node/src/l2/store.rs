//! The store once it is open: its files, its readers, and the queue before its
//! writer.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fs::File;
use std::io::{ErrorKind, Write as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use pingora_slice_cluster::SliceId;
use rustix::fs::FlockOperation;
use rustix::io::Errno;
use tokio::sync::oneshot;
use tracing::warn;

use super::index::{Index, IndexWriter};
use super::places::Places;
use super::reads::Reads;
use super::region::{Place, REGION_BYTES_MAX, ReadError, Regions, entry_bytes};
use super::row::{INLINE_BYTES_MAX, SliceRow};
use super::writer::{Job, Writer};
use super::{InMemory, L2Config, L2Error, L2Read, L2Stats, Life};
use crate::slice::{Slice, SliceParts};

/// The smallest bound that leaves room for an index and a few regions.
pub const L2_BYTES_MIN: u64 = 16 << 20;
/// Regions are made so that there are this many, within the sizes below.
const REGIONS_WANTED: u64 = 32;
/// Fewer regions than this evict too much at once.
pub(super) const REGIONS_MIN: u64 = 3;
/// The largest slice (10 MiB) should fit in a region, where the bound allows it.
const REGION_BYTES_WANTED_MIN: u64 = 12 << 20;
/// Share of the index: a tenth, or more in a small store.
const INDEX_DIVISOR: u64 = 10;
/// In a small store a quarter goes to the index, up to this.
const INDEX_SMALL_BYTES_MAX: u64 = 256 << 20;
/// Directories, the lock, and what a file system adds to each region file.
pub(super) const SLACK_BYTES: u64 = 256 << 10;
pub(super) const REGION_SLACK_BYTES: u64 = 8 << 10;

/// Held by the process that has the store.
const LOCK_FILE: &str = "lock";
/// Says which [`Life`] the store is of.
const LIFE_FILE: &str = "life";
/// Made and removed to see whether the disk takes files.
pub(super) const PROBE_FILE: &str = "probe";

/// Jobs that wait for the writer at most.
const QUEUE_JOBS_MAX: usize = 4096;
/// Bytes that wait for the writer at most: 30 ms of a disk that writes 1 GiB/s.
pub const QUEUE_BYTES_MAX: u64 = 32 << 20;
/// Bytes read at most where nothing may wait: as long as a large write to a socket.
const NOW_BYTES_MAX: u32 = 1024 * 1024;
/// How long `stop` lets the writer work on what is queued, and then on closing.
const STOP_TRY: Duration = Duration::from_secs(10);
/// Longest that stopping takes: once to write what is queued, once without.
pub const STOP_MAX: Duration = STOP_TRY.saturating_mul(2);

/// An open store. Cheap to clone.
#[derive(Clone)]
pub(super) struct Store {
    pub(super) shared: Arc<Shared>,
    jobs: SyncSender<Job>,
    reads: Reads,
}

/// What readers and the writer share.
pub(super) struct Shared {
    pub(super) dir: PathBuf,
    pub(super) lock: Mutex<Option<File>>,
    pub(super) regions: Regions,
    pub(super) index: Arc<Index>,
    pub(super) in_memory: InMemory,
    pub(super) generation_last: AtomicU64,
    pub(super) pending: Mutex<Pending>,
    places: Mutex<Places>,
    pub(super) queued_bytes: AtomicU64,
    pub(super) is_writable: AtomicBool,
    /// Whether the last slice was written, and the disk is as large as its bound.
    pub(super) is_keeping: AtomicBool,
    /// Set when `stop` has waited long enough: what is queued is dropped.
    pub(super) is_abandoned: AtomicBool,
    pub(super) writes: AtomicU64,
    pub(super) rewritten: AtomicU64,
    pub(super) dropped: AtomicU64,
    pub(super) damaged: AtomicU64,
    pub(super) unreadable: AtomicU64,
}

/// What is on its way to the writer: at most what fits its queue.
#[derive(Default)]
pub(super) struct Pending {
    pub(super) number: u64,
    pub(super) manifests: HashMap<u128, (u64, Option<Bytes>)>,
    pub(super) slices: HashMap<SliceId, SliceParts>,
}

impl Store {
    /// Opens the store, or makes it. What is torn or damaged is dropped; a store
    /// that cannot be opened is set aside, and an empty one made.
    ///
    /// # Errors
    /// The directory cannot be used at all, or belongs to another process, or
    /// the bound is below [`L2_BYTES_MIN`].
    pub(super) fn open(config: L2Config, in_memory: InMemory) -> Result<Store, L2Error> {
        let dir = config.dir;
        if config.bytes_max < L2_BYTES_MIN {
            let reason = format!(
                "a disk store of {} bytes is too small: l2_cache_size_bytes must be at least {L2_BYTES_MIN}",
                config.bytes_max
            );
            return Err(L2Error::Disk { path: dir, reason });
        }
        let disk_error = |error: std::io::Error| L2Error::Disk {
            path: dir.clone(),
            reason: error.to_string(),
        };
        std::fs::create_dir_all(&dir).map_err(disk_error)?;
        if let Some(other) = of_others(&dir) {
            let reason = format!(
                "is not of a disk store, and would be emptied: name another l2_cache_dir, or remove it. A disk store that lost its `lock` has it again after `touch {}`",
                dir.join(LOCK_FILE).display()
            );
            return Err(L2Error::Disk {
                path: other,
                reason,
            });
        }
        let lock = lock(&dir)?;
        let _ = std::fs::remove_file(dir.join(PROBE_FILE));
        begin_life(&dir, config.life).map_err(disk_error)?;
        std::fs::create_dir_all(dir.join("index")).map_err(disk_error)?;

        let mut layout = Layout::of(config.bytes_max, None);
        let mut index =
            IndexWriter::open(dir.join("index"), layout.index_bytes).map_err(|error| {
                L2Error::Disk {
                    path: dir.join("index"),
                    reason: error.to_string(),
                }
            })?;
        let mut known = Vec::new();
        if let Some((region_bytes, rows)) = index.regions() {
            let same = Layout::of(config.bytes_max, Some(region_bytes));
            if u64::from(same.regions) >= REGIONS_MIN.min(layout.regions.into()) {
                (layout, known) = (same, rows);
            } else {
                warn!(dir = %dir.display(), "the disk store's bound has shrunk too far for its regions; it begins empty");
                index.discard();
            }
        }
        let regions = Regions::open(
            dir.join("regions"),
            layout.region_bytes,
            layout.regions,
            &known,
        )
        .map_err(disk_error)?;
        // Without an index, entries of a lost one may still lie in the regions: numbers must not return.
        let clock = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(1, |now| now.as_micros() as u64);
        let last = known
            .iter()
            .map(|(_, generation)| *generation)
            .max()
            .unwrap_or(0)
            .max(clock);
        let is_index_broken = index.regions().is_none() && index.begin(&regions).is_err();

        let shared = Arc::new(Shared {
            dir,
            lock: Mutex::new(Some(lock)),
            regions,
            index: index.index().clone(),
            in_memory,
            generation_last: AtomicU64::new(last),
            pending: Mutex::default(),
            places: Mutex::default(),
            queued_bytes: AtomicU64::new(0),
            is_writable: AtomicBool::new(true),
            is_keeping: AtomicBool::new(true),
            is_abandoned: AtomicBool::new(false),
            writes: AtomicU64::new(0),
            rewritten: AtomicU64::new(0),
            dropped: AtomicU64::new(0),
            damaged: AtomicU64::new(0),
            unreadable: AtomicU64::new(0),
        });
        let (jobs, queue) = sync_channel(QUEUE_JOBS_MAX);
        let writer = Writer::new(shared.clone(), index, is_index_broken);
        std::thread::Builder::new()
            .name("l2-writer".into())
            .spawn(move || writer.run(queue))
            .map_err(|error| L2Error::Disk {
                path: shared.dir.clone(),
                reason: error.to_string(),
            })?;
        Ok(Store {
            shared,
            jobs,
            reads: Reads::default(),
        })
    }

    /// The whole slice, verified.
    pub(super) async fn slice(&self, id: SliceId) -> Option<Slice> {
        let kept = self.shared.places().kept(&id);
        if let Some(slice) = self.pending_slice(id) {
            return Some(slice);
        }
        if let Some(slice) = self.slice_now(id) {
            return Some(slice);
        }
        self.read_row(id, kept, move |l2, row| match row {
            SliceRow::Inline(slice) => Some(slice),
            SliceRow::InRegion(place, sums) => {
                let slice = l2.shared.regions.read_whole(&place, &sums);
                let slice = l2.checked(id, &place, slice)?;
                l2.remember(id, place, sums);
                Some(slice)
            }
        })
        .await
    }

    /// The whole slice, verified, where that needs no wait for the disk.
    pub(super) fn slice_now(&self, id: SliceId) -> Option<Slice> {
        let (place, sums) = self.shared.places().get(&id)?;
        if place.len > NOW_BYTES_MAX {
            return None;
        }
        let regions = &self.shared.regions;
        let slice = regions.read_whole_now(&place, &sums)?;
        regions.hit(&place);
        Some(slice)
    }

    /// Whether a slice is here, as far as that is known without a wait for the disk.
    pub(super) fn has(&self, id: &SliceId) -> bool {
        let place = self.shared.places().get(id);
        place.is_some_and(|(place, _)| self.shared.regions.is_live(&place))
            || self.shared.pending().slices.contains_key(id)
    }

    /// Whether a slice is here.
    pub(super) async fn holds(&self, id: SliceId) -> bool {
        let kept = self.shared.places().kept(&id);
        self.has(&id) || self.read_row(id, kept, |_, row| Some(row)).await.is_some()
    }

    pub(super) fn hangs(&self) -> bool {
        self.reads.hang()
    }

    /// Bytes `start..end` of a slice: reads and verifies only the steps touched.
    pub(super) async fn slice_range(&self, id: SliceId, start: u32, end: u32) -> Option<L2Read> {
        let kept = self.shared.places().kept(&id);
        if let Some(slice) = self.pending_parts(&id) {
            let slice_bytes = slice.len() as u32;
            let (start, end) = cut(start, end, slice_bytes);
            let bytes = slice.checked(start as usize..end as usize)?;
            return Some(L2Read { bytes, slice_bytes });
        }
        if let Some(read) = self.read_now(id, start, end) {
            return Some(read);
        }
        self.read_row(id, kept, move |l2, row| match row {
            SliceRow::Inline(slice) => {
                let slice_bytes = slice.len() as u32;
                let (start, end) = cut(start, end, slice_bytes);
                Some(L2Read {
                    bytes: slice.bytes().slice(start as usize..end as usize),
                    slice_bytes,
                })
            }
            SliceRow::InRegion(place, sums) => {
                let (start, end) = cut(start, end, place.len);
                let bytes = l2.shared.regions.read(&place, &sums, start, end);
                let bytes = l2.checked(id, &place, bytes)?;
                l2.remember(id, place, sums);
                Some(L2Read {
                    bytes,
                    slice_bytes: place.len,
                })
            }
        })
        .await
    }

    fn remember(&self, id: SliceId, place: Place, sums: Arc<[u32]>) {
        self.shared.places().insert(id, place, sums);
    }

    /// Steps that need no wait for the disk, which a hop to a thread that may
    /// wait would cost more than.
    fn read_now(&self, id: SliceId, start: u32, end: u32) -> Option<L2Read> {
        let (place, sums) = self.shared.places().get(&id)?;
        let (start, end) = cut(start, end, place.len);
        if end - start > NOW_BYTES_MAX {
            return None;
        }
        let regions = &self.shared.regions;
        let bytes = regions.read_now(&place, &sums, start, end)?;
        regions.hit(&place);
        Some(L2Read {
            bytes,
            slice_bytes: place.len,
        })
    }

    /// Keeps a slice: queued for the writer; when its queue is full, dropped and
    /// counted. Whether it is to be expected on disk.
    pub(super) fn keep_slice(&self, id: SliceId, slice: SliceParts) -> bool {
        let bytes = slice.len() as u64;
        if bytes == 0 {
            return false;
        }
        let region_bytes = u64::from(self.shared.regions.region_bytes());
        if slice.len() > INLINE_BYTES_MAX && entry_bytes(slice.len() as u32) > region_bytes {
            self.shared.dropped.fetch_add(1, Ordering::Relaxed);
            return false;
        }
        // In the map before the queue: the writer takes it out once written.
        if let Entry::Vacant(place) = self.shared.pending().slices.entry(id) {
            place.insert(slice.clone());
        } else {
            // The one that waits will do, if it comes so far.
            return false;
        }
        self.shared.places().keep(&id);
        if !self.reserve(bytes) || !self.queue(Job::Slice(id, slice)) {
            self.shared.pending().slices.remove(&id);
            self.shared.queued_bytes.fetch_sub(bytes, Ordering::Relaxed);
            self.shared.dropped.fetch_add(1, Ordering::Relaxed);
            return false;
        }
        self.shared.is_keeping.load(Ordering::Relaxed)
    }

    /// The manifest (encoded) kept under `key`.
    pub(super) async fn manifest(&self, key: u128) -> Option<Bytes> {
        if let Some((_, manifest)) = self.shared.pending().manifests.get(&key) {
            return manifest.clone();
        }
        self.read(move |l2| {
            let found = l2.intact(l2.shared.index.manifest(key))??;
            if found.is_old {
                l2.queue(Job::RenewManifest(key));
            }
            Some(found.row)
        })
        .await
    }

    /// Keeps a manifest, replacing the one under `key`. When the writer's
    /// queue is full it is dropped, and the one before stays.
    pub(super) fn keep_manifest(&self, key: u128, manifest: Bytes) {
        self.queue_manifest(key, Some(manifest));
    }

    /// Forgets the manifest under `key`. When the writer's queue is full it
    /// stays: whether a manifest may be used is decided by its stamp.
    pub(super) fn drop_manifest(&self, key: u128) {
        self.queue_manifest(key, None);
    }

    /// Waits until everything queued before this call is on disk or dropped.
    pub(super) async fn settled(&self) {
        let (done, settled) = oneshot::channel();
        self.queue_surely(Job::Settle(done)).await;
        let _ = settled.await;
    }

    /// What it holds and has done, for the metrics.
    pub(super) fn stats(&self) -> L2Stats {
        let shared = &self.shared;
        L2Stats {
            bytes: shared.regions.disk_bytes() + shared.index.disk_bytes(),
            writes: shared.writes.load(Ordering::Relaxed),
            rewritten: shared.rewritten.load(Ordering::Relaxed),
            dropped: shared.dropped.load(Ordering::Relaxed),
            damaged: shared.damaged.load(Ordering::Relaxed),
            hung: self.reads.given_up(),
            unreadable: shared.unreadable.load(Ordering::Relaxed),
            writable: shared.is_writable.load(Ordering::Relaxed),
        }
    }

    /// Stops the writer after what is queued; then closes the index. What is
    /// not written after ten seconds is dropped.
    pub(super) async fn stop(&self) {
        let (done, mut stopped) = oneshot::channel();
        let stopping = async {
            self.queue_surely(Job::Stop(done)).await;
            let _ = (&mut stopped).await;
        };
        tokio::pin!(stopping);
        if tokio::time::timeout(STOP_TRY, &mut stopping).await.is_err() {
            self.shared.is_abandoned.store(true, Ordering::Relaxed);
            let _ = tokio::time::timeout(STOP_TRY, stopping).await;
        }
    }

    /// Runs `read` where it may wait for the disk; nothing is found where that hangs.
    async fn read<T: Send + 'static>(
        &self,
        read: impl FnOnce(&Store) -> Option<T> + Send + 'static,
    ) -> Option<T> {
        let l2 = self.clone();
        self.reads.run(move || read(&l2)).await
    }

    /// The same of a slice's row, unless it is known that there is none. `kept` is
    /// for [`Places::insert_nowhere`].
    async fn read_row<T: Send + 'static>(
        &self,
        id: SliceId,
        kept: u32,
        read: impl FnOnce(&Store, SliceRow) -> Option<T> + Send + 'static,
    ) -> Option<T> {
        if self.shared.places().is_nowhere(&id) {
            return None;
        }
        self.read(move |l2| read(l2, l2.row(id, kept)?)).await
    }

    fn row(&self, id: SliceId, kept: u32) -> Option<SliceRow> {
        let Some(found) = self.intact(self.shared.index.slice(id))? else {
            self.shared.places().insert_nowhere(id, kept);
            return None;
        };
        match &found.row {
            SliceRow::InRegion(place, _) if !self.shared.regions.is_live(place) => return None,
            SliceRow::Inline(_) if found.is_old => drop(self.queue(Job::RenewSlice(id))),
            _ => {}
        }
        Some(found.row)
    }

    /// What was read of an entry; one that is damaged is forgotten, and one that
    /// cannot be read now is not.
    fn checked<T>(&self, id: SliceId, place: &Place, read: Result<T, ReadError>) -> Option<T> {
        match read {
            Ok(read) => {
                self.shared.regions.hit(place);
                Some(read)
            }
            Err(ReadError::Evicted) => None,
            Err(ReadError::Unreadable) => {
                self.shared.unreadable.fetch_add(1, Ordering::Relaxed);
                None
            }
            Err(ReadError::Damaged) => {
                self.shared.damaged.fetch_add(1, Ordering::Relaxed);
                self.shared.places().remove(&id);
                self.queue(Job::Forget(id, *place));
                None
            }
        }
    }

    /// What the index found; counts it when the index itself is damaged there.
    fn intact<T>(&self, found: Result<T, fjall::Error>) -> Option<T> {
        if found.is_err() {
            self.shared.damaged.fetch_add(1, Ordering::Relaxed);
        }
        found.ok()
    }

    fn pending_slice(&self, id: SliceId) -> Option<Slice> {
        let slice = self.pending_parts(&id)?.gather();
        slice.is_intact_in(0..slice.len()).then_some(slice)
    }

    fn pending_parts(&self, id: &SliceId) -> Option<SliceParts> {
        self.shared.pending().slices.get(id).cloned()
    }

    fn queue_manifest(&self, key: u128, manifest: Option<Bytes>) {
        let bytes = manifest
            .as_ref()
            .map_or(0, |manifest| manifest.len() as u64);
        let is_reserved = self.reserve(bytes);
        // Under the lock, so that the queue has the same order as the numbers.
        let mut pending = self.shared.pending();
        pending.number += 1;
        let number = pending.number;
        if is_reserved && self.queue(Job::Manifest(key, manifest.clone(), number)) {
            pending.manifests.insert(key, (number, manifest));
        } else {
            drop(pending);
            self.shared.queued_bytes.fetch_sub(bytes, Ordering::Relaxed);
            self.shared.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Counts `bytes` as queued, also when that exceeds the bound: then `false`.
    fn reserve(&self, bytes: u64) -> bool {
        let before = self.shared.queued_bytes.fetch_add(bytes, Ordering::Relaxed);
        before + bytes <= QUEUE_BYTES_MAX
    }

    pub(super) fn queue(&self, job: Job) -> bool {
        match self.jobs.try_send(job) {
            Ok(()) => true,
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => false,
        }
    }

    /// Queues a job that must not be dropped, waiting for room.
    async fn queue_surely(&self, job: Job) {
        let jobs = self.jobs.clone();
        let _ = tokio::task::spawn_blocking(move || jobs.send(job)).await;
    }
}

impl Shared {
    pub(super) fn pending(&self) -> std::sync::MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn places(&self) -> std::sync::MutexGuard<'_, Places> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The manifest with this number is in the index, or was dropped.
    pub(super) fn manifest_done(&self, key: u128, number: u64) {
        let mut pending = self.pending();
        if pending
            .manifests
            .get(&key)
            .is_some_and(|(pending, _)| *pending == number)
        {
            pending.manifests.remove(&key);
        }
    }

    pub(super) fn next_generation(&self) -> u64 {
        self.generation_last.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Lets another process have the directory.
    pub(super) fn unlock(&self) {
        self.lock
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
    }
}

/// How the bound is divided.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layout {
    pub(super) index_bytes: u64,
    pub(super) region_bytes: u32,
    pub(super) regions: u32,
}

impl Layout {
    /// The division of `bytes_max`; with regions of the size that the store has already.
    pub(super) fn of(bytes_max: u64, region_bytes: Option<u32>) -> Layout {
        let index_bytes =
            (bytes_max / INDEX_DIVISOR).max((bytes_max / 4).min(INDEX_SMALL_BYTES_MAX));
        let left = bytes_max.saturating_sub(index_bytes + SLACK_BYTES);
        let wanted =
            (left / REGIONS_WANTED).clamp(REGION_BYTES_WANTED_MIN, REGION_BYTES_MAX.into());
        let fitting = wanted.min(left / REGIONS_MIN - REGION_SLACK_BYTES);
        let region_bytes = region_bytes.unwrap_or(fitting as u32);
        let regions = left / (u64::from(region_bytes).max(1) + REGION_SLACK_BYTES);
        Layout {
            index_bytes,
            region_bytes,
            regions: u32::try_from(regions).unwrap_or(u32::MAX),
        }
    }
}

/// What is in the way of a store of ours where there has been none: a store has its
/// lock before it has anything else.
fn of_others(dir: &Path) -> Option<PathBuf> {
    if dir.join(LOCK_FILE).exists() {
        return None;
    }
    let ours = ["index", "regions"].map(|name| dir.join(name));
    ours.into_iter().find(|path| path.exists())
}

/// Empties a store of another life. On disk before that life's first purge is:
/// whoever goes back to the one before finds nothing of it.
fn begin_life(dir: &Path, life: Life) -> std::io::Result<()> {
    let path = dir.join(LIFE_FILE);
    match std::fs::read_to_string(&path) {
        Ok(word) if word == life.word() => return Ok(()),
        Ok(_) => {
            warn!(dir = %dir.display(), ?life, "the disk store is of another life, whose purges are not those of this one; it begins empty");
            match std::fs::remove_dir_all(dir.join("index")) {
                Err(e) if e.kind() != ErrorKind::NotFound => return Err(e),
                Ok(()) | Err(_) => {}
            }
        }
        // A new one, or of a version that did not say.
        Err(e) if e.kind() == ErrorKind::NotFound => {}
        Err(e) => return Err(e),
    }
    write_life(dir, life.word())
}

/// See [`super::L2::end_life`].
pub(super) fn end_life(dir: &Path) -> Result<(), L2Error> {
    let path = dir.join(LIFE_FILE);
    let of_disk = |error: std::io::Error| L2Error::Disk {
        path: path.clone(),
        reason: error.to_string(),
    };
    if !path.try_exists().map_err(of_disk)? {
        return Ok(());
    }
    let _lock = lock(dir)?;
    write_life(dir, "ended\n").map_err(of_disk)
}

fn write_life(dir: &Path, word: &str) -> std::io::Result<()> {
    let new = dir.join("life.new");
    let mut file = File::create(&new)?;
    file.write_all(word.as_bytes())?;
    file.sync_all()?;
    std::fs::rename(&new, dir.join(LIFE_FILE))?;
    File::open(dir)?.sync_all()
}

fn lock(dir: &Path) -> Result<File, L2Error> {
    let path = dir.join(LOCK_FILE);
    let opened = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path);
    let file = opened.map_err(|error| L2Error::Disk {
        path: path.clone(),
        reason: error.to_string(),
    })?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(Errno::WOULDBLOCK) => Err(L2Error::Locked(dir.to_owned())),
        Err(error) => Err(L2Error::Disk {
            path,
            reason: error.to_string(),
        }),
    }
}

pub(super) fn cut(start: u32, end: u32, len: u32) -> (u32, u32) {
    let end = end.min(len);
    (start.min(end), end)
}
