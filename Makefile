# make help lists the targets; each makes the environments that it needs.
#   PYTHON       the interpreter they are made with, 3.10 or later
#   TORCH        what to install as torch, for instance "torch==2.13.0 --index-url URL" for another build of it
#   CONSTRAINTS  the pinned versions of .venv
#   JOBS         test files that run side by side
PYTHON ?= python3
TORCH ?= torch==2.13.0
CONSTRAINTS ?= $(shell $(PYTHON) -c 'import sys; print("constraints.txt" if sys.version_info >= (3, 11) else "constraints-4.51.txt")')

JOBS ?= 2

SHELL := /bin/bash

VENV := .venv
BRIDGE := .venv-4.51
NEWEST := .newest
TEST_EXTRAS := demo,test,docs
# Files stay whole: what a file's tests share is made once. They start in the order of tests/conftest.py.
PYTEST := python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder
# What the targets test-* run
FAST := lightning_rlhf $(addprefix tests/,cleaning data endpoint evaluation functional metrics models report rewards rollout utils)
# What transformers' versions change, and processes, which Python's change.
OLDEST := $(addprefix tests/,models rollout strategies rewards/test_model.py rewards/test_same_tokens.py \
    rewards/test_weighted.py rewards/test_workers.py rewards/verifiers/test_code.py \
    data/test_base.py data/test_bundled.py data/test_fuzz.py data/test_instruction.py data/test_modules.py \
    data/test_oasst.py data/test_preference.py data/test_prompts.py data/test_sources.py data/test_templates.py \
    data/test_tokens.py data/test_unpaired.py)
LATEST := $(addprefix tests/,models/test_policy.py models/test_backbone.py models/test_loading.py \
    models/test_saving.py rollout/test_engine.py stages/test_new_tokens.py)
ON_GPU := $(addprefix tests/,models/test_policy.py models/test_flex.py models/test_varlen.py rl/test_actors.py)
# One thread each: spinning threads on shared cores cost far more than they give. No test asks the model hub.
TEST_ENV := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE TOKENIZERS_PARALLELISM=false

# ColossalAI without its own pins of torch and transformers, and the few packages that it really needs: docs/strategies.md.
COLOSSALAI := colossalai==0.5.0
COLOSSALAI_NEEDS := einops galore_torch psutil click rich contexttimer pydantic ninja

# GPTQ likewise, where auto-round runs (Python 3.11 and later) and transformers is 5: docs/install.md. datatrove wants
# transformers 5 too; of the extra scale Ray is left out, whose test is run by hand: pip install ray.
ifeq ($(CONSTRAINTS),constraints.txt)
SCALE := datatrove orjson
GPTQ := gptqmodel==7.7.0 optimum==2.3.0 auto-round==0.16.1
GPTQ_NEEDS := device-smi tokenicer pypcre logbar threadpoolctl defuser py-cpuinfo
# Tests compare losses with TRL's own, of the version that setup.cfg names for benchmarks; it needs Python 3.11 too.
TRL := $(shell grep -m1 -oE 'trl==[0-9.]+' setup.cfg)
endif

# $(call timed,NAME,COMMAND): says what starts and how long it took; fails where it fails, so join commands by &&.
timed = @echo "== $(1)"; SECONDS=0; $(2) && echo "== $(1): $$SECONDS s"

# $(call install,ENVIRONMENT,CONSTRAINTS,PIP ARGUMENTS): torch first, alone, since it decides which build is taken.
define install
@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("Python 3.10 or later is needed: make PYTHON=python3.12 ...")'
$(call timed,$(1): torch,$(PYTHON) -m venv $(1) && $(1)/bin/python -m pip install $(TORCH))
$(call timed,$(1): the package,$(1)/bin/python -m pip install -c $(2) $(3))
@touch $@
endef

.PHONY: help
help: ## list the targets
	@echo "Times are those of 2 idle cores, without making environments (a few minutes, the first time)."
	@grep -hE '^[^ :]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

.PHONY: .venv
.venv: $(VENV)/.demo-installed ## the environment for using the package

.PHONY: install
install: $(VENV)/.test-installed ## the environment for working on it

$(VENV)/.demo-installed: setup.cfg pyproject.toml $(CONSTRAINTS)
	$(call install,$(VENV),$(CONSTRAINTS),-e '.[demo]')

$(VENV)/.test-installed: $(VENV)/.demo-installed
	$(call timed,$(VENV): what tests need,$(VENV)/bin/python -m pip install --quiet -c $(CONSTRAINTS) -e '.[$(TEST_EXTRAS)]' $(COLOSSALAI_NEEDS) $(GPTQ_NEEDS) $(SCALE))
	$(call timed,$(VENV): packages without their pins,$(VENV)/bin/python -m pip install --quiet --no-deps $(COLOSSALAI) $(GPTQ) $(TRL))
	@touch $@

$(BRIDGE)/.test-installed: setup.cfg pyproject.toml constraints-4.51.txt
	$(call install,$(BRIDGE),constraints-4.51.txt,--quiet -e '.[verify]' transformers==4.51.3 pytest pytest-timeout pytest-xdist hypothesis bitsandbytes $(COLOSSALAI_NEEDS))
	$(call timed,$(BRIDGE): ColossalAI,$(BRIDGE)/bin/python -m pip install --quiet --no-deps $(COLOSSALAI))

