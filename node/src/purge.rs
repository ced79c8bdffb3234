//! PURGE: from a client's words to a promise, and back.
//!
//! Two doors, one way through: the method `PURGE` on a client listener
//! ([`Purger::purge_request`]) and `POST /v1/purge` of the admin API
//! ([`Purger::purge`]). Either names things to forget; they become one entry of
//! the log, and the answer is 200 only once the promise holds on every node.
//! Anything else promises nothing and says why.
//!
//! | request | forgets |
//! | --- | --- |
//! | `PURGE /path?query` | that URL, all variants |
//! | `X-Purge-Pattern: prefix` | the path and everything under it (a final `*` is ignored) |
//! | `X-Purge-Pattern: host` | everything of the host |
//! | `X-Purge-Tag: a b` | everything that carries one of the tags, on any host |
//! | `X-Purge-All: true` | everything; path and pattern are ignored |
//!
//! `X-Purge-Mode: plain|soft|hard` says how thoroughly; `Purge-Wait: quorum`
//! waits, and promises, less than `all`. The token comes as
//! `Authorization: Bearer T` or `X-Purge-Token: T`.
//!
//! **Retrying.** Every try has a number, [`api::PURGE_ID_HEADER`] in the answer.
//! Sent back with the same request, it finds the first try's entry and waits for
//! that. A number belongs to what was named with it: reused for something else
//! it is another purge, never a silent success.
//!
//! Not here: what a purge does (the cluster's `purge` and `state`).

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use http::{HeaderName, StatusCode, header};
use pingora_http::RequestHeader;
use pingora_slice_client::api;
use pingora_slice_cluster::handle::{PurgeError, PurgeReceipt, PurgeWait};
use pingora_slice_cluster::purge::{PurgeItem, PurgeMode, Scope};
use pingora_slice_cluster::slice::HashKey;
use pingora_slice_cluster::{Cluster, NodeId};
use tokio_util::sync::CancellationToken;

use crate::config::{Live, PurgeConfig};
use crate::metrics::Metrics;
use crate::observer::{Observer, Settled};
use crate::url::{self, Naming, Url, checked_host};

/// Purges kept for the status page.
const RECENT_MAX: usize = 50;
/// Longest number of a try that is accepted back, bytes; ours have 32.
const REQUEST_ID_BYTES_MAX: usize = 64;
/// Longest tag, bytes.
const TAG_BYTES_MAX: usize = 1024;
/// Keeps the hash of a request's number apart from the cluster's own hashes, whose
/// domains count up from 1.
const DOMAIN_REQUEST: u8 = 200;

/// What a `PURGE` is answered with.
#[derive(Clone, Debug, PartialEq)]
pub struct PurgeAnswer {
    /// 200, or why nothing is promised.
    pub status: StatusCode,
    /// All header fields but Content-Length.
    pub headers: Vec<(HeaderName, String)>,
    /// JSON, an [`api::Purged`].
    pub body: Vec<u8>,
}

/// Why nothing is promised.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// 404: `purge.enabled` is false.
    #[error("purging is disabled")]
    Disabled,
    /// 401: no token, a wrong one, or none needed but not from this machine.
    #[error("{}", match reason {
        AuthFailure::MissingToken => "a token is required: Authorization: Bearer, or X-Purge-Token",
        AuthFailure::InvalidToken => "the token is wrong",
        AuthFailure::NotLoopback => "without a token, purging is allowed from this machine only",
        AuthFailure::Proxied => "this came through a proxy, behind which everybody looks like this machine: set purge.auth_token",
    })]
    Unauthorized {
        /// For the metrics.
        reason: AuthFailure,
    },
    /// 400: it cannot be understood; trying again is of no use.
    #[error("{0}")]
    Malformed(String),
    /// 503: no quorum; the same number may be tried again.
    #[error("{reason}")]
    NotConfirmed {
        /// What was missing.
        reason: String,
        /// The try's number.
        request_id: String,
    },
}

impl Refusal {
    /// The HTTP status that says it.
    pub fn status(&self) -> StatusCode {
        match self {
            Refusal::Disabled => StatusCode::NOT_FOUND,
            Refusal::Unauthorized { .. } => StatusCode::UNAUTHORIZED,
            Refusal::Malformed(_) => StatusCode::BAD_REQUEST,
            Refusal::NotConfirmed { .. } => StatusCode::SERVICE_UNAVAILABLE,
        }
    }
}

/// Why a token was not accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AuthFailure {
    /// There was none.
    MissingToken,
    /// It was not ours.
    InvalidToken,
    /// No token is configured, and the client is on another machine.
    NotLoopback,
    /// No token is configured, and a proxy on this machine passes on who knows whose request.
    Proxied,
}

impl AuthFailure {
    /// The metrics' label.
    pub fn as_str(self) -> &'static str {
        match self {
            AuthFailure::MissingToken => "missing_token",
            AuthFailure::InvalidToken => "invalid_token",
            AuthFailure::NotLoopback => "not_loopback",
            AuthFailure::Proxied => "proxied",
        }
    }
}

