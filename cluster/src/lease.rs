//! Who may answer from cache, and when a purge may be answered: rules 4, 9 to
//! 14, 16 and 17 of the purge protocol, as two pure state machines.
//!
//! Each node has a [`LeaseHolder`], the leader a [`LeaseTable`]:
//!
//! ```text
//! holder --Renewal{applied, sent_at}--> table   gathered
//!                                       table   StartRound: one linearizable read that begins now
//!                                       table   RoundConfirmed: this node still led after the renewals came
//! holder <------Grant{sent_at, lease}-- table   kept here for a lease and 1 % from now
//!   counts a lease less 1 % from sent_at
//! ```
//!
//! What it promises: at the moment a purge is `Settled`, every process that
//! may answer from cache has applied it, and no process that has not will be
//! allowed to later, by this leader or any other. That needs clocks whose rates
//! are right within 1 %, and these habits of the shell around it:
//!
//! - Time is the boot clock (`CLOCK_BOOTTIME`) since any origin of the node's
//!   own, read after what it is passed along with has happened.
//! - `applied` in a renewal or acknowledgement is what the floors show already (rule 9).
//! - `Lead` comes once this node has *applied* the first entry of its term, so
//!   that `nodes` misses nobody an earlier leader knew.
//! - A round's term is the one that the read was confirmed in, not the one it began in.
//! - A retry of a purge is proposed again: its outcome names the first try's
//!   index, and that this leader committed it makes waiting for that safe.
//! - `process` grows with every start of a node and is taken while its data
//!   directory is locked: a message of a later process proves the earlier one dead.
//! - The shell lets only members speak here, which bounds every table, and of
//!   them only those whose log is this cluster's and no longer than the leader's.
//!
//! Not here: messages, timers, Raft (`raft`), floors (`purge`).

use std::collections::BTreeMap;
use std::hash::{Hash, Hasher};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::{NodeId, PurgeIndex};

/// A process of a node (rule 14).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Incarnation {
    /// The node.
    pub node: NodeId,
    /// How often it has started, counted in its data directory; from 1.
    pub process: u64,
}

/// "Let me go on answering from cache."
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Renewal {
    /// Who asks.
    pub from: Incarnation,
    /// What its floors show.
    pub applied: PurgeIndex,
    /// Its own clock when it asked.
    pub sent_at: Duration,
}

/// The answer to one renewal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Grant {
    /// Who asked.
    pub to: Incarnation,
    /// The holder's clock when it asked.
    pub sent_at: Duration,
    /// Length of the lease, from then.
    pub lease: Duration,
}

/// Why a lease was not granted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum Refusal {
    /// This node does not lead, or could not prove that it does: ask the leader.
    #[error("not the leader")]
    NotLeader,
    /// Apply the log up to `needed` first.
    #[error("behind: {needed} has to be applied first")]
    Behind {
        /// Log index.
        needed: PurgeIndex,
    },
    /// A purge has waited for this process for half a lease (rule 13).
    #[error("a purge waits for this node's acknowledgement")]
    Slow,
    /// A later process of the node, or a later renewal, has been heard.
    #[error("replaced by a later one")]
    Replaced,
    /// It has the log of another founding (the shell finds it out).
    #[error("this log is of another founding of the cluster")]
    OtherCluster,
    /// It has applied what this leader's log, confirmed by a quorum, does not
    /// hold: entries were lost that had been committed (the shell finds it out).
    #[error("ahead: the leader's log ends at {last}, so committed entries were lost")]
    Ahead {
        /// Log index.
        last: PurgeIndex,
    },
}

/// What may happen to a [`LeaseTable`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Input {
    /// This node leads, and has applied its term's first entry.
    Lead {
        /// The term.
        term: u64,
        /// Index of the first entry of that term.
        first_entry: PurgeIndex,
        /// Everyone an earlier leader may have granted a lease: members and retired ones.
        nodes: Vec<NodeId>,
        /// The cluster's length of a lease.
        lease: Duration,
    },
    /// This node no longer leads.
    Follow,
    /// A renewal arrived.
    Renew(Renewal),
    /// A process says that its floors show `applied`.
    Acked {
        /// Who.
        from: Incarnation,
        /// Cumulative.
        applied: PurgeIndex,
    },
    /// A process has given up its lease and takes no other: it is stopping.
    Released(Incarnation),
    /// A purge proposed here was committed, and somebody waits for it.
    Committed {
        /// The purge: the entry itself, or the earlier one that it repeats (rule 16).
        index: PurgeIndex,
        /// The term of the entry that was committed just now.
        term: u64,
    },
    /// The linearizable read of this round succeeded.
    RoundConfirmed {
        /// As in [`Output::StartRound`].
        round: u64,
        /// The term in which a quorum confirmed it.
        term: u64,
    },
    /// The linearizable read of this round failed.
    RoundFailed {
        /// As in [`Output::StartRound`].
        round: u64,
    },
    /// Time has passed; see [`LeaseTable::next_tick`].
    Tick,
}

