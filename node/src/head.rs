//! Request heads that are read here, without Pingora: plain ones.
//!
//! A plain head is a GET or HEAD of HTTP/1.1 with one Host and nothing that says
//! something about the message or the connection: no body, no upgrade, nothing
//! but `keep-alive` or `close` in Connection. Whatever else it is, a fault too, is for
//! Pingora to read. It stays the bytes that came: most hits look for a few fields, and
//! a map of all of them would cost more than they do. Pure.

use std::borrow::Cow;

use http::header::{
    CONNECTION, CONTENT_LENGTH, EXPECT, HOST, HeaderMap, HeaderName, TRANSFER_ENCODING, UPGRADE,
};

use crate::fields::{self, Fields, text};
use crate::url::{self, Url};

/// Fields of a plain head at most.
const FIELDS_MAX: usize = 64;
/// Bytes of a plain head at most.
const BYTES_MAX: usize = 16 * 1024;
const CLOSE: &[u8] = b"close";
/// What no plain head has.
const NOT_PLAIN: [HeaderName; 4] = [CONTENT_LENGTH, TRANSFER_ENCODING, EXPECT, UPGRADE];
/// What the target of a plain head may have beside letters and digits: what RFC 3986
/// has but a fragment's `#`, and what browsers send besides. Others are rare.
const IN_TARGETS: &[u8] = b"-._~!$&'()*+,;=:@%/?[]{}|";

/// A head that is all there.
#[derive(Debug)]
pub struct Head {
    /// Its length, bytes; 0 where no end of it can be told.
    pub length: usize,
    /// What it says, if it is plain.
    pub plain: Option<Plain>,
}

/// A plain head.
#[derive(Debug)]
pub struct Plain {
    /// GET, not HEAD.
    pub is_get: bool,
    /// It is the last one of its connection.
    pub is_last: bool,
    /// All of it, as it came.
    bytes: Box<[u8]>,
    /// The path with its query.
    target: Span,
    /// Names as they were written, and values.
    fields: Vec<(Span, Span)>,
}

/// Where something lies in a head, in bytes from its beginning.
#[derive(Clone, Copy, Debug)]
struct Span {
    start: u16,
    /// One past its last byte.
    end: u16,
}

impl Span {
    /// Of a part of `bytes`.
    fn of(part: &[u8], bytes: &[u8]) -> Span {
        let start = part.as_ptr().addr() - bytes.as_ptr().addr();
        Span {
            start: start as u16,
            end: (start + part.len()) as u16,
        }
    }
}

const _: () = assert!(BYTES_MAX <= u16::MAX as usize);

impl Plain {
    /// What it names. `None`: its Host is none.
    pub fn url(&self) -> Option<Url> {
        let host = text(self.lines(&HOST).next()?)?;
        url::of_origin_form(host, text(self.at(self.target))?)
    }

    fn at(&self, span: Span) -> &[u8] {
        &self.bytes[usize::from(span.start)..usize::from(span.end)]
    }
}

impl Fields for Plain {
    fn lines<'a>(&'a self, name: &'a HeaderName) -> impl Iterator<Item = &'a [u8]> {
        let name = name.as_str().as_bytes();
        let lines = self.fields.iter();
        let lines = lines.filter(move |(n, _)| self.at(*n).eq_ignore_ascii_case(name));
        lines.map(|(_, value)| self.at(*value))
    }

    fn to_map(&self) -> Cow<'_, HeaderMap> {
        // As httparse and `http` take the same names and values, nothing is left out.
        let fields = self.fields.iter();
        let fields = fields.map(|(name, value)| (self.at(*name), self.at(*value)));
        Cow::Owned(fields::map_of(fields))
    }
}

/// Reads the head that `ahead` begins with; `None`: the rest is still to come.
pub fn read(ahead: &[u8]) -> Option<Head> {
    if ahead.is_empty() {
        return None;
    }
    let mut fields = [httparse::EMPTY_HEADER; FIELDS_MAX];
    let mut request = httparse::Request::new(&mut fields);
    match request.parse(ahead) {
        Ok(httparse::Status::Complete(length)) => Some(Head {
            length,
            plain: plain(&request, &ahead[..length]),
        }),
        Ok(httparse::Status::Partial) if ahead.len() < BYTES_MAX => None,
        _ => Some(Head {
            length: 0,
            plain: None,
        }),
    }
}

