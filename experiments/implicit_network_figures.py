"""Figures of the robustness of networks over how they are trained."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np

from experiments.engm_figures import COLOURS, MARKERS

DPI = 150


def accuracies(
    path: Path,
    *,
    x: Sequence[float],
    found: Mapping[str, Mapping[str, np.ndarray]],
    label: str,
    at: float | None = None,
) -> None:
    """Clean (dashed) and robust accuracy over what is varied, mean and range over the seeds."""
    figure = matplotlib.figure.Figure(figsize=(5, 3.4), layout="constrained")
    axes = figure.subplots()
    for (name, of), colour, marker in zip(found.items(), COLOURS, MARKERS, strict=False):
        for which, style in {"clean": "--", "robust": "-"}.items():
            values = of[which]
            axes.plot(x, values.mean(axis=1), style, color=colour, marker=marker,
                      label=f"{name}, {which}")  # fmt: skip
            axes.fill_between(x, values.min(axis=1), values.max(axis=1), color=colour, alpha=0.15)
    if at is None:
        axes.set_xscale("log")
    else:
        axes.axvline(at, color="black", lw=0.8, ls=":")
    axes.set(xlabel=label, ylabel="accuracy (%)", ylim=(-2, 102))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=DPI)


def curves(path: Path, *, eps: np.ndarray, found: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """Robust accuracy over eps, one plot for each ball, mean and range over the seeds."""
    balls = list(next(iter(found.values())))
    figure = matplotlib.figure.Figure(figsize=(4 * len(balls), 3.4), layout="constrained")
    plots = figure.subplots(1, len(balls), sharey=True, squeeze=False)[0]
    for axes, ball in zip(plots, balls, strict=True):
        for (name, of), colour, marker in zip(found.items(), COLOURS, MARKERS, strict=False):
            values = 100 * of[ball]
            axes.plot(eps, values.mean(axis=0), color=colour, marker=marker, ms=4, label=name)
            axes.fill_between(eps, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.15)
        axes.set(title=ball, xlabel="eps (input units)", ylim=(-2, 102))
        axes.grid(alpha=0.3)
    plots[0].set_ylabel("robust accuracy (%)")
    plots[0].legend(fontsize="small", title="training")
    figure.savefig(path, dpi=DPI)


def margins(path: Path, *, found: Any, linear: np.ndarray, keep: np.ndarray) -> None:
    """First-order estimates over what the attack finds, and those of tanh and sinh."""
    figure = matplotlib.figure.Figure(figsize=(8.4, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    groups = {"boundary in another linear region": keep & ~linear, "in the same one": linear}
    for (name, part), colour, marker in zip(groups.items(), COLOURS, MARKERS, strict=False):
        left.plot(found.attack[part], found.estimate[part], marker, ls="", ms=4, color=colour,
                  alpha=0.7, label=name)  # fmt: skip
    top = float(found.attack[keep].max())
    left.plot([0, top], [0, top], "k-", lw=0.8)
    left.set(xlabel="smallest eps of PGD-20 (input units)",
             ylabel="first-order margin (input units)")  # fmt: skip
    left.legend(fontsize="small")
    u = np.linspace(0.01, 2, 100)
    for (name, values), colour in zip(
        {"tanh(a w·x)": np.sinh(2 * u) / 2, "sinh(a w·x)": np.tanh(u)}.items(),
        COLOURS,
        strict=False,
    ):
        right.plot(u, values, color=colour, label=name)
    right.plot(u, u, "k-", lw=0.8, label="exact")
    right.set(xlabel="margin, times a ‖w‖ of the dual norm", ylabel="first-order margin, likewise",
              ylim=(0, 4))  # fmt: skip
    right.legend(fontsize="small")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=DPI)
