//! The QUIC endpoints between nodes: identity, dialling, serving.
//!
//! Each node has two, on neighbouring UDP ports: *slices* (manifests and
//! bodies, frames in [`crate::wire`]) and *control* (Raft, leases). Control
//! has its own thread, so that bulk data cannot delay it, and its own frames:
//!
//! ```text
//! asker:  [version u8][length u32][request]          then finishes its side
//! peer:   [version u8][length u32][0 u8][response]   or [1 u8][refusal, UTF-8]
//! ```
//!
//! Promises: nobody without a certificate of the cluster's authority gets a
//! byte; nobody who is not a member gets a slice, or room for more than a
//! greeting; a dialled node is the one
//! that was meant; a body is complete or seen to be broken, and each part has its
//! checksum; what is
//! not a frame closes its stream with a [`CloseCode`] and does nothing else;
//! a peer that has vanished costs two callers their deadline, or a third whose
//! request crossed its last packet, and then nobody.
//! Not here: what is asked and answered ([`PeerHandler`]), whom to ask.

pub mod dial;
mod frames;
mod identity;
pub mod serve;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt;
use futures::future::{BoxFuture, WeakShared};
use futures::stream::BoxStream;
use quinn::{
    Endpoint, EndpointConfig, IdleTimeout, MtuDiscoveryConfig, TokioRuntime, TransportConfig,
};
use quinn_proto::RandomConnectionIdGenerator;
use serde::{Serialize, de::DeserializeOwned};
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use self::dial::{Dialler, Place};
use self::identity::Identity;
pub use self::identity::certificate_expires;
use self::serve::{Protocol, Server};
use crate::handle::StartError;
use crate::handle::StoredStamp;
use crate::wire::{
    self, ALPN_CONTROL, ALPN_SLICES, Answer, Ask, FrameError, HEAD_BYTES_MAX, OriginRequest, Part,
    ResolveAsk,
};
use crate::{NodeId, ObjectKey};

pub use self::frames::CloseCode;
pub use self::identity::{NODE_NAME_PREFIX, NODE_NAME_SUFFIX, SERVER_NAME};

/// Longest request or response on the control endpoint: a piece of a snapshot
/// (3 MiB) or a batch of log entries, several times over.
pub const CONTROL_BYTES_MAX: usize = 16 * 1024 * 1024;
/// The same from those who are not members: a greeting, many times over.
pub const GREETING_BYTES_MAX: usize = 64 * 1024;

/// An asker that takes nothing for this long loses the body.
const BODY_WRITE_TIMEOUT: Duration = Duration::from_secs(60);

/// Connections to one peer's slice endpoint for slices, and as many for all else: each
/// uses one core at most.
const SLICE_CONNECTIONS: usize = 4;
/// Streams on one of them: 64 were measured to wait for one another, 16 not.
const SLICE_STREAMS: usize = 16;
/// Connections to one peer's control endpoint.
const CONTROL_CONNECTIONS: usize = 1;
/// Streams on it for what the peer may take long to answer, purges above all.
pub(crate) const CONTROL_STREAMS: usize = 64;
/// Streams that a peer may have open on one connection to us: twice what our
/// own diallers have seats for, as a stream's end takes a round trip to be
/// known, and as some go past the seats.
const STREAMS_ACCEPTED: u32 = 128;
const _: () = assert!(STREAMS_ACCEPTED as usize >= 2 * CONTROL_STREAMS);
// And one ping.
const _: () = assert!(STREAMS_ACCEPTED as usize > 2 * SLICE_STREAMS);

/// Longest wait between two attempts to reach a peer's slice endpoint.
const SLICE_BACKOFF_MAX: Duration = Duration::from_secs(5);
/// The same for control, on which elections and leases wait.
const CONTROL_BACKOFF_MAX: Duration = Duration::from_millis(250);
/// A path's round trip until it is measured: what is lost of a handshake is
/// sent again after thrice this, and then after twice as long each time. QUIC's
/// 333 ms leave room for one such try before the handshake is given up.
const FIRST_ROUND_TRIP: Duration = Duration::from_millis(50);

