//! Objects that the origin gives only as a whole: one body, cut into slices as
//! it passes, for everybody who reads any of them.
//!
//! A body is begun by an answer without ranges, or by a reader of a slice that
//! can be had no other way. It runs a little ahead of its foremost reader, is
//! taken up again where it breaks off if a validator says that it is the same,
//! and lands only in flights that nobody else fills ([`Flight::claim`]).

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::{Buf, Bytes, BytesMut};
use http::header::{ACCEPT_ENCODING, CONTENT_ENCODING};
use pingora_slice_cluster::slice::{slice_range, touched};
use pingora_slice_cluster::wire::{OriginRequest, Part};
use pingora_slice_cluster::{Generation, ObjectKey, SliceId};
use tokio::sync::watch;

use super::fill::{Retry, if_range, refusal, same_version};
use super::records::for_all;
use super::resolve::back_off;
use super::{Engine, Fill, Request};
use crate::flight::{FillError, Flight, Source};
use crate::manifest::Manifest;
use crate::origin::{OriginAsk, OriginBody};
use crate::slice::PAGE_BYTES;

/// Slices that a body may run ahead of its foremost reader.
const AHEAD: u32 = 8;
/// The same while memory is short.
const AHEAD_WHEN_TIGHT: u32 = 1;
/// How long memory may be waited for while slices are held that can be had
/// again, and while some are that cannot but are not read.
const SHORT_FOR: Duration = Duration::from_secs(1);
const SHORT_AND_UNREAD_FOR: Duration = Duration::from_secs(5);
/// How long a body waits for a reader; then it is read on for the cache.
const UNREAD_FOR: Duration = Duration::from_secs(5);
/// Bytes that are read on for the cache while nobody reads: what is larger is
/// given up, so that an endless body ends.
const READ_ON_BYTES_MAX: u64 = 256 * 1024 * 1024;
/// How long a body larger than that waits for its readers to go on.
const GIVEN_UP_AFTER: Duration = Duration::from_secs(120);
/// Slices held for readers, whatever the memory store thinks of them: the
/// window ahead, and, of a body that cannot be asked for again, what the
/// foremost reader has opened.
const HELD: usize = AHEAD as usize + 8;

/// The bodies under way, by generation.
#[derive(Default)]
pub(super) struct Wholes {
    map: Mutex<HashMap<Generation, Arc<Whole>>>,
}

/// One body under way. Its slices are flights on the engine's list.
#[derive(Default)]
pub(super) struct Whole {
    state: Mutex<State>,
    /// The foremost slice that somebody reads.
    wanted: watch::Sender<u32>,
}

#[derive(Default)]
struct State {
    /// First slice that the body has not reached.
    next: u32,
    /// The flight that it lands in now.
    current: Option<Arc<Flight>>,
    /// Flights of slices that it has yet to reach.
    waiting: Vec<Arc<Flight>>,
    /// Finished flights that stay on the list for readers to come.
    held: VecDeque<Arc<Flight>>,
    ended: bool,
    /// Another body is on the list in its place.
    replaced: bool,
}

/// A body, and where in it we are.
struct Supply {
    body: Option<OriginBody>,
    /// Bytes to pass over: the origin began before the byte that was wanted.
    skip: u64,
    pending: Bytes,
    /// Tries after the first, for the slice that is being filled.
    attempt: u32,
    /// Begun for a slice that was lost: those after it may still be on disk.
    is_again: bool,
}

impl Supply {
    fn of(body: Option<OriginBody>, is_again: bool) -> Supply {
        Supply {
            body,
            skip: 0,
            pending: Bytes::new(),
            attempt: 0,
            is_again,
        }
    }
}

impl Engine {
    /// Starts cutting a body that has just begun to arrive.
    pub(super) fn begin_whole(&self, request: &Request, manifest: &Manifest, body: OriginBody) {
        let fill = Fill::of(request.key, manifest, &request.origin, 0);
        let (whole, started) = self.inner.wholes.join(manifest.generation);
        if !started {
            // The same version is under way already: one body is enough.
            return;
        }
        // The first slice's flight is there before anybody can ask for it.
        let first = self.take(&fill, &whole, 0, false, false);
        let (engine, manifest) = (self.clone(), manifest.clone());
        // Kept once more at its end, when its length is known.
        let manifest = for_all(&request.settings.policy, &manifest).unwrap_or(manifest);
        self.inner.runtime.spawn(async move {
            let supply = Supply::of(Some(body), false);
            engine.cut(fill, Some(manifest), whole, supply, first).await;
        });
    }

