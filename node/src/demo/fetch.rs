//! The demo's client: one request, its body digested as it arrives.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use bytes::BytesMut;
use sha2::{Digest, Sha256};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// Longest silence of a node before the demo gives up.
const SILENCE_MAX: Duration = Duration::from_secs(30);
/// Longest answer head.
const HEAD_BYTES_MAX: usize = 64 * 1024;
/// How much of a body is kept as text.
const TEXT_BYTES_MAX: usize = 1024 * 1024;

/// An answer: the body's length and digest, and as much text as fits.
pub struct Fetched {
    /// Status.
    pub status: u16,
    headers: Vec<(String, String)>,
    /// Body bytes received.
    pub bytes: u64,
    /// SHA-256 of the body, hexadecimal.
    pub sha256: String,
    /// The body, up to [`TEXT_BYTES_MAX`].
    pub text: String,
}

impl Fetched {
    /// A header's value, empty when absent.
    pub fn header(&self, name: &str) -> &str {
        let found = self
            .headers
            .iter()
            .find(|(have, _)| have.eq_ignore_ascii_case(name));
        found.map_or("", |(_, value)| value)
    }
}

/// A request under way: the head has come, the body is on its way.
pub struct Body {
    stream: TcpStream,
    buffer: BytesMut,
    framing: Framing,
    fetched: Fetched,
    digest: Sha256,
    text: Vec<u8>,
}

enum Framing {
    /// This many bytes are still to come.
    Length(u64),
    /// Inside a chunk: this many bytes of it are still to come.
    Chunk(u64),
    /// Until the other side closes.
    Close,
    /// Nothing more.
    Done,
}

/// Sends `METHOD target` and reads the whole answer.
pub async fn fetch(
    address: SocketAddr,
    method: &str,
    target: &str,
    headers: &[(&str, &str)],
) -> Result<Fetched> {
    open(address, method, target, headers).await?.finish().await
}

/// Sends `METHOD target` and returns with the answer's head.
pub async fn open(
    address: SocketAddr,
    method: &str,
    target: &str,
    headers: &[(&str, &str)],
) -> Result<Body> {
    let mut stream = timeout(SILENCE_MAX, TcpStream::connect(address)).await??;
    let mut request = format!("{method} {target} HTTP/1.1\r\nConnection: close\r\n");
    if !headers
        .iter()
        .any(|(name, _)| name.eq_ignore_ascii_case("host"))
    {
        request.push_str(&format!("Host: {address}\r\n"));
    }
    for (name, value) in headers {
        request.push_str(&format!("{name}: {value}\r\n"));
    }
    request.push_str("\r\n");
    stream.write_all(request.as_bytes()).await?;

    let mut buffer = BytesMut::new();
    let (status, headers) = loop {
        let mut headers = [httparse::EMPTY_HEADER; 64];
        let mut head = httparse::Response::new(&mut headers);
        if let httparse::Status::Complete(length) = head.parse(&buffer)? {
            let status = head.code.context("no status")?;
            let headers: Vec<(String, String)> = head
                .headers
                .iter()
                .map(|h| {
                    (
                        h.name.to_owned(),
                        String::from_utf8_lossy(h.value).into_owned(),
                    )
                })
                .collect();
            let _ = buffer.split_to(length);
            break (status, headers);
        }
        ensure!(buffer.len() < HEAD_BYTES_MAX, "the head is too long");
        let read = timeout(SILENCE_MAX, stream.read_buf(&mut buffer)).await;
        ensure!(read.context("no answer")?? > 0, "closed without an answer");
    };
    let fetched = Fetched {
        status,
        headers,
        bytes: 0,
        sha256: String::new(),
        text: String::new(),
    };
    let framing = if method == "HEAD" || matches!(status, 204 | 304) {
        Framing::Done
    } else if fetched
        .header("transfer-encoding")
        .eq_ignore_ascii_case("chunked")
    {
        Framing::Chunk(0)
    } else if let Ok(length) = fetched.header("content-length").parse() {
        Framing::Length(length)
    } else {
        Framing::Close
    };
    Ok(Body {
        stream,
        buffer,
        framing,
        fetched,
        digest: Sha256::new(),
        text: Vec::new(),
    })
}

impl Body {
    /// Reads until `bytes` of the body have come, or all of it.
    pub async fn until(&mut self, bytes: u64) -> Result<()> {
        while self.fetched.bytes < bytes && self.step().await? {}
        Ok(())
    }

    /// Reads the rest.
    pub async fn finish(mut self) -> Result<Fetched> {
        while self.step().await? {}
        self.fetched.sha256 = hex::encode(self.digest.finalize());
        self.fetched.text = String::from_utf8_lossy(&self.text).into_owned();
        Ok(self.fetched)
    }

    /// One piece further; false at the end. A body that ends early is an error.
    async fn step(&mut self) -> Result<bool> {
        match self.framing {
            Framing::Done | Framing::Length(0) => return Ok(false),
            Framing::Chunk(0) => {
                // The line break after the chunk before, where there was one.
                if self.fetched.bytes > 0 {
                    self.fill(2).await?;
                    let _ = self.buffer.split_to(2);
                }
                loop {
                    match httparse::parse_chunk_size(&self.buffer) {
                        Ok(httparse::Status::Complete((line, length))) => {
                            let _ = self.buffer.split_to(line);
                            self.framing = if length == 0 {
                                Framing::Done
                            } else {
                                Framing::Chunk(length)
                            };
                            return Ok(length > 0);
                        }
                        Ok(httparse::Status::Partial) => self.fill(self.buffer.len() + 1).await?,
                        Err(_) => bail!("not a chunk"),
                    }
                }
            }
            Framing::Length(_) | Framing::Chunk(_) => self.fill(1).await?,
            Framing::Close => {
                if self.buffer.is_empty() && self.read().await? == 0 {
                    return Ok(false);
                }
            }
        }
        let rest = match &self.framing {
            Framing::Length(rest) | Framing::Chunk(rest) => *rest,
            Framing::Close | Framing::Done => u64::MAX,
        };
        let take = self
            .buffer
            .len()
            .min(usize::try_from(rest).unwrap_or(usize::MAX));
        let piece = self.buffer.split_to(take);
        if let Framing::Length(rest) | Framing::Chunk(rest) = &mut self.framing {
            *rest -= take as u64;
        }
        self.digest.update(&piece);
        self.fetched.bytes += take as u64;
        let room = TEXT_BYTES_MAX.saturating_sub(self.text.len()).min(take);
        self.text.extend_from_slice(&piece[..room]);
        Ok(true)
    }

    async fn fill(&mut self, bytes: usize) -> Result<()> {
        while self.buffer.len() < bytes {
            ensure!(
                self.read().await? > 0,
                "broken off at byte {}",
                self.fetched.bytes
            );
        }
        Ok(())
    }

    async fn read(&mut self) -> Result<usize> {
        self.buffer.reserve(256 * 1024);
        let read = timeout(SILENCE_MAX, self.stream.read_buf(&mut self.buffer)).await;
        Ok(read.with_context(|| format!("silence at byte {}", self.fetched.bytes))??)
    }
}
