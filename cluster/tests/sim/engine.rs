//! A model of the daemon's engine: memory, disk, flights, owners, origin, with
//! every rule that touches a purge, and the deliberate mistakes.

use pingora_slice_cluster::PurgeIndex;
use pingora_slice_cluster::purge::{Floor, joinable};

use crate::check::Answered;
use crate::world::{Defect, Entry, Event, Key, MS, Msg, NODES, Time, World};

/// Who waits for a flight.
#[derive(Clone, Copy, Debug)]
pub enum Waiter {
    Client {
        arrived: Time,
        leased: bool,
    },
    Peer {
        node: usize,
        flight: u64,
        floor: PurgeIndex,
    },
}

/// A fill under way.
#[derive(Clone, Debug)]
pub struct Flight {
    pub key: Key,
    /// The least stamp that its result can have.
    stamp: PurgeIndex,
    /// What the origin is asked to confirm.
    condition: Option<Entry>,
    /// When the origin request left; `None` while a peer is asked.
    sent: Option<Time>,
    starter: Waiter,
    joined: Vec<Waiter>,
}

impl World {
    pub fn client_reads(&mut self, n: usize, key: Key, arrived: Time) {
        // Rule 4 before rule 3: what a lease promises holds for floors read after it.
        if self.defect == Some(Defect::FloorBeforeLease)
            && let Some(entry) = self.nodes[n].memory[key].or(self.nodes[n].disk[key])
            && self.usable(n, key, &entry)
        {
            let judged = Some(entry);
            let delay = self.rng.range(1, 40) * MS;
            return self.later(
                n,
                delay,
                Event::DiskRead {
                    key,
                    arrived,
                    judged,
                },
            );
        }
        let leased = self.may_serve(n);
        let client = Waiter::Client { arrived, leased };
        if !leased && self.defect == Some(Defect::FencedJoins) {
            return self.miss(n, key, client);
        }
        if !leased {
            // Rule 5: the origin decides.
            return self.fill(n, key, client);
        }
        if let Some(entry) = self.nodes[n].memory[key] {
            if self.usable(n, key, &entry) {
                self.history.hits += 1;
                return self.answer_client(n, key, arrived, leased, &entry);
            }
        } else if self.nodes[n].disk[key].is_some() {
            let delay = self.rng.range(1, 40) * MS;
            return self.later(
                n,
                delay,
                Event::DiskRead {
                    key,
                    arrived,
                    judged: None,
                },
            );
        }
        self.miss(n, key, client);
    }

    /// Rule 4: checked again after a disk read.
    pub fn disk_read(&mut self, n: usize, key: Key, arrived: Time, judged: Option<Entry>) {
        let leased = self.may_serve(n);
        let client = Waiter::Client { arrived, leased };
        let stored = judged.or(self.nodes[n].disk[key]);
        match stored {
            Some(entry) if leased && (judged.is_some() || self.usable(n, key, &entry)) => {
                self.nodes[n].memory[key] = Some(Entry {
                    checked: 0,
                    ..entry
                });
                self.history.hits += 1;
                self.answer_client(n, key, arrived, leased, &entry);
            }
            _ if leased => self.miss(n, key, client),
            _ => self.fill(n, key, client),
        }
    }

    /// Whoever holds a lease and has nothing usable: flight, owner, origin.
    fn miss(&mut self, n: usize, key: Key, waiter: Waiter) {
        let floor = self.floor(n, key, None);
        let needed = match waiter {
            Waiter::Client { .. } => PurgeIndex(0),
            Waiter::Peer { floor, .. } => floor,
        };
        let any = self.defect == Some(Defect::JoinOldFlight);
        let node = &mut self.nodes[n];
        if let Some(flight) = node.current[key].and_then(|id| node.flights.get_mut(&id)) {
            let at_origin = flight.sent.is_some();
            let fits = joinable(flight.stamp, floor) && flight.stamp >= needed;
            // An owner never waits on a flight that asks another (invariant 3).
            let no_cycle = at_origin || matches!(waiter, Waiter::Client { .. });
            if (fits || any) && no_cycle {
                self.history.joined += 1;
                flight.joined.push(waiter);
                return;
            }
        }
        let owner = (key * 2 + 1) % NODES;
        if owner == n || matches!(waiter, Waiter::Peer { .. }) || self.rng.chance(20) {
            return self.fill(n, key, waiter);
        }
        let stamp = floor.soft;
        let flight = Flight {
            key,
            stamp,
            condition: None,
            sent: None,
            starter: waiter,
            joined: Vec::new(),
        };
        let id = self.start(n, flight);
        self.send(
            n,
            owner,
            Msg::Ask {
                key,
                flight: id,
                floor: stamp,
            },
        );
        self.later(n, 250 * MS, Event::AskTimedOut { flight: id });
    }

