//! The shell around [`crate::lease`]: clocks, messages, timers.
//!
//! Every node asks the leader to go on answering from cache, and tells it what
//! it has applied as soon as it has (rule 9), so that a purge is answered
//! after one more round trip and not at the next renewal. The leader feeds its
//! [`LeaseTable`] and does what the table says.
//!
//! A leader begins by writing an entry of its own, *in this process*: openraft
//! lets a leader that was restarted go on in its old term, where it no longer
//! knows what it has answered before; all of that lies below this entry.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::time::{ClockId, clock_gettime};
use tokio::sync::{oneshot, watch};
use tokio::time::Instant;

use super::Shared;
use super::network::Request;
use super::store::LogId;
use crate::handle::{PurgeReceipt, StartError};
use crate::lease::{
    Grant, Incarnation, Input, LeaseHolder, LeaseTable, Output, Refusal, Renewal, Standing,
};
use crate::slice::HashKey;
use crate::state::{ClusterId, Command};
use crate::{NodeId, PurgeIndex};

/// How long the leader may take to answer a renewal or an acknowledgement.
const ANSWER: Duration = Duration::from_secs(1);
/// Before an acknowledgement that did not arrive is sent again.
const AGAIN: Duration = Duration::from_millis(50);
/// How often the clocks are compared (rule 17), and renewals looked after at least.
const COMPARE: Duration = Duration::from_millis(100);
/// Time without a lease before logging, and between logs.
const TELL_EVERY: Duration = Duration::from_secs(5);
/// What writing the first entry of a reign may take before it is tried again.
const FIRST_ENTRY: Duration = Duration::from_secs(2);

/// A node that has not asked who is silent for this part of its patience has
/// stood still itself, its machine perhaps, and was deaf meanwhile.
const STANDSTILL: u32 = 3;

/// This node's lease, and the table that it keeps while it leads.
pub(super) struct Leases {
    me: Incarnation,
    /// End of the lease on [`now`]'s clock in nanoseconds, for the hit path.
    deadline_ns: AtomicU64,
    holder: Mutex<LeaseHolder>,
    desk: Mutex<Desk>,
    /// The latest round to run.
    round: watch::Sender<u64>,
    /// Something happened to the table: look when it is due next.
    stirred: tokio::sync::Notify,
}

/// The table and who waits for it.
#[derive(Default)]
struct Desk {
    table: LeaseTable,
    renewals: BTreeMap<(Incarnation, Duration), oneshot::Sender<Result<Grant, Refusal>>>,
    purges: BTreeMap<PurgeIndex, Vec<oneshot::Sender<Option<Vec<NodeId>>>>>,
    heard: Hearing,
}

/// What was heard of each node since this one leads, and when.
#[derive(Default)]
struct Hearing {
    nodes: BTreeMap<NodeId, Heard>,
    /// When it last was asked who is silent.
    asked_at: Option<Duration>,
}

#[derive(Clone, Copy)]
struct Heard {
    at: Duration,
    applied: PurgeIndex,
}

impl Hearing {
    fn hear(&mut self, now: Duration, node: NodeId, applied: PurgeIndex) {
        self.nodes.insert(node, Heard { at: now, applied });
    }

    /// See [`Leases::silent`].
    fn silent(
        &mut self,
        now: Duration,
        nodes: impl IntoIterator<Item = NodeId>,
        patience: Duration,
    ) -> Vec<NodeId> {
        let since_asked = self.asked_at.map(|asked_at| now.saturating_sub(asked_at));
        self.asked_at = Some(now);
        if since_asked.is_none_or(|since| since > patience / STANDSTILL) {
            self.nodes.values_mut().for_each(|heard| heard.at = now);
        }
        let fresh = Heard {
            at: now,
            applied: PurgeIndex(0),
        };
        let silent = |node: &NodeId| {
            now.saturating_sub(self.nodes.entry(*node).or_insert(fresh).at) >= patience
        };
        nodes.into_iter().filter(silent).collect()
    }
}

