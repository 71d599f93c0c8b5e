"""Token streams and the batches cut from them; a batch depends on seed and step alone, so a run can stop anywhere."""

from collections.abc import Iterable

import tokenizers
import torch
from torch import Tensor

from tokenmill.errors import ConfigurationError
from tokenmill.speculative.pair.chat import END_OF_TEXT, SPECIAL_TOKENS
from tokenmill.speculative.pair.corpus import Document

#: Id of the end-of-text marker, which stands before every document.
END_OF_TEXT_ID = SPECIAL_TOKENS.index(END_OF_TEXT)


def encode(documents: Iterable[Document], tokenizer: tokenizers.Tokenizer) -> Tensor:
    """One stream of token ids (int64), each document behind an end-of-text marker."""
    encodings = tokenizer.encode_batch([document.text for document in documents], add_special_tokens=False)
    ids: list[int] = []
    for encoding in encodings:
        ids.append(END_OF_TEXT_ID)
        ids.extend(encoding.ids)
    return torch.tensor(ids, dtype=torch.long)


class Batches:
    """Shuffled windows of a stream.

    Every pass over the stream starts its windows at a new random offset and takes them in a new random order.

    Args:
        stream: Token ids [n].
        window: Tokens that a model reads per sequence.
        batch: Sequences per step.
        seed: Seeds offsets and orders.

    Raises:
        ConfigurationError: The stream is shorter than one batch.
    """

    def __init__(self, stream: Tensor, window: int, batch: int, seed: int) -> None:
        self._stream, self._window, self._batch, self._seed = stream, window, batch, seed
        self._per_pass = (len(stream) - window - 1) // window
        if self._per_pass < batch:
            raise ConfigurationError(
                f"the training text has {len(stream)} tokens, a step needs {window * (batch + 1) + 1}; "
                "use a smaller window or more text"
            )
        self._cached: tuple[int, Tensor] = (-1, torch.empty(0))

    def _starts(self, number: int) -> Tensor:
        """First positions of all windows of one pass, in the order they are taken."""
        if self._cached[0] != number:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + number)
            offset = torch.randint(self._window, (1,), generator=generator)
            order = torch.randperm(self._per_pass, generator=generator)
            self._cached = (number, order * self._window + offset)
        return self._cached[1]

    def passes(self, steps: int) -> float:
        """How often `steps` steps read the whole stream."""
        return steps * self._batch / self._per_pass

    def at(self, step: int) -> Tensor:
        """The sequences of a step, [batch, window + 1]: the last token is a label only."""
        rows = []
        for index in range(step * self._batch, (step + 1) * self._batch):
            number, position = divmod(index, self._per_pass)
            start = int(self._starts(number)[position])
            rows.append(self._stream[start : start + self._window + 1])
        return torch.stack(rows)