    /// Asks the origin. The stamp is what is applied before the request leaves (rule 1).
    fn fill(&mut self, n: usize, key: Key, starter: Waiter) {
        let node = &self.nodes[n];
        let mut stamp = node.state.applied();
        if self.defect == Some(Defect::StampUncommitted) {
            stamp = PurgeIndex(node.raft.log.len() as u64);
        }
        let stored = node.memory[key].or(node.disk[key]);
        // A hard purge ends a generation: nothing to confirm.
        let condition = stored
            .filter(|entry| entry.stamp >= self.floor(n, key, Some(entry.version)).hard)
            .map(|entry| Entry {
                checked: 0,
                ..entry
            });
        let sent = Some(self.now);
        let id = self.start(
            n,
            Flight {
                key,
                stamp,
                condition,
                sent,
                starter,
                joined: Vec::new(),
            },
        );
        let delay = self.origin_delay();
        self.later(n, delay, Event::OriginReached { flight: id });
    }

    fn start(&mut self, n: usize, flight: Flight) -> u64 {
        self.flight_ids += 1;
        let id = self.flight_ids;
        let node = &mut self.nodes[n];
        node.current[flight.key] = Some(id);
        node.flights.insert(id, flight);
        id
    }

    pub fn origin_reached(&mut self, n: usize, id: u64) {
        let Some(key) = self.nodes[n].flights.get(&id).map(|flight| flight.key) else {
            return;
        };
        let version = self.origin[key];
        let delay = self.origin_delay();
        self.later(
            n,
            delay,
            Event::OriginAnswered {
                flight: id,
                version,
            },
        );
    }

    pub fn origin_answered(&mut self, n: usize, id: u64, version: u64) {
        let now_applied = self.nodes[n].state.applied();
        let Some(flight) = self.nodes[n].flights.get(&id).cloned() else {
            return;
        };
        let sent = flight.sent.expect("an origin flight");
        let mut entry = Entry {
            version,
            stamp: flight.stamp,
            confirmed: sent,
            born: sent,
            checked: 0,
        };
        match flight.condition {
            Some(condition) if condition.version == version => {
                self.history.confirmed += 1;
                entry.born = condition.born;
                if self.defect == Some(Defect::ConfirmStampsNow) {
                    entry.stamp = now_applied;
                }
            }
            _ if self.defect == Some(Defect::StampAtEnd) => entry.stamp = now_applied,
            _ => {}
        }
        self.land(n, id, entry, true);
    }

    pub fn peer_asked(&mut self, n: usize, from: usize, key: Key, flight: u64, floor: PurgeIndex) {
        if let Some(entry) = self.nodes[n].memory[key].or(self.nodes[n].disk[key])
            && entry.stamp >= floor
            && self.usable(n, key, &entry)
        {
            return self.send(
                n,
                from,
                Msg::Answer {
                    flight,
                    entry: Some(entry),
                },
            );
        }
        if self.nodes[n].state.applied() < floor {
            return self.send(
                n,
                from,
                Msg::Answer {
                    flight,
                    entry: None,
                },
            );
        }
        self.miss(
            n,
            key,
            Waiter::Peer {
                node: from,
                flight,
                floor,
            },
        );
    }

    /// Rule 7: the asker applies rules 3 and 4 itself.
    pub fn peer_answered(&mut self, n: usize, id: u64, entry: Option<Entry>) {
        let Some(flight) = self.nodes[n].flights.get(&id) else {
            return;
        };
        if flight.sent.is_some() {
            return;
        }
        let key = flight.key;
        let Some(mut entry) = entry else {
            return self.ask_failed(n, id);
        };
        entry.checked = 0;
        if self.defect == Some(Defect::PeerCopyRestamped) {
            entry.stamp = self.nodes[n].state.applied();
        }
        let unchecked = self.defect == Some(Defect::PeerCopyUnchecked);
        let good = self.may_serve(n) && self.usable(n, key, &entry);
        if good || unchecked {
            self.history.peer_copies += 1;
            self.land(n, id, entry, unchecked);
        } else {
            self.ask_failed(n, id);
        }
    }

