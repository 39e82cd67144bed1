"""Figures of attacks: robust accuracy over eps, and accuracies over the steps of an attack."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np

# Okabe and Ito's colours, which colour-blind readers can tell apart, with a marker each.
STYLES = {
    "fgsm": ("#999999", "v"),
    "pgd": ("#E69F00", "^"),
    "apgd-ce": ("#56B4E9", "s"),
    "apgd-dlr": ("#009E73", "D"),
    "apgd-t": ("#0072B2", "o"),
    "square": ("#D55E00", "P"),
    "simba": ("#CC79A7", "X"),
    "autoattack": ("#000000", "*"),
    "fab": ("#E69F00", "^"),
    "deepfool": ("#0072B2", "o"),
    "cw": ("#D55E00", "P"),
}


def curves(results: Mapping[str, Any], path: Path) -> None:
    """Robust accuracy over eps: on the right the attacks of least distance, beside AutoAttack."""
    figure = matplotlib.figure.Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)
    fine = np.linspace(0, results["eps"][-1], 301)
    for name, curve in results["curves"].items():
        color, marker = STYLES[name]
        once = "distance" in curve
        style = {"color": color, "marker": marker, "ms": 5, "lw": 1, "label": name}
        for axes in (right,) if once else (left, right) if name == "autoattack" else (left,):
            values = 100 * np.array(curve["accuracy"])
            axes.plot(results["eps"], values, ls="" if once else "-", **style)
        if once:  # a step at the distance of each example
            farther = np.array(curve["distance"]) > fine[:, None]
            right.plot(fine, 100 * farther.mean(axis=1), color=color, lw=1)
    left.set(ylabel="robust accuracy (%)", ylim=(-2, 102), title="one run for each eps")
    right.set_title("least distance: one run for all eps")
    for axes in (left, right):
        axes.set_xlabel(f"{results['threat']} radius eps (input units)")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize="small")
    figure.suptitle(f"{results['model']}, {results['examples']} examples of {results['dataset']}")
    figure.savefig(path, dpi=120)


def traces(results: Mapping[str, Any], path: Path) -> None:
    """Instantaneous and cumulative accuracy over the steps, one plot for each attack."""
    setting = results["trace_setting"]
    of_attacks = results["traces"]
    figure = matplotlib.figure.Figure(figsize=(9, 3.4), layout="constrained")
    plots = figure.subplots(1, len(of_attacks), sharey=True, squeeze=False)[0]
    for axes, (name, trace) in zip(plots, of_attacks.items(), strict=True):
        for kind, label, style in (
            ("instantaneous", "instantaneous a_I(k)", {"color": "#0072B2"}),
            ("cumulative", "cumulative a_C(k)", {"color": "#D55E00", "ls": "--"}),
        ):
            axes.plot(100 * np.array(trace[kind]), label=label, **style)
        axes.set(title=name, xlabel="step k", ylim=(-2, 102))
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    plots[0].set_ylabel("accuracy (%)")
    figure.suptitle(
        f"{results['model']}: l_inf eps = {setting['eps']:g}, "
        f"steps of {setting['step_size']:g} (input units)"
    )
    figure.savefig(path, dpi=120)
