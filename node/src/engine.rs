//! The request path below the front: which manifest answers this request, and
//! where do the bytes of a slice come from?
//!
//! ```text
//! resolve: L1 → L2 → manifest owner → next owner → origin
//! open:    L1 → page cache → flight → L2 ┬ another's: slice owner → next owner → origin
//!                                        └ ours:      the owner before, if it has it → origin
//! answer:  the same for a peer; no peer in it but the owner before (invariant 3)
//! ```
//!
//! Decisions about freshness, floors, ranges and owners are made by pure
//! modules; here they are put in order, and the order is told in one place each.

mod answer;
mod changes;
mod fill;
mod inspect;
mod noted;
mod owners;
mod part;
mod records;
mod replaced;
mod resolve;
mod tags;
mod together;
mod turns;
mod whole;

use std::collections::HashMap;
use std::ops::Deref;
use std::sync::{Arc, LazyLock, Mutex};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures::StreamExt;
use pingora_slice_cluster::peer::Body;
use pingora_slice_cluster::purge::{Floor, Subject, joinable};
use pingora_slice_cluster::slice::{HashKey, Touched, slice_range};
use pingora_slice_cluster::wire::{Informational, OriginRequest, Resolution};
use pingora_slice_cluster::{Cluster, Epoch, Generation, IS_CHECKED, NodeId, ObjectKey, SliceId};
use tokio::runtime::Handle;
use tokio::sync::watch;

use crate::budget::{Budget, Permit};
use crate::config::{Config, Live, Settings};
use crate::flight::{FillError, Flights, SliceReader, Source};
use crate::freshness::{Demands, NotStored, Use, unix_ms};
use crate::l1::{Kept, L1};
use crate::l2::L2;
use crate::manifest::{self, Manifest, Stored};
use crate::metrics::Metrics;
use crate::origin::{Origin, OriginBody};
use crate::plan;
use crate::stitch::StitchLog;
use crate::url::Url;

use changes::Changes;
pub use fill::Fill;
use noted::Noted;
use replaced::Owed;
use tags::OtherTags;
use together::ManifestFlights;
use turns::{Turn, Turns};
use whole::Wholes;

/// How long what an owner holds counts as stale once it has said so: it is having
/// it validated, and is asked again by one hit in that time at most.
const OWNER_IS_STALE_FOR: Duration = Duration::from_millis(100);

/// A client's request, as far as the cache is concerned.
#[derive(Clone, Debug)]
pub struct Request {
    /// The object.
    pub key: ObjectKey,
    /// Its name.
    pub url: Arc<Url>,
    /// What a fill sends to the origin.
    pub origin: Sent,
    /// What the client demands of a cache.
    pub demands: Demands,
    /// First byte that is wanted, as far as known.
    pub first_byte: u64,
    /// Whether the object is fetched in slices.
    pub sliced: bool,
    /// From 0 to 1: what is left to chance is decided once for a request.
    pub chance: f64,
    /// Those in force when it came: it is answered by them to the end.
    pub settings: Arc<Settings>,
}

/// What a fill sends to the origin; built lazily: hits never need it.
#[derive(Clone, Debug)]
pub struct Sent(Arc<LazyLock<OriginRequest, MakeSent>>);

type MakeSent = Box<dyn FnOnce() -> OriginRequest + Send>;

impl Sent {
    /// What `make` puts together, once.
    pub fn new(make: impl FnOnce() -> OriginRequest + Send + 'static) -> Sent {
        Sent(Arc::new(LazyLock::new(Box::new(make))))
    }
}

impl From<OriginRequest> for Sent {
    fn from(request: OriginRequest) -> Sent {
        Sent::new(|| request)
    }
}

impl Deref for Sent {
    type Target = OriginRequest;

    fn deref(&self) -> &OriginRequest {
        &self.0
    }
}

/// An answer under way: no hard purge of what it is made of is acknowledged
/// before this is dropped.
pub struct Answering<'a> {
    engine: &'a Engine,
    object: &'a Stored,
    epoch: Arc<Epoch>,
}

