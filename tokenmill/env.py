"""Every environment variable that Tokenmill reads, with its default and its meaning.

A variable is read when it is asked for, never at import, so tests and child processes can set it.
A value that cannot be parsed raises `ConfigurationError`; nothing falls back silently.
`tokenmill doctor` prints this table.
"""

import json
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from tokenmill.errors import ConfigurationError

T = TypeVar("T")


@dataclass(frozen=True)
class Variable(Generic[T]):
    """One environment variable.

    Attributes:
        name: Its name, `TOKENMILL_...`.
        default: The value when it is unset or empty.
        parse: Turns the text into the value; raises ValueError whose message says what is accepted.
        doc: One sentence for people.
    """

    name: str
    default: T
    parse: Callable[[str], T]
    doc: str

    def get(self) -> T:
        """The value now in force."""
        text = os.environ.get(self.name, "").strip()
        if not text:
            return self.default
        try:
            return self.parse(text)
        except ValueError as error:
            raise ConfigurationError(f"{self.name}={text!r} is not accepted: {error}") from None


def _choice(*allowed: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text.lower() not in allowed:
            raise ValueError(f"use one of {', '.join(allowed)}")
        return text.lower()

    return parse


def _number(*allowed: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if text not in map(str, allowed):
            raise ValueError(f"use one of {', '.join(map(str, allowed))}")
        return int(text)

    return parse


def _names(text: str) -> frozenset[str]:
    return frozenset(part.strip() for part in text.split(",") if part.strip())


def _texts(text: str) -> dict[str, str]:
    found = json.loads(text)
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise ValueError("it must be a JSON object of texts")
    return found


def _directory(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ValueError("this user has no home directory; give the whole path") from None


def _cache() -> Path:
    """Below the user's home; a container's user of any number may have none, and vLLM loads us all the same."""
    try:
        return _directory("~/.cache/tokenmill")
    except ValueError:
        return _private_temporary()


def _private_temporary() -> Path:
    """A folder of this user's below the temporary one: what is compiled into it is run, so nobody else may write there.

    Always the same, so that what was compiled is found again; another where somebody else made that one.
    """
    import tempfile

    path = Path(tempfile.gettempdir(), f"tokenmill-{os.getuid()}")
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        found = path.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
            return Path(tempfile.mkdtemp(prefix="tokenmill-"))
    except OSError:
        pass  # nothing can be written there, and whoever tries says so
    return path


#: Instruction sets that CPU kernels dispatch on, from narrow to wide; each contains the ones before it
#: except that `avx_vnni` (client CPUs) and `avx512` are siblings above `avx2`.
ISA_LEVELS = ("plain", "avx2", "avx_vnni", "avx512", "avx512_vnni", "avx512_bf16", "amx")

ISA = Variable(
    "TOKENMILL_ISA",
    "",
    _choice(*ISA_LEVELS),
    "Widest CPU instruction set to use (also torch's and vLLM's); default: what the processor has.",
)
HOOKS = Variable(
    "TOKENMILL_HOOKS",
    frozenset({"all"}),
    _names,
    "Which vLLM hooks to install: 'all', 'none', or a comma-separated list; a name with '-' before it is left out.",
)
INT4_ACTIVATION_BITS = Variable(
    "TOKENMILL_INT4_ACTIVATION_BITS",
    16,
    _number(8, 16),
    "Activations of INT4 layers in vLLM: 16 as they are; 8 quantised per row and group (CPU; faster, less exact).",
)
CACHE = Variable(
    "TOKENMILL_CACHE",
    _cache(),
    _directory,
    "Where things made at run time are kept (emulated kernels, objects of the native build, logs of the servers).",
)
BUILD = Variable(
    "TOKENMILL_BUILD",
    "auto",
    _choice("auto", "cpu", "cuda"),
    "What the native build contains: 'auto' takes CUDA where nvcc is found, 'cpu' never, 'cuda' demands it.",
)
LOG_LEVEL = Variable(
    "TOKENMILL_LOG_LEVEL",
    "info",
    _choice("debug", "info", "warning", "error"),
    "How much Tokenmill's own loggers say.",
)
STATUS_FILE: Variable[Path | None] = Variable(
    "TOKENMILL_STATUS_FILE",
    None,
    _directory,
    "File in which vLLM's processes say which hooks they run; set by the supervisor for each server.",
)
PARENT_FD: Variable[int | None] = Variable(
    "TOKENMILL_PARENT_FD",
    None,
    int,
    "Read end of a pipe that the supervisor holds open; when it closes, the server ends itself and its children.",
)
UNCOMPILED: Variable[dict[str, str] | None] = Variable(
    "TOKENMILL_UNCOMPILED",
    None,
    _texts,
    "Why the model runs uncompiled, as JSON; set by the launcher for the processes of its server.",
)

COMMIT = Variable(
    "TOKENMILL_COMMIT",
    "unknown",
    str,
    "The commit that measured rows name where there is no git, as on a machine that got a copy of the tree.",
)
GGML: Variable[Path | None] = Variable(
    "TOKENMILL_GGML",
    None,
    _directory,
    "Folder with libggml.so and its parts, a rival of `tokenmill bench int4 --cpu`; default: llama-cpp-python's.",
)
STORE: Variable[str | None] = Variable(
    "TOKENMILL_STORE",
    None,
    str,
    "Where keys and books of a LiteLLM file are kept: an SQLite file's path or postgresql://user@host/database; "
    "default: a file beside it.",
)
LITELLM_PRICES: Variable[Path | None] = Variable(
    "TOKENMILL_LITELLM_PRICES",
    None,
    _directory,
    "LiteLLM's cost map (model_prices_and_context_window.json), for what a LiteLLM file leaves unsaid; "
    "default: an installed litellm package's.",
)

#: The table that `tokenmill doctor` prints; a new variable is added here.
VARIABLES: tuple[Variable[object], ...] = (  # type: ignore[assignment]
    ISA,
    HOOKS,
    INT4_ACTIVATION_BITS,
    CACHE,
    BUILD,
    LOG_LEVEL,
    STATUS_FILE,
    PARENT_FD,
    UNCOMPILED,
    COMMIT,
    GGML,
    STORE,
    LITELLM_PRICES,
)
