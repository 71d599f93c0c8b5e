"""Reads the YAML file of a LiteLLM proxy as it is, and makes our configuration of it.

Each `model_name` becomes a tier of that name, its deployments the tier's backends. Everything in the file is either
used or listed, with its line and the reason; nothing is dropped silently. The fields are those that LiteLLM documents
(docs.litellm.ai: proxy/configs, proxy/config_settings, proxy/reliability, routing).
"""

import ipaddress
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from tokenmill import env
from tokenmill.engine.gateway import litellm_prices
from tokenmill.engine.gateway.admin.duration import milliseconds
from tokenmill.engine.gateway.config import Config, RemoteBackend
from tokenmill.engine.gateway.foreign_file import ForeignFile, dotted
from tokenmill.engine.gateway.governance.options import MAKE_A_KEY, SHORTEST_MASTER_KEY
from tokenmill.engine.gateway.litellm_models import Describer
from tokenmill.engine.gateway.litellm_prices import CostMap
from tokenmill.engine.gateway.yaml_file import Place, YamlFile
from tokenmill.errors import InputError


@dataclass(frozen=True)
class Provider:
    """How a prefix of `model` is served.

    Attributes:
        base: Its API's address; None: the file must name it in `api_base`.
        key: The variable that holds its key where the file names none.
        protocol: What it speaks.
    """

    base: str | None
    key: str | None = None
    protocol: str = "openai"


#: Prefixes of `litellm_params.model` whose servers speak OpenAI's protocol below `/v1`, or Anthropic's.
PROVIDERS: Mapping[str, Provider] = {
    "openai": Provider("https://api.openai.com/v1", "OPENAI_API_KEY"),
    "text-completion-openai": Provider("https://api.openai.com/v1", "OPENAI_API_KEY"),
    "anthropic": Provider("https://api.anthropic.com", "ANTHROPIC_API_KEY", "anthropic"),
    "groq": Provider("https://api.groq.com/openai/v1", "GROQ_API_KEY"),
    "mistral": Provider("https://api.mistral.ai/v1", "MISTRAL_API_KEY"),
    "deepseek": Provider("https://api.deepseek.com/v1", "DEEPSEEK_API_KEY"),
    "together_ai": Provider("https://api.together.xyz/v1", "TOGETHERAI_API_KEY"),
    "fireworks_ai": Provider("https://api.fireworks.ai/inference/v1", "FIREWORKS_AI_API_KEY"),
    "openrouter": Provider("https://openrouter.ai/api/v1", "OPENROUTER_API_KEY"),
    "xai": Provider("https://api.x.ai/v1", "XAI_API_KEY"),
    "cerebras": Provider("https://api.cerebras.ai/v1", "CEREBRAS_API_KEY"),
    "nvidia_nim": Provider("https://integrate.api.nvidia.com/v1", "NVIDIA_NIM_API_KEY"),
    "ollama": Provider("http://localhost:11434"),
    "ollama_chat": Provider("http://localhost:11434"),
    "hosted_vllm": Provider(None),
    "vllm": Provider(None),
    "openai_like": Provider(None),
    "custom_openai": Provider(None),
    "lm_studio": Provider(None),
    "litellm_proxy": Provider(None),
    "text-completion-hosted_vllm": Provider(None),
}
#: Models that LiteLLM takes without a prefix.
_BARE_MODELS = (
    (re.compile(r"(gpt|chatgpt|o[0-9]|text-embedding|davinci)"), "openai"),
    (re.compile("claude"), "anthropic"),
)
#: Strategies that ours stands in for: the fewest open requests per weight.
_STRATEGIES = ("simple-shuffle", "least-busy")
_WEIGHTS = ("weight", "rpm", "tpm")
#: What takes over from a model, named here as there.
_FALLBACKS = ("fallbacks", "context_window_fallbacks", "content_policy_fallbacks")

_MASTER_KEY: Place = ("general_settings", "master_key")

