"""Accounts and keys as JSON: dollars, ISO times, durations. Never a secret."""

from datetime import UTC, datetime
from typing import Any

from tokenmill.engine.gateway.admin import duration, keyring, roles
from tokenmill.engine.gateway.database import Connection, now_ms
from tokenmill.engine.gateway.governance import accounts
from tokenmill.engine.gateway.governance.accounts import Account
from tokenmill.engine.gateway.governance.keys import Key
from tokenmill.engine.gateway.money import dollars


def iso(at: int | None) -> str | None:
    """Milliseconds as a UTC time in ISO 8601."""
    if at is None:
        return None
    return datetime.fromtimestamp(at / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def account(found: Account) -> dict[str, Any]:
    """An account; what it has spent, and when that begins anew, is of the period that runs now."""
    now, limits = now_ms(), found.limits
    over = found.renewed(now)
    return {
        "id": found.id,
        "kind": found.kind,
        "parent": found.parent,
        "name": found.name,
        "limits": {
            "hard_limit_dollars": None if limits.hard_limit is None else dollars(limits.hard_limit),
            "soft_limit_dollars": None if limits.soft_limit is None else dollars(limits.soft_limit),
            "period": duration.shown(limits.period_ms),
            "requests_per_minute": limits.requests_per_minute,
            "tokens_per_minute": limits.tokens_per_minute,
            "requests_at_once": limits.requests_at_once,
        },
        "spent_dollars": 0.0 if over else dollars(found.spent),
        "reserved_dollars": dollars(found.reserved),
        "period_end": iso(found.runs_until(now)),
        "soft_limit_reached_at": None if over else iso(found.soft_reached_at),
    }


def key(connection: Connection, found: Key) -> dict[str, Any]:
    """A key with its account, state and role."""
    return {
        **account(accounts.find(connection, found.id)),
        "models": None if found.models is None else list(found.models),
        "metadata": dict(found.metadata),
        "expires_at": iso(found.expires_at),
        "revoked_at": iso(found.revoked_at),
        "state": found.refusal(now_ms()) or "valid",
        "role": roles.role_of(connection, found.id),
    }


def litellm_key(connection: Connection, found: Key) -> dict[str, Any]:
    """A key in LiteLLM's fields."""
    own = account(accounts.find(connection, found.id))
    limits = own["limits"]
    metadata = dict(found.metadata)
    return {
        "token": keyring.secret_hash(connection, found.id),
        "token_id": found.id,
        "key_name": found.id,
        "key_alias": own["name"] or None,
        "spend": own["spent_dollars"],
        "expires": iso(found.expires_at),
        "models": [] if found.models is None else list(found.models),
        "max_budget": limits["hard_limit_dollars"],
        "soft_budget": limits["soft_limit_dollars"],
        "budget_duration": limits["period"],
        "budget_reset_at": own["period_end"],
        "tpm_limit": limits["tokens_per_minute"],
        "rpm_limit": limits["requests_per_minute"],
        "max_parallel_requests": limits["requests_at_once"],
        "team_id": keyring.parent_team(connection, found.id),
        "user_id": metadata.pop("user_id", None),
        "metadata": metadata,
        "blocked": found.revoked_at is not None,
    }
