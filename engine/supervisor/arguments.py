"""The command line of `tokenmill serve`: a few flags of our own; every other flag is vLLM's and stays as it is."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pydantic import ValidationError

from tokenmill.engine.gateway import config as configuration
from tokenmill.engine.gateway import litellm, yaml_file
from tokenmill.engine.gateway.backend_section import RESERVED_FLAGS, LocalBackend, Speculation
from tokenmill.engine.gateway.config import Config, Server, Tier
from tokenmill.errors import ConfigurationError

#: The tier of a model that is named on the command line.
ONLY_TIER = "default"
#: Public name of the bundled pair.
BUNDLED_NAME = "tiny-pair"
#: Most tokens drafted per step by the bundled draft model, and by another unless --draft-tokens says otherwise.
DRAFT_TOKENS = 3
#: vLLM flags that would move its server away from the gateway in front of it.
_REFUSED = {name: remedy for name, remedy in RESERVED_FLAGS.items() if name in ("uds", "grpc")} | {
    name: remedy for name, remedy in RESERVED_FLAGS.items() if name.startswith("ssl-")
}

DESCRIPTION = """\
Serves models over the OpenAI API. Three ways to say which:

  tokenmill serve                     the small draft and target pair that comes with Tokenmill
  tokenmill serve MODEL [FLAGS]       any folder or hub name; every flag that is not listed below goes to vLLM
                                      unchanged (--tensor-parallel-size 2, --quantization awq, --headless, ...)
  tokenmill serve CONFIG.yaml         several tiers, local and remote; docs/configuration.md describes the file;
                                      a LiteLLM proxy's file is understood, too
"""
EPILOG = """\
SIGHUP has CONFIG.yaml read again, without the loss of a request (docs/gateway.md).
`tokenmill serve --help=all` lists vLLM's flags. Engines write their logs to files that the start names.
Exit status: 0 after SIGTERM or Ctrl-C, 1 when a server could not start, 2 for bad arguments.
"""


@dataclass(frozen=True)
class Request:
    """What the command line asks for.

    Attributes:
        config: The configuration, from the file or made from the flags.
        engine_arguments: vLLM flags, in their order.
        source: The configuration file, if one was named.
        check_only: Stop after checking.
        verbose: Show the engines' output.
        headless: The engine takes no requests: it is one node of several, and needs no gateway.
        left_out: What was not understood of a file made for another program, and what its models' prices need, one line
            each.
    """

    config: Config
    engine_arguments: tuple[str, ...]
    source: Path | None
    check_only: bool
    verbose: bool
    headless: bool
    left_out: tuple[str, ...] = ()


def parser() -> argparse.ArgumentParser:
    """Our own flags."""
    made = argparse.ArgumentParser(
        prog="tokenmill serve",
        usage="tokenmill serve [MODEL | CONFIG.yaml] [FLAGS] [any flag of vllm serve]",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=partial(argparse.RawDescriptionHelpFormatter, max_help_position=32, width=116),
        allow_abbrev=False,
    )
    made.add_argument("--host", metavar="ADDRESS", help="address to listen on (default 127.0.0.1)")
    made.add_argument("--port", type=int, metavar="N", help="port to listen on, 0 for a free one (default 8000)")
    made.add_argument("--workers", type=int, metavar="N", help="gateway processes that share the port (default 1)")
    made.add_argument(
        "--drain-seconds", type=float, metavar="S", help="time for open requests after SIGTERM (default 30)"
    )
    made.add_argument(
        "--allowed-origins",
        "--allowed_origins",
        type=_origins,
        metavar="JSON",
        help="list of web pages' origins that may use the API from a browser, or '[\"*\"]' (default none)",
    )
    made.add_argument("--model", help="the model, if it is not the first argument")
    made.add_argument("--served-model-name", nargs="+", metavar="NAME", help="names that clients use")
    # vLLM takes underscores, too; the gateway must know the names however they are spelt.
    made.add_argument("--served_model_name", nargs="+", help=argparse.SUPPRESS)
    made.add_argument("--draft-model", metavar="MODEL", help="a small model with the same tokenizer that drafts tokens")
    made.add_argument(
        "--draft-tokens", type=int, metavar="N", help=f"most tokens drafted per step (default {DRAFT_TOKENS})"
    )
    made.add_argument(
        "--no-speculation",
        action="store_true",
        help="do not draft, not even with the bundled pair (its drafting shows how; on a CPU it gains no speed)",
    )
    made.add_argument("--check", action="store_true", help="check the arguments and the file, start nothing")
    made.add_argument("--verbose", action="store_true", help="show what the engines print")
    return made


def _origins(text: str) -> list[str]:
    """`--allowed-origins` as vLLM takes it."""
    try:
        origins = json.loads(text)
    except json.JSONDecodeError:
        origins = None
    if not isinstance(origins, list) or not all(isinstance(origin, str) for origin in origins):
        raise argparse.ArgumentTypeError(f"{text[:200]!r} is no list in JSON, like '[\"https://chat.example.org\"]'")
    return origins


def parse(argv: Sequence[str]) -> Request:
    """Reads the command line, and the configuration file if it names one.

    Raises:
        ConfigurationError: An argument or the file is wrong; one line each, with a remedy.
        SystemExit: `--help`, or an argument that argparse refuses.
    """
    rest = list(argv)
    named = rest.pop(0) if rest and not rest[0].startswith("-") else None
    own, engine_arguments = parser().parse_known_args(rest)
    if named is None and own.check and engine_arguments and not engine_arguments[0].startswith("-"):
        named = engine_arguments.pop(0)  # `--check config.yaml`
    if named is not None and own.model is not None:
        raise ConfigurationError(f"two models are named, {named!r} and {own.model!r}; keep one")
    if engine_arguments and not engine_arguments[0].startswith("-"):
        raise ConfigurationError(f"{engine_arguments[0]!r} is no flag; the model or the file comes first, flags after")
    if named is not None and named.endswith((".yaml", ".yml")):
        return _from_file(Path(named), own, engine_arguments)
    if "--headless" in engine_arguments and (own.host is not None or own.port is not None):
        raise ConfigurationError("a --headless node takes no requests; remove --host and --port")
    _refuse_moved_servers(engine_arguments)
    try:
        config = Config(server=_server(own, Server()), tiers={ONLY_TIER: Tier(backends=[_backend(named, own)])})
    except ValidationError as error:
        raise ConfigurationError(_first_problem(error)) from None
    return Request(config, tuple(engine_arguments), None, own.check, own.verbose, "--headless" in engine_arguments)


def _from_file(path: Path, own: argparse.Namespace, engine_arguments: list[str]) -> Request:
    for flag in ("draft_model", "draft_tokens", "served_model_name", "no_speculation"):
        if getattr(own, flag) not in (None, False):
            raise ConfigurationError(f"--{flag.replace('_', '-')} does not go with a file; set it in {path}")
    if engine_arguments:
        raise ConfigurationError(
            f"{engine_arguments[0]} does not go with a file; write it under 'flags' of a backend in {path}, "
            "without the dashes"
        )
    file = yaml_file.read(path)
    imported = litellm.convert(file) if litellm.is_litellm(file.value) else None
    loaded = imported.config if imported is not None else configuration.check(file)
    try:
        config = loaded.model_copy(update={"server": _server(own, loaded.server)})
    except ValidationError as error:
        raise ConfigurationError(_first_problem(error)) from None
    left_out = (*imported.left_out, *imported.notes) if imported is not None else ()
    return Request(config, (), path, own.check, own.verbose, False, left_out)


def _server(own: argparse.Namespace, base: Server) -> Server:
    """The server's part with what the command line says about it."""
    chosen = {name: getattr(own, name) for name in ("host", "port", "workers", "drain_seconds", "allowed_origins")}
    return Server.model_validate(
        base.model_dump() | {name: value for name, value in chosen.items() if value is not None}
    )


