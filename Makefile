# The only entry points. On a fresh Debian machine, as root: apt-get install --yes make; make demo
PYTHON := .venv/bin/python
# The kernels' lab, or this very machine where it has the driver.
LAB := $(PYTHON) lab/lab.py run $(if $(wildcard /dev/ublk-control),--host,--kernel lts --cpus 2)

.PHONY: help demo test test-full lint bench bench-smoke deb lintian docs dashboard-types docs-pictures image manifests setup clean

help:
	@echo 'make demo   watch fio run through ten killed servers, on a real kernel'
	@echo 'make test   lint, types and all tests, on two real kernels'
	@echo 'make test-full  the same, all of it on both of them, the installations and the container image'
	@echo 'make lint   format, lint and types only'
	@echo 'make deb    a package for Debian, in build/deb'
	@echo 'make docs   manual pages, completions, docs/metrics.md, PrometheusRule, dashboard: all that is made'
	@echo 'make dashboard-types  the dashboard against the types of the newest Grafana; needs npm'
	@echo 'make docs-pictures  docs/dashboard.png, drawn anew; needs npm and chromium'
	@echo 'make image  a container image, an OCI archive in build; as root, with buildah and mmdebstrap'
	@echo 'make manifests  what is for Kubernetes against the schemas of its versions; needs kubectl and npm'
	@echo 'make bench  how fast ublkwatch recovers, beside oracles and what people do; hours, where emulated'
	@echo 'make bench-smoke  the same in short: does it work, and is nothing far out of line?'

demo: setup
	@$(LAB) --timeout 170 -- $(PYTHON) -m ublkwatch.demo

test: setup
	@$(PYTHON) -m tests

test-full: setup lintian deb image build/trixie
	@$(PYTHON) -m tests full

lint: .venv/.ready
	@$(PYTHON) -m tests lint

docs: .venv/.ready
	@$(PYTHON) -m tests.manual
	@$(PYTHON) tests/deployed.py

# 200 kills a series on two kernels, hours where they are emulated: python -m bench --help has less.
bench: setup
	@$(PYTHON) -m bench $(if $(wildcard /dev/ublk-control),--host)

bench-smoke: setup
	@$(PYTHON) -m bench --smoke $(if $(wildcard /dev/ublk-control),--host)

# By Debian's own tools, whatever Python this shell has; from the sdist, so that it is known to be whole.
deb: export PATH := /usr/sbin:/usr/bin:/sbin:/bin
deb:
	@dpkg-checkbuilddeps 2>/dev/null || \
	    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get build-dep --yes -qq ./; }
	@rm -rf build/deb
	@python3 -m hatchling build -t sdist -d build/deb
	@tar -xf build/deb/ublkwatch-*.tar.gz -C build/deb
	@cd build/deb/ublkwatch-*/ && dpkg-buildpackage --build=binary --no-sign
	@rm -r build/deb/ublkwatch-*/
	@if command -v lintian >/dev/null; then lintian --allow-root --fail-on error,warning build/deb/*.changes; fi

# What `make deb` asks where it is: Debian's own judgement.
lintian:
	@command -v lintian >/dev/null || { apt-get update -qq && \
	    DEBIAN_FRONTEND=noninteractive apt-get install --yes -qq --no-install-recommends lintian; }

# Debian 13 with what the tests need there, since its systemd is a newer one: as root.
build/trixie:
	@command -v mmdebstrap >/dev/null || { apt-get update -qq && \
	    DEBIAN_FRONTEND=noninteractive apt-get install --yes -qq --no-install-recommends mmdebstrap; }
	@mkdir -p build && rm -rf $@.new
	@mmdebstrap --quiet --variant=essential --include=systemd-sysv,dbus,kmod,procps \
	    --include=python3-jeepney,python3-prometheus-client,python3-psutil,python3-pyroute2 trixie $@.new
	@mv $@.new $@

# Needs node and npm, which nothing else here does; so no part of the tests.
dashboard-types:
	@mkdir -p build && cp -r tests/types build
	@cd build/types && npm install --silent --no-audit --no-fund --no-package-lock
	@cd build/types && node check.js ../../deploy/grafana/ublkwatch.json

# Needs Debian's chromium as well: the dashboard, drawn by Perses, from a minute of crashes in the lab.
RECORDED := build/pictures/data
docs-pictures: setup
	@mkdir -p build && rm -rf $(RECORDED) && cp -r docs/pictures build
	@$(PYTHON) lab/lab.py run --rw build/pictures -- sh -c '$(PYTHON) -m pytest -q -m long \
	    --basetemp=/tmp/kept tests/kernel/test_prometheus.py && cp -r /tmp/kept/test_a_minute*0/data $(RECORDED)'
	@cd build/pictures && npm install --silent --no-audit --no-fund --no-package-lock
	@cd build/pictures && node draw.js ../../deploy/grafana/ublkwatch.json \
	    "$$(../../$(PYTHON) ../../lab/lab.py prometheus)/prometheus" data ../../docs/dashboard.png

# No image is pulled: the base is made of Debian's packages, or BASE=IMAGE names another one.
image: .venv/.ready
	@sh deploy/container/image.sh

# Needs kubectl, node and npm, and 150 MB of schemas; so no part of the tests.
manifests:
	@for each in kubectl node npm; do \
	    command -v $$each >/dev/null || { echo "manifests: $$each is missing" >&2; exit 1; }; done
	@mkdir -p build && cp -r tests/manifests build
	@cd build/manifests && python3 -m venv venv && venv/bin/pip install --quiet -r requirements.txt
	@cd build/manifests && npm install --silent --no-audit --no-fund --no-package-lock
	@cd build/manifests && venv/bin/python ../../tests/manifests/check.py

# Everything that the above need: Python with its packages, kernels, QEMU, fio, a C compiler.
setup: .venv/.ready
	@$(PYTHON) lab/lab.py setup

.venv/.ready: pyproject.toml
	@sh lab/python.sh
	@touch $@

clean:
	rm -rf .venv build dist
