"""The gateway's OpenAPI document and a page that shows it without any asset from elsewhere."""

import functools
import html
from typing import Any

import orjson

from tokenmill import __version__

#: Explains where a request would go: takes any request's body; `?endpoint=` names its path where it is not a chat.
DRY_RUN = "/v1/tokenmill/route"
#: Path to (summary, properties the gateway itself reads or that every server of that kind has).
INFERENCE_PATHS: dict[str, tuple[str, dict[str, Any]]] = {
    "/v1/chat/completions": (
        "A chat completion, whole or as server-sent events (`stream`).",
        {"messages": {"type": "array", "items": {"type": "object"}, "minItems": 1}, "stream": {"type": "boolean"}},
    ),
    "/v1/completions": (
        "A text completion, whole or as server-sent events (`stream`).",
        {"prompt": {"type": "string"}, "stream": {"type": "boolean"}},
    ),
    "/v1/embeddings": ("Embeddings of texts.", {"input": {"type": "string"}}),
    "/v1/rerank": (
        "Documents in the order of their relevance to a query.",
        {"query": {"type": "string"}, "documents": {"type": "array", "items": {"type": "string"}}},
    ),
    "/v1/score": ("Similarity of texts.", {"text_1": {"type": "string"}, "text_2": {"type": "string"}}),
    DRY_RUN: (
        "Explains where a request would go, without asking any model: the body is that of the request in question. "
        "Where the configuration has a `routing` section; otherwise 404.",
        {},
    ),
    "/v1/responses": ("A response in OpenAI's newer API.", {"input": {"type": "string"}}),
    "/v1/messages": (
        "A message in Anthropic's API, whole or as server-sent events (`stream`), where the backend has it.",
        {"messages": {"type": "array", "items": {"type": "object"}, "minItems": 1}, "stream": {"type": "boolean"}},
    ),
    "/v1/messages/count_tokens": (
        "How many tokens such a message's prompt has.",
        {"messages": {"type": "array", "items": {"type": "object"}, "minItems": 1}},
    ),
}

#: What may be asked about a response that a backend keeps, for those that it was given to.
_OF_RESPONSES: dict[str, tuple[str, tuple[str, ...]]] = {
    "": ("A response that a backend keeps, also as a stream (`stream=true`), or its end.", ("get", "delete")),
    "/cancel": ("Cancels a response that is made in the background.", ("post",)),
    "/input_items": ("What a response was made from.", ("get",)),
}

_ERROR_REFERENCE = {"$ref": "#/components/schemas/Error"}


def _answer(description: str, media: str = "application/json", schema: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"description": description, "content": {media: {"schema": schema or {"type": "object"}}}}


def _errors(*statuses: int) -> dict[str, Any]:
    said = {
        400: "The request is malformed.",
        401: "The API key is missing or not valid, where keys are asked for.",
        403: "The API key may not ask for this model.",
        404: "No such path or model.",
        405: "The path takes another method; see `Allow`.",
        408: "The request body came too slowly.",
        413: "The request body is too long.",
        415: "The request body is compressed.",
        422: "A field has a value that the backend does not accept.",
        429: "A limit of the key, its team or the backend is reached; see `Retry-After`.",
        500: "The backend failed.",
        502: "The backend broke off.",
        503: "No backend can serve now; see `Retry-After`.",
        504: "The backend was silent for too long.",
    }
    return {str(status): _answer(said[status], schema=_ERROR_REFERENCE) for status in statuses}


def _inference(summary: str, properties: dict[str, Any]) -> dict[str, Any]:
    model = {"type": "string", "description": "A model of /v1/models, or the name of a tier."}
    schema = {"type": "object", "properties": {"model": model, **properties}, "additionalProperties": True}
    done = _answer("The backend's answer, untouched.")
    if "stream" in properties:
        done["content"]["text/event-stream"] = {"schema": {"type": "string"}}
    return {
        "post": {
            "summary": summary,
            "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
            "responses": {"200": done, **_errors(400, 401, 403, 404, 408, 413, 415, 422, 429, 500, 502, 503, 504)},
        }
    }


