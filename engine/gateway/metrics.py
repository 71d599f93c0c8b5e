"""Prometheus metrics of the gateway, and the stage that counts.

Labels are bounded: endpoints are those of the API (others are `other`), tiers and backends those of the
configuration, teams and apps the first ones met (others are `other`), by whichever worker. With several workers,
`/metrics` has the sums of all of them.
"""

import asyncio
import os
import time
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

from tokenmill.engine.gateway.observability import engines, gpus, snapshot
from tokenmill.engine.gateway.observability.bounded import Bounded
from tokenmill.engine.gateway.observability.consumption import Consumption
from tokenmill.engine.gateway.observability.decisions import Decisions, was_escalated
from tokenmill.engine.gateway.observability.options import Options
from tokenmill.engine.gateway.observability.shared import Board, Report, Scrape
from tokenmill.engine.gateway.observability.tally import Histogram, Tally
from tokenmill.engine.gateway.pipeline import Exchange, Handler, Reply
from tokenmill.engine.gateway.portfolio import Portfolio, Target

CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"
#: Rendering takes milliseconds: answers younger than this are given again.
RENDERING_KEPT_S = 0.5

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_SECONDS_PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1)
#: Teams and apps are many: fewer bounds.
_OWNED_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_OWNED_SECONDS_PER_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25)
_ENDPOINTS = frozenset(
    f"/v1/{name}" for name in ("chat/completions", "completions", "embeddings", "rerank", "score", "responses")
)


