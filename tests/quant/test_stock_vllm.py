"""Stock vLLM, without any of our hooks, loads what the quantizer writes and predicts what our reference predicts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tokenmill.bench.rivals_vllm import VllmInt4
from tokenmill.models import tiny_pair
from tokenmill.quant.block import BlockSettings
from tokenmill.quant.checkpoint import Checkpoint
from tokenmill.quant.evaluate import perplexity
from tokenmill.quant.gptq import GptqOptions
from tokenmill.quant.quantizer import Request, quantize_checkpoint
from tokenmill.quant.streaming import StreamedModel
from tokenmill.speculative.pair.corpus import calibration_text

pytest.importorskip("vllm")

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
