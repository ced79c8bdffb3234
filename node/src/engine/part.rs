//! Parts of objects, as the origin gave them: ranges that are no slices of
//! ours. They answer what lies within them, and complete one another (RFC 9111
//! sections 3.3 and 3.4).
//!
//! An origin answers in parts where it was asked for one (the end of an object
//! whose length nobody knows yet, or the rest of a part that is held), and
//! where it gives the client's range instead of the slice it was asked for.
//! A part passes through memory in one piece, so its size has a bound.

use std::sync::Arc;
use std::time::SystemTime;

use bytes::{Bytes, BytesMut};
use http::HeaderMap;
use http::header::CONTENT_ENCODING;
use pingora_slice_cluster::Generation;
use pingora_slice_cluster::wire::{Informational, Resolution};

use super::resolve::{Act, Probe, update};
use super::together::{ManifestFlight, Others, Outcome};
use super::{Engine, Forwarded, Relay, RelayBody, Request};
use crate::budget::Budget;
use crate::freshness::{NotStored, unix_ms};
use crate::manifest::{self, Manifest, Stored};
use crate::origin::{self, OriginAnswer, OriginBody, OriginError};
use crate::plan;
use crate::stitch::Fault;

/// Longest part that is kept.
const PART_BYTES_MAX: u64 = 8 * 1024 * 1024;
/// Longest suffix of an unknown object that is asked for as a suffix; a longer one
/// is fetched in slices, like any range. As much as a slice of the usual size.
const SUFFIX_BYTES_MAX: u64 = 1024 * 1024;
const _: () = assert!(SUFFIX_BYTES_MAX <= PART_BYTES_MAX);

/// A range that a Range field can name before the length is known.
pub(super) enum OpenRange {
    /// The last bytes of an object of which nothing is held.
    Suffix(u64),
    /// All beyond a part that is held and begins at byte 0.
    Rest(HeldPart),
}

impl OpenRange {
    /// As a Range field says it.
    pub(super) fn value(&self) -> String {
        match self {
            OpenRange::Suffix(count) => format!("bytes=-{count}"),
            OpenRange::Rest(held) => format!("bytes={}-", held.end()),
        }
    }
}

/// A part whose bytes are at hand.
pub(super) struct HeldPart {
    object: Arc<Stored>,
    start: u64,
    bytes: Bytes,
}

impl HeldPart {
    fn end(&self) -> u64 {
        self.start + self.bytes.len() as u64
    }

    /// What must be the same for another part to be of the same bytes.
    pub(super) fn quoted_etag(&self) -> Option<&str> {
        self.object.manifest.version.quoted_etag()
    }

    /// This part and another that touches it, put together (section 3.4).
    fn joined(&self, start: u64, bytes: &Bytes) -> Option<(u64, Bytes)> {
        let end = start + bytes.len() as u64;
        if start > self.end() || self.start > end {
            return None;
        }
        let first = self.start.min(start);
        let last = self.end().max(end);
        if last - first > PART_BYTES_MAX {
            return None;
        }
        let mut all = BytesMut::zeroed((last - first) as usize);
        for (at, bytes) in [(self.start, &self.bytes), (start, bytes)] {
            let at = (at - first) as usize;
            all[at..at + bytes.len()].copy_from_slice(bytes);
        }
        Some((first, all.freeze()))
    }
}

/// A range that the origin gave, other than a slice of ours.
#[derive(Clone, Copy)]
pub(super) struct PartRange {
    start: u64,
    end: u64,
    total: u64,
}

impl PartRange {
    /// Most slices that a part is cut into.
    const SLICES_MAX: u64 = 1024;

    /// The range of a 206, where it is consistent and exactly what the client wants.
    pub(super) fn answering(request: &Request, answer: &OriginAnswer) -> Option<PartRange> {
        let part = PartRange::of(&answer.headers)?;
        let headers = manifest::to_map(&request.origin.headers);
        let wanted = plan::single_range(&headers, part.total)?;
        let length = answer.length;
        let consistent = length.is_none_or(|length| length == part.end - part.start);
        (consistent && wanted == (part.start..part.end)).then_some(part)
    }

    fn of(headers: &HeaderMap) -> Option<PartRange> {
        let range = origin::content_range(headers)?;
        let bytes = range.bytes?;
        Some(PartRange {
            start: bytes.start,
            end: bytes.end,
            total: range.total?,
        })
    }

    /// An answer to `bytes=-count` that has as many bytes, under a label that
    /// counts one more: from an origin that takes the last byte's position for
    /// the end. The bytes are what was asked for, and the object ends with them.
    fn off_by_one(self, count: u64, length: Option<u64>) -> Option<PartRange> {
        let is_so =
            length == Some(count) && self.end == self.total && self.end - self.start == count + 1;
        is_so.then_some(PartRange {
            end: self.end - 1,
            total: self.total - 1,
            ..self
        })
    }

    /// Whether it can be kept, in slices of `bytes_max` at most.
    fn fits(&self, headers: &HeaderMap, bytes_max: u32) -> bool {
        self.slice_bytes(bytes_max).is_some() && !headers.contains_key(CONTENT_ENCODING)
    }

