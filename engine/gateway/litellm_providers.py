"""How the prefixes of LiteLLM's model names are served, and where a server stands."""

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass
from string import Formatter
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Provider:
    """How a prefix of `model` is served.

    Attributes:
        base: Its API's address, with variables in braces; None: the file must name it in `api_base`.
        keys: The variables that hold its key where the file names none, the first that is set.
        protocol: What it speaks.
        bases: Variables that go before `base`, the first that is set.
        as_it_is: To an address that the file names LiteLLM adds no `/v1`.
        closed: Only `base` speaks that protocol: what files name in `api_base` speaks the provider's own.
        azure: Its servers are Azure's resources.
        lacks: Beginnings of the names of models that are not served by that protocol.
    """

    base: str | None
    keys: tuple[str, ...] = ()
    protocol: str = "openai"
    bases: tuple[str, ...] = ()
    as_it_is: bool = False
    closed: bool = False
    azure: bool = False
    lacks: tuple[str, ...] = ()

    @property
    def inside_base(self) -> list[str]:
        """The variables that are parts of `base`."""
        return [name for _, name, _, _ in Formatter().parse(self.base or "") if name]

    @property
    def local(self) -> bool:
        """Whether it is a program that people run themselves, mostly without a key."""
        return not self.azure and (self.base is None or self.base.startswith("http://"))


def _of(base: str, name: str, *keys: str) -> Provider:
    """A provider with an address and variables of the usual names."""
    return Provider(base, (f"{name}_API_KEY", *keys), bases=(f"{name}_API_BASE",))


