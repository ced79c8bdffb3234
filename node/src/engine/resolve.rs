//! Which manifest does the origin give, and what does its answer mean?

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};

use http::header::{
    ACCEPT_ENCODING, ACCEPT_RANGES, DATE, ETAG, HeaderMap, IF_MODIFIED_SINCE, IF_NONE_MATCH,
    IF_RANGE, LAST_MODIFIED,
};
use pingora_slice_cluster::purge::Subject;
use pingora_slice_cluster::slice::{slice_at, slice_range};
use pingora_slice_cluster::wire::{Informational, Resolution, Version};
use pingora_slice_cluster::{Generation, ObjectKey, PurgeIndex};
use rand::Rng;

use super::part::{OpenRange, PartRange};
use super::tags::NewTags;
use super::together::{ManifestFlight, Others, Outcome};
use super::{Engine, Failure, Fill, Forwarded, Relay, RelayBody, Request, holds_what_is_wanted};
use crate::config::OriginProbe;
use crate::freshness::{self, NotStored, TAGS_MAX, unix_ms};
use crate::manifest::{self, Freshness, Identity, Manifest, Stored};
use crate::origin::{self, Misfit, OriginAnswer, OriginAsk, OriginError};
use crate::plan;
use crate::stitch::Fault;
use crate::url::Url;

/// First pause between two tries at the origin; doubled each time, with jitter.
const BACK_OFF: Duration = Duration::from_millis(50);
/// Longest pause.
const BACK_OFF_MAX: Duration = Duration::from_secs(2);
/// The pause before try number `attempt` (from 1), with equal jitter.
pub(super) fn back_off(attempt: u32) -> Duration {
    let full = BACK_OFF
        .saturating_mul(1 << attempt.min(10).saturating_sub(1))
        .min(BACK_OFF_MAX);
    full.mul_f64(rand::rng().random_range(0.5..1.0))
}

impl Engine {
    /// Asks until there is an answer to act on, and acts on it.
    pub(super) async fn ask_origin(
        &self,
        request: &Request,
        held: Option<Arc<Stored>>,
        flight: &Arc<ManifestFlight>,
    ) -> Outcome {
        let total = self.inner.config.origin_timeouts.total;
        let stale = || self.stale_on_error(held.as_ref(), request, flight.gone);
        let asking = self.ask_until_answered(request, held.clone(), flight);
        match tokio::time::timeout(total, asking).await {
            Ok(outcome) => outcome,
            Err(_) => match stale() {
                Some(stale) => Outcome::Object(stale, Resolution::Stale),
                None => {
                    let error = OriginError::TimedOut("no answer in all".into());
                    self.failed(&error, held.as_ref())
                }
            },
        }
    }

