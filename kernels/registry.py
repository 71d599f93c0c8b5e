"""Which implementation runs, and why the others do not.

An op's `OpSpec` lists implementations by name; each is a `run` and a `why_not(problem)` that answers None when it
can, or one line that says why it cannot. Automatic choice takes the first of `ORDER` that can and logs itself once
with every refusal. An implementation named by the caller never falls back to another.

    choose(spec, problem).run(**arguments)                  automatic
    choose(spec, problem, "triton").run(**arguments)        this one or UnsupportedError
    explain(spec, problem)                                  what would be chosen, and all refusals
"""

import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, cast

from tokenmill.errors import InputError, UnsupportedError
from tokenmill.kernels.spec import OpSpec, Problem

logger = logging.getLogger(__name__)

#: Automatic choice asks in this order. `cuda-emulated` runs CUDA kernels on the CPU to prove them: by name only.
ORDER = ("cuda", "triton", "cpu", "reference")
BY_NAME_ONLY = ("cuda-emulated",)

#: Every op of the product: name to `module:attribute` of its OpSpec. Adding an op adds one line here.
OPS: dict[str, str] = {
    "int4_gemm": "tokenmill.kernels.int4_gemm.op:INT4_GEMM",
    "spec_verify_greedy": "tokenmill.kernels.spec_verify.op:GREEDY",
}

_logged: set[tuple[str, str, tuple[str, ...]]] = set()


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op.

    Attributes:
        name: One of `ORDER` or `BY_NAME_ONLY`.
        run: Takes the public function's keyword arguments, already checked, and returns its result.
        why_not: None when it can do the problem, else one line: the value, the limit, the remedy.
    """

    name: str
    run: Callable[..., Any]
    why_not: Callable[[Problem], str | None]


@dataclass(frozen=True)
class Choice:
    """What automatic choice does with a problem: the implementation's name (None: nothing can) and every refusal."""

    problem: Problem
    chosen: str | None
    refusals: Mapping[str, str]

    def __str__(self) -> str:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in self.refusals.items())
        return f"{self.problem.op}: {self.chosen or 'nothing'}" + (f" ({reasons})" if reasons else "")


def op_spec(name: str) -> OpSpec:
    """The spec of a registered op; InputError lists the known ones."""
    if name not in OPS:
        raise InputError(f"op {name!r} is not registered; known: {', '.join(sorted(OPS))}")
    return cast("OpSpec", _load(OPS[name]))


def choose(spec: OpSpec, problem: Problem, implementation: str | None = None) -> Implementation:
    """The implementation that runs a problem.

    Args:
        spec: The op.
        problem: From `checks.bind`.
        implementation: A name, or None for automatic choice.

    Raises:
        InputError: The name is not one of the op's.
        UnsupportedError: The named one refuses, or none can; carries every refusal.
    """
    if implementation is not None:
        return _named(spec, problem, implementation)
    refusals: dict[str, str] = {}
    for name in ORDER:
        if name not in spec.implementations and name != "reference":
            continue
        candidate = _ask(spec, name, problem)
        if isinstance(candidate, Implementation):
            _log_once(Choice(problem, name, refusals))
            return candidate
        refusals[name] = candidate
    raise UnsupportedError(str(problem), refusals)


def explain(spec: OpSpec, problem: Problem) -> Choice:
    """What `choose` would do with the problem, and the reason of *every* implementation that cannot do it."""
    refusals: dict[str, str] = {}
    chosen = None
    for name in names(spec):
        candidate = _ask(spec, name, problem)
        if isinstance(candidate, str):
            refusals[name] = candidate
        elif chosen is None and name not in BY_NAME_ONLY:
            chosen = name
    return Choice(problem, chosen, refusals)


def names(spec: OpSpec) -> tuple[str, ...]:
    """The op's implementations in the order of choice, those by name only last."""
    known = {*spec.implementations, "reference"}
    return tuple(name for name in (*ORDER, *BY_NAME_ONLY) if name in known)


def _named(spec: OpSpec, problem: Problem, name: str) -> Implementation:
    if name not in names(spec):
        raise InputError(f"{spec.name} has no implementation {name!r}; it has {', '.join(names(spec))}")
    candidate = _ask(spec, name, problem)
    if isinstance(candidate, str):
        raise UnsupportedError(str(problem), {name: candidate})
    return candidate


def _ask(spec: OpSpec, name: str, problem: Problem) -> Implementation | str:
    """The implementation, or why it cannot do the problem."""
    if name == "reference":
        return Implementation("reference", spec.reference, lambda problem: None)
    try:
        found = cast("Implementation", _load(spec.implementations[name]))
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "tokenmill":
            raise
        return f"it needs {error.name}, which is not installed"
    return found.why_not(problem) or found


@functools.cache
def _load(target: str) -> object:
    module, _, attribute = target.partition(":")
    return getattr(import_module(module), attribute)


def _log_once(choice: Choice) -> None:
    key = (choice.problem.op, choice.chosen or "", (str(choice.problem.device.type), *choice.refusals))
    if key not in _logged:
        _logged.add(key)
        logger.info("%s", choice)
