//! Decides which manifests a purge has made unusable.
//!
//! Purging deletes nothing. It raises floors that each hit consults, so it
//! costs the same for one slice or a million. Dead bytes leave by eviction.
//! Not here: how purges reach this node (`raft`), who may send them (the daemon's `admin`).

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use serde::{Deserialize, Serialize};

use crate::slice::HashKey;

/// Entries of all exact tables together, whatever their modes. A million rows
/// of 17 bytes in tables that are at least 7/16 full: 39 MB. Beyond it the
/// oldest quarter folds (rule 18). Every node must fold at the same entry of the
/// log, so it is no option of one node.
pub const ENTRIES_MAX: usize = 1_000_000;
/// Entries left after a fold.
const ENTRIES_AFTER_FOLD: usize = ENTRIES_MAX / 4 * 3;
const _: () = assert!(ENTRIES_AFTER_FOLD < ENTRIES_MAX && ENTRIES_AFTER_FOLD > 0);
/// Path prefixes under which one URL can be purged, the host's root included.
/// A prefix with more segments purges its ancestor of this depth instead.
pub const PREFIXES_MAX: usize = 32;

// Domains of the keyed hash; 1 is the object's own (`slice`), 6 and 7 the ring's,
// 8 the cluster's (`state`).
const DOMAIN_HOST: u8 = 2;
const DOMAIN_URL: u8 = 3;
const DOMAIN_PREFIX: u8 = 4;
const DOMAIN_TAG: u8 = 5;

/// Position of a purge in the log; the stamps of manifests are such positions.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize,
)]
pub struct PurgeIndex(pub u64);

impl std::fmt::Display for PurgeIndex {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// What a purge does to the manifests it covers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PurgeMode {
    /// Unusable until the origin has confirmed or replaced them.
    #[default]
    Plain,
    /// Stale: everyone will revalidate, stale-while-revalidate and
    /// stale-if-error still apply.
    Soft,
    /// Plain, and the generation is never used again even if the origin confirms it.
    Hard,
}

/// Which manifests a purge covers; names are hashed with the cluster's key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Scope {
    /// Everything.
    All,
    /// One host.
    Host(u64),
    /// One URL (host, path and query), all variants.
    Url(u64),
    /// A path and everything under it, on one host.
    Prefix(u64),
    /// Everything that carries a tag, on any host.
    Tag(u64),
}

impl Scope {
    /// One host (normalised), all of it.
    pub fn host(key: &HashKey, host: &str) -> Scope {
        Scope::Host(host_hash(key, host))
    }

    /// One URL: normalised host, raw path and query as in the object's key.
    pub fn url(key: &HashKey, host: &str, target: &str) -> Scope {
        Scope::Url(url_hash(key, host, target))
    }

    /// A path and everything under it, by path segment: `/a/b` and `/a/b/` both
    /// cover `/a/b`, `/a/b/` and `/a/b/c`, but not `/a/bc`; `/` covers the host.
    /// A query in `path` is ignored.
    pub fn prefix(key: &HashKey, host: &str, path: &str) -> Scope {
        let path = path_of(path).trim_end_matches('/');
        let deepest = prefixes(path).last().unwrap_or_default();
        Scope::Prefix(prefix_hash(key, host, deepest))
    }

    /// Everything that carries `tag`.
    pub fn tag(key: &HashKey, tag: &str) -> Scope {
        Scope::Tag(tag_hash(key, tag))
    }
}

/// One thing to forget.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PurgeItem {
    /// What it covers.
    pub scope: Scope,
    /// What it does.
    pub mode: PurgeMode,
}

/// The hashed names under which one manifest can be purged.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Subject {
    /// Its host.
    pub host: u64,
    /// Its URL.
    pub url: u64,
    /// Every path prefix of its URL, per path segment.
    pub prefixes: Vec<u64>,
    /// Its tags.
    pub tags: Vec<u64>,
}

impl Subject {
    /// The names of the object at `host` (normalised) and `target` (raw path and
    /// query) that carries `tags`. Every tag counts: whoever stores manifests bounds them.
    pub fn new(key: &HashKey, host: &str, target: &str, tags: &[impl AsRef<str>]) -> Subject {
        Subject {
            host: host_hash(key, host),
            url: url_hash(key, host, target),
            prefixes: prefixes(path_of(target))
                .map(|p| prefix_hash(key, host, p))
                .collect(),
            tags: tags.iter().map(|tag| tag_hash(key, tag.as_ref())).collect(),
        }
    }

