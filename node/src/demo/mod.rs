//! `pingora-slice demo`: what this program is for, shown on one machine.
//!
//! Starts an origin with real files and three nodes, each a process of its own
//! with its own ports, disk and certificate, and goes through what a user would
//! want to see before believing it: equal checksums, one origin fetch per byte,
//! a range, a purge and its proof, a node killed in the middle of a download,
//! the merged metrics. Each step checks what it shows; the first that does not
//! hold ends the demo with exit code 1.
//!
//! Nothing outlives the demo: its processes are stopped on every way out, and
//! everything it wrote is below one temporary directory.

mod fetch;
mod origin;

use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use pingora_slice_client::ca::{ca_init, ca_issue};
use rand::TryRngCore;
use rand::rngs::OsRng;

use fetch::{Fetched, fetch, open};

/// Shows a cluster at work on this machine.
#[derive(Clone, Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct DemoArgs {
    /// End after the last step, with 0, or 1 if one failed.
    #[arg(long)]
    once: bool,
    /// Serve the files of this directory too (the demo adds its own two, and removes them).
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    #[command(subcommand)]
    command: Option<DemoCommand>,
}

#[derive(Clone, Debug, clap::Subcommand)]
enum DemoCommand {
    /// Only the origin: a static file server that logs each request.
    Origin {
        /// What to serve.
        #[arg(long, value_name = "DIR")]
        dir: PathBuf,
        /// Where to listen.
        #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:8000")]
        listen: SocketAddr,
    },
    /// Only the certificates: whatever is missing of a CA and of nodes 1 to N.
    Certs {
        /// Where they are, or will be.
        #[arg(long, value_name = "DIR")]
        dir: PathBuf,
        /// How many nodes; node 1 is the host `node1`, and so on.
        #[arg(long, value_name = "N", default_value_t = NODES)]
        nodes: u64,
        /// Also give each node a directory of its own, DIR/1 and so on, with
        /// ca.pem, its certificate and its key: no node needs more.
        #[arg(long, value_name = "DIR")]
        hand_out: Option<PathBuf>,
    },
}

const NODES: u64 = 3;
const FILM: &str = "pingora-slice-demo-film.bin";
const FILM_BYTES: u64 = 256 * MIB;
const ALBUM: &str = "pingora-slice-demo-album.bin";
const ALBUM_BYTES: u64 = 16 * MIB;
const MIB: u64 = 1024 * 1024;
const TOKEN: &str = "demo";
/// The site's name (`upstream_host`): one, whatever address a node is asked at.
const HOST: &str = "files.example";
/// Longest that the nodes may take to find one another.
const READY_MAX: Duration = Duration::from_secs(30);
/// Between two looks at a process.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// Runs the demo (or its origin alone) to the end.
pub fn run(args: DemoArgs) -> ExitCode {
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("the runtime does not start: {error}");
            return ExitCode::FAILURE;
        }
    };
    let result = runtime.block_on(async {
        match args.command {
            Some(DemoCommand::Origin { dir, listen }) => serve_files(dir, listen).await,
            Some(DemoCommand::Certs {
                dir,
                nodes,
                hand_out,
            }) => issue_missing(&dir, nodes, hand_out.as_deref()),
            None => demo(args.once, args.dir).await,
        }
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\nthe demo failed: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn serve_files(dir: PathBuf, listen: SocketAddr) -> Result<()> {
    ensure!(dir.is_dir(), "{} is not a directory", dir.display());
    let listener = tokio::net::TcpListener::bind(listen)
        .await
        .with_context(|| format!("{listen} cannot be listened on"))?;
    tokio::select! {
        ended = origin::serve(listener, dir) => Ok(ended?),
        signal = stop_signal() => signal,
    }
}

/// Can be run again: what is there is kept.
fn issue_missing(dir: &Path, nodes: u64, hand_out: Option<&Path>) -> Result<()> {
    if !dir.join("ca.pem").exists() {
        ca_init(dir)?;
    }
    for id in 1..=nodes {
        let name = format!("node{id}");
        if !dir.join(format!("{name}.pem")).exists() {
            ca_issue(dir, id, std::slice::from_ref(&name))?;
        }
        if let Some(own) = hand_out.map(|all| all.join(id.to_string())) {
            fs::create_dir_all(&own)?;
            let (cert, key) = (format!("{name}.pem"), format!("{name}.key"));
            for file in ["ca.pem", &cert, &key] {
                let (from, to) = (dir.join(file), own.join(file));
                // A renewed one takes the place of the one before.
                if fs::read(&to).ok() != Some(fs::read(&from)?) {
                    fs::copy(&from, &to)
                        .with_context(|| format!("{} cannot be written", to.display()))?;
                }
            }
        }
    }
    Ok(())
}

/// Completes when somebody wants this process to end.
async fn stop_signal() -> Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hangup = signal(SignalKind::hangup())?;
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
        _ = hangup.recv() => {}
    }
    Ok(())
}

