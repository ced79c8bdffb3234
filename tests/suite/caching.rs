//! The rules of RFC 9110, 9111, 9211, 9213 and 5861, each a conversation in
//! `caching/*.txt`, held with one node and with three in turn, with slices of
//! production size and of three bytes. The form is told in `talk`.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use futures::future::join_all;
use pingora_slice_tests::http::{Kept, raw};
use pingora_slice_tests::talk::{self, TalkOrigin};
use pingora_slice_tests::{Ask, Fault, MIB, Options, SLICE_BYTES, TestCluster, Validators};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const TEXTS: &[(&str, &str)] = &[
    ("storing", include_str!("caching/storing.txt")),
    ("freshness", include_str!("caching/freshness.txt")),
    ("requests", include_str!("caching/requests.txt")),
    ("targeted", include_str!("caching/targeted.txt")),
    ("validation", include_str!("caching/validation.txt")),
    ("stale", include_str!("caching/stale.txt")),
    ("vary", include_str!("caching/vary.txt")),
    ("partial", include_str!("caching/partial.txt")),
    ("methods", include_str!("caching/methods.txt")),
    ("messages", include_str!("caching/messages.txt")),
];
/// With defaults of the site's own for serving stale.
const STALE_BY_DEFAULT: &[(&str, &str)] =
    &[("by-default", include_str!("caching/stale_by_default.txt"))];

