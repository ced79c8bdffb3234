//! Whose turn it is to have something validated that is served stale meanwhile.
//!
//! Hits come by the thousand while an origin takes its time: one of them sees to
//! it, the others have nothing to do with it. Not here: how that is done
//! (`Engine::resolve_for`), and that requests to the origin are joined anyway.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use pingora_slice_cluster::PurgeIndex;
use pingora_slice_cluster::purge::{Floor, joinable};

/// The turns that are taken: under which key the manifest is kept, which names
/// its variant, and the purge index applied when the turn was.
#[derive(Clone, Default)]
pub(super) struct Turns {
    taken: Arc<Mutex<HashMap<u128, PurgeIndex>>>,
}

/// Nobody else's turn, until it is dropped, which a panic does too.
#[must_use = "a dropped turn is over"]
pub(super) struct Turn {
    turns: Turns,
    at: u128,
    stamp: PurgeIndex,
}

impl Turns {
    /// Takes the turn for what is kept at `at`. `None`: somebody has it, and is
    /// not from before a purge, which what they bring would not outlive (rule 6).
    pub(super) fn take(&self, at: u128, applied: PurgeIndex, floor: Floor) -> Option<Turn> {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if taken.get(&at).is_some_and(|stamp| joinable(*stamp, floor)) {
            return None;
        }
        taken.insert(at, applied);
        Some(Turn {
            turns: self.clone(),
            at,
            stamp: applied,
        })
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let taken = &self.turns.taken;
        let mut taken = taken.lock().unwrap_or_else(PoisonError::into_inner);
        // After a purge it may be another's.
        if taken.get(&self.at) == Some(&self.stamp) {
            taken.remove(&self.at);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NEVER_PURGED: Floor = Floor {
        plain: PurgeIndex(0),
        soft: PurgeIndex(0),
        hard: PurgeIndex(0),
    };

    fn purged_at(index: u64) -> Floor {
        Floor {
            soft: PurgeIndex(index),
            ..NEVER_PURGED
        }
    }

    #[test]
    fn a_turn_is_one_at_a_time_for_each_variant() {
        let turns = Turns::default();
        let take = |at| turns.take(at, PurgeIndex(5), NEVER_PURGED);
        let (first, other) = (take(1), take(2));
        assert!(first.is_some() && other.is_some());
        assert!(take(1).is_none() && take(2).is_none());
        drop(first);
        assert!(take(1).is_some() && take(2).is_none());
        drop(other);
        assert!(turns.taken.lock().unwrap().is_empty());
    }

    #[test]
    fn a_turn_from_before_a_purge_holds_up_nobody_after_it() {
        let turns = Turns::default();
        let before = turns.take(1, PurgeIndex(5), NEVER_PURGED).unwrap();
        assert!(turns.take(1, PurgeIndex(7), purged_at(5)).is_none());
        let after = turns.take(1, PurgeIndex(7), purged_at(6)).unwrap();
        // Its end is its own.
        drop(before);
        assert!(turns.take(1, PurgeIndex(7), purged_at(6)).is_none());
        drop(after);
        assert!(turns.take(1, PurgeIndex(7), purged_at(6)).is_some());
    }

    #[tokio::test]
    async fn a_panic_ends_the_turn() {
        let turns = Turns::default();
        let turn = turns.take(1, PurgeIndex(5), NEVER_PURGED);
        let task = tokio::spawn(async move {
            let _turn = turn;
            tokio::task::yield_now().await;
            panic!("on purpose");
        });
        assert!(task.await.is_err());
        assert!(turns.take(1, PurgeIndex(5), NEVER_PURGED).is_some());
    }
}
