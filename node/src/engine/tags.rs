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

/// Versions remembered: no cluster has this many with such an origin at once.
const VERSIONS_MAX: usize = 1024;

/// What all fills of a version heard of its entity tag.
enum Heard {
    /// Another one, first heard at this time.
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

    /// Successive answers had tags that were never the same.
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

/// The entity tags of successive answers to one question, where the first
/// differed from the version held before in its tag alone.
#[derive(Default)]
pub(super) struct NewTags {
    seen: Vec<String>,
}

impl NewTags {
    /// How often a new tag must come again before it is believed.
    pub(super) const LOOKS: u32 = 2;

    /// Whether the tag of `new` ties its slices together; `None` asks again.
    /// `age` is the time since the origin vouched for `old`.
    pub(super) fn judge(&mut self, old: &Version, new: &Version, age: Duration) -> Option<bool> {
        let tag = new.etag.clone().unwrap_or_default();
        if self.seen.iter().any(|seen| *seen != tag) {
            return Some(false);
        }
        if !is_but_another_tag(old, new, age) || self.seen.len() as u32 == NewTags::LOOKS {
            return Some(true);
        }
        self.seen.push(tag);
        None
    }
}

/// A version that was replaced this soon after the origin last vouched for it
/// may not have been a version.
const AT_ONCE: Duration = Duration::from_secs(60);

/// Whether `new` differs from the version before it in the entity tag alone,
/// though there was little time for a change; or again, where that was why it
/// was asked for whole.
fn is_but_another_tag(old: &Version, new: &Version, age: Duration) -> bool {
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

    fn version(tag: &str, length: u64) -> Version {
        Version {
            etag: Some(format!("\"{tag}\"")),
            last_modified: None,
            exact_date: false,
            length: Some(length),
            slice_bytes: 1024,
            whole: false,
            hard: Default::default(),
        }
    }

    #[test]
    fn a_new_tag_is_believed_when_it_comes_again() {
        let judge = |tags: &[&str]| {
            let mut new = NewTags::default();
            let old = version("old", 5);
            let judged = tags
                .iter()
                .map(|tag| new.judge(&old, &version(tag, 5), Duration::ZERO));
            judged.collect::<Vec<_>>()
        };
        assert_eq!(judge(&["a", "a", "a"]), [None, None, Some(true)]);
        assert_eq!(judge(&["a", "a", "b"]), [None, None, Some(false)]);
        assert_eq!(judge(&["a", "old"]), [None, Some(false)]);
        assert_eq!(judge(&["old"]), [Some(true)]);
    }

    #[test]
    fn what_differs_in_more_than_its_tag_is_another_version() {
        let old = version("old", 5);
        let is_but = |new: &Version, age| is_but_another_tag(&old, new, age);
        assert!(is_but(&version("new", 5), Duration::ZERO));
        assert!(!is_but(&version("new", 5), AT_ONCE));
        assert!(!is_but(&version("old", 5), Duration::ZERO));
        assert!(!is_but(&version("new", 6), Duration::ZERO));
        let date = Some("Fri, 20 Nov 2026 17:39:37 GMT".to_owned());
        let dated = Version {
            last_modified: date,
            exact_date: true,
            ..version("new", 5)
        };
        assert!(!is_but(&dated, Duration::ZERO));
        let whole = Version {
            whole: true,
            ..version("old", 5)
        };
        assert!(is_but_another_tag(&whole, &version("new", 5), AT_ONCE));
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