    async fn ask_until_answered(
        &self,
        request: &Request,
        held: Option<Arc<Stored>>,
        flight: &Arc<ManifestFlight>,
    ) -> Outcome {
        let stale = || self.stale_on_error(held.as_ref(), request, flight.gone);
        let mut probe = Probe::of(self, request, held.clone());
        probe.open = self.open_range(request, held.as_ref(), flight.gone).await;
        if self.inner.config.origin_probe == OriginProbe::Head && held.is_none() {
            let ask = OriginAsk {
                head: true,
                ..OriginAsk::default()
            };
            // A failure will show again in the loop, which can deal with it.
            if let Ok(mut answer) = self.inner.origin.get(&request.origin, &ask).await {
                probe.learn(&answer);
                // The connection can be used again after the end.
                let _ = answer.body.next().await;
            }
        }
        let (mut attempt, mut turns) = (0, 0);
        let disagrees = Outcome::Failed {
            status: 502,
            reason: Failure::Disagrees,
        };
        loop {
            let confirm = held
                .as_ref()
                .filter(|_| probe.may_confirm)
                .filter(|object| self.may_be_confirmed(object, request, flight.gone));
            let ask = probe.ask(confirm);
            let is_last = attempt >= request.settings.max_retries;
            match self.inner.origin.get(&request.origin, &ask).await {
                Ok(mut answer) => {
                    flight.note_informational(std::mem::take(&mut answer.informational));
                    if is_passing_failure(answer.status)
                        && let Some(stale) = stale()
                    {
                        return Outcome::Object(stale, Resolution::Stale);
                    }
                    let may_pass = held.is_none() && is_bare_failure(&answer);
                    if is_last || !may_pass {
                        match self.act(request, confirm, &mut probe, answer, flight).await {
                            Act::Done(outcome) => return outcome,
                            Act::AskOtherwise if turns < Probe::TURNS => {
                                turns += 1;
                                continue;
                            }
                            Act::TryAgain if !is_last => {}
                            Act::AskOtherwise | Act::TryAgain => return disagrees,
                        }
                    }
                }
                Err(error) => {
                    tracing::debug!(url = %request.url, %error, "origin request failed");
                    if let Some(stale) = stale() {
                        return Outcome::Object(stale, Resolution::Stale);
                    }
                    let reached = !matches!(error, OriginError::Unreachable(_));
                    if is_last || (reached && held.is_some()) {
                        return self.failed(&error, held.as_ref());
                    }
                }
            }
            attempt += 1;
            self.inner.metrics.retried_subrequests_total.inc();
            tokio::time::sleep(back_off(attempt)).await;
        }
    }

    /// Counts a request to the origin with all of its tries, which took so long. One
    /// that brings a new object is counted as the fill that it is.
    pub(super) fn count(&self, outcome: &Outcome, took: Duration) {
        let metrics = &self.inner.metrics;
        match outcome {
            Outcome::Object(_, Resolution::Miss) => return,
            Outcome::Object(_, Resolution::Stale)
            | Outcome::Failed { .. }
            | Outcome::Relay(Others::Fail(_)) => {
                metrics.failed_subrequests_total.inc();
            }
            _ => {}
        }
        metrics.subrequests_total.inc();
        metrics
            .subrequest_duration_seconds
            .observe(took.as_secs_f64());
    }

    /// Rule 5's last line, or the gateway errors: 504 where something is held
    /// that must not be used unasked (RFC 9111 section 5.2.2.2).
    pub(super) fn failed(&self, error: &OriginError, held: Option<&Arc<Stored>>) -> Outcome {
        if self.inner.cluster.may_serve() {
            let must_ask = held.is_some_and(|object| {
                let freshness = &object.manifest.freshness;
                freshness.must_revalidate || freshness.no_cache
            });
            Outcome::Failed {
                status: if must_ask { 504 } else { error.status() },
                reason: match error {
                    OriginError::Unreachable(_) => Failure::Unreachable,
                    OriginError::BrokeOff(_) => Failure::BrokeOff,
                    OriginError::NotConnected(_) => Failure::NotConnected,
                    OriginError::TimedOut(_) => Failure::TimedOut,
                },
            }
        } else {
            Outcome::Failed {
                status: 503,
                reason: Failure::Fenced,
            }
        }
    }

    /// Whether the origin's 304 would make the held version good again: after
    /// a purge only a strong validator does, after a hard purge none.
    fn may_be_confirmed(
        &self,
        object: &Arc<Stored>,
        request: &Request,
        gone: Option<Generation>,
    ) -> bool {
        let manifest = &object.manifest;
        // The lease first: it vouches for floors read after it.
        let leased = self.inner.cluster.may_serve();
        let floor = self.floor(&manifest.subject);
        let has_validator =
            manifest.version.etag.is_some() || manifest.version.last_modified.is_some();
        has_validator
            && gone != Some(manifest.generation)
            && holds_what_is_wanted(manifest, request)
            && manifest.selects(&request.origin.headers)
            && manifest.stamp >= floor.hard
            && ((leased && floor.allows(manifest.stamp)) || self.is_exact(request.key, manifest))
    }

