//! The head of one variant of one object: what a node must know to answer from
//! its slices. Values only, and their form on disk and wire.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use http::HeaderMap;
use pingora_slice_cluster::purge::Subject;
use pingora_slice_cluster::slice::{HashKey, slice_count};
use pingora_slice_cluster::wire::{Headers, Version};
use pingora_slice_cluster::{Generation, ObjectKey, PurgeIndex};
use serde::{Deserialize, Serialize};

use crate::fields;
use crate::url::Url;

/// First byte of an encoded [`Record`].
const RECORD_VERSION: u8 = 3;

const DOMAIN_GENERATION: u8 = 32;
const DOMAIN_VARIANT: u8 = 33;

/// What is stored under a manifest key.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Record {
    /// The object has one variant, or this is one of several.
    Manifest(Box<Manifest>),
    /// The object has several variants: look under [`Varies::choose`].
    Varies(Varies),
}

/// What the variants of an object are chosen by.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Varies {
    /// The full text behind the key.
    pub url: Url,
    /// Names of request fields, lower-case.
    pub by: Vec<String>,
}

impl Varies {
    /// The variant that a request with these fields selects, and the key under
    /// which it is stored.
    pub fn choose(
        &self,
        key: &HashKey,
        object: ObjectKey,
        request: &Headers,
    ) -> (u128, Vec<(String, String)>) {
        let variant = variant_of(&self.by, request);
        (variant_key(key, object, &variant), variant)
    }
}

/// See the module's text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// The full text behind the key: compared on a hit, so that a collision
    /// can never serve another object.
    pub url: Url,
    /// Status to answer with: 200, or what the origin said of the whole.
    pub status: u16,
    /// End-to-end fields as received, without Content-Length, Age, and the
    /// Content-Range of a 206.
    pub headers: Headers,
    /// The version of the bytes.
    pub generation: Generation,
    /// What pins a fill to that version.
    pub version: Version,
    /// The slice that came with the manifest; it lives with the manifest's
    /// owner, so that nobody asks the origin for it again.
    pub probe: u32,
    /// Purge index applied before the origin was asked (invariant 1).
    pub stamp: PurgeIndex,
    /// Names under which a purge covers it.
    pub subject: Subject,
    /// Request fields that select this variant, with their normalised values.
    pub variant: Vec<(String, String)>,
    /// The bytes that are held, where the origin chose which to give: what a
    /// request wants beyond them is asked for again, never put together.
    pub part: Option<(u64, u64)>,
    /// Freshness.
    pub freshness: Freshness,
}

/// What freshness needs (RFC 9111 section 4.2); times are Unix milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Freshness {
    /// When the response arrived.
    pub received_ms: u64,
    /// Corrected initial age, seconds (section 4.2.3).
    pub initial_age: u64,
    /// Freshness lifetime, seconds (section 4.2.1).
    pub lifetime: u64,
    /// Never used without validation (`no-cache`).
    pub no_cache: bool,
    /// Never used stale (`must-revalidate`, `proxy-revalidate`, `s-maxage`).
    pub must_revalidate: bool,
    /// `stale-while-revalidate`, seconds (RFC 5861).
    pub stale_while_revalidate: u64,
    /// `stale-if-error`, seconds (RFC 5861).
    pub stale_if_error: u64,
}

impl Freshness {
    /// Current age, seconds (section 4.2.3).
    pub fn age(&self, now_ms: u64) -> u64 {
        self.initial_age + now_ms.saturating_sub(self.received_ms) / 1000
    }

    /// Whether the response is fresh; a validation may still be needed.
    pub fn is_fresh(&self, now_ms: u64) -> bool {
        self.age(now_ms) < self.lifetime
    }

    /// How long it has been stale, seconds; 0 while fresh.
    pub fn staleness(&self, now_ms: u64) -> u64 {
        (self.age(now_ms) + 1).saturating_sub(self.lifetime)
    }
}

