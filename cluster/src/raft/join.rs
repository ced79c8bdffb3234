//! How a cluster forms; how nodes come, change and leave.
//!
//! A node greets its seeds until the log knows it as it wants to be known.
//!
//! * *A new cluster*: the first `voters_expected` seeds are its founders. Once
//!   all of them have seen one another, and none is in a cluster, the one with
//!   the lowest number writes the first entry. Nothing forms otherwise.
//! * *Joining*, or coming back changed: any node of the cluster has the leader
//!   append [`Command::NodeJoin`]. A number that belongs to another machine,
//!   or to one that has left, is refused there, and the node stops.
//!
//! The log's members are the truth; who takes part in Raft follows from it
//! ([`Shared::arrange_members`], on the leader): members are added as learners,
//! those that left are dropped, and voters are made up to `voters_expected`.
//! A voter that is removed votes until then, as its vote may be needed for that;
//! it is not removed, nor are voters changed, while those that stay would be too few.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use openraft::{BasicNode, ChangeMembers, RaftMetrics};
use rand::seq::IteratorRandom as _;
use tokio::time::Instant;

use super::Shared;
use super::network::{Hello, Led, Request, Task, Welcome};
use super::prevote::is_majority;
use crate::handle::StartError;
use crate::members::{Member, NodeState, Role};
use crate::peer::PeerError;
use crate::state::{Command, Outcome, Refusal};
use crate::{NodeId, PurgeIndex};

/// How long a greeted node may take; it asks the leader meanwhile.
const GREETING: Duration = Duration::from_secs(2);
/// Within that, how long the leader may take.
const ADMISSION: Duration = Duration::from_millis(1500);
const _: () = assert!(ADMISSION.as_millis() < GREETING.as_millis());
/// Between two rounds of greetings; a little more or less, so that nodes that
/// were started together do not stay in step.
const ROUND: Duration = Duration::from_millis(200);
/// How often a node looks whether it still holds a lease, and greets if not:
/// one that was removed while it was cut off learns it this way.
const CHECK: Duration = Duration::from_secs(1);
/// How long a node that knows no cluster looks for one before it says what is
/// in the way: nodes that are started together find one another sooner.
const LOOKED: Duration = Duration::from_secs(3);
/// How often it says so again.
const LOOKED_AGAIN: Duration = Duration::from_secs(30);
/// How often the leader compares Raft's members with the log's.
const ARRANGE: Duration = Duration::from_millis(250);
/// What one change of Raft's members may take.
const ARRANGE_STEP: Duration = Duration::from_secs(2);
/// A learner this close to the end of the log may become a voter, entries.
const CAUGHT_UP: u64 = 100;
/// How long a voter that was removed goes on at least, and after it last heard a
/// leader: it may not have been told that it no longer counts. Several elections.
const REMOVED_STAYS: Duration = Duration::from_secs(5);
/// Members greeted in one round besides the seeds.
const GREETED_MEMBERS: usize = 3;

impl Shared {
    /// How this node wants to be known.
    fn myself(&self) -> Member {
        Member {
            id: self.me,
            machine: self.machine,
            advertise: self.config.advertise.clone(),
            role: self.config.role,
            weight: self.config.weight,
            state: NodeState::Active,
        }
    }

    /// Whether the log knows this node as it wants to be known.
    fn is_known(&self, member: &Member) -> bool {
        let view = self.replica.view();
        view.members.get(&member.id).is_some_and(|known| {
            // Draining is decided by the cluster, not by the node.
            *known
                == Member {
                    state: known.state,
                    ..member.clone()
                }
        })
    }

    /// Greets until known; then watches that it stays so.
    pub(super) async fn join(self: Arc<Self>) {
        let mut views = self.replica.views();
        let mut warned = false;
        let mut tell_at = Instant::now() + LOOKED;
        loop {
            views.borrow_and_update();
            let lease = self.replica.state().lease();
            if lease.is_some_and(|lease| lease != self.config.lease) && !warned {
                tracing::warn!(
                    ?lease,
                    "the cluster was founded with another lease, which holds"
                );
                warned = true;
            }
            if let Some(reason) = self.refusal(&self.myself()) {
                self.vote_to_the_end().await;
                return self.fail(reason);
            }
            if self.is_known(&self.myself()) && self.may_serve() {
                self.trusted
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .clear();
                let _ = tokio::time::timeout(CHECK, views.changed()).await;
                continue;
            }
            if let Err(reason) = self.greet().await {
                self.vote_to_the_end().await;
                return self.fail(reason);
            }
            if Instant::now() >= tell_at {
                tell_at = Instant::now() + LOOKED_AGAIN;
                for (seed, why) in self.unanswered() {
                    tracing::warn!(seed, why, "no cluster yet");
                }
            }
            let round = if self.is_known(&self.myself()) {
                CHECK
            } else {
                ROUND
            };
            let pause = round.mul_f64(rand::random_range(0.75..1.25));
            let _ = tokio::time::timeout(pause, views.changed()).await;
        }
    }

