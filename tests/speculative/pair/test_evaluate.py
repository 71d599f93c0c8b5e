"""The figures: against counting by hand, and against drafting one token at a time."""

import math

import pytest
import torch

from tokenmill.speculative.pair import tokenizer as pair_tokenizer
from tokenmill.speculative.pair.corpus import Document
from tokenmill.speculative.pair.evaluate import acceptance, bits_per_byte, continue_greedily, draft_rounds
from tokenmill.speculative.pair.model import Llama, Shape

SHAPE = Shape(hidden=32, layers=1, heads=2, kv_heads=1, feed_forward=64, vocabulary=300, head_dim=16)


def random_model(seed: int) -> Llama:
    model = Llama(SHAPE, seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return model


@pytest.mark.parametrize(
    ("matches", "rounds"),
    [
        ([], []),
        ([True, True], []),
        ([False] * 4, [0, 0]),
        ([True, True, True], [3]),
        ([True, False, True, True, True, True], [1, 3]),
        ([True] * 8, [3, 3]),
    ],
)
def test_rounds_by_hand(matches: list[bool], rounds: list[int]) -> None:
    assert draft_rounds(matches, 3) == rounds


def test_a_perfect_draft_is_always_accepted() -> None:
    model = random_model(1)
    prompts = torch.randint(300, (2, 5), generator=torch.Generator().manual_seed(0))
    assert acceptance(model, model, prompts, tokens=20, depth=4) == ((1.0,) * 4, 5.0)


@torch.no_grad()
def test_acceptance_equals_drafting_token_by_token() -> None:
    target, draft = random_model(1), random_model(1)
    generator = torch.Generator().manual_seed(3)
    for parameter in draft.parameters():  # near the target, so that some guesses are right
        parameter.add_(0.04 * torch.randn(parameter.shape, generator=generator))
    prompts = torch.randint(300, (6, 8), generator=generator)
    tokens, depth = 40, 3
    counts: list[int] = []
    for prompt in prompts:
        text = continue_greedily(target, prompt[None], tokens)[0]
        position = len(prompt)
        while position + depth <= len(text):
            guessed = continue_greedily(draft, text[None, :position], depth)[0, position:]
            wrong = (guessed != text[position : position + depth]).nonzero()
            counts.append(int(wrong[0]) if len(wrong) else depth)
            position += counts[-1] + 1
    assert 0 < sum(counts) < depth * len(counts)
    by_position, per_round = acceptance(target, draft, prompts, tokens, depth)
    assert by_position == tuple(sum(c > place for c in counts) / len(counts) for place in range(depth))
    assert per_round == pytest.approx(1 + sum(counts) / len(counts))


def test_a_model_that_knows_nothing_pays_for_every_token() -> None:
    """Zero weights make all 300 tokens equally likely: log2(300) bits each; windows and padding change nothing."""
    texts = ["def f(x):\n    return x\n" * 9, "class A:\n    pass\n"]
    tokenizer = pair_tokenizer.train(texts, 300)
    documents = [Document(str(number), text, "held_out") for number, text in enumerate(texts)]
    model = Llama(SHAPE, 0)
    torch.nn.init.zeros_(model.output_weight)
    tokens = sum(len(tokenizer.encode(text).ids) for text in texts) + 1  # one marker lies between the two
    wanted = tokens * math.log2(300) / sum(map(len, texts))
    for window in (7, 1000):
        assert bits_per_byte(model, tokenizer, documents, window) == pytest.approx(wanted, rel=1e-5)
