//! The witness itself: does the scripted origin do what the other tests take it for?

use std::time::Duration;

use pingora_slice_tests::{Ask, Fault, KIB, MIB, Origin, SLICE_BYTES, Validators};

async fn ask(origin: &Origin, ask: Ask) -> pingora_slice_tests::http::Reply {
    ask.send(origin.address()).await.unwrap()
}

#[tokio::test]
async fn ranges_and_conditions_are_those_of_rfc_9110() {
    let origin = Origin::start().await;
    let film = origin.publish("/film", MIB + 7);
    let whole = ask(&origin, Ask::get("/film")).await;
    assert_eq!((whole.status, whole.body.len() as u64), (200, MIB + 7));
    assert_eq!(film.content().difference(0, &whole.body), None);

    let cases = [
        ("bytes=0-0", 206, "bytes 0-0/1048583", 1),
        ("bytes=1048576-", 206, "bytes 1048576-1048582/1048583", 7),
        ("bytes=-3", 206, "bytes 1048580-1048582/1048583", 3),
        (
            "bytes=5-99999999",
            206,
            "bytes 5-1048582/1048583",
            1_048_578,
        ),
        ("bytes=1048583-", 416, "bytes */1048583", 0),
        ("bytes=-0", 416, "bytes */1048583", 0),
        ("bytes=5-2", 200, "", 1_048_583),
        ("lines=1-2", 200, "", 1_048_583),
        ("bytes=0-1,5-6", 200, "", 1_048_583),
    ];
    for (range, status, content_range, length) in cases {
        let reply = ask(&origin, Ask::get("/film").range(range)).await;
        let got = (
            reply.status,
            reply.header("content-range"),
            reply.body.len(),
        );
        assert_eq!(got, (status, content_range, length), "{range}");
    }

    let etag = whole.header("etag").to_owned();
    let date = whole.header("last-modified").to_owned();
    let cases = [
        ("If-None-Match", etag.as_str(), 304),
        ("If-None-Match", "\"other\"", 206),
        ("If-Modified-Since", date.as_str(), 304),
        ("If-Match", "\"other\"", 412),
        ("If-Match", etag.as_str(), 206),
        ("If-Range", etag.as_str(), 206),
        ("If-Range", "\"other\"", 200),
        ("If-Range", date.as_str(), 206),
        ("If-Unmodified-Since", "Mon, 01 Jan 1990 00:00:00 GMT", 412),
    ];
    for (name, value, status) in cases {
        let reply = ask(
            &origin,
            Ask::get("/film").range("bytes=0-9").header(name, value),
        )
        .await;
        assert_eq!(reply.status, status, "{name}: {value}");
    }

    let head = ask(&origin, Ask::new("HEAD", "/film")).await;
    assert_eq!(
        (head.status, head.header("content-length"), head.body.len()),
        (200, "1048583", 0)
    );
    assert_eq!(ask(&origin, Ask::get("/other")).await.status, 404);
    assert_eq!(
        ask(&origin, Ask::new("POST", "/form").body("a=b"))
            .await
            .text(),
        "a=b"
    );
    film.change_to(10);
    let changed = ask(&origin, Ask::get("/film").header("If-None-Match", &etag)).await;
    assert_eq!((changed.status, changed.body.len()), (200, 10));
    assert_eq!(film.version_of(0, &changed.body), Some(2));
}

#[tokio::test]
async fn the_log_counts_each_slice() {
    let origin = Origin::start().await;
    let film = origin.publish("/film", 3 * SLICE_BYTES + 1);
    ask(&origin, Ask::get("/film?quality=high").range("bytes=0-0")).await;
    ask(
        &origin,
        Ask::get("/film").range(&format!("bytes=0-{SLICE_BYTES}")),
    )
    .await;
    ask(&origin, Ask::new("HEAD", "/film")).await;
    assert_eq!(film.fetches_per_slice(), [2, 1, 0, 0]);
    assert_eq!((film.fetches(), film.seen().len()), (2, 3));
    film.until("all are complete", |seen| {
        seen.iter().all(|seen| seen.complete)
    })
    .await;
    origin.forget_log();
    assert_eq!(film.seen().len(), 0);
}

