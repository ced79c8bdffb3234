//! Tells what was read from disk before a change from what is there after it.
//!
//! A record that is read from disk takes its time. What was kept or forgotten
//! meanwhile is newer, and must not be replaced by what was read.

use std::sync::{Mutex, MutexGuard};

/// Counters that records share, 16 KiB of them: a change lets a few others be read
/// again that need not be.
const COUNTERS: usize = 1024;

/// How often records have changed in memory, by their keys.
pub(super) struct Changes([Mutex<u64>; COUNTERS]);

impl Default for Changes {
    fn default() -> Changes {
        Changes([const { Mutex::new(0) }; COUNTERS])
    }
}

impl Changes {
    /// Begins a change of the record under `at`: nobody else's falls into it.
    pub(super) fn begin(&self, at: u128) -> MutexGuard<'_, u64> {
        let mut count = self.counter(at);
        *count += 1;
        count
    }

    /// The changes so far, to be taken before the disk is read.
    pub(super) fn so_far(&self, at: u128) -> u64 {
        *self.counter(at)
    }

    /// Does what is to be done with what was read, unless there was a change since.
    pub(super) fn unless_changed<T>(
        &self,
        at: u128,
        since: u64,
        to_do: impl FnOnce() -> T,
    ) -> Option<T> {
        let count = self.counter(at);
        (*count == since).then(to_do)
    }

    fn counter(&self, at: u128) -> MutexGuard<'_, u64> {
        let counter = &self.0[(at % COUNTERS as u128) as usize];
        counter.lock().expect("no panic while held")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_read_before_a_change_is_not_used_after_it() {
        let changes = Changes::default();
        let read = changes.so_far(7);
        assert_eq!(changes.unless_changed(7, read, || "used"), Some("used"));
        drop(changes.begin(8));
        assert!(changes.unless_changed(7, read, || ()).is_some());
        drop(changes.begin(7));
        assert!(changes.unless_changed(7, read, || ()).is_none());
        assert!(
            changes
                .unless_changed(7, changes.so_far(7), || ())
                .is_some()
        );
    }
}
