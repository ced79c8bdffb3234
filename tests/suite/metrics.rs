//! What the operator sees adds up.

use std::time::Duration;

use pingora_slice_tests::quick::Quick;
use pingora_slice_tests::{Ask, Fault, MIB, Options, SLICE_BYTES, TestCluster};

const NAMES: &[&str] = &[
    "requests_total",
    "sliced_requests_total",
    "passthrough_requests_total",
    "cache_hits_total",
    "cache_misses_total",
    "cache_hit_rate",
    "cache_errors_total",
    "subrequests_total",
    "failed_subrequests_total",
    "retried_subrequests_total",
    "subrequest_failure_rate",
    "bytes_from_origin_total",
    "bytes_from_cache_total",
    "bytes_from_peers_total",
    "bytes_to_client_total",
    "request_duration_ms_avg",
    "subrequest_duration_ms_avg",
    "assembly_duration_ms_avg",
    "purge_requests_total",
    "purge_requests_by_result",
    "purge_items_total",
    "slices_total",
    "request_duration_seconds_count",
    "time_to_first_byte_seconds_count",
    "origin_fetches_total",
    "l1_bytes",
    "l2_bytes",
    "node_up",
    "ring_epoch",
    "purge_index",
    "lease_valid",
    "build_info",
];

#[tokio::test(flavor = "multi_thread")]
async fn the_counters_agree_with_the_origin_and_the_clients() {
    let cluster = TestCluster::start(3).await;
    let film = cluster.origin.publish("/film", 4 * MIB);
    cluster.read_from_every_node(&film).await;
    cluster.read_from_every_node(&film).await;
    cluster.node(1).purge("/film").await;
    cluster
        .node(1)
        .ask(Ask::new("POST", "/form").body("x"))
        .await;
    let length = film.length() as f64;

    let own = cluster.node(1).metrics().await;
    for name in NAMES {
        assert!(own.has(name), "pingora_slice_{name} is missing");
    }
    // Counted once the client has its last byte, or an instant later.
    cluster
        .node(1)
        .until("what clients got is counted", async || {
            cluster.metric_sum("bytes_to_client_total").await >= 6.0 * length
        })
        .await;
    let slices = 6.0 * length / SLICE_BYTES as f64;
    assert_eq!(
        cluster.metric_sum("slices_total").await,
        slices,
        "each slice of each answer once"
    );
    // The film, and the form, which is echoed.
    let from_origin = cluster.metric_sum("bytes_from_origin_total").await;
    assert_eq!(from_origin, length + 1.0);
    let from_origin = film.fetches() as f64;
    assert_eq!(
        cluster.metric_sum("origin_fetches_total").await,
        from_origin
    );
    assert_eq!(cluster.metric_sum("passthrough_requests_total").await, 1.0);
    // Six films and a form, over both ways of answering.
    assert_eq!(cluster.metric_sum("responses_total").await, 7.0);
    let begun = cluster.metric_sum("time_to_first_byte_seconds_count").await;
    assert_eq!(begun, 7.0, "each answer has a first byte");
    assert_eq!(cluster.metric_sum("responses_by_status_total").await, 7.0);

    // Certificates of the tests last two years, too; nobody was refused.
    let end = own.sample("certificate_expires_seconds{which=\"peer\"}");
    assert!(end.is_some_and(|end| end > 1.7e9), "{end:?}");
    assert_eq!(own.sum("peer_faults_total"), 0.0);
    assert!(own.sum("link_mtu_bytes") >= 1200.0);

    let merged = cluster.node(2).cluster_metrics().await;
    for name in [
        "requests_total",
        "slices_total",
        "bytes_from_origin_total",
        "cache_hits_total",
    ] {
        assert_eq!(merged.sum(name), cluster.metric_sum(name).await, "{name}");
    }
    for id in 1..=3 {
        assert_eq!(
            merged.sample(&format!("node_up{{node=\"{id}\"}}")),
            Some(1.0)
        );
    }
}