async fn demo(once: bool, dir: Option<PathBuf>) -> Result<()> {
    let mut stop = std::pin::pin!(stop_signal());
    let mut stage = Stage::set(dir)?;
    let told = tokio::select! {
        told = stage.story() => told,
        signal = &mut stop => return signal.and_then(|()| {
            if once { bail!("interrupted") } else { Ok(()) }
        }),
    };
    if told.is_err() {
        stage.show_logs();
    }
    told?;
    if !once {
        stage.show_what_to_try();
        stop.await?;
        println!();
    }
    Ok(())
}

/// The processes of the demo, and where everything is.
struct Stage {
    origin: Process,
    origin_address: SocketAddr,
    nodes: Vec<Node>,
    files: Files,
    /// Removed when the demo ends, after the processes are stopped.
    home: tempfile::TempDir,
}

struct Node {
    id: u64,
    clients: SocketAddr,
    metrics: SocketAddr,
    process: Option<Process>,
}

/// The directory that the origin serves. What the demo adds to it is removed
/// when this is dropped: a quarter of a gigabyte nobody asked to keep.
struct Files {
    /// Absolute: the origin runs in another directory.
    dir: PathBuf,
}

impl Files {
    fn at(dir: &Path) -> Result<Files> {
        fs::create_dir_all(dir).with_context(|| format!("--dir {}", dir.display()))?;
        let dir = dir.canonicalize()?;
        Ok(Files { dir })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        for name in [FILM, ALBUM] {
            // Either may not have been written yet.
            let _ = fs::remove_file(self.path(name));
            let _ = fs::remove_file(partial(&self.path(name)));
        }
    }
}

