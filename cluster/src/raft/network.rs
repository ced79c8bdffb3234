//! What nodes say on the control endpoint, and Raft's own calls over it.
//!
//! Connections belong to [`Peers`] and are shared: making a client costs
//! nothing, which matters because openraft makes one for every read round.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use openraft::error::{
    InstallSnapshotError, NetworkError, RPCError, RaftError, RemoteError, Unreachable,
};
use openraft::network::{Backoff, RPCOption, RaftNetwork, RaftNetworkFactory};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, InstallSnapshotRequest, InstallSnapshotResponse,
    VoteRequest, VoteResponse,
};
use openraft::{AnyError, BasicNode, LogId};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::store::TypeConfig;
use crate::handle::{PurgeReceipt, PurgeWait};
use crate::lease::{Incarnation, Renewal};
use crate::members::Member;
use crate::peer::{PeerError, Peers};
use crate::purge::PurgeItem;
use crate::replica::Replica;
use crate::state::{ClusterId, Command, Outcome};
use crate::{NodeId, PurgeIndex};

/// How soon a call to an unreachable node is tried again. The connections
/// below have a back-off of their own, so a try costs nothing.
const RETRY: Duration = Duration::from_millis(100);

/// A request on the control endpoint. Its answer is the type named, as bincode.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Request {
    /// "This is me; let me in." The only one that non-members may send. [`Welcome`].
    Hello(Hello),
    /// One of Raft's own. As [`Call`] says.
    Raft {
        /// Which cluster's log the sender has, as far as it knows: logs of two
        /// foundings must not be compared, let alone mended by one another.
        cluster: Option<ClusterId>,
        /// What Raft has to say.
        call: Call,
    },
    /// "Let me go on answering from cache." `Result<Grant, Refusal>`.
    Renew {
        /// What the lease table is to hear.
        renewal: Renewal,
        /// Which cluster's log the sender has.
        cluster: Option<ClusterId>,
    },
    /// "My floors show this." `()`.
    Acknowledge {
        /// Which process.
        from: Incarnation,
        /// Which cluster's log it has.
        cluster: Option<ClusterId>,
        /// Cumulative.
        applied: PurgeIndex,
    },
    /// "I answer nothing from cache any more." `()`.
    Release(Incarnation),
    /// For the leader. [`Led`].
    Lead(Task),
    /// For the leader: how far the purge with this token has come.
    /// `Option<PurgeProgress>`.
    Progress {
        /// The request's own number.
        token: u128,
    },
    /// What the receiver makes of a purge that has been answered. `Observation`.
    Observe {
        /// What was named.
        item: PurgeItem,
        /// The same as a URL, where it is one.
        url: Option<String>,
    },
    /// The receiver's metrics text, if it has any: `Option<Vec<u8>>`.
    Metrics,
}

/// What Raft says.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Call {
    /// `Result<AppendEntriesResponse, RaftError>`.
    Append(AppendEntriesRequest<TypeConfig>),
    /// `Result<VoteResponse, RaftError>`.
    Vote(VoteRequest<u64>),
    /// Whether the receiver would vote for the sender now. `bool`.
    PreVote {
        /// Where the sender's log ends.
        last_log: Option<LogId<u64>>,
    },
    /// `Result<InstallSnapshotResponse, RaftError>`.
    Snapshot(InstallSnapshotRequest<TypeConfig>),
}

/// How a node introduces itself.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Hello {
    /// As it wants to be known.
    pub member: Member,
    /// The founders of a new cluster, once it has seen them all.
    pub founders: Vec<NodeId>,
    /// The cluster whose log it has, if any.
    pub cluster: Option<ClusterId>,
}

