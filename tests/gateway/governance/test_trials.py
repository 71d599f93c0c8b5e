"""Real gateway processes that are killed while many clients spend a budget; see `trial`."""

from pathlib import Path

import pytest

from tests.gateway.governance.conftest import KINDS, new_place
from tests.gateway.governance.trial import Trials


@pytest.mark.end_to_end
@pytest.mark.parametrize("kind", KINDS)
def test_budget_holds_while_workers_are_killed(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    trials = Trials(new_place(kind, tmp_path, request))
    try:
        outcomes = [trials.run(seed, clients=48, requests=4, kills=1) for seed in range(2)]
    finally:
        trials.close()
    assert sum(outcome.rows["ok"] for outcome in outcomes) > 0
    assert sum(outcome.escalated for outcome in outcomes) > 0
    assert sum(outcome.statuses[429] for outcome in outcomes) > 0


@pytest.mark.slow
@pytest.mark.end_to_end
@pytest.mark.parametrize("kind", KINDS)
def test_budget_holds_in_many_trials(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    trials = Trials(new_place(kind, tmp_path, request))
    try:
        for seed in range(10, 20):
            trials.run(seed, clients=128, requests=4, kills=1 + seed % 3)
    finally:
        trials.close()
