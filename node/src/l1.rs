//! The memory store, and what is stored: slices with their checksums.

use std::ops::Range;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex};

use arc_swap::ArcSwapOption;
use bytes::Bytes;
use pingora_slice_cluster::SliceId;
use pingora_slice_cluster::crc32c::crc32c_append;
use pingora_slice_cluster::wire::Part;
use tinyufo::TinyUfo;

use crate::manifest::{Stored, Url};

/// A checksum covers this many bytes of a slice (the last one fewer).
pub const PAGE_BYTES: usize = 64 * 1024;

/// What is read of a page can be checked in steps of so many bytes.
const STEP_BYTES: usize = 4 * 1024;
const STEPS: usize = PAGE_BYTES / STEP_BYTES;

/// The same of what is read from disk, where a finer sum would cost the index
/// more: a 4096th of the bytes.
pub const DISK_STEP_BYTES: usize = 16 * 1024;
const _: () = assert!(
    PAGE_BYTES.is_multiple_of(DISK_STEP_BYTES) && DISK_STEP_BYTES.is_multiple_of(STEP_BYTES)
);

/// A slice in memory: one run of bytes and a CRC-32C for each page of it,
/// computed when the bytes came from the origin and carried everywhere since.
/// Cheap to clone.
#[derive(Clone, Debug)]
pub struct Slice {
    bytes: Bytes,
    /// The sums while they grow: at the end of each step, that of its page up
    /// to there. So a part of a page is checked without reading all of it.
    growing: Arc<[u32]>,
}

impl Slice {
    /// A slice of bytes that have just arrived: computes the checksums.
    pub fn new(bytes: Bytes) -> Self {
        let pages = bytes.chunks(PAGE_BYTES);
        let growing = pages
            .flat_map(|page| {
                page.chunks(STEP_BYTES).scan(0, |sum, step| {
                    *sum = crc32c_append(*sum, step);
                    Some(*sum)
                })
            })
            .collect();
        Slice { bytes, growing }
    }

    /// A slice of which one bit has flipped since.
    #[cfg(test)]
    pub fn with_flipped_bit(&self, at: usize) -> Slice {
        let mut bytes = self.bytes.to_vec();
        bytes[at] ^= 1;
        Slice {
            bytes: bytes.into(),
            growing: self.growing.clone(),
        }
    }

    /// A slice as it was on disk, with its [`Slice::disk_sums`]; `None` unless all match.
    pub fn verified(bytes: Bytes, disk_sums: &[u32]) -> Option<Self> {
        let slice = Slice::new(bytes);
        let is_same = slice.disk_sums().eq(disk_sums.iter().copied());
        is_same.then_some(slice)
    }

    /// All bytes.
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// The checksum of each page.
    pub fn sums(&self) -> impl Iterator<Item = u32> {
        self.growing
            .chunks(STEPS)
            .filter_map(|page| page.last().copied())
    }