/// One thing to forget, as a person names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Named {
    /// Everything.
    All,
    /// Everything of a host (normalised).
    Host(String),
    /// One object.
    Url(Url),
    /// A path and everything under it: host (normalised), path.
    Prefix(String, String),
    /// Everything that carries a tag.
    Tag(String),
}

impl Named {
    /// The metrics' label.
    fn method(&self) -> &'static str {
        match self {
            Named::All => "all",
            Named::Host(_) => "host",
            Named::Url(_) => "url",
            Named::Prefix(..) => "prefix",
            Named::Tag(_) => "tag",
        }
    }

    fn scope(&self, key: &HashKey, naming: &Naming) -> Scope {
        match self {
            Named::All => Scope::All,
            Named::Host(host) => Scope::host(key, naming.host(host)),
            Named::Url(url) => {
                let object = naming.object(url.clone());
                Scope::url(key, &object.host, &object.target)
            }
            Named::Prefix(host, path) => Scope::prefix(key, naming.host(host), path),
            Named::Tag(tag) => Scope::tag(key, tag),
        }
    }

    /// As a URL, where it is one.
    fn url(&self) -> Option<String> {
        match self {
            Named::All | Named::Tag(_) => None,
            Named::Host(host) => Some(format!("http://{host}/")),
            Named::Url(url) => Some(format!("http://{url}")),
            Named::Prefix(host, path) => Some(format!("http://{host}{path}")),
        }
    }
}

impl std::fmt::Display for Named {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Named::All => f.write_str("everything"),
            Named::Host(host) => write!(f, "everything of {host}"),
            Named::Url(url) => write!(f, "http://{url}"),
            Named::Prefix(host, path) => write!(f, "everything under http://{host}{path}"),
            Named::Tag(tag) => write!(f, "everything tagged {tag}"),
        }
    }
}

/// A purge that has been understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// What to forget; not empty, at most [`api::PURGE_ITEMS_MAX`].
    pub named: Vec<Named>,
    /// How thoroughly.
    pub mode: PurgeMode,
    /// What is waited for.
    pub wait: PurgeWait,
    /// The number of an earlier try.
    pub request_id: Option<String>,
}

impl Wanted {
    /// What is named, in a few words.
    fn summary(&self) -> String {
        match &self.named[..] {
            [one] => one.to_string(),
            [first, rest @ ..] => format!("{first} and {} more", rest.len()),
            [] => "nothing".to_owned(),
        }
    }

    /// Each kind that is named, and how often.
    fn methods(&self) -> Vec<(&'static str, u64)> {
        let mut methods: Vec<(&'static str, u64)> = Vec::new();
        for named in &self.named {
            match methods.iter_mut().find(|(m, _)| *m == named.method()) {
                Some((_, count)) => *count += 1,
                None => methods.push((named.method(), 1)),
            }
        }
        methods
    }
}

/// A purge as the status page shows it.
#[derive(Clone, Debug)]
pub struct Recent {
    /// When it was answered.
    pub at: SystemTime,
    /// What was named.
    pub what: String,
    /// How thoroughly.
    pub mode: PurgeMode,
    /// How long it took, milliseconds.
    pub took_ms: u64,
    /// Its receipt, or why nothing was promised.
    pub outcome: Result<PurgeReceipt, String>,
}

/// Takes purges; shared by the client listeners and the admin API.
pub struct Purger {
    cluster: Cluster,
    metrics: Arc<Metrics>,
    live: Live,
    recent: Mutex<VecDeque<Recent>>,
    observer: Observer,
}

impl Purger {
    /// One per node.
    pub fn new(cluster: Cluster, metrics: Arc<Metrics>, live: Live) -> Arc<Purger> {
        Arc::new(Purger {
            observer: Observer::new(cluster.clone(), metrics.clone()),
            cluster,
            metrics,
            live,
            recent: Mutex::default(),
        })
    }

    /// Answers the method `PURGE` of a client listener.
    pub async fn purge_request(
        &self,
        head: &RequestHeader,
        client_is_loopback: bool,
    ) -> PurgeAnswer {
        let started = Instant::now();
        let refused = |refusal: &Refusal, url| refused(refusal, url, started.elapsed());
        let settings = self.live.take();
        if !settings.purge.enabled {
            return refused(&Refusal::Disabled, None);
        }
        if let Err(reason) = authorize(&settings.purge, head, client_is_loopback) {
            self.count_auth_failure(reason);
            self.count(&[(method_of(head), 1)], "auth_failure");
            return refused(&Refusal::Unauthorized { reason }, None);
        }
        let wanted = match understand(head) {
            Ok(wanted) => wanted,
            Err(reason) => {
                self.count(&[(method_of(head), 1)], "failure");
                return refused(&Refusal::Malformed(reason), None);
            }
        };
        let url = match &wanted.named[..] {
            [one] => one.url(),
            _ => None,
        };
        match self.purge(wanted).await {
            Ok(purged) => answer(StatusCode::OK, vec![], &api::Purged { url, ..purged }),
            Err(refusal) => refused(&refusal, url),
        }
    }

