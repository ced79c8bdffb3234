//! The rows about purges: what the promise costs, and what it costs hits.
//!
//! A bare Raft commit is measured in the same cluster, over the same HTTP, by
//! taking a node out of the ring that is out already: the same log, applied on
//! a majority, and nobody waits for the rest.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use pingora_slice_tests::Ask;
use pingora_slice_tests::cluster::{ADMIN_TOKEN, Options, PURGE_TOKEN, TestCluster};
use pingora_slice_tests::http::Kept;
use tokio::task::JoinSet;

use crate::load::{Pattern, read, wrk};
use crate::machine::{SERVER_CORE, pin};
use crate::report::{Aim, Comparison, Report};
use crate::rows::{Bench, Side};

/// Purges and commits of one turn.
const COMMITS: usize = 200;
/// URLs in one batch: the most that one entry of the log takes.
const BATCH: u64 = 1000;

/// PURGE to 200, against a bare commit; and with a node that stands still.
pub async fn commits(bench: &Bench<'_>, report: &mut Report) -> Result<()> {
    for nodes in [3, 5] {
        let ours = Options::cluster(nodes).set("threads", 1).start().await;
        let (node, last) = (ours.node(1), ours.node(nodes as u64).id());
        let mut clients = Kept::connect(node.address()).await?;
        let mut admin = Kept::connect(node.admin_address()).await?;
        let drain = Ask::new("POST", &format!("/v1/nodes/{last}/drain"))
            .header("Host", "a")
            .header("Authorization", format!("Bearer {ADMIN_TOKEN}"));
        let purge = Ask::new("PURGE", "/film")
            .header("Host", "a")
            .header("X-Purge-Token", PURGE_TOKEN);
        let (mut p50, mut p99) = (Vec::new(), Vec::new());
        for _ in 0..bench.settings.pairs {
            let purges = times(&mut clients, &purge).await?;
            let commits = times(&mut admin, &drain).await?;
            p50.push((purges.0, commits.0));
            p99.push((purges.1, commits.1));
        }
        for (unit, aim, pairs) in [("p50 ms", 1.5, p50), ("p99 ms", 3.0, p99)] {
            report.add(Comparison {
                row: "purge",
                work: format!("PURGE to 200, {nodes} nodes"),
                against: "a bare Raft commit".into(),
                unit,
                aim: Aim::AtMost(aim),
                pairs,
            });
        }
        stopped(bench, report, nodes).await?;
    }
    Ok(())
}

/// Median and 99th percentile of a request's time, milliseconds.
async fn times(connection: &mut Kept, ask: &Ask) -> Result<(f64, f64)> {
    let mut times = Vec::with_capacity(COMMITS);
    for _ in 0..COMMITS {
        let begin = Instant::now();
        let reply = connection.send(ask).await?;
        times.push(begin.elapsed().as_secs_f64() * 1e3);
        ensure!(reply.status == 200, "{}: {}", reply.status, reply.text());
    }
    times.sort_by(f64::total_cmp);
    Ok((times[COMMITS / 2], times[COMMITS * 99 / 100]))
}

/// The first purge after a node has stopped, against lease + 0.2 s, and the next.
async fn stopped(bench: &Bench<'_>, report: &mut Report, nodes: usize) -> Result<()> {
    const LEASE: f64 = 2.0;
    let ours = Options::cluster(nodes).start().await;
    let (mut first, mut next) = (Vec::new(), Vec::new());
    for turn in 0..bench.settings.pairs.min(3) {
        ours.node(1).purge("/film").await;
        let other = ours.node(2 + (turn % (nodes - 1)) as u64);
        other.pause();
        for times in [&mut first, &mut next] {
            let begin = Instant::now();
            ours.node(1).purge("/film").await;
            times.push((begin.elapsed().as_secs_f64(), LEASE + 0.2));
        }
        other.unpause();
        let metrics = other.metrics_address();
        other
            .until("it has its lease again", async || {
                let ready = Ask::get("/ready").send(metrics).await;
                ready.is_ok_and(|reply| reply.status == 200)
            })
            .await;
    }
    for (which, aim, pairs) in [
        ("first PURGE", Aim::AtMost(1.0), first),
        ("the next PURGE", Aim::None, next),
    ] {
        report.add(Comparison {
            row: "purge",
            work: format!("{which} with one of {nodes} nodes stopped"),
            against: "lease + 0.2 s".into(),
            unit: "s",
            aim,
            pairs,
        });
    }
    Ok(())
}

