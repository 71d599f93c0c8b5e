"""The configuration's `governance` section."""

import os
import re
from pathlib import Path
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from tokenmill.engine.gateway.governance.options import SHORTEST_MASTER_KEY, Options, checked_master_key, digest
from tokenmill.engine.gateway.sections import Section


class Governance(Section):
    """Keys, budgets, rate limits, ledger and audit trail. Without this section everybody may ask for everything."""

    store: str = Field(
        description="Where it is kept: path of an SQLite file, relative to the working directory, or "
        "`postgresql://user@host/database` for gateways on several machines (the password comes from `PGPASSWORD` or "
        "`~/.pgpass`).",
        min_length=1,
    )
    master_key_env: str = Field(
        "TOKENMILL_MASTER_KEY",
        description="Environment variable that holds the master key, at least 16 characters; it has no default value.",
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
    )
    master_key: str | None = Field(
        None, description="The master key itself; better kept in the variable that `master_key_env` names.", repr=False
    )
    guessable_master_key: bool = Field(
        False,
        description="Take a master key of fewer than 16 characters, as many LiteLLM files have; whoever reaches the "
        "port may guess it. After ten unknown keys within a minute a worker does not take it until the minute is over.",
    )
    completion_bound: int = Field(
        4096,
        description="Completion tokens to reserve for an answer that neither the request (`max_tokens`) nor the "
        "backend's longest answer or context window bounds.",
        ge=1,
        le=100_000_000,
    )
    retention_days: int | None = Field(
        None, description="Days after which rows leave the ledger; default: they stay.", ge=1, le=36_500
    )

    @field_validator("store")
    @classmethod
    def _store_is_a_place(cls, value: str) -> str:
        if "://" not in value:
            return value
        try:
            parts = urlsplit(value)
            usable = parts.scheme in ("postgresql", "postgres") and len(parts.path) > 1
        except ValueError:
            usable = False
        if not usable or re.search(r"\s", value):
            raise ValueError(f"{value!r} is no postgresql://user@host/database; give one, or the path of a file")
        if parts.password is not None:
            raise ValueError("the URL holds a password; put it into PGPASSWORD or ~/.pgpass")
        return value

    @model_validator(mode="after")
    def _one_master_key(self) -> "Governance":
        if self.master_key is not None and "master_key_env" in self.model_fields_set:
            raise ValueError("'master_key' and 'master_key_env' both give the key; keep one, best 'master_key_env'")
        return self

    def options(self) -> Options:
        """What the gateway processes are told.

        Raises:
            ConfigurationError: There is no master key, or it is too short.
        """
        if self.master_key is not None:
            key, where = self.master_key, "governance.master_key"
        else:
            key, where = os.environ.get(self.master_key_env, "").strip(), self.master_key_env
        checked_master_key(key, where, self.guessable_master_key)
        store = self.store if "://" in self.store else str(Path(self.store).expanduser().absolute())
        guessable = len(key) < SHORTEST_MASTER_KEY
        return Options(store, digest(key), self.completion_bound, self.retention_days, guessable)
