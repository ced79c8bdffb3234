#!/usr/bin/env bash
# Licences, duplicates and sources of all dependencies; known vulnerabilities
# where the advisory database can be fetched, else says that it was skipped.
set -euo pipefail

if ! cargo deny --version >/dev/null 2>&1; then
  echo "installing cargo-deny (a debug build: it runs for seconds)"
  cargo install --locked --debug --quiet cargo-deny
fi
cargo deny --locked check --hide-inclusion-graph bans licenses sources

if timeout 120 cargo deny --locked fetch db </dev/null >/dev/null 2>&1; then
  cargo deny --locked check --disable-fetch advisories
else
  echo "SKIPPED: advisories (their database cannot be fetched from here)"
fi
