//! Region files: the bytes of slices, appended in order, read by step
//! ([`DISK_STEP_BYTES`]).
//!
//! A region is one preallocated file and the unit of eviction. It has a
//! generation number, raised each time the writer starts it over; a row of the
//! index names the generation it was written under, so starting a region over
//! kills all its rows at once and deletes nothing.
//!
//! An entry is a header and the bytes of one slice. The header carries the
//! region's generation and its own checksum, so that walking a region stops
//! where the writer stopped, even if older entries lie beyond. Readers do not
//! need it: checksums stand in the index row, and only they decide whether a
//! step is good. Nothing is ever synced; what a crash tears is a miss.
//!
//! Memory: 8 bytes and one bit per [`HIT_BYTES`] for each region, which is a
//! 500,000th of the store.
//! Not here: which region to write, and what a row looks like (`index`).

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, IoSlice, IoSliceMut};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use bytes::Bytes;
use pingora_slice_cluster::crc32c::crc32c;
use pingora_slice_cluster::{Generation, SliceId};
use rustix::fs::FallocateFlags;
use rustix::io::{Errno, ReadWriteFlags};

use super::buffers::Buffers;
use crate::slice::{DISK_STEP_BYTES, Slice, SliceParts, are_intact};

/// First bytes of an entry: name and format version.
const MAGIC: [u8; 4] = *b"PSE\x02";
/// Header without sums: magic, region generation, generation, index, length, own checksum.
const HEADER_BYTES: usize = 4 + 8 + 16 + 4 + 4 + 4;
/// Sums in a header at most: an entry never exceeds the largest region.
const SUMS_MAX: usize = REGION_BYTES_MAX as usize / DISK_STEP_BYTES;
/// Largest region: with offsets and lengths of 32 bits there is room to spare.
pub const REGION_BYTES_MAX: u32 = 64 << 20;
/// One hit bit stands for this much of a region; entries that begin in the
/// same stretch share it, so small ones are at worst kept for a neighbour's sake.
const HIT_BYTES: u32 = 64 << 10;

/// Region files kept open for reading at most.
const OPEN_MAX: usize = 64;

/// Where an entry lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Number of the region.
    pub region: u32,
    /// Generation of the region when the entry was written.
    pub generation: u64,
    /// Offset of the entry's header in the region, bytes.
    pub offset: u32,
    /// Length of the slice, bytes.
    pub len: u32,
}

impl Place {
    fn bytes_offset(&self) -> u64 {
        u64::from(self.offset) + header_bytes(self.len) as u64
    }

    fn end(&self) -> u64 {
        self.bytes_offset() + u64::from(self.len)
    }
}

/// Why an entry could not be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadError {
    /// The region has been started over: an ordinary miss.
    Evicted,
    /// The bytes are not what was written, or not there: drop the row.
    Damaged,
    /// They may well be there, but cannot be read now: a miss, and the row stays.
    Unreadable,
}

impl From<io::Error> for ReadError {
    fn from(error: io::Error) -> ReadError {
        let is_of_the_disk = Errno::from_io_error(&error) == Some(Errno::IO);
        match error.kind() {
            ErrorKind::NotFound | ErrorKind::UnexpectedEof => ReadError::Damaged,
            _ if is_of_the_disk => ReadError::Damaged,
            // Too many files, too little memory, a server that is away.
            _ => ReadError::Unreadable,
        }
    }
}

/// All regions: their files, generations and hits.
#[derive(Debug)]
pub struct Regions {
    dir: PathBuf,
    region_bytes: u32,
    table: Box<[Region]>,
    disk_bytes: AtomicU64,
    /// Files kept open for what is read now.
    files: Mutex<HashMap<u32, Arc<File>>>,
    buffers: Arc<Buffers>,
}

#[derive(Debug)]
struct Region {
    /// 0: never written, or its row is lost.
    generation: AtomicU64,
    /// While it is started over: the generation before, of which entries are still
    /// being moved, and how much of that has been written over, bytes; else 0.
    before: AtomicU64,
    written_over: AtomicU32,
    hits: Box<[AtomicU64]>,
}

