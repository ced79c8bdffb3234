//! The two addresses for operators, served by Pingora's own HTTP.
//!
//! | address | path | answers |
//! | --- | --- | --- |
//! | metrics | `/` | a page for people |
//! | | `/metrics`, `/metrics/cluster` | this node's metrics, all nodes' ([`crate::metrics`]) |
//! | | `/health` | 200 while the process serves |
//! | | `/ready` | 200 once it may answer from its cache, else 503 and why |
//! | admin | `/v1/...` | the JSON API ([`api`]), for whoever has the token |
//!
//! Both refuse what they don't know (404, 405), read a bounded head and body in
//! bounded time, and serve a bounded number of requests at once. The metrics
//! address shows, and changes nothing; it has no token, so keep it private.
//! Not here: what a purge is ([`crate::purge`]), what the page looks like
//! ([`crate::status_page`]), what a URL's slices are doing (the engine, by [`Inspect`]).

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use http::{HeaderName, Method, StatusCode, header};
use pingora_core::apps::{HttpPersistentSettings, HttpServerApp, ReusedHttpStream};
use pingora_core::protocols::http::ServerSession;
use pingora_core::server::ShutdownWatch;
use pingora_core::services::listening::Service;
use pingora_http::ResponseHeader;
use pingora_slice_client::api;
use pingora_slice_cluster::handle::{ClusterStatus, NodeStatus, PurgeError};
use pingora_slice_cluster::members::{NodeState, Role};
use pingora_slice_cluster::purge::PurgeMode;
use pingora_slice_cluster::{Cluster, NodeId};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::config::Live;
use crate::metrics::{Gauges, Metrics, merge};
use crate::purge::{self, AuthFailure, Purger, Refusal};
use crate::status_page::{self, Sample};
use crate::url::Url;

/// Longest wait for a request's whole head, idle time of a kept connection included.
const HEAD_TIMEOUT: Duration = Duration::from_secs(60);
/// Longest wait for a request's whole body.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);
/// Longest wait for a client to take what is written.
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);
/// Requests served at once at one address; with [`api::REQUEST_BYTES_MAX`] each
/// that is 128 MiB at worst, and only from those who have the token.
const REQUESTS_MAX: usize = 32;
/// Of these, calls that warm: each may take as long as the origin does for its
/// URLs, and purges must find room beside them.
const WARMS_MAX: usize = 8;
const _: () = assert!(WARMS_MAX < REQUESTS_MAX);
/// Time between two samples of the status page's history.
const SAMPLE_EVERY: Duration = Duration::from_secs(5);
/// Samples kept: one hour.
const SAMPLES_MAX: usize = 720;

/// What the engine shows of itself.
#[async_trait]
pub trait Inspect: Send + Sync + 'static {
    /// Where a URL's bytes are, and what a request for it would get now.
    /// `url` is normalised: `host/path?query`.
    async fn explain(&self, url: &str) -> api::Explain;
    /// Fetches what is not there; `urls` as the client gave them, each valid
    /// for [`Url::parse`], at most [`api::WARM_URLS_MAX`].
    async fn warm(&self, urls: Vec<String>) -> api::Warmed;
    /// What the metrics show of this moment.
    fn gauges(&self) -> Gauges;
}

/// What both addresses show and do. One per node.
pub struct Admin {
    cluster: Cluster,
    inspect: Arc<dyn Inspect>,
    metrics: Arc<Metrics>,
    purger: Arc<Purger>,
    history: Mutex<VecDeque<Sample>>,
    /// See [`WARMS_MAX`].
    warms: Semaphore,
}

impl Admin {
    /// Joins the parts; serves nothing yet.
    pub fn new(
        cluster: Cluster,
        inspect: Arc<dyn Inspect>,
        metrics: Arc<Metrics>,
        purger: Arc<Purger>,
    ) -> Arc<Admin> {
        Arc::new(Admin {
            cluster,
            inspect,
            metrics,
            purger,
            history: Mutex::default(),
            warms: Semaphore::new(WARMS_MAX),
        })
    }

    /// The service for the metrics address; the caller adds the listener.
    pub fn metrics_service(self: &Arc<Self>) -> Service<HttpApp> {
        let app = HttpApp::new(self.clone(), Face::Metrics);
        Service::new("metrics".to_owned(), app)
    }

    /// The service for the admin address; the caller adds the listener.
    pub fn admin_service(self: &Arc<Self>, live: Live) -> Service<HttpApp> {
        let app = HttpApp::new(self.clone(), Face::Api(live));
        Service::new("admin".to_owned(), app)
    }

    /// This node's metrics, also for its peers.
    pub fn metrics_text(&self) -> String {
        self.metrics.render(&self.inspect.gauges())
    }

