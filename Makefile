# One command per thing a person does. `make` alone says which.
#
#   make demo          an origin and three nodes on this machine, step by step; stays up until Ctrl-C
#   make demo ONCE=1   the same, and ends with 0 or 1 by itself
#   make test          everything CI runs
#   make chaos         harms nodes, disks and network under load for SECONDS=300; SEED=7 replays a schedule,
#                      EDGES=2 adds nodes, READS=10000000 ends it early, RELEASE=1 builds as for production
#   make chaos-peers   counts what nginx and Varnish answer under the same schedule
#   make stalled       CLIENTS=1000 clients stalled in a 4 GiB object, and the memory that they cost
#   make bench         beside nginx, Varnish, Traffic Server and the floors; ROWS=small,ranges PAIRS=3 for less
#   make bench-checks  hits with the purge checks against a build without them
#   make bench-micro   the steps of a hit, one by one
#   make fuzz          looks for inputs that break a parser, SECONDS=300 for each; TARGET=range for one
#   make check         the quick part: format, lints, unit tests
#   make fix           formats and applies what clippy can mend
#   make image         the container image pingora-slice:local, a release build, without any registry; DEBUG=1 for a
#                      debug build, which is made sooner and serves slower
#   make up / down     that image, three nodes, an origin (compose); MONITORING=1 adds Prometheus and Grafana

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test chaos chaos-peers stalled fuzz bench bench-checks bench-micro check fix image up down build fmt clippy unit suite docs deny compose demo-once tools tools-test

CARGO ?= cargo
# Real processes, origins and clients share the cores: more tests at once only wait.
TEST_THREADS ?= 2
BIN := $(or $(CARGO_TARGET_DIR),target)/debug
RELEASE_BIN := $(abspath $(or $(CARGO_TARGET_DIR),target))/release

# A title per step, so that a long log can be read.
say = @printf '\n== %s\n' "$(1)"

help:
	@sed -n '3,/^$$/s/^#  \{0,1\}//p' Makefile

# What the build needs (zlib-ng, inside Pingora, is built with cmake and a C compiler).
tools:
	@scripts/tools.sh cc cmake

# And the clients that the tests download with.
tools-test:
	@scripts/tools.sh cc cmake curl wget aria2c

build: tools
	$(call say,build)
	$(CARGO) build --locked --workspace

demo: build
	$(BIN)/pingora-slice demo $(if $(ONCE),--once)

test: tools-test fmt clippy build unit docs deny compose demo-once
	@printf '\nmake test: everything passed\n'

check: tools fmt clippy
	$(call say,unit tests)
	$(CARGO) test --locked --workspace --lib

fix: tools
	$(CARGO) clippy --locked --workspace --all-targets --fix --allow-dirty --allow-staged
	$(CARGO) fmt --all

fmt:
	$(call say,format)
	$(CARGO) fmt --all --check

clippy:
	$(call say,lints)
	$(CARGO) clippy --locked --workspace --all-targets -- -D warnings

# The suite starts the binaries that `build` made: it comes first.
unit: build
	$(call say,tests)
	$(CARGO) test --locked --workspace -- --test-threads $(TEST_THREADS)

# Only the end-to-end tests; T=purge runs those whose name has it, RELEASE=1 all of
# them against the release build, which is what `make bench` measures.
SUITE = $(CARGO) test --locked -p pingora-slice-tests --test suite -- --test-threads $(TEST_THREADS) $(T)
suite: tools-test build
ifdef RELEASE
	$(CARGO) build --locked --release -p pingora-slice -p pingora-slice-client
	PINGORA_SLICE_BIN_DIR=$(RELEASE_BIN) $(SUITE)
else
	$(SUITE)
endif

SECONDS := 300
CHAOS = CHAOS_DISKS=1 CHAOS_SECONDS=$(SECONDS) $(if $(SEED),CHAOS_SEED=$(SEED)) $(if $(READS),CHAOS_READS=$(READS)) \
	$(if $(EDGES),CHAOS_EDGES=$(EDGES)) $(CARGO) test --locked -p pingora-slice-tests --test suite
chaos: build
	$(call say,chaos)
ifdef RELEASE
	$(CARGO) build --locked --release -p pingora-slice -p pingora-slice-client
	PINGORA_SLICE_BIN_DIR=$(RELEASE_BIN) $(CHAOS) no_read_is_older -- --nocapture
else
	$(CHAOS) no_read_is_older -- --nocapture
endif

chaos-peers:
	$(call say,chaos with other caches)
	$(CHAOS) other_caches -- --ignored --nocapture

CLIENTS := 1000
stalled: build
	$(call say,stalled clients)
	STALLED_CLIENTS=$(CLIENTS) $(CARGO) test --locked -p pingora-slice-tests --test suite stalled_clients -- --nocapture

# What is measured is the release build; wrk, nginx, varnish and trafficserver
# must be there (it says so where they are not). Rows, and what they measure:
# docs/PERFORMANCE.md.
ROWS ?=
PAIRS ?= 5
TURN_SECONDS ?= 2
BENCH_TOOLS := wrk nginx varnishd traffic_server
bench:
	@export PATH="$$PATH:/usr/sbin:/usr/local/sbin"; for tool in cc cmake $(BENCH_TOOLS); do \
	  command -v $$tool >/dev/null || { echo "$$tool is missing; on Debian: apt-get install --no-install-recommends \
	build-essential cmake wrk nginx varnish trafficserver trafficserver-experimental-plugins" >&2; exit 1; }; done
	$(call say,release build)
	$(CARGO) build --locked --release -p pingora-slice -p pingora-slice-client
	$(call say,bench)
	PINGORA_SLICE_BIN_DIR=$(RELEASE_BIN) $(CARGO) bench --locked --profile dev -p pingora-slice-tests --bench compare -- \
		--rows '$(ROWS)' --pairs $(PAIRS) --seconds $(TURN_SECONDS) --out $(abspath target/bench)

# Hits with the purge checks against a build without them, which serves what
# was purged and is for this alone.
bench-checks:
	$(call say,release build without the checks)
	$(CARGO) build --locked --release -p pingora-slice --features unchecked
	cp $(RELEASE_BIN)/pingora-slice $(abspath target/pingora-slice-unchecked)
	PINGORA_SLICE_UNCHECKED=$(abspath target/pingora-slice-unchecked) $(MAKE) bench ROWS=purge-checks

bench-micro:
	$(CARGO) bench --locked -p pingora-slice-tests --bench micro

fuzz: tools
	@scripts/tools.sh c++
	@CARGO="$(CARGO)" scripts/fuzz.sh $(SECONDS) $(TARGET)

docs:
	$(call say,docs)
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --locked --workspace --no-deps

deny:
	$(call say,dependencies)
	@scripts/deny.sh

compose: build
	$(call say,containers)
	@BIN=$(BIN) tests/compose.sh

demo-once: build
	$(call say,demo)
	$(BIN)/pingora-slice demo --once

# What `make test` does with containers (tests/compose.sh) has an image of its own, of the debug build.
ifdef DEBUG
image: build
	scripts/image.sh $(BIN)
else
image: tools
	$(call say,release build)
	$(CARGO) build --locked --release -p pingora-slice -p pingora-slice-client
	scripts/image.sh $(RELEASE_BIN)
endif

COMPOSE := scripts/compose.sh

up: image
	$(COMPOSE) $(if $(MONITORING),--profile monitoring) up -d

down:
	$(COMPOSE) --profile monitoring down --volumes
