//! Machines, clocks, network, faults and clients around the code under test.
//!
//! One queue of events in simulated nanoseconds, one generator of random
//! numbers: equal seeds, equal runs.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::rc::Rc;
use std::time::Duration;

use pingora_slice_cluster::lease::{
    Grant, Incarnation, Input, LeaseHolder, LeaseTable, Output, Renewal,
};
use pingora_slice_cluster::members::{Member, NodeState, Role};
use pingora_slice_cluster::purge::{PurgeItem, PurgeMode, Scope, Subject};
use pingora_slice_cluster::slice::HashKey;
use pingora_slice_cluster::state::{ClusterState, Command};
use pingora_slice_cluster::{NodeId, PurgeIndex};

use crate::check::{HOST, History, OBJECTS, PREFIXES, Purge, TAGS, What, tags};
use crate::engine::Flight;
use crate::raft::{Log, Raft};

/// Nanoseconds of simulated, true time.
pub type Time = u64;
pub type Key = usize;
pub const MS: Time = 1_000_000;
pub const NODES: usize = 6;
pub const VOTERS: usize = 3;
const LEASE: Duration = Duration::from_secs(1);
/// How long clients and faults go on.
const RUN: Time = 14_000 * MS;
const KEY: HashKey = HashKey([9; 16]);

/// The deliberate mistakes, one at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Defect {
    QuorumOnly,
    StampAtEnd,
    JoinOldFlight,
    PeerCopyUnchecked,
    PeerCopyRestamped,
    FencedServes,
    AckBeforeApplying,
    NewLeaderDoesNotWait,
    GrantToLagging,
    DeadlineFromReceipt,
    ClockOff6Percent,
    ClockStopsInPause,
    FloorsLostOnRestart,
    NoReadRound,
    StampUncommitted,
    LeaseSurvivesRestart,
    CheckedHoldsIndex,
    SnapshotLowersFloors,
    TagsUnknownWhenJoining,
    ConfirmStampsNow,
    // Beyond the twenty of the protocol's text.
    /// A request that found no lease joins a flight from before it arrived.
    FencedJoins,
    /// Rules 3 and 4 in the wrong order, with a disk read between them.
    FloorBeforeLease,
    /// A new leader forgets who has left the cluster.
    RetiredNotWaitedFor,
}

/// A stored manifest.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    pub version: u64,
    pub stamp: PurgeIndex,
    /// The version of the floors it was last verified at; in memory only.
    pub checked: u64,
    /// For the checker alone.
    pub confirmed: Time,
    /// For the checker alone.
    pub born: Time,
}

#[derive(Clone, Debug)]
pub enum Msg {
    Vote {
        term: u64,
        last: (u64, usize),
    },
    VoteGranted {
        term: u64,
    },
    Append {
        term: u64,
        log: Log,
        commit: usize,
        probe: u64,
    },
    Appended {
        term: u64,
        matched: usize,
        probe: u64,
    },
    Snapshot {
        bytes: Rc<Vec<u8>>,
    },
    Renew(Renewal),
    Granted(Grant),
    Acked {
        from: Incarnation,
        applied: PurgeIndex,
    },
    Purge {
        token: u128,
    },
    Purged {
        token: u128,
    },
    Ask {
        key: Key,
        flight: u64,
        floor: PurgeIndex,
    },
    Answer {
        flight: u64,
        entry: Option<Entry>,
    },
}

#[derive(Clone, Debug)]
pub enum Event {
    Deliver {
        from: usize,
        msg: Msg,
    },
    Tick,
    TableTick,
    ClientRead {
        key: Key,
        arrived: Time,
    },
    DiskRead {
        key: Key,
        arrived: Time,
        judged: Option<Entry>,
    },
    ClientPurges,
    RetryPurge {
        token: u128,
        tries: u32,
    },
    AskTimedOut {
        flight: u64,
    },
    OriginReached {
        flight: u64,
    },
    OriginAnswered {
        flight: u64,
        version: u64,
    },
    Fault,
    Heal {
        links: Vec<(usize, usize)>,
    },
    Resume,
    Restart,
}

struct Queued {
    at: Time,
    seq: u64,
    node: usize,
    /// The process that the event belongs to; `None`: whatever runs there.
    process: Option<u64>,
    event: Event,
}

