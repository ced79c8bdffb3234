//! Incoming: accept, route each stream.
//!
//! One task per connection, one per stream. A stream holds one frame, which
//! must come whole within `HEAD_TIMEOUT`; everything that a peer can make us
//! hold has a bound, on the control endpoint for each node apart: what one asks
//! for keeps no other out. Who asks is read from the certificate, once per
//! connection; what it may ask for, from the handler, at each request.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use quinn::{Connection, Endpoint, Incoming, RecvStream, SendStream};
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tokio_util::task::TaskTracker;

use super::dial::lock;
use super::frames::{self, Broken, CloseCode, Unwritten};
use super::{
    CONTROL_BYTES_MAX, Counters, GREETING_BYTES_MAX, Link, PeerHandler, STREAMS_ACCEPTED, identity,
};
use crate::NodeId;
use crate::shares::Shares;
use crate::wire::{self, Answer, Ask, FrameError, HEAD_BYTES_MAX, WIRE_VERSION};

/// A request that is not there by then is given up.
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);
/// A handshake that is not done by then is given up.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// Handshakes at once: more must first show that their address is real.
const HANDSHAKES_MAX: usize = 64;
/// As many of those that have shown it have room of their own: who only pretends
/// to be somewhere takes none of it.
const HANDSHAKES_SHOWN_MAX: usize = 64;
/// Connections of one endpoint, both ways: 8 each way to 200 peers, and half as much again.
const CONNECTIONS_MAX: usize = 4800;
/// Connections that one node has made to it: 8, those of its life before a
/// restart, and those of handshakes begun beside others. The oldest gives way.
const NODE_CONNECTIONS_MAX: usize = 40;
/// Requests under way on the slice endpoint: 128 from each of 8 peers at once; a head
/// of 256 KiB each makes 256 MiB at the very worst.
const REQUESTS_MAX: usize = 1024;
/// Control requests of one member under way: all of one connection, and what
/// the one before it has left.
pub(crate) const MEMBER_REQUESTS_MAX: usize = 160;
const _: () = assert!(MEMBER_REQUESTS_MAX > STREAMS_ACCEPTED as usize);
/// The same of anybody else, who greets once in a while.
const STRANGER_REQUESTS_MAX: usize = 4;

/// First byte of a control response: the response follows.
pub(super) const CONTROL_ANSWERED: u8 = 0;
/// First byte of a control response: the reason for a refusal follows.
pub(super) const CONTROL_REFUSED: u8 = 1;

/// Which of the two endpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Protocol {
    /// Manifests and slices, for members.
    Slices,
    /// Raft and leases.
    Control,
}

/// Serves one endpoint.
pub(super) struct Server {
    protocol: Protocol,
    handler: Arc<dyn PeerHandler>,
    counters: Arc<Counters>,
    tasks: TaskTracker,
    heard: Box<dyn Fn(NodeId) + Send + Sync>,
    handshakes: Arc<Semaphore>,
    /// Of those whose address is known to be real.
    handshakes_shown: Arc<Semaphore>,
    /// For slices.
    requests: Semaphore,
    /// For control.
    shares: Shares,
    /// As they came; at most [`CONNECTIONS_MAX`].
    connections: Mutex<BTreeMap<u64, (NodeId, Connection)>>,
    /// How many have come.
    connected: AtomicU64,
}

impl Server {
    /// `heard` is told of every peer that has connected.
    pub(super) fn new(
        protocol: Protocol,
        handler: Arc<dyn PeerHandler>,
        counters: Arc<Counters>,
        tasks: TaskTracker,
        heard: Box<dyn Fn(NodeId) + Send + Sync>,
    ) -> Arc<Server> {
        Arc::new(Server {
            protocol,
            handler,
            counters,
            tasks,
            heard,
            handshakes: Arc::new(Semaphore::new(HANDSHAKES_MAX)),
            handshakes_shown: Arc::new(Semaphore::new(HANDSHAKES_SHOWN_MAX)),
            requests: Semaphore::new(REQUESTS_MAX),
            shares: Shares::default(),
            connections: Mutex::default(),
            connected: AtomicU64::new(0),
        })
    }

