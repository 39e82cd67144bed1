"""Figures of the implicit bias of optimizers, networks and penalties."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np
import scipy.spatial

from experiments.engm_figures import COLOURS, MARKERS

DPI = 150


def _axes(width: float, columns: int = 1, rows: int = 1, height: float = 3.3) -> tuple[Any, Any]:
    figure = matplotlib.figure.Figure(figsize=(width, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for where in axes.ravel():
        where.grid(alpha=0.3)
    return figure, axes


def _styles(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """A colour and a marker for each name; beyond seven, dashed."""
    return {
        name: {
            "color": COLOURS[i % len(COLOURS)],
            "marker": MARKERS[i % len(MARKERS)],
            "ls": "-" if i < len(COLOURS) else "--",
            "ms": 4,
            "lw": 1.2,
        }
        for i, name in enumerate(names)
    }


def sweep(
    path: Path, *, found: Mapping[str, tuple[np.ndarray, Mapping[str, Any]]], ratios: Sequence[int]
) -> None:
    """Largest eps over d/n, by attacks above and by margins below; mean and range of the seeds."""
    figure, axes = _axes(12, len(found), 2)
    for column, (attack, (best, methods)) in enumerate(found.items()):
        styles = _styles([*methods])
        for where, kind in zip(axes[:, column], ("attacked", "eps"), strict=True):
            where.plot(ratios, best.mean(axis=1), color="black", lw=3, alpha=0.3, label="optimum")
            for name, one in methods.items():
                values = one.eps if kind == "eps" else one.attacked * best
                where.plot(ratios, values.mean(axis=1), label=name, **styles[name])
                where.fill_between(ratios, values.min(axis=1), values.max(axis=1), lw=0,
                                   color=styles[name]["color"], alpha=0.1)  # fmt: skip
            where.set_xscale("log", base=2)
            where.set_yscale("log", nonpositive="mask")
            where.set(xticks=ratios, xticklabels=list(map(str, ratios)), xlabel="d / n")
        axes[0, column].set(title=f"{attack} attacks", ylabel="largest eps without an error")
        axes[1, column].set(title=f"{attack} margins", ylabel="largest eps (input units)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5,
                  fontsize="small")  # fmt: skip
    figure.savefig(path, dpi=DPI)


def _bars(where: Any, names: Sequence[str], values: np.ndarray, title: str) -> None:
    """Mean shares as bars, and a dot for each seed."""
    places = np.arange(len(names))
    where.barh(places, values.mean(axis=1), color=COLOURS[0], alpha=0.6)
    for place, one in zip(places, values, strict=True):
        where.plot(one, np.full(len(one), place), ".", color="black", ms=4)
    where.axvline(1, color="black", lw=0.8)
    where.set(yticks=places, yticklabels=names, title=title, xlabel="share of the largest eps")
    where.invert_yaxis()


def fourier(
    path: Path, *, optimum: np.ndarray, found: Mapping[str, Any], sizes: Sequence[int]
) -> None:
    """What each method reaches of the largest Fourier-l_inf eps, by attacks and by margins."""
    figure, axes = _axes(11, 2, len(sizes))
    for row, n in enumerate(sizes):
        best = f"n = {n}, eps* = {optimum[row].mean():.3g}"
        for where, kind in zip(axes[row], ("attacked", "share"), strict=True):
            values = np.stack([getattr(one, kind)[row] for one in found.values()])
            how = "attacks" if kind == "attacked" else "margins"
            _bars(where, [*found], np.maximum(values, 0), f"Fourier-l_inf {how}, {best}")
    figure.savefig(path, dpi=DPI)


def gap(
    path: Path,
    *,
    steps: np.ndarray,
    shares: Mapping[str, np.ndarray],
    sizes: Sequence[int],
    rates: Sequence[float],
    scales: Sequence[float],
) -> None:
    """What two convolutions lack over steps, for each start and step size; dashed: float32."""
    panels = [(f"d = 100, n = {n}", ("float64", "float32"), i) for i, n in enumerate(sizes)]
    panels.append(("d = 2, n = 3", ("d = 2",), 0))
    figure, axes = _axes(12, len(panels))
    for where, (title, kinds, size) in zip(axes[0], panels, strict=True):
        for i, marker in zip(range(len(rates)), MARKERS, strict=False):
            for j, colour in zip(range(len(scales)), COLOURS, strict=False):
                for kind, style in zip(kinds, ("-", "--"), strict=False):
                    lack = 1 - shares[kind][i, j, :, size].mean(axis=-1)
                    where.plot(steps, lack, color=colour, marker=marker, ms=3, lw=0.8, ls=style)
        where.set(title=title, xlabel="steps", yscale="log", ylabel="1 - eps / eps*")
        where.set_ylim(1e-5, 3)
    for rate, marker in zip(rates, MARKERS, strict=False):
        axes[0, 0].plot([], [], color="0.4", marker=marker, ls="", label=f"learning rate {rate:g}")
    for scale, colour in zip(scales, COLOURS, strict=False):
        axes[0, 0].plot([], [], color=colour, label=f"first layer {scale:g}")
    axes[0, 0].plot([], [], color="0.4", ls="--", label="float32")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5,
                  fontsize="small")  # fmt: skip
    figure.savefig(path, dpi=DPI)


def at(
    path: Path,
    *,
    shares: Sequence[float],
    found: Mapping[str, np.ndarray],
    zero: np.ndarray,
) -> None:
    """What adversarial training reaches by the size of its attack."""
    figure, axes = _axes(6)
    where = axes[0, 0]
    for name, style in _styles([*found]).items():
        values = found[name]
        where.plot(shares, values.mean(axis=1), label=name, **style)
        where.fill_between(shares, values.min(axis=1), values.max(axis=1), lw=0,
                           color=style["color"], alpha=0.12)  # fmt: skip
    where.axvline(1, color="black", lw=0.8)
    where.axvspan(zero.min(), max(shares), color="0.9", label="w = 0, from the first seed on")
    where.set(xlabel="eps of training / eps*", ylabel="largest eps / eps*, l_inf")
    where.legend(fontsize="small")
    figure.savefig(path, dpi=DPI)


def penalty(
    path: Path,
    *,
    coefficients: Sequence[float],
    shares: np.ndarray,
    sizes: Sequence[int],
    zero: np.ndarray,
) -> None:
    """What an l_1 penalty reaches by its coefficient; mean and range of the seeds."""
    figure, axes = _axes(6)
    where = axes[0, 0]
    for i, (n, style) in enumerate(_styles(list(map(str, sizes))).items()):
        values = shares[:, i]
        where.plot(coefficients, values.mean(axis=1), label=f"n = {n}", **style)
        where.fill_between(coefficients, values.min(axis=1), values.max(axis=1), lw=0,
                           color=style["color"], alpha=0.12)  # fmt: skip
        where.axvline(zero[i].mean(), color=style["color"], ls=":",
                      label=f"n = {n}: w = 0 from here on")  # fmt: skip
    where.set(xscale="log", xlabel="coefficient of the l_1 penalty",
              ylabel="largest eps / eps*, l_inf")  # fmt: skip
    where.legend(fontsize="small")
    figure.savefig(path, dpi=DPI)


def saddle(path: Path, *, margins: Mapping[str, np.ndarray]) -> None:
    """The margins of two classifiers of equal risk."""
    figure, axes = _axes(5)
    where = axes[0, 0]
    for i, (name, values) in enumerate(margins.items()):
        at = np.arange(1, len(values) + 1) + 0.4 * (i - 0.5)
        where.bar(at, values, 0.38, color=COLOURS[i], label=name)
    where.axhline(0, color="black", lw=0.8)
    where.set(xlabel="example", ylabel="margin", title="equal logistic risk")
    where.legend(fontsize="small")
    figure.savefig(path, dpi=DPI)


def slack(
    path: Path, *, slacks: Sequence[float], curves: Mapping[str, np.ndarray], best: float
) -> None:
    """The largest eps by the slack, for weights of several sizes."""
    figure, axes = _axes(5.5)
    where = axes[0, 0]
    for name, style in _styles([*curves]).items():
        values = curves[name]
        finite = np.isfinite(values)
        if finite.any():
            where.plot(np.asarray(slacks)[finite], values[finite], label=name, **style)
    where.axhline(best, color="black", lw=0.8, label="eps*, no slack")
    where.axvspan(1, max(slacks), color="0.9", label="w = 0 withstands everything")
    where.set(xlabel="slack: mean hinge loss that is allowed", ylabel="largest eps, l_inf",
              ylim=(-best, 4 * best))  # fmt: skip
    where.legend(fontsize="small")
    figure.savefig(path, dpi=DPI)


def balls(path: Path, *, surfaces: Mapping[str, np.ndarray]) -> None:
    """Surfaces of unit balls, and their shadows on the walls."""
    figure = matplotlib.figure.Figure(figsize=(12, 3.6), layout="constrained")
    for i, ((name, points), colour) in enumerate(zip(surfaces.items(), COLOURS, strict=False)):
        where = figure.add_subplot(1, len(surfaces), i + 1, projection="3d")
        where.plot_surface(*np.moveaxis(points, -1, 0), color=colour, alpha=0.55, rcount=80,
                           ccount=125, lw=0)  # fmt: skip
        flat = points.reshape(-1, 3)
        for axis, wall in enumerate((-2.2, 2.2, -2.2)):
            seen = np.delete(flat, axis, axis=1)
            edge = seen[scipy.spatial.ConvexHull(seen).vertices]
            edge = np.insert(np.concatenate([edge, edge[:1]]), axis, wall, axis=1)
            where.plot(*edge.T, color="black", lw=1)
        where.set(xlim=(-2.2, 2.2), ylim=(-2.2, 2.2), zlim=(-2.2, 2.2), title=name,
                  xlabel="x_1", ylabel="x_2", zlabel="x_3", box_aspect=(1, 1, 1))  # fmt: skip
    figure.savefig(path, dpi=DPI)


def precond(path: Path, *, found: Mapping[str, np.ndarray], sizes: Sequence[int]) -> None:
    """What preconditioned and plain descent reach of the largest Mahalanobis eps."""
    figure, axes = _axes(5)
    where = axes[0, 0]
    for name, style in _styles([*found]).items():
        where.plot(sizes, found[name], color=style["color"], marker=style["marker"], ls="", ms=4)
        where.plot(sizes, found[name].mean(axis=1), label=name, **style)
    where.set(xscale="log", xticks=sizes, xticklabels=list(map(str, sizes)),
              xlabel="examples in 100 dimensions", ylabel="share of the largest eps, Mahalanobis",
              ylim=(0, 1.05))  # fmt: skip
    where.minorticks_off()
    where.legend(fontsize="small")
    figure.savefig(path, dpi=DPI)
