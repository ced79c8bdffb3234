//! The origin's side of a connection: read a request, decide, write the answer.
//!
//! `decide` is the model origin, then the fault that changes what it said.
//! `write` does what was decided, byte by byte, and keeps the log.

use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::{Bytes, BytesMut};
use tokio::fs::File;
use tokio::io::{AsyncReadExt, AsyncSeekExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use super::{Fault, Object, Seen, Shared, Source, Validators, lock};

/// Longest request head that is read.
const HEAD_BYTES_MAX: usize = 64 * 1024;
/// Longest request body that is echoed.
const BODY_BYTES_MAX: usize = 64 * 1024 * 1024;
/// Bytes handed to the socket at once.
const PIECE_BYTES: u64 = 256 * 1024;

/// Serves connections until aborted; they end with it.
pub(super) async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    shared.connections.fetch_add(1, Ordering::Relaxed);
                    connections.spawn(connection(stream, shared.clone()));
                }
                Err(error) => panic!("the origin cannot accept: {error}"),
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn connection(mut stream: TcpStream, shared: Arc<Shared>) {
    let _ = stream.set_nodelay(true);
    let mut buffer = BytesMut::new();
    // An error is the other side's: it left, or sent what is not HTTP.
    while let Ok(Some(request)) = read_request(&mut stream, &mut buffer).await {
        let seen = Arc::new(Mutex::new(Seen {
            method: request.method.clone(),
            target: request.target.clone(),
            headers: request.headers.clone(),
            status: 0,
            version: 0,
            body: 0..0,
            sent: 0,
            complete: false,
            ended: false,
        }));
        let object = find(&shared, &request.target);
        let waiting = object.as_ref().map(Waiting::new);
        let answer = decide(&request, object.as_ref());
        // Once the answer is decided: whoever has seen the request may change the object.
        lock(&shared.log).push(seen.clone());
        shared.noted();
        let kept = answer.after == After::Keep && !request.close;
        let written = write(
            &mut stream,
            &shared,
            &seen,
            object.as_ref(),
            &request,
            answer,
            waiting,
        )
        .await;
        lock(&seen).ended = true;
        shared.noted();
        match written {
            Ok(()) if kept => {}
            _ => return,
        }
    }
}

/// A request that has not got its head yet, counted.
struct Waiting(Arc<Mutex<Object>>);

impl Waiting {
    fn new(object: &Arc<Mutex<Object>>) -> Waiting {
        let mut counted = lock(object);
        counted.waiting += 1;
        counted.waiting_max = counted.waiting_max.max(counted.waiting);
        Waiting(object.clone())
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        lock(&self.0).waiting -= 1;
    }
}

struct Request {
    method: String,
    target: String,
    headers: Vec<(String, String)>,
    body: Bytes,
    close: bool,
}

impl Request {
    fn header(&self, name: &str) -> Option<&str> {
        let found = self
            .headers
            .iter()
            .find(|(have, _)| have.eq_ignore_ascii_case(name));
        found.map(|(_, value)| value.as_str())
    }
}

/// The next request of the connection, `None` when it was closed in between.
async fn read_request(
    stream: &mut TcpStream,
    buffer: &mut BytesMut,
) -> io::Result<Option<Request>> {
    let bad = || io::Error::from(io::ErrorKind::InvalidData);
    loop {
        let mut headers = [httparse::EMPTY_HEADER; 100];
        let mut head = httparse::Request::new(&mut headers);
        if let httparse::Status::Complete(length) = head.parse(buffer).map_err(|_| bad())? {
            let mut request = Request {
                method: head.method.unwrap_or_default().to_owned(),
                target: head.path.unwrap_or_default().to_owned(),
                headers: head
                    .headers
                    .iter()
                    .map(|h| {
                        (
                            h.name.to_owned(),
                            String::from_utf8_lossy(h.value).into_owned(),
                        )
                    })
                    .collect(),
                body: Bytes::new(),
                close: head.version == Some(0),
            };
            let _ = buffer.split_to(length);
            request.close |= request
                .header("connection")
                .is_some_and(|v| v.eq_ignore_ascii_case("close"));
            if request.header("expect").is_some() {
                stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").await?;
            }
            request.body = read_body(stream, buffer, &request).await?;
            return Ok(Some(request));
        }
        if buffer.len() > HEAD_BYTES_MAX {
            return Err(bad());
        }
        if stream.read_buf(buffer).await? == 0 {
            return if buffer.is_empty() {
                Ok(None)
            } else {
                Err(bad())
            };
        }
    }
}

