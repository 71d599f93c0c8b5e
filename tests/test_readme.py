"""What the README says is there, is there."""

import re
import shlex
from pathlib import Path

import pytest

from tokenmill import cli

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def fenced(language: str) -> list[tuple[Path, str]]:
    pattern = re.compile(rf"^```{language}\n(.*?)^```", re.MULTILINE | re.DOTALL)
    return [(path, block) for path in DOCUMENTS for block in pattern.findall(path.read_text(encoding="utf-8"))]


def shell_lines() -> list[tuple[Path, list[str]]]:
    lines = []
    for path, block in fenced("bash"):
        for line in block.replace("\\\n", " ").splitlines():
            if line.strip() and not line.lstrip().startswith("#"):
                lines.append((path, shlex.split(line, comments=True)))
    return lines


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for path, words in shell_lines():
        if words and words[0] == "make":
            named = {word for word in words[1:] if "=" not in word and not word.startswith("-")}
            assert named <= targets, f"{path.name} runs make {named - targets}"


def test_commands_exist() -> None:
    known = {command.name for command in cli.COMMANDS}
    for path, words in shell_lines():
        if words and words[0].endswith("tokenmill") and len(words) > 1 and not words[1].startswith("-"):
            assert words[1] in known, f"{path.name} runs tokenmill {words[1]}"


def test_named_folders_exist() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for folder in re.findall(r"^\| `(\w+)/` \|", readme, re.MULTILINE):
        assert (ROOT / folder).is_dir()


def test_python_snippets_compile() -> None:
    snippets = fenced("python")
    assert snippets
    for path, block in snippets:
        compile(block, str(path), "exec")
