//! What the log says, all in all: members, hash key, floors.
//!
//! [`ClusterState::apply`] is total and deterministic: equal logs, equal
//! states, on every node (invariant 5). An entry that makes no sense is
//! counted and skipped, by all alike; its outcome tells the proposer.
//! Not here: how entries come to be agreed (`raft`), who is told (`handle`).

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::members::{self, Member, Members, NodeState};
use crate::purge::{Floors, PurgeItem};
use crate::ring::Ring;
use crate::slice::HashKey;
use crate::{NodeId, PurgeIndex};

/// Things that one purge command may name; a frame of them stays below 256 KiB.
pub const COMMAND_ITEMS_MAX: usize = 10_000;
/// Members at most: the lists that every node walks stay short.
pub const MEMBERS_MAX: usize = 1024;
/// Longest address of a member, bytes: a DNS name and a port.
const ADVERTISE_BYTES_MAX: usize = 260;
/// Purges remembered by token, 64 bytes each. A retry that comes after so many
/// others purges again, which is safe.
const RECENT_MAX: usize = 4096;
/// Longest snapshot, bytes: full purge tables of 18 MB, and the rest several times over.
const SNAPSHOT_BYTES_MAX: usize = 128 * 1024 * 1024;
/// Version of the snapshot's form, its first byte.
const SNAPSHOT_VERSION: u8 = 1;
/// Domain of the keyed hash (`purge` lists them).
const DOMAIN_CLUSTER: u8 = 8;

/// Which founding a log goes back to: another one has another hash key. Logs of
/// two foundings may have entries of the same names, so that Raft takes one for the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterId(u64);

/// An entry of the log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Command {
    /// The first one: what the cluster keeps for good. Later ones change nothing.
    Found {
        /// With what names are hashed.
        hash_key: HashKey,
        /// Length of a lease: leaders must agree on it (rule 12).
        lease: Duration,
    },
    /// Forget. `token` makes a retry find the first try's entry (rule 16).
    Purge {
        /// What.
        items: Vec<PurgeItem>,
        /// The request's own number.
        token: u128,
    },
    /// A node joins, or comes back with a new address, role or weight.
    NodeJoin(Member),
    /// A node leaves for good; its number is never used again.
    NodeLeave(NodeId),
    /// A node's share of the ring changes.
    NodeWeight {
        /// Which.
        id: NodeId,
        /// The new weight.
        weight: u32,
    },
    /// A node starts or stops draining.
    NodeState {
        /// Which.
        id: NodeId,
        /// The new state.
        state: NodeState,
    },
    /// Purge tables up to `seq` fold into one floor (rule 18).
    Fold {
        /// The highest purge to fold.
        seq: PurgeIndex,
    },
}

/// What became of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// It did what it says.
    Done,
    /// A purge: it holds once everybody has acknowledged this index, which is
    /// an earlier one for a retry.
    Purged(PurgeIndex),
    /// It was skipped.
    Refused(Refusal),
}

/// Why an entry was skipped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum Refusal {
    /// The cluster has its hash key and its lease.
    #[error("the cluster is already founded")]
    AlreadyFounded,
    /// No items, or more than [`COMMAND_ITEMS_MAX`].
    #[error("a purge names 1 to {COMMAND_ITEMS_MAX} things")]
    ItemCount,
    /// The number belongs to another machine.
    #[error("this node id belongs to another machine")]
    OtherMachine,
    /// The number was used by a node that has left.
    #[error("this node id has left the cluster and is never used again")]
    Retired,
    /// Not a member.
    #[error("no such member")]
    UnknownNode,
    /// Number 0, an address that is none, or one member too many.
    #[error("not a possible member")]
    BadMember,
    /// At or below what was applied.
    #[error("this position of the log has been applied")]
    AlreadyApplied,
}

/// A purge as the status page shows it and a retry finds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecentPurge {
    /// Its position in the log.
    pub index: PurgeIndex,
    /// How many things it named.
    pub items: u32,
    /// The first of them.
    pub first: PurgeItem,
    /// The request's own number.
    token: u128,
    /// A hash of the items: a token used again for other items is another purge.
    fingerprint: u64,
}

