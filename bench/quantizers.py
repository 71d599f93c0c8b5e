"""Quantizers on the same model, the same calibration tokens and the same judge.

    python -m tokenmill.bench.quantizers MODEL --gptqmodel PYTHON --llmcompressor PYTHON --out rows.jsonl

Each run is its own process, so that memory is its own. The judge is ours for everybody: a checkpoint is read by
`tokenmill.quant`, its layers are compared with the original's on the original's calibration inputs (relative square
error of the output), and its perplexity is measured on held-out text.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tokenmill.bench.rows import RowFile, facts
from tokenmill.errors import ConfigurationError
from tokenmill.quant.block import groups_by_input, linears
from tokenmill.quant.checkpoint import Checkpoint
from tokenmill.quant.evaluate import perplexity
from tokenmill.quant.inputs import input_hessian
from tokenmill.quant.quantizer import calibration_batches
from tokenmill.quant.streaming import StreamedModel
from tokenmill.speculative.pair.corpus import calibration_text

#: (producer, method, act_order, symmetric, group_size): what each offers, at the settings it is used with.
RUNS: tuple[tuple[str, str, str, bool, int], ...] = (
    ("tokenmill", "rtn", "none", True, 128),
    ("tokenmill", "gptq", "static", True, 128),
    ("tokenmill", "gptq", "group-aware", True, 128),
    ("tokenmill", "gptq", "dynamic", True, 128),
    ("tokenmill", "awq", "none", True, 128),
    ("tokenmill", "awq-gptq", "group-aware", True, 128),
    ("gptqmodel", "gptq", "group-aware", True, 128),
    ("gptqmodel", "gptq", "dynamic", True, 128),
    ("llmcompressor", "gptq", "static", True, 128),
    ("tokenmill", "gptq", "static", False, 64),
    ("tokenmill", "gptq", "group-aware", False, 64),
    ("gptqmodel", "gptq", "group-aware", False, 64),
    ("llmcompressor", "gptq", "static", False, 64),
)

_OURS = """
import json, sys, time
start = time.perf_counter()
from pathlib import Path
import torch
from tokenmill import __version__
from tokenmill.quant.gptq import GptqOptions
from tokenmill.quant.method import BlockSettings
from tokenmill.quant.quantizer import Request, peak_bytes, quantize_checkpoint
job = json.loads(Path(sys.argv[1]).read_text())
options = GptqOptions(act_order=job["act_order"])
block = BlockSettings(job["method"], job["group_size"], job["symmetric"], torch.bfloat16, options)
request = Request(block, "gptq", job["text"], None, len(job["tokens"]), len(job["tokens"][0]), job["device"])
quantize_checkpoint(Path(job["model"]), Path(job["out"]), request)
result = {"version": __version__, "seconds": time.perf_counter() - start}
result["peak_bytes"] = peak_bytes(torch.device("cpu"))
print("RESULT " + json.dumps(result))
"""


def layer_losses(original: Path, candidate: Path, tokens: Sequence[torch.Tensor]) -> dict[str, float]:
    """Relative square error of each layer's output on the inputs that the original model gives it.

    Args:
        original: The dense model.
        candidate: A quantized checkpoint of it, in any format; its layers must compute the same function
            (input scaling moves factors between layers, so AWQ's cannot be judged this way).
        tokens: Calibration batches [batch, tokens].
    """
    model, quantized = StreamedModel(Checkpoint(original)), Checkpoint(candidate)
    hidden = [model.embed(batch) for batch in tokens]
    losses = {}
    for index in range(model.num_blocks):
        block = model.block(index)
        run = model.forward(index, block)
        found = linears(block)
        for names in groups_by_input(block, run, hidden[0]):
            hessian = input_hessian(found[names[0]], run, hidden)
            for name in names:
                full = f"{model.block_name(index)}.{name}"
                weight = found[name].weight.float()
                difference = quantized.parameter(f"{full}.weight", torch.float32) - weight
                error = float(((difference @ hessian) * difference).sum().double())
                losses[full] = error / float(((weight @ hessian) * weight).sum().double())
        hidden = [run(batch) for batch in hidden]
    quantized.close()
    return losses


def run_one(python: str, producer: str, job: dict[str, Any]) -> dict[str, Any]:
    """Quantizes in a process of its own and returns what it printed about itself.

    Raises:
        ConfigurationError: The process failed; carries the end of what it said.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as file:
        json.dump(job, file)
        file.flush()
        rival = str(Path(__file__).with_name("quantizer_rival.py"))
        # Without its folder in the path: transformers would take our `kernels` for the package of that name.
        what = ["-c", _OURS, file.name] if producer == "tokenmill" else ["-P", rival, producer, file.name]
        # GPTQModel 7.7 takes half of the cores for its workers, and does not start with one.
        environment = {"GPTQMODEL_CPU_WORKERS": str(max(2, os.cpu_count() or 2)), **os.environ}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)  # without it transformers compiles for seconds in every run
        answer = subprocess.run(
            [python, "-W", "ignore", *what], capture_output=True, text=True, check=False, env=environment
        )
    lines = [line for line in answer.stdout.splitlines() if line.startswith("RESULT ")]
    if answer.returncode or not lines:
        raise ConfigurationError(f"{producer} failed with status {answer.returncode}: {answer.stderr[-1000:]}")
    result: dict[str, Any] = json.loads(lines[-1].removeprefix("RESULT "))
    return result


