"""A form goes where its one field `model` says, and one that two servers could read differently goes nowhere."""

import asyncio
import contextlib
import email
import importlib.util
import io
import json
import warnings
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from unittest import mock

import aiohttp
import openai
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from multidict import CIMultiDict

from tests.gateway.governance.governed import MASTER_KEY, Governed, options
from tests.gateway.running import RunningGateway
from tests.gateway.upstream import FakeUpstream
from tokenmill.engine.gateway.api_error import ApiError
from tokenmill.engine.gateway.backends import Backend
from tokenmill.engine.gateway.form import MOST_HEADERS, MOST_PARTS, SLICE_BYTES, SLICE_PARTS, Form, form_of
from tokenmill.engine.gateway.governance.schema import SCHEMA
from tokenmill.engine.gateway.sensitivity.settings import SensitivitySettings
from tokenmill.engine.gateway.settings import Settings
from tokenmill.engine.gateway.store import Store

TYPE = b"multipart/form-data; boundary=b"
PATH = "/v1/audio/transcriptions"


def part(disposition: bytes, value: bytes, *headers: bytes) -> bytes:
    """One part, with the boundary `b` before it."""
    lines = [b"--b", b"Content-Disposition: " + disposition, *headers, b"", value, b""]
    return b"\r\n".join(lines)


def field(name: bytes, value: bytes, *headers: bytes) -> bytes:
    """A plain field."""
    return part(b'form-data; name="%b"' % name, value, *headers)


FILE = part(b'form-data; name="file"; filename="a.wav"', b"\x00\xff--a\r\n-- b", b"Content-Type: audio/wav")
MODEL = field(b"model", b"tiny")
END = b"--b--\r\n"


def read(payload: bytes, content_type: bytes = TYPE) -> Form:
    """What the gateway makes of a form."""
    return asyncio.run(form_of(payload, {b"content-type": content_type}))


@pytest.mark.parametrize(
    "model",
    [
        MODEL,
        part(b"form-data; name=model", b"tiny", b"Content-Type: text/plain; charset=utf-8"),  # .NET
        field(b"model", b"tiny", b"Content-Type: text/plain; charset=ISO-8859-1", b"Content-Transfer-Encoding: 8bit"),
        field(b"model", b"tiny", b"Content-Length: 4"),  # OkHttp
        part(b'FORM-DATA ;name="model"', b"tiny").replace(b"Content-Disposition:", b"content-disposition: \t"),
    ],
)
def test_the_usual_spellings(model: bytes) -> None:
    for other in (
        FILE,
        part(b"form-data; name=file; filename=a.wav; filename*=utf-8''a.wav", b""),
        field(b"prompt", b'the name="model"\r\n\r\ndear'),
        field(b"timestamp_granularities[]", b"word") * 2,
    ):
        for payload in (model + other + END, other + model + b"--b--"):
            assert read(payload).model == "tiny"


@pytest.mark.parametrize(
    "content_type",
    [b'Multipart/Form-Data;boundary="b"', b"multipart/form-data; boundary=b; charset=UTF-8",
     b"multipart/form-data; charset=utf-8; boundary=b"],
)  # fmt: skip
def test_the_usual_headers(content_type: bytes) -> None:
    assert read(MODEL + END, content_type).model == "tiny"


def test_a_form_without_a_model() -> None:
    assert read(FILE + field(b"models", b"tiny") + END).model is None


