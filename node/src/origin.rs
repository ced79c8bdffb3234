//! Asking the origin: connections, deadlines, retries, and the strict reading
//! of what a ranged answer claims to be.
//!
//! Not here: what an answer means for the cache (`engine`), which address is
//! asked (`backends`).

mod backends;

use std::net::SocketAddr;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use http::header::{
    ACCEPT_ENCODING, CONNECTION, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, HOST, HeaderMap,
    PROXY_AUTHENTICATE, PROXY_AUTHORIZATION, RANGE, TE, TRAILER, TRANSFER_ENCODING, UPGRADE,
};
use http::{HeaderName, HeaderValue};
use pingora_core::ErrorType;
use pingora_core::connectors::http::Connector;
use pingora_core::protocols::http::client::HttpSession;
use pingora_core::upstreams::peer::HttpPeer;
use pingora_http::RequestHeader;
use pingora_slice_cluster::wire::{Informational, OriginRequest};
use tokio_util::sync::CancellationToken;

pub use self::backends::ADDRESSES_MAX;
use self::backends::{Backend, Backends, DOWN_TRIED_MAX};
use crate::config::{OriginTimeouts, Upstream};
use crate::freshness::unix_ms;
use crate::manifest::to_headers;
use crate::metrics::Metrics;

/// How long an idle origin connection is kept.
const IDLE: Duration = Duration::from_secs(60);
/// Informational responses before the final one at most.
const INFORMATIONAL_MAX: usize = 1000;
/// Bytes of their fields that are passed on: what is beyond is dropped.
const INFORMATIONAL_BYTES_MAX: usize = 16 * 1024;

/// Fields with a digest of one message's content: of a range where that is what it
/// carries (RFC 9530 section 2, RFC 2616 section 14.15).
pub const DIGESTS: [&str; 2] = ["content-digest", "content-md5"];

/// Why the origin gave no answer.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum OriginError {
    /// No connection, or it broke: 502.
    #[error("origin unreachable: {0}")]
    Unreachable(String),
    /// It took the request and broke off before its answer: 502.
    #[error("origin broke off: {0}")]
    BrokeOff(String),
    /// There was no connection in time: 504.
    #[error("origin could not be connected to in time: {0}")]
    NotConnected(String),
    /// It did not answer in time: 504.
    #[error("origin did not answer in time: {0}")]
    TimedOut(String),
}

impl OriginError {
    /// The status a client should see (RFC 9110 sections 15.6.3 and 15.6.5).
    pub fn status(&self) -> u16 {
        match self {
            OriginError::Unreachable(_) | OriginError::BrokeOff(_) => 502,
            OriginError::NotConnected(_) | OriginError::TimedOut(_) => 504,
        }
    }
}

/// What to ask for, beyond the client's own request.
#[derive(Clone, Debug, Default)]
pub struct OriginAsk {
    /// Ask for the head alone.
    pub head: bool,
    /// Bytes to ask for.
    pub range: Option<Range<u64>>,
    /// A range whose end is not known yet, in the words of a Range field;
    /// instead of `range`.
    pub open_range: Option<String>,
    /// Conditions and the like, replacing what the request says.
    pub fields: Vec<(HeaderName, String)>,
}

/// An answer's head, and its body still to be read.
pub struct OriginAnswer {
    /// Final status.
    pub status: u16,
    /// End-to-end fields.
    pub headers: HeaderMap,
    /// Content-Length, where stated.
    pub length: Option<u64>,
    /// Unix milliseconds when the request left.
    pub asked_ms: u64,
    /// Unix milliseconds when the head arrived.
    pub received_ms: u64,
    /// The informational responses before it, as far as they are few and small.
    pub informational: Informational,
    /// The body.
    pub body: OriginBody,
}

impl OriginAnswer {
    /// Whether a 206 brings the bytes that were asked for as they are, up to the
    /// object's end; its range.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn fits(&self, asked: &Range<u64>) -> Result<ContentRange, Misfit> {
        if self.headers.contains_key(CONTENT_ENCODING) {
            return Err(Misfit::Encoded);
        }
        let range = content_range(&self.headers).ok_or(Misfit::ContentRange)?;
        let end = range.total.map_or(asked.end, |total| asked.end.min(total));
        let fits = range.bytes == Some(asked.start..end)
            && self.length.is_none_or(|length| length == end - asked.start);
        match fits {
            true => Ok(range),
            false => Err(Misfit::ContentRange),
        }
    }
}

