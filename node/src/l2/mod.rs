//! The disk store: put, get by range, evict.
//!
//! ```text
//! lock                 one process at a time
//! life                 whose purges hold here: alone, cluster
//! regions/00000007     slice bytes, a preallocated file each   → region
//! index/00000003/      rows, manifests: an epoch of the index  → index
//! ```
//!
//! It promises right bytes or a miss (every page is checked against the sum
//! that came with the slice), a bound on disk use with everything counted, and
//! callers that never wait for a write: what the `writer` cannot take is
//! dropped and counted. It opens at once whatever its size, and whatever a
//! crash or a bad disk left behind; what cannot be trusted is a miss.
//!
//! Manifests and slices can be read as soon as they are kept: what waits for
//! the writer is answered from its queue.
//!
//! A disk that cannot be used at start is tried again in the background: the
//! node serves meanwhile, from memory and the origin. One that hangs is a miss
//! after a time, and is left alone for a while (`reads`).
//! Left out: durability. Nothing is synced, it is a cache.

mod buffers;
mod index;
mod places;
mod reads;
mod region;
mod row;
mod store;
#[cfg(test)]
mod tests;
mod writer;

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use bytes::Bytes;
use pingora_slice_cluster::SliceId;

use self::store::Store;
pub use self::store::{L2_BYTES_MIN, QUEUE_BYTES_MAX, STOP_MAX};
use crate::slice::{Slice, SliceParts};

/// Time between two tries at a disk that could not be used.
const TRY_AGAIN: Duration = Duration::from_secs(5);

/// Where the store is and how large it may be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct L2Config {
    /// Its directory (`l2_cache_dir`).
    pub dir: PathBuf,
    /// Disk use never exceeds this, everything counted (`l2_cache_size_bytes`).
    pub bytes_max: u64,
    /// Whose purges hold for what is in it.
    pub life: Life,
}

/// A machine's life alone, or that in a cluster: one knows nothing of what was
/// purged in the other, so what was stored in the one is emptied for the other.
/// It could not be found there either: the keys differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Life {
    /// Without a `cluster` section.
    Alone,
    /// With one.
    InCluster,
}

impl Life {
    fn word(self) -> &'static str {
        match self {
            Life::Alone => "alone\n",
            Life::InCluster => "cluster\n",
        }
    }
}

/// A part of a stored slice, its pages verified.
#[derive(Clone, Debug)]
pub struct L2Read {
    /// The bytes asked for (start..end, cut at the slice's end).
    pub bytes: Bytes,
    /// Length of the whole slice, bytes.
    pub slice_bytes: u32,
}

/// The disk store, or the place where it will be. Cheap to clone.
#[derive(Clone)]
pub struct L2 {
    store: Arc<ArcSwapOption<Store>>,
    in_memory: InMemory,
}

/// Which slices the memory store has, once somebody has said how to know: they are
/// read there and not here, but are not asked for any less.
#[derive(Clone, Default)]
struct InMemory(Arc<OnceLock<HasSlice>>);

type HasSlice = Box<dyn Fn(&SliceId) -> bool + Send + Sync>;

impl InMemory {
    fn has(&self, id: &SliceId) -> bool {
        self.0.get().is_some_and(|has| has(id))
    }
}

impl L2 {
    /// Opens the store, or makes it. What is torn or damaged is dropped; a store
    /// that cannot be opened is set aside, and an empty one made. A disk that
    /// cannot be used is reported and tried again; the node goes on without it.
    ///
    /// # Errors
    /// [`L2Error::Locked`]: another process has it.
    pub fn open(config: L2Config) -> Result<L2, L2Error> {
        let store = Arc::new(ArcSwapOption::empty());
        let in_memory = InMemory::default();
        match Store::open(config.clone(), in_memory.clone()) {
            Ok(opened) => store.store(Some(Arc::new(opened))),
            Err(error @ L2Error::Locked(_)) => return Err(error),
            Err(error) => {
                tracing::error!(%error, "no disk store; it is tried again");
                let (waiting, in_memory) = (Arc::downgrade(&store), in_memory.clone());
                std::thread::Builder::new()
                    .name("l2-opener".into())
                    .spawn(move || {
                        loop {
                            std::thread::sleep(TRY_AGAIN);
                            let Some(place) = waiting.upgrade() else { return };
                            if let Ok(opened) = Store::open(config.clone(), in_memory.clone()) {
                                tracing::info!(dir = %config.dir.display(), "the disk store is open");
                                place.store(Some(Arc::new(opened)));
                                return;
                            }
                        }
                    })
                    .map_err(|e| L2Error::Disk {
                        path: PathBuf::new(),
                        reason: e.to_string(),
                    })?;
            }
        }
        Ok(L2 { store, in_memory })
    }