/// What a connection takes in before it is read, bytes.
#[derive(Clone, Copy)]
struct Windows {
    stream: u32,
    connection: u32,
}
/// For what is read at a client's pace, and memory is set aside for nowhere else: a
/// stream has 25 MiB/s over 10 ms, a connection twice what its streams can hold. Readers
/// that stand still must not use it up, or the other streams stand still too; and quinn
/// renews it in steps of an eighth only.
const WINDOWS: Windows = Windows {
    stream: 256 * 1024,
    connection: 8 * 1024 * 1024,
};
const _: () = assert!(2 * SLICE_STREAMS as u32 * WINDOWS.stream <= WINDOWS.connection);
/// For slices: whoever asks for one has memory for all of it and reads it as it comes,
/// whoever answers keeps its memory until it has arrived. So what is under way needs no
/// other bound, and none that a slice of a MiB stops at, or that has to be renewed for it:
/// each time wakes both sides.
const SLICE_WINDOWS: Windows = Windows {
    stream: 16 * 1024 * 1024,
    connection: 64 * 1024 * 1024,
};
/// What a connection may send before it is acknowledged, bytes.
const SEND_WINDOW_BYTES: u32 = WINDOWS.connection;
/// Largest UDP payload that is probed for. 6550 is the last one of which ten
/// fit into one GSO write; beyond, quinn loses them all.
const PAYLOAD_BYTES_MAX: u16 = 6500;
/// The same for control: its messages are small, and so stay its buffers.
const CONTROL_PAYLOAD_BYTES_MAX: u16 = 1452;
/// Asked of the kernel for each socket, which may give less.
const SOCKET_BUFFER_BYTES: usize = 4 * 1024 * 1024;
/// A connection from which nothing has come for this long is gone, and with it the
/// bodies on it.
const IDLE_TIMEOUT: Duration = Duration::from_secs(10);
/// A connection with nothing to say says so this often.
const KEEP_ALIVE: Duration = Duration::from_secs(2);
/// What [`Peers::stop`] waits for, at most.
const STOP_TIMEOUT: Duration = Duration::from_secs(1);

/// The body of an answer: parts as they land. An error, or dropping the
/// stream before its end, makes the asker see a broken body, never a short one.
pub type Body = BoxStream<'static, Result<Part, BodyBroken>>;

/// A body that could not be completed.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[error("body broken off: {0}")]
pub struct BodyBroken(pub String);

/// Where this node's certificate and key are (PEM).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// The cluster's own certificate authority.
    pub ca: PathBuf,
    /// This node's certificate.
    pub cert: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

/// Why a peer gave no answer. Everything here means: try the next source.
#[derive(Debug, thiserror::Error)]
pub enum PeerError {
    /// No connection, or it broke; `backing off` counts too.
    #[error("node {peer} cannot be reached: {reason}")]
    Unreachable {
        /// Whom.
        peer: NodeId,
        /// Why.
        reason: String,
    },
    /// It did not answer in time.
    #[error("node {peer} did not answer in time")]
    TimedOut {
        /// Who.
        peer: NodeId,
    },
    /// It refused, or spoke something that is not our protocol.
    #[error("node {peer} refused: {reason}")]
    Refused {
        /// Who.
        peer: NodeId,
        /// Why.
        reason: String,
    },
}

/// What answers peers: the daemon's engine. It exists so that `cluster` need
/// not know `node`.
#[async_trait::async_trait]
pub trait SliceSource: Send + Sync + 'static {
    /// Answers `ask` of member `from`: from what is stored or from the origin,
    /// never from a third node (invariant 3).
    async fn answer(&self, from: NodeId, ask: Ask) -> (Answer, Option<Body>);
    /// This node's metrics in the Prometheus text format, for `/metrics/cluster`.
    fn metrics_text(&self) -> Bytes;
    /// What is stored of a URL (`host/path?query`), for the observer of
    /// answered purges. Looks, and changes nothing.
    async fn stored_stamp(&self, _url: &str) -> Option<StoredStamp> {
        None
    }
}

