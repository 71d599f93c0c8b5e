"""What a decision says of itself is so."""

import pytest

from tests.gateway.router.test_decisions import HARD, TWO, backend, routed
from tokenmill.engine.gateway.api_error import ApiError
from tokenmill.engine.gateway.backends import Backend
from tokenmill.engine.gateway.portfolio import Portfolio
from tokenmill.engine.gateway.principal import Principal
from tokenmill.engine.gateway.router.observed import Observed
from tokenmill.engine.gateway.router.settings import RoutingSettings, Rule
from tokenmill.engine.gateway.sensitivity.clearance import Clearance
from tokenmill.engine.gateway.settings import Settings

THREE = (*TWO, backend("best", "frontier", 1_000_000, 0.95))


def said(
    backends: tuple[Backend, ...] | Portfolio, settings: RoutingSettings | None = None, *, text: str = "hi",
    clearance: Clearance | None = None, max_tokens: int | None = None, **hints: object
) -> tuple[str, dict[str, str]]:  # fmt: skip
    """(the tier chosen, what each criterion says last)."""
    wishes = {f"tokenmill_{name}": value for name, value in hints.items()}
    decision = routed(backends, settings, text, clearance=clearance, metadata=wishes, max_tokens=max_tokens).decision
    assert decision is not None
    return decision.tier, {reason.criterion: reason.verdict for reason in decision.reasons}


def test_only_the_cheapest_that_will_do_is_called_so() -> None:
    tier, reasons = said(THREE, text=HARD, quality=0.8)
    assert (tier, "the cheapest that will do" in reasons["cost"]) == ("reasoning", True)
    for settings, hints in (
        (RoutingSettings(rules=(Rule(matches="hi", tier="frontier"),)), {}),
        (None, {"quality": 0.99}),  # nobody will do
    ):
        tier, reasons = said(THREE, settings, **hints)
        assert (tier, "the cheapest" in reasons["cost"]) == ("frontier", False)
    portfolio = Portfolio(THREE, Settings())
    portfolio.targets[1].mark_down("connection refused")
    tier, reasons = said(portfolio, quality=0.8)
    assert (tier, "the cheapest that will do" in reasons["cost"]) == ("frontier", True)


def test_the_fastest_is_not_called_the_cheapest() -> None:
    portfolio = Portfolio((backend("near", "near", 1_000, 0.9, max_concurrency=1), backend("far", "far", 9_000, 0.9)),
                          Settings())  # fmt: skip
    portfolio.targets[0].outstanding = 1
    tier, reasons = said(portfolio, latency="fast")
    assert (tier, "the cheapest" in reasons["cost"]) == ("far", False)
    assert reasons["latency"] == "fast: first token expected of far: not measured yet"
    full = Portfolio((backend("near", "near", 1_000, 0.9, max_concurrency=1),), Settings())
    full.targets[0].outstanding = 1
    assert said(full, latency="interactive")[1]["latency"] == "interactive: near is full"


def test_only_the_nearest_comes_nearest() -> None:
    tier, reasons = said(THREE, quality=0.9, max_cost=0)
    assert tier == "utility"
    assert reasons["quality"] == "utility has 0.30 of the asked 0.90"
    assert said(THREE, quality=0.99)[1]["quality"] == "frontier comes nearest, with 0.95 of the asked 0.99"
    tier, reasons = said(THREE, text=HARD, max_cost=0)
    assert tier == "utility"
    assert reasons["complexity"].endswith("hard; utility has 0.30")


def test_what_does_not_fit_is_prompt_and_answer() -> None:
    small = (backend("small", "utility", 1_000, 0.9, context_window=1000), TWO[1])
    _, reasons = said(small, max_tokens=5000)
    assert reasons["context"] == "about 8 tokens and 5000 of the answer are too many for utility"
    _, reasons = said(small, text="hi " * 4000)
    assert reasons["context"] == "about 3008 tokens are too many for utility"


def test_a_key_that_is_confined_to_regions_is_named() -> None:
    kept = Clearance(regions=frozenset({"eu", "uk"}), why="its key is confined")
    there = (backend("here", "here", 1, 0.9, region="eu"), backend("there", "there", 1, 0.9, region="us"))
    tier, reasons = said(there, clearance=kept)
    assert (tier, reasons["sensitivity"]) == ("here", "its key is confined: stays in region eu and region uk")
    stays = Clearance(action="stay", zones=frozenset({"on-premises"}), why="it holds iban")
    assert said(there, clearance=stays)[1]["sensitivity"] == "it holds iban: stays in on-premises"
    hidden = Clearance(action="redact", why="it holds email")
    assert said(there, clearance=hidden)[1]["sensitivity"] == "it holds email"
    assert "sensitivity" not in said(there, clearance=Clearance())[1]


