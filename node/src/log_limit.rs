//! Log lines that whoever sends requests could make many of: at most one in a
//! pace, which says how many were left out before it.

use std::sync::Mutex;
use std::time::{Duration, Instant};

/// The pace of one kind of line.
#[derive(Debug)]
pub struct Paced {
    pace: Duration,
    /// When the last line was written, and how many were left out since.
    last: Mutex<(Option<Instant>, u64)>,
}

impl Paced {
    /// At most one line in `pace`.
    pub const fn new(pace: Duration) -> Paced {
        Paced {
            pace,
            last: Mutex::new((None, 0)),
        }
    }

    /// Whether a line may be written now: then the number of those that were left out.
    pub fn turn(&self) -> Option<u64> {
        self.turn_in(self.pace)
    }

    /// As [`Paced::turn`], with another pace.
    pub fn turn_in(&self, pace: Duration) -> Option<u64> {
        let mut last = self.last.lock().expect("no panic while held");
        let (at, left_out) = &mut *last;
        if at.is_some_and(|at| at.elapsed() < pace) {
            *left_out += 1;
            return None;
        }
        *at = Some(Instant::now());
        Some(std::mem::take(left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_out_is_counted() {
        let paced = Paced::new(Duration::from_secs(3600));
        assert_eq!(paced.turn(), Some(0));
        assert_eq!((paced.turn(), paced.turn()), (None, None));
        paced.last.lock().unwrap().0 = None;
        assert_eq!(paced.turn(), Some(2));
        assert_eq!(paced.turn(), None);
    }
}