    /// Accepts until the endpoint is closed.
    pub(super) async fn run(self: Arc<Self>, endpoint: Endpoint) {
        while let Some(incoming) = endpoint.accept().await {
            if endpoint.open_connections() >= CONNECTIONS_MAX {
                Counters::count(&self.counters.busy);
                incoming.refuse();
                continue;
            }
            let handshakes = match incoming.remote_address_validated() {
                true => &self.handshakes_shown,
                false => &self.handshakes,
            };
            match handshakes.clone().try_acquire_owned() {
                Ok(permit) => {
                    let server = self.clone();
                    self.tasks.spawn(async move {
                        let connected = server.shake_hands(incoming).await;
                        drop(permit);
                        if let Some((from, connection)) = connected {
                            server.serve(from, connection).await;
                        }
                    });
                }
                Err(_) if incoming.may_retry() => {
                    // Fails only where `may_retry` is false.
                    let _ = incoming.retry();
                }
                Err(_) => incoming.refuse(),
            }
        }
    }

    /// The connections that peers have made.
    pub(super) fn links(&self) -> Vec<Link> {
        let connections = lock(&self.connections);
        connections
            .values()
            .map(|(from, connection)| Link::of(*from, true, connection))
            .collect()
    }

    async fn shake_hands(&self, incoming: Incoming) -> Option<(NodeId, Connection)> {
        let address = incoming.remote_address();
        let failed = |reason: &dyn std::fmt::Display| {
            Counters::count(&self.counters.handshakes_failed);
            tracing::debug!(%address, protocol = ?self.protocol, "no connection: {reason}");
        };
        let connecting = incoming.accept().map_err(|e| failed(&e)).ok()?;
        let connection = match timeout(HANDSHAKE_TIMEOUT, connecting).await {
            Ok(outcome) => outcome.map_err(|e| failed(&e)).ok()?,
            Err(_) => {
                failed(&"handshake not finished in time");
                return None;
            }
        };
        match identity::node_of(&connection) {
            Ok(from) => Some((from, connection)),
            Err(reason) => {
                connection.close(CloseCode::WrongNode.into(), reason.as_bytes());
                failed(&reason);
                None
            }
        }
    }

    async fn serve(self: Arc<Self>, from: NodeId, connection: Connection) {
        (self.heard)(from);
        let number = self.connected.fetch_add(1, Ordering::Relaxed);
        self.enter(number, from, &connection);
        // Ends with the connection.
        while let Ok((send, recv)) = connection.accept_bi().await {
            let server = self.clone();
            self.tasks
                .spawn(async move { server.request(from, send, recv).await });
        }
        lock(&self.connections).remove(&number);
    }

    /// Lists a connection; one node's are no more than its share.
    fn enter(&self, number: u64, from: NodeId, connection: &Connection) {
        let mut connections = lock(&self.connections);
        let open =
            |(node, known): &&(NodeId, Connection)| *node == from && known.close_reason().is_none();
        if connections.values().filter(open).count() >= NODE_CONNECTIONS_MAX
            && let Some((_, oldest)) = connections.values().find(open)
        {
            // Its task takes it off the list.
            oldest.close(CloseCode::Busy.into(), CloseCode::Busy.text().as_bytes());
        }
        connections.insert(number, (from, connection.clone()));
    }

    /// One stream, from its first byte to its last.
    async fn request(&self, from: NodeId, mut send: SendStream, mut recv: RecvStream) {
        let outcome = match self.protocol {
            Protocol::Slices => self.slices(from, &mut send, &mut recv).await,
            Protocol::Control => self.control(from, &mut send, &mut recv).await,
        };
        let Err(refusal) = outcome else { return };
        let code = match &refusal {
            Refusal::NotMember => {
                Counters::count(&self.counters.not_members);
                CloseCode::NotMember
            }
            Refusal::Busy => {
                Counters::count(&self.counters.busy);
                CloseCode::Busy
            }
            Refusal::Request(broken) => {
                if !matches!(broken, Broken::Closed(_) | Broken::Lost(_)) {
                    Counters::count(&self.counters.bad_frames);
                }
                broken.code()
            }
            Refusal::Unwritten(Unwritten::Source(_)) => {
                Counters::count(&self.counters.bodies_broken);
                CloseCode::BodyBroken
            }
            Refusal::Unwritten(Unwritten::Asker(broken)) => broken.code(),
        };
        tracing::debug!(%from, protocol = ?self.protocol, "stream closed ({}): {refusal}", code.text());
        frames::close(&mut send, &mut recv, code);
    }

