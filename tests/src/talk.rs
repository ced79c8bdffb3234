//! Conversations: what a client asks, what the origin would answer, and what
//! the client must see, as text; and an origin that plays its part of them.
//!
//! ```text
//! case s-maxage counts before max-age [RFC 9111 5.2.2.10]
//! > GET | Accept: text/plain        a request; a path may follow the method
//! < 200 | Cache-Control: s-maxage=9 what the origin answers, if it is asked
//! = forwarded | Cache-Control: s-maxage=9
//! > GET
//! = cached | body one
//! ```
//!
//! After `=`: `cached` (no request reached the origin, and the bytes are of an
//! earlier answer), `forwarded` (exactly one did, and its answer arrived),
//! `validated` (exactly one did, with a condition, and an earlier answer's
//! bytes arrived), `refused` (none did, no bytes are checked), `later N` (sooner
//! or later N do), `status N`, `body TEXT`, `Name: value`, `!Name`,
//! `informed N` (that status came first), `uninformed` (none did),
//! `sent Name: value`, `unsent Name`, `method M`. After `<`, besides fields:
//! `body TEXT`, `ranges` (honours Range), `chunked`, `close` (no length),
//! `hangup` (takes the request and closes), `interim N` (that status first),
//! `wait MS`. `@+N` and `@-N` as a value are the date that many seconds from now;
//! `@at` in a value is the conversation's own path, `@host` the host.
//!
//! Every answer of the origin that may have a body says which it is, in `Answer`.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant, SystemTime};

use bytes::{Buf, BytesMut};
use http::HeaderMap;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

use crate::http::{Ask, HOST, Reply};

/// Longest wait for a request that comes later.
const LATER_MAX: Duration = Duration::from_secs(20);
/// Longest head of a request.
const HEAD_BYTES_MAX: usize = 64 * 1024;

/// One conversation.
#[derive(Clone, Debug)]
pub struct Case {
    /// What it shows.
    pub name: String,
    /// Its exchanges in order.
    pub exchanges: Vec<Exchange>,
}

/// One request of a conversation, the origin's part, and what must come of it.
#[derive(Clone, Debug, Default)]
pub struct Exchange {
    method: String,
    path: String,
    fields: Vec<(String, String)>,
    body: String,
    answers: Vec<Answer>,
    expected: Vec<String>,
}

/// What the origin answers once.
#[derive(Clone, Debug, Default)]
struct Answer {
    status: u16,
    fields: Vec<(String, String)>,
    body: Option<String>,
    words: Vec<String>,
    wait: Duration,
    interim: Option<u16>,
}

/// Reads the cases of a text.
///
/// # Panics
/// It is not in the form that the module's text describes.
pub fn parse(text: &str) -> Vec<Case> {
    let mut cases: Vec<Case> = Vec::new();
    for line in text.lines() {
        let line = line.trim();
        if let Some(name) = line.strip_prefix("case ") {
            cases.push(Case {
                name: name.to_owned(),
                exchanges: Vec::new(),
            });
            continue;
        }
        let Some((kind, rest)) = line.split_at_checked(1) else {
            continue;
        };
        if kind == "#" {
            continue;
        }
        let case = cases.last_mut().expect("a case comes first");
        let parts: Vec<&str> = rest.split(" | ").map(str::trim).collect();
        match kind {
            ">" => case.exchanges.push(request(&parts)),
            "<" => exchange(case).answers.push(answer(&parts)),
            "=" => exchange(case)
                .expected
                .extend(parts.iter().map(|part| (*part).to_owned())),
            _ => panic!("{}: what is {line:?}?", case.name),
        }
    }
    cases
}

fn exchange(case: &mut Case) -> &mut Exchange {
    case.exchanges.last_mut().expect("a request comes first")
}

fn request(parts: &[&str]) -> Exchange {
    let (method, path) = parts[0].split_once(' ').unwrap_or((parts[0], ""));
    let mut exchange = Exchange {
        method: method.to_owned(),
        path: path.to_owned(),
        ..Exchange::default()
    };
    for part in &parts[1..] {
        match part.strip_prefix("body ") {
            Some(body) => exchange.body = body.to_owned(),
            None => exchange.fields.push(field(part)),
        }
    }
    exchange
}

