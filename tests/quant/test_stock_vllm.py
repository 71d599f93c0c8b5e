"""Stock vLLM, without any of our hooks, loads what the quantizer writes and predicts what our reference predicts; what
it refuses is what `stock_refusal` says."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tokenmill.bench.rivals_vllm import VllmInt4
from tokenmill.models import tiny_pair
from tokenmill.quant.checkpoint import Checkpoint
from tokenmill.quant.evaluate import perplexity
from tokenmill.quant.format import STOCK_VLLM, Scheme, stock_refusal, write_config
from tokenmill.quant.gptq import GptqOptions
from tokenmill.quant.method import BlockSettings
from tokenmill.quant.quantizer import Request, quantize_checkpoint
from tokenmill.quant.streaming import StreamedModel
from tokenmill.speculative.pair.corpus import calibration_text

vllm = pytest.importorskip("vllm")

#: Prints the likelihood that vLLM gives to the prompt's tokens.
SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams
tokens = json.loads(sys.argv[2])
model = LLM(sys.argv[1], dtype="bfloat16", enforce_eager=True, max_model_len=512, max_num_seqs=2)
parameters = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
output = model.generate([{"prompt_token_ids": tokens}], parameters, use_tqdm=False)[0]
logprobs = [entry[token].logprob for token, entry in zip(tokens[1:], output.prompt_logprobs[1:])]
print("RESULT", json.dumps(-sum(logprobs)))
"""


@pytest.mark.parametrize(
    ("name", "method", "group_size", "symmetric"),
    [("gptq", "gptq", 128, True), ("pack-quantized", "awq-gptq", 32, False)],
)
def test_stock_vllm_predicts_what_the_reference_predicts(
    tmp_path: Path, name: str, method: str, group_size: int, symmetric: bool
) -> None:
    if not torch.cuda.is_available() and (lacking := VllmInt4().why_not(256, 192, 128)):
        pytest.skip(lacking)
    target, _ = tiny_pair()
    block = BlockSettings(method, group_size, symmetric, torch.bfloat16, GptqOptions())  # type: ignore[arg-type]
    text = calibration_text("held_out", 1200)
    request = Request(block, name, calibration_text("train", 60_000), None, num_samples=8, length=256)
    quantize_checkpoint(target, tmp_path / "out", request)
    model = StreamedModel(Checkpoint(tmp_path / "out"))
    tokenizer = model.tokenizer()
    tokens = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert len(tokens) < 512
    quiet = {"TOKENMILL_HOOKS": "none", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    quiet |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    answer = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, str(tmp_path / "out"), json.dumps(tokens)],
        capture_output=True,
        text=True,
        env=os.environ | quiet,
        timeout=500,
        check=False,
    )
    results = [line for line in answer.stdout.splitlines() if line.startswith("RESULT ")]
    assert results, answer.stderr[-3000:]
    nats = json.loads(results[0].removeprefix("RESULT "))
    ours = perplexity(model, text, 512)
    assert ours.num_tokens == len(tokens) - 1
    assert nats == pytest.approx(ours.nats, rel=0.01)  # vLLM computes in bfloat16


def vllm_takes(scheme: Scheme) -> bool:
    """Whether vLLM's own code takes the configuration, sizes aside."""
    quantization = "vllm.model_executor.layers.quantization"
    marlin = pytest.importorskip(f"{quantization}.utils.marlin_utils")
    try:
        if scheme.format == "gptq":
            module = pytest.importorskip(f"{quantization}.auto_gptq")
            module.AutoGPTQConfig.from_config(write_config(scheme))
            return scheme.group_size in marlin.MARLIN_SUPPORTED_GROUP_SIZES
        module = pytest.importorskip(f"{quantization}.compressed_tensors.compressed_tensors")
        module.CompressedTensorsConfig.from_config(write_config(scheme))
    except ValueError:
        return False
    return True


@pytest.mark.skipif(not vllm.__version__.startswith(STOCK_VLLM), reason=f"not vLLM {STOCK_VLLM}")
def test_what_stock_vllm_refuses_is_known() -> None:
    for name, group_size, symmetric, act_order in itertools.product(
        ("gptq", "pack-quantized"), (-1, 8, 16, 32, 64, 96, 128, 256), (True, False), (True, False)
    ):
        scheme = Scheme(name, group_size, symmetric, act_order)
        assert (stock_refusal(scheme) is None) == vllm_takes(scheme), scheme


@pytest.mark.skipif(not vllm.__version__.startswith(STOCK_VLLM), reason=f"not vLLM {STOCK_VLLM}")
@pytest.mark.parametrize(("K", "N"), [(128, 96), (128, 100), (136, 96), (132, 96), (96, 32)])
def test_the_sizes_that_stock_vllm_refuses_on_a_cpu_are_known(K: int, N: int) -> None:
    linear = pytest.importorskip("vllm.model_executor.kernels.linear")
    if not linear.current_platform.is_cpu():
        pytest.skip("not vLLM's CPU build")
    scalars = pytest.importorskip("vllm.scalar_type").scalar_types
    wanted = linear.MPLinearLayerConfig((K, N), (K, N), scalars.uint4b8, torch.bfloat16, -1, zero_points=False)
    kernel = pytest.importorskip("vllm.model_executor.kernels.linear.mixed_precision.cpu").CPUWNA16LinearKernel
    for name in ("gptq", "pack-quantized"):
        refusal = stock_refusal(Scheme(name, -1, True), [(K, N)])
        assert (refusal is None) == kernel.can_implement(wanted)[0]
        assert refusal is None or refusal.with_plugin
