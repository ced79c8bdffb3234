//! SIGHUP: what takes effect without a start, and what is only named. No test
//! waits for time: what was read again says so in the log.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::sync::Arc;

use pingora_slice_tests::cluster::{Node, ca, issue_certificate};
use pingora_slice_tests::http::{Ask, SILENCE};
use pingora_slice_tests::{Fault, MIB, Options, TestCluster};
use rustix::process::Signal;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use tokio::task::block_in_place;

/// Has the configuration read again, and waits until the log says `what` once more.
async fn read_again(node: &Node, what: &str) {
    let said = || node.log().matches(what).count();
    let before = said();
    node.write_config();
    node.signal(Signal::HUP);
    node.until(what, async || said() > before).await;
}

/// Has changed keys take effect.
async fn reload(cluster: &mut TestCluster, keys: &[(&str, &str)]) {
    let node = cluster.node_mut(1);
    for (key, value) in keys {
        node.set(key, value);
    }
    read_again(node, "configuration read again").await;
}

/// `ttl` of an answer's Cache-Status, seconds.
fn ttl(status: &str) -> u64 {
    let ttl = status
        .split("; ")
        .find_map(|part| part.strip_prefix("ttl="));
    ttl.and_then(|ttl| ttl.parse().ok())
        .unwrap_or_else(|| panic!("{status}"))
}

/// The purge section and the admin API's token are taken, what waits for a start
/// is named each time, and a file with a problem changes nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_file_is_taken_as_far_as_it_can_be_or_not_at_all() {
    let mut cluster = Options::alone()
        .set("purge", "{enabled: true, auth_token: before}")
        .start()
        .await;
    let admin_address = cluster.node(1).admin_address();
    let node = cluster.node_mut(1);
    let purge = |token: &str| {
        let token = format!("Bearer {token}");
        Ask::new("PURGE", "/film").header("authorization", token)
    };
    let status = async |token: &str| {
        let ask = Ask::get("/v1/cluster").header("authorization", format!("Bearer {token}"));
        ask.send(admin_address).await.unwrap().status
    };
    node.set("purge", "{enabled: true, auth_token: after}");
    node.set(
        "admin",
        format!("{{address: \"{admin_address}\", auth_token: after}}"),
    );
    node.set("drain_timeout", "7s");
    read_again(node, "takes effect at the next start").await;
    let log = node.log();
    let named = log.lines().find(|line| line.contains("at the next start"));
    let named = named.unwrap();
    assert!(named.contains("drain_timeout"), "{named}");
    assert!(
        !named.contains("purge") && !named.contains("admin"),
        "{named}"
    );
    let taken = log.lines().find(|line| line.contains("read again"));
    let taken = taken.unwrap();
    assert!(
        taken.contains("purge") && taken.contains("admin.auth_token"),
        "{taken}"
    );
    assert!(!taken.contains("drain_timeout"), "{taken}");
    assert_eq!(node.ask(purge("before")).await.status, 401);
    assert_eq!(node.ask(purge("after")).await.status, 200);
    assert_eq!(status("after").await, 200);
    assert_eq!(status(pingora_slice_tests::cluster::ADMIN_TOKEN).await, 401);
    // It still waits.
    read_again(node, "drain_timeout").await;

    node.set("purge", "{enabled: true, auth_token: last}");
    node.set("slice_size", "1");
    read_again(node, "configuration not changed").await;
    assert!(node.log().contains("slice_size: 1: "), "it says why");
    assert_eq!(node.ask(purge("last")).await.status, 401);
    assert_eq!(node.ask(purge("after")).await.status, 200);
}

/// Another `cache_ttl` is for what is stored from now on.
#[tokio::test(flavor = "multi_thread")]
async fn another_ttl_is_for_what_comes_next() {
    let mut cluster = Options::alone().set("cache_ttl", "1h").start().await;
    let films = ["/before", "/after"].map(|path| {
        let film = cluster.origin.publish(path, MIB);
        film.without("cache-control");
        film
    });
    cluster.node(1).read(&films[0]).await;
    reload(&mut cluster, &[("cache_ttl", "60s")]).await;
    cluster.node(1).read(&films[1]).await;
    let hit = cluster.node(1).get("/after").await;
    let status = hit.header("cache-status");
    assert!(status.contains("hit") && ttl(status) <= 60, "{status}");
    // What was stored keeps the lifetime that it has, and its bytes.
    let hit = cluster.node(1).get("/before").await;
    let status = hit.header("cache-status");
    assert!(status.contains("hit") && ttl(status) > 60, "{status}");
    assert!(films[0].fetches_per_slice().iter().all(|n| *n == 1));

    let film = cluster.origin.publish("/not", MIB);
    film.without("cache-control");
    reload(&mut cluster, &[("default_freshness", "none")]).await;
    let answer = cluster.node(1).get("/not").await;
    assert_eq!(answer.header("x-cache"), "PASS");
}