    /// Adds the tags of `other`: bytes keep the names that they came under.
    pub fn keep_tags_of(&mut self, other: &Subject) {
        self.tags.extend(&other.tags);
        self.tags.sort_unstable();
        self.tags.dedup();
    }
}

impl From<Scope> for Subject {
    /// What a purge of `scope` covers, and no other does but for everything.
    fn from(scope: Scope) -> Subject {
        let mut subject = Subject {
            host: 0,
            url: 0,
            prefixes: Vec::new(),
            tags: Vec::new(),
        };
        match scope {
            Scope::All => {}
            Scope::Host(name) => subject.host = name,
            Scope::Url(name) => subject.url = name,
            Scope::Prefix(name) => subject.prefixes.push(name),
            Scope::Tag(name) => subject.tags.push(name),
        }
        subject
    }
}

/// The highest purges that cover one subject, by mode. A manifest with stamp
/// `s` is usable iff `s >= plain`, stale if `s < soft`; its generation may be
/// confirmed by the origin only if `s >= hard`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Floor {
    /// Highest plain or hard purge.
    pub plain: PurgeIndex,
    /// Highest purge of any mode.
    pub soft: PurgeIndex,
    /// Highest hard purge.
    pub hard: PurgeIndex,
}

impl Floor {
    /// Whether a manifest with this stamp may be used at all (rule 3).
    pub fn allows(&self, stamp: PurgeIndex) -> bool {
        stamp >= self.plain
    }
}

/// Whether a request that finds `floor` may join a flight whose origin request
/// left at `flight_stamp` (rule 6). To be asked again at its headers, with a
/// floor that knows their tags. Whoever started the flight is always served.
/// Joining is answering from cache: it needs a lease, read before `floor`.
pub fn joinable(flight_stamp: PurgeIndex, floor: Floor) -> bool {
    // `soft` is the highest of all modes: a result stale at birth helps nobody.
    flight_stamp >= floor.soft
}

/// Every purge of the log, as the floors it raised. Floors only rise.
///
/// A floor may be higher than the purges that a subject has seen: hashes may
/// collide and old entries fold into the floor of everything. That costs a
/// revalidation (for a hard purge, a refill), never a stale answer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Tables")]
pub struct Floors {
    plain: Table,
    soft: Table,
    hard: Table,
    /// The highest hard purge of any tag or of everything: follows from `hard`,
    /// and is kept since finding it takes a walk through all tags.
    #[serde(skip)]
    any_tag: PurgeIndex,
}

/// [`Floors`] as they are stored and sent.
#[derive(Deserialize)]
struct Tables {
    plain: Table,
    soft: Table,
    hard: Table,
}

impl From<Tables> for Floors {
    fn from(Tables { plain, soft, hard }: Tables) -> Floors {
        let any_tag = hard.tags.values().copied().fold(hard.all, PurgeIndex::max);
        Floors {
            plain,
            soft,
            hard,
            any_tag,
        }
    }
}

impl Floors {
    /// Purges `scope` at log position `index`.
    pub fn raise(&mut self, scope: Scope, mode: PurgeMode, index: PurgeIndex) {
        let table = match mode {
            PurgeMode::Plain => &mut self.plain,
            PurgeMode::Soft => &mut self.soft,
            PurgeMode::Hard => &mut self.hard,
        };
        table.raise(scope, index);
        if let (Scope::Tag(_) | Scope::All, PurgeMode::Hard) = (scope, mode) {
            self.any_tag = index.max(self.any_tag);
        }
        self.bound();
    }

    /// The highest purges that cover `subject`.
    pub fn floor(&self, subject: &Subject) -> Floor {
        let hard = self.hard.highest(subject);
        let plain = self.plain.highest(subject).max(hard);
        let soft = self.soft.highest(subject).max(plain);
        Floor { plain, soft, hard }
    }

    /// The hard purge that a generation of `subject` begun now is named after.
    /// Any of a tag counts: the generation before may have carried that tag, and
    /// its slices must not be met again (G2).
    pub fn hard_for_new(&self, subject: &Subject) -> PurgeIndex {
        self.hard.highest(subject).max(self.any_tag)
    }

    /// Folds every purge up to `seq` into the floors of everything (rule 18).
    pub fn fold(&mut self, seq: PurgeIndex) {
        for table in self.tables() {
            table.fold(seq);
        }
        self.any_tag = self.any_tag.max(self.hard.all);
    }