impl Answering<'_> {
    /// Completes when a hard purge has come.
    pub async fn purged(mut self) {
        loop {
            self.epoch.over().await;
            match self.engine.answering(self.object) {
                // Only now is the epoch before let go.
                Some(next) => self.epoch = next.epoch,
                None => return,
            }
        }
    }
}

/// How a request is to be answered.
pub enum Resolved {
    /// From the slices of this manifest.
    Object(Found),
    /// By passing it to the origin; why, in a word.
    Pass(&'static str),
    /// With the origin's answer, which is for this client alone.
    Relay(Box<Relay>),
    /// With an error.
    Failed {
        /// 502, 503 or 504.
        status: u16,
        /// Why.
        reason: Failure,
    },
}

impl Resolved {
    /// Whether it is a failure of the origin that something stale may answer for.
    fn is_passing_failure(&self) -> bool {
        match self {
            Resolved::Failed { .. } => true,
            Resolved::Relay(relay) => resolve::is_passing_failure(relay.status),
            Resolved::Object(_) | Resolved::Pass(_) => false,
        }
    }
}

/// Why a request has no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// The request never reached the origin.
    Unreachable,
    /// The origin's answer broke off.
    BrokeOff,
    /// The request never reached the origin: there was no connection in time.
    NotConnected,
    /// The origin was too slow.
    TimedOut,
    /// The origin answers with an error, to somebody who asked at the same time.
    Fails,
    /// The object's owner found the origin too slow.
    Silent,
    /// No answer of the origin fitted what was asked.
    Disagrees,
    /// The origin did not answer, and this node holds no lease.
    Fenced,
    /// The client wants nothing but what is in the cache.
    OnlyIfCached,
    /// A task of ours ended without an answer, which is a bug.
    Internal,
}

impl Failure {
    /// As `Cache-Status` says it.
    pub fn as_str(self) -> &'static str {
        match self {
            Failure::Unreachable => "origin-unreachable",
            Failure::BrokeOff => "origin-broke-off",
            Failure::NotConnected | Failure::TimedOut => "origin-timed-out",
            Failure::Fails => "origin-fails",
            Failure::Silent => "origin-silent",
            Failure::Disagrees => "origin-disagrees",
            Failure::Fenced => "fenced",
            Failure::OnlyIfCached => "only-if-cached",
            Failure::Internal => "internal",
        }
    }
}

/// A manifest that may be used for this request.
#[derive(Clone)]
pub struct Found {
    /// The manifest.
    pub object: Arc<Stored>,
    /// How it was obtained.
    pub resolution: Resolution,
    /// It is not for this request alone: a 304 may bring what may not be kept.
    pub kept: bool,
    /// The request waited on another's fill.
    pub collapsed: bool,
    /// Why it went beyond this node, where it did.
    pub forwarded: Forwarded,
    /// What the origin said before its answer to this request.
    pub informational: Informational,
}

impl Found {
    /// The name of one of its slices.
    pub(crate) fn slice_id(&self, index: u32) -> SliceId {
        SliceId {
            generation: self.object.manifest.generation,
            index,
        }
    }

    /// What this node held.
    fn stored(object: Arc<Stored>, resolution: Resolution) -> Found {
        Found {
            object,
            resolution,
            kept: true,
            collapsed: false,
            forwarded: Forwarded::default(),
            informational: Informational::new(),
        }
    }
}

/// Why a request was not answered from what this node holds, as RFC 9211
/// section 2.2 names it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Forwarded {
    /// Nothing is stored for the URL.
    #[default]
    UriMiss,
    /// Something is, but no variant for this request.
    VaryMiss,
    /// What is stored is stale, or purged.
    Stale,
    /// What is stored lacks bytes that are wanted.
    Partial,
    /// The request demands it.
    Request,
}

