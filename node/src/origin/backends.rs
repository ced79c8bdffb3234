//! Where the origin is: the addresses behind `upstream_address`, which of them
//! can be connected to, and whose turn it is.
//!
//! Each address of a name is a backend of its own; names are looked up again
//! from time to time, and what was found is kept while that fails. Connections
//! are tried off the requests' path, where there is a choice or something is
//! down. What is down is asked last, and not refused: a try may be wrong.
//! Not here: what is said over a connection (`origin`).
//!
//! By hand and not by pingora-load-balancing: a request that cannot connect has to
//! say so at once, and what is down has to be asked still, last.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use futures::future::join_all;
use pingora_core::connectors::TransportConnector;
use pingora_core::upstreams::peer::{HttpPeer, Peer};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::{IDLE, OriginError};
use crate::config::{OriginTimeouts, Upstream};

/// Between two rounds of tries: a backend that dies is noticed by a request or
/// within this, one that is back within this.
const TRY_EVERY: Duration = Duration::from_secs(3);
/// How long what a name resolved to is used, while all of it is up.
const RESOLVED_FOR: Duration = Duration::from_secs(30);
/// Addresses of one name that are used: more would be tried one by one by a
/// request that finds them all dead.
pub const ADDRESSES_MAX: usize = 16;

/// Of those that are down so many are tried by one request: each may take the
/// whole time that a connection may.
pub const DOWN_TRIED_MAX: usize = 2;

/// One address of the origin.
#[derive(Debug)]
pub struct Backend {
    address: SocketAddr,
    peer: HttpPeer,
    down: AtomicBool,
}

impl Backend {
    /// How to connect to it.
    pub fn peer(&self) -> &HttpPeer {
        &self.peer
    }

    /// Whether a connection to one of `peers` is one to this backend.
    pub fn is_among(&self, peers: &[HttpPeer]) -> bool {
        let own = self.peer.reuse_hash();
        peers.iter().any(|peer| peer.reuse_hash() == own)
    }

    /// Whether it could not be connected to when that was last tried.
    pub fn is_down(&self) -> bool {
        self.down.load(Ordering::Relaxed)
    }
}

/// All of them.
pub struct Backends {
    names: Vec<Name>,
    next: AtomicUsize,
    timeouts: OriginTimeouts,
    connector: TransportConnector,
    went_down: Notify,
    one_looks_up: tokio::sync::Mutex<()>,
}

/// One entry of `upstream_address`.
struct Name {
    upstream: Upstream,
    resolved: Mutex<Resolved>,
}

#[derive(Default)]
struct Resolved {
    backends: Vec<Arc<Backend>>,
    /// The last look-up's end.
    at: Option<Instant>,
    /// Why it failed, where it did.
    error: Option<String>,
}

