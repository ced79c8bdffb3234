//! What this node has applied, published for readers that must not wait.
//!
//! The log's applier is the one writer. It changes the state, then publishes,
//! in this order: the view, the version, the applied index. Whoever reads an
//! index or a version here therefore finds floors that are at least as new
//! (rule 9). What is *settled*, and so may be acknowledged, is what was applied,
//! once the answers that a hard purge ends have had notice. Not here: where entries come from (`raft`, `alone`).

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};
use std::time::Duration;

use arc_swap::ArcSwap;
use tokio::sync::watch;

use crate::handle::View;
use crate::purge::{Floor, PurgeMode, Subject};
use crate::running::{Epoch, Over, Running};
use crate::state::{ClusterState, Command, Outcome};
use crate::{NodeId, PurgeIndex};

/// How long a hard purge waits for answers to end, at most. They have notice at
/// once: what is not gone by now is a thread that stands still.
const ENDING_MAX: Duration = Duration::from_millis(250);

/// The same with this lease: two purges in turn wait well below half of it, after
/// which this node would be let go (rule 13). A machine alone has none.
fn ending_max(lease: Option<Duration>) -> Duration {
    lease.map_or(ENDING_MAX, |lease| ENDING_MAX.min(lease / 8))
}

/// See the module's text.
pub(crate) struct Replica {
    me: NodeId,
    state: RwLock<ClusterState>,
    view: ArcSwap<View>,
    version: AtomicU64,
    applied: AtomicU64,
    /// The applied index again, for those who wait.
    progress: watch::Sender<PurgeIndex>,
    /// Counts the views published, for those who wait.
    views: watch::Sender<u64>,
    running: Running,
    /// Hard purges whose answers may not all have ended, numbered.
    ending: Mutex<Vec<(u64, Over)>>,
    settled: watch::Sender<PurgeIndex>,
}

impl Replica {
    /// The replica of node `me`, as it was left in `state`.
    pub(crate) fn new(me: NodeId, state: ClusterState) -> Arc<Replica> {
        let applied = state.applied();
        Arc::new(Replica {
            me,
            view: ArcSwap::from_pointee(view(me, &state, None)),
            state: RwLock::new(state),
            version: AtomicU64::new(1),
            applied: AtomicU64::new(applied.0),
            progress: watch::Sender::new(applied),
            views: watch::Sender::new(0),
            running: Running::default(),
            ending: Mutex::default(),
            settled: watch::Sender::new(applied),
        })
    }

    /// Applies entries in order; those without a command only move the index.
    pub(crate) fn apply(
        &self,
        entries: impl IntoIterator<Item = (PurgeIndex, Option<Command>)>,
    ) -> Vec<Outcome> {
        let (mut view_changes, mut floors_rise, mut hard) = (false, false, false);
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        let outcomes = entries
            .into_iter()
            .map(|(index, command)| match command {
                Some(command) => {
                    let purges = matches!(command, Command::Purge { .. } | Command::Fold { .. });
                    floors_rise |= purges;
                    hard |= is_hard(&command);
                    view_changes |= !purges;
                    state.apply(index.0, &command)
                }
                None => {
                    state.advance(index.0);
                    Outcome::Done
                }
            })
            .collect();
        drop(state);
        self.publish(view_changes, floors_rise, hard);
        outcomes
    }

    /// Takes over a snapshot; nothing runs backwards (rule 8).
    pub(crate) fn install(&self, snapshot: ClusterState) {
        self.state
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .install(snapshot);
        self.publish(true, true, true);
    }

    fn publish(&self, view_changes: bool, floors_rise: bool, hard: bool) {
        let state = self.state();
        let applied = state.applied();
        if view_changes {
            let before = self.view.load();
            self.view
                .store(Arc::new(view(self.me, &state, Some(&before))));
        }
        drop(state);
        if floors_rise {
            self.version.fetch_add(1, Ordering::Release);
        }
        let mut ending = self.ending();
        if hard {
            ending.push((applied.0, self.running.turn()));
        }
        self.applied.fetch_max(applied.0, Ordering::Release);
        if ending.is_empty() {
            self.settled.send_replace(applied);
        }
        drop(ending);
        if view_changes {
            self.views.send_modify(|count| *count += 1);
        }
        self.progress.send_replace(applied);
    }

