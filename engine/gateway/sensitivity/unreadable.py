"""What of a request no search can read: everything in it that is not known to be text.

Backends learn new kinds of parts faster than any list of pictures and sounds could, so the lists here are of what is
text, and of the settings that look like parts and are none; what stands on neither counts as unreadable.
"""

import functools
from collections.abc import Collection

#: Top-level fields with settings and schemas: a `type` or an `image` in them is a name, a list of numbers no text.
SETTINGS = frozenset(
    {
        *("tools", "tool_choice", "functions", "function_call", "parallel_tool_calls", "mcp_servers", "container"),
        *("response_format", "text", "output_config", "output_format", "context_management", "betas", "include"),
        *("metadata", "user", "stop", "stop_token_ids", "allowed_token_ids", "logprob_token_ids", "bad_words"),
        *("logit_bias", "modalities", "stream_options", "reasoning", "thinking", "web_search_options", "plugins"),
        *("guided_json", "guided_choice", "structured_outputs", "json_schema", "chat_template_kwargs", "provider"),
    }
)
#: Top-level fields whose value itself may be a part.
ASKED = frozenset(
    {
        *("messages", "input", "inputs", "prompt", "system", "contents", "document", "documents", "query", "queries"),
        *("text_1", "text_2", "data_1", "data_2"),
    }
)
#: Top-level fields that name a conversation which the backend keeps.
_KEPT_THERE = frozenset({"previous_response_id", "conversation"})
#: Types of parts, of items of the Responses API and of annotations all of whose members are text.
_TEXT_TYPES = frozenset(
    {
        *("text", "input_text", "output_text", "summary_text", "reasoning_text", "refusal", "thinking", "reasoning"),
        *("reasoning.text", "reasoning.summary"),
        *("message", "function", "custom", "tool_use", "tool_result", "function_call", "function_call_output"),
        *("custom_tool_call", "custom_tool_call_output", "web_search_call", "url_citation", "char_location"),
    }
)
#: Members of a part without a type that is a text.
_BARE_TEXT = frozenset({"text", "refusal"})
#: Members whose items are parts.
_PART_LISTS = ("content", "parts")
#: A member with one of these words in its name holds no text.
_MEDIA_WORDS = frozenset(
    {
        *("image", "images", "audio", "video", "videos", "file", "files", "pil"),
        *("embeds", "embedding", "embeddings", "encrypted"),
    }
)
#: How the answer is to sound: the members of a chat's own `audio` field.
SPOKEN = frozenset({"voice", "format"})

MEDIA, TOKENS, PART = "a picture, sound or file", "token ids", "a part of a type that is not known to be text"


@functools.lru_cache(4096)
def names_media(name: str) -> bool:
    """Whether a member's name says that its value is no text."""
    return not _MEDIA_WORDS.isdisjoint(name.lower().split("_"))


def of_field(name: str) -> str:
    """What a top-level field of this name holds that cannot be searched; empty: nothing."""
    if name in SETTINGS:
        return ""
    return (
        "a reference to a conversation that the backend keeps"
        if name in _KEPT_THERE
        else MEDIA
        if names_media(name)
        else ""
    )


def may_be_part(key: str, listed: bool) -> bool:
    """Whether an object is where parts are: in a list, or under a name that holds parts."""
    return listed or key in _PART_LISTS


def is_text(kind: object, names: Collection[str], key: str) -> bool:
    """Whether a part is known to be text.

    Args:
        kind: The value of its `type`; None where it has none.
        names: The names of its members.
        key: The name that it, or the list that it is in, stands under.
    """
    if kind is None:
        return key not in _PART_LISTS or _BARE_TEXT.issuperset(names)
    return isinstance(kind, str) and kind in _TEXT_TYPES


def is_arguments(name: str, kind: object) -> bool:
    """Whether a member holds what a tool is called with: any JSON, of which nothing is a part."""
    return name == "arguments" or (name == "input" and kind == "tool_use")
