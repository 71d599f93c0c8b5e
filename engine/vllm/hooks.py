"""Which hooks exist, which of them this process runs, and why not the others.

Where `TOKENMILL_STATUS_FILE` names a file, every change is also written there, for readers outside vLLM's
processes (`docs/plugin.md` describes the file).
"""

import json
import logging
import multiprocessing
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Literal, cast

from tokenmill import env
from tokenmill.engine.vllm import compat, compiler
from tokenmill.errors import ConfigurationError

logger = logging.getLogger("tokenmill.plugin")

#: active: ours runs. stock: vLLM's own runs because ours is not needed here. off: left out by TOKENMILL_HOOKS.
#: refused: ours cannot run here. absent: this version of Tokenmill does not have it.
State = Literal["active", "stock", "off", "refused", "absent"]


@dataclass(frozen=True)
class HookStatus:
    """What became of one hook in one process.

    Attributes:
        hook: Its name, as `TOKENMILL_HOOKS` spells it.
        state: See `State`.
        detail: For people: the implementation that runs, or the reason why ours does not.
    """

    hook: str
    state: State
    detail: str


@dataclass(frozen=True)
class Hook:
    """One hook: its name, what it is for, and `module:function` that installs it (empty: not written yet).

    The function takes nothing, may be called again, returns the status, and raises only when vLLM is not as
    `compat` describes it.
    """

    name: str
    purpose: str
    target: str = ""

    def install(self) -> HookStatus:
        """Runs the installing function; whatever it raises becomes the status `refused`."""
        module, _, function = self.target.partition(":")
        try:
            return cast("Callable[[], HookStatus]", getattr(import_module(module), function))()
        except Exception as error:  # noqa: BLE001 - a failing hook must leave stock vLLM running
            return HookStatus(self.name, "refused", f"{type(error).__name__}: {error}")


HOOKS: tuple[Hook, ...] = (
    Hook("linear", "INT4 linear layers", "tokenmill.engine.vllm.linear:install"),
    Hook("attention", "attention that reads a shared prefix once"),
    Hook("verification", "acceptance of drafted tokens", "tokenmill.engine.vllm.verification:install"),
    Hook("scheduler", "how much to draft, and which requests run together"),
)
NAMES = tuple(hook.name for hook in HOOKS)

_statuses: dict[str, HookStatus] = {}


def chosen(selection: frozenset[str]) -> frozenset[str]:
    """The hooks that a value of `TOKENMILL_HOOKS` turns on.

    `all` or only names with a minus: all but those; `none`: none; otherwise the names given.

    Raises:
        ConfigurationError: A name is unknown, or `none` stands beside other names.
    """
    words = {word.lower() for word in selection}
    unknown = {word.removeprefix("-") for word in words} - {*NAMES, "all", "none"}
    if unknown:
        raise ConfigurationError(
            f"TOKENMILL_HOOKS names {', '.join(sorted(unknown))}, which is no hook; "
            f"use 'all', 'none' or some of {', '.join(NAMES)}, '-name' to leave one out"
        )
    if "none" in words:
        if len(words) > 1:
            raise ConfigurationError("TOKENMILL_HOOKS has 'none' beside other names; use one or the other")
        return frozenset()
    removed = {word[1:] for word in words if word.startswith("-")}
    added = words - {f"-{name}" for name in removed} - {"all"}
    return frozenset(NAMES if "all" in words or not added else added) - removed


def install() -> None:
    """Installs every chosen hook in this process and records what became of each; see `register`."""
    version = compat.vllm_version()
    problem = compat.why_not(version)
    try:
        wanted = chosen(env.HOOKS.get())
    except ConfigurationError as error:
        wanted, problem = frozenset(NAMES), str(error)
    if problem and not _statuses and multiprocessing.parent_process() is None:
        logger.warning("Tokenmill leaves this vLLM as it is: %s", problem)
    for hook in HOOKS:
        _statuses[hook.name] = _outcome(hook, hook.name in wanted, problem)
    publish()


def _outcome(hook: Hook, wanted: bool, problem: str | None) -> HookStatus:
    if not hook.target:
        return HookStatus(hook.name, "absent", "not part of this version of Tokenmill")
    if not wanted:
        return HookStatus(hook.name, "off", "left out by TOKENMILL_HOOKS")
    if problem:
        return HookStatus(hook.name, "refused", problem)
    return hook.install()


def record(status: HookStatus) -> None:
    """Replaces one hook's status, e.g. when a worker learns after loading which kernel it runs."""
    _statuses[status.hook] = status
    publish()


def statuses() -> tuple[HookStatus, ...]:
    """The status of every hook in this process, in the order of `HOOKS`; empty before `install`."""
    return tuple(_statuses[name] for name in NAMES if name in _statuses)


def report() -> dict[str, object]:
    """What this process says of itself, ready for JSON.

    vLLM's version, the process, its hooks, and why the model runs uncompiled (see `compiler.announced`).
    """
    return {
        "vllm": compat.vllm_version(),
        "process": multiprocessing.current_process().name,
        "pid": os.getpid(),
        "hooks": [asdict(status) for status in statuses()],
        "uncompiled": compiler.announced(),
    }


def publish() -> None:
    """Logs the table at debug level and writes it to the file that `TOKENMILL_STATUS_FILE` names.

    Every process of a server writes the same file and the last one stays: the API server comes first, the
    workers, where the hooks run, come last. Readers see a whole file, the old one or the new one.
    """
    document = report()
    logger.debug("hooks: %s", json.dumps(document))
    target = env.STATUS_FILE.get()
    if target is None:
        return
    temporary = target.with_name(f"{target.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(document, indent=1), encoding="utf-8")
        temporary.replace(target)
    except OSError as error:
        logger.warning("cannot write %s: %s", target, error.strerror)
