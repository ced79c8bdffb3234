//! Promise P4: memory is the configured budget, whatever clients and origins do,
//! and patience with both has an end.

use std::time::{Duration, Instant};

use futures::stream::{self, StreamExt};
use pingora_slice_tests::{
    Ask, Fault, Film, MIB, Node, Options, SLICE_BYTES, TestCluster, Validators,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::timeout;

/// Longest wait for a client's head, and for anything else that must come.
const WAIT_MAX: Duration = Duration::from_secs(60);
/// A client that took nothing for this long takes nothing more.
const STILL_FOR: Duration = Duration::from_secs(1);

/// A client that has asked, has its head and a byte, and takes nothing more.
struct Stalled {
    tcp: TcpStream,
    /// The first byte of the object that is still to be read.
    at: u64,
}

impl Stalled {
    async fn start(node: &Node, film: &Film, from: u64) -> Stalled {
        let socket = TcpSocket::new_v4().unwrap();
        // The kernel takes little of its own accord.
        socket.set_recv_buffer_size(4096).unwrap();
        let mut tcp = socket.connect(node.address()).await.unwrap();
        let request = format!(
            "GET {} HTTP/1.1\r\nHost: films.test\r\nRange: bytes={from}-\r\n\r\n",
            film.path()
        );
        tcp.write_all(request.as_bytes()).await.unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let byte = timeout(WAIT_MAX, tcp.read_u8()).await;
            head.push(byte.expect("a head in time").expect("a whole head"));
        }
        assert!(
            head.starts_with(b"HTTP/1.1 206 "),
            "{}",
            String::from_utf8_lossy(&head)
        );
        let mut stalled = Stalled { tcp, at: from };
        stalled.take(film, 1).await;
        stalled
    }

    /// Takes this many more bytes and compares them.
    async fn take(&mut self, film: &Film, bytes: u64) {
        let mut taken = vec![0; bytes as usize];
        let reading = self.tcp.read_exact(&mut taken);
        let read = timeout(WAIT_MAX, reading).await;
        read.expect("bytes in time")
            .expect("an answer that goes on");
        assert_eq!(film.content().difference(self.at, &taken), None);
        self.at += bytes;
    }

    /// Reads until the connection ends; how many bytes came.
    async fn drain(&mut self) -> u64 {
        let mut rest = vec![0; 64 * 1024];
        let mut read = 0;
        // A reset is an end, too.
        while let Ok(more) = timeout(WAIT_MAX, self.tcp.read(&mut rest))
            .await
            .expect("an end in time")
            && more > 0
        {
            read += more as u64;
        }
        read
    }
}

/// This many clients at places of their own in one object.
async fn stall(node: &Node, film: &Film, clients: u64) -> Vec<Stalled> {
    let step = film.length() / (clients + 1);
    stream::iter(0..clients)
        .map(|n| Stalled::start(node, film, n * step + 12_345))
        .buffer_unordered(64)
        .collect()
        .await
}

/// A metric of the memory budget.
async fn part(node: &Node, metric: &str, part: &str) -> u64 {
    let name = format!("{metric}{{part=\"{part}\"}}");
    let metrics = node.metrics().await;
    metrics.sample(&name).expect("a metric that is there") as u64
}

fn check_memory(node: &Node, budget: u64, when: &str) {
    let resident = node.resident_bytes_max();
    println!(
        "{when}: {} MiB resident at most, of {} MiB",
        resident / MIB,
        budget / MIB
    );
    assert!(
        resident <= budget,
        "{when}: {} MiB resident, {} MiB are the budget",
        resident / MIB,
        budget / MIB
    );
}