async fn read_body(
    stream: &mut TcpStream,
    buffer: &mut BytesMut,
    request: &Request,
) -> io::Result<Bytes> {
    let bad = || io::Error::from(io::ErrorKind::InvalidData);
    if let Some(length) = request.header("content-length") {
        let length: usize = length.parse().map_err(|_| bad())?;
        return take(stream, buffer, length).await;
    }
    let mut body = BytesMut::new();
    if request.header("transfer-encoding").is_some() {
        loop {
            let length = loop {
                match httparse::parse_chunk_size(buffer).map_err(|_| bad())? {
                    httparse::Status::Complete((line, length)) => {
                        let _ = buffer.split_to(line);
                        break length as usize;
                    }
                    httparse::Status::Partial => {
                        if stream.read_buf(buffer).await? == 0 {
                            return Err(bad());
                        }
                    }
                }
            };
            body.extend_from_slice(&take(stream, buffer, length).await?);
            take(stream, buffer, 2).await?;
            if length == 0 {
                break;
            }
        }
    }
    Ok(body.freeze())
}

async fn take(stream: &mut TcpStream, buffer: &mut BytesMut, length: usize) -> io::Result<Bytes> {
    if length > BODY_BYTES_MAX {
        return Err(io::ErrorKind::InvalidData.into());
    }
    while buffer.len() < length {
        if stream.read_buf(buffer).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    Ok(buffer.split_to(length).freeze())
}

/// The object at `target`: published, or a file of a published tree.
fn find(shared: &Shared, target: &str) -> Option<Arc<Mutex<Object>>> {
    let path = target.split('?').next().unwrap_or_default();
    if let Some(object) = lock(&shared.objects).get(path) {
        return Some(object.clone());
    }
    for (prefix, dir) in lock(&shared.trees).iter() {
        let Some(rest) = path.strip_prefix(prefix) else {
            continue;
        };
        let file = dir.join(rest.trim_start_matches('/'));
        let Ok(meta) = std::fs::metadata(&file) else {
            continue;
        };
        if meta.is_file() && !rest.contains("..") {
            let mut object = Object::new(Source::File(file), meta.len());
            object.published = meta.modified().unwrap_or(UNIX_EPOCH);
            return Some(Arc::new(Mutex::new(object)));
        }
    }
    None
}

/// What will be written.
struct Answer {
    status: u16,
    headers: Vec<(String, String)>,
    payload: Payload,
    version: u32,
    chunked: bool,
    /// Content-Length where it is not the payload's own.
    length: Option<u64>,
    /// Stop after this many body bytes, and do what `after` says.
    cut: Option<u64>,
    after: After,
    delay: Duration,
    /// Bytes per second at most.
    pace: Option<u64>,
}

#[derive(PartialEq, Eq)]
enum After {
    Keep,
    Close,
    Stall,
}

enum Payload {
    Text(Bytes),
    Object(BytesFrom, Range<u64>),
    /// Written instead of an answer.
    Raw(Vec<u8>),
}

/// Where the bytes of one answer come from.
enum BytesFrom {
    Generated(crate::content::Content),
    File(PathBuf),
}

impl Answer {
    fn text(status: u16, text: impl Into<Bytes>) -> Answer {
        Answer {
            status,
            headers: Vec::new(),
            payload: Payload::Text(text.into()),
            version: 0,
            chunked: false,
            length: None,
            cut: None,
            after: After::Keep,
            delay: Duration::ZERO,
            pace: None,
        }
    }

    fn header(&mut self, name: &str, value: impl Into<String>) {
        self.headers
            .retain(|(have, _)| !have.eq_ignore_ascii_case(name));
        self.headers.push((name.to_owned(), value.into()));
    }

    fn range(&self) -> Range<u64> {
        match &self.payload {
            Payload::Object(_, range) => range.clone(),
            _ => 0..0,
        }
    }
}

/// What a Range header asks for, of an object of some length.
enum Wanted {
    Whole,
    Part(Range<u64>),
    Nothing,
}

/// One range is honoured; lists and what does not parse are ignored, as a server may.
fn wanted(value: Option<&str>, length: u64) -> Wanted {
    let parse = || {
        let (first, last) = value?.strip_prefix("bytes=")?.trim().split_once('-')?;
        if first.is_empty() {
            let suffix: u64 = last.parse().ok()?;
            return Some((length.saturating_sub(suffix), length));
        }
        let first: u64 = first.parse().ok()?;
        let last: u64 = if last.is_empty() {
            u64::MAX - 1
        } else {
            last.parse().ok()?
        };
        (first <= last).then(|| (first, last.saturating_add(1).min(length)))
    };
    match parse() {
        None => Wanted::Whole,
        Some((start, end)) if start < end => Wanted::Part(start..end),
        Some(_) => Wanted::Nothing,
    }
}

fn etag(object: &Object) -> String {
    match &object.source {
        Source::Generated { seed }
            if matches!(
                object.validators,
                Validators::Unsteady | Validators::UnsteadyAlone
            ) =>
        {
            format!("\"{seed}.{}.{}\"", object.version, object.answers)
        }
        Source::Generated { seed }
            if matches!(
                object.validators,
                Validators::Replicas | Validators::ReplicasAlone
            ) =>
        {
            format!("\"{seed}.{}.{}\"", object.version, object.answers % 2)
        }
        Source::Generated { seed } => format!("\"{seed}.{}\"", object.version),
        Source::File(_) => {
            let modified = object
                .published
                .duration_since(UNIX_EPOCH)
                .unwrap_or_default();
            format!("\"{:x}.{:x}\"", object.length(), modified.as_nanos())
        }
    }
}

/// A second later for each version: Last-Modified knows no less.
fn modified(object: &Object) -> SystemTime {
    let own = object.published + Duration::from_secs(u64::from(object.version) - 1);
    object.modified.unwrap_or(own)
}

/// Dates in headers have whole seconds.
fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs()
}

