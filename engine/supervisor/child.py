"""One supervised process: its own process group, its output in a log file, its end seen at once."""

import asyncio
import logging
import logging.handlers
import os
import re
import signal
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

#: Size at which a log file is set aside, and how many are kept.
LOG_BYTES, LOG_FILES = 10 << 20, 3
#: Lines of output remembered to explain a failure.
REMEMBERED = 200
#: The health probes of the gateway, once a second, say nothing in a log.
_NOISE = re.compile(r'"GET /(?:health|metrics|v1/models) HTTP/1\.1" 200')


class _Log(logging.handlers.RotatingFileHandler):
    """The log file. Where it cannot be written, e.g. on a full disk, that is said once, not with every line."""

    _said = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's own name
        """See `logging.Handler`."""
        if not self._said:
            self._said = True
            print(f"{self.baseFilename} cannot be written: {sys.exc_info()[1]}", file=sys.stderr)


class Child:
    """One run of one process.

    Args:
        command: Program and arguments.
        environment: Its whole environment.
        log: File that its output is appended to.
        on_line: Called with each line of its output.
    """

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], log: Path, on_line: Callable[[str], None]
    ) -> None:
        self._command = command
        self._environment = dict(environment)
        self._on_line = on_line
        self._log = _Log(log, maxBytes=LOG_BYTES, backupCount=LOG_FILES - 1)
        self._process: asyncio.subprocess.Process | None = None
        self._reading: asyncio.Task[None] | None = None
        self.last_lines: deque[str] = deque(maxlen=REMEMBERED)

    async def start(self, standard_input: bytes = b"", pass_fds: Sequence[int] = ()) -> None:
        """Starts the process in a new process group and hands it its standard input.

        Raises:
            OSError: The program cannot be started.
        """
        read_end, write_end = os.pipe()
        try:
            self._process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=asyncio.subprocess.PIPE if standard_input else asyncio.subprocess.DEVNULL,
                stdout=write_end,
                stderr=asyncio.subprocess.STDOUT,
                env=self._environment,
                pass_fds=pass_fds,
                process_group=0,
            )
        except OSError:
            os.close(read_end)
            raise
        finally:
            os.close(write_end)
        self._reading = asyncio.create_task(self._read(read_end))
        if self._process.stdin is not None:
            try:
                self._process.stdin.write(standard_input)
                await self._process.stdin.drain()
            except (BrokenPipeError, ConnectionResetError):
                pass  # it ended at once; whoever waits for it will see why
            except asyncio.CancelledError:
                self.signal_group(signal.SIGKILL)
                raise
            self._process.stdin.close()

    @property
    def pid(self) -> int | None:
        """Process id, also its process group; None before the start."""
        return self._process.pid if self._process is not None else None

    @property
    def exit_status(self) -> int | None:
        """As `subprocess` gives it, negative for a signal; None while it runs."""
        return self._process.returncode if self._process is not None else None

    async def wait(self) -> int:
        """Waits until the process has ended; others of its group may still run."""
        assert self._process is not None
        return await self._process.wait()

    def signal_group(self, number: signal.Signals) -> None:
        """Sends a signal to the process and everything that it started."""
        if self._process is not None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, number)

    async def end(self, grace: float) -> None:
        """Asks the process to end, and kills what is left of its group after `grace` seconds."""
        if self._process is None:
            return
        if self._process.returncode is None:
            with suppress(ProcessLookupError):
                self._process.terminate()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), grace)
        self.signal_group(signal.SIGKILL)
        await self._process.wait()
        if self._reading is not None:
            # A process that left the group may hold the pipe open for ever.
            with suppress(TimeoutError):
                await asyncio.wait_for(self._reading, 1.0)
        with suppress(OSError):  # it has said so: what is left cannot be written
            self._log.close()

    async def _read(self, descriptor: int) -> None:
        reader = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(descriptor, "rb", buffering=0)
        )
        pending = b""
        try:
            while chunk := await reader.read(1 << 16):
                *lines, pending = re.split(rb"[\r\n]+", pending + chunk)
                for line in lines:
                    self._take(line)
                if len(pending) > 1 << 20:  # a program that writes no line ends must not fill our memory
                    self._take(pending)
                    pending = b""
            self._take(pending)
        finally:
            transport.close()

    def _take(self, raw: bytes) -> None:
        line = raw.decode("utf-8", "replace").rstrip()
        if not line or _NOISE.search(line):
            return
        self.last_lines.append(line)
        self._log.emit(logging.makeLogRecord({"msg": line}))
        self._on_line(line)
