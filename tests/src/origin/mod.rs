//! A scripted origin: it serves what a test publishes, does what the test
//! says, and remembers everything that it was asked.
//!
//! By default it is a model origin: ranges, conditions, HEAD, validators, all
//! as RFC 9110 has them. A [`Fault`] makes it stall, lie or break off; a
//! [`Gate`] holds answers at a byte until the test lets them go, so that tests
//! wait for conditions instead of time. Its log ([`Seen`]) is the witness for
//! every claim about what a cache did or did not fetch.
//!
//! Written on bare sockets (`serve`), because a well-behaved HTTP library will
//! not send a wrong answer.

mod serve;

use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, SystemTime};

use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::SLICE_BYTES;
use crate::content::Content;

/// Longest that a test waits for the origin to be asked for something.
const WAIT_MAX: Duration = Duration::from_secs(60);

/// The origin. Stops when dropped.
pub struct Origin {
    shared: Arc<Shared>,
    address: SocketAddr,
    accepting: Option<JoinHandle<()>>,
}

/// A published object, and the handle to change and script it.
#[derive(Clone)]
pub struct Film {
    path: String,
    shared: Arc<Shared>,
    object: Arc<Mutex<Object>>,
}

/// What an object tells about its version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Validators {
    /// A strong ETag and Last-Modified.
    Strong,
    /// A weak ETag and Last-Modified.
    Weak,
    /// Only Last-Modified.
    Date,
    /// A weak ETag alone: nothing that identifies bytes.
    WeakAlone,
    /// Nothing.
    Nothing,
    /// Another strong ETag with each answer.
    Unsteady,
    /// Two strong ETags in turn, as replicas give that disagree.
    Replicas,
    /// A strong ETag, and no Last-Modified.
    StrongAlone,
    /// As `Unsteady`, and no Last-Modified.
    UnsteadyAlone,
    /// As `Replicas`, and no Last-Modified.
    ReplicasAlone,
}

/// A way to misbehave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Waits before the header.
    Delay(Duration),
    /// Sends this many body bytes, then nothing more, and keeps the connection open.
    StallAfter(u64),
    /// Sends at most this many body bytes per second.
    Drip(u64),
    /// Sends this many body bytes, then closes.
    CloseAfter(u64),
    /// Closes the connection instead of answering.
    Hangup,
    /// Answers a range with 200 and everything.
    IgnoreRange,
    /// 206 whose Content-Range starts a byte later than asked; the body follows the lie.
    ShiftedRange,
    /// 206 without Content-Range.
    NoContentRange,
    /// 206 whose Content-Range gives another total.
    WrongTotal,
    /// 206 with this Content-Range, whatever was asked; none where it is empty.
    ContentRange(String),
    /// 206 whose Content-Range has another unit.
    WrongUnit,
    /// 206 with more bytes than its Content-Range says, chunked.
    LongBody,
    /// 206 with fewer bytes than asked, consistently framed.
    ShortRange,
    /// 206 with the right Content-Range, but fewer bytes in a well-framed body.
    ShortBody,
    /// Answers everything with 200, chunked: neither ranges nor a length.
    NoLength,
    /// The same, and closes after this many bytes without the last chunk.
    NoLengthCloseAfter(u64),
    /// The same, and ends after this many bytes as if they were all.
    NoLengthEndAfter(u64),
    /// An encoded answer (`Content-Encoding: gzip`), though nobody asked for one.
    Gzip,
    /// The same to requests that take it alone, as a whole and under a tag of its own.
    GzipWhereTaken,
    /// This status with a short text.
    Status(u16),
    /// 302 to this location.
    Redirect(String),
    /// This status, after a second in which others may join, to requests that
    /// have this field alone.
    Refuses(&'static str, u16),
    /// 416, whatever was asked.
    Unsatisfiable,
    /// These bytes instead of an answer, then close.
    Garbage(Vec<u8>),
}

/// One request, as the origin saw it, and what it did about it.
#[derive(Clone, Debug)]
pub struct Seen {
    /// Method.
    pub method: String,
    /// Path and query, as received.
    pub target: String,
    /// Headers, as received.
    pub headers: Vec<(String, String)>,
    /// Status answered; 0 before the answer, and when there was none.
    pub status: u16,
    /// Version of the object that the answer was made from; 0 for none.
    pub version: u32,
    /// Bytes of the object that the body was to carry.
    pub body: Range<u64>,
    /// Body bytes handed to the socket so far.
    pub sent: u64,
    /// The whole answer was handed to the socket.
    pub complete: bool,
    /// Nothing more will be sent, whether complete or not.
    pub ended: bool,
}

