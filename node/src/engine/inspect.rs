//! What the engine shows of itself: `explain`, `warm`, and the gauges.

use std::sync::Arc;
use std::time::SystemTime;

use pingora_slice_client::api;
use pingora_slice_cluster::handle::StoredStamp;
use pingora_slice_cluster::purge::Subject;
use pingora_slice_cluster::slice::touched;
use pingora_slice_cluster::wire::{OriginRequest, Resolution};
use pingora_slice_cluster::{PurgeIndex, SliceId};

use super::{Engine, Request, Resolved, Verdict};
use crate::admin::Inspect;
use crate::flight::{FillError, Form};
use crate::freshness::{Demands, Use, unix_ms};
use crate::manifest::Stored;
use crate::metrics::Gauges;
use crate::process::Usage;
use crate::url::Url;

/// Slices that an explanation lists.
const SLICES_SHOWN: u32 = 16;

#[async_trait::async_trait]
impl Inspect for Engine {
    async fn explain(&self, url: &str) -> api::Explain {
        let Some(request) = self.plain_request(url) else {
            return api::Explain {
                url: url.into(),
                verdict: "pass".into(),
                reason: "not a URL".into(),
                ..Default::default()
            };
        };
        // Looking for it brings it into memory.
        let in_memory = self.inner.l1.record(request.key.0).is_some();
        let held = self.held(&request, None).await;
        let subject = match (&held, self.hash_key()) {
            (Some(held), _) => held.object.manifest.subject.clone(),
            (None, Some(key)) => request.url.untagged_subject(&key),
            (None, None) => Subject {
                host: 0,
                url: 0,
                prefixes: Vec::new(),
                tags: Vec::new(),
            },
        };
        let floor = self.floor(&subject);
        let leased = self.inner.cluster.may_serve();
        let (verdict, reason) = match held.as_ref().map(|h| h.verdict) {
            _ if self.hash_key().is_none() => ("pass", "the cluster has not formed yet".to_owned()),
            None if self.inner.uncacheable.has(&request) => {
                ("pass", "its last answer might not be shared".to_owned())
            }
            None => (
                "miss",
                "no manifest on this node, so that its tags are not known here".to_owned(),
            ),
            Some(_) if !leased => (
                "revalidate",
                "this node holds no lease: it asks the origin first".to_owned(),
            ),
            Some(Verdict::Unusable) => (
                "revalidate",
                match floor.plain
                    > held
                        .as_ref()
                        .map_or(floor.plain, |h| h.object.manifest.stamp)
                {
                    true => format!(
                        "purge {} of {} is newer than its stamp",
                        floor.plain,
                        self.purged_by(&subject, floor.plain)
                    ),
                    false => "its bytes are gone, or are not those that are wanted".to_owned(),
                },
            ),
            Some(Verdict::Use(Use::Fresh)) => (
                "hit",
                "fresh, and newer than every purge that covers it".to_owned(),
            ),
            Some(Verdict::Use(Use::Stale | Use::StaleWhileRevalidating)) => (
                "stale",
                "stale, may be used while it is validated".to_owned(),
            ),
            Some(Verdict::Use(Use::Validate)) => {
                ("revalidate", "stale, or purged softly".to_owned())
            }
        };
        let slices = match &held {
            Some(held) => self.explain_slices(&request, &held.object).await,
            None => Vec::new(),
        };
        let stored_in = if in_memory { "l1" } else { "l2" };
        api::Explain {
            url: request.url.to_string(),
            node_id: self.me().0,
            key: format!("{:032x}", request.key.0),
            verdict: verdict.into(),
            reason,
            sliced: request.sliced,
            owners: self.owners(request.key, 0).iter().map(|id| id.0).collect(),
            manifest: held.map(|h| explain_manifest(&h.object, stored_in)),
            floor: api::Floor {
                plain: floor.plain.0,
                soft: floor.soft.0,
                hard: floor.hard.0,
            },
            slices,
        }
    }

    async fn warm(&self, urls: Vec<String>) -> api::Warmed {
        let mut warmed = Vec::with_capacity(urls.len());
        for url in urls {
            warmed.push(self.warm_one(url).await);
        }
        api::Warmed { urls: warmed }
    }

    fn gauges(&self) -> Gauges {
        let cluster = &self.inner.cluster;
        let status = cluster.status();
        Gauges {
            memory: Some(*self.budget().sum()),
            memory_taken: self.budget().taken(),
            l1_bytes: self.l1_bytes(),
            l2: self.inner.l2.as_ref().map(|l2| l2.stats()),
            ring_epoch: status.ring_epoch,
            purge_index: status.purge_index,
            lease_valid: status.lease_valid,
            upstreams_up: self.origin().up(),
            nodes_up: status
                .nodes
                .iter()
                .map(|node| (node.member.id, node.up))
                .collect(),
            peer_faults: cluster
                .peers()
                .map_or_else(Vec::new, |peers| peers.counters().by_reason().to_vec()),
            links: cluster.peers().map_or_else(Vec::new, |peers| {
                let links = peers.links().into_iter();
                links.map(|link| (link.peer, link.mtu_bytes)).collect()
            }),
            process: Usage::now(),
        }
    }
}

impl Engine {
    /// What is held of a URL, and whether a plain request would be answered with
    /// it unasked: by the same verdict as the request itself. Asks nobody; what is read from
    /// disk comes into memory.
    pub(crate) async fn stored_stamp(&self, url: &str) -> Option<StoredStamp> {
        let request = self.plain_request(url)?;
        let held = self.held(&request, None).await?;
        let may_use = match held.verdict {
            Verdict::Use(Use::Fresh | Use::Stale | Use::StaleWhileRevalidating) => true,
            Verdict::Use(Use::Validate) | Verdict::Unusable => false,
        };
        Some(StoredStamp {
            stamp: held.object.manifest.stamp,
            usable: may_use && self.inner.cluster.may_serve(),
        })
    }

