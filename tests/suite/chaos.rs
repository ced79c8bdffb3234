//! Purge means gone (P1), P2 and P5 under faults: readers on every node, purges
//! of every kind through any node, and processes, disks and links that are
//! harmed by schedules that come from a seed.
//!
//! | module | what it is |
//! | --- | --- |
//! | [`history`] | the rule: no read is older than an answered purge |
//! | [`world`] | what is read and changed, and by whom |
//! | [`purges`] | purges of every kind |
//! | [`faults`] | what is done to nodes and network |
//! | [`fan_out`] | the same for other caches, purged one by one |
//!
//! Whatever else a node answers (an error, nothing, a body cut short) breaks no
//! promise here; a whole body that is no version at all does, and so does a
//! node that ends by itself, or is not ready again once everything is fixed.
//!
//! `make chaos SECONDS=600 SEED=7` runs it for longer. The seed decides the
//! faults and who asks what; the machine decides when, so a seed that has failed
//! is likely to fail again, not certain to.
//!
//! Left out: clocks, which the simulation has (`cluster/tests/sim`); hard purges
//! that cut running answers (`purge.rs`).

mod fan_out;
mod faults;
mod history;
mod purges;
mod world;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pingora_slice_tests::cluster::ADMIN_TOKEN;
use pingora_slice_tests::quick::Quick;
use pingora_slice_tests::relay::Links;
use pingora_slice_tests::{Ask, MIB, Options, Origin, TestCluster};
use rand::SeedableRng;
use rand::rngs::StdRng;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use self::fan_out::{Cache, Fleet};
use self::faults::{Herd, harm_links, harm_processes};
use self::purges::{Door, Doors, Kind, Mode, Purge};
use self::world::{SLICE, World, told};

/// How long it runs unless `CHAOS_SECONDS` says otherwise.
const SECONDS: u64 = 40;
/// Nodes that vote, and nodes that do not.
const VOTERS: usize = 3;
const EDGES: usize = 1;
/// Readers per node.
const READERS: usize = 2;
/// Tasks that change objects and purge them.
const PURGERS: usize = 2;
/// Room that each node has for what it keeps.
const DISK_BYTES: u64 = 192 * MIB;
/// How much of that is for the cache.
const CACHE_BYTES: u64 = 32 * MIB;
/// So little memory that the disk has something to do.
const MEMORY_BYTES: u64 = 512 * 1024;
/// Between two lines that tell how far a long run has come.
const TELL_EVERY: Duration = Duration::from_secs(60);
/// How much longer it goes on while too little has happened.
const OVERTIME_MAX: Duration = Duration::from_secs(120);
/// What a node may take to say something of itself.
const LOOK_MAX: Duration = Duration::from_secs(1);
/// A soft purge is obeyed within this time.
const SOFTLY_MAX: Duration = Duration::from_secs(60);

/// Environment variable `name` as a number.
fn setting(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}={text}")))
}

/// How long, and by which seed.
struct Plan {
    seed: u64,
    seconds: u64,
    /// Ends early once this many reads were checked.
    reads: u64,
    /// The command that does the same again.
    replay: String,
}