    /// Whether a 304 vouches for each byte of a version: its validator was strong
    /// when the bytes came, so that its generation is of that alone. A date does
    /// not get stronger when a 304 brings a later Date.
    fn is_exact(&self, key: ObjectKey, manifest: &Manifest) -> bool {
        let Some(hash_key) = self.hash_key() else {
            return false;
        };
        let key = ObjectKey(manifest::variant_key(&hash_key, key, &manifest.variant));
        let exact =
            |version: &Version| manifest::generation(&hash_key, key, version, Identity::Validators);
        // A body that came without a length has one since it ended.
        let as_it_came = || Version {
            length: None,
            ..manifest.version.clone()
        };
        manifest.generation == exact(&manifest.version)
            || (manifest.version.whole && manifest.generation == exact(&as_it_came()))
    }

    /// `stale-if-error` (RFC 5861 section 4); never past a purge or without a lease,
    /// nor what was found to be gone.
    pub(super) fn stale_on_error(
        &self,
        held: Option<&Arc<Stored>>,
        request: &Request,
        gone: Option<Generation>,
    ) -> Option<Arc<Stored>> {
        let object = held?;
        let manifest = &object.manifest;
        let freshness = &manifest.freshness;
        let staleness = freshness.staleness(unix_ms(SystemTime::now()));
        let usable = self.inner.cluster.may_serve()
            && self.floor(&manifest.subject).allows(manifest.stamp)
            && gone != Some(manifest.generation)
            && !self.is_ending(manifest.generation)
            && holds_what_is_wanted(manifest, request)
            && !freshness.must_revalidate
            && !freshness.no_cache
            && staleness <= freshness.stale_if_error
            && freshness.stale_if_error > 0;
        usable.then(|| object.clone())
    }

    async fn act(
        &self,
        request: &Request,
        confirm: Option<&Arc<Stored>>,
        probe: &mut Probe,
        mut answer: OriginAnswer,
        flight: &Arc<ManifestFlight>,
    ) -> Act {
        let is_empty = answer.length == Some(0) && answer.status != 205;
        if is_empty || matches!(answer.status, 204 | 304) {
            // There is nothing to wait for: after its end the connection can be used again.
            let _ = answer.body.next().await;
        }
        match answer.status {
            304 => match confirm {
                Some(object)
                    if is_of_another(&object.manifest.version, &answer)
                        || varies_by_more(&object.manifest, &answer) =>
                {
                    probe.may_confirm = false;
                    Act::AskOtherwise
                }
                Some(object) => Act::Done(self.confirmed(request, object, answer, flight.stamp)),
                // Nobody asked for that.
                None => Act::TryAgain,
            },
            206 if probe.open.is_some() => self.open_answer(request, probe, answer, flight).await,
            // It may know no range without both ends.
            400 | 501 if probe.open.is_some() => {
                probe.open = None;
                Act::AskOtherwise
            }
            206 => {
                let Some(asked) = probe.range.clone() else {
                    return Act::TryAgain;
                };
                let fits = answer.fits(&asked);
                match fits.and_then(|range| range.total.ok_or(Misfit::ContentRange)) {
                    Ok(total) => self.sliced(request, probe, total, answer, flight).await,
                    Err(_) if let Some(part) = PartRange::answering(request, &answer) => {
                        let held = self.held_part(request, flight.gone).await;
                        Act::Done(self.part(request, part, held, answer, flight).await)
                    }
                    Err(misfit) => {
                        self.inner.stitch.report(Fault {
                            reason: misfit.as_str(),
                            url: &request.url,
                            asked: Some(asked),
                            expected: None,
                            headers: &answer.headers,
                        });
                        probe.was_lied_to();
                        Act::AskOtherwise
                    }
                }
            }
            416 if probe.range.is_some() => {
                let total = origin::content_range(&answer.headers).and_then(|range| range.total);
                let headers = manifest::to_map(&request.origin.headers);
                if total.is_some_and(|total| plan::is_unsatisfiable(&headers, total)) {
                    return Act::Done(self.relay(answer, NotStored::Status, flight));
                }
                probe.shrink(total);
                Act::AskOtherwise
            }
            status => {
                answer.headers.remove(http::header::CONTENT_LENGTH);
                if matches!(status, 204 | 205) {
                    answer.length = Some(0);
                }
                Act::Done(self.whole(request, status, answer, flight).await)
            }
        }
    }

