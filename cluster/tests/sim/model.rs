//! Rules 9 to 16, explored exhaustively: a few nodes run the real lease table,
//! lease holder and floors, and every order of what may happen to them within
//! some [`Bounds`] is looked at.
//!
//! Raft is what it promises and nothing more: one log of committed entries, a
//! leader per term who has them all and learns late that it was deposed, and
//! reads that succeed only while no later leader has been elected. Time goes
//! in steps of half a lease, the same for all: clocks that differ are the
//! simulation's business. Those that lead and those that serve are different nodes, as no
//! rule looks from one role into the other.
//!
//! Whatever is lost, late, or standing still is a step that comes later or
//! never. Two delays are left out, as they only make leases shorter: a renewal
//! arrives in the step in which it was sent or nowhere, and a grant arrives at
//! once (but for `late_grants`). A read is proven when it begins, where it can
//! be: a later proof proves more.
//!
//! Breadth first, over 128-bit hashes of the states: the shortest
//! counter-example comes first, and is printed step by step.

use std::collections::{HashSet, VecDeque};
use std::hash::Hash;
use std::time::Duration;

use pingora_slice_cluster::lease::{
    Grant, Incarnation, Input, LeaseHolder, LeaseTable, Output, Renewal,
};
use pingora_slice_cluster::purge::{Floor, Floors, PurgeMode, Scope, Subject};
use pingora_slice_cluster::{NodeId, PurgeIndex};
use siphasher::sip128::{Hasher128, SipHasher13};

const STEP: Duration = Duration::from_secs(1);
const LEASE: Duration = Duration::from_secs(2);
/// The first entry of every log: everybody has applied it.
const FOUNDED: u64 = 1;
const URL: u64 = 7;

/// How much may happen.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Nodes that may lead; the first one does.
    pub leaders: usize,
    /// Nodes that serve.
    pub servers: usize,
    /// Elections after the first.
    pub elections: u8,
    /// Purges of one URL.
    pub purges: u8,
    /// Crashes of leaders and servers: another process, which starts afresh.
    pub restarts: u8,
    /// Orderly stops.
    pub stops: u8,
    /// Grants may be under way for any time.
    pub late_grants: bool,
    /// Steps of half a lease.
    pub steps: u8,
}

/// The deliberate mistakes, one at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mistake {
    /// A purge is answered once it is committed.
    QuorumOnly,
    /// A node acknowledges what is committed, not what its floors show.
    AckBeforeApplying,
    /// A new leader's table begins empty.
    NewLeaderDoesNotWait,
    /// A new leader grants to nodes that have not reached its first entry.
    NoFirstEntry,
    /// Whoever asks is believed to have caught up.
    GrantToLagging,
    /// No linearizable read before a grant.
    NoReadRound,
    /// A round counts for the term of the table, whatever term it was proven in.
    RoundOfAnotherTerm,
    /// A lease counts from when the grant arrives.
    DeadlineFromReceipt,
    /// A new process goes on with the lease of the one before.
    LeaseSurvivesRestart,
    /// A new process has the number of the one before.
    ProcessesNotCounted,
    /// What was applied is remembered, what it raised is not.
    FloorsLostOnRestart,
    /// A node that has given up its lease goes on serving.
    StoppedServes,
}