    /// Keeps a part of an object that came in one piece.
    pub(super) fn keep_part(
        &self,
        request: &Request,
        manifest: &Manifest,
        (start, end): (u64, u64),
        mut bytes: Bytes,
    ) {
        for touched in touched(start..end, manifest.version.slice_bytes) {
            let fill = Fill::of(request.key, manifest, &request.origin, touched.index);
            let (flight, _) = self.inner.fills.join(fill.slice, 0..touched.end);
            let slice = bytes.split_to((touched.end - touched.start) as usize);
            if !flight.claim() {
                continue;
            }
            flight.note_source(Source::Origin);
            // Copies: a slice that waits for the disk does not hold all of the part.
            for page in slice.chunks(PAGE_BYTES) {
                flight.land(Part::new(Bytes::copy_from_slice(page)));
            }
            self.finish_fill(&fill, &flight, Ok(()));
        }
    }

    /// The bytes of a part, where all of them are on this node.
    pub(super) async fn part_bytes(
        &self,
        key: ObjectKey,
        manifest: &Manifest,
        request: &OriginRequest,
    ) -> Option<Bytes> {
        let (start, end) = manifest.part?;
        let mut bytes = BytesMut::new();
        for touched in touched(start..end, manifest.version.slice_bytes) {
            let id = Fill::of(key, manifest, request, touched.index).slice;
            let slice = match (self.inner.l1.slice(&id), &self.inner.l2) {
                (Some(slice), _) if slice.is_intact_in(0..slice.len()) => slice,
                (_, Some(l2)) => l2.slice(id).await?,
                (_, None) => return None,
            };
            let wanted = touched.start as usize..touched.end as usize;
            bytes.extend_from_slice(slice.bytes().get(wanted)?);
        }
        Some(bytes.freeze())
    }

    /// Fills a slice, and all others, from a body that begins at byte 0;
    /// `None` asks for it. The flight is the caller's, and handed over.
    pub(super) async fn fill_by_whole(
        &self,
        fill: &Fill,
        flight: &Arc<Flight>,
        body: Option<OriginBody>,
    ) {
        let (whole, started) = self.inner.wholes.join(fill.slice.generation);
        let accepted = whole.hand_over(flight);
        if started {
            let first = self.take(fill, &whole, 0, false, false);
            let manifest = self.manifest_of(fill).await;
            let supply = Supply::of(body, true);
            self.cut(fill.at(0), manifest, whole, supply, first).await;
        } else if !accepted && fill.version.is_resumable() {
            // That body has passed the slice: another one, for all who come now.
            let whole = self.inner.wholes.begin_another(fill.slice.generation);
            whole.hand_over(flight);
            let first = self.take(fill, &whole, 0, false, false);
            let manifest = self.manifest_of(fill).await;
            self.cut(fill.at(0), manifest, whole, Supply::of(body, true), first)
                .await;
        } else if !accepted {
            // Nothing would say that another body is the same one.
            let error = failed("its body has passed, and cannot be asked for again");
            self.announce_and_finish(fill, flight, Err(error)).await;
        }
    }

