//! Pre-vote (Ongaro's thesis, section 9.6), which openraft 0.9 lacks.
//!
//! A node that was cut off, paused or restarted has heard nothing, stands for
//! election in ever higher terms, and so deposes a leader that everybody else
//! hears. Here a node stands only while a majority would vote for it: while
//! they hear no leader either, and its log is as long as theirs.
//!
//! Nor does openraft's leader step down when no quorum answers it any more.
//! Those whom it still reaches would go on following it, and vote for nobody
//! whom a quorum would follow: it keeps still until a quorum answers again, or
//! it hears of a later leader.

use std::collections::BTreeSet;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use openraft::LogId;
use openraft::raft::AppendEntriesResponse;
use tokio::time::Instant;

use super::network::{Call, Request};
use super::{ELECTION_MAX, ELECTION_MIN, HEARTBEAT, Shared};
use crate::NodeId;

/// A leader that has had no answer of a quorum for this long looks who is there.
const UNHEARD: Duration = ELECTION_MAX.saturating_mul(2);
/// How long a voter may take to say whether it would vote.
const ANSWER: Duration = Duration::from_millis(300);

/// When this node last heard a leader that it follows.
#[derive(Default)]
pub(super) struct LeaderHeard(Mutex<Option<Instant>>);

impl LeaderHeard {
    /// A leader has written to this node, or tried to.
    pub(super) fn note(&self, answer: &AppendEntriesResponse<u64>) {
        if !matches!(answer, AppendEntriesResponse::HigherVote(_)) {
            *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
        }
    }

    /// How long ago that was; `MAX` if never.
    pub(super) fn ago(&self) -> Duration {
        let at = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        at.map_or(Duration::MAX, |at| at.elapsed())
    }
}

/// Whether `willing` are a majority of the voters, in both halves of a change
/// of membership.
pub(super) fn is_majority(voters: &[BTreeSet<u64>], willing: &BTreeSet<u64>) -> bool {
    let mut halves = voters.iter();
    halves.all(|half| 2 * half.intersection(willing).count() > half.len())
}

impl Shared {
    /// Lets this node stand for election while a majority would vote for it.
    pub(super) async fn pre_vote(self: Arc<Self>) {
        let mut leads_since = None;
        loop {
            self.keep_still_without_quorum(&mut leads_since).await;
            let silent_for = self.leader_heard.ago();
            let is_silent = silent_for >= ELECTION_MIN && !self.is_leader();
            let may_stand = is_silent && self.would_win().await;
            self.raft.runtime_config().elect(may_stand);
            let pause = ELECTION_MIN.saturating_sub(silent_for).max(HEARTBEAT);
            tokio::time::sleep(pause).await;
        }
    }

    /// Has this node, if it leads, say nothing to anybody while no quorum answers
    /// it: no heartbeat, no read round, no entry.
    async fn keep_still_without_quorum(&self, leads_since: &mut Option<Instant>) {
        if !self.is_leader() {
            *leads_since = None;
        }
        let leads_for = match self.is_leader() {
            true => leads_since.get_or_insert_with(Instant::now).elapsed(),
            false => Duration::ZERO,
        };
        let answered = self.raft.metrics().borrow().millis_since_quorum_ack;
        let unheard = answered.map_or(leads_for, |ms| leads_for.min(Duration::from_millis(ms)));
        let mut deserted = unheard >= UNHEARD;
        if deserted {
            let voters = self.voting();
            let all = voters.iter().flatten().copied().collect();
            deserted = !is_majority(&voters, &self.answering(all).await);
        }
        if self.deserted.swap(deserted, Ordering::Relaxed) != deserted {
            tracing::info!(deserted, "a leader keeps still while no quorum answers it");
        }
        self.raft.runtime_config().heartbeat(!deserted);
    }

    /// Whether this node leads, and no quorum answers it.
    pub(super) fn is_deserted(&self) -> bool {
        self.deserted.load(Ordering::Relaxed)
    }

    /// Whose votes count: two sets while they are being changed.
    pub(super) fn voting(&self) -> Vec<BTreeSet<u64>> {
        let metrics = self.raft.server_metrics();
        let metrics = metrics.borrow();
        let membership = metrics.membership_config.membership();
        membership.get_joint_config().clone()
    }

    fn pre_vote_request(&self, last_log: Option<LogId<u64>>) -> Request {
        Request::Raft {
            cluster: self.replica.state().cluster_id(),
            call: Call::PreVote { last_log },
        }
    }

    /// Who of `nodes` answers now, this node among them.
    pub(super) async fn answering(&self, nodes: BTreeSet<u64>) -> BTreeSet<u64> {
        let request = self.pre_vote_request(None);
        let ask = async |id: u64| {
            let peers = &self.peers;
            let answer = peers.control_aside::<_, bool>(NodeId(id), &request, ANSWER);
            (id == self.me.0 || answer.await.is_ok()).then_some(id)
        };
        let answers = futures::future::join_all(nodes.into_iter().map(ask));
        answers.await.into_iter().flatten().collect()
    }

    /// Whether a majority would vote for this node.
    async fn would_win(&self) -> bool {
        let voters = self.voting();
        let last_log = self.last_log();
        let mut answers: FuturesUnordered<_> = voters
            .iter()
            .flatten()
            .filter(|id| **id != self.me.0)
            .collect::<BTreeSet<_>>()
            .into_iter()
            .map(|id| async move {
                let request = self.pre_vote_request(last_log);
                let peer = NodeId(*id);
                let answer = self.peers.control_aside(peer, &request, ANSWER).await;
                answer.unwrap_or(false).then_some(*id)
            })
            .collect();
        let mut willing = BTreeSet::from([self.me.0]);
        while !is_majority(&voters, &willing) {
            match answers.next().await {
                Some(answer) => willing.extend(answer),
                None => return false,
            }
        }
        true
    }

    /// Whether this node would vote for one whose log ends at `last_log`: as
    /// openraft, not within the lease of a leader, nor for a shorter log. A leader
    /// that no quorum answers would vote for one whom more can hear.
    pub(super) fn would_vote(&self, last_log: Option<LogId<u64>>) -> bool {
        let leads = self.is_leader() && !self.is_deserted();
        !leads && self.leader_heard.ago() >= ELECTION_MAX && last_log >= self.last_log()
    }

    pub(super) fn is_leader(&self) -> bool {
        self.raft.server_metrics().borrow().state.is_leader()
    }

    fn last_log(&self) -> Option<LogId<u64>> {
        self.raft.data_metrics().borrow().last_log
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_of_membership_needs_a_majority_of_both_halves() {
        let voters = [BTreeSet::from([1, 2, 3]), BTreeSet::from([3, 4, 5])];
        let settled = &voters[..1];
        assert!(is_majority(settled, &BTreeSet::from([1, 3])));
        assert!(!is_majority(settled, &BTreeSet::from([1, 4, 5])));
        assert!(!is_majority(&voters, &BTreeSet::from([1, 2, 3])));
        assert!(is_majority(&voters, &BTreeSet::from([2, 3, 4])));
    }
}
