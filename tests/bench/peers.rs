//! The origin and the peers, ready configured: one worker, everything cached,
//! slices of 1 MiB where the program has slices. All state is in one directory.

use std::fs;
use std::io::Write as _;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use pingora_slice_tests::cluster::Ports;
use tempfile::TempDir;

use crate::machine::{CLIENT_CORE, Pinned, SERVER_CORE, until_listening};

/// Sizes of the origin's objects, which are also their names.
pub const OBJECTS: &[u64] = &[
    1024,
    10 * 1024,
    1024 * 1024,
    64 * 1024 * 1024,
    100 * 1024 * 1024,
    1024 * 1024 * 1024,
];

/// Something that answers HTTP.
pub struct Server {
    /// As the report calls it.
    pub name: &'static str,
    /// Where.
    pub address: SocketAddr,
    process: Pinned,
    _ports: Ports,
}

impl Server {
    /// The process whose family's CPU time is counted.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }
}

/// A directory for everything that the peers write.
pub struct Home {
    dir: TempDir,
}

impl Home {
    /// With the origin's objects in it.
    pub fn new() -> Result<Home> {
        let dir = tempfile::Builder::new()
            .prefix("pingora-slice-bench-")
            .tempdir()?;
        // Some peers give up their rights before they look into it.
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755))?;
        let www = dir.path().join("www");
        fs::create_dir(&www)?;
        for bytes in OBJECTS {
            let mut file = fs::File::create(www.join(bytes.to_string()))?;
            let mut left = *bytes;
            let mut seed = 1u64;
            while left > 0 {
                let block: Vec<u8> = (0..left.min(1 << 20).div_ceil(8))
                    .flat_map(|_| {
                        seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1);
                        (seed >> 8).to_le_bytes()
                    })
                    .collect();
                let take = (left as usize).min(block.len());
                file.write_all(&block[..take])?;
                left -= take as u64;
            }
        }
        Ok(Home { dir })
    }

    /// A path in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn log(&self, name: &str) -> PathBuf {
        self.path(&format!("{name}.log"))
    }

    async fn server(
        &self,
        name: &'static str,
        ports: Ports,
        core: usize,
        program: &str,
        arguments: &[&str],
    ) -> Result<Server> {
        let address = ports.at(0);
        let log = self.log(name);
        let process = Pinned::start(core, &log, program, arguments)?;
        until_listening(address)
            .await
            .with_context(|| fs::read_to_string(log).unwrap_or_default())?;
        Ok(Server {
            name,
            address,
            process,
            _ports: ports,
        })
    }

    /// nginx over files, beside the client.
    pub async fn origin(&self) -> Result<Server> {
        let ports = Ports::claim();
        let root = self.path("www");
        let server = format!(
            "server {{ listen {} backlog=4096; root {root:?};
               add_header Cache-Control \"public, max-age=86400\"; }}",
            ports.at(0)
        );
        let config = self.nginx_config("origin", &server)?;
        let arguments = ["-c", path(&config), "-e", "stderr"];
        self.server("origin", ports, CLIENT_CORE, "nginx", &arguments)
            .await
    }

    /// nginx with slices.
    pub async fn nginx(&self, upstream: SocketAddr) -> Result<Server> {
        let ports = Ports::claim();
        let cache = self.path(&format!("nginx-cache-{}", ports.at(0).port()));
        let server = format!(
            "proxy_cache_path {cache:?} levels=1:2 keys_zone=c:64m max_size=20g inactive=1d use_temp_path=off;
             upstream o {{ server {upstream}; keepalive 64; }}
             server {{ listen {} backlog=4096;
               location / {{ slice 1m; proxy_cache c; proxy_cache_lock on;
                 proxy_cache_key $host$uri$is_args$args$slice_range;
                 proxy_set_header Range $slice_range; proxy_http_version 1.1; proxy_set_header Connection \"\";
                 proxy_cache_valid 200 206 1h; proxy_pass http://o; }} }}",
            ports.at(0)
        );
        let config = self.nginx_config(&format!("nginx-{}", ports.at(0).port()), &server)?;
        let arguments = ["-c", path(&config), "-e", "stderr"];
        self.server("nginx", ports, SERVER_CORE, "nginx", &arguments)
            .await
    }

    fn nginx_config(&self, name: &str, http: &str) -> Result<PathBuf> {
        let config = self.path(&format!("{name}.conf"));
        let pid = self.path(&format!("{name}.pid"));
        // `user` is for a start as root, and without effect else.
        let text = format!(
            "user root; worker_processes 1; pid {pid:?}; daemon off; error_log stderr;
             events {{ worker_connections 16384; }}
             http {{ access_log off; sendfile on; tcp_nodelay on; keepalive_requests 1000000000; keepalive_timeout 300;
               {http} }}\n"
        );
        fs::write(&config, text)?;
        Ok(config)
    }

    /// Varnish; it has no slices.
    pub async fn varnish(&self, upstream: SocketAddr) -> Result<Server> {
        let ports = Ports::claim();
        let vcl = self.path("varnish.vcl");
        let (host, port) = (upstream.ip(), upstream.port());
        let text = format!(
            "vcl 4.1;\nbackend default {{ .host = \"{host}\"; .port = \"{port}\"; }}\n\
             sub vcl_backend_response {{ set beresp.ttl = 1h; }}\n"
        );
        fs::write(&vcl, text)?;
        let (dir, listen) = (self.path("varnish"), ports.at(0).to_string());
        let arguments = [
            "-F",
            "-j",
            "none",
            "-n",
            path(&dir),
            "-f",
            path(&vcl),
            "-a",
            &listen,
            "-s",
            "malloc,4g",
            "-p",
            "thread_pools=1",
        ];
        self.server("Varnish", ports, SERVER_CORE, "varnishd", &arguments)
            .await
    }

    /// Traffic Server with its slice plug-in; it refuses to run as root.
    pub async fn traffic_server(&self, upstream: SocketAddr) -> Result<Server> {
        let ports = Ports::claim();
        let port = ports.at(0).port();
        let dir = self.path(&format!("ats-{port}"));
        let (etc, var) = (dir.join("etc"), dir.join("var"));
        for sub in ["run", "cache", "log"] {
            fs::create_dir_all(var.join(sub))?;
        }
        let copied = Command::new("cp")
            .arg("-r")
            .arg("/etc/trafficserver")
            .arg(&etc)
            .status()?;
        anyhow::ensure!(
            copied.success(),
            "Traffic Server's configuration cannot be copied"
        );
        let records = [
            format!("http.server_ports STRING {port}"),
            "reverse_proxy.enabled INT 1".into(),
            "url_remap.remap_required INT 1".into(),
            "http.cache.http INT 1".into(),
            "http.cache.required_headers INT 0".into(),
            "exec_thread.autoconfig INT 0".into(),
            "exec_thread.limit INT 1".into(),
            "accept_threads INT 0".into(),
            "cache.ram_cache.size INT 4294967296".into(),
            "cache.ram_cache_cutoff INT 41943040".into(),
            format!("local_state_dir STRING {}", path(&var.join("run"))),
            format!("log.logfile_dir STRING {}", path(&var.join("log"))),
            "log.logging_enabled INT 0".into(),
        ];
        let records: String = records
            .iter()
            .map(|r| format!("CONFIG proxy.config.{r}\n"))
            .collect();
        fs::write(etc.join("records.config"), records)?;
        fs::write(
            etc.join("storage.config"),
            format!("{} 8G\n", path(&var.join("cache"))),
        )?;
        fs::write(
            etc.join("remap.config"),
            format!(
                "map http://127.0.0.1:{port}/ http://{upstream}/ @plugin=slice.so \
                 @pparam=--blockbytes=1m @plugin=cache_range_requests.so\n"
            ),
        )?;
        fs::write(etc.join("plugin.config"), "")?;
        let user = [
            "--reuid",
            "trafficserver",
            "--regid",
            "trafficserver",
            "--clear-groups",
        ];
        let etc_env = format!("PROXY_CONFIG_CONFIG_DIR={}", path(&etc));
        let run_env = format!("PROXY_CONFIG_LOCAL_STATE_DIR={}", path(&var.join("run")));
        let mut arguments = Vec::new();
        if rustix::process::geteuid().is_root() {
            let owned = Command::new("chown")
                .arg("-R")
                .arg("trafficserver:")
                .arg(&dir)
                .status()?;
            anyhow::ensure!(
                owned.success(),
                "Traffic Server's directory cannot be given to it"
            );
            arguments.extend(["setpriv"].iter().chain(&user));
        }
        arguments.extend([etc_env.as_str(), run_env.as_str(), "traffic_server"]);
        if let Some(at) = arguments.iter().position(|a| *a == "setpriv") {
            // setpriv USER env VARS PROGRAM
            arguments.remove(at);
            arguments.insert(user.len(), "env");
            return self
                .server("Traffic Server", ports, SERVER_CORE, "setpriv", &arguments)
                .await;
        }
        self.server("Traffic Server", ports, SERVER_CORE, "env", &arguments)
            .await
    }

    /// The floor: Pingora writing bytes from memory, with this many objects of 1 KiB
    /// in a map.
    pub async fn floor(&self, parts: &Path, objects: u64) -> Result<Server> {
        self.from_memory(parts, "floor", objects).await
    }

    /// The kernel's calls alone, with as many.
    pub async fn kernel(&self, parts: &Path, objects: u64) -> Result<Server> {
        self.from_memory(parts, "kernel", objects).await
    }

    async fn from_memory(&self, parts: &Path, name: &'static str, objects: u64) -> Result<Server> {
        let ports = Ports::claim();
        let listen = ports.at(0).to_string();
        let arguments = [name, &listen, &objects.to_string()];
        self.server(name, ports, SERVER_CORE, path(parts), &arguments)
            .await
    }

    /// Three nodes of nothing but Pingora and quinn.
    pub async fn bare_nodes(&self, parts: &Path) -> Result<Server> {
        let ports = Ports::claim();
        let (listen, dir) = (
            ports.at(0).to_string(),
            self.path(&format!("nodes-{}", ports.at(0).port())),
        );
        self.server(
            "bare nodes",
            ports,
            SERVER_CORE,
            path(parts),
            &["nodes", &listen, path(&dir)],
        )
        .await
    }
}

/// Temporary directories have names that are text.
pub fn path(path: &Path) -> &str {
    path.to_str().expect("a path that is text")
}