#: Why some fields are not used.
_REASONS: Mapping[str, str] = {
    "litellm_settings.drop_params": "every field passes to the backend untouched",
    "litellm_settings.set_verbose": "set the variable TOKENMILL_LOG_LEVEL=debug instead",
    "litellm_settings.cache": "there is no cache here",
    **dict.fromkeys(
        ("litellm_settings.callbacks", "litellm_settings.success_callback", "litellm_settings.failure_callback"),
        "Prometheus' figures are at /metrics; traces need `observability.traces` in our own format",
    ),
    "router_settings.redis_host": "workers share limits through the store, no Redis is needed",
    "router_settings.redis_port": "workers share limits through the store, no Redis is needed",
    "router_settings.redis_password": "workers share limits through the store, no Redis is needed",
    "router_settings.enable_pre_call_checks": "`rpm` and `tpm` always count, `max_input_tokens` decides about "
    "`context_window_fallbacks`",
    "router_settings.retry_policy": "`num_retries` counts for every kind of failure",
    "router_settings.allowed_fails_policy": "`allowed_fails` counts for every kind of failure",
    "general_settings.database_url": "keys and books are kept in the store of `governance`",
    "general_settings.background_health_checks": "backends are always watched",
    "general_settings.store_model_in_db": "models are those of this file",
}


@dataclass(frozen=True)
class Imported:
    """What became of a file.

    Attributes:
        config: Our configuration.
        left_out: `file:line: field: reason`, one line for each thing that was not understood.
        notes: Where prices come from, what is wrong there, which models have none, and a master key that can be
            guessed, one line each.
    """

    config: Config
    left_out: tuple[str, ...]
    notes: tuple[str, ...] = ()


def is_litellm(value: Any) -> bool:
    """Whether a parsed file is a LiteLLM proxy's and not ours."""
    return isinstance(value, dict) and "model_list" in value and "tiers" not in value


def convert(file: YamlFile) -> Imported:
    """Makes our configuration of a LiteLLM proxy's file that was read; what it does not state is in LiteLLM's cost map.

    Raises:
        ConfigurationError: It cannot be used, or the cost map that the user named cannot; one line
            `file:line: field: problem` for each thing that is wrong.
    """
    source = ForeignFile(file)
    prices = litellm_prices.find()
    describer = Describer(source, prices)
    document = _Importer(source, describer).document()
    if prices.stated:
        source.problems += prices.problems
    source.check()
    imported = Config.model_validate(document)
    lines = [
        f"{file.where(place)}: {dotted(place)}: not understood{'; ' if reason else ''}{reason}"
        for place, reason in source.left_over()
    ]
    lines += _url_is_not_fetched(source, prices)
    governance = imported.governance
    notes = [*describer.notes(governed=governance is not None)]
    if governance is not None and governance.guessable_master_key:
        where = f"{file.where(_MASTER_KEY)}: {dotted(_MASTER_KEY)}"
        notes.append(f"{where}: fewer than {SHORTEST_MASTER_KEY} characters: can be guessed; {MAKE_A_KEY}")
    return Imported(imported, tuple(lines), tuple(notes))


def _url_is_not_fetched(source: ForeignFile, prices: CostMap) -> Iterator[str]:
    """A line for the variable by which LiteLLM fetches its cost map; its value may hold a password."""
    name = litellm_prices.URL_VARIABLE
    if source.environment.get(name) or os.environ.get(name):
        used = f"{prices.path} is read instead" if prices.path is not None else "download it"
        remedy = "" if prices.stated else f"; set {env.LITELLM_PRICES.name} to a copy of it"
        yield f"{name}: not understood; no cost map is fetched; {used}{remedy}"


