//! Versions that the origin has replaced: forgotten on all nodes, whoever found
//! it out.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use futures::stream::{self, StreamExt};
use http::header::{CONTENT_LOCATION, HeaderMap, LOCATION};
use pingora_slice_cluster::handle::PurgeError;
use pingora_slice_cluster::purge::{PurgeItem, PurgeMode, Scope};
use pingora_slice_cluster::wire::{Answer, Ask, OriginRequest, ResolveAsk};
use pingora_slice_cluster::{Generation, NodeId, ObjectKey};
use tokio::sync::watch;

use super::{Engine, Fill, Request};
use crate::l2::L2;
use crate::url::Url;

/// How long other nodes may take to hear that a version was replaced.
const REPLACED_HEARD_WITHIN: Duration = Duration::from_secs(1);
/// Nodes that are asked at once what they hold.
const ASKED_AT_ONCE: usize = 64;
/// Pause between tries to purge what is owed.
const OWED_PAUSE: Duration = Duration::from_secs(1);
/// How much in one such try.
const OWED_AT_ONCE: usize = 1000;
/// How much is owed at most, 40 bytes each.
const OWED_MAX: usize = 100_000;

/// What has changed at the origin and whose purge no majority confirmed: each with a
/// mark of its last change.
#[derive(Default)]
pub(super) struct Owed(Mutex<HashMap<Scope, u64>>);

impl Owed {
    /// Adds what has changed; whether nothing was owed before.
    fn add(&self, changed: &[Scope]) -> bool {
        let mut owed = self.lock();
        let was_empty = owed.is_empty();
        for scope in changed {
            if owed.len() < OWED_MAX || owed.contains_key(scope) {
                owed.insert(*scope, rand::random());
            } else {
                tracing::warn!("too much is to be purged: what has changed now is not");
            }
        }
        was_empty
    }

    /// Some of what is owed.
    fn some(&self) -> Vec<(Scope, u64)> {
        let owed = self.lock();
        let some = owed.iter().take(OWED_AT_ONCE);
        some.map(|(scope, mark)| (*scope, *mark)).collect()
    }

    /// Takes out what has been purged, unless it has changed again since; whether
    /// nothing is owed any more.
    fn settle(&self, purged: &[(Scope, u64)]) -> bool {
        let mut owed = self.lock();
        for (scope, mark) in purged {
            if owed.get(scope) == Some(mark) {
                owed.remove(scope);
            }
        }
        owed.is_empty()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Scope, u64>> {
        self.0.lock().expect("no panic while held")
    }
}

impl Engine {
    /// A client's demand has found out that a fresh version is no longer what the
    /// origin has. The nodes that hold it forget it before the client's answer,
    /// so that whoever asks next, anywhere, gets what this client got. One that
    /// does not hear of it in time goes on until its copy is stale or purged:
    /// no client was promised more (that is what PURGE is for).
    pub(super) async fn tell_replaced(&self, request: &Request, generation: Generation) {
        let view = self.inner.cluster.view();
        let ask = Ask::Resolve(ResolveAsk {
            sliced: request.sliced,
            gone: Some(generation),
            ..ResolveAsk::what_is_stored(request.key, OriginRequest::clone(&request.origin))
        });
        let others = view.members.keys().filter(|id| **id != view.me);
        let told = others.map(|id| self.inner.cluster.ask(*id, &ask, REPLACED_HEARD_WITHIN));
        futures::future::join_all(told).await;
    }

    /// After an unsafe method succeeded (RFC 9111 section 4.4): its URL, and
    /// those of the same host that the answer names, have changed. Returns
    /// when no node answers from before any more, or none can promise it.
    pub async fn purge_changed(&self, url: &Url, response: &HeaderMap) {
        let settings = self.inner.live.take();
        let mut urls = vec![url.clone()];
        for name in [LOCATION, CONTENT_LOCATION] {
            let Some(value) = response.get(name).and_then(|v| v.to_str().ok()) else {
                continue;
            };
            let named = url.reference(value);
            urls.extend(named.map(|named| settings.naming.object(named)));
        }
        let mut known = Vec::new();
        for url in urls {
            if let Some(key) = self.hash_key()
                && self
                    .is_stored_anywhere(key.object(&url.host, &url.target), &url)
                    .await
            {
                known.push(url);
            }
        }
        self.purge_all_of(&known).await;
    }

    /// Whether this node holds something under a key: a variant, or a stale one,
    /// counts, what a disk that hangs may hold, and an answer that is under way.
    pub(super) async fn may_be_stored(&self, key: ObjectKey) -> bool {
        // Before what is stored is looked for: it may land meanwhile.
        self.inner.manifest_flights.has(key)
            || self.record(key.0).await.is_some()
            || self.inner.l2.as_ref().is_some_and(L2::hangs)
    }