    /// The sums that go to disk with it: at the end of each [`DISK_STEP_BYTES`],
    /// that of its page up to there.
    pub fn disk_sums(&self) -> impl Iterator<Item = u32> {
        self.growing
            .chunks(DISK_STEP_BYTES / STEP_BYTES)
            .filter_map(|step| step.last().copied())
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether it holds no bytes.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Whether the bytes of `range`, and what else lies in the steps that it
    /// touches, still match their checksums.
    pub fn is_intact_in(&self, range: Range<usize>) -> bool {
        let start = range.start / STEP_BYTES * STEP_BYTES;
        let end = range.end.next_multiple_of(STEP_BYTES).min(self.len());
        are_intact(&self.bytes[start..end], start, &self.growing, STEP_BYTES)
    }

    /// All of a slice that has just been checked, in parts of a page.
    pub fn checked_parts(&self) -> Vec<Part> {
        let pages = self.bytes.chunks(PAGE_BYTES).zip(self.sums());
        pages
            .map(|(page, crc32c)| Part {
                bytes: self.bytes.slice_ref(page),
                crc32c,
            })
            .collect()
    }

    /// The bytes of `range` (within the slice) in parts of at most a page.
    /// `None` when what it touches is damaged.
    pub fn parts(&self, range: Range<usize>) -> Option<Vec<Part>> {
        let mut parts = Vec::with_capacity(range.len().div_ceil(PAGE_BYTES) + 1);
        let mut at = range.start;
        while at < range.end {
            let page = at / PAGE_BYTES;
            let page_end = ((page + 1) * PAGE_BYTES).min(self.len());
            let end = page_end.min(range.end);
            if !self.is_intact_in(at..end) {
                return None;
            }
            let bytes = self.bytes.slice(at..end);
            parts.push(if at == page * PAGE_BYTES && end == page_end {
                Part {
                    bytes,
                    crc32c: self.growing[(page_end - 1) / STEP_BYTES],
                }
            } else {
                Part::new(bytes)
            });
            at = end;
        }
        Some(parts)
    }
}

/// Whether bytes from `at` of a slice on match its sums, which grow by `step`
/// within each page. They begin with a step, and end with one or with the slice.
pub fn are_intact(bytes: &[u8], at: usize, growing: &[u32], step: usize) -> bool {
    let end = at + bytes.len();
    (at / PAGE_BYTES..end.div_ceil(PAGE_BYTES)).all(|page| {
        let start = at.max(page * PAGE_BYTES);
        let stop = end.min((page + 1) * PAGE_BYTES);
        let before = match start == page * PAGE_BYTES {
            true => Some(&0),
            false => growing.get(start / step - 1),
        };
        let sum = before.map(|before| crc32c_append(*before, &bytes[start - at..stop - at]));
        sum.is_some() && sum.as_ref() == growing.get(stop.div_ceil(step) - 1)
    })
}

/// Weight unit of the store, bytes: TinyUFO's weights are 16-bit, and the
/// largest slice is 10 MiB.
const WEIGHT_BYTES: usize = 4096;
const _: () = assert!(
    pingora_slice_cluster::slice::SLICE_BYTES_MAX as usize / WEIGHT_BYTES < u16::MAX as usize
);

/// What the index and the allocator take for one item, bytes.
const ITEM_BYTES: usize = 384;

/// What keeps its place in memory.
#[derive(Clone)]
enum Item {
    /// With its name: TinyUFO tells keys apart by 64 bits of hash only. In a
    /// cell that is emptied on eviction: TinyUFO frees what it has evicted some
    /// dozens of evictions later, by thread.
    Slice(SliceId, Arc<ArcSwapOption<Slice>>),
    Manifest(Arc<Stored>),
    /// The fields that the object under this key varies by.
    Varies(Arc<(Url, Vec<String>)>),
    /// Nothing any more: what is dropped leaves its place to age. TinyUFO's own
    /// `remove` leaves the key in its queue, and a key that came back would be
    /// taken from the queue, and from the sum of weights, twice.
    Dropped,
}

#[derive(Clone, PartialEq, Eq, Hash)]
enum Key {
    Slice(SliceId),
    Record(u128),
}

/// What is stored under a manifest key.
#[derive(Clone)]
pub enum Kept {
    /// A manifest.
    Manifest(Arc<Stored>),
    /// A pointer to the variants.
    Varies(Arc<(Url, Vec<String>)>),
}

/// Manifests and slices within a budget. Scan-resistant: what was asked for
/// once does not push out what is asked for often (TinyUFO).
pub struct L1 {
    store: TinyUfo<Key, Item>,
    weight: AtomicI64,
    /// One at a time: what two put under one key at once is counted twice.
    putting: Mutex<()>,
}

impl L1 {
    /// A store of at most `bytes_max` bytes, its index included.
    pub fn new(bytes_max: u64) -> L1 {
        let weight_max = (bytes_max as usize / WEIGHT_BYTES).max(1);
        // Sized for slices of 64 KiB: the estimator costs a few bytes each.
        let items = (bytes_max as usize / PAGE_BYTES).max(1024);
        L1 {
            store: TinyUfo::new(weight_max, items),
            weight: AtomicI64::new(0),
            putting: Mutex::default(),
        }
    }

    /// The slice, if it is here.
    pub fn slice(&self, id: &SliceId) -> Option<Slice> {
        match self.store.get(&Key::Slice(*id))? {
            Item::Slice(kept, cell) if kept == *id => cell.load().as_deref().cloned(),
            _ => None,
        }
    }

    /// Offers a slice; frequency decides whether it stays.
    pub fn keep_slice(&self, id: SliceId, slice: Slice) {
        let _one_at_a_time = self.putting.lock().expect("no panic while held");
        // Immutable: one that is here need not be put again.
        if self.slice(&id).is_none() {
            let cell = Arc::new(ArcSwapOption::from_pointee(slice));
            self.put(Key::Slice(id), Item::Slice(id, cell));
        }
    }

