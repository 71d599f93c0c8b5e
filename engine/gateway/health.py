"""Health by probe: one loop per backend asks whether it lives and which models it serves."""

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable

import msgspec
import orjson

from tokenmill.engine.gateway.anthropic import VERSION
from tokenmill.engine.gateway.api_error import Headers
from tokenmill.engine.gateway.connection import ConnectFailedError, CutError, NoAnswerError
from tokenmill.engine.gateway.portfolio import Portfolio, Target
from tokenmill.engine.gateway.settings import Settings
from tokenmill.engine.gateway.upstream import Upstream

log = logging.getLogger("tokenmill.gateway")

#: The model list of a backend is asked for again after this many probes.
CATALOG_EVERY = 30
#: Seconds that a start waits for the models of backends that are up.
FIRST_LOOK_S = 1.0


class Prober:
    """Keeps the portfolio's view of each backend fresh.

    Args:
        portfolio: Whose targets are probed.
        upstream: The HTTP client.
        settings: Intervals.
    """

    def __init__(self, portfolio: Portfolio, upstream: Callable[[], Upstream], settings: Settings) -> None:
        self._portfolio = portfolio
        self._upstream = upstream
        self._settings = settings
        self._tasks: dict[Target, asyncio.Task[None]] = {}

    def start(self) -> None:
        """Starts a loop for each backend that has none and ends those of backends that are gone."""
        targets = set(self._portfolio.targets)
        for target in [target for target in self._tasks if target not in targets]:
            self._tasks.pop(target).cancel()
        for target in targets - set(self._tasks):
            self._tasks[target] = asyncio.get_running_loop().create_task(self._watch(target))

    async def first_look(self) -> None:
        """Waits, not long, for the models of backends that list them: requests would be refused that others serve."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FIRST_LOOK_S):
                while any(_is_awaited(target) for target in self._portfolio.targets):
                    await asyncio.sleep(0.005)

    async def stop(self) -> None:
        """Ends all loops."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        self._tasks.clear()

    async def _watch(self, target: Target) -> None:
        count = 0
        while True:
            before = target.up
            await self.probe(target, catalog=_wants_catalog(target, count))
            if target.up is not before:
                state = "up" if target.up else f"down ({target.reason})"
                log.info("backend %s is %s", target.backend.name, state)
            count += 1
            await asyncio.sleep(self._settings.probe_interval_s * random.uniform(0.9, 1.1))

    async def probe(self, target: Target, *, catalog: bool) -> None:
        """Asks one backend once; its model list too if `catalog` is set.

        Of Anthropic's the list is asked only where nothing else says which models it has: it says nothing more of them.
        """
        backend = target.backend
        headers = [(b"accept", b"application/json")]
        listing = "/v1/models"
        if backend.protocol == "anthropic":
            headers += [(b"anthropic-version", VERSION), (b"x-api-key", (backend.api_key or "").encode())]
            listing += "?limit=1000"  # the most; it lists a few without
        elif backend.api_key is not None:
            headers.append((b"authorization", b"Bearer " + backend.api_key.encode()))
        if backend.health_path is not None:
            status, _ = await self._get(target, backend.health_path, headers)
            if status is None:
                return
            if status >= 500:
                target.mark_down(f"{backend.health_path} answers {status}")
                return
            target.mark_up()
        if catalog and (backend.protocol == "openai" or not backend.models):
            status, body = await self._get(target, listing, headers)
            if status == 200:
                target.mark_up()
                with contextlib.suppress(_UnreadableError):
                    self._learn(target, _read_catalog(body))

    async def _get(self, target: Target, path: str, headers: Headers) -> tuple[int | None, bytes]:
        try:
            async with asyncio.timeout(self._settings.probe_timeout_s):
                answer = await self._upstream().send(b"GET", target.origin, path.encode(), headers)
                try:
                    return answer.status, await answer.read()
                finally:
                    answer.close()
        except ConnectFailedError as error:
            target.mark_down(str(error))
        except (NoAnswerError, CutError):
            target.mark_down("closed the connection without an answer")
        except TimeoutError:
            # A server that is busy computing may be late; it is down only when it has no request of ours to do.
            if not target.outstanding:
                target.mark_down(f"no answer within {self._settings.probe_timeout_s:g} s")
        return None, b""

    def _learn(self, target: Target, catalog: dict[str, dict[str, object]]) -> None:
        if catalog != target.catalog:
            target.catalog = catalog
            self._portfolio.index()


def _wants_catalog(target: Target, count: int) -> bool:
    """Whether a backend is asked for its models with its probe of this number.

    Each time, while nothing can be sent there without; some have no list, or not for our key, and must not be asked for
    ever for what only describes models that are known.
    """
    backend = target.backend
    waits = target.catalog is None and not backend.models
    return waits or count % CATALOG_EVERY == 0 or (backend.health_path is not None and not target.up)


def _is_awaited(target: Target) -> bool:
    """Whether its models are not known yet, and may be at any moment."""
    backend = target.backend
    return target.catalog is None and not backend.models and target.up is not False


class _UnreadableError(Exception):
    """A model list that is none."""


class _ModelList(msgspec.Struct):
    data: list[dict[str, object]]


def _read_catalog(body: bytes) -> dict[str, dict[str, object]]:
    try:
        listed = msgspec.convert(orjson.loads(body), _ModelList)
    except (orjson.JSONDecodeError, msgspec.ValidationError):
        raise _UnreadableError from None
    return {str(model["id"]): model for model in listed.data if model.get("id")}
