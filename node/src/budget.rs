//! One memory budget for the whole process: who may hold how much, and who waits.
//!
//! ```text
//! memory_budget = fixed + disk queue + L1 + connections + transfers
//!
//! fixed        64 MiB: program, threads, index caches, idle origin connections
//! disk queue   what waits for the disk store's writer
//! L1           l1_cache_size_bytes
//! connections  half of the rest: a constant for each client
//! transfers    the other half: slices on their way, and slices that leave memory while they are sent
//! ```
//!
//! A permit is taken before the memory is, and dropped with it. Transfers that
//! somebody waits for may take all of their part, in turn; those that may prove
//! useful (read-ahead, sending without a copy) only while half of it is free.
//! What does not fit waits for [`WAIT_MAX`], then it is refused; nothing grows.
//! Not here: peers' connections, whose windows are bounds of their own (`cluster`).

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, TryAcquireError, watch};

/// What a node takes whatever it does: 20 MiB of program and threads, the disk
/// index's cache and memtables (24 MiB), places and buffers of disk reads (4 MiB),
/// and the idle origin connections.
pub const FIXED_BYTES: u64 = 64 << 20;
/// Idle origin connections at most, of fills and of what is passed on: each has a
/// buffer of 64 KiB for what comes next, which makes 16 MiB.
pub const ORIGIN_IDLE_MAX: usize = 256;
/// A client's connection: its request's head, or what Pingora reads of a body (64 KiB
/// at most), the piece that is being written (64 KiB), and the tasks that hold them.
pub const CONNECTION_BYTES: u64 = 160 << 10;
/// A stream of HTTP/2: the same, and what its send buffer takes (400 KiB).
pub const STREAM_BYTES: u64 = CONNECTION_BYTES + (400 << 10);
/// A transfer besides its slice: the buffers of its connection to the origin.
pub const TRANSFER_BYTES: u64 = 128 << 10;
/// How long a transfer, or a connection, waits for its share.
pub const WAIT_MAX: Duration = Duration::from_secs(30);
/// Connections that may wait for their share at a time: more are refused immediately.
const WAITING_MAX: usize = 64;
/// Connections that a node must have room for, and as many slices under way.
const SHARES_MIN: u64 = 16;

/// The stated sum, part by part, bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sum {
    /// [`FIXED_BYTES`].
    pub fixed: u64,
    /// The disk store's queue.
    pub queue: u64,
    /// The memory store.
    pub l1: u64,
    /// All clients' connections.
    pub connections: u64,
    /// All transfers.
    pub transfers: u64,
}

impl Sum {
    /// Divides a budget.
    ///
    /// # Errors
    /// It is too small: the smallest that would do.
    pub fn of(budget: u64, l1: u64, queue: u64, slice_bytes: u64) -> Result<Sum, u64> {
        let taken = FIXED_BYTES.saturating_add(queue).saturating_add(l1);
        let least = SHARES_MIN * CONNECTION_BYTES.max(slice_bytes + TRANSFER_BYTES);
        let rest = budget.saturating_sub(taken);
        if rest / 2 < least {
            return Err(taken.saturating_add(2 * least));
        }
        Ok(Sum {
            fixed: FIXED_BYTES,
            queue,
            l1,
            connections: rest / 2,
            transfers: rest - rest / 2,
        })
    }

    /// All of it.
    pub fn total(&self) -> u64 {
        self.fixed + self.queue + self.l1 + self.connections + self.transfers
    }
}

/// Permission to hold memory; released with the last clone.
#[derive(Clone, Debug)]
pub struct Permit {
    permit: Arc<OwnedSemaphorePermit>,
}

/// See the module's text. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Budget {
    sum: Sum,
    connections: Arc<Semaphore>,
    transfers: Arc<Semaphore>,
    /// Connections that wait; their own buffers are of the fixed part.
    waiting: Arc<Semaphore>,
    /// How many transfers wait.
    short: Arc<watch::Sender<usize>>,
}

impl Budget {
    /// A budget of which nothing is taken.
    pub fn new(sum: Sum) -> Budget {
        let part = |bytes: u64| {
            let units = units(bytes).min(Semaphore::MAX_PERMITS as u64);
            Arc::new(Semaphore::new(units as usize))
        };
        Budget {
            sum,
            connections: part(sum.connections),
            transfers: part(sum.transfers),
            waiting: Arc::new(Semaphore::new(WAITING_MAX)),
            short: Arc::default(),
        }
    }

