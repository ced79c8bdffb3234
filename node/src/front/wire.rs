//! Heads as HTTP/1.1 writes them (RFC 9112 section 2.1), for what is answered without
//! Pingora.

use std::fmt::{self, Write};

use bytes::{BufMut, Bytes, BytesMut};
use http::StatusCode;
use http::header::{
    ACCEPT_RANGES, AGE, CONTENT_LENGTH, CONTENT_RANGE, DATE, HeaderMap, TRANSFER_ENCODING,
};
use pingora_core::ErrorType::InvalidHTTPHeader;
use pingora_core::{OrErr, Result};
use pingora_http::ResponseHeader;

use super::fields::AnswerHead;
use crate::origin::DIGESTS;
use crate::stream::DATE_BYTES;

/// Room for a usual head.
const HEAD_BYTES: usize = 1024;

/// A head that is all there.
pub(super) struct Head {
    pub(super) status: StatusCode,
    pub(super) bytes: Bytes,
}

impl Head {
    /// Writes a head. `None` without a Date, which is Pingora's to add (`stream`).
    pub(super) fn of(head: &ResponseHeader, is_last: bool) -> Option<Head> {
        if head.headers.get(DATE)?.len() != DATE_BYTES {
            return None;
        }
        let mut wire = Wire::new(&[]);
        wire.begin_with(head.status, head.get_reason_phrase());
        head.header_to_h1_wire(&mut wire.bytes);
        Some(wire.end(is_last))
    }
}

/// A head that is being written, with the fields of an object ([`stored`]).
pub(super) struct Wire<'a> {
    status: StatusCode,
    stored: &'a [u8],
    bytes: BytesMut,
}

impl Wire<'_> {
    pub(super) fn new(stored: &[u8]) -> Wire<'_> {
        Wire {
            status: StatusCode::OK,
            stored,
            bytes: BytesMut::with_capacity(HEAD_BYTES + stored.len()),
        }
    }

    fn begin_with(&mut self, status: StatusCode, reason: Option<&str>) {
        self.status = status;
        for part in [
            "HTTP/1.1 ",
            status.as_str(),
            " ",
            reason.unwrap_or_default(),
            "\r\n",
        ] {
            self.bytes.put_slice(part.as_bytes());
        }
        self.bytes.put_slice(self.stored);
    }

    /// Whether a line of a field is written.
    fn has(&self, name: &str) -> bool {
        let mut lines = self.bytes[..].split(|byte| *byte == b'\n');
        lines.any(|line| {
            let written = line.split(|byte| *byte == b':').next();
            written.is_some_and(|written| written.eq_ignore_ascii_case(name.as_bytes()))
        })
    }

    pub(super) fn end(mut self, is_last: bool) -> Head {
        self.bytes.put_slice(match is_last {
            true => b"Connection: close\r\n\r\n",
            false => b"Connection: keep-alive\r\n\r\n",
        });
        Head {
            status: self.status,
            bytes: self.bytes.freeze(),
        }
    }
}

impl AnswerHead for Wire<'_> {
    fn begin(&mut self, status: u16) -> Result<()> {
        let status = StatusCode::from_u16(status).or_err(InvalidHTTPHeader, "status")?;
        self.begin_with(status, status.canonical_reason());
        Ok(())
    }

    fn set(&mut self, name: &'static str, value: fmt::Arguments<'_>) -> Result<()> {
        self.remove(name);
        self.add(name, value)
    }

    fn add(&mut self, name: &'static str, value: fmt::Arguments<'_>) -> Result<()> {
        write!(self.bytes, "{name}: {value}\r\n").or_err(InvalidHTTPHeader, name)
    }

    /// [`stored`] has left out, or refused, whatever is set or removed.
    fn remove(&mut self, name: &str) {
        debug_assert!(!self.has(name), "{name} is written already");
    }
}

/// The fields of an object that answers of its bytes (200 and 206) carry as they
/// are: without those that [`Front::complete`](super::Front::complete) sets. `None`
/// where it may remove others, or the object has no Date.
pub(super) fn stored(mut fields: HeaderMap) -> Option<Bytes> {
    let has_date = fields
        .get(DATE)
        .is_some_and(|date| date.len() == DATE_BYTES);
    let has_digest = DIGESTS.iter().any(|name| fields.contains_key(*name));
    if !has_date
        || has_digest
        || fields.contains_key(CONTENT_RANGE)
        || fields.contains_key(TRANSFER_ENCODING)
    {
        return None;
    }
    for name in [ACCEPT_RANGES, AGE, CONTENT_LENGTH] {
        fields.remove(name);
    }
    fields.remove("x-cache");
    let (mut parts, ()) = http::Response::new(()).into_parts();
    parts.headers = fields;
    let mut wire = BytesMut::new();
    ResponseHeader::from(parts).header_to_h1_wire(&mut wire);
    Some(wire.freeze())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_added_to_written_fields_is_what_a_map_would_say() {
        fn complete(head: &mut impl AnswerHead) {
            head.begin(206).unwrap();
            head.remove("content-range");
            head.set("Content-Length", format_args!("{}", 5)).unwrap();
            head.set("Accept-Ranges", format_args!("bytes")).unwrap();
            head.set("Age", format_args!("3")).unwrap();
            head.set("x-cache", format_args!("HIT")).unwrap();
            head.add("via", format_args!("1.1 b")).unwrap();
        }
        let mut map = ResponseHeader::build_no_case(200, None).unwrap();
        for (name, value) in [
            ("Date", "Sun, 06 Nov 1994 08:49:37 GMT"),
            ("Accept-Ranges", "bytes"),
            ("Age", "1"),
            ("Content-Length", "9"),
            ("Via", "1.1 a"),
            ("X-A", "1"),
            ("X-Cache", "MISS"),
            ("x-a", "2"),
        ] {
            map.append_header(name, value).unwrap();
        }
        let stored = stored(map.headers.clone()).unwrap();
        let mut wire = Wire::new(&stored);
        complete(&mut wire);
        complete(&mut map);
        let (wire, map) = (wire.end(true), Head::of(&map, true).unwrap());
        assert_eq!(wire.status, map.status);
        let lines = |head: &Head| {
            let text = String::from_utf8(head.bytes.to_vec()).unwrap();
            let mut lines: Vec<String> = text.split("\r\n").map(str::to_owned).collect();
            assert!(lines[0].ends_with("206 Partial Content") && text.ends_with("\r\n\r\n"));
            lines.sort();
            lines
        };
        assert_eq!(lines(&wire), lines(&map));
    }
}
