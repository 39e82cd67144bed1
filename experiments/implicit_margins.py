"""First-order margins of small networks, and where they are exact.

Where ``phi`` is linear within a distance xi of an example, ``min(xi, y phi / ||grad phi||_*)`` is a
radius that no attack can beat; elsewhere the gradient's margin is an estimate, too large where phi
saturates and too small where it grows faster than linearly.

Source: Faghri et al. (2021), "Bridging the gap between adversarial robustness and optimization
bias", appendix B.4.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from robustjax import attacks, losses
from robustjax.metrics.margins import binary_margin, linear_margin
from robustjax.norms import LInf
from robustjax.threat import ThreatModel


class Margins(NamedTuple):
    """Of each example ``(n,)``: margins of a network ``sign(phi(x))``, in l_inf, no box.

    Attributes:
      correct: whether the example is classified correctly.
      estimate: the first-order margin.
      region: distance within which no hidden unit changes sign, so that phi is linear.
      attack: the smallest eps at which PGD finds an example that is misclassified.
      certified: whether PGD finds none at 0.999 times the smaller of estimate and region.
    """

    correct: np.ndarray
    estimate: np.ndarray
    region: np.ndarray
    attack: np.ndarray
    certified: np.ndarray


@functools.partial(jax.jit, static_argnums=(0,))
def measure_margins(hidden: int, train: Any, test: Any, steps: Array) -> Margins:
    """Trains a network with one hidden layer of ReLU units, ``steps`` steps of Adam; measures it.

    Args:
      hidden: units.
      train: images and labels of digits.
      test: those that are measured.
      steps: of training.
    """
    sign = [2.0 * (part["label"] >= 5) - 1 for part in (train, test)]
    x, at = (part["image"].reshape(len(part["label"]), -1) for part in (train, test))
    keys = jax.random.split(jax.random.key(0))
    params = {
        "w": jax.random.normal(keys[0], (x.shape[1], hidden)) / 8,
        "b": jnp.zeros(hidden),
        "v": jax.random.normal(keys[1], (hidden,)) / hidden**0.5,
    }
    optimizer = optax.adam(0.01)

    def phi(params, x):
        return jax.nn.relu(x @ params["w"] + params["b"]) @ params["v"]

    def step(_, carry):
        params, state = carry
        g = jax.grad(lambda p: jax.nn.softplus(-sign[0] * phi(p, x)).mean())(params)
        updates, state = optimizer.update(g, state)
        return optax.apply_updates(params, updates), state

    params, _ = jax.lax.fori_loop(0, steps, step, (params, optimizer.init(params)))
    scores = sign[1] * phi(params, at)
    estimate = binary_margin(lambda x: phi(params, x), at, sign[1], LInf())
    units = jnp.abs(at @ params["w"] + params["b"])
    region = jnp.min(units / jnp.abs(params["w"]).sum(axis=0), axis=1)

    def withstands(eps):
        """Whether PGD fails, for one eps per example."""
        attack = attacks.pgd(
            ThreatModel(LInf(), eps, -jnp.inf, jnp.inf), steps=20, step_size=eps / 4,
            loss=losses.margin, start="zero",
        )  # fmt: skip

        def logits_fn(x):
            value = phi(params, x)
            return jnp.stack([-value, value], axis=1)

        label = (sign[1] > 0).astype(jnp.int32)
        return sign[1] * phi(params, attack(logits_fn, jax.random.key(2), at, label)) > 0

    def halve(_, between):
        low, high = between
        middle = (low + high) / 2
        robust = withstands(middle)
        return jnp.where(robust, middle, low), jnp.where(robust, high, middle)

    ends = jnp.zeros(len(at)), jnp.full(len(at), 1.0)
    attacked = jax.lax.fori_loop(0, 24, halve, ends)[1]
    positive = jnp.maximum(jnp.minimum(estimate, region), 0)
    return Margins(scores > 0, estimate, region, attacked, withstands(0.999 * positive))


def curved_margins(u: np.ndarray) -> dict[str, np.ndarray]:
    """Estimates of tanh(a w.x) and sinh(a w.x) over the exact margin, at ``u = a w.x``."""
    w = jnp.array([3.0, -4.0, 12.0])
    x = jnp.asarray(u)[:, None] * w / jnp.sum(w * w)
    value, pull = jax.vjp(lambda x: x @ w, x)
    exact = linear_margin(value, pull(jnp.ones_like(value))[0], LInf())
    ratios = {}
    for name, fn in {"tanh": jnp.tanh, "sinh": jnp.sinh}.items():
        estimate = binary_margin(lambda x, fn=fn: fn(x @ w), x, jnp.ones(len(u)), LInf())
        ratios[name] = np.asarray(estimate / exact)
    return ratios
