//! One request for everybody who waits, to a manifest's owners or to the origin.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Instant, SystemTime};

use pingora_slice_cluster::purge::joinable;
use pingora_slice_cluster::wire::{Informational, Resolution};
use pingora_slice_cluster::{Generation, ObjectKey, PurgeIndex};
use tokio::sync::watch;

use super::records::for_all;
use super::resolve::is_passing_failure;
use super::{Engine, Failure, Forwarded, Found, Held, Relay, Request, Resolved, Verdict};
use crate::config::Settings;
use crate::freshness::{Demands, Use, unix_ms};
use crate::l1::Kept;
use crate::manifest::Stored;

/// Flights that one request joins in vain before it goes alone: the first may
/// tell that the object varies, the next is for its own variant.
const JOINS_MAX: usize = 3;

/// Whom a request for a manifest asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Whom {
    Owners,
    Origin,
}

/// The requests under way, by the key under which a manifest will be kept, as
/// far as it is known that the object varies, and whether credentials are sent:
/// what those bring is rarely for others. Those that ask other nodes are
/// apart, so that answering a peer never waits on one (invariant 3).
#[derive(Default)]
pub(super) struct ManifestFlights {
    at_owners: Mutex<HashMap<(u128, bool), Arc<ManifestFlight>>>,
    at_origin: Mutex<HashMap<(u128, bool), Arc<ManifestFlight>>>,
}

impl ManifestFlights {
    fn of(&self, whom: Whom) -> &Mutex<HashMap<(u128, bool), Arc<ManifestFlight>>> {
        match whom {
            Whom::Owners => &self.at_owners,
            Whom::Origin => &self.at_origin,
        }
    }

    /// Whether somebody asks for an object that no more is known of than its key.
    pub(super) fn has(&self, key: ObjectKey) -> bool {
        [&self.at_owners, &self.at_origin].iter().any(|flights| {
            let flights = flights.lock().expect("no panic while held");
            [false, true]
                .iter()
                .any(|authorized| flights.contains_key(&(key.0, *authorized)))
        })
    }
}

/// One request for a manifest, and those who wait for it.
pub(super) struct ManifestFlight {
    /// Purge index applied before it began (rule 1).
    pub(super) stamp: PurgeIndex,
    pub(super) gone: Option<Generation>,
    /// By which its answer is judged: those of the request that began it.
    settings: Arc<Settings>,
    outcome: watch::Sender<Option<Outcome>>,
    /// The origin's answer where it may not be shared: for whoever started it.
    relay: Mutex<Option<Relay>>,
    /// What the origin said before its answer: for whoever started it.
    informational: Mutex<Informational>,
    /// The owner had it from somebody else's request: for whoever started it.
    collapsed: AtomicBool,
    /// Its answer is not stored, and took away what was.
    pub(super) took_away: AtomicBool,
}

impl ManifestFlight {
    /// Whether other nodes must be told: they may still answer from `old` unasked.
    /// Those that serve it stale ask its owner first, and hear of a new version
    /// there, but not that there is none to keep.
    fn replaces(&self, outcome: &Outcome, old: &Stored) -> bool {
        let old = &old.manifest;
        let staleness = old.freshness.staleness(unix_ms(SystemTime::now()));
        if self.took_away.load(Ordering::Relaxed) {
            return staleness <= old.freshness.stale_while_revalidate;
        }
        let other = match outcome {
            Outcome::Object(object, Resolution::Miss) => {
                object.manifest.generation != old.generation
            }
            _ => false,
        };
        other && old.freshness.is_fresh(unix_ms(SystemTime::now()))
    }

    pub(super) fn note_informational(&self, informational: Informational) {
        *self.informational.lock().expect("no panic while held") = informational;
    }

    fn take_informational(&self) -> Informational {
        std::mem::take(&mut *self.informational.lock().expect("no panic while held"))
    }

