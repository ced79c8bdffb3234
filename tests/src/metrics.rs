//! The metrics text of a node, read.

use std::collections::BTreeMap;

use anyhow::{Context, Result};

/// What all our metric names begin with; left out when asking.
const PREFIX: &str = "pingora_slice_";

/// Samples by `name{labels}`, as they stand in the text.
#[derive(Clone, Debug, Default)]
pub struct Metrics(BTreeMap<String, f64>);

impl Metrics {
    /// Reads the Prometheus text format.
    ///
    /// # Errors
    /// A line that is not in that format.
    pub fn parse(text: &str) -> Result<Metrics> {
        let mut samples = BTreeMap::new();
        for line in text
            .lines()
            .filter(|line| !line.starts_with('#') && !line.trim().is_empty())
        {
            let (name, value) = line.rsplit_once(' ').with_context(|| line.to_owned())?;
            let value = value.parse().with_context(|| line.to_owned())?;
            let before = samples.insert(name.to_owned(), value);
            anyhow::ensure!(before.is_none(), "{name} stands twice");
        }
        Ok(Metrics(samples))
    }

    /// One sample, by its name without `pingora_slice_` and its labels if any,
    /// for example `slices_total{source="l1"}`; `None` when absent.
    pub fn sample(&self, name: &str) -> Option<f64> {
        self.0.get(&format!("{PREFIX}{name}")).copied()
    }

    /// The sum of all samples of one name, whatever their labels; 0 when absent.
    pub fn sum(&self, name: &str) -> f64 {
        let full = format!("{PREFIX}{name}");
        let with_labels = format!("{full}{{");
        let ours = |key: &String| *key == full || key.starts_with(&with_labels);
        self.0
            .iter()
            .filter(|(key, _)| ours(key))
            .map(|(_, value)| value)
            .sum()
    }

    /// Whether there is any sample of this name.
    pub fn has(&self, name: &str) -> bool {
        let full = format!("{PREFIX}{name}");
        let with_labels = format!("{full}{{");
        self.0
            .keys()
            .any(|key| *key == full || key.starts_with(&with_labels))
    }

    /// All samples.
    pub fn samples(&self) -> impl Iterator<Item = (&str, f64)> {
        self.0.iter().map(|(key, value)| (key.as_str(), *value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_found_by_name_and_labels() {
        let text = "# HELP x y\n# TYPE x counter\npingora_slice_slices_total{source=\"l1\"} 3\n\
                    pingora_slice_slices_total{source=\"l2\"} 4\npingora_slice_l1_bytes 1e3\n";
        let metrics = Metrics::parse(text).expect("well formed");
        assert_eq!(metrics.sample("slices_total{source=\"l1\"}"), Some(3.0));
        assert_eq!(metrics.sum("slices_total"), 7.0);
        assert_eq!(metrics.sum("l1_bytes"), 1000.0);
        assert_eq!(metrics.sample("slices"), None);
        assert!(!metrics.has("slices"));
        assert!(Metrics::parse("pingora_slice_x one").is_err());
    }
}