    /// The flight that slice `index` lands in; `None` while somebody else fills
    /// it, or when it is here already: in memory, or on disk (`is_here`).
    fn take(
        &self,
        fill: &Fill,
        whole: &Whole,
        index: u32,
        is_unread: bool,
        is_here: bool,
    ) -> Option<Arc<Flight>> {
        let id = fill.at(index).slice;
        let mut state = whole.lock();
        state.next = index.saturating_add(1);
        let waiting = state.waiting.iter().position(|f| f.id.index == index);
        let flight = match waiting {
            Some(at) => Some(state.waiting.swap_remove(at)),
            None if is_here || (index > 0 && self.inner.l1.slice(&id).is_some()) => None,
            None => {
                // Nobody waits for a slice that the body only passes: it is not
                // worth waiting for memory, unless it cannot be had again. Whoever is
                // still looking for it elsewhere waits too.
                let unwanted = is_unread || index < *whole.wanted.borrow();
                let listed = self.inner.fills.get(&id);
                let is_sought = listed.is_some_and(|flight| flight.is_admitted());
                let passed = unwanted && fill.version.is_resumable() && !is_sought;
                let permit = match passed {
                    true => self.inner.budget.ahead(fill.version.slice_bytes.into()),
                    false => None,
                };
                if passed && permit.is_none() {
                    None
                } else {
                    let (flight, _) = self.inner.fills.join(id, 0..fill.at(index).end());
                    if let Some(permit) = permit {
                        flight.admit(permit);
                    }
                    flight.claim().then_some(flight)
                }
            }
        };
        if let Some(flight) = &flight {
            flight.note_source(Source::Origin);
        }
        state.current = flight.clone();
        flight
    }

    async fn cut(
        &self,
        fill: Fill,
        manifest: Option<Manifest>,
        whole: Arc<Whole>,
        supply: Supply,
        first: Option<Arc<Flight>>,
    ) {
        let metrics = &self.inner.metrics;
        metrics.subrequests_total.inc();
        let asked = (supply.body.as_ref()).map_or_else(Instant::now, OriginBody::asked);
        let _guard = CutGuard {
            engine: self,
            generation: fill.slice.generation,
            whole: &whole,
        };
        let ended = self
            .cut_to_the_end(&fill, manifest.as_ref(), &whole, supply, first)
            .await;
        metrics
            .subrequest_duration_seconds
            .observe(asked.elapsed().as_secs_f64());
        let is_origins = is_origins_failure(&ended);
        let outcome = match ended {
            Ok(Ended::Whole) => Ok(()),
            Ok(Ended::GivenUp) => Err(failed("nobody reads this body")),
            Err(error) => Err(error),
        };
        if let Err(error) = &outcome {
            if is_origins {
                if *error != FillError::Changed {
                    metrics.failed_subrequests_total.inc();
                }
                tracing::warn!(url = %fill.url(), %error, "a body broke off");
            } else {
                tracing::debug!(url = %fill.url(), %error, "a body was given up");
            }
            if is_origins && *error != FillError::Changed {
                self.broke_off(&fill);
            }
            match (error, self.manifest_of(&fill).await) {
                (FillError::Changed, _) => self.announce_change(&fill).await,
                // Others may have the bytes yet, if it is known how many there are.
                (FillError::Refused { .. }, Some(manifest)) if manifest.length().is_some() => {}
                (_, Some(manifest)) if fill.version.whole => {
                    self.forget_manifest(fill.key, &manifest);
                }
                _ => {}
            }
        }
        // Past the end of a body that ended well: no bytes, no error.
        self.end(&whole, outcome);
        for flight in &whole.lock().held {
            flight.shrink();
        }
        self.let_go_of_stored(&whole).await;
        let read = whole.until_read(!fill.version.is_resumable());
        self.shedding(&fill, &whole, read).await;
        self.inner.wholes.forget(fill.slice.generation, &whole);
        let held = std::mem::take(&mut whole.lock().held);
        for flight in held {
            self.inner.fills.remove(&flight);
        }
    }

    /// No more slices: those who wait for one are told how the body ended.
    fn end(&self, whole: &Whole, outcome: Result<(), FillError>) {
        let left = {
            let mut state = whole.lock();
            state.ended = true;
            let mut left = std::mem::take(&mut state.waiting);
            left.extend(state.current.take());
            left
        };
        for flight in left {
            flight.finish(outcome.clone().map_err(FillError::for_others));
            self.inner.fills.remove(&flight);
        }
    }