    /// The stated sum.
    pub fn sum(&self) -> &Sum {
        &self.sum
    }

    /// A client's place; `None` when none came free in time.
    pub async fn connection(&self, bytes: u64) -> Option<Permit> {
        if let Ok(permit) = try_take(&self.connections, bytes, self.sum.connections) {
            return Some(Permit::of(permit));
        }
        let _waiting = self.waiting.try_acquire().ok()?;
        take(&self.connections, bytes, self.sum.connections).await
    }

    /// A transfer that somebody waits for: this many bytes, and its connection's;
    /// `None` when there was no room in time.
    pub async fn transfer(&self, bytes: u64) -> Option<Permit> {
        let bytes = bytes + TRANSFER_BYTES;
        if let Ok(permit) = try_take(&self.transfers, bytes, self.sum.transfers) {
            return Some(Permit::of(permit));
        }
        let _waiting = Waiting::new(&self.short);
        take(&self.transfers, bytes, self.sum.transfers).await
    }

    /// Waits until transfers have been waiting for this long, without a pause.
    pub async fn until_short_for(&self, time: Duration) {
        let mut short = self.short.subscribe();
        // The budget is held, so its sender is there.
        while short.wait_for(|waiting| *waiting > 0).await.is_ok() {
            let over = short.wait_for(|waiting| *waiting == 0);
            if tokio::time::timeout(time, over).await.is_err() {
                return;
            }
        }
    }

    /// Bytes that may prove useful: only while half of the transfers' part is free.
    pub fn ahead(&self, bytes: u64) -> Option<Permit> {
        let (free, all) = (
            self.transfers.available_permits() as u64,
            units(self.sum.transfers),
        );
        let wanted = units(bytes + TRANSFER_BYTES);
        if free < all / 2 + wanted {
            return None;
        }
        let permit = self.transfers.clone().try_acquire_many_owned(wanted as u32);
        permit.ok().map(Permit::of)
    }

    /// Whether less than half of the transfers' part is free.
    pub fn is_tight(&self) -> bool {
        (self.transfers.available_permits() as u64) < units(self.sum.transfers) / 2
    }

    /// Bytes taken by connections, and by transfers.
    pub fn taken(&self) -> (u64, u64) {
        let taken = |part: &Semaphore, bytes| {
            units(bytes).saturating_sub(part.available_permits() as u64) * UNIT_BYTES
        };
        (
            taken(&self.connections, self.sum.connections),
            taken(&self.transfers, self.sum.transfers),
        )
    }
}

impl Permit {
    fn of(permit: OwnedSemaphorePermit) -> Permit {
        Permit {
            permit: Arc::new(permit),
        }
    }

    /// Gives back what is beyond this many bytes, a connection's included. Not where
    /// others hold clones: they may hold more.
    pub fn shrink(&mut self, bytes: u64) {
        let Some(permit) = Arc::get_mut(&mut self.permit) else {
            return;
        };
        let left = permit.num_permits().min(units(bytes) as usize);
        drop(permit.split(permit.num_permits() - left));
    }
}

/// What permits count, so that 32 bits are enough for any of them.
const UNIT_BYTES: u64 = 1024;

/// Rounded up.
fn units(bytes: u64) -> u64 {
    bytes.div_ceil(UNIT_BYTES)
}

/// Counted among those who wait until it is dropped.
struct Waiting<'a>(&'a watch::Sender<usize>);

impl Waiting<'_> {
    fn new(waiting: &watch::Sender<usize>) -> Waiting<'_> {
        waiting.send_modify(|waiting| *waiting += 1);
        Waiting(waiting)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.send_modify(|waiting| *waiting -= 1);
    }
}

/// At once, or not. One larger than the whole part takes all of it.
fn try_take(
    part: &Arc<Semaphore>,
    bytes: u64,
    all: u64,
) -> Result<OwnedSemaphorePermit, TryAcquireError> {
    part.clone().try_acquire_many_owned(clamped(bytes, all))
}

/// In turn.
async fn take(part: &Arc<Semaphore>, bytes: u64, all: u64) -> Option<Permit> {
    let waiting = part.clone().acquire_many_owned(clamped(bytes, all));
    let permit = tokio::time::timeout(WAIT_MAX, waiting).await;
    permit.ok()?.ok().map(Permit::of)
}