    /// Keeps the status page's history until `stop`; `node.rs` owns the task.
    pub async fn sample_until(&self, stop: CancellationToken) {
        let mut ticks = tokio::time::interval(SAMPLE_EVERY);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        while stop.run_until_cancelled(ticks.tick()).await.is_some() {
            self.sample();
        }
    }

    fn sample(&self) {
        let sample = Sample {
            hits: self.metrics.cache_hits_total.get(),
            lookups: self.metrics.lookups_total(),
        };
        let mut history = self.history.lock().unwrap_or_else(PoisonError::into_inner);
        history.push_back(sample);
        while history.len() > SAMPLES_MAX {
            history.pop_front();
        }
    }

    /// Answers at the metrics address.
    async fn show(&self, method: &Method, path: &str) -> Reply {
        if !matches!(
            path,
            "/" | "/metrics" | "/metrics/cluster" | "/health" | "/ready"
        ) {
            return Reply::text(StatusCode::NOT_FOUND, "not found\n");
        }
        if !matches!(*method, Method::GET | Method::HEAD) {
            return Reply::text(StatusCode::METHOD_NOT_ALLOWED, "GET or HEAD\n")
                .with(header::ALLOW, "GET, HEAD");
        }
        match path {
            "/" => self.page(),
            "/metrics" => Reply::metrics(self.metrics_text()),
            "/metrics/cluster" => Reply::metrics(self.metrics_of_all().await),
            "/ready" => match self.unready() {
                None => Reply::text(StatusCode::OK, "ready\n"),
                Some(reason) => {
                    Reply::text(StatusCode::SERVICE_UNAVAILABLE, &format!("{reason}\n"))
                }
            },
            _ => Reply::text(StatusCode::OK, "ok\n"),
        }
    }

    fn page(&self) -> Reply {
        let history: Vec<Sample> = {
            let history = self.history.lock().unwrap_or_else(PoisonError::into_inner);
            history.iter().copied().collect()
        };
        let body = status_page::render(&status_page::Shown {
            status: &self.cluster.status(),
            unready: self.unready().as_deref(),
            gauges: &self.inspect.gauges(),
            metrics: &self.metrics,
            history: &history,
            every: SAMPLE_EVERY,
            purges: &self.cluster.recent_purges(),
            asked_here: &self.purger.recent(),
        });
        Reply::new(
            StatusCode::OK,
            "text/html; charset=utf-8",
            body.into_bytes(),
        )
        .with(
            header::CONTENT_SECURITY_POLICY,
            "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'",
        )
    }

    async fn metrics_of_all(&self) -> String {
        let me = self.cluster.view().me;
        let others = self.cluster.metrics_of_peers().await;
        let others: Vec<(NodeId, Option<&str>)> = others
            .iter()
            .map(|(node, text)| {
                let text = text.as_deref();
                (*node, text.and_then(|t| std::str::from_utf8(t).ok()))
            })
            .collect();
        merge::merge((me, &self.metrics_text()), &others)
    }

    /// Why this node should not be sent clients; `None` when it may serve.
    fn unready(&self) -> Option<String> {
        if self.cluster.view().hash_key.is_none() {
            let mut text =
                "the cluster has not formed, or this node has not joined it yet".to_owned();
            for (seed, why) in self.cluster.unanswered() {
                text += &format!("\n{seed}: {why}");
            }
            Some(text)
        } else if !self.cluster.may_serve() {
            Some(
                "no lease: this node cannot reach the cluster's leader, and asks the origin for everything"
                    .to_owned(),
            )
        } else {
            None
        }
    }

    fn unanswered(&self) -> Vec<api::Seed> {
        let seeds = self.cluster.unanswered().into_iter();
        seeds
            .map(|(address, why)| api::Seed { address, why })
            .collect()
    }

    /// Answers at the admin address, once the token has been checked.
    async fn call(&self, session: &mut ServerSession) -> Reply {
        let head = session.req_header();
        let method = head.method.clone();
        let path = head.uri.path().to_owned();
        let query = head.uri.query().unwrap_or_default().to_owned();
        let segments: Vec<&str> = path.trim_start_matches('/').split('/').collect();
        let allowed = match segments[..] {
            ["v1", "cluster" | "explain"] | ["v1", "purge", _] => Method::GET,
            ["v1", "purge" | "warm"] | ["v1", "nodes", _, "drain"] => Method::POST,
            ["v1", "nodes", _] => Method::DELETE,
            _ => return Reply::failure(StatusCode::NOT_FOUND, format!("no such call: {path}")),
        };
        if method != allowed {
            return Reply::failure(StatusCode::METHOD_NOT_ALLOWED, format!("use {allowed}"))
                .with(header::ALLOW, allowed.as_str());
        }
        match segments[..] {
            ["v1", "cluster"] => Reply::json(&api::Cluster {
                recent_purges: self.purger.recent().iter().map(purge_message).collect(),
                unanswered: self.unanswered(),
                ..cluster_message(self.cluster.status())
            }),
            ["v1", "purge", id] => self.progress(id).await,
            ["v1", "explain"] => self.explain(&query).await,
            ["v1", "purge"] => match message(session).await {
                Ok(purge) => self.purge(purge).await,
                Err(refusal) => {
                    self.purger.count_malformed();
                    refusal
                }
            },
            ["v1", "warm"] => match message(session).await {
                Ok(warm) => self.warm(warm).await,
                Err(refusal) => refusal,
            },
            ["v1", "nodes", id, ..] => self.change(id, &method).await,
            _ => Reply::failure(StatusCode::NOT_FOUND, format!("no such call: {path}")),
        }
    }

