//! Every metric, declared once. This file is the operator's manual: the text
//! above a field is also its `HELP` line, its name without `pingora_slice_` is
//! the field's.
//!
//! Counters and histograms are counted where the fact is known, once; gauges
//! are read when somebody looks ([`Metrics::render`]). A series whose labels
//! stand with its name exists from the start, at 0, so that a rate over it never
//! begins with a hole. One registry per node and nothing global: several
//! nodes live in one process in the tests.
//!
//! Not here: how the metrics of several nodes become one page ([`merge`]).

pub mod merge;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

use http::StatusCode;
use pingora_slice_cluster::{NodeId, PurgeIndex};
use prometheus::core::Collector;
use prometheus::{
    Counter, Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec,
    Opts, Registry, TextEncoder,
};

use crate::budget::Sum;
use crate::l2::L2Stats;
use crate::process::{Usage, unix_seconds};

/// What every name begins with, but for [`OF_PROCESS`].
pub const PREFIX: &str = "pingora_slice_";
/// What the names that every exporter has begin with.
pub const OF_PROCESS: &str = "process_";

/// Seconds: from a hit in memory to a large object over a slow line.
const SERVE_SECONDS: &[f64] = &[
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0,
];
/// Seconds: a purge takes one round of the cluster, or at worst one and a half leases.
const PURGE_SECONDS: &[f64] = &[
    0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0,
];