fn answer(parts: &[&str]) -> Answer {
    let mut answer = Answer {
        status: parts[0].parse().expect("a status"),
        ..Answer::default()
    };
    for part in &parts[1..] {
        let (word, argument) = part.split_once(' ').unwrap_or((part, ""));
        match word {
            "body" => answer.body = Some(argument.to_owned()),
            "wait" => answer.wait = Duration::from_millis(argument.parse().expect("milliseconds")),
            "interim" => answer.interim = Some(argument.parse().expect("a status")),
            "ranges" | "chunked" | "close" | "hangup" => answer.words.push(word.to_owned()),
            _ => answer.fields.push(field(part)),
        }
    }
    answer
}

fn field(part: &str) -> (String, String) {
    let (name, value) = part
        .split_once(':')
        .unwrap_or_else(|| panic!("no field: {part:?}"));
    (name.to_owned(), value.trim().to_owned())
}

/// `@+N` and `@-N` as dates.
fn dated(value: &str) -> String {
    let Some(offset) = value
        .strip_prefix('@')
        .filter(|v| v.starts_with(['+', '-']))
    else {
        return value.to_owned();
    };
    let offset: i64 = offset.parse().expect("seconds");
    let delta = Duration::from_secs(offset.unsigned_abs());
    let now = SystemTime::now();
    httpdate::fmt_http_date(if offset < 0 { now - delta } else { now + delta })
}

/// A request that reached the origin.
#[derive(Clone, Debug)]
struct Got {
    method: String,
    headers: HeaderMap,
}

#[derive(Default)]
struct Stage {
    /// Answers to come, by path and method family, and how many were given.
    answers: HashMap<String, Vec<Answer>>,
    got: HashMap<String, Vec<Got>>,
}

/// The origin of conversations.
pub struct TalkOrigin {
    address: SocketAddr,
    stage: Arc<Mutex<Stage>>,
    task: JoinHandle<()>,
}

fn lock(stage: &Mutex<Stage>) -> MutexGuard<'_, Stage> {
    stage.lock().expect("no panic while held")
}

impl TalkOrigin {
    /// Listens on loopback.
    pub async fn start() -> TalkOrigin {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let stage = Arc::new(Mutex::new(Stage::default()));
        let shared = stage.clone();
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(stream, shared.clone()));
            }
        });
        TalkOrigin {
            address,
            stage,
            task,
        }
    }

    /// Where nodes find it.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Holds a conversation, each request with the next of `nodes`; what went
    /// wrong, in words.
    pub async fn hold(&self, case: &Case, at: &str, nodes: &[SocketAddr]) -> Result<(), String> {
        let mut earlier: HashMap<String, Vec<String>> = HashMap::new();
        for (number, exchange) in case.exchanges.iter().enumerate() {
            let path = format!("{at}{}", exchange.path);
            let mut answers = exchange.answers.clone();
            for (_, value) in answers.iter_mut().flat_map(|a| &mut a.fields) {
                *value = value.replace("@at", at);
            }
            lock(&self.stage).answers.insert(path.clone(), answers);
            let before = self.got(&path).len();
            let mut ask = Ask::new(&exchange.method, &path).body(exchange.body.clone());
            for (name, value) in &exchange.fields {
                ask = ask.header(name, dated(value));
            }
            let reply = ask
                .send(nodes[number % nodes.len()])
                .await
                .map_err(|e| format!("request {}: {e:#}", number + 1))?;
            let got = self.got(&path);
            let seen = earlier.entry(path.clone()).or_default();
            let new = &got[before..];
            let told = check(exchange, &reply, new, seen, before)
                .map_err(|why| format!("request {}: {why}\n    {reply:?}", number + 1));
            told?;
            seen.push(reply.header("answer").to_owned());
            if let Some(more) = exchange
                .expected
                .iter()
                .find_map(|e| e.strip_prefix("later "))
            {
                let more: usize = more.parse().expect("a number");
                let started = Instant::now();
                while self.got(&path).len() < before + more {
                    if started.elapsed() > LATER_MAX {
                        return Err(format!("request {}: nothing came later", number + 1));
                    }
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            }
        }
        Ok(())
    }

    fn got(&self, path: &str) -> Vec<Got> {
        lock(&self.stage).got.get(path).cloned().unwrap_or_default()
    }
}