    /// Waits until the answers that hard purges end have ended, or had their
    /// time; what was applied when this began is then settled.
    pub(crate) async fn settle(&self) {
        let (applied, ending) = {
            let ending = self.ending();
            (self.applied(), ending.clone())
        };
        let Some((latest, _)) = ending.last() else {
            return;
        };
        let latest = *latest;
        let all = futures::future::join_all(ending.into_iter().map(|(_, over)| over.let_go()));
        let patience = ending_max(self.state().lease());
        let in_time = tokio::time::timeout(patience, all).await;
        if in_time.is_err() {
            tracing::warn!("answers go on after a hard purge: something stands still");
        }
        let mut ending = self.ending();
        ending.retain(|(at, _)| *at > latest);
        // What came meanwhile and had to wait for nothing but these.
        let applied = if ending.is_empty() {
            self.applied()
        } else {
            applied
        };
        self.settled.send_if_modified(|settled| {
            let rises = applied > *settled;
            *settled = applied.max(*settled);
            rises
        });
    }

    /// Follows what may be acknowledged (rule 9).
    pub(crate) fn settled(&self) -> watch::Receiver<PurgeIndex> {
        self.settled.subscribe()
    }

    /// See [`crate::Cluster::answering`].
    pub(crate) fn answering(&self) -> Arc<Epoch> {
        self.running.enter()
    }

    fn ending(&self) -> MutexGuard<'_, Vec<(u64, Over)>> {
        self.ending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The whole state; hold it briefly, the applier waits.
    pub(crate) fn state(&self) -> RwLockReadGuard<'_, ClusterState> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// See [`crate::Cluster::view`].
    pub(crate) fn view(&self) -> Arc<View> {
        self.view.load_full()
    }

    /// See [`crate::Cluster::applied`].
    pub(crate) fn applied(&self) -> PurgeIndex {
        PurgeIndex(self.applied.load(Ordering::Acquire))
    }

    /// See [`crate::Cluster::version`].
    pub(crate) fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }

    /// See [`crate::Cluster::floor`].
    pub(crate) fn floor(&self, subject: &Subject) -> Floor {
        self.state().floors().floor(subject)
    }

    /// See [`crate::Cluster::hard_for_new`].
    pub(crate) fn hard_for_new(&self, subject: &Subject) -> PurgeIndex {
        self.state().floors().hard_for_new(subject)
    }

    /// Follows the applied index.
    pub(crate) fn progress(&self) -> watch::Receiver<PurgeIndex> {
        self.progress.subscribe()
    }

    /// Follows changes of members, ring and hash key.
    pub(crate) fn views(&self) -> watch::Receiver<u64> {
        self.views.subscribe()
    }
}

fn is_hard(command: &Command) -> bool {
    match command {
        Command::Purge { items, .. } => items.iter().any(|item| item.mode == PurgeMode::Hard),
        _ => false,
    }
}

/// The view of `state`. Rings that `before` has are not worked out again.
fn view(me: NodeId, state: &ClusterState, before: Option<&View>) -> View {
    let known = |epoch| {
        let before = before.filter(|before| before.hash_key == state.hash_key())?;
        let mut rings = [&before.ring, &before.previous_ring].into_iter();
        rings.find(|ring| ring.epoch() == epoch).cloned()
    };
    View {
        me,
        hash_key: state.hash_key(),
        members: state.members().clone(),
        ring: known(state.ring_epoch()).unwrap_or_else(|| Arc::new(state.ring())),
        previous_ring: known(state.previous_epoch())
            .unwrap_or_else(|| Arc::new(state.previous_ring())),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::purge::{PurgeItem, Scope};
    use crate::slice::HashKey;

    /// Rule 13 lets a node go that acknowledges nothing for half a lease.
    #[tokio::test]
    async fn an_answer_that_does_not_end_costs_no_lease() {
        let lease = Duration::from_millis(200);
        let found = Command::Found {
            hash_key: HashKey([3; 16]),
            lease,
        };
        let item = PurgeItem {
            scope: Scope::All,
            mode: PurgeMode::Hard,
        };
        let purge = Command::Purge {
            items: vec![item],
            token: 1,
        };
        let replica = Replica::new(NodeId(1), ClusterState::default());
        let _answering = replica.answering();
        replica.apply([(PurgeIndex(1), Some(found)), (PurgeIndex(2), Some(purge))]);
        assert_eq!(*replica.settled().borrow(), PurgeIndex(0));
        let began = Instant::now();
        replica.settle().await;
        let took = began.elapsed();
        assert_eq!(*replica.settled().borrow(), PurgeIndex(2));
        assert!(took < lease / 2, "{took:?}");
        assert_eq!(ending_max(None), ENDING_MAX);
        assert_eq!(ending_max(Some(Duration::from_secs(2))), ENDING_MAX);
    }
}
