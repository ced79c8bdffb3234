//! Every key: its default, its bounds, and what it may not contradict.
//!
//! `configs/pingora_slice.yaml` says the same for people; a test compares them.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use http::HeaderName;
use pingora_slice_cluster::NodeId;
use pingora_slice_cluster::handle::ClusterConfig;
use pingora_slice_cluster::members::Role;
use pingora_slice_cluster::peer::TlsFiles;
use regex::Regex;

use super::address::{
    NEXT_PORT_REMEDY, has_next_port, host_header, overlap, peer_address, socket_address, upstream,
};
use super::read::{
    Problem, Reader, Section, boolean, duration, integer, one_of, positive_duration, positive_size,
    size,
};
use super::{
    AdminConfig, Caching, ClientTimeouts, Config, DefaultFreshness, Directive, Honoured, Listen,
    ListenTls, OriginProbe, OriginTimeouts, PurgeConfig, QueryRules, Secret, SetCookie, Source,
    StitchLog, Upstream,
};
use crate::budget::{FIXED_BYTES, Sum};
use crate::l2::{L2_BYTES_MIN, L2Config, Life, QUEUE_BYTES_MAX};

/// Bounds of `slice_size`, bytes.
const SLICE_BYTES: std::ops::RangeInclusive<u64> = 65_536..=10_485_760;
/// Bounds of `cluster.lease`: renewals must fit in several times, and a purge
/// waits up to one and a half leases for a node that has gone.
pub(super) const LEASE: std::ops::RangeInclusive<Duration> =
    Duration::from_millis(200)..=Duration::from_secs(60);
/// Largest `cluster.weight`: the ring holds points in proportion to it. A node
/// of weight 0 owns no slices.
const WEIGHT_MAX: u64 = 100;
/// A node is given at least this many leases before `remove_after` removes it.
const REMOVE_AFTER_LEASES_MIN: u32 = 10;

