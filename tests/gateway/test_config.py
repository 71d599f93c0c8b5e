"""The configuration file: every mistake is one line with the place and a remedy, and the documentation is current."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenmill.engine.gateway import backend_section, config, config_reference, yaml_file
from tokenmill.engine.gateway.sections import Section
from tokenmill.errors import ConfigurationError

ROOT = Path(__file__).resolve().parents[2]
GOOD = "tiers: {u: {backends: [{model: m}]}}\n"

#: (file, line of the complaint, words that it must contain)
MISTAKES = [
    ("", 1, "empty"),
    ("# nothing\n", 1, "empty"),
    ("3\n", 1, "not a mapping of fields"),
    ("- tiers\n", 1, "not a mapping of fields"),
    ("server: {port: 1}\n", 1, "tiers: is missing"),
    ("tiers: {}\n", 1, "at least 1"),
    ("tiers: {u: {backends: []}}\n", 1, "at least 1"),
    (GOOD + "serever: {}\n", 2, "did you mean 'server'?"),
    (GOOD + "server:\n  prot: 1\n", 3, "did you mean 'port'?"),
    (GOOD + 'server:\n  port: "8000"\n', 3, "'8000' is not a whole number; remove the quotes"),
    (GOOD + "server:\n  port: 8000.5\n", 3, "not a whole number"),
    (GOOD + "server:\n  port: yes\n", 3, "'yes' is not a whole number"),
    (GOOD + "server:\n  port: 70000\n", 3, "less than or equal to 65535"),
    (GOOD + "server:\n  port: -1\n", 3, "greater than or equal to 0"),
    (GOOD + "server:\n  port: 99999999999999999999999999\n", 3, "does not fit into 64 bits"),
    (GOOD + "server:\n  port: -0x8000000000000001\n", 3, "not a whole number"),
    (GOOD + "server:\n  port: 0x8000000000000000\n", 3, "does not fit into 64 bits"),
    (GOOD + 'server:\n  host: "\\uD800"\n', 3, "half of a character"),
    (GOOD + f"server:\n  port: {'9' * 5000}\n", 3, "at most 30"),
    (GOOD + "server:\n  port: null\n", 3, "not a whole number"),
    (GOOD + "server:\n  port: [1]\n", 3, "a list is not a whole number"),
    (GOOD + "server:\n  host: 1\n", 3, 'put it in quotes: "1"'),
    (GOOD + "server:\n  drain_seconds: .nan\n", 3, "finite"),
    (GOOD + "server:\n\tport: 1\n", 3, "a tab indents this line"),
    (GOOD + "server: {}\nserver: {}\n", 3, "stands here and on line 2"),
    (GOOD + "server: !!python/object/apply:os.system [ls]\n", 2, "tag"),
    (GOOD + "server: {workers: !!int two}\n", 2, "the tag !!int does not go with 'two'"),
    (GOOD + "server: !include x\n", 2, "tag"),
    (GOOD + "server: {<<: 3}\n", 2, "<< merges mappings"),
    (GOOD + "1: 2\n", 2, "the key 1 is not text"),
    (GOOD + "? [a]\n: 2\n", 2, "not text"),
    (GOOD + "server: *nowhere\n", 2, "undefined alias"),
    (GOOD + "server: &a [*a]\n", 2, "too deep"),
    (GOOD + "--- \na: 1\n", 2, "second document"),
    (GOOD + "server: a: b\n", 2, "indentation"),
    (GOOD + 'server: "unclosed\n', 3, "quotes"),
    (GOOD + "a: \x01\n", 2, "unacceptable character"),
    ("[" * 50_000, 1, "too deep"),
    ("a: {" * 5_000, 1, "too deep"),
    ("tiers: {'a b': {backends: [{model: m}]}}\n", 1, "is no name"),
    ("tiers: {'../../etc': {backends: [{model: m}]}}\n", 1, "is no name"),
    ("tiers:\n  u:\n    backends:\n      - modle: m\n", 4, "did you mean 'model'?"),
    ("tiers:\n  u:\n    backends:\n      - ulr: http://x\n", 4, "did you mean 'url'?"),
    ("tiers:\n  u:\n    backends:\n      - served_as: [m]\n", 4, "model: is missing"),
    ("tiers: {u: {backends: [{model: m, served_as: ['']}]}}\n", 1, "served_as: '' is no model's name"),
    ("tiers: {u: {backends: [{model: m, served_as: [a, ' b']}]}}\n", 1, "' b' is no model's name; write 1 to 1024"),
    ("tiers: {u: {backends: [{model: m, served_as: [--port]}]}}\n", 1, "would be an option of vLLM's"),
    ("tiers: {u: {backends: [{url: 'http://a.b', models: {'': x}}]}}\n", 1, "models: '' is no model's name"),
    ("tiers: {u: {backends: [{url: 'http://a.b', models: {x: \"a\\n\"}}]}}\n", 1, "is no model's name"),
    (GOOD + "server:\n  default_model: ''\n", 3, "default_model: '' is no model's name"),
    ("tiers:\n  u:\n    backends:\n      - model: m\n      - model: m\n        weight: 0\n", 6, "greater than 0"),
    ("tiers:\n  u:\n    backends:\n      - model: m\n      - 3\n", 5, "not a mapping of fields"),
    ("tiers:\n  u:\n    backends: [{model: m}, {model: n, name: u}]\n", 1, "two backends are named 'u'"),
    ("tiers: {u: {backends: [{url: 'ftp://x'}]}}\n", 1, "not http(s)://"),
    ("tiers: {u: {backends: [{url: 'http://x:99999'}]}}\n", 1, "not http(s)://"),
    ("tiers: {u: {backends: [{url: 'http://[x'}]}}\n", 1, "not http(s)://"),
    ("tiers: {u: {backends: [{url: 'http://x:0'}]}}\n", 1, "not http(s)://"),
    ("tiers: {u: {backends: [{url: 'http://a..b/v1'}]}}\n", 1, "not http(s)://"),
    (f"tiers: {{u: {{backends: [{{url: 'http://{'a' * 64}/'}}]}}}}\n", 1, "not http(s)://"),
    ("tiers: {u: {backends: [{url: 'http://x/é'}]}}\n", 1, "not http(s)://"),
    ("tiers: {u: {backends: [{url: 'http://x\\y'}]}}\n", 1, "not http(s)://"),
    ('tiers: {u: {backends: [{url: "http://x/\\x01"}]}}\n', 1, "not http(s)://"),
    ('tiers: {u: {backends: [{url: "http://x", health_path: "/a\\r\\nb: c"}]}}\n', 1, "match pattern"),
    ("tiers: {u: {backends: [{url: 'http://me:secret@x'}]}}\n", 1, "api_key_env"),
    (f"tiers: {{u: {{backends: [{{url: 'http://me:{'secret' * 20}@x/?y'}}]}}}}\n", 1, "api_key_env"),
    ("tiers: {u: {backends: [{url: 'http://x', api_key_env: sk-123}]}}\n", 1, "match pattern"),
    ("tiers: {u: {backends: [{url: 'http://x', api_key: k, api_key_env: K}]}}\n", 1, "keep one"),
    ("tiers: {u: {backends: [{url: 'http://x', api_key: 'my secret'}]}}\n", 1, "api_key: is no key"),
    ("tiers: {u: {fallbacks: [v], backends: [{model: m}]}}\n", 1, "falls back to 'v'"),
    ("tiers: {u: {backends: [{model: m, flags: {port: 1}}]}}\n", 1, "set 'server.port'"),
    ("tiers: {u: {backends: [{model: m, flags: {served_model_name: x}}]}}\n", 1, "served_as"),
    ("tiers: {u: {backends: [{model: m, flags: {enforce-eager: null}}]}}\n", 1, "has no value"),
    ("tiers: {u: {backends: [{model: m, flags: {headless: true}}]}}\n", 1, "headless"),
    ("tiers: {u: {backends: [{model: m, env: {A: true}}]}}\n", 1, "put it in quotes"),
    ("tiers: {u: {backends: [{model: m, env: {'A=B': x}}]}}\n", 1, "no name of an environment variable"),
    ("tiers: {u: {backends: [{model: m, speculation: {method: draft_model}}]}}\n", 1, "needs 'model'"),
    ("tiers: {u: {backends: [{model: m, speculation: {method: ngram, model: d}}]}}\n", 1, "without a model"),
    ("tiers: {u: {backends: [{model: m, speculation: {method: eagle}}]}}\n", 1, "'draft_model' or 'ngram'"),
]


def complaint(path: Path, text: str | bytes) -> str:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ConfigurationError) as caught:
        config.load(path)
    return str(caught.value)


@pytest.mark.parametrize(("text", "line", "words"), MISTAKES, ids=[words[:24] for _, _, words in MISTAKES])
def test_a_mistake_is_one_line_with_its_place_and_a_remedy(tmp_path: Path, text: str, line: int, words: str) -> None:
    path = tmp_path / "c.yaml"
    message = complaint(path, text)
    assert "\n" not in message
    assert message.startswith(f"{path}:{line}: "), message
    assert words in message
    assert len(message) < 500


def test_every_mistake_is_reported_at_once(tmp_path: Path) -> None:
    text = GOOD + "server:\n  port: x\n  workers: 0\n  host: 5\n"
    lines = complaint(tmp_path / "c.yaml", text).splitlines()
    assert [line.partition("c.yaml:")[2][:2] for line in lines] == ["5:", "3:", "4:"]


def test_aliases_repeat_values_but_cannot_explode(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        "tiers:\n  a: &same {backends: [{model: m, name: x}]}\n  b: {backends: [{model: m, env: &e {A: 1}}]}\n"
    )
    assert set(config.load(path).tiers) == {"a", "b"}
    bomb = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9))
    assert "fewer aliases" in complaint(path, bomb)


def test_merge_keys_take_over_what_is_not_stated(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(
        "base: &base\n  a: 1\n  b: {c: 2}\nmore: &more {a: 3, d: 4}\n"
        "one:\n  <<: *base\n  a: 5\nall: {<<: [*base, *more]}\nnested: {<<: {<<: *base, a: 6}, '<<': text}\n"
    )
    read = yaml_file.read(path)
    assert read.value["one"] == {"a": 5, "b": {"c": 2}}
    assert read.value["all"] == {"a": 1, "b": {"c": 2}, "d": 4}
    assert read.value["nested"] == {"a": 6, "b": {"c": 2}, "<<": "text"}
    assert read.where(("one", "a")) == f"{path}:7"
    assert read.where(("one", "b", "c")) == f"{path}:3"


@pytest.mark.parametrize(
    "text",
    [
        "a: &a {b: 1, <<: *a}\n",
        "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 9)),
        "a: &a {" + ", ".join(f"k{i}: 1" for i in range(900)) + "}\nb: {<<: [" + ", ".join(["*a"] * 900) + "]}\n",
    ],
    ids=["itself", "powers", "products"],
)
def test_merge_keys_cannot_explode(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigurationError, match=r"fewer aliases|too deep"):
        yaml_file.read(tmp_path / "a.yaml")


def test_words_of_yaml_11_stay_text(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("a: [no, on, Yes, 1:30, 2026-01-01, 1_000]\nb: [true, null, ~, 0x10, 0o17, 010, -1, 1e3, .inf]\n")
    value = yaml_file.read(path).value
    assert value["a"] == ["no", "on", "Yes", "1:30", "2026-01-01", "1_000"]
    assert value["b"] == [True, None, None, 16, 15, 10, -1, 1000.0, float("inf")]


def test_unreadable_files_are_one_line(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.yaml", tmp_path):
        with pytest.raises(ConfigurationError, match="cannot be read"):
            config.load(path)
    assert ":2: byte 0xff is not UTF-8" in complaint(tmp_path / "c.yaml", b"a: 1\nb: \xff\n")
    assert "at most" in complaint(tmp_path / "c.yaml", b"#" * (yaml_file.MOST_BYTES + 1))


@settings(max_examples=150, deadline=None)
@given(st.one_of(st.binary(max_size=80), st.text("{}[]:,&*!-?#|>'\"\n\t ab1~<%@`.", max_size=80).map(str.encode)))
def test_no_bytes_raise_anything_else(tmp_path_factory: pytest.TempPathFactory, text: bytes) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "c.yaml"
    path.write_bytes(text)
    with pytest.raises(ConfigurationError) as caught:
        config.load(path)
    assert str(caught.value).startswith(f"{path}:")


def test_keys_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = backend_section.RemoteBackend(url="http://x", api_key_env="TOKENMILL_TEST_KEY")
    monkeypatch.delenv("TOKENMILL_TEST_KEY", raising=False)
    with pytest.raises(ConfigurationError, match="TOKENMILL_TEST_KEY is not set"):
        backend.secret()
    monkeypatch.setenv("TOKENMILL_TEST_KEY", "sk-1\r\nx-more: 1")
    with pytest.raises(ConfigurationError, match="characters that are in no key"):
        backend.secret()
    monkeypatch.setenv("TOKENMILL_TEST_KEY", "sk-1")
    assert backend.secret() == "sk-1"


#: litellm.yaml is another program's format; test_litellm has it.
EXAMPLES = [path for path in sorted((ROOT / "examples").glob("*.yaml")) if path.name != "litellm.yaml"]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_are_valid(path: Path) -> None:
    assert config.load(path).tiers


def test_documentation_is_current() -> None:
    remedy = "run python -m tokenmill.engine.gateway.config_reference"
    assert (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8") == config_reference.markdown(), remedy


@pytest.mark.parametrize("section", [section for section, _, _ in config_reference.SECTIONS])
def test_every_field_is_documented(section: type[Section]) -> None:
    for name, field in section.model_fields.items():
        assert field.description, f"{section.__name__}.{name}"
