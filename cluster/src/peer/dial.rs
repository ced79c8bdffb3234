//! Outgoing: connect, ask.
//!
//! A `Dialler` belongs to one of the two endpoints and keeps a few
//! connections to each peer, made when they are first needed, one attempt at a
//! time; those for slices apart from the others, as they have other windows. A
//! peer that cannot be reached is left alone for a while, doubling with each
//! failure; meanwhile callers fail at once, and after it one attempt runs beside
//! them, so that nobody waits for a dead node twice. Whoever dials us is tried
//! again without delay.
//!
//! A peer that has died quietly is told from one that is merely slow by
//! whether *anything* came from it while an answer was due: a living one
//! acknowledges packets whatever it is busy with.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::future::{BoxFuture, Shared};
use futures::stream::FuturesUnordered;
use futures::{FutureExt, StreamExt};
use quinn::{ClientConfig, Connection, ConnectionError, Endpoint, RecvStream, TransportErrorCode};
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tokio::time::{MissedTickBehavior, timeout};
use tokio_util::task::TaskTracker;

use super::frames::{self, Broken, CloseCode};
use super::identity::{self, SERVER_NAME};
use super::{Body, Link, PeerError};
use crate::NodeId;

/// A peer that has not finished the handshake by then is not there.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// How long a handshake runs before another one is begun beside it.
const HANDSHAKE_EVERY: Duration = Duration::from_millis(250);
/// Addresses of one host name that are tried.
const ADDRESSES_MAX: usize = 4;
/// The first wait after a failure; it doubles up to [`Limits::backoff_max`].
const BACKOFF_FIRST: Duration = Duration::from_millis(100);
/// Requests in a row without a sign of life after which the peer is given up.
const SILENCES_MAX: u32 = 2;
/// How long a request waits for a seat. At 1 Gbit/s 600 slices of 1 MiB pass
/// meanwhile: whoever waits longer is behind answers that themselves wait, for an
/// origin perhaps, and must not share their fate. The caller has other sources.
const SEAT_WAIT_MAX: Duration = Duration::from_secs(5);
/// How long an acknowledgement may take besides round trips: quinn's 25 ms, doubled.
const ACKNOWLEDGEMENT_DELAY: Duration = Duration::from_millis(50);

/// What distinguishes the two endpoints.
#[derive(Clone, Debug)]
pub(super) struct Limits {
    /// What goes over its connections, in a word.
    pub carries: &'static str,
    /// What to add to the port that a peer advertises.
    pub port_offset: u16,
    /// Connections to one peer; as many again for slices.
    pub connections: usize,
    /// Streams at once on one of them.
    pub streams: usize,
    /// Longest wait between attempts.
    pub backoff_max: Duration,
    /// Settings of the connections for slices; `None`: no slice is asked for.
    pub for_slices: Option<ClientConfig>,
}

/// Where a request to a peer goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// Onto one of its seats, for as long as the answer takes: more bodies at
    /// once would wait for one another.
    Seat,
    /// Onto one of the seats for slices, whose bodies are read as they come.
    SliceSeat,
    /// Past them, over any connection there is. For what asks after those who are on
    /// the seats, or what those wait for: they may all be taken, and for long.
    Aside,
}

/// Dials from one endpoint.
pub(super) struct Dialler {
    line: Arc<Line>,
    pools: Mutex<HashMap<NodeId, Arc<Pool>>>,
}

/// A peer's answer, its body still to be read.
pub(super) struct Reply {
    /// Payload of the head frame.
    pub head: Bytes,
    recv: RecvStream,
    seat: Seat,
}

impl Reply {
    /// The body that follows the head; keeps the stream's place until it is dropped.
    pub(super) fn into_body(self) -> Body {
        frames::read_body(self.recv, self.seat)
    }
}

