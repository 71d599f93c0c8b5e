"""The pair's tokenizer: byte-level byte-pair encoding (Sennrich et al. 2016; bytes after Radford et al. 2019).

Every byte is a token, so any text round-trips; a line break takes the indentation behind it along, which is what
Python text is full of.
"""

from collections.abc import Iterable

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from tokenmill.speculative.pair.chat import SPECIAL_TOKENS

#: Words with one character before them, numbers by two digits, runs of signs, line breaks with indentation, blanks.
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]+|\n[ ]*|\s+(?!\S)|\s+"


def train(texts: Iterable[str], vocabulary: int) -> tokenizers.Tokenizer:
    """Learns a vocabulary; the same texts in the same order give the same tokenizer.

    Args:
        texts: The training texts; markers of the chat template in them stay whole.
        vocabulary: Number of token ids, special tokens included; at least 262 (256 bytes and the special tokens).
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
