//! One fill per slice, however many readers; they get its bytes as they land.
//!
//! A flight belongs to nobody: whoever started it may leave, the fill goes on
//! and the slice is kept. Readers wait for news and never poll. Every part has
//! the checksum that it came with, or that was taken when it landed, and is checked
//! when it is given to a reader. A flight holds a permit of the memory budget for as long as it
//! holds bytes. Not here: where the bytes come from (`engine`).

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::Poll;

use bytes::{Bytes, BytesMut};
use pingora_slice_cluster::SliceId;
use pingora_slice_cluster::crc32c::crc32c_combine;
use pingora_slice_cluster::wire::Part;
use tokio::sync::watch;

use crate::budget::{Budget, Permit};
use crate::slice::{PAGE_BYTES, Slice, SliceParts, Sums, pages};

/// Parts smaller than this are joined: a part costs some 100 bytes besides its own.
const JOINED_BYTES_MAX: usize = 4096;
/// Wake readers at least this often while more bytes are available: each time
/// costs a thread switch, and a write to the client.
const TOLD_BYTES_MAX: u32 = LARGE_BYTES as u32 / 4;

/// Why a slice could not be had.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum FillError {
    /// The origin has another version now: plan the request again.
    #[error("the origin has another version now")]
    Changed,
    /// The origin could not be used: the status a client should see.
    #[error("the origin could not be used ({status}): {reason}")]
    Failed {
        /// 502 or 504.
        status: u16,
        /// For the log.
        reason: String,
    },
    /// The origin refuses whoever began the fill, by what that client sent: it
    /// says nothing of the version, nor of what others get.
    #[error("the origin refuses this client ({status})")]
    Refused {
        /// The origin's own, 3xx or 4xx.
        status: u16,
    },
    /// The same, where whoever waits is another client: it may ask for itself.
    #[error("the origin refuses the client that began it")]
    AnotherRefused,
    /// The memory budget is spent, and stayed so: another node may have room.
    #[error("no memory for it came free in time")]
    NoMemory,
    /// Bytes changed after they had landed, or on their way from a peer's memory: have
    /// them once more.
    #[error("bytes were damaged in memory")]
    Damaged,
}

impl FillError {
    /// As `Cache-Status` says it.
    pub fn as_str(&self) -> &'static str {
        match self {
            FillError::NoMemory => "no-memory",
            FillError::Changed
            | FillError::Failed { .. }
            | FillError::Refused { .. }
            | FillError::AnotherRefused
            | FillError::Damaged => "fill-failed",
        }
    }

    /// The status a client should see.
    pub fn status(&self) -> u16 {
        match self {
            FillError::Failed { status, .. } => *status,
            FillError::NoMemory => 503,
            FillError::Changed
            | FillError::Refused { .. }
            | FillError::AnotherRefused
            | FillError::Damaged => 502,
        }
    }

    /// What it is to those who did not begin the fill.
    pub fn for_others(self) -> FillError {
        match self {
            FillError::Refused { .. } => FillError::AnotherRefused,
            error => error,
        }
    }
}

/// Where a slice came from, for the counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// This node's memory.
    L1,
    /// A fill that was under way.
    Flight,
    /// This node's disk.
    L2,
    /// Another node, which had it.
    Peer,
    /// Another node, which asked the origin for it.
    PeerFill,
    /// The origin.
    Origin,
}

impl Source {
    /// The label in the metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Source::L1 => "l1",
            Source::Flight => "flight",
            Source::L2 => "l2",
            Source::Peer | Source::PeerFill => "peer",
            Source::Origin => "origin",
        }
    }

    /// Whether another node gave it.
    pub fn is_peer(self) -> bool {
        matches!(self, Source::Peer | Source::PeerFill)
    }

    /// Whether the origin had to be asked.
    pub fn is_miss(self) -> bool {
        matches!(self, Source::PeerFill | Source::Origin)
    }

    /// What it is for bytes that the origin gave with a new manifest, wherever
    /// they lay when they were read.
    pub fn as_new(self) -> Source {
        match self.is_peer() {
            true => Source::PeerFill,
            false => Source::Origin,
        }
    }
}

/// One fill of a slice, or of a part of one.
#[derive(Debug)]
pub struct Flight {
    /// The slice.
    pub id: SliceId,
    /// What of it is filled, in bytes from its start; an open end (`u32::MAX`)
    /// where the slice's length is not known yet.
    pub range: Range<u32>,
    landed: Mutex<Landed>,
    /// Of what has not come with its own; `None` once a damaged part has, or they
    /// were taken. Not with the others: readers need not wait for a sum.
    sums: Mutex<Option<Sums>>,
    news: watch::Sender<()>,
}

