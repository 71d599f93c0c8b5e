"""INT4 experts on the CPU, where stock vLLM has none: packed by format, routed, damaged, and through a whole engine."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.engine.int4_models import quantization_config, quantize
from tokenmill.errors import CheckpointError
from tokenmill.kernels.int4_gemm.weight import dequantize
from tokenmill.models import tiny_pair
from tokenmill.quant.format import Scheme
from tokenmill.quant.pack import write_layer

pytestmark = pytest.mark.filterwarnings("ignore")

HIDDEN, WIDTH, EXPERTS = 64, 96, 3
FORMATS = [Scheme(name, 32, symmetric) for name in ("gptq", "awq", "pack-quantized") for symmetric in (True, False)]
FORMATS = [*FORMATS, Scheme("gptq", -1, True), Scheme("pack-quantized", -1, True)]


def moe(**changes: Any) -> Any:
    """What vLLM tells a method about a layer's experts."""
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    said = {"hidden_dim": HIDDEN, "intermediate_size_per_partition": WIDTH, "activation": MoEActivation.SILU}
    shape = {"swiglu_limit": None, "is_act_and_mul": True, "w13_num_shards": 2, "has_bias": False}
    return SimpleNamespace(**{**said, **shape, **changes})


def method(scheme: Scheme, made: Any, **changes: Any) -> Any:
    """The method that vLLM gets for experts of this scheme, by the name under which it looks."""
    from vllm.model_executor.layers.quantization import auto_awq, auto_gptq
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_wna16,
    )

    from tokenmill.engine.vllm import linear_experts

    linear_experts.install()
    size = scheme.group_size
    if scheme.format == "pack-quantized":
        strategy, actorder = ("channel", None) if size == -1 else ("group", changes.get("actorder"))
        said = {"symmetric": scheme.symmetric, "num_bits": changes.get("bits", 4), "strategy": strategy}
        quantized = SimpleNamespace(**said, group_size=None if size == -1 else size, actorder=actorder)
        return compressed_tensors_moe_wna16.CompressedTensorsWNA16MoEMethod(quantized, None, made)
    config = SimpleNamespace(group_size=size, weight_bits=4, pack_factor=8, desc_act=False)
    config = SimpleNamespace(
        **{**vars(config), "is_sym": scheme.symmetric, "zero_point": not scheme.symmetric, **changes}
    )
    if scheme.format == "awq":
        return auto_awq.AutoAWQMoEMethod(config, made)
    return auto_gptq.AutoGPTQMoEMethod(config, made)


def loaded(scheme: Scheme, **changes: Any) -> tuple[Any, Any, list[tuple[torch.Tensor, torch.Tensor]]]:
    """A method with its layer, filled as vLLM's loader does, and each expert's exact weights."""
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    ours, layer = method(scheme, moe()), torch.nn.Module()
    said = {"layer_name": "model.layers.0.experts", "local_num_experts": EXPERTS, "params_dtype": torch.float32}
    how = {"activation": MoEActivation.SILU, "apply_router_weight_on_input": False, "expert_map": None}
    for name, value in {**said, **how, "_loaded_expert_biases": set(), **changes}.items():
        setattr(layer, name, value)
    ours.create_weights(layer, EXPERTS, HIDDEN, WIDTH, torch.float32)
    exact = []
    for expert in range(EXPERTS):
        generator = torch.Generator().manual_seed(expert)
        weights = []
        for product, N, K in (("w13", 2 * WIDTH, HIDDEN), ("w2", HIDDEN, WIDTH)):
            whole = quantize(torch.randn(N, K, generator=generator) * 0.1, scheme)
            weights.append(dequantize(whole, torch.float32))
            for name, tensor in write_layer(whole, scheme).items():
                if hasattr(layer, f"{product}_{name}"):
                    getattr(layer, f"{product}_{name}").data[expert] = tensor
        exact.append((weights[0], weights[1]))
    return ours, layer, exact


