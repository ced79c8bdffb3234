//! What is stored: slices with their checksums.
//!
//! A CRC-32C goes with the bytes from where they landed to the client, to disk and to
//! peers. Where a processor takes it slowly, what lies in memory and is given again
//! and again has quick sums beside it: each is taken of bytes that the CRC then finds
//! intact, so that no damage falls between the two.

use std::ops::{Deref, Range};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};

use bytes::{Bytes, BytesMut};
use pingora_slice_cluster::crc32c::crc32c_append;
use pingora_slice_cluster::wire::Part;

/// A checksum covers this many bytes of a slice (the last one fewer).
pub const PAGE_BYTES: usize = 64 * 1024;

/// Granularity at which part of a page is verified.
const STEP_BYTES: usize = 4 * 1024;
const STEPS: usize = PAGE_BYTES / STEP_BYTES;

/// The same for what is read from disk, where a finer sum would cost the index
/// more: a 4096th of the bytes.
pub const DISK_STEP_BYTES: usize = 16 * 1024;
const _: () = assert!(
    PAGE_BYTES.is_multiple_of(DISK_STEP_BYTES) && DISK_STEP_BYTES.is_multiple_of(STEP_BYTES)
);

/// Bytes that have just arrived, or been checked, in parts of a page.
pub(crate) fn pages(mut bytes: Bytes) -> impl Iterator<Item = Part> {
    std::iter::from_fn(move || {
        let page = bytes.split_to(bytes.len().min(PAGE_BYTES));
        (!page.is_empty()).then(|| Part::new(page))
    })
}

/// A slice in memory: one run of bytes and a CRC-32C for each page of it,
/// computed when the bytes came from the origin and carried everywhere since.
/// Cheap to clone.
#[derive(Clone, Debug)]
pub struct Slice {
    bytes: Bytes,
    growing: Growing,
    quick: Option<QuickSums>,
}

/// The sums while they grow: at the end of each step, that of its page up
/// to there. So a part of a page is checked without reading all of it.
#[derive(Clone, Debug, PartialEq)]
enum Growing {
    /// Of one step: a small object's lies beside the rest of its slice.
    One(u32),
    Steps(Arc<[u32]>),
}

impl Deref for Growing {
    type Target = [u32];

    fn deref(&self) -> &[u32] {
        match self {
            Growing::One(sum) => std::slice::from_ref(sum),
            Growing::Steps(sums) => sums,
        }
    }
}

impl Slice {
    /// A slice of bytes that have just arrived: computes the checksums.
    pub fn new(bytes: Bytes) -> Self {
        let mut sums = Sums::default();
        sums.add(&bytes);
        Slice {
            bytes,
            growing: sums.growing(),
            quick: None,
        }
    }

    /// The same, to be given again and again.
    pub fn to_be_kept(self) -> Slice {
        let is_worth_it = self.len() >= PAGE_BYTES && *IS_CRC_SLOW;
        let quick = is_worth_it.then(|| QuickSums::of_slice(self.len()));
        Slice { quick, ..self }
    }

