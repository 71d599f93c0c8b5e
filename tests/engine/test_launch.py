"""The launcher's own decisions: defaults for the CPU, one-line errors. Whole servers: tests/end_to_end."""

import os
import subprocess
import sys
from argparse import Namespace
from typing import Any

import pytest

from tokenmill.engine.vllm import launch


def arguments(**given: Any) -> Namespace:
    """As parsed by `vllm serve`, for what `cpu_defaults` reads."""
    parsed = {
        "tensor_parallel_size": 1,
        "pipeline_parallel_size": 1,
        "data_parallel_size": 1,
        "distributed_executor_backend": None,
        "kv_cache_memory_bytes": None,
    }
    return Namespace(**(parsed | given))


NAMES = ("VLLM_CPU_KVCACHE_SPACE", "VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_CPU_OMP_THREADS_BIND")


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def test_defaults_for_one_worker() -> None:
    found = launch.cpu_defaults(arguments())
    assert set(found) == set(NAMES)
    assert found["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert {int(core) for core in found["VLLM_CPU_OMP_THREADS_BIND"].split(",")} == os.sched_getaffinity(0)


@pytest.mark.parametrize("flag", ["tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"])
def test_several_workers_keep_vllms_processes(flag: str) -> None:
    assert set(launch.cpu_defaults(arguments(**{flag: 2}))) == {"VLLM_CPU_KVCACHE_SPACE"}


def test_a_named_executor_is_left_alone() -> None:
    assert "VLLM_ENABLE_V1_MULTIPROCESSING" not in launch.cpu_defaults(arguments(distributed_executor_backend="mp"))


def test_a_cache_size_on_the_command_line_wins() -> None:
    assert "VLLM_CPU_KVCACHE_SPACE" not in launch.cpu_defaults(arguments(kv_cache_memory_bytes=1 << 30))


@pytest.mark.parametrize("name", NAMES)
def test_the_environment_wins(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "7")
    assert name not in launch.cpu_defaults(arguments())


@pytest.mark.parametrize(("free_gib", "cache_gib"), [(0, 1), (4, 1), (24, 3), (100, 12), (4000, 16)])
def test_cache_size(free_gib: int, cache_gib: int) -> None:
    assert launch.kv_cache_gib(free_gib << 30) == cache_gib


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"TOKENMILL_ISA": "avx3"}, "TOKENMILL_ISA='avx3'"),
        ({"TOKENMILL_HOOKS": "lineal"}, "lineal"),
        ({"TOKENMILL_LOG_LEVEL": "loud"}, "TOKENMILL_LOG_LEVEL='loud'"),
        ({"TOKENMILL_PARENT_FD": "987"}, "TOKENMILL_PARENT_FD=987"),
        ({"TOKENMILL_PARENT_FD": "x"}, "TOKENMILL_PARENT_FD='x'"),
    ],
)
def test_a_wrong_setting_is_one_line(variables: dict[str, str], message: str) -> None:
    command = [sys.executable, "-m", "tokenmill.engine.vllm.launch", "--model", "nothing"]
    ended = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: ")
    assert message in ended.stderr
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(98, "Address already in use"), "the port is in use; stop the other program or pass another --port"),
        (ValueError("\n  first\nsecond"), "first"),
        (AssertionError(), "AssertionError"),
    ],
)
def test_any_failure_is_one_line(error: Exception, line: str) -> None:
    assert launch.one_line(error) == line
