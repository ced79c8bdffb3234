//! `pingora-slicectl`: one call of the admin API, or one certificate, then exit.
//!
//! Exit code: 0 done, 1 refused or failed, 2 wrong usage.

mod print;

use std::hash::{BuildHasher, Hasher};
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::mpsc;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use pingora_slice_client::{Client, ClientError, api, ca};
use serde::Serialize;

/// Looks after a pingora-slice cluster: purges, members, certificates.
#[derive(Parser)]
#[command(name = "pingora-slicectl", version)]
struct Cli {
    /// Admin address of any node
    #[arg(
        long,
        global = true,
        value_name = "URL",
        default_value = "http://127.0.0.1:9091"
    )]
    server: String,
    /// Token of the admin API (admin.auth_token); other users of this machine
    /// can read arguments, so rather set it in the environment
    #[arg(
        long,
        global = true,
        env = "PINGORA_SLICE_TOKEN",
        hide_env_values = true
    )]
    token: Option<String>,
    /// How to print answers
    #[arg(long, global = true, value_enum, default_value_t = Output::Table)]
    output: Output,
    #[command(subcommand)]
    command: Command,
}

#[derive(Clone, Copy, ValueEnum)]
enum Output {
    /// For people
    Table,
    /// For programs: the API's own messages
    Json,
}

#[derive(Clone, Copy, ValueEnum)]
enum Wait {
    /// Until no node answers with older bytes
    All,
    /// Until a majority has it on disk
    Quorum,
}

#[derive(Subcommand)]
enum Command {
    /// The cluster as the asked node sees it
    Status {
        /// Exit with 1 unless this node may answer from its cache: it holds a
        /// lease, or runs alone
        #[arg(long)]
        ready: bool,
    },
    /// Forget objects, provably: when this succeeds, no node serves older bytes
    Purge(PurgeArgs),
    /// All nodes
    Nodes,
    /// Take a node out of the ring for good; it goes on answering. There is no
    /// way back but removing it: for a while, restart it with `weight: 0`
    Drain {
        /// Its number
        id: u64,
    },
    /// Remove a node for good; its number is never used again
    Remove {
        /// Its number
        id: u64,
    },
    /// Where a URL's bytes are, and what a request for it would get now
    Explain {
        /// http://host/path?query, or host/path?query
        url: String,
    },
    /// Fetch objects into the cache before anybody asks
    Warm {
        /// http://host/path?query, or host/path?query
        #[arg(required = true, value_name = "URL")]
        urls: Vec<String>,
    },
    /// The cluster's own certificate authority
    #[command(subcommand)]
    Ca(CaCommand),
}

#[derive(Args)]
struct PurgeArgs {
    /// URLs: http://host/path?query, or host/path?query. With --prefix paths
    /// under which everything goes, with --tag tags, with --host host names
    #[arg(
        required_unless_present = "all",
        conflicts_with = "all",
        value_name = "URL"
    )]
    items: Vec<String>,
    /// Everything under these URLs
    #[arg(long, group = "scope")]
    prefix: bool,
    /// Everything that carries one of these tags (Cache-Tag, Surrogate-Key)
    #[arg(long, group = "scope")]
    tag: bool,
    /// Everything of these hosts
    #[arg(long, group = "scope")]
    host: bool,
    /// Everything
    #[arg(long, group = "scope")]
    all: bool,
    /// Only make stale: it is revalidated, and may serve where stale is allowed
    #[arg(long, conflicts_with = "hard")]
    soft: bool,
    /// Also never use the stored bytes again, even if the origin confirms them
    #[arg(long)]
    hard: bool,
    /// What to wait for. `quorum` promises less: some nodes may answer with
    /// older bytes for up to about one and a half leases
    #[arg(long, value_enum, default_value_t = Wait::All)]
    wait: Wait,
    /// The number that an unconfirmed purge was answered with: waits for that
    /// one, where it was committed after all, instead of purging again
    #[arg(long, value_name = "ID")]
    request_id: Option<String>,
}

#[derive(Subcommand)]
enum CaCommand {
    /// Make the authority: ca.pem for every node, ca.key to be kept elsewhere
    Init {
        /// Where to; made if need be
        #[arg(long)]
        dir: PathBuf,
    },
    /// Issue a node's certificate: nodeN.pem and nodeN.key
    Issue {
        /// Where the authority is
        #[arg(long)]
        dir: PathBuf,
        /// The node's number (cluster.node_id)
        #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
        node: u64,
        /// A name or address of the node; may be given several times
        #[arg(long = "host", value_name = "HOST")]
        hosts: Vec<String>,
    },
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(&cli) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(e) => {
            eprintln!("pingora-slicectl: {}", print::printable(&format!("{e:#}")));
            if let Some(advice) = e.downcast_ref().and_then(advice) {
                eprintln!("{advice}");
            }
            ExitCode::FAILURE
        }
    }
}

