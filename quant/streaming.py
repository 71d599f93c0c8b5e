"""A causal language model that is computed one decoder block at a time, so that only one block is ever in memory.

The architecture comes from transformers, built without weights; the weights come from a `Checkpoint`, whatever its
format. Nothing of a model is rebuilt here: its own forward computes the embedding, what it passes to its blocks and
the logits, while other modules stand in for the blocks. It works for every model whose body keeps its blocks in one
list and passes nothing of the text to them but the hidden states (Llama, Qwen, Gemma, Phi, OPT, Granite, Cohere, and
their like, also within models that read pictures); that is checked with a few tokens before anything is computed.
"""

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Any, Protocol

import torch
from torch import nn

from tokenmill.errors import CheckpointError, MissingDependencyError, TokenmillError
from tokenmill.quant import nf4
from tokenmill.quant.architecture import auto_class, beside, read_config, stored_names, text_config
from tokenmill.quant.checkpoint import Checkpoint
from tokenmill.quant.experts import separate
from tokenmill.quant.stand_in import (
    BlockForward,
    Call,
    FirstBlockReachedError,
    StandIn,
    Visit,
    parameters_without_memory,
    run_block,
    same,
)

#: Of what transformers says when it refuses something: it goes on with all that it would have taken.
_REASON_CHARACTERS = 300
#: Tokens with which a model's structure is checked.
_PROBE_TOKENS = 4
#: What models call the list of their blocks; most of them the first.
_BLOCK_LISTS = ("layers", "h", "blocks")


