//! A client's connection around its requests: who reads them, how long a head
//! may take, and how many connections there are.
//!
//! ```text
//! HTTP/2  → Pingora
//! HTTP/1  → a head, in time ┬ plain, out of slices → Front::answer_directly ┐
//!           ↑               └ anything else → Pingora, from its first byte  │
//!           └───────────────────────── the next ────────────────────────────┘
//! ```
//!
//! Pingora's own timeouts hold for one read each, so a client that sends a byte
//! now and then would keep its connection forever. Here one deadline holds for
//! the whole head. Each connection, and each stream of HTTP/2, has its share of
//! the memory budget while it waits for a request or is answered; without one it
//! is closed. Not here: a body's pace (`pace`), HTTP/2 connections that are idle
//! (Pingora).

use std::cell::Cell;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use pingora_core::apps::{
    HttpPersistentSettings, HttpServerApp, HttpServerOptions, ReusedHttpStream, ServerApp,
};
use pingora_core::protocols::http::ServerSession;
use pingora_core::protocols::http::v2::server::H2Options;
use pingora_core::protocols::{ALPN, Stream};
use pingora_core::server::ShutdownWatch;
use pingora_core::server::configuration::ServerConf;
use pingora_core::services::listening::Service;
use pingora_proxy::{HttpProxy, http_proxy};
use pingora_slice_cluster::ObjectKey;
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::{Instant, Sleep, sleep};
use tokio_util::sync::CancellationToken;

use crate::budget::{Budget, CONNECTION_BYTES, Permit, STREAM_BYTES};
use crate::config::ClientTimeouts;
use crate::front::{Directly, Front, Known};
use crate::head::{self, Head};
use crate::metrics::Metrics;
use crate::stream::{ClientStream, with_dates};

/// How a connection of HTTP/2 begins (RFC 9113 section 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// At shutdown, how long a new connection may take to send its first head.
const FRESH_FOR: Duration = Duration::from_secs(1);

tokio::task_local! {
    /// Whether this connection's request head is there.
    static HEAD_IS_THERE: Arc<AtomicBool>;
    /// What the short way has found out for this request.
    static KNOWN: Cell<Option<Box<Known>>>;
}

/// Says that the request head of this task's connection is there.
pub(crate) fn head_is_there() {
    // HTTP/2 streams begin with their head and have no deadline for it.
    let _ = HEAD_IS_THERE.try_with(|there| there.store(true, Ordering::Relaxed));
}

/// Whether this task's connection is one that waits for the rest of a head.
pub(crate) fn awaits_head() -> bool {
    HEAD_IS_THERE
        .try_with(|there| !there.load(Ordering::Relaxed))
        .unwrap_or(false)
}

/// What is known already of the object that this task's request asks for.
pub(crate) fn known_of(key: ObjectKey) -> Option<Known> {
    let known = KNOWN.try_with(Cell::take).ok().flatten()?;
    (known.request.key == key).then_some(*known)
}

/// Clients' connections of one kind of listener.
pub struct Clients {
    front: Front,
    streams: Arc<Streams>,
    timeouts: ClientTimeouts,
    /// Connections that wait for a request end when this is cancelled.
    closing: CancellationToken,
}

impl Clients {
    /// A service for listeners of one kind: with `h2c`, HTTP/2 without TLS is
    /// spoken to clients that begin with it.
    pub fn service(
        conf: &Arc<ServerConf>,
        front: Front,
        timeouts: ClientTimeouts,
        budget: Budget,
        metrics: Arc<Metrics>,
        h2c: bool,
    ) -> Service<Clients> {
        let mut options = HttpServerOptions::default();
        options.h2c = h2c;
        options.h2_idle_timeout = Some(timeouts.idle);
        let sessions =
            (budget.sum().connections / 2 / CONNECTION_BYTES).min(Semaphore::MAX_PERMITS as u64);
        let name = if h2c { "clients, h2c" } else { "clients" };
        let clients = Clients {
            front: front.clone(),
            streams: Arc::new(Streams {
                proxy: Arc::new(http_proxy(conf, front)),
                options,
                sessions: Semaphore::new(sessions as usize),
                budget,
                metrics,
            }),
            timeouts,
            closing: CancellationToken::new(),
        };
        Service::new(name.to_string(), clients)
    }

    /// Whether HTTP/2 is spoken on this connection; `None` if it ends before
    /// that is known.
    async fn is_http2(&self, stream: &mut Stream) -> Option<bool> {
        if stream.get_ssl_digest().is_some() {
            return Some(stream.selected_alpn_proto() == Some(ALPN::H2));
        }
        if !self.streams.options.h2c {
            return Some(false);
        }
        let mut begin = [0; PREFACE.len()];
        let peek = tokio::time::timeout(self.timeouts.header, stream.try_peek(&mut begin));
        peek.await.ok()?.ok()?;
        Some(begin == PREFACE)
    }

