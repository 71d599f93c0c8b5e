"""What becomes of one deployment of a LiteLLM file: its provider, address, key, limits, share of the load."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.gateway.litellm_files import backends, convert, model, no_cost_map  # noqa: F401
from tokenmill.engine.gateway.balance import Balancer
from tokenmill.engine.gateway.config import Server
from tokenmill.engine.gateway.litellm_providers import OF_ANY, PROVIDERS
from tokenmill.engine.gateway.portfolio import Portfolio
from tokenmill.engine.gateway.settings import Settings
from tokenmill.engine.gateway.upstream import Origin
from tokenmill.engine.supervisor.plan import make_plan


@pytest.mark.parametrize(
    ("said", "url", "own"),
    [
        ("openai/gpt-4o", "https://api.openai.com/v1", "gpt-4o"),
        ("gpt-4o", "https://api.openai.com/v1", "gpt-4o"),
        ("whisper-1", "https://api.openai.com/v1", "whisper-1"),
        ("dall-e-3", "https://api.openai.com/v1", "dall-e-3"),
        ("claude-3-haiku-20240307", "https://api.anthropic.com", "claude-3-haiku-20240307"),
        ("groq/llama-3.1-8b", "https://api.groq.com/openai/v1", "llama-3.1-8b"),
        ("openrouter/meta/llama-3", "https://openrouter.ai/api/v1", "meta/llama-3"),
        ("gemini/gemini-2.5-pro", "https://generativelanguage.googleapis.com/v1beta/openai", "gemini-2.5-pro"),
        ("cohere_chat/command-r", "https://api.cohere.ai/compatibility/v1", "command-r"),
        ("openai/responses/gpt-5", "https://api.openai.com/v1", "gpt-5"),
        ("voyage/voyage-3", "https://api.voyageai.com/v1", "voyage-3"),
        ("featherless_ai/org/m", "https://api.featherless.ai/v1", "org/m"),
        ("xinference/bge", "http://127.0.0.1:9997/v1", "bge"),
        ("cloudflare/@cf/meta/m", "https://api.cloudflare.com/client/v4/accounts/acct/ai/v1", "@cf/meta/m"),
        (
            "cloudflare/@cf/m, api_base: 'https://api.cloudflare.com/client/v4/accounts/acct/ai/run/'",
            "https://api.cloudflare.com/client/v4/accounts/acct/ai/v1",
            "@cf/m",
        ),
        (
            "gemini/g, api_base: 'https://generativelanguage.googleapis.com/v1beta'",
            "https://generativelanguage.googleapis.com/v1beta/openai",
            "g",
        ),
    ],
)
def test_providers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, url: str, own: str) -> None:
    monkeypatch.setenv("CLOUDFLARE_ACCOUNT_ID", "acct")
    config = convert(tmp_path, "model_list:\n" + model("m", f"model: {said}, api_key: k")).config
    (backend,) = backends(config, "m")
    assert (backend.url, backend.models) == (url, {"m": own})


@pytest.mark.parametrize(
    ("said", "asked"),
    [
        ("openai/m, api_base: 'http://h:1'", "/v1/chat/completions"),
        ("openai/m, api_base: 'http://h:1/v1/'", "/v1/chat/completions"),
        ("openai/m, api_base: 'http://h:1/v1/chat/completions'", "/v1/chat/completions"),
        ("openai/m, api_base: 'http://h:1/inference/'", "/inference/chat/completions"),
        ("hosted_vllm/m, api_base: 'http://h:1/serving-endpoints'", "/serving-endpoints/chat/completions"),
        ("openai/m, api_base: 'https://models.inference.ai.azure.com'", "/chat/completions"),
        ("perplexity/sonar", "/chat/completions"),
        ("databricks/m, api_base: 'https://adb.example/serving-endpoints'", "/serving-endpoints/chat/completions"),
        ("clarifai/m", "/v2/ext/openai/v1/chat/completions"),
        ("ai21_chat/jamba", "/studio/v1/chat/completions"),
        ("github/m, api_base: 'https://models.github.ai/inference'", "/inference/chat/completions"),
        ("huggingface/tgi, api_base: 'http://h:1'", "/v1/chat/completions"),
        ("docker_model_runner/m", "/engines/llama.cpp/v1/chat/completions"),
        ("volcengine/m", "/api/v3/chat/completions"),
        ("ollama/m, api_base: 'http://h:1/ollama'", "/ollama/v1/chat/completions"),
        ("anthropic/m, api_base: 'http://h:1/zen/v1/messages'", "/zen/v1/messages"),
        ("anthropic/m, api_base: 'http://h:1/zen'", "/zen/v1/messages"),
        ("azure_ai/claude-x, api_base: 'https://name.services.ai.azure.com'", "/anthropic/v1/messages"),
        ("azure_ai/claude-x, api_base: 'https://name.services.ai.azure.com/anthropic/'", "/anthropic/v1/messages"),
        ("azure/m, api_base: 'https://name.openai.azure.com/'", "/openai/v1/chat/completions"),
        ("azure/m, api_base: 'https://name.openai.azure.com/openai/deployments/m'", "/openai/v1/chat/completions"),
        ("azure_ai/m, api_base: 'https://name.services.ai.azure.com/models'", "/openai/v1/chat/completions"),
    ],
)
def test_paths_are_those_that_litellm_asks_for(tmp_path: Path, said: str, asked: str) -> None:
    """Of an address without a path LiteLLM asks for no `/v1`; few servers have none, and many have nothing else."""
    imported = convert(tmp_path, "model_list:\n" + model("m", f"model: {said}, api_key: k"))
    (remote,) = make_plan(imported.config).remotes
    origin = Origin.of(remote.root, remote.has_version)
    path = "/v1/messages" if remote.protocol == "anthropic" else "/v1/chat/completions"
    assert origin.prefix.decode() + (path.removeprefix("/v1") if origin.has_version else path) == asked


def test_azures_own_resources_are_asked_by_their_v1_api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_API_KEY", "azure")
    base = "api_base: 'https://name.openai.azure.com', api_version: 2024-02-01"
    text = "model_list:\n" + "".join(
        model(name, said)
        for name, said in (
            ("a", f"model: azure/gpt5_series/own-name, {base}"),
            ("b", f"model: azure/x, {base}, tenant_id: t"),
            ("c", "model: azure/x, api_base: 'https://apim.example.com', api_key: k"),
            ("d", "model: azure_ai/cohere-rerank-v3, api_base: 'https://n.services.ai.azure.com', api_key: k"),
            ("e", "model: cohere/rerank-v3, api_key: k"),
            ("f", "model: gemini/x, api_base: 'http://h/v1beta', api_key: k"),
        )
    )
    imported = convert(tmp_path, text)
    assert list(imported.config.tiers) == ["a"]
    (backend,) = backends(imported.config, "a")
    assert (backend.models, backend.api_key_env, backend.zone) == ({"a": "own-name"}, "AZURE_API_KEY", "cloud")
    said = [reason for line in imported.left_out if (reason := line.partition(" is left out; ")[2])]
    words = (
        "Entra ID",
        "is no https://NAME.openai.azure.com",
        "'cohere-rerank-v3'",
        "'rerank-v3'",
        "speaks another protocol",
    )
    assert all(word in reason for word, reason in zip(words, said, strict=True))


def test_what_lacks_a_variable_is_left_out_as_others_are_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files that name a dozen providers are shared by people who have two of the keys."""
    monkeypatch.delenv("CLOUDFLARE_ACCOUNT_ID", raising=False)
    text = "model_list:\n" + "".join(
        model(name, said)
        for name, said in (
            ("a", "model: openai/x, api_base: 'http://h/v1', api_key: ''"),
            ("b", "model: groq/x"),
            ("c", "model: openai/x, api_key: os.environ/TM_UNSET"),
            ("d", "model: ollama/x, api_base: os.environ/TM_UNSET"),
            ("e", "model: hosted_vllm/x, api_base: 'http://h/v1', api_key: os.environ/TM_UNSET"),
            ("f", "model: azure/x, api_key: k"),
            ("g", "model: cloudflare/x, api_key: k"),
        )
    )
    imported = convert(tmp_path, text + "router_settings: {fallbacks: [{a: [b, e]}]}\n")
    assert list(imported.config.tiers) == ["a", "e"]
    assert imported.config.tiers["a"].fallbacks == ["e"]
    assert [(one.api_key, one.api_key_env) for name in "ae" for one in backends(imported.config, name)] == [
        (None, None),
        (None, None),
    ]
    found = [line.partition(".yaml:")[2] for line in imported.left_out]
    assert found[:3] == [
        "3: model_list[1]: 'b' is left out; the variable GROQ_API_KEY is not set; export it",
        "4: model_list[2]: 'c' is left out; the variable TM_UNSET is not set; export it",
        "5: model_list[3]: 'd' is left out; the variable TM_UNSET is not set; export it",
    ]
    assert found[4] == "7: model_list[5]: 'f' is left out; azure needs the server's address; add api_base"
    assert found[5] == "8: model_list[6]: 'g' is left out; the variable CLOUDFLARE_ACCOUNT_ID is not set; export it"
    assert found[3].startswith("6: model_list[4].litellm_params.api_key: the variable TM_UNSET is not set; nothing is")


