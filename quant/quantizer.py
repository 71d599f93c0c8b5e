"""Quantizing a checkpoint block by block: one decoder block and the calibration's hidden states are in memory.

Each block is quantized, written, *read back from its file*, and only then run to make the next block's inputs. A run
that was killed therefore continues from the files with exactly the numbers that it would have had.
"""

import hashlib
import resource
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tokenmill import __version__
from tokenmill.errors import CheckpointError, ConfigurationError, InputError, UnsupportedError
from tokenmill.kernels.int4_gemm.weight import dequantize
from tokenmill.quant.block import check_linears, linears, quantize_block, served_sizes
from tokenmill.quant.checkpoint import Checkpoint
from tokenmill.quant.evaluate import Perplexity, count, negative_log_likelihood, text_windows
from tokenmill.quant.experts import mixtures
from tokenmill.quant.format import STOCK_VLLM, Scheme, StockRefusal, stock_refusal, write_config
from tokenmill.quant.method import BlockSettings
from tokenmill.quant.output import OutputDirectory, check_apart
from tokenmill.quant.pack import read_layer, weight_tensor, write_layer
from tokenmill.quant.recall import Recall
from tokenmill.quant.scaling import SCALABLE_MODELS
from tokenmill.quant.streaming import StreamedModel

#: Of text, at first: more than most tokens have.
_CHARACTERS_PER_TOKEN = 8
#: Of a batch of calibration: more only take more memory.
_TOKENS_PER_BATCH = 2048

#: Called after each block with the number of blocks done, of all, and the mean relative error of its layers (or None).
Progress = Callable[[int, int, float | None], None]


@dataclass(frozen=True)
class Request:
    """What to do with a model.

    Attributes:
        block: How each linear is quantized.
        format: gptq or pack-quantized.
        calibration: Text whose activations guide the rounding; unused by rtn.
        evaluation: Text on which perplexity is measured before and after; None measures nothing.
        num_samples: Most calibration sequences.
        length: Tokens in a sequence; no more than the model was made for.
        device: Where to compute.
        dtype: What to compute in; None is float32 on a CPU and the model's own on a GPU.
    """

    block: BlockSettings
    format: str
    calibration: str
    evaluation: str | None
    num_samples: int = 128
    length: int = 2048
    device: str = "cpu"
    dtype: torch.dtype | None = None

    @property
    def scheme(self) -> Scheme:
        """How the written layers say that they are quantized."""
        dynamic = self.block.compensates and self.block.gptq.act_order == "dynamic" and self.block.group_size != -1
        return Scheme(self.format, self.block.group_size, self.block.symmetric, dynamic)


@dataclass(frozen=True)
class Report:
    """What became of the model.

    Attributes:
        bytes_before: Bytes of the source's tensors.
        bytes_after: Bytes of the written ones.
        before: Perplexity of the source; None if nothing was evaluated.
        after: Perplexity of the result.
        errors: Relative square error of each layer's output on the calibration, by full name.
        seconds: Duration of this run; a resumed run counts from its start.
        peak_bytes: Most memory held: of the GPU, or of the process on a CPU.
        stock_refusal: Why stock vLLM does not load the result, only vLLM with Tokenmill's plug-in; None if it does.
        left_out: Lines about tensors of the source that the result does not have.
        rounded_experts: How many experts are rounded to nearest, because the calibration has too few tokens for them;
            by AWQ they have no scales of their own.
    """

    bytes_before: int
    bytes_after: int
    before: Perplexity | None
    after: Perplexity | None
    errors: dict[str, float]
    seconds: float
    peak_bytes: int
    stock_refusal: StockRefusal | None
    left_out: tuple[str, ...] = ()
    rounded_experts: int = 0