/// Holds every conversation; all that fail are told, not the first alone.
async fn hold_all(options: Options, texts: &[(&str, &str)]) {
    let origin = TalkOrigin::start().await;
    let cluster = options
        .set("upstream_address", format!("\"{}\"", origin.address()))
        .start()
        .await;
    let nodes: Vec<SocketAddr> = cluster.nodes().iter().map(|node| node.address()).collect();
    let only = std::env::var("CASE").unwrap_or_default();
    let (mut held, mut failed) = (0, Vec::new());
    for (topic, text) in texts {
        for (number, case) in talk::parse(text).iter().enumerate() {
            if !case.name.contains(&only) {
                continue;
            }
            held += 1;
            if let Err(why) = origin
                .hold(case, &format!("/{topic}/{number}"), &nodes)
                .await
            {
                failed.push(format!("{topic}: {}\n  {why}", case.name));
            }
        }
    }
    assert!(held > 0, "no case is called {only:?}");
    assert!(
        failed.is_empty(),
        "{} of {held} conversations went wrong:\n{}",
        failed.len(),
        failed.join("\n")
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn one_node_keeps_the_rules() {
    hold_all(Options::alone(), TEXTS).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_node_keeps_the_rules_with_tiny_slices() {
    hold_all(Options::alone().set("test_slice_size", 3), TEXTS).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn three_nodes_keep_the_rules_in_turn() {
    hold_all(Options::cluster(3), TEXTS).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn three_nodes_keep_the_rules_in_turn_with_tiny_slices() {
    hold_all(Options::cluster(3).set("test_slice_size", 3), TEXTS).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_site_may_serve_stale_by_default() {
    let defaults = "{stale_while_revalidate: 1m, stale_if_error: 1h}";
    for options in [Options::alone(), Options::cluster(3)] {
        hold_all(options.set("caching", defaults), STALE_BY_DEFAULT).await;
    }
}

/// Three nodes are one cache while it is validated, too: once one of them has
/// answered with the new version, none goes back to the old one.
#[tokio::test(flavor = "multi_thread")]
async fn stale_while_revalidate_does_not_go_back() {
    let cluster = TestCluster::start(3).await;
    for n in 0..3 {
        let film = cluster.origin.publish(&format!("/film{n}"), 1000);
        film.header("Cache-Control", "max-age=10, stale-while-revalidate=3600");
        film.header("Age", "20");
        cluster.read_from_every_node(&film).await;
        film.change();
        let version = async |node: u64| {
            let reply = cluster.node(node).get(film.path()).await;
            film.version_of(0, &reply.body)
        };
        cluster
            .node(1)
            .until("one has the new version", async || {
                version(1).await == Some(2)
            })
            .await;
        for node in [2, 3, 1, 2, 3] {
            assert_eq!(version(node).await, Some(2), "node {node} of film {n}");
        }
    }
}

/// What has grown beyond `max_object_size` is forgotten where it was asked for,
/// though its owner, which the answer went through, held nothing of it any more.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_too_large_now_is_not_answered_from_before() {
    let mut cluster = Options::cluster(3)
        .set("enable_l2_cache", false)
        .set("max_object_size", "1m")
        .start()
        .await;
    let film = cluster.films_owned_by(1, 1, 1000).await.remove(0);
    film.header("Cache-Control", "max-age=3600")
        .always(Fault::IgnoreRange);
    cluster.node(2).read(&film).await;
    cluster.node_mut(1).restart().await;
    film.change_to(3 * MIB);
    let demanding = Ask::get(film.path()).header("Cache-Control", "no-cache");
    for ask in [demanding, Ask::get(film.path())] {
        let reply = cluster.node(2).ask(ask).await;
        assert_eq!(reply.header("x-cache"), "PASS");
        assert_eq!(reply.body, film.content().all());
    }
}

/// While an origin takes its time, what is validated meanwhile is served at once
/// to everybody, and costs one request to the origin and next to none to the
/// owner (P4); also where the owner has lost it.
#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_stale_hits_cost_one_validation() {
    const CLIENTS: u64 = 8;
    const HITS: u64 = 125;
    const HELD: Duration = Duration::from_secs(30);
    for owner_loses_it in [false, true] {
        let mut cluster = Options::cluster(3)
            .set("enable_l2_cache", false)
            .start()
            .await;
        let film = cluster.films_owned_by(1, 1, 1000).await.remove(0);
        let rules = "max-age=3600, stale-while-revalidate=3600";
        film.header("Cache-Control", rules);
        cluster.node(1).read(&film).await;
        cluster.node(2).read(&film).await;
        if owner_loses_it {
            cluster.node_mut(1).restart().await;
        }
        film.always(Fault::Delay(HELD));
        let soft = [("X-Purge-Mode", "soft")];
        let purged = cluster.node(3).purge_with(film.path(), &soft).await;
        assert_eq!(purged.status, 200, "{}", purged.json);
        let asks = async || {
            let metrics = cluster.node(2).metrics().await;
            metrics.sum("peer_requests_total")
        };
        let before = asks().await;

        let begin = Instant::now();
        let hit = async |_| {
            let mut client = Kept::connect(cluster.node(2).address()).await.unwrap();
            for _ in 0..HITS {
                let reply = client.send(&Ask::get(film.path())).await.unwrap();
                assert_eq!(reply.header("x-cache"), "STALE");
                assert_eq!(reply.body, film.content().all());
            }
        };
        join_all((0..CLIENTS).map(hit)).await;
        let took = begin.elapsed();
        assert!(took < HELD / 2, "{took:?}: somebody waited");
        film.until("it is being validated", |seen| seen.len() > 1)
            .await;
        assert_eq!(film.seen().len(), 2, "{:#?}", film.seen());
        // One a tenth of a second.
        let asks = asks().await - before;
        let expected = took.as_secs_f64() * 10.0 + 2.0;
        assert!(asks <= expected, "{asks} requests to peers in {took:?}");
    }
}

/// RFC 9112 section 6.1: no chunks for clients that do not know them.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_of_http_1_0_gets_no_chunks() {
    let cluster = TestCluster::alone().await;
    let film = cluster.origin.publish("/film", 1000);
    film.always(Fault::NoLength);
    for round in ["cold", "warm"] {
        let request = b"GET /film HTTP/1.0\r\nHost: films.test\r\n\r\n";
        let answer = raw(cluster.node(1).address(), request).await.unwrap();
        let end = answer.windows(4).position(|w| w == b"\r\n\r\n").unwrap();
        let head = String::from_utf8_lossy(&answer[..end]).to_ascii_lowercase();
        assert!(!head.contains("transfer-encoding"), "{round}: {head}");
        assert_eq!(answer[end + 4..], film.content().all(), "{round}");
    }
}

/// Promise P5: to such a client the connection's end is the body's, so a body that
/// broke off ends with a reset, whether it was to be kept, relayed or passed.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_of_http_1_0_sees_that_a_body_broke_off() {
    let cluster = Options::alone().set("max_retries", 0).start().await;
    for (path, rules, demands) in [
        ("/kept", "max-age=60", ""),
        ("/relayed", "no-store", ""),
        ("/passed", "max-age=60", "Cache-Control: no-store\r\n"),
    ] {
        let film = cluster.origin.publish(path, 4 * SLICE_BYTES);
        film.validators(Validators::Nothing)
            .header("Cache-Control", rules);
        let request = format!("GET {path} HTTP/1.0\r\nHost: films.test\r\n{demands}\r\n");
        let ask = async || {
            let mut tcp = TcpStream::connect(cluster.node(1).address()).await?;
            tcp.write_all(request.as_bytes()).await?;
            let mut answer = Vec::new();
            tcp.read_to_end(&mut answer).await.map(|_| answer)
        };
        // In the third slice: the answer has begun.
        film.once(Fault::NoLengthCloseAfter(3 * SLICE_BYTES - 100));
        let cut = ask().await.map(|answer| answer.len());
        let error = cut.expect_err(path).kind();
        assert_eq!(error, std::io::ErrorKind::ConnectionReset, "{path}");
        film.always(Fault::NoLength);
        let answer = ask().await.expect(path);
        assert!(answer.ends_with(&film.content().all()), "{path}");
        assert!(!answer.starts_with(b"HTTP/1.1 5"), "{path}");
    }
}

/// RFC 9111 section 3.5, also where nobody waits for the answer.
#[tokio::test(flavor = "multi_thread")]
async fn what_credentials_bring_behind_a_stale_answer_is_nobody_elses() {
    for options in [Options::alone(), Options::cluster(3)] {
        let cluster = options.start().await;
        let node = cluster.node(1);
        for n in 0..3 {
            let film = cluster.origin.publish(&format!("/me{n}"), 1000);
            film.header("Cache-Control", "max-age=10, stale-while-revalidate=3600");
            film.header("Age", "20");
            node.read(&film).await;
            film.change();
            node.ask(Ask::get(film.path()).header("Authorization", "Basic eDp5"))
                .await;
            film.until("her page", |seen| seen.len() == 2 && seen[1].ended)
                .await;
            film.change();
            node.until("the page for everybody", async || {
                let reply = node.get(film.path()).await;
                let page = film.version_of(0, &reply.body);
                assert_ne!(page, Some(2), "that is hers");
                page == Some(3)
            })
            .await;
        }
    }
}

/// What is asked for with credentials and may not be shared is waited for by
/// nobody else, and says nothing of what others get.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_with_credentials_does_not_cost_the_others_the_cache() {
    const HELD: Duration = Duration::from_secs(3);
    for options in [Options::alone(), Options::cluster(3)] {
        let cluster = options.start().await;
        let node = cluster.node(1);
        let x_cache = async |path: &str| node.get(path).await.header("x-cache").to_owned();
        let hers = |path: &str| Ask::get(path).header("Authorization", "Basic eDp5");

        let film = cluster.origin.publish("/after", 3 * SLICE_BYTES);
        film.header("Cache-Control", "max-age=3600");
        let reply = node.ask(hers("/after")).await;
        assert_eq!(film.version_of(0, &reply.body), Some(1));
        assert_eq!(x_cache("/after").await, "MISS");
        assert_eq!(x_cache("/after").await, "HIT");

        let film = cluster.origin.publish("/while", 3 * SLICE_BYTES);
        film.header("Cache-Control", "max-age=3600");
        film.once(Fault::Delay(HELD));
        let (ask, address) = (hers("/while"), node.address());
        let asking = tokio::spawn(async move { ask.send(address).await });
        film.until("hers", |seen| seen.len() == 1).await;
        let begin = Instant::now();
        assert_eq!(x_cache("/while").await, "MISS");
        assert_eq!(x_cache("/while").await, "HIT");
        assert!(begin.elapsed() < HELD, "waited for hers");
        let reply = asking.await.unwrap().unwrap();
        assert_eq!(film.version_of(0, &reply.body), Some(1));
        assert_eq!(x_cache("/while").await, "HIT");
    }
}

/// RFC 9111 section 4, for what the origin gives by ranges.
#[tokio::test(flavor = "multi_thread")]
async fn a_newer_answer_in_slices_that_is_not_stored_takes_the_older_away() {
    const FRESH: (&str, &str) = ("max-age=3600", "0");
    const STALE: (&str, &str) = ("max-age=10, stale-while-revalidate=3600", "20");
    for options in [Options::alone(), Options::cluster(3)] {
        let cluster = options.start().await;
        for (n, ((rules, age), length)) in [
            (FRESH, 1000),
            (FRESH, 3 * SLICE_BYTES),
            (STALE, 1000),
            (STALE, 3 * SLICE_BYTES),
        ]
        .into_iter()
        .enumerate()
        {
            let film = cluster.origin.publish(&format!("/film{n}"), length);
            film.header("Cache-Control", rules).header("Age", age);
            cluster.read_from_every_node(&film).await;
            film.change();
            film.header("Cache-Control", "no-store");
            let reload = Ask::get(film.path()).header("Cache-Control", "no-cache");
            if (rules, age) == FRESH {
                cluster.node(1).ask(reload).await;
            }
            for node in cluster.nodes() {
                let is_newer = async || {
                    let reply = node.get(film.path()).await;
                    film.version_of(0, &reply.body) == Some(2)
                };
                match (rules, age) == FRESH {
                    true => assert!(is_newer().await, "node {} of film {n}", node.id()),
                    false => node.until("the newer answer", is_newer).await,
                }
            }
        }
    }
}

/// A 304 has no body: its connection is good for the next request at once.
#[tokio::test(flavor = "multi_thread")]
async fn validations_keep_their_connection() {
    // On one thread: on several, Pingora now and then does not get at a connection
    // that is put away at that moment (`reused_stream`).
    let cluster = Options::alone().set("threads", 1).start().await;
    let film = cluster.origin.publish("/film", 1000);
    cluster.node(1).read(&film).await;
    film.until("the end", |seen| seen[0].ended).await;
    let before = cluster.origin.connections();
    for _ in 0..20 {
        let ask = Ask::get("/film").header("Cache-Control", "no-cache");
        let reply = cluster.node(1).ask(ask).await;
        assert_eq!(reply.header("x-cache"), "REVALIDATED");
    }
    // The one from before may be at rest still when the first needs one.
    let made = cluster.origin.connections() - before;
    assert!(made <= 1, "{made} connections for 20 validations");
    // The same for what is relayed and is empty. Of another object each time: who
    // comes while the answer to the one before is being put away is passed on by
    // connections of another pool.
    let empty: Vec<_> = (0..20)
        .map(|n| cluster.origin.publish(&format!("/empty{n}"), 0))
        .collect();
    for film in &empty {
        film.header("Cache-Control", "no-store");
        film.always(Fault::IgnoreRange);
    }
    let before = cluster.origin.connections();
    for film in &empty {
        let reply = cluster.node(1).get(film.path()).await;
        assert_eq!((reply.status, reply.header("x-cache")), (200, "PASS"));
    }
    let made = cluster.origin.connections() - before;
    assert!(made <= 1, "{made} connections for 20 empty answers");
}
