# `make demo` and `make test` do all set-up on a machine with Python 3.11+ and make; uv is used where it is present
VENV   ?= .venv#   another one: make test VENV=.venv313 PYTHON=python3.13
PYTHON ?=#         the interpreter of a new VENV; by default the first that is new enough
FLAGS  ?=#         tests that are left out unless named: slow cuda
ARGS   ?=#         arguments of the command that demo, lab, bench and gpu run
PART   ?=#         parts that gpu measures: tests steps scores macro nb201

BIN   := $(VENV)/bin
READY := $(VENV)/.ready
# tests/browser runs the quickstart where there is a browser: once is enough
BROWSER := $(wildcard $(foreach b,chromium chromium-browser google-chrome,$(addsuffix /$b,$(subst :, ,$(PATH)))))
LOG   := $(VENV)/notebooks.log
# what notebooks and tests expect are a CPU's numbers
TEST  := OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=

# a PYTHON that is asked for is never passed over for the one that VENV has
version = $(shell $(1) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
ifneq (,$(and $(PYTHON),$(wildcard $(BIN)/python)))
ifneq ($(call version,$(PYTHON)),$(call version,$(BIN)/python))
$(error $(VENV) has another Python than $(PYTHON): remove it or name another one, VENV=.venv2)
endif
endif

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /make \1	/p' Makefile

demo: $(READY) ## train, rank, search and retrain on digits, and write runs/demo/report.html
	@$(BIN)/kshot demo $(ARGS)

test: $(READY) ## tests: the notebooks, then tests/; FLAGS="slow cuda" adds the slow ones and those of a GPU
	@$(TEST) PYTHONUNBUFFERED=1 $(BIN)/nbdev_test --do_print --timing --flags "$(FLAGS)" $(if $(BROWSER),--skip_file_re '^([_.]|quickstart)') 2>&1 | tee $(LOG)
	@$(if $(findstring cuda,$(FLAGS)),OMP_NUM_THREADS=1,$(TEST)) NOTEBOOKS_LOG=$(LOG) $(BIN)/python -m pytest tests -n auto --dist loadfile --no-loadscope-reorder --flags "$(FLAGS)"

lab: $(READY) ## JupyterLab on the quickstart
	@$(BIN)/jupyter lab --ServerApp.root_dir=nbs --LabApp.default_url=/lab/tree/tutorials/quickstart.ipynb $(ARGS)

bench: $(READY) ## what K supernets cost beside one
	@$(BIN)/kshot bench $(ARGS)

gpu: $(READY) ## check and measure what needs a GPU, into results/gpu; PART="steps scores" for some of it
	@$(BIN)/python -W ignore tools/gpu.py $(PART) $(ARGS)

readme: $(READY) ## README.md from nbs/index.ipynb
	@$(BIN)/python tools/readme.py

docs: readme ## the site in _docs (needs Quarto)
	@command -v quarto >/dev/null || { echo 'make docs needs Quarto: https://quarto.org/docs/get-started' >&2; exit 2; }
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/nbdev_docs

setup: $(READY) ## only the set-up

# uv tries again with the machine's own certificates, which it needs behind some proxies
$(READY): settings.ini setup.py
	@set -e; \
	if [ ! -x $(BIN)/python ]; then \
	    for p in $(or $(PYTHON),python3 python3.14 python3.13 python3.12 python3.11); do \
	        py=`"$$p" -c 'import sys; print(sys.executable if sys.version_info >= (3, 11) else "")' 2>/dev/null` && [ -n "$$py" ] && break; done; \
	    [ -n "$$py" ] || { echo 'Python 3.11 or newer is needed: make $(MAKECMDGOALS) PYTHON=/path/to/python' >&2; exit 2; }; \
	    echo "setting up $(VENV) with $$py: torch is large, this takes minutes on a slow line"; \
	    if command -v uv >/dev/null; then uv venv -q --python "$$py" $(VENV); else "$$py" -m venv $(VENV) || { rm -rf $(VENV); exit 2; }; fi; \
	fi; \
	uv=`command -v uv` || { uv=$(BIN)/uv; [ -x $$uv ] || $(BIN)/python -m pip install -q uv; }; \
	set -- pip install --compile-bytecode --python $(BIN)/python -e '.[dev]'; \
	$$uv "$$@" || UV_SYSTEM_CERTS=1 $$uv "$$@"; \
	$(BIN)/python -c 'import torch, torchvision' || { echo 'torch and torchvision do not fit each other: remove $(VENV) and try again' >&2; exit 2; }; \
	touch $@

.PHONY: help demo test lab bench gpu readme docs setup