/// One thing that happens, to or at a leader `l` or a server `s`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Act {
    /// Half a lease passes.
    TimePasses,
    /// `l` is elected.
    Elected(usize),
    /// `l` has applied the first entry of its term: its table begins.
    Leads(usize),
    /// `l` learns that its term is over.
    Follows(usize),
    /// A purge that `l` has proposed is committed.
    Purges(usize),
    /// `l`'s table is told of it.
    Tells(usize),
    /// A quorum confirms `l`'s read, in a later term than the read began in.
    RoundProven(usize),
    /// `l`'s table hears that a quorum has.
    RoundConfirmed(usize),
    /// `l`'s table hears that none would.
    RoundFails(usize),
    /// A lease ends that a purge of `l`'s table waits for.
    TableTicks(usize),
    /// `l` crashes; openraft lets it go on in its term.
    LeaderRestarts(usize),
    /// `s` applies the next entry.
    Applies(usize),
    /// `s`'s acknowledgement reaches `l`'s table.
    Acknowledges(usize, usize),
    /// An acknowledgement of `s`'s dead process does.
    DeadAcknowledges(usize, usize),
    /// The last renewal of `s`'s dead process does.
    DeadRenews(usize, usize),
    /// The word of `s`'s dead process that it has given up its lease does.
    DeadReleased(usize, usize),
    /// `s`'s renewal does.
    Renews(usize, usize),
    /// The grant that is under way to `s` arrives.
    GrantArrives(usize),
    /// `s` crashes and starts again.
    Restarts(usize),
    /// `s` gives up its lease for good.
    Stops(usize),
    /// `s`'s word that it has reaches `l`'s table.
    Released(usize, usize),
}

#[derive(Clone, Default)]
struct Leader {
    table: LeaseTable,
    /// The term in which Raft made it leader, as far as it knows.
    leads: Option<u64>,
    /// The term of its table's reign.
    reign: Option<u64>,
    /// The read under way, and the term in which a quorum confirmed it.
    round: Option<(u64, Option<u64>)>,
    /// A purge that its table has not been told of, and the term of its entry.
    proposed: Option<(u64, u64)>,
}

impl Hash for Leader {
    fn hash<H: std::hash::Hasher>(&self, hasher: &mut H) {
        let round = self.round.map(|(_number, proven)| proven);
        (&self.table, self.leads, self.reign, round, self.proposed).hash(hasher);
    }
}

#[derive(Clone, Hash)]
struct Server {
    me: Incarnation,
    applied: u64,
    /// Up to where its floors were raised: as far as `applied`, but for a mistake.
    raised: u64,
    holder: LeaseHolder,
    /// What it asks in this step, until that has arrived somewhere.
    renewal: Option<Renewal>,
    /// What is under way to it.
    grant: Option<Grant>,
    dead: Option<Dead>,
    stopped: bool,
    /// The lease that it should have forgotten, for a mistake.
    forgotten: Duration,
}

/// The process before, and what it has said.
#[derive(Clone, Copy, Hash)]
struct Dead {
    me: Incarnation,
    applied: u64,
    renewal: Option<Renewal>,
    stopped: bool,
}

#[derive(Clone, Hash)]
struct World {
    term: u64,
    leader: usize,
    /// Which entries purge; all are committed.
    log: Vec<bool>,
    /// The highest purge that was answered.
    answered: u64,
    leaders: Vec<Leader>,
    servers: Vec<Server>,
    /// What may still happen.
    left: (u8, u8, u8, u8, u8),
}

/// What was looked at.
#[derive(Clone, Copy, Debug, Default)]
pub struct Explored {
    /// Different states.
    pub states: usize,
    /// Of these, with a purge answered and a server that has not applied it.
    pub answered: usize,
}

/// Looks at every state within `bounds`.
///
/// # Errors
/// The steps to the first state that breaks the promise.
pub fn explore(bounds: Bounds, mistake: Option<Mistake>) -> Result<Explored, String> {
    let model = Model { bounds, mistake };
    let first = model.start();
    let mut seen = HashSet::from([fingerprint(&first)]);
    let mut steps: Vec<(usize, Option<Act>)> = vec![(0, None)];
    let mut queue = VecDeque::from([(0, first)]);
    let mut explored = Explored::default();
    while let Some((at, world)) = queue.pop_front() {
        explored.states += 1;
        explored.answered += usize::from(world.answered > 0);
        for act in model.acts(&world) {
            let mut next = world.clone();
            model.act(&mut next, act);
            if model.is_harmless(&next) || !seen.insert(fingerprint(&next)) {
                continue;
            }
            steps.push((at, Some(act)));
            if let Some(server) = model.serves_stale(&next) {
                let purge = next.answered;
                let path = trace(&steps);
                return Err(format!(
                    "server {server} may answer with older bytes after purge {purge}:\n{path}"
                ));
            }
            queue.push_back((steps.len() - 1, next));
        }
    }
    Ok(explored)
}

