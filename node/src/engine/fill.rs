//! Where the bytes of a slice come from, told once: see
//! [`Engine::fetch_from_somewhere`], and [`Engine::fill_here`] for the slices that
//! this node owns.

use std::ops::Range;
use std::sync::{Arc, MutexGuard};
use std::time::Instant;

use bytes::Bytes;
use futures::StreamExt;
use http::header::{ETAG, HeaderMap, HeaderName, IF_RANGE, LAST_MODIFIED};
use pingora_slice_cluster::slice::{Touched, slice_range};
use pingora_slice_cluster::wire::{Answer, Ask, OriginRequest, SliceAsk, SliceOrigin, Version};
use pingora_slice_cluster::{NodeId, ObjectKey, PurgeIndex, SliceId};

use super::owners::PATIENCE;
use super::resolve::{back_off, strong_date};
use super::tags::OtherTags;
use super::{Engine, Request, is_worth_reading_whole};
use crate::budget::Permit;
use crate::flight::{FillError, Flight, FlightReader, Flights, SliceReader, Source};
use crate::manifest::Manifest;
use crate::origin::{self, OriginAnswer, OriginAsk, OriginBody, OriginError};
use crate::plan::weakly_equal;
use crate::slice::{PAGE_BYTES, Slice, SliceParts, pages};
use crate::stitch::Fault;
use crate::url::Url;

/// All that is needed to fill one slice.
#[derive(Clone, Debug)]
pub struct Fill {
    /// The object.
    pub key: ObjectKey,
    /// The slice.
    pub slice: SliceId,
    /// Its place on the ring (`Manifest::place`).
    pub place: u32,
    /// What a fill sends to the origin.
    pub request: OriginRequest,
    /// The version that the origin must confirm.
    pub version: Version,
    /// The manifest's stamp.
    pub stamp: PurgeIndex,
}

impl Fill {
    /// The fill of slice `index` of a manifest's object.
    pub fn of(key: ObjectKey, manifest: &Manifest, request: &OriginRequest, index: u32) -> Fill {
        Fill {
            key,
            slice: SliceId {
                generation: manifest.generation,
                index,
            },
            place: manifest.place(index),
            request: request.clone(),
            version: manifest.version.clone(),
            stamp: manifest.stamp,
        }
    }

    /// The fill of slice `index` of the same version.
    pub(super) fn at(&self, index: u32) -> Fill {
        let mut fill = self.clone();
        fill.slice.index = index;
        fill.place = if self.version.whole { 0 } else { index };
        fill
    }

    /// The slice's bytes in the object, as far as the length is known.
    pub(super) fn bytes(&self) -> Range<u64> {
        slice_range(
            self.slice.index,
            self.version.length.unwrap_or(u64::MAX),
            self.version.slice_bytes,
        )
    }

    /// The slice's length, where known.
    pub(super) fn slice_bytes(&self) -> Option<u32> {
        let range = slice_range(
            self.slice.index,
            self.version.length?,
            self.version.slice_bytes,
        );
        Some((range.end - range.start) as u32)
    }

    /// One past the slice's last byte, as far as it is known.
    pub(super) fn end(&self) -> u32 {
        self.slice_bytes().unwrap_or(self.version.slice_bytes)
    }

    pub(super) fn url(&self) -> Url {
        Url {
            host: self.request.host.clone(),
            target: self.request.target.clone(),
        }
    }
}

/// Flights that are followed one after the other: where one that somebody else had
/// started fails it has had its tries, and these are ours.
const FOLLOWED_MAX: usize = 2;
/// Of a slice, one part in so many is little.
const LITTLE: usize = 2;

/// Why one source gave no (more) bytes: try the next.
struct NextSource(String);

impl Engine {
    /// Opens a slice for reading where it is in memory.
    pub(super) fn open_stored(
        &self,
        id: SliceId,
        touched: &Touched,
        ahead: &Option<Permit>,
    ) -> Option<SliceReader> {
        self.inner.wholes.note(&id);
        let slice = self.inner.l1.slice(&id)?;
        let reader = self.read_stored(&slice, touched.start..touched.end, ahead.clone());
        if reader.is_none() {
            self.drop_damaged(id);
        }
        reader
    }

    /// Opens a slice that is on disk, and in the kernel's page cache.
    pub(super) fn open_cached(
        &self,
        fill: &Fill,
        touched: &Touched,
        permit: &Permit,
        is_ahead: bool,
    ) -> Option<SliceReader> {
        let l2 = self.inner.l2.as_ref()?;
        let length = fill.slice_bytes()?;
        let slice = l2.slice_now(fill.slice)?;
        if slice.len() != length as usize {
            return None;
        }
        self.keep_if_worth(fill.slice, &fill.version, || slice.clone());
        Some(SliceReader::Stored {
            slice,
            source: Source::L2,
            // What is read ahead is given later.
            is_checked: !is_ahead,
            wanted: touched.start as usize..touched.end.min(length) as usize,
            pin: Some(permit.clone()),
        })
    }

