//! How much memory a parser asks for: an allocator that looks.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

struct Looking;

thread_local! {
    static LARGEST: Cell<usize> = const { Cell::new(0) };
}

fn note(bytes: usize) {
    // A thread that ends allocates without being looked at.
    let _ = LARGEST.try_with(|largest| largest.set(largest.get().max(bytes)));
}

// SAFETY: every call is the system allocator's own; a thread-local number is
// written beside it, which neither allocates nor has a destructor.
unsafe impl GlobalAlloc for Looking {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        note(layout.size());
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        note(layout.size());
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        note(bytes);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.realloc(block, layout, bytes) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: the caller's promises are passed on.
        unsafe { System.dealloc(block, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Looking = Looking;

/// Runs `work`; its result, and the size of the largest block that it asked for.
pub fn largest_allocation<T>(work: impl FnOnce() -> T) -> (T, usize) {
    LARGEST.with(|largest| largest.set(0));
    let result = work();
    (result, LARGEST.with(Cell::get))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_block_is_seen() {
        let (sum, bytes) = largest_allocation(|| {
            let small = std::hint::black_box(vec![1u8; 100]);
            let large = std::hint::black_box(vec![0u8; 1 << 20]);
            small.len() + large.len()
        });
        assert_eq!((sum, bytes), (100 + (1 << 20), 1 << 20));
    }
}
