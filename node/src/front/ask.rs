//! What a client asks for, and what of it reaches the origin.

use std::sync::Arc;

use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use pingora_http::RequestHeader;
use pingora_proxy::Session;
use pingora_slice_cluster::slice::HashKey;
use pingora_slice_cluster::wire::OriginRequest;

use super::{Front, NAME, VIA};
use crate::engine::{Request, Sent};
use crate::fields::{Fields, text};
use crate::freshness::Demands;
use crate::origin::is_coded;
use crate::plan;
use crate::url::Url;

/// Whom a request has passed (RFC 8586).
static CDN_LOOP: HeaderName = HeaderName::from_static("cdn-loop");

/// Request fields that are not sent on: they belong to the client's
/// connection, or are replaced by ours.
const NOT_SENT_ON: &[&str] = &[
    "host",
    "if-range",
    "if-match",
    "if-none-match",
    "if-modified-since",
    "if-unmodified-since",
    "connection",
    "keep-alive",
    "proxy-connection",
    "proxy-authorization",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "http2-settings",
    "content-length",
    "expect",
    "x-purge-token",
];

/// Prefixes of the names of fields that could choose an answer without being part
/// of its key. `-` stands for `_` too: some servers take one for the other.
const MAY_CHOOSE: &[&str] = &[
    "base-url",
    "forwarded",
    "front-end-https",
    "x-backend-",
    "x-forwarded",
    "x-host",
    "x-http-",
    "x-method-override",
    "x-original-",
    "x-override-",
    "x-proxy-",
    "x-rewrite-",
    "x-url-scheme",
];