    /// Opens a slice that is not in memory: by joining its flight, or by a new
    /// one. What is wanted now, and has no permit yet, waits for it in the flight.
    pub(super) fn open_fill(
        &self,
        fill: Fill,
        touched: Touched,
        permit: Option<Permit>,
    ) -> SliceReader {
        let (flight, started) = self.flight_of(fill, permit);
        self.read_flight(flight.read(touched.start..touched.end), !started, false)
    }

    /// Opens what is wanted of a slice where that is little, and no more of it is
    /// to be read.
    pub(super) fn open_little(
        &self,
        request: &Request,
        fill: &Fill,
        touched: &Touched,
        ahead: Option<Permit>,
    ) -> Option<FlightReader> {
        let slice_bytes = fill.slice_bytes()?;
        let wanted = touched.start..touched.end.min(slice_bytes);
        if wanted.len() > slice_bytes as usize / LITTLE
            || is_worth_reading_whole(wanted.end - wanted.start, slice_bytes, request.chance)
        {
            return None;
        }
        let permit = match ahead {
            None if wanted.len() > PAGE_BYTES => {
                Some(self.inner.budget.ahead(wanted.len() as u64)?)
            }
            // Without one it is what the connection's own share covers.
            ahead => ahead,
        };
        self.open_part(fill, wanted, permit)
    }

    /// Opens the first page of what is wanted of a slice, which the connection's own
    /// share covers: there is no memory for more. Not without a disk: a slice that
    /// memory has lost would be fetched for each page.
    pub(super) fn open_page(&self, fill: &Fill, touched: &Touched) -> Option<SliceReader> {
        self.inner.l2.as_ref()?;
        let end = touched.end.min(fill.slice_bytes()?);
        let page_end = end.min(touched.start.saturating_add(PAGE_BYTES as u32));
        let reader = self.open_part(fill, touched.start..page_end, None)?;
        Some(self.read_flight(reader, false, page_end < end))
    }

    /// Opens a part of a slice that is not landing: from this node's disk, or from
    /// the slice's owner. It is a flight of its own, which nobody joins, and
    /// nothing of it is kept.
    fn open_part(
        &self,
        fill: &Fill,
        part: Range<u32>,
        permit: Option<Permit>,
    ) -> Option<FlightReader> {
        let is_landing = |flights: &Flights| flights.get(&fill.slice).is_some();
        if !fill.version.is_resumable()
            || is_landing(&self.inner.fills)
            || is_landing(&self.inner.fetches)
        {
            return None;
        }
        let flight = Flight::new(fill.slice, part.clone());
        if let Some(permit) = permit {
            flight.admit(permit);
        }
        let (engine, fill, filled) = (self.clone(), fill.clone(), flight.clone());
        let guard = self.inner.fetches.guard(&flight);
        self.inner.runtime.spawn(async move {
            let _guard = guard;
            let result = engine.fill_part(&fill, &filled).await;
            if result == Err(FillError::Changed) {
                engine.forget_lost(&fill).await;
            }
            // Whoever reads a part goes on behind it.
            let is_short = filled.next_byte() < filled.range.end;
            filled.finish(match result {
                Ok(()) if is_short => Err(FillError::Failed {
                    status: 502,
                    reason: "a slice ended short".into(),
                }),
                result => result,
            });
        });
        Some(flight.read(part))
    }

    /// `joined`: whether somebody else had started the flight. `more`: whether more
    /// is wanted than it brings.
    pub(super) fn read_flight(
        &self,
        reader: FlightReader,
        joined: bool,
        more: bool,
    ) -> SliceReader {
        SliceReader::Flight {
            is_first: reader.flight().is_first_to_count(),
            reader,
            joined,
            budget: self.inner.budget.clone(),
            pin: None,
            more,
        }
    }

    async fn fill_part(&self, fill: &Fill, flight: &Arc<Flight>) -> Result<(), FillError> {
        if !self.is_keeper(fill.key, fill.place) {
            if let Some(owner) = self.owners(fill.key, fill.place).first() {
                match self.from_peer(*owner, fill, flight, false).await {
                    Ok(result) => return result,
                    Err(NextSource(why)) => {
                        flight.tell();
                        tracing::debug!(%owner, slice = ?fill.slice, %why, "owner bypassed");
                    }
                }
            }
            // All of it, from the owner first: another node would not keep what it fetches.
            let mut tries = FOLLOWED_MAX;
            return loop {
                let (whole, started) = self.flight_of(fill.clone(), None);
                let is_first = whole.is_first_to_count();
                let result = follow(&whole, started, flight).await;
                flight.note_source(match whole.source() {
                    Some(source) if is_first => source,
                    _ => Source::Flight,
                });
                tries -= 1;
                if started || tries == 0 || !is_failure(&result) {
                    break result;
                }
            };
        }
        let Range { start, end } = flight.range;
        if let Some(l2) = &self.inner.l2
            && let Some(read) = l2.slice_range(fill.slice, start, end).await
            && read.bytes.len() == flight.range.len()
        {
            flight.land_read(read.bytes, Source::L2);
            return Ok(());
        }
        self.from_own_fill(fill, flight, None).await
    }

