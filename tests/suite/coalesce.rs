//! Promise P3: the origin sees each missing slice once.

use futures::future::join_all;
use pingora_slice_tests::{Ask, MIB, Options, TestCluster};

/// Everybody asks while the very first fill is under way, held by the origin.
#[tokio::test(flavor = "multi_thread")]
async fn sixty_clients_of_a_cold_object_cost_one_fetch_per_slice() {
    let cluster = TestCluster::start(3).await;
    let film = cluster.origin.publish("/film", 24 * MIB);
    let whole = film.content().all();
    // Inside the first slice, after the first 64 KiB: peers check bytes in such pieces.
    let mut gate = film.hold_at(200_000);
    // Everybody's head comes from the first fill, while it is being held.
    let asking = (0..60).map(|n| cluster.node(n % 3 + 1).open(Ask::get("/film")));
    let streams = join_all(asking).await;
    gate.holds(1).await;
    gate.open();
    let reading = streams.into_iter().map(async |mut stream| {
        assert_eq!(stream.status, 200);
        let mut at = 0;
        while let Some(piece) = stream.next().await.unwrap() {
            assert!(
                whole[at..at + piece.len()] == piece[..],
                "wrong bytes after {at}"
            );
            at += piece.len();
        }
        assert_eq!(at, whole.len());
    });
    join_all(reading).await;
    let counts = film.fetches_per_slice();
    assert!(counts.iter().all(|n| *n == 1), "{counts:?}");
}

/// Also what memory has no room for: it lands on disk alone, while others look for it.
#[tokio::test(flavor = "multi_thread")]
async fn a_large_cold_object_is_fetched_once_for_all_nodes() {
    let cluster = Options::cluster(3)
        .set("l1_cache_size_bytes", "2m")
        .start()
        .await;
    let film = cluster.origin.publish("/film", 256 * MIB);
    let reading = (0..6).map(|n| cluster.node(n % 3 + 1).read(&film));
    join_all(reading).await;
    let counts = film.fetches_per_slice();
    assert!(counts.iter().all(|n| *n == 1), "{counts:?}");
}

/// A client that leaves does not take the fill from those who stay.
#[tokio::test(flavor = "multi_thread")]
async fn a_reader_who_leaves_does_not_kill_the_fill() {
    let cluster = TestCluster::start(3).await;
    let film = cluster.origin.publish("/film", 4 * MIB);
    let mut gate = film.hold_at(MIB + 1000);
    let leaving = cluster.node(1).open(Ask::get("/film")).await;
    gate.holds(1).await;
    let staying = cluster.node(2).open(Ask::get("/film")).await;
    drop(leaving);
    gate.open();
    cluster
        .node(2)
        .compare(staying, &film, 0, film.length())
        .await;
    let counts = film.fetches_per_slice();
    assert!(counts.iter().all(|n| *n == 1), "{counts:?}");
}
