"""Checkpoints of GPTQModel, AutoAWQ, llm-compressor, bitsandbytes load bit for bit; damaged ones are refused whole."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file

from tokenmill.errors import CheckpointError
from tokenmill.kernels.int4_gemm.weight import unpack_codes
from tokenmill.quant.checkpoint import Checkpoint
from tokenmill.quant.format import Scheme
from tokenmill.quant.pack import read_layer, write_layer

FOLDER = Path(__file__).resolve().parent.parent / "data" / "checkpoints"
PRODUCED = sorted(path.parent.name for path in FOLDER.glob("*/expected.json"))


def test_every_producer_is_there() -> None:
    assert {name.split("-")[0] for name in PRODUCED} == {"gptqmodel", "autoawq", "llmcompressor", "bitsandbytes"}
    assert len(PRODUCED) == 18


@pytest.mark.parametrize("name", PRODUCED)
def test_weights_are_those_of_the_producer_bit_for_bit(name: str, produce: ModuleType) -> None:
    checkpoint = Checkpoint(FOLDER / name)
    expected: dict[str, str] = json.loads((FOLDER / name / "expected.json").read_text())
    assert len(expected) == 7
    for layer, digest in expected.items():
        dtype = getattr(torch, digest.split()[0])
        assert produce.digest(checkpoint.parameter(f"{layer}.weight", dtype)) == digest, layer
    if not name.startswith("bitsandbytes"):
        assert sorted(checkpoint.verify()) == sorted(expected)
    checkpoint.close()


@pytest.mark.parametrize("name", [name for name in PRODUCED if not name.startswith("bitsandbytes")])
def test_a_layer_is_written_as_the_producer_wrote_it(name: str) -> None:
    checkpoint = Checkpoint(FOLDER / name)
    for layer in checkpoint.layers:
        scheme = checkpoint.scheme(layer)
        written = write_layer(checkpoint.layer(layer), scheme)
        for part, tensor in written.items():
            assert torch.equal(tensor, checkpoint.tensor(f"{layer}.{part}").to(tensor.dtype)), (layer, part)
    checkpoint.close()


def test_act_order_is_read_as_compressed_tensors_reads_it() -> None:
    """llm-compressor no longer writes g_idx; the library that defines the format still reads it."""
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    generator = torch.Generator().manual_seed(0)
    K, N, group = 96, 40, 32
    codes = torch.randint(-8, 8, (N, K), dtype=torch.int8, generator=generator)
    scales = torch.rand(N, K // group, generator=generator).to(torch.bfloat16)
    zeros = torch.randint(-8, 8, (N, K // group), dtype=torch.int8, generator=generator)
    g_idx = (torch.arange(K) // group)[torch.randperm(K, generator=generator)].int()
    tensors = {
        "weight_packed": helpers.pack_to_int32(codes, 4),
        "weight_scale": scales,
        "weight_shape": torch.tensor([N, K]),
        "weight_zero_point": helpers.pack_to_int32(zeros, 4, packed_dim=0).contiguous(),
        "weight_g_idx": g_idx,
    }
    weight = read_layer("layer", tensors, Scheme("pack-quantized", group, False, True))
    assert torch.equal(unpack_codes(weight.codes, K).T, (codes + 8).to(torch.uint8))
    expected = forward.dequantize(codes, scales, zeros, g_idx=g_idx)
    groups = weight.groups()
    assert weight.zeros is not None
    difference = unpack_codes(weight.codes, K).float() - weight.zeros.float()[groups]
    assert torch.equal((difference * weight.scales.float()[groups]).T.to(torch.bfloat16), expected)


# --- damage ---------------------------------------------------------------------------------------------------------

LAYER = "model.layers.0.mlp.down_proj"


def damaged(tmp_path: Path, name: str, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of a checkpoint with changed tensors."""
    copy = tmp_path / name
    shutil.copytree(FOLDER / name, copy)
    tensors = load_file(copy / "model.safetensors")
    change(tensors)
    save_file(tensors, copy / "model.safetensors")
    return copy


def set_value(name: str, place: tuple[int, ...], value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][place] = value

    return change


