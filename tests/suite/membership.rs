//! Who belongs, who dies, who is kept out.

use std::process::{Command, Output, Stdio};

use pingora_slice_tests::cluster::{ADMIN_TOKEN, Ports, binary, ca, issue_certificate};
use pingora_slice_tests::relay::Link;
use pingora_slice_tests::{Ask, Fault, MIB, Options, TestCluster};

/// Promise P6, for each node in turn: the downloader's own node is the one that lives.
#[tokio::test(flavor = "multi_thread")]
async fn a_download_survives_the_death_of_any_other_node() {
    let mut cluster = TestCluster::start(3).await;
    for dying in [2, 3] {
        let film = cluster.origin.publish(&format!("/film{dying}"), 32 * MIB);
        let mut gate = film.hold_at(8 * MIB);
        let mut reading = cluster.node(1).reading(&film);
        gate.holds_up(&mut reading).await;
        cluster.node_mut(dying).kill();
        gate.open();
        let reply = reading.await.unwrap().unwrap();
        assert!(
            reply.body == film.content().all(),
            "the download was damaged"
        );
        cluster.read_from_every_node(&film).await;
        let counts = film.fetches_per_slice();
        assert!(
            counts.iter().all(|n| *n <= 2),
            "one more at most: {counts:?}"
        );
        let node = cluster.node(1);
        let lost = format!("a node is not reached peer={dying}");
        node.until("its end is logged", async || node.log().contains(&lost))
            .await;
        cluster.node_mut(dying).restart().await;
        cluster.read_from_every_node(&film).await;
        let node = cluster.node(1);
        let back = format!("a node is reached again peer={dying}");
        node.until("its return is logged", async || node.log().contains(&back))
            .await;
    }
}

