//! Nodes as real processes: the binary that users run, on loopback.
//!
//! A [`TestCluster`] is an origin and its nodes, each with its own ports,
//! directories, certificate and log file. Nodes are killed by process id when
//! it is dropped. When the test fails, the end of each node's log is printed.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rand::Rng;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;
use tokio::task::JoinHandle;

use crate::disk::SmallDisk;
use crate::http::{Ask, HOST, Reply, Stream};
use crate::metrics::Metrics;
use crate::origin::{Film, Origin};
use crate::relay::{Ends, Links, Relay};
use crate::{MIB, SLICE_BYTES};

/// What a PURGE must show at the test nodes.
pub const PURGE_TOKEN: &str = "purge-token-of-the-tests";
/// What the admin API wants to see.
pub const ADMIN_TOKEN: &str = "admin-token-of-the-tests";
/// Longest that a node may take to become ready, or a condition to come true.
/// Generous: many tests share few cores.
pub const WAIT_MAX: Duration = Duration::from_secs(60);
/// Between two looks at a condition in another process.
const LOOK_EVERY: Duration = Duration::from_millis(25);
/// Lines of each node's log that a failed test prints.
const LOG_LINES: usize = 60;

/// How a cluster is set up; change the configuration with [`Options::set`].
#[derive(Clone, Debug, Default)]
pub struct Options {
    nodes: usize,
    edges: usize,
    alone: bool,
    relayed: bool,
    disk_bytes: Option<u64>,
    program: Option<PathBuf>,
    yaml: BTreeMap<String, String>,
}

impl Options {
    /// `nodes` voters (1, 3 or 5).
    pub fn cluster(nodes: usize) -> Options {
        Options {
            nodes,
            ..Options::default()
        }
    }

    /// One machine, no `cluster:` section.
    pub fn alone() -> Options {
        Options {
            nodes: 1,
            alone: true,
            ..Options::default()
        }
    }

    /// Adds nodes that follow without voting.
    pub fn edges(mut self, edges: usize) -> Options {
        self.edges = edges;
        self
    }

    /// Puts a network between the nodes that can be cut: [`TestCluster::links`].
    pub fn relayed(mut self) -> Options {
        self.relayed = true;
        self
    }

    /// Gives each node a disk of this size for all it keeps, which can be
    /// filled ([`Node::disk`]); where none can be mounted, it goes without.
    pub fn small_disks(mut self, bytes: u64) -> Options {
        self.disk_bytes = Some(bytes);
        self
    }

    /// Runs another build of the daemon.
    pub fn program(mut self, path: PathBuf) -> Options {
        self.program = Some(path);
        self
    }

    /// Sets a top-level key of every node's configuration (a YAML value on one line).
    pub fn set(mut self, key: &str, value: impl ToString) -> Options {
        self.yaml.insert(key.to_owned(), value.to_string());
        self
    }

    /// Starts it and waits until every node is ready.
    pub async fn start(self) -> TestCluster {
        let mut cluster = self.prepare().await;
        for node in &mut cluster.nodes {
            node.spawn();
        }
        for node in &mut cluster.nodes {
            node.until_ready().await;
        }
        cluster
    }

