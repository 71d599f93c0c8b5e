"""vLLM with and without each of our hooks: same flags, servers up side by side, measured in turns.

In every round each server gets the same prompts; a ratio is taken within a round, and the median over the rounds
stands in the row. Idle servers wait for requests and use neither the GPU nor the cores.
"""

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenmill.bench import nvml
from tokenmill.bench.rows import SERVED, Row, RowFile, identity
from tokenmill.bench.serving.processes import Client, Server, ServingError
from tokenmill.bench.serving.workloads import Workload, write_prompts

#: What is not measured twice: the same, by the same sources.
GROUP = ("op", "source", *SERVED)
#: Names of vLLM's result and of ours; times in milliseconds.
_FIGURES = {
    "median_ttft_ms": "ttft_p50_ms",
    "p99_ttft_ms": "ttft_p99_ms",
    "median_tpot_ms": "tpot_p50_ms",
    "p99_tpot_ms": "tpot_p99_ms",
    "output_throughput": "output_tokens_per_second",
    "total_token_throughput": "total_tokens_per_second",
    "request_throughput": "requests_per_second",
    "request_goodput": "good_requests_per_second",
    "spec_decode_acceptance_rate": "accepted_percent",
    "spec_decode_acceptance_length": "tokens_per_step",
}
#: Where more is better, and where less is.
_MORE, _LESS = ("output_tokens_per_second",), ("ttft_p50_ms", "tpot_p50_ms")


@dataclass(frozen=True)
class Variant:
    """One server.

    Attributes:
        name: `stock`, a hook's name, ...
        model: Its checkpoint.
        hooks: The value of `TOKENMILL_HOOKS`.
        flags: Beyond those that all share.
        environment: Likewise.
    """

    name: str
    model: Path
    hooks: str
    flags: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """What is to be served.

    Attributes:
        model: In the rows: name, layers, weights.
        variants: Who is compared; see `base`.
        flags: Of `vllm serve`, for all.
        workloads: In this order.
        concurrencies: Requests in flight at once.
        waves: Requests of a run are so many times the concurrency, and four at least.
        rounds: Turns of each server.
        slo_ms: (time to first token, time per output token) of a good request.
        environment: For all servers.
    """

    model: str
    variants: tuple[Variant, ...]
    flags: tuple[str, ...]
    workloads: tuple[Workload, ...]
    concurrencies: tuple[int, ...]
    waves: int
    rounds: int
    slo_ms: tuple[float, float]
    environment: Mapping[str, str]


def compare(plan: Plan, facts: Row, out: RowFile, folder: Path, say: Callable[[str], None]) -> None:
    """Measures every group that `out` lacks and appends it.

    Args:
        plan: What is served.
        facts: Fields of every row.
        out: Where rows go.
        folder: For logs and prompts.
        say: Told about each row in one line.
    """
    groups = [_group(plan, facts, workload, at_once) for workload in plan.workloads for at_once in plan.concurrencies]
    done = {identity(row, GROUP) for row in out.rows}
    missing = [group for group in groups if identity(group, GROUP) not in done]
    if len(missing) < len(groups):
        say(f"{len(groups) - len(missing)} of {len(groups)} groups are in {out.path.name} already")
    if not missing:
        return
    servers: dict[str, Server] = {}
    refusals: dict[str, str] = {}
    client = Client(folder)
    try:
        for variant in plan.variants:  # one after the other: each takes its memory from what is free
            flags = (*plan.flags, *variant.flags)
            environment = {**plan.environment, **variant.environment}
            server = Server(variant.name, variant.model, flags, variant.hooks, folder, environment)
            servers[variant.name] = server
            try:
                server.wait()
                say(f"{variant.name}: ready")
            except ServingError as error:
                refusals[variant.name] = str(error)
                servers.pop(variant.name).close()
                say(f"{variant.name}: {error}")
        if not servers:
            raise ServingError(f"no server started: {'; '.join(refusals.values())}")
        workloads = {workload.name: workload for workload in plan.workloads}
        for group in missing:
            rows = _measure(plan, group, workloads[group["workload"]], servers, client, folder)
            at = {"time": rows[0]["time"]}
            rows += [{**group, **at, "variant": name, "skipped": reason} for name, reason in refusals.items()]
            out.append(rows)
            for row in rows:
                if "skipped" not in row:
                    say(line(row))
    finally:
        client.close()
        for server in servers.values():
            server.close()


def base(started: Sequence[Variant]) -> str:
    """What the others are compared with: the first without hooks, else the first."""
    return next((variant.name for variant in started if variant.hooks == "none"), started[0].name)