    async fn purge(&self, purge: api::Purge) -> Reply {
        let wanted = match purge::understand_api(purge) {
            Ok(wanted) => wanted,
            Err(reason) => {
                self.purger.count_malformed();
                return Reply::failure(StatusCode::BAD_REQUEST, reason);
            }
        };
        match self.purger.purge(wanted).await {
            Ok(purged) => Reply::json(&purged),
            Err(refusal) => {
                let failure = api::Failure {
                    error: refusal.to_string(),
                    request_id: match &refusal {
                        Refusal::NotConfirmed { request_id, .. } => Some(request_id.clone()),
                        _ => None,
                    },
                };
                Reply::json_with(refusal.status(), &failure)
            }
        }
    }

    async fn progress(&self, id: &str) -> Reply {
        match percent_decoded(id) {
            Some(id) => match self.purger.progress(&id).await {
                Some(progress) => Reply::json(&progress),
                None => Reply::failure(StatusCode::NOT_FOUND, "no such purge is committed"),
            },
            None => Reply::failure(StatusCode::BAD_REQUEST, "not a purge's number"),
        }
    }

    async fn explain(&self, query: &str) -> Reply {
        let given = query.split('&').find_map(|pair| pair.strip_prefix("url="));
        let url = given.and_then(percent_decoded).unwrap_or_default();
        match Url::parse(&url) {
            Ok(url) => Reply::json(&self.inspect.explain(&url.to_string()).await),
            Err(reason) => Reply::failure(StatusCode::BAD_REQUEST, format!("url: {reason}")),
        }
    }

    async fn warm(&self, warm: api::Warm) -> Reply {
        let Ok(_permit) = self.warms.try_acquire() else {
            return busy("too many calls warm at once");
        };
        if !(1..=api::WARM_URLS_MAX).contains(&warm.urls.len()) {
            let max = api::WARM_URLS_MAX;
            return Reply::failure(StatusCode::BAD_REQUEST, format!("urls: 1 to {max}"));
        }
        for url in &warm.urls {
            if let Err(reason) = Url::parse(url) {
                return Reply::failure(StatusCode::BAD_REQUEST, reason);
            }
        }
        Reply::json(&self.inspect.warm(warm.urls).await)
    }

    /// Drains a node, or removes it for good.
    async fn change(&self, id: &str, method: &Method) -> Reply {
        let Ok(number) = id.parse() else {
            return Reply::failure(StatusCode::BAD_REQUEST, format!("{id:?} is not a number"));
        };
        let node = NodeId(number);
        let status = self.cluster.status();
        if !status.nodes.iter().any(|n| n.member.id == node) {
            return Reply::failure(StatusCode::NOT_FOUND, format!("no node {node}"));
        }
        let (done, message) = if *method == Method::DELETE {
            let message = format!("node {node} is removed; its number is never used again");
            (self.cluster.remove(node).await, message)
        } else {
            let message = format!("node {node} owns nothing new and goes on answering");
            (self.cluster.drain(node).await, message)
        };
        match done {
            Ok(()) => {
                tracing::info!("{message}");
                Reply::json(&api::Done {
                    success: true,
                    message,
                })
            }
            Err(e @ PurgeError::NotConfirmed(_)) => {
                Reply::failure(StatusCode::SERVICE_UNAVAILABLE, e.to_string())
            }
            Err(e @ PurgeError::Invalid(_)) => {
                Reply::failure(StatusCode::BAD_REQUEST, e.to_string())
            }
        }
    }
}

fn busy(why: &'static str) -> Reply {
    Reply::failure(StatusCode::SERVICE_UNAVAILABLE, why).with(header::RETRY_AFTER, "1")
}

/// Which of the two addresses.
enum Face {
    Metrics,
    /// Whose token is the one in force.
    Api(Live),
}

/// One address: reads a request, answers it, keeps the connection.
pub struct HttpApp {
    admin: Arc<Admin>,
    face: Face,
    permits: Semaphore,
}

impl HttpApp {
    fn new(admin: Arc<Admin>, face: Face) -> HttpApp {
        HttpApp {
            admin,
            face,
            permits: Semaphore::new(REQUESTS_MAX),
        }
    }

