"""The micro-tests: the emulator gives its committed answers in every mode, and a comparison names what differs."""

from pathlib import Path

import pytest

from tokenmill import platform
from tokenmill.errors import InputError
from tokenmill.kernels import micro
from tokenmill.kernels.emulator import ASYNC_MODES

pytestmark = pytest.mark.emulator


@pytest.mark.parametrize("mode", ASYNC_MODES)
def test_answers_are_the_committed_ones(tmp_path: Path, mode: str) -> None:
    micro.run_emulated(tmp_path / "facts.txt", seed=11, mode=mode)
    assert micro.compare(micro.read(micro.GOLDEN), micro.read(tmp_path / "facts.txt")) == []


def test_layouts_of_one_product_agree() -> None:
    """Every swizzle of the same operand gives the same product, and both signs of transposition."""
    facts = micro.read(micro.GOLDEN)
    for n in (8, 64):
        first = [f for name, f in facts.items() if name.startswith(f"wgmma rs bf16 n{n} swizzle") and "step 0" in name]
        assert len(first) == 5
        assert len({fact.digest for fact in first}) == 1
    for operand in ("n64 B", "n24 A"):
        transposed = [f for name, f in facts.items() if f"{operand} transposed" in name]
        assert len(transposed) == 4
        assert len({fact.digest for fact in transposed}) == 1


def test_comparison_names_the_primitive(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = micro.GOLDEN.read_text(encoding="utf-8").splitlines()
    changed = next(i for i, line in enumerate(lines) if line.startswith("mma.sync s8"))
    name, digest, words = lines[changed].split("\t")
    lines[changed] = f"{name}\t{digest[::-1]}\t{words.replace(words.split()[2], '12345678')}"
    lines = [line for line in lines if not line.startswith("atomics")]
    other = tmp_path / "gpu.txt"
    other.write_text("\n".join(line.replace("~mma", "~other mma") for line in lines), encoding="utf-8")
    assert micro.main(["--compare", str(micro.GOLDEN)]) == 0
    capsys.readouterr()
    assert micro.main(["--compare", str(other)]) == 1
    said = capsys.readouterr().out
    assert "DIFFERS  mma.sync s8: word 2: 12345678 instead of" in said
    assert "DIFFERS  atomics: missing" in said


@pytest.mark.parametrize("fails", ["compiler", "program"])
def test_a_run_that_failed_is_not_judged_by_what_an_earlier_one_left(
    fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = 'printf "#!/bin/sh\\necho no GPU; exit 255" > "$target"; chmod +x "$target"'
    nvcc = tmp_path / "nvcc"
    does = "echo no such architecture; exit 1" if fails == "compiler" else program
    nvcc.write_text(f"#!/bin/sh\nfor target; do :; done\n{does}\n")
    nvcc.chmod(0o755)
    monkeypatch.setattr(platform, "nvcc", lambda: str(nvcc))
    monkeypatch.setattr(platform, "has_nvidia_driver", lambda: True)
    earlier = tmp_path / "facts.txt"
    earlier.write_bytes(micro.GOLDEN.read_bytes())
    with pytest.raises(InputError, match="no such architecture" if fails == "compiler" else "no GPU"):
        micro.main(["--gpu", "--output", str(earlier)])


def test_bad_files_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be written; name another"):
        micro.main(["--output", str(tmp_path)])
    (tmp_path / "bytes.txt").write_bytes(b"\xff")
    with pytest.raises(InputError, match=r"bytes\.txt cannot be read: 'utf-8' codec"):
        micro.main(["--compare", str(tmp_path / "bytes.txt")])
    with pytest.raises(InputError, match="cannot be read"):
        micro.main(["--compare", str(tmp_path / "absent.txt")])
    (tmp_path / "other.txt").write_text("hello\n")
    with pytest.raises(InputError, match=r"other\.txt:1 is not a line"):
        micro.main(["--compare", str(tmp_path / "other.txt")])
