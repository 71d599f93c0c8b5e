"""What transformers makes of a config.json: its configuration, the class that computes it, and the names of its parts.

A model that reads pictures or hears is a language model, which is quantized, and towers and projectors, which are not.
A checkpoint may call its tensors otherwise than the model's modules: those of LLaVA, Gemma 3 and Qwen2.5-VL are older
than transformers' modules, which it renames as it loads. What is written keeps the checkpoint's names.
"""

from collections.abc import Iterable, Mapping
from typing import Any

#: Linears in the blocks that stay in floating point, here and in vLLM: they choose experts, or weigh them.
ROUTERS = ("gate", "router", "shared_expert_gate")


def read_config(settings: Mapping[str, Any]) -> Any:
    """The configuration that a config.json describes; what its quantization_config says is left away."""
    from transformers import AutoConfig

    kept = {key: _number(value) for key, value in settings.items() if key != "quantization_config"}
    return AutoConfig.for_model(**kept)


def _number(value: Any) -> Any:
    """transformers writes numbers that JSON does not have, such as Mamba's infinity, as objects."""
    if isinstance(value, list):
        return [_number(item) for item in value]
    if isinstance(value, dict):
        return float(value["__float__"]) if value.keys() == {"__float__"} else {k: _number(v) for k, v in value.items()}
    return value


def text_config(config: Any) -> Any:
    """The configuration of the language model: itself where there is nothing else."""
    return config.get_text_config(decoder=True)


def auto_class(config: Any) -> tuple[Any, bool]:
    """The class of transformers that builds the model, and whether it has more than a language model."""
    import transformers

    # Before version 5 of transformers, models that hear are known by their text alone.
    multimodal = getattr(transformers, "AutoModelForMultimodalLM", transformers.AutoModelForImageTextToText)
    is_multimodal = text_config(config) is not config and type(config) in multimodal._model_mapping
    return (multimodal if is_multimodal else transformers.AutoModelForCausalLM), is_multimodal


def stored_names(model: Any, stored: Iterable[str]) -> dict[str, str]:
    """What the model calls the tensors of a checkpoint, to what the checkpoint calls them.

    Args:
        model: A model of transformers; its parameters may be without memory.
        stored: Names of the checkpoint's tensors; those for which the model has no place are renamed all the same.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key
    except ImportError:  # before version 5 modules were called as in the checkpoint
        return {name: name for name in stored}
    renamings = [change for change in get_model_conversion_mapping(model) if isinstance(change, WeightRenaming)]
    own: dict[str, Any] = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    prefix = model.base_model_prefix
    names = {}
    for name in stored:
        renamed, _ = rename_source_key(name, renamings, [], prefix, own) if prefix else (name, None)
        names[renamed if renamed in own or name not in own else name] = name
    return names


def beside(model: Any, language: str) -> tuple[str, ...]:
    """Paths of the modules and parameters that stand beside the language model and its output head, outermost only.

    Args:
        model: The whole.
        language: Path of the language model in it.
    """
    head = model.get_output_embeddings()
    found: list[str] = []
    path, parent = "", model
    for part in language.split("."):
        children = [name for name, child in parent.named_children() if name != part and child is not head]
        own = [name for name, _ in (*parent.named_parameters(recurse=False), *parent.named_buffers(recurse=False))]
        found += [f"{path}{name}" for name in (*children, *own)]
        path, parent = f"{path}{part}.", parent.get_submodule(part)
    return tuple(found)