/// Why a 206 is not what was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Misfit {
    /// Its bytes are encoded.
    Encoded,
    /// It names other bytes, or none, or has not as many as it names.
    ContentRange,
}

impl Misfit {
    /// The reason of the fault.
    pub fn as_str(self) -> &'static str {
        match self {
            Misfit::Encoded => "encoded",
            Misfit::ContentRange => "content-range",
        }
    }
}

/// A body under way. Dropped before its end, the connection is closed.
pub struct OriginBody {
    session: Option<HttpSession>,
    peer: HttpPeer,
    origin: Arc<Inner>,
    deadline: Duration,
    announced: bool,
    asked: Instant,
}

impl OriginBody {
    /// When it was asked for.
    pub fn asked(&self) -> Instant {
        self.asked
    }

    /// Whether its length was announced; else only its end tells.
    pub fn is_announced(&self) -> bool {
        self.announced
    }

    /// The next bytes, or `None` at the properly framed end.
    ///
    /// # Errors
    /// The connection broke off before that end, or stalled.
    pub async fn next(&mut self) -> Result<Option<Bytes>, OriginError> {
        let Some(session) = self.session.as_mut() else {
            return Ok(None);
        };
        let read = tokio::time::timeout(self.deadline, session.read_response_body()).await;
        match read {
            Err(_) => {
                self.session = None;
                Err(OriginError::TimedOut("reading the body".into()))
            }
            Ok(Err(error)) => {
                self.session = None;
                Err(broken(error))
            }
            Ok(Ok(Some(bytes))) => {
                self.origin
                    .metrics
                    .bytes_from_origin_total
                    .inc_by(bytes.len() as u64);
                Ok(Some(bytes))
            }
            Ok(Ok(None)) => {
                if let Some(session) = self.session.take() {
                    self.origin
                        .connector
                        .release_http_session(session, &self.peer, Some(IDLE))
                        .await;
                }
                Ok(None)
            }
        }
    }
}

/// The origin, however many machines it is. Cheap to clone.
#[derive(Clone)]
pub struct Origin {
    inner: Arc<Inner>,
}

struct Inner {
    connector: Connector,
    backends: Backends,
    upstream_host: Option<String>,
    timeouts: OriginTimeouts,
    metrics: Arc<Metrics>,
}

impl Origin {
    /// An origin behind one or more upstream addresses.
    pub fn new(
        upstreams: Vec<Upstream>,
        upstream_host: Option<String>,
        timeouts: OriginTimeouts,
        metrics: Arc<Metrics>,
    ) -> Origin {
        let inner = Inner {
            connector: Connector::new(None),
            backends: Backends::new(upstreams, timeouts),
            upstream_host,
            timeouts,
            metrics,
        };
        Origin {
            inner: Arc::new(inner),
        }
    }

    /// Keeps an eye on the upstreams until `stop`: which addresses their names
    /// have, and which of them can be connected to.
    pub async fn watch_until(&self, stop: CancellationToken) {
        self.inner.backends.watch_until(stop).await;
    }

    /// The upstreams' addresses, and whether they can be connected to.
    pub fn up(&self) -> Vec<(SocketAddr, bool)> {
        self.inner.backends.up()
    }

    /// Sends one GET, or HEAD, and reads the answer's head; other upstreams are tried
    /// when one cannot be connected to.
    ///
    /// # Errors
    /// None could be reached, or the head did not arrive in time.
    pub async fn get(
        &self,
        request: &OriginRequest,
        ask: &OriginAsk,
    ) -> Result<OriginAnswer, OriginError> {
        let mut last = OriginError::Unreachable("no upstream".into());
        let mut down = 0;
        for backend in self.inner.backends.in_turn().await? {
            down += usize::from(backend.is_down());
            if down > DOWN_TRIED_MAX {
                break;
            }
            match self.get_from(backend.peer(), request, ask).await {
                Ok(answer) => return Ok(answer),
                Err((error, connected)) => {
                    last = error;
                    if connected {
                        break;
                    }
                    self.inner.backends.mark_down(backend.peer());
                }
            }
        }
        Err(last)
    }

