//! The body of one answer: slices in order, a few of them opened ahead.
//!
//! The client pulls: nothing is opened beyond the window, and the window is as
//! wide as the memory budget allows. While the client does not take what it has
//! been given, all that is open is let go ([`Pieces::let_go`]) and opened again
//! afterwards: from memory, disk, a peer or the origin. Not here: how the
//! pieces reach the client (`front`), where a slice's bytes come from (`engine`).

use std::collections::VecDeque;
use std::io::IoSlice;
use std::ops::Range;
use std::time::{Duration, Instant};

use bytes::{Buf, Bytes};
use futures::FutureExt;
use pingora_slice_cluster::slice::{Touched, touched};
use pingora_slice_cluster::wire::Resolution;

use crate::budget::{Permit, TRANSFER_BYTES};
use crate::engine::{Engine, Found, Request};
use crate::flight::{FillError, Form, LARGE_BYTES, SliceReader, Source};
use crate::metrics::Metrics;

/// Failed shared flights tolerated per slice, or damaged ones: a fill, the fetch
/// that followed it and is about to fail with it, and one more.
const JOINS_MAX: usize = 3;

/// A piece of a body.
#[derive(Debug)]
pub(crate) enum Piece {
    /// Text of a multipart answer.
    Text(Bytes),
    /// Bytes of the object.
    Bytes(Range<u64>),
}

/// See the module's text.
pub(crate) struct Pieces<'a> {
    engine: &'a Engine,
    request: &'a Request,
    found: &'a Found,
    to_open: VecDeque<Next>,
    opened: VecDeque<Opened>,
    ahead: usize,
    form: Form,
    /// For what the pieces in the client's hands hold beyond themselves.
    in_hand: Vec<Permit>,
    /// What came after the last run, where it was no piece: an error, or the end.
    end: Option<Option<FillError>>,
    /// The next slice is the first of an answer that its request brought from the
    /// origin: it came with the manifest, and may have landed since.
    is_new: bool,
    /// Time spent waiting for slices.
    pub(crate) waited: Duration,
}

enum Next {
    Text(Bytes),
    /// Slices of a range that are still to be opened.
    Range(Range<u64>),
}

enum Opened {
    Text(Bytes),
    Slice {
        reader: SliceReader,
        part: Touched,
        bytes: u64,
        /// Flights of somebody else that have failed us.
        failed: usize,
        /// Where a part of it came from that the origin had to be asked for.
        missed: Option<Source>,
    },
}

