//! Reads that may wait for the disk: each on a thread of its own, so many at a
//! time, and nobody waits for a disk that hangs.
//!
//! A read that takes too long is given up by who asked; its thread and its
//! place among the reads come back when the disk answers, if ever. Meanwhile
//! the disk is left alone: every read is a miss at once, but for some from time
//! to time that see whether it answers again. A queue before a disk that is
//! only slow is no fault: who waits for a place gives up only where reads hang.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinHandle;
use tracing::{info, warn};

/// Reads at a time, those that hang included.
const READS_MAX: usize = 64;
/// How long a read is waited for: the largest slice (10 MiB) beside 63 others
/// comes from a disk of 140 MB/s in that time.
const READ_WITHIN: Duration = Duration::from_secs(5);
/// How long a disk that hangs is left alone.
const LEFT_ALONE: Duration = Duration::from_secs(5);

/// The reads of one store. Cheap to clone.
#[derive(Clone)]
pub(super) struct Reads {
    places: Arc<Semaphore>,
    shared: Arc<Hanging>,
    within: Duration,
    left_alone: Duration,
}

#[derive(Default)]
struct Hanging {
    /// Reads that were given up and have not come back.
    count: AtomicUsize,
    /// Until when none is begun while one hangs.
    until: Mutex<Option<Instant>>,
    given_up: AtomicU64,
}

/// Whoever waits for a read. One who leaves before its time has it watched until
/// then: a disk that hangs is seen all the same.
struct Asker<'a, T: Send + 'static> {
    reads: &'a Reads,
    /// `None` once it has come back, or has been given up.
    reading: Option<JoinHandle<Option<T>>>,
    one_has_left: Arc<Mutex<bool>>,
    until: Instant,
}

impl<T: Send + 'static> Drop for Asker<'_, T> {
    fn drop(&mut self) {
        let Some(reading) = self.reading.take() else {
            return;
        };
        let (reads, until) = (self.reads.clone(), self.until);
        let one_has_left = self.one_has_left.clone();
        if let Ok(runtime) = Handle::try_current() {
            runtime.spawn(async move {
                if tokio::time::timeout_at(until.into(), reading)
                    .await
                    .is_err()
                {
                    reads.hung(&one_has_left);
                }
            });
        }
    }
}

/// Tells that a read has ended, when it is dropped: also by a panic.
struct End {
    one_has_left: Arc<Mutex<bool>>,
    shared: Arc<Hanging>,
    _place: OwnedSemaphorePermit,
}

impl Drop for End {
    fn drop(&mut self) {
        let one_has_left = self.one_has_left.lock();
        let mut one_has_left = one_has_left.unwrap_or_else(PoisonError::into_inner);
        if *one_has_left && self.shared.count.fetch_sub(1, Ordering::AcqRel) == 1 {
            info!("the disk answers reads again");
        }
        *one_has_left = true;
    }
}

/// How a read is begun.
#[derive(PartialEq, Eq)]
enum Turn {
    /// As far as is known the disk answers.
    Usual,
    /// To see whether it answers again.
    Probe,
}

impl Hanging {
    /// Whether a read may begin now; one that probes is the only one for `quiet`.
    fn turn(&self, quiet: Duration) -> Option<Turn> {
        if !self.is_any() {
            return Some(Turn::Usual);
        }
        let now = Instant::now();
        let mut until = self.until.lock().unwrap_or_else(PoisonError::into_inner);
        if until.is_some_and(|until| now < until) {
            return None;
        }
        *until = Some(now + quiet);
        Some(Turn::Probe)
    }

    fn is_left_alone(&self) -> bool {
        let until = *self.until.lock().unwrap_or_else(PoisonError::into_inner);
        self.is_any() && until.is_some_and(|until| Instant::now() < until)
    }

    fn is_any(&self) -> bool {
        self.count.load(Ordering::Acquire) > 0
    }
}

impl Default for Reads {
    fn default() -> Self {
        Reads::new(READS_MAX, READ_WITHIN, LEFT_ALONE)
    }
}

impl Reads {
    fn new(max: usize, within: Duration, left_alone: Duration) -> Reads {
        Reads {
            places: Arc::new(Semaphore::new(max)),
            shared: Arc::default(),
            within,
            left_alone,
        }
    }

