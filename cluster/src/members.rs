//! Who belongs to the cluster, and with what weight. Pure values; the log
//! decides what they are ([`crate::state`]).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// A machine's number in the cluster: positive, never used again for another.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize,
)]
pub struct NodeId(pub u64);

impl std::fmt::Display for NodeId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// Whether a member votes in elections or only follows the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Counts for the quorum.
    Voter,
    /// Follows the log, never votes.
    Edge,
}

/// What a member is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NodeState {
    /// Owns slices.
    Active,
    /// Answers what it has, owns nothing new.
    Draining,
}

/// One node, as the log knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// Its number.
    pub id: NodeId,
    /// Random number kept in its data directory: tells a machine from another
    /// one that was given the same `node_id` by mistake.
    pub machine: u128,
    /// `host:port` of its slice endpoint (UDP); control traffic is on the next port.
    pub advertise: String,
    /// Voter or edge.
    pub role: Role,
    /// Share of the ring, relative to the others.
    pub weight: u32,
    /// Active or draining.
    pub state: NodeState,
}

/// All members, by number.
pub type Members = BTreeMap<NodeId, Member>;

/// Who owns slices, with what weight: active members of positive weight.
pub fn weights(members: &Members) -> BTreeMap<NodeId, u32> {
    let owns = |member: &&Member| member.state == NodeState::Active && member.weight > 0;
    members
        .values()
        .filter(owns)
        .map(|member| (member.id, member.weight))
        .collect()
}
