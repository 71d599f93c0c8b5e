"""AWQ of mixtures: one scale for all that reads a norm, routers too, and an expert's own between its up and down."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.quant.test_experts import MIXTURES, assert_continues_to_the_same_bytes, correlated, write
from tests.quant.test_quantizer import request, settings
from tokenmill.cli import main
from tokenmill.quant import inputs as inputs_module
from tokenmill.quant.block import quantize_block
from tokenmill.quant.checkpoint import Checkpoint
from tokenmill.quant.experts import SeparateExperts, mixtures
from tokenmill.quant.quantizer import quantize_checkpoint
from tokenmill.quant.scaling import scale_inputs
from tokenmill.quant.streaming import StreamedModel

pytest.importorskip("transformers", "5")

NORM = "post_attention_layernorm.weight"


OUTLIERS = [3, 17, 40, 58]


def write_unequal(produce: ModuleType, folder: Path, kind: str, **changes: Any) -> None:
    """A mixture whose norms make a few features much larger than all others, as those of trained models do."""
    write(produce, folder, kind, **changes)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith(("input_layernorm.weight", NORM)):
            tensor[OUTLIERS] *= 8
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def with_outliers(batches: list[torch.Tensor]) -> list[torch.Tensor]:
    """The same for hidden states."""
    factors = torch.ones(64)
    factors[OUTLIERS] = 12.0
    return [batch * factors for batch in batches]


def weights(block: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.clone() for name, parameter in block.named_parameters()}


def chosen_experts(block: Any, run: Any, batch: torch.Tensor) -> torch.Tensor:
    """Which experts each token goes to."""
    seen: list[torch.Tensor] = []
    ((_, experts),) = mixtures(block).items()
    handle = experts.register_forward_pre_hook(lambda _module, arguments: seen.append(arguments[1].sort(-1).values))
    run(batch)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kind", [*MIXTURES, "olmoe that cuts off"])
def test_scaling_leaves_the_function_of_a_mixture_alone(
    produce: ModuleType, tmp_path: Path, kind: str, symmetric: bool
) -> None:
    kind, _, cuts_off = kind.partition(" ")
    write(produce, tmp_path / "m", kind, **({"clip_qkv": 0.5} if cuts_off else {}))
    model = StreamedModel(Checkpoint(tmp_path / "m"))
    block, run, batches = correlated(model)
    batches = with_outliers(batches)
    before, chosen = weights(block), chosen_experts(block, run, batches[0])
    wanted = [run(batch) for batch in batches]
    scale_inputs(block, run, batches, settings("awq", 32, symmetric))
    for batch, expected in zip(batches, wanted, strict=True):
        torch.testing.assert_close(run(batch), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(chosen_experts(block, run, batches[0]), chosen)
    after = weights(block)
    scales = before[NORM] / after[NORM]
    assert float(scales.max() / scales.min()) > 1.5, "the features are of very unequal size"
    # Everything that reads the norm, and nothing else, is larger by the same factors.
    readers = [name for name in before if name.startswith("mlp.") and before[name].shape[-1] == 64]
    experts: Any = mixtures(block)["mlp.experts"]
    downs = {f"{linear}.weight" for names in experts.sets("mlp.experts")[len(experts) :] for linear in names}
    downs |= {name for name in before if name.endswith("down_proj.weight")}
    ups = {f"{names[1]}.weight" for names in experts.sets("mlp.experts")[: len(experts)]}
    ups |= {name for name in before if name.endswith("up_proj.weight")}
    for name in set(readers) - downs - ups:
        torch.testing.assert_close(after[name], before[name] * scales, rtol=1e-5, atol=1e-6, msg=name)
    assert {"mlp.gate.weight"} < set(readers) - downs - ups
    # An up has besides the inverse of what its down is multiplied by.
    for name in ups:
        rows = (after[name] / (before[name] * scales)).mean(1, keepdim=True)
        torch.testing.assert_close(after[name], before[name] * scales * rows, rtol=1e-4, atol=1e-6, msg=name)
    assert any(not torch.equal(after[name], before[name]) for name in downs)
    assert torch.equal(after["self_attn.o_proj.weight"], before["self_attn.o_proj.weight"]) == bool(
        cuts_off or "kv_lora_rank" in MIXTURES[kind]
    )


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "deepseek_v3"])
def test_a_scaled_mixture_loses_less_than_one_that_is_only_rounded(
    produce: ModuleType, tmp_path: Path, kind: str
) -> None:
    """Of what the block adds, with features as unequal as those of trained models; with others it is no worse."""
    write(produce, tmp_path / "m", kind)
    model = StreamedModel(Checkpoint(tmp_path / "m"))
    losses: dict[tuple[str, bool], float] = {}
    for method in ("rtn", "awq", "gptq", "awq-gptq"):
        for outliers in (True, False):
            block, run, batches = correlated(model)
            batches = with_outliers(batches) if outliers else batches
            wanted = [run(batch) - batch for batch in batches]
            recall = quantize_block(block, run, batches, settings(method)).recall
            if recall is not None:
                recall.let_go()
            found = [run(batch) - batch for batch in batches]
            losses[method, outliers] = float((torch.cat(found) - torch.cat(wanted)).square().mean())
    assert losses["awq", True] < 0.7 * losses["rtn", True]
    assert losses["awq", False] < losses["rtn", False]
    assert losses["awq-gptq", True] < 1.05 * losses["gptq", True]


@pytest.mark.parametrize("kind", MIXTURES)
def test_what_is_written_computes_what_the_source_computes(
    produce: ModuleType, text: str, tmp_path: Path, kind: str
) -> None:
    """Norms and routers of the file are the scaled ones, in the source's dtype and by its names."""
    write_unequal(produce, tmp_path / kind, kind)
    report = quantize_checkpoint(tmp_path / kind, tmp_path / "out", request(text, settings("awq"), "pack-quantized"))
    source, result = Checkpoint(tmp_path / kind), Checkpoint(tmp_path / "out")
    assert report.errors.keys() == set(result.layers)
    assert max(report.errors.values()) < 0.05
    assert report.rounded_experts == 0
    changed = set()
    for name in source.tensors.keys() & result.tensors.keys():
        assert result.tensor(name).dtype == source.tensor(name).dtype, name
        if not torch.equal(result.tensor(name), source.tensor(name)):
            changed.add(name)
    routers = {name for name in source.tensors if ".gate.weight" in name or name.endswith("shared_expert_gate.weight")}
    norms = {name for name in source.tensors if name.endswith("post_attention_layernorm.weight")}
    assert routers <= changed
    assert norms <= changed
    kept = ("e_score_correction_bias", "embed_tokens.weight", "lm_head.weight", "model.norm.weight")
    assert not any(name.endswith(kept) for name in changed)
    assert report.before is not None
    assert report.after is not None
    assert abs(report.after.bits_per_byte - report.before.bits_per_byte) < 0.1 * report.before.bits_per_byte


