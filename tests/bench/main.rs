//! `make bench`: pingora-slice beside its peers and its floor, on this machine.
//!
//! Machines drift, so no figure stands alone: the two sides of a comparison
//! take turns (A B A B ...), and only the ratio of neighbours is quoted.
//!
//! | module | what it does |
//! | --- | --- |
//! | [`machine`] | what is missing, processes pinned to cores, their CPU time and memory |
//! | [`peers`] | configurations of the origin and the peers |
//! | [`load`] | wrk, one plain client, a relay that delays |
//! | [`rows`] | the rows: hits, disk, QUIC, cold objects, connections, growth |
//! | [`purges`] | the rows about purges |
//! | [`report`] | medians, ratios, table, JSON, bar chart |
//! | [`stat`] | CPU time as /proc says it |
//!
//! The other programs that are measured against are in `parts.rs`.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;

mod load;
mod machine;
mod peers;
mod purges;
mod report;
mod rows;
mod stat;

/// What `make bench` may be told.
pub struct Settings {
    /// Rows to measure; empty: all.
    rows: Vec<String>,
    /// Turns of each comparison.
    pub pairs: usize,
    /// How long each turn loads its server.
    pub turn: Duration,
    /// Where report and chart go.
    out: PathBuf,
}

impl Settings {
    /// `--rows a,b --pairs N --seconds S --out DIR`, as the Makefile gives them.
    fn from_arguments() -> Result<Settings> {
        let mut settings = Settings {
            rows: Vec::new(),
            pairs: 5,
            turn: Duration::from_secs(2),
            out: PathBuf::from("target/bench"),
        };
        let mut arguments = std::env::args().skip(1).filter(|a| a != "--bench");
        while let Some(name) = arguments.next() {
            let value = arguments.next().unwrap_or_default();
            match name.as_str() {
                "--rows" => {
                    let names = value.split(',').filter(|row| !row.is_empty());
                    settings.rows = names.map(str::to_owned).collect();
                }
                "--pairs" => settings.pairs = value.parse()?,
                "--seconds" => settings.turn = Duration::from_secs_f64(value.parse()?),
                "--out" => settings.out = value.into(),
                _ => anyhow::bail!("{name}: not known; see `make help`"),
            }
        }
        if let Some(unknown) = settings
            .rows
            .iter()
            .find(|r| !rows::NAMES.contains(&r.as_str()))
        {
            anyhow::bail!("no row {unknown}; there are {}", rows::NAMES.join(", "));
        }
        anyhow::ensure!(settings.pairs > 0, "at least one pair");
        Ok(settings)
    }

    /// Whether a row was asked for.
    pub fn wants(&self, row: &str) -> bool {
        self.rows.is_empty() || self.rows.iter().any(|wanted| wanted == row)
    }
}

#[tokio::main]
async fn main() -> Result<()> {
    let settings = Settings::from_arguments()?;
    machine::raise_file_limit();
    machine::refuse_what_is_missing()?;
    let parts = machine::build_floors()?;
    let mut report = report::Report::new();
    rows::measure(&settings, &parts, &mut report).await?;
    report.print(&settings.out)
}
