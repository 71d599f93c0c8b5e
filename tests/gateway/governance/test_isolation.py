"""What one owner of a key cannot reach: what backends keep for their whole account, and what others' keys are."""

import json
from collections.abc import Iterator

import pytest

from tests.gateway.governance.governed import CHAT, MASTER_KEY, Governed, governing
from tests.gateway.running import wait_until
from tests.gateway.upstream import FakeUpstream
from tokenmill.engine.gateway.affinity import prompt_blocks
from tokenmill.engine.gateway.backends import Backend
from tokenmill.engine.gateway.body import Body
from tokenmill.engine.gateway.governance.accounts import Limits
from tokenmill.engine.gateway.sensitivity.settings import SensitivitySettings
from tokenmill.engine.gateway.settings import Settings


@pytest.fixture(scope="module")
def governed(shared_upstream: FakeUpstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Governed]:
    place = str(tmp_path_factory.mktemp("isolation") / "gateway.db")
    backend = Backend("a", shared_upstream.url, "utility", api_key="the-accounts-own", prefix_cache="team")
    settings = Settings(probe_interval_s=0.1, default_model="tiny")
    policy = SensitivitySettings()
    with governing(place, backend, settings=settings, sensitivity=policy) as running:
        yield running


@pytest.mark.parametrize(
    "path",
    [
        "/v1/files",
        "/openai/v1/files",
        "/v1/f%69les",
        "/v1/Files",
        "/v1/uploads/upload_1/complete",
        "/v1/batches",
        "/v1/messages/batches",
        "/v1/vector_stores/vs_1/search",
        "/v1/conversations/conv_1/items",
        "/v1/threads/thread_1/runs",
        "/v1/fine_tuning/jobs",
        "/v1/organization/admin_api_keys",
        "/v1/realtime/client_secrets",
        "/v1/containers/cntr_1/files",
        "/v1/chat/completions/chatcmpl-1",
    ],
)
def test_no_key_reaches_what_is_kept_for_the_whole_account(
    governed: Governed, upstream: FakeUpstream, path: str
) -> None:
    _, key = governed.key()
    for body in ({"model": "tiny", "query": "x"}, {}):
        status, _, answer = governed.ask(key, body, path)
        assert (status, json.loads(answer)["error"]["code"]) == (403, "path_not_allowed")
    assert not upstream.books.requests
    assert governed.ask(MASTER_KEY, {"model": "tiny"}, path)[0] == 200  # whoever has it administrates


@pytest.mark.parametrize(
    "path",
    [
        CHAT,
        "/v1/responses/compact",
        "/v1/audio/speech",
        "/v1/agents/completions",
        "/v1/videos/sync",
        "/v1/future/thing",
    ],
)
def test_other_paths_go_on(governed: Governed, upstream: FakeUpstream, path: str) -> None:
    _, key = governed.key()
    assert governed.ask(key, {"model": "tiny", "messages": []}, path)[0] == 200
    assert [asked for asked, _, _ in upstream.books.requests] == [path]


@pytest.mark.parametrize("field", ["kv_transfer_params", "bootstrap_host"])
def test_no_key_has_an_engine_fetch_caches_of_others(governed: Governed, upstream: FakeUpstream, field: str) -> None:
    _, key = governed.key()
    ask = {"model": "tiny", "messages": []}
    status, _, answer = governed.ask(key, {**ask, field: {"remote_host": "10.0.0.9", "remote_block_ids": [1, 2]}})
    assert (status, json.loads(answer)["error"]["param"]) == (400, field)
    assert not upstream.books.requests
    assert governed.ask(key, {**ask, field: None})[0] == 200


def test_the_gateways_own_key_is_charged_to_its_own_account(governed: Governed, upstream: FakeUpstream) -> None:
    _, key = governed.key()
    theirs = {"openai_organization": "org-theirs", "openai_project": "proj_theirs"}
    governed.gateway.post(CHAT, {"model": "tiny", "messages": []}, authorization=f"Bearer {key}", **theirs)
    headers = upstream.books.requests[0][1]
    assert headers["authorization"] == "Bearer the-accounts-own"
    assert not {"openai-organization", "openai-project"} & set(headers)


def test_a_key_does_not_learn_which_others_there_are(governed: Governed) -> None:
    identity, _ = governed.key()
    own, key = governed.key()
    answers = {
        governed.gateway.send("GET", f"/key/info?key={said}", headers={"authorization": f"Bearer {key}"})[::2]
        for said in (identity, "key-000000000000", "sk-nobody", "master")
    }
    assert len(answers) == 1
    assert next(iter(answers))[0] == 403
    for said in (own, key):
        found = governed.gateway.send("GET", f"/key/info?key={said}", headers={"authorization": f"Bearer {key}"})
        assert json.loads(found[2])["info"]["token_id"] == own


def test_the_audit_trail_holds_no_data_of_a_path_and_no_long_one(governed: Governed) -> None:
    _, key = governed.key()
    ask = {"model": "tiny", "input": "write to anna@example.com"}
    assert governed.ask(key, ask, "/v1/of/anna@example.com")[0] == 200
    assert governed.ask(key, ask, "/v1/" + "a" * 30_000)[0] == 404

    def told() -> list[str]:
        query = "SELECT details FROM audit WHERE subject LIKE ? AND action = 'sensitivity.stay'"
        return [row[0] for row in governed.store.reader.execute(query, ("key-%",))]

    wait_until(lambda: bool(told()))
    assert [json.loads(details)["endpoint"] for details in told()] == ["other"]
    assert "anna" not in "".join(told())


def test_a_team_has_a_prefix_cache_of_its_own(governed: Governed, upstream: FakeUpstream) -> None:
    one, other = governed.team(Limits()), governed.team(Limits())
    keys = [governed.key(parent=parent)[1] for parent in (one, one, other, None, None)]
    for key in keys:
        for said in ({}, {"cache_salt": None}, {"cache_salt": "mine"}):
            assert governed.ask(key, {"model": "tiny", "messages": [], **said})[0] == 200
    salts = [json.loads(body)["cache_salt"] for _, _, body in upstream.books.requests]
    by_key = [tuple(salts[start : start + 3]) for start in range(0, len(salts), 3)]
    assert by_key[0] == by_key[1]
    assert len({salt for key in by_key[1:] for salt in key}) == 4 * 3 - 4  # null is nothing
    assert all(len(salt) <= 128 and salt.isalnum() for salt in salts)
    assert not any(team in salt for salt in salts for team in (one, other))


def test_where_a_prompt_goes_does_not_tell_what_others_asked() -> None:
    body = Body(json.dumps({"messages": "word " * 1000}).encode())
    everybodys, one, other = (prompt_blocks(body, "m", whose) for whose in (None, "a", "b"))
    assert one == prompt_blocks(body, "m", "a")
    assert len(one) > 8
    assert set(one).isdisjoint(other)
    assert set(one).isdisjoint(everybodys)
