"""What the policy on sensitive data and the router cost a request of 32,768 characters, without any network.

    python -m tokenmill.bench.policies [--out ROWS.jsonl]

Times the four stages (search, route, narrow, guard) around a handler that answers at once: for prompts that are new,
that were seen, and that were seen and have grown. The last line is the longest turn of the event loop, in processor
time, that a prompt of 5 MB takes for itself.
"""

import argparse
import asyncio
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from tokenmill.bench.rows import Row, RowFile, facts
from tokenmill.engine.gateway.backends import Backend
from tokenmill.engine.gateway.body import Body
from tokenmill.engine.gateway.pipeline import Exchange, Handler, Reply, compose
from tokenmill.engine.gateway.portfolio import Portfolio
from tokenmill.engine.gateway.router.settings import RoutingSettings
from tokenmill.engine.gateway.router.stage import Router
from tokenmill.engine.gateway.sensitivity.settings import SensitivitySettings
from tokenmill.engine.gateway.sensitivity.stages import Guard, Residency, Sensitivity
from tokenmill.engine.gateway.settings import Settings
from tokenmill.engine.gateway.worker import spare_the_collector

#: Characters of a prompt.
LENGTH = 32_768
#: Prompts of each sort: of pages full of data the search remembers some forty (`scanner.MAX_FINDINGS`).
COUNT = 40
_WORDS = "please read this letter for the meeting at 12:30 in room 204 and list 3 open points about 40 chairs".split()  # noqa: SIM905


def handler() -> Handler:
    """The stages in front of three tiers, one of them in the cloud, and nobody behind."""
    tiers = (("utility", 0.6, "on-premises"), ("reasoning", 0.9, "on-premises"), ("frontier", 0.95, "cloud"))
    backends = [
        Backend(tier, f"http://127.0.0.1:{number}", tier, (f"{tier}-model",), quality=quality, zone=zone)  # type: ignore[arg-type]
        for number, (tier, quality, zone) in enumerate(tiers, 1)
    ]
    policy = SensitivitySettings({"contact": "redact"})

    def tell(_action: str, _subject: str, _details: object) -> None:
        pass

    async def answer(_exchange: Exchange) -> Reply:
        return Reply(200, body=b"{}")

    router = Router(Portfolio(backends, Settings()), RoutingSettings(), audit=tell)
    return compose([Sensitivity(policy, tell), router, Residency(policy, tell), Guard(tell)], answer)


