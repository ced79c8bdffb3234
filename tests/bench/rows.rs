//! The rows: what is done to whom, and what is wanted of the ratio.

use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use pingora_slice_tests::cluster::{Options, TestCluster};
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::Settings;
use crate::load::{Pattern, delaying_relay, read, wrk};
use crate::machine::{
    self, CLIENT_CORE, SERVER_CORE, cpu_seconds, floor_json, pin, resident_bytes, settle,
    thread_cpu_seconds,
};
use crate::peers::{Home, Server};
use crate::purges;
use crate::report::{Aim, Comparison, Report};

/// What `ROWS=` may name.
pub const NAMES: &[&str] = &[
    "small",
    "ranges",
    "large",
    "l2",
    "l2-write",
    "peer",
    "cold",
    "delayed",
    "connections",
    "nodes",
    "growth",
    "start",
    "purge",
    "purge-batch",
    "purge-load",
    "purge-checks",
];

const MIB: f64 = 1024.0 * 1024.0;
const GIB: u64 = 1 << 30;
const BIG: &str = "/1073741824";

/// One side of a comparison of hits.
#[derive(Clone, Copy)]
pub struct Side<'a> {
    name: &'a str,
    address: SocketAddr,
    pid: u32,
}

impl<'a> Side<'a> {
    fn of(server: &'a Server) -> Side<'a> {
        Side {
            name: server.name,
            address: server.address,
            pid: server.pid(),
        }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Node 1 of ours.
    pub fn ours(cluster: &'a TestCluster) -> Side<'a> {
        let node = cluster.node(1);
        Side {
            name: "pingora-slice",
            address: node.address(),
            pid: node.pid(),
        }
    }
}

/// What is compared.
#[derive(Clone, Copy, PartialEq)]
enum Figure {
    PerSecond,
    CpuPerMib,
    CpuPerRequest,
}

impl Figure {
    fn unit(self) -> &'static str {
        match self {
            Figure::PerSecond => "requests/s",
            Figure::CpuPerMib => "CPU us/MiB",
            Figure::CpuPerRequest => "CPU us/request",
        }
    }
}

/// What one turn measures.
#[derive(Clone, Copy)]
struct Figures {
    per_second: f64,
    cpu_us_per_mib: f64,
    cpu_us_per_request: f64,
}

impl Figures {
    fn of(self, figure: Figure) -> f64 {
        match figure {
            Figure::PerSecond => self.per_second,
            Figure::CpuPerMib => self.cpu_us_per_mib,
            Figure::CpuPerRequest => self.cpu_us_per_request,
        }
    }
}

/// Everything that the rows share.
pub struct Bench<'a> {
    /// What was asked for.
    pub settings: &'a Settings,
    /// Files of origin and peers.
    pub home: Home,
    /// The origin.
    pub origin: Server,
    /// The program with the floors.
    pub parts: &'a Path,
}

/// Measures what was asked for; a row that fails is reported as not measured.
pub async fn measure(settings: &Settings, parts: &Path, report: &mut Report) -> Result<()> {
    pin(std::process::id(), CLIENT_CORE)?;
    let home = Home::new()?;
    let origin = home.origin().await?;
    let bench = Bench {
        settings,
        home,
        origin,
        parts,
    };
    // One after another: two rows at once would measure each other.
    macro_rules! row {
        ($name:literal, $work:literal, $measured:expr) => {
            if settings.wants($name) {
                let so_far = report.so_far();
                if let Err(error) = $measured.await {
                    report.refuse(so_far, $work, &error);
                }
            }
        };
    }
    let so_far = report.so_far();
    if ["small", "ranges", "large", "l2"]
        .iter()
        .any(|row| settings.wants(row))
        && let Err(error) = bench.hits(report).await
    {
        report.refuse(so_far, "hits", &error);
    }
    row!(
        "l2-write",
        "writing L2 while filling",
        bench.l2_write(report)
    );
    row!("peer", "a slice from a peer over QUIC", bench.peer(report));
    row!("cold", "cold 1 GiB object", bench.cold(report));
    row!(
        "delayed",
        "cold object behind a delay",
        bench.delayed(report)
    );
    row!(
        "connections",
        "10,000 idle connections",
        bench.connections(report)
    );
    row!(
        "nodes",
        "three nodes, two thirds over QUIC",
        bench.nodes(report)
    );
    row!(
        "growth",
        "cost as objects grow in number",
        bench.growth(report)
    );
    row!("start", "start-up with 10 GiB in L2", bench.start(report));
    row!("purge", "PURGE to 200", purges::commits(&bench, report));
    row!(
        "purge-batch",
        "purges in batches",
        purges::batches(&bench, report)
    );
    row!(
        "purge-load",
        "hits with 1,000,000 live purges",
        purges::load(&bench, report)
    );
    match std::env::var_os("PINGORA_SLICE_UNCHECKED") {
        Some(unchecked) => row!(
            "purge-checks",
            "hits with the purge checks on against off",
            purges::checks(&bench, unchecked.into(), report)
        ),
        None if settings.wants("purge-checks") => report.not_measured(
            "hits with the purge checks on against off",
            "PINGORA_SLICE_UNCHECKED names no build without them: make bench-checks",
        ),
        None => {}
    }
    Ok(())
}

impl Bench<'_> {
    /// One machine of ours on the server's core, before this bench's origin.
    pub async fn ours(&self, settings: &[(&str, &str)]) -> Result<TestCluster> {
        let mut options = self.served(Options::alone());
        for (key, value) in settings {
            options = options.set(key, value);
        }
        let cluster = options.start().await;
        pin(cluster.node(1).pid(), SERVER_CORE)?;
        Ok(cluster)
    }