    async fn slices(
        &self,
        from: NodeId,
        send: &mut SendStream,
        recv: &mut RecvStream,
    ) -> Result<(), Refusal> {
        if !self.handler.is_member(from) {
            return Err(Refusal::NotMember);
        }
        let _permit = self.requests.try_acquire().map_err(|_| Refusal::Busy)?;
        let payload = head(recv, HEAD_BYTES_MAX).await?;
        let ask: Ask = wire::decode(&payload).map_err(|e| Refusal::Request(e.into()))?;
        drop(payload);
        let (answer, body) = tokio::select! {
            answered = self.handler.slices(from, ask) => answered,
            _ = send.stopped() => return Ok(()),
        };
        let (head, body) = match (wire::encode(&answer), frames::has_body(&answer)) {
            (Ok(head), true) => (
                head,
                Some(body.unwrap_or_else(|| Box::pin(futures::stream::empty()))),
            ),
            (Ok(head), false) => (head, None),
            (Err(e), _) => {
                tracing::warn!(%from, "an answer does not fit into a frame: {e}");
                let failed = wire::encode(&Answer::Failed { status: 502 });
                (failed.map_err(|e| Refusal::Request(e.into()))?, None)
            }
        };
        frames::write_answer(send, head, body)
            .await
            .map_err(Refusal::Unwritten)
    }

    async fn control(
        &self,
        from: NodeId,
        send: &mut SendStream,
        recv: &mut RecvStream,
    ) -> Result<(), Refusal> {
        let (requests_max, bytes_max) = if self.handler.may_control(from) {
            (MEMBER_REQUESTS_MAX, CONTROL_BYTES_MAX)
        } else {
            (STRANGER_REQUESTS_MAX, GREETING_BYTES_MAX)
        };
        let share = self.shares.take(from, requests_max);
        let _share = share.ok_or(Refusal::Busy)?;
        let payload = head(recv, bytes_max).await?;
        let frame = match self.handler.control(from, payload).await {
            Ok(response) if response.len() <= CONTROL_BYTES_MAX => {
                control_frame(CONTROL_ANSWERED, &response)
            }
            Ok(response) => {
                let length = response.len();
                let error = FrameError::TooLong {
                    length,
                    limit: CONTROL_BYTES_MAX,
                };
                tracing::warn!(%from, "a control response does not fit: {error}");
                control_frame(CONTROL_REFUSED, error.to_string().as_bytes())
            }
            Err(reason) => {
                let cut = reason.len().min(HEAD_BYTES_MAX);
                control_frame(CONTROL_REFUSED, &reason.as_bytes()[..cut])
            }
        };
        frames::write_answer(send, frame, None)
            .await
            .map_err(Refusal::Unwritten)
    }
}

/// Why a stream ends without its answer.
#[derive(Debug)]
enum Refusal {
    /// The asker may not ask.
    NotMember,
    /// Too much under way.
    Busy,
    /// The request is no frame, or never came.
    Request(Broken),
    /// The answer could not be sent to its end.
    Unwritten(Unwritten),
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Refusal::NotMember => f.write_str("the asker is not a member"),
            Refusal::Busy => f.write_str("too many requests are under way"),
            Refusal::Request(broken) => write!(f, "request: {broken}"),
            Refusal::Unwritten(Unwritten::Asker(broken)) => write!(f, "asker: {broken}"),
            Refusal::Unwritten(Unwritten::Source(broken)) => write!(f, "answer: {broken}"),
        }
    }
}

/// Reads the one frame of a request.
async fn head(recv: &mut RecvStream, limit: usize) -> Result<bytes::Bytes, Refusal> {
    timeout(HEAD_TIMEOUT, frames::read_only_head(recv, limit))
        .await
        .unwrap_or(Err(Broken::TooSlow))
        .map_err(Refusal::Request)
}

/// A head frame whose payload is `kind` and `body`; the caller has checked its length.
fn control_frame(kind: u8, body: &[u8]) -> Vec<u8> {
    let length = body.len() as u32 + 1;
    let mut frame = Vec::with_capacity(wire::HEAD_PREFIX_BYTES + 1 + body.len());
    frame.push(WIRE_VERSION);
    frame.extend_from_slice(&length.to_be_bytes());
    frame.push(kind);
    frame.extend_from_slice(body);
    frame
}
