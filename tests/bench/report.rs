//! Medians, spreads and ratios: as a table, as JSON, as a bar chart.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::json;

use crate::machine;

/// What is wanted of a ratio.
#[derive(Clone, Copy, Debug)]
pub enum Aim {
    /// Ours by theirs, at least.
    AtLeast(f64),
    /// Ours by theirs, at most.
    AtMost(f64),
    /// Only looked at.
    None,
}

impl Aim {
    fn is_met(self, ratio: f64) -> Option<bool> {
        match self {
            Aim::AtLeast(least) => Some(ratio >= least),
            Aim::AtMost(most) => Some(ratio <= most),
            Aim::None => None,
        }
    }

    fn text(self) -> String {
        match self {
            Aim::AtLeast(least) => format!("≥ {least}"),
            Aim::AtMost(most) => format!("≤ {most}"),
            Aim::None => "-".to_owned(),
        }
    }
}

/// Two sides that took turns.
#[derive(Clone, Debug)]
pub struct Comparison {
    /// The row.
    pub row: &'static str,
    /// What was done.
    pub work: String,
    /// The other side.
    pub against: String,
    /// Unit of the figures.
    pub unit: &'static str,
    /// What is wanted.
    pub aim: Aim,
    /// Ours and theirs, turn by turn.
    pub pairs: Vec<(f64, f64)>,
}

impl Comparison {
    fn ratios(&self) -> Vec<f64> {
        self.pairs
            .iter()
            .map(|(ours, theirs)| ours / theirs)
            .collect()
    }
}

/// Everything measured in one run.
#[derive(Default)]
pub struct Report {
    comparisons: Vec<Comparison>,
    not_measured: Vec<(String, String)>,
}

impl Report {
    /// Nothing measured yet.
    pub fn new() -> Report {
        Report::default()
    }

    /// Adds a comparison, and says how it went.
    pub fn add(&mut self, comparison: Comparison) {
        let (median, low, high) = spread(&comparison.ratios());
        eprintln!(
            "{}: {} against {}: {median:.3} ({low:.3} to {high:.3}) of {}, aim {}",
            comparison.row,
            comparison.work,
            comparison.against,
            comparison.unit,
            comparison.aim.text()
        );
        self.comparisons.push(comparison);
    }

    /// How much has been added so far, for [`Report::refuse`].
    pub fn so_far(&self) -> usize {
        self.comparisons.len()
    }

    /// Takes back what was added since: something was wrong with it.
    pub fn refuse(&mut self, so_far: usize, work: &str, error: &anyhow::Error) {
        self.comparisons.truncate(so_far);
        self.not_measured(work, format!("{error:#}").replace('\n', " "));
    }

    /// Says that something was not measured, and why: no figure is invented.
    pub fn not_measured(&mut self, work: &str, why: impl std::fmt::Display) {
        eprintln!("{work}: not measured: {why}");
        self.not_measured.push((work.to_owned(), why.to_string()));
    }

    /// The table on standard output; JSON, table and chart in `dir`.
    pub fn print(&self, dir: &Path) -> Result<()> {
        let table = self.table();
        println!("{table}");
        fs::create_dir_all(dir)?;
        let write = |name: &str, text: &str| {
            let path = dir.join(name);
            fs::write(&path, text).with_context(|| path.display().to_string())
        };
        write("bench.md", &table)?;
        write("bench.json", &serde_json::to_string_pretty(&self.json())?)?;
        write("bench.svg", &self.chart())?;
        eprintln!("also in {}: bench.md, bench.json, bench.svg", dir.display());
        Ok(())
    }

    fn table(&self) -> String {
        let mut text = String::from(
            "| work | against | unit | ours | theirs | ratio (lowest to highest) | aim | met |\n\
             | --- | --- | --- | --- | --- | --- | --- | --- |\n",
        );
        for comparison in &self.comparisons {
            let side = |pick: fn(&(f64, f64)) -> f64| {
                let (median, ..) = spread(&comparison.pairs.iter().map(pick).collect::<Vec<_>>());
                number(median)
            };
            let (ratio, low, high) = spread(&comparison.ratios());
            let met = match comparison.aim.is_met(ratio) {
                Some(true) => "yes",
                Some(false) => "**no**",
                None => "-",
            };
            let _ = writeln!(
                text,
                "| {} | {} | {} | {} | {} | **{ratio:.2}** ({low:.2} to {high:.2}) | {} | {met} |",
                comparison.work,
                comparison.against,
                comparison.unit,
                side(|pair| pair.0),
                side(|pair| pair.1),
                comparison.aim.text(),
            );
        }
        for (work, why) in &self.not_measured {
            let _ = writeln!(
                text,
                "| {work} | - | not measured: {why} | - | - | - | - | - |"
            );
        }
        text
    }

