"""LiteLLM's files: what they say is what is served, what is not understood is listed, what is wrong is one line."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenmill import env
from tokenmill.engine.gateway import litellm, litellm_prices, yaml_file
from tokenmill.engine.gateway.balance import Balancer
from tokenmill.engine.gateway.config import Config, RemoteBackend, Server
from tokenmill.engine.gateway.governance.options import digest
from tokenmill.engine.gateway.portfolio import Portfolio
from tokenmill.engine.gateway.settings import Settings
from tokenmill.engine.gateway.upstream import Origin
from tokenmill.engine.supervisor import arguments
from tokenmill.engine.supervisor.main import main
from tokenmill.engine.supervisor.plan import make_plan
from tokenmill.errors import ConfigurationError

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "litellm.yaml"
FILES = Path(__file__).resolve().parents[1] / "data" / "litellm"
MASTER = "sk-0123456789abcdef0123456789"


@pytest.fixture(autouse=True)
def no_cost_map(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the file says is all that there is; test_litellm_prices.py is about the rest."""
    monkeypatch.delenv(env.LITELLM_PRICES.name, raising=False)
    monkeypatch.delenv(litellm_prices.URL_VARIABLE, raising=False)
    monkeypatch.setattr(litellm_prices, "installed", lambda: None)
    for name in (env.STORE.name, "LITELLM_MASTER_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-usual")


def convert(folder: Path, text: str) -> litellm.Imported:
    path = folder / "proxy.yaml"
    path.write_text(text, encoding="utf-8")
    return litellm.convert(yaml_file.read(path))


def model(name: str, parameters: str, more: str = "") -> str:
    return f"  - {{model_name: {name!r}, litellm_params: {{{parameters}}}{more}}}\n"


def backends(config: Config, tier: str) -> list[RemoteBackend]:
    found = config.tiers[tier].backends
    assert all(isinstance(backend, RemoteBackend) for backend in found)
    return found  # type: ignore[return-value]


def test_example_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY"):
        monkeypatch.setenv(name, "key")
    monkeypatch.setenv("LITELLM_MASTER_KEY", MASTER)
    request = arguments.parse([str(EXAMPLE)])
    left_out = [line.partition(": ")[2] for line in request.left_out]
    dropped = [line for line in left_out if line.startswith("litellm_settings.drop_params: not understood; used")]
    assert len(dropped) == 1
    config = request.config
    assert list(config.tiers) == ["chat", "gpt-4o", "claude"]
    assert config.tiers["chat"].fallbacks == ["gpt-4o", "claude"]
    first, second = backends(config, "chat")
    assert first.models == {"chat": "Qwen/Qwen3-8B-AWQ", "gpt-3.5-turbo": "Qwen/Qwen3-8B-AWQ"}
    assert (first.weight, second.weight, first.zone) == (2, 1, "on-premises")
    (cloud,) = backends(config, "gpt-4o")
    assert (cloud.requests_per_minute, cloud.tokens_per_minute, cloud.zone) == (480, 200_000, "cloud")
    assert (cloud.price.input, cloud.price.output, cloud.context_window) == (2.5, 10, 128_000)
    assert cloud.capabilities == ["tools", "vision"]
    (claude,) = backends(config, "claude")
    assert (claude.protocol, claude.url) == ("anthropic", "https://api.anthropic.com")
    settings_ = make_plan(config).settings()
    assert (settings_.most_retries, settings_.read_timeout_s) == (2, 120)
    assert (settings_.breaker_failures, settings_.breaker_cooldown_s) == (4, 30)


def test_check_says_what_became_of_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY"):
        monkeypatch.setenv(name, "key")
    monkeypatch.setenv("LITELLM_MASTER_KEY", MASTER)
    assert main(["--check", str(EXAMPLE)]) == 0
    shown = capsys.readouterr()
    assert (
        "tier gpt-4o: https://api.openai.com; gpt-4o; cloud; weight 1; 480 requests/min; 200000 tokens/min" in shown.out
    )
    assert "tier chat falls back to gpt-4o, claude" in shown.out
    assert f"{EXAMPLE}:45: litellm_settings.drop_params" in shown.err


