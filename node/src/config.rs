//! One typed struct: parse, default, refuse.
//!
//! A [`Config`] that exists is complete and consistent: keys that are absent
//! have their default, unknown ones were refused, and so was everything that
//! can be judged before a port is bound. All problems are reported at once,
//! each with its key, its value and a remedy. `configs/pingora_slice.yaml`
//! describes every key. Nothing else in the daemon reads configuration files
//! or the environment. Not here: how YAML becomes values
//! (`read`), the keys and their rules (`rules`), which of them a running node
//! takes (`live`).

mod address;
mod live;
mod read;
mod rules;
#[cfg(test)]
mod tests;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http::HeaderName;
use pingora_slice_cluster::handle::ClusterConfig;
use regex::Regex;
use serde_yaml::{Mapping, Value};

use crate::budget::Sum;
use crate::l2::L2Config;
use address::reaches;
pub use live::{Changes, LISTEN_TLS, Live, Settings};
pub use read::{Problem, Problems};
use read::{Reader, Section};
use rules::{read_config, refuse_contradictions, refuse_missing_files};

/// Where the configuration is looked for when no file is named.
pub const DEFAULT_FILE: &str = "pingora_slice.yaml";

/// The configuration, complete and checked.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where clients connect.
    pub listen: Vec<Listen>,
    /// The origins, tried in turn.
    pub upstreams: Vec<Upstream>,
    /// Host sent to the origin, when not the client's.
    pub upstream_host: Option<String>,
    /// Serving threads.
    pub threads: usize,
    /// Slice size of new generations, bytes.
    pub slice_bytes: u32,
    /// Slices of one response in flight at most.
    pub max_concurrent_subrequests: usize,
    /// How often a failed origin request is tried again.
    pub max_retries: u32,
    /// Paths that are sliced; empty: all.
    pub slice_patterns: Vec<Regex>,
    /// Whether anything is kept at all.
    pub enable_cache: bool,
    /// Freshness when the origin gives none and `default_freshness` is `ttl`; the cap of heuristics.
    pub cache_ttl: Duration,
    /// What to do when the origin gives no freshness.
    pub default_freshness: DefaultFreshness,
    /// Where the rules of caching leave a choice.
    pub caching: Caching,
    /// Memory store, bytes.
    pub l1_bytes_max: u64,
    /// What `memory_budget` is divided into.
    pub memory: Sum,
    /// Disk store; `None` when switched off.
    pub l2: Option<L2Config>,
    /// Where it would be, when switched off.
    pub unused_l2_dir: Option<PathBuf>,
    /// Larger objects pass uncached, bytes.
    pub max_object_bytes: Option<u64>,
    /// How an unknown object is first asked for.
    pub origin_probe: OriginProbe,
    /// Log of stitching faults.
    pub stitch_log: StitchLog,
    /// Metrics listener.
    pub metrics_endpoint: Option<SocketAddr>,
    /// PURGE.
    pub purge: PurgeConfig,
    /// Admin API.
    pub admin: Option<AdminConfig>,
    /// Cluster; `None`: one machine alone.
    pub cluster: Option<ClusterConfig>,
    /// Patience with the origin.
    pub origin_timeouts: OriginTimeouts,
    /// Patience with clients.
    pub client_timeouts: ClientTimeouts,
    /// How long requests under way may take after SIGTERM.
    pub drain_timeout: Duration,
    /// What is allowed but deserves a line in the log.
    pub warnings: Vec<Problem>,
    /// Where all this came from.
    pub source: Source,
}

/// Where a configuration came from: enough to load it again.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Source {
    /// The file; `None`: built-in defaults.
    pub path: Option<PathBuf>,
    /// `--port`: replaces the port of the first `listen` address.
    pub port: Option<u16>,
}

/// `origin_timeouts`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OriginTimeouts {
    /// Until a connection stands, TLS included.
    pub connect: Duration,
    /// Between two reads of a response.
    pub read: Duration,
    /// From the request's last byte to the response's whole head.
    pub total_header: Duration,
    /// For one slice, or the head of an object, all tries together.
    pub total: Duration,
}

