"""Adversarial training and penalties by their size, and what is exact about linear classifiers.

Every study takes ``Grids`` and returns a ``Study``; all want ``jax.enable_x64``.

Source: Faghri, Gowal, Vasconcelos, Fleet, Pedregosa and Le Roux (2021), "Bridging the gap between
adversarial robustness and optimization bias": figures 5.4 (a, b), B.9, section 5.2, appendix B.1.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import implicit_figures
from experiments import implicit_sweeps as sweeps
from experiments.claims import Claim
from experiments.implicit_studies import D, Grids, Planned, Program
from experiments.implicit_sweeps import Examples
from experiments.studies import Study
from robustjax import optim
from robustjax.fourier_norms import FourierLInf
from robustjax.norms import L1, L2, LInf, Norm
from robustjax.theory import max_margin, robust_classifiers, saddle_point
from robustjax.theory.norm_balls import ball_volume

# Sizes of the attack in training, in largest eps.
TRAIN_SHARES = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0, 1.02, 1.05, 1.1, 1.15, 1.3, 1.5, 1.7,
                1.9)  # fmt: skip
# Both for n = 3 and the first seed.
KNOWN_EPS, KNOWN_ZERO_EPS = 1.6185, 1.9125


def at_programs(grids: Grids, eps: np.ndarray) -> dict[str, Program]:
    """Programs of ``at``, for sizes of the attack ``(grid, sets)``."""
    shared = {"eps": eps, "norm": LInf(), "steps": 2 * grids.steps}
    runs = {
        "minimiser": functools.partial(sweeps.adversarial, **shared),
        "descent, closed form": functools.partial(sweeps.attacked_descent, inner=False, **shared),
        "descent, 10 inner steps": functools.partial(sweeps.attacked_descent, inner=True, **shared),
    }
    return {name: Program(run, len(eps), shared["steps"]) for name, run in runs.items()}


def at(grids: Grids) -> Study:
    """The eps that adversarial training reaches, by the size of its attack (figure 5.4 a)."""
    examples, norm = sweeps.draw((3,), grids.seeds, D), LInf()
    best = sweeps.optimum(examples, norm).eps
    eps = np.outer(TRAIN_SHARES, best)
    trained = {name: program.run(examples) for name, program in at_programs(grids, eps).items()}
    zero = np.array([saddle_point.zero_eps(x[:3], y[:3], norm) for x, y in zip(
        examples.x, examples.y, strict=True)])  # fmt: skip
    beyond = eps >= zero
    share = {name: np.asarray(sweeps.largest_eps(w, examples, norm=norm)) / best
             for name, w in trained.items()}  # fmt: skip
    # There the minimiser is 0, and what descent leaves of it has no direction to speak of.
    for name in share:
        share[name] = np.where(beyond, 0.0, share[name])
    rows = [
        [f"{s:g}", *(f"{share[name][i].mean():.3f}" for name in trained), str(beyond[i].sum())]
        for i, s in enumerate(TRAIN_SHARES)
    ]
    return Study(
        f"Largest eps after adversarial training, l_inf, n = 3, mean of {grids.seeds} seeds",
        ["eps of training / eps*", *(f"{name}: eps / eps*" for name in trained),
         "seeds with w = 0"],
        rows,
        {"train eps": TRAIN_SHARES, "eps*": best, "zero from": zero, **share},
        _at_claims(best, zero, beyond, share, trained["minimiser"], _inner_error(
            examples, trained["descent, 10 inner steps"], norm)),
        functools.partial(implicit_figures.at, shares=TRAIN_SHARES, found=share,
                          zero=zero / best),
    )  # fmt: skip


def _inner_error(examples: Examples, weights: Any, norm: Norm) -> float:
    """How far the inner steps end from the closed form, over all weights ``(grid, sets, d)``."""

    def one(examples, w):
        closed = robust_classifiers.worst_perturbations(w, examples.y, norm, 1.0)
        return jnp.abs(sweeps.directions(w, examples.x, examples.y, norm) - closed).max()

    over = jax.jit(jax.vmap(jax.vmap(one), in_axes=(None, 0)))
    return float(over(examples, weights).max())


def _at_claims(
    best: np.ndarray,
    zero: np.ndarray,
    beyond: np.ndarray,
    share: Mapping[str, np.ndarray],
    minimisers: Any,
    inner: float,
) -> list[Claim]:
    mean = share["minimiser"].mean(axis=1)
    train = np.array(TRAIN_SHARES)
    peak = train[mean[train != 1].argmax()] if mean.size else 0.0
    peak = train[train != 1][mean[train != 1].argmax()]
    after = mean[train > 1].max()
    weights = np.abs(np.asarray(minimisers)).max(axis=-1)
    # Rounding decides where weights cross 0, so the weights themselves part after a while.
    apart = np.abs(share["descent, closed form"] - share["descent, 10 inner steps"]).mean(axis=1)
    first = share["minimiser"][:, 0]
    known = {0.1: 0.50, 0.9: 0.99, 0.95: 0.995, 1.05: 0.60}
    measured = [first[list(TRAIN_SHARES).index(s)] for s in known]
    known_ok = np.abs(np.subtract(measured, list(known.values()))).max() < 0.02
    return [
        Claim("first seed: eps*, and the size from which w = 0",
              f"{KNOWN_EPS}, {KNOWN_ZERO_EPS}", f"{best[0]:.4f}, {zero[0]:.4f}",
              bool(abs(best[0] - KNOWN_EPS) < 1e-4 and abs(zero[0] - KNOWN_ZERO_EPS) < 1e-4)),
        Claim("the best attack is just below eps*, in eps*", "0.9 to 0.99",
              f"{peak:g}, reaching {mean[train == peak][0]:.4f}",
              bool(0.9 <= peak < 1 and mean[train == peak][0] > 0.99)),
        Claim("beyond eps* what is reached collapses, in eps*", "< 0.8", f"{after:.3f}",
              bool(after < 0.8)),
        Claim("first seed: attacks of 0.1, 0.9, 0.95, 1.05", "0.50, 0.99, 0.995, 0.60 +- 0.02",
              ", ".join(f"{v:.3f}" for v in measured), bool(known_ok)),
        Claim("w = 0, exactly, from ||mean y x|| on, and not before", "0, > 0",
              f"{weights[beyond].max():g}, {weights[~beyond].min():.2g}",
              bool(weights[beyond].max() == 0 < weights[~beyond].min())),
        Claim("10 inner steps find the perturbations of the closed form, after all trainings",
              "within 1e-9", f"{inner:.1e}", bool(inner < 1e-9)),
        Claim("training with either reaches the same eps / eps*", "within 0.01",
              f"{apart.max():.4f}", bool(apart.max() < 0.01)),
    ]  # fmt: skip


PENALTY_SIZES = (12, 3)
DECADES = tuple(10.0**-k for k in range(7))
KNOWN_PATH = {0.1: 0.843, 1e-2: 0.925, 1e-3: 0.950, 1e-4: 0.963, 1e-6: 0.976}


def penalty_program(grids: Grids, coefficients: np.ndarray) -> Program:
    """The program of ``penalty``, for coefficients ``(grid, sets)``."""
    run = functools.partial(
        sweeps.penalised, coefficients=coefficients, norm=L1(), steps=grids.penalty_steps,
        largest=np.full(len(coefficients), grids.penalty_searches[-1]),
        increase=grids.penalty_increase,
    )  # fmt: skip
    return Program(run, len(coefficients), grids.penalty_steps)


def penalty(grids: Grids) -> Study:
    """The eps that an l_1 penalty reaches, by its coefficient (figure 5.4 b)."""
    sizes, norm = PENALTY_SIZES, LInf()
    examples = sweeps.draw(sizes, grids.seeds, D)
    best = sweeps.optimum(examples, norm).eps
    zero = np.array([
        saddle_point.zero_coefficient(x[: round(1 / s[0])], y[: round(1 / s[0])], L1())
        for x, y, s in zip(examples.x, examples.y, np.asarray(examples.shares), strict=True)
    ])  # fmt: skip
    coefficients = np.concatenate([
        np.broadcast_to(np.array(DECADES)[:, None], (len(DECADES), len(zero))),
        np.outer((0.99, 1.01), zero),
    ])  # fmt: skip
    weights = penalty_program(grids, coefficients).run(examples)
    share = np.asarray(sweeps.largest_eps(weights, examples, norm=norm)) / best
    path = share[: len(DECADES)].reshape(len(DECADES), len(sizes), -1)
    at_threshold = np.abs(np.asarray(weights)).max(axis=-1)[len(DECADES) :]
    mean = path.mean(axis=2)
    first = [path[DECADES.index(c), 1, 0] for c in KNOWN_PATH]
    off = np.abs(np.subtract(first, list(KNOWN_PATH.values()))).max()
    claims = [
        Claim("the smaller the coefficient, the larger eps, decade by decade, n = 12, 3",
              "rising", "; ".join(", ".join(f"{v:.3f}" for v in mean[:, i]) for i in (0, 1)),
              bool((np.diff(mean, axis=0) >= 0).all())),
        Claim("n = 3: share of eps* at 1e-6, the worst seed", ">= 0.9", f"{path[-1, 1].min():.3f}",
              bool(path[-1, 1].min() >= 0.9)),
        Claim("n = 3, first seed: 1e-1, 1e-2, 1e-3, 1e-4, 1e-6",
              ", ".join(map(str, KNOWN_PATH.values())), ", ".join(f"{v:.3f}" for v in first),
              bool(off < 2e-3)),
        Claim("w = 0 above the threshold ||mean y x|| / 2, and not below", "0, > 0",
              f"{at_threshold[1].max():g}, {at_threshold[0].min():.2g}",
              bool(at_threshold[1].max() == 0 < at_threshold[0].min())),
        Claim("published: from 1e-6 to 1 eps falls to 0 (n = 3)", "falls", f"{mean[0, 1]:.3f} at 1",
              bool(mean[0, 1] == 0)),
    ]  # fmt: skip
    return Study(
        f"Largest eps with an l_1 penalty, l_inf, mean of {grids.seeds} seeds",
        ["coefficient", *(f"n = {n}: eps / eps*" for n in sizes)],
        [[f"{c:g}", *(f"{v:.3f}" for v in mean[i])] for i, c in enumerate(DECADES)],
        {"coefficients": DECADES, "eps*": best, "zero from": zero, "share": path},
        claims,
        functools.partial(implicit_figures.penalty, coefficients=DECADES, shares=path, sizes=sizes,
                          zero=zero.reshape(len(sizes), -1)),
    )  # fmt: skip


def saddle(grids: Grids) -> Study:
    """What the saddle point cannot tell or does not find (section 5.2)."""
    low, tied = (np.asarray(m) for m in saddle_point.tied_margins(10, 0.1, 5.0))
    risks = [float(saddle_point.logistic(m).sum()) for m in (low, tied)]
    # Three of class 1 to one of class -1, and an attack larger than the data.
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 5)))
    y = jnp.asarray([1.0] * 6 + [-1.0] * 2)
    large = 2 * float(jnp.max(jnp.abs(x)))
    found = _with_bias(x, y, large)
    expected = float(saddle_point.constant_score(y, loss=saddle_point.exponential))

    def at_zero(bias):
        return saddle_point.attacked_risk(jnp.zeros(5), x, y, LInf(), large, bias=bias)

    logistic = float(saddle_point.constant_score(y))
    slope = float(jax.grad(at_zero)(logistic))
    said = np.sign(np.asarray(x @ found["w"] + found["b"]))
    rows = [
        ["confident of nothing", f"{low.min():.4f}", f"{risks[0]:.4f}", "0"],
        ["confident, one error", f"{tied.min():.4f}", f"{risks[1]:.4f}", "1"],
    ]
    claims = [
        Claim("margin of the error that nine of 5 allow, at the risk of ten of 0.1", "-6.3818",
              f"{tied.min():.4f}", bool(abs(tied.min() + 6.3818) < 5e-5)),
        Claim("total risk of both", "6.4440, 6.4440", f"{risks[0]:.4f}, {risks[1]:.4f}",
              bool(abs(risks[0] - 6.4440) < 5e-5 and abs(risks[0] - risks[1]) < 1e-9)),
        Claim("the sign of eps tells them apart", "+, -",
              f"{low.min():+.3g}, {tied.min():+.3g}", bool(low.min() > 0 > tied.min())),
        Claim("eps too large: w, and the bias against log(n+ / n-) / 2", "0, equal",
              f"{np.abs(np.asarray(found['w'])).max():g}, {float(found['b']) - expected:+.1e}",
              bool((np.asarray(found["w"]) == 0).all() and abs(found["b"] - expected) < 1e-6)),
        Claim("it says the label of the majority", "1 for all", f"{said.mean():g} on average",
              bool((said == 1).all())),
        Claim("logistic loss: slope of the risk at w = 0, b = log(n+ / n-)", "0", f"{slope:.1e}",
              bool(abs(slope) < 1e-12)),
    ]  # fmt: skip
    return Study(
        "Two classifiers of equal logistic risk on ten examples",
        ["classifier", "smallest margin", "total risk", "errors"],
        rows,
        {"margins": [low, tied], "risks": risks, "bias": float(found["b"]), "expected": expected},
        claims,
        functools.partial(implicit_figures.saddle, margins={"no error": low, "one error": tied}),
    )


def _with_bias(x: Any, y: Any, eps: float) -> dict[str, Any]:
    """The minimiser of the exponential risk under l_inf attacks, with a free bias."""
    penalty = optim.norm_penalty(L1(), eps)

    def risk(params):
        return max_margin.log_exponential_risk(params["w"], x, y, bias=params["b"])

    transform = optim.fista(
        lambda v, t: {"w": penalty(v["w"], t), "b": v["b"]}, 1.0, max_halvings=20
    )
    start = {"w": jnp.zeros(x.shape[1]), "b": jnp.zeros(())}
    return optim.fista_params(max_margin.descend(transform, risk, start, 2000)[1])


SLACKS = tuple(np.round(np.linspace(0, 1.2, 25), 3).tolist())


def slack(grids: Grids) -> Study:
    """The largest eps with a mean hinge loss up to a slack, for fixed weights (appendix B.1)."""
    del grids
    examples, norm = sweeps.draw((12,), 1, D), LInf()
    x, y = examples.x[0], examples.y[0]
    direction = jnp.asarray(max_margin.max_margin(x, y, norm).w)
    # Margins of 0.5, 1 and 2; of large weights; and none.
    scales = {"w* / 2": 0.5, "w*": 1.0, "2 w*": 2.0, "1e6 w*": 1e6, "w = 0": 0.0}
    of_slack = jax.jit(jax.vmap(
        jax.vmap(lambda w, s: robust_classifiers.slack_eps(w, x, y, norm, s), (None, 0)), (0, None)
    ))  # fmt: skip
    weights = jnp.asarray(list(scales.values()))[:, None] * direction
    eps = np.asarray(of_slack(weights, jnp.asarray(SLACKS)))
    curves = dict(zip(scales, eps, strict=True))
    best = float(robust_classifiers.largest_eps(direction, x, y, norm))

    def loss(w, eps):
        return saddle_point.attacked_risk(w, x, y, norm, eps, loss=saddle_point.hinge)

    allowed = np.array(SLACKS)[None]
    left = np.array([[float(loss(w, e)) if 0 <= e < np.inf else math.nan for e in row]
                     for w, row in zip(weights[:3], eps[:3], strict=True)])  # fmt: skip
    off = np.nanmax(np.abs(left - allowed))
    exact = np.array([(c - 1) / (c / best) for c in (0.5, 1.0, 2.0, 1e6)])
    none = curves["w = 0"]
    finite = np.isfinite(none)
    claims = [
        Claim("the hinge loss under an attack of that eps is the slack", "within 1e-9",
              f"{off:.1e}", bool(off < 1e-9)),
        Claim("for fixed weights eps grows with the slack", "rising", "smallest rise "
              f"{np.diff(eps[:4], axis=1).min():.2g}", bool((np.diff(eps[:4], axis=1) > 0).all())),
        Claim("no slack: eps = min (y <w, x> - 1) / ||w||_*", "within 1e-9",
              f"{np.abs(eps[:4, 0] - exact).max():.1e}",
              bool(np.abs(eps[:4, 0] - exact).max() < 1e-9)),
        Claim("no slack, ever larger weights: the margin", f"{best:.6f}", f"{eps[3, 0]:.6f}",
              bool(abs(eps[3, 0] / best - 1) < 1e-5)),
        Claim("w = 0 withstands everything from a slack of 1 on, nothing before", "1",
              f"{np.array(SLACKS)[none == np.inf].min():g}",
              bool(not finite.any() and np.array_equal(none == np.inf, np.array(SLACKS) >= 1))),
    ]  # fmt: skip
    rows = [[f"{s:g}", *(f"{eps[i, k]:.4g}" for i in range(len(scales)))]
            for k, s in enumerate(SLACKS) if k % 4 == 0]  # fmt: skip
    return Study(
        f"Largest eps with a mean hinge loss up to a slack, l_inf, n = 12, eps* = {best:.4f}",
        ["slack", *scales], rows, {"slack": SLACKS, "eps": curves, "eps*": best}, claims,
        functools.partial(implicit_figures.slack, slacks=SLACKS, curves=curves, best=best),
    )  # fmt: skip


BALLS = {"l_2": L2(), "l_1": L1(), "l_inf": LInf(), "Fourier-l_inf": FourierLInf()}
VOLUMES = {"l_2": 4 * math.pi / 3, "l_1": 4 / 3, "l_inf": 8.0, "Fourier-l_inf": 4 * math.pi}
POINTS = 1_000_000


@functools.partial(jax.jit, static_argnums=0)
def _lengths(norm: Norm, points: Any) -> Any:
    """Norms of points ``(parts, m, 3)``, part by part."""
    return jax.lax.map(lambda part: norm.value(part, 1), points)


def balls(grids: Grids) -> Study:
    """Unit balls in three dimensions and their volumes (figure B.9)."""
    del grids
    rows, results, claims, radii, inside = [], {}, [], {}, {}
    # Half the side of a cube around all of them: a wave reaches sqrt(3) in one coordinate.
    side = math.sqrt(3)
    points = np.random.default_rng(0).uniform(-side, side, size=(POINTS, 3))
    polar, around = np.meshgrid(
        np.linspace(0, np.pi, 80), np.linspace(0, 2 * np.pi, 125), indexing="ij"
    )
    sphere = np.stack(
        [np.sin(polar) * np.cos(around), np.sin(polar) * np.sin(around), np.cos(polar)], axis=-1
    )
    parts = np.concatenate([points, sphere.reshape(-1, 3)]).reshape(-1, sphere[..., 0].size, 3)
    for name, norm in BALLS.items():
        lengths = np.asarray(_lengths(norm, parts)).ravel()
        inside[name] = lengths[:POINTS] <= 1
        radii[name] = sphere / lengths[POINTS:].reshape(*polar.shape, 1)
        sampled, exact = float(inside[name].mean()) * (2 * side) ** 3, ball_volume(norm, 3)
        off = sampled / exact - 1
        rows.append([name, f"{exact:.4f}", f"{sampled:.4f}"])
        results[name] = {"volume": exact, "sampled": sampled}
        claims.append(
            Claim(f"{name}: volume in three dimensions, {POINTS:,} points",
                  f"{VOLUMES[name]:.4f} within 1 %", f"{sampled:.4f} ({100 * off:+.2f} %)",
                  bool(abs(off) < 0.01 and abs(exact - VOLUMES[name]) < 1e-12))
        )  # fmt: skip
    axis = points @ np.full(3, 3**-0.5)
    away = np.sqrt(np.maximum((points**2).sum(axis=1) - axis**2, 0))
    cylinder = (np.abs(axis) <= 1) & (away <= math.sqrt(2))
    differ = int((cylinder != inside["Fourier-l_inf"]).sum())
    claims.append(
        Claim("the Fourier-l_inf ball is the cylinder |axis| <= 1, radius sqrt(2)",
              "0 points differ", str(differ), differ == 0)
    )  # fmt: skip
    return Study(
        "Unit balls in three dimensions", ["norm", "volume", "sampled"], rows, results, claims,
        functools.partial(implicit_figures.balls, surfaces=radii),
    )  # fmt: skip


PRECONDITIONED_SIZES = (25, 12, 6, 3)


def precond(grids: Grids) -> Study:
    """Preconditioned gradient descent against attacks in its own norm, Mahalanobis'."""
    examples = sweeps.draw(PRECONDITIONED_SIZES, grids.seeds, D)
    # In the coordinates P^-1/2 x the norm of the attack is l_2.
    p = jnp.asarray(np.exp(np.random.default_rng(0).normal(size=(len(examples.x), D))))
    seen = examples._replace(x=examples.x / jnp.sqrt(p)[:, None])
    best = sweeps.optimum(seen, L2())
    descent = sweeps.steepest(examples, jnp.ones(1), norm=L2(), steps=grids.steps,
                              loss="exponential")[0]  # fmt: skip
    share = {}
    for name, w in {
        "preconditioned GD": sweeps.preconditioned(examples, p, steps=grids.steps),
        "GD": descent,
    }.items():
        eps = np.asarray(sweeps.largest_eps(w * jnp.sqrt(p), seen, norm=L2()))
        share[name] = (eps / best.eps).reshape(len(PRECONDITIONED_SIZES), -1)
    least = share["preconditioned GD"].min()
    claims = [
        Claim("preconditioned GD is near the optimum for its own attack, all n and seeds",
              ">= 0.99", f"{least:.4f}", bool(least >= 0.99)),
        Claim("GD is less robust to it, all n and seeds", "less",
              f"at most {share['GD'].max():.3f}",
              bool((share["GD"] < share["preconditioned GD"]).all())),
        Claim("certificate of the optimum", "within 1e-6", f"{np.abs(best.gap).max():.0e}",
              bool(np.abs(best.gap).max() < 1e-6)),
    ]  # fmt: skip
    rows = [[name, *(f"{v:.4f}" for v in values.mean(axis=1))] for name, values in share.items()]
    return Study(
        f"Share of the largest eps for delta^T P^-1 delta <= eps^2, mean of {grids.seeds} seeds",
        ["method", *(f"n = {n}" for n in PRECONDITIONED_SIZES)], rows,
        {"optimum": best.eps, **share}, claims,
        functools.partial(implicit_figures.precond, found=share, sizes=PRECONDITIONED_SIZES),
    )  # fmt: skip


STUDIES: Mapping[str, Callable[[Grids], Study]] = {
    "at": at, "penalty": penalty, "saddle": saddle, "slack": slack, "balls": balls,
    "precond": precond,
}  # fmt: skip


def _at_planned(grids: Grids) -> dict[str, Planned]:
    examples = sweeps.draw((3,), grids.seeds, D)
    programs = at_programs(grids, np.ones((len(TRAIN_SHARES), len(examples.x))))
    return {name: Planned(program, examples) for name, program in programs.items()}


def _penalty_planned(grids: Grids) -> dict[str, Planned]:
    examples = sweeps.draw(PENALTY_SIZES, grids.seeds, D)
    program = penalty_program(grids, np.ones((len(DECADES) + 2, len(examples.x))))
    return {"l_1 penalty": Planned(program, examples)}


PLANS: Mapping[str, Callable[[Grids], Mapping[str, Planned]]] = {
    "at": _at_planned, "penalty": _penalty_planned
}  # fmt: skip
