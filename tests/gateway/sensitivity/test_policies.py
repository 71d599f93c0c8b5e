"""The policy through a real worker: allow, redact, stay, refuse; what fails stays; what is decided is audited."""

import asyncio
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.gateway.running import RunningGateway
from tests.gateway.sensitivity.searching import clear, exchange_of
from tests.gateway.upstream import Books, FakeUpstream
from tokenmill.engine.gateway.api_error import ApiError
from tokenmill.engine.gateway.backends import Backend
from tokenmill.engine.gateway.pipeline import Exchange, Reply
from tokenmill.engine.gateway.portfolio import Portfolio, Route
from tokenmill.engine.gateway.principal import Principal
from tokenmill.engine.gateway.router.settings import RoutingSettings
from tokenmill.engine.gateway.sensitivity import detector, turns
from tokenmill.engine.gateway.sensitivity.clearance import NOTE, Clearance
from tokenmill.engine.gateway.sensitivity.detector import Detector
from tokenmill.engine.gateway.sensitivity.settings import SensitivitySettings
from tokenmill.engine.gateway.sensitivity.stages import Guard, Residency, Sensitivity, confined
from tokenmill.engine.gateway.settings import Settings

CARD, MAIL, KEY = "4111 1111 1111 1111", "bob.smith@example.com", "sk-proj-abcdefghijklmnop1234"


@pytest.fixture(scope="module")
def cloud() -> Iterator[FakeUpstream]:
    server = FakeUpstream(("vast",)).start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def gateway(cloud: FakeUpstream) -> Iterator[RunningGateway]:
    policy = SensitivitySettings({"contact": "redact", "secret": "refuse", "person": "allow"})
    backend = Backend("vast", cloud.url, "frontier", ("vast",), zone="cloud", quality=0.9)
    with RunningGateway(backend, routing=RoutingSettings(), sensitivity=policy) as running:
        yield running


def ask(gateway: RunningGateway, cloud: FakeUpstream, text: Any, **more: Any) -> tuple[int, Any, bytes]:
    cloud.books = Books()
    body = {"model": "auto", "messages": [{"role": "user", "content": text}], **more}
    status, headers, raw = gateway.post("/v1/chat/completions", body)
    return status, headers, raw


def test_redacted_data_does_not_leave_and_comes_back(gateway: RunningGateway, cloud: FakeUpstream) -> None:
    text = f"Write to {MAIL} or {MAIL}, not to [EMAIL_1], from 10.1.2.3."
    status, headers, raw = ask(gateway, cloud, text, act={"echo": 1})
    assert status == 200
    assert json.loads(raw)["choices"][0]["message"]["content"] == text
    sent = cloud.books.requests[0][2].decode()
    assert MAIL not in sent
    assert "10.1.2.3" not in sent
    assert sent.count("[EMAIL1_1]") == 2
    assert "placeholders stand for email, ip_address" in headers["x-tokenmill-reason"]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_it_comes_back_in_streams(gateway: RunningGateway, cloud: FakeUpstream, size: int) -> None:
    text = f"Write to {MAIL}; [or call +49 30 1234567] [EM"
    status, _, raw = ask(gateway, cloud, text, act={"echo": size}, stream=True)
    assert status == 200
    events = [json.loads(line[6:]) for line in raw.split(b"\n\n") if line.startswith(b"data: {")]
    assert "".join(choice["delta"]["content"] for event in events for choice in event["choices"]) == text
    assert raw.endswith(b"data: [DONE]\n\n")
    assert MAIL.encode() not in cloud.books.requests[0][2]


def test_numbers_beside_redacted_data_keep_their_digits(gateway: RunningGateway, cloud: FakeUpstream) -> None:
    tool = {"type": "function", "function": {"name": "f", "description": MAIL, "parameters": {"maximum": 10**30}}}
    assert ask(gateway, cloud, "hi", model="vast", tools=[tool])[0] == 200
    sent = cloud.books.requests[0][2]
    assert MAIL.encode() not in sent
    assert str(10**30).encode() in sent


