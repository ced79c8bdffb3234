//! The status page: one self-contained HTML document, nothing loaded from
//! anywhere, no script. It shows what `GET /metrics` and `GET /v1/cluster` say,
//! for a person who has just been woken up: may this node serve, who is there,
//! is the cache doing its work, what was purged.
//!
//! Everything that comes from outside is escaped ([`Escaped`]).

use std::fmt::{self, Display, Write};
use std::time::{Duration, SystemTime};

use pingora_slice_cluster::handle::{ClusterStatus, NodeStatus};
use pingora_slice_cluster::purge::{PurgeMode, Scope};
use pingora_slice_cluster::state::RecentPurge;

use crate::admin::{role, state};
use crate::metrics::{Gauges, Metrics};
use crate::purge::Recent;

/// Seconds after which a browser asks again.
const REFRESH_SECONDS: u32 = 10;
/// Size of the history's drawing, in its own units.
const CHART: (f64, f64) = (720.0, 120.0);

/// Counters at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sample {
    /// `cache_hits_total`.
    pub hits: u64,
    /// Hits and misses.
    pub lookups: u64,
}

/// All that the page is made of.
pub struct Shown<'a> {
    /// The cluster.
    pub status: &'a ClusterStatus,
    /// Why this node may not answer from its cache.
    pub unready: Option<&'a str>,
    /// What is read at a scrape.
    pub gauges: &'a Gauges,
    /// The counters.
    pub metrics: &'a Metrics,
    /// Samples, oldest first.
    pub history: &'a [Sample],
    /// Time between two samples.
    pub every: Duration,
    /// Purges of the whole cluster, newest first.
    pub purges: &'a [RecentPurge],
    /// Purges asked for at this node, newest first.
    pub asked_here: &'a [Recent],
}

/// The document.
pub fn render(shown: &Shown<'_>) -> String {
    let mut html = String::with_capacity(32 * 1024);
    // Writing to a String cannot fail.
    let _ = write!(html, "{}", Page(shown));
    html
}

struct Page<'a>(&'a Shown<'a>);

impl Display for Page<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = self.0;
        let me = shown.status.node_id;
        write!(
            f,
            "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\">\
             <meta name=\"viewport\" content=\"width=device-width\">\
             <meta http-equiv=\"refresh\" content=\"{REFRESH_SECONDS}\">\
             <title>pingora-slice node {me}</title><style>{STYLE}</style></head><body>\
             <h1>pingora-slice <small>node {me}, release {}</small></h1>",
            env!("CARGO_PKG_VERSION")
        )?;
        match shown.unready {
            None => f.write_str("<p class=\"state up\">Serving from its cache.</p>")?,
            Some(reason) => write!(f, "<p class=\"state down\">{}</p>", Escaped(reason))?,
        }
        tiles(f, shown)?;
        f.write_str("<h2>Hit ratio</h2>")?;
        chart(f, shown.history, shown.every)?;
        f.write_str("<h2>Where slices came from</h2>")?;
        sources(f, shown.metrics)?;
        f.write_str("<h2>Ring and nodes</h2>")?;
        ring(f, &shown.status.nodes)?;
        nodes(f, shown.status)?;
        f.write_str("<h2>Recent purges</h2>")?;
        purges(f, shown)?;
        f.write_str(
            "<footer><a href=\"/metrics\">metrics</a> <a href=\"/metrics/cluster\">of all nodes</a> \
             <a href=\"/health\">health</a> <a href=\"/ready\">ready</a></footer></body></html>",
        )
    }
}

fn tiles(f: &mut fmt::Formatter<'_>, shown: &Shown<'_>) -> fmt::Result {
    let metrics = shown.metrics;
    let ratio = match metrics.lookups_total() {
        0 => "–".to_owned(),
        all => format!(
            "{:.1} %",
            100.0 * metrics.cache_hits_total.get() as f64 / all as f64
        ),
    };
    let l2 = match &shown.gauges.l2 {
        None => "off".to_owned(),
        Some(l2) if l2.writable => Bytes(l2.bytes).to_string(),
        Some(l2) => format!("{}, not writable", Bytes(l2.bytes)),
    };
    let tiles = [
        ("requests", metrics.requests_total.get().to_string()),
        ("hit ratio since start", ratio),
        (
            "to clients",
            Bytes(metrics.bytes_to_client_total.get()).to_string(),
        ),
        (
            "from the origin",
            Bytes(metrics.bytes_from_origin_total.get()).to_string(),
        ),
        (
            "from peers",
            Bytes(metrics.bytes_from_peers_total.get()).to_string(),
        ),
        ("in memory", Bytes(shown.gauges.l1_bytes).to_string()),
        ("on disk", l2),
        ("purge index", shown.status.purge_index.to_string()),
        ("ring epoch", shown.status.ring_epoch.to_string()),
    ];
    f.write_str("<dl class=\"tiles\">")?;
    for (name, value) in tiles {
        write!(f, "<div><dt>{name}</dt><dd>{}</dd></div>", Escaped(&value))?;
    }
    f.write_str("</dl>")
}

