//! What a million live purges cost. Alone in its process: it measures all of it.

use pingora_slice_cluster::PurgeIndex;
use pingora_slice_cluster::purge::{ENTRIES_MAX, Floors, PurgeMode, Scope, Subject};

/// The promise, in bytes.
const MEMORY_MAX: u64 = 40_000_000;

fn resident_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux has it");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kib.expect("the kernel says so") * 1024
}

#[test]
fn a_million_url_purges_cost_at_most_40_mb() {
    let name = |n: u64| n.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let before = resident_bytes();
    let mut floors = Floors::default();
    for n in 1..=ENTRIES_MAX as u64 {
        floors.raise(Scope::Url(name(n)), PurgeMode::Plain, PurgeIndex(n));
    }
    let bytes = resident_bytes() - before;
    assert_eq!(floors.entries(), ENTRIES_MAX);
    println!("{ENTRIES_MAX} URL purges: {bytes} bytes resident");
    assert!(bytes <= MEMORY_MAX, "{bytes} bytes");
    // Each is exact.
    let subject = |n| Subject {
        host: 0,
        url: name(n),
        prefixes: Vec::new(),
        tags: Vec::new(),
    };
    for n in [0, 1, 1000, ENTRIES_MAX as u64] {
        assert_eq!(floors.floor(&subject(n)).plain, PurgeIndex(n));
    }
}
