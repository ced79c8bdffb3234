//! From a request head and a manifest to an answer: which status, which bytes.
//!
//! Pure. Conditions come first, in the order of RFC 9110 section 13.2.2, then
//! Range. Numbers are `u64` with checked arithmetic: what overflows is larger
//! than any object. Not here: whether the manifest may be used (`freshness`, purge floors).

use std::ops::Range;

use http::HeaderName;
use http::header::{
    IF_MATCH, IF_MODIFIED_SINCE, IF_NONE_MATCH, IF_RANGE, IF_UNMODIFIED_SINCE, RANGE,
};

use crate::fields::{Fields, text};
use crate::freshness::http_date;
use crate::manifest::Manifest;

/// Ranges answered in one multipart response at most; a longer list is
/// answered with the whole object (RFC 9110 section 14.2 allows ignoring it).
const RANGES_MAX: usize = 16;

/// One byte-range-spec of RFC 9110 section 14.1.1, numbers clamped to `u64`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RangeSpec {
    /// `first-last`, both included.
    FromTo(u64, u64),
    /// `first-`.
    From(u64),
    /// `-length`.
    Suffix(u64),
}

impl RangeSpec {
    /// The bytes it selects of an object of `length` bytes; `None` when none.
    pub fn of(self, length: u64) -> Option<Range<u64>> {
        let range = match self {
            RangeSpec::FromTo(first, last) => first..last.saturating_add(1).min(length),
            RangeSpec::From(first) => first..length,
            RangeSpec::Suffix(count) => length - count.min(length)..length,
        };
        (range.start < range.end).then_some(range)
    }
}

/// Parses a Range value. `None`: to be ignored (another unit, malformed; RFC
/// 9110 section 14.2).
pub fn parse_range(value: &str) -> Option<Vec<RangeSpec>> {
    let (unit, list) = value.split_once('=')?;
    if !unit.eq_ignore_ascii_case("bytes") {
        return None;
    }
    let mut specs = Vec::new();
    for item in list.split(',') {
        let item = item.trim_matches([' ', '\t']);
        if item.is_empty() {
            continue;
        }
        let (first, last) = item.split_once('-')?;
        specs.push(match (first, last) {
            ("", count) => RangeSpec::Suffix(digits(count)?),
            (first, "") => RangeSpec::From(digits(first)?),
            (first, last) => {
                let (first_n, last_n) = (digits(first)?, digits(last)?);
                if last_n < first_n {
                    return None;
                }
                RangeSpec::FromTo(first_n, last_n)
            }
        });
    }
    (!specs.is_empty()).then_some(specs)
}

/// A run of decimal digits; beyond `u64` it is `u64::MAX`, never a small number.
fn digits(text: &str) -> Option<u64> {
    if text.is_empty() || !text.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    Some(text.parse().unwrap_or(u64::MAX))
}

/// The single Range value of a request; two Range lines are no valid request
/// for ranges and are ignored.
pub fn range_value(headers: &impl Fields) -> Option<&str> {
    text(only(headers, &RANGE)?)
}

/// The value of a field that is there in one line.
fn only<'a>(headers: &'a impl Fields, name: &'a HeaderName) -> Option<&'a [u8]> {
    let mut values = headers.lines(name);
    let value = values.next()?;
    values.next().is_none().then_some(value)
}

/// The first byte that the request wants as far as it can be told without the
/// length: 0 for suffixes.
pub fn first_byte(headers: &impl Fields) -> u64 {
    match range_value(headers).and_then(parse_range).as_deref() {
        Some([RangeSpec::FromTo(first, _) | RangeSpec::From(first)]) => *first,
        _ => 0,
    }
}

/// How many bytes of the end a request asks for, where that is all it asks for.
pub fn suffix(headers: &impl Fields) -> Option<u64> {
    match range_value(headers).and_then(parse_range)?.as_slice() {
        [RangeSpec::Suffix(count)] if *count > 0 => Some(*count),
        _ => None,
    }
}

/// Whether all that a GET with these fields may be answered with, of an object
/// of `length` bytes, lies in `part`.
pub fn is_within(headers: &impl Fields, length: u64, part: &Range<u64>) -> bool {
    // As the plan will have it: what is read outside the part counts as a change.
    let plan = match range_value(headers).and_then(parse_range) {
        Some(specs) if !headers.has(&IF_RANGE) => ranges(&specs, length),
        _ => Plan::Whole,
    };
    let holds = |range: &Range<u64>| part.start <= range.start && range.end <= part.end;
    match plan {
        Plan::Whole => *part == (0..length),
        Plan::Single(range) => holds(&range),
        Plan::Multi(ranges) => ranges.iter().all(holds),
        Plan::NotModified | Plan::PreconditionFailed | Plan::NotSatisfiable => true,
    }
}

/// Whether a request has conditions that decide before its Range does (RFC
/// 9110 section 13.2.2, steps 1 to 4).
pub fn has_conditions(headers: &impl Fields) -> bool {
    let names = [
        IF_MATCH,
        IF_NONE_MATCH,
        IF_MODIFIED_SINCE,
        IF_UNMODIFIED_SINCE,
    ];
    names.iter().any(|name| headers.has(name))
}