def _backend(named: str | None, own: argparse.Namespace) -> LocalBackend:
    model = own.model if named is None else named  # an empty one is a variable that was not set, not the bundled pair
    if own.no_speculation and (own.draft_model is not None or own.draft_tokens is not None):
        raise ConfigurationError("--no-speculation and a draft model exclude each other; keep one")
    if model is None:
        if own.draft_model:
            raise ConfigurationError("--draft-model needs the model that it drafts for; name it first")
        return _bundled(own)
    if own.draft_tokens is not None and own.draft_model is None:
        raise ConfigurationError("--draft-tokens needs --draft-model")
    drafting = None if own.draft_model is None else _drafted_by(own.draft_model, own)
    return LocalBackend(model=model, served_as=own.served_model_name, speculation=drafting)


def _drafted_by(model: str, own: argparse.Namespace) -> Speculation:
    tokens = DRAFT_TOKENS if own.draft_tokens is None else own.draft_tokens
    return Speculation(method="draft_model", model=model, tokens=tokens)


def _bundled(own: argparse.Namespace) -> LocalBackend:
    """The bundled pair. Eager: compiling it would take longer than most first tries last."""
    return LocalBackend(
        model="bundled:target",
        served_as=own.served_model_name or [BUNDLED_NAME],
        speculation=None if own.no_speculation else _drafted_by("bundled:draft", own),
        flags={"enforce-eager": True},
    )


def _refuse_moved_servers(engine_arguments: Sequence[str]) -> None:
    for argument in engine_arguments:
        name = argument.partition("=")[0].lstrip("-").replace("_", "-") if argument.startswith("--") else ""
        if name in _REFUSED:
            raise ConfigurationError(f"--{name} cannot be passed to an engine behind the gateway; {_REFUSED[name]}")


def _first_problem(error: ValidationError) -> str:
    details = error.errors()[0]
    place = str(details["loc"][-1]) if details["loc"] else ""
    flag = {"tokens": "--draft-tokens"}.get(place, "--" + place.replace("_", "-"))
    message = str(details["ctx"]["error"]) if details["type"] == "value_error" else details["msg"]
    return f"{flag}={details.get('input')!r}: {message[:1].lower()}{message[1:]}"