@pytest.mark.parametrize(
    ("content_type", "words"),
    [
        (b"multipart/form-data", "boundary="),
        (b"multipart/form-data; boundary=", "boundary="),
        (b"multipart/form-data; boundary=c", "does not begin"),
        (b"multipart/form-data; boundary=c; boundary=b", "boundary="),
        (b"multipart/form-data; boundary=b; charset=utf-7", "boundary="),
        (b"multipart/form-data; boundary*=b", "boundary="),
        (b'multipart/form-data; boundary="\\b"', "boundary="),
    ],
)
def test_headers_that_are_refused(content_type: bytes, words: str) -> None:
    with pytest.raises(ApiError, match=words) as caught:
        read(MODEL + END, content_type)
    assert (caught.value.status, caught.value.code) == (400, "invalid_form")


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        (b"", "does not begin"),
        (b"hello\r\n" + MODEL + END, "does not begin"),
        (END, "does not begin"),
        (MODEL, "does not end"),
        (MODEL + b"--b", "not on a line"),
        (MODEL + b"--bc\r\n" + END, "not on a line"),
        (MODEL + END + MODEL + END, "follows its last"),
        (MODEL + field(b"x", b"\n--b--"), "does not end"),
        (MODEL.replace(b"\r\n", b"\n") + END, "does not begin"),
        (MODEL.replace(b"\r\n\r\n", b"\r\n") + END, "no head"),
        (field(b"x", b"", b"Y: " + b"y" * 10_000) + END, "no head"),
        (field(b"x", b"", *(b"Y%d:" % n for n in range(MOST_HEADERS))) + END, f"{MOST_HEADERS} headers"),
        (field(b"x", b"1") * (MOST_PARTS + 1) + END, f"{MOST_PARTS} parts"),
        (MODEL + MODEL + END, "two fields"),
        (MODEL + field(b"model", b"dear") + END, "two fields"),
        (part(b'form-data; name="model"; filename="m"', b"dear") + END, "is a file"),
        (part(b"form-data; name=model; filename*=utf-8''m", b"dear") + END, "is a file"),
        (part(b"form-data; name*=utf-8''model", b"dear") + END, "Content-Disposition"),
        (part(b'form-data; name="x"; name="model"', b"dear") + END, "Content-Disposition"),
        (part(b'form-data; name="x\\"; name="model"', b"dear") + END, "Content-Disposition"),
        (part(b'form-data; name="file"; filename="\\"; name="model"', b"dear") + END, "Content-Disposition"),
        (part(b"form-data; name='model'", b"dear") + END, "Content-Disposition"),
        (part(b'form-data; name="model', b"dear") + END, "Content-Disposition"),
        (part(b'form-data; name="mod\\el"', b"dear") + END, "Content-Disposition"),
        (part(b'form-data; name="m%6fdel"', b"dear") + END, "Content-Disposition"),
        (part(b'form-data; name="/model"', b"dear") + END, "Content-Disposition"),
        (part(b'form-data; name="x"; filename="a; name=model; b"', b"dear") + END, "Content-Disposition"),
        (part(b'form-data; name="x"; filename=";;=;"', b"dear") + END, "Content-Disposition"),
        (part(b'attachment; name="model"', b"dear") + END, "Content-Disposition"),
        (part(b"form-data", b"dear") + END, "Content-Disposition"),
        (field(b"Model", b"dear") + END, "Content-Disposition"),
        (field(b" model", b"dear") + END, "Content-Disposition"),
        (field(b"model[]", b"dear") + END, "Content-Disposition"),
        (field(b"_charset_", b"utf-7") + MODEL + END, "Content-Disposition"),
        (b"--b\r\nX: y\r\n\r\ndear\r\n" + END, "Content-Disposition"),
        (field(b"x", b"1", b'content-disposition: form-data; name="model"') + END, "twice"),
        (field(b"x", b"1", b' ; name="model"') + END, "is none"),
        (field(b"x", b"1", b'Y: z\nContent-Disposition: form-data; name="model"') + END, "is none"),
        (field(b"x", b"1", b"Y : z") + END, "is none"),
        (field(b"x", b"1", b"Content-Length: 90") + MODEL + END, "content-length"),
        (field(b"x", b"1", b"Content-Type: multipart/mixed; boundary=c") + MODEL + END, "a form itself"),
        (field(b"model", b"ZGVhcg==", b"Content-Transfer-Encoding: base64") + END, "plain text"),
        (field(b"model", b"dear", b"Content-Encoding: deflate") + END, "plain text"),
        (field(b"model", b"+AGQ-ear", b"Content-Type: text/plain; charset=utf-7") + END, "plain text"),
        (field(b"model", b'"dear"', b"Content-Type: application/json") + END, "plain text"),
        (field(b"model", b"") + END, "printable ASCII"),
        (field(b"model", b"dear\r\n") + END, "printable ASCII"),
        (field(b"model", b"dear\x00") + END, "printable ASCII"),
        (field(b"model", b"d\xc3\xa9ar") + END, "printable ASCII"),
        (field(b"model", b"d" * 2000) + END, "printable ASCII"),
    ],
)
def test_forms_that_are_refused(payload: bytes, words: str) -> None:
    with pytest.raises(ApiError, match=words) as caught:
        read(payload)
    assert (caught.value.status, caught.value.code) == (400, "invalid_form")
    assert "\n" not in caught.value.message


