"""What of a request no search can read: parts that are not known to be text, and what its name says is none.

Backends learn new kinds of parts faster than any list of pictures and sounds could, so of the types of parts the list
here is of those that are text; a part of any other counts as unreadable. Members have no types: there the list is of
the words for pictures, sounds and files. Settings that look like either and are none are left out by name.
"""

import functools
import re
from collections.abc import Collection

#: Top-level fields with settings and schemas: a `type` or an `image` in them is a name, a list of numbers no text.
SETTINGS = frozenset(
    {
        *("tools", "tool_choice", "functions", "function_call", "parallel_tool_calls", "mcp_servers", "container"),
        *("response_format", "text", "output_config", "output_format", "context_management", "betas", "include"),
        *("metadata", "user", "stop", "stop_token_ids", "allowed_token_ids", "logprob_token_ids", "bad_words"),
        *("logit_bias", "modalities", "stream_options", "reasoning", "thinking", "web_search_options", "plugins"),
        *("guided_json", "guided_choice", "structured_outputs", "json_schema", "chat_template_kwargs", "provider"),
        *("embedding_type", "embedding_types", "search_parameters", "vllm_xargs", "mm_processor_kwargs"),
        *("media_io_kwargs",),
    }
)
#: Top-level fields whose value itself may be a part.
ASKED = frozenset(
    {
        *("messages", "input", "inputs", "prompt", "system", "contents", "documents", "query", "queries"),
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
#: Members that hold any JSON in an object of this type.
_FREE = {"input": "tool_use", "logprobs": "output_text"}
#: Members whose items are parts.
PART_LISTS = ("content", "parts")
#: Objects whose members may be parts, whatever their names: what the Responses API puts into a prompt that it keeps.
NAMED_PARTS = frozenset({"variables"})
#: A member with one of these words in its name holds no text.
_MEDIA_WORDS = frozenset(
    {
        *("image", "images", "audio", "audios", "video", "videos", "file", "files", "pil", "pdf", "pdfs", "document"),
        *("photo", "photos", "picture", "pictures", "pixel", "pixels", "media", "modal", "mm", "attachment"),
        *("attachments", "inline", "base64", "b64", "bytes", "blob", "blobs"),
        *("embeds", "embedding", "embeddings", "encrypted"),
    }
)
#: Names with such a word that only say which document is cited.
_CITED = frozenset({"document_index", "document_title"})
#: Where a name's next word begins.
_NEXT_WORD = re.compile(r"[\W_]+|(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
#: The same of one that holds an address.
_ADDRESS_WORDS = frozenset({"url", "urls", "uri", "uris"})
#: The members of an item of the Responses API that stands for an earlier one, whose type may be left out.
_REFERENCE = frozenset({"id", "type"})
#: Members that only name what stands beside them.
_LABELS = frozenset({"id", "title", "name"})
#: How the answer is to sound: the members of a chat's own `audio` field.
SPOKEN = frozenset({"voice", "format"})

MEDIA, TOKENS, PART = "a picture, sound or file", "token ids", "a part of a type that is not known to be text"


@functools.lru_cache(4096)
def names_media(name: str) -> bool:
    """Whether a member's name says that its value is no text."""
    return name not in _CITED and not _MEDIA_WORDS.isdisjoint(_words(name))


@functools.lru_cache(4096)
def _names_address(name: str) -> bool:
    return not _ADDRESS_WORDS.isdisjoint(_words(name))


def _words(name: str) -> set[str]:
    """The words of a name, in lower case, also without the number at their end: of `inputImage2` input and image."""
    words = {word.lower() for word in _NEXT_WORD.split(name)}
    return words | {word.rstrip("0123456789") for word in words}


def _is_address(names: Collection[str]) -> bool:
    """Whether an object says only where its content is."""
    for name in names:
        if name not in _LABELS and not _names_address(name):
            return False
    return any(map(_names_address, names))


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
    return listed or key in PART_LISTS


def is_text(kind: object, names: Collection[str], key: str) -> bool:
    """Whether a part is known to be text.

    Args:
        kind: The value of its `type`; None where it has none.
        names: The names of its members.
        key: The name that it, or the list that it is in, stands under.
    """
    if kind is None:
        if key in PART_LISTS:
            return _BARE_TEXT.issuperset(names)
        return not _is_address(names) and not (key == "input" and names and _REFERENCE.issuperset(names))
    return isinstance(kind, str) and kind in _TEXT_TYPES


def is_free(name: str, kind: object) -> bool:
    """Whether a member of an object of this type holds any JSON, of which nothing is a part.

    That is what a tool is called with, and how probable the words of an earlier answer were.
    """
    return name == "arguments" or (name in _FREE and _FREE[name] == kind)
