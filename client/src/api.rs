//! The messages of the admin API (`/v1`), as both ends use them.
//!
//! | call | sends | answers |
//! | --- | --- | --- |
//! | `GET /v1/cluster` | | [`Cluster`] |
//! | `POST /v1/purge` | [`Purge`] | [`Purged`] |
//! | `GET /v1/purge/{request_id}` | | [`Progress`] |
//! | `POST /v1/nodes/{id}/drain` | | [`Done`] |
//! | `DELETE /v1/nodes/{id}` | | [`Done`] |
//! | `GET /v1/explain?url=` | | [`Explain`] |
//! | `POST /v1/warm` | [`Warm`] | [`Warmed`] |
//!
//! Every call needs `Authorization: Bearer TOKEN`. Anything but 200 carries a
//! [`Failure`]. What is read is never refused for a field that it does not
//! know, and new fields have defaults, so a client and a node of different
//! versions understand each other; only requests are strict, because a purge
//! with a misspelt field must not be half obeyed.

use serde::{Deserialize, Serialize};

/// Most URLs, prefixes, tags and hosts in one purge: one entry of the log.
pub const PURGE_ITEMS_MAX: usize = 1_000;
/// Most URLs in one warm request.
pub const WARM_URLS_MAX: usize = 1_000;
/// Longest request body, bytes: a thousand URLs of 2 KiB, and room for quotes.
pub const REQUEST_BYTES_MAX: usize = 4 * 1024 * 1024;
/// The header that says what a PURGE waits for: `all` or `quorum`.
pub const PURGE_WAIT_HEADER: &str = "Purge-Wait";
/// The header with a purge's own number. A 503 answer has it; sent back with
/// the same request, the retry finds the first try's entry and waits for that.
pub const PURGE_ID_HEADER: &str = "X-Purge-Request-Id";

/// The cluster, as the node that was asked sees it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Cluster {
    /// The node that answers; 1 where it runs alone.
    pub node_id: u64,
    /// Its release.
    pub version: String,
    /// The leader, where one is known.
    pub leader: Option<u64>,
    /// Raft term.
    pub term: u64,
    /// Log index of the ring in use.
    pub ring_epoch: u64,
    /// Highest applied log index.
    pub purge_index: u64,
    /// Whether it may answer from its cache now.
    pub lease_valid: bool,
    /// All members, by number.
    pub nodes: Vec<Node>,
    /// The last purges asked for at this node, newest first.
    pub recent_purges: Vec<RecentPurge>,
    /// While it knows no cluster: whom it greeted last, and what came of it.
    pub unanswered: Vec<Seed>,
}

/// A node that is looked for.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Seed {
    /// `host:port` of its slice endpoint (UDP).
    pub address: String,
    /// Why it has not led to a cluster.
    pub why: String,
}

/// One member.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Node {
    /// Its number.
    pub id: u64,
    /// `host:port` of its slice endpoint (UDP).
    pub advertise: String,
    /// `voter` or `edge`.
    pub role: String,
    /// Share of the ring relative to the others, as configured.
    pub weight: u32,
    /// `active` or `draining`.
    pub state: String,
    /// Reached within the last few seconds.
    pub up: bool,
    /// Leads, as far as the answering node knows.
    pub leader: bool,
    /// Highest log index that it is known to have applied, where known.
    pub applied: Option<u64>,
    /// Share of the ring, 0 to 1.
    pub ring_share: f64,
}

/// How thoroughly to forget.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Unusable until the origin has confirmed or replaced it.
    #[default]
    Plain,
    /// Stale: everyone will revalidate.
    Soft,
    /// Plain, and the stored bytes are never used again.
    Hard,
}

/// What a purge waits for before it is answered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Wait {
    /// Every node has applied it, or cannot answer from cache: the promise.
    #[default]
    All,
    /// A majority has it on disk. Promises less: nodes in [`Purged::pending`]
    /// may answer with older bytes until they have applied it or their lease ends.
    Quorum,
}

/// What to forget. At least one thing, at most [`PURGE_ITEMS_MAX`]; all of it
/// is one entry of the log, so it happens at once.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Purge {
    /// `http://host/path?query` or `host/path?query`: the URL, all variants.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub urls: Vec<String>,
    /// `http://host/path` or `host/path`: the path and everything under it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub prefixes: Vec<String>,
    /// Everything that carries one of these tags, on any host.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tags: Vec<String>,
    /// Everything of these hosts.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub hosts: Vec<String>,
    /// Everything.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub all: bool,
    /// How thoroughly.
    pub mode: Mode,
    /// What is waited for.
    pub wait: Wait,
    /// The number of an earlier try of the same request, from its 503 answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub request_id: Option<String>,
}

impl Purge {
    /// Number of things to forget.
    pub fn count(&self) -> usize {
        self.urls.len()
            + self.prefixes.len()
            + self.tags.len()
            + self.hosts.len()
            + usize::from(self.all)
    }
}

/// The answer to a purge: by PURGE on a client listener, or by this API.
///
/// With `success`, no request that arrives from now on, at any node but those in
/// `pending`, gets bytes older than the purge. Without it nothing is promised.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Purged {
    /// Whether the promise holds.
    pub success: bool,
    /// Things committed to be forgotten: 1 for a URL. It does not say how many
    /// objects were stored, which no node can know.
    pub purged_count: usize,
    /// The URL, prefix or host that was named, as `http://host/path`; null for
    /// everything, for tags, and for several things at once.
    pub url: Option<String>,
    /// For a person: what happened, or why not.
    pub message: String,
    /// Position in the log; 0 when nothing was committed.
    pub index: u64,
    /// Nodes that have applied it.
    pub acked: Vec<u64>,
    /// Nodes that cannot answer from cache until they have.
    pub fenced: Vec<u64>,
    /// Nodes that may answer with older bytes for a while yet: none, but for
    /// [`Wait::Quorum`].
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub pending: Vec<u64>,
    /// How long it took, milliseconds.
    pub took_ms: u64,
    /// The request's own number, for a retry ([`PURGE_ID_HEADER`]); empty
    /// where the request was refused before it got one.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub request_id: String,
}

