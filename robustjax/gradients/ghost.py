"""Norms of per-example gradients from activations and output gradients ("ghost" norms).

The gradient of example ``i`` for the kernel of a dense layer is ``G_i = sum_t a_it d_it^T``, with
``a_it`` the layer's input and ``d_it`` the derivative of the loss for its output at position ``t``;
for a convolution ``a_it`` is the patch under the kernel. Its squared norm is

- in the *direct* form the sum of squares of ``G_i``, ``T p q`` products for a ``p x q`` kernel;
- in the *Gram* form ``sum_ts <a_it, a_is> <d_it, d_is>``, ``T^2 (p + q)`` products, and no ``G_i``.

The cheaper one is taken for each layer. One backward pass gives all ``d``, since the loss of an
example depends on no other example; nothing of size (examples x parameters) is kept.

Nothing has to be rewritten for it: while the loss is traced, ``flax.linen.intercept_methods`` shows
every layer that owns parameters, with its input, and lets a zero be added to its output, with
respect to which the loss is then differentiated.

Sources: Goodfellow (2015), "Efficient per-example gradient computations", for dense layers;
Rochette et al. (2019), "Efficient per-example gradient computations in convolutional neural
networks"; Li et al. (2022), "Large language models can be strong differentially private learners",
section 4, and Bu et al. (2022), "Scalable and efficient training of large convolutional neural
networks with differential privacy", for the Gram form and the choice by layer.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from robustjax.models import Conv


class _Layer(NamedTuple):
    """One call of a layer: what its parameters' gradient is made of."""

    path: tuple[str, ...]
    module: nn.Module  # unbound
    arguments: tuple[Any, ...]  # beside the input
    options: Mapping[str, Any]


def layer_norms(
    losses_fn: Callable[[Any], Float[Array, " n"]], params: Any, n: int
) -> Float[Array, " n"]:
    """``||d losses_i / d params||_2`` for each example, over all parameters.

    Args:
      losses_fn: ``losses_fn(params) -> (n,)``. It must call Flax Linen modules, under no
        transformation of its own (``jit``, ``remat``, ``scan``), and example ``i`` of every layer's
        input and output must belong to loss ``i``: no batch statistics, no pairs of examples.
      params: the modules' parameters, a nested dict as from ``Module.init``.
      n: number of examples.

    Raises:
      ValueError: a parameter belongs to no Linen layer that was called, a layer's input or output
        is not one array with one row per example, BatchNorm is in training mode, or a layer is
        called under a transformation, as in a penalty on input gradients.
    """
    try:
        return _layer_norms(losses_fn, params, n)
    except jax.errors.UnexpectedTracerError as error:
        raise ValueError(
            "losses must call their layers under no transformation of their own, such as the "
            "derivative in a penalty: take the norms by vmap_norms"
        ) from error


def _layer_norms(losses_fn, params, n) -> Float[Array, " n"]:
    layers, shapes = _trace(losses_fn, params, n)
    _check_coverage(layers, params)
    taps = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def tapped(taps):
        seen: list[tuple[_Layer, Array, Any]] = []
        with nn.intercept_methods(_interceptor(seen, n, taps)):
            losses = losses_fn(params)
        return losses, [(x, variables) for _, x, variables in seen]

    losses, pull_back, inputs = jax.vjp(tapped, taps, has_aux=True)
    (output_gradients,) = pull_back(jnp.ones_like(losses))

    calls: dict[tuple[str, ...], list] = {}
    for layer, (x, variables), d in zip(layers, inputs, output_gradients, strict=True):
        calls.setdefault(layer.path, []).append((layer, x, variables, d))
    return jnp.sqrt(sum(_squared_norms(group) for group in calls.values()))


def _trace(losses_fn, params, n) -> tuple[list[_Layer], list[jax.ShapeDtypeStruct]]:
    """The calls of layers in their order, and the shapes of their outputs."""
    seen: list[tuple[_Layer, Array, Any]] = []
    shapes: list[jax.ShapeDtypeStruct] = []

    def run(params):
        with nn.intercept_methods(_interceptor(seen, n, None, shapes)):
            return losses_fn(params)

    losses = jax.eval_shape(run, params)
    if losses.shape != (n,):
        raise ValueError(f"losses must have shape ({n},), got {losses.shape}")
    return [layer for layer, _, _ in seen], shapes


def _interceptor(seen: list, n: int, taps: list | None, shapes: list | None = None):
    inside = False  # a layer whose own call is running: its submodules are part of it

    def intercept(call, args, kwargs, context):
        nonlocal inside
        module = context.module
        if inside or context.method_name != "__call__" or not _owns_parameters(module):
            return call(*args, **kwargs)
        name = f"layer {'/'.join(module.path) or type(module).__name__}"
        if isinstance(module, nn.BatchNorm) and not _uses_running_average(module, kwargs):
            raise ValueError(
                f"{name} must use its running average, got BatchNorm in training mode, where every "
                "example depends on all others: take the norms in evaluation mode"
            )
        if not args or not isinstance(args[0], jax.Array) or args[0].shape[:1] != (n,):
            raise ValueError(
                f"{name} must have one row of input per example ({n}), "
                f"got {[jnp.shape(a) for a in args]}"
            )
        inside = True
        try:
            output = call(*args, **kwargs)
        finally:
            inside = False
        if not isinstance(output, jax.Array) or output.shape[:1] != (n,):
            raise ValueError(f"{name} must return one array with {n} rows, got {output}")
        unbound, variables = module.unbind()
        seen.append((_Layer(module.path, unbound, args[1:], kwargs), args[0], variables))
        if taps is None:
            shapes.append(jax.ShapeDtypeStruct(output.shape, output.dtype))
            return output
        return output + taps[len(seen) - 1]

    return intercept


