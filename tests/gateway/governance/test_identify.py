"""Whose request it is: which header brings the key, and how long what is known of a key is good."""

from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.gateway.governance.governed import MASTER_KEY, options
from tests.gateway.governance.test_budgets import HOUR, ask, end, key_with
from tokenmill.engine.gateway.api_error import ApiError
from tokenmill.engine.gateway.database import now_ms
from tokenmill.engine.gateway.governance import accounts, identify, keys
from tokenmill.engine.gateway.governance.accounts import MASTER, Limits
from tokenmill.engine.gateway.governance.guesses import Guesses
from tokenmill.engine.gateway.governance.identify import Identities, credential
from tokenmill.engine.gateway.principal import Principal
from tokenmill.engine.gateway.store import Store


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"authorization": "Bearer sk-a"}, "sk-a"),
        ({"authorization": "bearer  sk-a "}, "sk-a"),
        ({"authorization": "sk-a"}, "sk-a"),
        ({"authorization": "Bearer sk-a b"}, "sk-a b"),
        ({"authorization": "Bearer"}, ""),
        ({"x-api-key": " sk-a "}, "sk-a"),
        ({"api-key": "sk-a"}, "sk-a"),
        ({"x-api-key": "sk-a", "api-key": "sk-b"}, "sk-a"),
        ({"authorization": "Bearer sk-a", "x-api-key": "sk-b"}, "sk-a"),
        ({"authorization": "", "x-api-key": "sk-b"}, "sk-b"),
        ({"x-litellm-api-key": "Bearer sk-a", "authorization": "Bearer of another"}, "sk-a"),
        ({}, ""),
    ],
)
def test_where_a_key_stands(fields: dict[str, str], key: str) -> None:
    assert credential({name.encode(): value.encode() for name, value in fields.items()}) == key


@pytest.mark.parametrize("name", ["authorization", "x-litellm-api-key"])
def test_another_scheme_is_refused(name: str) -> None:
    with pytest.raises(ApiError, match="not `Bearer KEY`") as refused:
        credential({name.encode(): b"Basic YTpi", b"x-api-key": b"sk-a"})
    assert refused.value.status == 401


def known_to(store: Store) -> Any:
    """(key to its principal), of one process."""
    governance = SimpleNamespace(store=store, guesses=Guesses(options(str(store.place))))
    identities = Identities(cast("Any", governance))
    return lambda key: identities.of({b"authorization": f"Bearer {key}".encode()})


def test_a_key_that_is_known_expires_all_the_same(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    of = known_to(store)
    assert of(MASTER_KEY) == Principal(MASTER)
    identity, key = store.write_now(partial(keys.create, actor="t", lifetime_ms=HOUR))
    expires = keys.by_id(store.reader, identity).expires_at
    assert expires is not None
    monkeypatch.setattr(identify, "now_ms", lambda: expires - 1)
    assert of(key).key == identity
    monkeypatch.setattr(identify, "now_ms", lambda: expires)
    with pytest.raises(ApiError, match="has expired"):
        of(key)
    with pytest.raises(ApiError, match="not known here"):
        of(key + "x")


def test_a_soft_limit_is_passed_until_its_period_ends(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    of = known_to(store)
    identity = key_with(store, Limits(soft_limit=5, period_ms=HOUR))
    other, key = store.write_now(partial(keys.create, actor="t", parent="team"))
    assert not of(key).soft_limit_reached
    assert ask(store, identity, "a", 5) is None
    assert end(store, "a", 5)
    monkeypatch.setattr(identify, "VERSION_KEPT_S", 0.0)
    assert of(key) == Principal(other, None, "team", None, soft_limit_reached=True)
    ends = accounts.find(store.reader, "team").period_end
    assert ends is not None and ends > now_ms()
    for at, reached in ((ends - 1, True), (ends, False)):
        monkeypatch.setattr(identify, "now_ms", lambda at=at: at)
        assert of(key).soft_limit_reached is reached
