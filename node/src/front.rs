//! Pingora server and session ↔ engine: one client request, from its head to
//! the last byte of its answer.
//!
//! GET and HEAD are answered from the engine; everything else, and whatever
//! may not be shared, is proxied by Pingora untouched. `direct` is the short way of
//! plain requests, without a `Session`, and `wire` writes its heads. For both: `ask`
//! reads the request, `fields` makes the answer's head, `account` counts.

mod account;
mod ask;
mod direct;
mod fields;
mod wire;

use ask::{Disposition, framing_fault, has_body, joined_cookies, max_forwards};
pub(crate) use direct::{Directly, Known};
use fields::{keep_date, x_cache};

use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::Poll;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use http::header::{self, HeaderValue};
use http::{Method, StatusCode};
use pingora_core::protocols::http::{HttpTask, ServerSession};
use pingora_core::upstreams::peer::HttpPeer;
use pingora_core::{Error, ErrorType, Result};
use pingora_http::{RequestHeader, ResponseHeader};
use pingora_proxy::{ProxyHttp, Session};
use pingora_slice_cluster::wire::Headers;
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;

use crate::budget::Permit;
use crate::connection;
use crate::engine::{Engine, Found, Relay, RelayBody, Request, Resolved};
use crate::flight::{FillError, Form};
use crate::log_limit::Paced;
use crate::metrics::Metrics;
use crate::origin::hop_by_hop;
use crate::pace::Pace;
use crate::pieces::Pieces;
use crate::plan::{self, Plan};
use crate::purge::Purger;
use crate::reset;
use crate::url::{self, Url};

/// Our name in `Via` and `Cache-Status`.
const NAME: &str = "pingora-slice";
/// What `Via` says of us (RFC 9110 section 7.6.3).
const VIA: &str = "1.1 pingora-slice";
/// What this cache itself does, for whoever asks it and not the origin.
const ALLOWED: &str = "GET, HEAD, OPTIONS, PURGE";
/// A client that has taken nothing for this long keeps nothing waiting for it.
const STALLED_AFTER: Duration = Duration::from_secs(1);
/// Times a request is planned at most, should the origin change under it.
const PLANS_MAX: usize = 3;
/// Failed requests are logged this often at most: while the origin is down all fail.
const FAILURES_PACE: Duration = Duration::from_secs(1);
/// Methods that change nothing (RFC 9110 section 9.2.1; those of the registry that file
/// managers and synchronisers read with). After any other, known or not, its URL is purged.
const SAFE_METHODS: [&str; 6] = ["OPTIONS", "TRACE", "PROPFIND", "REPORT", "SEARCH", "QUERY"];

/// The proxy application. Cheap to clone.
#[derive(Clone)]
pub struct Front {
    engine: Engine,
    purger: Arc<Purger>,
    metrics: Arc<Metrics>,
    under_way: TaskTracker,
    loop_id: Arc<OnceLock<Arc<str>>>,
    failures: Arc<Paced>,
}

/// What one request carries along.
pub struct Context {
    started: Instant,
    /// Why Pingora proxies it, where it does.
    passed: Option<&'static str>,
    /// It is over and counted.
    counted: bool,
    /// This node held no lease when it came (rule 5).
    fenced: bool,
    /// The object that an unsafe method may change.
    may_change: Option<Url>,
    /// The upstreams that could not be connected to.
    unconnected: Vec<HttpPeer>,
    /// For the buffers of a proxied answer.
    _passing: Option<Permit>,
    /// Until the answer is out, the node does not stop.
    _under_way: TaskTrackerToken,
}

impl Front {
    /// A front over an engine; `under_way` tracks the requests being answered.
    pub fn new(
        engine: Engine,
        purger: Arc<Purger>,
        metrics: Arc<Metrics>,
        under_way: TaskTracker,
    ) -> Front {
        Front {
            engine,
            purger,
            metrics,
            under_way,
            loop_id: Arc::default(),
            failures: Arc::new(Paced::new(FAILURES_PACE)),
        }
    }

    /// While this is held, the node does not stop.
    pub(crate) fn under_way(&self) -> TaskTrackerToken {
        self.under_way.token()
    }