impl Forwarded {
    /// As `Cache-Status` says it.
    pub fn as_str(self) -> &'static str {
        match self {
            Forwarded::UriMiss => "uri-miss",
            Forwarded::VaryMiss => "vary-miss",
            Forwarded::Stale => "stale",
            Forwarded::Partial => "partial",
            Forwarded::Request => "request",
        }
    }
}

/// An answer of the origin that is not kept.
pub struct Relay {
    /// Status code.
    pub status: u16,
    /// End-to-end fields.
    pub headers: http::HeaderMap,
    /// Length of the body where known.
    pub length: Option<u64>,
    /// Why it went beyond this node.
    pub forwarded: Forwarded,
    /// Why it is passed on.
    pub why: NotStored,
    /// What the origin said before it.
    pub informational: Informational,
    /// The body.
    pub body: RelayBody,
}

/// Where a relayed body comes from.
pub enum RelayBody {
    /// Straight from the origin.
    Origin(Box<OriginBody>),
    /// Through the manifest's owner.
    Peer(Body),
    /// It came in one piece, and was kept as well.
    Bytes(Bytes),
}

impl RelayBody {
    /// The next bytes, or `None` at the end.
    ///
    /// # Errors
    /// Why the body broke off, for the log.
    pub async fn next(&mut self) -> Result<Option<Bytes>, String> {
        match self {
            RelayBody::Origin(body) => body.next().await.map_err(|e| e.to_string()),
            RelayBody::Bytes(bytes) if bytes.is_empty() => Ok(None),
            RelayBody::Bytes(bytes) => Ok(Some(std::mem::take(bytes))),
            RelayBody::Peer(body) => match body.next().await {
                None => Ok(None),
                Some(Ok(part)) => Ok(Some(part.bytes)),
                Some(Err(broken)) => Err(broken.to_string()),
            },
        }
    }
}

/// See the module's text. Cheap to clone.
#[derive(Clone)]
pub struct Engine {
    inner: Arc<Inner>,
}

struct Inner {
    config: Config,
    live: Live,
    budget: Budget,
    cluster: Cluster,
    origin: Origin,
    l1: L1,
    l2: Option<L2>,
    /// Slices being filled by this node, from its disk or the origin, and those
    /// being fetched from peers: apart, so that answering a peer never waits on one.
    fills: Arc<Flights>,
    fetches: Arc<Flights>,
    wholes: Wholes,
    manifest_flights: ManifestFlights,
    /// Manifests that are being validated behind stale answers.
    turns: Turns,
    /// Objects that are passed on.
    uncacheable: Noted,
    owed: Owed,
    /// Objects whose answers are waited for by nobody but who causes them.
    unshared: Noted,
    /// Of records in memory.
    changes: Changes,
    other_tags: Mutex<OtherTags>,
    /// Versions whose end is being announced.
    ending: Mutex<HashMap<Generation, watch::Receiver<()>>>,
    stitch: StitchLog,
    metrics: Arc<Metrics>,
    runtime: Handle,
}

/// What is held for a request, and what may be done with it.
struct Held {
    object: Arc<Stored>,
    verdict: Verdict,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    /// Answer with it.
    Use(Use),
    /// A purge covers it, or it is gone: nothing of it may be served before
    /// the origin has been asked.
    Unusable,
}

