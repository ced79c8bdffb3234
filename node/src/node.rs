//! Builds the parts, owns the tasks, stops them in order: listeners first,
//! then answers and fills, cluster, disk.
//!
//! A hand-over (`--upgrade`, then SIGQUIT to the old process) gives the
//! listening sockets to the new process first. It opens its directories and
//! ports once the old one, its answers finished, has let go of them; clients
//! that connect in between wait in the listen queue and are not refused.

use std::net::TcpListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use pingora_core::listeners::tls::TlsSettings;
use pingora_core::server::configuration::{Opt, ServerConf};
use pingora_core::server::{ExecutionPhase, RunArgs, Server, ShutdownSignal, ShutdownSignalWatch};
use pingora_core::services::listening::Service;
use pingora_slice_cluster::handle::StartError;
use pingora_slice_cluster::peer::certificate_expires;
use pingora_slice_cluster::{Cluster, handle};
use tokio::runtime::Runtime;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::broadcast;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::admin::Admin;
use crate::certificates::{Certificates, Pairs};
use crate::config::{Changes, Config, LISTEN_TLS, Live, Problems, Settings};
use crate::connection::Clients;
use crate::engine::Engine;
use crate::front::Front;
use crate::l2::{self, L2, L2_BYTES_MIN};
use crate::listening::Listening;
use crate::metrics::Metrics;
use crate::observer::Watched;
use crate::origin::{self, Origin};
use crate::process::{PASSES_IDLE_MAX, descriptors_needed, raise_descriptors, unix_seconds};
use crate::purge::Purger;

/// How long the two processes of a hand-over wait for each other's socket.
const MEET_WITHIN: Duration = Duration::from_secs(5);
/// Until what still runs on the engine's threads is cut.
const RUNTIME_STOP_MAX: Duration = Duration::from_secs(1);
/// Longest that the parts take to stop, one after the other, once the answers
/// are finished or `drain_timeout` is over. Whoever kills a node that does not
/// end must wait for both.
pub const PARTS_STOP_MAX: Duration = handle::STOP_MAX
    .saturating_add(l2::STOP_MAX)
    .saturating_add(RUNTIME_STOP_MAX);
/// What a hand-over may take beyond the old process's drain: Pingora's old
/// process accepts for 5 s more, and then its parts stop.
const HAND_OVER_EXTRA: Duration = Duration::from_secs(5).saturating_add(PARTS_STOP_MAX);
/// How often a request that is passed on is sent on connections that turn out to be
/// closed. It is not tried again for its answer, as fetches are (`max_retries`).
const PASS_TRIES_MAX: usize = 4;
/// Between two tries to take what the old process still holds.
const TRY_AGAIN: Duration = Duration::from_millis(50);
/// Longest path of a Unix socket, without its final zero.
const SOCKET_PATH_BYTES_MAX: usize = 107;