/// Whether a GET with these fields asks for ranges, in a form that is not to be ignored.
pub fn wants_ranges(headers: &impl Fields) -> bool {
    range_value(headers).and_then(parse_range).is_some()
}

/// Whether these fields ask for ranges of which an object of `length` bytes has none.
pub fn is_unsatisfiable(headers: &impl Fields, length: u64) -> bool {
    range_value(headers)
        .and_then(parse_range)
        .is_some_and(|specs| specs.iter().all(|spec| spec.of(length).is_none()))
}

/// The one range that a GET with these fields asks for.
pub fn single_range(headers: &impl Fields, length: u64) -> Option<Range<u64>> {
    match range_value(headers).and_then(parse_range)?.as_slice() {
        [spec] => spec.of(length),
        _ => None,
    }
}

/// What to answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Plan {
    /// The manifest's own status and the whole body.
    Whole,
    /// 206 with one range.
    Single(Range<u64>),
    /// 206 multipart/byteranges.
    Multi(Vec<Range<u64>>),
    /// 304.
    NotModified,
    /// 412.
    PreconditionFailed,
    /// 416.
    NotSatisfiable,
}

/// Decides the answer to a GET or HEAD.
pub fn plan(method_is_get: bool, request: &impl Fields, manifest: &Manifest) -> Plan {
    if !matches!(manifest.status, 200 | 203) {
        return Plan::Whole;
    }
    if let Some(answer) = conditions(request, manifest) {
        return answer;
    }
    let (true, Some(length)) = (method_is_get, manifest.length()) else {
        return Plan::Whole;
    };
    match range_value(request).and_then(parse_range) {
        Some(specs) if if_range_holds(request, manifest) => ranges(&specs, length),
        _ => Plan::Whole,
    }
}

fn ranges(specs: &[RangeSpec], length: u64) -> Plan {
    if let [spec] = specs {
        return match spec.of(length) {
            Some(range) => Plan::Single(range),
            None => Plan::NotSatisfiable,
        };
    }
    if specs.len() > RANGES_MAX {
        return Plan::Whole;
    }
    let wanted: Vec<Range<u64>> = specs.iter().filter_map(|spec| spec.of(length)).collect();
    let ascending_and_disjoint = wanted.windows(2).all(|pair| pair[0].end <= pair[1].start);
    match wanted.as_slice() {
        [] => Plan::NotSatisfiable,
        [only] => Plan::Single(only.clone()),
        _ if ascending_and_disjoint => Plan::Multi(wanted),
        _ => Plan::Whole,
    }
}

/// RFC 9110 section 13.2.2, steps 1 to 4; `None`: go on with Range.
fn conditions(request: &impl Fields, manifest: &Manifest) -> Option<Plan> {
    if !has_conditions(request) {
        return None;
    }
    let etag = manifest.header("etag");
    let last_modified = manifest.header("last-modified").and_then(http_date);
    if request.has(&IF_MATCH) {
        if !etag_listed(request, &IF_MATCH, etag, strongly_equal) {
            return Some(Plan::PreconditionFailed);
        }
    } else if let (Some(since), Some(modified)) =
        (date(request, &IF_UNMODIFIED_SINCE), last_modified)
        && modified > since
    {
        return Some(Plan::PreconditionFailed);
    }
    if request.has(&IF_NONE_MATCH) {
        if etag_listed(request, &IF_NONE_MATCH, etag, weakly_equal) {
            return Some(Plan::NotModified);
        }
    } else if let (Some(since), Some(modified)) = (
        date(request, &IF_MODIFIED_SINCE),
        // RFC 9111 section 4.3.2: without Last-Modified, the Date counts.
        last_modified.or_else(|| manifest.header("date").and_then(http_date)),
    ) && modified <= since
    {
        return Some(Plan::NotModified);
    }
    None
}

fn date(request: &impl Fields, name: &HeaderName) -> Option<std::time::SystemTime> {
    http_date(text(only(request, name)?)?)
}

fn etag_listed(
    request: &impl Fields,
    name: &HeaderName,
    etag: Option<&str>,
    equal: fn(&str, &str) -> bool,
) -> bool {
    request.lines(name).filter_map(text).any(|value| {
        value.trim() == "*" || etag.is_some_and(|etag| etags(value).any(|given| equal(given, etag)))
    })
}

/// The entity tags of a list; commas inside the quotes belong to the tag.
fn etags(list: &str) -> impl Iterator<Item = &str> {
    let mut rest = list;
    std::iter::from_fn(move || {
        loop {
            rest = rest.trim_start_matches([' ', '\t', ',']);
            let opaque = rest.strip_prefix("W/").unwrap_or(rest);
            let prefix = rest.len() - opaque.len();
            let end = match opaque.strip_prefix('"') {
                Some(quoted) => prefix + quoted.find('"')? + 2,
                // Not an entity tag, but some origins give such.
                None => rest.find(',').unwrap_or(rest.len()),
            };
            let (tag, tail) = rest.split_at(end);
            let (more, tail) = tail.split_at(tail.find(',').unwrap_or(tail.len()));
            rest = tail;
            if tag.is_empty() {
                return None;
            }
            // What has more after its quotes is no entity tag.
            if more.trim().is_empty() {
                return Some(tag);
            }
        }
    })
}

