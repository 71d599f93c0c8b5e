"""Draws what each threshold would do: quality against cost, and both by threshold."""

from pathlib import Path
from typing import Any

from tokenmill.engine.gateway.router.calibration import Calibration
from tokenmill.errors import InputError, MissingDependencyError


def draw(calibration: Calibration, path: Path) -> None:
    """Writes the plot; the file's ending says the format (png, svg, pdf).

    Raises:
        MissingDependencyError: matplotlib is not installed.
        InputError: The file cannot be written.
    """
    figure = figure_of(calibration)
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise InputError(f"the plot cannot be written to {path} ({error})") from None


def figure_of(calibration: Calibration) -> Any:
    """The plot as matplotlib's figure; raises `MissingDependencyError` where that is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingDependencyError("matplotlib", "bench", "--plot") from None
    points, chosen = calibration.curve, calibration.chosen
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot([point.cost for point in points], [point.quality for point in points], color="#3b6ea5")
    left.plot(chosen.cost, chosen.quality, "o", color="#c0392b", label=f"threshold {calibration.threshold:.3f}")
    left.set_xlabel("mean cost (1: always the second tier)")
    left.set_ylabel("share of right answers")
    left.legend()
    thresholds = [point.threshold for point in points]
    # A threshold between two points does what the upper one does.
    step = {"drawstyle": "steps-pre"}
    right.plot(thresholds, [point.escalated for point in points], label="escalated", color="#3b6ea5", **step)
    right.plot(thresholds, [point.error for point in points], label="wrong among those given", color="#c0392b", **step)
    bounds = [point.error_bound for point in points]
    right.plot(thresholds, bounds, "--", label="its 95% bound", color="#c0392b", alpha=0.6, **step)
    right.axvline(calibration.threshold, color="#888", linewidth=1)
    right.set_xlabel(f"threshold ({calibration.statistic})")
    right.legend()
    figure.suptitle(f"Escalation, from {calibration.samples} logged answers")
    return figure
