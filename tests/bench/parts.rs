//! What we are measured against where no other program is: the floors.
//!
//! ```text
//! parts floor ADDRESS OBJECTS      a Pingora server that writes bytes from memory and does nothing else
//! parts kernel ADDRESS OBJECTS     the same bytes by `read`, `writev` and `epoll` alone
//! parts nodes ADDRESS DIR          the floor, but two slices of three come from two other processes by bare quinn
//! parts pread FILE PIECE SECONDS   random aligned reads of PIECE bytes
//! parts write FILE MIB             a sequential write with a checksum per 64 KiB
//! parts quic KIND SECONDS          slices of 1 MiB between two QUIC endpoints: bare, apart or ours
//! ```
//!
//! Built with the release profile, as the daemon is; each but `floor`,
//! `kernel` and `nodes` prints one line of JSON. Not here: who is run when, and what it means (`main`).

use std::collections::HashMap;
use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt;
use futures::stream;
use pingora_core::server::Server;
use pingora_core::server::configuration::{Opt, ServerConf};
use pingora_core::upstreams::peer::HttpPeer;
use pingora_core::{Error, ErrorType, OrErr};
use pingora_http::ResponseHeader;
use pingora_proxy::{ProxyHttp, Session, http_proxy_service};
use pingora_slice_cluster::crc32c::crc32c;
use rand::Rng;
use rustix::time::{ClockId, clock_gettime};

mod kernel;
mod quic;
mod stat;

const MIB: usize = 1024 * 1024;
/// Largest object that the floor answers with.
const FLOOR_BYTES: usize = 1024 * MIB;
/// A checksum covers this many bytes, as in the daemon.
const PAGE_BYTES: usize = 64 * 1024;

/// As in the daemon. glibc's may give each buffer of a MiB back to the kernel, by how
/// its heap happens to lie, and then takes 160 page faults for the next one.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args()
        .skip(1)
        .filter(|a| a != "--bench")
        .collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments.as_slice() {
        ["floor", address, objects] => floor(address, objects.parse()?, None),
        ["kernel", address, objects] => {
            kernel::serve(address, &everything(), &small_objects(objects.parse()?))
        }
        ["nodes", address, dir] => floor(address, 0, Some(quic::Others::start(dir.as_ref())?)),
        ["pread", file, piece, seconds] => pread(file, piece.parse()?, seconds.parse()?),
        ["write", file, mib] => write(file, mib.parse()?),
        ["quic", kind, seconds] => quic::run(kind, Duration::from_secs_f64(seconds.parse()?)),
        ["quic-owner", dir] => quic::own(dir.as_ref()),
        // Started by `cargo bench` without an argument: nothing to do.
        [] => Ok(()),
        other => bail!("{other:?}: see the top of tests/bench/parts.rs"),
    }
}

/// `GET /BYTES` is answered with that many bytes, or a range of them;
/// `GET /1024?OBJECT` with an object of its own.
struct Floor {
    bytes: Bytes,
    objects: HashMap<String, Bytes>,
    others: Option<quic::Others>,
}

#[async_trait]
impl ProxyHttp for Floor {
    type CTX = ();

    fn new_ctx(&self) {}

    async fn upstream_peer(
        &self,
        _: &mut Session,
        _: &mut (),
    ) -> pingora_core::Result<Box<HttpPeer>> {
        Error::e_explain(ErrorType::InternalError, "the floor asks nobody")
    }

