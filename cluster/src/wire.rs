//! What peers say to one another about manifests and slices: the frames of the
//! slice endpoint, and their limits. Pure: bytes in, values out.
//!
//! One bidirectional stream carries one exchange:
//!
//! ```text
//! asker:  [version u8][length u32][Ask]       then finishes its side
//! owner:  [version u8][length u32][Answer]    then, where the answer has a body,
//!         ([length u32][crc32c u32][bytes])*  parts, and
//!         [0 u32][0 u32]                      the end: a body without it is broken off
//! ```
//!
//! Integers are big-endian. `Ask` and `Answer` are bincode (standard
//! configuration), behind [`HEAD_BYTES_MAX`]. A frame of another version, too
//! long, or not decodable to its last byte is refused; nothing else happens.
//! Control traffic (Raft, leases) uses the same head frame on its own endpoint.

use bytes::Bytes;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::crc32c::crc32c;
use crate::{Generation, ObjectKey, PurgeIndex, SliceId};

/// Version of the frames; also in the ALPN, so that nodes that differ never connect.
pub const WIRE_VERSION: u8 = 4;
/// ALPN of the slice endpoint.
pub const ALPN_SLICES: &[u8] = b"pingora-slice/4";
/// ALPN of the control endpoint.
pub const ALPN_CONTROL: &[u8] = b"pingora-slice-control/4";

/// Longest `Ask` or `Answer`, bytes: a request head of 64 KiB (Pingora's own
/// limit), a manifest with as much again, and room to spare.
pub const HEAD_BYTES_MAX: usize = 256 * 1024;
/// Longest body part, bytes. Owners send 64 KiB; a part never exceeds a slice.
pub const PART_BYTES_MAX: usize = 1024 * 1024;
/// A head up to this many bytes is a small one: the usual kind.
pub const SMALL_BYTES_MAX: usize = 4 * 1024;
/// Bytes of memory that a decoded number can take for one on the wire: a `u128`.
const GROWTH_MAX: usize = 16;
/// What the largest control message may decode to.
const DECODED_BYTES_MAX: usize = 64 * 1024 * 1024;
/// Bytes before a head's payload: version and length.
pub const HEAD_PREFIX_BYTES: usize = 5;
/// Bytes before a part's payload: length and checksum.
pub const PART_PREFIX_BYTES: usize = 8;

/// Header fields in order, values as raw bytes.
pub type Headers = Vec<(String, Vec<u8>)>;

/// The request that a fill would send to the origin, as the client sent it,
/// without Range, conditions and hop-by-hop fields.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OriginRequest {
    /// Normalised host, part of the object key.
    pub host: String,
    /// Raw path and query.
    pub target: String,
    /// The fields to send on.
    pub headers: Headers,
}

/// Informational responses that came before an answer, with their fields (RFC
/// 9110 section 15.2).
pub type Informational = Vec<(u16, Headers)>;

/// What a peer asks for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Ask {
    /// "What is the current manifest of this object?" Fills if need be.
    Resolve(ResolveAsk),
    /// "Give me this part of that slice." Fills if need be.
    Slice(SliceAsk),
}

/// See [`Ask::Resolve`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResolveAsk {
    /// The object.
    pub key: ObjectKey,
    /// How to ask the origin for it.
    pub request: OriginRequest,
    /// The asker's floor for this object: an older answer is of no use to it.
    pub floor: PurgeIndex,
    /// The hard purge that a generation begun now is named after: an owner that does
    /// not know of it would give new bytes an old name.
    pub hard: PurgeIndex,
    /// First byte that the client wants, as far as it is known before the
    /// length is: the fill starts with the slice that holds it.
    pub first_byte: u64,
    /// Whether the object is to be fetched in slices (`slice_patterns`).
    pub sliced: bool,
    /// The client demands a validated answer (`no-cache` and its kin).
    pub revalidate: bool,
    /// A generation that the asker has seen to be gone at the origin.
    pub gone: Option<Generation>,
    /// Answer from what is stored, never ask the origin.
    pub stored_only: bool,
}

impl ResolveAsk {
    /// Asks a peer what it has, and for nothing more.
    pub fn what_is_stored(key: ObjectKey, request: OriginRequest) -> ResolveAsk {
        ResolveAsk {
            key,
            request,
            floor: PurgeIndex::default(),
            hard: PurgeIndex::default(),
            first_byte: 0,
            sliced: true,
            revalidate: false,
            gone: None,
            stored_only: true,
        }
    }
}