impl Engine {
    /// An engine over opened stores. Fills run on `runtime`.
    pub fn new(
        config: Config,
        cluster: Cluster,
        origin: Origin,
        l2: Option<L2>,
        metrics: Arc<Metrics>,
        runtime: Handle,
    ) -> Engine {
        let live = Live::new(Settings::of(&config));
        let inner = Inner {
            budget: Budget::new(config.memory),
            l1: L1::new(
                config.l1_bytes_max,
                config.l2.as_ref().map(|l2| l2.bytes_max),
                config.slice_bytes,
            ),
            stitch: StitchLog::new(live.clone(), metrics.clone()),
            live,
            config,
            cluster,
            origin,
            l2,
            fills: Arc::default(),
            fetches: Arc::default(),
            wholes: Wholes::default(),
            manifest_flights: ManifestFlights::default(),
            turns: Turns::default(),
            uncacheable: Noted::default(),
            owed: Owed::default(),
            unshared: Noted::default(),
            changes: Changes::default(),
            other_tags: Mutex::default(),
            ending: Mutex::default(),
            metrics,
            runtime,
        };
        let inner = Arc::new(inner);
        if let Some(l2) = &inner.l2 {
            // Weak: the engine has the disk store, not the other way round.
            let engine = Arc::downgrade(&inner);
            l2.keep_what_is_in_memory(move |id| {
                engine.upgrade().is_some_and(|inner| inner.l1.has_slice(id))
            });
        }
        Engine { inner }
    }

    /// Decides how to answer a GET or HEAD. `gone` names a generation that
    /// this request has already found to be gone at the origin.
    pub async fn resolve(&self, request: &Request, gone: Option<Generation>) -> Resolved {
        let mut forwarded = Forwarded::default();
        let mut resolved = self.resolve_for(request, gone, &mut forwarded).await;
        match &mut resolved {
            Resolved::Object(found) => found.forwarded = forwarded,
            Resolved::Relay(relay) => relay.forwarded = forwarded,
            Resolved::Pass(_) | Resolved::Failed { .. } => {}
        }
        resolved
    }

    /// What is in memory and may be answered with, nobody asked.
    pub fn hit(&self, request: &Request) -> Option<Found> {
        let object = match self.inner.l1.record(request.key.0)? {
            Kept::Manifest(object) => object,
            Kept::Varies(varies) => {
                let fields = &request.origin.headers;
                let (at, variant) = varies.choose(&self.hash_key()?, request.key, fields);
                self.inner.l1.record(at)?.of_variant(&variant)?
            }
        };
        // As in `resolve_for`: the lease is read before the floors.
        (object.manifest.url == *request.url
            && self.inner.cluster.may_serve()
            && self.judge(&object, request, None) == Verdict::Use(Use::Fresh))
        .then(|| Found::stored(object, Resolution::Hit))
    }

    /// The wanted bytes of a slice, a page at most, and where they lay, if that is in
    /// memory, or on disk or with the slice's owner and not worth a place in memory.
    ///
    /// # Errors
    /// The owner cannot give them.
    pub async fn at_hand(
        &self,
        request: &Request,
        found: &Found,
        touched: &Touched,
    ) -> Result<Option<(Bytes, Source)>, FillError> {
        let id = found.slice_id(touched.index);
        self.inner.wholes.note(&id);
        if let Some(slice) = self.inner.l1.slice(&id) {
            let wanted = touched.start as usize..touched.end as usize;
            let is_intact = wanted.end <= slice.len() && slice.is_intact_in(wanted.clone());
            return Ok(is_intact.then(|| (slice.bytes().slice(wanted), Source::L1)));
        }
        let manifest = &found.object.manifest;
        match self.is_keeper(request.key, manifest.place(touched.index)) {
            true => Ok(self.little_on_disk(request, id, manifest, touched).await),
            false => {
                let fill = Fill::of(request.key, manifest, &request.origin, touched.index);
                let Some(reader) = self.open_little(request, &fill, touched, None) else {
                    return Ok(None);
                };
                let flight = reader.flight().clone();
                let bytes = reader.all().await?;
                Ok(bytes.map(|bytes| (bytes, flight.source().unwrap_or(Source::Peer))))
            }
        }
    }

    async fn little_on_disk(
        &self,
        request: &Request,
        id: SliceId,
        manifest: &Manifest,
        touched: &Touched,
    ) -> Option<(Bytes, Source)> {
        let wanted = touched.end - touched.start;
        let slice = slice_range(
            touched.index,
            manifest.length()?,
            manifest.version.slice_bytes,
        );
        let slice_bytes = (slice.end - slice.start) as u32;
        if is_worth_reading_whole(wanted, slice_bytes, request.chance) {
            return None;
        }
        let l2 = self.inner.l2.as_ref()?;
        let read = l2.slice_range(id, touched.start, touched.end).await?;
        (read.bytes.len() as u32 == wanted).then_some((read.bytes, Source::L2))
    }

