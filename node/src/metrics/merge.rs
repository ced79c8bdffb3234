//! The metrics of all nodes as one page: `/metrics/cluster`.
//!
//! | kind | becomes |
//! | --- | --- |
//! | counter | the sum |
//! | histogram | the sum, bucket by bucket |
//! | rate or average (`..._rate`, `..._ms_avg`) | computed again from the sums: the cluster's own |
//! | other gauge | one series per node, with `node="N"` |
//! | `node_up{node}` | 1 if that node answered just now, else 0 |
//!
//! Sums fall when a node stops answering; `rate()` takes that for a restart.
//! Whoever wants alarms on exact rates scrapes each node's `/metrics`.
//!
//! Input comes from nodes of the cluster, possibly of another release: a text
//! that is too large or that is not what our nodes write counts as no answer.
//! Where two nodes' histograms have different buckets, a missing bucket counts
//! what is known to lie below it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

use pingora_slice_cluster::NodeId;

use super::{OF_PROCESS, PREFIX, average_ms, percent};

/// Longest text taken from one node, bytes: ours has some 20 KiB, and 100 more
/// per peer.
const TEXT_BYTES_MAX: usize = 1024 * 1024;
/// Most series taken from one node.
const SERIES_MAX: usize = 10_000;
/// Every gauge that is a percentage of two counters: name, part, the whole's summands.
const RATES: &[(&str, &str, &[&str])] = &[
    (
        "cache_hit_rate",
        "cache_hits_total",
        &["cache_hits_total", "cache_misses_total"],
    ),
    (
        "subrequest_failure_rate",
        "failed_subrequests_total",
        &["subrequests_total"],
    ),
];
/// Every gauge that is a histogram's average: name, histogram.
const AVERAGES: &[(&str, &str)] = &[
    ("request_duration_ms_avg", "request_duration_seconds"),
    ("subrequest_duration_ms_avg", "subrequest_duration_seconds"),
    ("assembly_duration_ms_avg", "assembly_duration_seconds"),
];

/// One page of this node's text and what the others answered.
pub fn merge(own: (NodeId, &str), others: &[(NodeId, Option<&str>)]) -> String {
    let mut page = Page::default();
    let mut up = BTreeMap::new();
    for (node, text) in [(own.0, Some(own.1))].iter().chain(others) {
        let families = text.and_then(parse);
        up.insert(*node, families.is_some());
        for (name, family) in families.unwrap_or_default() {
            page.add(*node, name, family);
        }
    }
    page.derive(&up);
    page.render()
}

/// A metric's kind, as its `TYPE` line says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Kind {
    #[default]
    Counter,
    Gauge,
    Histogram,
}

impl Kind {
    fn as_str(self) -> &'static str {
        match self {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram => "histogram",
        }
    }
}

/// Labels as they are written: `a="b",c="d"`; values stay escaped.
type Labels = String;

/// One metric of one node, or of all.
#[derive(Clone, Debug, Default, PartialEq)]
struct Family {
    help: String,
    kind: Kind,
    /// Counters and gauges.
    values: BTreeMap<Labels, f64>,
    /// Histograms, by their labels without `le`.
    histograms: BTreeMap<Labels, Buckets>,
}

/// A histogram: what lies at or below each bound, bounds as they are written.
#[derive(Clone, Debug, Default, PartialEq)]
struct Buckets {
    cumulative: BTreeMap<Bound, f64>,
    sum: f64,
    count: f64,
}

/// A bucket's upper bound, in the order of its value.
#[derive(Clone, Debug, PartialEq)]
struct Bound {
    value: f64,
    text: String,
}

impl Eq for Bound {}

impl PartialOrd for Bound {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Bound {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.value.total_cmp(&other.value)
    }
}

impl Buckets {
    /// What is known to lie at or below `bound`.
    fn below(&self, bound: &Bound) -> f64 {
        self.cumulative
            .range(..=bound)
            .next_back()
            .map_or(0.0, |(_, count)| *count)
    }

    fn plus(&self, other: &Buckets) -> Buckets {
        let bounds: BTreeSet<&Bound> = self
            .cumulative
            .keys()
            .chain(other.cumulative.keys())
            .collect();
        Buckets {
            cumulative: bounds
                .into_iter()
                .map(|b| (b.clone(), self.below(b) + other.below(b)))
                .collect(),
            sum: self.sum + other.sum,
            count: self.count + other.count,
        }
    }
}