    /// Everything but the processes: for tests of how they start.
    pub async fn prepare(self) -> TestCluster {
        let origin = Origin::start().await;
        let dir = tempfile::Builder::new()
            .prefix("pingora-slice-")
            .tempdir()
            .expect("temp dir");
        let count = self.nodes + self.edges;
        let ports: Vec<Ports> = (0..count).map(|_| Ports::claim()).collect();
        let seeds: Vec<String> = ports[..self.nodes]
            .iter()
            .map(|p| self.advertised(p).to_string())
            .collect();
        let ends: Vec<Ends> = ports
            .iter()
            .map(|p| Ends {
                listen: p.at(PEERS),
                front: p.at(FRONT),
            })
            .collect();
        let relay = self
            .relayed
            .then(|| Relay::start(&ends).expect("free ports"));
        if !self.alone {
            ca(dir.path(), &["init"]);
        }
        let mut nodes = Vec::new();
        for (index, ports) in ports.into_iter().enumerate() {
            let id = index as u64 + 1;
            let home = dir.path().join(format!("node{id}"));
            fs::create_dir_all(&home).expect("temp dir");
            let (kept, disk) = self.storage(&home);
            let mut yaml = base_yaml(&ports, &kept, origin.address());
            if !self.alone {
                issue_certificate(dir.path(), id);
                let role = if index < self.nodes { "voter" } else { "edge" };
                yaml.insert(
                    "cluster".into(),
                    format!(
                        "{{node_id: {id}, listen: \"{me}\", advertise: \"{front}\", seeds: {seeds:?}, \
                         voters_expected: {voters}, role: {role}, data_dir: {data:?}, lease: 2s, \
                         tls: {{ca: {ca:?}, cert: {cert:?}, key: {key:?}}}}}",
                        me = ports.at(PEERS),
                        front = self.advertised(&ports),
                        voters = self.nodes,
                        data = kept.join("data"),
                        ca = dir.path().join("ca.pem"),
                        cert = dir.path().join(format!("node{id}.pem")),
                        key = dir.path().join(format!("node{id}.key")),
                    ),
                );
            }
            yaml.extend(self.yaml.clone());
            nodes.push(Node {
                id,
                home,
                kept,
                disk,
                ports,
                program: self
                    .program
                    .clone()
                    .unwrap_or_else(|| binary("pingora-slice")),
                yaml,
                process: None,
            });
        }
        TestCluster {
            nodes,
            origin,
            relay,
            dir,
        }
    }

    /// Where the others reach the node with these ports.
    fn advertised(&self, ports: &Ports) -> SocketAddr {
        ports.at(if self.relayed { FRONT } else { PEERS })
    }

    /// Where a node keeps what it keeps: at home, or on a disk of its own.
    fn storage(&self, home: &Path) -> (PathBuf, Option<SmallDisk>) {
        let Some(bytes) = self.disk_bytes else {
            return (home.to_owned(), None);
        };
        let dir = home.join("disk");
        fs::create_dir_all(&dir).expect("temp dir");
        let disk = SmallDisk::mount(&dir, bytes)
            .inspect_err(|reason| eprintln!("NO SMALL DISKS, so none will be full: {reason}"));
        (dir, disk.ok())
    }
}

/// What every test node is configured with; big enough for the tests, small for the machine.
fn base_yaml(ports: &Ports, kept: &Path, origin: SocketAddr) -> BTreeMap<String, String> {
    let yaml = [
        ("listen", format!("\"{}\"", ports.at(CLIENTS))),
        ("upstream_address", format!("\"{origin}\"")),
        ("threads", "2".into()),
        ("slice_size", SLICE_BYTES.to_string()),
        ("l1_cache_size_bytes", (64 * MIB).to_string()),
        ("l2_cache_dir", format!("{:?}", kept.join("l2"))),
        ("l2_cache_size_bytes", (1024 * MIB).to_string()),
        (
            "metrics_endpoint",
            format!("{{enabled: true, address: \"{}\"}}", ports.at(METRICS)),
        ),
        (
            "purge",
            format!("{{enabled: true, auth_token: {PURGE_TOKEN}}}"),
        ),
        (
            "admin",
            format!(
                "{{address: \"{}\", auth_token: {ADMIN_TOKEN}}}",
                ports.at(ADMIN)
            ),
        ),
    ];
    yaml.into_iter()
        .map(|(key, value)| (key.to_owned(), value))
        .collect()
}

/// An origin, and nodes in front of it.
pub struct TestCluster {
    nodes: Vec<Node>,
    /// The origin of all nodes.
    pub origin: Origin,
    relay: Option<Relay>,
    dir: TempDir,
}

impl TestCluster {
    /// `nodes` voters with the usual options.
    pub async fn start(nodes: usize) -> TestCluster {
        Options::cluster(nodes).start().await
    }

    /// One machine without a `cluster:` section.
    pub async fn alone() -> TestCluster {
        Options::alone().start().await
    }

    /// Node `id`, counted from 1.
    pub fn node(&self, id: u64) -> &Node {
        &self.nodes[id as usize - 1]
    }

    /// Node `id`, to kill or restart.
    pub fn node_mut(&mut self, id: u64) -> &mut Node {
        &mut self.nodes[id as usize - 1]
    }

    /// All nodes.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// The network between the nodes.
    ///
    /// # Panics
    /// Without [`Options::relayed`].
    pub fn links(&self) -> &Links {
        &self.relay.as_ref().expect("a relay").links
    }

