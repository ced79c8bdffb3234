//! Starts openraft, proposes commands, answers the control endpoint.
//!
//! | file | does |
//! | --- | --- |
//! | `store` | log, vote, snapshot on disk; the state machine |
//! | `network` | what is said on the control endpoint; Raft's calls |
//! | `join` | how a cluster forms; how nodes come, change and leave |
//! | `leases` | who may serve; when a purge is answered |
//! | `prevote` | who may stand for election |
//!
//! Everything here runs on a runtime of its own, so that bulk data cannot
//! delay it. What cannot be decided (no leader, no quorum) ends in bounded
//! time as *unknown*, never as a promise; commands are idempotent, so trying
//! again is always right.

mod join;
mod leases;
pub(crate) mod network;
mod prevote;
pub(crate) mod store;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt as _;
use openraft::storage::RaftLogStorage as _;
use openraft::{Raft, SnapshotPolicy};
use serde::Serialize;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use self::leases::Leases;
use self::network::{Call, Led, Network, Request, Task};
use self::prevote::LeaderHeard;
use self::store::{LogStore, StateMachine, TypeConfig};
use crate::data_dir::DataDir;
use crate::handle::{
    ClusterConfig, ClusterStatus, NodeStatus, Observation, PurgeError, PurgeProgress, PurgeReceipt,
    PurgeWait, StartError, patience,
};
use crate::lease::{Incarnation, Refusal, Standing};
use crate::members::{Member, NodeState};
use crate::peer::serve::MEMBER_REQUESTS_MAX;
use crate::peer::{Body, CONTROL_BYTES_MAX, CONTROL_STREAMS, PeerHandler, Peers, SliceSource};
use crate::purge::PurgeItem;
use crate::replica::Replica;
use crate::shares::Shares;
use crate::state::{ClusterState, Command, Outcome};
use crate::wire::{self, Answer, Ask};
use crate::{NodeId, PurgeIndex};

/// Bytes of a snapshot in one message.
const SNAPSHOT_PART_BYTES: u64 = 1 << 20;
const _: () = assert!(SNAPSHOT_PART_BYTES as usize <= CONTROL_BYTES_MAX / 2);

/// Also how long one append may take, the follower's fsync included.
const HEARTBEAT: Duration = Duration::from_millis(150);
/// A follower that has heard nothing for this long may stand for election.
const ELECTION_MIN: Duration = Duration::from_millis(500);
/// A leader's lease in openraft's sense; how long a node may be silent.
const ELECTION_MAX: Duration = Duration::from_millis(900);
/// One part of a snapshot: written and fsynced on the other side.
const SNAPSHOT_TIMEOUT: Duration = Duration::from_secs(5);
/// Entries after which the log is replaced by a snapshot.
const SNAPSHOT_EVERY: u64 = 5000;
/// Entries kept behind a snapshot, for followers that are slightly behind.
const LOG_KEPT: u64 = 1000;
/// One for Raft and the leases while the other works out a new ring.
const RUNTIME_THREADS: usize = 2;
/// Pause before a task is tried again when nothing says what to wait for.
const RETRY: Duration = Duration::from_millis(20);
/// What one step of stopping may take.
const STOP: Duration = Duration::from_secs(2);
/// Longest that [`Node::stop`] takes: lease, tasks, openraft, peers, runtime.
pub(crate) const STOP_MAX: Duration = STOP.saturating_mul(5);
/// How long a peer may take to say what it makes of a purge.
const LOOK: Duration = Duration::from_secs(2);
/// How long a peer may take to send its metrics.
const METRICS: Duration = Duration::from_secs(2);
/// Tasks of one node that a leader carries out at once: as many as that node
/// has seats for, and what it no longer waits for. They may take long, and its
/// renewals and acknowledgements, which they wait for, need room beside them.
const TASKS_MAX: usize = 96;
const _: () = assert!(CONTROL_STREAMS < TASKS_MAX && TASKS_MAX < MEMBER_REQUESTS_MAX);

