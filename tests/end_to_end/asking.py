"""How the end-to-end tests ask the servers."""

from dataclasses import dataclass
from urllib.request import urlopen

from tests.supervisor.running import Running, call

PROMPTS = (
    "def add(a, b):\n",
    "import os\nimport sys\n\n\nclass ",
    "for i in range(",
    "What does os.path.join do?",
    '"""Return the ',
    "    def __init__(self",
)


@dataclass
class Scored:
    """A greedy completion: its tokens, and by how many nats each was ahead of the second choice."""

    tokens: list[str]
    margins: list[float]


def greedy(url: str, prompt: str) -> Scored:
    """48 greedy tokens from the server's completion endpoint."""
    body = {"model": "tiny-target", "prompt": prompt, "max_tokens": 48, "temperature": 0, "logprobs": 2}
    status, _, answer = call(url + "/v1/completions", body, timeout=120)
    assert status == 200, answer
    logprobs = answer["choices"][0]["logprobs"]
    ranked = [sorted(top.values(), reverse=True) for top in logprobs["top_logprobs"]]
    return Scored(logprobs["tokens"], [values[0] - values[1] for values in ranked])


def engine_url(server: Running, tier: str) -> str:
    """Where the engine of a tier listens, behind the gateway."""
    flag = "--runner=pooling" if tier == "embedding" else "--speculative-config"
    (command,) = [
        text for text in server.processes().values() if flag in text and "tokenmill.engine.vllm.launch" in text
    ]
    words = command.split()
    return f"http://127.0.0.1:{words[words.index('--port') + 1]}"


def metric(server: Running, name: str) -> float:
    """The sum of a metric of the text engine over its labels."""
    with urlopen(engine_url(server, "text") + "/metrics", timeout=10) as answer:  # noqa: S310
        lines = answer.read().decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name + "{"))
