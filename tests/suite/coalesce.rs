//! Promise P3: the origin sees each missing slice once.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use futures::future::join_all;
use pingora_slice_tests::{Ask, Fault, MIB, Options, SLICE_BYTES, TestCluster};
use socket2::{Domain, Socket, Type};

/// Longer than a peer may be silent before it is asked whether it lives, and
/// shorter than anybody waits for a seat at it.
const SLOW: Duration = Duration::from_secs(3);

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

/// An owner that waits for a slow origin is not a dead one, though every seat at
/// it is taken by somebody who waits: nobody goes elsewhere.
#[tokio::test(flavor = "multi_thread")]
async fn more_slow_objects_than_a_peer_has_seats_cost_one_request_each() {
    const SEATS: usize = 64;
    let cluster = TestCluster::start(3).await;
    let films = cluster.films_owned_by(1, SEATS + 8, 1000).await;
    films.iter().for_each(|film| {
        film.always(Fault::Delay(SLOW));
    });
    let read = |film| [cluster.node(2).read(film), cluster.node(3).read(film)];
    join_all(films.iter().flat_map(read)).await;
    let counts: Vec<usize> = films.iter().map(|film| film.seen().len()).collect();
    assert!(counts.iter().all(|n| *n == 1), "{counts:?}");
}

/// Clients who wait for one object take one seat at its owner, whatever else
/// they send.
#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_clients_on_each_node_cost_one_request_and_one_ask() {
    let cluster = TestCluster::start(3).await;
    let film = cluster.films_owned_by(1, 1, 1000).await.remove(0);
    film.always(Fault::Delay(SLOW));
    let read = async |n: u64| {
        let ask = Ask::get(film.path()).header("User-Agent", format!("client {n}"));
        let reply = cluster.node(n % 3 + 1).ask(ask).await;
        assert_eq!((reply.status, reply.body), (200, film.content().all()));
    };
    join_all((0..300).map(read)).await;
    assert_eq!(film.seen().len(), 1, "{:#?}", film.seen());
    for node in [2, 3] {
        let asks = cluster
            .node(node)
            .metrics()
            .await
            .sum("peer_requests_total");
        assert_eq!(asks, 2.0, "for the manifest, and for the slice");
    }
}

/// Whoever demands validation waits for the origin, and keeps nobody else waiting
/// whom the owner can answer.
#[tokio::test(flavor = "multi_thread")]
async fn who_demands_more_than_others_asks_alone() {
    let cluster = TestCluster::start(3).await;
    let film = cluster.films_owned_by(1, 1, 1000).await.remove(0);
    film.header("Cache-Control", "max-age=3600");
    cluster.node(1).read(&film).await;
    film.always(Fault::Delay(SLOW));
    let demands = Ask::get(film.path()).header("Cache-Control", "no-cache");
    let mut demanding = std::pin::pin!(cluster.node(2).ask(demands));
    let others = async {
        film.until("it is being validated", |seen| seen.len() == 2)
            .await;
        cluster.node(2).read(&film).await;
        assert!(!film.seen()[1].ended, "the others have waited, too");
    };
    tokio::select! {
        () = others => {}
        _ = &mut demanding => panic!("the others are answered first"),
    }
    assert_eq!(demanding.await.status, 200);
    assert_eq!(film.seen().len(), 2, "{:#?}", film.seen());
}

/// Each of those who ask together gets what its own request selects.
#[tokio::test(flavor = "multi_thread")]
async fn clients_of_several_variants_get_their_own() {
    const LANGUAGES: [&str; 4] = ["de", "en", "fr", "it"];
    let cluster = TestCluster::start(3).await;
    let film = cluster.films_owned_by(1, 1, 1000).await.remove(0);
    film.vary("Accept-Language")
        .always(Fault::Delay(Duration::from_secs(1)));
    let read = async |n: usize| {
        let language = LANGUAGES[n / 3 % 4];
        let ask = Ask::get(film.path()).header("Accept-Language", language);
        let reply = cluster.node(n as u64 % 3 + 1).ask(ask).await;
        assert_eq!(reply.body, film.content_for(language).all(), "{language}");
    };
    join_all((0..120).map(read)).await;
    assert_eq!(film.fetches(), LANGUAGES.len(), "{:#?}", film.seen());
}

