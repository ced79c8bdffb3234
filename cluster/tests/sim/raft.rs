//! A small correct Raft: terms, elections, whole logs in every append, and
//! linearizable reads by probes. Stands in for openraft; the entries, the
//! state they build and the leases are the real ones.

use std::rc::Rc;

use pingora_slice_cluster::lease::Input;
use pingora_slice_cluster::state::{ClusterState, Command, Outcome};
use pingora_slice_cluster::{NodeId, PurgeIndex};

use crate::world::{Defect, MS, Msg, NODES, Time, VOTERS, World};

const HEARTBEAT: Time = 120 * MS;

/// Term and command; a leader's first entry has none.
pub type Log = Rc<Vec<(u64, Option<Rc<Command>>)>>;

#[derive(Clone, Debug)]
pub enum Role {
    Follower,
    Candidate {
        votes: [bool; VOTERS],
    },
    Leader {
        matched: [usize; NODES],
        probed: [u64; NODES],
    },
}

pub struct Raft {
    // On disk.
    pub term: u64,
    pub log: Log,
    /// The leader's term from which the log last came.
    log_term: u64,
    // In memory.
    pub role: Role,
    pub commit: usize,
    pub leader: Option<usize>,
    pub election_due: Time,
    heartbeat_due: Time,
    /// Number of the last probe sent; never used again by this process.
    probe: u64,
    /// The round under way: its number, and the probe that must be answered.
    round: Option<(u64, u64)>,
    /// The term of the lease table's reign.
    pub reign: u64,
}

impl Raft {
    pub fn new(log: Log) -> Raft {
        Raft {
            term: 1,
            log,
            log_term: 1,
            role: Role::Follower,
            commit: 0,
            leader: None,
            election_due: 0,
            heartbeat_due: 0,
            probe: 0,
            round: None,
            reign: 0,
        }
    }

    /// After a restart: the disk is what remains.
    pub fn restart(&mut self, now: Time) {
        let term = self.term;
        let log_term = self.log_term;
        let probe = self.probe;
        *self = Raft {
            term,
            log_term,
            probe,
            ..Raft::new(Rc::clone(&self.log))
        };
        self.election_due = now + 600 * MS;
    }

    pub fn leads(&self) -> bool {
        matches!(self.role, Role::Leader { .. })
    }

    fn last(&self) -> (u64, usize) {
        (self.log.last().map_or(0, |entry| entry.0), self.log.len())
    }
}

impl World {
    pub fn raft_tick(&mut self, n: usize) {
        let now = self.now;
        let raft = &mut self.nodes[n].raft;
        if raft.leads() {
            if now >= raft.heartbeat_due {
                self.broadcast(n);
            }
        } else if n < VOTERS && now >= raft.election_due {
            raft.term += 1;
            raft.role = Role::Candidate {
                votes: [false; VOTERS],
            };
            raft.leader = None;
            raft.election_due = now + self.rng.range(500, 1200) * MS;
            let (term, last) = (raft.term, raft.last());
            for voter in 0..VOTERS {
                if voter != n {
                    self.send(n, voter, Msg::Vote { term, last });
                }
            }
            self.vote_received(n, n, term);
        }
    }

    pub fn propose(&mut self, n: usize, command: Command) {
        let raft = &mut self.nodes[n].raft;
        let term = raft.term;
        Rc::make_mut(&mut raft.log).push((term, Some(Rc::new(command))));
        self.broadcast(n);
    }

    /// Begins a linearizable read; false where this node does not lead.
    pub fn start_round(&mut self, n: usize, round: u64) -> bool {
        let raft = &mut self.nodes[n].raft;
        if !raft.leads() {
            return false;
        }
        raft.round = Some((round, raft.probe + 1));
        self.broadcast(n);
        true
    }

    fn broadcast(&mut self, n: usize) {
        let now = self.now;
        let raft = &mut self.nodes[n].raft;
        raft.heartbeat_due = now + HEARTBEAT;
        raft.probe += 1;
        let append = Msg::Append {
            term: raft.term,
            log: Rc::clone(&raft.log),
            commit: raft.commit,
            probe: raft.probe,
        };
        if let Role::Leader { matched, probed } = &mut raft.role {
            matched[n] = raft.log.len();
            probed[n] = raft.probe;
        }
        for to in 0..NODES {
            let member = self.nodes[n]
                .state
                .members()
                .contains_key(&NodeId(to as u64 + 1));
            if to != n && member {
                self.send(n, to, append.clone());
            }
        }
    }

    /// Any message of a later term ends a candidacy or a reign.
    fn see_term(&mut self, n: usize, term: u64) {
        let raft = &mut self.nodes[n].raft;
        if term <= raft.term {
            return;
        }
        raft.term = term;
        let led = raft.leads();
        raft.role = Role::Follower;
        raft.leader = None;
        // A shell may miss that it did not lead for a moment.
        if led && self.rng.chance(50) {
            self.nodes[n].raft.round = None;
            self.nodes[n].raft.reign = 0;
            self.table(n, Input::Follow);
        }
    }

    pub fn vote_asked(&mut self, n: usize, from: usize, term: u64, last: (u64, usize)) {
        let knew = self.nodes[n].raft.term;
        self.see_term(n, term);
        let now = self.now;
        let raft = &mut self.nodes[n].raft;
        // One vote per term, given when the term is first heard of.
        let granted = term > knew && last >= raft.last();
        if granted {
            raft.election_due = now + self.rng.range(500, 1200) * MS;
            self.send(n, from, Msg::VoteGranted { term });
        }
    }