#[derive(Debug, Default)]
struct Landed {
    parts: Vec<Part>,
    bytes: u32,
    /// Of these, what readers have not been told of.
    untold: u32,
    source: Option<Source>,
    claimed: bool,
    /// Somebody reads it, and counts its source.
    is_counted: bool,
    outcome: Option<Result<(), FillError>>,
    /// A part was found damaged: no more readers.
    spoiled: bool,
    /// The parts are views of one buffer of this length.
    views_of: Option<usize>,
    /// For the bytes above.
    permit: Option<Permit>,
}

impl Flight {
    /// A flight that nothing has landed of.
    pub fn new(id: SliceId, range: Range<u32>) -> Arc<Flight> {
        Arc::new(Flight {
            id,
            range,
            landed: Mutex::default(),
            sums: Mutex::new(Some(Sums::default())),
            news: watch::Sender::new(()),
        })
    }

    /// Takes the right to fill it; only the first caller ever has it.
    pub fn claim(&self) -> bool {
        !std::mem::replace(&mut self.landed().claimed, true)
    }

    /// Whether somebody fills it, or has.
    pub fn is_claimed(&self) -> bool {
        let landed = self.landed();
        landed.claimed || landed.outcome.is_some()
    }

    /// Adds bytes that follow those that have landed, and tells the readers.
    pub fn land(&self, part: Part) {
        self.land_among(part);
        self.tell();
    }

    /// As [`Flight::land`], where more may be there already: the readers are told
    /// by [`Flight::coming`].
    pub fn land_among(&self, part: Part) {
        self.sums().take_if(|sums| !sums.add_part(&part));
        self.land_carried(part);
    }

    /// The same of bytes that have come with their checksum, from a peer or another
    /// flight. Readers check it; the slice's sums are taken if it is kept, which few are.
    pub fn land_carried(&self, part: Part) {
        let mut landed = self.landed();
        debug_assert!(landed.outcome.is_none(), "nothing lands after the end");
        landed.bytes += part.bytes.len() as u32;
        landed.untold += part.bytes.len() as u32;
        let is_much = landed.untold >= TOLD_BYTES_MAX;
        match landed.parts.last_mut() {
            Some(last) if last.bytes.len() + part.bytes.len() <= JOINED_BYTES_MAX => {
                *last = joined(last, &part);
            }
            _ => landed.parts.push(part),
        }
        drop(landed);
        if is_much {
            self.tell();
        }
    }

    /// What comes next. If that is not there yet, the readers are told of what is.
    pub async fn coming<T>(&self, next: impl Future<Output = T>) -> T {
        let mut next = std::pin::pin!(next);
        if let Poll::Ready(next) = futures::poll!(next.as_mut()) {
            return next;
        }
        self.tell();
        next.await
    }

    /// Tells the readers of what has landed.
    pub fn tell(&self) {
        if std::mem::take(&mut self.landed().untold) > 0 {
            self.news.send_replace(());
        }
    }

    /// Adds all of a slice that was stored, and has just been checked.
    pub fn land_stored(&self, slice: &Slice, source: Source) {
        self.land_views(slice.checked_parts(), slice.len(), source);
    }

    /// Adds bytes of a slice that was stored, and have just been checked.
    pub fn land_read(&self, bytes: Bytes, source: Source) {
        let views_of = bytes.len();
        // They lie in what was read for them, which may be more.
        let bytes = match views_of > PAGE_BYTES {
            true => bytes,
            false => copy_of(&bytes),
        };
        self.land_views(pages(bytes), views_of, source);
    }

    fn land_views(&self, parts: impl IntoIterator<Item = Part>, of: usize, source: Source) {
        let mut landed = self.landed();
        landed.source = Some(source);
        landed.views_of = Some(of);
        landed.bytes += of as u32;
        landed.parts.extend(parts);
        drop(landed);
        self.news.send_replace(());
    }

    /// Gives it the right to hold its bytes, unless it has that already.
    pub fn admit(&self, permit: Permit) {
        self.landed().permit.get_or_insert(permit);
        self.news.send_replace(());
    }

    /// The right to hold its bytes, if it has that.
    pub fn permit(&self) -> Option<Permit> {
        self.landed().permit.clone()
    }

    /// Waits until somebody has given it the right to hold bytes, or ended it.
    pub async fn until_admitted(&self) {
        let mut news = self.news.subscribe();
        let waits = || !self.is_admitted() && self.outcome().is_none();
        // The flight is held, so its sender is there.
        while waits() && news.changed().await.is_ok() {}
    }

    /// Whether it has the right to hold bytes.
    pub fn is_admitted(&self) -> bool {
        self.landed().permit.is_some()
    }

    /// Notes where the bytes come from.
    pub fn note_source(&self, source: Source) {
        self.landed().source = Some(source);
    }

    /// Takes the right to count its source; only the first caller ever has it.
    /// For all others the slice came from a fill that was under way.
    pub fn is_first_to_count(&self) -> bool {
        !std::mem::replace(&mut self.landed().is_counted, true)
    }

