"""A small server that speaks Anthropic's Messages API, strict about what that API is strict about."""

import json
from typing import Any

from aiohttp import web

from tests.gateway.upstream import FakeUpstream

#: What it thinks where it is asked to.
THOUGHTS: list[dict[str, Any]] = [
    {"type": "thinking", "thinking": "The city is Bern.", "signature": "EqoBCkgIARABGAI="},
    {"type": "redacted_thinking", "data": "EmwKAhgBEgy3va3p"},
]


class FakeAnthropic(FakeUpstream):
    """Answers with the last user text, or calls the first tool offered; thinks and streams where asked to.

    Attributes:
        version: Of the API, which every request must name.
        says: What it answers to a text.
        writes: Tokens that it writes into its cache for each `cache_control` of a request.
    """

    version = "2023-06-01"
    says = "You said {text}"
    writes = 2

    async def _list(self, request: web.Request) -> web.Response:
        said = request.headers
        if said.get("x-api-key") != "sk-ant-key" or said.get("anthropic-version") != self.version:
            return web.json_response({"type": "error", "error": {"type": "authentication_error"}}, status=401)
        # As there: a page of few, and nothing but names.
        listed = self.models[: int(request.query.get("limit", "1"))]
        data = [
            {"type": "model", "id": name, "display_name": name, "created_at": "2025-01-01T00:00:00Z"} for name in listed
        ]
        return web.json_response({"data": data, "has_more": len(listed) < len(self.models)})

    async def _answer(self, request: web.Request, raw: bytes) -> web.StreamResponse:
        asked = json.loads(raw)
        problem = self._problem(request, asked)
        if problem is not None:
            return problem
        tool = (asked.get("tools") or [None])[0]
        text = "".join(block["text"] for block in asked["messages"][-1]["content"] if block["type"] == "text")
        text = self.says.format(text=text)
        content: list[dict[str, Any]] = [{"type": "text", "text": text}]
        if tool is not None:
            content.append({"type": "tool_use", "id": "toolu_1", "name": tool["name"], "input": {"city": "Bern"}})
        if asked.get("thinking", {}).get("type") == "enabled":
            content[:0] = THOUGHTS
        reason = "tool_use" if tool else "max_tokens" if asked["max_tokens"] < 5 else "end_turn"
        message = {
            "id": "msg_1",
            "type": "message",
            "role": "assistant",
            "model": asked["model"],
            "content": content,
            "stop_reason": reason,
            "stop_sequence": None,
            "usage": self._usage(raw),
        }
        if not asked.get("stream"):
            return web.json_response(message, headers={"request-id": "req_1"})
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        events = self._events(message)
        hangs_up = text == "You said hang up"
        failed = {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}
        if text == "You said overload at once":
            events = [{"type": "ping"}, failed]
        elif text == "You said overload later":
            events[4:] = [failed]
        elif text == "You said break off":
            del events[-1]
        for event in events:
            text = f"event: {event['type']}\ndata: {json.dumps(event)}\n\n"
            # Cut in two, as networks do.
            await response.write(text[:20].encode())
            await response.write(text[20:].encode())
            if hangs_up and event["type"] == "content_block_start" and request.transport is not None:
                request.transport.close()
                return response
        await response.write_eof()
        return response

    def _usage(self, raw: bytes) -> dict[str, Any]:
        marks: list[dict[str, Any]] = []

        def look(found: dict[str, Any]) -> dict[str, Any]:
            marks.extend([found["cache_control"]] if found.get("cache_control") else [])
            return found

        json.loads(raw, object_hook=look)
        hour = self.writes * sum(mark.get("ttl") == "1h" for mark in marks)
        written = self.writes * len(marks)
        return {
            "input_tokens": 7 if marks else 9,
            "cache_read_input_tokens": 3,
            "cache_creation_input_tokens": written,
            "cache_creation": {"ephemeral_5m_input_tokens": written - hour, "ephemeral_1h_input_tokens": hour},
            "output_tokens": 5,
        }

    def _problem(self, request: web.Request, asked: dict[str, Any]) -> web.Response | None:
        def error(status: int, kind: str, message: str) -> web.Response:
            body = {"type": "error", "error": {"type": kind, "message": message}}
            return web.json_response(body, status=status)

        if request.path != "/v1/messages":
            return error(404, "not_found_error", "no such path")
        if request.headers.get("x-api-key") != "sk-ant-key" or "authorization" in request.headers:
            return error(401, "authentication_error", "invalid x-api-key")
        if request.headers.get("anthropic-version") != self.version:
            return error(400, "invalid_request_error", "anthropic-version: header is required")
        unknown = set(asked) - {
            *("model", "max_tokens", "messages", "system", "stop_sequences", "temperature", "top_p", "top_k"),
            *("stream", "metadata", "tools", "tool_choice", "thinking", "output_config"),
        }
        if unknown or not isinstance(asked.get("max_tokens"), int):
            return error(400, "invalid_request_error", f"extra inputs: {sorted(unknown)}")
        for message in asked["messages"] if asked.get("thinking") else ():
            called = any(block["type"] == "tool_use" for block in message["content"])
            if called and message["content"][: len(THOUGHTS)] != THOUGHTS:
                return error(400, "invalid_request_error", "Expected `thinking` or `redacted_thinking`")
        if asked["messages"] and asked["messages"][-1]["content"][0].get("text") == "overload":
            return error(529, "overloaded_error", "Overloaded")
        return None

    def _events(self, message: dict[str, Any]) -> list[dict[str, Any]]:
        start = {**message, "content": [], "stop_reason": None, "usage": {**message["usage"], "output_tokens": 1}}
        events: list[dict[str, Any]] = [{"type": "message_start", "message": start}, {"type": "ping"}]
        for index, block in enumerate(message["content"]):
            if block["type"] == "text":
                opened, kind, name, whole = {"type": "text", "text": ""}, "text_delta", "text", block["text"]
            elif block["type"] == "thinking":
                opened, kind, name = {**block, "thinking": "", "signature": ""}, "thinking_delta", "thinking"
                whole = block["thinking"]
            elif block["type"] == "redacted_thinking":
                opened, kind, name, whole = block, "", "", ""
            else:
                opened, kind, name = {**block, "input": {}}, "input_json_delta", "partial_json"
                whole = json.dumps(block["input"])
            events.append({"type": "content_block_start", "index": index, "content_block": opened})
            for part in (whole[:5], whole[5:]) if kind else ():
                events.append({"type": "content_block_delta", "index": index, "delta": {"type": kind, name: part}})
            if block["type"] == "thinking":
                signed = {"type": "signature_delta", "signature": block["signature"]}
                events.append({"type": "content_block_delta", "index": index, "delta": signed})
            events.append({"type": "content_block_stop", "index": index})
        delta = {"stop_reason": message["stop_reason"], "stop_sequence": None}
        # As there: the sums again, without how long what was written is kept.
        sums = {name: count for name, count in message["usage"].items() if name != "cache_creation"}
        events.append({"type": "message_delta", "delta": delta, "usage": sums})
        events.append({"type": "message_stop"})
        return events