class Metrics:
    """All metrics of one gateway process; a service, which exchanges them with the other workers.

    Args:
        portfolio: The backends.
        options: Bounds, and where the workers meet.
        servers: Asks the vLLM servers about themselves when somebody asks for the metrics; None: nobody does.

    Attributes:
        open: Requests that have not ended.
        for_all: Whether `/metrics` answers everybody.
        board: The figures of all workers.
    """

    def __init__(
        self, portfolio: Portfolio, options: Options | None = None, servers: engines.Engines | None = None
    ) -> None:
        options = options or Options()
        self._portfolio = portfolio
        self._servers = servers
        self.for_all = options.open_metrics
        shared = Path(options.shared) if options.shared else None
        self._teams, self._apps = (
            Bounded(options.accounts, shared and shared / f"{kind}.names") for kind in ("team", "app")
        )
        self._decisions = Decisions()
        self.board = Board(shared, self.report)
        where = ("tier", "backend")
        whose = ("team", "app", "tier")
        self._requests = Tally(
            "tokenmill_requests",
            "Requests to models by how they ended.",
            ("endpoint", *where, "status", "outcome"),
        )
        self._duration = Histogram(
            "tokenmill_request_duration_seconds",
            "From a request's head to the last byte of its reply.",
            where,
            _SECONDS,
        )
        self._first_token = Histogram(
            "tokenmill_time_to_first_token_seconds",
            "From a request's head to the first byte of a streamed reply.",
            where,
            _SECONDS,
        )
        self._per_token = Histogram(
            "tokenmill_time_per_output_token_seconds",
            "Time between the output tokens of a streamed reply, its mean.",
            where,
            _SECONDS_PER_TOKEN,
        )
        self._owned_requests = Tally("tokenmill_account_requests", "Requests to models by who asked.", whose)
        self._owned_first_token = Histogram(
            "tokenmill_account_time_to_first_token_seconds",
            "From a request's head to the first byte of a streamed reply, by who asked.",
            whose,
            _OWNED_SECONDS,
        )
        self._owned_per_token = Histogram(
            "tokenmill_account_time_per_output_token_seconds",
            "Time between the output tokens of a streamed reply, its mean, by who asked.",
            whose,
            _OWNED_SECONDS_PER_TOKEN,
        )
        self._escalations = Tally(
            "tokenmill_escalations",
            "Answers that were not confident enough and were asked of another tier.",
            ("tier", "to"),
        )
        self._consumption = Consumption()
        self._outstanding = Tally("tokenmill_outstanding_requests", "Requests open at a backend.", where, "gauge")
        self._up = Tally("tokenmill_backend_up", "1 when a backend is up.", where, "gauge")
        self.open = 0
        self._open = Tally("tokenmill_open_requests", "Requests that have not ended.", kind="gauge")
        self._all: tuple[Tally | Histogram, ...] = (
            self._requests,
            self._duration,
            self._first_token,
            self._per_token,
            self._owned_requests,
            self._owned_first_token,
            self._owned_per_token,
            self._escalations,
            self._outstanding,
            self._up,
            self._open,
        )
        self._rendering: asyncio.Task[bytes] | None = None

    def refuse(self, endpoint: str, status: int) -> None:
        """Counts a request that was refused before it was known what it asks for, e.g. for a body that is no JSON."""
        self._requests.add((_shown(endpoint), "", "", str(status), "refused"))

    def count(self, exchange: Exchange) -> None:
        """Counts a request that has ended."""
        self.open -= 1
        target = exchange.target
        tier, backend = where = (target.backend.tier, target.backend.name) if target else ("", "")
        self._requests.add((_shown(exchange.endpoint), tier, backend, str(exchange.status), exchange.outcome))
        principal = exchange.principal
        team = self._teams.name(principal.team) if principal else ""
        app = self._apps.name(principal.app) if principal else ""
        self._owned_requests.add(whose := (team, app, tier))
        if target is None:
            return
        self._duration.observe(where, exchange.seconds)
        self._consumption.count(team, app, exchange)
        if exchange.first_chunk_at:
            waited = exchange.first_chunk_at - exchange.started
            self._first_token.observe(where, waited)
            self._owned_first_token.observe(whose, waited)
            # Other calls' tokens were none of the stream that the client got.
            completion = exchange.answering.usage.completion if exchange.answering is not None else 0
            if completion > 1:
                mean = (exchange.last_chunk_at - exchange.first_chunk_at) / (completion - 1)
                self._per_token.observe(where, mean)
                self._owned_per_token.observe(whose, mean)
        if exchange.decision is not None:
            if was_escalated(exchange):
                self._escalations.add((exchange.decision.tier, tier))
            self._decisions.note(exchange)

    async def start(self) -> None:
        """Begins to tell the other workers."""
        await self.board.start()

    async def stop(self) -> None:
        """Tells them the last."""
        await self.board.stop()

    def report(self) -> Report:
        """What this worker has to tell; may be called in a thread."""
        self._open.set((), self.open)
        targets = self._portfolio.targets
        for target in targets:
            where = (target.backend.tier, target.backend.name)
            self._outstanding.set(where, target.outstanding)
            self._up.set(where, 1 if target.ready else 0)
        told = [*(one.family() for one in self._all), *self._consumption.families()]
        families = [snapshot.summable(family) for family in told]
        return Report(os.getpid(), families, self._decisions.latest(), [_state(target) for target in targets])

    async def _render(self) -> bytes:
        async with self.board.turn():
            last = await asyncio.to_thread(self.board.published)
            if last is not None and time.monotonic() - last.at < RENDERING_KEPT_S:
                return last.text
            asked = engines.Answers() if last is None else last.engines
            if self._servers is not None:
                asked = await self._servers.now(asked)
            return await asyncio.to_thread(self._tell, asked)

    def _tell(self, asked: engines.Answers) -> bytes:
        self.board.fold()
        text = self._text(asked.engines)
        self.board.publish(Scrape(time.monotonic(), text, asked))
        return text

    def _text(self, servers: list[engines.Engine]) -> bytes:
        """The sums of all workers, then what each of them would say the same of: vLLM and this machine's GPUs."""
        seen = self.board.everybody()
        sums = snapshot.total([one.report.families for one in seen], [one.lives for one in seen])
        return snapshot.text([*sums, *engines.families(servers), *gpus.families(gpus.gpus())])

    async def render(self) -> bytes:
        """The text for a scrape, made in a thread; scrapes at the same time share one rendering."""
        if self._rendering is None:
            self._rendering = asyncio.create_task(self._render())
            self._rendering.add_done_callback(self._done)
        return await asyncio.shield(self._rendering)

    def _done(self, _rendering: asyncio.Task[bytes]) -> None:
        self._rendering = None


def _shown(endpoint: str) -> str:
    return endpoint if endpoint in _ENDPOINTS else "other"


def _state(target: Target) -> dict[str, Any]:
    """A backend as this worker sees it."""
    backend = target.backend
    return {
        "name": backend.name,
        "tier": backend.tier,
        "up": target.ready,
        "reason": target.reason,
        "zone": backend.zone,
        "region": backend.region or "",
        "version": backend.version or "",
        "protocol": backend.protocol,
        "outstanding": target.outstanding,
        "canary": target.canary,
        "models": list(target.models)[:20],
        "open_circuits": target.open_circuits(),
    }


class MetricsStage:
    """Counts every request when it has ended."""

    name = "metrics"

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def handle(self, exchange: Exchange, proceed: Handler) -> Awaitable[Reply]:
        """See `pipeline.Stage`."""
        self._metrics.open += 1
        exchange.on_end(self._metrics.count)
        return proceed(exchange)
