"""The figure of compared runs: their curves, means over seeds with a band for the interval."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib.figure
import matplotlib.lines
import numpy as np

from experiments.engm_figures import COLOURS, MARKERS
from robustjax import metrics

# How the lines of the splits look.
LINES = {"validation": "-", "train": "--", "monitor": ":", "gradients": "-."}
AT_ONCE = 500  # steps whose intervals are found together: a thousand samples of each take memory


class Curve(NamedTuple):
    """A mean over runs and its 95 % interval, ``(steps,)`` each."""

    step: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def mean_curve(series: Sequence[Mapping[int, float]], *, scale: float = 1.0) -> Curve:
    """The mean of curves, at each step of those that have it.

    Args:
      series: a curve of each run, step to value, finite.
      scale: factor of the values.
    """
    steps: dict[tuple[int, ...], list[int]] = {}
    for step in sorted({step for one in series for step in one}):
        steps.setdefault(tuple(i for i, one in enumerate(series) if step in one), []).append(step)
    found = []
    for runs, shared in steps.items():
        for start in range(0, len(shared), AT_ONCE):
            chunk = shared[start : start + AT_ONCE]
            values = scale * np.array([[series[i][step] for step in chunk] for i in runs])
            interval = metrics.bootstrap_mean(values)
            found.append(np.stack([chunk, interval.mean, interval.low, interval.high]))
    if not found:
        return Curve(*np.zeros((4, 0)))
    joined = np.concatenate(found, axis=1)
    return Curve(*joined[:, joined[0].argsort()])


def curves(path: Path, panels: Mapping[str, Mapping[tuple[str, str], Curve]]) -> None:
    """One panel per measure; colours and markers are groups, kinds of lines are splits.

    Args:
      path: image file to write.
      panels: label of a measure, with its unit, to ``(group, split)`` to a curve.
    """
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = matplotlib.figure.Figure(figsize=(4.2 * columns, 3.1 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    groups = list(dict.fromkeys(group for lines in panels.values() for group, _ in lines))
    splits = list(dict.fromkeys(split for lines in panels.values() for _, split in lines))
    styles = {
        group: {
            "color": COLOURS[i % len(COLOURS)],
            # Shifted with each turn through the colours, so that no two groups look the same.
            "marker": MARKERS[(i + i // len(COLOURS)) % len(MARKERS)],
            "ms": 4,
        }
        for i, group in enumerate(groups)
    }
    for where, (label, lines) in zip(axes, panels.items(), strict=False):
        for (group, split), curve in lines.items():
            style, count = styles[group], len(curve.step)
            # The markers of different groups at different places.
            every = max(1, count // 8)
            first = (groups.index(group) * every // len(groups)) % every
            where.plot(curve.step, curve.mean, ls=LINES[split], lw=1.2,
                       markevery=(first, every), **style)  # fmt: skip
            where.fill_between(
                curve.step, curve.low, curve.high, color=style["color"], alpha=0.2, lw=0
            )
        where.set(xlabel="training step", ylabel=label)
        where.grid(alpha=0.3)
    for where in axes[len(panels) :]:
        where.set_visible(False)
    handles = [matplotlib.lines.Line2D([], [], ls="", **styles[g], label=g) for g in groups]
    handles += [
        matplotlib.lines.Line2D([], [], color="0.3", ls=LINES[split], label=split)
        for split in splits
    ]
    if any((curve.high > curve.low).any() for lines in panels.values() for curve in lines.values()):
        label = "95 % bootstrap interval of the mean"
        handles.append(matplotlib.lines.Line2D([], [], color="0.6", alpha=0.4, lw=7, label=label))
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize="small")
    figure.savefig(path, dpi=150)
