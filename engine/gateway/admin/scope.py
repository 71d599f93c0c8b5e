"""What a team's administrator may see and do: keys and books of his own account and of those below it.

His account is the one above his key. Keys that he makes may not do more than his own: its list of models and what its
metadata confines it to hold for them, too; budgets and rates above them hold anyhow. What lies outside is, to him, not
there.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from tokenmill.engine.gateway.admin import roles
from tokenmill.engine.gateway.admin.books import Column
from tokenmill.engine.gateway.admin.endpoint import Call
from tokenmill.engine.gateway.api_error import ApiError
from tokenmill.engine.gateway.database import Connection
from tokenmill.engine.gateway.governance import accounts, keys
from tokenmill.engine.gateway.governance.keys import Key
from tokenmill.engine.gateway.principal import Principal
from tokenmill.errors import InputError

#: What a key's metadata confines it to; see `sensitivity.stages`.
_CONFINING = ("zones", "regions")
_BELOW = (
    "WITH RECURSIVE below (id) AS (SELECT id FROM accounts WHERE id = ? "
    "UNION ALL SELECT accounts.id FROM accounts JOIN below ON accounts.parent = below.id) SELECT id FROM below"
)


def below(connection: Connection, scope: str) -> frozenset[str]:
    """The account and all below it, keys included."""
    return frozenset(row[0] for row in connection.execute(_BELOW, (scope,)))


def account(connection: Connection, call: Call, identity: str) -> accounts.Account:
    """An account that the actor may see.

    Raises:
        InputError: There is none, or it is outside.
    """
    scope = call.actor.scope
    if scope is not None and all(one.id != scope for one in accounts.chain(connection, identity)):
        raise InputError(accounts.missing(identity))
    return accounts.find(connection, identity)


def key(connection: Connection, call: Call, identity: str) -> Key:
    """A key that the actor may see.

    Raises:
        InputError: There is none, or it is outside.
    """
    found = keys.by_id(connection, identity)
    scope = call.actor.scope
    if scope is not None and all(one.id != scope for one in accounts.chain(connection, identity)):
        raise InputError(keys.missing(identity))
    return found


def revocable(connection: Connection, call: Call, identity: str) -> None:
    """Raises where the actor may not revoke a key: `InputError` outside, 403 for one with a role."""
    key(connection, call, identity)
    if call.actor.scope is not None and roles.role_of(connection, identity) is not None:
        raise ApiError(403, "This key has a role; the role admin is needed to revoke it.", code="forbidden")


def parent(connection: Connection, call: Call, said: str | None) -> str | None:
    """Above what a new key of the actor stands: what he says, within his account; his account where he says nothing.

    Raises:
        InputError: There is no such account, or it is outside.
    """
    scope = call.actor.scope
    return said if scope is None else account(connection, call, said or scope).id


def restricted(
    connection: Connection, call: Call, models: Sequence[str] | None, metadata: Mapping[str, Any], role: str | None
) -> tuple[Sequence[str] | None, dict[str, Any]]:
    """(models, metadata) of a new key, within those of the actor's own.

    Raises:
        ApiError: 403 for a key that may do more, or has a role.
    """
    if call.actor.scope is None:
        return models, dict(metadata)
    if role is not None:
        raise ApiError(403, "The role admin is needed to give a role.", code="forbidden", param="role")
    own = keys.by_id(connection, call.actor.name)
    if own.models is not None and models is not None:
        may = Principal("", models=own.models).may_ask_for
        # A key for the router alone has every tier; beside others it has those.
        routed = set(call.routed)
        widened = bool(models) and set(models) <= routed and not set(own.models) <= routed and not may("*")
        if widened or not all(map(may, models)):
            holds = ", ".join(own.models)
            raise ApiError(403, f"Your own key may ask for {holds} alone.", code="forbidden", param="models")
    confined = {name: own.metadata[name] for name in _CONFINING if name in own.metadata}
    for name, value in confined.items():
        if metadata.get(name, value) != value:
            raise ApiError(403, f"Your own key is confined to {name} {value}.", code="forbidden", param="metadata")
    return own.models if models is None else models, {**metadata, **confined}


def conditions(connection: Connection, call: Call, asked: Mapping[Column, str]) -> dict[Column, str]:
    """Which of the ledger's rows are summed: what is asked for, within the actor's account.

    Raises:
        ApiError: 403 where another account of the same kind is asked for.
    """
    if call.actor.scope is None:
        return dict(asked)
    own = accounts.find(connection, call.actor.scope)
    column: Column = own.kind  # organisation, team and app are columns of the ledger; above a key stands no key
    if asked.get(column, own.id) != own.id:
        raise ApiError(403, f"You may see the {own.kind} {own.id} alone.", code="forbidden", param=column)
    return {**asked, column: own.id}