/// A child that is killed when it is dropped.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself: then there is nothing to kill.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Stage {
    /// Starts everything.
    fn set(dir: Option<PathBuf>) -> Result<Stage> {
        let home = tempfile::Builder::new()
            .prefix("pingora-slice-demo-")
            .tempdir()?;
        let files = match dir {
            Some(dir) => Files::at(&dir)?,
            None => Files::at(&home.path().join("files"))?,
        };
        title("An origin with real files, and three nodes that know each other by certificate");
        write_random(&files.path(FILM), FILM_BYTES)?;
        write_random(&files.path(ALBUM), ALBUM_BYTES)?;

        let mut client_ports = Ports { next: 18_080 };
        let mut metrics_ports = Ports { next: 19_081 };
        let mut peer_ports = Ports { next: 17_001 };
        let origin_address = client_ports.take(1)?;
        let origin = start(
            home.path(),
            "origin",
            &[
                "demo",
                "origin",
                "--dir",
                path_str(&files.dir)?,
                "--listen",
                &origin_address.to_string(),
            ],
        )?;
        say(&format!(
            "origin  http://{origin_address}/  serves {}",
            files.dir.display()
        ));

        ca_init(home.path())?;
        let mut places = Vec::new();
        for id in 1..=NODES {
            // Slices on one port, control traffic on the next.
            let peers = peer_ports.take(2)?;
            places.push((id, client_ports.take(1)?, metrics_ports.take(1)?, peers));
        }
        let seeds: Vec<String> = places.iter().map(|(.., peers)| peers.to_string()).collect();
        let mut nodes = Vec::new();
        for (id, clients, metrics, peers) in places {
            ca_issue(home.path(), id, &["127.0.0.1".to_owned()])?;
            let config = home.path().join(format!("node{id}.yaml"));
            fs::write(
                &config,
                format!(
                    "listen: \"{clients}\"\n\
                     upstream_address: \"{origin_address}\"\n\
                     upstream_host: {HOST}\n\
                     l2_cache_dir: {l2:?}\n\
                     l2_cache_size_bytes: 1g\n\
                     metrics_endpoint: {{enabled: true, address: \"{metrics}\"}}\n\
                     purge: {{enabled: true, auth_token: {TOKEN}}}\n\
                     cluster:\n\
                     \x20 node_id: {id}\n\
                     \x20 listen: \"{peers}\"\n\
                     \x20 advertise: \"{peers}\"\n\
                     \x20 seeds: {seeds:?}\n\
                     \x20 voters_expected: {NODES}\n\
                     \x20 data_dir: {data:?}\n\
                     \x20 tls: {{ca: ca.pem, cert: node{id}.pem, key: node{id}.key}}\n",
                    l2 = home.path().join(format!("node{id}/l2")),
                    data = home.path().join(format!("node{id}/data")),
                ),
            )?;
            let process = start(home.path(), &format!("node{id}"), &[path_str(&config)?])?;
            say(&format!(
                "node {id}  http://{clients}/  peers by QUIC on {peers}"
            ));
            nodes.push(Node {
                id,
                clients,
                metrics,
                process: Some(process),
            });
        }
        Ok(Stage {
            origin,
            origin_address,
            nodes,
            files,
            home,
        })
    }

    async fn story(&mut self) -> Result<()> {
        let started = Instant::now();
        self.until_ready().await?;
        say(&format!(
            "ready after {:.1} s",
            started.elapsed().as_secs_f64()
        ));
        self.one_film_through_each_node().await?;
        self.a_range().await?;
        self.a_purge_and_its_proof().await?;
        self.a_node_dies_during_a_download().await?;
        self.the_merged_metrics().await?;
        println!(
            "\nAll of it held, in {:.0} s.",
            started.elapsed().as_secs_f64()
        );
        Ok(())
    }

    async fn until_ready(&mut self) -> Result<()> {
        let started = Instant::now();
        while fetch(self.origin_address, "HEAD", "/", &[]).await.is_err() {
            if let Some(status) = self.origin.0.try_wait()? {
                bail!("the origin ended by itself: {status}");
            }
            ensure!(started.elapsed() < READY_MAX, "the origin does not listen");
            tokio::time::sleep(LOOK_EVERY).await;
        }
        for node in &mut self.nodes {
            loop {
                if let Ok(answer) = fetch(node.metrics, "GET", "/ready", &[]).await
                    && answer.status == 200
                {
                    break;
                }
                if let Some(process) = &mut node.process
                    && let Some(status) = process.0.try_wait()?
                {
                    bail!("node {} ended by itself: {status}", node.id);
                }
                ensure!(
                    started.elapsed() < READY_MAX,
                    "node {} does not get ready",
                    node.id
                );
                tokio::time::sleep(LOOK_EVERY).await;
            }
        }
        Ok(())
    }

    async fn one_film_through_each_node(&self) -> Result<()> {
        title(&format!(
            "{} MiB through each node: equal checksums",
            FILM_BYTES / MIB
        ));
        let straight = fetch(self.origin_address, "GET", &format!("/{FILM}"), &[]).await?;
        say(&format!(
            "origin  {}  (asked directly, for comparison)",
            straight.sha256
        ));
        let asked_before = self.origin_log(FILM)?.len();
        for node in &self.nodes {
            let before = Sources::of(node).await?;
            let started = Instant::now();
            let film = self.get(node, FILM, &[]).await?;
            let took = started.elapsed().as_secs_f64();
            let came = Sources::of(node).await?.since(&before);
            say(&format!(
                "node {}  {}  {:.0} MiB/s  {came}",
                node.id,
                film.sha256,
                film.bytes as f64 / MIB as f64 / took
            ));
            ensure!(
                film.sha256 == straight.sha256,
                "node {} gives other bytes",
                node.id
            );
        }
        let log = self.origin_log(FILM)?;
        let bytes: u64 = log[asked_before..].iter().map(|line| line.bytes).sum();
        say(&format!(
            "the origin's own log: {} requests, {} bytes; the film has {FILM_BYTES}",
            log.len() - asked_before,
            bytes
        ));
        ensure!(
            bytes == FILM_BYTES,
            "the origin should have sent each byte once"
        );
        Ok(())
    }

    async fn a_range(&self) -> Result<()> {
        title("A range: 1000 bytes across the edge of two slices");
        let asked_before = self.origin_log(FILM)?.len();
        let range = ("Range", "bytes=1048076-1049075");
        let straight = fetch(self.origin_address, "GET", &format!("/{FILM}"), &[range]).await?;
        for node in &self.nodes {
            let part = self.get(node, FILM, &[range]).await?;
            say(&format!(
                "node {}  {} {}  {}",
                node.id,
                part.status,
                part.header("content-range"),
                part.header("cache-status")
            ));
            ensure!(
                part.status == 206,
                "node {} answered {}",
                node.id,
                part.status
            );
            ensure!(
                part.sha256 == straight.sha256,
                "node {} gives other bytes",
                node.id
            );
        }
        let asked = self.origin_log(FILM)?.len() - asked_before - 1;
        say(&format!("the origin was asked {asked} times"));
        ensure!(asked == 0, "what every node has was asked for again");
        Ok(())
    }

    async fn a_purge_and_its_proof(&self) -> Result<()> {
        title("A purge: once it is answered, no node gives an old byte");
        let mut old = String::new();
        for node in &self.nodes {
            old = self.get(node, ALBUM, &[]).await?.sha256;
        }
        write_random(&self.files.path(ALBUM), ALBUM_BYTES)?;
        let new = fetch(self.origin_address, "GET", &format!("/{ALBUM}"), &[])
            .await?
            .sha256;
        say(&format!("before  {old}  (in every node's cache)"));
        say(&format!("origin  {new}  (the file has changed)"));
        let cached = self.get(&self.nodes[0], ALBUM, &[]).await?.sha256;
        ensure!(cached == old, "a fresh answer was not taken from the cache");

        let started = Instant::now();
        let token = ("X-Purge-Token", TOKEN);
        let node = &self.nodes[1];
        let target = format!("/{ALBUM}");
        let purged = fetch(node.clients, "PURGE", &target, &[token]).await?;
        let took = started.elapsed().as_secs_f64() * 1000.0;
        say(&format!(
            "PURGE at node {}: {} in {took:.1} ms",
            node.id, purged.status
        ));
        say(purged.text.trim());
        ensure!(purged.status == 200, "the purge was refused");
        for node in &self.nodes {
            let album = self.get(node, ALBUM, &[]).await?;
            say(&format!(
                "node {}  {}  {}",
                node.id,
                album.sha256,
                album.header("cache-status")
            ));
            ensure!(
                album.sha256 == new,
                "node {} gives old bytes after the purge",
                node.id
            );
        }
        Ok(())
    }

    async fn a_node_dies_during_a_download(&mut self) -> Result<()> {
        title("kill -9 of node 3 in the middle of a download through node 1");
        let straight = fetch(self.origin_address, "GET", &format!("/{FILM}"), &[]).await?;
        let target = format!("/{FILM}");
        let mut film = open(self.nodes[0].clients, "GET", &target, &[]).await?;
        film.until(FILM_BYTES / 4).await?;
        // Dropping it is SIGKILL.
        self.nodes[2].process = None;
        say("node 3 killed after a quarter of the film");
        let started = Instant::now();
        let film = film.finish().await?;
        say(&format!(
            "node 1  {}  complete, {:.1} s for the rest",
            film.sha256,
            started.elapsed().as_secs_f64()
        ));
        ensure!(film.sha256 == straight.sha256, "the download was damaged");
        let again = self.get(&self.nodes[1], FILM, &[]).await?;
        say(&format!("node 2  {}  asked afterwards", again.sha256));
        ensure!(again.sha256 == straight.sha256, "node 2 gives other bytes");
        Ok(())
    }

    async fn the_merged_metrics(&self) -> Result<()> {
        title("The cluster's metrics, merged by node 1");
        let started = Instant::now();
        let metrics = loop {
            let metrics = fetch(self.nodes[0].metrics, "GET", "/metrics/cluster", &[]).await?;
            ensure!(metrics.status == 200, "answered {}", metrics.status);
            // That node 3 is gone is noticed within a few seconds.
            let dead = sample(&metrics.text, "pingora_slice_node_up{node=\"3\"}") == Some(0.0);
            if dead || started.elapsed() > READY_MAX {
                break metrics.text;
            }
            tokio::time::sleep(LOOK_EVERY).await;
        };
        for name in [
            "node_up",
            "slices_total",
            "origin_fetches_total",
            "bytes_to_client_total",
        ] {
            let full = format!("pingora_slice_{name}");
            for line in metrics.lines().filter(|line| line.starts_with(&full)) {
                say(line);
            }
        }
        for (id, up) in [(1, 1.0), (2, 1.0), (3, 0.0)] {
            let seen = sample(&metrics, &format!("pingora_slice_node_up{{node=\"{id}\"}}"));
            ensure!(
                seen == Some(up),
                "node_up of node {id} is {seen:?}, not {up}"
            );
        }
        Ok(())
    }

    /// GET through a node.
    async fn get(&self, node: &Node, file: &str, headers: &[(&str, &str)]) -> Result<Fetched> {
        let fetched = fetch(node.clients, "GET", &format!("/{file}"), headers)
            .await
            .with_context(|| format!("node {}: {file}", node.id))?;
        ensure!(
            matches!(fetched.status, 200 | 206),
            "node {}: {file}: answered {}",
            node.id,
            fetched.status
        );
        Ok(fetched)
    }

    /// What the origin wrote about requests for a file.
    fn origin_log(&self, file: &str) -> Result<Vec<LogLine>> {
        let log = fs::read_to_string(self.home.path().join("origin.log"))?;
        let target = format!("/{file}");
        let lines = log.lines().filter_map(|line| {
            // METHOD TARGET RANGE STATUS BYTES
            let mut words = line.split(' ');
            (words.nth(1)? == target).then(|| LogLine {
                bytes: words
                    .nth(2)
                    .and_then(|bytes| bytes.parse().ok())
                    .unwrap_or_default(),
            })
        });
        Ok(lines.collect())
    }

    fn show_logs(&self) {
        let nodes = self.nodes.iter().map(|node| format!("node{}", node.id));
        for name in std::iter::once("origin".to_owned()).chain(nodes) {
            let path = self.home.path().join(format!("{name}.log"));
            let log = fs::read_to_string(path).unwrap_or_default();
            let lines: Vec<&str> = log.lines().collect();
            let from = lines.len().saturating_sub(20);
            eprintln!("--- the end of {name}.log\n{}", lines[from..].join("\n"));
        }
    }

    fn show_what_to_try(&self) {
        println!(
            "\nStill running, until Ctrl-C (logs in {}):",
            self.home.path().display()
        );
        for node in self.nodes.iter().filter(|node| node.process.is_some()) {
            println!(
                "   node {}  http://{}/{FILM}   http://{}/",
                node.id, node.clients, node.metrics
            );
        }
        println!(
            "   curl -s -o /dev/null -D - http://{}/{ALBUM}",
            self.nodes[1].clients
        );
        println!(
            "   curl -X PURGE -H 'X-Purge-Token: {TOKEN}' http://{}/{ALBUM}",
            self.nodes[0].clients
        );
        println!("   curl http://{}/metrics/cluster", self.nodes[0].metrics);
    }
}

