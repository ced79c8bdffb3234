//! The manifests that this node holds: in memory, on disk, and under which key.

use std::sync::Arc;

use pingora_slice_cluster::ObjectKey;
use pingora_slice_cluster::wire::Headers;

use super::{Engine, Fill, Request};
use crate::freshness::{self, Policy};
use crate::l1::Kept;
use crate::manifest::{self, Manifest, Record, Stored, Varies};
use crate::url::Url;

impl Engine {
    /// L1, then L2; through the pointer where the object varies: only then are
    /// the request's fields looked at.
    pub(super) async fn lookup<'a>(
        &self,
        key: ObjectKey,
        url: &Url,
        headers: impl FnOnce() -> &'a Headers,
    ) -> Option<Arc<Stored>> {
        let object = match self.record(key.0).await? {
            Kept::Manifest(object) => object,
            Kept::Varies(varies) if varies.url != *url => return None,
            Kept::Varies(varies) => {
                let (at, variant) = varies.choose(&self.hash_key()?, key, headers());
                self.record(at).await?.of_variant(&variant)?
            }
        };
        (object.manifest.url == *url).then_some(object)
    }

    pub(super) async fn record(&self, key: u128) -> Option<Kept> {
        /// A miss after so many, each overtaken by a change.
        const READ_AGAIN_MAX: usize = 3;
        for _ in 0..READ_AGAIN_MAX {
            if let Some(kept) = self.inner.l1.record(key) {
                return Some(kept);
            }
            let since = self.inner.changes.so_far(key);
            let kept = self.record_on_disk(key).await?;
            // What has been kept meanwhile is newer; what has been forgotten is gone.
            let promoted = self.inner.changes.unless_changed(key, since, || {
                self.inner.l1.keep_record(key, kept.clone());
            });
            if promoted.is_some() {
                return Some(kept);
            }
        }
        None
    }

    pub(super) async fn record_on_disk(&self, key: u128) -> Option<Kept> {
        let bytes = self.inner.l2.as_ref()?.manifest(key).await?;
        match manifest::decode(&bytes)? {
            // A body that was under way when the node stopped.
            Record::Manifest(manifest)
                if manifest.length().is_none()
                    && self.inner.wholes.get(manifest.generation).is_none() =>
            {
                None
            }
            Record::Manifest(manifest) => Some(Kept::Manifest(Arc::new(Stored::new(*manifest)))),
            Record::Varies(varies) => Some(Kept::Varies(Arc::new(varies))),
        }
    }

    /// Keeps a manifest that is for all in memory, and on disk where it belongs.
    pub(super) fn keep(&self, key: ObjectKey, mut manifest: Manifest) -> Arc<Stored> {
        let Some(hash_key) = self.hash_key() else {
            return Arc::new(Stored::new(manifest));
        };
        let at = manifest::variant_key(&hash_key, key, &manifest.variant);
        let on_disk = self.inner.l2.as_ref().filter(|_| self.is_keeper(key, 0));
        let keep = |at, record: Record, kept| {
            if let Some(l2) = on_disk {
                l2.keep_manifest(at, manifest::encode(&record).into());
            }
            self.inner.l1.keep_record(at, kept);
        };
        let changing = self.inner.changes.begin(at);
        if let Some(Kept::Manifest(known)) = self.inner.l1.record(at) {
            match with_length(&known.manifest, &manifest) {
                Some(both) => manifest = both,
                // An answer that was long under way does not replace a newer one.
                None if known.manifest.stamp > manifest.stamp => {
                    return Arc::new(Stored::new(manifest));
                }
                None => {}
            }
        }
        let by = (!manifest.variant.is_empty()).then(|| manifest.varies_by());
        let url = manifest.url.clone();
        let object = Arc::new(Stored::new(manifest));
        let record = Record::Manifest(Box::new(object.manifest.clone()));
        keep(at, record, Kept::Manifest(object.clone()));
        drop(changing);
        if let Some(by) = by {
            let _changing = self.inner.changes.begin(key.0);
            let varies = Varies { url, by };
            let record = Record::Varies(varies.clone());
            keep(key.0, record, Kept::Varies(Arc::new(varies)));
        }
        object
    }

    /// Keeps a manifest, and returns it as its asker may have it.
    pub(super) fn keep_for_asker(&self, request: &Request, manifest: Manifest) -> Arc<Stored> {
        match for_all(&request.settings.policy, &manifest) {
            None => self.keep(request.key, manifest),
            Some(stored) => {
                self.keep(request.key, stored);
                Arc::new(Stored::new(manifest))
            }
        }
    }

    /// The manifest that a fill belongs to, while it is the current one.
    pub(super) async fn manifest_of(&self, fill: &Fill) -> Option<Manifest> {
        let url = fill.url();
        let object = self
            .lookup(fill.key, &url, || &fill.request.headers)
            .await?;
        (object.manifest.generation == fill.slice.generation).then(|| object.manifest.clone())
    }

    /// Whether no other version has replaced this one.
    pub(super) async fn is_current(&self, fill: &Fill) -> bool {
        let url = fill.url();
        let known = self.lookup(fill.key, &url, || &fill.request.headers).await;
        known.is_none_or(|object| object.manifest.generation == fill.slice.generation)
    }

    /// Forgets a manifest whose bytes cannot be had.
    pub(super) fn forget_manifest(&self, key: ObjectKey, manifest: &Manifest) {
        let Some(hash_key) = self.hash_key() else {
            return;
        };
        self.forget_record(manifest::variant_key(&hash_key, key, &manifest.variant));
    }

    pub(super) fn forget_record(&self, at: u128) {
        let _changing = self.inner.changes.begin(at);
        self.inner.l1.drop_record(at);
        if let Some(l2) = &self.inner.l2 {
            l2.drop_manifest(at);
        }
    }
}

/// The manifest without what is for its asker alone, where there is any.
pub(super) fn for_all(policy: &Policy, manifest: &Manifest) -> Option<Manifest> {
    let withheld = freshness::withheld(policy, &manifest::to_map(&manifest.headers));
    if withheld.is_empty() {
        return None;
    }
    let mut manifest = manifest.clone();
    manifest
        .headers
        .retain(|(name, _)| !withheld.iter().any(|w| w.as_str() == name));
    Some(manifest)
}

/// The newer of two manifests of one version, with the length that the other has:
/// a body that came without one has it since its end, which a validation may overlap.
/// `None`: there is none to be had from the other.
fn with_length(known: &Manifest, ours: &Manifest) -> Option<Manifest> {
    if known.generation != ours.generation {
        return None;
    }
    let age = |manifest: &Manifest| (manifest.stamp, manifest.freshness.received_ms);
    let newer = match age(known) > age(ours) {
        true => known,
        false => ours,
    };
    let length = match (known.length(), ours.length()) {
        (Some(length), None) | (None, Some(length)) => length,
        _ => return None,
    };
    let mut both = newer.clone();
    both.version.length = Some(length);
    Some(both)
}