    async fn reply(&self, session: &mut ServerSession) -> Reply {
        let Ok(_permit) = self.permits.try_acquire() else {
            return busy("too many requests at once");
        };
        let head = session.req_header();
        match &self.face {
            Face::Metrics => self.admin.show(&head.method, head.uri.path()).await,
            Face::Api(live) => {
                let given = purge::bearer(head);
                let token = live.now().admin_token.clone();
                if let (Some(token), Some(given)) = (token, given)
                    && token.matches(given)
                {
                    return self.admin.call(session).await;
                }
                if head.uri.path() == "/v1/purge" {
                    self.admin.purger.count_auth_failure(match given {
                        None => AuthFailure::MissingToken,
                        Some(_) => AuthFailure::InvalidToken,
                    });
                }
                let reason = "Authorization: Bearer TOKEN is required";
                Reply::failure(StatusCode::UNAUTHORIZED, reason)
                    .with(header::WWW_AUTHENTICATE, "Bearer")
            }
        }
    }
}

#[async_trait]
impl HttpServerApp for HttpApp {
    async fn process_new_http(
        self: &Arc<Self>,
        mut session: ServerSession,
        shutdown: &ShutdownWatch,
    ) -> Option<ReusedHttpStream> {
        session.set_write_timeout(Some(WRITE_TIMEOUT));
        session.set_total_drain_timeout(Some(BODY_TIMEOUT));
        // A client that goes away or sends no HTTP is not worth a line.
        let Ok(Ok(true)) = timeout(HEAD_TIMEOUT, session.read_request()).await else {
            return None;
        };
        let reply = self.reply(&mut session).await;
        // After a refusal the body may be unread: reading it would be the cost
        // that the refusal avoids.
        let keep = reply.status.is_success() && !*shutdown.borrow();
        session.set_keepalive(keep.then_some(HEAD_TIMEOUT.as_secs()));
        let head_only = session.req_header().method == Method::HEAD;
        let (head, body) = reply.into_parts()?;
        session.write_response_header(Box::new(head)).await.ok()?;
        if !head_only {
            session.write_response_body(body.into(), true).await.ok()?;
        }
        let settings = HttpPersistentSettings::for_session(&session);
        let stream = session.finish().await.ok()??;
        Some(ReusedHttpStream::from_reusable_stream(stream, settings))
    }
}

/// An answer, complete.
struct Reply {
    status: StatusCode,
    headers: Vec<(HeaderName, String)>,
    body: Vec<u8>,
}

impl Reply {
    fn new(status: StatusCode, content_type: &str, body: Vec<u8>) -> Reply {
        let headers = Vec::new();
        Reply {
            status,
            headers,
            body,
        }
        .with(header::CONTENT_TYPE, content_type)
        .with(header::CACHE_CONTROL, "no-store")
        .with(header::X_CONTENT_TYPE_OPTIONS, "nosniff")
    }

    fn text(status: StatusCode, text: &str) -> Reply {
        Reply::new(status, "text/plain; charset=utf-8", text.into())
    }

    fn metrics(text: String) -> Reply {
        let content_type = "text/plain; version=0.0.4; charset=utf-8";
        Reply::new(StatusCode::OK, content_type, text.into_bytes())
    }

    fn json(message: &impl Serialize) -> Reply {
        Reply::json_with(StatusCode::OK, message)
    }

    fn json_with(status: StatusCode, message: &impl Serialize) -> Reply {
        let body = serde_json::to_vec(message).expect("strings and numbers always serialize");
        Reply::new(status, "application/json", body)
    }

    fn failure(status: StatusCode, error: impl Into<String>) -> Reply {
        let failure = api::Failure {
            error: error.into(),
            request_id: None,
        };
        Reply::json_with(status, &failure)
    }

    fn with(mut self, name: HeaderName, value: &str) -> Reply {
        self.headers.push((name, value.to_owned()));
        self
    }

    /// For Pingora; `None` cannot happen with the headers above.
    fn into_parts(self) -> Option<(ResponseHeader, Vec<u8>)> {
        let mut head = ResponseHeader::build(self.status, Some(self.headers.len() + 1)).ok()?;
        for (name, value) in self.headers {
            head.append_header(name, value).ok()?;
        }
        head.insert_header(header::CONTENT_LENGTH, self.body.len().to_string())
            .ok()?;
        Some((head, self.body))
    }
}