impl PartialEq for Queued {
    fn eq(&self, other: &Queued) -> bool {
        self.seq == other.seq
    }
}
impl Eq for Queued {}
impl PartialOrd for Queued {
    fn partial_cmp(&self, other: &Queued) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Queued {
    fn cmp(&self, other: &Queued) -> std::cmp::Ordering {
        (self.at, self.seq).cmp(&(other.at, other.seq))
    }
}

pub struct Node {
    pub raft: Raft,
    pub state: ClusterState,
    /// Bumped after floors rise; in memory only.
    pub version: u64,
    pub table: LeaseTable,
    pub holder: LeaseHolder,
    pub process: u64,
    /// Purges proposed here: token to whoever asked.
    pub proposals: BTreeMap<u128, usize>,
    /// Purges committed and not settled.
    pub waiting: BTreeMap<PurgeIndex, Vec<(usize, u128)>>,
    pub memory: [Option<Entry>; OBJECTS.len()],
    pub disk: [Option<Entry>; OBJECTS.len()],
    pub flights: BTreeMap<u64, Flight>,
    pub current: [Option<u64>; OBJECTS.len()],
    /// The highest index that a lease of this leader demands.
    pub needed: PurgeIndex,
    /// A snapshot on disk; a crash may lose what was applied since (rule 15
    /// forbids it, but leases do not depend on that).
    pub saved: Vec<u8>,
    pub apply_stalled_until: Time,
    pub deadline_before_restart: Duration,
    feed_stalled_until: Time,
    up: bool,
    paused: bool,
    /// What reached it while it was paused.
    inbox: Vec<(Option<u64>, Event)>,
    /// Local time = offset + true time x rate / 1000.
    clock_offset: Time,
    clock_rate: Time,
    /// Where the clock stops in a pause: what it missed, and since when.
    clock_lost: Time,
    paused_at: Time,
    table_tick_at: Option<Duration>,
}

pub struct Rng(u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    pub fn range(&mut self, from: u64, to: u64) -> u64 {
        from + self.next() % (to - from)
    }

    pub fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    pub fn chance(&mut self, percent: u64) -> bool {
        self.next() % 100 < percent
    }
}

pub struct World {
    pub now: Time,
    pub rng: Rng,
    pub nodes: Vec<Node>,
    /// The version of each object.
    pub origin: [u64; OBJECTS.len()],
    pub history: History,
    pub defect: Option<Defect>,
    pub flight_ids: u64,
    /// Names of each object with the tags of even and odd versions, and without.
    pub subjects: Vec<[Subject; 3]>,
    queue: BinaryHeap<Reverse<Queued>>,
    seq: u64,
    /// How many faults cut each link.
    cut: [[u8; NODES]; NODES],
    loss_percent: u64,
    slow_percent: u64,
    trace: bool,
    pub events: u64,
}

/// One run; what happened.
pub fn run(seed: u64, defect: Option<Defect>, trace: bool) -> History {
    let mut world = World::new(seed, defect, trace);
    world.schedule_clients();
    while let Some(Reverse(next)) = world.queue.pop() {
        if next.at > RUN || world.history.violation.is_some() {
            break;
        }
        world.now = next.at;
        world.events += 1;
        world.dispatch(next.node, next.process, next.event);
    }
    world.history.digest ^= world.events;
    world.history
}

impl World {
    fn new(seed: u64, defect: Option<Defect>, trace: bool) -> World {
        let mut rng = Rng(seed);
        let mut log = vec![];
        let found = Command::Found {
            hash_key: KEY,
            lease: LEASE,
        };
        log.push((1, Some(Rc::new(found))));
        for n in 0..NODES {
            let member = Member {
                id: NodeId(n as u64 + 1),
                machine: n as u128,
                advertise: format!("node{n}:7001"),
                role: if n < VOTERS { Role::Voter } else { Role::Edge },
                weight: 1,
                state: NodeState::Active,
            };
            log.push((1, Some(Rc::new(Command::NodeJoin(member)))));
        }
        let mut state = ClusterState::default();
        for (index, (_, command)) in log.iter().enumerate() {
            state.apply(index as u64 + 1, command.as_ref().expect("a command"));
        }
        let log: Log = Rc::new(log);
        let nodes = (0..NODES)
            .map(|n| {
                // A3: within 1 % of the right rate.
                let mut clock_rate = rng.range(990, 1011);
                if defect == Some(Defect::ClockOff6Percent) && n >= VOTERS {
                    clock_rate = 940;
                }
                Node {
                    raft: Raft::new(Rc::clone(&log)),
                    state: state.clone(),
                    version: 1,
                    table: LeaseTable::default(),
                    holder: LeaseHolder::new(incarnation(n, 1), LEASE),
                    process: 1,
                    proposals: BTreeMap::new(),
                    waiting: BTreeMap::new(),
                    memory: [None; OBJECTS.len()],
                    disk: [None; OBJECTS.len()],
                    flights: BTreeMap::new(),
                    current: [None; OBJECTS.len()],
                    needed: PurgeIndex(0),
                    saved: state.to_bytes(),
                    apply_stalled_until: 0,
                    deadline_before_restart: Duration::ZERO,
                    feed_stalled_until: 0,
                    up: true,
                    paused: false,
                    inbox: Vec::new(),
                    clock_offset: rng.range(0, 1_000_000) * MS,
                    clock_rate,
                    clock_lost: 0,
                    paused_at: 0,
                    table_tick_at: None,
                }
            })
            .collect();
        let subject = |key: Key, tags: &[&str]| Subject::new(&KEY, HOST, OBJECTS[key].0, tags);
        let subjects = (0..OBJECTS.len())
            .map(|key| {
                [
                    subject(key, tags(key, 0)),
                    subject(key, tags(key, 1)),
                    subject(key, &[]),
                ]
            })
            .collect();
        World {
            now: 0,
            rng,
            nodes,
            origin: [0; OBJECTS.len()],
            history: History::default(),
            defect,
            flight_ids: 0,
            subjects,
            queue: BinaryHeap::new(),
            seq: 0,
            cut: [[0; NODES]; NODES],
            loss_percent: 1,
            slow_percent: 4,
            trace,
            events: 0,
        }
    }

