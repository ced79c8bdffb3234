//! Reads YAML sections key by key and collects every problem on the way.
//!
//! A key is read at most once, by the code that knows its rule; what nobody
//! read is unknown and refused. `${VAR}` is expanded in scalars after the YAML
//! has been parsed, so the environment can change a value but never the shape
//! of the file. Not here: which keys there are, and what they must satisfy.

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_yaml::{Mapping, Value};

/// What is wrong with one key, and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Path of the key, such as `cluster.tls.ca` or `listen[1].address`.
    pub key: String,
    /// What was found there; tokens are not shown.
    pub value: String,
    /// What to do.
    pub remedy: String,
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}: {}", self.key, self.value, self.remedy)
    }
}

/// Everything that is wrong with a configuration.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct Problems(pub Vec<Problem>);

impl std::fmt::Display for Problems {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (i, problem) in self.0.iter().enumerate() {
            let line_end = if i == 0 { "" } else { "\n" };
            write!(f, "{line_end}{problem}")?;
        }
        Ok(())
    }
}

/// What replaces the value of a key that is absent.
const ABSENT: &str = "(absent)";
/// What replaces the value of a token.
const HIDDEN: &str = "(not shown)";
/// Largest size, an exbibyte: sums of a few of them fit into 64 bits.
const SIZE_MAX: u64 = 1 << 60;
/// Longest duration, about a century: longer ones overflow calendar arithmetic.
const DURATION_MAX: Duration = Duration::from_secs(100 * 365 * 86400);

/// What all sections of one file share.
pub(super) struct Reader<'a> {
    /// Looks up an environment variable.
    pub env: &'a dyn Fn(&str) -> Option<String>,
    /// Relative paths start here.
    pub base_dir: &'a Path,
    /// Collected so far.
    pub problems: RefCell<Vec<Problem>>,
}

impl Reader<'_> {
    /// Notes a problem.
    pub fn refuse(&self, key: &str, value: impl Into<String>, remedy: impl Into<String>) {
        let (key, value, remedy) = (key.to_string(), value.into(), remedy.into());
        self.problems
            .borrow_mut()
            .push(Problem { key, value, remedy });
    }

    /// Whether nothing was refused at or below `key`: only then do rules that
    /// join it with other keys say anything useful.
    pub fn is_clean(&self, key: &str) -> bool {
        let below = |p: &Problem| {
            p.key
                .strip_prefix(key)
                .is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']))
        };
        !self.problems.borrow().iter().any(below)
    }
}

/// One map of the file; the whole file is one with an empty path.
pub(super) struct Section<'a> {
    reader: &'a Reader<'a>,
    path: String,
    map: Mapping,
    known: Vec<&'static str>,
}