    /// A slice of which one bit has flipped since.
    #[cfg(test)]
    pub fn with_flipped_bit(&self, at: usize) -> Slice {
        let mut bytes = self.bytes.to_vec();
        bytes[at] ^= 1;
        Slice {
            bytes: bytes.into(),
            growing: self.growing.clone(),
            quick: self.quick.clone(),
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
        disk_sums(&self.growing)
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether it holds no bytes.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// What it takes of memory, bytes: its sums, too.
    pub fn held_bytes(&self) -> usize {
        let quick = self.quick.as_ref().map_or(0, |quick| quick.0.len());
        self.len() + size_of_val(&*self.growing) + quick * size_of::<AtomicU64>()
    }

    /// Whether the bytes of `range`, and what else lies in the steps that it
    /// touches, still match their checksums.
    pub fn is_intact_in(&self, range: Range<usize>) -> bool {
        let start = range.start / STEP_BYTES * STEP_BYTES;
        let end = range.end.next_multiple_of(STEP_BYTES).min(self.len());
        let bytes = &self.bytes[start..end];
        let by_crc = || are_intact(bytes, start, &self.growing, STEP_BYTES);
        match &self.quick {
            Some(quick) => quick.are_intact(bytes, start, by_crc),
            None => by_crc(),
        }
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

/// A slice as it landed: its bytes in parts, each where it came to lie. Cheap to
/// clone.
#[derive(Clone, Debug)]
pub struct SliceParts {
    parts: Arc<[Bytes]>,
    growing: Growing,
}

impl SliceParts {
    /// Of parts in order, and the sums of all of them.
    pub fn new(parts: impl Iterator<Item = Bytes>, sums: Sums) -> SliceParts {
        SliceParts {
            parts: parts.collect(),
            growing: sums.growing(),
        }
    }

    /// The bytes, in order.
    pub fn parts(&self) -> &[Bytes] {
        &self.parts
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.parts.iter().map(Bytes::len).sum()
    }

    /// Whether it holds no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// As [`Slice::disk_sums`].
    pub fn disk_sums(&self) -> impl Iterator<Item = u32> {
        disk_sums(&self.growing)
    }

    /// A copy of the bytes of `range` (within the slice), if they, and what else
    /// lies in the steps that it touches, match their checksums.
    pub fn checked(&self, range: Range<usize>) -> Option<Bytes> {
        let start = range.start / STEP_BYTES * STEP_BYTES;
        let end = range.end.next_multiple_of(STEP_BYTES).min(self.len());
        let mut bytes = BytesMut::with_capacity(end - start);
        let mut at = 0;
        for part in self.parts.iter() {
            let from = start.clamp(at, at + part.len()) - at;
            let to = end.clamp(at, at + part.len()) - at;
            bytes.extend_from_slice(&part[from..to]);
            at += part.len();
        }
        let bytes = bytes.freeze();
        are_intact(&bytes, start, &self.growing, STEP_BYTES)
            .then(|| bytes.slice(range.start - start..range.end - start))
    }

    /// A copy in one run, which holds nothing of what the parts were views of. Its
    /// sums are those of the bytes as they landed.
    pub fn gather(&self) -> Slice {
        let mut bytes = BytesMut::with_capacity(self.len());
        self.parts
            .iter()
            .for_each(|part| bytes.extend_from_slice(part));
        Slice {
            bytes: bytes.freeze(),
            growing: self.growing.clone(),
            quick: None,
        }
    }
}

impl From<Slice> for SliceParts {
    fn from(slice: Slice) -> SliceParts {
        SliceParts {
            parts: [slice.bytes].into(),
            growing: slice.growing,
        }
    }
}

/// Whether a CRC-32C takes more than twice the time of a quick sum: it does without
/// carry-less multiplication of 512 bits (three times on AMD's third generation).
static IS_CRC_SLOW: LazyLock<bool> = LazyLock::new(|| {
    #[cfg(target_arch = "x86_64")]
    let is_slow = is_x86_feature_detected!("avx2")
        && !(is_x86_feature_detected!("avx512vl") && is_x86_feature_detected!("vpclmulqdq"));
    #[cfg(not(target_arch = "x86_64"))]
    let is_slow = false;
    is_slow
});

/// The quick sum (XXH3) of each step of a slice, as far as they have been taken; 0
/// where not.
#[derive(Clone, Debug)]
struct QuickSums(Arc<[AtomicU64]>);

impl QuickSums {
    fn of_slice(bytes: usize) -> QuickSums {
        let steps = 0..bytes.div_ceil(STEP_BYTES);
        QuickSums(steps.map(|_| AtomicU64::new(0)).collect())
    }

    /// Whether bytes from `at` of the slice on are intact: they begin with a step.
    /// `by_crc` is asked where a sum is still to be taken.
    fn are_intact(&self, bytes: &[u8], at: usize, by_crc: impl FnOnce() -> bool) -> bool {
        let sum = |step| twox_hash::XxHash3_64::oneshot(step).max(1);
        let steps = || bytes.chunks(STEP_BYTES);
        let taken = &self.0[at / STEP_BYTES..][..steps().len()];
        if taken.iter().all(|sum| sum.load(Ordering::Relaxed) != 0) {
            let mut both = steps().zip(taken);
            return both.all(|(step, taken)| sum(step) == taken.load(Ordering::Relaxed));
        }
        let sums: Vec<u64> = steps().map(sum).collect();
        let is_intact = by_crc();
        if is_intact {
            for (taken, sum) in taken.iter().zip(sums) {
                taken.store(sum, Ordering::Relaxed);
            }
        }
        is_intact
    }
}

/// The sums of a slice while it lands.
#[derive(Debug, Default)]
pub struct Sums {
    growing: Vec<u32>,
    len: usize,
    /// Of the page, up to the last byte.
    sum: u32,
}

impl Sums {
    /// Takes in a part that follows; `false` when it is not what its own checksum says.
    #[must_use]
    pub fn add_part(&mut self, part: &Part) -> bool {
        // A peer's parts are the slice's pages: one look is enough for both.
        let is_page =
            self.len.is_multiple_of(PAGE_BYTES) && (1..=PAGE_BYTES).contains(&part.bytes.len());
        self.add(&part.bytes);
        match is_page {
            true => self.sum == part.crc32c,
            false => part.is_intact(),
        }
    }

    /// How many bytes have been taken in.
    pub fn taken(&self) -> usize {
        self.len
    }

    fn add(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            if self.len.is_multiple_of(PAGE_BYTES) {
                self.sum = 0;
            }
            let room = STEP_BYTES - self.len % STEP_BYTES;
            let (step, rest) = bytes.split_at(bytes.len().min(room));
            self.sum = crc32c_append(self.sum, step);
            self.len += step.len();
            if step.len() == room {
                self.growing.push(self.sum);
            }
            bytes = rest;
        }
    }

    fn growing(mut self) -> Growing {
        if !self.len.is_multiple_of(STEP_BYTES) {
            self.growing.push(self.sum);
        }
        match self.growing[..] {
            [sum] => Growing::One(sum),
            _ => Growing::Steps(self.growing.into()),
        }
    }
}

fn disk_sums(growing: &[u32]) -> impl Iterator<Item = u32> {
    growing
        .chunks(DISK_STEP_BYTES / STEP_BYTES)
        .filter_map(|step| step.last().copied())
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_flipped_bit_is_seen_in_what_it_touches_and_nowhere_else() {
        const LEN: usize = PAGE_BYTES + 2 * STEP_BYTES + 100;
        let bytes: Vec<u8> = (0..LEN).map(|n| (n * 31 % 251) as u8).collect();
        let slice = Slice::new(bytes.clone().into());
        let quick = Slice {
            quick: Some(QuickSums::of_slice(LEN)),
            ..slice.clone()
        };
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
                    // Before a sum is taken, and with it.
                    for _ in 0..2 {
                        let damaged = quick.with_flipped_bit(flipped);
                        assert_eq!(damaged.is_intact_in(*start..*end), !is_touched);
                        assert!(quick.is_intact_in(*start..*end));
                    }
                }
            }
        }
    }