/// What the origin had to be asked for is a miss, whichever node asked; what any
/// node had is a hit.
#[tokio::test(flavor = "multi_thread")]
async fn a_slice_that_its_owner_has_to_fetch_is_a_miss() {
    let cluster = TestCluster::start(3).await;
    let mut films = vec![cluster.origin.publish("/film", 4 * MIB)];
    // Most of a web site: the first slice, which comes with the manifest, is all.
    for owner in 1..=3 {
        films.extend(cluster.films_owned_by(owner, 2, SLICE_BYTES / 2).await);
    }
    let slices: f64 = films.iter().map(|film| film.slices() as f64).sum();
    let counted = async |misses: f64, hits: f64| {
        cluster
            .node(1)
            .until("all slices are counted", async || {
                cluster.metric_sum("slices_total").await >= misses + hits
            })
            .await;
        assert_eq!(cluster.metric_sum("cache_misses_total").await, misses);
        assert_eq!(cluster.metric_sum("cache_hits_total").await, hits);
    };
    for film in &films {
        cluster.node(1).read(film).await;
    }
    counted(slices, 0.0).await;
    for film in &films {
        cluster.node(2).read(film).await;
    }
    counted(slices, slices).await;
}

/// With the origin down, the log says what was started and names a failed
/// request, not all of them; every answer is counted by its class.
#[tokio::test(flavor = "multi_thread")]
async fn failed_requests_leave_a_trace() {
    const REQUESTS: usize = 20;
    let origin = "127.0.0.1:1";
    let cluster = Options::alone()
        .set("upstream_address", origin)
        .set("max_retries", 0)
        .start()
        .await;
    let node = cluster.node(1);
    for number in 0..REQUESTS {
        let reply = node.get(&format!("/film{number}")).await;
        assert_eq!(reply.status, 502);
    }
    let unconditional = Ask::get("/film0").header("Cache-Control", "only-if-cached");
    assert_eq!(node.ask(unconditional).await.status, 504);
    let metrics = node.metrics().await;
    let failed = metrics.sample("responses_by_status_total{class=\"5xx\"}");
    assert_eq!(failed, Some(REQUESTS as f64 + 1.0));

    let log = node.log();
    let started = log.lines().find(|line| line.contains("starting"));
    let started = started.expect("a line at the start");
    for part in [env!("CARGO_PKG_VERSION"), "config.yaml", origin] {
        assert!(started.contains(part), "{part}: {started}");
    }
    assert!(started.contains(&node.address().to_string()), "{started}");
    let lines: Vec<&str> = log
        .lines()
        .filter(|line| line.contains("request failed"))
        .collect();
    for part in ["/film0", "WARN", "status=502", "reason="] {
        assert!(lines[0].contains(part), "{part}: {lines:?}");
    }
    assert!(lines.len() < REQUESTS, "{lines:?}");
    assert!(!log.contains("status=504"), "a client's own wish: {log}");
}

/// What the origin cannot do is a failure; that it has another version, or refuses
/// one client, is none.
#[tokio::test(flavor = "multi_thread")]
async fn failed_fetches_are_those_that_the_origin_failed() {
    let cluster = Options::alone().set("max_retries", 0).start().await;
    let node = cluster.node(1);
    let failed = async || node.metric("failed_subrequests_total").await;
    let first = "bytes=0-99";

    let changing = cluster.origin.publish("/changing", 4 * SLICE_BYTES);
    node.ask(Ask::get("/changing").range(first)).await;
    changing.change();
    let reply = node.ask(Ask::get("/changing").range("bytes=-99")).await;
    assert_eq!(
        reply.body,
        changing.content().all()[4 * SLICE_BYTES as usize - 99..]
    );
    let private = cluster.origin.publish("/private", 4 * SLICE_BYTES);
    node.ask(Ask::get("/private").range(first)).await;
    private.always(Fault::Refuses("cookie", 403));
    let refused = Ask::get("/private")
        .header("cookie", "a=b")
        .range("bytes=-99");
    let reply = node.ask(refused).await;
    assert!(reply.status >= 400, "{}", reply.status);
    assert_eq!(failed().await, 0.0);

    cluster
        .origin
        .publish("/down", SLICE_BYTES)
        .always(Fault::Status(503));
    assert_eq!(node.get("/down").await.status, 503);
    assert_eq!(failed().await, 1.0);
    cluster
        .origin
        .publish("/not", SLICE_BYTES)
        .always(Fault::Status(404));
    assert_eq!(node.get("/not").await.status, 404);
    assert_eq!(failed().await, 1.0);
}

