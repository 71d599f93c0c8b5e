"""Whether torch.compile works here, and what to do where it cannot.

On a CPU it writes C++ that includes Python.h and calls a compiler when the model starts. A system's own Python comes
without its headers (Debian keeps them in python3-dev): vLLM would load the model and then fail.
"""

import os
import shutil
import sys
import sysconfig
from pathlib import Path


def why_not() -> str | None:
    """What torch.compile lacks for a CPU, with the remedy; None where it has all."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        return f"the C++ compiler {compiler} is not installed; on Debian or Ubuntu: apt-get install g++"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return "the headers of this Python are not installed; on Debian or Ubuntu: apt-get install python3-dev"
    return None


def disable() -> None:
    """Makes torch.compile return what it is given, in this process and its children."""
    os.environ["TORCH_COMPILE_DISABLE"] = "1"
    if (config := sys.modules.get("torch._dynamo.config")) is not None:  # it has read the environment already
        config.disable = True  # type: ignore[attr-defined]
