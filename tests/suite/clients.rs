//! Programs that people really download with, and real files.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use futures::future::join_all;
use futures::stream::{self, StreamExt};
use pingora_slice_tests::{Ask, MIB, Options, TestCluster};

/// Files of the tree that are read through the nodes.
const TREE_FILES: usize = 3000;

/// Runs a client to its end; false when it is not installed.
async fn run(program: &str, args: &[&str], dir: &Path) -> bool {
    let mut command = Command::new(program);
    command.args(args).current_dir(dir).stdin(Stdio::null());
    let output = tokio::task::spawn_blocking(move || command.output())
        .await
        .unwrap();
    let output = match output {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            // `make test` installs it; a bare `cargo test` does without.
            println!("SKIPPED: {program} is not installed");
            return false;
        }
        output => output.unwrap(),
    };
    assert!(
        output.status.success(),
        "{program}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    true
}

#[tokio::test(flavor = "multi_thread")]
async fn curl_wget_and_aria2_get_every_byte() {
    let cluster = TestCluster::start(3).await;
    let film = cluster.origin.publish("/film", 48 * MIB + 123);
    let whole = film.content().all();
    let dir = tempfile::tempdir().unwrap();
    let url = |id: u64| format!("http://{}/film", cluster.node(id).address());
    let host = "Host: films.test";
    let got = |name: &str| assert!(fs::read(dir.path().join(name)).unwrap() == whole, "{name}");

    if run(
        "curl",
        &["-sSf", "-H", host, "-o", "by-curl", &url(1)],
        dir.path(),
    )
    .await
    {
        got("by-curl");
        // What an aborted download left, continued.
        fs::write(dir.path().join("by-curl"), &whole[..10_000_000]).unwrap();
        run(
            "curl",
            &["-sSf", "-H", host, "-C", "-", "-o", "by-curl", &url(2)],
            dir.path(),
        )
        .await;
        got("by-curl");
    }
    fs::write(dir.path().join("by-wget"), &whole[..20_000_001]).unwrap();
    let header = format!("--header={host}");
    if run(
        "wget",
        &["-q", "-c", &header, "-O", "by-wget", &url(3)],
        dir.path(),
    )
    .await
    {
        got("by-wget");
    }
    let aria = [
        "-q",
        "-x8",
        "-s8",
        "-k1M",
        &header,
        "-o",
        "by-aria",
        &url(1),
    ];
    if run("aria2c", &aria, dir.path()).await {
        got("by-aria");
    }
    let counts = film.fetches_per_slice();
    assert!(counts.iter().all(|n| *n == 1), "{counts:?}");
}

/// Regular files with plain names, in a stable order.
fn files(dir: &Path, found: &mut Vec<PathBuf>) {
    let mut entries: Vec<PathBuf> = fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .collect();
    entries.sort();
    for path in entries {
        let Ok(meta) = fs::symlink_metadata(&path) else {
            continue;
        };
        let plain = |c: char| c.is_ascii_alphanumeric() || "/._-".contains(c);
        if meta.is_dir() {
            files(&path, found);
        } else if meta.is_file()
            && meta.len() < 4 * MIB
            && path.to_str().is_some_and(|path| path.chars().all(plain))
        {
            found.push(path);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tree_of_real_files_is_the_same_through_every_node() {
    let cluster = TestCluster::start(3).await;
    cluster.origin.publish_tree("/tree", "/usr/share");
    let mut tree = Vec::new();
    files(Path::new("/usr/share"), &mut tree);
    assert!(!tree.is_empty(), "no files below /usr/share");
    // Evenly over the whole tree.
    let step = tree.len().div_ceil(TREE_FILES);
    let tree: Vec<&PathBuf> = tree.iter().step_by(step).collect();
    let reads = tree
        .iter()
        .flat_map(|path| cluster.nodes().iter().map(move |node| (path, node)));
    stream::iter(reads)
        .for_each_concurrent(16, async |(path, node)| {
            let target = format!(
                "/tree{}",
                path.strip_prefix("/usr/share")
                    .map(|p| format!("/{}", p.display()))
                    .unwrap()
            );
            let reply = node.get(&target).await;
            assert_eq!(reply.status, 200, "{target}");
            assert!(
                reply.body == fs::read(path).unwrap(),
                "node {}: {target}",
                node.id()
            );
        })
        .await;
    println!("{} files", tree.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gibibyte_through_small_memory() {
    let cluster = Options::cluster(3)
        .set("slice_size", "1m")
        .set("l1_cache_size_bytes", "32m")
        .set("l2_cache_size_bytes", "2g")
        .start()
        .await;
    let film = cluster.origin.publish("/film", 1024 * MIB);
    cluster.node(1).read(&film).await;
    join_all([2, 3].map(|id| cluster.node(id).read(&film))).await;
    let sent: u64 = film.seen().iter().map(|seen| seen.sent).sum();
    // On busy cores an owner may be late, is bypassed, and its slice costs one more.
    let late = film.length() / 20;
    assert!(
        (film.length()..=film.length() + late).contains(&sent),
        "each byte once: {sent} of {}",
        film.length()
    );
    let ends = Ask::get("/film").range("bytes=-1000");
    assert_eq!(cluster.node(2).ask(ends).await.status, 206);
}