    /// Takes the higher of both everywhere (rule 8).
    pub fn rise_to(&mut self, other: Floors) {
        self.any_tag = self.any_tag.max(other.any_tag);
        for (ours, theirs) in self
            .tables()
            .into_iter()
            .zip([other.plain, other.soft, other.hard])
        {
            ours.rise_to(theirs);
        }
        self.bound();
    }

    /// Exact entries held at present, of all modes.
    pub fn entries(&self) -> usize {
        [&self.plain, &self.soft, &self.hard]
            .into_iter()
            .map(Table::entries)
            .sum()
    }

    /// Folds the oldest entries once there are too many. Depends on the
    /// entries alone, not on their order in memory: the same on every node.
    fn bound(&mut self) {
        let entries = self.entries();
        if entries > ENTRIES_MAX {
            let mut indices = Vec::with_capacity(entries);
            for table in self.tables() {
                indices.extend(table.maps().into_iter().flat_map(|map| map.values()));
            }
            let oldest = entries - ENTRIES_AFTER_FOLD;
            let (_, newest_folded, _) = indices.select_nth_unstable(oldest - 1);
            let seq = *newest_folded;
            self.fold(seq);
        }
    }

    fn tables(&mut self) -> [&mut Table; 3] {
        [&mut self.plain, &mut self.soft, &mut self.hard]
    }
}

/// Name to highest purge. Names are keyed hashes already.
type Map = HashMap<u64, PurgeIndex, BuildHasherDefault<AsIs>>;

/// The floors of one mode. No entry is at or below `all`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Table {
    all: PurgeIndex,
    hosts: Map,
    urls: Map,
    prefixes: Map,
    tags: Map,
}

impl Table {
    fn raise(&mut self, scope: Scope, index: PurgeIndex) {
        let (map, name) = match scope {
            Scope::All => return self.fold_at(index),
            Scope::Host(name) => (&mut self.hosts, name),
            Scope::Url(name) => (&mut self.urls, name),
            Scope::Prefix(name) => (&mut self.prefixes, name),
            Scope::Tag(name) => (&mut self.tags, name),
        };
        if index > self.all {
            let floor = map.entry(name).or_default();
            *floor = index.max(*floor);
        }
    }

    fn highest(&self, subject: &Subject) -> PurgeIndex {
        let named = [
            (&self.hosts, std::slice::from_ref(&subject.host)),
            (&self.urls, std::slice::from_ref(&subject.url)),
            (&self.prefixes, &subject.prefixes[..]),
            (&self.tags, &subject.tags[..]),
        ];
        let mut highest = self.all;
        for (map, names) in named {
            // Most tables of most clusters are empty.
            if !map.is_empty() {
                let floors = names.iter().filter_map(|name| map.get(name));
                highest = floors.fold(highest, |highest, floor| highest.max(*floor));
            }
        }
        highest
    }

    /// Folds entries up to `seq` into the highest of them.
    fn fold(&mut self, seq: PurgeIndex) {
        let folded = self
            .maps()
            .iter()
            .flat_map(|map| map.values())
            .filter(|i| **i <= seq)
            .max();
        if let Some(&highest) = folded {
            self.fold_at(highest);
        }
    }

    /// Raises the floor of everything and drops the entries it makes needless.
    fn fold_at(&mut self, index: PurgeIndex) {
        self.all = self.all.max(index);
        let all = self.all;
        for map in self.maps_mut() {
            map.retain(|_, floor| *floor > all);
            // What one kind of purge no longer needs, another may.
            if map.capacity() / 4 > map.len() {
                map.shrink_to_fit();
            }
        }
    }

    fn rise_to(&mut self, other: Table) {
        self.fold_at(other.all);
        let all = self.all;
        let theirs = [other.hosts, other.urls, other.prefixes, other.tags];
        for (ours, theirs) in self.maps_mut().into_iter().zip(theirs) {
            for (name, index) in theirs.into_iter().filter(|(_, index)| *index > all) {
                let floor = ours.entry(name).or_default();
                *floor = index.max(*floor);
            }
        }
    }

    fn entries(&self) -> usize {
        self.maps().iter().map(|map| map.len()).sum()
    }

    fn maps(&self) -> [&Map; 4] {
        [&self.hosts, &self.urls, &self.prefixes, &self.tags]
    }

