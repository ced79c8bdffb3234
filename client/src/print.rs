//! Answers as tables for people. Every function returns whole lines.

use std::fmt::Write;
use std::time::SystemTime;

use pingora_slice_client::api;

/// Recent purges that the status lists; the API has more.
const PURGES_SHOWN: usize = 10;

/// The cluster in a few lines, and its nodes.
pub fn status(cluster: &api::Cluster) -> String {
    let leader = match cluster.leader {
        Some(leader) => format!("node {leader}"),
        None => "none known".to_string(),
    };
    let me = format!("node {}", cluster.node_id);
    let lease = match cluster.lease_valid {
        true => "valid",
        false => "none: this node asks the origin for everything",
    };
    let up = cluster.nodes.iter().filter(|node| node.up).count();
    let mut text = pairs(&[
        ("asked", format!("{me}, version {}", cluster.version)),
        ("leader", format!("{leader}, term {}", cluster.term)),
        ("lease", lease.to_string()),
        ("ring epoch", cluster.ring_epoch.to_string()),
        ("purge index", cluster.purge_index.to_string()),
        match cluster.nodes.len() {
            0 => ("nodes", "none: the cluster has not formed".to_string()),
            count => ("nodes", format!("{up} of {count} up")),
        },
    ]);
    if !cluster.unanswered.is_empty() {
        let row = |seed: &api::Seed| vec![seed.address.clone(), seed.why.clone()];
        text.push('\n');
        text.push_str(&table(
            &["SEED", "WHY NOT"],
            cluster.unanswered.iter().map(row),
        ));
    }
    if !cluster.nodes.is_empty() {
        text.push('\n');
        text.push_str(&nodes(&cluster.nodes));
    }
    if !cluster.recent_purges.is_empty() {
        let shown = cluster.recent_purges.len().min(PURGES_SHOWN);
        text.push_str("\nPurges asked for at this node:\n");
        text.push_str(&recent_purges(&cluster.recent_purges[..shown]));
    }
    text
}

/// One line per node.
pub fn nodes(nodes: &[api::Node]) -> String {
    let row = |node: &api::Node| {
        vec![
            node.id.to_string(),
            node.advertise.clone(),
            format!("{}{}", node.role, if node.leader { ", leader" } else { "" }),
            node.state.clone(),
            if node.up { "up" } else { "DOWN" }.to_string(),
            node.weight.to_string(),
            format!("{:.1} %", 100.0 * node.ring_share),
            node.applied
                .map_or("-".to_string(), |applied| applied.to_string()),
        ]
    };
    let titles = [
        "NODE", "ADDRESS", "ROLE", "STATE", "REACHED", "WEIGHT", "SHARE", "APPLIED",
    ];
    table(&titles, nodes.iter().map(row))
}

/// What a purge has come to.
pub fn purged(purged: &api::Purged) -> String {
    let outcome = match purged.success {
        true if !purged.pending.is_empty() => "committed, does NOT hold everywhere yet",
        true => "holds everywhere",
        false => "NOT CONFIRMED: nothing is promised",
    };
    let mut lines = vec![
        ("purge", outcome.to_string()),
        ("of", purged.url.clone().unwrap_or_else(|| "-".to_string())),
        ("message", purged.message.clone()),
        ("index", purged.index.to_string()),
        ("acknowledged by", node_list(&purged.acked)),
        ("fenced", node_list(&purged.fenced)),
        ("took", format!("{} ms", purged.took_ms)),
    ];
    if !purged.pending.is_empty() {
        lines.push(("may serve old", node_list(&purged.pending)));
    }
    pairs(&lines)
}

/// How far a purge has come, in a line.
pub fn progress(progress: &api::Progress) -> String {
    let api::Progress {
        index,
        acked,
        fenced,
        waiting,
    } = progress;
    let [acked, fenced, waiting] = [acked, fenced, waiting].map(|nodes| node_list(nodes));
    format!("purge {index}: applied by {acked}; fenced {fenced}; waiting for {waiting}\n")
}