impl Dialler {
    pub(super) fn new(
        endpoint: Endpoint,
        runtime: Handle,
        tasks: TaskTracker,
        limits: Limits,
    ) -> Dialler {
        let line = Line {
            endpoint: Mutex::new(Some(endpoint)),
            runtime,
            tasks,
            limits,
        };
        Dialler {
            line: Arc::new(line),
            pools: Mutex::default(),
        }
    }

    /// See [`super::Peers::set_address`]. Connections to another address are closed.
    pub(super) fn set_address(&self, peer: NodeId, advertise: &str) {
        let mut pools = lock(&self.pools);
        if pools
            .get(&peer)
            .is_none_or(|pool| pool.address != advertise)
        {
            let new = Pool::new(peer, advertise, self.line.clone());
            if let Some(old) = pools.insert(peer, Arc::new(new)) {
                old.close(CloseCode::Done);
            }
        }
    }

    /// See [`super::Peers::forget`].
    pub(super) fn forget(&self, peer: NodeId) {
        if let Some(pool) = lock(&self.pools).remove(&peer) {
            pool.close(CloseCode::Done);
        }
    }

    /// The peer has dialled us: it lives, whatever has failed before.
    pub(super) fn heard(&self, peer: NodeId) {
        if let Some(pool) = lock(&self.pools).get(&peer) {
            pool.lock().succeeded();
        }
    }

    /// See [`super::Peers::is_up`].
    pub(super) fn is_up(&self, peer: NodeId) -> bool {
        lock(&self.pools)
            .get(&peer)
            .is_some_and(|pool| pool.lock().is_up())
    }

    /// See [`super::Peers::links`].
    pub(super) fn links(&self) -> Vec<Link> {
        let pools: Vec<_> = lock(&self.pools).values().cloned().collect();
        let mut links = Vec::new();
        for pool in pools {
            for lane in &pool.lock().lanes {
                if let Wire::Up(connection) = &lane.wire {
                    links.push(Link::of(pool.peer, false, connection));
                }
            }
        }
        links
    }

    /// Sends `frame` and reads the head of the answer, all before `deadline`.
    /// Whoever finds no seat within [`SEAT_WAIT_MAX`] has not been heard. A
    /// connection that turns out to belong to the peer's life before a restart
    /// is replaced, once.
    pub(super) async fn exchange(
        &self,
        peer: NodeId,
        place: Place,
        frame: Bytes,
        limit: usize,
        deadline: Duration,
    ) -> Result<Reply, PeerError> {
        let pool = lock(&self.pools)
            .get(&peer)
            .cloned()
            .ok_or_else(|| PeerError::Unreachable {
                peer,
                reason: "its address is not known".to_owned(),
            })?;
        let unreachable = |reason| PeerError::Unreachable { peer, reason };
        let attempts = async {
            let mut restarted = false;
            loop {
                let (seat, connection) = timeout(SEAT_WAIT_MAX, pool.seat(place))
                    .await
                    .map_err(|_| PeerError::TimedOut { peer })?
                    .map_err(unreachable)?;
                let watch = Watch::begin(&pool, &connection);
                let outcome = talk(&connection, frame.clone(), limit).await;
                return match outcome {
                    Ok((head, recv)) => {
                        watch.answered();
                        Ok(Reply { head, recv, seat })
                    }
                    Err(Broken::Lost(ConnectionError::Reset)) if !restarted => {
                        restarted = true;
                        watch.lost();
                        continue;
                    }
                    Err(Broken::Lost(e)) => {
                        watch.lost();
                        Err(unreachable(e.to_string()))
                    }
                    Err(refusal) => {
                        watch.answered();
                        Err(PeerError::Refused {
                            peer,
                            reason: refusal.to_string(),
                        })
                    }
                };
            }
        };
        timeout(deadline, attempts)
            .await
            .unwrap_or(Err(PeerError::TimedOut { peer }))
    }