/// Declares the struct, its registration and its manual in one table:
/// `name: Kind`, then `{label = [known values]}` (none known: created when
/// first counted), then `in BUCKETS`.
macro_rules! metrics {
    ($(
        $(#[doc = $help:literal])+
        $name:ident: $kind:ident $({$($label:ident = [$($value:literal)*]),+})? $(in $buckets:ident)?;
    )+) => {
        /// All metrics of one node. See each field.
        #[derive(Debug)]
        pub struct Metrics {
            registry: Registry,
            /// Each metric's name, and its HELP and TYPE as they are written.
            headings: Vec<(String, String)>,
            started: SystemTime,
            /// Held while gauges are set and read, so that two scrapes do not mix.
            scrape: Mutex<()>,
            $($(#[doc = $help])+ pub $name: $kind,)+
        }

        impl Metrics {
            /// All metrics, at 0.
            pub fn new() -> Metrics {
                let registry = Registry::new();
                Metrics {
                    headings: vec![$(heading::<$kind>(stringify!($name), concat!($($help),+)),)+],
                    $($name: $kind::register(&registry, &Declaration {
                        name: stringify!($name),
                        help: concat!($($help),+),
                        labels: &[$($((stringify!($label), &[$($value),*] as &[&str])),+)?],
                        buckets: (&[$($buckets)?] as &[&[f64]]).first().copied().unwrap_or_default(),
                    }),)+
                    started: SystemTime::now(),
                    scrape: Mutex::new(()),
                    registry,
                }
            }
        }
    };
}

metrics! {
    // Requests.
    /// Client requests, PURGE not counted. Worry when it stops.
    requests_total: IntCounter;
    /// Client requests answered through slices.
    sliced_requests_total: IntCounter;
    /// Client requests passed to the origin untouched (methods, no-store, uncacheable, too large). Worry when its share grows: the cache is being bypassed.
    passthrough_requests_total: IntCounter;
    /// The same, and answers that were not kept, by reason. Worry when one grows that the origin did not mean: its answers lost their freshness, or got a cookie.
    passes_total: IntCounterVec {reason = []};
    /// Client responses, by what X-Cache said. Worry when PASS or MISS grows against HIT.
    responses_total: IntCounterVec {cache = ["HIT" "MISS" "STALE" "REVALIDATED" "PASS"]};
    /// The same, by the class of their status, the origin's own included. Worry when the share of 5xx grows: the log names one failed request a second.
    responses_by_status_total: IntCounterVec {class = ["2xx" "3xx" "4xx" "5xx"]};
    /// Seconds from a request's head to the last byte of its answer. Depends on object sizes and clients' lines: compare it with itself.
    request_duration_seconds: Histogram in SERVE_SECONDS;
    /// Seconds from a request's head to the first byte of its answer. What a user feels. Worry when the 99th percentile leaves the origin's own.
    time_to_first_byte_seconds: Histogram in SERVE_SECONDS;
    /// Milliseconds, average since start of request_duration_seconds.
    request_duration_ms_avg: Gauge;
    /// Seconds in which the slices of one answer were read and put in order, waiting for the client not counted. Worry when it grows and clients' lines do not: disk, peers or the origin are slow.
    assembly_duration_seconds: Histogram in SERVE_SECONDS;
    /// Milliseconds, average since start of assembly_duration_seconds.
    assembly_duration_ms_avg: Gauge;

    // Cache.
    /// Slices delivered without asking the origin for them.
    cache_hits_total: IntCounter;
    /// Slices that the origin had to be asked for, by this node or by the owner for it.
    cache_misses_total: IntCounter;
    /// Percent, 0 to 100: hits of hits and misses since start. Worry below 50 for ten minutes.
    cache_hit_rate: Gauge;
    /// Failures of what is stored that requests went on without: damage in memory and on disk (l1_damaged_total, parts_damaged_total, l2_damaged_total), and reads of the disk that failed for now or were given up after 5 s. Worry when it grows at all.
    cache_errors_total: IntCounter;
    /// Slices delivered, by source. Worry when origin grows while l1, l2 and peer do not.
    slices_total: IntCounterVec {source = ["l1" "l2" "flight" "peer" "origin"]};
    /// Bytes in the memory store; at most l1_cache_size_bytes.
    l1_bytes: Gauge;
    /// Bytes on disk, everything counted; at most l2_cache_size_bytes.
    l2_bytes: Gauge;
    /// Slices in memory found damaged, dropped and fetched again. Worry when it grows at all: the memory is failing.
    l1_damaged_total: IntCounter;
    /// Parts of slices that were damaged between landing and the client's socket, and had from another source. Worry when it grows at all: the memory is failing.
    parts_damaged_total: IntCounter;
    /// Bytes of memory_budget, by part: the stated sum. Worry when the process's resident memory is more than a tenth above their sum.
    memory_budget_bytes: GaugeVec {part = ["fixed" "queue" "l1" "connections" "transfers"]};
    /// Bytes of memory_budget taken now. Worry when connections or transfers stay near their part: requests wait.
    memory_taken_bytes: GaugeVec {part = ["l1" "connections" "transfers"]};
    /// Requests, slices and connections refused because no memory came free in time. Worry when it grows: memory_budget is too small for the load.
    memory_refusals_total: IntCounter;
    /// Times that an answer let go of its read-ahead, because its client had taken nothing for a second: clients are slower than the cache.
    answers_stalled_total: IntCounter;
    /// Clients let go because they took their answer too slowly (client_timeouts), or for longer than its total. Worry when it grows after client_timeouts were made stricter: honest clients are cut.
    clients_too_slow_total: IntCounter;
    /// Requests that this node took while it held no lease: it answers nothing from its cache unasked. Worry when it grows: it is cut off from the others.
    fenced_requests_total: IntCounter;
    /// Slices written to disk.
    l2_writes_total: IntCounter;
    /// Slices not written to disk because the writer was behind or the disk failed. Worry when it keeps growing: the disk is too slow.
    l2_writes_dropped_total: IntCounter;
    /// Entries on disk found damaged, dropped and fetched again. Worry when it grows at all: the disk loses data.
    l2_damaged_total: IntCounter;
    /// Slices on disk that were asked for since they were written, and written again when their region was taken for others.
    l2_rewritten_total: IntCounter;
    /// 0 while the disk store is configured and cannot be written, else 1. Worry at 0: the disk is full, unreadable or gone.
    l2_writable: Gauge;

    // Origin.
    /// Fetches of slices and bodies from the origin on behalf of requests, each with all of its tries.
    subrequests_total: IntCounter;
    /// Fetches that failed after the last try, or that the origin answered with 500, 502, 503 or 504. Worry above 1 percent of subrequests_total; above 5 percent it is critical.
    failed_subrequests_total: IntCounter;
    /// Tries beyond the first. Worry when it grows half as fast as origin_fetches_total: most tries fail.
    retried_subrequests_total: IntCounter;
    /// Percent, 0 to 100: failed of all fetches since start. Worry above 1; above 5 it is critical. The alerts look at the last minutes instead.
    subrequest_failure_rate: Gauge;
    /// Seconds from a fetch's start to its last byte, all tries counted. Worry when it grows: the origin, or the way to it, is slow.
    subrequest_duration_seconds: Histogram in SERVE_SECONDS;
    /// Milliseconds, average since start of subrequest_duration_seconds.
    subrequest_duration_ms_avg: Gauge;
    /// 1 while an address of upstream_address can be connected to, else 0; a lone one that is up is tried by requests alone. Worry at 0 for a minute; 0 for all of them: the origin is gone.
    upstream_up: GaugeVec {address = []};
    /// Requests sent to the origin by the cache, every try counted. The origin's own count should agree.
    origin_fetches_total: IntCounter;
    /// Faults found when putting slices together: the origin changed, lied about a range, broke off. Worry when it grows: the origin serves several versions at once.
    stitch_faults_total: IntCounterVec {reason = []};

    // Bytes.
    /// Body bytes received from the origin.
    bytes_from_origin_total: IntCounter;
    /// Body bytes taken from this node's memory and disk.
    bytes_from_cache_total: IntCounter;
    /// Body bytes received from other nodes.
    bytes_from_peers_total: IntCounter;
    /// Body bytes sent to clients.
    bytes_to_client_total: IntCounter;

    // Purges.
    /// Purges asked for at this node, by what they named. A request that names several kinds counts once for each.
    purge_requests_total: IntCounterVec {method = ["url" "prefix" "all" "tag" "host"]};
    /// The same, by how they ended. Worry about failure: nothing was promised to those callers (no quorum, or malformed).
    purge_requests_by_result: IntCounterVec {method = ["url" "prefix" "all" "tag" "host"], result = ["success" "failure" "auth_failure"]};
    /// Things that confirmed purges named: 1 for a URL, a tag, a prefix. Not the number of objects that were stored.
    purge_items_total: IntCounterVec {method = ["url" "prefix" "all" "tag" "host"]};
    /// Seconds until a purge was confirmed on every node. Worry above one lease: nodes are being waited for or fenced.
    purge_duration_seconds: HistogramVec {method = ["url" "prefix" "all" "tag" "host"]} in PURGE_SECONDS;
    /// Purges refused for their token. Worry about invalid_token: somebody is guessing, or a deployment has the wrong one.
    purge_auth_failures_total: IntCounterVec {reason = ["missing_token" "invalid_token" "not_loopback" "proxied"]};
    /// Times that another node was asked what it makes of a purge just answered (at most ten purges a second).
    observations_total: IntCounter;
    /// Of these, with the promise broken: it would have answered with older bytes. Worry when it is not 0: report it, with the log.
    stale_after_ack_total: IntCounter;

    // Cluster.
    /// Requests to other nodes, by node and how they ended. Worry about a peer whose share of ok falls.
    peer_requests_total: IntCounterVec {peer = [], result = []};
    /// What arrived from other nodes, or from who would be one, and was not answered. Worry when handshake or not-member grows: a certificate has ended, or somebody is trying.
    peer_faults_total: IntCounterVec {reason = ["handshake" "not-member" "bad-frame" "busy" "body-broken"]};
    /// Largest UDP payload, in bytes, known to pass to and from a node: the least of its connections for slices. Worry when it stays at 1200: the network passes no larger packets, which costs CPU.
    link_mtu_bytes: GaugeVec {peer = []};
    /// End of a certificate, in seconds since 1970: this node's own among peers, and the first of listen.tls to end, as last read. Worry 30 days before.
    certificate_expires_seconds: GaugeVec {which = []};
    /// 1 if this node has reached that one within the last few seconds, else 0. Worry at 0 for a minute.
    node_up: GaugeVec {node = []};
    /// Log index of the ring in use. Worry when nodes differ for longer than a few seconds.
    ring_epoch: Gauge;
    /// Highest applied log index. Worry when a node stays behind the others.
    purge_index: Gauge;
    /// 1 while this node may answer from its cache, else 0: then it asks the origin for everything. Worry at 0 for more than a few seconds.
    lease_valid: Gauge;
    /// 1, for its label: the release that runs here. Worry when nodes differ and no upgrade is under way.
    build_info: GaugeVec {version = []};

    // Process.
    /// Bytes of memory that the process has in RAM. Worry when it is more than a tenth above the sum of memory_budget_bytes.
    process_resident_memory_bytes: Gauge;
    /// Descriptors open now. Worry above four fifths of process_max_fds: without one nobody is accepted.
    process_open_fds: Gauge;
    /// Descriptors that the process may open.
    process_max_fds: Gauge;
    /// Seconds on processors, all threads.
    process_cpu_seconds_total: Counter;
    /// Start of the process, in seconds since 1970. Worry when it changes unasked: it was restarted.
    process_start_time_seconds: Gauge;
}

/// What is read from the node at a scrape.
#[derive(Clone, Debug, Default)]
pub struct Gauges {
    /// Bytes in the memory store.
    pub l1_bytes: u64,
    /// The stated sum of the memory budget.
    pub memory: Option<Sum>,
    /// Bytes taken by connections, and by transfers.
    pub memory_taken: (u64, u64),
    /// The disk store; `None` when switched off.
    pub l2: Option<L2Stats>,
    /// Log index of the ring.
    pub ring_epoch: u64,
    /// Highest applied log index.
    pub purge_index: PurgeIndex,
    /// Whether this node may answer from its cache.
    pub lease_valid: bool,
    /// Addresses of the origin, and whether they can be connected to.
    pub upstreams_up: Vec<(SocketAddr, bool)>,
    /// Members, and whether they were reached lately.
    pub nodes_up: Vec<(NodeId, bool)>,
    /// What arrived from peers and was not answered, by reason.
    pub peer_faults: Vec<(&'static str, u64)>,
    /// The connections for slices: peer, largest payload that passes.
    pub links: Vec<(NodeId, u16)>,
    /// What the process has taken.
    pub process: Usage,
}

impl Metrics {
    /// The metrics in the Prometheus text format, gauges as of now.
    pub fn render(&self, gauges: &Gauges) -> String {
        let _one_at_a_time = self.scrape.lock().unwrap_or_else(PoisonError::into_inner);
        let rates = [
            (
                &self.cache_hit_rate,
                &self.cache_hits_total,
                self.lookups_total(),
            ),
            (
                &self.subrequest_failure_rate,
                &self.failed_subrequests_total,
                self.subrequests_total.get(),
            ),
        ];
        for (rate, part, whole) in rates {
            rate.set(percent(part.get() as f64, whole as f64));
        }
        let averages = [
            (
                &self.request_duration_ms_avg,
                &self.request_duration_seconds,
            ),
            (
                &self.assembly_duration_ms_avg,
                &self.assembly_duration_seconds,
            ),
            (
                &self.subrequest_duration_ms_avg,
                &self.subrequest_duration_seconds,
            ),
        ];
        for (average, of) in averages {
            average.set(average_ms(
                of.get_sample_sum(),
                of.get_sample_count() as f64,
            ));
        }
        self.l1_bytes.set(gauges.l1_bytes as f64);
        let (connections, transfers) = gauges.memory_taken;
        let taken = [
            ("l1", gauges.l1_bytes),
            ("connections", connections),
            ("transfers", transfers),
        ];
        let stated = gauges.memory.map(|sum| {
            [
                ("fixed", sum.fixed),
                ("queue", sum.queue),
                ("l1", sum.l1),
                ("connections", sum.connections),
                ("transfers", sum.transfers),
            ]
        });
        for (gauge, parts) in [
            (&self.memory_taken_bytes, &taken[..]),
            (&self.memory_budget_bytes, stated.as_slice().as_flattened()),
        ] {
            for (part, bytes) in parts {
                gauge.with_label_values(&[part]).set(*bytes as f64);
            }
        }
        let l2 = gauges.l2.unwrap_or(L2Stats {
            writable: true,
            ..L2Stats::default()
        });
        self.l2_bytes.set(l2.bytes as f64);
        self.l2_writable.set(f64::from(l2.writable));
        // The store counts for itself, without knowing of metrics.
        catch_up(&self.l2_writes_total, l2.writes);
        catch_up(&self.l2_writes_dropped_total, l2.dropped);
        catch_up(&self.l2_damaged_total, l2.damaged);
        catch_up(&self.l2_rewritten_total, l2.rewritten);
        for (reason, count) in &gauges.peer_faults {
            catch_up(&self.peer_faults_total.with_label_values(&[reason]), *count);
        }
        self.link_mtu_bytes.reset();
        let mut least = BTreeMap::new();
        for (peer, mtu_bytes) in &gauges.links {
            let least = least.entry(peer).or_insert(*mtu_bytes);
            *least = (*least).min(*mtu_bytes);
        }
        for (peer, mtu_bytes) in least {
            self.link_mtu_bytes
                .with_label_values(&[&peer.to_string()])
                .set(f64::from(mtu_bytes));
        }
        catch_up(
            &self.cache_errors_total,
            self.l1_damaged_total.get()
                + self.parts_damaged_total.get()
                + l2.damaged
                + l2.unreadable
                + l2.hung,
        );
        self.ring_epoch.set(gauges.ring_epoch as f64);
        self.purge_index.set(gauges.purge_index.0 as f64);
        self.lease_valid.set(f64::from(gauges.lease_valid));
        // Addresses that the origin's name has no longer leave the page.
        self.upstream_up.reset();
        let mut up = BTreeMap::new();
        for (address, is_up) in &gauges.upstreams_up {
            // Two names at one address: up where both are.
            *up.entry(address).or_insert(true) &= is_up;
        }
        for (address, is_up) in up {
            self.upstream_up
                .with_label_values(&[&address.to_string()])
                .set(f64::from(is_up));
        }
        // So do nodes that have left the cluster.
        self.node_up.reset();
        for (node, up) in &gauges.nodes_up {
            self.node_up
                .with_label_values(&[&node.to_string()])
                .set(f64::from(*up));
        }
        self.build_info
            .with_label_values(&[env!("CARGO_PKG_VERSION")])
            .set(1.0);
        let process = gauges.process;
        self.process_resident_memory_bytes
            .set(process.resident_bytes as f64);
        self.process_open_fds.set(process.open_descriptors as f64);
        self.process_max_fds.set(process.descriptors_max as f64);
        let cpu = process.cpu.as_secs_f64() - self.process_cpu_seconds_total.get();
        self.process_cpu_seconds_total.inc_by(cpu.max(0.0));
        self.process_start_time_seconds
            .set(unix_seconds(self.started));
        let families = self.registry.gather();
        let mut text = TextEncoder::new()
            .encode_to_string(&families)
            .expect("a family without series is not gathered, and nothing else fails");
        // That it exists is to be seen before anything is counted.
        for (name, heading) in &self.headings {
            if !families.iter().any(|family| family.name() == name) {
                text.push_str(heading);
            }
        }
        text
    }

    /// Counts an answer to a client, by what X-Cache said and, where one was
    /// written, its final status.
    pub fn count_response(&self, cache: &str, status: Option<StatusCode>) {
        self.responses_total.with_label_values(&[cache]).inc();
        let class = match status.map(|status| status.as_u16() / 100) {
            Some(2) => "2xx",
            Some(3) => "3xx",
            Some(4) => "4xx",
            Some(5) => "5xx",
            // A change of protocol, or a client that left.
            _ => return,
        };
        self.responses_by_status_total
            .with_label_values(&[class])
            .inc();
    }

    /// Slices looked for: hits and misses.
    pub fn lookups_total(&self) -> u64 {
        self.cache_hits_total.get() + self.cache_misses_total.get()
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Metrics::new()
    }
}

/// `part` of `whole`, 0 to 100; 0 of nothing.
fn percent(part: f64, whole: f64) -> f64 {
    if whole > 0.0 {
        100.0 * part / whole
    } else {
        0.0
    }
}

/// Average in milliseconds; 0 of nothing.
fn average_ms(sum_seconds: f64, count: f64) -> f64 {
    if count > 0.0 {
        1000.0 * sum_seconds / count
    } else {
        0.0
    }
}

/// A metric's name, and what is written of one without series.
fn heading<K: Kind>(name: &'static str, help: &'static str) -> (String, String) {
    let (name, help, kind) = (full_name(name), help.trim(), K::TYPE);
    let heading = format!("# HELP {name} {help}\n# TYPE {name} {kind}\n");
    (name, heading)
}

/// A metric's name as it is written.
fn full_name(name: &str) -> String {
    let prefix = match name.starts_with(OF_PROCESS) {
        true => "",
        false => PREFIX,
    };
    format!("{prefix}{name}")
}

/// Raises a counter to what another part of the node has counted.
fn catch_up(counter: &IntCounter, total: u64) {
    counter.inc_by(total.saturating_sub(counter.get()));
}

/// One line of the table at the top.
struct Declaration {
    name: &'static str,
    help: &'static str,
    labels: &'static [(&'static str, &'static [&'static str])],
    buckets: &'static [f64],
}

impl Declaration {
    fn opts(&self) -> Opts {
        Opts::new(full_name(self.name), self.help.trim())
    }

    fn histogram_opts(&self) -> HistogramOpts {
        HistogramOpts::from(self.opts()).buckets(self.buckets.to_vec())
    }

    fn label_names(&self) -> Vec<&'static str> {
        self.labels.iter().map(|(name, _)| *name).collect()
    }

    /// Every combination of the labels' known values; none where one is open.
    fn combinations(&self) -> Vec<Vec<&'static str>> {
        let mut all = vec![vec![]];
        for (_, values) in self.labels {
            all = all
                .iter()
                .flat_map(|head| values.iter().map(move |v| [&head[..], &[*v]].concat()))
                .collect();
        }
        all
    }
}