/// What the first entry says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Founded {
    hash_key: HashKey,
    lease: Duration,
}

/// See the module's text.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ClusterState {
    applied: PurgeIndex,
    founded: Option<Founded>,
    members: Members,
    retired: BTreeSet<NodeId>,
    floors: Floors,
    /// Index of the last change to who owns slices.
    ring_epoch: u64,
    /// The same and the weights before that change.
    previous_epoch: u64,
    previous_weights: BTreeMap<NodeId, u32>,
    /// Newest last.
    recent: VecDeque<RecentPurge>,
    skipped: u64,
}

impl ClusterState {
    /// Applies the entry at `index` of the log.
    pub fn apply(&mut self, index: u64, command: &Command) -> Outcome {
        let done = if index <= self.applied.0 {
            Err(Refusal::AlreadyApplied)
        } else {
            let before = members::weights(&self.members);
            let done = self.execute(PurgeIndex(index), command);
            if before != members::weights(&self.members) {
                self.previous_epoch = std::mem::replace(&mut self.ring_epoch, index);
                self.previous_weights = before;
            }
            done
        };
        self.advance(index);
        done.unwrap_or_else(|refusal| {
            self.skipped += 1;
            Outcome::Refused(refusal)
        })
    }

    /// Passes an entry that holds no command (a leader's first, a change of voters).
    pub fn advance(&mut self, index: u64) {
        self.applied = self.applied.max(PurgeIndex(index));
    }

    /// Takes over a snapshot (rule 8): floors rise, nothing runs backwards.
    pub fn install(&mut self, snapshot: ClusterState) {
        let floors = std::mem::take(&mut self.floors);
        if snapshot.applied >= self.applied {
            *self = snapshot;
            self.floors.rise_to(floors);
        } else {
            self.floors = floors;
            self.floors.rise_to(snapshot.floors);
        }
    }

