"""Per-example losses of logits: ``loss(logits (n, K), y) -> (n,)``.

An attack maximises these, training minimises their mean. Labels out of range raise ``ValueError``
where their values are known; under ``jit`` they are not.

- ``classification``: ``cross_entropy``, ``kl_divergence``, ``boosted_cross_entropy``
- ``margins``: ``margin``, ``soft_margin``, ``cw``, ``cw_targeted``, ``dlr``, ``dlr_targeted``
"""

from robustjax.losses.classification import (
    boosted_cross_entropy,
    cross_entropy,
    kl_divergence,
)
from robustjax.losses.margins import cw, cw_targeted, dlr, dlr_targeted, margin, soft_margin

__all__ = [
    "boosted_cross_entropy",
    "cross_entropy",
    "cw",
    "cw_targeted",
    "dlr",
    "dlr_targeted",
    "kl_divergence",
    "margin",
    "soft_margin",
]