fn fingerprint(world: &World) -> u128 {
    let mut hasher = SipHasher13::new();
    world.hash(&mut hasher);
    hasher.finish128().as_u128()
}

fn trace(steps: &[(usize, Option<Act>)]) -> String {
    let mut path = Vec::new();
    let mut at = steps.len() - 1;
    while let (before, Some(act)) = steps[at] {
        path.push(format!("  {act:?}\n"));
        at = before;
    }
    path.reverse();
    path.concat()
}

impl World {
    /// Steps are counted down; the clock starts anywhere.
    fn now(&self) -> Duration {
        STEP * (1000 - u32::from(self.left.4))
    }

    fn end_of_log(&self) -> u64 {
        self.log.len() as u64
    }

    /// A renewal is sent with each step.
    fn prepare_renewals(&mut self) {
        let now = self.now();
        for server in &mut self.servers {
            let applied = PurgeIndex(server.applied);
            server.renewal = server.holder.renewal(now, now, applied);
        }
    }
}

struct Model {
    bounds: Bounds,
    mistake: Option<Mistake>,
}

impl Model {
    fn makes(&self, mistake: Mistake) -> bool {
        self.mistake == Some(mistake)
    }

    fn start(&self) -> World {
        let server = |n: usize| {
            let me = Incarnation {
                node: NodeId(n as u64 + 1),
                process: 1,
            };
            Server {
                me,
                applied: FOUNDED,
                raised: FOUNDED,
                holder: LeaseHolder::new(me, LEASE),
                renewal: None,
                grant: None,
                dead: None,
                stopped: false,
                forgotten: Duration::ZERO,
            }
        };
        let bounds = &self.bounds;
        let mut world = World {
            term: 0,
            leader: 0,
            log: vec![false],
            answered: 0,
            leaders: vec![Leader::default(); bounds.leaders],
            servers: (0..bounds.servers).map(server).collect(),
            left: (
                bounds.elections + 1,
                bounds.purges,
                bounds.restarts,
                bounds.stops,
                bounds.steps,
            ),
        };
        self.act(&mut world, Act::Elected(0));
        self.act(&mut world, Act::Leads(0));
        world.prepare_renewals();
        world
    }

    /// What may happen now.
    fn acts(&self, world: &World) -> Vec<Act> {
        let mut acts = Vec::new();
        let mut may = |allowed: bool, act| {
            if allowed {
                acts.push(act);
            }
        };
        let (elections, purges, restarts, stops, steps) = world.left;
        may(steps > 0, Act::TimePasses);
        for (l, leader) in world.leaders.iter().enumerate() {
            let leads = world.leader == l && leader.leads == Some(world.term);
            let unproven = leader.round.is_some_and(|(_, proven)| proven.is_none());
            let proven = leader.round.is_some() && !unproven;
            let outdated = leader.reign.is_some_and(|term| term != world.term);
            let due = leader.table.next_tick().is_some_and(|at| at <= world.now());
            let idle = leader.proposed.is_none();
            may(elections > 0 && !leads, Act::Elected(l));
            may(leads && leader.reign.is_none(), Act::Leads(l));
            may(outdated, Act::Follows(l));
            may(leads && purges > 0 && idle, Act::Purges(l));
            may(!idle, Act::Tells(l));
            may(unproven && leads, Act::RoundProven(l));
            may(proven, Act::RoundConfirmed(l));
            may(unproven && !leads, Act::RoundFails(l));
            may(due, Act::TableTicks(l));
            may(
                restarts > 0 && leader.reign.is_some(),
                Act::LeaderRestarts(l),
            );
        }
        for (s, server) in world.servers.iter().enumerate() {
            may(server.applied < world.end_of_log(), Act::Applies(s));
            may(server.grant.is_some(), Act::GrantArrives(s));
            may(restarts > 0, Act::Restarts(s));
            may(stops > 0 && !server.stopped, Act::Stops(s));
            for (l, leader) in world.leaders.iter().enumerate() {
                let hears = leader.reign.is_some();
                may(hears, Act::Acknowledges(s, l));
                may(hears && server.dead.is_some(), Act::DeadAcknowledges(s, l));
                let renews = server.dead.is_some_and(|dead| dead.renewal.is_some());
                may(hears && renews, Act::DeadRenews(s, l));
                let stopped = server.dead.is_some_and(|dead| dead.stopped);
                may(hears && stopped, Act::DeadReleased(s, l));
                may(hears && server.renewal.is_some(), Act::Renews(s, l));
                may(hears && server.stopped, Act::Released(s, l));
            }
        }
        acts
    }

