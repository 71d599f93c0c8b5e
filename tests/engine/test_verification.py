"""The functions of the verification hook beside vLLM's own, and whole greedy runs."""

from typing import Any

import pytest
import torch

from tokenmill.engine.vllm import compat, verification

DTYPES = (torch.float32, torch.float64, torch.int32, torch.int64)


def expected(values: list[float], counts: list[int]) -> list[float]:
    """The specification: each value as often as its count says."""
    return [value for value, count in zip(values, counts, strict=True) for _ in range(count)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("counts", [[], [0], [1], [0, 0, 0], [3, 0, 1, 5], [1] * 100])
def test_expand_repeats_each_value(counts: list[int], dtype: torch.dtype) -> None:
    values = [float(index % 7) for index in range(len(counts))]
    total = torch.tensor(counts, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    x = torch.tensor(values, dtype=dtype)
    result = verification.expand(x, total, sum(counts))
    assert result.dtype == dtype
    assert result.tolist() == expected(values, counts)
    assert x.tolist() == values, "the input is left as it was"


def test_expand_replaces_one_value() -> None:
    result = verification.expand(torch.tensor([0.0, 0.5]), torch.tensor([2, 3]), 3, replace_from=0, replace_to=1)
    assert result.tolist() == [1.0, 1.0, 0.5]


@pytest.mark.usefixtures("speculating", "stock_sampling")
@pytest.mark.parametrize("dtype", [torch.float32, torch.int32], ids=str)
def test_stock_expand_leaves_memory_unwritten(dtype: torch.dtype) -> None:
    """The defect that the hook repairs; when this fails, vLLM has repaired it and the hook can go."""
    values, total = torch.tensor([1, 2], dtype=dtype), torch.tensor([2, 3], dtype=torch.int32)
    assert compat.EXPAND_BATCH_TO_TOKENS.stock()(values, total, 3).tolist() == [3, 3, 3]


def metadata(top_k: list[int]) -> Any:
    """vLLM's sampling parameters for requests at temperature 1 with these top-k."""
    from types import SimpleNamespace

    return SimpleNamespace(
        all_greedy=False, temperature=torch.ones(len(top_k)), top_k=torch.tensor(top_k, dtype=torch.int32), top_p=None
    )


@pytest.mark.usefixtures("speculating")
def test_top_k_in_a_step_without_drafts() -> None:
    """Stock vLLM raises here, and the engine is gone."""
    nothing, none_drafted = torch.empty(0, 50), torch.zeros(2, dtype=torch.int32)
    with pytest.raises(RuntimeError, match=r"max\(\)"):
        compat.APPLY_SAMPLING_CONSTRAINTS.stock()(nothing.clone(), none_drafted, metadata([5, 7]))
    result = compat.APPLY_SAMPLING_CONSTRAINTS.resolve()(nothing, none_drafted, metadata([5, 7]))
    assert result.shape == (0, 50)


@pytest.mark.usefixtures("speculating")
def test_top_k_read_from_unwritten_memory_raises_in_stock(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stops the engine on machines where the memory happens to hold large numbers."""
    logits, total = torch.randn(3, 50), torch.tensor([2, 3], dtype=torch.int32)
    kept = compat.APPLY_SAMPLING_CONSTRAINTS.resolve()(logits.clone(), total, metadata([5, 7]))
    assert (kept > -torch.inf).sum(-1).tolist() == [5, 5, 7]

    fresh = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *a, **k: fresh(self, *a, **k).fill_(1 << 30))
    monkeypatch.setattr(compat.EXPAND_BATCH_TO_TOKENS.path.replace(":", "."), compat.EXPAND_BATCH_TO_TOKENS.stock())
    with pytest.raises((RuntimeError, IndexError)):
        compat.APPLY_SAMPLING_CONSTRAINTS.stock()(logits, total, metadata([5, 7]))
