"""Upper bounds of the Lipschitz constant of a network, layer by layer.

``||f(x) - f(x')|| <= L ||x - x'||`` in l_1, l_2 or l_inf. Finding the smallest ``L`` is NP-hard; a
bound follows from those of the parts:

===============================  ================================================================
part                             factor, or rule
===============================  ================================================================
dense layer, convolution         ``operator_norm`` of the map, at the true size of its input
BatchNorm in evaluation mode     ``max |scale| / sqrt(var + epsilon)``, as any diagonal scaling
ReLU, tanh, clipping, maxima     1; logistic 1/4, SiLU 1.0998
max-pooling                      1 in l_inf; ``sqrt(m)`` in l_2 if a pixel is in ``m`` windows
mean over ``k`` positions        ``1 / sqrt(k)`` in l_2, 1 in l_inf, ``1 / k`` in l_1
composition                      product
sum of two branches              sum: a residual block has ``1 +`` the product of its branch
concatenation                    the norm of the branches' bounds
===============================  ================================================================

The network is a function, of any library: it is traced, and the rules are applied to the operations
of the trace, in which a layer is just a product with an array that does not depend on the input. A
part without a global constant (LayerNorm, attention, products of features) is refused.

Sources: Szegedy et al. (2014), "Intriguing properties of neural networks", section 4.3; Gouk et al.
(2021), "Regularisation of neural networks by enforcing Lipschitz continuity", sections 3 and 4; Ma,
Pan and Farahmand (2023), "Understanding the robustness difference between stochastic gradient
descent and adaptive gradient methods", and Ma (2025), "Understanding adversarial robustness in deep
learning", equation (4.20) and table 4.1, which leaves open the norm and how blocks are counted.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, jaxpr_as_fun
from jaxtyping import Array, Float, Key

from robustjax import checks, keys
from robustjax.norms import L1, L2, LInf, Norm
from robustjax.spectral import LinearMap, check_norm, dense_map, operator_norm


class LipschitzBound(NamedTuple):
    """A bound, and what it is made of.

    Attributes:
      log_value: natural logarithm of the bound, finite where the bound overflows.
      layers: norm of each dense layer, convolution and scaling by an array, in the order of their
        calls, by the names of the modules (``"ResNet/stage1_block1/conv1"``), or of the operations
        where the library of the model does not name them. A repeated name is numbered.
    """

    log_value: Float[Array, ""]
    layers: dict[str, Float[Array, ""]]

    @property
    def value(self) -> Float[Array, ""]:
        """The bound."""
        return jnp.exp(self.log_value)

    @property
    def log_product(self) -> Float[Array, ""]:
        """Logarithm of the product of all ``layers``: the bound of a network with neither branches,
        pooling nor scalar factors, and a measure of the parameters of any.
        """
        return sum(jnp.log(norm) for norm in self.layers.values())


def lipschitz_bound(
    logits_fn: Callable[[Array], Array],
    x: Float[Array | np.ndarray, "n ..."] | jax.ShapeDtypeStruct,
    norm: Norm | None = None,
    *,
    key: Key[Array, ""] | None = None,
    steps: int = 50,
) -> LipschitzBound:
    """Bounds the Lipschitz constant of a network from its input to its output, both in one norm.

    It may be compiled over the parameters, and differentiated for them::

        jax.jit(lambda params: lipschitz_bound(eval_logits(model_fn, params, state), x).log_value)

    The spectral norms of convolutions come from below (see ``operator_norm``). Build the model
    without a lower ``dtype`` for this.

    Args:
      logits_fn: the network in evaluation mode, ``(n, ...) -> (n, K)``, each row by itself.
      x: inputs; only their shape and dtype are used, of one example.
      norm: ``L1()``, ``L2()`` (default) or ``LInf()``.
      key: for the starts of iterations; by default always the same.
      steps: of each iteration, as in ``operator_norm``.

    Raises:
      ValueError: an argument is out of range, or a part of the network has no rule.
    """
    checks.function("logits_fn", logits_fn)
    norm = check_norm(L2() if norm is None else norm)
    checks.integer("steps", steps, at_least=1)
    key = jax.random.key(0) if key is None else keys.check_one(key)
    if x.ndim < 2:
        raise ValueError(f"x must be a batch of inputs (n, ...), got shape {x.shape}")
    walk = _Walk(norm, key, steps, {})
    with jax.default_matmul_precision("highest"):
        traced = jax.make_jaxpr(logits_fn)(jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype))
        bounds = _bounds(walk, traced.jaxpr, traced.consts, [_Dependent(jnp.zeros(()))], "")
    if len(bounds) != 1:
        raise ValueError(f"logits_fn must return one array, got {len(bounds)}")
    log_value = bounds[0].log if isinstance(bounds[0], _Dependent) else jnp.array(-jnp.inf)
    return LipschitzBound(log_value, walk.layers)


class _Walk(NamedTuple):
    """What stays the same on the way through a network; ``layers`` is filled."""

    norm: Norm
    key: Array
    steps: int
    layers: dict[str, Array]

    def record(self, name: str, value: Array) -> None:
        """Notes the norm of a layer under a name of its own."""
        taken, number = name, 1
        while taken in self.layers:
            number += 1
            taken = f"{name}_{number}"
        self.layers[taken] = value


class _Dependent(NamedTuple):
    """In place of a value that depends on the input: the log of its Lipschitz constant."""

    log: Float[Array, ""]


class _Operation(NamedTuple):
    """One line of a traced function, which is itself a function."""

    eqn: JaxprEqn
    jaxpr: Jaxpr  # that it is a line of
    name: str

    def __call__(self, *operands: Any) -> list[Any]:
        """Its results."""
        atoms = zip(self.eqn.invars, operands, strict=True)
        values = {atom: value for atom, value in atoms if not isinstance(atom, Literal)}
        alone = self.jaxpr.replace(
            constvars=(), invars=list(values), outvars=self.eqn.outvars, eqns=[self.eqn]
        )
        return jaxpr_as_fun(ClosedJaxpr(alone, ()))(*values.values())


def _bounds(walk: _Walk, jaxpr: Jaxpr, consts: Any, inputs: Any, prefix: str) -> list[Any]:
    """Values of what does not depend on the input, ``_Dependent`` for what does."""
    env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *inputs), strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else env[atom]

    for eqn in jaxpr.eqns:
        name = "/".join(part for part in (prefix, str(eqn.source_info.name_stack)) if part)
        operation = _Operation(eqn, jaxpr, name)
        operands = [read(atom) for atom in eqn.invars]
        if not any(isinstance(operand, _Dependent) for operand in operands):
            results = operation(*operands)
        elif (inner := _body(eqn)) is not None:
            results = _bounds(walk, inner.jaxpr, inner.consts, operands, name)
        else:
            results = [_Dependent(_rule(walk, operation, operands))] * len(eqn.outvars)
        env.update(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _body(eqn: JaxprEqn) -> ClosedJaxpr | None:
    """The operations of a call (``jit``, ``checkpoint``, custom derivatives), unless it is SiLU."""
    if eqn.primitive.name not in _CALLS:
        return None
    body = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
    body = body if isinstance(body, ClosedJaxpr) else ClosedJaxpr(body, ())
    return None if eqn.primitive.name == "jit" and _is_silu(body.jaxpr) else body


def _is_silu(jaxpr: Jaxpr) -> bool:
    """Whether it is ``x * logistic(x)``, whose factors alone have no constant."""
    if [eqn.primitive.name for eqn in jaxpr.eqns] != ["logistic", "mul"]:
        return False
    logistic, product = jaxpr.eqns
    factors = {logistic.outvars[0], *logistic.invars}
    return len(factors) == 2 and set(product.invars) == factors


_CALLS = {"jit", "remat2", "custom_jvp_call", "custom_vjp_call"}
# Each output is an input, and no input is more than one output.
_SELECTIONS = {
    "convert_element_type", "copy", "expand_dims", "neg", "pad", "reshape", "rev", "slice", "split",
    "squeeze", "stop_gradient", "transpose",
}  # fmt: skip
_ELEMENTWISE = {
    "abs": 1.0, "atan": 1.0, "cos": 1.0, "logistic": 0.25, "sin": 1.0, "tanh": 1.0,
    "erf": 2 / math.sqrt(math.pi),
    "jit": 1.0998393194,  # SiLU: no other call gets here
}  # fmt: skip
_SUMS = {"add", "add_any", "sub"}
_MAXIMA = {"max", "min"}
_SCALINGS = {"mul": jnp.abs, "div": lambda c: 1 / jnp.abs(c)}
_PRODUCTS = {"dot_general", "conv_general_dilated", "canonical_conv"}
_LINEAR = {"reduce_window_sum", "gather"}


def _rule(walk: _Walk, operation: _Operation, operands: list[Any]) -> Float[Array, ""]:
    """Log of the constant of the outputs of one operation."""
    eqn, name = operation.eqn, operation.name
    kind, norm = eqn.primitive.name, walk.norm
    places = [i for i, operand in enumerate(operands) if isinstance(operand, _Dependent)]
    logs = [operands[i].log for i in places]
    sizes = [math.prod(eqn.invars[i].aval.shape) for i in places]
    size = math.prod(eqn.outvars[0].aval.shape)
    # Where an operand is broadcast.
    repeated = [
        log + _log_copies(norm, size // max(n, 1)) for log, n in zip(logs, sizes, strict=True)
    ]

    if kind in _SUMS:
        return jax.nn.logsumexp(jnp.stack(repeated))
    if kind in _MAXIMA:
        return _log_stack(norm, repeated)
    if kind == "concatenate":
        return _log_stack(norm, logs)
    if places == [0] and kind in _SELECTIONS:
        return logs[0]
    if places == [0] and kind in _ELEMENTWISE:
        return logs[0] + math.log(_ELEMENTWISE[kind])
    if places == [1] and kind == "clamp":
        return logs[0]
    if places == [0] and kind in ("broadcast_in_dim", "tile"):
        return repeated[0]
    if places == [0] and kind in ("reduce_max", "reduce_min"):
        return logs[0]
    if places == [0] and kind == "reduce_sum":
        return logs[0] + _log_copies(norm.dual, sizes[0] // max(size, 1))
    if places == [0] and kind == "reduce_window_max":
        return logs[0] + _log_copies(norm, _windows_per_pixel(eqn.params))
    if len(places) == 1 and kind in _SCALINGS and (kind == "mul" or places == [0]):
        constant = jnp.asarray(operands[1 - places[0]])
        factor = jnp.max(_SCALINGS[kind](constant))
        if constant.size > 1:
            walk.record(name or kind, factor)
        return repeated[0] + jnp.log(factor)
    if len(places) == 1 and kind in _PRODUCTS:
        factor = _norm_of(walk, _product(operation, operands, places[0]))
        walk.record(name or kind, factor)
        return logs[0] + jnp.log(factor)
    if places == [0] and kind in _LINEAR:
        shape, one = eqn.invars[0].aval.shape, jnp.ones((), eqn.invars[0].aval.dtype)
        windows = LinearMap(lambda k, x: k * operation(x, *operands[1:])[0], one, shape)
        return logs[0] + jnp.log(_norm_of(walk, windows))
    raise ValueError(
        "logits_fn must be made of parts with a Lipschitz constant, such as layers in evaluation "
        f"mode, got the operation {kind} in {name or 'the function itself'}"
    )


def _norm_of(walk: _Walk, linear_map: LinearMap) -> Float[Array, ""]:
    key = jax.random.fold_in(walk.key, len(walk.layers))
    return operator_norm(linear_map, walk.norm, key=key, steps=walk.steps)


def _product(operation: _Operation, operands: list[Any], place: int) -> LinearMap:
    """The map from the operand that depends on the input to the product with the other one."""
    eqn = operation.eqn
    constant, shape = operands[1 - place], eqn.invars[place].aval.shape
    if eqn.primitive.name == "dot_general" and constant.ndim == 2:
        contracted, batch = eqn.params["dimension_numbers"]
        if len(contracted[0]) == 1 and not batch[0]:
            # The same matrix for every position of the other axes: one of them has its norm.
            (axis,) = contracted[1 - place]
            return dense_map(constant if axis == 0 else constant.T)

    def apply(kernel: Array, x: Array) -> Array:
        return operation(*((x, kernel) if place == 0 else (kernel, x)))[0]

    return LinearMap(apply, constant, shape)


def _log_copies(norm: Norm, k: int) -> float:
    """Log of the norm of ``x -> (x, ..., x)``, ``k`` times; in the dual norm, of their sum."""
    return {L1(): 1.0, L2(): 0.5, LInf(): 0.0}[norm] * math.log(max(k, 1))


def _log_stack(norm: Norm, logs: list[Any]) -> Float[Array, ""]:
    """Log of the norm of the vector of constants."""
    logs = jnp.stack(logs)
    if norm == LInf():
        return jnp.max(logs)
    p = 2 if norm == L2() else 1
    return jax.nn.logsumexp(p * logs) / p


def _windows_per_pixel(params: dict[str, Any]) -> int:
    """At most how many windows of pooling hold the same input."""
    if any(d != 1 for d in params["window_dilation"]):
        return math.prod(params["window_dimensions"])
    return math.prod(
        -(-w // s)
        for w, s in zip(params["window_dimensions"], params["window_strides"], strict=True)
    )
