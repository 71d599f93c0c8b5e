"""Writes docs/configuration.md from the descriptions of the fields; run it as a module, from the repository root."""

import argparse
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from tokenmill.engine.gateway import backend_section, config
from tokenmill.engine.gateway.governance.section import Governance
from tokenmill.engine.gateway.observability.section import Observability
from tokenmill.engine.gateway.router.section import Escalation, Routing, Rule
from tokenmill.engine.gateway.sections import Section
from tokenmill.engine.gateway.sensitivity.section import PresidioSection, Sensitivity

#: The sections in the order in which a reader meets them: (class, heading, where it stands in the file).
SECTIONS: tuple[tuple[type[Section], str, str], ...] = (
    (config.Config, "The file", ""),
    (config.Server, "`server`", ""),
    (config.Tier, "`tiers.NAME`", ""),
    (backend_section.Price, "`tiers.NAME.backends[].price`", ""),
    (backend_section.LocalBackend, "`tiers.NAME.backends[]`: a local vLLM server", "A backend without `url`."),
    (backend_section.Speculation, "`tiers.NAME.backends[].speculation`", ""),
    (backend_section.RemoteBackend, "`tiers.NAME.backends[]`: a server elsewhere", "A backend with `url`."),
    (Governance, "`governance`", ""),
    (Observability, "`observability`", ""),
    (Routing, "`routing`", "See [routing.md](routing.md)."),
    (Rule, "`routing.rules[]`", ""),
    (Escalation, "`routing.escalation`", ""),
    (Sensitivity, "`sensitivity`", "See [routing.md](routing.md)."),
    (PresidioSection, "`sensitivity.presidio`", ""),
)
INTRODUCTION = """\
# Configuration of `tokenmill serve`

<!-- Made from the field descriptions by `python -m tokenmill.engine.gateway.config_reference`; do not edit. -->

One YAML file describes the tiers and the servers behind each:

```
tokenmill serve CONFIG.yaml            # checks the file, then starts everything
tokenmill serve --check CONFIG.yaml    # only checks
```

`--host`, `--port`, `--workers` and `--drain-seconds` on the command line win over the file. Examples:
[tiny-pair.yaml](../examples/tiny-pair.yaml) is what `tokenmill serve` runs without arguments,
[tiers.yaml](../examples/tiers.yaml) has several tiers, [factory.yaml](../examples/factory.yaml) routes among them.

The file is read strictly. A wrong type, an unknown field, a key that stands twice, a tab or an unknown tag is
reported with its line and what to do about it. `no`, `on` and `010` are text, as in YAML 1.2. Anchors and aliases
may repeat a value, and `<<: *base` takes over the fields of a mapping that are not stated beside it.
"""


def markdown() -> str:
    """The text of docs/configuration.md."""
    parts = [INTRODUCTION]
    for section, heading, note in SECTIONS:
        intro = " ".join(part for part in ((section.__doc__ or "").strip(), note) if part)
        rows = ["| field | type | default | meaning |", "|---|---|---|---|"]
        rows += [_row(name, field) for name, field in section.model_fields.items()]
        parts.append("\n".join([f"## {heading}", "", intro, "", *rows, ""]))
    reserved = [f"| `{flag}` | {remedy} |" for flag, remedy in backend_section.RESERVED_FLAGS.items()]
    parts.append(
        "\n".join(["## Flags that are not vLLM's to decide here", "", "| flag | instead |", "|---|---|", *reserved, ""])
    )
    return "\n".join(parts)


def _row(name: str, field: FieldInfo) -> str:
    if field.is_required():
        default = "required"
    elif field.default is PydanticUndefined:
        default = "none"
    else:
        default = f"`{_yaml(field.default)}`"
    return f"| `{name}` | {_type(field)} | {default} | {field.description} |"


def _yaml(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _type(field: FieldInfo) -> str:
    """The type as a writer of YAML would say it, with its limits."""
    text = str(field.annotation)
    for ours, shown in (
        ("LocalBackend", "list of backends"),
        ("Tier]", "mapping of tiers"),
        ("Server", "section"),
        ("Speculation", "section"),
        ("Price", "section"),
        ("Governance", "section"),
        ("Routing", "section"),
        ("Escalation", "section"),
        ("Sensitivity", "section"),
        ("PresidioSection", "section"),
        ("[Rule", "list of rules"),
        ("section.Rule", "list of rules"),
        ("dict[str, typing.Literal", "mapping of actions"),
        ("list[typing.Literal['on", "list of zones"),
        ("Observability", "section"),
        ("bool", "true or false"),
        ("dict[str, str]", "mapping of texts"),
        ("dict[str", "mapping"),
        ("list[str]", "list of texts"),
    ):
        if ours in text:
            return shown
    if "Literal" in text:
        choices = text.partition("Literal[")[2].partition("]")[0].replace("'", "`")
        return choices.replace(", ", " or ")
    kind = next(
        shown for name, shown in (("int", "whole number"), ("float", "number"), ("str", "text")) if name in text
    )
    limits = {type(limit).__name__.lower(): limit for limit in field.metadata}
    low, high = limits.get("ge"), limits.get("le")
    if "gt" in limits:
        kind += f" above {limits['gt'].gt:g}"
    elif low is not None and high is not None:
        return f"{kind}, {low.ge:g} to {high.le:g}"
    elif low is not None:
        kind += f", at least {low.ge:g}"
    if high is not None:
        kind += f", at most {high.le:g}"
    return kind


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path, default=Path("docs/configuration.md"))
    parser.parse_args().file.write_text(markdown(), encoding="utf-8")
