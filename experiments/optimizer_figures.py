"""Figures of SGD against Adam and RMSProp."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.colors
import matplotlib.figure
import numpy as np

from experiments.engm_figures import COLOURS, MARKERS

DPI = 150


def of_name(path: Path, name: str) -> Path:
    """The file of one data set's figure."""
    return path.with_name(f"{path.stem}_{name.lower().replace(' ', '_')}{path.suffix}")


def _shown(image: np.ndarray) -> np.ndarray:
    """An image as matplotlib wants it: grey ``(h, w)`` or coloured ``(h, w, 3)`` in [0, 1]."""
    return np.clip(image if image.shape[-1] == 3 else image[..., 0], 0, 1)


def _axes(width: float, panels: int = 1, height: float = 3.3) -> tuple[Any, list[Any]]:
    figure = matplotlib.figure.Figure(figsize=(width, height), layout="constrained")
    axes = list(np.atleast_1d(figure.subplots(1, panels)))
    for where in axes:
        where.grid(alpha=0.3)
    return figure, axes


def robustness(
    path: Path,
    *,
    found: Mapping[str, Mapping[str, Mapping[str, np.ndarray]]],
    severities: Sequence[str],
) -> None:
    """Clean accuracy over that under each perturbation, and the bound; small dots are networks.

    Bounds that differ by orders of magnitude are drawn on a logarithmic scale.
    """
    figure, axes = _axes(12, len(severities) + 1)
    for (task, of_task), marker in zip(found.items(), MARKERS, strict=False):
        for (optimizer, runs), colour in zip(of_task.items(), COLOURS, strict=False):
            style = {"color": colour, "marker": marker, "ls": ""}
            for where, severity in zip(axes, severities, strict=False):
                where.plot(runs[severity], runs["clean"], ms=3, alpha=0.5, **style)
                where.plot(runs[severity].mean(), runs["clean"].mean(), ms=8, mec="black",
                           label=f"{optimizer}, {task}", **style)  # fmt: skip
            bound = np.exp(runs["log Lipschitz"])
            axes[-1].plot(runs["average"], bound, ms=3, alpha=0.5, **style)
            axes[-1].plot(runs["average"].mean(), bound.mean(), ms=8, mec="black", **style)
    for where, severity in zip(axes, severities, strict=False):
        twice = severity.startswith("l_2") and "band-limited" in found
        note = ", band-limited twice" if twice else ""
        where.set(xlabel=f"accuracy, {severity}{note} (%)", ylabel="clean accuracy (%)")
        where.set_ylim(where.get_ylim()[0] - 2, where.get_ylim()[1] + 2)
    axes[-1].set(xlabel="average robust accuracy (%)", ylabel="Lipschitz bound, l_2")
    bounds = [b for of_task in found.values() for runs in of_task.values()
              for b in runs["log Lipschitz"]]  # fmt: skip
    if max(bounds) - min(bounds) > 3:
        axes[-1].set_yscale("log")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6,
                  fontsize="small")  # fmt: skip
    figure.savefig(path, dpi=DPI)


def momentum(
    path: Path, *, found: Mapping[str, Mapping[str, np.ndarray]], columns: Sequence[str]
) -> None:
    """Accuracy of SGD with and without momentum; a dot for each network."""
    figure, (axes,) = _axes(6.5)
    places = np.arange(len(columns))
    for i, ((name, runs), colour) in enumerate(zip(found.items(), COLOURS, strict=False)):
        values = np.array([runs[column] for column in columns])
        at = places + 0.4 * (i - 0.5)
        axes.bar(at, values.mean(axis=1), 0.38, color=colour, alpha=0.6, label=name)
        axes.plot(at, values, ".", color="black", ms=3)
    axes.set(ylabel="accuracy (%)", xticks=places, ylim=(0, 105))
    axes.set_xticklabels(columns, rotation=25, ha="right")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=DPI)


def filters(
    path: Path,
    *,
    found: Mapping[str, np.ndarray],
    names: Sequence[str],
    removed: Sequence[float],
) -> None:
    """Accuracy on original images over what is removed from those of training; mean and range."""
    figure, (axes,) = _axes(5)
    for name, colour, marker in zip(names, COLOURS, MARKERS, strict=False):
        values = np.stack([found["none, 0"], *(found[f"{name}, {p}"] for p in removed)])
        at = [0, *removed]
        axes.plot(at, values.mean(axis=1), color=colour, marker=marker, label=f"{name} filter")
        axes.fill_between(at, values.min(axis=1), values.max(axis=1), color=colour, alpha=0.15,
                          lw=0)  # fmt: skip
    axes.set(xlabel="frequencies removed from the training images (%)",
             ylabel="accuracy on original images (%)")  # fmt: skip
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=DPI)


