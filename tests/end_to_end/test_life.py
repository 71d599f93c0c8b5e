"""Lives and deaths of a real server: right tokens, a killed engine, a killed parent."""

import os
import signal

import pytest

from tests.end_to_end.asking import PROMPTS, engine_url, greedy, metric
from tests.end_to_end.conftest import READY_SECONDS, FirstStart
from tests.supervisor.running import Running, call, until

pytestmark = pytest.mark.end_to_end
#: Below this many nats two right computations may choose differently: they add in another order.
NARROW = 0.02


def test_nothing_survived_the_killed_parent(first_start: FirstStart) -> None:
    assert any("tokenmill.engine.vllm.launch" in command for command in first_start.started.values())
    assert any("EngineCore" in command for command in first_start.started.values())
    assert first_start.left == {}


def test_the_next_start_takes_the_same_port(first_start: FirstStart, server: Running) -> None:
    assert server.port == first_start.port
    assert call(server.url + "/health")[0] == 200


def test_greedy_tokens_equal_stock_vllm_without_speculation(first_start: FirstStart, server: Running) -> None:
    compared = 0
    for prompt in PROMPTS:
        expected = first_start.greedy[prompt]
        sure = next((i for i, margin in enumerate(expected.margins) if margin < NARROW), len(expected.margins))
        assert greedy(server.url, prompt).tokens[:sure] == expected.tokens[:sure], prompt
        compared += sure
    assert compared >= 100
    assert metric(server, "vllm:spec_decode_num_accepted_tokens_total") > 0


def test_the_panel_says_what_runs(server: Running) -> None:
    assert "tiny-target, tiny-pair  tier text; tiny-draft drafts up to 3 tokens a step" in server.text
    assert "verification  vLLM's acceptance" in server.text


def test_a_killed_engine_comes_back_and_nothing_else_restarts(server: Running) -> None:
    body = {"model": "tiny-target", "prompt": "x", "max_tokens": 1}
    embed = {"model": "embedder", "input": "x"}
    group = {pid for pid, text in server.processes().items() if engine_url(server, "text").rpartition(":")[2] in text}
    (leader,) = group
    members = {pid for pid in server.processes() if os.getpgid(pid) == leader}
    (core,) = members & server.pids("EngineCore")
    others = set(server.processes()) - members
    os.kill(core, signal.SIGKILL)

    def refused() -> bool:
        status, headers, answer = call(server.url + "/v1/completions", body)
        if status == 503:
            assert int(headers["retry-after"]) >= 1
            assert answer["error"]["message"]
        return status == 503

    until(refused, 30, "503 while the engine is away")
    assert call(server.url + "/v1/embeddings", embed)[0] == 200
    assert call(server.url + "/ready")[0] == 503
    until(lambda: call(server.url + "/v1/completions", body)[0] == 200, READY_SECONDS, "the engine serves again")
    assert not members & set(server.processes())
    assert others <= set(server.processes())
    assert "text: starting again" in server.text