    /// The object that a request names.
    fn name_of(&self, head: &RequestHeader) -> Option<Url> {
        let url = url::of_request(head)?;
        Some(self.engine.live().now().naming.object(url))
    }

    /// Answers from the engine; false: let Pingora proxy it.
    async fn serve(&self, session: &mut Session, ctx: &mut Context) -> Result<bool> {
        let has_body = has_body(session);
        let head = session.req_header();
        let fields = Arc::new(head.headers.clone());
        let is_get = head.method == Method::GET;
        let url = url::of_request(head);
        let mut request = match self.request(url, is_get, &fields, has_body) {
            Disposition::Cacheable(request) => request,
            Disposition::Pass(why) => {
                ctx.passed = Some(why);
                return Ok(false);
            }
            Disposition::Refuse(status, reason) => {
                self.refuse(session, ctx, status, reason).await?;
                return Ok(true);
            }
        };
        let (mut resolved, mut gone) = (None, None);
        if let Some(known) = connection::known_of(request.key) {
            (resolved, gone) = (known.resolved, known.gone);
            ctx.started = known.started;
            request = known.request;
        }
        ctx.fenced = !self.engine.cluster().may_serve();
        if ctx.fenced {
            self.metrics.fenced_requests_total.inc();
        }

        let total = self.engine.config().client_timeouts.total;
        let total = total.map(|total| tokio::time::Instant::from_std(ctx.started) + total);
        for _ in 0..PLANS_MAX {
            let resolved = match resolved.take() {
                Some(resolved) => resolved,
                None => self.engine.resolve(&request, gone).await,
            };
            match resolved {
                Resolved::Pass(why) => {
                    ctx.passed = Some(why);
                    return Ok(false);
                }
                Resolved::Failed { status, reason } => {
                    self.refuse(session, ctx, status, reason.as_str()).await?;
                    return Ok(true);
                }
                // It was asked for without what the client says, to be kept: the origin judges.
                Resolved::Relay(relay) if relay.status == 200 && plan::has_conditions(&*fields) => {
                    self.engine.mark_uncacheable(&request);
                    ctx.passed = Some("uncacheable");
                    return Ok(false);
                }
                Resolved::Relay(relay)
                    if relay.status == 200
                        && is_get
                        && !request.sliced
                        && plan::wants_ranges(&*fields) =>
                {
                    self.engine.mark_uncacheable(&request);
                    ctx.passed = Some("uncacheable");
                    return Ok(false);
                }
                Resolved::Relay(relay) => {
                    if !self.take_room_to_pass(session, ctx).await? {
                        return Ok(true);
                    }
                    self.relay(session, ctx, is_get, &request, *relay).await?;
                    return Ok(true);
                }
                Resolved::Object(found) => {
                    let plan = plan::plan(is_get, &*fields, &found.object.manifest);
                    // The answer comes first: most are given at once.
                    let answered = match self.engine.answering(&found.object) {
                        None => None,
                        Some(answering) => tokio::select! {
                            biased;
                            answered = self.answer(session, ctx, is_get, &request, &found, plan) => Some(answered?),
                            () = answering.purged() => None,
                            () = until_total(total) => {
                                self.metrics.clients_too_slow_total.inc();
                                return Error::e_explain(ErrorType::WriteTimedout, "client_timeouts.total")
                                    .map_err(|e| e.into_down());
                            }
                        },
                    };
                    match answered {
                        // The header is out: what the client has cannot be had any more.
                        None if has_begun(session) => {
                            tracing::info!(url = %request.url, "answer cut by a hard purge");
                            return Error::e_explain(ErrorType::ConnectionClosed, "purged");
                        }
                        None => gone = Some(found.object.manifest.generation),
                        Some(answered) => match answered {
                            Answered::Done => return Ok(true),
                            Answered::Changed => gone = Some(found.object.manifest.generation),
                            Answered::Refused => {
                                ctx.passed = Some("refused");
                                return Ok(false);
                            }
                            Answered::Failed(error) => {
                                self.refuse(session, ctx, error.status(), error.as_str())
                                    .await?;
                                return Ok(true);
                            }
                        },
                    }
                }
            }
        }
        self.refuse(session, ctx, 502, "origin-keeps-changing")
            .await?;
        Ok(true)
    }