    /// The flight that brings a slice to this node's clients, and whether this
    /// call started it.
    fn flight_of(&self, fill: Fill, permit: Option<Permit>) -> (Arc<Flight>, bool) {
        if let Some(flight) = self.inner.fills.get(&fill.slice) {
            if let Some(permit) = permit {
                flight.admit(permit);
            }
            return (flight, false);
        }
        if self.is_keeper(fill.key, fill.place) {
            // No peer is to be asked for it: what is filled for all is its clients' too.
            return self.join_fill(&fill, permit);
        }
        let (flight, started) = self.inner.fetches.join(fill.slice, 0..fill.end());
        if started {
            let (engine, flight) = (self.clone(), flight.clone());
            let guard = self.inner.fetches.guard(&flight);
            self.inner.runtime.spawn(async move {
                let _guard = guard;
                engine.fetch(fill, flight, permit).await;
            });
        }
        (flight, started)
    }

    /// The wanted bytes of a slice in memory: shared with the store if there is
    /// a permit for them, should the slice leave it while they are being sent;
    /// else a copy of the first of them; `None` where those are damaged.
    fn read_stored(
        &self,
        slice: &Slice,
        wanted: Range<u32>,
        ahead: Option<Permit>,
    ) -> Option<SliceReader> {
        let end = (wanted.end as usize).min(slice.len());
        let wanted = (wanted.start as usize).min(end)..end;
        let pin = match slice.len() > PAGE_BYTES {
            true => ahead.or_else(|| self.inner.budget.ahead(slice.len() as u64)),
            // Covered by the connection's own share.
            false => None,
        };
        if pin.is_some() || slice.len() <= PAGE_BYTES {
            return Some(SliceReader::Stored {
                slice: slice.clone(),
                source: Source::L1,
                is_checked: false,
                wanted,
                pin,
            });
        }
        let page_end = (wanted.start / PAGE_BYTES + 1) * PAGE_BYTES;
        let now = wanted.start..wanted.end.min(page_end);
        let bytes = Bytes::copy_from_slice(&slice.bytes()[now.clone()]);
        slice
            .is_intact_in(now.clone())
            .then_some(SliceReader::Copied {
                bytes,
                more: now.end < wanted.end,
            })
    }

    /// A damaged slice is dropped, never served.
    pub(crate) fn drop_damaged(&self, id: SliceId) {
        self.inner.metrics.l1_damaged_total.inc();
        tracing::warn!(?id, "a slice in memory was damaged and is dropped");
        self.inner.l1.drop_slice(&id);
    }

    /// Waits until a flight may hold its bytes: by the permit that came with
    /// it, by one of its own, or by that of somebody who joins it.
    pub(super) async fn admit(
        &self,
        flight: &Arc<Flight>,
        permit: Option<Permit>,
    ) -> Result<(), FillError> {
        if let Some(permit) = permit {
            flight.admit(permit);
        }
        if flight.is_admitted() {
            return Ok(());
        }
        let bytes = u64::from(flight.range.end - flight.range.start);
        tokio::select! {
            permit = self.inner.budget.transfer(bytes) => match permit {
                Some(permit) => flight.admit(permit),
                None => {
                    self.inner.metrics.memory_refusals_total.inc();
                    return Err(FillError::NoMemory);
                }
            },
            () = flight.until_admitted() => {}
        }
        Ok(())
    }

    /// Fills a slice that this node's client wants, and another node owns.
    async fn fetch(&self, fill: Fill, flight: Arc<Flight>, permit: Option<Permit>) {
        let result = match self.admit(&flight, permit).await {
            Ok(()) => self.fetch_from_somewhere(&fill, &flight).await,
            Err(error) => Err(error),
        };
        if result == Err(FillError::Changed) {
            self.forget_lost(&fill).await;
        }
        flight.finish(result);
        // The slice is kept before the flight is forgotten: nobody misses
        // both. What came from the origin was kept by the fill below ours.
        if flight.source().is_some_and(Source::is_peer) {
            self.land(&fill, &flight);
        }
        self.inner.fetches.remove(&flight);
    }

    async fn fetch_from_somewhere(
        &self,
        fill: &Fill,
        flight: &Arc<Flight>,
    ) -> Result<(), FillError> {
        // The flight before ours may have landed after we missed.
        if let Some((slice, source)) = self.stored(fill).await {
            flight.land_stored(&slice, source);
            return Ok(());
        }
        self.fetch_from_others(fill, flight, flight.permit()).await
    }

    /// From the slice's owners, in turn, or else by this node's own fill of it,
    /// which may have a permit for all of the slice already.
    async fn fetch_from_others(
        &self,
        fill: &Fill,
        flight: &Arc<Flight>,
        permit: Option<Permit>,
    ) -> Result<(), FillError> {
        for owner in self.owners(fill.key, fill.place) {
            if owner == self.me() {
                break;
            }
            match self.from_peer(owner, fill, flight, false).await {
                Ok(result) => return result,
                Err(NextSource(why)) => {
                    flight.tell();
                    tracing::debug!(%owner, slice = ?fill.slice, %why, "owner bypassed");
                }
            }
        }
        self.from_own_fill(fill, flight, permit).await
    }