def test_an_encoded_form_is_refused() -> None:
    with pytest.raises(ApiError, match="content-encoding"):
        asyncio.run(form_of(MODEL + END, {b"content-type": TYPE, b"content-encoding": b"deflate"}))


async def starlettes(payload: bytes) -> list[str]:
    """The values of `model` as Starlette (so vLLM) reads them."""
    from starlette.datastructures import Headers
    from starlette.formparsers import MultiPartParser

    async def stream() -> AsyncGenerator[bytes, None]:
        yield payload

    form = await MultiPartParser(Headers({"content-type": TYPE.decode()}), stream()).parse()
    return [value if isinstance(value, str) else "a file" for value in form.getlist("model")]


async def aiohttps(payload: bytes) -> list[str]:
    """The same as aiohttp's server reads them."""
    stream = aiohttp.StreamReader(mock.Mock(_reading_paused=False), 1 << 16, loop=asyncio.get_running_loop())
    stream.feed_data(payload)
    stream.feed_eof()
    reader = aiohttp.MultipartReader(CIMultiDict({"Content-Type": TYPE.decode()}), stream)
    found = []
    while (one := await reader.next()) is not None:
        assert isinstance(one, aiohttp.BodyPartReader)
        text = bytes(await one.read(decode=True))
        if one.name == "model":
            found.append(text.decode("latin-1"))
    return found


async def emails(payload: bytes) -> list[str]:
    """The same as the standard library's e-mail parser reads them."""
    message = email.message_from_bytes(b"Content-Type: " + TYPE + b"\r\n\r\n" + payload)
    found = []
    for one in message.walk():
        if one.get_param("name", header="content-disposition") == "model":
            value = one.get_payload(decode=True)
            assert isinstance(value, bytes)
            found.append(value.decode("latin-1"))
    return found


READERS = [aiohttps, emails, *([starlettes] if importlib.util.find_spec("python_multipart") else [])]


PIECES = [
    b"--b", b"--", b"\r\n", b"\n", b"\r", b"\r\n\r\n", b"model", b"dear", b"tiny", b"x", b'name="model"', b"name=model",
    b"; ", b'"', b"\\", b"Content-Disposition: form-data; ", b'filename="a"', b"Content-Length: 4", b" ", b":",
    b"Content-Transfer-Encoding: base64", b"Content-Type: text/plain", b"/", b";", b"=", b"%6d", b"'", b"<",
    b">", b"[]",
    MODEL, FILE, field(b"prompt", b"model"), field(b"model", b"dear"), END,
]  # fmt: skip


@examples(deadline=None, max_examples=2000)
@given(
    parts=st.lists(st.sampled_from([MODEL, FILE, field(b"prompt", b"x"), field(b"Model", b"dear")]), max_size=3),
    at=st.lists(st.tuples(st.floats(0, 1), st.sampled_from(PIECES), st.integers(0, 3)), max_size=3),
)
def test_what_is_taken_is_read_alike_by_all(parts: list[bytes], at: list[tuple[float, bytes, int]]) -> None:
    payload = b"".join(parts) + END
    for share, piece, dropped in at:
        place = round(share * len(payload))
        payload = payload[:place] + piece + payload[place + dropped :]
    try:
        model = read(payload).model
    except ApiError:
        return
    for reader in READERS:
        found = expected = [] if model is None else [model]
        # A server that does not take it at all reads no other model.
        with warnings.catch_warnings(action="ignore"), contextlib.suppress(Exception):
            found = asyncio.run(reader(payload))
        assert found == expected, reader


