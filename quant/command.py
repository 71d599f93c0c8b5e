"""`tokenmill quantize` and `tokenmill memory`."""

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenmill import platform
from tokenmill.errors import ConfigurationError

#: Bytes of the default texts: about 128 sequences of 2048 tokens, and enough held-out text for three digits.
_CALIBRATION_BYTES = 2_000_000
_EVALUATION_BYTES = 100_000
#: Of rows, which may be more than memory holds: more than any text needs for a token.
_ROW_CHARACTERS_PER_TOKEN = 64


def quantize(argv: list[str]) -> int:
    """Quantizes a checkpoint to INT4 and says what it cost."""
    arguments = _quantize_parser().parse_args(argv)

    import torch
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from tokenmill.quant.gptq import GptqOptions
    from tokenmill.quant.json_file import read_json
    from tokenmill.quant.method import BlockSettings
    from tokenmill.quant.quantizer import Request, quantize_checkpoint

    if arguments.group_size != -1 and arguments.group_size < 1:
        raise ConfigurationError(f"--group-size {arguments.group_size} is neither positive nor -1 (per channel)")
    if min(arguments.samples, arguments.length - 1) < 1:
        raise ConfigurationError(f"--samples {arguments.samples} --length {arguments.length}: need 1 and 2 at least")
    of_gptq = {name: value for name, value in vars(arguments).items() if name in ("act_order", "damping")}
    if of_gptq and not arguments.method.endswith("gptq"):
        flag = f"--{next(iter(of_gptq)).replace('_', '-')}"
        raise ConfigurationError(f"{flag} is for --method gptq or awq-gptq; {arguments.method} does not use it")
    device = arguments.device or ("cuda" if platform.gpus() else "cpu")
    _check_device(device)
    config = read_json(arguments.model / "config.json")
    scale_dtype = arguments.scale_dtype or ("float16" if _stored_dtype(config) == "float16" else "bfloat16")
    request = Request(
        block=BlockSettings(
            method=arguments.method,
            group_size=arguments.group_size,
            symmetric=arguments.symmetric,
            scale_dtype=getattr(torch, scale_dtype),
            gptq=GptqOptions(**of_gptq),
        ),
        format=arguments.format,
        calibration=_text(
            arguments.calibration,
            "train",
            _CALIBRATION_BYTES,
            arguments.model,
            arguments.samples * arguments.length * _ROW_CHARACTERS_PER_TOKEN,
        ),
        evaluation=None
        if arguments.no_evaluation
        else _text(arguments.evaluation, "held_out", _EVALUATION_BYTES, arguments.model),
        num_samples=arguments.samples,
        length=arguments.length,
        device=device,
    )
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total} blocks"))
    times = (TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, *times, console=console) as bar:
        task = bar.add_task(f"{arguments.method} on {device}", total=None, note="")

        def progress(done: int, total: int, error: float | None) -> None:
            note = "" if error is None else f"relative error {error:.2e}"
            bar.update(task, completed=done, total=total, note=note)

        def notice(line: str) -> None:
            bar.console.print(f"left out    {line}", soft_wrap=True, highlight=False)

        with _out_of_memory(device):
            report = quantize_checkpoint(arguments.model, arguments.out, request, arguments.overwrite, progress, notice)
    _print_report(console, arguments, report)
    return 0


def _print_report(console: Any, arguments: argparse.Namespace, report: Any) -> None:
    """What a `Report` says, in a line for each subject."""
    from tokenmill.quant.experts import MIN_ROWS
    from tokenmill.quant.format import STOCK_VLLM

    ratio = report.bytes_before / report.bytes_after
    console.print(f"size        {_bytes(report.bytes_before)} -> {_bytes(report.bytes_after)} ({ratio:.2f}x smaller)")
    if report.before is not None and report.after is not None:
        before, after = report.before, report.after
        console.print(f"perplexity  {before.per_token:.4f} -> {after.per_token:.4f} a token")
        change = after.bits_per_byte - before.bits_per_byte
        console.print(
            f"            {before.bits_per_byte:.5f} -> {after.bits_per_byte:.5f} bits a byte ({change:+.5f})"
        )
    if report.errors:
        mean = sum(report.errors.values()) / len(report.errors)
        console.print(
            f"layer loss  {mean:.3e} of the output's power on average, {max(report.errors.values()):.3e} at most"
        )
    if report.rounded_experts:
        unscaled = ", without scales of their own" if arguments.method.startswith("awq") else ""
        console.print(
            f"experts     {report.rounded_experts} of them are rounded to nearest{unscaled}: fewer than {MIN_ROWS} "
            "tokens of the calibration reach each; more --samples reach more",
            soft_wrap=True,
            highlight=False,
        )
    console.print(f"cost        {report.seconds:.1f} s, {_bytes(report.peak_bytes)} at the peak")
    console.print(f"written     {arguments.out} ({arguments.format})")
    if (refusal := report.stock_refusal) is not None:
        console.print(
            f"vLLM        loads it with Tokenmill's plug-in; stock vLLM {STOCK_VLLM} does not load {refusal.reason}: "
            f"{refusal.remedy}",
            soft_wrap=True,
            highlight=False,
        )


