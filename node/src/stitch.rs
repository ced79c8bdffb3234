//! The log of stitching faults: answers of the origin that do not fit
//! together. One structured line each, at most one in `stitch_log.pace`.

use std::ops::Range;
use std::sync::Arc;

use http::HeaderMap;
use pingora_slice_cluster::wire::Version;

use crate::config::Live;
use crate::log_limit::Paced;
use crate::metrics::Metrics;
use crate::url::Url;

/// One fault: what was expected, what came.
pub struct Fault<'a> {
    /// In a word; also a label in the metrics.
    pub reason: &'static str,
    /// The object.
    pub url: &'a Url,
    /// The bytes that were asked for.
    pub asked: Option<Range<u64>>,
    /// The version that was expected, where there was one.
    pub expected: Option<&'a Version>,
    /// What the origin sent.
    pub headers: &'a HeaderMap,
}

/// Counts every fault, writes at most one line per pace.
pub struct StitchLog {
    live: Live,
    metrics: Arc<Metrics>,
    paced: Paced,
}

impl StitchLog {
    /// A log by the `stitch_log` in force.
    pub fn new(live: Live, metrics: Arc<Metrics>) -> StitchLog {
        StitchLog {
            paced: Paced::new(live.now().stitch_log.pace),
            live,
            metrics,
        }
    }

    /// Counts the fault, and logs it if the pace allows.
    pub fn report(&self, fault: Fault<'_>) {
        self.metrics
            .stitch_faults_total
            .with_label_values(&[fault.reason])
            .inc();
        let settings = self.live.now().stitch_log;
        if !settings.enabled {
            return;
        }
        let Some(left_out) = self.paced.turn_in(settings.pace) else {
            return;
        };
        let got = |name: &str| {
            fault
                .headers
                .get(name)
                .map(|v| String::from_utf8_lossy(v.as_bytes()).into_owned())
        };
        let expected = fault.expected;
        tracing::warn!(
            target: "pingora_slice::stitch",
            reason = fault.reason,
            url = %fault.url,
            range = ?fault.asked,
            expected_etag = ?expected.and_then(|v| v.etag.as_deref()),
            got_etag = ?got("etag"),
            expected_last_modified = ?expected.and_then(|v| v.last_modified.as_deref()),
            got_last_modified = ?got("last-modified"),
            expected_length = ?expected.and_then(|v| v.length),
            got_content_range = ?got("content-range"),
            cache_control = ?got("cache-control"),
            via = ?got("via"),
            left_out,
            "stitching fault"
        );
    }
}