    /// The snapshot: a version byte, then bincode.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = vec![SNAPSHOT_VERSION];
        bincode::serde::encode_into_std_write(self, &mut bytes, bincode::config::standard())
            .expect("memory takes every write and every field has an encoding");
        bytes
    }

    /// Reads a snapshot.
    ///
    /// # Errors
    /// Another version, or not a snapshot to its last byte.
    pub fn from_bytes(bytes: &[u8]) -> Result<ClusterState, SnapshotError> {
        let (version, payload) = bytes.split_first().ok_or(SnapshotError::Garbage)?;
        if *version != SNAPSHOT_VERSION {
            return Err(SnapshotError::Version(*version));
        }
        // The limit stops a forged length from reserving more than a snapshot holds.
        let config = bincode::config::standard().with_limit::<SNAPSHOT_BYTES_MAX>();
        match bincode::serde::decode_from_slice(payload, config) {
            Ok((state, read)) if read == payload.len() => Ok(state),
            _ => Err(SnapshotError::Garbage),
        }
    }

    /// The highest index applied, without gaps: the only source of stamps.
    pub fn applied(&self) -> PurgeIndex {
        self.applied
    }

    /// With what names are hashed, once the cluster is founded.
    pub fn hash_key(&self) -> Option<HashKey> {
        self.founded.map(|founded| founded.hash_key)
    }

    /// Which cluster this is, once it is founded.
    pub fn cluster_id(&self) -> Option<ClusterId> {
        let id = |key: HashKey| ClusterId(key.hash64(DOMAIN_CLUSTER, &[]));
        self.hash_key().map(id)
    }

    /// Length of a lease, once the cluster is founded.
    pub fn lease(&self) -> Option<Duration> {
        self.founded.map(|founded| founded.lease)
    }

    /// Everyone who may ever have been granted a lease: members and retired nodes.
    pub fn nodes(&self) -> Vec<NodeId> {
        self.members.keys().chain(&self.retired).copied().collect()
    }

    /// Who belongs to the cluster.
    pub fn members(&self) -> &Members {
        &self.members
    }

    /// Whether this number was used by a node that has left.
    pub fn is_retired(&self, id: NodeId) -> bool {
        self.retired.contains(&id)
    }

    /// What purges have made unusable.
    pub fn floors(&self) -> &Floors {
        &self.floors
    }

    /// Index of the last change to who owns slices.
    pub fn ring_epoch(&self) -> u64 {
        self.ring_epoch
    }

    /// Index of the change before that.
    pub fn previous_epoch(&self) -> u64 {
        self.previous_epoch
    }

    /// The ring as of now; empty before the cluster is founded.
    pub fn ring(&self) -> Ring {
        let build = |key| Ring::build(&self.members, &key, self.ring_epoch);
        self.hash_key().map_or_else(Ring::empty, build)
    }

    /// The ring before its last change: who may still hold what a new owner lacks.
    pub fn previous_ring(&self) -> Ring {
        let build = |key| Ring::of_weights(&self.previous_weights, &key, self.previous_epoch);
        self.hash_key().map_or_else(Ring::empty, build)
    }

    /// The latest purges, newest first.
    pub fn recent_purges(&self) -> impl Iterator<Item = &RecentPurge> {
        self.recent.iter().rev()
    }

    /// The entry of an earlier try with this token and these items (rule 16).
    pub fn purge_of(&self, token: u128, items: &[PurgeItem]) -> Option<PurgeIndex> {
        let of_token = |purge: &&RecentPurge| purge.token == token;
        let fingerprint = fingerprint(items);
        let found = self.recent.iter().rev().find(of_token)?;
        (found.fingerprint == fingerprint).then_some(found.index)
    }

    /// The entry with this token, if it is one of the recent ones.
    pub fn purge_of_token(&self, token: u128) -> Option<PurgeIndex> {
        let of_token = |purge: &&RecentPurge| purge.token == token;
        self.recent.iter().rev().find(of_token).map(|p| p.index)
    }

    /// Entries that were skipped.
    pub fn skipped(&self) -> u64 {
        self.skipped
    }

    fn execute(&mut self, index: PurgeIndex, command: &Command) -> Result<Outcome, Refusal> {
        match command {
            Command::Found { hash_key, lease } => {
                self.found(Founded {
                    hash_key: *hash_key,
                    lease: *lease,
                })?;
            }
            Command::Purge { items, token } => return self.purge(index, items, *token),
            Command::NodeJoin(member) => self.join(member)?,
            // A proposal may be made twice when the leader changes.
            Command::NodeLeave(id) if self.retired.contains(id) => {}
            Command::NodeLeave(id) => {
                self.members.remove(id).ok_or(Refusal::UnknownNode)?;
                self.retired.insert(*id);
            }
            Command::NodeWeight { id, weight } => self.member(*id)?.weight = *weight,
            Command::NodeState { id, state } => self.member(*id)?.state = *state,
            Command::Fold { seq } => self.floors.fold(*seq),
        }
        Ok(Outcome::Done)
    }

    fn found(&mut self, founded: Founded) -> Result<(), Refusal> {
        if self.founded.is_some() {
            return Err(Refusal::AlreadyFounded);
        }
        self.founded = Some(founded);
        Ok(())
    }

    fn purge(
        &mut self,
        index: PurgeIndex,
        items: &[PurgeItem],
        token: u128,
    ) -> Result<Outcome, Refusal> {
        let first = *items.first().ok_or(Refusal::ItemCount)?;
        if items.len() > COMMAND_ITEMS_MAX {
            return Err(Refusal::ItemCount);
        }
        if let Some(earlier) = self.purge_of(token, items) {
            return Ok(Outcome::Purged(earlier));
        }
        for item in items {
            self.floors.raise(item.scope, item.mode, index);
        }
        if self.recent.len() == RECENT_MAX {
            self.recent.pop_front();
        }
        let (items, fingerprint) = (items.len() as u32, fingerprint(items));
        self.recent.push_back(RecentPurge {
            index,
            items,
            first,
            token,
            fingerprint,
        });
        Ok(Outcome::Purged(index))
    }

    fn join(&mut self, member: &Member) -> Result<(), Refusal> {
        if self.retired.contains(&member.id) {
            return Err(Refusal::Retired);
        }
        let known = self.members.get(&member.id);
        if known.is_some_and(|known| known.machine != member.machine) {
            return Err(Refusal::OtherMachine);
        }
        let length = member.advertise.len();
        let full = known.is_none() && self.members.len() >= MEMBERS_MAX;
        if member.id.0 == 0 || length == 0 || length > ADVERTISE_BYTES_MAX || full {
            return Err(Refusal::BadMember);
        }
        // A restart does not undo a drain.
        let state = known.map_or(member.state, |known| known.state);
        self.members.insert(
            member.id,
            Member {
                state,
                ..member.clone()
            },
        );
        Ok(())
    }

    fn member(&mut self, id: NodeId) -> Result<&mut Member, Refusal> {
        self.members.get_mut(&id).ok_or(Refusal::UnknownNode)
    }
}

