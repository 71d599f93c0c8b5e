#!/usr/bin/env python3
"""Sets up the project's own environment on a fresh machine, or checks in a second that it still stands.

Needs nothing but Python's standard library. `make serve` and `make test` call it; nobody else has to.

Stages: find a Python, make the virtual environment, install torch (the CPU build unless there is a GPU),
install vLLM and the rest, remove what does not work beside a CPU
torch, stand in for libnuma where it is missing, build the native code.
Each finished stage leaves a stamp with a hash of what it was made from, so that a second run skips it and
a run after a kill goes on where the first one stopped.

Environment:
    TOKENMILL_FLAVOR       cpu or gpu; default: gpu when an NVIDIA driver is loaded
    TOKENMILL_TORCH_INDEX  a package index that has CPU builds of torch, asked besides pip's own
"""

import argparse
import ctypes
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIBNUMA = ROOT / "tools" / "libnuma"
OLDEST, NEWEST = (3, 11), (3, 13)
#: Built for CUDA or for another torch; beside a CPU torch they break every import of transformers.
BROKEN_BESIDE_CPU_TORCH = ("torchvision", "torchaudio", "torchcodec")
SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"


class SetupError(Exception):
    """Something on this machine stops the setup; the message says what and the remedy."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Set up Tokenmill's environment.")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="where the environment lives")
    parser.add_argument("--dev", action="store_true", help="also the tools for tests and checks")
    parser.add_argument("--lock", action="store_true", help="resolve anew and rewrite constraints/cpu.txt")
    arguments = parser.parse_args()
    try:
        Setup(arguments.venv.resolve(), dev=arguments.dev, lock=arguments.lock).run()
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("setup: interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    return 0


class Setup:
    """The stages, in order, each skipped when its stamp is fresh."""

    def __init__(self, venv: Path, *, dev: bool, lock: bool) -> None:
        self.venv = venv
        self.dev = dev
        self.lock = lock
        self.python = venv / "bin" / "python"
        self.log = venv / "setup.log"
        self.gpu = flavor() == "gpu"
        self.constraints = ROOT / "constraints" / ("gpu.txt" if self.gpu else "cpu.txt")
        self.index = os.environ.get("TOKENMILL_TORCH_INDEX", "")

    def run(self) -> None:
        self.stage("environment", self.base_key(), self.make_environment)
        self.stage("torch", self.packages_key(), self.install_torch)
        self.stage(self.variant("packages", self.packages_key()), self.packages_key(), self.install_packages)
        if not self.gpu and not has_libnuma():
            stand_in = "".join(path.read_text(encoding="utf-8") for path in sorted(LIBNUMA.iterdir()) if path.is_file())
            self.stage("libnuma", stand_in, self.make_libnuma)
        native = self.packages_key() + source_key()
        self.stage(self.variant("tokenmill", native), native, self.install_tokenmill)
        if self.lock:
            self.write_lock()

    # -- stages ---------------------------------------------------------------------------------------

    def make_environment(self) -> None:
        interpreter = find_python()
        if self.venv.exists():
            shutil.rmtree(self.venv)
        made = subprocess.run([interpreter, "-m", "venv", str(self.venv)], capture_output=True, text=True, check=False)
        if made.returncode != 0:
            shutil.rmtree(self.venv, ignore_errors=True)
            if "ensurepip" in made.stdout + made.stderr:
                raise SetupError(
                    "this Python cannot make environments (its ensurepip is missing); "
                    "on Debian or Ubuntu: apt-get install python3-venv"
                )
            raise SetupError(f"could not make {self.venv}: {(made.stderr or made.stdout).strip().splitlines()[-1]}")

    def install_torch(self) -> None:
        self.pip("install", "--upgrade", "setuptools>=77", "wheel", "ninja")
        if not self.gpu and "+cpu" not in self.torch_on_offer():
            print(
                "      no CPU build of torch is on offer here: taking the CUDA build, about 3 GB "
                "(set TOKENMILL_TORCH_INDEX to an index with CPU builds to avoid that)"
            )
        if not self.gpu:
            self.pip("install", *self.torch_source(), "torch")

    def install_packages(self) -> None:
        extras = ["gpu" if self.gpu else "cpu", "bench"] + (["dev", "browser"] if self.dev else [])
        # The project's own dependencies without the project: its native build wants torch first.
        # A third of the time would go to compiling modules that no test imports.
        compiling = ["--no-compile"] if self.dev else []
        self.pip("install", *compiling, *self.torch_source(), *requirements(extras))
        if not self.gpu and "+cpu" in self.installed("torch"):
            self.pip("uninstall", "--yes", *BROKEN_BESIDE_CPU_TORCH)

    def install_tokenmill(self) -> None:
        if shutil.which("c++") is None and shutil.which("g++") is None:
            print("      no C++ compiler: the CPU kernels are left out (apt-get install g++)")
        self.pip("install", "--no-build-isolation", "--no-deps", "--editable", str(ROOT))

    def make_libnuma(self) -> None:
        """vLLM's CPU build does not load without libnuma; a stand-in that finds no NUMA is enough for it."""
        library = self.venv / "lib" / "libnuma.so.1"
        compiler = shutil.which("c++") or shutil.which("g++")
        if compiler is None:
            raise SetupError("vLLM needs libnuma, and there is no C++ compiler to do without: apt-get install libnuma1")
        made = subprocess.run(libnuma_command(compiler, library), capture_output=True, text=True, check=False)
        if made.returncode != 0:
            raise SetupError(f"the stand-in for libnuma failed to compile: {last_line(made.stderr)}")
        where = "import sysconfig; print(sysconfig.get_path('purelib'))"
        site = subprocess.run([self.python, "-c", where], capture_output=True, text=True, check=True).stdout.strip()
        shutil.copy(LIBNUMA / "tokenmill_libnuma.py", site)
        Path(site, "tokenmill_libnuma.pth").write_text("import tokenmill_libnuma\n", encoding="utf-8")
        print("      libnuma is not installed: memory is not bound to NUMA nodes (apt-get install libnuma1)")

    def write_lock(self) -> None:
        frozen = subprocess.run(
            [str(self.python), "-m", "pip", "freeze", "--exclude-editable"], capture_output=True, text=True, check=True
        ).stdout
        pins = [line.split("+cpu")[0] for line in frozen.splitlines() if "==" in line and "@" not in line]
        header = "# Every version that CI runs with, written by `make lock`. Applied to each pip call of the setup.\n"
        target = ROOT / "constraints" / "cpu.txt"
        target.write_text(header + "\n".join(pins) + "\n", encoding="utf-8")
        print(f"wrote {len(pins)} pins to {target.relative_to(ROOT)}")

    # -- what they stand on ---------------------------------------------------------------------------

    def stage(self, name: str, key: str, action: Callable[[], None]) -> None:
        """Does one stage and stamps it, unless its stamp already stands."""
        if self.fresh(name, key) and not self.lock:
            return
        started = time.monotonic()
        print(f"  - {name} ...", flush=True)
        action()
        (self.venv / f".stage-{name}").write_text(digest(key), encoding="utf-8")
        print(f"  ✓ {name} ({time.monotonic() - started:.0f} s)", flush=True)

    def variant(self, name: str, key: str) -> str:
        """The stage's development form where that is wanted or already done: it contains the plain one."""
        return f"{name}-dev" if self.dev or self.fresh(f"{name}-dev", key) else name

    def fresh(self, name: str, key: str) -> bool:
        """Whether a stage was finished from just these inputs."""
        stamp = self.venv / f".stage-{name}"
        return self.python.exists() and stamp.exists() and stamp.read_text(encoding="utf-8") == digest(key)

    def base_key(self) -> str:
        return f"{find_python()} {self.venv}"

    def packages_key(self) -> str:
        parts = [ROOT / "pyproject.toml", self.constraints, Path(__file__)]
        text = "".join(path.read_text(encoding="utf-8") for path in parts if path.exists())
        return f"{self.gpu} {self.index} {text}"

    def torch_source(self) -> list[str]:
        return ["--extra-index-url", self.index] if self.index else []

    def torch_on_offer(self) -> str:
        """The version of torch that pip would take, e.g. `2.13.0+cpu`."""
        question = ["install", "--quiet", "--dry-run", "--no-deps", "--ignore-installed", "--report", "-"]
        report = subprocess.run(
            [str(self.python), "-m", "pip", *question, *self.torch_source(), "torch"],
            capture_output=True,
            text=True,
            check=False,
            env=self.environment(),
        )
        try:
            return str(json.loads(report.stdout)["install"][0]["metadata"]["version"])
        except (ValueError, LookupError):
            raise SetupError(f"pip finds no torch: {last_line(report.stderr)}") from None

    def installed(self, package: str) -> str:
        code = f"import importlib.metadata as m; print(m.version({package!r}))"
        return subprocess.run([str(self.python), "-c", code], capture_output=True, text=True, check=False).stdout

    def environment(self) -> dict[str, str]:
        environment = dict(os.environ, PIP_DISABLE_PIP_VERSION_CHECK="1", PYTHONUNBUFFERED="1")
        if self.constraints.exists() and not self.lock:
            environment["PIP_CONSTRAINT"] = str(self.constraints)
        elif not self.gpu:
            environment["PIP_CONSTRAINT"] = str(ROOT / "constraints" / "cpu-roots.txt")
        if not self.gpu and not self.dev:
            # To serve on a CPU, CUDA kernels would be compiled for nothing; to develop, they are checked.
            environment.setdefault("TOKENMILL_BUILD", "cpu")
        return environment

    def pip(self, *arguments: str) -> None:
        """Runs pip, shows what it is doing in one changing line, keeps everything it said in setup.log."""
        command = [str(self.python), "-m", "pip", *arguments]
        with self.log.open("a", encoding="utf-8") as log:
            log.write(f"$ {' '.join(command)}\n")
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=self.environment()
            )
            ticker = Ticker()
            tail: list[str] = []
            for line in process.stdout or ():
                log.write(line)
                tail = [*tail[-14:], line.rstrip()]
                ticker.show(line.strip())
            ticker.close()
        if process.wait() != 0:
            print("\n".join(f"      {line}" for line in tail), file=sys.stderr)
            raise SetupError(f"pip failed (status {process.returncode}); the whole output is in {self.log}")


