"""The native library: what it says about itself, and why it cannot be used when it cannot."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tokenmill import env, platform
from tokenmill.errors import UnsupportedError
from tokenmill.kernels import extension, registry

GREEDY = registry.op_spec("spec_verify_greedy")
CACHES = (extension.why_not_loaded, extension.build_info, extension.why_not, extension.native)


@pytest.fixture
def fresh_caches() -> Iterator[None]:
    """Answers are asked for anew inside the test, and its answers forgotten after it."""
    for cached in CACHES:
        cached.cache_clear()
    yield
    for cached in CACHES:
        cached.cache_clear()


def test_says_what_it_was_built_with() -> None:
    info = extension.build_info()
    assert set(info) == {"cuda", "cuda_architectures", "lacks", "compiler", "torch", "isa"}
    assert set(info["isa"]) <= set(env.ISA_LEVELS)
    if info["cuda"] is None:
        assert "CUDA" in info["lacks"][0]
        assert info["cuda_architectures"] == []
    else:
        assert info["lacks"] == []
        assert {"sm_90a", "sm_100a"} <= set(info["cuda_architectures"])


def test_cuda_ops_are_there_exactly_when_it_was_built_with_cuda() -> None:
    reason = extension.why_not("spec_verify_greedy_cuda")
    if extension.build_info()["cuda"]:
        assert reason is None
        operator = "tokenmill_native::spec_verify_greedy_cuda"
        assert torch._C._dispatch_has_kernel_for_dispatch_key(operator, "CUDA")
    else:
        assert reason == f"the native library has {extension.build_info()['lacks'][0]}"


def test_an_absent_library_names_the_remedy(
    fresh_caches: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(extension, "LIBRARY", tmp_path / "_C.abi3.so")
    problem = GREEDY.problem()
    explained = registry.explain(GREEDY, problem)
    assert explained.chosen == "reference"
    assert "is not built; install a C++ compiler and ninja" in explained.refusals["cpu"]
    assert extension.build_info() == {}
    with pytest.raises(UnsupportedError, match="is not built"):
        extension.native("spec_verify_greedy_cpu")


def test_a_damaged_library_is_one_line(fresh_caches: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    damaged = tmp_path / "_C.abi3.so"
    damaged.write_bytes(b"\x7fELF" + bytes(100))
    monkeypatch.setattr(extension, "LIBRARY", damaged)
    reason = extension.why_not_loaded()
    assert reason is not None
    assert "does not load with torch" in reason
    assert "\n" not in reason


def test_an_op_newer_than_the_library_asks_for_a_build() -> None:
    assert extension.why_not("an_op_of_tomorrow_cpu") == (
        "the native library lacks an_op_of_tomorrow_cpu; run `tokenmill build`"
    )


def test_a_gpu_family_must_be_the_exact_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel of an unknown newer GPU is not guessed; asked with a GPU that only the test has."""
    gpu = platform.Gpu(0, "a future GPU", (13, 0), 1 << 30)
    monkeypatch.setattr(platform, "gpus", lambda: (gpu,))
    extension._gpu_family.cache_clear()
    try:
        problem = GREEDY.problem(device="cuda:0")
        reason = extension.why_not_cuda("spec_verify_greedy_cuda", problem, ("sm90", "sm100"))
        assert reason == "GPU 0 is sm130; the kernel is compiled for sm90, sm100"
        reason = extension.why_not_cuda("spec_verify_greedy_cuda", GREEDY.problem(device="cuda:1"), ("sm90",))
        assert reason == f"torch {torch.__version__} sees no CUDA device 1"
        reason = extension.why_not_cuda("spec_verify_greedy_cuda", problem, ("sm130",))
        assert reason == extension.why_not("spec_verify_greedy_cuda")
    finally:
        extension._gpu_family.cache_clear()


def test_the_instruction_set_follows_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    levels = ("plain", "avx2", "avx512")
    monkeypatch.setenv(env.ISA.name, "plain")
    assert extension.isa_index(levels) == 0
    for level in platform.isa_levels():
        monkeypatch.setenv(env.ISA.name, level)
        chosen = env.ISA_LEVELS[extension.isa_index(levels)]
        assert chosen in platform.isa_levels()
        assert chosen == level or level not in levels


def test_the_header_lists_the_levels_in_the_order_of_the_settings() -> None:
    header = (Path(env.__file__).parent / "csrc" / "isa.h").read_text(encoding="utf-8")
    listed = [line.strip(" ,") for line in header.splitlines() if line.startswith("    ISA_")]
    assert listed == [f"ISA_{level.upper()}" for level in env.ISA_LEVELS]