    /// Served on one core from memory, out of this bench's origin.
    pub fn served(&self, options: Options) -> Options {
        options
            .set("upstream_address", format!("\"{}\"", self.origin.address))
            .set("threads", 1)
            .set("slice_size", "1m")
            .set("l1_cache_size_bytes", "4g")
            .set("enable_l2_cache", false)
    }

    async fn figures(
        &self,
        side: Side<'_>,
        connections: usize,
        pattern: Pattern,
    ) -> Result<Figures> {
        let before = cpu_seconds(side.pid);
        let load = wrk(
            &self.home.path(""),
            side.address,
            connections,
            self.settings.turn,
            pattern,
        )
        .await?;
        let cpu_us = (cpu_seconds(side.pid) - before) * 1e6;
        Ok(Figures {
            per_second: load.per_second,
            cpu_us_per_mib: cpu_us / (load.bytes / MIB),
            cpu_us_per_request: cpu_us / load.requests,
        })
    }

    /// Both sides take turns at the same load.
    #[expect(clippy::too_many_arguments, reason = "a row of the table")]
    async fn compare(
        &self,
        report: &mut Report,
        row: &'static str,
        work: &str,
        (ours, theirs): (Side<'_>, Side<'_>),
        connections: usize,
        pattern: Pattern,
        wanted: &[(Figure, Aim)],
    ) -> Result<()> {
        let row = (row, work, theirs.name);
        let [ours, theirs] = [ours, theirs].map(|side| (side, connections, pattern));
        self.loads(report, row, ours, theirs, wanted).await
    }

