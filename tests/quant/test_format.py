"""What a quantization_config says, in the words of each producer."""

from typing import Any

import pytest

from tokenmill.errors import CheckpointError
from tokenmill.quant.format import Scheme, parse_config, write_config

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"}
WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, "actorder": None}


def compressed(**weights: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS | weights}},
        "ignore": ["lm_head"],
    }


@pytest.mark.parametrize(
    ("config", "scheme"),
    [
        (GPTQ, Scheme("gptq", 128, True)),
        (GPTQ | {"checkpoint_format": "gptq_v2", "sym": False, "desc_act": True}, Scheme("gptq_v2", 128, False, True)),
        ({"bits": 4, "group_size": -1, "desc_act": False}, Scheme("gptq", -1, True)),
        (AWQ, Scheme("awq", 64, False)),
        (AWQ | {"zero_point": False}, Scheme("awq", 64, True)),
        (compressed(), Scheme("pack-quantized", 32, True)),
        (compressed(strategy="channel", group_size=None, symmetric=False), Scheme("pack-quantized", -1, False)),
        (compressed(actorder="group"), Scheme("pack-quantized", 32, True, True)),
        (compressed(actorder="static"), Scheme("pack-quantized", 32, True)),
    ],
)
def test_a_scheme_is_read(config: dict[str, Any], scheme: Scheme) -> None:
    assert parse_config(config).scheme("model.layers.0.mlp.up_proj") == scheme


def test_gptq_rules_change_or_exempt_layers() -> None:
    config = GPTQ | {"dynamic": {r"-:.*\.0\.": {}, r"+:.*down_proj": {"group_size": 32, "sym": False}}}
    parsed = parse_config(config)
    assert parsed.scheme("model.layers.0.mlp.down_proj") is None
    assert parsed.scheme("model.layers.1.mlp.down_proj") == Scheme("gptq", 32, False)
    assert parsed.scheme("model.layers.1.mlp.up_proj") == Scheme("gptq", 128, True)


def test_compressed_tensors_groups_target_layers() -> None:
    config = compressed()
    config["config_groups"]["group_1"] = {"targets": ["re:.*down_proj"], "weights": WEIGHTS | {"group_size": 64}}
    parsed = parse_config(config)
    assert parsed.scheme("lm_head") is None
    assert parsed.scheme("model.layers.1.mlp.down_proj") == Scheme("pack-quantized", 64, True)
    assert parsed.scheme("model.layers.1.mlp.up_proj") == Scheme("pack-quantized", 32, True)


@pytest.mark.parametrize("name", ["gptq", "pack-quantized"])
@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
def test_what_is_written_is_read_back(name: str, group_size: int, symmetric: bool, act_order: bool) -> None:
    scheme = Scheme(name, group_size, symmetric, act_order)
    assert parse_config(write_config(scheme)).scheme("model.layers.0.mlp.up_proj") == scheme


def test_what_stands_beside_the_language_model_is_left_whole_and_alone() -> None:
    """A projector may be a linear itself, as in Fuyu and BLIP-2; a name that only begins alike is another's."""
    parsed = parse_config(write_config(Scheme("pack-quantized", 32, True), ("projection", "visual")))
    left = ("projection", "model.projection", "visual.blocks.0.proj", "model.visual.blocks.0.proj")
    assert [parsed.scheme(name) for name in left] == [None] * 4
    assert all(parsed.scheme(f"model.layers.0.{name}") for name in ("projection_in", "visuals.up_proj", "q_projection"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "fp8"}, "quant_method='fp8' is not an INT4 format"),
        (GPTQ | {"bits": 8}, "bits=8: only 4-bit weights can be read"),
        ({k: v for k, v in GPTQ.items() if k != "group_size"}, "has no 'group_size'"),
        (GPTQ | {"group_size": 0}, "group_size=0 is neither a positive integer nor -1"),
        (GPTQ | {"group_size": "128"}, "group_size='128' is neither"),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format='marlin' cannot be read"),
        (GPTQ | {"dynamic": {"+:(": {}}}, "is no regular expression"),
        (AWQ | {"version": "gemv"}, "AWQ version='gemv' packs its weights differently"),
        (compressed(num_bits=8), "bits=8"),
        (compressed(type="float"), "weights.type='float' is not INT4"),
        (compressed(strategy="block"), "weights.strategy='block' cannot be read"),
        (compressed() | {"format": "int-quantized"}, "format='int-quantized' is not INT4"),
        (compressed() | {"config_groups": {}}, "quantizes no layer"),
        ("gptq", "quantization_config is str; it must be an object"),
        ([GPTQ], "quantization_config is list; it must be an object"),
        (GPTQ | {"dynamic": ["-:lm_head"]}, "quantization_config is damaged: 'list' object"),
        (compressed() | {"config_groups": [WEIGHTS]}, "quantization_config is damaged: 'list' object"),
        (compressed() | {"ignore": 5}, "quantization_config is damaged: 'int' object"),
    ],
)
def test_a_configuration_that_cannot_be_read_gets_one_line(config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        parse_config(config)
    assert "\n" not in str(caught.value)


def test_awq_cannot_be_written() -> None:
    with pytest.raises(CheckpointError, match="format='awq' cannot be written; use one of gptq, pack-quantized"):
        write_config(Scheme("awq", 128, False))