    /// Drops a slice (it was found damaged).
    pub fn drop_slice(&self, id: &SliceId) {
        let _one_at_a_time = self.putting.lock().expect("no panic while held");
        self.drop_item(Key::Slice(*id));
    }

    /// What is kept under a manifest key.
    pub fn record(&self, key: u128) -> Option<Kept> {
        match self.store.get(&Key::Record(key))? {
            Item::Manifest(stored) => Some(Kept::Manifest(stored)),
            Item::Varies(by) => Some(Kept::Varies(by)),
            Item::Slice(..) | Item::Dropped => None,
        }
    }

    /// Keeps what belongs under a manifest key, replacing what was there.
    pub fn keep_record(&self, key: u128, kept: Kept) {
        let item = match kept {
            Kept::Manifest(stored) => Item::Manifest(stored),
            Kept::Varies(by) => Item::Varies(by),
        };
        let _one_at_a_time = self.putting.lock().expect("no panic while held");
        self.put(Key::Record(key), item);
    }

    /// Drops what is under a manifest key.
    pub fn drop_record(&self, key: u128) {
        let _one_at_a_time = self.putting.lock().expect("no panic while held");
        self.drop_item(Key::Record(key));
    }

    /// Bytes in use.
    pub fn bytes(&self) -> u64 {
        self.weight.load(Ordering::Relaxed).max(0) as u64 * WEIGHT_BYTES as u64
    }

    /// In the place of whatever is under the key.
    fn put(&self, key: Key, item: Item) {
        if let Some(before) = self.store.get(&key) {
            self.weight
                .fetch_sub(i64::from(weight(&before)), Ordering::Relaxed);
            empty(&before);
        }
        let weight = weight(&item);
        self.weight.fetch_add(i64::from(weight), Ordering::Relaxed);
        for evicted in self.store.put(key, item, weight) {
            self.weight
                .fetch_sub(i64::from(evicted.weight), Ordering::Relaxed);
            empty(&evicted.data);
        }
    }

    fn drop_item(&self, key: Key) {
        if self.store.get(&key).is_some() {
            self.put(key, Item::Dropped);
        }
    }
}

/// Frees what an item held, as far as nobody reads it.
fn empty(item: &Item) {
    if let Item::Slice(_, cell) = item {
        cell.store(None);
    }
}

fn weight(item: &Item) -> u16 {
    let bytes = match item {
        Item::Slice(_, cell) => cell.load().as_ref().map_or(0, |slice| slice.len()),
        Item::Manifest(stored) => {
            let manifest = &stored.manifest;
            let fields = manifest.headers.iter();
            let fields: usize = fields.map(|(name, value)| name.len() + value.len()).sum();
            // Two more times: as a map and as they are written; small strings are rounded up.
            3 * (fields + manifest.url.host.len() + manifest.url.target.len())
        }
        Item::Varies(varies) => varies.1.iter().map(String::len).sum(),
        Item::Dropped => 0,
    };
    let units = (bytes + ITEM_BYTES).div_ceil(WEIGHT_BYTES);
    units.min(u16::MAX.into()) as u16
}

#[cfg(test)]
mod tests {
    use pingora_slice_cluster::Generation;

    use super::*;

    fn id(index: u32) -> SliceId {
        SliceId {
            generation: Generation(1),
            index,
        }
    }

    fn slice(owner: &Arc<()>, bytes: usize) -> Slice {
        struct Owned(
            Vec<u8>,
            #[allow(dead_code, reason = "counts what lives")] Arc<()>,
        );
        impl AsRef<[u8]> for Owned {
            fn as_ref(&self) -> &[u8] {
                &self.0
            }
        }
        Slice::new(Bytes::from_owner(Owned(vec![7; bytes], owner.clone())))
    }

