//! End-to-end tests: real nodes, a scripted origin, strict clients. Each
//! module is a topic, each test a story.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod budget;
mod caching;
mod chaos;
mod client_forms;
mod clients;
mod coalesce;
mod config;
mod connection;
mod docs;
mod economy;
mod engine;
mod membership;
mod metrics;
mod origin;
mod origin_table;
mod process;
mod property;
mod purge;
mod range;
mod reload;
mod restart;
mod serve;