    /// Cuts until the body ends; its length is noted before its last reader can
    /// know of the end, so that nobody begins another for what is past it.
    async fn cut_to_the_end(
        &self,
        fill: &Fill,
        manifest: Option<&Manifest>,
        whole: &Whole,
        mut supply: Supply,
        mut flight: Option<Arc<Flight>>,
    ) -> Result<Ended, FillError> {
        let slice_bytes = fill.version.slice_bytes;
        let known = fill.version.length;
        let mut keeping = Keeping::Kept;
        let mut is_unread = false;
        let mut at = 0u64;
        for index in 0.. {
            // As many for each slice as one that is asked for by range has: a body
            // of hours may break off more often than that, and still get on.
            supply.attempt = 0;
            if index > 0 {
                let is_tight = self.inner.budget.is_tight();
                let ahead = match is_tight {
                    true => AHEAD_WHEN_TIGHT,
                    false => AHEAD,
                };
                // A reader who pauses would miss what cannot be had again.
                let read_on = match keeping {
                    Keeping::Kept if !is_tight || fill.version.is_resumable() => {
                        READ_ON_BYTES_MAX / u64::from(slice_bytes)
                    }
                    Keeping::Kept | Keeping::Passing => 0,
                };
                let wanted = whole.until_wanted(index, ahead, read_on, is_unread);
                is_unread = match self.shedding(fill, whole, wanted).await {
                    GoOn::ForReaders => false,
                    GoOn::ForTheCache => true,
                    GoOn::NoMore => return Ok(Ended::Whole),
                    GoOn::GivenUp => return Ok(Ended::GivenUp),
                };
                // Whoever wants it reads it from there, at the disk's pace.
                let is_here = supply.is_again
                    && fill.version.is_resumable()
                    && self.is_on_disk(&fill.at(index).slice).await;
                flight = self.take(fill, whole, index, is_unread, is_here);
            }
            if let Some(flight) = &flight {
                let admitted = self.admit(flight, None);
                self.shedding(fill, whole, admitted).await?;
            }
            let slice = slice_range(index, known.unwrap_or(u64::MAX), slice_bytes);
            while at < slice.end {
                let Some(bytes) = self
                    .supply(fill, manifest, &mut supply, at, slice.end - at)
                    .await?
                else {
                    if let (Keeping::Kept, None, Some(manifest)) = (keeping, known, manifest)
                        && self.is_current(fill).await
                    {
                        let mut manifest = manifest.clone();
                        manifest.version.length = Some(at);
                        self.keep(fill.key, manifest);
                    }
                    self.finish_slice(fill, whole, flight, keeping);
                    return Ok(Ended::Whole);
                };
                let end = at + bytes.len() as u64;
                if known.is_none() && self.is_too_large(end) && keeping == Keeping::Kept {
                    // It passes without a trace: for those who read it now.
                    keeping = Keeping::Passing;
                    for authorized in [false, true] {
                        self.inner.uncacheable.note(fill.key, authorized);
                    }
                    if let Some(manifest) = self.manifest_of(fill).await {
                        self.forget_manifest(fill.key, &manifest);
                    }
                }
                if let Some(flight) = &flight {
                    // A flight that was handed over may have bytes already.
                    let landed = slice.start + u64::from(flight.bytes());
                    if end > landed {
                        let mut fresh = bytes;
                        fresh.advance(landed.saturating_sub(at) as usize);
                        flight.land(Part::new(fresh));
                    }
                }
                at = end;
            }
            self.finish_slice(fill, whole, flight.take(), keeping);
            if known == Some(at) {
                // Reads the framing's end, so that the connection can be used again.
                if let Some(body) = &mut supply.body {
                    let _ = body.next().await;
                }
                return Ok(Ended::Whole);
            }
        }
        Err(failed("more slices than can be counted"))
    }

