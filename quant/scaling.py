"""AWQ's scales of one block: which linears read what, what absorbs the inverse, and what a mixture's experts share.

A mixture's router, its shared experts and all its other experts read the same norm. One scale of each feature serves
them all: it is the one under which rounding hurts the experts least, each by the tokens that are routed to it. The
router, which is not rounded, is multiplied, too, and chooses as before. Within an expert `up` absorbs the scales of
`down`, which are the expert's own.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from tokenmill.quant import awq
from tokenmill.quant.architecture import ROUTERS
from tokenmill.quant.experts import MIN_ROWS, SeparateExperts, mixtures
from tokenmill.quant.inputs import each_expert, input_hessian
from tokenmill.quant.method import BlockSettings
from tokenmill.quant.stand_in import BlockForward

#: Of attention by latent vectors: what makes them.
_TO_LATENT = ("q_a_proj", "kv_a_proj_with_mqa")
#: What absorbs the inverse scales, and the linears that read its output; a block has some of them. They hold for
#: `SCALABLE_MODELS`, whose norms multiply by their weight.
_PAIRS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("input_layernorm", tuple(f"self_attn.{own}" for own in ("q_proj", "k_proj", "v_proj", *_TO_LATENT))),
    ("self_attn.q_a_layernorm", ("self_attn.q_b_proj",)),
    ("self_attn.kv_a_layernorm", ("self_attn.kv_b_proj",)),
    ("self_attn.v_proj", ("self_attn.o_proj",)),
    ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    ("mlp.up_proj", ("mlp.down_proj",)),
    ("mlp.shared_expert.up_proj", ("mlp.shared_expert.down_proj",)),
    ("mlp.shared_experts.up_proj", ("mlp.shared_experts.down_proj",)),
)
#: What the experts of a mixture read.
_NORM_OF_MIXTURES = "post_attention_layernorm"
SCALABLE_MODELS = (
    "llama", "mistral", "qwen2", "qwen3", "qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text",
    "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "glm4_moe",
)  # fmt: skip


def scale_inputs(block: nn.Module, run: BlockForward, batches: Sequence[torch.Tensor], settings: BlockSettings) -> None:
    """Applies AWQ's scales to a block in place; its function stays the same.

    Args:
        block: A decoder block of one of `SCALABLE_MODELS`.
        run: Its function.
        batches: Hidden states that reach it.
        settings: How its linears will be rounded.
    """
    modules: dict[str, Any] = dict(block.named_modules())
    for source_name, names in _PAIRS:
        source, readers = modules.get(source_name), [modules[name] for name in names if name in modules]
        if source is None or not readers or not _passes_on(source_name, source, readers[0], modules):
            continue
        weight = torch.cat([reader.weight.T for reader in readers], dim=1)
        scales = _search(weight, input_hessian(readers[0], run, batches), settings)
        _apply(scales, source, readers)
    for name, experts in mixtures(block).items():
        _scale_what_experts_share(block, name, experts, run, batches, settings)
        _scale_downs(block, experts, run, batches, settings)


def _passes_on(name: str, source: Any, reader: nn.Linear, modules: dict[str, Any]) -> bool:
    """Whether a factor of each feature that the source gives reaches the same feature of the reader's input."""
    if source.weight.shape[0] != reader.in_features:
        return False  # grouped-query attention: one value feature feeds several inputs of o_proj
    # OLMoE's values may be cut off, at limits which do not move with them.
    return name != "self_attn.v_proj" or not getattr(modules["self_attn"].config, "clip_qkv", None)


def _scale_what_experts_share(
    block: nn.Module,
    name: str,
    experts: SeparateExperts,
    run: BlockForward,
    batches: Sequence[torch.Tensor],
    settings: BlockSettings,
) -> None:
    parent = block.get_submodule(name.rpartition(".")[0])
    routers = [module for own, module in parent.named_children() if own in ROUTERS]
    shared = [
        linear
        for own in ("shared_expert", "shared_experts")
        if (module := getattr(parent, own, None)) is not None
        for linear in (module.gate_proj, module.up_proj)
    ]
    hessian = input_hessian(experts, run, batches)
    tried = awq.candidates(hessian.diagonal())
    errors = [0.0] * len(tried)
    rows = sum(batch.shape[:2].numel() for batch in batches)

    def add(readers: Sequence[nn.Linear], hessian: torch.Tensor, share: float) -> None:
        weight = torch.cat([reader.weight.T for reader in readers], dim=1)
        found = awq.output_errors(weight, hessian, tried, *_rounding(weight, settings))
        errors[:] = [total + share * error for total, error in zip(errors, found, strict=True)]

    if shared:
        add(shared, hessian, 1.0)
    for expert, inputs in each_expert(block, experts, False, run, batches):
        if inputs.rows >= MIN_ROWS:
            add(_linears(experts[expert])[:2], inputs.hessian, inputs.rows / rows)
    # With no expert of which enough is known all errors are equal, and the first of the scales changes nothing.
    readers = [*routers, *shared, *(linear for expert in experts for linear in _linears(expert)[:2])]
    _apply(awq.least(tried, errors), block.get_submodule(_NORM_OF_MIXTURES), readers)


def _scale_downs(
    block: nn.Module,
    experts: SeparateExperts,
    run: BlockForward,
    batches: Sequence[torch.Tensor],
    settings: BlockSettings,
) -> None:
    for expert, inputs in each_expert(block, experts, True, run, batches):
        if inputs.rows >= MIN_ROWS:
            _, up, down = _linears(experts[expert])
            _apply(_search(down.weight.T, inputs.hessian, settings), up, [down])


def _linears(expert: Any) -> list[nn.Linear]:
    """Gate, up and down."""
    return [expert.get_submodule(name) for name in expert.names]


def _rounding(weight: torch.Tensor, settings: BlockSettings) -> tuple[int, bool, torch.dtype]:
    group_size = weight.shape[0] if settings.group_size == -1 else settings.group_size
    return group_size, settings.symmetric, settings.scale_dtype


def _search(weight: torch.Tensor, hessian: torch.Tensor, settings: BlockSettings) -> torch.Tensor:
    return awq.search_scales(weight, hessian, *_rounding(weight, settings))


def _apply(scales: torch.Tensor, source: Any, readers: Iterable[Any]) -> None:
    for reader in readers:
        reader.weight.mul_(scales)
    source.weight.div_(scales.unsqueeze(1) if source.weight.dim() == 2 else scales)
    if getattr(source, "bias", None) is not None:
        source.bias.div_(scales)
