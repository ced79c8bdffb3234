//! The database of the disk store: rows of slices, manifests, the region table.
//!
//! It is a line of *epochs*, each a small fjall database of its own. Writes go
//! to the newest; reads ask the newest first. When the newest has taken its
//! share, a new one is begun, what is worth keeping of the oldest is carried
//! over in small steps, and the oldest is removed as a directory. So:
//!
//! - disk use is bounded whatever fjall does: its journals (64 MB each before
//!   it would turn them), deleted rows and compactions die with their epoch;
//! - nothing is ever deleted row by row, and manifests and small slices leave
//!   in the order in which they came, unless they are asked for;
//! - an epoch that fails (a full disk poisons fjall for good) is read on while
//!   a new one takes the writes, and one that is damaged is set aside alone.
//!
//! A row that says "forgotten" hides older epochs.
//! Not here: what a row looks like (`row`), and the slices' bytes (`region`).

use std::io::ErrorKind;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use arc_swap::ArcSwap;
use bytes::Bytes;
use fjall::{Database, Keyspace, KeyspaceCreateOptions, UserValue};
use pingora_slice_cluster::SliceId;
use rustix::io::Errno;
use tracing::{info, warn};

use super::region::{Regions, disk_bytes, number_of};
use super::row::{FORGOTTEN, MANIFEST, SliceRow, decode_slice, encode_slice, slice_key};

/// fjall's block cache for each epoch: index blocks only; memory belongs to the memory store.
const CACHE_BYTES: u64 = 8 << 20;
/// fjall's least bound on journals; an epoch is removed before it matters.
const JOURNALS_BYTES_MAX: u64 = 64 << 20;
/// A memtable is written out at this size at most.
const MEMTABLE_BYTES_MAX: u64 = 16 << 20;
/// Memtables not yet written out, in units of one, before writes are refused.
const MEMTABLES_MAX: u64 = 4;
/// An epoch takes the index's share divided by this. On disk an epoch is at
/// most three times what was put into it (journal, tables, and a compaction
/// under way); there are two, and a third that takes half an epoch by carrying.
const EPOCHS_IN_SHARE: u64 = 7;
/// Rows carried over between two jobs of the writer.
const CARRY_ROWS: usize = 128;
/// Bytes a row costs besides key and value, in journal and table.
const ROW_OVERHEAD_BYTES: u64 = 40;

/// Key of the row in `regions` that makes an epoch complete: the size of a region.
const REGION_BYTES_KEY: [u8; 1] = [0];

/// How the name of a directory ends that is being removed.
const GONE: &str = "gone";

/// What a row belongs to.
#[derive(Clone, Copy)]
enum Table {
    /// Slices: where they are, or the small ones themselves.
    Slices,
    /// Manifests.
    Manifests,
}

/// Why a row could not be written.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// The share is used up for the moment, or fjall is behind: drop the row.
    #[error("the index has no room")]
    NoRoom,
    /// The newest epoch takes no more writes, or there is none: begin another.
    #[error("{0}")]
    Broken(#[from] fjall::Error),
}

/// A row found, and whether only an older epoch has it.
pub struct Found<T> {
    /// The row.
    pub row: T,
    /// Ask the writer to renew it, or it will leave with its epoch.
    pub is_old: bool,
}

/// The reading side, shared.
pub struct Index {
    epochs: ArcSwap<Vec<Arc<Epoch>>>,
    disk_bytes: AtomicU64,
}

impl Index {
    /// What is known of a slice. `Err`: the index is damaged there.
    pub fn slice(&self, id: SliceId) -> Result<Option<Found<SliceRow>>, fjall::Error> {
        let Some(found) = self.find(Table::Slices, &slice_key(id))? else {
            return Ok(None);
        };
        Ok(decode_slice(&found.row).map(|row| Found {
            row,
            is_old: found.is_old,
        }))
    }

    /// The manifest of an object. `Err`: the index is damaged there.
    pub fn manifest(&self, key: u128) -> Result<Option<Found<Bytes>>, fjall::Error> {
        let Some(found) = self.find(Table::Manifests, &key.to_be_bytes())? else {
            return Ok(None);
        };
        // Copied, so that a small manifest does not hold a block of the database in memory.
        let manifest = found
            .row
            .strip_prefix(&[MANIFEST])
            .map(Bytes::copy_from_slice);
        Ok(manifest.map(|row| Found {
            row,
            is_old: found.is_old,
        }))
    }