def test_fallbacks_of_every_kind(tmp_path: Path) -> None:
    text = (
        "model_list:\n"
        + "".join(model(name, "model: openai/x, api_key: k") for name in ("a", "b", "c", "d"))
        + "router_settings:\n  fallbacks: [{a: [b, c]}]\n  max_fallbacks: 1\n  enable_pre_call_checks: true\n"
        + "  context_window_fallbacks: [{a: [c]}, {'*': [d]}]\n"
        + "  retry_policy: {TimeoutErrorRetries: 3}\n  allowed_fails_policy: {TimeoutErrorAllowedFails: 3}\n"
        + "litellm_settings:\n  content_policy_fallbacks: [{a: [d]}]\n  context_window_fallbacks: [{a: [b]}]\n"
        + "  default_fallbacks: [d]\n"
    )
    imported = convert(tmp_path, text)
    settings_ = make_plan(imported.config).settings()
    assert settings_.fallbacks == {"a": ("b",), "b": ("d",), "c": ("d",)}
    assert settings_.context_window_fallbacks == {"a": ("c",), "b": ("d",), "c": ("d",)}
    assert settings_.content_policy_fallbacks == {"a": ("d",)}
    left = [line.partition(": ")[2].partition(":")[0] for line in imported.left_out]
    assert left == [
        f"router_settings.{name}" for name in ("enable_pre_call_checks", "retry_policy", "allowed_fails_policy")
    ]


def test_allowed_failures_and_zeros_mean_what_they_mean_there(tmp_path: Path) -> None:
    models = "model_list:\n" + model("a", "model: openai/x, api_key: k")
    zeros = "router_settings: {allowed_fails: 0, cooldown_time: 0, timeout: 0, num_retries: 0}\n"
    imported = convert(tmp_path, models + zeros)
    server, usual = imported.config.server, Server()
    assert (server.breaker_failures, server.retries) == (1, 0)
    assert (server.breaker_cooldown_seconds, server.read_timeout_seconds) == (
        usual.breaker_cooldown_seconds,
        usual.read_timeout_seconds,
    )
    assert not imported.left_out
    assert convert(tmp_path, models + "litellm_settings: {allowed_fails: 3}\n").config.server.breaker_failures == 4


def test_what_is_not_understood_is_listed_and_nothing_else(tmp_path: Path) -> None:
    text = (
        "model_list:\n"
        + model("a", "model: openai/a, api_key: k, mock_response: hi, tags: [x]", ", model_info: {id: one, mode: chat}")
        + model("b", "model: bedrock/b, aws_region_name: r")
        + model("c/*", "model: 'gemini/*', api_key: k")
        + "router_settings:\n  routing_strategy: latency-based-routing\n  retry_policy: {TimeoutErrorRetries: 3}\n"
        + "litellm_settings: {success_callback: [langfuse], json_logs: true}\n"
        + "general_settings: {custom_auth: mine.check}\nguardrails:\n  - guardrail_name: pii\n"
    )
    imported = convert(tmp_path, text)
    assert imported.config.observability.request_log
    left = [line.removeprefix(f"{tmp_path}/proxy.yaml:") for line in imported.left_out]
    assert [line.partition(": not understood")[0] for line in left] == [
        "2: model_list[0].litellm_params.mock_response",
        "2: model_list[0].litellm_params.tags",
        "2: model_list[0].model_info.id",
        "3: model_list[1]",
        "4: model_list[2]",
        "6: router_settings.routing_strategy",
        "7: router_settings.retry_policy",
        "8: litellm_settings.success_callback",
        "9: general_settings.custom_auth",
        "10: guardrails",
    ]
    assert "without one everybody may ask" in left[-2]