/// The answer to [`Hello`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Welcome {
    /// Not in a cluster either.
    Waiting(Hello),
    /// The log knows the caller as it wants to be known; these are its peers.
    Joined(BTreeMap<NodeId, String>),
    /// There is a cluster, but it cannot decide now.
    Later {
        /// Why.
        reason: String,
        /// Whom to listen to meanwhile, if the caller votes there.
        peers: BTreeMap<NodeId, String>,
    },
    /// The number belongs to another machine, or to one that has left.
    Refused(String),
    /// The caller has the log of another cluster.
    OtherCluster,
}

/// What only a leader can do.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Task {
    /// Append to the log and apply.
    Propose(Command),
    /// Append, apply, and wait, as a rule until the promise holds (rule 10).
    Purge {
        /// What.
        items: Vec<PurgeItem>,
        /// The request's own number (rule 16).
        token: u128,
        /// Or less than the promise.
        wait: PurgeWait,
    },
}

/// What came of a [`Task`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Led {
    /// Appended and applied.
    Applied(Outcome),
    /// The promise holds.
    Purged(PurgeReceipt),
    /// Nothing is known: not the leader, no quorum, not in time. Try again.
    Unknown(String),
    /// Not appended, with what to do first.
    Refused(String),
}

/// Raft's way out.
#[derive(Clone)]
pub(crate) struct Network {
    pub(crate) me: NodeId,
    pub(crate) peers: Peers,
    pub(crate) replica: Arc<Replica>,
}

impl RaftNetworkFactory<TypeConfig> for Network {
    type Network = Connection;

    async fn new_client(&mut self, target: u64, node: &BasicNode) -> Connection {
        let target = NodeId(target);
        // The log knows addresses better, once it knows the node.
        if target != self.me && !self.replica.state().members().contains_key(&target) {
            self.peers.set_address(target, &node.addr);
        }
        Connection {
            me: self.me,
            target,
            peers: self.peers.clone(),
            replica: self.replica.clone(),
        }
    }
}

/// Raft's way to one node.
pub(crate) struct Connection {
    me: NodeId,
    target: NodeId,
    peers: Peers,
    replica: Arc<Replica>,
}

type CallError<E = openraft::error::Infallible> = RPCError<u64, BasicNode, RaftError<u64, E>>;

impl Connection {
    async fn call<R, E>(&self, call: Call, deadline: Duration) -> Result<R, CallError<E>>
    where
        R: DeserializeOwned,
        E: std::error::Error + DeserializeOwned,
    {
        if self.target == self.me {
            let error = AnyError::error("a node does not call itself");
            return Err(RPCError::Unreachable(Unreachable::new(&error)));
        }
        let cluster = self.replica.state().cluster_id();
        let request = Request::Raft { cluster, call };
        let answer: Result<Result<R, RaftError<u64, E>>, PeerError> = self
            .peers
            .control_aside(self.target, &request, deadline)
            .await;
        match answer {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(e)) => Err(RPCError::RemoteError(RemoteError::new(self.target.0, e))),
            Err(e @ PeerError::TimedOut { .. }) => Err(RPCError::Network(NetworkError::new(&e))),
            Err(e) => Err(RPCError::Unreachable(Unreachable::new(&e))),
        }
    }
}

impl RaftNetwork<TypeConfig> for Connection {
    async fn append_entries(
        &mut self,
        rpc: AppendEntriesRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<AppendEntriesResponse<u64>, CallError> {
        self.call(Call::Append(rpc), option.hard_ttl()).await
    }

    async fn install_snapshot(
        &mut self,
        rpc: InstallSnapshotRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<InstallSnapshotResponse<u64>, CallError<InstallSnapshotError>> {
        self.call(Call::Snapshot(rpc), option.hard_ttl()).await
    }

    async fn vote(
        &mut self,
        rpc: VoteRequest<u64>,
        option: RPCOption,
    ) -> Result<VoteResponse<u64>, CallError> {
        self.call(Call::Vote(rpc), option.hard_ttl()).await
    }

    fn backoff(&self) -> Backoff {
        Backoff::new(std::iter::repeat(RETRY))
    }
}
