//! Memory that reads go into, used again and again.
//!
//! What may only be read without waiting is read into memory that has been
//! written before, so each new buffer would be zeroed first; and a large one that
//! is given back to the allocator comes from the kernel again, page by page.
//! Whole steps of slices are kept: the usual reads.

use std::sync::{Arc, Mutex, MutexGuard, Weak};

use crate::slice::DISK_STEP_BYTES;

/// Bytes kept for later reads at most.
const FREE_BYTES_MAX: usize = 2 << 20;

/// The buffers that nobody uses.
#[derive(Debug, Default)]
pub struct Buffers {
    free: Mutex<Vec<Vec<u8>>>,
}

impl Buffers {
    /// A buffer of this length; what it holds is left over from its last use.
    pub fn take(self: &Arc<Self>, len: usize) -> Buffer {
        let mut free = self.free();
        let at = free.iter().rposition(|buffer| buffer.len() == len);
        let kept = at.map(|at| free.remove(at));
        drop(free);
        Buffer {
            bytes: kept.unwrap_or_else(|| zeroed(len)),
            home: Arc::downgrade(self),
        }
    }

    fn give_back(&self, bytes: Vec<u8>) {
        if !bytes.len().is_multiple_of(DISK_STEP_BYTES) {
            return;
        }
        let mut free = self.free();
        free.push(bytes);
        // Those that nobody has taken for longest go first.
        let mut kept: usize = free.iter().map(Vec::len).sum();
        while kept > FREE_BYTES_MAX {
            kept -= free.remove(0).len();
        }
    }

    fn free(&self) -> MutexGuard<'_, Vec<Vec<u8>>> {
        self.free.lock().expect("no panic while held")
    }
}

#[expect(
    clippy::slow_vector_initialization,
    reason = "for zeros of its own jemalloc gives the memory back to the kernel, and each page is faulted in"
)]
fn zeroed(len: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(len);
    bytes.resize(len, 0);
    bytes
}

/// One in use; given back when dropped.
#[derive(Debug)]
pub struct Buffer {
    bytes: Vec<u8>,
    home: Weak<Buffers>,
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl AsMut<[u8]> for Buffer {
    fn as_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Some(home) = self.home.upgrade() {
            home.give_back(std::mem::take(&mut self.bytes));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_steps_are_used_again_and_no_more_kept_than_allowed() {
        let buffers = Arc::<Buffers>::default();
        let mut first = buffers.take(DISK_STEP_BYTES);
        first.as_mut()[0] = 7;
        drop(first);
        assert_eq!(buffers.take(2 * DISK_STEP_BYTES).as_ref()[0], 0);
        assert_eq!(buffers.take(DISK_STEP_BYTES).as_ref()[0], 7);
        drop(buffers.take(DISK_STEP_BYTES - 1));
        let many: Vec<Buffer> = (0..200).map(|_| buffers.take(DISK_STEP_BYTES)).collect();
        drop(many);
        drop(buffers.take(FREE_BYTES_MAX / 2));
        let kept: usize = buffers.free().iter().map(Vec::len).sum();
        assert_eq!(kept, FREE_BYTES_MAX);
        let lengths = buffers.free().iter().map(Vec::len).max();
        assert_eq!(lengths, Some(FREE_BYTES_MAX / 2), "the last one is kept");
        assert!(
            buffers
                .free()
                .iter()
                .all(|kept| kept.len().is_multiple_of(DISK_STEP_BYTES))
        );
    }
}