def test_a_rule_is_named_by_its_number() -> None:
    rules = (Rule(matches="prove", tier="reasoning"), Rule(matches="hi", tier="frontier"))
    tier, reasons = said(THREE, RoutingSettings(rules=rules))
    assert (tier, reasons["complexity"].split(";")[0]) == ("frontier", "rule 2 names frontier")


def test_within_what_it_may_cost_the_best_that_is_needed_is_chosen() -> None:
    """A stated most cost is no wish for the cheapest."""
    tier, reasons = said(THREE, text=HARD, quality=0.8, max_cost=1)
    assert (tier, "within the stated $1.0" in reasons["cost"]) == ("reasoning", True)


@pytest.mark.parametrize(
    ("wanted", "interactive_s", "first", "seen"),
    [
        ("interactive", 1.0, "cheap", "500 ms"),
        ("interactive", 0.2, "quick", "125 ms"),
        ("fast", 1.0, "quick", "125 ms"),
    ],
)
def test_the_fastest_is_wanted_only_where_that_is_said(
    wanted: str, interactive_s: float, first: str, seen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = {"cheap": 0.5, "quick": 0.125}
    monkeypatch.setattr(Observed, "first_token_s", lambda _, target: waits[target.backend.name])
    two = (backend("cheap", "cheap", 1, 0.9), backend("quick", "quick", 9, 0.9))
    tier, reasons = said(two, RoutingSettings(interactive_s=interactive_s), latency=wanted)
    assert tier == first
    assert reasons["latency"] == f"{wanted}: first token expected of {first}: {seen}"


def test_a_refusal_names_zones_that_could_serve_it() -> None:
    kept = Clearance(action="stay", zones=frozenset({"on-premises"}), why="it holds iban")
    away = [
        backend("blind", "blind", 1, 0.9),
        backend("edge", "edge", 1, 0.9, zone="edge", capabilities=("vision",)),
        backend("cloud", "cloud", 1, 0.9, zone="cloud"),
    ]
    picture = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}]}]
    with pytest.raises(ApiError) as refused:
        routed(away, clearance=kept, messages=picture)
    assert (refused.value.status, refused.value.code) == (403, "residency")
    assert refused.value.message.endswith("it could be served in edge.")
    with pytest.raises(ApiError) as refused:
        routed([away[0], away[2]], clearance=kept, messages=picture)
    assert (refused.value.status, refused.value.code) == (400, "no_tier")
    assert "blind: capability: needs vision; cloud: sensitivity: it holds iban" in refused.value.message


def test_nobody_is_told_of_tiers_that_his_key_may_not_ask_for() -> None:
    kept = Clearance(action="stay", zones=frozenset({"on-premises"}), why="it holds iban")
    secret = backend("vast", "project-x", 1, 0.9, zone="cloud", context_window=1)
    tiers = [backend("small", "utility", 1, 0.9, context_window=1), secret]
    owner = Principal("k", models=("auto", "utility"))
    for clearance in (None, kept):
        with pytest.raises(ApiError) as refused:
            routed(tiers, principal=owner, clearance=clearance)
        assert (refused.value.status, refused.value.code) == (400, "no_tier")
        assert "utility: context" in refused.value.message
        assert "project-x" not in refused.value.message
    for clearance in (None, kept):
        decision = routed([backend("small", "utility", 1, 0.9), secret], principal=owner, clearance=clearance).decision
        assert decision is not None
        assert "project-x" not in repr(decision)
        with pytest.raises(ApiError) as refused:
            routed([secret], principal=owner, clearance=clearance)
        assert (refused.value.status, refused.value.code) == (403, "model_not_allowed")
        assert "project-x" not in refused.value.message
        assert "cloud" not in refused.value.message


def test_a_batch_goes_where_its_longest_input_fits() -> None:
    embedders = [backend("e", "embedding", 1, 0.9, capabilities=("embeddings",), context_window=512)]
    more = {"endpoint": "/v1/embeddings", "messages": None}
    decision = routed(embedders, input=["word " * 40] * 100, **more).decision
    assert decision is not None
    assert decision.tier == "embedding"
    with pytest.raises(ApiError) as refused:
        routed(embedders, input=["word " * 40, "word " * 1000], **more)
    assert "context: about 1251 tokens do not fit into 512" in refused.value.message
