//! Arguments, logging, exit code.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use pingora_slice::config::{Config, DEFAULT_FILE, Problem, Problems, Source};
use pingora_slice::demo::{self, DemoArgs};
use tracing_subscriber::EnvFilter;

/// With 300 stalled clients, for whom 240 MiB are the budget, glibc's has 276 MiB
/// resident and mimalloc 200 to 275: both keep apart what each of many threads has
/// freed. This one has 120 to 185; its settings are in `.cargo/config.toml`.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// A caching proxy for large files: slices, spread over several machines.
///
/// RUST_LOG filters the log, for example RUST_LOG=info,pingora_slice=debug.
#[derive(Parser)]
#[command(
    name = "pingora-slice",
    version,
    args_conflicts_with_subcommands = true
)]
struct Args {
    /// Configuration file [default: pingora_slice.yaml in the working directory, where there is one, else built-in defaults]
    config: Option<PathBuf>,
    /// Check the configuration and say everything that is wrong with it
    #[arg(long)]
    check_config: bool,
    /// Port of the first `listen` address, instead of the configured one
    #[arg(long, value_name = "N")]
    port: Option<u16>,
    /// Take the listening sockets over from the process that runs now: start this, then send that one SIGQUIT
    #[arg(long)]
    upgrade: bool,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    Demo(DemoArgs),
}

fn main() -> ExitCode {
    let args = Args::parse();
    if let Some(Command::Demo(args)) = args.command {
        return demo::run(args);
    }
    let default_file = || Some(PathBuf::from(DEFAULT_FILE)).filter(|file| file.exists());
    let source = Source {
        path: args.config.or_else(default_file),
        port: args.port,
    };
    let name = match &source.path {
        Some(path) => path.display().to_string(),
        None => "built-in defaults".to_string(),
    };
    let outcome = match args.check_config {
        true => check(&name, source),
        false => start(&name, source, args.upgrade),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            match failure.downcast_ref::<Problems>() {
                Some(Problems(problems)) => explain(&name, problems),
                None => eprintln!("pingora-slice: {failure:#}"),
            }
            ExitCode::FAILURE
        }
    }
}

fn check(name: &str, source: Source) -> anyhow::Result<()> {
    let config = Config::load_from(source)?;
    for warning in &config.warnings {
        eprintln!("warning: {warning}");
    }
    println!("{name}: ok");
    Ok(())
}

fn start(name: &str, source: Source, upgrade: bool) -> anyhow::Result<()> {
    let config = Config::load_from(source)?;
    config.refuse_own_upstream()?;
    start_logging();
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        configuration = name,
        listen = list(config.listen.iter().map(|listen| listen.address)),
        upstream = list(&config.upstreams),
        node = config.cluster.as_ref().map(|cluster| cluster.node_id.0),
        "starting"
    );
    for warning in &config.warnings {
        tracing::warn!("{warning}");
    }
    if !pingora_slice_cluster::IS_CHECKED {
        tracing::error!(
            "built without the purge checks, for measuring only: PURGED CONTENT IS SERVED"
        );
    }
    pingora_slice::node::run(config, upgrade)
}

/// As one word of a log line.
fn list(things: impl IntoIterator<Item = impl ToString>) -> String {
    let things: Vec<_> = things.into_iter().map(|thing| thing.to_string()).collect();
    things.join(",")
}

fn explain(name: &str, problems: &[Problem]) {
    let count = problems.len();
    let noun = if count == 1 { "problem" } else { "problems" };
    eprintln!("pingora-slice: {name}: {count} {noun}");
    for Problem { key, value, remedy } in problems {
        eprintln!("  {key}: {value}\n      {remedy}");
    }
}

/// Without RUST_LOG: our own words, and of the libraries only what is wrong.
const DEFAULT_LOG: &str = "warn,pingora_slice=info,pingora_slice_cluster=info";

/// Sends the records of `tracing` and `log` (Pingora's) to stderr.
fn start_logging() {
    let filter = match std::env::var(EnvFilter::DEFAULT_ENV) {
        Ok(given) => EnvFilter::try_new(given),
        Err(_) => EnvFilter::try_new(DEFAULT_LOG),
    };
    let filter = filter.unwrap_or_else(|e| {
        eprintln!("pingora-slice: RUST_LOG is not a filter ({e}): logging at info");
        EnvFilter::new(DEFAULT_LOG)
    });
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
}
