"""The whole factory, started once: the bundled draft as utility tier, the target as reasoning tier, both on real vLLM,
and other OpenAI-compatible servers as the cloud; governance, routing, escalation and the policy on data are on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openai import OpenAI

from tests.gateway.upstream import FakeUpstream
from tests.supervisor.running import REAL, Running, call, until

READY_SECONDS = 300
MASTER = "sk-master-of-the-factory"
CONFIG = """
server: {{port: 0, workers: 1, drain_seconds: 20}}
governance: {{store: {folder}/books.db}}
routing:
  escalation: {{first: utility, then: reasoning, threshold: 0.3, statistic: mean, allowance_seconds: 60}}
sensitivity: {{}}
tiers:
  utility:
    quality: 0.75
    backends:
      - model: bundled:draft
        served_as: [tiny-draft]
        capabilities: [logprobs]
        context_window: 512
        price: {{input: 0.1, output: 0.2}}
        flags: {{enforce-eager: true, dtype: float32, seed: 0}}
        env: {{VLLM_CPU_KVCACHE_SPACE: 1}}
  reasoning:
    quality: 0.9
    backends:
      - model: bundled:target
        served_as: [tiny-target]
        version: "1"
        max_concurrency: 2
        capabilities: [logprobs, tools]
        context_window: 2048
        price: {{input: 1, output: 3}}
        flags: {{enforce-eager: true, dtype: float32, seed: 0}}
        env: {{VLLM_CPU_KVCACHE_SPACE: 1}}
      - {{name: burst, url: "{burst}", models: {{tiny-target: tiny}}, zone: cloud, price: {{input: 2, output: 6}}}}
      - name: next
        url: "{next}"
        models: {{tiny-target: tiny}}
        version: "2"
        canary: 0
        price: {{input: 1, output: 3}}
  frontier:
    quality: 0.97
    backends:
      - {{name: frontier, url: "{frontier}", models: {{vast: tiny}}, zone: cloud, price: {{input: 10, output: 30}}}}
"""


@dataclass
class Factory:
    """The running factory.

    Attributes:
        server: `tokenmill serve`.
        burst, next, frontier: The servers that are not ours, with their own books.
    """

    server: Running
    burst: FakeUpstream
    next: FakeUpstream
    frontier: FakeUpstream

    @classmethod
    def start(cls, folder: Path) -> "Factory":
        """Starts everything; close it."""
        others = [FakeUpstream().start() for _ in range(3)]
        config = folder / "factory.yaml"
        named = dict(zip(("burst", "next", "frontier"), (other.url for other in others), strict=True))
        config.write_text(CONFIG.format(folder=folder, **named))
        server = Running([*REAL, str(config)], folder, TOKENMILL_MASTER_KEY=MASTER)
        factory = cls(server, *others)
        try:
            server.wait_ready(READY_SECONDS)
            # A tier is ready with any of its backends; here all must be seen before anybody may be asked.
            until(lambda: all(one["up"] for one in factory.admin("GET", "/admin/backends")["backends"]), 30, "all up")
        except BaseException:
            factory.close()
            raise
        return factory

    def close(self) -> None:
        """Ends everything."""
        self.server.close()
        for other in (self.burst, self.next, self.frontier):
            other.stop()

    def client(self, key: str = MASTER) -> OpenAI:
        """The official client with a key; it never repeats a request by itself."""
        return OpenAI(base_url=self.server.url + "/v1", api_key=key, max_retries=0, timeout=120)

    def admin(self, method: str, path: str, body: Any = None) -> Any:
        """One request to the admin API, which must succeed."""
        headers = {"authorization": f"Bearer {MASTER}"}
        status, _, answer = call(self.server.url + path, body, method=method, headers=headers)
        assert status < 300, (path, answer)
        return answer

    def new_key(self, **fields: Any) -> tuple[str, str]:
        """(id, secret) of a new key."""
        made = self.admin("POST", "/admin/keys", fields)
        return made["id"], made["key"]

    def ledger(self, **only: str) -> list[dict[str, Any]]:
        """Sums by backend."""
        query = "&".join(f"{name}={value}" for name, value in only.items())
        rows: list[dict[str, Any]] = self.admin("GET", f"/admin/ledger?by=backend,outcome&{query}")["rows"]
        return rows

    def audited(self, action: str) -> list[dict[str, Any]]:
        """Rows of the audit trail with this action."""
        rows: list[dict[str, Any]] = []
        while more := self.admin("GET", f"/admin/audit?limit=1000&after={rows[-1]['sequence'] if rows else 0}")["rows"]:
            rows += more
        return [row for row in rows if row["action"] == action]
