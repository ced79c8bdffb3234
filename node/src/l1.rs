//! The memory store.

use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use arc_swap::ArcSwapOption;
use pingora_slice_cluster::SliceId;
use tinyufo::TinyUfo;

use crate::manifest::{Stored, Url};
use crate::slice::{PAGE_BYTES, Slice};

/// Weight unit of the store, bytes: TinyUFO's weights are 16-bit, and the
/// largest slice is 10 MiB.
const WEIGHT_BYTES: usize = 4096;
const _: () = assert!(
    pingora_slice_cluster::slice::SLICE_BYTES_MAX as usize / WEIGHT_BYTES < u16::MAX as usize
);

/// An object is large when it would take one part of memory in so many.
const LARGE_DIVISOR: u64 = 8;

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
    asked: Asked,
    /// Objects of so many bytes are large; none are without a disk.
    large_bytes: u64,
    weight: AtomicI64,
    /// One at a time: what two put under one key at once is counted twice.
    putting: Mutex<()>,
}

impl L1 {
    /// A store of at most `bytes_max` bytes, its index included; most slices
    /// have `slice_bytes`. `disk_bytes_max`: of the store on disk, if there is one.
    pub fn new(bytes_max: u64, disk_bytes_max: Option<u64>, slice_bytes: u32) -> L1 {
        let weight_max = (bytes_max as usize / WEIGHT_BYTES).max(1);
        // Sized for slices of 64 KiB: the estimator costs a few bytes each.
        let items = (bytes_max as usize / PAGE_BYTES).max(1024);
        L1 {
            store: TinyUfo::new(weight_max, items),
            asked: Asked::new(2 * bytes_max / u64::from(slice_bytes).max(PAGE_BYTES as u64)),
            // A smaller disk would keep a slice for a shorter time than memory.
            large_bytes: match disk_bytes_max {
                Some(disk_bytes_max) if disk_bytes_max >= bytes_max => bytes_max / LARGE_DIVISOR,
                _ => u64::MAX,
            },
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

    /// Whether a slice that can be had from disk or from a peer, and was asked
    /// for just now, is worth a place. One download of an object that would take
    /// a good part of memory pushes nothing out, and does not pay for memory:
    /// of those, what was asked for not long before. The first slice is, always:
    /// when its owner dies, nodes without the manifest ask the origin for both.
    pub fn is_worth_a_place(&self, id: &SliceId, object_bytes: Option<u64>) -> bool {
        id.index == 0
            || object_bytes.is_none_or(|bytes| bytes < self.large_bytes)
            || self.asked.note(id)
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

/// Which slices were asked for lately: about as many as it has places.
struct Asked {
    /// Neighbours in an object have neighbouring places, so that they never
    /// displace each other; other objects write over them.
    places: Box<[AtomicU64]>,
}

impl Asked {
    fn new(places: u64) -> Asked {
        Asked {
            places: (0..places.max(64)).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    /// Notes that a slice is asked for; whether it was lately.
    fn note(&self, id: &SliceId) -> bool {
        // A generation is a keyed hash: its halves need no further one.
        let (high, low) = ((id.generation.0 >> 64) as u64, id.generation.0 as u64);
        let index = u64::from(id.index);
        let place = low.wrapping_add(index) % self.places.len() as u64;
        let name = high.wrapping_add(index);
        self.places[place as usize].swap(name, Ordering::Relaxed) == name
    }
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use bytes::Bytes;
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

    /// Promise P4: what leaves the store leaves memory, at once.
    #[test]
    fn what_is_evicted_is_freed() {
        const SLICE: usize = 64 * 1024;
        const ROOM: u64 = 16;
        let l1 = L1::new(ROOM * SLICE as u64, None, SLICE as u32);
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
        let l1 = L1::new(1 << 20, None, SLICE as u32);
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
        let l1 = L1::new(ROOM, None, SLICE as u32);
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

    #[test]
    fn slices_of_large_objects_come_in_when_asked_for_again() {
        const SLICES: u32 = 64;
        let bytes_max = u64::from(SLICES) << 20;
        let l1 = L1::new(bytes_max, Some(bytes_max), 1 << 20);
        let large = u64::from(SLICES) << 17;
        let worth = |of: Range<u32>| of.filter(|n| l1.is_worth_a_place(&id(*n), Some(large)));
        assert!(l1.is_worth_a_place(&id(1), Some(large - 1)), "small");
        assert!(l1.is_worth_a_place(&id(1), None), "nobody knows");
        assert_eq!(worth(0..9).collect::<Vec<_>>(), [0]);
        assert_eq!(worth(1..9).count(), 8, "soon after");
        assert_eq!(worth(1000..1000 + 20 * SLICES).count(), 0);
        assert_eq!(worth(1..9).count(), 0, "many others were asked for since");
        for disk_bytes_max in [None, Some(bytes_max - 1)] {
            let l1 = L1::new(bytes_max, disk_bytes_max, 1 << 20);
            assert!(l1.is_worth_a_place(&id(1), Some(large)), "no larger disk");
        }
    }
}
