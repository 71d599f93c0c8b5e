"""`import tokenmill` costs nothing: no torch, no CUDA, under a tenth of a second of the processor."""

import subprocess
import sys

PROBE = """
import sys, time
start = time.process_time()
import tokenmill, tokenmill.cli, tokenmill.errors, tokenmill.env
elapsed = time.process_time() - start
heavy = sorted({"torch", "numpy", "vllm", "triton", "transformers", "rich", "pydantic"} & set(sys.modules))
print(elapsed, ",".join(heavy))
"""


def probe() -> tuple[float, str]:
    answer = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True)
    seconds, _, heavy = answer.stdout.strip().partition(" ")
    return float(seconds), heavy


def test_import_touches_nothing_heavy() -> None:
    _, heavy = probe()
    assert heavy == ""


def test_import_is_fast() -> None:
    """The best of three: the limit is the product's promise, the machine's noise is not ours."""
    assert min(probe()[0] for _ in range(3)) < 0.1
