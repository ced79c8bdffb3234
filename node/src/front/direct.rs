//! The short way: a plain request over HTTP/1.1 that is answered out of slices,
//! straight on the client's connection.
//!
//! ```text
//! up to 64 KiB   every part at hand → head and parts in one write
//! more           Pieces, wherever they come from, as many in one write as are there;
//!                the head with the first of them
//! ```
//!
//! The decisions are those of the long way, made by the same functions: what is
//! asked for, whether the object may be used, what is answered. Where more is
//! needed nothing is written, and the long way goes on with what was found. Not
//! here: which requests are plain (`head`), where bytes come from (`engine`, `pieces`).

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Poll;
use std::time::{Duration, Instant, SystemTime};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use http::header::DATE;
use httpdate::fmt_http_date;
use pingora_core::protocols::Stream;
use pingora_slice_cluster::Generation;
use pingora_slice_cluster::slice::touched;
use pingora_slice_cluster::wire::Resolution;
use tokio::io::AsyncWriteExt;

use super::wire::{self, Head, Wire};
use super::{Disposition, Front, patiently, until_total};
use crate::engine::{Found, Request, Resolved};
use crate::flight::{FillError, Form, Source};
use crate::head::Plain;
use crate::pace::Pace;
use crate::pieces::{Piece, Pieces, count_slice};
use crate::plan::{self, Plan};
use crate::slice::PAGE_BYTES;

/// Bodies up to this size are served in place; if the client stalls, the rest is
/// copied, as part of the connection's own share.
const SMALL_BYTES: u64 = PAGE_BYTES as u64;

/// How a plain request was answered.
pub(crate) enum Directly {
    /// Here.
    Answered,
    /// Not yet: nothing was written. The long way goes on with what is known.
    Not(Option<Box<Known>>),
}

/// What the short way has found out for a request.
pub(crate) struct Known {
    /// As it was read.
    pub(crate) request: Request,
    /// When the request came.
    pub(crate) started: Instant,
    /// What may be answered with.
    pub(crate) resolved: Option<Resolved>,
    /// The version that was found to be gone.
    pub(crate) gone: Option<Generation>,
}

/// Whether an object was given.
enum Given {
    Yes,
    /// Nothing was written: this is the long way's.
    No,
    /// Nor can it be had any more.
    Gone,
    /// Nor will the origin give it to this client.
    Refused,
}

impl Front {
    /// Answers a plain request out of slices.
    ///
    /// # Errors
    /// The connection is of no use any more.
    pub(crate) async fn answer_directly(
        &self,
        head: Plain,
        stream: &mut Stream,
    ) -> io::Result<Directly> {
        let started = Instant::now();
        let _under_way = self.under_way();
        let head = Arc::new(head);
        let asked = self.request(head.url(), head.is_get, &head, false);
        let Disposition::Cacheable(request) = asked else {
            return Ok(Directly::Not(None));
        };
        let known = |resolved, gone| {
            Ok(Directly::Not(Some(Box::new(Known {
                request: request.clone(),
                started,
                resolved,
                gone,
            }))))
        };
        if let Some(found) = self.engine.hit(&request) {
            let given = self.give_found(&head, stream, &request, &found, started);
            return match given.await? {
                Given::Yes => Ok(Directly::Answered),
                Given::No => known(None, None),
                Given::Gone => known(None, Some(found.object.manifest.generation)),
                Given::Refused => known(Some(Resolved::Pass("refused")), None),
            };
        }
        // What is done without a lease is the long way's (rule 5).
        if !self.engine.cluster().may_serve() {
            return Ok(Directly::Not(None));
        }
        // In a box: what waits for its next request has no room for it.
        let resolved = Box::pin(self.engine.resolve(&request, None)).await;
        if let Resolved::Object(found) = &resolved
            && found.informational.is_empty()
        {
            let given = self.give_found(&head, stream, &request, found, started);
            match given.await? {
                Given::Yes => return Ok(Directly::Answered),
                Given::No => {}
                Given::Gone => return known(None, Some(found.object.manifest.generation)),
                Given::Refused => return known(Some(Resolved::Pass("refused")), None),
            }
        }
        known(Some(resolved), None)
    }

