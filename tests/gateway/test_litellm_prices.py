"""LiteLLM's cost map: where it is found, which entry is taken, that the file wins, and what is said about mistakes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tokenmill import env
from tokenmill.engine.gateway import litellm, litellm_prices, yaml_file
from tokenmill.engine.gateway.backend_section import RemoteBackend
from tokenmill.engine.gateway.litellm_prices import CostMap
from tokenmill.engine.supervisor.main import main
from tokenmill.errors import ConfigurationError

#: The published map: that of an installed package, or the one that the environment names.
REAL = litellm_prices.installed() or env.LITELLM_PRICES.get()
GOVERNED = "general_settings: {master_key: sk-0123456789abcdef0123456789}\n"
PRICED: dict[str, Any] = {
    "litellm_provider": "openai",
    "mode": "chat",
    "input_cost_per_token": 2.5e-06,
    "cache_read_input_token_cost": 1.25e-06,
    "output_cost_per_token": 1e-05,
    "max_input_tokens": 128_000,
    "max_output_tokens": 16_384,
    "supports_function_calling": True,
    "supports_vision": True,
}


@pytest.fixture(autouse=True)
def no_cost_map(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither what is installed here nor what the environment names counts."""
    monkeypatch.delenv(env.LITELLM_PRICES.name, raising=False)
    monkeypatch.delenv(litellm_prices.URL_VARIABLE, raising=False)
    monkeypatch.setattr(litellm_prices, "installed", lambda: None)


@pytest.fixture
def name_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Path]:
    """Writes a map and names it in the environment."""

    def write(content: Any) -> Path:
        path = tmp_path / "prices.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        monkeypatch.setenv(env.LITELLM_PRICES.name, str(path))
        return path

    return write


#: What stands in `litellm_params` beside the key, and in `model_info`.
Deployment = str | tuple[str, str]


def proxy(folder: Path, *deployments: Deployment, more: str = GOVERNED) -> Path:
    """A proxy's file with the models m0, m1, ..."""
    path = folder / "proxy.yaml"
    pairs = [(one, "") if isinstance(one, str) else one for one in deployments]
    lines = [
        f"  - {{model_name: m{number}, litellm_params: {{api_key: k, {parameters}}}, model_info: {{{info}}}}}\n"
        for number, (parameters, info) in enumerate(pairs)
    ]
    path.write_text("model_list:\n" + "".join(lines) + more, encoding="utf-8")
    return path


def convert(folder: Path, *deployments: Deployment, more: str = GOVERNED) -> litellm.Imported:
    return litellm.convert(yaml_file.read(proxy(folder, *deployments, more=more)))


def backend(imported: litellm.Imported, tier: str = "m0") -> RemoteBackend:
    found = imported.config.tiers[tier].backends[0]
    assert isinstance(found, RemoteBackend)
    return found


def price(imported: litellm.Imported, tier: str = "m0") -> tuple[float, float | None, float]:
    found = backend(imported, tier).price
    return found.input, found.cached, found.output


def test_what_the_file_leaves_unsaid_comes_from_the_map(tmp_path: Path, name_map: Callable[[Any], Path]) -> None:
    path = name_map({"gpt-4o": PRICED})
    imported = convert(tmp_path, "model: openai/gpt-4o", "model: gpt-4o")
    for tier in ("m0", "m1"):
        found = backend(imported, tier)
        assert price(imported, tier) == pytest.approx((2.5, 1.25, 10))
        assert (found.context_window, found.max_output_tokens) == (128_000, 16_384)
        assert found.capabilities == ["tools", "vision"]
    assert imported.notes == (f"{path}: the prices of 'm0', 'm1' come from here",)
    assert imported.left_out == ()


def test_what_the_file_states_wins_field_by_field(tmp_path: Path, name_map: Callable[[Any], Path]) -> None:
    name_map({"gpt-4o": PRICED, "text-embedding-3-small": {"mode": "embedding", "input_cost_per_token": 2e-08}})
    imported = convert(
        tmp_path,
        ("model: openai/gpt-4o, input_cost_per_token: 0.000003", "output_cost_per_token: 0"),
        ("model: openai/gpt-4o", "max_input_tokens: 9, max_output_tokens: 8, supports_vision: false"),
        "model: openai/gpt-4o, input_cost_per_token: 0",
        "model: openai/text-embedding-3-small",
        ("model: openai/text-embedding-3-small", "mode: chat"),
    )
    assert price(imported) == pytest.approx((3, 1.25, 0))
    stated = backend(imported, "m1")
    assert (stated.context_window, stated.max_output_tokens, stated.capabilities) == (9, 8, ["tools"])
    # Tokens from a cache never cost more than the others of which the file states the price.
    assert price(imported, "m2") == pytest.approx((0, 0, 10))
    assert backend(imported, "m3").capabilities == ["embeddings"]
    assert backend(imported, "m4").capabilities == []


