//! Fuzz targets: one for each parser that reads what somebody else wrote.
//!
//! A target takes bytes and panics when a property is broken: a model that is
//! obviously right disagrees, a value changes on its way through an encoding,
//! a limit does not hold. `tests/bounded.rs` runs each for a short time with
//! the inputs of `corpus/` and mutations of them, on any compiler;
//! `make fuzz SECONDS=60` lets libFuzzer look for more, guided by coverage.
//! What it finds goes into `corpus/`, and is tried in every test run from then on.
//!
//! | target | parser |
//! | --- | --- |
//! | [`range`] | `Range`, and the plan that follows from it |
//! | [`mod@content_range`] | `Content-Range` |
//! | [`config`] | the configuration: YAML, sizes, durations, `${VAR}` |
//! | [`frames`] | what peers send: heads, parts, stored manifests |
//! | [`key`] | the names of objects: request heads and URLs |
//! | [`plain`] | request heads that are read without Pingora |
//! | [`cache_control`] | `Cache-Control`, `CDN-Cache-Control`, dates, `Vary` |

mod allocations;
pub mod cache_control;
pub mod config;
pub mod content_range;
pub mod frames;
pub mod key;
pub mod mutate;
pub mod plain;
pub mod range;

pub use allocations::largest_allocation;

/// A target: its name, and the function that panics.
pub type Target = (&'static str, fn(&[u8]));

/// All targets.
pub const TARGETS: [Target; 7] = [
    ("range", range::check),
    ("content_range", content_range::check),
    ("config", config::check),
    ("frames", frames::check),
    ("key", key::check),
    ("plain", plain::check),
    ("cache_control", cache_control::check),
];

/// The target with this name.
pub fn target(name: &str) -> Option<fn(&[u8])> {
    let (_, check) = TARGETS.iter().find(|(known, _)| *known == name)?;
    Some(*check)
}

/// The first `N` bytes and the rest; `None` where there are fewer.
fn head<const N: usize>(data: &[u8]) -> Option<([u8; N], &[u8])> {
    let (head, rest) = data.split_first_chunk()?;
    Some((*head, rest))
}