/// What the shell must do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// Begin one linearizable read now and report how it ended.
    StartRound {
        /// Its number, never used again.
        round: u64,
    },
    /// Answer the renewal.
    Granted(Grant),
    /// Answer the renewal.
    Refused {
        /// The renewal.
        renewal: Renewal,
        /// Why not.
        reason: Refusal,
    },
    /// This purge and all before it hold everywhere: answer whoever waits (rule 10).
    Settled {
        /// The purge.
        index: PurgeIndex,
        /// Who has acknowledged it; all others are fenced.
        acked: Vec<NodeId>,
    },
    /// This node does not lead: nothing is promised about this purge.
    Unsettled {
        /// The purge.
        index: PurgeIndex,
    },
}

/// A node, as a leader's table has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Standing {
    /// Which.
    pub node: NodeId,
    /// What it has acknowledged.
    pub acked: PurgeIndex,
    /// Whether it may be answering from cache.
    pub serves: bool,
}

/// The leader's side. See the module's text.
#[derive(Clone, Debug, Default)]
pub struct LeaseTable {
    /// Rounds started since this process began.
    rounds: u64,
    reign: Option<Reign>,
}

/// Numbers of rounds are names: tables that differ only in them do the same.
impl Hash for LeaseTable {
    fn hash<H: Hasher>(&self, hasher: &mut H) {
        self.reign.hash(hasher);
    }
}

impl LeaseTable {
    /// Takes `input` at `now`, returns what follows from it.
    pub fn step(&mut self, now: Duration, input: Input) -> Vec<Output> {
        let mut outputs = Vec::new();
        match (input, &mut self.reign) {
            (
                Input::Lead {
                    term,
                    first_entry,
                    nodes,
                    lease,
                },
                _,
            ) => {
                self.abdicate(&mut outputs);
                self.reign = Some(Reign::new(now, term, first_entry, nodes, lease));
            }
            (Input::Follow, _) => self.abdicate(&mut outputs),
            (Input::Renew(renewal), Some(reign)) => reign.gather(now, renewal, &mut outputs),
            (Input::Renew(renewal), None) => {
                outputs.push(Output::Refused {
                    renewal,
                    reason: Refusal::NotLeader,
                });
            }
            (Input::Acked { from, applied }, Some(reign)) => {
                reign.hear(now, from, applied);
            }
            (Input::Released(from), Some(reign)) => reign.release(now, from),
            // The entries of a later term are for its leader's table to judge.
            (Input::Committed { index, term }, Some(reign)) if term <= reign.term => {
                reign.waiting.entry(index).or_insert(now);
            }
            (Input::Committed { index, .. }, _) => outputs.push(Output::Unsettled { index }),
            (Input::RoundConfirmed { round, term }, Some(reign)) => {
                for renewal in reign.end_round(round) {
                    // Led again in a later term, it knows nothing of the terms between.
                    let answer = match term == reign.term {
                        true => reign.grant(now, renewal),
                        false => Err(Refusal::NotLeader),
                    };
                    outputs.push(match answer {
                        Ok(grant) => Output::Granted(grant),
                        Err(reason) => Output::Refused { renewal, reason },
                    });
                }
            }
            (Input::RoundFailed { round }, Some(reign)) => {
                for renewal in reign.end_round(round) {
                    outputs.push(Output::Refused {
                        renewal,
                        reason: Refusal::NotLeader,
                    });
                }
            }
            (_, None) | (Input::Tick, _) => {}
        }
        if let Some(reign) = &mut self.reign {
            reign.settle(now, &mut outputs);
            if reign.round.is_none() && !reign.gathered.is_empty() {
                self.rounds += 1;
                let renewals = std::mem::take(&mut reign.gathered).into_values().collect();
                reign.round = Some(Round {
                    number: self.rounds,
                    renewals,
                });
                outputs.push(Output::StartRound { round: self.rounds });
            }
        }
        outputs
    }

    /// What each node has acknowledged, and whether it may be answering from
    /// cache at `now`; empty where this node does not lead.
    pub fn standings(&self, now: Duration) -> Vec<Standing> {
        let of_reign = |reign: &Reign| {
            let standing = |(node, entry): (&NodeId, &Entry)| Standing {
                node: *node,
                // An earlier word may be a dead process's.
                acked: match entry.acked >= reign.first_entry {
                    true => entry.acked,
                    false => PurgeIndex(0),
                },
                serves: entry.right.until().is_some_and(|until| now < until),
            };
            reign.entries.iter().map(standing).collect()
        };
        self.reign.as_ref().map(of_reign).unwrap_or_default()
    }

    /// When to step with `Tick` at the latest: a lease that a purge waits for ends.
    pub fn next_tick(&self) -> Option<Duration> {
        let reign = self
            .reign
            .as_ref()
            .filter(|reign| !reign.waiting.is_empty())?;
        reign
            .entries
            .values()
            .filter_map(|entry| entry.right.until())
            .min()
    }

    /// Forgets everything: a later leader, or this one, starts afresh.
    fn abdicate(&mut self, outputs: &mut Vec<Output>) {
        let Some(reign) = self.reign.take() else {
            return;
        };
        let in_round = reign.round.into_iter().flat_map(|round| round.renewals);
        for renewal in in_round.chain(reign.gathered.into_values()) {
            outputs.push(Output::Refused {
                renewal,
                reason: Refusal::NotLeader,
            });
        }
        for index in reign.waiting.into_keys() {
            outputs.push(Output::Unsettled { index });
        }
    }
}

