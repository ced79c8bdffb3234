//! What a range costs the origin, and how soon it starts.

use std::time::{Duration, Instant};

use pingora_slice_tests::{Ask, Fault, MIB, Options, SLICE_BYTES};
use proptest::prelude::*;

use crate::property::{SLICE, World, length};

/// For any single range of an object that nobody has asked for before, the
/// origin sends at most the bytes that are wanted and two slices.
#[test]
fn any_single_range_costs_its_bytes_and_two_slices() {
    let world = World::start(&[]);
    let near = || 0..7 * SLICE;
    let range = || {
        prop_oneof![
            (near(), near()).prop_map(|(a, n)| (format!("bytes={a}-{}", a + n), n + 1)),
            near().prop_map(|a| (format!("bytes={a}-"), u64::MAX)),
            near().prop_map(|n| (format!("bytes=-{n}"), n)),
            Just(("bytes=99999999999999999999-".to_owned(), 0)),
        ]
    };
    world.hold(
        30,
        || (length(), range()),
        async |world, (length, (range, most))| {
            let film = world.publish(length);
            let reply = world.node().ask(Ask::get(film.path()).range(&range)).await;
            let wanted = reply.body.len() as u64;
            prop_assert!(matches!(reply.status, 206 | 416), "{}", reply.status);
            prop_assert!(wanted <= most);
            film.until("all answers end", |seen| seen.iter().all(|seen| seen.ended))
                .await;
            let sent: u64 = film.seen().iter().map(|seen| seen.sent).sum();
            prop_assert!(sent <= wanted + 2 * SLICE, "{} bytes for {}", sent, wanted);
            // Each slice once, and the first one where the end must be found
            // that is more than a slice long.
            let slices = match reply.header("content-range").strip_prefix("bytes ") {
                Some(range) if reply.status == 206 => {
                    let first: u64 = range.split('-').next().unwrap().parse().unwrap();
                    (first + wanted - 1) / SLICE - first / SLICE + 1
                }
                _ => 1,
            };
            let is_long = range.starts_with("bytes=-") && wanted > SLICE;
            let requests = film.seen().len() as u64;
            prop_assert!(
                requests <= slices + u64::from(is_long),
                "{} requests",
                requests
            );
            Ok(())
        },
    );
}

/// The same where the origin knows no suffixes; one that gives everything is
/// taken at its word.
#[tokio::test(flavor = "multi_thread")]
async fn an_origin_without_suffixes_is_asked_for_slices() {
    let cluster = Options::alone().start().await;
    let length = 64 * MIB;
    let refused = [
        Fault::Status(400),
        Fault::Status(501),
        Fault::Unsatisfiable,
        Fault::NoContentRange,
        Fault::ShortRange,
    ];
    for (nth, fault) in refused.into_iter().enumerate() {
        let path = format!("/film-{nth}");
        let film = cluster.origin.publish(&path, length);
        film.once(fault.clone());
        let reply = cluster.node(1).ask(Ask::get(&path).range("bytes=-3")).await;
        assert_eq!(reply.status, 206, "{fault:?}");
        assert_eq!(
            reply.body,
            film.content().bytes(length - 3..length),
            "{fault:?}"
        );
        let asked: Vec<String> = film
            .seen()
            .iter()
            .map(|seen| seen.header("range").to_owned())
            .collect();
        let expected = [
            "bytes=-3".to_owned(),
            format!("bytes=0-{}", SLICE_BYTES - 1),
            format!("bytes={}-{}", length - SLICE_BYTES, length - 1),
        ];
        assert_eq!(asked, expected, "{fault:?}");
    }
    let film = cluster.origin.publish("/film", 2 * MIB);
    film.once(Fault::IgnoreRange);
    let range = Ask::get("/film").range("bytes=-3");
    let reply = cluster.node(1).ask(range).await;
    assert_eq!(reply.status, 206);
    assert_eq!(reply.body, film.content().bytes(2 * MIB - 3..2 * MIB));
    assert_eq!(film.seen().len(), 1);
}

/// How many times its own time an origin may seem slower through a cold cache:
/// what is promised.
const SLOWER_MAX: f64 = 1.5;

