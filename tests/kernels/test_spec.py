"""Every registered op's spec is complete and agrees with itself."""

import pytest
import torch

from tokenmill.errors import InputError
from tokenmill.kernels import checks, registry
from tokenmill.kernels.numerics import assert_bit_equal
from tokenmill.kernels.spec import OpSpec, axis_size

OPS = sorted(registry.OPS)


@pytest.fixture(params=OPS)
def spec(request: pytest.FixtureRequest) -> OpSpec:
    return registry.op_spec(request.param)


@pytest.mark.parametrize("name", OPS)
def test_is_registered_under_its_own_name(name: str) -> None:
    assert registry.op_spec(name).name == name


def test_shapes_use_declared_axes(spec: OpSpec) -> None:
    assert spec.doc.endswith(".")
    for example in spec.examples:
        for tensor in (*spec.inputs, *spec.outputs):
            assert all(size >= 0 for size in tensor.sizes(example)), tensor.name


def test_examples_make_inputs_that_bind_to_the_same_problem(spec: OpSpec) -> None:
    for example in spec.examples:
        problem = spec.problem(example)
        bound = checks.bind(spec, spec.inputs_for(problem), **problem.options)
        assert (dict(bound.axes), bound.dtype) == (dict(problem.axes), problem.dtype)


def test_inputs_are_the_same_for_the_same_seed_and_others_for_another(spec: OpSpec) -> None:
    problem = spec.problem()
    first, again, other = (spec.inputs_for(problem, seed) for seed in (1, 1, 2))
    tensors = [name for name, value in first.items() if isinstance(value, torch.Tensor)]
    for name in tensors:
        assert_bit_equal(first[name], again[name], name)
    assert any(not torch.equal(first[name], other[name]) for name in tensors)


def test_costs_are_positive_and_grow_with_the_problem(spec: OpSpec) -> None:
    sizes = [spec.problem(example) for example in spec.examples]
    largest = max(sizes, key=spec.bytes_moved)
    assert spec.flops(largest) > 0
    assert spec.bytes_moved(largest) > 0


def test_an_incomplete_problem_is_refused(spec: OpSpec) -> None:
    with pytest.raises(InputError, match="give exactly"):
        spec.problem({"nonsense": 1})


def test_derived_axes() -> None:
    axes = {"K": 100, "n": 3}
    assert [axis_size(axis, axes) for axis in (7, "K", "K // 8", "n + 1", "n - 1", "n * 4")] == [7, 100, 12, 4, 2, 12]
    with pytest.raises(KeyError):
        axis_size("unknown + 1", axes)
