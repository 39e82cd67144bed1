"""Deep linear networks: one linear classifier in many parametrisations, each with its own bias.

What a network computes is ``<w, x>`` with its ``effective weight``; what descent on its layers
prefers among all ``w`` that separate the data depends on the parametrisation.

=====================  ============================================  =========================
network                gradient descent minimises, margins >= 1      most robust to
=====================  ============================================  =========================
linear                 ``||w||_2``                                   l_2
fully connected        ``||w||_2``, with layers of rank 1            l_2
two convolutions       ``||F w||_1``                                 Fourier-l_inf
L convolutions         ``||F w||_{2/L}``: to a stationary point      not known
=====================  ============================================  =========================

Convolutions are circular, with filters as wide as the signal and the factor ``d^{-1/2}`` that makes
``F`` turn them into products, F the unitary transform of ``robustjax.frequency``. The cross
correlation of ``w`` and ``x`` has the spectrum ``conj(F w) F x``, their convolution ``F w F x``. In
a network of correlations, which is what deep learning calls convolution, ``F w`` is the product of
the spectra of the layers.

Sources: Faghri et al., "Bridging the gap between adversarial robustness and optimization bias"
(2021), on linear convolutional networks. Corrected from there: with convolutions, as printed, the
effective weight is the convolution of the last filter with the others reversed; with correlations
the statement holds as it is. Gunasekar et al., "Implicit bias of gradient descent on linear
convolutional networks" (2018); Ji and Telgarsky, "Gradient descent aligns the layers of deep linear
networks" (2019).
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key

from robustjax import checks, keys
from robustjax.frequency import convolve, correlate, dft, inverse_dft

Filters = Sequence[Float[Array, " d"]] | Float[Array, "depth d"]
Matrices = Sequence[Float[Array, "..."]]
Layer = Callable[[Array, Array], Array]


def convolutional_scores(
    layers: Filters, x: Float[Array, "n d"], *, layer: Layer = correlate
) -> Float[Array, " n"]:
    """``<w_L, w_{L-1} * (... (w_1 * x))>`` of a linear convolutional network, layer by layer.

    Args:
      layers: the filters and, last, the weights of the output, each ``(d,)``.
      x: signals.
      layer: ``correlate`` or ``convolve``.

    Raises:
      ValueError: there is no layer, widths differ, or ``layer`` is another.
    """
    _check_filters(layers, layer)
    for w in layers[:-1]:
        x = layer(w, x)
    return x @ layers[-1]


def convolutional_weight(layers: Filters, *, layer: Layer = correlate) -> Float[Array, " d"]:
    """The effective weight ``w`` of ``convolutional_scores``: these are ``<w, x>``.

    ``F w`` is the product of all ``F w_l``; for ``convolve`` all but the last are conjugated. So it
    is the correlation network that has the convolution of its filters as weight.

    Args:
      layers: the filters and, last, the weights of the output, each ``(d,)``.
      layer: ``correlate`` or ``convolve``.

    Raises:
      ValueError: there is no layer, widths differ, or ``layer`` is another.
    """
    _check_filters(layers, layer)
    spectrum = dft(layers[-1])
    for w in layers[:-1]:
        spectrum = spectrum * (dft(w) if layer is correlate else jnp.conj(dft(w)))
    return inverse_dft(spectrum).astype(layers[-1].dtype)


def layers_cost(w: Float[Array, " d"], depth: int) -> Float[Array, ""]:
    """``L ||F w||_{2/L}^{2/L}``: the least ``sum_l ||w_l||_2^2`` of L layers with weight ``w``.

    For two layers it is ``2 ||F w||_1``: small weights of the layers are a sparse spectrum.

    Args:
      w: effective weight.
      depth: number of layers L, ``>= 1``.

    Raises:
      ValueError: ``depth < 1``, or ``w`` is no signal.
    """
    checks.integer("depth", depth, at_least=1)
    return depth * jnp.sum(_magnitude(dft(w)) ** (2 / depth)).astype(w.dtype)


def balanced_layers(w: Float[Array, " d"], depth: int) -> Float[Array, "depth d"]:
    """The layers of ``layers_cost``, each with the magnitudes ``|F w|^{1/L}``.

    All but the last have real and positive spectra, so that they serve correlations and
    convolutions alike.

    Args:
      w: effective weight.
      depth: number of layers L, ``>= 1``.

    Raises:
      ValueError: ``depth < 1``, or ``w`` is no signal.
    """
    checks.integer("depth", depth, at_least=1)
    spectrum = dft(w)
    size = _magnitude(spectrum)
    phase = spectrum / jnp.where(size == 0, 1, size)
    root = size ** (1 / depth)
    first = jnp.broadcast_to(inverse_dft(root.astype(spectrum.dtype)), (depth - 1, w.size))
    return jnp.concatenate([first, inverse_dft(root * phase)[None]]).astype(w.dtype)


def spectral_imbalance(layers: Filters) -> Float[Array, "pairs d"]:
    """``|F w_l|^2 - |F w_{l+1}|^2``: what gradient flow keeps constant, for l = 1 .. L - 1.

    Args:
      layers: at least two filters, each ``(d,)``.

    Raises:
      ValueError: there are fewer than two layers, or widths differ.
    """
    _check_filters(layers, correlate)
    if len(layers) < 2:
        raise ValueError(f"layers must be at least two, got {len(layers)}")
    power = jnp.square(_magnitude(jnp.stack([dft(w) for w in layers])))
    return power[:-1] - power[1:]


def init_convolutional(
    key: Key[Array, ""], d: int, depth: int = 2, *, scale: float = 1.0
) -> list[Float[Array, " d"]]:
    """Normal filters of l_2 norm ``scale`` and zero weights of the output.

    Args:
      key: one key.
      d: width of the signals, ``>= 1``.
      depth: number of layers, ``>= 1``.
      scale: ``> 0``; large ones delay the bias of the network.

    Raises:
      ValueError: an argument is out of range.

    Source: Faghri et al. (2021), the linear experiments.
    """
    keys.check_one(key)
    checks.integer("d", d, at_least=1)
    checks.integer("depth", depth, at_least=1)
    checks.number("scale", scale, above=0)
    filters = jax.random.normal(key, (depth - 1, d))
    filters = scale * filters / jnp.linalg.norm(filters, axis=1, keepdims=True)
    return [*filters, jnp.zeros(d)]


# Fully connected.


def dense_scores(layers: Matrices, x: Float[Array, "n d"]) -> Float[Array, " n"]:
    """``w_L^T W_{L-1}^T ... W_1^T x``, layer by layer.

    Args:
      layers: matrices ``(inputs, outputs)`` and, last, the weights of the output, a vector.
      x: inputs.

    Raises:
      ValueError: there is no layer, or shapes do not fit.
    """
    _check_matrices(layers)
    for w in layers:
        x = x @ w
    return x


def dense_weight(layers: Matrices) -> Float[Array, " d"]:
    """The effective weight ``W_1 W_2 ... w_L`` of ``dense_scores``."""
    _check_matrices(layers)
    weight = layers[-1]
    for w in reversed(layers[:-1]):
        weight = w @ weight
    return weight


def layer_imbalances(layers: Matrices) -> list[Float[Array, "m m"]]:
    """``W_l^T W_l - W_{l+1} W_{l+1}^T``: what gradient flow keeps constant, for l = 1 .. L - 1.

    Source: Ji and Telgarsky (2019).
    """
    _check_matrices(layers)
    pairs = zip(layers[:-1], _as_matrices(layers[1:]), strict=True)
    return [one.T @ one - two @ two.T for one, two in pairs]


def rank_ratios(layers: Matrices) -> Float[Array, " hidden"]:
    """The second singular value of each matrix over its first: 0 where the rank is one.

    Under gradient descent on separable data all tend to 0, like ``1 - layer_alignments``.
    """
    _check_matrices(layers)
    values = [jnp.linalg.svd(w, compute_uv=False) for w in layers[:-1]]
    return jnp.stack([v[1] / v[0] if v.size > 1 else jnp.zeros_like(v[0]) for v in values])


def layer_alignments(layers: Matrices) -> Float[Array, " hidden"]:
    """``|<v_l, u_{l+1}>|`` of the first singular vectors on either side of each hidden layer."""
    _check_matrices(layers)
    svds = [jnp.linalg.svd(w, full_matrices=False) for w in _as_matrices(layers)]
    pairs = itertools.pairwise(svds)
    return jnp.stack([jnp.abs(one[2][0] @ two[0][:, 0]) for one, two in pairs])


def init_dense(key: Key[Array, ""], widths: Sequence[int]) -> list[Float[Array, "..."]]:
    """Normal matrices with columns of l_2 norm 1 and zero weights of the output.

    Args:
      key: one key.
      widths: of the input and the hidden layers, ``>= 1``.

    Raises:
      ValueError: a width is ``< 1``, or there is none.

    Source: Faghri et al. (2021), the linear experiments.
    """
    keys.check_one(key)
    if not widths:
        raise ValueError("widths must hold that of the input, got none")
    for width in widths:
        checks.integer("widths", width, at_least=1)
    layers = []
    for part, (rows, columns) in enumerate(itertools.pairwise(widths)):
        w = jax.random.normal(jax.random.fold_in(key, part), (rows, columns))
        layers.append(w / jnp.linalg.norm(w, axis=0))
    return [*layers, jnp.zeros(widths[-1])]


def scale_by_layers() -> optax.GradientTransformation:
    """Divides updates by ``(sum_l ||w_l||^2)^(L - 1)``: a step that L growing layers bear.

    The gradient in one layer is proportional to the product of the others, so the curvature of the
    logarithm of the risk grows with the power ``2 (L - 1)`` of their size, and with it any constant
    step becomes too large. ``optax.chain(scale_by_layers(), optax.sgd(rate))`` is for
    ``max_margin.descend``; the direction of the steps remains that of gradient descent.
    """

    def scale(updates, params):
        if params is None:
            raise ValueError("params must be the layers, got None")
        depth = len(jax.tree.leaves(params))
        total = optax.tree.norm(params, squared=True) ** (depth - 1)
        return jax.tree.map(lambda u: (u / total).astype(u.dtype), updates)

    return optax.stateless(scale)


def _magnitude(spectrum: Array) -> Array:
    """``|u|`` with derivative 0 at 0."""
    squared = jnp.square(spectrum.real) + jnp.square(spectrum.imag)
    zero = squared == 0
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, squared)))


def _check_filters(layers: Any, layer: Any) -> None:
    checks.choice("layer", layer, (correlate, convolve))
    if len(layers) == 0 or len({jnp.shape(w) for w in layers}) != 1 or jnp.ndim(layers[0]) != 1:
        shapes = [jnp.shape(w) for w in layers]
        raise ValueError(f"layers must be vectors of one width, got shapes {shapes}")


def _check_matrices(layers: Any) -> None:
    shapes = [jnp.shape(w) for w in layers]
    fits = all(one[-1] == two[0] for one, two in itertools.pairwise(shapes))
    if not shapes or len(shapes[-1]) != 1 or any(len(s) != 2 for s in shapes[:-1]) or not fits:
        raise ValueError(f"layers must be matrices that fit and a vector, got shapes {shapes}")


def _as_matrices(layers: Any) -> list[Array]:
    return [w if w.ndim == 2 else w[:, None] for w in layers]