    fn maps_mut(&mut self) -> [&mut Map; 4] {
        [
            &mut self.hosts,
            &mut self.urls,
            &mut self.prefixes,
            &mut self.tags,
        ]
    }
}

/// A hasher for keys that are hashes already.
#[derive(Clone, Copy, Debug, Default)]
struct AsIs(u64);

impl Hasher for AsIs {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(*byte);
        }
    }

    fn write_u64(&mut self, hash: u64) {
        self.0 = hash;
    }
}

fn host_hash(key: &HashKey, host: &str) -> u64 {
    key.hash64(DOMAIN_HOST, &[host.as_bytes()])
}

fn url_hash(key: &HashKey, host: &str, target: &str) -> u64 {
    key.hash64(DOMAIN_URL, &[host.as_bytes(), target.as_bytes()])
}

fn prefix_hash(key: &HashKey, host: &str, prefix: &str) -> u64 {
    key.hash64(DOMAIN_PREFIX, &[host.as_bytes(), prefix.as_bytes()])
}

fn tag_hash(key: &HashKey, tag: &str) -> u64 {
    key.hash64(DOMAIN_TAG, &[tag.as_bytes()])
}

/// A target without its query.
fn path_of(target: &str) -> &str {
    target.split(['?', '#']).next().unwrap_or_default()
}

