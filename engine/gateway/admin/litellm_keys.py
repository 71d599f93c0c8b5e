"""LiteLLM's key management on our keys: `/key/generate`, `/key/info`, `/key/update`, `/key/delete`.

Field names and shapes are LiteLLM's (docs.litellm.ai, proxy/virtual_keys). A field that is not taken is refused unless
it says nothing: a restriction must not be lost on the way, also one that LiteLLM learns tomorrow.
"""

from collections.abc import Mapping
from typing import Any

from msgspec import UNSET, UnsetType

from tokenmill.engine.gateway.admin import keyring, views
from tokenmill.engine.gateway.admin.bodies import LiteLLMChange, LiteLLMDelete, LiteLLMKey
from tokenmill.engine.gateway.admin.duration import milliseconds, moment
from tokenmill.engine.gateway.admin.endpoint import Call, Endpoint, Parameter
from tokenmill.engine.gateway.admin.endpoints import checked_metadata
from tokenmill.engine.gateway.api_error import ApiError, quote
from tokenmill.engine.gateway.database import Connection, now_ms
from tokenmill.engine.gateway.governance import accounts, keys
from tokenmill.engine.gateway.governance.accounts import Limits
from tokenmill.engine.gateway.governance.keys import Key
from tokenmill.engine.gateway.governance.options import digest
from tokenmill.engine.gateway.money import micro_cents

#: What some say is so here without them: a key without a role may ask models and about itself, and nothing else.
_AS_IT_IS: Mapping[str, tuple[Any, ...]] = {
    "key_type": ("default", "llm_api"),
    "rpm_limit_type": ("best_effort_throughput",),
    "tpm_limit_type": ("best_effort_throughput",),
}
#: The same of a key that is new: it has spent nothing. Of another it would mean that its books begin anew.
_AS_NEW: Mapping[str, tuple[Any, ...]] = {**_AS_IT_IS, "spend": (0,)}
#: LiteLLM's names for every model.
_ALL = frozenset({"*", "all-proxy-models", "all-team-models"})
#: LiteLLM's duration of a key that does not end.
_ENDLESS = "-1"