class _Importer:
    """One file on its way to our format."""

    def __init__(self, source: ForeignFile, describer: Describer) -> None:
        self._source = source
        self._describer = describer
        self._tiers: dict[str, str] = {}  # model_name to tier

    def document(self) -> dict[str, Any]:
        """The file in our format."""
        source = self._source
        for place in (("litellm_settings",), ("router_settings",), ("general_settings",), ("environment_variables",)):
            source.kind(place, dict, "a mapping of settings")
        names = source.keys(("environment_variables",))
        source.environment = {
            name: text for name in names if (text := source.text(("environment_variables", name))) is not None
        }
        groups = self._groups()
        tiers: dict[str, dict[str, Any]] = {
            self._tiers[name]: {"backends": backends} for name, backends in groups.items()
        }
        if not tiers and not source.problems:
            source.problem(("model_list",), "no deployment can be served; see the providers in docs/gateway.md")
        self._alias(tiers)
        self._fall_back(tiers)
        document: dict[str, Any] = {"server": self._server(groups), "tiers": tiers}
        document |= self._governance()
        if source.flag(("litellm_settings", "json_logs")):
            document["observability"] = {"request_log": True}
        for field, reason in _REASONS.items():
            section, _, name = field.partition(".")
            if source.peek((section, name)) is not None:
                source.leave((section, name), reason)
        return document

    def _groups(self) -> dict[str, list[dict[str, Any]]]:
        """Deployments by model name, in the order of the file."""
        source = self._source
        groups: dict[str, list[dict[str, Any]]] = {}
        source.kind(("model_list",), list, "a list of deployments")
        weighed: dict[str, list[Place]] = {}
        for index in source.keys(("model_list",)):
            place: Place = ("model_list", index)
            if source.kind(place, dict, "a deployment with model_name and litellm_params") is None:
                continue
            name = source.text((*place, "model_name"))
            if not name:
                if source.peek((*place, "model_name")) in (None, ""):
                    source.problem(place, "model_name is missing; add it")
                continue
            backend = self._deployment(place, name)
            if backend is not None:
                groups.setdefault(name, []).append(backend)
                weighed.setdefault(name, []).append((*place, "litellm_params"))
        for name, places in weighed.items():
            self._tiers[name] = _tier_name(name, self._tiers.values())
            self._weigh(places, groups[name])
        return groups

    def _weigh(self, places: list[Place], backends: list[dict[str, Any]]) -> None:
        """LiteLLM shares a group's load by weight, else by rpm, else by tpm, where every deployment states it."""
        source = self._source
        for field in _WEIGHTS:
            values = [source.peek((*place, field)) for place in places]
            if len(places) > 1 and all(isinstance(value, (int, float)) and value > 0 for value in values):
                for backend, value in zip(backends, values, strict=True):
                    backend["weight"] = float(value)
                return

    def _deployment(self, place: Place, name: str) -> dict[str, Any] | None:
        """One backend; None for one that cannot be served, which is then listed."""
        source = self._source
        parameters: Place = (*place, "litellm_params")
        if source.kind(parameters, dict, "a mapping of parameters") is None:
            if source.peek(parameters) is None:
                source.problem(place, "litellm_params is missing; add it")
            return None
        model = source.text((*parameters, "model"))
        if not model:
            if source.peek((*parameters, "model")) in (None, ""):
                source.problem(parameters, "model is missing; add it")
            return None
        address = source.text((*parameters, "api_base")) or source.text((*parameters, "base_url"))
        prefix, upstream = _split(model, source.text((*parameters, "custom_llm_provider")))
        provider = PROVIDERS.get(prefix)
        if provider is None:
            source.leave(
                place, f"{model[:60]!r} needs a protocol that is not spoken here; known: {', '.join(PROVIDERS)}"
            )
            return None
        address = address or provider.base
        if address is None:
            source.problem(parameters, f"{prefix} needs the server's address; add api_base")
            return None
        wildcard = "*" in name or "*" in upstream
        if wildcard and (name, upstream) != ("*", "*"):
            source.leave(place, "a wildcard is understood only as model_name '*' for all that one server lists")
            return None
        backend = {
            "url": address,
            "protocol": provider.protocol,
            "health_path": None,
            "zone": _zone(address),
            "models": {} if wildcard else {name: upstream},
            **self._key(parameters, provider),
            **self._limits(parameters),
            "region": source.text((*parameters, "region_name")),
            **self._describer.describe(place, name, prefix, upstream),
        }
        backend = {field: value for field, value in backend.items() if value is not None or field == "health_path"}
        try:
            RemoteBackend.model_validate(backend)
        except ValidationError as error:
            for details in error.errors():
                source.problem(parameters, f"{details['loc'][0] if details['loc'] else 'deployment'}: {_said(details)}")
            return None
        return backend

    def _key(self, parameters: Place, provider: Provider) -> dict[str, Any]:
        """The backend's key: as the file says, else the provider's usual variable."""
        source = self._source
        place = (*parameters, "api_key")
        variable = source.variable(place)
        if variable is not None and variable not in source.environment:
            source.raw(place)
            return {"api_key_env": variable}
        key = source.text(place)
        if key is not None:
            return {"api_key": key}
        own_server = source.peek((*parameters, "api_base")) is not None
        return {} if own_server or provider.key is None else {"api_key_env": provider.key}

    def _limits(self, parameters: Place) -> dict[str, Any]:
        source = self._source
        source.number((*parameters, "weight"), 0, 1e9)
        return {
            "requests_per_minute": source.whole((*parameters, "rpm"), 1, 10**9),
            "tokens_per_minute": source.whole((*parameters, "tpm"), 1, 10**12),
            "max_concurrency": source.whole((*parameters, "max_parallel_requests"), 1, 10**6)
            or source.whole(("general_settings", "max_parallel_requests"), 1, 10**6)
            or source.whole(("router_settings", "default_max_parallel_requests"), 1, 10**6),
        }

    def _alias(self, tiers: dict[str, dict[str, Any]]) -> None:
        """`model_group_alias`: another public name of a model."""
        source = self._source
        place: Place = ("router_settings", "model_group_alias")
        source.kind(place, dict, "a mapping of names")
        for alias in source.keys(place):
            inside = isinstance(source.peek((*place, alias)), dict)
            name = source.text((*place, alias, "model") if inside else (*place, alias))
            if name is None:
                continue
            if name not in self._tiers:
                source.problem((*place, alias), f"{name[:60]!r} is no model_name of this file")
                continue
            for backend in tiers[self._tiers[name]]["backends"]:
                backend["models"][alias] = backend["models"].get(name, name)

    def _fall_back(self, tiers: dict[str, dict[str, Any]]) -> None:
        """`fallbacks: [{model: [others]}]` and their kin, in either section; the router's own wins."""
        source = self._source
        for field in _FALLBACKS:
            for section in ("router_settings", "litellm_settings"):
                place: Place = (section, field)
                source.kind(place, list, "a list like [{model: [another]}]")
                for index in source.keys(place):
                    if source.kind((*place, index), dict, "a mapping like {model: [another]}") is None:
                        continue
                    for name in source.keys((*place, index)):
                        found = self._named((*place, index, name))
                        if name == "*":
                            self._fall_back_all(tiers, field, found)
                        elif name not in self._tiers:
                            source.problem((*place, index, name), f"{name[:60]!r} is no model_name of this file")
                        else:
                            own = self._tiers[name]
                            tiers[own].setdefault(field, [other for other in found if other != own])
        for section in ("router_settings", "litellm_settings"):
            self._fall_back_all(tiers, "fallbacks", self._named((section, "default_fallbacks")))
            most = source.whole((section, "max_fallbacks"), 0, 100)
            for tier in tiers.values() if most is not None else ():
                tier.update({field: tier[field][:most] for field in _FALLBACKS if field in tier})

    def _fall_back_all(self, tiers: dict[str, dict[str, Any]], field: str, others: list[str]) -> None:
        for name, tier in tiers.items():
            if others:
                tier.setdefault(field, [other for other in others if other != name])

    def _named(self, place: Place) -> list[str]:
        """The tiers of a list of model names."""
        source = self._source
        source.kind(place, list, "a list of model names")
        names = [source.text((*place, index)) for index in source.keys(place)]
        for index, name in enumerate(names):
            if name is not None and name not in self._tiers:
                source.problem((*place, index), f"{name[:60]!r} is no model_name of this file")
        return [self._tiers[name] for name in names if name in self._tiers]

    def _server(self, groups: Mapping[str, Any]) -> dict[str, Any]:
        source = self._source
        found: dict[str, Any] = {}
        for section in ("router_settings", "litellm_settings"):  # the router's own win
            read = {
                "read_timeout_seconds": source.number((section, "timeout"), 0.001, 86_400)
                or source.number((section, "request_timeout"), 0.001, 86_400),
                "retries": source.whole((section, "num_retries"), 0, 100),
                "breaker_failures": source.whole((section, "allowed_fails"), 1, 100_000),
                "breaker_cooldown_seconds": source.number((section, "cooldown_time"), 0.001, 86_400),
            }
            found = {name: value for name, value in read.items() if value is not None} | found
        size = source.number(("general_settings", "max_request_size_mb"), 0.001, 4096)
        default = source.text(("general_settings", "completion_model"))
        if default is not None and default not in groups:
            source.problem(("general_settings", "completion_model"), f"{default[:60]!r} is no model_name of this file")
        found |= {} if size is None else {"max_body_mb": size}
        found |= {} if default is None else {"default_model": default}
        strategy = source.text(("router_settings", "routing_strategy"))
        if strategy is not None and strategy not in _STRATEGIES:
            source.leave(
                ("router_settings", "routing_strategy"), "the backend with the fewest open requests per weight is taken"
            )
        return found

    def _governance(self) -> dict[str, Any]:
        """A master key means keys and budgets; the books are kept beside the file."""
        source = self._source
        variable = source.variable(_MASTER_KEY)
        if variable is not None and variable not in source.environment:
            source.raw(_MASTER_KEY)
            key = os.environ.get(variable, "").strip()
            named = {"master_key_env": variable}
        else:
            found = source.text(_MASTER_KEY)
            if found is None:
                return {}
            key = found
            named = {"master_key": key}
        store = source.file.path.with_suffix(".db")
        section: dict[str, Any] = {"store": str(store), **named}
        # LiteLLM's own documentation has `sk-1234`: such a file is taken, too, and told so.
        section["guessable_master_key"] = 0 < len(key) < SHORTEST_MASTER_KEY
        days = source.text(("general_settings", "maximum_spend_logs_retention_period"))
        if days is not None:
            try:
                section["retention_days"] = max(1, milliseconds(days) // 86_400_000)
            except InputError as error:
                source.problem(("general_settings", "maximum_spend_logs_retention_period"), str(error))
        return {"governance": section}


def _split(model: str, provider: str | None) -> tuple[str, str]:
    """(provider, the server's own name) of `openai/gpt-4o`, `claude-3-haiku`, `org/model` with a provider beside it."""
    if provider:
        return provider, model.removeprefix(provider + "/")
    prefix, slash, rest = model.partition("/")
    if slash:
        return prefix, rest
    return next((name for pattern, name in _BARE_MODELS if pattern.match(model)), prefix), model


def _tier_name(name: str, taken: Iterable[str]) -> str:
    """A model's name as the name of a tier: plain characters, unique."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._")[:56] or "all"
    taken = set(taken)
    numbered = (plain if number == 1 else f"{plain}-{number}" for number in range(1, len(taken) + 2))
    return next(candidate for candidate in numbered if candidate not in taken)


def _said(details: ErrorDetails) -> str:
    """pydantic's problem in words, without the value: it may be a key."""
    return str(details["ctx"]["error"]) if details["type"] == "value_error" else details["msg"].lower()


def _zone(address: str) -> str:
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
