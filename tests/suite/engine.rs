//! Flights, whole bodies and the read-ahead, as clients see them.

use std::time::{Duration, Instant};

use futures::future::join_all;
use pingora_slice_tests::http::Stream;
use pingora_slice_tests::{
    Ask, Fault, Film, KIB, MIB, Node, Options, SLICE_BYTES, TestCluster, Validators,
};

/// Reads this many bytes of a body and compares them.
async fn take(stream: &mut Stream, film: &Film, from: u64, bytes: u64) -> u64 {
    let mut at = from;
    while at < from + bytes {
        let piece = stream.next().await.unwrap().expect("more to come");
        assert_eq!(film.content().difference(at, &piece), None, "after {at}");
        at += piece.len() as u64;
    }
    at
}

async fn rest(mut stream: Stream, film: &Film, from: u64) {
    let mut at = from;
    while let Some(piece) = stream.next().await.unwrap() {
        assert_eq!(film.content().difference(at, &piece), None, "after {at}");
        at += piece.len() as u64;
    }
    assert_eq!(at, film.length());
}

/// Waits until the origin sends nothing more for this object; how much it sent.
async fn until_quiet(node: &Node, film: &Film) -> u64 {
    let sent = || film.seen().iter().map(|seen| seen.sent).sum::<u64>();
    let mut before = u64::MAX;
    node.until("the origin is left in peace", async || {
        tokio::time::sleep(Duration::from_millis(300)).await;
        std::mem::replace(&mut before, sent()) == sent()
    })
    .await;
    sent()
}

/// What has landed reaches everybody before the rest is there, on every node.
#[tokio::test(flavor = "multi_thread")]
async fn followers_read_what_the_leader_reads() {
    let cluster = TestCluster::start(3).await;
    for (path, held) in [("/few", 1000), ("/many", 100_000)] {
        let film = cluster.origin.publish(path, 2 * SLICE_BYTES);
        let mut gate = film.hold_at(held);
        let mut leader = cluster.node(1).open(Ask::get(path)).await;
        gate.holds(1).await;
        let mut at = vec![take(&mut leader, &film, 0, held).await];
        let mut readers = vec![leader];
        for node in cluster.nodes() {
            let asked = Instant::now();
            let mut follower = node.open(Ask::get(path)).await;
            let first = take(&mut follower, &film, 0, 1).await;
            let waited = asked.elapsed();
            assert!(waited < Duration::from_millis(500), "{waited:?}");
            at.push(take(&mut follower, &film, first, held - first).await);
            readers.push(follower);
        }
        gate.open();
        let reading = readers.into_iter().zip(at);
        join_all(reading.map(|(reader, at)| rest(reader, &film, at))).await;
        assert_eq!(film.fetches_per_slice(), [1, 1], "{path}");
    }
}