    async fn resolve_for(
        &self,
        request: &Request,
        gone: Option<Generation>,
        forwarded: &mut Forwarded,
    ) -> Resolved {
        let object = self
            .lookup(request.key, &request.url, || &request.origin.headers)
            .await;
        // Rules 4 and 5: without a lease nothing is served unasked. It is read
        // before the floors, for it vouches for what they say after it.
        let leased = self.inner.cluster.may_serve();
        let held = object.map(|object| {
            let verdict = self.judge(&object, request, gone);
            Held { object, verdict }
        });
        if let (Some(held), true) = (&held, leased) {
            let found =
                |resolution| Resolved::Object(Found::stored(held.object.clone(), resolution));
            match held.verdict {
                Verdict::Use(Use::Fresh) => return found(Resolution::Hit),
                Verdict::Use(Use::Stale) => return found(Resolution::Stale),
                Verdict::Use(Use::StaleWhileRevalidating) => {
                    // One sees to it; the others have nothing to wait for.
                    let Some(turn) = self.turn_to_revalidate(request, &held.object) else {
                        return found(Resolution::Stale);
                    };
                    // The owner may have validated it already, and does so once for all.
                    let Some(owners) = self.stored_at_owner(request, Some(held), gone).await else {
                        self.revalidate_in_background(request, turn);
                        return found(Resolution::Stale);
                    };
                    if owners.resolution == Resolution::Stale {
                        self.inner.runtime.spawn(async move {
                            let _until_then = turn;
                            tokio::time::sleep(OWNER_IS_STALE_FOR).await;
                        });
                    }
                    return Resolved::Object(owners);
                }
                Verdict::Use(Use::Validate) | Verdict::Unusable => {}
            }
        }
        *forwarded = self.why_forwarded(request, held.as_ref());
        if request.demands.only_if_cached {
            if leased && let Some(owners) = self.stored_at_owner(request, held.as_ref(), gone).await
            {
                return Resolved::Object(owners);
            }
            return Resolved::Failed {
                status: 504,
                reason: Failure::OnlyIfCached,
            };
        }
        if self.inner.uncacheable.has(request) {
            return Resolved::Pass("predicted-uncacheable");
        }
        if leased && let Some(resolved) = self.resolve_at_owners(request, held.as_ref(), gone).await
        {
            // Its owner may have lost what is stale here, and then has only the failure.
            let stale = held
                .filter(|_| resolved.is_passing_failure())
                .and_then(|held| self.stale_on_error(Some(&held.object), request, gone));
            return match stale {
                Some(stale) => Resolved::Object(Found::stored(stale, Resolution::Stale)),
                None => resolved,
            };
        }
        self.resolve_at_origin(request, held, gone, leased).await
    }

    fn why_forwarded(&self, request: &Request, held: Option<&Held>) -> Forwarded {
        let Some(held) = held else {
            return match self.inner.l1.record(request.key.0) {
                Some(Kept::Varies(_)) => Forwarded::VaryMiss,
                _ => Forwarded::UriMiss,
            };
        };
        let manifest = &held.object.manifest;
        let fresh = manifest.freshness.is_fresh(unix_ms(SystemTime::now()));
        match held.verdict {
            Verdict::Unusable if !holds_what_is_wanted(manifest, request) => Forwarded::Partial,
            Verdict::Use(Use::Validate) if fresh && !manifest.freshness.no_cache => {
                Forwarded::Request
            }
            _ => Forwarded::Stale,
        }
    }

