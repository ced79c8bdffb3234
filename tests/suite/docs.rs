//! What the pages of `docs/` say is shown exists: each test that they name is
//! there, and so is each metric.

use std::collections::{BTreeMap, BTreeSet};
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

/// The metrics that `metrics.rs` declares, without their prefix, and their `HELP`.
fn declared_metrics() -> BTreeMap<String, String> {
    let source = fs::read_to_string(root().join("node/src/metrics.rs")).unwrap();
    let table = source.split("\nmetrics! {\n").nth(1).unwrap();
    let table = table.split("\n}\n").next().unwrap();
    let mut declared = BTreeMap::new();
    let mut help = String::new();
    for line in table.lines().map(str::trim) {
        if let Some(text) = line.strip_prefix("///") {
            help += text;
        } else if !line.is_empty() && !line.starts_with("//") {
            let name = line.split(':').next().unwrap().to_owned();
            declared.insert(name, std::mem::take(&mut help).trim().to_owned());
        }
    }
    declared
}

/// The table of metrics is complete, tells of none that is gone, and says what
/// their `HELP` says.
#[test]
fn operators_are_told_of_every_metric() {
    let page = fs::read_to_string(root().join("docs/OPERATIONS.md")).unwrap();
    let tables = page.split("### Every metric").nth(1).unwrap();
    let rows = tables.lines().filter(|line| line.starts_with("| `"));
    let told: BTreeMap<String, String> = rows
        .map(|row| {
            let row = row.replace('`', "");
            let cells: Vec<&str> = row.trim_matches('|').split('|').map(str::trim).collect();
            let [name, _unit, what, worry] = cells[..] else {
                panic!("{row}")
            };
            let text = match worry {
                "-" => format!("{what}."),
                worry => format!("{what}. Worry {worry}."),
            };
            (name.split('{').next().unwrap().to_owned(), text)
        })
        .collect();
    let declared = declared_metrics();
    assert!(declared.len() > 50, "is this still how they are declared?");
    let names = |of: &BTreeMap<String, String>| of.keys().cloned().collect::<BTreeSet<_>>();
    assert_eq!(names(&told), names(&declared));
    for (name, help) in &declared {
        assert_eq!(&told[name], help, "{name}");
    }
}

/// No alert waits for a metric that nobody counts.
#[test]
fn alerts_ask_for_metrics_that_exist() {
    let rules = fs::read_to_string(root().join("configs/alerts.yml")).unwrap();
    let declared = declared_metrics();
    let word = |c: char| !c.is_ascii_alphanumeric() && c != '_';
    let asked = rules.split(word).filter_map(|word| {
        let process = Some(word).filter(|word| word.starts_with("process_"));
        word.strip_prefix("pingora_slice_").or(process)
    });
    for name in asked {
        assert!(
            declared.contains_key(name),
            "configs/alerts.yml asks for {name}"
        );
    }
}

/// What an operator is to worry about at the first time raises an alert.
#[test]
fn damage_and_failed_purges_raise_alerts() {
    let rules = fs::read_to_string(root().join("configs/alerts.yml")).unwrap();
    for name in [
        "l1_damaged_total",
        "parts_damaged_total",
        "l2_damaged_total",
        "purge_requests_by_result{result=\"failure\"}",
    ] {
        assert!(rules.contains(&format!("pingora_slice_{name}")), "{name}");
    }
}