    /// The next bytes of the body from `at` on, at most `room`; `None` at its end.
    async fn supply(
        &self,
        fill: &Fill,
        manifest: Option<&Manifest>,
        supply: &mut Supply,
        at: u64,
        room: u64,
    ) -> Result<Option<Bytes>, FillError> {
        loop {
            if !supply.pending.is_empty() {
                let most = room.min(PAGE_BYTES as u64) as usize;
                let bytes = supply.pending.split_to(supply.pending.len().min(most));
                return Ok(Some(bytes));
            }
            let error = match &mut supply.body {
                None => match self.ask_whole(fill, manifest, at).await {
                    Ok((body, skip)) => {
                        (supply.body, supply.skip) = (Some(body), skip);
                        continue;
                    }
                    Err(Retry::Yes(error)) => error,
                    Err(Retry::No(error)) => return Err(error),
                    Err(Retry::Whole(_) | Retry::OtherTag(_)) => return Err(FillError::Changed),
                },
                Some(body) => match body.next().await {
                    Ok(Some(mut bytes)) => {
                        let skipped = supply.skip.min(bytes.len() as u64);
                        bytes.advance(skipped as usize);
                        supply.skip -= skipped;
                        supply.pending = bytes;
                        continue;
                    }
                    // An end among the bytes to pass over comes too early.
                    Ok(None)
                        if supply.skip == 0
                            && fill.version.length.is_none_or(|length| length == at) =>
                    {
                        return Ok(None);
                    }
                    Ok(None) => failed("the body ended early"),
                    Err(error) => FillError::Failed {
                        status: error.status(),
                        reason: error.to_string(),
                    },
                },
            };
            supply.body = None;
            if supply.attempt >= self.inner.live.now().max_retries {
                return Err(error);
            }
            supply.attempt += 1;
            self.inner.metrics.retried_subrequests_total.inc();
            tokio::time::sleep(back_off(supply.attempt)).await;
        }
    }

    /// The body of the same version, from byte `at` on; how many bytes to pass over.
    async fn ask_whole(
        &self,
        fill: &Fill,
        manifest: Option<&Manifest>,
        at: u64,
    ) -> Result<(OriginBody, u64), Retry> {
        let stored = match manifest {
            Some(_) => None,
            None => self.manifest_of(fill).await,
        };
        let manifest = manifest.or(stored.as_ref());
        let encoding = manifest.and_then(|manifest| manifest.header(CONTENT_ENCODING.as_str()));
        // A range is asked for as it is, without an encoding: it would be one of
        // other bytes.
        let may_resume = at > 0 && encoding.is_none();
        let range = fill
            .version
            .length
            .filter(|_| may_resume)
            .map(|end| at..end);
        let mut fields = Vec::new();
        if range.is_some() {
            fields = if_range(&fill.version);
        } else if manifest.is_some() && encoding.is_none() {
            // As it came: under a tag of its own, what a client takes is of other bytes.
            fields.push((ACCEPT_ENCODING, "identity".to_owned()));
        }
        let ask = OriginAsk {
            head: false,
            range,
            open_range: None,
            fields,
        };
        let answer = self.inner.origin.get(&fill.request, &ask).await?;
        if let (206, Some(range)) = (answer.status, &ask.range) {
            self.judge_slice_answer(fill, range, &answer, false)?;
            return Ok((answer.body, 0));
        }
        let status = manifest.map_or(200, |manifest| manifest.status);
        let answered = answer.headers.get(CONTENT_ENCODING);
        let same = answer.status == status
            && same_version(&fill.version, &answer)
            // A date, or a weak tag, is the same for every encoding, and for what
            // every machine makes of it.
            && (manifest.is_none() || answered.and_then(|v| v.to_str().ok()) == encoding)
            && (encoding.is_none() || fill.version.strong_etag().is_some())
            // What was sent without a length may have one by now: its body's end.
            && (answer.length.is_none() || answer.length == fill.version.length);
        if same {
            Ok((answer.body, at))
        } else if matches!(answer.status, 429 | 500..) && status < 400 {
            Err(Retry::Yes(failed("the origin fails")))
        } else if status < 300 {
            Err(Retry::No(refusal(answer.status)))
        } else {
            Err(Retry::No(FillError::Changed))
        }
    }

    pub(super) fn is_too_large(&self, bytes: u64) -> bool {
        let max = self.inner.config.max_object_bytes;
        max.is_some_and(|max| bytes > max)
    }

    fn finish_slice(
        &self,
        fill: &Fill,
        whole: &Whole,
        flight: Option<Arc<Flight>>,
        keeping: Keeping,
    ) {
        let Some(flight) = flight else { return };
        let fill = fill.at(flight.id.index);
        flight.finish(Ok(()));
        match keeping {
            Keeping::Kept => self.land(&fill, &flight),
            Keeping::Passing => self.land_in_memory(&fill, &flight),
        }
        let mut state = whole.lock();
        state.current = None;
        state.held.push_back(flight);
        drop(state);
        self.let_go_of_read(&fill, whole);
    }