    /// Waits, if this node votes, until it no longer does.
    async fn vote_to_the_end(&self) {
        let began = Instant::now();
        let mut metrics = self.raft.server_metrics();
        while self.voting().iter().flatten().any(|id| *id == self.me.0) {
            let led = self.is_leader() || self.leader_heard.ago() < REMOVED_STAYS;
            let needed = led && self.replica.state().is_retired(self.me);
            if began.elapsed() >= REMOVED_STAYS && !needed {
                return;
            }
            if let Ok(Err(_)) = tokio::time::timeout(ARRANGE, metrics.changed()).await {
                return;
            }
        }
    }

    /// Why `leaving` cannot be removed now: those who vote and stay must be able
    /// to decide without it, or nothing is ever decided again. Asked by the leader.
    pub(super) async fn needed(&self, leaving: NodeId, patience: Duration) -> Option<Led> {
        // An earlier removal may be in the log and not decided yet.
        let end = self.raft.data_metrics().borrow().last_log;
        let end = PurgeIndex(end.map_or(0, |log_id| log_id.index));
        let mut progress = self.replica.progress();
        let reached = progress.wait_for(|applied| *applied >= end);
        if !matches!(tokio::time::timeout(patience, reached).await, Ok(Ok(_))) {
            return Some(Led::Unknown("there is no quorum".into()));
        }
        let voters = self.voting();
        let all: BTreeSet<u64> = voters.iter().flatten().copied().collect();
        let goes = |id: &u64| self.replica.state().is_retired(NodeId(*id));
        if goes(&leaving.0) || !all.contains(&leaving.0) {
            return None;
        }
        let mut up = self.answering(all).await;
        if !is_majority(&voters, &up) {
            // It would stay in the log, and be decided once they are back.
            return Some(Led::Unknown("there is no quorum".into()));
        }
        up.retain(|id| *id != leaving.0 && !goes(id));
        (!is_majority(&voters, &up)).then(|| {
            Led::Refused(format!(
                "node {leaving} votes, and the other voters that answer ({up:?}) are too few to \
                 decide anything without it; first bring the rest back, or add a voter"
            ))
        })
    }

    /// One round of greetings, and founding where it is due.
    async fn greet(&self) -> Result<(), StartError> {
        let hello = Request::Hello(self.hello());
        let call = |address: String| {
            let hello = &hello;
            async move {
                let answer = self.peers.control_at(&address, hello, GREETING).await;
                let answer: Result<(NodeId, Welcome), PeerError> = answer.inspect_err(
                    |e| tracing::debug!(address, error = %e, "no answer to a greeting"),
                );
                (address, answer)
            }
        };
        let mut addresses: BTreeSet<String> = self.config.seeds.iter().cloned().collect();
        let view = self.replica.view();
        // The seeds may be gone; any member will do.
        let known = view
            .members
            .values()
            .choose_multiple(&mut rand::rng(), GREETED_MEMBERS);
        addresses.extend(known.into_iter().map(|member| member.advertise.clone()));
        addresses.remove(&self.config.advertise);
        let calls = addresses.into_iter().map(call);
        let mut waiting = BTreeMap::new();
        let mut unanswered = BTreeMap::new();
        for (address, answer) in futures::future::join_all(calls).await {
            match answer {
                Ok((from, Welcome::Refused(remedy))) if from != self.me => {
                    return Err(StartError::NodeIdTaken {
                        id: self.me,
                        remedy,
                    });
                }
                Ok((from, Welcome::OtherCluster)) if from != self.me => {
                    return Err(self.other_founding());
                }
                Ok((_, Welcome::Joined(peers))) => self.trust(peers),
                Ok((_, Welcome::Waiting(hello))) => {
                    unanswered.insert(address.clone(), "waits for the others too".to_owned());
                    waiting.insert(address, hello);
                }
                Ok((from, Welcome::Later { reason, peers })) => {
                    self.trust(peers);
                    tracing::debug!(%from, reason, "not admitted yet");
                    unanswered.insert(address, reason);
                }
                Err(PeerError::Unreachable { reason, .. } | PeerError::Refused { reason, .. }) => {
                    unanswered.insert(address, reason);
                }
                Err(PeerError::TimedOut { .. }) => {
                    unanswered.insert(address, "did not answer in time".to_owned());
                }
                Ok(_) => {}
            }
        }
        *self
            .unanswered
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = unanswered;
        if self.is_fresh().await {
            self.found(&waiting).await;
        } else if self.is_leader() || self.replica.view().members.is_empty() || waiting.is_empty() {
            // With no seed to ask, a member in the quorum asks for itself; and the leader
            // always: those who wait may be waiting for it, whom no member vouches for.
            self.admit(self.myself()).await;
        }
        Ok(())
    }

