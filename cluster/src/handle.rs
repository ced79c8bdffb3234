//! `Cluster`: all that the daemon may call.
//!
//! One type for both kinds of life. *Alone*, purges are numbered and kept by
//! this node; *with others*, by the Raft log. The daemon sees no difference
//! but that there are peers to ask.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::alone::{self, Alone};
use crate::members::{Member, Members, Role};
use crate::peer::{Body, PeerError, Peers, SliceSource, TlsFiles};
use crate::purge::{Floor, PurgeItem, PurgeMode, Subject};
use crate::raft::{self, Node};
use crate::replica::Replica;
use crate::ring::Ring;
use crate::slice::HashKey;
use crate::state::{COMMAND_ITEMS_MAX, RecentPurge, Refusal};
use crate::wire::{Answer, Ask};
use crate::{Epoch, IS_CHECKED, NodeId, PurgeIndex};

/// Purges that [`Cluster::recent_purges`] tells of: what a page shows.
const RECENT_PURGES_MAX: usize = 50;

/// Longest that [`Cluster::stop`] takes.
pub const STOP_MAX: Duration = raft::STOP_MAX;

/// Longest that anything which needs the leader takes, with leases of `lease`: a
/// purge may have to wait for one and a half, and a new leader to be found before.
pub fn patience(lease: Duration) -> Duration {
    Duration::from_secs(1) + 2 * lease
}

/// The `cluster:` section of the configuration, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClusterConfig {
    /// This machine's number, positive.
    pub node_id: NodeId,
    /// UDP address of the slice endpoint; control traffic is on the next port.
    pub listen: SocketAddr,
    /// How the others reach it, `host:port`.
    pub advertise: String,
    /// Where to look for the others, `host:port` each. The first
    /// `voters_expected` of them found a new cluster.
    pub seeds: Vec<String>,
    /// How many voters form a new cluster: 1, 3 or 5.
    pub voters_expected: usize,
    /// Voter or edge.
    pub role: Role,
    /// Share of the ring.
    pub weight: u32,
    /// Log, vote, snapshots, machine number, lock.
    pub data_dir: PathBuf,
    /// Length of a lease (rule 11).
    pub lease: Duration,
    /// How long a node may be unreachable before the log removes it; `None`: forever.
    pub remove_after: Option<Duration>,
    /// Certificates.
    pub tls: TlsFiles,
}

/// What the log says, at one moment; cheap to hold while a request runs.
#[derive(Debug)]
pub struct View {
    /// This node.
    pub me: NodeId,
    /// With what names are hashed; `None` until the cluster has formed or been
    /// joined once: nothing can be cached before.
    pub hash_key: Option<HashKey>,
    /// Who belongs to the cluster.
    pub members: Members,
    /// Slice to owners.
    pub ring: Arc<Ring>,
    /// The ring before its last change: who may still hold what a new owner lacks.
    pub previous_ring: Arc<Ring>,
}

/// What a purge waits for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum PurgeWait {
    /// Every node has applied it or cannot answer from cache: the promise.
    #[default]
    All,
    /// It is committed and can no longer be lost. Nodes may answer with older
    /// bytes until they have applied it or their lease ends.
    Quorum,
}

/// A purge that holds from now on (rule 10).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PurgeReceipt {
    /// Its position in the log.
    pub index: PurgeIndex,
    /// Nodes that have applied it.
    pub acked: Vec<NodeId>,
    /// Nodes that cannot answer from cache until they have.
    pub fenced: Vec<NodeId>,
    /// Nodes of which neither is known: none, but for [`PurgeWait::Quorum`].
    pub pending: Vec<NodeId>,
}

/// A committed purge, as the leader sees its nodes now.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PurgeProgress {
    /// Its position in the log.
    pub index: PurgeIndex,
    /// Nodes that have applied it.
    pub acked: Vec<NodeId>,
    /// Nodes that cannot answer from cache until they have.
    pub fenced: Vec<NodeId>,
    /// Nodes that it waits for.
    pub waiting: Vec<NodeId>,
}

/// What a node was seen to make of a purge that had been answered before it
/// was asked; see [`Cluster::observe`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Observation {
    /// It could answer from cache when it was asked; read first (rule 4).
    pub leased: bool,
    /// Its floor for what was purged.
    pub floor: Floor,
    /// What it holds of the purged URL, where one was named and it is held.
    pub stored: Option<StoredStamp>,
}