/// What the endpoints do with the requests that arrive.
#[async_trait::async_trait]
pub trait PeerHandler: Send + Sync + 'static {
    /// Whether `from` (the number in its certificate) is a member now; checked
    /// on every slice request.
    fn is_member(&self, from: NodeId) -> bool;
    /// Whether `from` may send more than a greeting on the control endpoint:
    /// besides members those from whom the log itself is to come.
    fn may_control(&self, from: NodeId) -> bool {
        self.is_member(from)
    }
    /// Answers a member on the slice endpoint. The future is dropped when the
    /// asker has gone away.
    async fn slices(&self, from: NodeId, ask: Ask) -> (Answer, Option<Body>);
    /// Answers on the control endpoint: bincode (standard configuration) in
    /// and out, without prefix. Whom [`PeerHandler::may_control`] denies
    /// reaches it too, with [`GREETING_BYTES_MAX`] at most: what it may say is
    /// decided here. An error is sent as a refusal. Runs on the control
    /// thread and must not block it.
    async fn control(&self, from: NodeId, request: Bytes) -> Result<Vec<u8>, String>;
}

/// What arrived and was not answered, since the start.
#[derive(Debug, Default)]
pub struct Counters {
    /// Connections that did not come to be: no certificate, another authority, another protocol.
    pub handshakes_failed: AtomicU64,
    /// Slice requests of nodes that are not members.
    pub not_members: AtomicU64,
    /// Streams that held something other than one frame: garbage, too long,
    /// another version, too slow.
    pub bad_frames: AtomicU64,
    /// Requests refused because too many were under way.
    pub busy: AtomicU64,
    /// Bodies that broke off at their source while they were sent.
    pub bodies_broken: AtomicU64,
}

