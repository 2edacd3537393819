# make demo    three hosts on this machine, step by step, each step checked
# make test    every test tier this machine can run; says which it could not
# make build   bin/weft     make soak    the long "must hold" runs
# make bench   benchmarks   make clean   removes bin/
# Assumed: Debian, git, make and Go. demo and test install what else they need.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := build

# The first five leave parts of containerd out that weft does not use.
TAGS    := no_cri no_btrfs no_devmapper no_zfs no_tracing
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
LDFLAGS := -s -w -X github.com/weftnet/weft.Version=$(VERSION)
SUDO    := $(shell [ "$$(id -u)" = 0 ] || echo sudo)

export GOFLAGS ?= -trimpath

.PHONY: build
build:
	CGO_ENABLED=0 go build -tags '$(TAGS)' -ldflags '$(LDFLAGS)' -o bin/weft ./cmd/weft

.PHONY: demo
demo:
	@lab/vm/need.sh runc
	@$(MAKE) --no-print-directory build
	$(SUDO) bin/weft lab demo

.PHONY: test
test:
	@TAGS='$(TAGS)' lab/vm/tiers.sh

ENGINES ?= ebpf bridge
# The tests of gossip that have a long form: 10 minutes in real time, the rest in virtual.
LONG    := ^(TestDeadNodeOnSockets|TestWatchStalls|TestWatchDead|TestJoinAtOnce)$$
.PHONY: soak soak-gossip
soak-gossip:
	@mkdir -p bin gossip/results
	set -- "$$(git describe --always --dirty), $$(uname -sr), $$(nproc) cores, $$(date -u +%F)"; \
	go test -count=1 -timeout 6h -v -run '$(LONG)' ./gossip -args -long 2>&1 | tee bin/gossip-long.log || bad=1; \
	{ echo "$$1"; grep -E '^ *(---|[a-z_]+_test\.go)|^(ok|FAIL)' bin/gossip-long.log; } >gossip/results/long.txt; [ -z "$${bad:-}" ]

soak: build soak-gossip
	for e in $(ENGINES); do \
		$(SUDO) env WEFT_SOAK=1 WEFT_TEST_OVERLAY=$$e PATH="$$PATH" go test -count=1 -timeout 6h -v -tags '$(TAGS) lab' -run Soak ./lab/...; \
	done
	@lab/vm/need.sh runc qemu busybox kernel
	env WEFT_SOAK=1 PATH="$(CURDIR)/bin/cache/busybox/bin:$(CURDIR)/bin/cache/busybox/usr/bin:$$PATH" go test -count=1 -timeout 6h -v -tags '$(TAGS) vm' -run Soak ./lab/vm

.PHONY: bench
bench: build
	go run -tags '$(TAGS)' ./bench list

.PHONY: clean
clean:
	rm -rf bin
