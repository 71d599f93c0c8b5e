"""What vLLM holds of the requests' contexts: its own functions give the same bytes, and each architecture its kinds."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tokenmill.quant.format import STOCK_VLLM
from tokenmill.quant.kv_cache import LayerCache, cache_parts
from tokenmill.quant.memory import plan

#: 2 (key and value) x 8 heads x 128.
NUMBERS = 2048


def of_vllm(
    monkeypatch: pytest.MonkeyPatch, layers: dict[int | None, int], states: tuple[int, int], context: int, step: int
) -> int:
    """Bytes that vLLM needs for one request of the full context."""
    utils = pytest.importorskip("vllm.v1.core.kv_cache_utils")
    kinds = pytest.importorskip("vllm.v1.kv_cache_interface")
    for name in ("get_hisparse_kv_cache_groups", "_annotate_eagle_groups", "_warn_if_unannotated_eagle_mamba"):
        monkeypatch.setattr(utils, name, lambda *_arguments, **_keywords: None)
    monkeypatch.setattr(utils, "_uses_trailing_mtp_layers", lambda *_: False)
    layout = SimpleNamespace(is_block_outermost=False, is_block_compact=True)
    config = SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=context),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        attention_config=SimpleNamespace(hisparse_config=None),
        cache_config=SimpleNamespace(mamba_cache_mode="align", get_resolved_kv_cache_layout=lambda: layout),
        max_in_flight_tokens=2 * step,
    )
    state_layers, state_bytes = states
    token = NUMBERS * 2
    # As vLLM's platform does before: blocks are made large enough for a state, and its page is as large.
    block = 16 * max(1, -(-state_bytes // (16 * token)))
    common = {"block_size": block, "num_kv_heads": 8, "head_size": 128, "dtype": torch.bfloat16}
    specs: dict[str, Any] = {}
    for window, count in layers.items():
        for index in range(count):
            specs[f"{window}.{index}"] = (
                kinds.FullAttentionSpec(**common)
                if window is None
                else kinds.SlidingWindowSpec(**common, sliding_window=window)
            )
    for index in range(state_layers):
        specs[f"state.{index}"] = kinds.MambaSpec(
            block_size=block, shapes=((state_bytes,),), dtypes=(torch.uint8,), page_size_padded=block * token,
            mamba_cache_mode="align",
        )  # fmt: skip
    groups = utils.get_kv_cache_groups(config, specs)
    return int(utils._max_memory_usage_bytes_from_groups(config, groups))


@pytest.mark.parametrize(
    ("layers", "states", "context", "step"),
    [
        ({None: 32}, (0, 0), 8192, 2048),
        ({None: 3}, (0, 0), 1000, 2048),
        ({4096: 32}, (0, 0), 32768, 2048),  # Mistral 7B v0.1
        ({4096: 13, None: 13}, (0, 0), 8192, 2048),  # Gemma 2 2B
        ({512: 22, None: 4}, (0, 0), 131072, 2048),  # Gemma 3 1B, with layers of padding
        ({128: 18, None: 18}, (0, 0), 131072, 1024),  # gpt-oss 120B
        ({1024: 13, None: 10}, (0, 0), 20000, 8192),
        ({None: 12}, (36, 2_146_304), 32768, 2048),  # Qwen3-Next 80B
    ],
)
def test_it_is_what_vllm_needs(
    monkeypatch: pytest.MonkeyPatch, layers: dict[int | None, int], states: tuple[int, int], context: int, step: int
) -> None:
    vllm = pytest.importorskip("vllm")
    if not vllm.__version__.startswith(STOCK_VLLM):
        pytest.skip(f"not vLLM {STOCK_VLLM}")
    caches = {LayerCache(str(window), NUMBERS, window): count for window, count in layers.items()}
    if states[0]:
        caches[LayerCache("state", state_bytes=states[1])] = states[0]
    planned = sum(part.num_bytes for part in cache_parts(caches, 16, context, 1, step))
    assert planned == of_vllm(monkeypatch, layers, states, context, step)


def test_requests_share_what_is_in_flight() -> None:
    caches = {LayerCache("a window", NUMBERS, 128): 1}
    one, many = (cache_parts(caches, 16, 100_000, requests, 2048)[0].tokens for requests in (1, 64))
    assert one == 4096 + 127 + 1 + 16
    assert 64 * 127 + 4096 <= many <= 64 * (127 + 32) + 4096
    short = cache_parts(caches, 16, 100, 64, 2048)[0].tokens
    assert 64 * 100 <= short <= 64 * (100 + 32), "no more than the requests have"


SMALL = {"hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8, "vocab_size": 1000}
ALL = "all tokens"


@pytest.mark.parametrize(
    ("kind", "config", "expected"),
    [
        ("mistral", {"sliding_window": 4096}, {"a window of 4096 tokens": 12}),
        ("mistral", {"sliding_window": None}, {ALL: 12}),
        ("gemma2", {"head_dim": 64}, {"a window of 4096 tokens": 6, ALL: 6}),
        ("gemma3_text", {"sliding_window": 512}, {"a window of 512 tokens": 10, ALL: 2}),
        ("gemma3n_text", {"num_hidden_layers": 30}, {"a window of 512 tokens": 12, ALL: 3}),  # 15 read those of others
        ("gemma4_text", {}, {"a window of 512 tokens": 10, ALL: 2}),
        ("gpt_oss", {}, {"a window of 128 tokens": 6, ALL: 6}),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 128}, {ALL: 12}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 128, "max_window_layers": 0}, {
            "a window of 128 tokens": 12}),
        ("cohere2", {"num_key_value_heads": 8}, {"a window of 4097 tokens": 9, ALL: 3}),
        ("llama4_text", {"num_local_experts": 2}, {"all tokens, although they attend in chunks": 9, ALL: 3}),
        ("deepseek_v2", {"n_routed_experts": 4}, {"latent vectors of all tokens": 12}),
        ("deepseek_v32", {"n_routed_experts": 4}, {
            "latent vectors of all tokens (the index of its sparse attention not counted)": 12}),
        ("jamba", {"num_experts": 2, "mamba_d_state": 16, "mamba_expand": 2, "mamba_d_conv": 4}, {
            f"states of {2 * (1024 * 3 + 1024 * 16)} bytes": 11, ALL: 1}),
        ("qwen3_next", {"num_experts": 4}, {f"states of {2 * (8192 * 3 + 32 * 128 * 128)} bytes": 9, ALL: 3}),
        ("mamba", {"intermediate_size": 1024}, {f"states of {2 * (1024 * 3 + 1024 * 16)} bytes": 12}),
        ("recurrent_gemma", {}, {"states of unknown size, counted as a block each": 8, ALL: 4}),
    ],
)  # fmt: skip
def test_layers_hold_what_their_kind_holds(kind: str, config: dict[str, Any], expected: dict[str, int]) -> None:
    pytest.importorskip("transformers")
    planned = plan({"model_type": kind} | SMALL | config, context=32768)
    assert {part.holds: part.layers - part.padding for part in planned.kv_parts} == expected
    assert planned.kv_bytes == sum(part.num_bytes for part in planned.kv_parts) > 0


def test_without_transformers_no_window_is_assumed(monkeypatch: pytest.MonkeyPatch) -> None:
    config = SMALL | {"intermediate_size": 1024, "sliding_window": 128}
    full = plan(SMALL | {"intermediate_size": 1024}, context=32768)
    planned = plan(config, context=32768)
    assert planned.kv_bytes == full.kv_bytes
    assert planned.kv_parts[0].holds == "all tokens (install transformers to plan the window of 128)"