/// The boot clock: it goes on while the machine is suspended (rule 17).
fn now() -> Duration {
    let time = clock_gettime(ClockId::Boottime);
    // Neither is negative on this clock.
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

fn wall() -> Duration {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
}

impl Leases {
    pub(super) fn new(me: Incarnation, lease: Duration) -> Leases {
        Leases {
            me,
            deadline_ns: AtomicU64::new(0),
            holder: Mutex::new(LeaseHolder::new(me, lease)),
            desk: Mutex::default(),
            round: watch::Sender::new(0),
            stirred: tokio::sync::Notify::new(),
        }
    }

    /// Rule 4, for the hit path: one clock read, one atomic load.
    pub(super) fn may_serve(&self) -> bool {
        now().as_nanos() < u128::from(self.deadline_ns.load(Ordering::Acquire))
    }

    /// What `node` has applied, where this node has heard it (the leader has).
    pub(super) fn applied_by(&self, node: NodeId) -> Option<PurgeIndex> {
        self.desk()
            .heard
            .nodes
            .get(&node)
            .map(|heard| heard.applied)
    }

    /// What the table says of each node; empty where this one does not lead.
    pub(super) fn standings(&self) -> Vec<Standing> {
        self.desk().table.standings(now())
    }

    /// Which of `nodes` have been silent for `patience`, asked several times
    /// within that. One that was never heard of counts from the first time it is
    /// asked about; all count from when this node has last stood still.
    pub(super) fn silent(
        &self,
        nodes: impl IntoIterator<Item = NodeId>,
        patience: Duration,
    ) -> Vec<NodeId> {
        self.desk().heard.silent(now(), nodes, patience)
    }

    fn desk(&self) -> MutexGuard<'_, Desk> {
        self.desk.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the holder, and publishes what became of the lease.
    fn hold<R>(&self, change: impl FnOnce(&mut LeaseHolder) -> R) -> R {
        let mut holder = self.holder.lock().unwrap_or_else(PoisonError::into_inner);
        let result = change(&mut holder);
        let deadline = u64::try_from(holder.deadline().as_nanos()).unwrap_or(u64::MAX);
        self.deadline_ns.store(deadline, Ordering::Release);
        result
    }

    /// Answers a renewal, once the table has decided.
    pub(super) async fn renew(&self, renewal: Renewal) -> Result<Grant, Refusal> {
        let (tell, told) = oneshot::channel();
        {
            let mut desk = self.desk();
            desk.heard.hear(now(), renewal.from.node, renewal.applied);
            desk.renewals.insert((renewal.from, renewal.sent_at), tell);
            self.step(&mut desk, Input::Renew(renewal));
        }
        told.await.unwrap_or(Err(Refusal::Replaced))
    }

    /// Takes note of what a process has applied.
    pub(super) fn acknowledge(&self, from: Incarnation, applied: PurgeIndex) {
        let mut desk = self.desk();
        desk.heard.hear(now(), from.node, applied);
        self.step(&mut desk, Input::Acked { from, applied });
    }

    /// A process has given up its lease.
    pub(super) fn release(&self, from: Incarnation) {
        self.step(&mut self.desk(), Input::Released(from));
    }

    /// Waits until the purge at `index`, committed by an entry of `term`, holds
    /// everywhere; `None` if this node does not lead.
    pub(super) async fn settled(
        &self,
        index: PurgeIndex,
        term: u64,
        members: impl FnOnce() -> Vec<NodeId>,
    ) -> Option<PurgeReceipt> {
        let (tell, told) = oneshot::channel();
        {
            let mut desk = self.desk();
            desk.purges.entry(index).or_default().push(tell);
            self.step(&mut desk, Input::Committed { index, term });
        }
        let acked = told.await.ok().flatten()?;
        let (acked, fenced) = members().into_iter().partition(|id| acked.contains(id));
        Some(PurgeReceipt {
            index,
            acked,
            fenced,
            pending: Vec::new(),
        })
    }

    /// Steps the table and does what it says. The clock is read last.
    fn step(&self, desk: &mut Desk, input: Input) {
        for output in desk.table.step(now(), input) {
            match output {
                Output::StartRound { round } => {
                    self.round.send_replace(round);
                }
                Output::Granted(grant) => {
                    if let Some(tell) = desk.renewals.remove(&(grant.to, grant.sent_at)) {
                        let _ = tell.send(Ok(grant));
                    }
                }
                Output::Refused { renewal, reason } => {
                    if let Some(tell) = desk.renewals.remove(&(renewal.from, renewal.sent_at)) {
                        let _ = tell.send(Err(reason));
                    }
                }
                Output::Settled { index, acked } => {
                    for tell in desk.purges.remove(&index).unwrap_or_default() {
                        let _ = tell.send(Some(acked.clone()));
                    }
                }
                Output::Unsettled { index } => {
                    for tell in desk.purges.remove(&index).unwrap_or_default() {
                        let _ = tell.send(None);
                    }
                }
            }
        }
        self.stirred.notify_one();
    }
}

/// Starts the tasks of this file.
pub(super) fn spawn(shared: &Arc<Shared>, runtime: &tokio::runtime::Handle) {
    shared.spawn(runtime, Shared::reign);
    shared.spawn(runtime, Shared::run_rounds);
    shared.spawn(runtime, Shared::tick);
    shared.spawn(runtime, Shared::settle);
    shared.spawn(runtime, Shared::acknowledge);
    shared.spawn(runtime, Shared::keep_lease);
    shared.spawn(runtime, Shared::compare_clocks);
}

/// Why there is no lease.
enum NoLease {
    /// Ask again later.
    Now(String),
    /// There must never be one again: this node stops.
    OtherLog(StartError),
}

impl Shared {
    /// Tells the table when this node begins and ceases to lead.
    async fn reign(self: Arc<Self>) {
        let mut metrics = self.raft.server_metrics();
        let mut reigning = None;
        loop {
            let leading = {
                let metrics = metrics.borrow_and_update();
                metrics
                    .state
                    .is_leader()
                    .then(|| metrics.vote.leader_id().term)
            };
            if leading != reigning {
                reigning = None;
                let mut desk = self.leases.desk();
                desk.heard = Hearing::default();
                self.leases.step(&mut desk, Input::Follow);
            }
            if leading.is_some() && reigning.is_none() {
                let lease = self.replica.state().lease();
                let first = match lease {
                    // Folds nothing; what counts is its place in the log.
                    Some(_) => Command::Fold { seq: PurgeIndex(0) },
                    None => Command::Found {
                        hash_key: HashKey(rand::random()),
                        lease: self.config.lease,
                    },
                };
                let write = tokio::time::timeout(FIRST_ENTRY, self.raft.client_write(first)).await;
                let (Ok(Ok(written)), Some(lease)) = (write, lease) else {
                    let _ = tokio::time::timeout(AGAIN, metrics.changed()).await;
                    continue;
                };
                let term = written.log_id.leader_id.term;
                let lead = Input::Lead {
                    term,
                    first_entry: PurgeIndex(written.log_id.index),
                    nodes: self.replica.state().nodes(),
                    lease,
                };
                self.leases.step(&mut self.leases.desk(), lead);
                reigning = Some(term);
                // What this node has applied has to be heard in this reign.
                self.leases
                    .acknowledge(self.leases.me, *self.replica.settled().borrow());
                continue;
            }
            if metrics.changed().await.is_err() {
                return;
            }
        }
    }

    /// Runs the linearizable reads that the table asks for, one at a time.
    async fn run_rounds(self: Arc<Self>) {
        let mut rounds = self.leases.round.subscribe();
        // One may have been asked for before this began.
        rounds.mark_changed();
        while rounds.changed().await.is_ok() {
            let round = *rounds.borrow_and_update();
            // Confirms that a quorum still follows; the position it returns is
            // of the term in which it did, as this leader has written in it.
            let read = match self.is_deserted() {
                true => None,
                false => self.raft.get_read_log_id().await.ok(),
            };
            let input = match read {
                Some((Some(read), _)) => Input::RoundConfirmed {
                    round,
                    term: read.leader_id.term,
                },
                Some((None, _)) | None => Input::RoundFailed { round },
            };
            self.leases.step(&mut self.leases.desk(), input);
        }
    }

    /// Steps the table when a lease ends that a purge waits for.
    async fn tick(self: Arc<Self>) {
        loop {
            let due = self.leases.desk().table.next_tick();
            let stirred = self.leases.stirred.notified();
            match due {
                Some(due) => {
                    if tokio::time::timeout(due.saturating_sub(now()), stirred)
                        .await
                        .is_err()
                    {
                        self.leases.step(&mut self.leases.desk(), Input::Tick);
                    }
                }
                None => stirred.await,
            }
        }
    }

    /// Sees to it that what was applied is settled soon: at first what was before
    /// this began, from the log and the snapshot of an earlier run.
    async fn settle(self: Arc<Self>) {
        let mut progress = self.replica.progress();
        loop {
            self.replica.settle().await;
            if progress.changed().await.is_err() {
                return;
            }
        }
    }

    /// Tells the leader what was applied, as soon as it is settled.
    async fn acknowledge(self: Arc<Self>) {
        let mut progress = self.replica.settled();
        let mut leaders = self.raft.server_metrics();
        loop {
            let applied = *progress.borrow_and_update();
            let leader = leaders.borrow_and_update().current_leader.map(NodeId);
            let heard = match leader {
                Some(leader) if leader == self.me => {
                    self.leases.acknowledge(self.leases.me, applied);
                    true
                }
                Some(leader) => {
                    let request = Request::Acknowledge {
                        from: self.leases.me,
                        cluster: self.replica.state().cluster_id(),
                        applied,
                    };
                    self.peers
                        .control_aside::<_, ()>(leader, &request, ANSWER)
                        .await
                        .is_ok()
                }
                None => true,
            };
            tokio::select! {
                changed = progress.changed() => if changed.is_err() { return },
                changed = leaders.changed() => if changed.is_err() { return },
                () = tokio::time::sleep(AGAIN), if !heard => {}
            }
        }
    }

    /// Renews this node's lease in good time, and says why where it cannot.
    async fn keep_lease(self: Arc<Self>) {
        let mut leader = None;
        let mut why = String::new();
        // When there last was a lease, or it was said that there is none.
        let mut told = Instant::now();
        loop {
            if self.leader() != leader {
                leader = self.leader();
                self.leases.hold(|holder| holder.hurry(now()));
            }
            let applied = *self.replica.settled().borrow();
            let renewal = match leader {
                Some(_) => self
                    .leases
                    .hold(|holder| holder.renewal(now(), wall(), applied)),
                None => {
                    why = "there is no leader".to_owned();
                    None
                }
            };
            if let (Some(leader), Some(renewal)) = (leader, renewal) {
                tokio::select! {
                    answer = self.ask_for_lease(leader, renewal) => match answer {
                        Ok(grant) => {
                            self.leases.hold(|holder| holder.granted(now(), wall(), &grant));
                        }
                        Err(NoLease::OtherLog(reason)) => return self.fail(reason),
                        Err(NoLease::Now(reason)) => {
                            tracing::debug!(%leader, reason, "no lease");
                            why = format!("node {leader}: {reason}");
                        }
                    },
                    () = self.leader_changes(Some(leader)) => continue,
                }
            }
            if self.leases.may_serve() {
                told = Instant::now();
            } else if told.elapsed() >= TELL_EVERY {
                told = Instant::now();
                tracing::warn!(why, "no lease: this node asks the origin for everything");
            }
            let due = self
                .leases
                .hold(|holder| holder.renew_at())
                .saturating_sub(now());
            let pause = due.clamp(super::RETRY, COMPARE);
            let _ = tokio::time::timeout(pause, self.leader_changes(leader)).await;
        }
    }

    /// Compares the clocks, also while a renewal waits for its answer.
    async fn compare_clocks(self: Arc<Self>) {
        loop {
            self.leases.hold(|holder| holder.compare(now(), wall()));
            tokio::time::sleep(COMPARE).await;
        }
    }

    async fn ask_for_lease(&self, leader: NodeId, renewal: Renewal) -> Result<Grant, NoLease> {
        let cluster = self.replica.state().cluster_id();
        let answer = if leader == self.me {
            tokio::time::timeout(ANSWER, self.renew(self.me, renewal, cluster))
                .await
                .map_err(|_| NoLease::Now("it does not answer itself in time".to_owned()))?
        } else {
            let request = Request::Renew { renewal, cluster };
            self.peers
                .control_aside(leader, &request, ANSWER)
                .await
                .map_err(|e| NoLease::Now(e.to_string()))?
        };
        answer.map_err(|refusal| match refusal {
            Refusal::Ahead { .. } => NoLease::OtherLog(self.ahead(&refusal)),
            refusal => NoLease::Now(refusal.to_string()),
        })
    }

    /// A renewal from a member that the log knows: the next leader knows it, too.
    pub(super) async fn renew(
        &self,
        from: NodeId,
        renewal: Renewal,
        cluster: Option<ClusterId>,
    ) -> Result<Grant, Refusal> {
        let known = self.replica.state().members().contains_key(&from);
        if !known || renewal.from.node != from {
            return Err(Refusal::NotLeader);
        }
        self.shares_log(from, cluster, renewal.applied).await?;
        self.leases.renew(renewal).await
    }

    /// Whether what `from` says it has applied can be of this leader's log. An
    /// honest member has applied nothing that a leader lacks, if a quorum follows it.
    pub(super) async fn shares_log(
        &self,
        from: NodeId,
        cluster: Option<ClusterId>,
        applied: PurgeIndex,
    ) -> Result<(), Refusal> {
        let ours = self.replica.state().cluster_id();
        if ours.is_none() {
            return Err(Refusal::NotLeader);
        }
        // Whoever knows none yet has applied next to nothing.
        if cluster.is_some() && cluster != ours {
            tracing::warn!(%from, "no lease: its log is of another founding of the cluster");
            return Err(Refusal::OtherCluster);
        }
        let last = || self.raft.data_metrics().borrow().last_log;
        let reaches = |log_id: Option<LogId>| log_id.is_some_and(|id| id.index >= applied.0);
        if reaches(last()) {
            return Ok(());
        }
        // The metrics lag a little, and an earlier leader's log may be short.
        let Ok((read, _)) = self.raft.get_read_log_id().await else {
            return Err(Refusal::NotLeader);
        };
        if reaches(read) || reaches(last()) {
            return Ok(());
        }
        let last = PurgeIndex(last().map_or(0, |id| id.index));
        tracing::error!(
            %from, %applied, %last,
            "no lease: it has applied more than this log holds; committed entries were lost"
        );
        Err(Refusal::Ahead { last })
    }

    /// The end of a node that has applied what the cluster's log no longer holds.
    fn ahead(&self, refusal: &Refusal) -> StartError {
        StartError::OtherLog {
            path: self.config.data_dir.clone(),
            reason: format!(
                "{refusal}; remove this node and let it come back under a new number, \
                 with an empty data_dir and an empty l2_cache_dir"
            ),
        }
    }

    /// Gives the lease up before a stop, so that no purge waits for this node.
    pub(super) async fn release_lease(&self) {
        self.leases.hold(|holder| holder.stop(now()));
        match self.leader() {
            Some(leader) if leader != self.me => {
                let request = Request::Release(self.leases.me);
                let released = self.peers.control_aside::<_, ()>(leader, &request, ANSWER);
                let _ = released.await;
            }
            Some(_) | None => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(60);

    fn silent_at(hearing: &mut Hearing, seconds: u64) -> Vec<NodeId> {
        let nodes = [NodeId(2), NodeId(3)];
        hearing.silent(Duration::from_secs(seconds), nodes, PATIENCE)
    }

    #[test]
    fn a_node_is_silent_once_nothing_came_of_it_for_so_long() {
        let mut hearing = Hearing::default();
        for seconds in 0..60 {
            assert_eq!(silent_at(&mut hearing, seconds), []);
            hearing.hear(Duration::from_secs(seconds), NodeId(2), PurgeIndex(1));
        }
        assert_eq!(silent_at(&mut hearing, 60), [NodeId(3)]);
    }

    /// The boot clock goes on while a machine is suspended.
    #[test]
    fn whoever_stood_still_calls_nobody_silent() {
        let mut hearing = Hearing::default();
        for node in [2, 3] {
            hearing.hear(Duration::ZERO, NodeId(node), PurgeIndex(1));
        }
        assert_eq!(silent_at(&mut hearing, 1), []);
        assert_eq!(silent_at(&mut hearing, 4000), []);
        hearing.hear(Duration::from_secs(4001), NodeId(2), PurgeIndex(1));
        for seconds in 4001..4060 {
            assert_eq!(silent_at(&mut hearing, seconds), []);
        }
        assert_eq!(silent_at(&mut hearing, 4060), [NodeId(3)]);
    }
}
