"""Choice among backends, without any network."""

from collections import Counter, deque

import pytest

from tokenmill.engine.gateway.affinity import BLOCK_BYTES, PrefixTable, prompt_blocks
from tokenmill.engine.gateway.backends import Backend
from tokenmill.engine.gateway.balance import IMBALANCE, Balancer, refusal
from tokenmill.engine.gateway.body import Body
from tokenmill.engine.gateway.pipeline import Exchange
from tokenmill.engine.gateway.portfolio import Portfolio, Route, Target
from tokenmill.engine.gateway.principal import Principal
from tokenmill.engine.gateway.settings import Settings

SETTINGS = Settings(breaker_failures=2)


def portfolio(*backends: Backend) -> tuple[Portfolio, Route]:
    """All backends up, and the route to model `m`."""
    made = Portfolio(backends, SETTINGS)
    for target in made.targets:
        target.mark_up()
    return made, made.routes("m")[0]


def backend(name: str, **more: object) -> Backend:
    """A backend of tier `t` that serves `m`."""
    return Backend(name, f"http://{name}:1", "t", ("m",), **more)  # type: ignore[arg-type]


def ask(prompt: str = "short") -> Exchange:
    """A request with this prompt."""
    raw = b'{"model":"m","prompt":"%s"}' % prompt.encode()
    return Exchange("/v1/completions", [], raw, body=Body(raw), model="m", request_id="r", forward=[])


def test_load_is_even_where_weights_are() -> None:
    _, route = portfolio(backend("a"), backend("b"))
    balancer = Balancer()
    for _ in range(400):
        target = balancer.choose(route, ask())
        assert target is not None
        target.outstanding += 1
    assert [target.outstanding for target in route.targets] == [200, 200]


@pytest.mark.parametrize("at_once", [1, 2, 10, 400])
def test_load_follows_weights(at_once: int) -> None:
    _, route = portfolio(backend("a", weight=3), backend("b"))
    balancer = Balancer()
    counts: Counter[str] = Counter()
    open_ones: deque[Target] = deque()
    for _ in range(4000):
        if len(open_ones) == at_once:
            open_ones.popleft().outstanding -= 1
        target = balancer.choose(route, ask())
        assert target is not None
        target.outstanding += 1
        open_ones.append(target)
        counts[target.backend.name] += 1
    assert abs(counts["a"] / 4000 - 0.75) < 0.1


def test_a_backend_of_nearly_no_weight_is_a_spare() -> None:
    _, route = portfolio(backend("a", max_concurrency=2), backend("spare", weight=1e-9))
    first, spare = route.targets
    balancer = Balancer()
    long = ask("the same long prompt " * 100)
    first.outstanding = 2
    assert balancer.choose(route, long) is spare
    first.outstanding = 1
    # It has the prompt's beginning now, and still gets nothing.
    assert {balancer.choose(route, asked) for asked in (long, ask()) for _ in range(50)} == {first}


def test_down_full_and_broken_backends_are_not_asked() -> None:
    made, route = portfolio(backend("down"), backend("full", max_concurrency=1), backend("broken"), backend("good"))
    down, full, broken, good = made.targets
    down.mark_down("gone")
    full.outstanding = 1
    broken.breaker("m").failed()
    broken.breaker("m").failed()
    balancer = Balancer()
    assert {balancer.choose(route, ask()) for _ in range(50)} == {good}
    assert balancer.choose(route, ask(), tried=[good]) is None
    error = refusal([route], SETTINGS)
    assert error.status == 429  # `good` could serve but for having been tried; `full` is the one that may free up
    full.mark_down("gone")
    good.mark_down("gone")
    error = refusal([route], SETTINGS)
    assert (error.status, dict(error.headers)[b"retry-after"]) == (503, b"2")