fn decide(request: &Request, object: Option<&Arc<Mutex<Object>>>) -> Answer {
    if !matches!(request.method.as_str(), "GET" | "HEAD") {
        return Answer::text(200, request.body.clone());
    }
    let Some(object) = object else {
        return Answer::text(404, "nothing is published here\n");
    };
    let mut object = lock(object);
    object.answers += 1;
    let length = object.length();
    let range = wanted(request.header("range"), length);
    let start = match &range {
        Wanted::Part(range) => range.start,
        _ => 0,
    };
    let fault = object.fault(start, |name| request.header(name));
    let mut answer = model(request, &object, range, fault.as_ref());
    answer.version = object.version;
    if let Some(fault) = fault {
        disturb(&mut answer, fault, length);
    }
    answer
}

/// RFC 9110, sections 13 and 14.
fn model(request: &Request, object: &Object, range: Wanted, fault: Option<&Fault>) -> Answer {
    use Validators::{
        Date, Nothing, Replicas, ReplicasAlone, Strong, StrongAlone, Unsteady, UnsteadyAlone, Weak,
        WeakAlone,
    };
    let strong = etag(object);
    let etag = match object.validators {
        Strong | StrongAlone | Unsteady | UnsteadyAlone | Replicas | ReplicasAlone => Some(strong),
        Weak | WeakAlone => Some(format!("W/{strong}")),
        Date | Nothing => None,
    };
    let modified = match object.validators {
        Strong | Unsteady | Replicas | Weak | Date => Some(modified(object)),
        StrongAlone | UnsteadyAlone | ReplicasAlone | WeakAlone | Nothing => None,
    };
    let headers = |answer: &mut Answer| {
        for (name, value) in &object.headers {
            answer.headers.push((name.clone(), value.clone()));
        }
        if let Some(etag) = &etag {
            answer.header("ETag", etag.clone());
        }
        if let Some(modified) = modified {
            answer.header("Last-Modified", httpdate::fmt_http_date(modified));
        }
        answer.header("Accept-Ranges", "bytes");
    };
    let empty = |status| {
        let mut answer = Answer::text(status, "");
        headers(&mut answer);
        answer
    };

    let opaque = |tag: &str| tag.trim().trim_start_matches("W/").to_owned();
    let listed = |value: &str, weakly: bool| {
        value.trim() == "*"
            || etag.as_deref().is_some_and(|etag| {
                value.split(',').any(|given| match weakly {
                    true => opaque(given) == opaque(etag),
                    false => given.trim() == etag && !etag.starts_with("W/"),
                })
            })
    };
    let date = |value: &str| httpdate::parse_http_date(value).ok().map(seconds);
    let newest = modified.map(seconds);
    if let Some(value) = request.header("if-match") {
        if !listed(value, false) {
            return empty(412);
        }
    } else if let Some(limit) = request.header("if-unmodified-since").and_then(date)
        && newest.is_some_and(|newest| newest > limit)
    {
        return empty(412);
    }
    if let Some(value) = request.header("if-none-match") {
        if listed(value, true) {
            return empty(304);
        }
    } else if let Some(limit) = request.header("if-modified-since").and_then(date)
        && newest.is_some_and(|newest| newest <= limit)
    {
        return empty(304);
    }
    let range = match request.header("if-range") {
        Some(value) if value.contains('"') && !listed(value, false) => Wanted::Whole,
        Some(value) if !value.contains('"') && date(value) != newest => Wanted::Whole,
        _ => range,
    };

    let length = object.length();
    let (status, range) = match range {
        _ if matches!(
            fault,
            Some(
                Fault::IgnoreRange
                    | Fault::GzipWhereTaken
                    | Fault::NoLength
                    | Fault::NoLengthCloseAfter(_)
                    | Fault::NoLengthEndAfter(_)
            )
        ) =>
        {
            (200, 0..length)
        }
        Wanted::Whole => (200, 0..length),
        Wanted::Part(range) => (206, range),
        Wanted::Nothing => {
            let mut answer = empty(416);
            answer.header("Content-Range", format!("bytes */{length}"));
            return answer;
        }
    };
    let mut answer = empty(status);
    if status == 206 {
        answer.header("Content-Range", content_range(&range, length));
    }
    let bytes = match &object.source {
        Source::File(path) => BytesFrom::File(path.clone()),
        Source::Generated { .. } => {
            let variant = object
                .vary
                .as_deref()
                .map(|name| request.header(name).unwrap_or(""));
            BytesFrom::Generated(object.content(object.version, variant))
        }
    };
    answer.payload = Payload::Object(bytes, range);
    answer
}