    /// See [`crate::Cluster::unanswered`].
    pub(crate) fn unanswered(&self) -> BTreeMap<String, String> {
        match self.replica.view().members.is_empty() {
            true => self
                .unanswered
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .clone(),
            false => BTreeMap::new(),
        }
    }

    fn hello(&self) -> Hello {
        let founders = self
            .founders
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        Hello {
            member: self.myself(),
            founders,
            cluster: self.replica.state().cluster_id(),
        }
    }

    /// The end of a node whose log goes back to another founding.
    fn other_founding(&self) -> StartError {
        StartError::OtherLog {
            path: self.config.data_dir.clone(),
            reason: "this log belongs to an earlier founding of the cluster; \
                     start with an empty data_dir and an empty l2_cache_dir"
                .into(),
        }
    }

    /// Whether this node has never been in a cluster.
    async fn is_fresh(&self) -> bool {
        matches!(self.raft.is_initialized().await, Ok(false))
    }

    /// Accepts Raft's calls from these nodes while the log does not say who is who.
    /// Where they are is told by those who may not know that they have moved: of
    /// nodes that the log knows, it and they themselves know better.
    fn trust(&self, peers: BTreeMap<NodeId, String>) {
        let view = self.replica.view();
        for (id, address) in peers.into_iter().filter(|(id, _)| *id != self.me) {
            if !view.members.contains_key(&id) {
                self.peers.set_address(id, &address);
            }
            self.trusted
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .insert(id);
        }
    }

    /// Founds the cluster if all founders wait for it and this is the lowest.
    async fn found(&self, waiting: &BTreeMap<String, Hello>) {
        if self.config.role == Role::Edge {
            return;
        }
        let own = [self.config.advertise.clone()];
        let seeds = if self.config.seeds.is_empty() {
            &own[..]
        } else {
            &self.config.seeds[..]
        };
        let seeds = &seeds[..seeds.len().min(self.config.voters_expected)];
        let seen: Option<Vec<Hello>> = seeds
            .iter()
            .map(|seed| {
                let ours = *seed == self.config.advertise;
                if ours {
                    Some(self.hello())
                } else {
                    waiting.get(seed).cloned()
                }
            })
            .collect();
        let Some(seen) = seen else { return };
        let ids: BTreeSet<NodeId> = seen.iter().map(|hello| hello.member.id).collect();
        let all_vote = seen.iter().all(|hello| hello.member.role == Role::Voter);
        if ids.len() != self.config.voters_expected || !all_vote {
            tracing::warn!(
                founders = ?ids,
                expected = self.config.voters_expected,
                "no cluster can form: the first seeds must be that many different voters"
            );
            return;
        }
        if !ids.contains(&self.me) {
            return;
        }
        let founders: Vec<NodeId> = ids.iter().copied().collect();
        let address = |hello: &Hello| (hello.member.id, hello.member.advertise.clone());
        self.trust(seen.iter().map(address).collect());
        *self.founders.lock().unwrap_or_else(PoisonError::into_inner) = founders.clone();
        let agreed = seen
            .iter()
            .all(|hello| hello.member.id == self.me || hello.founders == founders);
        if !agreed || founders.first() != Some(&self.me) {
            return;
        }
        let voters: BTreeMap<u64, BasicNode> = seen
            .iter()
            .map(|hello| {
                (
                    hello.member.id.0,
                    BasicNode::new(hello.member.advertise.clone()),
                )
            })
            .collect();
        match self.raft.initialize(voters).await {
            Ok(()) => tracing::info!(?founders, "founded a cluster"),
            Err(e) => tracing::warn!(error = %e, "could not found a cluster"),
        }
    }

