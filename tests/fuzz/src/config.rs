//! The configuration: whole files, and the scalars in them.

use std::path::Path;
use std::time::Duration;

use pingora_slice::config::{Config, Problems};
use pingora_slice_tests::model;

/// Longest duration that is accepted.
const DURATION_MAX_MS: u128 = 36_500 * 86_400_000;
/// Largest size that is accepted.
const SIZE_MAX: u128 = 1 << 60;

/// Text, both as a file and as the value of a key.
pub fn check(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    file(text);
    if !text.contains(char::is_control) {
        scalar(text);
    }
}

fn parse(text: &str) -> Result<Config, Problems> {
    Config::parse(text, Path::new("/base"))
}

fn file(text: &str) {
    match parse(text) {
        Ok(config) => {
            assert!(!config.listen.is_empty() && !config.upstreams.is_empty());
            assert!(config.slice_bytes > 0 && config.threads > 0);
            assert!(config.max_concurrent_subrequests > 0 && config.l1_bytes_max > 0);
            assert!(config.cache_ttl > Duration::ZERO);
            assert!(u128::from(config.slice_bytes) <= u128::from(u32::MAX));
            let longest = config.cache_ttl.max(config.drain_timeout);
            assert!(longest.as_millis() <= DURATION_MAX_MS);
            assert!(
                config
                    .upstreams
                    .iter()
                    .all(|up| up.port != 0 && !up.host.is_empty())
            );
        }
        Err(problems) => {
            // Each says what, and what to do.
            assert!(!problems.0.is_empty());
            for problem in &problems.0 {
                assert!(!problem.remedy.is_empty(), "{problem}");
            }
        }
    }
}

/// The same text as a duration and as a size, through quotes and `${VAR}`.
fn scalar(text: &str) {
    let quoted = serde_json::to_string(text).expect("text");
    let read = |key: &str| parse(&format!("listen: 127.0.0.1:1\n{key}: {quoted}\n"));
    let value = model::expanded(text, |name| std::env::var(name).ok());

    let ms = value.as_deref().and_then(model::duration_ms);
    let ms = ms.filter(|ms| (1..=DURATION_MAX_MS).contains(ms));
    let ours = read("cache_ttl")
        .ok()
        .map(|config| config.cache_ttl.as_millis());
    assert_eq!(ours, ms, "{text:?} as a duration");

    let bytes = value.as_deref().and_then(model::size);
    let bytes = bytes.filter(|bytes| (1..=SIZE_MAX).contains(bytes));
    let ours = read("l1_cache_size_bytes")
        .ok()
        .map(|config| u128::from(config.l1_bytes_max));
    assert_eq!(ours, bytes, "{text:?} as a size");
}