    /// Says, once, how to know which slices the memory store has: they stay here
    /// as those do that are read here.
    pub fn keep_what_is_in_memory(&self, has: impl Fn(&SliceId) -> bool + Send + Sync + 'static) {
        let _ = self.in_memory.0.set(Box::new(has));
    }

    /// The whole slice, verified.
    pub async fn slice(&self, id: SliceId) -> Option<Slice> {
        self.store.load_full()?.slice(id).await
    }

    /// The whole slice, verified, where that needs no wait for the disk.
    pub fn slice_now(&self, id: SliceId) -> Option<Slice> {
        self.store.load().as_ref()?.slice_now(id)
    }

    /// Whether a slice is here, as far as that is known without a wait for the disk.
    pub fn has(&self, id: &SliceId) -> bool {
        self.store.load().as_ref().is_some_and(|l2| l2.has(id))
    }

    /// Ends the life of the store in `dir`, if there is one: a machine alone that does
    /// not use it makes purges that it will not know of. It begins empty again.
    ///
    /// # Errors
    /// Another process has it, or the disk has no room for a word.
    pub fn end_life(dir: &Path) -> Result<(), L2Error> {
        store::end_life(dir)
    }

    /// Whether a slice is here; asking does not count as a use.
    pub async fn holds(&self, id: SliceId) -> bool {
        match self.store.load_full() {
            Some(l2) => l2.holds(id).await,
            None => false,
        }
    }

    /// Whether the disk hangs: what is not found may be there all the same.
    pub fn hangs(&self) -> bool {
        self.store.load().as_ref().is_some_and(|l2| l2.hangs())
    }

    /// Bytes `start..end` of a slice: reads and verifies only the pages touched.
    pub async fn slice_range(&self, id: SliceId, start: u32, end: u32) -> Option<L2Read> {
        self.store.load_full()?.slice_range(id, start, end).await
    }

    /// Keeps a slice: queued for the writer; when its queue is full, dropped and
    /// counted. Whether it is to be expected on disk.
    pub fn keep_slice(&self, id: SliceId, slice: SliceParts) -> bool {
        let store = self.store.load();
        store
            .as_ref()
            .is_some_and(|store| store.keep_slice(id, slice))
    }

    /// The manifest (encoded) kept under `key`.
    pub async fn manifest(&self, key: u128) -> Option<Bytes> {
        self.store.load_full()?.manifest(key).await
    }

    /// Keeps a manifest, replacing the one under `key`.
    pub fn keep_manifest(&self, key: u128, manifest: Bytes) {
        if let Some(store) = &*self.store.load() {
            store.keep_manifest(key, manifest);
        }
    }

    /// Forgets the manifest under `key`. It may stay when the disk is behind:
    /// whether a manifest may be used is decided by its stamp.
    pub fn drop_manifest(&self, key: u128) {
        if let Some(store) = &*self.store.load() {
            store.drop_manifest(key);
        }
    }

    /// Waits until everything queued before this call is on disk or dropped.
    pub async fn settled(&self) {
        if let Some(store) = self.store.load_full() {
            store.settled().await;
        }
    }

    /// What it holds and has done, for the metrics.
    pub fn stats(&self) -> L2Stats {
        self.store
            .load()
            .as_ref()
            .map_or(L2Stats::default(), |store| store.stats())
    }

    /// Stops the writer after what is queued; then closes the index. Bounded in time.
    pub async fn stop(&self) {
        if let Some(store) = self.store.load_full() {
            store.stop().await;
        }
    }
}

/// Counters since start, and gauges.
#[derive(Clone, Copy, Debug, Default)]
pub struct L2Stats {
    /// Bytes on disk, everything counted.
    pub bytes: u64,
    /// Slices written.
    pub writes: u64,
    /// Slices written again because they were hit when their region was taken.
    pub rewritten: u64,
    /// Slices not written because the writer's queue was full or the disk failed.
    pub dropped: u64,
    /// Entries found damaged and dropped.
    pub damaged: u64,
    /// Reads that were given up because the disk hung.
    pub hung: u64,
    /// Reads that failed for a reason that passes: misses, the entries stay.
    pub unreadable: u64,
    /// Whether writing works at present.
    pub writable: bool,
}

/// Why the store is not there.
#[derive(Debug, thiserror::Error)]
pub enum L2Error {
    /// Another process has it.
    #[error("{0} is in use by another process")]
    Locked(PathBuf),
    /// Directory or disk.
    #[error("{path}: {reason}")]
    Disk {
        /// Where.
        path: PathBuf,
        /// What.
        reason: String,
    },
}