    /// Answers with an object that may be used.
    async fn give_found(
        &self,
        asked: &Plain,
        stream: &mut Stream,
        request: &Request,
        found: &Found,
        started: Instant,
    ) -> io::Result<Given> {
        if found.object.manifest.length().is_none() {
            // Chunks are Pingora's to write.
            return Ok(Given::No);
        }
        let Some(answering) = self.engine.answering(&found.object) else {
            return Ok(Given::Gone);
        };
        let (is_get, is_last) = (asked.is_get, asked.is_last);
        let plan = plan::plan(is_get, asked, &found.object.manifest);
        let Some((head, pieces)) = self.head_on_the_wire(request, found, plan, is_last) else {
            return Ok(Given::No);
        };
        let body = match pieces.as_slice() {
            [Piece::Bytes(range)] if is_get => range.clone(),
            [Piece::Bytes(_)] | [] => 0..0,
            _ => return Ok(Given::No),
        };
        let has_begun = AtomicBool::new(false);
        let begin = || {
            has_begun.store(true, Ordering::Relaxed);
            self.count_request();
            self.count_begun(started);
        };
        let answered = async {
            let given = match body.end - body.start <= SMALL_BYTES {
                // It is landing just now: its fill alone looks for it on the disk.
                true if found.resolution == Resolution::Miss && body.start < body.end => {
                    return Ok(Given::No);
                }
                true => {
                    self.give_small(stream, head, request, found, &body, begin)
                        .await?
                }
                false => {
                    self.give_large(stream, head, request, found, &body, begin)
                        .await?
                }
            };
            match given {
                Ok(given) => Ok(given),
                Err(error) => {
                    begin();
                    self.refuse_directly(stream, request, &error, is_last).await
                }
            }
        };
        let total = self.engine.config().client_timeouts.total;
        let total = total.map(|total| tokio::time::Instant::from_std(started) + total);
        let answered = tokio::select! {
            biased;
            answered = answered => answered,
            () = answering.purged() => {
                if !has_begun.load(Ordering::Relaxed) {
                    return Ok(Given::Gone);
                }
                tracing::info!(url = %request.url, "answer cut by a hard purge");
                Err(io::ErrorKind::ConnectionAborted.into())
            }
            () = until_total(total) => {
                if !has_begun.swap(true, Ordering::Relaxed) {
                    self.count_request();
                }
                Err(self.too_slow())
            }
        };
        if has_begun.load(Ordering::Relaxed) {
            self.count_over(started);
        }
        answered
    }

    /// The head and the body's pieces of a planned answer; `None`: it is Pingora's to
    /// write.
    fn head_on_the_wire(
        &self,
        request: &Request,
        found: &Found,
        plan: Plan,
        is_last: bool,
    ) -> Option<(Head, Vec<Piece>)> {
        let stored = match plan {
            Plan::Whole | Plan::Single(_) if found.object.manifest.status == 200 => {
                found.object.on_the_wire(wire::stored)
            }
            _ => None,
        };
        let Some(stored) = stored else {
            let (head, pieces) = self.head(request, found, plan, false).ok()?;
            return Some((Head::of(&head, is_last)?, pieces));
        };
        let mut head = Wire::new(stored);
        let pieces = self.complete(&mut head, request, found, plan, false);
        Some((head.end(is_last), pieces.ok()?))
    }

    /// Gives a small body, if all of it is at hand. The inner error: nothing was
    /// written, and it cannot be had now.
    async fn give_small(
        &self,
        stream: &mut Stream,
        head: Head,
        request: &Request,
        found: &Found,
        body: &Range<u64>,
        begin: impl FnOnce(),
    ) -> io::Result<Result<Given, FillError>> {
        let slice_bytes = found.object.manifest.version.slice_bytes;
        let mut slices = touched(body.clone(), slice_bytes);
        let mut parts = [const { (Bytes::new(), Source::L1) }; 2];
        for part in &mut parts {
            let Some(touched) = slices.next() else { break };
            *part = match self.engine.at_hand(request, found, &touched).await {
                Ok(Some(at_hand)) => at_hand,
                Err(FillError::Changed) => return Ok(Ok(Given::Gone)),
                Err(FillError::Refused { .. }) => return Ok(Ok(Given::Refused)),
                Err(error @ (FillError::Failed { .. } | FillError::NoMemory)) => {
                    return Ok(Err(error));
                }
                Ok(None) | Err(FillError::AnotherRefused | FillError::Damaged) => {
                    return Ok(Ok(Given::No));
                }
            };
        }
        if slices.next().is_some() {
            return Ok(Ok(Given::No));
        }
        begin();
        self.count_answer(found, head.status, body.start < body.end);
        for (bytes, source) in parts.iter().filter(|(bytes, _)| !bytes.is_empty()) {
            count_slice(&self.metrics, *source, bytes.len() as u64);
        }
        let [(first, _), (second, _)] = parts;
        self.metrics
            .bytes_to_client_total
            .inc_by(body.end - body.start);
        let mut answer = head.bytes.chain(first).chain(second);
        if let Poll::Ready(written) = futures::poll!(std::pin::pin!(write(stream, &mut answer))) {
            return written.map(|()| Ok(Given::Yes));
        }
        // A copy: nothing is held of the slices while the client takes nothing.
        let mut rest = BytesMut::with_capacity(answer.remaining());
        rest.put(answer);
        let mut pace = Pace::new(self.engine.config().client_timeouts);
        self.give_directly(stream, &mut pace, rest, || {}).await?;
        Ok(Ok(Given::Yes))
    }