    /// Answers a greeting.
    pub(super) async fn welcome(&self, from: NodeId, hello: Hello) -> Result<Welcome, String> {
        let member = hello.member;
        if from != member.id {
            return Err(format!(
                "the certificate is node {from}'s, not node {}'s",
                member.id
            ));
        }
        if from == self.me && member.machine == self.machine {
            return Ok(Welcome::Waiting(self.hello()));
        }
        let cluster = self.replica.state().cluster_id();
        if let (Some(ours), Some(theirs)) = (cluster, hello.cluster)
            && ours != theirs
        {
            tracing::warn!(%from, "not admitted: its log is of another founding of the cluster");
            // The one of the two that is in a quorum is right.
            return Ok(match self.may_serve() {
                true => Welcome::OtherCluster,
                false => Welcome::Later {
                    reason: "its log is of another founding of the cluster".into(),
                    peers: BTreeMap::new(),
                },
            });
        }
        if let Some(StartError::NodeIdTaken { remedy, .. }) = self.refusal(&member) {
            return Ok(Welcome::Refused(remedy));
        }
        if self.is_fresh().await {
            return Ok(Welcome::Waiting(self.hello()));
        }
        if cluster.is_none() && hello.cluster.is_some() {
            return Ok(self.later(
                from,
                "its own log does not say yet which cluster it is".into(),
            ));
        }
        if self
            .replica
            .view()
            .members
            .get(&from)
            .is_some_and(|m| m.machine == member.machine)
        {
            // It may have moved; the log will say so once there is a leader.
            self.peers.set_address(from, &member.advertise);
        }
        Ok(self.admit(member).await)
    }

    /// Why the log, as far as it is known here, will never admit `member`.
    fn refusal(&self, member: &Member) -> Option<StartError> {
        let state = self.replica.state();
        let known = state.members().get(&member.id);
        let why = if state.is_retired(member.id) {
            Refusal::Retired
        } else if known.is_some_and(|known| known.machine != member.machine) {
            Refusal::OtherMachine
        } else {
            return None;
        };
        Some(StartError::NodeIdTaken {
            id: member.id,
            remedy: remedy(why),
        })
    }

    /// Has the leader append the member, unless the log knows it already.
    async fn admit(&self, member: Member) -> Welcome {
        let id = member.id;
        if !self.is_known(&member) {
            let task = Task::Propose(Command::NodeJoin(member));
            match self.by_leader(task, ADMISSION).await {
                Led::Applied(Outcome::Refused(
                    why @ (Refusal::Retired | Refusal::OtherMachine),
                )) => return Welcome::Refused(remedy(why)),
                Led::Applied(Outcome::Refused(why)) => return self.later(id, why.to_string()),
                Led::Unknown(why) | Led::Refused(why) => return self.later(id, why),
                Led::Applied(_) | Led::Purged(_) => {}
            }
        }
        let view = self.replica.view();
        let address = |member: &Member| (member.id, member.advertise.clone());
        Welcome::Joined(view.members.values().map(address).collect())
    }

    /// A founder that lost touch before it had the first entry is waited for
    /// by the others, who cannot elect a leader: it must listen to them.
    fn later(&self, id: NodeId, reason: String) -> Welcome {
        let metrics = self.raft.server_metrics();
        let metrics = metrics.borrow();
        let membership = metrics.membership_config.membership();
        let peers = match membership.get_node(&id.0) {
            Some(_) => membership
                .nodes()
                .map(|(id, n)| (NodeId(*id), n.addr.clone()))
                .collect(),
            None => BTreeMap::new(),
        };
        Welcome::Later { reason, peers }
    }

