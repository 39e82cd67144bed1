"""Figures of the studies of outer optimizers; colours that the colour-blind can tell apart."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np

# Okabe and Ito (2008).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vP*"


def _named(method: str) -> str:
    return method.upper().replace("_", "-")


def robust_curves(
    path: Path, *, curves: Mapping[str, tuple[np.ndarray, np.ndarray]], bars: Mapping[str, float]
) -> None:
    """Robust accuracy over the epochs, mean and range of the runs; and the gain over MSGD."""
    figure = matplotlib.figure.Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for (method, (epoch, accuracy)), colour, marker in zip(
        curves.items(), COLOURS, MARKERS, strict=False
    ):
        label = _named(method)
        left.plot(epoch, accuracy.mean(0), color=colour, lw=1, marker=marker, ms=3, label=label)
        left.fill_between(epoch, accuracy.min(0), accuracy.max(0), color=colour, alpha=0.12, lw=0)
    left.set(xlabel="epoch", ylabel="robust accuracy, PGD-20 (%)")
    left.legend(fontsize="small")
    names = [_named(method) for method in bars]
    right.bar(names, list(bars.values()), color=COLOURS[: len(names)])
    right.tick_params(axis="x", rotation=45)
    right.axhline(0, color="black", lw=0.8)
    right.set(ylabel="best robust accuracy over MSGD (points)")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def over_eps(path: Path, *, eps: Sequence[float], table: Mapping[str, np.ndarray]) -> None:
    """Moments of the gradients and DeepFool distance over the radius of training."""
    figure = matplotlib.figure.Figure(figsize=(10, 3.2), layout="constrained")
    axes = figure.subplots(1, 3)
    for colour, name, where in zip(COLOURS, ("mean norm", "variance"), axes, strict=False):
        where.plot(eps, table[name], color=colour, marker="o")
        where.set(ylabel=f"{name} of per-example gradients")
    for colour, name in zip(COLOURS, ("MSGD", "ENGM"), strict=False):
        axes[2].plot(eps, table[f"rho, {name}"], color=colour, marker="o", label=name)
    axes[2].set(ylabel="DeepFool distance (l2, input units)")
    axes[2].legend()
    for where in axes:
        where.set(xlabel="eps of training (l_inf, input units)")
        where.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def gradient_curves(
    path: Path,
    *,
    epoch: np.ndarray,
    curves: Mapping[str, Mapping[str, np.ndarray]],
    errors: Mapping[float, np.ndarray],
) -> None:
    """Mean norm, variance, correlation and weight error over the epochs."""
    figure = matplotlib.figure.Figure(figsize=(11, 3), layout="constrained")
    axes = figure.subplots(1, 4)
    labels = {
        "mean_norm": "mean norm",
        "variance": "variance",
        "correlation": "correlation of norms",
    }
    for where, (name, text) in zip(axes, labels.items(), strict=False):
        for colour, (training, series) in zip(COLOURS, curves.items(), strict=False):
            where.plot(epoch, series[name], color=colour, label=training)
            if f"{name}_train" in series:
                label = f"{training}, training mode"
                where.plot(epoch, series[f"{name}_train"], color=colour, ls="--", label=label)
        where.set(ylabel=text, yscale="linear" if name == "correlation" else "log")
        where.legend(fontsize="small")
    for colour, (alpha, values) in zip(COLOURS, errors.items(), strict=False):
        axes[3].plot(epoch, values, color=colour, label=f"alpha = {alpha:g}")
    axes[3].set(ylabel="error of estimated weights (%)")
    if errors:
        axes[3].legend(fontsize="small")
    for where in axes:
        where.set(xlabel="epoch")
        where.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def loss_planes(path: Path, *, planes: Mapping[str, Any], labels: np.ndarray) -> None:
    """Contours of the loss, one row per optimizer, the same levels in each column."""
    figure = matplotlib.figure.Figure(figsize=(2.6 * len(labels), 5.4), layout="constrained")
    rows = figure.subplots(len(planes), len(labels), squeeze=False, sharex=True, sharey=True)
    top = np.stack([plane.loss.max(axis=(1, 2)) for plane in planes.values()]).max(axis=0)
    for row, (method, plane) in zip(rows, planes.items(), strict=True):
        for i, axes in enumerate(row):
            grid = plane.coordinates[i]
            levels = np.linspace(0, max(float(top[i]), 1e-6), 15)
            # The first index of the loss is the direction of PGD: it goes along x.
            shown = axes.contourf(grid, grid, plane.loss[i].T, levels, cmap="cividis")
            axes.plot(0, 0, "x", color="white")
            axes.set_title(f"{_named(method)}, digit {labels[i]}", fontsize=9)
            if method == list(planes)[-1]:
                axes.set_xlabel("PGD-20 direction")
                figure.colorbar(
                    shown, ax=rows[:, i], location="bottom", label="loss (nats)",
                    ticks=[0, levels[-1] / 2, levels[-1]], format="%.2g",
                )  # fmt: skip
        row[0].set_ylabel("random direction")
    figure.savefig(path, dpi=150)


def sweep(
    path: Path, *, knob: str, values: Sequence[float], found: Mapping[str, Mapping[str, Any]]
) -> None:
    """Clean and robust accuracy and overfitting over one setting."""
    figure = matplotlib.figure.Figure(figsize=(10, 3.2), layout="constrained")
    axes = figure.subplots(1, 3)
    labels = {
        "clean": "clean accuracy (%)",
        "best": "best robust accuracy, PGD-20 (%)",
        "overfit": "robust overfitting (%)",
    }
    places = np.arange(len(values))
    for where, (name, label) in zip(axes, labels.items(), strict=True):
        for colour, marker, (kind, numbers) in zip(COLOURS, MARKERS, found.items(), strict=False):
            where.plot(places, numbers[name], color=colour, marker=marker, label=kind)
        where.set(xlabel=knob, ylabel=label, xticks=places, xticklabels=[f"{v:g}" for v in values])
        where.grid(alpha=0.3)
        where.legend(fontsize="small")
    figure.savefig(path, dpi=150)


def distances(path: Path, *, series: Mapping[str, np.ndarray]) -> None:
    """Median and 99th percentile of the distance to the minimum, over the steps."""
    figure = matplotlib.figure.Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.subplots()
    for colour, (name, (median, high)) in zip(COLOURS, series.items(), strict=False):
        axes.plot(median, color=colour, label=f"{name}: median", lw=1)
        axes.plot(high, color=colour, ls=":", label=f"{name}: 99 %", lw=1)
    axes.set(xlabel="step", ylabel="distance to the minimum", yscale="log")
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
