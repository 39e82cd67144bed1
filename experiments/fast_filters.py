"""The filters of a single-layer CNN before and after FGSM training has collapsed.

In the paper one filter of four becomes a Laplace filter with large outgoing weights: it is silent
on clean images, noise switches it on, and without it the gradients are aligned again.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from experiments import fast_figures
from experiments.claims import Claim
from experiments.fast_networks import Small, fit, network, task, threat_model, train
from experiments.studies import Study
from robustjax import metrics, models, theory


class Collapse(NamedTuple):
    """FGSM training at the larger radius, one entry for each seed.

    Attributes:
      params: at the evaluations, ``(seeds, t, ...)``.
      runs: what is measured on them.
      before: the evaluation that early stopping keeps.
      filter: the one with the largest product of its norm and that of its outgoing weights, at the
        end.
    """

    params: Any
    runs: Any
    before: np.ndarray
    filter: np.ndarray


def _collapse(small: Small) -> Collapse:
    runs = train(small, "FGSM", small.large_eps)
    before = np.array([metrics.early_stopping(curve) for curve in runs.train_pgd])
    strength = runs.filter_norm[:, -1] * runs.outgoing_norm[:, -1]
    params = fit(small, "FGSM", small.large_eps)
    return Collapse(params, runs, before, strength.argmax(1))


def without_filter(params: Any, which: int) -> Any:
    """The network with the weights and the bias of one filter set to zero."""
    conv = jax.tree.map(lambda p: jnp.asarray(p).at[..., which].set(0), params["conv"])
    return {**params, "conv": conv}


def responses(params: Any, x: Array) -> Array:
    """Of each filter before the ReLU, ``(n, h, w, filters)``."""
    kernel, bias = params["conv"]["kernel"], params["conv"]["bias"]
    return bias + jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@functools.partial(jax.jit, static_argnums=0)
def _probe(filters: int, params: Any, key: Array, x: Array, y: Array, eps: Array) -> dict:
    """Alignment, and the shares of active responses on images and on images with noise."""
    logits_fn = models.eval_logits(network(filters).apply, params, {})
    noise = jax.random.uniform(key, x.shape, minval=-1, maxval=1) * eps
    return {
        "alignment": metrics.gradient_alignment(logits_fn, x, y, noise).mean(),
        "clean": (responses(params, x) > 0).mean((0, 1, 2)),
        "noisy": (responses(params, x + noise) > 0).mean((0, 1, 2)),
    }


def _pick(params: Any, *at: int) -> Any:
    return jax.tree.map(lambda p: p[at], params)


def filters(small: Small) -> Study:
    """Norms of the filters, alignment without the strongest one, and two filters made by hand."""
    found = _collapse(small)
    test = task(small).test
    probe = functools.partial(_probe, small.filters, key=jax.random.key(0), x=test["image"],
                              y=test["label"], eps=np.float32(small.large_eps))  # fmt: skip
    rows, results = [], []
    for seed, (early, which) in enumerate(zip(found.before, found.filter, strict=True)):
        last = _pick(found.params, seed, -1)
        before, after = (probe(p) for p in (_pick(found.params, seed, early), last))
        removed = [float(probe(without_filter(last, i))["alignment"]) for i in range(small.filters)]
        numbers = {
            "filter_norm": found.runs.filter_norm[seed, -1],
            "outgoing_norm": found.runs.outgoing_norm[seed, -1],
            "filter": int(which), "before": float(before["alignment"]),
            "after": float(after["alignment"]), "without": removed,
            "active_clean": np.asarray(after["clean"]), "active_noisy": np.asarray(after["noisy"]),
        }  # fmt: skip
        results.append(numbers)
        norm, out = (np.roll(numbers[name], -which) for name in ("filter_norm", "outgoing_norm"))
        rows.append([
            str(seed), f"{norm[0]:.2f}", ", ".join(f"{v:.2f}" for v in norm[1:]),
            f"{out[0]:.1f}", ", ".join(f"{v:.1f}" for v in out[1:]),
            f"{numbers['active_clean'][which]:.2f}, {numbers['active_noisy'][which]:.2f}",
            f"{numbers['before']:.2f}", f"{numbers['after']:.2f}", f"{removed[which]:.2f}",
            ", ".join(f"{v:.2f}" for v in np.delete(removed, which)),
        ])  # fmt: skip
    after, without = (np.array([numbers[name] for numbers in results]).mean() if name == "after"
                      else np.mean([n["without"][n["filter"]] for n in results])
                      for name in ("after", "without"))  # fmt: skip
    strength = np.sort(found.runs.filter_norm[:, -1] * found.runs.outgoing_norm[:, -1], axis=1)
    box, laplace = handmade()
    claims = [
        Claim("without the strongest filter the gradients are aligned better",
              f"> {after:.2f} (with it)", f"{without:.2f}", bool(without > after)),
        Claim("one filter dominates: its strength over that of the next", "large",
              ", ".join(f"{v:.1f}" for v in strength[:, -1] / strength[:, -2])
              if small.filters > 1 else "the only one", None),
        Claim("alignment of a box filter, of a Laplace filter with negative bias",
              "> 0.95, < 0.5", f"{box:.2f}, {laplace:.2f}", bool(box > 0.95 and laplace < 0.5)),
    ]  # fmt: skip
    every = small.epochs // small.evaluations
    figure = functools.partial(
        fast_figures.filters, epoch=every * np.arange(1, small.evaluations + 1),
        kernels=np.asarray(found.params["conv"]["kernel"][0]),
        norm=found.runs.filter_norm[0], outgoing=found.runs.outgoing_norm[0],
    )  # fmt: skip
    columns = ["seed", "strongest: norm", "others", "outgoing", "others", "active, with noise",
               "alignment before", "after", "without it", "without another"]  # fmt: skip
    return Study(f"Filters of FGSM training, eps = {small.large_eps:g}", columns, rows,
                 {"seeds": results, "box": box, "laplace": laplace}, claims, figure)  # fmt: skip


def handmade(eps: float = 10 / 255, size: int = 96, seed: int = 0) -> tuple[float, float]:
    """Alignment of one-filter networks on a smooth image: box filter, Laplace with negative bias.

    3x3 patches that do not overlap, outgoing weights from the normal distribution. The Laplace
    filter answers a smooth image with next to nothing, and its bias is such that one patch in
    twenty activates it.
    """
    draw = np.random.default_rng(seed)
    at = np.linspace(0, 2 * np.pi, size)
    image = 0.5 + 0.15 * (np.sin(2 * at)[:, None] + np.cos(3 * at)[None])
    noisy = image + draw.uniform(-eps, eps, image.shape)
    box, laplace = np.full((3, 3), 1 / 9), np.array([[0, 1, 0], [1, -4, 1], [0, 1, 0]])
    outputs = draw.normal(size=(size // 3) ** 2)

    def patches(picture):
        return picture.reshape(size // 3, 3, size // 3, 3).swapaxes(1, 2).reshape(-1, 9)

    def alignment(kernel, bias):
        clean, other = (patches(picture) @ kernel.ravel() + bias for picture in (image, noisy))
        return theory.single_filter_alignment(clean, other, outputs)

    bias = -np.quantile(patches(image) @ laplace.ravel(), 0.95)
    return alignment(box, 0.0), alignment(laplace, bias)


def feature_maps(small: Small) -> Study:
    """One image, with and without noise: features, and the gradient of the loss for the input."""
    found = _collapse(small)
    early, which = found.before[0], found.filter[0]
    test = task(small).test
    x, y = test["image"][:1], test["label"][:1]
    key = jax.random.key(1)
    noise = jax.random.uniform(key, x.shape, minval=-1, maxval=1) * small.large_eps
    pair = jnp.concatenate([x, x + noise])
    last = _pick(found.params, 0, -1)
    maps = np.maximum(np.asarray(responses(last, pair)), 0)
    order = np.argsort(found.runs.filter_norm[0, -1] * found.runs.outgoing_norm[0, -1])[::-1]
    pictures = {"image": np.clip(np.asarray(pair), 0, 1)}
    for rank, i in enumerate(order):
        pictures[f"filter {i + 1}{' (strongest)' if rank == 0 else ''}"] = maps[..., i]
    nets = {"before": _pick(found.params, 0, early), "after": last,
            "without strongest": without_filter(last, which)}  # fmt: skip
    rows, results = [], {}
    for name, params in nets.items():
        logits_fn = models.eval_logits(network(small.filters).apply, params, {})
        gradient = metrics.input_gradient(logits_fn, pair, jnp.repeat(y, 2))
        cosine = float(metrics.cosine(gradient[:1], gradient[1:])[0])
        step = threat_model(small.large_eps).norm.steepest(gradient, batch_ndim=1)
        same = float((step[0] == step[1]).mean())
        pictures[f"gradient, {name}"] = np.asarray(gradient).mean(axis=-1)
        rows.append([name, f"{cosine:.2f}", f"{100 * same:.0f}"])
        results[name] = {"cosine": cosine, "same_sign": same}
    columns = ["network", "cosine of the gradients", "same sign, % of pixels"]
    figure = functools.partial(fast_figures.feature_maps, pictures=pictures)
    title = f"Input gradients of one image without and with noise, eps = {small.large_eps:g}"
    return Study(title, columns, rows, results, [], figure)