impl<'a> Pieces<'a> {
    pub(crate) fn new(
        engine: &'a Engine,
        request: &'a Request,
        found: &'a Found,
        pieces: Vec<Piece>,
        ahead: usize,
        form: Form,
    ) -> Pieces<'a> {
        let to_open = pieces
            .into_iter()
            .map(|piece| match piece {
                Piece::Text(text) => Next::Text(text),
                Piece::Bytes(range) => Next::Range(range),
            })
            .collect();
        Pieces {
            engine,
            request,
            found,
            to_open,
            opened: VecDeque::new(),
            ahead: ahead.max(1),
            form,
            in_hand: Vec::new(),
            end: None,
            is_new: found.resolution == Resolution::Miss && !found.collapsed,
            waited: Duration::ZERO,
        }
    }

    /// The text that the body begins with, taken out of it.
    pub(crate) fn text(&mut self) -> Option<Bytes> {
        match self.to_open.front_mut()? {
            Next::Text(text) => {
                let text = std::mem::take(text);
                self.to_open.pop_front();
                Some(text)
            }
            Next::Range(_) => None,
        }
    }

    /// Opens slices until the window is full.
    fn fill_window(&mut self) {
        let manifest = &self.found.object.manifest;
        let slice_bytes = manifest.version.slice_bytes;
        while self.opened.len() < self.ahead {
            match self.to_open.front_mut() {
                None => return,
                Some(Next::Text(text)) => {
                    self.opened.push_back(Opened::Text(std::mem::take(text)));
                    self.to_open.pop_front();
                }
                Some(Next::Range(range)) => {
                    let Some(part) = touched(range.clone(), slice_bytes).next() else {
                        self.to_open.pop_front();
                        continue;
                    };
                    // The first one is wanted now, the others may have to wait.
                    let ahead = match self.opened.is_empty() {
                        true => None,
                        false => match self.engine.budget().ahead(slice_bytes.into()) {
                            Some(permit) => Some(permit),
                            None => return,
                        },
                    };
                    range.start += u64::from(part.end - part.start);
                    let object = &self.found.object;
                    let reader = self.engine.open(self.request, object, part, ahead);
                    let was_read = reader.is_stored() && reader.source() == Source::L2;
                    self.opened.push_back(Opened::Slice {
                        reader,
                        part,
                        bytes: 0,
                        failed: 0,
                        missed: None,
                    });
                    // The client need not wait for the others to be read.
                    if was_read {
                        return;
                    }
                }
            }
        }
    }

    /// Lets go of all that is open, for as long as the client takes nothing:
    /// only the run that it has been given stays. A body that the origin gives
    /// once keeps its flights, and one that is given only whole does while
    /// there is memory: both cost more to have again than to hold.
    pub(crate) fn let_go(&mut self, metrics: &Metrics) {
        let version = &self.found.object.manifest.version;
        let is_dear = version.whole && !self.engine.budget().is_tight();
        if !version.is_resumable() || is_dear || self.opened.is_empty() {
            return;
        }
        metrics.answers_stalled_total.inc();
        while let Some(opened) = self.opened.pop_back() {
            match opened {
                Opened::Text(text) => self.to_open.push_front(Next::Text(text)),
                Opened::Slice {
                    reader,
                    part,
                    bytes,
                    missed,
                    ..
                } => {
                    if bytes > 0 {
                        let source = missed.unwrap_or_else(|| reader.source());
                        count(&mut self.is_new, metrics, source, bytes);
                    }
                    let slice_start = u64::from(part.index) * u64::from(version.slice_bytes);
                    let start = slice_start + u64::from(part.start) + bytes;
                    let end = slice_start + u64::from(part.end);
                    if start < end {
                        self.to_open.push_front(Next::Range(start..end));
                    }
                }
            }
        }
    }

    /// The next piece; the one before is in nobody's hands any more.
    pub(crate) async fn next(&mut self, metrics: &Metrics) -> Option<Result<Bytes, FillError>> {
        self.in_hand.clear();
        self.step(metrics).await
    }

    /// As [`Pieces::next`], and the pieces after it that are there already, as
    /// far as there is memory for them: about [`LARGE_BYTES`] in one write.
    pub(crate) async fn next_run(&mut self, metrics: &Metrics) -> Option<Result<Run, FillError>> {
        self.in_hand.clear();
        if let Some(end) = self.end.take() {
            return end.map(Err);
        }
        let mut run = Run::default();
        match self.step(metrics).await? {
            Ok(piece) => run.push(piece),
            Err(error) => return Some(Err(error)),
        }
        if run.remaining() >= LARGE_BYTES {
            return Some(Ok(run));
        }
        if let Some(mut permit) = self.engine.budget().ahead(LARGE_BYTES as u64) {
            while run.remaining() < LARGE_BYTES {
                let next = self.step(metrics).now_or_never();
                match next {
                    Some(Some(Ok(piece))) => run.push(piece),
                    // What came before it is given first.
                    Some(end) => {
                        self.opened.clear();
                        self.end = Some(end.and_then(Result::err));
                        break;
                    }
                    None => break,
                }
            }
            if run.pieces.len() > 1 {
                permit.shrink(run.remaining() as u64 + TRANSFER_BYTES);
                self.in_hand.push(permit);
            }
        }
        Some(Ok(run))
    }

    async fn step(&mut self, metrics: &Metrics) -> Option<Result<Bytes, FillError>> {
        loop {
            self.fill_window();
            match self.opened.front_mut()? {
                Opened::Text(text) => {
                    let text = std::mem::take(text);
                    self.opened.pop_front();
                    return Some(Ok(text));
                }
                Opened::Slice {
                    reader,
                    part,
                    bytes,
                    failed,
                    missed,
                } => {
                    let asked = Instant::now();
                    let next = reader.next(self.form).await;
                    self.waited += asked.elapsed();
                    match next {
                        Some(Ok(piece)) => {
                            *bytes += piece.len() as u64;
                            self.in_hand.extend(reader.pin());
                            return Some(Ok(piece));
                        }
                        Some(Err(error))
                            if *failed < JOINS_MAX && may_be_had_again(&error, reader) =>
                        {
                            *failed += 1;
                            if error == FillError::Damaged && reader.is_stored() {
                                self.engine.drop_damaged(self.found.slice_id(part.index));
                            } else if error == FillError::Damaged {
                                metrics.parts_damaged_total.inc();
                                tracing::warn!(index = part.index, "a slice was damaged in memory");
                            }
                            // Whoever started it has had its tries; these are ours.
                            let rest = Touched {
                                start: part.start + *bytes as u32,
                                ..*part
                            };
                            let object = &self.found.object;
                            *reader = self.engine.open(self.request, object, rest, None);
                        }
                        Some(Err(error)) => {
                            let source = missed.unwrap_or_else(|| reader.source());
                            count(&mut self.is_new, metrics, source, *bytes);
                            return Some(Err(error));
                        }
                        None if reader.has_more() => {
                            let source = reader.source();
                            *missed = missed.or_else(|| source.is_miss().then_some(source));
                            let rest = Touched {
                                start: part.start + *bytes as u32,
                                ..*part
                            };
                            let object = &self.found.object;
                            *reader = self.engine.open(self.request, object, rest, None);
                        }
                        None => {
                            let source = missed.unwrap_or_else(|| reader.source());
                            count(&mut self.is_new, metrics, source, *bytes);
                            let wanted = u64::from(part.end - part.start);
                            let short = match self.found.object.manifest.length() {
                                Some(_) => *bytes != wanted,
                                // Another body, which ends before what was given.
                                None if reader.ended_before(part.start + *bytes as u32) => true,
                                // Of unknown length: a short slice is the last.
                                None if *bytes < wanted => {
                                    self.opened.clear();
                                    self.to_open.clear();
                                    return None;
                                }
                                None => false,
                            };
                            self.opened.pop_front();
                            if short {
                                let reason = "a slice ended short".to_owned();
                                return Some(Err(FillError::Failed {
                                    status: 502,
                                    reason,
                                }));
                            }
                        }
                    }
                }
            }
        }
    }
}