    /// Two loads in turn: each on whom, over how many connections, and for what.
    async fn loads(
        &self,
        report: &mut Report,
        (row, work, against): (&'static str, &str, &str),
        a: (Side<'_>, usize, Pattern),
        b: (Side<'_>, usize, Pattern),
        wanted: &[(Figure, Aim)],
    ) -> Result<()> {
        let mut turns = Vec::new();
        for _ in 0..self.settings.pairs {
            let a = self.figures(a.0, a.1, a.2).await?;
            let b = self.figures(b.0, b.1, b.2).await?;
            turns.push((a, b));
        }
        for (figure, aim) in wanted {
            report.add(Comparison {
                row,
                work: work.to_owned(),
                against: against.to_owned(),
                unit: figure.unit(),
                aim: *aim,
                pairs: turns
                    .iter()
                    .map(|(a, b)| (a.of(*figure), b.of(*figure)))
                    .collect(),
            });
        }
        Ok(())
    }

    async fn hits(&self, report: &mut Report) -> Result<()> {
        use Aim::{AtLeast, AtMost};
        use Figure::{CpuPerMib, PerSecond};

        let wants = |row| self.settings.wants(row);
        let ours = self.ours(&[]).await?;
        let floor = self.home.floor(self.parts, 0).await?;
        let kernel = self.home.kernel(self.parts, 0).await?;
        let nginx = self.home.nginx(self.origin.address).await?;
        let varnish = self.home.varnish(self.origin.address).await?;
        let ats = self.home.traffic_server(self.origin.address).await?;
        let (us, floor, nginx) = (Side::ours(&ours), Side::of(&floor), Side::of(&nginx));
        let (varnish, ats, kernel) = (Side::of(&varnish), Side::of(&ats), Side::of(&kernel));
        for side in [us, nginx, varnish, ats] {
            for object in ["/1024", "/10240", "/1048576", "/104857600", BIG] {
                read(side.address, object)
                    .await
                    .context(side.name.to_owned())?;
            }
        }
        // Memory of ours and Traffic Server keep for good what is asked for twice.
        for side in [us, ats] {
            read(side.address, BIG).await?;
        }
        let hits = Hits::of(&ours, "l1").await;
        if wants("small") {
            for (work, path) in [
                ("1 KiB, 64 connections", "/1024"),
                ("10 KiB, 64 connections", "/10240"),
            ] {
                let pattern = Pattern::Whole { path };
                self.compare(
                    report,
                    "small",
                    work,
                    (us, floor),
                    64,
                    pattern,
                    &rate_and_cpu(AtLeast(0.9)),
                )
                .await?;
                self.compare(
                    report,
                    "small",
                    work,
                    (us, nginx),
                    64,
                    pattern,
                    &rate_and_cpu(AtLeast(1.0)),
                )
                .await?;
            }
        }
        let ranges = Pattern::Ranges {
            path: BIG,
            total: GIB,
            piece: 65536,
            align: 1,
        };
        if wants("ranges") {
            let work = "random 64 KiB ranges of 1 GiB, 32 connections";
            let of_kernel = of_kernel(work);
            for (work, sides, aim) in [
                (work, (us, floor), AtLeast(0.9)),
                (work, (us, nginx), AtLeast(1.15)),
                (work, (us, ats), AtLeast(5.0)),
                (&of_kernel, (kernel, nginx), Aim::None),
                (&of_kernel, (kernel, ats), Aim::None),
            ] {
                let wanted = rate_and_cpu(aim);
                self.compare(report, "ranges", work, sides, 32, ranges, &wanted)
                    .await?;
            }
        }
        if wants("large") {
            for (work, path, connections) in [
                ("1 MiB, 16 connections", "/1048576", 16),
                ("100 MiB, 4 connections", "/104857600", 4),
            ] {
                let pattern = Pattern::Whole { path };
                let of_kernel = of_kernel(work);
                for (work, sides, aim) in [
                    (work, (us, floor), AtMost(1.1)),
                    (work, (us, varnish), AtMost(1.0)),
                    (&of_kernel, (kernel, varnish), Aim::None),
                ] {
                    let wanted = [(CpuPerMib, aim), (PerSecond, Aim::None)];
                    self.compare(report, "large", work, sides, connections, pattern, &wanted)
                        .await?;
                }
            }
        }
        hits.ensure(&ours).await?;
        if wants("l2") {
            drop(ours);
            let ours = self
                .ours(&[
                    ("l1_cache_size_bytes", "8m"),
                    ("enable_l2_cache", "true"),
                    ("l2_cache_size_bytes", "4g"),
                ])
                .await?;
            read_onto_disk(&ours, BIG, 1024.0).await?;
            let us = Side::ours(&ours);
            let hits = Hits::of(&ours, "l2").await;
            self.compare(
                report,
                "l2",
                "64 KiB ranges from L2, 32 connections",
                (us, nginx),
                32,
                ranges,
                &rate_and_cpu(AtLeast(0.5)),
            )
            .await?;
            self.l2_against_pread(report, us, floor).await?;
            hits.ensure(&ours).await?;
        }
        Ok(())
    }

    /// Slices from disk against the same read and written by nobody in between.
    async fn l2_against_pread(
        &self,
        report: &mut Report,
        us: Side<'_>,
        floor: Side<'_>,
    ) -> Result<()> {
        let mib = Pattern::Ranges {
            path: BIG,
            total: GIB,
            piece: 1 << 20,
            align: 1 << 20,
        };
        let file = self.home.path("www").join("1073741824");
        let seconds = self.settings.turn.as_secs_f64().to_string();
        let mut pairs = Vec::new();
        for _ in 0..self.settings.pairs {
            let a = self.figures(us, 16, mib).await?.cpu_us_per_mib;
            let b = self.figures(floor, 16, mib).await?.cpu_us_per_mib;
            let arguments = ["pread", crate::peers::path(&file), "1048576", &seconds];
            let pread = number(
                &floor_json(self.parts, SERVER_CORE, &arguments)?,
                "cpu_us_per_mib",
            )?;
            pairs.push((a, b + pread));
        }
        report.add(Comparison {
            row: "l2",
            work: "1 MiB from L2, 16 connections".into(),
            against: "floor + pread".into(),
            unit: "CPU us/MiB",
            aim: Aim::AtMost(1.15),
            pairs,
        });
        Ok(())
    }

    /// CPU of the thread that writes to disk, and what cold reads with L2 cost more
    /// than without, which is the difference of two noisy figures.
    async fn l2_write(&self, report: &mut Report) -> Result<()> {
        const SLICES: f64 = 1024.0;
        let (mut writers, mut cpu) = (Vec::new(), Vec::new());
        let (mut time, mut kept) = (Vec::new(), Vec::new());
        let file = self.home.path("sequential");
        for _ in 0..self.settings.pairs {
            let mut both = Vec::new();
            for l2 in ["true", "false"] {
                // More memory than disk: what is read is kept in memory on both sides.
                let ours = self
                    .ours(&[
                        ("enable_l2_cache", l2),
                        ("l2_cache_size_bytes", "4g"),
                        ("l1_cache_size_bytes", "5g"),
                    ])
                    .await?;
                let us = Side::ours(&ours);
                settle();
                let before = cpu_seconds(us.pid);
                let time = read(us.address, BIG).await?.1.as_secs_f64();
                if l2 == "true" {
                    let written = until_on_disk(&ours, SLICES).await?;
                    let writer = thread_cpu_seconds(us.pid, "l2-writer");
                    writers.push(writer * 1e6 / written);
                    kept.push((written, SLICES));
                }
                both.push(((cpu_seconds(us.pid) - before) * 1e6 / SLICES, time));
            }
            settle();
            let arguments = ["write", crate::peers::path(&file), "1024"];
            let write = || floor_json(self.parts, SERVER_CORE, &arguments);
            // The first may meet memory that the host has taken back; that of the file
            // is what the second has again.
            write()?;
            let plain = number(&write()?, "cpu_us_per_mib")?;
            cpu.push((both[0].0 - both[1].0, plain));
            time.push((both[0].1, both[1].1));
        }
        let plain = "a sequential write with checksum";
        let writers = writers.iter().zip(&cpu);
        let writing = writers.map(|(ours, (_, plain))| (*ours, *plain)).collect();
        for (work, against, unit, aim, pairs) in [
            (
                "writing L2 while filling: its thread",
                plain,
                "CPU us/MiB",
                Aim::AtMost(1.3),
                writing,
            ),
            (
                "cold 1 GiB with L2 less without",
                plain,
                "CPU us/MiB",
                Aim::None,
                cpu,
            ),
            ("cold 1 GiB with L2", "without L2", "s", Aim::None, time),
            (
                "cold 1 GiB with L2: slices written",
                "its slices",
                "slices",
                Aim::None,
                kept,
            ),
        ] {
            report.add(Comparison {
                row: "l2-write",
                work: work.into(),
                against: against.into(),
                unit,
                aim,
                pairs,
            });
        }
        Ok(())
    }

    async fn peer(&self, report: &mut Report) -> Result<()> {
        let seconds = (2.0 * self.settings.turn.as_secs_f64()).to_string();
        let mut all: [Vec<(f64, f64)>; 3] = Default::default();
        for _ in 0..self.settings.pairs {
            let ours = floor_json(self.parts, SERVER_CORE, &["quic", "ours", &seconds])?;
            let bare = floor_json(self.parts, SERVER_CORE, &["quic", "bare", &seconds])?;
            for (pairs, name) in all
                .iter_mut()
                .zip(["per_second", "cpu_us_per_mib", "p50_us"])
            {
                pairs.push((number(&ours, name)?, number(&bare, name)?));
            }
        }
        let [per_second, cpu, p50] = all;
        for (work, unit, aim, pairs) in [
            (
                "1 MiB from a peer, 4 at once",
                "slices/s",
                Aim::AtLeast(0.9),
                per_second,
            ),
            (
                "1 MiB from a peer, both sides",
                "CPU us/MiB",
                Aim::None,
                cpu,
            ),
            (
                "64 KiB from a peer, one at a time",
                "p50 us",
                Aim::AtMost(1.5),
                p50,
            ),
        ] {
            report.add(Comparison {
                row: "peer",
                work: work.into(),
                against: "bare quinn".into(),
                unit,
                aim,
                pairs,
            });
        }
        Ok(())
    }

    async fn cold(&self, report: &mut Report) -> Result<()> {
        // Traffic Server writes it to disk, and keeps in memory what is read again.
        for (l1, what) in [("4g", ""), ("256m", ", little memory")] {
            let work = format!("cold 1 GiB object, one client{what}");
            let (mut times, mut cpu, mut bytes) = (Vec::new(), Vec::new(), Vec::new());
            for _ in 0..self.settings.pairs {
                let ours = self
                    .ours(&[
                        ("l1_cache_size_bytes", l1),
                        ("enable_l2_cache", "true"),
                        ("l2_cache_size_bytes", "4g"),
                    ])
                    .await?;
                let (a, length) = cold_read(Side::ours(&ours)).await?;
                bytes.push((
                    ours.node(1).metric("bytes_from_origin_total").await,
                    length as f64,
                ));
                drop(ours);
                let ats = self.home.traffic_server(self.origin.address).await?;
                let (b, _) = cold_read(Side::of(&ats)).await?;
                times.push((a[0], b[0]));
                cpu.push((a[1], b[1]));
            }
            for (work, against, unit, aim, pairs) in [
                (&work, "Traffic Server", "s", Aim::AtMost(1.0), times),
                (&work, "Traffic Server", "CPU us/MiB", Aim::None, cpu),
                (
                    &format!("{work}: bytes from the origin"),
                    "bytes of the object",
                    "bytes",
                    Aim::AtMost(1.0),
                    bytes,
                ),
            ] {
                report.add(Comparison {
                    row: "cold",
                    work: work.clone(),
                    against: against.into(),
                    unit,
                    aim,
                    pairs,
                });
            }
        }
        Ok(())
    }

    async fn delayed(&self, report: &mut Report) -> Result<()> {
        const OBJECT: &str = "/67108864";
        // As the preset for fast machines has it, and the default.
        let rows = [
            (20, "8", Aim::AtLeast(4.0)),
            (100, "8", Aim::AtLeast(4.0)),
            (20, "4", Aim::None),
            (100, "4", Aim::None),
        ];
        for (ms, ahead, aim) in rows {
            let relay = delaying_relay(self.origin.address, Duration::from_millis(ms)).await?;
            let ours = self
                .ours(&[
                    ("upstream_address", &format!("\"{relay}\"")),
                    ("max_concurrent_subrequests", ahead),
                    // nginx writes what it fetches, too.
                    ("enable_l2_cache", "true"),
                    ("l2_cache_size_bytes", "4g"),
                ])
                .await?;
            let nginx = self.home.nginx(relay).await?;
            let mut pairs = Vec::new();
            for turn in 0..self.settings.pairs {
                // Another query, another object: cold each time.
                let target = format!("{OBJECT}?{turn}");
                let rate = |(bytes, time): (u64, Duration)| bytes as f64 / MIB / time.as_secs_f64();
                let a = rate(read(ours.node(1).address(), &target).await?);
                let b = rate(read(nginx.address, &target).await?);
                pairs.push((a, b));
            }
            report.add(Comparison {
                row: "delayed",
                work: format!("cold 64 MiB, origin {ms} ms away, one client, {ahead} slices ahead"),
                against: "nginx".into(),
                unit: "MiB/s",
                aim,
                pairs,
            });
        }
        Ok(())
    }

    async fn connections(&self, report: &mut Report) -> Result<()> {
        const IDLE: usize = 10_000;
        // Each has its share, should it become active.
        let settings = [("l1_cache_size_bytes", "64m"), ("memory_budget", "4g")];
        let mut memory = Vec::new();
        for _ in 0..self.settings.pairs {
            let ours = self.ours(&settings).await?;
            let a = idle_bytes(Side::ours(&ours), IDLE).await?;
            drop(ours);
            let floor = self.home.floor(self.parts, 0).await?;
            let b = idle_bytes(Side::of(&floor), IDLE).await?;
            memory.push((a, b));
        }
        report.add(Comparison {
            row: "connections",
            work: format!("memory per idle connection, of {IDLE}"),
            against: "floor".into(),
            unit: "bytes",
            aim: Aim::AtMost(1.2),
            pairs: memory,
        });
        let ours = self.ours(&settings).await?;
        let kernel = self.home.kernel(self.parts, 0).await?;
        // What the kernel's calls alone lose is its own and wrk's.
        let work = format!("1 KiB, 1,000 active and {IDLE} idle");
        for (side, work, aim) in [
            (Side::ours(&ours), &work, Aim::AtLeast(1.0)),
            (Side::of(&kernel), &of_kernel(&work), Aim::None),
        ] {
            let _idle = open_idle(side.address, IDLE).await?;
            let pattern = Pattern::Whole { path: "/1024" };
            let row = ("connections", work.as_str(), "100 active, the same idle");
            let [many, few] = [1000, 100].map(|connections| (side, connections, pattern));
            self.loads(report, row, many, few, &rate_and_cpu(aim))
                .await?;
        }
        Ok(())
    }

    /// Two thirds cross QUIC where the client's node has no memory for them; where it
    /// has, fewer do.
    async fn nodes(&self, report: &mut Report) -> Result<()> {
        let aim = Aim::AtMost(1.15);
        self.nodes_with(["64m", "64m"], "on disk", aim, report)
            .await?;
        // A third of the object fits, the object does not.
        self.nodes_with(["64m", "512m"], "in its owners' memory", aim, report)
            .await?;
        self.nodes_with(["512m", "512m"], "in memory", Aim::None, report)
            .await
    }

    /// Memory of the node that the client asks, and of each of the others.
    async fn nodes_with(
        &self,
        [first, others]: [&str; 2],
        warm: &str,
        aim: Aim,
        report: &mut Report,
    ) -> Result<()> {
        const OBJECT: &str = "/1073741824";
        /// Of the object, what the client's node does not own.
        const OTHERS: f64 = 2.0 / 3.0;
        let options = Options::cluster(3)
            .set("upstream_address", format!("\"{}\"", self.origin.address))
            .set("threads", 1)
            .set("slice_size", "1m")
            .set("l1_cache_size_bytes", others)
            .set("l2_cache_size_bytes", "4g")
            .set("max_concurrent_subrequests", 4);
        let mut ours = options.prepare().await;
        ours.node_mut(1).set("l1_cache_size_bytes", first);
        let ids: Vec<u64> = ours.nodes().iter().map(|node| node.id()).collect();
        for id in &ids {
            ours.node_mut(*id).spawn();
        }
        for id in &ids {
            ours.node_mut(*id).until_ready().await;
        }
        let pids: Vec<u32> = ours.nodes().iter().map(|node| node.pid()).collect();
        for pid in &pids {
            pin(*pid, SERVER_CORE)?;
        }
        let us = ours.node(1).address();
        for _ in 0..4 {
            settle();
            read(us, OBJECT).await?;
        }
        let floor = self.home.floor(self.parts, 0).await?;
        let bare_nodes = self.home.bare_nodes(self.parts).await?;
        read(bare_nodes.address, OBJECT).await?;
        let seconds = (2.0 * self.settings.turn.as_secs_f64()).to_string();
        let crossed = |ours: &TestCluster| {
            let node = ours.node(1).metrics_address();
            async move { metric(node, "bytes_from_peers_total").await }
        };
        let fetched = ours.metric_sum("origin_fetches_total").await;
        let [mut stated, mut crossing, mut apart, mut shares] = [const { Vec::new() }; 4];
        let [mut beside_bare, mut bare_itself] = [const { Vec::new() }; 2];
        for _ in 0..self.settings.pairs {
            let cpu = || pids.iter().map(|pid| cpu_seconds(*pid)).sum::<f64>();
            let (before, peers_before) = (cpu(), crossed(&ours).await?);
            read(us, OBJECT).await?;
            let a = (cpu() - before) * 1e6 / 1024.0;
            let share = (crossed(&ours).await? - peers_before) / GIB as f64;
            let cost = async |server: &Server| -> Result<f64> {
                let before = cpu_seconds(server.pid());
                read(server.address, OBJECT).await?;
                Ok((cpu_seconds(server.pid()) - before) * 1e6 / 1024.0)
            };
            let (three, one) = (cost(&bare_nodes).await?, cost(&floor).await?);
            let quic = |kind| {
                let line = floor_json(self.parts, SERVER_CORE, &["quic", kind, &seconds])?;
                number(&line, "cpu_us_per_mib")
            };
            let bare = quic("bare")?;
            stated.push((a, one + OTHERS * bare));
            beside_bare.push((a, three));
            bare_itself.push((three, one + OTHERS * bare));
            crossing.push((a, one + share * bare));
            apart.push((a, one + share * quic("apart")?));
            shares.push((share, OTHERS));
        }
        let fetched = ours.metric_sum("origin_fetches_total").await - fetched;
        ensure!(fetched == 0.0, "{fetched} slices came from the origin");
        // The ring gives each node about a third.
        let is_as_stated = |(share, _): &(f64, f64)| (share - OTHERS).abs() < 0.1;
        ensure!(
            matches!(aim, Aim::None) || shares.iter().all(is_as_stated),
            "not two thirds crossed: {shares:?}"
        );
        let us = format!("three nodes, warm {warm}, one client");
        let no_others =
            &*format!("three nodes of Pingora and quinn alone, beside those warm {warm}");
        for (work, against, aim, pairs) in [
            (&*us, "floor + bare quinn for two thirds", aim, stated),
            (
                &*us,
                "floor + bare quinn for what crossed",
                Aim::None,
                crossing,
            ),
            // As nodes are.
            (
                &*us,
                "floor + bare quinn for what crossed, its ends two processes",
                Aim::None,
                apart,
            ),
            (&*us, no_others, Aim::None, beside_bare),
            (
                no_others,
                "floor + bare quinn for two thirds",
                Aim::None,
                bare_itself,
            ),
        ] {
            report.add(Comparison {
                row: "nodes",
                work: work.into(),
                against: against.into(),
                unit: "CPU us/MiB",
                aim,
                pairs,
            });
        }
        report.add(Comparison {
            row: "nodes",
            work: format!("warm {warm}: share of the bytes that crossed QUIC"),
            against: "two thirds".into(),
            unit: "share",
            aim: Aim::None,
            pairs: shares,
        });
        Ok(())
    }

    async fn growth(&self, report: &mut Report) -> Result<()> {
        const COUNTS: [u64; 3] = [1, 1_000, 1_000_000];
        const MANY: u64 = COUNTS[2];
        let asked = |count| Pattern::Many {
            path: "/1024",
            count,
        };
        let mut nodes = Vec::new();
        for count in COUNTS {
            let ours = self.ours(&[("l1_cache_size_bytes", "12g")]).await?;
            fill(ours.node(1).address(), count).await?;
            let hits = Hits::of(&ours, "l1").await;
            nodes.push((count, ours, hits));
        }
        let one = Side::ours(&nodes[0].1);
        for (count, ours, hits) in &nodes[1..] {
            for (what, asked_for) in [("one", 1), ("any", *count)] {
                let work = format!("1 KiB, {what} of {count} cached objects");
                let row = ("growth", work.as_str(), "1 cached object");
                let many = (Side::ours(ours), 64, asked(asked_for));
                let wanted = rate_and_cpu(Aim::AtLeast(0.95));
                self.loads(report, row, many, (one, 64, asked(1)), &wanted)
                    .await?;
            }
            hits.ensure(ours).await?;
        }
        drop(nodes);
        // What asking for many costs wrk, the kernel and one look-up in a map.
        let kernel = self.home.kernel(self.parts, MANY).await?;
        for count in &COUNTS[1..] {
            let work = of_kernel(&format!("1 KiB, any of {count} in a map"));
            let row = ("growth", work.as_str(), "one");
            let [many, one] = [*count, 1].map(|count| (Side::of(&kernel), 64, asked(count)));
            self.loads(report, row, many, one, &rate_and_cpu(Aim::None))
                .await?;
        }
        Ok(())
    }

    async fn start(&self, report: &mut Report) -> Result<()> {
        const OBJECTS: u64 = 10;
        let mut ours = self
            .ours(&[
                ("l1_cache_size_bytes", "64m"),
                ("enable_l2_cache", "true"),
                ("l2_cache_size_bytes", "12g"),
            ])
            .await?;
        for object in 0..OBJECTS {
            let target = format!("{BIG}?{object}");
            read_onto_disk(&ours, &target, 1024.0 * (object + 1) as f64).await?;
        }
        let mut pairs = Vec::new();
        for turn in 0..self.settings.pairs {
            let node = ours.node_mut(1);
            node.kill();
            let begin = Instant::now();
            node.spawn();
            pin(node.pid(), SERVER_CORE)?;
            machine::until_listening(node.address()).await?;
            let target = format!("{BIG}?{}", turn as u64 % OBJECTS);
            let mut stream = TcpStream::connect(node.address()).await?;
            first_range(&mut stream, &target).await?;
            pairs.push((begin.elapsed().as_secs_f64(), 2.0));
            node.until_ready().await;
            let from_origin = node.metric("origin_fetches_total").await;
            ensure!(from_origin == 0.0, "the first hit was none");
        }
        report.add(Comparison {
            row: "start",
            work: "kill -9, start with 10 GiB in L2, first hit".into(),
            against: "2 seconds".into(),
            unit: "s",
            aim: Aim::AtMost(1.0),
            pairs,
        });
        Ok(())
    }
}

/// The rate, which the aim is for, and the CPU, as a client may be the slower part.
fn rate_and_cpu(aim: Aim) -> [(Figure, Aim); 2] {
    [(Figure::PerSecond, aim), (Figure::CpuPerRequest, Aim::None)]
}

/// The same by the kernel's calls alone: how much of a distance is not ours.
fn of_kernel(work: &str) -> String {
    format!("the kernel's calls alone: {work}")
}

/// What a node of ours had done when its cache was warm.
struct Hits {
    source: &'static str,
    from_source: f64,
    slices: f64,
    fetches: f64,
}

impl Hits {
    async fn of(ours: &TestCluster, source: &'static str) -> Hits {
        let metrics = ours.node(1).metrics().await;
        Hits {
            source,
            from_source: metrics.sum(&format!("slices_total{{source=\"{source}\"}}")),
            slices: metrics.sum("slices_total"),
            fetches: metrics.sum("origin_fetches_total"),
        }
    }

    /// Refuses what was measured since, unless next to all of it came from the cache and
    /// most of it from where it was meant to.
    async fn ensure(&self, ours: &TestCluster) -> Result<()> {
        let now = Hits::of(ours, self.source).await;
        let (from_source, slices) = (now.from_source - self.from_source, now.slices - self.slices);
        // A few may have been in memory, and not on disk, when it was warm.
        let fetches = now.fetches - self.fetches;
        ensure!(
            fetches <= slices / 1000.0 && from_source >= slices / 2.0,
            "{from_source} of {slices} slices came from {}, and {fetches} from the origin",
            self.source,
        );
        Ok(())
    }
}

/// A figure of a floor's line.
pub fn number(line: &Value, name: &str) -> Result<f64> {
    line[name]
        .as_f64()
        .with_context(|| format!("no {name} in {line}"))
}

/// Seconds, CPU per MiB (microseconds), and bytes of the first read of 1 GiB.
async fn cold_read(side: Side<'_>) -> Result<([f64; 2], u64)> {
    settle();
    let before = cpu_seconds(side.pid);
    let (length, time) = read(side.address, BIG).await?;
    let cpu = (cpu_seconds(side.pid) - before) * 1e6 / (length as f64 / MIB);
    Ok(([time.as_secs_f64(), cpu], length))
}

async fn metric(address: SocketAddr, name: &str) -> Result<f64> {
    let reply = pingora_slice_tests::Ask::get("/metrics")
        .send(address)
        .await?;
    let metrics = pingora_slice_tests::metrics::Metrics::parse(&reply.text())?;
    Ok(metrics.sum(name))
}

/// Waits until that many slices are on disk or were dropped; how many were written.
async fn until_on_disk(ours: &TestCluster, slices: f64) -> Result<f64> {
    let node = ours.node(1);
    let begin = Instant::now();
    loop {
        let metrics = node.metrics().await;
        let dropped = metrics.sum("l2_writes_dropped_total");
        let written = metrics.sum("l2_writes_total");
        if written + dropped >= slices {
            return Ok(written);
        }
        ensure!(
            begin.elapsed() < Duration::from_secs(120),
            "{written} slices on disk"
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Reads an object until this many slices in all are on disk: what comes while the
/// disk is behind is dropped, and comes again, unless memory keeps it.
async fn read_onto_disk(ours: &TestCluster, target: &str, slices: f64) -> Result<()> {
    const TRIES: usize = 5;
    const WRITTEN_WITHIN: Duration = Duration::from_secs(10);
    for _ in 0..TRIES {
        settle();
        read(ours.node(1).address(), target).await?;
        let begin = Instant::now();
        while begin.elapsed() < WRITTEN_WITHIN {
            let metrics = ours.node(1).metrics().await;
            let written = metrics.sum("l2_writes_total");
            let dropped = metrics.sum("l2_writes_dropped_total");
            if written + dropped.min(metrics.sum("l1_bytes") / MIB) >= slices {
                return Ok(());
            }
            if written + dropped >= slices {
                break;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
    anyhow::bail!("{target} is not on disk after {TRIES} reads");
}

/// One range read over a connection that stays; returns when all is there.
async fn first_range(stream: &mut TcpStream, target: &str) -> Result<()> {
    // The same host as wrk names, or it would be another object.
    let host = stream.peer_addr()?;
    let ask = format!("GET {target} HTTP/1.1\r\nHost: {host}\r\nRange: bytes=0-9\r\n\r\n");
    stream.write_all(ask.as_bytes()).await?;
    let mut got = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        let count = stream.read(&mut buffer).await?;
        ensure!(count > 0, "{target}: closed");
        got.extend_from_slice(&buffer[..count]);
        let head = got.windows(4).position(|w| w == b"\r\n\r\n");
        if head.is_some_and(|end| got.len() >= end + 4 + 10) {
            return Ok(());
        }
    }
}

/// Connections that have asked once and stay.
async fn open_idle(address: SocketAddr, count: usize) -> Result<Vec<TcpStream>> {
    let mut open = Vec::with_capacity(count);
    for _ in 0..count {
        let mut stream = TcpStream::connect(address).await?;
        first_range(&mut stream, "/1024").await?;
        open.push(stream);
    }
    Ok(open)
}

/// Memory that each further idle connection takes.
async fn idle_bytes(side: Side<'_>, count: usize) -> Result<f64> {
    // The first thousand pay for what is allocated once.
    let first = open_idle(side.address, 1000).await?;
    let before = resident_bytes(side.pid);
    let rest = open_idle(side.address, count - 1000).await?;
    let after = resident_bytes(side.pid);
    let bytes = (after - before) / rest.len() as f64;
    drop(first);
    Ok(bytes)
}

/// Asks once for each of `count` objects.
async fn fill(address: SocketAddr, count: u64) -> Result<()> {
    const AT_ONCE: u64 = 16;
    let mut fillers = tokio::task::JoinSet::new();
    for filler in 0..AT_ONCE.min(count) {
        fillers.spawn(async move {
            let mut stream = TcpStream::connect(address).await?;
            for object in (filler..count).step_by(AT_ONCE as usize) {
                first_range(&mut stream, &format!("/1024?{object}")).await?;
            }
            anyhow::Ok(())
        });
    }
    while let Some(filled) = fillers.join_next().await {
        filled??;
    }
    Ok(())
}