def test_requests_get_what_a_deployment_says_and_they_do_not(tmp_path: Path) -> None:
    extra = "extra_body: {chat_template_kwargs: {enable_thinking: false}, model: x}"
    text = "model_list:\n" + "".join(
        model(name, said)
        for name, said in (
            ("a", f"model: openai/x, temperature: 0.2, max_tokens: '256', stop: [END], cooldown_time: 1, {extra}"),
            ("b", "model: anthropic/x, api_key: k, thinking: {type: enabled, budget_tokens: 1024}, seed: 1"),
            ("c", "model: ollama/x, num_ctx: 8192"),
        )
    )
    imported = convert(tmp_path, text)
    assert [backends(imported.config, name)[0].defaults for name in "abc"] == [
        {
            "temperature": 0.2,
            "stop": ["END"],
            "max_tokens": 256,
            "chat_template_kwargs": {"enable_thinking": False},
        },
        {"thinking": {"type": "enabled", "budget_tokens": 1024}},
        {},
    ]
    left = [line.partition("litellm_params.")[2].partition(":")[0] for line in imported.left_out]
    assert sorted(left) == ["cooldown_time", "extra_body.model", "num_ctx", "seed"]


def test_a_deployment_may_be_silent_as_long_as_it_says(tmp_path: Path) -> None:
    text = "model_list:\n" + "".join(
        model(name, f"model: openai/x{said}")
        for name, said in (("a", ", timeout: 12.5, stream_timeout: 30"), ("b", ", request_timeout: 9"), ("c", ""))
    )
    imported = convert(tmp_path, text + "router_settings: {timeout: 60}\n")
    plan = make_plan(imported.config)
    assert [one.read_timeout_s for one in plan.remotes] == [12.5, 9, None]
    assert plan.settings().read_timeout_s == 60
    (line,) = imported.left_out
    assert "stream_timeout: `timeout` is the longest silence of streams, too" in line


