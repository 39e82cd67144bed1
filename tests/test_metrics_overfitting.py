"""Catastrophic overfitting and early stopping on histories that are written down."""

import numpy as np
import pytest

from robustjax.metrics import catastrophic_overfitting, early_stopping

# The published collapse lies between the third evaluation and the fourth.
PGD = [30.0, 38.0, 40.1, 0.0, 0.0]
FGSM = [35.0, 42.0, 43.5, 86.7, 90.0]


def test_collapse_is_flagged_once_by_accuracies_and_throughout_by_losses():
    assert catastrophic_overfitting(PGD, FGSM).tolist() == [0, 0, 0, 1, 0]
    pgd_loss, fgsm_loss = [1.9, 1.7, 1.65, 9.0, 9.5], [1.85, 1.65, 1.6, 0.4, 0.3]
    found = catastrophic_overfitting(PGD, FGSM, pgd_loss, fgsm_loss)
    assert found.tolist() == [0, 0, 0, 1, 1]


@pytest.mark.parametrize(
    ("pgd", "fgsm", "expected"),
    [
        ([0.4, 0.2], [0.5, 0.5], False),  # exactly the share, and not more
        ([0.4, 0.19], [0.5, 0.5], True),
        ([0.4, 0.19], [0.5, 0.49], False),  # both fall: training has broken in another way
        ([0.4, 0.3, 0.2, 0.1], [0.5, 0.6, 0.7, 0.8], False),  # too slow for this condition
        ([0.0, 0.0], [0.5, 0.6], False),
        ([0.1, 0.4], [0.1, 0.4], False),
        ([0.4], [0.5], False),
    ],
)
def test_condition_on_accuracies(pgd, fgsm, expected):
    found = catastrophic_overfitting(pgd, fgsm)
    assert found.shape == (len(pgd),) and not found[0]
    assert found.any() == expected
    as_shares = catastrophic_overfitting(100 * np.array(pgd), 100 * np.array(fgsm))
    np.testing.assert_array_equal(found, as_shares)


def test_condition_on_losses_is_strict_and_needs_no_evaluation_before():
    steady = [0.4, 0.4, 0.4]
    found = catastrophic_overfitting(steady, steady, [3.1, 3.0, 0.0], [2.0, 2.0, 0.0])
    assert found.tolist() == [1, 0, 0]
    assert not catastrophic_overfitting(steady, steady, [3.1] * 3, [2.0] * 3, ratio=2).any()


def test_drop_is_an_argument():
    assert catastrophic_overfitting([0.4, 0.3], [0.5, 0.5], drop=0.2).any()


@pytest.mark.parametrize(
    "history, kept",
    [([0.3, 0.5, 0.45, 0.1, 0.6], 2), ([0.3, 0.2, 0.1], 2), ([0.5, 0.1], 0), ([0.4], 0)],
)
def test_early_stopping_before_the_first_fall(history, kept):
    assert early_stopping(history, fall=0.2) == kept


def test_early_stopping_keeps_the_first_of_the_best():
    assert early_stopping(PGD) == 2
    assert early_stopping([0.1, 0.3, 0.3, 0.2, 0.3]) == 1
    assert early_stopping([0.0, 0.0]) == 0

    def while_running(history):
        best, kept = -1.0, None
        for i, accuracy in enumerate(history):
            if accuracy > best:
                best, kept = accuracy, i
        return kept

    history = np.random.default_rng(0).integers(0, 5, 30) / 5
    assert early_stopping(history) == while_running(history)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: early_stopping([]), "pgd_accuracy must be"),
        (lambda: early_stopping([0.1, float("nan")]), "pgd_accuracy must be"),
        (lambda: catastrophic_overfitting([0.1], [0.1, 0.2]), "fgsm_accuracy must have the shape"),
        (lambda: catastrophic_overfitting([0.1], [0.1], [1.0]), "pgd_loss must be given with"),
        (lambda: catastrophic_overfitting([0.1], [0.1], drop=1), "drop must be < 1"),
        (lambda: catastrophic_overfitting([-0.1], [0.1]), "pgd_accuracy must be >= 0"),
    ],
)
def test_bad_input(plain_calls, call, message):
    with pytest.raises(ValueError, match=message):
        call()
