//! A static file server: the origin of the demo and of the compose file.
//!
//! GET and HEAD of regular files below one directory, with single ranges,
//! conditions, a strong ETag (length and modification time) and
//! Last-Modified. One line per request on standard output: what was asked,
//! what was answered, and how many body bytes left. Not for the Internet:
//! no TLS, no listings, nothing configurable.

use std::io;
use std::ops::Range;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::BytesMut;
use tokio::fs::File;
use tokio::io::{AsyncReadExt, AsyncSeekExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::timeout;

/// Longest request head.
const HEAD_BYTES_MAX: usize = 16 * 1024;
/// Connections at once; more wait in the listen queue.
const CONNECTIONS_MAX: usize = 512;
/// Longest silence of a client, between requests and while it reads.
const SILENCE_MAX: Duration = Duration::from_secs(60);
/// Bytes read and sent at once.
const PIECE_BYTES: usize = 256 * 1024;
/// How long caches may use an answer without asking again. Short of forever,
/// so that the difference between expired and purged can be seen.
const CACHE_CONTROL: &str = "public, max-age=600";

/// Serves the files below `dir` until the process ends.
pub async fn serve(listener: TcpListener, dir: PathBuf) -> io::Result<()> {
    let dir: Arc<Path> = dir.into();
    let permits = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let permit = permits
            .clone()
            .acquire_owned()
            .await
            .map_err(io::Error::other)?;
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of descriptors, mostly: some will be free in a moment.
                eprintln!("accept: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let dir = dir.clone();
        tokio::spawn(async move {
            // An error is the client's: it left, was silent, or does not speak HTTP.
            let _ = connection(stream, &dir).await;
            drop(permit);
        });
    }
}

async fn connection(mut stream: TcpStream, dir: &Path) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut buffer = BytesMut::new();
    while let Some(request) = timeout(SILENCE_MAX, read_request(&mut stream, &mut buffer)).await?? {
        let answer = answer(&request, dir).await;
        let sent = send(&mut stream, &request, answer).await?;
        if sent == After::Close || request.close {
            break;
        }
    }
    stream.shutdown().await
}

#[derive(Default)]
struct Request {
    method: String,
    target: String,
    range: Option<String>,
    if_range: Option<String>,
    if_none_match: Option<String>,
    if_modified_since: Option<String>,
    /// Nothing more can be read from this connection.
    close: bool,
}

async fn read_request(
    stream: &mut TcpStream,
    buffer: &mut BytesMut,
) -> io::Result<Option<Request>> {
    let bad = |reason: &str| io::Error::new(io::ErrorKind::InvalidData, reason.to_owned());
    loop {
        let mut headers = [httparse::EMPTY_HEADER; 64];
        let mut head = httparse::Request::new(&mut headers);
        if let httparse::Status::Complete(length) = head
            .parse(buffer)
            .map_err(|error| bad(&error.to_string()))?
        {
            let mut request = Request {
                method: head.method.unwrap_or_default().to_owned(),
                target: head.path.unwrap_or_default().to_owned(),
                close: head.version == Some(0),
                ..Request::default()
            };
            for header in head.headers.iter() {
                let value = String::from_utf8_lossy(header.value).trim().to_owned();
                match header.name.to_ascii_lowercase().as_str() {
                    "range" => request.range = Some(value),
                    "if-range" => request.if_range = Some(value),
                    "if-none-match" => request.if_none_match = Some(value),
                    "if-modified-since" => request.if_modified_since = Some(value),
                    "connection" => request.close |= value.eq_ignore_ascii_case("close"),
                    // Bodies are not read, so what follows one cannot be understood.
                    "content-length" => request.close |= value != "0",
                    "transfer-encoding" => request.close = true,
                    _ => {}
                }
            }
            let _ = buffer.split_to(length);
            return Ok(Some(request));
        }
        if buffer.len() > HEAD_BYTES_MAX {
            return Err(bad("the head is too long"));
        }
        if stream.read_buf(buffer).await? == 0 {
            return if buffer.is_empty() {
                Ok(None)
            } else {
                Err(bad("half a head"))
            };
        }
    }
}