/// A stored manifest, as far as purges go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredStamp {
    /// Its stamp.
    pub stamp: PurgeIndex,
    /// Whether a request would be answered with it, without asking the origin first.
    pub usable: bool,
}

impl Observation {
    /// Whether the promise of the purge at `index` is broken there.
    pub fn is_stale(&self, index: PurgeIndex, mode: PurgeMode) -> bool {
        let floor = match mode {
            PurgeMode::Plain => self.floor.plain,
            PurgeMode::Soft => self.floor.soft,
            PurgeMode::Hard => self.floor.hard,
        };
        let of_old = |stored: StoredStamp| stored.usable && stored.stamp < index;
        // What is purged softly may be used while it is validated.
        let serves = mode != PurgeMode::Soft && self.stored.is_some_and(of_old);
        self.leased && (floor < index || serves)
    }
}

/// Why nothing is promised.
#[derive(Debug, thiserror::Error)]
pub enum PurgeError {
    /// No quorum, or no acknowledgement in time; the same token may be tried again.
    #[error("the purge is not confirmed: {0}")]
    NotConfirmed(String),
    /// The request itself is wrong.
    #[error("{0}")]
    Invalid(String),
}

/// Why the cluster part could not be started. Always fatal, with a remedy in the text.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StartError {
    /// Configuration, certificates, addresses.
    #[error("{0}")]
    Config(String),
    /// Another process holds the data directory.
    #[error(
        "{path} is in use by another process: stop that one, or give each node a directory \
         of its own (cluster.data_dir; without a cluster, l2_cache_dir)"
    )]
    Locked {
        /// The directory.
        path: PathBuf,
    },
    /// The number belongs to another machine, or to this one before it lost its disk.
    #[error("node_id {id} belongs to another machine of this cluster: {remedy}")]
    NodeIdTaken {
        /// The number.
        id: NodeId,
        /// What to do.
        remedy: String,
    },
    /// The log here and the one that the cluster goes by have no common history.
    #[error("{path}: {reason}")]
    OtherLog {
        /// The data directory.
        path: PathBuf,
        /// Which of the two was lost, and what to do.
        reason: String,
    },
    /// The disk.
    #[error(
        "{path}: {reason}: this directory (cluster.data_dir; without a cluster, l2_cache_dir) \
         must be this user's to write, with room left and what is in it whole"
    )]
    Storage {
        /// Where.
        path: PathBuf,
        /// What.
        reason: String,
    },
}

/// A node as the status page, the CLI and the metrics show it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct NodeStatus {
    /// As the log knows it.
    pub member: Member,
    /// Reached within the last few seconds.
    pub up: bool,
    /// It is the leader, as far as this node knows.
    pub leader: bool,
    /// Highest log index that it is known to have applied, where known.
    pub applied: Option<PurgeIndex>,
    /// Share of the ring, 0 to 1.
    pub ring_share: f64,
}

/// The cluster as one node sees it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ClusterStatus {
    /// This node.
    pub node_id: NodeId,
    /// The leader, where known.
    pub leader: Option<NodeId>,
    /// Raft term.
    pub term: u64,
    /// Log index of the ring.
    pub ring_epoch: u64,
    /// Applied log index.
    pub purge_index: PurgeIndex,
    /// Whether this node may answer from cache now.
    pub lease_valid: bool,
    /// All members.
    pub nodes: Vec<NodeStatus>,
}

/// See the module's text. Cheap to clone.
#[derive(Clone)]
pub struct Cluster {
    inner: Arc<Inner>,
}

struct Inner {
    life: Life,
    /// The daemon's engine, once it serves.
    source: Arc<OnceLock<Arc<dyn SliceSource>>>,
}

enum Life {
    Alone(Arc<Alone>),
    Member(Node),
}

impl Cluster {
    /// One machine alone. `data_dir` keeps the hash key and the purges over a
    /// restart; `None` (no disk store) keeps them in memory, with the cache.
    ///
    /// # Errors
    /// [`StartError::Locked`], [`StartError::Storage`].
    pub fn alone(data_dir: Option<PathBuf>) -> Result<Cluster, StartError> {
        let life = Life::Alone(Arc::new(Alone::open(data_dir)?));
        Ok(Cluster {
            inner: Arc::new(Inner {
                life,
                source: Arc::default(),
            }),
        })
    }