fn clamped(bytes: u64, all: u64) -> u32 {
    u32::try_from(units(bytes.min(all))).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SLICE: u64 = 1 << 20;

    fn budget(transfers: u64) -> Budget {
        Budget::new(Sum {
            fixed: 0,
            queue: 0,
            l1: 0,
            connections: 2 * CONNECTION_BYTES,
            transfers,
        })
    }

    #[test]
    fn the_parts_are_the_sum() {
        let total = 512 << 20;
        let sum = Sum::of(total, 100 << 20, 32 << 20, SLICE).unwrap();
        assert_eq!(sum.total(), total);
        assert!(sum.transfers.abs_diff(sum.connections) <= 1);
        let least = Sum::of(0, 100 << 20, 32 << 20, SLICE).unwrap_err();
        assert!(Sum::of(least, 100 << 20, 32 << 20, SLICE).is_ok());
        assert!(Sum::of(least - 2, 100 << 20, 32 << 20, SLICE).is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_spent_is_waited_for_and_then_refused() {
        let budget = budget(2 * (SLICE + TRANSFER_BYTES));
        let first = budget.transfer(SLICE).await.unwrap();
        let second = budget.transfer(SLICE).await.unwrap();
        assert_eq!(budget.taken().1, budget.sum().transfers);
        assert!(budget.transfer(SLICE).await.is_none(), "nothing is left");
        let shared = first.clone();
        drop(first);
        let waiting = tokio::spawn({
            let budget = budget.clone();
            async move { budget.transfer(SLICE).await }
        });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished(), "a clone is still held");
        drop(shared);
        assert!(waiting.await.unwrap().is_some());
        drop(second);
        assert_eq!(budget.taken().1, 0);
        // Larger than everything: takes everything, and does not wait forever.
        let all = budget.transfer(u64::MAX / 2).await.unwrap();
        assert_eq!(budget.taken().1, budget.sum().transfers);
        drop(all);
    }

    #[tokio::test(start_paused = true)]
    async fn what_did_not_come_is_given_back() {
        let budget = budget(2 * (SLICE + TRANSFER_BYTES));
        let mut permit = budget.transfer(SLICE).await.unwrap();
        let shared = permit.clone();
        permit.shrink(1);
        assert_eq!(budget.taken().1, SLICE + TRANSFER_BYTES, "it is another's");
        drop(shared);
        permit.shrink(2 * SLICE);
        assert_eq!(budget.taken().1, SLICE + TRANSFER_BYTES);
        permit.shrink(1025);
        assert_eq!(budget.taken().1, 2048);
        drop(permit);
        assert_eq!(budget.taken().1, 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_shortage_is_one_while_somebody_waits() {
        let budget = budget(SLICE + TRANSFER_BYTES);
        let short = tokio::spawn({
            let budget = budget.clone();
            async move { budget.until_short_for(Duration::from_secs(2)).await }
        });
        let began = tokio::time::Instant::now();
        for _ in 0..3 {
            let all = budget.transfer(SLICE).await.unwrap();
            let waiting = budget.transfer(SLICE);
            assert!(
                tokio::time::timeout(Duration::from_secs(1), waiting)
                    .await
                    .is_err()
            );
            drop(all);
            tokio::task::yield_now().await;
        }
        assert!(!short.is_finished(), "nobody waited for two seconds");
        let all = budget.transfer(SLICE).await.unwrap();
        assert!(budget.transfer(SLICE).await.is_none());
        short.await.unwrap();
        assert_eq!(began.elapsed(), Duration::from_secs(3) + WAIT_MAX);
        drop(all);
    }

    #[test]
    fn what_may_prove_useful_leaves_half_to_those_who_wait() {
        let budget = budget(8 * (SLICE + TRANSFER_BYTES));
        let held: Vec<Permit> = std::iter::from_fn(|| budget.ahead(SLICE)).collect();
        assert_eq!(held.len(), 4);
        drop(held);
        assert!(!budget.is_tight());
    }

    #[tokio::test(start_paused = true)]
    async fn connections_and_transfers_do_not_starve_each_other() {
        let budget = budget(SLICE + TRANSFER_BYTES);
        let held = [
            budget.connection(CONNECTION_BYTES).await.unwrap(),
            budget.connection(CONNECTION_BYTES).await.unwrap(),
        ];
        assert!(budget.connection(CONNECTION_BYTES).await.is_none());
        assert!(budget.transfer(SLICE).await.is_some());
        drop(held);
        assert!(budget.connection(CONNECTION_BYTES).await.is_some());
    }
}
