//! Properties of what clients are answered, and of what that costs the origin.

use std::collections::BTreeSet;

use pingora_slice_cluster::slice::touched;
use pingora_slice_tests::http::Reply;
use pingora_slice_tests::{Ask, Film};
use proptest::prelude::*;
use proptest::test_runner::TestCaseResult;

use super::{SLICE, World, asked, bytes, length, length_and_range, range_within};

/// Fields of an origin, beyond those that it always sends.
fn fields() -> impl Strategy<Value = Vec<(String, String)>> {
    let name = "(X-[A-Z][a-z]{1,6}|Content-Language|Content-Disposition|Link)";
    prop::collection::vec((name, "[!-~]([ -~]{0,30}[!-~])?"), 0..5)
}

/// Whether every field of the origin has arrived, and those that describe the answer.
fn is_complete(reply: &Reply, film: &Film, fields: &[(String, String)]) -> TestCaseResult {
    for (name, value) in fields {
        // Of a name chosen twice the last counts.
        let last = fields
            .iter()
            .rev()
            .find(|(n, _)| n.eq_ignore_ascii_case(name));
        let value = last.map_or(value, |(_, value)| value);
        prop_assert_eq!(reply.header(name), value, "{}", name);
    }
    prop_assert_eq!(reply.header("content-type"), "application/octet-stream");
    prop_assert_eq!(reply.header("cache-control"), "public, max-age=3600");
    prop_assert_eq!(reply.header("accept-ranges"), "bytes");
    prop_assert_eq!(reply.header("content-length"), reply.body.len().to_string());
    for name in [
        "etag",
        "last-modified",
        "date",
        "age",
        "x-cache",
        "cache-status",
    ] {
        let count = reply.headers.get_all(name).iter().count();
        prop_assert_eq!(count, 1, "{} of {:?}", name, reply);
    }
    for hop in ["keep-alive", "transfer-encoding"] {
        prop_assert!(!reply.headers.contains_key(hop), "{} of {:?}", hop, reply);
    }
    prop_assert!(film.seen().iter().all(|seen| seen.status != 0));
    Ok(())
}

fn publish(world: &World, length: u64, fields: &[(String, String)]) -> Film {
    let film = world.publish(length);
    film.header("Keep-Alive", "timeout=5");
    for (name, value) in fields {
        film.header(name, value);
    }
    film
}

#[test]
fn p11_a_200_has_all_headers() {
    let world = World::start(&[]);
    world.hold(
        11,
        || (length(), fields()),
        async |world, (length, fields)| {
            let film = publish(world, length, &fields);
            for _cold_then_warm in 0..2 {
                let reply = world.node().get(film.path()).await;
                prop_assert_eq!((reply.status, reply.body.len() as u64), (200, length));
                prop_assert!(!reply.headers.contains_key("content-range"));
                is_complete(&reply, &film, &fields)?;
            }
            Ok(())
        },
    );
}

#[test]
fn p12_a_206_has_all_headers() {
    let world = World::start(&[]);
    let case = || (length_and_range(), fields());
    world.hold(12, case, async |world, ((length, range), fields)| {
        let film = publish(world, length, &fields);
        for _cold_then_warm in 0..2 {
            let ask = Ask::get(film.path()).range(&bytes(&range));
            let reply = world.node().ask(ask).await;
            prop_assert_eq!(reply.status, 206);
            let content_range = format!("bytes {}-{}/{length}", range.start, range.end - 1);
            prop_assert_eq!(reply.header("content-range"), content_range);
            prop_assert_eq!(reply.body.len() as u64, range.end - range.start);
            is_complete(&reply, &film, &fields)?;
        }
        Ok(())
    });
}

