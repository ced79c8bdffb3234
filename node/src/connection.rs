//! A client's connection around its requests: how long it may take with a
//! request's head, and how many requests are being answered.
//!
//! Pingora's own timeouts hold for one read each, so a client that sends a byte
//! now and then would keep its connection for ever. Here one deadline holds for
//! the whole head. Each connection, and each stream of HTTP/2, has its share of
//! the memory budget while it waits for a request or is answered; without one it
//! is closed. Not here: a body's pace (`pace`), HTTP/2 connections that are idle
//! (Pingora).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use pingora_core::apps::{HttpServerApp, HttpServerOptions, ReusedHttpStream};
use pingora_core::protocols::http::ServerSession;
use pingora_core::protocols::http::v2::server::H2Options;
use pingora_core::server::ShutdownWatch;
use pingora_core::server::configuration::ServerConf;
use pingora_core::services::listening::Service;
use pingora_proxy::{HttpProxy, http_proxy};

use crate::budget::{Budget, CONNECTION_BYTES, STREAM_BYTES};
use crate::config::ClientTimeouts;
use crate::dated::Dated;
use crate::front::Front;
use crate::metrics::Metrics;

tokio::task_local! {
    /// Whether this connection's request head is there.
    static HEAD_IS_THERE: Arc<AtomicBool>;
}

/// Says that the request head of this task's connection is there.
pub(crate) fn head_is_there() {
    // HTTP/2 streams begin with their head and have no deadline for it.
    let _ = HEAD_IS_THERE.try_with(|there| there.store(true, Ordering::Relaxed));
}

/// Marks a connection that has answered a request.
pub(crate) struct Reused;

/// The proxy, and its patience with clients.
pub struct Patient {
    proxy: Arc<HttpProxy<Front>>,
    options: HttpServerOptions,
    timeouts: ClientTimeouts,
    budget: Budget,
    metrics: Arc<Metrics>,
}

impl Patient {
    /// A service for listeners of one kind: with `h2c`, HTTP/2 without TLS is
    /// spoken to clients that begin with it.
    pub fn service(
        conf: &Arc<ServerConf>,
        front: Front,
        timeouts: ClientTimeouts,
        budget: Budget,
        metrics: Arc<Metrics>,
        h2c: bool,
    ) -> Service<Dated<Patient>> {
        let mut options = HttpServerOptions::default();
        options.h2c = h2c;
        options.h2_idle_timeout = Some(timeouts.idle);
        let name = if h2c { "clients, h2c" } else { "clients" };
        let patient = Patient {
            proxy: Arc::new(http_proxy(conf, front)),
            options,
            timeouts,
            budget,
            metrics,
        };
        Service::new(name.to_string(), Dated::new(patient))
    }
}

#[async_trait]
impl HttpServerApp for Patient {
    async fn process_new_http(
        self: &Arc<Self>,
        mut session: ServerSession,
        shutdown: &ShutdownWatch,
    ) -> Option<ReusedHttpStream> {
        let bytes = match session.is_http2() {
            true => STREAM_BYTES,
            false => CONNECTION_BYTES,
        };
        let Some(_place) = self.budget.connection(bytes).await else {
            self.metrics.memory_refusals_total.inc();
            return None;
        };
        if session.is_http2() {
            return self.proxy.process_new_http(session, shutdown).await;
        }
        let deadline = match session.take_connection_user_context() {
            Some(context) if context.is::<Reused>() => self.timeouts.idle + self.timeouts.header,
            _ => self.timeouts.header,
        };
        // Requests sent without waiting are answered in their order (RFC 9112 section 9.3.2).
        session.set_pipelining_enabled(true);
        // Off while the node stops: then it stays so.
        if session.get_keepalive().is_some() {
            session.set_keepalive(Some(whole_secs(self.timeouts.idle)));
        }
        let there = Arc::new(AtomicBool::new(false));
        let answer = self.proxy.process_new_http(session, shutdown);
        let mut answer = std::pin::pin!(HEAD_IS_THERE.scope(there.clone(), answer));
        match tokio::time::timeout(deadline, &mut answer).await {
            Ok(reused) => reused,
            Err(_) if there.load(Ordering::Relaxed) => answer.await,
            // Dropping it closes the connection.
            Err(_) => None,
        }
    }

    fn h2_options(&self) -> Option<H2Options> {
        self.proxy.h2_options()
    }

    fn server_options(&self) -> Option<&HttpServerOptions> {
        Some(&self.options)
    }

    async fn http_cleanup(&self) {
        self.proxy.http_cleanup().await;
    }
}

/// Rounded up: 0 would be no patience at all.
fn whole_secs(time: Duration) -> u64 {
    time.as_secs() + u64::from(time.subsec_nanos() > 0)
}
