//! What is read and purged; readers and purgers.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use bytes::Bytes;
use pingora_slice_tests::quick::Quick;
use pingora_slice_tests::{Fault, Film, KIB, Origin};
use rand::Rng;
use rand::rngs::StdRng;
use rand::seq::IteratorRandom;
use tokio::time::{sleep, timeout};

use super::history::History;
use super::purges::{Doors, Mode, Purge};

/// Slice size of the nodes: the smallest that is allowed.
pub(super) const SLICE: u64 = 64 * KIB;
/// A reader gives a node that stands still up after this long.
const READ_PATIENCE: Duration = Duration::from_secs(8);
/// A reader that got no answer comes back this much later.
const READ_AGAIN: Duration = Duration::from_millis(20);
/// Versions of one object whose bytes are kept for comparing.
const VERSIONS_KEPT: u32 = 8;
/// Versions that a body is compared with before it counts as of none.
const VERSIONS_COMPARED: u32 = 500;
/// Longest pause between two purges of one purger.
const PURGE_PAUSE_MAX: Duration = Duration::from_millis(100);
/// Two sites behind the same nodes.
pub(super) const HOSTS: [&str; 2] = ["films.test", "shows.test"];

/// An object, which both origin and nodes know by its path; only its host's
/// site is asked for it.
pub(super) struct Object {
    pub host: &'static str,
    pub film: Film,
    pub tag: &'static str,
    /// A soft purge lets it be served stale while it is asked for again.
    pub lenient: bool,
}

/// What is read and purged, and what became of it.
pub(super) struct World {
    pub objects: Vec<Object>,
    history: Mutex<History>,
    bodies: Mutex<HashMap<(usize, u32), Bytes>>,
    pub counts: Counts,
    over: AtomicBool,
}

#[derive(Default)]
pub(super) struct Counts {
    pub reads: AtomicU64,
    pub hits: AtomicU64,
    pub unanswered: AtomicU64,
    pub purges: AtomicU64,
    pub unpromised: AtomicU64,
    pub faults: AtomicU64,
}

pub(super) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