/// All keys, their rules and their defaults. What is refused gets its default
/// here, which nobody sees: the reader holds the problem.
pub(super) fn read_config(root: &mut Section, source: &Source) -> Config {
    let mut warnings = Vec::new();
    let mut listen = root
        .list_of_maps(
            "listen",
            |text| socket_address(text).map(Listen::plain),
            read_listen,
        )
        .unwrap_or_else(|| {
            vec![Listen::plain(SocketAddr::from((
                Ipv4Addr::UNSPECIFIED,
                8080,
            )))]
        });
    if let (Some(first), Some(port)) = (listen.first_mut(), source.port) {
        first.address.set_port(port);
    }
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    let slice_bytes = root.scalar("slice_size", |text| match size(text)? {
        bytes if SLICE_BYTES.contains(&bytes) => Ok(bytes as u32),
        _ => Err("must be from 65536 (64k) to 10485760 (10m) bytes".to_string()),
    });
    let test_slice_bytes = root.scalar("test_slice_size", |text| {
        u32::try_from(positive_size(text)?).map_err(|_| "must be less than 4g".to_string())
    });
    if let Some(bytes) = test_slice_bytes {
        warnings.push(Problem {
            key: "test_slice_size".to_string(),
            value: bytes.to_string(),
            remedy: "overrides slice_size and its bounds; it is for tests: remove it in production"
                .to_string(),
        });
    }
    let enable_cache = root.scalar("enable_cache", boolean).unwrap_or(true);
    let enable_l2 = root.scalar("enable_l2_cache", boolean).unwrap_or(true);
    let l2 = L2Config {
        dir: root
            .path("l2_cache_dir")
            .unwrap_or("/var/cache/pingora-slice".into()),
        bytes_max: root
            .scalar("l2_cache_size_bytes", positive_size)
            .unwrap_or(10 << 30),
        life: match root.has("cluster") {
            true => Life::InCluster,
            false => Life::Alone,
        },
    };
    if enable_l2 && enable_cache && l2.bytes_max < L2_BYTES_MIN {
        warnings.push(Problem {
            key: "l2_cache_size_bytes".to_string(),
            value: l2.bytes_max.to_string(),
            remedy: format!(
                "is too small for a disk store, so there is none: give {L2_BYTES_MIN} (16m) or more"
            ),
        });
    }
    let slice_bytes = test_slice_bytes.or(slice_bytes).unwrap_or(1 << 20);
    let l1_bytes_max = root
        .scalar("l1_cache_size_bytes", positive_size)
        .unwrap_or(100 << 20);
    let has_l2 = enable_cache && enable_l2;
    let memory = read_memory(root, l1_bytes_max, has_l2, slice_bytes);
    Config {
        listen,
        upstreams: root.list("upstream_address", upstream).unwrap_or_else(|| {
            vec![Upstream {
                host: "127.0.0.1".to_string(),
                port: 8080,
                tls: false,
            }]
        }),
        upstream_host: root.scalar("upstream_host", host_header),
        threads: root
            .scalar("threads", integer(1, 1024))
            .map_or(cores, |n| n as usize),
        slice_bytes,
        max_concurrent_subrequests: root
            .scalar("max_concurrent_subrequests", integer(1, u32::MAX.into()))
            .map_or(4, |n| n as usize),
        max_retries: root
            .scalar("max_retries", integer(0, u32::MAX.into()))
            .map_or(3, |n| n as u32),
        slice_patterns: root
            .list("slice_patterns", |text| {
                Regex::new(text).map_err(|e| format!("must be a regular expression: {e}"))
            })
            .unwrap_or_default(),
        enable_cache,
        cache_ttl: root
            .scalar("cache_ttl", positive_duration)
            .unwrap_or(secs(3600)),
        default_freshness: root
            .scalar(
                "default_freshness",
                one_of(&[
                    ("ttl", DefaultFreshness::Ttl),
                    ("heuristic", DefaultFreshness::Heuristic),
                    ("none", DefaultFreshness::None),
                ]),
            )
            .unwrap_or(DefaultFreshness::Ttl),
        caching: root.section("caching", read_caching),
        l1_bytes_max,
        memory,
        unused_l2_dir: (!has_l2).then(|| l2.dir.clone()),
        l2: has_l2.then_some(l2),
        max_object_bytes: root.scalar("max_object_size", positive_size),
        origin_probe: root
            .scalar(
                "origin_probe",
                one_of(&[("range", OriginProbe::Range), ("head", OriginProbe::Head)]),
            )
            .unwrap_or(OriginProbe::Range),
        stitch_log: root.section("stitch_log", |s| StitchLog {
            enabled: s.scalar("enabled", boolean).unwrap_or(true),
            pace: s.scalar("pace", duration).unwrap_or(secs(1)),
        }),
        metrics_endpoint: root.section("metrics_endpoint", |s| {
            warn_if_off(s, &["address"], &mut warnings);
            let enabled = s.scalar("enabled", boolean).unwrap_or(false);
            let address = s.scalar("address", socket_address);
            enabled.then_some(address.unwrap_or((Ipv4Addr::LOCALHOST, 9090).into()))
        }),
        purge: root.section("purge", |s| {
            warn_if_off(s, &["auth_token", "enable_metrics"], &mut warnings);
            PurgeConfig {
                enabled: s.scalar("enabled", boolean).unwrap_or(false),
                auth_token: s.token("auth_token").map(Secret::new),
                enable_metrics: s.scalar("enable_metrics", boolean).unwrap_or(true),
            }
        }),
        admin: root.optional_section("admin", read_admin),
        cluster: root.optional_section("cluster", read_cluster),
        origin_timeouts: root.section("origin_timeouts", |s| OriginTimeouts {
            connect: s.scalar("connect", positive_duration).unwrap_or(secs(5)),
            read: s.scalar("read", positive_duration).unwrap_or(secs(30)),
            total_header: s
                .scalar("total_header", positive_duration)
                .unwrap_or(secs(30)),
            total: s.scalar("total", positive_duration).unwrap_or(secs(300)),
        }),
        client_timeouts: root.section("client_timeouts", |s| ClientTimeouts {
            header: s.scalar("header", positive_duration).unwrap_or(secs(30)),
            idle: s.scalar("idle", positive_duration).unwrap_or(secs(60)),
            write: s.scalar("write", positive_duration).unwrap_or(secs(60)),
            bytes_per_second_min: s.scalar("min_rate", size).unwrap_or(1 << 10),
            slow: s
                .scalar("min_rate_for", positive_duration)
                .unwrap_or(secs(60)),
            total: s.scalar("total", duration).filter(|total| !total.is_zero()),
        }),
        drain_timeout: root.scalar("drain_timeout", duration).unwrap_or(secs(10)),
        warnings,
        source: Source::default(),
    }
}

