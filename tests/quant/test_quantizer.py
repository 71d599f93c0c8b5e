"""Quantizing a whole model: what is written loads and predicts, a killed run ends with the same bytes, bad requests
leave nothing behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file

from tokenmill.errors import CheckpointError, ConfigurationError, InputError, UnsupportedError
from tokenmill.quant.block import check_linears
from tokenmill.quant.checkpoint import Checkpoint
from tokenmill.quant.evaluate import perplexity
from tokenmill.quant.format import Scheme
from tokenmill.quant.gptq import GptqOptions
from tokenmill.quant.method import BlockSettings
from tokenmill.quant.quantizer import Report, Request, calibration_batches, quantize_checkpoint
from tokenmill.quant.scaling import scale_inputs
from tokenmill.quant.streaming import StreamedModel

pytest.importorskip("transformers")


def settings(method: str = "gptq", group_size: int = 32, symmetric: bool = True, order: str = "none") -> BlockSettings:
    options = GptqOptions(act_order=order)  # type: ignore[arg-type]
    return BlockSettings(method, group_size, symmetric, torch.bfloat16, options)  # type: ignore[arg-type]


def request(text: str, block: BlockSettings, format_name: str = "gptq", evaluate: bool = True) -> Request:
    return Request(block, format_name, text, text[:1000] if evaluate else None, num_samples=24, length=128)


def quantized(model: Path, out: Path, wanted: Request) -> Report:
    report = quantize_checkpoint(model, out, wanted)
    assert not (out / "quantize-unfinished").exists()
    assert not (out / "quantize-progress.json").exists()
    return report


@pytest.mark.parametrize(
    ("block", "format_name", "scheme"),
    [
        (settings("rtn", 128), "pack-quantized", Scheme("pack-quantized", 128, True)),
        (settings("gptq", 64, False, "group-aware"), "gptq", Scheme("gptq", 64, False)),
        (settings("gptq", -1, True, "dynamic"), "pack-quantized", Scheme("pack-quantized", -1, True)),
        (settings("gptq", 32, True, "dynamic"), "gptq", Scheme("gptq", 32, True, True)),
        (settings("awq", 32, False), "pack-quantized", Scheme("pack-quantized", 32, False)),
        (settings("awq-gptq", -1, True, "static"), "gptq", Scheme("gptq", -1, True)),
    ],
)
def test_a_model_is_quantized_written_and_read_back(
    dense_model: Path, text: str, tmp_path: Path, block: BlockSettings, format_name: str, scheme: Scheme
) -> None:
    report = quantized(dense_model, tmp_path / "out", request(text, block, format_name))
    checkpoint = Checkpoint(tmp_path / "out")
    assert len(list(checkpoint.verify())) == 21
    assert {checkpoint.scheme(layer) for layer in checkpoint.layers} == {scheme}
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (dense_model / "tokenizer.json").read_bytes()
    assert report.before is not None
    assert report.after is not None
    model = StreamedModel(checkpoint)
    again = perplexity(model, text[:1000], 128)
    assert again == report.after, "the files predict exactly what the report says"
    assert perplexity(StreamedModel(Checkpoint(dense_model)), text[:1000], 128) == report.before
    # Random weights predict noise: quantizing moves that by little either way.
    assert abs(report.after.bits_per_byte - report.before.bits_per_byte) < 0.1 * report.before.bits_per_byte
    assert report.bytes_after < report.bytes_before * 0.55
    assert len(report.errors) == (0 if block.method == "rtn" else 21)
    assert all(0 < error < 0.05 for error in report.errors.values())
    checkpoint.close()


def test_sizes_that_are_no_multiple_of_64_and_biases(odd_model: Path, text: str, tmp_path: Path) -> None:
    quantized(odd_model, tmp_path / "out", request(text, settings(), evaluate=False))
    source, result = Checkpoint(odd_model), Checkpoint(tmp_path / "out")
    for layer in result.layers:
        bias = result.layer(layer).bias
        assert bias is not None
        assert torch.equal(bias, source.tensor(f"{layer}.bias"))


def test_scaling_inputs_leaves_the_function_alone(dense_model: Path, text: str, tmp_path: Path) -> None:
    """AWQ moves factors between layers; what it writes must still approximate every layer's product."""
    model = StreamedModel(Checkpoint(dense_model))
    tokens = torch.tensor(model.tokenizer()(text, verbose=False)["input_ids"][:512]).view(4, 128)
    hidden = model.embed(tokens)
    block = model.block(0)
    run = model.forward(0, block)
    expected = run(hidden)
    norm = block.input_layernorm.weight.clone()
    scale_inputs(block, run, [hidden], settings("awq"))
    assert not torch.allclose(block.input_layernorm.weight, norm, rtol=0.01)
    assert torch.allclose(run(hidden), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_nf4_is_converted(tmp_path: Path, text: str) -> None:
    source = Path(__file__).resolve().parent.parent / "data" / "checkpoints" / "bitsandbytes-nf4"
    report = quantized(source, tmp_path / "out", request(text, settings("gptq"), "pack-quantized"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert max(report.errors.values()) < 0.05


def test_streaming_is_the_model(dense_model: Path, text: str) -> None:
    transformers = pytest.importorskip("transformers")
    streamed = StreamedModel(Checkpoint(dense_model))
    tokens = torch.tensor(streamed.tokenizer()(text, verbose=False)["input_ids"][:256]).view(2, 128)
    logits = streamed.head()(streamed.hidden_states([tokens])[0])
    whole = transformers.AutoModelForCausalLM.from_pretrained(dense_model, dtype=torch.float32)
    with torch.no_grad():
        expected = whole(tokens).logits
    assert torch.allclose(logits, expected, rtol=1e-5, atol=1e-4)


CHILD = """
import os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from tokenmill.quant import output
from test_quantizer import quantize_checkpoint, request, settings
text = Path(sys.argv[4]).read_text()
real = output.save_file
def slow(tensors, file, metadata):
    real(tensors, file, metadata=metadata)
    if "00002" in str(file):
        print("writing", flush=True)
        sys.stdin.read()  # the parent kills us here, the second block written aside and not renamed
if sys.argv[5] == "kill":
    output.save_file = slow
quantize_checkpoint(Path(sys.argv[2]), Path(sys.argv[3]), request(text, settings(order="group-aware")))
"""


def test_a_killed_run_continues_to_the_same_bytes(dense_model: Path, text: str, tmp_path: Path) -> None:
    (tmp_path / "text").write_text(text)
    command = [sys.executable, "-W", "ignore", "-c", CHILD, str(Path(__file__).parent), str(dense_model)]

    def start(out: str, mode: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*command, str(tmp_path / out), str(tmp_path / "text"), mode],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    whole = start("whole", "run")
    killed = start("killed", "kill")
    assert killed.stdout is not None
    assert killed.stdout.readline() == "writing\n"
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    left = sorted(path.name for path in (tmp_path / "killed").iterdir())
    assert left == [
        "model-00001-of-00004.safetensors",
        "model-00004-of-00004.safetensors",
        "quantize-progress.json",
        "quantize-unfinished",
    ]
    with pytest.raises(CheckpointError):
        Checkpoint(tmp_path / "killed")
    first = (tmp_path / "killed" / "model-00001-of-00004.safetensors").stat().st_mtime_ns
    resumed = start("killed", "run")
    resumed.communicate()
    assert resumed.returncode == 0
    whole.communicate()
    assert whole.returncode == 0
    assert (tmp_path / "killed" / "model-00001-of-00004.safetensors").stat().st_mtime_ns == first
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "killed").iterdir())
    for name in names:
        if name != "quantize-report.json":  # holds the seconds
            assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes(), name


def test_an_unfinished_run_with_other_settings_is_not_continued(dense_model: Path, text: str, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def stop(done: int, total: int, error: float | None) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(dense_model, out, request(text, settings("rtn")), progress=stop)
    with pytest.raises(ConfigurationError, match="unfinished run of another model or with other settings"):
        quantize_checkpoint(dense_model, out, request(text, settings("rtn", 64)))
    quantize_checkpoint(dense_model, out, request(text, settings("rtn", 64)), overwrite=True)
    with pytest.raises(ConfigurationError, match="is not empty; name another directory or pass --overwrite"):
        quantize_checkpoint(dense_model, out, request(text, settings("rtn", 64)))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_an_unfinished_run_of_what_has_been_changed_is_not_continued(
    dense_model: Path, text: str, tmp_path: Path, name: str
) -> None:
    """Its last blocks would be of another model than its first ones, or rounded for another text."""
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(dense_model, source)

    def stop(done: int, total: int, error: float | None) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(source, out, request(text, settings(), evaluate=False), progress=stop)
    content = json.loads((source / name).read_text())
    if name == "config.json":
        content["rms_norm_eps"] = 0.5
    else:
        tokens = content["model"]["vocab"]
        tokens["a"], tokens["e"] = tokens["e"], tokens["a"]
    (source / name).write_text(json.dumps(content))
    with pytest.raises(ConfigurationError, match="unfinished run of another model or with other settings"):
        quantize_checkpoint(source, out, request(text, settings(), evaluate=False))


def test_of_a_long_text_no_more_becomes_tokens_than_are_used(dense_model: Path, text: str) -> None:
    model = StreamedModel(Checkpoint(dense_model))
    whole = model.tokenize(text * 4)
    seen: list[int] = []
    tokenize = model.tokenize

    def note(part: str) -> list[int]:
        seen.append(len(part))
        return tokenize(part)

    model.tokenize = note  # type: ignore[method-assign]
    batches = calibration_batches(model, text * 1000, 3, 128)
    assert torch.cat(batches).flatten().tolist() == whole[: 3 * 128]
    assert max(seen) < 10 * 3 * 128 < len(text) * 1000
    every = calibration_batches(model, text, 1000, 128)
    assert torch.cat(every).numel() == len(tokenize(text)) // 128 * 128
    spaces = " " * 20_000 + text  # the tokenizer may need any number of characters for a token
    assert torch.cat(calibration_batches(model, spaces, 2, 128)).shape == (2, 128)


def test_a_model_without_a_tokenizer_is_refused(dense_model: Path, text: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(dense_model, source, ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(CheckpointError, match=r"source has no tokenizer that can be loaded: .*\w.*[^:]$") as caught:
        quantize_checkpoint(source, tmp_path / "out", request(text, settings(), evaluate=False))
    assert "\n" not in str(caught.value)


def test_a_tokenizer_of_another_model_is_refused(dense_model: Path, text: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(dense_model, source)
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] = {token: index + 1000 for token, index in tokenizer["model"]["vocab"].items()}
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    message = r"source has a tokenizer that gives the token \d+, and a vocabulary of \d+: they are of different models"
    for wanted in (request(text, settings(), evaluate=False), request(text, settings("rtn"))):
        with pytest.raises(CheckpointError, match=message):
            quantize_checkpoint(source, tmp_path / "out", wanted)
    assert not (tmp_path / "out").exists()


def test_requests_that_cannot_be_met(dense_model: Path, text: str, tmp_path: Path, produce: ModuleType) -> None:
    out = tmp_path / "out"
    with pytest.raises(InputError, match=r"q_proj has K=128 inputs, no multiple of group_size=48; choose one that"):
        quantize_checkpoint(dense_model, out, request(text, settings("rtn", 48)))
    with pytest.raises(InputError, match=r"the calibration text has 5 tokens; one sequence needs 128"):
        quantize_checkpoint(dense_model, tmp_path / "short", request("short", settings()))
    int4 = Path(__file__).resolve().parent.parent / "data" / "checkpoints" / "autoawq-g64"
    with pytest.raises(CheckpointError, match="is already awq; quantize the original"):
        quantize_checkpoint(int4, tmp_path / "again", request(text, settings()))
    produce.write_model(tmp_path / "gemma", "even")
    config = json.loads((tmp_path / "gemma" / "config.json").read_text())
    (tmp_path / "gemma" / "config.json").write_text(json.dumps(config | {"model_type": "gemma"}))
    with pytest.raises(UnsupportedError, match="input scaling knows llama, mistral"):
        quantize_checkpoint(tmp_path / "gemma", tmp_path / "g", request(text, settings("awq")))
    (tmp_path / "gemma" / "config.json").write_text(json.dumps(config | {"model_type": "nonsense"}))
    with pytest.raises(CheckpointError, match=r"cannot be run block by block: .*nonsense") as caught:
        quantize_checkpoint(tmp_path / "gemma", tmp_path / "g", request(text, settings()))
    assert len(str(caught.value).removeprefix(str(tmp_path))) < 400, "not the names of all models there are"
    (tmp_path / "gemma" / "config.json").write_text(json.dumps(config | {"intermediate_size": 512}))
    with pytest.raises(CheckpointError, match=r"has shape \[256, 128\]; config.json makes it \[512, 128\]"):
        quantize_checkpoint(tmp_path / "gemma", tmp_path / "h", request(text, settings("rtn"), evaluate=False))


def test_a_dynamic_order_that_vllm_does_not_load_is_refused(dense_model: Path, text: str, tmp_path: Path) -> None:
    wanted = request(text, settings("gptq", 32, True, "dynamic"), "pack-quantized")
    with pytest.raises(ConfigurationError, match=r"not loaded by vLLM 0.32; use --act-order static or group-aware, or"):
        quantize_checkpoint(dense_model, tmp_path / "out", wanted)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    ("method", "name"),
    [
        ("rtn", "model.layers.0.mlp.down_proj.weight"),
        ("gptq", "model.layers.0.mlp.down_proj.weight"),
        ("rtn", "model.norm.weight"),
        ("rtn", "lm_head.weight"),
    ],
)
def test_a_weight_that_is_not_finite_is_refused(
    dense_model: Path, text: str, tmp_path: Path, method: str, name: str, value: float
) -> None:
    source = tmp_path / "source"
    shutil.copytree(dense_model, source)
    tensors = load_file(source / "model.safetensors")
    place = (3, 4) if tensors[name].dim() == 2 else (3,)
    tensors[name][place] = value
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"^{name}\[3.*\] is {value} in \w+; it must be finite"):
        quantize_checkpoint(source, tmp_path / "out", request(text, settings(method), evaluate=False))
    assert not (tmp_path / "out").exists()


def test_blocks_without_linears_or_with_merged_experts_are_refused() -> None:
    class Experts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up_proj = torch.nn.Parameter(torch.empty(4, 64, 32))

    linear, convolution = torch.nn.Linear(32, 32), torch.nn.Conv1d(1, 1, 4)
    check_linears(torch.nn.Sequential(linear, convolution), settings())
    with pytest.raises(InputError, match="has no linear layer; there is nothing to quantize"):
        check_linears(torch.nn.Sequential(convolution), settings())
    with pytest.raises(
        InputError, match=r"1.gate_up_proj is 3-dimensional; experts are quantized where files have gate, up and down"
    ):
        check_linears(torch.nn.Sequential(linear, Experts()), settings())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_quantizes_as_well_as_a_cpu(dense_model: Path, text: str, tmp_path: Path) -> None:
    on_cpu = quantized(dense_model, tmp_path / "cpu", request(text, settings()))
    wanted = Request(settings(), "gptq", text, text[:1000], 24, 128, device="cuda", dtype=torch.float32)
    on_gpu = quantized(dense_model, tmp_path / "gpu", wanted)
    for layer, error in on_cpu.errors.items():
        assert on_gpu.errors[layer] < 1.05 * error


def test_time_is_counted(dense_model: Path, text: str, tmp_path: Path) -> None:
    start = time.perf_counter()
    report = quantized(dense_model, tmp_path / "out", request(text, settings("rtn"), evaluate=False))
    assert 0 < report.seconds <= time.perf_counter() - start
    assert report.peak_bytes > report.bytes_before
    assert report.before is None
