"""Figures of fast adversarial training."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np

from experiments.engm_figures import COLOURS


def curves(path: Path, *, epoch: np.ndarray, runs: Mapping[str, Any]) -> None:
    """Accuracies, alignment and filter norms over the epochs; lines are means over the seeds."""
    figure = matplotlib.figure.Figure(figsize=(12, 3.2), layout="constrained")
    axes = figure.subplots(1, 4)
    for colour, (method, found) in zip(COLOURS, runs.items(), strict=False):
        axes[0].plot(epoch, 100 * found.fgsm.mean(0), color=colour, label=method)
        axes[1].plot(epoch, 100 * found.pgd.mean(0), color=colour, label=method)
        axes[2].plot(epoch, found.alignment.mean(0), color=colour, label=method)
        axes[3].plot(epoch, np.sort(found.filter_norm, axis=-1).mean(0), color=colour)
    labels = ("accuracy under FGSM (%)", "accuracy under PGD-50 (%)", "gradient alignment",
              "norm of each filter, sorted")  # fmt: skip
    for where, label in zip(axes, labels, strict=True):
        where.set(xlabel="epoch", ylabel=label)
        where.grid(alpha=0.3)
    axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=150)


def weight(path: Path, *, values: Sequence[float], runs: Any) -> None:
    """Last accuracies over the weight of the penalty."""
    figure = matplotlib.figure.Figure(figsize=(4.5, 3.2), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(values))
    for colour, (name, curve) in zip(
        COLOURS, {"clean": runs.clean, "FGSM": runs.fgsm, "PGD-50": runs.pgd}.items(), strict=False
    ):
        axes.plot(places, 100 * curve[:, -1], color=colour, marker="o", label=name)
    axes.set(xlabel="weight of GradAlign", ylabel="accuracy (%)", xticks=places,
             xticklabels=[f"{v:g}" for v in values])  # fmt: skip
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