def energy(path: Path, *, maps: Mapping[str, np.ndarray]) -> None:
    """Mean magnitudes, logarithmic: maps above, their diagonals below."""
    figure = matplotlib.figure.Figure(figsize=(2.7 * len(maps), 5.2), layout="constrained")
    above, below = figure.subplots(2, len(maps), squeeze=False)
    # Below a ten-thousandth of the largest there is only rounding.
    used = {name: values > 1e-4 * values.max() for name, values in maps.items()}
    low = min(values[used[name]].min() for name, values in maps.items())
    high = max(values.max() for values in maps.values())
    norm = matplotlib.colors.LogNorm(low, high)
    cmap = matplotlib.colormaps["cividis"].with_extremes(bad="white")
    for top, bottom, (name, values) in zip(above, below, maps.items(), strict=True):
        picture = top.imshow(np.ma.masked_array(values, ~used[name]), cmap=cmap, norm=norm)
        top.set(title=name, xlabel="frequency j", ylabel="frequency i")
        diagonal, there = np.diag(values), np.diag(used[name])
        bottom.semilogy(np.flatnonzero(there), diagonal[there], color=COLOURS[0], marker="o", ms=3)
        if not there.all():
            start = int(np.flatnonzero(there).max()) + 0.5
            bottom.axvspan(start, len(diagonal) - 1, color="0.9", label="no energy")
            bottom.legend(fontsize="small")
        bottom.set(xlabel="frequency i = j", ylim=(0.8 * low, 1.25 * high))
        bottom.grid(alpha=0.3)
    below[0].set_ylabel("mean magnitude")
    figure.colorbar(picture, ax=list(above), shrink=0.8, label="mean magnitude")
    figure.savefig(path, dpi=DPI)


def bands(
    path: Path,
    *,
    found: Mapping[str, Any],
    optimizers: Sequence[str],
    masks: np.ndarray,
    noises: np.ndarray,
) -> None:
    """Masks and noises of the bands, and the accuracy that each costs with its standard error."""
    figure = matplotlib.figure.Figure(figsize=(8, 5.2), layout="constrained")
    grid = figure.add_gridspec(3, len(masks), height_ratios=(1, 1, 4))
    largest = np.abs(noises).max()
    for i, (mask, noise) in enumerate(zip(masks, noises, strict=True)):
        for row, (image, low, high) in enumerate(
            ((mask, 0, 1), (noise[..., 0], -largest, largest))
        ):
            where = figure.add_subplot(grid[row, i])
            where.imshow(image, "gray", vmin=low, vmax=high)
            where.set(xticks=[], yticks=[])
            if row == 0:
                where.set_title(f"{i}", fontsize="small")
            if i == 0:
                where.set_ylabel(("bases", "noise")[row], fontsize="small")
    axes = figure.add_subplot(grid[2, :])
    at = np.arange(len(masks))
    for name, colour, marker in zip(optimizers, COLOURS, MARKERS, strict=False):
        drop = found[name]["drop"]
        mean = drop.mean(axis=0)
        error = drop.std(axis=0, ddof=1) / np.sqrt(len(drop)) if len(drop) > 1 else 0 * mean
        axes.plot(at, mean, color=colour, marker=marker, label=name)
        axes.fill_between(at, mean - error, mean + error, color=colour, alpha=0.15, lw=0)
    share = axes.twinx()
    share.plot(at, 100 * found["irrelevant"], ":", color="black", label="irrelevant bases")
    share.set(ylabel="irrelevant bases (%)", ylim=(-3, 103))
    axes.set(xlabel="band, from low to high frequencies", ylabel="accuracy lost (points)",
             xticks=at)  # fmt: skip
    axes.grid(alpha=0.3)
    lines = [*axes.lines, *share.lines]
    axes.legend(lines, [line.get_label() for line in lines], fontsize="small", loc="center right")
    figure.savefig(path, dpi=DPI)


def dynamics(path: Path, *, lines: Mapping[str, Mapping[str, np.ndarray]], band: int) -> None:
    """Irrelevant weight and risks over the steps; the line is where signGD begins to oscillate."""
    figure, axes = _axes(12, 3)
    for (name, found), colour, style in zip(
        lines.items(), COLOURS, ("-", "--", "-.", ":"), strict=False
    ):
        for where, what in zip(axes, ("irrelevant", "risk", "attacked"), strict=True):
            where.plot(found["steps"], found[what], color=colour, ls=style, lw=1.6, label=name)
    for where, label in zip(
        axes,
        ("irrelevant weight w_2", "standard risk", "adversarial risk, eps = sqrt(2)"),
        strict=True,
    ):
        where.axvline(band, color="black", lw=0.8, label="signGD: A oscillates")
        where.set(xscale="log", xlabel="steps", ylabel=label)
    axes[1].set(yscale="log", ylim=(1e-9, 2))
    axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=DPI)