@pytest.mark.parametrize("path", sorted(FILES.glob("*.yaml")), ids=lambda path: path.name)
def test_files_like_those_of_the_documentation_pass(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("TM_KEY", "OPENAI_API_KEY", "TM_YES"):
        monkeypatch.setenv(name, "yes")
    monkeypatch.setenv("TM_RPM", "10")
    monkeypatch.setenv("AZURE_BASE", "https://name.openai.azure.com")
    monkeypatch.setenv("AZURE_EU_KEY", "k")
    assert main(["--check", str(path)]) == 0, capsys.readouterr().err


def left_out(path: Path) -> dict[str, str]:
    """Field to reason."""
    found = litellm.convert(yaml_file.read(path)).left_out
    split = (line.partition(": not understood") for line in found)
    return {place.partition(": ")[2]: reason.removeprefix("; ") for place, _, reason in split}


def test_names_that_are_not_served_are_left_out_of_fallbacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    path = FILES / "fallbacks.yaml"
    config = litellm.convert(yaml_file.read(path)).config
    chat, long = config.tiers["chat"], config.tiers["long"]
    assert (chat.fallbacks, chat.context_window_fallbacks) == (["long"], ["long"])
    assert (long.fallbacks, chat.content_policy_fallbacks) == ([], ["long"])
    assert list(backends(config, "chat")[0].models) == ["chat", "gpt-4", "Chat"]
    assert config.server.default_model is None
    reasons = left_out(path)
    gone = "no deployment of 'zephyr' can be served"
    assert reasons["litellm_settings.fallbacks[0].zephyr"] == gone
    assert reasons["litellm_settings.fallbacks[1].chat[0]"] == gone
    assert reasons["litellm_settings.fallbacks[1].chat[1]"].startswith("only a wildcard stands for 'azure/gpt-4o'")
    assert reasons["litellm_settings.fallbacks[1].chat[2]"].startswith("'the-first-chat' is one deployment")
    assert "parameters of its own" in reasons["litellm_settings.content_policy_fallbacks[0].chat[0]"]
    assert reasons["litellm_settings.default_fallbacks[0]"] == gone
    assert reasons["router_settings.model_group_alias.small"] == gone
    assert reasons["general_settings.completion_model"] == gone


def test_values_come_from_the_environment_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("TM_KEY", "sk-x"), ("TM_YES", "true"), ("TM_RPM", "10")):
        monkeypatch.setenv(name, value)
    path = FILES / "environment.yaml"
    config = litellm.convert(yaml_file.read(path)).config
    first, second = backends(config, "fake")
    assert (first.url, second.url) == ("http://10.0.0.1:8000/v1", "http://10.0.0.2:8000/v1")
    assert (first.weight, second.weight, first.api_key_env, second.api_key_env) == (10, 30, "TM_KEY", "TM_KEY")
    assert config.observability.request_log
    assert make_plan(config).settings().most_retries == 4
    reasons = left_out(path)
    assert reasons["environment_variables.ARIZE_ENDPOINT"] == "the variable TM_NOWHERE is not set"
    assert reasons["environment_variables.REDIS_HOST"] == "nothing here reads this variable"
    assert "environment_variables.RETRIES" not in reasons
    assert not [place for place in reasons if place.startswith("credential_list")]


