//! Heads as HTTP/1.1 writes them (RFC 9112 section 2.1), for what is answered
//! without Pingora.

use bytes::{BufMut, Bytes, BytesMut};
use http::header::{
    ACCEPT_RANGES, AGE, CONTENT_LENGTH, CONTENT_RANGE, DATE, HeaderMap, TRANSFER_ENCODING,
};
use pingora_http::ResponseHeader;

use crate::origin::DIGESTS;
use crate::stream::DATE_BYTES;

/// Room for a usual head.
const HEAD_BYTES: usize = 1024;

/// A head as HTTP/1.1 writes it (RFC 9112 section 2.1), its first fields written
/// already ([`stored_on_the_wire`]). `None` without a Date, which is Pingora's to
/// add (`stream`).
pub(super) fn on_the_wire(head: &ResponseHeader, stored: &[u8], is_last: bool) -> Option<Bytes> {
    if stored.is_empty() && head.headers.get(DATE)?.len() != DATE_BYTES {
        return None;
    }
    let mut wire = BytesMut::with_capacity(HEAD_BYTES + stored.len());
    wire.put_slice(b"HTTP/1.1 ");
    wire.put_slice(head.status.as_str().as_bytes());
    wire.put_u8(b' ');
    wire.put_slice(head.get_reason_phrase().unwrap_or_default().as_bytes());
    wire.put_slice(b"\r\n");
    wire.put_slice(stored);
    head.header_to_h1_wire(&mut wire);
    wire.put_slice(match is_last {
        true => b"Connection: close\r\n\r\n",
        false => b"Connection: keep-alive\r\n\r\n",
    });
    Some(wire.freeze())
}

/// The fields of an object that answers of its bytes (200 and 206) carry as they
/// are: without those that [`Front::complete`](super::Front::complete) sets. `None` where it may remove
/// others, or the object has no Date.
pub(super) fn stored_on_the_wire(mut fields: HeaderMap) -> Option<Bytes> {
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