/// All metrics of all nodes so far.
#[derive(Default)]
struct Page {
    families: BTreeMap<String, Family>,
}

impl Page {
    fn add(&mut self, node: NodeId, name: String, family: Family) {
        let total = self.families.entry(name).or_insert_with(|| Family {
            help: family.help.clone(),
            kind: family.kind,
            ..Family::default()
        });
        if total.kind != family.kind {
            return; // another release's idea of this name
        }
        for (labels, value) in family.values {
            if family.kind == Kind::Gauge {
                total.values.insert(with_node(node, &labels), value);
            } else {
                *total.values.entry(labels).or_default() += value;
            }
        }
        for (labels, buckets) in family.histograms {
            let sum = total.histograms.entry(labels).or_default();
            *sum = sum.plus(&buckets);
        }
    }

    /// Replaces what cannot be added up by what follows from the sums.
    fn derive(&mut self, up: &BTreeMap<NodeId, bool>) {
        for (name, part, whole) in RATES {
            let whole = whole.iter().map(|name| self.sum_of(name)).sum();
            let rate = percent(self.sum_of(part), whole);
            self.replace(name, [(Labels::new(), rate)].into());
        }
        for (name, histogram) in AVERAGES {
            let (sum, count) = self
                .family(histogram)
                .map(|f| &f.histograms)
                .into_iter()
                .flatten()
                .fold((0.0, 0.0), |(sum, count), (_, h)| {
                    (sum + h.sum, count + h.count)
                });
            self.replace(name, [(Labels::new(), average_ms(sum, count))].into());
        }
        self.replace(
            "node_up",
            up.iter()
                .map(|(node, up)| (with_node(*node, ""), f64::from(*up)))
                .collect(),
        );
        let node_up = self.families.get_mut(&format!("{PREFIX}node_up"));
        if let Some(node_up) = node_up {
            node_up.help = "1 if that node answered just now, else 0.".to_owned();
        }
    }

    fn family(&self, name: &str) -> Option<&Family> {
        self.families.get(&format!("{PREFIX}{name}"))
    }

    fn sum_of(&self, name: &str) -> f64 {
        self.family(name).map_or(0.0, |f| f.values.values().sum())
    }

    fn replace(&mut self, name: &str, values: BTreeMap<Labels, f64>) {
        let family = self.families.entry(format!("{PREFIX}{name}")).or_default();
        family.kind = Kind::Gauge;
        family.values = values;
    }

    fn render(&self) -> String {
        let mut text = String::new();
        for (name, family) in &self.families {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "# HELP {name} {}", family.help);
            let _ = writeln!(text, "# TYPE {name} {}", family.kind.as_str());
            for (labels, value) in &family.values {
                sample(&mut text, name, labels, *value);
            }
            for (labels, buckets) in &family.histograms {
                for (bound, count) in &buckets.cumulative {
                    let comma = if labels.is_empty() { "" } else { "," };
                    let labels = format!("{labels}{comma}le=\"{}\"", bound.text);
                    sample(&mut text, &format!("{name}_bucket"), &labels, *count);
                }
                sample(&mut text, &format!("{name}_sum"), labels, buckets.sum);
                sample(&mut text, &format!("{name}_count"), labels, buckets.count);
            }
        }
        text
    }
}

fn sample(text: &mut String, name: &str, labels: &str, value: f64) {
    // Writing to a String cannot fail.
    let _ = if labels.is_empty() {
        writeln!(text, "{name} {value}")
    } else {
        writeln!(text, "{name}{{{labels}}} {value}")
    };
}

fn with_node(node: NodeId, labels: &str) -> Labels {
    if labels.is_empty() {
        format!("node=\"{node}\"")
    } else {
        format!("node=\"{node}\",{labels}")
    }
}