    /// Writes the answer that was planned. Nothing is written before the first
    /// byte is there, so that a version that is gone can still be replaced.
    async fn answer(
        &self,
        session: &mut Session,
        ctx: &mut Context,
        is_get: bool,
        request: &Request,
        found: &Found,
        plan: Plan,
    ) -> Result<Answered> {
        let manifest = &found.object.manifest;
        let (head, pieces) = self.head(request, found, plan, ctx.fenced)?;
        let status = head.status;
        if !is_get || pieces.is_empty() {
            self.begin(session, ctx, head, true, &found.informational)
                .await?;
            ctx.counted = true;
            self.count_answer(found, status, false);
            return Ok(Answered::Done);
        }
        let ahead = request.settings.max_concurrent_subrequests;
        // HTTP/2 keeps pieces in its own buffer after it has taken them.
        let form = match session.as_downstream().is_http2() {
            true => Form::Copies,
            false => Form::Pages,
        };
        let mut stream = Pieces::new(&self.engine, request, found, pieces, ahead, form);
        let mut pace = Pace::new(self.engine.config().client_timeouts);
        // A part's heading is no byte of the object yet.
        let heading = stream.text();
        let first = match stream.next(&self.metrics).await {
            Some(Ok(bytes)) => Some(bytes),
            None => None,
            Some(Err(FillError::Changed)) => return Ok(Answered::Changed),
            Some(Err(FillError::Refused { .. } | FillError::AnotherRefused)) => {
                return Ok(Answered::Refused);
            }
            Some(Err(error)) => return Ok(Answered::Failed(error)),
        };
        self.begin(session, ctx, head, false, &found.informational)
            .await?;
        ctx.counted = true;
        self.count_answer(found, status, true);
        if let Some(text) = heading {
            session.write_response_body(Some(text), false).await?;
        }
        let mut next = first;
        let mut written = 0u64;
        while let Some(bytes) = next {
            written += bytes.len() as u64;
            self.give(session, &mut pace, bytes, || stream.let_go(&self.metrics))
                .await?;
            let mut coming = std::pin::pin!(stream.next(&self.metrics));
            let piece = match futures::poll!(coming.as_mut()) {
                Poll::Ready(piece) => piece,
                Poll::Pending => {
                    flush(session, self.engine.config().client_timeouts.write).await?;
                    coming.await
                }
            };
            next = match piece {
                None => None,
                Some(Ok(bytes)) => Some(bytes),
                // The header is out: cut the connection, so that the client sees it.
                Some(Err(error)) => {
                    tracing::warn!(url = %manifest.url, written, %error, "answer cut short");
                    return Error::e_explain(ErrorType::ConnectionClosed, "answer cut short");
                }
            };
        }
        self.metrics
            .assembly_duration_seconds
            .observe(stream.waited.as_secs_f64());
        session.write_response_body(None, true).await?;
        Ok(Answered::Done)
    }

    /// Gives bytes to the client, as slowly as it may take them; `stalled` is
    /// called again and again while it takes none.
    async fn give(
        &self,
        session: &mut Session,
        pace: &mut Pace,
        bytes: Bytes,
        stalled: impl FnMut(),
    ) -> Result<()> {
        let length = bytes.len() as u64;
        self.metrics.bytes_to_client_total.inc_by(length);
        let mut writing = std::pin::pin!(session.write_response_body(Some(bytes), false));
        // Most clients take it at once: no timer for them.
        if let Poll::Ready(written) = futures::poll!(writing.as_mut()) {
            pace.took(length, Duration::ZERO);
            return written;
        }
        match patiently(pace, length, writing, stalled).await {
            Some(written) => written,
            None => {
                self.metrics.clients_too_slow_total.inc();
                Error::e_explain(ErrorType::WriteTimedout, "client too slow")
                    .map_err(|e| e.into_down())
            }
        }
    }

