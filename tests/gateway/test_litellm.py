"""LiteLLM's files: what they say is what is served, what is not understood is listed, what is wrong is one line."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.gateway.litellm_files import backends, convert, model, no_cost_map  # noqa: F401
from tokenmill import env
from tokenmill.engine.gateway import litellm, yaml_file
from tokenmill.engine.gateway.config import Server
from tokenmill.engine.gateway.governance.options import digest
from tokenmill.engine.supervisor import arguments
from tokenmill.engine.supervisor.main import main
from tokenmill.engine.supervisor.plan import make_plan
from tokenmill.errors import ConfigurationError

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "litellm.yaml"
FILES = Path(__file__).resolve().parents[1] / "data" / "litellm"
MASTER = "sk-0123456789abcdef0123456789"


def test_example_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY"):
        monkeypatch.setenv(name, "key")
    monkeypatch.setenv("LITELLM_MASTER_KEY", MASTER)
    request = arguments.parse([str(EXAMPLE)])
    left_out = [line.partition(": ")[2] for line in request.left_out]
    dropped = [line for line in left_out if line.startswith("litellm_settings.drop_params: used for Anthropic")]
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
    assert [": ".join(line.split(": ")[:2]) for line in left] == [
        "2: model_list[0].litellm_params.mock_response",
        "2: model_list[0].litellm_params.tags",
        "3: model_list[1]",
        "4: model_list[2]",
        "6: router_settings.routing_strategy",
        "7: router_settings.retry_policy",
        "8: litellm_settings.success_callback[0]",
        "9: general_settings.custom_auth",
        "11: guardrails[0]",
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
    split = (line.partition(": ")[2].partition(": ") for line in found)
    return {place: reason for place, _, reason in split}


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
    assert [": ".join(line.split(": ")[:2]) for line in imported.left_out] == [
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
    reasons = [line.split(": ", 2)[2] for line in imported.left_out]
    assert reasons == [
        f"'{name}' is no model_name of this file; correct it, or add a deployment" for name in "zyzyzyxwv"
    ]


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


def test_what_binds_nobody_here_says_so(tmp_path: Path) -> None:
    text = "model_list:\n" + model("a", "model: openai/x")
    text += "litellm_settings: {max_budget: 5, master_key: sk-elsewhere}\ngeneral_settings: {budget_duration: 30d}\n"
    imported = convert(tmp_path, text)
    assert imported.config.governance is None
    first, second, third = [line.split(": ", 2)[2] for line in imported.left_out]
    assert first == third == "no budget binds all keys together here; give one to each key or team"
    assert second == "it belongs into general_settings; without one there everybody may ask for everything"


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
    ("model_list:\n" + model("x", "model: '*'"), 2, "is any model of any provider; write one deployment each"),
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
