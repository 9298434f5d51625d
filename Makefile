# Every target does its own set-up; nothing but Python >= 3.11 (and apt) is needed beforehand.
.DEFAULT_GOAL := help
SHELL := /bin/sh
PYTHON ?= python3
UV := .venv-tools/bin/uv
export UV_PYTHON := $(PYTHON)
export UV_PYTHON_DOWNLOADS := never
export MODELFS_MINISTACK := $(CURDIR)/.venv-ministack/bin/ministack
BUILD_PACKAGES := python3-venv python3-dev gcc libc6-dev pkg-config libfuse3-dev fuse3
TEST_PACKAGES := radosgw ceph-osd ceph-mon ceph-common util-linux procps openssl nginx-light

.PHONY: help setup servers demo test nightly soak check format bench bench-ttft bench-replay bench-ceiling bench-places test-engines test-places clean

help: ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /	/' | expand -t 16

$(UV):
	@.ci/system-packages $(BUILD_PACKAGES)
	@$(PYTHON) -m venv .venv-tools
	@.venv-tools/bin/python -m pip install --quiet --disable-pip-version-check uv

.venv/.ready: pyproject.toml uv.lock | $(UV)
	@.ci/system-packages $(BUILD_PACKAGES)
	@$(UV) sync --quiet --locked --compile-bytecode
	@.venv/bin/python -m compileall -q modelfs
	@touch $@

.venv-ministack/.ready: tests/ministack.txt | $(UV)
	@$(UV) venv --quiet --clear .venv-ministack
	@$(UV) pip install --quiet --python .venv-ministack/bin/python -r tests/ministack.txt
	@touch $@

setup: .venv/.ready ## make .venv with modelfs and its tools

servers: .venv-ministack/.ready # object stores for tests and benchmarks
	@.ci/system-packages $(TEST_PACKAGES)

demo: .venv/.ready .venv-ministack/.ready ## mount a model from an embedded object store and time it
	@.venv/bin/modelfs demo

test: .venv/.ready servers ## run the tests (real mounts, real S3 servers on loopback)
	@.venv/bin/pytest -m "not engines and not nightly and not places"

nightly: .venv/.ready servers ## the tests that take minutes: 200 kills under load, the watchdog
	@.venv/bin/pytest -m nightly -s

soak: .venv/.ready servers ## 200 readers, 1000 open files, 100 000 keys: what must stay flat; SOAK="--minutes 60"
	@.venv/bin/python -m tests.support.soak $(SOAK)

check: .venv/.ready ## formatting, lint, types, layers
	@.venv/bin/ruff format --check --quiet .
	@.venv/bin/ruff check --quiet .
	@.venv/bin/mypy
	@.venv/bin/lint-imports --no-cache

format: .venv/.ready ## format and mend what ruff can mend
	@.venv/bin/ruff format --quiet .
	@.venv/bin/ruff check --quiet --fix .

.venv-peers/.ready: bench/peers.txt
	@test -x .venv-peers/bin/python || $(PYTHON) -m venv .venv-peers
	@.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check -r bench/peers.txt
	@touch $@

bench-ttft: .venv/.ready servers .venv-peers/.ready .venv-engines/.ready ## time to first token beside every peer; TTFT="--engines ... --shapes ..."
	@.ci/system-packages s3fs fuse3 gcc libc6-dev
	@.venv/bin/python -m bench.ttft $(TTFT)

bench-replay: .venv/.ready servers ## an engine with an order of its own, without and with a trace
	@.ci/system-packages gcc libc6-dev
	@.venv/bin/python -m bench.replay

bench-ceiling: .venv/.ready ## the rate at which one process ends, by pretence
	@.venv/bin/python -m bench.ceiling

bench: .venv/.ready servers .venv-peers/.ready ## reads of every kind beside rclone, s3fs, s5cmd and the local disk; MICRO="--shapes ... --only ..."
	@.ci/system-packages s3fs fuse3 fio gcc libc6-dev
	@.venv/bin/python -m bench.micro $(MICRO)

.venv-engines/.ready: tests/engines/requirements.txt
	@.ci/system-packages python3-venv python3-dev gcc g++ cmake libc6-dev libnuma1
	@test -x .venv-engines/bin/python || $(PYTHON) -m venv .venv-engines
	@.venv-engines/bin/python -m pip install --quiet --disable-pip-version-check -r tests/engines/requirements.txt
	@.venv-engines/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

.venv-azurite/.ready:
	@command -v npm >/dev/null || .ci/system-packages nodejs npm
	@npm install --silent --no-fund --no-audit --prefix .venv-azurite azurite@3.37.0
	@touch $@

test-places: .venv/.ready servers .venv-azurite/.ready ## the tests of places whose emulator is heavy to install: Azure
	@MODELFS_AZURITE=$(CURDIR)/.venv-azurite/node_modules/.bin/azurite-blob .venv/bin/pytest -m places

bench-places: .venv/.ready servers .venv-peers/.ready .venv-azurite/.ready ## every place: what it can do, and its speed beside its own tool
	@.ci/system-packages swift-proxy swift-account swift-container swift-object memcached curl
	@MODELFS_AZURITE=$(CURDIR)/.venv-azurite/node_modules/.bin/azurite-blob .venv/bin/python -m bench.places $(PLACES)

test-engines: .venv/.ready servers .venv-engines/.ready ## real engines read from the mount (heavy: gigabytes to install)
	@MODELFS_ENGINE_PYTHON=$(CURDIR)/.venv-engines/bin/python .venv/bin/pytest -m engines -s tests/engines

clean: ## remove everything the other targets made
	rm -rf .venv .venv-tools .venv-ministack .venv-engines .venv-peers .venv-azurite .mypy_cache .ruff_cache .pytest_cache .hypothesis bench/results
