"""Figures of the studies of Square Attack, in colours that colour-blind readers can tell apart."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np

# Okabe and Ito (2008), with a marker each.
STYLES = (
    ("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v"),
    ("#56B4E9", "P"), ("#000000", "X"),
)  # fmt: skip
RADIUS = {"linf": "l_inf radius eps (input units)", "l2": "l_2 radius eps (input units)"}


def ablation(result: Mapping[str, Any], path: Path) -> None:
    """Average and median queries of each variant, one plot for each norm."""
    plots = _by_norm(result["rows"])
    longest = max(map(len, plots.values()))
    figure, axes_row = _figure(len(plots), height=1.2 + 0.32 * longest, width=5.5)
    for axes, (norm, rows) in zip(axes_row, plots.items(), strict=True):
        at = np.arange(len(rows))
        axes.barh(at, _column(rows, "mean"), 0.6, color="#56B4E9", label="average",
                  xerr=[row["std"]["mean"] for row in rows])  # fmt: skip
        axes.plot(_column(rows, "median"), at, "D", color="#D55E00", label="median")
        axes.set_yticks(at, [f"{row['variant']}, {row['init']}" for row in rows], fontsize=8)
        axes.set(xlabel="queries to success", title=norm)
        axes.grid(alpha=0.3, axis="x")
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def p(result: Mapping[str, Any], path: Path) -> None:
    """Failure and queries over the share of pixels in the first windows."""
    plots = _by_norm(result["rows"])
    figure, (left, right) = _figure(2)
    for (norm, rows), (color, marker) in zip(plots.items(), STYLES, strict=False):
        shares = [row["p"] for row in rows]
        style = {"color": color, "marker": marker, "lw": 1}
        left.plot(shares, 100 * _column(rows, "failure"), label=norm, **style)
        right.plot(shares, _column(rows, "mean"), label=f"{norm}, average", **style)
        right.plot(shares, _column(rows, "median"), ls="--", label=f"{norm}, median", **style)
    left.set(ylabel="failure rate (%)", ylim=(0, None))
    right.set(ylabel="queries to success", ylim=(0, None))
    for axes in (left, right):
        axes.set(xscale="log", xlabel="share p of the pixels in the first windows")
        axes.set_xticks(shares, [f"{share:g}" for share in shares], fontsize=8, rotation=45)
        axes.set_xticks([], minor=True)
        _finish(axes)
    figure.savefig(path, dpi=120)


def success(result: Mapping[str, Any], path: Path, by: str) -> None:
    """Success rate over queries, one plot for each norm, one line for each value of a column."""
    plots = _by_norm(result["rows"])
    figure, axes_row = _figure(len(plots))
    for axes, (norm, rows) in zip(axes_row, plots.items(), strict=True):
        for row, (color, marker) in zip(rows, STYLES, strict=False):
            axes.plot(
                result["budgets"], 100 * np.array(row["curve"]), color=color, marker=marker,
                markevery=6, ms=4, lw=1.2, label=row[by],
            )  # fmt: skip
        axes.set(xscale="log", xlabel="queries", title=norm, ylim=(-2, 102))
        _finish(axes)
    axes_row[0].set_ylabel("success rate (%)")
    figure.savefig(path, dpi=120)


def curves(result: Mapping[str, Any], path: Path) -> None:
    """Success rate over queries of Square and SimBA."""
    success(result, path, "attack")


def targeted(result: Mapping[str, Any], path: Path) -> None:
    """Success rate over queries of the two targeted losses."""
    success(result, path, "loss")


def robust(result: Mapping[str, Any], path: Path) -> None:
    """Robust accuracy over the l_2 radius, one line for each attack."""
    rows = _by_norm(result["rows"])["l2"]
    figure, (axes,) = _figure(1, width=5.5)
    for name, (color, marker) in zip(
        dict.fromkeys(row["attack"] for row in rows), STYLES, strict=False
    ):
        mine = [row for row in rows if row["attack"] == name]
        axes.plot([row["eps"] for row in mine], 100 * _column(mine, "robust accuracy"),
                  color=color, marker=marker, lw=1.2, label=name)  # fmt: skip
    axes.set(xlabel=RADIUS["l2"], ylabel="robust accuracy (%)", ylim=(-2, 102))
    axes.set_title("model trained for l_inf")
    _finish(axes)
    figure.savefig(path, dpi=120)


def masking(result: Mapping[str, Any], path: Path) -> None:
    """Robust accuracy under PGD and Square with the logits of a model scaled."""
    groups = list(dict.fromkeys((row["model"], row["attack"]) for row in result["rows"]))
    figure, (axes,) = _figure(1, width=6.5)
    scales = list(dict.fromkeys(row["logits times"] for row in result["rows"]))
    for k, scale in enumerate(scales):
        mine = [row for row in result["rows"] if row["logits times"] == scale]
        at = np.arange(len(groups)) + 0.8 * (k - (len(scales) - 1) / 2) / len(scales)
        axes.bar(at, 100 * _column(mine, "robust accuracy"), 0.8 / len(scales),
                 color=STYLES[k][0], label=f"logits times {scale:g}")  # fmt: skip
    axes.set_xticks(np.arange(len(groups)), [f"{m}\n{a}" for m, a in groups], fontsize=8)
    axes.set(ylabel="robust accuracy (%)", ylim=(0, 118))
    axes.grid(alpha=0.3, axis="y")
    axes.legend(fontsize="small", ncols=len(scales), loc="upper center")
    figure.savefig(path, dpi=120)


def steps(shown: Mapping[str, Any], path: Path) -> None:
    """Images, adversarial ones and perturbations after so many queries; a row for each norm."""
    queries, norms = shown["queries"], shown["norms"]
    columns = 1 + len(queries)
    images = len(next(iter(norms.values()))["image"])
    figure = matplotlib.figure.Figure(
        figsize=(1.3 * columns * len(norms) + 0.6, 2.6 * images + 0.5), layout="constrained"
    )
    grid = figure.subplots(2 * images, columns * len(norms), squeeze=False)
    for place, (name, of_norm) in enumerate(norms.items()):
        for i, image in enumerate(of_norm["image"]):
            above = grid[2 * i, place * columns : (place + 1) * columns]
            below = grid[2 * i + 1, place * columns : (place + 1) * columns]
            below[0].axis("off")
            _picture(above[0], image, name if i == 0 else "")
            deltas = [adversarial[i] - image for adversarial in of_norm["adversarial"]]
            largest = max(*(float(np.abs(delta).max()) for delta in deltas), 1e-12)
            for k, delta in enumerate(deltas):
                title = f"{queries[k]} queries\n" if i == 0 else ""
                _picture(
                    above[k + 1], image + delta, f"{title}margin {of_norm['margin'][k][i]:.2f}"
                )
                _picture(below[k + 1], 0.5 + delta / (2 * largest), f"±{largest:.2g}")
    figure.suptitle(f"{shown['title']}: images above, perturbations below; margin: of the attack")
    figure.savefig(path, dpi=120)


def theory(result: Mapping[str, Any], path: Path) -> None:
    """The bound of Proposition 3.5.1, the windows of 3.5.2, and the response of convolutions."""
    figure, (left, middle, right) = _figure(3)
    rows = result["search"]
    at = [row["steps"] for row in rows]
    for name, (color, marker) in zip(
        ("bound", "smallest mean gradient norm"), STYLES, strict=False
    ):
        values = [row[name] for row in rows]
        left.plot(at, values, color=color, marker=marker, lw=1.2, label=name)
    left.set(xscale="log", yscale="log", xlabel="steps T", ylabel="gradient norm")
    left.set_title("random search")
    rows = result["windows"]
    for s, (color, marker) in zip((2, 3), STYLES, strict=False):
        mine = [row for row in rows if f"formula {s}" in row]
        areas = [row["area"] for row in mine]
        middle.plot(areas, [row[f"formula {s}"] for row in mine], color=color, lw=1.2,
                    label=f"formula, {s}x{s}")  # fmt: skip
        middle.plot(areas, [row[f"counted {s}"] for row in mine], marker, color=color,
                    label=f"counted, {s}x{s}")  # fmt: skip
    middle.set(xlabel="area k of the update (pixels)", ylabel="filter windows inside")
    middle.set_title("largest number of windows")
    names = list(result["response"])
    right.bar(names, [result["response"][name] for name in names],
              color=[color for color, _ in STYLES[: len(names)]])  # fmt: skip
    right.set(xlabel="support of 16 pixels", ylabel="largest response, over eps")
    right.set_title("random 3x3 filters")
    for axes in (left, middle):
        _finish(axes)
    figure.savefig(path, dpi=120)


# Of the studies that have one, from their result.
FIGURES: Mapping[str, Callable[[Mapping[str, Any], Path], None]] = {
    "ablation": ablation,
    "p": p,
    "curves": curves,
    "targeted": targeted,
    "robust": robust,
    "masking": masking,
    "theory": theory,
}


def _figure(plots: int, *, width: float = 4.2, height: float = 3.4):
    figure = matplotlib.figure.Figure(figsize=(width * plots, height), layout="constrained")
    return figure, figure.subplots(1, plots, squeeze=False)[0]


def _finish(axes: Any) -> None:
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def _picture(axes: Any, image: np.ndarray, title: str) -> None:
    flat = image.squeeze(-1) if image.shape[-1] == 1 else image
    axes.imshow(np.clip(flat, 0, 1), "gray", vmin=0, vmax=1)
    axes.set_title(title, fontsize=8)
    axes.set(xticks=[], yticks=[])


def _by_norm(rows: list[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    norms = dict.fromkeys(row["norm"] for row in rows)
    return {norm: [row for row in rows if row["norm"] == norm] for norm in norms}


def _column(rows: list[Mapping[str, Any]], name: str) -> np.ndarray:
    return np.array([float(row[name]) for row in rows])