impl Counters {
    /// Each by the name that operators know it by.
    pub fn by_reason(&self) -> [(&'static str, u64); 5] {
        [
            ("handshake", &self.handshakes_failed),
            ("not-member", &self.not_members),
            ("bad-frame", &self.bad_frames),
            ("busy", &self.busy),
            ("body-broken", &self.bodies_broken),
        ]
        .map(|(reason, counter)| (reason, counter.load(Ordering::Relaxed)))
    }

    fn count(counter: &AtomicU64) {
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

/// A connection between slice endpoints, for the metrics.
#[derive(Clone, Copy, Debug)]
pub struct Link {
    /// Whom to.
    pub peer: NodeId,
    /// Whether the peer has made it, and so reads what this node sends.
    pub accepted: bool,
    /// Largest UDP payload known to pass, bytes. Worry when it stays at 1200.
    pub mtu_bytes: u16,
    /// Round trip.
    pub rtt: Duration,
    /// Packets lost since the connection was made.
    pub packets_lost: u64,
    /// Datagrams sent since then.
    pub datagrams_sent: u64,
    /// System calls that sent them. Worry when they are as many on an accepted
    /// link that is busy: without segmentation offload, sending bodies costs
    /// two to three times the CPU.
    pub sends: u64,
}

impl Link {
    fn of(peer: NodeId, accepted: bool, connection: &quinn::Connection) -> Link {
        let stats = connection.stats();
        Link {
            peer,
            accepted,
            mtu_bytes: stats.path.current_mtu,
            rtt: stats.path.rtt,
            packets_lost: stats.path.lost_packets,
            datagrams_sent: stats.udp_tx.datagrams,
            sends: stats.udp_tx.ios,
        }
    }
}

/// The two endpoints of this node. Cheap to clone; the last clone to go closes them.
#[derive(Clone)]
pub struct Peers {
    inner: Arc<Inner>,
}

struct Inner {
    slices: Arc<Dialler>,
    control: Arc<Dialler>,
    slice_server: Arc<Server>,
    /// One for each peer at most: many may wait for the same one.
    pings: Mutex<HashMap<NodeId, WeakShared<Ping>>>,
    counters: Arc<Counters>,
    tasks: TaskTracker,
    /// Ends the control thread.
    control_end: CancellationToken,
}

/// Whether a peer has answered.
type Ping = BoxFuture<'static, bool>;

impl Drop for Inner {
    fn drop(&mut self) {
        self.slices.close();
        self.control.close();
        self.control_end.cancel();
    }
}

impl Peers {
    /// Binds slices to `listen` and control traffic to the next port. Must be
    /// called within a tokio runtime, which then drives the slice endpoint.
    ///
    /// # Errors
    /// [`StartError::Config`]: files, certificates, addresses, with a remedy.
    pub fn bind(
        listen: SocketAddr,
        me: NodeId,
        tls: &TlsFiles,
        handler: Arc<dyn PeerHandler>,
    ) -> Result<Peers, StartError> {
        let identity = Identity::load(me, tls)?;
        let mut control_listen = listen;
        control_listen.set_port(listen.port().checked_add(1).ok_or_else(|| {
            StartError::Config(format!(
                "cluster.listen: {listen}: control traffic needs the next port; choose a lower one"
            ))
        })?);

        let control_end = CancellationToken::new();
        let control_runtime = control_thread(control_end.clone())?;
        // Ends the thread if anything below fails.
        let thread_guard = control_end.clone().drop_guard();
        let slice_runtime = Handle::current();
        let slice_endpoint = endpoint(listen, &identity, ALPN_SLICES, PAYLOAD_BYTES_MAX)?;
        let mut for_slices = identity.client_config(ALPN_SLICES)?;
        for_slices.transport_config(transport(PAYLOAD_BYTES_MAX, SLICE_WINDOWS, 0)?);
        let control_endpoint = {
            let _driven_by = control_runtime.enter();
            endpoint(
                control_listen,
                &identity,
                ALPN_CONTROL,
                CONTROL_PAYLOAD_BYTES_MAX,
            )?
        };

        let tasks = TaskTracker::new();
        let slices = Arc::new(Dialler::new(
            slice_endpoint.clone(),
            slice_runtime.clone(),
            tasks.clone(),
            dial::Limits {
                carries: "slices",
                port_offset: 0,
                connections: SLICE_CONNECTIONS,
                streams: SLICE_STREAMS,
                backoff_max: SLICE_BACKOFF_MAX,
                for_slices: Some(for_slices),
            },
        ));
        let control = Arc::new(Dialler::new(
            control_endpoint.clone(),
            control_runtime.clone(),
            tasks.clone(),
            dial::Limits {
                carries: "control",
                port_offset: 1,
                connections: CONTROL_CONNECTIONS,
                streams: CONTROL_STREAMS,
                backoff_max: CONTROL_BACKOFF_MAX,
                for_slices: None,
            },
        ));

        let counters = Arc::new(Counters::default());
        let serve = |protocol, endpoint, runtime: &Handle| {
            let diallers = [slices.clone(), control.clone()];
            let heard = move |peer| diallers.iter().for_each(|dialler| dialler.heard(peer));
            let (handler, counters) = (handler.clone(), counters.clone());
            let server = Server::new(protocol, handler, counters, tasks.clone(), Box::new(heard));
            tasks.spawn_on(server.clone().run(endpoint), runtime);
            server
        };
        let slice_server = serve(Protocol::Slices, slice_endpoint, &slice_runtime);
        serve(Protocol::Control, control_endpoint, &control_runtime);
        let control_end = thread_guard.disarm();
        let inner = Inner {
            slices,
            control,
            slice_server,
            pings: Mutex::default(),
            counters,
            tasks,
            control_end,
        };
        Ok(Peers {
            inner: Arc::new(inner),
        })
    }

    /// Where `peer` is reached from now on: `host:port` of its slice endpoint.
    pub fn set_address(&self, peer: NodeId, advertise: &str) {
        self.inner.slices.set_address(peer, advertise);
        self.inner.control.set_address(peer, advertise);
    }

    /// Drops the address and the connections of `peer`.
    pub fn forget(&self, peer: NodeId) {
        self.inner.slices.forget(peer);
        self.inner.control.forget(peer);
        dial::lock(&self.inner.pings).remove(&peer);
    }

    /// Asks a peer on the slice endpoint; `deadline` ends with the head of the
    /// answer, the parts of a body have their own. A slice is to be read as it comes,
    /// into memory that is there for all of it, and each part checked when it is used:
    /// not here, too, as it may lie for long before that.
    ///
    /// # Errors
    /// [`PeerError`]: at once while the peer is backing off.
    pub async fn ask(
        &self,
        peer: NodeId,
        ask: &Ask,
        deadline: Duration,
    ) -> Result<(Answer, Option<Body>), PeerError> {
        let frame = wire::encode(ask).map_err(|e| refused(peer, e))?;
        let place = match ask {
            Ask::Slice(_) => Place::SliceSeat,
            _ => Place::Seat,
        };
        let reply = self
            .inner
            .slices
            .exchange(peer, place, frame.into(), HEAD_BYTES_MAX, deadline)
            .await?;
        let answer: Answer = wire::decode(&reply.head).map_err(|e| refused(peer, e))?;
        let body = frames::has_body(&answer).then(|| reply.into_body());
        let body = match answer {
            Answer::Relay { .. } => body.map(frames::checked),
            _ => body,
        };
        Ok((answer, body))
    }

    /// Whether a peer answers the cheapest of questions on the slice endpoint in
    /// time, even with no. Those who ask this may be waiting for slower answers on
    /// all of its seats, and would take a living peer for dead if the question
    /// needed one.
    pub async fn is_alive(&self, peer: NodeId, within: Duration) -> bool {
        let ping = {
            let mut pings = dial::lock(&self.inner.pings);
            let under_way = pings.get(&peer).and_then(WeakShared::upgrade);
            // One that has ended tells what used to be so.
            match under_way.filter(|ping| ping.peek().is_none()) {
                Some(ping) => ping,
                None => {
                    let ping = ping(self.inner.slices.clone(), peer, within).boxed();
                    let ping = ping.shared();
                    pings.extend(ping.downgrade().map(|ping| (peer, ping)));
                    ping
                }
            }
        };
        ping.await
    }

    /// One request and its response on the control endpoint. It may be kept
    /// waiting there, and then others wait for its seat.
    ///
    /// # Errors
    /// As [`Peers::ask`].
    pub async fn control<Q: Serialize + Sync, R: DeserializeOwned>(
        &self,
        peer: NodeId,
        request: &Q,
        deadline: Duration,
    ) -> Result<R, PeerError> {
        let place = Place::Seat;
        self.control_from(place, peer, request, deadline).await
    }

    /// As [`Peers::control`], past those who wait for a seat: for what they wait
    /// for, votes, the log, leases and acknowledgements. Each is one task's, and
    /// answered at once, so that they are few.
    ///
    /// # Errors
    /// As [`Peers::ask`].
    pub async fn control_aside<Q: Serialize + Sync, R: DeserializeOwned>(
        &self,
        peer: NodeId,
        request: &Q,
        deadline: Duration,
    ) -> Result<R, PeerError> {
        let place = Place::Aside;
        self.control_from(place, peer, request, deadline).await
    }

    async fn control_from<Q: Serialize + Sync, R: DeserializeOwned>(
        &self,
        place: Place,
        peer: NodeId,
        request: &Q,
        deadline: Duration,
    ) -> Result<R, PeerError> {
        let frame = control_request(peer, request)?;
        let limit = CONTROL_BYTES_MAX + 1;
        let reply = self
            .inner
            .control
            .exchange(peer, place, frame, limit, deadline)
            .await?;
        control_response(peer, &reply.head)
    }

    /// As [`Peers::control`], to a seed whose number is not known yet. Makes a
    /// connection of its own, for this call alone.
    ///
    /// # Errors
    /// As [`Peers::ask`]; node 0 stands for one that is not known.
    pub async fn control_at<Q: Serialize + Sync, R: DeserializeOwned>(
        &self,
        advertise: &str,
        request: &Q,
        deadline: Duration,
    ) -> Result<(NodeId, R), PeerError> {
        let frame = control_request(NodeId(0), request)?;
        let limit = CONTROL_BYTES_MAX + 1;
        let (peer, head) = self
            .inner
            .control
            .exchange_at(advertise, frame, limit, deadline)
            .await?;
        Ok((peer, control_response(peer, &head)?))
    }

    /// False while the peer has no address, or has failed and not come back.
    /// A peer that nobody has tried to reach counts as up.
    pub fn is_up(&self, peer: NodeId) -> bool {
        self.inner.slices.is_up(peer) && self.inner.control.is_up(peer)
    }

    /// The connections for slices, those made by this node first.
    pub fn links(&self) -> Vec<Link> {
        let mut links = self.inner.slices.links();
        links.extend(self.inner.slice_server.links());
        links
    }

    /// What arrived and was not answered.
    pub fn counters(&self) -> &Counters {
        &self.inner.counters
    }

    /// Closes both endpoints, telling the peers; never hangs. The ports are
    /// free when nobody holds a body any more.
    pub async fn stop(&self) {
        let endpoints = [self.inner.slices.close(), self.inner.control.close()];
        self.inner.tasks.close();
        let all_told = async {
            for endpoint in endpoints.iter().flatten() {
                endpoint.wait_idle().await;
            }
            self.inner.tasks.wait().await;
        };
        // Tasks end as their connections do; what does not is dropped with its runtime.
        let _ = tokio::time::timeout(STOP_TIMEOUT, all_told).await;
        self.inner.control_end.cancel();
    }
}

/// Asks for what nobody has: key 0 is no object's.
async fn ping(slices: Arc<Dialler>, peer: NodeId, within: Duration) -> bool {
    let request = OriginRequest {
        host: String::new(),
        target: String::new(),
        headers: Vec::new(),
    };
    let nothing = Ask::Resolve(ResolveAsk::what_is_stored(ObjectKey(0), request));
    let Ok(frame) = wire::encode(&nothing) else {
        return false;
    };
    let reply = slices.exchange(peer, Place::Aside, frame.into(), HEAD_BYTES_MAX, within);
    // A refusal is a sign of life: it may have too much to do for another question.
    matches!(reply.await, Ok(_) | Err(PeerError::Refused { .. }))
}

fn refused(peer: NodeId, reason: FrameError) -> PeerError {
    PeerError::Refused {
        peer,
        reason: reason.to_string(),
    }
}

fn control_request<Q: Serialize>(peer: NodeId, request: &Q) -> Result<Bytes, PeerError> {
    let frame = wire::encode_within(request, CONTROL_BYTES_MAX).map_err(|e| refused(peer, e))?;
    Ok(frame.into())
}

fn control_response<R: DeserializeOwned>(peer: NodeId, head: &[u8]) -> Result<R, PeerError> {
    match head.split_first() {
        Some((&serve::CONTROL_ANSWERED, response)) => {
            wire::decode(response).map_err(|e| refused(peer, e))
        }
        Some((&serve::CONTROL_REFUSED, reason)) => Err(PeerError::Refused {
            peer,
            reason: String::from_utf8_lossy(reason).into_owned(),
        }),
        _ => Err(refused(
            peer,
            FrameError::Garbage("neither response nor refusal".to_owned()),
        )),
    }
}

/// A thread that drives the control endpoint and nothing else, until `end`.
fn control_thread(end: CancellationToken) -> Result<Handle, StartError> {
    let failed = |e: std::io::Error| {
        StartError::Config(format!(
            "the thread for control traffic cannot be started: {e}"
        ))
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(failed)?;
    let handle = runtime.handle().clone();
    std::thread::Builder::new()
        .name("peer-control".to_owned())
        .spawn(move || {
            runtime.block_on(end.cancelled());
            // A name lookup under way must not hold up the end.
            runtime.shutdown_background();
        })
        .map_err(failed)?;
    Ok(handle)
}

/// A QUIC endpoint that serves and dials, driven by the current runtime.
fn endpoint(
    listen: SocketAddr,
    identity: &Identity,
    alpn: &[u8],
    payload_bytes_max: u16,
) -> Result<Endpoint, StartError> {
    let cannot_bind = |e: std::io::Error| {
        StartError::Config(format!(
            "cluster.listen: UDP {listen} cannot be bound ({e}); \
             choose an address of this machine with two free ports in a row"
        ))
    };
    let mut server = identity.server_config(alpn)?;
    server.transport_config(transport(payload_bytes_max, WINDOWS, STREAMS_ACCEPTED)?);
    let mut client = identity.client_config(alpn)?;
    client.transport_config(transport(payload_bytes_max, WINDOWS, 0)?);

    let mut config = EndpointConfig::new(Arc::new(identity.reset_key()));
    config
        .max_udp_payload_size(payload_bytes_max.max(1472))
        .map_err(cannot_set)?;
    // Recognisable by nobody, so that a restarted node answers packets for its
    // former connections with a reset instead of dropping them.
    config.cid_generator(|| Box::new(RandomConnectionIdGenerator::default()));

    let socket = udp_socket(listen).map_err(cannot_bind)?;
    let mut endpoint =
        Endpoint::new(config, Some(server), socket, Arc::new(TokioRuntime)).map_err(cannot_bind)?;
    endpoint.set_default_client_config(client);
    Ok(endpoint)
}

/// What all connections have in common, and their windows. `streams_accepted`: that
/// the peer may open, which it does on connections of its own making only.
fn transport(
    payload_bytes_max: u16,
    windows: Windows,
    streams_accepted: u32,
) -> Result<Arc<TransportConfig>, StartError> {
    let mut transport = TransportConfig::default();
    // The first packets have the smallest size, as the path may be a tunnel;
    // larger ones are found by probing once the connection stands.
    let mut discovery = MtuDiscoveryConfig::default();
    discovery.upper_bound(payload_bytes_max);
    let idle_timeout = IdleTimeout::try_from(IDLE_TIMEOUT).map_err(cannot_set)?;
    transport
        .mtu_discovery_config(Some(discovery))
        .initial_rtt(FIRST_ROUND_TRIP)
        .max_concurrent_bidi_streams(streams_accepted.into())
        .max_concurrent_uni_streams(0u32.into())
        .datagram_receive_buffer_size(None)
        .stream_receive_window(windows.stream.into())
        .receive_window(windows.connection.into())
        .send_window(SEND_WINDOW_BYTES.into())
        .max_idle_timeout(Some(idle_timeout))
        .keep_alive_interval(Some(KEEP_ALIVE));
    Ok(Arc::new(transport))
}

fn cannot_set(e: impl std::fmt::Display) -> StartError {
    StartError::Config(format!("QUIC settings: {e}"))
}

/// A bound socket with large buffers; IPv6 ones take IPv4 too.
fn udp_socket(listen: SocketAddr) -> std::io::Result<std::net::UdpSocket> {
    use socket2::{Domain, Protocol, Socket, Type};
    let socket = Socket::new(
        Domain::for_address(listen),
        Type::DGRAM,
        Some(Protocol::UDP),
    )?;
    if listen.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    socket.set_recv_buffer_size(SOCKET_BUFFER_BYTES)?;
    socket.set_send_buffer_size(SOCKET_BUFFER_BYTES)?;
    // The kernel cuts both to its own maximum, silently.
    let granted = socket.recv_buffer_size()?.min(socket.send_buffer_size()?);
    if granted < SOCKET_BUFFER_BYTES {
        tracing::info!(
            "UDP {listen} has buffers of {granted} bytes, {SOCKET_BUFFER_BYTES} were asked for: \
             packets may be lost under load; raise net.core.rmem_max and net.core.wmem_max"
        );
    }
    socket.bind(&listen.into())?;
    Ok(socket.into())
}
