"""Figures of a run: its training curves, and images with what an attack made of them."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def training_curves(
    records: Sequence[Mapping[str, Any]], path: str | os.PathLike, *, title: str = ""
) -> None:
    """Loss on the left, accuracies on the right, over steps; one line per split and name.

    Args:
      records: as in ``metrics.jsonl``: ``step``, ``split`` and named values.
      path: image file to write.
      title: title of the figure.
    """
    series: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for record in records:
        for name, value in record.items():
            if name not in ("step", "split"):
                series.setdefault((record["split"], name), []).append(
                    (record["step"], float(value))
                )
    figure = _figure(9, 3.5)
    losses, accuracies = figure.subplots(1, 2)
    for (split, name), points in sorted(series.items()):
        if name == "loss":
            axes = losses
        elif name == "clean" or "accuracy" in name or name.startswith("pgd"):
            axes = accuracies
        else:
            continue
        steps, values = zip(*points, strict=True)
        style = "-" if split == "train" else "o--"
        scale = 100 if axes is accuracies else 1
        axes.plot(steps, np.array(values) * scale, style, ms=3, lw=1, label=f"{split} {name}")
    losses.set(xlabel="step", ylabel="loss (nats)")
    accuracies.set(xlabel="step", ylabel="accuracy (%)", ylim=(-2, 102))
    for axes in (losses, accuracies):
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize="small")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def image_panel(
    panel: Mapping[str, np.ndarray], path: str | os.PathLike, *, title: str = ""
) -> None:
    """Clean images above, adversarial ones in the middle, perturbations below, with predictions.

    Args:
      panel: ``image``, ``adversarial`` ``(n, h, w, c)`` in [0, 1]; ``label``, ``prediction``,
        ``adversarial_prediction`` ``(n,)``.
      path: image file to write.
      title: title of the figure.
    """
    n = len(panel["label"])
    figure = _figure(1.2 * n + 0.8, 4.4)
    rows = figure.subplots(3, n, squeeze=False)
    delta = panel["adversarial"] - panel["image"]
    largest = max(float(np.abs(delta).max()), 1e-12)
    pictures = (panel["image"], panel["adversarial"], 0.5 + delta / (2 * largest))
    predictions = (panel["prediction"], panel["adversarial_prediction"], None)
    names = ("clean", "adversarial", f"difference\n(±{largest:.3g})")
    for axes_row, images, predicted, name in zip(rows, pictures, predictions, names, strict=True):
        axes_row[0].set_ylabel(name)
        for axes, image, index in zip(axes_row, images, range(n), strict=True):
            axes.imshow(
                image.squeeze(-1) if image.shape[-1] == 1 else image, "gray", vmin=0, vmax=1
            )
            axes.set(xticks=[], yticks=[])
            if predicted is not None:
                right = predicted[index] == panel["label"][index]
                axes.set_title(f"{predicted[index]}", color="green" if right else "red", fontsize=9)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def _figure(width: float, height: float) -> Any:
    # Imported when it is wanted, at the end of a run, not before its first step.
    import matplotlib.figure

    return matplotlib.figure.Figure(figsize=(width, height), layout="constrained")
