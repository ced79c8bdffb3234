//! The head of an answer: its status and fields, and the pieces of the body that they
//! announce. Also what `Cache-Status` says, and the heads of our own errors.

use std::fmt;
use std::ops::Range;
use std::time::SystemTime;

use http::header;
use pingora_core::Result;
use pingora_http::ResponseHeader;
use pingora_slice_cluster::wire::Resolution;

use super::{Front, NAME, VIA};
use crate::engine::{Forwarded, Found, Request};
use crate::freshness::unix_ms;
use crate::manifest::Manifest;
use crate::origin::DIGESTS;
use crate::pieces::Piece;
use crate::plan::Plan;
use crate::stream;

/// A 304 carries what guides caches, not what describes the bytes (RFC 9110 section 15.4.5).
const LEFT_OUT_OF_304: [&str; 4] = [
    "content-type",
    "content-encoding",
    "content-language",
    "transfer-encoding",
];

/// A head that is being put together. Names are as Pingora writes them in HTTP/1.1,
/// which has capitals for some.
pub(super) trait AnswerHead {
    /// Comes before any field.
    fn begin(&mut self, status: u16) -> Result<()>;
    /// Sets a field, in the place of any that there was.
    fn set(&mut self, name: &'static str, value: fmt::Arguments<'_>) -> Result<()>;
    /// Adds a line to a field.
    fn add(&mut self, name: &'static str, value: fmt::Arguments<'_>) -> Result<()>;
    /// Takes all lines of a field out.
    fn remove(&mut self, name: &str);
}

impl AnswerHead for ResponseHeader {
    fn begin(&mut self, status: u16) -> Result<()> {
        self.set_status(status)
    }

    fn set(&mut self, name: &'static str, value: fmt::Arguments<'_>) -> Result<()> {
        self.insert_header(name, value.to_string())
    }

    fn add(&mut self, name: &'static str, value: fmt::Arguments<'_>) -> Result<()> {
        self.append_header(name, value.to_string()).map(drop)
    }

    fn remove(&mut self, name: &str) {
        self.remove_header(name);
    }
}

impl Front {
    /// The head and the body's pieces of a planned answer.
    pub(super) fn head(
        &self,
        request: &Request,
        found: &Found,
        plan: Plan,
        fenced: bool,
    ) -> Result<(ResponseHeader, Vec<Piece>)> {
        let (mut parts, ()) = http::Response::new(()).into_parts();
        if keeps_fields(&plan) {
            parts.headers = found.object.fields();
        }
        let mut head = ResponseHeader::from(parts);
        let pieces = self.complete(&mut head, request, found, plan, fenced)?;
        Ok((head, pieces))
    }

    /// Completes a head that has the object's own fields, where it keeps them:
    /// what depends on the plan and the moment. The body's pieces.
    pub(super) fn complete(
        &self,
        head: &mut impl AnswerHead,
        request: &Request,
        found: &Found,
        plan: Plan,
        fenced: bool,
    ) -> Result<Vec<Piece>> {
        let manifest = &found.object.manifest;
        let length = manifest.length();
        let keeps_fields = keeps_fields(&plan);
        let status = match &plan {
            Plan::Whole => manifest.status,
            Plan::Single(_) | Plan::Multi(_) => 206,
            Plan::NotModified => 304,
            Plan::PreconditionFailed => 412,
            Plan::NotSatisfiable => 416,
        };
        head.begin(status)?;
        if status == 304 {
            for name in LEFT_OUT_OF_304 {
                head.remove(name);
            }
        }
        if plan != Plan::Whole {
            head.remove("content-range");
            for name in DIGESTS {
                head.remove(name);
            }
        }
        let mut pieces = Vec::new();
        match plan {
            // RFC 9110 section 15.3.5: no body, and no word about its length.
            Plan::Whole if status == 204 => {}
            Plan::Whole => {
                if let Some(length) = length {
                    if status != 304 {
                        head.set("Content-Length", format_args!("{length}"))?;
                    }
                } else if status != 304 {
                    head.set("Transfer-Encoding", format_args!("chunked"))?;
                }
                if length != Some(0) && !matches!(status, 204 | 304) {
                    pieces.push(Piece::Bytes(0..length.unwrap_or(u64::MAX)));
                }
            }
            Plan::Single(range) => {
                let total = length.unwrap_or_default();
                let (first, last) = (range.start, range.end - 1);
                head.set(
                    "content-range",
                    format_args!("bytes {first}-{last}/{total}"),
                )?;
                let length = range.end - range.start;
                head.set("Content-Length", format_args!("{length}"))?;
                pieces.push(Piece::Bytes(range));
            }
            Plan::Multi(ranges) => pieces = multipart(head, &ranges, manifest)?,
            Plan::NotSatisfiable => {
                let total = length.unwrap_or_default();
                head.set("content-range", format_args!("bytes */{total}"))?;
                head.set("Content-Length", format_args!("0"))?;
            }
            Plan::PreconditionFailed => head.set("Content-Length", format_args!("0"))?,
            Plan::NotModified => {}
        }
        if matches!(manifest.status, 200 | 203) && length.is_some() && keeps_fields {
            head.set("Accept-Ranges", format_args!("bytes"))?;
        }
        let now_ms = unix_ms(SystemTime::now());
        let age = manifest.freshness.age(now_ms);
        head.set("Age", format_args!("{age}"))?;
        let show_key = request.settings.policy.caching.show_key;
        self.describe(
            head,
            &cache_status(found, now_ms, fenced, show_key),
            x_cache(found.resolution),
        )?;
        Ok(pieces)
    }