    /// 304: the held version is good again. Its stamp is the one read before
    /// this conditional request (rule 1).
    fn confirmed(
        &self,
        request: &Request,
        object: &Arc<Stored>,
        answer: OriginAnswer,
        stamp: PurgeIndex,
    ) -> Outcome {
        let mut manifest = object.manifest.clone();
        let mut headers = object.fields();
        // A 304 without Date is dated on arrival.
        headers.remove(DATE);
        update(&mut headers, &answer.headers);
        // The bytes keep the name that they came under: a tag that is strong now
        // may not have been so for them.
        if let Some(Ok(etag)) = manifest.version.etag.as_ref().map(|etag| etag.parse()) {
            headers.insert(ETAG, etag);
        }
        let judged = self.judge_storable(request, manifest.status, &headers, &answer, None);
        headers.remove(http::header::AGE);
        write_date(&mut headers, answer.received_ms);
        manifest.headers = manifest::to_headers(&headers);
        manifest.stamp = stamp;
        if let Some(key) = self.hash_key() {
            let tags = freshness::tags(&headers);
            let mut subject = Subject::new(&key, &request.url.host, &request.url.target, &tags);
            // A purge of a tag that it had before may be on its way to this node (G2).
            subject.keep_tags_of(&manifest.subject);
            manifest.subject = subject;
        }
        match judged {
            Ok(freshness) if manifest.subject.tags.len() <= TAGS_MAX => {
                manifest.freshness = freshness;
                Outcome::Object(
                    self.keep_for_asker(request, manifest),
                    Resolution::Revalidated,
                )
            }
            judged => {
                // No longer to be kept; it still answers this request, and no other.
                manifest.freshness = Freshness {
                    no_cache: true,
                    lifetime: 0,
                    ..manifest.freshness
                };
                // What credentials bring says nothing of what others get.
                if !request.demands.authorized {
                    self.forget_manifest(request.key, &manifest);
                }
                if judged.is_err_and(is_for_one) {
                    let authorized = request.demands.authorized;
                    self.inner.unshared.note(request.key, authorized);
                }
                Outcome::Alone(Arc::new(Stored::new(manifest)), Resolution::Revalidated)
            }
        }
    }

    /// 206: the head of a sliced object, and its first slice.
    async fn sliced(
        &self,
        request: &Request,
        probe: &mut Probe,
        total: u64,
        mut answer: OriginAnswer,
        flight: &Arc<ManifestFlight>,
    ) -> Act {
        let covers_all = probe
            .range
            .as_ref()
            .is_some_and(|r| r.start == 0 && r.end >= total);
        origin::strip_framing(&mut answer.headers);
        let storable = self.judge_storable(request, 200, &answer.headers, &answer, Some(total));
        let freshness = match storable {
            Ok(freshness) => freshness,
            Err(why) => {
                self.is_not_stored(request, 200, why, flight).await;
                // The client gets it, or its range, by a request of its own.
                if !covers_all || wants_range(request) {
                    self.mark_uncacheable(request);
                    return Act::Done(Outcome::Uncacheable);
                }
                answer.status = 200;
                answer.length = Some(total);
                return Act::Done(self.relay(answer, why, flight));
            }
        };
        let version = self.version(&answer, Some(total), false);
        let resumable = version.is_resumable();
        // One slice is tied to no other.
        let tied = match resumable && !covers_all {
            true => probe.is_tied(&version, answer.received_ms),
            false => Some(resumable || covers_all),
        };
        let Some(tied) = tied else {
            return Act::AskOtherwise;
        };
        if !tied {
            // Nothing ties one slice to the next: fetch it whole.
            self.inner.stitch.report(Fault {
                reason: "no-validator",
                url: &request.url,
                asked: probe.range.clone(),
                expected: None,
                headers: &answer.headers,
            });
            probe.range = None;
            return Act::AskOtherwise;
        }
        let Some(manifest) = self.manifest(
            request,
            200,
            version,
            probe.index,
            freshness,
            &answer,
            flight.stamp,
        ) else {
            return Act::Done(Outcome::Uncacheable);
        };
        // The slice's flight is there before anybody can hear of the manifest.
        let fill = Fill::of(request.key, &manifest, &request.origin, probe.index);
        self.adopt(fill, answer.body);
        Act::Done(Outcome::Object(
            self.keep_for_asker(request, manifest),
            Resolution::Miss,
        ))
    }

