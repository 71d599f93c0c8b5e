"""Figures of several processes: sums that never go down, bounded labels, quantiles, and what engines and GPUs say."""

import asyncio
import ctypes
import errno
import math
import shutil
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import prometheus_client
import pytest
from prometheus_client import CollectorRegistry

from tokenmill.engine.gateway import metrics
from tokenmill.engine.gateway.backends import Backend
from tokenmill.engine.gateway.money import MICRO_CENTS_PER_DOLLAR, Prices
from tokenmill.engine.gateway.observability import engines, gpus, shared, snapshot
from tokenmill.engine.gateway.observability.bounded import OTHER, Bounded
from tokenmill.engine.gateway.observability.consumption import Consumption
from tokenmill.engine.gateway.observability.quantiles import quantiles
from tokenmill.engine.gateway.observability.shared import Board, Report
from tokenmill.engine.gateway.observability.snapshot import Family
from tokenmill.engine.gateway.observability.tally import Histogram, Tally
from tokenmill.engine.gateway.pipeline import Call, Exchange, Usage
from tokenmill.engine.gateway.portfolio import Portfolio, Target
from tokenmill.engine.gateway.settings import Settings


def figures(count: float, open_now: float, times: tuple[float, ...] = ()) -> list[Family]:
    """What a process with these values tells."""
    asked = Tally("asked", "Text.", ("tier",))
    asked.add(('a"b\\c',), count)
    now, up = (Tally(name, "Text.", kind="gauge") for name in ("open", "backend_up"))
    now.set((), open_now)
    up.set((), open_now > 0)
    took = Histogram("took", "Text.", ("tier",), (1, 2, 4))
    for time in times:
        took.observe(("a",), time)
    return [one.family() for one in (asked, now, up, took)]


def test_text_is_that_of_prometheus_own_client() -> None:
    registry = CollectorRegistry()
    theirs = prometheus_client.Counter("asked", "Text.", ("tier", "to"), registry=registry)
    times = prometheus_client.Histogram("took", "Text.", ("tier",), registry=registry, buckets=(0.005, 1, 2.5))
    prometheus_client.Counter("never", "Text.", ("tier",), registry=registry)
    prometheus_client.Gauge("now", "Text.", registry=registry).set(3)
    asked, never, now = (
        Tally("asked", "Text.", ("tier", "to")),
        Tally("never", "Text.", ("tier",)),
        Tally("now", "Text.", kind="gauge"),
    )
    took = Histogram("took", "Text.", ("tier",), (0.005, 1, 2.5))
    now.set((), 3)
    for tier, to, amount in (("a", "b", 1.0), ("a", 'c"', 2.5), ("a", "b", 4.0)):
        theirs.labels(tier, to).inc(amount)
        asked.add((tier, to), amount)
    for figure in (0.001, 0.005, 0.0051, 1.0, 2.0, 7.0):
        times.labels("a").observe(figure)
        took.observe(("a",), figure)
    ours = snapshot.text([one.family() for one in (asked, took, never, now)]).decode().splitlines()
    # When a series began is not told here.
    expected = [
        line for line in prometheus_client.generate_latest(registry).decode().splitlines() if "_created" not in line
    ]
    assert ours == expected


def test_sums_keep_counts_of_the_dead_and_drop_their_gauges() -> None:
    text = snapshot.text(snapshot.total([figures(2, 3), figures(5, 7), figures(1, 100)], [True, True, False])).decode()
    assert 'asked_total{tier="a\\"b\\\\c"} 8.0' in text
    assert "\nopen 10.0" in text
    assert "\nbackend_up 1.0" in text
    assert "# TYPE asked_total counter" in text or "# TYPE asked counter" in text


def test_the_last_report_of_a_worker_stays_the_last(tmp_path: Path) -> None:
    begun, go = threading.Event(), threading.Event()
    told = 0.0

    def report() -> Report:
        nonlocal told
        told += 1
        family = Family("asked", "Text.", "counter", (), [((), [told])])
        if told == 1:
            begun.set()
            go.wait(20)
        return Report(1, [family])

    async def live() -> None:
        board = Board(tmp_path, report)
        await board.start()
        await asyncio.to_thread(begun.wait, 20)
        stopping = asyncio.create_task(board.stop())
        await asyncio.wait([stopping], timeout=0.2)  # it waits for the thread that is still at the one before
        go.set()
        await stopping
        await asyncio.get_running_loop().shutdown_default_executor()

    asyncio.run(live())
    others = Board(tmp_path, lambda: Report(2, [])).everybody()
    ((seen,),) = [one.report.families for one in others if one.report.pid == 1]
    assert seen.series == [((), [2.0])]


