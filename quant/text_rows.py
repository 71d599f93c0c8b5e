"""Texts out of files of rows, as data sets for calibration come: a JSON object a line, or a list of them in one file.

A row has `text`, or `messages` (role and content) or ShareGPT's `conversations` (from and value), which the tokenizer's
chat template makes text of, or `prompt` and `completion`.
"""

import gzip
import json
import zlib
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from tokenmill.errors import ConfigurationError

#: Ends of the names of files that hold rows; the last one holds them as one list.
SUFFIXES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz", ".json")
#: What ShareGPT calls the roles.
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "observation": "tool"}
_FORMS = "a row is a JSON object with text, messages, conversations, or prompt and completion"

#: Messages with role and content to the text that the model would see.
Template = Callable[[list[dict[str, str]]], str]


def holds_rows(file: Path) -> bool:
    """Whether a file's name says that it holds rows."""
    return file.name.lower().endswith(SUFFIXES)


def read_rows(file: Path, template: Template, max_characters: int | None = None) -> str:
    """The texts of a file's rows, one after the other, each ended by a newline.

    Args:
        file: Its name ends with one of `SUFFIXES`.
        template: Makes text of messages.
        max_characters: Of a longer file no more rows are read than give this much; None reads it all.

    Raises:
        ConfigurationError: A row is none; the message says which.
        OSError: The file cannot be read.
        UnicodeDecodeError: It is not UTF-8.
    """
    texts, length = [], 0
    with closing(_rows(file)) as rows:
        for place, row in rows:
            try:
                text = _text(row, template)
            except ValueError as error:
                raise ConfigurationError(f"{place}: {error}; {_FORMS}") from None
            texts.append(text if text.endswith("\n") else f"{text}\n")
            length += len(texts[-1])
            if max_characters is not None and length >= max_characters:
                break
    return "".join(texts)


def _rows(file: Path) -> Generator[tuple[str, Any], None, None]:
    """Where each row is, for messages, and the row."""
    name = file.name.lower()
    if name.endswith(".json"):
        try:
            rows = json.loads(file.read_text(encoding="utf-8-sig"))
        except (json.JSONDecodeError, RecursionError) as error:
            raise ConfigurationError(f"{file} is no JSON: {error}; give a list of rows, or .jsonl") from None
        if not isinstance(rows, list):
            raise ConfigurationError(f"{file} holds no list of rows but {type(rows).__name__}; {_FORMS}")
        yield from ((f"{file}, row {number}", row) for number, row in enumerate(rows, 1))
        return
    how: dict[str, Any] = {"mode": "rt", "encoding": "utf-8-sig", "newline": "\n"}
    with gzip.open(file, **how) if name.endswith(".gz") else file.open(**how) as lines:
        try:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (json.JSONDecodeError, RecursionError) as error:
                    raise ConfigurationError(f"{file}, line {number}: no JSON: {error}; {_FORMS}") from None
                yield f"{file}, line {number}", row
        except (EOFError, zlib.error):
            raise ConfigurationError(f"{file} is cut short or damaged; copy it again") from None


def _text(row: Any, template: Template) -> str:
    """A row's text.

    Raises:
        ValueError: It has none; says why.
    """
    if isinstance(row, str):
        return row
    if not isinstance(row, Mapping):
        raise ValueError(f"it is {type(row).__name__}")
    if isinstance(row.get("text"), str):
        return str(row["text"])
    for key in ("messages", "conversations"):
        if isinstance(row.get(key), list):
            return template(_messages(row[key], key))
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        return prompt + completion
    if isinstance(prompt, list) and isinstance(completion, list):
        return template(_messages(prompt + completion, "prompt and completion"))
    raise ValueError(f"it has {', '.join(map(repr, list(row)[:8])) or 'nothing'}")


def _messages(turns: list[Any], key: str) -> list[dict[str, str]]:
    """Messages with a role and a content that is text, whatever they are called in the row."""
    messages = []
    for number, turn in enumerate(turns, 1):
        role = turn.get("role", turn.get("from")) if isinstance(turn, Mapping) else None
        if not isinstance(role, str):
            raise ValueError(f"message {number} of its {key} has no role")
        content = turn.get("content", turn.get("value"))
        if isinstance(content, list):  # parts, of which pictures and the like are no text
            parts = [part.get("text") for part in content if isinstance(part, Mapping)]
            content = "\n".join(part for part in parts if isinstance(part, str))
        if content is not None and not isinstance(content, str):
            raise ValueError(f"message {number} of its {key} has a content that is {type(content).__name__}")
        messages.append({"role": _ROLES.get(role, role), "content": content or ""})
    if not messages:
        raise ValueError(f"its {key} is empty")
    return messages


def chat_template(load: Callable[[], Any]) -> Template:
    """What makes text of messages with a tokenizer's chat template; without one their contents stand in lines.

    Args:
        load: Gives the tokenizer; is called once messages are met, if ever.
    """
    tokenizers: list[Any] = []

    def apply(messages: list[dict[str, str]]) -> str:
        if not tokenizers:
            tokenizers.append(load())
        tokenizer = tokenizers[0]
        if getattr(tokenizer, "chat_template", None) is None:
            return "\n".join(message["content"] for message in messages)
        try:
            return str(tokenizer.apply_chat_template(messages, tokenize=False))
        except Exception as error:  # noqa: BLE001 (a template raises what it likes, such as that roles must alternate)
            raise ValueError(
                f"the model's chat template refuses its messages: {' '.join(str(error).split())}"
            ) from None

    return apply