/// A member of a cluster: the shell around [`Shared`] that owns its runtime.
pub(crate) struct Node {
    shared: Arc<Shared>,
    runtime: Mutex<Option<tokio::runtime::Runtime>>,
}

/// What the node's tasks share.
pub(crate) struct Shared {
    me: NodeId,
    config: ClusterConfig,
    machine: u128,
    replica: Arc<Replica>,
    raft: Raft<TypeConfig>,
    peers: Peers,
    leases: Leases,
    leader_heard: LeaderHeard,
    /// What is being carried out for others; see [`TASKS_MAX`].
    led: Shares,
    /// Held while a node is removed: whether it may be depends on who else goes.
    removing: tokio::sync::Mutex<()>,
    /// See [`Shared::is_deserted`].
    deserted: AtomicBool,
    /// Nodes that may send Raft's calls before the log says who is a member.
    trusted: Mutex<BTreeSet<NodeId>>,
    /// Founders of a new cluster, once all have been seen.
    founders: Mutex<Vec<NodeId>>,
    /// Who was greeted last, and why that has not led to a cluster.
    unanswered: Mutex<BTreeMap<String, String>>,
    failed: watch::Sender<Option<StartError>>,
    stopping: CancellationToken,
    tasks: TaskTracker,
    _dir: DataDir,
}

impl Node {
    /// See [`crate::Cluster::start`].
    pub(crate) async fn start(
        config: ClusterConfig,
        source: Arc<OnceLock<Arc<dyn SliceSource>>>,
    ) -> Result<Node, StartError> {
        let dir = DataDir::take(&config.data_dir)?;
        let machine = dir.machine(rand::random())?;
        let me = config.node_id;
        let incarnation = Incarnation {
            node: me,
            process: dir.count_start()?,
        };
        let replica = Replica::new(me, ClusterState::default());
        let machine_state = StateMachine::open(dir.path().join("raft.snapshot"), replica.clone())?;
        let log = LogStore::open(&dir.path().join("raft"), machine_state.newest())?;

        let door = Arc::new(Door {
            me,
            replica: replica.clone(),
            node: OnceLock::new(),
            source,
        });
        let peers = Peers::bind(config.listen, me, &config.tls, door.clone())?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(RUNTIME_THREADS)
            .thread_name("raft")
            .enable_all()
            .build()
            .map_err(|e| StartError::Config(format!("no thread for control traffic: {e}")))?;

        let network = Network {
            me,
            peers: peers.clone(),
            replica: replica.clone(),
        };
        let raft = runtime
            .spawn(start_raft(me, network, log, machine_state))
            .await
            .map_err(|e| e.to_string())
            .and_then(|raft| raft)
            .map_err(|reason| StartError::Storage {
                path: config.data_dir.clone(),
                reason,
            })?;

        let shared = Arc::new(Shared {
            me,
            machine,
            leases: Leases::new(incarnation, config.lease),
            config,
            replica,
            raft,
            peers,
            leader_heard: LeaderHeard::default(),
            led: Shares::default(),
            removing: tokio::sync::Mutex::default(),
            deserted: AtomicBool::new(false),
            trusted: Mutex::default(),
            founders: Mutex::default(),
            unanswered: Mutex::default(),
            failed: watch::Sender::new(None),
            stopping: CancellationToken::new(),
            tasks: TaskTracker::new(),
            _dir: dir,
        });
        // Nobody else sets it, and nobody was let in before.
        let _ = door.node.set(Arc::downgrade(&shared));
        shared.spawn(runtime.handle(), Shared::watch_raft);
        shared.spawn(runtime.handle(), Shared::pre_vote);
        shared.spawn(runtime.handle(), Shared::follow_addresses);
        shared.spawn(runtime.handle(), Shared::join);
        shared.spawn(runtime.handle(), Shared::arrange_members);
        leases::spawn(&shared, runtime.handle());
        Ok(Node {
            shared,
            runtime: Mutex::new(Some(runtime)),
        })
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// See [`crate::Cluster::stop`].
    pub(crate) async fn stop(&self) {
        let runtime = self
            .runtime
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        let Some(runtime) = runtime else { return };
        let shared = &self.shared;
        let _ = tokio::time::timeout(STOP, shared.release_lease()).await;
        shared.stopping.cancel();
        shared.tasks.close();
        let _ = tokio::time::timeout(STOP, shared.tasks.wait()).await;
        let _ = tokio::time::timeout(STOP, shared.raft.shutdown()).await;
        let _ = tokio::time::timeout(STOP, shared.peers.stop()).await;
        let ended = tokio::task::spawn_blocking(move || runtime.shutdown_timeout(STOP));
        let _ = ended.await;
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.shared.stopping.cancel();
        let runtime = self
            .runtime
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(runtime) = runtime {
            // Waiting is not allowed here; `stop` is how one leaves in good order.
            runtime.shutdown_background();
        }
    }
}

async fn start_raft(
    me: NodeId,
    network: Network,
    mut log: LogStore,
    machine: StateMachine,
) -> Result<Raft<TypeConfig>, String> {
    let config = openraft::Config {
        cluster_name: "pingora-slice".into(),
        heartbeat_interval: HEARTBEAT.as_millis() as u64,
        election_timeout_min: ELECTION_MIN.as_millis() as u64,
        election_timeout_max: ELECTION_MAX.as_millis() as u64,
        install_snapshot_timeout: SNAPSHOT_TIMEOUT.as_millis() as u64,
        snapshot_max_chunk_size: SNAPSHOT_PART_BYTES,
        snapshot_policy: SnapshotPolicy::LogsSinceLast(SNAPSHOT_EVERY),
        max_in_snapshot_log_to_keep: LOG_KEPT,
        enable_elect: false,
        ..Default::default()
    };
    let config = config.validate().map_err(|e| e.to_string())?;
    // Read once more than openraft does, for an error with its own words.
    log.read_vote().await.map_err(|e| e.to_string())?;
    Raft::new(me.0, Arc::new(config), network, log, machine)
        .await
        .map_err(|e| e.to_string())
}

impl Shared {
    /// Runs `task` until it ends or the node stops.
    fn spawn<F>(self: &Arc<Self>, runtime: &tokio::runtime::Handle, task: fn(Arc<Shared>) -> F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let task = task(self.clone());
        let stopping = self.stopping.clone();
        self.tasks.spawn_on(
            async move {
                stopping.run_until_cancelled(task).await;
            },
            runtime,
        );
    }

