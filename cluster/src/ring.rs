//! The function from slice to owners: members by weight on a hash ring.
//!
//! A thin wrapper around the crate `hashring`, which places points and finds
//! the next one. What it lacks is here: virtual nodes by weight, a hash with
//! the cluster's key, and for each point the distinct nodes that follow it,
//! worked out once, so that a look-up is one hash and one binary search.
//! (`HashRing::get_with_replicas` clones the ring on every call and repeats
//! physical nodes: never call it.)
//!
//! Equal members, equal ring. Nothing but efficiency depends on that: a node
//! with another ring asks the "wrong" owner and gets right bytes.

use std::collections::{BTreeMap, HashMap};
use std::hash::{BuildHasher, Hash, Hasher};

use hashring::HashRing;
use siphasher::sip::SipHasher13;

use crate::members::{self, Members};
use crate::slice::HashKey;
use crate::{NodeId, ObjectKey};

/// Points on the ring per unit of weight. A share strays by one part in
/// sqrt(512), 4.4 %: within 9 % for three nodes, 13 % for two hundred.
const POINTS_PER_WEIGHT: u64 = 512;
/// Points on the ring in all: 256 units of weight at full precision. More
/// weight halves every node's points until they fit. 12 MB at worst.
const POINTS_MAX: u64 = 256 * POINTS_PER_WEIGHT;
/// Owners listed for a slice; nobody asks further than that.
pub const OWNERS_MAX: usize = 8;

// Domains of the keyed hash, after those in `purge`.
const DOMAIN_POINT: u8 = 6;
const DOMAIN_SLICE: u8 = 7;

/// Which nodes own a slice.
#[derive(Default)]
pub struct Ring {
    epoch: u64,
    points: Option<HashRing<Point, KeyedHash>>,
    /// The distinct lists of owners that occur; points refer to them.
    lists: Vec<Vec<NodeId>>,
    shares: BTreeMap<NodeId, f64>,
}

impl Ring {
    /// A ring without members: nobody owns anything.
    pub fn empty() -> Ring {
        Ring::default()
    }

    /// The ring of the active members; `epoch` is the log index that made it so.
    pub fn build(members: &Members, hash_key: &HashKey, epoch: u64) -> Ring {
        Ring::of_weights(&members::weights(members), hash_key, epoch)
    }

    /// The ring of these nodes with these weights.
    pub fn of_weights(weights: &BTreeMap<NodeId, u32>, hash_key: &HashKey, epoch: u64) -> Ring {
        let hash = KeyedHash(*hash_key);
        let mut points = points(weights);
        points.sort_by_cached_key(|point| (hash.hash_one(point), point.node, point.replica));
        if points.is_empty() {
            return Ring {
                epoch,
                ..Ring::empty()
            };
        }
        let lists = successors(&mut points);
        let shares = shares(&points, &hash);
        let mut ring = HashRing::with_hasher(hash);
        ring.batch_add(points);
        Ring {
            epoch,
            points: Some(ring),
            lists,
            shares,
        }
    }

    /// Owners of slice `index` of the object `key`: distinct active nodes in
    /// ring order, the owner first, at most [`OWNERS_MAX`]. Empty ring, empty list.
    pub fn owners(&self, key: ObjectKey, index: u32) -> &[NodeId] {
        let point = self
            .points
            .as_ref()
            .and_then(|points| points.get(&Position(key, index)));
        point.map_or(&[], |point| &self.lists[point.owners as usize])
    }

    /// Log index of the last change to who owns what.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Share of all slices that `node` owns, 0 to 1.
    pub fn share(&self, node: NodeId) -> f64 {
        self.shares.get(&node).copied().unwrap_or(0.0)
    }
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring")
            .field("epoch", &self.epoch)
            .field("shares", &self.shares)
            .finish()
    }
}

/// One virtual node. Its place depends on `node` and `replica` only.
#[derive(Clone, Copy, Debug)]
struct Point {
    node: NodeId,
    replica: u32,
    /// Position in `Ring::lists`.
    owners: u32,
}

impl Hash for Point {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u8(DOMAIN_POINT);
        state.write_u64(self.node.0);
        state.write_u32(self.replica);
    }
}

/// Where a slice lies on the ring.
struct Position(ObjectKey, u32);

impl Hash for Position {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u8(DOMAIN_SLICE);
        state.write_u128(self.0.0);
        state.write_u32(self.1);
    }
}

