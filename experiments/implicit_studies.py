"""How robust linear classifiers are by the way they were trained: sweeps and their tables.

Every study takes ``Grids`` and returns a ``Study``; all want ``jax.enable_x64``. Shares are of the
largest eps of all linear classifiers, which exact solvers find.

Source: Faghri, Gowal, Vasconcelos, Fleet, Pedregosa and Le Roux (2021), "Bridging the gap between
adversarial robustness and optimization bias": figures 5.2, B.1, table B.1.
"""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from experiments import implicit_figures
from experiments import implicit_sweeps as sweeps
from experiments.claims import Claim
from experiments.implicit_sweeps import Examples, Optimum
from experiments.studies import Study
from robustjax.norms import L1, L2, LInf, Norm


class Grids(NamedTuple):
    """How much is run. The defaults are those of the small preset.

    Attributes:
      seeds: data sets of each size.
      ratios: ``d / n``.
      steps: of descent.
      loss: that steepest descent minimises; it decides what ``rates`` are.
      rates: step sizes of ``sweeps.steepest``.
      searches: steps at which line searches begin.
      coefficients: of penalties.
      penalty_steps: of FISTA.
      penalty_searches: its largest steps.
      penalty_increase: how its searches go on.
      dense_rates: step sizes of fully connected networks.
      network_rates: step sizes of convolutional networks.
      network_scales: sizes of their first layers.
      network_every: steps between two of their weights.
      network_times: number of their weights.
    """

    seeds: int = 3
    ratios: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    steps: int = 10_000
    loss: str = "exponential"
    rates: tuple[float, ...] = (1.0, 2.0, 4.0)
    searches: tuple[float, ...] = (1000.0,)
    coefficients: tuple[float, ...] = (1e-3, 1e-5, 1e-7)
    penalty_steps: int = 2000
    penalty_searches: tuple[float, ...] = (1e6,)
    penalty_increase: float = 2.0
    dense_rates: tuple[float, ...] = (10.0,)
    network_rates: tuple[float, ...] = (1e-3, 3e-3)
    network_scales: tuple[float, ...] = (1.0, 0.1)
    network_every: int = 5000
    network_times: int = 6


