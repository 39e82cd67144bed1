"""Label noise: wrong labels in a known share, which make robust overfitting appear in small sets.

Source: the symmetric label noise of Zhang et al. (2017), "Understanding deep learning requires
rethinking generalization".
"""

import dataclasses

import numpy as np

from robustjax import checks
from robustjax.data.dataset import Dataset


def redraw_labels(dataset: Dataset, share: float, *, seed: int = 0) -> Dataset:
    """Redraws the labels of a random share of the examples, uniformly over all classes.

    The true class is among them, so about ``share * (K - 1) / K`` of the labels change. With one
    seed, the examples redrawn at a smaller share are among those at a larger one and get the same
    labels, which makes comparisons across shares paired. The stream of NumPy's legacy generator is
    frozen, so the noise is the same for ever.

    Args:
      dataset: its images are shared with the result, not copied.
      share: of the examples, in ``[0, 1]``; exactly ``round(share * n)`` are redrawn.
      seed: seed of the noise, 0 .. 2**32 - 1.

    Raises:
      ValueError: ``share`` or ``seed`` is out of range.
    """
    checks.number("share", share, at_least=0, at_most=1)
    checks.integer("seed", seed, at_least=0, at_most=2**32 - 1)
    n = len(dataset)
    random = np.random.RandomState(seed)
    drawn = random.randint(dataset.num_classes, size=n, dtype=np.int32)
    chosen = random.permutation(n)[: round(share * n)]
    label = dataset.label.copy()
    label[chosen] = drawn[chosen]
    return dataclasses.replace(dataset, label=label)
