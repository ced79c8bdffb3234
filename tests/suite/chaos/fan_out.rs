//! The same for three nodes of another cache, each with the whole site, purged
//! by telling each of them.
//!
//! As careful as such a script can be: a purge counts as answered 200 only once
//! every node has said so, each is asked again until it has, and whoever does
//! not answer in time makes the whole purge unanswered. Kinds that a cache does
//! not know are made of those that it does: the script knows every URL and
//! every slice. Modes are not told apart. A cut link of the schedule lies between the node that
//! the script runs beside and the others: nothing arrives, or the answer is lost.

use std::fs::{self, File};
use std::net::SocketAddr;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use pingora_slice_tests::cluster::{Ports, WAIT_MAX};
use pingora_slice_tests::relay::Links;
use pingora_slice_tests::{Ask, Origin};
use rand::Rng;
use rand::rngs::StdRng;
use rustix::process::{Pid, Signal, kill_process_group};
use tempfile::TempDir;
use tokio::time::{Instant, sleep, timeout};

use super::faults::Herd;
use super::purges::{Kind, PURGE_PATIENCE, Purge};
use super::world::{Object, SLICE};

/// What one request to one node may take.
const TRY_MAX: Duration = Duration::from_secs(2);
/// Between two tries at a node.
const TRY_AGAIN: Duration = Duration::from_millis(100);
/// Between two looks whether a node serves.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// Where clients connect, in a block of ports.
const CLIENTS: u16 = 0;

/// Another cache.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Cache {
    /// `slice` and `proxy_cache` with the cache-purge module.
    Nginx,
    /// `purge` and `ban` in VCL.
    Varnish,
}

impl Cache {
    fn program(self) -> &'static str {
        match self {
            Cache::Nginx => "nginx",
            Cache::Varnish => "varnishd",
        }
    }

    /// What is missing to run it, in a person's words.
    pub fn missing(self) -> Option<String> {
        let there = |program: &str| {
            std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default())
                .chain([PathBuf::from("/usr/sbin")])
                .any(|dir| dir.join(program).exists())
        };
        if !there(self.program()) {
            let package = format!("{self:?}").to_lowercase();
            return Some(format!("{} (Debian: {package})", self.program()));
        }
        (self == Cache::Nginx && !Path::new(PURGE_MODULE).exists())
            .then(|| format!("{PURGE_MODULE} (Debian: libnginx-mod-http-cache-purge)"))
    }
}

/// Where Debian keeps it.
const PURGE_MODULE: &str = "/usr/lib/nginx/modules/ngx_http_cache_purge_module.so";

/// Nodes that know nothing of one another.
pub(super) struct Fleet {
    cache: Cache,
    nodes: Vec<Single>,
    origin: Origin,
    _dir: TempDir,
}

struct Single {
    home: PathBuf,
    ports: Ports,
    process: Option<Child>,
}

impl Fleet {
    pub async fn start(cache: Cache, size: usize) -> Fleet {
        let origin = Origin::start().await;
        let dir = tempfile::tempdir().expect("temp dir");
        let single = |number: usize| {
            let home = dir.path().join(format!("node{number}"));
            fs::create_dir_all(&home).expect("temp dir");
            let ports = Ports::claim();
            let (clients, origin) = (ports.at(CLIENTS), origin.address());
            let config = match cache {
                Cache::Nginx => nginx_conf(&home, clients, origin),
                Cache::Varnish => varnish_vcl(origin),
            };
            fs::write(home.join("config"), config).expect("temp dir");
            Single {
                home,
                ports,
                process: None,
            }
        };
        let nodes = (1..=size).map(single).collect();
        let mut fleet = Fleet {
            cache,
            nodes,
            origin,
            _dir: dir,
        };
        (1..=fleet.size()).for_each(|id| fleet.spawn(id));
        let started = Instant::now();
        for id in 1..=fleet.size() {
            while !fleet.is_ready(id).await {
                let log = || fs::read_to_string(fleet.nodes[id as usize - 1].home.join("log"));
                assert!(started.elapsed() < WAIT_MAX, "node {id}: {:?}", log());
                sleep(LOOK_EVERY).await;
            }
        }
        fleet
    }

    fn node(&mut self, id: u64) -> &mut Single {
        &mut self.nodes[id as usize - 1]
    }

    /// The purges' sender, over these links.
    pub fn fan_out(&self, links: Links) -> FanOut {
        FanOut {
            cache: self.cache,
            nodes: (1..=self.size()).map(|id| self.address(id)).collect(),
            links,
        }
    }
}

