//! What this machine must have, and processes on it: pinned, measured, stopped.

use std::collections::HashMap;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Resource, Signal, getrlimit, kill_process, setrlimit};
use serde_json::Value;

use crate::stat;

/// The core that servers under test run on, and the one for load and origin.
pub const SERVER_CORE: usize = 0;
/// See [`SERVER_CORE`].
pub const CLIENT_CORE: usize = 1;
/// How long a server may take to listen.
const STARTED_WITHIN: Duration = Duration::from_secs(60);

const TOOLS: &[(&str, &str)] = &[
    ("wrk", "wrk"),
    ("taskset", "util-linux"),
    ("setpriv", "util-linux"),
    ("nginx", "nginx"),
    ("varnishd", "varnish"),
    ("traffic_server", "trafficserver"),
];
/// Without it Traffic Server has no slices.
const ATS_SLICE_PLUGIN: &str = "slice.so";

/// Opens as many files as the system allows: ten thousand connections need them.
pub fn raise_file_limit() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    let _ = setrlimit(Resource::Nofile, limit);
}

/// Nothing is installed here: says what to install.
pub fn refuse_what_is_missing() -> Result<()> {
    let mut packages: Vec<&str> = TOOLS
        .iter()
        .filter(|(tool, _)| find(tool).is_none())
        .map(|(_, package)| *package)
        .collect();
    if ats_plugins().is_none() {
        packages.push("trafficserver-experimental-plugins");
    }
    packages.sort_unstable();
    packages.dedup();
    if !packages.is_empty() {
        bail!(
            "missing; on Debian: apt-get install --no-install-recommends {}",
            packages.join(" ")
        );
    }
    let cores = std::thread::available_parallelism()?.get();
    ensure!(cores >= 2, "two cores are needed: one for each side");
    Ok(())
}

/// The commit that is checked out, if git knows.
pub fn commit() -> Option<String> {
    let mut git = Command::new("git");
    let said = git
        .args(["describe", "--always", "--dirty"])
        .output()
        .ok()
        .filter(|said| said.status.success())?;
    Some(String::from_utf8_lossy(&said.stdout).trim().to_owned())
}

/// The processor's name, if the kernel knows.
pub fn processor() -> Option<String> {
    let text = fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(": ")?.1.to_owned())
}

fn find(tool: &str) -> Option<PathBuf> {
    let path = std::env::var("PATH").unwrap_or_default();
    path.split(':')
        .chain(["/usr/sbin", "/usr/local/sbin"])
        .map(|dir| Path::new(dir).join(tool))
        .find(|file| file.is_file())
}

fn ats_plugins() -> Option<PathBuf> {
    let libraries = fs::read_dir("/usr/lib").ok()?.flatten().map(|e| e.path());
    libraries
        .chain([PathBuf::from("/usr/lib"), PathBuf::from("/usr/libexec")])
        .map(|dir| dir.join("trafficserver/modules").join(ATS_SLICE_PLUGIN))
        .find(|plugin| plugin.exists())
}

/// What the floors are in, built with the release profile unless
/// `PINGORA_SLICE_FLOORS` names them. The daemon was built by `make bench`,
/// which says where in `PINGORA_SLICE_BIN_DIR`.
pub fn build_floors() -> Result<PathBuf> {
    ensure!(
        std::env::var_os("PINGORA_SLICE_BIN_DIR").is_some(),
        "start it with `make bench`"
    );
    if let Some(built) = std::env::var_os("PINGORA_SLICE_FLOORS") {
        return Ok(built.into());
    }
    eprintln!("building the floors (release)");
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
    let output = Command::new(cargo)
        .args(["build", "--release", "--locked"])
        .args(["-p", "pingora-slice-tests", "--bench", "parts"])
        .arg("--message-format=json-render-diagnostics")
        .stderr(Stdio::inherit())
        .output()?;
    ensure!(output.status.success(), "the floors could not be built");
    String::from_utf8(output.stdout)?
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter(|message| message["target"]["name"] == "parts")
        .find_map(|message| message["executable"].as_str().map(PathBuf::from))
        .context("cargo has not said where they are")
}

