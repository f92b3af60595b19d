"""The learning curves of a report: loss, validation metric and learning rate over steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..core.metrics import Metric
from ..core.plots import PAGE, curve, figure_svg

Entries = Sequence[Mapping[str, Any]]


def learning_curves(history: Entries, metric: Metric, best_step: int | None) -> list[str]:
    """Draws the learning curves of a run; a quantity that was never logged has no chart.

    Args:
        history: transformers' `log_history`.
        metric: gives the name, unit and direction of the deciding metric.
        best_step: the step whose checkpoint was kept; the best of the history by default.

    Returns:
        SVG elements: training loss; deciding metric on the validation split, with the best
        checkpoint marked; learning rate.
    """
    charts = []
    steps, loss = series(history, "loss")
    if steps:
        figure = curve(steps, loss, title="training loss", colours=PAGE)
        charts.append(figure_svg(figure, title=f"Training loss: {_ends(steps, loss)}"))
    steps, values = series(history, f"eval_{metric.name}")
    if steps:
        charts.append(_validation(steps, values, metric, best_step))
    steps, rates = series(history, "learning_rate")
    if steps:
        figure = curve(steps, rates, title="learning rate", colours=PAGE)
        charts.append(figure_svg(figure, title=f"Learning rate: {_ends(steps, rates)}"))
    return charts


def _validation(
    steps: list[int], values: list[float], metric: Metric, best_step: int | None
) -> str:
    percent = metric.unit == "%"
    title = f"validation {metric.name}"
    best = best_step if best_step in steps else _best(steps, values, metric)
    mark, caption = None, title
    if best is not None:
        value = values[steps.index(best)]
        shown = f"best {100 * value:.1f} %" if percent else f"best {value:.4g}"
        mark, caption = (best, value, shown), f"{title}: {shown} at step {best}"
    figure = curve(steps, values, title=title, percent=percent, mark=mark, colours=PAGE)
    return figure_svg(figure, title=caption)


def _best(steps: list[int], values: list[float], metric: Metric) -> int | None:
    sign = 1 if metric.greater_is_better else -1
    finite = [
        (sign * value, step)
        for step, value in zip(steps, values, strict=True)
        if not math.isnan(value)
    ]
    return max(finite)[1] if finite else None


def series(history: Entries, key: str) -> tuple[list[int], list[float]]:
    """Returns the steps and values that were logged under a key.

    Of two values at one step the later counts. An infinite value becomes NaN, a gap in the curve.
    """
    values = {int(entry["step"]): float(entry[key]) for entry in history if key in entry}
    steps = sorted(values)
    return steps, [values[step] if math.isfinite(values[step]) else math.nan for step in steps]


def _ends(steps: list[int], values: list[float]) -> str:
    return f"{values[0]:.3g} at step {steps[0]}, {values[-1]:.3g} at step {steps[-1]}"