    /// What `read` finds; `None`, too, where the disk hangs.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        read: impl FnOnce() -> Option<T> + Send + 'static,
    ) -> Option<T> {
        let turn = self.shared.turn(self.within + self.left_alone)?;
        let place = loop {
            let place = self.places.clone().acquire_owned();
            match tokio::time::timeout(self.within, place).await {
                Ok(place) => break place.ok()?,
                Err(_) if self.shared.is_any() => {
                    self.give_up();
                    return None;
                }
                Err(_) => {}
            }
        };
        // Who waited for a place may have it from a read that hung.
        if turn == Turn::Usual && self.shared.is_left_alone() {
            return None;
        }
        // Set by whichever comes first, the asker that gives up or the read's end;
        // the second one counts.
        let one_has_left = Arc::new(Mutex::new(false));
        let reading = tokio::task::spawn_blocking({
            let end = End {
                one_has_left: one_has_left.clone(),
                shared: self.shared.clone(),
                _place: place,
            };
            move || {
                let _end = end;
                read()
            }
        });
        let mut asker = Asker {
            reads: self,
            reading: Some(reading),
            one_has_left,
            until: Instant::now() + self.within,
        };
        let found = tokio::time::timeout_at(asker.until.into(), asker.reading.as_mut()?).await;
        asker.reading = None;
        match found {
            Ok(found) => found.ok()?,
            Err(_) => {
                self.hung(&asker.one_has_left);
                None
            }
        }
    }

    /// A read took too long.
    fn hung(&self, one_has_left: &Mutex<bool>) {
        let mut one_has_left = one_has_left.lock().unwrap_or_else(PoisonError::into_inner);
        if !*one_has_left {
            *one_has_left = true;
            if self.shared.count.fetch_add(1, Ordering::AcqRel) == 0 {
                warn!("a read from disk hangs: the disk store is not read for a while");
            }
        }
        self.give_up();
    }

    /// Whether the disk hangs: what is there cannot be told.
    pub(super) fn hang(&self) -> bool {
        self.shared.is_any()
    }

    /// Reads that were given up since start.
    pub(super) fn given_up(&self) -> u64 {
        self.shared.given_up.load(Ordering::Relaxed)
    }

    fn give_up(&self) {
        self.shared.given_up.fetch_add(1, Ordering::Relaxed);
        let until = &self.shared.until;
        *until.lock().unwrap_or_else(PoisonError::into_inner) =
            Some(Instant::now() + self.left_alone);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Sender, channel};

    use futures::FutureExt;

    use super::*;

    const SOON: Duration = Duration::from_millis(20);
    const NEVER: Duration = Duration::from_secs(3600);

    /// A read that waits for the disk to be mended.
    fn hung() -> (Sender<()>, impl FnOnce() -> Option<u32> + Send + 'static) {
        let (mend, mended) = channel::<()>();
        (mend, move || mended.recv().ok().map(|()| 1))
    }

    async fn until_none_hangs(reads: &Reads) {
        while reads.shared.is_any() {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn a_disk_that_hangs_is_left_alone_until_it_answers() {
        let reads = Reads::new(2, SOON, NEVER);
        let (mend, read) = hung();
        assert_eq!(reads.run(read).await, None);
        // Nobody else waits for it.
        assert_eq!(reads.run(|| -> Option<u32> { panic!("read") }).await, None);
        assert_eq!(reads.given_up(), 1);
        mend.send(()).unwrap();
        until_none_hangs(&reads).await;
        assert_eq!(reads.run(|| Some(2)).await, Some(2));
    }

    #[tokio::test]
    async fn a_read_that_hangs_is_seen_though_its_asker_has_left() {
        let reads = Reads::new(2, SOON, NEVER);
        let (mend, read) = hung();
        assert_eq!(reads.run(read).now_or_never(), None, "it waits");
        let seen = async {
            while reads.given_up() == 0 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        let seen = tokio::time::timeout(Duration::from_secs(10), seen).await;
        assert!(seen.is_ok() && reads.hang());
        mend.send(()).unwrap();
        until_none_hangs(&reads).await;
    }

    #[tokio::test]
    async fn one_read_at_a_time_sees_whether_it_answers() {
        let reads = Reads::new(3, SOON, Duration::ZERO);
        let ((first, read), (second, probe)) = (hung(), hung());
        assert_eq!(reads.run(read).await, None);
        let others = reads.run(|| -> Option<u32> { panic!("read") });
        assert_eq!(tokio::join!(reads.run(probe), others), (None, None));
        assert_eq!(reads.given_up(), 2, "the other did not wait");
        drop((first, second));
    }

    #[tokio::test]
    async fn reads_that_hang_are_bounded_and_nobody_waits_for_their_places() {
        // Never left alone: each asker tries.
        let reads = Reads::new(2, SOON, Duration::ZERO);
        let (mends, hanging): (Vec<_>, Vec<_>) = (0..2).map(|_| hung()).unzip();
        for read in hanging {
            assert_eq!(reads.run(read).await, None);
        }
        assert_eq!(reads.shared.count.load(Ordering::Acquire), 2);
        assert_eq!(reads.run(|| -> Option<u32> { panic!("read") }).await, None);
        assert_eq!(reads.given_up(), 3);
        for mend in mends {
            mend.send(()).unwrap();
        }
        until_none_hangs(&reads).await;
        assert_eq!(reads.run(|| Some(2)).await, Some(2));
    }
}