    /// A member of a cluster: opens the log, binds both endpoints, finds the
    /// others and joins or founds the cluster in the background.
    ///
    /// # Errors
    /// All of [`StartError`]; `NodeIdTaken` and `OtherLog` surface later, through [`Cluster::failed`].
    pub async fn start(config: ClusterConfig) -> Result<Cluster, StartError> {
        let source = Arc::default();
        let life = Life::Member(Node::start(config, Arc::clone(&source)).await?);
        Ok(Cluster {
            inner: Arc::new(Inner { life, source }),
        })
    }

    /// Gives peers something to ask; until then they are answered `Busy`. The
    /// first one stays.
    pub fn serve(&self, source: Arc<dyn SliceSource>) {
        let _ = self.inner.source.set(source);
    }

    /// Completes when the node must stop: its number is taken, its disk failed
    /// (invariant 5), it was removed from the cluster.
    pub async fn failed(&self) -> StartError {
        match &self.inner.life {
            Life::Alone(alone) => alone.failed().await,
            Life::Member(node) => node.shared().failed().await,
        }
    }

    /// Leaves in good order: endpoints closed, log flushed. Never hangs.
    pub async fn stop(&self) {
        if let Life::Member(node) = &self.inner.life {
            node.stop().await;
        }
    }

    /// Members, ring and hash key as of now.
    pub fn view(&self) -> Arc<View> {
        self.replica().view()
    }

    /// Highest contiguous applied log index: the stamp for an origin request
    /// that leaves now (rule 1).
    pub fn applied(&self) -> PurgeIndex {
        self.replica().applied()
    }

    /// Changes after floors have risen; a manifest checked at this version need
    /// not be checked again. Read it before the floor that it is to vouch for.
    pub fn version(&self) -> u64 {
        self.replica().version()
    }

    /// The floor of one subject (rule 3).
    pub fn floor(&self, subject: &Subject) -> Floor {
        self.replica().floor(subject)
    }

    /// The hard purge that a generation of `subject` begun now is named after
    /// ([`crate::purge::Floors::hard_for_new`]).
    pub fn hard_for_new(&self, subject: &Subject) -> PurgeIndex {
        self.replica().hard_for_new(subject)
    }

    /// To be held by an answer from before it looks at the floors until its
    /// last byte: no hard purge applied meanwhile is acknowledged before the
    /// answer has let go. [`Epoch::over`] says when to look again.
    pub fn answering(&self) -> Arc<Epoch> {
        self.replica().answering()
    }

    /// The latest purges, newest first.
    pub fn recent_purges(&self) -> Vec<RecentPurge> {
        self.replica()
            .state()
            .recent_purges()
            .take(RECENT_PURGES_MAX)
            .copied()
            .collect()
    }

    /// Whether this node may answer from cache now (rule 4): read after the
    /// request arrived. Always true alone.
    pub fn may_serve(&self) -> bool {
        match &self.inner.life {
            Life::Alone(_) => true,
            Life::Member(node) => !IS_CHECKED || node.shared().may_serve(),
        }
    }

    /// Waits until `applied` has reached `index`, at most `wait`; false if not.
    pub async fn reached(&self, index: PurgeIndex, wait: Duration) -> bool {
        let mut progress = self.replica().progress();
        let reached = progress.wait_for(|applied| *applied >= index);
        matches!(tokio::time::timeout(wait, reached).await, Ok(Ok(_)))
    }

    /// Purges; returns when the promise holds on every node (rule 10), within
    /// two leases and a second.
    /// A retry with the same `token` finds its entry and waits for that (rule 16).
    ///
    /// # Errors
    /// [`PurgeError`]: nothing is promised.
    pub async fn purge(
        &self,
        items: Vec<PurgeItem>,
        token: u128,
    ) -> Result<PurgeReceipt, PurgeError> {
        self.purge_and_wait(items, token, PurgeWait::All).await
    }

    /// Purges, and waits for as much as `wait` says.
    ///
    /// # Errors
    /// [`PurgeError`]: nothing is promised.
    pub async fn purge_and_wait(
        &self,
        items: Vec<PurgeItem>,
        token: u128,
        wait: PurgeWait,
    ) -> Result<PurgeReceipt, PurgeError> {
        if items.is_empty() || items.len() > COMMAND_ITEMS_MAX {
            return Err(PurgeError::Invalid(Refusal::ItemCount.to_string()));
        }
        match &self.inner.life {
            Life::Member(node) => node.shared().purge(items, token, wait).await,
            Life::Alone(alone) => {
                let purged = alone.purge(items, token).await;
                self.replica().settle().await;
                purged
            }
        }
    }