    /// Commits a purge; returns when the promise holds on every node.
    ///
    /// # Errors
    /// [`Refusal::Malformed`] or [`Refusal::NotConfirmed`]: nothing is promised.
    pub async fn purge(&self, wanted: Wanted) -> Result<api::Purged, Refusal> {
        let started = Instant::now();
        let outcome = self.commit(&wanted).await;
        let took = started.elapsed();
        let took_ms = took.as_millis() as u64;
        let methods = wanted.methods();
        let what = wanted.summary();
        match &outcome {
            Ok((receipt, request_id)) => {
                self.count(&methods, "success");
                if self.live.now().purge.enable_metrics {
                    for (method, count) in &methods {
                        let label = &[*method];
                        self.metrics
                            .purge_items_total
                            .with_label_values(label)
                            .inc_by(*count);
                        self.metrics
                            .purge_duration_seconds
                            .with_label_values(label)
                            .observe(took.as_secs_f64());
                    }
                }
                tracing::info!(
                    index = receipt.index.0, mode = ?wanted.mode, fenced = receipt.fenced.len(),
                    took_ms, request_id, "purged {what}"
                );
            }
            Err(refusal) => {
                self.count(&methods, "failure");
                tracing::warn!(took_ms, "purge of {what} promises nothing: {refusal}");
            }
        }
        self.remember(Recent {
            at: SystemTime::now(),
            what: what.clone(),
            mode: wanted.mode,
            took_ms,
            outcome: match &outcome {
                Ok((receipt, _)) => Ok(receipt.clone()),
                Err(refusal) => Err(refusal.to_string()),
            },
        });
        let (receipt, request_id) = outcome?;
        let message = match wanted.mode {
            PurgeMode::Soft => format!("{what}: stale on every node, will be revalidated"),
            PurgeMode::Plain => format!("{what}: no node answers with older bytes from now on"),
            PurgeMode::Hard => format!("{what}: no node uses the stored bytes again"),
        };
        let message = match receipt.pending.is_empty() {
            true => message,
            false => format!(
                "{what}: committed by a majority, as Purge-Wait: quorum asked; it promises less: \
                 the nodes in pending may answer with older bytes until they have applied it"
            ),
        };
        Ok(api::Purged {
            success: true,
            purged_count: wanted.named.len(),
            url: None,
            message,
            index: receipt.index.0,
            acked: receipt.acked.iter().map(|node| node.0).collect(),
            fenced: receipt.fenced.iter().map(|node| node.0).collect(),
            pending: receipt.pending.iter().map(|node| node.0).collect(),
            took_ms,
            request_id,
        })
    }

    /// Looks after purges that were answered, until `stop`; `node.rs` owns the task.
    pub async fn observe_until(&self, stop: CancellationToken) {
        stop.run_until_cancelled(self.observer.run()).await;
    }

    /// How far a purge has come, by its request's number.
    pub async fn progress(&self, request_id: &str) -> Option<api::Progress> {
        let key = self.cluster.view().hash_key?;
        let token = token(&key, request_id);
        let progress = self.cluster.purge_progress(token).await?;
        let numbers = |nodes: Vec<NodeId>| nodes.into_iter().map(|node| node.0).collect();
        Some(api::Progress {
            index: progress.index.0,
            acked: numbers(progress.acked),
            fenced: numbers(progress.fenced),
            waiting: numbers(progress.waiting),
        })
    }

    /// The last purges asked for at this node, newest first.
    pub fn recent(&self) -> Vec<Recent> {
        let recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        recent.iter().rev().cloned().collect()
    }

    /// Counts a message that cannot be understood: as one for URLs, the usual kind.
    pub fn count_malformed(&self) {
        self.count(&[("url", 1)], "failure");
    }

    /// Counts a token that was not accepted.
    pub fn count_auth_failure(&self, reason: AuthFailure) {
        if self.live.now().purge.enable_metrics {
            self.metrics
                .purge_auth_failures_total
                .with_label_values(&[reason.as_str()])
                .inc();
        }
    }

    async fn commit(&self, wanted: &Wanted) -> Result<(PurgeReceipt, String), Refusal> {
        let request_id = wanted
            .request_id
            .clone()
            .unwrap_or_else(|| format!("{:032x}", rand::random::<u128>()));
        let not_confirmed = |reason: String| Refusal::NotConfirmed {
            reason,
            request_id: request_id.clone(),
        };
        let Some(key) = self.cluster.view().hash_key else {
            return Err(not_confirmed("the cluster has not formed yet".to_owned()));
        };
        let settings = self.live.take();
        let items: Vec<PurgeItem> = wanted
            .named
            .iter()
            .map(|named| PurgeItem {
                scope: named.scope(&key, &settings.naming),
                mode: wanted.mode,
            })
            .collect();
        let token = token(&key, &request_id);
        let first = items.first().copied();
        match self.cluster.purge_and_wait(items, token, wanted.wait).await {
            Ok(receipt) => {
                if let (Some(item), PurgeWait::All) = (first, wanted.wait) {
                    let index = receipt.index;
                    let url = match wanted.named.first() {
                        Some(Named::Url(url)) => Some(url.to_string()),
                        _ => None,
                    };
                    self.observer.settled(Settled { item, url, index });
                }
                Ok((receipt, request_id))
            }
            Err(PurgeError::NotConfirmed(reason)) => Err(not_confirmed(format!(
                "not confirmed, nothing is promised: {reason}"
            ))),
            Err(PurgeError::Invalid(reason)) => Err(Refusal::Malformed(reason)),
        }
    }

