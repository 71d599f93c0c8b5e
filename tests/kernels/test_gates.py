"""Static gates: reading the compiler's output, judging it, and the committed table of the project's own kernels."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from tokenmill import platform
from tokenmill.errors import TokenmillError
from tokenmill.kernels import gates, prove
from tokenmill.kernels.emulator import CSRC
from tokenmill.kernels.gates import Gate, GateRow
from tokenmill.kernels.mutation import write_mutated_tree

needs_nvcc = pytest.mark.skipif(gates.why_not() is not None, reason=str(gates.why_not()))
TARGETS = [
    (name, gate, architecture)
    for name, reference in prove.PROOFS.items()
    for gate in prove.load_proof(reference).gates
    for architecture in gate.architectures
]

LOG = """ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to x
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z5scaleILi4ELb1EEvPf' for 'sm_90a'
ptxas info    : Function properties for _Z5scaleILi4ELb1EEvPf
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 512 bytes smem
"""
SASS = """
		Function : _Z5scaleILi4ELb1EEvPf
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDL.64 R2, [R1] ;
        /*0020*/               @P0 HGMMA.64x64x16.F32.BF16 R24, R4, gdesc[UR4], R24 ;
        /*0030*/            @!UPT0 UIADD3 URZ, URZ, URZ, URZ ;
		Function : _Z5otherv
        /*0000*/                   HGMMA.64x8x16.F32 R24, R4, gdesc[UR4], R24 ;
"""
ROW = GateRow("scale", "4, true", "90a", 40, 12, 16, 512, ("C7510",), {"HGMMA": 1, "LDL": 1}, "nvcc 13.0")


def test_rows_from_the_compilers_output() -> None:
    counts = gates.count_instructions(SASS)
    assert counts["_Z5scaleILi4ELb1EEvPf"]["UIADD3"] == 1
    assert gates.rows_from_log(LOG, counts, "90a", "nvcc 13.0") == [ROW]


def test_a_changed_log_format_is_an_error_and_not_a_pass() -> None:
    with pytest.raises(TokenmillError, match="ptxas did not say what scale uses"):
        gates.rows_from_log(LOG.replace("Used", "Needs"), gates.count_instructions(SASS), "90a", "nvcc 13.0")


def test_every_rule_is_judged() -> None:
    gate = Gate(Path("scale.cu"), ("90a",), required={"HGMMA": 2, "UTMALDG": 1}, max_registers=32)
    rules = " ".join(gates.violations(gate, ROW))
    for rule in (
        "scale<4, true> on sm_90a: spills 12 bytes, stack frame 16 bytes",
        "ptxas warns C7510",
        "uses 40 registers; the limit is 32",
        "has 1 HGMMA; at least 2 are required",
        "has 0 UTMALDG; at least 1 are required",
        "contains LDL",
    ):
        assert rule in rules
    clean = replace(
        ROW, spill_bytes=0, stack_bytes=0, warnings=(), registers=32, instructions={"HGMMA": 2, "UTMALDG": 1}
    )
    assert gates.violations(gate, clean) == []


def test_table_round_trip_and_comparison(tmp_path: Path) -> None:
    path = tmp_path / "gates.jsonl"
    gates.write_table([ROW], path)
    assert gates.read_table(path) == [ROW]
    assert gates.compare([ROW], [ROW]) == []
    assert "registers: 40 in the table, 41 now" in gates.compare([replace(ROW, registers=41)], [ROW])[0]
    assert "is not in the table" in gates.compare([replace(ROW, architecture="100a")], [ROW])[0]
    newer = replace(ROW, registers=41, toolchain="nvcc 14.0")
    assert gates.compare([newer], [ROW]) == [], "another compiler is judged by the rules alone"


def test_the_table_covers_every_target_and_keeps_every_rule() -> None:
    rows = gates.read_table()
    for name, gate, architecture in TARGETS:
        mine = [row for row in rows if row.kernel == name and row.architecture == architecture]
        assert mine, f"{name} on sm_{architecture} is not in {gates.TABLE.name}"
        assert [line for row in mine for line in gates.violations(gate, row)] == []


@needs_nvcc
def test_the_kernels_become_what_the_table_says() -> None:
    with ThreadPoolExecutor(platform.physical_cores()) as pool:
        measured = list(pool.map(lambda target: gates.measure(target[1], target[2]), TARGETS))
    broken = [
        line
        for (_, gate, _), rows in zip(TARGETS, measured, strict=True)
        for row in rows
        for line in gates.violations(gate, row)
    ]
    assert broken == []
    assert gates.compare([row for rows in measured for row in rows], gates.read_table()) == []


@needs_nvcc
def test_serialised_wgmmas_and_spills_are_noticed(tmp_path: Path) -> None:
    proof = prove.load_proof(prove.PROOFS["int4_gemm_sm90"])
    mutant = next(mutant for mutant in proof.mutants if "without the last wait" in mutant.name)
    write_mutated_tree(mutant, CSRC, tmp_path)
    gate = replace(proof.gates[0], source=tmp_path / proof.source, defines=proof.mutant_defines)
    rules = [line for row in gates.measure(gate, "90a") for line in gates.violations(gate, row)]
    assert any("ptxas warns C75" in line for line in rules)


@needs_nvcc
def test_a_local_array_with_a_run_time_index_is_noticed(tmp_path: Path) -> None:
    source = tmp_path / "local.cu"
    source.write_text(
        "__global__ void pick(const float* x, float* y, int n) {\n"
        "    float local[64];\n"
        "    for (int i = 0; i < 64; i++) local[(i * n) & 63] = x[i];\n"
        "    y[threadIdx.x] = local[n & 63];\n}\n"
    )
    gate = Gate(source, ("90a",))
    rules = " ".join(line for row in gates.measure(gate, "90a") for line in gates.violations(gate, row))
    assert "contains STL" in rules
    assert "stack frame 256 bytes" in rules


@needs_nvcc
def test_a_source_that_does_not_compile_is_one_clear_line(tmp_path: Path) -> None:
    source = tmp_path / "broken.cu"
    source.write_text("__global__ void broken() { missing(); }\n")
    with pytest.raises(TokenmillError, match=r"broken.cu does not compile for sm_90a: .*missing.*undefined"):
        gates.measure(Gate(source, ("90a",)), "90a")
