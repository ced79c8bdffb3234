//! The endpoints between nodes, over real QUIC on loopback.
#![allow(missing_docs, clippy::unwrap_used)]

use std::collections::HashSet;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::FutureExt;
use futures::stream::{self, StreamExt};
use pingora_slice_client::ca;
use pingora_slice_cluster::handle::StartError;
use pingora_slice_cluster::peer::{
    self, Body, BodyBroken, CloseCode, Counters, PeerError, PeerHandler, Peers, TlsFiles,
};
use pingora_slice_cluster::wire::{
    self, Answer, Ask, HEAD_BYTES_MAX, OriginRequest, Part, ResolveAsk, SliceAsk, SliceOrigin,
    Version,
};
use pingora_slice_cluster::{Generation, NodeId, ObjectKey, PurgeIndex, SliceId};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio::sync::Notify;

const SOON: Duration = Duration::from_secs(5);
/// Longer than a connection lives from which nothing comes.
const PAUSE: Duration = Duration::from_secs(12);

/// An authority in a directory of its own, removed at the end.
struct Authority(PathBuf);

impl Authority {
    fn new() -> Authority {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!(
            "pingora-slice-peer-{}-{number}",
            std::process::id()
        ));
        ca::ca_init(&dir).unwrap();
        Authority(dir)
    }

    fn issue(&self, node: u64) -> TlsFiles {
        ca::ca_issue(&self.0, node, &["127.0.0.1".to_owned()]).unwrap();
        TlsFiles {
            ca: self.0.join("ca.pem"),
            cert: self.0.join(format!("node{node}.pem")),
            key: self.0.join(format!("node{node}.key")),
        }
    }
}

impl Drop for Authority {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// What the answering node does when it is asked for slice `index`, or to resolve an
/// object whose key has that number.
mod behaviour {
    pub const WHOLE: u32 = 0;
    pub const BREAKS_OFF: u32 = 1;
    pub const DAMAGED: u32 = 2;
    pub const NEVER_ANSWERS: u32 = 3;
    pub const NEVER_ENDS: u32 = 4;
    pub const PAST_END: u32 = 5;
    pub const PANICS: u32 = 6;
    pub const PAUSES: u32 = 7;
    pub const ENDS_LATER: u32 = 8;
}

/// Answers by [`behaviour`]; control requests are numbers, and so are answers.
#[derive(Default)]
struct Scripted {
    members: Mutex<HashSet<u64>>,
    asked: AtomicUsize,
    /// Told when a body or an answer that never ends, or one that ends later, is dropped.
    dropped: Arc<Notify>,
    /// Ends those that end later.
    end: Arc<Notify>,
}

impl Scripted {
    fn with_members(members: &[u64]) -> Arc<Scripted> {
        let handler = Scripted::default();
        handler.members.lock().unwrap().extend(members);
        Arc::new(handler)
    }
}

struct TellDropped(Arc<Notify>);

impl Drop for TellDropped {
    fn drop(&mut self) {
        self.0.notify_one();
    }
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|i| (i * 31 + i / 251) as u8).collect()
}

fn parts(length: usize) -> Vec<Result<Part, BodyBroken>> {
    let bytes = Bytes::from(pattern(length));
    let cut = |start: usize| bytes.slice(start..(start + 65_536).min(length));
    (0..length)
        .step_by(65_536)
        .map(|start| Ok(Part::new(cut(start))))
        .collect()
}

#[async_trait::async_trait]
impl PeerHandler for Scripted {
    fn is_member(&self, from: NodeId) -> bool {
        self.members.lock().unwrap().contains(&from.0)
    }

    async fn slices(&self, _from: NodeId, ask: Ask) -> (Answer, Option<Body>) {
        self.asked.fetch_add(1, Ordering::SeqCst);
        let (answer, index, length) = match ask {
            Ask::Slice(ask) => (
                Answer::Slice {
                    slice_bytes: Some(ask.end),
                    source: SliceOrigin::Stored,
                },
                ask.slice.index,
                ask.end as usize,
            ),
            // A ping.
            Ask::Resolve(ask) if ask.key.0 == 0 => return (Answer::Missing, None),
            Ask::Resolve(ask) => (
                Answer::Relay {
                    status: 200,
                    headers: vec![],
                    informational: vec![],
                },
                (ask.key.0 >> 64) as u32,
                ask.key.0 as u32 as usize,
            ),
        };
        let told = TellDropped(self.dropped.clone());
        let body: Body = match index {
            behaviour::WHOLE => stream::iter(parts(length)).boxed(),
            behaviour::BREAKS_OFF => {
                let failure = Err(BodyBroken("the origin hung up".to_owned()));
                stream::iter(parts(length))
                    .chain(stream::iter([failure]))
                    .boxed()
            }
            behaviour::DAMAGED => {
                let mut all = parts(length);
                if let Some(Ok(part)) = all.last_mut() {
                    part.crc32c ^= 1;
                }
                stream::iter(all).boxed()
            }
            behaviour::NEVER_ANSWERS => {
                let _told = told;
                std::future::pending().await
            }
            behaviour::NEVER_ENDS => {
                let rest = stream::pending().inspect(move |_| {
                    let _ = &told;
                });
                stream::iter(parts(length)).chain(rest).boxed()
            }
            behaviour::PAUSES => {
                let later = stream::once(tokio::time::sleep(PAUSE))
                    .map(|()| Ok(Part::new(Bytes::from("more"))));
                stream::iter(parts(length)).chain(later).boxed()
            }
            behaviour::ENDS_LATER => {
                let end = self.end.clone();
                let later = stream::once(async move { end.notified().await });
                let parts = stream::iter(parts(length))
                    .chain(later.map(|()| Ok(Part::new(Bytes::from("more")))));
                parts.inspect(move |_| _ = &told).boxed()
            }
            behaviour::PANICS => stream::iter(parts(length))
                .chain(stream::once(async { panic!("a bug in the engine") }))
                .boxed(),
            _ => return (Answer::PastEnd, None),
        };
        (answer, Some(body))
    }