/// A section that is off unless it says `enabled`, and has other keys: whoever
/// wrote them takes it for on.
fn warn_if_off(section: &Section, others: &[&str], warnings: &mut Vec<Problem>) {
    if section.has("enabled") {
        return;
    }
    let given = others.iter().filter(|name| section.has(name));
    warnings.extend(given.take(1).map(|name| Problem {
        key: section.key(name),
        value: "has no effect".to_string(),
        remedy: format!("{} is off: add enabled: true", section.name()),
    }));
}

/// `memory_budget`, and what it is divided into. Default: room for 1,600
/// clients, more with a large L1, and as much for what is under way.
fn read_memory(root: &mut Section, l1_bytes: u64, has_l2: bool, slice_bytes: u32) -> Sum {
    const SHARED_BYTES: u64 = 512 << 20;
    let queue = if has_l2 { QUEUE_BYTES_MAX } else { 0 };
    let divide = |budget| Sum::of(budget, l1_bytes, queue, slice_bytes.into());
    let given = root.scalar("memory_budget", |text| {
        divide(positive_size(text)?).map_err(|least| {
            format!(
                "is too small for l1_cache_size_bytes and slices of this size: \
                 give {least} bytes ({}m) or more",
                least.div_ceil(1 << 20)
            )
        })
    });
    given.unwrap_or_else(|| {
        let shared = SHARED_BYTES.max(l1_bytes / 4);
        let budget = (FIXED_BYTES + queue + shared).saturating_add(l1_bytes);
        divide(budget)
            .unwrap_or_else(|least| divide(least).expect("what is said to be enough is enough"))
    })
}

fn read_caching(s: &mut Section) -> Caching {
    let usual = Caching::default();
    let directive = one_of(&[
        ("max-age", Directive::MaxAge),
        ("min-fresh", Directive::MinFresh),
        ("max-stale", Directive::MaxStale),
        ("only-if-cached", Directive::OnlyIfCached),
        ("no-cache", Directive::NoCache),
        ("no-store", Directive::NoStore),
    ]);
    Caching {
        targeted_fields: s
            .list("targeted_fields", |text| {
                HeaderName::from_bytes(text.as_bytes())
                    .map_err(|_| "must be names of response fields".to_string())
            })
            .unwrap_or(usual.targeted_fields),
        request_directives: s
            .list("request_directives", directive)
            .map_or(usual.request_directives, |list| Honoured::of(&list)),
        set_cookie: s
            .scalar(
                "set_cookie",
                one_of(&[
                    ("shared", SetCookie::Shared),
                    ("explicit", SetCookie::Explicit),
                    ("never", SetCookie::Never),
                ]),
            )
            .unwrap_or(usual.set_cookie),
        query: s.section("query", |s| QueryRules {
            ignore: s
                .list("ignore", |text| Ok(text.to_string()))
                .unwrap_or_default(),
            sort: s.scalar("sort", boolean).unwrap_or(false),
        }),
        show_key: s.scalar("show_key", boolean).unwrap_or(false),
        stale_while_revalidate: s
            .scalar("stale_while_revalidate", duration)
            .unwrap_or(usual.stale_while_revalidate),
        stale_if_error: s
            .scalar("stale_if_error", duration)
            .unwrap_or(usual.stale_if_error),
    }
}

fn read_listen(s: &mut Section) -> Option<Listen> {
    s.require(
        "address",
        "give the address to listen on, such as 0.0.0.0:8443",
    );
    let address = s.scalar("address", socket_address);
    let wants_tls = s.has("tls");
    let tls = s.optional_section("tls", |s| {
        s.require("cert", "name the PEM file of the certificate chain");
        s.require("key", "name the PEM file of the private key");
        let (cert, key) = (s.path("cert"), s.path("key"));
        Some(ListenTls {
            cert: cert?,
            key: key?,
        })
    });
    let h2 = s.scalar("h2", boolean).unwrap_or(wants_tls);
    Some(Listen {
        address: address?,
        tls,
        h2,
    })
}