    /// The node must stop; the first reason counts.
    fn fail(&self, reason: StartError) {
        tracing::error!(error = %reason, "this node must stop");
        self.failed.send_if_modified(|failed| {
            let first = failed.is_none();
            failed.get_or_insert(reason);
            first
        });
    }

    /// See [`crate::Cluster::failed`].
    pub(crate) async fn failed(&self) -> StartError {
        let mut failed = self.failed.subscribe();
        let reason = failed
            .wait_for(Option::is_some)
            .await
            .map(|reason| reason.clone());
        match reason {
            Ok(Some(reason)) => reason,
            Ok(None) | Err(_) => std::future::pending().await,
        }
    }

    /// openraft stops for good when the disk does (invariant 5).
    async fn watch_raft(self: Arc<Self>) {
        let mut metrics = self.raft.metrics();
        loop {
            let state = metrics.borrow_and_update().running_state.clone();
            if let Err(fatal) = state {
                return self.fail(self.storage(fatal.to_string()));
            }
            if metrics.changed().await.is_err() {
                return self.fail(self.storage("the log's task has ended".into()));
            }
        }
    }

    fn storage(&self, reason: String) -> StartError {
        StartError::Storage {
            path: self.config.data_dir.clone(),
            reason,
        }
    }

    /// Tells the peer layer where members are, as often as the log says another
    /// place. In between a greeting may know better: a voter that has moved can
    /// only tell the log so once there is a leader, who needs its vote.
    async fn follow_addresses(self: Arc<Self>) {
        let mut views = self.replica.views();
        let mut metrics = self.raft.server_metrics();
        let mut known: BTreeMap<NodeId, String> = BTreeMap::new();
        loop {
            views.borrow_and_update();
            metrics.borrow_and_update();
            let members = self.replica.view().members.clone();
            for member in members.values().filter(|member| member.id != self.me) {
                if known.get(&member.id) != Some(&member.advertise) {
                    self.peers.set_address(member.id, &member.advertise);
                    known.insert(member.id, member.advertise.clone());
                }
            }
            known.retain(|id, _| {
                let stays = members.contains_key(id) || self.is_counted(*id);
                if !stays {
                    self.peers.forget(*id);
                }
                stays
            });
            tokio::select! {
                changed = views.changed() => if changed.is_err() { return },
                changed = metrics.changed() => if changed.is_err() { return },
            }
        }
    }