    /// Whether it has nothing yet, and asks a peer for what that may have stored.
    pub fn is_asking_a_peer(&self) -> bool {
        let landed = self.landed();
        landed.bytes == 0 && landed.source.is_some_and(Source::is_peer)
    }

    /// Where the bytes came from, once known; where they are asked for.
    pub fn source(&self) -> Option<Source> {
        self.landed().source
    }

    /// Ends the flight.
    pub fn finish(&self, outcome: Result<(), FillError>) {
        self.landed().outcome.get_or_insert(outcome);
        self.news.send_replace(());
    }

    /// Gives back what its permit is for beyond what has landed: no more will, and
    /// no connection is held for it.
    pub fn shrink(&self) {
        let mut landed = self.landed();
        let bytes = landed.bytes.into();
        if let Some(permit) = &mut landed.permit {
            permit.shrink(bytes);
        }
    }

    /// Bytes landed so far, counted from the start of `range`.
    pub fn bytes(&self) -> u32 {
        self.landed().bytes
    }

    /// Whether its parts are views of more than these bytes, which they would keep.
    pub fn are_views_beyond(&self, range: &Range<u32>) -> bool {
        (self.landed().views_of).is_some_and(|bytes| bytes > range.len().max(PAGE_BYTES))
    }

    /// The slice's byte that lands next.
    pub fn next_byte(&self) -> u32 {
        self.range.start + self.bytes()
    }

    /// How it ended, if it has.
    pub fn outcome(&self) -> Option<Result<(), FillError>> {
        self.landed().outcome.clone()
    }

    /// Whether it has ended, before this byte of the slice.
    fn ended_before(&self, at: u32) -> bool {
        let landed = self.landed();
        landed.outcome.is_some() && self.range.start + landed.bytes < at
    }

    fn has_failed(&self) -> bool {
        let landed = self.landed();
        landed.spoiled || matches!(landed.outcome, Some(Err(_)))
    }

    /// Everything that landed, as one slice; once, and when no more will land.
    /// `None` when a part was damaged, as far as that was seen.
    pub fn slice(&self) -> Option<SliceParts> {
        let mut sums = self.sums().take()?;
        let (parts, bytes) = {
            let landed = self.landed();
            if landed.spoiled {
                return None;
            }
            (landed.parts.clone(), landed.bytes)
        };
        if sums.taken() != bytes as usize {
            sums = Sums::default();
            if !parts.iter().all(|part| sums.add_part(part)) {
                return None;
            }
        }
        let parts = parts.into_iter().map(|part| part.bytes);
        Some(SliceParts::new(parts, sums))
    }

    /// A reader of the bytes of `range` (from the slice's start), within the flight's own.
    pub fn read(self: &Arc<Self>, range: Range<u32>) -> FlightReader {
        let news = self.news.subscribe();
        FlightReader {
            flight: self.clone(),
            news,
            at: range.start.max(self.range.start),
            end: range.end,
            part: 0,
            part_start: self.range.start,
        }
    }

    fn landed(&self) -> MutexGuard<'_, Landed> {
        self.landed.lock().expect("no panic while held")
    }

    fn sums(&self) -> MutexGuard<'_, Option<Sums>> {
        self.sums.lock().expect("no panic while held")
    }
}

/// Two parts as one, with the checksum that the bytes had when they landed.
fn joined(first: &Part, second: &Part) -> Part {
    let mut bytes = BytesMut::with_capacity(first.bytes.len() + second.bytes.len());
    bytes.extend_from_slice(&first.bytes);
    bytes.extend_from_slice(&second.bytes);
    Part {
        bytes: bytes.freeze(),
        crc32c: crc32c_combine(first.crc32c, second.crc32c, second.bytes.len()),
    }
}

/// Follows one flight.
pub struct FlightReader {
    flight: Arc<Flight>,
    news: watch::Receiver<()>,
    /// The slice's bytes that are still wanted.
    at: u32,
    end: u32,
    /// Part to look at, and the slice's byte that it starts with. The last part
    /// may still grow.
    part: usize,
    part_start: u32,
}

impl FlightReader {
    /// The next bytes, as soon as they land; `None` when all that was wanted,
    /// or all there is, has been given.
    pub async fn next(&mut self) -> Option<Result<Part, FillError>> {
        loop {
            self.news.mark_unchanged();
            match self.step() {
                Step::Give(part, cut) => return Some(self.checked(part, cut)),
                Step::End => return None,
                Step::Broken(error) => return Some(Err(error)),
                Step::Wait => {}
            }
            // The flight is held, so its sender is there.
            let _ = self.news.changed().await;
        }
    }