WRITTEN = {"cache_creation_input_token_cost": 3.5e-06, "cache_creation_input_token_cost_above_1hr": 4e-06}


@pytest.mark.parametrize(
    ("parameters", "entry", "written"),
    [
        ("model: openai/gpt-4o", {}, (None, None)),
        ("model: openai/gpt-4o", WRITTEN, (3.5, 4)),
        # It does not say: a token that is written into a cache costs no less than others.
        ("model: openai/gpt-4o", dict.fromkeys(WRITTEN, 0), (None, None)),
        ("model: openai/gpt-4o, cache_creation_input_token_cost: 0", WRITTEN, (0, 4)),
        ("model: openai/gpt-4o, cache_creation_input_token_cost_above_1hr: 0.00001", {}, (None, 10)),
        # Where the file states what others cost, the map's are of another price.
        ("model: openai/gpt-4o, input_cost_per_token: 0.000001", WRITTEN, (None, None)),
    ],
)
def test_prices_of_what_is_written_into_a_cache(
    tmp_path: Path,
    name_map: Callable[[Any], Path],
    parameters: str,
    entry: dict[str, float],
    written: tuple[float | None, float | None],
) -> None:
    name_map({"gpt-4o": PRICED | entry})
    imported = convert(tmp_path, parameters)
    found = backend(imported).price
    assert (found.written, found.written_hour) == pytest.approx(written)
    assert imported.left_out == ()


#: Each entry's price is its position, so that a wrong one shows.
ENTRIES = [
    ("groq/both", "groq"),
    ("both", "groq"),
    ("bare", "openai"),
    ("groq/alien", "openai"),
    ("dated", "openai"),
    ("dated-2024-01-02", "groq"),
    ("ft:gpt-4o-2024-08-06", "openai"),
    ("Groq/Case", "groq"),
    ("fireworks_ai/accounts/fireworks/models/short", "fireworks_ai"),
    ("big-fireworks", "fireworks_ai-embedding-models"),
    ("openrouter/openrouter/auto", "openrouter"),
    ("nobodys", None),
    ("azure/cloudy", "azure"),
]
MAP = {
    name: {"input_cost_per_token": number * 1e-06, "output_cost_per_token": 0.0}
    | ({} if provider is None else {"litellm_provider": provider})
    for number, (name, provider) in enumerate(ENTRIES, 1)
}


@pytest.mark.parametrize(
    ("model", "provider", "name"),
    [
        ("both", "groq", "groq/both"),
        ("both", "openai", None),
        ("bare", "openai", "bare"),
        ("bare", "groq", None),
        ("alien", "groq", None),
        ("groq/both", "litellm_proxy", "groq/both"),
        ("dated-2025-03-04", "openai", "dated"),
        ("dated-2024-01-02", "openai", "dated"),
        ("ft:gpt-4o-2024-08-06:my-org::id", "openai", "ft:gpt-4o-2024-08-06"),
        ("CASE", "groq", "Groq/Case"),
        ("short", "fireworks_ai", "fireworks_ai/accounts/fireworks/models/short"),
        ("big-fireworks", "fireworks_ai", "big-fireworks"),
        ("auto", "openrouter", "openrouter/openrouter/auto"),
        ("nobodys", "xai", "nobodys"),
        ("sample_spec", "openai", None),
    ],
)
def test_an_entry_is_found_as_litellm_finds_it(model: str, provider: str, name: str | None) -> None:
    entry = CostMap(models={**MAP, "sample_spec": {"input_cost_per_token": 0.0}}).find(model, provider)
    assert (None if entry is None else entry.name) == name


@pytest.mark.parametrize(
    ("base", "provider", "name"),
    [
        ("bare", "openai", "bare"),
        ("openai/bare", "openai", "bare"),
        ("bare", "hosted_vllm", "bare"),
        ("azure/cloudy", "openai", "azure/cloudy"),
        ("openai/bare", "hosted_vllm", "bare"),
        ("unknown", "openai", None),
    ],
)
def test_a_base_model_may_be_another_providers(base: str, provider: str, name: str | None) -> None:
    entry = CostMap(models=MAP).find_base(base, provider)
    assert (None if entry is None else entry.name) == name