fn plain(request: &httparse::Request, bytes: &[u8]) -> Option<Plain> {
    let is_get = match request.method? {
        "GET" => true,
        "HEAD" => false,
        _ => return None,
    };
    let target = request.path?.as_bytes();
    let is_simple = |byte: &u8| byte.is_ascii_alphanumeric() || IN_TARGETS.contains(byte);
    if request.version? != 1
        || bytes.len() > BYTES_MAX
        || !target.starts_with(b"/")
        || !target.iter().all(is_simple)
    {
        return None;
    }
    let (mut hosts, mut connections, mut is_last) = (0, 0, false);
    for field in request.headers.iter() {
        let is = |name: &HeaderName| field.name.eq_ignore_ascii_case(name.as_str());
        if is(&HOST) {
            hosts += 1;
            if field.value.contains(&b'@') {
                return None;
            }
        } else if is(&CONNECTION) {
            connections += 1;
            is_last = field.value.eq_ignore_ascii_case(CLOSE);
            if !is_last && !field.value.eq_ignore_ascii_case(b"keep-alive") {
                return None;
            }
        } else if NOT_PLAIN.iter().any(is) {
            return None;
        }
    }
    if hosts != 1 || connections > 1 {
        return None;
    }
    let span = |part: &[u8]| Span::of(part, bytes);
    let lines = request.headers.iter();
    Some(Plain {
        is_get,
        is_last,
        target: span(target),
        fields: lines
            .map(|field| (span(field.name.as_bytes()), span(field.value)))
            .collect(),
        bytes: bytes.into(),
    })
}

#[cfg(test)]
mod tests {
    use http::header::RANGE;
    use pingora_http::RequestHeader;

    use super::*;

    #[test]
    fn a_plain_head_is_read() {
        let bytes = b"GET /a?b HTTP/1.1\r\nHost: X\r\nRange: bytes=0-1\r\nconnection: Keep-Alive\r\n\r\nGET";
        for end in 0..bytes.len() - 3 {
            assert!(read(&bytes[..end]).is_none(), "{end}");
        }
        let head = read(bytes).unwrap();
        assert_eq!(head.length, bytes.len() - 3);
        let head = head.plain.unwrap();
        assert_eq!(head.url(), Url::parse("x/a?b").ok());
        assert_eq!(head.lines(&RANGE).collect::<Vec<_>>(), [b"bytes=0-1"]);
        assert!(head.is_get && !head.is_last && !head.has(&EXPECT));
        let last = b"HEAD / HTTP/1.1\r\nHost: x\r\nConnection: Close\r\n\r\n";
        let last = read(last).unwrap().plain.unwrap();
        assert!(!last.is_get && last.is_last);
    }

    #[test]
    fn the_target_of_a_plain_head_is_read_as_a_uri_is() {
        let mut plain_ones = 0;
        for byte in '!'..='~' {
            for target in [
                format!("/a{byte}b"),
                format!("//{byte}?{byte}"),
                format!("/?{byte}{byte}/"),
            ] {
                let head = format!("GET {target} HTTP/1.1\r\nhOSt: A.x:80 \r\n\r\n");
                let Some(plain) = read(head.as_bytes()).unwrap().plain else {
                    continue;
                };
                plain_ones += 1;
                let mut its = RequestHeader::build_no_case("GET", target.as_bytes(), None).unwrap();
                its.append_header(HOST, "A.x:80").unwrap();
                assert_eq!(plain.url(), url::of_request(&its), "{target}");
            }
        }
        assert_eq!(plain_ones, 3 * (62 + IN_TARGETS.len()));
    }

    #[test]
    fn a_plain_head_has_a_bound() {
        let head = |filler: usize| {
            let filler = "b".repeat(filler);
            format!("\r\nGET / HTTP/1.1\r\nA:\r\nB: {filler}\r\nHost: x\r\n\r\n")
        };
        let most = head(BYTES_MAX - head(0).len());
        assert_eq!(most.len(), BYTES_MAX);
        let plain = read(most.as_bytes()).unwrap().plain.unwrap();
        assert_eq!(plain.url(), Url::parse("x/").ok());
        assert_eq!(plain.to_map().len(), 3);
        let more = read(head(BYTES_MAX + 1 - head(0).len()).as_bytes()).unwrap();
        assert!(more.length > BYTES_MAX && more.plain.is_none());
    }

    #[test]
    fn anything_else_is_for_pingora() {
        for head in [
            "POST / HTTP/1.1\r\nHost: x\r\n",
            "PURGE / HTTP/1.1\r\nHost: x\r\n",
            "GET / HTTP/1.0\r\nHost: x\r\n",
            "GET http://x/ HTTP/1.1\r\nHost: x\r\n",
            "GET * HTTP/1.1\r\nHost: x\r\n",
            "GET /#a HTTP/1.1\r\nHost: x\r\n",
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
            assert_eq!(found.length, head.len() + 2, "{head}");
            assert!(found.plain.is_none(), "{head}");
        }
        for faulty in [
            "GET / HTTP/1.1\r\nA b: c\r\n\r\n",
            "\x16\x03\x01",
            "GET / a HTTP/1.1\r\n\r\n",
        ] {
            let found = read(faulty.as_bytes()).unwrap();
            assert_eq!(found.length, 0, "{faulty}");
            assert!(found.plain.is_none(), "{faulty}");
        }
        let long = format!("GET / HTTP/1.1\r\nA: {}", "b".repeat(BYTES_MAX));
        assert!(read(long.as_bytes()).unwrap().plain.is_none());
    }
}
