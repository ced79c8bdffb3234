//! Answering peers: from what is stored or from the origin, never from a third
//! node, never by waiting on a flight that asks one (invariant 3).

use std::time::Duration;

use bytes::Bytes;
use futures::{StreamExt, stream};
use pingora_slice_cluster::NodeId;
use pingora_slice_cluster::peer::{Body, BodyBroken, SliceSource};
use pingora_slice_cluster::wire::{
    Answer, Ask, Part, Resolution, ResolveAsk, SliceAsk, SliceOrigin,
};

use super::{
    Engine, Failure, Fill, Found, Held, RelayBody, Request, Resolved, Verdict,
    is_worth_reading_whole,
};
use crate::admin::Inspect;
use crate::budget::Permit;
use crate::flight::{FillError, FlightReader, Source};
use crate::freshness::{Demands, Use};
use crate::manifest::{self, Record};
use crate::slice::{PAGE_BYTES, pages};
use crate::url::Url;

/// How long an owner may take to catch up with an asker's floor (rule 7).
const CATCH_UP: Duration = Duration::from_millis(50);

/// How long a peer waits for the memory that its answer takes.
const PEER_WAIT_MAX: Duration = Duration::from_secs(1);

#[async_trait::async_trait]
impl SliceSource for Engine {
    async fn answer(&self, _from: NodeId, ask: Ask) -> (Answer, Option<Body>) {
        match ask {
            Ask::Resolve(ask) => self.answer_resolve(ask).await,
            Ask::Slice(ask) => self.answer_slice(ask).await,
        }
    }

    fn metrics_text(&self) -> Bytes {
        self.inner.metrics.render(&self.gauges()).into()
    }
}

impl Engine {
    async fn answer_resolve(&self, ask: ResolveAsk) -> (Answer, Option<Body>) {
        let Some(hash_key) = self.hash_key() else {
            return (Answer::Busy, None);
        };
        if hash_key.object(&ask.request.host, &ask.request.target) != ask.key {
            return (Answer::Missing, None);
        }
        if !self.inner.cluster.reached(ask.floor, CATCH_UP).await {
            return (Answer::Behind, None);
        }
        let settings = self.inner.live.take();
        let mut demands = Demands::of(
            &manifest::to_map(&ask.request.headers),
            &settings.policy.caching.request_directives,
        );
        demands.no_cache |= ask.revalidate;
        let request = Request {
            key: ask.key,
            url: Url {
                host: ask.request.host.clone(),
                target: ask.request.target.clone(),
            }
            .into(),
            origin: ask.request.into(),
            demands,
            first_byte: ask.first_byte,
            sliced: ask.sliced,
            chance: rand::random(),
            settings,
        };
        if let (true, Some(gone)) = (ask.stored_only, ask.gone) {
            // Another node knows that this version was replaced.
            let headers = || &request.origin.headers;
            if let Some(object) = self.lookup(request.key, &request.url, headers).await
                && object.manifest.generation == gone
            {
                self.forget_manifest(request.key, &object.manifest);
            }
        }
        let held = self.held(&request, ask.gone).await;
        if let Some(Held {
            object,
            verdict: Verdict::Use(usable),
        }) = &held
            && object.manifest.stamp >= ask.floor
            && *usable != Use::Validate
        {
            if *usable == Use::StaleWhileRevalidating
                && let Some(turn) = self.turn_to_revalidate(&request, object)
            {
                self.revalidate_in_background(&request, turn);
            }
            let resolution = if *usable == Use::Fresh {
                Resolution::Hit
            } else {
                Resolution::Stale
            };
            return (answer_with(Found::stored(object.clone(), resolution)), None);
        }
        if ask.stored_only {
            let answer = match self.may_be_stored(request.key).await {
                true => Answer::Uncacheable,
                false => Answer::Missing,
            };
            return (answer, None);
        }
        if self.inner.uncacheable.has(&request) {
            return (Answer::Uncacheable, None);
        }
        if !self.inner.cluster.reached(ask.hard, CATCH_UP).await {
            return (Answer::Behind, None);
        }
        match self.resolve_at_origin(&request, held, ask.gone, true).await {
            Resolved::Object(found) => (answer_with(found), None),
            Resolved::Pass(_) => (Answer::Uncacheable, None),
            // Its asker may reach what we cannot; what we did reach and got no
            // answer from will not answer the asker either.
            Resolved::Failed {
                reason: Failure::Unreachable | Failure::NotConnected | Failure::Fenced,
                ..
            } => (Answer::Busy, None),
            Resolved::Failed { status, .. } => (Answer::Failed { status }, None),
            Resolved::Relay(relay) => {
                let mut headers = relay.headers;
                if let Some(length) = relay.length {
                    headers.insert(http::header::CONTENT_LENGTH, length.into());
                }
                let body = match relay.body {
                    RelayBody::Peer(body) => body,
                    RelayBody::Bytes(bytes) => stream::iter(pages(bytes).map(Ok)).boxed(),
                    RelayBody::Origin(body) => {
                        // For its connection's buffers.
                        let Some(permit) = self.inner.budget.transfer(0).await else {
                            return (Answer::Busy, None);
                        };
                        stream::unfold(Some((body, permit)), |state| async {
                            let (mut body, permit) = state?;
                            match body.next().await {
                                Ok(Some(bytes)) => {
                                    Some((Ok(Part::new(bytes)), Some((body, permit))))
                                }
                                Ok(None) => None,
                                Err(error) => Some((Err(BodyBroken(error.to_string())), None)),
                            }
                        })
                        .boxed()
                    }
                };
                (
                    Answer::Relay {
                        status: relay.status,
                        headers: manifest::to_headers(&headers),
                        informational: relay.informational,
                    },
                    Some(body),
                )
            }
        }
    }