def test_base_model_prices_and_only_describes_what_is_unknown(tmp_path: Path, name_map: Callable[[Any], Path]) -> None:
    name_map({"gpt-4o": PRICED, "own": {"input_cost_per_token": 1e-06, "max_input_tokens": 5}, "free": {}})
    imported = convert(
        tmp_path,
        ("model: hosted_vllm/tuned, api_base: 'http://h'", "base_model: gpt-4o"),
        "model: openai/own, base_model: openai/gpt-4o",
        ("model: openai/own", "base_model: free"),
    )
    assert price(imported) == price(imported, "m1") == pytest.approx((2.5, 1.25, 10))
    assert (backend(imported).context_window, backend(imported, "m1").context_window) == (128_000, 5)
    assert price(imported, "m2") == pytest.approx((1, None, 0))
    assert imported.left_out == ()


def test_models_without_a_price_are_one_line_where_budgets_are(tmp_path: Path, name_map: Callable[[Any], Path]) -> None:
    deployments = (
        "model: openai/unknown",
        "model: openai/free",
        "model: openai/unknown, output_cost_per_token: 0.1",
        "model: openai/image",
    )
    twice = "  - {model_name: m0, litellm_params: {model: openai/unknown, api_key: k}}\n"
    zero = {"input_cost_per_token": 0, "output_cost_per_token": 0}
    without = convert(tmp_path, *deployments, more=twice + GOVERNED).notes
    place = f"{tmp_path}/proxy.yaml:2: model_list[0]"
    said = "they cost nothing, budgets do not bind; state input_cost_per_token and output_cost_per_token"
    (line,) = without
    assert line.startswith(f"{place}: no price of 'm0', 'm1', ")
    assert line.endswith(f": {said}, or set TOKENMILL_LITELLM_PRICES to LiteLLM's cost map")
    name_map({"free": zero, "image": {"output_cost_per_image": 0.04}})
    notes = convert(tmp_path, *deployments, more=twice + GOVERNED).notes
    assert [note for note in notes if "no price" in note] == [f"{place}: no price of 'm0', 'm3': {said}"]
    assert not any("no price" in note for note in convert(tmp_path, *deployments, more=twice).notes)


#: (what the named file holds, words of the only line)
MISTAKES: list[tuple[Any, str]] = [
    ("", "it is no JSON"),
    ("{'a': 1}", "it is no JSON"),
    ([1], "it holds a list, not a mapping of models"),
    ({"gpt-4o": 3}, "'gpt-4o': 3 is not a mapping of fields; correct it there"),
    *(
        ({"gpt-4o": PRICED | {field: value}}, f"'gpt-4o': {field} is {words}")
        for field, value, words in (
            ("input_cost_per_token", -1e-06, "-1e-06, outside 0 to 1; correct it there, or state the field"),
            ("input_cost_per_token", 2, "2, outside 0 to 1"),
            ("output_cost_per_token", "free", "'free', not a number"),
            ("output_cost_per_token", True, "true, not a number"),
            ("cache_read_input_token_cost", [], "a list, not a number"),
            ("max_input_tokens", 1.5, "1.5, not a whole number"),
            ("max_output_tokens", -1, "-1, outside 0 to 1e+09"),
            ("supports_vision", "yes", "'yes', not true or false"),
            ("mode", 3, "3, not text"),
        )
    ),
]


@pytest.mark.parametrize(("content", "words"), MISTAKES, ids=[words[:40] for _, words in MISTAKES])
def test_a_mistake_is_an_error_in_a_named_file_and_a_note_in_a_found_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name_map: Callable[[Any], Path], content: Any, words: str
) -> None:
    path = name_map(content)
    with pytest.raises(ConfigurationError) as caught:
        convert(tmp_path, "model: openai/gpt-4o")
    message = str(caught.value)
    assert words in message and str(path) in message and "\n" not in message
    # What the file states is not looked up, so that a mistake there has a way around it.
    if isinstance(content, dict) and "input_cost" in words:
        assert convert(tmp_path, "model: openai/gpt-4o, input_cost_per_token: 0.1").config
    monkeypatch.delenv(env.LITELLM_PRICES.name)
    monkeypatch.setattr(litellm_prices, "installed", lambda: path)
    (note,) = (note for note in convert(tmp_path, "model: openai/gpt-4o").notes if words in note)
    assert note.startswith(f"{path}: ") and "\n" not in note