    /// Begins an answer, known from now on to every hard purge (G2); `None` if
    /// one has come already.
    pub fn answering<'a>(&'a self, object: &'a Stored) -> Option<Answering<'a>> {
        let cluster = &self.inner.cluster;
        let manifest = &object.manifest;
        // Before the floors are looked at: what comes later waits for the answer.
        let epoch = cluster.answering();
        let is_purged = IS_CHECKED
            && !object.passed_floors_at(cluster.version())
            && manifest.stamp < cluster.floor(&manifest.subject).hard;
        (!is_purged).then_some(Answering {
            engine: self,
            object,
            epoch,
        })
    }

    /// Reads a slice for a client: what is in memory, or in the kernel's, at
    /// once, anything else as it lands. With a permit ([`Budget::ahead`]) it is read ahead.
    pub fn open(
        &self,
        request: &Request,
        object: &Arc<Stored>,
        touched: Touched,
        ahead: Option<Permit>,
    ) -> SliceReader {
        let manifest = &object.manifest;
        let id = SliceId {
            generation: manifest.generation,
            index: touched.index,
        };
        if let Some(reader) = self.open_stored(id, &touched, &ahead) {
            return reader;
        }
        let fill = Fill::of(request.key, manifest, &request.origin, touched.index);
        let is_ahead = ahead.is_some();
        if let Some(reader) = self.open_little(request, &fill, &touched, ahead.clone()) {
            return self.read_flight(reader, false, false);
        }
        let permit = ahead.or_else(|| self.inner.budget.ahead(fill.end().into()));
        let opened = match &permit {
            Some(permit) => self.open_cached(&fill, &touched, permit, is_ahead),
            None => self.open_page(&fill, &touched),
        };
        opened.unwrap_or_else(|| self.open_fill(fill, touched, permit))
    }

    /// The memory budget.
    pub fn budget(&self) -> &Budget {
        &self.inner.budget
    }

    /// Bytes in memory.
    pub fn l1_bytes(&self) -> u64 {
        self.inner.l1.bytes()
    }

    /// The cluster.
    pub fn cluster(&self) -> &Cluster {
        &self.inner.cluster
    }

    /// The origin.
    pub fn origin(&self) -> &Origin {
        &self.inner.origin
    }

    /// The configuration that the node was started with. What a reload may have changed
    /// since is in [`Engine::live`].
    pub fn config(&self) -> &Config {
        &self.inner.config
    }

    /// The settings in force.
    pub fn live(&self) -> &Live {
        &self.inner.live
    }

    fn me(&self) -> NodeId {
        self.inner.cluster.view().me
    }

    fn hash_key(&self) -> Option<HashKey> {
        self.inner.cluster.view().hash_key
    }

    /// The manifest held for a request, checked against floors and freshness.
    async fn held(&self, request: &Request, gone: Option<Generation>) -> Option<Held> {
        let object = self
            .lookup(request.key, &request.url, || &request.origin.headers)
            .await?;
        let verdict = self.judge(&object, request, gone);
        Some(Held { object, verdict })
    }

    /// Rule 3, then freshness. A manifest that passed the floors at their
    /// present version is not checked against them again.
    fn judge(&self, object: &Arc<Stored>, request: &Request, gone: Option<Generation>) -> Verdict {
        let manifest = &object.manifest;
        if gone == Some(manifest.generation)
            || self.is_ending(manifest.generation)
            || !holds_what_is_wanted(manifest, request)
        {
            return Verdict::Unusable;
        }
        let version = self.inner.cluster.version();
        let now_ms = unix_ms(SystemTime::now());
        let mut softly_purged = false;
        if IS_CHECKED && !object.passed_floors_at(version) {
            let floor = self.inner.cluster.floor(&manifest.subject);
            if !floor.allows(manifest.stamp) {
                return Verdict::Unusable;
            }
            softly_purged = manifest.stamp < floor.soft;
            if !softly_purged {
                object.note_floors_passed_at(version);
            }
        }
        let usable = request.demands.judge(&manifest.freshness, now_ms);
        match usable {
            Use::Fresh if softly_purged => {
                let freshness = &manifest.freshness;
                let may_wait = freshness.stale_while_revalidate > 0 && !freshness.must_revalidate;
                Verdict::Use(if may_wait {
                    Use::StaleWhileRevalidating
                } else {
                    Use::Validate
                })
            }
            usable => Verdict::Use(usable),
        }
    }