def test_what_may_not_leave_is_refused_with_the_reason(gateway: RunningGateway, cloud: FakeUpstream) -> None:
    for text, code, words in (
        (f"card {CARD}", "residency", "it holds credit_card"),
        (f"key {KEY}", "sensitive_data", "refuses requests that hold api_key"),
        (f"{MAIL} and {CARD}", "residency", "it holds credit_card"),
        (f"{MAIL} and {KEY}", "sensitive_data", "api_key"),
    ):
        status, _, raw = ask(gateway, cloud, text)
        error = json.loads(raw)["error"]
        assert (status, error["code"]) == (403, code)
        assert words in error["message"]
        assert not cloud.books.requests
    assert ask(gateway, cloud, "I was born on 12.03.1985.")[0] == 200
    assert "12.03.1985" in cloud.books.requests[0][2].decode()


def test_where_no_placeholder_can_stand_it_stays(gateway: RunningGateway, cloud: FakeUpstream) -> None:
    split = [{"type": "text", "text": "to bob.smith@exa"}, {"type": "text", "text": "mple.com"}]
    disguised = r"to bob.smith\u0040example.com"
    for text in (split, disguised):
        status, _, raw = ask(gateway, cloud, text)
        assert status == 403
        assert "where no placeholder can stand" in json.loads(raw)["error"]["message"]
    assert ask(gateway, cloud, "hello", metadata={MAIL: "a name of a member"})[0] == 403
    assert ask(gateway, cloud, "hello", metadata={"note": MAIL})[0] == 200
    assert MAIL not in cloud.books.requests[0][2].decode()


TEXT = json.dumps({"messages": [{"role": "user", "content": "all is well"}]}).encode()


def test_a_detector_that_fails_keeps_the_request_here(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(*_: object) -> None:
        raise ValueError(f"cannot cope with {CARD}")

    settings = SensitivitySettings(default="redact")
    assert clear(settings, TEXT).zones is None
    monkeypatch.setattr(detector.Scanner, "windows", breaks)
    failed = clear(settings, TEXT)
    assert (failed.action, failed.zones) == ("stay", frozenset({"on-premises"}))
    assert failed.why == "the search for sensitive data failed (ValueError)"


def test_a_detector_that_takes_too_long_keeps_the_request_here() -> None:
    body = json.dumps({"prompt": "4111 " * 200_000}).encode()
    slow = clear(SensitivitySettings(timeout_s=0.001), body)
    assert slow.zones == frozenset({"on-premises"})
    assert "took" in slow.why


@pytest.mark.parametrize("text", ["hi", "hello " * 3000])
def test_no_search_is_short_enough_to_escape_the_limit(text: str) -> None:
    slow = clear(SensitivitySettings(timeout_s=1e-7), json.dumps({"prompt": text}).encode())
    assert slow.zones == frozenset({"on-premises"})
    assert "took" in slow.why


class Clock:
    """Time that passes by a step whenever somebody looks."""

    def __init__(self, step_s: float) -> None:
        self.now, self.step_s = 0.0, step_s

    def __call__(self) -> float:
        self.now += self.step_s
        return self.now


MANY = json.dumps({"messages": [{"role": "user", "content": f"{number} word " * 60} for number in range(400)]}).encode()


def test_the_limit_holds_for_many_texts_together(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(1e-4)
    monkeypatch.setattr(turns.time, "perf_counter", clock)
    monkeypatch.setattr(turns.time, "thread_time", clock)
    assert clear(SensitivitySettings(timeout_s=60), MANY).action == "allow"
    slow = clear(SensitivitySettings(timeout_s=0.02), MANY)
    assert (slow.action, slow.kinds) == ("stay", {})
    assert "took" in slow.why


def test_time_in_which_a_search_does_not_compute_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns.time, "perf_counter", Clock(10))
    assert clear(SensitivitySettings(timeout_s=2), MANY).action == "allow"


def test_a_search_does_not_last_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns.time, "monotonic", Clock(50))
    monkeypatch.setattr(turns, "TURN_S", 0)
    slow = clear(SensitivitySettings(timeout_s=2), MANY)
    assert (slow.action, slow.kinds) == ("stay", {})
    assert "took too long" in slow.why