def test_a_named_file_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path, words in ((tmp_path / "none.json", "no such file"), (tmp_path, "is a directory")):
        monkeypatch.setenv(env.LITELLM_PRICES.name, str(path))
        with pytest.raises(ConfigurationError, match=words) as caught:
            convert(tmp_path, "model: openai/gpt-4o")
        assert str(caught.value).startswith(f"TOKENMILL_LITELLM_PRICES={path}: it cannot be read")
        assert str(caught.value).endswith("name LiteLLM's model_prices_and_context_window.json")


def test_the_packages_copy_is_found_without_importing_it_and_a_named_file_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name_map: Callable[[Any], Path]
) -> None:
    package = tmp_path / "site" / "litellm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')", encoding="utf-8")
    copy = package / litellm_prices.PACKAGED
    monkeypatch.undo()
    monkeypatch.delenv(env.LITELLM_PRICES.name, raising=False)
    monkeypatch.syspath_prepend(str(package.parent))
    assert litellm_prices.installed() is None
    copy.write_text(json.dumps({"gpt-4o": PRICED}), encoding="utf-8")
    assert litellm_prices.installed() == copy
    assert price(convert(tmp_path, "model: openai/gpt-4o")) == pytest.approx((2.5, 1.25, 10))
    name_map({"gpt-4o": PRICED | {"input_cost_per_token": 1e-06}})
    assert price(convert(tmp_path, "model: openai/gpt-4o")) == pytest.approx((1, 1.25, 10))


def test_check_says_where_prices_come_from_and_what_is_not_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name_map: Callable[[Any], Path]
) -> None:
    monkeypatch.setenv(litellm_prices.URL_VARIABLE, "https://user:secret@prices")
    claude = "model: anthropic/claude, input_cost_per_token: 0.000003, output_cost_per_token: 0.000015"
    config = proxy(tmp_path, "model: openai/gpt-4o", "model: openai/unknown", claude)
    assert main(["--check", str(config)]) == 0
    shown = capsys.readouterr()
    assert (
        "LITELLM_MODEL_COST_MAP_URL: no cost map is fetched; download it; "
        "set TOKENMILL_LITELLM_PRICES to a copy of it" in shown.err
    )
    assert "model_list[0]: no price of 'm0', 'm1': they cost nothing" in shown.err
    path = name_map({"gpt-4o": PRICED})
    assert main(["--check", str(config)]) == 0
    shown = capsys.readouterr()
    assert f"no cost map is fetched; {path} is read instead\n" in shown.err
    assert f"{path}: the prices of 'm0' come from here" in shown.err
    assert "model_list[1]: no price of 'm1': they cost nothing" in shown.err
    assert "tier m0: https://api.openai.com; m0 (gpt-4o); cloud; weight 1; $2.5 in, $1.25 cached, $10 out" in shown.out
    assert "$3 in, $3 cached, $3.75 written, $6 written for an hour, $15 out per million" in shown.out
    assert "secret" not in shown.err + shown.out


@pytest.mark.skipif(REAL is None, reason="no litellm package here, and TOKENMILL_LITELLM_PRICES names no map")
def test_the_published_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(env.LITELLM_PRICES.name, str(REAL))
    named = ("gpt-4o", "openai/gpt-4o-mini", "openai/text-embedding-3-small", "anthropic/claude-haiku-4-5", "groq/{}")
    content = json.loads(REAL.read_bytes()) if REAL is not None else {}
    fast = next(name for name, entry in content.items() if name.startswith("groq/") and entry.get("mode") == "chat")
    imported = convert(tmp_path, *(f"model: {name.format(fast.removeprefix('groq/'))}" for name in named))
    assert not any("no price" in note for note in imported.notes)
    for number, key in enumerate(("gpt-4o", "gpt-4o-mini", "text-embedding-3-small", "claude-haiku-4-5", fast)):
        entry, found = content[key], backend(imported, f"m{number}")
        assert found.price.input == pytest.approx(entry["input_cost_per_token"] * 1e6)
        assert found.price.output == pytest.approx(entry["output_cost_per_token"] * 1e6)
        assert found.context_window == entry["max_input_tokens"]
    assert {"tools", "vision"} <= set(backend(imported).capabilities)
    assert backend(imported, "m2").capabilities == ["embeddings"]
