//! How slowly a client may take its answer.
//!
//! Only time spent waiting for the client counts: a slow origin is not the
//! client's fault. What the kernel's send buffer takes counts as taken; it is
//! the client's own window that empties it. Pure: time is an argument.

use std::time::Duration;

use crate::config::ClientTimeouts;

/// One client's pace while it takes one answer.
#[derive(Clone, Debug)]
pub struct Pace {
    timeouts: ClientTimeouts,
    /// Time waited for it, and bytes taken, since it was last found fast enough.
    waited: Duration,
    bytes: u64,
}

impl Pace {
    /// A pace of which nothing is known.
    pub fn new(timeouts: ClientTimeouts) -> Pace {
        Pace {
            timeouts,
            waited: Duration::ZERO,
            bytes: 0,
        }
    }

    /// How long the client may take for its next `bytes` bytes.
    pub fn patience(&self, bytes: u64) -> Duration {
        let ClientTimeouts { write, slow, .. } = self.timeouts;
        match self.timeouts.bytes_per_second_min {
            0 => write,
            // Until it is slower than that even with these bytes, and has been for long enough.
            rate => {
                let fair = Duration::from_secs_f64((self.bytes + bytes) as f64 / rate as f64);
                write.min(fair.max(slow).saturating_sub(self.waited))
            }
        }
    }

    /// Notes that it has taken `bytes` bytes, and was waited for this long.
    pub fn took(&mut self, bytes: u64, time: Duration) {
        let ClientTimeouts { slow, .. } = self.timeouts;
        self.waited += time;
        self.bytes += bytes;
        let rate = self.timeouts.bytes_per_second_min as f64;
        let is_fast_enough = self.bytes as f64 >= rate * self.waited.as_secs_f64();
        if self.waited >= slow && is_fast_enough {
            *self = Pace::new(self.timeouts);
        } else {
            // What it took at once is no licence to stand still for hours.
            self.bytes = self.bytes.min((rate * slow.as_secs_f64()) as u64);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn secs(secs: u64) -> Duration {
        Duration::from_secs(secs)
    }

    fn pace(write: u64, rate: u64, slow: u64) -> Pace {
        Pace::new(ClientTimeouts {
            header: secs(1),
            idle: secs(1),
            write: secs(write),
            bytes_per_second_min: rate,
            slow: secs(slow),
            total: None,
        })
    }

    /// Takes pieces of `bytes` in `time` each until patience ends, or for an hour.
    fn lasts(mut pace: Pace, bytes: u64, time: Duration) -> Option<Duration> {
        let mut at = Duration::ZERO;
        while at < secs(3600) {
            if pace.patience(bytes) < time {
                return Some(at + pace.patience(bytes));
            }
            pace.took(bytes, time);
            at += time;
        }
        None
    }

    #[test]
    fn a_client_below_the_rate_is_let_go_after_its_time() {
        // 100 bytes a second where 1000 are wanted.
        assert_eq!(lasts(pace(3600, 1000, 60), 100, secs(1)), Some(secs(60)));
        assert_eq!(lasts(pace(3600, 1000, 60), 6_000, secs(60)), Some(secs(60)));
        // Just fast enough, in whatever pieces.
        assert_eq!(lasts(pace(3600, 1000, 60), 1000, secs(1)), None);
        assert_eq!(lasts(pace(3600, 1000, 60), 64_000, secs(64)), None);
        // A rate of 0: as slow as it likes, but for `write`.
        assert_eq!(lasts(pace(100, 0, 60), 1, secs(99)), None);
        assert_eq!(lasts(pace(100, 0, 60), 1, secs(101)), Some(secs(100)));
    }

    #[test]
    fn a_burst_is_no_licence_to_stand_still() {
        let mut pace = pace(3600, 1000, 60);
        for _ in 0..1000 {
            pace.took(1 << 20, Duration::from_micros(100));
        }
        assert!(pace.patience(64_000) <= secs(60 + 64));
    }
}