fn read_admin(s: &mut Section) -> Option<AdminConfig> {
    s.require(
        "address",
        "give the address of the admin API, such as 127.0.0.1:9091",
    );
    s.require(
        "auth_token",
        "the admin API needs a token: give a long random one",
    );
    let (address, auth_token) = (s.scalar("address", socket_address), s.token("auth_token"));
    Some(AdminConfig {
        address: address?,
        auth_token: Secret::new(auth_token?),
    })
}

fn read_cluster(s: &mut Section) -> Option<ClusterConfig> {
    s.require("node_id", "give this machine its own number, 1 or greater");
    s.require(
        "advertise",
        "give the host:port at which the others reach this node",
    );
    s.require(
        "seeds",
        "list the host:port of the nodes that found the cluster",
    );
    s.require("tls", "peers need certificates: give {ca, cert, key}");
    let node_id = s.scalar("node_id", integer(1, u64::MAX));
    let listen = match s.scalar("listen", socket_address) {
        Some(address) if !has_next_port(address.port()) => {
            s.refuse("listen", address.to_string(), NEXT_PORT_REMEDY);
            None
        }
        address => address.or(Some((Ipv4Addr::UNSPECIFIED, 7001).into())),
    };
    let advertise = s.scalar("advertise", peer_address);
    let seeds = s.list("seeds", peer_address);
    let voters = one_of(&[("1", 1), ("3", 3), ("5", 5)]);
    let voters_expected = s.scalar("voters_expected", voters).unwrap_or(3);
    let role = s.scalar(
        "role",
        one_of(&[("voter", Role::Voter), ("edge", Role::Edge)]),
    );
    // An edge founds nothing.
    let (wanted, of_whom) = match role {
        Some(Role::Edge) => (1, "an edge needs"),
        Some(Role::Voter) | None => (voters_expected, "voters_expected asks for"),
    };
    if let Some(seeds) = seeds.as_ref().filter(|_| s.is_clean("voters_expected")) {
        let distinct: std::collections::BTreeSet<&String> = seeds.iter().collect();
        if distinct.len() < seeds.len() {
            s.refuse(
                "seeds",
                seeds.join(", "),
                "names a node twice: list each one once",
            );
        } else if seeds.len() < wanted {
            let remedy = format!(
                "are {} of the {wanted} that {of_whom}: list them all",
                seeds.len(),
            );
            s.refuse("seeds", seeds.join(", "), remedy);
        }
    }
    let weight = s
        .scalar("weight", integer(0, WEIGHT_MAX))
        .map_or(1, |n| n as u32);
    let data_dir = s
        .path("data_dir")
        .unwrap_or("/var/lib/pingora-slice".into());
    let lease = s.scalar("lease", |text| match duration(text)? {
        lease if LEASE.contains(&lease) => Ok(lease),
        _ => Err("must be from 200ms to 1m".to_string()),
    });
    let lease = lease.unwrap_or(secs(2));
    let remove_after = s.scalar("remove_after", |text| match duration(text)? {
        after if after.is_zero() || after >= lease * REMOVE_AFTER_LEASES_MIN => Ok(after),
        _ => Err(format!(
            "must be 0 (never) or at least {REMOVE_AFTER_LEASES_MIN} leases"
        )),
    });
    let tls = s.optional_section("tls", |s| {
        s.require(
            "ca",
            "name the PEM file of the cluster's own CA (`pingora-slicectl ca init`)",
        );
        s.require(
            "cert",
            "name this node's PEM certificate (`pingora-slicectl ca issue`)",
        );
        s.require(
            "key",
            "name this node's PEM key (`pingora-slicectl ca issue`)",
        );
        let (ca, cert, key) = (s.path("ca"), s.path("cert"), s.path("key"));
        Some(TlsFiles {
            ca: ca?,
            cert: cert?,
            key: key?,
        })
    });
    Some(ClusterConfig {
        node_id: NodeId(node_id?),
        listen: listen?,
        advertise: advertise?,
        seeds: seeds?,
        voters_expected,
        role: role.unwrap_or(Role::Voter),
        weight,
        data_dir,
        lease,
        remove_after: remove_after.filter(|after| !after.is_zero()),
        tls: tls?,
    })
}