/// Reads a request's body as a message.
async fn message<M: DeserializeOwned>(session: &mut ServerSession) -> Result<M, Reply> {
    let too_long = || {
        let max = api::REQUEST_BYTES_MAX;
        let reason = format!("the body may have at most {max} bytes");
        Reply::failure(StatusCode::PAYLOAD_TOO_LARGE, reason)
    };
    let announced = session.get_header(header::CONTENT_LENGTH);
    let announced = announced.and_then(|v| v.to_str().ok()?.parse::<usize>().ok());
    if announced.is_some_and(|length| length > api::REQUEST_BYTES_MAX) {
        return Err(too_long());
    }
    let broken_off = |_| Reply::failure(StatusCode::BAD_REQUEST, "the body was broken off");
    let expects = session.get_header(header::EXPECT).is_some();
    if expects && session.write_continue_response().await.is_err() {
        return Err(broken_off(()));
    }
    let read = async {
        let mut body = Vec::new();
        while let Some(piece) = session
            .read_request_body()
            .await
            .map_err(|_| broken_off(()))?
        {
            if body.len() + piece.len() > api::REQUEST_BYTES_MAX {
                return Err(too_long());
            }
            body.extend_from_slice(&piece);
        }
        Ok(body)
    };
    let slow = |_| Reply::failure(StatusCode::REQUEST_TIMEOUT, "the body came too slowly");
    let body = timeout(BODY_TIMEOUT, read).await.map_err(slow)??;
    // An array would be read as the fields in their order.
    if body.trim_ascii_start().first() == Some(&b'[') {
        let reason = "the body: a JSON object is wanted";
        return Err(Reply::failure(StatusCode::BAD_REQUEST, reason));
    }
    serde_json::from_slice(&body)
        .map_err(|e| Reply::failure(StatusCode::BAD_REQUEST, format!("the body: {e}")))
}

/// The value of a query parameter; `None` unless every `%XX` is one and the
/// whole is text.
fn percent_decoded(value: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(value.len());
    let mut rest = value.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        rest = tail;
        if *first == b'%' {
            let (digits, tail) = rest.split_at_checked(2)?;
            bytes.extend(hex::decode(digits).ok()?);
            rest = tail;
        } else {
            bytes.push(*first);
        }
    }
    String::from_utf8(bytes).ok()
}

fn cluster_message(status: ClusterStatus) -> api::Cluster {
    api::Cluster {
        node_id: status.node_id.0,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        leader: status.leader.map(|node| node.0),
        term: status.term,
        ring_epoch: status.ring_epoch,
        purge_index: status.purge_index.0,
        lease_valid: status.lease_valid,
        nodes: status.nodes.into_iter().map(node_message).collect(),
        recent_purges: Vec::new(),
        unanswered: Vec::new(),
    }
}

fn node_message(node: NodeStatus) -> api::Node {
    api::Node {
        id: node.member.id.0,
        advertise: node.member.advertise,
        role: role(node.member.role).to_owned(),
        weight: node.member.weight,
        state: state(node.member.state).to_owned(),
        up: node.up,
        leader: node.leader,
        applied: node.applied.map(|index| index.0),
        ring_share: node.ring_share,
    }
}

/// A role as it is written everywhere.
pub(crate) fn role(role: Role) -> &'static str {
    match role {
        Role::Voter => "voter",
        Role::Edge => "edge",
    }
}

/// A node's state as it is written everywhere.
pub(crate) fn state(state: NodeState) -> &'static str {
    match state {
        NodeState::Active => "active",
        NodeState::Draining => "draining",
    }
}

