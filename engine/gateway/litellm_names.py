"""The model names of a LiteLLM proxy's file: other names of a model, and the models that take over from it."""

from typing import Any

from tokenmill.engine.gateway.foreign_file import ForeignFile
from tokenmill.engine.gateway.wildcard import Wildcard
from tokenmill.engine.gateway.yaml_file import Place

#: What takes over from a model, named here as there.
_FALLBACKS = ("fallbacks", "context_window_fallbacks", "content_policy_fallbacks")
_SECTIONS = ("router_settings", "litellm_settings")  # the router's own win


class Names:
    """What the names in a file stand for.

    Args:
        source: The file.

    Attributes:
        tiers: Model name to tier, of those that are served.
    """

    def __init__(self, source: ForeignFile) -> None:
        self._source = source
        self.tiers: dict[str, str] = {}
        self._seen: dict[str, None] = {}
        self._ids: set[str] = set()

    def add(self, name: str, identity: Any) -> None:
        """A deployment stands in the file, served or not; `identity` is its `model_info.id`, if it has one."""
        self._seen[name] = None
        if identity is not None:
            self._ids.add(str(identity))

    def tier(self, place: Place, name: str) -> str | None:
        """The tier of the name that stands at a place; None where there is none, which is then listed."""
        tier = self.tiers.get(name)
        if tier is not None:
            return tier
        shown = repr(name[:60])
        if name in self._seen:
            self._source.leave(place, f"no deployment of {shown} can be served")
        elif name in self._ids:
            self._source.leave(place, f"{shown} is one deployment; name a model_name, which stands for all of it")
        elif any("*" in pattern and Wildcard(pattern).matches(name) for pattern in self._seen):
            self._source.leave(place, f"only a wildcard stands for {shown}; give it a model_name of its own")
        else:
            # LiteLLM serves such a file and fails where the name is needed.
            self._source.leave(place, f"{shown} is no model_name of this file; correct it, or add a deployment")
        return None


def alias(source: ForeignFile, names: Names, tiers: dict[str, dict[str, Any]]) -> None:
    """Gives models the other names of `model_group_alias`.

    Args:
        source: The file.
        names: The names in it; the others are added.
        tiers: The tiers, which are changed.
    """
    place: Place = ("router_settings", "model_group_alias")
    source.kind(place, dict, "a mapping of names")
    added: dict[str, str] = {}
    for other in source.keys(place):
        inside = isinstance(source.peek((*place, other)), dict)
        name = source.text((*place, other, "model") if inside else (*place, other))
        tier = None if name is None else names.tier((*place, other), name)
        if name is None or tier is None:
            continue
        added[other] = tier
        for backend in tiers[tier]["backends"]:
            if backend["models"]:
                backend["models"][other] = backend["models"].get(name, name)
    names.tiers = added | names.tiers


def fall_back(source: ForeignFile, names: Names, tiers: dict[str, dict[str, Any]]) -> None:
    """`fallbacks: [{model: [others]}]` and their kin, in either section.

    Args:
        source: The file.
        names: The names in it.
        tiers: The tiers, which are changed.
    """
    for field in _FALLBACKS:
        for section in _SECTIONS:
            place: Place = (section, field)
            source.kind(place, list, "a list like [{model: [another]}]")
            for index in source.keys(place):
                if source.kind((*place, index), dict, "a mapping like {model: [another]}") is None:
                    continue
                for name in source.keys((*place, index)):
                    at = (*place, index, name)
                    if name == "*":
                        _fall_back_all(tiers, field, _tiers(source, names, at))
                    elif (own := names.tier(at, name)) is not None:
                        others = [other for other in _tiers(source, names, at) if other != own]
                        if others:
                            tiers[own].setdefault(field, others)
    for section in _SECTIONS:
        _fall_back_all(tiers, "fallbacks", _tiers(source, names, (section, "default_fallbacks")))
        most = source.whole((section, "max_fallbacks"), 0, 100)
        for tier in tiers.values() if most is not None else ():
            tier.update({field: tier[field][:most] for field in _FALLBACKS if field in tier})


def _fall_back_all(tiers: dict[str, dict[str, Any]], field: str, others: list[str]) -> None:
    for name, tier in tiers.items():
        if others:
            tier.setdefault(field, [other for other in others if other != name])


def _tiers(source: ForeignFile, names: Names, place: Place) -> list[str]:
    """The tiers of a list of model names, each once."""
    source.kind(place, list, "a list of model names")
    found: dict[str, None] = {}
    for index in source.keys(place):
        at = (*place, index)
        if isinstance(source.peek(at), dict):
            source.leave(at, "a fallback with parameters of its own; name the model alone")
        elif (name := source.text(at)) is not None and (tier := names.tier(at, name)) is not None:
            found[tier] = None
    return list(found)