@pytest.mark.parametrize(
    ("body", "pieces"),
    [
        pytest.param(MANY, 400, id="many texts"),
        pytest.param(json.dumps({"prompt": "1234 " * 200_000}).encode(), 240, id="one long text"),
        pytest.param(json.dumps({"x": {f"a{number}": 1 for number in range(20_000)}}).encode(), 20_000, id="members"),
        pytest.param(json.dumps({"x": [{"a": "b" * 600}] * 2_000}).encode(), 2_000, id="items"),
        pytest.param(json.dumps({"prompt": "\u00e9\n" * 400_000}).encode(), 200, id="escapes"),
        pytest.param(json.dumps({"prompt": ["a b@example.com c"] * 2_000}).encode(), 2_000, id="redacted texts"),
    ],
)
def test_others_may_run_between_any_two_pieces(body: bytes, pieces: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns.time, "perf_counter", Clock(turns.TURN_S * 2))
    ran = 0

    async def others() -> None:
        nonlocal ran
        while True:
            await asyncio.sleep(0)
            ran += 1

    async def run() -> Clearance:
        other = asyncio.ensure_future(others())
        try:
            return await Detector(SensitivitySettings(default="redact", timeout_s=1e6)).clear(exchange_of(body))
        finally:
            other.cancel()

    assert asyncio.run(run()).zones is None
    assert ran >= pieces


def test_a_window_full_of_candidates_is_interrupted() -> None:
    text = "000-12-3456 " * 1200
    assert sum(1 for _ in detector.Scanner().windows(text)) > 4 * 5


def test_zeros_hide_nothing_and_join_nothing() -> None:
    for between in ("\0", "\0\0\0"):
        split = between.join(("4111", "1111", "1111", "1111"))
        assert clear(SensitivitySettings(), json.dumps({"prompt": f"card {split} ok"}).encode()).kinds == {
            "credit_card": 1
        }
    apart = [f"{part}" for part in ("4111", "1111", "1111", "1111")]
    assert clear(SensitivitySettings(), json.dumps({"prompt": apart}).encode()).kinds == {}


@pytest.mark.parametrize(("count", "action"), [(detector.MOST_VALUES, "redact"), (detector.MOST_VALUES + 1, "stay")])
def test_more_data_than_placeholders_stays(count: int, action: str) -> None:
    body = json.dumps({"prompt": " ".join(f"user{number}@example.com" for number in range(count))}).encode()
    assert clear(SensitivitySettings(default="redact"), body).action == action


def test_long_bodies_are_searched_to_their_end() -> None:
    for text in ("é " * 200_000, "\\u00e9\\n" * 80_000, "\\\\" * 300_000):
        body = b'{"messages": [{"role": "user", "content": "' + text.encode() + MAIL.encode() + b'"}]}'
        assert clear(SensitivitySettings(), body).kinds == {"email": 1}
    parts = [{"type": "text", "text": "word " * 60_000}, {"type": "text", "text": f"{MAIL[:8]}"}]
    parts += [{"type": "text", "text": MAIL[8:]}]
    body = json.dumps({"messages": [{"role": "user", "content": parts}]}).encode()
    assert "email" in clear(SensitivitySettings(), body).kinds