/// A range at the end of ten gibibytes starts when the origin would start it.
#[tokio::test(flavor = "multi_thread")]
async fn a_range_at_the_end_of_ten_gibibytes_starts_in_time() {
    /// The origin's own time: what a slow machine adds is small beside it.
    const DELAY: Duration = Duration::from_millis(300);
    const TIMES: usize = 7;
    let length = 10 * 1024 * MIB;
    let cluster = Options::alone().start().await;
    for range in [
        format!("bytes={}-", length - 1000),
        "bytes=-1000".to_owned(),
    ] {
        let (mut directly, mut through) = (Vec::new(), Vec::new());
        for time in 0..TIMES {
            let path = format!("/{}-{time}", range.len());
            let film = cluster.origin.publish(&path, length);
            film.always(Fault::Delay(DELAY));
            for (address, times) in [
                (cluster.origin.address(), &mut directly),
                (cluster.node(1).address(), &mut through),
            ] {
                let started = Instant::now();
                let mut stream = Ask::get(&path).range(&range).open(address).await.unwrap();
                let first = stream.next().await.unwrap().unwrap();
                times.push(started.elapsed());
                assert_eq!(stream.status, 206);
                assert_eq!(film.content().difference(length - 1000, &first), None);
            }
        }
        let median = |times: &mut Vec<Duration>| {
            times.sort();
            times[TIMES / 2]
        };
        let (directly, through) = (median(&mut directly), median(&mut through));
        assert!(
            through < directly.mul_f64(SLOWER_MAX),
            "{range}: {through:?}, the origin itself {directly:?}"
        );
    }
}

/// What little is wanted of a slice that another node has crosses as little: not
/// the slice, but for a quarter of the bytes, which bring what is asked for often.
#[tokio::test(flavor = "multi_thread")]
async fn a_small_range_of_a_peers_slice_costs_its_bytes() {
    const RANGE: u64 = 8 * 1024;
    const RANGES: u64 = 300;
    let cluster = Options::cluster(3)
        .set("l1_cache_size_bytes", "1m")
        .start()
        .await;
    let film = cluster.origin.publish("/film", 256 * SLICE_BYTES);
    let node = cluster.node(1);
    node.read(&film).await;
    let origin_bytes = node.metric("bytes_from_origin_total").await;
    let before = node.metric("bytes_from_peers_total").await;
    for n in 0..RANGES {
        // No slice twice before all have been asked for.
        let first = n * 5 % 256 * SLICE_BYTES + 777 * (n + 1);
        let range = format!("bytes={first}-{}", first + RANGE - 1);
        let reply = node.ask(Ask::get("/film").range(&range)).await;
        assert_eq!(reply.status, 206);
        assert_eq!(reply.body, film.content().bytes(first..first + RANGE));
    }
    let crossed = node.metric("bytes_from_peers_total").await - before;
    let wanted = (RANGES * RANGE) as f64;
    assert!(crossed > wanted / 3.0, "{crossed} of {wanted}");
    assert!(crossed < 2.0 * wanted, "{crossed} for {wanted}");
    assert_eq!(
        node.metric("bytes_from_origin_total").await,
        origin_bytes,
        "the origin gives nothing twice"
    );
}

/// What little is wanted of a slice again and again comes into memory, wherever
/// the slice lies.
#[tokio::test(flavor = "multi_thread")]
async fn a_small_range_that_is_asked_for_often_comes_into_memory() {
    const RANGE: u64 = 8 * 1024;
    const OFTEN: u64 = 3000;
    let cluster = Options::cluster(3)
        .set("l1_cache_size_bytes", "64m")
        .start()
        .await;
    let film = cluster.origin.publish("/film", 24 * SLICE_BYTES);
    cluster.node(2).read(&film).await;
    let node = cluster.node(1);
    let before = node.metric("bytes_from_peers_total").await;
    // A slice of another node: the first ones of all are.
    let mut theirs = None;
    for index in 1..24 {
        let first = index * SLICE_BYTES + 5;
        node.read_range(&film, first, first + RANGE).await;
        if node.metric("bytes_from_peers_total").await > before {
            theirs = Some(first);
            break;
        }
    }
    let first = theirs.expect("a slice of another node");
    for _ in 0..OFTEN {
        node.read_range(&film, first, first + RANGE).await;
    }
    let crossed = node.metric("bytes_from_peers_total").await - before;
    // One in 128 brings the slice, and it stays.
    assert!(crossed < (OFTEN * RANGE) as f64 * 0.75, "{crossed}");
}
