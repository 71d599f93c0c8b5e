"""The experts of a mixture as linears of their own, as checkpoints store them; transformers merges them to two tensors.

What is not merged has a name in the checkpoint, is quantized as any other linear, and is written as it was called.
"""

import re
from typing import Any

import torch
from torch import nn

#: Rows with fewer are too few to say how an expert's inputs depend on each other: it is rounded to nearest.
MIN_ROWS = 64
_MERGED = {"gate_up_proj", "down_proj"}
_STORED = re.compile(r"experts\.\*\.(\w+)\.weight$")


class Expert(nn.Module):
    """down(activation(gate(x)) * up(x)), with linears that are called as in the checkpoint.

    Args:
        names: What the checkpoint calls gate, up and down.
        hidden: Features of x.
        inner: Features between.
        activation: A module without parameters.
    """

    def __init__(self, names: tuple[str, str, str], hidden: int, inner: int, activation: nn.Module) -> None:
        super().__init__()
        self.names = names
        for name, K, N in zip(names, (hidden, hidden, inner), (inner, inner, hidden), strict=True):
            self.add_module(name, nn.Linear(K, N, bias=False, device="meta"))
        self.activation = activation

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """What `down` reads."""
        gate, up = (self.get_submodule(name) for name in self.names[:2])
        product: torch.Tensor = self.activation(gate(x)) * up(x)
        return product

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, hidden] to the same."""
        result: torch.Tensor = self.get_submodule(self.names[2])(self.product(x))
        return result


class SeparateExperts(nn.ModuleList):
    """Takes the place of a module of transformers that holds all experts of a block; computes the same."""

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """The sum of what each row's experts make of it, by their weights.

        Args:
            hidden_states: [rows, hidden].
            top_k_index: [rows, k], an expert each.
            top_k_weights: [rows, k].
        """
        out = torch.zeros_like(hidden_states)
        for index, expert in enumerate(self):
            rows, places = torch.where(top_k_index == index)
            if rows.numel():
                result = expert(hidden_states[rows]) * top_k_weights[rows, places, None]
                out.index_add_(0, rows, result.to(out.dtype))
        return out

    def sets(self, name: str) -> list[tuple[str, ...]]:
        """Full names of the linears that read the same, under this module's own name: gate and up, then down."""
        experts: list[Any] = list(self)
        inner = [tuple(f"{name}.{i}.{own}" for own in expert.names[:2]) for i, expert in enumerate(experts)]
        return inner + [(f"{name}.{i}.{expert.names[2]}",) for i, expert in enumerate(experts)]


def separate(model: Any) -> None:
    """Puts `SeparateExperts` in the place of merged ones, where the checkpoints of the model's kind have them apart.

    Args:
        model: A model of transformers without weights. Experts of other forms stay as they are: with biases,
            activations of their own or merged in the files, too.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter
        from transformers.integrations.moe import _default_apply_gate
    except ImportError:  # before version 5 nothing was merged
        return
    stored: dict[str, list[str]] = {}
    for change in get_model_conversion_mapping(model):
        if isinstance(change, WeightConverter):
            names = [match[1] for pattern in change.source_patterns if (match := _STORED.search(pattern))]
            stored.setdefault(change.target_patterns[0].rpartition(".")[2], names)
    names = [*stored.get("gate_up_proj", ()), *stored.get("down_proj", ())]
    if len(names) != 3:
        return
    for parent in list(model.get_decoder().modules()):
        for name, module in parent.named_children():
            form = [getattr(module, key, None) for key in ("has_gate", "has_bias", "is_transposed", "is_concatenated")]
            own = {key for key, _ in module.named_parameters()}
            if (
                form == [True, False, False, True]
                and own == _MERGED
                and type(module)._apply_gate is _default_apply_gate
            ):
                number, hidden, inner = module.down_proj.shape
                experts = (Expert((names[0], names[1], names[2]), hidden, inner, module.act_fn) for _ in range(number))
                setattr(parent, name, SeparateExperts(experts))


def mixtures(block: nn.Module) -> dict[str, SeparateExperts]:
    """The modules of a block that hold experts, by their names within it."""
    return {name: module for name, module in block.named_modules() if isinstance(module, SeparateExperts)}