def test_files_are_included_as_litellm_does_it() -> None:
    imported = litellm.convert(yaml_file.read(FILES / "includes.yaml"))
    assert list(imported.config.tiers) == ["first", "second"]
    assert imported.config.tiers["first"].fallbacks == ["second"]
    # Lists are extended, other values are replaced.
    assert (make_plan(imported.config).settings().most_retries, imported.config.observability.request_log) == (1, False)
    assert [line.partition(": not")[0] for line in imported.left_out] == [
        f"{FILES}/parts/models.yaml:7: litellm_settings.set_verbose",
        f"{FILES}/parts/more.yaml:6: model_list[1].litellm_params.mock_response",
    ]


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("[nowhere.yaml]", "1: include[0]: there is no file '{}/nowhere.yaml'"),
        ("nowhere.yaml", "1: include: is not a list of file names"),
        ("[3]", "1: include: is not a list of file names"),
        (f"[{'x' * 5000}]", "1: include[0]: there is no file '{}/" + "x" * 5000 + "'"),
    ],
)
def test_an_include_that_is_none_is_one_line(tmp_path: Path, said: str, words: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        convert(tmp_path, f"include: {said}\n")
    assert str(caught.value) == f"{tmp_path}/proxy.yaml:" + words.format(tmp_path)


def test_a_file_of_settings_alone_is_known_as_litellms() -> None:
    for section in ("litellm_settings", "router_settings", "general_settings", "include", "model_list"):
        assert litellm.is_litellm({section: {}})
        assert not litellm.is_litellm({section: {}, "tiers": {}})


def test_litellms_variable_is_the_master_key_where_the_file_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "model_list:\n" + model("m", "model: openai/x, api_base: http://h/v1")
    assert convert(tmp_path, text).config.governance is None
    monkeypatch.setenv("LITELLM_MASTER_KEY", MASTER)
    options = make_plan(convert(tmp_path, text).config).governance
    assert options is not None and options.is_master(digest(MASTER))


def test_the_store_is_where_the_user_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (
        "model_list:\n"
        + model("m", "model: openai/x, api_base: http://h/v1")
        + f"general_settings: {{master_key: {MASTER}}}"
    )
    assert convert(tmp_path, text).config.governance.store == f"{tmp_path}/proxy.db"  # type: ignore[union-attr]
    # Whoever runs the tests may write everywhere.
    monkeypatch.setattr(litellm.os, "access", lambda *_: False)
    with pytest.raises(ConfigurationError) as caught:
        convert(tmp_path, text)
    assert str(caught.value).startswith(
        f"{tmp_path}/proxy.yaml:3: general_settings.master_key: keys and books would be "
    )
    assert f"set {env.STORE.name} to" in str(caught.value) and "\n" not in str(caught.value)
    for said in ("/elsewhere/books.db", "postgresql://user@host/books"):
        monkeypatch.setenv(env.STORE.name, said)
        assert convert(tmp_path, text).config.governance.store == said  # type: ignore[union-attr]
    monkeypatch.setenv(env.STORE.name, "postgresql://user:secret@host/books")
    with pytest.raises(ConfigurationError, match=f"{env.STORE.name}: the URL holds a password") as caught:
        convert(tmp_path, text)
    assert "secret" not in str(caught.value)


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
    ],
)
def test_providers(tmp_path: Path, said: str, url: str, own: str) -> None:
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
        ("github/m, api_base: 'https://models.github.ai/inference'", "/inference/chat/completions"),
        ("huggingface/tgi, api_base: 'http://h:1'", "/v1/chat/completions"),
        ("docker_model_runner/m", "/engines/llama.cpp/v1/chat/completions"),
        ("volcengine/m", "/api/v3/chat/completions"),
        ("ollama/m, api_base: 'http://h:1/ollama'", "/ollama/v1/chat/completions"),
        ("anthropic/m, api_base: 'http://h:1/zen/v1/messages'", "/zen/v1/messages"),
        ("anthropic/m, api_base: 'http://h:1/zen'", "/zen/v1/messages"),
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
            ("d", "model: azure_ai/claude-opus, api_base: 'https://n.services.ai.azure.com', api_key: k"),
            ("e", "model: cohere/rerank-v3, api_key: k"),
            ("f", "model: gemini/x, api_base: 'http://h/v1beta', api_key: k"),
        )
    )
    imported = convert(tmp_path, text)
    assert list(imported.config.tiers) == ["a"]
    (backend,) = backends(imported.config, "a")
    assert (backend.models, backend.api_key_env, backend.zone) == ({"a": "own-name"}, "AZURE_API_KEY", "cloud")
    reasons = dict(line.partition(": not understood; ")[::2] for line in imported.left_out)
    said = [reason for place, reason in reasons.items() if place.endswith("]")]
    words = (
        "Entra ID",
        "is no https://NAME.openai.azure.com",
        "'claude-opus'",
        "'rerank-v3'",
        "speaks another protocol",
    )
    assert all(word in reason for word, reason in zip(words, said, strict=True))