    #[test]
    fn sums_are_the_same_however_the_parts_fall() {
        const LEN: usize = 2 * PAGE_BYTES + 3 * STEP_BYTES + 100;
        let bytes: Vec<u8> = (0..LEN).map(|n| (n * 31 % 251) as u8).collect();
        let whole = Slice::new(bytes.clone().into());
        for cut in [1000, STEP_BYTES, 40_000, PAGE_BYTES, PAGE_BYTES + 1, LEN] {
            let parts = || bytes.chunks(cut).map(Bytes::copy_from_slice);
            let mut sums = Sums::default();
            for part in parts() {
                assert!(sums.add_part(&Part::new(part)));
            }
            let landed = SliceParts::new(parts(), sums);
            assert_eq!(landed.len(), LEN);
            assert!(landed.disk_sums().eq(whole.disk_sums()));
            let gathered = landed.gather();
            assert_eq!(gathered.bytes(), whole.bytes());
            assert_eq!(gathered.growing, whole.growing);
            for range in [0..1, 4095..4097, 39_999..80_001, LEN - 1..LEN, 0..LEN, 5..5] {
                let expected = whole.bytes().slice(range.clone());
                assert_eq!(landed.checked(range), Some(expected));
            }
            let mut flipped = bytes.clone();
            flipped[50_000] ^= 1;
            let flipped = SliceParts {
                parts: flipped.chunks(cut).map(Bytes::copy_from_slice).collect(),
                ..landed
            };
            assert_eq!(flipped.checked(49_200..49_201), None, "in the same step");
            assert!(flipped.checked(0..40_000).is_some(), "elsewhere");
            for damaged in 0..LEN.div_ceil(cut) {
                let mut sums = Sums::default();
                let intact = parts().enumerate().map(|(n, bytes)| {
                    let mut part = Part::new(bytes);
                    part.crc32c ^= u32::from(n == damaged);
                    sums.add_part(&part)
                });
                assert_eq!(intact.filter(|intact| !intact).count(), 1, "{cut}");
            }
        }
    }
}
