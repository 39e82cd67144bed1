"""Exact studies of SOAR: linear regression with idle weights, and passes over a network.

Source: Ma (2025), "Understanding adversarial robustness in deep learning", sections 3.1 and 3.2,
table 3.5.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import soar_figures
from experiments.claims import Claim
from experiments.soar_networks import PERCEPTRON, Small, model_of, threat_of
from experiments.studies import Study
from robustjax import attacks, objectives
from robustjax.theory import linear_regression as theory
from robustjax.training import count_passes, counted

DIMENSIONS, EPS, WEIGHTS = (10, 100, 1000), 0.1, 1000
POPULATION = theory.Population(mean=0.5, second_moment=1.0)
SCALES = {"s = 0.1": lambda d: 0.1, "s = d^-1/2": lambda d: 1 / math.sqrt(d)}
RIDGE = 0.05


def linear(small: Small) -> Study:
    """The loss under attack of a linear regression that is trained to the end, over d.

    Gradient descent leaves the weights of unused dimensions as they were initialised: the more
    there are, the more an attack gains. Weight decay or the exact adversarial penalty remove them.
    """
    del small
    rows, results = [], {}
    for name, scale in SCALES.items():
        for d in DIMENSIONS:
            plain, ridge, robust = map(np.asarray, _attacked(d, jnp.float32(scale(d))))
            expected = theory.expected_attacked_loss(d, scale(d), EPS)
            error = plain.std(ddof=1) / math.sqrt(len(plain))
            results[f"{name}, {d}"] = {
                "expected": expected, "measured": plain.mean(), "standard_error": error,
                "ridge": ridge.mean(), "exact": robust.mean(),
            }  # fmt: skip
            values = (expected, plain.mean(), ridge.mean(), robust.mean())
            rows.append([name, f"{d}", *(f"{v:.3g}" for v in values)])
    fixed = [results[f"s = 0.1, {d}"]["measured"] for d in DIMENSIONS[-2:]]
    slope = math.log(fixed[1] / fixed[0]) / math.log(DIMENSIONS[-1] / DIMENSIONS[-2])
    apart = max(abs(r["measured"] - r["expected"]) / r["standard_error"] for r in results.values())
    left = {which: max(abs(r[which] / r["measured"]) for r in results.values())
            for which in ("ridge", "exact")}  # fmt: skip
    claims = [
        Claim("the loss under attack is what the formula says", "within 4 standard errors",
              f"{apart:.2f}", bool(apart < 4)),
        Claim("it grows as the square of the dimension, s = 0.1, 100 to 1000", "2 +- 0.05",
              f"{slope:.3f}", abs(slope - 2) < 0.05),
        Claim("weight decay removes it", "< 0.001 of it", f"{left['ridge']:.2g}",
              bool(left["ridge"] < 1e-3)),
        Claim("the exact adversarial penalty removes it", "< 0.001 of it", f"{left['exact']:.2g}",
              bool(left["exact"] < 1e-3)),
    ]  # fmt: skip
    return Study(
        f"Linear regression, loss under attack at eps = {EPS:g}, {WEIGHTS} draws",
        ["initial weights", "d", "formula", "gradient descent", "with ridge", "exact penalty"],
        rows,
        results,
        claims,
        functools.partial(soar_figures.linear, results=results, dimensions=DIMENSIONS,
                          scales=tuple(SCALES)),
    )  # fmt: skip


@functools.partial(jax.jit, static_argnums=0)
def _attacked(dimension: int, scale: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What the attack adds to the loss for each draw; eight of them with the exact penalty."""
    starts = scale * jax.random.normal(jax.random.key(dimension), (WEIGHTS, dimension))
    descend = functools.partial(theory.gradient_descent, POPULATION, learning_rate=0.1)
    # The penalty is eps^2 ||w||_1^2 / 2: with larger steps the weights would grow as they flip.
    size = 0.1 / max(1.0, EPS**2 * dimension)

    def penalised(w):
        def step(w, t):
            gradient = jax.grad(lambda w: theory.robust_risk(POPULATION, w, EPS))(w)
            return w - size * gradient, None

        return jax.lax.scan(step, w, length=4000)[0]

    def damage(w):
        return theory.robust_risk(POPULATION, w, EPS) - theory.risk(POPULATION, w)

    plain = jax.lax.map(lambda w: damage(descend(w, steps=math.inf)), starts)
    ridge = jax.lax.map(lambda w: damage(descend(w, steps=2000, ridge=RIDGE)), starts)
    few = jax.vmap(lambda w: damage(penalised(w)))(starts[:8])
    return plain, ridge, few


# Forward and backward passes. FOAR stands without its evaluation point, SOAR with PGD-1.
PUBLISHED = {
    "standard": (1, 1),
    "PGD-1": (2, 2),
    "PGD-10": (11, 11),
    "FOAR": (1, 2),
    "SOAR": (3, 4),
}


def passes(small: Small) -> Study:
    """Passes over the network in a training step, counted in its program, beside the published."""
    threat = threat_of(small.eps)
    attack, radius = objectives.evaluation_point(threat)
    tried = {
        "standard": objectives.standard(),
        "PGD-1": objectives.madry(attacks.pgd(threat, steps=1)),
        "PGD-10": objectives.madry(attacks.pgd(threat, steps=10)),
        "FOAR": objectives.penalized(objectives.standard(), objectives.first_order(small.eps)),
        "SOAR": objectives.penalized(
            objectives.madry(attack), objectives.soar(radius), at="adversarial"
        ),
    }
    rows, results = [], {}
    for name, objective in tried.items():
        loss, gradient = _passes(objective)
        # By hand the derivative for the parameters is one backward pass.
        ours = (loss.forward, loss.backward + 1)
        results[name] = {"published": PUBLISHED[name], "counted": ours,
                         "loss": loss._asdict(), "gradient": gradient._asdict()}  # fmt: skip
        rows.append([name, *map(str, PUBLISHED[name]), *map(str, ours), str(gradient.total)])
    same = [name for name, found in results.items() if found["counted"] == found["published"]]
    claims = [Claim("passes of the loss, and one backward for the parameters, as published",
                    ", ".join(PUBLISHED), ", ".join(same), len(same) == len(PUBLISHED)),
              Claim("going back through the penalty costs more: all passes of SOAR's gradient",
                    "reported", f"{results['SOAR']['gradient']}", None)]  # fmt: skip
    columns = ["objective", "forward, published", "backward", "forward, counted", "backward",
               "all passes of the gradient"]  # fmt: skip
    return Study("Passes over the network in a training step", columns, rows, results, claims)


def _passes(objective: objectives.Objective) -> tuple[Any, Any]:
    """Of the mean loss, and of its derivative for the parameters."""
    batch = {
        "image": jnp.full((2, 8, 8, 1), 0.5),
        "label": jnp.arange(2, dtype=jnp.int32),
        "index": jnp.arange(2, dtype=jnp.int32),
    }
    model = model_of(PERCEPTRON)
    key = jax.random.key(0)
    params, model_state = jax.eval_shape(model.init, key, batch["image"])
    loss_fn = objective(counted(model.apply))

    def mean_loss(params):
        return loss_fn(params, model_state, key, batch)[0].mean()

    return count_passes(mean_loss, params), count_passes(jax.grad(mean_loss), params)
