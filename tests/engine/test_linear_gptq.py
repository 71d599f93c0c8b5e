"""Layers of GPTQ checkpoints that stock vLLM refuses: whole, merged, and cut for tensor parallelism.

Each test makes vLLM's own layers as one rank of several would, loads them as vLLM loads a checkpoint and multiplies.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from tests.engine.int4_models import quantize
from tokenmill.errors import CheckpointError
from tokenmill.kernels.int4_gemm.weight import Int4Weight, dequantize
from tokenmill.quant.format import Scheme, write_config
from tokenmill.quant.pack import write_layer

pytestmark = pytest.mark.filterwarnings("ignore")

ASYMMETRIC = Scheme("gptq", 64, False)
RAGGED = Scheme("gptq", 96, True)
ORDERED = Scheme("gptq", 32, True, act_order=True)
CHANNEL = Scheme("gptq", -1, False)


@dataclass
class Rank:
    """Which of how many ranks this process plays."""

    rank: int = 0
    size: int = 1


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Rank:
    """vLLM's layers ask here for their rank; a test sets it before it makes one."""
    from vllm.model_executor import parameter
    from vllm.model_executor.layers import linear, vocab_parallel_embedding

    from tokenmill.engine.vllm import linear_gptq

    place = Rank()
    for module in (parameter, linear, vocab_parallel_embedding, linear_gptq):
        monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: place.rank)
        monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: place.size, raising=False)
    return place


def config(scheme: Scheme, **changes: Any) -> Any:
    from tokenmill.engine.vllm.linear_gptq import WideGPTQConfig

    return WideGPTQConfig.from_config({**write_config(scheme), **changes})


def weight(K: int, N: int, scheme: Scheme, seed: int = 0) -> Int4Weight:
    generator = torch.Generator().manual_seed(seed)
    return quantize(torch.randn(N, K, generator=generator) * 0.1, scheme)


def load(layer: Any, tensors: dict[str, torch.Tensor], *shard: Any) -> None:
    """As a model's `load_weights` does."""
    parameters = dict(layer.named_parameters())
    for name, tensor in tensors.items():
        parameters[name].weight_loader(parameters[name], tensor, *shard)


def multiply(layer: Any, x: torch.Tensor) -> torch.Tensor:
    layer.quant_method.process_weights_after_loading(layer)
    out: torch.Tensor = layer.quant_method.apply(layer, x)
    return out


def rows_of(made: Any, K: int, N: int) -> Any:
    from vllm.model_executor.layers.linear import RowParallelLinear

    return RowParallelLinear(K, N, bias=False, params_dtype=torch.float32, quant_config=made, prefix="model.down_proj")


def merged_of(made: Any, K: int, sizes: list[int]) -> Any:
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear

    return MergedColumnParallelLinear(
        K, sizes, bias=False, params_dtype=torch.float32, quant_config=made, prefix="model.gate_up_proj"
    )


def check(out: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2 * float(expected.abs().max()))