impl Manifest {
    /// Total length, once known.
    pub fn length(&self) -> Option<u64> {
        self.version.length
    }

    /// Where slice `index` is placed on the ring.
    pub fn place(&self, index: u32) -> u32 {
        if self.version.whole || index == self.probe {
            0
        } else {
            index
        }
    }

    /// Number of slices, once the length is known.
    pub fn slices(&self) -> Option<u64> {
        Some(slice_count(self.version.length?, self.version.slice_bytes))
    }

    /// Names of the request fields that the object varies by.
    pub fn varies_by(&self) -> Vec<String> {
        self.variant.iter().map(|(name, _)| name.clone()).collect()
    }

    /// Whether a request with these fields selects this variant.
    pub fn selects(&self, request: &Headers) -> bool {
        self.variant == variant_of(&self.varies_by(), request)
    }

    /// Value of the first field called `name`.
    pub fn header(&self, name: &str) -> Option<&str> {
        let (_, value) = self
            .headers
            .iter()
            .find(|(n, _)| n.eq_ignore_ascii_case(name))?;
        std::str::from_utf8(value).ok()
    }
}

/// A manifest in memory, with the floor version it was last checked at: a hit
/// after no new purge costs one comparison.
#[derive(Debug)]
pub struct Stored {
    /// The manifest.
    pub manifest: Manifest,
    checked: AtomicU64,
    wire: OnceLock<Option<Bytes>>,
}

impl Stored {
    /// A manifest that has not been checked yet.
    pub fn new(manifest: Manifest) -> Self {
        Stored {
            manifest,
            checked: AtomicU64::new(u64::MAX),
            wire: OnceLock::new(),
        }
    }

    /// The manifest's fields as a map. Made each time: kept, it would take as much
    /// memory as a small object.
    pub fn fields(&self) -> HeaderMap {
        to_map(&self.manifest.headers)
    }

    /// The manifest's fields as `write` puts them on the wire, written once: one
    /// run of bytes, where a map has several for each field. `None` where they
    /// cannot be written before it is known what is answered.
    pub fn on_the_wire(&self, write: impl FnOnce(HeaderMap) -> Option<Bytes>) -> Option<&Bytes> {
        let written = self.wire.get_or_init(|| write(self.fields()));
        written.as_ref()
    }

    /// Whether it passed the floors at `version`.
    pub fn passed_floors_at(&self, version: u64) -> bool {
        self.checked.load(Ordering::Relaxed) == version
    }

    /// It passed the floors at `version`, read before they were.
    pub fn note_floors_passed_at(&self, version: u64) {
        self.checked.store(version, Ordering::Relaxed);
    }
}

/// Form of a record on disk and wire: a version byte, then bincode.
pub fn encode(record: &Record) -> Vec<u8> {
    let mut bytes = vec![RECORD_VERSION];
    bincode::serde::encode_into_std_write(record, &mut bytes, bincode::config::standard())
        .expect("writing to a Vec cannot fail");
    bytes
}

/// Reads what [`encode`] wrote; `None` for another version or damage.
pub fn decode(bytes: &[u8]) -> Option<Record> {
    let (version, rest) = bytes.split_first()?;
    if *version != RECORD_VERSION {
        return None;
    }
    let config = bincode::config::standard().with_limit::<{ 4 * 1024 * 1024 }>();
    let (record, read) = bincode::serde::decode_from_slice(rest, config).ok()?;
    (read == rest.len()).then_some(record)
}

/// What tells one version of an object's bytes from every other.
#[derive(Clone, Copy, Debug)]
pub enum Identity {
    /// Its validators, which are strong: a confirmed or re-fetched object keeps
    /// its slices.
    Validators,
    /// Anything weaker is good for one fill only, which these set apart. The time
    /// would not: two nodes, or one without a lease, may begin two fills within a
    /// millisecond.
    OneFill {
        /// The purge index applied before it.
        stamp: PurgeIndex,
        /// A random number.
        chance: u64,
    },
}