    fn count(&self, methods: &[(&'static str, u64)], result: &str) {
        if !self.live.now().purge.enable_metrics {
            return;
        }
        for (method, _) in methods {
            self.metrics
                .purge_requests_total
                .with_label_values(&[method])
                .inc();
            self.metrics
                .purge_requests_by_result
                .with_label_values(&[*method, result])
                .inc();
        }
    }

    fn remember(&self, purge: Recent) {
        let mut recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        recent.push_back(purge);
        while recent.len() > RECENT_MAX {
            recent.pop_front();
        }
    }
}

/// What the admin API's message names.
///
/// # Errors
/// What is wrong with it, for the client.
pub fn understand_api(purge: api::Purge) -> Result<Wanted, String> {
    let count = purge.count();
    if count == 0 {
        return Err("nothing to purge: give urls, prefixes, tags, hosts, or all".to_owned());
    }
    if count > api::PURGE_ITEMS_MAX {
        let max = api::PURGE_ITEMS_MAX;
        return Err(format!(
            "{count} things in one purge, at most {max} are allowed"
        ));
    }
    let mut named = Vec::with_capacity(count);
    if purge.all {
        named.push(Named::All);
    }
    for url in &purge.urls {
        named.push(Named::Url(Url::parse(url)?));
    }
    for prefix in &purge.prefixes {
        let Url { host, target } = Url::parse(prefix)?;
        named.push(Named::Prefix(host, without_star(&target)));
    }
    for host in &purge.hosts {
        named.push(Named::Host(checked_host(host)?));
    }
    for tag in &purge.tags {
        named.push(Named::Tag(checked_tag(tag)?));
    }
    Ok(Wanted {
        named,
        mode: match purge.mode {
            api::Mode::Plain => PurgeMode::Plain,
            api::Mode::Soft => PurgeMode::Soft,
            api::Mode::Hard => PurgeMode::Hard,
        },
        wait: match purge.wait {
            api::Wait::All => PurgeWait::All,
            api::Wait::Quorum => PurgeWait::Quorum,
        },
        request_id: purge.request_id.map(checked_request_id).transpose()?,
    })
}

fn checked_tag(tag: &str) -> Result<String, String> {
    let valid = !tag.is_empty()
        && tag.len() <= TAG_BYTES_MAX
        && !tag.contains(|c: char| c.is_whitespace() || c.is_control() || c == ',');
    if valid {
        Ok(tag.to_owned())
    } else {
        Err(format!("{tag:?} is not a tag"))
    }
}

fn checked_request_id(id: String) -> Result<String, String> {
    let valid = (1..=REQUEST_ID_BYTES_MAX).contains(&id.len())
        && id.bytes().all(|byte| byte.is_ascii_graphic());
    if valid {
        Ok(id)
    } else {
        let name = api::PURGE_ID_HEADER;
        Err(format!(
            "{name}: 1 to {REQUEST_ID_BYTES_MAX} visible characters"
        ))
    }
}

/// A final `*` after half a segment means what is under its parent: floors go by
/// whole segments, and one that covers more costs a question, never a promise.
fn without_star(path: &str) -> String {
    match path.strip_suffix('*') {
        None => path.to_owned(),
        Some(before) => before[..=before.rfind('/').unwrap_or(0)].to_owned(),
    }
}

/// The entry's token. The log tells a number that is reused for something else apart.
fn token(key: &HashKey, request_id: &str) -> u128 {
    key.hash128(DOMAIN_REQUEST, &[request_id.as_bytes()])
}

/// A header's value, if it is there, once, and text.
fn text<'a>(head: &'a RequestHeader, name: &str) -> Result<Option<&'a str>, String> {
    match lines(head, name)?.as_slice() {
        [] => Ok(None),
        [one] => Ok(Some(one)),
        _ => Err(format!("{name} is given more than once")),
    }
}

/// The values of a header that may be given more than once.
fn lines<'a>(head: &'a RequestHeader, name: &str) -> Result<Vec<&'a str>, String> {
    let values = head.headers.get_all(name).iter();
    values
        .map(|value| value.to_str().map(str::trim))
        .collect::<Result<_, _>>()
        .map_err(|_| format!("{name} is not text"))
}

/// What proxies add to requests that they pass on.
const OF_PROXIES: [&str; 3] = ["via", "forwarded", "x-forwarded-for"];

