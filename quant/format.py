"""INT4 checkpoint formats: what a `quantization_config` says about each layer, and how to say it.

| name           | quant_method       | written by                     | tensors of a layer                           |
|----------------|--------------------|--------------------------------|----------------------------------------------|
| gptq           | gptq               | AutoGPTQ, GPTQModel, Tokenmill | qweight, qzeros (minus one), scales, g_idx   |
| gptq_v2        | gptq               | GPTQModel                      | the same, qzeros as they are                 |
| awq            | awq                | AutoAWQ (version gemm)         | qweight, qzeros (both interleaved), scales   |
| pack-quantized | compressed-tensors | llm-compressor, Tokenmill      | weight_packed, weight_scale, weight_shape,   |
|                |                    |                                | weight_zero_point, weight_g_idx              |

Which layers are quantized is read from the tensors that are there; the configuration says how. What stock vLLM does not
load of what can be written is said by `stock_refusal`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tokenmill.errors import CheckpointError
from tokenmill.kernels.int4_gemm.weight import CODES_PER_WORD

#: Formats that can be read; the first and the last can be written.
FORMATS = ("gptq", "gptq_v2", "awq", "pack-quantized")
WRITABLE_FORMATS = ("gptq", "pack-quantized")
#: The release of vLLM whose refusals `stock_refusal` knows, and the group sizes that it takes in GPTQ checkpoints.
STOCK_VLLM = "0.32"
STOCK_GPTQ_GROUP_SIZES = (-1, 32, 64, 128)
#: Sizes of a layer must be multiples of this for the INT4 kernel of vLLM's CPU build.
_STOCK_CPU_MULTIPLE = 32


@dataclass(frozen=True)
class Scheme:
    """How one layer is quantized.

    Attributes:
        format: One of `FORMATS`.
        group_size: Input features that share a scale; -1 is per output channel.
        symmetric: Whether the zero point is 8 everywhere.
        act_order: Whether a g_idx assigns rows to groups (GPTQ's desc_act, compressed-tensors' actorder "group").
    """

    format: str
    group_size: int
    symmetric: bool
    act_order: bool = False

    def rows_per_group(self, K: int) -> int:
        """The group size as a number of rows: K for per channel, and never more than K."""
        return K if self.group_size == -1 else min(self.group_size, K)


@dataclass(frozen=True)
class Override:
    """A rule for the layers whose full name `matches`: another scheme, or None where they stay unquantized."""

    pattern: re.Pattern[str]
    scheme: Scheme | None


@dataclass(frozen=True)
class QuantizationConfig:
    """The quantization of a whole checkpoint: a scheme for all layers and rules for some.

    Attributes:
        default: The scheme of a layer that no rule matches.
        overrides: Rules, of which the first match holds.
    """

    default: Scheme
    overrides: tuple[Override, ...] = ()

    def scheme(self, layer: str) -> Scheme | None:
        """The scheme of the layer with this full name; None where the configuration leaves it unquantized."""
        for override in self.overrides:
            if override.pattern.match(layer):
                return override.scheme
        return self.default


def parse_config(config: Mapping[str, Any]) -> QuantizationConfig:
    """Reads the `quantization_config` of a config.json, or a quantize_config.json.

    Raises:
        CheckpointError: The method, the number of bits or a value is not one that this program reads.
    """
    if not isinstance(config, Mapping):
        raise CheckpointError(f"quantization_config is {type(config).__name__}; it must be an object")
    try:
        return _parse(config)
    except (AttributeError, TypeError) as error:  # a list where an object should be, and the like
        raise CheckpointError(f"quantization_config is damaged: {error}") from None


def _parse(config: Mapping[str, Any]) -> QuantizationConfig:
    method = str(config.get("quant_method", "gptq" if "desc_act" in config else "")).lower()
    if method == "gptq":
        return _parse_gptq(config)
    if method == "awq":
        return _parse_awq(config)
    if method in ("compressed-tensors", "compressed_tensors"):
        return _parse_compressed_tensors(config)
    raise CheckpointError(f"quant_method={method!r} is not an INT4 format; known: gptq, awq, compressed-tensors")


def write_config(scheme: Scheme, unquantized: Sequence[str] = (), routers: Sequence[str] = ()) -> dict[str, Any]:
    """The `quantization_config` that says `scheme`, for stock vLLM, transformers and this program.

    Args:
        scheme: The scheme of every quantized layer; its format is one of `WRITABLE_FORMATS`.
        unquantized: Last names of modules beside the language model, in which all stays in floating point. For GPTQ
            vLLM looks at the files' headers instead.
        routers: Last names of what chooses experts in the blocks, which stays in floating point, too; likewise.

    Raises:
        CheckpointError: The format cannot be written.
    """
    if scheme.format == "gptq":
        return {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": scheme.group_size,
            "desc_act": scheme.act_order,
            "sym": scheme.symmetric,
            "checkpoint_format": "gptq",
            "lm_head": False,
        }
    if scheme.format == "pack-quantized":
        per_channel = scheme.group_size == -1
        weights = {
            "num_bits": 4,
            "type": "int",
            "symmetric": scheme.symmetric,
            "strategy": "channel" if per_channel else "group",
            "group_size": None if per_channel else scheme.group_size,
            "actorder": "group" if scheme.act_order else None,
            "dynamic": False,
        }
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
            "ignore": [
                "lm_head",
                *(rf"re:(?:.*\.)?{re.escape(name)}(?:\..*)?$" for name in unquantized),
                *(rf"re:.*\.{re.escape(name)}$" for name in routers),
            ],
        }
    raise CheckpointError(f"format={scheme.format!r} cannot be written; use one of {', '.join(WRITABLE_FORMATS)}")


@dataclass(frozen=True)
class StockRefusal:
    """Why stock vLLM does not load a checkpoint.

    Attributes:
        reason: What it does not take, and where if only there.
        remedy: What to ask the quantizer for instead, or what to serve with.
        with_plugin: Whether vLLM loads it with Tokenmill's plug-in.
    """

    reason: str
    remedy: str
    with_plugin: bool = True


def stock_refusal(
    scheme: Scheme, sizes: Iterable[tuple[int, int]] = (), has_experts: bool = False
) -> StockRefusal | None:
    """Why vLLM 0.32 without Tokenmill's plug-in does not load what `write_config` and `write_layer` make of a scheme.

    Args:
        scheme: The scheme of every quantized layer; its format is one of `WRITABLE_FORMATS`.
        sizes: (K, N) of the layers as vLLM runs them: query, key and value in one, gate and up in one.
        has_experts: Whether some of the layers are experts of a mixture.

    Returns:
        The first reason, those that hold on every device first; None where it loads.
    """
    if scheme.format == "pack-quantized" and scheme.act_order:
        remedy = "use --act-order static or group-aware, or --format gptq"
        return StockRefusal("pack-quantized with a dynamic act-order", remedy, with_plugin=False)
    if has_experts and scheme.act_order:
        remedy = "use --act-order static or group-aware"
        return StockRefusal("a mixture of experts with a dynamic act-order", remedy, with_plugin=False)
    if scheme.format == "gptq":
        if not scheme.symmetric:
            remedy = "use --format pack-quantized or --symmetric"
            # The plug-in has such experts on a CPU alone.
            return StockRefusal("asymmetric GPTQ (sym=False)", remedy + (", on a GPU always" if has_experts else ""))
        if scheme.act_order and scheme.group_size != -1:  # with one group there is nothing to order
            return StockRefusal(
                "GPTQ with a dynamic act-order (desc_act=True)", "use --act-order static or group-aware"
            )
        if scheme.group_size not in STOCK_GPTQ_GROUP_SIZES:
            remedy = "use --group-size 32, 64, 128 or -1, or --format pack-quantized"
            return StockRefusal(f"GPTQ with groups of {scheme.group_size}", remedy)
    for size in (size for layer in sizes for size in layer):
        if scheme.format == "gptq" and size % CODES_PER_WORD:
            return StockRefusal(f"GPTQ layers with sizes such as {size}, no multiple of 8", "use the plug-in")
        if size % _STOCK_CPU_MULTIPLE:
            reason = f"INT4 layers with sizes such as {size}, no multiple of {_STOCK_CPU_MULTIPLE}, on a CPU"
            return StockRefusal(reason, "use the plug-in")
    if has_experts:
        return StockRefusal("INT4 experts on a CPU", "use the plug-in")
    return None


def _need(config: Mapping[str, Any], key: str) -> Any:
    if key not in config:
        raise CheckpointError(f"quantization_config has no {key!r}; the checkpoint is incomplete")
    return config[key]


def _four_bits(bits: object) -> None:
    if bits != 4:
        raise CheckpointError(f"bits={bits!r}: only 4-bit weights can be read")


def check_gptq(config: Mapping[str, Any]) -> None:
    """Refuses the settings of a GPTQ checkpoint by which no layer can be read, whatever the bits of its layers are.

    Raises:
        CheckpointError: The group size of all layers is missing, that of some is no size, or the rules are none.
    """
    _group_size(_need(config, "group_size"))
    rules = config.get("dynamic") or {}
    if not isinstance(rules, Mapping) or not all(isinstance(changes, Mapping) for changes in rules.values()):
        raise CheckpointError(f"quantization_config has dynamic={rules!r}; it must be an object of objects")
    for changes in rules.values():
        _group_size(changes.get("group_size", -1))


def _group_size(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not (value == -1 or value > 0):
        raise CheckpointError(f"group_size={value!r} is neither a positive integer nor -1 (per channel)")
    return value


def _parse_gptq(config: Mapping[str, Any]) -> QuantizationConfig:
    _four_bits(_need(config, "bits"))
    name = str(config.get("checkpoint_format") or "gptq")
    if name not in ("gptq", "gptq_v2"):
        raise CheckpointError(f"checkpoint_format={name!r} cannot be read; known: gptq, gptq_v2")
    default = Scheme(
        format=name,
        group_size=_group_size(_need(config, "group_size")),
        symmetric=bool(config.get("sym", True)),
        act_order=bool(config.get("desc_act", False)),
    )
    # GPTQModel's `dynamic`: "-:regex" leaves layers unquantized, "+:regex" or "regex" changes single settings.
    overrides = []
    for rule, changes in (config.get("dynamic") or {}).items():
        if rule.startswith("-:"):
            overrides.append(Override(_compile(rule[2:]), None))
            continue
        _four_bits(changes.get("bits", 4))
        scheme = replace(
            default,
            group_size=_group_size(changes.get("group_size", default.group_size)),
            symmetric=bool(changes.get("sym", default.symmetric)),
            act_order=bool(changes.get("desc_act", default.act_order)),
        )
        overrides.append(Override(_compile(rule.removeprefix("+:")), scheme))
    return QuantizationConfig(default, tuple(overrides))


def _parse_awq(config: Mapping[str, Any]) -> QuantizationConfig:
    _four_bits(config.get("bits", config.get("w_bit")))
    version = str(config.get("version", "gemm")).lower()
    if version != "gemm":
        raise CheckpointError(f"AWQ version={version!r} packs its weights differently; only version gemm can be read")
    group_size = config.get("group_size", config.get("q_group_size"))
    symmetric = not config.get("zero_point", True)
    default = Scheme(format="awq", group_size=_group_size(group_size), symmetric=symmetric)
    skipped = config.get("modules_to_not_convert") or ()
    return QuantizationConfig(default, tuple(Override(_compile(f".*{re.escape(name)}"), None) for name in skipped))


def _parse_compressed_tensors(config: Mapping[str, Any]) -> QuantizationConfig:
    default: Scheme | None = None
    overrides = [Override(_target(name), None) for name in config.get("ignore") or ()]
    for group in _need(config, "config_groups").values():
        scheme = _compressed_tensors_scheme(group, str(config.get("format", "pack-quantized")))
        for target in group.get("targets") or ["Linear"]:
            if target == "Linear":
                default = scheme
            else:
                overrides.append(Override(_target(target), scheme))
    if default is None:
        schemes = [override.scheme for override in overrides if override.scheme is not None]
        if not schemes:
            raise CheckpointError("quantization_config quantizes no layer: config_groups is empty")
        return QuantizationConfig(schemes[0], (*overrides, Override(re.compile(""), None)))
    return QuantizationConfig(default, tuple(overrides))


def _compressed_tensors_scheme(group: Mapping[str, Any], checkpoint_format: str) -> Scheme:
    name = str(group.get("format") or checkpoint_format)
    if name != "pack-quantized":
        raise CheckpointError(f"compressed-tensors format={name!r} is not INT4; only pack-quantized can be read")
    weights = _need(group, "weights")
    _four_bits(weights.get("num_bits"))
    if weights.get("type", "int") != "int":
        raise CheckpointError(f"weights.type={weights['type']!r} is not INT4; only int can be read")
    strategy = weights.get("strategy") or ("group" if weights.get("group_size") else "channel")
    if strategy not in ("group", "channel"):
        raise CheckpointError(f"weights.strategy={strategy!r} cannot be read; known: group, channel")
    return Scheme(
        format="pack-quantized",
        group_size=_group_size(weights.get("group_size")) if strategy == "group" else -1,
        symmetric=bool(weights.get("symmetric", True)),
        act_order=str(weights.get("actorder") or "").lower() in ("group", "dynamic"),
    )


def _target(name: str) -> re.Pattern[str]:
    """compressed-tensors names a layer whole, or by "re:" and a regular expression matched from its beginning."""
    if name.startswith("re:"):
        return _compile(name[3:])
    return _compile(rf"(?:.*\.)?{re.escape(name)}$")


def _compile(expression: str) -> re.Pattern[str]:
    try:
        return re.compile(expression)
    except re.error as error:
        raise CheckpointError(f"{expression!r} in quantization_config is no regular expression: {error}") from None