impl Regions {
    /// `count` regions of `region_bytes` in `dir`, with the generations that
    /// the index remembers. Files of other regions, or of larger regions, are removed: they
    /// hold nothing that could be found.
    pub fn open(
        dir: PathBuf,
        region_bytes: u32,
        count: u32,
        known: &[(u32, u64)],
    ) -> io::Result<Regions> {
        std::fs::create_dir_all(&dir)?;
        let words = region_bytes.div_ceil(HIT_BYTES).div_ceil(64);
        let table: Box<[Region]> = (0..count)
            .map(|_| Region {
                generation: AtomicU64::new(0),
                before: AtomicU64::new(0),
                written_over: AtomicU32::new(0),
                hits: (0..words).map(|_| AtomicU64::new(0)).collect(),
            })
            .collect();
        for &(region, generation) in known {
            if let Some(region) = table.get(region as usize) {
                region.generation.store(generation, Ordering::Relaxed);
            }
        }
        let mut bytes = 0;
        for file in std::fs::read_dir(&dir)? {
            let file = file?;
            // What else is there is somebody else's.
            let Some(number) = number_of(&file.file_name()) else {
                continue;
            };
            let region = usize::try_from(number).ok().and_then(|at| table.get(at));
            let is_known =
                region.is_some_and(|region| region.generation.load(Ordering::Relaxed) > 0);
            if is_known && file.metadata()?.len() <= u64::from(region_bytes) {
                bytes += disk_bytes(&file.path());
            } else {
                std::fs::remove_file(file.path())?;
            }
        }
        Ok(Regions {
            dir,
            region_bytes,
            table,
            disk_bytes: AtomicU64::new(bytes),
            files: Mutex::default(),
            buffers: Arc::default(),
        })
    }

    /// Size of each region, bytes.
    pub fn region_bytes(&self) -> u32 {
        self.region_bytes
    }

    /// Number and generation of every region that has been written.
    pub fn rows(&self) -> Vec<(u32, u64)> {
        let generations = self
            .table
            .iter()
            .map(|region| region.generation.load(Ordering::Relaxed));
        (0..)
            .zip(generations)
            .filter(|(_, generation)| *generation > 0)
            .collect()
    }

    /// Bytes the region files take on disk.
    pub fn disk_bytes(&self) -> u64 {
        self.disk_bytes.load(Ordering::Relaxed)
    }

    /// Whether the region still holds what it held when `place` was written.
    pub fn is_live(&self, place: &Place) -> bool {
        (self.generation(place.region) == place.generation || self.is_being_moved(place))
            && place.end() <= u64::from(self.region_bytes)
    }

    /// Whether the region is being started over, and this has not been written over yet.
    fn is_being_moved(&self, place: &Place) -> bool {
        self.table.get(place.region as usize).is_some_and(|region| {
            region.before.load(Ordering::Acquire) == place.generation
                && place.generation > 0
                && region.written_over.load(Ordering::Acquire) <= place.offset
        })
    }

    /// Remembers that the entry was asked for since its region was started.
    pub fn hit(&self, place: &Place) {
        if let Some((word, bit)) = self.hit_bit(place) {
            word.fetch_or(bit, Ordering::Relaxed);
        }
    }

    /// Whether [`Regions::hit`] was called since the region was started.
    pub fn was_hit(&self, place: &Place) -> bool {
        self.hit_bit(place)
            .is_some_and(|(word, bit)| word.load(Ordering::Relaxed) & bit != 0)
    }

    /// Bytes `start..end` of the entry (within it), from whole steps that match `sums`.
    pub fn read(
        &self,
        place: &Place,
        sums: &[u32],
        start: u32,
        end: u32,
    ) -> Result<Bytes, ReadError> {
        let read = || {
            let file = File::open(self.path(place.region))?;
            let read = |len, at| Ok(read_exact(&file, len, at)?.into());
            steps(place, sums, start, end, read)
        };
        self.found(place, read())
    }

    /// All bytes of the entry, if they match `sums`.
    pub fn read_whole(&self, place: &Place, sums: &[u32]) -> Result<Slice, ReadError> {
        let read = || read_entry(&File::open(self.path(place.region))?, place, sums);
        self.found(place, read())
    }

    fn found<T>(&self, place: &Place, found: Result<T, ReadError>) -> Result<T, ReadError> {
        match found {
            Err(_) if !self.is_live(place) => Err(ReadError::Evicted),
            found => found,
        }
    }

    /// As [`Regions::read`], but only what the kernel has in its page cache:
    /// never waits for the disk.
    pub fn read_now(&self, place: &Place, sums: &[u32], start: u32, end: u32) -> Option<Bytes> {
        self.now(place, |file| {
            let read = |len, at| self.read_cached(file, len, at).ok_or(ReadError::Unreadable);
            steps(place, sums, start, end, read).ok()
        })
    }

    /// As [`Regions::read_whole`], but only from the kernel's page cache.
    pub fn read_whole_now(&self, place: &Place, sums: &[u32]) -> Option<Slice> {
        self.now(place, |file| {
            let bytes = self.read_cached(file, place.len as usize, place.bytes_offset())?;
            Slice::verified(bytes, sums)
        })
    }