/// Hits of lookups between each two samples; a gap where nobody asked.
fn ratios(history: &[Sample]) -> Vec<Option<f64>> {
    let ratio = |pair: &[Sample]| {
        let [before, after] = pair else { return None };
        let lookups = after.lookups.checked_sub(before.lookups)?;
        let hits = after.hits.checked_sub(before.hits)?;
        // The two counters are not read at one instant: a hit may run ahead.
        (lookups > 0).then(|| (hits as f64 / lookups as f64).min(1.0))
    };
    history.windows(2).map(ratio).collect()
}

fn chart(f: &mut fmt::Formatter<'_>, history: &[Sample], every: Duration) -> fmt::Result {
    let ratios = ratios(history);
    if ratios.iter().all(Option::is_none) {
        return f.write_str("<p>No lookups yet.</p>");
    }
    let (width, height) = CHART;
    let step = width / (ratios.len().saturating_sub(1).max(1)) as f64;
    write!(
        f,
        "<svg class=\"chart\" viewBox=\"0 -4 {width} {}\" preserveAspectRatio=\"none\" role=\"img\" \
         aria-label=\"hit ratio over time\">",
        height + 8.0
    )?;
    for part in [0.0, 0.5, 1.0] {
        let y = height * part;
        write!(f, "<path class=\"rule\" d=\"M0 {y}H{width}\"/>")?;
    }
    f.write_str("<path class=\"line\" d=\"")?;
    let mut pen_down = false;
    for (at, ratio) in ratios.iter().enumerate() {
        if let Some(ratio) = ratio {
            let (x, y) = (at as f64 * step, height * (1.0 - ratio));
            // A single point between gaps is a dot: a line of no length with round ends.
            let command = if pen_down { "L" } else { "M" };
            write!(f, "{command}{x:.1} {y:.1}h0")?;
        }
        pen_down = ratio.is_some();
    }
    let minutes = (every * ratios.len() as u32).as_secs().div_ceil(60);
    write!(
        f,
        "\"/></svg><p class=\"note\">100 % at the top, the last {minutes} min, {} s a step</p>",
        every.as_secs()
    )
}

fn sources(f: &mut fmt::Formatter<'_>, metrics: &Metrics) -> fmt::Result {
    let counts = ["l1", "l2", "flight", "peer", "origin"].map(|source| {
        (
            source,
            metrics.slices_total.with_label_values(&[source]).get(),
        )
    });
    let all: u64 = counts.iter().map(|(_, n)| n).sum();
    let shares = counts.map(|(source, n)| (source.to_owned(), n as f64 / all.max(1) as f64));
    bar(f, &shares)?;
    f.write_str("<table><tr>")?;
    for (source, _) in counts {
        write!(f, "<th>{source}</th>")?;
    }
    f.write_str("</tr><tr>")?;
    for (_, n) in counts {
        write!(f, "<td>{n}</td>")?;
    }
    f.write_str("</tr></table>")
}

fn ring(f: &mut fmt::Formatter<'_>, nodes: &[NodeStatus]) -> fmt::Result {
    let shares: Vec<(String, f64)> = nodes
        .iter()
        .filter(|node| node.ring_share > 0.0)
        .map(|node| (format!("node {}", node.member.id), node.ring_share))
        .collect();
    bar(f, &shares)
}

