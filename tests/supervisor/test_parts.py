"""The parts of the supervisor, one by one: pauses, ports, output of processes, the terminal."""

import asyncio
import io
import json
import re
import signal
import socket
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from tests.supervisor.running import session
from tokenmill.engine.gateway.backend_section import LocalBackend, Speculation
from tokenmill.engine.supervisor import facts, probe
from tokenmill.engine.supervisor.backoff import Backoff
from tokenmill.engine.supervisor.child import Child
from tokenmill.engine.supervisor.display import Display, Fact
from tokenmill.engine.supervisor.keeper import Keeper, StartError, why_ended
from tokenmill.engine.supervisor.listener import ReservedPort, free_port, listen, owner_of
from tokenmill.engine.supervisor.main import _log_folder as log_folder
from tokenmill.engine.supervisor.plan import Engine
from tokenmill.errors import ConfigurationError


def test_pauses_double_to_a_limit_and_a_calm_run_forgives() -> None:
    backoff = Backoff(first=1, longest=30, calm=60)
    assert [backoff.after(0) for _ in range(7)] == [1, 2, 4, 8, 16, 30, 30]
    assert [backoff.after(59), backoff.after(61), backoff.after(5)] == [30, 1, 2]
    for _ in range(2000):
        assert backoff.after(0) <= 30


def test_a_reserved_port_is_handed_to_nobody_but_may_be_listened_on() -> None:
    reserved = ReservedPort()
    try:
        for _ in range(2):  # the second time is the restart
            server = socket.socket()
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as vLLM does
            server.bind(("127.0.0.1", reserved.number))
            server.listen()
            with socket.create_connection(("127.0.0.1", reserved.number)), server.accept()[0]:
                pass
            server.close()
        with pytest.raises(OSError), socket.create_connection(("127.0.0.1", reserved.number), 1):
            pass  # nobody listens now
    finally:
        reserved.release()


@pytest.mark.parametrize(("host", "words"), [("192.0.2.1", "no address of this machine"), ("no host", "is unknown")])
def test_an_impossible_host_is_one_line(host: str, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words) as caught:
        listen(host, 0)
    assert "--host" in str(caught.value)


def test_the_owner_of_a_port_is_found() -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        assert re.fullmatch(r".+ \(pid \d+\)", owner_of(port) or "")
        assert free_port(port) != port
    assert owner_of(port) is None


def run_child(
    tmp_path: Path, program: str, *, end_after: float | None = None, grace: float = 5
) -> tuple[Child, list[str]]:
    """Runs a Python program as a child to its end; what was printed, line by line."""
    lines: list[str] = []

    async def run() -> Child:
        child = Child([sys.executable, "-c", program], {"PYTHONUNBUFFERED": "1"}, tmp_path / "log", lines.append)
        await child.start()
        if end_after is None:
            await child.wait()
        else:
            await asyncio.sleep(end_after)
        await child.end(grace)
        return child

    return asyncio.run(run()), lines


def test_output_reaches_log_and_listener_whatever_it_looks_like(tmp_path: Path) -> None:
    program = (
        "import sys; print('a'); sys.stderr.write('b\\rc\\r\\n'); sys.stdout.buffer.write(b'\\xff\\xfe\\n');"
        "print('x' * 3_000_000); print('INFO: \"GET /health HTTP/1.1\" 200 OK'); sys.stdout.write('no end')"
    )
    child, lines = run_child(tmp_path, program)
    assert child.exit_status == 0
    assert lines[:2] == ["a", "b"]
    assert "c" in lines
    assert lines[-1] == "no end"
    assert sum(line.count("x") for line in lines) == 3_000_000
    assert "health" not in (tmp_path / "log").read_text()
    assert "no end" in (tmp_path / "log").read_text()


def test_a_log_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "log").symlink_to("/dev/full")
    child, lines = run_child(tmp_path, "print('a'); print('b')")
    assert lines == list(child.last_lines) == ["a", "b"]
    (said,) = capsys.readouterr().err.splitlines()
    assert said == f"{tmp_path / 'log'} cannot be written: [Errno 28] No space left on device"