    /// The slice, checked, if it lies in this node's memory or on its disk.
    async fn stored(&self, fill: &Fill) -> Option<(Slice, Source)> {
        if let Some(slice) = self.inner.l1.slice(&fill.slice)
            && slice.is_intact_in(0..slice.len())
        {
            return Some((slice, Source::L1));
        }
        let slice = self.inner.l2.as_ref()?.slice(fill.slice).await?;
        let expected = fill.slice_bytes();
        if expected.is_some_and(|expected| expected as usize != slice.len()) {
            return None;
        }
        self.keep_if_worth(fill.slice, &fill.version, || slice.clone());
        Some((slice, Source::L2))
    }

    /// The owner's bytes, from where earlier sources broke off. An error means
    /// the next source; a result is final.
    async fn from_peer(
        &self,
        owner: NodeId,
        fill: &Fill,
        flight: &Arc<Flight>,
        stored_only: bool,
    ) -> Result<Result<(), FillError>, NextSource> {
        let ask = Ask::Slice(SliceAsk {
            key: fill.key,
            slice: fill.slice,
            start: flight.next_byte(),
            end: flight.range.end,
            request: fill.request.clone(),
            version: fill.version.clone(),
            place: fill.place,
            stamp: fill.stamp,
            stored_only,
        });
        let (answer, body) = self
            .ask(owner, &ask)
            .await
            .map_err(|e| NextSource(e.to_string()))?;
        let (mut body, source) = match answer {
            Answer::Slice { source, .. } => {
                let body = body.ok_or_else(|| NextSource("no body".into()))?;
                let source = match source {
                    SliceOrigin::Origin => Source::PeerFill,
                    SliceOrigin::Stored | SliceOrigin::Flight => Source::Peer,
                };
                (body, source)
            }
            Answer::PastEnd if fill.version.length.is_none() => return Ok(Ok(())),
            Answer::Changed => return Ok(Err(FillError::Changed)),
            Answer::Failed { status } if status < 500 => {
                return Ok(Err(FillError::Refused { status }));
            }
            other => return Err(NextSource(format!("{other:?}"))),
        };
        flight.note_source(source);
        loop {
            let next = tokio::time::timeout(PATIENCE, body.next());
            match flight.coming(next).await {
                Ok(Some(Ok(part))) => {
                    if u64::from(flight.next_byte()) + part.bytes.len() as u64
                        > u64::from(flight.range.end)
                    {
                        return Err(NextSource("more bytes than the slice has".into()));
                    }
                    self.inner
                        .metrics
                        .bytes_from_peers_total
                        .inc_by(part.bytes.len() as u64);
                    flight.land_carried(part);
                }
                Ok(Some(Err(broken))) => return Err(NextSource(broken.to_string())),
                Ok(None)
                    if fill
                        .slice_bytes()
                        .is_none_or(|end| flight.next_byte() == end.min(flight.range.end)) =>
                {
                    return Ok(Ok(()));
                }
                Ok(None) => return Err(NextSource("fewer bytes than the slice has".into())),
                Err(_) if self.is_alive(owner).await => {}
                Err(_) => return Err(NextSource("silent".into())),
            }
        }
    }

    /// The origin's bytes, through this node's own fill: shared with peers
    /// that ask this node for the same slice.
    async fn from_own_fill(
        &self,
        fill: &Fill,
        flight: &Arc<Flight>,
        permit: Option<Permit>,
    ) -> Result<(), FillError> {
        let mut tries = FOLLOWED_MAX;
        loop {
            let (own, started) = self.join_fill(fill, permit.clone());
            flight.note_source(match own.is_first_to_count() {
                true => Source::Origin,
                false => Source::Flight,
            });
            let result = follow(&own, started, flight).await;
            tries -= 1;
            if started || tries == 0 || !is_failure(&result) {
                return result;
            }
        }
    }

    /// The flight that fills a slice from the origin, started if need be. Its
    /// parts are the asker's too, so an asker's permit is enough for all.
    /// Also whether this call started it.
    pub(super) fn join_fill(&self, fill: &Fill, permit: Option<Permit>) -> (Arc<Flight>, bool) {
        let (flight, started) = self.inner.fills.join(fill.slice, 0..fill.end());
        if let Some(permit) = permit {
            flight.admit(permit);
        }
        if started {
            let (engine, fill, begun) = (self.clone(), fill.clone(), flight.clone());
            let guard = self.inner.fills.guard(&flight);
            self.inner.runtime.spawn(async move {
                let _guard = guard;
                engine.fill_here(fill, begun).await;
            });
        }
        (flight, started)
    }

