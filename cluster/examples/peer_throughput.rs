//! How fast one node reads slices of 1 MiB from another over loopback, both
//! in this process: `cargo run --release -p pingora-slice-cluster --example
//! peer_throughput [SLICES] [AT_ONCE]`. Compare figures of one run only.

use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use futures::stream::{self, StreamExt};
use pingora_slice_client::ca;
use pingora_slice_cluster::peer::{Body, PeerHandler, Peers, TlsFiles};
use pingora_slice_cluster::wire::{
    Answer, Ask, OriginRequest, Part, SliceAsk, SliceOrigin, Version,
};
use pingora_slice_cluster::{Generation, NodeId, ObjectKey, PurgeIndex, SliceId};

const SLICE_BYTES: usize = 1024 * 1024;
const PART_BYTES: usize = 64 * 1024;

/// Gives everybody the same slice from memory.
struct Memory(Vec<Part>);

#[async_trait::async_trait]
impl PeerHandler for Memory {
    fn is_member(&self, _from: NodeId) -> bool {
        true
    }

    async fn slices(&self, _from: NodeId, ask: Ask) -> (Answer, Option<Body>) {
        let Ask::Slice(ask) = ask else {
            return (Answer::Missing, None);
        };
        let count = (ask.end as usize).div_ceil(PART_BYTES).min(self.0.len());
        let parts: Vec<_> = self.0[..count].iter().cloned().map(Ok).collect();
        let slice_bytes = Some(SLICE_BYTES as u32);
        (
            Answer::Slice {
                slice_bytes,
                source: SliceOrigin::Stored,
            },
            Some(stream::iter(parts).boxed()),
        )
    }

    async fn control(&self, _from: NodeId, _request: Bytes) -> Result<Vec<u8>, String> {
        Err("no control traffic here".to_owned())
    }
}

#[tokio::main]
async fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let slices: usize = arguments.next().map_or(Ok(1000), |text| text.parse())?;
    let at_once: usize = arguments.next().map_or(Ok(4), |text| text.parse())?;

    let dir = std::env::temp_dir().join(format!("peer-throughput-{}", std::process::id()));
    let measured = run(&dir, slices, at_once).await;
    std::fs::remove_dir_all(&dir)?;
    measured
}

async fn run(dir: &std::path::Path, slices: usize, at_once: usize) -> Result<()> {
    ca::ca_init(dir)?;
    let part = Part::new(Bytes::from(vec![42; PART_BYTES]));
    let memory = Arc::new(Memory(vec![part; SLICE_BYTES / PART_BYTES]));
    let mut nodes = Vec::new();
    for id in 1..=2 {
        ca::ca_issue(dir, id, &[])?;
        let tls = TlsFiles {
            ca: dir.join("ca.pem"),
            cert: dir.join(format!("node{id}.pem")),
            key: dir.join(format!("node{id}.key")),
        };
        let address = free_pair()?;
        nodes.push((
            Peers::bind(address, NodeId(id), &tls, memory.clone())?,
            address,
        ));
    }
    let (asker, (owner, address)) = (&nodes[0].0, &nodes[1]);
    asker.set_address(NodeId(2), &address.to_string());

    for round in 0..3 {
        for (what, bytes, count) in [
            ("slices of 1 MiB", SLICE_BYTES, slices),
            ("reads of one part", PART_BYTES, slices),
        ] {
            let begin = Instant::now();
            stream::iter(0..count)
                .map(|_| read(asker, bytes))
                .buffer_unordered(at_once)
                .fold(Ok(()), |all: Result<()>, one| async move { all.and(one) })
                .await?;
            let seconds = begin.elapsed().as_secs_f64();
            println!(
                "round {round}: {count} {what}, {at_once} at once: {:.0} MiB/s, {:.0}/s",
                (count * bytes) as f64 / f64::from(1 << 20) / seconds,
                count as f64 / seconds
            );
        }
    }
    for link in owner.links() {
        println!("owner: {link:?}");
    }
    owner.stop().await;
    Ok(())
}

async fn read(asker: &Peers, bytes: usize) -> Result<()> {
    let ask = Ask::Slice(SliceAsk {
        key: ObjectKey(1),
        slice: SliceId {
            generation: Generation(1),
            index: 0,
        },
        start: 0,
        end: bytes as u32,
        request: OriginRequest {
            host: "a".into(),
            target: "/".into(),
            headers: vec![],
        },
        version: Version {
            etag: None,
            last_modified: None,
            exact_date: false,
            length: None,
            slice_bytes: SLICE_BYTES as u32,
            whole: false,
            hard: PurgeIndex::default(),
        },
        place: 0,
        stamp: PurgeIndex::default(),
        stored_only: true,
    });
    let (_, body) = asker.ask(NodeId(2), &ask, Duration::from_secs(10)).await?;
    let mut body = body.context("an answer without a body")?;
    let mut got = 0;
    while let Some(part) = body.next().await {
        got += part?.bytes.len();
    }
    ensure!(got == bytes, "{got} bytes instead of {bytes}");
    Ok(())
}

fn free_pair() -> Result<SocketAddr> {
    loop {
        let first = UdpSocket::bind("127.0.0.1:0")?.local_addr()?;
        let Some(next) = first.port().checked_add(1) else {
            continue;
        };
        if UdpSocket::bind(("127.0.0.1", next)).is_ok() {
            return Ok(first);
        }
    }
}