/// See [`Ask::Slice`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SliceAsk {
    /// The object that the slice belongs to.
    pub key: ObjectKey,
    /// The slice.
    pub slice: SliceId,
    /// First wanted byte, counted from the slice's start.
    pub start: u32,
    /// One past the last wanted byte; beyond the slice's end means up to its end.
    pub end: u32,
    /// How to ask the origin for it.
    pub request: OriginRequest,
    /// The version that the origin must confirm.
    pub version: Version,
    /// Where the slice is placed on the ring: whether the owner keeps it.
    pub place: u32,
    /// The manifest's stamp: the fill behind this answer must be no older.
    pub stamp: PurgeIndex,
    /// Answer from what is stored, never ask the origin.
    pub stored_only: bool,
}

/// What pins a fill to one version of an object.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Version {
    /// ETag as received, strong or weak.
    pub etag: Option<String>,
    /// Last-Modified as received.
    pub last_modified: Option<String>,
    /// Whether that date names these bytes and no others: it was a minute older
    /// than the answer that brought them (RFC 9110 section 8.8.2.2). The later
    /// Date of a 304 makes it no stronger.
    pub exact_date: bool,
    /// Total length in bytes; unknown while a whole body is still arriving.
    pub length: Option<u64>,
    /// Slice size of this generation.
    pub slice_bytes: u32,
    /// The origin gives this object only as a whole.
    pub whole: bool,
    /// The highest hard purge that covered the object when it was filled: part
    /// of the generation, so that a hard purge always begins a new one.
    pub hard: PurgeIndex,
}

impl Version {
    /// The entity tag, unless it is weak. One without quotes, which is none by
    /// RFC 9110 section 8.8.3, counts: the origin gives it and compares it.
    pub fn strong_etag(&self) -> Option<&str> {
        self.etag.as_deref().filter(|tag| !tag.starts_with("W/"))
    }

    /// Whether the validators tell these bytes from any other version's, so that one
    /// answer can be put together with the next.
    pub fn is_resumable(&self) -> bool {
        self.strong_etag().is_some() || self.exact_last_modified().is_some()
    }

    /// Last-Modified, where it names the bytes.
    pub fn exact_last_modified(&self) -> Option<&str> {
        self.last_modified.as_deref().filter(|_| self.exact_date)
    }

    /// The strong entity tag, where it is well-formed: only that ties the bytes
    /// of one fill to those of another.
    pub fn quoted_etag(&self) -> Option<&str> {
        self.etag.as_deref().filter(|tag| tag.starts_with('"'))
    }
}

/// How a resolve was answered; for `Cache-Status` and the counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Resolution {
    /// A fresh manifest was there.
    Hit,
    /// The origin was asked and gave a new one.
    Miss,
    /// The origin was asked and confirmed the stored one.
    Revalidated,
    /// A stale one is good enough for now (stale-while-revalidate, -if-error).
    Stale,
}

/// What a peer answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// To Resolve: the manifest, in the daemon's own encoding.
    Manifest {
        /// The encoded manifest.
        manifest: Vec<u8>,
        /// Where it came from.
        resolution: Resolution,
        /// It is not for this asker alone, who may keep it.
        kept: bool,
        /// This asker waited on another's fill.
        collapsed: bool,
        /// What the origin said before its answer to this asker.
        informational: Informational,
    },
    /// To Resolve: the origin's answer may not be shared; here it is, for this
    /// asker alone. A body follows.
    Relay {
        /// Status code.
        status: u16,
        /// End-to-end header fields.
        headers: Headers,
        /// What the origin said before it.
        informational: Informational,
    },
    /// To Resolve: the origin's answer may not be shared, or went to somebody
    /// else; ask the origin yourself.
    Uncacheable,
    /// To Slice: the bytes follow as a body.
    Slice {
        /// Length of the whole slice, bytes; unknown while it is the last one
        /// of a body of unknown length.
        slice_bytes: Option<u32>,
        /// Where the owner had it from.
        source: SliceOrigin,
    },
    /// To Slice: the object ends before this slice.
    PastEnd,
    /// To a `stored_only` request: not here.
    Missing,
    /// This node's log has not reached the asker's floor: ask elsewhere.
    Behind,
    /// To Slice: the origin has another version now.
    Changed,
    /// The origin could not be used; the status a client should see (502, 504).
    Failed {
        /// 502 or 504, or the origin's own: 5xx, and to Slice what it refused the
        /// asker with.
        status: u16,
    },
    /// This node cannot take the request now (overload, shutdown, no way to
    /// the origin): ask elsewhere.
    Busy,
}

/// Where an owner had a slice from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SliceOrigin {
    /// From its memory or disk.
    Stored,
    /// From a fill that was under way.
    Flight,
    /// From the origin, for this request.
    Origin,
}

/// A piece of a body with its checksum, taken when the bytes first arrived.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// The bytes.
    pub bytes: Bytes,
    /// Their CRC-32C.
    pub crc32c: u32,
}

impl Part {
    /// A part of bytes that have just arrived: computes the checksum.
    pub fn new(bytes: Bytes) -> Self {
        let crc32c = crc32c(&bytes);
        Part { bytes, crc32c }
    }