    fn now<T>(&self, place: &Place, read: impl FnOnce(&File) -> Option<T>) -> Option<T> {
        let found = read(&*self.open_file(place.region)?);
        if self.is_live(place) {
            return found;
        }
        // The region may have been removed, and its file with it.
        self.files().remove(&place.region);
        None
    }

    /// What the page cache has; `None` where any of it would have to be read.
    fn read_cached(&self, file: &File, len: usize, at: u64) -> Option<Bytes> {
        let mut buffer = self.buffers.take(len);
        let mut slices = [IoSliceMut::new(buffer.as_mut())];
        let read = rustix::io::preadv2(file, &mut slices, at, ReadWriteFlags::NOWAIT);
        (read == Ok(len)).then(|| Bytes::from_owner(buffer))
    }

    /// A region's file, kept open.
    fn open_file(&self, region: u32) -> Option<Arc<File>> {
        if let Some(file) = self.files().get(&region) {
            return Some(file.clone());
        }
        let file = Arc::new(File::open(self.path(region)).ok()?);
        let mut files = self.files();
        if files.len() >= OPEN_MAX {
            files.clear();
        }
        files.insert(region, file.clone());
        Some(file)
    }

    fn files(&self) -> MutexGuard<'_, HashMap<u32, Arc<File>>> {
        self.files.lock().expect("no panic while held")
    }

    /// The entries of a region written under `generation`, in order, for as long as their headers are good.
    pub fn entries<'a>(&self, file: &'a File, region: u32, generation: u64) -> Entries<'a> {
        Entries {
            file,
            region,
            generation,
            at: 0,
            region_bytes: self.region_bytes,
        }
    }

    /// The region whose generation is lowest among those that `may` be taken.
    pub fn oldest(&self, may: impl Fn(u64) -> bool) -> Option<u32> {
        let rows = (0..self.table.len() as u32).map(|region| (self.generation(region), region));
        rows.filter(|(generation, _)| may(*generation))
            .min()
            .map(|(_, region)| region)
    }

    /// The region written last.
    pub fn newest(&self) -> Option<u32> {
        let rows = (0..self.table.len() as u32).map(|region| (self.generation(region), region));
        rows.filter(|(generation, _)| *generation > 0)
            .max()
            .map(|(_, region)| region)
    }

    /// The present generation of a region; 0 when it has none.
    pub fn generation(&self, region: u32) -> u64 {
        self.table
            .get(region as usize)
            .map_or(0, |region| region.generation.load(Ordering::Acquire))
    }

    /// Begins a new generation. What it held is read on until it is written over
    /// ([`Regions::write_over`]), or all that is to be moved has been.
    pub fn start_over(&self, region: u32, generation: u64) {
        if let Some(region) = self.table.get(region as usize) {
            let before = region.generation.load(Ordering::Relaxed);
            region.written_over.store(0, Ordering::Release);
            region.before.store(before, Ordering::Release);
            region.generation.store(generation, Ordering::Release);
        }
    }

    /// Says that the region, which is being started over, is about to be written up to
    /// `end`: what lay there is dead.
    pub fn write_over(&self, region: u32, end: u32) {
        if let Some(region) = self.table.get(region as usize) {
            region.written_over.store(end, Ordering::Release);
        }
    }

    /// From here on all rows of the generations before are dead, and no entry was hit.
    pub fn end_start_over(&self, region: u32) {
        let Some(region) = self.table.get(region as usize) else {
            return;
        };
        region.before.store(0, Ordering::Release);
        for word in &region.hits {
            word.store(0, Ordering::Relaxed);
        }
    }

    /// Opens a region's file for writing, all its space allocated.
    ///
    /// # Errors
    /// No space, or the disk. A file made in vain is removed again.
    pub fn file(&self, region: u32) -> io::Result<File> {
        let path = self.path(region);
        let existed = path.exists();
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)?;
        let before = file.metadata()?.blocks() * 512;
        let allocated = allocate(&file, u64::from(self.region_bytes));
        if allocated.is_err() && !existed {
            let _ = std::fs::remove_file(&path);
        } else {
            let after = file.metadata()?.blocks() * 512;
            self.disk_bytes
                .fetch_add(after.wrapping_sub(before), Ordering::Relaxed);
        }
        allocated.map(|()| file)
    }

    /// Bytes that a region's file takes on disk already.
    pub fn held_bytes(&self, region: u32) -> u64 {
        disk_bytes(&self.path(region))
    }

    /// Removes the region whose generation is lowest, if more than `count_min` are in use.
    pub fn release_oldest(&self, count_min: usize) -> bool {
        let oldest = self.oldest(|generation| generation > 0);
        let Some(region) = oldest.filter(|_| self.rows().len() > count_min) else {
            return false;
        };
        self.start_over(region, 0);
        self.end_start_over(region);
        self.files().remove(&region);
        let bytes = disk_bytes(&self.path(region));
        let is_removed = std::fs::remove_file(self.path(region)).is_ok();
        if is_removed {
            self.disk_bytes.fetch_sub(bytes, Ordering::Relaxed);
        }
        is_removed
    }

    fn hit_bit(&self, place: &Place) -> Option<(&AtomicU64, u64)> {
        let bit = place.offset / HIT_BYTES;
        let word = self
            .table
            .get(place.region as usize)?
            .hits
            .get(bit as usize / 64)?;
        Some((word, 1 << (bit % 64)))
    }

    fn path(&self, region: u32) -> PathBuf {
        self.dir.join(format!("{region:08}"))
    }
}