    /// Fills a slice without asking a peer to fill it: from what is stored,
    /// here or with the owner before this node, else from the origin.
    async fn fill_here(&self, mut fill: Fill, flight: Arc<Flight>) {
        flight.note_source(Source::Origin);
        if let Err(error) = self.admit(&flight, None).await {
            if flight.claim() {
                self.announce_and_finish(&fill, &flight, Err(error)).await;
            }
            return;
        }
        if flight.is_claimed() {
            // A body has come to it meanwhile.
            return;
        }
        // Nobody waits for a body to come to what is here. Not claimed before: the
        // body may land it meanwhile.
        if let Some((slice, source)) = self.stored(&fill).await {
            if flight.claim() {
                flight.land_stored(&slice, source);
                // It is kept already.
                flight.finish(Ok(()));
                self.inner.fills.remove(&flight);
            }
            return;
        }
        let under_way = self.inner.wholes.get(fill.slice.generation);
        if under_way.as_ref().is_some_and(|whole| whole.want(&flight)) || !flight.claim() {
            return;
        }
        if (fill.version.whole || fill.version.length.is_none())
            && let Some(manifest) = self.manifest_of(&fill).await
        {
            if manifest.part.is_some() {
                // The origin chose what to give: it is not asked for the rest.
                self.lost(&fill, &flight).await;
                return;
            }
            // The body has ended since the asker heard of it.
            fill.version.length = manifest.version.length;
            if fill.version.length.is_some() && fill.bytes().is_empty() {
                self.announce_and_finish(&fill, &flight, Ok(())).await;
                return;
            }
        }
        if let Some(before) = self.owner_before(fill.key, fill.place) {
            flight.note_source(Source::Peer);
            match self.from_peer(before, &fill, &flight, true).await {
                Ok(result) => {
                    self.announce_and_finish(&fill, &flight, result).await;
                    return;
                }
                Err(NextSource(why)) => {
                    flight.tell();
                    tracing::debug!(%before, slice = ?fill.slice, %why, "the owner before does not have it");
                    flight.note_source(Source::Origin);
                }
            }
        }
        let is_under_way = self.inner.wholes.get(fill.slice.generation).is_some();
        if !(fill.version.is_resumable() || is_under_way) {
            // Nothing would say that what the origin gives now is the same version.
            self.lost(&fill, &flight).await;
        } else if fill.version.whole {
            self.fill_by_whole(&fill, &flight, None).await;
        } else {
            self.fill_by_range(&fill, &flight, None).await;
        }
    }

    /// Ends the fill of what was here and cannot be had again. To its readers that
    /// is another version; the origin may have the same.
    async fn lost(&self, fill: &Fill, flight: &Arc<Flight>) {
        self.forget_lost(fill).await;
        self.finish_fill(fill, flight, Err(FillError::Changed));
    }

    /// Forgets a manifest on this node whose bytes are gone for good.
    async fn forget_lost(&self, fill: &Fill) {
        if let Some(manifest) = self.manifest_of(fill).await
            && (manifest.part.is_some() || !manifest.version.is_resumable())
        {
            self.forget_manifest(fill.key, &manifest);
        }
    }

    /// The fill whose bytes are already arriving: the slice that came with a
    /// new manifest.
    pub(super) fn adopt(&self, fill: Fill, body: OriginBody) {
        let l2 = self.inner.l2.as_ref();
        if self.inner.l1.slice(&fill.slice).is_some() || l2.is_some_and(|l2| l2.has(&fill.slice)) {
            return;
        }
        let (flight, _) = self.inner.fills.join(fill.slice, 0..fill.end());
        if !flight.claim() {
            return;
        }
        flight.note_source(Source::Origin);
        // Whoever got the manifest counts it: see `pieces::count`.
        flight.is_first_to_count();
        let (engine, guard) = (self.clone(), self.inner.fills.guard(&flight));
        self.inner.runtime.spawn(async move {
            let _guard = guard;
            match engine.admit(&flight, None).await {
                Ok(()) => engine.fill_by_range(&fill, &flight, Some(body)).await,
                Err(error) => engine.announce_and_finish(&fill, &flight, Err(error)).await,
            }
        });
    }

    async fn fill_by_range(&self, fill: &Fill, flight: &Arc<Flight>, body: Option<OriginBody>) {
        match self.try_from_origin(fill, flight, body).await {
            Ok(()) => self.announce_and_finish(fill, flight, Ok(())).await,
            // Sent whole: one body for this slice and all others.
            Err(Retry::Whole(body)) => self.fill_by_whole(fill, flight, Some(*body)).await,
            Err(Retry::Yes(error) | Retry::No(error)) => {
                self.announce_and_finish(fill, flight, Err(error)).await;
            }
            Err(Retry::OtherTag(_)) => {
                self.announce_and_finish(fill, flight, Err(FillError::Changed))
                    .await;
            }
        }
    }

