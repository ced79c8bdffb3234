//! Bytes arrive whole, right, and from where they should.

use pingora_slice_tests::{Ask, Fault, Film, KIB, MIB, Node, SLICE_BYTES, TestCluster, Validators};

#[tokio::test(flavor = "multi_thread")]
async fn every_size_arrives_whole_cold_and_warm() {
    let cluster = TestCluster::start(3).await;
    let slice = SLICE_BYTES;
    for (id, size) in [
        1,
        4 * KIB,
        slice - 1,
        slice,
        slice + 1,
        2 * slice,
        7 * slice + 17,
    ]
    .into_iter()
    .enumerate()
    {
        let film = cluster.origin.publish(&format!("/film-{size}"), size);
        // Another node is the first to be asked each time.
        cluster.node(id as u64 % 3 + 1).read(&film).await;
        cluster.read_from_every_node(&film).await;
        cluster.read_from_every_node(&film).await;
        assert!(
            film.fetches_per_slice().iter().all(|n| *n == 1),
            "{:#?}",
            film.seen()
        );
    }
    let empty = cluster.origin.publish("/empty", 0);
    cluster.read_from_every_node(&empty).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn head_tells_what_get_would() {
    let cluster = TestCluster::alone().await;
    let node = cluster.node(1);
    let film = cluster.origin.publish("/film", 3 * SLICE_BYTES + 1);
    for round in ["cold", "warm"] {
        let head = node.ask(Ask::new("HEAD", "/film")).await;
        let get = node.get("/film").await;
        assert_eq!((head.status, head.body.len()), (200, 0), "{round}");
        for name in [
            "content-length",
            "etag",
            "last-modified",
            "content-type",
            "accept-ranges",
        ] {
            assert_eq!(head.header(name), get.header(name), "{round}: {name}");
            assert_ne!(head.header(name), "", "{round}: {name}");
        }
        assert_eq!(film.content().difference(0, &get.body), None);
    }
    assert_eq!(film.fetches_per_slice(), [1; 4]);
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_say_where_they_come_from() {
    let cluster = TestCluster::start(3).await;
    let film = cluster.origin.publish("/film", SLICE_BYTES);
    let cold = cluster.node(1).get("/film").await;
    let warm = cluster.node(1).get("/film").await;
    assert_eq!(
        (cold.header("x-cache"), warm.header("x-cache")),
        ("MISS", "HIT")
    );
    for reply in [&cold, &warm] {
        let status = reply.header("cache-status");
        assert!(status.starts_with("pingora-slice;"), "{status}");
        assert_ne!(reply.header("via"), "");
        for (name, value) in &reply.headers {
            assert!(
                !value.to_str().unwrap().contains("127.0.0.1"),
                "{name}: an internal address"
            );
        }
    }
    assert!(
        warm.header("cache-status").contains("hit"),
        "{}",
        warm.header("cache-status")
    );
    assert_ne!(warm.header("age"), "");
    assert_eq!(film.fetches(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn other_methods_pass_untouched() {
    let cluster = TestCluster::start(3).await;
    for (method, body) in [
        ("POST", "a=b"),
        ("PUT", "whole"),
        ("PATCH", "part"),
        ("DELETE", ""),
    ] {
        for node in cluster.nodes() {
            let reply = node.ask(Ask::new(method, "/form").body(body)).await;
            assert_eq!(
                (reply.status, reply.text().as_str()),
                (200, body),
                "{method}"
            );
        }
    }
    assert_eq!(
        cluster.origin.log().len(),
        12,
        "each reaches the origin, every time"
    );
}

async fn read_twice(node: &Node, film: &Film, ask: Ask) {
    for _ in 0..2 {
        let reply = node.ask(ask.clone()).await;
        assert_eq!(reply.status, 200);
        assert_eq!(film.content().difference(0, &reply.body), None);
        assert_ne!(reply.header("x-cache"), "HIT");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_may_not_be_kept_is_not_kept() {
    let cluster = TestCluster::start(3).await;
    let node = cluster.node(1);
    for (path, name, value, cache_control) in [
        ("/no-store", "X-Any", "thing", "no-store"),
        ("/private", "X-Any", "thing", "private, max-age=100"),
        // Without `public`: nobody said that one visitor's cookie is for all.
        ("/cookie", "Set-Cookie", "visitor=1", "max-age=100"),
    ] {
        let film = cluster.origin.publish(path, 2 * SLICE_BYTES + 5);
        film.header("Cache-Control", cache_control)
            .header(name, value);
        read_twice(node, &film, Ask::get(path)).await;
        let counts = film.fetches_per_slice();
        assert!(counts.iter().all(|n| *n >= 2), "{path}: {counts:?}");
    }
    let film = cluster.origin.publish("/members", SLICE_BYTES);
    film.header("Cache-Control", "max-age=100");
    read_twice(
        node,
        &film,
        Ask::get("/members").header("Authorization", "Basic eDp5"),
    )
    .await;
    assert_eq!(
        film.fetches(),
        2,
        "an answer for one member is nobody else's"
    );
    cluster.read_from_every_node(&film).await;
    assert_eq!(film.fetches(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_of_the_origin_are_passed_on_and_forgotten() {
    let cluster = TestCluster::start(3).await;
    let node = cluster.node(1);
    assert_eq!(node.get("/nothing-here").await.status, 404);
    let film = cluster.origin.publish("/film", 3 * SLICE_BYTES);
    for status in [500, 503, 403] {
        film.always(Fault::Status(status));
        let reply = node.get("/film").await;
        // A gateway may say that it was the origin.
        assert!(
            reply.status == status || reply.status == 502,
            "{status}: {}",
            reply.status
        );
        film.behave();
        node.read(&film).await;
        film.change();
        node.purge("/film").await;
    }
    film.once(Fault::Redirect("/elsewhere".into()));
    let reply = node.get("/film").await;
    assert_eq!(
        (reply.status, reply.header("location")),
        (302, "/elsewhere")
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn origins_without_ranges_or_length_are_cached_whole() {
    let cluster = TestCluster::start(3).await;
    for (path, fault) in [
        ("/no-ranges", Fault::IgnoreRange),
        ("/no-length", Fault::NoLength),
    ] {
        let film = cluster.origin.publish(path, 5 * SLICE_BYTES + 1);
        film.always(fault);
        let first = cluster.node(1).get(path).await;
        assert_eq!(first.status, 200);
        assert_eq!(first.body, film.content().all(), "{path}");
        for node in cluster.nodes() {
            let reply = node.get(path).await;
            assert_eq!(
                reply.body,
                film.content().all(),
                "{path} at node {}",
                node.id()
            );
        }
        assert_eq!(film.fetches(), 1, "{path}: {:#?}", film.seen());
        cluster
            .node(2)
            .read_range(&film, SLICE_BYTES - 1, SLICE_BYTES + 1)
            .await;
        assert_eq!(film.fetches(), 1, "{path}");
    }
}

/// Each of these once, in the middle: fetched again, never stored, never seen.
#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_slice_is_fetched_again() {
    let cluster = TestCluster::start(3).await;
    let faults = [
        Fault::ShiftedRange,
        Fault::NoContentRange,
        Fault::WrongTotal,
        Fault::ShortRange,
        Fault::ShortBody,
        Fault::CloseAfter(1000),
        Fault::Hangup,
        Fault::Gzip,
        Fault::Status(503),
        Fault::Garbage(b"HTTP/1.1 nonsense\r\n\r\n".to_vec()),
    ];
    for (at, fault) in faults.into_iter().enumerate() {
        let film = cluster
            .origin
            .publish(&format!("/film{at}"), 4 * SLICE_BYTES);
        film.once_from(2 * SLICE_BYTES, fault.clone());
        println!("{fault:?}");
        if fault == Fault::WrongTotal {
            // Another total can also be another version: then the body is cut,
            // and the next one whole.
            let _ = cluster.node(1).reading(&film).await.unwrap();
        } else {
            cluster.node(1).read(&film).await;
        }
        cluster.read_from_every_node(&film).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_cannot_be_completed_ends_visibly_short() {
    let cluster = TestCluster::start(3).await;
    let film = cluster.origin.publish("/film", 6 * SLICE_BYTES);
    film.always_from(3 * SLICE_BYTES, Fault::CloseAfter(10));
    let mut stream = cluster.node(1).open(Ask::get("/film")).await;
    assert_eq!(stream.status, 200);
    let mut at = 0;
    let end = loop {
        match stream.next().await {
            Ok(Some(piece)) => {
                assert_eq!(film.content().difference(at, &piece), None);
                at += piece.len() as u64;
            }
            end => break end,
        }
    };
    assert!(end.is_err(), "a short body looked whole");
    assert!(at < film.length(), "{at}");
    film.behave();
    cluster.read_from_every_node(&film).await;
}

/// Promise P2: the origin changes while a download is under way.
#[tokio::test(flavor = "multi_thread")]
async fn two_versions_never_meet_in_one_body() {
    let cluster = TestCluster::start(3).await;
    let film = cluster.origin.publish("/film", 16 * MIB);
    let mut gate = film.hold_at(8 * MIB);
    let mut reading = cluster.node(1).reading(&film);
    gate.holds_up(&mut reading).await;
    film.change();
    gate.open();
    // Cut, or all of one version: nothing else.
    if let Ok(reply) = reading.await.unwrap() {
        assert!(film.version_of(0, &reply.body).is_some(), "a mixture");
        assert_eq!(reply.body.len() as u64, film.length());
    }
    cluster.node(1).purge("/film").await;
    cluster.read_from_every_node(&film).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_kind_of_validator_is_served_right() {
    let cluster = TestCluster::start(3).await;
    for validators in [
        Validators::Weak,
        Validators::Date,
        Validators::WeakAlone,
        Validators::Nothing,
    ] {
        let film = cluster
            .origin
            .publish(&format!("/{validators:?}"), 3 * SLICE_BYTES + 1);
        film.validators(validators);
        println!("{validators:?}");
        for node in cluster.nodes() {
            let reply = node.get(film.path()).await;
            assert_eq!(reply.status, 200, "{validators:?}");
            assert_eq!(reply.body, film.content().all(), "{validators:?}");
        }
        film.change();
        cluster.node(2).purge(film.path()).await;
        for node in cluster.nodes() {
            assert_eq!(
                node.get(film.path()).await.body,
                film.content().all(),
                "{validators:?}"
            );
        }
    }
}

/// Replicas that do not agree on ETags: what the bytes are is told by date and
/// length. Two downloads may be cut before that is understood, no more.
#[tokio::test(flavor = "multi_thread")]
async fn an_origin_whose_etags_never_agree_is_still_served() {
    let cluster = TestCluster::start(3).await;
    let film = cluster.origin.publish("/film", 5 * SLICE_BYTES);
    film.validators(Validators::Unsteady);
    for node in cluster.nodes() {
        for _ in 0..2 {
            if let Ok(reply) = node.reading(&film).await.unwrap() {
                assert!(reply.body == film.content().all(), "node {}", node.id());
            }
        }
        node.read(&film).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn variants_are_kept_apart() {
    let cluster = TestCluster::start(3).await;
    let film = cluster.origin.publish("/film", 2 * SLICE_BYTES + 1);
    film.vary("Accept-Language");
    for _ in 0..2 {
        for node in cluster.nodes() {
            for language in ["de", "en"] {
                let reply = node
                    .ask(Ask::get("/film").header("Accept-Language", language))
                    .await;
                assert_eq!(reply.body, film.content_for(language).all(), "{language}");
            }
        }
    }
    assert_eq!(film.fetches_per_slice(), [2, 2, 2], "once per variant");
}
