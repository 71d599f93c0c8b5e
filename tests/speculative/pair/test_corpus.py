"""The corpus: what is in it, on which side of the split, and what the quantizer gets of it."""

import ast
from pathlib import Path

import pytest

from tokenmill.errors import ConfigurationError, InputError
from tokenmill.speculative.pair.corpus import calibration_text, chat_pairs, part_of, read_library


def test_the_split_is_by_path_and_never_moves() -> None:
    """Pinned: a split that moved would let a model be measured on what it was trained on."""
    held_out = {"argparse.py", "asyncio/locks.py", "email/utils.py", "fractions.py", "tracemalloc.py"}
    assert {path for path in [*held_out, "ast.py", "json/decoder.py", "typing.py"] if part_of(path) == "held_out"} == (
        held_out
    )
    share = sum(part_of(f"module_{number}.py") == "held_out" for number in range(4000)) / 4000
    assert 0.04 < share < 0.06


def test_parts_are_disjoint_and_chat_stays_with_its_file(library: Path) -> None:
    corpus = read_library(library)
    train, held_out = corpus.part("train"), corpus.part("held_out")
    assert train
    assert held_out
    assert len(train) + len(held_out) == len(corpus.documents)
    assert not {d.path.removesuffix("#chat") for d in train} & {d.path.removesuffix("#chat") for d in held_out}
    assert read_library(library).digest == corpus.digest


def test_a_changed_file_changes_the_digest(library: Path, tmp_path: Path) -> None:
    digests = set()
    for text in ("x = 1\n", "x = 2\n"):
        for name in ("argparse.py", "ast.py"):
            (tmp_path / name).write_bytes((library / name).read_bytes() if (library / name).exists() else b"")
        (tmp_path / "big.py").write_text(text + "# filler\n" * 120_000)
        digests.add(read_library(tmp_path).digest)
    assert len(digests) == 2


def test_chat_pairs_are_cut_from_the_syntax_tree() -> None:
    source = (
        '"""Tools for circles."""\n\nclass C:\n    def area(self, r):\n        """Return the area of a circle."""\n'
    )
    source += "        return 3 * r * r\n"
    pairs = list(chat_pairs(ast.parse(source), source, "shapes/circle.py"))
    assert pairs == [
        "<|user|>\nWhat is the module shapes.circle for?<|end|>\n<|assistant|>\nTools for circles.<|end|>\n",
        "<|user|>\nWhat does the function area in shapes.circle do?<|end|>\n"
        "<|assistant|>\nReturn the area of a circle.<|end|>\n",
        "<|user|>\nWrite the function area. Return the area of a circle.<|end|>\n<|assistant|>\n"
        'def area(self, r):\n    """Return the area of a circle."""\n    return 3 * r * r<|end|>\n',
    ]


def test_files_that_are_no_python_text_are_left_out(library: Path, tmp_path: Path) -> None:
    for path in sorted(library.rglob("*.py")):
        place = tmp_path / path.relative_to(library)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(path)
    (tmp_path / "latin.py").write_bytes(b"x = '\xff'\n")
    (tmp_path / "template.py").write_text("class {{ name }}:\n")
    (tmp_path / "null.py").write_bytes(b"x = 1\0\n")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "test_x.py").write_text("x = 1\n")
    assert read_library(tmp_path).digest == read_library(library).digest


def test_too_little_text_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    with pytest.raises(ConfigurationError, match=r"holds 6 bytes .* a pair needs 1000000") as refusal:
        read_library(tmp_path)
    assert "\n" not in str(refusal.value)


def test_calibration_text_keeps_to_its_part_and_size(library: Path) -> None:
    train, held_out = calibration_text("train", 50_000, library), calibration_text("held_out", 50_000, library)
    assert 40_000 < len(train.encode()) <= 50_000
    assert 0 < len(held_out.encode()) <= 50_000
    assert train.endswith("\n")
    corpus = read_library(library)
    for text, part in ((train, "train"), (held_out, "held_out")):
        first = text[:200]
        assert any(document.text.startswith(first) for document in corpus.part(part))
        assert not any(d.text.startswith(first) for d in corpus.documents if d.part != part)
    assert calibration_text("train", 20_000, library) == train[: len(calibration_text("train", 20_000, library))]
    assert len(calibration_text("held_out", 10**9, library).encode()) == corpus.size("held_out")


def test_calibration_text_of_the_running_python() -> None:
    assert len(calibration_text("held_out", 100_000).encode()) > 90_000


def test_calibration_text_refuses_nonsense(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="part='test' is not known; use 'train' or 'held_out'"):
        calibration_text("test")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="max_bytes=0 is below 1"):
        calibration_text("train", 0)
    with pytest.raises(ConfigurationError, match="no Python source"):
        calibration_text("train", 10, tmp_path)
