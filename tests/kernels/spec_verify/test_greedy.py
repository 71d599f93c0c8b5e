"""Greedy acceptance: every implementation gives the reference's tokens, bit for bit."""

from typing import Any

import pytest
import torch

from tokenmill import env, platform
from tokenmill.errors import InputError, UnsupportedError
from tokenmill.kernels import registry
from tokenmill.kernels.numerics import Fenced, assert_bit_equal
from tokenmill.kernels.spec import Problem
from tokenmill.kernels.spec_verify import emulated_impl
from tokenmill.kernels.spec_verify.cpu_impl import ISA_LEVELS
from tokenmill.kernels.spec_verify.op import GREEDY, spec_verify_greedy

NAN = float("nan")
LEVELS = [level for level in ISA_LEVELS if level in platform.isa_levels()]
DTYPES = GREEDY.dtypes()


@pytest.fixture(
    params=[
        *(f"cpu/{level}" for level in LEVELS),
        "reference",
        pytest.param("cuda-emulated", marks=pytest.mark.emulator),
    ]
)
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each implementation that runs here, the CPU's once per instruction set."""
    name, _, level = request.param.partition("/")
    if level:
        monkeypatch.setenv(env.ISA.name, level)
    return str(name)


def run(arguments: dict[str, Any], implementation: str) -> torch.Tensor:
    """The result through the public function, written into a fenced, poisoned buffer."""
    shape = (arguments["cu_num_draft_tokens"].numel(), arguments["max_spec_len"] + 1)
    fenced = Fenced(shape, torch.int32)
    result = spec_verify_greedy(**arguments, out=fenced.tensor, implementation=implementation)
    fenced.check("output token ids")
    assert result is fenced.tensor
    return result


