"""Argument checks: one sentence that names the argument, what came and what was expected.

Every check raises ``ValueError`` and returns its value, so that a factory can write
``self.eps = checks.number("eps", eps, at_least=0)``. Values that are being traced cannot be looked
at; they pass, and only their shape and dtype are checked. Checks that must look at the data
(``images``, ``labels``) run outside ``jit``, at the edges: loaders, evaluation, entry points.
"""

import math
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax


def is_traced(value: Any) -> bool:
    """True if the value is a JAX tracer, whose numbers are unknown until it runs."""
    return isinstance(value, jax.core.Tracer)


def is_known(value: Any) -> bool:
    """True if the numbers of the array can be looked at here: not traced, all on this host."""
    return not is_traced(value) and getattr(value, "is_fully_addressable", True)


def shown(value: Any) -> str:
    """The value as it is in a message: on one line and short."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:60]} ... of type {type(value).__name__}"


def number(
    name: str,
    value: Any,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> Any:
    """A finite real number (or an array of them) within the bounds. Traced values pass."""
    if is_traced(value):
        return value
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be a number, got {shown(value)}") from error
    if isinstance(value, (bool, str)) or value is None or np.isnan(array).any():
        raise ValueError(f"{name} must be a number, got {shown(value)}")
    bounds = (
        (at_least, ">=", lambda a, b: a >= b),
        (above, ">", lambda a, b: a > b),
        (at_most, "<=", lambda a, b: a <= b),
        (below, "<", lambda a, b: a < b),
    )
    for bound, symbol, holds in bounds:
        if bound is not None and not (good := holds(array, bound)).all():
            came = array[~good][0] if array.ndim else value
            raise ValueError(f"{name} must be {symbol} {bound:g}, got {came}")
    if at_most is None and below is None and not np.isfinite(array).all():
        came = array[~np.isfinite(array)][0] if array.ndim else value
        raise ValueError(f"{name} must be finite, got {came}")
    return value


def integer(name: str, value: Any, *, at_least: int = 0, at_most: int | None = None) -> int:
    """A Python integer in ``[at_least, at_most]``."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise ValueError(f"{name} must be an integer, got {shown(value)}")
    if value < at_least:
        raise ValueError(f"{name} must be >= {at_least}, got {value}")
    if at_most is not None and value > at_most:
        raise ValueError(f"{name} must be <= {at_most}, got {value}")
    return int(value)


def choice(name: str, value: Any, choices: Iterable[Any]) -> Any:
    """One of a fixed set of values; the error names them all."""
    choices = tuple(choices)
    if not isinstance(value, Hashable) or value not in choices:
        listed = ", ".join(repr(c) for c in choices)
        raise ValueError(f"{name} must be one of {listed}, got {shown(value)}")
    return value


def function(name: str, value: Any) -> Callable:
    """Something to call, where a name is easily given instead."""
    if not callable(value):
        raise ValueError(f"{name} must be a function, got {shown(value)}")
    return value


def transform(name: str, value: Any) -> optax.GradientTransformation:
    """An optax transform."""
    if not isinstance(value, optax.GradientTransformation):
        raise ValueError(f"{name} must be an optax gradient transform, got {shown(value)}")
    return value


def array(name: str, value: Any) -> Any:
    """An array of JAX or NumPy, traced or not."""
    if not isinstance(value, (jax.Array, np.ndarray, np.generic)):
        raise ValueError(f"{name} must be an array, got {type(value).__name__} {shown(value)}")
    return value


def integers(name: str, value: Any) -> Any:
    """An array of integers ``(n,)``."""
    if array(name, value).ndim != 1 or not jnp.issubdtype(value.dtype, jnp.integer):
        raise ValueError(f"{name} must be integers of shape (n,), got {value.dtype}{value.shape}")
    return value


def per_example(name: str, value: Any, n: int) -> Any:
    """An array ``(n,)``, one entry per example."""
    if array(name, value).shape != (n,):
        raise ValueError(f"{name} must have one entry per example, ({n},), got {value.shape}")
    return value


def fields(name: str, value: Any, names: Iterable[str]) -> None:
    """A mapping that holds at least these names."""
    names = tuple(names)
    if not isinstance(value, Mapping) or not set(names) <= set(value):
        came = ", ".join(map(str, value)) if isinstance(value, Mapping) else shown(value)
        raise ValueError(f"{name} must hold {', '.join(names)}, got {came or 'nothing'}")


