#!/usr/bin/env python3
"""Installs triton releases beside the environment, so that the static gates hold for each of them.

    python tools/triton_site.py [VERSION ...]

build/triton/VERSION is a folder for PYTHONPATH. The default is the oldest release that the kernels support, the one
of torch 2.11. A version that is already there costs nothing; the first time needs the package index.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SITES = ROOT / "build" / "triton"
VERSIONS = ("3.6.0",)


def main() -> int:
    for version in sys.argv[1:] or VERSIONS:
        try:
            install(version)
        except subprocess.CalledProcessError as error:
            reason = (error.stderr or "").strip().splitlines() or [str(error)]
            print(f"triton {version}: {reason[-1]}", file=sys.stderr)
            return 1
        except OSError as error:
            print(f"triton {version}: {error}", file=sys.stderr)
            return 1
    return 0


def install(version: str) -> None:
    """Makes build/triton/VERSION in one step: it is there whole or not at all."""
    target, started = SITES / version, time.monotonic()
    if target.exists():
        return
    SITES.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=SITES) as work:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary", ":all:"]
        command += ["--target", f"{work}/site", f"triton=={version}"]
        subprocess.run(command, check=True, stderr=subprocess.PIPE, text=True)
        Path(work, "site").replace(target)
    print(f"  ✓ triton {version} in {target.relative_to(ROOT)} ({time.monotonic() - started:.0f} s)", flush=True)


if __name__ == "__main__":
    sys.exit(main())
