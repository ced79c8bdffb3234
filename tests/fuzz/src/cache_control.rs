//! Freshness from header fields: whatever they say, the numbers stay in their
//! bounds; what is said clearly is understood.

use std::time::Duration;

use http::header::{CACHE_CONTROL, HeaderMap, HeaderName, HeaderValue};
use pingora_slice::config::{Caching, DefaultFreshness, Honoured};
use pingora_slice::freshness::{self, Demands, Policy};
use pingora_slice::manifest::Freshness;

/// Longest lifetime or age (RFC 9111 section 1.2.2), seconds.
const SECONDS_MAX: u64 = 1 << 31;
/// Unix milliseconds of the fuzzed exchange.
const NOW_MS: u64 = 1_700_000_000_000;
/// What the site says where the origin does not.
const TTL: Duration = Duration::from_secs(3600);

/// A byte that says what the rest is: lines of fields, or a list to write down.
pub fn check(data: &[u8]) {
    match crate::head(data) {
        Some(([what], rest)) if what % 2 == 0 => fields(rest),
        Some((_, rest)) => {
            written(rest, CACHE_CONTROL, false);
            written(rest, HeaderName::from_static("cdn-cache-control"), true);
        }
        None => {}
    }
}

fn judged(status: u16, headers: &HeaderMap) -> Option<Freshness> {
    let policy = Policy {
        default_freshness: DefaultFreshness::Heuristic,
        cache_ttl: TTL,
        caching: Caching::default(),
    };
    freshness::store(
        &policy,
        &Demands::default(),
        status,
        headers,
        NOW_MS,
        NOW_MS + 10,
    )
    .ok()
}

/// Lines `NAME-NUMBER VALUE`: any values in the fields that count.
fn fields(data: &[u8]) {
    const NAMES: [&str; 8] = [
        "cache-control",
        "cdn-cache-control",
        "expires",
        "date",
        "last-modified",
        "age",
        "vary",
        "pragma",
    ];
    let mut headers = HeaderMap::new();
    for line in data.split(|byte| *byte == b'\n').take(16) {
        let Some(([name], value)) = crate::head(line) else {
            continue;
        };
        if let Ok(value) = HeaderValue::from_bytes(value) {
            let name = NAMES[usize::from(name) % NAMES.len()];
            headers.append(HeaderName::from_static(name), value);
        }
    }
    for status in [200, 206, 302, 404, 503] {
        let Some(freshness) = judged(status, &headers) else {
            continue;
        };
        let longest = [
            freshness.lifetime,
            freshness.stale_while_revalidate,
            freshness.stale_if_error,
        ];
        assert!(longest.iter().all(|s| *s <= SECONDS_MAX), "{freshness:?}");
        // A date may be as old as time itself; beyond that nothing is added up.
        assert!(freshness.initial_age <= SECONDS_MAX + NOW_MS / 1000 + 1);
        let later = NOW_MS + 1000 * (SECONDS_MAX + 1);
        assert!(!freshness.is_fresh(later), "{freshness:?}");
        assert_ne!(freshness.staleness(later), 0);
        if freshness.is_fresh(NOW_MS + 10) {
            assert_eq!(freshness.staleness(NOW_MS + 10), 0);
        }
    }
    let demands = Demands::of(&headers, &Honoured::default());
    assert!(demands.max_age.is_none_or(|s| s <= SECONDS_MAX));
    if let Some(names) = freshness::vary(&headers) {
        assert!(names.is_sorted() && names.iter().all(|name| !name.is_empty()));
    }
}

/// A list of directives, chosen by the bytes and written down in one of many
/// ways, says what was chosen. Of one given twice the first counts, in a
/// structured dictionary (RFC 8941) the last.
fn written(data: &[u8], field: HeaderName, structured: bool) {
    const NAMES: [&str; 4] = [
        "max-age",
        "s-maxage",
        "stale-while-revalidate",
        "stale-if-error",
    ];
    let mut text = String::new();
    let mut said: [Option<u64>; NAMES.len()] = [None; NAMES.len()];
    for chunk in data.chunks_exact(5).take(12) {
        let [form, number @ ..] = chunk else { return };
        let number = number
            .iter()
            .fold(0u64, |n, byte| n << 8 | u64::from(*byte));
        let which = usize::from(form % 4);
        let name = NAMES[which];
        if !text.is_empty() {
            text.push_str(if form & 4 == 0 { "," } else { " ,\t" });
        }
        text.push_str(&match (form >> 3 & 3, structured) {
            (0, false) => format!("{}={number}", name.to_ascii_uppercase()),
            (1, false) => format!("{name}=\"{number}\""),
            (2, false) => format!("x=\"a, {name}=1\\\"\",{name}={number}"),
            (0, true) => format!("{name}={number};a;b=\"c, {name}=1\""),
            (1, true) => format!("x=(a \"b\" 1);d=?0, {name}={number}"),
            _ => format!("{name}={number}"),
        });
        let number = number.min(SECONDS_MAX);
        said[which] = match said[which] {
            Some(first) if !structured => Some(first),
            _ => Some(number),
        };
    }
    let Ok(value) = HeaderValue::from_str(&text) else {
        panic!("{text:?} is no field value");
    };
    let mut headers = HeaderMap::new();
    headers.insert(field, value);
    let freshness = judged(200, &headers);
    let [max_age, shared, while_revalidate, if_error] = said;
    match shared.or(max_age) {
        Some(lifetime) => {
            let freshness = freshness.expect("nothing forbids it");
            assert_eq!(freshness.lifetime, lifetime, "{text}");
            assert_eq!(
                freshness.stale_while_revalidate,
                while_revalidate.unwrap_or(0),
                "{text}"
            );
            assert_eq!(freshness.stale_if_error, if_error.unwrap_or(0), "{text}");
            assert_eq!(freshness.must_revalidate, shared.is_some(), "{text}");
        }
        // Neither a lifetime nor a date to guess from.
        None => assert_eq!(freshness, None, "{text}"),
    }
}
