//! The request path below the front: which manifest answers this request, and
//! where do the bytes of a slice come from?
//!
//! ```text
//! resolve: L1 → L2 → manifest owner → origin          (resolve.rs holds the origin's part)
//! open:    L1 → flight → L2 → slice owner → next owner → origin
//! answer:  the same for a peer, without any peer in it (invariant 3)
//! ```
//!
//! Decisions about freshness, floors, ranges and owners are made by pure
//! modules; here they are put in order, and the order is told in one place each.

mod answer;
mod changes;
mod fill;
mod inspect;
mod noted;
mod part;
mod resolve;
mod tags;
mod turns;
mod whole;

use std::collections::HashMap;
use std::ops::Deref;
use std::sync::{Arc, LazyLock, Mutex};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures::StreamExt;
use http::header::{CONTENT_LOCATION, HeaderMap, LOCATION};
use pingora_slice_cluster::peer::{Body, PeerError};
use pingora_slice_cluster::purge::{Floor, PurgeItem, PurgeMode, Scope, Subject, joinable};
use pingora_slice_cluster::slice::{HashKey, Touched};
use pingora_slice_cluster::wire::{
    Answer, Ask, Headers, Informational, OriginRequest, Resolution, ResolveAsk,
};
use pingora_slice_cluster::{Cluster, Epoch, Generation, IS_CHECKED, NodeId, ObjectKey, SliceId};
use tokio::runtime::Handle;
use tokio::sync::watch;

use crate::budget::{Budget, Permit};
use crate::config::Config;
use crate::flight::{Flights, SliceReader, Source};
use crate::freshness::{self, Demands, NotStored, Policy, Use, unix_ms};
use crate::l1::{Kept, L1};
use crate::l2::L2;
use crate::manifest::{self, Manifest, Record, Stored, Url};
use crate::metrics::Metrics;
use crate::origin::{Origin, OriginBody};
use crate::plan;
use crate::purge::normalise_host;
use crate::stitch::StitchLog;

use changes::Changes;
pub use fill::Fill;
use noted::Noted;
use resolve::Resolves;
use tags::OtherTags;
use turns::{Turn, Turns};
use whole::Wholes;

/// How long a peer may be silent before it is asked whether it lives.
const PATIENCE: Duration = Duration::from_millis(750);
/// How long a living peer takes to say so, at most.
const PING: Duration = Duration::from_millis(500);
/// A peer's answer in all: an origin's slowest head, and as much again.
const ASK_DEADLINE: Duration = Duration::from_secs(60);
/// Owners asked for one thing before the origin is.
const OWNERS_TRIED: usize = 3;
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