    pub(super) fn put_relay(&self, relay: Relay) {
        *self.relay.lock().expect("no panic while held") = Some(relay);
    }

    fn take_relay(&self) -> Option<Relay> {
        self.relay.lock().expect("no panic while held").take()
    }

    /// What the owners' answer is for everybody; what is for the starter alone
    /// is put aside.
    fn outcome_of(&self, answer: Option<Resolved>) -> Outcome {
        match answer {
            Some(Resolved::Object(found)) => {
                self.note_informational(found.informational);
                self.collapsed.store(found.collapsed, Ordering::Relaxed);
                match found.kept {
                    true => Outcome::Object(found.object, found.resolution),
                    false => Outcome::Alone(found.object, found.resolution),
                }
            }
            Some(Resolved::Relay(mut relay)) => {
                self.note_informational(std::mem::take(&mut relay.informational));
                let others = Others::of(relay.status);
                self.put_relay(*relay);
                Outcome::Relay(others)
            }
            Some(Resolved::Pass(_)) => Outcome::Uncacheable,
            Some(Resolved::Failed { status, reason }) => Outcome::Failed { status, reason },
            None => Outcome::NoOwner,
        }
    }

    /// Whether it is under way, or has brought what others may have too.
    fn may_be_shared(&self) -> bool {
        matches!(
            *self.outcome.borrow(),
            None | Some(Outcome::Object(..) | Outcome::Failed { .. })
        )
    }
}

/// Ends a resolve when it is dropped, which a panic does too.
struct Ending<'a> {
    engine: &'a Engine,
    whom: Whom,
    at: (u128, bool),
    flight: &'a Arc<ManifestFlight>,
    outcome: Outcome,
}

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        // Off the list first: whoever comes now must not get an answer from before.
        if let Ok(mut map) = self.engine.inner.manifest_flights.of(self.whom).lock()
            && let Some(listed) = map.get(&self.at)
            && Arc::ptr_eq(listed, self.flight)
        {
            map.remove(&self.at);
        }
        let outcome = Some(self.outcome.clone());
        self.flight.outcome.send_replace(outcome);
    }
}

#[derive(Clone)]
pub(super) enum Outcome {
    Object(Arc<Stored>, Resolution),
    /// The same for the starter alone: it may not be kept.
    Alone(Arc<Stored>, Resolution),
    /// The starter takes the relay.
    Relay(Others),
    Uncacheable,
    Failed {
        status: u16,
        reason: Failure,
    },
    /// No owner was of use.
    NoOwner,
}

/// What an answer that the starter takes is to those who joined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Others {
    /// The object may not be shared: each asks for itself.
    Pass,
    /// The origin fails, with this status: not all of them ask it.
    Fail(u16),
    /// It is about the starter's request: they ask together again.
    AskAgain,
}

impl Others {
    pub(super) fn of(status: u16) -> Others {
        match status {
            416 => Others::AskAgain,
            _ if is_passing_failure(status) => Others::Fail(status),
            _ => Others::Pass,
        }
    }
}

/// Why those who asked together have no answer from it.
enum Apart {
    /// No owner was of use.
    NoOwner,
    /// Too many ask for too many variants.
    Contended,
}

impl Engine {
    /// Asks the manifest's owners, together with everybody on this node who asks
    /// them for the same now: however many clients wait for a cold object, they
    /// take one seat at its owner. `None`: no owner is of use, go on. Only with a
    /// lease, which joining needs.
    ///
    /// A request with demands of its own goes alone: the others need not wait
    /// for what it wants, and what is good enough for them need not be for it.
    pub(super) async fn resolve_at_owners(
        &self,
        request: &Request,
        held: Option<&Held>,
        gone: Option<Generation>,
    ) -> Option<Resolved> {
        if self.owners(request.key, 0).first() == Some(&self.me()) {
            return None;
        }
        if request.demands != Demands::default() {
            return self.ask_owners(request, held, gone).await;
        }
        let together = self.resolve_together(Whom::Owners, request, &None, gone, true);
        match together.await {
            Ok(resolved) => Some(resolved),
            Err(Apart::NoOwner) => None,
            Err(Apart::Contended) => self.ask_owners(request, held, gone).await,
        }
    }

