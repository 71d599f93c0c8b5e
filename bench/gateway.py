"""What the gateway costs, against no gateway and against other gateways, interleaved in one run.

One process of each gateway stands on one core; load and a backend that answers at once share another. Every scenario
runs in rounds, each gateway after the other within a round; a row holds medians over the rounds.

    python -m tokenmill.bench.gateway --out bench/results/DEVICE/gateway.jsonl \\
        --vllm-router /path/to/vllm-router --litellm /path/to/litellm

`added` latencies are the gateway's minus direct's in the same rounds. Before the rounds each gateway is started alone
(`start`: until it answers a request); after them the governed one serves 100,000 requests and 20,000 streams that
their clients break off (`growth`: what its memory gained). With `--realtime` (needs the privilege) all
processes get a real-time priority, so that other work on the machine disturbs less; the kernel then stops them for
50 ms of each second that they fill a core, which shows in the p99 of scenarios that do.
"""

import argparse
import contextlib
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenmill.bench import http_load, rows
from tokenmill.engine.gateway.backends import Backend
from tokenmill.engine.gateway.database import Connection
from tokenmill.engine.gateway.governance import accounts, keys
from tokenmill.engine.gateway.governance.accounts import Limits
from tokenmill.engine.gateway.governance.options import Options, digest
from tokenmill.engine.gateway.governance.schema import SCHEMA
from tokenmill.engine.gateway.money import Prices, micro_cents
from tokenmill.engine.gateway.router.settings import RoutingSettings
from tokenmill.engine.gateway.settings import Document
from tokenmill.engine.gateway.store import Store

PROMPT = b'{"model":"tiny","messages":[{"role":"user","content":"%s"}],"max_tokens":50%s}'
STREAM = b',"stream":true'
#: Requests and broken streams of `growth`, and what of each comes before memory is looked at first.
GROWTH, GROWTH_ABORTED, WARM_UP = 100_000, 20_000, 0.1
#: Makes of a pid a process's clock (clock_getcpuclockid(3)): CPUCLOCK_SCHED in linux/posix-timers.h.
CPU_CLOCK = 2
#: What the backend's tokens cost; only the governed gateway asks.
PRICES = Prices(micro_cents(0.5), micro_cents(0.1), micro_cents(1.5))
DEARER = Prices(micro_cents(5), micro_cents(1), micro_cents(15))


@dataclass(frozen=True)
class Scenario:
    """One way of asking.

    Attributes:
        name: Its name in the rows.
        body: The request body.
        clients: Clients at once, each with one connection.
        once: Each client asks once.
        disturb: Size of the bodies that another client posts meanwhile; 0: it scrapes /metrics; None: nobody does.
    """

    name: str
    body: bytes
    clients: int
    once: bool = False
    disturb: int | None = None


SHORT = PROMPT % (b"hello " * 20, b"")
BURST = PROMPT % (b"hello " * 20, STREAM)
SPACED = PROMPT % (b"hello " * 20, STREAM + b',"user":"every %s"')
SCENARIOS = (
    Scenario("plain", SHORT, 1),
    Scenario("plain", SHORT, 32),
    Scenario("stream of 50 at once", BURST, 16),
    Scenario("stream of 50 every 10 ms", SPACED % b"0.01", 1),
    Scenario("1000 streams of 50 every 40 ms", SPACED % b"0.04", 1000, once=True),
    Scenario("prompt of 32k characters", PROMPT % (b"word " * 6400, b""), 8),
    Scenario("plain beside 5 MB prompts", SHORT, 1, disturb=5_000_000),
    Scenario("plain beside scrapes", SHORT, 1, disturb=0),
)


@dataclass
class Contender:
    """A running gateway, or the backend itself; `key` is what clients send it."""

    name: str
    port: int
    process: "subprocess.Popen[bytes] | None" = None
    key: str = "sk-bench"
    start_s: float = 0.0
    model: bytes = b"tiny"

    def request(self, body: bytes) -> bytes:
        """A scenario's request as this one takes it."""
        return http_load.request_bytes(self.port, body.replace(b'"tiny"', b'"%b"' % self.model, 1), self.key)

    def cpu_s(self) -> float:
        """Processor time of all its threads until now, ended ones included, in seconds."""
        if self.process is None:
            return 0.0
        return time.clock_gettime(~self.process.pid << 3 | CPU_CLOCK)

    def resident_mb(self) -> float:
        """Its resident memory, in MiB."""
        if self.process is None:
            return 0.0
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