    /// Any other final answer: kept whole, or relayed.
    async fn whole(
        &self,
        request: &Request,
        status: u16,
        answer: OriginAnswer,
        flight: &Arc<ManifestFlight>,
    ) -> Outcome {
        let length = answer.length;
        let freshness = match self.judge_storable(request, status, &answer.headers, &answer, length)
        {
            Ok(freshness) => freshness,
            Err(why) => {
                self.is_not_stored(request, status, why, flight).await;
                return self.relay(answer, why, flight);
            }
        };
        let version = self.version(&answer, answer.length, true);
        let Some(manifest) = self.manifest(
            request,
            status,
            version,
            0,
            freshness,
            &answer,
            flight.stamp,
        ) else {
            return Outcome::Uncacheable;
        };
        self.begin_whole(request, &manifest, answer.body);
        Outcome::Object(self.keep_for_asker(request, manifest), Resolution::Miss)
    }

    /// An answer is not stored, and takes away what is, of all variants, where it is
    /// in its place (RFC 9111 section 4).
    pub(super) async fn is_not_stored(
        &self,
        request: &Request,
        status: u16,
        why: NotStored,
        flight: &ManifestFlight,
    ) {
        tracing::debug!(url = %request.url, why = why.as_str(), "not stored");
        if self.takes_away(request, status, why).await {
            flight.took_away.store(true, Ordering::Relaxed);
        }
    }

    /// What follows here from an answer that is not stored; whether what was stored
    /// is gone.
    pub(super) async fn takes_away(&self, request: &Request, status: u16, why: NotStored) -> bool {
        if is_for_one(why) {
            let authorized = request.demands.authorized;
            self.inner.unshared.note(request.key, authorized);
        }
        // What credentials bring for one client says nothing of what others get.
        let is_own = request.demands.authorized && is_for_one(why);
        if is_own || !ends_what_is_stored(status, why) {
            return false;
        }
        let stored = self.lookup(request.key, &request.url, || &request.origin.headers);
        if let Some(object) = stored.await {
            self.forget_manifest(request.key, &object.manifest);
        }
        self.forget_record(request.key.0);
        true
    }

    pub(super) fn relay(
        &self,
        mut answer: OriginAnswer,
        why: NotStored,
        flight: &Arc<ManifestFlight>,
    ) -> Outcome {
        answer.headers.remove(http::header::CONTENT_LENGTH);
        let others = Others::of(answer.status);
        flight.put_relay(Relay {
            status: answer.status,
            headers: answer.headers,
            length: answer.length,
            forwarded: Forwarded::default(),
            why,
            informational: Informational::new(),
            body: RelayBody::Origin(Box::new(answer.body)),
        });
        Outcome::Relay(others)
    }

    /// Whether an answer of the origin may be stored; `length` is the object's, where
    /// it is known and counts.
    pub(super) fn judge_storable(
        &self,
        request: &Request,
        status: u16,
        headers: &HeaderMap,
        answer: &OriginAnswer,
        length: Option<u64>,
    ) -> Result<Freshness, NotStored> {
        let freshness = freshness::store(
            &request.settings.policy,
            &request.demands,
            status,
            headers,
            answer.asked_ms,
            answer.received_ms,
        )?;
        match length.is_some_and(|length| self.is_too_large(length)) {
            true => Err(NotStored::TooLarge),
            false => Ok(freshness),
        }
    }