fn recent_purges(purges: &[api::RecentPurge]) -> String {
    let now_s = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |since| since.as_secs());
    let row = |purge: &api::RecentPurge| {
        let outcome = match &purge.refused {
            Some(reason) => format!("REFUSED: {reason}"),
            None if !purge.pending.is_empty() => {
                let pending = node_list(&purge.pending);
                format!("by a majority; when it was answered NOT yet at {pending}")
            }
            None if purge.fenced.is_empty() => "held everywhere".to_string(),
            None => format!("held everywhere, fenced {}", node_list(&purge.fenced)),
        };
        let mode = format!("{:?}", purge.mode).to_lowercase();
        let took = format!("{} ms", purge.took_ms);
        vec![
            purge.index.to_string(),
            format!("{} s ago", now_s.saturating_sub(purge.at_s)),
            mode,
            took,
            purge.what.clone(),
            outcome,
        ]
    };
    let titles = ["INDEX", "ANSWERED", "MODE", "TOOK", "PURGE OF", "RESULT"];
    table(&titles, purges.iter().map(row))
}

/// What a change of the members has come to.
pub fn done(done: &api::Done) -> String {
    match done.message.as_str() {
        "" => "done\n".to_string(),
        message => format!("{}\n", printable(message)),
    }
}

/// Where a URL's bytes are.
pub fn explain(explain: &api::Explain) -> String {
    let mut lines = vec![
        ("url", explain.url.clone()),
        ("key", explain.key.clone()),
        ("asked", format!("node {}", explain.node_id)),
        ("now", format!("{}: {}", explain.verdict, explain.reason)),
        (
            "fetched",
            if explain.sliced { "in slices" } else { "whole" }.to_string(),
        ),
        ("owners", node_list(&explain.owners)),
        ("purges", floor(&explain.floor)),
    ];
    match &explain.manifest {
        None => lines.push(("manifest", "none here".to_string())),
        Some(manifest) => lines.extend(manifest_lines(manifest)),
    }
    let mut text = pairs(&lines);
    if !explain.slices.is_empty() {
        let row = |slice: &api::Slice| {
            let stored_in = slice.stored_in.clone().unwrap_or("-".to_string());
            vec![slice.index.to_string(), node_list(&slice.owners), stored_in]
        };
        text.push('\n');
        text.push_str(&table(
            &["SLICE", "OWNERS", "HERE"],
            explain.slices.iter().map(row),
        ));
        let all = explain
            .manifest
            .as_ref()
            .and_then(|manifest| manifest.slices)
            .unwrap_or(0);
        let more = all.saturating_sub(explain.slices.len() as u64);
        if more > 0 {
            text.push_str(&format!("and {more} more\n"));
        }
    }
    text
}

/// One line per URL.
pub fn warmed(warmed: &api::Warmed) -> String {
    let row = |url: &api::WarmedUrl| {
        let outcome = if url.success { "ok" } else { "FAILED" }.to_string();
        vec![
            outcome,
            url.bytes.to_string(),
            url.url.clone(),
            url.message.clone(),
        ]
    };
    table(
        &["RESULT", "BYTES", "URL", "MESSAGE"],
        warmed.urls.iter().map(row),
    )
}

fn manifest_lines(manifest: &api::Manifest) -> Vec<(&'static str, String)> {
    let or_dash = |text: &Option<String>| text.clone().unwrap_or("-".to_string());
    let joined = |list: &[String]| {
        if list.is_empty() {
            "-".into()
        } else {
            list.join(", ")
        }
    };
    let length = match (manifest.length, manifest.slices) {
        (Some(length), Some(slices)) => {
            format!(
                "{length} bytes in {slices} slices of {}",
                manifest.slice_bytes
            )
        }
        _ => format!("not known yet, slices of {}", manifest.slice_bytes),
    };
    let fresh = match manifest.fresh_for_s {
        seconds if seconds >= 0 => format!("fresh for {seconds} s"),
        seconds => format!("stale for {} s", seconds.unsigned_abs()),
    };
    vec![
        (
            "manifest",
            format!("in {}, status {}", manifest.stored_in, manifest.status),
        ),
        ("generation", manifest.generation.clone()),
        ("length", length),
        ("age", format!("{} s, {fresh}", manifest.age_s)),
        ("stamp", manifest.stamp.to_string()),
        ("etag", or_dash(&manifest.etag)),
        ("last modified", or_dash(&manifest.last_modified)),
        ("vary", joined(&manifest.vary)),
        ("tags", joined(&manifest.tags)),
    ]
}

