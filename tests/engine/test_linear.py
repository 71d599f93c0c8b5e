"""INT4 checkpoints of every format through vLLM on our kernel give the tokens of their exact values.

The exact values are the same checkpoint dequantized, run by transformers in float32. Two right implementations may
still differ where two tokens are nearly as likely, so tokens are compared up to the first such place.
"""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine import conftest
from tests.engine.int4_models import VARIANTS, Variant, write_pair
from tokenmill import env
from tokenmill.engine.vllm import compiler
from tokenmill.quant.format import Scheme

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

PROMPTS = (
    "def read(self, size=-1):\n    ",
    "import os\nimport sys\n\n",
    "class Queue:\n    def __init__(self",
    "for key, value in ",
    "    def __repr__(self):\n        return",
    "try:\n    import",
)
LENGTH = 24
#: Margins, in nats, below which the best two tokens may change places: float16 sums, and int8 activations.
CLOSE = {16: 0.05, 8: 0.5}


def continuation(model: Any, prompt: list[int]) -> tuple[list[int], list[float]]:
    """Greedy tokens of a transformers model and by how much each was ahead of the second."""
    ids = torch.tensor([prompt])
    tokens, margins = [], []
    with torch.no_grad():
        for _ in range(LENGTH):
            best = model(ids).logits[0, -1].float().log_softmax(-1).topk(2)
            tokens.append(int(best.indices[0]))
            margins.append(float(best.values[0] - best.values[1]))
            ids = torch.cat([ids, best.indices[:1].view(1, 1)], dim=1)
    return tokens, margins


def compare(variant: Variant, folder: Path, bits: int = 16, **arguments: Any) -> None:
    """vLLM's greedy tokens of the quantized checkpoint against the exact ones."""
    from vllm import SamplingParams

    from tokenmill.engine.vllm import hooks

    quantized, exact = write_pair(variant, folder)
    engine = conftest.start(model=str(quantized), dtype="float16", max_num_seqs=8, **arguments)
    answers = engine.generate(
        list(PROMPTS), SamplingParams(max_tokens=LENGTH, temperature=0, ignore_eos=True), use_tqdm=False
    )
    status = {status.hook: status for status in hooks.statuses()}["linear"]
    engine.llm_engine.engine_core.shutdown()  # now, not whenever it is collected
    del engine
    gc.collect()
    assert status.state == "active"
    assert "cpu" in status.detail
    assert f"{bits}-bit" in status.detail
    check_tokens([(answer.prompt_token_ids, list(answer.outputs[0].token_ids)) for answer in answers], exact, bits)


def check_tokens(answers: list[tuple[list[int], list[int]]], exact: Path, bits: int = 16) -> None:
    """Prompts and their continuations against those of the exact checkpoint, as far as it is sure."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(exact, dtype=torch.float32)
    compared = 0
    for prompt, answer in answers:
        tokens, margins = continuation(model, prompt)
        sure = next((i for i, margin in enumerate(margins) if margin < CLOSE[bits]), LENGTH)
        assert answer[:sure] == tokens[:sure]
        compared += sure
    assert compared >= 20, "the prompts leave too little to compare; choose surer ones"


#: One of each way through vLLM; the layouts of the others are held by tests/kernels and tests/quant.
COVERED = ("gptq-g32", "awq-g64", "ct-asym-g64", "gptq-asym-g128", "gptq-act-order-g128", "gptq-ragged-g96")


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.name in COVERED], ids=lambda variant: variant.name)
def test_tokens_equal_the_dequantized_checkpoint(variant: Variant, tmp_path: Path) -> None:
    compare(variant, tmp_path)


def test_eight_bit_activations_are_a_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenmill import platform

    if platform.isa() == "plain":
        pytest.skip("there is no 8-bit kernel in plain C++")
    monkeypatch.setenv(env.INT4_ACTIVATION_BITS.name, "8")
    compare(VARIANTS[0], tmp_path, bits=8)


def test_a_scale_that_is_not_finite_is_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    quantized, _ = write_pair(VARIANTS[0], tmp_path)
    tensors = load_file(quantized / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.scales"][1, 3] = float("inf")
    save_file(tensors, quantized / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Exception, match=r"^model\.layers\.0\.mlp\.down_proj: scales\[1, 3\].*must be finite"):
        conftest.start(model=str(quantized), dtype="float16")


#: Workers are processes that import the script, so it cannot be given on the command line.
_TWO_RANKS = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    model, length, prompts = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
    engine = LLM(
        model, dtype="float16", enforce_eager=True, max_model_len=256, max_num_seqs=8, tensor_parallel_size=2
    )
    sampling = SamplingParams(max_tokens=length, temperature=0, ignore_eos=True)
    answers = engine.generate(prompts, sampling, use_tqdm=False)
    print(json.dumps([(answer.prompt_token_ids, list(answer.outputs[0].token_ids)) for answer in answers]))
"""


@pytest.mark.slow
def test_tokens_of_two_ranks_equal_the_dequantized_checkpoint(tmp_path: Path) -> None:
    """A shard has 128 or 384 rows in groups of 96: ranks have whole groups, and parts of one.

    What single layers do at more ranks is in test_linear_gptq.py.
    """
    quantized, exact = write_pair(Variant("gptq-ragged-asym-g96", Scheme("gptq", 96, False)), tmp_path)
    script = tmp_path / "two_ranks.py"
    script.write_text(_TWO_RANKS, encoding="utf-8")
    quiet = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    threads = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(quantized), str(LENGTH), json.dumps(PROMPTS)]
    ended = subprocess.run(command, env=os.environ | quiet | threads, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    check_tokens(json.loads(ended.stdout.splitlines()[-1]), exact)


@pytest.mark.slow
@pytest.mark.skipif(compiler.why_not() is not None, reason=str(compiler.why_not()))
def test_tokens_are_the_same_where_vllm_compiles_the_model(tmp_path: Path) -> None:
    compare(VARIANTS[0], tmp_path, enforce_eager=False)
