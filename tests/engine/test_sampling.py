"""Sampling under speculation follows the target's distribution with the hook, and does not without it.

The test is exact and sees every position. Hugging Face computes the distribution P that a token had to be
drawn from; a sampled token x becomes U = P(tokens ordered before x) + V P(x) with V uniform. If x was drawn
from P, all U are uniform and independent, which a chi-square test over equal bins checks. The vocabulary is
ordered by draft minus target, which puts at one end what a verification that trusts the draft too much prefers.
"""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from tokenmill.models import tiny_pair

SAMPLES, LENGTH, BINS, FALSE_ALARM = 1500, 7, 20, 1e-4
PROMPT = "def main("
SETTINGS = {
    "temperature 1": {"temperature": 1.0},
    "top-k": {"temperature": 1.0, "top_k": 20},
    "all three": {"temperature": 0.7, "top_k": 30, "top_p": 0.9},
}


@functools.cache
def reference(folder: Path) -> Any:
    """Hugging Face's own implementation of a checkpoint, float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def draw(engine: Any, settings: dict[str, float], count: int = SAMPLES) -> tuple[list[int], torch.Tensor]:
    """(prompt ids, [count, LENGTH] sampled token ids)."""
    from vllm import SamplingParams

    parameters = SamplingParams(max_tokens=LENGTH, ignore_eos=True, **settings)
    outputs = engine.generate([PROMPT] * count, parameters, use_tqdm=False)
    return list(outputs[0].prompt_token_ids), torch.tensor([list(output.outputs[0].token_ids) for output in outputs])


def distribution(logits: torch.Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0) -> torch.Tensor:
    """[..., vocabulary] logits to probabilities; top-p keeps the least set of likeliest tokens that reaches it."""
    if not top_k and top_p == 1:
        return (logits / temperature).softmax(-1)
    values, tokens = (logits / temperature).topk(top_k or logits.shape[-1])
    kept = values.softmax(-1)
    kept[kept.cumsum(-1) - kept >= top_p] = 0
    return torch.zeros_like(logits).scatter(-1, tokens, kept / kept.sum(-1, keepdim=True))


@torch.inference_mode()
def uniform(prompt: list[int], tokens: torch.Tensor, settings: dict[str, Any]) -> torch.Tensor:
    """U of every sampled token but each sample's first, which no draft precedes: [count, LENGTH - 1]."""
    rows = torch.cat([torch.tensor(prompt).expand(len(tokens), -1), tokens], dim=1)
    target, draft = (
        distribution(reference(folder)(rows).logits[:, len(prompt) : -1], **settings) for folder in tiny_pair()
    )
    sampled = tokens[:, 1:, None]
    order = draft - target
    before = (target * (order < order.gather(-1, sampled))).sum(-1)
    return before + target.gather(-1, sampled).squeeze(-1) * torch.rand(before.shape)


def p_value(prompt: list[int], tokens: torch.Tensor, settings: dict[str, Any]) -> float:
    """Of the hypothesis that the tokens were drawn from the target under these settings."""
    found = torch.cat([uniform(prompt, part, settings) for part in tokens.split(128)])
    counts, _ = np.histogram(found.clamp(0, 1).numpy(), bins=BINS, range=(0, 1))
    return float(stats.chisquare(counts).pvalue)


def test_power() -> None:
    """A deviation of w = 0.09 (Cohen's w; about 0.035 in total variation) is found with probability 0.99."""
    positions, deviation = SAMPLES * (LENGTH - 1), 0.09
    critical = stats.chi2.isf(FALSE_ALARM, BINS - 1)
    assert stats.ncx2.sf(critical, BINS - 1, positions * deviation**2) > 0.99


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_speculation_keeps_the_distribution(speculating: Any, settings: dict[str, Any]) -> None:
    prompt, tokens = draw(speculating, settings)
    assert p_value(prompt, tokens, settings) > FALSE_ALARM


def test_without_a_draft_the_same_test_passes(plain: Any) -> None:
    prompt, tokens = draw(plain, SETTINGS["temperature 1"])
    assert p_value(prompt, tokens, SETTINGS["temperature 1"]) > FALSE_ALARM


@pytest.mark.usefixtures("stock_sampling")
def test_stock_vllm_fails_it(speculating: Any) -> None:
    prompt, tokens = draw(speculating, SETTINGS["temperature 1"], 300)
    assert p_value(prompt, tokens, SETTINGS["temperature 1"]) < 1e-12


def test_a_lean_towards_the_draft_is_found() -> None:
    """Tokens drawn from 15% draft and 85% target fail, so the test is not blind to what it is for."""
    prompt = [10, 11]
    with torch.inference_mode():
        target, draft = (reference(folder)(torch.tensor([prompt])).logits[0, -1].softmax(-1) for folder in tiny_pair())
    torch.manual_seed(1)
    drawn = torch.multinomial(0.85 * target + 0.15 * draft, SAMPLES * (LENGTH - 1), replacement=True)
    tokens = torch.stack([torch.full_like(drawn, prompt[1]), drawn], dim=1)
    assert p_value(prompt[:1], tokens, SETTINGS["temperature 1"]) < FALSE_ALARM