/// Whether all of it was done.
fn run(cli: &Cli) -> anyhow::Result<bool> {
    let output = cli.output;
    let client = match &cli.command {
        Command::Ca(command) => return issue(command),
        _ => Client::new(&cli.server, &token(cli)),
    };
    match &cli.command {
        Command::Status { ready } => {
            let cluster = client.cluster()?;
            show(output, &cluster, print::status)?;
            // A cluster that has not formed is no success.
            Ok(!cluster.nodes.is_empty() && (!ready || cluster.lease_valid))
        }
        Command::Nodes => show(output, &client.cluster()?.nodes, |nodes| {
            print::nodes(nodes)
        }),
        Command::Purge(args) => {
            let purged = purge_and_tell(&client, args.message())?;
            show(output, &purged, print::purged)?;
            Ok(purged.success)
        }
        Command::Drain { id } => show(output, &client.drain(*id)?, print::done),
        Command::Remove { id } => show(output, &client.remove(*id)?, print::done),
        Command::Explain { url } => show(output, &client.explain(url)?, print::explain),
        Command::Warm { urls } => {
            let warmed = client.warm(urls.clone())?;
            show(output, &warmed, print::warmed)?;
            Ok(warmed.urls.iter().all(|url| url.success))
        }
        Command::Ca(command) => issue(command),
    }
}

/// Between two looks at how far a purge has come; most are done before the first.
const LOOK_EVERY: Duration = Duration::from_millis(300);

/// Purges, and tells on stderr which nodes are waited for meanwhile. Without an
/// answer the error says under which number to ask again.
fn purge_and_tell(client: &Client, mut purge: api::Purge) -> anyhow::Result<api::Purged> {
    let request_id = purge.request_id.get_or_insert_with(random_id).clone();
    let purged = purge_telling(client, purge, &request_id);
    purged.map_err(|error| match error {
        // The node's own word: what to do next comes with it.
        ClientError::Refused { .. } => error.into(),
        _ => anyhow::Error::new(error).context(format!(
            "no answer, so nothing is promised yet: try the same again with --request-id {request_id}"
        )),
    })
}

