//! Harm, by a schedule that comes from a seed.
//!
//! Two schedules run beside each other: one for processes and disks, one for
//! the network. The seed decides what is done to whom and for how long; the
//! machine, when exactly.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use pingora_slice_tests::Origin;
use pingora_slice_tests::cluster::WAIT_MAX;
use pingora_slice_tests::relay::{Link, Links};
use rand::Rng;
use rand::rngs::StdRng;
use rand::seq::{IndexedRandom, SliceRandom};
use tokio::task::JoinHandle;
use tokio::time::sleep;

use super::world::{World, count};

/// Longest that a process stands still.
const STOP_MAX: Duration = Duration::from_secs(10);
/// Longest that links are cut.
const CUT_MAX: Duration = Duration::from_secs(8);
/// A link that comes and goes does so within this time.
const FLAP_MAX: Duration = Duration::from_millis(500);
/// A bad network loses at most this share of the datagrams.
const LOSS_MAX: f64 = 0.3;
/// And delays them by at most this much.
const DELAY_MAX: Duration = Duration::from_millis(100);
/// How long after its disk was full a node may still end because of it.
const EXCUSED: Duration = Duration::from_secs(30);
/// Between two looks whether a node serves.
const LOOK_EVERY: Duration = Duration::from_millis(25);
/// Enough peace between two faults for caches to fill and leases to be had.
const PEACE: std::ops::Range<u64> = 200..2500;

/// Processes that can be harmed. Nodes count from 1.
pub(super) trait Herd {
    /// How many nodes there are.
    fn size(&self) -> u64;
    /// Where clients reach a node.
    fn address(&self, id: u64) -> SocketAddr;
    fn pause(&mut self, id: u64);
    fn unpause(&mut self, id: u64);
    fn kill(&mut self, id: u64);
    fn spawn(&mut self, id: u64);
    /// How a node's process has ended by itself, if it has.
    fn ended(&mut self, id: u64) -> Option<String>;
    /// Who leads, as any node that answers soon believes.
    async fn leader(&self) -> Option<u64>;
    /// Fills a node's disk; false where it has none of its own.
    fn fill(&mut self, id: u64) -> bool;
    fn relieve(&mut self, id: u64);
    /// Whether a node serves.
    async fn is_ready(&self, id: u64) -> bool;
    /// What the nodes say of themselves and of each other.
    async fn state(&self) -> String;
    fn origin(&self) -> &Origin;
}

fn between(rng: &mut StdRng, max: Duration) -> Duration {
    let min = Duration::from_millis(100);
    min + (max - min).mul_f64(rng.random())
}

async fn peace(rng: &mut StdRng) {
    sleep(Duration::from_millis(rng.random_range(PEACE))).await;
}

/// Harms processes and disks until the time is over, and leaves all running;
/// waits for the network, too, to be whole again.
pub(super) async fn harm_processes(
    herd: &mut impl Herd,
    world: &World,
    rng: &mut StdRng,
    until: impl Fn() -> bool,
    network: JoinHandle<()>,
) {
    let ids: Vec<u64> = (1..=herd.size()).collect();
    let note = |event: String| world.history().note(format_args!("fault: {event}"));
    // Whose disk was full last, and until when.
    let mut was_full = None;
    while !until() {
        peace(rng).await;
        herd.origin().forget_log();
        ids.iter().for_each(|id| revive(herd, world, *id, was_full));
        count(&world.counts.faults);
        let id = *ids.choose(rng).unwrap();
        let away = between(rng, STOP_MAX);
        match rng.random_range(0..12) {
            0..4 => {
                let mut paused = vec![id];
                // Now and then more than one: no quorum is left.
                while rng.random_bool(0.2) && paused.len() < ids.len() {
                    paused.extend(ids.iter().find(|id| !paused.contains(id)));
                }
                note(format!("stop {paused:?} for {away:?}"));
                paused.iter().for_each(|id| herd.pause(*id));
                sleep(away).await;
                note(format!("continue {paused:?}"));
                for id in paused {
                    herd.unpause(id);
                    sleep(Duration::from_millis(rng.random_range(0..200))).await;
                }
            }
            4..7 => {
                note(format!("kill {id} for {:?}", away / 5));
                herd.kill(id);
                sleep(away / 5).await;
                note(format!("start {id}"));
                herd.spawn(id);
            }
            7 | 8 => {
                let leader = herd.leader().await.unwrap_or(id);
                note(format!("kill the leader, {leader}"));
                herd.kill(leader);
                sleep(away / 10).await;
                note(format!("start {leader}"));
                herd.spawn(leader);
            }
            9 => {
                note("kill all, start all".into());
                ids.iter().for_each(|id| herd.kill(*id));
                ids.iter().for_each(|id| herd.spawn(*id));
            }
            _ => {
                if !herd.fill(id) {
                    continue;
                }
                let restart = rng.random_bool(0.3);
                note(format!("disk of {id} is full for {away:?}"));
                sleep(away / 2).await;
                if restart {
                    note(format!("kill {id}, start it on the full disk"));
                    herd.kill(id);
                    herd.spawn(id);
                }
                sleep(away / 2).await;
                herd.relieve(id);
                note(format!("disk of {id} has room again"));
                was_full = Some((id, Instant::now()));
                revive(herd, world, id, was_full);
            }
        }
    }
    network.await.expect("the network's harm does not panic");
    let started = Instant::now();
    for id in ids {
        while !herd.is_ready(id).await {
            revive(herd, world, id, was_full);
            if started.elapsed() >= WAIT_MAX {
                panic!("node {id} does not get ready\n{}", herd.state().await);
            }
            sleep(LOOK_EVERY).await;
        }
    }
}