/// `client_timeouts`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClientTimeouts {
    /// From a request's first byte to its whole head.
    pub header: Duration,
    /// Between two requests on one connection.
    pub idle: Duration,
    /// A client that does not take 64 KiB in this time is let go.
    pub write: Duration,
    /// A client slower than this, bytes per second, is let go; 0: never.
    pub bytes_per_second_min: u64,
    /// How long it may be slower; only time spent waiting for it counts.
    pub slow: Duration,
    /// For one answer; `None`: as long as it takes.
    pub total: Option<Duration>,
}

impl Config {
    /// Reads and checks a file.
    ///
    /// # Errors
    /// Every problem of the file, not only the first.
    pub fn load(path: &Path) -> Result<Config, Problems> {
        Config::load_from(Source {
            path: Some(path.to_path_buf()),
            port: None,
        })
    }

    /// Reads and checks a file, or the built-in defaults, with `--port`.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn load_from(source: Source) -> Result<Config, Problems> {
        let one = |key: &Path, value: String, remedy: &str| {
            let (key, remedy) = (key.display().to_string(), remedy.to_string());
            Problems(vec![Problem { key, value, remedy }])
        };
        let text = match &source.path {
            Some(path) => Some(
                std::fs::read_to_string(path)
                    .map_err(|e| one(path, e.to_string(), "name a readable YAML file"))?,
            ),
            None => None,
        };
        let dir = source
            .path
            .as_deref()
            .and_then(Path::parent)
            .unwrap_or(Path::new(""));
        let base_dir = std::env::current_dir().unwrap_or_default().join(dir);
        let env = |name: &str| std::env::var(name).ok();
        Config::build(text.as_deref(), &base_dir, source, &env)
    }

    /// Loads the same source again, for SIGHUP.
    ///
    /// # Errors
    /// As [`Config::load`]; go on with what is in force.
    pub fn reload(&self) -> Result<Config, Problems> {
        Config::load_from(self.source.clone())
    }

    /// Checks YAML text; relative paths start at `base_dir`. Does not check
    /// whether the files that it names exist.
    ///
    /// # Errors
    /// Every problem of the text.
    pub fn parse(text: &str, base_dir: &Path) -> Result<Config, Problems> {
        let env = |name: &str| std::env::var(name).ok();
        Config::build(Some(text), base_dir, Source::default(), &env)
    }

    /// A last check, for a start only: this node's own address as origin. A file without
    /// `listen` may be meant for `--port`, so loading it only warns.
    ///
    /// # Errors
    /// The one problem.
    pub fn refuse_own_upstream(&self) -> Result<(), Problems> {
        match self.own_upstream() {
            Some(problem) => Err(Problems(vec![problem])),
            None => Ok(()),
        }
    }

    fn build(
        text: Option<&str>,
        base_dir: &Path,
        source: Source,
        env: &dyn Fn(&str) -> Option<String>,
    ) -> Result<Config, Problems> {
        let map = parse_yaml(text.unwrap_or(""))?;
        let reader = Reader {
            env,
            base_dir,
            problems: Default::default(),
        };
        let may_set_port = text.is_some() && source.port.is_none() && !map.contains_key("listen");
        let mut config = Section::read(&reader, "", map, |root| read_config(root, &source));
        config.source = source;
        refuse_contradictions(&mut config, &reader, may_set_port);
        if config.source.path.is_some() {
            refuse_missing_files(&config, &reader);
        }
        match reader.problems.into_inner() {
            problems if problems.is_empty() => Ok(config),
            problems => Err(Problems(problems)),
        }
    }

    /// PURGE for everybody who reaches a listener.
    pub fn open_purge(&self) -> Option<Problem> {
        let is_open = |l: &&Listen| !l.address.ip().to_canonical().is_loopback();
        let open = self.listen.iter().find(is_open)?;
        let is_for_all = self.purge.enabled && self.purge.auth_token.is_none();
        is_for_all.then(|| Problem {
            key: "purge.auth_token".into(),
            value: "(absent)".into(),
            remedy: format!(
                "PURGE without a token is for loopback listeners only, and {} is open to others: \
                 give a token, or listen on 127.0.0.1",
                open.address,
            ),
        })
    }

    fn own_upstream(&self) -> Option<Problem> {
        let own = |u: &&Upstream| {
            self.listen
                .iter()
                .any(|l| reaches(&u.host, u.port, l.address))
        };
        let own = self.upstreams.iter().find(own)?;
        Some(Problem {
            key: "upstream_address".to_string(),
            value: format!("{}:{}", own.host, own.port),
            remedy: "is this node's own `listen` address, so it would ask itself for ever: set \
                     upstream_address to the origin, or move this node with `listen` or --port \
                     (the defaults of both are port 8080: one must be changed)"
                .to_string(),
        })
    }
}