    /// Rule 6 for what another request has brought, its tags known: no purge
    /// of any mode has come since its origin request left.
    fn is_joinable(&self, object: &Stored) -> bool {
        let manifest = &object.manifest;
        joinable(manifest.stamp, self.floor(&manifest.subject))
    }

    fn floor(&self, subject: &Subject) -> Floor {
        self.inner.cluster.floor(subject)
    }

    /// The turn to have a manifest validated that is served stale meanwhile;
    /// `None` while somebody on this node has it.
    fn turn_to_revalidate(&self, request: &Request, object: &Stored) -> Option<Turn> {
        let manifest = &object.manifest;
        let at = manifest::variant_key(&self.hash_key()?, request.key, &manifest.variant);
        let floor = self.floor(&manifest.subject);
        let applied = self.inner.cluster.applied();
        self.inner.turns.take(at, applied, floor)
    }

    /// Not while memory is short: a later hit takes its turn then.
    fn revalidate_in_background(&self, request: &Request, turn: Turn) {
        // For its connection to the origin, or to an owner.
        let Some(permit) = self.inner.budget.ahead(0) else {
            return;
        };
        let engine = self.clone();
        let mut request = request.clone();
        request.demands = Demands {
            no_cache: true,
            // The client's credentials go with it (RFC 9111 section 3.5).
            authorized: request.demands.authorized,
            ..Demands::default()
        };
        self.inner.runtime.spawn(async move {
            let _until_done = (turn, permit);
            // One conditional request for the cluster: the owner's flight collects the rest.
            let held = engine.held(&request, None).await;
            let asked = engine.ask_owners(&request, held.as_ref(), None);
            // An owner that only passes it on says nothing of what is held here.
            if matches!(asked.await, None | Some(Resolved::Pass(_))) {
                let _ = engine.resolve_at_origin(&request, held, None, true).await;
            }
        });
    }

    /// Passes an object's next requests at once: what is found to be of no use for
    /// the cache need not be found out each time.
    pub fn mark_uncacheable(&self, request: &Request) {
        let authorized = request.demands.authorized;
        self.inner.uncacheable.note(request.key, authorized);
    }
}

/// Whether to read a slice on disk, or with its owner, whole, and keep it in memory,
/// when only some of its bytes are wanted: so often that, over many requests, it adds
/// a quarter to what is read. What is wanted again and again thus comes into memory,
/// and what is wanted at random costs its own bytes. `chance` is from 0 to 1.
fn is_worth_reading_whole(wanted: u32, slice_bytes: u32, chance: f64) -> bool {
    const READ_IN_PARTS: f64 = 4.0;
    wanted >= slice_bytes || chance * READ_IN_PARTS * f64::from(slice_bytes) < f64::from(wanted)
}

/// Whether a manifest of which only a part is held can answer a request.
fn holds_what_is_wanted(manifest: &Manifest, request: &Request) -> bool {
    let (Some((start, end)), Some(length)) = (manifest.part, manifest.length()) else {
        return true;
    };
    let headers = manifest::to_map(&request.origin.headers);
    plan::is_within(&headers, length, &(start..end))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_read_for_four_times_the_bytes_of_a_slice_and_small_objects_whole() {
        const SLICE: u32 = 1 << 20;
        for (wanted, share) in [(65_536, 1.0 / 64.0), (SLICE / 2, 0.125), (SLICE, 1.0)] {
            let chances = (0..6400).map(|n| f64::from(n) / 6400.0);
            let read = chances.filter(|chance| is_worth_reading_whole(wanted, SLICE, *chance));
            assert_eq!(read.count() as f64 / 6400.0, share, "{wanted}");
        }
    }
}