    fn act(&self, world: &mut World, act: Act) {
        let now = world.now();
        let end_of_log = world.end_of_log();
        match act {
            Act::TimePasses => {
                world.left.4 -= 1;
                world.prepare_renewals();
            }
            Act::Elected(l) => {
                world.left.0 -= 1;
                world.term += 1;
                world.leader = l;
                world.leaders[l].leads = Some(world.term);
            }
            Act::Leads(l) => self.lead(world, l),
            Act::Follows(l) => {
                world.leaders[l].reign = None;
                world.leaders[l].round = None;
                self.step(world, l, Input::Follow);
            }
            Act::Purges(l) => {
                world.left.1 -= 1;
                world.log.push(true);
                world.leaders[l].proposed = Some((end_of_log + 1, world.term));
                if self.makes(Mistake::QuorumOnly) {
                    world.answered = end_of_log + 1;
                }
            }
            Act::Tells(l) => {
                if let Some((index, term)) = world.leaders[l].proposed.take() {
                    let index = PurgeIndex(index);
                    self.step(world, l, Input::Committed { index, term });
                }
            }
            Act::RoundProven(l) => {
                if let Some((_, proven)) = &mut world.leaders[l].round {
                    *proven = Some(world.term);
                }
            }
            Act::RoundConfirmed(l) => {
                let leader = &mut world.leaders[l];
                if let Some((round, Some(mut term))) = leader.round.take() {
                    if self.makes(Mistake::RoundOfAnotherTerm) {
                        term = leader.reign.unwrap_or(term);
                    }
                    self.step(world, l, Input::RoundConfirmed { round, term });
                }
            }
            Act::RoundFails(l) => {
                if let Some((round, _)) = world.leaders[l].round.take() {
                    self.step(world, l, Input::RoundFailed { round });
                }
            }
            Act::TableTicks(l) => self.step(world, l, Input::Tick),
            Act::LeaderRestarts(l) => {
                world.left.2 -= 1;
                let leads = world.leaders[l].leads;
                world.leaders[l] = Leader {
                    leads,
                    ..Leader::default()
                };
            }
            Act::Applies(s) => {
                let server = &mut world.servers[s];
                server.applied += 1;
                if server.raised + 1 == server.applied {
                    server.raised = server.applied;
                }
            }
            Act::Acknowledges(s, l) => {
                let server = &world.servers[s];
                let from = server.me;
                let applied = match self.mistake {
                    Some(Mistake::AckBeforeApplying) => PurgeIndex(end_of_log),
                    _ => PurgeIndex(server.applied),
                };
                self.step(world, l, Input::Acked { from, applied });
            }
            Act::DeadAcknowledges(s, l) => {
                if let Some(dead) = world.servers[s].dead {
                    let (from, applied) = (dead.me, PurgeIndex(dead.applied));
                    self.step(world, l, Input::Acked { from, applied });
                }
            }
            Act::DeadRenews(s, l) => {
                let dead = world.servers[s].dead.as_mut();
                if let Some(renewal) = dead.and_then(|dead| dead.renewal.take()) {
                    self.step(world, l, Input::Renew(renewal));
                }
            }
            Act::DeadReleased(s, l) => {
                if let Some(dead) = world.servers[s].dead {
                    self.step(world, l, Input::Released(dead.me));
                }
            }
            Act::Renews(s, l) => {
                if let Some(mut renewal) = world.servers[s].renewal.take() {
                    if self.makes(Mistake::GrantToLagging) {
                        renewal.applied = PurgeIndex(end_of_log);
                    }
                    self.step(world, l, Input::Renew(renewal));
                }
            }
            Act::GrantArrives(s) => self.grant_arrives(world, s),
            Act::Restarts(s) => self.restart(world, s),
            Act::Stops(s) => {
                world.left.3 -= 1;
                let server = &mut world.servers[s];
                server.stopped = true;
                server.forgotten = server.holder.deadline();
                server.holder.stop(now);
            }
            Act::Released(s, l) => {
                let from = world.servers[s].me;
                self.step(world, l, Input::Released(from));
            }
        }
    }

