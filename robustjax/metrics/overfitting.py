"""Monitors of adversarial training from its curves: catastrophic overfitting, early stopping.

Catastrophic overfitting of single-step adversarial training: from one evaluation to the next the
accuracy under PGD collapses, while that under FGSM, which the training minimises, does not. See
``robust_overfitting`` for the slow kind.

Source: Andriushchenko and Flammarion (2020), "Understanding and improving fast adversarial
training"; Andriushchenko (2024), "Understanding generalization and robustness in modern deep
learning", chapter 2.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import ArrayLike, Bool, Float

from robustjax import checks

History = ArrayLike | Sequence[float]


def catastrophic_overfitting(
    pgd_accuracy: History,
    fgsm_accuracy: History,
    pgd_loss: History | None = None,
    fgsm_loss: History | None = None,
    *,
    drop: float = 0.5,
    ratio: float = 1.5,
) -> Bool[np.ndarray, " evaluations"]:
    """At which evaluations catastrophic overfitting shows.

    Where, since the evaluation before, the accuracy under PGD has lost more than the share ``drop``
    of itself and that under FGSM has not fallen; and, if losses are given, where the mean loss
    under PGD exceeds ``ratio`` times that under FGSM. The first condition marks the collapse alone,
    the second one the whole time in which the model is in that state: ``.any()`` tells whether it
    happened, ``.argmax()`` when. What is slower than one evaluation escapes the first.

    Args:
      pgd_accuracy: accuracy under PGD at each evaluation, ``(evaluations,)``, shares or per cent,
        all on the same examples in evaluation mode.
      fgsm_accuracy: the same under FGSM.
      pgd_loss: mean loss under PGD, ``(evaluations,)``, ``>= 0``.
      fgsm_loss: mean loss under FGSM; to be given with ``pgd_loss``.
      drop: relative loss of accuracy, in ``(0, 1)``.
      ratio: of the losses, ``>= 1``. Before the collapse of a ResNet-18 on CIFAR-10 it is at most
        1.05.

    Raises:
      ValueError: histories differ in length, are empty or hold negative or non-finite numbers, one
        loss is given without the other, or a threshold is out of range.

    Source: Andriushchenko (2024), section 2.5 and figure 2.4, on whose curves (40.1 to 0.0 per cent
    under PGD, 43.5 to 86.7 under FGSM) the thresholds rest; they are ours.
    """
    checks.number("drop", drop, above=0, below=1)
    checks.number("ratio", ratio, at_least=1)
    if (pgd_loss is None) != (fgsm_loss is None):
        given, other = ("fgsm_loss", "pgd_loss") if pgd_loss is None else ("pgd_loss", "fgsm_loss")
        raise ValueError(f"{given} must be given with {other}, got it alone")
    pgd = _history("pgd_accuracy", pgd_accuracy)
    fgsm = _history("fgsm_accuracy", fgsm_accuracy)
    checks.same_shape("fgsm_accuracy", fgsm, "pgd_accuracy", pgd)
    found = np.zeros(pgd.shape, bool)
    found[1:] = (pgd[1:] < (1 - drop) * pgd[:-1]) & (fgsm[1:] >= fgsm[:-1])
    if pgd_loss is not None:
        under_pgd, under_fgsm = _history("pgd_loss", pgd_loss), _history("fgsm_loss", fgsm_loss)
        checks.same_shape("pgd_loss", under_pgd, "pgd_accuracy", pgd)
        checks.same_shape("fgsm_loss", under_fgsm, "pgd_accuracy", pgd)
        found |= under_pgd > ratio * under_fgsm
    return found


def early_stopping(pgd_accuracy: History, *, fall: float | None = None) -> int:
    """Which evaluation to keep: the first with the highest accuracy under PGD.

    A later one must be strictly better, so that a training which checks while it runs keeps the
    same one.

    Args:
      pgd_accuracy: accuracy under PGD at each evaluation, ``(evaluations,)``. On training examples
        (without augmentation), so that the choice does not see the test set.
      fall: stop instead as soon as the accuracy falls by more than this, ``> 0``, in its units,
        from one evaluation to the next, and keep the one before: Wong et al.'s rule, with 0.2 and
        PGD-5 on minibatches. Without such a fall the last one is kept.

    Raises:
      ValueError: the history is empty, not one-dimensional, or holds a negative or non-finite
        number, or ``fall`` is not positive.

    Source: Andriushchenko (2024), section 2.11.2; their code looks at PGD-10 on 256 training
    examples every 200 iterations. Wong, Rice and Kolter (2020), "Fast is better than free".
    """
    history = _history("pgd_accuracy", pgd_accuracy)
    if fall is None:
        return int(np.argmax(history))
    checks.number("fall", fall, above=0)
    fallen = np.flatnonzero(history[:-1] - history[1:] > fall)
    return int(fallen[0]) if fallen.size else len(history) - 1


def _history(name: str, value: Any) -> Float[np.ndarray, " evaluations"]:
    value = np.asarray(checks.number(name, value, at_least=0), np.float64)
    if value.ndim != 1 or value.size == 0:
        raise ValueError(f"{name} must be (evaluations,) with at least one, got {value.shape}")
    return value