/// How a GET or HEAD goes on.
pub(super) enum Disposition {
    /// By the engine.
    Cacheable(Request),
    /// By being passed on; why, in a word.
    Pass(&'static str),
    /// No further: the status, and why in a word.
    Refuse(u16, &'static str),
}

impl Front {
    /// This cluster's name in CDN-Loop (RFC 8586), and nobody else's.
    pub(super) fn loop_id(&self) -> Option<&Arc<str>> {
        let named = |key: HashKey| format!("{NAME}-{:016x}", key.hash64(34, &[b"cdn-loop"]));
        match self.loop_id.get() {
            None => {
                // A cluster has one key for all its life.
                let key = self.engine.cluster().view().hash_key?;
                Some(self.loop_id.get_or_init(|| named(key).into()))
            }
            known => known,
        }
    }

    /// Whether a request has passed this cluster before (RFC 8586).
    pub(super) fn has_passed_here(&self, fields: &impl Fields) -> bool {
        let Some(id) = self.loop_id() else {
            return false;
        };
        let mut passed = fields
            .lines(&CDN_LOOP)
            .filter_map(text)
            .flat_map(|list| list.split(','))
            .filter_map(|cdn| cdn.split(';').next());
        passed.any(|name| name.trim() == &**id)
    }

    /// Reads a request for what `url` names; `has_body`: whether one comes with it.
    pub(super) fn request(
        &self,
        url: Option<Url>,
        is_get: bool,
        fields: &Arc<impl Fields + Send + Sync + 'static>,
        has_body: bool,
    ) -> Disposition {
        let asked = &**fields;
        let settings = self.engine.live().take();
        let Some(url) = url.map(|url| settings.naming.object(url)) else {
            return Disposition::Refuse(400, "malformed");
        };
        if self.has_passed_here(asked) {
            return Disposition::Refuse(508, "loop");
        }
        let loop_id = self.loop_id();
        let demands = Demands::of(asked, &settings.policy.caching.request_directives);
        let pass = |why| match demands.only_if_cached {
            true => Disposition::Refuse(504, "only-if-cached"),
            false => Disposition::Pass(why),
        };
        let Some(hash_key) = self.engine.cluster().view().hash_key else {
            return pass("not-ready");
        };
        if !self.engine.config().enable_cache {
            return pass("disabled");
        }
        if is_for_websocket(asked) {
            return pass("upgrade");
        }
        if has_body {
            return pass("request-body");
        }
        if demands.no_store {
            return pass("request-no-store");
        }
        let key = hash_key.object(&url.host, &url.target);
        let sliced = settings.is_sliced(&url);
        let url = Arc::new(url);
        Disposition::Cacheable(Request {
            key,
            origin: Sent::new({
                let (url, fields) = (url.clone(), fields.clone());
                let loop_id = loop_id.cloned();
                move || OriginRequest {
                    headers: sent_on(&fields.to_map(), is_get, loop_id.as_deref()),
                    host: url.host.clone(),
                    target: url.target.clone(),
                }
            }),
            url,
            demands,
            first_byte: match is_get {
                true => plan::first_byte(asked),
                // Range is for GET alone (RFC 9110 section 14.2).
                false => 0,
            },
            sliced,
            chance: rand::random(),
            settings,
        })
    }
}

/// The client's fields that go to the origin, and ours.
fn sent_on(headers: &HeaderMap, is_get: bool, loop_id: Option<&str>) -> Vec<(String, Vec<u8>)> {
    // Range is for GET; with conditions the whole may be wanted as well, or nothing.
    let is_range_sent =
        is_get && !headers.contains_key(header::IF_RANGE) && !plan::has_conditions(headers);
    let nominated: Vec<HeaderName> = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|v| v.to_str().ok())
        .flat_map(|v| v.split(','))
        .filter_map(|name| HeaderName::from_bytes(name.trim().as_bytes()).ok())
        .collect();
    let cookies = joined_cookies(headers);
    let mut list: Vec<(String, Vec<u8>)> = headers
        .iter()
        .filter(|(name, _)| !NOT_SENT_ON.contains(&name.as_str()) && !nominated.contains(name))
        .filter(|(name, _)| !may_choose(name))
        .filter(|(name, _)| *name != header::RANGE || is_range_sent)
        .filter(|(name, _)| *name != header::COOKIE || cookies.is_none())
        .map(|(name, value)| (name.as_str().to_owned(), value.as_bytes().to_vec()))
        .collect();
    list.extend(cookies.map(|cookies| (header::COOKIE.to_string(), cookies.as_bytes().to_vec())));
    list.push(("via".into(), VIA.into()));
    if let Some(id) = loop_id {
        list.push(("cdn-loop".into(), id.as_bytes().to_vec()));
    }
    list
}

/// The cookies of several lines in one: HTTP/2 may split them, HTTP/1 may not
/// (RFC 9113 section 8.2.3). `None` where there are no several.
pub(super) fn joined_cookies(headers: &HeaderMap) -> Option<HeaderValue> {
    let lines = headers.get_all(header::COOKIE).iter();
    let lines: Vec<&[u8]> = lines.map(HeaderValue::as_bytes).collect();
    (lines.len() > 1)
        .then(|| HeaderValue::from_bytes(&lines.join(&b"; "[..])).ok())
        .flatten()
}

/// Whether a field could choose an answer ([`MAY_CHOOSE`]). Who the client is
/// may be told.
fn may_choose(name: &HeaderName) -> bool {
    let name = name.as_str().replace('_', "-");
    name != "x-forwarded-for" && MAY_CHOOSE.iter().any(|start| name.starts_with(start))
}

/// Whether a request asks for a WebSocket (RFC 6455), which needs the origin. Any
/// other Upgrade may be ignored (RFC 9110 section 7.8): many clients offer `h2c`
/// with each request.
fn is_for_websocket(fields: &impl Fields) -> bool {
    let mut offered = fields
        .lines(&header::UPGRADE)
        .filter_map(text)
        .flat_map(|line| line.split(','));
    offered.any(|protocol| protocol.trim().eq_ignore_ascii_case("websocket"))
}

/// Whether a body comes with a request: HTTP/1 says so in its head, HTTP/2 need not.
pub(super) fn has_body(session: &mut Session) -> bool {
    if session.as_downstream().is_http2() {
        return !session.as_downstream_mut().is_body_empty();
    }
    let headers = &session.req_header().headers;
    let length = headers.get(header::CONTENT_LENGTH);
    headers.contains_key(header::TRANSFER_ENCODING)
        || length.is_some_and(|length| length.as_bytes() != b"0")
}

/// How often a request may still be sent on (RFC 9110 section 7.6.2).
pub(super) fn max_forwards(head: &RequestHeader) -> Option<u64> {
    let value = head.headers.get(header::MAX_FORWARDS)?;
    value.to_str().ok()?.trim().parse().ok()
}

/// Why a message cannot be sent on as it is framed: lengths that another may
/// read differently (400, RFC 9110 section 8.6), or a coding that would be lost
/// (501, RFC 9112 section 6.1).
pub(super) fn framing_fault(head: &RequestHeader) -> Option<u16> {
    let mut lengths = head.headers.get_all(header::CONTENT_LENGTH).iter();
    let is_one = |length: &HeaderValue| length.as_bytes().iter().all(u8::is_ascii_digit);
    if lengths.next().is_some_and(|first| !is_one(first)) || lengths.next().is_some() {
        return Some(400);
    }
    is_coded(&head.headers).then_some(501)
}