struct Answer {
    status: u16,
    headers: String,
    /// The file and the bytes of it that are the body.
    body: Option<(File, Range<u64>)>,
}

impl Answer {
    fn bare(status: u16) -> Answer {
        Answer {
            status,
            headers: String::new(),
            body: None,
        }
    }
}

/// Finds the file and applies conditions and range (RFC 9110, sections 13 and 14).
async fn answer(request: &Request, dir: &Path) -> Answer {
    if !matches!(request.method.as_str(), "GET" | "HEAD") {
        return Answer {
            headers: "Allow: GET, HEAD\r\n".into(),
            ..Answer::bare(405)
        };
    }
    let Some(path) = local_path(dir, &request.target) else {
        return Answer::bare(404);
    };
    // Opened first and measured then: both are of the same file.
    let Ok(file) = File::open(&path).await else {
        return Answer::bare(404);
    };
    let Ok(meta) = file.metadata().await else {
        return Answer::bare(404);
    };
    if !meta.is_file() {
        return Answer::bare(404);
    }
    let length = meta.len();
    let modified = meta.modified().unwrap_or(UNIX_EPOCH);
    let since_epoch = modified.duration_since(UNIX_EPOCH).unwrap_or_default();
    let etag = format!("\"{length:x}-{:x}\"", since_epoch.as_nanos());
    let date = httpdate::fmt_http_date(modified);
    let mut headers = format!(
        "ETag: {etag}\r\nLast-Modified: {date}\r\nCache-Control: {CACHE_CONTROL}\r\nAccept-Ranges: bytes\r\n"
    );

    let unchanged = match (&request.if_none_match, &request.if_modified_since) {
        (Some(tags), _) => tags
            .split(',')
            .any(|tag| tag.trim() == "*" || tag.trim().trim_start_matches("W/") == etag),
        // Dates have whole seconds.
        (None, Some(limit)) => httpdate::parse_http_date(limit)
            .is_ok_and(|limit| modified < limit + Duration::from_secs(1)),
        (None, None) => false,
    };
    if unchanged {
        return Answer {
            headers,
            ..Answer::bare(304)
        };
    }
    let applies = request
        .if_range
        .as_ref()
        .is_none_or(|value| *value == etag || *value == date);
    let wanted = request
        .range
        .as_deref()
        .filter(|_| applies && request.method == "GET");
    let (status, range) = match wanted.and_then(|value| parse_range(value, length)) {
        None => (200, 0..length),
        Some(range) if range.is_empty() => {
            headers.push_str(&format!("Content-Range: bytes */{length}\r\n"));
            return Answer {
                headers,
                ..Answer::bare(416)
            };
        }
        Some(range) => {
            headers.push_str(&format!(
                "Content-Range: bytes {}-{}/{length}\r\n",
                range.start,
                range.end - 1
            ));
            (206, range)
        }
    };
    Answer {
        status,
        headers,
        body: Some((file, range)),
    }
}

/// The file that `target` names; `None` for what leaves the directory or is
/// not plain (`..`, percent-encoding that is not UTF-8).
fn local_path(dir: &Path, target: &str) -> Option<PathBuf> {
    let path = target.split('?').next()?.strip_prefix('/')?;
    let mut decoded = Vec::with_capacity(path.len());
    let mut bytes = path.bytes();
    while let Some(byte) = bytes.next() {
        if byte != b'%' {
            decoded.push(byte);
            continue;
        }
        let digits = [bytes.next()?, bytes.next()?];
        decoded.push(u8::from_str_radix(std::str::from_utf8(&digits).ok()?, 16).ok()?);
    }
    let path = PathBuf::from(String::from_utf8(decoded).ok()?);
    let plain = path
        .components()
        .all(|part| matches!(part, Component::Normal(_)));
    plain.then(|| dir.join(path))
}