/// One client-facing listener.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listen {
    /// Address and port.
    pub address: SocketAddr,
    /// Certificate and key (PEM), for TLS.
    pub tls: Option<ListenTls>,
    /// HTTP/2: by ALPN with TLS, prior knowledge without.
    pub h2: bool,
}

impl Listen {
    /// A listener without TLS.
    pub fn plain(address: SocketAddr) -> Self {
        Listen {
            address,
            tls: None,
            h2: false,
        }
    }
}

/// Certificate of a listener.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListenTls {
    /// PEM chain.
    pub cert: PathBuf,
    /// PEM key.
    pub key: PathBuf,
}

/// One origin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Upstream {
    /// Host name or address.
    pub host: String,
    /// Port.
    pub port: u16,
    /// `https://`.
    pub tls: bool,
}

impl std::fmt::Display for Upstream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let scheme = if self.tls { "https" } else { "http" };
        // An address of IPv6 is told from its port by brackets.
        match self.host.contains(':') && !self.host.starts_with('[') {
            true => write!(f, "{scheme}://[{}]:{}", self.host, self.port),
            false => write!(f, "{scheme}://{}:{}", self.host, self.port),
        }
    }
}

/// `default_freshness`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DefaultFreshness {
    /// `cache_ttl`.
    Ttl,
    /// RFC 9111 section 4.2.2, at most `cache_ttl`.
    Heuristic,
    /// Not stored.
    None,
}

/// `caching`: where RFC 9111 leaves a choice to the site.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caching {
    /// Targeted fields (RFC 9213) that are obeyed, the first that a response has.
    pub targeted_fields: Vec<HeaderName>,
    /// What a request may demand.
    pub request_directives: Honoured,
    /// When a response with Set-Cookie is stored.
    pub set_cookie: SetCookie,
    /// What of a query names an object.
    pub query: QueryRules,
    /// Whether `Cache-Status` names the key.
    pub show_key: bool,
    /// How long after it is stale a response is served while it is validated,
    /// where it does not say so itself and does not forbid it (RFC 5861 section 3).
    pub stale_while_revalidate: Duration,
    /// The same, while the origin fails (section 4).
    pub stale_if_error: Duration,
}

impl Default for Caching {
    fn default() -> Caching {
        Caching {
            targeted_fields: vec![HeaderName::from_static("cdn-cache-control")],
            request_directives: Honoured::default(),
            set_cookie: SetCookie::Shared,
            query: QueryRules::default(),
            show_key: false,
            stale_while_revalidate: Duration::ZERO,
            stale_if_error: Duration::ZERO,
        }
    }
}

/// `caching.request_directives`: the directives of RFC 9111 section 5.2.1 that
/// clients are heard with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "each is the directive of its name")]
pub struct Honoured {
    pub max_age: bool,
    pub min_fresh: bool,
    pub max_stale: bool,
    pub only_if_cached: bool,
    pub no_cache: bool,
    pub no_store: bool,
}

impl Default for Honoured {
    fn default() -> Honoured {
        Honoured::of(&Directive::ALL)
    }
}

impl Honoured {
    /// Those of a list.
    pub fn of(list: &[Directive]) -> Honoured {
        Honoured {
            max_age: list.contains(&Directive::MaxAge),
            min_fresh: list.contains(&Directive::MinFresh),
            max_stale: list.contains(&Directive::MaxStale),
            only_if_cached: list.contains(&Directive::OnlyIfCached),
            no_cache: list.contains(&Directive::NoCache),
            no_store: list.contains(&Directive::NoStore),
        }
    }
}