    /// Memory for an answer to a peer, which has other sources.
    async fn room_for_peer(&self, bytes: u32) -> Option<Permit> {
        let waiting = self.inner.budget.transfer(bytes.into());
        let permit = tokio::time::timeout(PEER_WAIT_MAX, waiting).await;
        if !matches!(permit, Ok(Some(_))) {
            self.inner.metrics.memory_refusals_total.inc();
        }
        permit.ok()?
    }

    async fn answer_slice(&self, ask: SliceAsk) -> (Answer, Option<Body>) {
        if !self.inner.cluster.reached(ask.stamp, CATCH_UP).await {
            return (Answer::Behind, None);
        }
        self.inner.wholes.note(&ask.slice);
        let fill = Fill {
            key: ask.key,
            slice: ask.slice,
            place: ask.place,
            request: ask.request,
            version: ask.version,
            stamp: ask.stamp,
        };
        let slice_bytes = fill.end();
        let wanted = ask.end.min(slice_bytes).saturating_sub(ask.start);
        // What is read whole is wanted more often.
        let is_whole = ask.start == 0
            && is_worth_reading_whole(wanted, slice_bytes, rand::random())
            && self.inner.l2.is_some();
        let is_small = wanted as usize <= PAGE_BYTES && !is_whole;
        // Before anything is read: what waits here holds nothing.
        let permit = self.room_for_peer(if is_small { wanted } else { slice_bytes });
        let Some(permit) = permit.await else {
            return (Answer::Busy, None);
        };
        if let Some(slice) = self.inner.l1.slice(&ask.slice) {
            let end = (ask.end as usize).min(slice.len());
            match slice.parts((ask.start as usize).min(end)..end) {
                Some(parts) => return stored(slice.len(), parts, permit, is_small),
                None => self.drop_damaged(ask.slice),
            }
        }
        let under_way = self.inner.fills.get(&ask.slice);
        if under_way.is_none()
            && let Some(l2) = &self.inner.l2
        {
            if is_whole
                && let Some(slice) = l2.slice(ask.slice).await
                && let Some(parts) = match ask.end as usize {
                    end if end < slice.len() => slice.parts(0..end),
                    _ => Some(slice.checked_parts()),
                }
            {
                self.keep_if_worth(fill.slice, &fill.version, || slice.clone());
                return stored(slice.len(), parts, permit, is_small);
            }
            if let Some(read) = l2.slice_range(ask.slice, ask.start, ask.end).await {
                let parts = pages(read.bytes).collect();
                return stored(read.slice_bytes as usize, parts, permit, false);
            }
        }
        // Two nodes that disagree about the ring would wait for each other here.
        let may_come = (under_way.as_ref()).is_some_and(|flight| !flight.is_asking_a_peer());
        if ask.stored_only && !may_come {
            return (Answer::Missing, None);
        }
        let permit = match is_small {
            true => {
                drop(permit);
                self.room_for_peer(slice_bytes).await
            }
            false => Some(permit),
        };
        let Some(permit) = permit else {
            return (Answer::Busy, None);
        };
        let (flight, started) = match under_way.filter(|_| ask.stored_only) {
            // Nothing is begun for it, should that flight have ended.
            Some(flight) => {
                flight.admit(permit);
                (flight, false)
            }
            None => self.join_fill(&fill, Some(permit)),
        };
        let is_first = flight.is_first_to_count();
        let mut reader = flight.read(ask.start..ask.end);
        match reader.next().await {
            None => (Answer::PastEnd, None),
            Some(Err(FillError::Changed)) => (Answer::Changed, None),
            Some(Err(FillError::NoMemory | FillError::Damaged)) => (Answer::Busy, None),
            // Somebody else was refused: its asker may not be.
            Some(Err(FillError::AnotherRefused)) => (Answer::Busy, None),
            Some(Err(FillError::Refused { .. })) if !started => (Answer::Busy, None),
            Some(Err(FillError::Failed { status, .. } | FillError::Refused { status })) => {
                (Answer::Failed { status }, None)
            }
            Some(Ok(first)) => {
                let slice_bytes = fill.slice_bytes();
                let source = match flight.source() {
                    _ if !is_first => SliceOrigin::Flight,
                    Some(Source::Origin | Source::PeerFill) | None => SliceOrigin::Origin,
                    Some(Source::L1 | Source::L2 | Source::Peer | Source::Flight) => {
                        SliceOrigin::Stored
                    }
                };
                (
                    Answer::Slice {
                        slice_bytes,
                        source,
                    },
                    Some(landing(first, reader)),
                )
            }
        }
    }
}

