"""`tokenmill calibrate` and `tokenmill router train`, on data whose truth is known."""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tokenmill.engine.gateway.router import calibration, classifier, command, plot, training
from tokenmill.engine.gateway.router.calibration import Sample
from tokenmill.engine.gateway.router.features import FEATURES
from tokenmill.errors import ConfigurationError, InputError


def calibrated_samples(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Answers that are right with exactly the probability that their confidence says."""
    dice = random.Random(seed)
    rows = []
    for _ in range(count):
        sure = dice.random()
        rows.append({"confidence": sure, "correct": dice.random() < sure, "then_correct": dice.random() < 0.98})
    return rows


def test_the_threshold_keeps_the_error_below_the_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "log.jsonl"
    data.write_text("\n".join(map(json.dumps, calibrated_samples(4000))))
    out, plot = tmp_path / "calibration.json", tmp_path / "curve.png"
    assert command.calibrate([str(data), "--out", str(out), "--plot", str(plot), "--max-error", "0.1"]) == 0
    assert "threshold 0." in capsys.readouterr().out
    assert plot.read_bytes().startswith(b"\x89PNG")
    found = calibration.read(out)
    # Among answers with confidence >= t, uniform, the error is (1 - t) / 2: 0.1 at t = 0.8.
    assert 0.78 < found.threshold < 0.88
    assert found.chosen.error_bound <= 0.1
    fresh = [row for row in calibrated_samples(20_000, seed=1) if row["confidence"] >= found.threshold]
    assert sum(not row["correct"] for row in fresh) / len(fresh) <= 0.1
    costs = [point.cost for point in found.curve]
    assert costs == sorted(costs), "a higher threshold costs more"
    assert len(costs) <= calibration.MOST_POINTS


def test_the_curve_by_hand() -> None:
    samples = [Sample(0.9, True, False), Sample(0.9, True), Sample(0.5, False, True), Sample(0.2, False, False)]
    points = {point.threshold: point for point in calibration.curve(samples, 0.1)}
    assert set(points) == {1.0, 0.9, 0.5, 0.2}
    assert (points[1.0].escalated, points[1.0].quality, points[1.0].cost) == (1.0, 0.5, 1.1)
    assert (points[0.9].escalated, points[0.9].error, points[0.9].quality) == (0.5, 0.0, 0.75)
    assert points[0.5].error == pytest.approx(1 / 3)
    assert (points[0.2].escalated, points[0.2].error, points[0.2].quality) == (0.0, 0.5, 0.5)


def test_wilson_bounds() -> None:
    assert calibration.upper_bound(0, 0) == 0
    assert calibration.upper_bound(0, 100) == pytest.approx(0.02634, abs=1e-4)
    assert calibration.upper_bound(5, 100) == pytest.approx(0.09916, abs=1e-4)
    assert calibration.upper_bound(100, 100) == 1.0


def test_hopeless_data_escalates_everything() -> None:
    found = calibration.calibrate([Sample(n / 100, False) for n in range(100)], "mean", 0.05, 0.1)
    assert found.chosen.escalated == 1.0
    assert found.threshold == 1.0


def test_a_threshold_that_the_gateway_cannot_keep_is_not_chosen(tmp_path: Path) -> None:
    data, out = tmp_path / "log.jsonl", tmp_path / "c.json"
    rows = [{"confidence": 1.0 if number < 100 else 0.5, "correct": number % 5 > 1} for number in range(200)]
    data.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(InputError) as caught:
        command.calibrate([str(data), "--out", str(out), "--max-error", "0.05"])
    assert "no threshold keeps the wrong ones among the answers given to 5.00%" in str(caught.value)
    assert "the best, 0.5000, gives 100.0% of the answers, of which 40.00% are wrong" in str(caught.value)
    assert not out.exists()
    command.calibrate([str(data), "--out", str(out), "--max-error", "0.5"])
    found = calibration.read(out)
    given = [row["correct"] for row in rows if row["confidence"] >= found.threshold]
    assert (len(rows) - len(given)) / len(rows) == found.chosen.escalated, "it reports what the gateway does"
    assert all(point.threshold <= 1 and point.escalated < 1 for point in found.curve)


def test_the_routing_log_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log, out = tmp_path / "routing.jsonl", tmp_path / "c.json"
    line = {"id": "r", "at": 1.0, "tier": "utility", "features": {"bias": 1.0}, "escalated": False, "outcome": "ok"}
    judged = [{**line, "confidence": row["confidence"], "good": row["correct"]} for row in calibrated_samples(300)]
    lacking = [{**line, "confidence": None, "good": True}, {**line, "confidence": 0.5}, {**line, "good": False},
               {**line, "confidence": 0.9, "good": None}]  # fmt: skip
    log.write_text("\n".join(map(json.dumps, [*judged, *lacking])))
    assert command.calibrate([str(log), "--out", str(out), "--max-error", "0.3"]) == 0
    assert "skipped 4 of 304 lines" in capsys.readouterr().out
    assert calibration.read(out).samples == 300


def test_csv_is_read_too(tmp_path: Path) -> None:
    data = tmp_path / "log.csv"
    rows = [f"{row['confidence']},{str(row['correct']).lower()},{int(row['then_correct'])}"
            for row in calibrated_samples(100)]  # fmt: skip
    data.write_text("confidence,correct,then_correct\n" + "\n".join(rows))
    out = tmp_path / "c.json"
    assert command.calibrate([str(data), "--out", str(out), "--max-error", "0.3", "--statistic", "mean"]) == 0
    assert calibration.read(out).statistic == "mean"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "0 samples are too few"),
        ('{"confidence": 0.5, "correct": true}\n' * 3, "3 samples"),
        ("nonsense", ":1: not JSON"),
        ("[" * 100_000, ":1: not JSON (maximum recursion depth"),
        ('{"confidence": 1' + "0" * 400 + ', "correct": true}', "'confidence' is 1000"),
        ('{"confidence": true, "correct": true}', "'confidence' is True"),
        ("[1]", ":1: [1] is no object"),
        ('{"correct": true}', "0 samples are too few"),
        ('{"confidence": 2, "correct": true}', "'confidence' is 2;"),
        ('{"confidence": "nan", "correct": true}', "'confidence' is 'nan'"),
        ('{"confidence": [1], "correct": true}', "'confidence' is [1]"),
        ('{"confidence": 0.5, "good": "maybe"}', "'good' is 'maybe'"),
        ('{"confidence": 0.5, "correct": "maybe"}', "'correct' is 'maybe'"),
    ],
)
def test_bad_data_is_named(tmp_path: Path, text: str, words: str) -> None:
    data = tmp_path / "log.jsonl"
    data.write_text(text)
    with pytest.raises(InputError) as caught:
        command.calibrate([str(data), "--out", str(tmp_path / "c.json")])
    assert words in str(caught.value)


def test_a_text_may_hold_any_end_of_line(tmp_path: Path) -> None:
    rows = [{**row, "text": "one\u2028two\u0085three"} for row in calibrated_samples(100)]
    data, table, out = tmp_path / "log.jsonl", tmp_path / "log.csv", tmp_path / "c.json"
    data.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    assert command.calibrate([str(data), "--out", str(out), "--max-error", "0.4"]) == 0
    assert calibration.read(out).samples == 100
    lines = [f'"one\ntwo\u2028three",{row["confidence"]},{row["correct"]}' for row in rows]
    table.write_text("text,confidence,correct\n" + "\n".join(lines), encoding="utf-8")
    assert command.calibrate([str(table), "--out", str(out), "--max-error", "0.4"]) == 0
    assert calibration.read(out).samples == 100
    table.write_text("confidence,correct,text\n0.5,true," + "x" * 200_000)
    with pytest.raises(InputError, match=r"log\.csv:\d: not CSV \(field larger"):
        command.calibrate([str(table), "--out", str(out)])


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    data = tmp_path / "log.jsonl"
    text = "\n".join(
        map(json.dumps, [{**row, "good": row["correct"], "features": {}} for row in calibrated_samples(100)])
    )
    data.write_text(text)
    for make in (
        lambda *more: command.calibrate([*more, "--max-error", "0.4"]),
        lambda *more: command.router(["train", *more]),
    ):
        for out, words in ((tmp_path, "cannot be written"), (tmp_path / "no" / "x", "cannot be written"),
                           (tmp_path / "." / "log.jsonl", "is the data itself")):  # fmt: skip
            with pytest.raises(InputError, match=words):
                make(str(data), "--out", str(out))
    assert data.read_text() == text


def test_the_plot_shows_what_each_threshold_does(tmp_path: Path) -> None:
    """Between two thresholds nothing changes until the upper one is passed: no slope."""
    samples = [Sample(0.5, True)] * 50 + [Sample(0.9, True)] * 50
    figure = plot.figure_of(calibration.calibrate(samples, "mean", 0.1, 0.1))
    for line in figure.axes[1].get_lines()[:3]:
        assert line.get_drawstyle() == "steps-pre"
    assert list(figure.axes[1].get_lines()[0].get_xdata()) == [0.5, 0.9, 1.0]
    assert list(figure.axes[1].get_lines()[0].get_ydata()) == [0.0, 0.5, 1.0]


def test_the_command_line_reports_in_one_line(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "tokenmill", "calibrate", str(tmp_path / "none.jsonl")], capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert run.returncode == 2
    assert run.stderr.startswith("tokenmill calibrate: ")
    assert run.stderr.count("\n") == 1


NESTED = "[" * 100_000
HUGE = '{"format": "tokenmill router weights 1", "weights": {"bias": 1' + "0" * 400 + "}}"


@pytest.mark.parametrize("text", [None, "", "{}", '{"format": "x"}', "[]", NESTED])
def test_files_that_are_none(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "file.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigurationError, match="tokenmill calibrate"):
        calibration.read(path)
    with pytest.raises(ConfigurationError, match="tokenmill router"):
        classifier.read_weights(path)


def drawn(count: int) -> list[dict[str, Any]]:
    """Outcomes drawn from known weights."""
    dice = random.Random(3)
    true = {"bias": -1.0, "code": 2.0, "lookup": -2.0, "prompt": 1.0}
    rows = []
    for number in range(count):
        values = {"bias": 1.0, "prompt": dice.random(), "code": float(dice.random() < 0.4),
                  "lookup": float(dice.random() < 0.4)}  # fmt: skip
        hard = dice.random() < classifier.complexity(values, true)
        outcome = {"good": not hard} if number % 2 else {"confidence": 0.5, "escalated": hard}
        rows.append({"features": values, **outcome})
    return rows


def test_training_finds_the_weights_that_made_the_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log, out = tmp_path / "log.jsonl", tmp_path / "weights.json"
    unjudged = {"features": {"bias": 1.0}, "confidence": None}
    log.write_text("\n".join(map(json.dumps, [*drawn(4000), unjudged])))
    assert command.router(["train", str(log), "--out", str(out)]) == 0
    weights = classifier.read_weights(out)
    assert set(weights) == set(FEATURES)
    for name, value in {"bias": -1.0, "code": 2.0, "lookup": -2.0, "prompt": 1.0, "math": 0.0}.items():
        assert weights[name] == pytest.approx(value, abs=0.4)
    assert "AUC 0.7" in capsys.readouterr().out


def test_training_beats_the_mean_on_lines_it_did_not_see() -> None:
    examples = [
        training.Example([row["features"].get(name, 0.0) for name in FEATURES],
                         not row["good"] if "good" in row else row["escalated"])
        for row in drawn(1000)
    ]  # fmt: skip
    found = training.fit(examples)
    assert found.log_loss < found.base_log_loss - 0.05
    assert found.auc > 0.7


def test_weights_beyond_all_measure_are_none(tmp_path: Path) -> None:
    path = tmp_path / "w.json"
    for text in (HUGE, HUGE.replace("1000", "-1000"), HUGE.replace("1" + "0" * 400, "1e400"),
                 HUGE.replace("1" + "0" * 400, "NaN")):  # fmt: skip
        path.write_text(text)
        with pytest.raises(ConfigurationError, match=r"weight 'bias'=.{1,41} is not between -1e\+09 and 1e\+09"):
            classifier.read_weights(path)


def test_training_looks_at_one_tier(tmp_path: Path) -> None:
    """That the large model did well on what is hard does not make it easy."""
    dice = random.Random(4)
    rows = []
    for _ in range(2000):
        code = dice.random() < 0.5
        tier = dice.choice(["utility", "reasoning"])
        good = tier == "reasoning" or not code
        rows.append({"tier": tier, "features": {"bias": 1.0, "code": float(code)}, "good": good})
    log, out = tmp_path / "log.jsonl", tmp_path / "w.json"
    log.write_text("\n".join(map(json.dumps, [*rows, {"features": {"bias": 1.0}, "tier": "vision"}])))
    for more in ([], ["--tier", "frontier"], ["--tier", "vision"]):
        with pytest.raises(InputError, match="of these tiers: reasoning, utility; name the simplest one with --tier"):
            command.router(["train", str(log), "--out", str(out), *more])
    assert command.router(["train", str(log), "--out", str(out), "--tier", "utility"]) == 0
    weights = classifier.read_weights(out)
    assert classifier.complexity({"bias": 1.0, "code": 1.0}, weights) > 0.9
    assert classifier.complexity({"bias": 1.0}, weights) < 0.1


@pytest.mark.parametrize("value", ["1e300", "NaN", "Infinity", "1" + "0" * 400])
def test_features_beyond_all_measure_are_refused(tmp_path: Path, value: str) -> None:
    log = tmp_path / "log.jsonl"
    lines = [f'{{"features": {{"bias": 1, "code": {value}}}, "good": {str(number % 2 == 0).lower()}}}'
             for number in range(100)]  # fmt: skip
    log.write_text("\n".join(lines))
    with pytest.raises(InputError, match=r"take the lines that routing\.log writes"):
        command.router(["train", str(log), "--out", str(tmp_path / "w.json")])


def test_a_value_that_is_none_is_named_with_its_line(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text('{"features": {"bias": 1}, "good": true}\n' * 2 + '{"features": {"bias": NaN}, "good": true}')
    with pytest.raises(InputError, match=r"log\.jsonl:3: a feature is not a number"):
        command.router(["train", str(log), "--out", str(tmp_path / "w.json")])


def test_lines_that_were_cut_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = tmp_path / "log.jsonl", tmp_path / "c.json"
    whole = '{"id":"a","confidence":0.5,"good":true}\n'
    data.write_text(whole * 30 + whole[:20] + whole + whole * 30 + whole[:25])
    assert command.calibrate([str(data), "--out", str(out)]) == 0
    assert "skipped 2 lines" in capsys.readouterr().out
    assert calibration.read(out).samples == 60


def test_what_saves_nothing_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = tmp_path / "log.jsonl", tmp_path / "c.json"
    data.write_text('{"confidence": 0.5, "correct": false}\n' * 30)
    assert command.calibrate([str(data), "--out", str(out)]) == 0
    assert "ask the second tier alone" in capsys.readouterr().out
    dice = random.Random(2)
    lines = [{"features": {"bias": 1, "code": dice.random()}, "good": dice.random() < 0.5} for _ in range(60)]
    data.write_text("\n".join(map(json.dumps, lines)))
    assert command.router(["train", str(data), "--out", str(tmp_path / "w.json")]) == 0
    assert "no better than the mean" in capsys.readouterr().out


def test_training_needs_both_outcomes() -> None:
    with pytest.raises(InputError, match="too few"):
        training.fit([])
    with pytest.raises(InputError, match="the same"):
        training.fit([training.Example([1.0] * len(FEATURES), True)] * 100)
