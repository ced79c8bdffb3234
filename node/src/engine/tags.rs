//! Entity tags that disagree: a change, or replicas of one origin that make
//! their tags differently.
//!
//! After a change every answer has the one new tag. Tags that come and go, or
//! are never the same, say nothing about the bytes: then Last-Modified and the
//! length do, as they would without any tag.

use std::collections::HashMap;
use std::time::Instant;

use pingora_slice_cluster::Generation;

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

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

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
    fn what_is_remembered_is_bounded() {
        let mut tags = OtherTags::default();
        for version in 0..3 * VERSIONS_MAX as u64 {
            tags.heard_other(Generation(version.into()), Instant::now());
            tags.heard_many(Generation(version.into()));
            assert!(tags.versions.len() <= VERSIONS_MAX);
        }
    }
}