    #[test]
    fn every_flipped_bit_is_seen_in_what_it_touches_and_nowhere_else() {
        const LEN: usize = PAGE_BYTES + 2 * STEP_BYTES + 100;
        let bytes: Vec<u8> = (0..LEN).map(|n| (n * 31 % 251) as u8).collect();
        let slice = Slice::new(bytes.clone().into());
        let crc32c = pingora_slice_cluster::crc32c::crc32c;
        let sums: Vec<u32> = bytes.chunks(PAGE_BYTES).map(crc32c).collect();
        assert_eq!(slice.sums().collect::<Vec<_>>(), sums);
        let sums: Vec<u32> = slice.disk_sums().collect();
        let ends = (0..LEN).step_by(DISK_STEP_BYTES);
        let ends = ends.map(|step| (step / PAGE_BYTES * PAGE_BYTES, step + DISK_STEP_BYTES));
        let prefixes = ends.map(|(page, end)| crc32c(&bytes[page..end.min(LEN)]));
        assert_eq!(sums, prefixes.collect::<Vec<_>>());
        let edges = [0, 1, STEP_BYTES - 1, STEP_BYTES, PAGE_BYTES - 1, PAGE_BYTES];
        let edges = edges
            .into_iter()
            .chain([PAGE_BYTES + STEP_BYTES + 1, LEN - 1, LEN]);
        let edges: Vec<usize> = edges.collect();
        for flipped in edges.iter().copied().filter(|at| *at < LEN) {
            let damaged = slice.with_flipped_bit(flipped);
            assert!(Slice::verified(damaged.bytes.clone(), &sums).is_none());
            for start in &edges {
                for end in edges.iter().filter(|end| *end > start) {
                    let steps = start / STEP_BYTES..end.div_ceil(STEP_BYTES);
                    let is_touched = steps.contains(&(flipped / STEP_BYTES));
                    assert_eq!(damaged.is_intact_in(*start..*end), !is_touched);
                    assert_eq!(damaged.parts(*start..*end).is_none(), is_touched);
                    assert!(slice.is_intact_in(*start..*end));
                }
            }
        }
    }

    /// Promise P4: what leaves the store leaves memory, at once.
    #[test]
    fn what_is_evicted_is_freed() {
        const SLICE: usize = 64 * 1024;
        const ROOM: u64 = 16;
        let l1 = L1::new(ROOM * SLICE as u64);
        let alive = Arc::new(());
        for round in 0..3 {
            for index in 0..1000 {
                l1.keep_slice(id(index + 100 * round), slice(&alive, SLICE));
                assert!(l1.bytes() <= ROOM * SLICE as u64);
                assert!(
                    Arc::strong_count(&alive) as u64 - 1 <= ROOM,
                    "{} slices live after {index}",
                    Arc::strong_count(&alive) - 1
                );
            }
        }
        assert!(l1.bytes() > ROOM * SLICE as u64 / 2, "it keeps something");
    }

    #[test]
    fn many_threads_do_not_lose_count() {
        const SLICE: usize = 8 * 1024;
        let l1 = L1::new(1 << 20);
        let alive = Arc::new(());
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let (l1, alive) = (&l1, alive.clone());
                scope.spawn(move || {
                    for n in 0..2000u32 {
                        // Some are the same for all, some are dropped again.
                        l1.keep_slice(id(n % 300), slice(&alive, SLICE));
                        if n % 7 == thread {
                            l1.drop_slice(&id(n % 300));
                        }
                    }
                });
            }
        });
        let held = (0..300).filter_map(|n| l1.store.get(&Key::Slice(id(n))));
        let held: usize = held.map(|item| usize::from(weight(&item))).sum();
        assert_eq!(l1.bytes(), (held * WEIGHT_BYTES) as u64);
        assert!(l1.bytes() <= 1 << 20);
    }

    #[test]
    fn what_is_dropped_and_comes_back_is_counted_once() {
        const SLICE: usize = 8 * 1024;
        const ROOM: u64 = 512 * 1024;
        let l1 = L1::new(ROOM);
        let alive = Arc::new(());
        for n in 0..20_000 {
            l1.keep_slice(id(n), slice(&alive, SLICE));
            l1.drop_slice(&id(n));
            assert!(l1.slice(&id(n)).is_none());
            l1.keep_slice(id(n), slice(&alive, SLICE));
            // Often enough asked for to outlive others.
            for _ in 0..2 {
                l1.slice(&id(n));
            }
            assert!(l1.bytes() <= ROOM);
            let held = (Arc::strong_count(&alive) - 1) * SLICE;
            assert!(held as u64 <= ROOM, "{held} bytes live");
        }
        let held = (Arc::strong_count(&alive) - 1) * SLICE;
        assert!(held as u64 > ROOM / 4, "{held} bytes live");
    }
}
