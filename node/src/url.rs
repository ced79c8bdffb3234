//! The names of objects: how a request, a purge or a field of an answer names
//! one, in one form.

use std::net::Ipv6Addr;

use http::header;
use pingora_http::RequestHeader;
use pingora_slice_cluster::purge::Subject;
use pingora_slice_cluster::slice::HashKey;
use serde::{Deserialize, Serialize};

use crate::config::QueryRules;

/// Longest host, bytes: a DNS name and a port.
const HOST_BYTES_MAX: usize = 253 + 6;

/// Host (normalised) and target (raw path and query) of an object.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Url {
    /// Lower-case, without the scheme's default port.
    pub host: String,
    /// Path and query as sent to the origin.
    pub target: String,
}

impl Url {
    /// From `http://host/path?query`; the scheme may be left out, a fragment is
    /// dropped.
    ///
    /// # Errors
    /// What is wrong with it, for the client.
    pub fn parse(url: &str) -> Result<Url, String> {
        let (rest, tls) = match url.split_once("://") {
            Some((scheme, rest)) if scheme.eq_ignore_ascii_case("http") => (rest, false),
            Some((scheme, rest)) if scheme.eq_ignore_ascii_case("https") => (rest, true),
            Some((other, _)) if is_scheme(other) => {
                return Err(format!("{url:?}: {other} is neither http nor https"));
            }
            _ => (url, false),
        };
        let rest = rest.split_once('#').map_or(rest, |(before, _)| before);
        let host_end = rest.find(['/', '?']).unwrap_or(rest.len());
        let (host, target) = rest.split_at(host_end);
        let host = if tls {
            host.strip_suffix(":443").unwrap_or(host)
        } else {
            host
        };
        let host = checked_host(host).map_err(|reason| format!("{url:?}: {reason}"))?;
        if !target.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(format!("{url:?}: the path must be percent-encoded"));
        }
        let slash = if target.starts_with('/') { "" } else { "/" };
        Ok(Url {
            host,
            target: format!("{slash}{target}"),
        })
    }

    /// The names of the object under which a purge covers it, but for its tags,
    /// which its origin alone knows.
    pub(crate) fn untagged_subject(&self, key: &HashKey) -> Subject {
        Subject::new(key, &self.host, &self.target, &[] as &[&str])
    }

    /// The target's path, without the query.
    pub fn path(&self) -> &str {
        self.target.split('?').next().unwrap_or_default()
    }

    /// What a reference in an answer about this object names, where it is on the
    /// same host (RFC 3986 section 5.2).
    pub(crate) fn reference(&self, value: &str) -> Option<Url> {
        let on_this_host = |target: String| Url {
            host: self.host.clone(),
            target,
        };
        let value = value.split('#').next().unwrap_or_default();
        let authority = match value.split_once("://") {
            Some((scheme, rest)) if scheme.bytes().all(|b| b.is_ascii_alphanumeric()) => Some(rest),
            _ => value.strip_prefix("//"),
        };
        if let Some(rest) = authority {
            let (host, path) = rest.split_at(rest.find(['/', '?']).unwrap_or(rest.len()));
            let slash = if path.starts_with('/') { "" } else { "/" };
            let is_ours = normalise_host(host) == self.host;
            return is_ours.then(|| on_this_host(format!("{slash}{path}")));
        }
        let base = self.path();
        Some(on_this_host(match value.chars().next() {
            None => self.target.clone(),
            Some('/') => value.to_owned(),
            Some('?') => format!("{base}{value}"),
            Some(_) => {
                let (path, query) = value.split_at(value.find('?').unwrap_or(value.len()));
                let folder = base.rsplit_once('/').map_or("", |(folder, _)| folder);
                let mut segments: Vec<&str> = folder.split('/').skip(1).collect();
                for segment in path.split('/') {
                    match segment {
                        "." => {}
                        ".." => drop(segments.pop()),
                        segment => segments.push(segment),
                    }
                }
                if path.ends_with("/.") || path.ends_with("..") || path == "." {
                    segments.push("");
                }
                format!("/{}{query}", segments.join("/"))
            }
        }))
    }
}

impl std::fmt::Display for Url {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}{}", self.host, self.target)
    }
}

/// Which host names an object: the one that the origin is asked with. With
/// `upstream_host` that is always the same, whatever clients call us, and so
/// they share one object; the key and the request come from the same text.
#[derive(Clone, Debug, Default)]
pub struct Naming {
    upstream_host: Option<String>,
    query: QueryRules,
}

impl Naming {
    /// By the configuration's `upstream_host` and `caching.query`.
    pub fn new(upstream_host: Option<&str>, query: QueryRules) -> Naming {
        Naming {
            upstream_host: upstream_host.map(normalise_host),
            query,
        }
    }

    /// The path and query that name the object of `target`.
    pub fn target(&self, target: String) -> String {
        self.query.apply(target)
    }

    /// The host that names the objects of `host` (normalised).
    pub fn host<'a>(&'a self, host: &'a str) -> &'a str {
        self.upstream_host.as_deref().unwrap_or(host)
    }

    /// The name of the object that clients call `url`.
    pub fn object(&self, url: Url) -> Url {
        Url {
            host: self.upstream_host.clone().unwrap_or(url.host),
            target: self.target(url.target),
        }
    }
}

