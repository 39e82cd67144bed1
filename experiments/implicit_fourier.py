"""Robustness to Fourier-l_inf perturbations: two convolutions, and every other way to get there.

Studies take ``Grids`` and return a ``Study``; they want ``jax.enable_x64``.

Source: Faghri, Gowal, Vasconcelos, Fleet, Pedregosa and Le Roux (2021), "Bridging the gap between
adversarial robustness and optimization bias": figures 5.3, B.2, section 5.6.1.
"""

import functools
from collections.abc import Callable, Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from experiments import implicit_figures
from experiments import implicit_sweeps as sweeps
from experiments.claims import Claim
from experiments.implicit_studies import (
    TRAINED,
    D,
    Grids,
    Planned,
    Program,
    descents,
    examples_of,
    pairs,
    penalties,
    reached,
    share_table,
    training,
)
from experiments.studies import Study
from robustjax.fourier_norms import FourierL1, FourierLInf
from robustjax.norms import L1, L2, LInf

FOURIER_RATIOS = (8, 32)


def networks(grids: Grids) -> dict[str, Program]:
    """Programs of linear networks: convolutional and fully connected."""
    rates, scales = pairs(grids.network_rates, grids.network_scales)
    steps = grids.network_every * grids.network_times
    run = functools.partial(sweeps.convolutional, rates=rates, scales=scales,
                            every=grids.network_every, times=grids.network_times)  # fmt: skip
    full = functools.partial(sweeps.dense, rates=jnp.asarray(grids.dense_rates), steps=grids.steps)
    return {
        "convolutional network": Program(lambda e: run(e)[:, :, -1], len(rates), steps),
        "dense network": Program(full, len(grids.dense_rates), grids.steps),
    }


def fourier_programs(grids: Grids) -> dict[str, Program]:
    """Programs of ``fourier``."""
    norms = {"Fourier-CD": FourierL1(), "CD": L1(), "GD": L2(), "signGD": LInf()}
    return {
        **networks(grids),
        **descents(grids, norms),
        **penalties(grids, {"Fourier-l_1": FourierL1(), "l_1": L1(), "l_inf": LInf()}),
    }


