//! Whole clusters in one process: real QUIC on loopback, real logs on disk.
#![allow(missing_docs, clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use futures::StreamExt as _;
use pingora_slice_client::ca::{ca_init, ca_issue};
use pingora_slice_cluster::handle::{Cluster, ClusterConfig, PurgeError, PurgeWait, StartError};
use pingora_slice_cluster::members::{NodeState, Role};
use pingora_slice_cluster::peer::TlsFiles;
use pingora_slice_cluster::purge::{PurgeItem, PurgeMode, Scope, Subject};
use pingora_slice_cluster::{NodeId, ObjectKey, PurgeIndex};
use tempfile::TempDir;

/// For conditions that hold within a second or two on an idle machine.
const PATIENCE: Duration = Duration::from_secs(60);
const LEASE: Duration = Duration::from_secs(1);

/// A directory with an authority, and the nodes' numbers, addresses and directories.
struct Site {
    dir: TempDir,
    addresses: Vec<SocketAddr>,
    voters: usize,
}

impl Site {
    /// A place for `nodes` nodes, of which the first `voters` found a cluster.
    fn new(nodes: usize, voters: usize) -> Site {
        let dir = tempfile::tempdir().unwrap();
        ca_init(dir.path()).unwrap();
        let addresses: Vec<_> = (0..nodes).map(|_| free_ports()).collect();
        for node in 1..=nodes {
            ca_issue(dir.path(), node as u64, &["127.0.0.1".into()]).unwrap();
        }
        Site {
            dir,
            addresses,
            voters,
        }
    }

    fn config(&self, node: usize) -> ClusterConfig {
        let path = self.dir.path();
        let founders = self.addresses.iter().take(self.voters);
        ClusterConfig {
            node_id: NodeId(node as u64),
            listen: self.addresses[node - 1],
            advertise: self.addresses[node - 1].to_string(),
            seeds: founders.map(ToString::to_string).collect(),
            voters_expected: self.voters,
            role: if node <= self.voters {
                Role::Voter
            } else {
                Role::Edge
            },
            weight: 1,
            data_dir: path.join(format!("data{node}")),
            lease: LEASE,
            remove_after: None,
            tls: TlsFiles {
                ca: path.join("ca.pem"),
                cert: path.join(format!("node{node}.pem")),
                key: path.join(format!("node{node}.key")),
            },
        }
    }

    /// Starts a node whose process before may still be ending.
    async fn start(&self, node: usize) -> Cluster {
        start(self.config(node)).await
    }

    /// All nodes, once each may serve and sees all others.
    async fn start_all(&self) -> Vec<Cluster> {
        let mut nodes = Vec::new();
        for node in 1..=self.addresses.len() {
            nodes.push(self.start(node).await);
        }
        until("the cluster forms", || {
            nodes
                .iter()
                .all(|n| n.may_serve() && n.view().members.len() == nodes.len())
        })
        .await;
        nodes
    }
}