/// Bytes that trickle in are passed on as they come.
#[tokio::test(flavor = "multi_thread")]
async fn a_trickle_is_passed_on() {
    let cluster = TestCluster::alone().await;
    let film = cluster.origin.publish("/film", 5000);
    let gates: Vec<_> = (1..50).map(|n| film.hold_at(n * 100)).collect();
    let mut stream = cluster.node(1).open(Ask::get("/film")).await;
    let mut at = 0;
    for gate in gates {
        at = take(&mut stream, &film, at, 100).await;
        gate.open();
    }
    rest(stream, &film, at).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_leader_leaves_and_nobody_notices() {
    let cluster = TestCluster::start(3).await;
    for (path, fault) in [("/slices", None), ("/whole", Some(Fault::IgnoreRange))] {
        let film = cluster.origin.publish(path, 4 * SLICE_BYTES);
        if let Some(fault) = fault {
            film.always(fault);
        }
        let mut gate = film.hold_at(SLICE_BYTES / 2);
        let leader = cluster.node(1).open(Ask::get(path)).await;
        gate.holds(1).await;
        let followers = [
            cluster.node(1).open(Ask::get(path)).await,
            cluster.node(2).open(Ask::get(path)).await,
        ];
        drop(leader);
        gate.open();
        join_all(followers.map(|follower| rest(follower, &film, 0))).await;
        let counts = film.fetches_per_slice();
        assert!(counts.iter().all(|n| *n == 1), "{path}: {counts:?}");
    }
}

/// The slice under way is finished and kept, though its only client has left.
#[tokio::test(flavor = "multi_thread")]
async fn the_slice_under_way_is_kept() {
    let cluster = TestCluster::alone().await;
    let node = cluster.node(1);
    let film = cluster.origin.publish("/film", SLICE_BYTES);
    let mut gate = film.hold_at(SLICE_BYTES / 2);
    let mut only = node.open(Ask::get("/film")).await;
    gate.holds(1).await;
    take(&mut only, &film, 0, 1).await;
    drop(only);
    gate.open();
    film.until("the end", |seen| seen.iter().all(|seen| seen.complete))
        .await;
    node.read(&film).await;
    assert_eq!(film.fetches(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_stops_the_read_ahead() {
    let cluster = TestCluster::alone().await;
    let node = cluster.node(1);
    for (path, fault) in [("/slices", None), ("/whole", Some(Fault::NoLength))] {
        let film = cluster.origin.publish(path, 512 * MIB);
        if let Some(fault) = fault {
            film.always(fault);
        }
        let mut stream = node.open(Ask::get(path)).await;
        take(&mut stream, &film, 0, MIB).await;
        // Nobody reads on: what fits the sockets and the window, no more.
        let window = 4 * SLICE_BYTES;
        let paused = if path == "/slices" {
            let sent = until_quiet(node, &film).await;
            assert!(sent < 24 * MIB + window, "{path}: {sent} bytes unread");
            sent
        } else {
            0
        };
        drop(stream);
        if path == "/slices" {
            let sent = until_quiet(node, &film).await;
            assert!(sent <= paused + window, "{path}: {sent} after {paused}");
        }
    }
}

/// A body whose length nobody knows waits for a client that pauses.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_pauses_gets_the_rest() {
    let cluster = TestCluster::alone().await;
    let node = cluster.node(1);
    let film = cluster.origin.publish("/film", 64 * MIB);
    film.validators(Validators::Nothing).always(Fault::NoLength);
    let mut stream = node.open(Ask::get("/film")).await;
    let at = take(&mut stream, &film, 0, MIB).await;
    // Longer than a body waits before it is read on for the cache.
    tokio::time::sleep(Duration::from_secs(7)).await;
    rest(stream, &film, at).await;
    assert_eq!(film.fetches(), 1, "{:#?}", film.seen());
}

/// A node that stands still costs its share of a little time, and no error.
#[tokio::test(flavor = "multi_thread")]
async fn an_owner_that_stands_still_is_bypassed() {
    let cluster = TestCluster::start(3).await;
    let film = cluster.origin.publish("/before", 8 * MIB);
    let mut stream = cluster.node(1).open(Ask::get("/before")).await;
    let at = take(&mut stream, &film, 0, 1).await;
    cluster.node(3).pause();
    rest(stream, &film, at).await;
    for path in ["/one", "/two", "/three"] {
        let film = cluster.origin.publish(path, 4 * MIB);
        let asked = Instant::now();
        cluster.node(1).read(&film).await;
        cluster.node(2).read(&film).await;
        println!("{path}: {:?}", asked.elapsed());
    }
    cluster.node(3).unpause();
    let film = cluster.origin.publish("/after", 4 * MIB);
    cluster.read_from_every_node(&film).await;
}

/// Promise P3 for ranges: the first slice asked for lives with the manifest.
#[tokio::test(flavor = "multi_thread")]
async fn many_clients_of_a_range_in_the_middle_cost_one_fetch_per_slice() {
    let cluster = TestCluster::start(3).await;
    let film = cluster.origin.publish("/film", 40 * SLICE_BYTES);
    let (start, end) = (17 * SLICE_BYTES + 5, 23 * SLICE_BYTES - 5);
    let gate = film.hold_at(18 * SLICE_BYTES - 1);
    let reading = (0..45).map(|n| cluster.node(n % 3 + 1).read_range(&film, start, end));
    let opening = async {
        film.until("somebody asks", |seen| !seen.is_empty()).await;
        gate.open();
    };
    tokio::join!(join_all(reading), opening);
    cluster.read_from_every_node(&film).await;
    let counts = film.fetches_per_slice();
    assert!(counts.iter().all(|n| *n == 1), "{counts:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn many_clients_of_a_whole_object_cost_one_body() {
    let cluster = TestCluster::start(3).await;
    for (path, fault, validators) in [
        ("/no-ranges", Fault::IgnoreRange, Validators::Strong),
        ("/no-length", Fault::NoLength, Validators::Strong),
        ("/nothing", Fault::NoLength, Validators::Nothing),
    ] {
        let film = cluster.origin.publish(path, 40 * SLICE_BYTES + 1);
        film.always(fault).validators(validators);
        let mut gate = film.hold_at(SLICE_BYTES + 1);
        let asking = (0..30).map(|n| cluster.node(n % 3 + 1).open(Ask::get(path)));
        let streams = join_all(asking).await;
        gate.holds(1).await;
        gate.open();
        join_all(streams.into_iter().map(|stream| rest(stream, &film, 0))).await;
        for node in cluster.nodes() {
            rest(node.open(Ask::get(path)).await, &film, 0).await;
        }
        assert_eq!(film.fetches(), 1, "{path}: {:#?}", film.seen());
    }
}

/// Two bodies of one version under way at once, with a purge between them.
#[tokio::test(flavor = "multi_thread")]
async fn a_purge_while_a_whole_body_lands() {
    let cluster = TestCluster::alone().await;
    let node = cluster.node(1);
    let film = cluster.origin.publish("/film", 20 * SLICE_BYTES + 1);
    film.always(Fault::IgnoreRange);
    let mut gate = film.hold_at(3 * SLICE_BYTES + 10);
    let before = node.open(Ask::get("/film")).await;
    gate.holds(1).await;
    node.purge("/film").await;
    let after = node.open(Ask::get("/film")).await;
    gate.open();
    tokio::join!(rest(before, &film, 0), rest(after, &film, 0));
    node.read(&film).await;

    // The same without a validator: two versions, never in one body.
    let film = cluster.origin.publish("/weak", 20 * SLICE_BYTES + 1);
    film.always(Fault::IgnoreRange)
        .validators(Validators::Nothing);
    let mut gate = film.hold_at(3 * SLICE_BYTES + 10);
    let mut before = node.open(Ask::get("/weak")).await;
    let at = take(&mut before, &film, 0, 1).await;
    gate.holds(1).await;
    film.change();
    node.purge("/weak").await;
    let after = node.open(Ask::get("/weak")).await;
    gate.open();
    rest(after, &film, 0).await;
    let mut old = at;
    while let Some(piece) = before.next().await.unwrap() {
        assert_eq!(film.content_of(1).difference(old, &piece), None);
        old += piece.len() as u64;
    }
    assert_eq!(old, film.length());
    node.read(&film).await;
}

/// What is held of bodies that cannot be had again is let go once it lies on
/// the disk: a node that has read many of them has room for the next.
#[tokio::test(flavor = "multi_thread")]
async fn many_bodies_without_a_validator_in_a_short_time() {
    let cluster = Options::alone()
        .set("slice_size", 64 * KIB)
        .set("l1_cache_size_bytes", "32m")
        .start()
        .await;
    let node = cluster.node(1);
    let client = async |client: u64| {
        for n in 0..25 {
            let path = format!("/film{client}/{n}");
            let film = cluster.origin.publish(&path, 1_000_000);
            film.validators(Validators::WeakAlone);
            node.read_range(&film, 0, 100).await;
            node.read(&film).await;
            let seen: Vec<u16> = film.seen().iter().map(|seen| seen.status).collect();
            assert_eq!(seen, [206, 200], "{path}: a look, then the whole");
        }
    };
    join_all((0..3).map(client)).await;
}

/// A node that keeps next to nothing.
fn small_memory_alone() -> Options {
    Options::alone()
        .set("l1_cache_size_bytes", "1m")
        .set("enable_l2_cache", false)
}

/// A body runs ahead of its reader by more than a small memory keeps: what the
/// reader has not come to is held for it, not asked for once more.
#[tokio::test(flavor = "multi_thread")]
async fn a_small_memory_alone_does_not_multiply_bodies() {
    let cluster = small_memory_alone().start().await;
    let node = cluster.node(1);
    for n in 0..4 {
        let film = cluster
            .origin
            .publish(&format!("/film{n}"), 30 * SLICE_BYTES);
        film.always(Fault::IgnoreRange);
        node.read_range(&film, 0, 100).await;
        node.read(&film).await;
        assert!(film.seen().len() <= 3, "{} bodies", film.seen().len());
    }
}

/// A reader that has fallen too far behind a body that cannot be asked for
/// again is cut off; that costs nobody else anything, and the origin nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_reader_left_behind_is_cut_and_nothing_else() {
    let cluster = small_memory_alone().start().await;
    let node = cluster.node(1);
    let film = cluster.origin.publish("/film", 96 * MIB);
    film.validators(Validators::Nothing)
        .always(Fault::IgnoreRange);
    let purges = node.metric("purge_index").await;
    let mut gate = film.hold_at(SLICE_BYTES + 1);
    let mut behind = node.open(Ask::get("/film")).await;
    let mut ahead = node.open(Ask::get("/film")).await;
    gate.holds(1).await;
    gate.open();
    let at = take(&mut behind, &film, 0, 1).await;
    let near_end = take(&mut ahead, &film, 0, 90 * MIB).await;
    let mut read = at;
    let broken = loop {
        match behind.next().await {
            Ok(Some(piece)) => {
                assert_eq!(film.content().difference(read, &piece), None);
                read += piece.len() as u64;
            }
            Ok(None) => break false,
            Err(_) => break true,
        }
    };
    assert!(
        broken && read < film.length(),
        "{read} bytes, {:#?}",
        film.seen()
    );
    rest(ahead, &film, near_end).await;
    assert_eq!(film.seen().len(), 1, "{:#?}", film.seen());
    assert_eq!(node.metric("purge_index").await, purges, "and no purge");
}