def fourier(grids: Grids) -> Study:
    """The largest Fourier-l_inf eps: convolutions against other ways (figures 5.3, B.2)."""
    examples, norm, name = examples_of(grids, FOURIER_RATIOS), FourierLInf(), "Fourier-l_inf"
    best = sweeps.optimum(examples, norm)
    programs = {**fourier_programs(grids), **training(grids, norm, best.eps)}
    found = {
        method: reached(program.run(examples), examples, norm, best, grids)
        for method, program in programs.items()
    }
    solved = best.eps.reshape(len(FOURIER_RATIOS), -1)
    share = {method: one.share.mean(axis=1) for method, one in found.items()}
    known = np.abs(solved[:, 0] / [0.4220, 1.2501] - 1).max()

    def beyond(method: str, low: float | None = None, high: float | None = None) -> Claim:
        shown = ", ".join(f"{v:.3f}" for v in share[method])
        expected = f">= {low}" if low is not None else f"<= {high}"
        holds = share[method].min() >= low if low is not None else share[method].max() <= high
        return Claim(f"{name}, n = 12, 3: {method}, share of the optimum", expected, shown,
                     bool(holds))  # fmt: skip

    claims = [
        Claim("optimum of the first seed, and its certificate", "within 5e-4, 1e-6",
              f"{known:.1e}, {np.abs(best.gap).max():.0e}",
              bool(known < 5e-4 and np.abs(best.gap).max() < 1e-6)),
        beyond("convolutional network", 0.95),
        beyond("Fourier-CD", 0.99),
        beyond("Fourier-l_1 penalty", 0.9),
        beyond(TRAINED, 0.98),
        beyond("GD", high=0.8),
        beyond("CD", high=0.4),
        Claim("a dense network does as GD does", "within 0.05",
              ", ".join(f"{v:.3f}" for v in share["dense network"] - share["GD"]),
              bool(np.abs(share["dense network"] - share["GD"]).max() < 0.05)),
    ]  # fmt: skip
    return Study(
        f"Largest Fourier-l_inf eps by n, mean of {grids.seeds} seeds; optimum: in input units, "
        "methods: as a share of it",
        ["attack", "method", *(f"n = {D // r}" for r in FOURIER_RATIOS)],
        share_table(name, solved, found),
        {"optimum": best.eps, **{method: one._asdict() for method, one in found.items()}},
        claims,
        functools.partial(
            implicit_figures.fourier, optimum=solved, found=found,
            sizes=[D // r for r in FOURIER_RATIOS],
        ),
    )  # fmt: skip


GAP_SCALES, GAP_RATES = (1.0, 0.3, 0.1, 0.03, 0.01), (3e-4, 1e-3, 3e-3)
STABLE, USUAL = GAP_RATES[:2]


def gap_programs(grids: Grids) -> dict[str, Planned]:
    """Programs of ``gap``; the weights that they find are ``(grid, sets, times, d)``."""
    rates, scales = pairs(GAP_RATES, GAP_SCALES)
    wide, plane = examples_of(grids, FOURIER_RATIOS), sweeps.draw((3,), grids.seeds, 2)
    kinds = {"float64": (wide, "float64"), "float32": (wide, "float32"),
             "d = 2": (plane, "float64")}  # fmt: skip
    return {
        kind: Planned(
            Program(
                functools.partial(sweeps.convolutional, rates=rates, scales=scales, dtype=dtype,
                                  every=grids.network_every, times=grids.network_times),
                len(rates), grids.network_every * grids.network_times,
            ),
            examples,
        )
        for kind, (examples, dtype) in kinds.items()
    }  # fmt: skip


def gap(grids: Grids) -> Study:
    """What the convolutional network lacks: by start, step size, width, precision, steps (5.6.1).

    In two dimensions the Fourier-l_inf ball is an l_1 ball, and three examples are separated.
    """
    norm, shares = FourierLInf(), {}
    for kind, (program, examples) in gap_programs(grids).items():
        best, weights = sweeps.optimum(examples, norm), program.run(examples)
        eps = sweeps.largest_eps(jnp.moveaxis(weights, 2, 1).astype(float), examples, norm=norm)
        # Weights that overflow have no eps.
        share = np.where(np.isfinite(eps), eps, np.nan) / best.eps
        # (rates, scales, times, sizes, seeds)
        shares[kind] = share.reshape(len(GAP_RATES), len(GAP_SCALES), grids.network_times, -1,
                                     grids.seeds)  # fmt: skip
    steps = grids.network_every * np.arange(1, grids.network_times + 1)
    sizes = [D // r for r in FOURIER_RATIOS]
    rows = [
        [f"{rate:g}", f"{scale:g}", str(t), *(f"{v:.4f}" for kind in shares
                                              for v in shares[kind][i, j, k].mean(axis=1))]
        for i, rate in enumerate(GAP_RATES)
        for j, scale in enumerate(GAP_SCALES)
        for k, t in enumerate(steps) if k in (0, 1, len(steps) - 1)
    ]  # fmt: skip
    titles = [f"{kind}, n = {n}" for kind in ("float64", "float32") for n in sizes]
    return Study(
        "Share of the largest Fourier-l_inf eps that two convolutions reach, mean of "
        f"{grids.seeds} seeds",
        ["learning rate", "first layer", "steps", *titles, "d = 2, n = 3"],
        rows,
        {"steps": steps, **shares},
        _gap_claims(shares, sizes, steps),
        functools.partial(implicit_figures.gap, steps=steps, shares=shares, sizes=sizes,
                          rates=GAP_RATES, scales=GAP_SCALES),
    )  # fmt: skip


def _gap_claims(
    shares: Mapping[str, np.ndarray], sizes: Sequence[int], steps: np.ndarray
) -> list[Claim]:
    double, single, plane = (shares[kind] for kind in ("float64", "float32", "d = 2"))
    of_rate = {rate: i for i, rate in enumerate(GAP_RATES)}
    early = len(steps) // 3  # 10,000 of 30,000 steps come before
    gaps = 1 - double[of_rate[USUAL]].mean(axis=-1)[:, [early - 1, -1]]  # (scales, 2, sizes)
    # The best start for each seed.
    tuned = 1 - plane[:, :, -1, 0].max(axis=(0, 1))
    difference = np.abs(double - single)
    small = sizes.index(min(sizes))
    stable = difference[of_rate[STABLE], :, :, small].max()
    usual = difference[of_rate[USUAL]].max()
    lost = int(np.isnan(single[-1, :, -1]).sum())
    return [
        Claim("d = 2: the gap with the best start and step size, all seeds", "< 0.01",
              f"{tuned.max():.1e}", bool(tuned.max() < 0.01)),
        Claim(f"d = 100: the gap shrinks with steps, {steps[early - 1]} to {steps[-1]}, learning "
              f"rate {USUAL:g}, all starts, n = {sizes[0]}, {sizes[1]}", "shrinks",
              "; ".join(", ".join(f"{a:.3f} to {b:.3f}" for a, b in gaps[..., i])
                        for i in range(len(sizes))),
              bool((gaps[:, 1] < gaps[:, 0]).all())),
        Claim(f"float32 does what float64 does: n = {sizes[small]}, learning rate {STABLE:g}, all "
              "starts, seeds and times", "within 1e-3", f"{stable:.1e}", bool(stable < 1e-3)),
        Claim(f"the same at learning rate {USUAL:g}, n = {sizes[0]}, {sizes[1]}", "within 1e-3",
              f"{usual:.1e}", None),
        Claim(f"float32, learning rate {GAP_RATES[-1]:g}: networks that have overflowed in the end",
              "not known", f"{lost} of {single[-1, :, -1].size}", None),
    ]  # fmt: skip


def _fourier_planned(grids: Grids) -> dict[str, Planned]:
    examples = examples_of(grids, FOURIER_RATIOS)
    programs = fourier_programs(grids) | training(grids, FourierLInf(), np.ones(len(examples.x)))
    return {name: Planned(program, examples) for name, program in programs.items()}


STUDIES: Mapping[str, Callable[[Grids], Study]] = {"fourier": fourier, "gap": gap}
PLANS: Mapping[str, Callable[[Grids], Mapping[str, Planned]]] = {
    "fourier": _fourier_planned, "gap": gap_programs
}  # fmt: skip