    /// Where certificates and the nodes' directories are.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Publishes films whose manifest and first slice one node owns: the first
    /// `count` of `/film0`, `/film1` and so on.
    pub async fn films_owned_by(&self, owner: u64, count: usize, bytes: u64) -> Vec<Film> {
        let mut films = Vec::new();
        for n in 0.. {
            let path = format!("/film{n}");
            let explain = format!("/v1/explain?url={HOST}{path}");
            let (_, explained) = self.node(owner).admin("GET", &explain, None).await;
            let first = explained["owners"][0].as_u64();
            assert!(first.is_some(), "{explained}");
            if first == Some(owner) {
                films.push(self.origin.publish(&path, bytes));
            }
            if films.len() == count {
                break;
            }
        }
        films
    }

    /// Reads the whole object from each running node in turn and compares every byte.
    pub async fn read_from_every_node(&self, film: &Film) {
        for node in self.nodes.iter().filter(|node| node.is_running()) {
            node.read(film).await;
        }
    }

    /// Waits until every running node has applied this purge.
    pub async fn until_applied(&self, purge: &Purged) {
        for node in self.nodes.iter().filter(|node| node.is_running()) {
            node.until("the purge is applied", async || {
                node.metrics().await.sum("purge_index") >= purge.index as f64
            })
            .await;
        }
    }

    /// Kills every node as a power cut would, and starts all again.
    pub async fn restart_all(&mut self) {
        for node in &mut self.nodes {
            node.kill();
        }
        for node in &mut self.nodes {
            node.spawn();
        }
        for node in &mut self.nodes {
            node.until_ready().await;
        }
    }

    /// The sum of a metric (all labels) over the running nodes.
    pub async fn metric_sum(&self, name: &str) -> f64 {
        let mut sum = 0.0;
        for node in self.nodes.iter().filter(|node| node.is_running()) {
            sum += node.metrics().await.sum(name);
        }
        sum
    }
}

impl Drop for TestCluster {
    fn drop(&mut self) {
        for node in &mut self.nodes {
            node.kill();
        }
        if std::thread::panicking() {
            for node in &self.nodes {
                let log = node.log();
                let lines: Vec<&str> = log.lines().collect();
                let from = lines.len().saturating_sub(LOG_LINES);
                eprintln!(
                    "--- the end of node {}'s log\n{}",
                    node.id,
                    lines[from..].join("\n")
                );
            }
            return;
        }
        // What the clients did not notice is a fault all the same.
        for node in &self.nodes {
            let log = node.log();
            let panic = log.split("panicked at").nth(1);
            assert!(
                panic.is_none(),
                "node {}: {}",
                node.id,
                panic.unwrap_or_default()
            );
        }
    }
}

/// One node: its directories and, while it runs, its process.
pub struct Node {
    id: u64,
    home: PathBuf,
    /// What it keeps is below this.
    kept: PathBuf,
    disk: Option<SmallDisk>,
    ports: Ports,
    program: PathBuf,
    yaml: BTreeMap<String, String>,
    process: Option<Child>,
}

/// What a PURGE answered.
#[derive(Clone, Debug)]
pub struct Purged {
    /// HTTP status.
    pub status: u16,
    /// Its position in the log; 0 when not successful.
    pub index: u64,
    /// The JSON body, `Null` when it was none.
    pub json: Value,
}