/// Other patterns are for objects that are not there yet: what is stays, and a
/// download that runs ends as it began.
#[tokio::test(flavor = "multi_thread")]
async fn other_patterns_are_for_what_comes_next() {
    let mut cluster = Options::alone()
        .set("slice_patterns", "[\"^/sliced/\"]")
        .start()
        .await;
    let publish = |path: &str| cluster.origin.publish(path, 8 * MIB);
    let (sliced, whole, held) = (
        publish("/sliced/a"),
        publish("/whole/a"),
        publish("/whole/b"),
    );
    let (now_sliced, now_whole) = (publish("/whole/c"), publish("/sliced/c"));
    for film in [&sliced, &whole] {
        cluster.node(1).read(film).await;
    }
    let is_by_range = |film: &pingora_slice_tests::origin::Film| {
        let seen = film.seen();
        assert!(!seen.is_empty());
        seen.iter().all(|seen| !seen.header("range").is_empty())
    };
    assert!(is_by_range(&sliced) && !is_by_range(&whole));
    let mut gate = held.hold_at(6 * MIB);
    let mut download = cluster.node(1).reading(&held);
    gate.holds_up(&mut download).await;

    reload(&mut cluster, &[("slice_patterns", "[\"^/whole/\"]")]).await;
    gate.open();
    let reply = download.await.unwrap().unwrap();
    assert_eq!(reply.body.len() as u64, held.length());
    assert_eq!((held.fetches(), is_by_range(&held)), (1, false));
    cluster.origin.forget_log();
    for film in [&sliced, &whole, &held] {
        cluster.node(1).read(film).await;
        assert_eq!(film.fetches(), 0, "{:#?}", film.seen());
    }
    for film in [&now_sliced, &now_whole] {
        cluster.node(1).read(film).await;
    }
    assert!(is_by_range(&now_sliced) && !is_by_range(&now_whole));
}

/// `caching` as a whole: also what names an object, for requests and purges alike.
#[tokio::test(flavor = "multi_thread")]
async fn other_rules_of_caching_hold_for_requests_and_purges() {
    let mut cluster = Options::alone().start().await;
    let film = cluster.origin.publish("/film", MIB);
    let from = async |cluster: &TestCluster, target: &str| {
        let answer = cluster.node(1).get(target).await;
        answer.header("x-cache").to_owned()
    };
    assert_eq!(from(&cluster, "/film?utm=1").await, "MISS");
    assert_eq!(from(&cluster, "/film?utm=2").await, "MISS");
    let no_cache = Ask::get("/film?utm=1").header("cache-control", "no-cache");
    let demanded = cluster.node(1).ask(no_cache.clone()).await;
    assert_eq!(demanded.header("x-cache"), "REVALIDATED");

    let caching = "{query: {ignore: [utm]}, request_directives: [], show_key: true}";
    reload(&mut cluster, &[("caching", caching)]).await;
    assert_eq!(from(&cluster, "/film?utm=1").await, "MISS");
    assert_eq!(from(&cluster, "/film?utm=2").await, "HIT");
    let undemanded = cluster.node(1).ask(no_cache).await;
    assert_eq!(undemanded.header("x-cache"), "HIT");
    let status = undemanded.header("cache-status");
    assert!(status.contains("/film\""), "{status}");

    film.change();
    cluster.node(1).purge("/film?utm=3").await;
    cluster.node(1).read(&film).await;
}

/// Retries and the log of faults, too.
#[tokio::test(flavor = "multi_thread")]
async fn retries_and_the_log_of_faults_are_changed() {
    let mut cluster = Options::alone()
        .set("max_retries", 0)
        .set("stitch_log", "{enabled: false, pace: 0}")
        .start()
        .await;
    let broken = cluster.origin.publish("/broken", 3 * MIB);
    broken.once_from(MIB, Fault::CloseAfter(1000));
    let answer = Ask::get("/broken").send(cluster.node(1).address()).await;
    assert!(answer.is_err(), "{answer:?}");
    assert!(!cluster.node(1).log().contains("stitching fault"));

    let log = "{enabled: true, pace: 0}";
    reload(&mut cluster, &[("max_retries", "3"), ("stitch_log", log)]).await;
    let film = cluster.origin.publish("/film", 3 * MIB);
    film.once_from(MIB, Fault::CloseAfter(1000));
    cluster.node(1).read(&film).await;
    assert!(cluster.node(1).log().contains("stitching fault"));
}

