//! Every target for a bounded time: what was found before, then new inputs.
//! The inputs are the same in every run; `FUZZ_SEED=N` chooses others.

use std::fs;
use std::panic::catch_unwind;
use std::path::Path;
use std::time::{Duration, Instant};

use pingora_slice_fuzz::mutate::Mutator;
use pingora_slice_fuzz::target;

/// New inputs for each target, and the longest time that they may take: a slow
/// machine tries fewer.
const INPUTS: usize = 20_000;
const TIME_MAX: Duration = Duration::from_secs(10);

fn corpus(name: &str) -> Vec<Vec<u8>> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("corpus")
        .join(name);
    let mut files: Vec<_> = fs::read_dir(&dir)
        .unwrap_or_else(|error| panic!("{}: {error}", dir.display()))
        .map(|entry| entry.expect("a directory").path())
        .collect();
    files.sort();
    files
        .iter()
        .map(|file| fs::read(file).expect("a file"))
        .collect()
}

fn run(name: &str) {
    let check = target(name).expect("a target");
    let tried = |input: &[u8]| {
        if catch_unwind(|| check(input)).is_err() {
            let hex: String = input.iter().map(|byte| format!("\\x{byte:02x}")).collect();
            panic!(
                "{name} fails for {input:?}; keep it: printf '{hex}' > tests/fuzz/corpus/{name}/NAME"
            );
        }
    };
    let known = corpus(name);
    assert!(!known.is_empty(), "{name} has nothing to start from");
    known.iter().for_each(|input| tried(input));
    let seed = std::env::var("FUZZ_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok());
    let mut mutator = Mutator::new(seed.unwrap_or(1), known);
    let started = Instant::now();
    for _ in 0..INPUTS {
        tried(&mutator.next_input());
        if started.elapsed() > TIME_MAX {
            break;
        }
    }
}

macro_rules! targets {
    ($($name:ident),*) => {
        $(#[test]
        fn $name() {
            run(stringify!($name));
        })*

        #[test]
        fn every_target_is_run() {
            let names = [$(stringify!($name)),*];
            assert_eq!(pingora_slice_fuzz::TARGETS.map(|(name, _)| name), names);
        }
    };
}

targets!(
    range,
    content_range,
    config,
    frames,
    key,
    plain,
    cache_control
);
