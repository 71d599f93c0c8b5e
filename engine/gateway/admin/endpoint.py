"""One endpoint of the admin API: who may, what comes in. The table of them is routes and OpenAPI both."""

from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec
from starlette.requests import Request

from tokenmill.engine.gateway.admin.roles import Actor, Role
from tokenmill.engine.gateway.api_error import ApiError
from tokenmill.engine.gateway.governance.service import Governance

Method = Literal["GET", "POST", "PUT", "DELETE"]


@dataclass(frozen=True)
class Parameter:
    """A query parameter.

    Attributes:
        name: Its name.
        text: For people.
        schema: JSON schema of its value.
    """

    name: str
    text: str
    schema: dict[str, Any] = field(default_factory=lambda: {"type": "string"})


@dataclass(frozen=True)
class Call:
    """A request to an endpoint, checked as far as it can be without the store.

    Attributes:
        actor: Who asks.
        governance: The store and its options.
        request: The request; its path parameters and query.
        body: What its body holds, of the endpoint's type; None where it takes none.
        routed: Names of models that stand for the router's choice.
    """

    actor: Actor
    governance: Governance
    request: Request
    body: Any = None
    routed: Collection[str] = ()

    @property
    def by(self) -> str:
        """The actor, for the audit trail."""
        return f"admin api: {self.actor.name}"

    def path(self, name: str) -> str:
        """A path parameter."""
        return str(self.request.path_params[name])

    def query(self, name: str) -> str | None:
        """A query parameter; None where it is missing or empty."""
        return self.request.query_params.get(name) or None

    def number(self, name: str, default: int | None, low: int, high: int) -> int | None:
        """A query parameter that is a whole number.

        Raises:
            ApiError: 400 when it is none, or outside.
        """
        text = self.query(name)
        if text is None:
            return default
        if not text.isascii() or not text.removeprefix("-").isdigit() or len(text) > 18:
            raise ApiError(400, f"`{name}` is no whole number.", param=name)
        value = int(text)
        if not low <= value <= high:
            raise ApiError(400, f"`{name}` is outside {low} to {high}.", param=name)
        return value


@dataclass(frozen=True)
class Endpoint:
    """See the module's text.

    Attributes:
        method, path: Where; `{name}` in the path is a parameter.
        summary: For people.
        run: Answers: anything that becomes JSON, or a starlette Response.
        role: What the actor must at least be; None: any valid key.
        body: Type of the body; None: it takes none.
        query: Query parameters.
        status: Of a good answer.
        media: Its media type.
        scoped: A team's administrator may call it, too; it keeps him within his account (`scope`).
    """

    method: Method
    path: str
    summary: str
    run: Callable[[Call], Awaitable[Any]]
    role: Role | None = "admin"
    body: type[msgspec.Struct] | None = None
    query: tuple[Parameter, ...] = ()
    status: int = 200
    media: str = "application/json"
    scoped: bool = False

    def admits(self, actor: Actor) -> bool:
        """Whether an actor may call it."""
        return self.role is None or actor.may(self.role) or (self.scoped and actor.scope is not None)