fn authorize(
    config: &PurgeConfig,
    head: &RequestHeader,
    client_is_loopback: bool,
) -> Result<(), AuthFailure> {
    let Some(token) = &config.auth_token else {
        return if !client_is_loopback {
            Err(AuthFailure::NotLoopback)
        } else if OF_PROXIES
            .iter()
            .any(|name| head.headers.contains_key(*name))
        {
            Err(AuthFailure::Proxied)
        } else {
            Ok(())
        };
    };
    let direct = head.headers.get("x-purge-token").map(|v| v.as_bytes());
    let given = [bearer(head), direct];
    if given
        .into_iter()
        .flatten()
        .any(|given| token.matches(given))
    {
        Ok(())
    } else if given.iter().all(Option::is_none) {
        Err(AuthFailure::MissingToken)
    } else {
        Err(AuthFailure::InvalidToken)
    }
}

/// The token of `Authorization: Bearer T`.
pub fn bearer(head: &RequestHeader) -> Option<&[u8]> {
    let value = head.headers.get(header::AUTHORIZATION)?.as_bytes();
    let (scheme, token) = value.split_at_checked(b"Bearer ".len())?;
    scheme
        .eq_ignore_ascii_case(b"Bearer ")
        .then(|| token.trim_ascii())
}

/// What kind of purge the headers ask for, as far as they can be understood.
fn method_of(head: &RequestHeader) -> &'static str {
    let pattern = text(head, "x-purge-pattern").ok().flatten();
    if head.headers.contains_key("x-purge-all") && asks_for_all(head) == Ok(true) {
        "all"
    } else if head.headers.contains_key("x-purge-tag") {
        "tag"
    } else {
        match pattern {
            Some(p) if p.eq_ignore_ascii_case("prefix") => "prefix",
            Some(p) if p.eq_ignore_ascii_case("host") => "host",
            _ => "url",
        }
    }
}

fn asks_for_all(head: &RequestHeader) -> Result<bool, String> {
    match text(head, "x-purge-all")? {
        None => Ok(false),
        Some(v) if v.eq_ignore_ascii_case("true") => Ok(true),
        Some(v) if v.eq_ignore_ascii_case("false") => Ok(false),
        Some(v) => Err(format!("X-Purge-All: {v:?} is neither true nor false")),
    }
}

/// What a PURGE names.
fn understand(head: &RequestHeader) -> Result<Wanted, String> {
    let mode = match text(head, "x-purge-mode")? {
        None => PurgeMode::Plain,
        Some(v) if v.eq_ignore_ascii_case("plain") => PurgeMode::Plain,
        Some(v) if v.eq_ignore_ascii_case("soft") => PurgeMode::Soft,
        Some(v) if v.eq_ignore_ascii_case("hard") => PurgeMode::Hard,
        Some(v) => {
            return Err(format!("X-Purge-Mode: {v:?} is none of plain, soft, hard"));
        }
    };
    let wait = match text(head, api::PURGE_WAIT_HEADER)? {
        None => PurgeWait::All,
        Some(v) if v.eq_ignore_ascii_case("all") => PurgeWait::All,
        Some(v) if v.eq_ignore_ascii_case("quorum") => PurgeWait::Quorum,
        Some(v) => return Err(format!("Purge-Wait: {v:?} is neither all nor quorum")),
    };
    let request_id = text(head, api::PURGE_ID_HEADER)?
        .map(|id| checked_request_id(id.to_owned()))
        .transpose()?;
    Ok(Wanted {
        named: named_by(head)?,
        mode,
        wait,
        request_id,
    })
}

fn named_by(head: &RequestHeader) -> Result<Vec<Named>, String> {
    if asks_for_all(head)? {
        return Ok(vec![Named::All]);
    }
    let pattern = text(head, "x-purge-pattern")?;
    let tags = lines(head, "x-purge-tag")?;
    if !tags.is_empty() {
        if pattern.is_some() {
            return Err("X-Purge-Tag and X-Purge-Pattern exclude each other".to_owned());
        }
        let separators = |c: char| c.is_whitespace() || c == ',';
        let tags: Vec<Named> = tags
            .iter()
            .flat_map(|line| line.split(separators))
            .filter(|tag| !tag.is_empty())
            .map(|tag| checked_tag(tag).map(Named::Tag))
            .collect::<Result<_, _>>()?;
        return match tags.len() {
            0 => Err("X-Purge-Tag names no tag".to_owned()),
            n if n > api::PURGE_ITEMS_MAX => Err(format!("{n} tags are too many")),
            _ => Ok(tags),
        };
    }
    let url = url::of_request(head).ok_or("no valid Host")?;
    if !url.target.starts_with('/') {
        return Err(format!("{:?} is not a path", url.target));
    }
    let named = match pattern {
        None => Named::Url(url),
        Some(p) if p.eq_ignore_ascii_case("prefix") => {
            Named::Prefix(url.host, without_star(&url.target))
        }
        Some(p) if p.eq_ignore_ascii_case("host") => Named::Host(url.host),
        Some(p) => {
            return Err(format!("X-Purge-Pattern: {p:?} is neither prefix nor host"));
        }
    };
    Ok(vec![named])
}