def test_logs_go_elsewhere_where_the_folder_is_another_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENMILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    first = log_folder(8123)
    assert first == tmp_path / "cache" / "logs" / "8123"
    monkeypatch.setattr("os.access", lambda path, mode: path != first)  # root may write everywhere
    assert log_folder(8123).parent == tmp_path / "temporary"


def test_a_child_that_ignores_signals_is_killed_with_its_group(tmp_path: Path) -> None:
    program = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99.125)']); time.sleep(99.125)"
    )
    child, _ = run_child(tmp_path, program, end_after=1.0, grace=0.3)
    assert child.exit_status == -signal.SIGKILL
    deadline = time.monotonic() + 5
    own = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[3])
    while (left := [text for text in session(own).values() if "99.125" in text]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left == []


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("import sys; print('engine: error: unrecognized arguments: --foo'); sys.exit(2)",
         "ended with status 2: unrecognized arguments: --foo"),
        ("raise ValueError('K=3 is odd')", "ended with status 1: ValueError: K=3 is odd"),
        ("import os; os.kill(os.getpid(), 9)", "killed by SIGKILL"),
        ("pass", "ended with status 0"),
    ],
)  # fmt: skip
def test_the_reason_of_an_end_is_one_line(tmp_path: Path, program: str, reason: str) -> None:
    child, _ = run_child(tmp_path, program)
    assert why_ended(child) == reason


def test_an_end_is_seen_although_nobody_answers(tmp_path: Path) -> None:
    async def launch() -> Child:
        program = "import time; time.sleep(0.5); raise SystemExit('error: it is wrong')"
        child = Child([sys.executable, "-c", program], {}, tmp_path / "log", lambda _line: None)
        await child.start()
        return child

    async def health() -> int | None:
        await asyncio.Event().wait()
        return None

    keeper = Keeper("one", launch, health, lambda *_: None, 1.0)
    with pytest.raises(StartError, match="it is wrong"):
        asyncio.run(asyncio.wait_for(keeper.run(), 20))


def test_a_process_that_is_to_retire_while_it_starts_does(tmp_path: Path) -> None:
    async def launch() -> Child:
        child = Child([sys.executable, "-c", "import time; time.sleep(60)"], {}, tmp_path / "log", lambda _line: None)
        await child.start()
        keeper.retire()
        return child

    async def health() -> int | None:
        return 200

    keeper = Keeper("one", launch, health, lambda *_: None, 1.0)
    asyncio.run(asyncio.wait_for(keeper.run(), 20))
    assert keeper.child is not None
    assert keeper.child.exit_status == -signal.SIGHUP