/// How far a committed purge has come, as the leader sees it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Progress {
    /// Position in the log.
    pub index: u64,
    /// Nodes that have applied it.
    pub acked: Vec<u64>,
    /// Nodes that cannot answer from cache until they have.
    pub fenced: Vec<u64>,
    /// Nodes that it waits for.
    pub waiting: Vec<u64>,
}

/// A purge that was asked for at the answering node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct RecentPurge {
    /// When it was answered, seconds since 1970.
    pub at_s: u64,
    /// What was named, in a few words.
    pub what: String,
    /// How thoroughly.
    pub mode: Mode,
    /// How long it took, milliseconds.
    pub took_ms: u64,
    /// Position in the log; 0 when nothing was promised.
    pub index: u64,
    /// Nodes that had applied it.
    pub acked: Vec<u64>,
    /// Nodes that could not answer from cache until they had.
    pub fenced: Vec<u64>,
    /// Nodes that had not when a majority was enough.
    pub pending: Vec<u64>,
    /// Why nothing was promised.
    pub refused: Option<String>,
}

/// The change is committed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Done {
    /// Always true.
    pub success: bool,
    /// For a person.
    pub message: String,
}

/// Where a URL's bytes are, and what a request for it would get now.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Explain {
    /// The URL, normalised: `host/path?query`.
    pub url: String,
    /// The node that answers.
    pub node_id: u64,
    /// The object key, hex.
    pub key: String,
    /// What a plain GET would be now: `hit`, `stale`, `revalidate`, `miss` or `pass`.
    pub verdict: String,
    /// Why, in a sentence.
    pub reason: String,
    /// Whether it is fetched in slices (`slice_patterns`).
    pub sliced: bool,
    /// The nodes that own the manifest, first choice first.
    pub owners: Vec<u64>,
    /// The manifest this node knows, where it knows one.
    pub manifest: Option<Manifest>,
    /// The purges that cover the URL.
    pub floor: Floor,
    /// Slices of the generation, the first few; `manifest.slices` has the number.
    pub slices: Vec<Slice>,
}

/// See [`Explain::manifest`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Manifest {
    /// Where it is kept: `l1`, `l2`.
    pub stored_in: String,
    /// Status of the stored response.
    pub status: u16,
    /// The version of the bytes, hex.
    pub generation: String,
    /// Total length, bytes, once known.
    pub length: Option<u64>,
    /// Slice size of this generation, bytes.
    pub slice_bytes: u32,
    /// Number of slices, once the length is known.
    pub slices: Option<u64>,
    /// Purge index known before the origin was asked.
    pub stamp: u64,
    /// Seconds since the origin made or confirmed it.
    pub age_s: u64,
    /// Seconds it remains fresh; negative once stale.
    pub fresh_for_s: i64,
    /// Its ETag.
    pub etag: Option<String>,
    /// Its Last-Modified.
    pub last_modified: Option<String>,
    /// Request fields that it varies by.
    pub vary: Vec<String>,
    /// Its tags.
    pub tags: Vec<String>,
}

/// The highest purges that cover a URL, by mode; 0: none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Floor {
    /// Plain or hard.
    pub plain: u64,
    /// Of any mode.
    pub soft: u64,
    /// Hard.
    pub hard: u64,
}

/// One slice of an [`Explain`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Slice {
    /// Position in the object.
    pub index: u32,
    /// Its owners, first choice first.
    pub owners: Vec<u64>,
    /// Where the answering node holds it: `l1`, `l2`; absent where it does not.
    pub stored_in: Option<String>,
}

/// What to fetch before anybody asks.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Warm {
    /// `http://host/path?query` or `host/path?query`, at most [`WARM_URLS_MAX`].
    pub urls: Vec<String>,
}

/// What became of each.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Warmed {
    /// In the order of the request.
    pub urls: Vec<WarmedUrl>,
}

/// One URL of a [`Warmed`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct WarmedUrl {
    /// As it was given.
    pub url: String,
    /// Whether the whole object is in the cache now.
    pub success: bool,
    /// Its length, bytes.
    pub bytes: u64,
    /// For a person: `hit`, `fetched`, or why not.
    pub message: String,
}

/// Why a call was refused.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Failure {
    /// For a person.
    pub error: String,
    /// A refused purge's own number, for a retry.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub request_id: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_of_another_version_are_understood() {
        let older: Purged = serde_json::from_str(r#"{"success":true,"index":7}"#).unwrap();
        assert!(older.success && older.index == 7 && older.acked.is_empty());
        let newer: Cluster = serde_json::from_str(r#"{"node_id":3,"moon":"full"}"#).unwrap();
        assert_eq!(newer.node_id, 3);
    }

    #[test]
    fn a_misspelt_purge_is_refused() {
        assert!(serde_json::from_str::<Purge>(r#"{"urls":["a/b"],"al":true}"#).is_err());
        let purge: Purge = serde_json::from_str(r#"{"tags":["a","b"],"mode":"hard"}"#).unwrap();
        assert_eq!((purge.count(), purge.mode), (2, Mode::Hard));
    }
}