/// Where the writer stands: a region, its file, and the next free byte.
#[derive(Debug)]
pub struct Head {
    /// Number of the region.
    pub region: u32,
    /// Its generation.
    pub generation: u64,
    /// The region's file.
    pub file: File,
    /// The next free byte.
    pub at: u32,
    /// Its size, bytes.
    pub region_bytes: u32,
}

impl Head {
    /// Whether an entry for a slice of `len` bytes still fits.
    pub fn fits(&self, len: u32) -> bool {
        u64::from(self.at) + entry_bytes(len) <= u64::from(self.region_bytes)
    }

    /// Appends an entry, which must fit.
    pub fn append(&mut self, id: SliceId, slice: &SliceParts) -> io::Result<Place> {
        let len = slice.len() as u32;
        debug_assert!(self.fits(len));
        let place = Place {
            region: self.region,
            generation: self.generation,
            offset: self.at,
            len,
        };
        let header = encode_header(self.generation, id, len, slice.disk_sums());
        write_all(&self.file, &header, slice.parts(), u64::from(self.at))?;
        self.at += (header.len() + slice.len()) as u32;
        Ok(place)
    }
}

/// Walks the entries of a region by their headers.
pub struct Entries<'a> {
    file: &'a File,
    region: u32,
    generation: u64,
    at: u32,
    region_bytes: u32,
}

impl Entries<'_> {
    /// The byte after the last entry returned.
    pub fn at(&self) -> u32 {
        self.at
    }
}

impl Iterator for Entries<'_> {
    type Item = (SliceId, Place, Arc<[u32]>);

    fn next(&mut self) -> Option<Self::Item> {
        let mut buffer = [0; HEADER_BYTES + 4 * SUMS_MAX];
        let wanted = buffer.len().min((self.region_bytes - self.at) as usize);
        let read = read_some(self.file, &mut buffer[..wanted], u64::from(self.at));
        let (generation, id, len, sums) = decode_header(&buffer[..read])?;
        let place = Place {
            region: self.region,
            generation,
            offset: self.at,
            len,
        };
        if generation != self.generation || place.end() > u64::from(self.region_bytes) {
            return None;
        }
        self.at = place.end() as u32;
        Some((id, place, sums))
    }
}

/// The number that a file or directory of the store is named for: eight digits, or
/// more where it needs them.
pub fn number_of(name: &OsStr) -> Option<u64> {
    let name = name.to_str()?;
    let number: u64 = name.parse().ok()?;
    (format!("{number:08}") == name).then_some(number)
}

/// Bytes that a slice of `len` bytes takes in a region.
pub fn entry_bytes(len: u32) -> u64 {
    header_bytes(len) as u64 + u64::from(len)
}

/// Bytes that the file or directory tree at `path` takes on disk, as far as it can be seen.
pub fn disk_bytes(path: &Path) -> u64 {
    let Ok(meta) = std::fs::symlink_metadata(path) else {
        return 0;
    };
    let below = if meta.is_dir() {
        std::fs::read_dir(path).ok()
    } else {
        None
    };
    let below: u64 = below
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| disk_bytes(&entry.path()))
        .sum();
    meta.blocks() * 512 + below
}

/// Makes `file` exactly `bytes` long and takes the space now, where the file system can.
pub fn allocate(file: &File, bytes: u64) -> io::Result<()> {
    if file.metadata()?.len() > bytes {
        file.set_len(bytes)?;
    }
    match rustix::fs::fallocate(file, FallocateFlags::empty(), 0, bytes) {
        Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => file.set_len(bytes),
        done => Ok(done?),
    }
}

fn header_bytes(len: u32) -> usize {
    HEADER_BYTES + 4 * (len as usize).div_ceil(DISK_STEP_BYTES)
}