def test_what_lacks_a_variable_is_left_out_as_others_are_served(tmp_path: Path) -> None:
    """Files that name a dozen providers are shared by people who have two of the keys."""
    text = "model_list:\n" + "".join(
        model(name, said)
        for name, said in (
            ("a", "model: openai/x, api_base: 'http://h/v1', api_key: ''"),
            ("b", "model: groq/x"),
            ("c", "model: openai/x, api_key: os.environ/TM_UNSET"),
            ("d", "model: ollama/x, api_base: os.environ/TM_UNSET"),
            ("e", "model: hosted_vllm/x, api_base: 'http://h/v1', api_key: os.environ/TM_UNSET"),
            ("f", "model: azure/x, api_key: k"),
        )
    )
    imported = convert(tmp_path, text + "router_settings: {fallbacks: [{a: [b, e]}]}\n")
    assert list(imported.config.tiers) == ["a", "e"]
    assert imported.config.tiers["a"].fallbacks == ["e"]
    assert [(one.api_key, one.api_key_env) for name in "ae" for one in backends(imported.config, name)] == [
        (None, None),
        (None, None),
    ]
    found = [line.partition(".yaml:")[2].replace(": not understood", "") for line in imported.left_out]
    assert found[:3] == [
        "3: model_list[1]; the variable GROQ_API_KEY is not set; export it",
        "4: model_list[2]; the variable TM_UNSET is not set; export it",
        "5: model_list[3]; the variable TM_UNSET is not set; export it",
    ]
    assert found[4] == "7: model_list[5]; azure needs the server's address; add api_base"
    assert found[3].startswith("6: model_list[4].litellm_params.api_key; the variable TM_UNSET is not set; nothing is")


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
    assert "stream_timeout: not understood; `timeout` is the longest silence of streams, too" in line


def test_anthropics_api_is_not_sent_what_it_does_not_know(tmp_path: Path) -> None:
    text = "model_list:\n" + "".join(
        model(name, f"model: {said}, api_key: k")
        for name, said in (("a", "anthropic/x"), ("b", "anthropic/x, drop_params: false"), ("c", "openai/x"))
    )
    for general, drops in (("", [False] * 3), ("litellm_settings: {drop_params: true}\n", [True, False, False])):
        imported = convert(tmp_path, text + general)
        assert (make_plan(imported.config).remotes[0].drop_unknown, len(imported.left_out)) == (
            drops[0],
            1 + any(drops),
        )
        assert [backends(imported.config, name)[0].drop_unknown for name in "abc"] == drops


def test_names_that_are_nowhere_are_listed(tmp_path: Path) -> None:
    """LiteLLM serves such files; many have a fallback that was renamed, or is out-commented."""
    text = "model_list:\n" + model("a", "model: openai/a") + model("b", "model: openai/b")
    fields = ("fallbacks", "context_window_fallbacks", "content_policy_fallbacks")
    text += "router_settings:\n" + "".join(f"  {field}: [{{a: [z, b]}}, {{y: [b]}}]\n" for field in fields)
    text += "  model_group_alias: {c: x}\n  default_fallbacks: [w]\ngeneral_settings: {completion_model: v}\n"
    imported = convert(tmp_path, text)
    tier = imported.config.tiers["a"]
    assert [getattr(tier, field) for field in fields] == [["b"]] * 3
    assert imported.config.server.default_model is None
    reasons = [line.partition("; ")[2] for line in imported.left_out]
    assert reasons == [
        f"'{name}' is no model_name of this file; correct it, or add a deployment" for name in "zyzyzyxwv"
    ]


def test_keys_of_ones_own_servers_come_from_their_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOSTED_VLLM_API_KEY", "own")
    monkeypatch.setenv("FIREWORKSAI_API_KEY", "third")
    text = model("a", "model: hosted_vllm/x, api_base: 'http://h/v1'") + model("b", "model: fireworks_ai/x")
    config = convert(tmp_path, "model_list:\n" + text).config
    assert [backends(config, name)[0].api_key_env for name in "ab"] == ["HOSTED_VLLM_API_KEY", "FIREWORKSAI_API_KEY"]


