//! The daemon: a caching proxy that keeps large objects in slices, and shares
//! them with its peers.
//!
//! ```text
//! client → front → plan → engine → l1 → flight → l2 → ring ┬ ours → origin
//!                                                          └ peer/dial ⇒ peer/serve → engine.answer
//! purge  → admin → handle → raft → state.apply on every node → floors, asked on every hit → acknowledged → 200
//! ```

pub mod admin;
pub mod budget;
pub mod config;
pub mod connection;
pub mod demo;
pub mod engine;
pub mod flight;
pub mod freshness;
pub mod front;
mod head;
pub mod l1;
pub mod l2;
mod listening;
pub mod manifest;
pub mod metrics;
pub mod node;
pub mod observer;
pub mod origin;
pub mod pace;
pub mod paced;
pub mod page;
mod pieces;
pub mod plan;
pub mod process;
pub mod purge;
mod reset;
pub mod slice;
pub mod stitch;
mod stream;
pub mod url;
