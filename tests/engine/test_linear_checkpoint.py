"""A damaged or incomplete INT4 checkpoint is refused by name before vLLM serves it."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.engine import conftest
from tests.engine.int4_models import VARIANTS, quantization_config, quantize, write_pair
from tokenmill.errors import CheckpointError
from tokenmill.quant.format import Scheme, parse_config
from tokenmill.quant.pack import write_layer

Tensors = dict[str, torch.Tensor]

GPTQ = Scheme("gptq", 32, False)
ORDERED = Scheme("gptq", 32, True, act_order=True)
AWQ = Scheme("awq", 32, False)
PACKED = Scheme("pack-quantized", 32, False)
LAYER = "model.layers.0.mlp.down_proj"


def without(name: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__delitem__(f"{LAYER}.{name}")


def changed(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    def damage(tensors: Tensors) -> None:
        tensors[f"{LAYER}.{name}"] = change(tensors[f"{LAYER}.{name}"]).contiguous()

    return damage


def check(scheme: Scheme, folder: Path, damage: Callable[[Tensors], None]) -> None:
    """Writes two layers and a parameter of the model's own over two files, damages the first layer and checks them."""
    from tokenmill.engine.vllm.linear_checkpoint import check_files

    made = {name: quantize(torch.randn(24, 64), scheme) for name in (LAYER, "model.layers.1.mlp.down_proj")}
    tensors = {f"{name}.{short}": t for name, whole in made.items() for short, t in write_layer(whole, scheme).items()}
    tensors["model.router.scales"] = torch.ones(3)
    damage(tensors)
    names = sorted(tensors)
    files = []
    for number, part in enumerate((names[:3], names[3:])):  # a layer may lie in two files
        files.append(folder / f"{number}.safetensors")
        save_file({name: tensors[name] for name in part}, files[-1])
    check_files(files, parse_config(quantization_config(scheme)))


@pytest.mark.parametrize("scheme", [GPTQ, ORDERED, AWQ, PACKED], ids=lambda scheme: scheme.format)
def test_a_whole_checkpoint_passes(scheme: Scheme, tmp_path: Path) -> None:
    check(scheme, tmp_path, lambda tensors: None)


@pytest.mark.parametrize(
    ("scheme", "name"),
    [
        *((GPTQ, name) for name in ("qweight", "qzeros", "scales")),
        (ORDERED, "g_idx"),
        *((AWQ, name) for name in ("qweight", "qzeros", "scales")),
        *((PACKED, name) for name in ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")),
    ],
)
def test_a_missing_tensor_is_named(scheme: Scheme, name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"^{LAYER}\.{name} is missing; the checkpoint is incomplete$"):
        check(scheme, tmp_path, without(name))


@pytest.mark.parametrize(
    ("scheme", "damage", "message"),
    [
        (GPTQ, changed("qweight", torch.Tensor.float), "qweight is float32; it must be int32"),
        (GPTQ, changed("qzeros", torch.Tensor.long), "qzeros is int64; it must be int32"),
        (GPTQ, changed("scales", torch.Tensor.int), "scales is int32; it must be float16 or bfloat16 or float32"),
        (GPTQ, changed("scales", lambda scales: scales[:-1]), r"there are 1 scales a column; .* needs 2"),
        (GPTQ, changed("qweight", lambda words: words[:-1]), "qweight has 7 rows of 8 codes, g_idx 64 entries"),
        (AWQ, changed("qweight", lambda words: words[:, :-1]), r"qweight has shape \[64, 2\]; it must be \[64, 3\]"),
        (PACKED, changed("weight_packed", torch.Tensor.float), "weight_packed is float32; it must be int32"),
        (PACKED, changed("weight_shape", lambda shape: shape + 8), r"weight_packed has shape \[24, 8\]; it must be"),
    ],
)
def test_a_wrong_dtype_or_shape_is_named(
    scheme: Scheme, damage: Callable[[Tensors], None], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=f"^{LAYER}: {message}"):
        check(scheme, tmp_path, damage)


def test_experts_in_one_tensor_are_left_to_vllm(tmp_path: Path) -> None:
    def stack(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith(LAYER)]:
            tensors[name] = torch.stack([tensors[name]] * 2)

    check(PACKED, tmp_path, stack)


@pytest.mark.parametrize(
    "config",
    [
        None,
        {"quant_method": "fp8"},
        {"quant_method": "gptq", "bits": 8, "group_size": 32},
        {"quant_method": "compressed-tensors", "config_groups": {"kv": {"weights": None}}},
    ],
)
def test_what_is_not_int4_is_left_alone(config: dict[str, Any] | None) -> None:
    from tokenmill.engine.vllm.linear_checkpoint import quantization_of

    assert quantization_of(SimpleNamespace(quantization_config=config)) is None


def test_the_scheme_of_a_language_model_inside_another_is_found() -> None:
    from tokenmill.engine.vllm.linear_checkpoint import quantization_of

    inner = SimpleNamespace(quantization_config=quantization_config(GPTQ))
    found = quantization_of(SimpleNamespace(text_config=inner))
    assert found is not None
    assert found.default == GPTQ


class Layer(torch.nn.Module):
    """A linear layer as vLLM has it: two of the checkpoint merged, a weight of words with its inputs first."""

    def __init__(self) -> None:
        super().__init__()
        self.output_partition_sizes = [16, 8]
        self.quant_config = SimpleNamespace(packed_modules_mapping={"gate_up_proj": ["gate_proj", "up_proj"]})
        self.qweight = torch.nn.Parameter(torch.zeros(8, 24, dtype=torch.int32), requires_grad=False)
        self.qweight.input_dim = 0  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("written", "missing"), [((0, 24), None), ((0, 16), "up_proj"), ((16, 24), "gate_proj"), ((0, 20), None)]
)
def test_a_layer_of_which_the_files_have_nothing_is_named(written: tuple[int, int], missing: str | None) -> None:
    """Columns that no file fills are padding; a whole layer without any is missing."""
    from tokenmill.engine.vllm.linear_checkpoint import check_marks, mark

    model = torch.nn.Module()
    model.gate_up_proj = Layer()
    mark(model)
    model.gate_up_proj.qweight.data[:, slice(*written)] = 0
    if missing is None:
        check_marks(model)
        return
    with pytest.raises(CheckpointError, match=f"^{missing}.qweight is missing; the checkpoint is incomplete$"):
        check_marks(model)
    check_marks(model, unused=frozenset([missing]))


def no_scales(tensors: Tensors) -> None:
    del tensors[f"{LAYER}.scales"]


def nothing_of_a_layer(tensors: Tensors) -> None:
    for name in [name for name in tensors if name.startswith(LAYER)]:
        del tensors[name]


@pytest.mark.engine
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("variant", "damage", "missing"),
    [("gptq-asym-g128", no_scales, "scales"), ("ct-g128", nothing_of_a_layer, "weight_packed")],
)
def test_the_engine_does_not_start(
    variant: str, damage: Callable[[Tensors], None], missing: str, tmp_path: Path
) -> None:
    quantized, _ = write_pair(next(v for v in VARIANTS if v.name == variant), tmp_path)
    tensors = load_file(quantized / "model.safetensors")
    damage(tensors)
    save_file(tensors, quantized / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"^{LAYER}\.{missing} is missing"):
        conftest.start(model=str(quantized), dtype="float16")
