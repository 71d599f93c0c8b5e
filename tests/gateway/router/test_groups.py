"""What is worked out once about a group of backends, and for how long it is kept."""

import gc
import weakref

from tokenmill.engine.gateway.backends import Backend
from tokenmill.engine.gateway.money import Prices
from tokenmill.engine.gateway.portfolio import Portfolio
from tokenmill.engine.gateway.principal import Principal
from tokenmill.engine.gateway.router.groups import MOST_KNOWN, Groups
from tokenmill.engine.gateway.settings import Settings


def backend(name: str, price: int = 1_000_000, quality: float | None = 0.9, zone: str = "on-premises") -> Backend:
    return Backend(name, "http://127.0.0.1:9", "t", (name,), prices=Prices(price), quality=quality, zone=zone)  # type: ignore[arg-type] # a word of three


def test_what_is_known_of_a_group() -> None:
    portfolio = Portfolio(
        [backend("far", 1_000_000, 0.8, "cloud"), backend("a", 3_000_000), backend("b", 2_000_000)], Settings()
    )
    groups = Groups(portfolio, "auto")
    group = groups.of(portfolio.tiers["t"])
    assert groups.of(tuple(portfolio.targets)) is group
    assert [[target.backend.name for target in zone.targets] for zone in group.zones] == [["a", "b"], ["far"]]
    assert (group.quality, group.cost(10, 0)) == (0.8, 10)
    assert (group.zones[0].quality, group.zones[0].cost(10, 0)) == (0.9, 20)
    assert [[target.backend.name for target in part] for part in group.route.parts] == [["a", "b"], ["far"]]
    assert (group.route.targets, group.route.model, group.route.why) == (sum(group.route.parts, ()), None, "auto")
    unstated = Portfolio([backend("a"), backend("b", quality=None)], Settings())
    assert Groups(unstated, "auto").of(unstated.targets).quality == 0


def test_canaries_stand_apart_and_anew_when_their_share_changes() -> None:
    portfolio = Portfolio([backend("here"), backend("far", zone="cloud"), backend("new", zone="edge")], Settings())
    groups = Groups(portfolio, "auto")

    def shown() -> tuple[list[list[str]], list[str]]:
        route = groups.of(portfolio.tiers["t"]).route
        return [[one.backend.name for one in part] for part in route.parts], [
            one.backend.name for one in route.canaries
        ]

    assert shown() == ([["here"], ["new"], ["far"]], [])
    portfolio.set_canary("new", 0.2)
    assert shown() == ([["here"], ["far"]], ["new"])
    portfolio.set_canary("new", 0)
    assert shown() == ([["here"], ["far"]], []), "rolled back: nothing is sent there, nothing reserved at its price"
    portfolio.set_canary("new", None)
    assert shown() == ([["here"], ["new"], ["far"]], [])


def test_what_a_key_may_use_is_worked_out_once() -> None:
    portfolio = Portfolio([backend("a"), Backend("b", "http://127.0.0.1:9", "t", prefix="far/")], Settings())
    a, b = portfolio.targets
    groups, one = Groups(portfolio, "auto"), Principal("k", models=("auto", "far/*"))
    other = Principal("k2", models=("auto", "a"))
    assert groups.allowed(portfolio.targets, one) is None
    b.catalog = {"first": {}, "second": {}}
    portfolio.index()
    group = groups.allowed(portfolio.targets, one)
    assert group is not None
    assert (group.targets, group.route.model, b.own_model(None)) == ((b,), "far/first", "first")
    assert groups.allowed(portfolio.targets, Principal("k3", models=one.models)) is group
    theirs = groups.allowed(portfolio.targets, other)
    assert theirs is not None
    assert (theirs.targets, theirs.route.model) == ((a,), "a")
    assert groups.allowed((b,), other) is None
    for number in range(2 * MOST_KNOWN):
        groups.allowed(portfolio.targets, Principal("k", models=(f"m{number}",)))
    assert len(groups._of_keys) <= MOST_KNOWN + 1
    b.catalog = {"second": {}}
    portfolio.index()
    again = groups.allowed(portfolio.targets, one)
    assert again is not None
    assert again.route.model == "far/second"


def test_nothing_is_kept_of_backends_that_were_replaced() -> None:
    portfolio = Portfolio([backend("old")], Settings())
    groups = Groups(portfolio, "auto")
    groups.of(portfolio.tiers["t"])
    old = weakref.ref(portfolio.targets[0])
    portfolio.replace([backend("new")])
    assert groups.of(portfolio.tiers["t"]).targets[0].backend.name == "new"
    gc.collect()
    assert old() is None