    /// On the leader: makes Raft's members follow the log's.
    pub(super) async fn arrange_members(self: Arc<Self>) {
        let mut views = self.replica.views();
        loop {
            views.borrow_and_update();
            let metrics = self.raft.metrics().borrow().clone();
            if metrics.state.is_leader()
                && !self.is_deserted()
                && let Err(reason) = self.arrange(&metrics).await
            {
                tracing::debug!(reason, "members will be arranged later");
            }
            let _ = tokio::time::timeout(ARRANGE, views.changed()).await;
        }
    }

    /// The next step towards the right members, if one is due.
    async fn arrange(&self, metrics: &RaftMetrics<u64, BasicNode>) -> Result<(), String> {
        let membership = metrics.membership_config.membership();
        let voters: BTreeSet<u64> = membership.voter_ids().collect();
        if let [_, .., last] = &membership.get_joint_config()[..] {
            // A change was left half-way by an earlier leader.
            let last = ChangeMembers::ReplaceAllVoters(last.clone());
            return step(self.raft.change_membership(last, true)).await;
        }
        let view = self.replica.view();
        for member in view.members.values() {
            if membership.get_node(&member.id.0).is_none() {
                let node = BasicNode::new(member.advertise.clone());
                step(self.raft.add_learner(member.id.0, node, false)).await?;
            }
        }
        if let Some(patience) = self.config.remove_after {
            let others = view.members.keys().copied().filter(|id| *id != self.me);
            for id in self.leases.silent(others, patience) {
                let leave = Task::Propose(Command::NodeLeave(id));
                match self.lead(leave, ARRANGE_STEP).await {
                    Led::Unknown(why) => return Err(why),
                    Led::Refused(why) => tracing::debug!(%id, why, "silent, but not removed"),
                    Led::Applied(_) | Led::Purged(_) => {
                        tracing::warn!(%id, ?patience, "removed a node that was silent for too long");
                    }
                }
            }
        }
        let retired = |id: &u64| self.replica.state().is_retired(NodeId(*id));
        let gone = membership.nodes().map(|(id, _)| *id);
        let gone: BTreeSet<u64> = gone
            .filter(|id| retired(id) && !voters.contains(id))
            .collect();
        if !gone.is_empty() {
            let change = ChangeMembers::RemoveNodes(gone);
            step(self.raft.change_membership(change, false)).await?;
        }
        let staying: BTreeSet<u64> = voters.iter().copied().filter(|id| !retired(id)).collect();
        let missing = self.config.voters_expected.saturating_sub(staying.len());
        let end = metrics.last_log_index.unwrap_or(0);
        let ready = |member: &&Member| {
            let matched = metrics
                .replication
                .as_ref()
                .and_then(|r| r.get(&member.id.0).copied());
            let matched = matched.flatten().map_or(0, |log_id| log_id.index);
            member.role == Role::Voter
                && !voters.contains(&member.id.0)
                && self.peers.is_up(member.id)
                && matched + CAUGHT_UP > end
        };
        let candidates: Vec<u64> = view
            .members
            .values()
            .filter(ready)
            .map(|m| m.id.0)
            .take(missing)
            .collect();
        // An even number of voters bears no more failures than one fewer.
        let even = (staying.len() + candidates.len()).is_multiple_of(2);
        let mut wanted = staying;
        wanted.extend(candidates.into_iter().skip(usize::from(even)));
        // In one change: between two, a pair of voters would bear no failure.
        if wanted != voters && !wanted.is_empty() {
            // Once begun, only a majority of both ends it.
            let up = self.answering(&wanted | &voters).await;
            if !is_majority(&[voters, wanted.clone()], &up) {
                return Err(format!("of the voters to be, {wanted:?}, too few answer"));
            }
            let change = ChangeMembers::ReplaceAllVoters(wanted);
            step(self.raft.change_membership(change, false)).await?;
        }
        Ok(())
    }
}

/// Waits for a change, but not forever: without a quorum it never comes.
async fn step<T, E: std::fmt::Display>(
    change: impl Future<Output = Result<T, E>>,
) -> Result<(), String> {
    match tokio::time::timeout(ARRANGE_STEP, change).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(e)) => Err(e.to_string()),
        Err(_) => Err("no quorum".into()),
    }
}

fn remedy(why: Refusal) -> String {
    let what_to_do = match why {
        Refusal::Retired => "a node that was removed comes back under a new number",
        _ => {
            "give this machine a number that was never used; \
             if the other one is gone for good, remove it"
        }
    };
    format!("{why}; {what_to_do}, with an empty data_dir and a certificate for that number")
}