pub(super) fn told(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

impl World {
    /// Objects of one slice and of several, on two sites, under a few prefixes
    /// and tags, from an origin that takes its time for some: a fill that is
    /// under way when a purge comes is what caches get wrong most often.
    pub fn publish(origin: &Origin) -> World {
        let [films, shows] = HOSTS;
        let objects = [
            (films, "/a/one", 900, "red", 0),
            (films, "/a/two", 3000, "blue", 5),
            (films, "/a/b/three", 20_000, "red", 20),
            (films, "/b/four", 16, "blue", 60),
            (films, "/b/film", 3 * SLICE + 7, "red", 5),
            (shows, "/s/five", 5000, "red", 0),
            (shows, "/s/t/six", 300, "blue", 20),
            (shows, "/s/seven", 2 * SLICE - 1, "blue", 0),
            (shows, "/u/lenient", 1000, "red", 5),
        ];
        let objects = objects
            .into_iter()
            .enumerate()
            .map(|(index, (host, path, bytes, tag, delay_ms))| {
                let film = origin.publish(path, bytes);
                // Both headers name tags.
                let name = ["Cache-Tag", "Surrogate-Key"][index % 2];
                film.header(name, &format!("every {tag}"));
                let lenient = path.ends_with("lenient");
                if lenient {
                    let rules = "public, max-age=3600, stale-while-revalidate=60";
                    film.header("Cache-Control", rules);
                }
                if delay_ms > 0 {
                    film.always(Fault::Delay(Duration::from_millis(delay_ms)));
                }
                Object {
                    host,
                    film,
                    tag,
                    lenient,
                }
            })
            .collect::<Vec<_>>();
        World {
            history: Mutex::new(History::new(objects.len())),
            objects,
            bodies: Mutex::default(),
            counts: Counts::default(),
            over: AtomicBool::new(false),
        }
    }

    pub fn history(&self) -> MutexGuard<'_, History> {
        self.history.lock().expect("no panic while held")
    }

    pub fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }

    pub fn end(&self) {
        self.over.store(true, Ordering::Relaxed);
    }

    /// The bytes of a version.
    fn body(&self, object: usize, version: u32) -> Bytes {
        let mut bodies = self.bodies.lock().expect("no panic while held");
        if let Some(body) = bodies.get(&(object, version)) {
            return body.clone();
        }
        let film = &self.objects[object].film;
        let body = film.content_of(version).all();
        let latest = film.version();
        bodies.retain(|(o, v), _| *o != object || v + VERSIONS_KEPT > latest);
        bodies.insert((object, version), body.clone());
        body
    }

    /// Which version a body that begins at `start` is of, by its bytes alone.
    pub fn version_of(&self, object: usize, bytes: &[u8], start: usize) -> Option<u32> {
        let latest = self.objects[object].film.version();
        (1..=latest)
            .rev()
            .take(VERSIONS_COMPARED as usize)
            .find(|version| {
                let body = self.body(object, *version);
                body.get(start..start + bytes.len()) == Some(bytes)
            })
    }

    /// Reads one object after another until it is over.
    pub async fn read_on(self: Arc<Self>, node: u64, address: SocketAddr, mut rng: StdRng) {
        let mut kept = None;
        while !self.is_over() {
            let object = (0..self.objects.len()).choose(&mut rng).unwrap();
            let part = self.some_part(object, &mut rng);
            if !self.read_once(&mut kept, node, address, object, part).await {
                kept = None;
                count(&self.counts.unanswered);
                // Dead or standing still: what it does next comes soon enough.
                sleep(READ_AGAIN).await;
            }
        }
    }

    /// Which part of an object to ask for; `None`: all of it.
    fn some_part(&self, object: usize, rng: &mut StdRng) -> Option<Range<u64>> {
        let length = self.objects[object].film.length();
        if length <= SLICE || rng.random_bool(0.05) {
            return None;
        }
        // Most are small and many lie across a border of slices: there two
        // versions would meet.
        let bytes = match rng.random_range(0..10) {
            0 => rng.random_range(16..=SLICE),
            _ => rng.random_range(16..=4096),
        };
        let around = match rng.random_range(0..3) {
            0 => SLICE - bytes / 2,
            _ => rng.random_range(0..length - 16),
        };
        let start = around.min(length - 16);
        Some(start..(start + bytes).min(length))
    }

    /// One read, and whether there was a whole answer.
    pub async fn read_once(
        &self,
        kept: &mut Option<Quick>,
        node: u64,
        address: SocketAddr,
        object: usize,
        part: Option<Range<u64>>,
    ) -> bool {
        let Object { host, film, .. } = &self.objects[object];
        let path = film.path();
        let range = match &part {
            Some(part) => format!("Range: bytes={}-{}\r\n", part.start, part.end - 1),
            None => String::new(),
        };
        let request = format!("GET {path} HTTP/1.1\r\nHost: {host}\r\n{range}\r\n");
        // What is due is looked up before the request leaves.
        let (due, began) = {
            let history = self.history();
            (history.due(object), history.now())
        };
        let asking = async {
            if kept.is_none() {
                *kept = Some(Quick::connect(address).await.ok()?);
            }
            kept.as_mut()?.ask(request.as_bytes()).await.ok()
        };
        let Ok(Some(status)) = timeout(READ_PATIENCE, asking).await else {
            return false;
        };
        let Some(reply) = kept else { return false };
        let (start, expected) = match (status, part) {
            (200, _) => (0, film.length()),
            (206, Some(part)) => (part.start, part.end - part.start),
            _ => return false,
        };
        count(&self.counts.reads);
        if reply.header("x-cache") == "HIT" {
            count(&self.counts.hits);
        }
        let body = reply.body();
        let version = match body.len() as u64 == expected {
            true => self.version_of(object, body, start as usize),
            false => None,
        };
        // The lock is for breaches: right reads need none.
        if version.is_none_or(|version| version < due.version) {
            let what = || {
                format!(
                    "node {node}: {host}{path} {start}+{} begun at {:.3}; {}{}",
                    body.len(),
                    began.as_secs_f64(),
                    reply.header("x-cache"),
                    reply.header("cache-status"),
                )
            };
            self.history().read(due, version, what);
        }
        true
    }

    /// Changes objects and purges them until it is over.
    pub async fn purge_on(self: Arc<Self>, doors: Arc<Doors>, mut rng: StdRng) {
        while !self.is_over() {
            let purge = Purge::some(&self.objects, &mut rng);
            for object in &purge.covered {
                // Now and then nothing has changed: the origin confirms.
                if rng.random_bool(0.8) {
                    self.objects[*object].film.change();
                }
            }
            let versions: Vec<(usize, u32)> = purge
                .covered
                .iter()
                .map(|object| (*object, self.objects[*object].film.version()))
                .collect();
            let number = rng.random_range(0..100_000u32);
            self.history()
                .note(format_args!("purge {number}: {purge}, at {versions:?}"));
            let tell = |event: String| {
                let event = format!("purge {number}: {event}");
                self.history().note(event);
            };
            let promised = doors.purge(&purge, &self.objects, &mut rng, tell).await;
            if promised {
                let promised: Vec<(usize, u32)> = versions
                    .into_iter()
                    .filter(|(o, _)| purge.mode != Mode::Soft || !self.objects[*o].lenient)
                    .collect();
                self.history().purged(&promised);
                count(&self.counts.purges);
            } else {
                count(&self.counts.unpromised);
            }
            sleep(PURGE_PAUSE_MAX.mul_f64(rng.random())).await;
        }
    }
}