    /// An upstream for Pingora's own proxying: one that is not among those which
    /// the request has `tried`, while there is one.
    ///
    /// # Errors
    /// No upstream's name resolves.
    pub async fn peer(&self, tried: &[HttpPeer]) -> Result<HttpPeer, OriginError> {
        let mut backends = self.inner.backends.in_turn().await?;
        backends.sort_by_key(|backend| backend.is_among(tried));
        Ok(backends[0].peer().clone())
    }

    /// Notes that the last of the upstreams which a request `tried` could not be
    /// connected to; whether there is another to try.
    pub fn cannot_connect(&self, tried: &[HttpPeer]) -> bool {
        let backends = &self.inner.backends;
        if let Some(peer) = tried.last() {
            backends.mark_down(peer);
        }
        let may_be_tried = |b: &Backend| !b.is_down() || tried.len() < DOWN_TRIED_MAX;
        let left = backends.all();
        left.iter().any(|b| !b.is_among(tried) && may_be_tried(b))
    }

    /// The Host that the origin sees for a client's `host`.
    pub fn host<'a>(&'a self, host: &'a str) -> &'a str {
        self.inner.upstream_host.as_deref().unwrap_or(host)
    }

    async fn get_from(
        &self,
        peer: &HttpPeer,
        request: &OriginRequest,
        ask: &OriginAsk,
    ) -> Result<OriginAnswer, (OriginError, bool)> {
        let inner = &self.inner;
        let mut first_try = true;
        loop {
            let (mut session, reused) = inner
                .connector
                .get_http_session(peer)
                .await
                .map_err(|e| (not_connected(e), false))?;
            // Deadlines are kept here; Pingora's own must not come before them.
            let longest = inner.timeouts.read.max(inner.timeouts.total_header);
            session.set_write_timeout(Some(longest));
            session.set_read_timeout(Some(2 * longest));
            inner.metrics.origin_fetches_total.inc();
            let asked_ms = unix_ms(SystemTime::now());
            let asked = Instant::now();
            let head = self.head(request, ask).map_err(|e| (e, true))?;
            match tokio::time::timeout(inner.timeouts.total_header, exchange(&mut session, head))
                .await
            {
                Err(_) => return Err((OriginError::TimedOut("no response head".into()), true)),
                // The origin closed an idle connection as we took it up again.
                Ok(Err(_)) if reused && first_try => first_try = false,
                Ok(Err(error)) => return Err((error, true)),
                Ok(Ok(informational)) => {
                    let received_ms = unix_ms(SystemTime::now());
                    let Some(response) = session.response_header() else {
                        return Err((OriginError::Unreachable("no response head".into()), true));
                    };
                    let status = response.status.as_u16();
                    let mut headers = response.headers.clone();
                    let length = content_length(&headers);
                    strip_hop_by_hop(&mut headers);
                    let body = OriginBody {
                        session: Some(session),
                        peer: peer.clone(),
                        origin: inner.clone(),
                        deadline: inner.timeouts.read,
                        announced: length.is_some(),
                        asked,
                    };
                    return Ok(OriginAnswer {
                        status,
                        headers,
                        length,
                        asked_ms,
                        received_ms,
                        informational,
                        body,
                    });
                }
            }
        }
    }

    /// The request head: what the client sent, with our range and conditions.
    fn head(
        &self,
        request: &OriginRequest,
        ask: &OriginAsk,
    ) -> Result<Box<RequestHeader>, OriginError> {
        let refused =
            |e: &dyn std::fmt::Display| OriginError::Unreachable(format!("request head: {e}"));
        let mut head = RequestHeader::build(
            if ask.head { "HEAD" } else { "GET" },
            request.target.as_bytes(),
            Some(request.headers.len() + 6),
        )
        .map_err(|e| refused(&e))?;
        for (name, value) in &request.headers {
            // The client's own range: what is asked for here is ours.
            if name == RANGE.as_str() {
                continue;
            }
            let value = HeaderValue::from_bytes(value).map_err(|e| refused(&e))?;
            head.append_header(name.clone(), value)
                .map_err(|e| refused(&e))?;
        }
        head.insert_header(HOST, self.host(&request.host))
            .map_err(|e| refused(&e))?;
        let range = ask.range.as_ref();
        let closed = range.map(|range| format!("bytes={}-{}", range.start, range.end - 1));
        if let Some(value) = ask.open_range.clone().or(closed) {
            head.insert_header(RANGE, value).map_err(|e| refused(&e))?;
            head.insert_header(ACCEPT_ENCODING, "identity")
                .map_err(|e| refused(&e))?;
        }
        for (name, value) in &ask.fields {
            head.insert_header(name.clone(), value.clone())
                .map_err(|e| refused(&e))?;
        }
        Ok(Box::new(head))
    }
}

