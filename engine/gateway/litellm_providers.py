"""How the prefixes of LiteLLM's model names are served, and where a server stands."""

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Provider:
    """How a prefix of `model` is served.

    Attributes:
        base: Its API's address; None: the file must name it in `api_base`.
        key: The variable that holds its key where the file names none.
        protocol: What it speaks.
        bases: Variables that go before `base`, the first that is set.
    """

    base: str | None
    key: str | None = None
    protocol: str = "openai"
    bases: tuple[str, ...] = ()


_OPENAI = Provider("https://api.openai.com/v1", "OPENAI_API_KEY", bases=("OPENAI_BASE_URL", "OPENAI_API_BASE"))
_OLLAMA = Provider("http://localhost:11434", bases=("OLLAMA_API_BASE",))
_VLLM = Provider(None, bases=("HOSTED_VLLM_API_BASE",))
#: Prefixes of `litellm_params.model` whose servers speak OpenAI's protocol below `/v1`, or Anthropic's.
PROVIDERS: Mapping[str, Provider] = {
    "openai": _OPENAI,
    "text-completion-openai": _OPENAI,
    "anthropic": Provider(
        "https://api.anthropic.com", "ANTHROPIC_API_KEY", "anthropic", ("ANTHROPIC_API_BASE", "ANTHROPIC_BASE_URL")
    ),
    "groq": Provider("https://api.groq.com/openai/v1", "GROQ_API_KEY", bases=("GROQ_API_BASE",)),
    "mistral": Provider("https://api.mistral.ai/v1", "MISTRAL_API_KEY", bases=("MISTRAL_API_BASE",)),
    "deepseek": Provider("https://api.deepseek.com/v1", "DEEPSEEK_API_KEY", bases=("DEEPSEEK_API_BASE",)),
    "together_ai": Provider("https://api.together.xyz/v1", "TOGETHERAI_API_KEY", bases=("TOGETHER_AI_API_BASE",)),
    "fireworks_ai": Provider(
        "https://api.fireworks.ai/inference/v1", "FIREWORKS_AI_API_KEY", bases=("FIREWORKS_API_BASE",)
    ),
    "openrouter": Provider("https://openrouter.ai/api/v1", "OPENROUTER_API_KEY", bases=("OPENROUTER_API_BASE",)),
    "xai": Provider("https://api.x.ai/v1", "XAI_API_KEY", bases=("XAI_API_BASE",)),
    "cerebras": Provider("https://api.cerebras.ai/v1", "CEREBRAS_API_KEY", bases=("CEREBRAS_API_BASE",)),
    "nvidia_nim": Provider("https://integrate.api.nvidia.com/v1", "NVIDIA_NIM_API_KEY", bases=("NVIDIA_NIM_API_BASE",)),
    "ollama": _OLLAMA,
    "ollama_chat": _OLLAMA,
    "hosted_vllm": _VLLM,
    "vllm": Provider(None),
    "openai_like": Provider(None, bases=("OPENAI_LIKE_API_BASE",)),
    "custom_openai": Provider(None),
    "lm_studio": Provider(None, bases=("LM_STUDIO_API_BASE",)),
    "litellm_proxy": Provider(None, bases=("LITELLM_PROXY_API_BASE",)),
    "text-completion-hosted_vllm": _VLLM,
}
#: Models that LiteLLM takes without a prefix.
_BARE_MODELS = (
    (
        re.compile(r"(gpt|chatgpt|o[0-9]|(text|omni)-(embedding|moderation)|davinci|babbage|whisper-|tts-|dall-e-)"),
        "openai",
    ),
    (re.compile("claude"), "anthropic"),
)


def split(model: str, provider: str | None) -> tuple[str, str]:
    """(provider, the server's own name) of `openai/gpt-4o`, `claude-3-haiku`, `org/model` with a provider beside it."""
    if provider:
        return provider, model.removeprefix(provider + "/")
    prefix, slash, rest = model.partition("/")
    if slash:
        return prefix, rest
    return next((name for pattern, name in _BARE_MODELS if pattern.match(model)), prefix), model


def zone(address: str) -> str:
    """Where a server stands, judged by its address; what is not known to be ours counts as elsewhere."""
    try:
        host = urlsplit(address).hostname or ""
    except ValueError:
        return "cloud"  # the address is refused later, with its line
    try:
        return "on-premises" if ipaddress.ip_address(host).is_private else "cloud"
    except ValueError:
        local = "." not in host or host.endswith((".local", ".internal", ".lan", ".localhost"))
        return "on-premises" if local else "cloud"
