"""Exact studies of the optimizers: linear regression on three frequencies, one of them irrelevant.

Source: Ma (2025), "Understanding adversarial robustness in deep learning", sections 4.4.2 to 4.4.4
and appendix 4.D.2.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.ndimage

from experiments import optimizer_figures
from experiments.claims import Claim
from experiments.optimizer_networks import Small, make_optimizer
from experiments.studies import Study
from robustjax import optim
from robustjax.theory import frequency_regression as regression
from robustjax.theory import sign_descent, sign_regions
from robustjax.theory.frequency_regression import Population
from robustjax.theory.sign_regions import Region, Start

VARIANCES, TARGET, INITIAL = (0.01, 0.0025, 0.0), (5.0, 10.0, 0.0), (0.01, -0.01, 0.02)
RATE, EPS = 0.01, math.sqrt(2)
STEPS, LONG = 20_000, 1_000_000
SAMPLED_STEPS, BATCH = 5_000, 1_000
# GD needs more steps than are worth simulating: its weights are known in closed form.
TRANSFORMS: dict[str, optax.GradientTransformation] = {
    "GD": optax.sgd(RATE),
    "signGD": optim.sign_gd(RATE),
    "Adam": make_optimizer("Adam", optax.constant_schedule(RATE)),
    "RMSProp": make_optimizer("RMSProp", optax.constant_schedule(RATE)),
}


def _in_double(study: Callable[[Small], Study]) -> Callable[[Small], Study]:
    """The study in float64: signs of small differences decide where signGD goes."""

    @functools.wraps(study)
    def wrapped(small: Small) -> Study:
        with jax.enable_x64(True):
            return study(small)

    return wrapped


@_in_double
def dynamics(small: Small) -> Study:
    """The irrelevant weight and the risks under GD, signGD, Adam, RMSProp (figure 4.7)."""
    population = Population(jnp.asarray(VARIANCES), jnp.asarray(TARGET))
    initial = jnp.asarray(INITIAL)
    paths = {
        name: regression.simulate(transform, population, initial, steps=STEPS)
        for name, transform in TRANSFORMS.items()
    }
    keys = jax.random.split(jax.random.key(0), small.seeds)
    sampled = {name: np.asarray(_sampled(name, population, initial, keys)) for name in TRANSFORMS}
    passage = sign_descent.enter_band(population, initial, RATE)

    @jax.jit
    def risks(w):
        return (
            regression.standard_risk(population, w),
            regression.adversarial_risk(population, w, EPS),
        )

    def risk(w):
        return np.asarray(risks(w)[0])

    def attacked(w):
        return np.asarray(risks(w)[1])

    descent = functools.partial(
        regression.gradient_descent, population, initial, learning_rate=RATE
    )
    # The two last weights: signGD ends in a cycle of two.
    ends = {name: path[-2:] for name, path in paths.items()}
    limit = descent(steps=math.inf)
    rows, results = [], {"steps": int(passage.steps), "moved": int(passage.moved)}
    for name, path in paths.items():
        drawn = sampled[name]
        results[name] = {
            "weights": np.asarray(ends[name]), "risk": risk(ends[name]),
            "attacked": attacked(ends[name]), "sampled": drawn, "sampled_attacked": attacked(drawn),
        }  # fmt: skip
        rows.append(_row(name, np.asarray(path[-1]), risk(path[-1]), attacked(path[-1]),
                         f"{drawn[:, 2].mean():.2f}", f"{attacked(drawn).mean():.1f}"))  # fmt: skip
    results["GD, limit"] = {"weights": np.asarray(limit), "attacked": attacked(limit)}
    rows.append(_row("GD, limit", np.asarray(limit), risk(limit), attacked(limit), "", ""))
    at = np.unique(np.geomspace(1, LONG, 100).astype(int))
    # As descent(steps=t), which is compiled for each number of steps.
    left = (1 - RATE * np.array(VARIANCES)) ** at[:, None]
    curves = {"GD": (at, np.asarray(limit + left * (initial - limit)))}
    # Even steps: in the end signGD goes to and fro.
    shown = 2 * np.unique(np.geomspace(1, STEPS // 2, 400).astype(int))
    curves |= {
        name: (shown, np.asarray(path)[shown]) for name, path in paths.items() if name != "GD"
    }
    lines = {
        name: {"steps": t, "irrelevant": w[:, 2], "risk": risk(w), "attacked": attacked(w)}
        for name, (t, w) in curves.items()
    }
    return Study(
        f"Linear regression on three frequencies after {STEPS} steps; attacks of eps = sqrt(2)",
        ["optimizer", "w_0", "w_1", "w_2 (irrelevant)", "standard risk", "adversarial risk",
         f"batches of {BATCH}, {SAMPLED_STEPS} steps: w_2", "adversarial risk, batches"],
        rows,
        results,
        _dynamics_claims(population, initial, paths, passage, results, descent),
        functools.partial(optimizer_figures.dynamics, lines=lines, band=int(passage.steps)),
    )  # fmt: skip


def _row(name: str, w: np.ndarray, risk: Any, attacked: Any, *sampled: str) -> list[str]:
    return [name, *(f"{v:.4f}" for v in w), f"{float(risk):.3g}", f"{float(attacked):.3f}",
            *sampled]  # fmt: skip


def _sampled(name: str, population: Population, initial: jax.Array, keys: jax.Array) -> jax.Array:
    """The last weights with a fresh batch at every step, ``(keys, 3)``."""

    def one(key):
        return regression.simulate(
            TRANSFORMS[name], population, initial, steps=SAMPLED_STEPS, every=SAMPLED_STEPS,
            batch_size=BATCH, key=key,
        )[-1]  # fmt: skip

    return jax.vmap(one)(keys)


def _dynamics_claims(
    population: Population,
    initial: jax.Array,
    paths: dict[str, jax.Array],
    passage: sign_descent.Passage,
    results: dict[str, Any],
    descent: Callable[..., jax.Array],
) -> list[Claim]:
    start = sign_descent.coordinates(population.variances, initial - population.target, RATE)
    a, b = (RATE * VARIANCES[0] * abs(float(v)) for v in start)
    cycle = np.asarray(sorted(np.asarray(paths["signGD"][-2:]).tolist()))
    apart = np.abs(cycle - [[4.98675932, 9.98848989, -4.29926691],
                            [5.00407983, 9.98848989, -4.29926691]]).max()  # fmt: skip
    closed = np.asarray(descent(steps=10_000))
    error = np.abs(np.asarray(paths["GD"][10_000]) - closed).max()
    idle = np.abs(np.asarray(paths["GD"][:, 2]) - INITIAL[2]).max()
    attacked = {name: float(np.max(found["attacked"])) for name, found in results.items()
                if isinstance(found, dict)}  # fmt: skip
    ratio = attacked["signGD"] / attacked["GD, limit"]
    low, high = map(float, sign_descent.risk_ratio_range(population))
    weight = float(passage.weights[2])
    order = ["GD, limit", "signGD", "Adam", "RMSProp"]
    drifts = [float(paths[name][-1, 2]) for name in ("Adam", "RMSProp")]
    late = [float(descent(steps=200_000)[1]), attacked["Adam"], attacked["RMSProp"]]
    drawn = [results[name]["sampled"][:, 2].mean() for name in order[1:]]
    return [
        Claim("|A(0)|, |B(0)|", "0.028810, 0.017695", f"{a:.6f}, {b:.6f}",
              abs(a - 0.028810) < 5e-7 and abs(b - 0.017695) < 5e-7),
        Claim("signGD: steps into the band, of which the irrelevant weight moves in", "638, 526",
              f"{passage.steps}, {passage.moved}",
              (int(passage.steps), int(passage.moved)) == (638, 526)),
        Claim("signGD: the irrelevant weight there", "-4.274772", f"{weight:.6f}",
              abs(weight + 4.274772) < 1e-6),
        Claim("signGD ends in a known cycle of two", "within 1e-7", f"{apart:.1e}",
              bool(apart < 1e-7)),
        Claim("GD is what the closed form says, 10000 steps", "within 1e-9", f"{error:.1e}",
              bool(error < 1e-9)),
        Claim("GD leaves the irrelevant weight as it was", "within 1e-9", f"{idle:.1e}",
              bool(idle < 1e-9)),
        Claim("GD: w_1 after 200000 steps", "9.932557", f"{late[0]:.6f}",
              abs(late[0] - 9.932557) < 1e-6),
        Claim("Adam, RMSProp: the irrelevant weight in the end", "-4.918, -5.388",
              f"{drifts[0]:.3f}, {drifts[1]:.3f}",
              abs(drifts[0] + 4.918) < 2e-3 and abs(drifts[1] + 5.388) < 2e-2),
        Claim("Adam, RMSProp: adversarial risk in the end", "149.185, 154.1",
              f"{late[1]:.3f}, {late[2]:.1f}",
              abs(late[1] - 149.185) < 0.02 and abs(late[2] - 154.1) < 0.2),
        Claim("adversarial risk: GD < signGD < Adam < RMSProp", "rising",
              ", ".join(f"{attacked[name]:.1f}" for name in order),
              all(attacked[x] < attacked[y] for x, y in itertools.pairwise(order))),
        Claim("adversarial risk of signGD over that of GD (published: 1.146)", "1.1464",
              f"{ratio:.4f}", abs(ratio - 1.1464) < 1e-4),
        Claim("which is in the range predicted", "published: 1.04 to 1.15",
              f"{low:.4f} to {high:.4f}", bool(low <= ratio <= high)),
        Claim("irrelevant weight with batches: signGD, Adam, RMSProp", "-4.02, -4.87, -5.29",
              ", ".join(f"{w:.2f}" for w in drawn), None),
    ]  # fmt: skip


RATIOS = (0.2, 1.0)
# Where one step leads from each region of the band; from print, except R31 and its partner R12.
R3 = {Region.R31, Region.R32, Region.R33, Region.R34}
NEXT: dict[Region, set[Region]] = {
    Region.R11: {Region.R21, Region.R22, Region.R23},
    Region.R12: R3,
    Region.R21: R3,
    Region.R22: {Region.R22},
    Region.R23: {Region.R21},
    Region.R31: {Region.R12},
    Region.R32: {Region.R31, Region.R32, Region.R33},
    Region.R33: {Region.R31, Region.R32},
    Region.R34: {Region.R34},
}
START_RATIOS = (1.0, 1 / 9)


@_in_double
def regions(small: Small) -> Study:
    """Where signGD goes from each state, and how often the irrelevant weight moves (4.8, 4.9)."""
    del small
    rows, results, left, late, outside = [], {}, [], [], []
    for ratio in RATIOS:
        a, b = _grid(1.0, 2.0)
        path = _path(a, b, ratio, 400)
        before, after = (np.asarray(sign_regions.classify(*state, ratio))
                         for state in ((a, b), sign_regions.step(a, b, ratio)))  # fmt: skip
        for region, allowed in NEXT.items():
            reached = sorted({Region(int(r)) for r in after[before == region]})
            results[f"{ratio:g}, {region.name}"] = [r.name for r in reached]
            rows.append([f"{ratio:g}", region.name, f"{np.mean(before == region):.3f}",
                         ", ".join(r.name for r in reached)])  # fmt: skip
            left += [r for r in reached if r not in allowed]
        signs = np.sign(path[0])
        late.append(int((signs[3:-2] != signs[5:]).sum()))
        limit = sign_regions.limits(jnp.asarray([1.0, ratio, 0.0]), 1.0)
        outside.append(float(max(np.abs(path[0][-2:]).max() - limit.a,
                                 np.abs(path[1][-2:]).max() - limit.b)))  # fmt: skip
    wrong, counted = 0, 0
    for ratio in START_RATIOS:
        a, b = _grid(12.0, 12.0)
        moved = _moved(a, b, ratio)
        low, high = map(np.asarray, sign_regions.moved_bounds(a, b, ratio))
        known = np.isfinite(low)
        counted += int(known.sum())
        wrong += int(((moved < low - 1e-9) | (moved > high + 1e-9))[known].sum())
    claims = [
        Claim("a step leads where it should, with R31 to R12 (in print: to itself)",
              "no other region", f"{len(left)} others", not left),
        Claim("from the third step on A alternates in sign", "0 exceptions",
              f"{sum(late)} exceptions", not any(late)),
        Claim("in the end |A| < 1 and |B| <= max(ratio, 1/2), in units of s0 eta",
              "0 beyond", f"{max(outside):+.2g}", max(outside) <= 1e-9),
        Claim("R34 is empty for s1 < s0 / 3", "no point",
              ", ".join(results["0.2, R34"]) or "no point",
              not results["0.2, R34"]),
        Claim("the irrelevant weight moves as often as the start says", "0 exceptions",
              f"{wrong} of {counted}", wrong == 0),
    ]  # fmt: skip
    figure = functools.partial(
        optimizer_figures.regions, band=_band_map(1.0),
        starts={f"{ratio:.2g}": _start_map(ratio) for ratio in START_RATIOS},
    )  # fmt: skip
    return Study("signGD from region to region of |A| < s0 eta",
                 ["s1 / s0", "region", "share of the grid", "one step leads to"],
                 rows, results, claims, figure)  # fmt: skip


def _grid(a: float, b: float, n: int = 201) -> tuple[jax.Array, jax.Array]:
    """Points that lie on no boundary, ``(n n,)`` each."""
    # Irrational shifts: a grid of fractions would have ties, which random starts do not.
    first = np.linspace(-a, a, n)[:-1] + (2 * a / n) * (math.sqrt(2) - 1)
    second = np.linspace(-b, b, n)[:-1] + (2 * b / n) * (math.sqrt(3) - 1)
    points = np.meshgrid(first, second, indexing="ij")
    return tuple(jnp.asarray(p.ravel()) for p in points)


@functools.partial(jax.jit, static_argnums=3)
def _paths(a: jax.Array, b: jax.Array, ratio: Any, steps: int) -> tuple[jax.Array, jax.Array]:
    def step(state, _):
        return sign_regions.step(*state, ratio), state

    return jax.lax.scan(step, (a, b), length=steps)[1]


def _path(a: jax.Array, b: jax.Array, ratio: float, steps: int) -> tuple[np.ndarray, np.ndarray]:
    first, second = _paths(a, b, ratio, steps)
    return np.asarray(first), np.asarray(second)


def _moved(a: jax.Array, b: jax.Array, ratio: float) -> np.ndarray:
    """Steps with ``|a| <= |b|`` before ``|a| < 1``."""
    first, second = map(np.abs, _path(a, b, ratio, 60))
    return ((first <= second) & (first >= 1)).sum(axis=0)


def _band_map(ratio: float) -> dict[str, Any]:
    """Regions of the band, and one step of signGD from the middle of each."""
    a, b = _grid(1.0, 2.0)
    found = _map(a, b, sign_regions.classify(a, b, ratio), Region)
    start = jnp.asarray(list(found["middle"].values())).T
    return {**found, "from": np.stack(start), "to": np.stack(sign_regions.step(*start, ratio))}


def _start_map(ratio: float) -> dict[str, Any]:
    a, b = _grid(12.0, 12.0)
    found = _map(a, b, sign_regions.classify_start(a, b, ratio), Start)
    return {**found, "moved": _moved(a, b, ratio).reshape(found["region"].shape)}


def _map(a: jax.Array, b: jax.Array, region: jax.Array, names: Any) -> dict[str, Any]:
    """A grid as squares, and by name the point of each region that is farthest from its border.

    Of the four patches that signs make the one of positive ``a`` and ``b`` is taken.
    """
    side = math.isqrt(len(a))
    a, b, region = (np.asarray(values).reshape(side, side) for values in (a, b, region))
    middle = {}
    for value in np.unique(region[region > 0]):
        inside = np.pad((region == value) & (a > 0) & (b > 0), 1)
        depth = scipy.ndimage.distance_transform_edt(inside)[1:-1, 1:-1]
        at = np.unravel_index(depth.argmax(), depth.shape)
        middle[names(value).name] = (float(a[at]), float(b[at]))
    return {"a": a, "b": b, "region": region, "middle": middle}