def main(argv: list[str] | None = None) -> int:
    """Runs every producer whose interpreter is given and appends a row for each to the output file."""
    parser = argparse.ArgumentParser(prog="python -m tokenmill.bench.quantizers", description=__doc__)
    parser.add_argument("model", type=Path, help="a dense checkpoint")
    parser.add_argument("--gptqmodel", metavar="PYTHON", help="interpreter of an environment with GPTQModel")
    parser.add_argument("--llmcompressor", metavar="PYTHON", help="interpreter of an environment with llm-compressor")
    parser.add_argument("--samples", type=int, default=64, help="calibration sequences")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines to append to")
    arguments = parser.parse_args(argv)
    pythons = {
        "tokenmill": sys.executable,
        "gptqmodel": arguments.gptqmodel,
        "llmcompressor": arguments.llmcompressor,
    }
    text = calibration_text("train", 1_000_000)
    held_out = calibration_text("held_out", 100_000)
    model = StreamedModel(Checkpoint(arguments.model))
    batches = calibration_batches(model, text, arguments.samples, arguments.length)
    tokens = [row.tolist() for batch in batches for row in batch]
    before = perplexity(model, held_out, arguments.length)
    device = None if arguments.device == "cpu" else torch.cuda.get_device_name()
    words = sys.argv[1:] if argv is None else argv
    about_run = facts(["python", "-m", "tokenmill.bench.quantizers", *words], device)
    out = RowFile(arguments.out)
    started: set[str] = set()
    for producer, method, act_order, symmetric, group_size in RUNS:
        if pythons[producer] is None:
            continue
        with tempfile.TemporaryDirectory() as folder:
            job = {
                "model": str(arguments.model.resolve()),
                "out": f"{folder}/out",
                "text": text if producer == "tokenmill" else "",
                "tokens": tokens,
                "method": method,
                "act_order": act_order,
                "symmetric": symmetric,
                "group_size": group_size,
                "device": arguments.device,
            }
            if producer not in started:  # who starts first also compiles its modules, and may compile kernels
                started.add(producer)
                run_one(str(pythons[producer]), producer, job | {"out": f"{folder}/first"})
            about = run_one(str(pythons[producer]), producer, job)
            source, result = Checkpoint(arguments.model), Path(job["out"])
            shared = {"tokenizer.json", "tokenizer_config.json"} - {path.name for path in result.iterdir()}
            for name in shared:
                (result / name).write_bytes((source.path / name).read_bytes())
            after = perplexity(StreamedModel(Checkpoint(result)), held_out, arguments.length)
            losses = {} if method.startswith("awq") else layer_losses(arguments.model, result, batches)
        row = {
            "op": "quantize",
            "implementation": producer,
            "version": about["version"],
            "model": arguments.model.name,
            "method": method,
            "act_order": act_order,
            "symmetric": symmetric,
            "group_size": group_size,
            "calibration_tokens": sum(len(row) for row in tokens),
            "layer_loss_mean": sum(losses.values()) / len(losses) if losses else None,
            "layer_loss_max": max(losses.values()) if losses else None,
            "perplexity_before": before.per_token,
            "perplexity_after": after.per_token,
            "bits_per_byte_before": before.bits_per_byte,
            "bits_per_byte_after": after.bits_per_byte,
            "seconds": about["seconds"],
            "peak_bytes": about["peak_bytes"],
            **about_run,
        }
        out.append([row])
        loss = "" if row["layer_loss_mean"] is None else f", layer loss {row['layer_loss_mean']:.3e}"
        change = after.bits_per_byte - before.bits_per_byte
        kind = f"{method} {act_order} {'sym' if symmetric else 'asym'} g{group_size}"
        print(f"{producer:>13} {kind:<28} {change:+.5f} bits/byte{loss}, {about['seconds']:.1f} s", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
