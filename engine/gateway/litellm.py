"""Reads the YAML file of a LiteLLM proxy as it is, and makes our configuration of it.

Each `model_name` becomes a tier of that name, its deployments the tier's backends. Everything in the file is either
used or listed, with its line and the reason; nothing is dropped silently. The fields are those that LiteLLM documents
(docs.litellm.ai: proxy/configs, proxy/config_settings, proxy/reliability, routing).
"""

import os
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from tokenmill import env
from tokenmill.engine.gateway import litellm_include, litellm_observability, litellm_prices, litellm_reasons
from tokenmill.engine.gateway.admin.duration import milliseconds
from tokenmill.engine.gateway.config import Config, Server
from tokenmill.engine.gateway.foreign_file import ForeignFile, dotted, shown
from tokenmill.engine.gateway.governance.options import MAKE_A_KEY, SHORTEST_MASTER_KEY
from tokenmill.engine.gateway.governance.section import Governance
from tokenmill.engine.gateway.litellm_deployments import Deployments, in_words
from tokenmill.engine.gateway.litellm_models import Describer
from tokenmill.engine.gateway.litellm_names import Names, alias, fall_back
from tokenmill.engine.gateway.litellm_prices import CostMap
from tokenmill.engine.gateway.yaml_file import Place, YamlFile
from tokenmill.errors import InputError

#: Strategies that ours stands in for: by weight, and by open requests.
_STRATEGIES = ("simple-shuffle", "least-busy")
_WEIGHTS = ("weight", "rpm", "tpm")
#: Of another's weight so much has who gets nothing while that one can take it.
_SPARE = 1e-9
_MASTER_KEY: Place = ("general_settings", "master_key")
#: Most lines that one remark names.
_MOST_LINES = 10
_MASTER_VARIABLE = "LITELLM_MASTER_KEY"
_ORIGINS_VARIABLE = "LITELLM_CORS_ORIGINS"


@dataclass(frozen=True)
class Imported:
    """What became of a file.

    Attributes:
        config: Our configuration.
        left_out: `file:line: field: reason`, one line for each thing that was not understood, or means something else.
        notes: Where prices come from, what is wrong there, which models have none, and a master key that can be
            guessed, one line each.
    """

    config: Config
    left_out: tuple[str, ...]
    notes: tuple[str, ...] = ()


#: Fields of a LiteLLM proxy's file that ours does not have.
_SECTIONS = frozenset({"model_list", "litellm_settings", "router_settings", "general_settings", "include"})


def is_litellm(value: Any) -> bool:
    """Whether a parsed file is a LiteLLM proxy's and not ours."""
    return isinstance(value, dict) and "tiers" not in value and not _SECTIONS.isdisjoint(value)


def convert(file: YamlFile) -> Imported:
    """Makes our configuration of a LiteLLM proxy's file that was read; what it does not state is in LiteLLM's cost map.

    Raises:
        ConfigurationError: It cannot be used, or the cost map that the user named cannot; one line
            `file:line: field: problem` for each thing that is wrong.
    """
    file = litellm_include.included(file)
    source = ForeignFile(file)
    prices = litellm_prices.find()
    describer = Describer(source, prices)
    document = _Importer(source, describer).document()
    source.check(prices.problems if prices.stated else ())
    imported = Config.model_validate(document)
    of_the_map = list(_url_is_not_fetched(source, prices))
    for name in source.not_asked():
        source.leave(("environment_variables", name), "nothing here reads this variable")
    lines = [*_left_over(source), *_repeated(file), *of_the_map]
    governance = imported.governance
    notes = [*describer.notes(governed=governance is not None)]
    if governance is not None and governance.guessable_master_key:
        where = f"{file.where(_MASTER_KEY)}: {dotted(_MASTER_KEY)}"
        notes.append(f"{where}: fewer than {SHORTEST_MASTER_KEY} characters: can be guessed; {MAKE_A_KEY}")
    return Imported(imported, tuple(lines), tuple(notes))