    /// Bytes on disk when last looked at.
    pub fn disk_bytes(&self) -> u64 {
        self.disk_bytes.load(Ordering::Relaxed)
    }

    fn find(&self, table: Table, key: &[u8]) -> Result<Option<Found<UserValue>>, fjall::Error> {
        for (age, epoch) in self.epochs.load().iter().enumerate() {
            if let Some(row) = epoch.keyspace(table).get(key)? {
                return Ok((row.first() != Some(&FORGOTTEN)).then_some(Found {
                    row,
                    is_old: age > 0,
                }));
            }
        }
        Ok(None)
    }
}

/// One fjall database. Fields drop in this order: the directory goes after the database is closed.
struct Epoch {
    slices: Keyspace,
    manifests: Keyspace,
    regions: Keyspace,
    db: Database,
    dir: EpochDir,
}

struct EpochDir {
    path: PathBuf,
    is_doomed: AtomicBool,
}

impl Drop for EpochDir {
    fn drop(&mut self) {
        if self.is_doomed.load(Ordering::Relaxed) {
            remove_dir(&self.path);
        }
    }
}

impl Epoch {
    fn open(path: &Path) -> Result<Epoch, fjall::Error> {
        let is_new = !path.exists();
        let db = Database::builder(path)
            .worker_threads(2)
            .cache_size(CACHE_BYTES)
            .journal_compression(fjall::CompressionType::None)
            .max_journaling_size(JOURNALS_BYTES_MAX)
            .open()?;
        if is_new {
            cut_journal(path)?;
        }
        // fjall's own rotation can deadlock: `IndexWriter::rotate` does it.
        let options = || KeyspaceCreateOptions::default().max_memtable_size(u64::MAX);
        let dir = EpochDir {
            path: path.to_owned(),
            is_doomed: AtomicBool::new(false),
        };
        Ok(Epoch {
            slices: db.keyspace("slices", options)?,
            manifests: db.keyspace("manifests", options)?,
            regions: db.keyspace("regions", options)?,
            db,
            dir,
        })
    }

    fn keyspace(&self, table: Table) -> &Keyspace {
        match table {
            Table::Slices => &self.slices,
            Table::Manifests => &self.manifests,
        }
    }

    fn keyspaces(&self) -> [&Keyspace; 3] {
        [&self.slices, &self.manifests, &self.regions]
    }

    /// Empties the journal of a sealed epoch once all is in tables: it would
    /// only be read again at every start. Whether that is done.
    fn drop_journal(&self) -> bool {
        self.keyspaces()
            .iter()
            .all(|keyspace| keyspace.sealed_memtable_count() == 0)
            && cut_journal(&self.dir.path).is_ok()
    }

    /// `None`: it was not made to the end.
    fn region_bytes(&self) -> Result<Option<u32>, fjall::Error> {
        let row = self.regions.get(REGION_BYTES_KEY)?;
        Ok(row.and_then(|row| Some(u32::from_be_bytes(row.as_ref().try_into().ok()?))))
    }

    fn region_rows(&self) -> Result<Vec<(u32, u64)>, fjall::Error> {
        let mut rows = Vec::new();
        for guard in self.regions.iter() {
            let (key, row) = guard.into_inner()?;
            if let (Ok(region), Ok(generation)) = (key.as_ref().try_into(), row.as_ref().try_into())
            {
                rows.push((u32::from_be_bytes(region), u64::from_be_bytes(generation)));
            }
        }
        Ok(rows)
    }
}

/// The writing side: one, on the writer's thread.
pub struct IndexWriter {
    index: Arc<Index>,
    dir: PathBuf,
    share_bytes: u64,
    /// Number of the next epoch.
    next: u64,
    /// Whether a failure began the newest epoch.
    is_mended: bool,
    /// Put into it so far, bytes.
    written: u64,
    /// Of these, since the memtables were last rotated.
    unrotated: u64,
    /// What may still be written before the disk use is looked at again.
    room: u64,
    /// The oldest epoch's rows, being carried over.
    carry: Option<Carry>,
    /// The epoch evicted last: its space is free once its last reader is done.
    leaving: Weak<Epoch>,
    /// Epochs that take no more writes, but whose journals are still there.
    sealed: Vec<Weak<Epoch>>,
}

