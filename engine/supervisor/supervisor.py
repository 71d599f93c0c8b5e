"""Runs the gateway and the engines of a plan together, from the bound port to the last process gone."""

import asyncio
import itertools
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from tokenmill import env
from tokenmill.engine.gateway.settings import Document
from tokenmill.engine.supervisor import facts, probe, reload
from tokenmill.engine.supervisor.child import Child
from tokenmill.engine.supervisor.display import Display
from tokenmill.engine.supervisor.keeper import Change, Keeper, StartError
from tokenmill.engine.supervisor.listener import ReservedPort
from tokenmill.engine.supervisor.plan import Engine, Plan, gateway_command
from tokenmill.errors import TokenmillError

#: Seconds an engine has to end after SIGTERM; its requests are over, the gateway drained before.
ENGINE_GRACE = 10.0
#: Seconds that a gateway worker gets beyond its drain time.
WORKER_GRACE = 3.0
#: Seconds to wait for the gateway to see what the supervisor already knows.
SETTLE_SECONDS = 5.0
#: What an engine prints, and the stage that begins with it. Without such a line a stage is just not shown.
STAGES: tuple[tuple[str, str], ...] = (
    ("Starting to load model", "loading weights"),
    ("Loading weights took", "warming"),
    ("KV cache size", "warming"),
)


