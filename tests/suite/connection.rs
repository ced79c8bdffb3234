//! One connection of HTTP/1.1: requests that are answered in different ways
//! share it, and nobody holds it up forever.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use bytes::Bytes;
use pingora_slice_tests::http::{Reply, raw};
use pingora_slice_tests::{Ask, Fault, Film, KIB, MIB, Node, Options, SLICE_BYTES, TestCluster};
use socket2::{Domain, Socket, Type};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Takes one answer off the front of what a connection carried.
fn take_answer(bytes: &mut Bytes, has_body: bool) -> (u16, HashMap<String, String>, Bytes) {
    let mut fields = [httparse::EMPTY_HEADER; 64];
    let mut head = httparse::Response::new(&mut fields);
    let httparse::Status::Complete(length) = head.parse(bytes).unwrap() else {
        panic!("{bytes:?} is no answer");
    };
    let status = head.code.unwrap();
    let fields: HashMap<String, String> = head
        .headers
        .iter()
        .map(|field| {
            let value = String::from_utf8_lossy(field.value).into_owned();
            (field.name.to_ascii_lowercase(), value)
        })
        .collect();
    let _head = bytes.split_to(length);
    let body = match has_body {
        true => bytes.split_to(fields["content-length"].parse().unwrap()),
        false => Bytes::new(),
    };
    (status, fields, body)
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_of_all_kinds_share_a_connection() {
    let cluster = TestCluster::alone().await;
    let node = cluster.node(1);
    let small = cluster.origin.publish("/small", 20 * KIB);
    let large = cluster.origin.publish("/large", 3 * SLICE_BYTES + 1);
    let cold = cluster.origin.publish("/cold", 2 * SLICE_BYTES);
    node.read(&small).await;
    node.read(&large).await;

    // One after the other without waiting, each answered in its own way.
    let asked = [
        ("GET", "/small", "", ""),
        ("GET", "/large", "", ""),
        ("HEAD", "/small", "", ""),
        ("GET", "/cold", "", ""),
        ("GET", "/small", "Range: bytes=5-14\r\n", ""),
        ("GET", "/large", "Range: bytes=-70000\r\n", ""),
        ("GET", "/small", "Range: bytes=99999-\r\n", ""),
        ("GET", "/small", "Range: bytes=0-0,2-2\r\n", ""),
        ("POST", "/nothing", "Content-Length: 5\r\n", "hello"),
        ("GET", "/small", "", ""),
        (
            "POST",
            "/nothing",
            "Transfer-Encoding: chunked\r\n",
            "3\r\nabc\r\n0\r\n\r\n",
        ),
        ("GET", "/large", "", ""),
        ("GET", "/small", "Connection: close\r\n", ""),
    ];
    let all: String = asked
        .iter()
        .map(|(method, path, fields, body)| {
            format!("{method} {path} HTTP/1.1\r\nHost: films.test\r\n{fields}\r\n{body}")
        })
        .collect();
    let mut bytes = Bytes::from(raw(node.address(), all.as_bytes()).await.unwrap());
    for (n, (method, path, fields, _)) in asked.iter().enumerate() {
        let what = format!("{n}: {method} {path} {fields}");
        let (status, head, body) = take_answer(&mut bytes, *method != "HEAD");
        let film = match *path {
            "/small" => &small,
            "/large" => &large,
            "/cold" => &cold,
            _ => {
                assert_eq!(head["x-cache"], "PASS", "{what}");
                continue;
            }
        };
        let whole = film.content().all();
        let (wanted, body_wanted): (u16, &[u8]) = match *fields {
            "Range: bytes=5-14\r\n" => (206, &whole[5..15]),
            "Range: bytes=-70000\r\n" => (206, &whole[whole.len() - 70_000..]),
            "Range: bytes=99999-\r\n" => (416, &[]),
            "Range: bytes=0-0,2-2\r\n" => {
                assert_eq!(status, 206, "{what}");
                continue;
            }
            _ if *method == "HEAD" => (200, &[]),
            _ => (200, &whole),
        };
        assert_eq!(status, wanted, "{what}");
        assert!(body == body_wanted, "{what}: {} bytes", body.len());
        let hit = if *path == "/cold" { "MISS" } else { "HIT" };
        assert_eq!(head["x-cache"], hit, "{what}");
        let connection = if fields.contains("close") {
            "close"
        } else {
            "keep-alive"
        };
        assert_eq!(head["connection"], connection, "{what}");
    }
    assert!(bytes.is_empty(), "{} bytes more", bytes.len());
}

/// Heads that only Pingora can read: what was sent behind them is answered after them.
#[tokio::test(flavor = "multi_thread")]
async fn answers_keep_their_order_behind_an_odd_head() {
    let cluster = TestCluster::alone().await;
    let node = cluster.node(1);
    let small = cluster.origin.publish("/small", 20 * KIB);
    let other = cluster.origin.publish("/other", 10 * KIB);
    node.read(&small).await;
    node.read(&other).await;
    let many: String = (0..70).map(|n| format!("X-{n}: y\r\n")).collect();
    for odd in [
        "GET /small?a b HTTP/1.1\r\nHost: films.test\r\n\r\n".to_owned(),
        format!("GET /small HTTP/1.1\r\nHost: films.test\r\n{many}\r\n"),
    ] {
        let plain =
            |path, fields| format!("GET {path} HTTP/1.1\r\nHost: films.test\r\n{fields}\r\n");
        let all = [
            odd,
            plain("/other", ""),
            plain("/small", ""),
            plain("/other", "Connection: close\r\n"),
        ];
        let mut bytes = Bytes::from(raw(node.address(), all.concat().as_bytes()).await.unwrap());
        take_answer(&mut bytes, true);
        for film in [&other, &small, &other] {
            let (status, _, body) = take_answer(&mut bytes, true);
            assert_eq!(status, 200);
            assert!(body == film.content().all(), "not {}", film.path());
        }
        assert!(bytes.is_empty());
    }
}

/// Promise P4: a head takes no more than a connection's share has for it.
#[tokio::test(flavor = "multi_thread")]
async fn a_head_has_a_bound() {
    let cluster = TestCluster::alone().await;
    let node = cluster.node(1);
    let small = cluster.origin.publish("/small", 20 * KIB);
    node.read(&small).await;
    let head = |bytes: usize| {
        let begin = "GET /small HTTP/1.1\r\nHost: films.test\r\nConnection: close\r\nX: ";
        format!("{begin}{}\r\n\r\n", "y".repeat(bytes - begin.len() - 4))
    };
    // The same behind a request after which Pingora reads for itself.
    let odd = "GET /small?a b HTTP/1.1\r\nHost: films.test\r\n\r\n";
    // What Pingora read while it answered that one is not counted.
    for (before, beyond) in [("", 80 << 10), (odd, 200 << 10)] {
        for (bytes, wanted) in [(63 << 10, 200), (beyond, 431), (900 << 10, 431)] {
            let asked = Instant::now();
            let all = [before, &head(bytes)].concat();
            let mut answers = Bytes::from(raw(node.address(), all.as_bytes()).await.unwrap());
            if !before.is_empty() {
                take_answer(&mut answers, true);
            }
            let (status, head, body) = take_answer(&mut answers, true);
            assert_eq!(status, wanted, "{bytes} after {before:?}");
            assert_eq!(head["connection"], "close");
            assert!(status != 200 || body == small.content().all());
            assert!(asked.elapsed() < Duration::from_secs(10), "{bytes}");
        }
    }
}

/// What the two ways of a hit say of it is the same.
#[tokio::test(flavor = "multi_thread")]
async fn both_ways_of_a_hit_tell_the_same() {
    let cluster = TestCluster::alone().await;
    let node = cluster.node(1);
    let small = cluster.origin.publish("/small", 20 * KIB);
    let large = cluster.origin.publish("/large", 3 * SLICE_BYTES + 1);
    let behind = cluster.origin.publish("/behind-a-cache", 20 * KIB);
    behind
        .header("age", "5")
        .header("x-cache", "MISS")
        .header("via", "1.1 other")
        .header("cache-status", "other; hit");
    for film in [&small, &large, &behind] {
        node.read(film).await;
        let etag = node.get(film.path()).await.header("etag").to_owned();
        for (name, value) in [
            ("accept", "*/*"),
            ("range", "bytes=7-1000"),
            ("range", "bytes=-1"),
            ("range", "bytes=99999999-"),
            ("if-none-match", &etag),
            ("if-match", "\"other\""),
            ("if-range", &etag),
        ] {
            for method in ["GET", "HEAD"] {
                let ask = Ask::new(method, film.path()).header(name, value);
                let short = node.ask(ask.clone()).await;
                // `TE` says nothing about the answer, but a head with
                // `Connection: te` is no plain one.
                let long = node
                    .ask(ask.header("te", "trailers").header("connection", "te"))
                    .await;
                let what = format!("{method} {} {name}: {value}", film.path());
                assert_eq!(short.status, long.status, "{what}");
                assert!(short.body == long.body, "{what}");
                assert_eq!(short.header("x-cache"), "HIT", "{what}");
                for name in ["age", "x-cache"] {
                    let lines = |reply: &Reply| reply.headers.get_all(name).iter().count();
                    assert_eq!((lines(&short), lines(&long)), (1, 1), "{what}");
                }
                let told = |reply: &Reply| {
                    let mut fields: Vec<(String, String)> = reply
                        .headers
                        .iter()
                        .filter(|(name, _)| {
                            !["age", "date", "cache-status"].contains(&name.as_str())
                        })
                        .map(|(name, value)| (name.to_string(), value.to_str().unwrap().into()))
                        .collect();
                    fields.sort();
                    fields
                };
                assert_eq!(told(&short), told(&long), "{what}");
                if short.status < 400 {
                    assert_eq!(short.header("date"), long.header("date"), "{what}");
                }
            }
        }
    }
}

/// A miss asks the origin for the same, whichever way its answer goes, and tells
/// the same: what the short way has found out is not asked for again.
#[tokio::test(flavor = "multi_thread")]
async fn both_ways_of_a_miss_ask_and_tell_the_same() {
    let cluster = TestCluster::alone().await;
    let node = cluster.node(1);
    let kinds = [
        ("stored", None),
        ("missing", Some(Fault::Status(404))),
        ("refused", Some(Fault::Status(403))),
        ("no-ranges", Some(Fault::IgnoreRange)),
        ("no-length", Some(Fault::NoLength)),
        ("no-store", None),
    ];
    for (kind, fault) in kinds {
        for length in [0, 20 * KIB, 2 * SLICE_BYTES + 5] {
            for fields in [
                &[][..],
                &[("range", "bytes=3-9")],
                &[("if-none-match", "\"x\"")],
            ] {
                let mut told = Vec::new();
                for (way, connection) in [("short", "close"), ("long", "te")] {
                    let path = format!("/{kind}-{length}-{}-{way}", fields.len());
                    let path = format!("{path}{}", fields.first().map_or("", |(name, _)| name));
                    let film = cluster.origin.publish(&path, length);
                    if kind == "no-store" {
                        film.header("cache-control", "no-store");
                    }
                    if let Some(fault) = &fault {
                        film.always(fault.clone());
                    }
                    let mut ask = Ask::get(film.path()).header("connection", connection);
                    for (name, value) in fields {
                        ask = ask.header(name, value);
                    }
                    let reply = node.ask(ask).await;
                    let mut asked: Vec<String> = film
                        .seen()
                        .iter()
                        .map(|seen| seen.header("range").to_owned())
                        .collect();
                    asked.sort();
                    let said = ["x-cache", "content-length", "content-range", "cache-status"];
                    let said = said
                        .map(|name| reply.header(name).split("; ttl").next().map(str::to_owned));
                    told.push((reply.status, reply.body.len(), said, asked));
                }
                let [short, long] = &told[..] else { panic!() };
                assert_eq!(short, long, "{kind} {length} {fields:?}");
            }
        }
    }
}

/// That a version is gone is found out once: where its manifest lies on disk, and
/// in memory.
#[tokio::test(flavor = "multi_thread")]
async fn both_ways_ask_once_for_a_version_that_is_gone() {
    let mut cluster = TestCluster::alone().await;
    for is_restarted in [true, false] {
        let mut told = Vec::new();
        for (way, connection) in [("short", "close"), ("long", "te")] {
            let path = format!("/{way}-{is_restarted}");
            let film = cluster.origin.publish(&path, 4 * SLICE_BYTES);
            cluster.node(1).read_range(&film, 0, 10).await;
            if is_restarted {
                cluster.node_mut(1).terminate().await;
                cluster.node_mut(1).restart().await;
            }
            film.change();
            let before = film.seen().len();
            let last = 4 * SLICE_BYTES - 1;
            let range = format!("bytes={}-{last}", 3 * SLICE_BYTES);
            let ask = Ask::get(&path).header("connection", connection);
            let reply = cluster.node(1).ask(ask.range(&range)).await;
            assert_eq!(reply.status, 206, "{path}");
            let at = 3 * SLICE_BYTES;
            assert_eq!(film.content().difference(at, &reply.body), None, "{path}");
            let asked: Vec<String> = film.seen()[before..]
                .iter()
                .map(|seen| format!("{} {}", seen.header("range"), seen.status))
                .collect();
            told.push(asked);
        }
        assert_eq!(told[0], told[1], "restarted: {is_restarted}");
    }
}

/// While nobody knows where it ends, an answer is in chunks, a hit too.
#[tokio::test(flavor = "multi_thread")]
async fn a_hit_whose_length_is_not_known_yet_has_an_end() {
    let cluster = TestCluster::alone().await;
    let node = cluster.node(1);
    let film = cluster.origin.publish("/film", 6 * SLICE_BYTES + 17);
    film.always(Fault::NoLength);
    let gate = film.hold_at(4 * SLICE_BYTES);
    let mut first = node.open(Ask::get("/film")).await;
    let mut taken = 0;
    while taken < 3 * SLICE_BYTES {
        taken += first.next().await.unwrap().unwrap().len() as u64;
    }
    let second = node.open(Ask::get("/film")).await;
    assert_eq!(second.header("transfer-encoding"), "chunked");
    drop(gate);
    let second = second.collect().await.unwrap();
    assert_eq!(film.content().difference(0, &second.body), None);
    assert_eq!(second.body.len() as u64, film.length());
    while let Some(piece) = first.next().await.unwrap() {
        taken += piece.len() as u64;
    }
    assert_eq!(taken, film.length());
}

/// A client that asks for a film over and over, and takes nothing of it.
struct Greedy {
    tcp: TcpStream,
    asked: u64,
}

impl Greedy {
    async fn start(node: &Node, film: &Film) -> Greedy {
        let address: SocketAddr = node.address();
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        // Small, so that it is soon full.
        socket.set_recv_buffer_size(4096).unwrap();
        socket.connect(&address.into()).unwrap();
        socket.set_nonblocking(true).unwrap();
        let mut tcp = TcpStream::from_std(socket.into()).unwrap();
        let asked = 512;
        let request = format!("GET {} HTTP/1.1\r\nHost: films.test\r\n\r\n", film.path());
        let all = request.repeat(asked as usize);
        tcp.write_all(all.as_bytes()).await.unwrap();
        let mut before = -1.0;
        node.until("it takes no more", async || {
            let now = node.metric("bytes_to_client_total").await;
            let stands = now == before && now > film.length() as f64;
            before = now;
            stands
        })
        .await;
        Greedy { tcp, asked }
    }

    /// Bytes that were still to come.
    async fn drain(mut self) -> u64 {
        let mut bytes = Vec::new();
        // A reset is an end, too.
        let _ = self.tcp.read_to_end(&mut bytes).await;
        bytes.len() as u64
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hard_purge_cuts_answers_that_nobody_takes() {
    let cluster = TestCluster::alone().await;
    let node = cluster.node(1);
    for (path, length) in [("/small", 60 * KIB), ("/large", 5 * SLICE_BYTES)] {
        let film = cluster.origin.publish(path, length);
        node.read(&film).await;
        let greedy = Greedy::start(node, &film).await;
        let asked = Instant::now();
        node.purge_with(film.path(), &[("x-purge-mode", "hard")])
            .await;
        assert!(asked.elapsed() < Duration::from_secs(10), "{path}");
        let all = greedy.asked * film.length();
        let bytes = greedy.drain().await;
        assert!(bytes < all, "{path}: {bytes} of {all}");
        node.read(&film).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_takes_no_small_answers_is_let_go() {
    let cluster = Options::alone()
        .set("client_timeouts", "{write: 2s}")
        .start()
        .await;
    let node = cluster.node(1);
    let film = cluster.origin.publish("/film", 60 * KIB);
    node.read(&film).await;
    let greedy = Greedy::start(node, &film).await;
    node.until("it is let go", async || {
        node.metric("clients_too_slow_total").await == 1.0
    })
    .await;
    assert!(greedy.drain().await < 512 * film.length());
}

/// Bytes that a process has read from files.
fn bytes_read(node: &Node) -> u64 {
    let io = std::fs::read_to_string(format!("/proc/{}/io", node.pid())).unwrap();
    let line = io.lines().find_map(|line| line.strip_prefix("rchar: "));
    line.unwrap().parse().unwrap()
}

/// A small object is its slice, and comes into memory with its first hit.
#[tokio::test(flavor = "multi_thread")]
async fn small_objects_on_disk_come_into_memory() {
    let mut cluster = TestCluster::alone().await;
    let film = cluster.origin.publish("/film", 20 * KIB);
    cluster.node(1).read(&film).await;
    // Written out, and then the memory is empty.
    cluster.node_mut(1).terminate().await;
    cluster.node_mut(1).spawn();
    cluster.node_mut(1).until_ready().await;
    let node = cluster.node(1);
    // Its manifest comes into memory alone.
    node.ask(Ask::new("HEAD", "/film")).await;
    // They are counted when they have been written.
    for source in ["l2", "l1"] {
        node.read(&film).await;
        let metric = format!("slices_total{{source=\"{source}\"}}");
        node.until("it is counted", async || node.metric(&metric).await == 1.0)
            .await;
    }
    assert_eq!(film.fetches(), 1);
}

/// 4 KiB at random places of what does not fit into memory do not cost a slice each.
#[tokio::test(flavor = "multi_thread")]
async fn small_ranges_from_disk_cost_their_own_bytes() {
    let cluster = Options::alone()
        .set("l1_cache_size_bytes", 2 * SLICE_BYTES)
        .start()
        .await;
    let node = cluster.node(1);
    let film = cluster.origin.publish("/film", 64 * MIB);
    node.read(&film).await;
    let before = bytes_read(node);
    let mut at = 1;
    for _ in 0..200 {
        // A generator of Lehmer: places all over the film, the same each time.
        at = at * 48_271 % 0x7fff_ffff;
        let start = at % (film.length() - 4096);
        node.read_range(&film, start, start + 4096).await;
    }
    let read = bytes_read(node) - before;
    assert!(read < 200 * 160 * KIB, "{} KiB", read / KIB);
    let from_disk = node.metric("slices_total{source=\"l2\"}").await;
    assert!(from_disk > 150.0, "{from_disk}");
}
