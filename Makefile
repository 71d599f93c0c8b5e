# Two commands do everything on a fresh machine (Debian or Ubuntu with Python 3.11+, make and a C++ compiler):
#   make serve               sets up .venv and starts the server; ARGS="--port 8123" passes flags on
#   make test                sets up .venv with the development tools, checks and runs every test
PYTHON ?= python3
VENV := .venv
ARGS ?=
# As many processes as cores, up to four; what is dear to make is made by one of them (tests/conftest.py). Dozens of
# processes import vLLM: where Python is told to keep no bytecode, as in many containers, each would compile it anew.
PYTEST := PYTHONDONTWRITEBYTECODE= $(VENV)/bin/python -m pytest -n auto --maxprocesses 4

.PHONY: serve test test-avx2 check format setup setup-dev lock clean

serve: setup
	@$(VENV)/bin/tokenmill serve $(ARGS)

test: setup-dev check
	-@$(VENV)/bin/python tools/gpu_build_site.py  # offline, the tests that need them say so and are skipped
	-@$(VENV)/bin/python tools/triton_site.py
	@$(PYTEST) $(ARGS)

# What chooses by instruction set, once more as on a processor without AVX-512; where there is none, `test` has done it.
test-avx2: setup-dev
	@$(VENV)/bin/python -c "from tokenmill import platform; raise SystemExit(platform.isa() == 'avx2')" || \
		{ echo "test-avx2: this processor has no more than AVX2, so make test has tested it"; exit 0; } && \
		TOKENMILL_ISA=avx2 $(PYTEST) -q tests/engine/test_isa.py \
		tests/engine/test_linear.py tests/engine/test_tokens.py tests/kernels/spec_verify tests/kernels/int4_gemm/test_cpu.py

setup:
	@$(PYTHON) tools/bootstrap.py --venv $(VENV)

setup-dev:
	@$(PYTHON) tools/bootstrap.py --venv $(VENV) --dev

check:
	@$(VENV)/bin/ruff format --check --quiet . && $(VENV)/bin/ruff check --quiet . && $(VENV)/bin/mypy

format:
	@$(VENV)/bin/ruff format . && $(VENV)/bin/ruff check --fix .

lock:
	@$(PYTHON) tools/bootstrap.py --venv $(VENV) --dev --lock

clean:
	rm -rf $(VENV) build dist *.egg-info tokenmill/_C.abi3.so