def _left_over(source: ForeignFile) -> Iterator[str]:
    """A line for each thing that was not taken as it is; what holds of several deployments' fields is said once."""
    same: dict[tuple[Place, str], list[Place]] = {}
    for place, reason in source.left_over():
        field = place[2:] if place[0] == "model_list" else ()
        same.setdefault((field or place, reason), []).append(place)
    for (_, reason), (place, *others) in same.items():
        where = source.file.where(place)
        lines = [source.file.where(other).removeprefix(f"{where.rpartition(':')[0]}:") for other in others]
        more = f" and {len(lines) - _MOST_LINES} more" if len(lines) > _MOST_LINES else ""
        also = f"; also on line {', '.join(lines[:_MOST_LINES])}{more}" if lines else ""
        yield f"{where}: {dotted(place)}: {_told(source, place, reason)}{also}"


def _told(source: ForeignFile, place: Place, reason: str) -> str:
    """What became of something that was not taken as it is."""
    deployment = len(place) == 2 and place[0] == "model_list"
    if not deployment or not reason:
        return reason or "not understood"
    name = source.peek((*place, "model_name"))
    return f"{shown(name)} is left out; {reason}" if isinstance(name, str) else f"left out; {reason}"


def _repeated(file: YamlFile) -> Iterator[str]:
    """A line for each key that stands more than once; LiteLLM takes the last."""
    for place, lines in file.repeated.items():
        path, last = file.paths.get(place, file.path), file.lines.get(place)
        for line in lines:
            yield f"{path}:{line}: {dotted(place)}: stands again on line {last}, which counts; this does not"


def _url_is_not_fetched(source: ForeignFile, prices: CostMap) -> Iterator[str]:
    """A line for the variable by which LiteLLM fetches its cost map; its value may hold a password."""
    name = litellm_prices.URL_VARIABLE
    if source.lookup(name):
        used = f"{prices.path} is read instead" if prices.path is not None else "download it"
        remedy = "" if prices.stated else f"; set {env.LITELLM_PRICES.name} to a copy of it"
        yield f"{name}: no cost map is fetched; {used}{remedy}"