#: Part of the address of Cloudflare's API.
_ACCOUNT = "CLOUDFLARE_ACCOUNT_ID"
_OPENAI = Provider(
    "https://api.openai.com/v1", ("OPENAI_API_KEY",), bases=("OPENAI_BASE_URL", "OPENAI_API_BASE"), as_it_is=True
)
_OLLAMA = Provider("http://localhost:11434", ("OLLAMA_API_KEY",), bases=("OLLAMA_API_BASE",))
_VLLM = Provider(None, ("HOSTED_VLLM_API_KEY",), bases=("HOSTED_VLLM_API_BASE",), as_it_is=True)
_COHERE = Provider(
    "https://api.cohere.ai/compatibility/v1", ("COHERE_API_KEY", "CO_API_KEY"), closed=True, lacks=("rerank",)
)
_GEMINI = Provider(
    "https://generativelanguage.googleapis.com/v1beta/openai", ("GEMINI_API_KEY", "GOOGLE_API_KEY"), closed=True
)
_AZURE = Provider(None, ("AZURE_OPENAI_API_KEY", "AZURE_API_KEY"), bases=("AZURE_API_BASE",), azure=True)
_AZURE_AI = Provider(
    None,
    ("AZURE_AI_API_KEY",),
    bases=("AZURE_AI_API_BASE",),
    azure=True,
    lacks=("cohere-rerank", "Cohere-rerank"),
)
#: Claude has Anthropic's protocol there, too.
_AZURE_CLAUDE = Provider(None, ("AZURE_AI_API_KEY",), protocol="anthropic", bases=("AZURE_AI_API_BASE",), azure=True)
#: Prefixes of `litellm_params.model` whose servers speak OpenAI's protocol, or Anthropic's.
PROVIDERS: Mapping[str, Provider] = {
    "openai": _OPENAI,
    "text-completion-openai": _OPENAI,
    "anthropic": Provider(
        "https://api.anthropic.com", ("ANTHROPIC_API_KEY",), "anthropic", ("ANTHROPIC_API_BASE", "ANTHROPIC_BASE_URL")
    ),
    "azure": _AZURE,
    "azure_ai": _AZURE_AI,
    "gemini": _GEMINI,
    "groq": _of("https://api.groq.com/openai/v1", "GROQ"),
    "mistral": _of("https://api.mistral.ai/v1", "MISTRAL"),
    "codestral": _of("https://codestral.mistral.ai/v1", "CODESTRAL"),
    "deepseek": _of("https://api.deepseek.com/v1", "DEEPSEEK"),
    "together_ai": Provider(
        "https://api.together.xyz/v1",
        ("TOGETHER_API_KEY", "TOGETHER_AI_API_KEY", "TOGETHERAI_API_KEY"),
        bases=("TOGETHER_AI_API_BASE",),
    ),
    "fireworks_ai": Provider(
        "https://api.fireworks.ai/inference/v1",
        ("FIREWORKS_API_KEY", "FIREWORKS_AI_API_KEY", "FIREWORKSAI_API_KEY"),
        bases=("FIREWORKS_API_BASE",),
    ),
    "openrouter": _of("https://openrouter.ai/api/v1", "OPENROUTER", "OR_API_KEY"),
    "xai": _of("https://api.x.ai/v1", "XAI"),
    "cerebras": _of("https://api.cerebras.ai/v1", "CEREBRAS"),
    "nvidia_nim": _of("https://integrate.api.nvidia.com/v1", "NVIDIA_NIM"),
    "cohere": _COHERE,
    "cohere_chat": _COHERE,
    "perplexity": Provider(
        "https://api.perplexity.ai",
        ("PERPLEXITYAI_API_KEY", "PERPLEXITY_API_KEY"),
        bases=("PERPLEXITY_API_BASE",),
        as_it_is=True,
    ),
    "sambanova": _of("https://api.sambanova.ai/v1", "SAMBANOVA"),
    "deepinfra": _of("https://api.deepinfra.com/v1/openai", "DEEPINFRA"),
    "moonshot": _of("https://api.moonshot.ai/v1", "MOONSHOT"),
    "dashscope": _of("https://dashscope-intl.aliyuncs.com/compatible-mode/v1", "DASHSCOPE"),
    "zai": _of("https://api.z.ai/api/paas/v4", "ZAI"),
    "minimax": _of("https://api.minimax.io/v1", "MINIMAX"),
    "volcengine": _of("https://ark.cn-beijing.volces.com/api/v3", "VOLCENGINE", "ARK_API_KEY"),
    "nebius": _of("https://api.studio.nebius.ai/v1", "NEBIUS"),
    "hyperbolic": _of("https://api.hyperbolic.xyz/v1", "HYPERBOLIC"),
    "novita": _of("https://api.novita.ai/v3/openai", "NOVITA"),
    "nscale": _of("https://inference.api.nscale.com/v1", "NSCALE"),
    "lambda_ai": Provider("https://api.lambda.ai/v1", ("LAMBDA_API_KEY",), bases=("LAMBDA_API_BASE",)),
    "meta_llama": Provider("https://api.llama.com/compat/v1", ("LLAMA_API_KEY",), bases=("LLAMA_API_BASE",)),
    "vercel_ai_gateway": _of("https://ai-gateway.vercel.sh/v1", "VERCEL_AI_GATEWAY"),
    "ai21": _of("https://api.ai21.com/studio/v1", "AI21"),
    "ai21_chat": _of("https://api.ai21.com/studio/v1", "AI21"),
    "aihubmix": _of("https://aihubmix.com/v1", "AIHUBMIX"),
    "aiml": _of("https://api.aimlapi.com/v1", "AIML", "AIMLAPI_KEY"),
    "baseten": _of("https://inference.baseten.co/v1", "BASETEN"),
    "chutes": _of("https://llm.chutes.ai/v1", "CHUTES"),
    "clarifai": _of("https://api.clarifai.com/v2/ext/openai/v1", "CLARIFAI"),
    "cloudflare": Provider(
        f"https://api.cloudflare.com/client/v4/accounts/{{{_ACCOUNT}}}/ai/v1", ("CLOUDFLARE_API_KEY",), closed=True
    ),
    "cometapi": _of("https://api.cometapi.com/v1", "COMETAPI", "COMETAPI_KEY"),
    "crusoe": _of("https://api.inference.crusoecloud.com/v1", "CRUSOE"),
    "featherless_ai": _of("https://api.featherless.ai/v1", "FEATHERLESS_AI", "FEATHERLESS_API_KEY"),
    "friendliai": Provider(
        "https://api.friendli.ai/serverless/v1",
        ("FRIENDLIAI_API_KEY", "FRIENDLI_TOKEN"),
        bases=("FRIENDLI_API_BASE",),
    ),
    "gmi": _of("https://api.gmi-serving.com/v1", "GMI"),
    "inception": _of("https://api.inceptionlabs.ai/v1", "INCEPTION"),
    "jina_ai": _of("https://api.jina.ai/v1", "JINA_AI", "JINA_API_KEY", "JINA_AI_TOKEN"),
    "modelscope": _of("https://api-inference.modelscope.cn/v1", "MODELSCOPE"),
    "morph": _of("https://api.morphllm.com/v1", "MORPH"),
    "nano-gpt": _of("https://nano-gpt.com/api/v1", "NANOGPT"),
    "ovhcloud": _of("https://oai.endpoints.kepler.ai.cloud.ovh.net/v1", "OVHCLOUD"),
    "parasail": _of("https://api.parasail.io/v1", "PARASAIL"),
    "poe": _of("https://api.poe.com/v1", "POE"),
    "publicai": _of("https://api.publicai.co/v1", "PUBLICAI"),
    "scaleway": Provider("https://api.scaleway.ai/v1", ("SCW_SECRET_KEY",)),
    "synthetic": _of("https://api.synthetic.new/openai/v1", "SYNTHETIC"),
    "v0": _of("https://api.v0.dev/v1", "V0"),
    "veniceai": _of("https://api.venice.ai/api/v1", "VENICE_AI"),
    "voyage": _of("https://api.voyageai.com/v1", "VOYAGE", "VOYAGE_AI_API_KEY", "VOYAGE_AI_TOKEN"),
    "wandb": _of("https://api.inference.wandb.ai/v1", "WANDB"),
    "xiaomi_mimo": _of("https://api.xiaomimimo.com/v1", "XIAOMI_MIMO"),
    # A workspace's `.../serving-endpoints` has the model's name in the body, as OpenAI's clients send it.
    "databricks": Provider(None, ("DATABRICKS_API_KEY",), bases=("DATABRICKS_API_BASE",), as_it_is=True),
    "infinity": Provider(None, ("INFINITY_API_KEY",), as_it_is=True),
    "lemonade": _of("http://localhost:8000/api/v1", "LEMONADE"),
    "xinference": _of("http://127.0.0.1:9997/v1", "XINFERENCE"),
    "ollama": _OLLAMA,
    "ollama_chat": _OLLAMA,
    "hosted_vllm": _VLLM,
    "vllm": Provider(None, as_it_is=True),
    "openai_like": Provider(None, ("OPENAI_LIKE_API_KEY",), bases=("OPENAI_LIKE_API_BASE",), as_it_is=True),
    "custom_openai": Provider(None, as_it_is=True),
    "lm_studio": Provider(None, ("LM_STUDIO_API_KEY",), bases=("LM_STUDIO_API_BASE",), as_it_is=True),
    "llamafile": Provider(
        "http://127.0.0.1:8080/v1", ("LLAMAFILE_API_KEY",), bases=("LLAMAFILE_API_BASE",), as_it_is=True
    ),
    "docker_model_runner": Provider(
        "http://localhost:22088/engines/llama.cpp",
        ("DOCKER_MODEL_RUNNER_API_KEY",),
        bases=("DOCKER_MODEL_RUNNER_API_BASE",),
    ),
    # A TGI server; which of its partners Hugging Face's own router asks, LiteLLM looks up.
    "huggingface": Provider(None),
    # The address that LiteLLM has for it is no more.
    "github": Provider(None, ("GITHUB_API_KEY",), bases=("GITHUB_API_BASE",), as_it_is=True),
    "litellm_proxy": Provider(None, ("LITELLM_PROXY_API_KEY",), bases=("LITELLM_PROXY_API_BASE",)),
    "text-completion-hosted_vllm": _VLLM,
}
#: Those that list what they have, and have much, for any model of any provider.
OF_ANY = (
    *("openai", "anthropic", "groq", "mistral", "deepseek", "xai", "openrouter", "together_ai", "fireworks_ai"),
    *("cerebras", "nvidia_nim", "sambanova", "deepinfra", "moonshot"),
)
#: Azure's own hosts, whose `/openai/v1` takes a deployment's name as the model, and the key as a bearer's.
_AZURE_HOSTS = (".openai.azure.com", ".cognitiveservices.azure.com", ".services.ai.azure.com")
#: Servers of OpenAI's protocol that have no `/v1` although nothing stands behind their host's name.
_WITHOUT_V1 = frozenset({"models.inference.ai.azure.com", "api.perplexity.ai", "api.githubcopilot.com"})
#: What LiteLLM takes as part of an address, and adds where it is missing.
_ENDPOINTS = {"openai": ("/chat/completions",), "anthropic": ("/v1/messages",)}
#: What LiteLLM reads in front of a model's name to choose its own way of asking for it.
_WAYS = {"openai": ("responses/",), "azure": ("responses/", "gpt5_series/", "o_series/")}
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
        way = next((way for way in _WAYS.get(prefix, ()) if rest.startswith(way)), "")
        return prefix, rest.removeprefix(way)
    return next((name for pattern, name in _BARE_MODELS if pattern.match(model)), prefix), model