@pytest.mark.parametrize("member", ["x", {"a": 1}, ["a"], {}, [], None, 3, [[{"b": {}}]]])
@pytest.mark.parametrize("filler", [0, 300_000])
def test_names_of_members_are_searched(member: Any, filler: int) -> None:
    body = json.dumps({"prompt": "hi", "metadata": {"more": "a " * filler, MAIL: member}}).encode()
    assert clear(SensitivitySettings(), body).kinds == {"email": 1}
    body = json.dumps({"prompt": "hi", MAIL: {"more": "a " * filler, "b": member}}).encode()
    assert clear(SensitivitySettings(), body).kinds == {"email": 1}


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": "%s", "prompt": "hi"}',
        b'{"a": 1, "prompt": "hi", "more": {"x": "%s", "x": 1}}',
        b'{"messages": [{"role": "user", "content": "%s", "content": "hi"}]}',
        b'{"long": "' + b"a " * 200_000 + b'", "prompt": "%s", "prompt": "hi"}',
        b'{"messages": [{"role": "user", "content": "%s", "content": "' + b"a " * 200_000 + b'"}]}',
    ],
)
def test_members_that_stand_twice_cannot_hide_anything(body: bytes) -> None:
    clearance = clear(SensitivitySettings(), body % MAIL.encode())
    assert clearance.zones == frozenset({"on-premises"})
    assert "twice" in clearance.why


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("filler", [0, 300_000])
def test_spaces_and_escapes_between_members_are_nothing(indent: int | None, filler: int) -> None:
    fields = {'a "name": {': ["1", {}], "é\\": {"b": [], "c": "x" * filler, "d": "}"}, "prompt": "hi", "e": {}}
    for ascii_only in (False, True):
        body = b" \n" + json.dumps(fields, indent=indent, ensure_ascii=ascii_only).encode() + b" \n"
        assert clear(SensitivitySettings(), body).action == "allow"
    assert clear(SensitivitySettings(), b" {} ").action == "allow"


def test_the_client_may_say_that_it_is_private() -> None:
    settings = SensitivitySettings(default="allow")
    for said in ("private", "secret", "PRIVATE"):
        assert clear(settings, TEXT, x_tokenmill_sensitivity=said).zones == frozenset({"on-premises"})
    assert clear(settings, TEXT, x_tokenmill_sensitivity="public").zones is None
    named = json.dumps({"prompt": "hi", "metadata": {"tokenmill_sensitivity": "private"}}).encode()
    assert clear(settings, named).zones == frozenset({"on-premises"})
    held = json.dumps({"prompt": CARD}).encode()
    assert clear(SensitivitySettings(), held, x_tokenmill_sensitivity="public").zones == frozenset({"on-premises"})


def test_a_key_may_be_confined() -> None:
    free, kept = Clearance(), Clearance(action="stay", zones=frozenset({"on-premises"}))
    assert confined(free, None) == free
    assert confined(free, Principal("k", metadata={"zones": ["edge"]})).zones == frozenset({"edge"})
    assert confined(kept, Principal("k", metadata={"zones": ["edge", "cloud"]})).zones == frozenset()
    assert confined(free, Principal("k", metadata={"regions": "eu"})).regions == frozenset({"eu"})
    both = confined(kept, Principal("k", metadata={"regions": ["eu"]}))
    assert (both.zones, both.regions) == (kept.zones, frozenset({"eu"}))
    assert confined(free, Principal("k", metadata={"zones": 7})).zones == frozenset()


def test_that_a_key_confines_a_request_is_audited() -> None:
    told: list[tuple[str, Any]] = []

    async def below(_exchange: Exchange) -> Reply:
        return Reply(200)

    def tell(action: str, _subject: str, details: Mapping[str, Any]) -> None:
        told.append((action, details["zones"]))

    async def run() -> None:
        for settings in (SensitivitySettings(), SensitivitySettings(default="allow", unreadable="allow")):
            stage = Sensitivity(settings, tell)
            for metadata in ({"zones": ["edge"]}, {"regions": ["eu"]}, {"team": "a"}):
                await stage.handle(exchange_of(TEXT, Principal("k", metadata=metadata)), below)

    asyncio.run(run())
    assert told == [("sensitivity.confine", ["edge"]), ("sensitivity.confine", None)] * 2


@pytest.fixture
def portfolio() -> Portfolio:
    backends = [
        Backend("here", "http://127.0.0.1:1", "t", ("m",)),
        Backend("there", "http://127.0.0.1:2", "t", ("m",), zone="cloud", region="eu"),
    ]
    return Portfolio(backends, Settings())


