use std::collections::{BTreeMap, BTreeSet, HashMap};

use pingora_slice_cluster::NodeId;
use pingora_slice_cluster::members::Role;
use pingora_slice_cluster::peer::TlsFiles;

use super::*;
use crate::l2::Life;

/// Parses without looking at the real environment.
fn parse(text: &str) -> Result<Config, Problems> {
    parse_with(text, &[], None)
}

fn parse_with(text: &str, env: &[(&str, &str)], port: Option<u16>) -> Result<Config, Problems> {
    let env: HashMap<&str, &str> = env.iter().copied().collect();
    let env = |name: &str| env.get(name).map(|value| value.to_string());
    Config::build(
        Some(text),
        Path::new("/etc/ps"),
        Source { path: None, port },
        &env,
    )
}

#[track_caller]
fn good(text: &str) -> Config {
    parse(text).unwrap_or_else(|problems| panic!("{text}\n{problems}"))
}

/// The problems of `text` as `key: value: remedy` lines.
#[track_caller]
fn refused(text: &str) -> Vec<String> {
    match parse(text) {
        Ok(_) => panic!("not refused: {text}"),
        Err(Problems(problems)) => problems.iter().map(Problem::to_string).collect(),
    }
}

/// Exactly one problem, at `key`, whose remedy says `hint`.
#[track_caller]
fn refused_at(text: &str, key: &str, hint: &str) {
    let problems = refused(text);
    assert_eq!(problems.len(), 1, "{text}: {problems:#?}");
    assert!(
        problems[0].starts_with(&format!("{key}: ")),
        "{text}: {problems:#?}"
    );
    assert!(problems[0].contains(hint), "{text}: {problems:#?}");
}

const ORIGIN: &str = "upstream_address: origin:80\n";
const CLUSTER: &str = "
upstream_address: origin:80
cluster:
  node_id: 1
  advertise: node1:7001
  seeds: [node1:7001, node2:7001, node3:7001]
  tls: {ca: ca.pem, cert: node1.pem, key: /keys/node1.key}
";

/// A cluster section with one line added, or in place of the line with the same key.
fn cluster_with(line: &str) -> String {
    let name = line.split(':').next().unwrap_or_default();
    let kept = CLUSTER
        .lines()
        .filter(|l| !l.trim_start().starts_with(&format!("{name}:")));
    format!("{}\n  {line}\n", kept.collect::<Vec<_>>().join("\n"))
}

#[test]
fn defaults_are_those_of_the_table() {
    let c = good("");
    assert_eq!(
        c.listen,
        vec![Listen::plain("0.0.0.0:8080".parse().unwrap())]
    );
    let upstream = Upstream {
        host: "127.0.0.1".into(),
        port: 8080,
        tls: false,
    };
    assert_eq!(c.upstreams, vec![upstream]);
    assert_eq!(c.upstream_host, None);
    assert_eq!(
        c.threads,
        std::thread::available_parallelism().unwrap().get()
    );
    assert_eq!(c.slice_bytes, 1_048_576);
    assert_eq!(c.max_concurrent_subrequests, 4);
    assert_eq!(c.max_retries, 3);
    assert!(c.slice_patterns.is_empty());
    assert!(c.enable_cache);
    assert_eq!(c.cache_ttl, Duration::from_secs(3600));
    assert_eq!(c.default_freshness, DefaultFreshness::Ttl);
    assert_eq!(c.caching, Caching::default());
    assert_eq!(c.l1_bytes_max, 104_857_600);
    assert_eq!(c.memory.total(), 708 << 20);
    assert_eq!(c.memory.l1, 104_857_600);
    let l2 = L2Config {
        dir: "/var/cache/pingora-slice".into(),
        bytes_max: 10 << 30,
        life: Life::Alone,
    };
    assert_eq!(c.l2, Some(l2));
    assert_eq!(c.max_object_bytes, None);
    assert_eq!(c.origin_probe, OriginProbe::Range);
    assert_eq!(
        c.stitch_log,
        StitchLog {
            enabled: true,
            pace: Duration::from_secs(1)
        }
    );
    assert_eq!(c.metrics_endpoint, None);
    assert!(!c.purge.enabled && c.purge.auth_token.is_none() && c.purge.enable_metrics);
    assert!(c.admin.is_none());
    assert_eq!(c.cluster, None);
    let secs = Duration::from_secs;
    let origin = OriginTimeouts {
        connect: secs(5),
        read: secs(30),
        total_header: secs(30),
        total: secs(300),
    };
    assert_eq!(c.origin_timeouts, origin);
    let client = ClientTimeouts {
        header: secs(30),
        idle: secs(60),
        write: secs(60),
        bytes_per_second_min: 1024,
        slow: secs(60),
        total: None,
    };
    assert_eq!(c.client_timeouts, client);
    assert_eq!(c.drain_timeout, secs(10));
    let metrics = good("metrics_endpoint: {enabled: true}").metrics_endpoint;
    assert_eq!(metrics, Some("127.0.0.1:9090".parse().unwrap()));
}

#[test]
fn every_seed_key_loads() {
    let c = good(
        r#"
upstream_address: "origin.example.com:80"
slice_size: 4194304
max_concurrent_subrequests: 16
max_retries: 0
slice_patterns:
  - "^/downloads/.*\\.(iso|zip)$"
  - '\.mp4$'
enable_cache: true
cache_ttl: 86400
l1_cache_size_bytes: 209715200
l2_cache_dir: "/mnt/cache"
enable_l2_cache: true
metrics_endpoint:
  enabled: true
  address: "0.0.0.0:9090"
purge:
  enabled: true
  auth_token: "your-secret-token"
  enable_metrics: false
"#,
    );
    assert_eq!(c.slice_bytes, 4 << 20);
    assert!(c.slice_patterns[0].is_match("/downloads/a/b.iso"));
    assert!(!c.slice_patterns[0].is_match("/downloads/a/b.txt"));
    assert_eq!(c.l2.unwrap().dir, Path::new("/mnt/cache"));
    assert_eq!(c.metrics_endpoint, Some("0.0.0.0:9090".parse().unwrap()));
    let token = c.purge.auth_token.unwrap();
    assert!(token.matches(b"your-secret-token") && !token.matches(b"your-secret-toke"));
    assert!(!c.purge.enable_metrics);
    // Empty values are defaults.
    assert!(
        good("slice_patterns:\npurge:\ncluster:\n")
            .slice_patterns
            .is_empty()
    );
}

