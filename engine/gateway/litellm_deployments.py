"""The deployments of a LiteLLM proxy's file: where each is served, with which key, within which limits."""

import re
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from tokenmill.engine.gateway.backend_section import RemoteBackend
from tokenmill.engine.gateway.defaults import LENGTHS, NEVER
from tokenmill.engine.gateway.foreign_file import ForeignFile
from tokenmill.engine.gateway.litellm_models import Describer
from tokenmill.engine.gateway.litellm_providers import (
    OF_ANY,
    PROVIDERS,
    Provider,
    provider_of,
    same_host,
    served_at,
    split,
    zone,
)
from tokenmill.engine.gateway.yaml_file import Place

#: Fields of a deployment that its requests get where they lack them; so they do all that is in its `extra_body`.
_DEFAULTS = (
    *("temperature", "top_p", "top_k", "min_p", "seed", "stop", "logit_bias", "max_tokens", "max_completion_tokens"),
    *("frequency_penalty", "presence_penalty", "repetition_penalty", "reasoning_effort", "thinking", "verbosity"),
    *("parallel_tool_calls", "chat_template_kwargs"),
)
#: Those of them that Anthropic's API has a counterpart of.
_OF_ANTHROPIC = frozenset(
    {
        *("temperature", "top_p", "top_k", "stop", "max_tokens", "max_completion_tokens", "reasoning_effort"),
        *("thinking", "parallel_tool_calls"),
    }
)
#: Fields of `model_info` that are told as this gateway knows them.
_READ = frozenset(
    {
        *("base_model", "rpm", "tpm", "version", "max_input_tokens", "max_output_tokens", "max_tokens"),
        *("supports_function_calling", "supports_vision", "supports_audio_input", "supports_response_schema"),
        *("input_cost_per_token", "output_cost_per_token", "cache_read_input_token_cost"),
        *("cache_creation_input_token_cost", "cache_creation_input_token_cost_above_1hr"),
    }
)
#: By what LiteLLM's own fields begin that do something there: they are listed.
_MEANS_SOMETHING = (
    "input_cost",
    "output_cost",
    "cache_",
    "health_check",
    "disable_",
    "access",
    "team",
    "supported_env",
)
#: What `drop_params` does here.
DROPS = "used for Anthropic's API alone; to other backends every field passes untouched"
_RETRIED = "a request is sent again to other backends, as often as `router_settings.num_retries` says"
_OLLAMA = "Ollama takes it in its own protocol only; state it in the model's Modelfile, or OLLAMA_CONTEXT_LENGTH there"
#: Why some parameters of deployments are not used.
_PARAMETER_REASONS: Mapping[str, str] = {
    "drop_params": DROPS,
    "additional_drop_params": "every field passes to the backend untouched",
    "stream_timeout": "`timeout` is the longest silence of streams, too",
    "max_retries": _RETRIED,
    "num_retries": _RETRIED,
    "num_ctx": _OLLAMA,
    "keep_alive": _OLLAMA,
    "cooldown_time": "`router_settings.cooldown_time` is that of all",
    "stream": "clients say it themselves",
    "tags": "requests are not routed by tags; give each kind a model_name of its own",
    "mock_response": "requests go to the backend",
    "context_window": "write `max_input_tokens` into model_info",
    **dict.fromkeys(("rpm_limit", "tpm_limit"), "of a deployment it is `rpm` or `tpm`"),
    **dict.fromkeys(("extra_headers", "headers", "organization"), "a backend is sent its key and the client's headers"),
}
#: All that Anthropic has.
_CLAUDE = "claude-*"
#: A variable as shells and Docker Compose have it, and LiteLLM does not.
_VARIABLE = re.compile(r"\$\{?([A-Za-z_][A-Za-z0-9_]*)\}?")
#: How Azure's clients are known where they have no key.
_ENTRA = ("azure_ad_token", "tenant_id", "client_id", "azure_username")