/// What a leader knows in one term.
#[derive(Clone, Debug, Hash)]
struct Reign {
    term: u64,
    first_entry: PurgeIndex,
    lease: Duration,
    /// When the last lease of an earlier leader has ended (rule 12).
    earlier_until: Duration,
    /// The highest purge settled in this term.
    settled: PurgeIndex,
    entries: BTreeMap<NodeId, Entry>,
    /// Renewals for the next round, one per node.
    gathered: BTreeMap<NodeId, Renewal>,
    /// The round under way.
    round: Option<Round>,
    /// Committed purges that are not settled, and since when. Each leaves
    /// within one and a half leases (rule 13).
    waiting: BTreeMap<PurgeIndex, Duration>,
}

/// One linearizable read, and the renewals that came before it began.
#[derive(Clone, Debug)]
struct Round {
    number: u64,
    renewals: Vec<Renewal>,
}

impl Hash for Round {
    fn hash<H: Hasher>(&self, hasher: &mut H) {
        self.renewals.hash(hasher);
    }
}

/// A node's latest process, as far as this leader has heard.
#[derive(Clone, Copy, Debug, Hash)]
struct Entry {
    process: u64,
    acked: PurgeIndex,
    right: Right,
    /// What it was last refused a lease for, having to apply it first.
    owed: Option<PurgeIndex>,
}

/// Whether a node's process may be answering from cache; times are the leader's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Right {
    /// An earlier leader may have granted it a lease that ends by then; or it is
    /// waited for until then as if, so that it can get one.
    Unknown { until: Duration },
    /// This leader has granted it a lease that ends by then.
    Leased { until: Duration },
    /// It holds none.
    Fenced,
}

impl Right {
    fn until(&self) -> Option<Duration> {
        match self {
            Right::Unknown { until } | Right::Leased { until } => Some(*until),
            Right::Fenced => None,
        }
    }
}

impl Reign {
    /// Rule 12: whoever may hold a lease of an earlier leader must acknowledge
    /// until a whole lease has passed.
    fn new(
        now: Duration,
        term: u64,
        first_entry: PurgeIndex,
        nodes: Vec<NodeId>,
        lease: Duration,
    ) -> Reign {
        let earlier_until = now + lease + margin(lease);
        let entry = Entry {
            process: 0,
            acked: PurgeIndex(0),
            right: Right::Unknown {
                until: earlier_until,
            },
            owed: None,
        };
        Reign {
            term,
            first_entry,
            lease,
            earlier_until,
            settled: PurgeIndex(0),
            entries: nodes.into_iter().map(|node| (node, entry)).collect(),
            gathered: BTreeMap::new(),
            round: None,
            waiting: BTreeMap::new(),
        }
    }

    fn gather(&mut self, now: Duration, renewal: Renewal, outputs: &mut Vec<Output>) {
        let earlier = self.gathered.get(&renewal.from.node);
        let order = |renewal: &Renewal| (renewal.from.process, renewal.sent_at);
        let replaced = match earlier {
            Some(earlier) if order(earlier) >= order(&renewal) => Some(renewal),
            _ => self.gathered.insert(renewal.from.node, renewal),
        };
        if let Some(renewal) = replaced {
            outputs.push(Output::Refused {
                renewal,
                reason: Refusal::Replaced,
            });
        }
        self.hear(now, renewal.from, renewal.applied);
    }

    /// What a node may hold at `now` besides a lease of this leader. What is heard
    /// may be the word of a dead process, come late, while the one after it has a
    /// lease of an earlier leader; not if it is known that the dead one lived in
    /// this term, as it had applied the term's first entry: those that came
    /// after it can have asked no earlier leader that still had a quorum.
    fn without_lease(&self, now: Duration, node: NodeId) -> Right {
        let lived = |entry: &Entry| entry.acked >= self.first_entry;
        let until = self.earlier_until;
        match self.entries.get(&node).is_some_and(lived) || now >= until {
            true => Right::Fenced,
            false => Right::Unknown { until },
        }
    }

    /// Takes note of what a process has applied. `None` if it is not the latest.
    fn hear(
        &mut self,
        now: Duration,
        from: Incarnation,
        applied: PurgeIndex,
    ) -> Option<&mut Entry> {
        let without_lease = self.without_lease(now, from.node);
        // One that the earlier leaders did not know has nothing of them.
        let new = Entry {
            process: from.process,
            acked: applied,
            right: Right::Fenced,
            owed: None,
        };
        let entry = self.entries.entry(from.node).or_insert(new);
        if from.process < entry.process {
            return None;
        }
        if from.process == entry.process {
            entry.acked = entry.acked.max(applied);
            return Some(entry);
        }
        // The process before it is dead and its lease with it (rule 14).
        *entry = Entry {
            right: without_lease,
            ..new
        };
        Some(entry)
    }

    fn release(&mut self, now: Duration, from: Incarnation) {
        let (without_lease, applied) = (self.without_lease(now, from.node), PurgeIndex(0));
        if let Some(entry) = self.hear(now, from, applied) {
            entry.right = without_lease;
        }
    }

    fn end_round(&mut self, number: u64) -> Vec<Renewal> {
        match self.round.take_if(|round| round.number == number) {
            Some(round) => round.renewals,
            None => Vec::new(),
        }
    }