    fn schedule_clients(&mut self) {
        for n in 0..NODES {
            let at = self.rng.range(0, 50) * MS;
            self.at(at, n, None, Event::Tick);
        }
        let mut at = 500 * MS;
        while at < RUN {
            let (n, key) = (self.rng.below(NODES), self.rng.below(OBJECTS.len()));
            self.at(at, n, None, Event::ClientRead { key, arrived: at });
            at += self.rng.range(5, 45) * MS;
        }
        let mut at = 1500 * MS;
        while at < RUN {
            let n = self.rng.below(NODES);
            self.at(at, n, None, Event::ClientPurges);
            at += self.rng.range(100, 700) * MS;
        }
        let mut at = 1500 * MS;
        while at < RUN {
            self.at(at, 0, None, Event::Fault);
            at += self.rng.range(300, 2200) * MS;
        }
    }

    fn at(&mut self, at: Time, node: usize, process: Option<u64>, event: Event) {
        self.seq += 1;
        self.queue.push(Reverse(Queued {
            at,
            seq: self.seq,
            node,
            process,
            event,
        }));
    }

    /// Something that only the present process of `n` will see.
    pub fn later(&mut self, n: usize, delay: Time, event: Event) {
        let process = Some(self.nodes[n].process);
        self.at(self.now + delay, n, process, event);
    }

    /// The boot clock of a node.
    pub fn clock(&self, n: usize) -> Duration {
        let node = &self.nodes[n];
        let run = (self.now - node.clock_lost) / 1000 * node.clock_rate;
        Duration::from_nanos(node.clock_offset + run)
    }

    /// The wall clock of a node: nobody set it.
    fn wall(&self, n: usize) -> Duration {
        self.clock(n) + Duration::from_secs(1_000_000)
    }

    pub fn send(&mut self, from: usize, to: usize, msg: Msg) {
        let mut delay = self.rng.range(200, 5000) * 1000;
        if self.rng.chance(self.slow_percent) {
            delay = self.rng.range(5, 1200) * MS;
        }
        if from == to {
            delay = 1000;
        } else if self.cut[from][to] > 0 || self.rng.chance(self.loss_percent) {
            return;
        }
        self.at(self.now + delay, to, None, Event::Deliver { from, msg });
    }

    fn dispatch(&mut self, n: usize, process: Option<u64>, event: Event) {
        match event {
            Event::Fault => return self.fault(),
            Event::Heal { links } => {
                for (from, to) in links {
                    self.cut[from][to] -= 1;
                }
                return;
            }
            Event::Resume => return self.resume(n),
            Event::Restart => return self.restart(n),
            _ => {}
        }
        let node = &mut self.nodes[n];
        if node.paused {
            // Clients reach it, sockets fill; timers fire late.
            node.inbox.push((process, event));
            return;
        }
        if !node.up || process.is_some_and(|process| process != node.process) {
            return;
        }
        if self.trace {
            eprintln!("{:>12} node {n} {event:?}", self.now);
        }
        self.handle(n, event);
    }