    async fn request_filter(
        &self,
        session: &mut Session,
        _: &mut (),
    ) -> pingora_core::Result<bool> {
        let head = session.req_header();
        let total: usize = head.uri.path()[1..].parse().unwrap_or_default();
        let range = head.headers.get("range").and_then(|value| {
            let (first, last) = value
                .to_str()
                .ok()?
                .strip_prefix("bytes=")?
                .split_once('-')?;
            Some(first.parse::<usize>().ok()?..last.parse::<usize>().ok()? + 1)
        });
        let mut answer = ResponseHeader::build(if range.is_some() { 206 } else { 200 }, Some(4))?;
        if let Some(range) = &range {
            let (first, last) = (range.start, range.end - 1);
            answer.insert_header("content-range", format!("bytes {first}-{last}/{total}"))?;
        }
        let range = range.unwrap_or(0..total);
        let object = head.uri.path_and_query();
        let object = object.and_then(|name| self.objects.get(name.as_str()));
        let bytes = object.unwrap_or(&self.bytes);
        answer.insert_header("content-length", range.len())?;
        session
            .write_response_header(Box::new(answer), false)
            .await?;
        let end = range.end;
        let slices = (range.start / MIB..end.div_ceil(MIB))
            .map(|slice| (slice * MIB).max(range.start)..((slice + 1) * MIB).min(end));
        if let Some(others) = &self.others {
            let mut coming = stream::iter(slices)
                .map(|range| others.slice(bytes, range))
                .buffered(quic::AT_ONCE);
            while let Some(slice) = coming.next().await {
                let slice = slice.or_err(ErrorType::ReadError, "an owner")?;
                session.write_response_body(Some(slice), false).await?;
            }
            session.write_response_body(None, true).await?;
            return Ok(true);
        }
        for slice in slices {
            let is_last = slice.end == end;
            session
                .write_response_body(Some(bytes.slice(slice)), is_last)
                .await?;
        }
        Ok(true)
    }
}

/// What all objects are the beginning of.
fn everything() -> Bytes {
    vec![0x5a; FLOOR_BYTES].into()
}

/// Objects of 1 KiB, by their targets.
fn small_objects(count: u32) -> HashMap<String, Bytes> {
    const OBJECT_BYTES: usize = 1024;
    let object = |object| {
        let target = format!("/{OBJECT_BYTES}?{object}");
        (target, vec![0x5a; OBJECT_BYTES].into())
    };
    (0..count).map(object).collect()
}

fn floor(address: &str, objects: u32, others: Option<quic::Others>) -> Result<()> {
    let conf = ServerConf {
        threads: 1,
        ..ServerConf::default()
    };
    let mut server = Server::new_with_opt_and_conf(Opt::default(), conf);
    server.bootstrap();
    let floor = Floor {
        bytes: everything(),
        objects: small_objects(objects),
        others,
    };
    let mut service = http_proxy_service(&server.configuration, floor);
    service.add_tcp(address);
    server.add_service(service);
    server.run_forever()
}

/// CPU time of this process so far.
fn cpu() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// What a large buffer's address is a multiple of.
const ALIGNED: usize = 4096;

fn pread(file: &str, piece: usize, seconds: f64) -> Result<()> {
    let file = File::open(file)?;
    let pieces = file.metadata()?.len() as usize / piece;
    // As an allocator of large blocks aligns it: 16 bytes beside a page's begin, as
    // glibc gives it, the kernel's copy takes six times as long on some processors.
    let mut room = vec![0; piece + ALIGNED];
    let start = room.as_ptr().align_offset(ALIGNED);
    let buffer = &mut room[start..start + piece];
    let (begin, cpu_before) = (Instant::now(), cpu());
    let mut reads = 0u64;
    while begin.elapsed().as_secs_f64() < seconds {
        let at = rand::rng().random_range(0..pieces) * piece;
        file.read_exact_at(buffer, at as u64)?;
        reads += 1;
    }
    let mib = reads as f64 * piece as f64 / MIB as f64;
    println!(
        "{{\"per_second\": {}, \"cpu_us_per_mib\": {}}}",
        reads as f64 / begin.elapsed().as_secs_f64(),
        (cpu() - cpu_before).as_secs_f64() * 1e6 / mib
    );
    Ok(())
}

fn write(path: &str, mib: usize) -> Result<()> {
    let block = vec![0x5a; MIB];
    let mut file = File::create(path)?;
    let cpu_before = cpu();
    let mut sum = 0u32;
    for _ in 0..mib {
        for page in block.chunks(PAGE_BYTES) {
            sum ^= crc32c(std::hint::black_box(page));
        }
        file.write_all(&block)?;
    }
    let spent = cpu() - cpu_before;
    drop(file);
    std::fs::remove_file(path).context("removing what was written")?;
    std::hint::black_box(sum);
    println!(
        "{{\"cpu_us_per_mib\": {}}}",
        spent.as_secs_f64() * 1e6 / mib as f64
    );
    Ok(())
}