fn content_range(range: &Range<u64>, length: u64) -> String {
    format!(
        "bytes {}-{}/{length}",
        range.start,
        range.end.saturating_sub(1)
    )
}

/// Makes a right answer wrong.
fn disturb(answer: &mut Answer, fault: Fault, length: u64) {
    let part = answer.status == 206;
    let mut range = answer.range();
    match fault {
        // Done by `model`.
        Fault::IgnoreRange => {}
        Fault::Delay(time) => answer.delay = time,
        Fault::StallAfter(bytes) => (answer.cut, answer.after) = (Some(bytes), After::Stall),
        Fault::Drip(pace) => answer.pace = Some(pace),
        Fault::CloseAfter(bytes) => (answer.cut, answer.after) = (Some(bytes), After::Close),
        Fault::Hangup => {
            answer.payload = Payload::Raw(Vec::new());
            answer.after = After::Close;
        }
        Fault::Garbage(bytes) => {
            answer.payload = Payload::Raw(bytes);
            answer.after = After::Close;
        }
        Fault::ContentRange(text) => {
            answer.headers.retain(|(name, _)| name != "Content-Range");
            if part && !text.is_empty() {
                answer.header("Content-Range", text);
            }
        }
        Fault::NoContentRange => answer.headers.retain(|(name, _)| name != "Content-Range"),
        Fault::NoLength => answer.chunked = true,
        Fault::NoLengthCloseAfter(bytes) => {
            answer.chunked = true;
            (answer.cut, answer.after) = (Some(bytes), After::Close);
        }
        Fault::NoLengthEndAfter(bytes) => {
            answer.chunked = true;
            range.end = range.end.min(range.start + bytes);
        }
        Fault::WrongUnit if part => {
            let right = content_range(&range, length);
            answer.header("Content-Range", right.replace("bytes", "items"));
        }
        Fault::LongBody if part && range.end < length => {
            answer.chunked = true;
            range.end += 1;
        }
        Fault::Gzip => answer.header("Content-Encoding", "gzip"),
        Fault::GzipWhereTaken => {
            answer.header("Content-Encoding", "gzip");
            answer.header("ETag", "\"of the encoded\"");
        }
        Fault::WrongTotal if part => {
            answer.header("Content-Range", content_range(&range, length + 1));
        }
        Fault::ShiftedRange if part && range.end - range.start > 1 => {
            range.start += 1;
            answer.header("Content-Range", content_range(&range, length));
        }
        Fault::ShortRange if part && range.end - range.start > 1 => {
            range.end -= 1;
            answer.header("Content-Range", content_range(&range, length));
        }
        Fault::ShortBody if range.end - range.start > 1 => range.end -= 1,
        // Lies about ranges tell nothing where there is no range.
        Fault::WrongTotal
        | Fault::WrongUnit
        | Fault::LongBody
        | Fault::ShiftedRange
        | Fault::ShortRange
        | Fault::ShortBody => {}
        Fault::Status(status) => *answer = Answer::text(status, format!("{status}, as told\n")),
        Fault::Refuses(_, status) => {
            *answer = Answer::text(status, format!("{status} for you\n"));
            answer.delay = Duration::from_secs(1);
        }
        Fault::Unsatisfiable => {
            *answer = Answer::text(416, "");
            answer.header("Content-Range", format!("bytes */{length}"));
        }
        Fault::Redirect(location) => {
            *answer = Answer::text(302, "elsewhere\n");
            answer.header("Location", location);
        }
    }
    if let Payload::Object(_, planned) = &mut answer.payload {
        *planned = range;
    }
}

