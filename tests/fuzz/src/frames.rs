//! What peers send: prefixes, heads, parts, and the manifests inside them.

use std::fmt::Debug;

use pingora_slice::manifest;
use pingora_slice_cluster::wire::{
    self, Answer, Ask, HEAD_BYTES_MAX, HEAD_PREFIX_BYTES, PART_BYTES_MAX, PART_PREFIX_BYTES, Part,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// What a decoder may ask for at once beyond the message's own size: serde
/// reserves up to a mebibyte for a list of an announced length.
const RESERVE_BYTES_MAX: usize = 1 << 20;

/// A byte that says what the rest is taken for, and the rest.
pub fn check(data: &[u8]) {
    let Some(([what], rest)) = crate::head(data) else {
        return;
    };
    match what % 5 {
        0 => message::<Ask>(rest),
        1 => message::<Answer>(rest),
        2 => record(rest),
        3 => parts(rest),
        _ => frame(rest),
    }
}

/// A head's payload: what decodes comes through an encoding unchanged.
fn message<T: Serialize + DeserializeOwned + PartialEq + Debug>(payload: &[u8]) {
    if payload.len() > HEAD_BYTES_MAX {
        return;
    }
    let (decoded, largest) = crate::largest_allocation(|| wire::decode::<T>(payload));
    // A forged length reserves no more than a frame of this size can hold.
    let allowed = RESERVE_BYTES_MAX + 16 * payload.len().max(wire::SMALL_BYTES_MAX);
    assert!(largest <= allowed, "{largest} bytes for {}", payload.len());
    if let Ok(message) = decoded {
        let Ok(encoded) = wire::encode(&message) else {
            return;
        };
        let again: T = wire::decode(&encoded[HEAD_PREFIX_BYTES..]).expect("our own");
        assert_eq!(again, message);
        // One more byte belongs to nothing.
        let mut longer = payload.to_vec();
        longer.push(0);
        assert!(wire::decode::<T>(&longer).is_err());
    }
}

fn record(bytes: &[u8]) {
    let (record, largest) = crate::largest_allocation(|| manifest::decode(bytes));
    assert!(
        largest <= 4 * RESERVE_BYTES_MAX,
        "{largest} bytes for {}",
        bytes.len()
    );
    if let Some(record) = record {
        let again = manifest::decode(&manifest::encode(&record));
        assert_eq!(again, Some(record));
    }
}

/// A head with its prefix.
fn frame(bytes: &[u8]) {
    let Some((prefix, rest)) = crate::head::<HEAD_PREFIX_BYTES>(bytes) else {
        return;
    };
    if let Ok(length) = wire::decode_prefix(prefix, HEAD_BYTES_MAX) {
        assert!(length <= HEAD_BYTES_MAX);
        assert_eq!(prefix[0], wire::WIRE_VERSION);
        message::<Ask>(&rest[..length.min(rest.len())]);
    }
}

/// A body: parts until its end, or until it breaks.
fn parts(mut bytes: &[u8]) {
    while let Some((prefix, rest)) = crate::head::<PART_PREFIX_BYTES>(bytes) {
        match wire::decode_part_prefix(prefix) {
            Ok(Some((length, crc32c))) => {
                assert!((1..=PART_BYTES_MAX).contains(&length));
                let Some((payload, rest)) = rest.split_at_checked(length) else {
                    return;
                };
                let part = Part {
                    bytes: payload.to_vec().into(),
                    crc32c,
                };
                assert_eq!(part.prefix(), prefix);
                assert_eq!(part.is_intact(), Part::new(part.bytes.clone()) == part);
                bytes = rest;
            }
            Ok(None) => {
                assert_eq!(prefix, wire::BODY_END);
                return;
            }
            Err(_) => return,
        }
    }
}
