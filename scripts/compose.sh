#!/usr/bin/env bash
# `docker compose`, whichever of its two forms is installed.
set -euo pipefail
if docker compose version >/dev/null 2>&1; then
  exec docker compose "$@"
fi
exec docker-compose "$@"