/// Shares of a whole, side by side.
fn bar(f: &mut fmt::Formatter<'_>, shares: &[(String, f64)]) -> fmt::Result {
    f.write_str("<div class=\"bar\">")?;
    for (at, (name, share)) in shares.iter().enumerate().filter(|(_, (_, s))| *s > 0.0) {
        let percent = 100.0 * share;
        // Steps of the golden angle: neighbours differ, however many there are.
        let hue = (at as f64 * 137.5 + 210.0) % 360.0;
        write!(
            f,
            "<span style=\"flex-grow:{percent:.2};--hue:{hue:.0}\" title=\"{0} {percent:.1} %\">{0}</span>",
            Escaped(name)
        )?;
    }
    f.write_str("</div>")
}

fn nodes(f: &mut fmt::Formatter<'_>, status: &ClusterStatus) -> fmt::Result {
    f.write_str(
        "<table><tr><th>node</th><th>address</th><th>role</th><th>state</th><th>weight</th>\
         <th>share</th><th>applied</th><th>reached</th></tr>",
    )?;
    for node in &status.nodes {
        let member = &node.member;
        let mark = match (node.leader, member.id == status.node_id) {
            (true, true) => " (leader, this one)",
            (true, false) => " (leader)",
            (false, true) => " (this one)",
            (false, false) => "",
        };
        let applied = node
            .applied
            .map_or("–".to_owned(), |index| index.to_string());
        let (class, reached) = if node.up {
            ("up", "yes")
        } else {
            ("down", "no")
        };
        write!(
            f,
            "<tr><td>{}{mark}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{:.1} %</td>\
             <td>{applied}</td><td class=\"{class}\">{reached}</td></tr>",
            member.id,
            Escaped(&member.advertise),
            role(member.role),
            state(member.state),
            member.weight,
            100.0 * node.ring_share,
        )?;
    }
    f.write_str("</table>")
}

fn purges(f: &mut fmt::Formatter<'_>, shown: &Shown<'_>) -> fmt::Result {
    let refused = shown.asked_here.iter().filter_map(|purge| {
        let reason = purge.outcome.as_ref().err()?;
        Some((purge, reason))
    });
    let mut empty = true;
    for (purge, reason) in refused {
        empty = false;
        write!(
            f,
            "<p class=\"state down\">{}: purge of {} refused: {}</p>",
            Ago(purge.at),
            Escaped(&purge.what),
            Escaped(reason)
        )?;
    }
    if shown.purges.is_empty() {
        return f.write_str(if empty { "<p>None.</p>" } else { "" });
    }
    f.write_str(
        "<table><tr><th>index</th><th>what</th><th>mode</th><th>answered</th><th>took</th>\
         <th>acknowledged</th><th>fenced</th></tr>",
    )?;
    for purge in shown.purges {
        let asked_here = shown.asked_here.iter().find_map(|asked| {
            let receipt = asked.outcome.as_ref().ok()?;
            (receipt.index == purge.index).then_some((asked, receipt))
        });
        let mode = mode(purge.first.mode);
        write!(f, "<tr><td>{}</td>", purge.index)?;
        match asked_here {
            Some((asked, receipt)) => write!(
                f,
                "<td>{}</td><td>{mode}</td><td>{}</td><td>{} ms</td><td>{}</td><td>{}</td></tr>",
                Escaped(&asked.what),
                Ago(asked.at),
                asked.took_ms,
                receipt.acked.len(),
                receipt.fenced.len(),
            )?,
            // The log has hashes, not names.
            None => write!(
                f,
                "<td>{}</td><td>{mode}</td><td colspan=\"4\">asked for elsewhere</td></tr>",
                kind(purge)
            )?,
        }
    }
    f.write_str("</table>")
}

fn mode(mode: PurgeMode) -> &'static str {
    match mode {
        PurgeMode::Plain => "plain",
        PurgeMode::Soft => "soft",
        PurgeMode::Hard => "hard",
    }
}

fn kind(purge: &RecentPurge) -> String {
    let first = match purge.first.scope {
        Scope::All => "everything",
        Scope::Host(_) => "a host",
        Scope::Url(_) => "a URL",
        Scope::Prefix(_) => "a prefix",
        Scope::Tag(_) => "a tag",
    };
    match purge.items {
        0 | 1 => first.to_owned(),
        items => format!("{first} and {} more", items - 1),
    }
}

/// Text, safe inside elements and quoted attributes.
struct Escaped<'a>(&'a str);