/// Why there is no connection, by whether time had run out.
fn not_connected(error: Box<pingora_core::Error>) -> OriginError {
    match broken(error) {
        OriginError::BrokeOff(reason) => OriginError::Unreachable(reason),
        OriginError::TimedOut(reason) => OriginError::NotConnected(reason),
        error => error,
    }
}

/// A connection's error, by whether time had run out.
fn broken(error: Box<pingora_core::Error>) -> OriginError {
    match error.etype() {
        ErrorType::ConnectTimedout | ErrorType::ReadTimedout | ErrorType::WriteTimedout => {
            OriginError::TimedOut(error.to_string())
        }
        _ => OriginError::BrokeOff(error.to_string()),
    }
}

async fn exchange(
    session: &mut HttpSession,
    head: Box<RequestHeader>,
) -> Result<Informational, OriginError> {
    let mut informational = Informational::new();
    let mut room = INFORMATIONAL_BYTES_MAX;
    session.write_request_header(head).await.map_err(broken)?;
    session.finish_request_body().await.map_err(broken)?;
    for _ in 0..INFORMATIONAL_MAX {
        session.read_response_header().await.map_err(broken)?;
        let Some(head) = session.response_header() else {
            return Ok(informational);
        };
        if !head.status.is_informational() {
            // A body in another coding would be taken for the object's bytes.
            return match is_coded(&head.headers) {
                false => Ok(informational),
                true => Err(OriginError::BrokeOff("an unknown transfer coding".into())),
            };
        }
        // 100 and 101 are about this connection.
        let bytes: usize = head
            .headers
            .iter()
            .map(|(name, value)| name.as_str().len() + value.len())
            .sum();
        if head.status.as_u16() > 101 && bytes <= room {
            room -= bytes;
            let mut headers = head.headers.clone();
            strip_hop_by_hop(&mut headers);
            informational.push((head.status.as_u16(), to_headers(&headers)));
        }
    }
    Err(OriginError::BrokeOff(
        "too many informational responses".into(),
    ))
}

/// Whether a message has a transfer coding other than chunked, which is the
/// only one that is asked for and undone here (RFC 9112 section 6.1).
pub fn is_coded(headers: &HeaderMap) -> bool {
    let codings = headers.get_all(TRANSFER_ENCODING).iter();
    let mut codings = codings.map(|coding| coding.as_bytes().trim_ascii());
    let is_chunked = |coding: &[u8]| coding.eq_ignore_ascii_case(b"chunked");
    codings.next().is_some_and(|first| !is_chunked(first)) || codings.next().is_some()
}

/// The length that a response states: one number, however often it is said
/// (RFC 9110 section 8.6).
fn content_length(headers: &HeaderMap) -> Option<u64> {
    let mut stated = None;
    for line in headers.get_all(CONTENT_LENGTH) {
        for value in line.to_str().ok()?.split(',') {
            let value = value.trim().parse().ok()?;
            if stated.is_some_and(|stated| stated != value) {
                return None;
            }
            stated = Some(value);
        }
    }
    stated
}

/// Removes the fields of one connection.
pub fn strip_hop_by_hop(headers: &mut HeaderMap) {
    for name in hop_by_hop(headers) {
        headers.remove(name);
    }
}

/// The fields of one connection (RFC 9110 section 7.6.1), and those nominated by
/// Connection; Age and freshness fields cannot be nominated away.
pub fn hop_by_hop(headers: &HeaderMap) -> Vec<HeaderName> {
    const KNOWN: [HeaderName; 10] = [
        CONNECTION,
        TE,
        TRAILER,
        TRANSFER_ENCODING,
        UPGRADE,
        PROXY_AUTHENTICATE,
        PROXY_AUTHORIZATION,
        HeaderName::from_static("keep-alive"),
        HeaderName::from_static("proxy-connection"),
        HeaderName::from_static("proxy-authentication-info"),
    ];
    const KEPT: [&str; 7] = [
        "age",
        "cache-control",
        "cdn-cache-control",
        "date",
        "expires",
        "etag",
        "vary",
    ];
    let nominated = headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|v| v.to_str().ok())
        .flat_map(|v| v.split(','))
        .filter_map(|name| HeaderName::from_bytes(name.trim().as_bytes()).ok())
        .filter(|name| !KEPT.contains(&name.as_str()));
    nominated.chain(KNOWN).collect()
}