fn purge_message(recent: &purge::Recent) -> api::RecentPurge {
    let numbers = |nodes: &[NodeId]| nodes.iter().map(|node| node.0).collect();
    let at = recent.at.duration_since(SystemTime::UNIX_EPOCH);
    let mut message = api::RecentPurge {
        at_s: at.map_or(0, |since| since.as_secs()),
        what: recent.what.clone(),
        mode: match recent.mode {
            PurgeMode::Plain => api::Mode::Plain,
            PurgeMode::Soft => api::Mode::Soft,
            PurgeMode::Hard => api::Mode::Hard,
        },
        took_ms: recent.took_ms,
        ..api::RecentPurge::default()
    };
    match &recent.outcome {
        Ok(receipt) => {
            message.index = receipt.index.0;
            message.acked = numbers(&receipt.acked);
            message.fenced = numbers(&receipt.fenced);
            message.pending = numbers(&receipt.pending);
        }
        Err(reason) => message.refused = Some(reason.clone()),
    }
    message
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, Settings};
    use crate::l2::L2Stats;
    use futures::StreamExt as _;
    use futures::stream::FuturesUnordered;
    use pingora_core::apps::ServerApp;
    use pingora_core::protocols::l4::stream::Stream;
    use pingora_slice_client::{Client, ClientError};
    use pingora_slice_cluster::handle::ClusterConfig;
    use pingora_slice_cluster::peer::TlsFiles;
    use std::net::SocketAddr;
    use std::path::Path;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{TcpListener, TcpStream};
    use tokio::sync::watch;

    /// Warming this never ends.
    const ENDLESS: &str = "a/endless";

    /// An engine that repeats what it was asked.
    struct Echo;

    #[async_trait]
    impl Inspect for Echo {
        async fn explain(&self, url: &str) -> api::Explain {
            api::Explain {
                url: url.to_owned(),
                ..api::Explain::default()
            }
        }

        async fn warm(&self, urls: Vec<String>) -> api::Warmed {
            if urls.contains(&ENDLESS.to_owned()) {
                std::future::pending::<()>().await;
            }
            let urls = urls.into_iter().map(|url| api::WarmedUrl {
                url,
                success: true,
                ..api::WarmedUrl::default()
            });
            api::Warmed {
                urls: urls.collect(),
            }
        }

        fn gauges(&self) -> Gauges {
            Gauges {
                l1_bytes: 77,
                l2: Some(L2Stats::default()),
                ..Gauges::default()
            }
        }
    }

    fn live(token: &str) -> Live {
        let yaml = format!(
            "{{listen: '127.0.0.1:1', admin: {{address: '127.0.0.1:2', auth_token: {token}}}}}"
        );
        let config = Config::parse(&yaml, Path::new("/")).unwrap();
        Live::new(Settings::of(&config))
    }

    fn admin() -> Arc<Admin> {
        admin_of(Cluster::alone(None).unwrap())
    }

    fn admin_of(cluster: Cluster) -> Arc<Admin> {
        let metrics = Arc::new(Metrics::new());
        let purger = Purger::new(cluster.clone(), metrics.clone(), live("t"));
        Admin::new(cluster, Arc::new(Echo), metrics, purger)
    }

    /// Serves one face on a port of its own; ends with the test's runtime.
    async fn served(admin: &Arc<Admin>, face: Face) -> SocketAddr {
        let app = Arc::new(HttpApp::new(admin.clone(), face));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            let (_running, shutdown) = watch::channel(false);
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let (app, shutdown) = (app.clone(), shutdown.clone());
                tokio::spawn(async move {
                    let stream = Box::new(Stream::from(stream));
                    app.process_new(stream, &shutdown).await
                });
            }
        });
        address
    }

    /// Sends raw bytes, reads until the other end closes.
    async fn raw(address: SocketAddr, request: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    /// One call with an optional token: status and body.
    async fn call(address: SocketAddr, line: &str, token: &str, body: &str) -> (u16, String) {
        let length = body.len();
        let answer = raw(
            address,
            &format!(
                "{line} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: {token}\r\n\
                 Content-Length: {length}\r\n\r\n{body}"
            ),
        )
        .await;
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head[9..12].parse().unwrap(), body.to_owned())
    }

    #[tokio::test]
    async fn the_metrics_address_shows() {
        let admin = admin();
        admin.metrics.cache_hits_total.inc_by(3);
        admin.sample();
        admin.metrics.cache_misses_total.inc();
        admin.sample();
        let address = served(&admin, Face::Metrics).await;
        let get = async |path: &str| call(address, &format!("GET {path}"), "none", "").await;
        assert_eq!(get("/health").await, (200, "ok\n".to_owned()));
        assert_eq!(get("/ready").await, (200, "ready\n".to_owned()));
        let (status, text) = get("/metrics?x=1").await;
        assert_eq!(status, 200);
        assert!(text.contains("\npingora_slice_l1_bytes 77\n"));
        let (status, text) = get("/metrics/cluster").await;
        assert_eq!(status, 200);
        assert!(text.contains("\npingora_slice_cache_hits_total 3\n"));
        assert!(
            text.contains("pingora_slice_l1_bytes{node=\"1\"} 77\n"),
            "{text}"
        );
        assert!(text.contains("pingora_slice_node_up{node=\"1\"} 1\n"));
        let (status, page) = get("/").await;
        assert_eq!(status, 200);
        assert!(page.starts_with("<!doctype html>") && page.ends_with("</html>"));
        assert!(page.contains("<svg"));
        for outside in ["://", "src=", "url(", "<script"] {
            assert!(!page.contains(outside), "self-contained");
        }
        assert_eq!(get("/nothing").await.0, 404);
        assert_eq!(get("/v1/cluster").await.0, 404);
        assert_eq!(call(address, "POST /metrics", "none", "").await.0, 405);
        let (status, body) = call(address, "HEAD /metrics", "none", "").await;
        assert_eq!((status, body.as_str()), (200, ""));
    }

    #[tokio::test]
    async fn a_connection_is_kept_for_the_next_scrape() {
        let address = served(&admin(), Face::Metrics).await;
        let request = "GET /health HTTP/1.1\r\nHost: x\r\n\r\n";
        let last = "GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut first = vec![0; 1024];
        let read = stream.read(&mut first).await.unwrap();
        assert!(first[..read].starts_with(b"HTTP/1.1 200"));
        stream.write_all(last.as_bytes()).await.unwrap();
        let mut rest = String::new();
        stream.read_to_string(&mut rest).await.unwrap();
        assert!(
            rest.contains("HTTP/1.1 200") && rest.ends_with("ok\n"),
            "{rest}"
        );
    }

    #[tokio::test]
    async fn the_api_wants_its_token_for_everything() {
        let admin = admin();
        let address = served(&admin, Face::Api(live("s3cret"))).await;
        for path in ["GET /v1/cluster", "POST /v1/purge", "GET /", "GET /nothing"] {
            for token in ["", "Bearer", "Bearer wrong", "Basic s3cret"] {
                let (status, body) = call(address, path, token, "").await;
                assert_eq!(status, 401, "{path} {token}");
                assert!(serde_json::from_str::<api::Failure>(&body).is_ok());
            }
        }
        let text = admin.metrics_text();
        assert!(text.contains("purge_auth_failures_total{reason=\"invalid_token\"} 1\n"));
        assert!(text.contains("purge_auth_failures_total{reason=\"missing_token\"} 3\n"));
    }

    #[tokio::test]
    async fn the_api_refuses_what_it_does_not_know() {
        let address = served(&admin(), Face::Api(live("t"))).await;
        let long = "x".repeat(api::REQUEST_BYTES_MAX / 1000);
        let many = format!("{{\"urls\":[{}]}}", vec!["\"a/x\""; 1001].join(","));
        for (line, body, expected) in [
            ("GET /v1", "", 404),
            ("GET /v1/moon", "", 404),
            ("GET /v1/purge", "", 405),
            ("POST /v1/cluster", "", 405),
            ("GET /v1/nodes/1", "", 405),
            ("POST /v1/purge", "", 400),
            ("POST /v1/purge", "{}", 400),
            ("POST /v1/purge", "{\"all\":true,\"mod\":\"hard\"}", 400),
            ("POST /v1/purge", "{\"urls\":[\"/no-host\"]}", 400),
            ("POST /v1/purge", &many, 400),
            ("POST /v1/warm", &many, 400),
            ("POST /v1/warm", "{\"urls\":[]}", 400),
            ("GET /v1/explain", "", 400),
            ("GET /v1/explain?url=a%2", "", 400),
            ("DELETE /v1/nodes/one", "", 400),
            ("DELETE /v1/nodes/9", "", 404),
            ("POST /v1/nodes/9/drain", "", 404),
            ("POST /v1/nodes/1/drain", "", 400), // alone
            ("POST /v1/purge", &long, 400),
        ] {
            let (status, answer) = call(address, line, "Bearer t", body).await;
            assert_eq!(status, expected, "{line} {answer}");
            let failure: api::Failure = serde_json::from_str(&answer).unwrap();
            assert!(!failure.error.is_empty());
        }
    }

    /// However many calls warm, and for however long.
    #[tokio::test]
    async fn who_warms_leaves_room_for_purges() {
        let address = served(&admin(), Face::Api(live("t"))).await;
        let warm = |_| async move {
            let body = format!("{{\"urls\":[\"{ENDLESS}\"]}}");
            call(address, "POST /v1/warm", "Bearer t", &body).await.0
        };
        let mut calls: FuturesUnordered<_> = (0..REQUESTS_MAX).map(warm).collect();
        for _ in WARMS_MAX..REQUESTS_MAX {
            let refused = timeout(BODY_TIMEOUT, calls.next()).await;
            assert_eq!(refused.expect("it holds a place"), Some(503));
        }
        let purge = "{\"urls\":[\"a/x\"]}";
        let (status, answer) = call(address, "POST /v1/purge", "Bearer t", purge).await;
        assert_eq!(status, 200, "{answer}");
    }

    #[tokio::test]
    async fn a_body_that_is_too_long_is_not_read() {
        let address = served(&admin(), Face::Api(live("t"))).await;
        let head = "POST /v1/purge HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer t\r\n";
        let announced = format!("{head}Content-Length: {}\r\n\r\n", 1u64 << 40);
        let answer = raw(address, &announced).await;
        assert!(answer.starts_with("HTTP/1.1 413"), "{answer}");
        // Not announced: refused as soon as it has grown too long.
        let mut stream = TcpStream::connect(address).await.unwrap();
        let chunked = format!("{head}Transfer-Encoding: chunked\r\n\r\n");
        stream.write_all(chunked.as_bytes()).await.unwrap();
        let chunk = format!("10000\r\n{}\r\n", "x".repeat(0x10000));
        let mut sent = 0;
        while sent < 64 * api::REQUEST_BYTES_MAX {
            match stream.write_all(chunk.as_bytes()).await {
                Ok(()) => sent += 0x10000,
                Err(_) => break,
            }
        }
        assert!(
            sent < 32 * api::REQUEST_BYTES_MAX,
            "{sent} bytes were taken"
        );
    }

    #[tokio::test]
    async fn client_and_api_agree() {
        let admin = admin();
        let address = served(&admin, Face::Api(live("t"))).await.to_string();
        let cluster = admin.cluster.clone();
        let (purged, again) = tokio::task::spawn_blocking(move || {
            let client = Client::new(&address, "t");
            let shown = client.cluster().unwrap();
            assert_eq!(shown.nodes.len(), 1);
            assert_eq!(shown.nodes[0].role, "voter");
            assert_eq!(shown.version, env!("CARGO_PKG_VERSION"));
            let explain = client.explain("https://A.example/x y".replace(' ', "%20").as_str());
            assert_eq!(explain.unwrap().url, "a.example/x%20y");
            let warmed = client.warm(vec!["a/x".to_owned()]).unwrap();
            assert_eq!(
                (warmed.urls[0].url.as_str(), warmed.urls[0].success),
                ("a/x", true)
            );
            match client.remove(1) {
                Err(ClientError::Refused { status: 400, .. }) => {}
                other => panic!("{other:?}"),
            }
            match Client::new(&address, "wrong").cluster() {
                Err(ClientError::Refused { status: 401, .. }) => {}
                other => panic!("{other:?}"),
            }
            let mut purge = api::Purge {
                urls: vec!["a/x".to_owned(), "a/y".to_owned()],
                ..api::Purge::default()
            };
            let purged = client.purge(&purge).unwrap();
            purge.request_id = Some(purged.request_id.clone());
            (purged, client.purge(&purge).unwrap())
        })
        .await
        .unwrap();
        assert!(purged.success && purged.purged_count == 2 && purged.url.is_none());
        assert!(0 < purged.index && purged.index <= cluster.applied().0);
        assert_eq!(again.index, purged.index, "a retry is the same purge");
        let page = String::from_utf8(admin.page().body).unwrap();
        assert!(
            page.contains("http://a/x and 1 more"),
            "the page shows the purge"
        );
    }

    /// One of three voters, the others unreachable: nothing is promised, and
    /// everything says so.
    #[tokio::test]
    async fn without_a_quorum_nothing_is_promised() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str| dir.path().join(name);
        pingora_slice_client::ca::ca_init(dir.path()).unwrap();
        pingora_slice_client::ca::ca_issue(dir.path(), 1, &[]).unwrap();
        // Two sockets that never answer.
        let silent = [(); 2].map(|()| std::net::UdpSocket::bind("127.0.0.1:0").unwrap());
        let silent = silent.each_ref().map(|s| s.local_addr().unwrap());
        let listen: SocketAddr = "127.0.0.1:0".parse().unwrap();
        let cluster = Cluster::start(ClusterConfig {
            node_id: NodeId(1),
            listen,
            advertise: "127.0.0.1:1".to_owned(),
            seeds: silent.iter().map(SocketAddr::to_string).collect(),
            voters_expected: 3,
            role: Role::Voter,
            weight: 1,
            data_dir: file("data"),
            lease: Duration::from_secs(2),
            remove_after: None,
            tls: TlsFiles {
                ca: file("ca.pem"),
                cert: file("node1.pem"),
                key: file("node1.key"),
            },
        })
        .await
        .unwrap();
        let admin = admin_of(cluster.clone());
        let metrics = served(&admin, Face::Metrics).await;
        let (status, reason) = call(metrics, "GET /ready", "none", "").await;
        assert_eq!(status, 503);
        assert!(reason.contains("not formed"), "{reason}");
        assert_eq!(call(metrics, "GET /health", "none", "").await.0, 200);
        assert_eq!(call(metrics, "GET /", "none", "").await.0, 200);

        let api = served(&admin, Face::Api(live("t"))).await;
        let (status, answer) = call(api, "POST /v1/purge", "Bearer t", "{\"all\":true}").await;
        assert_eq!(status, 503);
        let failure: api::Failure = serde_json::from_str(&answer).unwrap();
        assert_eq!(
            failure.request_id.unwrap().len(),
            32,
            "a number to retry with"
        );
        let text = admin.metrics_text();
        let failed = "purge_requests_by_result{method=\"all\",result=\"failure\"} 1\n";
        assert!(text.contains(failed));
        assert!(text.contains("purge_items_total{method=\"all\"} 0\n"));
        let page = String::from_utf8(admin.page().body).unwrap();
        assert!(page.contains("purge of everything refused"));
        cluster.stop().await;
    }

    #[tokio::test]
    async fn sampling_stops_when_told_and_stays_bounded() {
        let admin = admin();
        for _ in 0..SAMPLES_MAX + 3 {
            admin.sample();
        }
        assert_eq!(admin.history.lock().unwrap().len(), SAMPLES_MAX);
        let stop = CancellationToken::new();
        stop.cancel();
        admin.sample_until(stop).await;
    }

    #[test]
    fn query_values_are_decoded_whole_or_not_at_all() {
        assert_eq!(percent_decoded("a%2Fb+c").as_deref(), Some("a/b+c"));
        for bad in ["%", "%2", "%zz", "%ff"] {
            assert_eq!(percent_decoded(bad), None);
        }
    }
}
