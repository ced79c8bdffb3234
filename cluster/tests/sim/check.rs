//! What happened, and the one rule it must obey (G1, and G2 where it applies).
//!
//! Entries carry two facts that no node may look at: when the origin request
//! that produced or confirmed their bytes left (`confirmed`), and when the one
//! that produced them did (`born`). The rule needs nothing else.

use crate::world::{Key, Time};
use pingora_slice_cluster::purge::PurgeMode;

/// What a purge names, in words instead of hashes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    All,
    Host,
    Url(Key),
    Prefix(&'static str),
    Tag(&'static str),
}

/// The objects: path, and the tags of even and odd versions.
pub const OBJECTS: [(&str, [&[&str]; 2]); 6] = [
    ("/a/x", [&["news"], &["news", "odd"]]),
    ("/a/y?q=1", [&["film"], &["news", "film"]]),
    ("/a/y/trailer", [&["film"], &["film"]]),
    ("/b/z", [&[], &["film"]]),
    ("/b/", [&["odd"], &[]]),
    ("/bb", [&[], &[]]),
];
pub const HOST: &str = "site.example";
pub const PREFIXES: [&str; 4] = ["/a", "/a/y", "/b/", "/"];
pub const TAGS: [&str; 3] = ["news", "film", "odd"];

pub fn tags(key: Key, version: u64) -> &'static [&'static str] {
    OBJECTS[key].1[version as usize % 2]
}

impl What {
    /// Whether it covers these bytes; written again, without the code under test.
    pub fn covers(&self, key: Key, version: u64) -> bool {
        match self {
            What::All | What::Host => true,
            What::Url(url) => *url == key,
            What::Prefix(prefix) => {
                let segments = |path: &'static str| {
                    let path = path.split('?').next().unwrap_or("");
                    path.split('/')
                        .filter(|s| !s.is_empty())
                        .collect::<Vec<_>>()
                };
                segments(OBJECTS[key].0).starts_with(&segments(prefix))
            }
            What::Tag(tag) => tags(key, version).contains(tag),
        }
    }
}

#[derive(Clone, Debug)]
pub struct Purge {
    pub what: What,
    pub mode: PurgeMode,
    pub invoked: Time,
    pub answered: Option<Time>,
}

/// One answer to a client.
#[derive(Clone, Copy, Debug)]
pub struct Answered {
    pub node: usize,
    pub key: Key,
    pub version: u64,
    pub arrived: Time,
    pub confirmed: Time,
    pub born: Time,
    /// It held a lease when the request arrived: G2 is promised too.
    pub leased: bool,
}

#[derive(Default)]
pub struct History {
    pub purges: Vec<Purge>,
    pub answers: u64,
    pub hits: u64,
    pub joined: u64,
    pub peer_copies: u64,
    pub confirmed: u64,
    pub violation: Option<String>,
    /// Digest of everything that was answered, for the test of determinism.
    pub digest: u64,
}

impl History {
    pub fn answer(&mut self, now: Time, answer: Answered) {
        self.answers += 1;
        for fact in [now, answer.arrived, answer.confirmed, answer.version] {
            self.digest = (self.digest ^ fact)
                .wrapping_mul(0x9E37_79B9_7F4A_7C15)
                .rotate_left(23);
        }
        for (number, purge) in self.purges.iter().enumerate() {
            let before = purge
                .answered
                .is_some_and(|answered| answered < answer.arrived);
            if !before || !purge.what.covers(answer.key, answer.version) {
                continue;
            }
            let stale = answer.confirmed < purge.invoked;
            let revived =
                purge.mode == PurgeMode::Hard && answer.leased && answer.born < purge.invoked;
            if (stale || revived) && self.violation.is_none() {
                let rule = if stale { "G1" } else { "G2" };
                let node = answer.node;
                self.violation = Some(format!(
                    "{rule} at {now}: node {node} gave {answer:?} after purge {number}, {purge:?}"
                ));
            }
        }
    }
}
