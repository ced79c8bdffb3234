//! CPU time as /proc says it, for the driver and for the floors.

use std::fmt::Display;
use std::fs;

/// Ticks per second of the times in /proc: the same on every Linux.
const TICKS: f64 = 100.0;

/// The fields of /proc/`of`/stat after the name, which may have spaces: of a process, or
/// of a thread (`PID/task/TID`).
pub fn fields(of: impl Display) -> Option<Vec<String>> {
    let text = fs::read_to_string(format!("/proc/{of}/stat")).ok()?;
    let (_, rest) = text.rsplit_once(')')?;
    Some(rest.split_whitespace().map(str::to_owned).collect())
}

/// CPU seconds that it has used, without those below it.
pub fn own_cpu_seconds(of: impl Display) -> Option<f64> {
    let fields = fields(of)?;
    let user: f64 = fields.get(11)?.parse().ok()?;
    let system: f64 = fields.get(12)?.parse().ok()?;
    Some((user + system) / TICKS)
}
