# Everything a newcomer or CI runs. `make` alone lists it.
# PYTHON=<a Python 3.11 or 3.12>, TEACHER=<a Hugging Face folder>, MODEL=<a published name>, DEVICE=<cpu or cuda> and
# ARGS=<options for pytest> are taken from the command line.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup quickstart serve test soak check format dashboards manifests references docs docs-serve \
	lock audit release images env up down logs clean

BIN := .venv/bin
INSTALL_DOCS := $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-deps --require-hashes \
	--only-binary=:all: -r requirements/docs.txt

# Any Python from 3.8 on can run the scripts. One is tried before it is used: pyenv leaves commands that only fail.
define run_python
for python in python3 python3.12 python3.11; do \
	if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 8))' 2>/dev/null; then exec "$$python" $(1); fi; \
done; \
echo "No Python 3 runs here. On Debian or Ubuntu: sudo apt install git make python3 python3-venv libnuma1" >&2; \
exit 1
endef

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

setup:  ## Make .venv from the pinned versions (PYTHON=... picks the Python); quick when nothing changed
	@$(call run_python,scripts/setup.py $(if $(PYTHON),--python "$(PYTHON)"))

quickstart: setup  ## Teacher, distillation, evaluation, registry, endpoint, report (TEACHER=folder takes yours)
	@$(BIN)/python examples/quickstart/run.py $(if $(TEACHER),--teacher "$(TEACHER)")

serve: setup  ## Serve a published model until Ctrl-C (MODEL=name, the quickstart's otherwise)
	@$(BIN)/swiftkv serve $(or $(MODEL),quickstart)

test: setup  ## Every test that a CPU machine runs (ARGS=... goes to pytest)
	@$(BIN)/python -m pytest $(ARGS)

soak: setup  ## The long forms of the tests
	@$(BIN)/python -m pytest -m "soak and not gpu" $(ARGS)

check: setup  ## Formatting, lint and strict types
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

format: setup  ## Rewrite the sources in the one format
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

dashboards: setup  ## Write Grafana's and Prometheus' files again from dashboards/*.py
	@$(BIN)/python dashboards/write.py

manifests: setup  ## Write the Kubernetes manifests that repeat other files again, and check all of them
	@$(BIN)/python deployments/kubernetes/write.py
	@$(BIN)/python tests/manifests.py

references: setup  ## Write the generated pages of docs/ again, from the code that they describe
	@$(BIN)/python scripts/pages/write.py

docs: setup  ## Build the documentation into site/ (adds requirements/docs.txt to .venv first)
	@$(BIN)/python scripts/pages/write.py --check
	@$(INSTALL_DOCS)
	@$(BIN)/mkdocs build --strict --quiet

docs-serve: references  ## Show the documentation while it is written, on http://127.0.0.1:8001
	@$(INSTALL_DOCS)
	@$(BIN)/mkdocs serve --dev-addr 127.0.0.1:8001

lock:  ## Resolve requirements/*.txt again from pyproject.toml (UPGRADE=1 takes the newest versions)
	@$(call run_python,scripts/lock.py $(if $(UPGRADE),--upgrade))

audit:  ## Look for known vulnerabilities in what the locks name (asks the network)
	@$(call run_python,scripts/audit.py)

release: setup  ## Build the package and try it in an empty environment (TAG=1 tags it and fills dist/)
	@$(BIN)/python scripts/release.py $(if $(TAG),--tag)

images:  ## Build the train and serve images for DEVICE (cpu unless named); without docker as root, with Debian's buildah
	@if command -v docker >/dev/null; then docker/build.sh $(or $(DEVICE),cpu); \
	else docker/build_without_docker.sh $(or $(DEVICE),cpu); fi

env:  ## Write what is missing of docker/.env, of the stack's secrets and of its first API key
	@$(call run_python,docker/prepare.py)

up:  ## Check docker/.env, start the stack (Docker Compose) and wait until the endpoint answers
	@docker/up.sh

down:  ## Stop the stack; models and series stay (VOLUMES=1 removes them)
	@docker compose --file docker/compose.yaml down $(if $(VOLUMES),--volumes)

logs:  ## Follow what the stack's containers say (SERVICE=name: one of them)
	@docker compose --file docker/compose.yaml logs --follow --tail 100 $(SERVICE)

clean:  ## Stop what was started here and remove everything that was made here
	@if [ -x $(BIN)/swiftkv ]; then $(BIN)/swiftkv down; fi
	@rm -rf .venv .swiftkv runs build dist site .pytest_cache .mypy_cache .ruff_cache
	@find . -name .git -prune -o \( -name __pycache__ -o -name '*.egg-info' \) -type d -prune -exec rm -rf {} +