def _stored_dtype(config: dict[str, Any]) -> str:
    """What config.json says of the dtype; of models that read pictures it may say it of their language model alone."""
    text = config.get("text_config")
    parts = (config, text if isinstance(text, dict) else {})
    return str(next(filter(None, (part.get(key) for part in parts for key in ("dtype", "torch_dtype"))), "bfloat16"))


def _check_device(name: str) -> None:
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ConfigurationError(f"--device {name} is not one; use cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        raise ConfigurationError(f"--device {name}: torch sees {count or 'no'} CUDA device; use --device cpu")


@contextmanager
def _out_of_memory(device: str) -> Iterator[None]:
    """Says what to do where memory does not suffice."""
    from tokenmill.quant.streaming import lacks_memory

    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        raise ConfigurationError(
            f"out of memory on {device}; lower --samples, or --length, or choose another --device; blocks that are "
            "written are kept: the same command goes on after them"
        ) from None


def _quantize_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tokenmill quantize",
        description="Quantize a model's linear layers to INT4, block by block. Repeat the command to resume it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("model", type=Path, help="directory of a dense or bitsandbytes NF4 checkpoint")
    parser.add_argument("out", type=Path, help="directory to write to")
    methods = ("rtn", "gptq", "awq", "awq-gptq")
    parser.add_argument("--method", choices=methods, default="gptq", help="how weights are rounded")
    parser.add_argument("--bits", type=int, choices=(4,), default=4, help="bits of a weight")
    parser.add_argument("--group-size", type=int, default=128, help="inputs that share a scale; -1: per channel")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--symmetric", action="store_true", default=True, help="zero point 8 everywhere")
    # With a default of its own the help would call it the default, too.
    none, zeros = argparse.SUPPRESS, "a zero point for each group"
    kinds.add_argument("--asymmetric", action="store_false", dest="symmetric", default=none, help=zeros)
    formats = "format of the output; stock vLLM loads asymmetric weights as pack-quantized only"
    parser.add_argument("--format", choices=("gptq", "pack-quantized"), default="gptq", help=formats)
    orders = ("group-aware", "static", "none", "dynamic")
    order = "GPTQ: order of rounding; dynamic needs --format gptq and Tokenmill's plug-in (default: group-aware)"
    parser.add_argument("--act-order", choices=orders, default=none, help=order)
    damping = "GPTQ: share of the Hessian's mean diagonal, 0..1 (default: 0.01)"
    parser.add_argument("--damping", type=float, default=none, help=damping)
    kinds_of_text = "text file, or rows (.jsonl, .jsonl.gz, .json) with text, messages, or prompt and completion"
    parser.add_argument("--calibration", type=Path, help=f"{kinds_of_text}; default: Python's standard library")
    parser.add_argument("--evaluation", type=Path, help="text file; default: held-out files of the standard library")
    parser.add_argument("--no-evaluation", action="store_true", help="do not measure perplexity")
    parser.add_argument("--samples", type=int, default=128, help="most calibration sequences")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a sequence, at most what the model takes")
    parser.add_argument("--scale-dtype", choices=("float16", "bfloat16"), help="default: as the model")
    parser.add_argument("--device", help="cpu, cuda or cuda:N; default: cuda if there is one")
    parser.add_argument("--overwrite", action="store_true", help="delete the quantized checkpoint that OUT holds")
    return parser


def _text(file: Path | None, part: str, max_bytes: int, model: Path, max_characters: int | None = None) -> str:
    """The text of a file, or the default one; of rows no more than `max_characters`, by the model's chat template."""
    if file is None:
        from tokenmill.speculative.pair.corpus import calibration_text

        return calibration_text("train" if part == "train" else "held_out", max_bytes)
    from tokenmill.quant.streaming import load_tokenizer
    from tokenmill.quant.text_rows import chat_template, holds_rows, read_rows

    if file.suffix.lower() in (".parquet", ".arrow"):
        raise ConfigurationError(f"{file} is not read; write its rows as .jsonl")
    try:
        if holds_rows(file):
            text = read_rows(file, chat_template(lambda: load_tokenizer(model)), max_characters)
        else:
            text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"{file} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{file} is not UTF-8 text: byte {error.start} is {error.reason}") from None
    if not text.strip():
        raise ConfigurationError(f"{file} is empty; give a text")
    return text


