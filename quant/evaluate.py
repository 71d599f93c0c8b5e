"""Perplexity of a causal language model on a text, in nats, per token and per byte.

Bits per byte compare models with different tokenizers; perplexity per token is what papers print.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from tokenmill.errors import InputError
from tokenmill.quant.streaming import StreamedModel


@dataclass(frozen=True)
class Perplexity:
    """How well a text was predicted.

    Attributes:
        nats: Negative log-likelihood of all its tokens.
        num_tokens: Number of predicted tokens.
        num_bytes: Length of the text in UTF-8.
    """

    nats: float
    num_tokens: int
    num_bytes: int

    @property
    def per_token(self) -> float:
        """exp of the mean negative log-likelihood of a token."""
        return math.exp(min(self.nats / self.num_tokens, 700.0))

    @property
    def bits_per_byte(self) -> float:
        """Bits needed for a byte of the text."""
        return self.nats / math.log(2) / self.num_bytes


def windows(tokens: Sequence[int], start: int, length: int) -> list[torch.Tensor]:
    """Cuts a text's tokens so that each of them is predicted exactly once.

    Args:
        tokens: The text's token ids.
        start: The id that stands before the text (its beginning-of-sequence token).
        length: Most tokens in a window.

    Returns:
        Windows [1, <= length]; each begins with the last token of the one before it, the first with `start`.

    Raises:
        InputError: There are no tokens, or length is below 2.
    """
    if not tokens or length < 2:
        raise InputError(f"{len(tokens)} tokens in windows of {length}: need at least one token and length 2")
    whole = torch.tensor([start, *tokens])
    return [whole[i : i + length].unsqueeze(0) for i in range(0, len(tokens), length - 1)]


def text_windows(model: StreamedModel, text: str, length: int) -> list[torch.Tensor]:
    """`windows` of a text with the model's own tokenizer.

    Raises:
        InputError: The text is empty.
        CheckpointError: There is no tokenizer that can be loaded, or it is another model's.
    """
    tokenizer = model.tokenizer()
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return windows(model.tokenize(text), 0 if start is None else start, length)


def negative_log_likelihood(
    head: Callable[[torch.Tensor], torch.Tensor], hidden: Sequence[torch.Tensor], tokens: Sequence[torch.Tensor]
) -> float:
    """Nats of all predicted tokens.

    Args:
        head: Hidden states to logits.
        hidden: The last block's states of each window [1, T, hidden].
        tokens: The windows [1, T].
    """
    total = 0.0
    for states, window in zip(hidden, tokens, strict=True):
        logits = head(states[:, :-1])[0].float()
        targets = window[0, 1:].to(logits.device)
        total += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum").double())
    return total


def count(text: str, tokens: Sequence[torch.Tensor], nats: float) -> Perplexity:
    """Puts a likelihood in relation to the text it belongs to."""
    return Perplexity(nats, sum(window.shape[1] - 1 for window in tokens), len(text.encode()))


def perplexity(model: StreamedModel, text: str, length: int = 2048) -> Perplexity:
    """Runs a text through the model, block by block.

    Args:
        model: The model; quantized weights are dequantized as they are loaded.
        text: What to predict.
        length: Tokens in a window; no more than the model was made for.

    Raises:
        InputError: The text is empty.
        CheckpointError: The checkpoint is damaged.
    """
    tokens = text_windows(model, text, length)
    return count(text, tokens, negative_log_likelihood(model.head(), model.hidden_states(tokens), tokens))
