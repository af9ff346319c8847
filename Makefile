# PrivateLoRA. `make demo` runs the main job, `make test` checks everything, `make help` lists the rest.
# Needs make and Python >= 3.10 with pip; everything else goes into .venv.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV   ?= .venv
PY     := $(VENV)/bin/python
# torch goes in first and pinned: an open range takes the newest version, which nobody has tried here. Which
# build of it (on Linux the public index has the one with gigabytes of CUDA libraries) is pip's settings' matter.
TORCH  ?= torch==2.13.0
PYTHON ?=
EXTRAS ?= cloud,edge
MODEL   = smollm2-135m-instruct
DTYPE   = float32
PROMPT  = What is the capital of France?
PIP    := $(PY) -m pip --disable-pip-version-check

# OpenMP pools that spin while they wait slow down two processes that share cores, up to four times.
export OMP_WAIT_POLICY ?= PASSIVE
export TOKENIZERS_PARALLELISM ?= false
export MODEL DTYPE PROMPT  # read by the shell, so that quotes in them are harmless

RUN_STAMP   := $(VENV)/.stamp-run
DEV_STAMP   := $(VENV)/.stamp-dev
BENCH_STAMP := $(VENV)/.stamp-bench
MODEL_STAMP := $(VENV)/.stamp-model-$(notdir $(MODEL))
STUBS       := shared/pb/privatelora/v1
PROTOC      := $(PY) -m grpc_tools.protoc -Ishared/pb=proto \
  --plugin=protoc-gen-mypy=$(VENV)/bin/protoc-gen-mypy \
  --plugin=protoc-gen-mypy_grpc=$(VENV)/bin/protoc-gen-mypy_grpc

.PHONY: help demo chat model test lint format proto proto-check exact bench link attacks data tuning integrity \
  tune-speed tune-memory tune-mixed over-link first-token link-plots chaos chaos-short overload fuzz install clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 24

# --- set-up ---------------------------------------------------------------------------------------

$(VENV)/bin/python:
	@for python in $(PYTHON) python3 python3.14 python3.13 python3.12 python3.11 python3.10; do \
	  if $$python -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then \
	    $$python -c 'import ensurepip, venv' 2>/dev/null || { \
	      echo "$$python cannot make a virtual environment: install its venv module" \
	        "(Debian, Ubuntu: apt install python3-venv), then run make again" >&2; exit 1; }; \
	    echo "setting up $(VENV) with $$($$python --version) (once; some minutes)"; \
	    $$python -m venv $(VENV); exit 0; \
	  fi; \
	done; \
	echo "no Python >= 3.10 found: install one, or name it: make PYTHON=/path/to/python3" >&2; exit 1

$(RUN_STAMP): $(VENV)/bin/python pyproject.toml
	@echo "installing PyTorch and the rest into $(VENV): some minutes"
	$(PIP) install --quiet "$(TORCH)"
	@echo "installing this project and what it needs into $(VENV)"
	$(PIP) install --quiet --editable '.[$(EXTRAS)]'
	@touch $@

$(DEV_STAMP): $(RUN_STAMP)
	@echo "installing what checks and tests need into $(VENV): a minute or more"
	$(PIP) install --quiet --editable '.[dev]'
	@touch $@

install: $(RUN_STAMP)  ## make .venv with both sides installed (EXTRAS=cloud or edge: one side)

$(BENCH_STAMP): $(RUN_STAMP)
	@echo "installing what benchmarks need into $(VENV): a minute or more"
	$(PIP) install --quiet --editable '.[bench]'
	@touch $@

RESOLVE     := $(PY) -c 'import sys; from shared.models import resolve; print(resolve(sys.argv[1]).folder)'

$(MODEL_STAMP): $(RUN_STAMP)
	@echo "preparing the model $$MODEL (once)"
	@$(RESOLVE) "$$MODEL"
	@touch '$@'

model: $(RUN_STAMP)  ## fetch and unpack the default model (100 MB) into the user's cache
	@$(RESOLVE) "$$MODEL"

# --- run ------------------------------------------------------------------------------------------

demo: $(MODEL_STAMP)  ## start a cloud on localhost, ask it one question from an edge, stop it
	@$(PY) -m benchmarks.demo --model "$$MODEL" --dtype "$$DTYPE" generate --prompt "$$PROMPT"

chat: $(MODEL_STAMP)  ## the same, as a conversation
	@$(PY) -m benchmarks.demo --model "$$MODEL" --dtype "$$DTYPE" chat

# --- check ----------------------------------------------------------------------------------------

test: lint $(MODEL_STAMP)  ## lint, then unit and integration tests
	OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --dist worksteal tests/unit
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not alone" tests/integration
	$(PY) -m pytest -m alone tests/integration

lint: $(DEV_STAMP) proto-check  ## ruff, mypy --strict, buf, generated stubs up to date
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/buf lint
	$(VENV)/bin/buf format --diff --exit-code

format: $(DEV_STAMP)  ## let ruff and buf rewrite the sources
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/buf format --write

# The virtual path shared/pb makes protoc write imports that resolve inside the package shared.pb.
proto: $(DEV_STAMP)  ## generate shared/pb from proto/
	$(PROTOC) --python_out=. --grpc_python_out=. --mypy_out=quiet:. --mypy_grpc_out=quiet:. \
	  shared/pb/privatelora/v1/private_lora.proto

