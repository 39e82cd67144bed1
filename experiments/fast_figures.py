"""Figures of fast adversarial training."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np

from experiments.engm_figures import COLOURS, MARKERS


def _figure(rows: int, columns: int, width: float = 3.2, height: float = 2.9) -> tuple[Any, Any]:
    size = (width * columns, height * rows)
    figure = matplotlib.figure.Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _finish(figure: Any, path: Path, axes: Any) -> None:
    for where in np.ravel(axes):
        where.grid(alpha=0.3)
    np.ravel(axes)[0].legend(fontsize="small")
    figure.savefig(path, dpi=130)


def curves(path: Path, *, epoch: np.ndarray, runs: Mapping[str, Any]) -> None:
    """Accuracies, losses, alignment, filter norms over the epochs; lines are means over seeds."""
    figure, axes = _figure(2, 4)
    panels = {"accuracy under FGSM (%)": "fgsm", "accuracy under PGD-50 (%)": "pgd",
              "gradient alignment": "alignment", "cos(FGSM, PGD-50)": "attack_cosine",
              "loss under FGSM": "fgsm_loss", "loss under PGD-50": "pgd_loss"}  # fmt: skip
    for colour, (method, found) in zip(COLOURS, runs.items(), strict=False):
        for where, (label, name) in zip(axes.flat, panels.items(), strict=False):
            scale = 100 if "%" in label else 1
            where.plot(epoch, scale * getattr(found, name).mean(0), color=colour, label=method)
            where.set(ylabel=label, yscale="log" if "loss" in label else "linear")
        for where, name in zip(axes[1, 2:], ("filter_norm", "outgoing_norm"), strict=True):
            # Of the filters in the order of their norms at the end of each run.
            order = np.argsort(found.filter_norm[:, -1])[:, None]
            values = np.take_along_axis(getattr(found, name), order, 2).mean(0)
            where.plot(epoch, values, color=colour, lw=1)
    axes[1, 2].set(ylabel="l_2 norm of each filter")
    axes[1, 3].set(ylabel="l_2 norm of each filter's outputs")
    for where in axes.flat:
        where.set(xlabel="epoch")
    _finish(figure, path, axes)


def weight(path: Path, *, values: Sequence[float], runs: Any) -> None:
    """Last accuracies over the weight of the penalty."""
    figure, axes = _figure(1, 1, 4.5)
    places = np.arange(len(values))
    shown = {"clean": runs.clean, "FGSM": runs.fgsm, "PGD-50": runs.pgd}
    for colour, (name, curve) in zip(COLOURS, shown.items(), strict=False):
        axes[0, 0].plot(places, 100 * curve[:, -1], color=colour, marker="o", label=name)
    axes[0, 0].set(xlabel="weight of GradAlign", ylabel="accuracy (%)", xticks=places,
                   xticklabels=[f"{v:g}" for v in values])  # fmt: skip
    _finish(figure, path, axes)


def over_eps(
    path: Path,
    *,
    radii: Sequence[float],
    pgd: Mapping[str, Mapping[str, np.ndarray]],
    clean: Mapping[str, Mapping[str, np.ndarray]],
) -> None:
    """Robust and clean accuracy over the radius, last and stopped early; mean and range of runs."""
    figure, axes = _figure(2, 2, 4.0)
    for row, (name, table) in zip(axes, {"PGD-50": pgd, "clean": clean}.items(), strict=True):
        for where, when in zip(row, ("last", "stopped early"), strict=True):
            for colour, marker, (method, found) in zip(COLOURS, MARKERS, table.items(),
                                                       strict=False):  # fmt: skip
                values = found[when]
                where.plot(radii, values.mean(1), color=colour, marker=marker, ms=4, label=method)
                where.fill_between(radii, values.min(1), values.max(1), color=colour, alpha=0.1,
                                   lw=0)  # fmt: skip
            where.set(xlabel="eps (l_inf, input units)", ylabel=f"{name} accuracy (%)",
                      title=when, xticks=radii)  # fmt: skip
    _finish(figure, path, axes)


def reduced_step(path: Path, *, radii: Sequence[float], pgd: Mapping[str, np.ndarray]) -> None:
    """Accuracy of the last networks over the radius of the attack."""
    figure, axes = _figure(1, 1, 5.5, 3.8)
    for colour, marker, (name, values) in zip(COLOURS, MARKERS, pgd.items(), strict=False):
        axes[0, 0].plot(radii, values.mean(0), color=colour, marker=marker, ms=4, label=name)
    axes[0, 0].set(xlabel="eps of PGD-50 (l_inf, input units)", ylabel="accuracy (%)")
    _finish(figure, path, axes)


def epochs(path: Path, *, runs: Mapping[int, Any]) -> None:
    """Accuracies of the last networks over the length of training; points are seeds."""
    figure, axes = _figure(1, 1, 4.5)
    where = axes[0, 0]
    for colour, name in zip(COLOURS, ("clean", "pgd"), strict=False):
        last = {n: 100 * getattr(found, name)[:, -1] for n, found in runs.items()}
        label = {"clean": "clean", "pgd": "PGD-50"}[name]
        where.plot(list(last), [v.mean() for v in last.values()], color=colour, label=label)
        for n, values in last.items():
            where.plot(np.full(len(values), n), values, ".", color=colour)
    where.set(xlabel="epochs", ylabel="accuracy (%)", xscale="log", xticks=list(runs),
              xticklabels=[str(n) for n in runs])  # fmt: skip
    where.minorticks_off()
    _finish(figure, path, axes)


def filters(
    path: Path, *, epoch: np.ndarray, kernels: np.ndarray, norm: np.ndarray, outgoing: np.ndarray
) -> None:
    """Filters ``(t, 3, 3, c, filters)`` of one network over the epochs, above them their norms.

    Each channel of a filter has a row.
    """
    channels, count = kernels.shape[-2:]
    pictures = np.moveaxis(kernels, (-1, -2), (0, 1)).reshape(-1, len(epoch), 3, 3)
    names = [f"filter {i + 1}" + (f", {'RGB'[c]}" if channels == 3 else "")
             for i in range(count) for c in range(channels)]  # fmt: skip
    rows = len(names)
    figure = matplotlib.figure.Figure(figsize=(1.0 * len(epoch), 3 + rows), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(3, rows))
    axes = upper.subplots(1, 2)
    for where, values, label in zip(axes, (norm, outgoing), ("of the filter", "of its outputs"),
                                    strict=True):  # fmt: skip
        for i, colour in zip(range(count), COLOURS, strict=False):
            where.plot(epoch, values[:, i], color=colour, marker="o", ms=3, label=f"filter {i + 1}")
        where.set(xlabel="epoch", ylabel=f"l_2 norm {label}")
        where.grid(alpha=0.3)
    axes[0].legend(fontsize="small")
    top = np.abs(kernels).max()
    for axes, name, kernel in zip(
        lower.subplots(rows, len(epoch), squeeze=False), names, pictures, strict=True
    ):
        for where, at, picture in zip(axes, epoch, kernel, strict=True):
            where.imshow(picture, cmap="RdBu", vmin=-top, vmax=top)
            where.set(xticks=[], yticks=[])
            if name == names[0]:
                where.set_title(f"{at}", fontsize=8)
        axes[0].set_ylabel(name, fontsize=8)
    figure.savefig(path, dpi=130)


def feature_maps(path: Path, *, pictures: Mapping[str, Sequence[np.ndarray]]) -> None:
    """Each picture of a clean image above that of the image with noise, on one colour scale."""
    figure, axes = _figure(2, len(pictures), 1.5, 1.7)
    for column, (name, pair) in zip(axes.T, pictures.items(), strict=True):
        top = max(np.abs(picture).max() for picture in pair) or 1.0
        for where, picture in zip(column, pair, strict=True):
            signed = "gradient" in name
            where.imshow(picture, cmap="RdBu" if signed else "gray", vmin=-top if signed else 0,
                         vmax=top)  # fmt: skip
            where.set(xticks=[], yticks=[])
        column[0].set_title(name, fontsize=7)
    for where, name in zip(axes[:, 0], ("clean", "with noise"), strict=True):
        where.set_ylabel(name, fontsize=8)
    figure.savefig(path, dpi=150)


def start(
    path: Path, *, steps: np.ndarray, bound: np.ndarray, found: Mapping[int, np.ndarray]
) -> None:
    """Norms of the perturbations over the step, in units of ``eps sqrt(d)``."""
    figure, axes = _figure(1, 1, 4.8, 3.2)
    where = axes[0, 0]
    where.plot(steps, bound, color="black", lw=1, label="bound of lemma 1")
    for colour, marker, (d, values) in zip(COLOURS, MARKERS, found.items(), strict=False):
        where.plot(steps, values, marker, ms=4, color=colour, label=f"d = {d}")
    where.axvline(1.25, color="gray", ls="--", lw=1)
    where.set(xlabel="step size / eps", ylabel="mean l_2 norm / (eps sqrt(d))")
    _finish(figure, path, axes)


def initialization(path: Path, *, radii: np.ndarray, found: Mapping[str, np.ndarray]) -> None:
    """Alignment at initialisation and its bounds over the radius."""
    figure, axes = _figure(1, 1, 4.8, 3.2)
    for colour, (name, values) in zip(COLOURS, found.items(), strict=False):
        axes[0, 0].plot(radii, values, color=colour, label=name)
    axes[0, 0].set(xlabel="eps (input units)", ylabel="gradient alignment", ylim=(0.45, 1.02))
    _finish(figure, path, axes)


def linearization(path: Path, *, length: np.ndarray, found: Mapping[str, Any]) -> None:
    """Error of the first order over the l_2 norm, one plot for each kind of training."""
    figure, axes = _figure(1, len(found), 4.0, 3.2)
    for where, (training, lines) in zip(axes[0], found.items(), strict=True):
        for colour, (direction, values) in zip(COLOURS, lines.items(), strict=False):
            where.plot(length, values.mean(0), color=colour, marker="o", ms=3, label=direction)
        where.set(xlabel="l_2 norm of the perturbation", ylabel="error of the first order",
                  title=f"{training} training")  # fmt: skip
    _finish(figure, path, axes)
