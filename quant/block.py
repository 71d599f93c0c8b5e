"""Quantizing one decoder block in memory: which linears share an input, scaling, rounding.

The linears are found by running the block: those that read the very same tensor form a set (query, key and value;
gate and up) and share one Hessian. Sets are quantized in the order in which they run, each seeing the inputs that
the already quantized sets before it produce.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from tokenmill.errors import InputError
from tokenmill.kernels.int4_gemm.weight import Int4Weight, dequantize
from tokenmill.quant.architecture import ROUTERS
from tokenmill.quant.experts import MIN_ROWS, SeparateExperts, mixtures
from tokenmill.quant.gptq import gptq, relative_error
from tokenmill.quant.inputs import each_expert, input_hessian
from tokenmill.quant.method import BlockSettings
from tokenmill.quant.recall import Recall
from tokenmill.quant.rtn import round_to_nearest
from tokenmill.quant.scaling import scale_inputs
from tokenmill.quant.stand_in import BlockForward

#: Linears that vLLM merges, to the name of what they become.
_MERGED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"}
_MERGED |= {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}


@dataclass(frozen=True)
class QuantizedBlock:
    """The result for one block.

    Attributes:
        layers: The INT4 weight of each linear, by its name within the block.
        errors: Relative square error of each linear's output, by its name; empty without calibration, and without
            experts that too few tokens reach.
        recall: What its parts gave for the batches; None without calibration.
    """

    layers: dict[str, Int4Weight]
    errors: dict[str, float]
    recall: Recall | None = None


def linears(block: nn.Module) -> dict[str, nn.Linear]:
    """Every linear of the block that is quantized, by its name within it: all but those that choose experts."""
    return {
        name: module
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] not in ROUTERS
    }


def check_linears(block: nn.Module, settings: BlockSettings) -> None:
    """Refuses a block that cannot be quantized as wanted; it needs no weights.

    Raises:
        InputError: There is no linear, or there are experts in a form that is not known, or the group size does not
            divide an input size; the message names the linear.
    """
    found = linears(block)
    for name, parameter in block.named_parameters():
        if parameter.dim() > 2 and not isinstance(block.get_submodule(name.rpartition(".")[0]), nn.Conv1d):
            raise InputError(
                f"{name} is {parameter.dim()}-dimensional; experts are quantized where files have gate, up and down of "
                "each, as Mixtral's and Qwen3-MoE's do"
            )
    separate = tuple(f"{name}." for name in mixtures(block))
    if kept := [name for name in found if ".experts." in f".{name}" and not name.startswith(separate)]:
        raise InputError(f"{kept[0]} is an expert; they are quantized where transformers merges them, as Mixtral's")
    if not found:
        raise InputError("a block of the model has no linear layer; there is nothing to quantize")
    for name, module in found.items():
        if settings.group_size != -1 and module.in_features % settings.group_size:
            raise InputError(
                f"{name} has K={module.in_features} inputs, no multiple of group_size={settings.group_size}; "
                "choose one that divides it, or -1 (per channel)"
            )


def served_sizes(block: nn.Module) -> list[tuple[int, int]]:
    """(K, N) of the block's layers as vLLM runs them, with those that it merges into one; it needs no weights."""
    sizes: dict[str, tuple[int, int]] = {}
    for name, module in linears(block).items():
        parent, _, own = name.rpartition(".")
        merged = f"{parent}.{_MERGED.get(own, own)}"
        sizes[merged] = (module.in_features, sizes.get(merged, (0, 0))[1] + module.out_features)
    return list(sizes.values())


def groups_by_input(
    block: nn.Module, run: BlockForward, hidden: torch.Tensor, calls: Counter[str] | None = None
) -> list[tuple[str, ...]]:
    """Names of the linears that read the same tensor, set by set in the order in which they run.

    All linears of a mixture's experts are one set, because which of them run depends on the tokens.

    Args:
        block: The decoder block.
        run: Its function.
        hidden: Any input of it, [batch, tokens, hidden]; only the first of the batch is run.
        calls: Is told how often each child of the block runs.
    """
    sets: list[tuple[torch.Tensor, list[str]]] = []  # keeps the tensors alive, so that identity means sameness

    def note(name: str) -> object:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            if sets and sets[-1][0] is inputs[0]:
                sets[-1][1].append(name)
            else:
                sets.append((inputs[0], [name]))

        return hook

    def note_experts(name: str, experts: SeparateExperts) -> object:
        names = [linear for own in experts.sets(name) for linear in own]
        return lambda _module, _inputs: sets.append((torch.empty(0), names))

    apart = mixtures(block)
    of_experts = {linear for name, experts in apart.items() for own in experts.sets(name) for linear in own}
    singles = ((name, module) for name, module in linears(block).items() if name not in of_experts)
    hooks = [module.register_forward_pre_hook(note(name)) for name, module in singles]  # type: ignore[arg-type]
    for name, experts in apart.items():
        hooks.append(experts.register_forward_pre_hook(note_experts(name, experts)))  # type: ignore[arg-type]
    if calls is not None:
        for name, module in block.named_children():
            hooks.append(module.register_forward_pre_hook(lambda _module, _inputs, name=name: calls.update([name])))
    try:
        run(hidden[:1])
    finally:
        for hook in hooks:
            hook.remove()
    return [tuple(names) for _, names in sets]