    /// How far a purge has come, by its token: once it is committed, and while
    /// it is among the recent ones.
    pub async fn purge_progress(&self, token: u128) -> Option<PurgeProgress> {
        match &self.inner.life {
            Life::Member(node) => node.shared().purge_progress(token).await,
            Life::Alone(_) => {
                let index = self.replica().state().purge_of_token(token)?;
                Some(PurgeProgress {
                    index,
                    acked: vec![alone::ME],
                    ..PurgeProgress::default()
                })
            }
        }
    }

    /// Asks every other node that is up what it makes of a purge that has been
    /// answered: `item` was named, the first of its items, `url`
    /// (`host/path?query`) where it is one.
    pub async fn observe(
        &self,
        item: PurgeItem,
        url: Option<String>,
    ) -> Vec<(NodeId, Option<Observation>)> {
        match &self.inner.life {
            Life::Alone(_) => Vec::new(),
            Life::Member(node) => node.shared().observe(item, url).await,
        }
    }

    /// Asks a peer; the answer's body, where it has one, arrives as it is read.
    /// Peers that are down or backing off fail at once.
    ///
    /// # Errors
    /// [`PeerError`]: go on to the next source.
    pub async fn ask(
        &self,
        peer: NodeId,
        ask: &Ask,
        deadline: Duration,
    ) -> Result<(Answer, Option<Body>), PeerError> {
        match &self.inner.life {
            Life::Alone(_) => Err(PeerError::Unreachable {
                peer,
                reason: "no cluster".into(),
            }),
            Life::Member(node) => node.shared().peers().ask(peer, ask, deadline).await,
        }
    }

    /// Whether a peer answers the cheapest of questions in time, whatever else it
    /// is being asked.
    pub async fn is_alive(&self, peer: NodeId, within: Duration) -> bool {
        match &self.inner.life {
            Life::Alone(_) => false,
            Life::Member(node) => node.shared().peers().is_alive(peer, within).await,
        }
    }

    /// The endpoints, for what they count; none alone.
    pub fn peers(&self) -> Option<&Peers> {
        match &self.inner.life {
            Life::Alone(_) => None,
            Life::Member(node) => Some(node.shared().peers()),
        }
    }

    /// The metrics text of every other member, `None` where it did not answer.
    pub async fn metrics_of_peers(&self) -> Vec<(NodeId, Option<bytes::Bytes>)> {
        match &self.inner.life {
            Life::Alone(_) => Vec::new(),
            Life::Member(node) => node.shared().metrics_of_peers().await,
        }
    }

    /// While no cluster is known: who was greeted last (`host:port`), and what
    /// came of it, for an operator.
    pub fn unanswered(&self) -> BTreeMap<String, String> {
        match &self.inner.life {
            Life::Alone(_) => BTreeMap::new(),
            Life::Member(node) => node.shared().unanswered(),
        }
    }

    /// The cluster as this node sees it.
    pub fn status(&self) -> ClusterStatus {
        match &self.inner.life {
            Life::Alone(alone) => alone.status(),
            Life::Member(node) => node.shared().status(),
        }
    }

    /// Who votes, as far as this node knows; nobody while the voters are being
    /// changed, when majorities of the old and of the new ones are needed.
    pub fn voters(&self) -> BTreeSet<NodeId> {
        match &self.inner.life {
            Life::Alone(_) => BTreeSet::from([alone::ME]),
            Life::Member(node) => node.shared().voters(),
        }
    }

    /// Takes a node out of the ring; it goes on answering.
    ///
    /// # Errors
    /// As [`Cluster::purge`].
    pub async fn drain(&self, node: NodeId) -> Result<(), PurgeError> {
        match &self.inner.life {
            Life::Alone(_) => Err(PurgeError::Invalid("this machine is alone".into())),
            Life::Member(member) => member.shared().drain(node).await,
        }
    }

    /// Removes a node from the cluster for good.
    ///
    /// # Errors
    /// As [`Cluster::purge`].
    pub async fn remove(&self, node: NodeId) -> Result<(), PurgeError> {
        match &self.inner.life {
            Life::Alone(_) => Err(PurgeError::Invalid("this machine is alone".into())),
            Life::Member(member) => member.shared().remove(node).await,
        }
    }

    fn replica(&self) -> &Replica {
        match &self.inner.life {
            Life::Alone(alone) => &alone.replica,
            Life::Member(node) => node.shared().replica(),
        }
    }
}