/// See [`Site::start`].
async fn start(config: ClusterConfig) -> Cluster {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match Cluster::start(config.clone()).await {
            Ok(node) => return node,
            Err(e) => assert!(Instant::now() < deadline, "{e}"),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// An address whose port and the next one are free.
fn free_ports() -> SocketAddr {
    loop {
        let first = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = first.local_addr().unwrap();
        if UdpSocket::bind((Ipv4Addr::LOCALHOST, address.port().wrapping_add(1))).is_ok() {
            return address;
        }
    }
}

async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn url(node: &Cluster, path: &str) -> (Vec<PurgeItem>, Subject) {
    let key = node.view().hash_key.unwrap();
    let item = PurgeItem {
        scope: Scope::url(&key, "a.test", path),
        mode: PurgeMode::Plain,
    };
    (vec![item], Subject::new(&key, "a.test", path, &[""; 0]))
}

fn leader(nodes: &[Cluster]) -> usize {
    let leader = nodes[0].status().leader.unwrap();
    nodes
        .iter()
        .position(|node| node.view().me == leader)
        .unwrap()
}

/// Purges by `node`, again with the same token until it is confirmed.
async fn purge_until_confirmed(node: &Cluster, path: &str, token: u128) -> PurgeIndex {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match node.purge(url(node, path).0, token).await {
            Ok(receipt) => return receipt.index,
            Err(e) => assert!(Instant::now() < deadline, "never confirmed: {e}"),
        }
    }
}

async fn stop_all(nodes: Vec<Cluster>) {
    for node in &nodes {
        node.stop().await;
    }
}

fn owners(node: &Cluster) -> Vec<Vec<NodeId>> {
    let view = node.view();
    (0..50)
        .map(|n| view.ring.owners(ObjectKey(n), 0).to_vec())
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn three_nodes_form_and_purge_by_each() {
    let site = Site::new(3, 3);
    let nodes = site.start_all().await;
    until("all agree on the ring", || {
        nodes
            .iter()
            .all(|n| n.view().ring.epoch() == nodes[0].view().ring.epoch())
    })
    .await;
    let keys: BTreeSet<_> = nodes.iter().map(|n| n.view().hash_key.unwrap().0).collect();
    assert_eq!(keys.len(), 1);
    for node in &nodes {
        assert_eq!(owners(node), owners(&nodes[0]));
        assert_eq!(owners(node)[0].len(), 3);
    }
    for (token, node) in nodes.iter().enumerate() {
        let path = format!("/film{token}");
        let (items, subject) = url(node, &path);
        let versions: Vec<_> = nodes.iter().map(Cluster::version).collect();
        let receipt = node.purge(items.clone(), token as u128).await.unwrap();
        // The promise: in force everywhere at this moment, not a little later.
        for (other, before) in nodes.iter().zip(versions) {
            assert_eq!(other.floor(&subject).plain, receipt.index);
            assert!(other.applied() >= receipt.index);
            assert_ne!(other.version(), before);
        }
        assert_eq!(receipt.acked.len(), 3);
        assert_eq!(receipt.fenced, []);
        // A retry, by another node, finds the first try's entry (rule 16).
        let again = nodes[0].purge(items, token as u128).await.unwrap();
        assert_eq!(again.index, receipt.index);
    }
    let status = nodes[2].status();
    assert_eq!(status.nodes.len(), 3);
    assert!(status.nodes.iter().all(|node| node.up));
    assert!((status.nodes.iter().map(|node| node.ring_share).sum::<f64>() - 1.0).abs() < 1e-9);
    assert_eq!(status.nodes.iter().filter(|node| node.leader).count(), 1);
    stop_all(nodes).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_purge_is_answered_without_waiting_for_a_renewal() {
    let site = Site::new(3, 3);
    let nodes = site.start_all().await;
    let mut times = Vec::new();
    for token in 0..20u128 {
        let node = &nodes[token as usize % 3];
        let began = Instant::now();
        node.purge(url(node, "/film").0, token).await.unwrap();
        times.push(began.elapsed());
    }
    times.sort();
    println!("purge: median {:?}, slowest {:?}", times[10], times[19]);
    // Renewals come every quarter of a lease.
    assert!(times[10] < LEASE / 8, "median {:?}", times[10]);
    stop_all(nodes).await;
}

/// However many purges wait on the way to the leader, the acknowledgements that
/// they wait for overtake them.
#[tokio::test(flavor = "multi_thread")]
async fn many_purges_through_a_follower_cost_nobody_the_lease() {
    let site = Site::new(3, 3);
    let nodes = site.start_all().await;
    let follower = &nodes[(leader(&nodes) + 1) % 3];
    let (items, _) = url(follower, "/film");
    let purge = async |token| {
        let began = Instant::now();
        let receipt = follower.purge(items.clone(), token).await.unwrap();
        assert_eq!(receipt.fenced, []);
        began.elapsed()
    };
    let times = futures::future::join_all((0..200).map(purge)).await;
    let slowest = times.into_iter().max();
    println!("slowest of 200 purges at once: {slowest:?}");
    assert!(follower.may_serve());
    stop_all(nodes).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_dies_delays_purges_by_a_lease_and_a_half_at_most() {
    let site = Site::new(3, 3);
    let mut nodes = site.start_all().await;
    // An abrupt end: nothing is released.
    let dead = (leader(&nodes) + 1) % 3;
    drop(nodes.remove(dead));
    let began = Instant::now();
    let receipt = nodes[0].purge(url(&nodes[0], "/film").0, 1).await.unwrap();
    assert_eq!(receipt.fenced, [NodeId(dead as u64 + 1)]);
    assert_eq!(receipt.acked.len(), 2);
    assert!(began.elapsed() < LEASE * 2, "{:?}", began.elapsed());
    stop_all(nodes).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_stops_delays_nothing_and_comes_back() {
    let site = Site::new(3, 3);
    let mut nodes = site.start_all().await;
    let away = (leader(&nodes) + 1) % 3;
    let before = nodes[away].applied();
    nodes[away].stop().await;
    drop(nodes.remove(away));
    let began = Instant::now();
    let (items, subject) = url(&nodes[0], "/film");
    let receipt = nodes[0].purge(items, 1).await.unwrap();
    assert!(began.elapsed() < LEASE / 2, "{:?}", began.elapsed());
    assert_eq!(receipt.fenced, [NodeId(away as u64 + 1)]);

    let back = site.start(away + 1).await;
    assert!(back.applied() >= before, "applied ran backwards");
    until("the node serves again", || back.may_serve()).await;
    // It serves, so it has applied what was answered while it was away.
    assert_eq!(back.floor(&subject).plain, receipt.index);
    nodes.push(back);
    stop_all(nodes).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_of_all_loses_nothing_acknowledged() {
    let site = Site::new(3, 3);
    let nodes = site.start_all().await;
    let key = nodes[0].view().hash_key;
    let mut indices = Vec::new();
    for token in 0..5u128 {
        let node = &nodes[token as usize % 3];
        indices.push(
            node.purge(url(node, &format!("/{token}")).0, token)
                .await
                .unwrap()
                .index,
        );
    }
    let applied: Vec<_> = nodes.iter().map(Cluster::applied).collect();
    // As abruptly as one process allows.
    drop(nodes);

    let mut nodes = Vec::new();
    for (n, before) in applied.iter().enumerate() {
        let node = site.start(n + 1).await;
        assert!(
            node.applied() >= *before,
            "applied ran backwards on node {}",
            n + 1
        );
        assert!(
            n > 0 || !node.may_serve(),
            "a lease survived a restart (rule 15)"
        );
        nodes.push(node);
    }
    until("all serve again", || nodes.iter().all(Cluster::may_serve)).await;
    for node in &nodes {
        assert_eq!(node.view().hash_key, key);
        assert_eq!(node.view().members.len(), 3);
        for (token, index) in indices.iter().enumerate() {
            assert_eq!(node.floor(&url(node, &format!("/{token}")).1).plain, *index);
        }
    }
    let again = purge_until_confirmed(&nodes[1], "/3", 3).await;
    assert_eq!(again, indices[3], "the retry did not find its entry");
    stop_all(nodes).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn purges_go_on_when_the_leader_dies() {
    let site = Site::new(3, 3);
    let mut nodes = site.start_all().await;
    let dead = leader(&nodes);
    drop(nodes.remove(dead));
    let index = purge_until_confirmed(&nodes[0], "/film", 1).await;
    for node in &nodes {
        assert_eq!(node.floor(&url(node, "/film").1).plain, index);
    }
    until("the others serve", || nodes.iter().all(Cluster::may_serve)).await;
    stop_all(nodes).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_quorum_nothing_is_promised_nor_served() {
    let site = Site::new(3, 3);
    let mut nodes = site.start_all().await;
    let last = nodes.remove(leader(&nodes));
    drop(nodes);
    let began = Instant::now();
    let answer = last.purge(url(&last, "/film").0, 1).await;
    assert!(
        matches!(answer, Err(PurgeError::NotConfirmed(_))),
        "{answer:?}"
    );
    assert!(
        began.elapsed() < LEASE * 2 + Duration::from_secs(3),
        "{:?}",
        began.elapsed()
    );
    until("the lease ends", || !last.may_serve()).await;
    last.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn edges_join_drain_and_leave() {
    let site = Site::new(4, 3);
    let nodes = site.start_all().await;
    let edge = NodeId(4);
    assert_eq!(nodes[0].view().members[&edge].role, Role::Edge);
    let receipt = nodes[3].purge(url(&nodes[3], "/film").0, 1).await.unwrap();
    assert!(receipt.acked.contains(&edge));

    nodes[1].drain(edge).await.unwrap();
    until("the edge owns nothing", || {
        nodes
            .iter()
            .all(|n| owners(n).iter().all(|owners| !owners.contains(&edge)))
    })
    .await;
    assert_eq!(nodes[0].view().members[&edge].state, NodeState::Draining);
    assert!(matches!(
        nodes[0].drain(NodeId(9)).await,
        Err(PurgeError::Invalid(_))
    ));

    nodes[2].remove(edge).await.unwrap();
    let reason = tokio::time::timeout(PATIENCE, nodes[3].failed())
        .await
        .unwrap();
    assert!(
        matches!(reason, StartError::NodeIdTaken { id, .. } if id == edge),
        "{reason}"
    );
    until("it is no member", || {
        !nodes[2].view().members.contains_key(&edge)
    })
    .await;
    nodes[0].purge(url(&nodes[0], "/film").0, 2).await.unwrap();
    assert!(!nodes[3].may_serve());
    stop_all(nodes).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_voter_is_replaced() {
    let site = Site::new(4, 3);
    let mut nodes = Vec::new();
    for node in 1..=4 {
        let config = ClusterConfig {
            role: Role::Voter,
            ..site.config(node)
        };
        nodes.push(Cluster::start(config).await.unwrap());
    }
    until("all serve", || nodes.iter().all(Cluster::may_serve)).await;
    // A founder goes for good; the fourth takes its place, so that another may die.
    drop(nodes.remove(0));
    let deadline = Instant::now() + PATIENCE;
    while let Err(e) = nodes[0].remove(NodeId(1)).await {
        assert!(Instant::now() < deadline, "{e}");
    }
    let three = BTreeSet::from([NodeId(2), NodeId(3), NodeId(4)]);
    until("there are three voters again", || {
        nodes.iter().all(|n| n.voters() == three)
    })
    .await;
    drop(nodes.remove(0));
    purge_until_confirmed(&nodes[0], "/film", 1).await;
    stop_all(nodes).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_comes_back_with_another_address_and_weight() {
    let mut site = Site::new(3, 3);
    let mut nodes = site.start_all().await;
    nodes[2].stop().await;
    drop(nodes.pop());
    let moved = free_ports();
    let config = ClusterConfig {
        listen: moved,
        advertise: moved.to_string(),
        weight: 2,
        ..site.config(3)
    };
    site.addresses[2] = moved;
    nodes.push(Cluster::start(config).await.unwrap());
    until("the move is known", || {
        nodes.iter().all(|node| {
            let view = node.view();
            let member = &view.members.get(&NodeId(3));
            member.is_some_and(|m| m.advertise == moved.to_string() && m.weight == 2)
        })
    })
    .await;
    until("all serve", || nodes.iter().all(Cluster::may_serve)).await;
    let receipt = nodes[2].purge(url(&nodes[2], "/film").0, 1).await.unwrap();
    assert_eq!(receipt.acked.len(), 3);
    stop_all(nodes).await;
}

/// Each can tell the log so only once there is a leader, whom they elect there.
#[tokio::test(flavor = "multi_thread")]
async fn voters_that_have_moved_elect_a_leader() {
    let mut site = Site::new(3, 3);
    let nodes = site.start_all().await;
    let away = leader(&nodes);
    stop_all(nodes).await;
    let stay: Vec<_> = (0..3).filter(|node| *node != away).collect();
    for node in &stay {
        site.addresses[*node] = free_ports();
    }
    let mut nodes = Vec::new();
    for node in stay {
        nodes.push(site.start(node + 1).await);
    }
    until("the two that are there serve", || {
        nodes.iter().all(Cluster::may_serve)
    })
    .await;
    purge_until_confirmed(&nodes[0], "/film", 1).await;
    stop_all(nodes).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn another_machine_under_the_same_number_is_refused() {
    let site = Site::new(3, 3);
    let mut nodes = site.start_all().await;
    nodes[2].stop().await;
    drop(nodes.pop());
    // The same number, address and certificate, but an empty disk.
    let config = ClusterConfig {
        data_dir: site.dir.path().join("other"),
        ..site.config(3)
    };
    let other = Cluster::start(config).await.unwrap();
    let reason = tokio::time::timeout(PATIENCE, other.failed())
        .await
        .unwrap();
    assert!(
        matches!(reason, StartError::NodeIdTaken { id: NodeId(3), .. }),
        "{reason}"
    );
    assert!(reason.to_string().contains("never used"), "{reason}");
    assert_eq!(other.applied(), PurgeIndex(0), "the log reached a stranger");
    purge_until_confirmed(&nodes[0], "/film", 1).await;
    other.stop().await;
    stop_all(nodes).await;
}

/// A founding knows nothing of the purges of the one before it, though the
/// names of its log's entries may be the same.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_of_an_earlier_founding_gets_no_lease_and_is_not_counted() {
    let site = Site::new(2, 1);
    let mut nodes = site.start_all().await;
    let (edge, voter) = (nodes.pop().unwrap(), nodes.pop().unwrap());
    let emptied = |node| ClusterConfig {
        data_dir: site.dir.path().join(format!("emptied{node}")),
        ..site.config(node)
    };
    purge_many(&voter, 30).await;
    voter.stop().await;
    drop(voter);
    let voter = start(emptied(1)).await;
    until("the voter founds anew", || voter.may_serve()).await;
    let why = tokio::time::timeout(PATIENCE, edge.failed()).await;
    let why = why.expect("it goes on with a log that is no longer the cluster's");
    assert!(matches!(why, StartError::OtherLog { .. }), "{why}");
    until("its old lease ends", || !edge.may_serve()).await;
    let receipt = voter.purge(url(&voter, "/new").0, 1).await.unwrap();
    assert_eq!(receipt.acked, [NodeId(1)]);

    edge.stop().await;
    drop(edge);
    let edge = start(emptied(2)).await;
    tokio::select! {
        why = edge.failed() => panic!("{why}"),
        () = until("it joins with nothing of the old", || edge.may_serve()) => {}
    }
    stop_all(vec![voter, edge]).await;
}

/// Voters that lost what they had committed cannot vouch for those who have applied it.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_ahead_of_the_log_gets_no_lease_and_is_not_counted() {
    let site = Site::new(2, 1);
    let mut nodes = site.start_all().await;
    let (edge, voter) = (nodes.pop().unwrap(), nodes.pop().unwrap());
    let copy = site.dir.path().join("copy");
    voter.stop().await;
    drop(voter);
    copy_dir(&site.config(1).data_dir, &copy);
    let voter = site.start(1).await;
    until("the voter is back", || {
        voter.may_serve() && edge.may_serve()
    })
    .await;
    purge_many(&voter, 30).await;
    voter.stop().await;
    drop(voter);
    let turned_back = ClusterConfig {
        data_dir: copy,
        ..site.config(1)
    };
    let voter = start(turned_back).await;
    until("the voter is back again", || voter.may_serve()).await;
    let why = tokio::time::timeout(PATIENCE, edge.failed()).await;
    let why = why.expect("it goes on with purges that the log does not hold");
    assert!(matches!(why, StartError::OtherLog { .. }), "{why}");
    let receipt = voter.purge(url(&voter, "/new").0, 1).await.unwrap();
    assert_eq!(receipt.acked, [NodeId(1)]);
    stop_all(vec![voter]).await;
    edge.stop().await;
}

/// Its log says nothing in an election of this one, however long it is.
#[tokio::test(flavor = "multi_thread")]
async fn a_voter_of_an_earlier_founding_elects_nobody() {
    let site = Site::new(3, 3);
    let nodes = site.start_all().await;
    purge_many(&nodes[0], 30).await;
    let led_before = leader(&nodes);
    stop_all(nodes).await;
    let emptied = |node| ClusterConfig {
        data_dir: site.dir.path().join(format!("emptied{node}")),
        ..site.config(node)
    };
    let mut nodes = Vec::new();
    for node in 1..=3 {
        nodes.push(start(emptied(node)).await);
    }
    until("they found anew", || nodes.iter().all(Cluster::may_serve)).await;
    let (key, led) = (nodes[0].view().hash_key, leader(&nodes));
    stop_all(nodes).await;
    // A majority of the voters, neither of whom goes on leading, and one of them
    // with what it had before.
    let goes_back = (0..3).find(|node| ![led_before, led].contains(node));
    let goes_back = goes_back.unwrap();
    let other = 3 - led - goes_back;
    let nodes = [
        start(emptied(other + 1)).await,
        site.start(goes_back + 1).await,
    ];
    until("both know their term", || {
        nodes.iter().all(|node| node.status().term > 0)
    })
    .await;
    let terms = nodes.each_ref().map(|node| node.status().term);
    let began = Instant::now();
    until("several elections might have been", || {
        let now = nodes.each_ref().map(|node| node.status().term);
        assert_eq!(now, terms, "they have held an election");
        began.elapsed() > LEASE * 4
    })
    .await;
    let first = start(emptied(led + 1)).await;
    until("the two of this founding serve", || {
        first.may_serve() && nodes[0].may_serve()
    })
    .await;
    assert_eq!(first.view().hash_key, key);
    let why = tokio::time::timeout(PATIENCE, nodes[1].failed()).await;
    assert!(why.is_ok(), "it goes on with the log of another founding");
    stop_all(nodes.into()).await;
    first.stop().await;
}

fn copy_dir(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let to = to.join(entry.file_name());
        match entry.file_type().unwrap().is_dir() {
            true => copy_dir(&entry.path(), &to),
            false => drop(std::fs::copy(entry.path(), to).unwrap()),
        }
    }
}

/// Who has left may still hold a lease; whoever waits for less must be told so.
#[tokio::test(flavor = "multi_thread")]
async fn a_purge_that_waits_for_a_quorum_says_who_may_answer_with_older_bytes() {
    let site = Site::new(4, 3);
    let mut nodes = site.start_all().await;
    // An abrupt end: nothing is released.
    drop(nodes.pop());
    nodes[0].remove(NodeId(4)).await.unwrap();
    let items = url(&nodes[0], "/film").0;
    let receipt = nodes[0].purge_and_wait(items, 1, PurgeWait::Quorum).await;
    let pending = receipt.unwrap().pending;
    assert!(pending.contains(&NodeId(4)), "{pending:?}");
    // Once everybody has it or is fenced, that is the whole promise.
    let settled = nodes[0].purge(url(&nodes[0], "/film").0, 1).await.unwrap();
    let items = url(&nodes[0], "/film").0;
    let again = nodes[0].purge_and_wait(items, 1, PurgeWait::Quorum).await;
    assert_eq!(again.unwrap(), settled);
    stop_all(nodes).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_data_directory_has_one_holder() {
    let site = Site::new(1, 1);
    let node = site.start(1).await;
    until("one voter forms at once", || node.may_serve()).await;
    let second = Cluster::start(ClusterConfig {
        listen: free_ports(),
        ..site.config(1)
    })
    .await;
    assert!(matches!(second, Err(StartError::Locked { .. })));
    let receipt = node.purge(url(&node, "/film").0, 1).await.unwrap();
    assert_eq!(receipt.acked, [NodeId(1)]);
    node.stop().await;
    drop(node);
    // An orderly stop gives everything back at once.
    let node = Cluster::start(site.config(1)).await.unwrap();
    assert!(node.applied() >= receipt.index);
    until("it serves again", || node.may_serve()).await;
    assert_eq!(node.floor(&url(&node, "/film").1).plain, receipt.index);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_leader_can_be_removed() {
    let site = Site::new(3, 3);
    let mut nodes = site.start_all().await;
    let leader = leader(&nodes);
    let id = nodes[leader].view().me;
    let gone = nodes.remove(leader);
    nodes[0].remove(id).await.unwrap();
    let reason = tokio::time::timeout(PATIENCE, gone.failed()).await.unwrap();
    assert!(reason.to_string().contains("removed"), "{reason}");
    let others: BTreeSet<_> = nodes.iter().map(|node| node.view().me).collect();
    assert_eq!(gone.voters(), others, "it led until it no longer counted");
    until("the others vote alone", || {
        nodes.iter().all(|n| n.voters() == others)
    })
    .await;
    purge_until_confirmed(&nodes[1], "/film", 1).await;
    gone.stop().await;
    drop(gone);
    // Its number is never used again.
    let back = site.start(id.0 as usize).await;
    let reason = tokio::time::timeout(PATIENCE, back.failed()).await.unwrap();
    assert!(matches!(reason, StartError::NodeIdTaken { .. }), "{reason}");
    back.stop().await;
    stop_all(nodes).await;
}

/// Of three voters one is down: without another, nothing would be decided again.
#[tokio::test(flavor = "multi_thread")]
async fn a_voter_that_is_needed_is_not_removed() {
    let site = Site::new(3, 3);
    let mut nodes = site.start_all().await;
    let leads = leader(&nodes);
    let leader = nodes[leads].view().me;
    drop(nodes.remove((leads + 1) % 3));
    let follower = nodes.iter().find(|node| node.view().me != leader).unwrap();
    let refused = follower.remove(leader).await;
    let Err(PurgeError::Invalid(why)) = refused else {
        panic!("{refused:?}");
    };
    assert!(why.contains("votes"), "{why}");
    purge_until_confirmed(follower, "/film", 1).await;
    assert_eq!(follower.view().members.len(), 3);
    stop_all(nodes).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_node_is_removed_when_told_so() {
    let site = Site::new(3, 3);
    let mut nodes = Vec::new();
    for node in 1..=3 {
        let config = ClusterConfig {
            remove_after: Some(LEASE * 3),
            ..site.config(node)
        };
        nodes.push(Cluster::start(config).await.unwrap());
    }
    until("all serve", || nodes.iter().all(Cluster::may_serve)).await;
    let silent = (leader(&nodes) + 1) % 3;
    let id = nodes[silent].view().me;
    drop(nodes.remove(silent));
    let gone = || {
        nodes
            .iter()
            .all(|node| !node.view().members.contains_key(&id))
    };
    until("it is removed", gone).await;
    assert_eq!(nodes[0].view().members.len(), 2);
    stop_all(nodes).await;
}

/// Purges many URLs at once; returns the index of one.
async fn purge_many(node: &Cluster, count: u128) -> PurgeIndex {
    let (items, _) = url(node, "/film");
    let purge = |token| {
        let (node, items) = (node.clone(), items.clone());
        async move { node.purge(items, token).await.unwrap().index }
    };
    let indices = futures::stream::iter((1000..1000 + count).map(purge)).buffer_unordered(64);
    indices
        .fold(
            PurgeIndex(0),
            |highest, index| async move { highest.max(index) },
        )
        .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_far_behind_gets_a_snapshot() {
    let site = Site::new(3, 3);
    let mut nodes = site.start_all().await;
    let away = (leader(&nodes) + 1) % 3;
    nodes[away].stop().await;
    drop(nodes.remove(away));
    // More than the log keeps behind a snapshot.
    let index = purge_many(&nodes[0], 6500).await;
    let back = site.start(away + 1).await;
    assert!(back.applied() < index);
    until("the node serves again", || back.may_serve()).await;
    assert!(back.applied() >= index);
    assert_eq!(back.floor(&url(&back, "/film").1).plain, index);
    let snapshot = site
        .dir
        .path()
        .join(format!("data{}/raft.snapshot", away + 1));
    assert!(snapshot.exists(), "it was not sent as a snapshot");
    back.stop().await;
    stop_all(nodes).await;
}

/// Invariant 5.
#[tokio::test(flavor = "multi_thread")]
async fn trouble_on_disk_stops_the_node() {
    let site = Site::new(1, 1);
    let node = site.start(1).await;
    until("it serves", || node.may_serve()).await;
    // Where the snapshot is written before it is renamed.
    std::fs::create_dir(site.dir.path().join("data1/raft.new")).unwrap();
    let filling = tokio::spawn({
        let node = node.clone();
        async move { purge_many(&node, 6500).await }
    });
    let reason = tokio::time::timeout(PATIENCE, node.failed()).await.unwrap();
    assert!(matches!(reason, StartError::Storage { .. }), "{reason}");
    filling.abort();
    node.stop().await;
}

#[tokio::test]
async fn alone_survives_reopening() {
    let dir = tempfile::tempdir().unwrap();
    let path: Option<PathBuf> = Some(dir.path().into());
    let node = Cluster::alone(path.clone()).unwrap();
    let (items, subject) = url(&node, "/film");
    let receipt = node.purge(items, 1).await.unwrap();
    assert!(node.may_serve());
    assert!(matches!(
        Cluster::alone(path.clone()),
        Err(StartError::Locked { .. })
    ));
    node.stop().await;
    drop(node);
    let node = Cluster::alone(path).unwrap();
    assert_eq!(node.floor(&subject).plain, receipt.index);
    assert!(node.reached(receipt.index, Duration::ZERO).await);
    let next = PurgeIndex(receipt.index.0 + 1);
    assert!(!node.reached(next, Duration::from_millis(1)).await);
}
