"""Why a single step may be enough, and when: three quantities of fast adversarial training."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import fast_figures
from experiments.claims import Claim
from experiments.fast_networks import Small, fit, network, task
from experiments.studies import Study
from robustjax import metrics, models, theory
from robustjax.norms import LInf

KEPT = (0.125, 0.25, 0.5, 0.75, 1.0)


def start(small: Small, samples: int = 1000) -> Study:
    """Lemma 1: length of FGSM's perturbation with a random start, bound and simulation.

    The loss is linear. In units of ``eps sqrt(d)``; with eps = 1 nothing is lost.
    """
    del small
    steps = np.linspace(0, 2, 9)
    bound = theory.random_start_rms(1.0, steps)
    draw = np.random.default_rng(0)
    found, error, rows = {}, {}, []
    for d in (10, 784, 3072):
        eta = draw.uniform(-1, 1, (samples, d)).astype(np.float32)
        length = np.stack([np.linalg.norm(np.clip(eta + step, -1, 1), axis=1) for step in steps])
        length /= np.sqrt(d)
        found[d], error[d] = length.mean(1), length.std(1) / np.sqrt(samples)
    for i, step in enumerate(steps):
        rows.append([f"{step:g}", f"{bound[i]:.5f}", *(f"{v[i]:.5f}" for v in found.values())])
    gap = {d: float((bound - values).mean()) for d, values in found.items()}
    above = max(float(((found[d] - bound) / np.maximum(error[d], 1e-6)).max()) for d in found)
    claims = [
        Claim("mean length is not above the bound, for any step and dimension",
              "< 4 standard errors above", f"{above:.1f}", above < 4),
        Claim("the gap shrinks with the dimension", "10 > 784 and 10 > 3072",
              ", ".join(f"{v:.5f}" for v in gap.values()),
              gap[10] > gap[784] and gap[10] > gap[3072]),
    ]  # fmt: skip
    columns = ["step / eps", "bound", *(f"d = {d}" for d in found)]
    results = {"steps": steps, "bound": bound, "found": {str(d): v for d, v in found.items()}}
    figure = functools.partial(fast_figures.start, steps=steps, bound=bound, found=found)
    return Study(f"Length after a random start, {samples} samples", columns, rows, results,
                 claims, figure)  # fmt: skip


def initialization(small: Small, samples: int = 1000) -> Study:
    """Lemma 2: alignment of the gradients of random networks, and its lower bounds."""
    del small
    radii = np.linspace(0, 0.1, 11)
    draw = np.random.default_rng(0)
    z, noise = draw.uniform(0, 1, (samples, 27)), draw.uniform(-1, 1, (samples, 27))
    key = jax.random.key(0)
    random = [float(theory.random_network_alignment(key, eps, samples=samples).mean())
              for eps in radii.astype(np.float32)]  # fmt: skip
    bounds = np.array([theory.alignment_bounds(z, noise, float(eps)) for eps in radii])
    found = {"100 patches, 4 filters": np.array(random), "limit": bounds[:, 0],
             "Hoeffding": bounds[:, 1], "lemma 2": bounds[:, 2]}  # fmt: skip
    rows = [[f"{eps:.2f}", *(f"{v[i]:.3f}" for v in found.values())]
            for i, eps in enumerate(radii)]  # fmt: skip
    ordered = bool((np.diff(bounds, axis=1) <= 0).all() and (bounds >= 0.5).all())
    least = min(float(found[name].min()) for name in list(found)[:3])
    difference = float(np.abs(found["100 patches, 4 filters"] - found["limit"]).max())
    claims = [
        Claim("limit >= Hoeffding >= lemma 2 >= 0.5 for all eps", "ordered",
              "ordered" if ordered else "not ordered", ordered),
        Claim("networks, limit and Hoeffding's bound for eps up to 0.1", ">= 0.8", f"{least:.3f}",
              least >= 0.8),
        Claim("a finite network is close to the limit", "< 0.01 apart", f"{difference:.3f}",
              difference < 0.01),
    ]  # fmt: skip
    figure = functools.partial(fast_figures.initialization, radii=radii, found=found)
    return Study(f"Gradient alignment at initialisation, {samples} samples", ["eps", *found], rows,
                 {"eps": radii, **found}, claims, figure)  # fmt: skip


@jax.jit
def _errors(logits_fn, key, x, y, eps):
    """Mean error of the first order for each direction and share of coordinates kept."""
    corner_key, keep_key = jax.random.split(key)
    gradient = metrics.input_gradient(logits_fn, x, y)
    direction = LInf().steepest(gradient, batch_ndim=1)
    random = jax.random.rademacher(corner_key, x.shape, x.dtype)
    # A pixel without gradient has no sign; at a corner it must have one.
    corners = {"FGSM": jnp.where(gradient == 0, random, direction), "random": random}
    place = jax.random.uniform(keep_key, (x.shape[0], x[0].size)).argsort(axis=1).argsort(axis=1)
    place = place.reshape(x.shape)

    def error(corner, kept):
        delta = eps * jnp.where(place < kept * x[0].size, corner, 0)
        return metrics.linearization_error(logits_fn, x, y, delta).mean()

    return {name: jax.lax.map(functools.partial(error, corner), jnp.asarray(KEPT))
            for name, corner in corners.items()}  # fmt: skip


def linearization(small: Small) -> Study:
    """Error of the first order over the l_2 norm at fixed l_inf norm: FGSM and random corners."""
    model, test = network(small.filters), task(small).test
    networks = {}
    for method in ("standard", "PGD-10"):
        params = fit(small, method, small.eps)
        last = (jax.tree.map(lambda p, i=i: p[i, -1], params) for i in range(small.seeds))
        networks[method] = [models.eval_logits(model.apply, net, {}) for net in last]
    return linearization_of(networks, test["image"], test["label"], eps=small.eps)


def linearization_of(
    networks: Mapping[str, Sequence[Callable]], x: Any, y: Any, *, eps: float
) -> Study:
    """The same for any networks.

    Args:
      networks: name of the training to networks, from ``models.eval_logits``.
      x: images ``(n, h, w, c)`` in [0, 1].
      y: labels ``(n,)``.
      eps: radius.
    """
    x, y = jnp.asarray(x), jnp.asarray(y)
    found, rows, claims = {}, [], []
    for training, nets in networks.items():
        each = [_errors(logits_fn, jax.random.key(i), x, y, np.float32(eps))
                for i, logits_fn in enumerate(nets)]  # fmt: skip
        found[training] = jax.tree.map(lambda *v: np.stack(v), *each)
        mean = {name: values.mean(0) for name, values in found[training].items()}
        for name, values in mean.items():
            rows.append([training, name, *(f"{v:.3g}" for v in values)])
        rising = all((np.diff(values) > 0).all() for values in mean.values())
        claims.append(
            Claim(f"the error grows with the share of pixels kept, {training} training",
                  "for both directions", "grows" if rising else "does not", bool(rising))
        )  # fmt: skip
        ratio = mean["FGSM"] / mean["random"]
        claims.append(
            Claim(f"the error of FGSM over that of random corners, {training} training", "> 1",
                  f"{ratio.min():.2f} to {ratio.max():.2f}", bool((ratio > 1).all()))
        )  # fmt: skip
    length = eps * np.sqrt(np.asarray(KEPT) * x[0].size)
    figure = functools.partial(fast_figures.linearization, length=length, found=found)
    columns = ["training", "direction", *(f"{100 * kept:g} % kept" for kept in KEPT)]
    return Study(f"Error of the first order, eps = {eps:.4g}", columns, rows,
                 {"l2_norm": length, **found}, claims, figure)  # fmt: skip
