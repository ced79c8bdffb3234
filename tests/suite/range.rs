//! Ranges and conditions, in all the forms that clients send.

use pingora_slice_tests::http::{Reply, raw};
use pingora_slice_tests::{Ask, Fault, Film, MIB, Node, Options, SLICE_BYTES, TestCluster};

const LENGTH: u64 = 3 * SLICE_BYTES + 100;

/// Whatever the status: the body is what the head says it is.
fn is_consistent(reply: &Reply, film: &Film, what: &str) {
    let whole = film.content();
    match reply.status {
        200 => assert!(reply.body == whole.all(), "{what}: not the whole object"),
        206 => {
            let range = reply.header("content-range");
            let parse = || {
                let (range, total) = range.strip_prefix("bytes ")?.split_once('/')?;
                let (first, last) = range.split_once('-')?;
                assert_eq!(total, whole.length.to_string(), "{what}");
                Some((first.parse().ok()?, last.parse::<u64>().ok()? + 1))
            };
            let (start, end): (u64, u64) = parse().unwrap_or_else(|| panic!("{what}: {range}"));
            assert!(
                reply.body == whole.bytes(start..end),
                "{what}: not the bytes {range}"
            );
        }
        416 => {
            let range = reply.header("content-range");
            assert_eq!(range, format!("bytes */{}", whole.length), "{what}");
        }
        status => panic!("{what}: answered {status}"),
    }
}

