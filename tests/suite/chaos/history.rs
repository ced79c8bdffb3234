//! The rule, and what happened around each breach of it.
//!
//! A read must bring a version at least as new as the newest one that was set
//! before a purge which was answered 200 before the read began. Each purge and
//! each read is looked at once, when it ends: linear time, whatever the length.
//! Both sides err towards silence: a purge counts from after its answer was
//! read, with the versions noted before it was sent; a read's due is looked up
//! before it is sent.

use std::collections::VecDeque;
use std::fmt::{Display, Write as _};
use std::time::{Duration, Instant};

/// Events before a violation that it is printed with.
const EVENTS_BEFORE: usize = 40;
/// And after it.
const EVENTS_AFTER: usize = 10;
/// Violations that are kept with their events; all are counted.
const VIOLATIONS_KEPT: usize = 20;

/// What a read that begins now must bring, for one object.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Due {
    /// At least this version.
    pub version: u32,
    /// When that was promised, since the beginning.
    since: Duration,
}

pub(super) struct History {
    started: Instant,
    due: Vec<Due>,
    events: VecDeque<String>,
    violations: Vec<Violation>,
    /// Whole answers older than they had to be.
    pub stale: u64,
    /// Bytes of no version.
    pub wrong: u64,
    /// Whatever else must not happen.
    pub broken: u64,
    /// Longest time from a promise to a read that broke it.
    pub longest: Duration,
}

struct Violation {
    text: String,
    events_to_come: usize,
}

impl History {
    pub fn new(objects: usize) -> History {
        History {
            started: Instant::now(),
            due: vec![Due::default(); objects],
            events: VecDeque::new(),
            violations: Vec::new(),
            stale: 0,
            wrong: 0,
            broken: 0,
            longest: Duration::ZERO,
        }
    }

    /// Since the beginning.
    pub fn now(&self) -> Duration {
        self.started.elapsed()
    }

    /// What a read of this object that begins now must bring.
    pub fn due(&self, object: usize) -> Due {
        self.due[object]
    }

    pub fn note(&mut self, event: impl Display) {
        if self.events.len() == EVENTS_BEFORE {
            self.events.pop_front();
        }
        let event = format!("{:9.3}  {event}", self.now().as_secs_f64());
        for violation in &mut self.violations {
            if violation.events_to_come > 0 {
                violation.events_to_come -= 1;
                let _ = write!(violation.text, "\n    {event}");
            }
        }
        self.events.push_back(event);
    }

    /// A purge was answered 200; before it was sent, each of these objects was
    /// at this version.
    pub fn purged(&mut self, objects: &[(usize, u32)]) {
        let since = self.now();
        for (object, version) in objects {
            if *version > self.due[*object].version {
                self.due[*object] = Due {
                    version: *version,
                    since,
                };
            }
        }
    }

    /// A read has brought `version`, `None` when the body is of none; `what`
    /// tells of it. Whether that is right.
    pub fn read(&mut self, due: Due, version: Option<u32>, what: impl FnOnce() -> String) -> bool {
        let text = match version {
            Some(version) if version >= due.version => return true,
            Some(version) => {
                self.stale += 1;
                let late = self.now().saturating_sub(due.since);
                self.longest = self.longest.max(late);
                let (due, late) = (due.version, late.as_secs_f64());
                format!(
                    "STALE: {}: version {version}, {due} was due since {late:.3} s",
                    what()
                )
            }
            None => {
                self.wrong += 1;
                format!("WRONG BYTES: {}: of no version", what())
            }
        };
        self.violated(text);
        false
    }

    /// Something happened that must not, whatever is read.
    pub fn broke(&mut self, what: &str) {
        self.broken += 1;
        self.violated(format!("BROKEN: {what}"));
    }

    fn violated(&mut self, mut text: String) {
        if self.violations.len() == VIOLATIONS_KEPT {
            return;
        }
        self.note(&text);
        for event in &self.events {
            let _ = write!(text, "\n    {event}");
        }
        self.violations.push(Violation {
            text,
            events_to_come: EVENTS_AFTER,
        });
    }

    /// How many there were, and the first of them with the events around them.
    pub fn verdict(&self) -> Result<(), String> {
        let count = self.stale + self.wrong + self.broken;
        if count == 0 {
            return Ok(());
        }
        let texts: Vec<&str> = self.violations.iter().map(|v| v.text.as_str()).collect();
        Err(format!("{count} violations\n{}", texts.join("\n")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_right_passes() {
        let mut history = History::new(2);
        let early = history.due(0);
        history.purged(&[(0, 3)]);
        // Begun before the answer: may be old. Begun after it: may be newer.
        assert!(history.read(early, Some(2), String::new));
        let late = history.due(0);
        assert!(history.read(late, Some(3), String::new));
        assert!(history.read(late, Some(4), String::new));
        assert!(history.read(history.due(1), Some(1), String::new));
        // A purge that was sent earlier and answered later takes nothing back.
        history.purged(&[(0, 2)]);
        assert!(!history.read(history.due(0), Some(2), String::new));
    }

    #[test]
    fn a_breach_is_told_with_what_happened_around_it() {
        let mut history = History::new(1);
        history.note("a purge");
        history.purged(&[(0, 3)]);
        assert!(!history.read(history.due(0), Some(2), || "node 1".into()));
        history.note("a restart");
        for _ in 0..EVENTS_AFTER {
            history.note("later");
        }
        history.note("too late");
        let told = history.verdict().unwrap_err();
        for part in [
            "STALE: node 1: version 2, 3 was due",
            "a purge",
            "a restart",
        ] {
            assert!(told.contains(part), "{told}");
        }
        assert!(!told.contains("too late"), "{told}");
    }

    #[test]
    fn bytes_of_no_version_are_a_breach_though_nothing_is_due() {
        let mut history = History::new(1);
        assert!(!history.read(history.due(0), None, || "mixed".into()));
        assert!(
            history
                .verdict()
                .unwrap_err()
                .contains("WRONG BYTES: mixed")
        );
    }

    #[test]
    fn all_are_counted_and_a_few_are_told() {
        let mut history = History::new(1);
        history.purged(&[(0, 2)]);
        for _ in 0..1000 {
            history.read(history.due(0), Some(1), String::new);
        }
        history.broke("a node has ended");
        let told = history.verdict().unwrap_err();
        assert!(told.starts_with("1001 violations"), "{told}");
        assert_eq!(told.matches("\nSTALE").count() + 1, VIOLATIONS_KEPT + 1);
    }
}
