#!/usr/bin/env bash
# Lets libFuzzer look for inputs that break a target of tests/fuzz:
#   scripts/fuzz.sh SECONDS [TARGET...]
# What it learns stays in target/fuzz/corpus; what breaks a target is put into
# tests/fuzz/corpus/TARGET, where every test run tries it from then on.
set -euo pipefail
cd "$(dirname "$0")/.."

seconds=$1
shift
[[ $# -gt 0 ]] || set -- $(ls tests/fuzz/corpus)

target=${CARGO_TARGET_DIR:-target}
# Only our own crates are compiled anew: cargo tells those of a wrapper apart.
RUSTC_WORKSPACE_WRAPPER=$PWD/scripts/fuzz-rustc.sh CARGO_PROFILE_DEV_OPT_LEVEL=1 \
  "${CARGO:-cargo}" build --locked -p pingora-slice-fuzz --features libfuzzer

for name in "$@"; do
  printf '\n== fuzz %s for %s s\n' "$name" "$seconds"
  mkdir -p "$target/fuzz/corpus/$name"
  FUZZ_TARGET=$name "$target/debug/fuzz" -max_total_time="$seconds" -max_len=4096 -timeout=20 \
    -rss_limit_mb=4096 -print_final_stats=1 -artifact_prefix="tests/fuzz/corpus/$name/" \
    "$target/fuzz/corpus/$name" "tests/fuzz/corpus/$name"
done
