//! `Range`: what is selected, and what is planned.

use std::sync::OnceLock;

use http::header::{HeaderMap, HeaderValue, RANGE};
use pingora_slice::manifest::{Freshness, Manifest};
use pingora_slice::plan::{self, Plan};
use pingora_slice::url::Url;
use pingora_slice_cluster::purge::Subject;
use pingora_slice_cluster::slice::HashKey;
use pingora_slice_cluster::wire::Version;
use pingora_slice_cluster::{Generation, PurgeIndex};
use pingora_slice_tests::model;

/// An object's length, eight bytes, then the value.
pub fn check(data: &[u8]) {
    let Some((length, value)) = crate::head(data) else {
        return;
    };
    // The last byte of 2^64 has no number that could be one past it.
    let length = u64::from_be_bytes(length).min(u64::MAX - 1);
    let Ok(value) = HeaderValue::from_bytes(value) else {
        return;
    };
    let mut headers = HeaderMap::new();
    headers.insert(RANGE, value.clone());

    let text = plan::range_value(&headers);
    assert_eq!(text, value.to_str().ok());
    let model = text.and_then(|text| model::ranges(text, length));
    let ours = text.and_then(plan::parse_range).map(|specs| {
        let wide = |range: std::ops::Range<u64>| (u128::from(range.start), u128::from(range.end));
        specs
            .iter()
            .map(|spec| spec.of(length).map(wide))
            .collect::<Vec<_>>()
    });
    assert_eq!(ours, model);

    let selected: Vec<_> = model.iter().flatten().flatten().copied().collect();
    match plan::plan(true, &headers, &manifest(length)) {
        Plan::Single(range) => {
            assert_eq!(selected, [(u128::from(range.start), u128::from(range.end))]);
        }
        Plan::Multi(ranges) => {
            // In their order, apart, few: never more bytes than the object.
            assert_eq!(selected.len(), ranges.len());
            assert!((2..=16).contains(&ranges.len()));
            assert!(ranges.windows(2).all(|pair| pair[0].end <= pair[1].start));
            assert!(ranges.last().is_some_and(|last| last.end <= length));
        }
        Plan::NotSatisfiable => assert!(selected.is_empty() && model.is_some()),
        Plan::Whole => assert!(model.is_none_or(|model| model.len() > 1)),
        plan => panic!("{plan:?} without a condition"),
    }
    let suffix = plan::suffix(&headers);
    let first = plan::first_byte(&headers);
    assert!(suffix.is_none() || first == 0);
    if let (Some(count), [(start, _)]) = (suffix, &selected[..]) {
        assert_eq!(u128::from(length - count.min(length)), *start);
    }
}

fn manifest(length: u64) -> Manifest {
    static ONCE: OnceLock<Manifest> = OnceLock::new();
    let mut manifest = ONCE
        .get_or_init(|| Manifest {
            url: Url {
                host: "films.test".into(),
                target: "/".into(),
            },
            status: 200,
            headers: Vec::new(),
            generation: Generation(1),
            version: Version {
                etag: None,
                last_modified: None,
                exact_date: false,
                length: None,
                slice_bytes: 1 << 20,
                whole: false,
                hard: PurgeIndex::default(),
            },
            probe: 0,
            stamp: PurgeIndex::default(),
            subject: Subject::new(&HashKey([0; 16]), "films.test", "/", &[] as &[&str]),
            variant: Vec::new(),
            part: None,
            freshness: Freshness {
                received_ms: 0,
                initial_age: 0,
                lifetime: 1,
                no_cache: false,
                must_revalidate: false,
                stale_while_revalidate: 0,
                stale_if_error: 0,
            },
        })
        .clone();
    manifest.version.length = Some(length);
    manifest
}
