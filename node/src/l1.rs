//! The memory store: a table of what is kept within a budget of bytes.
//!
//! Scan-resistant: what was asked for once goes before what was asked for again
//! (`quick_cache`, whose rule is near S3-FIFO's). What leaves the table is freed
//! at once, unless an answer is being made of it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use pingora_slice_cluster::SliceId;
use quick_cache::sync::{Cache, DefaultLifecycle};
use quick_cache::{DefaultHashBuilder, OptionsBuilder, Weighter};

use crate::manifest::{Manifest, Stored, Varies};
use crate::slice::{PAGE_BYTES, Slice};
use crate::url::Url;

/// An object is large when it would take one part of memory in so many.
const LARGE_DIVISOR: u64 = 8;

/// Once memory is full, one in so many slices of large objects comes in, of those
/// that were asked for again. What is asked for in turn and does not fit would
/// else push itself out, and cost memory its place for nothing.
const ONE_IN: f64 = 8.0;

/// What the table and the allocator take for one item, bytes.
const ITEM_BYTES: usize = 384;
/// The same for a field, beside what its name and its value are long.
const FIELD_BYTES: usize = 96;

/// A part of the table, with a lock of its own, has room for half to all of so many
/// slices: parts fill alike, and one that is full drops what others had room for.
const SHARD_SLICES: u64 = 512;
const SHARDS_MAX: u64 = 64;

/// Part of the budget that what was asked for again may take; the rest is for what
/// was asked for once, while there is not enough of the former.
const HOT: f64 = 0.9;

#[derive(Clone, PartialEq, Eq, Hash)]
enum Key {
    Slice(SliceId),
    Record(u128),
}

#[derive(Clone)]
enum Item {
    Slice(Slice),
    Record(Kept),
}

/// What is stored under a manifest key.
#[derive(Clone)]
pub enum Kept {
    /// A manifest.
    Manifest(Arc<Stored>),
    /// A pointer to the variants: the fields that the object varies by.
    Varies(Arc<Varies>),
}

impl Kept {
    /// The manifest, if it is that of a variant.
    pub fn of_variant(self, variant: &[(String, String)]) -> Option<Arc<Stored>> {
        match self {
            Kept::Manifest(object) if object.manifest.variant == variant => Some(object),
            _ => None,
        }
    }
}

/// Manifests and slices within a budget.
pub struct L1 {
    store: Cache<Key, Item, Weight>,
    asked: Asked,
    /// With so many bytes in use some part of the table may be full.
    full_bytes: u64,
    /// Objects of so many bytes are large; none are without a disk.
    large_bytes: u64,
}

impl L1 {
    /// A store of at most `bytes_max` bytes, its index included; most slices
    /// have `slice_bytes`. `disk_bytes_max`: of the store on disk, if there is one.
    pub fn new(bytes_max: u64, disk_bytes_max: Option<u64>, slice_bytes: u32) -> L1 {
        let slice_bytes = u64::from(slice_bytes).max(PAGE_BYTES as u64);
        let shards = (bytes_max / slice_bytes / SHARD_SLICES).clamp(1, SHARDS_MAX);
        let options = OptionsBuilder::new()
            .weight_capacity(bytes_max)
            .estimated_items_capacity((bytes_max as usize / PAGE_BYTES).max(1024))
            .shards(shards as usize)
            .hot_allocation(HOT)
            .build()
            .expect("both capacities are given");
        L1 {
            store: Cache::with_options(
                options,
                Weight,
                DefaultHashBuilder::default(),
                DefaultLifecycle::default(),
            ),
            asked: Asked::new(2 * bytes_max / slice_bytes),
            // A slice has sums besides.
            full_bytes: bytes_max.saturating_sub(shards * (slice_bytes + slice_bytes / 64)),
            // A smaller disk would keep a slice for a shorter time than memory.
            large_bytes: match disk_bytes_max {
                Some(disk_bytes_max) if disk_bytes_max >= bytes_max => bytes_max / LARGE_DIVISOR,
                _ => u64::MAX,
            },
        }
    }