fn refused(refusal: &Refusal, url: Option<String>, took: Duration) -> PurgeAnswer {
    let mut headers = Vec::new();
    let mut request_id = String::new();
    match refusal {
        Refusal::Unauthorized { .. } => {
            headers.push((header::WWW_AUTHENTICATE, "Bearer".to_owned()));
        }
        Refusal::NotConfirmed { request_id: id, .. } => {
            headers.push((header::RETRY_AFTER, "1".to_owned()));
            request_id.clone_from(id);
        }
        Refusal::Disabled | Refusal::Malformed(_) => {}
    }
    let body = api::Purged {
        url,
        message: refusal.to_string(),
        took_ms: took.as_millis() as u64,
        request_id,
        ..api::Purged::default()
    };
    answer(refusal.status(), headers, &body)
}

fn answer(
    status: StatusCode,
    mut headers: Vec<(HeaderName, String)>,
    body: &api::Purged,
) -> PurgeAnswer {
    headers.push((header::CONTENT_TYPE, "application/json".to_owned()));
    headers.push((header::CACHE_CONTROL, "no-store".to_owned()));
    if !body.request_id.is_empty() {
        let name = HeaderName::from_static(PURGE_ID_HEADER_LOWER);
        headers.push((name, body.request_id.clone()));
    }
    PurgeAnswer {
        status,
        headers,
        body: serde_json::to_vec(body).expect("strings and numbers always serialize"),
    }
}