def _owns_parameters(module: nn.Module) -> bool:
    """Whether an array of its own is among the module's parameters."""
    own = module.variables.get("params", {})
    return any(not isinstance(value, Mapping) for value in own.values())


def _uses_running_average(module: nn.BatchNorm, kwargs: Mapping[str, Any]) -> bool:
    given = kwargs.get("use_running_average")
    return bool(module.use_running_average if given is None else given)


def _check_coverage(layers: list[_Layer], params: Any) -> None:
    called = {layer.path for layer in layers}
    for path, _ in jax.tree_util.tree_leaves_with_path(params):
        names = tuple(str(getattr(key, "key", key)) for key in path)
        if not any(names[: len(prefix)] == prefix for prefix in called):
            raise ValueError(
                f"parameter {'/'.join(names)} must belong to a Flax Linen layer that the loss "
                f"calls, got layers {sorted('/'.join(p) for p in called)}; "
                "take the norms by vmap_norms for other models"
            )


def _squared_norms(calls: list) -> Float[Array, " n"]:
    """Squared norms for the parameters of one layer, which may have been called several times."""
    layer = calls[0][0]
    matrix = _as_matrix_product(layer, calls)
    if matrix is None:
        return _squares(_direct_gradients(calls))
    inputs, outputs, use_bias = matrix
    positions, rows, columns = inputs.shape[1], inputs.shape[2], outputs.shape[2]
    if positions * (rows + columns) < rows * columns:
        gram = _product("ntk,nsk->nts", inputs, inputs)
        squares = jnp.sum(gram * _product("ntk,nsk->nts", outputs, outputs), axis=(1, 2))
    else:
        squares = _squares(_product("ntp,ntq->npq", inputs, outputs))
    if use_bias:
        squares += _squares(jnp.sum(outputs, axis=1, dtype=jnp.float32))
    # Rounding can leave a Gram form a little below zero.
    return jnp.maximum(squares, 0)


def _as_matrix_product(layer: _Layer, calls: list) -> tuple[Array, Array, bool] | None:
    """Inputs ``(n, T, p)`` and output gradients ``(n, T, q)`` of a dense or convolution layer."""
    module = layer.module
    if type(module) is nn.Dense:
        unfold = _rows
    elif type(module) is Conv or (type(module) is nn.Conv and _is_plain(module, calls)):
        unfold = _patches_under(module)
    else:
        return None
    inputs = jnp.concatenate([unfold(x) for _, x, _, _ in calls], axis=1)
    outputs = jnp.concatenate([_rows(d) for *_, d in calls], axis=1)
    return inputs, outputs, module.use_bias


def _rows(x: Array) -> Float[Array, "n t c"]:
    return x.reshape(x.shape[0], -1, x.shape[-1])


def _is_plain(module: nn.Conv, calls: list) -> bool:
    """Whether a convolution of Flax is of the kind that ``Conv`` is."""
    ones = (None, 1, (1, 1))
    return (
        all(x.ndim == 4 for _, x, _, _ in calls)
        and module.feature_group_count == 1
        and module.input_dilation in ones
        and module.kernel_dilation in ones
        and module.mask is None
        and module.padding not in ("CIRCULAR", "CAUSAL", "REFLECT")
    )


def _patches_under(module: Any) -> Callable[[Array], Float[Array, "n t k"]]:
    def pair(value):
        return (value, value) if isinstance(value, int) else tuple(value or (1, 1))

    kernel, strides = pair(module.kernel_size), pair(module.strides)
    padding = module.padding
    if isinstance(padding, int):
        padding = ((padding, padding), (padding, padding))
    elif not isinstance(padding, str):
        padding = tuple(pair(side) for side in padding)

    def patches(x):
        if isinstance(padding, str):
            sides = jax.lax.padtype_to_pads(x.shape[1:3], kernel, strides, padding)
        else:
            sides = padding
        x = jnp.pad(x, ((0, 0), *sides, (0, 0)))
        height, width = (
            (size - k) // stride + 1
            for size, k, stride in zip(x.shape[1:3], kernel, strides, strict=True)
        )
        windows = [
            x[:, i : i + height * strides[0] : strides[0], j : j + width * strides[1] : strides[1]][
                :, :height, :width
            ]
            for i in range(kernel[0])
            for j in range(kernel[1])
        ]
        return _rows(jnp.concatenate(windows, axis=-1))

    return patches


def _direct_gradients(calls: list) -> Any:
    """The gradient of each example for all parameters of any layer, ``(n, ...)``."""

    def of_example(layer: _Layer, variables):
        others = {name: value for name, value in variables.items() if name != "params"}

        def gradient(x, d):
            def run(params):
                return layer.module.apply(
                    {"params": params, **others}, x[None], *layer.arguments, **layer.options
                )

            return jax.vjp(run, variables["params"])[1](d[None])[0]

        return gradient

    gradients = [jax.vmap(of_example(layer, v))(x, d) for layer, x, v, d in calls]
    return jax.tree.map(lambda *g: sum(g), *gradients)


def _squares(tree: Any) -> Float[Array, " n"]:
    return sum(
        jnp.sum(jnp.square(leaf.astype(jnp.float32)), axis=range(1, leaf.ndim))
        for leaf in jax.tree.leaves(tree)
    )


def _product(pattern: str, a: Array, b: Array) -> Float[Array, "..."]:
    return jnp.einsum(pattern, a, b, preferred_element_type=jnp.float32)
