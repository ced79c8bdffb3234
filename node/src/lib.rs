//! The daemon: a caching proxy that keeps large objects in slices, and shares
//! them with its peers.
//!
//! ```text
//! client → front → engine: which manifest? → plan: which bytes? → pieces → engine: where is the slice?
//!                  l1 → l2 → owner → origin                                l1 → flight → l2 → ring ┬ ours → origin
//!                                                                            peer/dial ⇒ peer/serve → engine.answer
//! purge  → admin → handle → raft → state.apply on every node → floors, asked on every hit → acknowledged → 200
//! ```
//!
//! | module | question it answers |
//! | --- | --- |
//! | [`node`] | which parts are there, in what order do they start and stop? |
//! | [`config`] | what did the operator ask for, and what is wrong with it? |
//! | `config/live` | what of it takes effect without a start? |
//! | [`certificates`] | what are clients of TLS shown? |
//! | `connection`, [`head`], `stream`, `reset`, `listening` | who reads a client's next request; what is done on its connection that Pingora does not do? |
//! | [`fields`] | which fields has a request? |
//! | `front`, `front/direct` | how does one request become one answer: through Pingora, or straight on the connection? |
//! | `front/ask`, `front/fields`, `front/wire`, `front/account` | what is asked for; what does the answer's head say, and how is it written; what is counted? |
//! | [`url`](mod@url) | what is an object called? |
//! | [`plan`] | which status and bytes answer this request from this manifest? |
//! | `pieces` | which slice comes next, and how many are opened ahead? |
//! | `pace` | is a client too slow? |
//! | `engine` | which manifest, and where do a slice's bytes come from? |
//! | `engine/records` | which manifests does this node hold, under which key? |
//! | `engine/together` | who waits for the same manifest already? |
//! | `engine/owners` | who owns it, and what does the owner say? |
//! | `engine/resolve`, `engine/part` | which manifest does the origin's answer make; what if it is a range of its own choice? |
//! | `engine/fill`, `engine/whole` | how is a slice filled, by ranges or out of a whole body? |
//! | `engine/tags` | has it changed, or do replicas disagree about its tag? |
//! | `engine/replaced` | who must forget what the origin has replaced? |
//! | `engine/answer` | what does a peer get? |
//! | `engine/inspect` | what do `explain`, `warm` and the gauges show? |
//! | `engine/changes`, `engine/noted`, `engine/turns` | was a record overtaken; was the last answer for one client only; whose turn is it to validate? |
//! | `flight` | who waits for a slice that is on its way? |
//! | [`freshness`] | may an answer be stored, is it fresh, may it be used? |
//! | [`manifest`] | what must be known of a version to answer with it? |
//! | [`mod@slice`] | are these bytes what was stored? |
//! | [`l1`], [`l2`] | what is in memory, what is on disk? |
//! | [`origin`] | what does the origin say, and which of its addresses is asked? |
//! | `stitch` | which of its answers did not fit together? |
//! | `budget` | is there memory for this? |
//! | `purge` | what is to be forgotten, and who may say so? |
//! | `observer` | does the promise of PURGE hold? |
//! | `admin`, `status_page` | what does an operator see and do? |
//! | `metrics`, `process` | what is counted; what has the process taken? |
//! | `log_limit` | may this line be logged again? |
//! | [`demo`] | what is this program for? |

mod admin;
mod budget;
pub mod certificates;
pub mod config;
mod connection;
pub mod demo;
mod engine;
pub mod fields;
mod flight;
pub mod freshness;
mod front;
pub mod head;
pub mod l1;
pub mod l2;
mod listening;
mod log_limit;
pub mod manifest;
mod metrics;
pub mod node;
mod observer;
pub mod origin;
mod pace;
mod pieces;
pub mod plan;
mod process;
mod purge;
mod reset;
pub mod slice;
mod status_page;
mod stitch;
mod stream;
pub mod url;