impl Seen {
    /// One header as text, empty when absent.
    pub fn header(&self, name: &str) -> &str {
        let found = self
            .headers
            .iter()
            .find(|(have, _)| have.eq_ignore_ascii_case(name));
        found.map_or("", |(_, value)| value)
    }

    /// A GET that was answered with bytes of the object.
    pub fn fetched(&self) -> bool {
        self.method == "GET" && matches!(self.status, 200 | 206)
    }
}

/// Answers wait here until the test opens it (or drops it).
#[must_use = "a dropped gate is open"]
pub struct Gate {
    open: watch::Sender<bool>,
    held: watch::Receiver<usize>,
}

impl Gate {
    /// Waits until `count` answers are being held.
    pub async fn holds(&mut self, count: usize) {
        let waiting = self.held.wait_for(|held| *held >= count);
        timeout(WAIT_MAX, waiting)
            .await
            .expect("nobody came to the gate")
            .expect("origin runs");
    }

    /// Waits until an answer is being held, which this download needs to go on.
    pub async fn holds_up<T: std::fmt::Debug>(&mut self, download: &mut JoinHandle<T>) {
        tokio::select! {
            held = timeout(WAIT_MAX, self.held.wait_for(|held| *held > 0)) => {
                held.expect("nothing was held, the download stands still").expect("origin runs");
            }
            end = download => panic!("nothing was held, the download ended: {end:?}"),
        }
    }

    /// Lets everybody through, from now on.
    pub fn open(self) {}
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.open.send_replace(true);
    }
}

/// Where answers stop; the origin's side of a [`Gate`].
#[derive(Clone)]
struct Stop {
    offset: u64,
    open: watch::Receiver<bool>,
    held: Arc<watch::Sender<usize>>,
}

/// Where an object's bytes come from.
#[derive(Clone)]
enum Source {
    Generated { seed: u64 },
    File(PathBuf),
}

struct Scripted {
    fault: Fault,
    times: Option<u32>,
    /// Only for answers that start here or later.
    from: u64,
}

struct Object {
    source: Source,
    version: u32,
    /// Length of each version, the first one first.
    lengths: Vec<u64>,
    published: SystemTime,
    /// Last-Modified of every version, where it is not each version's own.
    modified: Option<SystemTime>,
    validators: Validators,
    headers: Vec<(String, String)>,
    vary: Option<String>,
    faults: Vec<Scripted>,
    stops: Vec<Stop>,
    answers: u64,
    /// Requests that have not got a head yet, now and at most.
    waiting: usize,
    waiting_max: usize,
}

struct Shared {
    objects: Mutex<HashMap<String, Arc<Mutex<Object>>>>,
    trees: Mutex<Vec<(String, PathBuf)>>,
    log: Mutex<Vec<Arc<Mutex<Seen>>>>,
    /// Connections accepted so far.
    connections: AtomicUsize,
    /// Counts changes of the log, for those who wait for one.
    changes: watch::Sender<u64>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("no panic while it was held")
}

impl Shared {
    fn log(&self) -> Vec<Seen> {
        lock(&self.log)
            .iter()
            .map(|seen| lock(seen).clone())
            .collect()
    }

    fn noted(&self) {
        self.changes.send_modify(|count| *count += 1);
    }
}