def test_the_time_that_a_process_took_to_be_ready_forgives_no_death(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that loads for minutes and dies at its first request is no calm run."""
    now = [0.0]
    monkeypatch.setattr("tokenmill.engine.supervisor.keeper.time", SimpleNamespace(monotonic=lambda: now[0]))
    runs: list[float] = []

    class Pauses(Backoff):
        def after(self, seconds_ready: float) -> float:
            runs.append(seconds_ready)
            raise asyncio.CancelledError  # one run is enough

    async def launch() -> Child:
        child = Child([sys.executable, "-c", "import time; time.sleep(60)"], {}, tmp_path / "log", lambda _line: None)
        await child.start()
        return child

    async def health() -> int | None:
        now[0] += 100
        return 200 if now[0] > 150 else None

    def on_change(keeper: Keeper, change: str, text: str) -> None:
        now[0] += 7
        keeper.kill()

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(Keeper("one", launch, health, on_change, 1.0, Pauses()).run())
    assert runs == [7.0]


def test_probes_survive_servers_that_speak_nonsense() -> None:
    async def ask(answer: bytes) -> object:
        async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer)
            writer.close()

        async with await asyncio.start_server(speak, "127.0.0.1", 0) as server:
            return await probe.get("127.0.0.1", server.sockets[0].getsockname()[1], "/health", timeout=2)

    assert asyncio.run(ask(b"HTTP/1.1 503 Busy\r\n\r\nx")) == (503, b"x")
    for nonsense in (b"", b"SSH-2.0\r\n", b"HTTP/1.1 abc\r\n\r\n", b"\xff" * 100):
        assert asyncio.run(ask(nonsense)) is None


def shown(*, terminal: bool, width: int = 100) -> str:
    """Everything that a display shows in the life of a server."""
    console = Console(
        file=io.StringIO(), force_terminal=terminal, width=width, color_system="standard" if terminal else None
    )
    display = Display(console)
    display.begin()
    display.stage("text", "starting engine")
    display.stage("text", "loading weights")
    display.stage("text", "")
    display.panel(
        "ready", [Fact("Models", "m", "tier t"), Fact("Ours", "linear", "why [not]", "bad")], "curl 'x' " * 20
    )
    display.event("text", "killed by SIGKILL", bad=True)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_terminal_gets_colour_and_a_command_that_can_be_copied() -> None:
    text = shown(terminal=True)
    assert "\x1b[" in text
    assert "╭" in text
    assert "why [not]" in text  # brackets are text, not markup
    assert "curl 'x' " * 20 in text  # one line, whatever the width


@pytest.mark.parametrize("width", [20, 40, 200])
def test_anything_else_gets_plain_lines(width: int) -> None:
    text = shown(terminal=False, width=width)
    assert "\x1b" not in text
    assert text.isascii()
    lines = text.splitlines()
    assert all(re.match(r"\[ *\d+\.\d s\] ", line) for line in lines)
    assert any(line.endswith("text: loading weights") for line in lines)
    assert any(line.endswith("Ours  linear  why [not]") for line in lines)


def test_the_panel_tells_what_runs_and_what_does_not(tmp_path: Path) -> None:
    backend = LocalBackend(model="org/big", speculation=Speculation(method="draft_model", model="org/small", tokens=2))
    engine = Engine(backend, "t", "t", None, ("x",), {})
    status = tmp_path / "hooks.json"
    hooks = [
        {"hook": "linear", "state": "refused", "detail": "too old"},
        {"hook": "verification", "state": "active", "detail": "ours"},
    ]
    status.write_text(json.dumps({"hooks": hooks}))
    told = facts.panel_facts("http://h:1", [engine], [], [status], tmp_path)
    assert Fact("Models", "big", "tier t; small drafts up to 2 tokens a step") in told
    assert Fact("Ours in vLLM", "linear", "refused: too old", "bad") in told
    assert Fact("", "verification", "ours", "good") in told
    for broken in ("", "{", '{"hooks": 3}', "[]"):
        status.write_text(broken)
        assert any(fact.mood == "bad" for fact in facts.panel_facts("http://h:1", [engine], [], [status], tmp_path))


@pytest.mark.parametrize(
    ("uncompiled", "expected"),
    [
        (None, None),
        ({"reason": "--enforce-eager", "remedy": ""}, Fact("", "uncompiled: --enforce-eager", mood="quiet")),
        ({"reason": "no headers", "remedy": "do"}, Fact("", "uncompiled: no headers; remedy: do", mood="bad")),
        ("nonsense", None),
    ],
)
def test_the_panel_tells_below_a_model_why_it_runs_uncompiled(
    uncompiled: object, expected: Fact | None, tmp_path: Path
) -> None:
    engines = [Engine(LocalBackend(model=name), name, "t", None, ("x",), {}) for name in ("a", "b")]
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    files[0].write_text(json.dumps({"hooks": [], "uncompiled": uncompiled}))
    files[1].write_text(json.dumps({"hooks": []}))  # as an older plug-in writes it
    told = facts.panel_facts("http://h:1", engines, [], files, tmp_path)
    models = [Fact("Models", "a", "tier t"), *([expected] if expected else []), Fact("", "b", "tier t")]
    assert told[1 : 1 + len(models)] == models
    assert sum(fact.value.startswith("uncompiled") for fact in told) == (expected is not None)


def test_the_panel_says_that_the_bundled_pair_runs_uncompiled_on_purpose(tmp_path: Path) -> None:
    status = tmp_path / "status.json"
    status.write_text(json.dumps({"hooks": [], "uncompiled": {"reason": "--enforce-eager", "remedy": ""}}))
    engine = Engine(LocalBackend(model="bundled:target"), "a", "t", None, ("x",), {})
    (told,) = (
        fact
        for fact in facts.panel_facts("http://h:1", [engine], [], [status], tmp_path)
        if fact.value.startswith("uncompiled")
    )
    assert told.value == "uncompiled: --enforce-eager, which the bundled pair has to be ready sooner"
    assert told.mood == "quiet"
