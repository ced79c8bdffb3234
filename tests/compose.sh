#!/usr/bin/env bash
# Three nodes and an origin in containers, as docker-compose.yml has them: equal
# bytes through all, a purge through one seen by all, a container killed in the
# middle of a download. Needs no registry; skipped, and said so, where no engine
# answers. Whatever happens, nothing is left behind.
set -euo pipefail
cd "$(dirname "$0")/.."

if ! docker info >/dev/null 2>&1; then
  echo "SKIPPED: the containers (no docker engine answers here)"
  exit 0
fi
if ! docker compose version >/dev/null 2>&1 && ! command -v docker-compose >/dev/null; then
  echo "SKIPPED: the containers (docker answers, compose is not installed)"
  exit 0
fi

work=$(mktemp -d)
export COMPOSE_PROJECT_NAME=pingora-slice-test-$$
export IMAGE=pingora-slice:test-$$
export FILES=$work/files
export PURGE_TOKEN=purge-$RANDOM ADMIN_TOKEN=admin-$RANDOM
export L2_SIZE=512m
# Any free port: asked for below.
export PORT1=0 PORT2=0 PORT3=0 METRICS1=0 METRICS2=0 METRICS3=0
compose() { scripts/compose.sh --file docker-compose.yml "$@"; }

end() {
  local status=$?
  trap - EXIT
  if ((status != 0)); then
    echo "the containers: FAILED; the end of their logs:"
    compose ps || true
    compose logs --no-color --tail=40 || true
  fi
  compose down --volumes --remove-orphans --timeout 3 >/dev/null 2>&1 || true
  docker image rm --force "$IMAGE" >/dev/null 2>&1 || true
  rm -rf "$work"
  exit "$status"
}
trap end EXIT
trap 'exit 130' INT TERM HUP

fail() {
  echo "$*" >&2
  exit 1
}
digest() { sha256sum | cut -d' ' -f1; }
at() { compose port "node$1" "$2"; }
# Waits, at most 60 seconds, until a command succeeds.
until_true() {
  local what=$1 deadline=$((SECONDS + 60))
  shift
  until "$@"; do
    ((SECONDS < deadline)) || fail "in vain: $what"
    sleep 0.2
  done
}

# The binaries are where `make` says, or where cargo puts them.
scripts/image.sh "${BIN:-target/debug}" "$IMAGE"
mkdir "$FILES"
chmod 755 "$work" "$FILES"
head -c 100M /dev/urandom >"$FILES/film.bin"
film=$(digest <"$FILES/film.bin")
compose up --detach --no-build 2>&1 | grep -v -i -E 'pulling|creating|created|started|network|volume' || true

ready() { curl -sf -o /dev/null --max-time 2 "http://$(at "$1" 9090)/ready"; }
for node in 1 2 3; do until_true "node $node is ready" ready $node; done
echo "three nodes are ready"
for node in 1 2 3; do
  # There is no shell in the image.
  docker inspect --format '{{json .Config.Env}}' "$(compose ps -q "node$node")" | grep -q "\"L2_SIZE=$L2_SIZE\"" ||
    fail "node $node was not given L2_SIZE"
done

get() { curl -sf --max-time 60 "http://$(at "$1" 8080)/$2"; }
for node in 1 2 3; do
  [[ $(get $node film.bin | digest) == "$film" ]] || fail "node $node gives other bytes"
done
sent=$(compose logs --no-color origin | awk '/GET \/film.bin/ {sent += $NF} END {printf "%d", sent}')
[[ $sent == $((100 * 1024 * 1024)) ]] || fail "the origin sent $sent bytes of a film of 104857600"
echo "one film through three nodes: equal bytes, each fetched from the origin once"

head -c 5M /dev/urandom >"$FILES/album.bin"
for node in 1 2 3; do get $node album.bin >/dev/null; done
head -c 5M /dev/urandom >"$FILES/album.new"
mv "$FILES/album.new" "$FILES/album.bin"
album=$(digest <"$FILES/album.bin")
[[ $(get 1 album.bin | digest) != "$album" ]] || fail "the album was not cached"
curl -sf --max-time 30 -X PURGE -H "X-Purge-Token: $PURGE_TOKEN" "http://$(at 2 8080)/album.bin"
echo
for node in 1 2 3; do
  [[ $(get $node album.bin | digest) == "$album" ]] || fail "node $node gives old bytes after the purge"
done
echo "a purge through node 2: new bytes at all three"

healthy() { [[ $(docker inspect --format '{{.State.Health.Status}}' "$(compose ps -q node1)") == healthy ]]; }
until_true "the health check of node 1 passes" healthy

# Slow enough to be under way when node 3 dies, fast enough not to wait for.
curl -sf --max-time 60 --limit-rate 40M "http://$(at 1 8080)/film.bin" >"$work/got" &
download=$!
begun() { [[ $(stat -c %s "$work/got" 2>/dev/null || echo 0) -gt 5000000 ]]; }
until_true "the download begins" begun
docker kill "$(compose ps -q node3)" >/dev/null
wait $download || fail "the download broke off"
[[ $(digest <"$work/got") == "$film" ]] || fail "the download was damaged"
[[ $(get 2 film.bin | digest) == "$film" ]] || fail "node 2 gives other bytes"
echo "node 3 killed during a download through node 1: complete, equal bytes"
echo "the containers: passed"