struct LogLine {
    bytes: u64,
}

/// Slices that a node delivered, by where they came from.
struct Sources([f64; 5]);

const SOURCES: [(&str, &str); 5] = [
    ("l1", "memory"),
    ("l2", "disk"),
    ("flight", "a fill under way"),
    ("peer", "a peer"),
    ("origin", "the origin"),
];

impl Sources {
    async fn of(node: &Node) -> Result<Sources> {
        let metrics = fetch(node.metrics, "GET", "/metrics", &[]).await?.text;
        Ok(Sources(SOURCES.map(|(source, _)| {
            let name = format!("pingora_slice_slices_total{{source=\"{source}\"}}");
            sample(&metrics, &name).unwrap_or_default()
        })))
    }

    fn since(&self, before: &Sources) -> Sources {
        Sources(std::array::from_fn(|at| self.0[at] - before.0[at]))
    }
}

impl std::fmt::Display for Sources {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut parts = Vec::new();
        for (count, (_, words)) in self.0.iter().zip(SOURCES) {
            if *count > 0.0 {
                parts.push(format!("{count} from {words}"));
            }
        }
        write!(f, "slices: {}", parts.join(", "))
    }
}

/// One sample of a metrics text.
fn sample(metrics: &str, name: &str) -> Option<f64> {
    metrics
        .lines()
        .find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
}