    /// Asks the origin, together with everybody who asks for the same now. A
    /// node without a lease does not know today's floors, so its requests may
    /// not join a flight that began before they arrived (rules 5 and 6).
    pub(super) async fn resolve_at_origin(
        &self,
        request: &Request,
        held: Option<Held>,
        gone: Option<Generation>,
        may_join: bool,
    ) -> Resolved {
        self.resolve_together(Whom::Origin, request, &held, gone, may_join)
            .await
            .unwrap_or(Resolved::Pass("contended"))
    }

    async fn resolve_together(
        &self,
        whom: Whom,
        request: &Request,
        held: &Option<Held>,
        gone: Option<Generation>,
        may_join: bool,
    ) -> Result<Resolved, Apart> {
        let mut unfit = None;
        for _ in 0..JOINS_MAX {
            let joined = self.join(whom, request, held, gone, may_join, unfit.as_ref());
            let (flight, started) = match joined {
                Ok(joined) => joined,
                Err(why) => return Ok(Resolved::Pass(why)),
            };
            let mut news = flight.outcome.subscribe();
            let outcome = match news.wait_for(Option::is_some).await {
                Ok(outcome) => outcome.clone(),
                Err(_) => None,
            };
            let kept = !matches!(outcome, Some(Outcome::Alone(..)));
            let resolved = match outcome {
                Some(Outcome::Alone(..) | Outcome::Relay(Others::AskAgain)) if !started => {
                    unfit = Some(flight);
                    continue;
                }
                Some(Outcome::Object(object, resolution) | Outcome::Alone(object, resolution)) => {
                    // Tags and variant are known only now (rule 6); and what an
                    // owner had stored needs a lease, after the wait (rule 7).
                    let fits = started
                        || (self.serves(&object, resolution, request, gone)
                            && (whom == Whom::Origin || self.inner.cluster.may_serve()));
                    if !fits {
                        unfit = Some(flight);
                        continue;
                    }
                    let object = match for_all(&flight.settings.policy, &object.manifest) {
                        Some(manifest) if !started => Arc::new(Stored::new(manifest)),
                        _ => object,
                    };
                    Resolved::Object(Found {
                        object,
                        resolution,
                        kept,
                        collapsed: !started || flight.collapsed.load(Ordering::Relaxed),
                        forwarded: Forwarded::default(),
                        informational: match started {
                            true => flight.take_informational(),
                            false => Informational::new(),
                        },
                    })
                }
                Some(Outcome::Relay(_)) if started => match flight.take_relay() {
                    Some(mut relay) => {
                        relay.informational = flight.take_informational();
                        Resolved::Relay(Box::new(relay))
                    }
                    None => Resolved::Pass("uncacheable"),
                },
                // What fails for one client's credentials need not for another's.
                Some(Outcome::Relay(Others::Fail(status))) if !request.demands.authorized => {
                    let reason = Failure::Fails;
                    Resolved::Failed { status, reason }
                }
                Some(Outcome::Relay(_) | Outcome::Uncacheable) => Resolved::Pass("uncacheable"),
                Some(Outcome::Failed { status, reason }) => Resolved::Failed { status, reason },
                Some(Outcome::NoOwner) => return Err(Apart::NoOwner),
                None => Resolved::Failed {
                    status: 502,
                    reason: Failure::Internal,
                },
            };
            return Ok(resolved);
        }
        Err(Apart::Contended)
    }