    /// Rules 11 and 13. A round has proved that no later leader had been
    /// elected when the renewal was sent.
    fn grant(&mut self, now: Duration, renewal: Renewal) -> Result<Grant, Refusal> {
        let needed = self.first_entry.max(self.settled);
        let until = now + self.lease + margin(self.lease);
        let waits = now + self.lease / 2;
        let acked = self
            .hear(now, renewal.from, renewal.applied)
            .ok_or(Refusal::Replaced)?
            .acked;
        let overdue = |since: &Duration| now.saturating_sub(*since) >= self.lease / 2;
        let is_slow = self
            .waiting
            .iter()
            .any(|(index, since)| *index > acked && overdue(since));
        let entry = self.entries.get_mut(&renewal.from.node);
        let entry = entry.ok_or(Refusal::Replaced)?;
        let holds = matches!(entry.right, Right::Leased { until } if now < until);
        if !holds && entry.acked < needed {
            // It has come to where it had to, and more purges have been answered
            // without it meanwhile. They wait for it from now on, until it has
            // asked again, or it would be behind for as long as they come. Who
            // does not keep up is waited for once, as long as by rule 13. A purge
            // that has waited so long already waits for nobody else.
            if !is_slow && entry.owed.is_some_and(|owed| owed <= entry.acked) {
                let until = entry.right.until().map_or(waits, |until| until.max(waits));
                entry.right = Right::Unknown { until };
            }
            entry.owed = Some(needed);
            return Err(Refusal::Behind { needed });
        }
        if is_slow {
            return Err(Refusal::Slow);
        }
        entry.right = Right::Leased { until };
        entry.owed = None;
        Ok(Grant {
            to: renewal.from,
            sent_at: renewal.sent_at,
            lease: self.lease,
        })
    }

    /// Rule 10: a purge holds when every process has acknowledged it or is fenced.
    /// One from before this term needs the term's first entry acknowledged, too:
    /// without it the word may be a dead process's.
    fn settle(&mut self, now: Duration, outputs: &mut Vec<Output>) {
        for entry in self.entries.values_mut() {
            if entry.right.until().is_some_and(|until| now >= until) {
                entry.right = Right::Fenced;
            }
        }
        let serving = self
            .entries
            .values()
            .filter(|entry| entry.right != Right::Fenced);
        let everywhere = serving.map(|entry| entry.acked).min();
        while let Some(first) = self.waiting.first_entry() {
            let index = *first.key();
            let proof = index.max(self.first_entry);
            if everywhere.is_some_and(|everywhere| everywhere < proof) {
                break;
            }
            first.remove();
            self.settled = self.settled.max(index);
            let acked = self
                .entries
                .iter()
                .filter(|(_, entry)| entry.acked >= proof);
            outputs.push(Output::Settled {
                index,
                acked: acked.map(|(node, _)| *node).collect(),
            });
        }
    }
}

/// A node's side. See the module's text.
#[derive(Clone, Debug, Hash)]
pub struct LeaseHolder {
    me: Incarnation,
    /// The end of the lease; zero without one. Never written to disk (rule 15).
    deadline: Duration,
    /// When the next renewal is due.
    renew_at: Duration,
    /// Between renewals.
    pace: Duration,
    /// When the last lease was dropped: renewals sent until then are void.
    dropped_at: Option<Duration>,
    /// Boot and wall clock when last compared.
    clocks: Option<(Duration, Duration)>,
    /// It takes no lease any more.
    stopped: bool,
}

impl LeaseHolder {
    /// A holder without a lease; `lease` sets its first pace.
    pub fn new(me: Incarnation, lease: Duration) -> LeaseHolder {
        LeaseHolder {
            me,
            deadline: Duration::ZERO,
            renew_at: Duration::ZERO,
            pace: pace(lease),
            dropped_at: None,
            clocks: None,
            stopped: false,
        }
    }

    /// Whether this node may answer from cache at `now` (rule 4).
    pub fn may_serve(&self, now: Duration) -> bool {
        now < self.deadline
    }

    /// The end of the lease, for a shell that checks it without this struct.
    pub fn deadline(&self) -> Duration {
        self.deadline
    }

    /// When [`LeaseHolder::renewal`] has something to send again.
    pub fn renew_at(&self) -> Duration {
        self.renew_at
    }

    /// The renewal to send now, if one is due. `wall` is the wall clock since
    /// any fixed origin, `applied` what the floors show.
    pub fn renewal(
        &mut self,
        now: Duration,
        wall: Duration,
        applied: PurgeIndex,
    ) -> Option<Renewal> {
        self.compare(now, wall);
        if self.stopped || now < self.renew_at {
            return None;
        }
        self.renew_at = now + self.pace;
        Some(Renewal {
            from: self.me,
            applied,
            sent_at: now,
        })
    }

    /// Makes the next renewal due now: there is another leader to ask.
    pub fn hurry(&mut self, now: Duration) {
        self.renew_at = self.renew_at.min(now);
    }

    /// A grant arrived.
    pub fn granted(&mut self, now: Duration, wall: Duration, grant: &Grant) {
        self.compare(now, wall);
        let void = self
            .dropped_at
            .is_some_and(|dropped_at| grant.sent_at <= dropped_at);
        if grant.to != self.me || void || self.stopped || grant.sent_at > now {
            return;
        }
        self.pace = pace(grant.lease);
        let lease = grant.lease.saturating_sub(margin(grant.lease));
        self.deadline = self.deadline.max(grant.sent_at.saturating_add(lease));
    }