def memory(argv: list[str]) -> int:
    """Prints what a model needs, from its config.json."""
    parser = argparse.ArgumentParser(
        prog="tokenmill memory",
        description="Plan a model's memory from its config.json alone.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("model", type=Path, help="a model directory or a config.json")
    parser.add_argument("--bits", type=int, choices=(4, 8, 16), default=4, help="bits of a linear's weight")
    parser.add_argument("--group-size", type=int, default=128, help="inputs that share a scale; -1: per channel")
    parser.add_argument("--asymmetric", action="store_true", help="with zero points")
    parser.add_argument("--context", type=int, default=8192, help="tokens of a request")
    parser.add_argument("--requests", type=int, default=1, help="requests at once")
    parser.add_argument("--step-tokens", type=int, default=2048, help="most tokens in one step")
    parser.add_argument("--kv-bits", type=int, choices=(8, 16), default=16, help="bits of a KV entry")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args(argv)

    from tokenmill.quant.format import STOCK_VLLM
    from tokenmill.quant.json_file import read_json
    from tokenmill.quant.memory import plan

    planned = plan(
        read_json(arguments.model / "config.json" if arguments.model.is_dir() else arguments.model),
        bits=arguments.bits,
        group_size=arguments.group_size,
        symmetric=not arguments.asymmetric,
        context=arguments.context,
        requests=arguments.requests,
        step_tokens=arguments.step_tokens,
        kv_bits=arguments.kv_bits,
    )
    if arguments.json:
        print(json.dumps(planned.as_dict(), indent=2))
        return 0

    from rich.console import Console
    from rich.table import Table

    table = Table("", "parameters", "bits", "memory", title=str(arguments.model))
    for column in table.columns[1:]:
        column.justify = "right"
    for component in planned.components:
        table.add_row(component.name, f"{component.parameters:,}", str(component.bits), _bytes(component.num_bytes))
    table.add_section()
    parameters = sum(component.parameters for component in planned.components)
    table.add_row("weights at 16 bits", f"{parameters:,}", "16", _bytes(planned.full_bytes))
    table.add_row("weights as planned", f"{parameters:,}", "", _bytes(planned.weight_bytes))
    table.add_section()
    table.add_row("KV cache, one token", "", str(arguments.kv_bits), _bytes(planned.kv_bytes_per_token))
    held = f"KV cache, {planned.requests} x {planned.context} tokens"
    table.add_row(held, "", str(arguments.kv_bits), _bytes(planned.kv_bytes))
    for part in planned.kv_parts:
        padding = f", {part.padding} of them padding" if part.padding else ""
        table.add_row(f"  {part.layers} layers{padding}: {part.holds}", "", "", _bytes(part.num_bytes))
    table.add_row(f"activations, {arguments.step_tokens} tokens", "", "16", _bytes(planned.activation_bytes))
    table.add_section()
    table.add_row("in all", "", "", _bytes(planned.total_bytes))
    console = Console()
    console.print(table)
    if len(planned.kv_parts) > 1 or any("window" in part.holds for part in planned.kv_parts):
        console.print(
            f"KV cache as vLLM {STOCK_VLLM} allocates it by default (its hybrid manager): each kind of layer has "
            f"blocks of its own; a window's hold the window and two steps of {arguments.step_tokens} tokens in flight",
            highlight=False,
            soft_wrap=True,
        )
    return 0


def _bytes(count: float) -> str:
    """Decimal units, as GPU memory and model sizes are quoted."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"