def prose(dice: random.Random, length: int) -> str:
    """Words of a letter."""
    return " ".join(dice.choices(_WORDS, k=length // 3))[:length]


def _code(dice: random.Random) -> str:
    lines = (
        f"def f{dice.randint(0, 9999)}(a):\n    return a.get('token', {dice.random()})" for _ in range(LENGTH // 30)
    )
    return "\n".join(lines)[:LENGTH]


def _lines(line: Callable[[], str]) -> str:
    lines: list[str] = []
    while sum(map(len, lines)) < LENGTH:
        lines += [line() for _ in range(200)]
    return "\n".join(lines)[:LENGTH]


def _some(dice: random.Random, count: int) -> str:
    return "".join(dice.choices("0123456789", k=count))


def _fours(dice: random.Random, count: int) -> list[str]:
    return [_some(dice, 4) for _ in range(count)]


def _date(dice: random.Random) -> str:
    return f"2024-{dice.randint(1, 12):02d}-{dice.randint(1, 28):02d} {dice.randint(0, 23):02d}:00:12.345"


def _address(dice: random.Random) -> str:
    return ".".join(str(dice.randint(1, 255)) for _ in range(4))


SORTS: dict[str, Callable[[random.Random], str]] = {
    "prose": lambda dice: prose(dice, LENGTH),
    "prose with 20 addresses": lambda dice: "".join(
        f"{prose(dice, LENGTH // 21)} b{n}@example.com " for n in range(20)
    ),
    "numbers": lambda dice: " ".join(str(dice.randint(0, 10**9)) for _ in range(LENGTH // 8))[:LENGTH],
    "code": _code,
    "umlauts": lambda dice: prose(dice, LENGTH).replace("e", "ä"),
    "12 words": lambda dice: prose(dice, 60),
    "table": lambda dice: _lines(lambda: "\t".join(str(dice.randint(100, 9999)) for _ in range(6))),
    "log": lambda dice: _lines(lambda: f"{_date(dice)} {_address(dice)} GET /index/{dice.randint(0, 999)} 200"),
    "IP addresses": lambda dice: _lines(lambda: _address(dice)),
    "US SSNs": lambda dice: _lines(lambda: f"{_some(dice, 3)}-{_some(dice, 2)}-{_some(dice, 4)}"),
    "phones": lambda dice: _lines(lambda: f"+49 {dice.randint(100, 999)} {_some(dice, 7)}"),
    "phones of North America": lambda dice: _lines(
        lambda: f"+1 {dice.randint(200, 999)} {dice.randint(200, 999)} {_some(dice, 4)}"
    ),
    "16 digits in fours": lambda dice: _lines(lambda: " ".join(("4" + _some(dice, 3), *_fours(dice, 3)))),
    "11 digits": lambda dice: _lines(lambda: _some(dice, 11)),
}


def exchange(text: str) -> Exchange:
    """A chat with one message."""
    raw = msgspec.json.encode({"model": "auto", "messages": [{"role": "user", "content": text}]})
    return Exchange("/v1/chat/completions", [], raw, body=Body(raw), model="auto", request_id="r", forward=[])


async def _milliseconds(handle: Handler, text: str) -> float:
    asked = exchange(text)
    began = time.perf_counter()
    await handle(asked)
    spent = (time.perf_counter() - began) * 1e3
    asked.end()
    return spent


async def _longest_turn(handle: Handler) -> float:
    longest = 0.0

    async def watch() -> None:
        nonlocal longest
        while True:
            began = time.process_time()
            await asyncio.sleep(0)
            longest = max(longest, time.process_time() - began)

    asked = exchange("word " * 1_000_000)
    watcher = asyncio.ensure_future(watch())
    await asyncio.sleep(0)
    longest = 0.0
    await handle(asked)
    watcher.cancel()
    return longest * 1e3


async def run(about: Row) -> list[Row]:
    """Prints the table; the same as rows.

    Args:
        about: What stands in every row.
    """
    rows: list[Row] = []
    handle, dice = handler(), random.Random(1)
    spare_the_collector()
    print(f"{'milliseconds, medians':<26}{'new':>8}{'seen':>8}{'grown':>8}")
    for name, make in SORTS.items():
        texts = [make(dice) for _ in range(COUNT)]
        new = [await _milliseconds(handle, text) for text in texts]
        seen = [await _milliseconds(handle, text) for text in texts]
        grown = [await _milliseconds(handle, text + " and more") for text in texts]
        medians = {
            f"{when}_ms": round(statistics.median(times), 3)
            for when, times in (("new", new), ("seen", seen), ("grown", grown))
        }
        print(f"{name:<26}" + "".join(f"{median:8.2f}" for median in medians.values()))
        rows.append({**about, "prompt": name, "prompts": COUNT, **medians})
    turn_ms = await _longest_turn(handle)
    print(f"longest turn of the loop with 5 MB: {turn_ms:.1f} ms of processor time")
    return [*rows, {**about, "prompt": "5 MB", "prompts": 1, "longest_turn_ms": round(turn_ms, 3)}]


def main() -> None:
    """Measures, and appends the rows where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON lines are appended here")
    out = parser.parse_args().out
    command = ["python", "-m", "tokenmill.bench.policies", *(() if out is None else ("--out", out.name))]
    rows = asyncio.run(run({"op": "policies", "time": int(time.time()), **facts(command)}))
    if out is not None:
        RowFile(out).append(rows)


if __name__ == "__main__":
    main()
