# make book   train, measure and render a book of your own under _build/book
# make test   lint, types, unit tests, notebooks, the built book and its checks
# make shell  a shell in which opd-geometry is found
# make at-scale  every chapter at profile gpu on tiny stand-ins, on a processor
# make site   render the published chapters, without training, under _build/site
#
# make book PROFILE=laptop SEEDS=0-2 JOBS=4 FROM=scratch
#   PROFILE  size of the runs: see opd-geometry plan --help
#   SEEDS    one seed, a list such as 0,3, or a range such as 0-4
#   JOBS     runs at a time, one process and one thread each; default: every core
#   STUDENT  of PROFILE=pretrained: a directory, a GGUF file, or owner/name@REVISION
#   FROM     committed (start from the base and teacher that are published) or scratch
# make PYTHON=/path/to/python3.11 ... picks another interpreter.

PYTHON  ?= $(shell command -v python3.11 || command -v python3)
PROFILE ?= laptop
SEEDS   ?= 0
JOBS    ?= $(shell getconf _NPROCESSORS_ONLN)
FROM    ?= committed
STUDENT ?=

BIN       := .venv/bin
INSTALLED := .venv/installed

# One thread a process: several would fight for the cores, and the order in which
# threads add up would change the last digits.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
# Nothing is loaded from the network once the packages are installed.
OFFLINE := HF_HUB_OFFLINE=1

.DELETE_ON_ERROR:
.PHONY: help book site shell test at-scale measurements chapters clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

book: $(INSTALLED)
	$(ONE_THREAD) $(BIN)/opd-geometry book --profile $(PROFILE) --seeds $(SEEDS) \
	  --jobs $(JOBS) --from $(FROM) $(if $(STUDENT),--student "$(STUDENT)")

site: $(INSTALLED)
	$(BIN)/opd-geometry site

shell: $(INSTALLED)
	@PATH="$(CURDIR)/$(BIN):$$PATH" $${SHELL:-sh}

# pytest comes last, so that its summary is the last word.
test: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache
	$(ONE_THREAD) $(OFFLINE) $(BIN)/python -m pytest -n 2 --dist=loadfile \
	  --nbval --nbval-current-env --nbval-cell-timeout=600 lib tests notebooks

# Ten minutes on one core; a line a chapter, and the executed ones below _build.
at-scale: $(INSTALLED)
	$(ONE_THREAD) $(OFFLINE) $(BIN)/python tests/at_scale.py _build/at-scale

# The two below remake what is committed: the measurements with the verdicts drawn
# from them, such as `make measurements SEEDS=0-4`, and the published chapters.
measurements: $(INSTALLED)
	$(ONE_THREAD) $(BIN)/opd-geometry run --profile $(PROFILE) --arms all \
	  --seeds $(SEEDS) --jobs $(JOBS)
	$(BIN)/opd-geometry commit --profile $(PROFILE) --seeds $(SEEDS)
	$(BIN)/opd-geometry claims --profile $(PROFILE)

chapters: $(INSTALLED)
	$(ONE_THREAD) $(BIN)/opd-geometry chapters

# Leaves .venv and data/runs, which take long to make again.
clean:
	rm -rf _build data/audit .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(INSTALLED): requirements.txt constraints.txt pyproject.toml
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11" >&2; \
	  exit 1; }
	"$(PYTHON)" -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@# Else every kernel warns that its sockets on this machine are not encrypted.
	@mkdir -p .venv/etc/ipython
	@echo 'c.IPKernelApp.log_level = "ERROR"' > .venv/etc/ipython/ipython_kernel_config.py
	@touch $@
