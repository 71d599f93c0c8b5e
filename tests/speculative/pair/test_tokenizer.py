"""The tokenizer: every text comes back as it went in."""

import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenmill.speculative.pair import tokenizer as pair_tokenizer
from tokenmill.speculative.pair.chat import SPECIAL_TOKENS, render

TEXTS = ["def f(x):\n    return x\n" * 50, "class A:\n    def g(self):\n        pass\n" * 30, render([("user", "Hi")])]
TOKENIZER = pair_tokenizer.train(TEXTS, 300)


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_round_trips(text: str) -> None:
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == text


def test_every_byte_is_a_token() -> None:
    assert TOKENIZER.get_vocab_size() >= 256 + len(SPECIAL_TOKENS)
    text = "".join(map(chr, range(256))) + "𝄞é\r\n\t  x"
    assert TOKENIZER.decode(TOKENIZER.encode(text).ids, skip_special_tokens=False) == text


def test_markers_are_single_tokens_with_fixed_ids() -> None:
    assert [TOKENIZER.token_to_id(token) for token in SPECIAL_TOKENS] == list(range(6))
    ids = TOKENIZER.encode(render([("user", "x")])).ids
    assert ids[0] == SPECIAL_TOKENS.index("<|user|>")
    assert SPECIAL_TOKENS.index("<|end|>") in ids
    assert TOKENIZER.decode(ids) == "\nx\n"


def test_same_texts_same_tokenizer() -> None:
    again = pair_tokenizer.train(TEXTS, 300)
    assert again.to_str() == TOKENIZER.to_str()
    assert tokenizers.Tokenizer.from_str(again.to_str()).get_vocab() == TOKENIZER.get_vocab()


def test_a_line_break_takes_its_indentation_along() -> None:
    assert "\n    " in [TOKENIZER.decode([i]) for i in TOKENIZER.encode("def f(x):\n    return x").ids]