def _get(summary: str, responses: dict[str, Any], parameters: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    operation: dict[str, Any] = {"summary": summary, "responses": responses}
    if parameters:
        operation["parameters"] = parameters
    return {"get": operation}


@functools.cache
def document() -> bytes:
    """The OpenAPI 3.1 document as JSON."""
    return orjson.dumps(_content())


@functools.cache
def _content() -> dict[str, Any]:
    model_id = {"name": "model", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    error = {
        "type": "object",
        "required": ["message", "type", "param", "code"],
        "properties": {
            "message": {"type": "string"},
            "type": {"type": "string"},
            "param": {"type": ["string", "null"]},
            "code": {"type": ["string", "integer", "null"]},
        },
    }
    paths = {path: _inference(summary, fields) for path, (summary, fields) in INFERENCE_PATHS.items()}
    route = paths[DRY_RUN]
    route["post"]["responses"]["200"] = _answer("The decision with its reasons, and the backends in their order.")
    route["post"]["parameters"] = [
        {
            "name": "endpoint",
            "in": "query",
            "description": "The request's path; default: `/v1/chat/completions`.",
            "schema": {"type": "string"},
        }
    ]
    response_id = {"name": "response", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    of_response = _errors(401, 404, 405, 502, 503, 504)
    for path, (summary, methods) in _OF_RESPONSES.items():
        answers = {"200": _answer("The backend's answer, untouched."), **of_response}
        operation = {"summary": summary, "parameters": [response_id], "responses": answers}
        paths[f"/v1/responses/{{response}}{path}"] = dict.fromkeys(methods, operation)
    paths["/v1/models"] = _get(
        "Every model that a backend serves.", {"200": _answer("Those that the key may ask for."), **_errors(401)}
    )
    paths["/v1/models/{model}"] = _get(
        "One model; its id may hold slashes.", {"200": _answer("The model."), **_errors(401, 404)}, [model_id]
    )
    paths["/v1/model/info"] = _get(
        "What is known of each model, in LiteLLM's words: windows, prices, capabilities.",
        {"200": _answer("Models and backends."), **_errors(401)},
    )
    paths["/health"] = _get("Whether the gateway lives.", {"200": _answer("It does.")})
    paths["/ready"] = _get(
        "Whether every tier has a backend that is up.",
        {"200": _answer("Each has."), "503": _answer("Some have none; the body says which and why.")},
    )
    paths["/metrics"] = _get(
        "Metrics for Prometheus.", {"200": _answer("Text format.", "text/plain", {"type": "string"})}
    )
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Tokenmill gateway",
            "version": __version__,
            "description": "OpenAI's API in front of one or more tiers. Any other `POST /v1/...` goes to the backend "
            "of its `model` as it is, but for what that keeps for its account, where keys are asked for. Fields, "
            "chunks and errors of the backends pass untouched. Where governance is configured, /admin/openapi.json "
            "says how keys and budgets are administrated, and /dashboard shows them.",
        },
        "paths": paths,
        "components": {
            "schemas": {"Error": {"type": "object", "required": ["error"], "properties": {"error": error}}},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


_STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { max-width: 52rem; margin: 2rem auto; padding: 0 1rem; }
code { font: .95em ui-monospace, monospace; }
section { border-top: 1px solid #8886; padding: .75rem 0; }
h2 { font-size: 1.1rem; margin: 0; }
b { display: inline-block; min-width: 3.5rem; }
p, ul { margin: .25rem 0; }
"""


@functools.cache
def page() -> bytes:
    """The document as one self-contained HTML page."""
    content = _content()
    escape = html.escape
    sections = []
    for path, operations in content["paths"].items():
        for method, operation in operations.items():
            body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
            fields = ", ".join(f"<code>{escape(name)}</code>" for name in body.get("properties", ()))
            if fields:
                fields = f"<p>Fields: {fields}, and every other that the backend takes.</p>"
            answers = "".join(
                f"<li><code>{status}</code> {escape(answer['description'])}</li>"
                for status, answer in operation["responses"].items()
            )
            sections.append(
                f"<section><h2><b>{method.upper()}</b> <code>{escape(path)}</code></h2>"
                f"<p>{escape(operation['summary'])}</p>{fields}<ul>{answers}</ul></section>"
            )
    info = content["info"]
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(info['title'])}</title><style>{_STYLE}</style><h1>{escape(info['title'])} "
        f"{escape(info['version'])}</h1><p>{escape(info['description'])}</p>"
        f'<p><a href="/openapi.json">openapi.json</a></p>{"".join(sections)}'
    ).encode()
