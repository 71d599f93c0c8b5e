"""Rows survive kills; reports and the README show what is in them and nothing else."""

from pathlib import Path

import pytest

from tokenmill import platform
from tokenmill.bench import report, rows, shapes, timing
from tokenmill.bench.roofline import Roofs
from tokenmill.bench.rows import RowFile, facts, least_disturbed, read_rows
from tokenmill.errors import ConfigurationError, InputError

ROOT = Path(__file__).resolve().parents[2]


def row(M: int, implementation: str, role: str, p50: float | None) -> dict[str, object]:
    found = {
        "op": "int4_gemm",
        "device": "some processor",
        "isa": "avx2",
        "threads": 2,
        "K": 64,
        "N": 32,
        "group_size": 32,
        "M": M,
        "implementation": implementation,
        "role": role,
        "load_average": 0.5,
        "flops_per_second": 1e11,
        "read_bytes_per_second": 1e10,
        "flops_dtype": "float32",
        "flops": 4096 * M,
        "bytes": 1024,
    }
    found |= {"activation_bits": 16, "time": 1}
    return {**found, "skipped": "not <installed>"} if p50 is None else {**found, "p20": p50, "p50": p50}


ROWS = [
    row(1, "tokenmill-a16", "ours", 1e-3),
    row(1, "torch-bf16", "baseline", 4e-3),
    row(1, "torch-fp32", "baseline", 3e-3),
    row(1, "some-rival", "rival", None),
]


@pytest.mark.parametrize("end", [b"\n", b"\r\n"], ids=repr)
def test_a_killed_write_is_cut_off_and_continued(tmp_path: Path, end: bytes) -> None:
    path = tmp_path / "deep" / "rows.jsonl"
    RowFile(path).append(ROWS[:2])
    path.write_bytes(path.read_bytes().replace(b"\n", end) + b'{"op": "int4_g')
    again = RowFile(path)
    assert again.rows == ROWS[:2]
    again.append(ROWS[2:])
    assert read_rows([path]) == ROWS


@pytest.mark.parametrize(
    "content", [b"notes\nof mine", b'{\n "a": 1\n}', b"\xff\xfe\x00", b"[1, 2]\n", b'{"a": 1}', b'"a text"'], ids=repr
)
def test_a_file_of_something_else_is_refused_and_left_as_it_is(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "notes"
    path.write_bytes(content)
    with pytest.raises(InputError, match="notes"):
        RowFile(path)
    assert path.read_bytes() == content


def test_where_rows_cannot_be_written_is_known_before_anything_is_measured(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "rows.jsonl", Path("/proc/rows.jsonl")):
        with pytest.raises(InputError, match=r"cannot be written: .*; name another file"):
            RowFile(path)


def test_the_least_disturbed_measurement_counts() -> None:
    """Also where the disturbed one would flatter: torch lost more time than we did."""
    disturbed = [{**one, "time": 2, "p50": 9 * one["p50"]} if "p50" in one else {**one, "time": 2} for one in ROWS]  # type: ignore[operator]
    disturbed[0] = {**disturbed[0], "p50": 0.5e-3}
    assert least_disturbed([*ROWS, *disturbed]) == ROWS
    assert least_disturbed([*disturbed, *ROWS]) == ROWS


def test_a_measurement_with_one_more_contestant_is_not_the_slower_for_it() -> None:
    more = [{**one, "time": 2, **({"p50": 0.9 * one["p50"]} if "p50" in one else {})} for one in ROWS]  # type: ignore[operator]
    more += [{**row(M, "newcomer", "rival", 5e-3), "time": 2} for M in {one["M"] for one in ROWS}]  # type: ignore[arg-type]
    assert {one["time"] for one in least_disturbed([*ROWS, *more])} == {2}


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"op": "int4_gemm"}\nnonsense\n')
    with pytest.raises(InputError, match=r"rows\.jsonl:2 is not JSON"):
        read_rows([path])


def test_speed_is_against_the_best_of_torch() -> None:
    assert report.baseline(ROWS, 1) == 3e-3
    assert report.speedup(ROWS[0], ROWS) == pytest.approx(3.0)
    assert report.speedup(ROWS[3], ROWS) is None
    text = report.markdown(ROWS)
    assert "| tokenmill-a16 | 1 (3.00x) |" in text
    assert "| some-rival" not in text
    assert "Not measured: some-rival: not <installed>." in text


