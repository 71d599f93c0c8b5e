"""Mixtures of experts are quantized expert by expert, under the names of the source, with routers as they are."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.quant.test_quantizer import request, settings
from tokenmill.cli import main
from tokenmill.errors import ConfigurationError, InputError, UnsupportedError
from tokenmill.kernels.int4_gemm.weight import dequantize
from tokenmill.quant import inputs as inputs_module
from tokenmill.quant.block import linears, quantize_block
from tokenmill.quant.checkpoint import Checkpoint
from tokenmill.quant.experts import mixtures
from tokenmill.quant.format import Scheme, stock_refusal
from tokenmill.quant.gptq import relative_error
from tokenmill.quant.inputs import expert_inputs
from tokenmill.quant.quantizer import Request, quantize_checkpoint
from tokenmill.quant.streaming import StreamedModel

transformers = pytest.importorskip("transformers", "5")


SIZES: dict[str, Any] = {
    "vocab_size": 288,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
LATENT = {"kv_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32}
DEEPSEEK = {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4},
    "qwen2_moe": {"num_experts": 4, "shared_expert_intermediate_size": 32},
    "olmoe": {"num_experts": 4},
    "deepseek_v2": {**DEEPSEEK, **LATENT, "q_lora_rank": None},
    "deepseek_v3": {**DEEPSEEK, **LATENT, "q_lora_rank": 32},
    "glm4_moe": DEEPSEEK,
}
ROUTERS = ("gate", "shared_expert_gate")


def write(produce: ModuleType, folder: Path, kind: str, **changes: Any) -> Any:
    """A random mixture; `unused` is an expert of the first block to which its router sends nothing."""
    unused = changes.pop("unused", None)
    config = transformers.AutoConfig.for_model(kind, **(SIZES | MIXTURES.get(kind, {}) | changes))
    torch.manual_seed(len(kind))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        spread = 0.1 if name.endswith("gate.weight") else 4 * 0.02
        parameter.data = torch.randn_like(parameter) * spread + ("norm" in name)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.randn_like(buffer) / 8)
    if unused is not None:
        # What all tokens have in common, and no other expert's row looks at.
        model.model.embed_tokens.weight.data[:, 0] = 0.5
        router = model.model.layers[0].mlp.gate.weight.data
        router[:, 0], router[unused, 0] = 0.0, -100.0
    model.to(torch.bfloat16).save_pretrained(folder)
    produce.write_tokenizer(folder)
    return model


def tokens() -> torch.Tensor:
    return torch.randint(0, 256, (2, 64), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", MIXTURES)
def test_a_mixture_is_streamed_as_transformers_computes_it(produce: ModuleType, tmp_path: Path, kind: str) -> None:
    write(produce, tmp_path / kind, kind)
    model = StreamedModel(Checkpoint(tmp_path / kind))
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / kind, dtype=torch.float32)
    with torch.no_grad():
        wanted = whole(tokens()).logits
    torch.testing.assert_close(model.head()(model.hidden_states([tokens()])[0]), wanted, rtol=1e-5, atol=1e-5)
    assert mixtures(model.skeleton(1))
    assert model.left_out() == ()


@pytest.mark.parametrize("form", ["gptq", "pack-quantized"])
@pytest.mark.parametrize("kind", MIXTURES)
def test_what_is_written_has_the_names_of_the_source(
    produce: ModuleType, text: str, tmp_path: Path, kind: str, form: str
) -> None:
    write(produce, tmp_path / kind, kind)
    method = "gptq" if form == "gptq" else "rtn"
    report = quantize_checkpoint(tmp_path / kind, tmp_path / "out", request(text, settings(method), form))
    source, result = Checkpoint(tmp_path / kind), Checkpoint(tmp_path / "out")
    layers = set(result.layers)
    # Every matrix but embedding, head and what chooses experts; biases of linears stay beside their layers.
    matrices = {name.removesuffix(".weight") for name, info in source.tensors.items() if len(info.shape) == 2}
    routers = {name for name in matrices if name.rpartition(".")[2] in ROUTERS}
    assert routers
    assert layers == matrices - routers - {"model.embed_tokens", "lm_head"}
    assert sum(".experts." in name for name in layers) >= 3 * 4
    for name in source.tensors.keys() - {f"{layer}.weight" for layer in layers}:
        assert torch.equal(result.tensor(name), source.tensor(name)), name
    assert result.tensors.keys() - source.tensors.keys() == {
        name for name in result.tensors if name.rpartition(".")[0] in layers and not name.endswith(".bias")
    }
    assert len(list(result.verify())) == len(layers)
    assert result.quantization is not None
    if form == "pack-quantized":  # for GPTQ vLLM looks at the files
        assert {name for name in matrices if result.quantization.scheme(name) is None} == {"lm_head", *routers}
    else:
        assert report.errors.keys() == layers
        assert max(report.errors.values()) < 0.05
    assert report.rounded_experts == 0
    assert report.before is not None
    assert report.after is not None
    assert abs(report.after.bits_per_byte - report.before.bits_per_byte) < 0.1 * report.before.bits_per_byte


def correlated(model: StreamedModel) -> tuple[Any, Any, list[torch.Tensor]]:
    """The second block, its function and inputs of which most lies in a few directions."""
    generator = torch.Generator().manual_seed(1)
    directions = torch.randn(6, SIZES["hidden_size"], generator=generator)
    batches = [
        torch.randn(4, 128, 6, generator=generator) @ directions + 0.3 * torch.randn(4, 128, 64, generator=generator)
        for _ in range(4)
    ]
    block = model.block(1)
    return block, model.forward(1, block), batches


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "deepseek_v2"])
def test_gptq_loses_less_than_rounding_to_nearest(produce: ModuleType, tmp_path: Path, kind: str) -> None:
    write(produce, tmp_path / kind, kind)
    model = StreamedModel(Checkpoint(tmp_path / kind))
    losses = {}
    for method in ("rtn", "gptq"):
        block, run, batches = correlated(model)
        ((name, experts),) = mixtures(block).items()
        # Of gate and up, whose inputs are the same by either method but for the attention before them.
        seen = expert_inputs(experts, range(4), False, run, batches)
        before = {linear: module.weight.T.clone() for linear, module in linears(block).items()}
        result = quantize_block(block, run, batches, settings(method))
        losses[method] = [
            relative_error(before[linear], result.layers[linear], inputs.hessian)
            for own, inputs in zip(experts.sets(name)[:4], seen, strict=True)
            for linear in own
        ]
        for linear, weight in result.layers.items():
            assert torch.equal(linears(block)[linear].weight.T, dequantize(weight, torch.float32)), "it goes on with it"
    assert len(losses["gptq"]) == 8
    assert all(one < 0.8 * other for one, other in zip(losses["gptq"], losses["rtn"], strict=True)), losses


def test_a_hessian_is_of_the_rows_that_are_routed_to_its_expert(produce: ModuleType, tmp_path: Path) -> None:
    write(produce, tmp_path / "m", "qwen3_moe")
    block, run, batches = correlated(StreamedModel(Checkpoint(tmp_path / "m")))
    experts = mixtures(block)["mlp.experts"]
    calls: list[tuple[torch.Tensor, ...]] = []
    handle = experts.register_forward_pre_hook(lambda _module, inputs: calls.append(inputs))
    for batch in batches:
        run(batch)
    handle.remove()
    for of_down in (False, True):
        found = expert_inputs(experts, (3, 1), of_down, run, batches)
        for expert, inputs in zip((3, 1), found, strict=True):
            module: Any = experts[expert]
            rows = torch.cat([hidden[(index == expert).any(1)] for hidden, index, _ in calls])
            rows = torch.nn.functional.silu(module.gate_proj(rows)) * module.up_proj(rows) if of_down else rows
            assert inputs.rows == rows.shape[0] > 100
            torch.testing.assert_close(inputs.hessian, rows.T @ rows / rows.shape[0], rtol=1e-4, atol=1e-5)


def test_hessians_of_many_experts_take_no_more_memory_than_the_block(
    produce: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"num_experts": 16, "moe_intermediate_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1}
    write(produce, tmp_path / "m", "qwen3_moe", **sizes)
    block, run, batches = correlated(StreamedModel(Checkpoint(tmp_path / "m")))
    looked: list[tuple[bool, int]] = []

    def noting(experts: Any, chosen: Any, of_down: bool, *rest: Any) -> Any:
        found = expert_inputs(experts, chosen, of_down, *rest)
        looked.append((of_down, sum(inputs.hessian.nbytes for inputs in found)))
        return found

    monkeypatch.setattr(inputs_module, "expert_inputs", noting)
    result = quantize_block(block, run, batches, settings(group_size=8))
    assert len(result.layers) == 4 + 3 * 16
    room = sum(parameter.nbytes for parameter in block.parameters())
    assert max(size for _, size in looked) <= room
    assert sum(not of_down for of_down, _ in looked) > 1, "one pass is not enough for all"
    assert sum(of_down for of_down, _ in looked) == 1


def test_an_expert_that_no_token_reaches_is_rounded_to_nearest(
    produce: ModuleType, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(produce, tmp_path / "m", "qwen3_moe", unused=2)
    (tmp_path / "text").write_text(text)
    options = ["--group-size", "32", "--no-evaluation", "--device", "cpu", "--calibration", str(tmp_path / "text")]
    capsys.readouterr()
    for method in ("gptq", "rtn"):
        command = ["quantize", str(tmp_path / "m"), str(tmp_path / method), "--method", method, "--length", "128"]
        assert main([*command, *options]) == 0
        said = capsys.readouterr().out
        assert ("experts     1 of them are rounded to nearest: fewer than 64 tokens" in said) == (method == "gptq")
    report = json.loads((tmp_path / "gptq" / "quantize-report.json").read_text())
    assert report["rounded_experts"] == 1
    one, other = Checkpoint(tmp_path / "gptq"), Checkpoint(tmp_path / "rtn")
    same = {
        layer for layer in one.layers if torch.equal(one.tensor(f"{layer}.qweight"), other.tensor(f"{layer}.qweight"))
    }
    assert same == {f"model.layers.0.mlp.experts.2.{name}_proj" for name in ("gate", "up", "down")}
    assert report["errors"].keys() == set(one.layers) - same


def assert_continues_to_the_same_bytes(folder: Path, wanted: Request) -> None:
    """A run over the model in `folder`/m, broken off after its first block, and one more write what one run does."""
    done: list[tuple[int, int]] = []
    whole = quantize_checkpoint(
        folder / "m", folder / "whole", wanted, progress=lambda at, of, _error: done.append((at, of))
    )
    assert done == [(1, 2), (2, 2)]

    def stop(at: int, of: int, error: float | None) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(folder / "m", folder / "resumed", wanted, progress=stop)
    resumed = quantize_checkpoint(folder / "m", folder / "resumed", wanted)
    assert resumed.errors == whole.errors
    for file in (folder / "whole").iterdir():
        if file.name != "quantize-report.json":  # holds the seconds
            assert file.read_bytes() == (folder / "resumed" / file.name).read_bytes(), file.name


def test_a_run_that_ended_early_continues_to_the_same_bytes(produce: ModuleType, text: str, tmp_path: Path) -> None:
    write(produce, tmp_path / "m", "deepseek_v3", unused=None, first_k_dense_replace=0)
    assert_continues_to_the_same_bytes(tmp_path, request(text, settings(order="group-aware"), evaluate=False))


def test_what_cannot_be_done_with_experts_is_said(produce: ModuleType, text: str, tmp_path: Path) -> None:
    write(produce, tmp_path / "m", "mixtral")
    with pytest.raises(ConfigurationError, match=r"^a mixture of experts with a dynamic act-order .*static or group-a"):
        quantize_checkpoint(tmp_path / "m", tmp_path / "out", request(text, settings(order="dynamic")))
    write(produce, tmp_path / "merged", "granitemoe", num_local_experts=4)
    with pytest.raises(UnsupportedError, match=r"model_type='granitemoe'; input scaling knows llama, .* --method gptq"):
        quantize_checkpoint(tmp_path / "merged", tmp_path / "out", request(text, settings("awq")))
    with pytest.raises(InputError, match=r"gate_up_proj is 3-dimensional; experts are quantized where files have gate"):
        quantize_checkpoint(tmp_path / "merged", tmp_path / "out", request(text, settings("rtn")))
    assert not (tmp_path / "out").exists()
    refusal = stock_refusal(Scheme("gptq", 32, True), has_experts=True)
    assert refusal is not None
    assert refusal.reason == "INT4 experts on a CPU"
    assert refusal.with_plugin