struct Carry {
    rows: std::iter::Chain<Rows, Rows>,
    bytes_left: u64,
}

type Rows = std::iter::Zip<std::iter::Repeat<Table>, fjall::Iter>;

impl IndexWriter {
    /// Opens what is in `dir`, as far as it can be opened. Epochs that are
    /// damaged or not complete are set aside, and the oldest are removed until
    /// all fit in `share_bytes`. There may be none left: then `begin` one.
    ///
    /// # Errors
    /// The newest cannot be opened now, and may be later: without it the regions'
    /// files would be taken for somebody else's.
    pub fn open(dir: PathBuf, share_bytes: u64) -> Result<IndexWriter, fjall::Error> {
        let index = Arc::new(Index {
            epochs: ArcSwap::default(),
            disk_bytes: AtomicU64::new(0),
        });
        let mut writer = IndexWriter {
            index,
            dir,
            share_bytes,
            next: 0,
            written: 0,
            is_mended: false,
            unrotated: 0,
            room: 0,
            carry: None,
            leaving: Weak::new(),
            sealed: Vec::new(),
        };
        writer.load()?;
        Ok(writer)
    }

    /// The reading side.
    pub fn index(&self) -> &Arc<Index> {
        &self.index
    }

    /// The size of a region and the region table; `None` without an epoch.
    pub fn regions(&self) -> Option<(u32, Vec<(u32, u64)>)> {
        let newest = self.newest()?;
        Some((newest.region_bytes().ok()??, newest.region_rows().ok()?))
    }

    /// Removes every epoch.
    pub fn discard(&mut self) {
        self.carry = None;
        for epoch in self.index.epochs.swap(Arc::default()).iter() {
            epoch.dir.is_doomed.store(true, Ordering::Relaxed);
        }
    }

    /// Closes the database.
    pub fn close(&mut self) {
        self.carry = None;
        self.index.epochs.store(Arc::default());
    }

    /// Begins a new epoch that takes the writes from now on.
    pub fn begin(&mut self, regions: &Regions) -> Result<(), fjall::Error> {
        let path = self.dir.join(format!("{:08}", self.next));
        let begun = Epoch::open(&path).and_then(|epoch| {
            let mut batch = epoch.db.batch();
            batch.insert(
                &epoch.regions,
                REGION_BYTES_KEY,
                regions.region_bytes().to_be_bytes(),
            );
            for (region, generation) in regions.rows() {
                batch.insert(
                    &epoch.regions,
                    region.to_be_bytes(),
                    generation.to_be_bytes(),
                );
            }
            batch.commit()?;
            Ok(epoch)
        });
        let epoch = begun.inspect_err(|_| remove_dir(&path))?;
        self.next += 1;
        self.is_mended = false;
        self.written = 0;
        self.unrotated = 0;
        if let Some(before) = self.newest() {
            self.seal(&before);
        }
        let before = self.index.epochs.load_full();
        self.index.epochs.store(Arc::new(
            std::iter::once(Arc::new(epoch))
                .chain(before.iter().cloned())
                .collect(),
        ));
        self.measure();
        Ok(())
    }

    /// Writes a slice's row.
    pub fn put_slice(&mut self, id: SliceId, row: &SliceRow) -> Result<(), WriteError> {
        self.put(Table::Slices, &slice_key(id), &encode_slice(row))
    }

    /// Forgets a slice.
    pub fn forget_slice(&mut self, id: SliceId) -> Result<(), WriteError> {
        self.put(Table::Slices, &slice_key(id), &[FORGOTTEN])
    }

    /// Writes a manifest; `None` forgets it.
    pub fn put_manifest(&mut self, key: u128, manifest: Option<&[u8]>) -> Result<(), WriteError> {
        let key = key.to_be_bytes();
        match manifest {
            Some(manifest) => self.put(Table::Manifests, &key, &[&[MANIFEST], manifest].concat()),
            None if matches!(self.index.find(Table::Manifests, &key), Ok(None)) => Ok(()),
            None => self.put(Table::Manifests, &key, &[FORGOTTEN]),
        }
    }

    /// Puts a region's generation into the table: after this its old rows are dead for good.
    pub fn put_region(&mut self, region: u32, generation: u64) -> Result<(), WriteError> {
        let newest = self.newest().ok_or(fjall::Error::Poisoned)?;
        newest
            .regions
            .insert(region.to_be_bytes(), generation.to_be_bytes())?;
        self.count(12);
        Ok(())
    }

