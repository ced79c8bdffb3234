#!/usr/bin/env bash
# RUSTC_WORKSPACE_WRAPPER of `make fuzz`: compiles our own crates so that
# libFuzzer sees which code an input reaches. Works on a stable compiler.
set -euo pipefail
exec "$@" -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
  -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
  -Cllvm-args=-sanitizer-coverage-trace-compares
