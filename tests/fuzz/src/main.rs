//! libFuzzer's side of the targets: `FUZZ_TARGET` names one. See `make fuzz`.
#![no_main]

use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;

static TARGET: OnceLock<fn(&[u8])> = OnceLock::new();

fn chosen() -> fn(&[u8]) {
    let name = std::env::var("FUZZ_TARGET").unwrap_or_default();
    let names = pingora_slice_fuzz::TARGETS.map(|(name, _)| name).join(", ");
    pingora_slice_fuzz::target(&name).unwrap_or_else(|| panic!("FUZZ_TARGET is none of {names}"))
}

fuzz_target!(|data: &[u8]| TARGET.get_or_init(chosen)(data));