/// Reads what one of our nodes wrote; `None` if it is anything else.
fn parse(text: &str) -> Option<BTreeMap<String, Family>> {
    // A text that was cut off ends in the middle of a line.
    if text.len() > TEXT_BYTES_MAX || !text.ends_with('\n') {
        return None;
    }
    let mut families: BTreeMap<String, Family> = BTreeMap::new();
    let mut series = 0;
    for line in text.lines() {
        if let Some(help) = line.strip_prefix("# HELP ") {
            let (name, help) = help.split_once(' ')?;
            families.entry(ours(name)?).or_default().help = help.to_owned();
        } else if let Some(kind) = line.strip_prefix("# TYPE ") {
            let (name, kind) = kind.split_once(' ')?;
            families.entry(ours(name)?).or_default().kind = match kind {
                "counter" => Kind::Counter,
                "gauge" => Kind::Gauge,
                "histogram" => Kind::Histogram,
                _ => return None,
            };
        } else if !line.is_empty() {
            series += 1;
            if series > SERIES_MAX {
                return None;
            }
            let (name, labels, value) = parse_sample(line)?;
            insert(&mut families, name, labels, value)?;
        }
    }
    // No node of ours has nothing to say.
    (series > 0).then_some(families)
}

/// Puts a sample where its `TYPE` line, which comes first, says.
fn insert(
    families: &mut BTreeMap<String, Family>,
    name: &str,
    labels: Vec<&str>,
    value: f64,
) -> Option<()> {
    if let Some(family) = families.get_mut(name)
        && family.kind != Kind::Histogram
    {
        family.values.insert(labels.join(","), value);
        return Some(());
    }
    let (name, part) = name.rsplit_once('_')?;
    let family = families.get_mut(name)?;
    if family.kind != Kind::Histogram {
        return None;
    }
    let le = labels.iter().find_map(|l| l.strip_prefix("le=\""));
    let rest: Vec<&str> = labels
        .iter()
        .copied()
        .filter(|l| !l.starts_with("le=\""))
        .collect();
    let buckets = family.histograms.entry(rest.join(",")).or_default();
    match (part, le) {
        ("sum", None) => buckets.sum = value,
        ("count", None) => buckets.count = value,
        ("bucket", Some(le)) => {
            let text = le.strip_suffix('"')?.to_owned();
            let value_of_bound = text.parse().ok().filter(|v: &f64| !v.is_nan())?;
            buckets.cumulative.insert(
                Bound {
                    value: value_of_bound,
                    text,
                },
                value,
            );
        }
        _ => return None,
    }
    Some(())
}

/// `name{a="b",c="d"} value`: name, labels as written, value.
fn parse_sample(line: &str) -> Option<(&str, Vec<&str>, f64)> {
    let name_end = line.find(['{', ' '])?;
    let (name, mut rest) = line.split_at(name_end);
    let mut labels = Vec::new();
    if let Some(body) = rest.strip_prefix('{') {
        rest = body;
        while !rest.starts_with('}') {
            let end = label_end(rest)?;
            labels.push(&rest[..end]);
            rest = &rest[end..];
            rest = rest.strip_prefix(',').unwrap_or(rest);
        }
        rest = &rest[1..];
    }
    let value: f64 = rest.strip_prefix(' ')?.parse().ok()?;
    Some((name, labels, value)).filter(|_| !value.is_nan())
}

/// Where the label `key="value"` that `text` begins with ends.
fn label_end(text: &str) -> Option<usize> {
    let (key, value) = text.split_once("=\"")?;
    let valid = !key.is_empty() && key.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
    let mut escaped = false;
    for (at, byte) in value.bytes().enumerate().filter(|_| valid) {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            b'"' => return Some(key.len() + 2 + at + 1),
            _ => {}
        }
    }
    None
}

