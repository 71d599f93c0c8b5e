"""The admin API's OpenAPI document, made from the table of endpoints and the types of their bodies."""

import re
from collections.abc import Sequence
from typing import Any

import msgspec
import orjson

from tokenmill import __version__
from tokenmill.engine.gateway.admin.endpoint import Endpoint
from tokenmill.engine.gateway.admin.roles import TEAM_ADMIN

_ERRORS = {
    "400": "The request is malformed.",
    "401": "The key is missing or not valid.",
    "403": "The key's role is not enough.",
    "404": "There is no such thing.",
    "405": "The path takes another method.",
    "408": "The request body came too slowly.",
    "413": "The request body is too long.",
}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {"error": {"type": "object", "required": ["message", "type"]}},
}


def document(table: Sequence[Endpoint]) -> bytes:
    """The OpenAPI 3.1 document of these endpoints as JSON."""
    kinds = [endpoint.body for endpoint in table if endpoint.body is not None]
    schemas, components = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    bodies = dict(zip(kinds, schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for endpoint in table:
        schema = bodies.get(endpoint.body) if endpoint.body is not None else None
        paths.setdefault(endpoint.path, {})[endpoint.method.lower()] = _operation(endpoint, schema)
    return orjson.dumps(
        {
            "openapi": "3.1.0",
            "info": {"title": "Tokenmill admin API", "version": __version__},
            "paths": paths,
            "components": {
                "schemas": {**components, "Error": _ERROR},
                "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            },
            "security": [{"key": []}],
        }
    )


def _operation(endpoint: Endpoint, schema: dict[str, Any] | None) -> dict[str, Any]:
    path = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        for name in re.findall(r"{(\w+)}", endpoint.path)
    ]
    query = [{"name": one.name, "in": "query", "description": one.text, "schema": one.schema} for one in endpoint.query]
    shape = "object" if endpoint.media == "application/json" else "string"
    good: dict[str, Any] = {"description": "Done.", "content": {endpoint.media: {"schema": {"type": shape}}}}
    if any(one.name == "format" for one in endpoint.query):
        good["content"]["text/csv"] = {"schema": {"type": "string"}}
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    operation: dict[str, Any] = {
        "summary": endpoint.summary,
        "description": _needed(endpoint),
        "responses": {
            str(endpoint.status): good,
            **{status: {"description": text, "content": error} for status, text in _ERRORS.items()},
        },
    }
    if path or query:
        operation["parameters"] = path + query
    if schema is not None:
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    return operation


def _needed(endpoint: Endpoint) -> str:
    if endpoint.role is None:
        return "Needs any valid key."
    below = f"; with `{TEAM_ADMIN}` it shows and takes what belongs to the key's account" if endpoint.scoped else ""
    return f"Needs the role `{endpoint.role}`{below}."