/// What is for one client alone goes to that one, whoever asked together with it.
#[tokio::test(flavor = "multi_thread")]
async fn clients_who_ask_together_do_not_share_what_is_private() {
    let cluster = TestCluster::start(3).await;
    let film = cluster.films_owned_by(1, 1, 1000).await.remove(0);
    film.vary("Cookie").without("Vary");
    film.header("Cache-Control", "private")
        .always(Fault::Delay(Duration::from_secs(1)));
    let read = async |n: u64| {
        let cookie = format!("client={n}");
        let ask = Ask::get(film.path()).header("Cookie", &cookie);
        let reply = cluster.node(2).ask(ask).await;
        assert_eq!(reply.body, film.content_for(&cookie).all(), "{cookie}");
    };
    join_all((0..20).map(read)).await;
}

/// Rule 6 where the asker's clients join one another: by URL when they join, by
/// tag when the answer is there.
#[tokio::test(flavor = "multi_thread")]
async fn who_asks_after_a_purge_does_not_join_who_asked_before() {
    let cluster = TestCluster::start(3).await;
    let films = cluster.films_owned_by(1, 2, 1000).await;
    for (film, purge) in films.iter().zip([None, Some(("X-Purge-Tag", "new"))]) {
        film.header("Cache-Tag", "new").once(Fault::Delay(SLOW));
        let before = cluster.node(2).reading(film);
        film.until("one asks", |seen| !seen.is_empty()).await;
        film.change();
        let headers: Vec<_> = purge.into_iter().collect();
        cluster.node(3).purge_with(film.path(), &headers).await;
        cluster.node(2).read(film).await;
        let before = before.await.unwrap().unwrap();
        assert_eq!(film.version_of(0, &before.body), Some(1));
    }
}

/// Once it is known that answers are for one client each, nobody waits for
/// another's; and one that may be shared again is stored at once.
#[tokio::test(flavor = "multi_thread")]
async fn answers_that_may_not_be_shared_are_waited_for_by_nobody() {
    const CLIENTS: usize = 20;
    const NEVER: Duration = Duration::from_secs(600);
    for nodes in [1, 3] {
        let cluster = TestCluster::start(nodes).await;
        let node = cluster.node(1);
        let owner = nodes as u64;
        let x_cache = async |path: &str| node.get(path).await.header("x-cache").to_owned();
        for film in cluster.films_owned_by(owner, 2, 1000).await {
            film.header("Cache-Control", "private");
            assert_eq!(x_cache(film.path()).await, "PASS");
            film.header("Cache-Control", "max-age=3600");
            assert_eq!(x_cache(film.path()).await, "MISS");
            assert_eq!(x_cache(film.path()).await, "HIT");
            node.purge(film.path()).await;
            film.header("Cache-Control", "private").change();
            assert_eq!(x_cache(film.path()).await, "PASS");
            let before = film.seen().len();
            film.always(Fault::Delay(NEVER));
            let asking: Vec<_> = (0..CLIENTS).map(|_| node.reading(&film)).collect();
            let all = film.until("everybody", |seen| seen.len() == before + CLIENTS);
            let all = tokio::time::timeout(Duration::from_secs(20), all).await;
            assert!(all.is_ok(), "{} of {CLIENTS}", film.seen().len() - before);
            asking.iter().for_each(|asking| asking.abort());
        }
    }
}

/// A 304 that may not be kept is for the client that it came to, though others
/// waited for it.
#[tokio::test(flavor = "multi_thread")]
async fn clients_who_ask_together_do_not_share_a_304_that_is_private() {
    const CLIENTS: usize = 10;
    for nodes in [1, 3] {
        let cluster = TestCluster::start(nodes).await;
        let owner = nodes as u64;
        let film = cluster.films_owned_by(owner, 1, 1000).await.remove(0);
        film.header("Cache-Control", "no-cache");
        let node = cluster.node(1);
        node.read(&film).await;
        let before = film.seen().len();
        film.header("Set-Cookie", "who=1")
            .once(Fault::Delay(Duration::from_secs(1)));
        let first = node.reading(&film);
        film.until("one asks", |seen| seen.len() > before).await;
        let others = join_all((1..CLIENTS).map(|_| node.get(film.path()))).await;
        let first = first.await.unwrap().unwrap();
        for reply in others.iter().chain([&first]) {
            assert_eq!(reply.body, film.content().all());
            assert_eq!(reply.header("set-cookie"), "who=1");
        }
        let asked = film.seen().len() - before;
        assert_eq!(asked, CLIENTS, "one cookie for each: {:#?}", film.seen());
    }
}

