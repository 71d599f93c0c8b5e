"""What lets a transformers model be computed in parts: its shape without memory, and modules in its blocks' place."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Call:
    """What the model passes to a block beside the hidden states: masks, positions, rotary tables."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]


class FirstBlockReachedError(Exception):
    """Ends the model's forward at its first block and carries what would have reached it."""

    def __init__(self, hidden: torch.Tensor, call: Call) -> None:
        super().__init__()
        self.hidden = hidden
        self.call = call


#: Hidden states [batch, tokens, hidden] to hidden states.
BlockForward = Callable[[torch.Tensor], torch.Tensor]
#: (index of a block, hidden states that reach it, the other arguments) -> hidden states for the next.
Visit = Callable[[int, torch.Tensor, Call], torch.Tensor]


class StandIn(nn.Module):
    """Takes a decoder block's place. The model sees the block's attributes, such as its kind of attention."""

    def __init__(
        self,
        block: nn.Module,
        visit: Callable[[torch.Tensor, Call], torch.Tensor],
        wrap: Callable[[torch.Tensor], Any],
    ) -> None:
        super().__init__()
        self.__dict__["_stands_for"] = block  # no child of this module
        self._visit = visit
        self._wrap = wrap

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_stands_for"], name)

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        hidden, rest = (arguments[0], arguments[1:]) if arguments else (keywords.pop("hidden_states"), ())
        return self._wrap(self._visit(hidden, Call(tuple(rest), keywords)))


def run_block(block: nn.Module, hidden: torch.Tensor, call: Call) -> Any:
    """What a block returns for hidden states [batch, tokens, hidden]: they, or a tuple that begins with them."""
    with torch.no_grad():
        return block(hidden, *call.arguments, **call.keywords)


def same(one: Any, other: Any) -> bool:
    """Whether two arguments of a block are equal, and of a kind that cannot change from call to call."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):  # an empty one would be for blocks to leave something in for others
        return bool(one) and one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return (one is None or isinstance(one, bool | int | float | str)) and one == other


@contextmanager
def parameters_without_memory() -> Iterator[None]:
    """Modules made within it have parameters on torch's meta device, and buffers that are computed as usual."""
    register = nn.Module.register_parameter

    def register_without_memory(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:  # a tied one stays the same object
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = register_without_memory  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