fn encode_header(
    generation: u64,
    id: SliceId,
    len: u32,
    sums: impl Iterator<Item = u32>,
) -> Vec<u8> {
    let mut header = Vec::with_capacity(header_bytes(len));
    header.extend_from_slice(&MAGIC);
    header.extend_from_slice(&generation.to_be_bytes());
    header.extend_from_slice(&id.generation.0.to_be_bytes());
    header.extend_from_slice(&id.index.to_be_bytes());
    header.extend_from_slice(&len.to_be_bytes());
    header.extend(sums.flat_map(u32::to_be_bytes));
    header.extend_from_slice(&crc32c(&header).to_be_bytes());
    header
}

fn decode_header(bytes: &[u8]) -> Option<(u64, SliceId, u32, Arc<[u32]>)> {
    let rest = bytes.strip_prefix(&MAGIC)?;
    let (generation, rest) = rest.split_first_chunk()?;
    let (object, rest) = rest.split_first_chunk()?;
    let (index, rest) = rest.split_first_chunk()?;
    let (len, rest) = rest.split_first_chunk()?;
    let len = u32::from_be_bytes(*len);
    let sums = rest.get(..4 * (len as usize).div_ceil(DISK_STEP_BYTES))?;
    let (own, _) = rest[sums.len()..].split_first_chunk()?;
    if crc32c(&bytes[..header_bytes(len) - 4]) != u32::from_be_bytes(*own) {
        return None;
    }
    let id = SliceId {
        generation: Generation(u128::from_be_bytes(*object)),
        index: u32::from_be_bytes(*index),
    };
    Some((u64::from_be_bytes(*generation), id, len, decode_sums(sums)))
}

/// Sums from their bytes on disk.
pub fn decode_sums(bytes: &[u8]) -> Arc<[u32]> {
    bytes
        .as_chunks()
        .0
        .iter()
        .map(|sum| u32::from_be_bytes(*sum))
        .collect()
}

fn write_all(file: &File, header: &[u8], parts: &[Bytes], mut at: u64) -> io::Result<()> {
    /// Buffers that one call takes (IOV_MAX).
    const AT_ONCE: usize = 1024;
    let parts = parts.iter().map(|part| IoSlice::new(part));
    let mut all: Vec<IoSlice> = std::iter::once(IoSlice::new(header)).chain(parts).collect();
    let mut left = &mut all[..];
    while !left.is_empty() {
        match rustix::io::pwritev(file, &left[..left.len().min(AT_ONCE)], at) {
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Ok(written) => {
                at += written as u64;
                IoSlice::advance_slices(&mut left, written);
            }
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// All bytes of an entry in its region's file, if they match `sums`.
pub fn read_entry(file: &File, place: &Place, sums: &[u32]) -> Result<Slice, ReadError> {
    let bytes = read_exact(file, place.len as usize, place.bytes_offset())?;
    Slice::verified(bytes.into(), sums).ok_or(ReadError::Damaged)
}

/// Bytes `start..end` of an entry, as `read` gives them (length, offset in the
/// region), from whole steps that match `sums`.
fn steps(
    place: &Place,
    sums: &[u32],
    start: u32,
    end: u32,
    read: impl FnOnce(usize, u64) -> Result<Bytes, ReadError>,
) -> Result<Bytes, ReadError> {
    if start >= end {
        return Ok(Bytes::new());
    }
    let (start, end) = (start as usize, end as usize);
    let from = start / DISK_STEP_BYTES * DISK_STEP_BYTES;
    let to = end
        .next_multiple_of(DISK_STEP_BYTES)
        .min(place.len as usize);
    let bytes = read(to - from, place.bytes_offset() + from as u64)?;
    match are_intact(&bytes, from, sums, DISK_STEP_BYTES) {
        true => Ok(bytes.slice(start - from..end - from)),
        false => Err(ReadError::Damaged),
    }
}

/// Exactly `len` bytes at `at`, into memory that need not be zeroed first.
fn read_exact(file: &File, len: usize, at: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(len);
    while bytes.len() < len {
        let offset = at + bytes.len() as u64;
        match rustix::io::pread(file, rustix::buffer::spare_capacity(&mut bytes), offset) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(_) => {}
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    bytes.truncate(len);
    Ok(bytes)
}

fn read_some(file: &File, buffer: &mut [u8], at: u64) -> usize {
    let mut done = 0;
    while done < buffer.len() {
        match file.read_at(&mut buffer[done..], at + done as u64) {
            Ok(0) => break,
            Ok(read) => done += read,
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(_) => break,
        }
    }
    done
}
