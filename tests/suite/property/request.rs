//! Properties of what is asked of the origin.

use pingora_slice_tests::Ask;
use proptest::prelude::*;

use super::{SLICE, World, asked, bytes, length, length_and_range};

#[test]
fn p02_what_must_pass_is_passed_untouched() {
    let world = World::start(&[]);
    let how = || {
        prop_oneof![
            "(POST|PUT|PATCH|DELETE|OPTIONS|REPORT)".prop_map(|method| (method, "")),
            Just(("GET".to_owned(), "no-store")),
        ]
    };
    let case = || (how(), length_and_range(), "[a-z0-9]{0,40}", "[!-~]{1,20}");
    world.hold(
        2,
        case,
        async |world, ((method, demand), (length, range), body, field)| {
            let film = world.publish(length);
            let mut ask = Ask::new(&method, film.path())
                .range(&bytes(&range))
                .header("X-Case", &field);
            if demand.is_empty() {
                ask = ask.body(body.clone());
            } else {
                ask = ask.header("Cache-Control", demand);
            }
            // What is passed is not kept: the second time is like the first.
            for times in 1..=2 {
                let reply = world.node().ask(ask.clone()).await;
                let seen = film.seen();
                prop_assert_eq!(seen.len(), times);
                let last = &seen[times - 1];
                prop_assert_eq!(&last.method, &method);
                prop_assert_eq!(last.header("range"), bytes(&range));
                prop_assert_eq!(last.header("x-case"), &field);
                prop_assert_eq!(reply.header("x-cache"), "PASS");
                if demand.is_empty() {
                    prop_assert_eq!((reply.status, reply.text()), (200, body.clone()));
                } else {
                    prop_assert_eq!(reply.status, 206);
                    prop_assert_eq!(&reply.body, &film.content().bytes(range.clone()));
                }
            }
            Ok(())
        },
    );
}

#[test]
fn p03_patterns_choose_what_is_sliced() {
    let world = World::start(&[("slice_patterns", r#"["^/film/", '\.mp4$']"#)]);
    let segment = || "(film|films|a|x\\.mp4|mp4|b\\.mp4x|\\.mp4)";
    let case = || (segment(), segment(), any::<bool>(), length());
    world.hold(3, case, async |world, (first, last, query, length)| {
        let path = format!("/{first}/{}/{last}", world.number());
        let film = world.publish_at(&path, length);
        // A query is not part of the path.
        let target = path + if query { "?/film/x.mp4" } else { "" };
        let reply = world.node().get(&target).await;
        prop_assert_eq!(reply.status, 200);
        prop_assert_eq!(&reply.body, &film.content().all());
        let matches = first == "film" || last.ends_with(".mp4");
        let seen = film.seen();
        prop_assert_eq!(!seen[0].header("range").is_empty(), matches, "{}", target);
        prop_assert!(matches || seen.len() == 1, "one plain GET: {:?}", seen);
        Ok(())
    });
}

#[test]
fn p06_the_range_header_has_one_format() {
    let world = World::start(&[]);
    let form = || {
        prop_oneof![
            Just(String::new()),
            (0..100u64, 0..60u64).prop_map(|(a, n)| format!("bytes={a}-{}", a + n)),
            (0..100u64).prop_map(|a| format!("bytes={a}-")),
            (1..100u64).prop_map(|n| format!("bytes=-{n}")),
        ]
    };
    world.hold(
        6,
        || (length(), form()),
        async |world, (length, form)| {
            let film = world.publish(length);
            let mut ask = Ask::get(film.path()).header("Accept-Encoding", "gzip");
            if !form.is_empty() {
                ask = ask.range(&form);
            }
            let reply = world.node().ask(ask).await;
            prop_assert!(matches!(reply.status, 200 | 206 | 416), "{}", reply.status);
            for (nth, seen) in film.seen().iter().enumerate() {
                prop_assert_eq!(seen.header("accept-encoding"), "identity");
                let value = seen.header("range");
                let suffix = value.strip_prefix("bytes=-");
                if let (0, Some(count)) = (nth, suffix) {
                    // The end of an unknown object, as the client named it.
                    prop_assert_eq!(Some(count), form.strip_prefix("bytes=-"));
                    continue;
                }
                let Some(asked) = asked(value) else {
                    return Err(TestCaseError::fail(format!("{value:?}")));
                };
                prop_assert_eq!(asked.start % SLICE, 0, "{}", value);
                let end = asked.start + SLICE;
                let known = end.min(length);
                prop_assert!(
                    asked.end == end || (nth > 0 && asked.end == known),
                    "{}",
                    value
                );
            }
            Ok(())
        },
    );
}