def test_a_file_of_which_nothing_is_served_says_why_of_each(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError) as caught:
        convert(tmp_path, "model_list:\n" + model("a", "model: bedrock/x") + model("b", "model: vertex_ai/y"))
    first, second = str(caught.value).splitlines()
    assert first.endswith(
        ":2: model_list[0]: 'bedrock/x' needs a protocol that is not spoken here; docs/gateway.md has those that are"
    )
    assert ":3: model_list[1]: 'vertex_ai/y'" in second


def test_keys_come_from_the_environment_or_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TM_BASE", "http://10.0.0.1:8000/v1")
    monkeypatch.setenv("TM_OUTER", "sk-outer")
    text = "environment_variables: {INNER: sk-inner}\nmodel_list:\n" + "".join(
        model(name, f"model: openai/x, {rest}")
        for name, rest in (
            ("env", "api_key: os.environ/TM_OUTER"),
            ("inner", "api_key: os.environ/INNER"),
            ("literal", "api_key: sk-l, api_base: os.environ/TM_BASE"),
            ("usual", "rpm: 1"),
            ("own", "api_base: http://h/v1"),
        )
    )
    config = convert(tmp_path, text).config
    found = {name: (tier.backends[0].api_key_env, tier.backends[0].api_key) for name, tier in config.tiers.items()}  # type: ignore[union-attr]
    assert found == {
        "env": ("TM_OUTER", None),
        "inner": (None, "sk-inner"),
        "literal": (None, "sk-l"),
        "usual": ("OPENAI_API_KEY", None),
        "own": (None, None),
    }
    assert backends(config, "literal")[0].zone == "on-premises"
    assert "sk-l" not in repr(config)


@pytest.mark.parametrize("said", ["sk-1234", "os.environ/TM_MASTER"])
def test_a_short_master_key_is_taken_with_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    monkeypatch.setenv("TM_MASTER", "sk-1234")
    models = "model_list:\n" + model("m", "model: openai/x, api_base: http://h/v1, input_cost_per_token: 0")
    imported = convert(tmp_path, f"{models}general_settings: {{master_key: {said}}}\n")
    options = make_plan(imported.config).governance
    assert options is not None and options.is_master(digest("sk-1234"))
    (note,) = [note for note in imported.notes if "master_key" in note]
    assert ":3: general_settings.master_key: fewer than 16 characters: can be guessed; make one with" in note
    monkeypatch.setenv("TM_MASTER", "sk-1234" * 3)
    long_enough = said if said != "sk-1234" else "sk-1234" * 3
    imported = convert(tmp_path, f"{models}general_settings: {{master_key: {long_enough}}}\n")
    assert not [note for note in imported.notes if "master_key" in note]


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
        "description": "fast",
        "supports_reasoning": True,
        "mode": "tts",
    }
    left = [line.partition("model_info.")[2].partition(":")[0] for line in imported.left_out]
    assert left == ["id", "access_groups"]


def test_what_binds_nobody_here_says_so(tmp_path: Path) -> None:
    text = "model_list:\n" + model("a", "model: openai/x")
    text += "litellm_settings: {max_budget: 5, master_key: sk-elsewhere}\ngeneral_settings: {budget_duration: 30d}\n"
    imported = convert(tmp_path, text)
    assert imported.config.governance is None
    first, second, third = [line.partition("; ")[2] for line in imported.left_out]
    assert first == third == "no budget binds all keys together here; give one to each key or team"
    assert second == "it belongs into general_settings; without one there everybody may ask for everything"


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
    exchange = SimpleNamespace(body=None, principal=None, model="a", fields={})
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