def test_a_model_that_fails_does_not_take_its_neighbour_down() -> None:
    made = Portfolio([Backend("a", "http://a", "t", ("m", "n"))], SETTINGS)
    target = made.targets[0]
    target.mark_up()
    for _ in range(2):
        target.breaker("m").failed()
    balancer = Balancer()
    assert balancer.choose(made.routes("m")[0], ask()) is None
    assert balancer.choose(made.routes("n")[0], ask()) is target


def test_a_model_has_one_circuit_by_whatever_name_it_is_asked() -> None:
    made = Portfolio([Backend("a", "http://a", "t", ("m", "alias", "n"), {"m": "own", "alias": "own"})], SETTINGS)
    target = made.targets[0]
    target.mark_up()
    target.breaker(made.routes("t")[0].model).failed()
    target.breaker(made.routes("alias")[0].model).failed()
    balancer = Balancer()
    assert [balancer.choose(made.routes(name)[0], ask()) for name in ("t", "m", "alias")] == [None] * 3
    assert balancer.choose(made.routes("n")[0], ask()) is target
    assert target.open_circuits() == ["own"]


@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_canary_gets_its_share(share: float) -> None:
    _, route = portfolio(backend("old"), backend("new", canary=share))
    balancer = Balancer()
    counts = Counter(target.backend.name for _ in range(4000) if (target := balancer.choose(route, ask())))
    assert abs(counts["new"] / 4000 - share) < 0.03
    assert counts.total() == 4000


@pytest.mark.parametrize("others", ["full", "tried"])
def test_a_share_is_a_cap_while_others_are_up(others: str) -> None:
    _, route = portfolio(backend("old", max_concurrency=1), backend("new", canary=0.1))
    old, new = route.targets
    balancer = Balancer()
    old.outstanding = 1 if others == "full" else 0
    tried = [] if others == "full" else [old]
    counts = Counter(balancer.choose(route, ask(), tried) for _ in range(4000))
    assert set(counts) == ({new, None} if others == "full" else {None})
    assert abs(counts[new] / 4000 - (0.1 if others == "full" else 0)) < 0.03
    if others == "full":
        assert refusal([route], SETTINGS).status == 429
    assert balancer.choose(route, ask(), tried=[new]) is (None if others == "full" else old)


@pytest.mark.parametrize("others", ["down", "circuit"])
def test_a_canary_answers_where_nobody_else_is_up(others: str) -> None:
    _, route = portfolio(backend("old"), backend("off", canary=0), backend("new", canary=0.1))
    old, new = route.targets
    balancer = Balancer()
    if others == "down":
        old.mark_down("gone")
    else:
        old.breaker("m").failed()
        old.breaker("m").failed()
    assert {balancer.choose(route, ask(), tried=tried) for _ in range(50) for tried in ([], [old])} == {new}


def test_parts_are_asked_one_after_the_other() -> None:
    made, whole = portfolio(backend("near", max_concurrency=2), backend("far"), backend("new", canary=0.2))
    near, far, new = made.targets
    route = Route(whole.targets, "m", parts=((near,), (far,)))
    balancer = Balancer()
    counts = Counter(balancer.choose(route, ask()) for _ in range(4000))
    assert set(counts) == {near, new}
    near.outstanding = 2
    assert set(Counter(balancer.choose(route, ask()) for _ in range(400))) == {far, new}
    assert route.only((far, new)).parts == ((far,),)
    assert route.only((new,)).parts == ((),)


def test_canary_is_rolled_back_and_promoted_at_once() -> None:
    made, route = portfolio(backend("old"), backend("new", canary=1.0))
    balancer = Balancer()
    made.set_canary("new", 0)
    assert {target.backend.name for _ in range(50) if (target := balancer.choose(route, ask()))} == {"old"}
    made.targets[0].mark_down("gone")
    assert balancer.choose(route, ask()) is None
    made.set_canary("new", None)
    assert balancer.choose(route, ask()) is made.targets[1]
    with pytest.raises(KeyError):
        made.set_canary("nobody", 0.5)