def test_the_guard_stops_whoever_walks_around(portfolio: Portfolio) -> None:
    told: list[tuple[str, str, Mapping[str, Any]]] = []
    asked: list[list[str]] = []

    async def last(exchange: Exchange) -> Reply:
        asked.append([target.backend.name for route in exchange.routes for target in route.targets])
        return Reply(200)

    async def widens(exchange: Exchange) -> Reply:
        exchange.routes = portfolio.routes("m")
        await guard.handle(exchange, last)
        exchange.routes = [Route((portfolio.targets[1],), "m")]
        return await guard.handle(exchange, last)

    def tell(action: str, subject: str, details: Mapping[str, Any]) -> None:
        told.append((action, subject, details))

    settings = SensitivitySettings()
    searches, residency, guard = Sensitivity(settings, tell), Residency(settings, tell), Guard(tell)
    body = json.dumps({"model": "m", "prompt": CARD}).encode()

    async def run() -> None:
        exchange = exchange_of(body, Principal("key-1"))
        exchange.routes = portfolio.routes("m")
        await searches.handle(exchange, lambda one: residency.handle(one, widens))

    with pytest.raises(ApiError) as refused:
        asyncio.run(run())
    assert (refused.value.status, refused.value.code) == (403, "residency")
    assert asked == [["here"]]
    assert [(action, subject) for action, subject, _ in told] == [
        ("sensitivity.stay", "key-1 r"), ("residency.refuse", "key-1 r")
    ]  # fmt: skip
    assert CARD not in str(told)
    assert told[0][2]["kinds"] == {"credit_card": 1}


@pytest.mark.parametrize(("region", "seen"), [("eu", ["there"]), ("uk", None)])
def test_a_keys_regions_hold_for_what_is_asked_for_by_name(
    portfolio: Portfolio, region: str, seen: list[str] | None
) -> None:
    """Whichever of the two stages looks."""
    asked: list[list[str]] = []

    async def last(exchange: Exchange) -> Reply:
        asked.append([target.backend.name for route in exchange.routes for target in route.targets])
        return Reply(200)

    clearance = confined(Clearance(), Principal("k", metadata={"regions": [region]}))
    for stage in (Residency(SensitivitySettings()), Guard()):
        exchange = exchange_of(TEXT)
        exchange.routes, exchange.notes[NOTE] = portfolio.routes("m"), clearance
        if seen is None:
            with pytest.raises(ApiError, match="stays in region uk; it could be served in cloud, on-premises"):
                asyncio.run(stage.handle(exchange, last))  # type: ignore[arg-type]
        else:
            asyncio.run(stage.handle(exchange, last))  # type: ignore[arg-type]
    assert asked == ([] if seen is None else [seen] * 2)


def test_ours_see_the_data_where_only_ours_are_asked(portfolio: Portfolio) -> None:
    settings = SensitivitySettings(default="redact")
    payloads: list[bytes] = []

    async def last(exchange: Exchange) -> Reply:
        payloads.append(exchange.payload)
        return Reply(200)

    body = json.dumps({"model": "m", "prompt": MAIL}).encode()
    for routes in (portfolio.routes("m"), [Route((portfolio.targets[0],), "m")]):
        exchange = exchange_of(body)
        exchange.routes = routes
        exchange.notes[NOTE] = asyncio.run(Detector(settings).clear(exchange))
        asyncio.run(Residency(settings).handle(exchange, last))
    assert json.loads(payloads[0])["prompt"] == "[EMAIL_1]"
    assert payloads[1] == body


