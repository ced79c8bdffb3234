//! What origins do, and what is right: a test for each row of the table in
//! docs/ENGINE.md. For each: what the client sees, what is stored, how often
//! the origin is asked, and what is counted.

use std::time::{Duration, SystemTime};

use pingora_slice_tests::cluster::Ports;
use pingora_slice_tests::http::{Reply, Stream};
use pingora_slice_tests::{
    Ask, Fault, Film, KIB, MIB, Node, Options, Origin, SLICE_BYTES, TestCluster, Validators,
};

const SLICES: u64 = 6;
const LENGTH: u64 = SLICES * SLICE_BYTES - 77;

/// One node that loses patience quickly.
async fn impatient() -> TestCluster {
    Options::alone()
        .set(
            "origin_timeouts",
            "{connect: 1s, read: 500ms, total_header: 1s}",
        )
        .set("max_retries", 1)
        .start()
        .await
}

fn asked(film: &Film) -> usize {
    film.seen().len()
}

async fn range(node: &Node, film: &Film, start: u64, end: u64) -> Reply {
    let range = format!("bytes={start}-{}", end - 1);
    node.ask(Ask::get(film.path()).range(&range)).await
}

/// Bytes of one version from the start on; how many, and whether the end was proper.
async fn drain(mut stream: Stream, film: &Film, version: u32) -> (u64, bool) {
    let content = film.content_of(version);
    let mut at = 0;
    loop {
        match stream.next().await {
            Ok(Some(piece)) => {
                assert_eq!(content.difference(at, &piece), None, "after byte {at}");
                at += piece.len() as u64;
            }
            Ok(None) => return (at, true),
            Err(_) => return (at, false),
        }
    }
}