    /// All that was wanted, in one run; `None`: it ended short.
    ///
    /// # Errors
    /// As [`FlightReader::next`].
    pub async fn all(mut self) -> Result<Option<Bytes>, FillError> {
        let wanted = (self.end - self.at) as usize;
        let Some(first) = self.next().await.transpose()? else {
            return Ok(None);
        };
        if first.bytes.len() == wanted {
            return Ok(Some(first.bytes));
        }
        let mut bytes = BytesMut::with_capacity(wanted);
        bytes.extend_from_slice(&first.bytes);
        while let Some(part) = self.next().await {
            bytes.extend_from_slice(&part?.bytes);
        }
        Ok((bytes.len() == wanted).then(|| bytes.freeze()))
    }

    /// The flight that is followed.
    pub fn flight(&self) -> &Arc<Flight> {
        &self.flight
    }

    /// The bytes `cut` of a part, if they are those that landed.
    fn checked(&self, part: Part, cut: Range<usize>) -> Result<Part, FillError> {
        if !part.is_intact() {
            self.flight.landed().spoiled = true;
            return Err(FillError::Damaged);
        }
        if cut.len() == part.bytes.len() {
            return Ok(part);
        }
        Ok(Part::new(part.bytes.slice(cut)))
    }

    fn step(&mut self) -> Step {
        let landed = self.flight.landed();
        while self.at < self.end
            && let Some(part) = landed.parts.get(self.part)
        {
            let start = self.part_start;
            let end = start + part.bytes.len() as u32;
            if self.at >= end {
                if self.part + 1 == landed.parts.len() {
                    break;
                }
                (self.part, self.part_start) = (self.part + 1, end);
                continue;
            }
            let cut = (self.at - start) as usize..(self.end.min(end) - start) as usize;
            self.at = self.end.min(end);
            return Step::Give(part.clone(), cut);
        }
        if self.at >= self.end {
            return Step::End;
        }
        match &landed.outcome {
            None => Step::Wait,
            Some(Ok(())) => Step::End,
            Some(Err(error)) => Step::Broken(error.clone()),
        }
    }
}

enum Step {
    Give(Part, Range<usize>),
    End,
    Broken(FillError),
    Wait,
}

/// The flights under way, by slice.
#[derive(Debug, Default)]
pub struct Flights {
    map: Mutex<HashMap<SliceId, Arc<Flight>>>,
}

impl Flights {
    /// The flight of `id`, if one is under way; one that has failed is not.
    pub fn get(&self, id: &SliceId) -> Option<Arc<Flight>> {
        let map = self.map.lock().expect("no panic while held");
        map.get(id).filter(|flight| !flight.has_failed()).cloned()
    }

    /// The flight of `id`; `true` when it was started by this call, which must
    /// then fill it, finish it and [`Flights::remove`] it.
    pub fn join(&self, id: SliceId, range: Range<u32>) -> (Arc<Flight>, bool) {
        match self.map.lock().expect("no panic while held").entry(id) {
            Entry::Occupied(mut entry) if entry.get().has_failed() => {
                let flight = Flight::new(id, range);
                entry.insert(flight.clone());
                (flight, true)
            }
            Entry::Occupied(entry) => (entry.get().clone(), false),
            Entry::Vacant(entry) => (entry.insert(Flight::new(id, range)).clone(), true),
        }
    }

    /// Takes a finished flight off the list.
    pub fn remove(&self, flight: &Arc<Flight>) {
        let mut map = self.map.lock().expect("no panic while held");
        if map
            .get(&flight.id)
            .is_some_and(|listed| Arc::ptr_eq(listed, flight))
        {
            map.remove(&flight.id);
        }
    }

    /// While this is held by whoever fills a flight, its readers are let go if
    /// the filling panics.
    pub fn guard(self: &Arc<Self>, flight: &Arc<Flight>) -> PanicGuard {
        PanicGuard {
            flights: self.clone(),
            flight: flight.clone(),
        }
    }
}

/// See [`Flights::guard`].
pub struct PanicGuard {
    flights: Arc<Flights>,
    flight: Arc<Flight>,
}

impl Drop for PanicGuard {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.flight.finish(Err(FillError::Failed {
                status: 502,
                reason: "the fill panicked".into(),
            }));
            self.flights.remove(&self.flight);
        }
    }
}

/// Bytes checked and given at a time where few calls count: each write wakes the
/// client once more, which costs a virtual machine some 30 us.
pub const LARGE_BYTES: usize = 1024 * 1024;

/// How a reader wants the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// As copies of at most a page, which may be held on to.
    Copies,
    /// At most a page at a time.
    Pages,
    /// [`LARGE_BYTES`] at a time, where that many are there.
    Large,
}