async fn all_forms(node: &Node, film: &Film) {
    let last = LENGTH - 1;
    let some = |start: u64, end: u64| format!("bytes {start}-{}/{LENGTH}", end - 1);
    let edge = SLICE_BYTES;
    let cases: Vec<(String, u16, String)> = vec![
        ("bytes=0-0".into(), 206, some(0, 1)),
        ("bytes=-1".into(), 206, some(last, LENGTH)),
        (format!("bytes={last}-"), 206, some(last, LENGTH)),
        (
            format!("bytes={}-{edge}", edge - 1),
            206,
            some(edge - 1, edge + 1),
        ),
        (
            format!("bytes={edge}-{}", 2 * edge - 1),
            206,
            some(edge, 2 * edge),
        ),
        (
            format!("bytes=10-{}", 3 * edge),
            206,
            some(10, 3 * edge + 1),
        ),
        ("bytes=0-".into(), 206, some(0, LENGTH)),
        ("bytes=5-999999999".into(), 206, some(5, LENGTH)),
        (format!("bytes=-{}", 2 * LENGTH), 206, some(0, LENGTH)),
        ("BYTES=0-1".into(), 206, some(0, 2)),
        (format!("bytes={LENGTH}-"), 416, format!("bytes */{LENGTH}")),
        ("bytes=-0".into(), 416, format!("bytes */{LENGTH}")),
        (
            format!("bytes={}-", 1u64 << 63),
            416,
            format!("bytes */{LENGTH}"),
        ),
        // Ignored.
        ("bytes=5-2".into(), 200, String::new()),
        ("lines=0-1".into(), 200, String::new()),
        ("bytes=abc".into(), 200, String::new()),
        ("bytes".into(), 200, String::new()),
    ];
    for (range, status, content_range) in cases {
        let reply = node.ask(Ask::get(film.path()).range(&range)).await;
        assert_eq!(
            (reply.status, reply.header("content-range")),
            (status, &*content_range),
            "{range}"
        );
        is_consistent(&reply, film, &range);
        assert_eq!(
            reply.header("content-length"),
            reply.body.len().to_string(),
            "{range}"
        );
    }
    // Right is more than one answer; a wrapped number is none of them.
    for range in [
        "bytes=18446744073709551616-",
        "bytes=10000000000000000000000-",
        "bytes=18446744073709551615-18446744073709551616",
        "bytes=0-18446744073709551616",
        "bytes=-18446744073709551616",
        "bytes=-10000000000000000000000",
        "bytes= 0-1",
        "bytes=0 - 1",
        "bytes=--1",
        "bytes=1",
        "bytes=,",
        "bytes=0-0,",
    ] {
        let reply = node.ask(Ask::get(film.path()).range(range)).await;
        is_consistent(&reply, film, range);
        if range.starts_with("bytes=1") && reply.status == 206 {
            panic!("{range}: a start beyond the end has no bytes");
        }
    }
    let two = Ask::get(film.path()).range("bytes=0-1").range("bytes=4-5");
    let reply = node.ask(two).await;
    if reply.status != 400 {
        is_consistent(&reply, film, "two Range headers");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn all_forms_alone_cold_and_warm() {
    let cluster = TestCluster::alone().await;
    let film = cluster.origin.publish("/film", LENGTH);
    all_forms(cluster.node(1), &film).await;
    all_forms(cluster.node(1), &film).await;
    assert_eq!(film.fetches_per_slice(), [1; 4]);
}

#[tokio::test(flavor = "multi_thread")]
async fn all_forms_in_a_cluster() {
    let cluster = TestCluster::start(3).await;
    let film = cluster.origin.publish("/film", LENGTH);
    for node in cluster.nodes() {
        all_forms(node, &film).await;
    }
    assert_eq!(film.fetches_per_slice(), [1; 4]);
}

#[tokio::test(flavor = "multi_thread")]
async fn several_ranges_are_answered_in_parts() {
    let cluster = TestCluster::start(3).await;
    let film = cluster.origin.publish("/film", LENGTH);
    let edge = SLICE_BYTES;
    let range = format!("bytes=0-9,{}-{},-5", edge - 3, edge + 3);
    let reply = cluster.node(1).ask(Ask::get("/film").range(&range)).await;
    assert_eq!(reply.status, 206);
    let kind = reply.header("content-type");
    let boundary = kind
        .strip_prefix("multipart/byteranges; boundary=")
        .expect(kind);
    let mut expected = Vec::new();
    for (start, end) in [(0, 10), (edge - 3, edge + 4), (LENGTH - 5, LENGTH)] {
        let head = format!("Content-Range: bytes {start}-{}/{LENGTH}\r\n\r\n", end - 1);
        let at = find(&reply.body, head.to_ascii_lowercase().as_bytes()).expect("the part");
        let body = &reply.body[at + head.len()..][..(end - start) as usize];
        assert_eq!(body, &film.content().bytes(start..end)[..]);
        expected.push(at);
    }
    assert!(expected.is_sorted(), "parts in the order asked");
    let close = format!("--{}--", boundary.trim_matches('"'));
    assert!(
        find(&reply.body, close.as_bytes()).is_some(),
        "the last boundary"
    );
    assert_eq!(reply.header("content-length"), reply.body.len().to_string());
}

/// Where `needle`, in lower case, stands in `hay`, in any case.
fn find(hay: &[u8], needle: &[u8]) -> Option<usize> {
    hay.windows(needle.len())
        .position(|window| window.to_ascii_lowercase() == needle || window == needle)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_ranges_cost_no_more_than_the_object() {
    let cluster = TestCluster::alone().await;
    let film = cluster.origin.publish("/film", LENGTH);
    let lists = [
        (0..1000)
            .map(|n| format!("{n}-{n}"))
            .collect::<Vec<_>>()
            .join(","),
        vec!["0-"; 1000].join(","),
        (0..100)
            .rev()
            .map(|n| format!("{}-", n * 1000))
            .collect::<Vec<_>>()
            .join(","),
    ];
    for list in lists {
        let reply = cluster
            .node(1)
            .ask(Ask::get("/film").range(&format!("bytes={list}")))
            .await;
        assert!(matches!(reply.status, 200 | 206 | 416), "{}", reply.status);
        assert!(
            reply.body.len() as u64 <= LENGTH + 8192,
            "{} bytes",
            reply.body.len()
        );
        if reply.status != 206 {
            is_consistent(&reply, &film, &list[..20]);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn conditions_come_in_their_order() {
    let cluster = TestCluster::start(3).await;
    let film = cluster.origin.publish("/film", LENGTH);
    let first = cluster.node(1).get("/film").await;
    let (etag, date) = (first.header("etag"), first.header("last-modified"));
    let weak = format!("W/{etag}");
    let past = "Mon, 01 Jan 1990 00:00:00 GMT";
    let cases: &[(&[(&str, &str)], u16)] = &[
        (&[("If-None-Match", etag)], 304),
        (&[("If-None-Match", &weak)], 304),
        (&[("If-None-Match", "*")], 304),
        (&[("If-None-Match", "\"x\"")], 200),
        (&[("If-Modified-Since", date)], 304),
        (&[("If-Modified-Since", past)], 200),
        // If-None-Match speaks alone.
        (
            &[("If-None-Match", "\"x\""), ("If-Modified-Since", date)],
            200,
        ),
        (&[("If-Match", "\"x\"")], 412),
        (&[("If-Match", etag)], 200),
        (&[("If-Unmodified-Since", past)], 412),
        (&[("If-Match", "\"x\""), ("If-None-Match", etag)], 412),
        // A browser's player asks like this.
        (&[("Range", "bytes=0-9"), ("If-None-Match", etag)], 304),
        (&[("Range", "bytes=0-9"), ("If-Range", etag)], 206),
        (&[("Range", "bytes=0-9"), ("If-Range", date)], 206),
        (&[("Range", "bytes=0-9"), ("If-Range", "\"x\"")], 200),
        (&[("Range", "bytes=0-9"), ("If-Range", &weak)], 200),
        (&[("Range", "bytes=0-9"), ("If-Range", past)], 200),
        (&[("Range", "bytes=99999999-"), ("If-Range", "\"x\"")], 200),
    ];
    for node in cluster.nodes() {
        for (headers, status) in cases {
            let mut ask = Ask::get("/film");
            for (name, value) in *headers {
                ask = ask.header(name, value);
            }
            let reply = node.ask(ask).await;
            assert_eq!(reply.status, *status, "{headers:?}");
            if matches!(status, 200 | 206) {
                is_consistent(&reply, &film, &format!("{headers:?}"));
            } else {
                assert!(reply.status == 412 || reply.body.is_empty(), "{headers:?}");
                assert!(
                    reply.status == 412 || reply.header("etag") == etag,
                    "{headers:?}"
                );
            }
        }
    }
    assert_eq!(film.fetches_per_slice(), [1; 4]);
}

/// The amplification that other caches were found with.
#[tokio::test(flavor = "multi_thread")]
async fn one_byte_costs_the_origin_two_slices_at_most() {
    let cluster = TestCluster::start(3).await;
    for (path, range) in [
        ("/head", "bytes=0-0"),
        ("/middle", "bytes=9000000-9000000"),
        ("/tail", "bytes=-1"),
    ] {
        let film = cluster.origin.publish(path, 64 * MIB);
        let reply = cluster.node(1).ask(Ask::get(path).range(range)).await;
        assert_eq!((reply.status, reply.body.len()), (206, 1), "{path}");
        is_consistent(&reply, &film, path);
        film.until("all answers end", |seen| {
            seen.iter().all(|seen| seen.complete)
        })
        .await;
        let sent: u64 = film.seen().iter().map(|seen| seen.sent).sum();
        assert!(sent <= 1 + 2 * SLICE_BYTES, "{path}: {sent} bytes");
    }
}

/// What no pattern names is asked for whole, to be kept; where it is not, a client
/// that wants a part gets a part, for one request each.
#[tokio::test(flavor = "multi_thread")]
async fn a_range_of_what_is_not_kept_costs_a_range() {
    let cluster = Options::alone()
        .set("slice_patterns", "[^/sliced]")
        .start()
        .await;
    let film = cluster.origin.publish("/docs/big.pdf", LENGTH);
    film.header("Cache-Control", "private");
    for round in 0..3 {
        let before = film.seen().len();
        let range = format!("bytes={}-", LENGTH - 10 - round);
        let ask = Ask::get(film.path()).range(&range);
        let reply = cluster.node(1).ask(ask).await;
        assert_eq!(reply.status, 206, "{range}");
        is_consistent(&reply, &film, &range);
        let asked: Vec<String> = film.seen()[before..]
            .iter()
            .map(|seen| seen.header("range").to_owned())
            .collect();
        let expected = match round {
            0 => vec![String::new(), range],
            _ => vec![range],
        };
        assert_eq!(asked, expected);
    }
    // What is no range is no reason to ask again.
    let lines = Ask::get("/docs/other.pdf").range("lines=1-2");
    let other = cluster.origin.publish("/docs/other.pdf", LENGTH);
    other.header("Cache-Control", "private");
    let reply = cluster.node(1).ask(lines).await;
    assert_eq!((reply.status, other.seen().len()), (200, 1));
}

/// Promise P3, and no purge: a client that wants more than the part that is
/// held, in whatever form it says so, does not make the part a changed version.
#[tokio::test(flavor = "multi_thread")]
async fn no_list_of_ranges_makes_a_held_part_a_change() {
    let cluster = TestCluster::start(3).await;
    let node = cluster.node(1);
    let purges = node.metric("purge_index").await;
    let seventeen = format!("bytes={}", vec!["-1"; 17].join(","));
    for (path, list) in [
        ("/overlapping", "bytes=-1,-2"),
        ("/twice", "bytes=-2,-2"),
        ("/many", &*seventeen),
    ] {
        let film = cluster.origin.publish(path, LENGTH);
        let reply = node.ask(Ask::get(path).range("bytes=-2")).await;
        assert_eq!(reply.status, 206);
        let reply = node.ask(Ask::get(path).range(list)).await;
        assert_eq!(reply.status, 200, "{path}");
        is_consistent(&reply, &film, path);
        cluster.read_from_every_node(&film).await;
    }
    assert_eq!(
        node.metric("purge_index").await,
        purges,
        "a range is no purge"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_that_no_client_should_send_are_refused() {
    let cluster = TestCluster::alone().await;
    let film = cluster.origin.publish("/film", LENGTH);
    let long = format!(
        "GET / HTTP/1.1\r\nHost: a\r\nX: {}\r\n\r\n",
        "y".repeat(4 << 20)
    );
    for request in [
        "GARBAGE\r\n\r\n",
        "GET /film HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\nConnection: close\r\n\r\nab",
        "GET /film HTTP/1.1\r\nHost : a\r\nConnection: close\r\n\r\n",
        "POST /film HTTP/1.1\r\nContent-Length: 1\r\nConnection: close\r\n\r\nx",
        "POST film HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nConnection: close\r\n\r\nx",
        "OPTIONS /film HTTP/1.1\r\nConnection: close\r\n\r\n",
        "POST * HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nConnection: close\r\n\r\nx",
        "GET * HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
        "GET /film HTTP/9.9\r\nHost: a\r\nConnection: close\r\n\r\n",
        &long,
    ] {
        let answer = raw(cluster.node(1).address(), request.as_bytes())
            .await
            .unwrap();
        let head = String::from_utf8_lossy(&answer[..answer.len().min(40)]).into_owned();
        let what = &request[..request.len().min(60)];
        assert!(
            head.is_empty() || head.starts_with("HTTP/1.1 4") || head.starts_with("HTTP/1.1 5"),
            "{what:?}: {head}"
        );
    }
    cluster.node(1).read(&film).await;
}

/// Whoever gets a range that the origin chose reads in Cache-Status what became of it.
#[tokio::test(flavor = "multi_thread")]
async fn a_part_that_is_passed_on_says_why() {
    let cluster = TestCluster::start(3).await;
    let label = format!("bytes {}-{LENGTH}/{}", LENGTH - 2, LENGTH + 1);
    for (path, fault, suffix, why) in [
        ("/label", Some(Fault::ContentRange(label)), 2, "part"),
        ("/odd", None, 500_001, "part-does-not-fit"),
    ] {
        for node in cluster.nodes() {
            let path = format!("{path}-{}", node.id());
            let film = cluster.origin.publish(&path, LENGTH);
            if let Some(fault) = fault.clone() {
                film.always(fault);
            }
            let reply = node
                .ask(Ask::get(&path).range(&format!("bytes=-{suffix}")))
                .await;
            assert_eq!(reply.status, 206, "{path}");
            assert_eq!(reply.body, film.content().bytes(LENGTH - suffix..LENGTH));
            let status = reply.header("cache-status");
            let detail = format!("detail={why}");
            assert!(
                status.split("; ").any(|part| part == detail),
                "{path}: {status}"
            );
        }
    }
}
