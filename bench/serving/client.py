"""vLLM's own serving client, one import for many runs: reads jobs as JSON lines, answers each with one.

A job is a list of `vllm bench serve` flags; the answer is the result that vLLM would write to its file. Runs in a
process of its own, as clients do.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from vllm.benchmarks import serve
from vllm.benchmarks.datasets import CustomDataset
from vllm.utils.argparse_utils import FlexibleArgumentParser


def _load(dataset: Any) -> None:
    """The prompts in the order of the file. vLLM's own reader needs pandas for this."""
    lines = Path(dataset.dataset_path).read_text(encoding="utf-8").splitlines()
    dataset.data = [json.loads(line) for line in lines]


def main() -> None:
    """Works until the input ends. What vLLM prints goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    CustomDataset.load_data = _load
    for line in sys.stdin:
        parser = FlexibleArgumentParser()
        serve.add_cli_args(parser)
        result = serve.main(parser.parse_args(json.loads(line)))
        answers.write(json.dumps(result) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
