"""Argument checks: one sentence that names the argument, what came and what was expected.

Every check raises ``ValueError`` and returns its value, so that a factory can write
``self.eps = checks.number("eps", eps, at_least=0)``. Values that are being traced cannot be looked
at; they pass, and only their shape and dtype are checked. Checks that must look at the data
(``images``, ``labels``) run outside ``jit``, at the edges: loaders, evaluation, entry points.
"""

import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def is_traced(value: Any) -> bool:
    """True if the value is a JAX tracer, whose numbers are unknown until it runs."""
    return isinstance(value, jax.core.Tracer)


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
        raise ValueError(f"{name} must be a number, got {value!r}") from error
    if isinstance(value, (bool, str)) or value is None or np.isnan(array).any():
        raise ValueError(f"{name} must be a number, got {value!r}")
    bounds = (
        (at_least, ">=", lambda a, b: a >= b),
        (above, ">", lambda a, b: a > b),
        (at_most, "<=", lambda a, b: a <= b),
        (below, "<", lambda a, b: a < b),
    )
    for bound, symbol, holds in bounds:
        if bound is not None and not holds(array, bound).all():
            raise ValueError(f"{name} must be {symbol} {bound:g}, got {value}")
    if at_most is None and below is None and not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite, got {value}")
    return value


def integer(name: str, value: Any, *, at_least: int = 0, at_most: int | None = None) -> int:
    """A Python integer in ``[at_least, at_most]``."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise ValueError(f"{name} must be an integer, got {value!r}")
    if value < at_least:
        raise ValueError(f"{name} must be >= {at_least}, got {value}")
    if at_most is not None and value > at_most:
        raise ValueError(f"{name} must be <= {at_most}, got {value}")
    return int(value)


def choice(name: str, value: Any, choices: Iterable[Any]) -> Any:
    """One of a fixed set of values; the error names them all."""
    choices = tuple(choices)
    if value not in choices:
        listed = ", ".join(repr(c) for c in choices)
        raise ValueError(f"{name} must be one of {listed}, got {value!r}")
    return value


def same_shape(name: str, value: Any, other_name: str, other: Any) -> None:
    """Two arrays of one shape."""
    if jnp.shape(value) != jnp.shape(other):
        raise ValueError(
            f"{name} must have the shape of {other_name}, {jnp.shape(other)}, "
            f"got {jnp.shape(value)}"
        )


def batch(x: Any, y: Any) -> None:
    """Inputs ``(n, ...)``, ``n >= 1``, with integer labels ``(n,)`` or target scores ``(n, K)``."""
    if jnp.ndim(x) < 2 or not jnp.issubdtype(jnp.result_type(x), jnp.floating):
        raise ValueError(
            f"x must be a batch of floating-point inputs (n, ...), "
            f"got {jnp.result_type(x)}{jnp.shape(x)}"
        )
    if jnp.shape(x)[0] == 0:
        raise ValueError(f"x must hold at least one example, got shape {jnp.shape(x)}")
    if jnp.ndim(y) == 0 or jnp.shape(y)[0] != jnp.shape(x)[0]:
        raise ValueError(
            f"y must have one entry per example, {jnp.shape(x)[0]}, got shape {jnp.shape(y)}"
        )
    if jnp.ndim(y) == 1 and not jnp.issubdtype(jnp.result_type(y), jnp.integer):
        raise ValueError(f"y must be integer labels (n,), got {jnp.result_type(y)}")


def logits_and_labels(logits: Any, y: Any, *, min_classes: int = 2) -> None:
    """Scores ``(n, K)`` with ``K >= min_classes`` and integer labels ``(n,)``."""
    if jnp.ndim(logits) != 2:
        raise ValueError(f"logits must have shape (n, K), got {jnp.shape(logits)}")
    if jnp.shape(logits)[1] < min_classes:
        raise ValueError(
            f"logits must have at least {min_classes} classes, got K = {jnp.shape(logits)[1]}"
        )
    if jnp.shape(y) != jnp.shape(logits)[:1]:
        raise ValueError(
            f"y must have shape ({jnp.shape(logits)[0]},), one label per row of the logits, "
            f"got {jnp.shape(y)}"
        )
    if not jnp.issubdtype(jnp.result_type(y), jnp.integer):
        raise ValueError(f"y must be integer labels, got {jnp.result_type(y)}")


def images(name: str, x: Any, *, lower: float = 0.0, upper: float = 1.0) -> None:
    """Concrete images ``(n, h, w, c)``, finite and within ``[lower, upper]``."""
    x = np.asarray(x)
    if x.ndim != 4:
        raise ValueError(f"{name} must have shape (n, h, w, c), got {x.shape}")
    if not np.issubdtype(x.dtype, np.floating):
        raise ValueError(f"{name} must be floating-point in [{lower:g}, {upper:g}], got {x.dtype}")
    if not np.isfinite(x).all():
        bad = int(np.flatnonzero(~np.isfinite(x).reshape(len(x), -1).all(axis=1))[0])
        raise ValueError(f"{name} must be finite, got NaN or infinity in example {bad}")
    if x.size and (x.min() < lower or x.max() > upper):
        raise ValueError(
            f"{name} must lie in [{lower:g}, {upper:g}], got values from {x.min():g} to {x.max():g}"
        )


def labels(name: str, y: Any, *, num_classes: int) -> None:
    """Concrete integer labels ``(n,)`` in ``0 .. num_classes - 1``."""
    y = np.asarray(y)
    if y.ndim != 1 or not np.issubdtype(y.dtype, np.integer):
        raise ValueError(f"{name} must be integers of shape (n,), got {y.dtype}{y.shape}")
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