/// A renewed certificate is shown to who connects then; who is connected goes on.
/// A pair that does not match changes nothing at all.
#[tokio::test(flavor = "multi_thread")]
async fn a_renewed_certificate_is_shown_to_new_connections() {
    let mut cluster = Options::alone().prepare().await;
    let dir = cluster.dir().to_owned();
    ca(&dir, &["init"]);
    for id in [1, 2] {
        issue_certificate(&dir, id);
    }
    let file = |name: &str| dir.join(name);
    let copy = |from: &str, to: &str| std::fs::copy(file(from), file(to)).unwrap();
    copy("node1.pem", "site.pem");
    copy("node1.key", "site.key");
    let [first, second] =
        ["node1.pem", "node2.pem"].map(|name| CertificateDer::from_pem_file(file(name)).unwrap());
    let address = cluster.node(1).address();
    let listen = |cert: &str, key: &str| {
        let (cert, key) = (file(cert), file(key));
        format!("[{{address: \"{address}\", tls: {{cert: {cert:?}, key: {key:?}}}}}]")
    };
    let node = cluster.node_mut(1);
    node.set("listen", listen("site.pem", "site.key"));
    node.spawn();
    node.until_ready().await;
    let film = cluster.origin.publish("/film", 1000);
    film.without("cache-control");
    let connect = || Connection::new(address, &file("ca.pem"));

    let mut old = connect();
    assert_eq!(old.certificate(), first);
    assert!(ttl(&old.cache_status("/film")) > 60);
    copy("node2.pem", "site.pem");
    let node = cluster.node_mut(1);
    node.set("cache_ttl", "60s");
    read_again(node, "configuration not changed").await;
    assert!(node.log().contains("listen[0].tls.key"), "it says why");
    let mut same = connect();
    assert_eq!(same.certificate(), first);
    let other = cluster.origin.publish("/other", 1000);
    other.without("cache-control");
    assert!(ttl(&same.cache_status("/other")) > 60, "nothing is changed");

    copy("node2.key", "site.key");
    read_again(cluster.node(1), "listen.tls").await;
    let mut new = connect();
    assert_eq!(new.certificate(), second);
    for connection in [&mut old, &mut same, &mut new] {
        let status = connection.cache_status("/film");
        assert!(status.contains("hit"), "{status}");
    }

    // Other files are as good as renewed ones.
    let node = cluster.node_mut(1);
    node.set("listen", listen("node1.pem", "node1.key"));
    read_again(node, "listen.tls").await;
    assert_eq!(connect().certificate(), first);
    assert!(!cluster.node(1).log().contains("at the next start"));
}

/// A connection of TLS for one request after another, of which each name and each
/// signature is verified.
struct Connection(StreamOwned<ClientConnection, TcpStream>);

impl Connection {
    fn new(address: SocketAddr, authority: &Path) -> Connection {
        let mut roots = RootCertStore::empty();
        let authority = CertificateDer::from_pem_file(authority).unwrap();
        roots.add(authority).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        // Of its own: no connection goes on with another's session.
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let name = ServerName::from(address.ip());
        let session = ClientConnection::new(Arc::new(config), name).unwrap();
        block_in_place(|| {
            let socket = TcpStream::connect(address).unwrap();
            socket.set_read_timeout(Some(SILENCE)).unwrap();
            let mut stream = StreamOwned::new(session, socket);
            while stream.conn.is_handshaking() {
                stream.conn.complete_io(&mut stream.sock).unwrap();
            }
            Connection(stream)
        })
    }

    fn certificate(&self) -> CertificateDer<'static> {
        self.0.conn.peer_certificates().unwrap()[0]
            .clone()
            .into_owned()
    }

    /// Asks for a film and reads all of the answer; its Cache-Status.
    fn cache_status(&mut self, path: &str) -> String {
        let mut head = Vec::new();
        block_in_place(|| {
            let request = format!("GET {path} HTTP/1.1\r\nHost: films.test\r\n\r\n");
            self.0.write_all(request.as_bytes()).unwrap();
            let mut byte = [0];
            while !head.ends_with(b"\r\n\r\n") {
                self.0.read_exact(&mut byte).unwrap();
                head.push(byte[0]);
            }
            let mut body = vec![0; field(&head, "content-length").parse().unwrap()];
            self.0.read_exact(&mut body).unwrap();
        });
        assert!(head.starts_with(b"HTTP/1.1 200 "));
        field(&head, "cache-status")
    }
}

/// A field of an answer's head.
fn field(head: &[u8], name: &str) -> String {
    let head = String::from_utf8_lossy(head);
    let mut fields = head.lines().filter_map(|line| line.split_once(": "));
    let found = fields.find(|(have, _)| have.eq_ignore_ascii_case(name));
    found.unwrap_or_else(|| panic!("{head}")).1.to_owned()
}