/// A kind of metric that the table may name.
trait Kind: Collector + Clone + Sized + 'static {
    /// As its TYPE line says.
    const TYPE: &'static str;

    fn declare(declaration: &Declaration) -> prometheus::Result<Self>;

    fn register(registry: &Registry, declaration: &Declaration) -> Self {
        let metric = Self::declare(declaration).and_then(|metric| {
            registry.register(Box::new(metric.clone()))?;
            Ok(metric)
        });
        metric.expect("the table's names are valid and differ: every test starts here")
    }
}

/// A kind without labels.
macro_rules! single {
    ($($kind:ident $type:ident $opts:ident;)+) => {$(
        impl Kind for $kind {
            const TYPE: &'static str = stringify!($type);

            fn declare(declaration: &Declaration) -> prometheus::Result<Self> {
                $kind::with_opts(declaration.$opts())
            }
        }
    )+};
}

/// A kind with labels: what is known of them exists from the start.
macro_rules! labelled {
    ($($kind:ident $type:ident $opts:ident;)+) => {$(
        impl Kind for $kind {
            const TYPE: &'static str = stringify!($type);

            fn declare(declaration: &Declaration) -> prometheus::Result<Self> {
                let metric = $kind::new(declaration.$opts(), &declaration.label_names())?;
                for values in declaration.combinations() {
                    metric.get_metric_with_label_values(&values)?;
                }
                Ok(metric)
            }
        }
    )+};
}

