//! Properties of pure functions, against models that count one by one.

use std::collections::HashMap;
use std::path::Path;

use http::HeaderMap;
use http::header::{CONTENT_RANGE, HeaderValue};
use pingora_slice::config::Config;
use pingora_slice::manifest::variant_key;
use pingora_slice::origin::{ContentRange, content_range};
use pingora_slice::plan::{RangeSpec, parse_range};
use pingora_slice::url::normalise_host;
use pingora_slice_cluster::slice::{HashKey, Touched, slice_at, slice_count, slice_range, touched};
use pingora_slice_tests::model;
use proptest::prelude::*;

use super::hold;

/// Any number, the small ones and those around powers of two above all.
fn number() -> impl Strategy<Value = u64> {
    prop_oneof![
        0..40u64,
        any::<u64>(),
        (0..64u32, 0..3u64).prop_map(|(bits, by)| (1u64 << bits).saturating_add(by) - 1),
        Just(u64::MAX),
    ]
}

fn slice_size() -> impl Strategy<Value = u32> {
    prop_oneof![1..20u32, 1..=u32::MAX, Just(65_536), Just(1 << 20)]
}

#[test]
fn p01_configuration_ranges() {
    let sizes = prop_oneof![
        (65_536 - 3..=65_536u64 + 3).boxed(),
        (10_485_760 - 3..=10_485_760u64 + 3).boxed(),
        number().boxed(),
    ];
    hold(1, (sizes, number(), number(), number(), number()), |case| {
        let (slice, subrequests, retries, ttl, l1) = case;
        let text = format!(
            "listen: 127.0.0.1:1\nslice_size: {slice}\nmax_concurrent_subrequests: {subrequests}\n\
             max_retries: {retries}\ncache_ttl: {ttl}\nl1_cache_size_bytes: {l1}\n"
        );
        let century = 36_500 * 86_400;
        let rules = [
            ("slice_size", (65_536..=10_485_760).contains(&slice)),
            (
                "max_concurrent_subrequests",
                (1..=u64::from(u32::MAX)).contains(&subrequests),
            ),
            ("max_retries", retries <= u64::from(u32::MAX)),
            ("cache_ttl", (1..=century).contains(&ttl)),
            ("l1_cache_size_bytes", (1..=1 << 60).contains(&l1)),
        ];
        match Config::parse(&text, Path::new("/")) {
            Ok(config) => {
                prop_assert!(rules.iter().all(|(_, holds)| *holds), "accepted:\n{text}");
                prop_assert_eq!(u64::from(config.slice_bytes), slice);
                prop_assert_eq!(config.max_concurrent_subrequests as u64, subrequests);
                prop_assert_eq!(u64::from(config.max_retries), retries);
                prop_assert_eq!(config.cache_ttl.as_secs(), ttl);
                prop_assert_eq!(config.l1_bytes_max, l1);
            }
            // Each broken rule is named, and nothing else.
            Err(problems) => {
                let mut named: Vec<&str> = problems.0.iter().map(|p| p.key.as_str()).collect();
                let mut broken: Vec<&str> = rules
                    .iter()
                    .filter(|(_, holds)| !holds)
                    .map(|(key, _)| *key)
                    .collect();
                named.sort_unstable();
                broken.sort_unstable();
                prop_assert_eq!(named, broken, "{}", text);
            }
        }
        Ok(())
    });
}

#[test]
fn p04_slices_cover_an_object() {
    hold(
        4,
        (number(), slice_size(), any::<u32>()),
        |(length, size, any)| {
            let count = slice_count(length, size);
            let wide = u128::from(size);
            prop_assert!(u128::from(count) * wide >= u128::from(length));
            prop_assert!(count == 0 || u128::from(count - 1) * wide < u128::from(length));
            // Any byte lies in the slice that is named for it.
            if length > 0 {
                let byte = u64::from(any) * (length / u64::from(u32::MAX)).max(1) % length;
                if let Some(index) = slice_at(byte, size) {
                    prop_assert!(u64::from(index) < count);
                    prop_assert!(slice_range(index, length, size).contains(&byte));
                } else {
                    prop_assert!(u128::from(byte) >= wide << 32);
                }
            }
            let last = u32::try_from(count.saturating_sub(1));
            if let (Ok(last), 1..) = (last, count) {
                prop_assert_eq!(slice_range(0, length, size).start, 0);
                prop_assert_eq!(slice_range(last, length, size).end, length);
            }
            Ok(())
        },
    );
}

#[test]
fn p05_slices_do_not_overlap() {
    let case = (number(), slice_size(), any::<u32>(), any::<u32>());
    hold(5, case, |(length, size, a, b)| {
        let near = u32::try_from(slice_count(length, size)).unwrap_or(u32::MAX);
        let (a, b) = (a % near.max(1), b % near.max(1));
        for (a, b) in [
            (a, b),
            (a, a.saturating_add(1)),
            (near.saturating_sub(1), near),
        ] {
            let (one, other) = (slice_range(a, length, size), slice_range(b, length, size));
            prop_assert!(one.end <= length && other.end <= length);
            if a < b {
                prop_assert!(one.end <= other.start, "{:?} {:?}", one, other);
                // Neighbours touch.
                prop_assert!(b - a != 1 || one.end == other.start);
            }
        }
        Ok(())
    });
}

/// Names that are easily taken for one another.
fn name() -> impl Strategy<Value = (String, String)> {
    ("[ab.]{0,4}", "[ab/?]{0,4}").prop_map(|(host, target)| (host, format!("/{target}")))
}