@pytest.mark.parametrize("scheme", [ASYMMETRIC, RAGGED, ORDERED, CHANNEL], ids=str)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_that_share_the_inputs_add_up(scheme: Scheme, size: int, ranks: Rank) -> None:
    """Scales come whole to every rank, which needs those of its own rows only."""
    K, N = 256, 40
    whole = weight(K, N, scheme)
    x = torch.randn(3, K, generator=torch.Generator().manual_seed(1))
    total = torch.zeros(3, N)
    for ranks.rank in range(size):
        ranks.size = size
        layer = rows_of(config(scheme), K, N)
        load(layer, write_layer(whole, scheme))
        total += multiply(layer, x[:, ranks.rank * K // size : (ranks.rank + 1) * K // size].contiguous())
    check(total, x @ dequantize(whole, torch.float32))


@pytest.mark.parametrize("scheme", [ASYMMETRIC, CHANNEL, Scheme("gptq", 64, True), ORDERED], ids=str)
@pytest.mark.parametrize("widths", [(204, 204), (12, 20)])
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("fused", [False, True], ids=["apart", "fused on disk"])
def test_merged_layers_of_any_width(
    scheme: Scheme, widths: tuple[int, int], size: int, fused: bool, ranks: Rank
) -> None:
    """Zero points are packed eight a word along the outputs, where layers of other widths meet within a word."""
    K = 132
    parts = [weight(K, N, scheme, seed) for seed, N in enumerate(widths)]
    x = torch.randn(2, K, generator=torch.Generator().manual_seed(1))
    ranks.size = size
    for ranks.rank in range(size):
        layer = merged_of(config(scheme), K, list(widths))
        if fused:
            load(layer, write_layer(concatenate(parts), scheme))
        else:
            for shard, part in enumerate(parts):
                load(layer, write_layer(part, scheme), shard)
        own = [dequantize(part, torch.float32).chunk(size, dim=1)[ranks.rank] for part in parts]
        check(multiply(layer, x), x @ torch.cat(own, dim=1))


def concatenate(parts: list[Int4Weight]) -> Int4Weight:
    """The layers side by side, as some models store them."""

    def join(name: str) -> Any:
        tensors = [getattr(part, name) for part in parts]
        return None if tensors[0] is None else torch.cat(tensors, dim=1)

    first = parts[0]
    return Int4Weight(join("codes"), join("scales"), first.group_size, first.K, join("zeros"), first.g_idx)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_size": None}, "group_size=None is neither a positive integer nor -1"),
        ({"group_size": 0}, "group_size=0 is neither"),
        ({"group_size": "128"}, "group_size='128' is neither"),
        ({"dynamic": ["-:.*down_proj"]}, r"dynamic=\['-:.*down_proj'\]; it must be an object of objects"),
        ({"dynamic": {"+:.*down_proj": 32}}, "it must be an object of objects"),
        ({"dynamic": {"+:.*down_proj": {"group_size": 0}}}, "group_size=0 is neither"),
    ],
)
def test_settings_by_which_no_layer_can_be_read_are_one_line(changes: dict[str, Any], message: str) -> None:
    """The engine ended with a division by zero, or with the name of a missing key alone."""
    with pytest.raises(CheckpointError, match=message):
        config(RAGGED, **changes)
    missing = {key: value for key, value in write_config(RAGGED).items() if key != "group_size"}
    with pytest.raises(CheckpointError, match="quantization_config has no 'group_size'"):
        type(config(RAGGED)).from_config(missing)


def test_rules_for_more_bits_are_left_to_the_layers() -> None:
    assert config(RAGGED, dynamic={"+:.*down_proj": {"bits": 8, "group_size": 32}}).dynamic


@pytest.mark.usefixtures("ranks")
def test_a_layer_of_more_bits_that_nothing_here_can_run_is_named() -> None:
    made = config(Scheme("gptq", 32, True), dynamic={"+:.*down_proj": {"bits": 8}})
    with pytest.raises(CheckpointError, match=r"^model\.down_proj is 8-bit GPTQ.*our kernel takes 4 bits, not 8; nor"):
        rows_of(made, 64, 32)


def test_a_shard_that_cuts_a_word_is_refused(ranks: Rank) -> None:
    ranks.size = 2
    with pytest.raises(CheckpointError, match=r"model\.down_proj is 4-bit GPTQ.*: a shard has 68 features.*smaller"):
        rows_of(config(ASYMMETRIC), 136, 16)


@pytest.mark.usefixtures("ranks")
def test_a_rule_for_some_layers_is_followed() -> None:
    """The base scheme is one that stock takes, the layer's is not."""
    scheme = Scheme("gptq", 16, False)
    made = config(Scheme("gptq", 32, True), dynamic={r"+:.*down_proj": {"group_size": 16, "sym": False}})
    whole = weight(64, 24, scheme)
    layer = rows_of(made, 64, 24)
    load(layer, write_layer(whole, scheme))
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(1))
    check(multiply(layer, x), x @ dequantize(whole, torch.float32))


