"""One vLLM in this process for every test here: a plain engine and a speculating one of the bundled pair.

float32, so that a different order of summation cannot turn a token; few sequences and a small cache, so that
both start in seconds. Nothing of their environment is left behind for the servers that other tests start.
"""

import contextlib
import gc
import os
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tokenmill.models import tiny_pair

DRAFTED = 3


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Layers this small are slower on several threads, and very slow where others use the cores.

    vLLM's worker takes `torch.set_num_threads` away from the process; afterwards it is back.
    """
    setter, before = torch.set_num_threads, torch.get_num_threads()
    setter(1)
    try:
        yield
    finally:
        torch.set_num_threads = setter
        setter(before)


@contextlib.contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Sets variables for a while; afterwards the environment is what it was, also what vLLM wrote into it."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def start(model: str = "", **arguments: Any) -> Any:
    """A `vllm.LLM` in this process, of the bundled target or of another model."""
    quiet = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    with environment(**quiet), one_thread(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from vllm import LLM
        from vllm.v1.engine import core

        # The engines here share one process: the end of one, also when it is merely collected, must not tear down
        # the process groups that the others still use.
        core.cleanup_dist_env_and_memory = lambda *arguments, **options: None
        target, _ = tiny_pair()
        shape = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256, "max_num_seqs": 128}
        return LLM(
            model or str(target), **{**shape, **arguments}
        )  # statistics are off unless asked for: they are one a process


@pytest.fixture(scope="session")
def speculating() -> Iterator[Any]:
    """vLLM with the bundled draft, three drafted tokens a step, hooks installed by vLLM's own plug-in loading."""
    _, draft = tiny_pair()
    drafting = {"model": str(draft), "num_speculative_tokens": DRAFTED}
    engine = start(speculative_config=drafting, disable_log_stats=False)
    yield engine
    del engine
    gc.collect()


@pytest.fixture(scope="session")
def plain() -> Iterator[Any]:
    """The same vLLM without a draft."""
    engine = start()
    yield engine
    del engine
    gc.collect()


@pytest.fixture
def stock_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's own functions instead of the hook's, for one test.

    What they read of uninitialised memory is made the same everywhere: fresh tensors hold threes.
    """
    from vllm.v1.sample import rejection_sampler

    from tokenmill.engine.vllm import compat

    for name in (compat.EXPAND_BATCH_TO_TOKENS, compat.APPLY_SAMPLING_CONSTRAINTS):
        monkeypatch.setattr(rejection_sampler, name.path.partition(":")[2], name.stock())
    fresh = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *a, **k: fresh(self, *a, **k).fill_(3))


@pytest.fixture(autouse=True)
def thread_for_a_test() -> Iterator[None]:
    with one_thread():
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that use an engine are marked so; vLLM's own warnings are not ours to fail on."""
    for item in items:
        if {"speculating", "plain"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.engine)
            item.add_marker(pytest.mark.filterwarnings("ignore"))
