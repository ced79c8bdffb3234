//! CRC-32C (RFC 9260 appendix A): the checksum of bytes in memory, on disk and
//! between nodes.

use crc_fast::{CrcAlgorithm, Digest};

const CRC_32C: CrcAlgorithm = CrcAlgorithm::Crc32Iscsi;

/// Of these bytes.
pub fn crc32c(bytes: &[u8]) -> u32 {
    crc_fast::crc32_iscsi(bytes)
}

/// Of the bytes that `before` is the sum of, and of these after them.
pub fn crc32c_append(before: u32, bytes: &[u8]) -> u32 {
    // The sum is the complement of the register.
    let mut digest = Digest::new_with_init_state(CRC_32C, u64::from(!before));
    digest.update(bytes);
    digest.finalize() as u32
}

/// Of two runs of bytes, one after the other, from the sum of each.
pub fn crc32c_combine(first: u32, second: u32, second_bytes: usize) -> u32 {
    let (first, second) = (first.into(), second.into());
    crc_fast::checksum_combine(CRC_32C, first, second, second_bytes as u64) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bit by bit, as RFC 9260 gives the polynomial.
    fn plain(bytes: &[u8]) -> u32 {
        let step = |sum: u32, _| (sum >> 1) ^ (0x82F6_3B78 & (sum & 1).wrapping_neg());
        !bytes
            .iter()
            .fold(!0, |sum, byte| (0..8).fold(sum ^ u32::from(*byte), step))
    }

    #[test]
    fn is_what_the_rfc_says_however_it_is_put_together() {
        assert_eq!(crc32c(b"123456789"), 0xE306_9283);
        let bytes: Vec<u8> = (0..9000u32)
            .map(|n| (n.wrapping_mul(31) >> 3) as u8)
            .collect();
        for end in [0, 1, 7, 8, 63, 64, 255, 256, 257, 1023, 4096, 4097, 9000] {
            let whole = plain(&bytes[..end]);
            assert_eq!(crc32c(&bytes[..end]), whole, "{end}");
            for cut in [0, 1, 5, end / 3, end / 2, end] {
                let (first, second) = bytes[..end].split_at(cut.min(end));
                let (first, sum) = (plain(first), plain(second));
                assert_eq!(crc32c_append(first, second), whole, "{end} {cut}");
                assert_eq!(
                    crc32c_combine(first, sum, second.len()),
                    whole,
                    "{end} {cut}"
                );
            }
        }
    }
}