/// The bytes that a Range header asks for: empty when there are none of them,
/// `None` when the header is to be ignored (a list, another unit, nonsense).
fn parse_range(value: &str, length: u64) -> Option<Range<u64>> {
    let (first, last) = value.strip_prefix("bytes=")?.split_once('-')?;
    if first.is_empty() {
        let suffix: u64 = last.parse().ok()?;
        return Some(length.saturating_sub(suffix)..length);
    }
    let first: u64 = first.parse().ok()?;
    let last: u64 = if last.is_empty() {
        u64::MAX - 1
    } else {
        last.parse().ok()?
    };
    if first > last {
        return None;
    }
    Some(first.min(length)..last.saturating_add(1).min(length))
}

#[derive(PartialEq, Eq)]
enum After {
    Keep,
    Close,
}

async fn send(stream: &mut TcpStream, request: &Request, answer: Answer) -> io::Result<After> {
    let range = answer
        .body
        .as_ref()
        .map_or(0..0, |(_, range)| range.clone());
    let length = match answer.status {
        304 => String::new(),
        _ => format!("Content-Length: {}\r\n", range.end - range.start),
    };
    let reason = match answer.status {
        200 => "OK",
        206 => "Partial Content",
        304 => "Not Modified",
        404 => "Not Found",
        405 => "Method Not Allowed",
        _ => "Range Not Satisfiable",
    };
    let date = httpdate::fmt_http_date(SystemTime::now());
    let head = format!(
        "HTTP/1.1 {} {reason}\r\nDate: {date}\r\n{}{length}\r\n",
        answer.status, answer.headers
    );
    let mut sent = 0;
    let result = async {
        timeout(SILENCE_MAX, stream.write_all(head.as_bytes())).await??;
        let Some((mut file, range)) = answer.body.filter(|_| request.method == "GET") else {
            return Ok(After::Keep);
        };
        file.seek(io::SeekFrom::Start(range.start)).await?;
        let mut piece = vec![0; PIECE_BYTES];
        let mut rest = range.end - range.start;
        while rest > 0 {
            let want = piece.len().min(usize::try_from(rest).unwrap_or(usize::MAX));
            let got = file.read(&mut piece[..want]).await?;
            if got == 0 {
                // The file has shrunk: the promised length cannot be kept.
                return Ok(After::Close);
            }
            timeout(SILENCE_MAX, stream.write_all(&piece[..got])).await??;
            rest -= got as u64;
            sent += got as u64;
        }
        Ok(After::Keep)
    }
    .await;
    let range = request.range.as_deref().unwrap_or("-");
    println!(
        "{} {} {range} {} {sent}",
        request.method, request.target, answer.status
    );
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges() {
        for (value, range) in [
            ("bytes=0-0", Some(0..1)),
            ("bytes=5-", Some(5..10)),
            ("bytes=-4", Some(6..10)),
            ("bytes=-40", Some(0..10)),
            ("bytes=9-99999999999999999999", None),
            ("bytes=9-18446744073709551615", Some(9..10)),
            ("bytes=10-", Some(10..10)),
            ("bytes=-0", Some(10..10)),
            ("bytes=5-2", None),
            ("bytes=0-1,3-4", None),
            ("lines=0-1", None),
        ] {
            assert_eq!(parse_range(value, 10), range, "{value}");
        }
    }

    #[test]
    fn paths_stay_below_the_directory() {
        let dir = Path::new("/files");
        assert_eq!(
            local_path(dir, "/a/b%20c?x=/.."),
            Some("/files/a/b c".into())
        );
        for target in [
            "/../a",
            "/a/../../b",
            "/%2e%2e/a",
            "//etc/passwd",
            "a",
            "/%zz",
            "/%f0",
        ] {
            assert_eq!(local_path(dir, target), None, "{target}");
        }
    }
}