def test_an_expert_that_too_few_tokens_reach_has_no_scales_of_its_own(
    produce: ModuleType, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_unequal(produce, tmp_path / "m", "qwen3_moe", unused=2)
    model = StreamedModel(Checkpoint(tmp_path / "m"))
    tokens = torch.tensor(model.tokenize(text)[: 24 * 128]).view(24, 128)
    block = model.block(0)
    before, run, batch = weights(block), model.forward(0, block), model.embed(tokens)
    scale_inputs(block, run, [batch], settings("awq"))
    after = weights(block)
    scales = before[NORM] / after[NORM]
    assert float(scales.max() / scales.min()) > 1.5
    for expert in range(4):
        up, down = (f"mlp.experts.{expert}.{name}_proj.weight" for name in ("up", "down"))
        assert torch.allclose(after[up], before[up] * scales, rtol=1e-4, atol=1e-6) == (expert == 2)
        assert torch.equal(after[down], before[down]) == (expert == 2)

    (tmp_path / "text").write_text(text)
    capsys.readouterr()
    command = ["quantize", str(tmp_path / "m"), str(tmp_path / "out"), "--method", "awq", "--length", "128"]
    options = ["--group-size", "32", "--no-evaluation", "--device", "cpu", "--calibration", str(tmp_path / "text")]
    assert main([*command, *options]) == 0
    said = "1 of them are rounded to nearest, without scales of their own: fewer than 64 tokens"
    assert said in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "quantize-report.json").read_text())["rounded_experts"] == 1


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe"])
def test_with_too_few_tokens_for_every_expert_only_shared_ones_decide(
    produce: ModuleType, tmp_path: Path, kind: str
) -> None:
    write(produce, tmp_path / "m", kind)
    block, run, batches = correlated(StreamedModel(Checkpoint(tmp_path / "m")))
    before = weights(block)
    scale_inputs(block, run, [with_outliers(batches)[0][:1, :32]], settings("awq"))
    after = weights(block)
    same = {name for name in before if torch.equal(before[name], after[name])}
    mixture = {name for name in before if name.startswith("mlp.") or name == NORM}
    own = {name for name in mixture if name.endswith(("down_proj.weight", "w2.weight")) and ".experts." in name}
    assert own <= same
    assert (mixture <= same) == (kind == "mixtral")


