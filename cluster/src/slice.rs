//! Objects, generations, slices, and the arithmetic between bytes and slices.
//!
//! An object is cut at multiples of its slice size; slice `i` holds the bytes
//! `[i * S, (i + 1) * S)`, the last one fewer. All arithmetic is on `u64` and
//! checked where a caller's number may be anything.

use std::hash::Hasher;
use std::ops::Range;

use serde::{Deserialize, Serialize};
use siphasher::sip128::{Hasher128, SipHasher13};

/// Smallest slice size that a configuration may ask for (`slice_size`), bytes.
pub const SLICE_BYTES_MIN: u32 = 65_536;
/// Largest slice size that a configuration may ask for (`slice_size`), bytes.
pub const SLICE_BYTES_MAX: u32 = 10 * 1024 * 1024;

/// An object's name: host, path and query hashed to 128 bits with the
/// cluster's key. The full text is kept in the manifest and compared on a hit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ObjectKey(pub u128);

/// One version of an object's bytes. Equal generations, equal bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Generation(pub u128);

/// A slice: immutable, named by its generation and position.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct SliceId {
    /// The version of the object that the bytes belong to.
    pub generation: Generation,
    /// Position in the object, counted in slices.
    pub index: u32,
}

/// The secret with which the cluster hashes names, so that nobody outside can
/// choose URLs that collide. Part of the replicated state.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct HashKey(pub [u8; 16]);

impl std::fmt::Debug for HashKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("HashKey(..)")
    }
}

impl HashKey {
    /// Hashes `parts` as length-prefixed pieces under `domain`: two different
    /// tuples never feed the same bytes to the hash.
    pub fn hash128(&self, domain: u8, parts: &[&[u8]]) -> u128 {
        let mut hasher = SipHasher13::new_with_key(&self.0);
        hasher.write_u8(domain);
        for part in parts {
            hasher.write_u64(part.len() as u64);
            hasher.write(part);
        }
        hasher.finish128().as_u128()
    }

    /// The low half of [`HashKey::hash128`].
    pub fn hash64(&self, domain: u8, parts: &[&[u8]]) -> u64 {
        self.hash128(domain, parts) as u64
    }

    /// The key of the object at `host` (normalised) and `target` (raw path and
    /// query, as it is sent to the origin).
    pub fn object(&self, host: &str, target: &str) -> ObjectKey {
        ObjectKey(self.hash128(DOMAIN_OBJECT, &[host.as_bytes(), target.as_bytes()]))
    }
}

const DOMAIN_OBJECT: u8 = 1;

/// Number of slices in an object of `length` bytes. An empty object has none.
pub fn slice_count(length: u64, slice_bytes: u32) -> u64 {
    length.div_ceil(u64::from(slice_bytes))
}

/// The bytes of slice `index` in an object of `length` bytes; empty past the end.
pub fn slice_range(index: u32, length: u64, slice_bytes: u32) -> Range<u64> {
    let size = u64::from(slice_bytes);
    let start = (u64::from(index) * size).min(length);
    start..(start + size).min(length)
}

/// The slice that byte `offset` lies in, or `None` beyond what 2^32 slices hold.
pub fn slice_at(offset: u64, slice_bytes: u32) -> Option<u32> {
    u32::try_from(offset / u64::from(slice_bytes)).ok()
}

/// A slice that a byte range touches, and the part of it that is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Touched {
    /// Position of the slice in the object.
    pub index: u32,
    /// First wanted byte, counted from the slice's start.
    pub start: u32,
    /// One past the last wanted byte, counted from the slice's start.
    pub end: u32,
}

/// The slices that `range` touches, in order, with the part wanted of each.
pub fn touched(range: Range<u64>, slice_bytes: u32) -> impl Iterator<Item = Touched> {
    let size = u64::from(slice_bytes);
    let first = range.start / size;
    let past = if range.is_empty() {
        first
    } else {
        (range.end - 1) / size + 1
    };
    (first..past).map_while(move |index| {
        let base = index * size;
        Some(Touched {
            index: u32::try_from(index).ok()?,
            start: (range.start.max(base) - base) as u32,
            end: (range.end.min(base + size) - base) as u32,
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_cover_an_object_without_gap_or_overlap() {
        for length in 0..40 {
            for slice_bytes in 1..9 {
                let mut next = 0;
                for index in 0..slice_count(length, slice_bytes) {
                    let range = slice_range(index as u32, length, slice_bytes);
                    assert_eq!(range.start, next);
                    assert!(!range.is_empty());
                    next = range.end;
                }
                assert_eq!(next, length);
            }
        }
    }

    #[test]
    fn touched_parts_add_up_to_the_range() {
        for start in 0..30u64 {
            for end in start..30 {
                let mut next = start;
                for part in touched(start..end, 7) {
                    let base = u64::from(part.index) * 7;
                    assert_eq!(base + u64::from(part.start), next);
                    assert!(part.start < part.end && part.end <= 7);
                    next = base + u64::from(part.end);
                }
                assert_eq!(next, end);
            }
        }
    }

    #[test]
    fn parts_of_a_name_do_not_run_into_one_another() {
        let key = HashKey([7; 16]);
        assert_ne!(key.object("ab", "c"), key.object("a", "bc"));
    }
}