class Ticker:
    """One line that is rewritten while a command works; silent when nobody looks at a terminal."""

    def __init__(self) -> None:
        self.live = sys.stdout.isatty()
        self.text = ""
        self.started = time.monotonic()
        self.done = threading.Event()
        if self.live:
            self.thread = threading.Thread(target=self.spin, daemon=True)
            self.thread.start()

    def show(self, text: str) -> None:
        self.text = text

    def spin(self) -> None:
        for turn in range(1_000_000):
            width = max(20, shutil.get_terminal_size().columns - 14)
            seconds = time.monotonic() - self.started
            print(
                f"\r\033[K    {SPINNER[turn % len(SPINNER)]} {seconds:4.0f} s {self.text[:width]}", end="", flush=True
            )
            if self.done.wait(0.1):
                return

    def close(self) -> None:
        if self.live:
            self.done.set()
            self.thread.join()
            print("\r\033[K", end="", flush=True)


def flavor() -> str:
    """`gpu` when an NVIDIA driver is loaded, unless TOKENMILL_FLAVOR says otherwise."""
    wanted = os.environ.get("TOKENMILL_FLAVOR", "").lower()
    if wanted not in ("", "cpu", "gpu"):
        raise SetupError(f"TOKENMILL_FLAVOR={wanted!r} is not accepted: use cpu or gpu")
    if wanted:
        return wanted
    return "gpu" if Path("/proc/driver/nvidia/version").exists() else "cpu"


