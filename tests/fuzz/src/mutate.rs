//! Changes to inputs, for where no coverage guides: the same operations as a
//! fuzzer's, from a seed.

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

/// Longest input that is made.
const BYTES_MAX: usize = 4096;
/// Changes to one input.
const CHANGES_MAX: usize = 6;
/// What parsers tend to care about.
const WORDS: [&[u8]; 24] = [
    b"bytes",
    b"=",
    b"-",
    b",",
    b"/",
    b"*",
    b" ",
    b"\t",
    b"\"",
    b"\\",
    b"${",
    b"}",
    b":-",
    b": ",
    b"\n",
    b"0",
    b"18446744073709551615",
    b"18446744073709551616",
    b"9223372036854775808",
    b"\xff\xff\xff\xff",
    b"\xfd\xff\xff\xff\xff\xff\xff\xff\xff",
    b"max-age=",
    b"[",
    b"(",
];

/// Makes inputs from others.
pub struct Mutator {
    rng: SmallRng,
    seeds: Vec<Vec<u8>>,
}

impl Mutator {
    /// One that starts from `seeds`.
    pub fn new(seed: u64, mut seeds: Vec<Vec<u8>>) -> Mutator {
        if seeds.is_empty() {
            seeds.push(Vec::new());
        }
        Mutator {
            rng: SmallRng::seed_from_u64(seed),
            seeds,
        }
    }

    /// The next input.
    pub fn next_input(&mut self) -> Vec<u8> {
        let mut input = self.any_seed();
        for _ in 0..self.rng.random_range(1..=CHANGES_MAX) {
            self.change(&mut input);
        }
        input.truncate(BYTES_MAX);
        input
    }

    fn any_seed(&mut self) -> Vec<u8> {
        let at = self.rng.random_range(0..self.seeds.len());
        self.seeds[at].clone()
    }

    fn change(&mut self, input: &mut Vec<u8>) {
        let at = self.rng.random_range(0..=input.len());
        let end = self.rng.random_range(at..=input.len().min(at + 16));
        match self.rng.random_range(0..8) {
            0 if at < input.len() => input[at] ^= 1 << self.rng.random_range(0..8),
            1 if at < input.len() => input[at] = self.rng.random(),
            2 => {
                input.drain(at..end);
            }
            3 => {
                let piece = input[at..end].to_vec();
                input.splice(at..at, piece);
            }
            4 => {
                let word = WORDS[self.rng.random_range(0..WORDS.len())];
                input.splice(at..at, word.iter().copied());
            }
            5 => {
                let number = self.rng.random::<u64>() >> self.rng.random_range(0..64);
                input.splice(at..end, number.to_string().into_bytes());
            }
            6 => {
                let other = self.any_seed();
                let from = self.rng.random_range(0..=other.len());
                input.truncate(at);
                input.extend_from_slice(&other[from..]);
            }
            _ => input.insert(at, self.rng.random()),
        }
    }
}
