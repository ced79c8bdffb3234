//! Harness for the end-to-end tests: real processes, a scripted origin, a
//! strict client.
//!
//! | module | what it gives |
//! | --- | --- |
//! | [`cluster`] | nodes as processes: start, kill, pause, restart, read, purge, measure |
//! | [`origin`] | an origin that counts, stalls and lies |
//! | [`http`] | a client that takes framing seriously, and raw sockets |
//! | [`content`] | bytes of any size that need no memory |
//! | [`metrics`] | the metrics text, read |
//! | [`relay`] | the network between nodes, to be cut |
//! | [`disk`] | small disks, to be filled |
//! | [`quick`] | a client for millions of reads |
//! | [`model`] | parsers that are obviously right, to compare with |
//! | [`talk`] | conversations as text, and an origin that plays its part |
//!
//! Tests wait for conditions, never for time; everything listens on loopback,
//! on ports nobody else has; everything started is stopped, also by a panic.

pub mod cluster;
pub mod content;
pub mod disk;
pub mod http;
pub mod metrics;
pub mod model;
pub mod origin;
pub mod quick;
pub mod relay;
pub mod talk;

pub use cluster::{Node, Options, TestCluster};
pub use http::Ask;
pub use origin::{Fault, Film, Origin, Validators};

/// A kibibyte.
pub const KIB: u64 = 1024;
/// A mebibyte.
pub const MIB: u64 = 1024 * 1024;
/// Slice size of the test nodes: small, so that small objects have many.
pub const SLICE_BYTES: u64 = 256 * KIB;
