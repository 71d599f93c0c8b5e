"""The README's snippets, word for word but for the port, against the running server."""

import contextlib
import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.supervisor.running import Running

pytestmark = pytest.mark.end_to_end
README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")


def snippet(language: str, word: str, server: Running) -> str:
    """The only fenced block of a language that contains a word."""
    (block,) = [
        block for block in re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL) if word in block
    ]
    assert "http://127.0.0.1:8000" in block
    return str(block.replace("http://127.0.0.1:8000", server.url))


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(server: Running) -> None:
    answer = subprocess.run(
        ["bash", "-c", snippet("bash", "curl", server)], capture_output=True, text=True, timeout=120, check=True
    )
    body = json.loads(answer.stdout)
    assert body["object"] == "chat.completion"
    assert body["choices"][0]["message"]["content"]


def test_python(server: Running) -> None:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(snippet("python", "OpenAI", server), "README.md", "exec"), {})  # noqa: S102 - our own text
    assert printed.getvalue().strip()