def same_shape(name: str, value: Any, other_name: str, other: Any) -> None:
    """Two arrays of one shape."""
    array(name, value), array(other_name, other)
    if jnp.shape(value) != jnp.shape(other):
        raise ValueError(
            f"{name} must have the shape of {other_name}, {jnp.shape(other)}, "
            f"got {jnp.shape(value)}"
        )


def batch(x: Any, y: Any, *, x_name: str = "x", y_name: str = "y") -> None:
    """Inputs ``(n, ...)``, ``n >= 1``, with integer labels ``(n,)`` or target scores ``(n, K)``."""
    array(x_name, x), array(y_name, y)
    if x.ndim < 2 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"{x_name} must be a batch of floating-point inputs (n, ...), got {x.dtype}{x.shape}"
        )
    if x.shape[0] == 0:
        raise ValueError(f"{x_name} must hold at least one example, got shape {x.shape}")
    if y.ndim == 0 or y.shape[0] != x.shape[0]:
        raise ValueError(
            f"{y_name} must have one entry per example, {x.shape[0]}, got shape {y.shape}"
        )
    if y.ndim == 1 and not jnp.issubdtype(y.dtype, jnp.integer):
        raise ValueError(f"{y_name} must be integer labels (n,), got {y.dtype}")


def logits_and_labels(logits: Any, y: Any, *, min_classes: int = 2, name: str = "y") -> None:
    """Scores ``(n, K)`` with ``K >= min_classes`` and integer labels ``(n,)`` in ``0 .. K-1``.

    ``name`` is that of the labels. Their values are looked at unless they are traced.
    """
    array("logits", logits), array(name, y)
    if logits.ndim != 2 or not jnp.issubdtype(logits.dtype, jnp.floating):
        raise ValueError(
            f"logits must be floating-point of shape (n, K), got {logits.dtype}{logits.shape}"
        )
    if logits.shape[1] < min_classes:
        raise ValueError(
            f"logits must have at least {min_classes} classes, got K = {logits.shape[1]}"
        )
    if y.shape != logits.shape[:1]:
        raise ValueError(
            f"{name} must have shape ({logits.shape[0]},), one label per row of the logits, "
            f"got {y.shape}"
        )
    if not jnp.issubdtype(y.dtype, jnp.integer):
        raise ValueError(f"{name} must be integer labels, got {y.dtype}")
    if is_known(y):
        labels(name, y, num_classes=logits.shape[1])


def images(name: str, x: Any, *, lower: float = 0.0, upper: float = 1.0) -> None:
    """Concrete images ``(n, h, w, c)``, finite and within ``[lower, upper]``."""
    x = np.asarray(x)
    if x.ndim != 4:
        raise ValueError(f"{name} must have shape (n, h, w, c), got {x.shape}")
    if not np.issubdtype(x.dtype, np.floating):
        raise ValueError(f"{name} must be floating-point in [{lower:g}, {upper:g}], got {x.dtype}")
    in_box(name, x, lower=lower, upper=upper)


def in_box(name: str, x: Any, *, lower: Any, upper: Any) -> None:
    """Concrete inputs ``(n, ...)``, finite and within ``[lower, upper]``, numbers or arrays."""
    x = np.asarray(x)
    if not np.isfinite(x).all():
        bad = int(np.flatnonzero(~np.isfinite(x).reshape(len(x), -1).all(axis=1))[0])
        raise ValueError(f"{name} must be finite, got NaN or infinity in example {bad}")
    lower, upper = np.asarray(lower, x.dtype), np.asarray(upper, x.dtype)
    if (x < lower).any() or (x > upper).any():
        raise ValueError(
            f"{name} must lie in [{lower.min():g}, {upper.max():g}], "
            f"got values from {x.min():g} to {x.max():g}"
        )


def labels(name: str, y: Any, *, num_classes: int) -> None:
    """Concrete integer labels ``(n,)`` in ``0 .. num_classes - 1``."""
    y = integers(name, np.asarray(y))
    if y.size and (y.min() < 0 or y.max() >= num_classes):
        worst = y.max() if y.max() >= num_classes else y.min()
        raise ValueError(f"{name} must lie in 0 .. {num_classes - 1}, got {worst}")


def divisible(name: str, value: int, by_name: str, by: int) -> None:
    """An integer that another one divides."""
    if value % by:
        raise ValueError(f"{name} ({value}) must be divisible by {by_name} ({by})")


def finite(name: str, value: float) -> float:
    """A concrete, finite scalar; used on results, such as a loss."""
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return value
