"""Attacks: the inner maximiser, ``attack(logits_fn, key, x, y) -> x_adv``.

They see a closure from inputs ``(n, ...)`` to logits ``(n, K)`` and nothing of the model behind it.

- ``gradient``: ``pgd`` and the attacks that it contains: ``fgsm`` (FGM for l_2), ``fgsm_rs``,
  ``bim``, ``least_likely``; ``gaussian_start``, ``PGDTrace``
- ``apgd``: ``apgd``, ``apgd_targeted``: step sizes that need no choice
- ``fab``: ``fab``, ``fab_targeted``: least distance to the decision boundary
- ``minimum_norm``: ``carlini_wagner``, ``deepfool``
- ``square``: ``square``: random search on scores
- ``black_box``: ``simba``
- ``fourier``: ``fourier_attack``, ``fourier_linear``, ``unprojected_step``, ``project_in_box``,
  ``violation``: in the Fourier-l_inf norm, full band or part of it
- ``transfer``: ``transfer_matrix``, ``transfer_accuracy``, ``substitute_augment``
- ``stepwise``: ``StepwiseAttack``, which all but those of ``gradient`` are
"""

from robustjax.attacks.apgd import apgd, apgd_targeted
from robustjax.attacks.black_box import simba
from robustjax.attacks.fab import fab, fab_targeted
from robustjax.attacks.fourier import (
    Violation,
    fourier_attack,
    fourier_linear,
    project_in_box,
    unprojected_step,
    violation,
)
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
from robustjax.attacks.minimum_norm import carlini_wagner, deepfool
from robustjax.attacks.square import square
from robustjax.attacks.stepwise import StepwiseAttack
from robustjax.attacks.transfer import (
    TransferMatrix,
    substitute_augment,
    transfer_accuracy,
    transfer_matrix,
)

__all__ = [
    "Attack",
    "PGDTrace",
    "StepwiseAttack",
    "TransferMatrix",
    "Violation",
    "apgd",
    "apgd_targeted",
    "bim",
    "carlini_wagner",
    "deepfool",
    "fab",
    "fab_targeted",
    "fgsm",
    "fgsm_rs",
    "fourier_attack",
    "fourier_linear",
    "gaussian_start",
    "least_likely",
    "pgd",
    "project_in_box",
    "simba",
    "square",
    "substitute_augment",
    "transfer_accuracy",
    "transfer_matrix",
    "unprojected_step",
    "violation",
]