    /// Gives a body of any length; errors as of `give_small`.
    async fn give_large(
        &self,
        stream: &mut Stream,
        head: Head,
        request: &Request,
        found: &Found,
        body: &Range<u64>,
        begin: impl FnOnce(),
    ) -> io::Result<Result<Given, FillError>> {
        let ahead = request.settings.max_concurrent_subrequests;
        let pieces = vec![Piece::Bytes(body.clone())];
        let mut pieces = Pieces::new(&self.engine, request, found, pieces, ahead, Form::Large);
        let first = match pieces.next_run(&self.metrics).await {
            Some(Ok(first)) => first,
            Some(Err(error @ (FillError::Failed { .. } | FillError::NoMemory))) => {
                return Ok(Err(error));
            }
            // The long way finds another version.
            Some(Err(FillError::Changed)) => return Ok(Ok(Given::Gone)),
            Some(Err(FillError::Refused { .. } | FillError::AnotherRefused)) => {
                return Ok(Ok(Given::Refused));
            }
            Some(Err(FillError::Damaged)) | None => return Ok(Ok(Given::No)),
        };
        begin();
        self.count_answer(found, head.status, true);
        let mut pace = Pace::new(self.engine.config().client_timeouts);
        let (mut head, mut next) = (head.bytes, Some(first));
        while let Some(run) = next {
            self.metrics
                .bytes_to_client_total
                .inc_by(run.remaining() as u64);
            let bytes = std::mem::take(&mut head).chain(run);
            let stalled = || pieces.let_go(&self.metrics);
            self.give_directly(stream, &mut pace, bytes, stalled)
                .await?;
            next = match pieces.next_run(&self.metrics).await {
                None => None,
                Some(Ok(run)) => Some(run),
                // The head is out: cut the connection, so that the client sees it.
                Some(Err(error)) => {
                    tracing::warn!(url = %request.url, %error, "answer cut short");
                    return Err(io::ErrorKind::ConnectionAborted.into());
                }
            };
        }
        self.metrics
            .assembly_duration_seconds
            .observe(pieces.waited.as_secs_f64());
        Ok(Ok(Given::Yes))
    }

    /// Answers with an error of ours.
    async fn refuse_directly(
        &self,
        stream: &mut Stream,
        request: &Request,
        error: &FillError,
        is_last: bool,
    ) -> io::Result<Given> {
        let (status, detail) = (error.status(), error.as_str());
        self.log_failure(&request.url, status, detail);
        let mut refusal = self.refusal(status, detail).map_err(io::Error::other)?;
        let now = fmt_http_date(SystemTime::now());
        refusal.insert_header(DATE, now).map_err(io::Error::other)?;
        let refusal = Head::of(&refusal, is_last).map_or(Bytes::new(), |head| head.bytes);
        let mut pace = Pace::new(self.engine.config().client_timeouts);
        self.give_directly(stream, &mut pace, refusal, || {})
            .await?;
        Ok(Given::Yes)
    }

    /// Gives bytes to the client, as slowly as it may take them: it has its time
    /// for each page.
    async fn give_directly(
        &self,
        stream: &mut Stream,
        pace: &mut Pace,
        mut bytes: impl Buf,
        mut stalled: impl FnMut(),
    ) -> io::Result<()> {
        loop {
            let before = bytes.remaining();
            // Most clients take it at once: no timer for them.
            let written = futures::poll!(std::pin::pin!(write(stream, &mut bytes)));
            let left = bytes.remaining();
            pace.took((before - left) as u64, Duration::ZERO);
            if let Poll::Ready(written) = written {
                return written;
            }
            let page = left.min(PAGE_BYTES);
            let writing = std::pin::pin!(write_at_least(stream, &mut bytes, page));
            match patiently(pace, page as u64, writing, &mut stalled).await {
                Some(beyond) => pace.took(beyond? as u64, Duration::ZERO),
                None => return Err(self.too_slow()),
            }
        }
    }

    fn too_slow(&self) -> io::Error {
        self.metrics.clients_too_slow_total.inc();
        io::ErrorKind::TimedOut.into()
    }
}

async fn write(stream: &mut Stream, bytes: &mut impl Buf) -> io::Result<()> {
    stream.write_all_buf(bytes).await?;
    stream.flush().await
}

/// Writes at least `least` bytes; returns how many more the socket took.
async fn write_at_least(
    stream: &mut Stream,
    bytes: &mut impl Buf,
    least: usize,
) -> io::Result<usize> {
    let end = bytes.remaining() - least;
    while bytes.remaining() > end {
        if stream.write_buf(bytes).await? == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
    }
    stream.flush().await?;
    Ok(end - bytes.remaining())
}
