"""From a model of any library to the two functions that the rest of this one works with.

``model_fn(params, model_state, x, train, key) -> (logits, model_state)`` is what training calls;
``logits_fn(x) -> logits`` is what attacks call. Both are pure. ``model_state`` holds whatever the
model changes by itself, such as BatchNorm's running statistics; ``{}`` or an empty tree if nothing.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Key, PyTree

from robustjax import keys

LogitsFn = Callable[[Array], Array]
ModelFn = Callable[[PyTree, PyTree, Array, bool, Any], tuple[Array, PyTree]]


class Model(NamedTuple):
    """A model as two pure functions.

    Attributes:
      init: ``init(key, x) -> (params, model_state)`` for inputs like ``x (n, ...)``; also under
        ``jax.eval_shape``.
      apply: the ``model_fn``, ``apply(params, model_state, x, train, key)
        -> (logits (n, K), model_state)``. ``train`` is a Python bool: in training mode BatchNorm
        uses and records the statistics of the batch, and dropout draws from ``key``. In evaluation
        mode the state comes back as it was and ``key`` may be ``None``.
    """

    init: Callable[[Any, Any], tuple[PyTree, PyTree]]
    apply: ModelFn


def eval_logits(model_fn: ModelFn, params: PyTree, model_state: PyTree) -> LogitsFn:
    """The closure ``x -> logits`` in evaluation mode, for attacks and metrics.

    It is a ``jax.tree_util.Partial`` over the parameters and the state: a pytree, which can be an
    argument of a compiled function. That function then holds no copy of the parameters, and serves
    every checkpoint of the same model.
    """
    return jax.tree_util.Partial(_eval_logits, _Static(model_fn), params, model_state)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Static:
    """A function as part of a pytree's structure."""

    function: Callable


def _eval_logits(
    model_fn: _Static, params: PyTree, model_state: PyTree, x: Float[ArrayLike, "n ..."]
) -> Float[Array, "n k"]:
    return model_fn.function(params, model_state, x, False, None)[0]


def from_linen(module: nn.Module) -> Model:
    """A Flax Linen module whose ``__call__(x, *, train)`` returns logits.

    ``params`` is its collection of that name and ``model_state`` a dict of all others. ``key``
    feeds ``make_rng("dropout")``.

    Raises:
      ValueError: ``__call__`` has no argument ``train``; later, a bad ``train`` or ``key``, or an
        output that is not ``(n, K)``.
    """
    arguments = inspect.signature(module.__call__).parameters
    if "train" not in arguments:
        raise ValueError(
            f"module must have an argument train of __call__, "
            f"{type(module).__name__} has {', '.join(arguments)}"
        )

    def init(key: Key[Array, ""], x: Any) -> tuple[PyTree, PyTree]:
        # The shape is all that matters; the network itself does not run.
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        model_state = dict(module.lazy_init(keys.check(key), shape, train=False))
        params = model_state.pop("params", {})
        return params, model_state

    def apply(
        params: PyTree,
        model_state: PyTree,
        x: Float[ArrayLike, "n ..."],
        train: bool,
        key: Key[Array, ""] | None,
    ) -> tuple[Float[Array, "n k"], PyTree]:
        variables = {"params": params, **model_state}
        rngs = None if key is None else {"dropout": keys.check(key)}
        if not _mode(train):
            return _logits(x, module.apply(variables, x, train=False, rngs=rngs)), model_state
        logits, updated = module.apply(
            variables, x, train=True, rngs=rngs, mutable=list(model_state)
        )
        return _logits(x, logits), dict(updated)

    return Model(init, apply)


def from_nnx(module: Any) -> tuple[Model, PyTree, PyTree]:
    """A Flax NNX module, called as ``module(x)``, that returns logits.

    The module is read once and never changed. Its mode is switched with ``train()`` and ``eval()``
    on a copy; its random streams restart from ``key`` at every call in training mode.

    Args:
      module: an initialised ``flax.nnx.Module``.

    Returns:
      ``(model, params, model_state)``: the ``nnx.Param`` variables, and all other variables but
      those of random streams. ``model.init`` gives these same values whatever its arguments,
      because an NNX module is initialised when it is made.

    Raises:
      ValueError: later, when the module draws random numbers and ``key`` is ``None`` in training
        mode, for a bad ``train`` or ``key``, or an output that is not ``(n, K)``.
    """
    from flax import nnx  # takes longer to import than the rest of Flax, and few need it

    graph, params, streams, model_state = nnx.split(nnx.clone(module), nnx.Param, nnx.RngState, ...)

    def init(key: Any, x: Any) -> tuple[PyTree, PyTree]:
        del key, x
        return params, model_state

    def apply(
        params: PyTree,
        model_state: PyTree,
        x: Float[ArrayLike, "n ..."],
        train: bool,
        key: Key[Array, ""] | None,
    ) -> tuple[Float[Array, "n k"], PyTree]:
        copy = nnx.merge(graph, params, streams, model_state, copy=True)
        if not _mode(train):
            copy.eval()
            return _logits(x, copy(x)), model_state
        copy.train()
        if key is not None:
            nnx.reseed(copy, default=keys.check(key))
        elif jax.tree.leaves(streams):
            raise ValueError("key must be given in training mode: the module has random streams")
        logits = _logits(x, copy(x))
        return logits, nnx.state(copy, nnx.Not(nnx.Any(nnx.Param, nnx.RngState)))

    return Model(init, apply), params, model_state


def from_function(
    function: Callable[[PyTree, Array], Array],
    init: Callable[[Any, Any], PyTree] | None = None,
) -> Model:
    """A plain function ``function(params, x) -> logits`` without state, modes or randomness.

    Args:
      function: any function; a network of another library closed over everything but parameters.
      init: ``init(key, x) -> params``, if the model is to be initialised here.

    Raises:
      ValueError: later, when ``Model.init`` is called without ``init``, for a bad ``train``, or an
        output that is not ``(n, K)``.
    """

    def init_fn(key: Any, x: Any) -> tuple[PyTree, PyTree]:
        if init is None:
            raise ValueError("init must be given to from_function to initialise parameters")
        return init(key, x), {}

    def apply(
        params: PyTree, model_state: PyTree, x: Float[ArrayLike, "n ..."], train: bool, key: Any
    ) -> tuple[Float[Array, "n k"], PyTree]:
        del key
        _mode(train)
        return _logits(x, function(params, x)), model_state

    return Model(init_fn, apply)


def _mode(train: Any) -> bool:
    if not isinstance(train, bool):
        raise ValueError(f"train must be True or False, known when tracing, got {train!r}")
    return train


def _logits(x: ArrayLike, logits: Array) -> Array:
    n = jnp.shape(x)[0]
    if logits.ndim != 2 or logits.shape[0] != n:
        raise ValueError(
            f"the model must return logits (n, K) with n = {n}, got shape {logits.shape}"
        )
    return logits