single! {
    IntCounter counter opts;
    Counter counter opts;
    Gauge gauge opts;
    Histogram histogram histogram_opts;
}
labelled! {
    IntCounterVec counter opts;
    GaugeVec gauge opts;
    HistogramVec histogram histogram_opts;
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every name that the interface promises, with its labels.
    const PROMISED: &[&str] = &[
        "requests_total",
        "sliced_requests_total",
        "passthrough_requests_total",
        "cache_hits_total",
        "cache_misses_total",
        "cache_hit_rate",
        "cache_errors_total",
        "subrequests_total",
        "failed_subrequests_total",
        "retried_subrequests_total",
        "subrequest_failure_rate",
        "bytes_from_origin_total",
        "bytes_from_cache_total",
        "bytes_from_peers_total",
        "bytes_to_client_total",
        "request_duration_ms_avg",
        "subrequest_duration_ms_avg",
        "assembly_duration_ms_avg",
        "purge_requests_total{method=\"url\"}",
        "purge_requests_total{method=\"all\"}",
        "purge_requests_by_result{method=\"prefix\",result=\"success\"}",
        "purge_items_total{method=\"tag\"}",
        "purge_duration_seconds_bucket{method=\"host\",le=\"0.001\"}",
        "purge_duration_seconds_bucket{method=\"url\",le=\"5\"}",
        "purge_auth_failures_total{reason=\"missing_token\"}",
        "slices_total{source=\"l1\"}",
        "slices_total{source=\"l2\"}",
        "slices_total{source=\"flight\"}",
        "slices_total{source=\"peer\"}",
        "slices_total{source=\"origin\"}",
        "request_duration_seconds_count",
        "time_to_first_byte_seconds_sum",
        "origin_fetches_total",
        "l1_bytes",
        "l2_bytes",
        "ring_epoch",
        "purge_index",
        "lease_valid",
        "responses_total{cache=\"REVALIDATED\"}",
        "observations_total",
        "stale_after_ack_total",
        "l2_writes_dropped_total",
        "l2_damaged_total",
    ];

    #[test]
    fn promised_series_exist_from_the_start_at_zero() {
        let text = Metrics::new().render(&Gauges::default());
        for name in PROMISED {
            let line = format!("\n{PREFIX}{name} 0\n");
            assert!(text.contains(&line), "{name} is not in\n{text}");
        }
        // Peers are not known yet.
        assert!(text.contains(&format!("\n# TYPE {PREFIX}peer_requests_total counter\n")));
        let version = env!("CARGO_PKG_VERSION");
        assert!(text.contains(&format!("{PREFIX}build_info{{version=\"{version}\"}} 1\n")));
        assert!(text.contains(&format!("{PREFIX}l2_writable 1\n")));
    }

    #[test]
    fn gauges_are_computed_when_read() {
        let metrics = Metrics::new();
        metrics.cache_hits_total.inc_by(3);
        metrics.l1_damaged_total.inc();
        metrics.cache_misses_total.inc();
        metrics.request_duration_seconds.observe(0.25);
        metrics.request_duration_seconds.observe(0.75);
        let mut gauges = Gauges {
            l1_bytes: 77,
            l2: Some(L2Stats {
                bytes: 5,
                dropped: 2,
                damaged: 1,
                hung: 1,
                ..L2Stats::default()
            }),
            lease_valid: true,
            upstreams_up: vec![(([127, 0, 0, 1], 80).into(), false)],
            nodes_up: vec![(NodeId(1), true), (NodeId(2), false)],
            peer_faults: vec![("busy", 4)],
            links: vec![(NodeId(2), 1452), (NodeId(2), 1200), (NodeId(3), 1452)],
            ..Gauges::default()
        };
        let text = metrics.render(&gauges);
        for line in [
            "cache_hit_rate 75",
            "request_duration_ms_avg 500",
            "l1_bytes 77",
            "l2_bytes 5",
            "l2_writable 0",
            "l2_writes_dropped_total 2",
            "cache_errors_total 3",
            "lease_valid 1",
            "peer_faults_total{reason=\"busy\"} 4",
            "peer_faults_total{reason=\"handshake\"} 0",
            "link_mtu_bytes{peer=\"2\"} 1200",
            "link_mtu_bytes{peer=\"3\"} 1452",
            "upstream_up{address=\"127.0.0.1:80\"} 0",
            "node_up{node=\"1\"} 1",
            "node_up{node=\"2\"} 0",
        ] {
            assert!(text.contains(&format!("\n{PREFIX}{line}\n")), "{line}");
        }
        gauges.nodes_up.truncate(1);
        let text = metrics.render(&gauges);
        assert!(!text.contains("node_up{node=\"2\"}"), "node 2 has left");
        assert!(
            text.contains("l2_writes_dropped_total 2"),
            "not counted twice"
        );
    }
}