async fn write(
    stream: &mut TcpStream,
    shared: &Shared,
    seen: &Mutex<Seen>,
    object: Option<&Arc<Mutex<Object>>>,
    request: &Request,
    answer: Answer,
    waiting: Option<Waiting>,
) -> io::Result<()> {
    {
        let mut seen = lock(seen);
        seen.status = answer.status;
        seen.version = answer.version;
        seen.body = answer.range();
    }
    if !answer.delay.is_zero() {
        tokio::time::sleep(answer.delay).await;
    }
    // Before the first byte: whoever gets it may send the next request at once.
    drop(waiting);
    let body_bytes = match &answer.payload {
        Payload::Raw(bytes) => {
            stream.write_all(bytes).await?;
            stream.shutdown().await?;
            return Ok(());
        }
        Payload::Text(text) => text.len() as u64,
        Payload::Object(_, range) => range.end - range.start,
    };
    let mut head = format!("HTTP/1.1 {} .\r\n", answer.status);
    let is_date = |name: &str| name.eq_ignore_ascii_case("date");
    if !answer.headers.iter().any(|(name, _)| is_date(name)) {
        head.push_str(&format!("Date: {}\r\n", now()));
    }
    let stated = |(name, value): &&(String, String)| !(is_date(name) && value.is_empty());
    for (name, value) in answer.headers.iter().filter(stated) {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    if answer.chunked {
        head.push_str("Transfer-Encoding: chunked\r\n");
    } else if answer.status != 304 {
        head.push_str(&format!(
            "Content-Length: {}\r\n",
            answer.length.unwrap_or(body_bytes)
        ));
    }
    head.push_str("\r\n");
    stream.write_all(head.as_bytes()).await?;
    shared.noted();

    let bodiless = request.method == "HEAD" || answer.status == 304;
    if !bodiless {
        match answer.payload {
            Payload::Raw(_) => {}
            Payload::Text(text) => stream.write_all(&text).await?,
            Payload::Object(bytes, range) => {
                let cut = answer.cut.unwrap_or(u64::MAX);
                let end = range.end.min(range.start.saturating_add(cut));
                let sending = Sending {
                    shared,
                    seen,
                    object,
                    chunked: answer.chunked,
                    pace: answer.pace,
                };
                sending.body(stream, bytes, range.start..end).await?;
                if end < range.end || answer.after != After::Keep {
                    return finish_early(stream, &answer.after).await;
                }
                if answer.chunked {
                    stream.write_all(b"0\r\n\r\n").await?;
                }
            }
        }
    }
    lock(seen).complete = true;
    shared.noted();
    Ok(())
}

async fn finish_early(stream: &mut TcpStream, after: &After) -> io::Result<()> {
    if *after == After::Stall {
        closed(stream).await;
    }
    stream.shutdown().await
}

fn now() -> String {
    httpdate::fmt_http_date(SystemTime::now())
}

/// Completes when the other side has closed.
async fn closed(stream: &TcpStream) {
    let mut byte = [0];
    match stream.peek(&mut byte).await {
        Ok(0) | Err(_) => {}
        // It has asked for more already: all that is left is to wait.
        Ok(_) => std::future::pending().await,
    }
}

struct Sending<'a> {
    shared: &'a Shared,
    seen: &'a Mutex<Seen>,
    object: Option<&'a Arc<Mutex<Object>>>,
    chunked: bool,
    pace: Option<u64>,
}