    /// The slice, if it is here.
    pub fn slice(&self, id: &SliceId) -> Option<Slice> {
        match self.store.get(&Key::Slice(*id))? {
            Item::Slice(slice) => Some(slice),
            Item::Record(_) => None,
        }
    }

    /// Whether a slice is here; asking does not count as a use.
    pub fn has_slice(&self, id: &SliceId) -> bool {
        self.store.contains_key(&Key::Slice(*id))
    }

    /// Whether a slice that can be had from disk or from a peer, and was asked
    /// for just now, is worth a place. One download of an object that would take
    /// a good part of memory pushes nothing out, and does not pay for memory:
    /// of those, what was asked for not long before, and the more often that is
    /// the sooner. The first slice is, always: when its owner dies, nodes without
    /// the manifest ask the origin for both. `chance` is from 0 to 1.
    pub fn is_worth_a_place(&self, id: &SliceId, object_bytes: Option<u64>, chance: f64) -> bool {
        id.index == 0
            || object_bytes.is_none_or(|bytes| bytes < self.large_bytes)
            || (self.asked.note(id) && (self.bytes() <= self.full_bytes || chance * ONE_IN < 1.0))
    }

    /// Offers a slice; what was asked for again may be worth more than it.
    pub fn keep_slice(&self, id: SliceId, slice: Slice) {
        // Immutable: one that is here need not be put again.
        if !self.store.contains_key(&Key::Slice(id)) {
            let slice = slice.to_be_kept();
            self.store.insert(Key::Slice(id), Item::Slice(slice));
        }
    }

    /// Drops a slice (it was found damaged).
    pub fn drop_slice(&self, id: &SliceId) {
        self.store.remove(&Key::Slice(*id));
    }

    /// What is kept under a manifest key.
    pub fn record(&self, key: u128) -> Option<Kept> {
        match self.store.get(&Key::Record(key))? {
            Item::Record(kept) => Some(kept),
            Item::Slice(_) => None,
        }
    }

    /// Keeps what belongs under a manifest key, replacing what was there.
    pub fn keep_record(&self, key: u128, kept: Kept) {
        self.store.insert(Key::Record(key), Item::Record(kept));
    }

    /// Drops what is under a manifest key.
    pub fn drop_record(&self, key: u128) {
        self.store.remove(&Key::Record(key));
    }

    /// Bytes in use.
    pub fn bytes(&self) -> u64 {
        self.store.weight()
    }
}

/// What an item counts for, bytes.
#[derive(Clone)]
struct Weight;

impl Weighter<Key, Item> for Weight {
    fn weight(&self, _: &Key, item: &Item) -> u64 {
        let bytes = match item {
            Item::Slice(slice) => slice.held_bytes(),
            Item::Record(Kept::Manifest(stored)) => size_of::<Stored>() + held(&stored.manifest),
            Item::Record(Kept::Varies(varies)) => {
                let names = varies.by.iter().map(|name| FIELD_BYTES + name.len());
                url_bytes(&varies.url) + names.sum::<usize>()
            }
        };
        (bytes + ITEM_BYTES) as u64
    }
}

/// What a manifest holds beyond itself, bytes: all that a client or an origin
/// chooses the length of.
fn held(manifest: &Manifest) -> usize {
    let fields = manifest.headers.iter();
    // Two more times: as they are written, and as the version's validators.
    let fields = fields.map(|(name, value)| FIELD_BYTES + 3 * (name.len() + value.len()));
    let variant = manifest.variant.iter();
    let variant = variant.map(|(name, value)| FIELD_BYTES + name.len() + value.len());
    let names = manifest.subject.prefixes.len() + manifest.subject.tags.len();
    let parts = fields.chain(variant).sum::<usize>();
    url_bytes(&manifest.url) + parts + names * size_of::<u64>()
}