class ParameterSource(Protocol):
    """Anything that has the model's parameters by name, such as a `Checkpoint`."""

    def parameter(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """The parameter in the given dtype."""
        ...


class StreamedModel:
    """One model, ready to be run block by block.

    Args:
        checkpoint: Where configuration, tokenizer and weights are.
        device: Where to compute.
        dtype: What to compute in; None is float32 on a CPU and the checkpoint's own dtype on a GPU.

    Raises:
        MissingDependencyError: transformers is not installed.
        CheckpointError: The architecture is unknown or cannot be computed block by block, or the checkpoint lacks a
            weight of it.
    """

    def __init__(self, checkpoint: Checkpoint, device: str = "cpu", dtype: torch.dtype | None = None) -> None:
        _transformers()
        self.checkpoint = checkpoint
        self.device = torch.device(device)
        try:
            config = read_config(checkpoint.config)
            self.text_config = text_config(config)
            stored_dtype = config.dtype or self.text_config.dtype or "bfloat16"
            self.stored_dtype: torch.dtype = getattr(torch, str(stored_dtype).removeprefix("torch."))
            self.dtype = dtype or (torch.float32 if self.device.type == "cpu" else self.stored_dtype)
            # The fused attention that transformers prefers knows no cap on its logits and leaves it out.
            attention = "eager" if getattr(self.text_config, "attn_logit_softcapping", None) else None
            auto, is_multimodal = auto_class(config)
            with parameters_without_memory():
                self._skeleton = auto.from_config(config, dtype=self.dtype, attn_implementation=attention).eval()
                separate(self._skeleton)
            self._body = self._skeleton.get_decoder()
            self._list = next((name for name in _BLOCK_LISTS if hasattr(self._body, name)), _BLOCK_LISTS[0])
            self._blocks: nn.ModuleList = getattr(self._body, self._list)
            self.config = config
            self._calls: dict[torch.Size, list[Call]] = {}
            self._wrap: Callable[[torch.Tensor], Any] = lambda hidden: hidden  # hidden states as a block returns them
            self._prefixes: dict[int, str] = {id(module): name for name, module in self._skeleton.named_modules()}
            known = (*checkpoint.tensors, *(f"{layer}.weight" for layer in checkpoint.layers))
            self._stored_names = stored_names(self._skeleton, known)
            self._beside: tuple[str, ...] = ()
            self._unquantized: list[str] = []
            if is_multimodal:
                self._set_aside()
            self._move_buffers()
            self._places = self._find_parameters()
            self._load_body()
            self._check_structure()
        except TokenmillError:
            raise
        except Exception as error:  # an architecture that is not as expected may raise anything
            if lacks_memory(error):
                raise
            reason = shorten(str(error), _REASON_CHARACTERS, placeholder=" ...") or type(error).__name__
            raise CheckpointError(f"{checkpoint.path} cannot be run block by block: {reason}") from None

    @property
    def num_blocks(self) -> int:
        """Number of decoder blocks."""
        return len(self._blocks)

    def block_name(self, index: int) -> str:
        """What the block's parameters are named after, e.g. `model.layers.3`."""
        return self._prefixes[id(self._blocks[index])]

    def skeleton(self, index: int) -> nn.Module:
        """The block without weights."""
        return self._blocks[index]

    def block_parameters(self, index: int) -> tuple[str, ...]:
        """Full names of the block's parameters in the dense model."""
        return tuple(f"{self.block_name(index)}.{name}" for name, _ in self._blocks[index].named_parameters())

    def stored_name(self, name: str) -> str:
        """What the checkpoint calls a parameter of the model; the same where it has none."""
        return self._stored_names.get(name, name)

    def other_parameters(self) -> tuple[str, ...]:
        """The checkpoint's names of the language model's parameters outside the blocks."""
        return tuple(self.stored_name(name) for name in self._places)

    def unquantized(self) -> tuple[str, ...]:
        """Last names of the modules that stand beside the language model, such as `vision_tower`; may be empty."""
        return tuple(self._unquantized)

    def _set_aside(self) -> None:
        """Takes out what stands beside the language model: it is not run, and models ask it where they compute."""
        self._beside = beside(self._skeleton, self._prefixes[id(self._body)])
        for path in self._beside:
            outer, _, name = path.rpartition(".")
            parent = self._skeleton.get_submodule(outer)
            if name in parent._modules:
                setattr(parent, name, StandIn(parent.get_submodule(name), _unreachable, self._wrap))
                self._unquantized.append(name)

    def tensors_beside(self) -> dict[str, torch.Tensor]:
        """What the checkpoint has of the modules beside the language model, by its own names, as it is.

        Raises:
            CheckpointError: A tensor is damaged.
        """
        tensors = self.checkpoint.tensors
        names = [stored for name, stored in self._stored_names.items() if self._is_beside(name) and stored in tensors]
        in_nf4 = [name for name in names if nf4.is_quantized(name, tensors)]
        taken = {part for name in in_nf4 for part in nf4.parts(name, tensors)}
        found = {name: self.checkpoint.tensor(name) for name in names if name not in taken}
        return found | {name: self.checkpoint.parameter(name, self.stored_dtype) for name in in_nf4}

    def _is_beside(self, name: str) -> bool:
        return any(name == path or name.startswith(f"{path}.") for path in self._beside)

    def left_out(self) -> tuple[str, ...]:
        """A line about each kind of tensor that the checkpoint holds and the model has no place for; may be empty."""
        own = dict(self._skeleton.named_parameters(remove_duplicate=False)) | dict(self._skeleton.named_buffers())
        taken = {part for name in own for part in nf4.parts(self.stored_name(name), self.checkpoint.tensors)}
        # Rotary frequencies, which old checkpoints hold, are computed.
        spare = {
            stored: name
            for name, stored in self._stored_names.items()
            if stored in self.checkpoint.tensors and stored not in taken and not self._is_beside(name)
            if not stored.endswith("rotary_emb.inv_freq")
        }
        blocks = self._prefixes[id(self._blocks)]
        index = re.compile(rf"{re.escape(blocks)}\.(\d+)\.")
        found = {stored: int(place[1]) for stored, name in spare.items() if (place := index.match(name))}
        beyond = [name for name, i in found.items() if i >= self.num_blocks]
        lines = []
        if beyond:
            last = max(found[name] for name in beyond)
            lines.append(
                f"{blocks}.{min(found[name] for name in beyond)} to {last} ({self._amount(beyond)}): "
                f"config.json has num_hidden_layers={self.num_blocks}"
            )
        if rest := [name for name in spare if name not in beyond]:
            lines.append(
                f"{self._amount(rest)} for which model_type={self.config.model_type!r} has no place: "
                f"{', '.join(rest[:3])}{', ...' if len(rest) > 3 else ''}"
            )
        return tuple(lines)

    def _amount(self, names: list[str]) -> str:
        size = sum(self.checkpoint.tensors[name].num_bytes for name in names)
        return f"{len(names)} tensor{'s' * (len(names) > 1)} of {size:,} bytes"

    def _move_buffers(self) -> None:
        """Rotary frequencies, scales of embeddings and the like, which no checkpoint holds, to the device."""
        for module in self._skeleton.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(self.device)
        blocks = self._prefixes[id(self._blocks)] + "."
        for name in dict(self._skeleton.named_buffers()).keys() & self._skeleton.state_dict().keys():
            if self._is_stored(name) and not self._is_beside(name) and not name.startswith(blocks):
                raise ValueError(f"it stores the buffer {name}")

    def _is_stored(self, name: str) -> bool:
        return self.stored_name(name) in self.checkpoint.tensors

    def block_buffers(self, index: int) -> tuple[str, ...]:
        """Names within the block of the buffers that the checkpoint has, such as what corrects a router's choice."""
        prefix, block = self.block_name(index), self._blocks[index]
        kept = block.state_dict().keys()
        return tuple(name for name, _ in block.named_buffers() if name in kept and self._is_stored(f"{prefix}.{name}"))

    def _find_parameters(self) -> dict[str, tuple[str, ...]]:
        """What the checkpoint calls each parameter outside the blocks, to all its places in the model."""
        in_blocks = {name for index in range(self.num_blocks) for name in self.block_parameters(index)}
        shared: dict[int, list[str]] = {}
        for name, parameter in self._skeleton.named_parameters(remove_duplicate=False):
            if not self._is_beside(name):
                shared.setdefault(id(parameter), []).append(name)
        places = {}
        for names in shared.values():
            stored = [name for name in names if self.checkpoint.has_parameter(self.stored_name(name))]
            if not stored:
                kind = self.config.model_type
                raise CheckpointError(
                    f"{self.checkpoint.path} has no tensor {names[0]}, which model_type={kind!r} needs; "
                    "the checkpoint is incomplete or stores it in another form"
                )
            for name in stored[1:]:
                if not torch.equal(self._read(name), self._read(stored[0])):
                    raise CheckpointError(
                        f"{self.checkpoint.path}: config.json ties {stored[0]} and {name}, which differ; "
                        "set tie_word_embeddings to false"
                    )
            if stored[0] not in in_blocks:
                places[stored[0]] = tuple(names)
        return places

    def _read(self, name: str) -> torch.Tensor:
        return self._checked(name, self._skeleton.get_parameter(name), self.checkpoint)

    def _checked(self, name: str, wanted: nn.Parameter, source: ParameterSource) -> torch.Tensor:
        # A copy, because a parameter of the same dtype is the mapped file itself and blocks are changed in place.
        stored = self.stored_name(name)
        found = source.parameter(stored, self.dtype).to(self.device, copy=True)
        if found.shape != wanted.shape:
            raise CheckpointError(f"{stored} has shape {list(found.shape)}; config.json makes it {list(wanted.shape)}")
        return found

    def _load_body(self) -> None:
        """Gives the body's own parameters their values; those of the head come with `head`."""
        body = self._prefixes[id(self._body)] + "."
        for stored, places in self._places.items():
            if any(place.startswith(body) for place in places):
                parameter = nn.Parameter(self._read(stored), requires_grad=False)
                for place in places:
                    module, _, name = place.rpartition(".")
                    self._skeleton.get_submodule(module).register_parameter(name, parameter)

    def block(self, index: int, source: ParameterSource | None = None) -> nn.Module:
        """One decoder block with its weights, from `source` if not the checkpoint.

        Raises:
            CheckpointError: A weight is missing, not finite, or of another shape than the configuration says.
        """
        prefix, block = self.block_name(index), self._blocks[index]
        weights = {
            name: self._checked(f"{prefix}.{name}", parameter, source or self.checkpoint)
            for name, parameter in block.named_parameters()
        }
        for name in self.block_buffers(index):  # in the dtype of the file, on which a router's choice depends
            stored = self.stored_name(f"{prefix}.{name}")
            dtype = self.checkpoint.tensor(stored).dtype
            weights[name] = (source or self.checkpoint).parameter(stored, dtype).to(self.device, copy=True)
        loaded = copy.deepcopy(block)
        loaded.load_state_dict(weights, strict=False, assign=True)
        return loaded.requires_grad_(False)

    def forward(self, index: int, block: nn.Module) -> BlockForward:
        """The function of one block on hidden states [batch, tokens, hidden]: causal, every position attended."""

        def run(hidden: torch.Tensor) -> torch.Tensor:
            output = run_block(block, hidden, self._block_call(index, hidden.shape[:2]))
            result: torch.Tensor = output[0] if isinstance(output, tuple) else output
            return result

        return run

    def _block_call(self, index: int, shape: torch.Size) -> Call:
        """What the model itself passes to the block beside hidden states of [batch, tokens]."""
        if shape not in self._calls:
            tokens = torch.zeros(shape, dtype=torch.long, device=self.device)
            calls: list[Call] = []

            def note(_index: int, hidden: torch.Tensor, call: Call) -> torch.Tensor:
                calls.append(call)
                return hidden

            with torch.no_grad(), self._in_place_of_blocks(note):
                self._body(input_ids=tokens, use_cache=False)
            self._calls[shape] = calls
        return self._calls[shape][index]

    @contextmanager
    def _in_place_of_blocks(self, visit: Visit) -> Iterator[None]:
        """Within it the model's forward calls `visit` instead of each block."""
        stand_ins = [StandIn(block, partial(visit, i), self._wrap) for i, block in enumerate(self._blocks)]
        setattr(self._body, self._list, nn.ModuleList(stand_ins))
        try:
            yield
        finally:
            setattr(self._body, self._list, self._blocks)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Token ids [batch, tokens] to the first block's hidden states."""
        return self._first_call(tokens)[0]

    def _first_call(self, tokens: torch.Tensor) -> tuple[torch.Tensor, Call]:
        def stop(_index: int, hidden: torch.Tensor, call: Call) -> torch.Tensor:
            raise FirstBlockReachedError(hidden, call)

        try:
            with torch.no_grad(), self._in_place_of_blocks(stop):
                self._body(input_ids=tokens.to(self.device), use_cache=False)
        except FirstBlockReachedError as reached:
            return reached.hidden, reached.call
        raise ValueError("its forward runs no block")

    def head(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """The function from the last block's hidden states to logits [batch, tokens, vocabulary].

        Raises:
            CheckpointError: A weight is missing, not finite, or of another shape than the configuration says.
        """
        weights = self._head_weights()

        def logits(hidden: torch.Tensor) -> torch.Tensor:
            tokens = torch.zeros(hidden.shape[:2], dtype=torch.long, device=self.device)
            with self._in_place_of_blocks(lambda _index, _hidden, _call: hidden):
                return self._logits(tokens, weights)

        return logits

    def _head_weights(self) -> dict[str, torch.Tensor]:
        """The parameters that are not of the body, by their places."""
        unread = {name for name, parameter in self._skeleton.named_parameters() if parameter.is_meta}
        stored = {name: places for name, places in self._places.items() if unread & set(places)}
        return {place: tensor for name in stored for tensor in [self._read(name)] for place in stored[name]}

    def _logits(self, tokens: torch.Tensor, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            keywords = {"input_ids": tokens, "use_cache": False}
            output = torch.func.functional_call(self._skeleton, dict(weights), kwargs=keywords)
        result: torch.Tensor = output.logits
        return result

    def _check_structure(self) -> None:
        """Proves with a few tokens that the model is its embedding, its blocks one after the other, and its head.

        Raises:
            ValueError: It is something else; says what.
        """
        vocabulary = self._skeleton.get_input_embeddings().weight.shape[0]
        tokens = torch.linspace(1, vocabulary - 1, _PROBE_TOKENS, device=self.device).long().unsqueeze(0)
        output = run_block(self.block(0), *self._first_call(tokens))
        if isinstance(output, tuple):
            # Besides there may be weights of attention or caches; a model that reads them does not get past the check.
            self._wrap = lambda hidden: (hidden, *(None for _ in output[1:]))
        weights = self._head_weights()
        states = torch.randn(self.num_blocks, *self.embed(tokens).shape, generator=torch.Generator().manual_seed(0))
        states = states.to(self.device, self.dtype)
        traces = []
        for probe in (tokens, torch.zeros_like(tokens)):
            calls: list[Call] = []

            def note(index: int, hidden: torch.Tensor, call: Call, calls: list[Call] = calls) -> torch.Tensor:
                if index != len(calls):
                    raise ValueError(f"it runs block {index} where block {len(calls)} is due")
                if index and not torch.equal(hidden, states[index - 1]):
                    raise ValueError(f"it changes the hidden states between blocks {index - 1} and {index}")
                calls.append(call)
                return states[index]

            with self._in_place_of_blocks(note):
                traces.append((calls, self._logits(probe, weights)))
            if len(calls) != self.num_blocks:
                raise ValueError(f"it runs {len(calls)} of its {self.num_blocks} blocks")
        for index, (one, other) in enumerate(zip(traces[0][0], traces[1][0], strict=True)):
            arguments = ((*call.arguments, *sorted(call.keywords.items())) for call in (one, other))
            if not same(*arguments):
                raise ValueError(f"it passes more of the text to block {index} than hidden states")
        if not torch.equal(traces[0][1], traces[1][1]):
            raise ValueError("its head reads more of the text than hidden states")

    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer.

        Raises:
            CheckpointError: It has none, or one that transformers cannot load.
        """
        return load_tokenizer(self.checkpoint.path)

    def tokenize(self, text: str) -> list[int]:
        """The ids of a text's tokens, without special ones.

        Raises:
            CheckpointError: There is no tokenizer that can be loaded, or it is another model's.
        """
        tokens: list[int] = self.tokenizer()(text, add_special_tokens=False, verbose=False)["input_ids"]
        vocabulary = self._skeleton.get_input_embeddings().weight.shape[0]
        if (largest := max(tokens, default=0)) >= vocabulary:
            raise CheckpointError(
                f"{self.checkpoint.path} has a tokenizer that gives the token {largest}, and a vocabulary of "
                f"{vocabulary}: they are of different models"
            )
        return tokens

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


def _unreachable(_hidden: torch.Tensor, _call: Call) -> torch.Tensor:
    raise ValueError("it runs for text what reads pictures or sound")


def lacks_memory(error: BaseException) -> bool:
    """Whether this is what Python or torch raise where memory does not suffice; on a CPU torch says it in words."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


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
        reason = shorten(str(error), _REASON_CHARACTERS, placeholder=" ...") or type(error).__name__
        raise CheckpointError(f"{path} has no tokenizer that can be loaded: {reason}") from None


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise MissingDependencyError("transformers", "cpu", "running a model block by block") from None
    return transformers