    fn handle(&mut self, n: usize, event: Event) {
        match event {
            Event::Deliver { from, msg } => self.deliver(n, from, msg),
            Event::Tick => {
                self.later(n, 50 * MS, Event::Tick);
                self.raft_tick(n);
                self.apply_committed(n);
                self.renew(n);
            }
            Event::TableTick => {
                self.nodes[n].table_tick_at = None;
                self.table(n, Input::Tick);
            }
            Event::ClientRead { key, arrived } => self.client_reads(n, key, arrived),
            Event::DiskRead {
                key,
                arrived,
                judged,
            } => self.disk_read(n, key, arrived, judged),
            Event::ClientPurges => self.client_purges(n),
            Event::RetryPurge { token, tries } => self.forward_purge(n, token, tries),
            Event::AskTimedOut { flight } => self.ask_failed(n, flight),
            Event::OriginReached { flight } => self.origin_reached(n, flight),
            Event::OriginAnswered { flight, version } => self.origin_answered(n, flight, version),
            Event::Fault | Event::Heal { .. } | Event::Resume | Event::Restart => {}
        }
    }

    fn deliver(&mut self, n: usize, from: usize, msg: Msg) {
        match msg {
            Msg::Vote { term, last } => self.vote_asked(n, from, term, last),
            Msg::VoteGranted { term } => self.vote_received(n, from, term),
            Msg::Append {
                term,
                log,
                commit,
                probe,
            } => {
                if self.now < self.nodes[n].feed_stalled_until {
                    return;
                }
                self.append(n, from, (term, log, commit, probe));
            }
            Msg::Appended {
                term,
                matched,
                probe,
            } => {
                self.appended(n, from, term, (matched, probe));
                // The log feed is only one of two ways to catch up.
                if self.nodes[n].raft.leads() && from != n && self.rng.chance(6) {
                    let bytes = Rc::new(self.nodes[n].state.to_bytes());
                    self.send(n, from, Msg::Snapshot { bytes });
                }
            }
            Msg::Snapshot { bytes } => {
                if self.now >= self.nodes[n].feed_stalled_until {
                    self.snapshot_received(n, &bytes);
                }
            }
            Msg::Renew(mut renewal) => {
                if !self.nodes[n]
                    .state
                    .members()
                    .contains_key(&renewal.from.node)
                {
                    return;
                }
                if self.defect == Some(Defect::GrantToLagging) {
                    // Exactly what it takes to pass, which no purge waits for any more.
                    renewal.applied = renewal.applied.max(self.nodes[n].needed);
                }
                self.table(n, Input::Renew(renewal));
            }
            Msg::Acked { from, applied } => self.table(n, Input::Acked { from, applied }),
            Msg::Granted(mut grant) => {
                let (now, wall) = (self.clock(n), self.wall(n));
                if self.defect == Some(Defect::DeadlineFromReceipt) {
                    grant.sent_at = now;
                }
                self.nodes[n].holder.granted(now, wall, &grant);
            }
            Msg::Purge { token } => {
                if self.nodes[n].raft.leads() {
                    self.nodes[n].proposals.insert(token, from);
                    let purge = &self.history.purges[token as usize];
                    let item = PurgeItem {
                        scope: scope(purge.what),
                        mode: purge.mode,
                    };
                    self.propose(
                        n,
                        Command::Purge {
                            items: vec![item],
                            token,
                        },
                    );
                }
            }
            Msg::Purged { token } => self.purge_answered(token),
            Msg::Ask { key, flight, floor } => self.peer_asked(n, from, key, flight, floor),
            Msg::Answer { flight, entry } => self.peer_answered(n, flight, entry),
        }
    }

    fn renew(&mut self, n: usize) {
        let (now, wall) = (self.clock(n), self.wall(n));
        let node = &mut self.nodes[n];
        let renewal = node.holder.renewal(now, wall, node.state.applied());
        if let (Some(renewal), Some(leader)) = (renewal, node.raft.leader) {
            self.send(n, leader, Msg::Renew(renewal));
        }
    }

    pub fn acknowledge(&mut self, n: usize) {
        let node = &self.nodes[n];
        let mut applied = node.state.applied();
        if self.defect == Some(Defect::AckBeforeApplying) {
            applied = PurgeIndex(node.raft.commit as u64).max(applied);
        }
        if let Some(leader) = node.raft.leader {
            self.send(
                n,
                leader,
                Msg::Acked {
                    from: self.me(n),
                    applied,
                },
            );
        }
    }

