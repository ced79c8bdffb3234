//! What a running node takes from a configuration that is read again (SIGHUP),
//! and what waits for its next start.
//!
//! [`Config::take`] is the one place that tells the keys apart. [`Settings`] are
//! those that are taken, [`Live`] has the ones in force: a request takes them once
//! and goes on with them, whatever is read meanwhile; a body under way looks again. What is stored keeps the
//! lifetime that it was stored with. Not here: certificates (`certificates`), and
//! when to read again (`node`).

use std::sync::Arc;

use arc_swap::{ArcSwap, Guard};
use regex::Regex;

use super::{Config, Listen, PurgeConfig, Secret, StitchLog};
use crate::freshness::Policy;
use crate::url::{Naming, Url};

/// The certificates of `listen`, as a key: what is in their files counts too.
pub const LISTEN_TLS: &str = "listen.tls";

/// What takes effect at a reload.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Slices of one response in flight at most.
    pub max_concurrent_subrequests: usize,
    /// How often a failed origin request is tried again.
    pub max_retries: u32,
    /// Paths that are sliced; empty: all.
    pub slice_patterns: Vec<Regex>,
    /// `cache_ttl`, `default_freshness` and `caching`.
    pub policy: Policy,
    /// `caching.query`, with `upstream_host`, which is not reloaded.
    pub naming: Naming,
    /// Log of stitching faults.
    pub stitch_log: StitchLog,
    /// PURGE.
    pub purge: PurgeConfig,
    /// Bearer token of the admin API, where there is one.
    pub admin_token: Option<Secret>,
}

impl Settings {
    /// Those of a configuration.
    pub fn of(config: &Config) -> Settings {
        Settings {
            max_concurrent_subrequests: config.max_concurrent_subrequests,
            max_retries: config.max_retries,
            slice_patterns: config.slice_patterns.clone(),
            policy: Policy {
                default_freshness: config.default_freshness,
                cache_ttl: config.cache_ttl,
                caching: config.caching.clone(),
            },
            naming: Naming::new(
                config.upstream_host.as_deref(),
                config.caching.query.clone(),
            ),
            stitch_log: config.stitch_log,
            purge: config.purge.clone(),
            admin_token: config.admin.as_ref().map(|admin| admin.auth_token.clone()),
        }
    }

    /// Whether an object is fetched in slices.
    pub fn is_sliced(&self, url: &Url) -> bool {
        let patterns = &self.slice_patterns;
        patterns.is_empty() || patterns.iter().any(|pattern| pattern.is_match(url.path()))
    }
}

/// The settings in force; one for all parts of a node, cheap to clone.
#[derive(Clone, Debug)]
pub struct Live(Arc<ArcSwap<Settings>>);

impl Live {
    /// Begins with these.
    pub fn new(settings: Settings) -> Live {
        Live(Arc::new(ArcSwap::from_pointee(settings)))
    }

    /// For one look, not to be held.
    pub fn now(&self) -> Guard<Arc<Settings>> {
        self.0.load()
    }

    /// To go on with.
    pub fn take(&self) -> Arc<Settings> {
        self.0.load_full()
    }

    /// Goes on with these; requests under way keep their own.
    pub fn replace(&self, settings: Settings) {
        self.0.store(Arc::new(settings));
    }
}

/// The keys in which two configurations differ.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Those that take effect now.
    pub now: Vec<&'static str>,
    /// Those that take effect at the next start.
    pub at_start: Vec<&'static str>,
}

impl Config {
    /// Takes from `new` what a running node can take, and tells what that was and
    /// what else differs.
    pub fn take(&mut self, new: &Config) -> Changes {
        let mut changes = Changes::default();
        macro_rules! keys {
            (now: {$($now:literal: $taken:ident),* $(,)?},
             at_start: {$($at_start:literal: $left:ident),* $(,)?} $(,)?) => {
                // A field that is not named here does not compile.
                let Config {
                    $($taken: _,)* $($left: _,)*
                    listen: _, slice_patterns: _, l2: _, unused_l2_dir: _, admin: _, warnings: _, source: _,
                } = new;
                $(if self.$taken != new.$taken {
                    self.$taken = new.$taken.clone();
                    changes.now.push($now);
                })*
                $(if self.$left != new.$left {
                    changes.at_start.push($at_start);
                })*
            };
        }
        keys! {
            now: {
                "max_concurrent_subrequests": max_concurrent_subrequests,
                "max_retries": max_retries, "cache_ttl": cache_ttl,
                "default_freshness": default_freshness, "caching": caching,
                "stitch_log": stitch_log, "purge": purge,
            },
            at_start: {
                "upstream_address": upstreams, "upstream_host": upstream_host,
                "threads": threads, "slice_size": slice_bytes, "enable_cache": enable_cache,
                "l1_cache_size_bytes": l1_bytes_max, "memory_budget": memory,
                "max_object_size": max_object_bytes, "origin_probe": origin_probe,
                "metrics_endpoint": metrics_endpoint, "cluster": cluster,
                "origin_timeouts": origin_timeouts, "client_timeouts": client_timeouts,
                "drain_timeout": drain_timeout,
            },
        }
        // Those of which a part is taken, or whose values cannot be compared as they are.
        if texts(&self.slice_patterns) != texts(&new.slice_patterns) {
            self.slice_patterns = new.slice_patterns.clone();
            changes.now.push("slice_patterns");
        }
        let listen = with_files_of(&self.listen, &new.listen);
        if self.listen != listen {
            self.listen = listen;
            changes.now.push(LISTEN_TLS);
        }
        if self.listen != new.listen {
            changes.at_start.push("listen");
        }
        if let (Some(admin), Some(new)) = (&mut self.admin, &new.admin)
            && admin.auth_token != new.auth_token
        {
            admin.auth_token = new.auth_token.clone();
            changes.now.push("admin.auth_token");
        }
        if self.admin != new.admin {
            changes.at_start.push("admin");
        }
        match (&self.l2, &new.l2) {
            // The life goes with the section `cluster`.
            (Some(l2), Some(new)) => {
                if l2.dir != new.dir {
                    changes.at_start.push("l2_cache_dir");
                }
                if l2.bytes_max != new.bytes_max {
                    changes.at_start.push("l2_cache_size_bytes");
                }
            }
            (None, None) => {}
            _ => changes.at_start.push("enable_l2_cache"),
        }
        changes
    }
}

fn texts(patterns: &[Regex]) -> Vec<&str> {
    patterns.iter().map(Regex::as_str).collect()
}

/// The listeners that there are, with the certificates that `new` has for them.
fn with_files_of(listen: &[Listen], new: &[Listen]) -> Vec<Listen> {
    let renewed = |listen: &Listen| {
        let mut listen = listen.clone();
        let same = new.iter().find(|new| new.address == listen.address);
        if let (Some(files), Some(new)) = (&mut listen.tls, same.and_then(|new| new.tls.as_ref())) {
            *files = new.clone();
        }
        listen
    };
    listen.iter().map(renewed).collect()
}
