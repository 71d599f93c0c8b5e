"""Choice: in order, explained, logged once, and never another implementation than the one asked for."""

import dataclasses
import logging
import sys
from types import ModuleType

import pytest
import torch

from tokenmill.errors import InputError, UnsupportedError
from tokenmill.kernels import registry
from tokenmill.kernels.registry import Implementation
from tokenmill.kernels.spec import OpSpec, Problem

GREEDY = registry.op_spec("spec_verify_greedy")


def never(problem: Problem) -> str:
    return f"T={problem['T']} is not 0; pass no drafts"


@pytest.fixture
def spec(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> OpSpec:
    """The greedy op with implementations whose answers are known: cuda refuses, triton and the emulated one can."""
    module = ModuleType("tokenmill_test_implementations")
    vars(module)["REFUSES"] = Implementation("cuda", lambda **arguments: "cuda ran", never)
    vars(module)["CAN"] = Implementation("triton", lambda **arguments: "triton ran", lambda problem: None)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    registry._load.cache_clear()
    request.addfinalizer(registry._load.cache_clear)
    targets = {"cuda": "REFUSES", "triton": "CAN", "cuda-emulated": "CAN"}
    implementations = {name: f"{module.__name__}:{attribute}" for name, attribute in targets.items()}
    return dataclasses.replace(GREEDY, name=f"greedy_{request.node.name}", implementations=implementations)


def test_takes_the_first_that_can(spec: OpSpec) -> None:
    assert registry.choose(spec, spec.problem()).run() == "triton ran"


def test_the_order_is_a_gpus_kernels_first_and_the_reference_last(spec: OpSpec) -> None:
    able = dict.fromkeys(("cpu", "triton", "cuda"), spec.implementations["triton"])
    shown = []
    while able:
        shown.append(str(registry.explain(dataclasses.replace(spec, implementations=able), spec.problem()).chosen))
        del able[shown[-1]]
    assert shown == ["cuda", "triton", "cpu"]


def test_a_named_one_never_falls_back(spec: OpSpec) -> None:
    with pytest.raises(UnsupportedError, match="T=32 is not 0") as caught:
        registry.choose(spec, spec.problem(), "cuda")
    assert list(caught.value.refusals) == ["cuda"]


def test_the_emulated_one_runs_by_name_only(spec: OpSpec) -> None:
    alone = dataclasses.replace(spec, implementations={"cuda-emulated": spec.implementations["cuda-emulated"]})
    assert registry.choose(alone, alone.problem()).name == "reference"
    assert registry.choose(alone, alone.problem(), "cuda-emulated").run() == "triton ran"


def test_an_unknown_name_lists_the_known(spec: OpSpec) -> None:
    with pytest.raises(InputError, match="no implementation 'cuda12'; it has cuda, triton, reference, cuda-emulated"):
        registry.choose(spec, spec.problem(), "cuda12")


def test_an_unknown_op_lists_the_known() -> None:
    with pytest.raises(InputError, match=r"op 'gemv' is not registered; known: .*spec_verify_greedy"):
        registry.op_spec("gemv")


def test_the_reference_always_can(spec: OpSpec) -> None:
    problem = spec.problem()
    assert registry.choose(spec, problem, "reference").run is spec.reference


def test_logs_the_choice_and_the_refusals_once(spec: OpSpec, caplog: pytest.LogCaptureFixture) -> None:
    problem = dataclasses.replace(spec.problem(), op=spec.name)
    with caplog.at_level(logging.INFO, logger="tokenmill.kernels.registry"):
        registry.choose(spec, problem)
        registry.choose(spec, problem)
    assert caplog.messages == [f"{spec.name}: triton (cuda: T=32 is not 0; pass no drafts)"]


def test_a_choice_with_other_refusals_is_logged_again(spec: OpSpec, caplog: pytest.LogCaptureFixture) -> None:
    problem = dataclasses.replace(spec.problem(), op=spec.name)
    alone = dataclasses.replace(spec, implementations={"triton": spec.implementations["triton"]})
    with caplog.at_level(logging.INFO, logger="tokenmill.kernels.registry"):
        registry.choose(alone, problem)
        registry.choose(spec, problem)
    assert caplog.messages == [f"{spec.name}: triton", f"{spec.name}: triton (cuda: T=32 is not 0; pass no drafts)"]


def test_explain_lists_every_refusal_also_behind_the_chosen(spec: OpSpec) -> None:
    reordered = {"cuda": spec.implementations["cuda"], "triton": spec.implementations["triton"]}
    reordered["cpu"] = reordered["cuda"]
    explained = registry.explain(dataclasses.replace(spec, implementations=reordered), spec.problem())
    assert explained.chosen == "triton"
    assert list(explained.refusals) == ["cuda", "cpu"]


def test_a_missing_package_is_a_refusal_and_a_broken_module_is_not(
    spec: OpSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tokenmill_absent", None)
    absent = dataclasses.replace(spec, implementations={"triton": "tokenmill_absent:X"})
    assert "tokenmill_absent, which is not installed" in registry.explain(absent, spec.problem()).refusals["triton"]
    broken = dataclasses.replace(spec, implementations={"triton": "tokenmill.kernels.no_such_module:X"})
    with pytest.raises(ModuleNotFoundError):
        registry.explain(broken, spec.problem())


@pytest.mark.parametrize("name", sorted(registry.OPS))
def test_every_registered_implementation_loads_and_is_named_as_listed(name: str) -> None:
    spec = registry.op_spec(name)
    assert set(registry.names(spec)) >= {"reference"}
    for listed, target in spec.implementations.items():
        assert listed in (*registry.ORDER, *registry.BY_NAME_ONLY)
        try:
            found = registry._load(target)
        except ModuleNotFoundError as error:
            assert error.name is not None
            assert not error.name.startswith("tokenmill")
            continue
        assert isinstance(found, Implementation)
        assert found.name == listed


@pytest.mark.parametrize("name", sorted(registry.OPS))
def test_doctor_gets_an_answer_for_every_op(name: str) -> None:
    spec = registry.op_spec(name)
    explained = registry.explain(spec, spec.problem())
    assert explained.chosen in registry.ORDER
    assert all(reason and "\n" not in reason for reason in explained.refusals.values())
    if not torch.cuda.is_available() and "cuda" in spec.implementations:
        assert "not on a CUDA device" in explained.refusals["cuda"]