/// Pieces that follow one another, for one write.
#[derive(Debug, Default)]
pub(crate) struct Run {
    pieces: VecDeque<Bytes>,
    left: usize,
}

impl Run {
    fn push(&mut self, piece: Bytes) {
        if !piece.is_empty() {
            self.left += piece.len();
            self.pieces.push_back(piece);
        }
    }
}

impl Buf for Run {
    fn remaining(&self) -> usize {
        self.left
    }

    fn chunk(&self) -> &[u8] {
        self.pieces.front().map_or(&[], |piece| piece)
    }

    fn chunks_vectored<'a>(&'a self, slices: &mut [IoSlice<'a>]) -> usize {
        let both = slices.iter_mut().zip(&self.pieces);
        both.map(|(slice, piece)| *slice = IoSlice::new(piece))
            .count()
    }

    fn advance(&mut self, mut bytes: usize) {
        assert!(bytes <= self.left, "no more than there is");
        self.left -= bytes;
        while let Some(piece) = self.pieces.front_mut() {
            if bytes < piece.len() {
                piece.advance(bytes);
                return;
            }
            bytes -= piece.len();
            self.pieces.pop_front();
        }
    }
}

/// Whether another flight may bring what this one did not.
fn may_be_had_again(error: &FillError, reader: &SliceReader) -> bool {
    match error {
        FillError::Changed => false,
        // Whoever waited for memory in vain has waited long enough.
        FillError::NoMemory => false,
        FillError::Failed { .. } | FillError::Refused { .. } => reader.is_joined(),
        FillError::AnotherRefused | FillError::Damaged => true,
    }
}

/// Counts a slice of an answer, and that those after it are not the first.
fn count(is_new: &mut bool, metrics: &Metrics, source: Source, bytes: u64) {
    let source = match std::mem::take(is_new) {
        true => source.as_new(),
        false => source,
    };
    count_slice(metrics, source, bytes);
}

/// Counts a slice that was read, as far as it was.
pub(crate) fn count_slice(metrics: &Metrics, source: Source, bytes: u64) {
    metrics
        .slices_total
        .with_label_values(&[source.as_str()])
        .inc();
    match source {
        Source::L1 | Source::L2 => {
            metrics.cache_hits_total.inc();
            metrics.bytes_from_cache_total.inc_by(bytes);
        }
        Source::Flight | Source::Peer => metrics.cache_hits_total.inc(),
        Source::PeerFill | Source::Origin => metrics.cache_misses_total.inc(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_is_read_as_one_piece_however_it_is_taken() {
        let whole: Vec<u8> = (0..60).collect();
        for taken in 1..=whole.len() {
            let mut run = Run::default();
            for piece in [&whole[..1], &whole[1..21], &[], &whole[21..]] {
                run.push(Bytes::copy_from_slice(piece));
            }
            let mut read = Vec::new();
            while run.has_remaining() {
                let mut slices = [IoSlice::new(&[]); 3];
                let count = run.chunks_vectored(&mut slices);
                let slices = slices[..count].iter();
                let mut seen: Vec<u8> = slices.flat_map(|slice| slice.to_vec()).collect();
                assert!(seen.starts_with(run.chunk()) && !run.chunk().is_empty());
                seen.truncate(taken);
                run.advance(seen.len());
                read.extend(seen);
                assert_eq!(run.remaining(), whole.len() - read.len());
            }
            assert_eq!(read, whole);
        }
    }
}