/// One slice being read by one response.
pub enum SliceReader {
    /// It is in memory, all of it, and shared with the store.
    Stored {
        /// All of it; checked piece by piece, just before they are given.
        slice: Slice,
        /// Where it lay.
        source: Source,
        /// All of it has been checked just now: the first piece is not, again.
        is_checked: bool,
        /// What is still wanted of it.
        wanted: Range<usize>,
        /// Should it leave the store; `None`: it is small.
        pin: Option<Permit>,
    },
    /// It was in memory, and there was no room to hold it.
    Copied {
        /// The first of the bytes wanted.
        bytes: Bytes,
        /// What follows is to be opened again.
        more: bool,
    },
    /// It is landing.
    Flight {
        /// Its reader.
        reader: FlightReader,
        /// Whether somebody else had started it.
        joined: bool,
        /// Whether this reader counts where its bytes come from.
        is_first: bool,
        /// Where permits come from.
        budget: Budget,
        /// For the buffer that the flight's parts are views of.
        pin: Option<Permit>,
        /// What follows is to be opened again.
        more: bool,
    },
}

impl SliceReader {
    /// The next bytes, or `None` at the end. What they hold beyond themselves is
    /// covered by [`SliceReader::pin`]; nothing if they are to be copied.
    pub async fn next(&mut self, form: Form) -> Option<Result<Bytes, FillError>> {
        let copied = form == Form::Copies;
        match self {
            SliceReader::Copied { bytes, .. } => {
                (!bytes.is_empty()).then(|| Ok(std::mem::take(bytes)))
            }
            SliceReader::Stored { wanted, .. } if wanted.start >= wanted.end => None,
            SliceReader::Stored {
                slice,
                is_checked,
                wanted,
                ..
            } => {
                let is_checked = std::mem::take(is_checked);
                let most = match form {
                    Form::Large => LARGE_BYTES,
                    Form::Pages | Form::Copies => PAGE_BYTES,
                };
                let piece = wanted.start..wanted.end.min(wanted.start + most);
                if !is_checked && !slice.is_intact_in(piece.clone()) {
                    return Some(Err(FillError::Damaged));
                }
                wanted.start = piece.end;
                let piece = slice.bytes().slice(piece);
                Some(Ok(if copied { copy_of(&piece) } else { piece }))
            }
            SliceReader::Flight {
                reader,
                budget,
                pin,
                ..
            } => {
                let part = match reader.next().await? {
                    Ok(part) => part,
                    Err(error) => return Some(Err(error)),
                };
                let views_of = reader.flight().landed().views_of;
                let Some(buffer) = views_of.filter(|bytes| *bytes > PAGE_BYTES) else {
                    return Some(Ok(part.bytes));
                };
                if !copied && pin.is_none() {
                    *pin = budget.ahead(buffer as u64);
                }
                let shared = !copied && pin.is_some();
                Some(Ok(if shared {
                    part.bytes
                } else {
                    copy_of(&part.bytes)
                }))
            }
        }
    }

    /// The permit for what the last bytes given hold beyond themselves.
    pub fn pin(&self) -> Option<Permit> {
        match self {
            SliceReader::Stored { pin, .. } | SliceReader::Flight { pin, .. } => pin.clone(),
            SliceReader::Copied { .. } => None,
        }
    }

    /// Whether what follows is to be opened again.
    pub fn has_more(&self) -> bool {
        matches!(
            self,
            SliceReader::Copied { more: true, .. } | SliceReader::Flight { more: true, .. }
        )
    }

    /// Whether what is read has ended, before this byte of the slice.
    pub fn ended_before(&self, at: u32) -> bool {
        match self {
            SliceReader::Stored { slice, .. } => slice.len() < at as usize,
            SliceReader::Copied { .. } => false,
            SliceReader::Flight { reader, .. } => reader.flight().ended_before(at),
        }
    }

    /// Whether somebody else had started the flight that is read.
    pub fn is_joined(&self) -> bool {
        matches!(self, SliceReader::Flight { joined: true, .. })
    }

    /// Whether it is a slice in memory, and no flight.
    pub fn is_stored(&self) -> bool {
        matches!(
            self,
            SliceReader::Stored { .. } | SliceReader::Copied { .. }
        )
    }

    /// Where the bytes came from, for the counters.
    pub fn source(&self) -> Source {
        match self {
            SliceReader::Stored { source, .. } => *source,
            SliceReader::Copied { .. } => Source::L1,
            SliceReader::Flight {
                is_first: false, ..
            } => Source::Flight,
            SliceReader::Flight { reader, .. } => {
                reader.flight().source().unwrap_or(Source::Origin)
            }
        }
    }
}