/// Readies disk and memory for a turn that takes much of them. What earlier turns
/// wrote goes to disk first, and not beside this one. Then as much new memory is
/// touched as a turn may take, and freed: what a machine's host has taken back
/// meanwhile comes back here, ten times as slowly as other memory, and not in the
/// turn of whoever happens to meet it.
pub fn settle() {
    const BLOCK_BYTES: usize = 1 << 20;
    const BLOCKS: usize = 3 * 1024;
    rustix::fs::sync();
    let touched: Vec<Vec<u8>> = (0..BLOCKS).map(|_| vec![1; BLOCK_BYTES]).collect();
    std::hint::black_box(&touched);
}

/// A program on one core, killed when dropped.
pub struct Pinned {
    child: Child,
}

impl Pinned {
    /// Starts it; what it prints goes to `log`.
    pub fn start(core: usize, log: &Path, program: &str, arguments: &[&str]) -> Result<Pinned> {
        let log = fs::File::create(log)?;
        let program = find(program).unwrap_or_else(|| program.into());
        let child = Command::new("taskset")
            .arg("-c")
            .arg(core.to_string())
            .arg(program)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()?;
        Ok(Pinned { child })
    }

    /// Its process id; `taskset` becomes the program.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // Its children go with it where it is asked to end.
        if let Some(pid) = Pid::from_raw(self.child.id() as i32) {
            let _ = kill_process(pid, Signal::TERM);
        }
        let asked = Instant::now();
        while asked.elapsed() < Duration::from_secs(5) {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Waits until something listens.
pub async fn until_listening(address: SocketAddr) -> Result<()> {
    let started = Instant::now();
    while tokio::net::TcpStream::connect(address).await.is_err() {
        ensure!(
            started.elapsed() < STARTED_WITHIN,
            "{address} does not listen"
        );
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    Ok(())
}

/// Keeps all threads of a process on one core.
pub fn pin(pid: u32, core: usize) -> Result<()> {
    let output = Command::new("taskset")
        .args(["-acp", &core.to_string(), &pid.to_string()])
        .output()?;
    ensure!(output.status.success(), "process {pid} cannot be pinned");
    Ok(())
}

/// A process and all below it.
fn family(pid: u32) -> Vec<u32> {
    let mut parents: HashMap<u32, Vec<u32>> = HashMap::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse().ok()) else {
            continue;
        };
        if let Some(parent) = stat::fields(pid).and_then(|fields| fields.get(1)?.parse().ok()) {
            parents.entry(parent).or_default().push(pid);
        }
    }
    let mut all = vec![pid];
    let mut at = 0;
    while let Some(next) = all.get(at) {
        all.extend(
            parents
                .get(next)
                .into_iter()
                .flatten()
                .copied()
                .collect::<Vec<_>>(),
        );
        at += 1;
    }
    all
}

/// CPU seconds that a process and all below it have used.
pub fn cpu_seconds(pid: u32) -> f64 {
    family(pid)
        .into_iter()
        .filter_map(stat::own_cpu_seconds)
        .sum()
}

/// CPU seconds that the threads of a process with this name have used.
pub fn thread_cpu_seconds(pid: u32, name: &str) -> f64 {
    let tasks = fs::read_dir(format!("/proc/{pid}/task"));
    let of = |task: fs::DirEntry| -> Option<f64> {
        let is_named = fs::read_to_string(task.path().join("comm")).ok()?.trim() == name;
        let task = task.file_name().into_string().ok()?;
        is_named.then(|| stat::own_cpu_seconds(format!("{pid}/task/{task}")))?
    };
    tasks.into_iter().flatten().flatten().filter_map(of).sum()
}

/// Resident bytes of a process and all below it.
pub fn resident_bytes(pid: u32) -> f64 {
    let of = |pid: u32| -> Option<f64> {
        let text = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let line = text.lines().find(|line| line.starts_with("VmRSS:"))?;
        let kib: f64 = line.split_whitespace().nth(1)?.parse().ok()?;
        Some(kib * 1024.0)
    };
    family(pid).into_iter().filter_map(of).sum()
}

/// Runs a floor that prints one line of JSON, on one core.
pub fn floor_json(parts: &Path, core: usize, arguments: &[&str]) -> Result<Value> {
    let output = Command::new("taskset")
        .arg("-c")
        .arg(core.to_string())
        .arg(parts)
        .args(arguments)
        .output()?;
    ensure!(
        output.status.success(),
        "{arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(serde_json::from_slice(&output.stdout)?)
}
