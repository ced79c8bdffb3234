//! Properties of fetching: limits, order, and what becomes of failures.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use pingora_slice_tests::{Ask, Fault, Film};
use proptest::prelude::*;

use super::{SLICE, World, asked, bytes, length, length_and_range};

/// How a download ended that was compared byte by byte on the way.
#[derive(Debug, PartialEq)]
enum Download {
    /// All of it, properly framed.
    Whole,
    /// This status, which is no success.
    Refused(u16),
    /// Cut after this many right bytes.
    Cut(u64),
}

/// Reads a range, or everything; an error is a wrong byte.
async fn download(
    world: &World,
    film: &Film,
    range: Option<&Range<u64>>,
) -> Result<Download, TestCaseError> {
    let mut ask = Ask::get(film.path());
    if let Some(range) = range {
        ask = ask.range(&bytes(range));
    }
    let wanted = range.cloned().unwrap_or(0..film.length());
    let Ok(mut stream) = ask.open(world.node().address()).await else {
        return Ok(Download::Cut(0));
    };
    if !matches!(stream.status, 200 | 206) {
        return Ok(Download::Refused(stream.status));
    }
    let mut at = wanted.start;
    loop {
        match stream.next().await {
            Err(_) => return Ok(Download::Cut(at - wanted.start)),
            Ok(None) => {
                prop_assert_eq!(at, wanted.end, "an early end that looks like the end");
                return Ok(Download::Whole);
            }
            Ok(Some(piece)) => {
                prop_assert_eq!(film.content().difference(at, &piece), None);
                at += piece.len() as u64;
            }
        }
    }
}

#[test]
fn p07_no_more_subrequests_at_once_than_configured() {
    for limit in [1, 3] {
        let world = World::start(&[("max_concurrent_subrequests", &limit.to_string())]);
        let most = AtomicUsize::new(0);
        let case = || (length_and_range(), any::<bool>(), 1..10u64);
        world.hold(7, case, async |world, ((length, range), whole, ms)| {
            let film = world.publish(length);
            film.always(Fault::Delay(Duration::from_millis(ms)));
            let range = (!whole).then_some(&range);
            prop_assert_eq!(download(world, &film, range).await?, Download::Whole);
            let at_once = film.waiting_max();
            prop_assert!(at_once <= limit, "{} requests at once", at_once);
            most.fetch_max(at_once, Ordering::Relaxed);
            Ok(())
        });
        // The limit is used, too: otherwise this would show nothing.
        assert_eq!(most.into_inner(), limit);
    }
}

#[test]
fn p08_no_more_tries_than_configured() {
    for retries in [0, 1] {
        let world = World::start(&[("max_retries", &retries.to_string())]);
        let case = || (1..5u64, 1..=SLICE, 0..=retries as u32 + 2, any::<bool>());
        world.hold(8, case, async |world, (slices, rest, times, refuse)| {
            let last = (slices - 1) * SLICE;
            let film = world.publish(last + rest);
            // The first slice breaks off after the head is known: no failed
            // request, and the next reader begins a fill of its own.
            let refuse = refuse || last == 0;
            for _ in 0..times {
                film.once_from(
                    last,
                    if refuse {
                        Fault::Status(503)
                    } else {
                        Fault::CloseAfter(0)
                    },
                );
            }
            let outcome = download(world, &film, None).await?;
            let tries = film
                .seen()
                .iter()
                .filter(|seen| asked(seen.header("range")).is_some_and(|r| r.start == last))
                .count();
            prop_assert_eq!(tries, 1 + retries.min(times as usize));
            prop_assert_eq!(outcome == Download::Whole, times as usize <= retries);
            Ok(())
        });
    }
}

#[test]
fn p09_failures_are_propagated() {
    let world = World::start(&[("max_retries", "0")]);
    let fault = || {
        prop_oneof![
            (500..=504u16).prop_map(Fault::Status),
            Just(Fault::CloseAfter(0)),
            Just(Fault::Hangup),
        ]
    };
    let case = || (length_and_range(), any::<bool>(), 0..6u64, fault());
    world.hold(
        9,
        case,
        async |world, ((length, range), whole, bad, fault)| {
            let film = world.publish(length);
            film.always_from(bad * SLICE, fault);
            let range = (!whole).then_some(&range);
            let wanted = range.cloned().unwrap_or(0..length);
            let outcome = download(world, &film, range).await?;
            if wanted.end <= bad * SLICE {
                prop_assert_eq!(outcome, Download::Whole);
            } else if wanted.start / SLICE >= bad {
                // Nothing was there to begin with.
                prop_assert!(
                    matches!(outcome, Download::Refused(500..=504) | Download::Cut(0)),
                    "{:?}",
                    outcome
                );
            } else {
                // The failure may come before the first byte has left.
                let good = bad * SLICE - wanted.start;
                let is_short = match outcome {
                    Download::Cut(bytes) => bytes <= good,
                    Download::Refused(status) => status >= 500,
                    Download::Whole => false,
                };
                prop_assert!(is_short, "{:?} with {} good bytes", outcome, good);
            }
            // It is not remembered.
            film.behave();
            prop_assert_eq!(download(world, &film, range).await?, Download::Whole);
            Ok(())
        },
    );
}

