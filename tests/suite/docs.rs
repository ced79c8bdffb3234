//! What the pages of `docs/` say is shown exists: each test that they name is
//! there, and so is each metric.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// What stands between back quotes in a page.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.lines()
        .flat_map(|line| line.split('`').skip(1).step_by(2))
}

/// The functions below `tests/suite` of a path like `file::module::name`: the
/// source file of its modules, and its name.
fn source_of(test: &str) -> Option<(PathBuf, &str)> {
    let (modules, name) = test.rsplit_once("::")?;
    Some((
        root()
            .join("tests/suite")
            .join(modules.replace("::", "/") + ".rs"),
        name,
    ))
}

/// Whether a name is one of the suite's tests, as `cargo test` would list it.
fn is_test(test: &str) -> bool {
    let Some((file, name)) = source_of(test) else {
        return false;
    };
    let Ok(source) = fs::read_to_string(file) else {
        return false;
    };
    let Some(at) = source.find(&format!("fn {name}(")) else {
        return false;
    };
    // Its attributes stand between the item before it and its own line.
    let before = &source[..at];
    let start = before.rfind(['}', ';']).map_or(0, |end| end + 1);
    before[start..].contains("test]") || before[start..].contains("::test(")
}

/// A word of a page that names a test of the suite: two parts at least, in
/// lower case, the first one a module of the suite.
fn names_a_test(word: &str) -> bool {
    let parts: Vec<&str> = word.split("::").collect();
    let is_name = |part: &&str| {
        !part.is_empty()
            && part
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
    };
    parts.len() >= 2
        && parts.iter().all(is_name)
        && root()
            .join("tests/suite")
            .join(format!("{}.rs", parts[0]))
            .exists()
}

#[test]
fn every_test_that_a_page_names_exists() {
    let pages = ["ENGINE.md", "CACHING.md", "PURGE.md", "ARCHITECTURE.md"];
    let mut named = 0;
    for page in pages {
        let text = fs::read_to_string(root().join("docs").join(page)).unwrap();
        for word in quoted(&text) {
            if names_a_test(word) {
                assert!(is_test(word), "docs/{page} names {word}, which is no test");
                named += 1;
            } else if let Some(script) = word.strip_prefix("caching/") {
                let file = root().join("tests/suite/caching").join(script);
                assert!(
                    script.contains('*') || file.exists(),
                    "docs/{page} names {word}"
                );
                named += 1;
            }
        }
    }
    assert!(
        named > 60,
        "only {named} tests are named: is this still how pages name them?"
    );
    assert!(!is_test("origin_table::no_such_test"));
    assert!(!is_test("docs::quoted"), "not every function is a test");
}

/// Every row of the tables of what origins and clients do has its test.
#[test]
fn every_row_of_the_engines_tables_has_a_test() {
    let text = fs::read_to_string(root().join("docs/ENGINE.md")).unwrap();
    for title in ["## What the origin does", "## What clients ask"] {
        let table = text.split(title).nth(1).expect(title);
        let table = table.split("\n## ").next().unwrap();
        let rows: Vec<&str> = table
            .lines()
            .filter(|line| line.starts_with("| "))
            .skip(2)
            .collect();
        assert!(rows.len() > 15, "{title}");
        for row in rows {
            let tests = row.trim_end_matches(['|', ' ']).rsplit('|').next().unwrap();
            let shown =
                quoted(tests).any(|word| names_a_test(word) || word.starts_with("caching/"));
            assert!(shown, "no test shows: {row}");
        }
    }
}

/// The metrics that `metrics.rs` declares, without their prefix.
fn declared_metrics() -> BTreeSet<String> {
    let source = fs::read_to_string(root().join("node/src/metrics.rs")).unwrap();
    let table = source.split("\nmetrics! {\n").nth(1).unwrap();
    let table = table.split("\n}\n").next().unwrap();
    let lines = table.lines().map(str::trim);
    let lines = lines.filter(|line| !line.is_empty() && !line.starts_with("//"));
    lines
        .map(|line| line.split(':').next().unwrap().to_owned())
        .collect()
}

/// The table of metrics is complete, and tells of none that is gone.
#[test]
fn operators_are_told_of_every_metric() {
    let page = fs::read_to_string(root().join("docs/OPERATIONS.md")).unwrap();
    let tables = page.split("### Every metric").nth(1).unwrap();
    let rows = tables.lines().filter_map(|line| line.strip_prefix("| `"));
    let told: BTreeSet<String> = rows
        .map(|row| row.split(['`', '{']).next().unwrap().to_owned())
        .collect();
    let declared = declared_metrics();
    assert!(declared.len() > 50, "is this still how they are declared?");
    assert_eq!(told, declared);
}

/// No alert waits for a metric that nobody counts.
#[test]
fn alerts_ask_for_metrics_that_exist() {
    let rules = fs::read_to_string(root().join("configs/alerts.yml")).unwrap();
    let declared = declared_metrics();
    let asked = rules.split("pingora_slice_").skip(1).map(|rest| {
        let ends = |c: char| !c.is_ascii_alphanumeric() && c != '_';
        rest.split(ends).next().unwrap()
    });
    for name in asked {
        assert!(
            declared.contains(name),
            "configs/alerts.yml asks for {name}"
        );
    }
}