class Stage:
    """Starts processes on their cores and ends them."""

    def __init__(self, realtime: bool) -> None:
        self.realtime = realtime
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, core: int, command: list[str], **options: Any) -> "subprocess.Popen[bytes]":
        """Starts a command on one core."""
        prefix = ["taskset", "-c", str(core), *(["chrt", "-r", "1"] if self.realtime else [])]
        process = subprocess.Popen([*prefix, *command], **options)
        self.processes.append(process)
        return process

    def close(self) -> None:
        """Ends them all."""
        for process in reversed(self.processes):
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
            process.wait()


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def wait_for(port: int, timeout_s: float = 120.0, key: str = "sk-bench", pause_s: float = 0.02) -> None:
    """Returns when chat completions on the port are answered with 200."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            seen = http_load.run_load(port, http_load.request_bytes(port, SHORT, key), 1, 60.0, limit=1)
            if seen.latencies_s and not seen.errors:
                return
        time.sleep(pause_s)
    raise SystemExit(f"nothing answers on port {port}")


def ours(
    stage: Stage, upstream: int, governance: Options | None = None, routing: RoutingSettings | None = None
) -> Contender:
    """Tokenmill's gateway, as its parent runs it."""
    with socket.create_server(("127.0.0.1", 0), backlog=4096) as listener:
        fd = listener.fileno()
        command = [sys.executable, "-m", "tokenmill.engine.gateway.worker", "--fd", str(fd)]
        process = stage.start(0, command, stdin=subprocess.PIPE, pass_fds=[fd])
        port = int(listener.getsockname()[1])
    assert process.stdin is not None
    url = f"http://127.0.0.1:{upstream}"
    backends = [Backend("upstream", url, "utility", prices=PRICES, quality=0.7)]
    if routing is not None:
        backends.append(Backend("better", url, "reasoning", prices=DEARER, quality=0.9))
    with process.stdin as stdin:
        stdin.write(Document(tuple(backends), governance=governance, routing=routing).to_json())
    return Contender("tokenmill", port, process)


def governed(stage: Stage, upstream: int, folder: str, routed: bool = False) -> Contender:
    """Tokenmill's gateway with keys, budgets, rate limits and ledger: a key in a team in an organisation.

    Args:
        stage: Starts it.
        upstream: The backend's port.
        folder: For its file.
        routed: It also chooses between two tiers by all criteria; otherwise requests name their model.
    """
    place = f"{folder}/{'routed' if routed else 'governed'}.db"
    options = Options(place, digest("a master key of the benchmark"))
    contender = ours(stage, upstream, options, RoutingSettings() if routed else None)
    limits = Limits(hard_limit=10**14, requests_per_minute=10**9, tokens_per_minute=10**12)
    store = Store(place, SCHEMA)

    def make(connection: Connection) -> str:
        above = accounts.create(connection, "organisation", "bench", None, limits, "bench")
        team = accounts.create(connection, "team", "bench", above, limits, "bench")
        return keys.create(connection, "bench", parent=team, limits=limits)[1]

    contender.key = store.write_now(make)
    store.close()
    contender.name = "tokenmill-governed"
    if routed:
        contender.name, contender.model = "tokenmill-routed", b"auto"
    return contender


def vllm_router(stage: Stage, upstream: int, program: str) -> Contender:
    """vLLM's own router, in Rust."""
    port = free_port()
    urls = ["--worker-urls", f"http://127.0.0.1:{upstream}", "--policy", "round_robin"]
    command = [program, "--host", "127.0.0.1", "--port", str(port), *urls, "--prometheus-port", str(free_port())]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return Contender("vllm-router", port, stage.start(0, [*command, "--log-level", "error"], **quiet))


