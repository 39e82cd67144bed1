"""Forward and backward passes of a model, counted from the traced program without running it.

``counted(model_fn)`` marks the logits of each pass, and ``count_passes(fn, ...)`` counts the marks
in the program of ``fn``, which uses the marked model in any way. A mark is an identity and costs
nothing; there are three, and differentiation turns one into the other:

========  ====================================  ==================  ==================
mark      a pass over the network               its derivative      its transpose
========  ====================================  ==================  ==================
forward   of values, from input to output       tangent             --
tangent   of derivatives, from input to output  tangent             backward
backward  of derivatives, from output to input  backward            tangent
========  ====================================  ==================  ==================

The gradient of the loss has one forward and one backward pass. The gradient of a function of that
gradient goes back through both: through the backward pass, which is a pass from input to output
(tangent), and through the forward pass once more (backward).

Source: Ma (2025), "Understanding adversarial robustness in deep learning", table 3.5, which
counts the two kinds by hand: the derivative for the parameters is one backward pass there, however
many passes it goes back through.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.extend.core import Jaxpr, Primitive, jaxprs_in_params
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

from robustjax import checks
from robustjax.models.adapters import ModelFn


class Passes(NamedTuple):
    """How often a program goes over a network; each pass costs about one forward pass.

    Attributes:
      forward: passes of values.
      backward: passes of derivatives from the output to the input. Where they end at the parameters
        they also make the products for these, about as much again.
      tangent: passes of derivatives from the input to the output: of forward-mode differentiation,
        and of the derivative of a backward pass.
    """

    forward: int = 0
    backward: int = 0
    tangent: int = 0

    @property
    def total(self) -> int:
        """All passes."""
        return sum(self)


def counted(model_fn: ModelFn) -> ModelFn:
    """The same model with marked passes, for ``count_passes``; under any transform of JAX.

    Args:
      model_fn: ``model_fn(params, model_state, x, train, key) -> (logits, model_state)``.
    """
    checks.function("model_fn", model_fn)

    def marked(params: Any, model_state: Any, x: Array, train: bool, key: Array | None):
        logits, model_state = model_fn(params, model_state, x, train, key)
        return _forward_p.bind(logits), model_state

    return marked


def count_passes(fn: Callable, *args: Any) -> Passes:
    """The passes over a ``counted`` model in the program of ``fn``, whole batches or parts of them.

    Nothing is computed or allocated: the arguments may be ``jax.ShapeDtypeStruct``. Loop bodies
    count as often as they run (``scan``; the body of a ``while_loop``, whose length is unknown,
    counts once), the branch of a ``cond`` with the most passes counts. Passes are those of the
    program as it is written. The compiler may merge equal forward passes and drop unused ones. A
    mark sits on the logits: a derivative that does not come through them, as the second one of a
    loss that is linear in the logits, has no mark to be counted by.

    Args:
      fn: any traceable function, such as ``jax.grad`` of an objective's mean loss or a training
        step built with the counted model.
      *args: its arguments, arrays or shapes.
    """
    checks.function("fn", fn)
    return _count(jax.make_jaxpr(fn)(*args).jaxpr)


def _count(jaxpr: Jaxpr) -> Passes:
    total = Passes()
    for equation in jaxpr.eqns:
        if equation.primitive in _MARKS:
            found = Passes(**{_MARKS[equation.primitive]: 1})
        else:
            inside = [_count(inner) for inner in jaxprs_in_params(equation.params)]
            if equation.primitive.name == "cond":
                found = max(inside, key=lambda passes: passes.total)
            else:
                times = equation.params["length"] if equation.primitive.name == "scan" else 1
                found = Passes(*(times * sum(kind) for kind in zip(*inside, strict=True)))
        total = Passes(*map(sum, zip(total, found, strict=True)))
    return total


def _mark(name: str) -> Primitive:
    """An identity with a name."""
    primitive = Primitive(f"{name}_pass")
    primitive.def_impl(lambda x: x)
    primitive.def_abstract_eval(lambda x: x)
    mlir.register_lowering(primitive, lambda context, x: [x])
    batching.primitive_batchers[primitive] = lambda operands, axes: (
        primitive.bind(operands[0]),
        axes[0],
    )
    return primitive


_forward_p, _backward_p, _tangent_p = (_mark(name) for name in ("forward", "backward", "tangent"))
_MARKS = {_forward_p: "forward", _backward_p: "backward", _tangent_p: "tangent"}


def _derivative(primitive: Primitive, of_tangent: Primitive, transpose: Primitive | None) -> None:
    def jvp(primals: tuple, tangents: tuple) -> tuple:
        (tangent,) = tangents
        if not isinstance(tangent, ad.Zero):
            tangent = of_tangent.bind(tangent)
        return primitive.bind(*primals), tangent

    ad.primitive_jvps[primitive] = jvp
    if transpose is not None:

        def transposed(cotangent: Any, x: Any) -> list:
            if isinstance(cotangent, ad.Zero):
                return [cotangent]
            return [transpose.bind(cotangent)]

        ad.primitive_transposes[primitive] = transposed


_derivative(_forward_p, _tangent_p, None)
_derivative(_tangent_p, _tangent_p, _backward_p)
_derivative(_backward_p, _backward_p, _tangent_p)
