"""The command table: help, unknown commands and one-line errors."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tokenmill import __version__, cli
from tokenmill.errors import ConfigurationError

ROOT = Path(__file__).resolve().parent.parent


def test_overview_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    shown = capsys.readouterr().out
    for command in cli.COMMANDS:
        assert command.name in shown
        assert command.summary in shown


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"tokenmill {__version__}"


def test_unknown_command_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serv"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "'serv'" in message


def test_error_becomes_one_line_and_status_two(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(self: cli.Command) -> object:
        def main(argv: list[str]) -> int:
            raise ConfigurationError("port=70000 is above 65535; pass --port 8000")

        return main

    monkeypatch.setattr(cli, "COMMANDS", (cli.Command("serve", "nowhere:main", "serves"),))
    monkeypatch.setattr(cli.Command, "load", failing)
    assert cli.main(["serve"]) == 2
    assert capsys.readouterr().err == "tokenmill serve: port=70000 is above 65535; pass --port 8000\n"


def test_a_place_that_cannot_be_written_to_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, readme = str(next((ROOT / "bench" / "results").rglob("*.jsonl"))), str(tmp_path / "missing" / "README.md")
    for flag, place, reason in (("--html", str(tmp_path), "is a directory"), ("--readme", readme, "no such file")):
        assert cli.main(["report", rows, flag, place]) == 2
        message = capsys.readouterr().err
        assert message.startswith(f"tokenmill report: {place} cannot be used: {reason}")
        assert message.count("\n") == 1


@pytest.mark.parametrize("lines", [1, 100_000])
def test_output_that_nobody_reads_to_its_end_is_no_failure(lines: int) -> None:
    program = (
        "import sys; from tokenmill import cli; sys.stdin.read();"
        f"cli.Command.load = lambda command: lambda argv: print('line\\n' * {lines}, end='') or 0;"
        "sys.exit(cli.main(['admin']))"
    )
    command = [sys.executable, "-c", program]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as process:
        assert process.stdin and process.stdout and process.stderr
        process.stdout.close()
        process.stdin.close()
        assert (process.stderr.read(), process.wait(60)) == ("", 141)


def test_what_a_terminal_cannot_show_is_replaced() -> None:
    program = (
        "import sys; from tokenmill import cli; cli.Command.load = lambda command: lambda argv: print('✓ done') or 0;"
        "sys.exit(cli.main(['admin']))"
    )
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False, env=environment)
    assert (ended.returncode, ended.stdout) == (0, b"? done\n"), ended.stderr


def test_another_broken_pipe_is_not_taken_for_a_reader_that_has_gone() -> None:
    program = (
        "import os, sys; from tokenmill import cli; reader, writer = os.pipe(); os.close(reader);"
        "cli.Command.load = lambda command: lambda argv: os.write(writer, b'line'); sys.exit(cli.main(['admin']))"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (ended.returncode, "BrokenPipeError" in ended.stderr) == (1, True)


@pytest.mark.parametrize("command", cli.COMMANDS, ids=lambda command: command.name)
def test_every_command_explains_itself(command: cli.Command, capsys: pytest.CaptureFixture[str]) -> None:
    main = command.load()
    with pytest.raises(SystemExit) as exit_info:
        main(["--help"])
    assert exit_info.value.code == 0
    assert "usage" in capsys.readouterr().out.lower()