# Table B.1.
PUBLISHED = Grids(
    loss="logistic",
    rates=(1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1, 2, 3, 6, 9, 10, 20, 30,
           50),
    searches=(1.0, 10.0, 100.0, 1000.0),
    coefficients=(1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1, 10, 3e-3, 5e-3, 3e-2, 5e-2, 3e-1,
                  5e-1),
    penalty_steps=10_000,
    penalty_searches=(1.0, 10.0, 100.0, 1000.0),
    penalty_increase=float("inf"),
    dense_rates=(1.0, 3.0, 10.0, 30.0, 100.0),
    network_rates=(1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
    network_scales=(1.0, 0.1, 0.01),
    network_every=10_000,
    network_times=10,
)  # fmt: skip

D = 100  # dimension of the inputs
SHARE = 0.95  # size of the attack of adversarial training, in largest eps
ATTACKS: Mapping[str, Norm] = {"l_inf": LInf(), "l_2": L2(), "l_1": L1()}
MATCHING = {"l_inf": ("CD", "l_1 penalty"), "l_2": ("GD", "l_2 penalty"),
            "l_1": ("signGD", "l_inf penalty")}  # fmt: skip
SEARCHED = "GD, line search"
TRAINED, TRAINED_SEARCHED = "adversarial training", "adversarial training, line search"


class Program(NamedTuple):
    """One compiled program of a study.

    Attributes:
      run: data sets to weights ``(grid, sets, ..., d)``.
      grid: how many settings it maps over.
      steps: how many steps it makes.
    """

    run: Callable[[Examples], Any]
    grid: int
    steps: int


class Planned(NamedTuple):
    """A program and the data sets that it is run on."""

    program: Program
    examples: Examples


def examples_of(grids: Grids, ratios: Sequence[int]) -> Examples:
    """The data sets of some ratios ``d / n``."""
    return sweeps.draw([D // r for r in ratios], grids.seeds, D)


def pairs(first: Sequence[float], second: Sequence[float]) -> np.ndarray:
    """All pairs, as two rows."""
    return np.array(list(itertools.product(first, second))).T


def descents(grids: Grids, norms: Mapping[str, Norm]) -> dict[str, Program]:
    """Programs of steepest descent in some norms."""
    return {
        name: Program(
            functools.partial(sweeps.steepest, rates=jnp.asarray(grids.rates, float), norm=norm,
                              steps=grids.steps, loss=grids.loss),
            len(grids.rates), grids.steps,
        )
        for name, norm in norms.items()
    }  # fmt: skip


def searched(grids: Grids) -> dict[str, Program]:
    """The program of gradient descent with a line search."""
    run = functools.partial(
        sweeps.line_search, largest=jnp.asarray(grids.searches), steps=grids.steps
    )
    return {SEARCHED: Program(run, len(grids.searches), grids.steps)}


def penalties(grids: Grids, norms: Mapping[str, Norm]) -> dict[str, Program]:
    """Programs of penalties by some norms."""
    grid = pairs(grids.coefficients, grids.penalty_searches)
    return {
        f"{name} penalty": Program(
            functools.partial(
                sweeps.penalised, coefficients=grid[0], largest=grid[1], norm=norm,
                steps=grids.penalty_steps, increase=grids.penalty_increase,
            ),
            grid.shape[1], grids.penalty_steps,
        )
        for name, norm in norms.items()
    }  # fmt: skip


def training(grids: Grids, norm: Norm, best: np.ndarray) -> dict[str, Program]:
    """Programs of adversarial training just below the largest eps."""
    eps = jnp.asarray(SHARE * best)[None]
    run = functools.partial(sweeps.adversarial, eps=eps, norm=norm, steps=grids.steps)
    found = {TRAINED: Program(run, 1, grids.steps)}
    if norm in ATTACKS.values():
        grid = len(grids.searches)
        run = functools.partial(
            sweeps.line_search, largest=jnp.asarray(grids.searches),
            eps=jnp.repeat(eps, grid, axis=0), norm=norm, steps=grids.steps,
        )  # fmt: skip
        found[TRAINED_SEARCHED] = Program(run, grid, grids.steps)
    return found


class Found(NamedTuple):
    """What a program reached with the best of its grid, ``(sizes, seeds)`` each.

    Attributes:
      eps: largest eps by the margins.
      share: of the optimum.
      attacked: largest eps by attacks, as a share of the optimum.
    """

    eps: np.ndarray
    share: np.ndarray
    attacked: np.ndarray


def reached(weights: Any, examples: Examples, norm: Norm, best: Optimum, grids: Grids) -> Found:
    """The best settings of a grid for each size, on average over the seeds."""
    eps = np.asarray(sweeps.largest_eps(weights, examples, norm=norm))
    eps = np.where(np.isfinite(eps), eps, -np.inf).reshape(len(eps), -1, grids.seeds)
    chosen = eps.mean(axis=2).argmax(axis=0)
    sizes = np.arange(len(chosen))
    kept = weights[np.repeat(chosen, grids.seeds), np.arange(weights.shape[1])]
    attacked = sweeps.attacked_eps(kept, examples, norm, best.eps) / best.eps
    eps = eps[chosen, sizes]
    return Found(eps, eps / best.eps.reshape(eps.shape), attacked.reshape(eps.shape))


def sweep_programs(grids: Grids) -> dict[str, Program]:
    """Programs of ``sweep`` that serve all attacks."""
    return {
        **descents(grids, {"CD": L1(), "GD": L2(), "signGD": LInf()}),
        **searched(grids),
        **penalties(grids, {"l_1": L1(), "l_2": L2(), "l_inf": LInf()}),
    }


def sweep(grids: Grids) -> Study:
    """The largest eps over ``d / n`` for all methods and three attacks (figures 5.2, B.1)."""
    examples = examples_of(grids, grids.ratios)
    weights = {name: p.run(examples) for name, p in sweep_programs(grids).items()}
    rows, results, claims, found = [], {}, [], {}
    for attack, norm in ATTACKS.items():
        best = sweeps.optimum(examples, norm)
        own = {name: p.run(examples) for name, p in training(grids, norm, best.eps).items()}
        of_attack = {
            name: reached(w, examples, norm, best, grids) for name, w in {**weights, **own}.items()
        }
        found[attack] = (best.eps.reshape(len(grids.ratios), -1), of_attack)
        rows += share_table(attack, *found[attack])
        results[attack] = {"optimum": best.eps, "certificate gap": best.gap} | {
            name: one._asdict() for name, one in of_attack.items()
        }
        claims += _sweep_claims(attack, np.array(grids.ratios), best, of_attack)
    return Study(
        f"Largest eps by d/n, d = {D}, mean of {grids.seeds} seeds; optimum: in input units, "
        "methods: as a share of it",
        ["attack", "method", *map(str, grids.ratios)],
        rows,
        results,
        claims,
        functools.partial(implicit_figures.sweep, found=found, ratios=grids.ratios),
    )


def share_table(attack: str, best: np.ndarray, found: Mapping[str, Found]) -> list[list[str]]:
    """Rows of the optimum and of each method's share of it, mean of the seeds."""
    rows = [[attack, "optimum", *(f"{v:.4g}" for v in best.mean(axis=1))]]
    for name, one in found.items():
        rows.append([attack, name, *(f"{v:.3f}" for v in one.share.mean(axis=1))])
    return rows


# Largest eps of seed 0, l_inf, l_2, l_1, by number of examples in 100 dimensions.
KNOWN = {100: (0.1159, 0.7993, 5.344), 50: (0.2244, 1.4325, 10.848), 25: (0.3259, 1.9075, 15.072),
         12: (0.5047, 2.6042, 20.244), 6: (0.7874, 3.9258, 32.289),
         3: (1.6185, 5.9446, 47.802)}  # fmt: skip
OPTIMIZERS, REGULARISERS = ("CD", "GD", "signGD"), ("l_1 penalty", "l_2 penalty", "l_inf penalty")


def _sweep_claims(
    attack: str, ratios: np.ndarray, best: Optimum, found: Mapping[str, Found]
) -> list[Claim]:
    share = {name: one.share.mean(axis=1) for name, one in found.items()}
    wide = ratios >= 4
    optimizer, regulariser = MATCHING[attack]
    solved = best.eps.reshape(len(ratios), -1)
    known = [KNOWN[D // r][list(ATTACKS).index(attack)] for r in ratios]
    off = np.abs(solved[:, 0] / known - 1).max()
    others = {name: share[name][wide].max()
              for name in (*OPTIMIZERS, *REGULARISERS) if name not in MATCHING[attack]}  # fmt: skip
    second = max(others, key=others.__getitem__)
    gaps = solved.mean(axis=1) - np.max(
        [found[name].eps.mean(axis=1) for name in OPTIMIZERS if name != optimizer], axis=0
    )
    reach = {name: one.share - one.attacked for name, one in found.items()}
    # Beyond its finest stretch the grid of the attacks has steps of a tenth.
    low, high = min(v.min() for v in reach.values()), max(v.max() for v in reach.values())

    def at_least(what: str, name: str, share_needed: float) -> Claim:
        worst = share[name][wide].min()
        return Claim(f"{attack}: {what}, d/n >= 4", f">= {share_needed}", f"{worst:.3f}",
                     bool(worst >= share_needed))  # fmt: skip

    claims = [
        Claim(f"{attack}: optimum of the first seed, and its certificate", "within 5e-4, 1e-6",
              f"{off:.1e}, {np.abs(best.gap).max():.0e}",
              bool(off < 5e-4 and np.abs(best.gap).max() < 1e-6)),
        at_least(f"{optimizer} is near the optimum", optimizer, 0.98),
        at_least(f"so is the {regulariser}", regulariser, 0.9),
        at_least(f"so is {TRAINED} at {SHARE} of it", TRAINED, 0.98),
        Claim(f"{attack}: other optimizers and penalties are not, d/n >= 4", "all < 0.9",
              f"{others[second]:.3f} ({second})", bool(others[second] < 0.9)),
        Claim(f"{attack}: {optimizer} gains on the next optimizer as d/n grows", "rising gap",
              ", ".join(f"{gap:.3g}" for gap in gaps), bool((np.diff(gaps) > 0).all())),
        Claim(f"{attack}: margins agree with attacks, to the step of their radii", "0 to 0.1",
              f"{low:+.4f} to {high:.3f}", bool(low > -1e-6 and high <= 0.1 + 1e-6)),
        Claim(f"{attack}: {TRAINED_SEARCHED}, d/n >= 4", "near the optimum",
              f"{share[TRAINED_SEARCHED][wide].min():.3f}", None),
    ]  # fmt: skip
    if attack == "l_2":
        claims.insert(2, at_least(f"so is {SEARCHED}", SEARCHED, 0.98))
    return claims


def _sweep_planned(grids: Grids) -> dict[str, Planned]:
    examples = examples_of(grids, grids.ratios)
    programs = sweep_programs(grids)
    for attack, norm in ATTACKS.items():
        own = training(grids, norm, np.ones(len(examples.x)))
        programs |= {f"{name}, {attack}": program for name, program in own.items()}
    return {name: Planned(program, examples) for name, program in programs.items()}


STUDIES: Mapping[str, Callable[[Grids], Study]] = {"sweep": sweep}
# What each would run, for counting: the sizes of attacks are not known before.
PLANS: Mapping[str, Callable[[Grids], Mapping[str, Planned]]] = {"sweep": _sweep_planned}
