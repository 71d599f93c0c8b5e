"""The memory planner, against sizes that are known and against the models that transformers builds."""

from typing import Any

import pytest
import torch

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
QWEN_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
}
MIXTRAL = LLAMA_8B | {"vocab_size": 32000, "num_local_experts": 8, "num_experts_per_tok": 2}


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
    assert parameters(plan({"model_type": "qwen2", **QWEN_7B})) == 7_615_616_512


def test_the_kv_cache_grows_with_layers_heads_context_and_requests() -> None:
    planned = plan(LLAMA_70B, context=1000, requests=3)
    assert planned.kv_bytes_per_token == 2 * 80 * 8 * 128 * 2
    assert planned.kv_bytes == 3 * 1008 * planned.kv_bytes_per_token  # in blocks of 16 tokens
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


#: Configurations as hubs have them, which leave out what is the architecture's default.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "gemma": {"head_dim": 256},  # tied
    "gemma3_text": {},
    "cohere": {},
    "olmo2": {},
    "phi": {},  # two matrices a feed-forward network, biases everywhere
    "phi3": {"pad_token_id": 0},
    "gpt2": {"n_embd": 768, "n_layer": 3, "n_inner": None},
    "opt": {"ffn_dim": 512},
    "falcon": {},
    "bloom": {},
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4},
    "gpt_oss": {},
    "deepseek_v2": {"first_k_dense_replace": 1, "n_routed_experts": 4},
    "qwen3_next": {"num_experts": 4},
    "mamba": {},
}
SMALL = {"hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8, "vocab_size": 1000}


@pytest.mark.parametrize("kind", FAMILIES)
def test_parameters_are_those_of_the_model(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = {"model_type": kind, **(SMALL if kind != "gpt2" else {}), **FAMILIES[kind]}
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config))
    planned = plan(config)
    assert parameters(planned) == sum(parameter.numel() for parameter in model.parameters())
    assert planned.weight_bytes < planned.full_bytes


@pytest.mark.parametrize("kind", ["llama", "gemma", "gemma3_text", "mixtral", "deepseek_v2", "qwen3_next"])
def test_the_language_model_is_the_same_with_pictures(kind: str) -> None:
    pytest.importorskip("transformers")
    config = {"model_type": kind, **SMALL, **FAMILIES[kind]}
    planned, with_pictures = plan(config), plan({"model_type": "llava", "text_config": config})
    assert with_pictures.components[-1].name == "vision and audio"
    assert with_pictures.components[:-1] == planned.components
    assert with_pictures.kv_bytes_per_token == planned.kv_bytes_per_token
    assert with_pictures.activation_bytes == planned.activation_bytes


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (  # LLaVA-1.5-7B
            {
                "model_type": "llava",
                "text_config": {
                    "model_type": "llama",
                    "hidden_size": 4096,
                    "intermediate_size": 11008,
                    "num_hidden_layers": 32,
                    "num_attention_heads": 32,
                    "vocab_size": 32064,
                },
            },
            7_063_427_072,
        ),
        (  # Qwen2.5-VL-7B, whose text alone no class of transformers builds
            {
                "model_type": "qwen2_5_vl",
                **QWEN_7B,
                "tie_word_embeddings": False,
                "vision_config": {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584},
            },
            8_292_166_656,
        ),
    ],
    ids=["llava", "qwen2.5-vl"],
)
def test_what_reads_pictures_counts_and_stays_at_16_bits(config: dict[str, Any], count: int) -> None:
    pytest.importorskip("transformers")
    planned = plan(config)
    assert parameters(planned) == count
    towers = next(component for component in planned.components if component.name == "vision and audio")
    assert towers.num_bytes == 2 * towers.parameters > 0


def test_activations_are_those_of_all_experts_that_a_token_goes_to() -> None:
    """Qwen3-30B-A3B: 8 of 128 experts, each with gate, up, product and an output of its own."""
    moe = {
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 2,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 151936,
        "num_experts": 128,
        "num_experts_per_tok": 8,
    }
    features = 2 * 2048 + 8 * (3 * 768 + 2048)
    assert plan(moe, step_tokens=2048).activation_bytes == 2048 * features * 2 + 151936 * 4


def test_both_ways_of_counting_agree() -> None:
    pytest.importorskip("transformers")
    for config, kind in ((LLAMA_8B, "llama"), (MIXTRAL, "mixtral"), (LLAMA_8B | {"attention_bias": True}, "llama")):
        assert plan(config | {"model_type": kind}).as_dict() == plan(config).as_dict()


@pytest.mark.parametrize(
    ("kind", "config", "numbers"),
    [
        ("deepseek_v2", {"kv_lora_rank": 512, "qk_rope_head_dim": 64}, 4 * (512 + 64)),
        ("gemma", {"num_key_value_heads": 1, "head_dim": 256}, 4 * 2 * 256),
        ("falcon", {"num_attention_heads": 8}, 4 * 2 * 64),  # one key for all queries
        ("opt", {"num_attention_heads": 8}, 4 * 2 * 512),
        ("qwen3_next", {"num_key_value_heads": 2, "head_dim": 128}, 1 * 2 * 256),  # one layer of four attends
        ("mamba", {}, 0),
    ],
)
def test_the_kv_cache_is_that_of_the_architecture(kind: str, config: dict[str, Any], numbers: int) -> None:
    pytest.importorskip("transformers")
    assert plan({"model_type": kind} | SMALL | config).kv_bytes_per_token == 2 * numbers


def test_experts_and_what_chooses_them_are_told_apart() -> None:
    pytest.importorskip("transformers")
    sizes = {"moe_intermediate_size": 64, "n_routed_experts": 4, "n_shared_experts": 2, "first_k_dense_replace": 1}
    planned = plan({"model_type": "deepseek_v2", "intermediate_size": 256, **SMALL, **sizes})
    counted = {component.name: component.parameters for component in planned.components}
    assert counted["experts"] == 3 * 4 * 3 * 512 * 64
    assert counted["shared expert"] == 3 * 3 * 512 * 128
    assert counted["feed-forward"] == 3 * 512 * 256
    assert {component.name for component in planned.components if component.bits == 16} == {
        "embedding",
        "norms, biases, routers",
        "output head",
    }


@pytest.mark.parametrize(
    ("config", "arguments", "error", "message"),
    [
        ({}, {}, CheckpointError, "config.json has no 'hidden_size'"),
        ({"text_config": 5}, {}, CheckpointError, "text_config=5 is no object"),
        ({"text_config": None}, {}, CheckpointError, "config.json has no 'hidden_size'"),
        ({"model_type": "llama", "hidden_size": "4096"}, {}, CheckpointError, "as model_type='llama': .*hidden_size"),
        ({"model_type": "llama", "hidden_size": -1}, {}, CheckpointError, "as model_type='llama': "),
        ({"model_type": "llama", "num_attention_heads": 0}, {}, CheckpointError, "as model_type='llama': "),
        ({"model_type": "t5"}, {}, CheckpointError, "model_type='t5' is no language model of transformers"),
        (LLAMA_8B | {"kv_lora_rank": 512}, {}, CheckpointError, "kv_lora_rank .* install transformers"),
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
    with pytest.raises(error, match=message) as caught:
        plan(config, **arguments)
    assert "\n" not in str(caught.value)
