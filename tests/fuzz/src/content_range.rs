//! `Content-Range`: taken only where it is well-formed and consistent.

use http::header::{CONTENT_RANGE, HeaderMap, HeaderValue};
use pingora_slice::origin;
use pingora_slice_tests::model;

/// The value.
pub fn check(data: &[u8]) {
    let Ok(value) = HeaderValue::from_bytes(data) else {
        return;
    };
    let mut headers = HeaderMap::new();
    headers.insert(CONTENT_RANGE, value.clone());
    let ours = origin::content_range(&headers);
    let wide = ours.clone().map(|range| {
        let first = range.bytes.as_ref().map(|bytes| u128::from(bytes.start));
        let last = range.bytes.map_or(0, |bytes| u128::from(bytes.end - 1));
        (first, last, range.total.map(u128::from))
    });
    assert_eq!(wide, value.to_str().ok().and_then(model::content_range));
    // What is written as we read it is read as the same.
    if let Some(range) = &ours {
        let total = range
            .total
            .map_or("*".to_owned(), |total| total.to_string());
        let text = match &range.bytes {
            Some(bytes) => format!("bytes {}-{}/{total}", bytes.start, bytes.end - 1),
            None => format!("bytes */{total}"),
        };
        headers.insert(CONTENT_RANGE, text.parse().expect("visible"));
        assert_eq!(origin::content_range(&headers), ours);
    }
    headers.append(CONTENT_RANGE, value);
    assert_eq!(origin::content_range(&headers), None, "two of them");
}