impl Sending<'_> {
    async fn body(
        &self,
        stream: &mut TcpStream,
        bytes: BytesFrom,
        range: Range<u64>,
    ) -> io::Result<()> {
        let mut file = match &bytes {
            BytesFrom::Generated(_) => None,
            BytesFrom::File(path) => {
                let mut file = File::open(path).await?;
                file.seek(io::SeekFrom::Start(range.start)).await?;
                Some(file)
            }
        };
        let mut at = range.start;
        loop {
            let next = self.gate(stream, at).await?;
            if at == range.end {
                return Ok(());
            }
            let mut end = range.end.min(at + PIECE_BYTES).min(next);
            if let Some(pace) = self.pace {
                // A piece each 20 ms: slow, but never quite still.
                end = end.min(at + (pace / 50).max(1));
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            let piece = match (&bytes, &mut file) {
                (BytesFrom::Generated(content), _) => content.bytes(at..end),
                (BytesFrom::File(_), Some(file)) => {
                    let mut piece = vec![0; (end - at) as usize];
                    file.read_exact(&mut piece).await?;
                    piece.into()
                }
                (BytesFrom::File(_), None) => unreachable!("opened above"),
            };
            if self.chunked {
                stream
                    .write_all(format!("{:x}\r\n", piece.len()).as_bytes())
                    .await?;
            }
            stream.write_all(&piece).await?;
            if self.chunked {
                stream.write_all(b"\r\n").await?;
            }
            at = end;
            lock(self.seen).sent = at - range.start;
            self.shared.noted();
        }
    }

    /// Waits at the gates that stand at `at`; returns where the next one stands.
    async fn gate(&self, stream: &TcpStream, at: u64) -> io::Result<u64> {
        let Some(object) = self.object else {
            return Ok(u64::MAX);
        };
        let here = {
            let mut object = lock(object);
            object.stops.retain(|stop| !*stop.open.borrow());
            let offsets = object.stops.iter().map(|stop| stop.offset);
            let next = offsets
                .filter(|offset| *offset > at)
                .min()
                .unwrap_or(u64::MAX);
            match object.stops.iter().find(|stop| stop.offset == at) {
                None => return Ok(next),
                Some(stop) => stop.clone(),
            }
        };
        let mut open = here.open;
        here.held.send_modify(|count| *count += 1);
        let left = tokio::select! {
            // A gate that is gone is open.
            _ = open.wait_for(|open| *open) => false,
            () = closed(stream) => true,
        };
        here.held.send_modify(|count| *count -= 1);
        if left {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        // Others may stand here too, or ahead.
        Box::pin(self.gate(stream, at)).await
    }
}