async fn faults(node: &Node, reason: &str) -> f64 {
    let name = format!("stitch_faults_total{{reason=\"{reason}\"}}");
    node.metric(&name).await
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_200_to_a_range() {
    let cluster = TestCluster::alone().await;
    let node = cluster.node(1);
    let film = cluster.origin.publish("/film", LENGTH);
    film.always(Fault::IgnoreRange);
    let (start, end) = (3 * SLICE_BYTES - 5, 3 * SLICE_BYTES + 5);
    node.read_range(&film, start, end).await;
    node.read(&film).await;
    node.read_range(&film, LENGTH - 1, LENGTH).await;
    assert_eq!(asked(&film), 1, "one body, cut as it passed");
    let warm = node.get("/film").await;
    assert_eq!(warm.header("x-cache"), "HIT");
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_200_to_a_range_in_the_middle_of_an_object() {
    let cluster = TestCluster::alone().await;
    let node = cluster.node(1);
    let film = cluster.origin.publish("/film", 40 * SLICE_BYTES + 1);
    film.always_from(2 * SLICE_BYTES, Fault::IgnoreRange);
    node.read(&film).await;
    let wholes = film.seen().iter().filter(|seen| seen.status == 200).count();
    // Those that the read-ahead had under way when the first came.
    assert!((1..=4).contains(&wholes), "{wholes} whole bodies");
    let before = asked(&film);
    node.read(&film).await;
    assert_eq!(asked(&film), before, "all of it was kept");
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_416_for_an_empty_or_small_object() {
    let cluster = TestCluster::start(3).await;
    let node = cluster.node(1);
    let empty = cluster.origin.publish("/empty", 0);
    for _ in 0..2 {
        let reply = node.get("/empty").await;
        assert_eq!((reply.status, reply.body.len()), (200, 0));
        assert_eq!(reply.header("content-length"), "0");
    }
    let reply = node.ask(Ask::get("/empty").range("bytes=0-0")).await;
    assert_eq!(
        (reply.status, reply.header("content-range")),
        (416, "bytes */0")
    );
    assert_eq!(asked(&empty), 2, "the range, then the whole, once");

    let small = cluster.origin.publish("/small", 100);
    small.once(Fault::Unsatisfiable);
    assert_eq!(node.get("/small").await.body, small.content().all());
    cluster.read_from_every_node(&small).await;
    assert_eq!(small.fetches(), 1);

    // A range beyond the end of a cold object.
    let film = cluster.origin.publish("/film", LENGTH);
    let beyond = range(node, &film, 50 * SLICE_BYTES, 50 * SLICE_BYTES + 10).await;
    assert_eq!(beyond.status, 416);
    assert_eq!(
        beyond.header("content-range"),
        format!("bytes */{LENGTH}").as_str()
    );
    film.until("the first slice", |seen| {
        seen.iter().all(|seen| seen.complete)
    })
    .await;
    let sent: u64 = film.seen().iter().map(|seen| seen.sent).sum();
    assert!(sent <= SLICE_BYTES, "{sent} bytes to say where the end is");
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_206_that_is_not_what_was_asked() {
    let cluster = Options::alone()
        .set("stitch_log", "{enabled: true, pace: 1h}")
        .set("max_retries", 2)
        .start()
        .await;
    let node = cluster.node(1);
    let bad = 2 * SLICE_BYTES;
    for (n, fault) in [
        Fault::ShiftedRange,
        Fault::NoContentRange,
        Fault::WrongUnit,
        Fault::ShortRange,
        Fault::ShortBody,
        // No number is one past the last byte.
        Fault::ContentRange(format!("bytes {bad}-{}/*", u64::MAX)),
    ]
    .into_iter()
    .enumerate()
    {
        println!("{fault:?}");
        let before = faults(node, "content-range").await;
        // Once, at the very first answer.
        let path = format!("/first-{n}");
        let film = cluster.origin.publish(&path, LENGTH);
        film.once(fault.clone());
        node.read(&film).await;
        assert!(film.fetches_per_slice()[1..].iter().all(|n| *n == 1));
        assert_eq!(asked(&film) as u64, SLICES + 1);

        // Once, in the middle.
        let path = format!("/middle-{n}");
        let film = cluster.origin.publish(&path, LENGTH);
        film.once_from(bad, fault.clone());
        node.read(&film).await;
        node.read(&film).await;
        assert_eq!(asked(&film) as u64, SLICES + 1);
        assert_eq!(faults(node, "content-range").await, before + 2.0);

        // Always: an error before the header, a cut after it, nothing stored.
        let path = format!("/always-{n}");
        let film = cluster.origin.publish(&path, LENGTH);
        node.read_range(&film, 0, 10).await;
        film.always_from(bad, fault.clone());
        let reply = range(node, &film, bad, bad + 10).await;
        assert_eq!(reply.status, 502, "{fault:?}");
        let seen = film.seen();
        let tries = seen.iter().filter(|seen| seen.body.start >= bad);
        assert_eq!(tries.count(), 3, "the first and two more");
        let (read, whole) = drain(node.open(Ask::get(film.path())).await, &film, 1).await;
        assert!(!whole && read <= bad, "{read} bytes, proper end: {whole}");
        film.behave();
        node.read(&film).await;
    }
    let lines = node.log().matches("stitching fault").count();
    assert_eq!(lines, 1, "one line in an hour");
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_304_to_no_condition() {
    for retries in [0, 2] {
        let cluster = Options::alone().set("max_retries", retries).start().await;
        let film = cluster.origin.publish("/film", LENGTH);
        film.always(Fault::Status(304));
        let reply = cluster.node(1).get("/film").await;
        assert_eq!(reply.status, 502);
        assert_eq!(asked(&film), 1 + retries);
        film.behave();
        cluster.node(1).read(&film).await;
    }
}

/// The owner's tries are the cluster's.
#[tokio::test(flavor = "multi_thread")]
async fn hangs_up_on_a_cluster() {
    let cluster = TestCluster::start(3).await;
    for n in 1..=3 {
        for path in ["/a", "/b", "/c"] {
            let film = cluster.origin.publish(&format!("{path}{n}"), LENGTH);
            film.always(Fault::Hangup);
            let reply = cluster.node(n).get(film.path()).await;
            assert_eq!(reply.status, 502);
            // Three retries, and one for a connection that was idle.
            let tries = film.seen().len();
            assert!((4..=5).contains(&tries), "{tries} through node {n}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_206_with_another_total() {
    let cluster = Options::alone()
        .set("stitch_log", "{enabled: false}")
        .start()
        .await;
    let node = cluster.node(1);
    let film = cluster.origin.publish("/film", LENGTH);
    film.once_from(2 * SLICE_BYTES, Fault::WrongTotal);
    node.read(&film).await;
    assert_eq!(faults(node, "length").await, 1.0);
    assert_eq!(asked(&film) as u64, SLICES + 1);
    assert_eq!(node.log().matches("stitching fault").count(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_206_with_more_bytes_than_it_says() {
    let cluster = TestCluster::alone().await;
    let node = cluster.node(1);
    let film = cluster.origin.publish("/film", LENGTH);
    node.read_range(&film, 0, 10).await;
    film.always_from(2 * SLICE_BYTES, Fault::LongBody);
    let bad = 2 * SLICE_BYTES;
    let (read, whole) = drain(node.open(Ask::get(film.path())).await, &film, 1).await;
    assert!(!whole && read < bad + SLICE_BYTES, "{read} bytes");
    node.until("it is counted", async || {
        faults(node, "too-long").await > 0.0
    })
    .await;
    film.behave();
    node.read(&film).await;
    assert_eq!(film.fetches_per_slice()[2], 2, "the wrong one was not kept");
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_between_slices_before_the_first_byte() {
    let cluster = TestCluster::start(3).await;
    for (path, length) in [("/same-length", LENGTH), ("/longer", LENGTH + SLICE_BYTES)] {
        let film = cluster.origin.publish(path, LENGTH);
        for node in cluster.nodes() {
            node.read_range(&film, 0, 10).await;
        }
        film.change_to(length);
        // A slice that nobody has: the new version, at once, at every node.
        let at = 3 * SLICE_BYTES;
        cluster.node(1).read_range(&film, at, at + 10).await;
        for node in cluster.nodes() {
            node.until("the new version everywhere", async || {
                let reply = range(node, &film, 0, 10).await;
                film.content().difference(0, &reply.body).is_none()
            })
            .await;
            node.read(&film).await;
        }
        let newest = film.seen();
        let slices = length.div_ceil(SLICE_BYTES) as usize;
        let of_new = newest.iter().filter(|s| s.version == 2 && s.fetched());
        let of_new = of_new.count();
        assert!(of_new <= slices + 2, "{of_new} fetches of {slices} slices");
    }
    assert!(cluster.metric_sum("stitch_faults_total").await >= 2.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_between_slices_after_the_first_byte() {
    let cluster = TestCluster::start(3).await;
    let film = cluster.origin.publish("/film", 16 * MIB);
    let mut gate = film.hold_at(8 * MIB);
    let mut stream = cluster.node(1).open(Ask::get("/film")).await;
    let mut read = 0;
    while read < 7 * MIB {
        read += stream.next().await.unwrap().unwrap().len() as u64;
    }
    gate.holds(1).await;
    film.change();
    gate.open();
    let mut rest = Vec::new();
    let proper = loop {
        match stream.next().await {
            Ok(Some(piece)) => rest.extend_from_slice(&piece),
            end => break end.is_ok(),
        }
    };
    assert!(!proper, "cut, visibly");
    assert_eq!(film.content_of(1).difference(read, &rest), None, "mixture");
    // The next request is whole, everywhere.
    for node in cluster.nodes() {
        node.until("the new version", async || {
            let reply = range(node, &film, 0, 10).await;
            film.content().difference(0, &reply.body).is_none()
        })
        .await;
        node.read(&film).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn gives_only_a_weak_tag_or_a_date() {
    let cluster = TestCluster::alone().await;
    let node = cluster.node(1);
    for validators in [Validators::Weak, Validators::Date] {
        let film = cluster.origin.publish(&format!("/{validators:?}"), LENGTH);
        film.validators(validators);
        node.read(&film).await;
        node.read(&film).await;
        assert!(film.fetches_per_slice().iter().all(|n| *n == 1));
        assert!(film.seen().iter().all(|seen| seen.status == 206));
    }
}

/// Promise P2: where every version has one date and one length, as a build with
/// fixed times makes them, a weak tag is all that tells of a change.
#[tokio::test(flavor = "multi_thread")]
async fn changes_its_weak_tag_alone() {
    let cluster = TestCluster::alone().await;
    let node = cluster.node(1);
    let film = cluster.origin.publish("/film", LENGTH);
    film.validators(Validators::Weak)
        .modified(SystemTime::now() - Duration::from_secs(86_400));
    node.read_range(&film, 0, 10).await;
    film.change();
    let (read, proper) = drain(node.open(Ask::get("/film")).await, &film, 1).await;
    assert!(!proper && read <= SLICE_BYTES, "{read}, {proper}");
    node.read(&film).await;
}

/// Promise P1: two versions may have a date of this second. It validates, but
/// after a purge it vouches for nothing, however old it has become.
#[tokio::test(flavor = "multi_thread")]
async fn has_a_date_that_was_too_new_before_a_purge() {
    let cluster = TestCluster::alone().await;
    let node = cluster.node(1);
    let film = cluster.origin.publish("/film", LENGTH);
    let now = SystemTime::now();
    film.validators(Validators::Date).modified(now);
    node.read(&film).await;
    let later = httpdate::fmt_http_date(now + Duration::from_secs(3600));
    film.header("Date", &later);
    let again = Ask::get("/film").header("Cache-Control", "no-cache");
    let reply = node.ask(again).await;
    assert_eq!(reply.header("x-cache"), "REVALIDATED");
    film.change();
    node.purge("/film").await;
    node.read(&film).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn gives_other_tags_from_other_replicas() {
    let cluster = TestCluster::alone().await;
    let node = cluster.node(1);
    for validators in [Validators::Replicas, Validators::Unsteady] {
        println!("{validators:?}");
        let before = faults(node, "entity-tag").await;
        let film = cluster.origin.publish(&format!("/{validators:?}"), LENGTH);
        film.validators(validators);
        if validators == Validators::Replicas {
            film.header("Date", "");
        }
        node.read(&film).await;
        let cold = asked(&film) as u64;
        assert!(cold <= 3 * SLICES, "{cold} requests for {SLICES} slices");
        node.read(&film).await;
        assert_eq!(asked(&film) as u64, cold, "kept");
        assert!(faults(node, "entity-tag").await > before);
    }
    // A change that only the tag tells is a change.
    let film = cluster.origin.publish("/changes", LENGTH);
    film.validators(Validators::Replicas);
    node.read_range(&film, 0, 10).await;
}

/// Nothing but tags, and a new one that stays: a change like any other.
#[tokio::test(flavor = "multi_thread")]
async fn changes_its_tag_and_has_no_date() {
    let cluster = TestCluster::alone().await;
    let node = cluster.node(1);
    let film = cluster.origin.publish("/film", LENGTH);
    film.validators(Validators::StrongAlone);
    node.read(&film).await;
    film.change();
    node.purge("/film").await;
    cluster.origin.forget_log();
    node.read_range(&film, LENGTH - 10, LENGTH).await;
    let sent: u64 = film.seen().iter().map(|seen| seen.sent).sum();
    assert!(sent <= 4 * SLICE_BYTES, "{sent} bytes for ten");
    node.read(&film).await;
    assert!(film.seen().iter().all(|seen| seen.status == 206));
}

/// Nothing but tags, and they disagree: what had begun is cut, what comes after is whole.
#[tokio::test(flavor = "multi_thread")]
async fn gives_other_tags_and_no_date() {
    let cluster = TestCluster::start(3).await;
    // Of two tags in turn, one may come often enough to be believed again.
    for (validators, cuts_max) in [
        (Validators::UnsteadyAlone, 1),
        (Validators::ReplicasAlone, 4),
    ] {
        let film = cluster.origin.publish(&format!("/{validators:?}"), LENGTH);
        film.validators(validators);
        let mut cuts = 0;
        loop {
            let stream = cluster.node(1).open(Ask::get(film.path())).await;
            let (_, proper) = drain(stream, &film, 1).await;
            if proper {
                break;
            }
            cuts += 1;
            assert!(cuts <= cuts_max, "{cuts} cuts: {validators:?}");
        }
        // Of what was cut, slices may still be asked for.
        let bodies = || {
            let seen = film.seen().into_iter();
            seen.filter(|seen| seen.header("range").is_empty()).count()
        };
        // And each node that found the change out has announced it.
        let mut asked_before = usize::MAX;
        for _ in 0..4 {
            asked_before = bodies();
            cluster.read_from_every_node(&film).await;
            if bodies() == asked_before {
                break;
            }
        }
        assert_eq!(bodies(), asked_before, "kept");
        let all = asked(&film) as u64;
        assert!(
            all <= 4 * SLICES * (1 + cuts),
            "{all} requests, {cuts} cuts"
        );
    }
    assert!(cluster.metric_sum("stitch_faults_total").await > 0.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn gives_nothing_that_identifies_bytes() {
    let cluster = TestCluster::start(3).await;
    for validators in [Validators::WeakAlone, Validators::Nothing, Validators::Date] {
        let film = cluster.origin.publish(&format!("/{validators:?}"), LENGTH);
        film.validators(validators);
        // No earlier than the answer's Date: another version may have it, too.
        film.modified(SystemTime::now() + Duration::from_secs(60));
        cluster.read_from_every_node(&film).await;
        let node = cluster.node(2);
        node.read_range(&film, SLICE_BYTES - 1, SLICE_BYTES + 1)
            .await;
        let seen: Vec<u16> = film.seen().iter().map(|seen| seen.status).collect();
        assert_eq!(seen, [206, 200], "a look, then the whole: {validators:?}");
    }
    assert_eq!(cluster.metric_sum("stitch_faults_total").await, 3.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn refuses_in_the_middle_of_an_object() {
    let cluster = TestCluster::alone().await;
    let node = cluster.node(1);
    let middle = 3 * SLICE_BYTES;
    for (at, fault) in [
        Fault::Status(304),
        Fault::Status(412),
        Fault::Status(404),
        Fault::Status(410),
        Fault::Status(500),
        Fault::Status(503),
        Fault::Status(429),
        Fault::Hangup,
        Fault::Garbage(b"HTTP/1.1 nonsense\r\n\r\n".to_vec()),
    ]
    .into_iter()
    .enumerate()
    {
        println!("{fault:?}");
        // Once, before the client's header: nobody notices.
        let film = cluster.origin.publish(&format!("/once-{at}"), LENGTH);
        node.read_range(&film, 0, 10).await;
        film.once_from(middle, fault.clone());
        node.read_range(&film, middle, middle + 10).await;
        node.read(&film).await;
        let counts = film.fetches_per_slice();
        assert!(counts.iter().all(|n| *n == 1), "{counts:?}");

        // Always: never a wrong byte, never a short answer that looks whole.
        let film = cluster.origin.publish(&format!("/always-{at}"), LENGTH);
        film.always_from(middle, fault.clone());
        let (read, whole) = drain(node.open(Ask::get(film.path())).await, &film, 1).await;
        assert!(!whole && read <= middle, "{read}, {whole}");
        film.behave();
        node.read(&film).await;
    }
}

/// What one client's own fields provoke is its own affair: it gets the origin's
/// answer, whoever has joined it gets the bytes, and nothing is forgotten.
#[tokio::test(flavor = "multi_thread")]
async fn refuses_one_client_in_the_middle_of_an_object() {
    let middle = 3 * SLICE_BYTES;
    for nodes in [1, 3] {
        let cluster = TestCluster::start(nodes).await;
        let node = cluster.node(1);
        for (status, bytes) in [
            (302, 10),
            (400, SLICE_BYTES),
            (401, 10),
            (403, SLICE_BYTES),
            (431, 10),
        ] {
            println!("{status}");
            let film = cluster.origin.publish(&format!("/film-{status}"), LENGTH);
            node.read_range(&film, 0, 10).await;
            let purges = node.metric("purge_index").await;
            film.always_from(middle, Fault::Refuses("referer", status));
            let from_elsewhere = || Ask::get(film.path()).header("Referer", "http://elsewhere/");
            let range = format!("bytes={middle}-{}", middle + bytes - 1);
            let (ask, address) = (from_elsewhere().range(&range), node.address());
            let refused = tokio::spawn(async move { ask.send(address).await });
            film.until("the refused", |seen| seen.len() == 2).await;
            node.read_range(&film, middle, middle + bytes).await;
            let refused = refused.await.unwrap().unwrap();
            let told = (refused.status, refused.header("x-cache"));
            assert_eq!(told, (status, "PASS"), "{refused:?}");
            let is_refused = |seen: &&pingora_slice_tests::origin::Seen| seen.status == status;
            assert_eq!(film.seen().iter().filter(is_refused).count(), 2);

            // When the head is out, the body ends visibly short.
            let cut = drain(node.open(from_elsewhere()).await, &film, 1).await;
            assert!(!cut.1 && cut.0 <= middle + SLICE_BYTES, "{cut:?}");
            node.read(&film).await;
            let counts = film.fetches_per_slice();
            assert!(counts.iter().all(|n| *n == 1), "{counts:?}");
            assert_eq!(node.metric("purge_index").await, purges);
        }
    }
}

/// A validation that overlaps the end does not take away the length that came with it.
#[tokio::test(flavor = "multi_thread")]
async fn is_validated_while_a_body_without_a_length_ends() {
    let cluster = TestCluster::alone().await;
    let node = cluster.node(1);
    for purged in [false, true] {
        let film = cluster.origin.publish(&format!("/film-{purged}"), LENGTH);
        film.once(Fault::NoLength);
        let mut gate = film.hold_at(LENGTH - 1);
        let reading = node.reading(&film);
        gate.holds(1).await;
        let validated = match purged {
            // The 304 comes before the end, and is newer than the body.
            true => {
                node.purge(film.path()).await;
                let validated = node.open(Ask::get(film.path())).await;
                assert_eq!(validated.header("x-cache"), "REVALIDATED");
                gate.open();
                drain(validated, &film, 1).await.1
            }
            // It comes after.
            false => {
                film.once(Fault::Delay(Duration::from_secs(1)));
                let ask = Ask::get(film.path()).header("Cache-Control", "no-cache");
                let address = node.address();
                let validating = tokio::spawn(async move { ask.send(address).await });
                film.until("a validation", |seen| seen.len() == 2).await;
                gate.open();
                let reply = validating.await.unwrap().unwrap();
                reply.header("x-cache") == "REVALIDATED"
            }
        };
        assert!(validated, "{:#?}", film.seen());
        assert_eq!(reading.await.unwrap().unwrap().body, film.content().all());
        let warm = node.ask(Ask::new("HEAD", film.path())).await;
        let told = (warm.header("x-cache"), warm.header("content-length"));
        assert_eq!(told, ("HIT", LENGTH.to_string().as_str()), "{purged}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn redirects() {
    let cluster = TestCluster::alone().await;
    let node = cluster.node(1);
    let film = cluster.origin.publish("/film", LENGTH);
    film.times(2, Fault::Redirect("/elsewhere".into()));
    for _ in 0..2 {
        let reply = node.get("/film").await;
        let location = reply.header("location");
        assert_eq!((reply.status, location), (302, "/elsewhere"));
    }
    node.read(&film).await;
    let others = cluster.origin.log();
    assert!(others.iter().all(|seen| seen.target == "/film"), "followed");
}

#[tokio::test(flavor = "multi_thread")]
async fn stalls_or_breaks_off() {
    let cluster = impatient().await;
    let node = cluster.node(1);
    let middle = 3 * SLICE_BYTES;
    for fault in [Fault::StallAfter(1000), Fault::CloseAfter(1000)] {
        println!("{fault:?}");
        // Once: taken up again where it broke off.
        let film = cluster.origin.publish(&format!("/once-{fault:?}"), LENGTH);
        film.once_from(middle, fault.clone());
        node.read(&film).await;
        let resumed = |seen: &pingora_slice_tests::origin::Seen| {
            seen.body.start % SLICE_BYTES == 1000 && seen.header("if-range").contains('"')
        };
        assert!(film.seen().iter().any(resumed), "{:#?}", film.seen());
        assert_eq!(asked(&film) as u64, SLICES + 1);

        // Always, from the slice's first byte on: an error, or a cut.
        let film = cluster
            .origin
            .publish(&format!("/always-{fault:?}"), LENGTH);
        node.read_range(&film, 0, 10).await;
        let none = match fault {
            Fault::StallAfter(_) => Fault::StallAfter(0),
            _ => Fault::CloseAfter(0),
        };
        film.always_from(middle, none);
        let reply = range(node, &film, middle, middle + 10).await;
        let expected = match fault {
            Fault::StallAfter(_) => 504,
            _ => 502,
        };
        assert_eq!(reply.status, expected, "{fault:?}");
        let (read, whole) = drain(node.open(Ask::get(film.path())).await, &film, 1).await;
        assert!(!whole && read <= middle, "{read}, {whole}");
        film.behave();
        node.read(&film).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn is_slow_before_the_header() {
    let cluster = impatient().await;
    let node = cluster.node(1);
    let film = cluster.origin.publish("/film", LENGTH);
    film.always(Fault::Delay(Duration::from_secs(20)));
    let reply = node.get("/film").await;
    assert_eq!(reply.status, 504);
    assert_eq!(asked(&film), 2, "and once more");
    film.behave();
    node.read(&film).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn drips() {
    let cluster = impatient().await;
    let node = cluster.node(1);
    let film = cluster.origin.publish("/film", 64 * KIB);
    // Slower than the deadline for the whole, never silent for as long.
    film.always(Fault::Drip(32 * KIB));
    node.read(&film).await;
    assert_eq!(asked(&film), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn breaks_off_a_body_without_a_length() {
    let cluster = impatient().await;
    let node = cluster.node(1);
    let film = cluster.origin.publish("/film", LENGTH);
    film.validators(Validators::Nothing);
    film.always(Fault::NoLengthCloseAfter(SLICE_BYTES + 10));
    let (read, whole) = drain(node.open(Ask::get("/film")).await, &film, 1).await;
    assert!(!whole && read <= SLICE_BYTES + 10, "{read}, {whole}");
    film.behave();
    film.always(Fault::NoLength);
    for _ in 0..2 {
        assert_eq!(node.get("/film").await.body, film.content().all());
    }
    // With a validator it is taken up again.
    let film = cluster.origin.publish("/tagged", LENGTH);
    film.once(Fault::NoLengthCloseAfter(SLICE_BYTES + 10));
    film.always(Fault::NoLength);
    assert_eq!(node.get("/tagged").await.body, film.content().all());
    assert_eq!(asked(&film), 2);
    // Promise P5: an end before the byte where it broke off is not the end.
    let film = cluster.origin.publish("/shorter", LENGTH);
    film.once(Fault::NoLengthCloseAfter(SLICE_BYTES + 10));
    film.always(Fault::NoLengthEndAfter(SLICE_BYTES));
    let (read, whole) = drain(node.open(Ask::get("/shorter")).await, &film, 1).await;
    assert!(!whole && read <= SLICE_BYTES + 10, "{read}, {whole}");
}

/// Its tag names its bytes, though its length was not known when that was written down.
#[tokio::test(flavor = "multi_thread")]
async fn confirms_a_body_without_a_length_after_a_purge() {
    let cluster = TestCluster::alone().await;
    let node = cluster.node(1);
    let film = cluster.origin.publish("/film", LENGTH);
    film.always(Fault::NoLength);
    for _ in 0..2 {
        assert_eq!(node.get("/film").await.body, film.content().all());
        node.purge("/film").await;
    }
    let seen: Vec<u16> = film.seen().iter().map(|seen| seen.status).collect();
    assert_eq!(seen, [200, 304]);
    assert_eq!(node.metric("subrequests_total").await, 2.0);
    assert_eq!(node.metric("failed_subrequests_total").await, 0.0);
}

/// A body whose connection breaks again and again, and which gets on each time.
#[tokio::test(flavor = "multi_thread")]
async fn breaks_off_a_whole_body_at_every_slice() {
    let cluster = Options::alone()
        .set("slice_patterns", "[^/sliced]")
        .set("max_retries", 1)
        .start()
        .await;
    let film = cluster.origin.publish("/film", LENGTH);
    film.always(Fault::CloseAfter(SLICE_BYTES));
    cluster.node(1).read(&film).await;
    assert_eq!(asked(&film) as u64, SLICES);
    // Without getting on, no more often than it is told to.
    let film = cluster.origin.publish("/stuck", LENGTH);
    film.always_from(SLICE_BYTES, Fault::CloseAfter(0));
    film.always(Fault::CloseAfter(SLICE_BYTES));
    let stream = cluster.node(1).open(Ask::get("/stuck")).await;
    assert_eq!(drain(stream, &film, 1).await, (SLICE_BYTES, false));
    // The client may begin a body of its own, which has its retry, too.
    let seen = film.seen();
    let with = |status| seen.iter().filter(|seen| seen.status == status).count();
    let (begun, resumed) = (with(200), with(206));
    assert!(
        (1..=2).contains(&begun) && (1..=begun).contains(&resumed),
        "{seen:#?}"
    );
}

/// What is encoded has no ranges for us: it is asked for again, and passed over
/// as far as it is here.
#[tokio::test(flavor = "multi_thread")]
async fn breaks_off_an_encoded_body() {
    let cluster = Options::alone()
        .set("slice_patterns", "[^/sliced]")
        .set("max_retries", 1)
        .start()
        .await;
    let node = cluster.node(1);
    let ask = |film: &Film| Ask::get(film.path()).header("Accept-Encoding", "gzip");
    for (path, fault, then) in [
        ("/length", Fault::CloseAfter(SLICE_BYTES + 10), None),
        (
            "/no-length",
            Fault::NoLengthCloseAfter(SLICE_BYTES + 10),
            Some(Fault::NoLength),
        ),
    ] {
        let film = cluster.origin.publish(path, LENGTH);
        film.header("Content-Encoding", "gzip").once(fault);
        if let Some(then) = then {
            film.always(then);
        }
        let (read, whole) = drain(node.open(ask(&film)).await, &film, 1).await;
        assert_eq!((read, whole), (LENGTH, true), "{path}: {:#?}", film.seen());
        let seen = film.seen();
        let encodings: Vec<_> = seen.iter().map(|s| s.header("accept-encoding")).collect();
        assert_eq!(encodings, ["gzip", "gzip"], "{path}");
    }
    // Promise P2: what another machine makes of the same file has the same weak tag.
    for (path, validators) in [("/weak", Validators::Weak), ("/date", Validators::Date)] {
        let film = cluster.origin.publish(path, LENGTH);
        film.header("Content-Encoding", "gzip")
            .validators(validators)
            .once(Fault::NoLengthCloseAfter(SLICE_BYTES + 10))
            .always(Fault::NoLength);
        let (read, whole) = drain(node.open(ask(&film)).await, &film, 1).await;
        assert!(
            !whole && read <= SLICE_BYTES + 10,
            "{path}: {read}, {whole}"
        );
    }
    // One date for the encoded bytes and the others.
    let film = cluster.origin.publish("/both", LENGTH);
    film.header("Content-Encoding", "gzip")
        .validators(Validators::Date)
        .once(Fault::NoLengthCloseAfter(SLICE_BYTES + 10))
        .always(Fault::NoLength);
    let mut gate = film.hold_at(SLICE_BYTES);
    let stream = node.open(ask(&film)).await;
    gate.holds(1).await;
    film.without("Content-Encoding");
    gate.open();
    let (read, whole) = drain(stream, &film, 1).await;
    assert!(!whole && read <= SLICE_BYTES + 10, "{read}, {whole}");
}

#[tokio::test(flavor = "multi_thread")]
async fn never_ends() {
    let cluster = Options::alone().set("max_object_size", "4m").start().await;
    let node = cluster.node(1);
    let film = cluster.origin.publish("/film", 1 << 50);
    film.validators(Validators::Nothing).always(Fault::NoLength);
    let mut stream = node.open(Ask::get("/film")).await;
    assert_eq!(stream.status, 200);
    let mut at = 0;
    while at < 24 * MIB {
        let piece = stream.next().await.unwrap().unwrap();
        assert_eq!(film.content().difference(at, &piece), None);
        at += piece.len() as u64;
    }
    drop(stream);
    // Beyond the cap it is for those who read it, and nobody reads.
    let mut sent = at;
    node.until("the origin is left in peace", async || {
        let before = std::mem::replace(&mut sent, film.seen()[0].sent);
        tokio::time::sleep(Duration::from_millis(300)).await;
        before == film.seen()[0].sent
    })
    .await;
    // Eight slices of window, and the kernel's buffers on both sides of the node.
    assert!(sent <= at + 32 * MIB, "{sent} bytes for {at}");
    let l2 = node.metric("l2_bytes").await;
    assert!(l2 <= 64.0 * MIB as f64);
}

#[tokio::test(flavor = "multi_thread")]
async fn sends_more_than_may_be_kept() {
    let cluster = Options::alone().set("max_object_size", "1m").start().await;
    let node = cluster.node(1);
    for (path, fault) in [
        ("/ranges", None),
        ("/no-ranges", Some(Fault::IgnoreRange)),
        ("/no-length", Some(Fault::NoLength)),
    ] {
        let film = cluster.origin.publish(path, 3 * MIB + 1);
        if let Some(fault) = fault {
            film.always(fault);
        }
        for _ in 0..2 {
            let before = asked(&film);
            let reply = node.get(path).await;
            assert_eq!(reply.body, film.content().all(), "{path}");
            assert_ne!(reply.header("x-cache"), "HIT", "{path}");
            assert!(asked(&film) > before, "{path}: kept");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn encodes_what_was_asked_for_as_it_is() {
    let cluster = TestCluster::alone().await;
    let node = cluster.node(1);
    let film = cluster.origin.publish("/film", LENGTH);
    film.once_from(2 * SLICE_BYTES, Fault::Gzip);
    node.read(&film).await;
    node.read(&film).await;
    assert_eq!(asked(&film) as u64, SLICES + 1);
    assert_eq!(faults(node, "encoded").await, 1.0);
    let ranged = film.seen();
    assert!(
        ranged
            .iter()
            .all(|seen| seen.header("accept-encoding") == "identity")
    );
    // Whatever is asked: as one body, with its encoding, never in slices.
    let film = cluster.origin.publish("/always", LENGTH);
    film.always(Fault::Gzip);
    let reply = node.get("/always").await;
    assert_eq!(reply.header("content-encoding"), "gzip");
    assert_eq!(reply.body, film.content().all());
    let kept: Vec<u16> = film.seen().iter().map(|seen| seen.status).collect();
    assert_eq!(kept, [206, 206, 200]);
}

#[tokio::test(flavor = "multi_thread")]
async fn says_that_it_is_for_one_client() {
    let cluster = TestCluster::alone().await;
    let node = cluster.node(1);
    for (path, name, value) in [
        ("/private", "Cache-Control", "private, max-age=60"),
        ("/no-store", "Cache-Control", "no-store"),
    ] {
        let film = cluster.origin.publish(path, LENGTH);
        film.header(name, value);
        for _ in 0..2 {
            let before = film.fetches();
            node.read(&film).await;
            assert!(film.fetches() > before, "{path}: kept");
            node.read_range(&film, 5, 10).await;
        }
    }
    let film = cluster.origin.publish("/cookie", LENGTH);
    film.header("Cache-Control", "max-age=60");
    film.header("Set-Cookie", "a=b");
    node.read(&film).await;
    let before = film.fetches();
    node.read(&film).await;
    assert!(film.fetches() > before, "kept");
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_errors() {
    let cluster = Options::alone().set("max_retries", 2).start().await;
    let node = cluster.node(1);
    let film = cluster.origin.publish("/film", LENGTH);
    // A failure that says nothing about itself may pass; the rest are answers.
    for (status, tries) in [(403, 1), (500, 3), (503, 3), (451, 1)] {
        film.behave().always(Fault::Status(status));
        for _ in 0..2 {
            let before = asked(&film);
            let reply = node.get("/film").await;
            assert_eq!(reply.status, status);
            assert_eq!(reply.text(), format!("{status}, as told\n"));
            assert_eq!(asked(&film) - before, tries, "{status}");
        }
    }
    film.behave();
    node.read(&film).await;
    for _ in 0..3 {
        assert_eq!(node.get("/nothing-here").await.status, 404);
    }
    let missing = cluster.origin.log();
    let missing = missing.iter().filter(|s| s.target == "/nothing-here");
    assert_eq!(missing.count(), 1, "a 404 is kept for a short time");
}

#[tokio::test(flavor = "multi_thread")]
async fn cannot_be_connected_to() {
    let nobody = Ports::claim();
    let mut cluster = Options::alone().set("max_retries", 1).prepare().await;
    let upstreams = [nobody.at(0), cluster.origin.address()];
    let node = cluster.node_mut(1);
    node.set(
        "upstream_address",
        format!("{:?}", upstreams.map(|a| a.to_string())),
    );
    node.spawn();
    node.until_ready().await;
    // What is only passed on, too: whoever's turn it is.
    cluster.origin.publish("/form", 10);
    for _ in 0..2 {
        let posted = cluster.node(1).ask(Ask::new("POST", "/form")).await;
        assert_eq!(posted.status, 200);
    }
    for nth in 0..4 {
        let film = cluster.origin.publish(&format!("/film-{nth}"), LENGTH);
        cluster.node(1).read(&film).await;
    }
    let film = cluster.origin.publish("/late", LENGTH);
    cluster.origin.stop().await;
    let failed = async || cluster.node(1).metric("failed_subrequests_total").await;
    let before = failed().await;
    assert_eq!(cluster.node(1).get("/late").await.status, 502);
    assert_eq!(failed().await, before + 1.0);
    let posted = cluster.node(1).ask(Ask::new("POST", "/form")).await;
    assert_eq!(posted.status, 502);
    // The last one tried is tried all the same.
    cluster.origin.resume().await;
    cluster.node(1).read(&film).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_of_two_dies_and_comes_back() {
    let mut cluster = Options::alone().prepare().await;
    let mut second = Origin::start().await;
    let addresses = [cluster.origin.address(), second.address()];
    let node = cluster.node_mut(1);
    node.set(
        "upstream_address",
        format!("{:?}", addresses.map(|a| a.to_string())),
    );
    node.spawn();
    node.until_ready().await;
    let node = cluster.node(1);
    let up = format!("upstream_up{{address=\"{}\"}}", addresses[1]);
    let is_up = async |expected| {
        let what = format!("{up} is {expected}");
        node.until(&what, async || {
            node.metrics().await.sample(&up) == Some(expected)
        })
        .await;
    };
    // Both answer for the same object; each knows what it was asked.
    let publish = |name: &str| {
        second.publish(name, 10);
        cluster.origin.publish(name, 10)
    };
    let films: Vec<Film> = (0..8).map(|n| publish(&format!("/film-{n}"))).collect();
    is_up(1.0).await;
    // Nobody asks for anything: it is found out all the same.
    second.stop().await;
    is_up(0.0).await;
    for film in &films[..4] {
        node.read(film).await;
    }
    assert_eq!((cluster.origin.fetches(), second.fetches()), (4, 0));
    second.resume().await;
    is_up(1.0).await;
    for film in &films[4..] {
        node.read(film).await;
    }
    assert_eq!((cluster.origin.fetches(), second.fetches()), (6, 2));
}