    /// Compares the clocks (rule 17): where the wall clock has gained on the
    /// boot clock beyond what rates explain, the machine stood still unnoticed.
    pub fn compare(&mut self, now: Duration, wall: Duration) {
        if let Some((now_before, wall_before)) = self.clocks.replace((now, wall)) {
            let elapsed = now.saturating_sub(now_before);
            let gained = wall.saturating_sub(wall_before).saturating_sub(elapsed);
            if gained > elapsed / 50 + CLOCK_READ_APART_MAX {
                self.drop_lease(now);
            }
        }
    }

    /// Gives the lease up for good, before a stop; then tell the leader
    /// ([`Input::Released`]) so that no purge waits for this node.
    pub fn stop(&mut self, now: Duration) {
        self.stopped = true;
        self.drop_lease(now);
    }

    fn drop_lease(&mut self, now: Duration) {
        self.deadline = Duration::ZERO;
        self.dropped_at = Some(now);
        self.renew_at = now;
    }
}

/// Time that may pass between reading the two clocks without meaning anything.
const CLOCK_READ_APART_MAX: Duration = Duration::from_millis(10);

/// How much clocks may differ over one lease (A3), rounded up.
fn margin(lease: Duration) -> Duration {
    lease / 100 + Duration::from_nanos(1)
}

