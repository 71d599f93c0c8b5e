"""Loads the stand-in for libnuma before anything needs it; lies in an environment made without libnuma.

What is loaded already is found by its name when vLLM's CPU build asks the loader for libnuma.so.1. Once libnuma is
installed, it is taken instead.
"""

import ctypes
import sys
from pathlib import Path

try:
    ctypes.CDLL("libnuma.so.1")
except OSError:
    ctypes.CDLL(str(Path(sys.prefix) / "lib" / "libnuma.so.1"))