    async fn control(&self, from: NodeId, request: Bytes) -> Result<Vec<u8>, String> {
        let number: u64 = wire::decode(&request).map_err(|e| e.to_string())?;
        if number == 0 {
            return Err(format!("node {from} may not ask that"));
        }
        // A vector of that many bytes, so that large responses are tried too.
        let config = bincode::config::standard();
        bincode::serde::encode_to_vec(vec![7u8; number as usize], config).map_err(|e| e.to_string())
    }
}

fn ask(index: u32, length: usize) -> Ask {
    Ask::Slice(SliceAsk {
        key: ObjectKey(1),
        slice: SliceId {
            generation: Generation(2),
            index,
        },
        start: 0,
        end: length as u32,
        request: OriginRequest {
            host: "films.example".to_owned(),
            target: "/film".to_owned(),
            headers: vec![],
        },
        version: Version {
            etag: None,
            last_modified: None,
            exact_date: false,
            length: None,
            slice_bytes: 1 << 20,
            whole: false,
            hard: PurgeIndex::default(),
        },
        place: 0,
        stamp: PurgeIndex::default(),
        stored_only: false,
    })
}

/// The same of an object's answer, which is relayed.
fn relay(index: u32, length: usize) -> Ask {
    let key = ObjectKey(u128::from(index) << 64 | 1 << 32 | length as u128);
    let Ask::Slice(ask) = ask(index, length) else {
        unreachable!()
    };
    Ask::Resolve(ResolveAsk::what_is_stored(key, ask.request))
}

/// Two free UDP ports in a row, as far as anybody can know; returns the first.
fn free_pair() -> SocketAddr {
    loop {
        let first = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))
            .unwrap()
            .local_addr()
            .unwrap();
        let Some(next) = first.port().checked_add(1) else {
            continue;
        };
        if UdpSocket::bind((Ipv4Addr::LOCALHOST, next)).is_ok() {
            return first;
        }
    }
}

struct Node {
    peers: Peers,
    address: SocketAddr,
}

impl Node {
    fn start(id: u64, tls: &TlsFiles, handler: &Arc<Scripted>) -> Node {
        for _ in 0..20 {
            let address = free_pair();
            // Another test may have taken the ports meanwhile.
            if let Ok(peers) = Peers::bind(address, NodeId(id), tls, handler.clone()) {
                return Node { peers, address };
            }
        }
        panic!("no two free ports in a row in 20 attempts");
    }

    fn knows(&self, id: u64, other: &Node) {
        self.peers
            .set_address(NodeId(id), &other.address.to_string());
    }

    async fn ask(&self, id: u64, ask: &Ask) -> Result<(Answer, Option<Body>), PeerError> {
        self.peers.ask(NodeId(id), ask, SOON).await
    }
}

/// Node 1, which asks, and node 2, which answers by `handler`.
fn pair(authority: &Authority) -> (Node, Node, Arc<Scripted>) {
    let handler = Scripted::with_members(&[1, 2]);
    let asker = Node::start(1, &authority.issue(1), &handler);
    let owner = Node::start(2, &authority.issue(2), &handler);
    asker.knows(2, &owner);
    (asker, owner, handler)
}

/// All of a body, its parts checked as whoever uses them does it.
async fn collect(mut body: Body) -> Result<Vec<u8>, BodyBroken> {
    let mut bytes = Vec::new();
    while let Some(part) = body.next().await {
        let part = part?;
        if !part.is_intact() {
            return Err(BodyBroken("damaged".to_owned()));
        }
        bytes.extend_from_slice(&part.bytes);
    }
    Ok(bytes)
}