    /// The same over a connection of its own, to whoever is at `advertise`.
    pub(super) async fn exchange_at(
        &self,
        advertise: &str,
        frame: Bytes,
        limit: usize,
        deadline: Duration,
    ) -> Result<(NodeId, Bytes), PeerError> {
        let (line, advertise) = (self.line.clone(), advertise.to_owned());
        let conversation = async move {
            let nobody = NodeId(0);
            let (peer, connection) =
                line.connect(&advertise, None)
                    .await
                    .map_err(|reason| PeerError::Unreachable {
                        peer: nobody,
                        reason,
                    })?;
            let outcome = talk(&connection, frame, limit).await;
            connection.close(CloseCode::Done.into(), b"");
            match outcome {
                Ok((head, _)) => Ok((peer, head)),
                Err(Broken::Lost(e)) => Err(PeerError::Unreachable {
                    peer,
                    reason: e.to_string(),
                }),
                Err(e) => Err(PeerError::Refused {
                    peer,
                    reason: e.to_string(),
                }),
            }
        };
        // The connection is driven where it is made.
        let mut task = self.line.tasks.spawn_on(conversation, &self.line.runtime);
        match timeout(deadline, &mut task).await {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(_)) => Err(PeerError::Unreachable {
                peer: NodeId(0),
                reason: "this node is stopping".to_owned(),
            }),
            Err(_) => {
                task.abort();
                Err(PeerError::TimedOut { peer: NodeId(0) })
            }
        }
    }

    /// Closes the endpoint and all its connections, in both directions.
    /// Returns it, for those who want to wait until the peers have been told.
    pub(super) fn close(&self) -> Option<Endpoint> {
        for (_, pool) in lock(&self.pools).drain() {
            pool.close(CloseCode::Stopping);
        }
        let endpoint = lock(&self.line.endpoint).take();
        if let Some(endpoint) = &endpoint {
            endpoint.close(
                CloseCode::Stopping.into(),
                CloseCode::Stopping.text().as_bytes(),
            );
        }
        endpoint
    }
}

/// One request, one answer's head.
async fn talk(
    connection: &Connection,
    frame: Bytes,
    limit: usize,
) -> Result<(Bytes, RecvStream), Broken> {
    let (mut send, mut recv) = connection.open_bi().await.map_err(Broken::Lost)?;
    let sent = match send.write_chunk(frame).await {
        Ok(()) => send.finish().map_err(|_| Broken::Ended),
        Err(e) => Err(e.into()),
    };
    if let Err(e) = sent {
        let _ = send.reset(CloseCode::Done.into());
        return Err(e);
    }
    match frames::read_head(&mut recv, limit).await {
        Ok(head) => Ok((head, recv)),
        Err(e) => {
            let _ = recv.stop(e.code().into());
            Err(e)
        }
    }
}

/// One endpoint, for those who dial from it.
struct Line {
    /// `None` once closed: the socket goes when nobody holds it.
    endpoint: Mutex<Option<Endpoint>>,
    /// Drives the endpoint, and so must drive its connections.
    runtime: Handle,
    tasks: TaskTracker,
    limits: Limits,
}