def replace(name: str, tensor: torch.Tensor | None) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[name]
        if tensor is not None:
            tensors[name] = tensor

    return change


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("gptqmodel-g128-sym", "scales"),
        ("gptqmodel-g128-sym", "qweight"),
        ("gptqmodel-g32-asym", "qweight"),
        ("autoawq-g64", "qweight"),
        ("llmcompressor-g128-sym", "weight_packed"),
        ("gptqmodel-g32-asym", "qzeros"),
        ("gptqmodel-g32-actorder", "g_idx"),
        ("autoawq-g64", "qzeros"),
        ("llmcompressor-g32-asym", "weight_zero_point"),
        ("llmcompressor-g128-sym", "weight_scale"),
        ("llmcompressor-g128-sym", "weight_shape"),
    ],
)
def test_a_missing_tensor_is_refused_when_the_checkpoint_is_opened(tmp_path: Path, name: str, tensor: str) -> None:
    path = damaged(tmp_path, name, replace(f"{LAYER}.{tensor}", None))
    with pytest.raises(CheckpointError, match=rf"{LAYER}.{tensor} is missing; the checkpoint is incomplete"):
        Checkpoint(path)


def test_a_dense_layer_with_scales_of_its_own_is_no_int4_layer(tmp_path: Path) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors |= {"model.other.weight": torch.ones(2, 2), "model.other.scales": torch.ones(2)}

    checkpoint = Checkpoint(damaged(tmp_path, "gptqmodel-g128-sym", add))
    assert len(checkpoint.layers) == 7
    assert torch.equal(checkpoint.parameter("model.other.weight", torch.float32), torch.ones(2, 2))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("gptqmodel-g128-sym", set_value(f"{LAYER}.scales", (1, 3), float("inf")), r"scales\[1, 3\]=inf"),
        ("autoawq-g64", set_value(f"{LAYER}.scales", (0, 0), float("nan")), r"scales\[0, 0\]=nan"),
        ("gptqmodel-g32-actorder", set_value(f"{LAYER}.g_idx", (7,), 8), r"g_idx\[7\]=8 must be in 0..7"),
        ("llmcompressor-g128-sym", replace(f"{LAYER}.weight_packed", torch.zeros(128, 32)), "is float32"),
        ("llmcompressor-g128-sym", replace(f"{LAYER}.weight_scale", torch.ones(128, 3)), "3 scales a column"),
        ("gptqmodel-g128-sym", replace(f"{LAYER}.qweight", torch.zeros(0, 128, dtype=torch.int32)), r"\[0, 128\]"),
    ],
)
def test_a_damaged_value_is_refused_by_name(
    tmp_path: Path, name: str, change: Callable[[dict[str, torch.Tensor]], None], message: str
) -> None:
    checkpoint = Checkpoint(damaged(tmp_path, name, change))
    with pytest.raises(CheckpointError, match=message) as caught:
        list(checkpoint.verify())
    assert str(caught.value).startswith(f"{LAYER}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [4, 100, 200_000])
def test_a_truncated_file_is_refused(tmp_path: Path, size: int) -> None:
    shutil.copytree(FOLDER / "gptqmodel-g128-sym", tmp_path / "cut")
    file = tmp_path / "cut" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(CheckpointError, match="truncated"):
        Checkpoint(tmp_path / "cut")


def test_a_header_that_is_no_header_is_refused(tmp_path: Path) -> None:
    shutil.copytree(FOLDER / "gptqmodel-g128-sym", tmp_path / "bad")
    (tmp_path / "bad" / "model.safetensors").write_bytes((8).to_bytes(8, "little") + b"no json!")
    with pytest.raises(CheckpointError, match="its header is not JSON"):
        Checkpoint(tmp_path / "bad")


def test_a_directory_without_weights_or_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no directory"):
        Checkpoint(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"config.json cannot be read"):
        Checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="holds list; it must hold an object"):
        Checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"holds no \*.safetensors file"):
        Checkpoint(tmp_path)


