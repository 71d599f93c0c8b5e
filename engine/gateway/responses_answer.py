"""Answers to chat completions as objects of the Responses API, for a backend that has no such API."""

from collections.abc import Callable
from typing import Any

import orjson

from tokenmill.engine.gateway.body import Body
from tokenmill.engine.gateway.responses_bridge import signed

#: What an answer repeats of its request, with what is so where nobody says it.
_REPEATED: dict[str, Any] = {
    "instructions": None,
    "max_output_tokens": None,
    "metadata": {},
    "parallel_tool_calls": True,
    "reasoning": {"effort": None, "summary": None},
    "temperature": 1.0,
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "tools": [],
    "top_p": 1.0,
    "truncation": "disabled",
    "user": None,
}
#: Why an answer is not complete.
_INCOMPLETE = {"length": "max_output_tokens", "content_filter": "content_filter"}
_ENCRYPTED = "reasoning.encrypted_content"

Listener = Callable[[str, dict[str, Any]], None]


def whole(completion: bytes, asked: Body) -> bytes:
    """A chat completion of the gateway's own as the answer to a Responses request."""
    said: dict[str, Any] = orjson.loads(completion)
    choice = said["choices"][0]
    message = choice["message"]
    growing = Growing(asked, said, lambda *_: None)
    blocks = message.get("thinking_blocks")
    for block in blocks or ():
        growing.thought(block.get("thinking") or "")
        growing.sign(block)
    if not blocks:
        growing.thought(message.get("reasoning_content") or "")
    growing.text(message["content"] or "")
    for call in message.get("tool_calls") or ():
        growing.call(call)
    growing.stopped(choice["finish_reason"])
    growing.usage(said["usage"])
    growing.end()
    return orjson.dumps(growing.response)


