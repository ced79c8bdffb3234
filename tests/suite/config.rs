//! A wrong configuration is refused whole, before anything is bound.

use std::net::TcpListener;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use pingora_slice_tests::cluster::{Ports, WAIT_MAX, binary, ca, issue_certificate};

fn start(yaml: &str, args: &[&str]) -> Output {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("pingora_slice.yaml"), yaml).unwrap();
    let mut child = Command::new(binary("pingora-slice"))
        .args(args)
        .current_dir(dir.path())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let started = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if started.elapsed() > WAIT_MAX {
            child.kill().unwrap();
            panic!("it goes on: {:?}", child.wait_with_output());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    child.wait_with_output().unwrap()
}

#[test]
fn all_problems_are_told_at_once_and_no_port_is_bound() {
    // Held here: binding it would be another problem than those expected.
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let yaml = format!(
        "listen: {}\nslice_size: 10\nmax_retrys: 3\nl1_cache_size_bytes: -5\n\
         default_freshness: sometimes\ncluster: {{node_id: 0}}\n",
        taken.local_addr().unwrap()
    );
    for args in [&[][..], &["--check-config"][..]] {
        let output = start(&yaml, args);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        for key in [
            "slice_size",
            "max_retrys",
            "l1_cache_size_bytes",
            "default_freshness",
            "node_id",
        ] {
            assert!(said.contains(key), "{key} is not told:\n{said}");
        }
        assert!(
            said.contains("max_retries"),
            "the remedy for a misspelt key:\n{said}"
        );
        assert!(!said.contains("in use"), "it tried to listen:\n{said}");
    }
}

#[test]
fn a_node_is_never_its_own_origin() {
    let yaml = "listen: 127.0.0.1:18999\nupstream_address: 127.0.0.1:18999\n";
    let output = start(yaml, &[]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("upstream_address"), "{said}");
}

#[test]
fn purging_without_a_token_is_for_loopback() {
    let open = "listen: 0.0.0.0:18999\nupstream_address: 127.0.0.1:1\npurge: {enabled: true}\n";
    let output = start(open, &["--check-config"]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let loopback = open.replace("0.0.0.0", "127.0.0.1");
    let output = start(&loopback, &["--check-config"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
}

#[test]
fn a_file_that_is_not_there_is_said_so() {
    let output = start("", &["nowhere.yaml"]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("nowhere.yaml"), "{said}");
}

#[test]
fn an_address_in_use_ends_the_start() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let dir = tempfile::tempdir().unwrap();
    let yaml = format!(
        "listen: {}\nupstream_address: 127.0.0.1:1\nl2_cache_dir: {:?}\n",
        taken.local_addr().unwrap(),
        dir.path()
    );
    let output = start(&yaml, &[]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let taken = taken.local_addr().unwrap();
    assert!(
        said.contains(&format!("listen: listening at {taken}")),
        "{said}"
    );
}

/// Without a directory for its purges a machine alone does not start, says which
/// key names it and what to do, and promises no other try.
#[test]
fn a_directory_that_cannot_be_made_ends_the_start_of_a_machine_alone() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let below = file.path().join("cache");
    let ports = Ports::claim();
    let yaml = format!(
        "listen: {}\nupstream_address: 127.0.0.1:1\nl2_cache_dir: {below:?}\n",
        ports.at(0),
    );
    let output = start(&yaml, &[]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let named = format!("l2_cache_dir: {}: Not a directory", below.display());
    assert!(said.contains(&named), "{said}");
    assert!(
        said.contains("chown") && said.contains("enable_l2_cache: false"),
        "{said}"
    );
    assert!(!said.contains("tried again"), "{said}");
}

/// What the node files take from the environment reaches the containers.
#[test]
fn compose_passes_on_what_the_node_files_name() {
    let read = |name: &str| std::fs::read_to_string(format!("../{name}")).unwrap();
    let compose = read("docker-compose.yml");
    for node in 1..=3 {
        let file = read(&format!("configs/node{node}.yaml"));
        let names: Vec<&str> = (file.split("${").skip(1))
            .filter_map(|rest| rest.split([':', '}']).next())
            .collect();
        assert!(names.contains(&"L2_SIZE"), "{names:?}");
        for name in names {
            let line = format!("\n    {name}: ");
            assert!(compose.contains(&line), "node {node}: {name}");
        }
    }
}

/// A key that belongs to another certificate ends the start, with the remedy.
#[test]
fn a_pair_that_does_not_match_ends_the_start() {
    let dir = tempfile::tempdir().unwrap();
    ca(dir.path(), &["init"]);
    for id in [1, 2] {
        issue_certificate(dir.path(), id);
    }
    let file = |name: &str| dir.path().join(name);
    let yaml = format!(
        "listen: [{{address: '127.0.0.1:1', tls: {{cert: {:?}, key: {:?}}}}}]\n",
        file("node1.pem"),
        file("node2.key")
    );
    let output = start(&yaml, &[]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("listen[0].tls.key"), "{said}");
    assert!(!said.contains("panicked"), "{said}");
}
