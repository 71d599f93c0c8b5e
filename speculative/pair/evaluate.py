"""What a pair is worth: bits per byte of held-out text, and how many guesses of the draft the target would take."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import tokenizers
import torch
from torch import Tensor
from torch.nn import functional

from tokenmill.speculative.pair.corpus import Corpus, Document
from tokenmill.speculative.pair.data import encode
from tokenmill.speculative.pair.model import Llama

#: Sequences per forward pass while measuring.
_BATCH = 8
#: Prompts taken from the held-out text, their length, and how far the target continues each, in tokens.
_PROMPTS, _PROMPT_LENGTH, _CONTINUATION = 24, 96, 64
#: Tokens that the draft guesses per round.
DEPTH = 4


@dataclass(frozen=True)
class Figures:
    """Measured on held-out documents only.

    Attributes:
        target_bits: Bits per byte of the target, on source files and on chat pairs.
        draft_bits: The draft's.
        acceptance: For each position in a round of greedy drafting, the share of rounds in which the draft's guess
            there, and all before it, was the target's greedy token.
        tokens_per_round: Mean tokens per pass of the target: accepted guesses and the target's own one.
    """

    target_bits: dict[str, float]
    draft_bits: dict[str, float]
    acceptance: tuple[float, ...]
    tokens_per_round: float

    def as_text(self) -> str:
        """Four lines for people."""
        return "\n".join(
            [
                *(
                    f"held-out bits per byte, {kind:<6}: target {self.target_bits[kind]:.3f}, "
                    f"draft {self.draft_bits[kind]:.3f}"
                    for kind in self.target_bits
                ),
                "greedy acceptance by position    : " + ", ".join(f"{share:.3f}" for share in self.acceptance),
                f"tokens per pass of the target    : {self.tokens_per_round:.2f} at {len(self.acceptance)} guesses",
            ]
        )


@torch.no_grad()
def bits_per_byte(model: Llama, tokenizer: tokenizers.Tokenizer, documents: Sequence[Document], window: int) -> float:
    """Cross-entropy of the documents in bits per byte of UTF-8, each token seen with at most `window` before it.

    The end-of-text markers between documents are predicted, too, and count as no bytes; the padding counts nothing.
    """
    stream = encode(documents, tokenizer)
    windows = torch.split(stream[:-1], window)
    labels = torch.split(stream[1:], window)
    nats = 0.0
    for start in range(0, len(windows), _BATCH):
        ids = torch.nn.utils.rnn.pad_sequence(list(windows[start : start + _BATCH]), batch_first=True)
        wanted = torch.nn.utils.rnn.pad_sequence(
            list(labels[start : start + _BATCH]), batch_first=True, padding_value=-100
        )
        logits = model(ids)
        nats += functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum").item()
    return nats / math.log(2) / sum(len(document.text.encode()) for document in documents)


@torch.no_grad()
def continue_greedily(model: Llama, prompts: Tensor, tokens: int) -> Tensor:
    """The prompts [n, length] with the model's most likely continuation, [n, length + tokens]."""
    for _ in range(tokens):
        prompts = torch.cat([prompts, model(prompts)[:, -1:].argmax(-1)], dim=1)
    return prompts


def continue_text(model: Llama, tokenizer: tokenizers.Tokenizer, prompt: str, tokens: int) -> str:
    """The prompt with the model's most likely continuation."""
    ids = torch.tensor([tokenizer.encode(prompt, add_special_tokens=False).ids])
    text: str = tokenizer.decode(continue_greedily(model, ids, tokens)[0].tolist(), skip_special_tokens=False)
    return text


def draft_rounds(matches: Sequence[bool], depth: int) -> list[int]:
    """Accepted guesses per round of greedy speculation along one text.

    Args:
        matches: For each token of the target's greedy text, whether the draft, given the text before it, has the
            same first choice. Along accepted guesses the draft reads that very text, so this says all there is to know.
        depth: Guesses per round. A round takes guesses up to the first wrong one, and then one token of the target;
            the last round counts only if the text has room for all of its guesses.
    """
    rounds = []
    position = 0
    while position + depth <= len(matches):
        accepted = 0
        while accepted < depth and matches[position + accepted]:
            accepted += 1
        rounds.append(accepted)
        position += accepted + 1
    return rounds


@torch.no_grad()
def acceptance(
    target: Llama, draft: Llama, prompts: Tensor, tokens: int, depth: int
) -> tuple[tuple[float, ...], float]:
    """Greedy acceptance by position, and mean tokens per round, over the target's own continuations of the prompts."""
    text = continue_greedily(target, prompts, tokens)
    guesses = draft(text[:, :-1]).argmax(-1)[:, -tokens:]
    matches = (guesses == text[:, -tokens:]).tolist()
    rounds = [accepted for row in matches for accepted in draft_rounds(row, depth)]
    by_position = tuple(sum(r > position for r in rounds) / len(rounds) for position in range(depth))
    return by_position, 1 + sum(rounds) / len(rounds)


def measure(target: Llama, draft: Llama, tokenizer: tokenizers.Tokenizer, corpus: Corpus, window: int) -> Figures:
    """All figures of a pair, on the CPU in float32."""
    held_out = corpus.part("held_out")
    kinds = {
        "source": [document for document in held_out if not document.is_chat],
        "chat": [document for document in held_out if document.is_chat],
    }
    stream = encode(held_out, tokenizer)
    starts = torch.linspace(0, len(stream) - _PROMPT_LENGTH, _PROMPTS).long()
    prompts = torch.stack([stream[start : start + _PROMPT_LENGTH] for start in starts.tolist()])
    by_position, per_round = acceptance(target, draft, prompts, _CONTINUATION, DEPTH)
    return Figures(
        {kind: bits_per_byte(target, tokenizer, documents, window) for kind, documents in kinds.items()},
        {kind: bits_per_byte(draft, tokenizer, documents, window) for kind, documents in kinds.items()},
        by_position,
        per_round,
    )