/// What the origin thinks is part of the time, with and without ranges.
#[tokio::test(flavor = "multi_thread")]
async fn fetches_are_timed_from_the_request() {
    const THOUGHT: Duration = Duration::from_millis(300);
    let cluster = Options::alone()
        .set("slice_patterns", "[\"^/sliced\"]")
        .start()
        .await;
    let node = cluster.node(1);
    let films = ["/sliced", "/whole"].map(|path| cluster.origin.publish(path, SLICE_BYTES));
    for (n, film) in films.iter().enumerate() {
        film.once(Fault::Delay(THOUGHT));
        node.read(film).await;
        let least = (n + 1) as f64 * THOUGHT.as_secs_f64();
        node.until("it is counted", async || {
            node.metric("subrequest_duration_seconds_sum").await >= least
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_node_is_seen_and_the_others_are_still_summed() {
    let mut cluster = TestCluster::start(3).await;
    let film = cluster.origin.publish("/film", MIB);
    cluster.read_from_every_node(&film).await;
    cluster.node_mut(3).kill();
    let node = cluster.node(1);
    node.until("node 3 is seen to be down", async || {
        node.cluster_metrics().await.sample("node_up{node=\"3\"}") == Some(0.0)
    })
    .await;
    let merged = node.cluster_metrics().await;
    assert_eq!(merged.sum("node_up"), 2.0);
    assert_eq!(
        merged.sum("slices_total"),
        cluster.metric_sum("slices_total").await
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_person_finds_a_page_and_a_probe_its_answers() {
    let cluster = TestCluster::start(3).await;
    for (path, holds) in [
        ("/", "<html"),
        ("/health", ""),
        ("/ready", ""),
        ("/metrics", "# HELP"),
    ] {
        let reply = Ask::get(path)
            .send(cluster.node(1).metrics_address())
            .await
            .unwrap();
        assert_eq!(reply.status, 200, "{path}");
        assert!(reply.text().contains(holds), "{path}: {}", reply.text());
    }
    let reply = Ask::get("/nothing")
        .send(cluster.node(1).metrics_address())
        .await
        .unwrap();
    assert_eq!(reply.status, 404);
    let without_token = Ask::get("/v1/cluster")
        .send(cluster.node(1).admin_address())
        .await;
    assert_eq!(without_token.unwrap().status, 401);
}

/// Each request is counted once, as what became of it.
#[tokio::test(flavor = "multi_thread")]
async fn requests_are_counted_as_what_became_of_them() {
    let mut cluster = Options::alone().set("max_retries", "0").start().await;
    let node = cluster.node(1);
    // Answered here, though their methods are passed.
    for method in ["OPTIONS", "TRACE"] {
        node.ask(Ask::new(method, "/film").header("max-forwards", "0"))
            .await;
    }
    let mut quick = Quick::connect(node.address()).await.unwrap();
    let misread =
        b"GET /film HTTP/1.1\r\nHost: films.test\r\nTransfer-Encoding: gzip, chunked\r\n\r\n";
    assert!(matches!(quick.ask(misread).await, Ok(501)));
    // Known, and then its bytes cannot be had.
    let film = cluster.origin.publish("/film", 4 * SLICE_BYTES);
    node.ask(Ask::get("/film").range("bytes=0-99")).await;
    cluster.origin.stop().await;
    let node = cluster.node(1);
    let last = format!("bytes={}-", film.length() - 10);
    let failed = node.ask(Ask::get("/film").range(&last)).await;
    assert!(failed.status >= 500, "{}", failed.status);
    node.until("all are counted", async || {
        node.metrics().await.sum("request_duration_seconds_count") >= 5.0
    })
    .await;
    let metrics = node.metrics().await;
    assert_eq!(metrics.sum("requests_total"), 5.0);
    assert_eq!(metrics.sum("passthrough_requests_total"), 0.0);
    assert_eq!(metrics.sum("sliced_requests_total"), 1.0);
}