/// Nor is it kept by the node that its owner gave it to.
#[tokio::test(flavor = "multi_thread")]
async fn a_304_that_is_private_is_not_kept_by_the_node_that_asked_its_owner() {
    let mut cluster = TestCluster::start(3).await;
    let film = cluster.films_owned_by(2, 1, 1000).await.remove(0);
    film.header("Cache-Control", "no-cache");
    let account = async |cluster: &TestCluster| {
        let reply = cluster.node(1).get(film.path()).await;
        assert_eq!(reply.body, film.content().all());
        reply.header("x-account").to_owned()
    };
    assert_eq!(account(&cluster).await, "");
    film.header("Set-Cookie", "who=1").header("X-Account", "1");
    assert_eq!(account(&cluster).await, "1");
    film.without("Set-Cookie").without("X-Account");
    cluster.node_mut(2).kill();
    cluster.node_mut(3).kill();
    // It asks the origin itself, with what it holds.
    assert_eq!(account(&cluster).await, "");
    let last = film.seen().pop().expect("a request");
    assert_eq!(last.status, 304, "nothing was held");
}

/// The origin's failure is told to all who waited, by one request.
#[tokio::test(flavor = "multi_thread")]
async fn an_origin_that_fails_is_not_asked_by_all_who_waited() {
    for nodes in [1, 3] {
        let cluster = Options::cluster(nodes).set("max_retries", 0).start().await;
        let owner = nodes as u64;
        for film in cluster.films_owned_by(owner, 2, 1000).await {
            film.always(Fault::Refuses("via", 503));
            let asking = (0..20).map(|_| cluster.node(1).get(film.path()));
            let replies = join_all(asking).await;
            assert!(
                replies.iter().all(|reply| reply.status == 503),
                "{replies:#?}"
            );
            assert_eq!(film.seen().len(), 1, "{:#?}", film.seen());
        }
    }
}

/// An answer about one client's range says nothing to those who waited with it:
/// they ask together, and the object is kept.
#[tokio::test(flavor = "multi_thread")]
async fn who_waited_for_a_range_beyond_the_end_asks_together_again() {
    for nodes in [1, 3] {
        let cluster = TestCluster::start(nodes).await;
        let owner = nodes as u64;
        let film = cluster
            .films_owned_by(owner, 1, 2 * SLICE_BYTES)
            .await
            .remove(0);
        film.once(Fault::Delay(Duration::from_secs(1)));
        let node = cluster.node(1);
        let beyond = node.ask(Ask::get(film.path()).range("bytes=1000000000000-"));
        let others = async {
            film.until("one asks", |seen| !seen.is_empty()).await;
            join_all((0..10).map(|_| node.read(&film))).await;
        };
        let (beyond, ()) = tokio::join!(beyond, others);
        assert_eq!(beyond.status, 416);
        assert_eq!(film.fetches_per_slice(), [1, 1], "{:#?}", film.seen());
    }
}

/// A node that cannot reach the origin leaves its objects to those that can.
#[tokio::test(flavor = "multi_thread")]
async fn an_owner_whose_way_to_the_origin_is_a_black_hole_is_bypassed() {
    // What connects here is not refused, and waits: its queue is full.
    let hole = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    hole.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into())
        .unwrap();
    hole.listen(0).unwrap();
    let address = hole.local_addr().unwrap().as_socket().unwrap();
    let _queued = tokio::net::TcpStream::connect(address).await.unwrap();

    let mut cluster = Options::cluster(3)
        .set("max_retries", 0)
        .set("origin_timeouts", "{connect: 500ms}")
        .prepare()
        .await;
    cluster
        .node_mut(2)
        .set("upstream_address", format!("\"{address}\""));
    for id in 1..=3 {
        cluster.node_mut(id).spawn();
    }
    for id in 1..=3 {
        cluster.node_mut(id).until_ready().await;
    }
    for film in cluster.films_owned_by(2, 3, 2 * SLICE_BYTES).await {
        cluster.node(1).read(&film).await;
        cluster.node(3).read(&film).await;
    }
}