/// A leader that reaches one of four others leads nobody, and must not keep that
/// one from voting: with it the two whom it does not reach are a majority.
#[tokio::test(flavor = "multi_thread")]
async fn a_leader_without_a_quorum_does_not_keep_others_from_electing() {
    let mut cluster = Options::cluster(5).relayed().start().await;
    let (_, status) = cluster.node(1).admin("GET", "/v1/cluster", None).await;
    let nodes = status["nodes"].as_array().unwrap();
    let leader = nodes.iter().find(|node| node["leader"] == true).unwrap();
    let leader = leader["id"].as_u64().unwrap();
    let others: Vec<u64> = (1..=5).filter(|id| *id != leader).collect();
    let (away, cut) = (others[1], [others[2], others[3]]);
    cluster.node_mut(away).kill();
    let links = cluster.links();
    let between = |a, b| a == leader && cut.contains(&b);
    links.set_where(Link::CUT, |from, to| between(from, to) || between(to, from));
    let node = cluster.node(cut[0]);
    node.until("a purge is answered", async || {
        node.purge_with("/film", &[]).await.status == 200
    })
    .await;
    links.heal();
    cluster.node(leader).purge("/film").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_node_alone_goes_on_answering() {
    let mut cluster = TestCluster::start(3).await;
    let film = cluster.origin.publish("/film", 8 * MIB);
    cluster.read_from_every_node(&film).await;
    cluster.node_mut(1).kill();
    cluster.node_mut(2).kill();
    let other = cluster.origin.publish("/other", 8 * MIB);
    cluster.node(3).read(&film).await;
    cluster.node(3).read(&other).await;
    let health = Ask::get("/health")
        .send(cluster.node(3).metrics_address())
        .await
        .unwrap();
    assert_eq!(health.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn edges_follow_without_voting() {
    let mut cluster = Options::cluster(3).edges(2).prepare().await;
    // One node to look for is enough for what founds nothing.
    let seed = cluster.node(2).peer_address();
    let edge = cluster.node_mut(5);
    let section = edge.setting("cluster").to_owned();
    let (before, rest) = section.split_once("seeds: [").expect("its seeds");
    let (_, after) = rest.split_once(']').expect("a list");
    edge.set("cluster", format!("{before}seeds: [\"{seed}\"]{after}"));
    for id in 1..=5 {
        cluster.node_mut(id).spawn();
    }
    for id in 1..=5 {
        cluster.node_mut(id).until_ready().await;
    }
    let film = cluster.origin.publish("/film", 4 * MIB);
    cluster.read_from_every_node(&film).await;
    assert!(film.fetches_per_slice().iter().all(|n| *n == 1));
    film.change();
    cluster.node(5).purge("/film").await;
    cluster.read_from_every_node(&film).await;
    let (status, json) = cluster.node(4).admin("GET", "/v1/cluster", None).await;
    assert_eq!(status, 200);
    assert_eq!(json["nodes"].as_array().unwrap().len(), 5, "{json}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drained_node_owns_nothing_and_still_answers() {
    let cluster = TestCluster::start(3).await;
    let film = cluster.origin.publish("/film", 8 * MIB);
    cluster.node(1).read(&film).await;
    let (status, json) = cluster
        .node(1)
        .admin("POST", "/v1/nodes/3/drain", None)
        .await;
    assert_eq!(status, 200, "{json}");
    cluster
        .node(1)
        .until("node 3 drains", async || {
            let (_, json) = cluster.node(2).admin("GET", "/v1/cluster", None).await;
            let nodes = json["nodes"].as_array().cloned().unwrap_or_default();
            nodes
                .iter()
                .any(|node| node["id"] == 3 && node["state"] == "draining")
        })
        .await;
    cluster.read_from_every_node(&film).await;
    let counts = film.fetches_per_slice();
    assert!(
        counts[0] <= 2 && counts[1..].iter().all(|n| *n == 1),
        "the old owner is asked first, but for the slice that comes with the manifest: {counts:?}"
    );
}

/// Promise P7: a stranger with a certificate of another authority learns and changes nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_of_another_authority_is_refused() {
    let mut cluster = TestCluster::start(3).await;
    let foreign = cluster.dir().join("foreign");
    std::fs::create_dir(&foreign).unwrap();
    ca(&foreign, &["init"]);
    issue_certificate(&foreign, 3);
    cluster.node_mut(3).kill();
    for name in ["node3.pem", "node3.key"] {
        std::fs::copy(foreign.join(name), cluster.dir().join(name)).unwrap();
    }
    cluster.node_mut(3).spawn();
    let film = cluster.origin.publish("/film", 2 * MIB);
    cluster.node(1).read(&film).await;
    film.change();
    let purged = cluster.node(1).purge("/film").await;
    assert_eq!(
        purged.json["fenced"],
        serde_json::json!([3]),
        "{}",
        purged.json
    );
    let ready = Ask::get("/ready")
        .send(cluster.node(3).metrics_address())
        .await;
    assert!(
        ready.is_err() || ready.unwrap().status == 503,
        "it holds no lease"
    );
    cluster.node(1).read(&film).await;
    cluster.node(2).read(&film).await;
}

/// A cluster that does not form says why, everywhere that one would look.
#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_that_does_not_form_says_why() {
    let mut cluster = Options::cluster(3).prepare().await;
    let foreign = cluster.dir().join("foreign");
    std::fs::create_dir(&foreign).unwrap();
    ca(&foreign, &["init"]);
    issue_certificate(&foreign, 2);
    let mut settings = cluster.node(2).setting("cluster").to_owned();
    for name in ["ca.pem", "node2.pem", "node2.key"] {
        settings = settings.replace(name, &format!("foreign/{name}"));
    }
    cluster.node_mut(2).set("cluster", settings);
    // Node 3 is not started at all.
    cluster.node_mut(1).spawn();
    cluster.node_mut(2).spawn();
    let node = cluster.node(1);
    let silent = cluster.node(3).peer_address();
    let reasons = [
        "certificate of another authority".to_owned(),
        format!("UDP {} and {} open?", silent.port(), silent.port() + 1),
    ];
    let all_in = |text: &str| reasons.iter().all(|reason| text.contains(reason));
    node.until("/ready says why", async || {
        let ready = Ask::get("/ready").send(node.metrics_address()).await;
        ready.is_ok_and(|reply| reply.status == 503 && all_in(&reply.text()))
    })
    .await;
    let mut status = Command::new(binary("pingora-slicectl"));
    let server = node.admin_address().to_string();
    status.args(["--server", &server, "--token", ADMIN_TOKEN, "status"]);
    let output = output_of(&mut status).await;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(all_in(&said) && said.contains("has not formed"), "{said}");
    node.until("the log says why", async || all_in(&node.log()))
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_processes_never_share_a_data_directory() {
    let cluster = TestCluster::start(3).await;
    // Its own ports, so that it is the directory that is refused.
    let config = cluster.dir().join("second.yaml");
    let ports = Ports::claim();
    let yaml = format!(
        "listen: \"{}\"\nupstream_address: \"{}\"\nenable_l2_cache: false\ncluster: {}\n",
        ports.at(0),
        cluster.origin.address(),
        cluster.node(2).setting("cluster").replace(
            &format!("listen: \"{}\"", cluster.node(2).peer_address()),
            &format!("listen: \"{}\"", ports.at(1))
        ),
    );
    std::fs::write(&config, yaml).unwrap();
    let output = output_of(Command::new(binary("pingora-slice")).arg(config)).await;
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("in use by another process"), "{said}");
    assert!(said.contains("cluster.data_dir"), "the remedy: {said}");
    let film = cluster.origin.publish("/film", MIB);
    cluster.read_from_every_node(&film).await;
}

async fn output_of(command: &mut Command) -> Output {
    let child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    tokio::task::spawn_blocking(|| child.wait_with_output())
        .await
        .unwrap()
        .unwrap()
}

/// A new disk under an old number would have forgotten its votes.
#[tokio::test(flavor = "multi_thread")]
async fn a_number_that_lost_its_disk_is_not_let_in_again() {
    let mut cluster = TestCluster::start(3).await;
    cluster.node_mut(3).kill();
    std::fs::remove_dir_all(cluster.node(3).data_dir()).unwrap();
    cluster.node_mut(3).spawn();
    let status = cluster.node_mut(3).until_exit().await;
    assert_eq!(status.code(), Some(1));
    let log = cluster.node(3).log();
    assert!(
        log.contains("node_id 3 belongs to another machine"),
        "{log}"
    );
    let film = cluster.origin.publish("/film", MIB);
    cluster.read_from_every_node(&film).await;
}

/// A probe by the command line tells a node with a lease from one without.
#[tokio::test(flavor = "multi_thread")]
async fn status_says_by_its_exit_code_whether_a_node_is_ready() {
    let mut cluster = TestCluster::start(3).await;
    let status = |cluster: &TestCluster, args: &[&str]| {
        let server = format!("http://{}", cluster.node(1).admin_address());
        let output = Command::new(binary("pingora-slicectl"))
            .args(["--server", &server, "--token", ADMIN_TOKEN, "status"])
            .args(args)
            .output()
            .unwrap();
        output.status.code()
    };
    assert_eq!(status(&cluster, &["--ready"]), Some(0));
    cluster.node_mut(2).kill();
    cluster.node_mut(3).kill();
    let node = cluster.node(1);
    node.until("the lease is over", async || {
        node.metric("lease_valid").await == 0.0
    })
    .await;
    assert_eq!(status(&cluster, &[]), Some(0));
    assert_eq!(status(&cluster, &["--ready"]), Some(1));
}

/// What its owner has lost may still be good for an origin that fails.
#[tokio::test(flavor = "multi_thread")]
async fn stale_is_served_where_the_owner_has_nothing_and_the_origin_fails() {
    let mut cluster = Options::cluster(3)
        .set("enable_l2_cache", false)
        .start()
        .await;
    let film = cluster.films_owned_by(2, 1, 1000).await.remove(0);
    film.header("Cache-Control", "max-age=1, stale-if-error=3600");
    cluster.node(1).read(&film).await;
    cluster.node_mut(2).kill();
    cluster.node_mut(2).spawn();
    cluster.node_mut(2).until_ready().await;
    film.always(Fault::Status(503));
    let node = cluster.node(1);
    node.until("it is stale", async || {
        let reply = node.get(film.path()).await;
        assert_eq!(reply.status, 200, "{:?}", reply.headers);
        assert_eq!(reply.body, film.content().all());
        reply.header("x-cache") == "STALE"
    })
    .await;
}