/// What is stored, in parts, which the permit lets stay in memory for as long
/// as the peer takes; as copies where it is for less than they are views of.
fn stored(
    slice_bytes: usize,
    mut parts: Vec<Part>,
    permit: Permit,
    as_copies: bool,
) -> (Answer, Option<Body>) {
    if as_copies {
        for part in &mut parts {
            part.bytes = Bytes::copy_from_slice(&part.bytes);
        }
    }
    if parts.is_empty() {
        return (Answer::PastEnd, None);
    }
    let answer = Answer::Slice {
        slice_bytes: Some(slice_bytes as u32),
        source: SliceOrigin::Stored,
    };
    let parts = stream::iter(parts).map(move |part| {
        let _held = &permit;
        Ok(part)
    });
    (answer, Some(parts.boxed()))
}

fn answer_with(found: Found) -> Answer {
    Answer::Manifest {
        manifest: manifest::encode(&Record::Manifest(Box::new(found.object.manifest.clone()))),
        resolution: found.resolution,
        kept: found.kept,
        collapsed: found.collapsed,
        informational: found.informational,
    }
}

/// A flight's parts as they land. It is held, and its permit, until they have arrived.
fn landing(first: Part, reader: FlightReader) -> Body {
    let flight = reader.flight().clone();
    let rest = stream::unfold(Some(reader), |reader| async {
        let mut reader = reader?;
        match reader.next().await? {
            Ok(part) => Some((Ok(part), Some(reader))),
            Err(error) => Some((Err(BodyBroken(error.to_string())), None)),
        }
    });
    let parts = stream::iter([Ok(first)]).chain(rest);
    let parts = parts.map(move |part| {
        let _held = &flight;
        part
    });
    parts.boxed()
}