impl Single {
    /// To the process and its children, which are a group of their own.
    fn signal(&self, signal: Signal) {
        if let Some(process) = &self.process {
            let _ = kill_process_group(Pid::from_child(process), signal);
        }
    }

    fn kill(&mut self) {
        self.signal(Signal::KILL);
        if let Some(mut process) = self.process.take() {
            let _ = process.wait();
        }
    }
}

impl Drop for Single {
    fn drop(&mut self) {
        self.kill();
    }
}

impl Herd for Fleet {
    fn size(&self) -> u64 {
        self.nodes.len() as u64
    }

    fn address(&self, id: u64) -> SocketAddr {
        self.nodes[id as usize - 1].ports.at(CLIENTS)
    }

    fn pause(&mut self, id: u64) {
        self.node(id).signal(Signal::STOP);
    }

    fn unpause(&mut self, id: u64) {
        self.node(id).signal(Signal::CONT);
    }

    fn kill(&mut self, id: u64) {
        self.node(id).kill();
    }

    fn spawn(&mut self, id: u64) {
        let (cache, clients) = (self.cache, self.address(id));
        let node = self.node(id);
        let log = File::options()
            .create(true)
            .append(true)
            .open(node.home.join("log"))
            .expect("temp dir");
        let mut command = Command::new(cache.program());
        let path = std::env::var("PATH").unwrap_or_default();
        match cache {
            Cache::Nginx => command.arg("-c").arg(node.home.join("config")),
            Cache::Varnish => command
                .args(["-F", "-j", "none", "-a", &clients.to_string(), "-T", "none"])
                .args(["-s", "malloc,64m", "-p", "thread_pools=1"])
                .arg("-n")
                .arg(node.home.join("work"))
                .arg("-f")
                .arg(node.home.join("config")),
        };
        command
            .env("PATH", format!("{path}:/usr/sbin"))
            .current_dir(&node.home)
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a file"))
            .stderr(log)
            .process_group(0);
        node.process = Some(command.spawn().expect("it can be started"));
    }

    fn ended(&mut self, id: u64) -> Option<String> {
        let node = self.node(id);
        let status = node.process.as_mut()?.try_wait().ok()??;
        // Children that it has left.
        node.kill();
        Some(status.to_string())
    }

    async fn leader(&self) -> Option<u64> {
        None
    }

    fn fill(&mut self, _id: u64) -> bool {
        false
    }

    fn relieve(&mut self, _id: u64) {}

    async fn is_ready(&self, id: u64) -> bool {
        let ask = Ask::get("/ready");
        matches!(
            timeout(TRY_MAX, ask.send(self.address(id))).await,
            Ok(Ok(_))
        )
    }

    async fn state(&self) -> String {
        String::new()
    }

    fn origin(&self) -> &Origin {
        &self.origin
    }
}

fn nginx_conf(home: &Path, listen: SocketAddr, origin: SocketAddr) -> String {
    let home = home.display();
    format!(
        "load_module {PURGE_MODULE};
worker_processes 1; pid {home}/pid; error_log {home}/log error; daemon off; user root;
events {{ worker_connections 4096; }}
http {{
  access_log off; tcp_nodelay on; keepalive_requests 1000000; server_tokens off;
  proxy_temp_path {home}/temp; client_body_temp_path {home}/temp2;
  fastcgi_temp_path {home}/temp3; uwsgi_temp_path {home}/temp4; scgi_temp_path {home}/temp5;
  proxy_cache_path {home}/cache levels=1:2 keys_zone=c:16m max_size=1g inactive=1d use_temp_path=off;
  upstream origin {{ server {origin}; keepalive 64; }}
  server {{
    listen {listen} backlog=4096;
    location = /ready {{ return 200 ready; }}
    location /.purge/ {{
      rewrite ^/.purge(/.*)$ $1 break;
      proxy_cache_purge c $host$uri$http_x_slice;
    }}
    location / {{
      slice {SLICE}; proxy_cache c; proxy_cache_lock on;
      proxy_cache_key $host$uri$slice_range;
      proxy_set_header Range $slice_range; proxy_set_header Host $host;
      proxy_http_version 1.1; proxy_set_header Connection \"\";
      proxy_cache_valid 200 206 1h; proxy_pass http://origin;
      add_header X-Cache $upstream_cache_status;
    }}
  }}
}}
"
    )
}