def test_anthropics_api_is_not_sent_what_it_does_not_know(tmp_path: Path) -> None:
    text = "model_list:\n" + "".join(
        model(name, f"model: {said}, api_key: k")
        for name, said in (("a", "anthropic/x"), ("b", "anthropic/x, drop_params: false"), ("c", "openai/x"))
    )
    for general, drops in (("", [False] * 3), ("litellm_settings: {drop_params: true}\n", [True, False, False])):
        imported = convert(tmp_path, text + general)
        assert (make_plan(imported.config).remotes[0].drop_unknown, len(imported.left_out)) == (
            drops[0],
            any(drops),
        )
        assert [backends(imported.config, name)[0].drop_unknown for name in "abc"] == drops


def test_keys_of_ones_own_servers_come_from_their_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOSTED_VLLM_API_KEY", "own")
    monkeypatch.setenv("FIREWORKSAI_API_KEY", "third")
    text = model("a", "model: hosted_vllm/x, api_base: 'http://h/v1'") + model("b", "model: fireworks_ai/x")
    config = convert(tmp_path, "model_list:\n" + text).config
    assert [backends(config, name)[0].api_key_env for name in "ab"] == ["HOSTED_VLLM_API_KEY", "FIREWORKSAI_API_KEY"]


def test_one_server_may_serve_all_that_it_lists(tmp_path: Path) -> None:
    config = convert(tmp_path, "model_list:\n" + model("*", "model: 'openai/*', api_base: http://h/v1")).config
    assert backends(config, "all")[0].models == {}


def test_a_provider_may_serve_all_that_it_lists(tmp_path: Path) -> None:
    text = "model_list:\n" + "".join(
        model(name, f"model: {said!r}, api_key: k")
        for name, said in (
            ("openai/*", "openai/*"),
            ("fast/*", "groq/*"),
            ("anthropic/*", "anthropic/*"),
            ("gemini/*", "gemini/*"),
            ("gpt-*", "openai/gpt-*"),
            ("*/x", "openai/*"),
            ("one", "openai/*"),
        )
    )
    imported = convert(tmp_path, text)
    assert list(imported.config.tiers) == ["openai", "fast", "anthropic"]
    assert [backends(imported.config, name)[0].models for name in imported.config.tiers] == [{}, {}, {}]
    assert len(imported.left_out) == 4
    assert all("a wildcard is understood only" in line for line in imported.left_out)
    assert [backend.prefix for backend in make_plan(imported.config).remotes] == ["openai/", "fast/", "anthropic/"]


