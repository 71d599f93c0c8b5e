"""Sessions of the dashboard: a signed cookie, valid in every worker until its time is over or somebody logs out.

It is void when the master key changes, and so is a key's when that is revoked or gets another secret.
"""

import hashlib
import hmac
import re
import secrets

from tokenmill.engine.gateway.admin import keyring, roles
from tokenmill.engine.gateway.admin.roles import Actor
from tokenmill.engine.gateway.database import Connection, now_ms
from tokenmill.engine.gateway.governance import keys
from tokenmill.engine.gateway.governance.accounts import MASTER
from tokenmill.engine.gateway.governance.options import Options
from tokenmill.errors import InputError

COOKIE = "tokenmill_session"
#: How long one may stay logged in, in seconds.
LIFETIME_S = 8 * 3600
#: Name, end in milliseconds and a random number (two sessions may begin together, and only one of them end), signed.
_SHAPE = re.compile(r"([A-Za-z0-9._-]{1,63}):([0-9]{1,15}):([0-9a-f]{16}):([0-9a-f]{64})")


def _mac(connection: Connection, options: Options, text: str) -> str:
    (kept,) = connection.execute("SELECT secret FROM session_secret").fetchone()
    secret = hashlib.sha256(f"tokenmill dashboard 2:{kept}:{options.master_digest}".encode()).digest()
    return hmac.new(secret, text.encode(), hashlib.sha256).hexdigest()


def _signature(connection: Connection, options: Options, name: str, until: str, number: str) -> str:
    """What ends a cookie; the secret that its owner has now is a part of it."""
    secret = "" if name == MASTER else keyring.secret_hash(connection, name)
    return _mac(connection, options, f"{name}:{until}:{number}:{secret}")


def cookie(connection: Connection, options: Options, actor: Actor) -> str:
    """The cookie's value for somebody who has just shown his key."""
    until, number = str(now_ms() + LIFETIME_S * 1000), secrets.token_hex(8)
    return f"{actor.name}:{until}:{number}:{_signature(connection, options, actor.name, until, number)}"


def actor_of(connection: Connection, options: Options, value: str) -> Actor | None:
    """Whose session a cookie stands for.

    None when it is forged, over or ended, or its key was revoked, has another secret or may not see all.
    """
    found = _SHAPE.fullmatch(value)
    if found is None:
        return None
    name, until, number, mac = found.groups()
    if now_ms() >= int(until) or not hmac.compare_digest(mac, _signature(connection, options, name, until, number)):
        return None
    if connection.execute("SELECT 1 FROM ended_sessions WHERE mac = ?", (mac,)).fetchone() is not None:
        return None
    if name == MASTER:
        return Actor(MASTER, "admin")
    try:
        key = keys.by_id(connection, name)
    except InputError:
        return None
    actor = roles.actor_of(connection, name)
    return None if key.refusal(now_ms()) is not None or not actor.may("auditor") else actor


def end(connection: Connection, value: str) -> None:
    """Ends the session of a cookie of ours, in every worker, whoever else has a copy of it."""
    found = _SHAPE.fullmatch(value)
    if found is not None:
        _, until, _, mac = found.groups()
        connection.execute("DELETE FROM ended_sessions WHERE until <= ?", (now_ms(),))
        connection.execute(
            "INSERT INTO ended_sessions (mac, until) VALUES (?, ?) ON CONFLICT (mac) DO NOTHING", (mac, int(until))
        )


def token(connection: Connection, options: Options, value: str) -> str:
    """What a form must bring besides the cookie: another site can neither read nor guess it."""
    return _mac(connection, options, f"form:{value}")


def token_fits(connection: Connection, options: Options, value: str, said: str) -> bool:
    """Whether a form brought the token that belongs to its cookie."""
    return hmac.compare_digest(token(connection, options, value).encode(), said.encode("utf-8", "replace"))
