"""Whether torch.compile works here, what to do where it cannot, and how a server says that its model runs uncompiled.

On a CPU it writes C++ that includes Python.h and calls a compiler when the model starts. A system's own Python comes
without its headers (Debian keeps them in python3-dev): vLLM would load the model and then fail.
"""

import json
import os
import platform
import shutil
import sys
import sysconfig
from argparse import Namespace
from dataclasses import asdict, dataclass
from pathlib import Path

from tokenmill import env
from tokenmill.errors import ConfigurationError

#: What the launcher sets and torch reads.
SWITCH = "TORCH_COMPILE_DISABLE"
#: Distribution family, as /etc/os-release spells it, to how it installs a C++ compiler and the headers of a Python,
#: whose version is `{dotted}` or `{flat}`.
_INSTALLS: dict[str, tuple[str, str]] = {
    "debian": ("apt-get install g++", "apt-get install python{dotted}-dev"),
    "fedora": ("dnf install gcc-c++", "dnf install python{dotted}-devel"),
    "suse": ("zypper install gcc-c++", "zypper install python{flat}-devel"),
}


@dataclass(frozen=True)
class Uncompiled:
    """Why a model runs uncompiled.

    Attributes:
        reason: What is missing, or which flag or variable asked for it.
        remedy: What to do about it; empty where somebody asked for it.
    """

    reason: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.reason}; remedy: {self.remedy}" if self.remedy else self.reason


def program() -> str:
    """The C++ compiler that torch.compile calls."""
    return os.environ.get("CXX", "g++")


def why_not() -> Uncompiled | None:
    """What torch.compile lacks for a CPU, with the remedy; None where it has all."""
    if shutil.which(program()) is None:
        if "CXX" in os.environ:
            reason = f"the C++ compiler {program()} that CXX names is not installed"
            return Uncompiled(reason, "let CXX name an installed compiler, or unset it")
        compiler = _INSTALLS[_family()][0] if _family() else f"install the C++ compiler {program()}"
        return Uncompiled(f"the C++ compiler {program()} is not installed", compiler)
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return Uncompiled("the headers of this Python are not installed", _headers_remedy())
    return None


def _headers_remedy() -> str:
    """How this Python gets its headers."""
    if sys.base_prefix != "/usr":  # not the distribution's: a package of theirs would be for another Python
        return f"install the Python in {sys.base_prefix} with its headers"
    if not _family():
        return "install the headers of this Python, often a package named python3-dev or python3-devel"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    if Path("/usr/bin/python3").resolve().name == f"python{version}":
        version = "3"
    return _INSTALLS[_family()][1].format(dotted=version, flat=version.replace(".", ""))


def _family() -> str:
    """The key of `_INSTALLS` that this system belongs to; empty where none is known."""
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        return ""
    names = {release.get("ID", ""), *release.get("ID_LIKE", "").split()}
    return next((family for family in _INSTALLS if family in names), "")


def asked_for(arguments: Namespace, *, on_cpu: bool) -> Uncompiled | None:
    """What in the arguments or the environment keeps the model uncompiled; None where it would be compiled.

    Args:
        arguments: As parsed by `vllm serve`.
        on_cpu: Whether this is vLLM's CPU build.
    """
    if arguments.enforce_eager:
        return Uncompiled("--enforce-eager")
    if switched_off() is not None:
        return switched_off()
    mode = getattr(getattr(arguments, "compilation_config", None), "mode", None)
    if mode is not None and mode == 0:
        return Uncompiled("--compilation-config has mode 0")
    level = getattr(arguments, "optimization_level", None)
    if mode is None and str(getattr(level, "value", level)) == "0":
        return Uncompiled("-O0")
    if on_cpu and getattr(arguments, "enable_lora", False):
        return Uncompiled("--enable-lora; vLLM's CPU build does not compile models with adapters")
    return None


def switched_off() -> Uncompiled | None:
    """Says so where torch's own variable switches torch.compile off."""
    return Uncompiled(f"{SWITCH}=1") if os.environ.get(SWITCH) == "1" else None


def disable() -> None:
    """Makes torch.compile return what it is given, in this process and its children."""
    os.environ[SWITCH] = "1"
    if (config := sys.modules.get("torch._dynamo.config")) is not None:  # it has read the environment already
        config.disable = True  # type: ignore[attr-defined]


def announce(found: Uncompiled | None) -> None:
    """Tells this process and its children why the model runs uncompiled (None: it does not); `announced` reads it.

    Only the launcher sees the arguments, but whichever process writes the status file last must say it.
    """
    if found is None:
        os.environ.pop(env.UNCOMPILED.name, None)
    else:
        os.environ[env.UNCOMPILED.name] = json.dumps(asdict(found))


def announced() -> dict[str, str] | None:
    """What the launcher of this server announced, ready for JSON; None: nothing, or another launcher than ours."""
    try:
        return env.UNCOMPILED.get()
    except ConfigurationError:  # somebody else set it; a report must not stop vLLM
        return None