    /// Moves a slice's row that was asked for from an older epoch to the newest.
    pub fn renew_slice(&mut self, id: SliceId) -> Result<(), WriteError> {
        self.renew(Table::Slices, &slice_key(id))
    }

    /// Moves a manifest that was asked for from an older epoch to the newest.
    pub fn renew_manifest(&mut self, key: u128) -> Result<(), WriteError> {
        self.renew(Table::Manifests, &key.to_be_bytes())
    }

    /// After a failure: makes an epoch that takes writes. Those there are stay
    /// readable, but one that was made here and failed soon is replaced, so that a
    /// disk that fails again and again does not push out everything.
    pub fn repair(&mut self, regions: &Regions) -> Result<(), fjall::Error> {
        let epochs = self.index.epochs.load_full();
        match epochs.split_first() {
            None => {
                self.load()?;
                if self
                    .newest()
                    .is_some_and(|newest| !matches!(newest.region_bytes(), Ok(Some(bytes)) if bytes == regions.region_bytes()))
                {
                    self.discard();
                }
            }
            Some((newest, rest)) if self.is_mended && self.written < self.memtable_bytes() => {
                self.carry = None;
                // What is the newest then was not made here.
                self.is_mended = false;
                newest.dir.is_doomed.store(true, Ordering::Relaxed);
                self.index.epochs.store(Arc::new(rest.to_vec()));
            }
            Some(_) => {}
        }
        drop(epochs);
        self.begin(regions)?;
        self.is_mended = true;
        Ok(())
    }

    /// What the index may still take, bytes.
    pub fn free_bytes(&self) -> u64 {
        self.share_bytes.saturating_sub(self.index.disk_bytes())
    }

    /// Free space that the next steps need, bytes: a memtable, in the journal and as a table.
    pub fn step_bytes(&self) -> u64 {
        (2 * self.memtable_bytes()).min(self.free_bytes())
    }

    /// A step of housekeeping: memtables to disk, the next epoch, a few rows
    /// carried. Cheap when there is nothing to do; `true`: there is more.
    pub fn tend(&mut self, regions: &Regions) -> Result<bool, WriteError> {
        let Some(newest) = self.newest() else {
            return Ok(false);
        };
        self.sealed
            .retain(|epoch| epoch.upgrade().is_some_and(|epoch| !epoch.drop_journal()));
        if self.unrotated >= self.memtable_bytes() && !is_behind(&newest) {
            rotate(&newest)?;
            self.unrotated = 0;
        }
        let count = self.index.epochs.load().len();
        if count > 2 {
            self.carry(regions)?;
            return Ok(!self.is_full());
        }
        if self.written >= self.epoch_bytes() {
            self.begin(regions)?;
            return Ok(true);
        }
        Ok(!self.sealed.is_empty())
    }

    /// Opens the epochs in the directory, newest first. An error: the newest of
    /// them cannot be opened now.
    fn load(&mut self) -> Result<(), fjall::Error> {
        let mut numbers: Vec<u64> = Vec::new();
        for entry in std::fs::read_dir(&self.dir).into_iter().flatten().flatten() {
            let name = PathBuf::from(entry.file_name());
            let is_set_aside = name.extension().is_some_and(|end| end == GONE);
            match name.file_stem().and_then(number_of) {
                // Set aside before, and not removed to the end.
                Some(_) if is_set_aside => drop(std::fs::remove_dir_all(entry.path())),
                Some(number) if name.extension().is_none() => numbers.push(number),
                // Somebody else's.
                _ => {}
            }
        }
        numbers.sort_unstable_by(|a, b| b.cmp(a));
        self.next = self
            .next
            .max(numbers.first().map_or(0, |newest| newest + 1));
        let mut epochs = Vec::new();
        for path in numbers
            .iter()
            .map(|number| self.dir.join(format!("{number:08}")))
        {
            // Hostile bytes may trip an assertion in fjall; that epoch is lost, not the node.
            let opened = catch_unwind(AssertUnwindSafe(|| Epoch::open(&path)));
            let opened = opened.unwrap_or(Err(fjall::Error::Unrecoverable));
            match opened.and_then(|epoch| Ok((epoch.region_bytes()?, epoch))) {
                Ok((Some(_), epoch)) => epochs.push(Arc::new(epoch)),
                Ok((None, epoch)) => epoch.dir.is_doomed.store(true, Ordering::Relaxed),
                Err(error) if is_passing(&error) && epochs.is_empty() => return Err(error),
                Err(error) if is_passing(&error) => {
                    warn!(path = %path.display(), %error, "a part of the disk store's index cannot be opened now");
                }
                Err(error) => {
                    warn!(path = %path.display(), %error, "a part of the disk store's index is damaged and was dropped");
                    remove_dir(&path);
                }
            }
        }
        self.written = epochs
            .first()
            .map_or(0, |epoch: &Arc<Epoch>| disk_bytes(&epoch.dir.path) / 2);
        for old in epochs.iter().skip(1) {
            self.seal(old);
        }
        self.index.epochs.store(Arc::new(epochs));
        while self.measure() > self.share_bytes && self.evict() {}
        Ok(())
    }

