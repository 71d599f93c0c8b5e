"""Reads LiteLLM's cost map where the user has it: what models cost, how much they take, what they can do.

The map is the file that LiteLLM publishes as `model_prices_and_context_window.json`. It is read from
`TOKENMILL_LITELLM_PRICES`, else from beside an installed `litellm` package, which is not imported. Nothing is fetched,
and no prices of our own stand in for it: they would go stale. Entries are found as LiteLLM's `get_model_info` finds
them (read in 1.108): by provider and model, then by the bare model, then by both without what makes a name special,
always without regard to case and only where the entry is of that provider.
"""

import importlib.util
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from tokenmill import env
from tokenmill.engine.gateway.config_problems import shown
from tokenmill.errors import ConfigurationError

#: What the package calls its copy of the map.
PACKAGED = "model_prices_and_context_window_backup.json"
#: LiteLLM fetches the map from here; we do not.
URL_VARIABLE = "LITELLM_MODEL_COST_MAP_URL"
#: Dollars for one token, both inclusive.
PRICE_LIMITS = (0.0, 1.0)
#: Tokens, both inclusive.
TOKEN_LIMITS = (0.0, 1e9)
#: The published map has 3 MB.
_MOST_BYTES = 64 << 20
#: Keys that are no models.
_RESERVED = frozenset({"sample_spec", "fallback_generalizations"})
_REMEDY = "name LiteLLM's model_prices_and_context_window.json"
#: A snapshot's date, and the owner, suffix and number of a fine-tuned model.
_DATE = re.compile(r"-\d{4}-\d{2}-\d{2}$")
_FINE_TUNED = re.compile(r"(:[^:]*){3}$")


@dataclass(frozen=True)
class Entry:
    """What the map says of one model.

    Attributes:
        name: Its key in the map.
        fields: As they stand there, unchecked.
    """

    name: str
    fields: Mapping[str, Any]

    @property
    def priced(self) -> bool:
        """Whether it states what a token costs, if only that it costs nothing."""
        return any(self.fields.get(name) is not None for name in ("input_cost_per_token", "output_cost_per_token"))


