"""A causal language model that is computed one decoder block at a time, so that only one block is ever in memory.

The architecture comes from transformers, built without weights; the weights come from a `Checkpoint`, whatever its
format. It works for every model whose body is `embed_tokens`, `layers`, `norm` (and rotary embeddings made from the
configuration): Llama, Mistral, Qwen, and their like.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from tokenmill.errors import CheckpointError, MissingDependencyError
from tokenmill.quant.checkpoint import Checkpoint

#: Hidden states [batch, tokens, hidden] to hidden states.
BlockForward = Callable[[torch.Tensor], torch.Tensor]


class ParameterSource(Protocol):
    """Anything that has the model's parameters by name, such as a `Checkpoint`."""

    def parameter(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """The parameter in the given dtype."""
        ...


class _CaughtArgumentsError(Exception):
    """Carries what a decoder block was called with out of the model's forward."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.arguments = arguments


class _Catcher(nn.Module):
    """Stands in for a decoder block, whose attention kind decides which mask the model passes."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        for name in ("attention_type", "layer_type", "is_sliding"):
            if hasattr(block, name):
                setattr(self, name, getattr(block, name))

    def forward(self, hidden: torch.Tensor, **arguments: Any) -> None:
        raise _CaughtArgumentsError(arguments)


class StreamedModel:
    """One model, ready to be run block by block.

    Args:
        checkpoint: Where configuration, tokenizer and weights are.
        device: Where to compute.
        dtype: What to compute in; None is float32 on a CPU and the checkpoint's own dtype on a GPU.

    Raises:
        MissingDependencyError: transformers is not installed.
        CheckpointError: The architecture is unknown or is built differently.
    """

    def __init__(self, checkpoint: Checkpoint, device: str = "cpu", dtype: torch.dtype | None = None) -> None:
        transformers = _transformers()
        self.checkpoint = checkpoint
        self.device = torch.device(device)
        settings = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
        try:
            config = transformers.AutoConfig.for_model(**settings)
            self.stored_dtype: torch.dtype = getattr(torch, str(config.dtype or "bfloat16").removeprefix("torch."))
            self.dtype = dtype or (torch.float32 if self.device.type == "cpu" else self.stored_dtype)
            with torch.device("meta"):
                self._skeleton = transformers.AutoModelForCausalLM.from_config(
                    config, dtype=self.dtype, attn_implementation="sdpa"
                ).eval()
            self._body = self._skeleton.get_decoder()
            self._blocks: nn.ModuleList = self._body.layers
            rotary = getattr(self._body, "rotary_emb", None)
            if rotary is not None:
                self._body.rotary_emb = type(rotary)(config=config).to(self.device)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(f"{checkpoint.path} cannot be run block by block: {reason}") from None
        self.config = config
        self._prefixes: dict[int, str] = {id(module): name for name, module in self._skeleton.named_modules()}
        self._arguments: dict[tuple[str, torch.Size], dict[str, Any]] = {}
        self._body.embed_tokens = self._load(self._body.embed_tokens, checkpoint)

    @property
    def num_blocks(self) -> int:
        """Number of decoder blocks."""
        return len(self._blocks)

    def block_name(self, index: int) -> str:
        """What the block's parameters are named after, e.g. `model.layers.3`."""
        return self._prefixes[id(self._blocks[index])]

    def block_parameters(self, index: int) -> tuple[str, ...]:
        """Full names of the block's parameters in the dense model."""
        return tuple(f"{self.block_name(index)}.{name}" for name, _ in self._blocks[index].named_parameters())

    def parameters(self) -> tuple[str, ...]:
        """Full names of all parameters of the dense model."""
        return tuple(name for name, _ in self._skeleton.named_parameters())

    def _load(self, module: nn.Module, source: ParameterSource) -> nn.Module:
        """A copy of a weightless module with its parameters from `source`."""
        prefix = self._prefixes[id(module)]
        names = [name for name, _ in module.named_parameters()]
        # Copies, because a parameter of the same dtype is the mapped file itself and blocks are changed in place.
        weights = {name: source.parameter(f"{prefix}.{name}", self.dtype).to(self.device, copy=True) for name in names}
        for name, parameter in module.named_parameters():
            if parameter.shape != weights[name].shape:
                found, wanted = list(weights[name].shape), list(parameter.shape)
                raise CheckpointError(f"{prefix}.{name} has shape {found}; config.json makes it {wanted}")
        loaded = copy.deepcopy(module)
        loaded.load_state_dict(weights, strict=False, assign=True)
        return loaded.requires_grad_(False)

    def block(self, index: int, source: ParameterSource | None = None) -> nn.Module:
        """One decoder block with its weights, from `source` if not the checkpoint.

        Raises:
            CheckpointError: A weight is missing or has another shape than the configuration says.
        """
        return self._load(self._blocks[index], source or self.checkpoint)

    def forward(self, index: int, block: nn.Module) -> BlockForward:
        """The function of one block on hidden states [batch, tokens, hidden]: causal, every position attended."""

        def run(hidden: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                output = block(hidden, **self._block_arguments(index, hidden.shape))
            result: torch.Tensor = output[0] if isinstance(output, tuple) else output
            return result

        return run

    def _block_arguments(self, index: int, shape: torch.Size) -> dict[str, Any]:
        """What the model itself passes to the block beside the hidden states: masks, positions, rotary tables."""
        kind = str(getattr(self._blocks[index], "attention_type", ""))
        key = (kind, shape[:2])
        if key not in self._arguments:
            self._body.layers = nn.ModuleList([_Catcher(self._blocks[index])])
            try:
                tokens = torch.zeros(shape[:2], dtype=torch.long, device=self.device)
                with torch.no_grad():
                    self._body(input_ids=tokens, use_cache=False)
            except _CaughtArgumentsError as caught:
                self._arguments[key] = caught.arguments
            finally:
                self._body.layers = self._blocks
        return self._arguments[key]

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Token ids [batch, tokens] to the first block's hidden states."""
        embedded: torch.Tensor = self._body.embed_tokens(tokens.to(self.device))
        return embedded

    def head(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """The function from the last block's hidden states to logits [batch, tokens, vocabulary]."""
        norm = self._load(self._body.norm, self.checkpoint)
        output = self._skeleton.get_output_embeddings()
        if self.config.tie_word_embeddings:
            weight = self._body.embed_tokens.weight
        else:
            weight = self._load(output, self.checkpoint).weight

        def logits(hidden: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                return nn.functional.linear(norm(hidden), weight)

        return logits

    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer.

        Raises:
            CheckpointError: It has none, or one that transformers cannot load.
        """
        return load_tokenizer(self.checkpoint.path)

    def hidden_states(self, tokens: list[torch.Tensor]) -> list[torch.Tensor]:
        """What comes out of the last block, for `head`.

        Args:
            tokens: Batches of token ids [batch, tokens].
        """
        hidden = [self.embed(batch) for batch in tokens]
        for index in range(self.num_blocks):
            run = self.forward(index, self.block(index))
            hidden = [run(batch) for batch in hidden]
        return hidden


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a model directory.

    Raises:
        MissingDependencyError: transformers is not installed.
        CheckpointError: There is none, or one that transformers cannot load.
    """
    transformers = _transformers()
    try:
        return transformers.AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except Exception as error:  # noqa: BLE001 (tokenizers raises bare Exception for damaged files)
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path} has no tokenizer that can be loaded: {reason}") from None


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise MissingDependencyError("transformers", "cpu", "running a model block by block") from None
    return transformers