/// Keys per second in batches, four at a time.
pub async fn batches(bench: &Bench<'_>, report: &mut Report) -> Result<()> {
    const AIM: f64 = 20_000.0;
    let ours = Options::cluster(3).start().await;
    let mut pairs = Vec::new();
    for turn in 0..bench.settings.pairs as u64 {
        let keys = 40 * BATCH;
        let begin = Instant::now();
        purge_urls(ours.node(1).admin_address(), turn * keys, keys, 4).await?;
        pairs.push((keys as f64 / begin.elapsed().as_secs_f64(), AIM));
    }
    report.add(Comparison {
        row: "purge-batch",
        work: "purges in batches of 1,000, 3 nodes".into(),
        against: "20,000 keys/s".into(),
        unit: "keys/s",
        aim: Aim::AtLeast(1.0),
        pairs,
    });
    Ok(())
}

/// Purges `count` URLs, from number `first` on, `at_once` batches at a time.
async fn purge_urls(admin: SocketAddr, first: u64, count: u64, at_once: u64) -> Result<()> {
    let mut purgers = JoinSet::new();
    for purger in 0..at_once {
        purgers.spawn(async move {
            let mut connection = Kept::connect(admin).await?;
            for batch in (purger..count / BATCH).step_by(at_once as usize) {
                let from = first + batch * BATCH;
                let urls: Vec<String> = (from..from + BATCH).map(|n| format!("a/{n}")).collect();
                let ask = Ask::new("POST", "/v1/purge")
                    .header("Host", "a")
                    .header("Authorization", format!("Bearer {ADMIN_TOKEN}"))
                    .header("Content-Type", "application/json")
                    .body(serde_json::json!({"urls": urls}).to_string());
                let reply = connection.send(&ask).await?;
                ensure!(reply.status == 200, "{}: {}", reply.status, reply.text());
            }
            anyhow::Ok(())
        });
    }
    while let Some(purged) = purgers.join_next().await {
        purged??;
    }
    Ok(())
}

/// Hits with a million live purges against none, and what those take.
pub async fn load(bench: &Bench<'_>, report: &mut Report) -> Result<()> {
    const LIVE: u64 = 1_000_000;
    let none = bench.ours(&[]).await?;
    let many = bench.ours(&[]).await?;
    let memory = |ours: &TestCluster| crate::machine::resident_bytes(ours.node(1).pid());
    // One at a time: what the allocator keeps of requests is no purge's memory.
    purge_urls(many.node(1).admin_address(), 0, LIVE, 1).await?;
    let mut pairs = Vec::new();
    for side in [&none, &many] {
        read(side.node(1).address(), "/1024")
            .await
            .context("the first read")?;
    }
    for _ in 0..bench.settings.pairs {
        pairs.push((hits(bench, &many).await?, hits(bench, &none).await?));
    }
    // Both have served the same; the tables that were outgrown are given back.
    let grown = memory(&many) - memory(&none);
    report.add(Comparison {
        row: "purge-load",
        work: "1 KiB hits with 1,000,000 live purges".into(),
        against: "none".into(),
        unit: "requests/s",
        aim: Aim::AtLeast(0.98),
        pairs,
    });
    report.add(Comparison {
        row: "purge-load",
        work: "memory of 1,000,000 live purges (whole process)".into(),
        against: "40 MB".into(),
        unit: "bytes",
        aim: Aim::AtMost(1.0),
        pairs: vec![(grown, 40e6)],
    });
    Ok(())
}

/// Hits of a member of a cluster against the same without the checks, in the
/// build at `unchecked`.
pub async fn checks(bench: &Bench<'_>, unchecked: PathBuf, report: &mut Report) -> Result<()> {
    let start = async |options: Options| {
        let ours = bench.served(options).start().await;
        pin(ours.node(1).pid(), SERVER_CORE)?;
        read(ours.node(1).address(), "/1024").await?;
        anyhow::Ok(ours)
    };
    let with = start(Options::cluster(1)).await?;
    let without = start(Options::cluster(1).program(unchecked)).await?;
    let mut pairs = Vec::new();
    for _ in 0..bench.settings.pairs {
        pairs.push((hits(bench, &with).await?, hits(bench, &without).await?));
    }
    report.add(Comparison {
        row: "purge-checks",
        work: "1 KiB hits of a member of a cluster".into(),
        against: "a build without the purge checks".into(),
        unit: "requests/s",
        aim: Aim::AtLeast(0.99),
        pairs,
    });
    Ok(())
}

/// Hits of 1 KiB per second, by 64 connections.
async fn hits(bench: &Bench<'_>, ours: &TestCluster) -> Result<f64> {
    let side = Side::ours(ours);
    let pattern = Pattern::Whole { path: "/1024" };
    let turn = bench.settings.turn.max(Duration::from_secs(1));
    let load = wrk(&bench.home.path(""), side.address(), 64, turn, pattern).await?;
    Ok(load.per_second)
}
