"""Two real starts of `tokenmill serve`, shared by all tests here: they take most of the time.

The first serves the bundled target on stock vLLM: no hooks, no speculation. It says which tokens are right, and is
then killed with SIGKILL. The second, on the same port, serves the pair with speculation, and embeddings.
"""

import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.end_to_end.asking import PROMPTS, Scored, greedy
from tests.supervisor.running import REAL, Running, call, until

READY_SECONDS = 300
TIERS = """
server: {{port: {port}, workers: 1, drain_seconds: 20}}
tiers:
  text:
    backends:
      - model: bundled:target
        served_as: [tiny-target, tiny-pair]
        speculation: {{method: draft_model, model: bundled:draft, tokens: 3}}
        flags: {{enforce-eager: true, dtype: float32, seed: 0}}
        env: {{VLLM_CPU_KVCACHE_SPACE: 1}}
  embedding:
    backends:
      - model: bundled:target
        served_as: [embedder]
        flags: {{enforce-eager: true, dtype: float32, runner: pooling, convert: embed}}
        env: {{VLLM_CPU_KVCACHE_SPACE: 1}}
"""


@dataclass
class FirstStart:
    """What is known of the first start after its end.

    Attributes:
        greedy: The completion of each of `PROMPTS`.
        started: Processes that ran besides the parent.
        left: Processes that still ran ten seconds after the parent was killed.
        port: The port it had.
    """

    greedy: dict[str, Scored]
    started: dict[int, str]
    left: dict[int, str]
    port: int


@pytest.fixture(scope="session")
def first_start(tmp_path_factory: pytest.TempPathFactory) -> FirstStart:
    running = Running(
        [*REAL, "bundled:target", "--no-speculation", "--port", "0", "--enforce-eager", "--dtype", "float32"],
        tmp_path_factory.mktemp("first"),
        TOKENMILL_HOOKS="none",
        VLLM_CPU_KVCACHE_SPACE="1",
    )
    try:
        running.wait_ready(READY_SECONDS)
        answers = {prompt: greedy(running.url, prompt) for prompt in PROMPTS}
        started = running.processes()
        running.signal(signal.SIGKILL)
        deadline = time.monotonic() + 10
        while running.processes() and time.monotonic() < deadline:
            time.sleep(0.1)
        return FirstStart(answers, started, running.processes(), running.port)
    finally:
        running.close()


@pytest.fixture(scope="session")
def second_start(first_start: FirstStart, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("second")
    config = folder / "tiers.yaml"
    config.write_text(TIERS.format(port=first_start.port))
    running = Running([*REAL, str(config)], folder)
    try:
        running.wait_ready(READY_SECONDS)
        yield running
        running.signal(signal.SIGTERM)
        assert running.wait_end(60) == 0, running.text
        assert running.processes() == {}
    finally:
        running.close()


@pytest.fixture
def server(second_start: Running) -> Running:
    """The second start, when all of it is up: another test may have killed an engine just before."""
    until(lambda: call(second_start.url + "/ready")[0] == 200, READY_SECONDS, "every tier ready")
    return second_start