    pub(super) fn version(
        &self,
        answer: &OriginAnswer,
        length: Option<u64>,
        whole: bool,
    ) -> Version {
        let text = |name| {
            let value = answer.headers.get(name).and_then(|v| v.to_str().ok());
            value.map(str::to_owned)
        };
        Version {
            etag: text(ETAG),
            last_modified: text(LAST_MODIFIED),
            exact_date: strong_date(&answer.headers, answer.received_ms).is_some(),
            length,
            slice_bytes: self.inner.config.slice_bytes,
            whole,
            hard: PurgeIndex::default(),
        }
    }

    #[expect(
        clippy::too_many_arguments,
        reason = "one place builds manifests, from all that is known"
    )]
    pub(super) fn manifest(
        &self,
        request: &Request,
        status: u16,
        mut version: Version,
        probe: u32,
        freshness: Freshness,
        answer: &OriginAnswer,
        stamp: PurgeIndex,
    ) -> Option<Manifest> {
        let hash_key = self.hash_key()?;
        let tags = freshness::tags(&answer.headers);
        let subject = Subject::new(&hash_key, &request.url.host, &request.url.target, &tags);
        // A hard purge that came after the request left says nothing of these bytes.
        version.hard = self.inner.cluster.hard_for_new(&subject).min(stamp);
        let has_strong_validator = match &version.etag {
            Some(_) => version.quoted_etag().is_some(),
            None => version.exact_date,
        };
        let identity = match status == 200 && has_strong_validator {
            true => Identity::Validators,
            false => Identity::OneFill {
                stamp,
                chance: rand::random(),
            },
        };
        let mut by = freshness::vary(&answer.headers)?;
        if !version.whole {
            // Slices are asked for as they are, whatever encodings the client takes.
            by.retain(|name| *name != ACCEPT_ENCODING.as_str());
        }
        let variant = manifest::variant_of(&by, &request.origin.headers);
        let object = ObjectKey(manifest::variant_key(&hash_key, request.key, &variant));
        let mut headers = answer.headers.clone();
        write_date(&mut headers, answer.received_ms);
        headers.remove(http::header::AGE);
        Some(Manifest {
            url: Url::clone(&request.url),
            status,
            generation: manifest::generation(&hash_key, object, &version, identity),
            headers: manifest::to_headers(&headers),
            version,
            probe,
            stamp,
            subject,
            variant,
            part: None,
            freshness,
        })
    }
}

pub(super) enum Act {
    Done(Outcome),
    /// The plan has changed: no retry.
    AskOtherwise,
    /// Not an answer to what was asked.
    TryAgain,
}

/// How an object is asked for: by a slice, until the origin says otherwise.
pub(super) struct Probe {
    /// The slice asked for.
    index: u32,
    /// Its bytes; `None` asks for the whole.
    range: Option<std::ops::Range<u64>>,
    slice_bytes: u32,
    /// Asked for instead of `range`, once.
    pub(super) open: Option<OpenRange>,
    /// Answers that were not what was asked for.
    lies: u32,
    /// Conditions may be sent: no 304 has named a version that is not held.
    may_confirm: bool,
    /// The version held before, and the tags that came since.
    before: Option<Arc<Stored>>,
    tags: NewTags,
}

impl Probe {
    /// Changes of mind beyond the retries: no conditions, no open range, 416,
    /// then no usable range, another tag, then whole.
    const TURNS: u32 = 5 + NewTags::LOOKS;
    /// Wrong answers to a range before the whole is asked for.
    const LIES_MAX: u32 = 2;

