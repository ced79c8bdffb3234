//! Counts what each node has under way here, so that none takes the room of
//! the others.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::NodeId;

/// What is under way, by node; nodes with nothing are not listed.
#[derive(Clone, Default)]
pub(crate) struct Shares(Arc<Mutex<HashMap<NodeId, usize>>>);

/// One thing under way, until it is dropped.
pub(crate) struct Share {
    of: Shares,
    node: NodeId,
}

impl Shares {
    /// One more for `node`, unless it has `most` already.
    pub(crate) fn take(&self, node: NodeId, most: usize) -> Option<Share> {
        let mut counts = self.lock();
        let taken = counts.get(&node).copied().unwrap_or(0);
        if taken >= most {
            return None;
        }
        counts.insert(node, taken + 1);
        let of = self.clone();
        Some(Share { of, node })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<NodeId, usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut counts = self.of.lock();
        if let Some(taken) = counts.get_mut(&self.node) {
            *taken -= 1;
            if *taken == 0 {
                counts.remove(&self.node);
            }
        }
    }
}
