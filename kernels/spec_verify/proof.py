"""What `tokenmill kernels prove` runs for greedy acceptance: cases, the reference's tokens, and the bugs to find."""

import random
from collections.abc import Mapping
from typing import Any

import torch

from tokenmill.kernels.emulator import CSRC, EmulatedLibrary
from tokenmill.kernels.gates import Gate
from tokenmill.kernels.mutation import WRONG_RESULT, Mutant
from tokenmill.kernels.prove import Proof
from tokenmill.kernels.spec import short_dtype
from tokenmill.kernels.spec_verify.emulated_impl import SOURCE, launch
from tokenmill.kernels.spec_verify.op import GREEDY as SPEC

_DTYPES = {short_dtype(dtype): dtype for dtype in SPEC.dtypes()}
_FILE = "spec_verify/greedy.cu"


def _case(dtype: str, **axes: int) -> dict[str, Any]:
    return {"dtype": dtype, **axes}


#: Vocabularies below, at and above the CTA's 512 threads; requests without drafts; one that takes several rows.
CASES = (
    _case("float32", T=9, B=4, V=1500, max_spec_len=5),
    _case("bfloat16", T=12, B=3, V=512, max_spec_len=6),
    _case("float16", T=7, B=1, V=1027, max_spec_len=7),
    _case("float32", T=0, B=2, V=40, max_spec_len=3),
    _case("bfloat16", T=1, B=1, V=1, max_spec_len=1),
)


def random_case(rng: random.Random) -> dict[str, Any]:
    """A ragged batch of any dtype."""
    requests, longest = rng.randint(1, 5), rng.randint(1, 6)
    drafts, vocabulary = rng.randint(0, requests * longest), rng.randint(1, 2000)
    return _case(rng.choice(list(_DTYPES)), T=drafts, B=requests, V=vocabulary, max_spec_len=longest)


def check(library: EmulatedLibrary, case: Mapping[str, Any], seed: int) -> str | None:
    """Launches one case on seeded data; None, or what differs from the reference."""
    axes = {name: size for name, size in case.items() if name != "dtype"}
    arguments = SPEC.inputs_for(SPEC.problem(axes, _DTYPES[case["dtype"]]), seed)
    _decide_at_the_edges(arguments)
    expected = torch.empty(case["B"], case["max_spec_len"] + 1, dtype=torch.int32)
    SPEC.reference(**arguments, out=expected)
    result = torch.full_like(expected, -2)
    if (status := launch(library, result, **arguments)) < 0:
        return f"the launcher refused with {status}"
    wrong = (result != expected).nonzero()
    if not wrong.numel():
        return None
    request, place = (int(index) for index in wrong[0])
    found, right = int(result[request, place]), int(expected[request, place])
    return f"{len(wrong)} of {result.numel()} tokens are wrong; the first at [{request}, {place}]: {found}, not {right}"


def _decide_at_the_edges(arguments: dict[str, Any]) -> None:
    """What chance seldom brings: a first draft that is wrong, rows whose last value is the largest, and a last request
    that is accepted whole."""
    logits, drafts = arguments["target_logits"], arguments["draft_token_ids"]
    logits[1::2, -1] = 100
    drafts[1::2] = logits.shape[1] - 1
    drafts[:1] = (logits[:1].argmax(dim=1) + 1) % logits.shape[1]
    ends = arguments["cu_num_draft_tokens"].tolist()
    start = ends[-2] if len(ends) > 1 else 0
    drafts[start:] = logits[start:].argmax(dim=1)


MUTANTS = (
    Mutant(
        "warps read each other's maxima before they are written",
        _FILE,
        "    __syncthreads();\n    best = partial[0];",
        "    best = partial[0];",
        ("RACE",),
    ),
    Mutant(
        "the next row's maxima overwrite those still being read",
        _FILE,
        "best = larger(best, partial[warp]);\n    __syncthreads();",
        "best = larger(best, partial[warp]);",
        ("RACE",),
    ),
    Mutant(
        "the last value of a row is left out",
        _FILE,
        "i < vocabulary; i += THREADS",
        "i + 1 < vocabulary; i += THREADS",
        (WRONG_RESULT,),
    ),
    Mutant(
        "a row is read past its end",
        _FILE,
        "i < vocabulary; i += THREADS",
        "i <= vocabulary; i += THREADS",
        ("OUT OF BOUNDS", WRONG_RESULT),
    ),
    Mutant(
        "ties take the highest index of a warp",
        _FILE,
        "(0xffffffffu - index);\n}",
        "index;\n}",
        (WRONG_RESULT,),
    ),
    Mutant(
        "the walk goes on after a mismatch",
        _FILE,
        "while (accepted && first + written < last)",
        "while (first + written < last)",
        (WRONG_RESULT,),
    ),
    Mutant(
        "the bonus is written over the last accepted token",
        _FILE,
        "output[written] = p.bonus_token_ids[request];",
        "output[written - 1] = p.bonus_token_ids[request];",
        ("OUT OF BOUNDS", "RACE", WRONG_RESULT),
    ),
    Mutant(
        "unused places are not filled",
        _FILE,
        "i < width; i += THREADS) output[i] = -1;",
        "i + 1 < width; i += THREADS) output[i] = -1;",
        (WRONG_RESULT,),
    ),
)

GREEDY = Proof(
    name="spec_verify_greedy",
    summary="block argmax of one row after another, until the first mismatch",
    root=CSRC,
    source=str(SOURCE.relative_to(CSRC)),
    check=check,
    cases=CASES,
    random_case=random_case,
    mutants=MUTANTS,
    mutant_cases=CASES[:2],
    gates=(Gate(SOURCE, ("90a", "100a"), required={}, max_registers=64),),
)
