//! The network between the nodes of a cluster, to be cut, slowed and made lossy.
//!
//! Nodes advertise the relay's ports instead of their own. What node `s` sends
//! to the front of node `d` leaves the relay from a socket that stands for `s`
//! at `d`, and `d`'s replies come back the same way:
//!
//! ```text
//! s:listen --> front of d --> (s at d) --> d:listen
//! s:listen <-- front of d <-- (s at d) <-- d:listen
//! ```
//!
//! Nodes dial from the socket that they listen on, so its address says who
//! sends. Each direction of each pair is a link of its own ([`Links`]), which
//! carries the connections made by either side. Loopback and user space only:
//! works without privileges. Not here: who cuts what, and when.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use rand::Rng;
use socket2::{Domain, Socket, Type};
use tokio::net::UdpSocket;
use tokio::task::JoinSet;
use tokio::time::sleep;

/// Longest datagram.
const DATAGRAM_BYTES_MAX: usize = 65_535;
/// Asked of the kernel for each socket: bursts must not be lost here by accident.
const SOCKET_BUFFER_BYTES: usize = 2 * 1024 * 1024;

/// How one direction between two nodes is.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Link {
    /// Nothing passes.
    pub cut: bool,
    /// Share of the datagrams that are lost.
    pub loss: f64,
    /// Each datagram takes up to this long, so they overtake one another.
    pub delay_max: Duration,
}

impl Link {
    /// Nothing passes.
    pub const CUT: Link = Link {
        cut: true,
        loss: 0.0,
        delay_max: Duration::ZERO,
    };
}

/// All links of a cluster; a clone is the same network. Nodes count from 1.
#[derive(Clone, Debug)]
pub struct Links {
    nodes: usize,
    /// `from` and `to`, counted from 0: `links[from * nodes + to]`.
    links: Arc<Mutex<Vec<Link>>>,
    lost: Arc<AtomicU64>,
}

impl Links {
    /// A network in order.
    pub fn new(nodes: usize) -> Links {
        Links {
            nodes,
            links: Arc::new(Mutex::new(vec![Link::default(); nodes * nodes])),
            lost: Arc::default(),
        }
    }

    /// Number of nodes.
    pub fn nodes(&self) -> usize {
        self.nodes
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Link>> {
        self.links.lock().expect("no panic while held")
    }

    /// The link from one node to another.
    pub fn get(&self, from: u64, to: u64) -> Link {
        self.lock()[self.index(from, to)]
    }

    /// Changes the link from one node to another.
    pub fn set(&self, from: u64, to: u64, link: Link) {
        let index = self.index(from, to);
        self.lock()[index] = link;
    }

    /// Changes each link that `chosen(from, to)` names, at once.
    pub fn set_where(&self, link: Link, chosen: impl Fn(u64, u64) -> bool) {
        let mut links = self.lock();
        for from in 1..=self.nodes as u64 {
            for to in 1..=self.nodes as u64 {
                if from != to && chosen(from, to) {
                    links[self.index(from, to)] = link;
                }
            }
        }
    }

    /// Everything in order again.
    pub fn heal(&self) {
        self.set_where(Link::default(), |_, _| true);
    }

    /// Datagrams that did not pass, since the start.
    pub fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }

    fn index(&self, from: u64, to: u64) -> usize {
        (from as usize - 1) * self.nodes + to as usize - 1
    }

    /// What becomes of a datagram: `None` when it is lost, else how long it takes.
    fn fate(&self, from: u64, to: u64) -> Option<Duration> {
        let link = self.get(from, to);
        let mut rng = rand::rng();
        if link.cut || (link.loss > 0.0 && rng.random_bool(link.loss)) {
            self.lost.fetch_add(1, Ordering::Relaxed);
            return None;
        }
        Some(link.delay_max.mul_f64(rng.random()))
    }
}

/// Where a node listens for its peers, and where they are to reach it.
#[derive(Clone, Copy, Debug)]
pub struct Ends {
    /// The node's own socket.
    pub listen: SocketAddr,
    /// The relay's, as advertised.
    pub front: SocketAddr,
}

/// The relay of a cluster. Stops when dropped.
#[derive(Debug)]
pub struct Relay {
    /// What to cut.
    pub links: Links,
    _tasks: JoinSet<()>,
}

impl Relay {
    /// Carries slices and, on the ports after those, control traffic between
    /// nodes 1, 2, ... as `ends` lists them.
    ///
    /// # Errors
    /// A port that cannot be had.
    pub fn start(ends: &[Ends]) -> io::Result<Relay> {
        let links = Links::new(ends.len());
        let mut tasks = JoinSet::new();
        for port in [0, 1] {
            let ends: Vec<Ends> = ends.iter().map(|e| e.next_port(port)).collect();
            for to in 0..ends.len() {
                join_up(&ends, to, &links, &mut tasks)?;
            }
        }
        Ok(Relay {
            links,
            _tasks: tasks,
        })
    }
}

impl Ends {
    fn next_port(mut self, offset: u16) -> Ends {
        self.listen.set_port(self.listen.port() + offset);
        self.front.set_port(self.front.port() + offset);
        self
    }
}

