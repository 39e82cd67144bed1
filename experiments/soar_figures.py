"""Figures of the studies of SOAR and FOAR."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np

from experiments.engm_figures import COLOURS, MARKERS


def _axes(width: float, panels: int = 1) -> tuple[matplotlib.figure.Figure, list[Any]]:
    figure = matplotlib.figure.Figure(figsize=(width, 3.3), layout="constrained")
    axes = list(np.atleast_1d(figure.subplots(1, panels)))
    for where in axes:
        where.grid(alpha=0.3)
    return figure, axes


def _styles() -> Any:
    return zip(COLOURS, MARKERS, strict=True)


def methods(path: Path, *, runs: Mapping[str, Any]) -> None:
    """Accuracy under PGD-20, its margin version and transfer; a dot for each network."""
    figure, (axes,) = _axes(9)
    places = np.arange(len(runs))
    shown = {"PGD-20": "pgd", "margin PGD-20": "margin", "transfer": "transfer"}
    for i, ((label, name), (colour, _)) in enumerate(zip(shown.items(), _styles(), strict=False)):
        values = np.array([100 * getattr(found, name) for found in runs.values()])
        at = places + 0.27 * (i - 1)
        axes.bar(at, values.mean(axis=1), 0.25, color=colour, alpha=0.6, label=label)
        axes.plot(at, values, ".", color="black", ms=3)
    axes.set(ylabel="accuracy (%)", xticks=places)
    axes.set_xticklabels(list(runs), rotation=25, ha="right")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)


def samples(path: Path, *, results: Mapping[str, Mapping[str, Any]]) -> None:
    """Standard error of the penalised loss over the number of vectors z."""
    figure, (axes,) = _axes(4.5)
    for (name, found), (colour, marker) in zip(results.items(), _styles(), strict=False):
        count = np.asarray(found["count"])
        axes.loglog(count, found["error"], color=colour, marker=marker, label=name)
        axes.loglog(count, found["error"][0] / np.sqrt(count), ":", color=colour)
    axes.set(xlabel="vectors z (dotted: their number to the power -1/2)",
             ylabel="standard error of an example's loss")  # fmt: skip
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)


def members(
    path: Path, *, accuracy: Mapping[float, Mapping[str, np.ndarray]], members: Sequence[str]
) -> None:
    """Accuracy under each member of AutoAttack and under all, a panel for each radius."""
    figure, axes = _axes(10, len(accuracy))
    for where, (eps, found) in zip(axes, accuracy.items(), strict=True):
        for i, ((name, values), (colour, _)) in enumerate(
            zip(found.items(), _styles(), strict=False)
        ):
            at = np.arange(len(members)) + (i - (len(found) - 1) / 2) * 0.8 / len(found)
            where.bar(at, values, 0.8 / len(found), color=colour, label=name)
        where.set(title=f"eps = {eps:g}", ylabel="accuracy (%)", ylim=(0, 100),
                  xticks=range(len(members)))  # fmt: skip
        where.set_xticklabels(members, fontsize="small")
    axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=150)


def over_radius(path: Path, *, radii: Sequence[float], accuracy: Mapping[str, np.ndarray]) -> None:
    """Accuracy over the l_2 radius; the first value is the clean accuracy, the last transfer."""
    figure, (axes,) = _axes(5)
    for (name, values), (colour, marker) in zip(accuracy.items(), _styles(), strict=False):
        axes.plot([0, *radii], values[:-1], color=colour, marker=marker, label=name)
    axes.set(xlabel="l_2 radius (input units)", ylabel="accuracy under PGD-100 (%)")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)


def interpolation(path: Path, *, curves: Mapping[str, np.ndarray]) -> None:
    """Loss on the way from x to the adversarial example, mean and range of the networks."""
    figure, (axes,) = _axes(5)
    for (name, found), (colour, _) in zip(curves.items(), _styles(), strict=False):
        way = np.linspace(0, 1, found.shape[1])
        axes.plot(way, found.mean(axis=0), color=colour, label=name)
        axes.fill_between(way, found.min(axis=0), found.max(axis=0), color=colour, alpha=0.12, lw=0)
    axes.set(xlabel="share of the way from x to the adversarial example", ylabel="cross-entropy")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)


def linear(
    path: Path,
    *,
    results: Mapping[str, Mapping[str, float]],
    dimensions: Sequence[int],
    scales: Sequence[str],
) -> None:
    """Loss under attack of linear regression over the dimension, and the formula as lines."""
    figure, (axes,) = _axes(5)
    for scale, (colour, marker) in zip(scales, _styles(), strict=False):
        found = [results[f"{scale}, {d}"] for d in dimensions]
        axes.loglog(dimensions, [one["expected"] for one in found], color=colour, lw=1)
        measured = [one["measured"] for one in found]
        axes.loglog(dimensions, measured, marker, color=colour, label=f"gradient descent, {scale}")
        penalised = [max(one["exact"], 1e-12) for one in found]
        axes.loglog(dimensions, penalised, marker, color=colour, mfc="none",
                    label=f"exact penalty, {scale}")  # fmt: skip
    axes.set(xlabel="dimension", ylabel="loss under attack")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
