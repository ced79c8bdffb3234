//! What the nodes of a cluster agree on, and how they reach one another.
//!
//! | module | question it answers |
//! | --- | --- |
//! | [`mod@slice`] | what is an object, a generation, a slice; which slices does a range touch? |
//! | [`members`] | who belongs to the cluster, with what weight? |
//! | [`ring`] | which nodes own a slice, in what order? |
//! | [`purge`] | which manifests has a purge made unusable? |
//! | [`state`] | what does the log say, all in all? |
//! | [`lease`] | who may answer from cache; when may a purge be answered? |
//! | [`wire`] | what do peers say to one another? |
//! | `replica` | what has this node applied? |
//! | `running` | which answers does a hard purge wait for? |
//! | `shares` | how much has each node under way here? |
//! | [`raft`] | how does the log reach everybody? |
//! | [`peer`] | how do bytes cross from node to node? |
//! | `alone` | how does a machine without a cluster keep its purges? |
//! | [`crc32c`] | are these the bytes that came? |
//! | `data_dir` | which machine is this? |
//! | [`handle`] | what may the daemon call? |
//!
//! `slice members ring purge lease state wire` are pure: no async, clock,
//! randomness or I/O; time and entropy arrive as arguments.
//!
//! # Invariants
//!
//! Cited by number elsewhere; each has a checker in the tests.
//!
//! 1. A manifest carries the purge index applied *before* its origin request
//!    left, also across peers; it is usable while no later purge covers it.
//!    Slices are immutable and reached only through a usable manifest.
//! 2. A peer request carries the asker's floor; an owner behind it catches up
//!    or refuses.
//! 3. An owner answering a peer neither forwards nor waits on a flight that
//!    does: one hop, no cycles. It may ask the owner before it for what is
//!    stored there, and that is answered without asking or waiting.
//! 4. Bytes of two versions never meet in one response.
//! 5. `apply` is deterministic and cannot fail; trouble on disk stops the node.

mod alone;
pub mod crc32c;
mod data_dir;
pub mod handle;
pub mod lease;
pub mod members;
pub mod peer;
pub mod purge;
pub mod raft;
mod replica;
pub mod ring;
mod running;
mod shares;
pub mod slice;
pub mod state;
pub mod wire;

/// Whether a purge is looked at before an answer: always, but in a build that
/// measures what it costs.
pub const IS_CHECKED: bool = !cfg!(feature = "unchecked");

pub use handle::Cluster;
pub use members::{Member, Members, NodeId};
pub use purge::PurgeIndex;
pub use running::Epoch;
pub use slice::{Generation, ObjectKey, SliceId};
