#!/usr/bin/env python3
"""Lays out vLLM's GPU builds so that they can be loaded on a machine without a GPU, beside a CPU torch.

    python tools/gpu_build_site.py [VERSION ...]

For each version, build/gpu-builds/VERSION gets
    site/    the wheel's Python files and its main operator libraries (the flash-attention ones are left out:
             half a gigabyte that nothing here calls)
    stubs/   libcuda, libcudart and libtorch_cuda whose every function answers "no device"; their symbols are
             those that the operator libraries ask for

Imports, plug-in loading, engine configuration and the choice of kernels work there; no operator runs. A version
that is already laid out costs nothing. Needs a C compiler, binutils and, the first time, the package index.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SITES = ROOT / "build" / "gpu-builds"
VERSIONS = ("0.26.0", "0.28.0", "0.32.0")
#: Real operator libraries that are kept: their registrations are what makes vLLM's ops exist.
KEPT_LIBRARIES = ("_C_stable_libtorch.abi3.so", "_moe_C_stable_libtorch.abi3.so")
#: Names of the stubs, and which of the missing symbols each one offers.
STUBS = {
    "libcuda.so.1": re.compile(r"cu[A-Z]"),
    "libcudart.so.13": re.compile(r"(__)?cuda"),
    "libtorch_cuda.so": re.compile(r""),
}
NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE and cudaErrorNoDevice


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="*", default=list(VERSIONS), metavar="VERSION")
    try:
        for version in parser.parse_args().versions:
            lay_out(version)
    except subprocess.CalledProcessError as error:
        reason = (error.stderr or error.stdout or "").strip().splitlines() or [str(error)]
        print(f"gpu builds: {Path(error.cmd[0]).name} failed: {reason[-1]}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"gpu builds: {error}", file=sys.stderr)
        return 1
    return 0


def lay_out(version: str) -> None:
    """Makes build/gpu-builds/VERSION in one step: it is there whole or not at all."""
    target = SITES / version
    if target.exists():
        return
    started = time.monotonic()
    SITES.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=SITES) as work:
        print(f"  - vllm {version}: downloading", flush=True)
        wheel = download(version, Path(work))
        print(f"  - vllm {version}: unpacking", flush=True)
        unpack(wheel, Path(work, "layout", "site"))
        make_stubs(Path(work, "layout"))
        Path(work, "layout").replace(target)
    print(f"  ✓ vllm {version} in {target.relative_to(ROOT)} ({time.monotonic() - started:.0f} s)", flush=True)


def download(version: str, folder: Path) -> Path:
    """Takes the wheel from pip's index; vLLM publishes it for x86-64 and arm64 Linux."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    subprocess.run([*command, "--dest", str(folder), f"vllm=={version}"], check=True, stderr=subprocess.PIPE, text=True)
    return next(folder.glob("vllm-*.whl"))


def unpack(wheel: Path, site: Path) -> None:
    """Everything small, and of the libraries only those that are kept."""
    unwanted = re.compile(r"\.so(\.|$)|/vllm-rs$|/third_party/.*/include/|\.(cu|cuh|h|hpp)$")
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.namelist():
            if member.endswith(KEPT_LIBRARIES) or not unwanted.search(member):
                archive.extract(member, site)


def make_stubs(layout: Path) -> None:
    """Compiles the libraries that stand in for CUDA's and torch's."""
    stubs = layout / "stubs"
    stubs.mkdir()
    missing = missing_symbols(list((layout / "site").rglob("*.so")))
    for name, pattern in STUBS.items():
        offered = {symbol for symbol in missing if pattern.match(symbol)}
        missing -= offered
        source, versions = stubs / f"{name}.c", stubs / f"{name}.map"
        source.write_text("".join(f"int {symbol}(void) {{ return {NO_DEVICE}; }}\n" for symbol in sorted(offered)))
        versions.write_text(f"{name} {{ global: *; }};\n")  # CUDA's runtime names its symbols' version like this
        scripted = [f"-Wl,--version-script={versions}"] if name.startswith("libcudart") else []
        compiler = shutil.which("cc") or shutil.which("gcc") or "cc"
        command = [compiler, "-shared", "-fPIC", "-w", "-fno-builtin", f"-Wl,-soname,{name}", *scripted]
        subprocess.run([*command, "-o", str(stubs / name), str(source)], check=True, capture_output=True, text=True)


def missing_symbols(libraries: list[Path]) -> set[str]:
    """Functions that the libraries ask for and neither the C and C++ runtime nor a CPU torch has."""
    import torch

    folder = Path(torch.__file__).parent / "lib"
    offered = symbols("--defined-only", [folder / "libtorch_cpu.so", folder / "libc10.so", folder / "libtorch.so"])
    wanted = symbols("--undefined-only", libraries)
    plain = {name for name in wanted if "@" not in name or "@libcudart" in name}
    return {name.partition("@")[0] for name in plain - offered if not name.startswith(("_Py", "Py", "_ITM", "__gmon"))}


def symbols(kind: str, libraries: list[Path]) -> set[str]:
    """The dynamic symbols of libraries, weak undefined ones left out."""
    command = ["nm", "--dynamic", "--format=posix", kind, *map(str, libraries)]
    listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    rows = (line.split() for line in listing.splitlines())
    return {row[0] for row in rows if len(row) >= 2 and row[1] not in ("w", "v")}


if __name__ == "__main__":
    sys.exit(main())