/// Removes what describes one message's body, not the object.
pub fn strip_framing(headers: &mut HeaderMap) {
    headers.remove(CONTENT_LENGTH);
    headers.remove(CONTENT_RANGE);
    for name in DIGESTS {
        headers.remove(name);
    }
}

/// A Content-Range of RFC 9110 section 14.4, read strictly.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContentRange {
    /// The bytes; `None` in an unsatisfied range.
    pub bytes: Option<Range<u64>>,
    /// Length of the whole; `None` for `*`.
    pub total: Option<u64>,
}

/// Reads the one Content-Range field; `None` unless it is well-formed and
/// consistent in itself.
pub fn content_range(headers: &HeaderMap) -> Option<ContentRange> {
    let mut values = headers.get_all(CONTENT_RANGE).iter();
    let text = values.next()?.to_str().ok()?.trim();
    if values.next().is_some() {
        return None;
    }
    let (unit, rest) = text.split_once(' ')?;
    if !unit.eq_ignore_ascii_case("bytes") {
        return None;
    }
    let (range, total) = rest.split_once('/')?;
    let number = |t: &str| {
        (!t.is_empty() && t.bytes().all(|b| b.is_ascii_digit()))
            .then(|| t.parse::<u64>().ok())
            .flatten()
    };
    let total = if total == "*" {
        None
    } else {
        Some(number(total)?)
    };
    if range == "*" {
        return Some(ContentRange { bytes: None, total });
    }
    let (first, last) = range.split_once('-')?;
    let bytes = number(first)?..number(last)?.checked_add(1)?;
    let consistent = !bytes.is_empty() && total.is_none_or(|total| bytes.end <= total);
    consistent.then_some(ContentRange {
        bytes: Some(bytes),
        total,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(text: &str) -> Option<ContentRange> {
        let mut map = HeaderMap::new();
        map.insert(CONTENT_RANGE, text.parse().unwrap());
        content_range(&map)
    }

    #[test]
    fn content_range_is_read_strictly() {
        assert_eq!(
            range("bytes 0-9/10"),
            Some(ContentRange {
                bytes: Some(0..10),
                total: Some(10)
            })
        );
        assert_eq!(
            range("Bytes 5-9/*"),
            Some(ContentRange {
                bytes: Some(5..10),
                total: None
            })
        );
        assert_eq!(
            range("bytes */10"),
            Some(ContentRange {
                bytes: None,
                total: Some(10)
            })
        );
        for bad in [
            "bytes 0-10/10",
            "bytes 9-5/10",
            "items 0-1/2",
            "bytes=0-1/2",
            "bytes 0-1",
            "bytes a-1/2",
            "bytes -1/2",
            "bytes 0-1/99999999999999999999999",
            "bytes 0-18446744073709551615/*",
        ] {
            assert_eq!(range(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_length_may_be_said_twice_but_not_two() {
        let length = |values: &[&str]| {
            let mut map = HeaderMap::new();
            for value in values {
                map.append(CONTENT_LENGTH, value.parse().unwrap());
            }
            content_length(&map)
        };
        assert_eq!(length(&["5"]), Some(5));
        assert_eq!(length(&["5, 5"]), Some(5));
        assert_eq!(length(&["5", "5"]), Some(5));
        assert_eq!(length(&["5, 6"]), None);
        assert_eq!(length(&["five"]), None);
        assert_eq!(length(&[]), None);
    }

    #[test]
    fn nominated_fields_go_protected_ones_stay() {
        let mut map = HeaderMap::new();
        map.insert(
            CONNECTION,
            "x-private, cache-control, close".parse().unwrap(),
        );
        map.insert("x-private", "1".parse().unwrap());
        map.insert("cache-control", "max-age=3".parse().unwrap());
        map.insert("keep-alive", "timeout=5".parse().unwrap());
        strip_hop_by_hop(&mut map);
        assert_eq!(map.len(), 1);
    }
}
