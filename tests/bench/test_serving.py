"""vLLM with and without a hook: prompts, models, ratios, and one real comparison over HTTP."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from tokenmill.bench.rows import read_rows
from tokenmill.bench.serving import command, compare, models, workloads
from tokenmill.bench.serving.processes import Server, ServingError
from tokenmill.errors import ConfigurationError
from tokenmill.models import tiny_pair
from tokenmill.quant.checkpoint import Checkpoint

TARGET, _ = tiny_pair()


def prompts(path: Path, workload: workloads.Workload, seed: int) -> list[str]:
    workloads.write_prompts(path, workload, 5, seed, TARGET)
    return [json.loads(line)["prompt"] for line in path.read_text().splitlines()]


@pytest.mark.parametrize("name", sorted(workloads.WORKLOADS))
def test_prompts_have_their_lengths_and_share_what_they_should(tmp_path: Path, name: str) -> None:
    workload = workloads.WORKLOADS[name].scaled(0.125)
    found = prompts(tmp_path / "prompts.jsonl", workload, seed=1)
    codec = Tokenizer.from_file(str(TARGET / "tokenizer.json"))
    for prompt in found:
        count = len(codec.encode(prompt, add_special_tokens=False).ids)
        assert abs(count - workload.shared - workload.own) <= 8
    assert len(set(found)) == 5
    beginning = codec.decode(codec.encode(found[0], add_special_tokens=False).ids[: workload.shared - 4])
    assert all(prompt.startswith(beginning) for prompt in found) == (workload.shared > 0)
    assert found == prompts(tmp_path / "prompts.jsonl", workload, seed=1)
    assert not set(found) & set(prompts(tmp_path / "prompts.jsonl", workload, seed=2)), "rounds share no cache"


def test_a_written_checkpoint_reads_as_a_fresh_model(tmp_path: Path) -> None:
    folder = models.write_int4(tmp_path, models.SHAPES["mini"], layers=2)
    checkpoint = Checkpoint(folder)
    for index in range(2):
        for name, N, K in models.SHAPES["mini"].linears():
            weight = checkpoint.parameter(f"model.layers.{index}.{name}.weight", torch.float32)
            assert weight.shape == (N, K)
            assert weight.std().item() == pytest.approx(0.02, rel=0.1)
    checkpoint.close()


def test_ratios_are_taken_within_a_round() -> None:
    """A round that was disturbed for both sides does not disturb the ratio."""
    stock = [{"output_tokens_per_second": 10.0, "ttft_p50_ms": 50.0, "tpot_p50_ms": t} for t in (10.0, 90.0, 20.0)]
    ours = [{"output_tokens_per_second": 30.0, "ttft_p50_ms": 25.0, "tpot_p50_ms": t} for t in (5.0, 45.0, 10.0)]
    assert compare._ratios(ours, stock) == {
        "output_tokens_per_second_gain": 3.0,
        "ttft_p50_ms_gain": 2.0,
        "tpot_p50_ms_gain": 2.0,
    }


def test_stock_is_the_base_and_bf16_where_it_does_not_start() -> None:
    stock, hook, dense = (
        compare.Variant(name, TARGET, hooks)
        for name, hooks in (("stock", "none"), ("linear", "linear"), ("stock-bf16", "none"))
    )
    assert compare.base([stock, hook, dense]) == "stock"
    assert compare.base([hook, dense]) == "stock-bf16"
    assert compare.base([hook]) == "linear"


def test_int4_is_served_with_both_kinds_of_activations_on_a_cpu(tmp_path: Path) -> None:
    arguments = command.parser().parse_args(["--model", "mini", "--layers", "1"])
    found = {one.name: one for one in command._variants(arguments, tmp_path, on_gpu=False)}
    assert list(found) == ["stock", "linear", "linear-a8", "stock-bf16"]
    assert found["linear-a8"].environment == {"TOKENMILL_INT4_ACTIVATION_BITS": "8"}
    assert found["linear-a8"].model == found["linear"].model
    assert "linear-a8" not in {one.name for one in command._variants(arguments, tmp_path, on_gpu=True)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workloads", "poems"], "--workloads poems"),
        (["--scale", "-1"], "--scale -1.0"),
        (["--model", "gpt-9"], "--model gpt-9"),
        (["--layers", "99"], "--layers 99 is not in 1..3"),
        (["--slo", "fast"], "--slo fast"),
        (["--concurrency", "0"], "--concurrency 0"),
        (["--rounds", "0"], "--rounds 0"),
    ],
)
def test_bad_arguments_are_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        command.main([*arguments, "--out", str(tmp_path / "rows.jsonl")])
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.end_to_end
def test_a_server_that_fails_is_named_with_its_last_line(tmp_path: Path) -> None:
    server = Server("broken", tmp_path / "nothing", (), "none", tmp_path, {})
    with pytest.raises(ServingError, match=r"the server broken ended with [12]: \w+"):
        server.wait()
    server.close()


@pytest.mark.slow
@pytest.mark.end_to_end
def test_stock_and_the_hook_are_compared_over_http(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.jsonl"
    arguments = ["--model", "mini", "--hooks", "linear", "--workloads", "shared-prefix", "--concurrency", "2"]
    arguments += ["--scale", "0.02", "--rounds", "1", "--waves", "1", "--out", str(out)]
    assert command.main(arguments) == 0
    stock, linear = read_rows([out])
    assert (stock["variant"], linear["variant"]) == ("stock", "linear")
    assert stock["hooks"]["linear"].startswith("off")
    assert linear["hooks"]["linear"].startswith("active: INT4 layers run on")
    for row in (stock, linear):
        assert row["ttft_p50_ms"] > 0
        assert row["tpot_p50_ms"] > 0
        assert row["output_tokens_per_second"] > 0
        assert {"commit", "versions", "command", "device", "good_requests_per_second"} <= row.keys()
    assert stock["tpot_p50_ms_gain"] == 1.0
    assert command.main(arguments) == 0
    assert "1 of 1 groups are in rows.jsonl already" in capfd.readouterr().out
    assert len(read_rows([out])) == 2
