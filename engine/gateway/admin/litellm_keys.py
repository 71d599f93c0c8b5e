"""LiteLLM's key management on our keys: `/key/generate`, `/key/info`, `/key/update`, `/key/delete`.

Field names and shapes are LiteLLM's (docs.litellm.ai, proxy/virtual_keys). A field that would restrict a key and has
no meaning here is refused, not ignored: a restriction must not be lost on the way.
"""

from typing import Any

from msgspec import UNSET

from tokenmill.engine.gateway.admin import keyring, views
from tokenmill.engine.gateway.admin.bodies import LiteLLMChange, LiteLLMDelete, LiteLLMKey
from tokenmill.engine.gateway.admin.duration import milliseconds
from tokenmill.engine.gateway.admin.endpoint import Call, Endpoint, Parameter
from tokenmill.engine.gateway.admin.endpoints import checked_metadata
from tokenmill.engine.gateway.api_error import ApiError
from tokenmill.engine.gateway.governance import accounts, keys
from tokenmill.engine.gateway.governance.accounts import Limits
from tokenmill.engine.gateway.governance.keys import Key
from tokenmill.engine.gateway.money import micro_cents
from tokenmill.engine.gateway.store import Connection, now_ms

#: Restrictions of LiteLLM's keys that are not kept here.
REFUSED = (
    "allowed_routes", "allowed_cache_controls", "allowed_vector_store_indexes", "blocked", "budget_id",
    "enforced_params", "guardrails", "key", "max_parallel_requests", "model_max_budget", "model_rpm_limit",
    "model_tpm_limit", "object_permission", "permissions", "temp_budget_increase",
)  # fmt: skip
#: LiteLLM's names for every model.
_ALL = frozenset({"all-proxy-models", "all-team-models"})


def _refuse_restrictions(call: Call) -> None:
    """Refuses fields that would be lost."""
    sent: dict[str, Any] = call.request.state.fields
    for field in REFUSED:
        if field == "key" and isinstance(call.body, LiteLLMChange):
            continue
        if sent.get(field) not in (None, [], {}, False):
            raise ApiError(
                400, f"`{field}` is not supported here; leave it out.", code="unsupported_field", param=field
            )


def _models(models: list[str] | None) -> list[str] | None:
    return None if not models or _ALL & set(models) else models


def _amount(value: float | None) -> int | None:
    return None if value is None else micro_cents(value)


def _length(value: str | None) -> int | None:
    return None if value is None else milliseconds(value)


async def generate(call: Call) -> Any:
    """A new key."""
    body: LiteLLMKey = call.body
    _refuse_restrictions(call)
    metadata = checked_metadata(body.metadata)
    if body.user_id is not None:
        metadata = {**metadata, "user_id": body.user_id}
    limits = Limits(
        _amount(body.max_budget),
        _amount(body.soft_budget),
        _length(body.budget_duration),
        body.rpm_limit,
        body.tpm_limit,
    )
    store = call.governance.store
    identity, secret = await store.write(
        lambda connection: keys.create(
            connection,
            call.by,
            name=body.key_alias or "",
            parent=body.team_id,
            models=_models(body.models),
            limits=limits,
            lifetime_ms=_length(body.duration),
            metadata=metadata,
        )
    )
    shown = views.litellm_key(store.reader, keys.by_id(store.reader, identity))
    return {**shown, "key": secret}


async def info(call: Call) -> Any:
    """A key's state: one's own, or any for who administrates."""
    reader = call.governance.store.reader
    asked = call.query("key")
    if asked is None and call.actor.role is not None and call.actor.name == "master":
        raise ApiError(400, "`key` is missing; name a key, its token or its id.", code="missing", param="key")
    found = keyring.named(reader, asked if asked is not None else call.actor.name)
    if not call.actor.may("auditor") and found.id != call.actor.name:
        raise ApiError(403, "This key may only ask about itself.", code="forbidden")
    shown = views.litellm_key(reader, found)
    return {"key": shown["token"], "info": shown}


async def update(call: Call) -> Any:
    """Changes a key; what is not named stays."""
    body: LiteLLMChange = call.body
    _refuse_restrictions(call)
    if body.metadata is not UNSET:
        checked_metadata(body.metadata)
    store = call.governance.store

    def run(connection: Connection) -> Key:
        found = keyring.named(connection, body.key)
        account = accounts.find(connection, found.id)
        kept = account.limits
        limits = Limits(
            kept.hard_limit if body.max_budget is UNSET else _amount(body.max_budget),
            kept.soft_limit if body.soft_budget is UNSET else _amount(body.soft_budget),
            kept.period_ms if body.budget_duration is UNSET else _length(body.budget_duration),
            kept.requests_per_minute if body.rpm_limit is UNSET else body.rpm_limit,
            kept.tokens_per_minute if body.tpm_limit is UNSET else body.tpm_limit,
        )
        if limits != kept:
            accounts.set_limits(connection, found.id, limits, call.by)
        keyring.change(
            connection,
            found.id,
            call.by,
            name=account.name if body.key_alias is UNSET else body.key_alias or "",
            models=found.models if body.models is UNSET else _models(body.models),
            metadata=found.metadata if body.metadata is UNSET else body.metadata or {},
            expires_at=found.expires_at
            if body.duration is UNSET
            else (None if body.duration is None else now_ms() + milliseconds(body.duration)),
        )
        return keys.by_id(connection, found.id)

    found = await store.write(run)
    return {"key": body.key, **views.litellm_key(store.reader, found)}


async def delete(call: Call) -> Any:
    """Revokes keys; their books stay."""
    body: LiteLLMDelete = call.body
    if not body.keys and not body.key_aliases:
        raise ApiError(400, "`keys` is missing; list keys, tokens or ids.", code="missing", param="keys")

    def run(connection: Connection) -> None:
        found = [keyring.named(connection, said).id for said in body.keys]
        found += [identity for alias in body.key_aliases for identity in keyring.aliased(connection, alias)]
        for identity in found:
            keys.revoke(connection, identity, call.by)

    await call.governance.store.write(run)
    return {"deleted_keys": [*body.keys, *body.key_aliases]}


ENDPOINTS: tuple[Endpoint, ...] = (
    Endpoint("POST", "/key/generate", "LiteLLM: makes a key; it is shown once.", generate, body=LiteLLMKey),
    Endpoint("GET", "/key/info", "LiteLLM: a key's state; without `key`, one's own.", info, None,
             query=(Parameter("key", "The key, its token or its id."),)),
    Endpoint("POST", "/key/update", "LiteLLM: changes a key; what is not named stays.", update, body=LiteLLMChange),
    Endpoint("POST", "/key/delete", "LiteLLM: revokes keys.", delete, body=LiteLLMDelete),
)  # fmt: skip