#[test]
fn p10_bytes_come_in_their_order() {
    let world = World::start(&[]);
    let case = || {
        let delays = prop::collection::vec(0..6u64, 6);
        (length_and_range(), any::<bool>(), delays)
    };
    world.hold(10, case, async |world, ((length, range), whole, delays)| {
        let film = world.publish(length);
        // The first that begins at or before a slice counts.
        for (slice, ms) in delays.iter().enumerate().rev() {
            let delay = Fault::Delay(Duration::from_millis(*ms));
            film.always_from(slice as u64 * SLICE, delay);
        }
        let range = (!whole).then_some(&range);
        prop_assert_eq!(download(world, &film, range).await?, Download::Whole);
        Ok(())
    });
}

#[test]
fn p16_4xx_is_passed_through() {
    let world = World::start(&[]);
    // What an origin says of ranges is the matter of properties 17 and 20.
    let status = || (400..500u16).prop_filter("not 416", |status| *status != 416);
    let case = || (length_and_range(), any::<bool>(), status());
    world.hold(16, case, async |world, ((length, range), whole, status)| {
        let film = world.publish(length);
        film.always(Fault::Status(status));
        let mut ask = Ask::get(film.path());
        if !whole {
            ask = ask.range(&bytes(&range));
        }
        let reply = world.node().ask(ask).await;
        prop_assert_eq!(reply.status, status);
        prop_assert_eq!(reply.text(), format!("{status}, as told\n"));
        prop_assert_eq!(film.seen().len(), 1, "it is not tried again");
        Ok(())
    });
}

#[test]
fn p17_only_the_right_content_range_is_taken() {
    let world = World::start(&[("max_retries", "0")]);
    let by = || -2..=2i64;
    let form = || "(bytes|Bytes|items|none|star)";
    // Slices of an object after the first, of which one is lied about.
    let case = || {
        let length = length().prop_map(|length| length + SLICE);
        length.prop_flat_map(move |length| {
            let slices = length.div_ceil(SLICE);
            (Just(length), 1..slices, by(), by(), by(), form())
        })
    };
    world.hold(
        17,
        case,
        async |world, (length, lied, first, last, total, form)| {
            let film = world.publish(length);
            // The object's head is known: only the slice is judged.
            let head = download(world, &film, Some(&(0..1))).await?;
            prop_assert_eq!(head, Download::Whole);
            let right = lied * SLICE..((lied + 1) * SLICE).min(length);
            let said = [
                right.start.saturating_add_signed(first),
                (right.end - 1).saturating_add_signed(last),
                length.saturating_add_signed(total),
            ];
            let text = match form.as_str() {
                "none" => String::new(),
                "star" => format!("bytes {}-{}/*", said[0], said[1]),
                unit => format!("{unit} {}-{}/{}", said[0], said[1], said[2]),
            };
            film.once_from(right.start, Fault::ContentRange(text.clone()));
            // `*`: a total that the origin does not know contradicts nothing.
            let is_right = match form.as_str() {
                "bytes" | "Bytes" => said == [right.start, right.end - 1, length],
                "star" => said[..2] == [right.start, right.end - 1],
                _ => false,
            };
            let outcome = download(world, &film, Some(&right)).await?;
            // Whether told so or asked again: the bytes are right, or there are none.
            if is_right {
                prop_assert_eq!(outcome, Download::Whole);
                prop_assert_eq!(film.seen().len(), 2);
            } else {
                prop_assert!(
                    matches!(outcome, Download::Refused(502)) || film.seen().len() > 2,
                    "{:?} was taken: {:?}",
                    text,
                    outcome
                );
            }
            // Nothing of the lie is kept.
            film.behave();
            prop_assert_eq!(download(world, &film, None).await?, Download::Whole);
            Ok(())
        },
    );
}