impl Origin {
    /// Listens on a free loopback port.
    pub async fn start() -> Origin {
        let shared = Arc::new(Shared {
            objects: Mutex::default(),
            trees: Mutex::default(),
            log: Mutex::default(),
            connections: AtomicUsize::new(0),
            changes: watch::Sender::new(0),
        });
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
            .await
            .expect("a free port");
        let address = listener.local_addr().expect("bound");
        let accepting = Some(tokio::spawn(serve::accept(listener, shared.clone())));
        Origin {
            shared,
            address,
            accepting,
        }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Publishes generated bytes: strong validators, fresh for an hour.
    pub fn publish(&self, path: &str, length: u64) -> Film {
        let mut objects = lock(&self.shared.objects);
        let seed = objects.len() as u64 + 1;
        let object = Arc::new(Mutex::new(Object::new(Source::Generated { seed }, length)));
        objects.insert(path.to_owned(), object.clone());
        Film {
            path: path.to_owned(),
            shared: self.shared.clone(),
            object,
        }
    }

    /// Publishes every file below `dir` under `prefix`, as the files are at
    /// the time of each request.
    pub fn publish_tree(&self, prefix: &str, dir: impl Into<PathBuf>) {
        lock(&self.shared.trees).push((prefix.to_owned(), dir.into()));
    }

    /// Everything that was asked so far.
    pub fn log(&self) -> Vec<Seen> {
        self.shared.log()
    }

    /// Forgets what was asked: for tests with a first part to get warm.
    pub fn forget_log(&self) {
        lock(&self.shared.log).clear();
    }

    /// GETs that were answered with bytes of any object.
    pub fn fetches(&self) -> usize {
        self.log().iter().filter(|seen| seen.fetched()).count()
    }

    /// Connections that were made so far.
    pub fn connections(&self) -> usize {
        self.shared.connections.load(Ordering::Relaxed)
    }

    /// Waits until the log satisfies `condition`.
    pub async fn until(&self, what: &str, condition: impl Fn(&[Seen]) -> bool) {
        until(&self.shared, what, condition).await;
    }

    /// Stops listening and drops every connection: the origin is down.
    pub async fn stop(&mut self) {
        if let Some(task) = self.accepting.take() {
            task.abort();
            let _ = task.await;
        }
    }

    /// Listens again where it did before [`Origin::stop`].
    pub async fn resume(&mut self) {
        let listener = TcpListener::bind(self.address).await.expect("still ours");
        self.accepting = Some(tokio::spawn(serve::accept(listener, self.shared.clone())));
    }
}

impl Drop for Origin {
    fn drop(&mut self) {
        if let Some(task) = &self.accepting {
            task.abort();
        }
    }
}

async fn until(shared: &Shared, what: &str, condition: impl Fn(&[Seen]) -> bool) {
    let mut changes = shared.changes.subscribe();
    let waiting = changes.wait_for(|_| condition(&shared.log()));
    if timeout(WAIT_MAX, waiting).await.is_err() {
        panic!(
            "the origin waited for {what} in vain; its log: {:#?}",
            shared.log()
        );
    }
}

impl Film {
    /// Path on the origin.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Length of the current version in bytes.
    pub fn length(&self) -> u64 {
        lock(&self.object).length()
    }

    /// Slices of the current version, at the slice size of the test nodes.
    pub fn slices(&self) -> usize {
        self.length().div_ceil(SLICE_BYTES) as usize
    }

    /// The current version's number, counted from 1.
    pub fn version(&self) -> u32 {
        lock(&self.object).version
    }

    /// The bytes of the current version.
    pub fn content(&self) -> Content {
        self.content_of(self.version())
    }

    /// The bytes of any version.
    pub fn content_of(&self, version: u32) -> Content {
        lock(&self.object).content(version, None)
    }

    /// The bytes that a request with this value of the [`Film::vary`] header gets.
    pub fn content_for(&self, value: &str) -> Content {
        let object = lock(&self.object);
        object.content(object.version, Some(value))
    }

    /// Which version these bytes, found at `offset`, belong to, of all there were.
    pub fn version_of(&self, offset: u64, bytes: &[u8]) -> Option<u32> {
        (1..=self.version()).find(|version| {
            self.content_of(*version)
                .difference(offset, bytes)
                .is_none()
        })
    }

    /// Publishes a new version of the same length: other bytes, other validators.
    pub fn change(&self) -> u32 {
        self.change_to(self.length())
    }

    /// Publishes a new version of another length.
    pub fn change_to(&self, length: u64) -> u32 {
        let mut object = lock(&self.object);
        object.lengths.push(length);
        object.version += 1;
        object.version
    }

    /// Sets a header of the answers; an empty `Date` is none at all.
    pub fn header(&self, name: &str, value: &str) -> &Film {
        self.without(name);
        lock(&self.object)
            .headers
            .push((name.to_owned(), value.to_owned()));
        self
    }

    /// Removes a header from the answers.
    pub fn without(&self, name: &str) -> &Film {
        lock(&self.object)
            .headers
            .retain(|(have, _)| !have.eq_ignore_ascii_case(name));
        self
    }

    /// Chooses the validators.
    pub fn validators(&self, validators: Validators) -> &Film {
        lock(&self.object).validators = validators;
        self
    }

    /// Gives every version the same Last-Modified.
    pub fn modified(&self, at: SystemTime) -> &Film {
        lock(&self.object).modified = Some(at);
        self
    }

    /// Makes the bytes depend on this request header, and says so in Vary.
    pub fn vary(&self, header: &str) -> &Film {
        lock(&self.object).vary = Some(header.to_owned());
        self.header("Vary", header)
    }

    /// Misbehaves at the next request.
    pub fn once(&self, fault: Fault) -> &Film {
        self.times(1, fault)
    }

    /// Misbehaves at the next `times` requests.
    pub fn times(&self, times: u32, fault: Fault) -> &Film {
        lock(&self.object).faults.push(Scripted {
            fault,
            times: Some(times),
            from: 0,
        });
        self
    }

    /// Misbehaves until [`Film::behave`].
    pub fn always(&self, fault: Fault) -> &Film {
        self.always_from(0, fault)
    }