    /// What can be had again is held where the foremost reader is, anything
    /// else for all readers, while there is memory.
    fn let_go_of_read(&self, fill: &Fill, whole: &Whole) {
        let wanted = *whole.wanted.borrow();
        // The foremost reader may still be on its way to what it has opened.
        let opened = self.inner.live.now().max_concurrent_subrequests as u32;
        let near = match (fill.version.is_resumable(), self.inner.budget.is_tight()) {
            (true, true) => wanted..=wanted.saturating_add(AHEAD),
            (true, false) => wanted.saturating_sub(opened)..=wanted.saturating_add(AHEAD),
            (false, true) => wanted.saturating_sub(opened)..=u32::MAX,
            (false, false) => 0..=u32::MAX,
        };
        let mut state = whole.lock();
        let too_many = state.held.len().saturating_sub(HELD);
        let mut at = 0;
        state.held.retain(|flight| {
            at += 1;
            let stays = at > too_many && near.contains(&flight.id.index);
            if !stays {
                self.inner.fills.remove(flight);
            }
            stays
        });
    }

    /// Does what is to be done, and meanwhile lets go of what is held for
    /// readers: of what they have passed, and, should memory stay short while the
    /// foremost of them does not go on, of everything. Else bodies that wait for
    /// memory would wait for what they and others like them hold.
    async fn shedding<T>(&self, fill: &Fill, whole: &Whole, to_do: impl Future<Output = T>) -> T {
        let mut to_do = std::pin::pin!(to_do);
        let mut wanted = whole.wanted.subscribe();
        let patience = match fill.version.is_resumable() {
            true => SHORT_FOR,
            false => SHORT_AND_UNREAD_FOR,
        };
        loop {
            let holds = !whole.lock().held.is_empty();
            tokio::select! {
                biased;
                done = &mut to_do => return done,
                // The body is held, so its sender is there.
                _ = wanted.changed(), if holds => self.let_go_of_read(fill, whole),
                () = self.inner.budget.until_short_for(patience), if holds => {
                    for flight in std::mem::take(&mut whole.lock().held) {
                        self.inner.fills.remove(&flight);
                    }
                }
            }
        }
    }

    /// Whether a slice lies on the disk, as far as its first bytes tell.
    async fn is_on_disk(&self, id: &SliceId) -> bool {
        match &self.inner.l2 {
            Some(l2) => l2.slice_range(*id, 0, 1).await.is_some(),
            None => false,
        }
    }

    /// What lies on the disk need not be held.
    async fn let_go_of_stored(&self, whole: &Whole) {
        let held: Vec<_> = whole.lock().held.iter().cloned().collect();
        for flight in held {
            if self.is_on_disk(&flight.id).await {
                whole.lock().held.retain(|h| !Arc::ptr_eq(h, &flight));
                self.inner.fills.remove(&flight);
            }
        }
    }
}

/// Ends a body whose cutting panics, and lets go of those who wait for it.
struct CutGuard<'a> {
    engine: &'a Engine,
    generation: Generation,
    whole: &'a Arc<Whole>,
}

impl Drop for CutGuard<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.engine
                .end(self.whole, Err(failed("the fill panicked")));
            self.engine.inner.wholes.forget(self.generation, self.whole);
        }
    }
}

/// Why a body continues to its next slice.
#[derive(Debug, PartialEq, Eq)]
enum GoOn {
    /// It is near its foremost reader.
    ForReaders,
    /// Nobody reads it: it is read on to be kept.
    ForTheCache,
    /// It does not: another body has taken its place, and nobody waits for this.
    NoMore,
    /// It does not: nobody reads it, and it is too large to be read on.
    GivenUp,
}

/// How a body ended that did not fail.
#[derive(Clone, Copy)]
enum Ended {
    /// There is no more of it, or nobody who wants more.
    Whole,
    /// We let go of it.
    GivenUp,
}

/// Whether it was the origin that ended a body too early: not our memory, our
/// patience with readers, or the client that it was asked for.
fn is_origins_failure(ended: &Result<Ended, FillError>) -> bool {
    !matches!(
        ended,
        Ok(_) | Err(FillError::NoMemory | FillError::Refused { .. })
    )
}

/// Whether a body's slices are kept.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Keeping {
    Kept,
    /// Too large: only for those who read it as it passes.
    Passing,
}