def test_another_model_leaves_every_other_part_as_it_is() -> None:
    for before, after in ((FILE, b""), (b"", FILE), (FILE, field(b"prompt", b"tiny"))):
        changed = asyncio.run(read(before + MODEL + after + END).with_model("another/model"))
        assert changed == before + field(b"model", b"another/model") + after + END
    for other in (FILE, FILE + field(b"prompt", b"tiny")):
        assert asyncio.run(read(other + END).with_model("another/model")) == (
            field(b"model", b"another/model") + other + END
        )


def turns_of_others(payload: bytes) -> tuple[int, int]:
    """How often others run while a form that ends with `MODEL` is read, and while its model is replaced."""
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def all_of_it() -> tuple[int, int]:
        running = asyncio.create_task(others())
        form = await form_of(payload + MODEL + END, {b"content-type": TYPE})
        reading = turns
        assert await form.with_model("other") == payload + field(b"model", b"other") + END
        running.cancel()
        return reading, turns - reading

    return asyncio.run(all_of_it())


def test_a_long_form_lets_others_run() -> None:
    assert min(turns_of_others(part(b'form-data; name="file"; filename="a"', bytes(8 * SLICE_BYTES)))) >= 7
    parts = part(b'form-data; name="file"; filename="a"', bytes(SLICE_BYTES - 4096)) * 8
    assert min(turns_of_others(parts)) >= 3


def test_a_form_of_many_parts_lets_others_run() -> None:
    assert turns_of_others(field(b"x", b"1") * (MOST_PARTS - 1))[0] >= MOST_PARTS // SLICE_PARTS


def test_heads_are_read_in_time_that_grows_with_their_length() -> None:
    """Where it grows with the square of the length, these take minutes."""
    semicolons = part(b'form-data; name="x"; filename="%b"' % (b";" * 8000), b"")
    assert read(semicolons * (MOST_PARTS - 1) + MODEL + END).model == "tiny"
    blanks = field(b"x", b"", b"Y:%b\x01" % (b" " * 8000)) + END
    for _ in range(1000):
        with pytest.raises(ApiError, match="is none"):
            read(blanks)


def test_a_boundary_that_lies_across_two_slices_is_found() -> None:
    for size in range(SLICE_BYTES - 140, SLICE_BYTES + 4):
        payload = part(b'form-data; name="file"; filename="a"', bytes(size)) + MODEL + END
        assert read(payload).model == "tiny", size


@pytest.fixture(scope="module")
def client(gateway: RunningGateway) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=gateway.url + "/v1", api_key="any", max_retries=0, timeout=20) as made:
        yield made


def test_the_official_client_transcribes(client: openai.OpenAI, upstream: FakeUpstream) -> None:
    wav = ("a.wav", io.BytesIO(b"RIFF" + bytes(range(256))))
    client.audio.transcriptions.create(model="tiny", file=wav, language="en", prompt="nobody")
    client.audio.transcriptions.create(
        model="utility", file=wav, response_format="verbose_json", timestamp_granularities=["word", "segment"]
    )
    with pytest.raises(openai.NotFoundError):
        client.audio.transcriptions.create(model="nobody", file=wav, prompt="tiny")
    sent = [(path, read(raw, headers["content-type"].encode()).model) for path, headers, raw in upstream.books.requests]
    assert sent == [(PATH, "tiny"), (PATH, "tiny")]
    assert b"utility" not in upstream.books.requests[1][2]