#[test]
fn p13_keys_are_unique() {
    let variant = || prop::collection::vec(("[ab]{0,2}", "[ab]{0,2}"), 0..3);
    let case = (
        any::<[u8; 16]>(),
        prop::collection::vec((name(), variant()), 2..30),
    );
    hold(13, case, |(key, names)| {
        let key = HashKey(key);
        let mut seen = HashMap::new();
        for (name, variant) in names {
            let object = key.object(&name.0, &name.1);
            prop_assert_eq!(object, key.object(&name.0, &name.1));
            let stored = variant_key(&key, object, &variant);
            let before = seen
                .entry(stored)
                .or_insert((name.clone(), variant.clone()));
            prop_assert_eq!(&*before, &(name, variant));
        }
        Ok(())
    });
    // What names one host has one key.
    let host = (
        "[a-z]{1,8}(\\.[a-z]{1,8}){0,2}",
        any::<u16>(),
        any::<bool>(),
        any::<bool>(),
    );
    hold(13, host, |(host, port, dot, upper)| {
        let mut written = if upper {
            host.to_ascii_uppercase()
        } else {
            host.clone()
        };
        written.push_str(if dot { "." } else { "" });
        prop_assert_eq!(normalise_host(&written), host.clone());
        prop_assert_eq!(normalise_host(&format!("{written}:{port}")), host);
        Ok(())
    });
}

#[test]
fn p17_content_range_validation() {
    let written = (
        number(),
        number(),
        number(),
        "(bytes|Bytes|items)",
        "[*]?",
        "[ ]{1,2}",
    )
        .prop_map(
            |(first, last, total, unit, star, space)| match star.as_str() {
                "" => format!("{unit}{space}{first}-{last}/{total}"),
                star => format!("{unit}{space}{first}-{last}/{star}"),
            },
        );
    let right = (number(), number(), number()).prop_map(|(a, b, c)| {
        let mut sorted = [a, b, c];
        sorted.sort_unstable();
        format!("bytes {}-{}/{}", sorted[0], sorted[1], sorted[2])
    });
    let anything = "(bytes )?[0-9*/ -]{0,24}".prop_map(|text| text);
    hold(17, prop_oneof![written, right, anything], |text| {
        let mut headers = HeaderMap::new();
        headers.insert(
            CONTENT_RANGE,
            HeaderValue::from_str(&text).expect("visible"),
        );
        let ours = content_range(&headers).map(|ContentRange { bytes, total }| {
            (
                bytes.as_ref().map(|bytes| u128::from(bytes.start)),
                bytes.map_or(0, |bytes| u128::from(bytes.end - 1)),
                total.map(u128::from),
            )
        });
        prop_assert_eq!(ours, model::content_range(&text), "{}", text);
        headers.append(CONTENT_RANGE, HeaderValue::from_static("bytes 0-0/1"));
        prop_assert_eq!(content_range(&headers), None, "two of them");
        Ok(())
    });
}

/// A number as text, beyond `u64` too.
fn digit_text() -> impl Strategy<Value = String> {
    prop_oneof![number().prop_map(|n| n.to_string()), "[0-9]{1,25}"]
}

#[test]
fn p18_range_parsing() {
    let spec = prop_oneof![
        (digit_text(), digit_text()).prop_map(|(a, b)| format!("{a}-{b}")),
        digit_text().prop_map(|a| format!("{a}-")),
        digit_text().prop_map(|a| format!("-{a}")),
        "[0-9 +-]{0,4}".prop_map(|text| text),
    ];
    let list = prop::collection::vec(("[ \t]{0,2}", spec, "[ \t]{0,2}"), 1..5);
    let case = ("(bytes|BYTES|bytes |lines|)", list).prop_map(|(unit, list)| {
        let list: Vec<String> = list.into_iter().map(|(a, b, c)| a + &b + &c).collect();
        format!("{unit}={}", list.join(","))
    });
    hold(18, (case, number()), |(text, length)| {
        let ours = parse_range(&text).map(|specs| {
            let selected = |spec: &RangeSpec| {
                let range = spec.of(length)?;
                Some((u128::from(range.start), u128::from(range.end)))
            };
            specs.iter().map(selected).collect::<Vec<_>>()
        });
        // One number is beyond what a length can tell: the last byte of 2^64.
        if length < u64::MAX {
            prop_assert_eq!(ours, model::ranges(&text, length), "{} of {}", text, length);
        }
        Ok(())
    });
}

#[test]
fn p19_partial_slicing() {
    let case = (number(), 0..3000u64, slice_size());
    hold(19, case, |(start, count, size)| {
        let end = start.saturating_add(count);
        let wide = u64::from(size);
        let parts: Vec<Touched> = touched(start..end, size).take(3001).collect();
        // Only what can be numbered is ever planned.
        if slice_at(end.saturating_sub(1), size).is_none() {
            return Ok(());
        }
        let mut next = start;
        for part in &parts {
            let base = u64::from(part.index) * wide;
            prop_assert_eq!(base + u64::from(part.start), next);
            prop_assert!(part.start < part.end && part.end <= size);
            next = base + u64::from(part.end);
        }
        prop_assert_eq!(next, end);
        // No slice more than the range touches.
        let needed = match count.min(end - start) {
            0 => 0,
            _ => (end - 1) / wide - start / wide + 1,
        };
        prop_assert_eq!(parts.len() as u64, needed);
        Ok(())
    });
}
