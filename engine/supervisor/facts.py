"""What the panel says once the servers are ready.

Address, models, those that run uncompiled and why, which of our parts run, where the logs are.
"""

import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from tokenmill.engine.gateway.backend_section import LocalBackend
from tokenmill.engine.gateway.backends import Backend
from tokenmill.engine.supervisor.display import Fact
from tokenmill.engine.supervisor.plan import Engine

#: How a hook's state is marked.
_MOODS: dict[str, Literal["good", "quiet", "bad"]] = {
    "active": "good",
    "stock": "quiet",
    "off": "quiet",
    "absent": "quiet",
    "refused": "bad",
}


def panel_facts(
    url: str,
    engines: Sequence[Engine],
    remotes: Sequence[Backend],
    status_files: Sequence[Path],
    logs: Path,
    *,
    governed: bool = False,
) -> list[Fact]:
    """The lines of the panel.

    Args:
        url: Base URL of the API.
        engines: The local servers.
        remotes: The servers elsewhere.
        status_files: Where the engines say which hooks run and whether they compile, in their order.
        logs: Folder of the log files.
        governed: Keys are asked for: there is a dashboard.
    """
    reports = [_report(status_file) for status_file in status_files]
    models = []
    for engine, report in zip(engines, reports, strict=True):
        models += [_local_model(engine), *_uncompiled(engine.backend, report)]
    models += [_remote_model(remote) for remote in remotes]
    facts = [Fact("URL", f"{url}/v1"), *_labelled("Models", models)]
    shown: list[list[Fact]] = []
    for engine, report in zip(engines, reports, strict=True):
        hooks = list(_hooks(report))
        if hooks not in shown:  # the same machine, the same hooks: once is enough
            shown.append(hooks)
            facts += _labelled("Ours in vLLM" if len(shown) == 1 else f"Ours in {engine.name}", hooks)
    facts.append(Fact("Pages", f"{url}/docs  /ready  " + ("/admin/metrics  /dashboard" if governed else "/metrics")))
    facts.append(Fact("Logs", str(logs)))
    return facts


def _labelled(label: str, facts: Sequence[Fact]) -> list[Fact]:
    """The facts with a label on the first."""
    return [replace(fact, label=label if index == 0 else "") for index, fact in enumerate(facts)]


def example_command(url: str, model: str, *, chat: bool = True, governed: bool = False) -> str:
    """A curl line that a person can copy; where keys are asked for, with one from the variable KEY."""
    body: dict[str, Any] = {"model": model, "max_tokens": 48}
    if chat:
        body["messages"] = [{"role": "user", "content": "Write a function that adds two numbers."}]
        body["stream"] = True
    else:
        body = {"model": model, "input": "a text"}
    path = "chat/completions" if chat else "embeddings"
    key = ' -H "Authorization: Bearer $KEY"' if governed else ""
    return f"curl -N {url}/v1/{path}{key} -H 'Content-Type: application/json' -d {shlex.quote(json.dumps(body))}"


def _local_model(engine: Engine) -> Fact:
    drafting = _drafting(engine.backend)
    note = f"tier {engine.tier}; {drafting}" if drafting else f"tier {engine.tier}"
    return Fact("", ", ".join(engine.backend.public_names), note)


def _drafting(backend: LocalBackend) -> str:
    if backend.speculation is None:
        return ""
    drafter = Path(backend.speculation.model or "n-gram lookup").name.replace("bundled:", "tiny-")
    return f"{drafter} drafts up to {backend.speculation.tokens} tokens a step"


def _remote_model(remote: Backend) -> Fact:
    return Fact("", ", ".join(remote.models) or "all that it lists", f"tier {remote.tier}; {remote.root}")


def _report(status_file: Path) -> dict[str, Any]:
    """What an engine wrote about itself; empty where it wrote nothing that can be read."""
    try:
        report = json.loads(status_file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return report if isinstance(report, dict) else {}


def _uncompiled(backend: LocalBackend, report: dict[str, Any]) -> Iterator[Fact]:
    """A line of its own, for it is too long beside a model; none for a compiled model."""
    match report.get("uncompiled"):
        case {"reason": str(reason), "remedy": str(remedy)} if remedy:
            yield Fact("", f"uncompiled: {reason}; remedy: {remedy}", mood="bad")
        case {"reason": str(reason)}:
            whose = ", which the bundled pair has to be ready sooner" if backend.model.startswith("bundled:") else ""
            yield Fact("", f"uncompiled: {reason}{whose}", mood="quiet")


def _hooks(report: dict[str, Any]) -> Iterator[Fact]:
    try:
        for hook in report["hooks"]:
            note = hook["detail"] if hook["state"] == "active" else f"{hook['state']}: {hook['detail']}"
            yield Fact("", hook["hook"], note, _MOODS.get(hook["state"], ""))
    except (KeyError, TypeError):
        yield Fact("", "nothing", "the plug-in was not loaded; is Tokenmill installed beside this vLLM?", "bad")