/// What a request names. `None` where it names no host, or several.
pub fn of_request(head: &RequestHeader) -> Option<Url> {
    let raw = head.raw_path();
    let has_scheme = |scheme: &[u8]| {
        raw.get(..scheme.len())
            .is_some_and(|start| start.eq_ignore_ascii_case(scheme))
    };
    if has_scheme(b"http://") || has_scheme(b"https://") {
        // Absolute form: its host is the one that counts (RFC 9112, 3.2.2).
        return Url::parse(std::str::from_utf8(raw).ok()?).ok();
    }
    // `*` is for OPTIONS (RFC 9112 section 3.2.4).
    if !raw.starts_with(b"/") && (raw != b"*" || head.method != http::Method::OPTIONS) {
        return None;
    }
    let mut hosts = head.headers.get_all(header::HOST).iter();
    let host = match (hosts.next(), hosts.next()) {
        (Some(host), None) => host.to_str().ok()?,
        (None, _) => head.uri.authority()?.as_str(),
        (Some(_), Some(_)) => return None,
    };
    of_origin_form(host, head.uri.path_and_query().map_or("/", |t| t.as_str()))
}

/// What a path with its query names on a host, as that was written.
pub(crate) fn of_origin_form(host: &str, target: &str) -> Option<Url> {
    Some(Url {
        host: checked_host(host).ok()?,
        target: target.to_owned(),
    })
}

fn is_scheme(text: &str) -> bool {
    !text.is_empty()
        && text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"+-.".contains(&b))
}

/// A host as it is hashed: lower case, without a final dot and without port.
/// Nodes that are reached at different ports, or through a published one, are
/// one cache; and a port that no origin sees can poison nothing.
pub fn normalise_host(host: &str) -> String {
    name_of_host(host).to_ascii_lowercase()
}

/// A host without its port and a final dot.
fn name_of_host(host: &str) -> &str {
    let host = match host.rsplit_once(':') {
        Some((name, port)) if !name.ends_with(':') && port.bytes().all(|b| b.is_ascii_digit()) => {
            let is_bare_ipv6 = name.contains(':') && !name.ends_with(']');
            if is_bare_ipv6 { host } else { name }
        }
        _ => host,
    };
    host.strip_suffix('.').unwrap_or(host)
}

pub(crate) fn checked_host(host: &str) -> Result<String, String> {
    let valid = host.len() <= HOST_BYTES_MAX
        && host
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"-._~:[]%!$&'()*+,;=".contains(&b));
    let port = host.rsplit_once(':').map_or("", |(_, port)| port);
    let host = normalise_host(host);
    let is_ipv6 = |text: &str| text.parse::<Ipv6Addr>().is_ok();
    let is_one = match host.strip_prefix('[') {
        Some(rest) => rest.strip_suffix(']').is_some_and(is_ipv6),
        None => !host.contains([':', '[', ']']) || is_ipv6(&host),
    };
    let is_port_too_large = !host.contains(':')
        && !port.is_empty()
        && port.bytes().all(|byte| byte.is_ascii_digit())
        && port.parse::<u16>().is_err();
    // What we show of a name must lead back to it: `a..` would become another.
    if host.is_empty() || !valid || !is_one || is_port_too_large || name_of_host(&host) != host {
        return Err("no valid host".to_owned());
    }
    Ok(host)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_normalised_like_requests() {
        for (url, host, target) in [
            ("http://A.Example:80/x?y#z", "a.example", "/x?y"),
            ("https://a:443/", "a", "/"),
            ("http://a:443/", "a", "/"),
            ("a.:80", "a", "/"),
            ("a?q", "a", "/?q"),
            ("[::1]:8080/x", "[::1]", "/x"),
        ] {
            let named = Url {
                host: host.to_owned(),
                target: target.to_owned(),
            };
            assert_eq!(Url::parse(url), Ok(named));
        }
        for url in [
            "",
            "/x",
            "http://",
            "http:///x",
            "a/ü",
            "a/b c",
            "a b/c",
            "u@h/x",
            "::::",
            "ftp://h/x",
            "http://h:99999/x",
        ] {
            assert!(Url::parse(url).is_err(), "{url}");
        }
    }

    #[test]
    fn references_are_resolved_against_the_url() {
        let url = Url {
            host: "films.test".into(),
            target: "/a/b/form?x=1".into(),
        };
        for (value, target) in [
            ("", Some("/a/b/form?x=1")),
            ("/c", Some("/c")),
            ("?y", Some("/a/b/form?y")),
            ("c?y", Some("/a/b/c?y")),
            ("./c", Some("/a/b/c")),
            ("../c", Some("/a/c")),
            ("../../../c", Some("/c")),
            ("..", Some("/a/")),
            ("c/d#part", Some("/a/b/c/d")),
            ("http://Films.test/c", Some("/c")),
            ("HTTPS://films.test:443", Some("/")),
            ("//films.test/c", Some("/c")),
            ("http://elsewhere.test/c", None),
            ("//elsewhere.test/c", None),
        ] {
            let named = url.reference(value).map(|url| url.target);
            assert_eq!(named.as_deref(), target, "{value:?}");
        }
    }
}