fn failed(reason: &str) -> FillError {
    FillError::Failed {
        status: 502,
        reason: reason.into(),
    }
}

impl Wholes {
    /// The body of a version under way, if there is one.
    pub(super) fn get(&self, generation: Generation) -> Option<Arc<Whole>> {
        let map = self.map.lock().expect("no panic while held");
        map.get(&generation).cloned()
    }

    /// A reader has come to this slice.
    pub(super) fn note(&self, slice: &SliceId) {
        if let Some(whole) = self.get(slice.generation) {
            whole.note(slice.index);
        }
    }

    /// The body of a version; `true` when the caller must now supply it.
    fn join(&self, generation: Generation) -> (Arc<Whole>, bool) {
        let mut map = self.map.lock().expect("no panic while held");
        if let Some(whole) = map.get(&generation) {
            return (whole.clone(), false);
        }
        let whole = Arc::<Whole>::default();
        map.insert(generation, whole.clone());
        (whole, true)
    }

    /// A body in place of one that has passed what is wanted; that one goes on
    /// for whoever waits for it.
    fn begin_another(&self, generation: Generation) -> Arc<Whole> {
        let mut map = self.map.lock().expect("no panic while held");
        let whole = Arc::<Whole>::default();
        if let Some(before) = map.insert(generation, whole.clone()) {
            before.lock().replaced = true;
            before.wanted.send_modify(|_| ());
        }
        whole
    }

    fn forget(&self, generation: Generation, whole: &Arc<Whole>) {
        let mut map = self.map.lock().expect("no panic while held");
        if map
            .get(&generation)
            .is_some_and(|listed| Arc::ptr_eq(listed, whole))
        {
            map.remove(&generation);
        }
    }
}

impl Whole {
    /// Whether the body will fill this flight, or somebody else does. Nobody else
    /// may fill what waits for a body: two would land in it.
    pub(super) fn want(&self, flight: &Arc<Flight>) -> bool {
        self.wait_for(flight, Flight::claim) || flight.is_claimed()
    }

    /// Whether the body will fill this flight, which the caller has claimed.
    fn hand_over(&self, flight: &Arc<Flight>) -> bool {
        self.wait_for(flight, |_| true)
    }

    /// Whether the body will fill this flight, if it comes to it and the caller may.
    fn wait_for(&self, flight: &Arc<Flight>, may: impl FnOnce(&Flight) -> bool) -> bool {
        {
            let mut state = self.lock();
            if state.ended || flight.id.index < state.next || !may(flight) {
                return false;
            }
            state.waiting.push(flight.clone());
        }
        self.note(flight.id.index);
        true
    }

    fn note(&self, index: u32) {
        self.wanted.send_if_modified(|wanted| {
            let further = index > *wanted;
            *wanted = (*wanted).max(index);
            further
        });
    }

    /// Waits while slice `index` is more than `window` ahead of every reader.
    /// Where it is no more than `read_on` ahead, that is for a while, and a body
    /// that `is_unread` has done so already.
    async fn until_wanted(&self, index: u32, window: u32, read_on: u64, is_unread: bool) -> GoOn {
        let mut wanted = self.wanted.subscribe();
        loop {
            let foremost = *wanted.borrow_and_update();
            if index <= foremost.saturating_add(window) {
                return GoOn::ForReaders;
            }
            if self.is_done_with() {
                return GoOn::NoMore;
            }
            let is_worth_keeping = u64::from(index - foremost) <= read_on;
            let patience = match is_worth_keeping {
                true if is_unread => return GoOn::ForTheCache,
                true => UNREAD_FOR,
                false => GIVEN_UP_AFTER,
            };
            if tokio::time::timeout(patience, wanted.changed())
                .await
                .is_err()
            {
                return match is_worth_keeping {
                    true => GoOn::ForTheCache,
                    false => GoOn::GivenUp,
                };
            }
        }
    }

    /// Whether another body is in its place and nobody waits for this one; then
    /// nobody will.
    fn is_done_with(&self) -> bool {
        let mut state = self.lock();
        state.ended |= state.replaced && state.waiting.is_empty();
        state.ended
    }