def test_figures_that_cannot_be_written_are_one_line_and_are_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(shared, "INTERVAL_S", 0.01)
    there_is_room = threading.Event()
    tries = 0

    def report() -> Report:
        nonlocal tries
        tries += 1
        if tries < 8:
            raise OSError(errno.ENOSPC, "no space left on device")
        there_is_room.set()
        return Report(1, [])

    async def live() -> None:
        board = Board(tmp_path, report)
        await board.start()
        await asyncio.to_thread(there_is_room.wait, 20)
        await board.stop()

    asyncio.run(live())
    assert len([record for record in caplog.records if "could not be written" in record.message]) == 1
    assert len(list(tmp_path.glob("*.report"))) == 1


def test_a_folder_that_is_gone_stops_no_worker(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def live() -> None:
        board = Board(tmp_path / "figures", lambda: Report(1, []))
        await board.start()
        shutil.rmtree(tmp_path / "figures")
        await board.stop()

    asyncio.run(live())
    assert [record.exc_info for record in caplog.records if "could not be written" in record.message] == [None]


def test_quantiles_agree_with_the_observations() -> None:
    times = tuple(0.01 * step for step in range(1, 101))
    both = snapshot.total([figures(0, 0, times), figures(0, 0, (3.0,) * 100)], [True, True])
    ((half, high),) = quantiles(both, "took", "tier", (0.25, 0.75)).values()
    assert half == pytest.approx(0.5, abs=0.01)
    assert 2 < high < 4
    beyond = snapshot.total([figures(0, 0, (100.0,))], [True])
    assert quantiles(beyond, "took", "tier", (0.5,)) == {"a": [4.0]}
    assert quantiles(both, "other", "tier", (0.5,)) == {}
    assert not math.isnan(half)


def test_labels_are_bounded() -> None:
    names = Bounded(2)
    assert [names.name(name) for name in ("a", "b", "c", "a", None)] == ["a", "b", "other", "a", ""]
    assert Bounded(0).name("a") == "other"


def test_workers_agree_on_the_names(tmp_path: Path) -> None:
    path = tmp_path / "names"
    first, second = Bounded(3, path), Bounded(3, path)
    odd = 'two\nlines "x" \ud800'
    assert [first.name(odd), second.name("b"), first.name("c")] == [odd, "b", "c"]
    # Each calls by its name what the other met, and nothing more.
    assert [second.name(name) for name in ("d", odd, "c", "b")] == ["other", odd, "c", "b"]
    assert [first.name(name) for name in ("d", "b")] == ["other", "b"]
    # One that starts later finds the names; so does one whose neighbour was killed while it wrote.
    written = path.read_bytes()
    path.write_bytes(written + b'"d')
    assert [Bounded(4, path).name(name) for name in ("d", "c", "e")] == ["d", "c", "other"]
    assert [Bounded(4, path).name(name) for name in ("e", "d")] == ["other", "d"]


def test_workers_agree_when_they_meet_names_at_once(tmp_path: Path) -> None:
    path = tmp_path / "names"
    names = [Bounded(5, path) for _ in range(4)]

    def meet(number: int) -> set[str]:
        return {names[number].name(f"{(number * 7 + index) % 20}") for index in range(20)} - {OTHER}

    with ThreadPoolExecutor(4) as workers:
        found = list(workers.map(meet, range(4)))
    assert len(found[0]) == 5
    assert found == [found[0]] * 4


def test_without_a_place_to_agree_nothing_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = Bounded(3, tmp_path / "missing" / "names")
    assert [names.name(name) for name in ("a", "b", "a")] == ["other"] * 3
    assert len(caplog.records) == 1


def test_reports_are_exchanged_and_outlive_their_workers(tmp_path: Path) -> None:
    async def run() -> None:
        first = Board(tmp_path / "board", lambda: Report(1, figures(1, 1)))
        second = Board(tmp_path / "board", lambda: Report(2, figures(2, 1), [{"at": 5}]))
        await first.start()
        await second.start()
        for _ in range(200):
            if len(first.everybody()) == 2:
                break
            await asyncio.sleep(0.02)
        assert sorted((one.report.pid, one.lives) for one in first.everybody()) == [(1, True), (2, True)]
        await second.stop()
        assert sorted((one.report.pid, one.lives) for one in first.everybody()) == [(1, True), (2, False)]
        (tmp_path / "board" / "broken.report").write_bytes(b"\xc1 not a report")
        assert len(first.everybody()) == 2
        await first.stop()

    asyncio.run(run())


VLLM = b"""# HELP vllm:num_requests_running Number
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 1.0
vllm:num_requests_waiting{engine="0",model_name="m"} 2.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="m} 7"} 0.75
vllm:num_requests_waiting_by_reason{engine="0",model_name="m",reason="capacity"} 9.0
vllm:num_requests_running_created{engine="0",model_name="m"} 9.0
vllm:prefix_cache_queries_total{engine="0",model_name="m"} 200.0
vllm:prefix_cache_hits_total{engine="0",model_name="m"} 50.0
vllm:prefix_cache_hits_created{engine="0",model_name="m"} 1.7e9
vllm:spec_decode_num_draft_tokens_total{engine="0",model_name="m"} 0.0
"""


def test_vllms_page_is_read() -> None:
    found = engines.read("e", "utility", VLLM)
    assert found == engines.Engine("e", "utility", 4, 2, 0.5, 200, 50, 0, None)
    assert (found.cache_hits, found.accepted) == (0.25, None)
    for page in (b"other_metric 1\n", b"vllm:num_requests_running nonsense\n", b"vllm:num_requests_running NaN\n"):
        assert engines.read("e", "utility", page) is None
    # One server's nonsense is not to take everybody's metrics away.
    for number in (b"1e308", b"-1", b"inf"):
        page = b"vllm:num_requests_running %b\n" % number
        assert engines.read("e", "utility", 2 * page) is None


def test_what_an_engine_does_not_tell_has_no_series() -> None:
    told = engines.read("e", "utility", VLLM)
    silent = engines.read("f", "code", b"vllm:num_requests_running 1\n")
    assert told is not None and silent is not None
    lines = snapshot.text(engines.families([told, silent])).decode().splitlines()
    assert [line for line in lines if not line.startswith("#")] == [
        'tokenmill_engine_running_requests{backend="e",tier="utility"} 4.0',
        'tokenmill_engine_running_requests{backend="f",tier="code"} 1.0',
        'tokenmill_engine_waiting_requests{backend="e",tier="utility"} 2.0',
        'tokenmill_engine_kv_cache_usage_ratio{backend="e",tier="utility"} 0.5',
        'tokenmill_engine_prefix_cache_query_tokens_total{backend="e",tier="utility"} 200.0',
        'tokenmill_engine_prefix_cache_hit_tokens_total{backend="e",tier="utility"} 50.0',
        'tokenmill_engine_draft_tokens_total{backend="e",tier="utility"} 0.0',
    ]


def test_sums_are_the_same_in_whatever_order() -> None:
    took = Histogram("took", "Text.", (), (1.0,))
    told = []
    for figure in (0.1, 0.2, 0.3, 1e6 / 7, 12345.678901):
        took.observe((), figure)
        told.append([snapshot.summable(took.family())])
    cost = Family("cost_dollars", "Text.", "counter", ("team",), [(("a",), [22_000.0])], parts=100_000_000)
    assert b'cost_dollars_total{team="a"} 0.00022\n' in snapshot.text([cost])
    lives = [True] * len(told)
    once = snapshot.total(told, lives)
    for turned in range(len(told)):
        order = told[turned:] + told[:turned]
        assert snapshot.total(order, lives) == once
        folded = snapshot.total(order[2:], lives[2:])
        assert snapshot.total([folded, *order[:2]], lives[:3]) == once


def test_reports_of_many_that_have_ended_become_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "MOST_ENDED", 2)

    async def live(board: Board) -> None:
        await board.start()
        await board.stop()

    def sums() -> list[str]:
        seen = last.everybody()
        whole = snapshot.total([one.report.families for one in seen], [one.lives for one in seen])
        return sorted(snapshot.text(whole).decode().splitlines())

    last = Board(tmp_path, lambda: Report(0, figures(100, 1)))
    for number in range(1, 6):
        asyncio.run(live(Board(tmp_path, partial(Report, number, figures(number, 1)))))
        before = sums()
        kept = {path: path.read_bytes() for path in tmp_path.glob("*.report")}
        last.fold()
        assert sums() == before
        assert f'asked_total{{tier="a\\"b\\\\c"}} {100 + number * (number + 1) / 2}' in before
        # One that stopped in the middle of it had not removed them yet.
        for path, report in kept.items():
            if path.stem in next((one.report.of for one in last.everybody() if one.report.of), ()):
                path.write_bytes(report)
        assert sums() == before
    assert len(list(tmp_path.glob("*.report"))) <= 5