    /// The fields that say what this cache did.
    pub(super) fn describe(
        &self,
        head: &mut impl AnswerHead,
        cache_status: &str,
        x_cache: &'static str,
    ) -> Result<()> {
        head.add("cache-status", format_args!("{NAME}; {cache_status}"))?;
        head.set("x-cache", format_args!("{x_cache}"))?;
        head.add("via", format_args!("{VIA}"))
    }

    /// An error of our own, counted: never stored by anybody.
    pub(super) fn refusal(&self, status: u16, reason: &str) -> Result<ResponseHeader> {
        let mut head = ResponseHeader::build(status, Some(6))?;
        head.insert_header(header::CONTENT_LENGTH, 0)?;
        head.insert_header(header::CACHE_CONTROL, "no-store")?;
        if status == 503 {
            head.insert_header(header::RETRY_AFTER, 1)?;
        }
        let status = match reason {
            // Nobody was asked.
            "only-if-cached" | "malformed" | "loop" => format!("detail={reason}"),
            _ => format!("fwd=miss; detail={reason}"),
        };
        self.describe(&mut head, &status, "MISS")?;
        self.metrics.count_response("MISS", Some(head.status));
        Ok(head)
    }
}

/// Whether an answer carries the object's own fields.
fn keeps_fields(plan: &Plan) -> bool {
    !matches!(plan, Plan::PreconditionFailed | Plan::NotSatisfiable)
}

/// The pieces of a multipart/byteranges answer (RFC 9110 section 14.6), and
/// its fields in the head.
fn multipart(
    head: &mut impl AnswerHead,
    ranges: &[Range<u64>],
    manifest: &Manifest,
) -> Result<Vec<Piece>> {
    let boundary = format!(
        "{:032x}",
        manifest.generation.0 ^ u128::from(manifest.freshness.received_ms)
    );
    let total = manifest.length().unwrap_or_default();
    let content_type = manifest
        .header("content-type")
        .map(|t| format!("Content-Type: {t}\r\n"))
        .unwrap_or_default();
    let mut pieces = Vec::with_capacity(ranges.len() * 2 + 1);
    let mut length = 0u64;
    for range in ranges {
        let text = format!(
            "\r\n--{boundary}\r\n{content_type}Content-Range: bytes {}-{}/{total}\r\n\r\n",
            range.start,
            range.end - 1
        );
        length += text.len() as u64 + (range.end - range.start);
        pieces.push(Piece::Text(text.into()));
        pieces.push(Piece::Bytes(range.clone()));
    }
    let end = format!("\r\n--{boundary}--\r\n");
    length += end.len() as u64;
    pieces.push(Piece::Text(end.into()));
    head.set(
        "Content-Type",
        format_args!("multipart/byteranges; boundary={boundary}"),
    )?;
    head.set("Content-Length", format_args!("{length}"))?;
    Ok(pieces)
}

/// RFC 9211's parameters for an answer from a manifest. The detail is the
/// answer's phase, in the words of pingora-cache.
fn cache_status(found: &Found, now_ms: u64, fenced: bool, show_key: bool) -> String {
    let manifest = &found.object.manifest;
    let freshness = &manifest.freshness;
    let ttl = freshness.lifetime as i64 - freshness.age(now_ms) as i64;
    let collapsed = if found.collapsed { "; collapsed" } else { "" };
    let fwd = found.forwarded.as_str();
    let mut status = match found.resolution {
        Resolution::Hit => format!("hit; ttl={ttl}"),
        Resolution::Stale => {
            let updating = freshness.staleness(now_ms) <= freshness.stale_while_revalidate;
            let detail = if updating { "stale-updating" } else { "stale" };
            format!("hit; ttl={ttl}; detail={detail}")
        }
        Resolution::Revalidated => {
            // Another node held it, where this one did not.
            let fwd = match found.forwarded {
                Forwarded::UriMiss => Forwarded::Stale.as_str(),
                _ => fwd,
            };
            let detail = if fenced { "fenced" } else { "revalidated" };
            // A 304 may forbid keeping what it confirms.
            let stored = match freshness.no_cache && freshness.lifetime == 0 {
                true => "",
                false => "; stored",
            };
            format!("fwd={fwd}; fwd-status=304{stored}; ttl={ttl}{collapsed}; detail={detail}")
        }
        Resolution::Miss => {
            let in_parts = !manifest.version.whole || manifest.part.is_some();
            let origin = if in_parts { 206 } else { manifest.status };
            let detail = match found.forwarded {
                _ if fenced => "fenced",
                Forwarded::Stale => "expired",
                _ => "miss",
            };
            format!("fwd={fwd}; fwd-status={origin}; stored; ttl={ttl}{collapsed}; detail={detail}")
        }
    };
    if show_key {
        // A string of RFC 8941: what would need an escape is no part of a URL.
        let text = format!("{}{}", manifest.url.host, manifest.url.target);
        let safe: String = text
            .chars()
            .map(|c| match c {
                '"' | '\\' => '_',
                ' '..='~' => c,
                _ => '_',
            })
            .collect();
        status += &format!("; key=\"{safe}\"");
    }
    status
}

/// The Date of an answer stays as the origin gave it (RFC 9110 section 6.6.1).
pub(super) fn keep_date(head: &ResponseHeader) {
    let date = head.headers.get(header::DATE);
    stream::next_head_is_of(date.map(http::HeaderValue::as_bytes));
}

pub(super) fn x_cache(resolution: Resolution) -> &'static str {
    match resolution {
        Resolution::Hit => "HIT",
        Resolution::Miss => "MISS",
        Resolution::Revalidated => "REVALIDATED",
        Resolution::Stale => "STALE",
    }
}
