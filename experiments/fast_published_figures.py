"""Figures of the published runs of fast adversarial training."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.figure
import numpy as np

from experiments.engm_figures import COLOURS


def monitored(path: Path, *, curves: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """Figs. 2.4 and 2.11: accuracies, losses and alignment over the evaluations of each network."""
    panels = (("fgsm_accuracy", "pgd_accuracy"), ("fgsm_loss", "pgd_loss"),
              ("alignment", "cosine_fgsm_pgd"))  # fmt: skip
    figure = matplotlib.figure.Figure(figsize=(12, 3.2), layout="constrained")
    axes = figure.subplots(1, len(panels))
    for where, names in zip(axes, panels, strict=True):
        for colour, (label, series) in zip(COLOURS, curves.items(), strict=False):
            epoch = 1 + np.arange(len(series[names[0]]))
            for name, style in zip(names, ("-", "--"), strict=True):
                where.plot(epoch, series[name], style, color=colour, label=f"{label}: {name}")
        where.set(xlabel="evaluation")
        where.grid(alpha=0.3)
        where.legend(fontsize="x-small")
    figure.savefig(path, dpi=150)


def accuracies(
    path: Path,
    *,
    xlabel: str,
    curves: Mapping[str, tuple[Sequence[float], Mapping[str, np.ndarray]]],
) -> None:
    """Figs. 2.1, 2.3, 2.8, 2.14 to 2.16: accuracies of each method over a setting.

    Args:
      path: the file.
      xlabel: the setting.
      curves: method to the setting's values and, by name of the accuracy (a panel each), ``(values,
        seeds)`` in per cent; drawn are mean and range.
    """
    names = list(next(iter(curves.values()))[1])
    figure = matplotlib.figure.Figure(figsize=(3.6 * len(names), 3.2), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, len(names)))
    for where, name in zip(axes, names, strict=True):
        for colour, (method, (values, found)) in zip(COLOURS, curves.items(), strict=False):
            seeds = found[name]
            where.plot(values, seeds.mean(axis=1), color=colour, marker=".", label=method)
            where.fill_between(values, seeds.min(1), seeds.max(1), color=colour, alpha=0.15)
        where.set(xlabel=xlabel, ylabel=f"{name} (%)", ylim=(0, 100))
        where.grid(alpha=0.3)
    axes[0].legend(fontsize="x-small")
    figure.savefig(path, dpi=150)