/// Every prefix of a path that ends where a segment does, shortest first and
/// without its final slash: `/a/b` gives ``, `/a`, `/a/b`. At most [`PREFIXES_MAX`].
fn prefixes(path: &str) -> impl Iterator<Item = &str> {
    let inner = path
        .match_indices('/')
        .map(|(at, _)| at)
        .filter(|at| *at > 0);
    let whole = Some(path.len()).filter(|at| *at > 0 && !path.ends_with('/'));
    std::iter::once(0)
        .chain(inner)
        .chain(whole)
        .take(PREFIXES_MAX)
        .map(|at| &path[..at])
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const KEY: HashKey = HashKey([1; 16]);

    fn covers(prefix: &str, target: &str) -> bool {
        let mut floors = Floors::default();
        floors.raise(
            Scope::prefix(&KEY, "h", prefix),
            PurgeMode::Plain,
            PurgeIndex(1),
        );
        floors
            .floor(&Subject::new(&KEY, "h", target, &[""; 0]))
            .plain
            == PurgeIndex(1)
    }

    #[test]
    fn a_prefix_ends_where_a_segment_does() {
        for prefix in ["/a/b", "/a/b/", "/a/b//", "/a/b?x=/c"] {
            for target in [
                "/a/b",
                "/a/b/",
                "/a/b/c",
                "/a/b?q=1",
                "/a/b/c/d?q=/",
                "/a/b//c",
            ] {
                assert!(covers(prefix, target), "{prefix} covers {target}");
            }
            for target in ["/", "/a", "/a/", "/a/bc", "/b/a/b", "/a?p=/a/b", "/A/b"] {
                assert!(!covers(prefix, target), "{prefix} spares {target}");
            }
        }
        for target in ["/", "/a", "/a/b?c", "", "*"] {
            assert!(
                covers("/", target) && covers("", target),
                "the host's root covers {target}"
            );
        }
    }

    #[test]
    fn a_prefix_deeper_than_the_limit_purges_its_ancestor() {
        let deep = "/d".repeat(PREFIXES_MAX + 20);
        assert!(covers(&deep, &deep) && covers(&deep, &format!("{deep}/e")));
        assert!(!covers(&deep, "/d/d/d"));
        let subject = Subject::new(&KEY, "h", &deep, &[""; 0]);
        assert_eq!(subject.prefixes.len(), PREFIXES_MAX);
    }

    #[test]
    fn scopes_do_not_meet() {
        let subject = Subject::new(&KEY, "/a", "/a", &["/a"]);
        let mut names = vec![subject.host, subject.url];
        names.extend(subject.prefixes.iter().chain(&subject.tags));
        names.push(KEY.object("/a", "/a").0 as u64);
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), 6);
    }

    #[test]
    fn modes_reach_as_far_as_they_should() {
        let subject = Subject::new(&KEY, "h", "/a", &["t"]);
        let mut floors = Floors::default();
        floors.raise(Scope::url(&KEY, "h", "/a"), PurgeMode::Hard, PurgeIndex(3));
        floors.raise(Scope::tag(&KEY, "t"), PurgeMode::Plain, PurgeIndex(5));
        floors.raise(Scope::host(&KEY, "h"), PurgeMode::Soft, PurgeIndex(7));
        let floor = floors.floor(&subject);
        assert_eq!(
            [floor.hard, floor.plain, floor.soft],
            [3, 5, 7].map(PurgeIndex)
        );
        assert!(floor.allows(PurgeIndex(5)) && !floor.allows(PurgeIndex(4)));
        assert!(joinable(PurgeIndex(7), floor) && !joinable(PurgeIndex(6), floor));
    }

    #[test]
    fn a_full_table_folds_its_oldest_entries() {
        let mut floors = Floors::default();
        let url = |n: u64| Scope::Url(n.wrapping_mul(0x9E37_79B9_7F4A_7C15));
        floors.raise(Scope::All, PurgeMode::Hard, PurgeIndex(1));
        for n in 2..=ENTRIES_MAX as u64 + 2 {
            floors.raise(url(n), PurgeMode::Plain, PurgeIndex(n));
        }
        assert_eq!(floors.entries(), ENTRIES_AFTER_FOLD);
        let newest_folded = (ENTRIES_MAX - ENTRIES_AFTER_FOLD) as u64 + 2;
        let anything = Subject {
            host: 0,
            url: 0,
            prefixes: vec![],
            tags: vec![],
        };
        let floor = floors.floor(&anything);
        assert_eq!(
            (floor.plain, floor.hard),
            (PurgeIndex(newest_folded), PurgeIndex(1))
        );
        // 17 bytes a bucket; the map grows in powers of two, filled to 7/8.
        let buckets = (floors.plain.urls.capacity() * 8 / 7).next_power_of_two();
        assert!(buckets * 17 <= 40_000_000, "{buckets} buckets");
    }

    /// The bound is on all modes and kinds together, and on their memory.
    #[test]
    fn purges_of_all_kinds_share_one_bound() {
        let mut floors = Floors::default();
        let name = |n: u64| n.wrapping_mul(0x9E37_79B9_7F4A_7C15);
        let modes = [PurgeMode::Plain, PurgeMode::Soft, PurgeMode::Hard];
        // One kind after the other: each makes room for the next.
        for n in 1..=5 * (ENTRIES_MAX as u64 / 2) {
            let scope = match n * 2 / ENTRIES_MAX as u64 {
                0 => Scope::Url(name(n)),
                1 => Scope::Tag(name(n)),
                2 => Scope::Prefix(name(n)),
                _ => Scope::Host(name(n)),
            };
            floors.raise(scope, modes[n as usize % 3], PurgeIndex(n));
            assert!(floors.entries() <= ENTRIES_MAX);
        }
        let buckets = |map: &Map| match map.capacity() {
            0 => 0,
            some => (some * 8 / 7).next_power_of_two(),
        };
        let tables = floors.tables();
        let all: usize = tables.iter().flat_map(|t| t.maps()).map(buckets).sum();
        // Before it shrinks, a table may be a quarter full.
        assert!(all * 17 <= 80_000_000, "{all} buckets");
    }

    #[test]
    fn purging_everything_empties_the_tables() {
        let mut floors = Floors::default();
        for n in 1..100 {
            floors.raise(Scope::Url(n), PurgeMode::Plain, PurgeIndex(n));
        }
        floors.raise(Scope::All, PurgeMode::Plain, PurgeIndex(100));
        floors.raise(Scope::Url(1), PurgeMode::Plain, PurgeIndex(99));
        assert_eq!(floors.entries(), 0);
        assert_eq!(floors.plain.urls.capacity(), 0);
    }

    /// A purge in words: host, then URL, prefix or tag, or nothing for all of the host.
    #[derive(Clone, Debug)]
    enum Named {
        All,
        Host(String),
        Url(String, String),
        Prefix(String, String),
        Tag(String),
    }

    impl Named {
        fn scope(&self) -> Scope {
            match self {
                Named::All => Scope::All,
                Named::Host(host) => Scope::host(&KEY, host),
                Named::Url(host, target) => Scope::url(&KEY, host, target),
                Named::Prefix(host, path) => Scope::prefix(&KEY, host, path),
                Named::Tag(tag) => Scope::tag(&KEY, tag),
            }
        }

        fn covers(&self, host: &str, target: &str, tags: &[String]) -> bool {
            match self {
                Named::All => true,
                Named::Host(h) => h == host,
                Named::Url(h, t) => h == host && t == target,
                Named::Prefix(h, prefix) => {
                    let path = target.split('?').next().unwrap_or_default();
                    let prefix = prefix.split('?').next().unwrap_or_default();
                    let under = format!("{}/", prefix.trim_end_matches('/'));
                    h == host && format!("{path}/").starts_with(&under)
                }
                Named::Tag(tag) => tags.contains(tag),
            }
        }
    }

    fn named() -> impl Strategy<Value = Named> {
        let (host, path) = ("[gh]", "(/[ab]{0,2}){1,4}(\\?[/a])?");
        prop_oneof![
            1 => Just(Named::All),
            2 => host.prop_map(Named::Host),
            8 => (host, path).prop_map(|(h, p)| Named::Url(h, p)),
            8 => (host, path).prop_map(|(h, p)| Named::Prefix(h, p)),
            4 => "[st]".prop_map(Named::Tag),
        ]
    }

    fn mode() -> impl Strategy<Value = PurgeMode> {
        prop_oneof![
            Just(PurgeMode::Plain),
            Just(PurgeMode::Soft),
            Just(PurgeMode::Hard)
        ]
    }

    fn raised(purges: &[(Named, PurgeMode)]) -> Floors {
        let mut floors = Floors::default();
        for ((named, mode), index) in purges.iter().zip(1..) {
            floors.raise(named.scope(), *mode, PurgeIndex(index));
        }
        floors
    }

    proptest! {
        #[test]
        fn floors_are_the_highest_covering_purges(
            purges in prop::collection::vec((named(), mode()), 0..40),
            fold in 0..40u64,
            (host, target) in ("[gh]", "(/[ab]{0,2}){1,4}(\\?[/a])?"),
            tags in prop::collection::vec("[stu]", 0..3),
        ) {
            let subject = Subject::new(&KEY, &host, &target, &tags);
            let mut floors = raised(&purges);
            let highest = |modes: &[PurgeMode]| {
                let hit = |(named, mode): &(Named, PurgeMode)| {
                    modes.contains(mode) && named.covers(&host, &target, &tags)
                };
                PurgeIndex(purges.iter().rposition(hit).map_or(0, |at| at as u64 + 1))
            };
            let all = [PurgeMode::Hard, PurgeMode::Plain, PurgeMode::Soft];
            let exact = Floor { hard: highest(&all[..1]), plain: highest(&all[..2]), soft: highest(&all) };
            prop_assert_eq!(floors.floor(&subject), exact);
            let hard_of_any_tag = |(named, mode): &(Named, PurgeMode)| {
                *mode == PurgeMode::Hard && matches!(named, Named::Tag(_))
            };
            let any_tag = purges.iter().rposition(hard_of_any_tag).map_or(0, |at| at as u64 + 1);
            prop_assert_eq!(floors.hard_for_new(&subject), exact.hard.max(PurgeIndex(any_tag)));

            // Folding never lowers a floor, and never raises one above what it folds.
            floors.fold(PurgeIndex(fold));
            let folded = floors.floor(&subject);
            for (after, before) in [
                (folded.hard, exact.hard), (folded.plain, exact.plain), (folded.soft, exact.soft),
            ] {
                prop_assert!(after >= before && (after == before || after.0 <= fold));
            }
            // What is derived is the same after a restart as without one.
            let config = bincode::config::standard();
            let bytes = bincode::serde::encode_to_vec(&floors, config).unwrap();
            let decoded: Floors = bincode::serde::decode_from_slice(&bytes, config).unwrap().0;
            prop_assert_eq!(decoded, floors);
        }

        #[test]
        fn a_snapshot_lowers_no_floor(
            purges in prop::collection::vec((named(), mode()), 0..30),
            cuts in (0..30usize, 0..30usize, 0..30u64),
            (host, target) in ("[gh]", "(/[ab]{0,2}){1,4}"),
        ) {
            let subject = Subject::new(&KEY, &host, &target, &["t"]);
            let mut ours = raised(&purges[..cuts.0.min(purges.len())]);
            let mut theirs = raised(&purges[..cuts.1.min(purges.len())]);
            theirs.fold(PurgeIndex(cuts.2));
            let (a, b) = (ours.floor(&subject), theirs.floor(&subject));
            ours.rise_to(theirs);
            let both = Floor {
                plain: a.plain.max(b.plain), soft: a.soft.max(b.soft), hard: a.hard.max(b.hard),
            };
            prop_assert_eq!(ours.floor(&subject), both);
        }
    }
}
