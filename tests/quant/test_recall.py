"""What is remembered of a block's finished parts changes nothing but how often they run."""

import gc
import json
import shutil
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tokenmill.quant import recall
from tokenmill.quant.block import quantize_block
from tokenmill.quant.gptq import GptqOptions
from tokenmill.quant.method import BlockSettings, Method
from tokenmill.quant.quantizer import Request, quantize_checkpoint
from tokenmill.quant.streaming import StreamedModel

modeling_llama = pytest.importorskip("transformers.models.llama.modeling_llama")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the attention of Llama blocks runs on whole sequences."""
    counted: Counter[str] = Counter()
    forward = modeling_llama.LlamaAttention.forward

    def counting(self: Any, *arguments: Any, **keywords: Any) -> Any:
        hidden = keywords["hidden_states"] if "hidden_states" in keywords else arguments[0]
        counted["LlamaAttention"] += hidden.shape[1] == 64
        return forward(self, *arguments, **keywords)

    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", counting)
    return counted


def weights(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


# Attention in each of 3 blocks: once to find the sets; for each of 2 batches up to the query, up to the output, once
# whole, and not again for the second set of the network and the next block. Scaled norms are rounded in the file: the
# last pass differs.
@pytest.mark.parametrize(("method", "recalled", "again"), [("gptq", 21, 33), ("awq-gptq", 45, 51)])
def test_recalled_parts_give_the_same_files(
    dense_model: Path,
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    calls: Counter[str],
    method: Method,
    recalled: int,
    again: int,
) -> None:
    block = BlockSettings(method, 32, True, torch.bfloat16, GptqOptions())
    request = Request(block, "gptq", text, None, num_samples=40, length=64)
    quantize_checkpoint(dense_model, tmp_path / "one", request)
    assert calls["LlamaAttention"] == recalled
    calls.clear()
    monkeypatch.setattr(recall, "MAX_BYTES", 0)
    quantize_checkpoint(dense_model, tmp_path / "other", request)
    assert weights(tmp_path / "one") == weights(tmp_path / "other")
    assert calls["LlamaAttention"] == again


def test_blocks_that_are_done_are_freed_without_the_collector(
    dense_model: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It looks at what is old so seldom that all blocks would have to have room."""
    read = StreamedModel.block
    blocks: list[weakref.ref[nn.Module]] = []

    def noted(self: StreamedModel, *arguments: Any) -> nn.Module:
        block = read(self, *arguments)
        blocks.append(weakref.ref(block))
        return block

    alive: list[int] = []

    def progress(*_: object) -> None:
        alive.append(sum(block() is not None for block in blocks))

    monkeypatch.setattr(StreamedModel, "block", noted)
    request = Request(BlockSettings("gptq", 32, True, torch.bfloat16, GptqOptions()), "gptq", text, None, 4, 64)
    gc.disable()
    try:
        quantize_checkpoint(dense_model, tmp_path / "out", request, progress=progress)
    finally:
        gc.enable()
    assert alive == [1, 1, 1]


def test_hidden_states_stay_as_exact_as_blocks_give_them(
    dense_model: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    tokens = json.loads((dense_model / "config.json").read_text())["vocab_size"]
    config = transformers.MambaConfig(hidden_size=512, state_size=8, num_hidden_layers=3, vocab_size=tokens)
    model = transformers.MambaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "mamba")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(dense_model / name, tmp_path / "mamba" / name)
    given: list[torch.dtype] = []

    def noted(block: nn.Module, run: Any, batches: list[torch.Tensor], settings: BlockSettings) -> Any:
        given.append(batches[0].dtype)
        return quantize_block(block, run, batches, settings)

    monkeypatch.setattr("tokenmill.quant.quantizer.quantize_block", noted)
    block = BlockSettings("gptq", 32, True, torch.bfloat16, GptqOptions())
    request = Request(block, "gptq", text, None, num_samples=1, length=8, dtype=torch.bfloat16)
    quantize_checkpoint(tmp_path / "mamba", tmp_path / "out", request)
    assert given == [torch.bfloat16, torch.float32, torch.float32]