    async fn begin(
        &self,
        session: &mut Session,
        ctx: &Context,
        mut head: ResponseHeader,
        end: bool,
        informational: &[(u16, Headers)],
    ) -> Result<()> {
        // Chunks are HTTP/1.1's own: an older client reads to the connection's
        // end, a newer one has frames (RFC 9112 section 6.1).
        let version = session.req_header().version;
        if version == http::Version::HTTP_11 {
            for (status, headers) in informational {
                let mut before = ResponseHeader::build_no_case(*status, None)?;
                for (name, value) in headers {
                    before.append_header(name.clone(), value.as_slice())?;
                }
                let before = Box::new(before);
                session.write_response_header(before, false).await?;
            }
        }
        if version != http::Version::HTTP_11
            && head.remove_header(&header::TRANSFER_ENCODING).is_some()
            && version == http::Version::HTTP_10
        {
            session.set_keepalive(None);
            reset::would_look_complete(!end);
        }
        self.count_begun(ctx.started);
        keep_date(&head);
        session.write_response_header(Box::new(head), end).await
    }

    /// Passes on an answer that is for this client alone.
    async fn relay(
        &self,
        session: &mut Session,
        ctx: &mut Context,
        is_get: bool,
        request: &Request,
        relay: Relay,
    ) -> Result<()> {
        let mut head = ResponseHeader::build(relay.status, Some(relay.headers.len() + 4))?;
        for (name, value) in &relay.headers {
            head.append_header(name.clone(), value.clone())?;
        }
        head.remove_header(&header::CONTENT_LENGTH);
        let has_body = !matches!(relay.status, 204 | 304);
        match relay.length {
            Some(length) if has_body => head.insert_header(header::CONTENT_LENGTH, length)?,
            None if has_body => head.insert_header(header::TRANSFER_ENCODING, "chunked")?,
            _ => {}
        }
        let why = relay.why.as_str();
        let status = format!(
            "fwd={}; fwd-status={}; detail={why}",
            relay.forwarded.as_str(),
            relay.status
        );
        tracing::debug!(url = %request.url, why, "not stored");
        self.describe(&mut head, &status, "PASS")?;
        ctx.counted = true;
        self.count_pass(why, Some(head.status));
        let end = !is_get || !has_body || relay.length == Some(0);
        self.begin(session, ctx, head, end, &relay.informational)
            .await?;
        if end {
            return Ok(());
        }
        let mut body = relay.body;
        let is_peers = matches!(body, RelayBody::Peer(_));
        let mut pace = Pace::new(self.engine.config().client_timeouts);
        loop {
            let mut coming = std::pin::pin!(body.next());
            let next = match futures::poll!(coming.as_mut()) {
                Poll::Ready(next) => next,
                Poll::Pending => {
                    flush(session, self.engine.config().client_timeouts.write).await?;
                    coming.await
                }
            };
            match next {
                Ok(Some(bytes)) => {
                    if is_peers {
                        let length = bytes.len() as u64;
                        self.metrics.bytes_from_peers_total.inc_by(length);
                    }
                    self.give(session, &mut pace, bytes, || {}).await?;
                }
                Ok(None) => return session.write_response_body(None, true).await,
                Err(reason) => {
                    tracing::warn!(reason, "relayed answer cut short");
                    return Error::e_explain(ErrorType::ConnectionClosed, "answer cut short");
                }
            }
        }
    }

    /// Takes the permit for what proxying holds, or refuses the request; whether it
    /// was taken.
    async fn take_room_to_pass(&self, session: &mut Session, ctx: &mut Context) -> Result<bool> {
        let permit = self.engine.budget().transfer(0).await;
        if permit.is_none() {
            self.metrics.memory_refusals_total.inc();
            self.refuse(session, ctx, 503, "no-memory").await?;
            return Ok(false);
        }
        ctx._passing = permit;
        Ok(true)
    }

    async fn refuse(
        &self,
        session: &mut Session,
        ctx: &mut Context,
        status: u16,
        reason: &str,
    ) -> Result<()> {
        let head = self.refusal(status, reason)?;
        ctx.counted = true;
        // The client's own wish, or its own fault, is no failure.
        if status >= 500
            && !matches!(reason, "only-if-cached" | "malformed")
            && let Some(url) = self.name_of(session.req_header())
        {
            self.log_failure(&url, status, reason);
        }
        self.begin(session, ctx, head, true, &[]).await
    }

    /// Says which request failed, unless one was named just now.
    fn log_failure(&self, url: &Url, status: u16, reason: &str) {
        if let Some(left_out) = self.failures.turn() {
            tracing::warn!(%url, reason, status, left_out, "request failed");
        }
    }