    /// Why the 206 with these fields was passed on as it came.
    pub(super) fn why_passed(headers: &HeaderMap, bytes_max: u32) -> NotStored {
        match PartRange::of(headers).is_some_and(|part| part.fits(headers, bytes_max)) {
            true => NotStored::PassedAsPart,
            false => NotStored::PartDoesNotFit,
        }
    }

    /// The largest slice size, at most `bytes_max`, at whose multiples it
    /// begins and ends; `None` where that makes too many.
    fn slice_bytes(&self, bytes_max: u32) -> Option<u32> {
        let end = if self.end == self.total { 0 } else { self.end };
        let mut common = gcd(self.start, end);
        if common == 0 {
            common = self.total.min(u64::from(bytes_max));
        }
        if common > u64::from(bytes_max) {
            common = gcd(common, u64::from(bytes_max));
        }
        let slices = (self.end - self.start).div_ceil(common);
        let few = slices <= PartRange::SLICES_MAX && self.end - self.start <= PART_BYTES_MAX;
        u32::try_from(common).ok().filter(|_| few)
    }
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

impl Engine {
    /// What is asked for by an open range, where one serves better than a slice.
    pub(super) async fn open_range(
        &self,
        request: &Request,
        held: Option<&Arc<Stored>>,
        gone: Option<Generation>,
    ) -> Option<OpenRange> {
        if !request.sliced {
            return None;
        }
        let headers = manifest::to_map(&request.origin.headers);
        if held.is_none() {
            let count = plan::suffix(&headers).filter(|count| *count <= SUFFIX_BYTES_MAX)?;
            return Some(OpenRange::Suffix(count));
        }
        if headers.contains_key(http::header::RANGE) {
            return None;
        }
        let held = self.held_part(request, gone).await?;
        let total = held.object.manifest.length()?;
        (held.start == 0 && total <= PART_BYTES_MAX).then_some(OpenRange::Rest(held))
    }

    /// The part that is held for a request, where it may be used.
    pub(super) async fn held_part(
        &self,
        request: &Request,
        gone: Option<Generation>,
    ) -> Option<HeldPart> {
        // The lease first: it vouches for floors read after it.
        let leased = self.inner.cluster.may_serve();
        let object = self
            .lookup(request.key, &request.url, || &request.origin.headers)
            .await?;
        let manifest = &object.manifest;
        let (start, _) = manifest.part?;
        let usable = leased
            && gone != Some(manifest.generation)
            && manifest.stamp >= self.floor(&manifest.subject).plain
            && !manifest.freshness.no_cache
            && !request.demands.no_cache
            && manifest.freshness.is_fresh(unix_ms(SystemTime::now()));
        if !usable {
            return None;
        }
        let bytes = self
            .part_bytes(request.key, manifest, &request.origin)
            .await?;
        Some(HeldPart {
            object,
            start,
            bytes,
        })
    }

    /// 206 to an open range.
    pub(super) async fn open_answer(
        &self,
        request: &Request,
        probe: &mut Probe,
        answer: OriginAnswer,
        flight: &Arc<ManifestFlight>,
    ) -> Act {
        let label = PartRange::of(&answer.headers);
        match probe.open.take() {
            Some(OpenRange::Suffix(count)) => {
                if let Some(part) = PartRange::answering(request, &answer) {
                    return Act::Done(self.part(request, part, None, answer, flight).await);
                }
                // A label of another range, but consistent in itself: the next
                // request may complete it.
                let labelled = label.filter(|part| {
                    answer.length == Some(part.end - part.start) && part.end - part.start == count
                });
                let off_by_one = label.and_then(|label| label.off_by_one(count, answer.length));
                if let Some(part) = labelled.or(off_by_one) {
                    return Act::Done(self.passed_part(request, part, answer, flight).await);
                }
            }
            Some(OpenRange::Rest(held)) => {
                let rest = label.filter(|rest| {
                    let etag = answer.headers.get(http::header::ETAG);
                    rest.start == held.end()
                        && rest.end == rest.total
                        && held.object.manifest.length() == Some(rest.total)
                        && answer
                            .length
                            .is_none_or(|length| length == rest.end - rest.start)
                        && held.quoted_etag().is_some()
                        && held.quoted_etag() == etag.and_then(|etag| etag.to_str().ok())
                });
                if let Some(rest) = rest {
                    return Act::Done(self.part(request, rest, Some(held), answer, flight).await);
                }
                // Nothing shows that it is of the same bytes.
                return Act::AskOtherwise;
            }
            None => return Act::AskOtherwise,
        }
        self.inner.stitch.report(Fault {
            reason: "content-range",
            url: &request.url,
            asked: None,
            expected: None,
            headers: &answer.headers,
        });
        probe.was_lied_to();
        Act::AskOtherwise
    }