def _group(plan: Plan, facts: Row, workload: Workload, concurrency: int) -> Row:
    return {
        "op": "serve",
        **facts,
        "model": plan.model,
        "workload": workload.name,
        "shared_tokens": workload.shared,
        "own_tokens": workload.own,
        "output_tokens": workload.output,
        "concurrency": concurrency,
        "requests": max(4, plan.waves * concurrency),
        "rounds": plan.rounds,
        "slo_ttft_ms": plan.slo_ms[0],
        "slo_tpot_ms": plan.slo_ms[1],
        "engine_flags": " ".join(plan.flags),
    }


def _measure(
    plan: Plan, group: Row, workload: Workload, servers: Mapping[str, Server], client: Client, folder: Path
) -> list[Row]:
    gpu = nvml.device()
    tokenizer, prompts = plan.variants[0].model, folder / "prompts.jsonl"
    found: dict[str, list[dict[str, float]]] = {name: [] for name in servers}
    for turn in range(plan.rounds + 1):  # the first warms up and is not counted
        names = list(servers)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            write_prompts(prompts, workload, group["requests"], turn, tokenizer)
            before = None if gpu is None else gpu.joules()
            result = client.run(_client_flags(plan, group, servers[name].url, tokenizer, prompts))
            if turn:
                found[name].append(_figures(result, before, None if gpu is None else gpu.joules()))
    first = base([variant for variant in plan.variants if variant.name in servers])
    return [
        {
            **group,
            "load_average": round(os.getloadavg()[0], 2),
            "time": int(time.time()),
            "variant": variant.name,
            "hooks": servers[variant.name].hooks(),
            "variant_flags": " ".join(variant.flags),
            **_medians(found[variant.name]),
            "compared_with": first,
            **_ratios(found[variant.name], found[first]),
        }
        for variant in plan.variants
        if variant.name in servers
    ]


def _client_flags(plan: Plan, group: Row, url: str, tokenizer: Path, prompts: Path) -> list[str]:
    """Of `vllm bench serve`."""
    return [
        *("--backend", "openai", "--base-url", url, "--endpoint", "/v1/completions"),
        *("--model", "model", "--tokenizer", str(tokenizer)),
        *("--dataset-name", "custom", "--dataset-path", str(prompts), "--custom-output-len", "-1"),
        *("--skip-chat-template", "--disable-shuffle", "--disable-tqdm", "--ignore-eos", "--temperature", "0"),
        *("--num-prompts", str(group["requests"]), "--max-concurrency", str(group["concurrency"])),
        *("--percentile-metrics", "ttft,tpot", "--metric-percentiles", "50,99", "--num-warmups", "0"),
        *("--goodput", f"ttft:{plan.slo_ms[0]}", f"tpot:{plan.slo_ms[1]}"),
    ]


def _figures(result: Mapping[str, Any], before: float | None, after: float | None) -> dict[str, float]:
    """One run's figures by our names; energy where NVML counts it."""
    found = {ours: float(result[theirs]) for theirs, ours in _FIGURES.items() if result.get(theirs) is not None}
    if before is not None and after is not None and result["total_output_tokens"]:
        found["joules_per_output_token"] = (after - before) / result["total_output_tokens"]
    return found


def _medians(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: round(statistics.median(run[name] for run in runs), 4) for name in runs[0]}


def _ratios(runs: Sequence[Mapping[str, float]], stock: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """How many times better than the first variant, round by round."""
    pairs = list(zip(runs, stock, strict=True))
    found = {f"{name}_gain": statistics.median(ours[name] / other[name] for ours, other in pairs) for name in _MORE}
    found |= {f"{name}_gain": statistics.median(other[name] / ours[name] for ours, other in pairs) for name in _LESS}
    return {name: round(value, 4) for name, value in found.items()}


def line(row: Row) -> str:
    """One row for people."""
    return (
        f"{row['workload']:<13} {row['concurrency']:>3} at once  {row['variant']:<12} "
        f"TTFT {row['ttft_p50_ms']:>8.1f} ms ({row['ttft_p50_ms_gain']:.2f}x)  "
        f"TPOT {row['tpot_p50_ms']:>7.1f} ms ({row['tpot_p50_ms_gain']:.2f}x)  "
        f"{row['output_tokens_per_second']:>7.1f} tok/s ({row['output_tokens_per_second_gain']:.2f}x)"
        + (f"  accepted {row['accepted_percent']:.0f}%" if "accepted_percent" in row else "")
    )
