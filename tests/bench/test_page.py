"""The page shows every kind of row, loads nothing, and names what fell."""

import html.parser
import re
from pathlib import Path

import pytest

from tokenmill.bench import page, svg
from tokenmill.bench.command import report
from tokenmill.bench.regressions import Fall
from tokenmill.bench.rows import Row, RowFile, read_rows
from tokenmill.errors import ConfigurationError, InputError

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = sorted((ROOT / "bench" / "results").glob("*/*.jsonl"))
VERDICT = {"op": "suite", "device": "GPU <x>", "step": "correctness", "item": "op cuda", "detail": "wrong & late"}


class Checker(html.parser.HTMLParser):
    """Collects what a browser would load, and tags that are not closed."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loaded += [
            value or "" for name, value in attrs if name in ("src", "href") and not (value or "").startswith("#")
        ]
        if tag not in ("meta", "br", "line", "circle", "rect", "polyline"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self.open and self.open[-1] == tag:
            self.open.pop()


def checked(text: str) -> Checker:
    checker = Checker()
    checker.feed(text)
    return checker


def test_the_committed_rows_make_one_whole_page() -> None:
    text = page.page(read_rows(COMMITTED))
    checker = checked(text)
    assert checker.loaded == []
    assert checker.open == []
    assert "url(" not in text
    assert "<figure>" in text
    sections = {"int4_gemm": "INT4 linear layers", "serve": "Serving", "gateway": "Gateway", "quantize": "Quantizers"}
    ops = {row.get("op") for row in read_rows(COMMITTED)}
    assert {"int4_gemm", "serve"} <= ops
    for op, title in sections.items():
        assert (f">{title}</h2>" in text) == (op in ops)


def test_the_last_verdict_of_an_item_counts_and_is_escaped() -> None:
    rows: list[Row] = [{**VERDICT, "verdict": "failed"}, {**VERDICT, "verdict": "proven", "detail": "right"}]
    text = page.page(rows)
    assert "GPU &lt;x&gt;" in text
    assert '<span class="badge proven">' in text
    assert "wrong &amp; late" not in text
    assert "wrong &amp; late" in page.page(rows[:1])


def test_what_fell_stands_at_the_top() -> None:
    text = page.page([{**VERDICT, "verdict": "proven"}], [Fall("int4_gemm M=1", "cublas-bf16", 3.5, 2.5)])
    assert "int4_gemm M=1 against cublas-bf16: 3.500x before, 2.500x now" in text


def test_every_colour_of_a_chart_is_in_the_stylesheet() -> None:
    text = page.page(read_rows(COMMITTED))
    for style in set(re.findall(r'class="(series-\w+-\d)', text)):
        assert f".{style} {{" in text


def test_no_rows_no_page() -> None:
    with pytest.raises(InputError, match="hold no rows"):
        page.page([])


def test_the_command_writes_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    RowFile(tmp_path / "rows.jsonl").append([{**VERDICT, "verdict": "proven"}])
    target = tmp_path / "deep" / "page.html"
    assert report([str(tmp_path / "rows.jsonl"), "--html", str(target)]) == 0
    assert target.read_text().startswith("<!doctype html>")
    assert capsys.readouterr().out.strip() == str(target)
    with pytest.raises(ConfigurationError, match="writes nothing"):
        report([str(tmp_path / "rows.jsonl")])


def test_a_logarithmic_axis_places_values_between_its_ends() -> None:
    axis = svg.axis([1, 8], "x")
    assert axis.ticks == (1, 2, 4, 8)
    assert axis.place(1, 10, 40) == 10
    assert axis.place(8, 10, 40) == pytest.approx(40)
    assert axis.place(2, 10, 40) == pytest.approx(20)
    assert svg.axis([3], "one value").high > svg.axis([3], "one value").low