    fn me(&self, n: usize) -> Incarnation {
        incarnation(n, self.nodes[n].process)
    }

    /// Steps the lease table and does what it says.
    pub fn table(&mut self, n: usize, input: Input) {
        let now = self.clock(n);
        let outputs = self.nodes[n].table.step(now, input);
        for output in outputs {
            match output {
                Output::StartRound { round } => {
                    if self.defect == Some(Defect::NoReadRound) {
                        let term = self.nodes[n].raft.reign;
                        self.table(n, Input::RoundConfirmed { round, term });
                    } else if !self.start_round(n, round) {
                        self.table(n, Input::RoundFailed { round });
                    }
                }
                Output::Granted(grant) => {
                    self.send(n, grant.to.node.0 as usize - 1, Msg::Granted(grant));
                }
                Output::Refused { .. } => {}
                Output::Settled { index, .. } => {
                    self.nodes[n].needed = self.nodes[n].needed.max(index);
                    for (from, token) in self.nodes[n].waiting.remove(&index).unwrap_or_default() {
                        self.send(n, from, Msg::Purged { token });
                    }
                }
                Output::Unsettled { index } => {
                    self.nodes[n].waiting.remove(&index);
                }
            }
        }
        let node = &self.nodes[n];
        let next = node.table.next_tick();
        if let Some(at) = next
            && node.table_tick_at.is_none_or(|due| at < due)
        {
            // One millisecond of rounding between a node's clock and the queue.
            let wait = at.saturating_sub(now).as_nanos() as Time / node.clock_rate * 1000 + 2000;
            self.nodes[n].table_tick_at = next;
            self.later(n, wait, Event::TableTick);
        }
    }

    fn client_purges(&mut self, n: usize) {
        let what = match self.rng.below(10) {
            0 => What::All,
            1 => What::Host,
            2..=4 => What::Url(self.rng.below(OBJECTS.len())),
            5..=6 => What::Prefix(PREFIXES[self.rng.below(PREFIXES.len())]),
            _ => What::Tag(TAGS[self.rng.below(TAGS.len())]),
        };
        let mode = if self.rng.chance(20) {
            PurgeMode::Hard
        } else {
            PurgeMode::Plain
        };
        for key in 0..OBJECTS.len() {
            if what.covers(key, self.origin[key]) && self.rng.chance(80) {
                self.origin[key] += 1;
            }
        }
        let token = self.history.purges.len() as u128;
        self.history.purges.push(Purge {
            what,
            mode,
            invoked: self.now,
            answered: None,
        });
        self.forward_purge(n, token, 4);
    }

    /// To the leader, and again with the same token until it is answered (rule 16).
    fn forward_purge(&mut self, n: usize, token: u128, tries: u32) {
        if tries == 0 || self.history.purges[token as usize].answered.is_some() {
            return;
        }
        if let Some(leader) = self.nodes[n].raft.leader {
            self.send(n, leader, Msg::Purge { token });
        }
        self.later(
            n,
            600 * MS,
            Event::RetryPurge {
                token,
                tries: tries - 1,
            },
        );
    }

    /// 200: everyone looks at once.
    fn purge_answered(&mut self, token: u128) {
        let purge = &mut self.history.purges[token as usize];
        if purge.answered.is_some() {
            return;
        }
        purge.answered = Some(self.now);
        let what = purge.what;
        for n in 0..NODES {
            for _ in 0..2 {
                let arrived = self.now + 1 + self.rng.range(0, 70) * MS;
                let mut key = self.rng.below(OBJECTS.len());
                if !what.covers(key, self.origin[key]) {
                    key = self.rng.below(OBJECTS.len());
                }
                self.at(arrived, n, None, Event::ClientRead { key, arrived });
            }
        }
    }

