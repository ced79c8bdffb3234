//! Rows of the index: what stands in the database for a slice or a manifest.
//!
//! A first byte tells kind and format; all numbers are big-endian.

use std::sync::Arc;

use bytes::Bytes;
use pingora_slice_cluster::SliceId;

use super::region::{Place, decode_sums};
use crate::slice::{DISK_STEP_BYTES, Slice};

/// Slices up to this size live in their row: no page of a region, no second read.
pub const INLINE_BYTES_MAX: usize = 8 << 10;
const _: () = assert!(
    INLINE_BYTES_MAX <= DISK_STEP_BYTES,
    "an inline row has one sum"
);

/// Hides what older epochs say.
pub const FORGOTTEN: u8 = 0;
/// 1 had a sum for each page.
const IN_REGION: u8 = 3;
const INLINE: u8 = 2;
/// An encoded manifest follows.
pub const MANIFEST: u8 = 1;

/// What is kept of a slice.
#[derive(Clone, Debug)]
pub enum SliceRow {
    /// In a region, with its [`Slice::disk_sums`].
    InRegion(Place, Arc<[u32]>),
    /// The slice itself.
    Inline(Slice),
}

/// The key of a slice: a generation's slices are neighbours, in order.
pub fn slice_key(id: SliceId) -> [u8; 20] {
    let mut key = [0; 20];
    key[..16].copy_from_slice(&id.generation.0.to_be_bytes());
    key[16..].copy_from_slice(&id.index.to_be_bytes());
    key
}

/// The row of a slice.
pub fn encode_slice(row: &SliceRow) -> Vec<u8> {
    match row {
        SliceRow::InRegion(place, sums) => {
            let mut row = vec![IN_REGION];
            row.extend_from_slice(&place.region.to_be_bytes());
            row.extend_from_slice(&place.generation.to_be_bytes());
            row.extend_from_slice(&place.offset.to_be_bytes());
            row.extend_from_slice(&place.len.to_be_bytes());
            row.extend(sums.iter().flat_map(|sum| sum.to_be_bytes()));
            row
        }
        SliceRow::Inline(slice) => {
            let sums = slice.disk_sums().flat_map(u32::to_be_bytes);
            std::iter::once(INLINE)
                .chain(sums)
                .chain(slice.bytes().iter().copied())
                .collect()
        }
    }
}

/// A slice from its row; `None` when it is forgotten, or damaged.
pub fn decode_slice(row: &[u8]) -> Option<SliceRow> {
    match row.split_first()? {
        (&IN_REGION, rest) => {
            let (region, rest) = rest.split_first_chunk()?;
            let (generation, rest) = rest.split_first_chunk()?;
            let (offset, rest) = rest.split_first_chunk()?;
            let (len, sums) = rest.split_first_chunk()?;
            let place = Place {
                region: u32::from_be_bytes(*region),
                generation: u64::from_be_bytes(*generation),
                offset: u32::from_be_bytes(*offset),
                len: u32::from_be_bytes(*len),
            };
            let is_whole = sums.len() == 4 * (place.len as usize).div_ceil(DISK_STEP_BYTES);
            is_whole.then(|| SliceRow::InRegion(place, decode_sums(sums)))
        }
        (&INLINE, rest) => {
            let (sum, bytes) = rest.split_at_checked(4)?;
            // Copied, so that a small slice does not hold a block of the database in memory.
            Slice::verified(Bytes::copy_from_slice(bytes), &decode_sums(sum)).map(SliceRow::Inline)
        }
        _ => None,
    }
}