/// Starts a node again that has ended by itself, as only one that could not write
/// its log may; it may take a moment to end.
fn revive(herd: &mut impl Herd, world: &World, id: u64, was_full: Option<(u64, Instant)>) {
    let Some(how) = herd.ended(id) else { return };
    let told = format!("node {id} has ended by itself: {how}");
    match was_full {
        Some((full, since)) if full == id && since.elapsed() < EXCUSED => {
            world.history().note(format_args!("fault: {told}"));
        }
        _ => world.history().broke(&told),
    }
    herd.spawn(id);
}

/// Harms the network until it is over, and leaves it whole.
pub(super) async fn harm_links(links: &Links, world: &World, rng: &mut StdRng) {
    let mut ids: Vec<u64> = (1..=links.nodes() as u64).collect();
    let note = |event: String| world.history().note(format_args!("network: {event}"));
    while !world.is_over() {
        peace(rng).await;
        count(&world.counts.faults);
        ids.shuffle(rng);
        let (one, other) = (ids[0], ids[1]);
        let time = between(rng, CUT_MAX);
        match rng.random_range(0..14) {
            0..3 => {
                note(format!("{one} is cut off for {time:?}"));
                links.set_where(Link::CUT, |from, to| from == one || to == one);
            }
            3 | 4 => {
                let (here, there) = ids.split_at(rng.random_range(1..ids.len()));
                note(format!("{here:?} and {there:?} are apart for {time:?}"));
                links.set_where(Link::CUT, |from, to| {
                    here.contains(&from) != here.contains(&to)
                });
            }
            5 | 6 => {
                note(format!("nothing from {one} to {other} for {time:?}"));
                links.set(one, other, Link::CUT);
            }
            7 => {
                note(format!("{one} hears nothing for {time:?}"));
                links.set_where(Link::CUT, |_, to| to == one);
            }
            8 => {
                note(format!("nobody hears {one} for {time:?}"));
                links.set_where(Link::CUT, |from, _| from == one);
            }
            9 | 10 => {
                let both = rng.random_bool(0.5);
                note(format!("{one} comes and goes for {time:?}"));
                let end = Instant::now() + time;
                while Instant::now() < end {
                    links.set_where(Link::CUT, |from, to| to == one || (both && from == one));
                    sleep(FLAP_MAX.mul_f64(rng.random())).await;
                    links.heal();
                    sleep(FLAP_MAX.mul_f64(rng.random())).await;
                }
                note("whole again".into());
                continue;
            }
            11 | 12 => {
                let link = Link {
                    cut: false,
                    loss: rng.random_range(0.0..LOSS_MAX),
                    delay_max: DELAY_MAX.mul_f64(rng.random()),
                };
                note(format!("everything is {link:?} for {time:?}"));
                links.set_where(link, |_, _| true);
            }
            _ => {
                note(format!("nothing passes anywhere for {time:?}"));
                links.set_where(Link::CUT, |_, _| true);
            }
        }
        sleep_unless_over(time, world).await;
        links.heal();
        note("whole again".into());
    }
}

/// A run that is over is not kept waiting.
async fn sleep_unless_over(time: Duration, world: &World) {
    let end = Instant::now() + time;
    while Instant::now() < end && !world.is_over() {
        sleep(time.min(FLAP_MAX)).await;
    }
}