    fn of(engine: &Engine, request: &Request, before: Option<Arc<Stored>>) -> Probe {
        let slice_bytes = engine.inner.config.slice_bytes;
        let index = slice_at(request.first_byte, slice_bytes).unwrap_or(0);
        let range = request
            .sliced
            .then(|| slice_range(index, u64::MAX, slice_bytes));
        Probe {
            index,
            range,
            slice_bytes,
            open: None,
            lies: 0,
            may_confirm: true,
            before,
            tags: NewTags::default(),
        }
    }

    /// Whether the version's validators tie its slices together; `None` asks again.
    fn is_tied(&mut self, version: &Version, received_ms: u64) -> Option<bool> {
        let Some(before) = &self.before else {
            return Some(true);
        };
        let before = &before.manifest;
        let age = received_ms.saturating_sub(before.freshness.received_ms);
        self.tags
            .judge(&before.version, version, Duration::from_millis(age))
    }

    /// The answer to a HEAD: only what has ranges is asked for by range.
    fn learn(&mut self, head: &OriginAnswer) {
        let units = head.headers.get(ACCEPT_RANGES);
        let has_ranges = units.is_some_and(|units| units.as_bytes() == b"bytes");
        if self.range.is_none() || head.status != 200 || !has_ranges {
            (self.range, self.index) = (None, 0);
        } else if let (Some(range), Some(total)) = (&self.range, head.length)
            && total <= range.start
        {
            self.shrink(Some(total));
        }
    }

    /// The answer was not the range that was asked for.
    pub(super) fn was_lied_to(&mut self) {
        self.open = None;
        self.lies += 1;
        if self.lies >= Probe::LIES_MAX {
            (self.range, self.index) = (None, 0);
        }
    }

    /// The origin has nothing there: go back to the first slice, or to no range.
    fn shrink(&mut self, total: Option<u64>) {
        // It may have nothing against the first slice.
        if self.open.take().is_some() && total != Some(0) {
            return;
        }
        self.range = match total {
            Some(total) if total > 0 && self.index > 0 => {
                Some(slice_range(0, u64::MAX, self.slice_bytes))
            }
            _ => None,
        };
        self.index = 0;
    }

    fn ask(&self, confirm: Option<&Arc<Stored>>) -> OriginAsk {
        let mut fields = Vec::new();
        if let Some(OpenRange::Rest(held)) = &self.open
            && let Some(etag) = held.quoted_etag()
        {
            fields.push((IF_RANGE, etag.to_owned()));
        }
        if let Some(object) = confirm {
            if let Some(etag) = &object.manifest.version.etag {
                fields.push((IF_NONE_MATCH, etag.clone()));
            }
            if let Some(date) = &object.manifest.version.last_modified {
                fields.push((IF_MODIFIED_SINCE, date.clone()));
            }
        }
        OriginAsk {
            head: false,
            range: self.range.clone(),
            open_range: self.open.as_ref().map(OpenRange::value),
            fields,
        }
    }
}

fn wants_range(request: &Request) -> bool {
    plan::range_value(&manifest::to_map(&request.origin.headers)).is_some()
}

/// Whether an answer that is not stored shows that what is stored is not what the
/// origin has for others: not where it may be about the one client that asked
/// (RFC 9111 section 4.3.3), and not where the origin fails.
fn ends_what_is_stored(status: u16, why: NotStored) -> bool {
    use NotStored::{Authorized, PartDoesNotFit, PassedAsPart};
    // A part says nothing of the rest.
    let is_silent = matches!(why, Authorized | PartDoesNotFit | PassedAsPart);
    !is_silent && (status < 400 || matches!(status, 404 | 410))
}

/// Whether an answer is not stored because it is for one client, or for one request.
pub(super) fn is_for_one(why: NotStored) -> bool {
    match why {
        NotStored::NoStore
        | NotStored::Private
        | NotStored::Authorized
        | NotStored::SetCookie
        | NotStored::VaryAny => true,
        NotStored::Status
        | NotStored::NoFreshness
        | NotStored::Tags
        | NotStored::TooLarge
        | NotStored::PassedAsPart
        | NotStored::PartDoesNotFit => false,
    }
}

