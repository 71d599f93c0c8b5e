"""`tokenmill quantize` and `tokenmill memory` as a user meets them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tokenmill.cli import main
from tokenmill.quant.checkpoint import Checkpoint
from tokenmill.quant.format import Scheme
from tokenmill.quant.gptq import GptqOptions

pytest.importorskip("transformers")


def test_quantize_reports_size_perplexity_and_cost(
    dense_model: Path, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_text(text)
    files = ["--calibration", str(tmp_path / "text"), "--evaluation", str(tmp_path / "text"), "--device", "cpu"]
    options = ["--group-size", "64", "--asymmetric", "--format", "pack-quantized", "--samples", "8", "--length", "64"]
    assert main(["quantize", str(dense_model), str(tmp_path / "out"), *files, *options]) == 0
    printed = capsys.readouterr().out
    for line in ("size  ", "perplexity  ", "bits a byte", "layer loss  ", "cost  ", "written  "):
        assert line in printed
    checkpoint = Checkpoint(tmp_path / "out")
    assert checkpoint.scheme(checkpoint.layers[0]) == Scheme("pack-quantized", 64, False)
    report = json.loads((tmp_path / "out" / "quantize-report.json").read_text())
    assert report["bytes_before"] > report["bytes_after"] > 0
    assert len(report["errors"]) == 21


def test_quantize_without_texts_uses_the_standard_library(dense_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("tokenmill.speculative.pair.corpus")
    options = ["--no-evaluation", "--samples", "2", "--length", "64", "--device", "cpu", "--method", "awq"]
    assert main(["quantize", str(dense_model), str(tmp_path / "out"), *options]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--group-size", "0"], "--group-size 0 is neither positive nor -1"),
        (["--samples", "0"], "--samples 0"),
        (["--calibration", "absent"], "absent cannot be read: No such file or directory"),
        (["--group-size", "48"], "no multiple of group_size=48"),
        (["--damping", "-5"], "damping=-5.0 is not in 0..1"),
        (["--damping", "0.1", "--method", "rtn"], "--damping is for --method gptq or awq-gptq; rtn does not use it"),
        (["--act-order", "dynamic", "--method", "awq"], "--act-order is for --method gptq or awq-gptq; awq does not"),
        (["--damping", "nan"], "damping=nan is not in 0..1"),
        (["--device", "foo"], "--device foo is not one; use cpu, cuda or cuda:N"),
        (["--device", "meta"], "--device meta is not one; use cpu, cuda or cuda:N"),
        (["--device", "cuda:99"], "--device cuda:99: torch sees"),
        (
            ["--format", "pack-quantized", "--act-order", "dynamic", "--group-size", "32"],
            "pack-quantized with a dynamic act-order is not loaded by vLLM 0.32; use --act-order static",
        ),
    ],
)
def test_a_bad_request_is_one_line(
    dense_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    common = ["quantize", str(dense_model), str(tmp_path / "out"), "--no-evaluation", "--length", "64"]
    assert main([*common, "--device", "cpu", *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_help_says_what_is_done_without_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["quantize", "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "zero point 8 everywhere (default: True) --asymmetric a zero point for each group --format" in printed
    defaults = GptqOptions()
    assert f"(default: {defaults.act_order}) --damping" in printed
    assert f"0..1 (default: {defaults.damping})" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], None),
        (["--asymmetric"], "stock vLLM 0.32 does not load asymmetric GPTQ (sym=False): use --format pack-quantized"),
        (["--asymmetric", "--format", "pack-quantized"], None),
        (["--method", "gptq", "--act-order", "dynamic"], "does not load GPTQ with a dynamic act-order"),
        (["--group-size", "16"], "does not load GPTQ with groups of 16: use --group-size 32"),
        (["--group-size", "16", "--format", "pack-quantized"], None),
    ],
)
def test_quantize_says_what_stock_vllm_does_not_load(
    dense_model: Path,
    text: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str | None,
) -> None:
    (tmp_path / "text").write_text(text)
    common = ["quantize", str(dense_model), str(tmp_path / "out"), "--no-evaluation", "--device", "cpu"]
    common += ["--calibration", str(tmp_path / "text"), "--method", "rtn", "--group-size", "32"]
    assert main([*common, "--samples", "2", "--length", "64", *options]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "stock vLLM" in line]
    assert len(lines) == (message is not None)
    assert message is None or message in lines[0]
    refusal = json.loads((tmp_path / "out" / "quantize-report.json").read_text())["stock_refusal"]
    assert (refusal is None) == (message is None)


def test_what_the_model_has_no_place_for_is_named_at_the_beginning(
    dense_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    shutil.copytree(dense_model, source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    tensors = load_file(source / "model.safetensors")
    extra = {"model.layers.0.mlp.extra.weight": torch.zeros(3, 2), "model.rotary_emb.inv_freq": torch.ones(16)}
    save_file(tensors | extra, source / "model.safetensors", metadata={"format": "pt"})
    command = ["quantize", str(source), str(tmp_path / "out"), "--method", "rtn", "--no-evaluation", "--device", "cpu"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "left out    model.layers.1 to 2 (18 tensors of " in said
    assert "bytes): config.json has num_hidden_layers=1" in said
    place = "for which model_type='llama' has no place: model.layers.0.mlp.extra.weight"
    assert f"left out    1 tensor of 24 bytes {place}" in said
    assert said.index("left out") < said.index("size  ")
    kept = json.loads((tmp_path / "out" / "quantize-report.json").read_text())["left_out"]
    assert len(kept) == 2


@pytest.mark.parametrize("place", ["tokenmill.quant.quantizer.quantize_block", "torch.nn.Module.load_state_dict"])
@pytest.mark.parametrize("shortage", [lambda: torch.empty(2**60), lambda: "x" * 2**62])
def test_a_shortage_of_memory_is_one_line(
    dense_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    place: str,
    shortage: Callable[[], object],
) -> None:
    monkeypatch.setattr(place, lambda *_arguments, **_keywords: shortage())
    command = ["quantize", str(dense_model), str(tmp_path / "out"), "--method", "rtn", "--no-evaluation"]
    assert main([*command, "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("tokenmill quantize: out of memory on cpu; lower --samples")
    assert error.count("\n") == 1


def test_texts_that_are_none(dense_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").write_text(" \n")
    (tmp_path / "binary").write_bytes(b"abc\xff")
    for name, message in (("empty", "is empty; give a text"), ("binary", "is not UTF-8 text: byte 3")):
        assert main(["quantize", str(dense_model), str(tmp_path / "o"), "--calibration", str(tmp_path / name)]) == 2
        assert message in capsys.readouterr().err


def test_memory_prints_a_table_or_json(dense_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["memory", str(dense_model)]) == 0
    table = capsys.readouterr().out
    for row in ("attention", "feed-forward", "KV cache", "in all"):
        assert row in table
    assert main(["memory", str(dense_model / "config.json"), "--bits", "4", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    stored = Checkpoint(dense_model)
    assert planned["weight_bytes_16_bit"] == stored.weight_bytes
    assert planned["total_bytes"] > planned["weight_bytes"]
    gemma = {"model_type": "gemma2", "hidden_size": 512, "num_hidden_layers": 4, "head_dim": 64, "vocab_size": 1000}
    (tmp_path / "config.json").write_text(json.dumps(gemma))
    assert main(["memory", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "2 layers: all tokens" in said
    assert "its hybrid manager" in said
    assert "hybrid manager" not in table


def test_memory_of_something_else_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["memory", str(tmp_path)]) == 2
    assert "config.json cannot be read" in capsys.readouterr().err
    for text, message in (("5", "text_config=5 is no object"), ("null", "has no 'hidden_size'")):
        (tmp_path / "config.json").write_text(f'{{"text_config": {text}}}')
        assert main(["memory", str(tmp_path)]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