/// Starts this very program again, its output in `NAME.log`.
fn start(home: &Path, name: &str, args: &[&str]) -> Result<Process> {
    let log = fs::File::create(home.join(format!("{name}.log")))?;
    let child = Command::new(std::env::current_exe()?)
        .args(args)
        .current_dir(home)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .with_context(|| format!("{name} cannot be started"))?;
    Ok(Process(child))
}

/// Writes a file of random bytes: nothing along the way can guess or compress them.
fn write_random(path: &Path, bytes: u64) -> Result<()> {
    use std::io::Write;
    // Beside it first: the origin must never see half a file.
    let partial = partial(path);
    let mut file = fs::File::create(&partial)?;
    let mut piece = vec![0; MIB as usize];
    for _ in 0..bytes / MIB {
        OsRng.try_fill_bytes(&mut piece)?;
        file.write_all(&piece)?;
    }
    drop(file);
    fs::rename(&partial, path).with_context(|| format!("{} cannot be written", path.display()))
}

/// Where a file is written before it is whole.
fn partial(path: &Path) -> PathBuf {
    path.with_extension("partial")
}

/// Free loopback ports, the same ones each time where they are free.
struct Ports {
    next: u16,
}

impl Ports {
    /// The first of `count` neighbouring ports, free for TCP and UDP.
    fn take(&mut self, count: u16) -> Result<SocketAddr> {
        let free = |port: u16| {
            TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok()
                && UdpSocket::bind((Ipv4Addr::LOCALHOST, port)).is_ok()
        };
        while self.next < 30_000 {
            let first = self.next;
            self.next += count;
            if (first..first + count).all(free) {
                return Ok((Ipv4Addr::LOCALHOST, first).into());
            }
        }
        bail!("no free ports")
    }
}