    pub(super) async fn announce_and_finish(
        &self,
        fill: &Fill,
        flight: &Arc<Flight>,
        result: Result<(), FillError>,
    ) {
        match &result {
            Ok(()) => {}
            Err(FillError::Changed) => self.announce_change(fill).await,
            Err(error) => {
                tracing::warn!(url = %fill.url(), slice = fill.slice.index, %error, "slice not filled")
            }
        }
        self.finish_fill(fill, flight, result);
    }

    pub(super) fn finish_fill(
        &self,
        fill: &Fill,
        flight: &Arc<Flight>,
        result: Result<(), FillError>,
    ) {
        flight.finish(result);
        self.land(fill, flight);
        self.inner.fills.remove(flight);
    }

    /// Keeps what has landed whole: in memory by its frequency, on disk where
    /// this node owns it.
    pub(super) fn land(&self, fill: &Fill, flight: &Arc<Flight>) {
        let is_keeper = self.is_keeper(fill.key, fill.place);
        let is_with_peer = !is_keeper && flight.source().is_some_and(Source::is_peer);
        // Without ranges it takes the whole object to have it again.
        let may_be_had_again = !fill.version.whole;
        let is_worth_it = || self.is_worth_a_place(fill.slice, &fill.version);
        // Before its sums are taken: few are kept.
        if is_with_peer && may_be_had_again && !is_worth_it() {
            return;
        }
        let Some(slice) = self.landed(fill, flight) else {
            return;
        };
        let l2 = self.inner.l2.as_ref().filter(|_| is_keeper);
        let is_on_disk = l2.is_some_and(|l2| l2.keep_slice(fill.slice, slice.clone()));
        if !(is_on_disk && may_be_had_again) || is_worth_it() {
            self.inner.l1.keep_slice(fill.slice, slice.gather());
        }
    }

    /// Keeps a slice in memory that can be had again from disk or from a peer.
    pub(super) fn keep_if_worth(
        &self,
        id: SliceId,
        version: &Version,
        slice: impl FnOnce() -> Slice,
    ) {
        if self.is_worth_a_place(id, version) {
            self.inner.l1.keep_slice(id, slice());
        }
    }

    /// Whether a slice that can be had again, and was asked for just now, is worth a
    /// place in memory.
    fn is_worth_a_place(&self, id: SliceId, version: &Version) -> bool {
        let l1 = &self.inner.l1;
        l1.is_worth_a_place(&id, version.length, rand::random())
    }

    /// As [`Engine::land`], in memory only.
    pub(super) fn land_in_memory(&self, fill: &Fill, flight: &Arc<Flight>) {
        if let Some(slice) = self.landed(fill, flight) {
            self.inner.l1.keep_slice(fill.slice, slice.gather());
        }
    }

    fn landed(&self, fill: &Fill, flight: &Arc<Flight>) -> Option<SliceParts> {
        if flight.outcome() != Some(Ok(())) || flight.bytes() == 0 {
            return None;
        }
        let slice = flight.slice();
        if slice.is_none() {
            tracing::warn!(slice = ?fill.slice, "a slice was damaged while it landed and is not kept");
        }
        slice
    }