    /// Whether the bytes are still what they were.
    pub fn is_intact(&self) -> bool {
        crc32c(&self.bytes) == self.crc32c
    }

    /// The eight bytes that go before the part on the wire.
    pub fn prefix(&self) -> [u8; PART_PREFIX_BYTES] {
        let mut prefix = [0; PART_PREFIX_BYTES];
        prefix[..4].copy_from_slice(&(self.bytes.len() as u32).to_be_bytes());
        prefix[4..].copy_from_slice(&self.crc32c.to_be_bytes());
        prefix
    }
}

/// What ends a complete body.
pub const BODY_END: [u8; PART_PREFIX_BYTES] = [0; PART_PREFIX_BYTES];

/// Why a frame was refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum FrameError {
    /// Another version of the protocol.
    #[error("frame version {0}, this node speaks {WIRE_VERSION}")]
    Version(u8),
    /// Longer than its limit.
    #[error("frame of {length} bytes, the limit is {limit}")]
    TooLong {
        /// What the frame announced.
        length: usize,
        /// What is allowed.
        limit: usize,
    },
    /// Not a message, or followed by something else.
    #[error("frame does not decode: {0}")]
    Garbage(String),
}

/// Encodes a message with its prefix.
///
/// # Errors
/// [`FrameError::TooLong`] when it exceeds [`HEAD_BYTES_MAX`].
pub fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>, FrameError> {
    encode_within(message, HEAD_BYTES_MAX)
}

/// Encodes a message with its prefix, behind a limit of the caller's.
///
/// # Errors
/// [`FrameError::TooLong`] when it exceeds `limit`.
pub fn encode_within<T: Serialize>(message: &T, limit: usize) -> Result<Vec<u8>, FrameError> {
    let mut frame = vec![WIRE_VERSION, 0, 0, 0, 0];
    bincode::serde::encode_into_std_write(message, &mut frame, bincode::config::standard())
        .map_err(|e| FrameError::Garbage(e.to_string()))?;
    let length = frame.len() - HEAD_PREFIX_BYTES;
    if length > limit {
        return Err(FrameError::TooLong { length, limit });
    }
    frame[1..HEAD_PREFIX_BYTES].copy_from_slice(&(length as u32).to_be_bytes());
    Ok(frame)
}

/// Reads a head's prefix: the length of the payload that follows.
///
/// # Errors
/// Another version, or longer than `limit`.
pub fn decode_prefix(prefix: [u8; HEAD_PREFIX_BYTES], limit: usize) -> Result<usize, FrameError> {
    let [version, length @ ..] = prefix;
    if version != WIRE_VERSION {
        return Err(FrameError::Version(version));
    }
    let length = u32::from_be_bytes(length) as usize;
    if length > limit {
        return Err(FrameError::TooLong { length, limit });
    }
    Ok(length)
}

/// Decodes a head's payload; every byte must belong to the message.
///
/// # Errors
/// [`FrameError::Garbage`].
pub fn decode<T: DeserializeOwned>(payload: &[u8]) -> Result<T, FrameError> {
    // The limit stops a forged length from reserving much more than a frame of
    // its size can hold.
    let config = bincode::config::standard();
    let length = payload.len();
    let decoded = if length <= SMALL_BYTES_MAX {
        let config = config.with_limit::<{ GROWTH_MAX * SMALL_BYTES_MAX }>();
        bincode::serde::decode_from_slice(payload, config)
    } else if length <= HEAD_BYTES_MAX {
        let config = config.with_limit::<{ GROWTH_MAX * HEAD_BYTES_MAX }>();
        bincode::serde::decode_from_slice(payload, config)
    } else {
        bincode::serde::decode_from_slice(payload, config.with_limit::<DECODED_BYTES_MAX>())
    };
    let (message, read) = decoded.map_err(|e| FrameError::Garbage(e.to_string()))?;
    if read != length {
        return Err(FrameError::Garbage(format!(
            "{} bytes left over",
            length - read
        )));
    }
    Ok(message)
}

/// Reads a part's prefix: its length and checksum, or `None` at the body's end.
///
/// # Errors
/// [`FrameError::TooLong`], or garbage where the end should be.
pub fn decode_part_prefix(
    prefix: [u8; PART_PREFIX_BYTES],
) -> Result<Option<(usize, u32)>, FrameError> {
    if prefix == BODY_END {
        return Ok(None);
    }
    let [l0, l1, l2, l3, c0, c1, c2, c3] = prefix;
    let length = u32::from_be_bytes([l0, l1, l2, l3]) as usize;
    if length > PART_BYTES_MAX {
        return Err(FrameError::TooLong {
            length,
            limit: PART_BYTES_MAX,
        });
    }
    if length == 0 {
        return Err(FrameError::Garbage("an empty part".into()));
    }
    Ok(Some((length, u32::from_be_bytes([c0, c1, c2, c3]))))
}