/// Runs the daemon until it is told to stop. With `upgrade`, the listening
/// sockets come from the process that runs it now.
///
/// # Errors
/// A part that cannot be started, or that makes it impossible to go on.
pub fn run(config: Config, upgrade: bool) -> anyhow::Result<()> {
    let pairs = Pairs::read(&config.listen)?;
    warn_of_few_descriptors(&config);
    let socket = hand_over_socket(&config);
    let mut server = match (&socket, upgrade) {
        (Err(why), true) => return Err(anyhow!("--upgrade: {why}")),
        (_, false) => {
            refuse_addresses_in_use(&config)?;
            new_server(&config, &socket, false)
        }
        (Ok(path), true) => {
            tracing::info!(path, "waiting for the running process: send it SIGQUIT");
            new_server(&config, &socket, true)
        }
    };
    server.bootstrap();
    let patience = match upgrade {
        true => config.drain_timeout + HAND_OVER_EXTRA,
        false => Duration::ZERO,
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(config.threads)
        .thread_name("engine")
        .enable_all()
        .build()
        .context("starting the engine's threads")?;
    let _inside = runtime.enter();

    let metrics = Arc::new(Metrics::new());
    let certificates = Arc::new(Certificates::new(pairs));
    tell_when_listeners_end(&config, &metrics);
    let peer = config.cluster.as_ref().map(|cluster| &cluster.tls.cert);
    tell_when_ends(&metrics, "peer", peer.into_iter());
    let deadline = Instant::now() + patience;
    let (cluster, l2) = open_stores(&config, &runtime, deadline)?;
    let origin = Origin::new(
        config.upstreams.clone(),
        config.upstream_host.clone(),
        config.origin_timeouts,
        metrics.clone(),
    );
    let engine = Engine::new(
        config.clone(),
        cluster.clone(),
        origin.clone(),
        l2.clone(),
        metrics.clone(),
        runtime.handle().clone(),
    );
    cluster.serve(Arc::new(Watched(engine.clone())));
    let live = engine.live().clone();
    let purger = Purger::new(cluster.clone(), metrics.clone(), live.clone());
    let admin = Admin::new(
        cluster.clone(),
        Arc::new(engine.clone()),
        metrics.clone(),
        purger.clone(),
    );

    let stop = CancellationToken::new();
    runtime.spawn({
        let (admin, stop) = (admin.clone(), stop.clone());
        async move { admin.sample_until(stop).await }
    });
    runtime.spawn({
        let (purger, stop) = (purger.clone(), stop.clone());
        async move { purger.observe_until(stop).await }
    });
    runtime.spawn({
        let stop = stop.clone();
        async move { origin.watch_until(stop).await }
    });
    let reload = Reload {
        config: config.clone(),
        live: live.clone(),
        certificates: certificates.clone(),
        metrics: metrics.clone(),
    };
    runtime.spawn(reload.on_hup(stop.clone()));

    let under_way = TaskTracker::new();
    let budget = engine.budget().clone();
    let front = Front::new(engine, purger, metrics.clone(), under_way.clone());
    let service = |h2c| {
        Clients::service(
            &server.configuration,
            front.clone(),
            config.client_timeouts,
            budget.clone(),
            metrics.clone(),
            h2c,
        )
    };
    let (clients, h2c) = listen(&config, &certificates, service)?;
    let mut listening = vec![server.add_service(Listening(clients))];
    if let Some(service) = h2c {
        listening.push(server.add_service(Listening(service)));
    }
    if let Some(address) = config.metrics_endpoint {
        let mut service = admin.metrics_service();
        service.add_tcp(&address.to_string());
        // Whoever reads "ready" there can connect to the clients' addresses.
        server.add_service(service).add_dependencies(&listening);
    }
    if let Some(settings) = &config.admin {
        let mut service = admin.admin_service(live);
        service.add_tcp(&settings.address.to_string());
        server.add_service(service);
    }

    let failure = Arc::new(std::sync::Mutex::new(None));
    let phases = server.watch_execution_phase();
    let signals = Signals {
        cluster: cluster.clone(),
        failure: failure.clone(),
        socket,
    };
    std::thread::Builder::new()
        .name("server".into())
        .spawn(move || {
            server.run(RunArgs {
                shutdown_signal: Box::new(signals),
            });
        })
        .context("starting the server")?;

    runtime.block_on(async {
        if until_stopping(phases).await == Stopping::Gracefully {
            drain(under_way, config.drain_timeout).await;
        }
        stop.cancel();
        cluster.stop().await;
        if let Some(l2) = l2 {
            l2.stop().await;
        }
    });
    runtime.shutdown_timeout(RUNTIME_STOP_MAX);
    match failure.lock().expect("no panic while held").take() {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

/// The cluster and the disk store, tried again until `deadline` while the process
/// before this one may still hold them.
fn open_stores(
    config: &Config,
    runtime: &Runtime,
    deadline: Instant,
) -> anyhow::Result<(Cluster, Option<L2>)> {
    let open_l2 = || match &config.l2 {
        Some(settings) if config.enable_cache => {
            let mut settings = settings.clone();
            if config.cluster.is_none() {
                settings.bytes_max = beside_purges(settings.bytes_max);
            }
            until(deadline, || L2::open(settings.clone())).map(Some)
        }
        _ => Ok(None),
    };
    match &config.cluster {
        // Without its purges a machine alone must not start: before its store
        // says that it goes on without and will be tried again.
        None => {
            if let Some(dir) = &config.unused_l2_dir
                && let Err(error) = until(deadline, || L2::end_life(dir))
            {
                tracing::warn!(%error, "what l2_cache_dir holds will not know of the purges made now: empty it before it is used again");
            }
            let alone = until(deadline, || Cluster::alone(alone_dir(config)));
            let cluster = alone.map_err(|e| of_alone(config, e))?;
            Ok((cluster, open_l2()?))
        }
        Some(settings) => {
            let l2 = open_l2()?;
            let start = || runtime.block_on(Cluster::start(settings.clone()));
            Ok((until(deadline, start)?, l2))
        }
    }
}

/// The listeners of `listen`: a service that takes all but HTTP/2 without TLS, and
/// one for that where there is any.
fn listen(
    config: &Config,
    certificates: &Certificates,
    service: impl Fn(bool) -> Service<Clients>,
) -> anyhow::Result<(Service<Clients>, Option<Service<Clients>>)> {
    let mut clients = service(false);
    let mut h2c = None;
    for (listen, shown) in config.listen.iter().zip(certificates.shown()) {
        let address = listen.address.to_string();
        match shown {
            None if listen.h2 => h2c.get_or_insert_with(|| service(true)).add_tcp(&address),
            None => clients.add_tcp(&address),
            Some(shown) => {
                // The resolver goes first: no file is named.
                let mut settings =
                    TlsSettings::intermediate("", "").map_err(|e| anyhow!("listen.tls: {e}"))?;
                settings.set_cert_resolver(shown.clone());
                if listen.h2 {
                    settings.enable_h2();
                }
                clients.add_tls_with_settings(&address, None, settings);
            }
        }
    }
    Ok((clients, h2c))
}

/// Waits for the answers under way, `drain_timeout` at most.
async fn drain(under_way: TaskTracker, drain_timeout: Duration) {
    under_way.close();
    tracing::info!(
        requests = under_way.len(),
        "no new connections; the process ends when its answers are finished"
    );
    let drained = tokio::time::timeout(drain_timeout, under_way.wait()).await;
    if drained.is_err() {
        tracing::warn!(requests = under_way.len(), "cut after drain_timeout");
    }
}

/// Says when the first of the listeners' certificates ends.
fn tell_when_listeners_end(config: &Config, metrics: &Metrics) {
    let with_tls = config.listen.iter().filter_map(|l| l.tls.as_ref());
    tell_when_ends(metrics, "listen", with_tls.map(|tls| &tls.cert));
}

/// Says when the first of the certificates that this process has just read ends.
fn tell_when_ends<'a>(metrics: &Metrics, which: &str, certs: impl Iterator<Item = &'a PathBuf>) {
    if let Some(end) = certs.filter_map(|cert| certificate_expires(cert)).min() {
        metrics
            .certificate_expires_seconds
            .with_label_values(&[which])
            .set(unix_seconds(end));
    }
}

fn warn_of_few_descriptors(config: &Config) {
    let needed = descriptors_needed(&config.memory, u64::from(config.slice_bytes));
    if let Some(limit) = raise_descriptors().filter(|limit| *limit < needed) {
        tracing::warn!(
            limit,
            needed,
            "fewer descriptors than memory_budget admits clients and fetches: raise LimitNOFILE \
             or ulimit -n, or lower memory_budget"
        );
    }
}

/// The last result of trying until it succeeds or time is up.
fn until<T, E>(deadline: Instant, mut attempt: impl FnMut() -> Result<T, E>) -> Result<T, E> {
    loop {
        match attempt() {
            Err(_) if Instant::now() < deadline => std::thread::sleep(TRY_AGAIN),
            outcome => return outcome,
        }
    }
}

/// What is left of `l2_cache_size_bytes` for the cache where a lone machine
/// keeps its purges in the same directory: their journal takes 64 MiB at most
/// and is a sparse file, small for as long as purges are few.
fn beside_purges(bytes_max: u64) -> u64 {
    const PURGES_BYTES_MAX: u64 = 64 << 20;
    let rest = bytes_max - PURGES_BYTES_MAX.min(bytes_max / 8);
    rest.max(L2_BYTES_MIN.min(bytes_max))
}

/// Where a machine alone keeps its purges.
fn alone_dir(config: &Config) -> Option<PathBuf> {
    let l2 = config.l2.as_ref().filter(|_| config.enable_cache)?;
    Some(l2.dir.join("cluster"))
}

/// Why a machine alone cannot keep its purges, by the key that says where.
fn of_alone(config: &Config, error: StartError) -> anyhow::Error {
    match (error, &config.l2) {
        (StartError::Storage { reason, .. }, Some(l2)) => anyhow!(
            "l2_cache_dir: {}: {reason}: create it and chown it to this user, set l2_cache_dir \
             to another directory, or set enable_l2_cache: false",
            l2.dir.display()
        ),
        (error, _) => error.into(),
    }
}

/// The socket by which this node's processes meet: in a directory that belongs
/// to this node alone. Otherwise the reason why there is none.
fn hand_over_socket(config: &Config) -> Result<String, String> {
    let dir = match &config.cluster {
        Some(cluster) => cluster.data_dir.clone(),
        None => alone_dir(config).ok_or("a hand-over needs a disk store or a data_dir")?,
    };
    let path = dir.join("hand-over.sock");
    match path.to_str() {
        Some(path) if path.len() <= SOCKET_PATH_BYTES_MAX => Ok(path.to_string()),
        _ => Err(format!("{} cannot be a socket's path", path.display())),
    }
}

fn new_server(config: &Config, socket: &Result<String, String>, upgrade: bool) -> Server {
    let opt = Opt {
        upgrade,
        ..Opt::default()
    };
    let mut conf = server_conf(config);
    if let Ok(path) = socket {
        conf.upgrade_sock = path.clone();
    }
    Server::new_with_opt_and_conf(opt, conf)
}

/// How the server stops.
#[derive(PartialEq, Eq)]
enum Stopping {
    Gracefully,
    AtOnce,
}

/// Waits until no listener accepts any more.
async fn until_stopping(mut phases: broadcast::Receiver<ExecutionPhase>) -> Stopping {
    use broadcast::error::RecvError;
    loop {
        match phases.recv().await {
            Ok(ExecutionPhase::ShutdownGracePeriod) => return Stopping::Gracefully,
            Ok(ExecutionPhase::ShutdownRuntimes | ExecutionPhase::Terminated)
            | Err(RecvError::Closed) => return Stopping::AtOnce,
            Ok(_) | Err(RecvError::Lagged(_)) => {}
        }
    }
}

/// Pingora tries for half a minute to bind an address that is in use; whoever
/// starts a node wants to know at once.
fn refuse_addresses_in_use(config: &Config) -> anyhow::Result<()> {
    let clients = config
        .listen
        .iter()
        .map(|listen| ("listen", listen.address));
    let metrics = config.metrics_endpoint;
    let metrics = metrics.map(|address| ("metrics_endpoint.address", address));
    let admin = config.admin.as_ref();
    let admin = admin.map(|admin| ("admin.address", admin.address));
    for (key, address) in clients.chain(metrics).chain(admin) {
        TcpListener::bind(address).with_context(|| format!("{key}: listening at {address}"))?;
    }
    Ok(())
}

fn server_conf(config: &Config) -> ServerConf {
    ServerConf {
        threads: config.threads,
        // Pingora would sleep for the whole of it and then cut what is under
        // way. `run` waits for the answers instead, and ends the process.
        grace_period_seconds: Some(config.drain_timeout.as_secs() + 60),
        graceful_shutdown_timeout_seconds: Some(0),
        // Pingora keeps so many for each thread.
        upstream_keepalive_pool_size: (PASSES_IDLE_MAX / config.threads).max(1),
        // Pingora counts tries; each address that cannot be connected to is one.
        max_retries: PASS_TRIES_MAX + config.upstreams.len() * origin::ADDRESSES_MAX,
        ..ServerConf::default()
    }
}

/// The signals that end the process, and the one failure that must.
struct Signals {
    cluster: Cluster,
    failure: Arc<std::sync::Mutex<Option<anyhow::Error>>>,
    /// Where a new process waits for the listeners.
    socket: Result<String, String>,
}

impl Signals {
    /// Whether a new process waits to take over; says so where none does.
    async fn can_hand_over(&self) -> bool {
        let path = match &self.socket {
            Ok(path) => path,
            Err(why) => {
                tracing::error!("SIGQUIT ignored: {why}");
                return false;
            }
        };
        let started = Instant::now();
        while started.elapsed() < MEET_WITHIN {
            if std::fs::exists(path).unwrap_or(false) {
                return true;
            }
            tokio::time::sleep(TRY_AGAIN).await;
        }
        tracing::error!(
            path,
            "SIGQUIT ignored: no new process waits; start one with --upgrade first"
        );
        false
    }
}

#[async_trait::async_trait]
impl ShutdownSignalWatch for Signals {
    async fn recv(&self) -> ShutdownSignal {
        let (Ok(mut quit), Ok(mut term), Ok(mut int)) = (
            signal(SignalKind::quit()),
            signal(SignalKind::terminate()),
            signal(SignalKind::interrupt()),
        ) else {
            return ShutdownSignal::FastShutdown;
        };
        let quit = async {
            loop {
                quit.recv().await;
                if self.can_hand_over().await {
                    break;
                }
            }
        };
        tokio::select! {
            () = quit => ShutdownSignal::GracefulUpgrade,
            _ = term.recv() => ShutdownSignal::GracefulTerminate,
            _ = int.recv() => ShutdownSignal::FastShutdown,
            error = self.cluster.failed() => {
                tracing::error!(%error, "this node cannot go on");
                *self.failure.lock().expect("no panic while held") = Some(error.into());
                ShutdownSignal::FastShutdown
            }
        }
    }
}

/// What a reload changes.
struct Reload {
    /// What is in force, and what was at the start of what a start alone can change.
    config: Config,
    live: Live,
    certificates: Arc<Certificates>,
    metrics: Arc<Metrics>,
}

impl Reload {
    /// SIGHUP reads the configuration again, until `stop`.
    async fn on_hup(mut self, stop: CancellationToken) {
        let Ok(mut hup) = signal(SignalKind::hangup()) else {
            return;
        };
        while stop
            .run_until_cancelled(hup.recv())
            .await
            .flatten()
            .is_some()
        {
            match self.read_again() {
                Ok(changes) => {
                    tracing::info!(in_effect = ?changes.now, "configuration read again");
                    if !changes.at_start.is_empty() {
                        tracing::warn!(keys = ?changes.at_start, "changed: takes effect at the next start");
                    }
                }
                Err(problems) => tracing::error!(%problems, "configuration not changed"),
            }
        }
    }

    /// Takes all that can be taken, or nothing where there is a problem.
    fn read_again(&mut self) -> Result<Changes, Problems> {
        let new = self.config.reload()?;
        let mut config = self.config.clone();
        let mut changes = config.take(&new);
        // The new file's listeners wait for a start.
        if let Some(mut problem) = config.open_purge() {
            problem.remedy += "; that takes effect at a start: keep the token until then";
            return Err(Problems(vec![problem]));
        }
        let pairs = Pairs::read(&config.listen)?;
        for warning in &new.warnings {
            tracing::warn!("{warning}");
        }
        if self.certificates.renew(pairs) && !changes.now.contains(&LISTEN_TLS) {
            changes.now.push(LISTEN_TLS);
        }
        tell_when_listeners_end(&config, &self.metrics);
        self.live.replace(Settings::of(&config));
        self.config = config;
        Ok(changes)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    /// Pingora multiplies the pool by the threads.
    #[test]
    fn idle_connections_to_the_origin_are_bounded_whatever_the_threads() {
        for threads in [1, 2, 8, 64, PASSES_IDLE_MAX] {
            let yaml = format!("{{listen: \"127.0.0.1:1\", threads: {threads}}}");
            let config = Config::parse(&yaml, Path::new("/")).unwrap();
            let conf = server_conf(&config);
            let pool = conf.upstream_keepalive_pool_size * conf.threads;
            assert!((1..=PASSES_IDLE_MAX).contains(&pool), "{threads}: {pool}");
        }
    }
}
