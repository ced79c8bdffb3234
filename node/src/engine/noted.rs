//! Objects whose last answers were not for everybody, remembered for a few
//! seconds; apart for requests with credentials, whose answers say nothing of
//! what others get.

use std::collections::HashMap;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use pingora_slice_cluster::ObjectKey;

use super::Request;

/// How long an answer is remembered.
const NOTED_FOR: Duration = Duration::from_secs(5);
/// Objects remembered, about 100 bytes each.
const NOTED_MAX: usize = 10_000;

/// See the module's text.
#[derive(Default)]
pub(super) struct Noted {
    since: Mutex<HashMap<(ObjectKey, bool), Instant>>,
}

impl Noted {
    /// Remembers an object, as it is asked for with credentials or without.
    pub(super) fn note(&self, key: ObjectKey, authorized: bool) {
        let mut since = self.since.lock().expect("no panic while held");
        if since.len() >= NOTED_MAX {
            since.clear();
        }
        since.insert((key, authorized), Instant::now());
    }

    /// Whether the object of such a request is remembered.
    pub(super) fn has(&self, request: &Request) -> bool {
        let key = (request.key, request.demands.authorized);
        let mut since = self.since.lock().expect("no panic while held");
        match since.get(&key) {
            Some(since) if since.elapsed() < NOTED_FOR => true,
            Some(_) => {
                since.remove(&key);
                false
            }
            None => false,
        }
    }

    /// The object of such a request is as any other again.
    pub(super) fn forget(&self, request: &Request) {
        let key = (request.key, request.demands.authorized);
        self.since.lock().expect("no panic while held").remove(&key);
    }
}