class _BlockFile:
    """The parameters of one quantized block, dequantized from its file."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> None:
        self._tensors = tensors
        self._scheme = scheme

    def parameter(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """As `Checkpoint.parameter`."""
        layer = name.removesuffix(".weight")
        if name.endswith(".weight") and f"{layer}.{weight_tensor(self._scheme)}" in self._tensors:
            prefix = layer + "."
            own = {key.removeprefix(prefix): t for key, t in self._tensors.items() if key.startswith(prefix)}
            return dequantize(read_layer(layer, own, self._scheme), dtype).T.contiguous()
        return self._tensors[name].to(dtype)


def calibration_batches(model: StreamedModel, text: str, num_samples: int, length: int) -> list[torch.Tensor]:
    """Cuts the beginning of a text into sequences of one length, a few of them to a batch.

    Raises:
        InputError: The text is shorter than one sequence.
        CheckpointError: There is no tokenizer that can be loaded, or it is another model's.
    """
    # A text may be larger than memory holds of it in tokens; no more of it is looked at than they take.
    characters = _CHARACTERS_PER_TOKEN * num_samples * length
    tokens = model.tokenize(text[:characters])
    while len(tokens) < num_samples * length and characters < len(text):
        characters *= 2
        tokens = model.tokenize(text[:characters])
    available = min(len(tokens) // length, num_samples)
    if available < 1:
        raise InputError(f"the calibration text has {len(tokens)} tokens; one sequence needs {length}: give more text")
    sequences = torch.tensor(tokens[: available * length]).view(available, length)
    return list(torch.split(sequences, max(1, _TOKENS_PER_BATCH // length)))


def quantize_checkpoint(
    source: Path,
    out: Path,
    request: Request,
    overwrite: bool = False,
    progress: Progress | None = None,
    notice: Callable[[str], None] | None = None,
) -> Report:
    """Quantizes every linear of every decoder block of a model and writes a checkpoint that vLLM loads.

    Whether stock vLLM does, or only vLLM with Tokenmill's plug-in, is said by the report.
    Embeddings, norms, what chooses experts and the output head stay as they are, and so do towers and projectors of
    models that read pictures or hear; but AWQ moves factors from norms to all that reads them, what chooses experts
    among it. If `out` holds an unfinished run of the same request, it is continued, and the result has the same bytes
    as an uninterrupted run's.

    Args:
        source: Model directory: dense or bitsandbytes NF4.
        out: Directory to write to.
        request: How.
        overwrite: Whether to delete the quantized checkpoint, finished or not, that `out` holds.
        progress: Told after every block.
        notice: Told at the beginning, in a line each, what of the source the result will not have.

    Raises:
        CheckpointError: The source is damaged, already INT4, or of an unknown architecture, or its tokenizer is missing
            or another model's.
        ConfigurationError: `out` holds something else, cannot be written to, or overlaps with the source; or vLLM
            does not load the scheme at all.
        InputError: The group size does not divide an input size, or there is too little text.
        UnsupportedError: The method cannot do this architecture.
    """
    started = time.perf_counter()
    checkpoint = Checkpoint(source)
    check_apart(source, out)
    if checkpoint.quantization is not None:
        raise CheckpointError(f"{source} is already {checkpoint.quantization.default.format}; quantize the original")
    _check_scheme(request.scheme)
    what = f"quantizing {checkpoint.path} by {request.block.method}"
    model = StreamedModel(checkpoint, request.device, request.dtype)
    kind = str(model.text_config.model_type)
    if request.block.scales_inputs and kind not in SCALABLE_MODELS:
        known = ", ".join(SCALABLE_MODELS)
        raise UnsupportedError(what, {"awq": f"model_type={kind!r}; input scaling knows {known}; use --method gptq"})
    length = min(request.length, getattr(model.text_config, "max_position_embeddings", None) or request.length)
    sizes: list[tuple[int, int]] = []
    has_experts = False
    for index in range(model.num_blocks):
        check_linears(model.skeleton(index), request.block)
        sizes += served_sizes(model.skeleton(index))
        has_experts = has_experts or bool(mixtures(model.skeleton(index)))
    _check_scheme(request.scheme, has_experts)
    batches: list[torch.Tensor] = []
    if request.block.needs_calibration:
        batches = calibration_batches(model, request.calibration, request.num_samples, length)
    windows = [] if request.evaluation is None else text_windows(model, request.evaluation, length)
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
    left_out = model.left_out()
    for line in left_out:
        if notice is not None:
            notice(line)
    # What could be refused has been; from here on `out` is written to. The part that is read last comes first, so that
    # damage to it is not found after hours.
    settings = _settings(checkpoint, model, request, batches, windows)
    with closing(OutputDirectory(out, model.num_blocks + 1, settings, overwrite)) as output:
        if not output.is_written(model.num_blocks):
            output.write_part(model.num_blocks, _other_tensors(model), {})
        errors, measured = _run(model, request, batches, windows, output, progress)
        report = Report(
            bytes_before=checkpoint.weight_bytes,
            bytes_after=sum(output.part(index).stat().st_size for index in range(output.num_parts)),
            before=measured[0],
            after=measured[1],
            errors=errors,
            seconds=time.perf_counter() - started,
            peak_bytes=peak_bytes(model.device),
            stock_refusal=stock_refusal(request.scheme, sizes, has_experts),
            left_out=left_out,
            rounded_experts=rounded_experts(model, errors) if request.block.needs_calibration else 0,
        )
        config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
        config["quantization_config"] = write_config(request.scheme, model.unquantized(), routers(model))
        output.finish(source, config, asdict(report))
    checkpoint.close()
    return report


def _run(
    model: StreamedModel,
    request: Request,
    batches: list[torch.Tensor],
    windows: list[torch.Tensor],
    output: OutputDirectory,
    progress: Progress | None,
) -> tuple[dict[str, float], tuple[Perplexity | None, Perplexity | None]]:
    """Quantizes the blocks that are not written yet and runs all: errors by layer, perplexity before and after."""
    calibration = [model.embed(batch) for batch in batches]
    before = [model.embed(window) for window in windows]
    after = list(before)
    errors: dict[str, float] = {}
    for index in range(model.num_blocks):
        if before:
            run = model.forward(index, model.block(index))
            before = [run(hidden) for hidden in before]
        recall = None
        if not output.is_written(index):
            recall = _quantize_and_write(model, index, calibration, request, output)
        found = output.notes(index)
        errors.update(found)
        if calibration or after:
            block = model.block(index, _BlockFile(output.read_part(index), request.scheme))
            run = model.forward(index, block)
            after = [run(hidden) for hidden in after]
            if recall is not None:
                recall.last_pass(block)
                run = recall.run(run)
            for at, hidden in enumerate(calibration):
                result = run(hidden)
                if result.dtype == hidden.dtype:  # in the same memory, which would otherwise be torn to pieces
                    hidden.copy_(result)
                else:  # Mamba's blocks give float32, whatever they get
                    calibration[at] = result
            if recall is not None:
                recall.let_go()
        model.checkpoint.close()
        if progress is not None:
            progress(index + 1, model.num_blocks, sum(found.values()) / len(found) if found else None)
    if request.evaluation is None:
        return errors, (None, None)
    head = model.head()
    nats = [negative_log_likelihood(head, states, windows) for states in (before, after)]
    return errors, (count(request.evaluation, windows, nats[0]), count(request.evaluation, windows, nats[1]))


def _check_scheme(scheme: Scheme, has_experts: bool = False) -> None:
    refusal = stock_refusal(scheme, has_experts=has_experts)
    if refusal is not None and not refusal.with_plugin:
        raise ConfigurationError(f"{refusal.reason} is not loaded by vLLM {STOCK_VLLM}; {refusal.remedy}")


def _settings(
    checkpoint: Checkpoint,
    model: StreamedModel,
    request: Request,
    batches: list[torch.Tensor],
    windows: list[torch.Tensor],
) -> dict[str, Any]:
    """Everything that the result depends on, for recognising a run that may be resumed."""
    files = {str(info.file): info.file.stat() for info in checkpoint.tensors.values()}
    settings = asdict(request)
    # Of texts what the tokenizer, which may have been changed, makes of them now.
    settings["calibration"], settings["evaluation"] = _digest(batches), _digest(windows)
    settings["block"]["scale_dtype"] = str(request.block.scale_dtype)
    settings["dtype"] = str(model.dtype)
    settings["source"] = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in sorted(files.items())}
    settings["config"] = checkpoint.config
    settings["versions"] = {"tokenmill": __version__, "torch": torch.__version__}
    return settings


def _digest(tokens: list[torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for batch in tokens:
        digest.update(f"{list(batch.shape)}".encode() + batch.numpy().tobytes())
    return digest.hexdigest()


def _quantize_and_write(
    model: StreamedModel, index: int, calibration: list[torch.Tensor], request: Request, output: OutputDirectory
) -> Recall | None:
    """Quantizes one block into its file; returns what is known of its outputs."""
    block = model.block(index)
    quantized = quantize_block(block, model.forward(index, block), calibration, request.block)
    prefix = model.block_name(index)
    stored = {name: model.stored_name(f"{prefix}.{name}") for name, _ in block.named_parameters()}
    layers = {name: stored[f"{name}.weight"].removesuffix(".weight") for name in quantized.layers}
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in quantized.layers.items():
        for part, tensor in write_layer(weight, request.scheme).items():
            tensors[f"{layers[name]}.{part}"] = tensor
    # Norms and biases go back to the dtype that they came in; input scaling has changed some of them.
    for name, parameter in block.named_parameters():
        if name.removesuffix(".weight") not in quantized.layers:
            tensors[stored[name]] = parameter.to(_stored_dtype(model, stored[name]))
    buffers = [model.stored_name(f"{prefix}.{name}") for name in model.block_buffers(index)]
    tensors |= {name: model.checkpoint.tensor(name) for name in buffers}
    output.write_part(index, tensors, {layers[name]: error for name, error in quantized.errors.items()})
    return quantized.recall


def routers(model: StreamedModel) -> tuple[str, ...]:
    """Last names of the matrices in the blocks that are not quantized, as the checkpoint calls them."""
    names = set()
    for index in range(model.num_blocks):
        block = model.skeleton(index)
        quantized = linears(block)
        for name, parameter in block.named_parameters():
            path, _, own = name.rpartition(".")
            if own == "weight" and parameter.dim() == 2 and path not in quantized:
                names.add(model.stored_name(f"{model.block_name(index)}.{name}").split(".")[-2])
    return tuple(sorted(names))


def rounded_experts(model: StreamedModel, errors: Mapping[str, float]) -> int:
    """Number of experts that were rounded to nearest: of which no error is known."""
    count = 0
    for index in range(model.num_blocks):
        for name, experts in mixtures(model.skeleton(index)).items():
            downs = (f"{model.block_name(index)}.{names[0]}.weight" for names in experts.sets(name)[len(experts) :])
            count += sum(model.stored_name(down).removesuffix(".weight") not in errors for down in downs)
    return count


def _stored_dtype(model: StreamedModel, name: str) -> torch.dtype:
    dtype = model.checkpoint.tensor(name).dtype
    return dtype if dtype.is_floating_point else model.stored_dtype


def _other_tensors(model: StreamedModel) -> dict[str, torch.Tensor]:
    """Everything outside the blocks: embeddings, the last norm, the output head, and what reads pictures or sound."""
    own = {name: model.checkpoint.parameter(name, _stored_dtype(model, name)) for name in model.other_parameters()}
    return own | model.tensors_beside()


def peak_bytes(device: torch.device) -> int:
    """Most memory held so far: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count what the parent process held when it forked
        fields = dict(line.split(":", 1) for line in status.read_text(encoding="utf-8").splitlines())
        return int(fields["VmHWM"].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