#[test]
fn own_keys_load() {
    let c = good(
        "
listen:
  - 127.0.0.1:8080
  - {address: '[::1]:8443', tls: {cert: tls/a.pem, key: /k.pem}}
  - {address: localhost:8081, h2: true}
upstream_address: [a:81, http://B, 'https://c/', 'https://[::2]:444']
upstream_host: example.com:8000
threads: 3
slice_size: 64K
cache_ttl: 90m
default_freshness: heuristic
caching:
  targeted_fields: [Edge-Cache-Control, CDN-Cache-Control]
  request_directives: [max-age, no-cache]
  set_cookie: explicit
  query: {ignore: utm_source, sort: true}
  show_key: true
  stale_while_revalidate: 30s
  stale_if_error: 1h
l1_cache_size_bytes: 1g
l2_cache_dir: cache
l2_cache_size_bytes: 2T
max_object_size: 5g
origin_probe: head
stitch_log: {enabled: false, pace: 250ms}
admin: {address: 127.0.0.1:9091, auth_token: t}
origin_timeouts: {connect: 1s, read: 2s, total_header: 3s, total: 4s}
client_timeouts: {header: 1s, idle: 2s, write: 3s, min_rate: 0, min_rate_for: 4s, total: 1h}
drain_timeout: 0
",
    );
    assert_eq!(c.listen.len(), 3);
    let tls = ListenTls {
        cert: "/etc/ps/tls/a.pem".into(),
        key: "/k.pem".into(),
    };
    assert_eq!(c.listen[1].tls, Some(tls));
    assert!(!c.listen[0].h2 && c.listen[1].h2 && c.listen[2].h2);
    assert_eq!(c.listen[2].address, "127.0.0.1:8081".parse().unwrap());
    let upstream = |host: &str, port, tls| Upstream {
        host: host.into(),
        port,
        tls,
    };
    assert_eq!(
        c.upstreams,
        vec![
            upstream("a", 81, false),
            upstream("b", 80, false),
            upstream("c", 443, true),
            upstream("[::2]", 444, true),
        ]
    );
    assert_eq!(c.upstream_host.as_deref(), Some("example.com:8000"));
    assert_eq!((c.threads, c.slice_bytes), (3, 65_536));
    assert_eq!(c.cache_ttl, Duration::from_secs(5400));
    assert_eq!(c.default_freshness, DefaultFreshness::Heuristic);
    let caching = Caching {
        targeted_fields: vec![
            HeaderName::from_static("edge-cache-control"),
            HeaderName::from_static("cdn-cache-control"),
        ],
        request_directives: Honoured::of(&[Directive::MaxAge, Directive::NoCache]),
        set_cookie: SetCookie::Explicit,
        query: QueryRules {
            ignore: vec!["utm_source".into()],
            sort: true,
        },
        show_key: true,
        stale_while_revalidate: Duration::from_secs(30),
        stale_if_error: Duration::from_secs(3600),
    };
    assert_eq!(c.caching, caching);
    for (raw, named) in [
        ("/a", "/a"),
        ("/a?utm_source=x", "/a"),
        ("/a?c=2&utm_source=x&b=1&c=1", "/a?b=1&c=2&c=1"),
        ("/a?utm_sources=x", "/a?utm_sources=x"),
    ] {
        assert_eq!(c.caching.query.apply(raw.into()), named);
    }
    assert_eq!(
        c.l2,
        Some(L2Config {
            dir: "/etc/ps/cache".into(),
            bytes_max: 2 << 40,
            life: Life::Alone,
        })
    );
    assert_eq!(c.max_object_bytes, Some(5 << 30));
    assert_eq!(c.origin_probe, OriginProbe::Head);
    assert_eq!(
        c.stitch_log,
        StitchLog {
            enabled: false,
            pace: Duration::from_millis(250)
        }
    );
    assert!(c.admin.unwrap().auth_token.matches(b"t"));
    assert_eq!(c.origin_timeouts.total, Duration::from_secs(4));
    assert_eq!(c.client_timeouts.bytes_per_second_min, 0);
    assert_eq!(c.client_timeouts.slow, Duration::from_secs(4));
    assert_eq!(c.client_timeouts.total, Some(Duration::from_secs(3600)));
    assert_eq!(c.drain_timeout, Duration::ZERO);
    assert!(c.warnings.is_empty());
    // One map alone, and no disk store without a cache.
    assert_eq!(
        good("listen: {address: 0.0.0.0:1}").listen[0]
            .address
            .port(),
        1
    );
    assert_eq!(good("enable_l2_cache: false").l2, None);
    assert_eq!(good("enable_cache: false").l2, None);
}

#[test]
fn the_memory_budget_is_a_sum() {
    let c = good("memory_budget: 1g\nl1_cache_size_bytes: 256m");
    assert_eq!(c.memory.total(), 1 << 30);
    let part = ((1024 - 64 - 32 - 256) / 2) << 20;
    assert_eq!((c.memory.connections, c.memory.transfers), (part, part));
    // Nothing waits for a disk store that is not there.
    assert_eq!(good("enable_l2_cache: false").memory.total(), 676 << 20);
    // The default grows with what is configured.
    assert_eq!(
        good("l1_cache_size_bytes: 8g").memory.total(),
        (10 * 1024 + 96) << 20
    );
    assert!(good("slice_size: 10m").memory.transfers >= 16 * (10 << 20));
    refused_at(
        "memory_budget: 196m",
        "memory_budget",
        "give 243269632 bytes (232m) or more",
    );
    good("memory_budget: 232m");
    refused_at("memory_budget: 0", "memory_budget", "must be");
}

#[test]
fn cluster_loads() {
    let c = good(CLUSTER);
    assert_eq!(c.l2.unwrap().life, Life::InCluster);
    let c = c.cluster.unwrap();
    assert_eq!(c.node_id, NodeId(1));
    assert_eq!(c.listen, "0.0.0.0:7001".parse().unwrap());
    assert_eq!(c.advertise, "node1:7001");
    assert_eq!(c.seeds, ["node1:7001", "node2:7001", "node3:7001"]);
    assert_eq!((c.voters_expected, c.role, c.weight), (3, Role::Voter, 1));
    assert_eq!(c.data_dir, Path::new("/var/lib/pingora-slice"));
    assert_eq!((c.lease, c.remove_after), (Duration::from_secs(2), None));
    assert_eq!(c.tls.ca, Path::new("/etc/ps/ca.pem"));
    assert_eq!(c.tls.key, Path::new("/keys/node1.key"));
    let c = good(
        "
upstream_address: origin:80
cluster:
  node_id: 7
  listen: 127.0.0.1:7100
  advertise: '[::1]:7100'
  seeds: node1:7001
  voters_expected: 1
  role: edge
  weight: 20
  data_dir: data
  lease: 500ms
  remove_after: 1h
  tls: {ca: ca.pem, cert: node1.pem, key: node1.key}
",
    );
    let c = c.cluster.unwrap();
    assert_eq!((c.voters_expected, c.role, c.weight), (1, Role::Edge, 20));
    assert_eq!(
        (c.advertise.as_str(), c.data_dir.as_path()),
        ("[::1]:7100", Path::new("/etc/ps/data"))
    );
    assert_eq!(c.remove_after, Some(Duration::from_secs(3600)));
}

#[test]
fn unknown_keys_are_refused_at_every_level() {
    refused_at(
        "slice_sise: 1m",
        "slice_sise: 1m",
        "did you mean slice_size?",
    );
    refused_at("slice-size: 1m", "slice-size", "did you mean slice_size?");
    refused_at("zzz: 1", "zzz", "known here: listen, ");
    refused_at("7: 1", "7", "unknown key");
    refused_at(
        "purge: {enabeld: true}",
        "purge.enabeld",
        "did you mean enabled?",
    );
    refused_at(
        "stitch_log: {pase: 1}",
        "stitch_log.pase",
        "did you mean pace?",
    );
    refused_at(
        "metrics_endpoint: {adress: a}",
        "metrics_endpoint.adress",
        "address?",
    );
    refused_at(
        "origin_timeouts: {conect: 1}",
        "origin_timeouts.conect",
        "connect?",
    );
    refused_at(
        "client_timeouts: {min-rate: 1}",
        "client_timeouts.min-rate",
        "min_rate?",
    );
    refused_at(
        "listen: [{address: 0.0.0.0:1, h3: true}]",
        "listen[0].h3",
        "known here: address, tls, h2",
    );
    refused_at(
        "listen: {address: 0.0.0.0:1, tls: {cert: a, key: b, ca: c}}",
        "listen.tls.ca",
        "unknown key",
    );
    refused_at(
        "admin: {address: 127.0.0.1:1, auth_token: t, token: t}",
        "admin.token: (not shown)",
        "auth_token?",
    );
    refused_at(
        &cluster_with("wieght: 2"),
        "cluster.wieght",
        "did you mean weight?",
    );
    let tls = cluster_with("tls: {ca: a, cert: b, key: c, crl: d}");
    refused_at(&tls, "cluster.tls.crl", "unknown key");
}

#[test]
fn all_problems_are_listed_at_once() {
    let problems = refused(
        "
slice_size: 10
cache_ttl: 0
slice_patterns: ['(', 'ok', '[']
upstream_address: [nonsense, 'ftp://x']
listen: [x, {h2: perhaps}]
purge: {enabled: maybe}
what: 1
cluster: {node_id: 0}
",
    );
    let keys: Vec<&str> = problems
        .iter()
        .filter_map(|p| p.split(": ").next())
        .collect();
    assert_eq!(
        keys,
        [
            "listen[0]",
            "listen[1].address",
            "listen[1].h2",
            "slice_size",
            "upstream_address[0]",
            "upstream_address[1]",
            "slice_patterns[0]",
            "slice_patterns[2]",
            "cache_ttl",
            "purge.enabled",
            "cluster.advertise",
            "cluster.seeds",
            "cluster.tls",
            "cluster.node_id",
            "what",
        ]
    );
}

#[test]
fn values_out_of_bounds_are_refused() {
    for bytes in ["65535", "10485761", "11m", "0", "-1"] {
        let hint = if bytes == "-1" {
            "size"
        } else {
            "from 65536 (64k) to 10485760 (10m)"
        };
        refused_at(
            &format!("slice_size: {bytes}"),
            &format!("slice_size: {bytes}"),
            hint,
        );
    }
    assert_eq!(good("slice_size: 65536").slice_bytes, 65_536);
    assert_eq!(good("slice_size: 10m").slice_bytes, 10_485_760);
    refused_at("test_slice_size: 0", "test_slice_size", "greater than 0");
    refused_at("test_slice_size: 4g", "test_slice_size", "less than 4g");
    refused_at(
        "max_concurrent_subrequests: 0",
        "max_concurrent_subrequests",
        "greater than 0",
    );
    refused_at(
        "max_concurrent_subrequests: 4.5",
        "max_concurrent_subrequests",
        "integer",
    );
    refused_at("max_retries: -1", "max_retries", "0 or greater");
    refused_at("threads: 0", "threads", "from 1 to 1024");
    refused_at("cache_ttl: 0", "cache_ttl", "greater than 0");
    refused_at("cache_ttl: soon", "cache_ttl: soon", "such as 250ms");
    refused_at(
        "l1_cache_size_bytes: 0",
        "l1_cache_size_bytes",
        "greater than 0",
    );
    refused_at(
        "l2_cache_size_bytes: 0",
        "l2_cache_size_bytes",
        "greater than 0",
    );
    refused_at("l2_cache_dir: ''", "l2_cache_dir", "path");
    refused_at("max_object_size: big", "max_object_size", "size");
    refused_at("enable_cache: 1", "enable_cache", "true or false");
    refused_at("enable_l2_cache: yes", "enable_l2_cache", "true or false");
    refused_at(
        "default_freshness: always",
        "default_freshness",
        "ttl, heuristic, none",
    );
    refused_at("origin_probe: get", "origin_probe", "range, head");
    refused_at(
        "slice_patterns: ['(']",
        "slice_patterns[0]",
        "regular expression",
    );
    refused_at("slice_patterns: [[a]]", "slice_patterns[0]", "single value");
    refused_at("stitch_log: {pace: x}", "stitch_log.pace", "duration");
    refused_at(
        "metrics_endpoint: {address: 9090}",
        "metrics_endpoint.address",
        "0.0.0.0:8080",
    );
    refused_at(
        "origin_timeouts: {connect: 0}",
        "origin_timeouts.connect",
        "greater than 0",
    );
    refused_at(
        "client_timeouts: {min_rate: x}",
        "client_timeouts.min_rate",
        "size",
    );
    refused_at("drain_timeout: x", "drain_timeout", "duration");
    refused_at("purge: yes", "purge", "must be a map");
    refused_at("slice_size: {a: 1}", "slice_size: (a map)", "single value");
    refused_at("slice_size: !x 1m", "slice_size", "single value");
}

#[test]
fn addresses_are_checked() {
    for text in [
        "example.com:80",
        "8080",
        ":8080",
        "0.0.0.0",
        "0.0.0.0:65536",
        "::1:80",
    ] {
        refused_at(
            &format!("listen: '{text}'"),
            "listen",
            "such as 0.0.0.0:8080",
        );
    }
    refused_at("listen: []", "listen", "at least one");
    refused_at(
        "listen: {h2: true}",
        "listen.address",
        "such as 0.0.0.0:8443",
    );
    refused_at(
        "listen: {address: 0.0.0.0:1, tls: {cert: a}}",
        "listen.tls.key",
        "PEM",
    );
    for text in [
        "a",
        "a:0",
        "a:x",
        ":80",
        "a b:80",
        "ftp://a",
        "http://",
        "http://a/b",
        "u@a:80",
        "[::1",
        "[x]:80",
        "a:80/",
        "::1:80",
    ] {
        refused_at(
            &format!("upstream_address: '{text}'"),
            "upstream_address",
            "host:port",
        );
    }
    refused_at("upstream_address: []", "upstream_address", "at least one");
    refused_at("upstream_host: 'a b'", "upstream_host", "host name");
}

#[test]
fn an_own_address_is_no_origin() {
    for (listen, upstream) in [
        ("0.0.0.0:8080", "127.0.0.1:8080"),
        ("0.0.0.0:8080", "localhost:8080"),
        ("0.0.0.0:8080", "http://LOCALHOST:8080"),
        ("0.0.0.0:8080", "0.0.0.0:8080"),
        ("0.0.0.0:80", "http://127.0.0.9"),
        ("127.0.0.1:443", "https://localhost"),
        ("127.0.0.1:8080", "localhost:8080"),
        ("127.0.0.1:8080", "0.0.0.0:8080"),
        ("10.1.2.3:8080", "10.1.2.3:8080"),
        ("[::]:8080", "127.0.0.1:8080"),
        ("[::1]:8080", "[::1]:8080"),
        ("[::]:8080", "[::ffff:127.0.0.1]:8080"),
    ] {
        let text = format!("listen: '{listen}'\nupstream_address: ['other:1', '{upstream}']");
        refused_at(&text, "upstream_address", "own `listen` address");
    }
    for (listen, upstream) in [
        ("0.0.0.0:8080", "127.0.0.1:8081"),
        ("127.0.0.1:8080", "127.0.0.2:8080"),
        ("0.0.0.0:8080", "192.0.2.1:8080"),
        ("0.0.0.0:8080", "origin:8080"),
        ("10.1.2.3:8080", "127.0.0.1:8080"),
    ] {
        good(&format!(
            "listen: '{listen}'\nupstream_address: '{upstream}'"
        ));
    }
}

#[test]
fn the_two_default_addresses_do_not_go_together() {
    // Without a file nothing can be meant but these two.
    let env = |_: &str| None;
    let built_in = |port| Config::build(None, Path::new("."), Source { path: None, port }, &env);
    let problems = built_in(None).unwrap_err().to_string();
    assert!(
        problems.contains("upstream_address: 127.0.0.1:8080"),
        "{problems}"
    );
    assert!(problems.contains("--port"), "{problems}");
    assert!(built_in(Some(8080)).is_err());
    assert_eq!(built_in(Some(8081)).unwrap().listen[0].address.port(), 8081);
    // A file without `listen` may be meant for --port: a warning, and no start.
    let config = good("slice_size: 2m");
    assert_eq!(config.warnings.len(), 1);
    assert!(config.refuse_own_upstream().is_err());
    let config = parse_with("slice_size: 2m", &[], Some(9000)).unwrap();
    assert!(config.warnings.is_empty() && config.refuse_own_upstream().is_ok());
    assert!(parse_with("slice_size: 2m", &[], Some(8080)).is_err());
    assert!(good(ORIGIN).refuse_own_upstream().is_ok());
}

#[test]
fn port_replaces_the_first() {
    let text = "listen: [127.0.0.1:1000, 127.0.0.1:1001]\nupstream_address: origin:80";
    let c = parse_with(text, &[], Some(2000)).unwrap();
    let ports: Vec<u16> = c.listen.iter().map(|l| l.address.port()).collect();
    assert_eq!(ports, [2000, 1001]);
    assert!(parse_with(text, &[], Some(1001)).is_err());
}

#[test]
fn listeners_must_not_clash() {
    let listen = "upstream_address: origin:80\nlisten: 0.0.0.0:80\n";
    for (text, key) in [
        (
            "metrics_endpoint: {enabled: true, address: '127.0.0.1:80'}",
            "metrics_endpoint.address",
        ),
        (
            "admin: {address: '[::]:80', auth_token: t}",
            "admin.address",
        ),
    ] {
        refused_at(&format!("{listen}{text}"), key, "taken by listen[0]");
    }
    refused_at("listen: [0.0.0.0:80, 127.0.0.1:80]", "listen[1]", "taken");
    refused_at("listen: [127.0.0.1:80, 127.0.0.1:80]", "listen[1]", "taken");
    let text = "metrics_endpoint: {enabled: true}\nadmin: {address: 127.0.0.1:9090, auth_token: t}";
    refused_at(text, "admin.address", "taken by metrics_endpoint.address");
    good("listen: [127.0.0.1:80, 127.0.0.2:80, '[::1]:80', 127.0.0.1:0, 127.0.0.1:0]");
    good(&format!(
        "{listen}metrics_endpoint: {{enabled: false, address: '127.0.0.1:80'}}"
    ));
}

#[test]
fn purging_without_a_token_is_for_loopback() {
    let open = "upstream_address: origin:80\npurge: {enabled: true}\nlisten: ";
    refused_at(
        &format!("{open} 0.0.0.0:80"),
        "purge.auth_token",
        "0.0.0.0:80 is open",
    );
    refused_at(
        &format!("{open} [127.0.0.1:80, 10.1.1.1:80]"),
        "purge.auth_token",
        "10.1.1.1",
    );
    good(&format!("{open} [127.0.0.1:80, '[::1]:80', localhost:81]"));
    good("purge: {enabled: true, auth_token: t}");
    good("purge: {enabled: false}");
}

#[test]
fn tokens_are_required_sendable_and_never_shown() {
    refused_at(
        "admin: {address: 127.0.0.1:9091}",
        "admin.auth_token",
        "needs a token",
    );
    refused_at("admin: {auth_token: t}", "admin.address", "127.0.0.1:9091");
    refused_at("purge: {auth_token: ''}", "purge.auth_token", "empty");
    refused_at(
        "purge: {auth_token: 0x1f}",
        "purge.auth_token: (not shown)",
        "quotes",
    );
    for (text, env) in [
        ("purge: {auth_token: 'my secret'}", ""),
        ("purge: {auth_token: '${T}'}", "my secret"),
        ("purge: {auth_tokn: 'my secret'}", ""),
    ] {
        let problems = parse_with(text, &[("T", env)], None)
            .unwrap_err()
            .to_string();
        assert!(!problems.contains("secret"), "{problems}");
    }
    let config = good("purge: {enabled: true, auth_token: secret}");
    assert!(!format!("{config:?}").contains("secret"));
}

#[test]
fn cluster_rules() {
    for (line, key, hint) in [
        ("node_id: 0", "node_id", "greater than 0"),
        ("node_id: one", "node_id", "integer"),
        ("listen: 0.0.0.0:65535", "listen", "next one"),
        ("listen: 0.0.0.0:0", "listen", "next one"),
        ("listen: node1", "listen", "address and a port"),
        ("advertise: node1", "advertise", "host:port"),
        ("advertise: 0.0.0.0:7001", "advertise", "reach"),
        ("advertise: '[::]:7001'", "advertise", "reach"),
        ("advertise: node1:65535", "advertise", "next one"),
        ("seeds: []", "seeds", "are 0 of the 3"),
        ("seeds: [node1:7001]", "seeds", "are 1 of the 3"),
        ("seeds: [a:1, b:1, a:1]", "seeds", "twice"),
        ("seeds: [a:1, b, c:1]", "seeds[1]", "host:port"),
        ("voters_expected: 2", "voters_expected", "1, 3, 5"),
        ("voters_expected: 5", "seeds", "are 3 of the 5"),
        ("role: leader", "role", "voter, edge"),
        ("weight: -1", "weight", "at most 100"),
        ("weight: 101", "weight", "at most 100"),
        ("lease: 100ms", "lease", "200ms to 1m"),
        ("lease: 2m", "lease", "200ms to 1m"),
        ("remove_after: 5s", "remove_after", "10 leases"),
        ("data_dir: ''", "data_dir", "path"),
        (
            "data_dir: /var/cache/pingora-slice",
            "data_dir",
            "l2_cache_dir",
        ),
        ("tls: {ca: a, cert: b}", "tls.key", "ca issue"),
    ] {
        refused_at(&cluster_with(line), &format!("cluster.{key}"), hint);
    }
    for line in [
        "voters_expected: 1",
        "lease: 200ms",
        "remove_after: 0",
        "seeds: [a:1, b:1, c:1, d:1]",
    ] {
        good(&cluster_with(line));
    }
    let edge = |seeds| format!("{}\n  role: edge", cluster_with(seeds));
    good(&edge("seeds: [node1:7001]"));
    refused_at(&edge("seeds: []"), "cluster.seeds", "are 0 of the 1");
    for name in ["node_id", "advertise", "seeds", "tls"] {
        let kept: Vec<&str> = CLUSTER
            .lines()
            .filter(|l| !l.trim_start().starts_with(&format!("{name}:")))
            .collect();
        refused_at(&kept.join("\n"), &format!("cluster.{name}: (absent)"), "");
    }
}

#[test]
fn variables_change_values_but_not_the_shape() {
    let text = "
upstream_address: ${ORIGIN:-origin:8000}
slice_size: ${SIZE:-2m}
enable_l2_cache: ${L2:-false}
slice_patterns: ['${PATTERN:-^/a}', '\\.iso$']
";
    let c = parse_with(text, &[], None).unwrap();
    assert_eq!(
        (c.upstreams[0].host.as_str(), c.upstreams[0].port),
        ("origin", 8000)
    );
    assert_eq!((c.slice_bytes, c.l2), (2 << 20, None));
    let injected = [("ORIGIN", "a:1\npurge: {enabled: true}"), ("SIZE", "4m")];
    let problems = parse_with(text, &injected, None).unwrap_err();
    assert_eq!(problems.0.len(), 1);
    assert!(problems.0[0].remedy.contains("it expands to"), "{problems}");
    let c = parse_with("upstream_host: ${H}", &[("H", "example.com")], None).unwrap();
    assert_eq!(c.upstream_host.as_deref(), Some("example.com"));
    let c = parse_with("slice_patterns: ['${P}']", &[("P", "a, b: [c]")], None).unwrap();
    assert_eq!(c.slice_patterns.len(), 1);
    refused_at(
        "upstream_host: ${NOT_THERE}",
        "upstream_host: ${NOT_THERE}",
        "set NOT_THERE",
    );
    refused_at(
        "purge: {auth_token: '${T}'}",
        "purge.auth_token",
        "set T in the environment",
    );
}

#[test]
fn test_slice_size_overrides_with_a_warning() {
    let c = good("test_slice_size: 7\nslice_size: 2m\nupstream_address: o:1");
    assert_eq!(c.slice_bytes, 7);
    assert_eq!(c.warnings.len(), 1);
    assert_eq!(
        (c.warnings[0].key.as_str(), c.warnings[0].value.as_str()),
        ("test_slice_size", "7")
    );
}

/// What is configured and stays off is not passed over in silence.
#[test]
fn a_section_that_is_off_warns() {
    for (yaml, key, section) in [
        (
            "metrics_endpoint: {address: '127.0.0.1:9090'}",
            "metrics_endpoint.address",
            "metrics_endpoint",
        ),
        ("purge: {auth_token: secret}", "purge.auth_token", "purge"),
    ] {
        let warnings = good(&format!("{ORIGIN}{yaml}")).warnings;
        let [warning] = &warnings[..] else {
            panic!("{yaml}: {warnings:?}")
        };
        assert_eq!(warning.key, key);
        assert_eq!(
            warning.remedy,
            format!("{section} is off: add enabled: true")
        );
        assert!(!warning.to_string().contains("secret"));
        let meant = yaml.replace('{', "{enabled: false, ");
        assert!(good(&format!("{ORIGIN}{meant}")).warnings.is_empty());
    }
}

/// The command line waits for longer than a node tries.
#[test]
fn a_purge_under_the_longest_lease_is_waited_for() {
    let longest = pingora_slice_cluster::handle::patience(*rules::LEASE.end());
    assert!(pingora_slice_client::LEADER_TIMEOUT > longest);
}

fn shipped(name: &str) -> (PathBuf, String) {
    let file = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../configs")
        .join(name);
    let text = std::fs::read_to_string(&file).unwrap();
    (file, text)
}

/// A file in which every key that a reload names can be changed.
const RUNNING: &[(&str, &str)] = &[
    (
        "listen",
        "[{address: '127.0.0.1:8443', tls: {cert: a.pem, key: a.key}}]",
    ),
    ("admin", "{address: '127.0.0.1:9091', auth_token: a}"),
    ("l2_cache_dir", "/a"),
];

/// `RUNNING` with these keys instead.
fn running(other: &[(&str, &str)]) -> Config {
    let mut keys: BTreeMap<&str, &str> = RUNNING.iter().copied().collect();
    keys.extend(other.iter().copied());
    let lines = keys.iter().map(|(key, value)| format!("{key}: {value}\n"));
    good(&lines.collect::<String>())
}

/// No key is forgotten: each takes effect at a reload, in the settings that the
/// node goes on with, or is named as waiting for the next start.
#[test]
fn every_key_is_taken_by_a_reload_or_named() {
    const NOW: bool = true;
    const AT_START: bool = false;
    let cases: &[(&str, &str, bool, &str)] = &[
        (
            "listen",
            "[{address: '127.0.0.1:8443', tls: {cert: b.pem, key: b.key}}]",
            NOW,
            "listen.tls",
        ),
        (
            "listen",
            "[{address: '127.0.0.1:8444', tls: {cert: a.pem, key: a.key}}]",
            AT_START,
            "listen",
        ),
        (
            "listen",
            "[{address: '127.0.0.1:8443', h2: true}]",
            AT_START,
            "listen",
        ),
        (
            "admin",
            "{address: '127.0.0.1:9091', auth_token: b}",
            NOW,
            "admin.auth_token",
        ),
        (
            "admin",
            "{address: '127.0.0.1:9092', auth_token: a}",
            AT_START,
            "admin",
        ),
        ("admin", "", AT_START, "admin"),
        ("max_concurrent_subrequests", "9", NOW, ""),
        ("max_retries", "9", NOW, ""),
        ("slice_patterns", "[x]", NOW, ""),
        ("cache_ttl", "9", NOW, ""),
        ("default_freshness", "none", NOW, ""),
        ("caching", "{query: {sort: true}}", NOW, ""),
        ("caching", "{stale_if_error: 9}", NOW, ""),
        ("stitch_log", "{pace: 9}", NOW, ""),
        ("purge", "{enabled: true, auth_token: p}", NOW, ""),
        ("upstream_address", "other:80", AT_START, ""),
        ("upstream_host", "other", AT_START, ""),
        ("threads", "777", AT_START, ""),
        ("slice_size", "2m", AT_START, ""),
        ("test_slice_size", "100", AT_START, "slice_size"),
        ("enable_cache", "false", AT_START, ""),
        ("l1_cache_size_bytes", "9m", AT_START, ""),
        ("memory_budget", "2g", AT_START, ""),
        ("enable_l2_cache", "false", AT_START, ""),
        ("l2_cache_dir", "/b", AT_START, ""),
        ("l2_cache_size_bytes", "1g", AT_START, ""),
        ("max_object_size", "1g", AT_START, ""),
        ("origin_probe", "head", AT_START, ""),
        ("metrics_endpoint", "{enabled: true}", AT_START, ""),
        ("origin_timeouts", "{read: 9}", AT_START, ""),
        ("client_timeouts", "{idle: 9}", AT_START, ""),
        ("drain_timeout", "9", AT_START, ""),
        (
            "cluster",
            "{node_id: 1, advertise: 'n:1', seeds: ['n:1'], voters_expected: 1, tls: {ca: a, cert: b, key: c}}",
            AT_START,
            "",
        ),
    ];
    let tried: BTreeSet<&str> = cases.iter().map(|(key, ..)| *key).collect();
    let known = known_keys("");
    assert_eq!(tried, known.iter().map(String::as_str).collect());

    let settings = |config: &Config| format!("{:?}", Settings::of(config));
    let before = running(&[]);
    for (key, value, now, named) in cases {
        let new = running(&[(key, value)]);
        let mut config = before.clone();
        let changes = config.take(&new);
        let named = if named.is_empty() { key } else { named };
        let (list, other) = match now {
            true => (&changes.now, &changes.at_start),
            false => (&changes.at_start, &changes.now),
        };
        assert!(
            list.contains(named) && other.is_empty(),
            "{key}: {changes:?}"
        );
        let are_other = settings(&config) != settings(&before);
        // Tokens are not shown, and certificates are apart.
        let are_seen = !named.contains('.');
        assert_eq!(are_other, *now && are_seen, "{key}: {value}");
        if *now {
            assert_eq!(settings(&config), settings(&new), "{key}: {value}");
            assert_eq!(config.take(&new), Changes::default(), "{key}: {value}");
        } else {
            assert_eq!(config.take(&new), changes, "it is named until the start");
        }
    }
    assert_eq!(before.clone().take(&before), Changes::default());
}

#[test]
fn a_reload_takes_a_token_and_the_files_of_certificates() {
    let mut config = running(&[]);
    config.take(&running(&[(
        "admin",
        "{address: '127.0.0.1:9092', auth_token: b}",
    )]));
    let admin = config.admin.as_ref().unwrap();
    assert_eq!(admin.address.port(), 9091);
    let token = Settings::of(&config).admin_token.unwrap();
    assert!(token.matches(b"b") && !token.matches(b"a"));

    // Also where another listener waits for the next start.
    config.take(&running(&[(
        "listen",
        "['127.0.0.1:8081', {address: '127.0.0.1:8443', tls: {cert: b.pem, key: b.key}}]",
    )]));
    let [listen] = &config.listen[..] else {
        panic!("{:?}", config.listen);
    };
    let files = listen.tls.as_ref().unwrap();
    assert_eq!(files.cert, Path::new("/etc/ps/b.pem"));
}

/// What has no token or no TLS is not offered to every network.
#[test]
fn a_shipped_node_is_operated_from_its_own_machine() {
    for node in ["node1.yaml", "node2.yaml", "node3.yaml"] {
        let (_, text) = shipped(node);
        for (ip, env) in [("127.0.0.1", None), ("10.0.0.1", Some("10.0.0.1"))] {
            let mut vars = vec![("PURGE_TOKEN", "p"), ("ADMIN_TOKEN", "a")];
            vars.extend(env.map(|ip| ("OPERATOR_IP", ip)));
            let config = parse_with(&text, &vars, None).unwrap_or_else(|e| panic!("{node}\n{e}"));
            let admin = config.admin.unwrap().address;
            for address in [config.metrics_endpoint.unwrap(), admin] {
                assert_eq!(address.ip().to_string(), ip, "{node}");
            }
        }
    }
}

/// No container sees the authority's key, nor another node's.
#[test]
fn a_container_sees_its_own_key_alone() {
    let (_, text) = shipped("../docker-compose.yml");
    let compose: Value = serde_yaml::from_str(&text).unwrap();
    for node in 1..=3 {
        let volumes = &compose["services"][format!("node{node}")]["volumes"];
        let volumes = volumes.as_sequence().unwrap();
        let tls: Vec<&str> = volumes
            .iter()
            .filter_map(Value::as_str)
            .filter(|volume| volume.contains("/etc/pingora-slice/tls"))
            .collect();
        assert_eq!(tls, [format!("tls{node}:/etc/pingora-slice/tls:ro")]);
        assert!(
            !volumes
                .iter()
                .any(|v| v.as_str().unwrap().starts_with("certs:"))
        );
    }
}

/// Who kills a node that does not end waits for all that may take its time.
#[test]
fn a_node_that_stops_in_good_order_is_not_killed() {
    let needed = good("").drain_timeout + crate::node::PARTS_STOP_MAX;
    let (_, unit) = shipped("pingora-slice.service");
    let (_, compose) = shipped("../docker-compose.yml");
    for (text, key) in [
        (unit, "\nTimeoutStopSec="),
        (compose, "\n  stop_grace_period: "),
    ] {
        let given = text.split(key).nth(1).unwrap().lines().next().unwrap();
        let seconds = given.trim_end_matches('s').parse().unwrap();
        assert!(
            Duration::from_secs(seconds) > needed,
            "{key}{given}: {needed:?}"
        );
    }
}

#[test]
fn the_shipped_file_equals_the_defaults() {
    let (_, text) = shipped("pingora_slice.yaml");
    let config = good(&text);
    assert_eq!(format!("{config:?}"), format!("{:?}", good("")));
    // Also with every option that is commented out, it loads.
    let all: String = text
        .lines()
        .map(|line| format!("{}\n", uncommented(line)))
        .collect();
    let all = all.replace("listen: 0.0.0.0:8080", "listen: 0.0.0.0:8081");
    let env = [("PURGE_TOKEN", "p"), ("ADMIN_TOKEN", "a")];
    let config = parse_with(&all, &env, None).unwrap_or_else(|e| panic!("{all}\n{e}"));
    assert!(config.admin.is_some() && config.upstream_host.is_some());
    assert_eq!(config.slice_bytes, 100);
    let cluster = config.cluster.unwrap();
    let minimal = good(CLUSTER).cluster.unwrap();
    let tls = TlsFiles {
        key: "/keys/node1.key".into(),
        ..cluster.tls.clone()
    };
    assert_eq!(ClusterConfig { tls, ..cluster }, minimal);
    for section in ["", "purge", "admin", "cluster", "cluster.tls"] {
        for key in known_keys(section) {
            assert!(
                text.contains(&format!("{key}:")),
                "{section}.{key} is not described"
            );
        }
    }
}

/// `#key:` and `#  key:` are options, `# text` is prose.
fn uncommented(line: &str) -> String {
    let is_option = |rest: &str| {
        let rest = rest.strip_prefix("  ").unwrap_or(rest);
        rest.starts_with(|c: char| c.is_ascii_lowercase())
    };
    match line.split_once('#') {
        Some((before, rest)) if before.trim().is_empty() && is_option(rest) => {
            format!("{before}{rest}")
        }
        _ => line.to_string(),
    }
}

/// The keys that a section knows, as the refusal of an unknown one lists them.
fn known_keys(section: &str) -> Vec<String> {
    let text = match section {
        "" => "_: 1".to_string(),
        "cluster.tls" => cluster_with("tls: {ca: a, cert: b, key: c, _: 1}"),
        section => format!("{section}: {{_: 1}}"),
    };
    let problems = refused(&text);
    let listing = problems
        .iter()
        .find_map(|p| p.split_once("known here: "))
        .unwrap()
        .1;
    listing.split(", ").map(str::to_string).collect()
}

#[test]
fn shipped_nodes_and_presets_load() {
    let env = [("PURGE_TOKEN", "p"), ("ADMIN_TOKEN", "a")];
    for id in 1..=3 {
        let (_, text) = shipped(&format!("node{id}.yaml"));
        let config = parse_with(&text, &env, None).unwrap_or_else(|e| panic!("node{id}: {e}"));
        assert_eq!(config.upstreams[0].host, "origin");
        let cluster = config.cluster.unwrap();
        assert_eq!(cluster.node_id, NodeId(id));
        assert_eq!(cluster.advertise, format!("node{id}:7001"));
        assert_eq!(
            cluster.tls.cert,
            Path::new(&format!("/etc/pingora-slice/tls/node{id}.pem"))
        );
        assert_eq!(refused(&text).len(), 2, "tokens have no default");
    }
    for name in ["high-performance", "conservative", "minimal"] {
        let (file, _) = shipped(&format!("presets/{name}.yaml"));
        let config = Config::load(&file).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert!(config.refuse_own_upstream().is_ok());
    }
}

#[test]
fn what_is_not_a_map_is_refused() {
    refused_at("[1, 2]", "(file)", "key: value");
    refused_at("a: [", "(file): line 2 column 1", "");
    refused_at("a: 1\na: 2", "(file)", "duplicate");
    refused_at("--- {}\n--- {}", "(file)", "document");
    good("# nothing but a comment\n");
}

#[test]
fn files_are_looked_for_when_a_file_is_loaded() {
    let dir = std::env::temp_dir().join(format!("pingora-slice-config-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let file = dir.join("node.yaml");
    std::fs::write(&file, format!("{CLUSTER}\nslice_size: 1\n")).unwrap();
    let Problems(problems) = Config::load(&file).unwrap_err();
    let keys: Vec<&str> = problems.iter().map(|p| p.key.as_str()).collect();
    assert_eq!(
        keys,
        [
            "slice_size",
            "cluster.tls.ca",
            "cluster.tls.cert",
            "cluster.tls.key"
        ]
    );
    assert_eq!(problems[1].value, dir.join("ca.pem").display().to_string());

    std::fs::write(&file, "upstream_address: origin:80\nlisten: 127.0.0.1:1\n").unwrap();
    let source = Source {
        path: Some(file.clone()),
        port: Some(5),
    };
    let config = Config::load_from(source).unwrap();
    std::fs::write(&file, "upstream_address: other:80\nlisten: 127.0.0.1:1\n").unwrap();
    let again = config.reload().unwrap();
    assert_eq!(
        (
            again.upstreams[0].host.as_str(),
            again.listen[0].address.port()
        ),
        ("other", 5)
    );
    std::fs::remove_dir_all(&dir).unwrap();

    let Problems(problems) = Config::load(&file).unwrap_err();
    assert_eq!(
        (problems.len(), problems[0].key.as_str()),
        (1, file.to_str().unwrap())
    );
}
