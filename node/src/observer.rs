//! Checks in production whether the promise of PURGE holds: after a purge was
//! answered, the node that answered it asks every other that is up what it
//! would do now with a request for it. Nobody should ever be found who would
//! answer with older bytes; `stale_after_ack_total` counts, an alert watches it.
//!
//! One purge at a time, [`PACE`] apart, and what comes faster is not looked at:
//! an observation costs each node a look at one table and one manifest. Not
//! here: the promise (`docs/PURGE.md`), the question (the cluster's `observe`).

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use pingora_slice_cluster::handle::{Observation, StoredStamp};
use pingora_slice_cluster::peer::{Body, SliceSource};
use pingora_slice_cluster::purge::PurgeItem;
use pingora_slice_cluster::wire::{Answer, Ask};
use pingora_slice_cluster::{Cluster, NodeId, PurgeIndex};
use tokio::sync::{Mutex, mpsc};

use crate::engine::Engine;
use crate::metrics::Metrics;

/// Between the beginnings of two observations.
const PACE: Duration = Duration::from_millis(100);
/// Answered purges that wait to be looked at: under a burst, its first ones.
const WAITING_MAX: usize = 8;

/// A purge whose promise holds.
#[derive(Clone, Debug)]
pub struct Settled {
    /// The first thing that it named.
    pub item: PurgeItem,
    /// The same, `host/path?query`, where it is a URL.
    pub url: Option<String>,
    /// Its position in the log.
    pub index: PurgeIndex,
}

/// See the module's text.
pub struct Observer {
    cluster: Cluster,
    metrics: Arc<Metrics>,
    tell: mpsc::Sender<Settled>,
    told: Mutex<mpsc::Receiver<Settled>>,
}

impl Observer {
    /// One per node; [`Observer::run`] does the looking.
    pub fn new(cluster: Cluster, metrics: Arc<Metrics>) -> Observer {
        let (tell, told) = mpsc::channel(WAITING_MAX);
        Observer {
            cluster,
            metrics,
            tell,
            told: Mutex::new(told),
        }
    }

    /// A purge was answered; never waits.
    pub fn settled(&self, purge: Settled) {
        // Full: there is enough to look at.
        let _ = self.tell.try_send(purge);
    }

    /// Observes for as long as it is polled.
    pub async fn run(&self) {
        let mut told = self.told.lock().await;
        let mut pace = tokio::time::interval(PACE);
        pace.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        while let Some(purge) = told.recv().await {
            pace.tick().await;
            let seen = self.cluster.observe(purge.item, purge.url.clone()).await;
            for (node, observation) in seen {
                // Whoever does not answer was cut off meanwhile.
                if let Some(observation) = observation {
                    self.judge(node, &purge, &observation);
                }
            }
        }
    }

    fn judge(&self, node: NodeId, purge: &Settled, observation: &Observation) {
        self.metrics.observations_total.inc();
        if observation.is_stale(purge.index, purge.item.mode) {
            self.metrics.stale_after_ack_total.inc();
            tracing::error!(
                %node, index = purge.index.0, url = purge.url, ?observation,
                "this node would answer with bytes from before a purge that was answered"
            );
        }
    }
}

/// The engine as peers see it, and what it holds of a URL for their observers.
pub struct Watched(pub Engine);

#[async_trait::async_trait]
impl SliceSource for Watched {
    async fn answer(&self, from: NodeId, ask: Ask) -> (Answer, Option<Body>) {
        self.0.answer(from, ask).await
    }

    fn metrics_text(&self) -> Bytes {
        SliceSource::metrics_text(&self.0)
    }