/// The errors that `stale-if-error` is for (RFC 5861 section 4).
pub(super) fn is_passing_failure(status: u16) -> bool {
    matches!(status, 500 | 502 | 503 | 504)
}

/// A failure that says nothing of how long it is meant to last: worth another
/// try. One with a validator, freshness or `Retry-After` is the origin's answer.
fn is_bare_failure(answer: &OriginAnswer) -> bool {
    const MEANT: [&str; 7] = [
        "cache-control",
        "cdn-cache-control",
        "expires",
        "last-modified",
        "etag",
        "retry-after",
        "set-cookie",
    ];
    is_passing_failure(answer.status)
        && !MEANT.iter().any(|name| answer.headers.contains_key(*name))
}

/// Whether a 304 names a version other than the one that is held, so that it
/// confirms nothing (RFC 9111 section 4.3.4): from an origin that looks at the
/// date alone, or takes an older one for no change, or that has begun to give
/// tags. Origins that encode make a tag weak and confirm it as the strong one.
fn is_of_another(held: &Version, answer: &OriginAnswer) -> bool {
    let named = |name| answer.headers.get(name).and_then(|v| v.to_str().ok());
    match (&held.etag, named(ETAG)) {
        (Some(held), Some(named)) => !plan::weakly_equal(held, named),
        (None, Some(named)) if !named.starts_with("W/") => true,
        (None, _) => {
            let dates = held.last_modified.as_deref().zip(named(LAST_MODIFIED));
            dates.is_some_and(|(held, named)| held != named)
        }
        (Some(_), None) => false,
    }
}

/// Whether a 304 names request fields that what is held was not chosen by: what it
/// confirms for this request need not be what others get. `*` forbids keeping it.
fn varies_by_more(held: &Manifest, answer: &OriginAnswer) -> bool {
    let by = held.varies_by();
    let names = freshness::vary(&answer.headers).unwrap_or_default();
    // As in `manifest`: slices are asked for as they are.
    let is_not_told = |name: &String| *name == ACCEPT_ENCODING.as_str() && !held.version.whole;
    names
        .iter()
        .any(|name| !by.contains(name) && !is_not_told(name))
}

/// RFC 9111 section 3.2: the 304's fields replace the stored ones, except those
/// that describe the stored bytes.
pub(super) fn update(stored: &mut HeaderMap, fresh: &HeaderMap) {
    const KEPT: [&str; 3] = ["content-encoding", "content-range", "content-length"];
    for name in fresh.keys() {
        if KEPT.contains(&name.as_str()) || origin::DIGESTS.contains(&name.as_str()) {
            continue;
        }
        stored.remove(name);
        for value in fresh.get_all(name) {
            stored.append(name.clone(), value.clone());
        }
    }
}

/// One Date, in the form that is to be generated; a recipient with a clock
/// dates a message without one (RFC 9110 sections 5.6.7 and 6.6.1).
pub(super) fn write_date(headers: &mut HeaderMap, received_ms: u64) {
    let stated = headers.get(DATE).and_then(|v| v.to_str().ok());
    let date = stated
        .and_then(freshness::http_date)
        .unwrap_or_else(|| SystemTime::UNIX_EPOCH + Duration::from_millis(received_ms));
    if let Ok(value) = httpdate::fmt_http_date(date).parse() {
        headers.insert(DATE, value);
    }
}

/// Last-Modified, where it is old enough to name the bytes exactly: within the
/// second that it names there may have been two versions.
pub(super) fn strong_date(headers: &HeaderMap, received_ms: u64) -> Option<String> {
    let mut dates = HeaderMap::new();
    for name in [DATE, LAST_MODIFIED] {
        if let Some(value) = headers.get(&name) {
            dates.insert(name, value.clone());
        }
    }
    write_date(&mut dates, received_ms);
    let date = dates.get(LAST_MODIFIED)?.to_str().ok()?;
    freshness::has_strong_date(&dates).then(|| date.to_owned())
}