class Growing:
    """An answer, as its parts come: items of reasoning, text and calls, one after another.

    Args:
        asked: The request.
        said: The chat completion, or a chunk of it, for its id and model.
        tell: Called with the type and the members of each event of a stream; it keeps no member.

    Attributes:
        response: The answer so far: its items that are done.
    """

    def __init__(self, asked: Body, said: dict[str, Any], tell: Listener) -> None:
        self._tell = tell
        self._name = str(said["id"]).removeprefix("msg_")
        self._encrypted = _ENCRYPTED in (asked.get("include", list[str]) or ())
        self._item: dict[str, Any] | None = None
        self._pieces: list[str] = []
        self._reason: str | None = None
        repeated: dict[str, Any] = {}
        for name, usual in _REPEATED.items():
            raw = asked.raw_field(name)
            # JSON may have line breaks outside of its strings, which would end an event's data.
            repeated[name] = usual if raw in (None, b"null") else orjson.Fragment(b" ".join(raw.splitlines()))
        self.response: dict[str, Any] = {
            "id": f"resp_{self._name}",
            "object": "response",
            "created_at": said["created"],
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "model": said["model"],
            "output": [],
            "previous_response_id": None,
            "store": False,
            **repeated,
            "usage": None,  # behind what is repeated: whoever counts reads the end of a long event
        }
        self._tell("response.created", {"response": self.response})
        self._tell("response.in_progress", {"response": self.response})

    def thought(self, piece: str) -> None:
        """More of what it thinks."""
        if not piece:
            return
        self._continue("reasoning")
        if not self._pieces:
            part = {"type": "summary_text", "text": ""}
            self._tell_of_item("response.reasoning_summary_part.added", summary_index=0, part=part)
        self._pieces.append(piece)
        self._tell_of_item("response.reasoning_summary_text.delta", summary_index=0, delta=piece)

    def sign(self, block: dict[str, Any]) -> None:
        """A block of thoughts is complete: its item carries what makes it the backend's own in the next turn.

        That is `signature`, which stands beside the text as there; `encrypted_content`, which no search for
        personal data can read, only where it is asked for.
        """
        item = self._continue("reasoning")
        item["signature"] = signed(block)
        if self._encrypted:
            item["encrypted_content"] = item["signature"]
        self._close()

    def text(self, piece: str) -> None:
        """More of the answer's text."""
        if not piece:
            return
        self._continue("message")
        if not self._pieces:
            self._tell_of_item("response.content_part.added", content_index=0, part=_text(""))
        self._pieces.append(piece)
        self._tell_of_item("response.output_text.delta", content_index=0, delta=piece, logprobs=[])

    def call(self, call: dict[str, Any]) -> None:
        """A call of a tool, or, without an id, more of the arguments of the one that is coming."""
        function = call["function"]
        if "id" in call:
            self._close()
            self._open("function_call", call_id=call["id"], name=function["name"], arguments="")
        if function.get("arguments"):
            self._pieces.append(function["arguments"])
            self._tell_of_item("response.function_call_arguments.delta", delta=function["arguments"])

    def stopped(self, finish_reason: str) -> None:
        """Nothing more comes but the count."""
        self._reason = _INCOMPLETE.get(finish_reason)
        self._close("incomplete" if self._reason else "completed")

    def usage(self, counted: dict[str, Any]) -> None:
        """What it used, as a chat completion has it."""
        details: dict[str, Any] = counted.get("prompt_tokens_details") or {}
        written = details.get("cache_creation_tokens") or 0
        thought = {"reasoning_tokens": 0, **(counted.get("completion_tokens_details") or {})}
        self.response["usage"] = {
            "input_tokens": counted["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": written, **details},
            "output_tokens": counted["completion_tokens"],
            "output_tokens_details": thought,
            "total_tokens": counted["total_tokens"],
        }

    def end(self) -> None:
        """The answer is there."""
        self._close()
        status = "incomplete" if self._reason else "completed"
        self.response["status"] = status
        self.response["incomplete_details"] = {"reason": self._reason} if self._reason else None
        self._tell(f"response.{status}", {"response": self.response})

    def fail(self, message: str, kind: str) -> None:
        """Nothing more comes, and not all has come."""
        self._close("incomplete")
        code = "rate_limit_exceeded" if kind == "rate_limit_error" else "server_error"
        self.response["status"] = "failed"
        self.response["error"] = {"code": code, "message": message}
        self._tell("response.failed", {"response": self.response})

    def _continue(self, kind: str) -> dict[str, Any]:
        """The item of this kind that is coming; a new one where another was."""
        if self._item is None or self._item["type"] != kind:
            self._close()
            more: dict[str, Any] = {"summary": []} if kind == "reasoning" else {"role": "assistant", "content": []}
            return self._open(kind, **more)
        return self._item

    def _open(self, kind: str, **members: Any) -> dict[str, Any]:
        prefix = {"message": "msg", "reasoning": "rs", "function_call": "fc"}[kind]
        index = len(self.response["output"])
        self._item = item = {"id": f"{prefix}_{self._name}_{index}", "type": kind, **members}
        if kind != "reasoning":
            item["status"] = "in_progress"
        self._pieces = []
        self._tell("response.output_item.added", {"output_index": index, "item": item})
        return item

    def _close(self, status: str = "completed") -> None:
        """The item that was coming is done."""
        item = self._item
        if item is None:
            return
        text = "".join(self._pieces)
        if item["type"] == "function_call":
            item["arguments"] = text
            self._tell_of_item("response.function_call_arguments.done", name=item["name"], arguments=text)
        elif item["type"] == "message":
            item["content"] = [part := _text(text)]
            self._tell_of_item("response.output_text.done", content_index=0, text=text, logprobs=[])
            self._tell_of_item("response.content_part.done", content_index=0, part=part)
        elif text:
            item["summary"] = [part := {"type": "summary_text", "text": text}]
            self._tell_of_item("response.reasoning_summary_text.done", summary_index=0, text=text)
            self._tell_of_item("response.reasoning_summary_part.done", summary_index=0, part=part)
        if "status" in item:
            item["status"] = status
        self._tell("response.output_item.done", {"output_index": len(self.response["output"]), "item": item})
        self.response["output"].append(item)
        self._item = None

    def _tell_of_item(self, kind: str, **members: Any) -> None:
        assert self._item is not None, "an item is coming"
        self._tell(kind, {"item_id": self._item["id"], "output_index": len(self.response["output"]), **members})


def _text(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