def test_decisions_are_in_the_chained_trail(tmp_path: Path, cloud: FakeUpstream) -> None:
    from tokenmill.engine.gateway.governance import audit
    from tokenmill.engine.gateway.governance.options import Options, digest
    from tokenmill.engine.gateway.store import Store

    master = "a master key of some length"
    options = Options(str(tmp_path / "books.sqlite"), digest(master))
    backend = Backend("vast", cloud.url, "frontier", ("vast",), zone="cloud")
    with RunningGateway(backend, governance=options, key=master, sensitivity=SensitivitySettings()) as gateway:
        asked = {"model": "vast", "messages": [{"role": "user", "content": CARD}]}
        assert gateway.post("/v1/chat/completions", asked, authorization=f"Bearer {master}")[0] == 403
    store = Store(options.store, ())
    rows = store.reader.execute("SELECT action, subject, details FROM audit ORDER BY sequence").fetchall()
    audit.verify(store.reader)
    store.close()
    actions = [row[0] for row in rows]
    assert actions[-2:] == ["sensitivity.stay", "residency.refuse"]
    assert "4111" not in str(rows)


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("card 3491 492316 67739@pay.example.com ok", "card [CREDIT_CARD_2] ok"),
        ("a bob@example.com and bob@example.com.", "a [EMAIL_1] and [EMAIL_1]."),
        ("password: abc123xyz/secret: def456uvw", "password: [CREDENTIAL_1]/secret: [CREDENTIAL_2]"),
        ("password: abc123xyz%20secret: def456uvw", "password: [CREDENTIAL_1]%20secret: [CREDENTIAL_2]"),
    ],
)
def test_of_data_that_overlap_no_piece_is_left(text: str, hidden: str) -> None:
    clearance = clear(SensitivitySettings(default="redact"), json.dumps({"prompt": text}).encode())
    assert clearance.hidden is not None
    assert json.loads(clearance.hidden.raw) == {"prompt": hidden}


def test_data_that_overlap_count_as_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand cards and addresses may overlap in a quarter of a million ways."""
    body = json.dumps({"prompt": "card 3491 492316 67739@pay.example.com ok"}).encode()
    for most, action in ((2, "stay"), (3, "redact")):
        monkeypatch.setattr(detector, "MOST_VALUES", most)
        assert clear(SensitivitySettings(default="redact"), body).action == action


@pytest.mark.parametrize(
    "text", ["ask bob@example.comborn%20on%2017.04.1974", "sk-abcdefghijklmnop1234-EIN%2097\\-2472325 is it"]
)
def test_what_only_shows_without_escapes_stays_although_its_word_went(text: str) -> None:
    clearance = clear(SensitivitySettings(default="redact"), json.dumps({"prompt": text}).encode())
    assert (clearance.action, len(clearance.kinds)) == ("stay", 2)


SPLIT = [
    ("Authorization: Bearer 83KNEiFH7Z8kRILjc8Nj", "qfGxl4n2Cus4WyQjJAxf"),
    ("john@example.co", "mpany.example"),
    ("+49 171 1234", "567890"),
    ("10.20.30.4", "0"),
    ("password: hunter22", "secret99"),
]


@pytest.mark.parametrize("parts", SPLIT, ids=lambda parts: parts[0])
def test_data_split_over_two_parts_stay_although_the_first_half_looks_like_some(parts: tuple[str, str]) -> None:
    content = [{"type": "text", "text": part} for part in parts]
    body = json.dumps({"messages": [{"role": "user", "content": content}]}).encode()
    assert clear(SensitivitySettings(default="redact"), body).action == "stay"


@pytest.mark.parametrize("parts", [("From: bob@example.com", "Summarise this"), ("call +49 171 1234567", "today")])
def test_a_word_in_the_next_part_is_none_of_the_data(parts: tuple[str, str]) -> None:
    content = [{"type": "text", "text": part} for part in parts]
    body = json.dumps({"messages": [{"role": "user", "content": content}]}).encode()
    assert clear(SensitivitySettings(default="redact"), body).action == "redact"


def test_the_address_of_a_request_is_searched(gateway: RunningGateway, cloud: FakeUpstream) -> None:
    cloud.books = Books()
    for path in ("/v1/users/bob.smith@example.com/summary", "/v1/users/summary?of=bob.smith%40example.com"):
        status, _, raw = gateway.post(path, {"model": "vast", "prompt": "hello"})
        assert (status, json.loads(raw)["error"]["code"]) == (403, "residency")
    assert cloud.books.requests == []