    fn other_tags(&self) -> MutexGuard<'_, OtherTags> {
        self.inner.other_tags.lock().expect("no panic while held")
    }

    /// Tries the origin, resuming where a try broke off. An error says why
    /// another try would not help: the last one failed, or the answer is of
    /// another form.
    async fn try_from_origin(
        &self,
        fill: &Fill,
        flight: &Arc<Flight>,
        mut arriving: Option<OriginBody>,
    ) -> Result<(), Retry> {
        // What came with the manifest was asked for before.
        let asked = (arriving.as_ref()).map_or_else(Instant::now, OriginBody::asked);
        self.inner.metrics.subrequests_total.inc();
        let mut other_tags: Vec<String> = Vec::new();
        let mut attempt = 0;
        let max_retries = self.inner.live.now().max_retries;
        let deadline = tokio::time::Instant::now() + self.inner.config.origin_timeouts.total;
        let version = fill.slice.generation;
        let result = loop {
            let by_date = self.other_tags().say_nothing(version);
            let condition = match by_date {
                true => if_range_date(&fill.version),
                // The tag in the answer tells, without the whole of another version.
                false if !other_tags.is_empty() => Vec::new(),
                false => if_range(&fill.version),
            };
            let once = self.try_once(fill, flight, arriving.take(), condition, by_date);
            let error = match tokio::time::timeout_at(deadline, once).await {
                Ok(Err(retry @ (Retry::Yes(_) | Retry::OtherTag(_)))) => retry,
                Ok(result) => break result,
                Err(_) => {
                    self.broke_off(fill);
                    let reason = "not there within origin_timeouts.total".into();
                    break Err(Retry::No(FillError::Failed {
                        status: 504,
                        reason,
                    }));
                }
            };
            if let Retry::OtherTag(tag) = &error {
                let mut tags = self.other_tags();
                tags.heard_other(version, Instant::now());
                if other_tags.iter().any(|other| other != tag) {
                    tags.heard_many(version);
                }
                other_tags.push(tag.clone());
            }
            // Another slice may have found it out meanwhile: one way or the other.
            if !by_date && self.other_tags().say_nothing(version) {
                attempt = 0;
            } else if attempt >= max_retries || self.is_ending(version) {
                break Err(error);
            }
            attempt += 1;
            flight.tell();
            self.inner.metrics.retried_subrequests_total.inc();
            // Another replica may answer at once: nothing is wrong with this one.
            if !matches!(error, Retry::OtherTag(_)) {
                tokio::time::sleep(back_off(attempt)).await;
            }
        };
        // A change is found out so, and a refusal is one client's: the origin works.
        let is_failure = match &result {
            Err(Retry::Yes(error) | Retry::No(error)) => {
                !matches!(error, FillError::Changed | FillError::Refused { .. })
            }
            Ok(()) | Err(Retry::Whole(_) | Retry::OtherTag(_)) => false,
        };
        if is_failure {
            self.inner.metrics.failed_subrequests_total.inc();
        }
        self.inner
            .metrics
            .subrequest_duration_seconds
            .observe(asked.elapsed().as_secs_f64());
        result
    }

    async fn try_once(
        &self,
        fill: &Fill,
        flight: &Arc<Flight>,
        arriving: Option<OriginBody>,
        condition: Vec<(HeaderName, String)>,
        by_date: bool,
    ) -> Result<(), Retry> {
        let whole = fill.bytes();
        let mut body = match arriving {
            Some(arriving) => arriving,
            None => {
                let asked = whole.start + u64::from(flight.bytes())..whole.end;
                if asked.is_empty() {
                    return Ok(());
                }
                let ask = OriginAsk {
                    head: false,
                    range: Some(asked.clone()),
                    open_range: None,
                    fields: condition,
                };
                let asked_at = Instant::now();
                let answer = self.inner.origin.get(&fill.request, &ask).await?;
                self.judge_slice_answer(fill, &asked, &answer, by_date)?;
                if !by_date {
                    self.other_tags().heard_own(fill.slice.generation, asked_at);
                }
                if answer.status == 200 {
                    return Err(Retry::Whole(Box::new(answer.body)));
                }
                answer.body
            }
        };
        let expected = (whole.end - whole.start) as u32;
        while flight.bytes() < expected {
            let next = flight.coming(body.next()).await;
            let next = next.inspect_err(|_| self.broke_off(fill))?;
            let Some(mut bytes) = next else {
                self.broke_off(fill);
                return Err(Retry::Yes(FillError::Failed {
                    status: 502,
                    reason: "the body ended early".into(),
                }));
            };
            let room = (expected - flight.bytes()) as usize;
            let rest = bytes.split_off(bytes.len().min(room));
            // Without an announced length only the end tells that these are the last.
            let ends = bytes.len() == room && !body.is_announced();
            if !rest.is_empty() || (ends && matches!(flight.coming(body.next()).await, Ok(Some(_))))
            {
                return Err(self.too_long(fill));
            }
            // At most a page each, so that peers can pass them on as they are.
            for part in pages(bytes) {
                flight.land_among(part);
            }
        }
        // Reads the framing's end, so that the connection can be used again.
        let _ = flight.coming(body.next()).await;
        Ok(())
    }

    /// A body that ended before its announced end, or stalled there.
    pub(super) fn broke_off(&self, fill: &Fill) {
        self.inner.stitch.report(Fault {
            reason: "broke-off",
            url: &fill.url(),
            asked: Some(fill.bytes()),
            expected: Some(&fill.version),
            headers: &HeaderMap::new(),
        });
    }

    /// More bytes than were announced: which of them are right is anybody's guess.
    fn too_long(&self, fill: &Fill) -> Retry {
        self.inner.stitch.report(Fault {
            reason: "too-long",
            url: &fill.url(),
            asked: Some(fill.bytes()),
            expected: Some(&fill.version),
            headers: &HeaderMap::new(),
        });
        Retry::No(FillError::Failed {
            status: 502,
            reason: "more bytes than announced".into(),
        })
    }

    /// Whether an answer is what was asked for, of the right version: the
    /// range (206), or everything (200).
    pub(super) fn judge_slice_answer(
        &self,
        fill: &Fill,
        asked: &Range<u64>,
        answer: &OriginAnswer,
        by_date: bool,
    ) -> Result<(), Retry> {
        let url = fill.url();
        let fault = |reason| {
            let expected = Some(&fill.version);
            self.inner.stitch.report(Fault {
                reason,
                url: &url,
                asked: Some(asked.clone()),
                expected,
                headers: &answer.headers,
            });
        };
        let failed = |reason: String| {
            Retry::Yes(FillError::Failed {
                status: 502,
                reason,
            })
        };
        let length = match answer.status {
            206 => origin::content_range(&answer.headers).and_then(|range| range.total),
            _ => answer.length,
        };
        let same = same_version(&fill.version, answer)
            || (by_date && same_date(&fill.version, answer) && length == fill.version.length);
        match answer.status {
            200 | 206 if !same => {
                let tag = answer.headers.get(ETAG).and_then(|v| v.to_str().ok());
                match tag {
                    // Replicas of one origin may disagree about their tags.
                    Some(tag)
                        if (same_date(&fill.version, answer)
                            || is_tag_all(&fill.version, answer))
                            && length == fill.version.length =>
                    {
                        fault("entity-tag");
                        Err(Retry::OtherTag(tag.to_owned()))
                    }
                    _ => {
                        fault("validator");
                        Err(Retry::No(FillError::Changed))
                    }
                }
            }
            206 => {
                let other_total = length.is_some() && length != fill.version.length;
                if other_total && fill.version.length.is_some() {
                    fault("length");
                    // The tag says that it is the same: a lie, unless it stays.
                    let lies = fill.version.strong_etag().is_some();
                    let error = FillError::Changed;
                    return Err(if lies {
                        Retry::Yes(error)
                    } else {
                        Retry::No(error)
                    });
                }
                answer.fits(asked).map(drop).map_err(|misfit| {
                    fault(misfit.as_str());
                    failed(misfit.as_str().to_owned())
                })
            }
            200 if answer.headers.contains_key(http::header::CONTENT_ENCODING)
                && !fill.version.whole =>
            {
                fault("encoded");
                Err(failed("encoded".into()))
            }
            200 if answer.length.is_none() || answer.length == fill.version.length => Ok(()),
            200 => {
                fault("length");
                Err(Retry::No(FillError::Changed))
            }
            429 | 500..=599 => {
                fault("status");
                Err(failed(format!("status {}", answer.status)))
            }
            status => {
                fault("status");
                Err(Retry::No(refusal(status)))
            }
        }
    }
}