fn floor(floor: &api::Floor) -> String {
    match (floor.plain, floor.soft, floor.hard) {
        (0, 0, 0) => "none".to_string(),
        (plain, soft, hard) => format!("plain {plain}, soft {soft}, hard {hard}"),
    }
}

fn node_list(nodes: &[u64]) -> String {
    match nodes {
        [] => "-".to_string(),
        nodes => nodes
            .iter()
            .map(u64::to_string)
            .collect::<Vec<_>>()
            .join(", "),
    }
}

/// `name  value` lines, names padded to the longest.
fn pairs(lines: &[(&str, String)]) -> String {
    let width = lines.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    lines.iter().fold(String::new(), |mut text, (name, value)| {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{name:width$}  {}", printable(value));
        text
    })
}

/// Columns padded to their widest cell.
fn table(titles: &[&str], rows: impl Iterator<Item = Vec<String>>) -> String {
    let titles = titles.iter().map(|title| title.to_string()).collect();
    let rows: Vec<Vec<String>> = std::iter::once(titles)
        .chain(rows)
        .map(|row: Vec<String>| row.iter().map(|cell| printable(cell)).collect())
        .collect();
    let width_of = |column: usize| {
        rows.iter()
            .map(|row| row[column].chars().count())
            .max()
            .unwrap_or(0)
    };
    let widths: Vec<usize> = (0..rows[0].len()).map(width_of).collect();
    rows.iter().fold(String::new(), |mut text, row| {
        let cells: Vec<String> = row
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:width$}"))
            .collect();
        text.push_str(cells.join("  ").trim_end());
        text.push('\n');
        text
    })
}

/// Text from the network must not steer the terminal.
pub fn printable(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_are_aligned() {
        let node = |id, advertise: &str, leader| api::Node {
            id,
            advertise: advertise.to_string(),
            role: "voter".to_string(),
            weight: 1,
            state: "active".to_string(),
            up: leader,
            leader,
            applied: leader.then_some(17),
            ring_share: 0.5,
        };
        let text = nodes(&[node(1, "node1:7001", true), node(20, "b:7001", false)]);
        let expected = "\
NODE  ADDRESS     ROLE           STATE   REACHED  WEIGHT  SHARE   APPLIED
1     node1:7001  voter, leader  active  up       1       50.0 %  17
20    b:7001      voter          active  DOWN     1       50.0 %  -
";
        assert_eq!(text, expected);
    }

    #[test]
    fn a_purge_says_whether_it_holds() {
        let mut answer = api::Purged {
            success: true,
            acked: vec![1, 2],
            ..Default::default()
        };
        let text = purged(&answer);
        assert!(
            text.starts_with("purge            holds everywhere\n"),
            "{text}"
        );
        assert!(text.contains("acknowledged by  1, 2\n"), "{text}");
        answer.success = false;
        assert!(purged(&answer).contains("NOT CONFIRMED"));
    }

    #[test]
    fn explanations_show_what_is_there() {
        let mut answer = api::Explain {
            url: "a/b".to_string(),
            ..Default::default()
        };
        assert!(explain(&answer).contains("manifest  none here\n"));
        answer.manifest = Some(api::Manifest {
            length: Some(10),
            slices: Some(3),
            slice_bytes: 4,
            fresh_for_s: -5,
            ..Default::default()
        });
        answer.slices = vec![api::Slice {
            index: 0,
            owners: vec![2, 1],
            stored_in: None,
        }];
        let text = explain(&answer);
        for line in [
            "10 bytes in 3 slices of 4",
            "stale for 5 s",
            "0      2, 1    -",
            "and 2 more",
        ] {
            assert!(text.contains(line), "{line}: {text}");
        }
    }

    #[test]
    fn control_characters_are_not_passed_on() {
        let answer = api::Done {
            success: true,
            message: String::new(),
        };
        assert_eq!(done(&answer), "done\n");
        let answer = api::Explain {
            url: "a\u{1b}[2Jb".to_string(),
            ..Default::default()
        };
        assert!(!explain(&answer).contains('\u{1b}'));
    }
}