#[tokio::test]
async fn faults_do_what_they_say() {
    let origin = Origin::start().await;
    let film = origin.publish("/film", 300 * KIB);
    let part = || Ask::get("/film").range("bytes=100-199");
    let heads = [
        (Fault::IgnoreRange, 200, "", 300 * 1024),
        (Fault::NoLength, 200, "", 300 * 1024),
        (Fault::NoLengthEndAfter(99), 200, "", 99),
        (Fault::ShiftedRange, 206, "bytes 101-199/307200", 99),
        (Fault::NoContentRange, 206, "", 100),
        (Fault::WrongTotal, 206, "bytes 100-199/307201", 100),
        (Fault::ShortRange, 206, "bytes 100-198/307200", 99),
        (Fault::ShortBody, 206, "bytes 100-199/307200", 99),
        (Fault::Unsatisfiable, 416, "bytes */307200", 0),
        (Fault::Status(503), 503, "", 13),
        (Fault::Redirect("/there".into()), 302, "", 10),
        (Fault::Drip(10_000), 206, "bytes 100-199/307200", 100),
        (
            Fault::Delay(Duration::from_millis(5)),
            206,
            "bytes 100-199/307200",
            100,
        ),
    ];
    for (fault, status, content_range, length) in heads {
        film.once(fault.clone());
        let reply = ask(&origin, part()).await;
        let got = (
            reply.status,
            reply.header("content-range"),
            reply.body.len(),
        );
        assert_eq!(got, (status, content_range, length), "{fault:?}");
        assert_eq!(
            ask(&origin, part()).await.body.len(),
            100,
            "once means once"
        );
    }
    film.once(Fault::Gzip);
    assert_eq!(
        ask(&origin, part()).await.header("content-encoding"),
        "gzip"
    );
    for fault in [
        Fault::CloseAfter(50),
        Fault::Hangup,
        Fault::Garbage(b"no http".to_vec()),
    ] {
        film.once(fault.clone());
        assert!(part().send(origin.address()).await.is_err(), "{fault:?}");
    }
    film.once_from(200, Fault::Status(500));
    assert_eq!(ask(&origin, part()).await.status, 206);
    assert_eq!(
        ask(&origin, Ask::get("/film").range("bytes=200-"))
            .await
            .status,
        500
    );

    film.validators(Validators::Unsteady);
    let tags = [ask(&origin, part()).await, ask(&origin, part()).await];
    assert_ne!(tags[0].header("etag"), tags[1].header("etag"));
    film.validators(Validators::Nothing).vary("Accept-Language");
    let german = ask(&origin, part().header("Accept-Language", "de")).await;
    assert_eq!(
        (german.header("etag"), german.header("last-modified")),
        ("", "")
    );
    assert_eq!(film.content_for("de").difference(100, &german.body), None);
    assert!(
        film.content_for("en")
            .difference(100, &german.body)
            .is_some()
    );
}

#[tokio::test]
async fn a_gate_holds_an_answer_until_it_is_opened() {
    let origin = Origin::start().await;
    let film = origin.publish("/film", 2 * MIB);
    let mut gate = film.hold_at(MIB);
    let mut stream = Ask::get("/film").open(origin.address()).await.unwrap();
    gate.holds(1).await;
    assert_eq!(film.seen()[0].sent, MIB);
    let mut body = Vec::new();
    while (body.len() as u64) < MIB {
        body.extend_from_slice(&stream.next().await.unwrap().unwrap());
    }
    gate.open();
    body.extend_from_slice(&stream.collect().await.unwrap().body);
    assert_eq!(film.content().difference(0, &body), None);
    assert_eq!(body.len() as u64, 2 * MIB);
}

#[tokio::test]
async fn an_origin_that_is_down_comes_back_at_its_address() {
    let mut origin = Origin::start().await;
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("a.txt"), "real").unwrap();
    origin.publish_tree("/files", dir.path());
    origin.stop().await;
    assert!(
        Ask::get("/files/a.txt")
            .send(origin.address())
            .await
            .is_err()
    );
    origin.resume().await;
    let reply = ask(&origin, Ask::get("/files/a.txt").range("bytes=1-")).await;
    assert_eq!((reply.status, reply.text().as_str()), (206, "eal"));
    assert_eq!(ask(&origin, Ask::get("/files/../secret")).await.status, 404);
}
