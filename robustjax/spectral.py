"""Norms of linear maps, from how they act: power iteration, operator norms, Hessian eigenvalues.

A layer is a linear map between its true input and output, not its kernel: the matrix of a
convolution depends on size, padding and strides of the images. ``dense_map`` and ``conv_map`` say
which map a kernel makes, and

- ``operator_norm`` is ``max ||A x|| / ||x||`` in l_1, l_2 or l_inf,
- ``frobenius_norm`` the root of the sum of squares of the matrix,
- ``stable_rank`` the ratio ``||A||_F^2 / ||A||_2^2``, at most the rank.

Nothing of the size of the matrix of a convolution is ever made. ``power_iteration`` is for any
linear function of arrays or pytrees, and ``top_hessian_eigenpair`` for Hessians, given by their
products with vectors. Each has a fixed number of steps, and runs under ``jit`` and ``vmap``.

Sources: Golub and Van Loan (2013), "Matrix computations", sections 2.3 and 8.2; Yoshida and Miyato
(2017), "Spectral norm regularization for improving the generalizability of deep learning"; Gouk et
al. (2021), "Regularisation of neural networks by enforcing Lipschitz continuity", section 3.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Key, PyTree

from robustjax import checks, keys
from robustjax.norms import L1, L2, LInf, Norm

Vector = PyTree[Float[ArrayLike, "..."]]


class SingularTriple(NamedTuple):
    """The largest singular value of ``A`` with unit vectors, ``A right = value left``.

    Attributes:
      value: ``||A||_2``, approached from below.
      left: in the space of the outputs.
      right: in the space of the inputs.
    """

    value: Float[Array, ""]
    left: Vector
    right: Vector


class Eigenpair(NamedTuple):
    """An eigenvalue of a symmetric map and its unit vector.

    Attributes:
      value: the Rayleigh quotient of ``vector``.
      vector: shaped like the input of the map.
    """

    value: Float[Array, ""]
    vector: Vector


def power_iteration(
    linear_map: Callable[[Any], Any], start: Vector, *, steps: int = 100
) -> SingularTriple:
    """The largest singular value of any linear function and its vectors.

    ``u <- A v / ||A v||``, ``v <- A^T u / ||A^T u||``; the adjoint is the transpose that JAX takes
    of the function. After ``k`` steps the value is too small by a relative error of order
    ``(s_2 / s_1)^(4 k)``, and never too large but for rounding. Its derivative in what the function
    closes over, such as a kernel, is that of ``<u, A v>`` with the vectors held fixed.

    Args:
      linear_map: a function of one array or pytree that is linear, not affine.
      start: the first ``v``, not zero, of any norm: ``L2().sample_sphere(key, like, 1.0)``, or the
        right vector of the step before, for a map that has changed little since.
      steps: number of applications of the map and of its adjoint, ``>= 1``.

    Raises:
      ValueError: ``steps < 1``, or ``start`` is zero.

    Source: Yoshida and Miyato (2017), algorithm 1.
    """
    checks.function("linear_map", linear_map)
    checks.integer("steps", steps, at_least=1)
    adjoint = jax.linear_transpose(linear_map, start)

    def step(v: Vector, _: None) -> tuple[Vector, None]:
        return _unit(adjoint(_unit(linear_map(v)))[0]), None

    v = jax.lax.stop_gradient(jax.lax.scan(step, _unit(_checked_start(start)), length=steps)[0])
    image = linear_map(v)
    u = jax.lax.stop_gradient(_unit(image))
    return SingularTriple(_inner(u, image), u, v)


def symmetric_power_iteration(
    operator: Callable[[Any], Any], start: Vector, *, steps: int = 100, shift: ArrayLike = 0.0
) -> Eigenpair:
    """The eigenvalue of a symmetric linear function that lies farthest from ``shift``.

    With ``shift = 0`` it is the one of largest magnitude, of either sign; with that one as the
    shift, the other end of the spectrum. The error of the value is of order ``r^(2 k)`` after ``k``
    steps, where ``r < 1`` is the ratio of the two largest distances from the shift.

    Args:
      operator: a symmetric linear function of one array or pytree.
      start: the first vector, not zero, of any norm.
      steps: number of applications, ``>= 1``; one more gives the Rayleigh quotient.
      shift: a number, which may be traced.

    Raises:
      ValueError: ``steps < 1``, or ``start`` is zero.
    """
    checks.function("operator", operator)
    checks.integer("steps", steps, at_least=1)
    checks.number("shift", shift)

    def step(v: Vector, _: None) -> tuple[Vector, None]:
        return _unit(
            jax.tree.map(lambda a, b: (a - shift * b).astype(b.dtype), operator(v), v)
        ), None

    v = jax.lax.stop_gradient(jax.lax.scan(step, _unit(_checked_start(start)), length=steps)[0])
    return Eigenpair(_inner(v, operator(v)), v)


def top_hessian_eigenpair(
    loss_fn: Callable[[Any], Float[Array, ""]],
    at: Vector,
    key: Key[Array, ""],
    *,
    steps: int = 100,
) -> Eigenpair:
    """The largest eigenvalue of the Hessian of a scalar function, with its vector.

    Power iteration finds the eigenvalue of largest magnitude. It may be the lowest one, so a second
    run, shifted by it, finds the other end of the spectrum; the larger of the two is the top one.
    A Hessian-vector product is the derivative of the gradient along the vector.

    Args:
      loss_fn: the function, twice differentiable at the point.
      at: the point: parameters, or an input; an array or a pytree.
      key: one key, for the starts.
      steps: Hessian-vector products in each run, ``>= 1``.

    Raises:
      ValueError: ``steps < 1`` or a bad key.

    Source: Yao et al. (2020), "PyHessian: neural networks through the lens of the Hessian",
    algorithm 2, which has the first run only.
    """
    checks.function("loss_fn", loss_fn)
    keys.check_one(key)
    # Linearised once: a step of the iteration repeats nothing that depends on the point alone.
    _, hessian = jax.linearize(jax.grad(loss_fn), at)
    first, second = (L2().sample_sphere(k, at, 1.0) for k in jax.random.split(key))
    far = symmetric_power_iteration(hessian, first, steps=steps)
    other = symmetric_power_iteration(hessian, second, steps=steps, shift=far.value)
    return jax.tree.map(lambda a, b: jnp.where(far.value >= other.value, a, b), far, other)


def _checked_start(start: Vector) -> Vector:
    known = all(checks.is_known(leaf) for leaf in jax.tree.leaves(start))
    if known and not any(np.any(np.asarray(leaf) != 0) for leaf in jax.tree.leaves(start)):
        raise ValueError("start must not be zero, got a vector of all zeros")
    return start


def _unit(v: Vector) -> Vector:
    return L2().steepest(v)


def _inner(a: Vector, b: Vector) -> Float[Array, ""]:
    products = jax.tree.map(
        lambda a, b: jnp.sum(a * b, dtype=jnp.promote_types(a.dtype, jnp.float32)), a, b
    )
    return sum(jax.tree.leaves(products))


@dataclasses.dataclass(frozen=True)
class LinearMap:
    """``x -> apply(kernel, x)``, linear in both, where an entry of the kernel fills whole entries.

    That is, each entry of the map's matrix is zero or a single entry of the kernel, so that the
    matrix of absolute values is made by the absolute values of the kernel. Dense layers and
    convolutions are such maps (a convolution with periodic padding and a kernel larger than the
    image is not).

    Attributes:
      apply: a bilinear function of kernel and input.
      kernel: of at least float32.
      input_shape: of ``x``.
      matrix: the matrix, or that of which the map has copies along its diagonal, where it is at
        hand; its spectral norm is then found by a decomposition.
    """

    apply: Callable[[Array, Array], Array]
    kernel: Float[Array, "..."]
    input_shape: tuple[int, ...]
    matrix: Float[Array, "p q"] | None = None

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """``A x``."""
        return self.apply(self.kernel, x)


def dense_map(kernel: Float[Array, "p q"]) -> LinearMap:
    """``x (p,) -> x @ kernel (q,)``, a dense layer without its bias.

    Raises:
      ValueError: ``kernel`` is not a floating-point matrix.
    """
    kernel = _checked_kernel(kernel, 2)
    return LinearMap(lambda k, x: x @ k, kernel, kernel.shape[:1], kernel)


def conv_map(
    kernel: Float[Array, "i j c d"],
    image_size: tuple[int, int],
    *,
    strides: int | tuple[int, int] = 1,
    padding: str | int | Sequence[tuple[int, int]] = "SAME",
    convolution: Callable[..., Array] = jax.lax.conv_general_dilated,
) -> LinearMap:
    """A convolution of images ``(h, w, c)`` with zero padding, without its bias.

    Args:
      kernel: ``(k_h, k_w, c_in, c_out)``, as in Flax.
      image_size: height and width of the input.
      strides: stride, or ``(vertical, horizontal)``.
      padding: ``"SAME"``, ``"VALID"``, pairs ``((top, bottom), (left, right))``, or one number for
        all four sides.
      convolution: with the arguments of ``jax.lax.conv_general_dilated``.
        ``robustjax.models.canonical_conv`` makes power iteration several times faster on CPU.

    Raises:
      ValueError: ``kernel`` is not floating-point with four axes, or sizes are ``< 1``.
    """
    kernel = _checked_kernel(kernel, 4)
    height, width = (checks.integer("image_size", size, at_least=1) for size in image_size)
    pair = (strides, strides) if isinstance(strides, int) else tuple(strides)
    for stride in pair:
        checks.integer("strides", stride, at_least=1)
    if isinstance(padding, int):
        padding = ((padding, padding), (padding, padding))

    def apply(kernel: Array, x: Array) -> Float[Array, "p q d"]:
        axes = ("NHWC", "HWIO", "NHWC")
        return convolution(x[None], kernel, pair, padding, dimension_numbers=axes)[0]

    return LinearMap(apply, kernel, (height, width, kernel.shape[2]))


def _checked_kernel(kernel: Array, ndim: int) -> Float[Array, "..."]:
    if checks.array("kernel", kernel).ndim != ndim or not jnp.issubdtype(
        kernel.dtype, jnp.floating
    ):
        raise ValueError(
            f"kernel must be floating-point with {ndim} axes, got {kernel.dtype}{kernel.shape}"
        )
    return kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))


def operator_norm(
    linear_map: LinearMap,
    norm: Norm | None = None,
    *,
    key: Key[Array, ""] | None = None,
    steps: int = 50,
) -> Float[Array, ""]:
    """``max ||A x|| / ||x||``, the norm of inputs and outputs being the same.

    - ``LInf()``: the largest sum of absolute values of a row, exact;
    - ``L1()``: that of a column, exact;
    - ``L2()``, the default: the largest singular value, of a dense layer by a singular value
      decomposition, of a convolution by ``steps`` steps of Lanczos' method and two of power
      iteration, which come to it from below, mostly to the accuracy of float32.

    Borders count: where padding cuts kernels off, rows and columns are shorter, and an image too
    small to hold a whole kernel has a smaller norm than the kernel's sums say.

    Args:
      linear_map: from ``dense_map`` or ``conv_map``.
      norm: ``L1()``, ``L2()`` or ``LInf()``.
      key: for the start of the iteration; by default always the same.
      steps: applications of a convolution and its adjoint, ``>= 1``. As many images are kept.

    Raises:
      ValueError: the norm is another one, ``steps < 1`` or a bad key.

    Source: Gouk et al. (2021), section 3; for l_inf and l_1 of convolutions they have the sums of
    the kernel, the value for images that hold it whole.
    """
    norm = check_norm(L2() if norm is None else norm)
    checks.integer("steps", steps, at_least=1)
    with jax.default_matmul_precision("highest"):
        if norm == L2():
            if linear_map.matrix is not None:
                return jnp.linalg.norm(linear_map.matrix, ord=2)
            key = jax.random.key(0) if key is None else keys.check_one(key)
            like = jax.ShapeDtypeStruct(linear_map.input_shape, linear_map.kernel.dtype)
            start = L2().sample_sphere(key, like, 1.0)
            fixed = dataclasses.replace(linear_map, kernel=jax.lax.stop_gradient(linear_map.kernel))
            return power_iteration(linear_map, _ritz_vector(fixed, start, steps), steps=2).value
        absolute = dataclasses.replace(linear_map, kernel=jnp.abs(linear_map.kernel))
        ones = jnp.ones(linear_map.input_shape, linear_map.kernel.dtype)
        if norm == LInf():
            return jnp.max(absolute(ones))
        image, adjoint = jax.eval_shape(absolute, ones), jax.linear_transpose(absolute, ones)
        return jnp.max(adjoint(jnp.ones(image.shape, image.dtype))[0])


def frobenius_norm(linear_map: LinearMap) -> Float[Array, ""]:
    """``||A||_F``, exact: entries of the kernel weighted by how often they occur in the matrix."""
    kernel = linear_map.kernel
    ones = jnp.ones(linear_map.input_shape, kernel.dtype)
    with jax.default_matmul_precision("highest"):
        total = lambda k: jnp.sum(linear_map.apply(k, ones))  # noqa: E731
        (counts,) = jax.linear_transpose(total, kernel)(jnp.ones((), kernel.dtype))
    return L2().value(kernel * jnp.sqrt(counts))


def stable_rank(
    linear_map: LinearMap, *, key: Key[Array, ""] | None = None, steps: int = 50
) -> Float[Array, ""]:
    """``||A||_F^2 / ||A||_2^2``, from 1 to the rank, whatever the scale; 0 for the zero map.

    Args:
      linear_map: from ``dense_map`` or ``conv_map``.
      key: as in ``operator_norm``.
      steps: as in ``operator_norm``.

    Source: Rudelson and Vershynin (2007), "Sampling from large matrices".
    """
    largest = operator_norm(linear_map, key=key, steps=steps)
    positive = largest > 0
    ratio = frobenius_norm(linear_map) / jnp.where(positive, largest, 1)
    return jnp.where(positive, jnp.square(ratio), 0)


def check_norm(norm: Any) -> Norm:
    """``L1()``, ``L2()`` or ``LInf()``; raises ``ValueError`` for any other."""
    if norm not in (L1(), L2(), LInf()):
        raise ValueError(f"norm must be L1(), L2() or LInf(), got {checks.shown(norm)}")
    return norm


def _ritz_vector(linear_map: LinearMap, start: Array, steps: int) -> Float[Array, "..."]:
    """The best right vector in the span of ``(A^T A)^k start``, ``k < steps``: Lanczos' method.

    Power iteration forgets all but the last of these vectors, and creeps where the largest singular
    values of a convolution are close, as they are for large images.
    """
    adjoint = jax.linear_transpose(linear_map, start)
    steps = min(steps, start.size)

    def step(basis: Array, i: Array) -> tuple[Array, tuple[Array, Array]]:
        v = basis[i]
        w = adjoint(linear_map(v.reshape(start.shape)))[0].ravel()
        size, diagonal = L2().value(w), jnp.vdot(v, w)
        for _ in range(2):  # the second time removes what rounding left
            w = w - (basis @ w) @ basis
        # What is left of an exhausted space is rounding: zero ends the iteration.
        beside = L2().value(w)
        beside = jnp.where(beside > 1e-5 * size, beside, 0)
        return basis.at[i + 1].set(jnp.where(beside > 0, _unit(w), 0)), (diagonal, beside)

    basis = jnp.zeros((steps + 1, start.size), start.dtype).at[0].set(_unit(start).ravel())
    basis, (diagonal, beside) = jax.lax.scan(step, basis, jnp.arange(steps))
    off = jnp.diag(beside[:-1], 1)
    weights = jnp.linalg.eigh(jnp.diag(diagonal) + off + off.T)[1][:, -1]
    ritz = (weights @ basis[:-1]).reshape(start.shape)
    return jnp.where(jnp.any(ritz != 0), ritz, start)  # the zero map has no vector of its own