impl<'a> Section<'a> {
    /// Reads a map with `read`, then refuses the keys that it did not ask for.
    pub fn read<T>(
        reader: &'a Reader<'a>,
        path: &str,
        map: Mapping,
        read: impl FnOnce(&mut Section<'a>) -> T,
    ) -> T {
        let mut section = Section {
            reader,
            path: path.to_string(),
            map,
            known: Vec::new(),
        };
        let result = read(&mut section);
        section.refuse_rest();
        result
    }

    /// The full path of a key of this section.
    pub fn key(&self, name: &str) -> String {
        if self.path.is_empty() {
            name.to_string()
        } else {
            format!("{}.{name}", self.path)
        }
    }

    /// The path of the section itself.
    pub fn name(&self) -> &str {
        &self.path
    }

    /// Whether the key is there and not empty.
    pub fn has(&self, name: &str) -> bool {
        self.map.get(name).is_some_and(|v| !v.is_null())
    }

    /// As [`Reader::is_clean`], for a key of this section.
    pub fn is_clean(&self, name: &str) -> bool {
        self.reader.is_clean(&self.key(name))
    }

    /// Notes a problem with a key of this section.
    pub fn refuse(&self, name: &str, value: impl Into<String>, remedy: impl Into<String>) {
        self.reader.refuse(&self.key(name), value, remedy);
    }

    /// Notes that a key is needed.
    pub fn require(&self, name: &str, remedy: &str) {
        if !self.has(name) {
            self.refuse(name, ABSENT, remedy);
        }
    }

    /// A scalar that `parse` accepts; its error is the remedy.
    pub fn scalar<T>(
        &mut self,
        name: &'static str,
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> Option<T> {
        let value = self.take(name)?;
        self.parse(&self.key(name), &value, parse)
    }

    /// As [`Section::scalar`], for what must not be printed. Numbers are
    /// refused: YAML would read `0x1f` or `1e3` as something other than it says.
    pub fn token(&mut self, name: &'static str) -> Option<String> {
        let value = self.take(name)?;
        let read = match &value {
            Value::String(text) => expand(text, self.reader.env).and_then(|text| token(&text)),
            _ => Err("must be text: put it in quotes".to_string()),
        };
        read.map_err(|remedy| self.refuse(name, HIDDEN, remedy))
            .ok()
    }

    /// A list of scalars, or one scalar alone.
    pub fn list<T>(
        &mut self,
        name: &'static str,
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> Option<Vec<T>> {
        let path = self.key(name);
        let items = self.items(name)?;
        let entry = |(at, item)| self.parse(&format!("{path}{at}"), &item, &parse);
        all(items.into_iter().map(entry))
    }

    /// A list whose entries are scalars or maps, or one such entry alone.
    pub fn list_of_maps<T>(
        &mut self,
        name: &'static str,
        parse: impl Fn(&str) -> Result<T, String>,
        read: impl Fn(&mut Section<'a>) -> Option<T>,
    ) -> Option<Vec<T>> {
        let path = self.key(name);
        let items = self.items(name)?;
        let entry = |(at, item)| match item {
            Value::Mapping(map) => Section::read(self.reader, &format!("{path}{at}"), map, &read),
            item => self.parse(&format!("{path}{at}"), &item, &parse),
        };
        all(items.into_iter().map(entry))
    }

    /// A map below this one; an absent one is read like an empty one.
    pub fn section<T>(
        &mut self,
        name: &'static str,
        read: impl FnOnce(&mut Section<'a>) -> T,
    ) -> T {
        let map = self.map_of(name).unwrap_or_default();
        Section::read(self.reader, &self.key(name), map, read)
    }

    /// A map below this one that may be absent.
    pub fn optional_section<T>(
        &mut self,
        name: &'static str,
        read: impl FnOnce(&mut Section<'a>) -> Option<T>,
    ) -> Option<T> {
        let map = self.map_of(name)?;
        Section::read(self.reader, &self.key(name), map, read)
    }

    /// A path, relative to the configuration file.
    pub fn path(&mut self, name: &'static str) -> Option<PathBuf> {
        let base_dir = self.reader.base_dir;
        self.scalar(name, |text| match text {
            "" => Err("must be a path".to_string()),
            text => Ok(base_dir.join(text)),
        })
    }

    fn map_of(&mut self, name: &'static str) -> Option<Mapping> {
        match self.take(name)? {
            Value::Mapping(map) => Some(map),
            other => {
                self.refuse(
                    name,
                    shown(&other),
                    "must be a map: put its keys below it, indented",
                );
                None
            }
        }
    }

    /// The entries of a list with their place (`[0]`), or the one value without.
    fn items(&mut self, name: &'static str) -> Option<Vec<(String, Value)>> {
        Some(match self.take(name)? {
            Value::Sequence(items) => items
                .into_iter()
                .enumerate()
                .map(|(i, v)| (format!("[{i}]"), v))
                .collect(),
            one => vec![(String::new(), one)],
        })
    }

    fn take(&mut self, name: &'static str) -> Option<Value> {
        debug_assert!(!self.known.contains(&name), "{name} is read twice");
        self.known.push(name);
        self.map.remove(name).filter(|value| !value.is_null())
    }

    fn parse<T>(
        &self,
        path: &str,
        value: &Value,
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> Option<T> {
        let read = match value {
            Value::String(text) => expand(text, self.reader.env).and_then(|text| {
                parse(&text).map_err(|remedy| match *text == shown(value) {
                    true => remedy,
                    false => format!("{remedy} (it expands to {text:?})"),
                })
            }),
            Value::Bool(_) | Value::Number(_) => parse(&shown(value)),
            _ => Err("must be a single value".to_string()),
        };
        read.map_err(|remedy| self.reader.refuse(path, shown(value), remedy))
            .ok()
    }

    fn refuse_rest(self) {
        for (name, value) in &self.map {
            let name = match name {
                Value::String(name) => name.clone(),
                other => shown(other),
            };
            let similar = |known: &str| match name.len() > 2 && known.contains(&name) {
                true => 1.0,
                false => strsim::jaro(&name, known),
            };
            let nearest = self
                .known
                .iter()
                .max_by(|a, b| similar(a).total_cmp(&similar(b)));
            let remedy = match nearest.filter(|known| similar(known) > 0.75) {
                Some(known) => format!("unknown key; did you mean {known}?"),
                None => format!("unknown key; known here: {}", self.known.join(", ")),
            };
            // A misspelt `auth_token` must not be printed either.
            let is_secret = ["tok", "auth", "secret", "pass"]
                .iter()
                .any(|s| name.contains(s));
            let value = if is_secret {
                HIDDEN.to_string()
            } else {
                shown(value)
            };
            self.refuse(&name, value, remedy);
        }
    }
}

/// All entries, or `None`; reads on after a bad one, so that every problem shows.
fn all<T>(entries: impl Iterator<Item = Option<T>>) -> Option<Vec<T>> {
    let entries: Vec<Option<T>> = entries.collect();
    entries.into_iter().collect()
}

/// A value as it is quoted in a problem.
fn shown(value: &Value) -> String {
    match value {
        Value::Null => "(empty)".to_string(),
        Value::Bool(value) => value.to_string(),
        Value::Number(value) => value.to_string(),
        Value::String(value) => value.clone(),
        Value::Sequence(_) => "(a list)".to_string(),
        Value::Mapping(_) => "(a map)".to_string(),
        Value::Tagged(_) => "(a tagged value)".to_string(),
    }
}

/// Replaces `${VAR}` and `${VAR:-default}`; `$${` stands for `${` itself. As
/// in a shell, `:-` also replaces a variable that is set but empty.
fn expand(text: &str, env: &dyn Fn(&str) -> Option<String>) -> Result<String, String> {
    let mut expanded = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find("${") {
        if let Some(before) = rest[..at].strip_suffix('$') {
            expanded.push_str(before);
            expanded.push_str("${");
            rest = &rest[at + 2..];
            continue;
        }
        expanded.push_str(&rest[..at]);
        let (inside, after) = rest[at + 2..]
            .split_once('}')
            .ok_or("`${` without `}`: close it, or write `$${`")?;
        let (name, default) = match inside.split_once(":-") {
            Some((name, default)) => (name, Some(default)),
            None => (inside, None),
        };
        let is_name = !name.is_empty()
            && !name.starts_with(|c: char| c.is_ascii_digit())
            && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
        if !is_name {
            return Err(format!(
                "{name:?} is no variable: write ${{NAME}} or ${{NAME:-default}}"
            ));
        }
        match (
            env(name).filter(|value| default.is_none() || !value.is_empty()),
            default,
        ) {
            (Some(value), _) => expanded.push_str(&value),
            (None, Some(default)) => expanded.push_str(default),
            (None, None) => {
                return Err(format!(
                    "set {name} in the environment, or write ${{{name}:-default}}"
                ));
            }
        }
        rest = after;
    }
    expanded.push_str(rest);
    Ok(expanded)
}

/// A size in bytes: an integer, or one with the suffix k, m, g or t (powers of
/// 1024; any case; a `b` or `ib` may follow).
pub(super) fn size(text: &str) -> Result<u64, String> {
    let remedy = || "must be a size: an integer (bytes), or one with k, m or g, such as 512k";
    let (number, unit) = split_unit(text).ok_or_else(remedy)?;
    let unit = unit.to_ascii_lowercase();
    let letter = unit
        .strip_suffix("ib")
        .or(unit.strip_suffix('b'))
        .unwrap_or(&unit);
    let shift = match letter {
        "" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        _ => return Err(remedy().to_string()),
    };
    let bytes = number.checked_mul(1 << shift);
    bytes
        .filter(|bytes| *bytes <= SIZE_MAX)
        .ok_or_else(|| "must be at most 1048576t".to_string())
}

/// A duration: seconds, or an integer with the unit ms, s, m, h or d.
pub(super) fn duration(text: &str) -> Result<Duration, String> {
    let remedy = || "must be a duration: seconds, or such as 250ms, 2s, 5m, 1h";
    let (number, unit) = split_unit(text).ok_or_else(remedy)?;
    let ms_per_unit = match unit {
        "ms" => 1,
        "" | "s" => 1000,
        "m" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        _ => return Err(remedy().to_string()),
    };
    let duration = number.checked_mul(ms_per_unit).map(Duration::from_millis);
    duration
        .filter(|d| *d <= DURATION_MAX)
        .ok_or_else(|| "must be at most 36500d".to_string())
}

/// As [`duration`], but not zero.
pub(super) fn positive_duration(text: &str) -> Result<Duration, String> {
    duration(text).and_then(|d| match d.is_zero() {
        true => Err("must be greater than 0".to_string()),
        false => Ok(d),
    })
}

/// As [`size`], but not zero.
pub(super) fn positive_size(text: &str) -> Result<u64, String> {
    size(text).and_then(|bytes| match bytes {
        0 => Err("must be greater than 0".to_string()),
        bytes => Ok(bytes),
    })
}

/// An integer within bounds.
pub(super) fn integer(min: u64, max: u64) -> impl Fn(&str) -> Result<u64, String> {
    move |text| match text.parse() {
        Ok(number) if (min..=max).contains(&number) => Ok(number),
        _ => Err(match (min, max) {
            (0, _) => format!("must be an integer, 0 or greater, at most {max}"),
            (1, 10_000..) => format!("must be an integer greater than 0, at most {max}"),
            _ => format!("must be an integer from {min} to {max}"),
        }),
    }
}

/// `true` or `false`.
pub(super) fn boolean(text: &str) -> Result<bool, String> {
    text.to_ascii_lowercase()
        .parse()
        .map_err(|_| "must be true or false".to_string())
}

/// One of a few words.
pub(super) fn one_of<T: Copy>(words: &[(&str, T)]) -> impl Fn(&str) -> Result<T, String> {
    move |text| match words.iter().find(|(word, _)| *word == text) {
        Some((_, meaning)) => Ok(*meaning),
        None => {
            let words: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
            Err(format!("must be one of: {}", words.join(", ")))
        }
    }
}

/// A token that a client can send in a header.
fn token(text: &str) -> Result<String, String> {
    match text {
        "" => Err("is empty: give a long random token, or remove the key".to_string()),
        text if text.bytes().all(|b| b.is_ascii_graphic()) => Ok(text.to_string()),
        _ => Err("must be visible ASCII without spaces: it travels in a header".to_string()),
    }
}

fn split_unit(text: &str) -> Option<(u64, &str)> {
    let at = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(at);
    Some((number.parse().ok()?, unit.trim_start()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (text, bytes) in [
            ("0", 0),
            ("1048576", 1 << 20),
            ("64k", 65536),
            ("5m", 5 << 20),
            ("5M", 5 << 20),
            ("10g", 10 << 30),
            ("2t", 2 << 40),
            ("1048576t", 1 << 60),
            ("100mb", 100 << 20),
            ("1GiB", 1 << 30),
            ("7b", 7),
            ("1 m", 1 << 20),
        ] {
            assert_eq!(size(text), Ok(bytes), "{text}");
        }
        for text in [
            "",
            "k",
            "-1",
            "1.5m",
            "1x",
            "1kk",
            "20000000000g",
            "1048577t",
            "99999999999999999999",
        ] {
            assert!(size(text).is_err(), "{text}");
        }
        assert!(positive_size("0k").is_err());
    }

    #[test]
    fn durations() {
        for (text, ms) in [
            ("0", 0),
            ("3600", 3_600_000),
            ("250ms", 250),
            ("2s", 2000),
            ("5m", 300_000),
            ("1h", 3_600_000),
            ("1d", 86_400_000),
        ] {
            assert_eq!(duration(text), Ok(Duration::from_millis(ms)), "{text}");
        }
        for text in [
            "",
            "s",
            "-1",
            "1.5",
            "1w",
            "1 s x",
            "18446744073709551615",
            "36501d",
        ] {
            assert!(duration(text).is_err(), "{text}");
        }
        assert!(positive_duration("0ms").is_err());
    }

    #[test]
    fn variables() {
        let env = |name: &str| match name {
            "HOST" => Some("origin".to_string()),
            "EMPTY" => Some(String::new()),
            _ => None,
        };
        for (text, expanded) in [
            ("plain", "plain"),
            ("^/a$", "^/a$"),
            ("${HOST}:80", "origin:80"),
            ("http://${HOST}:${PORT:-8000}/", "http://origin:8000/"),
            ("${HOST:-other}", "origin"),
            ("[${EMPTY}]", "[]"),
            ("${EMPTY:-x}", "x"),
            ("${NONE:-}", ""),
            ("${NONE:-a:-b}", "a:-b"),
            ("$${HOST}", "${HOST}"),
        ] {
            assert_eq!(expand(text, &env), Ok(expanded.to_string()), "{text}");
        }
        for text in ["${NONE}", "${", "${HOST", "${}", "${A B}", "${1}", "${:-x}"] {
            assert!(expand(text, &env).is_err(), "{text}");
        }
        // What a variable holds is not expanded again.
        let env = |_: &str| Some("${HOST}".to_string());
        assert_eq!(expand("${X}", &env), Ok("${HOST}".to_string()));
    }
}