    async fn purge(&self, session: &mut Session) -> Result<()> {
        let from_loopback = session
            .client_addr()
            .and_then(|address| address.as_inet())
            .is_some_and(|address| address.ip().is_loopback());
        let answer = self
            .purger
            .purge_request(session.req_header(), from_loopback)
            .await;
        let mut head = ResponseHeader::build(answer.status, Some(answer.headers.len() + 2))?;
        for (name, value) in answer.headers {
            head.insert_header(name, value)?;
        }
        head.insert_header(header::CONTENT_LENGTH, answer.body.len())?;
        session.write_response_header(Box::new(head), false).await?;
        session
            .write_response_body(Some(answer.body.into()), true)
            .await
    }
}

/// Waits for the client to take `length` bytes within its allowed pace; `stalled` is
/// called again and again while it takes none. `None`: it is too slow.
async fn patiently<T>(
    pace: &mut Pace,
    length: u64,
    mut taking: Pin<&mut impl Future<Output = T>>,
    mut stalled: impl FnMut(),
) -> Option<T> {
    let patience = pace.patience(length);
    let started = Instant::now();
    loop {
        let left = patience.saturating_sub(started.elapsed());
        match tokio::time::timeout(left.min(STALLED_AFTER), taking.as_mut()).await {
            Ok(taken) => {
                pace.took(length, started.elapsed());
                return Some(taken);
            }
            Err(_) if started.elapsed() < patience => stalled(),
            Err(_) => return None,
        }
    }
}

/// Whether the answer's head is out.
fn has_begun(session: &Session) -> bool {
    let is_last = |head: &ResponseHeader| {
        head.status == StatusCode::SWITCHING_PROTOCOLS || !head.status.is_informational()
    };
    session.response_written().is_some_and(is_last)
}