impl Line {
    /// Connects to `advertise`, with other settings than the endpoint's where there
    /// are any, and reads who is there. Must run on `runtime`.
    async fn connect(
        &self,
        advertise: &str,
        settings: Option<&ClientConfig>,
    ) -> Result<(NodeId, Connection), String> {
        let endpoint = lock(&self.endpoint)
            .clone()
            .ok_or("this node is stopping")?;
        let addresses = timeout(CONNECT_TIMEOUT, resolve(advertise, self.limits.port_offset))
            .await
            .map_err(|_| format!("the name in {advertise} was not resolved in time"))??;
        let takes_ipv6 = endpoint.local_addr().is_ok_and(|local| local.is_ipv6());
        let usable: Vec<_> = addresses
            .into_iter()
            .filter(|address| takes_ipv6 || address.is_ipv4())
            .take(ADDRESSES_MAX)
            .collect();
        let mut reason = format!("{advertise} has no address that this node can dial");
        let patience = CONNECT_TIMEOUT / usable.len().max(1) as u32;
        for address in usable {
            let connection = match timeout(patience, handshake(&endpoint, settings, address)).await
            {
                Ok(Ok(connection)) => connection,
                Ok(Err(e)) => {
                    reason = format!("{address}: {e}");
                    continue;
                }
                Err(_) => {
                    let slices = address.port() - self.limits.port_offset;
                    let control = slices.saturating_add(1);
                    reason = format!(
                        "{address}: no answer: is it started, and are UDP {slices} and {control} open?"
                    );
                    continue;
                }
            };
            match identity::node_of(&connection) {
                Ok(node) => return Ok((node, connection)),
                Err(e) => {
                    connection.close(CloseCode::WrongNode.into(), e.as_bytes());
                    reason = format!("{address}: {e}");
                }
            }
        }
        Err(reason)
    }
}

/// A connection to `address`. What is lost of a handshake is sent again after
/// ever longer times: others are begun beside it, so that a peer which comes
/// back meanwhile is reached at once.
async fn handshake(
    endpoint: &Endpoint,
    settings: Option<&ClientConfig>,
    address: SocketAddr,
) -> Result<Connection, String> {
    let mut under_way = FuturesUnordered::new();
    let mut begin = tokio::time::interval(HANDSHAKE_EVERY);
    begin.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = begin.tick() => {
                let connecting = match settings {
                    Some(settings) => endpoint.connect_with(settings.clone(), address, SERVER_NAME),
                    None => endpoint.connect(address, SERVER_NAME),
                };
                under_way.push(connecting.map_err(|e| e.to_string())?);
            }
            Some(outcome) = under_way.next() => return outcome.map_err(|e| why(&e)),
        }
    }
}

/// TLS alerts for a certificate that another authority has signed (RFC 8446
/// section 6.2): `decrypt_error` where both authorities have one name.
const OTHER_AUTHORITY: [u8; 2] = [48, 51];

/// Why there is no connection, for an operator.
fn why(error: &ConnectionError) -> String {
    let code = match error {
        // Ours is the judgement, or theirs.
        ConnectionError::TransportError(e) => e.code,
        ConnectionError::ConnectionClosed(close) => close.error_code,
        _ => return error.to_string(),
    };
    match OTHER_AUTHORITY
        .map(TransportErrorCode::crypto)
        .contains(&code)
    {
        true => "certificate of another authority: compare cluster.tls.ca".to_owned(),
        false => error.to_string(),
    }
}

/// The addresses behind `host:port`, each with the port moved by `offset`.
async fn resolve(advertise: &str, offset: u16) -> Result<Vec<SocketAddr>, String> {
    let (host, port) = advertise
        .rsplit_once(':')
        .and_then(|(host, port)| Some((host, port.parse::<u16>().ok()?.checked_add(offset)?)))
        .ok_or_else(|| format!("{advertise} is not host:port"))?;
    let host = host
        .strip_prefix('[')
        .and_then(|host| host.strip_suffix(']'))
        .unwrap_or(host);
    let found = tokio::net::lookup_host((host, port))
        .await
        .map_err(|e| format!("the name {host} cannot be resolved: {e}"))?;
    Ok(found.collect())
}

/// The connections to one peer at one address.
struct Pool {
    peer: NodeId,
    address: String,
    line: Arc<Line>,
    seats: Arc<Semaphore>,
    slice_seats: Arc<Semaphore>,
    state: Mutex<State>,
}

/// Waited for by everybody who needs the same connection.
type Dialling = Shared<BoxFuture<'static, Result<Connection, String>>>;