/// Why a snapshot was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SnapshotError {
    /// Written by another version of the program.
    #[error("snapshot version {0}, this node reads {SNAPSHOT_VERSION}")]
    Version(u8),
    /// Not a snapshot.
    #[error("snapshot does not decode")]
    Garbage,
}

/// A hash of purge items that is the same on every node and in every version.
fn fingerprint(items: &[PurgeItem]) -> u64 {
    let encode = |item| bincode::serde::encode_to_vec(item, bincode::config::standard());
    let encoded: Vec<_> = items
        .iter()
        .map(encode)
        .map(Result::unwrap_or_default)
        .collect();
    let parts: Vec<&[u8]> = encoded.iter().map(Vec::as_slice).collect();
    HashKey([0; 16]).hash64(0, &parts)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::members::Role;
    use crate::purge::{ENTRIES_MAX, PurgeMode, Scope, Subject};

    const KEY: HashKey = HashKey([3; 16]);
    const NO_TAGS: [&str; 0] = [];

    fn member(id: u64, machine: u128) -> Member {
        Member {
            id: NodeId(id),
            machine,
            advertise: format!("node{id}:7001"),
            role: Role::Voter,
            weight: 1,
            state: NodeState::Active,
        }
    }

    fn founded() -> ClusterState {
        let mut state = ClusterState::default();
        let lease = Duration::from_secs(2);
        assert_eq!(
            state.apply(
                1,
                &Command::Found {
                    hash_key: KEY,
                    lease
                }
            ),
            Outcome::Done
        );
        for id in 1..=3 {
            let join = Command::NodeJoin(member(id, u128::from(id)));
            assert_eq!(state.apply(1 + id, &join), Outcome::Done);
        }
        state
    }

    fn purge(path: &str, token: u128) -> Command {
        let scope = Scope::url(&KEY, "h", path);
        Command::Purge {
            items: vec![PurgeItem {
                scope,
                mode: PurgeMode::Plain,
            }],
            token,
        }
    }

    fn floor(state: &ClusterState, path: &str) -> u64 {
        state
            .floors()
            .floor(&Subject::new(&KEY, "h", path, &NO_TAGS))
            .plain
            .0
    }

    #[test]
    fn what_makes_no_sense_is_skipped_and_counted() {
        let mut state = founded();
        let before = (
            state.members().clone(),
            state.ring_epoch(),
            floor(&state, "/a"),
        );
        let other = Command::Found {
            hash_key: HashKey([8; 16]),
            lease: Duration::ZERO,
        };
        let many = vec![
            PurgeItem {
                scope: Scope::All,
                mode: PurgeMode::Hard
            };
            COMMAND_ITEMS_MAX + 1
        ];
        let nameless = Member {
            advertise: String::new(),
            ..member(9, 9)
        };
        let refused = [
            (other, Refusal::AlreadyFounded),
            (
                Command::Purge {
                    items: vec![],
                    token: 1,
                },
                Refusal::ItemCount,
            ),
            (
                Command::Purge {
                    items: many,
                    token: 1,
                },
                Refusal::ItemCount,
            ),
            (Command::NodeJoin(member(1, 77)), Refusal::OtherMachine),
            (Command::NodeJoin(member(0, 77)), Refusal::BadMember),
            (Command::NodeJoin(nameless), Refusal::BadMember),
            (Command::NodeLeave(NodeId(9)), Refusal::UnknownNode),
            (
                Command::NodeWeight {
                    id: NodeId(9),
                    weight: 1,
                },
                Refusal::UnknownNode,
            ),
            (
                Command::NodeState {
                    id: NodeId(9),
                    state: NodeState::Active,
                },
                Refusal::UnknownNode,
            ),
        ];
        for (at, (command, refusal)) in (5..).zip(&refused) {
            assert_eq!(
                state.apply(at, command),
                Outcome::Refused(*refusal),
                "{command:?}"
            );
            assert_eq!(state.applied(), PurgeIndex(at));
        }
        assert_eq!(state.skipped(), refused.len() as u64);
        let after = (
            state.members().clone(),
            state.ring_epoch(),
            floor(&state, "/a"),
        );
        assert_eq!(before, after);
        assert_eq!(state.hash_key(), Some(KEY));
    }

    #[test]
    fn a_position_is_applied_once() {
        let mut state = founded();
        state.apply(9, &purge("/a", 1));
        assert_eq!(
            state.apply(9, &purge("/b", 2)),
            Outcome::Refused(Refusal::AlreadyApplied)
        );
        assert_eq!(
            state.apply(4, &purge("/b", 2)),
            Outcome::Refused(Refusal::AlreadyApplied)
        );
        assert_eq!((state.applied(), floor(&state, "/b")), (PurgeIndex(9), 0));
    }

    #[test]
    fn a_number_is_never_used_again() {
        let mut state = founded();
        assert_eq!(
            state.apply(5, &Command::NodeLeave(NodeId(2))),
            Outcome::Done
        );
        for machine in [2, 99] {
            let back = Command::NodeJoin(member(2, machine));
            assert_eq!(
                state.apply(6 + machine as u64, &back),
                Outcome::Refused(Refusal::Retired)
            );
        }
        assert_eq!(state.nodes(), [1, 3, 2].map(NodeId));
        assert!(state.is_retired(NodeId(2)));
    }

    #[test]
    fn a_restart_does_not_undo_a_drain() {
        let mut state = founded();
        state.apply(
            5,
            &Command::NodeState {
                id: NodeId(1),
                state: NodeState::Draining,
            },
        );
        let moved = Member {
            advertise: "elsewhere:1".into(),
            ..member(1, 1)
        };
        assert_eq!(state.apply(6, &Command::NodeJoin(moved)), Outcome::Done);
        let member = &state.members()[&NodeId(1)];
        assert_eq!(
            (member.state, &member.advertise[..]),
            (NodeState::Draining, "elsewhere:1")
        );
    }

    #[test]
    fn the_epoch_changes_with_the_ring_and_with_nothing_else() {
        let mut state = founded();
        let id = NodeId(1);
        let steps = [
            (Command::NodeWeight { id, weight: 1 }, 4),
            (
                Command::NodeJoin(Member {
                    advertise: "n:2".into(),
                    ..member(1, 1)
                }),
                4,
            ),
            (purge("/a", 1), 4),
            (Command::NodeWeight { id, weight: 2 }, 8),
            (
                Command::NodeState {
                    id,
                    state: NodeState::Draining,
                },
                9,
            ),
            (Command::NodeWeight { id, weight: 7 }, 9),
            (Command::NodeLeave(id), 9),
            (Command::NodeLeave(NodeId(2)), 12),
        ];
        for (index, (command, epoch)) in (5..).zip(steps) {
            state.apply(index, &command);
            assert_eq!(state.ring_epoch(), epoch, "{command:?}");
            assert_eq!(state.ring().epoch(), epoch);
        }
        let previous = state.previous_ring();
        assert_eq!(previous.epoch(), 9);
        assert!(previous.share(NodeId(2)) > 0.3 && state.ring().share(NodeId(3)) > 0.999);
    }

    #[test]
    fn a_retry_finds_its_first_try() {
        let mut state = founded();
        assert_eq!(
            state.apply(5, &purge("/a", 7)),
            Outcome::Purged(PurgeIndex(5))
        );
        assert_eq!(
            state.apply(6, &purge("/a", 7)),
            Outcome::Purged(PurgeIndex(5))
        );
        assert_eq!(floor(&state, "/a"), 5);
        // The same number for something else is another purge.
        assert_eq!(
            state.apply(7, &purge("/b", 7)),
            Outcome::Purged(PurgeIndex(7))
        );
        assert_eq!(floor(&state, "/b"), 7);
        for index in 8..8 + RECENT_MAX as u64 {
            state.apply(index, &purge("/c", u128::from(index) << 64));
        }
        assert_eq!(state.recent_purges().count(), RECENT_MAX);
        let late = 8 + RECENT_MAX as u64;
        assert_eq!(
            state.apply(late, &purge("/b", 7)),
            Outcome::Purged(PurgeIndex(late))
        );
    }

    #[test]
    fn a_snapshot_is_the_state() {
        let mut state = founded();
        state.apply(5, &purge("/a", 7));
        state.apply(6, &Command::NodeLeave(NodeId(3)));
        let bytes = state.to_bytes();
        assert_eq!(ClusterState::from_bytes(&bytes), Ok(state));
        for cut in 0..bytes.len() {
            assert!(
                ClusterState::from_bytes(&bytes[..cut]).is_err(),
                "cut at {cut}"
            );
        }
        let longer = [&bytes[..], &[0]].concat();
        assert_eq!(
            ClusterState::from_bytes(&longer),
            Err(SnapshotError::Garbage)
        );
        let later = [&[9], &bytes[1..]].concat();
        assert_eq!(
            ClusterState::from_bytes(&later),
            Err(SnapshotError::Version(9))
        );
    }

    /// Rule 18: whether a node was there, was restarted or got a snapshot, its
    /// tables have folded at the same entry, into the same floors.
    #[test]
    fn a_fold_is_the_same_everywhere() {
        let batch = |index: u64| {
            let scope = |n| Scope::url(&KEY, "h", &format!("/{index}/{n}"));
            let items = (0..COMMAND_ITEMS_MAX).map(|n| PurgeItem {
                scope: scope(n),
                mode: if n % 2 == 0 {
                    PurgeMode::Plain
                } else {
                    PurgeMode::Hard
                },
            });
            Command::Purge {
                items: items.collect(),
                token: u128::from(index),
            }
        };
        let (first, last) = (5, 5 + (ENTRIES_MAX / COMMAND_ITEMS_MAX) as u64);
        let mut there = founded();
        let (mut restarted, mut behind) = (founded(), founded());
        for index in first..=last {
            let purge = batch(index);
            there.apply(index, &purge);
            restarted.apply(index, &purge);
            if index == first + 1 {
                behind = there.clone();
            }
            if index == last - 1 {
                assert_eq!(there.floors().entries(), ENTRIES_MAX);
                restarted = ClusterState::from_bytes(&restarted.to_bytes()).unwrap();
            }
        }
        assert!(there.floors().entries() < ENTRIES_MAX, "it has folded");
        assert!(restarted == there, "folded elsewhere after a restart");
        assert!(
            floor(&there, "/nothing") > 0,
            "into the floor of everything"
        );
        assert_eq!(floor(&there, &format!("/{last}/9")), last);
        let bytes = there.to_bytes();
        assert!(bytes.len() * 4 < SNAPSHOT_BYTES_MAX, "{}", bytes.len());
        behind.install(ClusterState::from_bytes(&bytes).unwrap());
        assert!(behind == there, "folded elsewhere after a snapshot");
    }

    #[test]
    fn a_snapshot_never_turns_anything_back() {
        let mut behind = founded();
        let mut ahead = founded();
        behind.apply(5, &purge("/a", 1));
        ahead.apply(5, &purge("/a", 1));
        ahead.apply(6, &Command::NodeLeave(NodeId(3)));
        ahead.apply(7, &purge("/b", 2));
        let mut caught_up = behind.clone();
        caught_up.install(ahead.clone());
        assert_eq!(caught_up, ahead);
        let mut unmoved = ahead.clone();
        unmoved.install(behind);
        assert_eq!(unmoved, ahead);
    }

    proptest::proptest! {
        #[test]
        fn garbage_is_refused(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..400)) {
            let versioned = [&[SNAPSHOT_VERSION], &bytes[..]].concat();
            let _ = ClusterState::from_bytes(&versioned);
            let _ = ClusterState::from_bytes(&bytes);
        }
    }
}
