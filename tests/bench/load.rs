//! Load: wrk on the client's core, one plain client, a relay that delays.

use std::io::{Read as _, Write as _};
use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::time::Instant as TokioInstant;

use crate::machine::CLIENT_CORE;

/// Longest that a read may take: a cold object behind a slow relay.
const SILENCE_MAX: Duration = Duration::from_secs(60);
/// Bytes read at once.
const READ_BYTES: usize = 1024 * 1024;

/// What is asked for, again and again.
#[derive(Clone, Copy)]
pub enum Pattern {
    /// One URL.
    Whole { path: &'static str },
    /// Ranges of `piece` bytes that begin at random multiples of `align`.
    Ranges {
        path: &'static str,
        total: u64,
        piece: u64,
        align: u64,
    },
    /// Random ones of `count` URLs.
    Many { path: &'static str, count: u64 },
}

/// What wrk has seen.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// Answers per second.
    pub per_second: f64,
    /// Answers in all.
    pub requests: f64,
    /// Body and head bytes in all.
    pub bytes: f64,
}

const SCRIPT: &str = r#"
local ready = {}
function init(args)
  local kind, path = args[1], args[2]
  math.randomseed(os.time())
  local prepared = 8192
  for i = 1, prepared do
    if kind == "ranges" then
      local total, piece, align = tonumber(args[3]), tonumber(args[4]), tonumber(args[5])
      local first = math.random(0, math.floor((total - piece) / align)) * align
      local range = string.format("bytes=%d-%d", first, first + piece - 1)
      ready[i] = wrk.format("GET", path, { Range = range })
    elseif kind == "many" then
      local count = tonumber(args[3])
      ready[i] = wrk.format("GET", path .. "?" .. math.random(0, count - 1))
    else
      ready[i] = wrk.format("GET", path)
    end
  end
end
local at = 0
function request()
  at = at % #ready + 1
  return ready[at]
end
function done(summary, latency, requests)
  local e = summary.errors
  io.write(string.format("RESULT %d %d %d %d\n", summary.requests, summary.duration, summary.bytes,
    e.connect + e.read + e.write + e.status + e.timeout))
end
"#;

/// Runs wrk for `time`; any failed answer fails the measurement.
pub async fn wrk(
    dir: &Path,
    address: SocketAddr,
    connections: usize,
    time: Duration,
    pattern: Pattern,
) -> Result<Load> {
    let script = dir.join("wrk.lua");
    std::fs::write(&script, SCRIPT)?;
    let arguments = match pattern {
        Pattern::Whole { path } => vec!["whole".to_owned(), path.to_owned()],
        Pattern::Ranges {
            path,
            total,
            piece,
            align,
        } => vec![
            "ranges".to_owned(),
            path.to_owned(),
            total.to_string(),
            piece.to_string(),
            align.to_string(),
        ],
        Pattern::Many { path, count } => {
            vec!["many".to_owned(), path.to_owned(), count.to_string()]
        }
    };
    let output = tokio::process::Command::new("taskset")
        .args(["-c", &CLIENT_CORE.to_string(), "wrk", "-t1"])
        .arg(format!("-c{connections}"))
        .arg(format!("-d{}s", time.as_secs().max(1)))
        .args(["--timeout", "20s", "-s"])
        .arg(script)
        .arg(format!("http://{address}/"))
        .arg("--")
        .args(arguments)
        .output()
        .await?;
    let text = String::from_utf8_lossy(&output.stdout);
    let numbers: Vec<f64> = text
        .lines()
        .find_map(|line| line.strip_prefix("RESULT "))
        .with_context(|| format!("wrk: {text}{}", String::from_utf8_lossy(&output.stderr)))?
        .split(' ')
        .map(str::parse)
        .collect::<Result<_, _>>()?;
    let [requests, microseconds, bytes, errors] = numbers[..] else {
        anyhow::bail!("wrk: {text}");
    };
    ensure!(
        errors == 0.0,
        "{errors} answers of {address} failed: {text}"
    );
    Ok(Load {
        per_second: requests / (microseconds / 1e6),
        requests,
        bytes,
    })
}

/// Reads one answer to its end; returns its body's length and the time it took.
/// Plain reads of whatever is there: the client must not be what is measured.
pub async fn read(address: SocketAddr, target: &str) -> Result<(u64, Duration)> {
    let target = target.to_owned();
    tokio::task::spawn_blocking(move || read_blocking(address, &target)).await?
}

fn read_blocking(address: SocketAddr, target: &str) -> Result<(u64, Duration)> {
    let begin = Instant::now();
    let mut stream = std::net::TcpStream::connect(address)?;
    stream.set_read_timeout(Some(SILENCE_MAX))?;
    write!(
        stream,
        "GET {target} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n"
    )?;
    let mut buffer = vec![0; READ_BYTES];
    let mut filled = 0;
    let head_end = loop {
        let count = stream.read(&mut buffer[filled..])?;
        ensure!(count > 0, "{target}: no answer");
        filled += count;
        if let Some(at) = buffer[..filled].windows(4).position(|w| w == b"\r\n\r\n") {
            break at + 4;
        }
    };
    let head = String::from_utf8_lossy(&buffer[..head_end]).to_lowercase();
    ensure!(head.starts_with("http/1.1 200"), "{target}: {head}");
    let length: u64 = head
        .lines()
        .find_map(|line| line.strip_prefix("content-length:"))
        .context("an answer without Content-Length")?
        .trim()
        .parse()?;
    let mut bytes = (filled - head_end) as u64;
    while bytes < length {
        let count = stream.read(&mut buffer)?;
        ensure!(count > 0, "{target}: ended at {bytes} of {length}");
        bytes += count as u64;
    }
    Ok((bytes, begin.elapsed()))
}

/// Bytes that a relay holds in each direction of a connection, in pieces of
/// [`RELAY_PIECE_BYTES`]: more than any window of the kernel.
const RELAY_PIECES_MAX: usize = 1024;
const RELAY_PIECE_BYTES: usize = 64 * 1024;

/// A relay to `upstream` that keeps everything for half of `round_trip` each way.
pub async fn delaying_relay(upstream: SocketAddr, round_trip: Duration) -> Result<SocketAddr> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            tokio::spawn(async move {
                // As long as its handshake would have taken.
                tokio::time::sleep(round_trip).await;
                let server = TcpStream::connect(upstream).await?;
                client.set_nodelay(true)?;
                server.set_nodelay(true)?;
                let (from_client, to_client) = client.into_split();
                let (from_server, to_server) = server.into_split();
                tokio::spawn(delay(from_client, to_server, round_trip / 2));
                tokio::spawn(delay(from_server, to_client, round_trip / 2));
                std::io::Result::Ok(())
            });
        }
    });
    Ok(address)
}

async fn delay(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, by: Duration) {
    let (sender, mut pieces) = mpsc::channel::<(TokioInstant, Vec<u8>)>(RELAY_PIECES_MAX);
    tokio::spawn(async move {
        while let Some((due, piece)) = pieces.recv().await {
            tokio::time::sleep_until(due).await;
            if to.write_all(&piece).await.is_err() {
                return;
            }
        }
        let _ = to.shutdown().await;
    });
    let mut buffer = vec![0; RELAY_PIECE_BYTES];
    while let Ok(count @ 1..) = from.read(&mut buffer).await {
        let due = TokioInstant::now() + by;
        if sender.send((due, buffer[..count].to_vec())).await.is_err() {
            return;
        }
    }
}