/// Hashes with the cluster's key.
#[derive(Clone, Debug, PartialEq)]
struct KeyedHash(HashKey);

impl BuildHasher for KeyedHash {
    type Hasher = SipHasher13;

    fn build_hasher(&self) -> SipHasher13 {
        SipHasher13::new_with_key(&self.0.0)
    }
}

/// Every node's points, before they have a list of owners.
fn points(weights: &BTreeMap<NodeId, u32>) -> Vec<Point> {
    let wanted = |weight: u32| u64::from(weight) * POINTS_PER_WEIGHT;
    let total: u64 = weights.values().map(|weight| wanted(*weight)).sum();
    // Halving keeps each node's first points where they were.
    let mut shift = 0;
    while total >> shift > POINTS_MAX {
        shift += 1;
    }
    let of_node = |(node, weight): (&NodeId, &u32)| {
        let node = *node;
        let count = if *weight == 0 {
            0
        } else {
            (wanted(*weight) >> shift).max(1)
        };
        // At most POINTS_MAX, far below 2^32.
        (0..count as u32).map(move |replica| Point {
            node,
            replica,
            owners: 0,
        })
    };
    weights.iter().flat_map(of_node).collect()
}

/// Gives each point, in ring order, its list of owners; returns the lists.
fn successors(points: &mut [Point]) -> Vec<Vec<NodeId>> {
    let mut lists = Vec::new();
    let mut known: HashMap<Vec<NodeId>, u32> = HashMap::new();
    let mut following: Vec<NodeId> = Vec::new();
    // Backwards, a point's list is its node and then the next point's list.
    // The first time round only collects what lies beyond the end.
    for round in 0..2 {
        for point in points.iter_mut().rev() {
            following.retain(|node| *node != point.node);
            following.insert(0, point.node);
            following.truncate(OWNERS_MAX);
            if round == 1 {
                point.owners = *known.entry(following.clone()).or_insert_with(|| {
                    lists.push(following.clone());
                    (lists.len() - 1) as u32
                });
            }
        }
    }
    lists
}