/// `STALLED_CLIENTS=1000` for the promise's own figure (`make stalled`).
#[tokio::test(flavor = "multi_thread")]
async fn stalled_clients_cost_no_more_than_the_budget() {
    let clients = std::env::var("STALLED_CLIENTS").map_or(300, |n| n.parse().unwrap());
    // 64 MiB, the disk queue, L1, and a share for each client, twice.
    let budget = (64 + 32 + 32) * MIB + 2 * clients * 192 * 1024;
    let cluster = Options::alone()
        .set("slice_size", "1m")
        .set("l1_cache_size_bytes", "32m")
        .set("l2_cache_size_bytes", "8g")
        .set("memory_budget", budget)
        .set("client_timeouts", "{write: 1h, min_rate: 0}")
        .start()
        .await;
    let node = cluster.node(1);
    let film = cluster.origin.publish("/film", 4096 * MIB);
    let mut stated = 0;
    for name in ["fixed", "queue", "l1", "connections", "transfers"] {
        stated += part(node, "memory_budget_bytes", name).await;
    }
    assert_eq!(stated, budget);
    println!("idle: {} MiB", node.resident_bytes_max() / MIB);

    for when in ["cold", "warm"] {
        let mut stalled = stall(node, &film, clients).await;
        check_memory(node, budget, when);
        // What was read ahead for them is let go.
        let all = part(node, "memory_budget_bytes", "transfers").await;
        node.until("half of the transfers' share is free", async || {
            part(node, "memory_taken_bytes", "transfers").await <= all / 2
        })
        .await;
        // So there is room for those who do read,
        let other = cluster.origin.publish(&format!("/{when}"), 32 * MIB);
        node.read(&other).await;
        // and whoever goes on gets the rest, from wherever it is now.
        for client in stalled.iter_mut().step_by(17) {
            client.take(&film, 3 * MIB).await;
        }
        check_memory(node, budget, &format!("{when}, after going on"));
        drop(stalled);
        node.until("the connections are gone", async || {
            part(node, "memory_taken_bytes", "connections").await < MIB
        })
        .await;
    }
    assert_eq!(part(node, "memory_taken_bytes", "transfers").await, 0);
    assert_eq!(node.metric("memory_refusals_total").await, 0.0);
}

/// Connections beyond the budget are closed or wait; those within are served.
#[tokio::test(flavor = "multi_thread")]
async fn connections_beyond_the_budget_are_not_taken() {
    // Room for 16 slices of 256 KiB, and so for as many bytes of connections.
    let cluster = Options::alone()
        .set("enable_l2_cache", false)
        .set("l1_cache_size_bytes", "16m")
        .set("memory_budget", "92m")
        .start()
        .await;
    let node = cluster.node(1);
    let film = cluster.origin.publish("/film", 8 * SLICE_BYTES);
    node.read(&film).await;
    let mut idle = Vec::new();
    // 6 MiB are 38 connections; 64 more may wait, and the rest are closed.
    for _ in 0..150 {
        idle.push(TcpStream::connect(node.address()).await.unwrap());
    }
    node.until("some are refused", async || {
        node.metric("memory_refusals_total").await >= 40.0
    })
    .await;
    let all = part(node, "memory_budget_bytes", "connections").await;
    assert!(part(node, "memory_taken_bytes", "connections").await <= all);
    drop(idle);
    node.until("there is room again", async || {
        part(node, "memory_taken_bytes", "connections").await == 0
    })
    .await;
    node.read(&film).await;
}