class _Importer:
    """One file on its way to our format."""

    def __init__(self, source: ForeignFile, describer: Describer) -> None:
        self._source = source
        self._describer = describer
        self._names = Names(source)

    def document(self) -> dict[str, Any]:
        """The file in our format."""
        source = self._source
        for place in (("litellm_settings",), ("router_settings",), ("general_settings",), ("environment_variables",)):
            source.kind(place, dict, "a mapping of settings")
        source.environment = self._environment()
        groups = self._groups(Deployments(source, self._describer))
        served = self._names.tiers
        tiers: dict[str, dict[str, Any]] = {served[name]: {"backends": backends} for name, backends in groups.items()}
        if not tiers and not source.problems:
            self._nothing_is_served()
        alias(source, self._names, tiers)
        fall_back(source, self._names, tiers)
        document: dict[str, Any] = {"server": self._server(), "tiers": tiers}
        document |= self._governance()
        if observability := litellm_observability.section(source, "governance" in document):
            document["observability"] = observability
        litellm_reasons.leave(source)
        return document

    def _nothing_is_served(self) -> None:
        """Says why, of each deployment."""
        place: Place = ("model_list",)
        reasons = [(at, why) for at, why in self._source.left_over() if at[:1] == place and why]
        none = "no deployment can be served; add one (models that LiteLLM keeps in its database are not read)"
        for at, why in reasons or [(place, none)]:
            self._source.problem(at, why)

    def _environment(self) -> dict[str, str]:
        """`environment_variables`; numbers and truth values are written as LiteLLM writes them."""
        source = self._source
        found: dict[str, str] = {}
        for name in source.keys(("environment_variables",)):
            place: Place = ("environment_variables", name)
            value, variable = source.peek(place), source.variable(place)
            if variable is not None and not os.environ.get(variable, "").strip():
                source.leave(place, f"the variable {variable[:60]} is not set")
            elif isinstance(value, bool):
                source.raw(place)
                found[name] = str(value)
            elif (text := source.text(place)) is not None:
                found[name] = text
        return found

    def _groups(self, deployments: Deployments) -> dict[str, list[dict[str, Any]]]:
        """Deployments by model name, in the order of the file."""
        source = self._source
        groups: dict[str, list[dict[str, Any]]] = {}
        source.kind(("model_list",), list, "a list of deployments")
        weighed: dict[str, list[Place]] = {}
        for index in source.keys(("model_list",)):
            place: Place = ("model_list", index)
            # As LiteLLM does it: the others come up.
            with source.for_one(place) as wrong:
                name = self._name(place)
                backends = [] if name is None else deployments.backends(place, name)
            for served, backend in () if wrong else backends:
                groups.setdefault(served, []).append(backend)
                weighed.setdefault(served, []).append((*place, "litellm_params"))
        for name, places in weighed.items():
            self._names.tiers[name] = _tier_name(name, self._names.tiers.values())
            self._weigh(places, groups[name])
        return groups

    def _name(self, place: Place) -> str | None:
        """A deployment's `model_name`; None where it has none."""
        source = self._source
        if source.kind(place, dict, "a deployment with model_name and litellm_params") is None:
            return None
        name = source.text((*place, "model_name"))
        if name:
            self._names.add(name, source.peek((*place, "model_info", "id")))
        elif source.peek((*place, "model_name")) in (None, ""):
            source.problem(place, "model_name is missing; add it")
        return name or None

    def _weigh(self, places: list[Place], backends: list[dict[str, Any]]) -> None:
        """LiteLLM shares a group's load by weight, else by rpm, else by tpm.

        Beside a weight, one of 0 or none at all gets nothing while the others can take it. What has no rpm or tpm is
        not limited, so these count only where every deployment states them. Of a higher `order` than another, a
        deployment gets what that one cannot take.
        """
        source = self._source
        for field in _WEIGHTS:
            values = [source.number((*place, field), 0, 1e12) for place in places]
            stated = [value for value in values if value]
            if len(places) > 1 and (all(values) or (field == "weight" and stated)):
                for backend, value in zip(backends, values, strict=True):
                    backend["weight"] = value or min(stated) * _SPARE
                break
        orders = [source.number((*place, "order"), -1e9, 1e9) for place in places]
        ranks = sorted({order for order in orders if order is not None})
        for backend, order in zip(backends, orders, strict=True):
            # Of each order's load the next one gets so much; who states none comes last.
            behind = 0 if not ranks else ranks.index(order) if order is not None else len(ranks)
            if behind:
                backend["weight"] = backend.get("weight", 1.0) * _SPARE**behind
            if "weight" in backend:
                backend["weight"] = max(backend["weight"], sys.float_info.min)

    def _server(self) -> dict[str, Any]:
        source = self._source
        found: dict[str, Any] = {}
        for section in ("router_settings", "litellm_settings"):  # the router's own win
            allowed = source.whole((section, "allowed_fails"), 0, 99_999)
            read = {
                # Where LiteLLM reads 0 seconds, it takes its own default.
                "read_timeout_seconds": source.number((section, "timeout"), 0, 86_400)
                or source.number((section, "request_timeout"), 0, 86_400)
                or None,
                "retries": source.whole((section, "num_retries"), 0, 100),
                # So many are allowed; the next one opens the circuit.
                "breaker_failures": None if allowed is None else allowed + 1,
                "breaker_cooldown_seconds": source.number((section, "cooldown_time"), 0, 86_400) or None,
            }
            found = {name: value for name, value in read.items() if value is not None} | found
        size = source.number(("general_settings", "max_request_size_mb"), 0.001, 4096)
        default = source.text(("general_settings", "completion_model"))
        if default is not None and self._names.tier(("general_settings", "completion_model"), default) is None:
            default = None
        found |= self._origins()
        found |= {} if size is None else {"max_body_mb": size}
        found |= {} if default is None else {"default_model": default}
        strategy = source.text(("router_settings", "routing_strategy"))
        if strategy is not None and strategy not in _STRATEGIES:
            source.leave(
                ("router_settings", "routing_strategy"),
                "shares follow the weights, and open requests; of equal ones the backend with the fewest is taken",
            )
        return found

    def _origins(self) -> dict[str, Any]:
        """LiteLLM has no field for web pages that may use it, but a variable, and without it lets all of them."""
        said = self._source.lookup(_ORIGINS_VARIABLE) or ""
        origins = [origin for part in said.split(",") if (origin := part.strip())]
        try:
            Server(allowed_origins=origins)
        except ValidationError as error:
            self._source.problem(("model_list",), f"{_ORIGINS_VARIABLE}: {in_words(error.errors()[0])}")
            return {}
        return {"allowed_origins": origins} if origins else {}

    def _governance(self) -> dict[str, Any]:
        """A master key means keys and budgets."""
        source = self._source
        variable = source.variable(_MASTER_KEY)
        named: dict[str, Any]
        if variable is not None and source.inside(variable) is None:
            source.raw(_MASTER_KEY)
            key = os.environ.get(variable, "").strip()
            named = {"master_key_env": variable}
        else:
            found = source.text(_MASTER_KEY)
            if found is None:
                # Where the file has none, LiteLLM's variable counts: a gateway without keys would be open to all.
                found = source.lookup(_MASTER_VARIABLE)
            if found is None:
                self._refuse_lost_key()
                return {}
            key = found
            named = {"master_key": key}
        section: dict[str, Any] = {"store": self._store(), **named}
        # LiteLLM's own documentation has `sk-1234`: such a file is taken, too, and told so.
        section["guessable_master_key"] = 0 < len(key) < SHORTEST_MASTER_KEY
        days = source.text(("general_settings", "maximum_spend_logs_retention_period"))
        if days is not None:
            try:
                section["retention_days"] = max(1, milliseconds(days) // 86_400_000)
            except InputError as error:
                source.problem(("general_settings", "maximum_spend_logs_retention_period"), str(error))
        return {"governance": section}

    def _refuse_lost_key(self) -> None:
        """Where a line further down has undone the master key, the gateway would be open without anybody's wish."""
        file = self._source.file
        for place in (_MASTER_KEY, _MASTER_KEY[:1]):
            if place in file.repeated and _MASTER_KEY in file.lines:
                self._source.problem(
                    place,
                    "stands twice, and the last has no master_key, so everybody could ask for everything; keep one",
                )

    def _store(self) -> str:
        """Where keys and books are kept: as the user says, else beside the file."""
        said = env.STORE.get()
        if said is not None:
            try:
                Governance(store=said)
            except ValidationError as error:
                self._source.problem(_MASTER_KEY, f"{env.STORE.name}: {in_words(error.errors()[0])}")
            return said
        path = self._source.file.path.with_suffix(".db")
        folder = path.absolute().parent
        if not os.access(folder, os.W_OK):
            self._source.problem(
                _MASTER_KEY,
                f"keys and books would be kept in {path}, and {folder} cannot be written to; set {env.STORE.name} to "
                "the path of another file or to postgresql://user@host/database",
            )
        return str(path)


def _tier_name(name: str, taken: Iterable[str]) -> str:
    """A model's name as the name of a tier: plain characters, unique."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._")[:56] or "all"
    taken = set(taken)
    numbered = (plain if number == 1 else f"{plain}-{number}" for number in range(1, len(taken) + 2))
    return next(candidate for candidate in numbered if candidate not in taken)