/// Why a request has no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// The request never reached the origin.
    Unreachable,
    /// The origin's answer broke off.
    BrokeOff,
    /// The origin was too slow.
    TimedOut,
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
            Failure::TimedOut => "origin-timed-out",
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
    budget: Budget,
    policy: Policy,
    cluster: Cluster,
    origin: Origin,
    l1: L1,
    l2: Option<L2>,
    /// Slices being filled by this node, from its disk or the origin, and those
    /// being fetched from peers: apart, so that answering a peer never waits on one.
    fills: Arc<Flights>,
    fetches: Arc<Flights>,
    wholes: Wholes,
    resolves: Resolves,
    /// Manifests that are being validated behind stale answers.
    turns: Turns,
    /// Objects that are passed on.
    uncacheable: Noted,
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
        let inner = Inner {
            policy: Policy {
                default_freshness: config.default_freshness,
                cache_ttl: config.cache_ttl,
                caching: config.caching.clone(),
            },
            budget: Budget::new(config.memory),
            l1: L1::new(
                config.l1_bytes_max,
                config.l2.as_ref().map(|l2| l2.bytes_max),
                config.slice_bytes,
            ),
            stitch: StitchLog::new(config.stitch_log, metrics.clone()),
            config,
            cluster,
            origin,
            l2,
            fills: Arc::default(),
            fetches: Arc::default(),
            wholes: Wholes::default(),
            resolves: Resolves::default(),
            turns: Turns::default(),
            uncacheable: Noted::default(),
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
                let variant = manifest::variant_of(&varies.1, &request.origin.headers);
                let at = manifest::variant_key(&self.hash_key()?, request.key, &variant);
                match self.inner.l1.record(at)? {
                    Kept::Manifest(object) if object.manifest.variant == variant => object,
                    _ => return None,
                }
            }
        };
        // As in `resolve_for`: the lease is read before the floors.
        (object.manifest.url == *request.url
            && self.inner.cluster.may_serve()
            && self.judge(&object, request, None) == Verdict::Use(Use::Fresh))
        .then(|| Found::stored(object, Resolution::Hit))
    }

    /// The wanted bytes of a slice, and where they lay, if that is in memory, or
    /// on disk and not worth a place in memory. Nobody is asked.
    pub async fn at_hand(
        &self,
        key: ObjectKey,
        found: &Found,
        touched: &Touched,
    ) -> Option<(Bytes, Source)> {
        let id = found.slice_id(touched.index);
        self.inner.wholes.note(&id);
        if let Some(slice) = self.inner.l1.slice(&id) {
            let wanted = touched.start as usize..touched.end as usize;
            return (wanted.end <= slice.len() && slice.is_intact_in(wanted.clone()))
                .then(|| (slice.bytes().slice(wanted), Source::L1));
        }
        let (wanted, manifest) = (touched.end - touched.start, &found.object.manifest);
        if !self.is_keeper(key, manifest.place(touched.index)) {
            return None;
        }
        let slice_bytes = u64::from(manifest.version.slice_bytes);
        let start = u64::from(touched.index) * slice_bytes;
        // The last one is shorter, and the only one of a small object.
        let slice_bytes = (manifest.length()? - start).min(slice_bytes);
        if is_worth_reading_whole(wanted, slice_bytes as u32, rand::random()) {
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
            return resolved;
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

    /// Why a response to this request is not kept; `None` where it is too large.
    pub fn why_not_stored(
        &self,
        request: &Request,
        status: u16,
        headers: &HeaderMap,
    ) -> Option<NotStored> {
        let now_ms = unix_ms(SystemTime::now());
        let policy = &self.inner.policy;
        freshness::store(policy, &request.demands, status, headers, now_ms, now_ms).err()
    }

    /// Begins an answer, known from now on to every hard purge (G2); `None` if
    /// one has come already.
    pub fn answering<'a>(&'a self, object: &'a Stored) -> Option<Answering<'a>> {
        let cluster = &self.inner.cluster;
        let manifest = &object.manifest;
        // Before the floors are looked at: what comes later waits for the answer.
        let epoch = cluster.answering();
        let is_purged = IS_CHECKED
            && !object.is_checked(cluster.version())
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
        self.open_cached(&fill, &touched, &ahead)
            .unwrap_or_else(|| self.open_fill(fill, touched, ahead))
    }

    /// The memory budget.
    pub fn budget(&self) -> &Budget {
        &self.inner.budget
    }

    /// Bytes in memory.
    pub fn l1_bytes(&self) -> u64 {
        self.inner.l1.bytes()
    }

    /// The disk store.
    pub fn l2(&self) -> Option<&L2> {
        self.inner.l2.as_ref()
    }

    /// The cluster.
    pub fn cluster(&self) -> &Cluster {
        &self.inner.cluster
    }

    /// The origin.
    pub fn origin(&self) -> &Origin {
        &self.inner.origin
    }

    /// The configuration.
    pub fn config(&self) -> &Config {
        &self.inner.config
    }

    fn me(&self) -> NodeId {
        self.inner.cluster.view().me
    }

    fn hash_key(&self) -> Option<HashKey> {
        self.inner.cluster.view().hash_key
    }

    /// Whom to ask for slice `place` of an object, in order; this node alone
    /// where there is no ring yet.
    fn owners(&self, key: ObjectKey, place: u32) -> Vec<NodeId> {
        let view = self.inner.cluster.view();
        let owners = view.ring.owners(key, place);
        if owners.is_empty() {
            vec![view.me]
        } else {
            owners.iter().copied().take(OWNERS_TRIED).collect()
        }
    }

    /// The node that owned slice `place` before the last change of the ring, where
    /// this one owns it now: asked for the bytes it has stored, which waits for
    /// nobody. Not for manifests: what it knows may have been overtaken here.
    fn owner_before(&self, key: ObjectKey, place: u32) -> Option<NodeId> {
        let view = self.inner.cluster.view();
        let first =
            |ring: &pingora_slice_cluster::ring::Ring| ring.owners(key, place).first().copied();
        let before = first(&view.previous_ring)?;
        (first(&view.ring) == Some(view.me) && before != view.me).then_some(before)
    }

    /// Whether this node keeps slice `place` of an object on its disk.
    fn is_keeper(&self, key: ObjectKey, place: u32) -> bool {
        let view = self.inner.cluster.view();
        view.ring
            .owners(key, place)
            .first()
            .is_none_or(|owner| *owner == view.me)
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
        if IS_CHECKED && !object.is_checked(version) {
            let floor = self.inner.cluster.floor(&manifest.subject);
            if manifest.stamp < floor.plain {
                return Verdict::Unusable;
            }
            softly_purged = manifest.stamp < floor.soft;
            if !softly_purged {
                object.checked(version);
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

    /// L1, then L2; through the pointer where the object varies: only then are
    /// the request's fields looked at.
    async fn lookup<'a>(
        &self,
        key: ObjectKey,
        url: &Url,
        headers: impl FnOnce() -> &'a Headers,
    ) -> Option<Arc<Stored>> {
        match self.record(key.0).await? {
            Kept::Manifest(object) => (object.manifest.url == *url).then_some(object),
            Kept::Varies(varies) => {
                if varies.0 != *url {
                    return None;
                }
                let variant = manifest::variant_of(&varies.1, headers());
                match self
                    .record(manifest::variant_key(&self.hash_key()?, key, &variant))
                    .await?
                {
                    Kept::Manifest(object) => {
                        let matches =
                            object.manifest.url == *url && object.manifest.variant == variant;
                        matches.then_some(object)
                    }
                    Kept::Varies(_) => None,
                }
            }
        }
    }

    async fn record(&self, key: u128) -> Option<Kept> {
        /// A miss after so many, each overtaken by a change.
        const READ_AGAIN_MAX: usize = 3;
        for _ in 0..READ_AGAIN_MAX {
            if let Some(kept) = self.inner.l1.record(key) {
                return Some(kept);
            }
            let since = self.inner.changes.so_far(key);
            let kept = self.record_on_disk(key).await?;
            // What has been kept meanwhile is newer; what has been forgotten is gone.
            let promoted = self.inner.changes.unless_changed(key, since, || {
                self.inner.l1.keep_record(key, kept.clone());
            });
            if promoted.is_some() {
                return Some(kept);
            }
        }
        None
    }

    async fn record_on_disk(&self, key: u128) -> Option<Kept> {
        let bytes = self.inner.l2.as_ref()?.manifest(key).await?;
        match manifest::decode(&bytes)? {
            // A body that was under way when the node stopped.
            Record::Manifest(manifest)
                if manifest.length().is_none()
                    && self.inner.wholes.get(manifest.generation).is_none() =>
            {
                None
            }
            Record::Manifest(manifest) => Some(Kept::Manifest(Arc::new(Stored::new(*manifest)))),
            Record::Varies { url, by } => Some(Kept::Varies(Arc::new((url, by)))),
        }
    }

    /// Keeps a manifest in memory, and on disk where it belongs.
    fn keep(&self, key: ObjectKey, manifest: Manifest) -> Arc<Stored> {
        let mut manifest = self.for_all(&manifest).unwrap_or(manifest);
        let Some(hash_key) = self.hash_key() else {
            return Arc::new(Stored::new(manifest));
        };
        let at = manifest::variant_key(&hash_key, key, &manifest.variant);
        let on_disk = self.inner.l2.as_ref().filter(|_| self.is_keeper(key, 0));
        let keep = |at, record: Record, kept| {
            if let Some(l2) = on_disk {
                l2.keep_manifest(at, manifest::encode(&record).into());
            }
            self.inner.l1.keep_record(at, kept);
        };
        let changing = self.inner.changes.begin(at);
        if let Some(Kept::Manifest(known)) = self.inner.l1.record(at) {
            match with_length(&known.manifest, &manifest) {
                Some(both) => manifest = both,
                // An answer that was long under way does not replace a newer one.
                None if known.manifest.stamp > manifest.stamp => {
                    return Arc::new(Stored::new(manifest));
                }
                None => {}
            }
        }
        let by = (!manifest.variant.is_empty()).then(|| manifest.varies_by());
        let url = manifest.url.clone();
        let object = Arc::new(Stored::new(manifest));
        let record = Record::Manifest(Box::new(object.manifest.clone()));
        keep(at, record, Kept::Manifest(object.clone()));
        drop(changing);
        if let Some(by) = by {
            let _changing = self.inner.changes.begin(key.0);
            let record = Record::Varies {
                url: url.clone(),
                by: by.clone(),
            };
            keep(key.0, record, Kept::Varies(Arc::new((url, by))));
        }
        object
    }

    /// Keeps a manifest, and returns it as its asker may have it.
    fn keep_for_asker(&self, key: ObjectKey, manifest: Manifest) -> Arc<Stored> {
        match self.for_all(&manifest) {
            None => self.keep(key, manifest),
            Some(stored) => {
                self.keep(key, stored);
                Arc::new(Stored::new(manifest))
            }
        }
    }

    /// The manifest without what is for its asker alone, where there is any.
    fn for_all(&self, manifest: &Manifest) -> Option<Manifest> {
        let withheld =
            freshness::withheld(&self.inner.policy, &manifest::to_map(&manifest.headers));
        if withheld.is_empty() {
            return None;
        }
        let mut manifest = manifest.clone();
        manifest
            .headers
            .retain(|(name, _)| !withheld.iter().any(|w| w.as_str() == name));
        Some(manifest)
    }

    /// The manifest that a fill belongs to, while it is the current one.
    async fn manifest_of(&self, fill: &Fill) -> Option<Manifest> {
        let url = fill.url();
        let object = self
            .lookup(fill.key, &url, || &fill.request.headers)
            .await?;
        (object.manifest.generation == fill.slice.generation).then(|| object.manifest.clone())
    }

    /// Whether no other version has replaced this one.
    async fn is_current(&self, fill: &Fill) -> bool {
        let url = fill.url();
        let known = self.lookup(fill.key, &url, || &fill.request.headers).await;
        known.is_none_or(|object| object.manifest.generation == fill.slice.generation)
    }

    /// Forgets a manifest whose bytes cannot be had.
    fn forget_manifest(&self, key: ObjectKey, manifest: &Manifest) {
        let Some(hash_key) = self.hash_key() else {
            return;
        };
        self.forget_record(manifest::variant_key(&hash_key, key, &manifest.variant));
    }

    fn forget_record(&self, at: u128) {
        let _changing = self.inner.changes.begin(at);
        self.inner.l1.drop_record(at);
        if let Some(l2) = &self.inner.l2 {
            l2.drop_manifest(at);
        }
    }

    /// What the object's owner holds and may be answered with, where that is
    /// another node.
    async fn stored_at_owner(
        &self,
        request: &Request,
        held: Option<&Held>,
        gone: Option<Generation>,
    ) -> Option<Found> {
        let owner = *self.owners(request.key, 0).first()?;
        if owner == self.me() {
            return None;
        }
        match self.resolve_at(owner, request, held, gone, true).await? {
            Resolved::Object(found) => Some(found),
            _ => None,
        }
    }

    /// The answer of the first of the manifest's owners that is of use.
    async fn ask_owners(
        &self,
        request: &Request,
        held: Option<&Held>,
        gone: Option<Generation>,
    ) -> Option<Resolved> {
        for owner in self.owners(request.key, 0) {
            if owner == self.me() {
                break;
            }
            let answer = self.resolve_at(owner, request, held, gone, false).await;
            if answer.is_some() {
                return answer;
            }
        }
        None
    }

    /// Asks the manifest's owner. `None`: it is of no use, go on.
    async fn resolve_at(
        &self,
        owner: NodeId,
        request: &Request,
        held: Option<&Held>,
        gone: Option<Generation>,
        stored_only: bool,
    ) -> Option<Resolved> {
        let hash_key = self.hash_key()?;
        let subject = Subject::new(
            &hash_key,
            &request.url.host,
            &request.url.target,
            &[] as &[&str],
        );
        let ask = Ask::Resolve(ResolveAsk {
            key: request.key,
            request: OriginRequest::clone(&request.origin),
            floor: self.floor(&subject).plain,
            hard: self.inner.cluster.hard_for_new(&subject),
            first_byte: request.first_byte,
            sliced: request.sliced,
            revalidate: held.is_some_and(|h| h.verdict == Verdict::Use(Use::Validate))
                && request.demands.no_cache,
            gone,
            stored_only,
        });
        let (answer, body) = match self.ask(owner, &ask).await {
            Ok(answered) => answered,
            Err(error) => {
                tracing::debug!(%owner, %error, "manifest owner bypassed");
                return None;
            }
        };
        match answer {
            Answer::Manifest {
                manifest,
                resolution,
                collapsed,
                informational,
            } => {
                let Some(Record::Manifest(manifest)) = manifest::decode(&manifest) else {
                    return None;
                };
                if manifest.url != *request.url {
                    return None;
                }
                // While its length is unknown it is of use to its owner alone.
                let object = match manifest.length() {
                    Some(_) => self.keep_for_asker(request.key, *manifest),
                    None => Arc::new(Stored::new(*manifest)),
                };
                // Rules 3 and 4, after the wait: what just came from the
                // origin is this request's own answer; anything else is judged.
                let asked_origin = matches!(resolution, Resolution::Miss | Resolution::Revalidated);
                let usable = self.inner.cluster.may_serve()
                    && self.judge(&object, request, gone) != Verdict::Unusable
                    // An owner that is behind takes for fresh what a soft purge has made stale.
                    && (resolution == Resolution::Stale || self.is_joinable(&object));
                if !usable && (!asked_origin || collapsed) {
                    return None;
                }
                Some(Resolved::Object(Found {
                    object,
                    resolution,
                    collapsed,
                    forwarded: Forwarded::default(),
                    informational,
                }))
            }
            Answer::Relay {
                status,
                headers,
                informational,
            } => {
                let headers = manifest::to_map(&headers);
                let why = self.why_not_stored(request, status, &headers);
                if why.is_some() {
                    self.takes_away(request, status, why).await;
                }
                let length = headers
                    .get(http::header::CONTENT_LENGTH)
                    .and_then(|v| v.to_str().ok()?.parse().ok());
                Some(Resolved::Relay(Box::new(Relay {
                    status,
                    headers,
                    length,
                    forwarded: Forwarded::default(),
                    informational,
                    body: RelayBody::Peer(body?),
                })))
            }
            Answer::Uncacheable => Some(Resolved::Pass("uncacheable")),
            // It reached the origin, and has had its tries.
            Answer::Failed { status } => Some(Resolved::Failed {
                status,
                reason: match status {
                    504 => Failure::Silent,
                    _ => Failure::BrokeOff,
                },
            }),
            // Its way to the origin may be cut; ours need not be.
            Answer::Behind | Answer::Busy | Answer::Missing => None,
            Answer::Slice { .. } | Answer::PastEnd | Answer::Changed => None,
        }
    }

    /// Asks a peer and waits while it lives: an owner that waits for a slow
    /// origin is not a dead one.
    async fn ask(&self, peer: NodeId, ask: &Ask) -> Result<(Answer, Option<Body>), PeerError> {
        let label = peer.to_string();
        let mut asking = std::pin::pin!(self.inner.cluster.ask(peer, ask, ASK_DEADLINE));
        let result = loop {
            match tokio::time::timeout(PATIENCE, &mut asking).await {
                Ok(result) => break result,
                Err(_) if self.is_alive(peer).await => {}
                Err(_) => break Err(PeerError::TimedOut { peer }),
            }
        };
        let outcome = match &result {
            Ok(_) => "ok",
            Err(PeerError::Unreachable { .. }) => "unreachable",
            Err(PeerError::TimedOut { .. }) => "timeout",
            Err(PeerError::Refused { .. }) => "refused",
        };
        self.inner
            .metrics
            .peer_requests_total
            .with_label_values(&[label.as_str(), outcome])
            .inc();
        result
    }

    async fn is_alive(&self, peer: NodeId) -> bool {
        self.inner.cluster.is_alive(peer, PING).await
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
            if asked.await.is_none() {
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

    /// Forgets a version everywhere: the origin has another, and answers from
    /// the old one would end short. Once, however many slices found it out.
    /// Returns when it is forgotten, so that whoever was cut off may ask again;
    /// at the latest after a second, should a node not answer.
    async fn announce_change(&self, fill: &Fill) {
        const ANNOUNCED_WITHIN: Duration = Duration::from_secs(1);
        let Some(hash_key) = self.hash_key() else {
            return;
        };
        let url = fill.url();
        let subject = Subject::new(&hash_key, &url.host, &url.target, &[] as &[&str]);
        if self.floor(&subject).plain > fill.stamp {
            return;
        }
        let mut announced = self.announcement(fill.slice.generation, url);
        // An error says that the other end is gone: it is done.
        let _ = tokio::time::timeout(ANNOUNCED_WITHIN, announced.changed()).await;
    }

    /// The announcement of a version's end, begun if need be.
    fn announcement(&self, generation: Generation, url: Url) -> watch::Receiver<()> {
        let mut ending = self.inner.ending.lock().expect("no panic while held");
        if let Some(announced) = ending.get(&generation) {
            return announced.clone();
        }
        let (done, announced) = watch::channel(());
        ending.insert(generation, announced.clone());
        let engine = self.clone();
        self.inner.runtime.spawn(async move {
            engine.purge_all_of(&[url]).await;
            let mut ending = engine.inner.ending.lock().expect("no panic while held");
            ending.remove(&generation);
            drop(done);
        });
        announced
    }

    /// Whether a version's end is being announced: it is of no use already.
    fn is_ending(&self, generation: Generation) -> bool {
        let ending = self.inner.ending.lock().expect("no panic while held");
        ending.contains_key(&generation)
    }

    /// After an unsafe method succeeded (RFC 9111 section 4.4): its URL, and
    /// those of the same host that the answer names, have changed. Returns
    /// when no node answers from before any more, or none can promise it.
    pub async fn purge_changed(&self, url: &Url, response: &HeaderMap) {
        let mut urls = vec![url.clone()];
        for name in [LOCATION, CONTENT_LOCATION] {
            let Some(value) = response.get(name).and_then(|v| v.to_str().ok()) else {
                continue;
            };
            let target = reference(url, value).map(|t| self.inner.config.caching.query.apply(t));
            urls.extend(target.map(|target| Url {
                host: url.host.clone(),
                target,
            }));
        }
        let mut known = Vec::new();
        for url in urls {
            if let Some(key) = self.hash_key()
                && self
                    .is_stored_anywhere(key.object(&url.host, &url.target), &url)
                    .await
            {
                known.push(url);
            }
        }
        self.purge_all_of(&known).await;
    }

    /// Whether this node holds something under a key: a variant, or a stale one,
    /// counts, and what a disk that hangs may hold.
    async fn may_be_stored(&self, key: ObjectKey) -> bool {
        self.record(key.0).await.is_some() || self.inner.l2.as_ref().is_some_and(L2::hangs)
    }

    /// Whether this node or the manifest's owner holds something under a URL.
    async fn is_stored_anywhere(&self, key: ObjectKey, url: &Url) -> bool {
        if self.may_be_stored(key).await {
            return true;
        }
        let request = OriginRequest {
            host: url.host.clone(),
            target: url.target.clone(),
            headers: Vec::new(),
        };
        let ask = Ask::Resolve(ResolveAsk::what_is_stored(key, request));
        match self.owners(key, 0).first() {
            Some(owner) if *owner != self.me() => {
                !matches!(self.ask(*owner, &ask).await, Ok((Answer::Missing, _)))
            }
            _ => false,
        }
    }

    /// Purges on all nodes what has changed at the origin.
    async fn purge_all_of(&self, urls: &[Url]) {
        let (Some(first), Some(key)) = (urls.first(), self.hash_key()) else {
            return;
        };
        let items: Vec<PurgeItem> = urls
            .iter()
            .map(|url| PurgeItem {
                scope: Scope::url(&key, &url.host, &url.target),
                mode: PurgeMode::Plain,
            })
            .collect();
        let count = items.len();
        if let Err(error) = self.inner.cluster.purge(items, rand::random()).await {
            tracing::warn!(url = %first, count, %error, "what has changed was not purged");
        }
    }
}

/// Whether to read a slice on disk whole, and keep it in memory, when only some of
/// its bytes are wanted: so often that, over many requests, it adds a quarter to
/// what is read from disk. What is wanted again and again thus comes into memory,
/// and what is wanted at random costs its own bytes. `chance` is from 0 to 1.
fn is_worth_reading_whole(wanted: u32, slice_bytes: u32, chance: f64) -> bool {
    const READ_IN_PARTS: f64 = 4.0;
    wanted >= slice_bytes || chance * READ_IN_PARTS * f64::from(slice_bytes) < f64::from(wanted)
}

/// The newer of two manifests of one version, with the length that the other has:
/// a body that came without one has it since its end, which a validation may overlap.
/// `None`: there is none to be had from the other.
fn with_length(known: &Manifest, ours: &Manifest) -> Option<Manifest> {
    if known.generation != ours.generation {
        return None;
    }
    let age = |manifest: &Manifest| (manifest.stamp, manifest.freshness.received_ms);
    let newer = match age(known) > age(ours) {
        true => known,
        false => ours,
    };
    let length = match (known.length(), ours.length()) {
        (Some(length), None) | (None, Some(length)) => length,
        _ => return None,
    };
    let mut both = newer.clone();
    both.version.length = Some(length);
    Some(both)
}

/// Whether a manifest of which only a part is held can answer a request.
fn holds_what_is_wanted(manifest: &Manifest, request: &Request) -> bool {
    let (Some((start, end)), Some(length)) = (manifest.part, manifest.length()) else {
        return true;
    };
    let headers = manifest::to_map(&request.origin.headers);
    plan::is_within(&headers, length, &(start..end))
}

/// The path and query that a reference in an answer about `url` names, where it
/// is on the same host (RFC 3986 section 5.2).
fn reference(url: &Url, value: &str) -> Option<String> {
    let value = value.split('#').next().unwrap_or_default();
    let authority = match value.split_once("://") {
        Some((scheme, rest)) if scheme.bytes().all(|b| b.is_ascii_alphanumeric()) => Some(rest),
        _ => value.strip_prefix("//"),
    };
    if let Some(rest) = authority {
        let (host, path) = rest.split_at(rest.find(['/', '?']).unwrap_or(rest.len()));
        let slash = if path.starts_with('/') { "" } else { "/" };
        return (normalise_host(host) == url.host).then(|| format!("{slash}{path}"));
    }
    let base = url.target.split('?').next().unwrap_or_default();
    Some(match value.chars().next() {
        None => url.target.clone(),
        Some('/') => value.to_owned(),
        Some('?') => format!("{base}{value}"),
        Some(_) => {
            let (path, query) = value.split_at(value.find('?').unwrap_or(value.len()));
            let folder = base.rsplit_once('/').map_or("", |(folder, _)| folder);
            let mut segments: Vec<&str> = folder.split('/').skip(1).collect();
            for segment in path.split('/') {
                match segment {
                    "." => {}
                    ".." => drop(segments.pop()),
                    segment => segments.push(segment),
                }
            }
            if path.ends_with("/.") || path.ends_with("..") || path == "." {
                segments.push("");
            }
            format!("/{}{query}", segments.join("/"))
        }
    })
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

    #[test]
    fn references_are_resolved_against_the_url() {
        let url = Url {
            host: "films.test".into(),
            target: "/a/b/form?x=1".into(),
        };
        for (value, target) in [
            ("", Some("/a/b/form?x=1")),
            ("/c", Some("/c")),
            ("?y", Some("/a/b/form?y")),
            ("c?y", Some("/a/b/c?y")),
            ("./c", Some("/a/b/c")),
            ("../c", Some("/a/c")),
            ("../../../c", Some("/c")),
            ("..", Some("/a/")),
            ("c/d#part", Some("/a/b/c/d")),
            ("http://Films.test/c", Some("/c")),
            ("HTTPS://films.test:443", Some("/")),
            ("//films.test/c", Some("/c")),
            ("http://elsewhere.test/c", None),
            ("//elsewhere.test/c", None),
        ] {
            assert_eq!(reference(&url, value).as_deref(), target, "{value:?}");
        }
    }
}
