"""The memory planner, against sizes that are known."""

from typing import Any

import pytest

from tokenmill.errors import CheckpointError, InputError
from tokenmill.quant.memory import Plan, plan

LLAMA_70B: dict[str, Any] = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
LLAMA_8B = LLAMA_70B | {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
MIXTRAL = LLAMA_8B | {"vocab_size": 32000, "num_local_experts": 8}


def parameters(planned: Plan) -> int:
    return sum(component.parameters for component in planned.components)


def test_a_70b_model_shrinks_from_140_to_between_35_and_40_gigabytes() -> None:
    planned = plan(LLAMA_70B)
    assert parameters(planned) == 70_553_706_496  # as its model card counts
    assert planned.full_bytes == pytest.approx(141.1e9, rel=0.001)
    assert 35e9 < planned.weight_bytes < 40e9
    assert plan(LLAMA_70B, bits=16).weight_bytes == planned.full_bytes


def test_counts_match_the_model_cards() -> None:
    assert parameters(plan(LLAMA_8B)) == 8_030_261_248
    assert parameters(plan(MIXTRAL)) == 46_702_792_704
    tied = LLAMA_8B | {"tie_word_embeddings": True}
    assert parameters(plan(LLAMA_8B)) - parameters(plan(tied)) == 128256 * 4096


def test_qwen_has_biases_on_query_key_and_value() -> None:
    """Qwen2.5-7B, 7,615,616,512 parameters."""
    qwen = {
        "model_type": "qwen2",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
    }
    assert parameters(plan(qwen)) == 7_615_616_512


def test_the_kv_cache_grows_with_layers_heads_context_and_requests() -> None:
    planned = plan(LLAMA_70B, context=1000, requests=3)
    assert planned.kv_bytes_per_token == 2 * 80 * 8 * 128 * 2
    assert planned.kv_bytes == 3000 * planned.kv_bytes_per_token
    assert plan(LLAMA_70B, kv_bits=8).kv_bytes_per_token * 2 == planned.kv_bytes_per_token
    assert planned.total_bytes == planned.weight_bytes + planned.kv_bytes + planned.activation_bytes


def test_scales_cost_what_they_weigh_on_disk() -> None:
    """A [4096, 4096] layer at g128 has 32 x 4096 scales of two bytes; zero points add half a byte each."""
    one = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "vocab_size": 1,
    }
    groups = 4 * 128 + 2 * 256 + 2 * 128
    symmetric = {c.name: c.overhead_bytes for c in plan(one).components}
    assert symmetric["attention"] + symmetric["feed-forward"] == groups * 2
    asymmetric = {c.name: c.overhead_bytes for c in plan(one, symmetric=False).components}
    assert asymmetric["attention"] + asymmetric["feed-forward"] == groups * 5 // 2
    assert plan(one, group_size=-1).weight_bytes < plan(one).weight_bytes


@pytest.mark.parametrize(
    ("config", "arguments", "error", "message"),
    [
        ({}, {}, CheckpointError, "config.json has no 'hidden_size'"),
        (LLAMA_8B | {"hidden_size": "4096"}, {}, CheckpointError, "hidden_size='4096' is no size"),
        (LLAMA_8B | {"num_attention_heads": 0}, {}, CheckpointError, "both must be positive"),
        (LLAMA_8B, {"bits": 3}, InputError, "bits=3"),
        (LLAMA_8B, {"group_size": 0}, InputError, "group_size=0"),
        (LLAMA_8B, {"context": 0}, InputError, "context=0"),
    ],
)
def test_what_cannot_be_planned_gets_one_line(
    config: dict[str, Any], arguments: dict[str, int], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        plan(config, **arguments)
