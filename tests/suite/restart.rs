//! What survives: the disk store and the purges, whatever the end was like.

use std::time::Duration;

use pingora_slice_tests::disk::SlowDisk;
use pingora_slice_tests::{Ask, Fault, Film, MIB, Options, SLICE_BYTES, TestCluster, Validators};

/// Everything is on this node's disk, as far as it says.
async fn until_on_disk(cluster: &TestCluster, film: &Film) {
    let slices = film.slices() as f64;
    let node = cluster.node(1);
    node.until("the slices are on disk", async || {
        cluster.metric_sum("l2_writes_total").await >= slices
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_disk_store_survives_any_end() {
    let mut cluster = TestCluster::alone().await;
    let film = cluster.origin.publish("/film", 16 * MIB);
    cluster.node(1).read(&film).await;
    until_on_disk(&cluster, &film).await;
    assert!(
        cluster.node_mut(1).terminate().await.success(),
        "SIGTERM ends with 0"
    );
    cluster.node_mut(1).restart().await;
    cluster.node(1).read(&film).await;
    assert!(
        film.fetches_per_slice().iter().all(|n| *n == 1),
        "after SIGTERM"
    );
    cluster.node_mut(1).kill();
    cluster.node_mut(1).restart().await;
    cluster.node(1).read(&film).await;
    assert!(
        film.fetches_per_slice().iter().all(|n| *n == 1),
        "after kill -9"
    );
    assert!(cluster.node(1).metric("slices_total{source=\"l2\"}").await > 0.0);
}

/// What is asked for most is answered from memory alone. It stays on disk all the
/// same, so that a restart does not cost the origin just that.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_hottest_is_still_there_after_a_restart() {
    const DISK: u64 = 128 * MIB;
    let mut cluster = Options::alone()
        .set("l1_cache_size_bytes", 16 * MIB)
        .set("l2_cache_size_bytes", DISK)
        .start()
        .await;
    let hot = cluster.origin.publish("/hot", 2 * MIB);
    let node = cluster.node(1);
    node.read(&hot).await;
    for n in 0..3 * DISK / (4 * MIB) {
        let other = cluster.origin.publish(&format!("/other{n}"), 4 * MIB);
        node.read(&other).await;
        node.read(&hot).await;
    }
    let slices = hot.slices();
    assert_eq!(hot.fetches(), slices, "{:#?}", hot.seen());
    cluster.node_mut(1).terminate().await;
    cluster.node_mut(1).restart().await;
    cluster.node(1).read(&hot).await;
    assert_eq!(hot.fetches(), slices, "{:#?}", hot.seen());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_that_is_restarted_as_one_remembers_everything() {
    let mut cluster = TestCluster::start(3).await;
    let kept = cluster.origin.publish("/kept", 8 * MIB);
    let purged = cluster.origin.publish("/purged", MIB);
    cluster.read_from_every_node(&kept).await;
    cluster.read_from_every_node(&purged).await;
    until_on_disk(&cluster, &kept).await;
    purged.change();
    let purge = cluster.node(3).purge("/purged").await;
    cluster.origin.forget_log();
    cluster.restart_all().await;
    cluster.until_applied(&purge).await;
    cluster.read_from_every_node(&purged).await;
    cluster.read_from_every_node(&kept).await;
    assert_eq!(kept.fetches(), 0, "{:#?}", kept.seen());
}

/// A node that comes back has to tell what it had applied before: no other entry
/// comes, and a hard purge is among those that it applies again.
#[tokio::test(flavor = "multi_thread")]
async fn a_follower_that_comes_back_to_a_quiet_cluster_gets_ready() {
    let mut cluster = TestCluster::start(3).await;
    let purge = cluster
        .node(1)
        .purge_with("/film", &[("X-Purge-Mode", "hard")])
        .await;
    cluster.until_applied(&purge).await;
    let (_, status) = cluster.node(1).admin("GET", "/v1/cluster", None).await;
    let leader = status["leader"].as_u64().unwrap();
    let follower = if leader == 1 { 2 } else { 1 };
    cluster.node_mut(follower).kill();
    cluster.node_mut(follower).restart().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_machine_remembers_its_purges() {
    let mut cluster = TestCluster::alone().await;
    let film = cluster.origin.publish("/film", 2 * MIB);
    cluster.node(1).read(&film).await;
    until_on_disk(&cluster, &film).await;
    film.change();
    cluster.node(1).purge("/film").await;
    cluster.node_mut(1).restart().await;
    cluster.node(1).read(&film).await;
}

/// Others have filled the disk: purges are kept all the same, the node goes on, and so
/// it does when the disk is full a second time.
#[tokio::test(flavor = "multi_thread")]
async fn one_machine_keeps_its_purges_on_a_full_disk() {
    let mut cluster = Options::alone().small_disks(64 * MIB).start().await;
    let film = cluster.origin.publish("/film", SLICE_BYTES);
    let urls: Vec<String> = (0..500).map(|n| format!("http://films.test/{n}")).collect();
    for _ in 0..2 {
        let Some(disk) = cluster.node(1).disk() else {
            return eprintln!("NOT TESTED, no disk can be mounted");
        };
        disk.fill();
        for _ in 0..5 {
            let many = serde_json::json!({"urls": urls});
            let (status, said) = cluster.node(1).admin("POST", "/v1/purge", Some(many)).await;
            assert_eq!(status, 200, "{said}");
            cluster.read_from_every_node(&film).await;
            film.change();
            cluster.node(1).purge("/film").await;
        }
        cluster.read_from_every_node(&film).await;
        cluster.node(1).disk().expect("as before").relieve();
        // The reserve is held again from the next purge on.
        cluster.node(1).purge("/other").await;
    }
    film.change();
    let purge = cluster.node(1).purge("/film").await;
    cluster.node_mut(1).restart().await;
    cluster.until_applied(&purge).await;
    cluster.read_from_every_node(&film).await;
}

/// Writing to disk takes as long as it takes: what is asked for comes from the origin,
/// memory and the disk meanwhile, and what the queue has no room for is not kept.
#[tokio::test(flavor = "multi_thread")]
async fn nobody_waits_for_a_disk_that_takes_no_writes() {
    let dir = tempfile::tempdir().expect("temp dir");
    let disk = match SlowDisk::mount(dir.path(), 512 * MIB) {
        Ok(disk) => disk,
        Err(reason) => return eprintln!("NOT TESTED, no disk can be mounted: {reason}"),
    };
    let cluster = Options::alone()
        .set("l1_cache_size_bytes", 16 * MIB)
        .set("l2_cache_dir", format!("{:?}", dir.path().join("l2")))
        .set("l2_cache_size_bytes", 256 * MIB)
        .start()
        .await;
    let node = cluster.node(1);
    let stored = cluster.origin.publish("/stored", 16 * MIB);
    node.read(&stored).await;
    until_on_disk(&cluster, &stored).await;

    let before = node.purge("/other").await;

    let held_up = disk.hold_up_writes();
    let written = node.metric("l2_writes_total").await;
    // More than memory and the queue have room for.
    let film = cluster.origin.publish("/film", 96 * MIB);
    node.read(&film).await;
    assert_eq!(film.fetches(), film.slices());
    node.read(&stored).await;
    assert_eq!(stored.fetches(), stored.slices(), "read from disk");
    // What cannot be kept is not promised, nor does it wait for long.
    let purges = (0..4).map(|_| node.purge_with("/other", &[]));
    let purges = futures::future::join_all(purges).await;
    assert!(purges.iter().all(|purged| purged.status == 503));
    node.read(&stored).await;
    assert_eq!(node.metric("l2_writes_total").await, written, "held up");
    assert!(node.metric("l2_writes_dropped_total").await > 0.0);

    drop(held_up);
    film.change();
    let purge = node.purge("/film").await;
    // Before it came the one that the disk had been given, and none of those behind that.
    assert_eq!(purge.index, before.index + 2);
    node.read(&film).await;
    node.until("the disk takes writes again", async || {
        node.metric("l2_writes_total").await > written
    })
    .await;
    node.read(&film).await;
}

/// A new slice size is for new generations: the old ones stay good.
#[tokio::test(flavor = "multi_thread")]
async fn the_slice_size_can_be_changed_without_losing_the_cache() {
    let mut cluster = Options::alone().set("slice_size", "262144").start().await;
    let film = cluster.origin.publish("/film", 4 * MIB);
    cluster.node(1).read(&film).await;
    until_on_disk(&cluster, &film).await;
    cluster.node_mut(1).set("slice_size", "1m");
    cluster.node_mut(1).restart().await;
    cluster.node(1).read(&film).await;
    assert!(film.fetches_per_slice().iter().all(|n| *n == 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_disk_costs_a_fetch_and_no_wrong_byte() {
    let mut cluster = TestCluster::alone().await;
    let film = cluster.origin.publish("/film", 8 * MIB);
    cluster.node(1).read(&film).await;
    until_on_disk(&cluster, &film).await;
    cluster.node_mut(1).kill();
    spoil(&cluster.node(1).l2_dir());
    cluster.node_mut(1).restart().await;
    cluster.node(1).read(&film).await;
    cluster.node(1).read(&film).await;
}

/// What does not fit into memory is given from disk, each byte of it checked.
#[tokio::test(flavor = "multi_thread")]
async fn slices_on_disk_are_given_from_there_and_fetched_again_when_damaged() {
    let cluster = Options::alone()
        .set("l1_cache_size_bytes", 2 * SLICE_BYTES)
        .start()
        .await;
    let node = cluster.node(1);
    let film = cluster.origin.publish("/film", 8 * MIB);
    let slices = film.length() as f64 / SLICE_BYTES as f64;
    let from_disk = async || node.metric("slices_total{source=\"l2\"}").await;
    node.read(&film).await;
    until_on_disk(&cluster, &film).await;
    // The second time where they lie is known.
    for read in 1..=2 {
        node.read(&film).await;
        let given = from_disk().await;
        assert!(given > f64::from(read) * slices / 2.0, "{given}");
    }
    assert_eq!(film.fetches() as f64, slices);
    spoil(&node.l2_dir());
    node.read(&film).await;
    assert!(film.fetches() as f64 > slices * 1.5);
}

/// A node that has a film on disk, its first slice damaged, of an origin without ranges.
async fn with_a_damaged_first_slice(validators: Validators) -> (TestCluster, Film) {
    let mut cluster = TestCluster::alone().await;
    let film = cluster.origin.publish("/film", 8 * MIB);
    film.validators(validators).always(Fault::IgnoreRange);
    cluster.node(1).read(&film).await;
    until_on_disk(&cluster, &film).await;
    cluster.node_mut(1).terminate().await;
    spoil_first_slice(&cluster.node(1).l2_dir());
    cluster.node_mut(1).restart().await;
    (cluster, film)
}

/// A body that brings something else holds up nobody who wants what is here.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_on_disk_does_not_wait_for_a_body_under_way() {
    let (cluster, film) = with_a_damaged_first_slice(Validators::Strong).await;
    film.behave().always(Fault::StallAfter(1000));
    let node = cluster.node(1);
    let stalled = node.read_range(&film, 0, MIB);
    let served = async {
        film.until("the body is under way", |log| log.len() > 1)
            .await;
        node.read_range(&film, 4 * MIB, 6 * MIB).await;
    };
    tokio::select! {
        _ = stalled => panic!("the first slice was not damaged"),
        served = tokio::time::timeout(Duration::from_secs(20), served) => served.unwrap(),
    }
}

/// Nor does a body that has come to what is here, for a slice before it.
#[tokio::test(flavor = "multi_thread")]
async fn a_body_begun_for_a_damaged_slice_holds_up_nobody_after_it() {
    let (cluster, film) = with_a_damaged_first_slice(Validators::Strong).await;
    let before = film.fetches();
    let mut gate = film.hold_at(SLICE_BYTES + 1000);
    let node = cluster.node(1);
    node.read_range(&film, 0, SLICE_BYTES).await;
    gate.holds(1).await;
    let rest = node.read_range(&film, SLICE_BYTES, film.length());
    tokio::time::timeout(Duration::from_secs(20), rest)
        .await
        .unwrap();
    assert_eq!(film.fetches() - before, 1);
}

/// What came as it is, though the origin would have encoded it for this client, is
/// asked for as it is again.
#[tokio::test(flavor = "multi_thread")]
async fn a_body_begun_for_a_damaged_slice_is_of_the_same_bytes() {
    let (cluster, film) = with_a_damaged_first_slice(Validators::Strong).await;
    film.behave()
        .always(Fault::GzipWhereTaken)
        .always(Fault::IgnoreRange);
    let (node, before) = (cluster.node(1), film.fetches());
    let purges = node.metric("purge_index").await;
    let ask = Ask::get("/film").header("Accept-Encoding", "gzip");
    let reply = node.ask(ask).await;
    assert_eq!(reply.header("content-encoding"), "");
    assert!(reply.body == film.content().all());
    assert_eq!(film.fetches() - before, 1);
    assert_eq!(node.metric("purge_index").await, purges);
}

/// What nothing ties to a later answer is had anew: nobody has seen a change at the
/// origin, which is asked once, and nothing is purged.
#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_slice_of_no_version_is_no_change() {
    let (cluster, film) = with_a_damaged_first_slice(Validators::Nothing).await;
    let (node, before) = (cluster.node(1), film.fetches());
    let purges = node.metric("purge_index").await;
    let reply = node.get("/film").await;
    assert_eq!(reply.header("x-cache"), "MISS", "nothing was lost");
    assert!(reply.body == film.content().all());
    assert_eq!(film.fetches() - before, 1);
    assert_eq!(node.metric("purge_index").await, purges);
    assert_eq!(node.metric("failed_subrequests_total").await, 0.0);
}

/// Flips one bit of the first slice that was written.
fn spoil_first_slice(dir: &std::path::Path) {
    let regions = files_below(&dir.join("regions"));
    let first = regions.iter().min().unwrap();
    let mut bytes = std::fs::read(first).unwrap();
    bytes[1000] ^= 4;
    std::fs::write(first, bytes).unwrap();
}

/// Flips one bit in each 10 000 bytes of every big file.
fn spoil(dir: &std::path::Path) {
    let mut damaged = 0;
    for file in files_below(dir) {
        let mut bytes = std::fs::read(&file).unwrap();
        if bytes.len() as u64 >= MIB {
            bytes.iter_mut().step_by(10_000).for_each(|byte| *byte ^= 4);
            std::fs::write(&file, bytes).unwrap();
            damaged += 1;
        }
    }
    assert!(damaged > 0, "no region files were found");
}

fn files_below(dir: &std::path::Path) -> Vec<std::path::PathBuf> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        // fjall's own files are its business; a store that cannot open its
        // index starts afresh, which is another test.
        if path.is_dir() && !path.to_string_lossy().contains("index") {
            files.extend(files_below(&path));
        } else if path.is_file() {
            files.push(path);
        }
    }
    files
}

/// What a restart left on disk is explained as such, until it is read.
#[tokio::test(flavor = "multi_thread")]
async fn an_explanation_says_which_store_holds_what() {
    let mut cluster = TestCluster::alone().await;
    let film = cluster.origin.publish("/film", 2 * SLICE_BYTES);
    cluster.node(1).read(&film).await;
    until_on_disk(&cluster, &film).await;
    cluster.node_mut(1).terminate().await;
    cluster.node_mut(1).spawn();
    cluster.node_mut(1).until_ready().await;
    let stores = async || {
        let path = "/v1/explain?url=http://films.test/film";
        let (status, explained) = cluster.node(1).admin("GET", path, None).await;
        assert_eq!(status, 200);
        let of = |value: &serde_json::Value| value["stored_in"].as_str().map(str::to_owned);
        let slices = explained["slices"].as_array().expect("a list").iter();
        [&explained["manifest"]]
            .into_iter()
            .chain(slices)
            .map(of)
            .collect::<Vec<_>>()
    };
    let all = |store: &str| vec![Some(store.to_owned()); 3];
    assert_eq!(stores().await, all("l2"));
    cluster.node(1).read(&film).await;
    assert_eq!(stores().await, all("l1"));
}

/// Promise P1: what a machine alone purges while it does without its disk store.
#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_was_left_unused_brings_nothing_back() {
    let mut cluster = TestCluster::alone().await;
    let film = cluster.origin.publish("/film", 2 * SLICE_BYTES);
    cluster.node(1).read(&film).await;
    until_on_disk(&cluster, &film).await;
    for enabled in [false, true] {
        cluster.node_mut(1).terminate().await;
        cluster.node_mut(1).set("enable_l2_cache", enabled);
        cluster.node_mut(1).spawn();
        cluster.node_mut(1).until_ready().await;
        if !enabled {
            film.change();
            cluster.node(1).purge("/film").await;
        }
        cluster.node(1).read(&film).await;
    }
}
