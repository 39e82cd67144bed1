"""What a few runs with different seeds say: mean, spread, and a confidence interval of the mean."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import ArrayLike, Float

from robustjax import checks

Numbers = float | Float[np.ndarray, "..."]


class ConfidenceInterval(NamedTuple):
    """A mean and how sure it is; numbers, or arrays for values with more axes.

    Attributes:
      mean: mean of the values.
      std: their sample standard deviation (divisor ``s - 1``), the spread of single runs; 0 for
        one value.
      low: lower end of the interval of the mean.
      high: upper end.
    """

    mean: Numbers
    std: Numbers
    low: Numbers
    high: Numbers


def bootstrap_mean(
    values: ArrayLike | Sequence[float],
    *,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> ConfidenceInterval:
    """Mean of runs with its percentile-bootstrap confidence interval.

    Runs are drawn with replacement, as many as there are; the interval holds the middle
    ``confidence`` of the means of such samples. It never leaves the range of the values. With few
    runs it is too narrow (for three, the extremes of the means have probability 1/27 each), and one
    run says nothing about the spread: then ``low = high = mean`` and ``std = 0``.

    Args:
      values: one number per run, ``(s,)``; or ``(s, ...)``, such as curves, with an interval for
        each entry.
      confidence: probability, in ``(0, 1)``.
      resamples: samples that are drawn, ``>= 1``.
      seed: seed of the draw; the same gives the same interval.

    Raises:
      ValueError: there are no values, one is not finite, or an argument is out of range.

    Source: Efron (1979), "Bootstrap methods: another look at the jackknife"; the percentile
    method with 1000 resamples is that of common plotting software.
    """
    checks.number("confidence", confidence, above=0, below=1)
    checks.integer("resamples", resamples, at_least=1)
    checks.integer("seed", seed)
    values = np.asarray(checks.number("values", values), np.float64)
    if values.ndim == 0 or values.size == 0:
        raise ValueError(f"values must hold at least one run, (s, ...), got shape {values.shape}")
    mean = values.mean(axis=0)
    if len(values) == 1:
        return ConfidenceInterval(mean, 0 * mean, mean, mean)
    from scipy.stats import bootstrap  # here, as it takes half a second that attacks would pay too

    interval = bootstrap(
        (values,),
        np.mean,
        axis=0,
        n_resamples=resamples,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return ConfidenceInterval(mean, values.std(axis=0, ddof=1), interval.low, interval.high)
