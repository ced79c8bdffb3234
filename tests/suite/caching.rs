//! The rules of RFC 9110, 9111, 9211, 9213 and 5861, each a conversation in
//! `caching/*.txt`, held with one node and with three in turn, with slices of
//! production size and of three bytes. The form is told in `talk`.

use std::net::SocketAddr;

use pingora_slice_tests::http::raw;
use pingora_slice_tests::talk::{self, TalkOrigin};
use pingora_slice_tests::{Fault, Options, TestCluster};

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

/// Holds every conversation; all that fail are told, not the first alone.
async fn hold_all(options: Options) {
    let origin = TalkOrigin::start().await;
    let cluster = options
        .set("upstream_address", format!("\"{}\"", origin.address()))
        .start()
        .await;
    let nodes: Vec<SocketAddr> = cluster.nodes().iter().map(|node| node.address()).collect();
    let only = std::env::var("CASE").unwrap_or_default();
    let (mut held, mut failed) = (0, Vec::new());
    for (topic, text) in TEXTS {
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
    hold_all(Options::alone()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_node_keeps_the_rules_with_tiny_slices() {
    hold_all(Options::alone().set("test_slice_size", 3)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn three_nodes_keep_the_rules_in_turn() {
    hold_all(Options::cluster(3)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn three_nodes_keep_the_rules_in_turn_with_tiny_slices() {
    hold_all(Options::cluster(3).set("test_slice_size", 3)).await;
}

/// RFC 9112 section 6.1: no chunks for who does not know them.
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
