//! The names of objects: different names, different keys; one name, however
//! it is written, one key.

use http::header::HOST;
use pingora_http::RequestHeader;
use pingora_slice::url::{Url, normalise_host, of_request};
use pingora_slice_cluster::slice::HashKey;

/// Longest Host and target that are looked at: a request head has its limit.
const PART_BYTES_MAX: usize = 4096;

/// Longest name: a longer Host is refused as soon as a port is added.
const NAME_BYTES_MAX: usize = 253;

/// Lines: a Host and a target, and another Host and target.
pub fn check(data: &[u8]) {
    let mut lines = data.split(|byte| *byte == b'\n');
    let mut line = || lines.next().unwrap_or_default();
    let names = [(line(), line()), (line(), line())];
    let key = HashKey(*b"0123456789abcdef");
    let found: Vec<_> = names
        .iter()
        .filter_map(|(host, target)| named(host, target))
        .collect();
    for url in &found {
        let Url { host, target } = url;
        assert!(!host.is_empty());
        assert_eq!(*host, normalise_host(host), "normalised once and for all");
        // The URL that we show leads back to the object, where it can be written.
        let written = format!("http://{url}");
        if target.starts_with('/') && target.bytes().all(|b| b.is_ascii_graphic() && b != b'#') {
            assert_eq!(Url::parse(&written).as_ref(), Ok(url));
        }
        // The same name with a port, a final dot, and in capitals.
        let upper = host.to_ascii_uppercase();
        if !host.contains([':', '[', ']']) && host.len() <= NAME_BYTES_MAX {
            for written in [
                format!("{upper}."),
                format!("{host}:8080"),
                format!("{upper}.:1"),
            ] {
                assert_eq!(
                    named(written.as_bytes(), target.as_bytes()).map(|url| url.host),
                    Some(host.clone())
                );
            }
        }
    }
    if let [one, other] = &found[..] {
        let same = key.object(&one.host, &one.target) == key.object(&other.host, &other.target);
        assert_eq!(same, one == other);
    }
    if let Ok(text) = std::str::from_utf8(data)
        && let Ok(url) = Url::parse(text)
    {
        assert!(url.target.starts_with('/'));
        assert_eq!(url.host, normalise_host(&url.host));
        assert_eq!(Url::parse(&url.to_string()), Ok(url));
    }
}

/// The object's name in a request with this Host and target.
fn named(host: &[u8], target: &[u8]) -> Option<Url> {
    if host.len() > PART_BYTES_MAX || target.len() > PART_BYTES_MAX {
        return None;
    }
    let mut head = RequestHeader::build("GET", target, None).ok()?;
    head.append_header(HOST, http::HeaderValue::from_bytes(host).ok()?)
        .ok()?;
    of_request(&head)
}