impl Plan {
    fn from_environment(command: &str) -> Plan {
        let seed = setting("CHAOS_SEED").unwrap_or_else(|| u64::from(rand::random::<u32>()));
        let seconds = setting("CHAOS_SECONDS").unwrap_or(SECONDS);
        let replay = format!("{command} SECONDS={seconds} SEED={seed}");
        eprintln!("chaos: {replay}");
        Plan {
            seed,
            seconds,
            reads: setting("CHAOS_READS").unwrap_or(u64::MAX),
            replay,
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_read_is_older_than_an_answered_purge() {
    let plan = Plan::from_environment("make chaos");
    let edges = setting("CHAOS_EDGES").map_or(EDGES, |edges| edges as usize);
    let mut options = Options::cluster(VOTERS).edges(edges).relayed();
    // Not in `make test`: a log that was cut short by a full disk may keep its
    // node from starting again (docs/PURGE.md).
    if setting("CHAOS_DISKS").is_some() {
        options = options.small_disks(DISK_BYTES);
    }
    let cluster = options
        .set("slice_size", SLICE)
        .set("l2_cache_size_bytes", CACHE_BYTES)
        .set("l1_cache_size_bytes", MEMORY_BYTES)
        .start()
        .await;
    let doors = cluster.nodes().iter().map(|node| Door {
        clients: node.address(),
        admin: node.admin_address(),
    });
    let doors = Arc::new(Doors::Ours(doors.collect()));
    let links = cluster.links().clone();
    let (cluster, world) = run(cluster, doors.clone(), links, &plan).await;
    softly(&cluster, &world, &doors).await;
    drop(cluster);

    let verdict = world.history().verdict();
    assert!(verdict.is_ok(), "{}; {}", plan.replay, verdict.unwrap_err());
    // Nothing is shown by a run in which nothing happened.
    assert!(has_happened(&world), "{}; {}", summary(&world), plan.replay);
}

/// Whether there was enough of what the run is about.
fn has_happened(world: &World) -> bool {
    told(&world.counts.hits) > 100 && told(&world.counts.purges) > 10
}

/// Readers, purgers and faults, until the plan is fulfilled; then the nodes
/// run, and what has happened is in the world's history.
async fn run<H: Herd>(
    mut herd: H,
    doors: Arc<Doors>,
    links: Links,
    plan: &Plan,
) -> (H, Arc<World>) {
    let world = Arc::new(World::publish(herd.origin()));
    let mut rng = StdRng::seed_from_u64(plan.seed);
    let mut tasks = JoinSet::new();
    for id in 1..=herd.size() {
        for _ in 0..READERS {
            let rng = StdRng::from_rng(&mut rng);
            tasks.spawn(world.clone().read_on(id, herd.address(id), rng));
        }
    }
    for _ in 0..PURGERS {
        let rng = StdRng::from_rng(&mut rng);
        tasks.spawn(world.clone().purge_on(doors.clone(), rng));
    }
    let network = {
        let (world, links, mut rng) = (world.clone(), links, StdRng::from_rng(&mut rng));
        tokio::spawn(async move { harm_links(&links, &world, &mut rng).await })
    };
    tasks.spawn(tell(world.clone()));
    let until = Instant::now() + Duration::from_secs(plan.seconds);
    let fulfilled = || {
        // On a busy machine it takes longer until something is shown.
        let over = Instant::now() >= until && has_happened(&world);
        let enough = over
            || told(&world.counts.reads) >= plan.reads
            || Instant::now() >= until + OVERTIME_MAX;
        if enough {
            world.end();
        }
        enough
    };
    harm_processes(&mut herd, &world, &mut rng, fulfilled, network).await;
    while let Some(ended) = tasks.join_next().await {
        ended.expect("readers and purgers do not panic");
    }
    eprintln!("chaos: {}; {}", summary(&world), plan.replay);
    (herd, world)
}

/// Says now and then how far it has come.
async fn tell(world: Arc<World>) {
    let mut next = Instant::now() + TELL_EVERY;
    while !world.is_over() {
        sleep(Duration::from_millis(200)).await;
        if Instant::now() >= next {
            next += TELL_EVERY;
            let at = world.history().now();
            eprintln!("chaos: after {at:.0?}: {}", summary(&world));
        }
    }
}

fn summary(world: &World) -> String {
    let counts = &world.counts;
    let history = world.history();
    format!(
        "{} reads checked ({} hits, {} without a whole answer), \
         {} purges answered 200 ({} not), {} faults; \
         {} stale, {} of no version, {} otherwise broken; longest stale {:.1?}",
        told(&counts.reads),
        told(&counts.hits),
        told(&counts.unanswered),
        told(&counts.purges),
        told(&counts.unpromised),
        told(&counts.faults),
        history.stale,
        history.wrong,
        history.broken,
        history.longest,
    )
}

/// What a soft purge promises of objects that may be served stale meanwhile:
/// everyone asks again, so each node serves the new version before long.
async fn softly(cluster: &TestCluster, world: &World, doors: &Doors) {
    let object = (0..world.objects.len())
        .find(|o| world.objects[*o].lenient)
        .expect("one is lenient");
    world.objects[object].film.change();
    let version = world.objects[object].film.version();
    let purge = Purge::of(Kind::Url(object), Mode::Soft, &world.objects);
    let mut rng = StdRng::seed_from_u64(0);
    let started = Instant::now();
    while !doors.purge(&purge, &world.objects, &mut rng, |_| {}).await {
        assert!(started.elapsed() < SOFTLY_MAX, "no purge is answered 200");
    }
    for node in cluster.nodes() {
        let host = world.objects[object].host;
        let path = world.objects[object].film.path();
        let request = format!("GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n");
        loop {
            let mut quick = Quick::connect(node.address()).await.expect("it is ready");
            let status = quick.ask(request.as_bytes()).await;
            let read = world.version_of(object, quick.body(), 0);
            if matches!(status, Ok(200)) && read == Some(version) {
                break;
            }
            assert!(
                started.elapsed() < SOFTLY_MAX,
                "node {} ignores a soft purge: {status:?}, version {read:?} of {version}, {}",
                node.id(),
                quick.header("cache-status"),
            );
            sleep(Duration::from_millis(25)).await;
        }
    }
}

fn ask_for_cluster() -> Ask {
    Ask::get("/v1/cluster").header("Authorization", format!("Bearer {ADMIN_TOKEN}"))
}

impl Herd for TestCluster {
    fn size(&self) -> u64 {
        self.nodes().len() as u64
    }

    fn address(&self, id: u64) -> SocketAddr {
        self.node(id).address()
    }

    fn pause(&mut self, id: u64) {
        if self.node(id).is_running() {
            self.node(id).pause();
        }
    }

    fn unpause(&mut self, id: u64) {
        if self.node(id).is_running() {
            self.node(id).unpause();
        }
    }

    fn kill(&mut self, id: u64) {
        self.node_mut(id).kill();
    }

    fn spawn(&mut self, id: u64) {
        self.node_mut(id).spawn();
    }

    fn ended(&mut self, id: u64) -> Option<String> {
        self.node_mut(id).ended().map(|status| status.to_string())
    }

    async fn leader(&self) -> Option<u64> {
        for node in self.nodes() {
            let ask = ask_for_cluster();
            let asking = ask.send(node.admin_address());
            if let Ok(Ok(reply)) = timeout(LOOK_MAX, asking).await
                && let Ok(status) = serde_json::from_slice::<serde_json::Value>(&reply.body)
                && let Some(leader) = status["leader"].as_u64()
            {
                return Some(leader);
            }
        }
        None
    }

    fn fill(&mut self, id: u64) -> bool {
        self.node(id).disk().map(|disk| disk.fill()).is_some()
    }

    fn relieve(&mut self, id: u64) {
        if let Some(disk) = self.node(id).disk() {
            disk.relieve();
        }
    }

    async fn is_ready(&self, id: u64) -> bool {
        let asking = Ask::get("/ready")
            .send(self.node(id).metrics_address())
            .await;
        asking.is_ok_and(|reply| reply.status == 200)
    }

    async fn state(&self) -> String {
        let mut state = String::new();
        for node in self.nodes() {
            for (ask, address) in [
                (Ask::get("/ready"), node.metrics_address()),
                (ask_for_cluster(), node.admin_address()),
            ] {
                let said = match timeout(LOOK_MAX, ask.send(address)).await {
                    Ok(Ok(reply)) => String::from_utf8_lossy(&reply.body).into_owned(),
                    Ok(Err(error)) => error.to_string(),
                    Err(late) => late.to_string(),
                };
                state += &format!("node {}: {said}\n", node.id());
            }
        }
        state
    }

    fn origin(&self) -> &Origin {
        &self.origin
    }
}

#[tokio::test]
async fn a_mixture_is_of_no_version() {
    let origin = Origin::start().await;
    let world = World::publish(&origin);
    let object = 2;
    let film = &world.objects[object].film;
    film.change();
    let (old, new) = (film.content_of(1).all(), film.content().all());
    let half = old.len() / 2;
    let mixed = [&old[..half], &new[half..]].concat();
    assert_eq!(world.version_of(object, &old, 0), Some(1));
    assert_eq!(world.version_of(object, &new[half..], half), Some(2));
    assert_eq!(world.version_of(object, &mixed, 0), None);
}

/// The rule is applied to what readers get: an origin that answers with an old
/// version after a purge was promised is found out.
#[tokio::test]
async fn a_cache_that_keeps_the_old_version_is_found_out() {
    let origin = Origin::start().await;
    let world = World::publish(&origin);
    // This "cache" answers as an origin would that has missed the change.
    let cache = Origin::start().await;
    let behind = World::publish(&cache);
    let (mut kept, address) = (None, cache.address());
    assert!(world.read_once(&mut kept, 1, address, 0, None).await);
    assert!(
        world
            .read_once(&mut kept, 1, address, 4, Some(100..200))
            .await
    );
    assert_eq!(world.history().verdict(), Ok(()));

    world.objects[0].film.change();
    world.objects[4].film.change();
    // Changed, but not purged: the old version may be served.
    assert!(world.read_once(&mut kept, 1, address, 0, None).await);
    assert_eq!(world.history().verdict(), Ok(()));
    world.history().purged(&[(0, 2), (4, 2)]);
    assert!(world.read_once(&mut kept, 1, address, 0, None).await);
    assert!(
        world
            .read_once(&mut kept, 1, address, 4, Some(100..200))
            .await
    );
    assert_eq!(world.history().stale, 2);
    behind.objects[0].film.change();
    assert!(world.read_once(&mut kept, 1, address, 0, None).await);
    let history = world.history();
    assert_eq!((history.stale, history.wrong), (2, 0));
}

/// How often other caches break what is our promise, under the same schedule:
/// a measurement, which `make chaos-peers` takes. It passes whatever it finds.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs nginx and Varnish: make chaos-peers"]
async fn other_caches_for_comparison() {
    let plan = Plan::from_environment("make chaos-peers");
    for cache in [Cache::Nginx, Cache::Varnish] {
        if let Some(missing) = cache.missing() {
            panic!("please install {missing}");
        }
    }
    for cache in [Cache::Nginx, Cache::Varnish] {
        let fleet = Fleet::start(cache, VOTERS).await;
        let links = Links::new(VOTERS);
        let doors = Arc::new(Doors::Each(fleet.fan_out(links.clone())));
        let (fleet, world) = run(fleet, doors, links, &plan).await;
        drop(fleet);
        assert!(has_happened(&world), "{}", summary(&world));
        eprintln!("chaos: {cache:?}: {}", summary(&world));
        if let (Some(_), Err(verdict)) = (setting("CHAOS_EVENTS"), world.history().verdict()) {
            eprintln!("{verdict}");
        }
    }
}
