"""The plug-in inside vLLM's GPU builds: it loads, leaves what is right alone, and vLLM decides as on a GPU.

The builds are laid out by `python tools/gpu_build_site.py`; no operator runs. What runs on a GPU: tests/gpu.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tokenmill.engine.vllm import compat, hooks
from tokenmill.models import tiny_pair

ROOT = Path(__file__).resolve().parents[2]
SITES = ROOT / "build" / "gpu-builds"
VERSIONS = ("0.26.0", "0.28.0", "0.32.0")


@pytest.fixture(scope="module", params=VERSIONS)
def probe(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What the probe found in one build; all tests of a version share one process."""
    layout = SITES / request.param
    if not layout.exists():
        pytest.skip(f"no vLLM {request.param} for GPUs here; python tools/gpu_build_site.py lays it out")
    variables = {
        "PYTHONPATH": str(layout / "site"),
        "LD_LIBRARY_PATH": str(layout / "stubs"),
        "CUDA_VISIBLE_DEVICES": "",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "TOKENMILL_HOOKS": "all",
    }
    command = [sys.executable, str(Path(__file__).with_name("probe.py")), *map(str, tiny_pair())]
    ended = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    assert found["hooks"]["vllm"].startswith(request.param)
    assert found["from"] == str(layout / "site")
    return found


def test_private_names(probe: dict[str, Any]) -> None:
    assert {path: why for path, why in probe["names"].items() if why} == {}
    assert len(probe["names"]) > 0


def test_the_plug_in_loads_through_its_entry_point(probe: dict[str, Any]) -> None:
    found = probe["hooks"]["hooks"]
    assert [item["hook"] for item in found] == list(hooks.NAMES)
    raised = [item for item in found if re.match(r"\w+(Error|Exception): ", item["detail"])]
    assert raised == [], "a hook may refuse, but with a reason of its own"


def test_verification_is_left_to_the_gpus_own_kernels(probe: dict[str, Any]) -> None:
    states = {item["hook"]: item["state"] for item in probe["hooks"]["hooks"]}
    assert states["verification"] == "stock"
    assert not probe["replaced"]


def test_vllm_configures_and_chooses_as_on_a_hopper(probe: dict[str, Any]) -> None:
    assert probe["operators"], "the build's real operator library is registered"
    assert probe["speculation"] == "draft_model"
    assert probe["attention"] == "FLASH_ATTN"
    assert probe["kernel"] == "MacheteLinearKernel"


def test_the_rivals_of_a_gpu_can_be_asked(probe: dict[str, Any]) -> None:
    """The adapters of the benchmarks reach each kernel of the build; no operator runs."""
    for name in ("marlin", "machete", "vllm-triton"):
        assert probe["rivals"][name] is None, f"{name}: {probe['rivals'][name]}"
    assert probe["rivals"]["humming"] in (None, "Humming is not installed")
    needed = ["draft_token_ids", "num_draft_tokens", "max_spec_len", "cu_num_draft_tokens"]
    needed += ["draft_probs", "target_logits", "bonus_token_ids", "sampling_metadata"]
    assert probe["sampler"][:8] == needed


def test_the_adapters_call_the_builds_operators_as_their_schemas_want(probe: dict[str, Any]) -> None:
    """Packing runs for real on the CPU but for what only a GPU can do."""
    assert probe["reached"]["MarlinLinearKernel"].endswith("::marlin_gemm"), probe["reached"]
    assert probe["reached"]["MacheteLinearKernel"].endswith("::machete_mm"), probe["reached"]
    assert probe["humming_lacks"] == []


def test_flags_pass_through_the_launcher(probe: dict[str, Any]) -> None:
    assert probe["flags"] == ["a/model", 2, 3, 4, "ray", "fp8"]


def test_checked_versions_are_those_of_the_table() -> None:
    assert {compat.series(version) for version in VERSIONS} == set(compat.CHECKED)