#[test]
fn p14_a_hit_has_the_same_bytes() {
    let world = World::start(&[]);
    let case = || {
        length().prop_flat_map(|length| {
            let ranges = prop::collection::vec(prop::option::of(range_within(length)), 1..5);
            (Just(length), ranges)
        })
    };
    world.hold(14, case, async |world, (length, ranges)| {
        let film = world.publish(length);
        let first = world.node().get(film.path()).await;
        prop_assert_eq!(first.header("x-cache"), "MISS");
        let fetches = film.fetches();
        for range in ranges {
            let mut ask = Ask::get(film.path());
            if let Some(range) = &range {
                ask = ask.range(&bytes(range));
            }
            let reply = world.node().ask(ask).await;
            let expected = range.unwrap_or(0..length);
            prop_assert_eq!(&reply.body, &film.content().bytes(expected));
            prop_assert_eq!(reply.header("x-cache"), "HIT");
            prop_assert_eq!(reply.header("etag"), first.header("etag"));
            prop_assert_eq!(film.fetches(), fetches, "a hit asks nobody");
        }
        Ok(())
    });
}

#[test]
fn p15_a_partial_hit_fetches_only_what_is_missing() {
    let world = World::start(&[]);
    let case = || {
        length().prop_flat_map(|length| {
            let ranges = prop::collection::vec(range_within(length), 1..4);
            (Just(length), ranges)
        })
    };
    world.hold(15, case, async |world, (length, ranges)| {
        let film = world.publish(length);
        let mut held = BTreeSet::new();
        for range in ranges {
            let before = film.seen().len();
            let ask = Ask::get(film.path()).range(&bytes(&range));
            let reply = world.node().ask(ask).await;
            prop_assert_eq!(&reply.body, &film.content().bytes(range.clone()));
            let wanted: BTreeSet<u64> = touched(range, SLICE as u32)
                .map(|part| u64::from(part.index))
                .collect();
            let missing: Vec<u64> = wanted.difference(&held).copied().collect();
            let mut fetched: Vec<u64> = film.seen()[before..]
                .iter()
                .map(|seen| asked(seen.header("range")).expect("a slice").start / SLICE)
                .collect();
            fetched.sort_unstable();
            prop_assert_eq!(fetched, missing, "with {:?} held", held);
            held.extend(wanted);
        }
        Ok(())
    });
}

#[test]
fn p20_beyond_the_end_is_416() {
    let world = World::start(&[]);
    let beyond = || {
        prop_oneof![
            (0..50u64, 0..50u64).prop_map(|(by, n)| (by, format!("-+{n}"))),
            (0..50u64).prop_map(|by| (by, "-".to_owned())),
            Just((u64::MAX / 2, "-".to_owned())),
            Just((0, "-0".to_owned())),
        ]
    };
    let case = || {
        (
            length(),
            prop::collection::vec(beyond(), 1..3),
            any::<bool>(),
        )
    };
    world.hold(20, case, async |world, (length, specs, warm)| {
        let film = world.publish(length);
        if warm {
            world.node().get(film.path()).await;
        }
        let specs: Vec<String> = specs
            .iter()
            .map(|(by, rest)| match rest.split_once('+') {
                _ if rest == "-0" => rest.clone(),
                Some((dash, n)) => {
                    let n: u64 = n.parse().unwrap();
                    format!("{}{dash}{}", length + by, length + by + n)
                }
                None => format!("{}{rest}", length + by),
            })
            .collect();
        let range = format!("bytes={}", specs.join(","));
        let reply = world.node().ask(Ask::get(film.path()).range(&range)).await;
        prop_assert_eq!(reply.status, 416, "{} of {}", range, length);
        prop_assert_eq!(reply.header("content-range"), format!("bytes */{length}"));
        prop_assert!(reply.body.is_empty());
        // One byte nearer it is an answer.
        let near = format!("bytes={}-", length - 1);
        let reply = world.node().ask(Ask::get(film.path()).range(&near)).await;
        prop_assert_eq!((reply.status, reply.body.len()), (206, 1));
        Ok(())
    });
}