def test_any_model_is_what_the_providers_list_whose_keys_are_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {key for prefix in OF_ANY for key in PROVIDERS[prefix].keys}
    for key in keys:
        monkeypatch.delenv(key, raising=False)
    text = "model_list:\n" + model("own", "model: openai/x, api_key: k") + model("*", "model: '*', rpm: 9")
    imported = convert(tmp_path, text)
    assert list(imported.config.tiers) == ["own"]
    assert "'*' is left out; `*` is any model of the providers whose keys are set" in imported.left_out[0]
    for key in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY", "GROQ_API_KEY"):
        monkeypatch.setenv(key, key)
    imported = convert(tmp_path, text)
    assert list(imported.config.tiers) == ["own", "openai", "anthropic", "groq", "all"]
    found = [(one.prefix, one.base_url, one.api_key) for one in make_plan(imported.config).remotes[1:]]
    assert found == [
        ("openai/", "https://api.openai.com/v1", "OPENAI_API_KEY"),
        ("anthropic/", "https://api.anthropic.com", "ANTHROPIC_API_KEY"),
        ("groq/", "https://api.groq.com/openai/v1", "GROQ_API_KEY"),
        ("", "https://api.openai.com/v1", "OPENAI_API_KEY"),
        ("", "https://api.anthropic.com", "ANTHROPIC_API_KEY"),
    ]
    (line,) = imported.left_out
    assert ":3: model_list[1].litellm_params.model: all that openai, anthropic, groq list, by names like" in line


def test_all_of_anthropics_models_are_called_claude(tmp_path: Path) -> None:
    text = "model_list:\n" + "".join(
        model(name, "model: 'anthropic/claude-*', api_key: k") for name in ("claude-*", "anthropic/claude-*", "big/*")
    )
    imported = convert(tmp_path, text)
    assert [one.prefix for one in make_plan(imported.config).remotes] == ["", "anthropic/"]
    (line,) = imported.left_out
    assert "'big/*' is left out; a wildcard is understood only as" in line


def test_another_server_of_anthropics_protocol_may_list_other_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = model("claude-*", "model: 'anthropic/claude-*', api_key: k, api_base: 'http://proxy:4000'")
    text = "model_list:\n" + model("m", "model: openai/m, api_key: k") + other
    imported = convert(tmp_path, text)
    assert list(imported.config.tiers) == ["m"]
    assert "'claude-*' is left out; a wildcard" in imported.left_out[0]
    monkeypatch.setenv("ANTHROPIC_BASE_URL", "http://proxy:4000")
    assert list(convert(tmp_path, text.replace(", api_base: 'http://proxy:4000'", "")).config.tiers) == ["m"]


def test_a_models_limit_goes_before_that_of_all(tmp_path: Path) -> None:
    rest = "general_settings: {max_parallel_requests: 5, max_request_size_mb: 2}"
    for own, general, most in (("", "", None), ("", rest, 5), (", max_parallel_requests: 3", rest, 3)):
        listed = model("m", f"model: openai/m, api_base: 'http://b/v1'{own}")
        config = convert(tmp_path, "model_list:\n" + listed + general).config
        size = 2 if general else Server().max_body_mb
        assert (backends(config, "m")[0].max_concurrency, config.server.max_body_mb) == (most, size)


def test_weights_come_from_weight_then_rpm_where_all_state_it(tmp_path: Path) -> None:
    text = "model_list:\n" + "".join(
        model(name, f"model: openai/x, api_key: k, {rest}")
        for name, rest in (
            *(("a", "rpm: 10, tpm: 5"), ("a", "rpm: 30"), ("b", "tpm: 2, rpm: 9"), ("b", "rpm: 3"), ("b", "rpm: 3")),
            *(("c", "rpm: 3"), ("c", "tpm: 3"), ("d", "weight: 0"), ("d", "weight: 0")),
        )
    )
    config = convert(tmp_path, text).config
    weights = {name: [backend.weight for backend in tier.backends] for name, tier in config.tiers.items()}
    assert weights == {"a": [10, 30], "b": [9, 3, 3], "c": [1, 1], "d": [1, 1]}


