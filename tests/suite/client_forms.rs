//! What clients send: every form of range and condition against a model that
//! is obviously right, with slices of seven bytes so that borders are everywhere.

use std::ops::Range;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures::future::join_all;
use pingora_slice_tests::http::{Reply, raw};
use pingora_slice_tests::origin::Seen;
use pingora_slice_tests::quick::Quick;
use pingora_slice_tests::{Ask, Fault, Film, Options, SLICE_BYTES, TestCluster, Validators};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

const SLICE: u64 = 7;

async fn tiny_slices() -> TestCluster {
    Options::alone().set("test_slice_size", SLICE).start().await
}

/// What the range `first-last` selects, as a list of single bytes would.
fn selected(length: u64, first: u64, last: u64) -> Option<Range<u64>> {
    let bytes: Vec<u64> = (0..length).filter(|b| (first..=last).contains(b)).collect();
    Some(*bytes.first()?..*bytes.last()? + 1)
}

/// The answer to one range: 206 with exactly those bytes, or 416.
fn check(reply: &Reply, whole: &Bytes, expected: Option<Range<u64>>, what: &str) {
    let total = whole.len();
    match expected {
        Some(range) => {
            assert_eq!(reply.status, 206, "{what}");
            let content_range = format!("bytes {}-{}/{total}", range.start, range.end - 1);
            assert_eq!(reply.header("content-range"), content_range, "{what}");
            let bytes = whole.slice(range.start as usize..range.end as usize);
            assert_eq!(reply.body, bytes, "{what}");
        }
        None => {
            assert_eq!(reply.status, 416, "{what}");
            let content_range = format!("bytes */{total}");
            assert_eq!(reply.header("content-range"), content_range, "{what}");
            assert!(reply.body.is_empty(), "{what}");
        }
    }
    assert_eq!(
        reply.header("content-length"),
        reply.body.len().to_string(),
        "{what}"
    );
}

