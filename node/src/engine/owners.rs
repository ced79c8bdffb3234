//! Who owns what, and what an object's owners answer.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use http::HeaderMap;
use pingora_slice_cluster::peer::{Body, PeerError};
use pingora_slice_cluster::ring::Ring;
use pingora_slice_cluster::wire::{Answer, Ask, OriginRequest, Resolution, ResolveAsk};
use pingora_slice_cluster::{Generation, NodeId, ObjectKey};

use super::part::PartRange;
use super::resolve::is_for_one;
use super::{
    Engine, Failure, Forwarded, Found, Held, Relay, RelayBody, Request, Resolved, Verdict,
};
use crate::freshness::{self, NotStored, Use, unix_ms};
use crate::manifest::{self, Record, Stored};

/// How long a peer may be silent before it is asked whether it lives.
pub(super) const PATIENCE: Duration = Duration::from_millis(750);
/// How long a living peer takes to say so, at most.
const PING: Duration = Duration::from_millis(500);
/// A peer's answer in all: an origin's slowest head, and as much again.
const ASK_DEADLINE: Duration = Duration::from_secs(60);
/// Owners asked for one thing before the origin is.
const OWNERS_TRIED: usize = 3;

impl Engine {
    /// Whom to ask for slice `place` of an object, in order; this node alone
    /// where there is no ring yet.
    pub(super) fn owners(&self, key: ObjectKey, place: u32) -> Vec<NodeId> {
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
    pub(super) fn owner_before(&self, key: ObjectKey, place: u32) -> Option<NodeId> {
        let view = self.inner.cluster.view();
        let first = |ring: &Ring| ring.owners(key, place).first().copied();
        let before = first(&view.previous_ring)?;
        (first(&view.ring) == Some(view.me) && before != view.me).then_some(before)
    }

    /// Whether this node keeps slice `place` of an object on its disk.
    pub(super) fn is_keeper(&self, key: ObjectKey, place: u32) -> bool {
        let view = self.inner.cluster.view();
        view.ring
            .owners(key, place)
            .first()
            .is_none_or(|owner| *owner == view.me)
    }

    /// What the object's owner holds and may be answered with, where that is
    /// another node.
    pub(super) async fn stored_at_owner(
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
    pub(super) async fn ask_owners(
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
    pub(super) async fn resolve_at(
        &self,
        owner: NodeId,
        request: &Request,
        held: Option<&Held>,
        gone: Option<Generation>,
        stored_only: bool,
    ) -> Option<Resolved> {
        let hash_key = self.hash_key()?;
        let subject = request.url.untagged_subject(&hash_key);
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
                kept,
                collapsed,
                informational,
            } => {
                let Some(Record::Manifest(manifest)) = manifest::decode(&manifest) else {
                    return None;
                };
                if manifest.url != *request.url {
                    return None;
                }
                let headers = || manifest::to_map(&manifest.headers);
                if !kept && is_for_one(self.why_not_kept(request, manifest.status, &headers())) {
                    let authorized = request.demands.authorized;
                    self.inner.unshared.note(request.key, authorized);
                }
                // While its length is unknown it is of use to its owner alone.
                let object = match kept && manifest.length().is_some() {
                    true => self.keep_for_asker(request, *manifest),
                    false => Arc::new(Stored::new(*manifest)),
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
                    kept,
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
                let why = self.why_not_kept(request, status, &headers);
                self.takes_away(request, status, why).await;
                let length = headers
                    .get(http::header::CONTENT_LENGTH)
                    .and_then(|v| v.to_str().ok()?.parse().ok());
                Some(Resolved::Relay(Box::new(Relay {
                    status,
                    headers,
                    length,
                    forwarded: Forwarded::default(),
                    why,
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
                    500 | 503 => Failure::Fails,
                    _ => Failure::BrokeOff,
                },
            }),
            // Its way to the origin may be cut; ours need not be.
            Answer::Behind | Answer::Busy | Answer::Missing => None,
            Answer::Slice { .. } | Answer::PastEnd | Answer::Changed => None,
        }
    }

    /// Why an owner does not keep an answer of the origin: it judged it as is done here.
    fn why_not_kept(&self, request: &Request, status: u16, headers: &HeaderMap) -> NotStored {
        let now_ms = unix_ms(SystemTime::now());
        let policy = &request.settings.policy;
        match freshness::store(policy, &request.demands, status, headers, now_ms, now_ms) {
            Err(why) => why,
            Ok(_) if status == 206 => PartRange::why_passed(headers, self.inner.config.slice_bytes),
            Ok(_) => NotStored::TooLarge,
        }
    }

    /// Asks a peer and waits while it lives: an owner that waits for a slow
    /// origin is not a dead one.
    pub(super) async fn ask(
        &self,
        peer: NodeId,
        ask: &Ask,
    ) -> Result<(Answer, Option<Body>), PeerError> {
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

    pub(super) async fn is_alive(&self, peer: NodeId) -> bool {
        self.inner.cluster.is_alive(peer, PING).await
    }
}
