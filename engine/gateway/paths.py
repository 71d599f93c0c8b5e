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
_OPENAI = "/openai/v1/"
_MODEL = "/models/"
_DEPLOYMENT = re.compile(r"/(?:openai/deployments|engines)/(.+?)(/(?:chat/completions|completions|embeddings))")


def usual(path: str) -> tuple[str, str | None]:
    """(the path as it is served here, the model that it names), of a path that is not served as it stands.

    Known are OpenAI's paths without `/v1`, its own and Azure's `/openai/v1/...`, and Azure's and LiteLLM's
    `/openai/deployments/MODEL/...` and `/engines/MODEL/...`; any other path comes back as it is.
    """
    if path in _BARE or path.startswith(_MODEL):
        return "/v1" + path, None
    if path.startswith(_OPENAI):
        return path.removeprefix("/openai"), None
    found = _DEPLOYMENT.fullmatch(path)
    return (path, None) if found is None else ("/v1" + found[2], found[1])