/// [`api::PURGE_ID_HEADER`], as the type for names wants it.
const PURGE_ID_HEADER_LOWER: &str = "x-purge-request-id";
const _: () = assert!(
    PURGE_ID_HEADER_LOWER
        .as_bytes()
        .eq_ignore_ascii_case(api::PURGE_ID_HEADER.as_bytes())
);

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config::{Config, Secret, Settings};
    use crate::metrics::Gauges;
    use pingora_slice_cluster::purge::{Floor, Subject};

    fn request(target: &str, headers: &[(&'static str, &str)]) -> RequestHeader {
        let mut head = RequestHeader::build("PURGE", target.as_bytes(), None).unwrap();
        for (name, value) in headers {
            head.append_header(*name, *value).unwrap();
        }
        head
    }

    fn settings(purge: PurgeConfig) -> Settings {
        let config = Config::parse("listen: 127.0.0.1:1", Path::new("/")).unwrap();
        Settings {
            purge,
            ..Settings::of(&config)
        }
    }

    fn purger(token: Option<&str>) -> Arc<Purger> {
        let live = Live::new(settings(PurgeConfig {
            enabled: true,
            auth_token: token.map(Secret::new),
            enable_metrics: true,
        }));
        let cluster = Cluster::alone(None).unwrap();
        Purger::new(cluster, Arc::new(Metrics::new()), live)
    }

    /// What the JSON says, and that the headers go with it.
    fn body(answer: &PurgeAnswer) -> api::Purged {
        let has = |name, value: &str| answer.headers.contains(&(name, value.to_owned()));
        assert!(has(header::CONTENT_TYPE, "application/json"));
        assert!(has(header::CACHE_CONTROL, "no-store"));
        let purged: api::Purged = serde_json::from_slice(&answer.body).unwrap();
        assert_eq!(purged.success, answer.status == StatusCode::OK);
        purged
    }

    /// The floor of an object, to see what a purge has covered.
    fn floor(purger: &Purger, host: &str, target: &str, tags: &[&str]) -> Floor {
        let key = purger.cluster.view().hash_key.unwrap();
        let subject = Subject::new(&key, host, target, tags);
        purger.cluster.floor(&subject)
    }

    async fn purged(
        purger: &Purger,
        target: &str,
        headers: &[(&'static str, &str)],
    ) -> api::Purged {
        let answer = purger.purge_request(&request(target, headers), true).await;
        assert_eq!(answer.status, StatusCode::OK, "{answer:?}");
        body(&answer)
    }

    #[tokio::test]
    async fn each_form_covers_what_it_names_and_nothing_else() {
        let host = ("host", "A.example:80");
        let objects: [(&str, &str, &[&str]); 5] = [
            ("a.example", "/v/film?x=1", &["t1"]),
            ("a.example", "/v/film", &[]),
            ("a.example", "/video", &["t2"]),
            ("b.example", "/v/film", &["t3"]),
            ("b.example", "/", &[]),
        ];
        type Form<'a> = (
            &'a str,
            &'a [(&'static str, &'a str)],
            [bool; 5],
            Option<&'a str>,
        );
        let (yes, no) = (true, false);
        let forms: &[Form<'_>] = &[
            (
                "/v/film?x=1",
                &[host],
                [yes, no, no, no, no],
                Some("http://a.example/v/film?x=1"),
            ),
            (
                "/v/*",
                &[host, ("x-purge-pattern", "prefix")],
                [yes, yes, no, no, no],
                Some("http://a.example/v/"),
            ),
            (
                "/ignored",
                &[host, ("X-Purge-Pattern", "Host")],
                [yes, yes, yes, no, no],
                Some("http://a.example/"),
            ),
            (
                "/ignored",
                &[host, ("x-purge-tag", "t1, t3")],
                [yes, no, no, yes, no],
                None,
            ),
            (
                "*",
                &[("x-purge-all", "TRUE"), ("x-purge-pattern", "prefix")],
                [yes; 5],
                None,
            ),
            (
                "http://B.example./v/film",
                &[host],
                [no, no, no, yes, no],
                Some("http://b.example/v/film"),
            ),
        ];
        for (target, headers, covered, url) in forms {
            let purger = purger(None);
            let purged = purged(&purger, target, headers).await;
            for ((host, path, tags), covered) in objects.iter().zip(covered) {
                let expected = if *covered { purged.index } else { 0 };
                let floor = floor(&purger, host, path, tags);
                assert_eq!(
                    floor.plain.0, expected,
                    "{target} {headers:?}: {host}{path}"
                );
            }
            assert_eq!(purged.url.as_deref(), *url);
            let items = if headers.iter().any(|h| h.0 == "x-purge-tag") {
                2
            } else {
                1
            };
            assert_eq!(purged.purged_count, items);
            assert_eq!((purged.acked.len(), purged.fenced.len()), (1, 0));
        }
    }

    #[tokio::test]
    async fn modes_raise_their_own_floors() {
        for (mode, plain, hard) in [
            ("plain", true, false),
            ("soft", false, false),
            ("Hard", true, true),
        ] {
            let purger = purger(None);
            let headers = [("host", "a"), ("x-purge-mode", mode)];
            let index = purged(&purger, "/x", &headers).await.index;
            let floor = floor(&purger, "a", "/x", &[]);
            assert_eq!(floor.soft.0, index);
            assert_eq!(
                (floor.plain.0 == index, floor.hard.0 == index),
                (plain, hard)
            );
        }
    }

    #[tokio::test]
    async fn a_retry_finds_the_first_try_and_nothing_else_does() {
        let purger = purger(None);
        let first = purged(&purger, "/x", &[("host", "a")]).await;
        let id = first.request_id.clone();
        let retry = [("host", "a"), (api::PURGE_ID_HEADER, &*id)];
        let again = purged(&purger, "/x", &retry).await;
        assert_eq!((again.index, &again.request_id), (first.index, &id));
        let other = purged(&purger, "/y", &retry).await;
        assert!(other.index > first.index, "the number was used for /x");
        let fresh = purged(&purger, "/x", &[("host", "a")]).await;
        assert!(fresh.index > other.index, "a new purge without a number");
    }

    #[tokio::test]
    async fn a_token_is_asked_for() {
        let with = purger(Some("s3cret"));
        let status = |headers: &'static [(&'static str, &'static str)]| {
            let with = with.clone();
            async move {
                let head = request("/x", &[&[("host", "a")], headers].concat());
                let answer = with.purge_request(&head, true).await;
                let text = String::from_utf8(answer.body.clone()).unwrap();
                assert!(!text.contains("s3cret") && !text.contains("wrong1"));
                body(&answer);
                (answer.status.as_u16(), answer.headers)
            }
        };
        let (refused, headers) = status(&[]).await;
        assert_eq!(refused, 401);
        assert!(headers.contains(&(header::WWW_AUTHENTICATE, "Bearer".to_owned())));
        assert_eq!(status(&[("authorization", "Basic czNjcmV0")]).await.0, 401);
        assert_eq!(status(&[("authorization", "Bearer wrong1")]).await.0, 401);
        assert_eq!(status(&[("x-purge-token", "s3cre")]).await.0, 401);
        assert_eq!(status(&[("authorization", "bearer s3cret")]).await.0, 200);
        assert_eq!(status(&[("x-purge-token", "s3cret")]).await.0, 200);
        let both = &[("authorization", "Basic x"), ("x-purge-token", "s3cret")];
        assert_eq!(status(both).await.0, 200);

        let without = purger(None);
        let head = request("/x", &[("host", "a")]);
        let far = without.purge_request(&head, false).await;
        assert_eq!(far.status, StatusCode::UNAUTHORIZED);

        for (name, value) in [
            ("via", "1.1 nginx"),
            ("forwarded", "for=192.0.2.1"),
            ("x-forwarded-for", "192.0.2.1"),
        ] {
            let proxied = request("/x", &[("host", "a"), (name, value)]);
            let answer = without.purge_request(&proxied, true).await;
            assert_eq!(answer.status, StatusCode::UNAUTHORIZED, "{name}");
            assert!(body(&answer).message.contains("purge.auth_token"), "{name}");
        }
        assert_eq!(
            without.purge_request(&head, true).await.status,
            StatusCode::OK
        );

        let text = with.metrics.render(&Gauges::default());
        for line in [
            "purge_auth_failures_total{reason=\"missing_token\"} 2",
            "purge_auth_failures_total{reason=\"invalid_token\"} 2",
            "purge_requests_total{method=\"url\"} 7",
            "purge_requests_by_result{method=\"url\",result=\"success\"} 3",
            "purge_requests_by_result{method=\"url\",result=\"auth_failure\"} 4",
            "purge_items_total{method=\"url\"} 3",
            "purge_duration_seconds_count{method=\"url\"} 3",
        ] {
            let line = format!("\npingora_slice_{line}\n");
            assert!(text.contains(&line), "{line} is not in\n{text}");
        }
        let text = without.metrics.render(&Gauges::default());
        assert!(text.contains("purge_auth_failures_total{reason=\"not_loopback\"} 1\n"));
        assert!(text.contains("purge_auth_failures_total{reason=\"proxied\"} 3\n"));
    }

    #[tokio::test]
    async fn what_cannot_be_understood_promises_nothing() {
        let purger = purger(None);
        let host = ("host", "a");
        let bad: &[(&str, &[(&'static str, &str)])] = &[
            ("/x", &[]),
            ("/x", &[host, host]),
            ("/x", &[("host", "a b")]),
            ("/x", &[host, ("x-purge-pattern", "regex")]),
            ("/x", &[host, ("x-purge-mode", "gentle")]),
            ("/x", &[host, ("purge-wait", "nobody")]),
            ("/x", &[host, ("x-purge-all", "yes")]),
            ("/x", &[host, ("x-purge-tag", " , ")]),
            (
                "/x",
                &[host, ("x-purge-tag", "t"), ("x-purge-pattern", "prefix")],
            ),
            ("/x", &[host, ("x-purge-request-id", "")]),
            ("*", &[host]),
        ];
        let before = purger.cluster.applied();
        for (target, headers) in bad {
            let answer = purger.purge_request(&request(target, headers), true).await;
            assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{headers:?}");
            assert!(!body(&answer).message.is_empty());
        }
        assert_eq!(purger.cluster.applied(), before);
    }

    #[tokio::test]
    async fn a_reload_switches_it_off_and_metrics_too() {
        let purger = purger(None);
        purger.live.replace(settings(PurgeConfig::default()));
        let head = request("/x", &[("host", "a")]);
        let answer = purger.purge_request(&head, true).await;
        assert_eq!(answer.status, StatusCode::NOT_FOUND);
        body(&answer);
        purger.live.replace(settings(PurgeConfig {
            enabled: true,
            ..PurgeConfig::default()
        }));
        purged(&purger, "/x", &[("host", "a")]).await;
        let text = purger.metrics.render(&Gauges::default());
        assert!(text.contains("purge_requests_total{method=\"url\"} 0\n"));
    }

    #[test]
    fn an_unconfirmed_purge_says_how_to_retry() {
        let refusal = Refusal::NotConfirmed {
            reason: "no leader".to_owned(),
            request_id: "0b".to_owned(),
        };
        let took = Duration::from_secs(5);
        let answer = refused(&refusal, Some("http://a/x".to_owned()), took);
        assert_eq!(answer.status, StatusCode::SERVICE_UNAVAILABLE);
        for (name, value) in [("retry-after", "1"), ("x-purge-request-id", "0b")] {
            let field = (HeaderName::from_static(name), value.to_owned());
            assert!(answer.headers.contains(&field), "{name}");
        }
        assert_eq!(body(&answer).request_id, "0b");
        assert_eq!(body(&answer).index, 0);
        assert_eq!(body(&answer).took_ms, 5000);
    }

    #[test]
    fn the_api_names_things_in_bulk() {
        let purge = api::Purge {
            urls: vec!["a/x".to_owned()],
            prefixes: vec!["http://a/v/*".to_owned()],
            tags: vec!["t".to_owned()],
            hosts: vec!["B".to_owned()],
            mode: api::Mode::Hard,
            ..api::Purge::default()
        };
        let wanted = understand_api(purge.clone()).unwrap();
        assert_eq!(wanted.mode, PurgeMode::Hard);
        assert_eq!(
            wanted.named,
            [
                Named::Url(Url {
                    host: "a".into(),
                    target: "/x".into()
                }),
                Named::Prefix("a".into(), "/v/".into()),
                Named::Host("b".into()),
                Named::Tag("t".into()),
            ]
        );
        let limit = api::PURGE_ITEMS_MAX - purge.count();
        let mut many = purge;
        many.urls.extend((0..limit).map(|i| format!("a/{i}")));
        assert!(understand_api(many.clone()).is_ok());
        many.urls.push("a/one-too-many".to_owned());
        assert!(understand_api(many).is_err());
        assert!(understand_api(api::Purge::default()).is_err());
        for bad in ["", "two words", "a,b"] {
            let tags = vec![bad.to_owned()];
            let purge = api::Purge {
                tags,
                ..api::Purge::default()
            };
            assert!(understand_api(purge).is_err(), "{bad:?}");
        }
    }
}
