"""Batches: every window once per pass, and the same ones for the same seed and step."""

import pytest
import torch

from tokenmill.errors import ConfigurationError
from tokenmill.speculative.pair.data import Batches

STREAM = torch.arange(1003)


def test_a_pass_takes_every_window_once() -> None:
    batches = Batches(STREAM, window=10, batch=3, seed=1)
    steps = 33  # 99 windows of ten tokens
    firsts = torch.cat([batches.at(step) for step in range(steps)])
    assert firsts.shape == (99, 11)
    assert torch.equal(firsts, firsts[:, :1] + torch.arange(11))
    starts = firsts[:, 0].sort().values
    assert torch.equal(starts.diff(), torch.full((98,), 10))
    assert batches.passes(steps) == 1.0
    assert not torch.equal(batches.at(steps), batches.at(0))


def test_a_step_depends_on_seed_and_number_alone() -> None:
    walked, jumped = (Batches(STREAM, window=10, batch=4, seed=2) for _ in range(2))
    walk = [walked.at(step) for step in range(60)]
    for step in (59, 3, 30):
        assert torch.equal(jumped.at(step), walk[step])
    assert not torch.equal(Batches(STREAM, window=10, batch=4, seed=3).at(0), walk[0])


def test_too_little_text_for_one_step_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="1003 tokens, a step needs 1501"):
        Batches(STREAM, window=500, batch=2, seed=0)