def provider_of(prefix: str, upstream: str) -> Provider | None:
    """How a model is served; None: by no protocol that is spoken here."""
    return _AZURE_CLAUDE if prefix == "azure_ai" and upstream.startswith("claude") else PROVIDERS.get(prefix)


def served_at(provider: Provider, address: str) -> tuple[str, bool] | None:
    """(where a provider's server is asked, whether its paths have `/v1`) of the address that LiteLLM is given.

    None: it is no address of Azure's, whose deployments are asked for by other paths there.
    """
    try:
        parts = urlsplit(address)
        host = (parts.hostname or "").lower()
    except ValueError:
        return address, True  # it is refused later, with its line
    if provider.azure:
        below = "anthropic" if provider.protocol == "anthropic" else "openai/v1"
        return (f"https://{parts.netloc}/{below}", True) if host.endswith(_AZURE_HOSTS) else None
    address = address.rstrip("/")
    for endpoint in _ENDPOINTS[provider.protocol]:
        address = address.removesuffix(endpoint)
    path = urlsplit(address).path
    # Without a path most servers have `/v1`, also those where LiteLLM finds only what they have beside it.
    plain = path.endswith("/v1") or (not path and host not in _WITHOUT_V1)
    return address, plain or not provider.as_it_is


def same_host(address: str, other: str) -> bool:
    """Whether two addresses are of one host, by one protocol and port."""
    try:
        first, second = [urlsplit(one) for one in (address, other)]
        return (first.scheme, first.hostname, first.port) == (second.scheme, second.hostname, second.port)
    except ValueError:
        return False


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