def test_a_rolled_back_canary_is_on_no_route() -> None:
    """What is on a route is paid for beforehand at the dearest one's price."""
    settings = Settings(fallbacks={"u": ("t",)})
    others = (Backend("u", "http://u:1", "u", ("u",)), backend("old"))
    made = Portfolio([*others, backend("new", canary=0.2)], settings)

    def names() -> list[set[str]]:
        routes = [made.routes("m")[0], made.routes("t")[0], made.routes("u")[1]]
        return [{target.backend.name for target in route.targets} for route in routes]

    assert names() == [{"old", "new"}] * 3
    made.set_canary("new", 0)
    assert names() == [{"old"}] * 3
    made.set_canary("new", None)
    assert names() == [{"old", "new"}] * 3
    alone = Portfolio([backend("new", canary=0)], SETTINGS)
    for asked in ("m", "t", None):
        (route,) = alone.routes(asked)
        assert Balancer().choose(route, ask()) is None
        assert "No backend of t" in refusal([route], SETTINGS).message


def test_same_prefix_goes_where_it_was() -> None:
    _, route = portfolio(*(backend(name) for name in "abcd"))
    balancer = Balancer()
    seen: dict[str, set[str]] = {}
    for turn in range(20):
        for user in range(12):
            prompt = f"user {user} " * 400 + " and more" * turn
            target = balancer.choose(route, ask(prompt))
            assert target is not None
            seen.setdefault(str(user), set()).add(target.backend.name)
    assert all(len(names) == 1 for names in seen.values())
    assert len({name for names in seen.values() for name in names}) > 1


@pytest.mark.parametrize("divided", ["a", "b"])
def test_teams_learn_nothing_of_each_other_where_one_backend_divides_its_cache(divided: str) -> None:
    _, route = portfolio(*(backend(name, prefix_cache="team" if name == divided else None) for name in "ab"))
    balancer, (first, second) = Balancer(), route.targets
    second.outstanding = 1
    asked = {team: ask("the same long prompt " * 100) for team in ("one", "other")}
    for team, exchange in asked.items():
        exchange.principal = Principal("key", team=team)
    assert balancer.choose(route, asked["one"]) is first
    first.outstanding, second.outstanding = 1, 0
    assert balancer.choose(route, asked["other"]) is second
    assert balancer.choose(route, asked["one"]) is first


def test_affinity_yields_to_load() -> None:
    _, route = portfolio(*(backend(name) for name in "abcd"))
    balancer = Balancer()
    for _ in range(400):
        target = balancer.choose(route, ask("the same long prompt " * 100))
        assert target is not None
        target.outstanding += 1
    loads = [target.outstanding for target in route.targets]
    assert max(loads) <= IMBALANCE * 100 + 3


def test_blocks_are_prefixes_and_depend_on_model_and_tools() -> None:
    short, long = "x" * (3 * BLOCK_BYTES), "x" * (5 * BLOCK_BYTES)
    first = prompt_blocks(Body(b'{"prompt":"%s"}' % short.encode()), "m")
    second = prompt_blocks(Body(b'{"prompt":"%s"}' % long.encode()), "m")
    assert len(first) == 3
    assert second[:3] == first
    assert prompt_blocks(Body(b'{"prompt":"%s"}' % short.encode()), "n") != first
    assert prompt_blocks(Body(b'{"prompt":"%s","tools":[1]}' % short.encode()), "m") != first
    assert prompt_blocks(Body(b'{"prompt":"short"}'), "m") == []
    assert prompt_blocks(None, "m") == []


def test_table_is_bounded_and_forgets_the_oldest() -> None:
    made, _ = portfolio(backend("a"), backend("b"))
    first, second = made.targets
    table = PrefixTable(max_entries=10)
    table.record([1, 2, 3], first)
    table.record([1, 2, 9], second)
    assert table.matches([1, 2, 3], [first, second]) == {first: 3, second: 2}
    for block in range(100, 108):
        table.record([block], first)
    assert len(table) == 10
    assert table.matches([1, 2, 3], [first, second]) == {first: 2, second: 2}
