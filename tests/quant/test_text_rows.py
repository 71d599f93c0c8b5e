"""Rows of data sets become the text that the model would see, and a row that is none is named by its line."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from tokenmill.cli import main
from tokenmill.errors import ConfigurationError
from tokenmill.models import tiny_pair
from tokenmill.quant.text_rows import chat_template, read_rows


class Tokenizer:
    chat_template = "given"

    def apply_chat_template(self, messages: list[dict[str, str]], tokenize: bool) -> str:
        assert not tokenize
        if messages[0]["role"] == "system":
            raise ValueError("System role\nnot supported")
        return "".join(f"<{message['role']}>{message['content']}" for message in messages)


def read(file: Path, rows: list[Any], tokenizer: Any = None, **options: Any) -> str:
    file.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return read_rows(file, chat_template(lambda: tokenizer or Tokenizer()), **options)


def test_every_form_of_a_row(tmp_path: Path) -> None:
    rows = [
        {"text": "plain", "meta": 1},
        "",
        '"only a string"',
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b\n"}]},
        {"conversations": [{"from": "human", "value": "c"}, {"from": "gpt", "value": None}]},
        {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "d"}]}]},
        {"prompt": "e ", "completion": "f"},
        {"prompt": [{"role": "user", "content": "g"}], "completion": [{"role": "assistant", "content": "h"}]},
        {"text": "line\u2028one"},
    ]
    expected = "plain\nonly a string\n<user>a<assistant>b\n<user>c<assistant>\n<user>d\ne f\n<user>g<assistant>h\n"
    assert read(tmp_path / "rows.jsonl", rows) == expected + "line\u2028one\n"
    file = tmp_path / "rows.jsonl.gz"
    file.write_bytes(gzip.compress((tmp_path / "rows.jsonl").read_bytes()))
    assert read_rows(file, chat_template(Tokenizer)) == expected + "line\u2028one\n"
    (tmp_path / "rows.json").write_text(json.dumps([{"text": "a"}, "b"]))
    assert read_rows(tmp_path / "rows.json", chat_template(Tokenizer)) == "a\nb\n"


def test_without_a_chat_template_the_contents_stand_in_lines(tmp_path: Path) -> None:
    tokenizer = Tokenizer()
    tokenizer.chat_template = None  # type: ignore[assignment]
    rows = [{"messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]}]
    assert read(tmp_path / "rows.jsonl", rows, tokenizer) == "a\nb\n"


def test_no_more_is_read_than_is_needed(tmp_path: Path) -> None:
    assert (
        read(tmp_path / "rows.jsonl", [{"text": "abc"}, {"text": "def"}, "no JSON"], max_characters=8) == "abc\ndef\n"
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "line 2: no JSON: "),
        ("[1]", "line 2: it is list; a row is"),
        ({"question": "a", "answer": "b"}, "line 2: it has 'question', 'answer'; a row is a JSON object with text, "),
        ({"text": 5}, "line 2: it has 'text'; a row"),
        ({"messages": []}, "line 2: its messages is empty; a row"),
        ({"messages": ["a"]}, "line 2: message 1 of its messages has no role; a row"),
        ({"messages": [{"role": "user", "content": 5}]}, "line 2: message 1 of its messages has a content that is int"),
        (
            {"messages": [{"role": "system", "content": ""}]},
            "line 2: the model's chat template refuses its messages: System role not supported; a row",
        ),
    ],
)
def test_a_row_that_is_none_is_named(tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        read(tmp_path / "rows.jsonl", [{"text": "a"}, row, {"text": "b"}])
    assert f"rows.jsonl, {message}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_lists_or_cut_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text('{"text": "a"}')
    with pytest.raises(ConfigurationError, match="holds no list of rows but dict"):
        read_rows(tmp_path / "rows.json", chat_template(Tokenizer))
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 1000)[:40])
    with pytest.raises(ConfigurationError, match="is cut short or damaged; copy it again"):
        read_rows(tmp_path / "rows.jsonl.gz", chat_template(Tokenizer))
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(b"")[:10] + b"\xff" * 50)
    with pytest.raises(ConfigurationError, match="is cut short or damaged; copy it again"):
        read_rows(tmp_path / "rows.jsonl.gz", chat_template(Tokenizer))


def test_the_command_takes_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    model, _ = tiny_pair()
    chat = {"messages": [{"role": "user", "content": "def f(): " * 20}, {"role": "assistant", "content": "return 1"}]}
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(chat) + "\n" + json.dumps({"text": "import os\n" * 50}) + "\n")
    options = ["--calibration", str(file), "--no-evaluation", "--samples", "2", "--length", "32", "--device", "cpu"]
    assert main(["quantize", str(model), str(tmp_path / "out"), *options]) == 0
    file.write_text('{"text": "a"}\n{"label": 1}\n')
    assert main(["quantize", str(model), str(tmp_path / "again"), *options]) == 2
    error = capsys.readouterr().err
    assert "rows.jsonl, line 2: it has 'label'" in error
    assert error.count("\n") == 1
    for name, message in (("rows.parquet", "write its rows as .jsonl"), ("rows.jsonl.gz", "cannot be read")):
        (tmp_path / name).write_bytes(b"PAR1\xff")
        again = ["--calibration", str(tmp_path / name), *options[2:]]
        assert main(["quantize", str(model), str(tmp_path / "again"), *again]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
