"""The stage that says whose request it is, and refuses those of nobody.

What is known of a key is kept in memory. Every change to keys and accounts is audited in its own transaction, so the
number of changes in the audit trail is the version of what was kept. It is read a few times a second, and from a file
also when there is news. Either way a key that was revoked by any process is refused from the next request on: the
transaction that reserves looks again (`books`).
"""

import time
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass

from tokenmill.engine.gateway.api_error import ApiError, quote
from tokenmill.engine.gateway.database import Connection, StoreUnavailableError, now_ms
from tokenmill.engine.gateway.governance import accounts, audit, keys
from tokenmill.engine.gateway.governance.accounts import MASTER
from tokenmill.engine.gateway.governance.keys import Key
from tokenmill.engine.gateway.governance.options import digest
from tokenmill.engine.gateway.governance.service import Governance
from tokenmill.engine.gateway.heads import without
from tokenmill.engine.gateway.openapi import INFERENCE_PATHS
from tokenmill.engine.gateway.paths import is_of_an_account
from tokenmill.engine.gateway.pipeline import Exchange, Handler, Reply
from tokenmill.engine.gateway.principal import Principal

#: Headers that hold a client's credentials for the gateway: they end here.
CREDENTIALS = frozenset(
    {b"authorization", b"x-api-key", b"api-key", b"x-litellm-api-key", b"cookie", b"proxy-authorization"}
)
#: Fields of vLLM and SGLang by which an engine fetches a prompt's cache from an address: that of others' prompts, too.
_BETWEEN_ENGINES = frozenset(
    {"kv_transfer_params", "ec_transfer_params", "bootstrap_host", "bootstrap_port", "bootstrap_room"}
)
#: Keys kept in memory; beyond it all are forgotten.
MOST_KEPT = 10_000
#: Seconds for which a version is good: of a server; of a file as long as there is no news.
VERSION_KEPT_S = 0.1


@dataclass(frozen=True)
class _Known:
    """What a valid key stands for, until when in milliseconds."""

    principal: Principal
    until: int | None


class Identities:
    """Finds the owner of a request.

    Args:
        governance: For the store and the master key.
    """

    def __init__(self, governance: Governance) -> None:
        self._governance = governance
        self._known: dict[str, _Known] = {}
        self._version = -1
        self._read_at = 0.0
        self._news: object = None

    def of(self, fields: Mapping[bytes, bytes]) -> Principal:
        """The owner of a request with these headers, the first value of each by its name in lower case.

        Raises:
            ApiError: 401 without a key that is valid now; 503 while the store cannot be asked; 429 after too many keys
                that nobody has.
        """
        key = credential(fields)
        if not key:
            raise _unauthorised("No API key was given; send `Authorization: Bearer KEY`.")
        hashed = digest(key)
        if self._governance.guesses.is_master(hashed):
            return Principal(MASTER)
        try:
            return self._owner(hashed)
        except StoreUnavailableError as error:
            raise self._governance.unreadable(error) from error

    def _owner(self, hashed: str) -> Principal:
        """The owner of the key with this hash."""
        store = self._governance.store
        reader = store.reader
        tick, news = time.monotonic(), store.news()
        if news != self._news or tick - self._read_at > VERSION_KEPT_S:
            version = audit.changes(reader)
            self._read_at, self._news = tick, news
            if version != self._version or len(self._known) > MOST_KEPT:
                self._known.clear()
                self._version = version
        known = self._known.get(hashed)
        now = now_ms()
        if known is None or (known.until is not None and now >= known.until):
            key = keys.by_hash(reader, hashed)
            if key is None:
                raise self._governance.guesses.refused() or _unauthorised("This API key is not known here.")
            known = self._known[hashed] = _what_it_stands_for(reader, key, now)
        return known.principal


def credential(fields: Mapping[bytes, bytes]) -> str:
    """The key that a request with these headers brings; empty where it brings none.

    It is in `x-litellm-api-key`, which goes first: `authorization` may then be another's; in `authorization`; in
    Anthropic's `x-api-key` or Azure's `api-key`. With `Bearer` before it or bare.

    Raises:
        ApiError: 401 for another scheme than Bearer.
    """
    said = fields.get(b"x-litellm-api-key") or fields.get(b"authorization")
    if not said:
        return (fields.get(b"x-api-key") or fields.get(b"api-key", b"")).strip().decode("latin-1")
    scheme, space, key = said.partition(b" ")
    if scheme.lower() != b"bearer":
        if space:
            raise _unauthorised("The `Authorization` header is not `Bearer KEY`.")
        key = scheme
    return key.strip().decode("latin-1")


def _what_it_stands_for(reader: Connection, key: Key, now: int) -> _Known:
    refusal = key.refusal(now)
    if refusal is not None:
        raise _unauthorised(f"The API key {key.id} {refusal}.")
    chain = accounts.chain(reader, key.id)
    above = {account.kind: account.id for account in chain}
    passed = [account for account in chain if account.soft_reached_at is not None and not account.renewed(now)]
    principal = Principal(
        key.id,
        above.get("organisation"),
        above.get("team"),
        above.get("app"),
        key.models,
        key.metadata,
        soft_limit_reached=bool(passed),
    )
    ends = [key.expires_at, *(account.period_end for account in passed)]
    return _Known(principal, min((end for end in ends if end is not None), default=None))


def revoked(key: str) -> ApiError:
    """401: the key was good when it was looked up and is not any more."""
    return _unauthorised(f"The API key {key} was revoked.")


def _unauthorised(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key", headers=[(b"www-authenticate", b"Bearer")])


class Identify:
    """Finds the principal, holds him to his models, and keeps his credentials from the backends.

    Args:
        identities: Who is who.
        default_model: What a request without `model` means.
    """

    name = "identify"

    def __init__(self, identities: Identities, default_model: str | None) -> None:
        self._identities = identities
        self._default_model = default_model

    def handle(self, exchange: Exchange, proceed: Handler) -> Awaitable[Reply]:
        """See `pipeline.Stage`."""
        exchange.principal = principal = self._identities.of(exchange.fields)
        exchange.forward = without(exchange.forward, CREDENTIALS)
        endpoint = exchange.endpoint
        if endpoint not in INFERENCE_PATHS and is_of_an_account(endpoint) and principal.key != MASTER:
            raise ApiError(
                403,
                f"{quote(endpoint, 60)} is about what the backend keeps for its whole account: nobody could tell "
                "whose of the gateway's keys it is, so it is not passed on.",
                code="path_not_allowed",
            )
        body = exchange.body
        for name in () if body is None else body.those_of(_BETWEEN_ENGINES):
            if body is not None and body.raw_field(name) != b"null" and principal.key != MASTER:
                raise ApiError(
                    400,
                    f"`{name}` is what engines tell each other of the caches that they fetch from; leave it out.",
                    code="invalid_field",
                    param=name,
                )
        model = exchange.model if exchange.model is not None else self._default_model
        if not principal.may_ask_for(model):
            allowed = ", ".join(quote(name) for name in (principal.models or ())[:20]) or "none"
            raise ApiError(
                403,
                f"This API key may not ask for the model `{quote(model or '')}`; its models: {allowed}.",
                code="model_not_allowed",
                param="model",
            )
        return proceed(exchange)
