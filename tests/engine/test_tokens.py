"""Greedy tokens are those of plain vLLM, with and without speculation, alone and beside sampled requests."""

from typing import Any

import pytest

LENGTH, MARGIN = 20, 0.1
PROMPTS = [
    f"{start} {name}"
    for start in ("import", "from", "class", "def", "    return", "    raise", "for", "with", "    self.", "#")
    for name in ("os", "sys", "Error", "value(", "__init__(self", "x in range(10):", "name")
]


@pytest.fixture(scope="module")
def clear_cut(plain: Any) -> dict[str, list[int]]:
    """Prompts whose greedy continuation wins every step by `MARGIN` nats in plain vLLM, with that continuation.

    Two right implementations may differ where two tokens are nearly equally likely; nothing can be said there.
    """
    from vllm import SamplingParams

    parameters = SamplingParams(temperature=0, max_tokens=LENGTH, ignore_eos=True, logprobs=2)
    found = {}
    for output in plain.generate(PROMPTS, parameters, use_tqdm=False):
        best = [
            sorted((item.logprob for item in step.values()), reverse=True)[:2] for step in output.outputs[0].logprobs
        ]
        if min(first - second for first, second in best) >= MARGIN:
            found[output.prompt] = list(output.outputs[0].token_ids)
    assert len(found) >= 8, f"only {len(found)} of {len(PROMPTS)} prompts are clear-cut; take other prompts"
    return found


def greedy(engine: Any, prompts: list[str], beside: int = 0) -> dict[str, list[int]]:
    """Greedy continuations; `beside` sampled requests run in the same batch."""
    from vllm import SamplingParams

    mixed = [SamplingParams(temperature=0, max_tokens=LENGTH, ignore_eos=True)] * len(prompts)
    mixed += [SamplingParams(temperature=0.9, top_k=40, top_p=0.95, max_tokens=LENGTH, ignore_eos=True)] * beside
    outputs = engine.generate(prompts + ["def main("] * beside, mixed, use_tqdm=False)
    return {output.prompt: list(output.outputs[0].token_ids) for output in outputs[: len(prompts)]}


def test_with_speculation(speculating: Any, clear_cut: dict[str, list[int]]) -> None:
    assert greedy(speculating, list(clear_cut)) == clear_cut


def test_beside_sampled_requests(speculating: Any, clear_cut: dict[str, list[int]]) -> None:
    assert greedy(speculating, list(clear_cut), beside=8) == clear_cut


@pytest.mark.usefixtures("stock_sampling")
def test_stock_is_right_when_all_are_greedy(speculating: Any, clear_cut: dict[str, list[int]]) -> None:
    """So that stock with speculation is a reference, too."""
    assert greedy(speculating, list(clear_cut)) == clear_cut


def test_drafts_are_accepted(speculating: Any, clear_cut: dict[str, list[int]]) -> None:
    """Equal tokens would prove little if nothing had been drafted."""
    before = counter(speculating, "vllm:spec_decode_num_accepted_tokens")
    greedy(speculating, list(clear_cut))
    assert counter(speculating, "vllm:spec_decode_num_accepted_tokens") - before > LENGTH


def counter(engine: Any, name: str) -> float:
    """The value of one of vLLM's counters, summed over its labels."""
    return sum(metric.value for metric in engine.get_metrics() if metric.name == name)
