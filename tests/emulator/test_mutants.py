"""Every seeded bug of the project's own kernels is reported by its name; the kernels themselves are clean.

`tokenmill kernels prove` runs the same with hundreds of launches; here each mutant runs until it is named.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from tokenmill import platform
from tokenmill.errors import InputError
from tokenmill.kernels import prove
from tokenmill.kernels.mutation import Mutant, mutated_text, naming_report

ROOT = Path(__file__).resolve().parents[2]
ALL = [(name, mutant) for name in prove.PROOFS for mutant in prove.load_proof(prove.PROOFS[name]).mutants]

pytestmark = [
    pytest.mark.emulator,
    pytest.mark.skipif("avx2" not in platform.cpu_flags(), reason="the emulator needs x86-64 with AVX2"),
]


@pytest.fixture(scope="module")
def result_of() -> Callable[[str, Mutant], prove.MutantResult]:
    """(kernel, mutant) -> what the emulator said. All mutants of a kernel run together, on all cores."""
    results: dict[tuple[str, str], prove.MutantResult] = {}

    def get(name: str, mutant: Mutant) -> prove.MutantResult:
        if (name, mutant.name) not in results:
            reference = prove.PROOFS[name]
            mutants = prove.load_proof(reference).mutants
            for result in prove.prove_mutants(
                reference, mutants, stop_when_caught=True, jobs=platform.physical_cores()
            ):
                results[name, result.mutant.name] = result
        return results[name, mutant.name]

    return get


@pytest.mark.parametrize(("name", "mutant"), ALL, ids=[f"{name}: {mutant.name}" for name, mutant in ALL])
def test_every_mutant_is_named(
    name: str, mutant: Mutant, result_of: Callable[[str, Mutant], prove.MutantResult]
) -> None:
    result = result_of(name, mutant)
    assert result.named, f"expected {' or '.join(mutant.reports)}, got: {result.finding or 'nothing'}"


@pytest.mark.parametrize("name", prove.PROOFS)
def test_the_kernel_of_the_mutants_is_clean(name: str) -> None:
    """The control: what is compiled for mutants gives no finding when nothing is changed."""
    reference = prove.PROOFS[name]
    proof = prove.load_proof(reference)
    launches = [
        prove.Launch(case, seed=3, mode=mode, resident_ctas=2)
        for mode in ("early", "late", "random")
        for case in proof.mutant_cases
    ]
    findings = prove.prove_clean(reference, launches, defines=proof.mutant_defines)
    assert findings.launches == len(launches)
    assert not findings.bad, findings.bad[0].finding()


def test_there_are_as_many_bugs_as_people_make() -> None:
    assert len(ALL) >= 38
    assert len({mutant.name for _, mutant in ALL}) == len(ALL)


def test_the_documented_table_is_that_of_these_mutants() -> None:
    text = (ROOT / "docs" / "mutants.md").read_text(encoding="utf-8")
    rows = [line.split(" | ")[0].removeprefix("| ") for line in text.splitlines() if line.startswith("| ")]
    assert [row for row in rows if row != "bug"] == [mutant.name for _, mutant in ALL]
    assert "not noticed" not in text


def test_a_mutant_that_has_lost_its_place_is_refused() -> None:
    mutant = Mutant("gone", "kernel.cu", "barrier();", "", ("RACE",))
    assert mutated_text(mutant, "a; barrier(); b;") == "a;  b;"
    with pytest.raises(InputError, match=r"'gone'.* occurs 0 times in kernel.cu"):
        mutated_text(mutant, "a; b;")
    with pytest.raises(InputError, match=r"occurs 2 times"):
        mutated_text(mutant, "barrier(); barrier();")


def test_kinds_of_reports() -> None:
    text = "RACE: write at a.cuh:3\n    by      CTA (0,0,0)\nOUT OF BOUNDS: read at a.cuh:4\nRACE: again"
    mutant = Mutant("m", "a.cuh", "x", "y", ("DEADLOCK", "RACE"))
    assert naming_report(mutant, text) == "RACE: write at a.cuh:3\n    by      CTA (0,0,0)"
    assert naming_report(mutant, "WRONG RESULT: nan") is None
    assert naming_report(mutant, "") is None