async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !condition() {
        assert!(begin.elapsed() < SOON, "never: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn count(counter: impl Fn(&Counters) -> &std::sync::atomic::AtomicU64, node: &Node) -> u64 {
    counter(node.peers.counters()).load(Ordering::Relaxed)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bodies_of_every_size_arrive_whole() {
    let authority = Authority::new();
    let (asker, _owner, _) = pair(&authority);
    for length in [0, 1, 100, 65_535, 65_536, 65_537, 1 << 20, (10 << 20) + 1] {
        let (answer, body) = asker.ask(2, &ask(behaviour::WHOLE, length)).await.unwrap();
        assert!(matches!(answer, Answer::Slice { .. }), "{answer:?}");
        assert!(
            collect(body.unwrap()).await.unwrap() == pattern(length),
            "{length} bytes"
        );
    }
    let (answer, body) = asker.ask(2, &ask(behaviour::PAST_END, 10)).await.unwrap();
    assert_eq!(answer, Answer::PastEnd);
    assert!(body.is_none());
    // Far more at once than one peer is given streams.
    let all = (0..300usize).map(|i| {
        let asker = &asker;
        async move {
            let length = i * 1000;
            let (_, body) = asker
                .peers
                .ask(NodeId(2), &ask(0, length), 4 * SOON)
                .await
                .unwrap();
            assert!(
                collect(body.unwrap()).await.unwrap() == pattern(length),
                "{length} bytes"
            );
        }
    });
    futures::future::join_all(all).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_body_that_cannot_be_completed_is_seen_to_be_broken() {
    let authority = Authority::new();
    let (asker, owner, _) = pair(&authority);
    for (how, length) in [
        (behaviour::BREAKS_OFF, 200_000),
        (behaviour::BREAKS_OFF, 0),
        (behaviour::DAMAGED, 200_000),
        (behaviour::PANICS, 200_000),
    ] {
        for asked in [ask(how, length), relay(how, length)] {
            // A reset may overtake what was sent before it, the head included.
            let broken = match asker.ask(2, &asked).await {
                Ok((_, body)) => collect(body.unwrap()).await.is_err(),
                Err(PeerError::Refused { .. }) => true,
                Err(other) => panic!("{other}"),
            };
            assert!(broken, "{asked:?}");
        }
    }
    assert_eq!(count(|c| &c.bodies_broken, &owner), 4);
    // What is relayed goes to a client as it comes.
    let (_, body) = asker.ask(2, &relay(behaviour::DAMAGED, 10)).await.unwrap();
    assert!(body.unwrap().next().await.unwrap().is_err());
}

/// What an owner has set aside memory for stays so until it has arrived.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_body_is_held_until_it_has_arrived() {
    let authority = Authority::new();
    let (asker, owner, handler) = pair(&authority);
    let mut cable = Cable::between(&asker, &owner).await;
    let (_, body) = asker.ask(2, &ask(behaviour::ENDS_LATER, 10)).await.unwrap();
    let mut body = body.unwrap();
    assert_eq!(body.next().await.unwrap().unwrap().bytes, pattern(10));
    cable.cut.store(true, Ordering::SeqCst);
    handler.end.notify_one();
    let dropped = handler.dropped.notified();
    let early = tokio::time::timeout(Duration::from_millis(500), dropped).await;
    assert!(early.is_err(), "its end is under way");
    cable.cut.store(false, Ordering::SeqCst);
    assert_eq!(collect(body).await.unwrap(), b"more");
    tokio::time::timeout(SOON, handler.dropped.notified())
        .await
        .expect("the body is dropped");
    cable.tasks.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_owner_stops_when_the_asker_leaves() {
    let authority = Authority::new();
    let (asker, _owner, handler) = pair(&authority);
    let (_, body) = asker.ask(2, &ask(behaviour::NEVER_ENDS, 10)).await.unwrap();
    let mut body = body.unwrap();
    assert_eq!(body.next().await.unwrap().unwrap().bytes, pattern(10));
    drop(body);
    tokio::time::timeout(SOON, handler.dropped.notified())
        .await
        .expect("the body is dropped");

    let short = Duration::from_millis(300);
    let late = asker
        .peers
        .ask(NodeId(2), &ask(behaviour::NEVER_ANSWERS, 10), short)
        .await;
    assert!(matches!(late, Err(PeerError::TimedOut { .. })));
    tokio::time::timeout(SOON, handler.dropped.notified())
        .await
        .expect("the answer is dropped");
}

/// Readers that stand still hold up nobody else: neither the one that a peer has a
/// stream left for, nor, with all of them taken, slices.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slow_readers_do_not_stop_the_others() {
    let authority = Authority::new();
    let (asker, _owner, _) = pair(&authority);
    let (large, expected) = (relay(behaviour::WHOLE, 1 << 20), pattern(1 << 20));
    let mut unread = Vec::new();
    let read = async |asked| {
        let (_, body) = asker.ask(2, asked).await.unwrap();
        let read = tokio::time::timeout(SOON, collect(body.unwrap())).await;
        assert!(read.expect("not held up").unwrap() == expected);
    };
    for _ in 0..63 {
        unread.push(asker.ask(2, &large).await.unwrap().1.unwrap());
    }
    read(&large).await;
    unread.push(asker.ask(2, &large).await.unwrap().1.unwrap());
    read(&ask(behaviour::WHOLE, 1 << 20)).await;
    for body in unread {
        assert!(collect(body).await.unwrap() == expected);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slowness_is_not_death() {
    let authority = Authority::new();
    let (asker, _owner, _) = pair(&authority);
    let (_, body) = asker.ask(2, &ask(behaviour::NEVER_ENDS, 10)).await.unwrap();
    let mut body = body.unwrap();
    body.next().await.unwrap().unwrap();
    for _ in 0..4 {
        let late = asker
            .peers
            .ask(
                NodeId(2),
                &ask(behaviour::NEVER_ANSWERS, 1),
                Duration::from_millis(300),
            )
            .await;
        assert!(matches!(late, Err(PeerError::TimedOut { .. })));
        assert!(asker.peers.is_up(NodeId(2)));
    }
    let more = tokio::time::timeout(Duration::from_millis(50), body.next()).await;
    assert!(
        more.is_err(),
        "the body that is under way has not been broken"
    );
}

/// What a body is read from may pause for as long as an origin may (30 s by
/// default); a peer that has vanished breaks it off nevertheless.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_body_pauses_while_its_peer_lives_and_no_longer() {
    let authority = Authority::new();
    let (asker, _owner, _) = pair(&authority);
    let far = Node::start(3, &authority.issue(3), &Scripted::with_members(&[1]));
    let mut cable = Cable::to(far.address, usize::MAX).await;
    asker
        .peers
        .set_address(NodeId(3), &cable.address.to_string());
    let (_, paused) = asker.ask(2, &ask(behaviour::PAUSES, 10)).await.unwrap();
    let (_, lost) = asker.ask(3, &ask(behaviour::NEVER_ENDS, 10)).await.unwrap();
    let mut lost = lost.unwrap();
    lost.next().await.unwrap().unwrap();
    cable.cut.store(true, Ordering::SeqCst);
    let (paused, lost) = tokio::time::timeout(2 * PAUSE, async {
        tokio::join!(collect(paused.unwrap()), lost.next())
    })
    .await
    .expect("both end");
    assert_eq!(paused.unwrap(), [&pattern(10)[..], b"more"].concat());
    assert!(matches!(lost, Some(Err(_))), "{lost:?}");
    cable.tasks.shutdown().await;
}

/// A peer all of whose seats are taken by requests that wait answers one ping,
/// however many want to know; whoever wants a seat is told to go elsewhere.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_with_no_seat_left_is_alive() {
    const SEATS: usize = 2 * 64;
    let authority = Authority::new();
    let (asker, owner, handler) = pair(&authority);
    let slow = ask(behaviour::NEVER_ANSWERS, 1);
    let forever = Duration::from_secs(3600);
    let peers = &asker.peers;
    let other = relay(behaviour::NEVER_ANSWERS, 1);
    let waiting = (0..SEATS).map(|n| peers.ask(NodeId(2), [&slow, &other][n % 2], forever));
    let mut waiting = std::pin::pin!(futures::future::join_all(waiting));
    let asked = || handler.asked.load(Ordering::SeqCst);
    let checks = async {
        while asked() < SEATS {
            tokio::task::yield_now().await;
        }
        let pings = (0..1000).map(|_| Box::pin(peers.is_alive(NodeId(2), SOON)));
        let mut pings: Vec<_> = pings.collect();
        {
            // The owner looks at its members first: no answer before all have asked.
            let _members = handler.members.lock().unwrap();
            for ping in &mut pings {
                assert!(ping.now_or_never().is_none());
            }
        }
        let alive = futures::future::join_all(pings).await;
        assert!(alive.into_iter().all(|alive| alive));
        assert_eq!(asked(), SEATS + 1);

        let late = peers.ask(NodeId(2), &slow, forever).await;
        assert!(matches!(late, Err(PeerError::TimedOut { .. })));
        assert_eq!(asked(), SEATS + 1);

        // No is an answer.
        handler.members.lock().unwrap().clear();
        assert!(peers.is_alive(NodeId(2), SOON).await);
    };
    tokio::select! {
        () = checks => {}
        ended = &mut waiting => panic!("they wait: {}", ended.len()),
    }
    owner.peers.stop().await;
    assert!(!peers.is_alive(NodeId(2), SOON).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn control_carries_requests_and_refusals() {
    let authority = Authority::new();
    let (asker, owner, _) = pair(&authority);
    let two = NodeId(2);
    let large = 6 << 20;
    let response: Vec<u8> = asker
        .peers
        .control(two, &(large as u64), SOON)
        .await
        .unwrap();
    assert_eq!(response.len(), large);
    let refusal = asker
        .peers
        .control::<u64, Vec<u8>>(two, &0, SOON)
        .await
        .unwrap_err();
    assert!(matches!(&refusal, PeerError::Refused { reason, .. } if reason.contains("node 1")));
    // A response of another type does not pass for one.
    let garbled = asker
        .peers
        .control::<u64, (u64, String)>(two, &3, SOON)
        .await
        .unwrap_err();
    assert!(matches!(garbled, PeerError::Refused { .. }));

    let seed = owner.address.to_string();
    let (who, response): (NodeId, Vec<u8>) =
        asker.peers.control_at(&seed, &5u64, SOON).await.unwrap();
    assert_eq!((who, response.len()), (two, 5));
    let named = format!("localhost:{}", owner.address.port());
    let (who, _): (NodeId, Vec<u8>) = asker.peers.control_at(&named, &5u64, SOON).await.unwrap();
    assert_eq!(who, two);
    for bad in ["nowhere", "host.invalid:1", "127.0.0.1:65535"] {
        let error = asker
            .peers
            .control_at::<u64, u64>(bad, &5, SOON)
            .await
            .unwrap_err();
        assert!(matches!(error, PeerError::Unreachable { .. }), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slices_are_for_members_at_each_request() {
    let authority = Authority::new();
    let (asker, owner, handler) = pair(&authority);
    asker.ask(2, &ask(behaviour::WHOLE, 10)).await.unwrap();
    let asked = handler.asked.load(Ordering::SeqCst);

    handler.members.lock().unwrap().remove(&1);
    let refusal = asker
        .ask(2, &ask(behaviour::WHOLE, 10))
        .await
        .err()
        .unwrap();
    assert!(
        matches!(&refusal, PeerError::Refused { reason, .. } if reason.contains("not a member")),
        "{refusal}"
    );
    assert_eq!(
        handler.asked.load(Ordering::SeqCst),
        asked,
        "the engine is not asked"
    );
    assert_eq!(count(|c| &c.not_members, &owner), 1);
    // A refusal is a sign of life, and control is open to ask for admission.
    assert!(asker.peers.is_up(NodeId(2)));
    let _: Vec<u8> = asker.peers.control(NodeId(2), &1u64, SOON).await.unwrap();

    handler.members.lock().unwrap().insert(1);
    asker.ask(2, &ask(behaviour::WHOLE, 10)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_foreign_authority_opens_nothing() {
    let (ours, theirs) = (Authority::new(), Authority::new());
    let (_, owner, handler) = pair(&ours);
    let stranger = Node::start(1, &theirs.issue(1), &handler);
    stranger.knows(2, &owner);
    let refusal = stranger
        .ask(2, &ask(behaviour::WHOLE, 10))
        .await
        .err()
        .unwrap();
    assert!(
        matches!(refusal, PeerError::Unreachable { .. }),
        "{refusal}"
    );
    let refusal = stranger
        .peers
        .control::<u64, Vec<u8>>(NodeId(2), &1, SOON)
        .await
        .unwrap_err();
    assert!(
        matches!(refusal, PeerError::Unreachable { .. }),
        "{refusal}"
    );

    // One that trusts us, which we do not: the server must be the one to refuse.
    let mut gullible = theirs.issue(3);
    gullible.ca = ours.issue(3).ca;
    for (port, alpn) in both_endpoints(&owner) {
        let raw = RawClient::new(&gullible, alpn);
        assert!(
            raw.says(port, b"anything").await.is_none(),
            "no stream is served"
        );
    }
    assert_eq!(handler.asked.load(Ordering::SeqCst), 0);
    until("two failed handshakes at least are counted", || {
        count(|c| &c.handshakes_failed, &owner) >= 2
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_was_not_meant_is_not_asked() {
    let authority = Authority::new();
    let (asker, owner, handler) = pair(&authority);
    asker.knows(3, &owner);
    let refusal = asker
        .ask(3, &ask(behaviour::WHOLE, 10))
        .await
        .err()
        .unwrap();
    assert!(
        matches!(&refusal, PeerError::Unreachable { reason, .. } if reason.contains("is node 2")),
        "{refusal}"
    );
    assert!(!asker.peers.is_up(NodeId(3)));
    assert_eq!(handler.asked.load(Ordering::SeqCst), 0);

    let unknown = asker
        .ask(9, &ask(behaviour::WHOLE, 10))
        .await
        .err()
        .unwrap();
    assert!(matches!(unknown, PeerError::Unreachable { .. }));
    asker.peers.forget(NodeId(2));
    let forgotten = asker
        .ask(2, &ask(behaviour::WHOLE, 10))
        .await
        .err()
        .unwrap();
    assert!(matches!(forgotten, PeerError::Unreachable { .. }));
}

/// A client that speaks QUIC and TLS well, and then says anything.
struct RawClient(quinn::Endpoint);

impl RawClient {
    fn new(tls: &TlsFiles, alpn: &[u8]) -> RawClient {
        let pem = |path: &Path| std::fs::read(path).unwrap();
        let mut roots = rustls::RootCertStore::empty();
        roots
            .add(CertificateDer::from_pem_slice(&pem(&tls.ca)).unwrap())
            .unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = rustls::ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_root_certificates(roots)
            .with_client_auth_cert(
                vec![CertificateDer::from_pem_slice(&pem(&tls.cert)).unwrap()],
                PrivateKeyDer::from_pem_slice(&pem(&tls.key)).unwrap(),
            )
            .unwrap();
        config.alpn_protocols = vec![alpn.to_vec()];
        let crypto = quinn::crypto::rustls::QuicClientConfig::try_from(config).unwrap();
        let mut endpoint = quinn::Endpoint::client((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        endpoint.set_default_client_config(quinn::ClientConfig::new(Arc::new(crypto)));
        RawClient(endpoint)
    }

    /// The code with which a stream holding `bytes` is closed; `None` where
    /// there is no stream to be had.
    async fn says(&self, to: SocketAddr, bytes: &[u8]) -> Option<quinn::VarInt> {
        let connection = self.0.connect(to, peer::SERVER_NAME).unwrap().await.ok()?;
        let (mut send, mut recv) = connection.open_bi().await.ok()?;
        // The other side may close while we still write.
        let _ = send.write_all(bytes).await;
        let _ = send.finish();
        match recv.read_to_end(1 << 20).await {
            Err(quinn::ReadToEndError::Read(quinn::ReadError::Reset(code))) => Some(code),
            Err(_) => None,
            Ok(answer) => panic!("answered with {} bytes", answer.len()),
        }
    }
}

fn both_endpoints(node: &Node) -> [(SocketAddr, &'static [u8]); 2] {
    let mut control = node.address;
    control.set_port(node.address.port() + 1);
    [
        (node.address, wire::ALPN_SLICES),
        (control, wire::ALPN_CONTROL),
    ]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_not_a_frame_closes_its_stream_and_nothing_else() {
    let authority = Authority::new();
    let (asker, owner, handler) = pair(&authority);
    let good = wire::encode(&ask(behaviour::WHOLE, 10)).unwrap();
    let mut trailing = good.clone();
    trailing.push(0);
    let mut other_version = good.clone();
    other_version[0] = wire::WIRE_VERSION + 1;
    let too_long = [&[wire::WIRE_VERSION][..], &[0xff; 4], &[0; 1000]].concat();
    let garbage = [&[wire::WIRE_VERSION][..], &8u32.to_be_bytes(), &[0xee; 8]].concat();
    let lone_byte = [&[wire::WIRE_VERSION][..], &(1u32 << 16).to_be_bytes(), &[1]].concat();
    let mut said = 0;
    for (port, alpn) in both_endpoints(&owner) {
        let raw = RawClient::new(&authority.issue(1), alpn);
        for (bytes, code) in [
            (&b""[..], CloseCode::Garbage),
            (&good[..3], CloseCode::Garbage),
            (&lone_byte, CloseCode::Garbage),
            (&other_version, CloseCode::Version),
            (&too_long, CloseCode::TooLong),
            (&trailing, CloseCode::Garbage),
            (b"GET / HTTP/1.1\r\n\r\n", CloseCode::Version),
        ] {
            assert_eq!(raw.says(port, bytes).await, Some(code.into()), "{bytes:?}");
            said += 1;
        }
        if alpn == wire::ALPN_SLICES {
            assert_eq!(
                raw.says(port, &garbage).await,
                Some(CloseCode::Garbage.into())
            );
            let limit = HEAD_BYTES_MAX as u32 + 1;
            let over = [&[wire::WIRE_VERSION][..], &limit.to_be_bytes()].concat();
            assert_eq!(raw.says(port, &over).await, Some(CloseCode::TooLong.into()));
            said += 2;
        }
        let other = RawClient::new(&authority.issue(1), b"h3");
        assert_eq!(
            other.says(port, &good).await,
            None,
            "another protocol is not spoken"
        );
    }
    assert_eq!(count(|c| &c.bad_frames, &owner), said);
    assert_eq!(handler.asked.load(Ordering::SeqCst), 0);
    let (_, body) = asker.ask(2, &ask(behaviour::WHOLE, 10)).await.unwrap();
    assert_eq!(collect(body.unwrap()).await.unwrap(), pattern(10));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn half_a_request_is_not_waited_for() {
    let authority = Authority::new();
    let (_, owner, _) = pair(&authority);
    let raw = RawClient::new(&authority.issue(1), wire::ALPN_SLICES);
    let connection = raw
        .0
        .connect(owner.address, peer::SERVER_NAME)
        .unwrap()
        .await
        .unwrap();
    let (mut send, mut recv) = connection.open_bi().await.unwrap();
    send.write_all(&[wire::WIRE_VERSION, 0]).await.unwrap();
    let closed = tokio::time::timeout(2 * SOON, recv.read_to_end(10))
        .await
        .expect("in time");
    let expected = quinn::ReadError::Reset(CloseCode::TooSlow.into());
    assert_eq!(closed, Err(quinn::ReadToEndError::Read(expected)));
}

/// A node that the cluster's authority knows and the cluster does not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stranger_has_room_for_a_greeting_and_no_more() {
    let authority = Authority::new();
    let (asker, owner, _) = pair(&authority);
    let [_, (control, alpn)] = both_endpoints(&owner);
    let raw = RawClient::new(&authority.issue(3), alpn);
    let half = [&[wire::WIRE_VERSION][..], &1000u32.to_be_bytes(), &[0; 10]].concat();
    let mut held = Vec::new();
    for _ in 0..11 {
        let connecting = raw.0.connect(control, peer::SERVER_NAME).unwrap();
        let connection = connecting.await.unwrap();
        for _ in 0..100 {
            let (mut send, recv) = connection.open_bi().await.unwrap();
            // What is one too many may be closed while it is written.
            let _ = send.write_all(&half).await;
            held.push((send, recv));
        }
    }
    until("it is told that it is too much", || {
        count(|c| &c.busy, &owner) > 0
    })
    .await;
    let _: Vec<u8> = asker.peers.control(NodeId(2), &1u64, SOON).await.unwrap();
    drop(held);

    let large = vec![0u8; 1 << 20];
    let said = async |node: &Node| {
        let answer = node.peers.control::<_, u64>(NodeId(2), &large, SOON).await;
        answer.unwrap_err().to_string()
    };
    let member = said(&asker).await;
    assert!(member.contains("does not decode"), "{member}");
    let stranger = Node::start(4, &authority.issue(4), &Scripted::with_members(&[]));
    stranger.knows(2, &owner);
    let stranger = said(&stranger).await;
    assert!(stranger.contains("frame too long"), "{stranger}");
}

/// The first packets of so many connections, as they would leave for anywhere.
async fn first_packets(raw: &RawClient, count: usize) -> Vec<Vec<u8>> {
    let nobody = tokio::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))
        .await
        .unwrap();
    let to = nobody.local_addr().unwrap();
    let connect = |_| raw.0.connect(to, peer::SERVER_NAME).unwrap();
    let _connecting: Vec<_> = (0..count).map(connect).collect();
    let mut packets = std::collections::BTreeMap::new();
    let mut packet = vec![0; 2048];
    while packets.len() < count {
        let length = nobody.recv(&mut packet).await.unwrap();
        // Flags, version, length of the connection's number, and that number.
        let number = packet[6..6 + packet[5] as usize].to_vec();
        packets.entry(number).or_insert(packet[..length].to_vec());
    }
    packets.into_values().collect()
}

/// Who sends from where it is not takes no peer's place.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn handshakes_that_nobody_goes_on_with_keep_no_peer_out() {
    let authority = Authority::new();
    let (asker, owner, _) = pair(&authority);
    let raw = RawClient::new(&authority.issue(9), wire::ALPN_SLICES);
    let packets = first_packets(&raw, 200).await;
    let elsewhere = tokio::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))
        .await
        .unwrap();
    for packet in packets {
        elsewhere.send_to(&packet, owner.address).await.unwrap();
    }
    let answer = asker.ask(2, &ask(behaviour::WHOLE, 10)).await;
    assert!(answer.is_ok(), "{:?}", answer.err());
}

/// However many connections a node makes, the others find room.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_has_so_many_connections_and_no_more() {
    const CONNECTIONS: usize = 40;
    let authority = Authority::new();
    let (_, owner, _) = pair(&authority);
    let raw = RawClient::new(&authority.issue(1), wire::ALPN_SLICES);
    let mut connections = Vec::new();
    for _ in 0..CONNECTIONS + 4 {
        let connecting = raw.0.connect(owner.address, peer::SERVER_NAME).unwrap();
        connections.push(connecting.await.unwrap());
        until("it is served", || {
            owner.peers.links().iter().all(|link| link.accepted)
                && owner.peers.links().len() == connections.len().min(CONNECTIONS)
        })
        .await;
    }
    let open = |connection: &quinn::Connection| connection.close_reason().is_none();
    until("the oldest have given way", || {
        connections
            .iter()
            .filter(|connection| open(connection))
            .count()
            == CONNECTIONS
    })
    .await;
    assert!(connections.iter().skip(4).all(open));
}

/// A cable between two nodes that can be cut: both ports of a pair.
struct Cable {
    address: SocketAddr,
    cut: Arc<AtomicBool>,
    tasks: tokio::task::JoinSet<()>,
}

impl Cable {
    /// By which `asker` reaches `owner`, which is node 2.
    async fn between(asker: &Node, owner: &Node) -> Cable {
        let cable = Cable::to(owner.address, usize::MAX).await;
        let address = cable.address.to_string();
        asker.peers.set_address(NodeId(2), &address);
        cable
    }

    /// Datagrams beyond `payload_bytes_max` do not fit through it.
    async fn to(far: SocketAddr, payload_bytes_max: usize) -> Cable {
        let cut = Arc::new(AtomicBool::new(false));
        let (address, sockets) = loop {
            let first = free_pair();
            let mut second = first;
            second.set_port(first.port() + 1);
            let bound = (
                tokio::net::UdpSocket::bind(first).await,
                tokio::net::UdpSocket::bind(second).await,
            );
            if let (Ok(first_socket), Ok(second_socket)) = bound {
                break (first, [first_socket, second_socket]);
            }
        };
        let mut tasks = tokio::task::JoinSet::new();
        for (offset, near) in sockets.into_iter().enumerate() {
            let cut = cut.clone();
            let mut far = far;
            far.set_port(far.port() + offset as u16);
            tasks.spawn(async move {
                let beyond = tokio::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))
                    .await
                    .unwrap();
                let mut here = None;
                let (mut there_bytes, mut here_bytes) = (vec![0; 65_536], vec![0; 65_536]);
                loop {
                    tokio::select! {
                        got = near.recv_from(&mut there_bytes) => {
                            let Ok((length, from)) = got else { continue };
                            here = Some(from);
                            if length <= payload_bytes_max && !cut.load(Ordering::SeqCst) {
                                let _ = beyond.send_to(&there_bytes[..length], far).await;
                            }
                        }
                        got = beyond.recv_from(&mut here_bytes) => {
                            let (Ok((length, _)), Some(to)) = (got, here) else { continue };
                            if length <= payload_bytes_max && !cut.load(Ordering::SeqCst) {
                                let _ = near.send_to(&here_bytes[..length], to).await;
                            }
                        }
                    }
                }
            });
        }
        Cable {
            address,
            cut,
            tasks,
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_vanishes_costs_two_deadlines_and_is_found_again() {
    let authority = Authority::new();
    let (asker, owner, _) = pair(&authority);
    let mut cable = Cable::between(&asker, &owner).await;
    asker.ask(2, &ask(behaviour::WHOLE, 10)).await.unwrap();

    cable.cut.store(true, Ordering::SeqCst);
    let deadline = Duration::from_millis(400);
    // Two without a sign of life; what was still under way at the cut may pass for one.
    let mut waited = 0;
    while asker.peers.is_up(NodeId(2)) {
        let begin = Instant::now();
        let silent = asker
            .peers
            .ask(NodeId(2), &ask(behaviour::WHOLE, 10), deadline)
            .await;
        assert!(matches!(silent, Err(PeerError::TimedOut { .. })));
        assert!(begin.elapsed() < deadline + Duration::from_millis(300));
        waited += 1;
    }
    assert!((2..=3).contains(&waited), "{waited}");
    // From here on nobody waits, however often the peer is tried meanwhile.
    let begin = Instant::now();
    let mut refused = 0;
    while begin.elapsed() < Duration::from_millis(2500) {
        let asked = Instant::now();
        let down = asker
            .peers
            .ask(NodeId(2), &ask(behaviour::WHOLE, 10), deadline)
            .await;
        assert!(matches!(down, Err(PeerError::Unreachable { .. })));
        assert!(
            asked.elapsed() < Duration::from_millis(100),
            "{:?}",
            asked.elapsed()
        );
        assert!(!asker.peers.is_up(NodeId(2)));
        refused += 1;
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(refused > 20);

    cable.cut.store(false, Ordering::SeqCst);
    let mut tries = 0;
    while asker
        .peers
        .ask(NodeId(2), &ask(behaviour::WHOLE, 10), deadline)
        .await
        .is_err()
    {
        tries += 1;
        assert!(
            tries < 200,
            "the peer is found again within the longest back-off"
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(asker.peers.is_up(NodeId(2)));
    cable.tasks.shutdown().await;
}

/// Who asks one after the other, and whether it lives in between, finds out as soon:
/// the question goes over the connection that is waited on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_vanishes_is_silent_to_questions_too() {
    let authority = Authority::new();
    for asked in [ask(behaviour::WHOLE, 10), relay(behaviour::WHOLE, 10)] {
        let (asker, owner, _) = pair(&authority);
        let mut cable = Cable::between(&asker, &owner).await;
        asker.ask(2, &asked).await.unwrap();
        cable.cut.store(true, Ordering::SeqCst);
        let deadline = Duration::from_millis(400);
        let mut waited = 0;
        while asker.peers.is_up(NodeId(2)) {
            let late = asker.peers.ask(NodeId(2), &asked, deadline).await;
            assert!(matches!(late, Err(PeerError::TimedOut { .. })));
            assert!(!asker.peers.is_alive(NodeId(2), deadline).await);
            waited += 2;
        }
        assert!(waited <= 4, "{waited}");
        cable.tasks.shutdown().await;
    }
}

/// Nor for its other connections, while one that it has left behind still counts.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_vanishes_is_dialled_by_one_and_waited_for_by_none_after_it() {
    let authority = Authority::new();
    let (asker, owner, _) = pair(&authority);
    let mut cable = Cable::between(&asker, &owner).await;
    asker.ask(2, &ask(behaviour::WHOLE, 10)).await.unwrap();
    cable.cut.store(true, Ordering::SeqCst);
    let first = asker.ask(2, &relay(behaviour::WHOLE, 10)).await;
    assert!(matches!(first, Err(PeerError::Unreachable { .. })));
    for _ in 0..20 {
        let asked = Instant::now();
        let next = asker.ask(2, &relay(behaviour::WHOLE, 10)).await;
        assert!(matches!(next, Err(PeerError::Unreachable { .. })));
        assert!(asked.elapsed() < Duration::from_millis(100));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    cable.tasks.shutdown().await;
}

/// Loopback takes jumbo packets; a tunnel may not even take Ethernet's.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_largest_packet_that_passes_is_found() {
    let authority = Authority::new();
    let (asker, owner, handler) = pair(&authority);
    owner.knows(1, &asker);
    let tunnel = Cable::to(owner.address, 1300).await;
    let remote = Node::start(2, &authority.issue(2), &handler);
    remote
        .peers
        .set_address(NodeId(2), &tunnel.address.to_string());
    for (node, expected) in [(&asker, 6500..=6500), (&remote, 1200..=1300)] {
        let begin = Instant::now();
        loop {
            let (_, body) = node.ask(2, &ask(behaviour::WHOLE, 1 << 20)).await.unwrap();
            assert!(collect(body.unwrap()).await.unwrap() == pattern(1 << 20));
            let links = node.peers.links();
            assert_eq!(links.len(), 1);
            if expected.contains(&links[0].mtu_bytes) {
                break;
            }
            assert!(begin.elapsed() < SOON, "{links:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_caller_that_dials_us_is_tried_again_at_once() {
    let authority = Authority::new();
    let handler = Scripted::with_members(&[1, 2]);
    let asker = Node::start(1, &authority.issue(1), &handler);
    let tls = authority.issue(2);
    let owner = Node::start(2, &tls, &handler);
    let address = owner.address;
    asker.knows(2, &owner);
    owner.peers.stop().await;
    drop(owner);
    // Enough failures for a back-off of seconds.
    for _ in 0..5 {
        until("the next attempt has failed", || {
            let ask = ask(behaviour::WHOLE, 10);
            let once = asker.peers.ask(NodeId(2), &ask, SOON);
            futures::FutureExt::now_or_never(once).is_some()
        })
        .await;
        let _ = asker.ask(2, &ask(behaviour::WHOLE, 10)).await;
    }
    assert!(!asker.peers.is_up(NodeId(2)));
    let again = Peers::bind(address, NodeId(2), &tls, handler.clone()).unwrap();
    let _: (NodeId, Vec<u8>) = again
        .control_at(&asker.address.to_string(), &1u64, SOON)
        .await
        .unwrap();
    until("the asker has heard of it", || asker.peers.is_up(NodeId(2))).await;
    asker.ask(2, &ask(behaviour::WHOLE, 10)).await.unwrap();
}

/// Killed and started again on the same port, a node disowns its former
/// connections: one request finds its way over, without waiting.
#[test]
fn a_restarted_peer_answers_the_next_request() {
    let runtime = || {
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap()
    };
    let authority = Authority::new();
    let handler = Scripted::with_members(&[1, 2]);
    let (ours, theirs, theirs_again) = (runtime(), runtime(), runtime());
    let tls = authority.issue(2);
    let asker = ours.block_on(async { Node::start(1, &authority.issue(1), &handler) });
    let owner = theirs.block_on(async { Node::start(2, &tls, &handler) });
    asker.knows(2, &owner);
    let address = owner.address;
    ours.block_on(asker.ask(2, &ask(behaviour::WHOLE, 10)))
        .unwrap();

    // Its runtime is gone before it can say good-bye.
    theirs.shutdown_timeout(SOON);
    drop(owner);
    let _again = theirs_again.block_on(async {
        let begin = Instant::now();
        loop {
            match Peers::bind(address, NodeId(2), &tls, handler.clone()) {
                Ok(peers) => break peers,
                Err(e) => assert!(begin.elapsed() < SOON, "{e}"),
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
    let begin = Instant::now();
    ours.block_on(asker.ask(2, &ask(behaviour::WHOLE, 10)))
        .unwrap();
    assert!(
        begin.elapsed() < Duration::from_secs(1),
        "{:?}",
        begin.elapsed()
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stopping_is_quick_final_and_announced() {
    let authority = Authority::new();
    let (asker, owner, handler) = pair(&authority);
    asker.ask(2, &ask(behaviour::WHOLE, 10)).await.unwrap();
    let (_, body) = asker.ask(2, &ask(behaviour::NEVER_ENDS, 10)).await.unwrap();
    let mut body = body.unwrap();
    body.next().await.unwrap().unwrap();
    let (address, tls) = (owner.address, authority.issue(2));
    let begin = Instant::now();
    owner.peers.stop().await;
    assert!(begin.elapsed() < 2 * Duration::from_secs(1));
    assert!(
        body.next().await.unwrap().is_err(),
        "a body under way is seen to be broken"
    );
    let gone = asker
        .ask(2, &ask(behaviour::WHOLE, 10))
        .await
        .err()
        .unwrap();
    assert!(matches!(gone, PeerError::Unreachable { .. }), "{gone}");
    let stopped = owner
        .ask(1, &ask(behaviour::WHOLE, 10))
        .await
        .err()
        .unwrap();
    assert!(
        matches!(stopped, PeerError::Unreachable { .. }),
        "{stopped}"
    );
    // The ports are free again, though somebody still holds the handle.
    drop(body);
    until("the ports are free", || {
        Peers::bind(address, NodeId(2), &tls, handler.clone()).is_ok()
    })
    .await;
}

#[tokio::test]
async fn wrong_files_are_named_with_a_remedy() {
    let authority = Authority::new();
    let other = Authority::new();
    let good = authority.issue(1);
    let two = authority.issue(2);
    let foreign = other.issue(1);
    let missing = authority.0.join("no-such-file.pem");
    let handler = Scripted::with_members(&[]);
    let expired = expired(&authority, 1);
    let complaint = |node: u64, tls: TlsFiles| {
        let error = Peers::bind(free_pair(), NodeId(node), &tls, handler.clone())
            .err()
            .unwrap();
        assert!(matches!(error, StartError::Config(_)), "{error}");
        error.to_string()
    };
    // A key without its line ends is not told with the reason.
    let one_line = authority.0.join("one-line.key");
    let key = std::fs::read_to_string(&good.key).unwrap();
    std::fs::write(&one_line, key.replace('\n', "")).unwrap();
    let torn = TlsFiles {
        key: one_line.clone(),
        ..good.clone()
    };
    let said = complaint(1, torn);
    let (_, reason) = said.split_once("one-line.key").expect("its path");
    assert!(reason.contains("not a private key in PEM"), "{said}");
    assert!(
        !reason.contains("45, 45") && !reason.contains("-----"),
        "{said}"
    );
    for (tls, node, words) in [
        (
            TlsFiles {
                ca: missing.clone(),
                ..good.clone()
            },
            1,
            ["cluster.tls.ca", "ca init"],
        ),
        (
            TlsFiles {
                cert: missing.clone(),
                ..good.clone()
            },
            1,
            ["cluster.tls.cert", "no-such"],
        ),
        (
            TlsFiles {
                key: missing.clone(),
                ..good.clone()
            },
            1,
            ["cluster.tls.key", "ca issue"],
        ),
        (
            TlsFiles {
                ca: good.key.clone(),
                ..good.clone()
            },
            1,
            ["cluster.tls.ca", "no certificate"],
        ),
        (
            TlsFiles {
                key: two.key.clone(),
                ..good.clone()
            },
            1,
            ["cluster.tls.key", "does not belong"],
        ),
        (
            TlsFiles {
                ca: foreign.ca.clone(),
                ..good.clone()
            },
            1,
            ["cluster.tls.cert", "not issued by"],
        ),
        (
            good.clone(),
            5,
            ["belongs to node 1", "cluster.node_id is 5"],
        ),
        (expired, 1, ["expired", "ca issue"]),
        (
            TlsFiles {
                cert: good.ca.clone(),
                key: authority.0.join("ca.key"),
                ..good.clone()
            },
            1,
            ["cluster.tls.cert", "ca issue"],
        ),
    ] {
        let said = complaint(node, tls);
        assert!(words.iter().all(|word| said.contains(word)), "{said}");
    }
    let taken = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let error = Peers::bind(
        taken.local_addr().unwrap(),
        NodeId(1),
        &good,
        handler.clone(),
    )
    .err()
    .unwrap();
    assert!(error.to_string().contains("cluster.listen"), "{error}");
    let last = (Ipv4Addr::LOCALHOST, u16::MAX).into();
    let error = Peers::bind(last, NodeId(1), &good, handler).err().unwrap();
    assert!(error.to_string().contains("next port"), "{error}");
}

/// A certificate of `authority` for `node` that ended a year ago.
fn expired(authority: &Authority, node: u64) -> TlsFiles {
    let read = |name: &str| std::fs::read_to_string(authority.0.join(name)).unwrap();
    let ca_key = rcgen::KeyPair::from_pem(&read("ca.key")).unwrap();
    let issuer = rcgen::Issuer::from_ca_cert_pem(&read("ca.pem"), ca_key).unwrap();
    let names = vec![
        format!("node-{node}.pingora-slice.internal"),
        peer::SERVER_NAME.to_owned(),
    ];
    let mut params = rcgen::CertificateParams::new(names).unwrap();
    params.not_before = rcgen::date_time_ymd(2020, 1, 1);
    params.not_after = rcgen::date_time_ymd(2021, 1, 1);
    let key = rcgen::KeyPair::generate().unwrap();
    let (cert_path, key_path) = (authority.0.join("old.pem"), authority.0.join("old.key"));
    std::fs::write(&cert_path, params.signed_by(&key, &issuer).unwrap().pem()).unwrap();
    std::fs::write(&key_path, key.serialize_pem()).unwrap();
    TlsFiles {
        ca: authority.0.join("ca.pem"),
        cert: cert_path,
        key: key_path,
    }
}

#[test]
fn issuer_and_verifier_agree_on_names() {
    assert_eq!(ca::SERVER_NAME, peer::SERVER_NAME);
    assert_eq!(ca::NODE_NAME_PREFIX, peer::NODE_NAME_PREFIX);
    assert_eq!(ca::NODE_NAME_SUFFIX, peer::NODE_NAME_SUFFIX);
}