fn varnish_vcl(origin: SocketAddr) -> String {
    format!(
        "vcl 4.1;
import std;
backend default {{ .host = \"{}\"; .port = \"{}\"; }}
sub vcl_recv {{
  if (req.url == \"/ready\") {{ return (synth(200, \"ready\")); }}
  if (req.method == \"PURGE\") {{ return (purge); }}
  if (req.method == \"BAN\") {{
    if (std.ban(req.http.X-Ban)) {{ return (synth(200, \"banned\")); }}
    return (synth(400, std.ban_error()));
  }}
}}
sub vcl_backend_response {{
  set beresp.ttl = 1h;
  set beresp.grace = 0s;
  set beresp.http.X-Host = bereq.http.host;
  set beresp.http.X-Url = bereq.url;
  set beresp.http.X-Tags = beresp.http.Cache-Tag + \" \" + beresp.http.Surrogate-Key;
}}
sub vcl_deliver {{
  if (obj.hits > 0) {{ set resp.http.X-Cache = \"HIT\"; }} else {{ set resp.http.X-Cache = \"MISS\"; }}
}}
",
        origin.ip(),
        origin.port()
    )
}

/// Sends a purge to each node.
pub(super) struct FanOut {
    cache: Cache,
    nodes: Vec<SocketAddr>,
    links: Links,
}

impl FanOut {
    /// Whether every node has answered that it has forgotten.
    pub async fn purge(
        &self,
        purge: &Purge,
        objects: &[Object],
        rng: &mut StdRng,
        tell: impl Fn(String),
    ) -> bool {
        let here = rng.random_range(1..=self.nodes.len() as u64);
        let asks = match self.cache {
            Cache::Nginx => slices_of(purge, objects),
            Cache::Varnish => bans_of(purge, objects),
        };
        let until = Instant::now() + PURGE_PATIENCE;
        let told = (1u64..).zip(&self.nodes).map(|(there, address)| {
            let asks = &asks;
            async move {
                for ask in asks {
                    while !self.once(ask, here, there, *address).await {
                        if Instant::now() >= until {
                            return false;
                        }
                        sleep(TRY_AGAIN).await;
                    }
                }
                true
            }
        });
        let told = futures::future::join_all(told).await;
        let all = told.iter().all(|told| *told);
        tell(format!("beside node {here}: {told:?}"));
        all
    }

    /// One request to one node; whether it said that what was named is gone.
    async fn once(&self, ask: &Ask, here: u64, there: u64, address: SocketAddr) -> bool {
        let is_cut = |from, to| from != to && self.links.get(from, to).cut;
        if is_cut(here, there) {
            return false;
        }
        let answer = timeout(TRY_MAX, ask.send(address)).await;
        // 404 and 412: nginx had nothing there.
        let gone = matches!(&answer, Ok(Ok(reply)) if matches!(reply.status, 200 | 404 | 412));
        gone && !is_cut(there, here)
    }
}

/// nginx forgets one slice at a time, by its key.
fn slices_of(purge: &Purge, objects: &[Object]) -> Vec<Ask> {
    let slices = purge.covered.iter().flat_map(|o| {
        let Object { host, film, .. } = &objects[*o];
        (0..film.length().div_ceil(SLICE)).map(move |slice| {
            let (start, end) = (slice * SLICE, (slice + 1) * SLICE - 1);
            Ask::get(&format!("/.purge{}", film.path()))
                .header("Host", host)
                .header("X-Slice", format!("bytes={start}-{end}"))
        })
    });
    slices.collect()
}

/// Varnish forgets a URL at once, and what an expression describes.
fn bans_of(purge: &Purge, objects: &[Object]) -> Vec<Ask> {
    let url = |o: &usize| {
        let Object { host, film, .. } = &objects[*o];
        Ask::new("PURGE", film.path()).header("Host", host)
    };
    let ban = |expression: String| Ask::new("BAN", "/").header("X-Ban", expression);
    let tagged = |tag: &str| ban(format!("obj.http.X-Tags ~ {tag}"));
    match &purge.kind {
        Kind::Url(o) => vec![url(o)],
        Kind::Prefix(host, path) => vec![ban(format!(
            "obj.http.X-Host == {host} && obj.http.X-Url ~ ^{path}"
        ))],
        Kind::Tag(tag) => vec![tagged(tag)],
        Kind::Host(host) => vec![ban(format!("obj.http.X-Host == {host}"))],
        Kind::All => vec![ban("obj.status != 0".to_owned())],
        Kind::Batch(listed, tag) => listed.iter().map(url).chain([tagged(tag)]).collect(),
    }
}