/// What a status says that fits no request for bytes of a version: that there is
/// no such version any more, or something about the client whose fields were sent.
pub(super) fn refusal(status: u16) -> FillError {
    match status {
        304 | 404 | 410 | 412 | 416 => FillError::Changed,
        300..=499 => FillError::Refused { status },
        _ => FillError::Changed,
    }
}

/// Why a try failed, by what to do about it.
pub(super) enum Retry {
    /// Try again.
    Yes(FillError),
    /// Another try would not help.
    No(FillError),
    /// The same version, but all of it, from its first byte.
    Whole(Box<OriginBody>),
    /// The same but for this entity tag: a change, or a replica that makes its
    /// tags differently.
    OtherTag(String),
}

impl From<OriginError> for Retry {
    fn from(error: OriginError) -> Retry {
        Retry::Yes(FillError::Failed {
            status: error.status(),
            reason: error.to_string(),
        })
    }
}

/// Lands what another flight brings, from where this one stands.
async fn follow(other: &Arc<Flight>, started: bool, flight: &Flight) -> Result<(), FillError> {
    let mut reader = other.read(flight.next_byte()..flight.range.end);
    while let Some(part) = flight.coming(reader.next()).await {
        let mut part = match started {
            true => part?,
            false => part.map_err(FillError::for_others)?,
        };
        if other.are_views_beyond(&flight.range) {
            part.bytes = Bytes::copy_from_slice(&part.bytes);
        }
        flight.land_carried(part);
    }
    Ok(())
}

fn is_failure(result: &Result<(), FillError>) -> bool {
    matches!(result, Err(FillError::Failed { .. }))
}

/// Only the version we hold: a changed object is sent whole, and recognised.
pub(super) fn if_range(version: &Version) -> Vec<(HeaderName, String)> {
    match version.strong_etag() {
        Some(tag) => vec![(IF_RANGE, tag.to_owned())],
        None => if_range_date(version),
    }
}

fn if_range_date(version: &Version) -> Vec<(HeaderName, String)> {
    let date = version.exact_last_modified().into_iter();
    date.map(|date| (IF_RANGE, date.to_owned())).collect()
}

/// Whether an answer's validators are those of `version`: the strong entity
/// tag where there is one, else Last-Modified (the length is checked apart).
/// Weak tags that differ are a change, whatever the date says: a build with
/// fixed times gives every version the same.
pub(super) fn same_version(version: &Version, answer: &OriginAnswer) -> bool {
    let text = |name: HeaderName| answer.headers.get(name).and_then(|v| v.to_str().ok());
    if let Some(tag) = version.strong_etag() {
        return text(ETAG) == Some(tag);
    }
    let tags_differ = match (&version.etag, text(ETAG)) {
        (Some(ours), Some(theirs)) => !weakly_equal(ours, theirs),
        _ => false,
    };
    let date = version.exact_last_modified();
    date.is_some() && text(LAST_MODIFIED) == date && !tags_differ
}

/// Whether nothing but the entity tag tells an answer from the version.
fn is_tag_all(version: &Version, answer: &OriginAnswer) -> bool {
    version.last_modified.is_none() && !answer.headers.contains_key(LAST_MODIFIED)
}

/// Whether an answer has the version's Last-Modified.
fn same_date(version: &Version, answer: &OriginAnswer) -> bool {
    let date = strong_date(&answer.headers, answer.received_ms);
    date.is_some() && date == version.last_modified
}