def libnuma_command(compiler: str, library: Path) -> "list[str]":
    """The command that makes the stand-in for libnuma as `library`."""
    flags = ["-O2", "-shared", "-fPIC", "-Wl,-soname,libnuma.so.1", f"-Wl,--version-script={LIBNUMA}/libnuma.map"]
    return [compiler, *flags, f"{LIBNUMA}/libnuma.cpp", "-o", str(library)]


def has_libnuma() -> bool:
    """Whether the system's own libnuma loads."""
    try:
        ctypes.CDLL("libnuma.so.1")
    except OSError:
        return False
    return True


def find_python() -> str:
    """This interpreter if its version fits, else a fitting one from PATH."""
    if OLDEST <= sys.version_info[:2] <= NEWEST:
        return getattr(sys, "_base_executable", "") or sys.executable  # never the environment that is being made
    for minor in range(NEWEST[1], OLDEST[1] - 1, -1):
        found = shutil.which(f"python3.{minor}")
        if found and subprocess.run([found, "-c", ""], capture_output=True, check=False).returncode == 0:
            return found
    have = ".".join(map(str, sys.version_info[:2]))
    raise SetupError(f"Python {have} is outside 3.11 to 3.13 and no other is on PATH; apt-get install python3.11")


def requirements(extras: "list[str]") -> "list[str]":
    """The project's dependencies and those of some extras, as pyproject.toml lists them."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = list(project["dependencies"])
    for extra in extras:
        wanted += project["optional-dependencies"][extra]
    return wanted


def source_key() -> str:
    """Changes when the native code or the build does; Python files are seen without an installation."""
    files = sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file())
    files += [ROOT / "setup.py", ROOT / "tokenmill" / "native_build.py"]
    return "".join(f"{path}{hashlib.sha256(path.read_bytes()).hexdigest()}" for path in files if path.exists())


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "pip said nothing"


if __name__ == "__main__":
    sys.exit(main())
