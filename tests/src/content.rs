//! Bytes that need no memory: any range of any version of any object, computed.
//!
//! The origin generates them as it sends, the client generates them again as it
//! compares, so an object of a gigabyte costs neither side more than a block.

use std::ops::Range;

use bytes::Bytes;
use rand::rngs::SmallRng;
use rand::{RngCore, SeedableRng};

/// Bytes generated from one seed; the unit of random access.
const BLOCK_BYTES: u64 = 64 * 1024;

/// One version of an object's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Content {
    /// Tells objects (and variants of one object) apart.
    pub seed: u64,
    /// Counted from 1; each change is a new one.
    pub version: u32,
    /// Total length in bytes.
    pub length: u64,
}

impl Content {
    /// The bytes of `range`, which must lie inside the content.
    pub fn bytes(&self, range: Range<u64>) -> Bytes {
        assert!(
            range.start <= range.end && range.end <= self.length,
            "{range:?} of {self:?}"
        );
        let mut out = vec![0; usize::try_from(range.end - range.start).expect("fits memory")];
        let mut offset = range.start;
        let mut rest = &mut out[..];
        while !rest.is_empty() {
            let within = offset % BLOCK_BYTES;
            let take = rest.len().min((BLOCK_BYTES - within) as usize);
            let (head, tail) = rest.split_at_mut(take);
            let mut rng = self.generator(offset / BLOCK_BYTES);
            if take as u64 == BLOCK_BYTES {
                rng.fill_bytes(head);
            } else {
                let mut block = [0; BLOCK_BYTES as usize];
                rng.fill_bytes(&mut block);
                head.copy_from_slice(&block[within as usize..within as usize + take]);
            }
            offset += take as u64;
            rest = tail;
        }
        out.into()
    }

    /// All bytes at once; for objects that fit memory.
    pub fn all(&self) -> Bytes {
        self.bytes(0..self.length)
    }

    /// Where `bytes`, found at `offset` of a body, first differ from this
    /// content; `None` when they are equal.
    pub fn difference(&self, offset: u64, bytes: &[u8]) -> Option<u64> {
        let end = (offset + bytes.len() as u64).min(self.length);
        let expected = self.bytes(offset.min(end)..end);
        if expected == bytes {
            return None;
        }
        let equal = expected
            .iter()
            .zip(bytes)
            .take_while(|(a, b)| a == b)
            .count();
        Some(offset + equal as u64)
    }

    fn generator(&self, block: u64) -> SmallRng {
        // Odd multipliers keep (seed, version, block) apart before SmallRng mixes them.
        let seed = self
            .seed
            .wrapping_mul(0x9e37_79b9_7f4a_7c15)
            .wrapping_add(u64::from(self.version).wrapping_mul(0xd6e8_feb8_6659_fd93))
            .wrapping_add(block.wrapping_mul(0xa076_1d64_78bd_642f));
        SmallRng::seed_from_u64(seed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_range_is_a_piece_of_the_whole() {
        let content = Content {
            seed: 3,
            version: 1,
            length: 3 * BLOCK_BYTES + 77,
        };
        let whole = content.all();
        for range in [0..0, 0..1, 65_535..65_537, 1..190_000, 196_608..196_685] {
            assert_eq!(
                content.bytes(range.clone()),
                whole[range.start as usize..range.end as usize]
            );
        }
    }

    #[test]
    fn versions_differ_everywhere() {
        let old = Content {
            seed: 3,
            version: 1,
            length: 4 * BLOCK_BYTES,
        };
        let new = Content { version: 2, ..old };
        for start in (0..old.length).step_by(1000) {
            let end = (start + 16).min(old.length);
            assert!(new.difference(start, &old.bytes(start..end)).is_some());
            assert_eq!(old.difference(start, &old.bytes(start..end)), None);
        }
    }
}