    fn renew(&mut self, table: Table, key: &[u8]) -> Result<(), WriteError> {
        match self.index.find(table, key) {
            Ok(Some(found)) if found.is_old => self.put(table, key, &found.row),
            _ => Ok(()),
        }
    }

    fn put(&mut self, table: Table, key: &[u8], row: &[u8]) -> Result<(), WriteError> {
        let newest = self.newest().ok_or(fjall::Error::Poisoned)?;
        let bytes = row_bytes(key, row);
        if self.is_full() || bytes > self.memtable_bytes() || !self.has_room(bytes) {
            return Err(WriteError::NoRoom);
        }
        newest.keyspace(table).insert(key, row)?;
        self.count(bytes);
        Ok(())
    }

    fn count(&mut self, bytes: u64) {
        self.written += bytes;
        self.unrotated += bytes;
        // Once in the journal, once in a table.
        self.room = self.room.saturating_sub(2 * bytes);
    }

    /// Whether `bytes` more keep the index within its share; evicts the oldest epoch if that is what it takes.
    fn has_room(&mut self, bytes: u64) -> bool {
        for _ in 0..2 {
            if self.room >= 2 * bytes {
                return true;
            }
            let free = self.share_bytes.saturating_sub(self.measure());
            self.room = free.min(self.memtable_bytes());
            if self.room < 2 * bytes && self.leaving.strong_count() == 0 {
                self.evict();
            }
        }
        self.room >= 2 * bytes
    }

    /// Has an epoch that takes no more writes put into its tables, which frees
    /// its memory, and later its journal. One that is broken stays as it is.
    fn seal(&mut self, epoch: &Arc<Epoch>) {
        if rotate(epoch).is_ok() {
            self.sealed.push(Arc::downgrade(epoch));
        }
    }

    /// Whether so much waits to be written out that nothing more is taken.
    fn is_full(&self) -> bool {
        self.unrotated >= MEMTABLES_MAX * self.memtable_bytes()
    }

    /// Looks at the disk.
    fn measure(&mut self) -> u64 {
        let bytes = disk_bytes(&self.dir);
        self.index.disk_bytes.store(bytes, Ordering::Relaxed);
        bytes
    }

    /// Removes the oldest epoch, unless it is the only one.
    pub fn evict(&mut self) -> bool {
        self.carry = None;
        let epochs = self.index.epochs.load_full();
        let Some((oldest, rest)) = epochs.split_last() else {
            return false;
        };
        if rest.is_empty() {
            return false;
        }
        oldest.dir.is_doomed.store(true, Ordering::Relaxed);
        self.leaving = Arc::downgrade(oldest);
        self.index.epochs.store(Arc::new(rest.to_vec()));
        true
    }