/// More slices are wanted at once than fit the budget: they wait for one another.
/// An idle connection of HTTP/2 has its share, too, and all of them leave room for
/// what is asked.
#[tokio::test(flavor = "multi_thread")]
async fn http2_connections_are_within_the_budget() {
    const SHARE: u64 = 160 << 10;
    let mut cluster = Options::alone()
        .set("enable_l2_cache", false)
        .set("l1_cache_size_bytes", "16m")
        .set("memory_budget", "92m")
        .prepare()
        .await;
    let address = cluster.node(1).address();
    let node = cluster.node_mut(1);
    node.set("listen", format!("[{{address: \"{address}\", h2: true}}]"));
    node.spawn();
    node.until_ready().await;
    let node = cluster.node(1);
    let mut idle = Vec::new();
    for _ in 0..60 {
        let mut tcp = TcpStream::connect(address).await.unwrap();
        // The preface, and settings that change nothing.
        let begin = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
        tcp.write_all(begin).await.unwrap();
        idle.push(tcp);
    }
    // 6 MiB are 38 shares: 19 for these, and 19 for what they ask.
    node.until("those beyond half are refused", async || {
        node.metric("memory_refusals_total").await >= 41.0
            && part(node, "memory_taken_bytes", "connections").await == 19 * SHARE
    })
    .await;
    let film = cluster.origin.publish("/film", 8 * SLICE_BYTES);
    node.read(&film).await;
    drop(idle);
    node.until("there is room again", async || {
        part(node, "memory_taken_bytes", "connections").await == 0
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn more_slices_than_fit_wait_for_one_another() {
    let cluster = Options::alone()
        .set("enable_l2_cache", false)
        .set("l1_cache_size_bytes", "1m")
        .set("memory_budget", "77m")
        .start()
        .await;
    let node = cluster.node(1);
    let films: Vec<Film> = (0..30)
        .map(|n| {
            cluster
                .origin
                .publish(&format!("/film{n}"), 8 * SLICE_BYTES)
        })
        .collect();
    let gates: Vec<_> = films.iter().map(|film| film.hold_at(1000)).collect();
    let reading: Vec<_> = films.iter().map(|film| node.reading(film)).collect();
    let all = part(node, "memory_budget_bytes", "transfers").await;
    node.until("the transfers' share is taken", async || {
        part(node, "memory_taken_bytes", "transfers").await > all - 2 * SLICE_BYTES
    })
    .await;
    drop(gates);
    for (reading, film) in reading.into_iter().zip(&films) {
        let reply = reading.await.unwrap().unwrap();
        assert!(reply.body == film.content().all(), "{}", film.path());
    }
    node.until("everything is given back", async || {
        part(node, "memory_taken_bytes", "transfers").await == 0
    })
    .await;
    assert_eq!(node.metric("memory_refusals_total").await, 0.0);
}

/// A node where at most 16 slices are under way, and clients may stall.
async fn with_room_for_16_slices() -> TestCluster {
    Options::alone()
        .set("l1_cache_size_bytes", "1m")
        .set("memory_budget", "109m")
        .set("client_timeouts", "{write: 1h, min_rate: 0}")
        .start()
        .await
}

/// Clients that take what is stored, slowly, do not wait for one another: whatever
/// their number, half of the memory for slices on their way is left.
#[tokio::test(flavor = "multi_thread")]
async fn slow_clients_leave_half_of_the_memory_to_others() {
    const CLIENTS: u64 = 60;
    let cluster = Options::cluster(3)
        .set("l1_cache_size_bytes", "1m")
        .set("memory_budget", "120m")
        .set("client_timeouts", "{write: 1h, min_rate: 0}")
        .start()
        .await;
    let node = cluster.node(1);
    let film = cluster.origin.publish("/film", 64 * MIB);
    node.read(&film).await;
    let all = part(node, "memory_budget_bytes", "transfers").await;
    let mut most = 0;
    let clients = stall(node, &film, CLIENTS).await;
    let reading = stream::iter(clients).for_each_concurrent(None, async |mut client| {
        for _ in 0..8 {
            client.take(&film, 100 * 1024).await;
            // As slowly as it may without being taken for one that stalls.
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
    });
    let looking = async {
        loop {
            most = most.max(part(node, "memory_taken_bytes", "transfers").await);
        }
    };
    tokio::select! {
        () = reading => {}
        () = looking => unreachable!("it has no end"),
    }
    assert!(most <= all / 2 + 2 * SLICE_BYTES, "{most} of {all}");
    assert_eq!(node.metric("memory_refusals_total").await, 0.0);
}

/// Waits until clients that take nothing have as much as fits on the way.
async fn until_they_stall(node: &Node) {
    let mut given = (0.0, Instant::now());
    node.until("they have as much as fits on the way", async || {
        let bytes = node.metric("bytes_to_client_total").await;
        if bytes > given.0 {
            given = (bytes, Instant::now());
        }
        bytes > 0.0 && given.1.elapsed() > STILL_FOR
    })
    .await;
}

/// A body without a length is given up by clients that stall while memory is
/// short, and they get every byte of it all the same.
#[tokio::test(flavor = "multi_thread")]
async fn a_body_without_a_length_goes_on_after_a_stall() {
    let cluster = with_room_for_16_slices().await;
    let node = cluster.node(1);
    let film = cluster.origin.publish("/film", 64 * MIB);
    film.always(Fault::NoLength);
    let mut stalled = Vec::new();
    for _ in 0..3 {
        stalled.push(node.open(Ask::get("/film")).await);
    }
    until_they_stall(node).await;
    // Three quarters of the room that slices under way have.
    let films: Vec<Film> = (0..12)
        .map(|n| cluster.origin.publish(&format!("/film{n}"), SLICE_BYTES))
        .collect();
    let gates: Vec<_> = films.iter().map(|film| film.hold_at(1000)).collect();
    let reading: Vec<_> = films.iter().map(|film| node.reading(film)).collect();
    node.until("they are let go", async || {
        node.metric("answers_stalled_total").await >= 3.0
    })
    .await;
    drop(gates);
    for mut stream in stalled {
        let mut at = 0;
        while let Some(piece) = stream
            .next()
            .await
            .unwrap_or_else(|e| panic!("{e:#} at {at}\n{}", node.log()))
        {
            assert_eq!(film.content().difference(at, &piece), None, "after {at}");
            at += piece.len() as u64;
        }
        assert_eq!(at, film.length());
    }
    for reading in reading {
        assert_eq!(reading.await.unwrap().unwrap().status, 200);
    }
}

/// A body that cannot be asked for again stays for those who come close behind; a
/// small one does not keep the room of a whole slice for that.
#[tokio::test(flavor = "multi_thread")]
async fn small_bodies_without_a_length_hold_no_more_than_they_are() {
    let cluster = Options::alone().set("enable_l2_cache", false).start().await;
    let node = cluster.node(1);
    for n in 0..8 {
        let film = cluster.origin.publish(&format!("/film{n}"), 1000);
        film.validators(Validators::Nothing).always(Fault::NoLength);
        assert_eq!(node.get(film.path()).await.body, film.content().all());
    }
    let taken = async || part(node, "memory_taken_bytes", "transfers").await;
    node.until("they give back what they do not need", async || {
        taken().await < SLICE_BYTES
    })
    .await;
    assert!(taken().await > 0, "they are held no more");
}

/// What bodies hold for clients that stall is there for those who wait.
#[tokio::test(flavor = "multi_thread")]
async fn bodies_that_nobody_reads_give_their_memory_to_others() {
    let cluster = with_room_for_16_slices().await;
    let node = cluster.node(1);
    let mut stalled = Vec::new();
    for n in 0..3 {
        let film = cluster.origin.publish(&format!("/film{n}"), 64 * MIB);
        film.always(Fault::NoLength);
        stalled.push(node.open(Ask::get(film.path())).await);
    }
    until_they_stall(node).await;
    let other = cluster.origin.publish("/other", SLICE_BYTES);
    let asked = Instant::now();
    node.read(&other).await;
    // Half of the time after which it would be refused.
    let took = asked.elapsed();
    assert!(took < Duration::from_secs(15), "{took:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_below_the_minimum_rate_is_let_go() {
    let cluster = Options::alone()
        .set(
            "client_timeouts",
            "{min_rate: 64k, min_rate_for: 2s, write: 1h}",
        )
        .start()
        .await;
    let node = cluster.node(1);
    let film = cluster.origin.publish("/film", 64 * MIB);
    let mut still = Stalled::start(node, &film, 0).await;
    let mut slow = Stalled::start(node, &film, 1).await;
    let reading_slowly = async {
        loop {
            slow.take(&film, 100).await;
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    tokio::select! {
        () = reading_slowly => unreachable!("it has no end"),
        () = node.until("both are let go", async || {
            node.metric("clients_too_slow_total").await == 2.0
        }) => {}
    }
    for client in [&mut still, &mut slow] {
        let from = client.at;
        assert!(from + client.drain().await < film.length());
    }
    // Whoever reads on is not.
    node.read(&film).await;
    assert_eq!(node.metric("clients_too_slow_total").await, 2.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_ends_at_its_total_deadline() {
    let cluster = Options::alone()
        .set("client_timeouts", "{total: 2s}")
        .start()
        .await;
    let node = cluster.node(1);
    let film = cluster.origin.publish("/film", 2 * SLICE_BYTES);
    let gate = film.hold_at(1000);
    let mut stream = node.open(Ask::get("/film")).await;
    while let Ok(piece) = stream.next().await {
        assert!(piece.is_some(), "no proper end");
    }
    assert_eq!(node.metric("clients_too_slow_total").await, 1.0);
    drop(gate);
    node.read(&film).await;
    // Before its first byte, too: by no status, for none would be true.
    let silent = cluster.origin.publish("/silent", SLICE_BYTES);
    silent.always(Fault::StallAfter(0));
    for (n, range) in ["bytes=0-9", "bytes=0-0,9-9"].into_iter().enumerate() {
        let reply = Ask::get("/silent").range(range).send(node.address()).await;
        assert!(reply.is_err(), "{range}: {reply:?}");
        assert_eq!(node.metric("clients_too_slow_total").await, 2.0 + n as f64);
    }
}

/// One silent origin, and the time that its clients wait in all.
#[tokio::test(flavor = "multi_thread")]
async fn an_origin_has_one_deadline_for_all_tries() {
    let cluster: TestCluster = Options::alone()
        .set("origin_timeouts", "{total: 2s, read: 1h, total_header: 1h}")
        .start()
        .await;
    let node = cluster.node(1);
    let film = cluster.origin.publish("/silent", SLICE_BYTES);
    film.always(Fault::Delay(Duration::from_secs(3600)));
    assert_eq!(node.get("/silent").await.status, 504);
    // A slice that never ends: the answer is cut, and the slice not kept.
    let film = cluster.origin.publish("/stalls", 2 * SLICE_BYTES);
    film.always(Fault::StallAfter(1000));
    let mut stream = node.open(Ask::get("/stalls")).await;
    assert_eq!(stream.status, 200);
    while let Ok(piece) = stream.next().await {
        assert!(piece.is_some(), "no proper end");
    }
    film.behave();
    node.read(&film).await;
}