/// The name of a version of the bytes.
pub fn generation(
    key: &HashKey,
    object: ObjectKey,
    version: &Version,
    identity: Identity,
) -> Generation {
    let fill = match identity {
        Identity::Validators => [0; 2],
        Identity::OneFill { stamp, chance } => [stamp.0, chance],
    };
    let etag = version.strong_etag();
    Generation(
        key.hash128(
            DOMAIN_GENERATION,
            &[
                &object.0.to_be_bytes(),
                etag.unwrap_or_default().as_bytes(),
                version
                    .last_modified
                    .as_deref()
                    .filter(|_| etag.is_none())
                    .unwrap_or_default()
                    .as_bytes(),
                &version.length.unwrap_or(u64::MAX).to_be_bytes(),
                &version.slice_bytes.to_be_bytes(),
                &version.hard.0.to_be_bytes(),
                &fill[0].to_be_bytes(),
                &fill[1].to_be_bytes(),
            ],
        ),
    )
}

/// The key under which the variant that `request` selects is stored.
pub fn variant_key(key: &HashKey, object: ObjectKey, variant: &[(String, String)]) -> u128 {
    if variant.is_empty() {
        return object.0;
    }
    let object = object.0.to_be_bytes();
    let mut parts: Vec<&[u8]> = vec![&object];
    for (name, value) in variant {
        parts.push(name.as_bytes());
        parts.push(value.as_bytes());
    }
    key.hash128(DOMAIN_VARIANT, &parts)
}

/// The request's values of the fields that an object varies by, normalised as
/// RFC 9111 section 4.1 allows: lines joined, white space around commas
/// dropped, lower-case where the field is case-insensitive, sorted where the
/// order says nothing.
pub fn variant_of(by: &[String], request: &Headers) -> Vec<(String, String)> {
    by.iter()
        .map(|name| {
            let values: Vec<String> = request
                .iter()
                .filter(|(n, _)| n.eq_ignore_ascii_case(name))
                .flat_map(|(_, v)| {
                    String::from_utf8_lossy(v)
                        .split(',')
                        .map(|part| part.split_ascii_whitespace().collect::<Vec<_>>().join(" "))
                        .filter(|part| !part.is_empty())
                        .collect::<Vec<_>>()
                })
                .collect();
            let mut values = values;
            if matches!(name.as_str(), "accept-encoding" | "accept-language") {
                // Weights tell what is preferred, not the order (RFC 9110
                // sections 12.5.3 and 12.5.4).
                values.iter_mut().for_each(|v| v.make_ascii_lowercase());
                values.sort();
            }
            (name.clone(), values.join(","))
        })
        .collect()
}

/// Header fields as a list, for manifests and frames.
pub fn to_headers(map: &HeaderMap) -> Headers {
    map.iter()
        .map(|(n, v)| (n.as_str().to_owned(), v.as_bytes().to_vec()))
        .collect()
}

/// Header fields as a map; what is not a valid field is left out.
pub fn to_map(headers: &Headers) -> HeaderMap {
    let fields = headers.iter();
    fields::map_of(fields.map(|(name, value)| (name.as_bytes(), value.as_slice())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_strong_validator_makes_two_fills_one_generation() {
        let version = Version {
            etag: None,
            last_modified: None,
            exact_date: false,
            length: Some(5),
            slice_bytes: 1024,
            whole: true,
            hard: PurgeIndex::default(),
        };
        let key = HashKey([7; 16]);
        let generation = |identity| generation(&key, ObjectKey(1), &version, identity);
        let one_fill = |chance| Identity::OneFill {
            stamp: PurgeIndex(3),
            chance,
        };
        assert_ne!(generation(one_fill(1)), generation(one_fill(2)));
        // The slices on disk are found under it.
        let named = format!("{:032x}", generation(Identity::Validators).0);
        assert_eq!(named, "1b702dc0fcfaeed3d99bc6c8907171fe");
    }
}
