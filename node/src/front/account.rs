//! What is counted of a request, the same whichever way it is answered: that it
//! came, when its answer began, what the answer was, and when it was over. Bytes and
//! slices are counted where they are given.

use std::time::Instant;

use http::StatusCode;

use super::{Front, x_cache};
use crate::engine::Found;

impl Front {
    /// A request has come; once for each.
    pub(super) fn count_request(&self) {
        self.metrics.requests_total.inc();
    }

    /// The head of its answer goes out.
    pub(super) fn count_begun(&self, started: Instant) {
        self.metrics
            .time_to_first_byte_seconds
            .observe(started.elapsed().as_secs_f64());
    }

    /// What is answered is an object, `sliced` where bytes of it follow.
    pub(super) fn count_answer(&self, found: &Found, status: StatusCode, sliced: bool) {
        self.metrics
            .count_response(x_cache(found.resolution), Some(status));
        if sliced {
            self.metrics.sliced_requests_total.inc();
        }
    }

    /// What is answered is what the origin said to this client alone, or nothing.
    pub(super) fn count_pass(&self, why: &str, status: Option<StatusCode>) {
        self.metrics.passthrough_requests_total.inc();
        self.metrics.passes_total.with_label_values(&[why]).inc();
        self.metrics.count_response("PASS", status);
    }

    /// Its answer is over, to the last byte or broken off.
    pub(super) fn count_over(&self, started: Instant) {
        self.metrics
            .request_duration_seconds
            .observe(started.elapsed().as_secs_f64());
    }
}
