# `make test` and `make demo` are all that is needed on a fresh Debian machine with Go, as
# root: what else they need they install. docs/TESTING.md says what each target does.

SHELL        := /bin/bash
.SHELLFLAGS  := -euo pipefail -c
.DEFAULT_GOAL := build

VERSION      := $(shell scripts/version.sh)
GOLANGCI     := v2.15.0
LDFLAGS      := -X main.version=$(VERSION)

# Unit packages: no Docker with -short. ./tests/... are several processes and an engine.
UNIT         := ./cmd/... ./internal/... ./packaging/... ./userdata/...
TESTTIMEOUT  ?= 20m
ARGS         ?=

PREFIX       ?= /usr/local
DESTDIR      ?=
SYSCONFDIR   ?= /etc
UNITDIR      ?= $(SYSCONFDIR)/systemd/system
TMPFILESDIR  ?= $(SYSCONFDIR)/tmpfiles.d
EXAMPLE      := internal/config/example.yaml
DIST         := dbsupervisor-$(VERSION)-linux-$(shell go env GOARCH)

.PHONY: build test test-short test-nfs test-kernel unit integration vet lint model demo soak bench bench-sync bench-sync-full \
	install install-files uninstall dist clean tools docker image

build: build/dbsupervisor

# Go knows best whether anything changed, so it is asked every time.
.PHONY: build/dbsupervisor
build/dbsupervisor:
	@mkdir -p build
	@if [ -e cmd/dbsupervisor/main.go ]; then \
		CGO_ENABLED=0 go build -trimpath -ldflags '$(LDFLAGS)' -o $@ ./cmd/dbsupervisor; fi

tools:
	@scripts/ensure-tools.sh race model image integration

docker: tools
	@scripts/ensure-docker.sh

image: docker
	@packaging/images/ensure.sh

vet:
	go vet ./...

lint:
	@scripts/lint.sh $(GOLANGCI)

model:
	@scripts/ensure-tools.sh model
	@if [ -x tests/model/run.sh ]; then tests/model/run.sh $(ARGS); else echo 'no model yet'; fi

# Everything. The cheap parts first, so that a typo is not found after ten minutes; the
# tests last, so that the last lines say what passed.
test: image build
	@LINT=auto scripts/lint.sh $(GOLANGCI)
	go vet ./...
	@$(MAKE) --no-print-directory model
	@$(MAKE) --no-print-directory unit
	@$(MAKE) --no-print-directory integration

unit: image
	go test -race -timeout $(TESTTIMEOUT) $(ARGS) $(UNIT)

# -p 1: the packages share one engine, one kernel firewall and two processors.
integration: image build
	@if [ -n "$$(go list ./tests/... 2>/dev/null)" ]; then \
		echo "go test -p 1 ./tests/..."; \
		go test -count=1 -p 1 -timeout $(TESTTIMEOUT) $(ARGS) ./tests/...; fi

# Without Docker (also where one runs), without root.
test-short:
	@scripts/ensure-tools.sh race
	go vet ./...
	DOCKER_HOST=unix:///nonexistent go test -race -short -timeout 5m $(ARGS) $(UNIT)

# Over a real NFSv4.1 server, with its clients in emulated machines.
test-nfs:
	@scripts/ensure-tools.sh qemu nfs
	@scripts/fetch-kernel.sh >/dev/null
	DBSUPERVISOR_QEMU=1 go test -count=1 -v -timeout $(TESTTIMEOUT) $(ARGS) ./tests/nfs

# On another kernel, in an emulated machine.
test-kernel:
	@scripts/ensure-tools.sh qemu
	@scripts/fetch-kernel.sh >/dev/null
	DBSUPERVISOR_QEMU=1 go test -count=1 -p 1 -v -timeout $(TESTTIMEOUT) $(ARGS) ./tests/qemu ./tests/kernel

# The tests that take minutes each: a million files, a process killed at every operation,
# more random trees.
.PHONY: test-long
test-long: image build
	@scripts/ensure-tools.sh proxy
	TEST_LONG=1 go test -count=1 -timeout 2h $(ARGS) ./internal/sync/... ./tests/proxy
	TEST_LONG=1 go test -count=1 -timeout 30m -run TestSlowReader ./tests/faults

demo: image build
	@KEEP=$(KEEP) STOP=$(STOP) scripts/demo.sh

soak: image build
	@scripts/soak.sh

# The tracking programs, for whoever changes them: needs clang. The object is committed.
.PHONY: bpf
bpf:
	@scripts/ensure-tools.sh bpf
	internal/track/bpf/build.sh

bench: image build
	@scripts/ensure-tools.sh proxy
	@scripts/bench.sh $(ARGS)

# The proxy beside haproxy, and switchovers behind it.
.PHONY: bench-proxy
bench-proxy: image build
	@scripts/ensure-tools.sh proxy
	@scripts/bench.sh -only proxy -volume 512 $(ARGS)

# Quick: 3 GiB. Full: also growth from 3 to 30 GiB, which needs 90 GiB of disk.
bench-sync: image build
	@scripts/bench-sync.sh $(ARGS)

bench-sync-full: image build
	@scripts/bench-sync.sh -full $(ARGS)

install: build install-files
	install -D -m 0755 build/dbsupervisor $(DESTDIR)$(PREFIX)/bin/dbsupervisor
	if [ -z '$(DESTDIR)' ] && [ -d /run/systemd/system ]; then \
		systemd-tmpfiles --create dbsupervisor.conf && systemctl daemon-reload; fi

# All but the program.
install-files:
	install -d -m 0755 $(DESTDIR)$(UNITDIR) $(DESTDIR)$(TMPFILESDIR) $(DESTDIR)$(SYSCONFDIR)/dbsupervisor
	for u in packaging/systemd/*.service packaging/systemd/*.slice; do \
		sed 's|@BINDIR@|$(PREFIX)/bin|g; s|@SYSCONFDIR@|$(SYSCONFDIR)|g' $$u \
			>$(DESTDIR)$(UNITDIR)/$$(basename $$u); done
	install -m 0644 packaging/systemd/dbsupervisor.tmpfiles $(DESTDIR)$(TMPFILESDIR)/dbsupervisor.conf
	install -m 0644 $(EXAMPLE) $(DESTDIR)$(SYSCONFDIR)/dbsupervisor/example.yaml.txt

# What userdata/bootstrap.sh installs from.
dist: build
	rm -rf build/dist && mkdir -p build/dist/$(DIST)/systemd
	install -m 0755 build/dbsupervisor userdata/bootstrap.sh build/dist/$(DIST)/
	install -m 0644 $(EXAMPLE) build/dist/$(DIST)/
	install -m 0644 packaging/systemd/* build/dist/$(DIST)/systemd/
	tar -C build/dist --owner=0 --group=0 --sort=name -czf build/$(DIST).tar.gz $(DIST)
	cd build && sha256sum $(DIST).tar.gz | tee $(DIST).tar.gz.sha256

uninstall:
	rm -f $(DESTDIR)$(PREFIX)/bin/dbsupervisor $(DESTDIR)$(TMPFILESDIR)/dbsupervisor.conf
	for u in packaging/systemd/*.service packaging/systemd/*.slice; do \
		rm -f $(DESTDIR)$(UNITDIR)/$$(basename $$u); done

clean:
	rm -rf build