def test_what_is_said_twice_goes_nowhere(gateway: RunningGateway, upstream: FakeUpstream) -> None:
    payload = MODEL + field(b"model", b"org/nested/name") + END
    status, _, body = gateway.send("POST", PATH, payload, {"content-type": TYPE.decode()})
    assert (status, b"two fields `model`" in body) == (400, True)
    raw = b"POST %s HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-length: %d\r\n" % (
        PATH.encode(),
        len(MODEL + END),
    )
    raw += b"content-type: multipart/form-data; boundary=c\r\ncontent-type: %s\r\n\r\n" % TYPE
    assert b"two headers `content-type`" in gateway.raw(raw + MODEL + END)
    assert not upstream.books.requests


@pytest.mark.parametrize(
    "kind",
    ["application/x-www-form-urlencoded", "application/json; charset=utf-7", "a/b, multipart/form-data; boundary=c"],
)
def test_what_was_read_as_json_is_nothing_else_for_the_backend(
    gateway: RunningGateway, upstream: FakeUpstream, kind: str
) -> None:
    body = b'{"model": "tiny", "x": "&model=dear&"}'
    assert gateway.post("/v1/completions", body, content_type=kind)[0] == 200
    assert upstream.books.requests[0][1]["content-type"] == "application/json"
    assert upstream.books.requests[0][2] == body


def test_a_key_reaches_its_own_models_alone(
    shared_upstream: FakeUpstream, upstream: FakeUpstream, tmp_path: Path
) -> None:
    backend, place = Backend("a", shared_upstream.url, "t", ("tiny", "dear")), str(tmp_path / "governance.db")
    with (
        RunningGateway(backend, governance=options(place), key=MASTER_KEY) as gateway,
        contextlib.closing(Store(place, SCHEMA)) as store,
    ):
        _, key = Governed(gateway, store).key(models=["tiny"])
        headers = {"authorization": f"Bearer {key}", "content-type": TYPE.decode()}
        for payload, status in (
            (MODEL + field(b"prompt", b"dear") + END, 200),
            (field(b"model", b"dear") + field(b"prompt", b"tiny") + END, 403),
            (field(b"prompt", b"tiny") + field(b"model", b"dear") + END, 403),
        ):
            assert gateway.send("POST", PATH, payload, headers)[0] == status
    assert len(upstream.books.requests) == 1


def test_what_names_no_model_is_sent_with_the_default_one(
    shared_upstream: FakeUpstream, upstream: FakeUpstream, tmp_path: Path
) -> None:
    """The backend's own default may be a model that the key may not ask for."""
    backend, place = Backend("a", shared_upstream.url, "t", ("dear", "tiny")), str(tmp_path / "governance.db")
    settings = Settings(default_model="tiny")
    with (
        RunningGateway(backend, settings=settings, governance=options(place), key=MASTER_KEY) as gateway,
        contextlib.closing(Store(place, SCHEMA)) as store,
    ):
        _, key = Governed(gateway, store).key(models=["tiny"])
        bearer = {"authorization": f"Bearer {key}"}
        assert gateway.send("POST", PATH, FILE + END, {**bearer, "content-type": TYPE.decode()})[0] == 200
        assert gateway.post("/v1/completions", {"prompt": "a"}, **bearer)[0] == 200
    (_, _, form), (_, _, body) = upstream.books.requests
    assert (form, json.loads(body)) == (MODEL + FILE + END, {"prompt": "a", "model": "tiny"})


def test_a_form_stays_where_the_policy_keeps_what_it_cannot_read(
    shared_upstream: FakeUpstream, upstream: FakeUpstream
) -> None:
    backends = (
        Backend("near", shared_upstream.url, "t", ("near",), {"near": "tiny"}),
        Backend("far", shared_upstream.url, "u", ("far",), {"far": "tiny"}, zone="cloud"),
    )
    with RunningGateway(*backends, sensitivity=SensitivitySettings(default="stay")) as gateway:
        for model, expected in ((b"near", 200), (b"t", 200), (b"far", 403), (b"u", 403)):
            form = FILE + field(b"model", model) + END
            status, _, body = gateway.send("POST", PATH, form, {"content-type": TYPE.decode()})
            assert (status, b"a form cannot be searched" in body) == (expected, expected == 403)
    assert [raw for _, _, raw in upstream.books.requests] == [FILE + MODEL + END] * 2