proto-check: $(DEV_STAMP)
	@tmp=$$(mktemp -d); trap 'rm -rf "$$tmp"' EXIT; \
	$(PROTOC) --python_out="$$tmp" --grpc_python_out="$$tmp" --mypy_out=quiet:"$$tmp" \
	  --mypy_grpc_out=quiet:"$$tmp" shared/pb/privatelora/v1/private_lora.proto; \
	for f in "$$tmp"/$(STUBS)/*; do \
	  cmp -s "$$f" "$(STUBS)/$$(basename "$$f")" || \
	    { echo "$(STUBS)/$$(basename "$$f") does not match proto/: run 'make proto'" >&2; exit 1; }; \
	done

exact: $(DEV_STAMP)  ## 20 prompts x 64 tokens against the merged model, token by token (minutes)
	$(PY) -m benchmarks.exact

bench: $(DEV_STAMP)  ## speed and bytes against plain Hugging Face generate (minutes)
	$(PY) -m benchmarks.loopback

link: $(DEV_STAMP)  ## check the emulated networks that speed is measured over (a minute; as root: real namespaces)
	@for preset in loopback wifi 5g wan; do $(PY) -m benchmarks.link check --preset $$preset; done

SWEEP := rtt0 rtt10 rtt20 rtt40 rtt80 rtt160 rtt200

# What the README recommends for a slow network.
COARSE := --wire-dtype int8 --residual-codes-wire-dtype int4

over-link: $(DEV_STAMP) $(MODEL_STAMP)  ## decode mixed prompts over emulated links, each speed against its bound (an hour; goes on)
	$(PY) -m benchmarks.decode_over_link run $(COARSE)
	$(PY) -m benchmarks.decode_over_link run --label repetition --kind-of-text repetition --slow --no-plain $(COARSE)

first-token: $(DEV_STAMP) $(MODEL_STAMP)  ## time to the first token of 512 over emulated links, with and without pipelining
	$(PY) -m benchmarks.first_token run $(COARSE)

link-plots: $(BENCH_STAMP) $(DEV_STAMP) $(MODEL_STAMP)  ## measure speed by round-trip time, and draw it, and quality by bytes per token
	$(PY) -m benchmarks.decode_over_link run --label sweep --presets $(SWEEP) --prompts 4 --tokens 24 \
	  --slow one-trip resident grouped subset fused per-layer --slow-prompts 1 --slow-tokens 4 --no-replay $(COARSE)
	$(PY) -m benchmarks.network_plots speed
	$(PY) -m benchmarks.network_plots quality

attacks: $(DEV_STAMP)  ## read a prompt and recover M from captured traffic
	$(PY) -m benchmarks.read_prompt
	$(PY) -m benchmarks.recover_m

data: $(RUN_STAMP)  ## fetch the data of the tuning benchmark (70 MB) into the user's cache
	$(PY) -m benchmarks.datasets

tuning: $(BENCH_STAMP) $(MODEL_STAMP)  ## tuning quality against PEFT LoRA (hours; goes on where it stopped)
	$(PY) -m benchmarks.tuning compare
	$(PY) -m benchmarks.tuning table

integrity: $(BENCH_STAMP) $(MODEL_STAMP)  ## what the fingerprint check protects from (an hour; goes on where it stopped)
	$(PY) -m benchmarks.integrity run
	$(PY) -m benchmarks.integrity clouds
	$(PY) -m benchmarks.integrity table
	$(PY) -m benchmarks.integrity plot

tune-speed: $(DEV_STAMP) $(BENCH_STAMP) $(MODEL_STAMP)  ## tuning speed against PEFT LoRA, same rows and cores (minutes)
	$(PY) -m benchmarks.tune_speed

tune-memory: $(DEV_STAMP) $(MODEL_STAMP)  ## what tuning takes of the cloud's memory, against its formula (minutes; Linux)
	$(PY) -m benchmarks.tune_memory

tune-mixed: $(DEV_STAMP) $(MODEL_STAMP)  ## two edges tune while four sessions decode (minutes)
	$(PY) -m benchmarks.tune_mixed

chaos: $(DEV_STAMP) $(MODEL_STAMP)  ## eight edges decode and one tunes while the cloud is killed, paused, drained, cut off (half an hour)
	$(PY) -m benchmarks.chaos

chaos-short: $(DEV_STAMP) $(MODEL_STAMP)  ## the same for a few minutes, three events of each kind
	$(PY) -m benchmarks.chaos --short

overload: $(DEV_STAMP) $(MODEL_STAMP)  ## 64 streams on a KV budget for 16, against 16 that need not wait (minutes)
	$(PY) -m benchmarks.overload

FUZZ_WORKERS ?= 1

fuzz: $(DEV_STAMP)  ## a million mutated messages, hostile clouds, mutated files (long; FUZZ_WORKERS=N processes)
	$(PY) -m benchmarks.fuzz --workers $(FUZZ_WORKERS)

clean:  ## remove .venv and tool caches (the model cache in the user's folder stays)
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist *.egg-info
