//! Where slices lie, as the index said it: what is read of them next need not ask
//! it, which may wait for the disk. Nor need what it said is not there, such as the
//! slices of other nodes.
//!
//! Slices do not change, and a place that no longer holds is known by its region's
//! generation. That a slice is nowhere is forgotten when it is kept, or when its row
//! may have come back to the index.

use std::collections::HashMap;
use std::sync::Arc;

use pingora_slice_cluster::SliceId;

use super::region::Place;

/// Memory at most: 5,000 slices of 1 MiB, if none is remembered that is not there.
const BYTES_MAX: usize = 2 << 20;
/// What one slice takes besides its sums.
const ITEM_BYTES: usize = 160;
/// Slices are counted in so many groups as they are kept.
const GROUPS: usize = 32;

/// See the module's text.
#[derive(Default)]
pub(super) struct Places {
    known: HashMap<SliceId, Known>,
    bytes: usize,
    /// How many slices of each group have been kept.
    kept: [u32; GROUPS],
}

enum Known {
    At(Place, Arc<[u32]>),
    Nowhere,
}

impl Known {
    fn bytes(&self) -> usize {
        match self {
            Known::At(_, sums) => ITEM_BYTES + size_of_val(&**sums),
            Known::Nowhere => ITEM_BYTES,
        }
    }
}

impl Places {
    /// The place of a slice and the sums of its bytes.
    pub(super) fn get(&self, id: &SliceId) -> Option<(Place, Arc<[u32]>)> {
        match self.known.get(id)? {
            Known::At(place, sums) => Some((*place, sums.clone())),
            Known::Nowhere => None,
        }
    }

    /// Whether a slice is known not to be there.
    pub(super) fn is_nowhere(&self, id: &SliceId) -> bool {
        matches!(self.known.get(id), Some(Known::Nowhere))
    }

    /// The index has a slice here.
    pub(super) fn insert(&mut self, id: SliceId, place: Place, sums: Arc<[u32]>) {
        self.put(id, Known::At(place, sums));
    }

    /// The index does not have a slice, which was looked for after `kept` was asked
    /// for: first among those that are being kept, then in the index. If any of its
    /// group was kept since, it may be this one, and nothing is known.
    pub(super) fn insert_nowhere(&mut self, id: SliceId, kept: u32) {
        if self.kept(&id) == kept {
            self.put(id, Known::Nowhere);
        }
    }

    /// How many slices of this one's group have been kept.
    pub(super) fn kept(&self, id: &SliceId) -> u32 {
        self.kept[group(id)]
    }

    /// A slice can be found among those that are being kept.
    pub(super) fn keep(&mut self, id: &SliceId) {
        let kept = &mut self.kept[group(id)];
        *kept = kept.wrapping_add(1);
        if self.is_nowhere(id) {
            self.remove(id);
        }
    }

    /// Any slice may be in the index now.
    pub(super) fn keep_any(&mut self) {
        self.kept = self.kept.map(|kept| kept.wrapping_add(1));
        self.forget_nowhere();
    }

    /// Nothing is known of a slice any more.
    pub(super) fn remove(&mut self, id: &SliceId) {
        if let Some(known) = self.known.remove(id) {
            self.bytes -= known.bytes();
        }
    }

    fn forget_nowhere(&mut self) {
        self.known.retain(|_, known| matches!(known, Known::At(..)));
        self.bytes = self.known.values().map(Known::bytes).sum();
    }

    /// When there is no room those go that are nowhere, and all if that is not enough.
    fn put(&mut self, id: SliceId, known: Known) {
        self.remove(&id);
        if self.bytes + known.bytes() > BYTES_MAX {
            self.forget_nowhere();
            if self.bytes > BYTES_MAX / 2 {
                (self.known, self.bytes) = Default::default();
            }
        }
        self.bytes += known.bytes();
        self.known.insert(id, known);
    }
}

fn group(id: &SliceId) -> usize {
    // A generation is a keyed hash.
    (id.generation.0 as usize).wrapping_add(id.index as usize) % GROUPS
}

#[cfg(test)]
mod tests {
    use pingora_slice_cluster::Generation;

    use super::*;

    fn id(index: u32) -> SliceId {
        SliceId {
            generation: Generation(7),
            index,
        }
    }

    #[test]
    fn what_is_kept_while_it_is_looked_for_is_not_taken_for_absent() {
        let mut places = Places::default();
        let before = places.kept(&id(1));
        places.keep(&id(1));
        places.insert_nowhere(id(1), before);
        assert!(!places.is_nowhere(&id(1)));
        // Another of its group, too: it is not known which.
        let before = places.kept(&id(1));
        places.keep(&id(1 + GROUPS as u32));
        places.insert_nowhere(id(1), before);
        assert!(!places.is_nowhere(&id(1)));
        places.insert_nowhere(id(1), places.kept(&id(1)));
        assert!(places.is_nowhere(&id(1)));
    }

    #[test]
    fn what_is_absent_is_asked_for_again_once_it_may_be_there() {
        let mut places = Places::default();
        for index in 0..3 {
            places.insert_nowhere(id(index), 0);
        }
        places.keep(&id(0));
        assert!(!places.is_nowhere(&id(0)) && places.is_nowhere(&id(1)));
        let before = places.kept(&id(9));
        places.keep_any();
        places.insert_nowhere(id(9), before);
        assert!((0..10).all(|index| !places.is_nowhere(&id(index))));
        assert_eq!(places.bytes, 0);
    }

    #[test]
    fn memory_is_bounded() {
        let mut places = Places::default();
        for index in 0..100_000 {
            places.insert_nowhere(id(index), 0);
            assert!(places.bytes <= BYTES_MAX && places.is_nowhere(&id(index)));
        }
        assert_eq!(places.bytes, places.known.len() * ITEM_BYTES);
        // Places outlive them.
        let place = Place {
            region: 0,
            generation: 1,
            offset: 0,
            len: 65_536,
        };
        places.insert(id(0), place, [7; 4].into());
        for index in 1..100_000 {
            places.insert_nowhere(id(index), 0);
        }
        assert!(places.get(&id(0)).is_some());
    }
}
