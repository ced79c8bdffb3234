//! Request heads that are read here, without Pingora: plain ones.
//!
//! A plain head is a GET or HEAD of HTTP/1.1 with one Host and nothing that says
//! something about the message or the connection: no body, no upgrade, nothing
//! but `keep-alive` or `close` in Connection. Whatever else it is, a fault too, is for
//! Pingora to read. Pure.

use http::header::{
    CONNECTION, CONTENT_LENGTH, EXPECT, HOST, HeaderName, HeaderValue, TRANSFER_ENCODING, UPGRADE,
};
use http::{Method, Version};
use pingora_http::RequestHeader;

/// Fields of a plain head at most.
const FIELDS_MAX: usize = 64;
/// Bytes of a plain head at most.
const BYTES_MAX: usize = 16 * 1024;
const CLOSE: &[u8] = b"close";
/// What no plain head has.
const NOT_PLAIN: [HeaderName; 4] = [CONTENT_LENGTH, TRANSFER_ENCODING, EXPECT, UPGRADE];

/// A head that is all there.
#[derive(Debug)]
pub(crate) struct Head {
    /// Its length; 0 where no end of it can be told.
    pub(crate) bytes: usize,
    /// What it says, if it is plain.
    pub(crate) plain: Option<RequestHeader>,
}

/// Reads the head that `ahead` begins with; `None`: the rest is still to come.
pub(crate) fn read(ahead: &[u8]) -> Option<Head> {
    if ahead.is_empty() {
        return None;
    }
    let mut fields = [httparse::EMPTY_HEADER; FIELDS_MAX];
    let mut request = httparse::Request::new(&mut fields);
    match request.parse(ahead) {
        Ok(httparse::Status::Complete(bytes)) => Some(Head {
            bytes,
            plain: plain(&request),
        }),
        Ok(httparse::Status::Partial) if ahead.len() < BYTES_MAX => None,
        _ => Some(Head {
            bytes: 0,
            plain: None,
        }),
    }
}

fn plain(request: &httparse::Request) -> Option<RequestHeader> {
    let method = match request.method? {
        "GET" => Method::GET,
        "HEAD" => Method::HEAD,
        _ => return None,
    };
    let path = request.path?;
    if request.version? != 1 || !path.starts_with('/') {
        return None;
    }
    let fields = Some(request.headers.len());
    let mut head = RequestHeader::build_no_case(method, path.as_bytes(), fields).ok()?;
    head.set_version(Version::HTTP_11);
    for field in request.headers.iter() {
        let name = HeaderName::from_bytes(field.name.as_bytes()).ok()?;
        let value = HeaderValue::from_bytes(field.value).ok()?;
        if NOT_PLAIN.contains(&name)
            || name == CONNECTION && (head.headers.contains_key(CONNECTION) || !is_plain(&value))
            || name == HOST && (head.headers.contains_key(HOST) || value.as_bytes().contains(&b'@'))
        {
            return None;
        }
        head.append_header(name, value).ok()?;
    }
    head.headers.contains_key(HOST).then_some(head)
}

fn is_plain(connection: &HeaderValue) -> bool {
    let said = connection.as_bytes();
    said.eq_ignore_ascii_case(b"keep-alive") || said.eq_ignore_ascii_case(CLOSE)
}

/// Whether a plain head is the last one of its connection.
pub(crate) fn is_last(head: &RequestHeader) -> bool {
    let connection = head.headers.get(CONNECTION);
    connection.is_some_and(|said| said.as_bytes().eq_ignore_ascii_case(CLOSE))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plain_head_is_read() {
        let bytes = b"GET /a?b HTTP/1.1\r\nHost: X\r\nRange: bytes=0-1\r\nconnection: Keep-Alive\r\n\r\nGET";
        for end in 0..bytes.len() - 3 {
            assert!(read(&bytes[..end]).is_none(), "{end}");
        }
        let head = read(bytes).unwrap();
        assert_eq!(head.bytes, bytes.len() - 3);
        let head = head.plain.unwrap();
        assert_eq!(head.raw_path(), b"/a?b");
        assert_eq!(head.headers["range"], "bytes=0-1");
        assert!(!is_last(&head));
        let last = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Close\r\n\r\n";
        assert!(is_last(&read(last).unwrap().plain.unwrap()));
    }

    #[test]
    fn anything_else_is_for_pingora() {
        for head in [
            "POST / HTTP/1.1\r\nHost: x\r\n",
            "PURGE / HTTP/1.1\r\nHost: x\r\n",
            "GET / HTTP/1.0\r\nHost: x\r\n",
            "GET http://x/ HTTP/1.1\r\nHost: x\r\n",
            "GET * HTTP/1.1\r\nHost: x\r\n",
            "GET / HTTP/1.1\r\nA: b\r\n",
            "GET / HTTP/1.1\r\nHost: x\r\nHost: x\r\n",
            "GET / HTTP/1.1\r\nHost: a@x\r\n",
            "GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n",
            "GET / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n",
            "GET / HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n",
            "GET / HTTP/1.1\r\nHost: x\r\nUpgrade: h2c\r\n",
            "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nConnection: keep-alive\r\n",
            "GET / HTTP/1.1\r\nHost: x\r\nConnection: keep-alive, x-a\r\n",
        ] {
            let found = read(format!("{head}\r\nmore").as_bytes()).unwrap();
            assert_eq!(found.bytes, head.len() + 2, "{head}");
            assert!(found.plain.is_none(), "{head}");
        }
        for faulty in [
            "GET / HTTP/1.1\r\nA b: c\r\n\r\n",
            "\x16\x03\x01",
            "GET / a HTTP/1.1\r\n\r\n",
        ] {
            let found = read(faulty.as_bytes()).unwrap();
            assert_eq!(found.bytes, 0, "{faulty}");
            assert!(found.plain.is_none(), "{faulty}");
        }
        let long = format!("GET / HTTP/1.1\r\nA: {}", "b".repeat(BYTES_MAX));
        assert!(read(long.as_bytes()).unwrap().plain.is_none());
    }
}