    /// Whether any node holds something under a URL, or may: those that were the
    /// owner, or asked one, hold it too, and one that does not answer may.
    pub(super) async fn is_stored_anywhere(&self, key: ObjectKey, url: &Url) -> bool {
        if self.may_be_stored(key).await {
            return true;
        }
        let request = OriginRequest {
            host: url.host.clone(),
            target: url.target.clone(),
            headers: Vec::new(),
        };
        let ask = Ask::Resolve(ResolveAsk::what_is_stored(key, request));
        let view = self.inner.cluster.view();
        let others: Vec<NodeId> = view.members.keys().copied().collect();
        let (me, ask) = (view.me, &ask);
        let asking = stream::iter(others.into_iter().filter(|id| *id != me))
            .map(|id| async move {
                let answer = self.ask(id, ask).await;
                !matches!(answer, Ok((Answer::Missing, _)))
            })
            .buffer_unordered(ASKED_AT_ONCE);
        let mut asking = std::pin::pin!(asking);
        while let Some(may_hold) = asking.next().await {
            if may_hold {
                return true;
            }
        }
        false
    }

    /// Forgets a version everywhere: the origin has another, and answers from
    /// the old one would end short. Once, however many slices found it out.
    /// Returns when it is forgotten, so that whoever was cut off may ask again;
    /// at the latest after a second, should a node not answer.
    pub(super) async fn announce_change(&self, fill: &Fill) {
        const ANNOUNCED_WITHIN: Duration = Duration::from_secs(1);
        let Some(hash_key) = self.hash_key() else {
            return;
        };
        let url = fill.url();
        let subject = url.untagged_subject(&hash_key);
        if self.floor(&subject).plain > fill.stamp {
            return;
        }
        let mut announced = self.announcement(fill.slice.generation, url);
        // An error says that the other end is gone: it is done.
        let _ = tokio::time::timeout(ANNOUNCED_WITHIN, announced.changed()).await;
    }

    /// The announcement of a version's end, begun if need be.
    pub(super) fn announcement(&self, generation: Generation, url: Url) -> watch::Receiver<()> {
        let mut ending = self.inner.ending.lock().expect("no panic while held");
        if let Some(announced) = ending.get(&generation) {
            return announced.clone();
        }
        let (done, announced) = watch::channel(());
        ending.insert(generation, announced.clone());
        let engine = self.clone();
        self.inner.runtime.spawn(async move {
            engine.purge_all_of(&[url]).await;
            let mut ending = engine.inner.ending.lock().expect("no panic while held");
            ending.remove(&generation);
            drop(done);
        });
        announced
    }

    /// Whether a version's end is being announced: it is of no use already.
    pub(super) fn is_ending(&self, generation: Generation) -> bool {
        let ending = self.inner.ending.lock().expect("no panic while held");
        ending.contains_key(&generation)
    }

    /// Purges on all nodes what has changed at the origin; where no majority confirms
    /// it now, again and again until one does.
    pub(super) async fn purge_all_of(&self, urls: &[Url]) {
        let (Some(first), Some(key)) = (urls.first(), self.hash_key()) else {
            return;
        };
        let scope = |url: &Url| Scope::url(&key, &url.host, &url.target);
        let changed: Vec<Scope> = urls.iter().map(scope).collect();
        let Err(error) = self.purge_once(&changed, rand::random()).await else {
            return;
        };
        tracing::warn!(url = %first, count = changed.len(), %error, "what has changed is not purged yet");
        if !self.inner.owed.add(&changed) {
            return;
        }
        let engine = self.clone();
        self.inner.runtime.spawn(async move {
            loop {
                let owed = engine.inner.owed.some();
                let changed: Vec<Scope> = owed.iter().map(|(scope, _)| *scope).collect();
                // It may be in the log already: a retry finds it there (rule 16).
                let token = rand::random();
                loop {
                    tokio::time::sleep(OWED_PAUSE).await;
                    if engine.purge_once(&changed, token).await.is_ok() {
                        break;
                    }
                }
                if engine.inner.owed.settle(&owed) {
                    tracing::info!("what has changed is purged");
                    return;
                }
            }
        });
    }

    async fn purge_once(&self, changed: &[Scope], token: u128) -> Result<(), PurgeError> {
        let item = |scope: &Scope| PurgeItem {
            scope: *scope,
            mode: PurgeMode::Plain,
        };
        let items = changed.iter().map(item).collect();
        self.inner.cluster.purge(items, token).await.map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_changes_again_while_it_is_purged_stays_owed() {
        let owed = Owed::default();
        let (a, b) = (Scope::Url(1), Scope::Url(2));
        assert!(owed.add(&[a, b]), "it was empty");
        assert!(!owed.add(&[]), "it is not");
        let some = owed.some();
        owed.add(&[a]);
        assert!(!owed.settle(&some));
        let left = owed.some();
        assert_eq!(left.len(), 1);
        assert_eq!(left[0].0, a);
        assert!(owed.settle(&left));
    }
}