    /// One request after the other, until the connection ends.
    async fn answer_all(&self, stream: Stream, shutdown: &ShutdownWatch) {
        let mut stream = Box::new(ClientStream::new(stream));
        let mut closing = std::pin::pin!(self.closing.cancelled());
        let mut timer = std::pin::pin!(sleep(self.timeouts.header));
        // Accepted connections are answered even after the listener closes.
        let mut fresh = Some(self.front.under_way());
        let mut settings: Option<HttpPersistentSettings> = None;
        loop {
            let mut known = None;
            if !stream.is_beyond() {
                let waiting = match fresh.is_some() {
                    true => self.timeouts.header,
                    false => self.timeouts.idle,
                };
                let mut until = Instant::now() + waiting;
                let Head { length, plain } = loop {
                    if let Some(head) = head::read(stream.ahead()) {
                        break head;
                    }
                    let is_first = stream.ahead().is_empty();
                    let read = tokio::select! {
                        biased;
                        read = stream.read_ahead() => read,
                        () = passed(timer.as_mut(), until) => return,
                        () = &mut closing, if fresh.is_none() => return,
                        () = closed_for(&self.closing, FRESH_FOR), if fresh.is_some() => return,
                    };
                    if !read.is_ok_and(|bytes| bytes > 0) {
                        return;
                    }
                    if is_first && fresh.is_none() {
                        until = Instant::now() + self.timeouts.header;
                    }
                };
                if let Some(head) = plain
                    && !*shutdown.borrow()
                {
                    let is_last = head.is_last;
                    match self.front.answer_directly(head, stream.direct()).await {
                        Ok(Directly::Answered) if is_last => {
                            let end = stream.direct().as_mut().shutdown();
                            let _ = tokio::time::timeout(self.timeouts.write, end).await;
                            return;
                        }
                        Ok(Directly::Answered) => {
                            stream.used(length);
                            fresh = None;
                            continue;
                        }
                        Ok(Directly::Not(found)) => known = found,
                        Err(_) => return,
                    }
                }
                stream.give(length);
            }
            stream.begin_head();
            let mut session = ServerSession::new_http1(stream);
            if let Some(settings) = settings.take() {
                settings.apply_to_session(&mut session);
            }
            // Off while the node stops: then it stays so.
            session.set_keepalive((!*shutdown.borrow()).then(|| whole_secs(self.timeouts.idle)));
            let patience = match fresh.is_some() {
                true => self.timeouts.header,
                false => self.timeouts.idle + self.timeouts.header,
            };
            let answer = self.by_pingora(session, patience, shutdown);
            let Some(reused) = KNOWN.scope(Cell::new(known), answer).await else {
                return;
            };
            let (back, its) = reused.consume();
            let Ok(back) = back.into_any().downcast::<ClientStream>() else {
                return;
            };
            stream = back;
            fresh = None;
            settings = its;
        }
    }

    /// One request by Pingora; its head, where it is not there yet, within `patience`.
    async fn by_pingora(
        &self,
        mut session: ServerSession,
        patience: Duration,
        shutdown: &ShutdownWatch,
    ) -> Option<ReusedHttpStream> {
        // Requests sent without waiting are answered in their order (RFC 9112 section 9.3.2).
        session.set_pipelining_enabled(true);
        let there = Arc::new(AtomicBool::new(false));
        let answer = self.streams.proxy.process_new_http(session, shutdown);
        let mut answer = std::pin::pin!(HEAD_IS_THERE.scope(there.clone(), answer));
        match tokio::time::timeout(patience, &mut answer).await {
            Ok(reused) => reused,
            Err(_) if there.load(Ordering::Relaxed) => answer.await,
            // Dropping it closes the connection.
            Err(_) => None,
        }
    }
}

/// Waits until this long after shutdown has begun.
async fn closed_for(closing: &CancellationToken, time: Duration) {
    closing.cancelled().await;
    sleep(time).await;
}

/// Waits until a time. The timer is not reset for each request, but when it goes
/// off, or where it would be too late.
async fn passed(mut timer: Pin<&mut Sleep>, at: Instant) {
    if timer.deadline() > at {
        timer.as_mut().reset(at);
    }
    loop {
        timer.as_mut().await;
        if at <= Instant::now() {
            return;
        }
        timer.as_mut().reset(at);
    }
}

#[async_trait]
impl ServerApp for Clients {
    async fn process_new(
        self: &Arc<Self>,
        mut stream: Stream,
        shutdown: &ShutdownWatch,
    ) -> Option<Stream> {
        let _place = self.streams.place(CONNECTION_BYTES).await?;
        match self.is_http2(&mut stream).await? {
            true => {
                let _session = self.streams.session()?;
                self.streams.process_new(stream, shutdown).await
            }
            false => {
                with_dates(self.answer_all(stream, shutdown)).await;
                None
            }
        }
    }

    async fn cleanup(&self) {
        self.closing.cancel();
        self.streams.proxy.http_cleanup().await;
    }
}

/// Requests over HTTP/2.
struct Streams {
    proxy: Arc<HttpProxy<Front>>,
    options: HttpServerOptions,
    /// For its connections, which have half of the clients' share at most: the
    /// other half is for their streams.
    sessions: Semaphore,
    budget: Budget,
    metrics: Arc<Metrics>,
}

impl Streams {
    /// The right to be a connection of HTTP/2; `None`: there are as many as may be.
    fn session(&self) -> Option<SemaphorePermit<'_>> {
        let session = self.sessions.try_acquire();
        session
            .inspect_err(|_| self.metrics.memory_refusals_total.inc())
            .ok()
    }

    /// A share of the memory budget; `None`: there is none to be had.
    async fn place(&self, bytes: u64) -> Option<Permit> {
        let place = self.budget.connection(bytes).await;
        if place.is_none() {
            self.metrics.memory_refusals_total.inc();
        }
        place
    }
}

#[async_trait]
impl HttpServerApp for Streams {
    async fn process_new_http(
        self: &Arc<Self>,
        session: ServerSession,
        shutdown: &ShutdownWatch,
    ) -> Option<ReusedHttpStream> {
        let _place = self.place(STREAM_BYTES).await?;
        self.proxy.process_new_http(session, shutdown).await
    }

    fn h2_options(&self) -> Option<H2Options> {
        self.proxy.h2_options()
    }

    fn server_options(&self) -> Option<&HttpServerOptions> {
        Some(&self.options)
    }
}

/// Rounded up: 0 would be no patience at all.
fn whole_secs(time: Duration) -> u64 {
    time.as_secs() + u64::from(time.subsec_nanos() > 0)
}
