//! Heads of requests: their fields, whoever read them, and those that are read here,
//! without Pingora: plain ones.
//!
//! A plain head is a GET or HEAD of HTTP/1.1 with one Host and nothing that says
//! something about the message or the connection: no body, no upgrade, nothing
//! but `keep-alive` or `close` in Connection. Whatever else it is, a fault too, is for
//! Pingora to read. It stays the bytes that came: most hits look for a few fields, and
//! a map of all of them would cost more than they do. Pure.

use std::borrow::Cow;

use http::header::{
    CONNECTION, CONTENT_LENGTH, EXPECT, HOST, HeaderMap, HeaderName, HeaderValue,
    TRANSFER_ENCODING, UPGRADE,
};

use crate::url::{self, Url};

/// Fields of a plain head at most.
const FIELDS_MAX: usize = 64;
/// Bytes of a plain head at most.
const BYTES_MAX: usize = 16 * 1024;
const CLOSE: &[u8] = b"close";
/// What no plain head has.
const NOT_PLAIN: [HeaderName; 4] = [CONTENT_LENGTH, TRANSFER_ENCODING, EXPECT, UPGRADE];
/// What the target of a plain head may have beside letters and digits: the rest of
/// RFC 3986's characters but the fragment's and the brackets. Others have several
/// readings.
const IN_TARGETS: &[u8] = b"-._~!$&'()*+,;=:@%/?";

/// The fields of a request, whoever read them.
pub trait Fields {
    /// The values of all lines of a field, in their order.
    fn lines<'a>(&'a self, name: &'a HeaderName) -> impl Iterator<Item = &'a [u8]>;

    /// All of them.
    fn to_map(&self) -> Cow<'_, HeaderMap>;

    /// Whether there is such a field.
    fn has(&self, name: &HeaderName) -> bool {
        self.lines(name).next().is_some()
    }
}

impl Fields for HeaderMap {
    fn lines<'a>(&'a self, name: &'a HeaderName) -> impl Iterator<Item = &'a [u8]> {
        self.get_all(name).iter().map(HeaderValue::as_bytes)
    }

    fn to_map(&self) -> Cow<'_, HeaderMap> {
        Cow::Borrowed(self)
    }
}

/// A field's value, if it is text: ASCII that can be seen, blanks and tabs.
pub fn text(value: &[u8]) -> Option<&str> {
    let is_text = |byte: &u8| matches!(byte, b'\t' | b' '..=b'~');
    let value = value.iter().all(is_text).then_some(value)?;
    std::str::from_utf8(value).ok()
}

/// A head that is all there.
#[derive(Debug)]
pub(crate) struct Head {
    /// Its length; 0 where no end of it can be told.
    pub(crate) bytes: usize,
    /// What it says, if it is plain.
    pub(crate) plain: Option<Plain>,
}

/// A plain head.
#[derive(Debug)]
pub(crate) struct Plain {
    /// GET, not HEAD.
    pub(crate) is_get: bool,
    /// It is the last one of its connection.
    pub(crate) is_last: bool,
    bytes: Box<[u8]>,
    target: Span,
    /// Names as they were written, and values.
    fields: Vec<(Span, Span)>,
}

/// Where something lies in a head.
#[derive(Clone, Copy, Debug)]
struct Span {
    start: u16,
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
    pub(crate) fn url(&self) -> Option<Url> {
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
        let mut map = HeaderMap::with_capacity(self.fields.len());
        for (name, value) in &self.fields {
            // Both were found to be what they must be.
            if let Ok(name) = HeaderName::from_bytes(self.at(*name))
                && let Ok(value) = HeaderValue::from_bytes(self.at(*value))
            {
                map.append(name, value);
            }
        }
        Cow::Owned(map)
    }
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
            plain: plain(&request, &ahead[..bytes]),
        }),
        Ok(httparse::Status::Partial) if ahead.len() < BYTES_MAX => None,
        _ => Some(Head {
            bytes: 0,
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
        assert_eq!(head.bytes, bytes.len() - 3);
        let head = head.plain.unwrap();
        assert_eq!(head.url(), Url::parse("x/a?b").ok());
        assert_eq!(head.lines(&RANGE).collect::<Vec<_>>(), [b"bytes=0-1"]);
        assert!(head.is_get && !head.is_last && !head.has(&EXPECT));
        let last = b"HEAD / HTTP/1.1\r\nHost: x\r\nConnection: Close\r\n\r\n";
        let last = read(last).unwrap().plain.unwrap();
        assert!(!last.is_get && last.is_last);
    }

    #[test]
    fn a_plain_head_says_what_pingora_reads_in_it() {
        let lines = [
            ("hOSt", "A.x:80"),
            ("X-A", "1"),
            ("x-a", "\"2\""),
            ("B", ""),
        ];
        let written = lines.map(|(name, value)| format!("{name}:  {value} \r\n"));
        let mut plain_ones = 0;
        for byte in '!'..='~' {
            for target in [
                format!("/a{byte}b"),
                format!("//{byte}?{byte}"),
                format!("/?{byte}{byte}/"),
            ] {
                let head = format!("GET {target} HTTP/1.1\r\n{}\r\n", written.concat());
                let Some(plain) = read(head.as_bytes()).unwrap().plain else {
                    continue;
                };
                plain_ones += 1;
                let mut its = RequestHeader::build_no_case("GET", target.as_bytes(), None).unwrap();
                for (name, value) in lines {
                    its.append_header(name, value).unwrap();
                }
                assert_eq!(plain.url(), url::of_request(&its), "{target}");
                assert_eq!(*plain.to_map(), its.headers);
                for name in its.headers.keys() {
                    assert!(plain.lines(name).eq(its.headers.lines(name)), "{name}");
                }
            }
        }
        assert_eq!(plain_ones, 3 * (62 + IN_TARGETS.len()));
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