@dataclass
class CostMap:
    """A cost map.

    Attributes:
        path: Its file; None: there is none.
        stated: The user named the file, so that what is wrong in it is an error and not a note.
        models: Model to its entry.
        problems: What is wrong in what was asked for so far, one line each.
    """

    path: Path | None = None
    stated: bool = False
    models: Mapping[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._names = {name.lower(): name for name in self.models if name not in _RESERVED}

    def find(self, model: str, provider: str) -> Entry | None:
        """The entry of a model at a provider, e.g. of "gpt-4o" at "openai"; None where there is none."""
        plain = _plain(model)
        names = [f"{provider}/{model}", model, f"{provider}/{plain}", plain, f"{provider}/{provider}/{model}"]
        if provider == "fireworks_ai":
            names.append(f"{provider}/accounts/fireworks/models/{model}")
        return next(self._entries(names, provider), None)

    def find_base(self, base: str, provider: str) -> Entry | None:
        """The priced entry that a deployment at `provider` names as its `base_model`.

        That is first one of the deployment's own provider; the name's own provider may be another.
        """
        prefix, slash, rest = base.partition("/")
        # With its own provider's name in front, or without, it is the same model.
        own = self.find(rest if slash and prefix == provider else base, provider)
        if own is not None and own.priced:
            return own
        other = (self.find(rest, prefix) if slash else None) or next(self._entries([base, _plain(base)], None), None)
        return other if other is not None and other.priced else None

    def number(self, entry: Entry, name: str, limits: tuple[float, float]) -> float | None:
        """A number of an entry; None where there is none, and where it is unusable, which `problems` says."""
        value = entry.fields.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            self._problem(entry.name, f"{name} is {shown(value)}, not a number")
        elif not limits[0] <= value <= limits[1]:
            self._problem(entry.name, f"{name} is {value:g}, outside {limits[0]:g} to {limits[1]:g}")
        else:
            return float(value)
        return None

    def tokens(self, entry: Entry, name: str) -> int | None:
        """A number of tokens; zero is how the map writes that it is not known."""
        value = self.number(entry, name, TOKEN_LIMITS)
        if value is not None and value != int(value):
            self._problem(entry.name, f"{name} is {value:g}, not a whole number")
            return None
        return int(value) if value else None

    def flag(self, entry: Entry, name: str) -> bool:
        """True or false; false where nothing stands."""
        value = entry.fields.get(name)
        if value is not None and not isinstance(value, bool):
            self._problem(entry.name, f"{name} is {shown(value)}, not true or false")
        return value is True

    def text(self, entry: Entry, name: str) -> str | None:
        """A text; None where nothing stands."""
        value = entry.fields.get(name)
        if value is not None and not isinstance(value, str):
            self._problem(entry.name, f"{name} is {shown(value)}, not text")
            return None
        return value

    def _entries(self, names: list[str], provider: str | None) -> Iterator[Entry]:
        """The entries of these names, in their order, that are of this provider; None: of any."""
        for name in dict.fromkeys(names):
            known = name if name in self.models and name not in _RESERVED else self._names.get(name.lower())
            if known is None:
                continue
            fields = self.models[known]
            if not isinstance(fields, dict):
                self._problem(known, f"{shown(fields)} is not a mapping of fields")
            elif _of_provider(fields.get("litellm_provider"), provider):
                yield Entry(known, fields)

    def _problem(self, name: str, text: str) -> None:
        line = f"{self.path}: {name[:60]!r}: {text}; correct it there, or state the field in model_info"
        if line not in self.problems:
            self.problems.append(line)


def find() -> CostMap:
    """The map that is in force: the file that the user named, else an installed package's, else an empty one.

    Raises:
        ConfigurationError: The named file cannot be read or is no cost map. The same of a package's file is a line in
            the map's `problems`.
    """
    named = env.LITELLM_PRICES.get()
    if named is not None:
        try:
            return CostMap(named, stated=True, models=_read(named))
        except ValueError as error:
            raise ConfigurationError(f"{env.LITELLM_PRICES.name}={named}: {error}; {_REMEDY}") from None
    path = installed()
    if path is None:
        return CostMap()
    try:
        return CostMap(path, models=_read(path))
    except ValueError as error:
        problem = f"{path}: {error}; no price is taken from it; set {env.LITELLM_PRICES.name} to another copy"
        return CostMap(problems=[problem])


def installed() -> Path | None:
    """The copy of the map in an installed `litellm` package; None where there is none."""
    try:
        package = importlib.util.find_spec("litellm")
    except ValueError:  # something else of that name was put into sys.modules
        return None
    folders = [] if package is None else list(package.submodule_search_locations or ())
    return next((path for path in (Path(folder) / PACKAGED for folder in folders) if path.is_file()), None)


def _read(path: Path) -> dict[str, Any]:
    """The models of a file; raises ValueError that says what is wrong with it."""
    try:
        with path.open("rb") as file:
            raw = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise ValueError(f"it cannot be read: {(error.strerror or str(error)).lower()}") from None
    if len(raw) > _MOST_BYTES:
        raise ValueError(f"it has more than {_MOST_BYTES} bytes, too many for a cost map")
    try:
        value = orjson.loads(raw.removeprefix(b"\xef\xbb\xbf"))
    except orjson.JSONDecodeError as error:
        raise ValueError(f"it is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"it holds {shown(value)}, not a mapping of models")
    return value


def _plain(model: str) -> str:
    """A model's name without a snapshot's date, or without what a customer's fine-tuning added to it."""
    return _FINE_TUNED.sub("", model) if "ft:" in model else _DATE.sub("", model)


def _of_provider(stated: Any, provider: str | None) -> bool:
    """Whether an entry's provider is the one asked for; one without a provider is everybody's."""
    if stated is None or provider in (None, "litellm_proxy"):
        return True
    return stated == provider or (provider == "fireworks_ai" and str(stated).startswith(provider))
