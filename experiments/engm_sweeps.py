"""Ablations, pictures and theory of outer optimizers at small size, on noisy digits."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from experiments import engm_figures
from experiments.claims import Claim
from experiments.engm_studies import (
    INF,
    Small,
    best_last_overfit,
    eps,
    gradients,
    methods,
    optimizers,
)
from experiments.noisy_digits import MODEL, Recipe
from experiments.studies import Study, interval, summary
from robustjax import attacks, data, losses, metrics, models, norms, theory
from robustjax.threat import ThreatModel


def landscape(small: Small) -> Study:
    """Fig. 4: the loss on planes through four test digits, MSGD against ENGM."""
    test = small.task(small.noise).test
    logits_fns = {}
    for method in ("msgd", "engm"):
        params = jax.tree.map(lambda p: jnp.asarray(p[0]), small.over_seeds(method).params)
        logits_fns[method] = models.eval_logits(MODEL.apply, params, {})
    return landscape_of(logits_fns, test["image"][:4], test["label"][:4], eps=0.1)


def landscape_of(logits_fns: Mapping[str, Callable], x: Any, y: Any, *, eps: float) -> Study:
    """The loss on planes through images, for some networks.

    Args:
      logits_fns: name to a network, from ``models.eval_logits``.
      x: images ``(m, h, w, c)``, uint8 or in [0, 1].
      y: labels ``(m,)``.
      eps: radius of the PGD-20 that gives the first axis.
    """
    x, y = jnp.asarray(data.as_float(x)), jnp.asarray(y)
    planes, rows, curvature = {}, [], {}
    for name, logits_fn in logits_fns.items():
        planes[name] = jax.device_get(_planes(logits_fn, x, y, eps))
        curvature[name] = np.array([
            float(metrics.curvature(jax.tree.map(lambda v, i=i: v[i], planes[name])))
            for i in range(len(y))
        ])  # fmt: skip
        rows.append([name.upper(), *(f"{c:.3g}" for c in curvature[name]),
                     f"{curvature[name].mean():.3g}"])  # fmt: skip
    msgd, engm = (curvature[name].mean() for name in ("msgd", "engm"))
    claims = [Claim("ENGM's loss is less curved", f"< {msgd:.3g}", f"{engm:.3g}", None)]
    return Study(
        "Curvature of the loss on planes of the PGD-20 direction and a random one",
        ["optimizer", *(f"class {int(label)}" for label in y), "mean"],
        rows, curvature, claims,
        functools.partial(engm_figures.loss_planes, planes=planes, labels=np.asarray(y)),
    )  # fmt: skip


@jax.jit
def _planes(logits_fn: Callable, x: Array, y: Array, eps: Array) -> metrics.LossPlane:
    threat = ThreatModel(norms.LInf(), eps)
    attack = attacks.pgd(threat, steps=20, step_size=eps / 10, loss=losses.margin)
    delta = attack(logits_fn, jax.random.key(0), x, y) - x

    def plane(x, y, delta, key):
        def loss(points):
            return losses.cross_entropy(logits_fn(points), jnp.full(len(points), y))

        return metrics.loss_plane(loss, x, delta, key)

    return jax.vmap(plane)(x, y, delta, jax.random.split(jax.random.key(1), len(y)))


def _sweep(small: Small, knob: str, values: tuple, kinds: Mapping[str, tuple[str, str, Any]],
           title: str, claims: Callable[[dict], list[Claim]]) -> Study:  # fmt: skip
    """Curves of accuracy and overfitting over one knob, one seed each.

    ``kinds`` maps a name to (method, objective, values of the knob or those of another one).
    """
    found, rows = {}, []
    for name, (method, objective, knobs) in kinds.items():
        found[name] = best_last_overfit(small.runs(method, objective, **knobs))
        for i, value in enumerate(values):
            rows.append([name, f"{value:g}", *(f"{v[i]:.1f}" for v in found[name].values())])
    return Study(
        title, ["optimizer", knob, "clean %", "best %", "last %", "overfit %"], rows, found,
        claims(found),
        functools.partial(engm_figures.sweep, knob=knob, values=values, found=found),
    )  # fmt: skip


def alpha(small: Small) -> Study:
    """Fig. 5a-c: the norm bound of ENGM, and that of N-ENGM times the slope of the two norms."""
    values = (0.3, 1.0, 3.0, INF)
    slope = 6.0  # alpha 3 of ENGM against 0.5 of N-ENGM
    kinds = {
        "ENGM": ("engm", "madry", {"alpha": values}),
        "N-ENGM": ("n_engm", "madry", {"alpha_naive": tuple(v / slope for v in values)}),
    }
    plain = best_last_overfit(small.over_seeds("msgd"))

    def claims(found):
        same = all(
            abs(float(kind[name][-1]) - float(plain[name][0])) < 1e-4
            for kind in found.values()
            for name in ("clean", "best", "last")
        )
        overfit = found["ENGM"]["overfit"]
        return [
            Claim("alpha = inf is MSGD", "same accuracies", "same" if same else "different", same),
            Claim("a small alpha lowers overfitting", f"< {overfit[-1]:.1f} %",
                  f"{overfit[0]:.1f} %", bool(overfit[0] < overfit[-1])),
        ]  # fmt: skip

    return _sweep(small, "alpha", values, kinds, "Norm bound (N-ENGM: 6 alpha_naive)", claims)


def tau(small: Small) -> Study:
    """Fig. 5d, e: steps from one regression of A-ENGM to the next."""
    values = (1, 10, 100, 300)
    kinds = {"A-ENGM": ("a_engm", "madry", {"tau": values})}
    return _sweep(small, "tau", values, kinds, "Regressions of A-ENGM", lambda found: [])


def beta(small: Small) -> Study:
    """Fig. 5f: the weight of the divergence in TRADES."""
    values = (1.0, 3.0, 6.0, 12.0)
    kinds = {m.upper(): (m, "trades", {"beta": values}) for m in ("msgd", "engm")}
    return _sweep(small, "beta", values, kinds, "Weight of the divergence", lambda found: [])


def weight_decay(small: Small) -> Study:
    """Fig. 5g: weight decay."""
    values = (1e-4, 5e-4, 2e-3, 8e-3)
    kinds = {m.upper(): (m, "madry", {"weight_decay": values}) for m in ("msgd", "engm")}

    def claims(found):
        spread = {name: float(np.ptp(kind["last"])) for name, kind in found.items()}
        return [Claim("ENGM is less sensitive: spread of last accuracy",
                      f"<= {spread['MSGD']:.1f} points", f"{spread['ENGM']:.1f}",
                      None)]  # fmt: skip

    return _sweep(small, "weight decay", values, kinds, "Weight decay", claims)


def l2(small: Small) -> Study:
    """The l_2 threat model of the supplement: eps = 1."""
    rows, results = [], {}
    for method in ("msgd", "engm"):
        recipe = Recipe(method, "madry", small.epochs, norm="l2",
                        evaluate_every=small.evaluate_every)  # fmt: skip
        runs = small.made(recipe, small.noise, seed=small.some_seeds(), eps=1.0)
        found = best_last_overfit(runs)
        rows.append([method.upper(), *(interval(v) for v in found.values())])
        results[method] = summary(found)
    msgd, engm = (results[m]["last"]["mean"] for m in ("msgd", "engm"))
    return Study(
        "l_2, eps = 1, noisy digits",
        ["optimizer", "clean %", "best PGD-20 %", "last PGD-20 %", "overfit %"],
        rows, results,
        [Claim("last robust accuracy of ENGM over MSGD", f"> {msgd:.1f} %", f"{engm:.1f} %", None)],
    )  # fmt: skip


def convergence(small: Small) -> Study:
    """Theorem 2: descent on a quadratic with gradient noise of infinite variance."""
    del small
    rows, results, series = [], {}, {}
    for name, bound in {"clipped, alpha = 1": 1.0, "clipped, alpha = 3": 3.0, "SGD": INF}.items():
        trace = theory.simulate_descent(
            jax.random.key(0), dimension=2, steps=2000, learning_rate=0.1, alpha=bound, seeds=200
        )
        distance = np.asarray(trace.distance)
        late = distance[:, 500:]
        series[name] = np.quantile(distance, [0.5, 0.99], axis=0)
        results[name] = {"median": np.median(late), "p99": np.quantile(late, 0.99),
                         "max": late.max()}  # fmt: skip
        rows.append([name, *(f"{v:.3g}" for v in results[name].values())])
    clipped, sgd = results["clipped, alpha = 1"]["p99"], results["SGD"]["p99"]
    claims = [
        Claim("heavy tails: the 99th percentile of the distance is far smaller with clipping",
              f"< {sgd / 3:.3g} (a third of SGD's)", f"{clipped:.3g}", bool(clipped < sgd / 3)),
    ]  # fmt: skip
    return Study(
        "Distance to the minimum, Student-t noise with 1.5 degrees of freedom, 200 runs",
        ["method", "median", "99 %", "largest"],
        rows, results, claims, functools.partial(engm_figures.distances, series=series),
    )  # fmt: skip


STUDIES: Mapping[str, Callable[[Small], Study]] = {
    "optimizers": optimizers,
    "methods": methods,
    "eps": eps,
    "gradients": gradients,
    "landscape": landscape,
    "alpha": alpha,
    "tau": tau,
    "beta": beta,
    "weight_decay": weight_decay,
    "l2": l2,
    "convergence": convergence,
}