    /// Waits until what is held has been read, or nobody reads.
    async fn until_read(&self, by_all: bool) {
        let last = self.lock().held.back().map(|flight| flight.id.index);
        let Some(last) = last else { return };
        let patience = match by_all {
            true => GIVEN_UP_AFTER,
            false => UNREAD_FOR,
        };
        let mut wanted = self.wanted.subscribe();
        while *wanted.borrow_and_update() < last {
            if tokio::time::timeout(patience, wanted.changed())
                .await
                .is_err()
            {
                return;
            }
        }
        if by_all {
            // The foremost reader has come to the last slice; others are close behind.
            tokio::time::sleep(UNREAD_FOR).await;
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().expect("no panic while held")
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::Instant;

    use super::*;

    /// Cuts slices of a body that does not end, as if they came in no time; how
    /// many until it is given up, and after how long.
    async fn until_given_up(whole: &Whole, read_on: u64) -> (u32, Duration) {
        let began = Instant::now();
        let mut is_unread = false;
        for index in 0.. {
            match whole.until_wanted(index, AHEAD, read_on, is_unread).await {
                GoOn::GivenUp => return (index, began.elapsed()),
                wanted => is_unread = wanted == GoOn::ForTheCache,
            }
        }
        unreachable!("there is no such body")
    }

    #[tokio::test(start_paused = true)]
    async fn an_endless_body_that_nobody_reads_is_given_up() {
        let (slices, after) = until_given_up(&Whole::default(), 256).await;
        assert_eq!(slices, 256 + 1);
        assert_eq!(after, UNREAD_FOR + GIVEN_UP_AFTER);
        // One that is not kept is not read on either.
        let (slices, after) = until_given_up(&Whole::default(), 0).await;
        assert_eq!((slices, after), (AHEAD + 1, GIVEN_UP_AFTER));
    }

    #[test]
    fn what_we_decide_is_no_failure_of_the_origin() {
        for ours in [
            Ok(Ended::Whole),
            Ok(Ended::GivenUp),
            Err(FillError::NoMemory),
            Err(FillError::Refused { status: 401 }),
        ] {
            assert!(!is_origins_failure(&ours));
        }
        for its in [failed("the body ended early"), FillError::Changed] {
            assert!(is_origins_failure(&Err(its)));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_stays_ahead_of_its_foremost_reader() {
        let whole = Arc::<Whole>::default();
        let cutting = tokio::spawn({
            let whole = whole.clone();
            async move { until_given_up(&whole, 0).await }
        });
        // A reader who takes a minute for each slice: slow, but there.
        for index in 1..=30 {
            tokio::time::sleep(Duration::from_secs(60)).await;
            assert!(!cutting.is_finished());
            whole.note(index);
        }
        assert_eq!(cutting.await.unwrap().0, 30 + AHEAD + 1);
    }

    /// Two that land in one flight would put their bytes one after the other.
    #[test]
    fn what_waits_for_a_body_is_filled_by_nobody_else() {
        let flight = |index| {
            let generation = Generation(1);
            Flight::new(SliceId { generation, index }, 0..1)
        };
        let whole = Whole::default();
        whole.lock().next = 3;
        let (ahead, passed) = (flight(3), flight(2));
        assert!(whole.want(&ahead) && !ahead.claim());
        assert!(!whole.want(&passed) && passed.claim());
        assert!(whole.want(&passed), "somebody fills it");
        assert_eq!(whole.lock().waiting.len(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_another_replaces_ends_when_nobody_waits_for_it() {
        let wholes = Wholes::default();
        let generation = Generation(1);
        let (before, _) = wholes.join(generation);
        let id = |index| SliceId { generation, index };
        let flight = Flight::new(id(20), 0..1);
        assert!(before.hand_over(&flight));
        let after = wholes.begin_another(generation);
        // It still has somebody to bring that slice to, and then it has not.
        let next = before.until_wanted(20, AHEAD, 0, false).await;
        assert_eq!(next, GoOn::ForReaders);
        before.lock().waiting.clear();
        let next = before.until_wanted(21 + AHEAD, AHEAD, 256, false).await;
        assert_eq!(next, GoOn::NoMore);
        assert!(!before.hand_over(&Flight::new(id(40), 0..1)));
        assert!(after.hand_over(&Flight::new(id(40), 0..1)));
    }
}
