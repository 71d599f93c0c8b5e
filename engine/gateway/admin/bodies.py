"""What the admin API takes: typed bodies, checked before anything is looked up. Unknown fields are errors."""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from tokenmill.engine.gateway.admin.duration import milliseconds
from tokenmill.engine.gateway.admin.roles import Role
from tokenmill.engine.gateway.governance.accounts import MOST_NAME, Limits
from tokenmill.engine.gateway.money import MOST_DOLLARS, micro_cents

Name = Annotated[str, Meta(max_length=MOST_NAME, description="For people.")]
Id = Annotated[str, Meta(min_length=1, max_length=63, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Dollars = Annotated[float, Meta(ge=0, le=MOST_DOLLARS, description="Dollars.")]
Rate = Annotated[int, Meta(ge=0, le=10**12)]
Duration = Annotated[
    str, Meta(pattern=r"^[1-9][0-9]{0,5}(mo|s|m|h|d|w)$", description="`30s`, `10m`, `1h`, `30d`, `2w`, `1mo`.")
]
Models = Annotated[
    list[Annotated[str, Meta(min_length=1, max_length=300)]],
    Meta(max_length=1000, description="Models and tiers, `*` in them stands for any text; null: all."),
]
Metadata = Annotated[dict[str, Any], Meta(description="Kept with the key, at most 16 KiB.")]


class _Body(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A JSON object without other fields."""


class LimitsBody(_Body):
    """What an account may use; null: no limit."""

    hard_limit_dollars: Dollars | None = None
    soft_limit_dollars: Dollars | None = None
    period: Duration | None = None
    requests_per_minute: Rate | None = None
    tokens_per_minute: Rate | None = None
    requests_at_once: Rate | None = None

    def limits(self) -> Limits:
        """In the units of the books."""
        return Limits(
            None if self.hard_limit_dollars is None else micro_cents(self.hard_limit_dollars),
            None if self.soft_limit_dollars is None else micro_cents(self.soft_limit_dollars),
            None if self.period is None else milliseconds(self.period),
            self.requests_per_minute,
            self.tokens_per_minute,
            self.requests_at_once,
        )


class AccountBody(_Body):
    """A new organisation, team or app."""

    kind: Literal["organisation", "team", "app"]
    name: Name = ""
    id: Id | None = None
    parent: Id | None = None
    limits: LimitsBody = msgspec.field(default_factory=LimitsBody)


class KeyBody(_Body):
    """A new key."""

    name: Name = ""
    parent: Id | None = None
    models: Models | None = None
    limits: LimitsBody = msgspec.field(default_factory=LimitsBody)
    duration: Duration | None = None
    metadata: Metadata = msgspec.field(default_factory=dict)
    role: Role | None = None


class RoleBody(_Body):
    """A key's role; null takes it away."""

    role: Role | None


class CanaryBody(_Body):
    """The share of its tier's requests that a backend gets, and no more; null: a backend like the others."""

    share: Annotated[float, Meta(ge=0, le=1)] | None


#: LiteLLM's interface sends empty texts where nothing was chosen: they are none.
NoText = Literal[""]
Team = Annotated[
    str, Meta(max_length=63, pattern=r"^([A-Za-z0-9][A-Za-z0-9._-]*)?$", description="A team, app or organisation.")
]
Moment = Annotated[str, Meta(max_length=40, description="ISO 8601, e.g. `2030-12-31T23:59:59Z`.")]
#: `-1`: for ever.
Lifetime = Annotated[
    str,
    Meta(
        pattern=r"^([1-9][0-9]{0,5}(mo|s|m|h|d|w)|-1)?$", description="`30s`, `10m`, `1h`, `30d`, `2w`; `-1`: no end."
    ),
]


class LiteLLMKey(msgspec.Struct, kw_only=True):
    """LiteLLM's `/key/generate`; other fields are refused by name unless they are empty."""

    key_alias: Annotated[str, Meta(max_length=200)] | None = None
    duration: Lifetime | None = None
    expires: Moment | None = None
    models: Models | None = None
    max_budget: Dollars | NoText | None = None
    soft_budget: Dollars | NoText | None = None
    budget_duration: Duration | None = None
    tpm_limit: Rate | None = None
    rpm_limit: Rate | None = None
    max_parallel_requests: Rate | None = None
    team_id: Team | None = None
    user_id: Annotated[str, Meta(max_length=200)] | None = None
    metadata: Metadata | None = None


class LiteLLMChange(msgspec.Struct, kw_only=True):
    """LiteLLM's `/key/update`: what is not named stays; other fields are refused by name unless they are empty."""

    key: Annotated[str, Meta(min_length=1, max_length=300)]
    key_alias: Annotated[str, Meta(max_length=200)] | UnsetType | None = UNSET
    duration: Lifetime | UnsetType | None = UNSET
    expires: Moment | UnsetType | None = UNSET
    models: Models | UnsetType | None = UNSET
    max_budget: Dollars | NoText | UnsetType | None = UNSET
    soft_budget: Dollars | NoText | UnsetType | None = UNSET
    budget_duration: Duration | UnsetType | None = UNSET
    tpm_limit: Rate | UnsetType | None = UNSET
    rpm_limit: Rate | UnsetType | None = UNSET
    max_parallel_requests: Rate | UnsetType | None = UNSET
    team_id: Team | UnsetType | None = UNSET
    user_id: Annotated[str, Meta(max_length=200)] | UnsetType | None = UNSET
    metadata: Metadata | UnsetType | None = UNSET


class LiteLLMDelete(msgspec.Struct, kw_only=True):
    """LiteLLM's `/key/delete`; its own client sends null for the one that was not given."""

    keys: Annotated[list[Annotated[str, Meta(max_length=300)]], Meta(max_length=1000)] | None = None
    key_aliases: Annotated[list[Annotated[str, Meta(max_length=200)]], Meta(max_length=1000)] | None = None