def quantize_block(
    block: nn.Module, run: BlockForward, batches: Sequence[torch.Tensor], settings: BlockSettings
) -> QuantizedBlock:
    """Quantizes every linear of a block and puts the dequantized weights in their places.

    With a scaling method norms and routers of the block change, too.

    Args:
        block: The decoder block, weights in floating point; changed in place.
        run: Its function on hidden states [batch, tokens, hidden].
        batches: Hidden states that reach it; at least one unless the method is rtn.
        settings: How.

    Raises:
        InputError: The group size does not divide an input size; the message names the linear.
    """
    check_linears(block, settings)
    found = linears(block)
    result = QuantizedBlock({}, {})
    recall: Recall | None = None
    if not settings.needs_calibration:
        _round_to_nearest(found, tuple(found), settings, result)
    else:
        calls: Counter[str] = Counter()
        sets = groups_by_input(block, run, batches[0], calls)
        if settings.scales_inputs:
            scale_inputs(block, run, batches, settings)
        recall = Recall(block, sets, calls)
        run = recall.run(run)
        for index, names in enumerate(sets):
            experts = next((name for name in mixtures(block) if names[0].startswith(f"{name}.")), None)
            if experts is not None:
                _quantize_experts(block, experts, run, batches, settings, result)
            else:
                _quantize_set(found, names, input_hessian(found[names[0]], run, batches), settings, result)
            recall.finish(index)
    return replace(result, recall=recall)


def _round_to_nearest(
    found: dict[str, nn.Linear], names: Sequence[str], settings: BlockSettings, result: QuantizedBlock
) -> None:
    for name in names:
        module = found[name]
        group_size = module.in_features if settings.group_size == -1 else settings.group_size
        weight = round_to_nearest(module.weight.T, group_size, settings.symmetric, settings.scale_dtype)
        result.layers[name] = weight
        module.weight.copy_(dequantize(weight, module.weight.dtype).T)


def _quantize_set(
    found: dict[str, nn.Linear],
    names: Sequence[str],
    hessian: torch.Tensor,
    settings: BlockSettings,
    result: QuantizedBlock,
) -> None:
    """Quantizes linears that read the same."""
    weights = [found[name].weight.T.float() for name in names]
    together = _quantize_linear(torch.cat(weights, dim=1), hessian, settings)
    column = 0
    for name, weight in zip(names, weights, strict=True):
        result.layers[name] = _columns(together, column, column + weight.shape[1])
        result.errors[name] = relative_error(weight, result.layers[name], hessian)
        found[name].weight.copy_(dequantize(result.layers[name], found[name].weight.dtype).T)
        column += weight.shape[1]


def _quantize_experts(
    block: nn.Module,
    name: str,
    run: BlockForward,
    batches: Sequence[torch.Tensor],
    settings: BlockSettings,
    result: QuantizedBlock,
) -> None:
    """Quantizes gate and up of all experts, then their downs, which see what the quantized ones give."""
    found, experts = linears(block), mixtures(block)[name]
    sets = experts.sets(name)
    for of_down in (False, True):
        own = sets[len(experts) :] if of_down else sets[: len(experts)]
        for expert, inputs in each_expert(block, experts, of_down, run, batches):
            if inputs.rows < MIN_ROWS:
                _round_to_nearest(found, own[expert], settings, result)
            else:
                _quantize_set(found, own[expert], inputs.hessian, settings, result)


def _quantize_linear(weight: torch.Tensor, hessian: torch.Tensor, settings: BlockSettings) -> Int4Weight:
    group_size = weight.shape[0] if settings.group_size == -1 else settings.group_size
    if settings.compensates:
        return gptq(weight, hessian, group_size, settings.symmetric, settings.scale_dtype, settings.gptq)
    return round_to_nearest(weight, group_size, settings.symmetric, settings.scale_dtype, hessian.diagonal())


def _columns(weight: Int4Weight, start: int, stop: int) -> Int4Weight:
    """The output features start..stop of a weight; a column is rounded the same whatever stands beside it."""
    return Int4Weight(
        codes=weight.codes[:, start:stop].contiguous(),
        scales=weight.scales[:, start:stop].contiguous(),
        group_size=weight.group_size,
        K=weight.K,
        zeros=None if weight.zeros is None else weight.zeros[:, start:stop].contiguous(),
        # A copy, because safetensors refuses tensors that share memory.
        g_idx=None if weight.g_idx is None else weight.g_idx.clone(),
    )