fn url_bytes(url: &Url) -> usize {
    url.host.len() + url.target.len()
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
        let held = (0..300).filter_map(|n| l1.slice(&id(n)));
        let held: usize = held.map(|slice| slice.held_bytes() + ITEM_BYTES).sum();
        assert_eq!(l1.bytes(), held as u64);
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
    fn what_is_asked_for_again_stays_and_what_is_asked_for_no_more_goes() {
        const SLICE: usize = 8 * 1024;
        let l1 = L1::new(128 * SLICE as u64, None, SLICE as u32);
        let alive = Arc::new(());
        let ask = |n| {
            let is_here = l1.slice(&id(n)).is_some();
            if !is_here {
                l1.keep_slice(id(n), slice(&alive, SLICE));
            }
            is_here
        };
        let mut once = 1_000_000..;
        for loved in [0..64, 1000..1064, 2000..2064] {
            for round in 0..500 {
                let missed = loved.clone().filter(|n| !ask(*n)).count();
                assert!(
                    missed == 0 || round < 20,
                    "{missed} of {loved:?} in {round}"
                );
                once.by_ref().take(16).for_each(|n| assert!(!ask(n)));
            }
        }
    }

    #[test]
    fn slices_of_large_objects_come_in_when_asked_for_again() {
        const SLICES: u32 = 64;
        let bytes_max = u64::from(SLICES) << 20;
        let l1 = L1::new(bytes_max, Some(bytes_max), 1 << 20);
        let large = u64::from(SLICES) << 17;
        let worth = |id: SliceId, bytes| l1.is_worth_a_place(&id, bytes, 1.0);
        let worth_of =
            |of: Range<u32>| -> Vec<u32> { of.filter(|n| worth(id(*n), Some(large))).collect() };
        assert!(worth(id(1), Some(large - 1)), "small");
        assert!(worth(id(1), None), "nobody knows");
        assert_eq!(worth_of(0..9), [0]);
        assert_eq!(worth_of(1..9).len(), 8, "soon after");
        assert_eq!(worth_of(1000..1000 + 20 * SLICES).len(), 0);
        assert_eq!(worth_of(1..9).len(), 0, "many others were asked for since");
        for disk_bytes_max in [None, Some(bytes_max - 1)] {
            let l1 = L1::new(bytes_max, disk_bytes_max, 1 << 20);
            let is_worth = l1.is_worth_a_place(&id(1), Some(large), 1.0);
            assert!(is_worth, "no larger disk");
        }
    }

    #[test]
    fn an_object_larger_than_memory_that_is_read_again_and_again_stays_in_part() {
        const SLICE: u32 = PAGE_BYTES as u32;
        const SLICES: u32 = 128;
        const ROUNDS: u32 = 10;
        let bytes_max = u64::from(SLICES * SLICE);
        let l1 = L1::new(bytes_max, Some(10 * bytes_max), SLICE);
        let alive = Arc::new(());
        let (mut hits, mut kept) = (0, 0);
        for round in 0..ROUNDS {
            // Twice what fits, in turn.
            for n in 0..2 * SLICES {
                // Evenly spread, and of no pattern in `n`.
                let chance = f64::from((round * 2 * SLICES + n) * 7919 % 1000) / 1000.0;
                if l1.slice(&id(n)).is_some() {
                    hits += 1;
                } else if l1.is_worth_a_place(&id(n), Some(2 * bytes_max), chance) {
                    l1.keep_slice(id(n), slice(&alive, SLICE as usize));
                    kept += 1;
                }
            }
        }
        // The first round fills nothing, the second fills memory.
        let (asked, most) = ((ROUNDS - 2) * 2 * SLICES, (ROUNDS - 2) * SLICES);
        assert!(hits > most * 3 / 4, "{hits} hits of {asked}, {most} fit");
        assert!(kept < 3 * SLICES, "{kept} were kept for {SLICES} places");
    }
}