/// Waits for a deadline, forever if there is none.
async fn until_total(deadline: Option<tokio::time::Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

enum Answered {
    Done,
    /// The version is gone, and nothing was written.
    Changed,
    /// The origin refuses this client the bytes, and nothing was written.
    Refused,
    /// It cannot be had, and nothing was written.
    Failed(FillError),
}

/// Sends what Pingora holds back of a body of known length: it collects up to
/// 1460 bytes, and has no other call for this than a task that failed.
async fn flush(session: &mut Session, patience: Duration) -> Result<()> {
    let ServerSession::H1(http1) = session.as_downstream_mut() else {
        return Ok(());
    };
    let end = HttpTask::Failed(Error::explain(ErrorType::Custom("flushed"), ""));
    let tasks = vec![HttpTask::Body(None, false), end];
    match tokio::time::timeout(patience, http1.response_duplex_vec(tasks)).await {
        Err(_) => Error::e_explain(ErrorType::WriteTimedout, "flushing").map_err(|e| e.into_down()),
        Ok(Err(error)) if error.etype() == &ErrorType::Custom("flushed") => Ok(()),
        Ok(result) => result.map(|_| ()),
    }
}

#[async_trait]
impl ProxyHttp for Front {
    type CTX = Context;

    fn new_ctx(&self) -> Context {
        connection::head_is_there();
        Context {
            started: Instant::now(),
            passed: None,
            counted: false,
            fenced: false,
            may_change: None,
            unconnected: Vec::new(),
            _passing: None,
            _under_way: self.under_way(),
        }
    }

    async fn early_request_filter(&self, session: &mut Session, _ctx: &mut Context) -> Result<()> {
        let timeouts = self.engine.config().client_timeouts;
        let is_http10 = session.req_header().version == http::Version::HTTP_10;
        let session = session.as_downstream_mut();
        // RFC 9110 section 15.2: an HTTP/1.0 client knows none.
        session.set_ignore_info_resp(is_http10);
        session.set_write_timeout(Some(timeouts.write));
        session.set_read_timeout(Some(timeouts.idle));
        session.set_total_drain_timeout(Some(timeouts.idle));
        Ok(())
    }

    async fn request_filter(&self, session: &mut Session, ctx: &mut Context) -> Result<bool> {
        if let Some(status) = framing_fault(session.req_header()) {
            session.set_keepalive(None);
            self.count_request();
            self.refuse(session, ctx, status, "malformed").await?;
            return Ok(true);
        }
        match session.req_header().method.as_str() {
            "PURGE" => {
                ctx.counted = true;
                self.purge(session).await?;
                Ok(true)
            }
            "GET" | "HEAD" => {
                self.count_request();
                let served = self.serve(session, ctx).await?;
                Ok(served || !self.take_room_to_pass(session, ctx).await?)
            }
            method => {
                self.count_request();
                let Some(url) = self.name_of(session.req_header()) else {
                    self.refuse(session, ctx, 400, "malformed").await?;
                    return Ok(true);
                };
                if self.has_passed_here(&session.req_header().headers) {
                    self.refuse(session, ctx, 508, "loop").await?;
                    return Ok(true);
                }
                if !SAFE_METHODS.contains(&method) {
                    ctx.may_change = Some(url);
                } else if matches!(method, "OPTIONS" | "TRACE")
                    && max_forwards(session.req_header()) == Some(0)
                {
                    let status = if method == "OPTIONS" { 204 } else { 405 };
                    let mut head = ResponseHeader::build_no_case(status, None)?;
                    head.insert_header(header::ALLOW, ALLOWED)?;
                    if status == 405 {
                        head.insert_header(header::CONTENT_LENGTH, 0)?;
                    }
                    self.begin(session, ctx, head, true, &[]).await?;
                    return Ok(true);
                }
                ctx.passed = Some("method");
                Ok(!self.take_room_to_pass(session, ctx).await?)
            }
        }
    }

    async fn upstream_peer(
        &self,
        _session: &mut Session,
        ctx: &mut Context,
    ) -> Result<Box<HttpPeer>> {
        let peer = self.engine.origin().peer(&ctx.unconnected).await;
        peer.map(Box::new)
            .map_err(|e| Error::because(ErrorType::ConnectNoRoute, "origin", e).into_up())
    }

    /// Nothing was sent: the next upstream may be asked, whatever the method.
    fn fail_to_connect(
        &self,
        _session: &mut Session,
        peer: &HttpPeer,
        ctx: &mut Context,
        mut error: Box<Error>,
    ) -> Box<Error> {
        ctx.unconnected.push(peer.clone());
        error.set_retry(self.engine.origin().cannot_connect(&ctx.unconnected));
        error
    }

    async fn upstream_request_filter(
        &self,
        session: &mut Session,
        upstream: &mut RequestHeader,
        _ctx: &mut Context,
    ) -> Result<()> {
        if let Some(url) = self.name_of(session.req_header()) {
            let host = self.engine.origin().host(&url.host);
            upstream.insert_header(header::HOST, host.to_owned())?;
        }
        // What names the host as well is for proxies (RFC 9112 section 3.2.1).
        if !upstream.raw_path().starts_with(b"/")
            && upstream.raw_path() != b"*"
            && let Some(url) = url::of_request(session.req_header())
        {
            let authority = upstream.raw_path().splitn(3, |byte| *byte == b'/').nth(2);
            let is_bare =
                authority.is_some_and(|rest| !rest.iter().any(|byte| b"/?".contains(byte)));
            let target = match is_bare && upstream.method == Method::OPTIONS {
                // RFC 9112 section 3.2.4.
                true => b"*",
                false => url.target.as_bytes(),
            };
            upstream.set_raw_path(target)?;
        }
        upstream.append_header(header::VIA, HeaderValue::from_static(VIA))?;
        if let Some(id) = self.loop_id() {
            upstream.append_header("cdn-loop", id.as_bytes())?;
        }
        upstream.remove_header("x-purge-token");
        if let Some(cookies) = joined_cookies(&upstream.headers) {
            upstream.insert_header(header::COOKIE, cookies)?;
        }
        let client = session.req_header();
        if let Some(left) = max_forwards(client)
            && matches!(client.method, Method::OPTIONS | Method::TRACE)
        {
            upstream.insert_header(header::MAX_FORWARDS, left.saturating_sub(1))?;
        }
        // What is for every cache on the way cannot be nominated away.
        if !upstream.headers.contains_key(header::CACHE_CONTROL) {
            for value in client.headers.get_all(header::CACHE_CONTROL) {
                upstream.append_header(header::CACHE_CONTROL, value.clone())?;
            }
        }
        Ok(())
    }

    async fn response_filter(
        &self,
        session: &mut Session,
        upstream: &mut ResponseHeader,
        ctx: &mut Context,
    ) -> Result<()> {
        if upstream.status == StatusCode::SWITCHING_PROTOCOLS {
            self.count_begun(ctx.started);
        }
        if upstream.status.is_informational() {
            return Ok(());
        }
        let fwd = match ctx.passed {
            Some("method") => "method",
            Some("request-no-store") => "request",
            _ => "bypass",
        };
        let detail = ctx.passed.unwrap_or("none");
        let status = format!(
            "fwd={fwd}; fwd-status={}; detail={detail}",
            upstream.status.as_u16()
        );
        // Framing is Pingora's: it has chosen it already.
        for name in hop_by_hop(&upstream.headers) {
            if ![header::TRANSFER_ENCODING, header::CONTENT_LENGTH].contains(&name) {
                upstream.remove_header(&name);
            }
        }
        self.describe(upstream, &status, "PASS")?;
        keep_date(upstream);
        if session.req_header().version == http::Version::HTTP_10
            && !upstream.headers.contains_key(header::CONTENT_LENGTH)
        {
            // As in `begin`: no chunks, the connection's end is the body's.
            upstream.remove_header(&header::TRANSFER_ENCODING);
            session.set_keepalive(None);
            reset::would_look_complete(true);
        }
        if let Some(url) = ctx.may_change.take()
            && (upstream.status.is_success() || upstream.status.is_redirection())
        {
            // The answer is held back until no node answers from before it.
            self.engine.purge_changed(&url, &upstream.headers).await;
        }
        self.count_begun(ctx.started);
        Ok(())
    }

    fn upstream_response_body_filter(
        &self,
        _session: &mut Session,
        body: &mut Option<Bytes>,
        _end: bool,
        _ctx: &mut Context,
    ) -> Result<Option<Duration>> {
        if let Some(bytes) = body {
            self.metrics
                .bytes_from_origin_total
                .inc_by(bytes.len() as u64);
        }
        Ok(None)
    }

    fn response_body_filter(
        &self,
        _session: &mut Session,
        body: &mut Option<Bytes>,
        _end: bool,
        _ctx: &mut Context,
    ) -> Result<Option<Duration>> {
        if let Some(bytes) = body {
            self.metrics
                .bytes_to_client_total
                .inc_by(bytes.len() as u64);
        }
        Ok(None)
    }

    async fn fail_to_proxy(
        &self,
        session: &mut Session,
        error: &Error,
        ctx: &mut Context,
    ) -> pingora_proxy::FailToProxy {
        let refused = |error_code| pingora_proxy::FailToProxy {
            error_code,
            can_reuse_downstream: false,
        };
        if has_begun(session) {
            return refused(0);
        }
        let status = match (error.etype(), error.esource()) {
            (ErrorType::HTTPStatus(status), _) => *status,
            (
                ErrorType::ConnectTimedout | ErrorType::ReadTimedout | ErrorType::WriteTimedout,
                pingora_core::ErrorSource::Upstream,
            ) => 504,
            (_, pingora_core::ErrorSource::Upstream) => 502,
            (
                ErrorType::WriteError
                | ErrorType::WriteTimedout
                | ErrorType::ReadError
                | ErrorType::ConnectionClosed,
                pingora_core::ErrorSource::Downstream,
            ) => 0,
            (_, pingora_core::ErrorSource::Downstream) => 400,
            _ => 500,
        };
        if status > 0 {
            let _ = self.refuse(session, ctx, status, "proxy-error").await;
        }
        refused(status)
    }

    fn suppress_error_log(&self, _session: &Session, _ctx: &Context, error: &Error) -> bool {
        matches!(error.esource(), pingora_core::ErrorSource::Downstream)
    }

    async fn logging(&self, session: &mut Session, error: Option<&Error>, ctx: &mut Context) {
        if error.is_none() {
            reset::would_look_complete(false);
        }
        if session.req_header().method.as_str() == "PURGE" {
            return;
        }
        if let (false, Some(why)) = (ctx.counted, ctx.passed) {
            self.count_pass(why, session.response_written().map(|head| head.status));
        }
        self.count_over(ctx.started);
    }
}