def test_no_rows_no_report() -> None:
    with pytest.raises(InputError, match="no rows of INT4 layers or of serving"):
        report.markdown([])


def test_every_row_says_where_it_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENMILL_ISA", "avx2")
    about = facts(["tokenmill", "bench", "--out", "/some/folder/rows.jsonl"])
    assert about["command"] == "TOKENMILL_ISA=avx2 tokenmill bench --out rows.jsonl"
    assert {"python", "torch", "tokenmill"} <= set(about["versions"])
    assert about["commit"] not in ("", "unknown")
    assert about["device"].endswith("cores")


def test_the_digest_of_the_sources_follows_their_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bench").mkdir()
    (tmp_path / "kernels").mkdir()
    kernel = tmp_path / "kernels" / "a.cu"
    kernel.write_text("one")
    monkeypatch.setattr(rows, "__file__", str(tmp_path / "bench" / "rows.py"))
    digests = []
    for text in ("one", "two", "one"):
        kernel.write_text(text)
        rows.source_digest.cache_clear()
        digests.append(rows.source_digest(("kernels",)))
    rows.source_digest.cache_clear()
    assert digests[0] == digests[2] != digests[1]


def test_without_git_the_commit_is_the_one_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "__file__", str(tmp_path / "bench" / "rows.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setenv("TOKENMILL_COMMIT", "abc1234")
    rows.source_commit.cache_clear()
    assert rows.source_commit() == "abc1234"
    rows.source_commit.cache_clear()


def test_readme_is_generated_from_the_committed_rows() -> None:
    committed = read_rows(sorted((ROOT / "bench" / "results").glob("*/*.jsonl")))
    section = (ROOT / "README.md").read_text().partition(report.BEGIN)[2].partition(report.END)[0]
    assert section.strip() == report.markdown(committed).strip()


def test_shapes_and_sizes() -> None:
    assert shapes.parse("64x32,square,64x32") == ((64, 32), (4096, 4096))
    with pytest.raises(ConfigurationError, match="--shapes 64x"):
        shapes.parse("64x")
    with pytest.raises(ConfigurationError, match="names none"):
        shapes.parse(",")
    with pytest.raises(ConfigurationError, match="--m 1,0"):
        shapes.parse_rows("1,0")


def test_a_ring_outgrows_the_cache() -> None:
    assert timing.copies(8 << 20, 96 << 20) == 12
    assert timing.copies(1 << 40, 32 << 20) == 2
    assert timing.copies(100, 32 << 20) == 512


def test_everybody_takes_turns() -> None:
    order: list[str] = []
    samples = timing.take_turns(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2, burst_seconds=0, pause_seconds=0
    )
    assert "".join(order) == "aabbaabb"
    assert samples["a"].count == 2
    assert samples["a"].p20 <= samples["a"].p50 <= samples["a"].p80


def test_a_roof_is_no_lower_than_what_was_seen() -> None:
    roofs = Roofs(10.0, 100.0, "bfloat16")
    assert roofs.raised([5.0, 12.0], [90.0]) == Roofs(12.0, 100.0, "bfloat16")
    assert roofs.floor_seconds(nbytes=20, flops=100) == 2.0
    assert roofs.floor_seconds(nbytes=1, flops=300) == 3.0


@pytest.mark.parametrize(
    ("model_name", "device"),
    [
        ("AMD EPYC", "AMD EPYC (family 25, model 1)"),
        ("AMD EPYC 9554 64-Core Processor", "AMD EPYC 9554 64-Core Processor"),
    ],
)
def test_generations_of_one_name_are_two_devices(model_name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A virtual machine's processor has no number in its name; rows of one must not be compared with another's."""
    text = "processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 25\n"
    text += f"model\t\t: 1\nmodel name\t: {model_name}\nstepping\t: 1\n"
    monkeypatch.setattr(Path, "read_text", lambda path, **how: text)
    assert platform.cpu_model() == device
    assert platform.cpu_vendor.__wrapped__() == "AuthenticAMD"