class Deployments:
    """Makes backends of the deployments in one file.

    Args:
        source: The file; its variables are known.
        describer: Knows what models cost and can do.
    """

    def __init__(self, source: ForeignFile, describer: Describer) -> None:
        self._source = source
        self._describer = describer
        self._credentials = self._named_credentials()

    def backends(self, place: Place, name: str) -> list[tuple[str, dict[str, Any]]]:
        """The backends of one deployment, in our format, each with the model name that it serves, mostly its own.

        None for one that cannot be served, which is then listed.

        Args:
            place: Of the deployment.
            name: Its `model_name`.
        """
        source = self._source
        parameters: Place = (*place, "litellm_params")
        if source.kind(parameters, dict, "a mapping of parameters") is None:
            if source.peek(parameters) is None:
                source.problem(place, "litellm_params is missing; add it")
            return []
        model = source.text((*parameters, "model"))
        if not model:
            if source.peek((*parameters, "model")) in (None, ""):
                source.problem(parameters, "model is missing; add it")
            return []
        if model == "*":
            return self._all_backends(place, name)
        prefix, upstream = split(model, source.text((*parameters, "custom_llm_provider")))
        provider = provider_of(prefix, upstream)
        if provider is None:
            source.leave(
                place, f"{model[:60]!r} needs a protocol that is not spoken here; docs/gateway.md has those that are"
            )
            return []
        backend = self._backend(place, name, prefix, upstream, provider)
        return [] if backend is None else [(name, backend)]

    def _all_backends(self, place: Place, name: str) -> list[tuple[str, dict[str, Any]]]:
        """`*` by the name of `*`: of each provider whose key is set all that it lists, by names like `groq/llama`."""
        source = self._source
        parameters: Place = (*place, "litellm_params")
        if name != "*" or any(source.peek((*parameters, field)) for field in ("api_base", "base_url", "api_key")):
            source.leave(place, "`*` is any model of any provider; write one deployment each, as of `openai/*`")
            return []
        having = [prefix for prefix in OF_ANY if any(source.lookup(key) for key in PROVIDERS[prefix].keys)]
        if not having:
            source.leave(place, "`*` is any model of the providers whose keys are set; export OPENAI_API_KEY, say")
            return []
        source.leave(
            (*parameters, "model"),
            f"all that {', '.join(having)} list, by names like {having[0]}/NAME; write one deployment each for others",
        )
        served = [(f"{prefix}/*", prefix) for prefix in having]
        # LiteLLM knows these two by their models' names alone, too.
        served += [("*", prefix) for prefix in ("openai", "anthropic") if prefix in having]
        found = [(pattern, self._backend(place, pattern, prefix, "*", PROVIDERS[prefix])) for pattern, prefix in served]
        return [(pattern, backend) for pattern, backend in found if backend is not None]

    def _backend(
        self, place: Place, name: str, prefix: str, upstream: str, provider: Provider
    ) -> dict[str, Any] | None:
        """One backend; None for one that cannot be served, which is then listed."""
        source = self._source
        parameters: Place = (*place, "litellm_params")
        if (unset := self._unset(parameters, provider)) is not None:
            # LiteLLM serves the others; files with a dozen providers are shared by people who have two keys.
            source.leave(place, f"the variable {unset[:60]} is not set; export it")
            return None
        if provider.azure:
            source.raw((*parameters, "api_version"))  # that API has none
        found = self._address(place, parameters, prefix, upstream, provider)
        if found is None:
            return None
        address, below_v1 = found
        own = prefix == "anthropic" and same_host(address, provider.base or "")
        if own and upstream == _CLAUDE and name.endswith(_CLAUDE):
            # Anthropic lists no others; another server of its protocol may.
            name, upstream = name.removesuffix(_CLAUDE) + "*", "*"
        wildcard = "*" in name or "*" in upstream
        lists = not provider.closed and not provider.azure
        if wildcard and (upstream != "*" or name.find("*") != len(name) - 1 or not lists):
            source.leave(
                place, "a wildcard is understood only as `*` or `NAME/*` for all that a server lists by its names"
            )
            return None
        backend = {
            "url": address,
            "below_v1": below_v1,
            "protocol": provider.protocol,
            "health_path": None,
            "zone": zone(address),
            "models": {} if wildcard else {name: upstream},
            "prefix": name[:-1] if wildcard else "",
            **self._key(parameters, provider),
            **self._limits(place),
            "drop_unknown": self._drops(parameters) if provider.protocol == "anthropic" else None,
            "defaults": self._defaults(parameters, provider) or None,
            "read_timeout_seconds": source.number((*parameters, "timeout"), 0, 86_400)
            or source.number((*parameters, "request_timeout"), 0, 86_400)
            or None,
            "region": source.text((*parameters, "region_name")),
            **self._describer.describe(place, name, prefix, upstream),
            "info": self._info((*place, "model_info")) or None,
        }
        backend = {field: value for field, value in backend.items() if value is not None or field == "health_path"}
        try:
            RemoteBackend.model_validate(backend)
        except ValidationError as error:
            for details in error.errors():
                source.problem(
                    parameters, f"{details['loc'][0] if details['loc'] else 'deployment'}: {in_words(details)}"
                )
            return None
        return backend

    def _named_credentials(self) -> dict[str, Place]:
        """`credential_list`: keys and addresses that several deployments share."""
        source = self._source
        source.kind(("credential_list",), list, "a list of credentials")
        found: dict[str, Place] = {}
        for index in source.keys(("credential_list",)):
            place: Place = ("credential_list", index)
            name = source.text((*place, "credential_name"))
            source.raw((*place, "credential_info"))
            values = (*place, "credential_values")
            if name is not None and source.kind(values, dict, "a mapping of values") is not None:
                found[name] = values
        return found

    def _at(self, parameters: Place, field: str) -> Place:
        """Where a deployment's parameter stands: with it, else in the credentials that it names."""
        source = self._source
        name = source.peek((*parameters, "litellm_credential_name"))
        shared = self._credentials.get(name) if isinstance(name, str) else None
        if shared is None or source.peek((*parameters, field)) is not None:
            return (*parameters, field)
        source.raw((*parameters, "litellm_credential_name"))
        return (*shared, field)

    def _unset(self, parameters: Place, provider: Provider) -> str | None:
        """A variable that a deployment needs, for its address or key, and that is not set."""
        source = self._source
        named = [source.variable(self._at(parameters, field)) for field in ("api_base", "base_url")]
        if not provider.local:
            named.append(source.variable(self._at(parameters, "api_key")))
        usual = self._usual_keys(parameters, provider)
        if usual and not provider.local and not any(source.lookup(name) for name in usual):
            named.append(usual[0])
        named += provider.inside_base
        return next((name for name in named if name is not None and source.lookup(name) is None), None)

    def _usual_keys(self, parameters: Place, provider: Provider) -> tuple[str, ...]:
        """The variables that may hold the key of a deployment that states none."""
        source = self._source
        if source.peek(self._at(parameters, "api_key")) not in (None, ""):
            return ()
        # A provider's key is not sent to an address that may be anybody's; Azure's are looked at.
        elsewhere = source.peek(self._at(parameters, "api_base")) or source.peek(self._at(parameters, "base_url"))
        return () if elsewhere and not provider.local and not provider.azure else provider.keys

    def _address(
        self, place: Place, parameters: Place, prefix: str, upstream: str, provider: Provider
    ) -> tuple[str, bool] | None:
        """Where the server is, and whether its paths have `/v1`; None where it cannot be asked, which is then told."""
        source = self._source
        stated = [source.text(self._at(parameters, field)) for field in ("api_base", "base_url")]
        address = next((one for one in stated if one), None)
        base = provider.base and provider.base.format_map({name: source.lookup(name) for name in provider.inside_base})
        if provider.closed and address is not None:
            # On the same host stands what is spoken to, too.
            if base is None or not same_host(address, base):
                source.leave(place, f"its api_base speaks another protocol; of {prefix} only {base} is spoken to")
                return None
            address = None
        address = address or next((one for name in provider.bases if (one := source.lookup(name))), base)
        if address is None:
            source.leave(place, f"{prefix} needs the server's address; add api_base")
            return None
        found = served_at(provider, address) if "://" in address else None
        if "://" not in address:
            name = _VARIABLE.fullmatch(address)
            remedy = f"; write os.environ/{name[1]}" if name else ""
            source.leave(place, f"its api_base {address[:60]!r} is no http(s)://host[:port][/prefix]{remedy}")
        elif found is None:
            source.leave(place, f"its api_base {address[:60]!r} is no https://NAME.openai.azure.com of Azure's")
        elif provider.azure and any(source.peek((*parameters, field)) for field in _ENTRA):
            source.leave(place, "nobody signs in with Entra ID here; state an api_key instead")
            return None
        elif upstream.startswith(provider.lacks):
            source.leave(place, f"{upstream[:60]!r} has no counterpart in {prefix}'s API of OpenAI's protocol")
            return None
        return found

    def _key(self, parameters: Place, provider: Provider) -> dict[str, Any]:
        """The backend's key: as the file says, else the provider's usual variable."""
        source = self._source
        place = self._at(parameters, "api_key")
        variable = source.variable(place)
        if variable is not None and source.lookup(variable) is None:
            source.leave(place, f"the variable {variable[:60]} is not set; nothing is sent as a key")
            return {}
        key = None if variable is not None else source.text(place)
        if variable is not None:
            source.raw(place)
        elif not key:
            variable = next((name for name in self._usual_keys(parameters, provider) if source.lookup(name)), None)
        if variable is None:
            return {"api_key": key} if key else {}
        inside = source.inside(variable)
        return {"api_key": inside} if inside else {"api_key_env": variable}

    def _defaults(self, parameters: Place, provider: Provider) -> dict[str, Any]:
        """Fields of requests that the file gives to those that lack them."""
        source = self._source
        found: dict[str, Any] = {}
        source.kind((*parameters, "extra_body"), dict, "a mapping of fields")
        places = [
            *((field,) for field in _DEFAULTS),
            *(("extra_body", key) for key in source.keys((*parameters, "extra_body"))),
        ]
        for inside in places:
            place, name = (*parameters, *inside), str(inside[-1])
            if source.peek(place) is None:
                continue
            if name in NEVER or (provider.protocol == "anthropic" and name not in _OF_ANTHROPIC):
                source.leave(
                    place, "clients say it themselves" if name in NEVER else "Anthropic's API does not know it"
                )
            elif name in LENGTHS:
                found[name] = source.whole(place, 1, 10**9)
            else:
                found[name] = source.raw(place) if source.variable(place) is None else source.text(place)
        for field, reason in _PARAMETER_REASONS.items():
            stated = source.peek((*parameters, field))
            if stated is False:
                source.raw((*parameters, field))
            elif stated is not None:
                source.leave((*parameters, field), reason)
        return {name: value for name, value in found.items() if value is not None}

    def _info(self, place: Place) -> dict[str, Any]:
        """What a deployment tells clients of its model that nothing here goes by."""
        source = self._source
        return {
            name: source.raw((*place, name))
            for name in source.keys(place)
            if name not in _READ and not name.startswith(_MEANS_SOMETHING) and source.variable((*place, name)) is None
        }

    def _drops(self, parameters: Place) -> bool:
        own = self._source.flag((*parameters, "drop_params"))
        stated = self._source.peek((*parameters, "drop_params")) is not None
        return own if stated else self._source.flag(("litellm_settings", "drop_params"))

    def _limits(self, place: Place) -> dict[str, Any]:
        source = self._source
        parameters: Place = (*place, "litellm_params")
        source.number((*parameters, "weight"), 0, 1e9)
        source.number((*parameters, "order"), -1e9, 1e9)
        return {
            "requests_per_minute": self._limit(place, "rpm", 10**9),
            "tokens_per_minute": self._limit(place, "tpm", 10**12),
            "max_concurrency": source.whole((*parameters, "max_parallel_requests"), 1, 10**6)
            or source.whole(("general_settings", "max_parallel_requests"), 1, 10**6)
            or source.whole(("router_settings", "default_max_parallel_requests"), 1, 10**6),
        }

    def _limit(self, place: Place, name: str, most: int) -> int | None:
        """What LiteLLM reads at any of three places, the more important first."""
        places = ((*place, "litellm_params", name), (*place, name), (*place, "model_info", name))
        return next((found for found in [self._source.whole(at, 1, most) for at in places] if found is not None), None)


def in_words(details: ErrorDetails) -> str:
    """pydantic's problem in words, without the value: it may be a key."""
    return str(details["ctx"]["error"]) if details["type"] == "value_error" else details["msg"].lower()
