"""`import tokenmill` costs nothing: no torch, no CUDA, under a tenth of a second of the processor."""

import os
import subprocess
import sys
from pathlib import Path

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


def test_import_needs_no_home(tmp_path: Path) -> None:
    """A container may run as a number that no user has; vLLM would not start with a plug-in that fails there."""
    program = (
        "import os, pwd; os.environ.pop('HOME', None)\n"
        "def unknown(number): raise KeyError(number)\n"
        "pwd.getpwuid = unknown\n"
        "from tokenmill import env; print(env.CACHE.get())\n"
        "os.environ['TOKENMILL_CACHE'] = '~/here'\n"
        "try: env.CACHE.get()\n"
        "except env.ConfigurationError as error: print(error)"
    )
    place = {**os.environ, "TMPDIR": str(tmp_path)}

    def asked() -> list[str]:
        return subprocess.check_output([sys.executable, "-c", program], text=True, env=place).splitlines()

    default, refused = asked()
    assert default == f"{tmp_path}/tokenmill-{os.getuid()}"
    assert refused.endswith("this user has no home directory; give the whole path")
    assert asked()[0] == default, "what was compiled there is found again"
    Path(default).chmod(0o777)
    other = Path(asked()[0])
    assert other != Path(default) and other.stat().st_mode & 0o077 == 0, "what is compiled there is run"