#: (file, line of the complaint, words that it must contain)
MISTAKES: list[tuple[str, int, str]] = [
    ("model_list: []\n", 1, "no deployment can be served"),
    ("model_list: 3\n", 1, "not a list of deployments"),
    ("model_list: [3]\n", 1, "not a deployment"),
    ("model_list:\n  - model_name: a\n", 2, "litellm_params is missing"),
    ("model_list:\n  - litellm_params: {model: openai/a}\n", 2, "model_name is missing"),
    ("model_list:\n" + model("a", "api_key: k"), 2, "model is missing"),
    ("model_list:\n" + model("a", "model: hosted_vllm/a"), 2, "add api_base"),
    ("model_list:\n" + model("a", "model: openai/a, rpm: -1"), 2, "outside 1"),
    ("model_list:\n" + model("a", "model: openai/a, rpm: many"), 2, "'many' is not a number"),
    ("model_list:\n" + model("a", "model: openai/a, rpm: .nan"), 2, "nan is outside"),
    ("model_list:\n" + model("a", "model: openai/a, rpm: 1e400"), 2, "outside"),
    ("model_list:\n" + model("a", "model: openai/a, api_base: 'file:///etc/passwd'"), 2, "not http(s)://"),
    ("model_list:\n" + model("a", "model: openai/a, api_base: 'http://u:p@h'"), 2, "holds a password"),
    ("model_list:\n" + model("a", "model: openai/a, api_base: nowhere"), 2, "'nowhere' is no http"),
    ("model_list:\n" + model("a", "model: openai/a, api_base: 'http://[h'"), 2, "not http(s)://"),
    ("model_list:\n" + model("a", 'model: openai/a, api_key: "k\\r\\nx: y"'), 2, "api_key"),
    ("model_list:\n" + model("a", "model: openai/a, api_base: os.environ/TM_UNSET"), 2, "TM_UNSET is not set"),
    ("model_list:\n" + model("a", "model: [1]"), 2, "a list is not text"),
    ("model_list:\n" + model("*", "model: '*'"), 2, "is any model of any provider; write one deployment each"),
    ("model_list:\n" + model("a", "model: bedrock/a"), 2, "needs a protocol that is not spoken here"),
    ("model_list:\n" + model("a", "model: azure/a, api_key: k"), 2, "azure needs the server's address"),
    ("model_list:\n" + model("a", "model: openai/a") + "router_settings: 3\n", 3, "not a mapping of settings"),
    ("model_list:\n" + model("a", "model: openai/a") + "router_settings: {num_retries: 1.5}\n", 3, "whole number"),
    ("model_list: !!python/object/apply:os.system [ls]\n", 1, "tag"),
]


@pytest.mark.parametrize(("text", "line", "words"), MISTAKES, ids=[words[:24] for _, _, words in MISTAKES])
def test_a_mistake_is_one_line_with_its_place(tmp_path: Path, text: str, line: int, words: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        convert(tmp_path, text)
    message = str(caught.value)
    assert "\n" not in message, message
    assert message.startswith(f"{tmp_path}/proxy.yaml:{line}: "), message
    assert words in message


_SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8))
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
_PARAMETERS = st.fixed_dictionaries(
    {"model": st.sampled_from(["openai/a", "claude", "azure/x", "*", "a/b/c"]) | _VALUES},
    optional=dict.fromkeys(("api_base", "api_key", "rpm", "weight", "input_cost_per_token"), _VALUES),
)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.fixed_dictionaries({"model_name": _VALUES, "litellm_params": _PARAMETERS | _VALUES}), max_size=3),
    st.dictionaries(
        st.sampled_from(
            [
                "fallbacks",
                "context_window_fallbacks",
                "max_fallbacks",
                "num_retries",
                "model_group_alias",
                "timeout",
                "x",
            ]
        ),
        _VALUES,
    ),
    st.dictionaries(
        st.sampled_from(["credential_list", "environment_variables", "include", "general_settings"]), _VALUES
    ),
)
def test_no_value_raises_anything_else(deployments: list[Any], router: dict[str, Any], more: dict[str, Any]) -> None:
    file = yaml_file.YamlFile(Path("c.yaml"), {"model_list": deployments, "router_settings": router, **more})
    try:
        litellm.convert(file)
    except ConfigurationError as error:
        assert all(line.startswith("c.yaml:") for line in str(error).splitlines())