/// Asks for many ranges, a few at a time.
async fn all(cluster: &TestCluster, film: &Film, cases: Vec<(String, Option<Range<u64>>)>) {
    let whole = film.content().all();
    for batch in cases.chunks(8) {
        let asking = batch.iter().map(async |(range, expected)| {
            let reply = cluster
                .node(1)
                .ask(Ask::get(film.path()).range(range))
                .await;
            let what = format!("{} of {} bytes", range, whole.len());
            check(&reply, &whole, expected.clone(), &what);
        });
        join_all(asking).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_range_around_the_slice_borders() {
    let cluster = tiny_slices().await;
    for length in [1, 6, 7, 8, 13, 14, 15, 21, 22] {
        let film = cluster.origin.publish(&format!("/film-{length}"), length);
        let mut cases = Vec::new();
        for first in 0..length + 2 {
            for last in first..length + 2 {
                let range = format!("bytes={first}-{last}");
                cases.push((range, selected(length, first, last)));
            }
            cases.push((format!("bytes={first}-"), selected(length, first, u64::MAX)));
            let suffix = match first {
                0 => None,
                _ => selected(length, length.saturating_sub(first), u64::MAX),
            };
            cases.push((format!("bytes=-{first}"), suffix));
        }
        all(&cluster, &film, cases).await;
        let reply = cluster.node(1).get(film.path()).await;
        assert_eq!(reply.body, film.content().all());
        let slices = length.div_ceil(SLICE) as usize;
        assert!(film.fetches() <= slices, "each slice once at most");
    }
}

/// The first request for an object decides which slice is asked for first.
#[tokio::test(flavor = "multi_thread")]
async fn every_first_byte_of_a_cold_object() {
    let cluster = tiny_slices().await;
    let length = 3 * SLICE + 2;
    for first in 0..=length {
        let film = cluster.origin.publish(&format!("/from-{first}"), length);
        let cases = vec![(
            format!("bytes={first}-{first}"),
            selected(length, first, first),
        )];
        all(&cluster, &film, cases).await;
        let sent: u64 = film.seen().iter().map(|seen| seen.sent).sum();
        assert!(sent <= 1 + 2 * SLICE, "{sent} bytes for one");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn numbers_that_no_object_has() {
    let cluster = tiny_slices().await;
    let length = 3 * SLICE - 1;
    let huge = [
        "9223372036854775807",
        "9223372036854775808",
        "18446744073709551614",
        "18446744073709551615",
        "18446744073709551616",
        "18446744073709551617",
        "10000000000000000000000",
    ];
    let film = cluster.origin.publish("/film", length);
    let mut cases = Vec::new();
    for number in huge {
        cases.push((format!("bytes={number}-"), None));
        cases.push((format!("bytes={number}-{number}"), None));
        cases.push((format!("bytes=3-{number}"), Some(3..length)));
        cases.push((format!("bytes=-{number}"), Some(0..length)));
    }
    all(&cluster, &film, cases).await;
    // The same as the first request for a cold object.
    for (at, number) in huge.iter().enumerate() {
        let film = cluster.origin.publish(&format!("/cold-{at}"), length);
        all(&cluster, &film, vec![(format!("bytes={number}-"), None)]).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_range_is_ignored() {
    let cluster = tiny_slices().await;
    let film = cluster.origin.publish("/film", 3 * SLICE);
    for value in [
        "bytes=5-2",
        "lines=0-1",
        "bytes",
        "bytes=",
        "bytes=-",
        "bytes=a-b",
        "bytes=1-2-3",
        "bytes=+1-2",
        "bytes=0x1-2",
        "bytes=--1",
        "bytes=1",
        "bytes=,",
        "bytes: 0-1",
        "0-1",
        "bytes=0-1;2-3",
        "bytes=٣-٤",
    ] {
        let reply = cluster.node(1).ask(Ask::get("/film").range(value)).await;
        assert_eq!(reply.status, 200, "{value}");
        assert_eq!(reply.body, film.content().all(), "{value}");
    }
    for value in [
        "BYTES=0-1",
        "bytes=0-1",
        "bytes= 0-1",
        "bytes=0-1 ",
        "bytes=0-1,",
    ] {
        let reply = cluster.node(1).ask(Ask::get("/film").range(value)).await;
        check(&reply, &film.content().all(), Some(0..2), value);
    }
    let two = Ask::get("/film").range("bytes=0-1").range("bytes=4-5");
    let reply = cluster.node(1).ask(two).await;
    assert_eq!((reply.status, reply.body.len() as u64), (200, 3 * SLICE));
}

/// The parts of a multipart answer: (first, last, bytes).
fn parts(reply: &Reply, total: usize) -> Vec<(u64, u64, Bytes)> {
    let kind = reply.header("content-type");
    let boundary = kind
        .strip_prefix("multipart/byteranges; boundary=")
        .expect(kind);
    let mut rest = reply.body.clone();
    let mut parts = Vec::new();
    let opening = format!("\r\n--{boundary}\r\n");
    while rest.starts_with(opening.as_bytes()) {
        rest = rest.slice(opening.len()..);
        let end = rest
            .windows(4)
            .position(|w| w == b"\r\n\r\n")
            .expect("a head");
        let head = String::from_utf8(rest[..end].to_vec()).expect("text");
        rest = rest.slice(end + 4..);
        let mut lines = head.split("\r\n");
        assert_eq!(lines.next(), Some("Content-Type: application/octet-stream"));
        let range = lines.next().expect("its range");
        assert_eq!(lines.next(), None);
        let range = range
            .strip_prefix("Content-Range: bytes ")
            .expect("its range");
        let range = range.strip_suffix(&format!("/{total}")).expect("the total");
        let (first, last) = range.split_once('-').expect("two numbers");
        let (first, last): (u64, u64) = (first.parse().unwrap(), last.parse().unwrap());
        let length = (last + 1 - first) as usize;
        parts.push((first, last, rest.slice(..length)));
        rest = rest.slice(length..);
    }
    assert_eq!(rest, format!("\r\n--{boundary}--\r\n"), "the end");
    parts
}

#[tokio::test(flavor = "multi_thread")]
async fn two_ranges_in_every_position() {
    let cluster = tiny_slices().await;
    let length = 2 * SLICE + 2;
    let film = cluster.origin.publish("/film", length);
    let whole = film.content().all();
    let marks = [0, 1, 6, 7, 8, 13, 14, 15, 16];
    let mut cases = Vec::new();
    for a in marks {
        for b in marks.into_iter().filter(|b| *b >= a) {
            for c in marks {
                for d in marks.into_iter().filter(|d| *d >= c) {
                    cases.push([(a, b), (c, d)]);
                }
            }
        }
    }
    for batch in cases.chunks(8) {
        let asking = batch.iter().map(async |[(a, b), (c, d)]| {
            let value = format!("bytes={a}-{b},{c}-{d}");
            let reply = cluster.node(1).ask(Ask::get("/film").range(&value)).await;
            assert_eq!(
                reply.header("content-length"),
                reply.body.len().to_string(),
                "{value}"
            );
            match (selected(length, *a, *b), selected(length, *c, *d)) {
                (None, None) => check(&reply, &whole, None, &value),
                (Some(one), None) | (None, Some(one)) => {
                    check(&reply, &whole, Some(one), &value);
                }
                (Some(one), Some(two)) if one.end <= two.start => {
                    assert_eq!(reply.status, 206, "{value}");
                    let expected: Vec<_> = [one, two]
                        .into_iter()
                        .map(|r| {
                            let bytes = whole.slice(r.start as usize..r.end as usize);
                            (r.start, r.end - 1, bytes)
                        })
                        .collect();
                    assert_eq!(parts(&reply, whole.len()), expected, "{value}");
                }
                // Overlapping or descending: ignored.
                _ => {
                    assert_eq!(reply.status, 200, "{value}");
                    assert_eq!(reply.body, whole, "{value}");
                }
            }
        });
        join_all(asking).await;
    }
    assert!(film.fetches() <= 3, "{:#?}", film.seen());
}

#[tokio::test(flavor = "multi_thread")]
async fn lists_that_cost_more_than_they_are_worth() {
    let cluster = tiny_slices().await;
    let length = 40 * SLICE;
    let film = cluster.origin.publish("/film", length);
    let list = |count: u64| {
        let specs: Vec<String> = (0..count).map(|n| format!("{}-{}", 3 * n, 3 * n)).collect();
        format!("bytes={}", specs.join(","))
    };
    let reply = cluster
        .node(1)
        .ask(Ask::get("/film").range(&list(16)))
        .await;
    assert_eq!(reply.status, 206);
    assert_eq!(parts(&reply, length as usize).len(), 16);
    for value in [
        list(17),
        list(1000),
        format!("bytes={}", vec!["0-"; 1000].join(",")),
        "bytes=0-,0-".to_owned(),
        "bytes=-1,0-0".to_owned(),
        format!("bytes={}", ",".repeat(5000)),
    ] {
        let what = &value[..value.len().min(40)];
        let reply = cluster.node(1).ask(Ask::get("/film").range(&value)).await;
        assert_eq!(reply.status, 200, "{what}");
        assert_eq!(reply.body, film.content().all(), "{what}");
    }
}

/// RFC 9110 section 13.1.5: a date that a second version may have had says
/// nothing of the bytes, though it is the one.
#[tokio::test(flavor = "multi_thread")]
async fn if_range_with_a_date_that_is_too_new() {
    let cluster = TestCluster::alone().await;
    let day = Duration::from_secs(86_400);
    for validators in [Validators::Strong, Validators::Date] {
        for (age, status) in [(day, 206), (Duration::ZERO, 200)] {
            let path = format!("/{validators:?}-{status}");
            let film = cluster.origin.publish(&path, 1000);
            film.validators(validators)
                .modified(SystemTime::now() - age);
            let first = cluster.node(1).get(&path).await;
            let ask = Ask::get(&path).range("bytes=0-9");
            let ask = ask.header("If-Range", first.header("last-modified"));
            let reply = cluster.node(1).ask(ask).await;
            assert_eq!(reply.status, status, "{path}");
        }
    }
}

/// RFC 9110 section 8.8.2.2: the Date that counts is that of the answer which
/// the bytes came with, not the later one of a 304.
#[tokio::test(flavor = "multi_thread")]
async fn if_range_with_a_date_that_was_too_new_before_a_304() {
    let cluster = TestCluster::alone().await;
    let modified = SystemTime::now() - Duration::from_secs(86_400);
    for validators in [Validators::Strong, Validators::Date] {
        let path = format!("/{validators:?}");
        let film = cluster.origin.publish(&path, 1000);
        film.validators(validators)
            .modified(modified)
            .header("Cache-Control", "no-cache")
            .header("Date", &httpdate::fmt_http_date(modified));
        let first = cluster.node(1).get(&path).await;
        assert_eq!(first.status, 200, "{path}");
        let later = modified + Duration::from_secs(3600);
        film.header("Date", &httpdate::fmt_http_date(later));
        let again = cluster.node(1).get(&path).await;
        assert_eq!(again.header("x-cache"), "REVALIDATED", "{path}");
        let ask = Ask::get(&path).range("bytes=0-9");
        let ask = ask.header("If-Range", first.header("last-modified"));
        let reply = cluster.node(1).ask(ask).await;
        assert_eq!(reply.status, 200, "{path}");
    }
}

/// RFC 9110 section 13.2.2, every combination of every condition with a range.
#[tokio::test(flavor = "multi_thread")]
async fn conditions_in_their_order() {
    let cluster = tiny_slices().await;
    let film = cluster.origin.publish("/film", 3 * SLICE + 1);
    let first = cluster.node(1).get("/film").await;
    let (etag, date) = (first.header("etag"), first.header("last-modified"));
    let weak = format!("W/{etag}");
    let (past, future) = (
        "Mon, 01 Jan 1990 00:00:00 GMT",
        "Fri, 01 Jan 2100 00:00:00 GMT",
    );
    let listed = format!("\"x,y\", {etag}");
    let other = "\"other\"".to_owned();
    let matches = [
        None,
        Some(etag),
        Some("*"),
        Some(&listed),
        Some(&weak),
        Some(&other),
    ];
    let unmodified = [None, Some(date), Some(past), Some(future), Some("garbage")];
    let none_match = [None, Some(etag), Some("*"), Some(&weak), Some(&other)];
    let modified = [None, Some(date), Some(past), Some("garbage")];
    let if_range = [
        None,
        Some(etag),
        Some(&*weak),
        Some(&*other),
        Some(date),
        Some(past),
    ];
    let mut cases = Vec::new();
    for a in matches {
        for b in unmodified {
            for c in none_match {
                for d in modified {
                    for e in if_range {
                        cases.push((a, b, c, d, e));
                    }
                }
            }
        }
    }
    let whole = film.content().all();
    for batch in cases.chunks(8) {
        let asking = batch.iter().map(async |(a, b, c, d, e)| {
            let step1 = match a {
                Some(tags) => *tags == etag || *tags == "*" || *tags == listed,
                None => !matches!(b, Some(at) if *at == past),
            };
            let not_modified = match c {
                Some(tags) => *tags != other,
                None => matches!(d, Some(at) if *at == date),
            };
            let ranged = match e {
                Some(value) => *value == etag || *value == date,
                None => true,
            };
            let expected = match (step1, not_modified, ranged) {
                (false, _, _) => 412,
                (true, true, _) => 304,
                (true, false, true) => 206,
                (true, false, false) => 200,
            };
            let mut ask = Ask::get("/film").range("bytes=6-7");
            for (name, value) in [
                ("If-Match", a),
                ("If-Unmodified-Since", b),
                ("If-None-Match", c),
                ("If-Modified-Since", d),
                ("If-Range", e),
            ] {
                if let Some(value) = value {
                    ask = ask.header(name, value);
                }
            }
            let reply = cluster.node(1).ask(ask.clone()).await;
            assert_eq!(reply.status, expected, "{ask:?}");
            match expected {
                206 => check(&reply, &whole, Some(6..8), "with conditions"),
                200 => assert_eq!(reply.body, whole),
                304 => {
                    assert_eq!((reply.header("etag"), reply.body.len()), (etag, 0));
                    assert_eq!(reply.header("content-range"), "");
                }
                _ => assert_eq!(reply.header("content-range"), ""),
            }
        });
        join_all(asking).await;
    }
    assert!(film.fetches() <= 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn head_is_get_without_a_body() {
    let cluster = tiny_slices().await;
    let film = cluster.origin.publish("/film", 3 * SLICE + 1);
    let etag = cluster.node(1).get("/film").await.header("etag").to_owned();
    let forms: Vec<Vec<(&str, &str)>> = vec![
        vec![],
        vec![("If-None-Match", &etag)],
        vec![("If-None-Match", "\"x\"")],
        vec![("If-Match", "\"x\"")],
        vec![("If-Modified-Since", "Mon, 01 Jan 1990 00:00:00 GMT")],
    ];
    let with = |method: &str, path: &str, form: &[(&str, &str)]| {
        form.iter()
            .fold(Ask::new(method, path), |ask, (n, v)| ask.header(n, v))
    };
    let cold = cluster.origin.publish("/cold", 2 * SLICE);
    let missing = "/nothing-here";
    for path in [film.path(), cold.path(), missing] {
        for form in &forms {
            let head = cluster.node(1).ask(with("HEAD", path, form)).await;
            let get = cluster.node(1).ask(with("GET", path, form)).await;
            assert_eq!(head.status, get.status, "{path} {form:?}");
            assert!(head.body.is_empty());
            for (name, value) in &get.headers {
                let changes = ["date", "age", "cache-status", "x-cache"];
                if !changes.contains(&name.as_str()) {
                    assert_eq!(head.headers.get(name), Some(value), "{path} {form:?}");
                }
            }
        }
    }
    // A range is for GET alone.
    let ask = Ask::new("HEAD", "/film").range("bytes=0-0");
    let reply = cluster.node(1).ask(ask).await;
    assert_eq!(
        (reply.status, reply.header("content-length")),
        (200, (3 * SLICE + 1).to_string().as_str())
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_has_passed_this_cluster_before() {
    let cluster = tiny_slices().await;
    let film = cluster.origin.publish("/film", 3 * SLICE);
    cluster.node(1).get("/film").await;
    let ours = film.seen()[0].header("cdn-loop").to_owned();
    assert!(ours.starts_with("pingora-slice-"), "{ours}");
    for (passed, status) in [
        (ours.clone(), 508),
        (format!("other; a=b, {ours}; x"), 508),
        ("other".to_owned(), 200),
        ("pingora-slice-0".to_owned(), 200),
    ] {
        let ask = Ask::get("/film").header("CDN-Loop", &passed);
        let reply = cluster.node(1).ask(ask).await;
        assert_eq!(reply.status, status, "{passed}");
        let is_a_loop = reply.header("cache-status").ends_with("; detail=loop");
        assert_eq!(is_a_loop, status == 508, "{passed}");
        // Whatever the method: what is proxied goes round as well.
        for method in ["POST", "DELETE", "OPTIONS"] {
            let ask = Ask::new(method, "/film").header("CDN-Loop", &passed);
            let reply = cluster.node(1).ask(ask).await;
            assert_eq!(reply.status, status, "{method}, {passed}");
        }
    }
    let posts = |seen: &[Seen]| seen.iter().filter(|seen| seen.method == "POST").count();
    assert_eq!(posts(&film.seen()), 2, "no loop reaches the origin");
}

/// A range or a condition on what is not kept is the origin's to judge; on what
/// is not here yet it is judged as if it were.
#[tokio::test(flavor = "multi_thread")]
async fn conditions_hold_for_what_is_not_here() {
    let cluster = tiny_slices().await;
    let node = cluster.node(1);
    let answers = [
        (vec![("If-None-Match", "TAG")], 304),
        (vec![("If-Match", "\"x\"")], 412),
        (vec![("Range", "bytes=0-2")], 206),
        (vec![("Range", "bytes=900-")], 416),
        (vec![("Range", "bytes=900-"), ("If-None-Match", "TAG")], 304),
        (vec![("Range", "bytes=900-"), ("If-Match", "\"x\"")], 412),
    ];
    for control in ["no-store", "private", "max-age=60"] {
        for length in [SLICE - 2, 3 * SLICE + 1] {
            for (n, (fields, status)) in answers.iter().enumerate() {
                let path = format!("/{control}/{length}/{n}");
                let film = cluster.origin.publish(&path, length);
                film.header("Cache-Control", control);
                let etag = Ask::get(&path).send(cluster.origin.address()).await;
                let etag = etag.unwrap().header("etag").to_owned();
                let ask = |method| {
                    fields
                        .iter()
                        .fold(Ask::new(method, &path), |ask, (name, value)| {
                            ask.header(name, value.replace("TAG", &etag))
                        })
                };
                let has_range = fields.iter().any(|(name, _)| *name == "Range");
                if !has_range {
                    let reply = node.ask(ask("HEAD")).await;
                    assert_eq!(reply.status, *status, "HEAD {path} {fields:?}");
                }
                for _ in 0..2 {
                    let reply = node.ask(ask("GET")).await;
                    assert_eq!(reply.status, *status, "{path} {fields:?}");
                }
            }
        }
    }
    let cold = cluster.origin.publish("/cold", 3 * SLICE);
    let ask = Ask::new("HEAD", cold.path()).range("bytes=900-");
    assert_eq!(node.ask(ask).await.status, 200, "a range is for GET alone");
}

/// What is not kept is found out once, and then costs a request for each answer.
#[tokio::test(flavor = "multi_thread")]
async fn conditions_and_ranges_on_what_is_not_kept_cost_one_request() {
    let cluster = tiny_slices().await;
    let node = cluster.node(1);
    for (name, value, status) in [("If-Match", "\"x\"", 412), ("Range", "bytes=0-1", 206)] {
        let film = cluster.origin.publish(&format!("/{name}"), SLICE - 2);
        film.header("Cache-Control", "private");
        let ask = || node.ask(Ask::get(film.path()).header(name, value));
        assert_eq!(ask().await.status, status);
        cluster.origin.forget_log();
        for _ in 0..3 {
            assert_eq!(ask().await.status, status);
        }
        assert_eq!(film.seen().len(), 3, "{name}");
    }
}

/// RFC 9112 section 3.2.1, and RFC 9110 section 15.2: what is passed on reaches the
/// origin as any request does, and an old client as it can read it.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_passed_is_in_each_ones_form() {
    let cluster = TestCluster::alone().await;
    let node = cluster.node(1);
    let film = cluster.origin.publish("/film", 10);
    let post = "POST http://films.test/film?a HTTP/1.1\r\nHost: films.test\r\n\
                Content-Length: 1\r\nConnection: close\r\n\r\nx";
    raw(node.address(), post.as_bytes()).await.unwrap();
    let log = cluster.origin.log();
    let seen = log.last().expect("it is passed on");
    assert_eq!(seen.target, "/film?a");
    assert_eq!(seen.header("host"), "films.test");
    for (target, passed) in [("", "*"), ("/", "/"), ("?a", "/?a")] {
        let options = format!(
            "OPTIONS http://films.test{target} HTTP/1.1\r\nHost: films.test\r\n\
             Connection: close\r\n\r\n"
        );
        raw(node.address(), options.as_bytes()).await.unwrap();
        let log = cluster.origin.log();
        assert_eq!(log.last().expect("it is passed on").target, passed);
    }

    let interim = b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n\
                    HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";
    film.always(Fault::Garbage(interim.to_vec()));
    let get = "GET /film HTTP/1.0\r\nHost: films.test\r\nCache-Control: no-store\r\n\r\n";
    let answer = raw(node.address(), get.as_bytes()).await.unwrap();
    let answer = String::from_utf8_lossy(&answer);
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert!(answer.ends_with("ok"), "{answer}");
}

/// A client that wants nothing from the origin gets nothing from it, cache or none.
#[tokio::test(flavor = "multi_thread")]
async fn where_nothing_is_cached_only_if_cached_asks_nobody() {
    let options = Options::alone().set("enable_cache", false);
    let cluster = options.start().await;
    let film = cluster.origin.publish("/film", 10);
    let ask = Ask::get("/film").header("Cache-Control", "only-if-cached");
    assert_eq!(cluster.node(1).ask(ask).await.status, 504);
    assert_eq!(film.seen().len(), 0);
}

/// Framing that the next one may read otherwise is not sent on.
#[tokio::test(flavor = "multi_thread")]
async fn framing_that_could_be_misread_is_refused() {
    let cluster = tiny_slices().await;
    for (framing, status) in [
        ("Content-Length: 2, 2", 400),
        ("Content-Length: 2\r\nContent-Length: 2", 400),
        ("Content-Length: +2", 400),
        ("Transfer-Encoding: gzip, chunked", 501),
        ("Transfer-Encoding: xx", 501),
    ] {
        for method in ["POST", "GET"] {
            let request =
                format!("{method} /film HTTP/1.1\r\nHost: films.test\r\n{framing}\r\n\r\nab");
            let mut quick = Quick::connect(cluster.node(1).address()).await.unwrap();
            let answered = quick.ask(request.as_bytes()).await;
            assert!(
                matches!(answered, Ok(code) if code == status || code == 400),
                "{method} {framing}: {answered:?}"
            );
            // It may be the beginning of anything.
            assert!(
                quick
                    .ask(b"GET /film HTTP/1.1\r\nHost: films.test\r\n\r\n")
                    .await
                    .is_err()
            );
        }
    }
    assert!(cluster.origin.log().is_empty());
}

/// One answer after the other, as apt reads them: (status, body).
fn answers(mut bytes: &[u8], heads: &[&str]) -> Vec<(u16, Vec<u8>)> {
    let mut answers = Vec::new();
    for method in heads {
        let Some(end) = bytes.windows(4).position(|window| window == b"\r\n\r\n") else {
            break;
        };
        let head = String::from_utf8_lossy(&bytes[..end]).to_lowercase();
        let status = head["http/1.1 ".len()..][..3].parse().unwrap();
        let length = head
            .lines()
            .find_map(|line| line.strip_prefix("content-length: "))
            .map_or(0, |length| length.parse().unwrap());
        let length = if *method == "HEAD" || status == 304 {
            0
        } else {
            length
        };
        let body = &bytes[end + 4..][..length];
        answers.push((status, body.to_vec()));
        bytes = &bytes[end + 4 + length..];
    }
    assert!(bytes.is_empty(), "{}", String::from_utf8_lossy(bytes));
    answers
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_sent_at_once_are_answered_in_order() {
    let cluster = Options::cluster(3).start().await;
    let film = cluster.origin.publish("/film", 2 * SLICE_BYTES + 5);
    let other = cluster.origin.publish("/other", 1000);
    let plain = cluster.origin.publish("/plain", 3000);
    plain.header("Cache-Control", "no-store");
    let (film, other, plain) = (
        film.content().all(),
        other.content().all(),
        plain.content().all(),
    );
    let tail = &film[film.len() - 300..];
    // Method, target, field, status and body; cold for the first node, warm for the others.
    let asks: Vec<(&str, &str, &str, u16, &[u8])> = vec![
        ("GET", "/film", "X: y", 200, &film),
        ("GET", "/other", "X: y", 200, &other),
        ("HEAD", "/film", "X: y", 200, b""),
        ("GET", "/film", "Range: bytes=-300", 206, tail),
        ("GET", "/plain", "X: y", 200, &plain),
        (
            "GET",
            "/missing",
            "X: y",
            404,
            b"nothing is published here\n",
        ),
        ("GET", "/film", "If-None-Match: *", 304, b""),
        ("GET", "/film", "Range: bytes=99999999-", 416, b""),
        (
            "POST",
            "/film",
            "Content-Length: 4\r\n\r\nabcd",
            200,
            b"abcd",
        ),
        ("GET", "/other", "Range: bytes=1-2", 206, &other[1..3]),
        ("GET", "/film", "Connection: close", 200, &film),
    ];
    let mut sent = String::new();
    for (method, target, field, ..) in &asks {
        sent += &format!("{method} {target} HTTP/1.1\r\nHost: films.test\r\n{field}");
        sent += if field.contains("\r\n\r\n") {
            ""
        } else {
            "\r\n\r\n"
        };
    }
    let methods: Vec<&str> = asks.iter().map(|ask| ask.0).collect();
    for (node, piece) in cluster.nodes().iter().zip([sent.len(), 700, 97]) {
        let mut tcp = TcpStream::connect(node.address()).await.unwrap();
        tcp.set_nodelay(true).unwrap();
        let (mut reads, mut writes) = tcp.split();
        let mut read = Vec::new();
        let write = async {
            for piece in sent.as_bytes().chunks(piece) {
                writes.write_all(piece).await.unwrap();
                tokio::task::yield_now().await;
            }
        };
        let (_, end) = tokio::join!(
            write,
            timeout(Duration::from_secs(60), reads.read_to_end(&mut read))
        );
        end.expect("an end").unwrap();
        let answers = answers(&read, &methods);
        assert_eq!(answers.len(), asks.len());
        for ((status, body), (method, target, field, expected, bytes)) in answers.iter().zip(&asks)
        {
            assert_eq!(status, expected, "{method} {target} {field}");
            assert!(
                body == bytes,
                "{method} {target} {field}: {} bytes",
                body.len()
            );
        }
    }
}

/// What looks like a request in a body that nobody read is not answered as one.
#[tokio::test(flavor = "multi_thread")]
async fn a_body_is_never_taken_for_a_request() {
    let cluster = tiny_slices().await;
    let node = cluster.node(1);
    let film = cluster.origin.publish("/film", 3 * SLICE);
    cluster.origin.publish("/never", SLICE);
    node.read(&film).await;
    let inner = "GET /never HTTP/1.1\r\nHost: films.test\r\n\r\n";
    for head in [
        "GET /film HTTP/1.1\r\nHost: films.test",
        "HEAD /film HTTP/1.1\r\nHost: films.test",
        "POST /film HTTP/1.1\r\nHost: films.test",
        "PURGE /film HTTP/1.1\r\nHost: films.test",
        "GET /a..b HTTP/1.1\r\nHost: films..test..",
        "GET * HTTP/1.1\r\nHost: films.test",
    ] {
        for late in [false, true] {
            let framing = format!("Content-Length: {}\r\n\r\n", inner.len());
            let mut tcp = TcpStream::connect(node.address()).await.unwrap();
            let head = format!("{head}\r\n{framing}");
            if late {
                tcp.write_all(head.as_bytes()).await.unwrap();
                // Some are answered before the body is there.
                let _ = timeout(Duration::from_millis(100), tcp.readable()).await;
                let _ = tcp.write_all(inner.as_bytes()).await;
            } else {
                let _ = tcp.write_all(format!("{head}{inner}").as_bytes()).await;
            }
            let _ = tcp.shutdown().await;
            let mut read = Vec::new();
            let end = timeout(Duration::from_secs(60), tcp.read_to_end(&mut read)).await;
            // A reset is an end, too.
            let _ = end.expect("an end");
        }
    }
    let never = |seen: &pingora_slice_tests::origin::Seen| seen.target == "/never";
    assert!(!cluster.origin.log().iter().any(never));
}
