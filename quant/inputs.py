"""What linears of a block read: Hessians of their inputs, found by running the block as far as to them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tokenmill.quant.experts import SeparateExperts
from tokenmill.quant.stand_in import BlockForward


class _ReachedError(Exception):
    """Ends a forward pass once the inputs that were wanted have been seen."""


def _run_up_to(
    module: nn.Module, look: Callable[..., None], run: BlockForward, batches: Iterable[torch.Tensor]
) -> None:
    """Gives `look` what the module is called with for each batch; each forward pass ends there."""

    def hook(_module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        look(*arguments)
        raise _ReachedError

    handle = module.register_forward_pre_hook(hook)
    try:
        for batch in batches:
            try:
                run(batch)
            except _ReachedError:
                continue
    finally:
        handle.remove()


def input_hessian(
    module: nn.Linear | SeparateExperts, run: BlockForward, batches: Sequence[torch.Tensor]
) -> torch.Tensor:
    """The mean of x x' over all inputs x of a linear, or of a mixture, whoever of its experts they go to.

    Args:
        module: A part of the block that `run` runs.
        run: The block's function.
        batches: Hidden states that reach the block; at least one.

    Returns:
        [K, K] float32.
    """
    total, count = torch.zeros(()), 0

    def look(inputs: torch.Tensor, *_: torch.Tensor) -> None:
        nonlocal total, count
        rows = inputs.reshape(-1, inputs.shape[-1]).float()
        if not count:
            total = torch.zeros(rows.shape[1], rows.shape[1], device=rows.device)
        total.addmm_(rows.T, rows)
        count += rows.shape[0]

    _run_up_to(module, look, run, batches)
    return total / max(count, 1)


@dataclass
class ExpertInputs:
    """What is known of the inputs of some linears of one expert.

    Attributes:
        hessian: [K, K] float32, the mean of x x'.
        rows: Of how many.
    """

    hessian: torch.Tensor
    rows: int = 0


def expert_inputs(
    experts: SeparateExperts, chosen: Sequence[int], of_down: bool, run: BlockForward, batches: Iterable[torch.Tensor]
) -> list[ExpertInputs]:
    """Looks at the rows that are routed to some experts; each forward pass ends at them.

    Args:
        experts: A part of the block that `run` runs.
        chosen: Which experts; memory is taken for K x K numbers of each.
        of_down: Whether the inputs of `down` are meant, which the weights of gate and up decide.
        run: The block's function.
        batches: Hidden states that reach the block.
    """
    first: Any = experts[chosen[0]]
    linear: nn.Linear = first.get_submodule(first.names[2 if of_down else 0])
    K, device = linear.in_features, linear.weight.device
    found = [ExpertInputs(torch.zeros(K, K, device=device)) for _ in chosen]

    def look(hidden: torch.Tensor, index: torch.Tensor, *_: torch.Tensor) -> None:
        for expert, inputs in zip(chosen, found, strict=True):
            rows = hidden[(index == expert).any(dim=-1)]
            if not rows.shape[0]:
                continue
            module: Any = experts[expert]
            seen = (module.product(rows) if of_down else rows).float()
            inputs.hessian.addmm_(seen.T, seen)
            inputs.rows += rows.shape[0]

    _run_up_to(experts, look, run, batches)
    for inputs in found:
        inputs.hessian.div_(max(inputs.rows, 1))
    return found


def each_expert(
    block: nn.Module, experts: SeparateExperts, of_down: bool, run: BlockForward, batches: Sequence[torch.Tensor]
) -> Iterator[tuple[int, ExpertInputs]]:
    """`expert_inputs` of all experts, one after the other.

    A pass over the batches looks at as many experts as have Hessians that take no more memory than the block itself.
    """
    room = sum(parameter.numel() * parameter.element_size() for parameter in block.parameters())
    first: Any = experts[0]
    K = first.get_submodule(first.names[2 if of_down else 0]).in_features
    at_once = max(1, room // (4 * K**2))
    for start in range(0, len(experts), at_once):
        chosen = range(start, min(start + at_once, len(experts)))
        yield from zip(chosen, expert_inputs(experts, chosen, of_down, run, batches), strict=True)
