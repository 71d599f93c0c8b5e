"""What a gateway process is told about governance."""

import hashlib
import hmac
from dataclasses import dataclass, field

from tokenmill.errors import ConfigurationError

#: A master key must be at least this long to be worth the name.
SHORTEST_MASTER_KEY = 16
#: How to come by one.
MAKE_A_KEY = 'make one with `python -c "import secrets; print(secrets.token_urlsafe(32))"`'


def digest(key: str) -> str:
    """The SHA-256 under which a key is kept, in hexadecimal. Keys are random, so a fast hash is enough."""
    return hashlib.sha256(key.encode()).hexdigest()


@dataclass(frozen=True)
class Options:
    """Governance is on, and this is how.

    Attributes:
        store: Path of the SQLite file, absolute, or the URL of a PostgreSQL database.
        master_digest: `digest` of the master key; no gateway process ever holds the key itself.
        completion_bound: Completion tokens to reserve for an answer where neither the request nor the backend's
            longest answer or context window bounds it.
        retention_days: Ledger rows older than this are removed; None: never.
        guessable: The master key is short enough to be guessed: see `guesses`.
    """

    store: str
    master_digest: str = field(repr=False)
    completion_bound: int = 4096
    retention_days: int | None = None
    guessable: bool = False

    def is_master(self, key_digest: str) -> bool:
        """Whether a digest is the master key's; takes the same time whatever the answer."""
        return hmac.compare_digest(key_digest, self.master_digest)


def checked_master_key(key: str, where: str, guessable: bool = False) -> str:
    """The key itself where it can serve as a master key.

    Args:
        key: The key.
        where: What holds it, for the message.
        guessable: A short one will do.

    Raises:
        ConfigurationError: It is missing or too short to resist guessing.
    """
    if not key:
        raise ConfigurationError(f"{where} is not set and governance needs a master key; {MAKE_A_KEY}")
    if len(key) < SHORTEST_MASTER_KEY and not guessable:
        raise ConfigurationError(
            f"{where} holds a master key of {len(key)} characters, fewer than {SHORTEST_MASTER_KEY}; {MAKE_A_KEY}"
        )
    return key