# The newest transformers that setup.cfg allows, with what it asks for, in a folder that goes before $(VENV)'s own.
$(NEWEST)/.test-installed: $(VENV)/.test-installed
	@rm -rf $(NEWEST)
	$(call timed,$(NEWEST): transformers,$(VENV)/bin/python -m pip install --quiet --no-warn-conflicts --upgrade --target $(NEWEST) "$$(grep -m1 -oE 'transformers[>=].*' setup.cfg)")
	@touch $@

.PHONY: demo
demo: .venv ## fetch SmolLM2-135M-Instruct; SFT, DPO, reward model and PPO on the bundled data: 15 minutes
	@$(VENV)/bin/lightning-rlhf demo

.PHONY: lint
lint: $(VENV)/.test-installed ## ruff, codespell and mypy: 1 minute
	$(call timed,ruff,$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .)
	$(call timed,codespell,git ls-files -z | xargs -0 $(VENV)/bin/codespell)
	$(call timed,imports between packages,$(VENV)/bin/lint-imports --no-cache)
	$(call timed,mypy,$(VENV)/bin/mypy lightning_rlhf)

# The tests of the chat page need a browser, and are skipped without one. Playwright's own would be a large download.
.PHONY: browser
browser: ## Debian's Chromium for the tests of the chat page, where apt-get can install it
	@command -v chromium || command -v chromium-browser || command -v google-chrome || \
	    { [ "$$(id -u)" = 0 ] && apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; } || \
	    echo "No Chromium was found or installed: the tests of the chat page will be skipped."

# Not --quiet: --strict then misses warnings.
.PHONY: docs
docs: $(VENV)/.test-installed ## the documentation site, to site/; a warning is an error: 1 minute
	$(call timed,docs,NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict)

.PHONY: test-fast
test-fast: $(VENV)/.test-installed ## unit tests that start no processes: under 3 minutes
	$(call timed,fast tests,$(TEST_ENV) $(VENV)/bin/$(PYTEST) -q $(FAST) -m 'not slow and not distributed')

.PHONY: test-main
test-main: $(VENV)/.test-installed ## tests with the pinned versions: 25 minutes
	$(call timed,tests,$(TEST_ENV) $(VENV)/bin/$(PYTEST) -m 'not exhaustive' --durations=25)

.PHONY: test-all
test-all: $(VENV)/.test-installed ## those, and what varies them further: 45 minutes
	$(call timed,tests,$(TEST_ENV) $(VENV)/bin/$(PYTEST) --durations=25)

.PHONY: test-oldest
test-oldest: $(BRIDGE)/.test-installed ## tests of models, rollouts and tokens with the oldest versions: 4 minutes
	$(call timed,tests with the oldest versions,$(TEST_ENV) $(BRIDGE)/bin/$(PYTEST) $(OLDEST) -m 'not slow and not exhaustive')

.PHONY: test-newest
test-newest: $(NEWEST)/.test-installed ## tests of models and loading with the newest transformers: 1 minute
	$(call timed,tests with the newest transformers,$(TEST_ENV) PYTHONPATH=$(NEWEST) $(VENV)/bin/$(PYTEST) $(LATEST))

# What takes one core goes side by side first; make prints a line's output when the line is done.
.PHONY: test
test: $(VENV)/.test-installed ## all that CI runs: 30 minutes
	@$(MAKE) --no-print-directory --jobs=$(JOBS) --output-sync=line \
	    lint docs browser $(BRIDGE)/.test-installed $(NEWEST)/.test-installed
	@$(MAKE) --no-print-directory test-main test-oldest test-newest

.PHONY: test-gpu
test-gpu: $(VENV)/.test-installed ## on a machine with a card: tests that use one, and its benchmarks
	$(call timed,tests on a GPU,$(TEST_ENV) $(VENV)/bin/python -m pytest $(ON_GPU))
	$(call timed,benchmarks on a GPU,$(VENV)/bin/python benchmarks/gpu.py)

.PHONY: coverage
coverage: $(VENV)/.test-installed ## every test, and the lines that none runs: an hour
	$(call timed,tests,$(TEST_ENV) $(VENV)/bin/$(PYTEST) --cov --cov-report=term:skip-covered --cov-report=xml)

.PHONY: wheel
wheel: ## the package to install elsewhere, to dist/: seconds
	rm -rf build
	$(call timed,wheel,$(PYTHON) -m pip wheel --quiet --no-deps --wheel-dir dist .)

# With npm. What it writes is committed: neither users nor CI need npm.
.PHONY: web
web: ## the libraries of the chat page, from npm packages, to lightning_rlhf/serving/static/vendor/
	$(call timed,web,cd web && npm ci --ignore-scripts && npm run build)

.PHONY: clean
clean: ## remove the environments, caches and build output
	rm -rf $(VENV) $(BRIDGE) $(NEWEST) build dist site web/node_modules *.egg-info .coverage coverage.xml .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
