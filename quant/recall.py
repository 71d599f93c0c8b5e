"""What the finished parts of a block gave for each batch, so that they are not computed for every linear after them.

The sets of a block's linears are quantized one after the other, and each set's inputs need the block up to it: without
this the attention of a Llama block would run once for each set and again for the next block's inputs.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from tokenmill.quant.stand_in import BlockForward

#: Bytes that are kept of a block: half of the hidden states that 128 x 2048 tokens of an 8B model have in bfloat16. Of
#: the batches beyond, parts are computed again.
MAX_BYTES = 2**30


class Recall:
    """Stands between a block's parts (its direct children that hold linears) and their callers.

    Args:
        block: The block; it must not change but for the linears that `finish` names.
        sets: Names of its linears, set by set in the order in which they run.
        calls: How often each part runs in one pass.
    """

    def __init__(self, block: nn.Module, sets: Sequence[Sequence[str]], calls: Counter[str]) -> None:
        self._parameters = dict(block.named_parameters())
        self._last_set = {
            part: max(index for index, names in enumerate(sets) for name in names if name.startswith(f"{part}."))
            for part, times in calls.items()
            if times == 1 and any(name.startswith(f"{part}.") for names in sets for name in names)
        }
        self._done: set[str] = set()
        self._kept: dict[tuple[str, int], torch.Tensor | tuple[Any, ...]] = {}
        self._room = MAX_BYTES
        self._batch = 0
        self._is_last_pass = False
        self._modules: list[nn.Module] = []
        self._attach(block)

    def _attach(self, block: nn.Module) -> None:
        for part in self._last_set:
            module = block.get_submodule(part)
            module.forward = self._in_place_of(part, module.forward)
            self._modules.append(module)

    def _in_place_of(self, part: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def recalled(*arguments: Any, **keywords: Any) -> Any:
            key = (part, self._batch)
            if key in self._kept:
                return _copy(self._kept.pop(key) if self._is_last_pass else self._kept[key])
            output = forward(*arguments, **keywords)
            if part in self._done and not self._is_last_pass:
                self._keep(key, output)
            return output

        return recalled

    def _keep(self, key: tuple[str, int], output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        if not isinstance(first, torch.Tensor) or (
            isinstance(output, tuple) and any(x is not None for x in output[1:])
        ):
            return
        size = first.numel() * first.element_size()
        if size <= self._room:
            self._room -= size
            self._kept[key] = _copy(output)

    def run(self, run: BlockForward) -> BlockForward:
        """The block's function; batches are told apart by their identity, so they have to stay alive."""

        def remembering(hidden: torch.Tensor) -> torch.Tensor:
            self._batch = id(hidden)
            return run(hidden)

        return remembering

    def finish(self, index: int) -> None:
        """The linears of this set, and of all before it, will not change any more."""
        self._done |= {part for part, last in self._last_set.items() if last <= index}

    def last_pass(self, block: nn.Module) -> None:
        """The next pass is the last, through `block`: what it has no use for is forgotten, and all if it differs."""
        other = dict(block.named_parameters())
        if not all(torch.equal(parameter, other[name]) for name, parameter in self._parameters.items()):
            self._kept.clear()
        self._is_last_pass = True
        self.let_go()
        self._attach(block)

    def let_go(self) -> None:
        """Leaves the block as it was: a module and its stand-in hold each other, and the collector seldom looks.

        Each block would stay in memory, and in the end the whole model.
        """
        for module in self._modules:
            del module.forward
        self._modules.clear()
        self._parameters.clear()


def _copy(output: Any) -> Any:
    # The caller may add to it in place.
    return (output[0].clone(), *output[1:]) if isinstance(output, tuple) else output.clone()
