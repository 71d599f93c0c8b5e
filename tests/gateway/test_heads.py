"""Header fields as bytes: names that are none, values that look like places to fill, what stays behind."""

import pytest

from tokenmill.engine.gateway.heads import FRAMING, first_values, layout, lines, without


def test_lines_hold_the_values_as_they_are() -> None:
    headers = [(b"X-Share", b"50%"), (b"x-form", b"%s %b %%"), (b"x-empty", b"")]
    assert lines(headers) == b"x-share: 50%\r\nx-form: %s %b %%\r\nx-empty: \r\n"
    assert lines([]) == b""


def test_percent_sign_may_stand_in_a_name() -> None:
    assert lines([(b"x%b", b"1"), (b"%%", b"2")]) == b"x%b: 1\r\n%%: 2\r\n"


@pytest.mark.parametrize("name", [b"", b"a b", b"a:", b"a\r\nb", b"a\n", b"\xc3\xa9", b"a\0"])
def test_what_is_no_name_is_refused_each_time(name: bytes) -> None:
    for _ in range(2):
        with pytest.raises(ValueError, match="name is none"):
            lines([(b"x-fine", b"1"), (name, b"2")])


def test_layout_says_which_fields_frame_the_message() -> None:
    names = (b"Content-Length", b"x-a", b"Connection", b"transfer-encoding")
    assert layout(names).framing == ((0, b"content-length"), (2, b"connection"), (3, b"transfer-encoding"))
    assert {name for _, name in layout(names).framing} == FRAMING


def test_first_of_several_values_counts() -> None:
    assert first_values([(b"a", b"1"), (b"b", b"2"), (b"a", b"3")]) == {b"a": b"1", b"b": b"2"}


def test_fields_are_left_out_by_name_and_the_others_keep_their_order() -> None:
    headers = [(b"a", b"1"), (b"b", b"2"), (b"a", b"3"), (b"c", b"4")]
    assert without(headers, frozenset({b"a"})) == [(b"b", b"2"), (b"c", b"4")]
    assert without(headers, frozenset({b"z"})) == headers
    assert without(headers, frozenset({b"b", b"c"})) == [(b"a", b"1"), (b"a", b"3")]
    assert without([], frozenset({b"a"})) == []