    /// Misbehaves at each request for bytes at or after `offset`.
    pub fn always_from(&self, offset: u64, fault: Fault) -> &Film {
        lock(&self.object).faults.push(Scripted {
            fault,
            times: None,
            from: offset,
        });
        self
    }

    /// Misbehaves at the next request for bytes at or after `offset`.
    pub fn once_from(&self, offset: u64, fault: Fault) -> &Film {
        lock(&self.object).faults.push(Scripted {
            fault,
            times: Some(1),
            from: offset,
        });
        self
    }

    /// Behaves well again.
    pub fn behave(&self) -> &Film {
        lock(&self.object).faults.clear();
        self
    }

    /// Holds every answer that is about to send the byte at `offset` of the
    /// object, until the gate is opened. Offset 0 lets the header pass.
    pub fn hold_at(&self, offset: u64) -> Gate {
        let (open, opened) = watch::channel(false);
        let (holding, held) = watch::channel(0);
        let stop = Stop {
            offset,
            open: opened,
            held: Arc::new(holding),
        };
        lock(&self.object).stops.push(stop);
        Gate { open, held }
    }

    /// Every request for this object (any query) so far.
    pub fn seen(&self) -> Vec<Seen> {
        self.shared
            .log()
            .into_iter()
            .filter(|seen| self.is_asked_by(seen))
            .collect()
    }

    /// GETs answered with bytes.
    pub fn fetches(&self) -> usize {
        self.seen().iter().filter(|seen| seen.fetched()).count()
    }

    /// The most requests for this object that waited for their heads at once:
    /// with [`Fault::Delay`], how many a cache has under way.
    pub fn waiting_max(&self) -> usize {
        lock(&self.object).waiting_max
    }

    /// How often each slice of the object was answered, by number, at the
    /// slice size of the test nodes.
    pub fn fetches_per_slice(&self) -> Vec<usize> {
        let mut counts = vec![0; self.slices()];
        for seen in self
            .seen()
            .iter()
            .filter(|seen| seen.fetched() && !seen.body.is_empty())
        {
            for slice in seen.body.start / SLICE_BYTES..=(seen.body.end - 1) / SLICE_BYTES {
                counts[slice as usize] += 1;
            }
        }
        counts
    }

    /// Waits until the requests for this object satisfy `condition`.
    pub async fn until(&self, what: &str, condition: impl Fn(&[Seen]) -> bool) {
        until(&self.shared, what, |log| {
            let ours: Vec<Seen> = log
                .iter()
                .filter(|seen| self.is_asked_by(seen))
                .cloned()
                .collect();
            condition(&ours)
        })
        .await;
    }

    fn is_asked_by(&self, seen: &Seen) -> bool {
        seen.target.split('?').next() == Some(&self.path)
    }
}

impl Object {
    fn new(source: Source, length: u64) -> Object {
        Object {
            source,
            version: 1,
            lengths: vec![length],
            // A day ago: validators that are dates are only strong once they have aged.
            published: SystemTime::now() - Duration::from_secs(86_400),
            modified: None,
            validators: Validators::Strong,
            headers: vec![
                ("Content-Type".into(), "application/octet-stream".into()),
                ("Cache-Control".into(), "public, max-age=3600".into()),
            ],
            vary: None,
            faults: Vec::new(),
            stops: Vec::new(),
            answers: 0,
            waiting: 0,
            waiting_max: 0,
        }
    }

    fn length(&self) -> u64 {
        self.lengths[self.version as usize - 1]
    }

    fn content(&self, version: u32, variant: Option<&str>) -> Content {
        let Source::Generated { mut seed } = self.source else {
            panic!("a file has no generated content");
        };
        for byte in variant.unwrap_or_default().bytes() {
            seed = seed.wrapping_mul(257).wrapping_add(u64::from(byte) + 1);
        }
        Content {
            seed,
            version,
            length: self.lengths[version as usize - 1],
        }
    }

    /// The fault for a request whose first byte is `start`, and which has these
    /// fields; counted off.
    fn fault<'a>(&mut self, start: u64, field: impl Fn(&str) -> Option<&'a str>) -> Option<Fault> {
        let at = self.faults.iter().position(|scripted| {
            let is_meant = match &scripted.fault {
                Fault::Refuses(name, _) => field(name).is_some(),
                Fault::GzipWhereTaken => {
                    field("accept-encoding").is_some_and(|codings| codings.contains("gzip"))
                }
                _ => true,
            };
            is_meant && start >= scripted.from && scripted.times.is_none_or(|times| times > 0)
        })?;
        let scripted = &mut self.faults[at];
        if let Some(times) = &mut scripted.times {
            *times -= 1;
        }
        Some(scripted.fault.clone())
    }
}
