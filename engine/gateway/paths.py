"""Paths that clients of other gateways use, as those that are served here."""

import re

from tokenmill.engine.gateway import openapi

#: Below `/v1`, and there without it.
_BARE = frozenset(
    {
        *(path.removeprefix("/v1") for path in openapi.INFERENCE_PATHS),
        "/audio/speech",
        "/audio/transcriptions",
        "/audio/translations",
        "/images/edits",
        "/images/generations",
        "/images/variations",
        "/models",
        "/moderations",
    }
)
#: Before `/v1`; LiteLLM passes Anthropic's clients on below its name.
_BEFORE = re.compile(r"/openai(?=/v1/)|/anthropic(?=/v1/messages(?:/count_tokens)?$)")
#: Of these whatever is below, too.
_ABOVE = ("/models/", "/responses/")
_DEPLOYMENT = re.compile(r"/(?:openai/deployments|engines)/(.+?)(/(?:chat/completions|completions|embeddings))")

#: What an account keeps for all that have its key, or is to administrate it: the first names of paths below `/v1` of
#: OpenAI, Anthropic, Mistral and LiteLLM.
_OF_AN_ACCOUNT = frozenset(
    {
        *("access_group", "agents", "assistants", "batch", "batches", "chatkit", "containers", "conversations"),
        *("environments", "evals", "files", "fine-tunes", "fine_tuning", "indexes", "keys", "libraries", "mcp"),
        *("memory", "organization", "organizations", "projects", "rag", "realtime", "sessions", "skills", "threads"),
        *("unified_access_group", "uploads", "users", "vector_store", "vector_stores", "videos", "workspaces"),
    }
)
_OF_ONE_TOO = ("/v1/audio/voice", "/v1/chat/completions/chatcmpl", "/v1/messages/batches")
_ASKS_A_MODEL = frozenset({"/v1/agents/completions", "/v1/videos/generations", "/v1/videos/sync"})


def is_of_an_account(path: str) -> bool:
    """Whether a path is about files, batches, conversations, keys and the like: what a backend keeps for its account.

    A gateway with keys shares one account between them, and cannot tell whose a file is.
    """
    path = path.lower()
    first = path.removeprefix("/v1/").partition("/")[0]
    return (first in _OF_AN_ACCOUNT and path not in _ASKS_A_MODEL) or path.startswith(_OF_ONE_TOO)


def usual(path: str) -> tuple[str, str | None]:
    """(the path as it is served here, the model that it names), of a path that is not served as it stands.

    Known are OpenAI's paths without `/v1`, its own and Azure's `/openai/v1/...`, LiteLLM's `/anthropic/v1/messages`,
    and Azure's and LiteLLM's `/openai/deployments/MODEL/...` and `/engines/MODEL/...`; any other comes back as it is.
    """
    if path in _BARE or path.startswith(_ABOVE):
        return "/v1" + path, None
    if (before := _BEFORE.match(path)) is not None:
        return path[before.end() :], None
    found = _DEPLOYMENT.fullmatch(path)
    return (path, None) if found is None else ("/v1" + found[2], found[1])
