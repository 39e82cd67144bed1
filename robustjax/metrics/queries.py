"""Statistics of query-based attacks: how often they succeed and how many queries it takes them."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from robustjax import checks


class QueryStatistics(NamedTuple):
    """What ``query_statistics`` measures; an average over no points is NaN.

    Attributes:
      points: points that count, those classified correctly before the attack.
      successes: points of them that the attack broke.
      success_rate: their share.
      failure_rate: ``1 - success_rate``. Read the averages beside it: they grow with every hard
        point that is broken.
      mean: average number of queries over the successes.
      median: median number of queries over the successes.
    """

    points: Int[Array, "..."]
    successes: Int[Array, "..."]
    success_rate: Float[Array, "..."]
    failure_rate: Float[Array, "..."]
    mean: Float[Array, "..."]
    median: Float[Array, "..."]


def query_statistics(
    queries: Int[Array, "*attacks n"],
    success: Bool[Array, "*attacks n"],
    correct: Bool[Array, " n"] | None = None,
) -> QueryStatistics:
    """Success rate, and average and median queries over the successes.

    Args:
      queries: queries spent on each point, ``(n,)`` or ``(attacks, n)``.
      success: whether the attack broke the point within its budget, likewise.
      correct: points classified correctly before the attack, ``(n,)``; the others do not count.
        Default: all.

    Returns:
      One number, or one per attack, in each field.

    Raises:
      ValueError: shapes do not fit, or there are no points.

    Source: Andriushchenko et al. (2020), "Square Attack", section 5.
    """
    correct = _checked(queries, success, correct)
    broken = success & correct
    points = jnp.broadcast_to(correct.sum(), broken.shape[:-1])
    return _statistics(queries, broken, points)


def common_query_statistics(
    queries: Int[Array, "attacks n"],
    success: Bool[Array, "attacks n"],
    correct: Bool[Array, " n"] | None = None,
) -> QueryStatistics:
    """The same on the points that every attack breaks, where their queries can be compared.

    The success rate is the share of the correct points that all attacks break.

    Args:
      queries: queries of each attack on each point, ``(attacks, n)``.
      success: whether the attack broke the point.
      correct: points classified correctly before the attack, ``(n,)``. Default: all.

    Raises:
      ValueError: shapes do not fit, or there are no points.

    Source: Andriushchenko (2024), "Understanding generalization and robustness in modern deep
    learning", table 3.3.
    """
    correct = _checked(queries, success, correct)
    if queries.ndim != 2:
        raise ValueError(f"attacks must be stacked, (attacks, n), got shape {queries.shape}")
    broken = jnp.broadcast_to(jnp.all(success, axis=0) & correct, success.shape)
    return _statistics(queries, broken, jnp.broadcast_to(correct.sum(), success.shape[:1]))


def success_curve(
    queries: Int[Array, "*attacks n"],
    success: Bool[Array, "*attacks n"],
    budgets: Int[Array, " b"],
    correct: Bool[Array, " n"] | None = None,
) -> Float[Array, "*attacks b"]:
    """Success rate within each budget of queries, over the correct points. Never falls.

    Args:
      queries: queries spent on each point, ``(n,)`` or ``(attacks, n)``.
      success: whether the attack broke the point within its own budget, likewise.
      budgets: numbers of queries, ``(b,)``.
      correct: points classified correctly before the attack, ``(n,)``. Default: all.

    Raises:
      ValueError: shapes do not fit, or there are no points.
    """
    correct = _checked(queries, success, correct)
    checks.integers("budgets", budgets)
    within = (success & correct)[..., None, :] & (queries[..., None, :] <= budgets[:, None])
    return within.sum(axis=-1) / correct.sum()


def _statistics(queries: Array, broken: Array, points: Array) -> QueryStatistics:
    successes = broken.sum(axis=-1)
    spent = jnp.where(broken, queries, jnp.nan)
    rate = successes / points
    return QueryStatistics(
        points=points,
        successes=successes,
        success_rate=rate,
        failure_rate=1 - rate,
        mean=jnp.nanmean(spent, axis=-1),
        median=jnp.nanmedian(spent, axis=-1),
    )


def _checked(queries: Array, success: Array, correct: Array | None) -> Bool[Array, " n"]:
    checks.same_shape("success", success, "queries", queries)
    if queries.ndim not in (1, 2) or queries.shape[-1] == 0:
        raise ValueError(f"queries must have shape (n,) or (attacks, n), got {queries.shape}")
    n = queries.shape[-1]
    return jnp.ones(n, bool) if correct is None else checks.per_example("correct", correct, n)
