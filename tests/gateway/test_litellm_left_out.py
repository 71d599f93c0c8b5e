"""LiteLLM's files that are not understood as a whole: the rest is served, and each loss is told once."""

from pathlib import Path

import pytest

from tests.gateway.litellm_files import backends, convert, model, no_cost_map  # noqa: F401
from tokenmill.engine.gateway import litellm_observability
from tokenmill.engine.gateway.litellm import Imported
from tokenmill.engine.supervisor.plan import make_plan
from tokenmill.errors import ConfigurationError

GOOD = "model_list:\n" + model("good", "model: openai/x")
MASTER = "general_settings: {master_key: sk-0123456789abcdef0123456789}\n"


def told(imported: Imported) -> dict[str, str]:
    """Place to what is said of it."""
    split = (line.partition(":")[2].partition(": ")[2].partition(": ") for line in imported.left_out)
    return {place: reason for place, _, reason in split}


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (model("bad", "model: bedrock/x"), "'bad' is left out; 'bedrock/x' needs a protocol that is not spoken here"),
        (model("bad", "model: openai/"), "'bad' is left out; litellm_params: models: '' is no model's name"),
        (model("bad", "model: openai/x, rpm: many"), "'bad' is left out; litellm_params.rpm: 'many' is not a number"),
        (
            model("bad", "model: openai/x, order: [1]"),
            "'bad' is left out; litellm_params.order: a list is not a number",
        ),
        (
            model("bad", "model: openai/x, input_cost_per_token: 300"),
            "'bad' is left out; litellm_params.input_cost_per_token: 300 is outside 0 to 1",
        ),
        (
            model("bad", "model: openai/x", ", model_info: {max_input_tokens: 1.5}"),
            "'bad' is left out; model_info.max_input_tokens: 1.5 is not a whole number",
        ),
        ("  - {model_name: bad}\n", "'bad' is left out; litellm_params is missing; add it"),
        ("  - {litellm_params: {model: openai/x}}\n", "left out; model_name is missing; add it"),
        ("  - bad\n", "left out; 'bad' is not a deployment with model_name and litellm_params"),
        (
            model("bad", "model: ollama/x, api_base: '${OLLAMA_URL}'"),
            "'bad' is left out; its api_base '${OLLAMA_URL}' is no http(s)://host[:port][/prefix]; write "
            "os.environ/OLLAMA_URL",
        ),
    ],
)
def test_one_that_cannot_be_served_does_not_take_the_others_down(tmp_path: Path, wrong: str, reason: str) -> None:
    imported = convert(tmp_path, GOOD + wrong + "router_settings: {fallbacks: [{good: [bad]}]}\n")
    assert list(imported.config.tiers) == ["good"]
    make_plan(imported.config)
    found = told(imported)
    assert found.pop("model_list[1]").startswith(reason)
    assert list(found) == ["router_settings.fallbacks[0].good[0]"]


def test_a_wrong_deployment_has_no_say_in_the_shares_of_its_group(tmp_path: Path) -> None:
    text = GOOD + model("good", "model: openai/y, weight: 3") + model("good", "model: openai/z, weight: -2")
    weights = [one.weight for one in convert(tmp_path, text).config.tiers["good"].backends]
    assert len(weights) == 2 and weights[1] == 3


def test_of_a_key_that_stands_twice_the_last_counts_and_the_first_is_told(tmp_path: Path) -> None:
    (tmp_path / "part.yaml").write_text("router_settings: {num_retries: 1, num_retries: 4}\n", encoding="utf-8")
    text = (
        "litellm_settings: {allowed_fails: 9, callbacks: [x]}\n"
        + GOOD
        + "include: [part.yaml]\nlitellm_settings:\n  allowed_fails: 2\n  callbacks:\n    - lost\n"
    )
    imported = convert(tmp_path, text)
    assert (imported.config.server.breaker_failures, imported.config.server.retries) == (3, 4)
    path = tmp_path / "proxy.yaml"
    callback, first, second = imported.left_out
    assert callback.startswith(f"{path}:8: litellm_settings.callbacks[0]: 'lost' is not called")
    assert first == f"{path}:1: litellm_settings: stands again on line 5, which counts; this does not"
    assert (
        second
        == f"{tmp_path}/part.yaml:1: router_settings.num_retries: stands again on line 1, which counts; this does not"
    )


@pytest.mark.parametrize(
    "settings",
    [
        "general_settings: {master_key: sk-0123456789abcdef}\ngeneral_settings: {max_request_size_mb: 5}\n",
        "general_settings:\n  master_key: sk-0123456789abcdef\n  master_key:\n",
    ],
)
def test_a_master_key_that_another_line_undoes_leaves_no_gateway_open(tmp_path: Path, settings: str) -> None:
    with pytest.raises(
        ConfigurationError, match=r"proxy\.yaml:\d+: general_settings.*stands twice, and the last has no "
    ):
        convert(tmp_path, GOOD + settings)
    # Where a key is left, the rest of such a file counts as it does there.
    again = "general_settings: {max_request_size_mb: 5, master_key: sk-0123456789abcdef}\n"
    assert convert(tmp_path, GOOD + "general_settings: {}\n" + again).config.governance is not None


def test_of_a_key_that_stands_twice_in_what_is_merged_the_last_counts(tmp_path: Path) -> None:
    text = "base: &base\n  api_key: one\n  api_key: two\nmodel_list:\n"
    text += model("m", "<<: *base, model: openai/x, api_base: 'http://127.0.0.1:9/v1'")
    (backend,) = backends(convert(tmp_path, text).config, "m")
    assert backend.api_key == "two"