def _refuse_others(call: Call, as_it_is: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuses fields that would be lost. LiteLLM's clients send those empty where nothing was chosen."""
    sent: dict[str, Any] = call.request.state.fields
    taken = call.body.__struct_fields__
    for field, value in sent.items():
        if field in taken or value is None or value is False or (isinstance(value, str | list | dict) and not value):
            continue
        if value not in as_it_is.get(field, ()):
            name = quote(field)
            raise ApiError(400, f"`{name}` is not supported here; leave it out.", code="unsupported_field", param=name)


def _models(models: list[str] | None) -> list[str] | None:
    return None if not models or _ALL & set(models) else models


def _amount(value: float | str | None) -> int | None:
    return None if value is None or isinstance(value, str) else micro_cents(value)


def _length(value: str | None) -> int | None:
    return None if value is None else milliseconds(value)


def _end(duration: str | UnsetType | None, expires: str | UnsetType | None) -> int | None:
    """When a key ends, in milliseconds, by either field; None: never."""
    if duration and expires:
        raise ApiError(400, "`duration` and `expires` both say when the key ends; keep one.", param="expires")
    if expires:
        return moment(expires, now_ms())
    return now_ms() + milliseconds(duration) if duration and duration != _ENDLESS else None


async def generate(call: Call) -> Any:
    """A new key."""
    body: LiteLLMKey = call.body
    _refuse_others(call, _AS_NEW)
    metadata = checked_metadata(body.metadata)
    if body.user_id:
        metadata = {**metadata, "user_id": body.user_id}
    limits = Limits(
        _amount(body.max_budget),
        _amount(body.soft_budget),
        _length(body.budget_duration),
        body.rpm_limit,
        body.tpm_limit,
        body.max_parallel_requests,
    )
    expires_at = _end(body.duration, body.expires)
    store = call.governance.store

    def run(connection: Connection) -> tuple[str, str]:
        _refuse_taken(connection, body.key_alias)
        return keys.create(
            connection,
            call.by,
            name=body.key_alias or "",
            parent=body.team_id or None,
            models=_models(body.models),
            limits=limits,
            expires_at=expires_at,
            metadata=metadata,
        )

    identity, secret = await store.write(run)
    shown = views.litellm_key(store.reader, keys.by_id(store.reader, identity))
    return {**shown, "key": secret}


async def info(call: Call) -> Any:
    """A key's state: one's own, or any for who administrates."""
    reader = call.governance.store.reader
    asked = call.query("key")
    if asked is None and call.actor.role is not None and call.actor.name == "master":
        raise ApiError(400, "`key` is missing; name a key, its token or its id.", code="missing", param="key")
    if not call.actor.may("auditor"):
        own = {call.actor.name, keyring.secret_hash(reader, call.actor.name)}
        if asked is not None and own.isdisjoint((asked, digest(asked))):
            # Whether or not there is such a key: which ones others have is not his to find out.
            raise ApiError(403, "This key may only ask about itself.", code="forbidden")
        asked = call.actor.name
    found = keyring.named(reader, asked if asked is not None else call.actor.name)
    shown = views.litellm_key(reader, found)
    return {"key": shown["token"], "info": shown}


async def update(call: Call) -> Any:
    """Changes a key; what is not named stays."""
    body: LiteLLMChange = call.body
    _refuse_others(call, _AS_IT_IS)
    if body.metadata is not UNSET:
        checked_metadata(body.metadata)
    ends = any(said is not UNSET and said != "" for said in (body.duration, body.expires))
    expires_at = _end(body.duration, body.expires)
    store = call.governance.store

    def run(connection: Connection) -> Key:
        found = keyring.named(connection, body.key)
        if body.team_id is not UNSET and body.team_id:
            _stays_below(connection, found, body.team_id)
        if body.key_alias is not UNSET:
            _refuse_taken(connection, body.key_alias, found.id)
        account = accounts.find(connection, found.id)
        kept = account.limits
        limits = Limits(
            kept.hard_limit if body.max_budget is UNSET else _amount(body.max_budget),
            kept.soft_limit if body.soft_budget is UNSET else _amount(body.soft_budget),
            kept.period_ms if body.budget_duration is UNSET else _length(body.budget_duration),
            kept.requests_per_minute if body.rpm_limit is UNSET else body.rpm_limit,
            kept.tokens_per_minute if body.tpm_limit is UNSET else body.tpm_limit,
            kept.requests_at_once if body.max_parallel_requests is UNSET else body.max_parallel_requests,
        )
        if limits != kept:
            accounts.set_limits(connection, found.id, limits, call.by)
        keyring.change(
            connection,
            found.id,
            call.by,
            name=account.name if body.key_alias is UNSET else body.key_alias or "",
            models=found.models if body.models is UNSET else _models(body.models),
            metadata=_metadata(body, found.metadata),
            expires_at=expires_at if ends else found.expires_at,
        )
        return keys.by_id(connection, found.id)

    found = await store.write(run)
    return {"key": body.key, **views.litellm_key(store.reader, found)}


def _refuse_taken(connection: Connection, alias: str | None, own: str | None = None) -> None:
    """Refuses an alias that another key has: here, too, it names one key. Names that `/admin` gives may repeat."""
    if alias and any(identity != own for identity in keyring.aliased(connection, alias)):
        raise ApiError(
            400,
            f"A key with the alias `{quote(alias)}` exists already; choose another, or delete that key.",
            code="alias_taken",
            param="key_alias",
        )


def _aliased(connection: Connection, alias: str) -> str:
    """The key that an alias means.

    Raises:
        ApiError: 404 where it means none, 400 where `/admin` gave several keys this name.
    """
    found = keyring.aliased(connection, alias)
    if len(found) == 1:
        return found[0]
    if not found:
        raise ApiError(404, f"There is no key with the alias `{quote(alias)}`.", code="not_found", param="key_aliases")
    raise ApiError(
        400,
        f"{len(found)} keys have the alias `{quote(alias)}`; delete them by their ids: {', '.join(found[:5])}.",
        code="alias_not_unique",
        param="key_aliases",
    )


def _stays_below(connection: Connection, found: Key, team: str) -> None:
    """Refuses to move a key: what it has spent is in its team's books."""
    if team not in [account.id for account in accounts.chain(connection, found.id)]:
        raise ApiError(
            400, "A key stays in its team; make a new one in the other.", code="unsupported_field", param="team_id"
        )


def _metadata(body: LiteLLMChange, kept: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata to keep; the user is a part of it here, and a field of his own there."""
    changed = dict(kept) if body.metadata is UNSET else dict(body.metadata or {})
    user = kept.get("user_id") if body.user_id is UNSET else body.user_id
    if user is not None:
        changed["user_id"] = user
    elif body.user_id is not UNSET:
        changed.pop("user_id", None)
    return changed


async def delete(call: Call) -> Any:
    """Revokes keys; their books stay."""
    body: LiteLLMDelete = call.body
    said, aliases = body.keys or [], body.key_aliases or []
    if not said and not aliases:
        raise ApiError(400, "`keys` is missing; list keys, tokens or ids.", code="missing", param="keys")

    def run(connection: Connection) -> None:
        found = [keyring.named(connection, name).id for name in said]
        found += [_aliased(connection, alias) for alias in aliases]
        for identity in found:
            keys.revoke(connection, identity, call.by)

    await call.governance.store.write(run)
    return {"deleted_keys": [*said, *aliases]}


ENDPOINTS: tuple[Endpoint, ...] = (
    Endpoint("POST", "/key/generate", "LiteLLM: makes a key; it is shown once.", generate, body=LiteLLMKey),
    Endpoint("GET", "/key/info", "LiteLLM: a key's state; without `key`, one's own.", info, None,
             query=(Parameter("key", "The key, its token or its id."),)),
    Endpoint("POST", "/key/update", "LiteLLM: changes a key; what is not named stays.", update, body=LiteLLMChange),
    Endpoint("POST", "/key/delete", "LiteLLM: revokes keys.", delete, body=LiteLLMDelete),
)  # fmt: skip