    fn fault(&mut self) {
        let leader = (0..VOTERS).find(|n| self.nodes[*n].raft.leads());
        let chosen = if self.rng.chance(35) { leader } else { None };
        let n = chosen.unwrap_or_else(|| self.rng.below(NODES));
        let long = self.rng.range(100, 3500) * MS;
        match self.rng.below(12) {
            // Cut off: from everyone, in one direction, or with a few others.
            0 | 1 => self.partition(long, |from, to| (from == n) != (to == n)),
            2 => self.partition(long, |from, _| from == n),
            3 => {
                let side = self.rng.next() | 1 << n;
                self.partition(long, |from, to| (side >> from & 1) != (side >> to & 1));
            }
            4 | 5 => {
                let node = &mut self.nodes[n];
                if node.up && !node.paused {
                    node.paused = true;
                    node.paused_at = self.now;
                    self.at(self.now + long, n, None, Event::Resume);
                }
            }
            6 => {
                let node = &mut self.nodes[n];
                if node.up && !node.paused {
                    node.up = false;
                    let most = if self.rng.chance(50) { 100 } else { 1500 };
                    let down = self.rng.range(10, most) * MS;
                    self.at(self.now + down, n, None, Event::Restart);
                }
            }
            7 => {
                let until = self.now + long;
                let node = &mut self.nodes[n];
                if self.rng.chance(50) {
                    node.apply_stalled_until = until;
                } else {
                    node.feed_stalled_until = until;
                }
            }
            // A voter loses patience for no reason, and perhaps the leader then does.
            8 | 9 => {
                let voter = self.rng.below(VOTERS);
                self.nodes[voter].raft.election_due = 0;
                if self.rng.chance(50) {
                    self.nodes[n.min(VOTERS - 1)].apply_stalled_until = self.now + long;
                }
            }
            10 => {
                // An edge leaves for good, and the leader who knew its lease is gone too.
                if let Some(leader) = leader.filter(|_| self.now > RUN / 2) {
                    self.propose(leader, Command::NodeLeave(NodeId(NODES as u64)));
                    let voter = self.rng.below(VOTERS);
                    self.nodes[voter].raft.election_due = self.now + self.rng.range(5, 300) * MS;
                }
            }
            _ => {
                self.loss_percent = self.rng.range(0, 25);
                self.slow_percent = self.rng.range(0, 30);
            }
        }
    }

    fn partition(&mut self, long: Time, cuts: impl Fn(usize, usize) -> bool) {
        let all = (0..NODES).flat_map(|from| (0..NODES).map(move |to| (from, to)));
        let links: Vec<_> = all.filter(|(from, to)| cuts(*from, *to)).collect();
        for (from, to) in &links {
            self.cut[*from][*to] += 1;
        }
        self.at(self.now + long, 0, None, Event::Heal { links });
    }

    fn resume(&mut self, n: usize) {
        let node = &mut self.nodes[n];
        node.paused = false;
        if self.defect == Some(Defect::ClockStopsInPause) {
            node.clock_lost += self.now - node.paused_at;
        }
        for (process, event) in std::mem::take(&mut node.inbox) {
            self.dispatch(n, process, event);
        }
    }

    fn restart(&mut self, n: usize) {
        let now = self.now;
        let lost = self.defect == Some(Defect::FloorsLostOnRestart);
        let node = &mut self.nodes[n];
        node.up = true;
        node.process += 1;
        node.raft.restart(now);
        let me = self.me(n);
        let node = &mut self.nodes[n];
        node.deadline_before_restart = node.holder.deadline();
        node.holder = LeaseHolder::new(me, LEASE);
        node.table = LeaseTable::default();
        node.table_tick_at = None;
        let saved = std::mem::take(&mut node.saved);
        node.saved = if self.rng.chance(50) {
            node.state.to_bytes()
        } else {
            saved
        };
        node.state = ClusterState::from_bytes(&node.saved).expect("our own snapshot");
        if lost {
            let applied = node.state.applied().0;
            node.state = ClusterState::default();
            for index in 0..=NODES {
                let command = node.raft.log[index].1.clone().expect("a founding entry");
                node.state.apply(index as u64 + 1, &command);
            }
            node.state.advance(applied);
        }
        // Catching up takes its time.
        if self.rng.chance(50) {
            node.apply_stalled_until = now + self.rng.range(10, 1000) * MS;
        }
        node.version = 1;
        node.memory = [None; OBJECTS.len()];
        node.flights.clear();
        node.current = [None; OBJECTS.len()];
        node.proposals.clear();
        node.waiting.clear();
        self.later(n, MS, Event::Tick);
    }
}

fn incarnation(n: usize, process: u64) -> Incarnation {
    Incarnation {
        node: NodeId(n as u64 + 1),
        process,
    }
}

fn scope(what: What) -> Scope {
    match what {
        What::All => Scope::All,
        What::Host => Scope::host(&KEY, HOST),
        What::Url(key) => Scope::url(&KEY, HOST, OBJECTS[key].0),
        What::Prefix(prefix) => Scope::prefix(&KEY, HOST, prefix),
        What::Tag(tag) => Scope::tag(&KEY, tag),
    }
}