#: A driver's library as far as it is asked, in C: what a machine without a GPU cannot give.
NVML = r"""
#include <string.h>
int nvmlInit_v2(void) { return 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 2; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) { *handle = (void *)(long)(index + 1); return 0; }
int nvmlDeviceGetName(void *handle, char *name, unsigned length) { strncpy(name, "Test GPU", length); return 0; }
int nvmlDeviceGetUtilizationRates(void *handle, unsigned *rates) {
    rates[0] = 40; rates[1] = 7;
    return handle == (void *)1L;
}
int nvmlDeviceGetMemoryInfo(void *handle, unsigned long long *m) { m[0] = 80; m[1] = 30; m[2] = 50; return 0; }
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_gpus_are_read_from_the_drivers_library(tmp_path: Path) -> None:
    source, library = tmp_path / "nvml.c", tmp_path / "libnvml.so"
    source.write_text(NVML, encoding="utf-8")
    subprocess.run(["cc", "-shared", "-fPIC", "-w", "-o", library, source], check=True)
    # The first device refuses to say how busy it is and is left out.
    found = gpus.gpus(str(library))
    assert found == [gpus.Gpu(1, "Test GPU", 0.4, 50, 80)]
    lines = snapshot.text(gpus.families(found)).decode().splitlines()
    assert [line for line in lines if not line.startswith("#")] == [
        'tokenmill_gpu_utilization_ratio{gpu="1",name="Test GPU"} 0.4',
        'tokenmill_gpu_memory_used_bytes{gpu="1",name="Test GPU"} 50.0',
        'tokenmill_gpu_memory_bytes{gpu="1",name="Test GPU"} 80.0',
    ]


def test_without_a_driver_there_is_nothing() -> None:
    assert gpus.gpus("libthere-is-none.so") is None
    assert all(not family.series for family in gpus.families(None))
    with pytest.raises(OSError, match="there-is-none"):
        ctypes.CDLL("libthere-is-none.so")


def exchange(*calls: Call) -> Exchange:
    """A request that was sent so."""
    made = Exchange("/v1/x", [], b"", body=None, model=None, request_id="r", forward=[])
    made.calls += calls
    return made


def test_calls_are_counted_once_and_summed_either_way() -> None:
    prices = Prices(5_000_000, 0, 10_000_000)
    one, two = (
        Target(Backend(name, "http://127.0.0.1:9", "small", prices=prices), Settings()) for name in ("one", "two")
    )
    seen = Consumption()
    seen.count(
        "a", "", exchange(Call(one, None, Usage(10, 4, 3), sent=True), Call(two, None, Usage(1, 0, 2), sent=True))
    )
    seen.count("b", "x", exchange(Call(one, None, Usage(5, 0, 0), sent=True)))
    sums = {family.name: {values: value for values, (value,) in family.series} for family in seen.families()}
    assert sums["tokenmill_tokens"] == {
        ("small", "one", "prompt"): 15,
        ("small", "one", "cached"): 4,
        ("small", "one", "completion"): 3,
        ("small", "two", "prompt"): 1,
        ("small", "two", "completion"): 2,
    }
    assert sums["tokenmill_account_tokens"] == {
        ("a", "", "small", "prompt"): 11,
        ("a", "", "small", "completion"): 5,
        ("b", "x", "small", "prompt"): 5,
    }
    assert sums["tokenmill_cost_dollars"] == {("a", "", "small"): 85, ("b", "x", "small"): 25}
    assert {family.parts for family in seen.families()} == {1, MICRO_CENTS_PER_DOLLAR}
    assert sums["tokenmill_upstream_requests"] == {("small", "one"): 2, ("small", "two"): 1}


def test_time_per_token_is_that_of_the_answer_that_was_given() -> None:
    portfolio = Portfolio([Backend(name, "http://127.0.0.1:9", name) for name in ("small", "large")], Settings())
    small, large = portfolio.targets
    counted = metrics.Metrics(portfolio)
    # An unsure answer and the one that took over; then one whose better failed.
    for target, *calls in (
        (large, Call(small, None, Usage(1, 0, 90)), Call(large, None, Usage(1, 0, 11))),
        (small, Call(small, None, Usage(1, 0, 5)), Call(large, None)),
    ):
        ended = exchange(*calls)
        ended.target, ended.first_chunk_at, ended.last_chunk_at = target, 10.0, 11.0
        counted.count(ended)
    (family,) = (one for one in counted.report().families if one.name == "tokenmill_time_per_output_token_seconds")
    sums = {tier: numbers[-1] for (tier, _), numbers in family.series}
    assert sums == pytest.approx({"large": 0.1, "small": 0.25}, abs=2e-5)
