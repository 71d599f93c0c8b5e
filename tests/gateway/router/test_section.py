"""The sections `routing` and `sensitivity`: every mistake is one line with a remedy, and what is right arrives."""

import json
from pathlib import Path

import pytest

from tokenmill.engine.gateway import config
from tokenmill.engine.gateway.router import calibration
from tokenmill.engine.gateway.router.calibration import Sample
from tokenmill.engine.gateway.router.settings import EscalationSettings, Rule
from tokenmill.engine.gateway.sensitivity.settings import PresidioSettings
from tokenmill.engine.gateway.settings import Document
from tokenmill.engine.supervisor.plan import make_plan
from tokenmill.errors import ConfigurationError

ROOT = Path(__file__).resolve().parents[3]
TIERS = (
    "tiers: {u: {backends: [{url: 'http://x', capabilities: [logprobs]}]}, "
    "r: {backends: [{url: 'http://y', models: {big: b}}, {model: 'bundled:target'}]}}\n"
)

MISTAKES = [
    ("routing: {rules: [{matches: '('}]}", "no RE2 pattern"),
    ("routing: {rules: [{matches: a}]}", "either a 'tier' or a 'quality'"),
    ("routing: {rules: [{tier: x}]}", "names the tier 'x', which does not exist"),
    ("routing: {rules: [{tier: u, min_tokens: 9, max_tokens: 8}]}", "at least 9 and at most 8 tokens; exchange"),
    ("routing: {name: big}", "is the name of a model"),
    ("routing: {name: tiny-target}", "is the name of a model"),
    ("routing: {name: u}", "is the name of a tier"),
    ("routing: {quality: 2}", "less than or equal to 1"),
    ("routing: {escalation: {first: u, then: r}}", "either a 'threshold' or a 'calibration'"),
    ("routing: {escalation: {first: u, then: u, threshold: 0.5}}", "to itself"),
    ("routing: {escalation: {first: u, then: x, threshold: 0.5}}", "'x', which does not exist"),
    ("routing: {escalation: {first: u, then: r, threshold: 0.5, statistic: best}}", "'lowest_tenth'"),
    ("routing: {escalation: {first: r, then: u, threshold: 0.5}}", "which none of its backends gives; add 'logprobs'"),
    ("routing: {wieghts: x}", "did you mean 'weights'?"),
    ("sensitivity: {policies: {emial: stay}}", "did you mean 'email'?"),
    ("sensitivity: {policies: {email: hide}}", "'redact'"),
    ("sensitivity: {policies: {private_key: redact}}", "no placeholder can stand"),
    ("sensitivity: {trusted_zones: []}", "at least 1"),
    ("sensitivity: {trusted_zones: [moon]}", "'on-premises'"),
    ("sensitivity: {patterns: {email: x}}", "cannot name a kind"),
    ("sensitivity: {patterns: {own: '(a'}}", "no RE2 pattern"),
    ("sensitivity: {patterns: {own: 'a*'}}", "matches an empty text"),
    ("sensitivity: {patterns: {own: '(?=a)'}}", "no RE2 pattern"),
    ("sensitivity: {timeout_seconds: 0}", "greater than 0"),
    ("sensitivity: {presidio: {language: english}}", "match pattern"),
]


@pytest.mark.parametrize(("text", "words"), MISTAKES, ids=lambda value: value[:50])
def test_mistakes_are_named(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(TIERS + text + "\n")
    with pytest.raises(ConfigurationError) as caught:
        config.load(path)
    assert words in str(caught.value)
    assert str(caught.value).startswith(f"{path}:")


def test_everything_reaches_the_worker(tmp_path: Path) -> None:
    samples = [Sample(number / 100, number > 50) for number in range(100)]
    calibrated = calibration.calibrate(samples, "lowest_window", 0.3, 0.1)
    calibration.write(calibrated, tmp_path / "c.json")
    (tmp_path / "w.json").write_text(json.dumps({"format": "tokenmill router weights 1", "weights": {"bias": 1}}))
    path = tmp_path / "c.yaml"
    path.write_text(
        f"""{TIERS}
routing:
  name: any
  quality: 0.5
  weights: {tmp_path}/w.json
  log: {tmp_path}/log
  burst_queue: 3
  rules: [{{matches: '(?i)hi', tools: false, tier: r}}, {{min_tokens: 9, quality: 0.9}}]
  escalation: {{first: u, then: r, calibration: {tmp_path}/c.json, hold_tokens: 5}}
sensitivity:
  policies: {{email: redact, contact: stay, own: allow}}
  default: refuse
  patterns: {{own: 'E-[0-9]+'}}
  trusted_zones: [on-premises, edge]
  presidio: {{entities: [PERSON]}}
"""
    )
    plan = make_plan(config.load(path))
    document = Document.from_json(
        Document(plan.remotes, plan.settings(), routing=plan.routing, sensitivity=plan.sensitivity).to_json()
    )
    routing, policy = document.routing, document.sensitivity
    assert routing is not None
    assert policy is not None
    assert (routing.name, routing.quality, routing.burst_queue) == ("any", 0.5, 3)
    assert routing.weights == {"bias": 1.0}
    assert routing.rules == (Rule(matches="(?i)hi", tools=False, tier="r"), Rule(min_tokens=9, quality=0.9))
    assert routing.escalation == EscalationSettings("u", "r", calibrated.threshold, "lowest_window", 5)
    assert [policy.action(kind) for kind in ("email", "phone", "own", "iban")] == ["redact", "stay", "allow", "refuse"]
    assert policy.trusted_zones == ("on-premises", "edge")
    assert policy.presidio == PresidioSettings(entities=("PERSON",))


def test_missing_files_are_named(tmp_path: Path) -> None:
    for section in ("{weights: none.json}", "{escalation: {first: u, then: r, calibration: none.json}}"):
        path = tmp_path / "c.yaml"
        path.write_text(f"{TIERS}routing: {section}\n")
        with pytest.raises(ConfigurationError, match=r"none\.json cannot be read"):
            make_plan(config.load(path))


def test_a_calibration_of_another_statistic_is_refused(tmp_path: Path) -> None:
    samples = [Sample(number / 100, number > 50) for number in range(100)]
    calibration.write(calibration.calibrate(samples, "lowest_window", 0.3, 0.1), tmp_path / "c.json")
    path = tmp_path / "c.yaml"

    def plan(statistic: str) -> EscalationSettings | None:
        section = f"{{first: u, then: r, calibration: {tmp_path}/c.json, statistic: {statistic}}}"
        path.write_text(f"{TIERS}routing: {{escalation: {section}}}\n")
        routing = make_plan(config.load(path)).routing
        return None if routing is None else routing.escalation

    found = plan("lowest_window")
    assert found is not None
    assert found.statistic == "lowest_window"
    with pytest.raises(ConfigurationError, match="a threshold of 'lowest_window', which says nothing about 'mean'"):
        plan("mean")


def test_the_example_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CLOUD_API_KEY", "FRONTIER_API_KEY"):
        monkeypatch.setenv(name, "a-key-for-the-check")
    plan = make_plan(config.load(ROOT / "examples" / "factory.yaml"))
    assert plan.routing is not None
    assert plan.routing.escalation is not None
    assert plan.sensitivity is not None
    assert plan.sensitivity.action("api_key") == "refuse"