def expected(exact: list[tuple[torch.Tensor, torch.Tensor]], x: torch.Tensor, expert: int) -> torch.Tensor:
    gate, up = (x @ exact[expert][0]).chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up) @ exact[expert][1]


X = torch.randn(4, HIDDEN, generator=torch.Generator().manual_seed(9))
IDS = torch.tensor([[0, 2], [2, 1], [1, 0], [2, 0]], dtype=torch.int32)
WEIGHTS = torch.tensor([[0.75, 0.25], [0.5, 0.5], [0.1, 0.9], [1.0, 0.0]])


@pytest.mark.parametrize("scheme", FORMATS, ids=str)
def test_experts_of_every_format(scheme: Scheme) -> None:
    ours, layer, exact = loaded(scheme)
    ours.process_weights_after_loading(layer)
    wanted = torch.stack(
        [
            sum(weight * expected(exact, row, int(e)) for weight, e in zip(weights, ids, strict=True))
            for row, ids, weights in zip(X, IDS, WEIGHTS, strict=True)
        ]
    )
    torch.testing.assert_close(ours.apply(layer, X, WEIGHTS, IDS), wanted, rtol=1e-4, atol=1e-5)
    assert ours.apply(layer, X[:0], WEIGHTS[:0], IDS[:0]).shape == (0, HIDDEN)
    assert sum(parameter.numel() for parameter in layer.parameters()) == 0, "the packed copy serves alone"


def test_a_compiled_model_calls_them_as_one_operator() -> None:
    """Of which layer, vLLM's context says: engines that share a process have layers of one name."""
    from vllm.forward_context import override_forward_context

    ours, layer, _ = loaded(FORMATS[0])
    ours.process_weights_after_loading(layer)
    layer.quant_method = ours
    wanted = ours.apply(layer, X, WEIGHTS, IDS)
    compiled = torch.compile(lambda x, w, i: ours.apply(layer, x, w, i), fullgraph=True, backend="eager")
    context: Any = SimpleNamespace(no_compile_layers={layer.layer_name: SimpleNamespace(routed_experts=layer)})
    with override_forward_context(context):
        torch.testing.assert_close(compiled(X, WEIGHTS, IDS), wanted, rtol=0, atol=0)


def test_experts_of_other_ranks_are_left_to_them() -> None:
    """Of five experts this rank has the last three."""
    ours, layer, exact = loaded(FORMATS[0], expert_map=torch.tensor([-1, -1, 0, 1, 2], dtype=torch.int32))
    ours.process_weights_after_loading(layer)
    out = ours.apply(layer, X[:2], WEIGHTS[:2], torch.tensor([[0, 4], [1, 0]]))
    torch.testing.assert_close(out[0], 0.25 * expected(exact, X[0], 2), rtol=1e-4, atol=1e-5)
    assert not out[1].any()


def test_a_weight_on_the_inputs_counts_there_alone() -> None:
    ours, layer, exact = loaded(FORMATS[0], apply_router_weight_on_input=True)
    ours.process_weights_after_loading(layer)
    out = ours.apply(layer, X[:1], torch.tensor([[0.5]]), torch.tensor([[1]]))
    torch.testing.assert_close(out[0], expected(exact, 0.5 * X[0], 1), rtol=1e-4, atol=1e-5)


