//! The process and its signals: how it stops and hands over (`reload`: SIGHUP).

use std::os::unix::fs::PermissionsExt;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use pingora_slice_tests::cluster::binary;
use pingora_slice_tests::http::Ask;
use pingora_slice_tests::{Fault, MIB, Options, TestCluster};
use rustix::process::Signal;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// A download under way survives SIGTERM; nobody else gets in; exit status 0.
#[tokio::test(flavor = "multi_thread")]
async fn a_download_survives_sigterm() {
    let mut cluster = Options::alone().set("drain_timeout", "30s").start().await;
    let film = cluster.origin.publish("/film", 8 * MIB);
    let mut gate = film.hold_at(6 * MIB);
    let mut download = cluster.node(1).reading(&film);
    gate.holds_up(&mut download).await;
    cluster.node(1).signal(Signal::TERM);
    let address = cluster.node(1).address();
    cluster
        .node(1)
        .until("new connections are refused", async || {
            TcpStream::connect(address).await.is_err()
        })
        .await;
    assert!(!download.is_finished());
    gate.open();
    let reply = download.await.unwrap().unwrap();
    assert_eq!(reply.body.len() as u64, film.length());
    assert!(cluster.node_mut(1).until_exit().await.success());
}

/// What takes longer than `drain_timeout` is cut, even if that is short.
#[tokio::test(flavor = "multi_thread")]
async fn draining_ends() {
    let mut cluster = Options::alone().set("drain_timeout", "300ms").start().await;
    let film = cluster.origin.publish("/film", 8 * MIB);
    let mut gate = film.hold_at(6 * MIB);
    let mut download = cluster.node(1).reading(&film);
    gate.holds_up(&mut download).await;
    assert!(cluster.node_mut(1).terminate().await.success());
    assert!(download.await.unwrap().is_err(), "it was visibly cut");
}

/// SIGINT cuts what is under way, whatever time it would have to end.
#[tokio::test(flavor = "multi_thread")]
async fn sigint_cuts_downloads_at_once() {
    let mut cluster = Options::alone().set("drain_timeout", "1h").start().await;
    let film = cluster.origin.publish("/film", 8 * MIB);
    let mut gate = film.hold_at(6 * MIB);
    let mut download = cluster.node(1).reading(&film);
    gate.holds_up(&mut download).await;
    cluster.node(1).signal(Signal::INT);
    assert!(cluster.node_mut(1).until_exit().await.success());
    assert!(download.await.unwrap().is_err(), "it was visibly cut");
}