/// Between renewals: three may be lost before the lease ends.
fn pace(lease: Duration) -> Duration {
    lease / 4
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEASE: Duration = Duration::from_secs(2);
    const LEADS_AT: Duration = Duration::from_secs(100);
    const FIRST: PurgeIndex = PurgeIndex(10);

    fn after(ms: u64) -> Duration {
        LEADS_AT + Duration::from_millis(ms)
    }

    /// Once the leases of earlier leaders have ended.
    fn later(ms: u64) -> Duration {
        after(3000 + ms)
    }

    fn process(node: u64, process: u64) -> Incarnation {
        Incarnation {
            node: NodeId(node),
            process,
        }
    }

    fn renewal(node: u64, applied: u64) -> Renewal {
        let sent_at = Duration::from_secs(7);
        Renewal {
            from: process(node, 1),
            applied: PurgeIndex(applied),
            sent_at,
        }
    }

    /// A table whose node leads term 3 since `LEADS_AT`.
    fn leading(nodes: &[u64]) -> LeaseTable {
        let nodes = nodes.iter().copied().map(NodeId).collect();
        let lead = Input::Lead {
            term: 3,
            first_entry: FIRST,
            nodes,
            lease: LEASE,
        };
        let mut table = LeaseTable::default();
        assert_eq!(table.step(LEADS_AT, lead), []);
        table
    }

    /// A renewal and its round.
    fn ask(table: &mut LeaseTable, now: Duration, renewal: Renewal) -> Result<Grant, Refusal> {
        let [Output::StartRound { round }] = table.step(now, Input::Renew(renewal))[..] else {
            panic!("no round began");
        };
        match &table.step(now, Input::RoundConfirmed { round, term: 3 })[0] {
            Output::Granted(grant) => Ok(*grant),
            Output::Refused { reason, .. } => Err(*reason),
            other => panic!("{other:?}"),
        }
    }

    fn commit(table: &mut LeaseTable, now: Duration, index: u64) -> Vec<Output> {
        table.step(
            now,
            Input::Committed {
                index: PurgeIndex(index),
                term: 3,
            },
        )
    }

    fn acked(table: &mut LeaseTable, now: Duration, node: u64, applied: u64) -> Vec<Output> {
        table.step(
            now,
            Input::Acked {
                from: process(node, 1),
                applied: PurgeIndex(applied),
            },
        )
    }

    fn settled(index: u64, acked: &[u64]) -> Vec<Output> {
        let acked = acked.iter().copied().map(NodeId).collect();
        vec![Output::Settled {
            index: PurgeIndex(index),
            acked,
        }]
    }

    #[test]
    fn a_purge_waits_for_everyone_with_a_lease() {
        let mut table = leading(&[1, 2]);
        assert!(ask(&mut table, after(0), renewal(1, 10)).is_ok());
        assert!(ask(&mut table, after(0), renewal(2, 10)).is_ok());
        assert_eq!(commit(&mut table, after(10), 11), []);
        assert_eq!(acked(&mut table, after(12), 1, 11), []);
        assert_eq!(acked(&mut table, after(13), 2, 11), settled(11, &[1, 2]));
    }

    #[test]
    fn one_acknowledgement_settles_all_that_it_covers() {
        let mut table = leading(&[1]);
        commit(&mut table, after(1), 11);
        commit(&mut table, after(1), 12);
        commit(&mut table, after(1), 14);
        let both = [settled(11, &[1]), settled(12, &[1])].concat();
        assert_eq!(acked(&mut table, after(2), 1, 13), both);
    }

    #[test]
    fn a_lost_node_delays_a_purge_until_its_lease_ends() {
        let mut table = leading(&[1]);
        assert!(ask(&mut table, after(500), renewal(1, 10)).is_ok());
        commit(&mut table, after(600), 11);
        let until = after(500) + LEASE + margin(LEASE);
        assert_eq!(table.next_tick(), Some(until));
        assert_eq!(table.step(until - Duration::from_nanos(1), Input::Tick), []);
        assert_eq!(table.step(until, Input::Tick), settled(11, &[]));
        assert_eq!(table.next_tick(), None);
        // Once: the next purge does not wait, and it must catch up to come back.
        assert_eq!(commit(&mut table, until, 12), settled(12, &[]));
        let needed = PurgeIndex(12);
        assert_eq!(
            ask(&mut table, until, renewal(1, 11)),
            Err(Refusal::Behind { needed })
        );
        assert!(ask(&mut table, until, renewal(1, 12)).is_ok());
    }

    #[test]
    fn a_new_leader_waits_a_whole_lease_for_everyone() {
        let mut table = leading(&[1, 2]);
        assert_eq!(commit(&mut table, after(1), 11), []);
        assert_eq!(acked(&mut table, after(2), 1, 11), []);
        let until = LEADS_AT + LEASE + margin(LEASE);
        assert_eq!(table.next_tick(), Some(until));
        assert_eq!(table.step(until, Input::Tick), settled(11, &[1]));
    }

    #[test]
    fn nobody_behind_the_new_leaders_first_entry_gets_a_lease() {
        let mut table = leading(&[1]);
        let behind = Refusal::Behind { needed: FIRST };
        assert_eq!(ask(&mut table, after(1), renewal(1, 9)), Err(behind));
        assert_eq!(ask(&mut table, after(1), renewal(2, 9)), Err(behind));
        let grant = Grant {
            to: process(2, 1),
            sent_at: renewal(2, 10).sent_at,
            lease: LEASE,
        };
        assert_eq!(ask(&mut table, after(2), renewal(2, 10)), Ok(grant));
    }

    /// Rule 13: half a lease to acknowledge, then at most one more to wait.
    #[test]
    fn a_slow_node_is_let_go() {
        let mut table = leading(&[1]);
        assert!(ask(&mut table, after(0), renewal(1, 10)).is_ok());
        commit(&mut table, after(100), 11);
        assert!(ask(&mut table, after(1099), renewal(1, 10)).is_ok());
        assert_eq!(
            ask(&mut table, after(1100), renewal(1, 10)),
            Err(Refusal::Slow)
        );
        let until = after(1099) + LEASE + margin(LEASE);
        assert_eq!(table.step(until, Input::Tick), settled(11, &[]));
        assert!(until < after(100) + LEASE * 8 / 5);
    }

    /// It is always a few behind: what is answered while it asks is without it.
    #[test]
    fn a_node_that_keeps_up_gets_a_lease_while_purges_keep_coming() {
        let after = later;
        let mut table = leading(&[1, 2]);
        assert!(ask(&mut table, after(0), renewal(1, 10)).is_ok());
        table.step(after(0), Input::Released(process(2, 1)));
        // A purge every millisecond; 1 acknowledges at once, 2 five later.
        let asks_at = [100, 600, 1100, 1600];
        let (mut answers, mut slowest) = (Vec::new(), 0);
        let mut answered = 0;
        for ms in 1..=2000 {
            let index = 100 + ms;
            let mut outputs = commit(&mut table, after(ms), index);
            outputs.extend(acked(&mut table, after(ms), 1, index));
            outputs.extend(acked(&mut table, after(ms), 2, index - 5));
            for output in outputs {
                let Output::Settled { index, .. } = output else {
                    panic!("{output:?}");
                };
                slowest = slowest.max(ms - (index.0 - 100));
                answered += 1;
            }
            if ms % 500 == 250 {
                assert!(ask(&mut table, after(ms), renewal(1, index)).is_ok());
            }
            if asks_at.contains(&ms) {
                answers.push(ask(&mut table, after(ms), renewal(2, index - 5)).is_ok());
            }
        }
        // Behind; behind, and waited for; leased.
        assert_eq!(answers, [false, false, true, true]);
        assert_eq!((slowest, answered), (5, 1995));
    }

    /// Waiting for one that fell behind costs purges half a lease, once.
    #[test]
    fn a_node_that_does_not_keep_up_is_not_waited_for_again() {
        let after = later;
        let mut table = leading(&[1, 2]);
        assert!(ask(&mut table, after(0), renewal(1, 10)).is_ok());
        table.step(after(0), Input::Released(process(2, 1)));
        let commit_and_ack = |table: &mut LeaseTable, ms, index| {
            let outputs = commit(table, after(ms), index);
            [outputs, acked(table, after(ms), 1, index)].concat()
        };
        assert_eq!(commit_and_ack(&mut table, 1, 11), settled(11, &[1]));
        assert!(ask(&mut table, after(2), renewal(2, 10)).is_err());
        assert_eq!(commit_and_ack(&mut table, 3, 12), settled(12, &[1]));
        assert!(ask(&mut table, after(500), renewal(2, 11)).is_err());
        assert_eq!(commit_and_ack(&mut table, 501, 13), []);
        assert!(ask(&mut table, after(1000), renewal(2, 11)).is_err());
        let until = after(500) + LEASE / 2;
        assert_eq!(table.next_tick(), Some(until));
        assert_eq!(table.step(until, Input::Tick), settled(13, &[1]));
        assert!(ask(&mut table, after(1600), renewal(2, 11)).is_err());
        assert_eq!(commit_and_ack(&mut table, 1601, 14), settled(14, &[1]));
    }

    #[test]
    fn a_renewal_that_came_during_a_round_waits_for_the_next() {
        let mut table = leading(&[1, 2]);
        let first = table.step(after(0), Input::Renew(renewal(1, 10)));
        assert_eq!(first, [Output::StartRound { round: 1 }]);
        assert_eq!(table.step(after(1), Input::Renew(renewal(2, 10))), []);
        let outputs = table.step(after(2), Input::RoundConfirmed { round: 1, term: 3 });
        assert!(matches!(outputs[0], Output::Granted(Grant { to, .. }) if to == process(1, 1)));
        assert_eq!(outputs[1..], [Output::StartRound { round: 2 }]);
        // The first round's end proves nothing about the second.
        assert_eq!(
            table.step(after(3), Input::RoundConfirmed { round: 1, term: 3 }),
            []
        );
        let reason = Refusal::NotLeader;
        let refused = [Output::Refused {
            renewal: renewal(2, 10),
            reason,
        }];
        assert_eq!(
            table.step(after(4), Input::RoundFailed { round: 2 }),
            refused
        );
    }

    /// Deposed and elected again, a leader knows nothing of the leases and
    /// purges in between; its old table must grant and settle nothing.
    #[test]
    fn another_term_proves_nothing() {
        let mut table = leading(&[]);
        table.step(after(0), Input::Renew(renewal(1, 10)));
        let reason = Refusal::NotLeader;
        let refused = [Output::Refused {
            renewal: renewal(1, 10),
            reason,
        }];
        assert_eq!(
            table.step(after(1), Input::RoundConfirmed { round: 1, term: 5 }),
            refused
        );
        let later = Input::Committed {
            index: PurgeIndex(20),
            term: 5,
        };
        let unsettled = [Output::Unsettled {
            index: PurgeIndex(20),
        }];
        assert_eq!(table.step(after(2), later), unsettled);
        // What was committed before this term is below every later leader's first entry.
        let earlier = Input::Committed {
            index: PurgeIndex(8),
            term: 2,
        };
        assert_eq!(table.step(after(3), earlier), settled(8, &[1]));
    }

    #[test]
    fn a_leader_that_follows_promises_nothing() {
        let mut table = leading(&[1]);
        commit(&mut table, after(0), 11);
        table.step(after(0), Input::Renew(renewal(1, 10)));
        let reason = Refusal::NotLeader;
        let lost = [
            Output::Refused {
                renewal: renewal(1, 10),
                reason,
            },
            Output::Unsettled {
                index: PurgeIndex(11),
            },
        ];
        assert_eq!(table.step(after(1), Input::Follow), lost);
        assert_eq!(
            commit(&mut table, after(2), 12),
            [Output::Unsettled {
                index: PurgeIndex(12)
            }]
        );
        let refused = [Output::Refused {
            renewal: renewal(1, 10),
            reason,
        }];
        assert_eq!(table.step(after(2), Input::Renew(renewal(1, 10))), refused);
    }

    #[test]
    fn a_new_process_releases_the_lease_of_the_one_before() {
        let mut table = leading(&[1]);
        assert!(ask(&mut table, after(0), renewal(1, 12)).is_ok());
        commit(&mut table, after(1), 13);
        // It has lost what the first had applied: its own word counts.
        let restarted = Renewal {
            from: process(1, 2),
            ..renewal(1, 11)
        };
        let outputs = table.step(after(2), Input::Renew(restarted));
        assert_eq!(outputs[..1], settled(13, &[]));
        let needed = PurgeIndex(13);
        let outputs = table.step(after(3), Input::RoundConfirmed { round: 2, term: 3 });
        let reason = Refusal::Behind { needed };
        assert_eq!(
            outputs,
            [Output::Refused {
                renewal: restarted,
                reason
            }]
        );
        // Words of the dead.
        assert_eq!(
            ask(&mut table, after(4), renewal(1, 20)),
            Err(Refusal::Replaced)
        );
        commit(&mut table, after(5), 14);
        acked(&mut table, after(5), 1, 20);
        assert_eq!(commit(&mut table, after(5), 15), settled(15, &[]));
    }

    /// A new process may hold a lease of an earlier leader.
    #[test]
    fn a_restart_does_not_shorten_a_new_leaders_wait() {
        let mut table = leading(&[1]);
        table.step(
            after(0),
            Input::Acked {
                from: process(1, 4),
                applied: PurgeIndex(9),
            },
        );
        table.step(
            after(1),
            Input::Acked {
                from: process(1, 5),
                applied: PurgeIndex(9),
            },
        );
        assert_eq!(commit(&mut table, after(2), 11), []);
    }

    /// That a process has stopped may be heard late: the one after it has asked
    /// an earlier leader meanwhile.
    #[test]
    fn the_word_of_a_dead_process_does_not_shorten_a_new_leaders_wait() {
        let until = LEADS_AT + LEASE + margin(LEASE);
        let mut table = leading(&[1]);
        table.step(after(0), Input::Released(process(1, 4)));
        assert_eq!(commit(&mut table, after(1), 11), []);
        assert_eq!(table.next_tick(), Some(until));
        assert_eq!(table.step(until, Input::Tick), settled(11, &[]));

        // Nor does what it had applied before its restart lost it again.
        let mut table = leading(&[1]);
        assert_eq!(commit(&mut table, after(0), 9), []);
        assert_eq!(acked(&mut table, after(1), 1, 9), []);
        assert_eq!(table.step(until, Input::Tick), settled(9, &[]));

        // One that is known to have lived in this term asked nobody before it.
        let mut table = leading(&[1]);
        acked(&mut table, after(0), 1, 10);
        table.step(after(1), Input::Released(process(1, 1)));
        assert_eq!(commit(&mut table, after(2), 11), settled(11, &[]));
    }

    /// Rule 13: what has waited for half a lease waits for nobody else.
    #[test]
    fn a_purge_that_is_overdue_waits_for_no_other_node() {
        let after = later;
        let mut table = leading(&[1, 2]);
        assert!(ask(&mut table, after(0), renewal(1, 10)).is_ok());
        // Nobody but 1 holds a lease; 2 has been behind once, and caught up to there.
        assert_eq!(commit(&mut table, after(1), 11), []);
        assert_eq!(acked(&mut table, after(2), 1, 11), settled(11, &[1]));
        assert!(ask(&mut table, after(3), renewal(2, 10)).is_err());
        assert_eq!(commit(&mut table, after(4), 12), []);
        assert_eq!(acked(&mut table, after(5), 1, 12), settled(12, &[1]));
        // Then 1 falls silent.
        assert_eq!(commit(&mut table, after(600), 13), []);
        assert!(ask(&mut table, after(1900), renewal(2, 11)).is_err());
        let until = after(0) + LEASE + margin(LEASE);
        assert_eq!(table.step(until, Input::Tick), settled(13, &[]));
    }

    #[test]
    fn a_released_lease_is_not_waited_for() {
        let mut table = leading(&[1]);
        assert!(ask(&mut table, after(0), renewal(1, 10)).is_ok());
        commit(&mut table, after(1), 11);
        let released = table.step(after(2), Input::Released(process(1, 1)));
        assert_eq!(released, settled(11, &[]));
    }

    /// A3: whatever both clocks do within 1 %, the holder stops first.
    #[test]
    fn the_holder_stops_before_the_table() {
        for ms in [100, 333, 2000, 60_000] {
            let lease = Duration::from_millis(ms);
            let slow_holder = (lease - margin(lease)).as_nanos() as f64 / 0.99;
            let fast_table = (lease + margin(lease)).as_nanos() as f64 / 1.01;
            assert!(slow_holder <= fast_table, "{slow_holder} {fast_table}");
        }
    }

    fn at(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn granted(holder: &mut LeaseHolder, now: u64, sent: u64) {
        let grant = Grant {
            to: process(1, 1),
            sent_at: at(sent),
            lease: LEASE,
        };
        holder.granted(at(now), at(now), &grant);
    }

    #[test]
    fn a_lease_counts_from_when_it_was_asked_for() {
        let mut holder = LeaseHolder::new(process(1, 1), LEASE);
        assert!(!holder.may_serve(at(0)));
        let sent = holder.renewal(at(1000), at(1000), PurgeIndex(4));
        let expected = Renewal {
            from: process(1, 1),
            applied: PurgeIndex(4),
            sent_at: at(1000),
        };
        assert_eq!(sent, Some(expected));
        assert_eq!(holder.renewal(at(1499), at(1499), PurgeIndex(4)), None);
        assert!(holder.renewal(at(1500), at(1500), PurgeIndex(4)).is_some());
        granted(&mut holder, 1900, 1000);
        assert!(holder.may_serve(at(2979)) && !holder.may_serve(at(2980)));
        // Late grants of earlier renewals shorten nothing; strange ones do nothing.
        granted(&mut holder, 2000, 1500);
        granted(&mut holder, 2001, 1000);
        granted(&mut holder, 2002, 9000);
        let other = Grant {
            to: process(1, 2),
            sent_at: at(2000),
            lease: LEASE,
        };
        holder.granted(at(2003), at(2003), &other);
        assert_eq!(holder.deadline(), at(1500 + 1980) - Duration::from_nanos(1));
    }

    #[test]
    fn lost_time_drops_the_lease() {
        let mut holder = LeaseHolder::new(process(1, 1), LEASE);
        holder.compare(at(0), at(0));
        granted(&mut holder, 100, 90);
        // Rates may differ by 1 % each, and a clock may be set back.
        holder.compare(at(1000), at(1018));
        holder.compare(at(1100), at(500));
        assert!(holder.may_serve(at(1100)));
        holder.compare(at(1200), at(700));
        assert!(!holder.may_serve(at(1200)));
        // A grant that was under way is void, the next one is not.
        granted(&mut holder, 1201, 1190);
        assert!(!holder.may_serve(at(1201)));
        assert!(holder.renewal(at(1202), at(702), PurgeIndex(1)).is_some());
    }

    #[test]
    fn a_stopped_holder_takes_no_lease() {
        let mut holder = LeaseHolder::new(process(1, 1), LEASE);
        granted(&mut holder, 100, 90);
        assert!(holder.may_serve(at(101)));
        holder.stop(at(102));
        granted(&mut holder, 104, 103);
        assert!(!holder.may_serve(at(105)));
        assert_eq!(holder.renewal(at(9000), at(9000), PurgeIndex(1)), None);
    }
}
