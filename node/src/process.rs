//! What the operating system grants this process, and what it has taken of it.
//!
//! Read by hand from `/proc/self`: the shipped unit hides the rest of `/proc`
//! (`ProcSubset=pid`), which ready-made collectors need for the start time.
//! Not here: how much memory it may take (`budget`).

use std::fs;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::process::{Resource, getrlimit, setrlimit};
use rustix::time::{ClockId, clock_gettime};

use crate::budget::{CONNECTION_BYTES, ORIGIN_IDLE_MAX, Sum, TRANSFER_BYTES};

/// Idle connections to the origin that are kept for fills: Pingora's own default.
const FILLS_IDLE_MAX: usize = 128;
/// Those of answers that are passed on, all threads together.
pub const PASSES_IDLE_MAX: usize = 128;
const _: () = assert!(FILLS_IDLE_MAX + PASSES_IDLE_MAX == ORIGIN_IDLE_MAX);
/// Descriptors taken whatever is served: 64 region files, some 64 of the
/// indexes' tables and journals, 32 of listeners, threads and peers.
const FIXED_DESCRIPTORS: u64 = 64 + 64 + 32;

/// Raises the limit of descriptors as far as it may be: a shell gives 1024, and
/// a listener without one accepts nobody, the probe of `/ready` neither. Returns
/// the limit that holds; `None` where there is none.
pub fn raise_descriptors() -> Option<u64> {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        tracing::warn!(%error, "the limit of descriptors cannot be raised");
    }
    getrlimit(Resource::Nofile).current
}

/// Descriptors that a node takes at most: one for each client, one for each
/// slice that comes from the origin, idle ones to the origin, and the fixed ones.
pub fn descriptors_needed(memory: &Sum, slice_bytes: u64) -> u64 {
    memory.connections / CONNECTION_BYTES
        + memory.transfers / (slice_bytes + TRANSFER_BYTES)
        + ORIGIN_IDLE_MAX as u64
        + FIXED_DESCRIPTORS
}

/// What this process has taken, now. Zero where `/proc` cannot be read.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Usage {
    /// Memory that is in RAM, bytes.
    pub resident_bytes: u64,
    /// Descriptors that are open.
    pub open_descriptors: u64,
    /// Most that may be; `u64::MAX` without a limit.
    pub descriptors_max: u64,
    /// Time on processors, all threads.
    pub cpu: Duration,
}

impl Usage {
    /// Asks the system.
    pub fn now() -> Usage {
        let cpu = clock_gettime(ClockId::ProcessCPUTime);
        Usage {
            resident_bytes: resident_bytes().unwrap_or(0),
            // One of them reads the directory.
            open_descriptors: fs::read_dir("/proc/self/fd")
                .map_or(0, |open| (open.count() as u64).saturating_sub(1)),
            descriptors_max: getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX),
            cpu: cpu.try_into().unwrap_or_default(),
        }
    }
}

/// Seconds since 1970.
pub fn unix_seconds(at: SystemTime) -> f64 {
    at.duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs_f64()
}

fn resident_bytes() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn usage_is_of_this_process() {
        let before = Usage::now();
        assert!(before.resident_bytes > 1 << 20, "{before:?}");
        assert!(before.descriptors_max >= before.open_descriptors);
        let held: Vec<_> = (0..64)
            .map(|_| fs::File::open("/proc/self/status").unwrap())
            .collect();
        // Other tests open and close some meanwhile.
        assert!(Usage::now().open_descriptors >= before.open_descriptors + 32);
        drop(held);
        assert!(Usage::now().cpu >= before.cpu);
    }

    /// The default budget asks for more than the 1024 that a shell gives.
    #[test]
    fn a_budget_says_how_many_descriptors_it_needs() {
        let sum = Sum::of(708 << 20, 100 << 20, 32 << 20, 1 << 20).unwrap();
        let needed = descriptors_needed(&sum, 1 << 20);
        assert!((2200..2400).contains(&needed), "{needed}");
    }
}