def test_each_field_that_is_not_understood_is_named(tmp_path: Path) -> None:
    text = GOOD.replace("}\n", ", model_info: {team_id: t}}\n")
    text += "general_settings:\n  odd: 1\n  alerting: [slack]\nguardrails:\n"
    text += (
        "  - {guardrail_name: a, litellm_params: {guardrail: presidio}}\n  - {guardrail_name: b}\nstrange: {}\nnew: 3\n"
    )
    found = told(convert(tmp_path, text))
    assert {place for place, reason in found.items() if reason == "not understood"} == {
        "model_list[0].model_info.team_id",
        "general_settings.odd",
        "new",
    }
    assert found["general_settings.alerting"].startswith("nobody is told when something goes wrong")
    assert found["guardrails[0]"].startswith("requests are not checked by it; write a `sensitivity` section")
    assert found["guardrails[1]"].startswith("requests are not checked by it; there are no")


def test_what_holds_of_many_deployments_is_said_once(tmp_path: Path) -> None:
    (tmp_path / "part.yaml").write_text(
        "model_list:\n" + model("p", "model: openai/x, num_retries: 2"), encoding="utf-8"
    )
    listed = [model(f"m{number}", f"model: openai/x, num_retries: {number}") for number in range(12)]
    text = "include: [part.yaml]\nmodel_list:\n" + "".join(listed) + model("other", "model: openai/x, odd: 1")
    first, second = convert(tmp_path, text).left_out
    place = f"{tmp_path}/proxy.yaml:3: model_list[0].litellm_params.num_retries"
    assert first.startswith(f"{place}: a request is sent again to other backends")
    assert first.endswith("; also on line 4, 5, 6, 7, 8, 9, 10, 11, 12, 13 and 2 more")
    assert second == f"{tmp_path}/proxy.yaml:15: model_list[12].litellm_params.odd: not understood"


def test_what_is_switched_off_here_as_there_is_not_told(tmp_path: Path) -> None:
    text = (
        "model_list:\n"
        + model("a", "model: openai/x, drop_params: false, stream: false")
        + "litellm_settings: {set_verbose: false, drop_params: False, cache: false, telemetry: false}\n"
        + "general_settings: {store_model_in_db: false, store_prompts_in_spend_logs: false, custom_auth: false}\n"
    )
    assert convert(tmp_path, text).left_out == ()
    told_of = told(convert(tmp_path, text + "router_settings: {enable_pre_call_checks: false}\n"))
    assert list(told_of) == ["router_settings.enable_pre_call_checks"]


def test_prometheus_is_what_there_is(tmp_path: Path) -> None:
    for said in ("callbacks: [prometheus]", "success_callback: prometheus, failure_callback: [prometheus]"):
        imported = convert(tmp_path, GOOD + f"litellm_settings: {{{said}}}\n")
        assert imported.left_out == ()
    assert (
        "/metrics is closed"
        in told(convert(tmp_path, GOOD + MASTER + "litellm_settings: {callbacks: [prometheus]}\n"))[
            "litellm_settings.callbacks[0]"
        ]
    )
    for wants_key, opened in (("true", None), ("false", True)):
        settings = f"litellm_settings: {{callbacks: [prometheus], require_auth_for_metrics_endpoint: {wants_key}}}\n"
        imported = convert(tmp_path, GOOD + MASTER + settings)
        assert (imported.left_out, imported.config.observability.open_metrics) == ((), opened)


def test_traces_go_where_litellm_sends_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OTEL_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(litellm_observability, "exporter_is_installed", lambda: True)
    text = GOOD + "litellm_settings: {callbacks: [langfuse, otel]}\n"
    place = "litellm_settings.callbacks[1]"
    assert told(convert(tmp_path, text))[place].startswith("set OTEL_EXPORTER_OTLP_ENDPOINT to http")
    variables = "environment_variables: {OTEL_EXPORTER_OTLP_ENDPOINT: 'http://collector:4318'}\n"
    imported = convert(tmp_path, text + variables)
    assert imported.config.observability.traces == "http://collector:4318/v1/traces"
    assert list(told(imported)) == ["litellm_settings.callbacks[0]"]
    monkeypatch.setenv("OTEL_ENDPOINT", "https://elsewhere/v1/traces/")
    assert convert(tmp_path, text + variables).config.observability.traces == "https://elsewhere/v1/traces"
    for wrong in ("http://", "http://user:secret@collector:4318", "http://collector:99999", "http://collector/?key=1"):
        monkeypatch.setenv("OTEL_ENDPOINT", wrong)
        imported = convert(tmp_path, text + variables)
        assert imported.config.observability.traces is None
        assert told(imported)[place].startswith("OTEL_ENDPOINT is no http(s)://host:port") and "secret" not in str(
            imported
        )
    monkeypatch.setenv("OTEL_ENDPOINT", "https://elsewhere/v1/traces/")
    monkeypatch.setenv("OTEL_EXPORTER", "otlp_grpc")
    imported = convert(tmp_path, text + variables)
    assert imported.config.observability.traces is None and "over HTTP, not gRPC" in told(imported)[place]
    monkeypatch.delenv("OTEL_EXPORTER")
    monkeypatch.setattr(litellm_observability, "exporter_is_installed", lambda: False)
    assert told(convert(tmp_path, text + variables))[place] == "install the extra tokenmill[otel]"


def test_an_api_of_traces_without_an_exporter_is_not_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(litellm_observability, "_EXPORTER", "opentelemetry_is_nowhere.exporter")
    assert not litellm_observability.exporter_is_installed()


def test_settings_that_are_wrong_are_still_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"router_settings\.num_retries: 'x' is not a number"):
        convert(tmp_path, GOOD + model("bad", "model: bedrock/x") + "router_settings: {num_retries: x}\n")