    async fn stored_stamp(&self, url: &str) -> Option<StoredStamp> {
        self.0.stored_stamp(url).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admin::Inspect;
    use crate::config::Config;
    use crate::metrics::Gauges;
    use crate::origin::Origin;
    use pingora_slice_cluster::purge::{Floor, PurgeMode, Scope};
    use std::path::Path;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    /// Deliberately broken answers are counted, all others are not.
    #[tokio::test]
    async fn a_broken_promise_is_counted() {
        let metrics = Arc::new(Metrics::new());
        let observer = Observer::new(Cluster::alone(None).unwrap(), metrics.clone());
        let raised = Floor {
            plain: PurgeIndex(7),
            soft: PurgeIndex(7),
            hard: PurgeIndex(0),
        };
        let good = Observation {
            leased: true,
            floor: raised,
            stored: Some(StoredStamp {
                stamp: PurgeIndex(7),
                usable: true,
            }),
        };
        let old = |usable| {
            Some(StoredStamp {
                stamp: PurgeIndex(6),
                usable,
            })
        };
        let (fenced, lower) = (false, Floor::default());
        let cases = [
            (good, false),
            (
                Observation {
                    stored: None,
                    ..good
                },
                false,
            ),
            (
                Observation {
                    stored: old(false),
                    ..good
                },
                false,
            ),
            (
                Observation {
                    stored: old(true),
                    ..good
                },
                true,
            ),
            (
                Observation {
                    floor: lower,
                    ..good
                },
                true,
            ),
            (
                Observation {
                    leased: fenced,
                    stored: old(true),
                    floor: lower,
                },
                false,
            ),
        ];
        let purge = Settled {
            item: PurgeItem {
                scope: Scope::Url(1),
                mode: PurgeMode::Plain,
            },
            url: Some("h/x".to_owned()),
            index: PurgeIndex(7),
        };
        let mut broken = 0;
        for (observation, stale) in cases {
            observer.judge(NodeId(2), &purge, &observation);
            broken += u64::from(stale);
            assert_eq!(
                metrics.stale_after_ack_total.get(),
                broken,
                "{observation:?}"
            );
        }
        let text = metrics.render(&Gauges::default());
        assert!(text.contains("\npingora_slice_stale_after_ack_total 2\n"));
        assert!(text.contains("\npingora_slice_observations_total 6\n"));
        // Of a soft purge only the soft floor is promised; of a hard one, its own.
        let usable = Observation {
            stored: old(true),
            ..good
        };
        assert!(!usable.is_stale(PurgeIndex(7), PurgeMode::Soft));
        assert!(good.is_stale(PurgeIndex(7), PurgeMode::Hard));
    }

    /// A node that really holds what a purge covers is seen; one that has obeyed is not.
    #[tokio::test]
    async fn what_is_really_held_is_seen() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let yaml = format!(
            "listen: 127.0.0.1:1\nupstream_address: {}\nenable_l2_cache: false\n",
            listener.local_addr().unwrap()
        );
        let origin = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = Vec::new();
            while !request.ends_with(b"\r\n\r\n") {
                assert!(stream.read_buf(&mut request).await.unwrap() > 0);
            }
            let answer =
                "HTTP/1.1 200 OK\r\nContent-Length: 4\r\nCache-Control: max-age=600\r\n\r\nfilm";
            stream.write_all(answer.as_bytes()).await.unwrap();
        });
        let config = Config::parse(&yaml, Path::new("/")).unwrap();
        let metrics = Arc::new(Metrics::new());
        let cluster = Cluster::alone(None).unwrap();
        let upstreams = config.upstreams.clone();
        let timeouts = config.origin_timeouts;
        let engine = Engine::new(
            config,
            cluster.clone(),
            Origin::new(upstreams, None, timeouts, metrics.clone()),
            None,
            metrics.clone(),
            tokio::runtime::Handle::current(),
        );
        let warmed = engine.warm(vec!["h/x".to_owned()]).await;
        assert!(warmed.urls[0].success, "{warmed:?}");
        origin.await.unwrap();

        let observer = Observer::new(cluster.clone(), metrics.clone());
        let node = Watched(engine);
        let held = node.stored_stamp("h/x").await.expect("it was stored");
        let item = PurgeItem {
            scope: Scope::All,
            mode: PurgeMode::Plain,
        };
        let observe = async |index, floor| {
            let observation = Observation {
                leased: true,
                floor: Floor {
                    plain: floor,
                    soft: floor,
                    hard: PurgeIndex(0),
                },
                stored: node.stored_stamp("h/x").await,
            };
            let url = Some("h/x".to_owned());
            observer.judge(NodeId(2), &Settled { item, url, index }, &observation);
            metrics.stale_after_ack_total.get()
        };
        // Its floor has risen, and it would answer with the old bytes all the same.
        let next = PurgeIndex(held.stamp.0 + 1);
        assert_eq!(observe(next, next).await, 1);
        let purged = cluster.purge(vec![item], 1).await.unwrap();
        assert_eq!(observe(purged.index, purged.index).await, 1);
    }
}
