"""Many strings found in one pass: the same places as one search after the other gives, the longest string first."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenmill.engine.gateway.sensitivity import needles
from tokenmill.engine.gateway.sensitivity.needles import Needles, Place, TangleError

#: So few that strings begin and end in each other; half of a character, which UTF-8 does not have, is one of them.
ALPHABET = "ab\ud800日"


def places(wanted: list[str], text: str) -> list[Place]:
    return [place for found in Needles(wanted).places(text) for place in found]


def one_by_one(wanted: list[str], text: str) -> list[Place]:
    """The reference: each string is searched in what the longer ones left."""
    left, found = [(0, text)], []
    for needle in sorted(wanted, key=len, reverse=True):
        pieces = []
        for begin, piece in left:
            place = 0
            while (at := piece.find(needle, place)) >= 0:
                found.append((begin + at, begin + at + len(needle), needle))
                pieces.append((begin + place, piece[place:at]))
                place = at + len(needle)
            pieces.append((begin + place, piece[place:]))
        left = pieces
    return sorted(found)


@settings(deadline=None)
@given(
    st.lists(st.text(ALPHABET, min_size=1, max_size=40), max_size=6, unique=True),
    st.lists(st.one_of(st.text(ALPHABET, max_size=20), st.integers(0, 5)), max_size=20),
)
def test_the_longest_counts_wherever_they_overlap(wanted: list[str], parts: list[str | int]) -> None:
    text = "".join(part if isinstance(part, str) else (wanted or [""])[part % max(len(wanted), 1)] for part in parts)
    assert places(wanted, text) == one_by_one(wanted, text)


@pytest.mark.parametrize("seed", range(20))
def test_long_texts_are_as_if_looked_through_at_once(seed: int) -> None:
    dice = random.Random(seed)
    wanted = list({"".join(dice.choices("ab", k=dice.choice([4, 9, 31, 32, 33, 90]))) for _ in range(8)})
    parts = [dice.choice(wanted) if dice.random() < 0.5 else "".join(dice.choices("abc", k=7)) for _ in range(300)]
    text = "".join(parts)
    assert len(text) > 2 * needles._SLICE
    assert places(wanted, text) == one_by_one(wanted, text)


def test_what_only_begins_alike_is_told_apart() -> None:
    head = "x" * needles._HEAD
    assert places([head + "a", head + "bb"], f"{head}a {head}b {head}bb") == [
        (0, 33, head + "a"), (68, 102, head + "bb"),
    ]  # fmt: skip


def test_others_may_run_where_many_begin_alike_and_none_is_there() -> None:
    wanted = ["x" * needles._HEAD + f"a{number}" for number in range(needles._BREATH)]
    turns = list(Needles(wanted).places("x" * 2000))
    assert not any(turns)
    assert len(turns) > 1900


def test_a_tangle_without_end_is_given_up() -> None:
    wanted = ["1" * length for length in range(4, 500)]
    with pytest.raises(TangleError):
        places(wanted, "1" * 50_000)


def test_nothing_is_found_of_nothing() -> None:
    assert places([], "text") == []
    assert places(["text"], "") == []