fn path_str(path: &Path) -> Result<&str> {
    path.to_str()
        .with_context(|| format!("{} is not UTF-8", path.display()))
}

fn title(text: &str) {
    println!("\n== {text}");
}

fn say(text: &str) {
    println!("   {text}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_is_handed_its_own_key_and_no_other() {
        let home = tempfile::tempdir().unwrap();
        let (authority, nodes) = (home.path().join("tls"), home.path().join("nodes"));
        // Twice: what is there is kept.
        for _ in 0..2 {
            issue_missing(&authority, 2, Some(&nodes)).unwrap();
        }
        let own = fs::read_dir(nodes.join("2")).unwrap();
        let mut names: Vec<_> = own.map(|file| file.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["ca.pem", "node2.key", "node2.pem"]);
        let key = |dir: &Path| fs::read(dir.join("node2.key")).unwrap();
        assert_eq!(key(&authority), key(&nodes.join("2")));
        // Renewed by taking it away.
        let before = key(&authority);
        fs::remove_file(authority.join("node2.pem")).unwrap();
        fs::remove_file(authority.join("node2.key")).unwrap();
        issue_missing(&authority, 2, Some(&nodes)).unwrap();
        assert_ne!(key(&authority), before);
        assert_eq!(key(&authority), key(&nodes.join("2")));
    }

    #[test]
    fn what_is_added_to_a_directory_leaves_it_again() {
        let home = tempfile::tempdir().unwrap();
        let here = std::env::current_dir().unwrap();
        let up: PathBuf = here.components().skip(1).map(|_| "..").collect();
        let relative = up.join(home.path().strip_prefix("/").unwrap());
        let files = Files::at(&relative).unwrap();
        assert!(files.dir.is_absolute(), "{}", files.dir.display());
        let names = || -> Vec<_> {
            let entries = fs::read_dir(home.path()).unwrap();
            entries.map(|entry| entry.unwrap().file_name()).collect()
        };
        fs::write(files.path("own.txt"), "mine").unwrap();
        write_random(&files.path(FILM), MIB).unwrap();
        fs::write(partial(&files.path(ALBUM)), "half").unwrap();
        assert_eq!(names().len(), 3);
        drop(files);
        assert_eq!(names(), ["own.txt"]);
    }
}