    fn lead(&self, world: &mut World, l: usize) {
        world.log.push(false);
        let mut first_entry = PurgeIndex(world.end_of_log());
        if self.makes(Mistake::NoFirstEntry) {
            first_entry = PurgeIndex(0);
        }
        let mut nodes: Vec<_> = world.servers.iter().map(|s| s.me.node).collect();
        if self.makes(Mistake::NewLeaderDoesNotWait) {
            nodes.clear();
        }
        let lead = Input::Lead {
            term: world.term,
            first_entry,
            nodes,
            lease: LEASE,
        };
        world.leaders[l].reign = Some(world.term);
        self.step(world, l, lead);
    }

    /// A new process: what was in memory is gone.
    fn restart(&self, world: &mut World, s: usize) {
        world.left.2 -= 1;
        let now = world.now();
        let server = &mut world.servers[s];
        server.dead = Some(Dead {
            me: server.me,
            applied: server.applied,
            renewal: server.renewal,
            stopped: server.stopped,
        });
        server.stopped = false;
        server.forgotten = server.holder.deadline();
        if !self.makes(Mistake::ProcessesNotCounted) {
            server.me.process += 1;
        }
        server.holder = LeaseHolder::new(server.me, LEASE);
        if !self.makes(Mistake::FloorsLostOnRestart) {
            server.applied = FOUNDED;
        }
        server.raised = FOUNDED;
        server.renewal = server.holder.renewal(now, now, PurgeIndex(server.applied));
    }

    fn grant_arrives(&self, world: &mut World, s: usize) {
        let now = world.now();
        let server = &mut world.servers[s];
        if let Some(mut grant) = server.grant.take() {
            if self.makes(Mistake::DeadlineFromReceipt) {
                grant.sent_at = now;
            }
            server.holder.granted(now, now, &grant);
        }
    }

    /// Steps a table and does what it says.
    fn step(&self, world: &mut World, l: usize, input: Input) {
        let now = world.now();
        for output in world.leaders[l].table.step(now, input) {
            match output {
                Output::StartRound { round } if self.makes(Mistake::NoReadRound) => {
                    let term = world.leaders[l].reign.unwrap_or_default();
                    self.step(world, l, Input::RoundConfirmed { round, term });
                }
                Output::StartRound { round } => {
                    let leader = &mut world.leaders[l];
                    let proven = leader.leads.filter(|term| *term == world.term);
                    leader.round = Some((round, proven));
                }
                Output::Granted(grant) => {
                    let s = grant.to.node.0 as usize - 1;
                    // What a dead process is granted nobody takes.
                    if grant.to == world.servers[s].me {
                        world.servers[s].grant = Some(grant);
                    }
                    if !self.bounds.late_grants {
                        self.grant_arrives(world, s);
                    }
                }
                Output::Settled { index, .. } => world.answered = world.answered.max(index.0),
                Output::Refused { .. } | Output::Unsettled { .. } => {}
            }
        }
    }

    /// A server that may answer a request which arrives now from its cache,
    /// with bytes from before a purge that has been answered.
    fn serves_stale(&self, world: &World) -> Option<usize> {
        if world.answered == 0 {
            return None;
        }
        // The newest stamp that bytes from before the purge can have.
        let stamp = PurgeIndex(world.answered - 1);
        let stale = |s: &Server| self.may_serve(world, s) && floor(world, s).allows(stamp);
        world.servers.iter().position(stale)
    }