/// Rules that join keys, applied where each key alone is in order.
pub(super) fn refuse_contradictions(config: &mut Config, reader: &Reader, may_set_port: bool) {
    let is_clean = |keys: &[&str]| keys.iter().all(|key| reader.is_clean(key));
    if config.listen.is_empty() && is_clean(&["listen"]) {
        reader.refuse("listen", "(an empty list)", "give at least one address");
    }
    if config.upstreams.is_empty() && is_clean(&["upstream_address"]) {
        reader.refuse(
            "upstream_address",
            "(an empty list)",
            "give at least one origin",
        );
    }
    if is_clean(&["listen", "upstream_address"])
        && let Some(problem) = config.own_upstream()
    {
        match may_set_port {
            true => config.warnings.push(problem),
            false => reader.problems.borrow_mut().push(problem),
        }
    }
    if is_clean(&["listen", "purge"])
        && let Some(problem) = config.open_purge()
    {
        reader.problems.borrow_mut().push(problem);
    }
    if let (Some(l2), Some(cluster)) = (&config.l2, &config.cluster)
        && l2.dir == cluster.data_dir
    {
        let remedy = "is also l2_cache_dir: give each its own, for the cache may be deleted \
                      and this may not";
        reader.refuse("cluster.data_dir", l2.dir.display().to_string(), remedy);
    }
    refuse_address_clashes(config, reader);
}

/// A certificate that is not there would only show once ports are bound.
pub(super) fn refuse_missing_files(config: &Config, reader: &Reader) {
    let mut files = Vec::new();
    for (i, listen) in config.listen.iter().enumerate() {
        if let Some(ListenTls { cert, key }) = &listen.tls {
            files.extend([(format!("listen[{i}].tls.cert"), cert)]);
            files.extend([(format!("listen[{i}].tls.key"), key)]);
        }
    }
    if let Some(ClusterConfig {
        tls: TlsFiles { ca, cert, key },
        ..
    }) = &config.cluster
    {
        let names = [("ca", ca), ("cert", cert), ("key", key)];
        files.extend(names.map(|(name, file)| (format!("cluster.tls.{name}"), file)));
    }
    for (key, file) in files {
        if let Ok(false) = file.try_exists() {
            let remedy = match key.starts_with("cluster") {
                true => "no such file: `pingora-slicectl ca init` and `ca issue` make it",
                false => "no such file: paths are relative to the configuration file",
            };
            reader.refuse(&key, file.display().to_string(), remedy);
        }
    }
}

/// No two TCP listeners of this node may want the same port of one address.
fn refuse_address_clashes(config: &Config, reader: &Reader) {
    let mut taken: Vec<(String, SocketAddr)> = Vec::new();
    let is_clean = |key: &str| {
        reader.is_clean(if key.starts_with("listen") {
            "listen"
        } else {
            key
        })
    };
    let clients = config
        .listen
        .iter()
        .enumerate()
        .map(|(i, l)| (format!("listen[{i}]"), l.address));
    let metrics = config
        .metrics_endpoint
        .map(|a| ("metrics_endpoint.address".to_string(), a));
    let admin = config
        .admin
        .as_ref()
        .map(|a| ("admin.address".to_string(), a.address));
    for (key, address) in clients.chain(metrics).chain(admin) {
        let clash = |(_, other): &&(String, SocketAddr)| overlap(address, *other);
        // A refused address was replaced by its default: nothing follows from that.
        if !is_clean(&key) {
            continue;
        }
        if let Some((other_key, other)) = taken.iter().find(clash) {
            let remedy = format!("is taken by {other_key} ({other}): choose another port");
            reader.refuse(&key, address.to_string(), remedy);
        }
        taken.push((key, address));
    }
}

fn secs(secs: u64) -> Duration {
    Duration::from_secs(secs)
}
