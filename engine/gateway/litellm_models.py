"""What a deployment in a LiteLLM proxy's file costs, takes and can do: as the file states, else as the cost map does.

The file always wins, field by field.
"""

from collections.abc import Iterator
from typing import Any

from tokenmill import env
from tokenmill.engine.gateway.foreign_file import ForeignFile, dotted
from tokenmill.engine.gateway.litellm_prices import PRICE_LIMITS, CostMap, Entry
from tokenmill.engine.gateway.yaml_file import Place

#: What a model's description says it can do, and what we call it.
_CAPABILITIES = {
    "supports_function_calling": "tools",
    "supports_vision": "vision",
    "supports_audio_input": "audio",
    "supports_response_schema": "json",
}
_MODES = {"embedding": "embeddings", "rerank": "rerank"}
#: Where prices may stand, the more important first.
_SECTIONS = ("litellm_params", "model_info")
_PRICES = {
    "input_cost_per_token": "input",
    "cache_read_input_token_cost": "cached",
    "cache_creation_input_token_cost": "written",
    "cache_creation_input_token_cost_above_1hr": "written_hour",
    "output_cost_per_token": "output",
}
_WRITING = ("written", "written_hour")


class Describer:
    """Describes the deployments of one file, and knows which of them have no price."""

    def __init__(self, source: ForeignFile, prices: CostMap) -> None:
        self._source = source
        self._map = prices
        self._unpriced: dict[str, Place] = {}  # model_name to its first deployment without a price
        self._from_map: dict[str, None] = {}  # model_names with a price of the map

    def describe(self, place: Place, name: str, provider: str, upstream: str) -> dict[str, Any]:
        """Fields of a backend.

        Args:
            place: Of the deployment.
            name: Its `model_name`.
            provider: Who serves it, as LiteLLM's prefixes say.
            upstream: The provider's own name of the model; with a `*` it is no certain model.
        """
        source = self._source
        parameters, info = (*place, "litellm_params"), (*place, "model_info")
        source.kind(info, dict, "a mapping")
        named = [source.text((*where, "base_model")) for where in (info, parameters)]
        base = next((one for one in named if one), None)
        own = None if "*" in upstream else self._map.find(upstream, provider)
        like = None if base is None else self._map.find_base(base, provider)
        about = own or like
        return {
            "price": self._price(place, name, like or own) or None,
            "capabilities": self._capabilities(info, about) or None,
            "context_window": self._tokens(info, about, "max_input_tokens"),
            "max_output_tokens": self._tokens(info, about, "max_output_tokens"),
            "version": source.text((*info, "version")),
        }

    def notes(self, governed: bool) -> Iterator[str]:
        """What the user should know about prices, one line each.

        Args:
            governed: There are budgets, which bind nothing that costs nothing.
        """
        if not self._map.stated:  # a stated map's problems are errors
            yield from self._map.problems
        if self._from_map:
            names = ", ".join(repr(name[:60]) for name in self._from_map)
            yield f"{self._map.path}: the prices of {names} come from here"
        if not governed:
            return
        remedy = "state input_cost_per_token and output_cost_per_token"
        if self._map.path is None:
            remedy += f", or set {env.LITELLM_PRICES.name} to LiteLLM's cost map"
        if self._unpriced:
            place = next(iter(self._unpriced.values()))
            names = ", ".join(repr(name[:60]) for name in self._unpriced)
            where = f"{self._source.file.where(place)}: {dotted(place)}"
            yield f"{where}: no price of {names}: they cost nothing, budgets do not bind; {remedy}"

    def _price(self, place: Place, name: str, entry: Entry | None) -> dict[str, float]:
        """Dollars per million tokens; what a deployment costs may stand in `litellm_params`, too."""
        stated: dict[str, float] = {}
        found: dict[str, float] = {}
        for theirs, ours in _PRICES.items():
            both = [self._source.number((*place, section, theirs), *PRICE_LIMITS) for section in _SECTIONS]
            price = next((one for one in both if one is not None), None)
            if price is not None:
                stated[ours] = price * 1e6
            elif entry is not None and (price := self._map.number(entry, theirs, PRICE_LIMITS)) is not None:
                found[ours] = price * 1e6
        if "cached" in found and "input" in stated:
            # Whoever states a low price for tokens does not mean that those in a cache cost more.
            found["cached"] = min(found["cached"], stated["input"])
        for ours in _WRITING:
            # Else it goes by `input`; zero is how the map writes that it is not known.
            if "input" in stated or not found.get(ours):
                found.pop(ours, None)
        if found:
            self._from_map[name] = None
        both_ways = found | stated
        if "input" not in both_ways and "output" not in both_ways:
            self._unpriced.setdefault(name, place)
        return both_ways

    def _capabilities(self, info: Place, entry: Entry | None) -> list[str]:
        source = self._source
        found = []
        for theirs, ours in _CAPABILITIES.items():
            able = source.flag((*info, theirs))
            if source.peek((*info, theirs)) is None and entry is not None:
                able = self._map.flag(entry, theirs)
            if able:
                found.append(ours)
        mode = source.text((*info, "mode"))
        if mode is None and entry is not None:
            mode = self._map.text(entry, "mode")
        return [*found, _MODES[mode]] if mode in _MODES else found

    def _tokens(self, info: Place, entry: Entry | None, name: str) -> int | None:
        stated = self._source.whole((*info, name), 1, 10**9)
        if self._source.peek((*info, name)) is not None or entry is None:
            return stated
        return self._map.tokens(entry, name)