    /// A part, kept where that is possible, together with one that is held
    /// where they touch; relayed otherwise.
    pub(super) async fn part(
        &self,
        request: &Request,
        mut part: PartRange,
        held: Option<HeldPart>,
        mut answer: OriginAnswer,
        flight: &Arc<ManifestFlight>,
    ) -> Outcome {
        let keepable = self.keepable(request, &part, &answer, flight).await;
        let (mut headers, freshness) = match keepable {
            Ok(keepable) => keepable,
            Err(why) => return self.relay(answer, why, flight),
        };
        let mut bytes =
            match read(&self.inner.budget, &mut answer.body, part.end - part.start).await {
                Ok(bytes) => bytes,
                Err(error) => return self.failed(&error, None),
            };
        let same = held.as_ref().filter(|held| {
            let etag = headers
                .get(http::header::ETAG)
                .and_then(|v| v.to_str().ok());
            held.object.manifest.length() == Some(part.total)
                && held.quoted_etag().is_some()
                && held.quoted_etag() == etag
        });
        if let Some(held) = same
            && let Some((start, all)) = held.joined(part.start, &bytes)
        {
            let joined = PartRange {
                start,
                end: start + all.len() as u64,
                ..part
            };
            if joined.slice_bytes(self.inner.config.slice_bytes).is_some() {
                (part, bytes) = (joined, all);
                let mut together = manifest::to_map(&held.object.manifest.headers);
                update(&mut together, &headers);
                headers = together;
            }
        }
        answer.headers = headers;
        match self.keep_answer(request, part, bytes, &answer, freshness, flight) {
            Some(object) => Outcome::Object(object, Resolution::Miss),
            None => Outcome::Uncacheable,
        }
    }

    /// A part under a label that the client did not ask for: passed on as it
    /// came, and kept for what it is.
    async fn passed_part(
        &self,
        request: &Request,
        part: PartRange,
        mut answer: OriginAnswer,
        flight: &Arc<ManifestFlight>,
    ) -> Outcome {
        let keepable = self.keepable(request, &part, &answer, flight).await;
        let (headers, freshness) = match keepable {
            Ok(keepable) => keepable,
            Err(why) => return self.relay(answer, why, flight),
        };
        let bytes = match read(&self.inner.budget, &mut answer.body, part.end - part.start).await {
            Ok(bytes) => bytes,
            Err(error) => return self.failed(&error, None),
        };
        let as_it_came = std::mem::replace(&mut answer.headers, headers);
        let _ = self.keep_answer(request, part, bytes.clone(), &answer, freshness, flight);
        flight.put_relay(Relay {
            status: answer.status,
            headers: without_length(as_it_came),
            length: Some(bytes.len() as u64),
            forwarded: Forwarded::default(),
            why: NotStored::PassedAsPart,
            informational: Informational::new(),
            body: RelayBody::Bytes(bytes),
        });
        Outcome::Relay(Others::AskAgain)
    }

    /// The fields and the lifetime of a part that may be kept; or why it is not.
    async fn keepable(
        &self,
        request: &Request,
        part: &PartRange,
        answer: &OriginAnswer,
        flight: &ManifestFlight,
    ) -> Result<(HeaderMap, manifest::Freshness), NotStored> {
        let mut headers = answer.headers.clone();
        origin::strip_framing(&mut headers);
        let freshness = match self.judge_storable(request, 200, &headers, answer, None) {
            Ok(freshness) => freshness,
            Err(why) => {
                self.is_not_stored(request, 200, why, flight).await;
                return Err(why);
            }
        };
        match part.fits(&headers, self.inner.config.slice_bytes) {
            true => Ok((headers, freshness)),
            false => Err(NotStored::PartDoesNotFit),
        }
    }

    fn keep_answer(
        &self,
        request: &Request,
        part: PartRange,
        bytes: Bytes,
        answer: &OriginAnswer,
        freshness: manifest::Freshness,
        flight: &Arc<ManifestFlight>,
    ) -> Option<Arc<Stored>> {
        let mut version = self.version(answer, Some(part.total), true);
        version.slice_bytes = part.slice_bytes(self.inner.config.slice_bytes)?;
        let mut manifest: Manifest =
            self.manifest(request, 200, version, 0, freshness, answer, flight.stamp)?;
        let held = (part.start, part.end);
        manifest.part = (held != (0, part.total)).then_some(held);
        let object = self.keep_for_asker(request, manifest);
        self.keep_part(request, &object.manifest, held, bytes);
        Some(object)
    }
}

fn without_length(mut headers: HeaderMap) -> HeaderMap {
    headers.remove(http::header::CONTENT_LENGTH);
    headers
}

/// A body of `length` bytes, in one piece.
async fn read(budget: &Budget, body: &mut OriginBody, length: u64) -> Result<Bytes, OriginError> {
    // While it grows, and is cut into slices.
    let Some(_permit) = budget.transfer(2 * length).await else {
        return Err(OriginError::BrokeOff("no memory for it".into()));
    };
    let mut bytes = BytesMut::new();
    while let Some(more) = body.next().await? {
        bytes.extend_from_slice(&more);
        if bytes.len() as u64 > length {
            break;
        }
    }
    if bytes.len() as u64 != length {
        return Err(OriginError::BrokeOff("not the bytes it announced".into()));
    }
    Ok(bytes.freeze())
}