@pytest.mark.parametrize("scheme", [ASYMMETRIC, ORDERED, Scheme("gptq", 32, True)], ids=str)
@pytest.mark.parametrize("size", [1, 2])
def test_an_output_layer_of_any_vocabulary(scheme: Scheme, size: int, ranks: Rank) -> None:
    """vLLM fills it up to a multiple of 64 words, of which the checkpoint has none."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    K, words = 64, 180
    whole = weight(K, words, scheme)
    x = torch.randn(2, K, generator=torch.Generator().manual_seed(1))
    ranks.size, parts = size, []
    for ranks.rank in range(size):
        layer = ParallelLMHead(
            words, K, params_dtype=torch.float32, quant_config=config(scheme, lm_head=True), prefix="lm_head"
        )
        load(layer, write_layer(whole, scheme))
        parts.append(multiply(layer, x))
    check(torch.cat(parts, dim=1)[:, :words], x @ dequantize(whole, torch.float32))


@pytest.mark.usefixtures("ranks")
def test_merged_layers_that_disagree_about_the_order_are_refused() -> None:
    layer = merged_of(config(ORDERED), 64, [16, 16])
    tensors = write_layer(weight(64, 16, ORDERED), ORDERED)
    load(layer, tensors, 0)
    with pytest.raises(CheckpointError, match=r"model\.gate_up_proj: layers that vLLM merges.*different g_idx"):
        load(layer, {**tensors, "g_idx": tensors["g_idx"].flip(0).contiguous()}, 1)


def without_order(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["g_idx"]


def group_out_of_range(tensors: dict[str, torch.Tensor]) -> None:
    tensors["g_idx"][3] = 99


def group_negative(tensors: dict[str, torch.Tensor]) -> None:
    tensors["g_idx"][3] = -1


def scale_infinite(tensors: dict[str, torch.Tensor]) -> None:
    tensors["scales"][1, 2] = float("inf")


@pytest.mark.usefixtures("ranks")
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_order, r"model\.down_proj\.g_idx is missing"),
        (group_out_of_range, r"model\.down_proj: g_idx\[3\]=99 must be in 0\.\.1"),
        (group_negative, r"model\.down_proj: g_idx\[3\]=-1 must be in 0\.\.1"),
        (scale_infinite, r"model\.down_proj: scales\[1, 2\]=inf must be finite"),
    ],
)
def test_a_damaged_layer_is_named(damage: Callable[[dict[str, torch.Tensor]], None], message: str) -> None:
    layer = rows_of(config(ORDERED), 64, 16)
    tensors = write_layer(weight(64, 16, ORDERED), ORDERED)
    damage(tensors)
    load(layer, tensors)
    with pytest.raises(CheckpointError, match=message):
        layer.quant_method.process_weights_after_loading(layer)


@pytest.mark.usefixtures("ranks")
def test_where_our_kernel_cannot_vllms_own_method_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenmill.engine.vllm import linear_kernel

    monkeypatch.setattr(linear_kernel, "why_not", lambda *arguments, **options: "not here")
    taken = rows_of(config(Scheme("gptq", 32, True)), 64, 32)
    assert type(taken.quant_method.stock).__name__ == "AutoGPTQLinearMethod"
    assert type(taken.quant_method.stock.kernel).__name__ != "TokenmillLinearKernel"
    with pytest.raises(
        CheckpointError, match=r"model\.down_proj is 4-bit GPTQ with group_size=64, sym=False.*not here"
    ):
        rows_of(config(ASYMMETRIC), 64, 32)


@pytest.mark.parametrize(
    ("changes", "claimed"),
    [
        ({}, True),
        ({"desc_act": True}, True),
        ({"bits": 8}, False),
        ({"quant_method": "awq"}, False),
        ({"checkpoint_format": "marlin"}, False),
    ],
)
def test_four_bit_gptq_is_claimed(changes: dict[str, Any], claimed: bool) -> None:
    from tokenmill.engine.vllm.linear_gptq import NAME, WideGPTQConfig

    said = {**write_config(RAGGED), **changes}
    assert WideGPTQConfig.override_quantization_method(said, None) == (NAME if claimed else None)
    assert WideGPTQConfig.override_quantization_method(said, "moe_wna16") is None


@pytest.mark.parametrize("scheme", [ASYMMETRIC, ORDERED], ids=str)
def test_experts_that_cannot_be_loaded_get_one_line(scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenmill.engine.vllm import compat, linear_gptq

    class Experts:
        """In the place of vLLM's, which need a running engine."""

    monkeypatch.setattr(linear_gptq, "RoutedExperts", Experts)
    if not scheme.act_order:  # on a CPU they load; see test_linear_experts.py
        monkeypatch.setattr(compat, "on_cpu", lambda: False)
    with pytest.raises(CheckpointError, match=r"model\.experts: experts in 4-bit GPTQ.*quantize them with sym=True"):
        config(scheme).get_quant_method(Experts(), "model.experts")
