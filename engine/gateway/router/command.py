"""`tokenmill calibrate` and `tokenmill router train`: thresholds and weights from logged outcomes."""

import argparse
import contextlib
import csv
import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from tokenmill.engine.gateway.router import calibration, classifier, training
from tokenmill.engine.gateway.router.features import FEATURES
from tokenmill.engine.gateway.router.settings import Statistic
from tokenmill.errors import InputError

#: What stands in a line in the place of something that is not known.
_ABSENT = (None, "")
#: How `routing.log` begins its lines.
_BEGIN = '{"id":'


def calibrate(argv: list[str]) -> int:
    """`tokenmill calibrate DATA`."""
    parser = argparse.ArgumentParser(
        prog="tokenmill calibrate",
        description="Chooses the confidence from which the first tier's answer is good enough. DATA is JSON lines or "
        "CSV with `confidence` (0 to 1) and `correct` (true or false) of its answers, and, where known, "
        "`then_correct` of the second tier's. The lines that `routing.log` wrote are taken, too, with `good` for "
        "`correct`. Lines without a confidence or without either of these are skipped.",
    )
    parser.add_argument("data", type=Path, metavar="DATA")
    parser.add_argument("--max-error", type=float, default=0.05, help="most wrong answers among those given (0.05)")
    parser.add_argument(
        "--cost-ratio", type=float, default=0.1, help="cost of an answer of the first tier by one of the second (0.1)"
    )
    parser.add_argument(
        "--statistic", choices=get_args(Statistic), default="lowest_tenth", help="what confidence means (lowest_tenth)"
    )
    parser.add_argument("--out", type=Path, default=Path("calibration.json"), help="the file for the configuration")
    parser.add_argument("--plot", type=Path, help="draw cost and quality by threshold into this file (needs [bench])")
    options = parser.parse_args(argv)
    for name, least, most in (("max_error", 0.0, 1.0), ("cost_ratio", 0.0, 1000.0)):
        value = getattr(options, name)
        if not least <= value <= most:
            raise InputError(f"--{name.replace('_', '-')}={value} is outside {least:g} to {most:g}")
    lines = [_sample(row, where) for row, where in _rows(options.data)]
    samples = [sample for sample in lines if sample is not None]
    if len(samples) < len(lines):
        skipped = len(lines) - len(samples)
        print(f"skipped {skipped} of {len(lines)} lines, which lack a confidence, or whether the answer was right")
    found = calibration.calibrate(samples, options.statistic, options.max_error, options.cost_ratio)
    with _written(options.out, options.data):
        calibration.write(found, options.out)
    chosen = found.chosen
    print(f"threshold {found.threshold:.4f} of {found.statistic}, from {found.samples} answers")
    print(f"  wrong among those given: {chosen.error:.2%}, at most {chosen.error_bound:.2%} (95%)")
    print(f"  escalated: {chosen.escalated:.1%}; right in all: {chosen.quality:.2%}")
    print(f"  cost: {chosen.cost:.3f} of asking the second tier always")
    if chosen.cost >= 1:
        print("  so escalation saves nothing here: ask the second tier alone, or raise --max-error")
    print(f"written to {options.out}; name it in routing.escalation.calibration")
    if options.plot is not None:
        from tokenmill.engine.gateway.router.plot import draw

        draw(found, options.plot)
        print(f"drawn in {options.plot}")
    return 0


def router(argv: list[str]) -> int:
    """`tokenmill router train LOG`."""
    parser = argparse.ArgumentParser(prog="tokenmill router", description="Makes the router's classifier.")
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser(
        "train",
        help="fit its weights to logged outcomes",
        description="LOG is what `routing.log` wrote: JSON lines with `features`, and `good` (whether the answer of "
        "the line's tier was good). Lines without `good` count by `escalated` where their answer was judged, and are "
        "skipped otherwise.",
    )
    train.add_argument("log", type=Path, metavar="LOG")
    train.add_argument(
        "--tier", help="the tier whose answers count, the simplest; needed where LOG has answers of several"
    )
    train.add_argument("--out", type=Path, default=Path("weights.json"), help="the file for the configuration")
    train.add_argument("--ridge", type=float, default=1.0, help="penalty on large weights (1.0)")
    options = parser.parse_args(argv)
    if not 0 < options.ridge <= 1e6:
        raise InputError(f"--ridge={options.ridge} is outside 0 to 1000000")
    found = training.fit(_examples(options.log, options.tier), options.ridge)
    content = {"format": classifier.FORMAT, "made_from": f"{found.examples} logged outcomes", "weights": found.weights}
    with _written(options.out, options.log):
        options.out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(f"weights from {found.examples} outcomes, judged by every fifth, which was held out:")
    print(f"  log loss {found.log_loss:.4f} (always the mean: {found.base_log_loss:.4f}), AUC {found.auc:.3f}")
    if found.log_loss >= found.base_log_loss:
        print("  no better than the mean, so they say nothing yet: log more outcomes")
    print(f"written to {options.out}; name it in routing.weights")
    return 0