/// A directive of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "each is the directive of its name")]
pub enum Directive {
    MaxAge,
    MinFresh,
    MaxStale,
    OnlyIfCached,
    NoCache,
    NoStore,
}

impl Directive {
    /// All of them.
    pub const ALL: [Directive; 6] = [
        Directive::MaxAge,
        Directive::MinFresh,
        Directive::MaxStale,
        Directive::OnlyIfCached,
        Directive::NoCache,
        Directive::NoStore,
    ];
}

/// `caching.set_cookie`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SetCookie {
    /// Only with `public`, `s-maxage` or a targeted field.
    Shared,
    /// With any freshness that the origin states (RFC 9111 section 7.3).
    Explicit,
    /// Never.
    Never,
}

/// `caching.query`: what of a query belongs to an object's name. What does not
/// is not sent to the origin either: key and request come from the same bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct QueryRules {
    /// Parameters that are left out.
    pub ignore: Vec<String>,
    /// Whether they are sorted, so that their order does not count.
    pub sort: bool,
}

impl QueryRules {
    /// The target as it names an object.
    pub fn apply(&self, target: String) -> String {
        let Some((path, query)) = target.split_once('?') else {
            return target;
        };
        if self.ignore.is_empty() && !self.sort {
            return target;
        }
        let is_kept = |parameter: &&str| {
            let name = parameter.split('=').next().unwrap_or_default();
            !self.ignore.iter().any(|ignored| ignored == name)
        };
        let mut parameters: Vec<&str> = query.split('&').filter(is_kept).collect();
        if self.sort {
            // Stable: values of one name keep their order.
            parameters.sort_by_key(|parameter| parameter.split('=').next());
        }
        match parameters.is_empty() {
            true => path.to_owned(),
            false => format!("{path}?{}", parameters.join("&")),
        }
    }
}

/// `origin_probe`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OriginProbe {
    /// The ranged GET for the wanted slice.
    Range,
    /// A HEAD first.
    Head,
}

/// `stitch_log`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StitchLog {
    /// Whether stitching faults are logged.
    pub enabled: bool,
    /// At most one line in this time.
    pub pace: Duration,
}

/// `purge`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PurgeConfig {
    /// Whether PURGE is answered.
    pub enabled: bool,
    /// What a PURGE must show.
    pub auth_token: Option<Secret>,
    /// Whether purges are counted in the metrics.
    pub enable_metrics: bool,
}

/// `admin`.
#[derive(Clone, Debug, PartialEq)]
pub struct AdminConfig {
    /// Listener.
    pub address: SocketAddr,
    /// Bearer token.
    pub auth_token: Secret,
}

/// A token: compared in constant time, never printed.
#[derive(Clone)]
pub struct Secret(String);

impl PartialEq for Secret {
    fn eq(&self, other: &Secret) -> bool {
        self.matches(other.0.as_bytes())
    }
}

impl Secret {
    /// Wraps a token.
    pub fn new(token: impl Into<String>) -> Self {
        Secret(token.into())
    }

    /// Whether `given` is the token, in constant time.
    pub fn matches(&self, given: &[u8]) -> bool {
        use subtle::ConstantTimeEq;
        self.0.as_bytes().ct_eq(given).into()
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret(..)")
    }
}

fn parse_yaml(text: &str) -> Result<Mapping, Problems> {
    let refuse = |value: String, remedy: String| {
        Err(Problems(vec![Problem {
            key: "(file)".to_string(),
            value,
            remedy,
        }]))
    };
    match serde_yaml::from_str::<Value>(text) {
        Ok(Value::Mapping(map)) => Ok(map),
        Ok(Value::Null) => Ok(Mapping::new()),
        Ok(_) => refuse(
            "not a map".to_string(),
            "write one `key: value` per line".to_string(),
        ),
        Err(e) => {
            let place = e
                .location()
                .map(|at| format!("line {} column {}", at.line(), at.column()));
            refuse(place.unwrap_or("not YAML".to_string()), e.to_string())
        }
    }
}
