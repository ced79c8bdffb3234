//! The twenty properties of the original pingora-slice, on this code: each
//! holds for at least [`CASES`] random cases, and each can fail.
//!
//! | number | property | where |
//! | --- | --- | --- |
//! | 1 | configuration ranges | [`pure`] |
//! | 2 | what must pass is passed untouched | [`request`] |
//! | 3 | pattern matching | [`request`] |
//! | 4 | slices cover an object | [`pure`] |
//! | 5 | slices do not overlap | [`pure`] |
//! | 6 | format of the Range header | [`request`] |
//! | 7 | concurrency limit | [`origin`] |
//! | 8 | retry limit | [`origin`] |
//! | 9 | failures are propagated | [`origin`] |
//! | 10 | byte order | [`origin`] |
//! | 11 | header completeness of 200 | [`answer`] |
//! | 12 | header completeness of 206 | [`answer`] |
//! | 13 | key uniqueness | [`pure`] |
//! | 14 | hit correctness | [`answer`] |
//! | 15 | partial hits fetch only what is missing | [`answer`] |
//! | 16 | 4xx passed through | [`origin`] |
//! | 17 | Content-Range validation | [`pure`], [`origin`] |
//! | 18 | range parsing | [`pure`] |
//! | 19 | partial slicing | [`pure`] |
//! | 20 | 416 | [`answer`] |
//!
//! The cases are the same in every run; `PROPTEST_RNG_SEED=N` chooses others,
//! `PROPTEST_CASES=N` more.

mod answer;
mod origin;
mod pure;
mod request;

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use pingora_slice_tests::{Film, Node, Options, TestCluster};
use proptest::prelude::*;
use proptest::strategy::Strategy;
use proptest::test_runner::{Config, RngSeed, TestCaseResult, TestRunner};
use tokio::runtime::Runtime;

/// Cases of each property.
const CASES: u32 = 256;
/// Cases that are put to one node at a time: most of them wait for something.
const LANES: u32 = 8;
/// Slice size of the nodes: borders are everywhere.
pub const SLICE: u64 = 16;
/// Simpler cases that are tried after a failure: each is a real request.
const SHRINKS_MAX: u32 = 300;

fn settings(seed: u64, share: u32) -> Config {
    let given = Config::default();
    Config {
        cases: given.cases.max(CASES).div_ceil(share),
        failure_persistence: None,
        max_shrink_iters: SHRINKS_MAX,
        rng_seed: match given.rng_seed {
            RngSeed::Random => RngSeed::Fixed(seed),
            RngSeed::Fixed(chosen) => RngSeed::Fixed(chosen.wrapping_add(seed)),
        },
        ..given
    }
}

/// Puts random values to a pure property.
fn hold<S: Strategy>(number: u64, strategy: S, property: impl Fn(S::Value) -> TestCaseResult) {
    let mut runner = TestRunner::new(settings(number, 1));
    if let Err(failure) = runner.run(&strategy, property) {
        panic!("property {number}: {failure}");
    }
}

/// One node and its scripted origin, for all cases of a property.
pub struct World {
    cluster: TestCluster,
    published: AtomicU64,
    runtime: Runtime,
}

impl World {
    /// One node alone with tiny slices and these settings.
    pub fn start(settings: &[(&str, &str)]) -> World {
        let runtime = Runtime::new().expect("threads");
        // Room for all cases: what is held is never what another case put out.
        let mut options = Options::alone()
            .set("test_slice_size", SLICE)
            .set("l1_cache_size_bytes", "1g");
        for (key, value) in settings {
            options = options.set(key, value);
        }
        let cluster = runtime.block_on(options.start());
        World {
            cluster,
            published: AtomicU64::new(0),
            runtime,
        }
    }

    /// The node.
    pub fn node(&self) -> &Node {
        self.cluster.node(1)
    }

    /// A number that no other case has.
    pub fn number(&self) -> u64 {
        self.published.fetch_add(1, Ordering::Relaxed)
    }

    /// An object that no other case has.
    pub fn publish(&self, length: u64) -> Film {
        self.publish_at(&format!("/film-{}", self.number()), length)
    }

    /// An object at a path of the case's own.
    pub fn publish_at(&self, path: &str, length: u64) -> Film {
        self.cluster.origin.publish(path, length)
    }

    /// Puts random values to a property, several at a time.
    pub fn hold<S: Strategy>(
        &self,
        number: u64,
        strategy: impl Fn() -> S + Sync,
        property: impl AsyncFn(&World, S::Value) -> TestCaseResult + Sync,
    ) {
        let lane = |lane: u32| {
            let seed = number * 1000 + u64::from(lane);
            let mut runner = TestRunner::new(settings(seed, LANES));
            let outcome = runner.run(&strategy(), |case| {
                self.runtime.block_on(property(self, case))
            });
            outcome.map_err(|failure| failure.to_string())
        };
        let outcomes: Vec<_> = thread::scope(|scope| {
            let lanes: Vec<_> = (0..LANES).map(|n| scope.spawn(move || lane(n))).collect();
            lanes.into_iter().map(|lane| lane.join()).collect()
        });
        for outcome in outcomes {
            if let Err(failure) = outcome.expect("a failed case is no panic of the lane") {
                panic!("property {number}: {failure}");
            }
        }
    }
}

/// A length of a few slices, with the borders more often than by chance.
pub fn length() -> impl Strategy<Value = u64> {
    prop_oneof![
        1..6 * SLICE,
        (1..6u64, 0..3u64).prop_map(|(slices, by)| slices * SLICE + by - 1),
    ]
}

/// A length, and a range inside it that is not empty.
fn length_and_range() -> impl Strategy<Value = (u64, Range<u64>)> {
    length().prop_flat_map(|length| (Just(length), range_within(length)))
}

fn range_within(length: u64) -> impl Strategy<Value = Range<u64>> {
    (0..length)
        .prop_flat_map(move |start| (Just(start), start + 1..=length).prop_map(|(s, e)| s..e))
}

/// `Range` for these bytes.
fn bytes(range: &Range<u64>) -> String {
    format!("bytes={}-{}", range.start, range.end - 1)
}

/// What a Range header of the origin's log asks for, read strictly: digits
/// without leading zeros, in order.
fn asked(value: &str) -> Option<Range<u64>> {
    let (first, last) = value.strip_prefix("bytes=")?.split_once('-')?;
    let number = |text: &str| {
        let number: u64 = text.parse().ok()?;
        (number.to_string() == text).then_some(number)
    };
    let (first, last) = (number(first)?, number(last)?);
    (first <= last).then_some(first..last + 1)
}