    pub fn vote_received(&mut self, n: usize, from: usize, term: u64) {
        let raft = &mut self.nodes[n].raft;
        let Role::Candidate { votes } = &mut raft.role else {
            return;
        };
        if raft.term != term {
            return;
        }
        votes[from] = true;
        if votes.iter().filter(|vote| **vote).count() > VOTERS / 2 {
            raft.role = Role::Leader {
                matched: [0; NODES],
                probed: [0; NODES],
            };
            raft.leader = Some(n);
            raft.log_term = term;
            Rc::make_mut(&mut raft.log).push((term, None));
            // The shell asks again for a read that it still waits for.
            if let Some((round, _)) = raft.round {
                raft.round = Some((round, raft.probe + 1));
            }
            self.broadcast(n);
        }
    }

    pub fn append(
        &mut self,
        n: usize,
        from: usize,
        (term, log, commit, probe): (u64, Log, usize, u64),
    ) {
        self.see_term(n, term);
        let now = self.now;
        let raft = &mut self.nodes[n].raft;
        if term < raft.term {
            let term = raft.term;
            self.send(
                n,
                from,
                Msg::Appended {
                    term,
                    matched: 0,
                    probe: 0,
                },
            );
            return;
        }
        raft.role = Role::Follower;
        raft.leader = Some(from);
        raft.election_due = now + self.rng.range(500, 1200) * MS;
        let matched = log.len();
        if raft.log_term < term || raft.log.len() < log.len() {
            raft.log = log;
            raft.log_term = term;
        }
        raft.commit = raft.commit.max(commit.min(matched));
        self.send(
            n,
            from,
            Msg::Appended {
                term,
                matched,
                probe,
            },
        );
        self.apply_committed(n);
    }

    pub fn appended(&mut self, n: usize, from: usize, term: u64, ack: (usize, u64)) {
        self.see_term(n, term);
        let raft = &mut self.nodes[n].raft;
        let Role::Leader { matched, probed } = &mut raft.role else {
            return;
        };
        if term != raft.term || from >= VOTERS {
            return;
        }
        matched[from] = matched[from].max(ack.0);
        probed[from] = probed[from].max(ack.1);
        let quorum = |of: &mut dyn FnMut(usize) -> u64| {
            let mut values: Vec<u64> = (0..VOTERS).map(of).collect();
            values.sort_unstable();
            values[VOTERS / 2]
        };
        let committed = quorum(&mut |voter| matched[voter] as u64) as usize;
        let proven = quorum(&mut |voter| probed[voter]);
        let of_this_term = committed > 0 && raft.log[committed - 1].0 == raft.term;
        if of_this_term && committed > raft.commit {
            raft.commit = committed;
            self.apply_committed(n);
            // The others learn of it now rather than with the next heartbeat.
            self.broadcast(n);
        }
        let raft = &mut self.nodes[n].raft;
        if let Some((round, probe)) = raft.round
            && proven >= probe
        {
            raft.round = None;
            let term = raft.term;
            self.table(n, Input::RoundConfirmed { round, term });
        }
    }

    /// Applies what is committed, unless this node's applying is stalled.
    pub fn apply_committed(&mut self, n: usize) {
        if self.now < self.nodes[n].apply_stalled_until {
            if self.defect == Some(Defect::AckBeforeApplying) {
                self.acknowledge(n);
            }
            return;
        }
        let before = self.nodes[n].state.applied();
        let mut next = before.0 as usize + 1;
        // An entry may be committed here and its log not arrived: a snapshot came first.
        while next <= self.nodes[n].raft.commit.min(self.nodes[n].raft.log.len()) {
            self.apply(n, next);
            next += 1;
        }
        let applied = self.nodes[n].state.applied();
        if applied > before {
            self.acknowledge(n);
            if applied.0.is_multiple_of(4) {
                self.nodes[n].saved = self.nodes[n].state.to_bytes();
            }
        }
    }

    fn apply(&mut self, n: usize, index: usize) {
        let node = &mut self.nodes[n];
        let (term, command) = node.raft.log[index - 1].clone();
        let Some(command) = command else {
            node.state.advance(index as u64);
            if node.raft.leads() && term == node.raft.term {
                self.lead(n, index as u64);
            }
            return;
        };
        if let Outcome::Purged(holds) = node.state.apply(index as u64, &command) {
            node.version += 1;
            if let Command::Purge { token, .. } = &*command
                && let Some(from) = node.proposals.remove(token)
            {
                node.waiting.entry(holds).or_default().push((from, *token));
                if self.defect == Some(Defect::QuorumOnly) {
                    self.send(n, from, Msg::Purged { token: *token });
                }
                self.table(n, Input::Committed { index: holds, term });
            }
        }
    }

    fn lead(&mut self, n: usize, first_entry: u64) {
        let node = &mut self.nodes[n];
        let (term, lease) = (node.raft.term, node.state.lease().expect("founded"));
        let mut nodes = node.state.nodes();
        let first_entry = PurgeIndex(first_entry);
        if self.defect == Some(Defect::NewLeaderDoesNotWait) {
            nodes.clear();
        }
        if self.defect == Some(Defect::RetiredNotWaitedFor) {
            nodes.retain(|id| !node.state.is_retired(*id));
        }
        node.needed = first_entry;
        node.raft.reign = term;
        self.table(
            n,
            Input::Lead {
                term,
                first_entry,
                nodes,
                lease,
            },
        );
    }

    pub fn snapshot_received(&mut self, n: usize, bytes: &[u8]) {
        let node = &mut self.nodes[n];
        let snapshot = ClusterState::from_bytes(bytes).expect("our own snapshot");
        if self.defect == Some(Defect::SnapshotLowersFloors) {
            let applied = node.state.applied();
            node.state = snapshot;
            node.state.advance(applied.0);
        } else {
            node.state.install(snapshot);
        }
        node.version += 1;
        self.acknowledge(n);
    }
}
