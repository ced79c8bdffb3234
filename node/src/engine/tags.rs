//! Entity tags that disagree: a change, or replicas of one origin that make
//! their tags differently.
//!
//! After a change every answer has the one new tag. Tags that come and go, or
//! are never the same, say nothing about the bytes: then Last-Modified and the
//! length do, as they would without any tag. Without Last-Modified nothing ties
//! one slice to the next, and the object is asked for whole.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use pingora_slice_cluster::Generation;
use pingora_slice_cluster::wire::Version;

/// Versions remembered; so many have such an origin at once in no cluster.
const VERSIONS_MAX: usize = 1024;

/// What all fills of a version heard of its entity tag.
enum Heard {
    /// Another one, for the first time at this time.
    Other(Instant),
    /// That tags say nothing.
    Nothing,
}

/// The versions whose origin gave other entity tags than theirs.
#[derive(Default)]
pub(super) struct OtherTags {
    versions: HashMap<Generation, Heard>,
}

impl OtherTags {
    /// Whether the tags of this version's origin do not tell versions apart.
    pub(super) fn say_nothing(&self, version: Generation) -> bool {
        matches!(self.versions.get(&version), Some(Heard::Nothing))
    }

    /// An answer of `now` had another tag.
    pub(super) fn heard_other(&mut self, version: Generation, now: Instant) {
        self.make_room();
        self.versions.entry(version).or_insert(Heard::Other(now));
    }

    /// An answer that was asked for at `asked` had the version's own tag. When
    /// another one had been heard before, that was not a change.
    pub(super) fn heard_own(&mut self, version: Generation, asked: Instant) {
        if let Some(heard) = self.versions.get_mut(&version)
            && matches!(heard, Heard::Other(since) if *since < asked)
        {
            *heard = Heard::Nothing;
        }
    }

    /// Answers in turn had tags that were never the same.
    pub(super) fn heard_many(&mut self, version: Generation) {
        self.make_room();
        self.versions.insert(version, Heard::Nothing);
    }

    fn make_room(&mut self) {
        if self.versions.len() >= VERSIONS_MAX {
            self.versions.clear();
        }
    }
}

/// A version that was replaced so soon after the origin last vouched for it
/// may not have been a version.
const AT_ONCE: Duration = Duration::from_secs(60);

/// Whether `new` differs from the version before it in the entity tag alone,
/// though nothing had the time to change: its tag ties no slices together.
/// What was asked for whole for that reason stays so. `age` is the time since
/// the origin vouched for `old`.
pub(super) fn is_but_another_tag(old: &Version, new: &Version, age: Duration) -> bool {
    old.length == new.length
        && old.last_modified == new.last_modified
        && old.etag.is_some()
        && new.etag.is_some()
        && old.etag != new.etag
        && (old.whole || age < AT_ONCE)
}

#[cfg(test)]
mod tests {
    use super::*;

    const VERSION: Generation = Generation(7);

    #[test]
    fn a_tag_that_comes_back_says_nothing() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut tags = OtherTags::default();
        tags.heard_own(VERSION, at(0));
        tags.heard_other(VERSION, at(10));
        // Asked before the other came: the change may lie between the two.
        tags.heard_own(VERSION, at(9));
        assert!(!tags.say_nothing(VERSION));
        tags.heard_other(VERSION, at(20));
        tags.heard_own(VERSION, at(11));
        assert!(tags.say_nothing(VERSION));
        tags.heard_other(VERSION, at(30));
        assert!(tags.say_nothing(VERSION));
    }

    #[test]
    fn another_tag_alone_ties_nothing_together() {
        let version = |etag: Option<&str>, length| Version {
            etag: etag.map(str::to_owned),
            last_modified: None,
            length: Some(length),
            slice_bytes: 1024,
            whole: false,
            hard: Default::default(),
        };
        let (one, other) = (version(Some("\"1\""), 5), version(Some("\"2\""), 5));
        assert!(is_but_another_tag(&one, &other, Duration::ZERO));
        assert!(!is_but_another_tag(&one, &other, AT_ONCE));
        assert!(!is_but_another_tag(&one, &one, Duration::ZERO));
        assert!(!is_but_another_tag(
            &one,
            &version(Some("\"2\""), 6),
            Duration::ZERO
        ));
        assert!(!is_but_another_tag(&one, &version(None, 5), Duration::ZERO));
        let dated = Version {
            last_modified: Some("Fri, 20 Nov 2026 17:39:37 GMT".into()),
            ..other.clone()
        };
        assert!(!is_but_another_tag(&one, &dated, Duration::ZERO));
        let whole = Version { whole: true, ..one };
        assert!(is_but_another_tag(&whole, &other, AT_ONCE));
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let mut tags = OtherTags::default();
        for version in 0..3 * VERSIONS_MAX as u64 {
            tags.heard_other(Generation(version.into()), Instant::now());
            tags.heard_many(Generation(version.into()));
            assert!(tags.versions.len() <= VERSIONS_MAX);
        }
    }
}