def _rows(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """(row, where it stands) of a file of JSON lines or CSV."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}); give a file of JSON lines or CSV") from None
    if path.suffix == ".csv":
        reader = csv.DictReader(io.StringIO(text))
        try:
            for row in reader:
                yield dict(row), f"{path}:{reader.line_num}"
        except csv.Error as error:
            raise InputError(f"{path}:{reader.line_num}: not CSV ({error}); give JSON lines") from None
        return
    cut = 0
    # Not `splitlines`: a text within a line may hold what Unicode calls a line's end.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                if line.startswith(_BEGIN):
                    cut += 1
                    continue
                raise InputError(f"{path}:{number}: not JSON ({error}); each line is one object") from None
            if not isinstance(row, dict):
                raise InputError(f"{path}:{number}: {str(row)[:40]} is no object; each line is one object")
            yield row, f"{path}:{number}"
    if cut:
        print(f"skipped {cut} lines that a full disk or an end of the gateway's cut off")


def _sample(row: dict[str, Any], where: str) -> calibration.Sample | None:
    """A line's sample; None: it lacks a confidence, or whether the answer was right."""
    said = row.get("confidence")
    name = "good" if row.get("correct") in _ABSENT else "correct"
    if said in _ABSENT or row.get(name) in _ABSENT:
        return None
    try:
        value = math.nan if isinstance(said, bool) else float(said)
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not 0 <= value <= 1:
        raise InputError(f"{where}: 'confidence' is {repr(said)[:40]}; give a number from 0 to 1")
    then = row.get("then_correct")
    return calibration.Sample(
        value,
        _truth(row[name], name, where),
        None if then in _ABSENT else _truth(then, "then_correct", where),
    )


def _truth(value: object, name: str, where: str) -> bool:
    known = {"true": True, "1": True, "false": False, "0": False}
    found = known.get(str(value).strip().lower())
    if found is None:
        raise InputError(f"{where}: {name!r} is {value!r}; give true or false")
    return found


def _examples(path: Path, tier: str | None) -> list[training.Example]:
    """The outcomes in a log of one tier: that a better one did well does not say that a request is easy."""
    found: dict[str, list[training.Example]] = {}
    anybodys: list[training.Example] = []
    for row, where in _rows(path):
        example = _example(row, where)
        if example is not None:
            (anybodys if row.get("tier") is None else found.setdefault(str(row["tier"]), [])).append(example)
    if (tier is None and len(found) <= 1) or tier in found:
        return anybodys + [one for name, examples in found.items() if tier in (None, name) for one in examples]
    known = ", ".join(sorted(found)) or "none"
    raise InputError(f"{path} has judged answers of these tiers: {known}; name the simplest one with --tier")


def _example(row: dict[str, Any], where: str) -> training.Example | None:
    features = row.get("features")
    if not isinstance(features, dict):
        raise InputError(f"{where}: 'features' is missing; take the lines that routing.log writes")
    if row.get("good") not in _ABSENT:
        hard = not _truth(row["good"], "good", where)
    elif row.get("confidence") is not None:
        hard = bool(row.get("escalated"))
    else:
        return None
    try:
        values = [float(features.get(name, 0.0)) for name in FEATURES]
    except (TypeError, ValueError, OverflowError):
        values = [math.nan]
    if not all(map(math.isfinite, values)):
        raise InputError(f"{where}: a feature is not a number; take the lines that routing.log writes")
    return training.Example(values, hard)


@contextlib.contextmanager
def _written(path: Path, data: Path) -> Iterator[None]:
    """Around the writing of a file: raises `InputError` where it cannot be, or would be written over its data."""
    if path.exists() and path.samefile(data):
        raise InputError(f"--out={path} is the data itself; name another file")
    try:
        yield
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}); name another file with --out") from None