impl Node {
    /// Its `node_id`.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.process.as_ref().expect("it runs").id()
    }

    /// Where clients connect.
    pub fn address(&self) -> SocketAddr {
        self.ports.at(CLIENTS)
    }

    /// The most memory that its process has had resident so far, bytes.
    pub fn resident_bytes_max(&self) -> u64 {
        let process = self.process.as_ref().expect("it was started");
        let status = fs::read_to_string(format!("/proc/{}/status", process.id()));
        let status = status.expect("it runs");
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kib = line.and_then(|line| line.trim().strip_suffix(" kB"));
        kib.and_then(|kib| kib.parse::<u64>().ok())
            .expect("a number of kB")
            * 1024
    }

    /// Its metrics address.
    pub fn metrics_address(&self) -> SocketAddr {
        self.ports.at(METRICS)
    }

    /// Its admin address.
    pub fn admin_address(&self) -> SocketAddr {
        self.ports.at(ADMIN)
    }

    /// Its peer address (UDP); control traffic is on the next port.
    pub fn peer_address(&self) -> SocketAddr {
        self.ports.at(PEERS)
    }

    /// Its disk store.
    pub fn l2_dir(&self) -> PathBuf {
        self.kept.join("l2")
    }

    /// Its log, vote and identity.
    pub fn data_dir(&self) -> PathBuf {
        self.kept.join("data")
    }

    /// Its disk, where it has one of its own.
    pub fn disk(&self) -> Option<&SmallDisk> {
        self.disk.as_ref()
    }

    /// Changes a top-level key of its configuration, from the next start on.
    pub fn set(&mut self, key: &str, value: impl ToString) {
        self.yaml.insert(key.to_owned(), value.to_string());
    }

    /// A top-level key of its configuration.
    pub fn setting(&self, key: &str) -> &str {
        self.yaml.get(key).map_or("", String::as_str)
    }

    /// Everything it has written so far, over all its lives.
    pub fn log(&self) -> String {
        let log = fs::read(self.home.join("log")).unwrap_or_default();
        String::from_utf8_lossy(&log).into_owned()
    }

    /// Whether its process was started and not killed by us.
    pub fn is_running(&self) -> bool {
        self.process.is_some()
    }

    /// Starts the process; does not wait for anything.
    pub fn spawn(&mut self) {
        assert!(self.process.is_none(), "node {} runs already", self.id);
        self.process = Some(self.command().spawn().expect("the node can be started"));
    }

    /// Starts a process that is to take over, and gives back the one that runs.
    pub fn spawn_successor(&mut self) -> Child {
        let old = self.process.take().expect("it was started");
        let new = self.command().arg("--upgrade").spawn();
        self.process = Some(new.expect("the node can be started"));
        old
    }

    /// Writes the configuration, for a node that runs.
    pub fn write_config(&self) -> PathBuf {
        let config = self.home.join("config.yaml");
        let yaml: Vec<String> = self
            .yaml
            .iter()
            .map(|(key, value)| format!("{key}: {value}\n"))
            .collect();
        fs::write(&config, yaml.concat()).expect("temp dir");
        config
    }

    fn command(&self) -> Command {
        let config = self.write_config();
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.home.join("log"));
        let log: File = log.expect("temp dir");
        let mut command = Command::new(&self.program);
        command
            .arg(config)
            .current_dir(&self.home)
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a file"))
            .stderr(log);
        command
    }

    /// Waits for `/ready`.
    pub async fn until_ready(&mut self) {
        let started = Instant::now();
        loop {
            if let Ok(reply) = Ask::get("/ready").send(self.metrics_address()).await
                && reply.status == 200
            {
                return;
            }
            let process = self.process.as_mut().expect("it was started");
            if let Some(status) = process.try_wait().expect("our child") {
                self.process = None;
                panic!("node {} ended before it was ready: {status}", self.id);
            }
            assert!(
                started.elapsed() < WAIT_MAX,
                "node {} does not get ready",
                self.id
            );
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// Waits until `condition` holds; `what` says what failed to happen.
    pub async fn until(&self, what: &str, mut condition: impl AsyncFnMut() -> bool) {
        let started = Instant::now();
        while !condition().await {
            assert!(
                started.elapsed() < WAIT_MAX,
                "node {}: in vain: {what}",
                self.id
            );
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// SIGKILL, and waits for the end.
    pub fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            // It may have ended by itself: then there is nothing to kill.
            let _ = process.kill();
            let _ = process.wait();
        }
    }

    /// SIGTERM, and waits for the orderly end.
    pub async fn terminate(&mut self) -> ExitStatus {
        self.signal(Signal::TERM);
        self.until_exit().await
    }

    /// Waits for the process to end by itself.
    pub async fn until_exit(&mut self) -> ExitStatus {
        let started = Instant::now();
        loop {
            let process = self.process.as_mut().expect("it was started");
            if let Some(status) = process.try_wait().expect("our child") {
                self.process = None;
                return status;
            }
            assert!(
                started.elapsed() < WAIT_MAX,
                "node {} does not end",
                self.id
            );
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// How its process has ended by itself, if it has.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        let status = self.process.as_mut()?.try_wait().expect("our child")?;
        self.process = None;
        Some(status)
    }

    /// SIGSTOP: everything in the process stands still.
    pub fn pause(&self) {
        self.signal(Signal::STOP);
    }

    /// SIGCONT.
    pub fn unpause(&self) {
        self.signal(Signal::CONT);
    }

    /// Starts it again and waits until it is ready.
    pub async fn restart(&mut self) {
        self.kill();
        self.spawn();
        self.until_ready().await;
    }

    /// Sends a signal to the process.
    pub fn signal(&self, signal: Signal) {
        let process = self.process.as_ref().expect("it runs");
        let pid = Pid::from_child(process);
        kill_process(pid, signal).expect("our child");
    }

    /// Sends a request and reads the whole answer into memory.
    pub async fn ask(&self, ask: Ask) -> Reply {
        match ask.send(self.address()).await {
            Ok(reply) => reply,
            Err(error) => panic!("node {}: {ask:?}: {error:#}", self.id),
        }
    }

    /// GET, into memory.
    pub async fn get(&self, target: &str) -> Reply {
        self.ask(Ask::get(target)).await
    }

    /// Sends a request and returns with the head.
    pub async fn open(&self, ask: Ask) -> Stream {
        match ask.open(self.address()).await {
            Ok(stream) => stream,
            Err(error) => panic!("node {}: {ask:?}: {error:#}", self.id),
        }
    }

    /// Reads the whole object and compares every byte with the current version.
    pub async fn read(&self, film: &Film) {
        let stream = self.open(Ask::get(film.path())).await;
        assert_eq!(stream.status, 200, "node {}: {}", self.id, film.path());
        self.compare(stream, film, 0, film.length()).await;
    }

    /// Starts to read the whole object, in the background, as fast as it comes.
    pub fn reading(&self, film: &Film) -> JoinHandle<anyhow::Result<Reply>> {
        let (ask, address) = (Ask::get(film.path()), self.address());
        tokio::spawn(async move { ask.send(address).await })
    }

    /// Reads the bytes `start..end`, by Range, and compares them.
    pub async fn read_range(&self, film: &Film, start: u64, end: u64) {
        let range = format!("bytes={start}-{}", end - 1);
        let stream = self.open(Ask::get(film.path()).range(&range)).await;
        assert_eq!(
            stream.status,
            206,
            "node {}: {} {range}",
            self.id,
            film.path()
        );
        let expected = format!("bytes {start}-{}/{}", end - 1, film.length());
        assert_eq!(stream.header("content-range"), expected, "node {}", self.id);
        self.compare(stream, film, start, end).await;
    }

    /// Compares a body that is arriving with the current version's bytes `start..end`.
    pub async fn compare(&self, mut stream: Stream, film: &Film, start: u64, end: u64) {
        let content = film.content();
        let who = format!("node {}: {}", self.id, film.path());
        assert_eq!(
            stream.header("content-length"),
            (end - start).to_string(),
            "{who}"
        );
        let mut at = start;
        loop {
            match stream.next().await {
                Err(error) => panic!("{who}: broken off at byte {at}: {error:#}"),
                Ok(None) => break,
                Ok(Some(piece)) => {
                    if let Some(wrong) = content.difference(at, &piece) {
                        let offset = (wrong - at) as usize;
                        let rest = &piece[offset..piece.len().min(offset + 64)];
                        panic!(
                            "{who}: byte {wrong} is not of version {}, but of {:?}",
                            content.version,
                            film.version_of(wrong, rest)
                        );
                    }
                    at += piece.len() as u64;
                }
            }
        }
        assert_eq!(at, end, "{who}: the body ends early");
    }

    /// PURGE of one URL; fails the test unless it is answered 200.
    pub async fn purge(&self, target: &str) -> Purged {
        let purged = self.purge_with(target, &[]).await;
        assert_eq!(
            purged.status, 200,
            "node {}: PURGE {target}: {}",
            self.id, purged.json
        );
        purged
    }

    /// PURGE with headers and the right token, whatever is answered.
    pub async fn purge_with(&self, target: &str, headers: &[(&str, &str)]) -> Purged {
        let mut ask = Ask::new("PURGE", target).header("X-Purge-Token", PURGE_TOKEN);
        for (name, value) in headers {
            ask = ask.header(name, value);
        }
        Purged::from(self.ask(ask).await)
    }

    /// This node's metrics.
    pub async fn metrics(&self) -> Metrics {
        self.metrics_at("/metrics").await
    }

    /// The whole cluster's metrics, as this node merges them.
    pub async fn cluster_metrics(&self) -> Metrics {
        self.metrics_at("/metrics/cluster").await
    }

    async fn metrics_at(&self, path: &str) -> Metrics {
        let reply = Ask::get(path)
            .send(self.metrics_address())
            .await
            .expect("metrics answer");
        assert_eq!(
            reply.status,
            200,
            "node {}: {path}: {}",
            self.id,
            reply.text()
        );
        Metrics::parse(&reply.text()).expect("the Prometheus text format")
    }

    /// One metric (`name` or `name{label="value"}`, without `pingora_slice_`); 0 when absent.
    pub async fn metric(&self, name: &str) -> f64 {
        self.metrics().await.sample(name).unwrap_or_default()
    }

    /// A call of the admin API with the right token.
    pub async fn admin(&self, method: &str, path: &str, body: Option<Value>) -> (u16, Value) {
        let mut ask =
            Ask::new(method, path).header("Authorization", format!("Bearer {ADMIN_TOKEN}"));
        if let Some(body) = body {
            ask = ask
                .header("Content-Type", "application/json")
                .body(body.to_string());
        }
        let reply = ask
            .send(self.admin_address())
            .await
            .expect("the admin API answers");
        (
            reply.status,
            serde_json::from_slice(&reply.body).unwrap_or_default(),
        )
    }
}

impl From<Reply> for Purged {
    fn from(reply: Reply) -> Purged {
        let json: Value = serde_json::from_slice(&reply.body).unwrap_or_default();
        let index = json["index"].as_u64().unwrap_or_default();
        Purged {
            status: reply.status,
            index,
            json,
        }
    }
}

/// Issues `node{id}.pem` and its key from the cluster's CA in `dir`.
pub fn issue_certificate(dir: &Path, id: u64) {
    ca(
        dir,
        &["issue", "--node", &id.to_string(), "--host", "127.0.0.1"],
    );
}

/// Runs `pingora-slicectl ca ARGS --dir DIR`.
pub fn ca(dir: &Path, args: &[&str]) {
    let output = Command::new(binary("pingora-slicectl"))
        .arg("ca")
        .args(args)
        .arg("--dir")
        .arg(dir)
        .stdin(Stdio::null())
        .output()
        .expect("pingora-slicectl can be started");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// A binary of this workspace, built before: from `PINGORA_SLICE_BIN_DIR`, or
/// the target directory that the running test is in.
pub fn binary(name: &str) -> PathBuf {
    let dir = std::env::var_os("PINGORA_SLICE_BIN_DIR")
        .map(PathBuf::from)
        .unwrap_or_else(|| {
            let test = std::env::current_exe().expect("a path");
            // target/PROFILE/deps/TEST
            test.ancestors().nth(2).expect("cargo's layout").to_owned()
        });
    let path = dir.join(name);
    assert!(
        path.exists(),
        "{} is not built: run `cargo build --workspace`",
        path.display()
    );
    path
}

const CLIENTS: u16 = 0;
const METRICS: u16 = 1;
const ADMIN: u16 = 2;
/// And the next one, for control traffic.
const PEERS: u16 = 3;
/// The relay's ports for the same, where there is one.
const FRONT: u16 = 5;
/// Holding this one holds the block.
const CLAIM: u16 = 7;
const PORTS: u16 = 8;

/// A block of ports that no other test has, in this process or another.
///
/// The last port of the block stays bound as long as the block is claimed.
/// Blocks lie below the range that the system gives to outgoing connections.
pub struct Ports {
    base: u16,
    _claim: TcpListener,
}

impl Ports {
    /// A free block.
    pub fn claim() -> Ports {
        let mut rng = rand::rng();
        for _ in 0..1000 {
            let base = 10_000 + PORTS * rng.random_range(0..2_500);
            let Ok(claim) = TcpListener::bind((Ipv4Addr::LOCALHOST, base + CLAIM)) else {
                continue;
            };
            let free = |port| {
                TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok()
                    && UdpSocket::bind((Ipv4Addr::LOCALHOST, port)).is_ok()
            };
            if (base..base + CLAIM).all(free) {
                return Ports {
                    base,
                    _claim: claim,
                };
            }
        }
        panic!("no free ports");
    }

    /// A port of the block, 0 to 6.
    pub fn at(&self, offset: u16) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, self.base + offset).into()
    }
}