impl Name {
    fn resolved(&self) -> MutexGuard<'_, Resolved> {
        self.resolved.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Backends {
    /// Nothing is looked up yet.
    pub fn new(upstreams: Vec<Upstream>, timeouts: OriginTimeouts) -> Backends {
        let names = upstreams.into_iter().map(|upstream| Name {
            upstream,
            resolved: Mutex::default(),
        });
        Backends {
            names: names.collect(),
            next: AtomicUsize::new(0),
            timeouts,
            connector: TransportConnector::new(None),
            went_down: Notify::new(),
            one_looks_up: tokio::sync::Mutex::new(()),
        }
    }

    /// Backends in the order to try: in turn, those that are down last.
    ///
    /// # Errors
    /// No name resolves; else there is at least one.
    pub async fn in_turn(&self) -> Result<Vec<Arc<Backend>>, OriginError> {
        let mut backends = self.all();
        if backends.is_empty() {
            self.look_up(Instant::now()).await;
            backends = self.all();
        }
        if backends.is_empty() {
            let why = self.names.iter().find_map(|n| n.resolved().error.clone());
            let why = why.unwrap_or_else(|| "no upstream".into());
            return Err(OriginError::Unreachable(why));
        }
        let first = self.next.fetch_add(1, Ordering::Relaxed) % backends.len();
        backends.rotate_left(first);
        // Asked once each: it may change meanwhile, and an order must not.
        backends.sort_by_cached_key(|backend| backend.is_down());
        Ok(backends)
    }

    /// A request could not connect to `peer`.
    pub fn mark_down(&self, peer: &HttpPeer) {
        let peer = std::slice::from_ref(peer);
        for backend in self.all().iter().filter(|b| b.is_among(peer)) {
            self.tried(backend, false);
        }
    }

    /// All that are known.
    pub fn all(&self) -> Vec<Arc<Backend>> {
        let all = self.names.iter().map(|n| n.resolved().backends.clone());
        all.flatten().collect()
    }

    /// Addresses, and whether they can be connected to as far as is known.
    pub fn up(&self) -> Vec<(SocketAddr, bool)> {
        let backends = self.all();
        let up = backends.iter().map(|b| (b.address, !b.is_down()));
        up.collect()
    }

    /// Looks names up and tries connections until `stop`.
    pub async fn watch_until(&self, stop: CancellationToken) {
        // Each in a loop of its own: a resolver that hangs delays no try.
        let looking_up = async {
            loop {
                self.look_up(Instant::now()).await;
                let has_failed = self.names.iter().any(|n| n.resolved().error.is_some());
                let wait = if has_failed { TRY_EVERY } else { RESOLVED_FOR };
                // What is down may have been replaced, at another address.
                let _ = tokio::time::timeout(wait, self.went_down.notified()).await;
            }
        };
        let trying = async {
            loop {
                tokio::time::sleep(TRY_EVERY).await;
                self.try_connections().await;
                if self.up().iter().any(|(_, up)| !up) {
                    self.went_down.notify_one();
                }
            }
        };
        let both = async { tokio::join!(looking_up, trying) };
        stop.run_until_cancelled(both).await;
    }

    /// Looks all names up, unless that was done after `asked`.
    async fn look_up(&self, asked: Instant) {
        let _one_at_a_time = self.one_looks_up.lock().await;
        let due = |name: &&Name| name.resolved().at.is_none_or(|at| at < asked);
        let due = self.names.iter().filter(due).map(async |name| {
            let host = name.upstream.host.trim_matches(['[', ']']);
            let found = tokio::net::lookup_host((host, name.upstream.port)).await;
            self.found(name, found.map(Iterator::collect));
        });
        join_all(due).await;
    }

    /// Takes a look-up's result over. What was known stays as it is: up or down,
    /// and altogether where the look-up failed.
    fn found(&self, name: &Name, found: std::io::Result<Vec<SocketAddr>>) {
        let host = &name.upstream.host;
        let mut resolved = name.resolved();
        resolved.at = Some(Instant::now());
        let mut addresses = match found {
            Ok(addresses) if !addresses.is_empty() => addresses,
            found => {
                let why = found.map_or_else(|e| e.to_string(), |_| "no address".into());
                if resolved.error.is_none() {
                    tracing::warn!(host, why, "origin's name cannot be looked up");
                }
                resolved.error = Some(format!("{host}: {why}"));
                return;
            }
        };
        resolved.error = None;
        // Names have IPv6 addresses where the machine that asks has none.
        if addresses.iter().any(has_route) {
            addresses.retain(has_route);
        }
        addresses.sort();
        addresses.dedup();
        addresses.truncate(ADDRESSES_MAX);
        let backends = addresses.into_iter().map(|address| {
            let mut known = resolved.backends.iter().filter(|b| b.address == address);
            match known.next() {
                Some(backend) => backend.clone(),
                None => self.backend(&name.upstream, address),
            }
        });
        resolved.backends = backends.collect();
    }

    fn backend(&self, upstream: &Upstream, address: SocketAddr) -> Arc<Backend> {
        let mut peer = HttpPeer::new(address, upstream.tls, upstream.host.clone());
        peer.options.connection_timeout = Some(self.timeouts.connect);
        peer.options.total_connection_timeout = Some(self.timeouts.connect);
        peer.options.read_timeout = Some(self.timeouts.read);
        peer.options.write_timeout = Some(self.timeouts.read);
        peer.options.idle_timeout = Some(IDLE);
        Arc::new(Backend {
            address,
            peer,
            down: AtomicBool::new(false),
        })
    }

    /// Connects as a request would, TLS included, and sends nothing. A lone
    /// backend that is up is left in peace: there is no choice to make.
    async fn try_connections(&self) {
        let backends = self.all();
        let has_choice = backends.len() > 1;
        let tried = backends.iter().filter(|b| has_choice || b.is_down());
        join_all(tried.map(async |backend| {
            let stream = self.connector.new_stream(&backend.peer).await;
            self.tried(backend, stream.is_ok());
        }))
        .await;
    }

    /// Notes how a try to connect ended, by a request or off its path.
    fn tried(&self, backend: &Backend, connected: bool) {
        let was_down = backend.down.swap(!connected, Ordering::Relaxed);
        let address = backend.address;
        match (was_down, connected) {
            (false, false) => {
                tracing::warn!(%address, "origin cannot be connected to: asked last");
                self.went_down.notify_one();
            }
            (true, true) => tracing::info!(%address, "origin can be connected to again"),
            _ => {}
        }
    }
}

/// Whether this machine has a way to an address; nothing is sent.
fn has_route(address: &SocketAddr) -> bool {
    let any: IpAddr = match address {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    UdpSocket::bind((any, 0)).is_ok_and(|socket| socket.connect(address).is_ok())
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    fn backends(hosts: &[&str]) -> Backends {
        let upstreams = hosts.iter().map(|host| Upstream {
            host: (*host).into(),
            port: 80,
            tls: false,
        });
        let second = Duration::from_secs(1);
        let timeouts = OriginTimeouts {
            connect: second,
            read: second,
            total_header: second,
            total: second,
        };
        Backends::new(upstreams.collect(), timeouts)
    }

    async fn firsts(backends: &Backends) -> Vec<SocketAddr> {
        let mut firsts = Vec::new();
        for _ in 0..4 {
            firsts.push(backends.in_turn().await.unwrap()[0].address);
        }
        firsts.sort();
        firsts.dedup();
        firsts
    }

    #[tokio::test]
    async fn what_is_down_is_asked_last_until_it_can_be_connected_to() {
        let listen = || TcpListener::bind("127.0.0.1:0").unwrap();
        let (stays, dies) = (listen(), listen());
        let address = |listener: &TcpListener| listener.local_addr().unwrap();
        let (stays_at, dies_at) = (address(&stays), address(&dies));
        let backends = backends(&["origin"]);
        backends.found(&backends.names[0], Ok(vec![stays_at, dies_at]));
        backends.try_connections().await;
        assert_eq!(firsts(&backends).await.len(), 2);

        drop(dies);
        backends.try_connections().await;
        assert_eq!(firsts(&backends).await, [stays_at]);
        assert_eq!(backends.in_turn().await.unwrap()[1].address, dies_at);
        let _back = TcpListener::bind(dies_at).unwrap();
        assert_eq!(firsts(&backends).await, [stays_at], "nobody has tried");
        backends.try_connections().await;
        assert_eq!(firsts(&backends).await.len(), 2);

        // A request says so, too, and all being down refuses nothing.
        for backend in backends.all() {
            backends.mark_down(backend.peer());
        }
        assert_eq!(firsts(&backends).await.len(), 2);
        assert!(backends.up().iter().all(|(_, up)| !up));
    }

    #[tokio::test]
    async fn a_name_is_all_its_addresses_and_keeps_them_while_it_cannot_be_looked_up() {
        let backends = backends(&["origin"]);
        let name = &backends.names[0];
        let at = |n: u8| SocketAddr::from(([127, 0, 0, n], 80));
        let known = || backends.up();
        backends.found(name, Ok(vec![at(2), at(1)]));
        assert_eq!(known(), [(at(1), true), (at(2), true)]);
        backends.mark_down(backends.all()[1].peer());
        backends.found(name, Err(std::io::Error::other("resolver down")));
        backends.found(name, Ok(vec![]));
        assert_eq!(known(), [(at(1), true), (at(2), false)]);
        backends.found(name, Ok(vec![at(3), at(2)]));
        assert_eq!(known(), [(at(2), false), (at(3), true)]);
    }

    #[tokio::test]
    async fn a_name_without_an_address_is_an_error_that_says_why() {
        let backends = backends(&["no-such-name.invalid"]);
        let error = backends.in_turn().await.unwrap_err().to_string();
        assert!(error.contains("no-such-name.invalid"), "{error}");
    }
}