    /// A GET without any field, for `url` (`host/path?query` or with a scheme).
    fn plain_request(&self, url: &str) -> Option<Request> {
        let settings = self.inner.live.take();
        let url = settings.naming.object(Url::parse(url).ok()?);
        Some(Request {
            key: self.hash_key()?.object(&url.host, &url.target),
            origin: OriginRequest {
                host: url.host.clone(),
                target: url.target.clone(),
                headers: Vec::new(),
            }
            .into(),
            demands: Demands::default(),
            first_byte: 0,
            sliced: settings.is_sliced(&url),
            chance: rand::random(),
            url: url.into(),
            settings,
        })
    }

    /// What a floor was raised by: the widest that reaches it.
    fn purged_by(&self, subject: &Subject, floor: PurgeIndex) -> &'static str {
        let none = Subject {
            host: 0,
            url: 0,
            prefixes: Vec::new(),
            tags: Vec::new(),
        };
        let (host, url) = (subject.host, subject.url);
        let (prefixes, tags) = (subject.prefixes.clone(), subject.tags.clone());
        let parts = [
            ("everything", none.clone()),
            (
                "its host",
                Subject {
                    host,
                    ..none.clone()
                },
            ),
            (
                "a prefix of its path",
                Subject {
                    prefixes,
                    ..none.clone()
                },
            ),
            (
                "one of its tags",
                Subject {
                    tags,
                    ..none.clone()
                },
            ),
            ("its URL", Subject { url, ..none }),
        ];
        let raised = parts
            .iter()
            .find(|(_, part)| self.floor(part).plain >= floor);
        raised.map_or("nothing known", |(what, _)| *what)
    }

    async fn explain_slices(&self, request: &Request, object: &Arc<Stored>) -> Vec<api::Slice> {
        let manifest = &object.manifest;
        let count = manifest.slices().unwrap_or(0).min(u64::from(SLICES_SHOWN)) as u32;
        let mut slices = Vec::new();
        for index in 0..count {
            let id = SliceId {
                generation: manifest.generation,
                index,
            };
            let owners = self.owners(request.key, manifest.place(index));
            slices.push(api::Slice {
                index,
                owners: owners.iter().map(|id| id.0).collect(),
                stored_in: self.store_of(id).await.map(str::to_owned),
            });
        }
        slices
    }

    /// Which of this node's stores holds a slice.
    async fn store_of(&self, id: SliceId) -> Option<&'static str> {
        if self.inner.l1.has_slice(&id) {
            return Some("l1");
        }
        let l2 = self.inner.l2.as_ref()?;
        l2.holds(id).await.then_some("l2")
    }

    async fn warm_one(&self, url: String) -> api::WarmedUrl {
        let failed = |url: String, message: String| api::WarmedUrl {
            url,
            success: false,
            bytes: 0,
            message,
        };
        let Some(request) = self.plain_request(&url) else {
            return failed(url, "not a URL, or the cluster has not formed yet".into());
        };
        let found = match self.resolve(&request, None).await {
            Resolved::Object(found) => found,
            Resolved::Pass(why) => return failed(url, format!("not cacheable: {why}")),
            Resolved::Relay(relay) => {
                return failed(url, format!("not cacheable: status {}", relay.status));
            }
            Resolved::Failed { status, reason } => {
                return failed(url, format!("{status}: {}", reason.as_str()));
            }
        };
        let manifest = &found.object.manifest;
        let mut bytes = 0u64;
        for part in touched(
            0..manifest.length().unwrap_or(u64::MAX),
            manifest.version.slice_bytes,
        ) {
            let before = bytes;
            let mut rest = part;
            let mut damaged = false;
            loop {
                let mut reader = self.open(&request, &found.object, rest, None);
                let mut again = false;
                while let Some(next) = reader.next(Form::Pages).await {
                    match next {
                        Ok(read) => {
                            bytes += read.len() as u64;
                            rest.start += read.len() as u32;
                        }
                        Err(FillError::Damaged) if !damaged => {
                            if reader.is_stored() {
                                self.drop_damaged(found.slice_id(part.index));
                            }
                            (damaged, again) = (true, true);
                            break;
                        }
                        Err(error) => return failed(url, error.to_string()),
                    }
                }
                if !again && !reader.has_more() {
                    break;
                }
            }
            if bytes - before < u64::from(part.end - part.start) {
                break;
            }
        }
        let message = if found.resolution == Resolution::Hit {
            "hit"
        } else {
            "fetched"
        };
        api::WarmedUrl {
            url,
            success: true,
            bytes,
            message: message.into(),
        }
    }
}

fn explain_manifest(object: &Arc<Stored>, stored_in: &str) -> api::Manifest {
    let manifest = &object.manifest;
    let now_ms = unix_ms(SystemTime::now());
    let age = manifest.freshness.age(now_ms);
    api::Manifest {
        stored_in: stored_in.into(),
        status: manifest.status,
        generation: format!("{:032x}", manifest.generation.0),
        length: manifest.length(),
        slice_bytes: manifest.version.slice_bytes,
        slices: manifest.slices(),
        stamp: manifest.stamp.0,
        age_s: age,
        fresh_for_s: manifest.freshness.lifetime as i64 - age as i64,
        etag: manifest.version.etag.clone(),
        last_modified: manifest.version.last_modified.clone(),
        vary: manifest.varies_by(),
        tags: crate::freshness::tags(&crate::manifest::to_map(&manifest.headers)),
    }
}