    fn json(&self) -> serde_json::Value {
        let comparisons: Vec<_> = self
            .comparisons
            .iter()
            .map(|c| {
                let (median, lowest, highest) = spread(&c.ratios());
                json!({
                    "row": c.row,
                    "work": c.work,
                    "against": c.against,
                    "unit": c.unit,
                    "aim": c.aim.text(),
                    "met": c.aim.is_met(median),
                    "ratio": {"median": median, "lowest": lowest, "highest": highest},
                    "pairs": c.pairs,
                })
            })
            .collect();
        let not_measured: Vec<_> = self
            .not_measured
            .iter()
            .map(|(work, why)| json!({"work": work, "why": why}))
            .collect();
        json!({
            "commit": machine::commit(),
            "processor": machine::processor(),
            "comparisons": comparisons,
            "not_measured": not_measured,
        })
    }

    /// One bar per comparison: how far along the way to its aim, which is the
    /// line. Further right is better, whichever way the ratio runs.
    fn chart(&self) -> String {
        const ROW: usize = 22;
        const LEFT: usize = 600;
        const AIM: f64 = 200.0;
        const WIDTH: usize = 1060;
        let aimed: Vec<_> = self
            .comparisons
            .iter()
            .filter_map(|c| {
                let ratio = spread(&c.ratios()).0;
                let share = match c.aim {
                    Aim::AtLeast(least) => ratio / least,
                    // A difference may be nothing, or less.
                    Aim::AtMost(most) if ratio > 0.0 => most / ratio,
                    Aim::AtMost(_) => f64::INFINITY,
                    Aim::None => return None,
                };
                Some((c, ratio, share))
            })
            .collect();
        let height = aimed.len() * ROW + 40;
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" \
             font-family=\"sans-serif\" font-size=\"12\">\n\
             <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
        );
        let aim_x = LEFT as f64 + AIM;
        for (index, (comparison, ratio, share)) in aimed.iter().enumerate() {
            let y = 20 + index * ROW;
            let bar = (share * AIM).min((WIDTH - LEFT - 60) as f64);
            let fill = if *share >= 1.0 { "#2a7a4b" } else { "#b8442c" };
            let label = format!(
                "{} / {} ({})",
                comparison.work, comparison.against, comparison.unit
            );
            let _ = write!(
                svg,
                "<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{}</text>\n\
                 <rect x=\"{LEFT}\" y=\"{y}\" width=\"{bar:.1}\" height=\"{}\" fill=\"{fill}\"/>\n\
                 <text x=\"{:.1}\" y=\"{}\">{ratio:.2} ({})</text>\n",
                LEFT - 8,
                y + 13,
                escape(&label),
                ROW - 6,
                LEFT as f64 + bar + 5.0,
                y + 13,
                escape(&comparison.aim.text()),
            );
        }
        let _ = write!(
            svg,
            "<line x1=\"{aim_x}\" x2=\"{aim_x}\" y1=\"12\" y2=\"{}\" stroke=\"black\" stroke-dasharray=\"4 3\"/>\n\
             <text x=\"{aim_x}\" y=\"10\" text-anchor=\"middle\">aim</text>\n</svg>\n",
            height - 12
        );
        svg
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

fn number(value: f64) -> String {
    match value.abs() {
        0.0 => "0".into(),
        ..0.1 => format!("{value:.4}"),
        ..10.0 => format!("{value:.2}"),
        ..1000.0 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    }
}

/// Median, lowest and highest.
pub fn spread(values: &[f64]) -> (f64, f64, f64) {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match (sorted.first(), sorted.last()) {
        (Some(low), Some(high)) => {
            let middle = sorted.len() / 2;
            let median = if sorted.len() % 2 == 1 {
                sorted[middle]
            } else {
                (sorted[middle - 1] + sorted[middle]) / 2.0
            };
            (median, *low, *high)
        }
        _ => (f64::NAN, f64::NAN, f64::NAN),
    }
}
