"""Perplexity: every token is predicted once, and the numbers are those of the plain formula."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenmill.errors import InputError
from tokenmill.quant.checkpoint import Checkpoint
from tokenmill.quant.evaluate import Perplexity, perplexity, windows
from tokenmill.quant.streaming import StreamedModel


@settings(deadline=None)
@given(tokens=st.lists(st.integers(0, 99), min_size=1, max_size=50), length=st.integers(2, 20))
def test_every_token_is_predicted_exactly_once(tokens: list[int], length: int) -> None:
    cut = windows(tokens, 7, length)
    assert [int(t) for window in cut for t in window[0, 1:]] == tokens
    assert int(cut[0][0, 0]) == 7
    for before, after in itertools.pairwise(cut):
        assert before.shape == (1, length)
        assert before[0, -1] == after[0, 0]
    assert all(2 <= window.shape[1] <= length for window in cut)


def test_nothing_to_predict_is_refused() -> None:
    with pytest.raises(InputError, match="0 tokens in windows of 8"):
        windows([], 0, 8)
    with pytest.raises(InputError, match="5 tokens in windows of 1"):
        windows([1] * 5, 0, 1)


def test_units() -> None:
    measured = Perplexity(nats=100 * math.log(8), num_tokens=100, num_bytes=150)
    assert measured.per_token == pytest.approx(8)
    assert measured.bits_per_byte == pytest.approx(2)
    assert math.isfinite(Perplexity(1e9, 1, 1).per_token)


def test_perplexity_is_that_of_transformers(dense_model: Path) -> None:
    transformers = pytest.importorskip("transformers")
    text = "Forty-two naïve bytes: é, €."
    measured = perplexity(StreamedModel(Checkpoint(dense_model)), text, 256)
    tokenizer = transformers.AutoTokenizer.from_pretrained(dense_model)
    tokens = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]])
    model = transformers.AutoModelForCausalLM.from_pretrained(dense_model, dtype=torch.float32)
    with torch.no_grad():
        loss = float(model(tokens, labels=tokens).loss)
    assert measured.num_bytes == len(text.encode()) == measured.num_tokens
    assert measured.nats / measured.num_tokens == pytest.approx(loss, rel=1e-5)