    /// Everyone who waited for the peer goes to the origin.
    pub fn ask_failed(&mut self, n: usize, id: u64) {
        if self.nodes[n]
            .flights
            .get(&id)
            .is_none_or(|flight| flight.sent.is_some())
        {
            return;
        }
        let Some(flight) = self.remove(n, id) else {
            return;
        };
        self.fill(n, flight.key, flight.starter);
        for waiter in flight.joined {
            self.go_on(n, flight.key, waiter);
        }
    }

    /// A joined waiter that the flight could not serve.
    fn go_on(&mut self, n: usize, key: Key, waiter: Waiter) {
        if self.may_serve(n) || matches!(waiter, Waiter::Peer { .. }) {
            self.miss(n, key, waiter);
        } else {
            self.fill(n, key, waiter);
        }
    }

    /// A flight's result is here: kept, and given to those it is good for.
    fn land(&mut self, n: usize, id: u64, entry: Entry, unchecked: bool) {
        let Some(flight) = self.remove(n, id) else {
            return;
        };
        let key = flight.key;
        self.nodes[n].memory[key] = Some(entry);
        self.nodes[n].disk[key] = Some(Entry {
            checked: 0,
            ..entry
        });
        // Its origin request began after it arrived; a peer's copy was checked.
        self.answer(n, key, flight.starter, &entry);
        for waiter in flight.joined {
            // Rule 6: again at the headers, the tags are known now.
            let floor = self.floor(n, key, Some(entry.version));
            let blind = matches!(
                self.defect,
                Some(Defect::TagsUnknownWhenJoining | Defect::JoinOldFlight)
            );
            let enough = match waiter {
                Waiter::Client { .. } => true,
                Waiter::Peer { floor, .. } => entry.stamp >= floor,
            };
            if (joinable(entry.stamp, floor) && enough)
                || blind
                || unchecked && flight.sent.is_none()
            {
                self.answer(n, key, waiter, &entry);
            } else {
                self.go_on(n, key, waiter);
            }
        }
    }

    fn remove(&mut self, n: usize, id: u64) -> Option<Flight> {
        let node = &mut self.nodes[n];
        let flight = node.flights.remove(&id)?;
        if node.current[flight.key] == Some(id) {
            node.current[flight.key] = None;
        }
        Some(flight)
    }

    fn answer(&mut self, n: usize, key: Key, waiter: Waiter, entry: &Entry) {
        match waiter {
            Waiter::Client { arrived, leased } => {
                self.answer_client(n, key, arrived, leased, entry);
            }
            Waiter::Peer { node, flight, .. } => {
                self.send(
                    n,
                    node,
                    Msg::Answer {
                        flight,
                        entry: Some(*entry),
                    },
                );
            }
        }
    }

    fn answer_client(&mut self, n: usize, key: Key, arrived: Time, leased: bool, entry: &Entry) {
        let answer = Answered {
            node: n,
            key,
            version: entry.version,
            arrived,
            confirmed: entry.confirmed,
            born: entry.born,
            leased,
        };
        self.history.answer(self.now, answer);
    }

    /// Rule 3, with the shortcut: checked at this version of the floors.
    fn usable(&mut self, n: usize, key: Key, entry: &Entry) -> bool {
        let version = self.nodes[n].version;
        if entry.checked >= version {
            return true;
        }
        let usable = self.floor(n, key, Some(entry.version)).allows(entry.stamp);
        let index_instead = self.defect == Some(Defect::CheckedHoldsIndex);
        let node = &mut self.nodes[n];
        if let Some(kept) = &mut node.memory[key]
            && usable
            && (kept.stamp, kept.version) == (entry.stamp, entry.version)
        {
            kept.checked = if index_instead {
                node.state.applied().0
            } else {
                version
            };
        }
        usable
    }

    /// The floor of an object; without a version, its tags are not known.
    fn floor(&self, n: usize, key: Key, version: Option<u64>) -> Floor {
        let tagged = version.map_or(2, |version| version as usize % 2);
        self.nodes[n]
            .state
            .floors()
            .floor(&self.subjects[key][tagged])
    }

    fn may_serve(&self, n: usize) -> bool {
        let node = &self.nodes[n];
        let now = self.clock(n);
        let survived =
            self.defect == Some(Defect::LeaseSurvivesRestart) && now < node.deadline_before_restart;
        node.holder.may_serve(now) || survived || self.defect == Some(Defect::FencedServes)
    }

    fn origin_delay(&mut self) -> Time {
        let most = if self.rng.chance(75) { 15 } else { 900 };
        self.rng.range(1, most) * MS
    }
}