/// What is known of a peer.
struct State {
    /// Who, and over what: for the log.
    peer: NodeId,
    carries: &'static str,
    lanes: Vec<Lane>,
    /// Failures since the last answer; 0: not known to be down.
    failures: u32,
    /// What the last one was.
    reason: String,
    /// No attempt before this.
    retry_at: Instant,
    /// Requests in a row during which nothing came.
    silences: u32,
    /// No longer used: another address, forgotten, stopped.
    closed: bool,
}

/// Room for one connection.
#[derive(Default)]
struct Lane {
    for_slices: bool,
    wire: Wire,
    in_flight: usize,
}

#[derive(Default)]
enum Wire {
    #[default]
    None,
    Dialling(Dialling),
    Up(Connection),
}

/// The right to one stream on one lane.
struct Seat {
    pool: Arc<Pool>,
    lane: usize,
    /// `None` for what goes aside.
    _permit: Option<OwnedSemaphorePermit>,
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.pool.lock().lanes[self.lane].in_flight -= 1;
    }
}

impl State {
    /// Forgets connections that have ended.
    fn sweep(&mut self) {
        for lane in &mut self.lanes {
            if let Wire::Up(connection) = &lane.wire
                && connection.close_reason().is_some()
            {
                lane.wire = Wire::None;
            }
        }
    }

    fn has_connection(&self) -> bool {
        self.lanes
            .iter()
            .any(|lane| matches!(lane.wire, Wire::Up(_)))
    }

    fn is_up(&self) -> bool {
        !self.closed && (self.failures == 0 || self.has_connection())
    }

    /// The lane with the fewest streams among those for `place` that `eligible` names.
    fn emptiest(&self, place: Place, eligible: impl Fn(&Wire) -> bool) -> Option<usize> {
        let is_for = |lane: &Lane| match place {
            Place::Seat => !lane.for_slices,
            Place::SliceSeat => lane.for_slices,
            Place::Aside => true,
        };
        let lanes = self
            .lanes
            .iter()
            .enumerate()
            .filter(|(_, lane)| is_for(lane) && eligible(&lane.wire));
        lanes
            .min_by_key(|(_, lane)| lane.in_flight)
            .map(|(index, _)| index)
    }

    fn succeeded(&mut self) {
        if self.failures > 0 {
            tracing::info!(peer = %self.peer, carries = self.carries, "a node is reached again");
        }
        self.failures = 0;
        self.silences = 0;
    }

    /// Once per failed attempt, or when the last connection has broken.
    fn failed(&mut self, reason: String, backoff_max: Duration) {
        let wait = BACKOFF_FIRST * 2u32.pow(self.failures.min(10));
        if self.failures == 0 {
            tracing::info!(peer = %self.peer, carries = self.carries, reason, "a node is not reached");
        }
        self.retry_at = Instant::now() + wait.min(backoff_max);
        self.failures = self.failures.saturating_add(1);
        self.reason = reason;
    }
}

