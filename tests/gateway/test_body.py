"""The top-level parse of a body agrees with a full parse, and replacing a field touches nothing else."""

import asyncio
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenmill.engine.gateway.api_error import ApiError
from tokenmill.engine.gateway.body import DECISIVE, MOST_FIELDS, SLICE_BYTES, Body, check_utf8

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner)
    ),
    max_leaves=20,
)
#: `N` is refused, because some servers take it for `n`.
names = st.text(st.characters(exclude_categories=["Cs"])).filter(
    lambda name: name == name.casefold() or name.casefold() not in DECISIVE
)
objects = st.dictionaries(names, values, max_size=6)


@settings(deadline=None)
@given(content=objects, ascii_only=st.booleans(), indent=st.none() | st.integers(0, 3))
def test_fields_are_those_of_a_full_parse(content: dict[str, Any], ascii_only: bool, indent: int | None) -> None:
    body = Body(json.dumps(content, ensure_ascii=ascii_only, indent=indent).encode())
    for name, value in content.items():
        raw = body.raw_field(name)
        assert name in body
        if value is not None:
            assert raw is not None
            assert json.loads(raw) == value


@settings(deadline=None)
@given(content=objects, name=st.sampled_from(["model", "stream", "é"]), value=values)
def test_replacing_a_field_keeps_the_others(content: dict[str, Any], name: str, value: Any) -> None:
    changed = json.loads(Body(json.dumps(content).encode()).with_fields({name: value}))
    expected = {**content, name: value}
    assert list(changed) == list(expected)
    assert json.dumps({**changed, name: None}) == json.dumps({**expected, name: None})
    assert changed[name] == value or math.isclose(changed[name], value)


def test_replacing_keeps_the_bytes_of_the_others() -> None:
    body = Body(b'{"a": 1.50e+00 , "model":"x","b":{"c" : [1,  2]}}')
    assert body.with_fields({"model": "y", "new": True}) == b'{"a":1.50e+00,"model":"y","b":{"c" : [1,  2]},"new":true}'


def test_last_of_repeated_fields_counts_as_for_the_backend() -> None:
    body = Body(b'{"model": "a", "model": "b"}')
    assert body.get("model", str) == "b"
    assert body.with_fields({"x": 1}) == b'{"model":"b","x":1}'


def test_wrong_type_names_the_field() -> None:
    with pytest.raises(ApiError) as raised:
        Body(b'{"model": 3}').get("model", str)
    assert (raised.value.status, raised.value.param) == (400, "model")
    assert Body(b'{"model": null}').get("model", str) is None


def at_depth(calls: int, what: Callable[[], Any]) -> Any:
    """What is returned with so many more calls on the stack."""
    return at_depth(calls - 1, what) if calls else what()


@pytest.mark.usefixtures("usual_depth")
def test_what_is_nested_too_deeply_is_refused_wherever_it_is_found_out() -> None:
    """A depth that can just be parsed may be too much further down the stack."""
    refused = set()
    for levels in range(700, 1000):
        raw = b'{"a":{"x":%b%b}}' % (b"[" * levels, b"]" * levels)
        try:
            body = Body(raw)
        except ApiError as error:
            refused.add(error.message)
            continue
        for calls in (0, 20, 40):
            found = {}
            try:
                found = at_depth(calls, lambda body=body: body.get("a", dict[str, Any]))
                assert at_depth(calls + 10, lambda body=body, found=found: body.with_fields({"a": found})) == raw
            except ApiError as error:
                refused.add(error.message)
    assert refused == {"The request body is not valid JSON: nested too deeply."}


@pytest.mark.parametrize("offset", [-2, -1, 0, 1])
def test_utf8_is_checked_across_slices(offset: int) -> None:
    prefix = b"x" * (SLICE_BYTES + offset)
    asyncio.run(check_utf8(prefix + "€".encode()))
    for broken in (b"\xe2\x82", b"\xff", b"\xe2\x82x"):
        with pytest.raises(ApiError):
            asyncio.run(check_utf8(prefix + broken))


@pytest.mark.parametrize("length", [0, 100_000])
def test_more_fields_than_any_api_has_are_refused(length: int) -> None:
    fields = {"padding": "x" * length, **{f"field_{number}": number for number in range(MOST_FIELDS - 1)}}
    raw = json.dumps(fields).encode()
    assert Body(raw).names() == tuple(fields)
    with pytest.raises(ApiError, match=f"more than {MOST_FIELDS} fields at its top; send at most") as refused:
        Body(raw[:-1] + b', "one_more": 1}')
    assert refused.value.status == 400


@pytest.mark.parametrize("same", [False, True])
def test_millions_of_fields_are_not_looked_at(same: bool) -> None:
    fields = b",".join(b'"%d":1' % (0 if same else number) for number in range(100_000))
    with pytest.raises(ApiError, match="fields at its top"):
        Body(b"{%b and what comes here does not count" % fields)


def test_an_object_of_millions_of_members_is_not_decoded() -> None:
    members = b",".join(b'"%d":1' % number for number in range(100_000))
    body = Body(b'{"metadata":{%b}}' % members)
    with pytest.raises(ApiError, match="`metadata` has more than") as refused:
        body.get("metadata", dict[str, Any])
    assert (refused.value.status, refused.value.param) == (400, "metadata")