def test_a_lost_quantization_config_is_noticed(tmp_path: Path) -> None:
    shutil.copytree(FOLDER / "autoawq-g64", tmp_path / "lost")
    config = json.loads((tmp_path / "lost" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "lost" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"qweight is INT4, but config.json has no quantization_config"):
        Checkpoint(tmp_path / "lost")


def test_an_index_that_names_an_absent_file_or_tensor_is_refused(tmp_path: Path) -> None:
    shutil.copytree(FOLDER / "autoawq-g64", tmp_path / "indexed")
    index = tmp_path / "indexed" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"a is missing in .*model\.safetensors"):
        Checkpoint(tmp_path / "indexed")
    for names in ([1], {"a": 5, "b": "model.safetensors"}):
        index.write_text(json.dumps({"weight_map": names}))
        with pytest.raises(CheckpointError, match=r"index\.json has no weight_map that names files"):
            Checkpoint(tmp_path / "indexed")
    index.write_text(json.dumps({"weight_map": {"a": "model-00002.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"model-00002.safetensors cannot be read: No such file"):
        Checkpoint(tmp_path / "indexed")


def test_a_tensor_that_two_files_have_is_refused(dense_model: Path, tmp_path: Path) -> None:
    """Without an index nothing says which of the two is the model's."""
    shutil.copytree(dense_model, tmp_path / "model")
    name = "model.norm.weight"
    save_file({name: torch.zeros(128)}, tmp_path / "model" / "zz.safetensors")
    with pytest.raises(CheckpointError, match=rf"has {name} twice, in model.safetensors and zz.safetensors; remove"):
        Checkpoint(tmp_path / "model")


def test_a_quantization_config_that_is_no_object_is_refused(dense_model: Path, tmp_path: Path) -> None:
    shutil.copytree(dense_model, tmp_path / "model")
    config = json.loads((dense_model / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"quantization_config": "gptq"}))
    with pytest.raises(CheckpointError, match="quantization_config is str; it must be an object"):
        Checkpoint(tmp_path / "model")


def test_damaged_nf4_is_refused(tmp_path: Path) -> None:
    name = f"{LAYER}.weight"
    path = damaged(tmp_path, "bitsandbytes-nf4", replace(f"{name}.absmax", None))
    with pytest.raises(CheckpointError, match=rf"{name} is damaged NF4: KeyError"):
        Checkpoint(path).parameter(name, torch.float32)
    shutil.rmtree(path)
    state = torch.tensor(list(b"[1]"), dtype=torch.uint8)
    path = damaged(tmp_path, "bitsandbytes-nf4", replace(f"{name}.quant_state.bitsandbytes__nf4", state))
    with pytest.raises(CheckpointError, match=rf"{name} is damaged NF4: TypeError"):
        Checkpoint(path).parameter(name, torch.float32)


@pytest.mark.parametrize(
    ("folder", "key", "size", "scales"),
    [
        ("bitsandbytes-nf4", "blocksize", 128, "absmax"),
        ("bitsandbytes-odd-nf4-double", "blocksize", 128, "absmax"),
        ("bitsandbytes-odd-nf4-double", "nested_blocksize", 64, "nested_absmax"),
    ],
)
def test_nf4_blocks_of_another_size_are_refused(tmp_path: Path, folder: str, key: str, size: int, scales: str) -> None:
    """Scales of smaller blocks are more than those of larger ones need; the first of them would be taken."""
    name = f"{LAYER}.weight"
    state_name = f"{name}.quant_state.bitsandbytes__nf4"
    stored = Checkpoint(FOLDER / folder)
    state = json.loads(bytes(stored.tensor(state_name).tolist()))
    stored.close()
    assert state[key] != size
    other = torch.tensor(list(json.dumps(state | {key: size}).encode()), dtype=torch.uint8)
    path = damaged(tmp_path, folder, replace(state_name, other))
    with pytest.raises(CheckpointError, match=rf"{name} is damaged NF4: ValueError: .* do not fit \d+ {scales}"):
        Checkpoint(path).parameter(name, torch.float32)


def test_a_parameter_that_is_not_finite_in_the_dtype_asked_for_is_refused(dense_model: Path, tmp_path: Path) -> None:
    shutil.copytree(dense_model, tmp_path / "large")
    tensors = load_file(tmp_path / "large" / "model.safetensors")
    tensors["lm_head.weight"][5, 6] = 1e5
    save_file(tensors, tmp_path / "large" / "model.safetensors")
    checkpoint = Checkpoint(tmp_path / "large")
    assert bool(checkpoint.parameter("lm_head.weight", torch.float32).isfinite().all())
    with pytest.raises(CheckpointError, match=r"lm_head.weight\[5, 6\] is inf in float16; it must be finite"):
        checkpoint.parameter("lm_head.weight", torch.float16)


def test_eight_bit_floats_are_refused_for_their_scales_are_not_read(dense_model: Path, tmp_path: Path) -> None:
    shutil.copytree(dense_model, tmp_path / "fp8")
    tensors = load_file(tmp_path / "fp8" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    scaled = {name: tensors[name].to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.ones(1, 1)}
    save_file(tensors | scaled, tmp_path / "fp8" / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{name} is float8_e4m3fn, which is not read; give .* 16 or 32 bits"):
        Checkpoint(tmp_path / "fp8").parameter(name, torch.float32)