def one_request(logits: list[float], draft: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return {
        "draft_token_ids": torch.tensor([draft], dtype=torch.int32),
        "cu_num_draft_tokens": torch.tensor([1], dtype=torch.int32),
        "target_logits": torch.tensor([logits], dtype=dtype),
        "bonus_token_ids": torch.tensor([[99]], dtype=torch.int32),
        "max_spec_len": 1,
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("example", GREEDY.examples, ids=str)
def test_equals_the_reference(implementation: str, example: dict[str, int], dtype: torch.dtype) -> None:
    emulated = implementation == "cuda-emulated"  # thousands of times slower: one seed, a smaller vocabulary
    problem = GREEDY.problem({**example, "V": min(example["V"], 1500)} if emulated else example, dtype)
    for seed in range(1 if emulated else 3):
        arguments = GREEDY.inputs_for(problem, seed)
        expected = spec_verify_greedy(**arguments, implementation="reference")
        assert_bit_equal(run(arguments, implementation), expected, f"seed {seed}")


def test_the_three_outcomes_by_hand(implementation: str) -> None:
    """All accepted: the bonus follows. First wrong: the target's token alone. No drafts: the bonus alone."""
    logits = torch.zeros(4, 6)
    logits[[0, 1, 2, 3], [5, 1, 3, 2]] = 1.0
    arguments = {
        "draft_token_ids": torch.tensor([5, 1, 4, 2], dtype=torch.int32),
        "cu_num_draft_tokens": torch.tensor([2, 4, 4], dtype=torch.int32),
        "target_logits": logits,
        "bonus_token_ids": torch.tensor([[10], [11], [12]], dtype=torch.int32),
        "max_spec_len": 3,
    }
    expected = torch.tensor([[5, 1, 10, -1], [3, -1, -1, -1], [12, -1, -1, -1]], dtype=torch.int32)
    assert_bit_equal(run(arguments, implementation), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "logits",
    [
        [1.0, 3.0, 3.0, 2.0],
        [-0.0, 0.0, -1.0],
        [0.0, -0.0],
        [float("-inf"), float("-inf")],
        [1.0, float("inf"), float("inf")],
        [1.0, NAN, 5.0, NAN],
        [float("inf"), -NAN],
        [NAN, float("inf")],
        [-5.0, -2.0, -3.0],
        [-1e-7, -2e-7, 1e-7],
    ],
    ids=str,
)
def test_ties_zeros_infinities_and_nans_as_argmax(implementation: str, logits: list[float], dtype: torch.dtype) -> None:
    arguments = one_request(logits, draft=0, dtype=dtype)
    expected = int(arguments["target_logits"][0].argmax())
    assert int(run(arguments, implementation)[0, 0]) == expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_position_of_the_maximum(implementation: str, dtype: torch.dtype) -> None:
    """One place at a time, across the boundaries of the vector and of the block in which the kernel looks again."""
    V = 4200
    places = [0, 1, 7, 15, 16, 17, 31, 2047, 2048, 2049, 4095, 4096, V - 1]
    logits = torch.full((len(places), V), -3.0, dtype=dtype)
    logits[torch.arange(len(places)), places] = -2.5
    arguments = {
        "draft_token_ids": torch.tensor(places, dtype=torch.int32),
        "cu_num_draft_tokens": torch.tensor([len(places)], dtype=torch.int32),
        "target_logits": logits,
        "bonus_token_ids": torch.tensor([[7]], dtype=torch.int32),
        "max_spec_len": len(places),
    }
    assert run(arguments, implementation)[0].tolist() == [*places, 7]


def test_strided_rows_are_read_where_they_are(implementation: str) -> None:
    arguments = GREEDY.inputs_for(GREEDY.problem({"T": 9, "B": 4, "V": 3000, "max_spec_len": 3}))
    wide = torch.full((9, 4000), 1e9)
    wide[:, :3000] = arguments["target_logits"]
    strided = {**arguments, "target_logits": wide[:, :3000]}
    assert_bit_equal(run(strided, implementation), run(arguments, implementation))


@pytest.mark.parametrize("draft", [-1, 3, 2**31 - 1])
def test_a_draft_outside_the_vocabulary_is_not_accepted(implementation: str, draft: int) -> None:
    assert run(one_request([0.0, 1.0, 0.5], draft), implementation).tolist() == [[1, -1]]


def test_no_requests(implementation: str) -> None:
    arguments = one_request([0.0], 0)
    empty = {name: value[:0] if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
    assert run(empty, implementation).shape == (0, 2)


def test_threads_do_not_change_the_result() -> None:
    arguments = GREEDY.inputs_for(GREEDY.problem({"T": 500, "B": 200, "V": 301, "max_spec_len": 6}))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = run(arguments, "cpu")
        torch.set_num_threads(4)
        assert_bit_equal(run(arguments, "cpu"), alone)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.emulator
@pytest.mark.parametrize("sums", [[1, 1000], [-5, 3], [3, 1], [2**31 - 1, -(2**31)]], ids=str)
def test_the_cuda_kernel_stays_inside_memory_whatever_the_sums_say(sums: list[int]) -> None:
    """On a GPU nobody checks the sums; the emulator reports every access outside an allocation."""
    arguments = {
        "draft_token_ids": torch.zeros(3, dtype=torch.int32),
        "cu_num_draft_tokens": torch.tensor(sums, dtype=torch.int32),
        "target_logits": torch.eye(3, 40),
        "bonus_token_ids": torch.full((2, 1), 7, dtype=torch.int32),
        "max_spec_len": 2,
    }
    out = emulated_impl.GREEDY.run(**arguments, out=torch.empty(2, 3, dtype=torch.int32))
    assert bool(((out >= -1) & (out < 40)).all())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("cu_num_draft_tokens", [3, 2], "gives request 1 -1 drafts; it must be 0 to max_spec_len=2"),
        ("cu_num_draft_tokens", [-1, 2], "gives request 0 -1 drafts"),
        ("cu_num_draft_tokens", [0, 3], "gives request 1 3 drafts"),
        ("cu_num_draft_tokens", [1, 2], "ends at 2, but there are T=3 drafts"),
    ],
)
def test_sums_that_do_not_fit_are_refused(name: str, value: list[int], message: str) -> None:
    arguments = {
        "draft_token_ids": torch.zeros(3, dtype=torch.int32),
        "cu_num_draft_tokens": torch.tensor([1, 3], dtype=torch.int32),
        "target_logits": torch.zeros(3, 4),
        "bonus_token_ids": torch.zeros(2, 1, dtype=torch.int32),
        "max_spec_len": 2,
    }
    spec_verify_greedy(**arguments)
    if name == "cu_num_draft_tokens" and value[0] == 3:
        arguments["max_spec_len"] = 3
        message = message.replace("max_spec_len=2", "max_spec_len=3")
    with pytest.raises(InputError, match=message):
        spec_verify_greedy(**{**arguments, name: torch.tensor(value, dtype=torch.int32)})


def test_inputs_are_not_made_of_more_drafts_than_fit() -> None:
    GREEDY.inputs_for(GREEDY.problem({"T": 6, "B": 2, "V": 4, "max_spec_len": 3}))
    with pytest.raises(InputError, match="T=7 drafts do not fit in B=2 requests of at most 3"):
        GREEDY.inputs_for(GREEDY.problem({"T": 7, "B": 2, "V": 4, "max_spec_len": 3}))


def test_an_empty_vocabulary_is_refused() -> None:
    with pytest.raises(InputError, match="V=0"):
        spec_verify_greedy(**{**one_request([1.0], 0), "target_logits": torch.zeros(1, 0)})


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu_says_so_in_one_line() -> None:
    with pytest.raises(UnsupportedError, match="not on a CUDA device") as caught:
        spec_verify_greedy(**one_request([1.0], 0), implementation="cuda")
    assert "\n" not in str(caught.value)
    on_gpu = Problem("spec_verify_greedy", {}, torch.float32, torch.device("cuda:0"))
    assert "sees no CUDA device 0" in registry.explain(GREEDY, on_gpu).refusals["cuda"]


def test_opcheck() -> None:
    """Schema, fake implementation and tracing agree with what runs."""
    for example in (GREEDY.examples[1], GREEDY.examples[3]):
        arguments = GREEDY.inputs_for(GREEDY.problem(example))
        torch.library.opcheck(torch.ops.tokenmill.spec_verify_greedy.default, tuple(arguments.values()))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("example", GREEDY.examples, ids=str)
def test_cuda_equals_the_reference(example: dict[str, int], dtype: torch.dtype) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    arguments = GREEDY.inputs_for(GREEDY.problem(example, dtype))
    expected = spec_verify_greedy(**arguments, implementation="reference")
    on_gpu = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
    fenced = Fenced(tuple(expected.shape), torch.int32, "cuda")
    spec_verify_greedy(**on_gpu, out=fenced.tensor, implementation="cuda")
    fenced.check()
    assert_bit_equal(fenced.tensor, expected)