impl Pool {
    fn new(peer: NodeId, advertise: &str, line: Arc<Line>) -> Pool {
        let limits = &line.limits;
        let lanes = |for_slices| {
            (0..limits.connections).map(move |_| Lane {
                for_slices,
                ..Lane::default()
            })
        };
        let slice_lanes = limits.for_slices.iter().flat_map(|_| lanes(true));
        let seats = || Arc::new(Semaphore::new(limits.connections * limits.streams));
        let state = State {
            peer,
            carries: limits.carries,
            lanes: lanes(false).chain(slice_lanes).collect(),
            failures: 0,
            reason: String::new(),
            retry_at: Instant::now(),
            silences: 0,
            closed: false,
        };
        Pool {
            peer,
            address: advertise.to_owned(),
            seats: seats(),
            slice_seats: seats(),
            state: Mutex::new(state),
            line,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// A place for one stream: waits for a permit, and for the connection where
    /// there is none yet; not for a peer that is known to be down.
    async fn seat(self: &Arc<Self>, place: Place) -> Result<(Seat, Connection), String> {
        self.unless_down(place)?;
        let seats = match place {
            Place::Seat => Some(&self.seats),
            Place::SliceSeat => Some(&self.slice_seats),
            Place::Aside => None,
        };
        let permit = match seats {
            Some(seats) => {
                let permit = seats.clone().acquire_owned().await;
                Some(permit.map_err(|_| "no longer wanted".to_owned())?)
            }
            None => None,
        };
        let (seat, dialling) = {
            let mut state = self.lock();
            let (lane, dialling) = self.choose(&mut state, place)?;
            state.lanes[lane].in_flight += 1;
            (
                Seat {
                    pool: self.clone(),
                    lane,
                    _permit: permit,
                },
                dialling,
            )
        };
        let connection = dialling.await?;
        Ok((seat, connection))
    }

    fn unless_down(self: &Arc<Self>, place: Place) -> Result<(), String> {
        let mut state = self.lock();
        self.choose(&mut state, place).map(|_| ())
    }

    /// Which lane the next stream takes, and its connection, made or being made.
    fn choose(
        self: &Arc<Self>,
        state: &mut State,
        place: Place,
    ) -> Result<(usize, Dialling), String> {
        state.sweep();
        if state.closed {
            return Err("no longer wanted".to_owned());
        }
        let up = state.emptiest(place, |wire| matches!(wire, Wire::Up(_)));
        let down = state.failures > 0;
        let dialling = state
            .lanes
            .iter()
            .any(|lane| matches!(lane.wire, Wire::Dialling(_)));
        // Another connection is made when those there are have something to do,
        // beside the callers as long as there is one to use meanwhile.
        let emptiest = state.emptiest(place, |_| true);
        let wanted = if down {
            emptiest.filter(|_| up.is_none() && !dialling && Instant::now() >= state.retry_at)
        } else {
            let has_other = place == Place::Aside && (up.is_some() || dialling);
            let is_none = |index: &usize| matches!(state.lanes[*index].wire, Wire::None);
            emptiest.filter(|index| is_none(index) && !has_other)
        };
        if let Some(index) = wanted {
            state.lanes[index].wire =
                Wire::Dialling(self.dial(index, state.lanes[index].for_slices));
        }
        let lane = match up {
            Some(up) => up,
            None if down => return Err(format!("backing off: {}", state.reason)),
            None => state
                .emptiest(place, |wire| !matches!(wire, Wire::None))
                .ok_or("no connection")?,
        };
        match &state.lanes[lane].wire {
            Wire::Up(connection) => {
                let connection = connection.clone();
                Ok((lane, async move { Ok(connection) }.boxed().shared()))
            }
            Wire::Dialling(dialling) => Ok((lane, dialling.clone())),
            Wire::None => Err("no connection".to_owned()),
        }
    }

    /// Starts making the connection of a lane, and watches over it until it ends.
    fn dial(self: &Arc<Self>, lane: usize, for_slices: bool) -> Dialling {
        let (tell, told) = oneshot::channel();
        let pool = self.clone();
        let task = async move {
            let settings = pool.line.limits.for_slices.as_ref();
            let settings = settings.filter(|_| for_slices);
            let outcome = pool.line.connect(&pool.address, settings).await;
            let outcome = pool.dialled(lane, outcome);
            // Nobody may be waiting any more.
            let _ = tell.send(outcome.clone());
            if let Ok(connection) = outcome {
                let end = connection.closed().await;
                pool.lost(&connection, end);
            }
        };
        self.line.tasks.spawn_on(task, &self.line.runtime);
        async move {
            told.await
                .unwrap_or_else(|_| Err("this node is stopping".to_owned()))
        }
        .boxed()
        .shared()
    }

    /// Takes note of how an attempt has ended.
    fn dialled(
        &self,
        lane: usize,
        outcome: Result<(NodeId, Connection), String>,
    ) -> Result<Connection, String> {
        let outcome = outcome.and_then(|(node, connection)| {
            if node == self.peer {
                return Ok(connection);
            }
            let reason = format!("{} is node {node}", self.address);
            connection.close(CloseCode::WrongNode.into(), reason.as_bytes());
            Err(reason)
        });
        let mut state = self.lock();
        match outcome {
            Ok(connection) if state.closed => {
                connection.close(CloseCode::Done.into(), b"");
                Err("no longer wanted".to_owned())
            }
            Ok(connection) => {
                state.lanes[lane].wire = Wire::Up(connection.clone());
                Ok(connection)
            }
            Err(reason) => {
                tracing::debug!(peer = %self.peer, "cannot be reached: {reason}");
                state.lanes[lane].wire = Wire::None;
                state.failed(reason.clone(), self.line.limits.backoff_max);
                Err(reason)
            }
        }
    }

    /// Takes note of a connection's end. One that the peer's restart has ended
    /// is no failure: the peer is there again.
    fn lost(&self, connection: &Connection, end: ConnectionError) {
        let mut state = self.lock();
        let Some(lane) = state.lanes.iter_mut().find(|lane| match &lane.wire {
            Wire::Up(known) => known.stable_id() == connection.stable_id(),
            _ => false,
        }) else {
            return;
        };
        lane.wire = Wire::None;
        state.sweep();
        tracing::debug!(peer = %self.peer, "connection lost: {end}");
        let on_purpose = matches!(end, ConnectionError::Reset | ConnectionError::LocallyClosed);
        if !on_purpose && !state.has_connection() {
            state.silences = 0;
            state.failed(end.to_string(), self.line.limits.backoff_max);
        }
    }

    /// A request has passed without a sign of life.
    fn silent(&self) {
        let mut state = self.lock();
        state.silences += 1;
        if state.silences >= SILENCES_MAX && !state.closed {
            tracing::debug!(peer = %self.peer, "fell silent");
            state.close_connections(CloseCode::Silent);
            state.silences = 0;
            state.failed(
                CloseCode::Silent.text().to_owned(),
                self.line.limits.backoff_max,
            );
        }
    }

    fn close(&self, code: CloseCode) {
        let mut state = self.lock();
        state.closed = true;
        state.close_connections(code);
        self.seats.close();
        self.slice_seats.close();
    }
}

impl State {
    fn close_connections(&mut self, code: CloseCode) {
        for lane in &mut self.lanes {
            if let Wire::Up(connection) = &lane.wire {
                connection.close(code.into(), code.text().as_bytes());
                lane.wire = Wire::None;
            }
        }
    }
}

/// Looks, while an answer is due, whether anything comes from the peer. When
/// the request is given up, by its deadline or by its caller, the verdict
/// counts; a round trip or two must have been possible.
struct Watch {
    pool: Arc<Pool>,
    connection: Connection,
    since: Instant,
    datagrams: u64,
    decided: bool,
}

impl Watch {
    fn begin(pool: &Arc<Pool>, connection: &Connection) -> Watch {
        Watch {
            pool: pool.clone(),
            connection: connection.clone(),
            since: Instant::now(),
            datagrams: connection.stats().udp_rx.datagrams,
            decided: false,
        }
    }

    /// The peer has said something, even if it was no.
    fn answered(mut self) {
        self.decided = true;
        self.pool.lock().succeeded();
    }

    /// The connection is gone; its end is judged elsewhere.
    fn lost(mut self) {
        self.decided = true;
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let patience = 3 * self.connection.rtt() + ACKNOWLEDGEMENT_DELAY;
        if !self.decided
            && self.connection.close_reason().is_none()
            && self.since.elapsed() >= patience
            && self.connection.stats().udp_rx.datagrams == self.datagrams
        {
            self.pool.silent();
        }
    }
}

/// Sections are short and leave nothing half done: a panic elsewhere is no
/// reason to give up the peers.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
