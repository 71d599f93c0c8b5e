"""The process that runs items: an illegal access or a hang of a kernel ends this one, not the suite.

Reads one JSON object a line, `{"item": ..., "about": ...}`, and answers each with one. With `--once FILE` it runs the
item in the file and exits with 1 when it failed; this is how compute-sanitizer runs one.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

from tokenmill.bench.suite.items import Item, Outcome


def _run(job: dict[str, Any]) -> Outcome:
    return Item(**job["item"]).run(job["about"])


def main(argv: list[str]) -> int:
    """Works until the input ends. What items print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    from tokenmill.engine.vllm import isa

    isa.narrow()
    if argv[:1] == ["--once"]:
        outcome = _run(json.loads(Path(argv[1]).read_text(encoding="utf-8")))
        answers.write(json.dumps(dataclasses.asdict(outcome)) + "\n")
        return 1 if outcome.verdict == "failed" else 0
    for line in sys.stdin:
        answers.write(json.dumps(dataclasses.asdict(_run(json.loads(line)))) + "\n")
        answers.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