/// The front of one node, and the sockets that stand for the others there.
fn join_up(ends: &[Ends], to: usize, links: &Links, tasks: &mut JoinSet<()>) -> io::Result<()> {
    let id = |index: usize| index as u64 + 1;
    let front = Arc::new(socket(ends[to].front)?);
    let listen = ends[to].listen;
    let mut stand_ins = Vec::new();
    for (from, end) in ends.iter().enumerate() {
        let stand_in = Arc::new(socket((Ipv4Addr::LOCALHOST, 0).into())?);
        stand_ins.push((end.listen, stand_in.clone()));
        if from == to {
            continue;
        }
        let (front, links, back_to) = (front.clone(), links.clone(), end.listen);
        tasks.spawn(pass_on(stand_in, move |sender| {
            let fate = links.fate(id(to), id(from))?;
            (sender == listen).then(|| (front.clone(), back_to, fate))
        }));
    }
    let links = links.clone();
    tasks.spawn(pass_on(front, move |sender| {
        let from = stand_ins.iter().position(|(end, _)| *end == sender)?;
        let fate = links.fate(id(from), id(to))?;
        Some((stand_ins[from].1.clone(), listen, fate))
    }));
    Ok(())
}

/// Forwards what `socket` receives, as `route` says of its sender: from which
/// socket, where to, and after how long.
async fn pass_on(
    socket: Arc<UdpSocket>,
    route: impl Fn(SocketAddr) -> Option<(Arc<UdpSocket>, SocketAddr, Duration)>,
) {
    let mut buffer = vec![0; DATAGRAM_BYTES_MAX];
    loop {
        // An error tells of an earlier datagram that met a closed port.
        let Ok((length, sender)) = socket.recv_from(&mut buffer).await else {
            continue;
        };
        let Some((by, to, delay)) = route(sender) else {
            continue;
        };
        // What cannot be sent is lost, as on any network.
        if delay.is_zero() {
            let _ = by.send_to(&buffer[..length], to).await;
        } else {
            let datagram = buffer[..length].to_vec();
            tokio::spawn(async move {
                sleep(delay).await;
                let _ = by.send_to(&datagram, to).await;
            });
        }
    }
}

fn socket(address: SocketAddr) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::IPV4, Type::DGRAM, None)?;
    // The kernel may give less.
    let _ = socket.set_recv_buffer_size(SOCKET_BUFFER_BYTES);
    let _ = socket.set_send_buffer_size(SOCKET_BUFFER_BYTES);
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    UdpSocket::from_std(socket.into())
}

#[cfg(test)]
mod tests {
    use tokio::time::timeout;

    use super::*;

    /// Long enough for a datagram on loopback that is sent again and again.
    const PATIENCE: Duration = Duration::from_secs(60);

    /// Two nodes' sockets, and their relay.
    async fn pair() -> (Vec<UdpSocket>, Vec<Ends>, Relay) {
        // Pairs of neighbouring ports, for the control traffic that is not used here.
        let mut ends = Vec::new();
        let mut nodes = Vec::new();
        let mut claimed = Vec::new();
        for _ in 0..2 {
            let ports = crate::cluster::Ports::claim();
            nodes.push(UdpSocket::bind(ports.at(3)).await.unwrap());
            ends.push(Ends {
                listen: ports.at(3),
                front: ports.at(5),
            });
            claimed.push(ports);
        }
        let relay = Relay::start(&ends).unwrap();
        (nodes, ends, relay)
    }

    async fn receive(socket: &UdpSocket) -> (Vec<u8>, SocketAddr) {
        let mut buffer = [0; 100];
        let (length, sender) = timeout(PATIENCE, socket.recv_from(&mut buffer))
            .await
            .expect("a datagram in time")
            .unwrap();
        (buffer[..length].to_vec(), sender)
    }

    #[tokio::test]
    async fn replies_come_from_where_the_request_went() {
        let (nodes, ends, _relay) = pair().await;
        nodes[0].send_to(b"hello", ends[1].front).await.unwrap();
        let (text, sender) = receive(&nodes[1]).await;
        assert_eq!(text, b"hello");
        assert_ne!(sender, ends[0].listen);
        nodes[1].send_to(b"yes?", sender).await.unwrap();
        assert_eq!(receive(&nodes[0]).await, (b"yes?".to_vec(), ends[1].front));
    }

    #[tokio::test]
    async fn each_direction_is_cut_by_itself() {
        let (nodes, ends, relay) = pair().await;
        relay.links.set(1, 2, Link::CUT);
        nodes[0].send_to(b"lost", ends[1].front).await.unwrap();
        nodes[1].send_to(b"there", ends[0].front).await.unwrap();
        let (text, sender) = receive(&nodes[0]).await;
        assert_eq!(text, b"there");
        // Also what goes back on a connection that the other side has made.
        nodes[0].send_to(b"lost, too", sender).await.unwrap();
        let both = async {
            while relay.links.lost() < 2 {
                tokio::task::yield_now().await;
            }
        };
        timeout(PATIENCE, both).await.expect("both are lost");
        relay.links.heal();
        nodes[0].send_to(b"late", ends[1].front).await.unwrap();
        assert_eq!(receive(&nodes[1]).await.0, b"late");
    }
}