@pytest.mark.parametrize("method", ["awq", "awq-gptq"])
def test_hessians_of_many_experts_take_no_more_memory_than_the_block(
    produce: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    sizes = {"num_experts": 16, "moe_intermediate_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1}
    write(produce, tmp_path / "m", "qwen3_moe", **sizes)
    block, run, batches = correlated(StreamedModel(Checkpoint(tmp_path / "m")))
    looked: list[tuple[int, int]] = []
    find = inputs_module.expert_inputs

    def noting(experts: SeparateExperts, *rest: Any) -> Any:
        found = find(experts, *rest)
        looked.append((len(found), sum(inputs.hessian.nbytes for inputs in found)))
        return found

    monkeypatch.setattr(inputs_module, "expert_inputs", noting)
    quantize_block(block, run, batches, settings(method, group_size=8))
    assert max(size for _, size in looked) <= sum(parameter.nbytes for parameter in block.parameters())
    assert sum(count for count, _ in looked) == 4 * 16, "gate and up, then down, scaled and then rounded"


@pytest.mark.parametrize("kind", ["qwen2_moe", "deepseek_v3"])
def test_a_scaled_run_that_ended_early_continues_to_the_same_bytes(
    produce: ModuleType, text: str, tmp_path: Path, kind: str
) -> None:
    write_unequal(produce, tmp_path / "m", kind)
    wanted = request(text, settings("awq-gptq", order="group-aware"), evaluate=False)
    assert_continues_to_the_same_bytes(tmp_path, wanted)


#: Prints the log-probabilities that vLLM gives to the prompt's tokens.
_SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    tokens = json.loads(sys.argv[2])
    engine = LLM(sys.argv[1], dtype=sys.argv[3], enforce_eager=True, max_model_len=128, max_num_seqs=2)
    sampling = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    answer = engine.generate([{"prompt_token_ids": tokens}], sampling, use_tqdm=False)[0]
    shown = [entry[token].logprob for token, entry in zip(tokens[1:], answer.prompt_logprobs[1:])]
    print("RESULT", json.dumps(shown))
"""


@pytest.mark.parametrize(
    ("kind", "form", "method"), [("qwen2_moe", "gptq", "awq"), ("mixtral", "pack-quantized", "awq-gptq")]
)
@pytest.mark.parametrize("hooks", ["none", "all"])
def test_vllm_predicts_what_the_reference_predicts(
    produce: ModuleType, text: str, tmp_path: Path, hooks: str, kind: str, form: str, method: str
) -> None:
    pytest.importorskip("vllm")
    on_gpu = torch.cuda.is_available()
    if hooks == "none" and not on_gpu:
        pytest.skip("stock vLLM has no INT4 experts on a CPU")
    write_unequal(produce, tmp_path / "m", kind)
    quantize_checkpoint(tmp_path / "m", tmp_path / "out", request(text, settings(method), form, evaluate=False))
    model = StreamedModel(Checkpoint(tmp_path / "out"))
    tokens = model.tokenize(text)[:100]
    with torch.no_grad():
        logits = model.head()(model.hidden_states([torch.tensor([tokens])])[0])[0, :-1].float().log_softmax(-1).cpu()
    wanted = logits[torch.arange(len(tokens) - 1), torch.tensor(tokens[1:])]
    (tmp_path / "script.py").write_text(_SCRIPT)
    quiet = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    quiet |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} | ({"TOKENMILL_HOOKS": "none"} if hooks == "none" else {})
    dtype = "bfloat16" if on_gpu else "float32"
    command = [sys.executable, "-W", "ignore", str(tmp_path / "script.py"), str(tmp_path / "out"), json.dumps(tokens)]
    answer = subprocess.run(
        [*command, dtype], env=os.environ | quiet, capture_output=True, text=True, timeout=500, check=False
    )
    results = [line for line in answer.stdout.splitlines() if line.startswith("RESULT ")]
    assert results, answer.stderr[-3000:]
    shown = torch.tensor(json.loads(results[0].removeprefix("RESULT ")))
    torch.testing.assert_close(shown, wanted, rtol=0, atol=0.2 if on_gpu else 2e-3)