impl Drop for TalkOrigin {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Whether an exchange went as expected; if not, why.
fn check(
    exchange: &Exchange,
    reply: &Reply,
    new: &[Got],
    earlier: &[String],
    before: usize,
) -> Result<(), String> {
    let from = reply.header("answer");
    let fail = |why: String| -> Result<(), String> { Err(why) };
    for expected in &exchange.expected {
        let (word, argument) = expected.split_once(' ').unwrap_or((expected.as_str(), ""));
        match word {
            "cached" => {
                if !new.is_empty() {
                    return fail(format!("forwarded, where cached was expected: {new:?}"));
                }
                if !earlier.iter().any(|answer| answer == from) {
                    return fail(format!("cached answer {from:?} was never seen"));
                }
            }
            "forwarded" => {
                if new.len() != 1 {
                    return fail(format!("{} requests, not one: {new:?}", new.len()));
                }
                let fresh = (before + 1).to_string();
                if exchange.method != "HEAD" && ![fresh.as_str(), ""].contains(&from) {
                    return fail(format!("answer {from} and not the origin's {fresh}"));
                }
            }
            "validated" => {
                if new.len() != 1 {
                    return fail(format!("{} requests, not one: {new:?}", new.len()));
                }
                if !new[0].headers.contains_key("if-none-match")
                    && !new[0].headers.contains_key("if-modified-since")
                {
                    return fail(format!("no condition: {new:?}"));
                }
                if !earlier.iter().any(|answer| answer == from) {
                    return fail(format!("answer {from:?} was never seen"));
                }
            }
            "refused" => {
                if !new.is_empty() {
                    return fail(format!("forwarded: {new:?}"));
                }
            }
            "later" => {}
            "status" => {
                if reply.status.to_string() != argument {
                    return fail(format!("status {}, not {argument}", reply.status));
                }
            }
            "informed" => {
                let before: Vec<String> = reply
                    .informational
                    .iter()
                    .map(|(status, headers)| format!("{status} {}", headers.len()))
                    .collect();
                // Our origin's has one field.
                if before != [format!("{argument} 1")] {
                    return fail(format!("first {before:?}, not {argument}"));
                }
            }
            "uninformed" => {
                if !reply.informational.is_empty() {
                    return fail(format!("first {:?}", reply.informational));
                }
            }
            "body" => {
                if reply.text() != argument {
                    return fail(format!("body {:?}, not {argument:?}", reply.text()));
                }
            }
            "method" => {
                if new.first().is_none_or(|got| got.method != argument) {
                    return fail(format!("not sent as {argument}: {new:?}"));
                }
            }
            "sent" => {
                let (name, value) = field(argument);
                let given = new
                    .first()
                    .and_then(|got| got.headers.get(name.to_ascii_lowercase()))
                    .and_then(|v| v.to_str().ok());
                if given != Some(value.as_str()) {
                    return fail(format!("sent {given:?}, not {argument}"));
                }
            }
            "unsent" => {
                if new
                    .first()
                    .is_some_and(|got| got.headers.contains_key(argument))
                {
                    return fail(format!("sent {argument}"));
                }
            }
            _ => match expected.strip_prefix('!') {
                Some(name) => {
                    if reply.headers.contains_key(name) {
                        return fail(format!("{name}: {:?}", reply.header(name)));
                    }
                }
                None => {
                    let (name, value) = field(expected);
                    let values: Vec<&str> = reply
                        .headers
                        .get_all(name.as_str())
                        .iter()
                        .filter_map(|v| v.to_str().ok())
                        .collect();
                    if values.join(", ") != value {
                        return fail(format!("{name}: {values:?}, not {value:?}"));
                    }
                }
            },
        }
    }
    Ok(())
}

async fn serve(mut stream: TcpStream, stage: Arc<Mutex<Stage>>) {
    let _ = stream.set_nodelay(true);
    let mut buffer = BytesMut::new();
    // An error is the node's: it left.
    while let Ok(Some((path, got))) = read(&mut stream, &mut buffer).await {
        let (answer, number) = {
            let mut stage = lock(&stage);
            let list = stage.got.entry(path.clone()).or_default();
            list.push(got.clone());
            let number = list.len();
            let answers = stage.answers.get_mut(&path);
            let answer = answers.and_then(|list| (!list.is_empty()).then(|| list.remove(0)));
            (answer, number)
        };
        let answer = answer.unwrap_or(Answer {
            status: 418,
            body: Some("nobody expected this request".into()),
            ..Answer::default()
        });
        tokio::time::sleep(answer.wait).await;
        if answer.words.iter().any(|word| word == "hangup") {
            return;
        }
        let keep = write(&mut stream, &got, &answer, number).await;
        if !matches!(keep, Ok(true)) {
            return;
        }
    }
}

async fn read(
    stream: &mut TcpStream,
    buffer: &mut BytesMut,
) -> std::io::Result<Option<(String, Got)>> {
    loop {
        let mut fields = [httparse::EMPTY_HEADER; 64];
        let mut head = httparse::Request::new(&mut fields);
        let parsed = head.parse(buffer).map_err(std::io::Error::other)?;
        if let httparse::Status::Complete(bytes) = parsed {
            let method = head.method.unwrap_or_default().to_owned();
            let path = head.path.unwrap_or_default().to_owned();
            let mut headers = HeaderMap::new();
            for line in head.headers.iter() {
                let name = http::HeaderName::from_bytes(line.name.as_bytes());
                let value = http::HeaderValue::from_bytes(line.value);
                if let (Ok(name), Ok(value)) = (name, value) {
                    headers.append(name, value);
                }
            }
            let length: usize = headers
                .get("content-length")
                .and_then(|v| v.to_str().ok()?.parse().ok())
                .unwrap_or(0);
            buffer.advance(bytes);
            while buffer.len() < length {
                if stream.read_buf(buffer).await? == 0 {
                    return Ok(None);
                }
            }
            buffer.advance(length);
            return Ok(Some((path, Got { method, headers })));
        }
        if buffer.len() > HEAD_BYTES_MAX || stream.read_buf(buffer).await? == 0 {
            return Ok(None);
        }
    }
}

/// Writes an answer; whether the connection is kept.
async fn write(
    stream: &mut TcpStream,
    got: &Got,
    answer: &Answer,
    number: usize,
) -> std::io::Result<bool> {
    let is = |word: &str| answer.words.iter().any(|w| w == word);
    let mut status = answer.status;
    let mut body = answer
        .body
        .clone()
        .unwrap_or_else(|| format!("the body of answer {number}"));
    let mut head = String::new();
    if let Some(interim) = answer.interim {
        head += &format!("HTTP/1.1 {interim} Interim\r\nInterim-Field: yes\r\n\r\n");
    }
    let mut content_range = String::new();
    if is("ranges")
        && let Some(range) = got.headers.get("range").and_then(|v| v.to_str().ok())
        && let Some((first, last)) = range
            .strip_prefix("bytes=")
            .and_then(|range| range.split_once('-'))
    {
        let total = body.len();
        let (first, end) = match (first.parse::<usize>(), last.parse::<usize>()) {
            (Ok(first), Ok(last)) => (first, last.saturating_add(1).min(total)),
            (Ok(first), Err(_)) => (first, total),
            (Err(_), Ok(count)) => (total.saturating_sub(count), total),
            (Err(_), Err(_)) => (0, total),
        };
        if first < end {
            status = 206;
            content_range = format!("Content-Range: bytes {first}-{}/{total}\r\n", end - 1);
            body = body[first..end].to_owned();
        } else {
            status = 416;
            content_range = format!("Content-Range: bytes */{total}\r\n");
            body = String::new();
        }
    }
    head += &format!("HTTP/1.1 {status} Scripted\r\n{content_range}");
    let bodiless = matches!(status, 204 | 304);
    if status != 304 {
        head += &format!("Answer: {number}\r\n");
    }
    for (name, value) in &answer.fields {
        head += &format!("{name}: {}\r\n", dated(value).replace("@host", HOST));
    }
    let framed = answer
        .fields
        .iter()
        .any(|(name, _)| name.eq_ignore_ascii_case("content-length"));
    let body = match () {
        () if bodiless => String::new(),
        () if is("chunked") => {
            head += "Transfer-Encoding: chunked\r\n";
            match body.is_empty() {
                true => "0\r\n\r\n".into(),
                false => format!("{:x}\r\n{body}\r\n0\r\nTrailing: yes\r\n\r\n", body.len()),
            }
        }
        () if is("close") => {
            head += "Connection: close\r\n";
            body
        }
        () => {
            if !framed {
                head += &format!("Content-Length: {}\r\n", body.len());
            }
            body
        }
    };
    head += "\r\n";
    stream.write_all(head.as_bytes()).await?;
    if got.method != "HEAD" {
        stream.write_all(body.as_bytes()).await?;
    }
    Ok(!is("close"))
}