/// RFC 9110 section 8.8.3.2.
fn strongly_equal(a: &str, b: &str) -> bool {
    a == b && !a.starts_with("W/")
}

/// RFC 9110 section 8.8.3.2.
pub(crate) fn weakly_equal(a: &str, b: &str) -> bool {
    a.trim_start_matches("W/") == b.trim_start_matches("W/")
}

/// RFC 9110 section 13.1.5: a strong entity tag, or the exact date where that
/// names the bytes.
fn if_range_holds(request: &impl Fields, manifest: &Manifest) -> bool {
    let Some(value) = request.lines(&IF_RANGE).next() else {
        return true;
    };
    let Some(value) = text(value).map(str::trim) else {
        return false;
    };
    if value.starts_with('"') || value.starts_with("W/") {
        return manifest
            .header("etag")
            .is_some_and(|etag| strongly_equal(value, etag));
    }
    let stored = manifest.version.exact_last_modified().and_then(http_date);
    stored.is_some() && stored == http_date(value)
}

#[cfg(test)]
mod tests {
    use http::HeaderMap;

    use super::RangeSpec::*;
    use super::*;

    #[test]
    fn ranges_are_read_as_rfc_9110_says() {
        let cases: &[(&str, Option<Vec<RangeSpec>>)] = &[
            ("bytes=0-0", Some(vec![FromTo(0, 0)])),
            ("Bytes=5-", Some(vec![From(5)])),
            ("bytes=-1", Some(vec![Suffix(1)])),
            ("bytes=-0", Some(vec![Suffix(0)])),
            (
                "bytes=0-1, 4-5 ,-2",
                Some(vec![FromTo(0, 1), FromTo(4, 5), Suffix(2)]),
            ),
            ("bytes=5-2", None),
            ("bytes=a-2", None),
            ("bytes=1-2-3", None),
            ("bytes=+1-2", None),
            ("bytes=-", None),
            ("bytes=", None),
            ("bytes", None),
            ("items=0-1", None),
            ("bytes =0-1", None),
            ("bytes=10000000000000000000000-", Some(vec![From(u64::MAX)])),
            (
                "bytes=18446744073709551616-18446744073709551617",
                Some(vec![FromTo(u64::MAX, u64::MAX)]),
            ),
        ];
        for (text, expected) in cases {
            assert_eq!(parse_range(text), *expected, "{text}");
        }
    }

    #[test]
    fn specs_select_what_the_model_selects() {
        for length in 0..12u64 {
            for first in 0..14 {
                for last in first..14 {
                    let model: Vec<u64> =
                        (0..length).filter(|i| (first..=last).contains(i)).collect();
                    let ours: Vec<u64> = FromTo(first, last)
                        .of(length)
                        .into_iter()
                        .flatten()
                        .collect();
                    assert_eq!(ours, model);
                }
                let from: Vec<u64> = RangeSpec::From(first)
                    .of(length)
                    .into_iter()
                    .flatten()
                    .collect();
                assert_eq!(from, (first..length).collect::<Vec<_>>());
                let suffix: Vec<u64> = Suffix(first).of(length).into_iter().flatten().collect();
                assert_eq!(
                    suffix,
                    (length.saturating_sub(first)..length).collect::<Vec<_>>()
                );
            }
        }
        assert_eq!(FromTo(u64::MAX, u64::MAX).of(10), None);
        assert_eq!(FromTo(3, u64::MAX).of(10), Some(3..10));
    }

    #[test]
    fn a_part_holds_what_would_be_answered_from_it() {
        let is_within = |range: &str, part: Range<u64>| {
            let mut headers = HeaderMap::new();
            headers.insert(RANGE, range.parse().unwrap());
            is_within(&headers, 10, &part)
        };
        assert!(is_within("bytes=-1", 9..10));
        assert!(is_within("bytes=8-8,9-9", 8..10));
        assert!(is_within("bytes=10-", 9..10));
        assert!(!is_within("bytes=-2", 9..10));
        assert!(!is_within("bytes=8-8,9-9", 9..10));
        // Lists that are answered with the whole.
        let many = format!("bytes={}", vec!["-1"; RANGES_MAX + 1].join(","));
        for list in ["bytes=-1,-2", "bytes=9-9,9-9", &many] {
            assert!(!is_within(list, 8..10), "{list}");
            assert!(is_within(list, 0..10), "{list}");
        }
    }

    #[test]
    fn entity_tags_are_split_outside_their_quotes() {
        assert_eq!(
            etags(r#""a,b", W/"c" ,"d""#).collect::<Vec<_>>(),
            [r#""a,b""#, r#"W/"c""#, r#""d""#]
        );
        assert_eq!(
            etags(r#""a"b, "c""d","e" ,"#).collect::<Vec<_>>(),
            [r#""e""#]
        );
    }
}
