"""The command line: our few flags are ours, every other one reaches vLLM unchanged."""

import json
from pathlib import Path

import pytest

from tokenmill.engine.gateway import backend_section, config
from tokenmill.engine.supervisor import arguments
from tokenmill.engine.supervisor.plan import Engine, make_plan
from tokenmill.errors import ConfigurationError
from tokenmill.models import tiny_pair

ROOT = Path(__file__).resolve().parents[2]


def engine_of(*argv: str) -> Engine:
    request = arguments.parse(argv)
    (engine,) = make_plan(request.config, request.engine_arguments).engines
    return engine


def test_without_arguments_the_bundled_pair_is_served() -> None:
    request = arguments.parse([])
    assert request.config == config.load(ROOT / "examples" / "tiny-pair.yaml")
    command = engine_of().command
    target, draft = tiny_pair()
    assert command[4:7] == (str(target), "--served-model-name", "tiny-pair")
    speculative = json.loads(command[command.index("--speculative-config") + 1])
    assert speculative == {"method": "draft_model", "model": str(draft), "num_speculative_tokens": 3}


def test_flags_of_vllm_pass_unchanged_and_in_order() -> None:
    flags = [
        "--tensor-parallel-size", "2", "-pp", "2", "-O3", "--quantization=awq", "--max_model_len", "4096",
        "--distributed-executor-backend", "ray", "--data-parallel-size", "4", "--data-parallel-address=10.0.0.1",
        "--nnodes", "2", "--node-rank", "0", "--no-enable-prefix-caching", "--hf-overrides", '{"a": [1]}',
        "--lora-modules", "a=b", "c=d", "--seed", "-1", "--host-memory-gb", "3",
    ]  # fmt: skip
    command = engine_of("org/model", "--port", "8123", *flags, "--workers=2").command
    assert command[4:7] == ("org/model", "--served-model-name", "model")
    assert list(command[7:]) == flags


def test_own_flags_reach_the_configuration() -> None:
    request = arguments.parse(["m", "--host", "::1", "--port=0", "--workers", "3", "--drain-seconds", "1.5"])
    server = request.config.server
    assert (server.host, server.port, server.workers, server.drain_seconds) == ("::1", 0, 3, 1.5)
    assert request.engine_arguments == ()


def test_the_model_may_be_named_by_flag() -> None:
    assert engine_of("--max-model-len", "128", "--model", "org/m").command[4:] == (
        "org/m", "--served-model-name", "m", "--max-model-len", "128",
    )  # fmt: skip


@pytest.mark.parametrize("flag", ["--served-model-name", "--served_model_name"])
def test_the_gateway_knows_the_public_names(flag: str) -> None:
    engine = engine_of("org/m", flag, "a", "b", "--seed", "1")
    assert engine.command[5:] == ("--served-model-name", "a", "b", "--seed", "1")
    assert engine.gateway_backend(1).models == ("a", "b")


def test_a_draft_model_becomes_a_speculative_config() -> None:
    command = engine_of("big", "--draft-model", "small", "--draft-tokens", "5").command
    speculative = json.loads(command[command.index("--speculative-config") + 1])
    assert speculative == {"method": "draft_model", "model": "small", "num_speculative_tokens": 5}
    assert "--speculative-config" not in engine_of("big").command
    assert "--speculative-config" not in engine_of("--no-speculation").command


def test_flags_in_a_file_become_flags_of_vllm() -> None:
    backend = backend_section.LocalBackend(
        model="m",
        served_as=["a", "b"],
        flags={"enforce_eager": True, "enable-prefix-caching": False, "seed": 3, "lora-modules": ["x=y", {"n": 1}],
               "compilation-config": {"mode": 0}},
        speculation=backend_section.Speculation(method="ngram", tokens=2),
        env={"A": 1},
    )  # fmt: skip
    plan = make_plan(config.Config(tiers={"t": config.Tier(backends=[backend])}))
    assert plan.engines[0].command[5:] == (
        "--served-model-name", "a", "b", "--enforce-eager", "--no-enable-prefix-caching", "--seed=3",
        "--lora-modules", "x=y", '{"n": 1}', "--compilation-config", '{"mode": 0}',
        "--speculative-config", '{"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 4}',
    )  # fmt: skip
    assert plan.engines[0].environment["A"] == "1"
    assert plan.engines[0].gateway_backend(5).models == ()


def test_the_command_line_wins_over_the_file() -> None:
    request = arguments.parse([str(ROOT / "examples" / "tiers.yaml"), "--port", "9000"])
    assert (request.config.server.port, request.config.server.workers) == (9000, 2)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["m", "--port", "70000"], "--port=70000"),
        (["m", "--workers", "0"], "--workers=0"),
        (["m", "--drain-seconds", "-1"], "--drain-seconds=-1"),
        (["m", "--drain-seconds", "nan"], "--drain-seconds=nan"),
        (["m", "--draft-model", "d", "--draft-tokens", "0"], "--draft-tokens=0"),
        (["m", "--draft-tokens", "3"], "needs --draft-model"),
        (["--draft-model", "d"], "name it first"),
        (["m", "--no-speculation", "--draft-model", "d"], "keep one"),
        (["m", "--model", "n"], "keep one"),
        (["m", "n"], "'n' is no flag"),
        ([""], "--model=''"),
        (["m", "--ssl-keyfile", "k"], "reverse proxy"),
        (["m", "--uds=/tmp/x"], "--uds cannot"),
        (["m", "--headless", "--port", "80"], "--headless"),
        (["bundled:other"], "does not come with Tokenmill"),
        (["missing.yaml"], "cannot be read"),
        (["examples/tiny-pair.yaml", "--draft-model", "d"], "set it in"),
        (["examples/tiny-pair.yaml", "--seed", "3"], "under 'flags'"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_mistakes_are_one_line(argv: list[str], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(ConfigurationError) as caught:
        engine_of(*argv)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