class Supervisor:
    """One run of `tokenmill serve`.

    Args:
        plan: What to run.
        listener: The listening socket for clients; None for a headless engine, which has no gateway.
        logs: Folder for log files; it exists.
        display: Where progress is shown.
        replan: Reads the configuration file again; None: there is none.
    """

    def __init__(
        self,
        plan: Plan,
        listener: socket.socket | None,
        logs: Path,
        display: Display,
        replan: Callable[[], Plan] | None = None,
    ) -> None:
        self._plan = plan
        self._listener = listener
        self._logs = logs
        self._display = display
        self._ports = {engine.name: ReservedPort() for engine in plan.engines}
        # When this process ends, however it ends, the kernel closes the write end and the engines notice.
        self._alive_read, self._alive_write = os.pipe()
        self._workers: list[Keeper] = []
        self._engines: list[Keeper] = []
        self._tasks: dict[asyncio.Task[None], Keeper] = {}
        #: Workers of configurations before this one, with requests that have not ended, and of one not taken yet.
        self._others: dict[asyncio.Task[None], Keeper] = {}
        self._stop = asyncio.Event()
        #: A signal to stop, or the end of what should run.
        self._over = asyncio.Event()
        self._replan = replan
        self._changed = asyncio.Event()
        self._stages: dict[str, int] = {}
        # Where the workers leave their figures for each other; those of an earlier run are not ours.
        self._figures = logs / "figures"
        shutil.rmtree(self._figures, ignore_errors=True)

    async def run(self) -> int:
        """Serves until SIGTERM or SIGINT; returns the exit status.

        SIGHUP has it read the configuration file again; where there is none, or the terminal is gone, it ends, too.

        Raises:
            StartError: A process ended before it was ever ready; all others have been ended.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # `nohup` has it ignored, and means it
                reads = number == signal.SIGHUP and self._replan is not None and not reload.has_terminal()
                loop.add_signal_handler(number, self._changed.set if reads else self._on_signal)
        try:
            self._start_keepers()
            beside = asyncio.create_task(self._announce_and_follow())
            try:
                await self._over.wait()
            finally:
                await self._cancel([beside])
            self._display.end()
            failed = next((task for task in self._tasks if task.done()), None)
            if failed is not None and not self._stop.is_set():
                raise StartError(
                    f"{self._tasks[failed].name} could not start: {failed.exception()}; logs: {self._logs}"
                )
            return 0
        finally:
            await self._shut_down()

    def _start_keepers(self) -> None:
        if self._listener is not None:
            self._workers = self._new_workers(self._plan)
        self._engines = [self._engine_keeper(engine) for engine in self._plan.engines]
        if self._workers:
            self._display.stage("gateway", "starting workers")
        for keeper in (*self._workers, *self._engines):
            self._keep(asyncio.create_task(keeper.run()), keeper)

    def _keep(self, task: asyncio.Task[None], keeper: Keeper) -> None:
        """Runs it until the end; should it end before, so does everything."""
        self._tasks[task] = keeper
        task.add_done_callback(lambda _: self._over.set() if task in self._tasks else None)

    def _put_aside(self, tasks: dict[asyncio.Task[None], Keeper]) -> None:
        """Runs them until their end, of which nobody takes notice, or that of everything."""
        self._others.update(tasks)
        for task in tasks:
            task.add_done_callback(lambda done: self._others.pop(done, None))

    def _new_workers(self, plan: Plan) -> list[Keeper]:
        """Workers for a plan, under names that nobody has."""
        taken = {keeper.name for keeper in (*self._tasks.values(), *self._others.values())}
        names = (name for number in itertools.count(1) if (name := f"gateway-{number}") not in taken)
        return [self._worker_keeper(name, plan) for name in itertools.islice(names, plan.server.workers)]

    def _on_signal(self) -> None:
        if self._stop.is_set():  # a second signal: no more patience
            for keeper in (*self._tasks.values(), *self._others.values()):
                keeper.kill()
        self._stop.set()
        self._over.set()

    async def _announce_and_follow(self) -> None:
        await self._announce()
        while True:
            await self._changed.wait()
            self._changed.clear()
            problem = await self._take_changes()
            if problem is not None:
                self._display.event("configuration", f"not taken, all goes on as before: {problem}", bad=True)

    async def _take_changes(self) -> str | None:
        """Has workers of the configuration file as it is now take over; returns why not."""
        assert self._replan is not None
        try:
            plan = await asyncio.to_thread(self._replan)
        except TokenmillError as error:
            return str(error)
        if (reason := reload.refusal(self._plan, plan)) is not None:
            return reason
        fresh = self._new_workers(plan)
        tasks = {asyncio.create_task(keeper.run()): keeper for keeper in fresh}
        self._put_aside(tasks)
        reason = await reload.failure(fresh, partial(probe.get_json, *self._address(), "/ready"))
        if reason is not None:
            await self._cancel(tasks)
            return reason
        before = {task: keeper for task, keeper in self._tasks.items() if keeper in self._workers}
        self._plan, self._workers = plan, fresh
        for task, keeper in tasks.items():
            self._others.pop(task, None)
            self._keep(task, keeper)
        self._put_aside(before)
        for task, keeper in before.items():
            del self._tasks[task]
            keeper.retire()
        self._display.event("configuration", "taken; the workers before end with their last request")
        return None

    async def _announce(self) -> None:
        """Waits until everything is ready, then shows the panel."""
        for keeper in (*self._workers, *self._engines):
            await keeper.ready.wait()
        if self._listener is None:
            self._display.end()
            self._display.event(self._plan.engines[0].name, f"headless node runs; log in {self._logs}")
            return
        host, port = self._address()
        down: dict[str, str] = {}
        with suppress(TimeoutError):
            async with asyncio.timeout(SETTLE_SECONDS):
                await self._all_workers_see(host, port, down)
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        remotes, engines = self._plan.remotes, self._plan.engines
        files, governed = [self._status_file(engine) for engine in engines], self._plan.governance is not None
        shown = facts.panel_facts(url, engines, remotes, files, self._logs, governed=governed)
        title = f"Tokenmill is ready after {self._display.seconds:.1f} s"
        example = facts.example_command(url, self._first_model(), chat=not self._pools(), governed=governed)
        self._display.panel(title, shown, example)
        for tier, reasons in down.items():
            self._display.event(tier, f"cannot be served yet: {reasons}", bad=True)

    async def _all_workers_see(self, host: str, port: int, down: dict[str, str]) -> None:
        """Waits until every gateway worker says that every tier is up; the kernel chooses which one answers.

        Args:
            host, port: Where they listen.
            down: Has the tiers that are not, with the reasons, as the last of them said.
        """
        seeing: set[int] = set()
        while not {worker.child.pid for worker in self._workers if worker.child} <= seeing:
            answer = await probe.get_json(host, port, "/ready")
            if answer is not None:
                status, said = answer
                down.clear()
                down.update(said.get("tiers", {}))
                if status == 200:
                    seeing.add(said["worker"])
            await asyncio.sleep(0.02)

    def _first_model(self) -> str:
        names = [name for engine in self._plan.engines for name in engine.backend.public_names]
        names += [name for remote in self._plan.remotes for name in (*remote.models, remote.tier)]
        return names[0]

    def _pools(self) -> bool:
        """Whether the first model makes embeddings, not text."""
        command = " ".join(self._plan.engines[0].command) if self._plan.engines else ""
        return "--runner pooling" in command or "--runner=pooling" in command

    def _address(self) -> tuple[str, int]:
        """Where a program of this machine reaches the listening socket."""
        assert self._listener is not None
        host, port = self._listener.getsockname()[:2]
        return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), port  # noqa: S104 - compared, not bound

    def _engine_keeper(self, engine: Engine) -> Keeper:
        port = self._ports[engine.name].number

        async def launch() -> Child:
            command = engine.command
            if self._listener is not None:
                command = (*command, "--host", "127.0.0.1", "--port", str(port))
            ours = {env.PARENT_FD.name: str(self._alive_read), env.STATUS_FILE.name: str(self._status_file(engine))}
            child = Child(
                command,
                {**engine.environment, **ours},
                self._logs / f"engine-{engine.name}.log",
                lambda line: self._on_engine_line(keeper, line),
            )
            if not keeper.was_ready:
                self._display.stage(engine.name, "starting engine")
            await child.start(pass_fds=[self._alive_read])
            return child

        async def health() -> int | None:
            if self._listener is None:
                return 200  # a headless node has no page to ask
            answer = await probe.get("127.0.0.1", port, "/health")
            return answer[0] if answer is not None else None

        keeper = Keeper(engine.name, launch, health, self._on_change, ENGINE_GRACE)
        return keeper

    def _worker_keeper(self, name: str, plan: Plan) -> Keeper:
        assert self._listener is not None
        listener = self._listener

        async def launch() -> Child:
            child = Child(
                gateway_command(listener.fileno()),
                os.environ,
                self._logs / f"{name}.log",
                lambda line: self._display.output(name, line),
            )
            await child.start(self._document(plan).to_json(), pass_fds=[listener.fileno()])
            return child

        async def health() -> int | None:
            answer = await probe.get(*self._address(), "/health")
            return answer[0] if answer is not None else None

        return Keeper(name, launch, health, self._on_change, plan.server.drain_seconds + WORKER_GRACE)

    def _document(self, plan: Plan) -> Document:
        local = [engine.gateway_backend(self._ports[engine.name].number) for engine in plan.engines]
        return Document(
            (*local, *plan.remotes),
            plan.settings(),
            os.getpid(),
            plan.governance,
            replace(plan.observability, shared=str(self._figures)),
            plan.routing,
            plan.sensitivity,
        )

    def _status_file(self, engine: Engine) -> Path:
        return self._logs / f"engine-{engine.name}.hooks.json"

    def _on_engine_line(self, keeper: Keeper, line: str) -> None:
        self._display.output(keeper.name, line)
        if keeper.was_ready:
            return
        for number, (words, stage) in enumerate(STAGES):
            # Several workers print the same lines: a stage that is over does not come back.
            if words in line and number >= self._stages.get(keeper.name, 0):
                self._stages[keeper.name] = number
                self._display.stage(keeper.name, stage)

    def _on_change(self, keeper: Keeper, change: Change, text: str) -> None:
        if keeper not in self._workers and keeper not in self._engines:
            return  # one that is to take over: it is heard when it does
        if change != "ready" or keeper.restarts:
            self._display.event(keeper.name, text, bad=change == "down")
        elif keeper in self._engines:
            self._display.stage(keeper.name, "")
            self._display.done(keeper.name, "ready", f"after {self._display.seconds:.1f} s")
        elif all(worker.was_ready for worker in self._workers):
            self._display.stage("gateway", "")
            self._display.done("gateway", "ready", f"after {self._display.seconds:.1f} s")

    async def _shut_down(self) -> None:
        """Lets the gateway drain, then ends the engines; nothing is left when it returns."""
        self._display.end()
        if self._listener is not None:
            self._listener.close()
        if any(keeper.ready.is_set() for keeper in self._workers):
            self._display.event("gateway", f"draining, at most {self._plan.server.drain_seconds:g} s")
        started = time.monotonic()
        await self._cancel([*self._others, *(task for task, one in self._tasks.items() if one in self._workers)])
        await self._cancel(self._tasks)
        for port in self._ports.values():
            port.release()
        os.close(self._alive_read)
        os.close(self._alive_write)
        self._display.event("tokenmill", f"stopped after {time.monotonic() - started:.1f} s")

    async def _cancel(self, tasks: Iterable[asyncio.Task[None]]) -> None:
        chosen = list(tasks)
        for task in chosen:
            if not task.cancelling():  # once more would have it end before its process
                task.cancel()
        # Nor when this is cancelled.
        await asyncio.shield(asyncio.gather(*chosen, return_exceptions=True))
