"""Attacks: the inner maximiser, ``attack(logits_fn, key, x, y) -> x_adv``.

They see a closure from inputs ``(n, ...)`` to logits ``(n, K)`` and nothing of the model behind it.

- ``gradient``: ``pgd`` and the attacks that it contains: ``fgsm`` (FGM for l_2), ``fgsm_rs``,
  ``bim``, ``least_likely``; ``gaussian_start``, ``PGDTrace``
"""

from robustjax.attacks.gradient import (
    Attack,
    PGDTrace,
    bim,
    fgsm,
    fgsm_rs,
    gaussian_start,
    least_likely,
    pgd,
)

__all__ = [
    "Attack",
    "PGDTrace",
    "bim",
    "fgsm",
    "fgsm_rs",
    "gaussian_start",
    "least_likely",
    "pgd",
]