def test_biases_that_files_brought_are_added() -> None:
    """One of GPTQ that was not loaded is nothing; vLLM makes a place for it all the same."""
    ours, layer, exact = loaded(FORMATS[0], _loaded_expert_biases={"w2_bias"})
    layer.w13_bias.data.fill_(float("nan"))
    layer.w2_bias.data[1] = 3.0
    ours.process_weights_after_loading(layer)
    out = ours.apply(layer, X[:1], torch.tensor([[1.0]]), torch.tensor([[1]]))
    torch.testing.assert_close(out[0], expected(exact, X[0], 1) + 3, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scheme", [FORMATS[0], FORMATS[2], FORMATS[4]], ids=str)
def test_an_expert_that_is_missing_or_damaged_is_named(scheme: Scheme) -> None:
    ours, layer, _ = loaded(scheme)
    scales = getattr(layer, f"w2_{ours.names[1]}").data
    scales[1].fill_(float("nan"))
    with pytest.raises(CheckpointError, match=r"^model\.layers\.0\.experts\.1\.w2 is missing; the checkpoint"):
        ours.process_weights_after_loading(layer)
    ours, layer, _ = loaded(scheme)
    getattr(layer, f"w13_{ours.names[1]}").data[2, 0, 0] = float("inf")
    with pytest.raises(CheckpointError, match=r"^model\.layers\.0\.experts\.2\.w13: scales\[0, 0\]=inf must be finite"):
        ours.process_weights_after_loading(layer)


@pytest.mark.parametrize(
    ("scheme", "changes", "about", "message"),
    [
        (FORMATS[0], {}, {"intermediate_size_per_partition": 80}, "80 input features .* multiple of group_size=32"),
        (FORMATS[0], {"weight_bits": 8}, {}, "they have 8 bits, our kernel takes 4"),
        (FORMATS[0], {"desc_act": True}, {}, "ordered by activation; quantize them with desc_act=False"),
        (FORMATS[4], {"actorder": "group"}, {}, "ordered by activation"),
        (Scheme("awq", -1, False), {}, {}, "no place for one group a column"),
        (FORMATS[0], {}, {"swiglu_limit": 7.0}, r"activation silu \(limit 7.0\) has no operator"),
    ],
)
def test_experts_that_cannot_run_are_one_line(
    scheme: Scheme, changes: dict[str, Any], about: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=rf"^experts in {scheme.format} cannot be loaded on a CPU: .*{message}"):
        method(scheme, moe(**about), **changes)


#: A process of its own, as vLLM makes the groups that experts need only for the first model of one, and of two ranks.
_TWO_RANKS = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    engine = LLM(
        sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=8, tensor_parallel_size=2
    )
    sampling = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    answer = engine.generate([sys.argv[2]], sampling, use_tqdm=False)[0]
    shown = [next(iter(token.values())).logprob for token in answer.prompt_logprobs[1:]]
    print(json.dumps([answer.prompt_token_ids, shown]))
"""


@pytest.mark.engine
@pytest.mark.slow
def test_log_probabilities_of_two_ranks_equal_the_dequantized_checkpoint(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    source, _ = tiny_pair()
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "moe_intermediate_size": 64,
        "num_hidden_layers": 2,
    }
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}
    experts: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1}
    config = Qwen3MoeConfig(vocab_size=4096, max_position_embeddings=512, **sizes, **heads, **experts)
    model: Any = Qwen3MoeForCausalLM(config)  # type: ignore[no-untyped-call]
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path)
    scheme = Scheme("gptq", 32, False)
    quantized: dict[str, torch.Tensor] = {}
    exact: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        exact[name] = tensor.half().float()
        if name.endswith("_proj.weight"):
            whole = quantize(tensor, scheme)
            exact[name] = dequantize(whole, torch.float32).t().contiguous()
            parts = write_layer(whole, scheme)
            quantized |= {name.removesuffix("weight") + short: part for short, part in parts.items()}
        else:
            quantized[name] = exact[name]
    save_file(exact, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = Qwen3MoeForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    save_file(quantized, tmp_path / "model.safetensors", metadata={"format": "pt"})
    said = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    said["quantization_config"] = quantization_config(scheme)
    (tmp_path / "config.json").write_text(json.dumps(said), encoding="utf-8")
    script = tmp_path / "two_ranks.py"
    script.write_text(_TWO_RANKS, encoding="utf-8")
    quiet = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    threads = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(tmp_path), "import os\nimport sys\n\ndef read(self, size=-1):\n"]
    ended = subprocess.run(command, env=os.environ | quiet | threads, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    ids, shown = json.loads(ended.stdout.splitlines()[-1])
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    wanted = logits[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
    torch.testing.assert_close(torch.tensor(shown), wanted, rtol=0, atol=1e-3)