fn copy_of(bytes: &Bytes) -> Bytes {
    Bytes::copy_from_slice(bytes)
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;
    use pingora_slice_cluster::Generation;
    use pingora_slice_cluster::crc32c::crc32c;

    use super::*;
    use crate::budget::Sum;

    fn id() -> SliceId {
        SliceId {
            generation: Generation(1),
            index: 0,
        }
    }

    #[tokio::test]
    async fn a_reader_gets_its_range_however_the_parts_fall() {
        let whole: Vec<u8> = (0..20).collect();
        for cut in 1..20 {
            for start in 0..20u32 {
                for end in start..=20 {
                    let flight = Flight::new(id(), 0..20);
                    for part in whole.chunks(cut) {
                        flight.land(Part::new(Bytes::copy_from_slice(part)));
                    }
                    flight.finish(Ok(()));
                    let mut reader = flight.read(start..end);
                    let mut read = Vec::new();
                    while let Some(part) = reader.next().await {
                        read.extend_from_slice(&part.unwrap().bytes);
                    }
                    assert_eq!(read, whole[start as usize..end as usize]);
                }
            }
        }
    }

    #[test]
    fn one_filler_and_no_reader_of_a_flight_that_failed() {
        let flights = Flights::default();
        let (flight, started) = flights.join(id(), 0..10);
        assert!(started && flight.claim() && !flight.claim());
        assert!(flights.get(&id()).is_some());
        flight.finish(Err(FillError::Changed));
        assert!(flights.get(&id()).is_none());
        let (next, started) = flights.join(id(), 0..10);
        assert!(started && !next.is_claimed());
        // The end of the first takes nothing from the second.
        flights.remove(&flight);
        assert!(flights.get(&id()).is_some());
    }

    #[tokio::test]
    async fn followers_read_while_it_lands_and_see_how_it_ends() {
        let flight = Flight::new(id(), 0..10);
        let mut reader = flight.read(0..10);
        let follower = tokio::spawn(async move {
            let first = reader.next().await.unwrap().unwrap().bytes;
            let second = reader.next().await.unwrap();
            (first, second)
        });
        flight.land(Part::new(Bytes::from_static(b"abc")));
        tokio::task::yield_now().await;
        flight.finish(Err(FillError::Changed));
        let (first, second) = follower.await.unwrap();
        assert_eq!(&first[..], b"abc");
        assert_eq!(second, Err(FillError::Changed));
    }

    /// Whoever goes on at the byte where a slice ends has all of it.
    #[test]
    fn an_end_before_a_byte_is_told_from_an_end_at_it() {
        let flight = Flight::new(id(), 5..10);
        flight.land(Part::new(Bytes::from_static(b"abc")));
        assert!(!flight.ended_before(9), "it has not ended");
        flight.finish(Ok(()));
        assert!(flight.ended_before(9) && !flight.ended_before(8));
    }

    #[test]
    fn what_a_peer_is_asked_for_may_never_come() {
        let flight = Flight::new(id(), 0..10);
        assert!(!flight.is_asking_a_peer(), "nobody has looked for it yet");
        flight.note_source(Source::Peer);
        assert!(flight.is_asking_a_peer());
        flight.land(Part::new(Bytes::from_static(b"abc")));
        assert!(!flight.is_asking_a_peer(), "it comes");
    }

    #[tokio::test]
    async fn readers_are_told_of_much_or_when_nothing_more_is_there() {
        const PART: usize = 64 * 1024;
        let part = || Part::new(Bytes::from(vec![7; PART]));
        let flight = Flight::new(id(), 0..u32::MAX);
        let mut reader = flight.read(0..u32::MAX);
        // Whether it was told since it last found nothing more, and what of.
        let mut taken = || {
            let is_told = reader.news.has_changed().unwrap();
            let mut bytes = 0;
            while let Some(Some(part)) = reader.next().now_or_never() {
                bytes += part.unwrap().bytes.len();
            }
            (is_told, bytes / PART)
        };
        for _ in 1..TOLD_BYTES_MAX as usize / PART {
            flight.coming(std::future::ready(())).await;
            flight.land_among(part());
        }
        assert_eq!(taken(), (false, 3));
        flight.land_among(part());
        assert_eq!(taken(), (true, 1));
        // What pauses before it comes.
        flight.land_among(part());
        flight.coming(tokio::task::yield_now()).await;
        assert_eq!(taken(), (true, 1));
        flight.coming(tokio::task::yield_now()).await;
        assert_eq!(taken(), (false, 0));
        flight.land(part());
        assert_eq!(taken(), (true, 1));
        flight.land_among(part());
        flight.finish(Ok(()));
        assert_eq!(taken(), (true, 1));
    }

    fn unlimited() -> Budget {
        Budget::new(Sum {
            fixed: 0,
            queue: 0,
            l1: 0,
            connections: 0,
            transfers: 1 << 30,
        })
    }

    fn reader(flights: &Flights, range: Range<u32>, budget: Budget) -> SliceReader {
        SliceReader::Flight {
            reader: flights.get(&id()).unwrap().read(range),
            joined: false,
            is_first: true,
            budget,
            pin: None,
            more: false,
        }
    }

    /// Promise P5: a bit that flips after a part has landed reaches nobody.
    #[tokio::test]
    async fn a_flipped_bit_is_found_before_the_socket() {
        const PART: usize = 5000;
        let whole: Vec<u8> = (0..4 * PART).map(|n| n as u8).collect();
        // The last ones are joined: they are small.
        let cuts = [
            0,
            PART,
            2 * PART,
            3 * PART,
            3 * PART + 700,
            3 * PART + 1500,
            4 * PART,
        ];
        for flipped in [
            0,
            PART - 1,
            PART,
            3 * PART + 1,
            3 * PART + 800,
            4 * PART - 1,
        ] {
            for bit in [0, 3, 7] {
                for wanted in [0..4 * PART as u32, flipped as u32..flipped as u32 + 1] {
                    let flights = Flights::default();
                    let (flight, _) = flights.join(id(), 0..4 * PART as u32);
                    for cut in cuts.windows(2) {
                        let mut bytes = whole[cut[0]..cut[1]].to_vec();
                        let crc32c = crc32c(&bytes);
                        if (cut[0]..cut[1]).contains(&flipped) {
                            bytes[flipped - cut[0]] ^= 1 << bit;
                        }
                        let bytes = bytes.into();
                        flight.land(Part { bytes, crc32c });
                    }
                    let mut reader = reader(&flights, wanted.clone(), unlimited());
                    let mut at = wanted.start as usize;
                    let end = loop {
                        match reader.next(Form::Pages).await {
                            Some(Ok(bytes)) => {
                                assert_eq!(bytes, whole[at..at + bytes.len()]);
                                at += bytes.len();
                            }
                            end => break end,
                        }
                    };
                    assert_eq!(end, Some(Err(FillError::Damaged)));
                    assert!(at <= flipped);
                    assert!(flight.slice().is_none(), "it is not kept either");
                    assert!(flights.get(&id()).is_none(), "nor read by others");
                    assert!(flights.join(id(), 0..1).1, "the next has it from elsewhere");
                }
            }
        }
    }

    /// The same for what lies in the store: what is given has been checked.
    #[tokio::test]
    async fn a_flipped_bit_of_a_stored_slice_is_found_before_the_socket() {
        let whole: Vec<u8> = (0..3 * LARGE_BYTES as u32).map(|n| n as u8).collect();
        let slice = Slice::new(whole.clone().into());
        for flipped in [5000, LARGE_BYTES, 2 * LARGE_BYTES + 77_777] {
            for form in [Form::Large, Form::Pages, Form::Copies] {
                let mut reader = SliceReader::Stored {
                    slice: slice.with_flipped_bit(flipped),
                    source: Source::L1,
                    is_checked: false,
                    wanted: 4097..whole.len(),
                    pin: None,
                };
                let mut at = 4097;
                let end = loop {
                    match reader.next(form).await {
                        Some(Ok(bytes)) => {
                            assert_eq!(bytes, whole[at..at + bytes.len()]);
                            at += bytes.len();
                        }
                        end => break end,
                    }
                };
                assert_eq!(end, Some(Err(FillError::Damaged)), "{flipped} {form:?}");
                assert!(at <= flipped);
            }
        }
    }

    #[tokio::test]
    async fn what_was_checked_just_now_is_given_at_once_and_the_rest_is_checked() {
        let slice = Slice::new(vec![7; 3 * LARGE_BYTES].into());
        let mut reader = SliceReader::Stored {
            slice: slice.with_flipped_bit(LARGE_BYTES + 5000),
            source: Source::L2,
            is_checked: true,
            wanted: 0..slice.len(),
            pin: None,
        };
        let first = reader.next(Form::Large).await.unwrap().unwrap();
        assert_eq!(first, slice.bytes()[..LARGE_BYTES]);
        let rest = reader.next(Form::Large).await;
        assert_eq!(rest, Some(Err(FillError::Damaged)));
    }

    /// What a peer gives is checked when it is used, or kept: its sums are those of the
    /// slice, or it is found to be damaged.
    #[tokio::test]
    async fn what_came_with_its_checksum_is_checked_where_it_is_read_and_where_it_is_kept() {
        const LEN: usize = 2 * PAGE_BYTES + 5000;
        let whole: Vec<u8> = (0..LEN).map(|n| (n * 31 % 251) as u8).collect();
        // Small ones are joined; some begin within a page, and some land with sums.
        let cuts = [0, PAGE_BYTES, PAGE_BYTES + 700, PAGE_BYTES + 1500, LEN];
        let landed = |flipped: Option<usize>, carried: usize| {
            let flight = Flight::new(id(), 0..LEN as u32);
            for (n, cut) in cuts.windows(2).enumerate() {
                let mut bytes = whole[cut[0]..cut[1]].to_vec();
                let crc32c = crc32c(&bytes);
                if let Some(at) = flipped.filter(|at| (cut[0]..cut[1]).contains(at)) {
                    bytes[at - cut[0]] ^= 1;
                }
                let bytes = bytes.into();
                match n < carried {
                    true => flight.land_carried(Part { bytes, crc32c }),
                    false => flight.land_among(Part { bytes, crc32c }),
                }
            }
            flight.finish(Ok(()));
            flight
        };
        let expected = Slice::new(whole.clone().into());
        for carried in 0..cuts.len() {
            let slice = landed(None, carried).slice().unwrap();
            assert!(slice.disk_sums().eq(expected.disk_sums()), "{carried}");
            assert_eq!(slice.gather().bytes(), expected.bytes());
            for flipped in [0, PAGE_BYTES + 1, PAGE_BYTES + 800, LEN - 1] {
                let flight = landed(Some(flipped), carried);
                assert!(flight.slice().is_none(), "{flipped} {carried}");
                let read = landed(Some(flipped), carried).read(0..LEN as u32).all();
                assert_eq!(read.await, Err(FillError::Damaged), "{flipped} {carried}");
            }
        }
    }

    /// An origin that drips bytes does not cost a part for each of them.
    #[tokio::test]
    async fn small_parts_are_joined_under_their_readers() {
        let flight = Flight::new(id(), 0..10_000);
        let mut early = flight.read(0..10_000);
        let mut late = flight.read(17..9_000);
        let mut read = (Vec::new(), Vec::new());
        for n in 0..10_000u32 {
            flight.land(Part::new(Bytes::copy_from_slice(&[n as u8])));
            read.0
                .extend_from_slice(&early.next().await.unwrap().unwrap().bytes);
            if (17..9_000).contains(&n) && n % 777 == 0 {
                read.1
                    .extend_from_slice(&late.next().await.unwrap().unwrap().bytes);
            }
        }
        flight.finish(Ok(()));
        while let Some(part) = late.next().await {
            read.1.extend_from_slice(&part.unwrap().bytes);
        }
        assert!(early.next().await.is_none());
        let whole: Vec<u8> = (0..10_000u32).map(|n| n as u8).collect();
        assert!(read.0 == whole && read.1 == whole[17..9_000]);
        let parts = flight.landed().parts.len();
        assert!(parts <= 2 * 10_000 / JOINED_BYTES_MAX + 1, "{parts} parts");
        assert_eq!(&flight.slice().unwrap().gather().bytes()[..], whole);
    }

    #[tokio::test]
    async fn a_fill_that_panics_lets_its_readers_go() {
        let flights = Arc::new(Flights::default());
        let (flight, _) = flights.join(id(), 0..10);
        let mut reader = flight.read(0..10);
        flight.land(Part::new(Bytes::from_static(b"abc")));
        let guard = flights.guard(&flight);
        let filling = tokio::spawn(async move {
            let _guard = guard;
            panic!("a fault in the fill, on purpose");
        });
        assert!(filling.await.unwrap_err().is_panic());
        assert!(reader.next().await.unwrap().is_ok());
        assert!(matches!(
            reader.next().await,
            Some(Err(FillError::Failed { status: 502, .. }))
        ));
        assert!(flights.map.lock().unwrap().is_empty());
        // One that ends as it should, or is handed over, is left alone.
        let (flight, _) = flights.join(id(), 0..10);
        drop(flights.guard(&flight));
        assert!(flight.outcome().is_none() && !flights.map.lock().unwrap().is_empty());
    }

    /// What a client holds of a large buffer has a permit, or is a copy.
    #[tokio::test]
    async fn views_of_a_buffer_are_permitted_or_copied() {
        let bytes = Bytes::from(vec![7; 4 * PAGE_BYTES]);
        let slice = Slice::new(bytes.clone());
        let flights = Flights::default();
        let (flight, _) = flights.join(id(), 0..bytes.len() as u32);
        flight.land_stored(&slice, Source::L2);
        let is_view = |piece: &Bytes| bytes.as_ptr_range().contains(&piece.as_ptr());
        let all = 0..bytes.len() as u32;

        let budget = unlimited();
        let mut rich = reader(&flights, all.clone(), budget.clone());
        let piece = rich.next(Form::Pages).await.unwrap().unwrap();
        assert!(is_view(&piece) && rich.pin().is_some());
        assert!(budget.taken().1 >= bytes.len() as u64);
        let pin = rich.pin();
        drop(rich);
        assert!(
            budget.taken().1 > 0,
            "while the piece is in somebody's hands"
        );
        drop(pin);
        assert_eq!(budget.taken().1, 0);

        let spent = Budget::new(Sum {
            transfers: 1,
            ..*budget.sum()
        });
        for (mut reader, form) in [
            (reader(&flights, all.clone(), spent), Form::Pages),
            (reader(&flights, all, budget), Form::Copies),
        ] {
            let piece = reader.next(form).await.unwrap().unwrap();
            assert!(!is_view(&piece) && reader.pin().is_none());
            assert_eq!(piece, bytes[..PAGE_BYTES]);
        }
    }
}