    /// Carries some rows of the oldest epoch to the newest: of slices that
    /// still lie in a region, and manifests, up to half an epoch. At the end
    /// the oldest is removed.
    fn carry(&mut self, regions: &Regions) -> Result<(), WriteError> {
        let epochs = self.index.epochs.load_full();
        let Some((oldest, newer)) = epochs.split_last() else {
            return Ok(());
        };
        let mut carry = self.carry.take().unwrap_or_else(|| Carry {
            rows: std::iter::repeat(Table::Slices)
                .zip(oldest.slices.iter())
                .chain(std::iter::repeat(Table::Manifests).zip(oldest.manifests.iter())),
            bytes_left: self.epoch_bytes() / 2,
        });
        for _ in 0..CARRY_ROWS {
            if self.is_full() {
                break;
            }
            // A damaged row ends it: what lies behind cannot be reached.
            let Some((table, Ok((key, row)))) = carry
                .rows
                .next()
                .map(|(table, guard)| (table, guard.into_inner()))
            else {
                self.end_carry(carry);
                return Ok(());
            };
            let is_wanted = match table {
                Table::Slices => matches!(decode_slice(&row),
                    Some(SliceRow::InRegion(place, _)) if regions.is_live(&place)),
                Table::Manifests => row.first() == Some(&MANIFEST),
            };
            let is_newer =
                |epoch: &Arc<Epoch>| epoch.keyspace(table).contains_key(&key).unwrap_or(true);
            if !is_wanted || newer.iter().any(is_newer) {
                continue;
            }
            let Some(left) = carry.bytes_left.checked_sub(row_bytes(&key, &row)) else {
                self.end_carry(carry);
                return Ok(());
            };
            carry.bytes_left = left;
            match self.put(table, &key, &row) {
                Ok(()) => {}
                // Either the row is too large now, or the oldest had to go at once.
                Err(WriteError::NoRoom) if self.index.epochs.load().len() == epochs.len() => {}
                Err(WriteError::NoRoom) => return Ok(()),
                Err(broken) => return Err(broken),
            }
        }
        self.carry = Some(carry);
        Ok(())
    }

    fn end_carry(&mut self, carry: Carry) {
        drop(carry);
        self.evict();
        info!("the oldest part of the disk store's index has left");
    }

    fn newest(&self) -> Option<Arc<Epoch>> {
        self.index.epochs.load().first().cloned()
    }

    fn epoch_bytes(&self) -> u64 {
        self.share_bytes / EPOCHS_IN_SHARE
    }

    fn memtable_bytes(&self) -> u64 {
        (self.epoch_bytes() / 4).min(MEMTABLE_BYTES_MAX)
    }
}

fn row_bytes(key: &[u8], row: &[u8]) -> u64 {
    (key.len() + row.len()) as u64 + ROW_OVERHEAD_BYTES
}

fn rotate(epoch: &Epoch) -> Result<(), fjall::Error> {
    for keyspace in epoch.keyspaces() {
        keyspace.rotate_memtable()?;
    }
    Ok(())
}

/// Whether fjall has not yet written out what was rotated before.
fn is_behind(epoch: &Epoch) -> bool {
    epoch
        .keyspaces()
        .iter()
        .any(|keyspace| keyspace.sealed_memtable_count() >= 2)
}

/// Whether the failure says nothing about the data.
fn is_passing(error: &fjall::Error) -> bool {
    match error {
        fjall::Error::Locked => true,
        fjall::Error::Io(error) | fjall::Error::Storage(fjall::LsmError::Io(error)) => {
            matches!(
                error.kind(),
                ErrorKind::StorageFull
                    | ErrorKind::QuotaExceeded
                    | ErrorKind::ReadOnlyFilesystem
                    | ErrorKind::PermissionDenied
                    | ErrorKind::OutOfMemory
                    | ErrorKind::WouldBlock
                    | ErrorKind::StaleNetworkFileHandle
            ) || matches!(
                Errno::from_io_error(error),
                Some(Errno::MFILE | Errno::NFILE | Errno::IO)
            )
        }
        _ => false,
    }
}

/// Empties the journals in `dir`, whose content must not be needed. fjall makes
/// a new one 64 MiB long, a hole; cut to nothing it grows as it is written, and
/// whoever adds up file sizes sees the truth.
fn cut_journal(dir: &Path) -> std::io::Result<()> {
    for file in std::fs::read_dir(dir)? {
        let path = file?.path();
        if path.extension().is_some_and(|extension| extension == "jnl") {
            std::fs::OpenOptions::new()
                .write(true)
                .open(path)?
                .set_len(0)?;
        }
    }
    Ok(())
}

/// Removes a directory so that it is never found half removed.
fn remove_dir(path: &Path) {
    let gone = path.with_extension(GONE);
    let removed = std::fs::rename(path, &gone).and_then(|()| std::fs::remove_dir_all(&gone));
    if let Err(error) = removed
        && error.kind() != ErrorKind::NotFound
    {
        warn!(path = %path.display(), %error, "cannot remove an old part of the disk store's index");
    }
}