    fn may_serve(&self, world: &World, server: &Server) -> bool {
        let now = world.now();
        let forgets = match self.mistake {
            Some(Mistake::LeaseSurvivesRestart) => server.stopped,
            Some(Mistake::StoppedServes) => !server.stopped,
            _ => true,
        };
        server.holder.may_serve(now) || !forgets && now < server.forgotten
    }

    /// Nothing that can follow breaks the promise: every server shows every
    /// purge there will be, for good.
    fn is_harmless(&self, world: &World) -> bool {
        let (_, purges, restarts, ..) = world.left;
        let last = world.log.iter().rposition(|purges| *purges);
        let last = last.map_or(0, |at| at as u64 + 1);
        purges == 0 && restarts == 0 && world.servers.iter().all(|s| s.raised >= last)
    }
}

/// The floor of the one object, at a server.
fn floor(world: &World, server: &Server) -> Floor {
    let mut floors = Floors::default();
    for (index, purges) in (1..=server.raised).zip(&world.log) {
        if *purges {
            floors.raise(Scope::Url(URL), PurgeMode::Plain, PurgeIndex(index));
        }
    }
    floors.floor(&Subject {
        host: 0,
        url: URL,
        prefixes: Vec::new(),
        tags: Vec::new(),
    })
}

/// As much as is looked at in a minute; each bound is reached by some state.
const LOOKED_AT: [Bounds; 4] = [
    // Everybody's word counts.
    Bounds {
        servers: 2,
        ..SMALL
    },
    // A leader that does not know that it was deposed.
    Bounds {
        leaders: 2,
        elections: 1,
        ..SMALL
    },
    // Processes that come and go, and grants that come late.
    Bounds {
        purges: 2,
        restarts: 1,
        stops: 1,
        late_grants: true,
        steps: 2,
        ..SMALL
    },
    // Words of a process that come when the one after it has asked another leader.
    Bounds {
        leaders: 2,
        elections: 2,
        restarts: 1,
        stops: 1,
        steps: 0,
        ..SMALL
    },
];
const SMALL: Bounds = Bounds {
    leaders: 1,
    servers: 1,
    elections: 0,
    purges: 1,
    restarts: 0,
    stops: 0,
    late_grants: false,
    steps: 3,
};

#[test]
fn no_order_of_events_breaks_the_promise() {
    let explored = std::thread::scope(|scope| {
        let look = |bounds| scope.spawn(move || (bounds, explore(bounds, None)));
        let threads = LOOKED_AT.map(look);
        threads.map(|thread| thread.join().expect("no panic"))
    });
    for (bounds, explored) in explored {
        match explored {
            Ok(explored) => {
                println!("{bounds:?}: {explored:?}");
                assert!(explored.answered > 1000, "{explored:?} says nothing");
            }
            Err(path) => panic!("{bounds:?}: {path}"),
        }
    }
}

/// The explorer must be able to fail.
#[test]
fn every_mistake_is_found() {
    use Mistake::*;
    let [_, two_leaders, comings_and_goings, _] = LOOKED_AT;
    let thrice_elected = Bounds {
        elections: 2,
        ..two_leaders
    };
    let mistakes = [
        (QuorumOnly, SMALL),
        (AckBeforeApplying, SMALL),
        (NewLeaderDoesNotWait, two_leaders),
        (NoFirstEntry, two_leaders),
        (GrantToLagging, SMALL),
        (NoReadRound, two_leaders),
        (RoundOfAnotherTerm, thrice_elected),
        (
            DeadlineFromReceipt,
            Bounds {
                late_grants: true,
                ..SMALL
            },
        ),
        (LeaseSurvivesRestart, comings_and_goings),
        (ProcessesNotCounted, comings_and_goings),
        (FloorsLostOnRestart, comings_and_goings),
        (StoppedServes, comings_and_goings),
    ];
    for (mistake, bounds) in mistakes {
        match explore(bounds, Some(mistake)) {
            Ok(explored) => panic!("{mistake:?} is not found in {explored:?}"),
            Err(path) => println!("{mistake:?}: {} steps", path.lines().count() - 1),
        }
    }
}