/// Share of the hash range that ends at each node's points.
fn shares(points: &[Point], hash: &KeyedHash) -> BTreeMap<NodeId, f64> {
    let mut shares = BTreeMap::new();
    let Some(last) = points.last() else {
        return shares;
    };
    let mut before = hash.hash_one(last);
    for point in points {
        let here = hash.hash_one(point);
        // A lone point owns the whole range, which is an arc of zero here.
        let arc = if points.len() == 1 {
            1.0
        } else {
            here.wrapping_sub(before) as f64 / 2f64.powi(64)
        };
        *shares.entry(point.node).or_insert(0.0) += arc;
        before = here;
    }
    shares
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const KEY: HashKey = HashKey([5; 16]);
    const SAMPLE: u32 = 20_000;

    fn ring(weights: &[(u64, u32)]) -> Ring {
        let weights = weights
            .iter()
            .map(|(node, weight)| (NodeId(*node), *weight))
            .collect();
        Ring::of_weights(&weights, &KEY, 1)
    }

    fn equal(nodes: u64) -> Vec<(u64, u32)> {
        (1..=nodes).map(|node| (node, 1)).collect()
    }

    fn slice(n: u32) -> (ObjectKey, u32) {
        (ObjectKey(u128::from(n / 8) << 64 | 77), n % 8)
    }

    fn owner(ring: &Ring, n: u32) -> Option<NodeId> {
        let (key, index) = slice(n);
        ring.owners(key, index).first().copied()
    }

    #[test]
    fn an_empty_ring_has_no_owners() {
        for ring in [Ring::empty(), ring(&[]), ring(&[(1, 0)])] {
            assert_eq!(ring.owners(ObjectKey(1), 0), &[]);
            assert_eq!(ring.share(NodeId(1)), 0.0);
        }
    }

    #[test]
    fn one_node_owns_everything() {
        let ring = ring(&[(4, 1)]);
        assert_eq!(ring.owners(ObjectKey(1), 0), &[NodeId(4)]);
        assert!((ring.share(NodeId(4)) - 1.0).abs() < 1e-9);
    }

    #[test]
    fn equal_weights_share_equally() {
        for nodes in [2, 3, 5, 8, 20, 200] {
            let ring = ring(&equal(nodes));
            let shares: Vec<f64> = (1..=nodes).map(|node| ring.share(NodeId(node))).collect();
            assert!((shares.iter().sum::<f64>() - 1.0).abs() < 1e-6);
            for share in shares {
                let ratio = share * nodes as f64;
                assert!(
                    (0.85..1.15).contains(&ratio),
                    "{ratio} of its share among {nodes}"
                );
            }
        }
    }

    #[test]
    fn slices_fall_as_the_shares_say() {
        let ring = ring(&[(1, 1), (2, 2), (3, 5)]);
        for (node, weight) in [(1, 1.0), (2, 2.0), (3, 5.0)] {
            let owned = (0..SAMPLE)
                .filter(|n| owner(&ring, *n) == Some(NodeId(node)))
                .count();
            let measured = owned as f64 / f64::from(SAMPLE);
            assert!((measured - ring.share(NodeId(node))).abs() < 0.01);
            assert!(
                (measured / (weight / 8.0) - 1.0).abs() < 0.15,
                "node {node}: {measured}"
            );
        }
    }

    /// A joining node takes slices; nobody else trades any. A leaving one the same.
    #[test]
    fn only_the_joining_node_gains() {
        let (before, after) = (ring(&equal(4)), ring(&equal(5)));
        let mut taken = 0;
        for n in 0..SAMPLE {
            if owner(&before, n) != owner(&after, n) {
                assert_eq!(owner(&after, n), Some(NodeId(5)));
                taken += 1;
                let (key, index) = slice(n);
                // The next in the list is the one that had it before.
                assert_eq!(after.owners(key, index).get(1).copied(), owner(&before, n));
            }
        }
        assert!(
            (0.15..0.25).contains(&(f64::from(taken) / f64::from(SAMPLE))),
            "{taken}"
        );
    }

    #[test]
    fn heavy_weights_stay_within_the_points_and_in_proportion() {
        let weights = [(1, u32::MAX), (2, u32::MAX), (3, u32::MAX / 2), (4, 1)];
        let ring = ring(&weights);
        let points = ring.points.as_ref().map_or(0, HashRing::len) as u64;
        assert!(points <= POINTS_MAX + weights.len() as u64);
        assert!((ring.share(NodeId(1)) - 0.4).abs() < 0.02);
        assert!(ring.share(NodeId(4)) > 0.0);
    }

    #[test]
    fn who_drains_or_weighs_nothing_owns_nothing() {
        use crate::members::{Member, NodeState, Role};
        let member = |id, weight, state| {
            let (advertise, role) = (String::from("n:1"), Role::Edge);
            (
                NodeId(id),
                Member {
                    id: NodeId(id),
                    machine: 0,
                    advertise,
                    role,
                    weight,
                    state,
                },
            )
        };
        let members: Members = [
            member(1, 1, NodeState::Active),
            member(2, 0, NodeState::Active),
            member(3, 1, NodeState::Draining),
            member(4, 1, NodeState::Active),
        ]
        .into();
        let ring = Ring::build(&members, &KEY, 12);
        assert_eq!(ring.epoch(), 12);
        for n in 0..1000 {
            let (key, index) = slice(n);
            let mut owners = ring.owners(key, index).to_vec();
            owners.sort();
            assert_eq!(owners, [NodeId(1), NodeId(4)]);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        /// The precomputed lists are what walking the ring would find.
        #[test]
        fn owners_are_the_distinct_nodes_that_follow(
            weights in prop::collection::btree_map(1..40u64, 0..4u32, 0..14),
            slices in prop::collection::vec((any::<u128>(), any::<u32>()), 20),
        ) {
            let weights: BTreeMap<NodeId, u32> =
                weights.into_iter().map(|(node, weight)| (NodeId(node), weight)).collect();
            let ring = Ring::of_weights(&weights, &KEY, 1);
            let hash = KeyedHash(KEY);
            let mut points: Vec<(u64, NodeId)> =
                points(&weights).iter().map(|point| (hash.hash_one(point), point.node)).collect();
            points.sort();
            for (key, index) in slices {
                let at = hash.hash_one(Position(ObjectKey(key), index));
                let start = points.partition_point(|(place, _)| *place < at);
                let mut walked = Vec::new();
                for (_, node) in points[start..].iter().chain(&points[..start]) {
                    if walked.len() < OWNERS_MAX && !walked.contains(node) {
                        walked.push(*node);
                    }
                }
                prop_assert_eq!(ring.owners(ObjectKey(key), index), &walked[..]);
            }
        }
    }
}