impl Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for c in self.0.chars() {
            match c {
                '<' => f.write_str("&lt;")?,
                '>' => f.write_str("&gt;")?,
                '&' => f.write_str("&amp;")?,
                '"' => f.write_str("&quot;")?,
                '\'' => f.write_str("&#39;")?,
                c => f.write_char(c)?,
            }
        }
        Ok(())
    }
}

/// A number of bytes for people: powers of 1024, three digits or so.
struct Bytes(u64);

impl Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut value = self.0 as f64;
        for unit in ["B", "KiB", "MiB", "GiB", "TiB"] {
            if value < 1000.0 {
                let digits = if value < 10.0 && unit != "B" { 1 } else { 0 };
                return write!(f, "{value:.digits$} {unit}");
            }
            value /= 1024.0;
        }
        write!(f, "{value:.1} PiB")
    }
}

/// How long ago, for people; the reader's clock may be in another zone.
struct Ago(SystemTime);

impl Display for Ago {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.elapsed().unwrap_or_default().as_secs() {
            s @ 0..120 => write!(f, "{s} s ago"),
            s @ 120..7200 => write!(f, "{} min ago", s / 60),
            s @ 7200..172_800 => write!(f, "{} h ago", s / 3600),
            s => write!(f, "{} days ago", s / 86_400),
        }
    }
}

const STYLE: &str = "\
:root{color-scheme:light dark;--line:light-dark(#d4d8dd,#3a4048);--soft:light-dark(#5c6570,#9aa4af);\
--good:light-dark(#17693a,#6fd193);--bad:light-dark(#a3231d,#ff8d83);--ink:light-dark(#1d60b4,#79b4ff)}\
body{font:15px/1.45 system-ui,sans-serif;max-width:62rem;margin:1.5rem auto;padding:0 1rem}\
h1{font-size:1.5rem;margin:0}h2{font-size:1.05rem;margin:1.8rem 0 .5rem}small{font-weight:400;color:var(--soft)}\
.state{font-weight:600}.up{color:var(--good)}.down{color:var(--bad)}.note{color:var(--soft);margin:.2rem 0}\
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(9.5rem,1fr));gap:.6rem;margin:1rem 0}\
.tiles div{border:1px solid var(--line);border-radius:.4rem;padding:.5rem .7rem}\
dt{color:var(--soft);font-size:.85rem}dd{margin:0;font-size:1.15rem;font-variant-numeric:tabular-nums}\
.chart{width:100%;height:8rem;display:block}.rule{stroke:var(--line);vector-effect:non-scaling-stroke}\
.line{fill:none;stroke:var(--ink);stroke-width:2;stroke-linecap:round;vector-effect:non-scaling-stroke}\
.bar{display:flex;border-radius:.4rem;overflow:hidden;min-height:1.6rem;background:var(--line)}\
.bar span{flex-basis:0;min-width:2px;padding:.15rem 0;overflow:hidden;white-space:nowrap;text-align:center;font-size:.85rem;\
background:light-dark(hsl(var(--hue) 60% 82%),hsl(var(--hue) 40% 32%))}\
table{border-collapse:collapse;width:100%;margin-top:.5rem;font-variant-numeric:tabular-nums}\
th,td{text-align:left;padding:.25rem .6rem .25rem 0;border-bottom:1px solid var(--line);overflow-wrap:anywhere}\
th{color:var(--soft);font-weight:500}footer{margin:2rem 0;display:flex;gap:1rem}a{color:var(--ink)}";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_have_gaps_where_nobody_asked() {
        let sample = |hits, lookups| Sample { hits, lookups };
        let history = [sample(0, 0), sample(1, 4), sample(1, 4), sample(9, 12)];
        assert_eq!(ratios(&history), [Some(0.25), None, Some(1.0)]);
        assert!(ratios(&history[..1]).is_empty());
    }

    #[test]
    fn text_from_outside_stays_text() {
        let text = Escaped("<img src=x onerror='\"&").to_string();
        assert_eq!(text, "&lt;img src=x onerror=&#39;&quot;&amp;");
    }

    #[test]
    fn bytes_are_short() {
        let shown = [0, 999, 1000, 1 << 20, 10 << 20, u64::MAX].map(|n| Bytes(n).to_string());
        assert_eq!(
            shown,
            [
                "0 B",
                "999 B",
                "1.0 KiB",
                "1.0 MiB",
                "10 MiB",
                "16384.0 PiB"
            ]
        );
    }
}