    fn leader(&self) -> Option<NodeId> {
        self.raft
            .server_metrics()
            .borrow()
            .current_leader
            .map(NodeId)
    }

    /// Completes when a node other than `leader` leads.
    async fn leader_changes(&self, leader: Option<NodeId>) {
        let leader = leader.map(|id| id.0);
        let mut metrics = self.raft.server_metrics();
        if metrics
            .wait_for(|metrics| metrics.current_leader != leader)
            .await
            .is_err()
        {
            std::future::pending::<()>().await;
        }
    }

    fn patience(&self) -> Duration {
        patience(self.replica.state().lease().unwrap_or(self.config.lease))
    }

    /// Has the leader carry out `task`, again for as long as there is none, it
    /// changes or it does not know; ends as [`Led::Unknown`] after `patience`.
    async fn by_leader(&self, task: Task, patience: Duration) -> Led {
        let deadline = Instant::now() + patience;
        let mut why = "there is no leader".to_owned();
        loop {
            let leader = self.leader();
            let left = deadline.saturating_duration_since(Instant::now());
            let attempt = async {
                match leader {
                    Some(leader) if leader == self.me => self.lead(task.clone(), left).await,
                    Some(leader) => {
                        let request = Request::Lead(task.clone());
                        let answer = self.peers.control(leader, &request, left).await;
                        answer.unwrap_or_else(|e| Led::Unknown(e.to_string()))
                    }
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                led = attempt => match led {
                    Led::Unknown(reason) => why = reason,
                    done => return done,
                },
                () = self.leader_changes(leader) => continue,
                () = tokio::time::sleep(left) => return Led::Unknown(why),
            }
            if Instant::now() + RETRY >= deadline {
                return Led::Unknown(why);
            }
            tokio::time::sleep(RETRY).await;
        }
    }

    /// Carries out `task` as the leader.
    async fn lead(&self, task: Task, left: Duration) -> Led {
        let deadline = Instant::now() + left;
        if self.is_deserted() {
            return Led::Unknown("there is no quorum".into());
        }
        let _removing = match &task {
            Task::Propose(Command::NodeLeave(id)) => {
                let removing = self.removing.lock().await;
                if self.is_leader()
                    && let Some(not_now) = self.needed(*id, left).await
                {
                    return not_now;
                }
                Some(removing)
            }
            Task::Propose(_) | Task::Purge { .. } => None,
        };
        let (command, wait) = match task {
            Task::Propose(command) => (command, None),
            Task::Purge { items, token, wait } => (Command::Purge { items, token }, Some(wait)),
        };
        // Without a quorum `client_write` waits forever.
        let written = tokio::time::timeout(left, self.raft.client_write(command)).await;
        match written {
            Err(_) => Led::Unknown("there is no quorum".into()),
            Ok(Err(e)) => Led::Unknown(e.to_string()),
            Ok(Ok(written)) => match written.data {
                Outcome::Purged(index) if wait.is_some() => {
                    let members = || self.replica.view().members.keys().copied().collect();
                    let term = written.log_id.leader_id.term;
                    let settled = self.leases.settled(index, term, members);
                    if wait == Some(PurgeWait::Quorum) {
                        // Told the table, so that whoever does not apply it is let go.
                        let settled = settled.now_or_never().flatten();
                        return Led::Purged(settled.unwrap_or_else(|| self.committed(index)));
                    }
                    match tokio::time::timeout_at(deadline, settled).await {
                        Ok(Some(receipt)) => Led::Purged(receipt),
                        Ok(None) => Led::Unknown("the leader changed".into()),
                        Err(_) => Led::Unknown("not every node has acknowledged in time".into()),
                    }
                }
                outcome => Led::Applied(outcome),
            },
        }
    }

    /// A purge that this leader has committed and applied, and no more. Who is
    /// fenced now may get a lease before it has the purge, and who has left the
    /// cluster may hold one: both are pending.
    fn committed(&self, index: PurgeIndex) -> PurgeReceipt {
        let standings = self.leases.standings();
        let acked = |standing: &&Standing| standing.acked >= index;
        let acked: BTreeSet<NodeId> = standings.iter().filter(acked).map(|s| s.node).collect();
        let mut nodes: BTreeSet<NodeId> = self.replica.view().members.keys().copied().collect();
        let serving = standings.iter().filter(|standing| standing.serves);
        nodes.extend(serving.map(|standing| standing.node));
        let (acked, pending) = nodes.into_iter().partition(|id| acked.contains(id));
        PurgeReceipt {
            index,
            acked,
            fenced: Vec::new(),
            pending,
        }
    }

    /// See [`crate::Cluster::purge_progress`].
    pub(crate) async fn purge_progress(&self, token: u128) -> Option<PurgeProgress> {
        match self.leader()? {
            leader if leader == self.me => self.progress(token),
            leader => {
                let request = Request::Progress { token };
                let answer = self.peers.control(leader, &request, LOOK).await;
                answer.unwrap_or_default()
            }
        }
    }

    /// The same, as the leader.
    fn progress(&self, token: u128) -> Option<PurgeProgress> {
        let index = self.replica.state().purge_of_token(token)?;
        let mut progress = PurgeProgress {
            index,
            ..PurgeProgress::default()
        };
        for standing in self.leases.standings() {
            let nodes = match standing {
                Standing { acked, .. } if acked >= index => &mut progress.acked,
                Standing { serves: true, .. } => &mut progress.waiting,
                _ => &mut progress.fenced,
            };
            nodes.push(standing.node);
        }
        Some(progress)
    }

    /// See [`crate::Cluster::observe`].
    pub(crate) async fn observe(
        &self,
        item: PurgeItem,
        url: Option<String>,
    ) -> Vec<(NodeId, Option<Observation>)> {
        let request = Request::Observe { item, url };
        let ask = |id: NodeId| {
            let request = &request;
            async move { (id, self.peers.control(id, request, LOOK).await.ok()) }
        };
        let view = self.replica.view();
        let others = view.members.keys().copied();
        let up = others.filter(|id| *id != self.me && self.peers.is_up(*id));
        futures::future::join_all(up.map(ask)).await
    }

    /// What this node makes of a purge; the lease first, then the floors (rule 4).
    async fn observed(
        &self,
        item: PurgeItem,
        url: Option<String>,
        source: Option<&Arc<dyn SliceSource>>,
    ) -> Observation {
        let leased = self.may_serve();
        let floor = self.replica.floor(&item.scope.into());
        let stored = match (url, source) {
            (Some(url), Some(source)) => source.stored_stamp(&url).await,
            _ => None,
        };
        Observation {
            leased,
            floor,
            stored,
        }
    }

    /// See [`crate::Cluster::purge`].
    pub(crate) async fn purge(
        &self,
        items: Vec<PurgeItem>,
        token: u128,
        wait: PurgeWait,
    ) -> Result<PurgeReceipt, PurgeError> {
        match self
            .by_leader(Task::Purge { items, token, wait }, self.patience())
            .await
        {
            Led::Purged(receipt) => Ok(receipt),
            Led::Applied(Outcome::Refused(why)) => Err(PurgeError::Invalid(why.to_string())),
            Led::Refused(why) => Err(PurgeError::Invalid(why)),
            Led::Applied(_) => Err(PurgeError::NotConfirmed("not a purge".into())),
            Led::Unknown(why) => Err(PurgeError::NotConfirmed(why)),
        }
    }

    /// See [`crate::Cluster::drain`].
    pub(crate) async fn drain(&self, id: NodeId) -> Result<(), PurgeError> {
        self.command(Command::NodeState {
            id,
            state: NodeState::Draining,
        })
        .await
    }

    /// See [`crate::Cluster::remove`]; `arrange_members` does the rest.
    pub(crate) async fn remove(&self, id: NodeId) -> Result<(), PurgeError> {
        self.command(Command::NodeLeave(id)).await
    }

    async fn command(&self, command: Command) -> Result<(), PurgeError> {
        match self
            .by_leader(Task::Propose(command), self.patience())
            .await
        {
            Led::Applied(Outcome::Refused(why)) => Err(PurgeError::Invalid(why.to_string())),
            Led::Applied(_) | Led::Purged(_) => Ok(()),
            Led::Refused(why) => Err(PurgeError::Invalid(why)),
            Led::Unknown(why) => Err(PurgeError::NotConfirmed(why)),
        }
    }

    /// See [`crate::Cluster::may_serve`].
    pub(crate) fn may_serve(&self) -> bool {
        self.leases.may_serve()
    }

    pub(crate) fn replica(&self) -> &Arc<Replica> {
        &self.replica
    }

    pub(crate) fn peers(&self) -> &Peers {
        &self.peers
    }

    /// See [`crate::Cluster::metrics_of_peers`].
    pub(crate) async fn metrics_of_peers(&self) -> Vec<(NodeId, Option<Bytes>)> {
        let view = self.replica.view();
        let ask = |id: NodeId| async move {
            let answer = self.peers.control(id, &Request::Metrics, METRICS).await;
            let text: Option<Vec<u8>> = answer.unwrap_or_default();
            (id, text.map(Bytes::from))
        };
        let others = view.members.keys().copied().filter(|id| *id != self.me);
        futures::future::join_all(others.map(ask)).await
    }

    /// See [`crate::Cluster::status`].
    pub(crate) fn status(&self) -> ClusterStatus {
        let metrics = self.raft.metrics().borrow().clone();
        let view = self.replica.view();
        let leader = metrics.current_leader.map(NodeId);
        let applied = self.replica.applied();
        let of_member = |member: &Member| NodeStatus {
            member: member.clone(),
            up: member.id == self.me || self.peers.is_up(member.id),
            leader: leader == Some(member.id),
            applied: if member.id == self.me {
                Some(applied)
            } else {
                self.leases.applied_by(member.id)
            },
            ring_share: view.ring.share(member.id),
        };
        ClusterStatus {
            node_id: self.me,
            leader,
            term: metrics.current_term,
            ring_epoch: view.ring.epoch(),
            purge_index: applied,
            lease_valid: self.may_serve(),
            nodes: view.members.values().map(of_member).collect(),
        }
    }

    /// See [`crate::Cluster::voters`].
    pub(crate) fn voters(&self) -> BTreeSet<NodeId> {
        let metrics = self.raft.server_metrics();
        let metrics = metrics.borrow();
        let membership = metrics.membership_config.membership();
        match &membership.get_joint_config()[..] {
            [settled] => settled.iter().copied().map(NodeId).collect(),
            _ => BTreeSet::new(),
        }
    }

    /// Whether Raft sends `node` the log. One that was removed it counts until a
    /// change without it is decided, for which its vote may be needed.
    fn is_counted(&self, node: NodeId) -> bool {
        let metrics = self.raft.server_metrics();
        let metrics = metrics.borrow();
        let membership = metrics.membership_config.membership();
        membership.get_node(&node.0).is_some()
    }

    /// Whether `from` may send more than a greeting.
    fn is_member(&self, from: NodeId) -> bool {
        let trusted = {
            let trusted = self.trusted.lock();
            trusted
                .unwrap_or_else(PoisonError::into_inner)
                .contains(&from)
        };
        let known = {
            let state = self.replica.state();
            state.members().contains_key(&from) || (trusted && !state.is_retired(from))
        };
        known || self.is_counted(from)
    }

    async fn raft_says(&self, call: Call) -> Result<Vec<u8>, String> {
        match call {
            Call::Append(rpc) => {
                let answer = self.raft.append_entries(rpc).await;
                if let Ok(answer) = &answer {
                    self.leader_heard.note(answer);
                }
                encode(&answer)
            }
            Call::PreVote { last_log } => encode(&self.would_vote(last_log)),
            Call::Vote(rpc) => encode(&self.raft.vote(rpc).await),
            Call::Snapshot(rpc) => encode(&self.raft.install_snapshot(rpc).await),
        }
    }

    async fn answer(
        &self,
        from: NodeId,
        request: Request,
        source: Option<&Arc<dyn SliceSource>>,
    ) -> Result<Vec<u8>, String> {
        if !matches!(request, Request::Hello(_)) && !self.is_member(from) {
            return Err(format!("node {from} is not a member"));
        }
        match request {
            Request::Hello(hello) => encode(&self.welcome(from, hello).await?),
            Request::Raft { cluster, call } => {
                let ours = self.replica.state().cluster_id();
                // Who knows none yet has nothing of another.
                if ours.is_some() && cluster.is_some() && ours != cluster {
                    return Err("its log is of another founding of the cluster".into());
                }
                self.raft_says(call).await
            }
            Request::Renew { renewal, cluster } => {
                encode(&self.renew(from, renewal, cluster).await)
            }
            Request::Acknowledge {
                from: process,
                cluster,
                applied,
            } if process.node == from => {
                match self.shares_log(from, cluster, applied).await {
                    Ok(()) => self.leases.acknowledge(process, applied),
                    // Its next renewal tells it what is wrong.
                    Err(Refusal::OtherCluster | Refusal::Ahead { .. }) => {}
                    // It says so again in a moment.
                    Err(not_now) => return Err(not_now.to_string()),
                }
                encode(&())
            }
            Request::Release(process) if process.node == from => {
                self.leases.release(process);
                encode(&())
            }
            Request::Acknowledge { .. } | Request::Release(_) => {
                Err("a node speaks for itself alone".into())
            }
            Request::Lead(task) => match self.led.take(from, TASKS_MAX) {
                Some(_led) => encode(&self.lead(task, self.patience()).await),
                None => encode(&Led::Unknown("the leader has too much to do".into())),
            },
            Request::Progress { token } => encode(&self.progress(token)),
            Request::Observe { item, url } => encode(&self.observed(item, url, source).await),
            Request::Metrics => encode(&source.map(|source| source.metrics_text().to_vec())),
        }
    }
}

fn encode<T: Serialize>(answer: &T) -> Result<Vec<u8>, String> {
    bincode::serde::encode_to_vec(answer, bincode::config::standard()).map_err(|e| e.to_string())
}

/// What peers reach: the node once it runs, the daemon's engine once it serves.
struct Door {
    me: NodeId,
    replica: Arc<Replica>,
    node: OnceLock<Weak<Shared>>,
    source: Arc<OnceLock<Arc<dyn SliceSource>>>,
}

#[async_trait::async_trait]
impl PeerHandler for Door {
    fn is_member(&self, from: NodeId) -> bool {
        from != self.me && self.replica.state().members().contains_key(&from)
    }

    fn may_control(&self, from: NodeId) -> bool {
        let node = self.node.get().and_then(Weak::upgrade);
        node.is_some_and(|node| node.is_member(from))
    }

    async fn slices(&self, from: NodeId, ask: Ask) -> (Answer, Option<Body>) {
        match self.source.get() {
            Some(source) => source.answer(from, ask).await,
            None => (Answer::Busy, None),
        }
    }

    async fn control(&self, from: NodeId, request: Bytes) -> Result<Vec<u8>, String> {
        let node = self
            .node
            .get()
            .and_then(Weak::upgrade)
            .ok_or("not running")?;
        let request = wire::decode(&request).map_err(|e| e.to_string())?;
        // An answer may wait for others; a node that stops must not wait for it.
        let answer = node.answer(from, request, self.source.get());
        let answered = node.stopping.run_until_cancelled(answer).await;
        answered.unwrap_or_else(|| Err("stopping".into()))
    }
}
