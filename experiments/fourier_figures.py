"""Figures of Fourier attacks: robust accuracy over eps, and perturbations with their spectra."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import matplotlib.figure
import numpy as np

from robustjax.frequency import dft


def curves(results: Mapping[str, Any], path: Path) -> None:
    """Robust accuracy over eps, one plot for each ball, one line for each model."""
    balls = list(next(iter(results["models"].values())))
    figure = matplotlib.figure.Figure(figsize=(3.2 * len(balls), 3.2), layout="constrained")
    plots = figure.subplots(1, len(balls), sharey=True, squeeze=False)[0]
    for axes, ball in zip(plots, balls, strict=True):
        for number, (name, of_model) in enumerate(results["models"].items()):
            curve = of_model[ball]
            axes.plot(results["eps"], 100 * np.array(curve["accuracy"]), f"C{number}.-", label=name)
            axes.axvline(curve["max_eps"], color=f"C{number}", lw=0.7, ls=":")
        axes.set(title=ball, xlabel="eps", ylim=(-2, 102))
        axes.grid(alpha=0.3)
    plots[0].set_ylabel("robust accuracy (%)")
    plots[0].legend(fontsize="small")
    figure.savefig(path, dpi=120)


def panel(
    x: np.ndarray,
    y: np.ndarray,
    rows: Mapping[str, tuple[np.ndarray, np.ndarray]],
    path: Path,
    *,
    title: str = "",
) -> None:
    """x, x + delta, delta and |F delta| for each image, one row for each attack.

    The zero frequency is in the middle; of the channels the largest magnitude is shown.
    """
    n = len(x)
    figure = matplotlib.figure.Figure(
        figsize=(5.2 * n + 0.6, 1.5 * len(rows) + 0.5), layout="constrained"
    )
    grid = figure.subplots(len(rows), 4 * n, squeeze=False)
    for axes_row, (label, (x_adv, predicted)) in zip(grid, rows.items(), strict=True):
        axes_row[0].set_ylabel(label, fontsize=8)
        for i in range(n):
            delta = x_adv[i] - x[i]
            largest = max(float(np.abs(delta).max()), 1e-12)
            size = np.asarray(jnp.abs(dft(jnp.asarray(delta)))).max(axis=-1)
            pictures = {
                f"x: {y[i]}": x[i],
                f"x + δ: {predicted[i]}": x_adv[i],
                f"δ (±{largest:.2g})": 0.5 + delta / (2 * largest),
            }
            here = axes_row[4 * i : 4 * i + 4]
            for axes, (name, picture) in zip(here, pictures.items(), strict=False):
                flat = picture.squeeze(-1) if picture.shape[-1] == 1 else picture
                axes.imshow(flat, "gray", vmin=0, vmax=1)
                axes.set_title(name, fontsize=8)
            here[3].imshow(np.fft.fftshift(size), vmin=0)
            here[3].set_title(f"|Fδ| (to {size.max():.2g})", fontsize=8)
            for axes in here:
                axes.set(xticks=[], yticks=[])
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