def regions(path: Path, *, band: Mapping[str, Any], starts: Mapping[str, Mapping]) -> None:
    """Regions of the band with a step of signGD from each; starts, with the steps that count."""
    figure, axes = _axes(13, 1 + len(starts), 4.4)
    _regions(axes[0], band)
    start, end = band["from"], band["to"]
    axes[0].quiver(*start, *(end - start), angles="xy", scale_units="xy", scale=1, width=0.004,
                   color="black")  # fmt: skip
    axes[0].set(title="s1 / s0 = 1: a step from each region", xlim=(-1, 1), ylim=(-2, 2))
    for where, (ratio, found) in zip(axes[1:], starts.items(), strict=True):
        _regions(where, found)
        lines = where.contour(found["a"], found["b"], found["moved"], colors="black",
                              levels=[1, 5, 10, 15, 20, 25, 30], linewidths=0.7)  # fmt: skip
        where.clabel(lines, fontsize=7)
        where.set(title=f"s1 / s0 = {ratio}: steps that move w_2", xlim=(0, 12), ylim=(0, 12))
    for where in axes:
        where.set(xlabel="A / (s0 eta)", ylabel="B / (s0 eta)")
    figure.savefig(path, dpi=DPI)


PALE = ["#7FB8D8", "#EAAE7F", "#7FCEB9", "#E5BCD3", "#F2CF7F", "#AAD9F4", "#F7F1A0", "#BDBDBD",
        "#E3E3E3", "#FFFFFF"]  # fmt: skip


def _regions(axes: Any, found: Mapping[str, Any]) -> None:
    """A colour for each region, and its name in its middle."""
    present = np.unique(found["region"])
    place = np.searchsorted(present, found["region"])
    cmap = matplotlib.colors.ListedColormap(PALE[: len(present)])
    axes.pcolormesh(found["a"], found["b"], place, cmap=cmap, vmin=-0.5, vmax=len(present) - 0.5,
                    rasterized=True)  # fmt: skip
    for name, (a, b) in found["middle"].items():
        axes.text(a, b, name, ha="center", va="bottom", fontsize=9, weight="bold", zorder=5,
                  bbox={"facecolor": "white", "alpha": 0.7, "lw": 0, "pad": 1})  # fmt: skip


def panels(
    path: Path,
    *,
    pictures: Mapping[str, Mapping[float, Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]]]],
) -> None:
    """One image of each set: filtered, what is gone (x 3), the bases that stay (white)."""
    columns = [(name, p) for name, of_set in pictures.items() for p in of_set]
    kinds = ("energy", "low-pass")
    figure = matplotlib.figure.Figure(figsize=(1.05 * len(columns) + 0.8, 6.6),
                                      layout="constrained")  # fmt: skip
    grid = figure.subplots(6, len(columns), squeeze=False)
    for j, (name, p) in enumerate(columns):
        for i, kind in enumerate(kinds):
            image, gone, mask = pictures[name][p][kind]
            shown = (_shown(image), _shown(3 * np.abs(gone)), mask.astype(float))
            labels = (f"{kind} filter", "difference (x 3)", "bases kept")
            for k, (picture, label) in enumerate(zip(shown, labels, strict=True)):
                where = grid[3 * i + k, j]
                where.imshow(picture, "gray", vmin=0, vmax=1)
                where.set(xticks=[], yticks=[])
                if j == 0:
                    where.set_ylabel(label, fontsize="small")
        grid[0, j].set_title(f"{name}\n{p} % removed", fontsize="small")
    figure.savefig(path, dpi=DPI)


def perturbed(
    path: Path,
    *,
    pictures: Mapping[str, tuple[np.ndarray, np.ndarray]],
    names: Sequence[str],
    clean: np.ndarray,
    labels: np.ndarray,
) -> None:
    """Images as they are, and perturbed for each optimizer, titled by what the network sees."""
    n, rows = len(clean), 1 + len(names) * len(pictures)
    figure = matplotlib.figure.Figure(figsize=(n + 1.6, 1.12 * rows), layout="constrained")
    grid = figure.subplots(rows, n, squeeze=False)
    shown = [("clean", clean, labels)]
    for i, name in enumerate(names):
        shown += [(f"{name}\n{optimizer}", images[i], predicted[i])
                  for optimizer, (images, predicted) in pictures.items()]  # fmt: skip
    for of_row, (label, images, predicted) in zip(grid, shown, strict=True):
        of_row[0].set_ylabel(label, fontsize="small")
        for where, image, seen, right in zip(of_row, images, predicted, labels, strict=True):
            where.imshow(_shown(image), "gray", vmin=0, vmax=1)
            where.set(xticks=[], yticks=[])
            wrong = seen != right
            where.set_title(f"{seen}{' (wrong)' if wrong else ''}", fontsize=7,
                            color=COLOURS[1] if wrong else "black", pad=2)  # fmt: skip
    figure.savefig(path, dpi=DPI)