@pytest.mark.parametrize("other", ["weight: 0", "weight: 0.0, rpm: 3", "rpm: 3", "timeout: 5"])
def test_beside_a_weight_none_means_nothing_as_in_litellm(tmp_path: Path, other: str) -> None:
    text = "model_list:\n" + "".join(
        model("a", f"model: openai/x, api_key: k, {rest}") for rest in (other, "weight: 2, rpm: 9", "weight: 0.5")
    )
    spare, *others = [backend.weight for backend in convert(tmp_path, text).config.tiers["a"].backends]
    assert others == [2, 0.5]
    text = text.replace("weight: 0.5", "weight: 1e-320")
    assert convert(tmp_path, text).config.tiers["a"].backends[0].weight > 0
    assert 0 < spare < 1e-8


def test_limits_stand_at_any_of_three_places(tmp_path: Path) -> None:
    listed = "model_list:\n" + "".join(
        model("a", f"model: openai/x{said}", more)
        for said, more in (
            ("", ", rpm: 3, model_info: {tpm: 7, rpm: 4}"),
            (", rpm: 2", ", rpm: 3"),
            (", tpm: 5", ", model_info: {rpm: 4}"),
        )
    )
    imported = convert(tmp_path, listed)
    found = [(one.requests_per_minute, one.tokens_per_minute) for one in imported.config.tiers["a"].backends]
    assert (found, imported.left_out) == ([(3, 7), (2, None), (4, 5)], ())


def test_what_a_model_is_said_to_be_is_told(tmp_path: Path) -> None:
    info = "model_info: {id: x, description: fast, supports_reasoning: true, mode: tts, access_groups: [beta]}"
    imported = convert(tmp_path, "model_list:\n" + model("a", "model: openai/x", f", {info}"))
    assert make_plan(imported.config).remotes[0].info == {
        "id": "x",
        "description": "fast",
        "supports_reasoning": True,
        "mode": "tts",
    }
    left = [line.partition("model_info.")[2].partition(":")[0] for line in imported.left_out]
    assert left == ["access_groups"]


def test_a_higher_order_gets_what_the_lower_cannot_take(tmp_path: Path) -> None:
    """Such files put what is free first; what is dear gets nothing as long as that can take it."""
    text = "model_list:\n" + "".join(
        model("a", f"model: openai/x, {rest}")
        for rest in ("order: 90", "order: 1, weight: 3", "order: 1, weight: 1", "rpm: 1", "order: 2, weight: 1")
    )
    imported = convert(tmp_path, text + model("b", "model: openai/x, order: 1"))
    third, first, second, last, behind = [one.weight for one in imported.config.tiers["a"].backends]
    assert (first, second, imported.config.tiers["b"].backends[0].weight) == (3, 1, 1)
    assert 1e-10 < behind < 1e-8
    assert 0 < third < behind * 1e-8
    assert 0 < last < third
    assert not imported.left_out
    drawn = Balancer()
    portfolio = Portfolio(make_plan(imported.config).remotes, Settings())
    exchange = SimpleNamespace(body=None, principal=None, key=None, model="a", fields={})
    (route,) = portfolio.routes("a")
    cheap = [drawn.choose(route, exchange) for _ in range(50)]  # type: ignore[arg-type]
    assert {one.backend.name for one in cheap if one is not None} == {"a-2", "a-3"}
    assert drawn.choose(route, exchange, route.targets[1:3]).backend.name == "a-5"  # type: ignore[arg-type, union-attr]


def test_addresses_and_keys_come_from_the_usual_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_BASE", "http://10.0.0.1/v1")
    monkeypatch.setenv("ANTHROPIC_BASE_URL", "http://10.0.0.2")
    text = "environment_variables: {OPENAI_API_KEY: sk-inside, OLLAMA_API_BASE: 'http://10.0.0.3'}\nmodel_list:\n"
    text += "".join(
        model(f"m{number}", said)
        for number, said in enumerate(
            (
                *("model: openai/x", "model: openai/x, api_base: http://h/v1", "model: anthropic/x, api_key: k"),
                *("model: ollama/x", "model: groq/x, api_key: k"),
            )
        )
    )
    config = convert(tmp_path, text).config
    found = [backends(config, f"m{number}")[0] for number in range(5)]
    assert [backend.url for backend in found] == [
        *("http://10.0.0.1/v1", "http://h/v1", "http://10.0.0.2", "http://10.0.0.3"),
        "https://api.groq.com/openai/v1",
    ]
    assert [backend.api_key for backend in found] == ["sk-inside", None, "k", None, "k"]