def litellm(stage: Stage, upstream: int, program: str, folder: str) -> Contender:
    """LiteLLM's proxy with a master key and no database."""
    port = free_port()
    config = Path(folder) / "litellm.yaml"
    config.write_text(
        "model_list:\n  - model_name: tiny\n    litellm_params:\n      model: openai/tiny\n"
        f"      api_base: http://127.0.0.1:{upstream}/v1\n      api_key: none\n"
        "general_settings:\n  master_key: sk-bench\n"
    )
    environment = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR", "NO_DOCS": "True"}
    command = [program, "--config", str(config), "--host", "127.0.0.1", "--port", str(port), "--num_workers", "1"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return Contender("litellm", port, stage.start(0, command, env=environment, **quiet))


@contextlib.contextmanager
def disturbed(stage: Stage, scenario: Scenario, contender: Contender) -> Iterator[None]:
    """Another client does what the scenario says meanwhile; never at real-time priority."""
    if scenario.disturb is None:
        yield
        return
    command = [sys.executable, "-m", "tokenmill.bench.http_load", "disturb", "--port", str(contender.port)]
    command += ["--key", contender.key]
    normal = Stage(realtime=False)
    normal.start(1, [*(["chrt", "-o", "0"] if stage.realtime else []), *command, "--size", str(scenario.disturb)])
    time.sleep(0.7)
    try:
        yield
    finally:
        normal.close()


def measure(stage: Stage, scenario: Scenario, contender: Contender, seconds: float) -> dict[str, float]:
    """One run of one scenario against one contender."""
    request = contender.request(scenario.body)
    with disturbed(stage, scenario, contender):
        before = contender.cpu_s()
        limit, seconds = (1, 600.0) if scenario.once else (sys.maxsize, seconds)
        seen = http_load.run_load(contender.port, request, scenario.clients, seconds, limit)
        spent = contender.cpu_s() - before
    latencies, first = sorted(seen.latencies_s), sorted(seen.first_s)
    count = len(latencies)
    return {
        "requests_per_s": seen.per_second,
        "p50_ms": latencies[count // 2] * 1e3,
        "p99_ms": latencies[int(count * 0.99)] * 1e3,
        "max_ms": latencies[-1] * 1e3,
        "first_byte_p50_ms": first[count // 2] * 1e3,
        "elapsed_s": seen.elapsed_s,
        "cpu_us_per_request": spent / count * 1e6,
        "errors": seen.errors,
        "resident_mb": contender.resident_mb(),
    }


def growth(contender: Contender, scale: float) -> dict[str, float]:
    """What its memory gains over many requests and streams that their clients break off.

    Args:
        contender: A gateway.
        scale: Share of the full number of requests.
    """

    def spend(share: float) -> float:
        begun = time.monotonic()
        plain, stream = contender.request(SHORT), contender.request(SPACED % b"0.01")
        clients = 32
        seen = http_load.run_load(contender.port, plain, clients, 3600.0, int(GROWTH * share) // clients)
        http_load.run_abort(contender.port, stream, clients, int(GROWTH_ABORTED * share))
        if seen.errors:
            raise SystemExit(f"{seen.errors} requests failed")
        return time.monotonic() - begun

    spend(scale * WARM_UP)
    before = contender.resident_mb()
    elapsed = spend(scale)
    after = contender.resident_mb()
    return {"resident_mb_before": before, "resident_mb": after, "growth_mb": after - before, "elapsed_s": elapsed}


def summarise(
    runs: dict[str, list[dict[str, float]]], scenario: Scenario, facts: dict[str, Any]
) -> list[dict[str, Any]]:
    """Medians over the rounds, with what each contender adds to direct."""
    medians = {
        name: {key: statistics.median(run[key] for run in rounds) for key in rounds[0]} for name, rounds in runs.items()
    }
    direct = medians["direct"]
    made = []
    for name, median in medians.items():
        row = {"op": "gateway", "scenario": scenario.name, "clients": scenario.clients, "implementation": name}
        row.update((key, round(value, 3)) for key, value in median.items())
        for key in ("p50_ms", "p99_ms", "first_byte_p50_ms"):
            row[f"added_{key}"] = round(median[key] - direct[key], 3)
        row["share_of_direct"] = round(median["requests_per_s"] / direct["requests_per_s"], 4)
        made.append({**row, **facts})
    return made


def facts(options: argparse.Namespace, arguments: Sequence[str]) -> rows.Row:
    """What a reader needs to judge a row, the rivals' versions included."""
    command = ["python", "-m", "tokenmill.bench.gateway", *arguments]
    about = rows.facts(command, sources=("engine/gateway", "bench", "tokenmill"))
    programs = {"vllm-router": options.vllm_router, "litellm": options.litellm}
    about["versions"] |= {name: version_beside(path, name) for name, path in programs.items() if path}
    return {**about, "realtime": options.realtime, "rounds": options.rounds, "seconds": options.seconds}


def load_average() -> dict[str, float]:
    """How busy the machine is now, the benchmark itself included."""
    return {"load_average": round(os.getloadavg()[0], 2)}


def version_beside(program: str, distribution: str) -> str:
    """The version of a distribution in the environment that a program of it lies in."""
    ask = f"from importlib.metadata import version; print(version({distribution!r}))"
    interpreter = Path(program).absolute().with_name("python")
    answer = subprocess.run([str(interpreter), "-c", ask], capture_output=True, text=True, check=False)
    return answer.stdout.strip() or "unknown"


def main(arguments: list[str] | None = None) -> int:
    """Runs the comparison, prints a table and appends the rows to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON lines are appended here")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="length of one run")
    parser.add_argument("--realtime", action="store_true", help="real-time priority for everything")
    parser.add_argument("--vllm-router", help="its program, in an environment of its own")
    parser.add_argument("--litellm", help="its program, in an environment of its own")
    parser.add_argument("--only", help="run only scenarios whose name holds this; `start` and `growth` are two of them")
    parser.add_argument("--growth-scale", type=float, default=1.0, help="share of the requests of `growth`")
    options = parser.parse_args(arguments)

    stage = Stage(options.realtime)
    os.sched_setaffinity(0, {1})
    if options.realtime:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    known = facts(options, sys.argv[1:] if arguments is None else arguments)
    out = None if options.out is None else rows.RowFile(options.out)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        stack.callback(stage.close)
        upstream = free_port()
        stage.start(1, [sys.executable, "-m", "tokenmill.bench.http_load", "upstream", "--port", str(upstream)])
        wait_for(upstream)
        starters: list[Callable[[], Contender]] = [
            lambda: Contender("direct", upstream),
            lambda: ours(stage, upstream),
            lambda: governed(stage, upstream, folder),
            lambda: governed(stage, upstream, folder, routed=True),
        ]
        if options.vllm_router:
            starters.append(lambda: vllm_router(stage, upstream, options.vllm_router))
        if options.litellm:
            starters.append(lambda: litellm(stage, upstream, options.litellm, folder))
        contenders = [started(start) for start in starters]
        if options.only is None or options.only in "start":
            report_starts(contenders[1:], known, out)
        for scenario in SCENARIOS:
            if options.only and options.only not in scenario.name:
                continue
            runs: dict[str, list[dict[str, float]]] = {contender.name: [] for contender in contenders}
            for _ in range(options.rounds):
                for contender in contenders:
                    runs[contender.name].append(measure(stage, scenario, contender, options.seconds))
            report(summarise(runs, scenario, {**known, **load_average()}), out)
        if options.only is None or options.only in "growth":
            report_growth(contenders[2], options.growth_scale, known, out)
    return 0


def started(start: Callable[[], Contender]) -> Contender:
    """Starts a gateway and waits until it answers."""
    begun = time.monotonic()
    contender = start()
    wait_for(contender.port, key=contender.key)
    contender.start_s = time.monotonic() - begun
    return contender


def report_starts(contenders: Sequence[Contender], known: rows.Row, out: rows.RowFile | None) -> None:
    """How long each gateway took from its process's start to its first answer."""
    for contender in contenders:
        row = {"op": "gateway-start", "scenario": "start", "clients": 1, "implementation": contender.name}
        row |= {"elapsed_s": round(contender.start_s, 3), "resident_mb": round(contender.resident_mb(), 3)}
        print(f"start {contender.name:<18} {contender.start_s:.2f} s {contender.resident_mb():.0f} MiB", flush=True)
        if out is not None:
            out.append([{**row, **known, **load_average()}])


def report_growth(contender: Contender, scale: float, known: rows.Row, out: rows.RowFile | None) -> None:
    """Runs `growth` and says what came out."""
    found = {name: round(value, 3) for name, value in growth(contender, scale).items()}
    counts = {"requests": int(GROWTH * scale), "aborted_streams": int(GROWTH_ABORTED * scale)}
    print(f"growth {contender.name} {counts} {found}", flush=True)
    if out is not None:
        row = {"op": "gateway-growth", "scenario": "growth", "clients": 32, "implementation": contender.name}
        out.append([{**row, **counts, **found, **known, **load_average()}])


def report(made: list[dict[str, Any]], out: rows.RowFile | None) -> None:
    """Prints the rows and appends them to the file."""
    for row in made:
        print(
            f"{row['scenario']:<30} {row['clients']:>4} {row['implementation']:<18} {row['requests_per_s']:>7.0f}/s "
            f"p50 {row['p50_ms']:>8.3f} (+{row['added_p50_ms']:.3f}) p99 {row['p99_ms']:>8.3f} "
            f"max {row['max_ms']:>8.3f} ms cpu {row['cpu_us_per_request']:>6.0f} us {row['resident_mb']:>4.0f} MiB "
            f"{row['elapsed_s']:>6.2f} s errors {row['errors']:.0f}",
            flush=True,
        )
    if out is not None:
        out.append(made)


if __name__ == "__main__":
    raise SystemExit(main())