fn purge_telling(
    client: &Client,
    purge: api::Purge,
    request_id: &str,
) -> Result<api::Purged, ClientError> {
    let (done, doing) = mpsc::channel::<()>();
    std::thread::scope(|scope| {
        let purging = scope.spawn(move || {
            let purged = client.purge(&purge);
            drop(done);
            purged
        });
        let mut told = api::Progress::default();
        while doing.recv_timeout(LOOK_EVERY) == Err(mpsc::RecvTimeoutError::Timeout) {
            // Not committed yet, or the leader is busy: the answer will tell.
            if let Ok(progress) = client.purge_progress(request_id)
                && progress != told
            {
                eprint!("{}", print::progress(&progress));
                told = progress;
            }
        }
        purging
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// A number for a purge that nobody else has used.
fn random_id() -> String {
    // Each is keyed by the system's randomness.
    let half = || {
        std::collections::hash_map::RandomState::new()
            .build_hasher()
            .finish()
    };
    format!("{:016x}{:016x}", half(), half())
}

/// The token, or the end of the program: without one every call is refused.
fn token(cli: &Cli) -> String {
    use clap::{CommandFactory, error::ErrorKind};
    cli.token
        .clone()
        .filter(|token| !token.is_empty())
        .unwrap_or_else(|| {
            let message = "set PINGORA_SLICE_TOKEN to the node's admin.auth_token, or give --token";
            Cli::command()
                .error(ErrorKind::MissingRequiredArgument, message)
                .exit()
        })
}

impl PurgeArgs {
    fn message(&self) -> api::Purge {
        let mut purge = api::Purge {
            all: self.all,
            mode: match (self.soft, self.hard) {
                (true, _) => api::Mode::Soft,
                (_, true) => api::Mode::Hard,
                _ => api::Mode::Plain,
            },
            wait: match self.wait {
                Wait::All => api::Wait::All,
                Wait::Quorum => api::Wait::Quorum,
            },
            request_id: self.request_id.clone(),
            ..api::Purge::default()
        };
        let items = match (self.prefix, self.tag, self.host) {
            (true, _, _) => &mut purge.prefixes,
            (_, true, _) => &mut purge.tags,
            (_, _, true) => &mut purge.hosts,
            _ => &mut purge.urls,
        };
        *items = self.items.clone();
        purge
    }
}

fn issue(command: &CaCommand) -> anyhow::Result<bool> {
    let text = match command {
        CaCommand::Init { dir } => {
            ca::ca_init(dir)?;
            let dir = dir.display();
            format!(
                "made {dir}/ca.pem (for every node) and {dir}/ca.key (for no node: keep it safe)\n"
            )
        }
        CaCommand::Issue { dir, node, hosts } => {
            ca::ca_issue(dir, *node, hosts)?;
            let dir = dir.display();
            format!("made {dir}/node{node}.pem and {dir}/node{node}.key (for node {node} only)\n")
        }
    };
    write(&text)
}

/// Prints an answer; true, because there is one.
fn show<T: Serialize>(
    output: Output,
    answer: &T,
    table: impl Fn(&T) -> String,
) -> anyhow::Result<bool> {
    write(&match output {
        Output::Table => table(answer),
        Output::Json => serde_json::to_string_pretty(answer)? + "\n",
    })
}

fn write(text: &str) -> anyhow::Result<bool> {
    match std::io::stdout().write_all(text.as_bytes()) {
        // Whoever read our output has seen enough: no failure of ours.
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(true),
        written => Ok(written.map(|()| true)?),
    }
}

/// What to do about a call that failed, where that is known.
fn advice(error: &ClientError) -> Option<String> {
    match error {
        ClientError::Unreachable { .. } => {
            Some("is the node running, and --server its `admin.address`?".to_string())
        }
        ClientError::Refused { status: 401, .. } => {
            Some("the token is not the node's admin.auth_token".to_string())
        }
        ClientError::Refused {
            request_id: Some(id),
            ..
        } => Some(format!(
            "nothing is promised yet; try the same again with --request-id {id}"
        )),
        ClientError::Refused { .. } => None,
        ClientError::Garbage(_) => {
            Some("--server must be a node's `admin.address`, not one of its other ports".into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn purge(args: &[&str]) -> Result<api::Purge, clap::error::ErrorKind> {
        let args = ["pingora-slicectl", "--token", "t", "purge"]
            .iter()
            .chain(args);
        match Cli::try_parse_from(args).map_err(|e| e.kind())?.command {
            Command::Purge(args) => Ok(args.message()),
            _ => panic!("another command"),
        }
    }

    #[test]
    fn purge_arguments() {
        let urls = purge(&["a/b", "http://c/d"]).unwrap();
        assert_eq!(
            (urls.urls.len(), urls.count(), urls.mode),
            (2, 2, api::Mode::Plain)
        );
        let prefixes = purge(&["--prefix", "a/b", "--soft"]).unwrap();
        assert_eq!((prefixes.prefixes.len(), prefixes.count()), (1, 1));
        assert_eq!(prefixes.mode, api::Mode::Soft);
        let tags = purge(&["--hard", "--tag", "x", "y"]).unwrap();
        assert_eq!((tags.tags.len(), tags.mode), (2, api::Mode::Hard));
        assert_eq!(purge(&["--host", "a"]).unwrap().hosts, ["a"]);
        let quick = purge(&["--wait", "quorum", "a/b"]).unwrap();
        assert_eq!((quick.wait, urls.wait), (api::Wait::Quorum, api::Wait::All));
        assert!(purge(&["--all"]).unwrap().all);
        let retry = purge(&["--request-id", "77", "a/b"]).unwrap();
        assert_eq!(retry.request_id.as_deref(), Some("77"));
    }

    /// Whoever has no answer can ask for the same purge again.
    #[test]
    fn a_purge_without_an_answer_names_its_number() {
        // Taken and closed: whoever connects is not answered.
        let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let client = Client::new(&nobody.local_addr().unwrap().to_string(), "t");
        drop(nobody);
        let said = |purge| format!("{:#}", purge_and_tell(&client, purge).unwrap_err());
        let own = said(purge(&["a/b"]).unwrap());
        let id = own.split("--request-id ").nth(1).expect("a number");
        assert!(
            id.len() > 32 && id[..32].chars().all(|c| c.is_ascii_hexdigit()),
            "{own}"
        );
        let given = said(purge(&["--request-id", "77", "a/b"]).unwrap());
        assert!(given.contains("--request-id 77"), "{given}");
    }

    #[test]
    fn a_purge_that_is_not_clear_is_refused() {
        for args in [
            &[][..],
            &["--all", "a/b"],
            &["--prefix", "--tag", "a"],
            &["--soft", "--hard", "a/b"],
            &["--prefix"],
            &["--wait", "some", "a/b"],
        ] {
            assert!(purge(args).is_err(), "{args:?}");
        }
    }

    #[test]
    fn arguments_are_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
        let issue = [
            "pingora-slicectl",
            "ca",
            "issue",
            "--dir",
            "d",
            "--node",
            "0",
        ];
        assert!(Cli::try_parse_from(issue).is_err());
    }
}