    /// Whether what a flight brought answers a request that joined it.
    fn serves(
        &self,
        object: &Arc<Stored>,
        resolution: Resolution,
        request: &Request,
        gone: Option<Generation>,
    ) -> bool {
        let manifest = &object.manifest;
        manifest.selects(&request.origin.headers)
            && self.judge(object, request, gone) != Verdict::Unusable
            && (resolution == Resolution::Stale || self.is_joinable(object))
    }

    /// The flight to wait for, started if there is none that may be joined
    /// (rule 6); or why the request is passed on instead.
    fn join(
        &self,
        whom: Whom,
        request: &Request,
        held: &Option<Held>,
        gone: Option<Generation>,
        may_join: bool,
        unfit: Option<&Arc<ManifestFlight>>,
    ) -> Result<(Arc<ManifestFlight>, bool), &'static str> {
        let hash_key = self.hash_key().ok_or("not-ready")?;
        let subject = request.url.untagged_subject(&hash_key);
        let at = match self.inner.l1.record(request.key.0) {
            Some(Kept::Varies(varies)) => {
                varies
                    .choose(&hash_key, request.key, &request.origin.headers)
                    .0
            }
            _ => request.key.0,
        };
        let at = (at, request.demands.authorized);
        let under_way = self.inner.manifest_flights.of(whom);
        let mut map = under_way.lock().expect("no panic while held");
        if may_join
            && let Some(flight) = map.get(&at)
            && unfit.is_none_or(|unfit| !Arc::ptr_eq(unfit, flight))
            && flight.may_be_shared()
            && joinable(flight.stamp, self.floor(&subject))
            && (gone.is_none() || flight.gone == gone)
        {
            // Its answer will not be for us either, most likely; if it is for all, it
            // is stored, and everybody after it has it.
            if self.inner.unshared.has(request) {
                return Err("uncacheable");
            }
            return Ok((flight.clone(), false));
        }
        let flight = Arc::new(ManifestFlight {
            stamp: self.inner.cluster.applied(),
            gone,
            settings: request.settings.clone(),
            outcome: watch::Sender::new(None),
            relay: Mutex::new(None),
            informational: Mutex::default(),
            collapsed: AtomicBool::new(false),
            took_away: AtomicBool::new(false),
        });
        map.insert(at, flight.clone());
        drop(map);

        let (engine, request, begun) = (self.clone(), request.clone(), flight.clone());
        let held = held.as_ref().map(|h| h.object.clone());
        self.inner.runtime.spawn(async move {
            let mut end = Ending {
                engine: &engine,
                whom,
                at,
                flight: &begun,
                outcome: Outcome::Failed {
                    status: 502,
                    reason: Failure::Internal,
                },
            };
            // The flight before ours may have landed after we missed.
            end.outcome = match engine.landed_meanwhile(&request, gone).await {
                Some(object) => Outcome::Object(object, Resolution::Hit),
                None if whom == Whom::Owners => {
                    let answer = engine.ask_owners(&request, None, gone).await;
                    begun.outcome_of(answer)
                }
                None => {
                    let asked = Instant::now();
                    let outcome = engine.ask_origin(&request, held.clone(), &begun).await;
                    engine.count(&outcome, asked.elapsed());
                    if let Some(old) = held.filter(|old| begun.replaces(&outcome, old)) {
                        engine
                            .tell_replaced(&request, old.manifest.generation)
                            .await;
                    }
                    outcome
                }
            };
            if matches!(end.outcome, Outcome::Object(..)) {
                engine.inner.unshared.forget(&request);
            }
        });
        Ok((flight, true))
    }

    /// A manifest that can be used as it is, though there was none a moment ago.
    async fn landed_meanwhile(
        &self,
        request: &Request,
        gone: Option<Generation>,
    ) -> Option<Arc<Stored>> {
        if !self.inner.cluster.may_serve() {
            return None;
        }
        let held = self.held(request, gone).await?;
        (held.verdict == Verdict::Use(Use::Fresh)).then_some(held.object)
    }
}