/// SIGQUIT hands the listeners to a new process: nobody is refused, a download
/// under way ends whole, and what is on disk is there.
async fn hands_over(mut cluster: TestCluster) {
    let film = cluster.origin.publish("/film", 8 * MIB);
    let held = cluster.origin.publish("/held", 8 * MIB);
    cluster.node(1).read(&film).await;
    let mut gate = held.hold_at(6 * MIB);
    let mut download = cluster.node(1).reading(&held);
    gate.holds_up(&mut download).await;

    let address = cluster.node(1).address();
    let stop = Arc::new(AtomicBool::new(false));
    let polling = tokio::spawn({
        let stop = stop.clone();
        async move {
            let mut answered = 0;
            while !stop.load(Ordering::Relaxed) {
                let reply = Ask::get("/film").range("bytes=0-99").send(address).await;
                assert_eq!(reply.expect("nobody is refused").status, 206);
                answered += 1;
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            answered
        }
    });
    let mut old = cluster.node_mut(1).spawn_successor();
    cluster
        .node(1)
        .until("the new process waits", async || {
            cluster.node(1).log().contains("send it SIGQUIT")
        })
        .await;
    let pid = rustix::process::Pid::from_child(&old);
    rustix::process::kill_process(pid, Signal::QUIT).unwrap();
    cluster
        .node(1)
        .until("the old process stops accepting", async || {
            cluster.node(1).log().contains("answers are finished")
        })
        .await;
    gate.open();
    let reply = download.await.unwrap().unwrap();
    assert_eq!(reply.body.len() as u64, held.length());
    let status = tokio::task::spawn_blocking(move || old.wait()).await;
    assert!(status.unwrap().unwrap().success());
    cluster.node_mut(1).until_ready().await;
    cluster.origin.forget_log();
    cluster.node(1).read(&film).await;
    assert_eq!(film.fetches(), 0, "{:#?}", film.seen());
    stop.store(true, Ordering::Relaxed);
    assert!(polling.await.unwrap() > 0);
    assert!(cluster.node_mut(1).terminate().await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_alone_hands_over() {
    hands_over(Options::alone().set("drain_timeout", "30s").start().await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_hands_over() {
    hands_over(
        Options::cluster(1)
            .set("drain_timeout", "30s")
            .start()
            .await,
    )
    .await;
}

/// Without a new process SIGQUIT changes nothing.
#[tokio::test(flavor = "multi_thread")]
async fn sigquit_without_a_successor_is_ignored() {
    let mut cluster = TestCluster::alone().await;
    let film = cluster.origin.publish("/film", MIB);
    cluster.node(1).signal(Signal::QUIT);
    cluster
        .node(1)
        .until("it says so", async || {
            cluster.node(1).log().contains("SIGQUIT ignored")
        })
        .await;
    cluster.node(1).read(&film).await;
    assert!(cluster.node_mut(1).terminate().await.success());
}

/// With `origin_probe: head` the origin is asked by HEAD what it has; what does
/// not say that it has ranges is fetched whole.
#[tokio::test(flavor = "multi_thread")]
async fn the_origin_can_be_probed_by_head() {
    let cluster = Options::alone().set("origin_probe", "head").start().await;
    let film = cluster.origin.publish("/film", 3 * MIB);
    cluster.node(1).read(&film).await;
    cluster.node(1).read(&film).await;
    let seen = film.seen();
    assert_eq!(seen[0].method, "HEAD", "{seen:#?}");
    assert!(
        film.fetches_per_slice().iter().all(|n| *n == 1),
        "{seen:#?}"
    );
    assert_eq!(seen.iter().filter(|seen| seen.method == "HEAD").count(), 1);

    let plain = cluster.origin.publish("/plain", 3 * MIB);
    plain.once(Fault::Status(405));
    cluster.node(1).read(&plain).await;
    let seen = plain.seen();
    assert_eq!((seen.len(), seen[1].header("range")), (2, ""), "{seen:#?}");
}

/// A body that breaks off is a stitching fault: logged and counted.
#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_breaks_off_is_counted() {
    let cluster = Options::alone().start().await;
    let film = cluster.origin.publish("/film", 3 * MIB);
    film.once_from(MIB, Fault::CloseAfter(1000));
    cluster.node(1).read(&film).await;
    let node = cluster.node(1);
    let count = node
        .metric("stitch_faults_total{reason=\"broke-off\"}")
        .await;
    assert_eq!(count, 1.0);
    assert!(node.log().contains("broke-off"), "{}", node.log());
}

/// A request head has one deadline, however often a byte of it comes.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_dawdles_with_its_head_is_let_go() {
    let timeouts = "{header: 1s, idle: 20s}";
    let cluster = Options::alone()
        .set("client_timeouts", timeouts)
        .start()
        .await;
    let (mut reader, mut writer) = TcpStream::connect(cluster.node(1).address())
        .await
        .unwrap()
        .into_split();
    let dawdling = tokio::spawn(async move {
        // Ends when the node closes the connection.
        while writer.write_all(b"G").await.is_ok() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    });
    let mut byte = [0];
    let end = tokio::time::timeout(Duration::from_secs(10), reader.read(&mut byte)).await;
    assert!(
        matches!(end, Ok(Ok(0) | Err(_))),
        "it is still listened to: {end:?}"
    );
    dawdling.await.unwrap();
}

/// `h2` without TLS: both HTTP/2 by prior knowledge and HTTP/1.1.
#[tokio::test(flavor = "multi_thread")]
async fn http2_without_tls_is_spoken_where_it_is_asked_for() {
    let mut cluster = Options::alone().prepare().await;
    let address = cluster.node(1).address();
    let node = cluster.node_mut(1);
    node.set("listen", format!("[{{address: \"{address}\", h2: true}}]"));
    node.spawn();
    node.until_ready().await;
    let film = cluster.origin.publish("/film", MIB);
    cluster.node(1).read(&film).await;
    let output = tokio::process::Command::new("curl")
        .args(["-sS", "--max-time", "20", "--http2-prior-knowledge", "-o"])
        .args([
            "/dev/null",
            "-w",
            "%{http_version} %{http_code} %{size_download}",
        ])
        .arg(format!("http://{address}/film"))
        .output()
        .await
        .expect("curl is installed");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(said, format!("2 200 {MIB}"), "{output:?}");

    // A body that the head does not tell of, which the origin is to judge.
    let mut curl = tokio::process::Command::new("curl")
        .args(["-sS", "--max-time", "20", "--http2-prior-knowledge", "-o"])
        .args(["/dev/null", "-X", "GET", "-T", "-"])
        .args(["-w", "%header{x-cache}"])
        .arg(format!("http://{address}/film"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("curl is installed");
    let mut stdin = curl.stdin.take().expect("it is piped");
    stdin.write_all(b"a question").await.unwrap();
    drop(stdin);
    let output = curl.wait_with_output().await.unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), "PASS");
}

/// A shell's limit of descriptors is raised to what the system allows; where
/// that is too little for the memory that may be used, it is said.
#[tokio::test(flavor = "multi_thread")]
async fn descriptors_are_raised_to_the_hard_limit() {
    let dir = tempfile::tempdir().unwrap();
    let script = dir.path().join("limited");
    let program = binary("pingora-slice");
    let text = format!(
        "#!/bin/sh\nulimit -Sn 256 && ulimit -Hn 777 && exec '{}' \"$@\"\n",
        program.display()
    );
    std::fs::write(&script, text).unwrap();
    std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).unwrap();
    let cluster = Options::alone().program(script).start().await;
    let page = Ask::get("/metrics")
        .send(cluster.node(1).metrics_address())
        .await;
    let page = page.unwrap().text();
    assert!(page.contains("\nprocess_max_fds 777\n"), "{page}");
    assert!(cluster.node(1).log().contains("fewer descriptors"));
}
