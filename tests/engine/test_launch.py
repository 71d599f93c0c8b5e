"""The launcher's own decisions: defaults for the CPU, one-line errors. Whole servers: tests/end_to_end."""

import json
import os
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError, model_validator
from safetensors.torch import load_file, save_file

from tests.engine.int4_models import VARIANTS, write_pair
from tokenmill.engine.vllm import compat, compiler, hooks, isa, launch, lifetime
from tokenmill.errors import CheckpointError


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


class Setting(BaseModel):
    """Like vLLM's: checked by pydantic, alone and as a whole."""

    length: int

    @model_validator(mode="after")
    def _known(self) -> "Setting":
        raise ValueError("no such folder\nPlease verify")


@pytest.mark.parametrize(
    ("length", "line"),
    [("x", "length: Input should be a valid integer, unable to parse string as an integer"), (1, "no such folder")],
)
def test_a_wrong_setting_of_vllm_is_said_and_not_counted(length: Any, line: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Setting(length=length)
    assert launch.one_line(caught.value) == line


@pytest.mark.filterwarnings("ignore")  # vLLM's own, at its import
@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ((), None),
        (("-O2",), None),
        (("--enforce-eager",), "--enforce-eager"),
        (("-O0",), "-O0"),
        (("-cc.mode=0",), "--compilation-config has mode 0"),
        (("-O0", "-cc.mode=3"), None),
        (("--enable-lora",), "--enable-lora; vLLM's CPU build does not compile models with adapters"),
    ],
)
def test_flags_that_keep_a_model_uncompiled(
    flags: tuple[str, ...], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(compiler.SWITCH, raising=False)
    found = compiler.asked_for(launch.parse(["model", *flags])[1], on_cpu=True)
    assert found == (None if reason is None else compiler.Uncompiled(reason))


def test_torchs_own_variable_keeps_a_model_uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(compiler.SWITCH, "1")
    found = compiler.asked_for(Namespace(enforce_eager=False), on_cpu=False)
    assert found == compiler.Uncompiled("TORCH_COMPILE_DISABLE=1")


LACK = compiler.Uncompiled("no headers", "install them")


@pytest.mark.parametrize(
    ("on_cpu", "eager", "lack", "reported"),
    [
        (True, False, None, None),
        (True, False, LACK, {"reason": "no headers", "remedy": "install them"}),
        (True, True, LACK, {"reason": "--enforce-eager", "remedy": ""}),
        (False, False, LACK, None),
        (False, True, None, {"reason": "--enforce-eager", "remedy": ""}),
    ],
)
def test_every_process_of_a_server_says_why_it_runs_uncompiled(
    on_cpu: bool,
    eager: bool,
    lack: compiler.Uncompiled | None,
    reported: dict[str, str] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    served: list[tuple[bool, object]] = []

    class Subcommand:
        """In the place of vLLM's."""

        def validate(self, parsed: Namespace) -> None:
            pass

        def cmd(self, parsed: Namespace) -> None:
            served.append((parsed.enforce_eager, hooks.report()["uncompiled"]))

    parsed = arguments(model_tag="organisation/model", enforce_eager=eager)
    monkeypatch.setattr(launch, "parse", lambda argv: (Subcommand(), parsed))
    monkeypatch.setattr(isa, "narrow", lambda: None)
    monkeypatch.setattr(lifetime, "watch_supervisor", lambda: None)
    monkeypatch.setattr(compat, "on_cpu", lambda: on_cpu)
    monkeypatch.setattr(compiler, "why_not", lambda: lack)
    monkeypatch.setattr(compiler, "disable", lambda: None)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    os.environ.pop(compiler.SWITCH, None)
    os.environ["TOKENMILL_UNCOMPILED"] = '{"reason": "of another server"}'
    assert launch.main([]) == 0
    assert served == [(eager or (on_cpu and lack is not None), reported)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pair(VARIANTS[0], tmp_path_factory.mktemp("int4"))[0]


@pytest.fixture
def copied(checkpoint: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    return folder


def test_a_whole_checkpoint_a_name_and_other_formats_pass(copied: Path) -> None:
    launch.refuse_incomplete(str(copied))
    launch.refuse_incomplete("organisation/model")
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    (copied / "model.safetensors").write_bytes(b"theirs")
    launch.refuse_incomplete(str(copied))


def test_a_folder_that_does_not_exist_is_no_name_on_a_hub(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="mistyped does not exist; name a checkpoint's folder"):
        launch.refuse_incomplete(str(tmp_path / "mistyped"))


def test_a_missing_scale_is_named_before_anything_is_loaded(copied: Path) -> None:
    tensors = load_file(copied / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.scales"]
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.down_proj\.scales is missing"):
        launch.refuse_incomplete(str(copied))


def test_another_group_size_than_the_scales_have_is_seen_before_anything_is_loaded(copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    config["quantization_config"]["group_size"] //= 2
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"_proj: there are \d+ scales a column; K=\d+ with group_size=\d+ needs"):
        launch.refuse_incomplete(str(copied))


def test_a_truncated_file_is_one_line_and_a_status(copied: Path) -> None:
    whole = (copied / "model.safetensors").read_bytes()
    (copied / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    command = [sys.executable, "-m", "tokenmill.engine.vllm.launch", str(copied), "--port", "1"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert answer.returncode == 2
    assert "model.safetensors" in answer.stderr.splitlines()[-1]
    assert "truncated" in answer.stderr.splitlines()[-1] or "shorter" in answer.stderr.splitlines()[-1]
    assert "Traceback" not in answer.stderr