/// `name`, if it is one that our nodes use.
fn ours(name: &str) -> Option<String> {
    let rest = name
        .strip_prefix(PREFIX)
        .or_else(|| name.strip_prefix(OF_PROCESS))?;
    let valid = rest
        .bytes()
        .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_');
    valid.then(|| name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::{Gauges, Metrics};
    use proptest::prelude::*;

    /// The value of one series; panics where there is none.
    fn value(text: &str, series: &str) -> f64 {
        let start = format!("{PREFIX}{series} ");
        let line = text.lines().find_map(|l| l.strip_prefix(&start));
        line.unwrap_or_else(|| panic!("no {series} in\n{text}"))
            .parse()
            .unwrap()
    }

    /// A checker of the exposition format, apart from the parser above: each
    /// family once, HELP and TYPE first, no series twice, names and numbers
    /// well-formed, buckets rising to a `+Inf` that equals the count.
    fn assert_valid(text: &str) {
        assert!(text.ends_with('\n'));
        let mut families = BTreeSet::new();
        let mut seen = BTreeSet::new();
        let mut current = String::new();
        let mut last_bucket: Option<(String, f64)> = None;
        let mut help = String::new();
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# HELP ") {
                help = rest.split(' ').next().unwrap().to_owned();
                continue;
            }
            if let Some(rest) = line.strip_prefix("# TYPE ") {
                current = rest.split(' ').next().unwrap().to_owned();
                assert_eq!(current, help, "TYPE follows its HELP");
                assert!(families.insert(current.clone()), "{current} twice");
                continue;
            }
            let (series, number) = line.rsplit_once(' ').unwrap();
            let number: f64 = number.parse().unwrap();
            assert!(seen.insert(series.to_owned()), "{series} twice");
            let name = series.split('{').next().unwrap();
            let suffix = name.strip_prefix(&current).unwrap();
            if let Some((head, le)) = series.split_once("le=\"") {
                assert_eq!(suffix, "_bucket");
                if let Some((last_head, below)) = &last_bucket
                    && last_head == head
                {
                    assert!(number >= *below, "{series} falls");
                }
                last_bucket = (le != "+Inf\"}").then(|| (head.to_owned(), number));
                if le == "+Inf\"}" {
                    let labels = head.split_once('{').unwrap().1.trim_end_matches(',');
                    let count = if labels.is_empty() {
                        format!("{current}_count ")
                    } else {
                        format!("{current}_count{{{labels}}} ")
                    };
                    let count = text.lines().find_map(|l| l.strip_prefix(&count)).unwrap();
                    assert_eq!(number, count.parse::<f64>().unwrap());
                }
            } else {
                assert!(["", "_sum", "_count"].contains(&suffix), "{series}");
            }
        }
    }

    fn rendered(metrics: &Metrics) -> String {
        metrics.render(&Gauges {
            nodes_up: vec![(NodeId(9), true)],
            ..Gauges::default()
        })
    }

    #[test]
    fn counters_add_up_and_rates_follow_from_the_sums() {
        let (a, b) = (Metrics::new(), Metrics::new());
        a.cache_hits_total.inc_by(1);
        a.cache_misses_total.inc_by(9);
        b.cache_hits_total.inc_by(90);
        a.request_duration_seconds.observe(1.0);
        b.request_duration_seconds.observe(0.2);
        b.request_duration_seconds.observe(0.3);
        b.peer_requests_total
            .with_label_values(&["1", "ok"])
            .inc_by(4);
        let page = merge(
            (NodeId(1), &rendered(&a)),
            &[(NodeId(2), Some(&rendered(&b))), (NodeId(3), None)],
        );
        assert_valid(&page);
        assert_eq!(value(&page, "cache_hits_total"), 91.0);
        assert_eq!(value(&page, "cache_hit_rate"), 91.0);
        assert_eq!(value(&page, "request_duration_seconds_count"), 3.0);
        assert_eq!(
            value(&page, "request_duration_seconds_bucket{le=\"0.25\"}"),
            1.0
        );
        assert_eq!(
            value(&page, "request_duration_seconds_bucket{le=\"0.5\"}"),
            2.0
        );
        assert_eq!(value(&page, "request_duration_ms_avg"), 500.0);
        assert_eq!(
            value(&page, "peer_requests_total{peer=\"1\",result=\"ok\"}"),
            4.0
        );
        assert_eq!(value(&page, "l1_bytes{node=\"2\"}"), 0.0);
        let version = env!("CARGO_PKG_VERSION");
        let build = format!("build_info{{node=\"2\",version=\"{version}\"}}");
        assert_eq!(value(&page, &build), 1.0);
        assert_eq!(value(&page, "node_up{node=\"1\"}"), 1.0);
        assert_eq!(value(&page, "node_up{node=\"2\"}"), 1.0);
        assert_eq!(value(&page, "node_up{node=\"3\"}"), 0.0);
        assert!(
            !page.contains("node_up{node=\"9\"}"),
            "only who was asked now"
        );
    }

    #[test]
    fn one_nodes_page_is_valid_too() {
        assert_valid(&rendered(&Metrics::new()));
    }

    #[test]
    fn other_buckets_count_what_is_known() {
        let family = |bounds: &str| {
            format!(
                "# HELP {PREFIX}x_seconds h\n# TYPE {PREFIX}x_seconds histogram\n{bounds}\
                 {PREFIX}x_seconds_sum 3\n{PREFIX}x_seconds_count 4\n"
            )
        };
        let bucket = |le, n| format!("{PREFIX}x_seconds_bucket{{le=\"{le}\"}} {n}\n");
        let a = family(&[bucket("1", 1), bucket("5", 3), bucket("+Inf", 4)].concat());
        let b = family(&[bucket("2", 2), bucket("+Inf", 4)].concat());
        let page = merge((NodeId(1), &a), &[(NodeId(2), Some(&b))]);
        assert_valid(&page);
        for (le, n) in [("1", 1.0), ("2", 3.0), ("5", 5.0), ("+Inf", 8.0)] {
            assert_eq!(value(&page, &format!("x_seconds_bucket{{le=\"{le}\"}}")), n);
        }
    }

    #[test]
    fn what_is_not_ours_counts_as_no_answer() {
        let own = rendered(&Metrics::new());
        let long = format!("{own}{}", "\n".repeat(TEXT_BYTES_MAX));
        let alien = "# HELP up h\n# TYPE up gauge\nup 1\n";
        let torn = &own[..own.len() - 40];
        for other in ["", "<html>", alien, &long, "a{b=\"", "a{b=\"c\"}", torn] {
            let page = merge((NodeId(1), &own), &[(NodeId(2), Some(other))]);
            assert_valid(&page);
            assert_eq!(value(&page, "node_up{node=\"2\"}"), 0.0, "{other}");
        }
    }

    #[test]
    fn escaped_label_values_survive() {
        let m = Metrics::new();
        let odd = "a\\b\"c}, d\n=\"";
        m.stitch_faults_total.with_label_values(&[odd]).inc();
        let own = rendered(&m);
        let page = merge((NodeId(1), &own), &[(NodeId(2), Some(&own))]);
        let series = |text: &str| {
            text.lines()
                .find(|l| l.starts_with("pingora_slice_stitch_faults_total{"))
                .unwrap()
                .rsplit_once(' ')
                .map(|(s, n)| (s.to_owned(), n.to_owned()))
                .unwrap()
        };
        assert_eq!(series(&page).0, series(&own).0);
        assert_eq!(series(&page).1, "2");
    }

    proptest! {
        #[test]
        fn merging_adds(counts in prop::collection::vec((0u64..1 << 40, 0u64..1000), 1..6),
                        times in prop::collection::vec(prop::collection::vec(0.0f64..400.0, 0..20), 1..6)) {
            let nodes: Vec<Metrics> = counts.iter().map(|_| Metrics::new()).collect();
            for (node, (bytes, slices)) in nodes.iter().zip(&counts) {
                node.bytes_to_client_total.inc_by(*bytes);
                node.slices_total.with_label_values(&["l2"]).inc_by(*slices);
            }
            let all = Metrics::new();
            for (node, times) in nodes.iter().zip(&times) {
                for time in times {
                    node.time_to_first_byte_seconds.observe(*time);
                    all.time_to_first_byte_seconds.observe(*time);
                }
            }
            let texts: Vec<String> = nodes.iter().map(rendered).collect();
            let others: Vec<_> = texts.iter().enumerate().skip(1)
                .map(|(i, t)| (NodeId(i as u64 + 1), Some(t.as_str()))).collect();
            let page = merge((NodeId(1), &texts[0]), &others);
            assert_valid(&page);
            let bytes: u64 = counts.iter().map(|c| c.0).sum();
            let slices: u64 = counts.iter().map(|c| c.1).sum();
            prop_assert_eq!(value(&page, "bytes_to_client_total"), bytes as f64);
            prop_assert_eq!(value(&page, "slices_total{source=\"l2\"}"), slices as f64);
            // One node that saw everything has the same buckets.
            let single = rendered(&all);
            for line in single.lines().filter(|l| l.contains("first_byte_seconds_bucket")
                || l.contains("first_byte_seconds_count")) {
                prop_assert!(page.contains(line), "{}", line);
            }
        }

        #[test]
        fn garbage_does_no_harm(text in ".{0,200}", cut in 0usize..4000) {
            let own = rendered(&Metrics::new());
            let at = (0..=cut.min(own.len())).rev().find(|i| own.is_char_boundary(*i)).unwrap();
            let broken = format!("{}{text}", &own[..at]);
            assert_valid(&merge((NodeId(1), &own), &[(NodeId(2), Some(&broken))]));
        }
    }
}
