"""`tokenmill bench serve`: vLLM with and without our hooks, by vLLM's own client over HTTP."""

import argparse
import tempfile
from importlib.util import find_spec
from pathlib import Path

from tokenmill import env, platform
from tokenmill.bench import nvml
from tokenmill.bench.rows import Row, RowFile, facts
from tokenmill.bench.serving import models, workloads
from tokenmill.bench.serving.compare import Plan, Variant, compare
from tokenmill.bench.shapes import parse_rows
from tokenmill.errors import ConfigurationError, MissingDependencyError
from tokenmill.models import tiny_pair

_DRAFTED = 3


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(
        prog="tokenmill bench serve",
        description="Serves one model with stock vLLM and with each of our hooks, same flags, and compares what "
        "vLLM's own client measures over HTTP, in turns.",
    )
    add = found.add_argument
    add("--model", default="mini", help=f"{', '.join(models.SHAPES)} (a slice of random weights), or `pair`")
    add("--layers", type=int, default=2, help="layers of the slice (default %(default)s)")
    add("--weights", choices=("bf16", "int4"), default="int4", help="of the slice (default %(default)s)")
    add("--hooks", help="only stock and these hooks, commas between; default: those that the model uses, and its bf16")
    add("--workloads", default="chat,code,shared-prefix", help="default %(default)s")
    add("--concurrency", default="1,8", help="requests at once, commas between (default %(default)s)")
    add("--scale", type=float, help="multiplies the lengths of prompts and outputs (default: 1 on a GPU, else 1/8)")
    add("--waves", type=int, default=2, help="requests of a run, as a multiple of the concurrency")
    add("--rounds", type=int, default=3, help="turns of each server after the one that warms up (default %(default)s)")
    add("--slo", default="2000,100", help="milliseconds to the first token and per token of a good request")
    add("--flags", default="", help="more flags of `vllm serve`, in one word")
    add("--out", type=Path, default=Path("serve.jsonl"), help="rows; what is there is not repeated")
    return found


def main(argv: list[str]) -> int:
    """Measures and prints each row; 0, or an error that the command line prints."""
    arguments = parser().parse_args(argv)
    if arguments.rounds < 1 or arguments.waves < 1:
        raise ConfigurationError(f"--rounds {arguments.rounds} --waves {arguments.waves}: both have to be positive")
    if find_spec("vllm") is None:
        raise MissingDependencyError("vllm", "cpu", "tokenmill bench serve")
    gpu = next(iter(platform.gpus()), None)
    chosen = workloads.chosen(arguments.workloads, arguments.scale or (1.0 if gpu else 0.125))
    about = facts(["tokenmill", "bench", "serve", *argv], gpu.name if gpu else None)
    about["device_state"] = _state()
    with tempfile.TemporaryDirectory(prefix="tokenmill-serve-") as name:
        folder = Path(name)
        variants = _variants(arguments, folder, on_gpu=gpu is not None)
        plan = Plan(
            model=_model_name(arguments),
            variants=variants,
            flags=_flags(arguments, max(one.length for one in chosen), on_gpu=gpu is not None, servers=len(variants)),
            workloads=chosen,
            concurrencies=parse_rows(arguments.concurrency, "--concurrency"),
            waves=arguments.waves,
            rounds=arguments.rounds,
            slo_ms=_slo(arguments.slo),
            environment={} if gpu else {"VLLM_CPU_KVCACHE_SPACE": "1"},
        )
        compare(plan, about, RowFile(arguments.out), folder, lambda line: print(line, flush=True))
    return 0


def _state() -> Row:
    gpu = nvml.device()
    return {} if gpu is None else {**gpu.state(), "driver": gpu.driver()}


def _model_name(arguments: argparse.Namespace) -> str:
    if arguments.model == "pair":
        return "tiny-pair"
    return f"{arguments.model}, {arguments.layers} layers, {arguments.weights}"


def _variants(arguments: argparse.Namespace, folder: Path, *, on_gpu: bool) -> tuple[Variant, ...]:
    """Stock first, then each hook; INT4 weights also with 8-bit activations, and the dense model on stock vLLM."""
    if arguments.model == "pair":
        target, draft = tiny_pair()
        drafting = f'{{"model": "{draft}", "num_speculative_tokens": {_DRAFTED}}}'
        flags = ("--speculative-config", drafting)
        compared = _with_hooks(arguments, target, ("verification",), flags)
        return compared if arguments.hooks else (*compared, Variant("no-draft", target, "none"))
    sizes = models.shape(arguments.model, arguments.layers)
    if arguments.weights == "bf16":
        dense = models.write_dense(folder / "dense", sizes, arguments.layers)
        return _with_hooks(arguments, dense, ("all",), ("--load-format", "dummy"))
    int4 = models.write_int4(folder / "int4", sizes, arguments.layers)
    compared = _with_hooks(arguments, int4, ("linear",), ())
    if arguments.hooks:
        return compared
    if not on_gpu:
        compared = (*compared, Variant("linear-a8", int4, "linear", environment={env.INT4_ACTIVATION_BITS.name: "8"}))
    dense = models.write_dense(folder / "dense", sizes, arguments.layers)
    return (*compared, Variant("stock-bf16", dense, "none", ("--load-format", "dummy")))


def _with_hooks(
    arguments: argparse.Namespace, model: Path, hooks: tuple[str, ...], flags: tuple[str, ...]
) -> tuple[Variant, ...]:
    if arguments.hooks:
        hooks = tuple(name.strip() for name in arguments.hooks.split(",") if name.strip())
    stock = Variant("stock", model, "none", flags)
    return (stock, *(Variant(name, model, name, flags) for name in hooks))


def _flags(arguments: argparse.Namespace, length: int, *, on_gpu: bool, servers: int) -> tuple[str, ...]:
    """Of every server; the memory of a GPU is shared among those that are up together."""
    limit = -(-(length + 64) // 64) * 64
    found = ["--max-model-len", str(limit), "--dtype", "bfloat16", "--max-num-seqs", "64"]
    if on_gpu:
        found += ["--gpu-memory-utilization", f"{0.85 / servers:.2f}"]
    return (*found, *arguments.flags.split())


def _slo(text: str) -> tuple[float, float]:
    try:
        first, each = (float(part) for part in text.split(","))
    except ValueError:
        raise ConfigurationError(f"--slo {text}: give two numbers of milliseconds, such as 2000,100") from None
    return first, each
